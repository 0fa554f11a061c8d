"""Build the data set: pictures of things in eight styles, drawings held out, and a style that is never trained on.

    python examples/emoji/prepare.py --output data/emoji [--packages folder/with/tarballs]

Tarballs that are not in `--packages` are downloaded with `npm pack`; all are compared with their checksums.
`kinds.json` lists the kinds of things with their names, and the drawings that are left out because they show something
else. The output folder then holds

    pictures/<style>/<code>.png     72 x 72 RGBA, transparent background
    pictures.jsonl                  one line per picture: {"file", "style", "kind", "split", "english", "chinese"}
    others.jsonl                    one line per picture of the same styles that shows none of the kinds: {"file"}
    tokenizer/                      byte-level BPE with MiniMind's special tokens and the chat template

What exists already is kept, so an interrupted run goes on where it stopped.
"""

import argparse
import hashlib
import io
import json
import random
import re
import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path

import resvg_py
from PIL import Image
from prompts import CHAT_TEMPLATE, QUESTIONS, answers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from minimind_v.conversion.tokenizers import guard

PACKAGES = {  # style -> npm package, SHA-256 of its tarball
    "noto": ("@iconify-json/noto@1.2.9", "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad"),
    "noto-v1": ("@iconify-json/noto-v1@1.2.5", "2bf62c26c2c2884aa99e90aec942cdaee17a5921f05690694f4978ad4b017c37"),
    "twemoji": ("@iconify-json/twemoji@1.2.5", "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7"),
    "fluent-3d": (
        "@lobehub/fluent-emoji-3d@1.1.0",
        "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
    ),
    "fluent-flat": (
        "@lobehub/fluent-emoji-flat@1.1.0",
        "8f9113c027c7c20eced0070354715a4093a459b8bef6332b91d45f38c9bdb147",
    ),
    "emojione": ("@iconify-json/emojione@1.2.3", "26a14f44284407e8bcde91799388dca2bfd91dbcd55a97f425524a1c5b73610e"),
    "fxemoji": ("@iconify-json/fxemoji@1.2.2", "f3e72b3c59d05e1db03b7e308d55c0d05bd7ba3f625a90da1b79313c12858eef"),
    "streamline": (
        "@iconify-json/streamline-emojis@1.2.4",
        "5dac87c876b322500989828c5823143e0100d78881627a2e4081a4b897cbfdbc",
    ),
    "openmoji": ("openmoji@17.0.0", "55ee7d13485dec86e9f38c1f3a645a13382d33ff97c0cd845ee824b0aef45e68"),
}
UNSEEN = "openmoji"
FAMILIES = {"fluent-3d": "fluent", "fluent-flat": "fluent"}  # the same drawings, rendered twice
SUFFIXES = ("", "-1", "-2", "-3")
# Not among the other drawings: thousands of flags, skin tones, keycaps and clocks that differ in a few pixels.
ALIKE = re.compile(r"1f3f[b-f]|^1f1[ef]|20e3|^1f55|tone|flag|keycap|clock")
SIZE = 72
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|image_pad|>"]  # ids 0, 1, 2, 3
VOCABULARY_SIZE = 1536
CONTEXT_LENGTH = 1024


def fetch(package: str, checksum: str, folder: Path) -> Path:
    """Return the tarball of an npm package (`name@version`) in `folder`, downloading it when it is absent."""
    tarball = folder / (package.removeprefix("@").replace("@", "-").replace("/", "-") + ".tgz")
    if not tarball.exists():
        if shutil.which("npm") is None:
            raise SystemExit(f"{tarball} is missing and npm is not installed: install npm, or put the tarball there.")
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.run(["npm", "pack", package, "--pack-destination", str(folder)], check=True)
    if (found := hashlib.sha256(tarball.read_bytes()).hexdigest()) != checksum:
        raise SystemExit(f"{tarball} has SHA-256 {found}, expected {checksum}. Delete it and run again.")
    return tarball


def normalize(code: str) -> str:
    """Code points in lower case, without the variation selector that some sets write and others do not."""
    return "-".join(part for part in code.lower().split("-") if part != "fe0f")


def iconify_pictures(archive: tarfile.TarFile, slugs: dict[str, str]) -> Iterator[tuple[str, bytes]]:
    """Pairs of code and SVG from an Iconify set, by code point, or by name where the set has no code points."""
    icons = json.load(archive.extractfile("package/icons.json"))
    names = json.load(archive.extractfile("package/chars.json"))
    if not names:  # `bear-face`, or with a number where there are several: `bird-1`, `bird-2`
        known = {f"{slug}{suffix}": f"{code}{suffix}" for slug, code in slugs.items() for suffix in SUFFIXES}
        names = {known.get(name, name): name for name in icons["icons"]}
    for code, name in names.items():
        if name in icons["icons"]:
            icon = icons["icons"][name]
            width, height = (icon.get(side, icons.get(side, 16)) for side in ("width", "height"))
            box = f"{icon.get('left', 0)} {icon.get('top', 0)} {width} {height}"
            head = (
                f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="{box}">'
            )
            yield normalize(code), f"{head}{icon['body']}</svg>".encode()


def file_pictures(archive: tarfile.TarFile) -> Iterator[tuple[str, bytes]]:
    """Pairs of code and file content from a set of files named by code points."""
    for member in archive:
        path = Path(member.name)
        if path.parts[1:] in ((*part, path.name) for part in (("assets",), ("color", "svg"))):
            yield normalize(path.stem), archive.extractfile(member).read()


def render(content: bytes) -> Image.Image:
    """An SVG or a picture file as `SIZE` x `SIZE` RGBA, in the middle, with its proportions."""
    if content.lstrip()[:1] == b"<":
        content = bytes(resvg_py.svg_to_bytes(svg_string=content.decode(), width=4 * SIZE))
    picture = Image.open(io.BytesIO(content)).convert("RGBA")
    picture.thumbnail((SIZE, SIZE), Image.Resampling.LANCZOS, reducing_gap=None)
    square = Image.new("RGBA", (SIZE, SIZE))
    square.paste(picture, ((SIZE - picture.width) // 2, (SIZE - picture.height) // 2))
    return square


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on the captions and questions; any other text falls back to bytes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        padding_side="left",
        pad_token="<|endoftext|>",
        unk_token="<|endoftext|>",
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        extra_special_tokens={"image_token": "<|image_pad|>"},
        model_max_length=CONTEXT_LENGTH,
    )
    wrapped.chat_template = guard(wrapped) + CHAT_TEMPLATE
    return wrapped


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("data/emoji"), help="folder to write")
    parser.add_argument("--packages", type=Path, default=Path("data/packages"), help="folder of the npm tarballs")
    parser.add_argument("--kinds", type=Path, default=Path(__file__).parent / "kinds.json", help="things and names")
    options = parser.parse_args()

    selection = json.loads(options.kinds.read_text(encoding="utf-8"))
    kinds, left_out = {kind["code"]: kind for kind in selection["kinds"]}, set(selection["left_out"])
    slugs = {slug: kind["code"] for kind in selection["kinds"] for slug in kind["slugs"]}
    rows, others = [], []
    for style, (package, checksum) in PACKAGES.items():
        folder = options.output / "pictures" / style
        folder.mkdir(parents=True, exist_ok=True)
        with tarfile.open(fetch(package, checksum, options.packages)) as archive:
            iconify = "iconify" in package
            pictures = dict(iconify_pictures(archive, slugs) if iconify else file_pictures(archive))
        for code, content in tqdm(sorted(pictures.items()), desc=style, unit="picture"):
            file, kind = folder / f"{code}.png", kinds.get(re.sub(r"-\d$", "", code))
            if f"{style}/{code}" in left_out or (kind is None and (style == UNSEEN or ALIKE.search(code))):
                continue
            if not file.exists():
                render(content).save(file)
            file = file.relative_to(options.output).as_posix()
            if kind is None:
                others.append({"file": file})
                continue
            row = {
                "file": file,
                "style": style,
                "kind": kind["code"],
                "split": "unseen" if style == UNSEEN else "train",
            }
            rows.append(row | answers(kind))

    # Half of the kinds have one drawing held out, chosen by lot (both renderings, where there are two).
    for code in kinds:
        lot = random.Random(code)
        drawings = sorted({FAMILIES.get(row["style"], row["style"]) for row in rows if row["kind"] == code} - {UNSEEN})
        drawing = lot.choice(drawings) if lot.random() < 0.5 and len(drawings) > 3 else None
        for row in rows:
            if row["kind"] == code and FAMILIES.get(row["style"], row["style"]) == drawing:
                row["split"] = "held-out"
    for name, lines in (("pictures", rows), ("others", others)):
        with open(options.output / f"{name}.jsonl", "w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in lines)

    texts = [text for kind in kinds.values() for text in answers(kind).values()]
    texts += [question for questions in QUESTIONS.values() for question in questions]
    texts += ["user", "assistant"] * len(kinds)  # in every conversation: each deserves one token
    tokenizer = train_tokenizer(texts)
    tokenizer.save_pretrained(options.output / "tokenizer")
    counts = {split: sum(row["split"] == split for row in rows) for split in ("train", "held-out", "unseen")}
    print(f"{len(kinds)} kinds, pictures {counts}, {len(others)} others, {len(tokenizer)} tokens in {options.output}")


if __name__ == "__main__":
    main()
