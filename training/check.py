"""Looks at training data before training does: what is there, what is broken, which tokens are trained on."""

import base64
import html
import io
import itertools
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from .. import EMBEDDED_MODEL
from ..common import load_processor
from ..image_loading_minimind_v import MAX_PIXELS, load_image
from .collator import IGNORE_INDEX, MiniMindVDataCollator
from .data import MiniMindVDataset, Rows, images_of

HTML_ROWS = 100  # at most, because the images stand in the page itself


def check(
    data: Any,
    model: str | Path = EMBEDDED_MODEL,
    max_length: int | None = None,
    preview: int = 3,
    html_file: str | Path | None = None,
    workers: int = 0,
    max_image_pixels: int | None = None,
    allowed_hosts: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Reads every row as training would.

    Args:
        data: As for training, see [`data.read_rows`].
        model: Whose processor to use.
        max_length: As for training.
        preview: Rows whose tokens are returned as text, with those that are trained on between guillemets.
        html_file: Page to write: the first rows with their images, the tokens that are trained on marked, and what
            is broken.
        workers: Processes that read rows.
        max_image_pixels: Larger images are broken; left out, the processor's limit.
        allowed_hosts: The only hosts whose image URLs are fetched; left out, every one with a public address.

    Returns:
        What [`inspect_rows`] returns, and `preview`.
    """
    processor = load_processor(model, max_image_pixels, allowed_hosts)
    dataset = MiniMindVDataset(data, processor.allowed_hosts)
    collator = MiniMindVDataCollator(processor, max_length)
    report = inspect_rows(dataset, collator, workers)
    report["preview"] = [
        "".join(f"«{text}»" if trained else text for text, trained in split_by_loss_mask(dataset[i], collator))
        for i in report["good"][:preview]
    ]
    if html_file is not None:
        Path(html_file).write_text(render_page(report, dataset, collator), encoding="utf-8")
    return report


def inspect_rows(dataset: Rows, collator: MiniMindVDataCollator, workers: int = 0) -> dict[str, Any]:
    """Encodes every row, keeping nothing of it but its size.

    Returns:
        `rows`, `images`, `good` (indices into `dataset`), `tokens` (of each good row), `broken` and `too_long` (row
        number -> reason).
    """
    report: dict[str, Any] = {
        "rows": len(dataset),
        "images": 0,
        "good": [],
        "tokens": [],
        "broken": {},
        "too_long": {},
    }
    sizes = DataLoader(_RowSizes(dataset, collator), batch_size=None, num_workers=workers)
    for i, (number, tokens, images, problem) in enumerate(tqdm(sizes, desc="checking", unit="row")):
        if problem is not None:
            report["broken"][number] = problem
        elif tokens > collator.max_length:
            report["too_long"][number] = f"{tokens} tokens are more than {collator.max_length}"
        else:
            report["good"].append(i)
            report["tokens"].append(tokens)
            report["images"] += images
    return report


class _RowSizes(Dataset):
    """Item: row number, number of tokens, number of images, and what is wrong with the row or None."""

    def __init__(self, dataset: Rows, collator: MiniMindVDataCollator) -> None:
        self.dataset, self.collator = dataset, collator

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[int, int, int, str | None]:
        item = self.dataset[index]
        row, problem = self.collator.try_to_encode(item)
        row = row or {"input_ids": ()}
        return item["row"], len(row["input_ids"]), len(row.get("pixel_values", ())), problem


def split_by_loss_mask(item: dict[str, Any], collator: MiniMindVDataCollator) -> list[tuple[str, bool]]:
    """The row's text in pieces, each with whether it is trained on; an image as one `[image]`."""
    row, processor = collator.encode(item["messages"]), collator.processor
    image = processor.image_token * processor.image_seq_length
    tokens = zip(row["input_ids"], row["labels"], strict=True)
    pieces = []
    for trained, group in itertools.groupby(tokens, key=lambda token: token[1] != IGNORE_INDEX):
        text = processor.tokenizer.decode([token for token, _ in group])
        pieces.append((text.replace(image, "[image]"), trained))
    return pieces


def render_page(report: dict[str, Any], dataset: Rows, collator: MiniMindVDataCollator) -> str:
    """HTML page of what [`inspect_rows`] found and of the first good rows, complete in itself."""
    lines = [
        "<!DOCTYPE html><meta charset=utf-8><title>Training data</title>",
        "<style>body{font:15px sans-serif;max-width:60em;margin:2em auto}pre{white-space:pre-wrap}",
        "mark{background:#b7e4b0}img{max-height:160px;margin-right:8px}hr{border:0;border-top:1px solid #ccc}</style>",
        f"<h1>{report['rows']} rows, {report['images']} images</h1>",
        f"<p>{len(report['tokens'])} can be trained on, {len(report['too_long'])} are too long, "
        f"{len(report['broken'])} broken. <mark>Marked</mark> tokens are trained on.</p>",
    ]
    for kind in ("broken", "too_long"):
        lines += [f"<p>row {number}: {html.escape(reason)}</p>" for number, reason in report[kind].items()]
    for number in report["good"][:HTML_ROWS]:
        lines.append(f"<hr><h3>row {number}</h3>")
        for image in images_of(dataset[number]["messages"]):
            lines.append(f'<img src="{thumbnail_url(image, f"an image of row {number}")}">')
        pieces = [
            f"<mark>{html.escape(text)}</mark>" if trained else html.escape(text)
            for text, trained in split_by_loss_mask(dataset[number], collator)
        ]
        lines.append(f"<pre>{''.join(pieces)}</pre>")
    return "\n".join(lines)


def thumbnail_url(image: Any, name: str, max_pixels: int = MAX_PIXELS) -> str:
    """A small PNG of an image as a data URL; the arguments are those of [`load_image`]."""
    thumbnail, buffer = load_image(image, name, max_pixels=max_pixels), io.BytesIO()
    thumbnail.thumbnail((320, 320))
    thumbnail.save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def describe(broken: dict[int, str], limit: int = 20) -> str:
    """Lines `row 3: reason`, and how many more there are."""
    lines = [f"  row {number}: {reason}" for number, reason in list(broken.items())[:limit]]
    return "\n".join(lines + [f"  and {len(broken) - limit} more"] * (len(broken) > limit))


def show(
    data: Any,
    *,
    model: str | Path,
    max_length: int | None,
    preview: int,
    html_file: str | Path | None,
    workers: int,
    max_image_pixels: int | None = None,
    allowed_hosts: Sequence[str] | None = None,
) -> int:
    """The command `minimind-v check`: prints what [`check`], which explains the arguments, finds.

    Returns:
        Number of broken rows.
    """
    report = check(data, model, max_length, preview, html_file, workers, max_image_pixels, allowed_hosts)
    good = report["tokens"]
    print(f"{report['rows']} rows, {report['images']} images")
    if good:
        print(
            f"{len(good)} can be trained on: {min(good)} to {max(good)} tokens, median {statistics.median(good):.0f}"
        )
    for kind, title in (("too_long", "too long, left out whole"), ("broken", "broken")):
        print(f"{len(report[kind])} {title}")
        if report[kind]:
            print(describe(report[kind]))
    for text in report["preview"]:
        print("\nTokens between «» are trained on:\n" + text)
    if html_file is not None:
        print(f"\nPage with pictures: {html_file}")
    return len(report["broken"])
