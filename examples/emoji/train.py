"""Train a small MiniMind-V from scratch to name pictures of emoji in English and Chinese, on a CPU.

    python examples/emoji/train.py --data data/emoji --output checkpoints/minimind-v-emoji

Three stages, all run by the library's `Trainer`:
1. the vision tower learns to classify the pictures (with a linear head on its mean feature, thrown away afterwards).
   Without this stage the decoder learns the names first and stays blind to the picture for long;
2. projector and decoder learn to answer, the tower is frozen;
3. everything learns together for a short while, with a smaller learning rate.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from batches import IMAGE_SIZE, CaptionCollator, augment, load_pictures
from prompts import QUESTIONS, answers
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerFast,
    SiglipImageProcessorPil,
    Trainer,
    TrainingArguments,
    set_seed,
)

from minimind_v import MiniMindVConfig, MiniMindVForConditionalGeneration, MiniMindVProcessor
from minimind_v.cli.engine import encode

STYLES = ("google", "twitter")


def build(tokenizer: PreTrainedTokenizerFast) -> tuple[MiniMindVForConditionalGeneration, MiniMindVProcessor]:
    """A model with random weights, and its processor."""
    config = MiniMindVConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 192,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 48,
            "intermediate_size": 512,
            "max_position_embeddings": tokenizer.model_max_length,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
        },
        vision_config={
            "model_type": "siglip_vision_model",
            "hidden_size": 192,
            "intermediate_size": 768,
            "num_hidden_layers": 6,
            "num_attention_heads": 3,
            "image_size": IMAGE_SIZE,
            "patch_size": 16,
            "vision_use_head": False,
        },
        image_token_id=tokenizer.image_token_id,
    )
    model = MiniMindVForConditionalGeneration(config)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        suppress_tokens=[tokenizer.image_token_id],
        do_sample=False,
        max_new_tokens=40,
    )
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    image_processor = SiglipImageProcessorPil(size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    return model, MiniMindVProcessor(image_processor, tokenizer, config.image_seq_length, tokenizer.image_token)


class TowerClassifier(nn.Module):
    """Stage 1: the mean of the tower's features must tell the kind of thing."""

    def __init__(self, tower: nn.Module, width: int, num_kinds: int) -> None:
        super().__init__()
        self.tower, self.head = tower, nn.Linear(width, num_kinds)

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.head(self.tower(pixel_values).last_hidden_state.mean(dim=1))
        return {"loss": F.cross_entropy(logits, labels, label_smoothing=0.1), "logits": logits}


def fit(name: str, module: nn.Module, rows: list[dict], collator: Callable, **options: Any) -> None:
    """Run one stage with the Trainer and print how long it took.

    Args:
        name: What the stage trains.
        module: Returns a loss from a batch.
        rows: The examples.
        collator: Makes a batch of a list of rows.
        **options: Fields of `TrainingArguments` that differ between the stages.
    """
    arguments = TrainingArguments(
        save_strategy="no",
        report_to="none",
        lr_scheduler_type="cosine",
        warmup_steps=100,
        weight_decay=0.05,
        adam_beta2=0.98,
        logging_steps=200,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        **options,
    )
    start = time.time()
    Trainer(module, arguments, train_dataset=rows, data_collator=collator).train()
    minutes = (time.time() - start) / 60
    print(f"{name}: {arguments.num_train_epochs:g} epochs of {len(rows)} rows in {minutes:.1f} minutes", flush=True)


@torch.inference_mode()
def evaluate(folder: Path, files: list[Path], kinds: list[dict]) -> dict[str, float]:
    """Share of the pictures whose greedy caption is exactly right, per style and language, from the saved weights."""
    model = MiniMindVForConditionalGeneration.from_pretrained(folder).eval()
    processor = MiniMindVProcessor.from_pretrained(folder)
    accuracy = {}
    for language, questions in QUESTIONS.items():
        texts = [answers(kind)[language] for kind in kinds]
        captions = []
        for start in tqdm(range(0, len(files), 128), desc=f"captions, {language}"):
            question = {"type": "text", "text": questions[0]}
            chats = [
                [{"role": "user", "content": [{"type": "image", "path": str(file)}, question]}]
                for file in files[start : start + 128]
            ]
            inputs = encode(processor, chats)
            output = model.generate(**inputs)[:, inputs["input_ids"].shape[1] :]
            captions += [text.strip() for text in processor.batch_decode(output, skip_special_tokens=True)]
        for i, style in enumerate(STYLES):
            right = [a == b for a, b in zip(captions[i * len(kinds) : (i + 1) * len(kinds)], texts, strict=True)]
            accuracy[f"{style}, {language}"] = sum(right) / len(right)
    return accuracy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data/emoji"), help="folder written by prepare.py")
    parser.add_argument("--output", type=Path, default=Path("checkpoints/minimind-v-emoji"))
    parser.add_argument("--tower-epochs", type=float, default=120)
    parser.add_argument("--decoder-epochs", type=float, default=50)
    parser.add_argument("--joint-epochs", type=float, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    set_seed(options.seed)

    kinds = [json.loads(line) for line in (options.data / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]
    files = [options.data / "pictures" / style / f"{kind['code']}.png" for style in STYLES for kind in kinds]
    pictures = load_pictures(files)
    model, processor = build(AutoTokenizer.from_pretrained(options.data / "tokenizer"))
    print(f"{len(kinds)} kinds, {len(files)} pictures, {model.num_parameters() / 1e6:.2f}M parameters")

    rows = [{"picture": i, "kind": i % len(kinds)} for i in range(len(files))]

    def classify(batch: list[dict]) -> dict[str, torch.Tensor]:
        pixel_values = augment(pictures[[row["picture"] for row in batch]])
        return {"pixel_values": pixel_values, "labels": torch.tensor([row["kind"] for row in batch])}

    tower = model.model.vision_tower
    classifier = TowerClassifier(tower, model.config.vision_config.hidden_size, len(kinds))
    stage = {"output_dir": str(options.output), "seed": options.seed, "per_device_train_batch_size": 64}
    stage.update(num_train_epochs=options.tower_epochs, learning_rate=1e-3)
    fit("tower", classifier, rows, classify, **stage)

    rows = [{**row, "language": language} for row in rows for language in QUESTIONS]
    caption = CaptionCollator(pictures, kinds, processor)
    tower.requires_grad_(False)
    stage.update(seed=options.seed + 1, per_device_train_batch_size=32)
    stage.update(num_train_epochs=options.decoder_epochs, learning_rate=2e-3)
    fit("projector and decoder", model, rows, caption, **stage)

    tower.requires_grad_(True)
    stage.update(seed=options.seed + 2, num_train_epochs=options.joint_epochs, learning_rate=5e-4)
    fit("everything", model, rows, caption, **stage)

    model.to(torch.bfloat16).save_pretrained(options.output)
    processor.save_pretrained(options.output)
    for name, value in evaluate(options.output, files, kinds).items():
        print(f"{name}: {value:.1%} exactly right")


if __name__ == "__main__":
    main()
