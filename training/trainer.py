"""transformers' Trainer with what the library's own leaves out or does otherwise."""

import functools
import shutil
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from transformers import Trainer

from ..processing_minimind_v import MiniMindVProcessor
from .arguments import TrainArguments
from .collator import IGNORE_INDEX
from .data import Rows
from .output_folder import list_checkpoints


class MiniMindVTrainer(Trainer):
    """transformers' Trainer for this model.

    - It logs the router loss of a mixture of experts, which `loss` contains, also by itself.
    - Labels are smoothed inside the model, where the router loss is added; the library does it outside, without that.
    - A step without a token to train on has the loss 0, not 0 / 0.
    - Old checkpoints are deleted in the order of their steps, not of their times: a clock may be set back.
    """

    # What it is given, of all that the library's may be
    args: TrainArguments
    model: torch.nn.Module
    train_dataset: Rows
    processing_class: MiniMindVProcessor

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.router_losses: list[torch.Tensor] = []
        model: Any = self.accelerator.unwrap_model(self.model)
        model = model.get_base_model() if hasattr(model, "get_base_model") else model  # PEFT's stands around it
        model._keys_to_ignore_on_save = list(model.all_tied_weights_keys)  # else resuming misses them, and says so
        if self.label_smoother is not None:
            self.label_smoother = None
            model.loss_function = functools.partial(smoothed_loss, epsilon=self.args.label_smoothing_factor)

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> Any:
        if num_items_in_batch is not None:
            num_items_in_batch = num_items_in_batch.clamp(min=1)
        result: Any = super().compute_loss(model, inputs, True, num_items_in_batch)
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

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(*args, **kwargs)
        finally:
            self.args.save_total_limit = limit
        if self.args.should_save and limit:
            # One of a later step was left by an interrupted training, perhaps half written.
            saved = [path for step, path in list_checkpoints(self.args.output_dir) if step <= self.state.global_step]
            best = self.state.best_model_checkpoint
            removable = [path for path in saved[:-1] if best is None or path != Path(best)]
            for path in removable[: max(0, len(saved) - limit)]:
                shutil.rmtree(path, ignore_errors=True)


def smoothed_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    vocab_size: int,
    num_items_in_batch: torch.Tensor | None = None,
    *,
    epsilon: float,
    **kwargs: Any,
) -> torch.Tensor:
    """The library's loss of a causal language model, with labels of which `epsilon` is spread over the vocabulary."""
    logits, labels = logits[:, :-1].float().reshape(-1, vocab_size), labels[:, 1:].flatten().to(logits.device)
    options: dict[str, Any] = {"ignore_index": IGNORE_INDEX, "label_smoothing": epsilon}
    if num_items_in_batch is None:
        return F.cross_entropy(logits, labels, **options)
    return F.cross_entropy(logits, labels, reduction="sum", **options) / num_items_in_batch
