// The page: words, pictures, questions. What is asked is answered by worker.js.

const WORDS = {
  en: {
    about: "Looks at a picture and answers, in this browser: no picture leaves your device. It may be wrong and sound sure.",
    invitation: "Drop a picture here, paste one, or press to choose one",
    shown: "The picture that you ask about",
    example: { apple: "Example: an apple", dog: "Example: a dog", pizza: "Example: a pizza", sunflower: "Example: a sunflower" },
    camera: "Camera",
    take: "Take picture",
    cancel: "Cancel",
    question: "Question",
    ask: "Ask",
    stop: "Stop",
    suggestions: ["What is this?", "Describe this image."],
    loading: (share, size) => `Loading the model: ${share} % of ${size} MB, once`,
    starting: "Starting the model",
    ready: (name, device) => `Ready, also offline (${name}, ${device})`,
    broken: (name) => `${name} cannot be read as a picture`,
    noCamera: "The camera cannot be used",
    failed: (message) => `That did not work: ${message}`,
  },
  zh: {
    about: "在浏览器里看图回答：图片不会离开你的设备。它可能答错，却说得很肯定。",
    invitation: "把图片拖到这里、粘贴，或点按选择",
    shown: "你要问的图片",
    example: { apple: "示例：苹果", dog: "示例：狗", pizza: "示例：披萨", sunflower: "示例：向日葵" },
    camera: "拍照",
    take: "拍下",
    cancel: "取消",
    question: "问题",
    ask: "提问",
    stop: "停止",
    suggestions: ["这是什么？", "描述这张图片。"],
    loading: (share, size) => `正在加载模型：${share} %，共 ${size} MB，只需一次`,
    starting: "正在启动模型",
    ready: (name, device) => `已就绪，断网也能用（${name}，${device}）`,
    broken: (name) => `无法读取图片 ${name}`,
    noCamera: "无法使用摄像头",
    failed: (message) => `出错了：${message}`,
  },
};
const language = navigator.language.startsWith("zh") ? "zh" : "en";
const words = WORDS[language];
const find = (id) => document.getElementById(id);
const [frame, picture, question, ask, answers] = ["frame", "picture", "question", "ask", "answers"].map(find);

let blob = null; // the picture
let isReady = false;
let current = null; // the answer that is being written

document.documentElement.lang = language;
for (const element of document.querySelectorAll("[data-words]")) element.textContent = words[element.dataset.words];
question.placeholder = question.value = words.suggestions[0];
picture.alt = words.shown;
find("file").ariaLabel = words.invitation;

function update() {
  ask.textContent = current ? words.stop : words.ask;
  ask.disabled = !current && !(isReady && blob);
  for (const button of find("suggestions").children) button.disabled = !isReady || !blob || current;
}

function showError(message) {
  find("error").textContent = message;
  find("error").hidden = !message;
}

// --- Pictures ---

async function show(file) {
  const url = URL.createObjectURL(file);
  const image = new Image();
  image.src = url;
  try {
    await image.decode();
  } catch {
    URL.revokeObjectURL(url);
    return showError(words.broken(file.name ?? ""));
  }
  showError("");
  blob = file;
  picture.src = url; // kept, because answers show it too
  picture.hidden = false;
  find("invitation").hidden = true;
  frame.classList.add("filled");
  update();
}

find("file").onchange = ({ target }) => {
  if (target.files.length) show(target.files[0]);
  target.value = ""; // so that the same file can be chosen again
};
addEventListener("paste", ({ clipboardData }) => {
  if (clipboardData.files.length) show(clipboardData.files[0]);
});
addEventListener("dragover", (event) => {
  event.preventDefault();
  frame.classList.add("over");
});
for (const type of ["dragleave", "drop"]) addEventListener(type, () => frame.classList.remove("over"));
addEventListener("drop", (event) => {
  event.preventDefault();
  if (event.dataTransfer.files.length) show(event.dataTransfer.files[0]);
});
for (const [name, text] of Object.entries(words.example)) {
  const button = document.createElement("button");
  const image = Object.assign(new Image(), { src: `examples/${name}.png`, alt: text });
  button.type = "button";
  button.append(image);
  button.onclick = async () => show(await (await fetch(image.src)).blob());
  find("examples").append(document.createElement("li"));
  find("examples").lastChild.append(button);
}

// --- Camera ---

const video = find("video");
find("camera").hidden = !navigator.mediaDevices;
find("camera").onclick = async () => {
  try {
    video.srcObject = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment" } });
    await video.play(); // before the first frame there is nothing to take
    find("shutter").showModal();
  } catch {
    showError(words.noCamera);
  }
};
find("take").onclick = () => {
  const canvas = Object.assign(document.createElement("canvas"), { width: video.videoWidth, height: video.videoHeight });
  canvas.getContext("2d").drawImage(video, 0, 0);
  canvas.toBlob(show);
  find("shutter").close();
};
find("cancel").onclick = () => find("shutter").close();
find("shutter").onclose = () => video.srcObject.getTracks().forEach((track) => track.stop());

// --- Questions ---

for (const text of words.suggestions) {
  const button = Object.assign(document.createElement("button"), { type: "button", textContent: text });
  button.onclick = () => {
    question.value = text;
    find("form").requestSubmit();
  };
  find("suggestions").append(button);
}
find("form").onsubmit = (event) => {
  event.preventDefault();
  if (current) return worker.postMessage({ type: "stop" });
  if (ask.disabled) return;
  showError("");
  const text = question.value.trim();
  const item = document.createElement("li");
  const [asked, said] = ["asked", "answer"].map((name) => Object.assign(document.createElement("p"), { className: name }));
  asked.textContent = text;
  item.append(Object.assign(new Image(), { src: picture.src, alt: "" }), asked, said);
  answers.prepend(item);
  answers.setAttribute("aria-busy", "true"); // screen readers wait for the whole answer
  current = said;
  worker.postMessage({ type: "answer", picture: blob, text });
  update();
};

function finish() {
  current = null;
  answers.removeAttribute("aria-busy");
  update();
}

// --- The worker ---

const on = {
  progress({ share, total }) {
    find("progress").value = share;
    find("status").textContent =
      share < 1 ? words.loading(Math.floor(share * 100), (total / 1e6).toFixed(0)) : words.starting;
  },
  ready({ name, device }) {
    isReady = true;
    find("progress").hidden = true;
    find("status").textContent = words.ready(name, device === "webgpu" ? "WebGPU" : "WebAssembly");
    update();
  },
  piece({ piece }) {
    current.textContent += piece;
  },
  answer({ text }) {
    current.textContent = text;
    finish();
  },
  error({ message }) {
    showError(words.failed(message));
    if (!isReady) find("loading").hidden = true;
    current?.parentElement.remove();
    finish();
  },
};

update();
find("status").textContent = words.loading(0, "…");
// Waits for the service worker, so that it sees, and keeps, all that is loaded. Where there is none, as in some private
// windows, the page works, but not without a network
const registered = navigator.serviceWorker?.register("service-worker.js").then(() => navigator.serviceWorker.ready);
await Promise.race([registered, new Promise((resolve) => setTimeout(resolve, 3000))]).catch(() => {});
const worker = new Worker("worker.js", { type: "module" });
worker.onmessage = ({ data: { type, ...content } }) => on[type](content);
worker.onerror = ({ message }) => on.error({ message: message ?? "worker.js" });
worker.postMessage({ type: "load" });
