"""Does an export answer as its checkpoint does? Three questions, asked both, greedily."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from ..common import load_model, load_processor, read_model_type

PROMPTS = ("What is this?", "描述一下这个图像的内容。", "Describe this image.")
MAX_NEW_TOKENS = 32
IMAGES = [
    Path(__file__).resolve().parents[1] / "examples" / "images" / f"{name}.png" for name in ("apple", "pizza", "dog")
]


class AnswersDifferError(Exception):
    """An export that should compute the same numbers does not answer as its checkpoint does."""


@dataclass(frozen=True)
class Question:
    """A question, and how the checkpoint answers it.

    Args:
        text: The question itself.
        image: The image that it is about; None for a text-only checkpoint.
        inputs: The model's inputs of one row: `input_ids` `[1, T]` with the image's tokens, `attention_mask`, and
            `pixel_values` `[1, 3, height, width]` of an image (of NaFlex its three).
        answer: Ids of the greedy answer, at most `MAX_NEW_TOKENS`, without the end token.
    """

    text: str
    image: Image.Image | None
    inputs: dict[str, Any]
    answer: list[int]


def ask_checkpoint(checkpoint: str | Path, with_images: bool = True) -> Iterator[Question]:
    """Three questions and the checkpoint's greedy answers in float32.

    Args:
        checkpoint: Folder of this package, with a tokenizer.
        with_images: About images, if it has a tower.
    """
    has_tower = read_model_type(checkpoint) == "minimind_v"
    sees = has_tower and with_images
    if has_tower:
        asker = load_processor(checkpoint)
        model: Any = load_model(checkpoint, dtype=torch.float32, trust_remote_code=False)
    else:
        asker = AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=False)
        model = load_model(checkpoint, AutoModelForCausalLM, dtype=torch.float32, trust_remote_code=False)
    for text, path in zip(PROMPTS, IMAGES, strict=True):
        image = Image.open(path).convert("RGB") if sees else None
        content = [{"type": "image", "image": image}, {"type": "text", "text": text}] if sees else text
        chat = [{"role": "user", "content": content}]
        inputs = asker.apply_chat_template(
            chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        yield Question(text, image, dict(inputs), greedy_answer(model, inputs))


def greedy_answer(model: Any, inputs: Mapping[str, Any]) -> list[int]:
    """Ids that a model of transformers answers one row with, its own settings replaced, without the end token."""
    model.generation_config = GenerationConfig(
        do_sample=False, max_new_tokens=MAX_NEW_TOKENS, bos_token_id=1, eos_token_id=2, pad_token_id=0
    )
    answer = model.generate(**inputs)[0, inputs["input_ids"].shape[1] :].tolist()
    return answer[: answer.index(2)] if 2 in answer else answer


def compare_answers(
    checkpoint: str | Path, answer: Callable[[Question], list[int]], is_exact: bool, with_images: bool = True
) -> str:
    """Asks an export what the checkpoint was asked.

    Args:
        checkpoint: Folder of this package, with a tokenizer.
        answer: The export's greedy answer: its ids, at most `MAX_NEW_TOKENS`, without the end token.
        is_exact: The export computes in float32, so that its answers must be the same.
        with_images: Ask about images, if the checkpoint has a tower.

    Returns:
        How many answers are the same, for the summary.

    Raises:
        AnswersDifferError: They are not all the same, and `is_exact`.
    """
    equal, total, first = 0, 0, ""
    for question in ask_checkpoint(checkpoint, with_images):
        given, total = answer(question), total + 1
        if given == question.answer:
            equal += 1
        elif not first:
            same = next((i for i, (a, b) in enumerate(zip(given, question.answer, strict=False)) if a != b), None)
            place = min(len(given), len(question.answer)) if same is None else same
            first = f"; the first that differs does so at token {place + 1} of {len(question.answer)}"
    if is_exact and equal < total:
        raise AnswersDifferError(
            f"The export gives the checkpoint's greedy answer to {equal} of {total} questions{first}. Nothing was "
            "written. A near tie of two tokens can be the cause: without the check, it can be written all the same."
        )
    return f"{equal} of {total} greedy answers are the checkpoint's{first}"
