"""How often the greedy caption is exactly right, from the saved weights.

    python examples/emoji/evaluate.py --data data/emoji --model checkpoints/minimind-v-emoji

Asks the pipeline's default question and the original's about every picture, and questions in new words about 256
training pictures. Writes into `--output`: `results.json`, `answers.tsv` (every answer) and `grid.png` (pictures of
the unseen style, drawn by lot, with what the model says), and the figures into the model's card.
"""

import argparse
import json
import random
from pathlib import Path

import torch
from huggingface_hub import EvalResult, ModelCard
from PIL import Image, ImageDraw
from prompts import QUESTIONS
from tqdm import tqdm
from views import read_rows

from minimind_v import MiniMindVForConditionalGeneration, MiniMindVProcessor

SPLITS = {
    "train": "drawings trained on",
    "held-out": "drawings held out from the training styles",
    "unseen": "OpenMoji, a style never trained on",
}
# None of these is among the questions of the training. The last of each asks for something that the model cannot do.
NEW_QUESTIONS = {
    "english": ["What might this be?", "Say what this is, please.", "WHAT DO WE HAVE HERE", "Is this an animal?"],
    "chinese": ["请问这是什么？", "图上画着什么", "讲讲这个图片", "这是动物吗？"],
}
BATCH = 64


class Captioner:
    """A model with its processor. Pictures are encoded once and asked several questions."""

    def __init__(self, folder: Path) -> None:
        self.model = MiniMindVForConditionalGeneration.from_pretrained(folder).eval()
        self.processor = MiniMindVProcessor.from_pretrained(folder)

    def inputs(self, files: list[Path], question: str, answers: list[str] | None = None) -> dict[str, torch.Tensor]:
        """Inputs of `generate()`, or with answers those of a loss."""
        part = {"type": "text", "text": question}
        chats = [[{"role": "user", "content": [{"type": "image", "path": str(file)}, part]}] for file in files]
        for chat, answer in zip(chats, answers or (), strict=False):
            chat.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        options = {"add_generation_prompt": answers is None, "return_assistant_tokens_mask": answers is not None}
        return self.processor.apply_chat_template(
            chats,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True},
            **options,
        )

    @torch.inference_mode()
    def ask(self, files: list[Path], questions: list[str]) -> list[list[str]]:
        """For each question the answers about all pictures."""
        answers = [[] for _ in questions]
        for start in tqdm(range(0, len(files), BATCH), desc="answers"):
            features = None
            for question, texts in zip(questions, answers, strict=True):
                inputs = self.inputs(files[start : start + BATCH], question)
                pixel_values = inputs.pop("pixel_values")
                features = features or {"image": self.model.get_image_features(pixel_values)}
                output = self.model.generate(**inputs, mm_encoder_outputs=dict(features))
                output = output[:, inputs["input_ids"].shape[1] :]
                texts += [text.strip() for text in self.processor.batch_decode(output, skip_special_tokens=True)]
        return answers

    @torch.inference_mode()
    def losses(self, files: list[Path], question: str, answers: list[str]) -> dict[str, float]:
        """Mean loss per answer token with the true pictures, and with those of the row before."""
        inputs = self.inputs(files, question, answers)
        inputs["labels"] = inputs["input_ids"].masked_fill(inputs.pop("assistant_masks") == 0, -100)
        true = self.model(**inputs).loss.item()
        inputs["pixel_values"] = inputs["pixel_values"].roll(1, dims=0)
        return {"true pictures": true, "shuffled pictures": self.model(**inputs).loss.item()}


def draw_grid(rows: list[dict], answers: list[str], data: Path, columns: int = 8, lines: int = 6) -> Image.Image:
    """Pictures drawn by lot with the English answer: right ones in green, wrong ones in red with the truth."""
    grid = Image.new("RGB", (columns * 112, lines * 108), "white")
    draw = ImageDraw.Draw(grid)
    for place, i in enumerate(sorted(random.Random(0).sample(range(len(rows)), columns * lines))):
        x, y = place % columns * 112, place // columns * 108
        picture = Image.open(data / rows[i]["file"])
        grid.paste(picture, (x + 20, y + 4), picture)
        right = answers[i] == rows[i]["english"]
        text = answers[i] if right else f"{answers[i]}\n({rows[i]['english'][:-1]})"
        draw.multiline_text(
            (x + 56, y + 78), text, "green" if right else "red", anchor="ma", align="center", font_size=9
        )
    return grid


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data/emoji"), help="folder written by prepare.py")
    parser.add_argument("--model", type=Path, default=Path("checkpoints/minimind-v-emoji"))
    parser.add_argument("--output", type=Path, default=Path("data/emoji-run/results"), help="folder to write")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)

    captioner = Captioner(options.model)
    rows = read_rows(options.data / "pictures.jsonl")
    files = [options.data / row["file"] for row in rows]
    asked = {language: questions[0] for language, questions in QUESTIONS.items()}
    answers = dict(zip(asked, captioner.ask(files, list(asked.values())), strict=True))
    results = {"pictures": {}, "accuracy": {}, "new questions": {}, "loss": {}}
    for split in SPLITS:
        chosen = [i for i, row in enumerate(rows) if row["split"] == split]
        results["pictures"][split] = len(chosen)
        results["accuracy"][split] = {
            language: sum(answers[language][i] == rows[i][language] for i in chosen) / len(chosen)
            for language in asked
        }
    lot = random.Random(0)
    sample = lot.sample([i for i, row in enumerate(rows) if row["split"] == "train"], 256)
    files, sampled = [files[i] for i in sample], [rows[i] for i in sample]
    for language, questions in NEW_QUESTIONS.items():
        for question, texts in zip(questions, captioner.ask(files, questions), strict=True):
            right = [text == row[language] for text, row in zip(texts, sampled, strict=True)]
            results["new questions"][question] = sum(right) / len(right)
        truth = [row[language] for row in sampled]
        results["loss"][language] = captioner.losses(files, asked[language], truth)

    print(f"| pictures | {' | '.join(asked.values())} |\n|---|---|---|")
    for split, title in SPLITS.items():
        shares = results["accuracy"][split].values()
        print(f"| {title} ({results['pictures'][split]}) | {' | '.join(f'{share:.1%}' for share in shares)} |")
    print(json.dumps({key: results[key] for key in ("new questions", "loss")}, ensure_ascii=False, indent=1))

    (options.output / "results.json").write_text(json.dumps(results, ensure_ascii=False, indent=1), encoding="utf-8")
    lines = ["split\tfile\tenglish\tanswer\tchinese\tanswer"] + [
        "\t".join(
            [row["split"], row["file"], row["english"], answers["english"][i], row["chinese"], answers["chinese"][i]]
        )
        for i, row in enumerate(rows)
    ]
    (options.output / "answers.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    unseen = [i for i, row in enumerate(rows) if row["split"] == "unseen"]
    grid = draw_grid([rows[i] for i in unseen], [answers["english"][i] for i in unseen], options.data)
    grid.quantize(128).save(options.output / "grid.png", optimize=True)

    card = ModelCard.load(options.model / "README.md")
    card.data.model_name = "MiniMind-V Emoji"
    card.data.eval_results = [
        EvalResult(
            task_type="image-to-text",
            dataset_type="emoji",
            dataset_name=title,
            dataset_config=language,
            dataset_split=split,
            metric_type="exact_match",
            metric_value=round(results["accuracy"][split][language], 4),
        )
        for split, title in SPLITS.items()
        for language in asked
    ]
    card.save(options.model / "README.md")


if __name__ == "__main__":
    main()
