"""Asks every runtime what transformers was asked, and makes a table: python tests/runtimes.py [RUNTIME ...] [--write]

Every runtime has an environment of its own, which is kept in `--environments`, so that one that takes long to build is
built once. Asked are all of examples/images in English and Chinese, two pictures at once, and without a picture: of
the embedded model, and, where numbers are exact, of one checkpoint with random weights for each release of the
original. Speed is measured with 65M random weights, on one thread, as a ratio to eager transformers. `--write` puts
the rows of the runtimes that were asked into the table of README.md; the others stay.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoTokenizer, CLIPVisionConfig, Siglip2VisionConfig, SiglipVisionConfig

from minimind_v import (
    EMBEDDED_MODEL,
    MiniMindConfig,
    MiniMindVConfig,
    MiniMindVForConditionalGeneration,
)
from minimind_v import export as exports
from minimind_v.conversion.convert import PROJECTORS, save_model, save_processor
from minimind_v.conversion.tokenizers import IMAGE_TOKEN_IDS

TESTS = Path(__file__).resolve().parent
README = TESTS.parent / "README.md"
sys.path.insert(0, str(TESTS.parent / "benchmarks"))
from asking import RUNTIMES, ask, prepare, speed  # noqa: E402 - a folder of scripts
from real_sizes import answer_in_words, save_checkpoint  # noqa: E402

SPEED = "minimind3-65m"  # the size whose speed is measured
BEGIN, END = "<!-- runtimes begin -->\n", "<!-- runtimes end -->"
HEADER = """\
| runtime | precision | embedded model | random weights, by release | tokens/s | run on |
|---|---|---|---|---|---|
"""
BASE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
CLIP = CLIPVisionConfig(**BASE, image_size=64, patch_size=16)
SIGLIP = SiglipVisionConfig(**BASE, image_size=64, patch_size=16, vision_use_head=False)
NAFLEX = Siglip2VisionConfig(**BASE, num_patches=16, patch_size=16, vision_use_head=False)
MINIMIND2 = {"use_qk_norm": False, "num_key_value_heads": 2, "rms_norm_eps": 1e-5}
# name -> release, tower, fields of the decoder
RANDOM = {
    "minimind1": ("minimind1", CLIP, {**MINIMIND2, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}),
    "minimind2-early": ("minimind2-early", CLIP, MINIMIND2),
    "minimind2": ("minimind2", CLIP, MINIMIND2),
    "minimind2 experts": ("minimind2", CLIP, {**MINIMIND2, "use_moe": True, "num_shared_experts": 1}),
    "minimind3-naflex": ("minimind3-naflex", NAFLEX, {}),
    "minimind3-p16": ("minimind3-p16", SIGLIP, {}),
    "minimind3": ("minimind3", SIGLIP, {}),
    "minimind3 experts": ("minimind3", SIGLIP, {"use_moe": True}),
}
TOKENIZERS = {"minimind1": "minimind2", "minimind2-early": "minimind2", "minimind2": "minimind2_im"}


def make_random_checkpoint(name: str, folder: Path) -> Path:
    """A small checkpoint of one of `RANDOM`."""
    release, tower, decoder = RANDOM[name]
    source = TESTS / "golden" / "tokenizers" / TOKENIZERS.get(release, "minimind3")
    text = MiniMindConfig(
        hidden_size=128, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=2048, **decoder
    )
    torch.manual_seed(0)
    fields = {"image_token_id": IMAGE_TOKEN_IDS[release], **PROJECTORS[release]}
    model = MiniMindVForConditionalGeneration(MiniMindVConfig(text_config=text, vision_config=tower, **fields)).eval()
    answer_in_words(model, AutoTokenizer.from_pretrained(source))
    save_model(model, folder)
    save_processor(model, folder, release, source, None)
    return folder


def make_questions(images: list[Path]) -> list[dict[str, Any]]:
    """About each image, about two, and about none, in English and Chinese."""
    asked = [("en", "What is this?"), ("zh", "描述一下这个图像的内容。")]
    subjects = {image.stem: [image] for image in images} | {"two": [images[0], images[-1]], "none": []}
    return [
        {"id": f"{name}-{language}", "text": text, "images": list(map(str, subject)), "max_new_tokens": 24}
        for name, subject in subjects.items()
        for language, text in asked
    ]


def shrink(images: list[Path], folder: Path) -> list[Path]:
    """The images in the size of the random towers, so that the way of resizing them does not matter."""
    folder.mkdir()
    for image in images:
        Image.open(image).convert("RGB").resize((64, 64)).save(folder / image.name)
    return [folder / image.name for image in images]


def compare(result: dict[str, Any], expected: dict[str, Any], title: str) -> str:
    """How many answers are the same; prints those that are not."""
    # Runtimes show a part of a character, which no decoder of text can, as U+FFFD or as nothing
    texts = {answer["id"]: answer["text"].replace("\ufffd", "") for answer in expected["answers"]}
    given = {answer["id"]: answer["text"].replace("\ufffd", "") for answer in result["answers"]}
    different = [name for name in given if given[name] != texts[name]]
    for name in different:
        print(f"  {title}, {name}: {given[name]!r} instead of {texts[name]!r}", flush=True)
    return f"{len(given) - len(different)}/{len(given)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runtimes", nargs="*", metavar="RUNTIME", help=f"of {', '.join(RUNTIMES)} (default: all)")
    parser.add_argument("--environments", type=Path, default=Path("runtime-environments"), help="folder to keep them")
    parser.add_argument("--write", action="store_true", help="put the rows into README.md")
    options = parser.parse_args()
    if unknown := set(options.runtimes) - set(RUNTIMES):
        parser.error(f"there is no runtime {', '.join(unknown)}")
    with tempfile.TemporaryDirectory() as folder:
        rows = ask_all(options.runtimes or list(RUNTIMES), options.environments.resolve(), Path(folder))
    print(HEADER + "".join(rows.values()))
    if options.write:
        write_rows(rows)


def ask_all(names: list[str], environments: Path, folder: Path) -> dict[str, str]:
    """Rows of the table, by the name of runtime and precision."""
    images = sorted((TESTS.parent / "examples" / "images").glob("*.png"))
    checkpoints = {"embedded": EMBEDDED_MODEL, SPEED: save_checkpoint(SPEED, folder / SPEED)}
    checkpoints |= {name: make_random_checkpoint(name, folder / name.replace(" ", "-")) for name in RANDOM}
    questions = dict.fromkeys(checkpoints, make_questions(shrink(images[:3], folder / "images")))
    questions |= {"embedded": make_questions(images), SPEED: make_questions(images[:2])[:4]}
    expected = {
        name: ask(sys.executable, "ask_transformers.py", checkpoint, questions[name])
        for name, checkpoint in checkpoints.items()
    }
    rows = {}
    for name in names:
        runtime, engine = RUNTIMES[name], prepare(name, environments)
        for precision in runtime.precisions:
            is_exact, cells, version, ratio = precision == runtime.precisions[0], {}, f"{name} ?", 0.0
            for checkpoint in checkpoints if is_exact else ["embedded", SPEED]:
                title = f"{name} {precision} {checkpoint}"
                source, asked = checkpoints[checkpoint], questions[checkpoint]
                try:
                    if runtime.function is not None:
                        function = getattr(exports, runtime.function)
                        source = folder / title.replace(" ", "-")
                        function(checkpoints[checkpoint], source, precision=precision, check=False)
                        if not has_tower(source):
                            asked = [question for question in asked if not question["images"]]
                    result = ask(model=source, questions=asked, **engine)
                except (ValueError, RuntimeError) as error:
                    print(f"  {title}: {error}", flush=True)
                    cells[checkpoint] = "no"
                    continue
                if checkpoint == SPEED:
                    version, ratio = result["runtime"], speed(result) / speed(expected[checkpoint])
                    continue
                note = "" if len(asked) == len(questions[checkpoint]) else " (text only)"
                cells[checkpoint] = compare(result, expected[checkpoint], title) + note
                print(f"{title}: {cells[checkpoint]}", flush=True)
            random = "<br>".join(f"{key}: {cells[key]}" for key in RANDOM if key in cells)
            row = [version, precision, cells["embedded"], random, f"{ratio:.1f}", time.strftime("%Y-%m-%d")]
            rows[f"{name} {precision}"] = f"| {' | '.join(row)} |\n"
    return rows


def has_tower(folder: Path) -> bool:
    """Whether an export can see: GGUF has the tower in a file of its own, ONNX in a graph of its own."""
    return any(folder.rglob("mmproj*")) or any(folder.rglob("vision_encoder*"))


def write_rows(rows: dict[str, str]) -> None:
    """Replaces the rows of the same runtime and precision, and adds new ones."""
    before, rest = README.read_text(encoding="utf-8").split(BEGIN)
    table, after = rest.split(END)
    kept = [line for line in table.splitlines(keepends=True)[2:] if row_name(line) not in map(row_name, rows.values())]
    README.write_text(before + BEGIN + HEADER + "".join([*kept, *rows.values()]) + END + after, encoding="utf-8")


def row_name(row: str) -> tuple[str, str]:
    """Runtime without its version, and precision."""
    _, runtime, precision, *_ = row.split("|")
    return runtime.strip().rpartition(" ")[0], precision.strip()


if __name__ == "__main__":
    main()
