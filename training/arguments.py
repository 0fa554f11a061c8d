"""The options of a training and the reading of its command line."""

import difflib
import os
import re
from argparse import Namespace
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn

import torch
from transformers import HfArgumentParser, TrainingArguments
from transformers.integrations.integration_utils import is_tensorboard_available

from .stages import LEARNING_RATES


@dataclass
class TrainArguments(TrainingArguments):
    """transformers' TrainingArguments with what this package needs; `--help` lists all of them."""

    model: str = field(default="", metadata={"help": "Checkpoint folder or Hub repository to start from."})
    data: str = field(default="", metadata={"help": "Training data: .jsonl, .parquet, or a folder of pictures."})
    eval_data: str | None = field(default=None, metadata={"help": "Held-out data for loss and sample answers."})
    eval_fraction: float = field(
        default=0.0, metadata={"help": "Instead of eval_data: share of the data to hold out."}
    )
    num_samples: int = field(default=4, metadata={"help": "Held-out rows that are answered at every evaluation."})
    stage: Literal["pretrain", "sft"] = field(
        default="sft", metadata={"help": "pretrain: the projector only. sft: projector and decoder."}
    )
    freeze_llm: Literal[0, 1, 2] = field(
        default=0, metadata={"help": "For sft: 0 trains all of the decoder, 1 its first and last layer, 2 none."}
    )
    lora_rank: int | None = field(
        default=None, metadata={"help": "For sft: low-rank adapters in the decoder, merged into it at the end."}
    )
    max_length: int | None = field(
        default=None, metadata={"help": "Longer rows are left out whole; default: the model's positions."}
    )
    packing: bool = field(default=False, metadata={"help": "Put the rows of a batch into one, without padding."})
    cache_image_features: str | None = field(
        default=None, metadata={"help": "Folder that keeps the tower's output, so that it sees each picture once."}
    )
    check_data: bool = field(
        default=True, metadata={"help": "Read every row before the first step. Held-out rows are always read."}
    )
    on_broken: Literal["error", "skip"] = field(
        default="error", metadata={"help": "Rows that cannot be used: list them and stop, or leave them out."}
    )
    learning_rate: float | None = field(
        default=None, metadata={"help": "Default: the original's, 4e-4 for pretrain and 5e-6 for sft; LoRA: 2e-2."}
    )
    max_image_pixels: int | None = field(default=None, metadata={"help": "Larger pictures are broken rows."})
    allowed_hosts: str | None = field(
        default=None,
        metadata={
            "help": "Hosts, with commas between, from which pictures are fetched; '' fetches nothing. Default: any "
            "public one."
        },
    )
    output_dir: str = field(default="minimind-v-output", metadata={"help": "Folder for checkpoints and the result."})
    overwrite: bool = field(default=False, metadata={"help": "Delete what the output folder holds, and begin anew."})
    per_device_train_batch_size: int = field(default=16, metadata={"help": "Rows per step and device."})
    lr_scheduler_type: str = field(default="cosine_with_min_lr", metadata={"help": "The original's: cosine to 10 %%."})
    lr_scheduler_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": 'As JSON. Default: {"min_lr_rate": 0.1} for cosine_with_min_lr.'}
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Must stay off: the collator needs the chat."}
    )
    dataloader_pin_memory: bool = field(
        default_factory=torch.cuda.is_available, metadata={"help": "Default: where there is a GPU."}
    )
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "Not needed: every step uses every parameter, also a batch without pictures."}
    )
    logging_steps: float = field(
        default=10, metadata={"help": "Steps between two lines of the log; fewer where the training is shorter."}
    )
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Log a loss that is NaN as 0."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints to keep."})

    def __post_init__(self) -> None:
        if not self.model or not self.data:
            raise ValueError("Name a checkpoint with --model and training data with --data.")
        if not Path(self.model).is_dir() and not re.fullmatch(r"[\w.-]+/[\w.-]+", self.model):
            raise ValueError(f"--model {self.model} is neither a folder nor USER/REPO of the Hub")
        if self.max_steps == 0:
            raise ValueError("--max-steps 0 trains nothing; give a number above 0, or leave it out for whole epochs")
        if self.overwrite and self.resume_from_checkpoint:
            raise ValueError("--overwrite begins anew, --resume-from-checkpoint goes on: give one of them")
        if self.lora_rank and (self.stage == "pretrain" or self.freeze_llm):
            raise ValueError("--lora-rank adapts the whole decoder: use it with --stage sft and --freeze-llm 0.")
        if not 0 <= self.eval_fraction < 1 or (self.eval_fraction and self.eval_data):
            raise ValueError(
                f"--eval-fraction must be from 0 to below 1, without --eval-data; got {self.eval_fraction}"
            )
        if self.learning_rate is None:
            self.learning_rate = LEARNING_RATES["lora" if self.lora_rank else self.stage]
        if (self.eval_data or self.eval_fraction) and self.eval_strategy == "no":
            self.eval_strategy = "epoch"
        if self.lr_scheduler_kwargs is None and self.lr_scheduler_type == "cosine_with_min_lr":
            self.lr_scheduler_kwargs = {"min_lr_rate": 0.1}
        super().__post_init__()
        if "tensorboard" in (self.report_to or ()) and not is_tensorboard_available():
            raise ImportError('--report-to tensorboard needs TensorBoard: pip install "minimind-v[train]"')
        launched = int(os.environ.get("WORLD_SIZE", 1))
        if launched > 1 and self.world_size == 1:
            raise ValueError(
                f"{launched} processes were launched, but each sees itself alone, and all would train into the same "
                "folder. Without GPUs give --use-cpu true"
            )


class TrainParser(HfArgumentParser):
    """Its errors are one line, as those of the other commands."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Namespace, list[str]]:
        namespace, unknown = super().parse_known_args(args, namespace)
        if unknown:
            near = self.closest_option(unknown[0].partition("=")[0])
            self.error(f"unrecognized argument {unknown[0]}{f' (did you mean {near}?)' if near else ''}")
        return namespace, unknown

    def closest_option(self, name: str) -> str | None:
        """The option that contains `name` (this package's before others, short before long), or that looks like it."""
        name, own = name.replace("_", "-"), {f"--{key.replace('_', '-')}" for key in TrainArguments.__annotations__}
        options = [option for option in self._option_string_actions if "_" not in option]
        options.sort(key=lambda option: (option not in own, len(option)))
        containing = [option for option in options if len(name) > 5 and name.lstrip("-") in option]
        return next(iter(containing or difflib.get_close_matches(name, options, n=1)), None)

    def error(self, message: str) -> NoReturn:
        message = " ".join(message.split()).rstrip(".")
        self.exit(2, f"error: {message}. See {self.prog} --help.\n")
