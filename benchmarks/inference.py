"""Inference speed: this package, transformers' LLaVA with the same shapes, and the original, in one run.

    python benchmarks/inference.py                        # random weights of all released sizes
    python benchmarks/inference.py --size minimind3-65m --compile
    python benchmarks/inference.py --checkpoint checkpoints/minimind-v-emoji
    python benchmarks/inference.py --original CHECKOUT    # a clone of the original project, on the same weights

`column-major` is minimind_v with its weights stored column-major, as the command line has them on a CPU.
Everything is greedy, without an end token, and interleaved: each round measures every candidate once, and the median
of the rounds counts. Beside the figures stand the limits of the machine, measured in the same run: bytes per second of
a copy, and floating-point operations per second of a matrix product. Decoding one row reads every weight of the
decoder once per token, so it cannot be faster than the copy; prefill and tower are matrix products.
"""

import argparse
import copy
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from real_sizes import SIZES, make_config, make_model, make_processor, peak_memory_gb, run_apart
from tqdm import tqdm
from transformers import (
    CompileConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    StoppingCriteria,
)

from minimind_v import MiniMindVConfig, MiniMindVForConditionalGeneration
from minimind_v.conversion.key_maps import to_original
from minimind_v.export import library_config
from minimind_v.inference.engine import store_column_major

Timings = dict[str, list[float]]
COLUMN_MAJOR = "column-major"


def seconds(action: Callable[[], Any]) -> float:
    """How long one call takes, with all work of a GPU done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    started = time.perf_counter()
    action()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def take_turns(
    actions: dict[str, Callable],
    rounds: int,
    title: str,
    measure: Callable[[Callable], float] = seconds,
) -> Timings:
    """Seconds (or what `measure` gives) of each action in each round; one round before warms up."""
    timings: Timings = {name: [] for name in actions}
    for number in tqdm(range(rounds + 1), desc=title, unit="round", leave=False):
        for name, action in actions.items():
            figure = measure(action)
            if number:
                timings[name].append(figure)
    return timings


def limits(device: str, dtype: torch.dtype) -> tuple[float, float]:
    """Bytes per second that a copy reads, and floating-point operations per second of a matrix product."""
    source = torch.ones(2**27 // dtype.itemsize * 2, dtype=dtype, device=device)
    target = torch.empty_like(source)
    matrix = torch.ones(2048, 2048, dtype=dtype, device=device)
    timings = take_turns({"copy": lambda: target.copy_(source), "product": lambda: matrix @ matrix}, 5, "limits")
    bandwidth = 2 * source.nbytes / min(timings["copy"])  # read and written
    return bandwidth, 2 * 2048**3 / min(timings["product"])


def make_llava(config: MiniMindVConfig, dtype: torch.dtype) -> LlavaForConditionalGeneration:
    """LLaVA with the shapes of `config`: the same tower, decoder and number of image tokens."""
    return LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=config.vision_config,
            text_config=library_config(config.text_config),
            image_token_index=config.image_token_id,
            vision_feature_layer=-1,
            vision_feature_select_strategy=config.vision_feature_select_strategy,
            tie_word_embeddings=True,
        )
    ).to(dtype).eval()  # fmt: skip


def make_original(checkout: str, model: PreTrainedModel) -> torch.nn.Module:
    """The original's model with the weights of ours; without its tower, so for text only."""
    sys.path.insert(0, checkout)
    from model.model_vlm import MiniMindVLM, VLMConfig  # the original's own module

    text = model.config.get_text_config()
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    sizes = {name: getattr(text, name) for name in (*names, "vocab_size", "rms_norm_eps", "use_moe")}
    original = MiniMindVLM(VLMConfig(**sizes), "no tower")
    state = {name: value for name, value in model.state_dict().items() if "vision_tower" not in name}
    release = "minimind3" if text.use_qk_norm else "minimind2"
    state = to_original(state, release, text.head_dim, text.num_shared_experts)
    missing = original.load_state_dict(state, strict=False).missing_keys
    if any(not name.startswith("vision") for name in missing):
        raise ValueError(f"{checkout} is of another release than {release}: it has no {missing[:3]}")
    return original.to(model.device, model.dtype).eval()


class Clock(StoppingCriteria):
    """Never stops `generate()`, but notes when each token is there."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs: Any) -> torch.BoolTensor:
        if input_ids.is_cuda:
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    def rate(self) -> float:
        """Tokens per second of a row, after its first."""
        return (len(self.times) - 1) / (self.times[-1] - self.times[0])


@torch.no_grad()
def generate_as_the_original(model: torch.nn.Module, input_ids: torch.Tensor, new_tokens: int, clock: Clock) -> None:
    """The original's loop, greedy: its forward with its cache, one token at a time."""
    unseen, cache = input_ids, None
    for _ in range(new_tokens):
        outputs = model(unseen, past_key_values=cache, use_cache=True)
        unseen, cache = outputs.logits[:, -1:].argmax(-1), outputs.past_key_values
        input_ids = torch.cat((input_ids, unseen), dim=1)
        clock(input_ids, outputs.logits)


def make_inputs(config: MiniMindVConfig, rows: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Prompts of one image and 16 to 48 text tokens, padded on the left."""
    generator = torch.Generator().manual_seed(0)
    placeholders = [config.image_token_id] * config.image_seq_length
    prompts = []
    for row in range(rows):
        text = torch.randint(100, 1200, (16 + 32 * row // max(rows - 1, 1),), generator=generator)
        prompts.append(torch.cat((torch.tensor(placeholders, dtype=torch.long), text)).flip(0))
    pad = torch.nn.utils.rnn.pad_sequence
    inputs = {
        "input_ids": pad(prompts, batch_first=True).flip(1),
        "attention_mask": pad([torch.ones_like(prompt) for prompt in prompts], batch_first=True).flip(1),
    }
    size = config.vision_config.image_size
    return inputs | {"pixel_values": torch.randn(rows, 3, size, size, generator=generator).to(dtype)}


def make_ours(source: str, dtype: torch.dtype) -> MiniMindVForConditionalGeneration:
    """A released size with random weights, or the checkpoint of a folder."""
    if source in SIZES:
        return make_model(source, dtype)
    model = MiniMindVForConditionalGeneration.from_pretrained(source, dtype=dtype).eval()
    model.generation_config.update(pad_token_id=0, eos_token_id=None)
    return model


class Candidates:
    """The models to compare, on the same inputs."""

    def __init__(self, source: str, device: str, dtype: torch.dtype, original: str | None) -> None:
        ours = make_ours(source, dtype).to(device)
        self.config, self.device, self.dtype = ours.config, device, dtype
        llava = make_llava(self.config, dtype).to(device)
        llava.generation_config = copy.deepcopy(ours.generation_config)
        self.models: dict[str, PreTrainedModel] = {"minimind_v": ours, "LLaVA": llava}
        self.column_major = copy.deepcopy(ours)  # as the command line has it on a CPU
        store_column_major(self.column_major)
        self.original = make_original(original, ours) if original else None

    def inputs(self, rows: int) -> dict[str, torch.Tensor]:
        return {name: tensor.to(self.device) for name, tensor in make_inputs(self.config, rows, self.dtype).items()}

    def generate(self, name: str, inputs: dict[str, Any], new_tokens: int, **options: Any) -> torch.Tensor:
        limits = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False}
        model = self.column_major if name == COLUMN_MAJOR else self.models[name]
        return model.generate(**inputs, **limits, **options)

    def decoding(self, rows: int, new_tokens: int, rounds: int, **options: Any) -> Timings:
        """Tokens per second after the first one, all rows together, per candidate and round.

        The original answers one row at a time, whatever the number of rows.
        """
        inputs = self.inputs(rows)
        text = self.inputs(1)["input_ids"].clamp(min=100)  # for the original: as many tokens, all of them text

        def measure(generate: Callable[[Clock], Any]) -> float:
            clock = Clock()
            generate(clock)
            return clock.rate()

        actions: dict[str, Callable[[Clock], Any]] = {
            name: lambda clock, name=name: self.generate(
                name, inputs, 1 + new_tokens, stopping_criteria=[clock], **options
            )
            for name in (*self.models, COLUMN_MAJOR)
        }
        if self.original is not None:
            actions["original"] = lambda clock: generate_as_the_original(self.original, text, 1 + new_tokens, clock)
        rates = take_turns(actions, rounds, f"decoding {rows} rows", measure)
        return {name: [rate * (1 if name == "original" else rows) for rate in rates[name]] for name in rates}


def peak_memory(source: str, which: str, dtype: torch.dtype) -> float:
    """The process's peak memory in GB after a model was made and has answered one row."""
    config = make_config(source) if source in SIZES else MiniMindVConfig.from_pretrained(source)
    model = make_ours(source, dtype) if which == "minimind_v" else make_llava(config, dtype)
    inputs = make_inputs(config, 1, dtype)
    model.generate(**inputs, max_new_tokens=8, do_sample=False, pad_token_id=0)
    return peak_memory_gb()


def profile(candidates: Candidates, new_tokens: int) -> None:
    """Prints where the time of decoding one row goes, operation by operation."""
    inputs = candidates.inputs(1)
    for name in candidates.models:
        candidates.generate(name, inputs, 8)
        plain = seconds(lambda name=name: candidates.generate(name, inputs, new_tokens))
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            candidates.generate(name, inputs, new_tokens)
        print(
            f"\n{name}: {new_tokens} tokens in {plain:.2f} s without the profiler, which slows small operations down"
        )
        print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=12, max_name_column_width=40))


def import_seconds(rounds: int) -> dict[str, float]:
    """Median seconds of `import minimind_v`, and of the parts of transformers that it needs, in fresh processes."""
    needed = (
        "import torch, PIL.Image; from transformers import AutoModel, AutoImageProcessor, AutoTokenizer, "
        "ImageTextToTextPipeline, GenerationMixin, PreTrainedModel, ProcessorMixin; "
        "import transformers.models.qwen3_moe.modeling_qwen3_moe, transformers.models.auto.modeling_auto"
    )
    actions = {
        name: lambda code=code: subprocess.run([sys.executable, "-c", code], check=True, env=os.environ)
        for name, code in (("transformers", needed), ("minimind_v", "import minimind_v"))
    }
    return {name: statistics.median(values) for name, values in take_turns(actions, rounds, "imports").items()}


def report(source: str, options: argparse.Namespace) -> dict[str, Any]:
    """Measures one model and prints its table."""
    dtype = getattr(torch, options.dtype)
    candidates = Candidates(source, options.device, dtype, options.original)
    ours, config, rounds = candidates.models["minimind_v"], candidates.config, options.rounds
    bandwidth, flops = limits(options.device, dtype)
    lines: list[tuple[str, str, str, str]] = []
    result: dict[str, Any] = {"model": source, "bandwidth": bandwidth, "flops": flops}

    def add(key: str, title: str, values: dict[str, list[float]], unit: str, share: Callable | None = None) -> None:
        """A row of the table: each candidate's median and spread, and our ratio to the others (above 1: faster)."""
        medians = {name: statistics.median(value) for name, value in values.items()}
        mine = medians["minimind_v"]
        ratios = {name: mine / other if "/s" in unit else other / mine for name, other in medians.items()}
        figures = [
            f"{name} {medians[name]:.4g} {unit} ({min(value):.4g}-{max(value):.4g})" for name, value in values.items()
        ]
        result[key] = {"medians": medians, "ratios": ratios, "unit": unit, "rounds": values}
        if share is not None:
            result[key]["share_of_limit"] = share(mine)
        lines.append(
            (
                title,
                "; ".join(figures),
                ", ".join(f"{ratio:.2f}x {name}" for name, ratio in ratios.items() if name != "minimind_v"),
                f"{share(mine):.0%}" if share else "",
            )
        )

    weights = sum(p.nbytes for n, p in ours.named_parameters() if "language_model" in n)
    if config.text_config.use_moe:  # only the active experts are read
        experts = sum(p.nbytes for n, p in ours.named_parameters() if ".experts." in n)
        weights -= experts - experts * config.text_config.num_experts_per_tok // config.text_config.num_experts
    tower = sum(p.numel() for p in ours.model.vision_tower.parameters())

    inputs = candidates.inputs(1)
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}]
    chat[0]["content"][0]["image"] = Image.effect_noise((640, 480), 100).convert("RGB")
    encode = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    processor = make_processor(config)
    positions = config.image_seq_length + (config.vision_feature_select_strategy == "default")
    with torch.no_grad():
        features = {"image": ours.get_image_features(inputs["pixel_values"])}
        text = {key: value for key, value in inputs.items() if key != "pixel_values"}
        actions = {"minimind_v": lambda: processor.apply_chat_template(chat, **encode)}
        add("preprocessing", "picture of 640 x 480 and question to inputs", take_turns(actions, rounds, "inputs"), "s")
        actions = {
            name: lambda model=model: model.get_image_features(inputs["pixel_values"])
            for name, model in candidates.models.items()
        }
        timings = take_turns(actions, rounds, "tower")
        add("tower", "tower and projector, one picture", timings, "s", lambda s: 2 * tower * positions / s / flops)
        actions = {name: lambda name=name: candidates.generate(name, inputs, 1) for name in candidates.models}
        add("first_token", "first token (tower, prefill)", take_turns(actions, rounds, "first token"), "s")
        actions = {
            "minimind_v": lambda: candidates.generate("minimind_v", text, 1, mm_encoder_outputs=features),
            "minimind_v with its tower": lambda: candidates.generate("minimind_v", inputs, 1),
        }
        timings = take_turns(actions, rounds, "second question")
        add("second_question", "first token of a second question, features reused", timings, "s")
    for rows in options.batches:
        rates = candidates.decoding(rows, options.new_tokens, rounds)
        limit = (lambda rate: rate * weights / bandwidth) if rows == 1 else None
        add(f"decode_{rows}", f"decoding {rows} rows", rates, "tokens/s", limit)
    if options.profile:
        profile(candidates, 4 * options.new_tokens)
    if options.compile:
        compile_config = CompileConfig(fullgraph=True)
        compile_config._compile_all_devices = True  # generate() compiles on GPUs only, unless asked
        static = {"cache_implementation": "static", "compile_config": compile_config}
        compiled = candidates.decoding(1, options.new_tokens, rounds, **static)
        add("decode_1_compiled", "decoding 1 row, static cache, compiled", compiled, "tokens/s")
        for name, rates in compiled.items():
            if name == "original":
                continue
            eager = result["decode_1"]["medians"][name]
            result["decode_1_compiled"][f"{name}_to_eager"] = statistics.median(rates) / eager
            lines.append((f"compiled to eager, {name}", "", f"{statistics.median(rates) / eager:.2f}x", ""))

    with tempfile.TemporaryDirectory() as folder:
        for name, model in candidates.models.items():
            model.save_pretrained(Path(folder, name))
        loading = {
            name: lambda name=name, model=model: type(model).from_pretrained(Path(folder, name), dtype=dtype)
            for name, model in candidates.models.items()
        }
        add("loading", "loading", take_turns(loading, rounds, "loading"), "s")
    if options.device == "cpu":
        names = list(candidates.models)
        del candidates, ours
        memory = {name: [run_apart(peak_memory, source, name, dtype)] for name in names}
        add("memory", "peak memory of a process, one row", memory, "GB")

    print(f"\n### {source}, {options.dtype}, {options.device}\n")
    print(f"Limits: copy {bandwidth / 1e9:.1f} GB/s, matrix product {flops / 1e9:.0f} GFLOP/s.\n")
    print("| | median (spread) | minimind_v is | share of the limit |\n|---|---|---|---|")
    for line in lines:
        print(f"| {' | '.join(line)} |")
    return result


def draw(results: list[dict[str, Any]], path: str) -> None:
    """Chart of the ratios to LLaVA, and to the original where it was measured."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, all_axes = pyplot.subplots(
        1, len(results), figsize=(7 * len(results), 5), layout="constrained", squeeze=False
    )
    for axes, result in zip(all_axes[0], results, strict=True):
        bars = {
            f"{key} / {name}": ratio
            for key, value in result.items()
            if isinstance(value, dict) and "ratios" in value
            for name, ratio in value["ratios"].items()
            if name != "minimind_v"
        }
        axes.barh(list(bars)[::-1], list(bars.values())[::-1])
        axes.axvline(1, color="black", linewidth=1)
        axes.set(title=result["model"], xlabel="minimind_v is so many times as fast, or as small", xscale="log")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", action="append", choices=list(SIZES), help="default: all, or none with --checkpoint")
    parser.add_argument("--checkpoint", action="append", metavar="FOLDER", help="also a model of yours")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16, 64], help="rows to decode at once")
    parser.add_argument("--new-tokens", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compile", action="store_true", help="also with a static cache and torch.compile (minutes)")
    parser.add_argument("--profile", action="store_true", help="also print what decoding spends its time on")
    parser.add_argument("--original", metavar="CHECKOUT", help="clone of the original project")
    parser.add_argument("--chart", metavar="PNG", help="picture of the ratios to write")
    options = parser.parse_args()
    imports = import_seconds(options.rounds)
    print(f"Import: transformers' parts {imports['transformers']:.2f} s, minimind_v {imports['minimind_v']:.2f} s")
    sources = (options.size or []) + (options.checkpoint or [])
    results = [report(source, options) for source in sources or SIZES]
    if options.chart:
        draw(results, options.chart)
    machine = {"machine": platform.machine(), "threads": torch.get_num_threads(), "torch": torch.__version__}
    print(json.dumps(machine | {"imports": imports, "results": results}))


if __name__ == "__main__":
    main()
