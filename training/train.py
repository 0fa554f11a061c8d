"""The training command: transformers' Trainer on a MiniMind-V checkpoint and your own pictures."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn

import torch
import transformers
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from torch.utils.data import Subset, random_split
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    HfArgumentParser,
    Trainer,
    TrainerState,
    TrainingArguments,
)

from ..modeling_minimind_v import MiniMindVForConditionalGeneration
from ..processing_minimind_v import MiniMindVProcessor
from .callbacks import SampleAnswers, StopOnSignal
from .check import describe, inspect_rows
from .collator import MiniMindVDataCollator
from .data import MiniMindVDataset, Rows
from .image_features import ImageFeatureCache, pass_features_through
from .report import plot_losses, write_model_card
from .stages import LEARNING_RATES, add_lora, freeze, merge_lora


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
    check_data: bool = field(default=True, metadata={"help": "Read every row before the first step."})
    on_broken: Literal["error", "skip"] = field(
        default="error", metadata={"help": "Rows that cannot be used: list them and stop, or leave them out."}
    )
    learning_rate: float | None = field(
        default=None, metadata={"help": "Default: the original's, 4e-4 for pretrain and 5e-6 for sft; LoRA: 2e-4."}
    )
    output_dir: str = field(default="minimind-v-output", metadata={"help": "Folder for checkpoints and the result."})
    per_device_train_batch_size: int = field(default=16, metadata={"help": "Rows per step and device."})
    lr_scheduler_type: str = field(default="cosine_with_min_lr", metadata={"help": "The original's: cosine to 10 %%."})
    lr_scheduler_kwargs: dict[str, Any] | str | None = field(default_factory=lambda: {"min_lr_rate": 0.1})
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Must stay off: the collator needs the chat."}
    )
    dataloader_pin_memory: bool = field(
        default_factory=torch.cuda.is_available, metadata={"help": "Default: where there is a GPU."}
    )
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "Not needed: every step uses every parameter, also a batch without pictures."}
    )
    logging_steps: float = field(default=10, metadata={"help": "Steps between two lines of the log."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints to keep."})

    def __post_init__(self) -> None:
        if not self.model or not self.data:
            raise ValueError("Name a checkpoint with --model and training data with --data.")
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
        super().__post_init__()


class MiniMindVTrainer(Trainer):
    """transformers' Trainer; logs the router loss of a mixture of experts, which `loss` contains, also by itself."""

    # What it is given, of all that the library's may be
    args: TrainArguments
    model: torch.nn.Module
    train_dataset: Rows
    processing_class: MiniMindVProcessor

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.router_losses: list[torch.Tensor] = []

    def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any) -> Any:
        result: Any = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        loss, outputs = result
        if model.training and outputs.get("aux_loss") is not None:
            self.router_losses.append(outputs["aux_loss"].detach())
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs and self.router_losses:
            means: Any = self.accelerator.gather(torch.stack(self.router_losses).mean())
            logs["router_loss"] = means.mean().item()
            self.router_losses.clear()
        super().log(logs, *args, **kwargs)


def usable_rows(dataset: MiniMindVDataset, collator: MiniMindVDataCollator, arguments: TrainArguments) -> Subset:
    """The rows that can be trained on, found by encoding all of them once.

    Raises:
        ValueError: There are broken rows and `on_broken` is `"error"`, or there is no usable one.
    """
    first = arguments.process_index == 0
    report = inspect_rows(dataset, collator, arguments.dataloader_num_workers) if first else {}
    report = broadcast_object_list([report])[0]
    for kind, title in (("broken", "broken"), ("too_long", "too long")):
        if found := report[kind]:
            message = f"{len(found)} of {report['rows']} rows are {title}:\n{describe(found)}"
            if kind == "broken" and arguments.on_broken == "error":
                raise ValueError(f"{message}\nMend them, or leave them out with --on-broken skip.")
            if first:
                print(f"{message}\nThey are left out.")
    rejected = report["broken"].keys() | report["too_long"].keys()
    good = [number for number in range(report["rows"]) if number not in rejected]
    if not good:
        raise ValueError(f"None of the {report['rows']} rows can be trained on. See the reasons above.")
    return Subset(dataset, good)


def last_checkpoint(folder: str | Path) -> str | None:
    """The newest complete checkpoint of a run; the library's function also takes one whose writing was cut off."""
    checkpoints = Path(folder).glob("checkpoint-*")
    for path in sorted(checkpoints, key=lambda path: int(path.name.split("-")[1]), reverse=True):
        try:
            TrainerState.load_from_json(str(path / "trainer_state.json"))  # written last
            return str(path)
        except (OSError, ValueError):
            continue
    return None


def train(arguments: TrainArguments) -> MiniMindVTrainer:
    """Runs a training stage; `output_dir` then holds the model, its processor and card, metrics and the loss curve.

    Returns:
        The trainer, after training.

    Raises:
        ValueError: A broken row, unless `on_broken` is `"skip"`.
        SystemExit: Stopped by a signal, after a checkpoint was saved.
    """
    transformers.set_seed(arguments.seed)
    model: Any = AutoModelForImageTextToText.from_pretrained(arguments.model, dtype="float32")
    processor = AutoProcessor.from_pretrained(arguments.model)
    freeze(model, arguments.stage, arguments.freeze_llm)

    dataset = MiniMindVDataset(arguments.data)
    held_out = MiniMindVDataset(arguments.eval_data) if arguments.eval_data else None
    cache = None
    if arguments.cache_image_features:
        datasets = [dataset] if held_out is None else [dataset, held_out]
        cache = fill_feature_cache(arguments.cache_image_features, model, processor, datasets, arguments)
    collator = MiniMindVDataCollator(
        processor, arguments.max_length, arguments.on_broken, arguments.packing, image_features=cache
    )
    rows = len(dataset)
    if arguments.check_data:
        dataset = usable_rows(dataset, collator, arguments)
        held_out = usable_rows(held_out, collator, arguments) if held_out is not None else None
    left_out = rows - len(dataset)
    if arguments.eval_fraction:
        dataset, held_out = hold_out(dataset, arguments)

    if arguments.lora_rank:
        model = add_lora(model, arguments.lora_rank)
    trainer = MiniMindVTrainer(
        model,
        arguments,
        data_collator=collator,
        train_dataset=dataset,
        eval_dataset=held_out,
        processing_class=processor,
        callbacks=[SampleAnswers(held_out, processor, arguments.num_samples)] if held_out is not None else None,
    )
    metrics = run(trainer)
    metrics["rows_left_out"] = left_out + len(collator.dropped)
    if held_out is not None:
        metrics |= last_evaluation(trainer)
    save(trainer, metrics)
    return trainer


def fill_feature_cache(
    folder: str,
    model: MiniMindVForConditionalGeneration,
    processor: MiniMindVProcessor,
    datasets: list[MiniMindVDataset],
    arguments: TrainArguments,
) -> ImageFeatureCache:
    """The cache with the features of all images, of which each process encodes its share; the tower is prepared."""
    dtype = torch.bfloat16 if arguments.bf16 else torch.float16 if arguments.fp16 else torch.float32
    cache = ImageFeatureCache(folder, model, processor, dtype)
    model.model.vision_tower.to(arguments.device)
    for dataset in datasets:
        share = Subset(dataset, range(arguments.process_index, len(dataset), arguments.world_size))
        cache.fill(share, workers=arguments.dataloader_num_workers)
    PartialState().wait_for_everyone()
    cache.refresh()
    pass_features_through(model)
    return cache


def hold_out(dataset: Rows, arguments: TrainArguments) -> tuple[Subset, Subset]:
    """The rows to train on, and a random `eval_fraction` of them to hold out.

    Raises:
        ValueError: No row would be left to train on.
    """
    count = max(1, round(arguments.eval_fraction * len(dataset)))
    if count == len(dataset):
        raise ValueError(f"--eval-fraction {arguments.eval_fraction} of {count} rows leaves none to train on.")
    rng = torch.Generator().manual_seed(arguments.seed if arguments.data_seed is None else arguments.data_seed)
    training, held_out = random_split(dataset, [len(dataset) - count, count], rng)
    return training, held_out


def run(trainer: MiniMindVTrainer) -> dict[str, float]:
    """Trains, from the last checkpoint where that is asked for.

    Returns:
        Metrics of the training.

    Raises:
        SystemExit: Stopped by a signal, after a checkpoint was saved.
    """
    arguments = trainer.args
    if trainer.is_world_process_zero():
        parameters = list(trainer.model.parameters())
        trainable = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
        total = sum(parameter.numel() for parameter in parameters)
        print(
            f"Stage {arguments.stage}: {trainable / 1e6:.2f}M of {total / 1e6:.2f}M parameters are trainable; "
            f"{len(trainer.train_dataset)} rows"
        )
    resume = arguments.resume_from_checkpoint
    if resume in ("True", "true", "latest"):
        resume = last_checkpoint(arguments.output_dir)
        if resume is None:
            print(f"There is no checkpoint in {arguments.output_dir} yet: starting at the beginning.")
    stop = StopOnSignal()
    trainer.add_callback(stop)
    result = trainer.train(resume_from_checkpoint=resume)
    if stop.received is not None:
        trainer.accelerator.wait_for_everyone()  # the launcher ends all when one exits, and process 0 may still save
        raise SystemExit(
            f"Stopped after step {trainer.state.global_step}; the checkpoint is saved. Go on with the same command "
            "and --resume-from-checkpoint latest."
        )
    return result.metrics


def last_evaluation(trainer: Trainer) -> dict[str, float]:
    """Metrics of the held-out rows after the last step, evaluated now if they have not been."""
    evaluations = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    fresh = evaluations and evaluations[-1]["step"] == trainer.state.global_step
    found = evaluations[-1] if fresh else trainer.evaluate()
    return {name: value for name, value in found.items() if name.startswith("eval_")}


def save(trainer: MiniMindVTrainer, metrics: dict[str, float]) -> None:
    """Writes the result of a finished training into its `output_dir`."""
    arguments = trainer.args
    folder = Path(arguments.output_dir)
    if arguments.lora_rank:
        trainer.save_model(str(folder / "adapter"))
        if trainer.is_world_process_zero():
            # From the files, because the weights in memory may be spread over processes.
            base: Any = AutoModelForImageTextToText.from_pretrained(arguments.model, dtype="float32")
            merge_lora(base, folder / "adapter").save_pretrained(folder)
            trainer.processing_class.save_pretrained(folder)
    else:
        trainer.save_model()
    trainer.save_state()
    trainer.save_metrics("all", metrics)
    if trainer.is_world_process_zero():
        plot_losses(trainer.state.log_history, folder / "loss_curve.png")
        write_model_card(trainer, metrics)
    trainer.accelerator.wait_for_everyone()  # when train() returns, all is written


class TrainParser(HfArgumentParser):
    """Its errors are one line, as those of the other commands."""

    def error(self, message: str) -> NoReturn:
        message = " ".join(message.split()).rstrip(".")
        self.exit(2, f"error: {message}. See {self.prog} --help.\n")


def main(argv: list[str]) -> None:
    """The command `minimind-v train`.

    Args:
        argv: Everything after `minimind-v train`.

    Raises:
        SystemExit: Help (status 0), a mistyped command line (status 2), or as [`train`].
    """
    # A dataclass, which no annotation of the library's says
    parser = TrainParser(TrainArguments, prog="minimind-v train")  # pyright: ignore[reportArgumentType]
    try:
        arguments = TrainArguments(**vars(parser.parse_args(argv)))
    except ValueError as error:  # values that do not go together
        parser.error(str(error))
    accelerator = train(arguments).accelerator
    # Without the process group gone before the interpreter, and DDP, which holds it, before the group, torch now and
    # then aborts or waits for ever where a process ends.
    accelerator.free_memory()
    accelerator.end_training()
