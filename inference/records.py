"""The file of captions: its lines, and what to skip because it is there already."""

import contextlib
import glob
import inspect
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..common import locked
from .engine import Engine, note

ERRORS = "surrogateescape"  # file names may be any bytes
FIELDS = ("image", "prompt", "model", "options", "caption")
# What changes an answer, besides model, prompt and image
DECODING = ("temperature", "top_p", "top_k", "repetition_penalty", "max_new_tokens", "seed", "thinking", "dtype")
Record = dict[str, str]  # of these fields: one line of the output; earlier versions wrote no options


def describe_options(options: dict[str, Any]) -> str:
    """The options of [`Engine`] that change an answer, such as "greedy, max_new_tokens=20"; defaults are left out."""
    defaults = inspect.signature(Engine).parameters
    given = [name for name in DECODING if options.get(name, defaults[name].default) != defaults[name].default]
    return ", ".join(
        ["greedy" if options.get("greedy") else "sampled", *(f"{name}={options[name]}" for name in given)]
    )


def read_records(path: Path) -> list[Record]:
    """The lines of a file of captions; a last line whose writing was cut off is removed from it.

    Raises:
        ValueError: The file is something else. It is left as it is.
    """
    if not path.exists():
        return []
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    start, rest = b'{"image": ', content[len(whole) :]
    try:
        records = [json.loads(line.decode("utf-8", ERRORS)) for line in whole.splitlines()]
    except ValueError:
        records = [{}]
    needed = set(FIELDS) - {"options"}
    is_ours = all(isinstance(record, dict) and needed <= record.keys() for record in records)
    if not is_ours or rest[: len(start)] != start[: len(rest)]:
        raise ValueError(f"{path} holds something else than captions and is left as it is. Choose another --output.")
    if rest:
        os.truncate(path, len(whole))
    return records


def merge(output: Path, images: list[str]) -> list[Record]:
    """Moves what several processes have written, also before an interruption, into the output, in input order.

    Raises:
        BlockingIOError: One of them is still writing.
    """
    records = read_records(output)
    parts = sorted(output.parent.glob(f"{glob.escape(output.name)}.part-*"))
    with contextlib.ExitStack() as held:
        for part in parts:
            held.enter_context(locked(part))
            records += read_records(part)
        if parts:
            records = list({key(record): record for record in records}.values())
            order = {image: number for number, image in enumerate(images)}
            records.sort(key=lambda record: order.get(record["image"], -1))
            complete = output.with_name(f"{output.name}.merging")
            complete.write_text("".join(map(to_line, records)), encoding="utf-8", errors=ERRORS)
            os.replace(complete, output)
        for part in parts:
            part.unlink()
    return records


def key(record: Record) -> tuple[str | None, ...]:
    return tuple(record.get(name) for name in FIELDS[:-1])


def to_line(record: Record) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"


def left_to_caption(images: Iterable[str], prompt: str, model: str, options: str, output: Path) -> list[str]:
    """The images that the output does not have yet, with this prompt, model and options."""
    done = {key(record) for record in read_records(output)}
    return [image for image in images if (image, prompt, model, options) not in done]


def note_skipped(images: list[str], left: list[str], prompt: str, model: str, output: Path) -> None:
    """Says what the output holds of these images already, and what it holds with other options."""
    if len(left) < len(images):
        note(f"{len(images) - len(left)} of {len(images)} pictures are in {output} already.")
    missing = {(image, prompt, model) for image in left}
    if others := sum(key(record)[:3] in missing for record in read_records(output)):
        note(f"{others} captions in {output} were made with other options, or do not say with which: they stay there.")
