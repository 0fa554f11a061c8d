"""The training command: transformers' Trainer on a MiniMind-V checkpoint and your own pictures."""

import math
import multiprocessing
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from torch.utils.data import Subset, random_split
from transformers import AutoModelForImageTextToText
from transformers.utils import logging

from ..common import load_model, load_processor
from ..downloading_minimind_v import host_names
from ..modeling_minimind_v import MiniMindVForConditionalGeneration
from ..processing_minimind_v import MiniMindVProcessor
from .arguments import TrainArguments, TrainParser
from .callbacks import LogShortTraining, SampleAnswers, StopOnSignal
from .check import describe, inspect_rows
from .collator import MiniMindVDataCollator
from .data import MiniMindVDataset, Rows
from .image_features import ImageFeatureCache, pass_features_through
from .output_folder import check_output_folder, clear_output_folder
from .report import plot_losses, write_model_card
from .stages import add_lora, freeze, merge_lora
from .trainer import MiniMindVTrainer


def usable_rows(dataset: Rows, collator: MiniMindVDataCollator, arguments: TrainArguments) -> Subset:
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
    if not report["good"]:
        raise ValueError(f"None of the {report['rows']} rows can be trained on. See the reasons above.")
    return Subset(dataset, report["good"])


def train(arguments: TrainArguments) -> MiniMindVTrainer:
    """Runs a training stage; `output_dir` then holds the model, its processor and card, metrics and the loss curve.

    Returns:
        The trainer, after training.

    Raises:
        ValueError: A broken row, unless `on_broken` is `"skip"`, or no row could be used.
        FileExistsError: `output_dir` is not empty, see [`check_output_folder`].
        FileNotFoundError: There is no such data, or no checkpoint to go on from.
        SystemExit: Stopped by a signal, after a checkpoint was saved.
    """
    check_output_folder(arguments)
    transformers.set_seed(arguments.seed)
    model: Any = load_model(arguments.model, dtype="float32", trust_remote_code=False)
    hosts = None if arguments.allowed_hosts is None else host_names(arguments.allowed_hosts)
    processor = load_processor(arguments.model, arguments.max_image_pixels, hosts)
    freeze(model, arguments.stage, arguments.freeze_llm)

    dataset = MiniMindVDataset(arguments.data, processor.allowed_hosts)
    held_out = MiniMindVDataset(arguments.eval_data, processor.allowed_hosts) if arguments.eval_data else None
    cache = None
    if arguments.cache_image_features:
        datasets = [dataset] if held_out is None else [dataset, held_out]
        cache = fill_feature_cache(arguments.cache_image_features, model, processor, datasets, arguments)
    collator = MiniMindVDataCollator(
        processor, arguments.max_length, arguments.on_broken, arguments.packing, image_features=cache
    )
    if arguments.dataloader_num_workers:
        collator.dropped = multiprocessing.Manager().dict()
    rows = len(dataset)
    if arguments.check_data:
        dataset = usable_rows(dataset, collator, arguments)
    left_out = rows - len(dataset)
    if arguments.eval_fraction:
        dataset, held_out = hold_out(dataset, arguments)
    if held_out is not None:  # in any case: a loss over other rows each time could not be compared
        held_out = usable_rows(held_out, collator, arguments)

    clear_output_folder(arguments)
    if arguments.lora_rank:
        model = add_lora(model, arguments.lora_rank)
    trainer = MiniMindVTrainer(
        model,
        arguments,
        data_collator=collator,
        train_dataset=dataset,
        eval_dataset=held_out,
        processing_class=processor,
        callbacks=[LogShortTraining()],
    )
    if held_out is not None:
        trainer.add_callback(SampleAnswers(held_out, processor, arguments.num_samples))
    metrics = run(trainer)
    check_finite(trainer, metrics)
    dropped = set(gather_object(list(collator.dropped)))
    if len(dropped) >= len(dataset):
        raise ValueError(f"None of the {len(dataset)} rows could be trained on. See the reasons above.")
    metrics["rows_left_out"] = left_out + len(dropped)
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
    """Trains, from a checkpoint where that is asked for.

    Returns:
        Metrics of the training.

    Raises:
        ValueError: A broken row, unless `on_broken` is `"skip"`.
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
    stop = StopOnSignal()
    trainer.add_callback(stop)
    try:
        result = trainer.train(resume_from_checkpoint=arguments.resume_from_checkpoint)
    except ValueError as error:
        if "in DataLoader worker process" not in str(error):
            raise
        # The worker's traceback as text; what was wrong stands in the end
        raise ValueError(str(error).rpartition("\nValueError: ")[2].strip()) from error
    if stop.received is not None:
        trainer.accelerator.wait_for_everyone()  # the launcher ends all when one exits, and process 0 may still save
        raise SystemExit(
            f"Stopped after step {trainer.state.global_step}; the checkpoint is saved. Go on with the same command "
            "and --resume-from-checkpoint latest."
        )
    return result.metrics


def check_finite(trainer: MiniMindVTrainer, metrics: dict[str, float]) -> None:
    """Raises a ValueError if the training has diverged: nothing can be asked of such weights."""
    weights = (getattr(parameter, "to_local", lambda p=parameter: p)() for parameter in trainer.model.parameters())
    if not math.isfinite(metrics["train_loss"]) or not all(weight.isfinite().all() for weight in weights):
        raise ValueError(
            f"The training has diverged: loss or weights are not finite, so no model was written to "
            f"{trainer.args.output_dir}. Begin anew with a lower --learning-rate than {trainer.args.learning_rate:g}."
        )


def last_evaluation(trainer: MiniMindVTrainer) -> dict[str, float]:
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
            (folder / "adapter" / "README.md").unlink(missing_ok=True)  # PEFT's, an empty form
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
        print(f"The result is in {folder}. Ask it: minimind-v caption PICTURE --model {folder}")
    trainer.accelerator.wait_for_everyone()  # when train() returns, all is written


def main(argv: list[str]) -> None:
    """The command `minimind-v train`.

    Args:
        argv: Everything after `minimind-v train`.

    Raises:
        SystemExit: Help (status 0), a mistyped command line (status 2), or as [`train`].
    """
    logging.disable_progress_bar()  # of loading and saving
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
