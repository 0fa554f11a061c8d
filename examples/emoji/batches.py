"""From pictures and names to batches: loading, augmentation, and rows of chat with labels."""

import random
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from prompts import QUESTIONS, answers
from torch.nn import functional as F
from tqdm import tqdm

from minimind_v import MiniMindVProcessor

IMAGE_SIZE = 64
NO_LOSS = -100  # label of a token that is not predicted


def load_pictures(files: list[Path]) -> torch.Tensor:
    """`[N, 4, 64, 64]` in [0, 1]: colours multiplied by alpha, and alpha."""
    pictures = np.stack([np.asarray(Image.open(file).convert("RGBA")) for file in tqdm(files, desc="pictures")])
    pictures = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255
    pictures[:, :3] *= pictures[:, 3:]
    return pictures


def augment(pictures: torch.Tensor) -> torch.Tensor:
    """Slightly turn, scale, shift and tint `[B, 4, 64, 64]`, put it on white or a light colour: `[B, 3, 64, 64]`."""

    def uniform(low: float, high: float, *shape: int) -> torch.Tensor:
        return low + (high - low) * torch.rand(len(pictures), *shape)

    angle, scale = uniform(-0.12, 0.12), 1 / uniform(0.85, 1.08)
    cosine, sine = scale * angle.cos(), scale * angle.sin()
    rows = torch.stack([cosine, -sine, uniform(-0.1, 0.1), sine, cosine, uniform(-0.1, 0.1)], dim=1).view(-1, 2, 3)
    pictures = F.grid_sample(pictures, F.affine_grid(rows, pictures.shape, align_corners=False), align_corners=False)
    white = torch.rand(len(pictures), 1, 1, 1) < 0.6
    background = torch.where(white, 1.0, uniform(0.8, 1.0, 3, 1, 1))
    colours = pictures[:, :3] + background * (1 - pictures[:, 3:])
    colours = 0.5 + (colours - 0.5) * uniform(0.9, 1.05, 1, 1, 1) + uniform(-0.05, 0.05, 3, 1, 1)
    return colours.clamp(0, 1) * 2 - 1


class CaptionCollator:
    """Rows of chat: picture, a random question in the row's language, answer; loss on the answer only."""

    def __init__(self, pictures: torch.Tensor, kinds: list[dict], processor: MiniMindVProcessor) -> None:
        self.pictures, self.pad = pictures, processor.tokenizer.pad_token_id
        dummy = Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE))

        def prompt(question: str) -> list[int]:
            content = [{"type": "image", "image": dummy}, {"type": "text", "text": question}]
            chat = [{"role": "user", "content": content}]
            options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
            return processor.apply_chat_template(chat, **options)["input_ids"][0]

        encode = processor.tokenizer.encode
        self.prompts = {language: [prompt(q) for q in questions] for language, questions in QUESTIONS.items()}
        self.answers = [
            {language: encode(text + "<|im_end|>\n") for language, text in answers(kind).items()} for kind in kinds
        ]

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        prompts = [random.choice(self.prompts[row["language"]]) for row in rows]
        replies = [self.answers[row["kind"]][row["language"]] for row in rows]
        length = max(len(prompt) + len(reply) for prompt, reply in zip(prompts, replies, strict=True))
        ids = torch.full((len(rows), length), self.pad)
        mask, labels = torch.zeros_like(ids), torch.full_like(ids, NO_LOSS)
        for i, (prompt, reply) in enumerate(zip(prompts, replies, strict=True)):
            end = len(prompt) + len(reply)
            ids[i, :end], mask[i, :end] = torch.tensor(prompt + reply), 1
            labels[i, len(prompt) : end] = torch.tensor(reply)
        pixel_values = augment(self.pictures[[row["picture"] for row in rows]])
        return {"input_ids": ids, "attention_mask": mask, "labels": labels, "pixel_values": pixel_values}
