"""Rows of chat for the projector and the decoder, in the training schema of this package.

    python examples/emoji/chats.py --data data/emoji --output data/emoji-run/chats

Writes mild views of the training pictures as files, so that the frozen tower has to see each only once, and
`train.jsonl` with an English and a Chinese chat about each view.
"""

import argparse
import json
import random
from pathlib import Path

import torch
from PIL import Image
from prompts import QUESTIONS, vary
from tqdm import tqdm
from views import augment, load_images, read_rows


def chat(file: str, question: str, answer: str) -> dict:
    content = [{"type": "image"}, {"type": "text", "text": question}]
    return {
        "messages": [{"role": "user", "content": content}, {"role": "assistant", "content": answer}],
        "images": [file],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data/emoji"), help="folder written by prepare.py")
    parser.add_argument("--output", type=Path, default=Path("data/emoji-run/chats"), help="folder to write")
    parser.add_argument("--views", type=int, default=24, help="of each picture; the first is undisturbed")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if (options.output / "train.jsonl").exists():
        return  # it is written last

    torch.manual_seed(options.seed)
    lot = random.Random(options.seed)
    rows = [row for row in read_rows(options.data / "pictures.jsonl") if row["split"] == "train"]
    pictures = load_images([options.data / row["file"] for row in rows])
    chats = []
    for number in tqdm(range(options.views), desc="views"):
        folder = options.output / str(number)
        folder.mkdir(parents=True, exist_ok=True)
        for start in range(0, len(rows), 128):
            views = augment(pictures[start : start + 128], 0.5 if number else 0.0)
            views = ((views + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
            for i, (row, view) in enumerate(zip(rows[start : start + 128], views, strict=True), start):
                Image.fromarray(view).save(folder / f"{i}.png")
                for language, questions in QUESTIONS.items():
                    question = questions[0] if lot.random() < 0.1 else lot.choice(questions)
                    chats.append(chat(f"{number}/{i}.png", vary(question, lot), row[language]))
    lot.shuffle(chats)
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in chats]
    (options.output / "train.jsonl").write_text("".join(lines), encoding="utf-8")
    print(f"{len(chats)} chats in {options.output}")


if __name__ == "__main__":
    main()
