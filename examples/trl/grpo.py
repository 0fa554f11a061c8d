"""Reinforcement learning with TRL: python examples/trl/grpo.py --output_dir my-model

The model answers each question several times; answers that a reward function likes become likelier.
"""

from typing import Any

from emoji_rows import load_rows, question
from transformers import AutoModelForImageTextToText, AutoProcessor, HfArgumentParser
from trl import GRPOConfig, GRPOTrainer

from minimind_v import EMBEDDED_MODEL  # the import also lets the Auto classes know the model
from minimind_v.training import freeze


def names_the_thing(completions: list[Any], name: list[str], **kwargs: Any) -> list[float]:
    """1 for every answer that contains the picture's name, else 0."""
    answers = [completion[0]["content"].lower() for completion in completions]
    return [float(word in answer) for word, answer in zip(name, answers, strict=True)]


parser = HfArgumentParser(GRPOConfig)
parser.set_defaults(output_dir="minimind-v-grpo", learning_rate=1e-4, num_train_epochs=5, logging_steps=1)
parser.set_defaults(per_device_train_batch_size=8, num_generations=4, max_completion_length=16, bf16=False)
parser.set_defaults(temperature=2.0)  # this model is so sure of its answers that they would all be the same
(arguments,) = parser.parse_args_into_dataclasses()

model = AutoModelForImageTextToText.from_pretrained(EMBEDDED_MODEL, dtype="float32")
freeze(model, "sft")
trainer = GRPOTrainer(
    model,
    reward_funcs=names_the_thing,
    args=arguments,
    train_dataset=load_rows(lambda name: {"prompt": [question()], "name": name}),
    processing_class=AutoProcessor.from_pretrained(EMBEDDED_MODEL),
)
trainer.train()
trainer.save_model()
