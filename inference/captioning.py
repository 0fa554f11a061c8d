"""Captions of many pictures: what is read, and how several processes share the work."""

import contextlib
import functools
import glob
import os
import signal
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from PIL import Image
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import BatchFeature

from .. import EMBEDDED_MODEL
from ..common import locked
from ..image_loading_minimind_v import FORMATS
from .engine import Engine, encode, question, report_speed, start_process
from .records import ERRORS, Record, describe_options, left_to_caption, merge, note_skipped, to_line

ADDRESSES = ("http://", "https://", "data:")


def find_images(names: Iterable[str]) -> list[str]:
    """All images that are meant, in order and once each: a folder is searched, subfolders too, a pattern filled in.

    A name that is neither stays as it is: a file, a URL, or a mistake that reading it will show.

    Raises:
        FileNotFoundError: Nothing in a folder, or for a pattern.
    """
    Image.init()
    endings = tuple(ending for ending, kind in Image.registered_extensions().items() if kind in FORMATS)
    images: list[str] = []
    for name in names:
        found = [name]
        if os.path.isdir(name):
            files = glob.iglob(os.path.join(glob.escape(name), "**", "*"), recursive=True)
            found = sorted(file for file in files if file.lower().endswith(endings))
        elif glob.has_magic(name) and not os.path.exists(name) and not name.startswith(ADDRESSES):
            found = sorted(glob.glob(os.path.expanduser(name), recursive=True))
        if not found:
            raise FileNotFoundError(f"No pictures were found for {name}. Name files, folders, patterns or URLs.")
        images += found
    return list(dict.fromkeys(images))


def read_batch(
    names: list[str], processor: Any, prompt: str, template_options: dict[str, Any]
) -> tuple[list[str], BatchFeature | None, list[str]]:
    """Names of the images that can be read, their model inputs, and what is wrong with the others.

    One image at a time is open; all inputs are as long, because all have the same prompt.
    """
    good, rows, errors = [], [], []
    for name in names:
        try:
            rows.append(encode(processor, [[question([name], prompt)]], template_options))
            good.append(name)
        except (OSError, ValueError) as error:
            errors.append(" ".join(str(error).replace("image 0 of sample 0", "image").split()))
    inputs = {name: torch.cat([row[name] for row in rows]) for name in rows[0]} if rows else None
    return good, BatchFeature(inputs) if inputs else None, errors


def caption_batches(
    engine: Engine, images: list[str], fields: dict[str, str], batch_size: int = 8, workers: int = 0
) -> Iterator[tuple[list[Record], list[str]]]:
    """Records of one batch of images after the other, and what is wrong with those that cannot be read.

    Args:
        fields: What all records say besides image and caption: prompt, model, options.
    """
    prompt, blank = fields["prompt"], Image.new("RGB", (8, 8))
    encode(
        engine.processor, [[question([blank], prompt)]], engine.template_options
    )  # a bad prompt fails here, clearly
    read = functools.partial(
        read_batch, processor=engine.processor, prompt=prompt, template_options=engine.template_options
    )
    paths: Any = images  # a list is a dataset too
    loader = DataLoader(paths, batch_size, num_workers=workers, collate_fn=read, worker_init_fn=ignore_interruption)
    for names, inputs, errors in loader:
        captions = zip(names, engine.answer(inputs), strict=True) if names else ()
        yield [{"image": name, **fields, "caption": text} for name, text in captions], errors


def ignore_interruption(_worker: int) -> None:
    """Ctrl-C is for the main process, which ends its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def write_batches(batches: Iterable[tuple[list[Record], list[str]]], output: Path | None, bar: tqdm) -> int:
    """Appends the records to `output`, or else prints them; the errors go to stderr.

    Returns:
        Number of errors.
    """
    broken = 0
    with (
        bar,
        open(output, "a", encoding="utf-8", errors=ERRORS) if output else contextlib.nullcontext(sys.stdout) as file,
    ):
        for records, errors in batches:
            file.writelines(map(to_line, records))
            file.flush()  # so that an interruption loses no more than a batch
            for error in errors:
                bar.write(f"error: {error}", file=sys.stderr)
            broken += len(errors)
            bar.update(len(records) + len(errors))
    return broken


def caption_images(
    images: list[str],
    prompt: str,
    output: Path | None = None,
    batch_size: int = 8,
    workers: int = 0,
    options: dict[str, Any] | None = None,
) -> int:
    """Writes one JSON line per image, to `output` or else to stdout; reports images that cannot be read on stderr.

    Under `accelerate launch`, every process takes its share and writes a file of its own; at the end they become one,
    in the order of `images`.

    Args:
        images: Paths or URLs.
        prompt: What to ask about each.
        output: What it has already, of this prompt, model and options, is skipped.
        batch_size: Images per call of the model.
        workers: Processes that read images ahead.
        options: Of [`Engine`].

    Returns:
        Number of images that could not be read, in all processes.

    Raises:
        ValueError: The output is not a file of captions, or there are several processes and no output.
        BlockingIOError: Another run writes the output.
    """
    options = options or {}
    state = start_process(options.get("device", "auto"))
    several = state.num_processes > 1
    fields = {"prompt": prompt, "model": options.get("model") or EMBEDDED_MODEL.name}
    fields["options"] = describe_options(options)
    if output is None:
        if several:
            raise ValueError("Several processes cannot share the terminal. Name a file with --output.")
        return caption_share(images, fields, None, batch_size, workers, options, state)
    output.parent.mkdir(parents=True, exist_ok=True)
    with locked(output) if state.is_main_process else contextlib.nullcontext():
        if state.is_main_process:
            merge(output, images)
        state.wait_for_everyone()
        left = left_to_caption(images, **fields, output=output)
        if state.is_main_process:
            note_skipped(images, left, prompt, fields["model"], output)
        broken = caption_share(left, fields, output, batch_size, workers, options, state)
        if state.is_main_process:
            merge(output, images)
        state.wait_for_everyone()
    return broken


def caption_share(
    images: list[str],
    fields: dict[str, str],
    output: Path | None,
    batch_size: int,
    workers: int,
    options: dict[str, Any],
    state: PartialState,
) -> int:
    """Captions this process's share of `images`; returns the number of broken ones in all processes."""
    several, counts = state.num_processes > 1, (0, 0, 0.0)  # broken images, tokens, seconds of this process
    with state.split_between_processes(images) as split:
        share: Any = split  # a list as `images`; the library says any of what it can split
        if share:
            engine = Engine(**options)
            # A bar would stand between the lines of a terminal; `None` hides it where stderr is none.
            has_room = len(images) > batch_size and (output or not sys.stdout.isatty()) and state.is_local_main_process
            bar = tqdm(total=len(share), unit="picture", disable=None if has_room else True)
            batches = caption_batches(engine, share, fields, batch_size, workers)
            part = output.with_name(f"{output.name}.part-{state.process_index}") if several and output else None
            with locked(part) if part else contextlib.nullcontext():
                counts = write_batches(batches, part or output, bar), engine.tokens, engine.seconds
    broken, tokens, seconds = zip(*gather_object([counts]), strict=True)
    if state.is_main_process and any(tokens):
        report_speed(sum(tokens), max(seconds))
    return sum(broken)
