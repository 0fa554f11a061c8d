"""Stages 1 and 2: a convolutional teacher learns the kinds of things, and the vision tower learns from the teacher.

    python examples/emoji/train_tower.py --data data/emoji --output data/emoji-run

The teacher starts from ImageNet, so it knows edges, fur and wheels already; the tower starts from random weights. It
learns to see as the teacher does, on drawings of other things too: that needs no names. The output folder then holds

    teacher/    the teacher with its classifier
    start/      a MiniMind-V with the trained tower; projector and decoder have random weights

Both stages save checkpoints and go on from the last one when they are started again.
"""

import argparse
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from lite0 import Lite0
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    SiglipImageProcessorPil,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from views import IMAGE_SIZE, augment, load_images, read_rows

from minimind_v import MiniMindVConfig, MiniMindVForConditionalGeneration, MiniMindVProcessor
from minimind_v.training.output_folder import last_checkpoint


def build(tokenizer_folder: Path) -> tuple[MiniMindVForConditionalGeneration, MiniMindVProcessor]:
    """A model with random weights, and its processor."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
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


class Teacher(nn.Module):
    """EfficientNet-lite0 and a linear classifier."""

    def __init__(self, network: Lite0, num_kinds: int) -> None:
        super().__init__()
        self.network, self.head = network, nn.Linear(1280, num_kinds)

    def classify(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits `[B, kinds]` and fine features `[B, 16, 112]`, one for each patch of the tower."""
        # Enlarged, because ImageNet showed it larger things. Its finer features are averaged to the tower's patches.
        pixel_values = F.interpolate(pixel_values, scale_factor=1.5, mode="bilinear")
        coarse, fine = self.network(pixel_values.contiguous(memory_format=torch.channels_last))
        fine = F.adaptive_avg_pool2d(fine, 4).flatten(2).transpose(1, 2)
        return self.head(F.dropout(coarse.mean(dim=(2, 3)), 0.2, self.training)), fine

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": F.cross_entropy(self.classify(pixel_values)[0], labels)}


class Student(nn.Module):
    """The tower, which must give what the teacher gives: for the picture its logits, for each patch its features."""

    def __init__(self, tower: nn.Module, teacher: Teacher) -> None:
        super().__init__()
        width = tower.config.hidden_size
        self.tower, self.head, self.fine = tower, nn.Linear(width, teacher.head.out_features), nn.Linear(width, 112)
        self.teacher = [teacher.eval()]  # in a list: it is neither trained nor saved

    def classify(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = self.tower(pixel_values).last_hidden_state
        return self.head(tokens.mean(dim=1)), self.fine(tokens)

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        with torch.no_grad():
            taught, taught_fine = self.teacher[0].classify(pixel_values)
        logits, fine = self.classify(pixel_values)
        divergence = F.kl_div((logits / 2).log_softmax(1), (taught / 2).softmax(1), reduction="batchmean")
        return {"loss": 2 * divergence + F.mse_loss(fine, F.layer_norm(taught_fine, (112,)))}


class Views(TrainerCallback):
    """Collator: random views of the pictures, mild at first, then strong; for the tower, mild again at the end."""

    def __init__(
        self, pictures: torch.Tensor, strongest: float = 1.0, settles: bool = False, mixed: float = 0.0
    ) -> None:
        self.pictures, self.strongest, self.settles, self.mixed = pictures, strongest, settles, mixed
        self.strength = 0.4

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        done = state.global_step / state.max_steps
        self.strength = min(self.strongest, 0.4 + 0.8 * done)
        if self.settles:
            self.strength = min(self.strength, 0.3 + 1.2 * (1 - done))

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        views = augment(self.pictures[[row["picture"] for row in rows]], self.strength)
        if self.mixed:  # a share of the views shines through another: the teacher says what is to be seen
            share = torch.rand(len(views), 1, 1, 1) * 0.5 * (torch.rand(len(views), 1, 1, 1) < self.mixed)
            views = views.lerp(views.flip(0), share)
        return {"pixel_values": views, "labels": torch.tensor([row.get("label", -100) for row in rows])}


def fit(module: nn.Module, rows: list[dict], views: Views, folder: Path, **options: float) -> None:
    """Run one stage with the Trainer; a finished stage is loaded instead."""
    finished = folder / "model.safetensors"
    if not finished.exists():
        arguments = TrainingArguments(
            output_dir=str(folder),
            per_device_train_batch_size=64,
            save_steps=500,
            save_total_limit=1,
            report_to="none",
            lr_scheduler_type="cosine",
            warmup_steps=100,
            weight_decay=0.05,
            adam_beta2=0.98,
            logging_steps=50,
            remove_unused_columns=False,
            dataloader_pin_memory=False,
            **options,
        )
        trainer = Trainer(module, arguments, train_dataset=rows, data_collator=views, callbacks=[views])
        trainer.train(resume_from_checkpoint=last_checkpoint(folder))
        trainer.save_state()
        trainer.save_model()
    module.load_state_dict(load_file(finished))


@torch.inference_mode()
def accuracy(classify: Callable, pictures: torch.Tensor, rows: list[dict]) -> dict[str, float]:
    """Share of the undisturbed pictures whose most likely kind is the right one, by split."""
    right, total = Counter(), Counter()
    for start in tqdm(range(0, len(rows), 128), desc="classes"):
        batch = rows[start : start + 128]
        best = classify(augment(pictures[[row["picture"] for row in batch]], 0.0))[0].argmax(dim=1)
        for row, kind in zip(batch, best.tolist(), strict=True):
            total[row["split"]] += 1
            right[row["split"]] += kind == row["label"]
    return {split: right[split] / total[split] for split in total}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data/emoji"), help="folder written by prepare.py")
    parser.add_argument("--output", type=Path, default=Path("data/emoji-run"), help="folder to write")
    parser.add_argument("--teacher-steps", type=int, default=450, help="of 64 views each")
    parser.add_argument("--tower-steps", type=int, default=7500, help="of 64 views each")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    rows, others = read_rows(options.data / "pictures.jsonl"), read_rows(options.data / "others.jsonl")
    numbers = {kind: number for number, kind in enumerate(sorted({row["kind"] for row in rows}))}
    rows = [row | {"picture": i, "label": numbers[row["kind"]]} for i, row in enumerate(rows)]
    others = [row | {"picture": i} for i, row in enumerate(others, len(rows))]
    pictures = load_images([options.data / row["file"] for row in rows + others])
    train = [row for row in rows if row["split"] == "train"]
    results = {}

    set_seed(options.seed)
    teacher = Teacher(Lite0.pretrained(), len(numbers))
    stage = {"seed": options.seed, "max_steps": options.teacher_steps, "learning_rate": 1.5e-3}
    fit(teacher, train, Views(pictures), options.output / "teacher", **stage)
    results["teacher"] = accuracy(teacher.eval().classify, pictures, rows)
    print("teacher", results["teacher"])

    set_seed(options.seed + 1)
    model, processor = build(options.data / "tokenizer")
    student = Student(model.model.vision_tower, teacher)
    stage = {"seed": options.seed + 1, "max_steps": options.tower_steps, "learning_rate": 1e-3}
    views = Views(pictures, strongest=0.7, settles=True, mixed=0.3)
    fit(student, 4 * train + others, views, options.output / "tower", **stage)  # of about half, it must know the name
    results["tower"] = accuracy(student.eval().classify, pictures, rows)
    print("tower", results["tower"])
    model.save_pretrained(options.output / "start")
    processor.save_pretrained(options.output / "start")
    (options.output / "tower.json").write_text(json.dumps(results, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
