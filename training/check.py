"""Looks at training data before training does: what is there, what is broken, which tokens carry loss."""

import argparse
import statistics
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import AutoProcessor

from .collator import MiniMindVDataCollator
from .data import MiniMindVDataset

EMBEDDED_MODEL = Path(__file__).resolve().parents[1] / "checkpoints" / "minimind-v-emoji"


def check(data: Any, model: str | Path = EMBEDDED_MODEL, max_length: int | None = None, preview: int = 3) -> dict:
    """Reads every row as training would.

    Args:
        data: As for training, see [`data.read_rows`].
        model: Whose processor to use.
        max_length: As for training.
        preview: Rows whose tokens are returned as text, with those that carry loss between guillemets.

    Returns:
        `rows`, `images`, `tokens` (of each good row), `broken` and `too_long` (row number -> reason), `preview`.
    """
    dataset, processor = MiniMindVDataset(data), AutoProcessor.from_pretrained(model)
    collator = MiniMindVDataCollator(processor, max_length)
    report: dict[str, Any] = {"rows": len(dataset), "images": 0, "tokens": [], "broken": {}, "too_long": {}}
    report["preview"] = []
    for number in tqdm(range(len(dataset)), desc="checking", unit="row"):
        try:
            row = collator.encode(dataset[number]["messages"])
        except (OSError, ValueError, TypeError) as error:
            kind = "too_long" if "positions. Shorten" in str(error) else "broken"
            report[kind][number] = str(error)
            continue
        if len(row["input_ids"]) > collator.max_length:
            report["too_long"][number] = f"{len(row['input_ids'])} tokens"
            continue
        report["tokens"].append(len(row["input_ids"]))
        report["images"] += len(row.get("pixel_values", ()))
        if len(report["preview"]) < preview:
            report["preview"].append(show_loss(row, processor))
    return report


def show_loss(row: dict[str, Any], processor: Any) -> str:
    """The row as text; «what carries loss»; image placeholders as one `[image]`."""
    pieces, ids, learned = [], [], False
    for token, label in [*zip(row["input_ids"], row["labels"], strict=True), (None, -100)]:
        if ids and (token is None or (label != -100) != learned):
            text = processor.tokenizer.decode(ids).replace(processor.image_placeholder, "[image]")
            pieces.append(f"«{text}»" if learned else text)
            ids = []
        learned = label != -100
        ids.append(token)
    return "".join(pieces)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m minimind_v.training check", description=__doc__)
    parser.add_argument("data", help=".jsonl or .parquet file, or folder of pictures with metadata.jsonl")
    parser.add_argument("--model", default=str(EMBEDDED_MODEL), help="checkpoint whose processor is used")
    parser.add_argument("--max-length", type=int, help="as for training")
    parser.add_argument("--preview", type=int, default=3, help="rows to show in full")
    options = parser.parse_args(arguments)
    report = check(options.data, options.model, options.max_length, options.preview)
    good = report["tokens"]
    print(f"{report['rows']} rows, {report['images']} images")
    if good:
        print(
            f"{len(good)} can be trained on: {min(good)} to {max(good)} tokens, median {statistics.median(good):.0f}"
        )
    for kind, title in (("too_long", "too long, left out whole"), ("broken", "broken")):
        print(f"{len(report[kind])} {title}")
        for number, reason in list(report[kind].items())[:20]:
            print(f"  row {number}: {reason}")
    for text in report["preview"]:
        print("\nTokens that carry loss stand between «»:\n" + text)
    if report["broken"]:
        raise SystemExit(1)
