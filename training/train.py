"""The training command: transformers' Trainer on a MiniMind-V checkpoint and your own pictures."""

import signal
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import transformers
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    HfArgumentParser,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_utils import get_last_checkpoint

from .collator import MiniMindVDataCollator
from .data import MiniMindVDataset
from .stages import LEARNING_RATES, freeze


@dataclass
class TrainArguments(TrainingArguments):
    """transformers' TrainingArguments with what this package needs; `--help` lists all of them."""

    model: str = field(default="", metadata={"help": "Checkpoint folder or Hub repository to start from."})
    data: str = field(default="", metadata={"help": "Training data: .jsonl, .parquet, or a folder of pictures."})
    eval_data: str | None = field(default=None, metadata={"help": "Held-out data for the evaluation loss."})
    stage: Literal["pretrain", "sft"] = field(
        default="sft", metadata={"help": "pretrain: the projector only. sft: projector and decoder."}
    )
    freeze_llm: int = field(
        default=0, metadata={"help": "For sft: 0 trains all of the decoder, 1 its first and last layer, 2 none."}
    )
    max_length: int | None = field(
        default=None, metadata={"help": "Longer rows are left out whole; default: the model's positions."}
    )
    packing: bool = field(default=False, metadata={"help": "Put the rows of a batch into one, without padding."})
    on_broken: Literal["error", "skip"] = field(
        default="error", metadata={"help": "What to do with rows whose pictures cannot be read."}
    )
    learning_rate: float | None = field(
        default=None, metadata={"help": "Default: the original's, 4e-4 for pretrain and 5e-6 for sft."}
    )
    output_dir: str = field(default="minimind-v-output", metadata={"help": "Folder for checkpoints and the result."})
    per_device_train_batch_size: int = field(default=16, metadata={"help": "Rows per step and device."})
    lr_scheduler_type: str = field(default="cosine_with_min_lr", metadata={"help": "The original's: cosine to 10 %."})
    lr_scheduler_kwargs: dict[str, Any] | str | None = field(default_factory=lambda: {"min_lr_rate": 0.1})
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Must stay off: the collator needs the chat."}
    )
    dataloader_pin_memory: bool = field(
        default_factory=torch.cuda.is_available, metadata={"help": "Default: where there is a GPU."}
    )
    logging_steps: float = field(default=10, metadata={"help": "Steps between two lines of the log."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints to keep."})

    def __post_init__(self) -> None:
        if not self.model or not self.data:
            raise ValueError("Name a checkpoint with --model and training data with --data.")
        if self.learning_rate is None:
            self.learning_rate = LEARNING_RATES[self.stage]
        super().__post_init__()


class StopOnSignal(TrainerCallback):
    """Ctrl-C and SIGTERM: finish the step, save a checkpoint, stop."""

    def __init__(self) -> None:
        self.received: int | None = None
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.receive)

    def receive(self, number: int, frame: Any) -> None:
        self.received = number
        signal.signal(number, signal.SIG_DFL)  # a second one ends the process at once

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        if self.received is not None:
            control.should_save = control.should_training_stop = True
        return control


def train(arguments: TrainArguments) -> Trainer:
    """Runs a training stage; the finished model, its processor and the metrics are in `output_dir`.

    Returns:
        The trainer, after training.

    Raises:
        ValueError: A broken row, unless `on_broken` is `"skip"`.
        SystemExit: Stopped by a signal, after a checkpoint was saved.
    """
    transformers.set_seed(arguments.seed)
    model = AutoModelForImageTextToText.from_pretrained(arguments.model, dtype="float32")
    processor = AutoProcessor.from_pretrained(arguments.model)
    moving = freeze(model, arguments.stage, arguments.freeze_llm)
    count = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    print(f"Stage {arguments.stage}: {count / 1e6:.2f}M of {model.num_parameters() / 1e6:.2f}M parameters move, "
          f"{moving[0]} to {moving[-1]}")  # fmt: skip
    collator = MiniMindVDataCollator(processor, arguments.max_length, arguments.on_broken, arguments.packing)
    stop = StopOnSignal()
    trainer = Trainer(
        model,
        arguments,
        data_collator=collator,
        train_dataset=MiniMindVDataset(arguments.data),
        eval_dataset=MiniMindVDataset(arguments.eval_data) if arguments.eval_data else None,
        processing_class=processor,
        callbacks=[stop],
    )
    resume = arguments.resume_from_checkpoint
    if resume in ("True", "true", "latest"):
        resume = get_last_checkpoint(arguments.output_dir)
    result = trainer.train(resume_from_checkpoint=resume)
    if stop.received is not None:
        raise SystemExit(
            f"Stopped after step {trainer.state.global_step}; the checkpoint is saved. Go on with the same command "
            "and --resume-from-checkpoint latest."
        )
    trainer.save_model()
    trainer.save_state()
    metrics = result.metrics | {"rows_left_out": len(collator.dropped)}
    if arguments.eval_data:
        metrics |= trainer.evaluate()
    trainer.save_metrics("all", metrics)
    return trainer


def main(arguments: list[str]) -> None:
    parser = HfArgumentParser(TrainArguments, prog="python -m minimind_v.training train")
    train(*parser.parse_args_into_dataclasses(arguments))
