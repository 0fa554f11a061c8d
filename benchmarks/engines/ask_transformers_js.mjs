// transformers.js in Node, run where it is installed: node ask_transformers_js.mjs MODEL QUESTIONS.json ANSWERS.json [DTYPE]
import { existsSync, readFileSync, realpathSync, writeFileSync } from "node:fs";
import { createRequire } from "node:module";
import { basename, dirname } from "node:path";
import { pathToFileURL } from "node:url";

// From where it is started, not from where this file is: npm install @huggingface/transformers
const found = createRequire(pathToFileURL(process.cwd() + "/")).resolve("@huggingface/transformers");
const { AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer, BaseStreamer, cat, env, load_image } =
  await import(pathToFileURL(found.replace(/\.cjs$/, ".mjs")));

const [model_folder, questions_file, answers_file, dtype] = process.argv.slice(2);
const path = realpathSync(model_folder);
env.allowRemoteModels = false;
env.localModelPath = dirname(path);
const name = basename(path);

let started = performance.now();
const seconds = () => (performance.now() - started) / 1000;
const threads = Number(process.env.OMP_NUM_THREADS ?? 0);
const options = { session_options: { intraOpNumThreads: threads }, ...(dtype && { dtype }) }; // else what config.json says
const sees = JSON.parse(readFileSync(path + "/config.json")).model_type === "llava";
const model = await (sees ? AutoModelForImageTextToText : AutoModelForCausalLM).from_pretrained(name, options);
const processor = sees ? await AutoProcessor.from_pretrained(name) : null;
const tokenizer = processor?.tokenizer ?? (await AutoTokenizer.from_pretrained(name));
const load_seconds = seconds();

// TextStreamer takes one row only
class Clock extends BaseStreamer {
  constructor(tick) {
    super();
    this.tick = tick;
    this.is_prompt = true;
  }
  put() {
    if (!this.is_prompt) this.tick();
    this.is_prompt = false;
  }
  end() {}
}

// As report.py: what the starting process had is not counted
function peak_memory() {
  const status = "/proc/self/status";
  if (!existsSync(status)) return process.resourceUsage().maxRSS * 1024;
  return Number(/VmHWM:\s+(\d+)/.exec(readFileSync(status, "utf8"))[1]) * 1024;
}

const answers = [];
for (const { id, text, images, max_new_tokens, rows = 1 } of JSON.parse(readFileSync(questions_file))) {
  started = performance.now();
  const content = [...images.map(() => ({ type: "image" })), { type: "text", text }];
  const messages = [{ role: "user", content: images.length ? content : text }];
  let prompt = tokenizer.apply_chat_template(messages, { tokenize: false, add_generation_prompt: true });
  let inputs = {};
  if (images.length) {
    // LlavaProcessor expands the first image token only, so the prompt is expanded here
    const pixels = await processor.image_processor(await Promise.all(images.map((image) => load_image(image))));
    const { image_token, patch_size, num_additional_image_tokens } = processor.config;
    const [height, width] = pixels.pixel_values.dims.slice(-2);
    const count = Math.floor(height / patch_size) * Math.floor(width / patch_size) + num_additional_image_tokens;
    prompt = prompt.replaceAll(image_token, image_token.repeat(count));
    inputs = { pixel_values: cat(Array(rows).fill(pixels.pixel_values), 0) };
  }
  inputs = { ...inputs, ...tokenizer(Array(rows).fill(prompt), { add_special_tokens: false }) };
  let first_token_seconds = null;
  const streamer = new Clock(() => (first_token_seconds ??= seconds()));
  const output = await model.generate({ ...inputs, max_new_tokens, do_sample: false, streamer });
  const answer = output.slice(null, [inputs.input_ids.dims[1], null]);
  answers.push({
    id,
    text: tokenizer.batch_decode(answer, { skip_special_tokens: true })[0].trim(),
    tokens: rows * answer.dims[1],
    first_token_seconds,
    seconds: seconds(),
  });
}
const report = {
  runtime: `transformers.js ${env.version}`,
  load_seconds,
  peak_memory_bytes: peak_memory(),
  answers,
};
writeFileSync(answers_file, JSON.stringify(report, null, 1));
