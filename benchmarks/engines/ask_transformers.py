"""Asks transformers, the standard of all others: ask_transformers.py CHECKPOINT QUESTIONS.json ANSWERS.json [VARIANT]

Runs where this package is installed. Greedy, one question at a time. VARIANT is `eager` (float32, the default),
`column-major`, `int8`, `bfloat16` or `compiled` (float32, column-major, static cache).
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from report import write_report
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    CompileConfig,
    StoppingCriteria,
    StoppingCriteriaList,
)

import minimind_v  # noqa: F401 - makes the Auto classes know the checkpoints
from minimind_v.inference.engine import quantize_decoder, store_column_major


class Clock(StoppingCriteria):
    """Never stops `generate()`, but notes when the first token is there."""

    def __init__(self) -> None:
        self.began = time.perf_counter()
        self.first_token_seconds = 0.0

    def __call__(self, input_ids: torch.LongTensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        self.first_token_seconds = self.first_token_seconds or time.perf_counter() - self.began
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def ask(model: Any, processor: Any, question: dict[str, Any]) -> dict[str, Any]:
    """The answer to one question, with its times."""
    clock = Clock()
    content: Any = [{"type": "image", "path": path} for path in question["images"]]
    content = [*content, {"type": "text", "text": question["text"]}] if content else question["text"]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    rows = question.get("rows", 1)
    output = model.generate(
        **{name: values.repeat_interleave(rows, 0) for name, values in inputs.items()},
        do_sample=False,
        max_new_tokens=question["max_new_tokens"],
        stopping_criteria=StoppingCriteriaList([clock]),
    )
    seconds, answer = time.perf_counter() - clock.began, output[0, inputs["input_ids"].shape[1] :]
    text = processor.decode(answer, skip_special_tokens=True).strip()
    times = {"first_token_seconds": clock.first_token_seconds, "seconds": seconds}
    return {"id": question["id"], "text": text, "tokens": rows * len(answer)} | times


def main(checkpoint: str, questions_file: str, answers_file: str, variant: str = "eager") -> None:
    start = time.perf_counter()
    has_tower = "vision_config" in json.loads(Path(checkpoint, "config.json").read_text(encoding="utf-8"))
    model_class, processor_class = (
        (AutoModelForImageTextToText, AutoProcessor) if has_tower else (AutoModelForCausalLM, AutoTokenizer)
    )
    dtype = torch.bfloat16 if variant == "bfloat16" else torch.float32
    model: Any = model_class.from_pretrained(checkpoint, dtype=dtype).eval()
    if variant in ("column-major", "compiled"):
        store_column_major(model)
    if variant == "int8":
        quantize_decoder(model)
    if variant == "compiled":
        model.generation_config.cache_implementation = "static"
        model.generation_config.compile_config = CompileConfig()
        model.generation_config.compile_config._compile_all_devices = True
    processor = processor_class.from_pretrained(checkpoint)
    loaded = time.perf_counter()
    answers = [ask(model, processor, item) for item in json.loads(Path(questions_file).read_text(encoding="utf-8"))]
    write_report(answers_file, f"transformers {transformers.__version__}", loaded - start, answers)


if __name__ == "__main__":
    main(*sys.argv[1:])
