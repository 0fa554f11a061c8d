"""Captions of many pictures: what is read, what is written, and how several processes share the work."""

import contextlib
import functools
import glob
import json
import os
import signal
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object
from PIL import Image
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import BatchFeature

from .. import EMBEDDED_MODEL
from ..image_loading_minimind_v import load_image
from .engine import Engine, encode, note, question, report_speed, start_process

ERRORS = "surrogateescape"  # file names may be any bytes
ADDRESSES = ("http://", "https://", "data:")
FIELDS = ("image", "prompt", "model", "caption")
Record = dict[str, str]  # of these fields: one line of the output


def find_images(names: Iterable[str]) -> list[str]:
    """All images that are meant, in order and once each: a folder is searched, subfolders too, a pattern filled in.

    A name that is neither stays as it is: a file, a URL, or a mistake that reading it will show.

    Raises:
        FileNotFoundError: Nothing in a folder, or for a pattern.
    """
    Image.init()
    endings = tuple(ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN)
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
    """Names of the images that can be read, their model inputs, and what is wrong with the others."""
    good, chats, errors = [], [], []
    for name in names:
        try:
            chats.append([question([load_image(name)], prompt)])
            good.append(name)
        except (OSError, ValueError) as error:
            errors.append(" ".join(str(error).split()))
    return good, encode(processor, chats, template_options) if chats else None, errors


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
    is_ours = all(isinstance(record, dict) and set(FIELDS) <= record.keys() for record in records)
    if not is_ours or rest[: len(start)] != start[: len(rest)]:
        raise ValueError(f"{path} holds something else than captions and is left as it is. Choose another --output.")
    if rest:
        os.truncate(path, len(whole))
    return records


def merge(output: Path, images: list[str]) -> list[Record]:
    """Moves what several processes have written, also before an interruption, into the output, in input order."""
    records = read_records(output)
    parts = sorted(output.parent.glob(f"{glob.escape(output.name)}.part-*"))
    if parts:
        records += [record for part in parts for record in read_records(part)]
        records = list({key(record): record for record in records}.values())
        order = {image: number for number, image in enumerate(images)}
        records.sort(key=lambda record: order.get(record["image"], -1))
        complete = output.with_name(f"{output.name}.merging")
        complete.write_text("".join(map(to_line, records)), encoding="utf-8", errors=ERRORS)
        os.replace(complete, output)
        for part in parts:
            part.unlink()
    return records


def key(record: Record) -> tuple[str, ...]:
    return record["image"], record["prompt"], record["model"]


def to_line(record: Record) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"


def skip_captioned(images: list[str], prompt: str, model: str, output: Path, state: PartialState) -> list[str]:
    """The images that the output does not have yet, with this prompt and model; the same ones in every process."""
    output.parent.mkdir(parents=True, exist_ok=True)
    if state.is_main_process:
        merge(output, images)
    state.wait_for_everyone()
    done = {key(record) for record in read_records(output)}
    left = [image for image in images if (image, prompt, model) not in done]
    if len(left) < len(images) and state.is_main_process:
        note(f"{len(images) - len(left)} of {len(images)} pictures are in {output} already.")
    return left


def caption_batches(
    engine: Engine, images: list[str], prompt: str, model: str, batch_size: int = 8, workers: int = 0
) -> Iterator[tuple[list[Record], list[str]]]:
    """Records of one batch of images after the other, and what is wrong with those that cannot be read."""
    encode(engine.processor, [[question([], prompt)]], engine.template_options)  # a bad prompt fails here, clearly
    read = functools.partial(
        read_batch, processor=engine.processor, prompt=prompt, template_options=engine.template_options
    )
    paths: Any = images  # a list is a dataset too
    loader = DataLoader(paths, batch_size, num_workers=workers, collate_fn=read, worker_init_fn=ignore_interruption)
    for names, inputs, errors in loader:
        captions = zip(names, engine.answer(inputs), strict=True) if names else ()
        yield [dict(zip(FIELDS, (name, prompt, model, text), strict=True)) for name, text in captions], errors


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
        output: What it has already, of this prompt and model, is skipped.
        batch_size: Images per call of the model.
        workers: Processes that read images ahead.
        options: Of [`Engine`].

    Returns:
        Number of images that could not be read, in all processes.

    Raises:
        ValueError: The output is not a file of captions, or there are several processes and no output.
    """
    options = options or {}
    state = start_process(options.get("device", "auto"))
    several, model = state.num_processes > 1, options.get("model") or EMBEDDED_MODEL.name
    if several and output is None:
        raise ValueError("Several processes cannot share the terminal. Name a file with --output.")
    left = skip_captioned(images, prompt, model, output, state) if output else images

    counts = (0, 0, 0.0)  # broken images, tokens, seconds of this process
    with state.split_between_processes(left) as split:
        share: Any = split  # a list as `left`; the library says any of what it can split
        if share:
            engine = Engine(**options)
            # A bar would stand between the lines of a terminal; `None` hides it where stderr is none.
            has_room = len(left) > batch_size and (output or not sys.stdout.isatty()) and state.is_local_main_process
            bar = tqdm(total=len(share), unit="picture", disable=None if has_room else True)
            batches = caption_batches(engine, share, prompt, model, batch_size, workers)
            part = output.with_name(f"{output.name}.part-{state.process_index}") if several and output else output
            counts = write_batches(batches, part, bar), engine.tokens, engine.seconds

    broken, tokens, seconds = zip(*gather_object([counts]), strict=True)
    if several and output and state.is_main_process:
        merge(output, images)
    if state.is_main_process and any(tokens):
        report_speed(sum(tokens), max(seconds))
    state.wait_for_everyone()
    return sum(broken)
