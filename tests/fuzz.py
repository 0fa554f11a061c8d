"""Fuzzing of what strangers send: mutated pictures, and chats of tokens, parts and values of JSON.

    python tests/fuzz.py --pictures 20000 --chats 5000

Longer is better: any numbers do. A picture must load or raise a ValueError, in bounded time and memory, start no other
program, leave the warning filters alone, and write nothing to stderr. A chat must raise a ValueError, or come out with
exactly the turns and images that its messages are.

One run, of 2026-11-24 with Pillow 13.0.0, in two minutes on one core, four of the formats refused:

    20000 pictures of 15 formats: loaded 2595, refused 17405; slowest 0.03 s, 0.05 GB at most
    5000 chats: encoded 1848, refused 3152
"""

import argparse
import io
import os
import random
import resource
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable

import numpy as np
from conftest import CHECKPOINT, picture
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoProcessor

from minimind_v import MiniMindVProcessor
from minimind_v import image_loading_minimind_v as image_loading
from minimind_v.image_loading_minimind_v import FORMATS, load_image

SECONDS = 20  # for one picture
GIGABYTES = 1.5  # above the idle process
EXTREMES = [b"\0", b"\xff", b"\x7f", b"\x80", b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\0\0\xff\xff"]


def save(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def make_files() -> dict[str, list[bytes]]:
    """Small files of every format that is read, of several modes and compressions, and some that are not read."""
    rgb, exif = picture(1, size=(48, 32)), Image.Exif()
    exif[0x0112] = 6
    frames = {"save_all": True, "append_images": [picture(2, size=(48, 32))]}
    files = {kind: [save(rgb, kind)] for kind in FORMATS if kind not in ("HEIF", "MPO")}
    files["MPO"] = [save(rgb, "MPO", **frames)]
    files["JPEG"] += [
        save(rgb, "JPEG", progressive=True),
        save(rgb.convert("CMYK"), "JPEG"),
        save(rgb, "JPEG", exif=exif),
    ]
    deep = Image.fromarray(np.asarray(rgb.convert("L")).astype(np.uint16) * 257)
    files["PNG"] += [save(rgb.convert(mode), "PNG") for mode in ("P", "RGBA", "LA", "1")]
    files["PNG"] += [save(deep, "PNG"), save(rgb, "PNG", **frames), save(rgb, "PNG", exif=exif)]
    files["GIF"] += [save(rgb, "GIF", **frames), save(rgb.convert("P"), "GIF", transparency=3)]
    files["WEBP"] += [save(rgb, "WEBP", lossless=True), save(rgb, "WEBP", **frames)]
    compressions = ("raw", "tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg")
    files["TIFF"] += [save(rgb, "TIFF", compression=compression) for compression in compressions]
    files["TIFF"] += [
        save(rgb.convert("F"), "TIFF", compression="tiff_lzw"),
        save(rgb.convert("1"), "TIFF", compression="group4"),
    ]
    files["BMP"] += [save(rgb.convert("P"), "BMP")]
    files["PPM"] += [save(rgb.convert("L"), "PPM"), b"P3 2 2 255 1 2 3 4 5 6 7 8 9 10 11 12"]
    return files | {kind: [save(rgb, kind)] for kind in ("EPS", "PDF", "TGA", "ICO")}  # these are not read


def mutate(content: bytes, rng: random.Random, others: list[bytes]) -> bytes:
    """Some bytes changed, cut out, doubled, taken from another file, or replaced by extreme numbers."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        # Headers stand at the beginning, where a change does most
        place = rng.randrange(max(1, rng.choice((16, 64, len(data)))))
        kind = rng.randrange(6)
        if kind == 0:
            data[place : place + 1] = bytes([rng.randrange(256)])
        elif kind == 1:
            extreme = rng.choice(EXTREMES)
            data[place : place + len(extreme)] = extreme
        elif kind == 2:
            del data[place : place + rng.randrange(1, 64)]
        elif kind == 3:
            data[place:place] = data[place : place + rng.randrange(1, 64)]
        elif kind == 4:
            other = rng.choice(others)
            start = rng.randrange(max(1, len(other)))
            data[place : place + 64] = other[start : start + 64]
        else:
            del data[place + 1 :]
    return bytes(data)


def capture_stderr() -> Callable[[], str]:
    """What C libraries write to stderr goes to a file from now on; the result ends that, and returns what it holds."""
    file, before = tempfile.TemporaryFile(), os.dup(2)  # noqa: SIM115 - it outlives this function
    os.dup2(file.fileno(), 2)

    def read() -> str:
        os.dup2(before, 2)
        file.seek(0)
        return file.read().decode(errors="replace")

    return read


def fuzz_pictures(count: int, seed: int) -> str:
    """Loads `count` mutated pictures; raises an AssertionError that shows the first one that misbehaves."""
    rng, files, outcomes, read_stderr = random.Random(seed), make_files(), Counter(), capture_stderr()
    everything = [content for contents in files.values() for content in contents]
    filters, idle, slowest = list(warnings.filters), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, 0.0
    for number in range(count):
        kind = list(files)[number % len(files)]
        content = mutate(rng.choice(files[kind]), rng, everything)
        start = time.monotonic()
        try:
            image = load_image(content)
            assert image.mode == "RGB" and min(image.size) > 0
            outcomes["loaded"] += 1
        except ValueError:
            outcomes["refused"] += 1
        except BaseException:
            read_stderr()
            print(f"picture {number}, {kind}: {content!r}", file=sys.stderr)
            raise
        seconds = time.monotonic() - start
        slowest = max(slowest, seconds)
        assert seconds < SECONDS, f"picture {number}, {kind}, took {seconds:.1f} s: {content!r}"
    written = read_stderr()
    assert not written, f"on stderr: {written!r:.500}"
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - idle) / 1e6
    assert peak < GIGABYTES, f"{peak} GB of memory"
    assert warnings.filters == filters, "the warning filters were changed"
    counts = ", ".join(f"{name} {number}" for name, number in sorted(outcomes.items()))
    return f"{count} pictures of {len(files)} formats: {counts}; slowest {slowest:.2f} s, {peak:.2f} GB at most"


def chats(tokens: list[str]) -> st.SearchStrategy:
    """Chats in which anything may stand where a message, a part, a text or a number is expected."""
    pieces = [*tokens, *(token[:3] for token in tokens), *(token[3:] for token in tokens)]
    words = st.sampled_from([*pieces, "Hello", "", " ", "\n", "\ud800", "<image>", "你好", "@" * 9])
    texts = st.lists(words, max_size=4).map("".join) | st.text(max_size=8)
    plain = st.none() | st.booleans() | st.integers() | st.floats() | texts
    values = st.recursive(
        plain, lambda v: st.lists(v, max_size=3) | st.dictionaries(texts, v, max_size=3), max_leaves=6
    )
    text = st.fixed_dictionaries({"type": st.just("text"), "text": st.just("Hello") | texts})
    image = st.fixed_dictionaries({"type": st.just("image"), "image": st.just(picture())})
    content = texts | st.lists(text | image, max_size=4) | st.lists(text | image | values, max_size=4) | values
    roles = st.sampled_from(["user", "assistant", "system", "tool"])
    message = st.fixed_dictionaries(
        {"role": roles | texts, "content": content}, optional={"name": values, "x": values}
    )
    sound = st.fixed_dictionaries({"role": roles, "content": st.just("Hello") | st.lists(text | image, max_size=3)})
    return st.lists(sound, min_size=1, max_size=4) | st.lists(message | values, max_size=3) | values


def fuzz_chats(count: int, processor: MiniMindVProcessor) -> str:
    """Encodes `count` chats; an AssertionError shows the smallest one that hypothesis finds to misbehave."""
    tokenizer, outcomes = processor.tokenizer, Counter()
    start, end = (tokenizer.convert_tokens_to_ids(token) for token in ("<|im_start|>", "<|im_end|>"))

    @settings(max_examples=count, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(chats(processor.control_tokens))
    def encode(chat: object) -> None:
        try:
            inputs = processor.apply_chat_template(chat, tokenize=True, return_dict=True)
        except ValueError:
            outcomes["refused"] += 1
            return
        outcomes["encoded"] += 1
        ids = Counter(inputs["input_ids"][0])
        messages = chat[0] if isinstance(chat[0], list) else chat
        parts = [
            part for message in messages if isinstance(message.get("content"), list) for part in message["content"]
        ]
        images = sum(part["type"] == "image" for part in parts)
        assert ids[start] == ids[end] == len(messages)
        assert ids[processor.image_token_id] == images * processor.image_seq_length

    encode()
    return f"{sum(outcomes.values())} chats: {', '.join(f'{name} {n}' for name, n in sorted(outcomes.items()))}"


def refuse_programs(event: str, arguments: tuple) -> None:
    if event in ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork"):
        raise AssertionError(f"a program was started: {event} {arguments}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=20_000, help="(default: %(default)s)")
    parser.add_argument("--chats", type=int, default=5_000, help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the mutations of pictures")
    arguments = parser.parse_args()
    processor = AutoProcessor.from_pretrained(CHECKPOINT)
    sys.addaudithook(refuse_programs)
    image_loading.logger.setLevel("ERROR")  # that animations have several frames
    warnings.simplefilter("ignore")  # PIL warns of broken metadata
    print(fuzz_pictures(arguments.pictures, arguments.seed), flush=True)
    print(fuzz_chats(arguments.chats, processor), flush=True)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
