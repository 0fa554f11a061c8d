// Loads transformers.js, ONNX Runtime and the model, and answers, beside the page, which stays free meanwhile.
// Scripts are fetched with their hashes, which the browser checks, and only then run: import maps do not reach workers.
import { readPicture } from "./picture.js";

let library, model, processor, stopping;

onmessage = ({ data: { type, ...content } }) => {
  if (type === "stop") stopping.interrupt();
  else run(type === "load" ? load : answer, content);
};

async function run(task, content) {
  try {
    await task(content);
  } catch (error) {
    postMessage({ type: "error", message: error.message ?? String(error) });
  }
}

async function load() {
  const settings = await (await fetch("settings.json")).json();
  if (await hasGPU()) {
    try {
      return await loadOn("webgpu", settings);
    } catch (error) {
      console.warn("WebGPU is left alone, because this went wrong:", error);
    }
  }
  await loadOn("wasm", settings);
}

async function hasGPU() {
  try {
    return Boolean(await navigator.gpu?.requestAdapter());
  } catch {
    return false;
  }
}

async function loadOn(device, { model: shown, scripts }) {
  const used = [scripts.transformers, scripts[`${device}_loader`], scripts[`${device}_binary`]];
  const total = used.reduce((sum, { size }) => sum + size, shown.size);
  let received = 0;

  async function download(url, options) {
    const response = await fetch(url, options);
    const count = new TransformStream({
      transform(chunk, controller) {
        received += chunk.byteLength;
        postMessage({ type: "progress", share: Math.min(1, received / total), total });
        controller.enqueue(chunk);
      },
    });
    return new Response(response.body.pipeThrough(count), response);
  }

  const [code, loader, binary] = await Promise.all(
    used.map(async ({ url, integrity }) => {
      try {
        const response = await download(url, { integrity });
        if (response.ok) return await response.arrayBuffer();
      } catch {
        // The browser does not say which of both it is
      }
      throw new Error(`${url} cannot be fetched, or is not the file that this page was made with`);
    }),
  );
  const runtime = JSON.stringify(toModule(loader));
  const text = new TextDecoder().decode(code);
  library = await import(toModule(text.replaceAll(/(?<=from)"onnxruntime-(web\/webgpu|common)"/g, runtime)));
  const { AutoModelForImageTextToText, AutoProcessor, InterruptableStoppingCriteria, env } = library;
  const here = new URL(".", location).pathname;
  Object.assign(env, { allowLocalModels: true, allowRemoteModels: false, localModelPath: here, fetch: download });
  Object.assign(env, { useBrowserCache: false, useWasmCache: false }); // the service worker keeps all
  Object.assign(env.backends.onnx.wasm, { wasmPaths: undefined, wasmBinary: binary });
  processor = await AutoProcessor.from_pretrained(shown.folder);
  model = await AutoModelForImageTextToText.from_pretrained(shown.folder, { device });
  stopping = new InterruptableStoppingCriteria();
  const { forward } = model;
  model.forward = async (inputs) => {
    await pause();
    return forward.call(model, inputs);
  };
  postMessage({ type: "ready", name: shown.name, device });
  await forget([shown.folder, ...used.map(({ url }) => url)]);
}

/** Drops models and scripts of earlier versions of this page, which the service worker has kept. */
async function forget(used) {
  const cache = await self.caches?.open("minimind-v");
  for (const request of (await cache?.keys()) ?? []) {
    const isOld = /@\d|\/model-/.test(request.url) && !used.some((part) => request.url.includes(part));
    if (isOld) await cache.delete(request);
  }
}

const toModule = (code) => URL.createObjectURL(new Blob([code], { type: "text/javascript" }));

/** Lets messages in between two tokens, of which one may be to stop. */
function pause() {
  const { port1, port2 } = new MessageChannel();
  return new Promise((resolve) => {
    port1.onmessage = () => resolve(port1.close());
    port2.postMessage(null);
  });
}

async function answer({ picture, text }) {
  stopping.reset();
  const { tokenizer, image_processor, config } = processor;
  const { data, width, height } = await readPicture(picture, image_processor);
  const { pixel_values } = await image_processor(new library.RawImage(data, width, height, 3));
  const messages = [{ role: "user", content: [{ type: "image" }, { type: "text", text }] }];
  let prompt = tokenizer.apply_chat_template(messages, { tokenize: false, add_generation_prompt: true });
  const [rows, columns] = pixel_values.dims.slice(-2).map((side) => Math.floor(side / config.patch_size));
  prompt = prompt.replace(config.image_token, (token) => token.repeat(rows * columns + config.num_additional_image_tokens));
  const streamer = new library.TextStreamer(tokenizer, {
    skip_prompt: true,
    skip_special_tokens: true,
    callback_function: (piece) => postMessage({ type: "piece", piece }),
  });
  const inputs = { pixel_values, ...tokenizer(prompt, { add_special_tokens: false }) };
  const max_new_tokens = model.generation_config.max_new_tokens ?? 512;
  const options = { max_new_tokens, do_sample: false, streamer, stopping_criteria: stopping };
  const output = await model.generate({ ...inputs, ...options });
  const ids = output.slice(null, [inputs.input_ids.dims[1], null]);
  const [whole] = tokenizer.batch_decode(ids, { skip_special_tokens: true });
  postMessage({ type: "answer", text: whole.trim() });
}
