"""Build the emoji captioning data set: pictures in two styles, names in English and Chinese, and a tokenizer.

    python examples/emoji/prepare.py --output data/emoji [--packages folder/with/tarballs]

Pictures and names come from three npm packages (see the README beside this file for their licences). Tarballs that
are not in `--packages` are downloaded with `npm pack`. `selection.json` lists the kinds of things that are kept and
the names that were made clearer than those of the CLDR. The output folder then holds

    pictures/<style>/<code>.png     64 x 64 RGBA, transparent background
    metadata.jsonl                  one line per kind: {"code", "english", "chinese", "category"}
    tokenizer/                      byte-level BPE with MiniMind's special tokens and the chat template
"""

import argparse
import json
import shutil
import subprocess
import tarfile
from pathlib import Path
from typing import Any

from prompts import CHAT_TEMPLATE, QUESTIONS, answers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

STYLES = {"google": "emoji-datasource-google@16.0.0", "twitter": "emoji-datasource-twitter@16.0.0"}
NAMES = "cldr-annotations-full@48.2.0"
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|image_pad|>"]  # ids 0, 1, 2, 3
VOCABULARY_SIZE = 2048
CONTEXT_LENGTH = 1024


def fetch(package: str, folder: Path) -> Path:
    """Return the tarball of an npm package (`name@version`) in `folder`, downloading it when it is absent."""
    tarball = folder / (package.replace("@", "-") + ".tgz")
    if not tarball.exists():
        if shutil.which("npm") is None:
            raise SystemExit(f"{tarball} is missing and npm is not installed: install npm, or put the tarball there.")
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.run(["npm", "pack", package, "--pack-destination", str(folder)], check=True)
    return tarball


def read_json(tarball: Path, member: str) -> Any:
    with tarfile.open(tarball) as archive:
        return json.load(archive.extractfile(member))


def select_kinds(emoji: list[dict], names: dict[str, dict], selection: dict) -> list[dict]:
    """Keep the emoji that `selection` asks for and that exist in every style, with their two names.

    Args:
        emoji: `emoji.json` of an emoji-datasource package.
        names: for "en" and "zh", the CLDR annotations by character.
        selection: `selection.json`: whole subcategories, further names, exceptions, and clearer names.

    Returns:
        One record per kind, in the order of Unicode's emoji list.
    """
    kinds = []
    for entry in sorted(emoji, key=lambda entry: entry["sort_order"]):
        character = "".join(chr(int(code, 16)) for code in entry["unified"].split("-")).replace("\ufe0f", "")
        if character not in names["en"] or not all(entry[f"has_img_{style}"] for style in STYLES):
            continue
        name = names["en"][character]["tts"][0]
        category = f"{entry['category']}/{entry['subcategory']}"
        if name in selection["except"] or not (category in selection["subcategories"] or name in selection["also"]):
            continue
        english, chinese = selection["renamed"].get(name, ["", ""])
        kinds.append(
            {
                "code": entry["image"].removesuffix(".png"),
                "english": english or name.replace("’", "'"),
                "chinese": chinese or names["zh"][character]["tts"][0],
                "category": category,
            }
        )
    return kinds


def extract_pictures(tarball: Path, style: str, codes: set[str], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    prefix = f"package/img/{style}/64/"
    with tarfile.open(tarball) as archive:
        for member in tqdm(archive, desc=f"{style} pictures", unit="file"):
            if member.name.startswith(prefix) and Path(member.name).stem in codes:
                (folder / Path(member.name).name).write_bytes(archive.extractfile(member).read())


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
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        padding_side="left",
        pad_token="<|endoftext|>",
        unk_token="<|endoftext|>",
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        extra_special_tokens={"image_token": "<|image_pad|>"},
        model_max_length=CONTEXT_LENGTH,
        chat_template=CHAT_TEMPLATE,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("data/emoji"), help="folder to write")
    parser.add_argument("--packages", type=Path, default=Path("data/packages"), help="folder of the npm tarballs")
    options = parser.parse_args()

    selection = json.loads((Path(__file__).parent / "selection.json").read_text(encoding="utf-8"))
    tarballs = {style: fetch(package, options.packages) for style, package in STYLES.items()}
    annotations = fetch(NAMES, options.packages)
    names = {
        language: read_json(annotations, f"package/annotations/{language}/annotations.json")["annotations"][
            "annotations"
        ]
        for language in ("en", "zh")
    }
    kinds = select_kinds(read_json(tarballs["google"], "package/emoji.json"), names, selection)
    for style, tarball in tarballs.items():
        extract_pictures(tarball, style, {kind["code"] for kind in kinds}, options.output / "pictures" / style)
    with open(options.output / "metadata.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps(kind, ensure_ascii=False) + "\n" for kind in kinds)

    texts = [text for kind in kinds for text in answers(kind).values()]
    texts += [question for questions in QUESTIONS.values() for question in questions]
    texts += ["user", "assistant"] * len(kinds)  # in every conversation: each deserves one token
    tokenizer = train_tokenizer(texts)
    tokenizer.save_pretrained(options.output / "tokenizer")
    print(f"{len(kinds)} kinds in {len(STYLES)} styles and {len(tokenizer)} tokens in {options.output}")


if __name__ == "__main__":
    main()
