"""Training speed on CPU or GPU: the original's way against this package's, in one run.

    python benchmarks/training.py

The original pads every row to 768 tokens and runs the tower in every step. Against it stand, each on top of the one
before: rows padded to the longest of the batch, rows packed into one, and image features from the cache. The rows are
the same; the ways take turns, and the median of several rounds counts. Lengths of answers follow a log-normal
distribution, for captions (pretraining of the projector) with a median of 40 tokens, for instructions (SFT of
projector and decoder) of 130.
"""

import argparse
import json
import platform
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from real_sizes import make_model, make_processor, peak_memory_gb, run_apart
from tqdm import tqdm

from minimind_v.training import MiniMindVDataCollator, MiniMindVDataset, freeze
from minimind_v.training.image_features import ImageFeatureCache, pass_features_through

WAYS = ["padded to 768", "padded to the longest", "packed", "packed, cached features"]
MEDIAN_LENGTH = {"pretrain": 40, "sft": 130}
CASES = [(size, stage) for size in ("minimind2-26m", "minimind3-65m") for stage in ("sft", "pretrain")]


class PaddedTo768(MiniMindVDataCollator):
    """The original's batches."""

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = super().__call__(items)
        for name, value in (("input_ids", 0), ("labels", -100), ("attention_mask", 0)):
            missing = 768 - batch[name].shape[1]
            batch[name] = torch.nn.functional.pad(batch[name], (0, missing), value=value)
        return batch


def make_rows(folder: Path, stage: str, count: int, tokenizer: Any) -> list[dict[str, Any]]:
    """Chats about pictures of 640 x 480 pixels, written into `folder`."""
    rng, image_rng = random.Random(0), np.random.default_rng(0)
    words = sorted(word[1:] for word in tokenizer.get_vocab() if word[:1] == "Ġ" and word[1:].isalpha())
    rows = []
    for number in range(count):
        path = folder / f"{number}.jpg"
        coarse = Image.fromarray(image_rng.integers(0, 255, (30, 40, 3), dtype=np.uint8))
        coarse.resize((640, 480), Image.Resampling.BICUBIC).save(path)
        length = MEDIAN_LENGTH[stage] * rng.lognormvariate(0, 0.6)
        answer = " ".join(rng.choices(words, k=int(min(max(length, 8), 480))))
        question = [{"type": "image"}, {"type": "text", "text": "Describe the picture in detail."}]
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        rows.append({"messages": messages, "images": [str(path)]})
    return rows


class Bench:
    """A model of a size, in a stage, and all the ways to train it on the same rows."""

    def __init__(self, size: str, stage: str, rows: int, folder: str, device: str, dtype: str) -> None:
        model = make_model(size).to(device)
        freeze(model, stage)
        processor = make_processor(model.config)
        self.model, self.device, self.dtype = model.train(), device, getattr(torch, dtype)
        self.dataset = MiniMindVDataset(make_rows(Path(folder), stage, rows, processor.tokenizer))
        self.cache = ImageFeatureCache(Path(folder) / "features", model, processor, self.dtype)
        started = time.perf_counter()
        self.cache.fill(self.dataset)
        self.cache_seconds = time.perf_counter() - started
        pass_features_through(model)
        collators = [PaddedTo768(processor), MiniMindVDataCollator(processor)]
        collators.append(MiniMindVDataCollator(processor, packing=True))
        collators.append(MiniMindVDataCollator(processor, packing=True, image_features=self.cache))
        self.collators = dict(zip(WAYS, collators, strict=True))
        self.optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)

    def load(self, way: str, start: int, batch_size: int) -> tuple[dict[str, torch.Tensor], float]:
        """A batch, and the seconds it took to load."""
        started = time.perf_counter()
        batch = self.collators[way]([self.dataset[i] for i in range(start, start + batch_size)])
        return batch, time.perf_counter() - started

    def step(self, batch: dict[str, torch.Tensor]) -> float:
        """Seconds of a step: forward, backward, optimizer."""
        started = time.perf_counter()
        batch = {name: tensor.to(self.device) for name, tensor in batch.items()}
        with torch.autocast(self.device.split(":")[0], self.dtype, enabled=self.dtype != torch.float32):
            loss = self.model(**batch).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        loss.item()  # waits for a GPU
        return time.perf_counter() - started


def peak_memory(arguments: tuple[Any, ...], way: str, batch_size: int) -> float:
    """Peak memory of a step, in GB; for a process of its own."""
    bench = Bench(*arguments)
    batch, _ = bench.load(way, 0, batch_size)
    if bench.device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    bench.step(batch)
    return peak_memory_gb() if bench.device == "cpu" else torch.cuda.max_memory_allocated() / 1e9


def run(size: str, stage: str, options: argparse.Namespace) -> dict[str, Any]:
    """Measures all ways in turns and prints their table."""
    batch_size, rounds = options.batch_size, options.rounds
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    loading: dict[str, list[float]] = {way: [] for way in WAYS}
    memory = {}
    with tempfile.TemporaryDirectory() as folder:
        arguments = (size, stage, batch_size * (rounds + 1), folder, options.device, options.dtype)
        bench = Bench(*arguments)
        for number in tqdm(range(rounds + 1), desc=f"{size} {stage}", unit="round"):
            for way in WAYS:
                batch, load_seconds = bench.load(way, number * batch_size, batch_size)
                step_seconds = bench.step(batch)
                if number:  # the first round warms up
                    seconds[way].append(step_seconds + load_seconds)
                    loading[way].append(load_seconds)
        cache_seconds = bench.cache_seconds / len(bench.dataset)
        del bench
        if options.memory:
            memory = {way: run_apart(peak_memory, arguments, way, batch_size) for way in WAYS}
    result = {"size": size, "stage": stage, "cache_seconds_per_picture": cache_seconds, "ways": {}}
    reference = statistics.median(seconds[WAYS[0]])
    print(f"\n{size}, {stage}: {batch_size} rows a step, {rounds} rounds; the cache: {cache_seconds:.3f} s a row")
    print("| way | samples/s | spread | ratio | to the one before | loading | peak memory |")
    print("|---|---|---|---|---|---|---|")
    before = reference
    for way in WAYS:
        median = statistics.median(seconds[way])
        ratios = sorted(a / b for a, b in zip(seconds[WAYS[0]], seconds[way], strict=True))
        entry = {
            "samples_per_second": batch_size / median,
            "spread": [batch_size / max(seconds[way]), batch_size / min(seconds[way])],
            "ratio": reference / median,
            "ratio_spread": [ratios[0], ratios[-1]],
            "loading_share": statistics.median(loading[way]) / median,
            "peak_memory_gb": memory.get(way),
        }
        result["ways"][way] = entry
        print(
            f"| {way} | {entry['samples_per_second']:.2f} | {entry['spread'][0]:.2f}-{entry['spread'][1]:.2f} "
            f"| {entry['ratio']:.2f} | {before / median:.2f} | {entry['loading_share']:.0%} "
            f"| {f'{memory[way]:.1f} GB' if way in memory else '-'} |"
        )
        before = median
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=8, help="rows a step")
    parser.add_argument("--rounds", type=int, default=3, help="measured rounds; one more warms up")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True, help="measure peak memory")
    parser.add_argument("--case", help="only this one, such as minimind3-65m:sft")
    options = parser.parse_args()
    cases = [tuple(options.case.split(":"))] if options.case else CASES
    machine = {"machine": platform.machine(), "threads": torch.get_num_threads(), "torch": torch.__version__}
    print(json.dumps(machine | {"results": [run(size, stage, options) for size, stage in cases]}))


if __name__ == "__main__":
    main()
