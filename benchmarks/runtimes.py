"""Speed, memory and size of every runtime, on the same model with random weights, interleaved in one run.

    python benchmarks/runtimes.py --size minimind3-65m --environments DIR

Every round starts each candidate once, in an environment of its own (benchmarks/asking.py), on one thread, and asks
the same questions; the median of the rounds counts. Beside the figures stands the limit of the machine, measured in
the same run: decoding one row reads every weight of the decoder once per token, so it cannot be faster than a copy.
Weights are random, but for the end token, which is never the likeliest.
"""

import argparse
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from asking import RUNTIMES, ask, prepare
from real_sizes import SIZES, save_checkpoint
from tqdm import tqdm

from inference import limits
from minimind_v import export as exports

IMAGE = Path(__file__).resolve().parents[1] / "examples" / "images" / "apple.png"
TRANSFORMERS = ["eager", "column-major", "int8", "bfloat16", "compiled"]
HEADER = """\
| runtime | 1 row, tokens/s | to eager | 16 rows | to eager | first token | memory | on disk |
|---|---|---|---|---|---|---|---|
"""


def make_candidates(
    size: str, variants: list[str], names: list[str], environments: Path, folder: Path
) -> dict[str, dict[str, Any]]:
    """What `ask` takes, for each runtime and precision."""
    checkpoint = save_checkpoint(size, folder / size)
    engine: dict[str, Any] = {"program": sys.executable, "script": "ask_transformers.py", "model": checkpoint}
    candidates = {f"transformers {variant}": engine | {"variant": variant} for variant in variants}
    for name in tqdm(names, desc="exports", leave=False):
        runtime, engine = RUNTIMES[name], prepare(name, environments)
        for precision in runtime.precisions:
            source = checkpoint
            if runtime.function is not None:
                source = folder / f"{name}-{precision}".replace(" ", "-")
                getattr(exports, runtime.function)(checkpoint, source, precision=precision, check=False)
            candidates[f"{name} {precision}"] = engine | {"model": source}
    return candidates


def measure(candidate: dict[str, Any], rows: int, tokens: int) -> dict[str, float]:
    """Tokens per second after the first token, seconds to it, and peak memory; of two questions the faster one."""
    question = {"text": "What is this?", "images": [str(IMAGE)], "max_new_tokens": tokens, "rows": rows}
    result = ask(questions=[question | {"id": str(number)} for number in range(3)], **candidate)
    answers = result["answers"][1:]  # the first warms up
    speed = max((a["tokens"] - rows) / (a["seconds"] - a["first_token_seconds"]) for a in answers)
    first = min(answer["first_token_seconds"] for answer in answers)
    return {"speed": speed, "first": first, "memory": result["peak_memory_bytes"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runtimes", nargs="*", help=f"of {', '.join(RUNTIMES)} (default: all)")
    parser.add_argument("--size", choices=SIZES, default="minimind3-65m")
    parser.add_argument("--environments", type=Path, default=Path("runtime-environments"))
    parser.add_argument("--variants", nargs="*", choices=TRANSFORMERS, default=TRANSFORMERS, help="of transformers")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=48)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        names, environments = options.runtimes or list(RUNTIMES), options.environments.resolve()
        candidates = make_candidates(options.size, options.variants, names, environments, Path(folder))
        figures: dict[str, dict[int, list[dict[str, float]]]] = {name: {1: [], 16: []} for name in candidates}
        for _ in tqdm(range(options.rounds), desc="rounds"):
            for name, candidate in candidates.items():
                for rows in (1, 16):
                    figures[name][rows].append(measure(candidate, rows, options.tokens))
                    print(f"{name}, {rows} rows: {figures[name][rows][-1]['speed']:.1f} tokens/s", flush=True)
        sizes = {name: candidate["model"] for name, candidate in candidates.items()}
        print(make_table(figures, sizes))
    bandwidth, _ = limits("cpu", torch.float32)
    print(f"A copy moves {bandwidth / 1e9:.0f} GB/s.")


def make_table(figures: dict[str, dict[int, list[dict[str, float]]]], models: dict[str, Path]) -> str:
    """Medians, and ratios to eager transformers."""
    middle = {
        (name, rows): {key: statistics.median(r[key] for r in rounds) for key in rounds[0]}
        for name, by_rows in figures.items()
        for rows, rounds in by_rows.items()
    }
    lines = []
    for name in figures:
        one, cells = middle[name, 1], [name]
        for rows in (1, 16):
            speed = middle[name, rows]["speed"]
            cells += [f"{speed:.1f}", f"{speed / middle['transformers eager', rows]['speed']:.2f}"]
        size = sum(file.stat().st_size for file in models[name].rglob("*") if file.is_file())
        cells += [f"{one['first'] * 1e3:.0f} ms", f"{one['memory'] / 1e9:.2f} GB", f"{size / 1e6:.0f} MB"]
        lines.append(f"| {' | '.join(cells)} |\n")
    return HEADER + "".join(lines)


if __name__ == "__main__":
    main()
