"""What a finished training leaves for people: the loss curve and the model card."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from huggingface_hub import ModelCard, ModelCardData
from transformers import SchedulerType

if TYPE_CHECKING:
    from .train import MiniMindVTrainer


def plot_losses(history: list[dict[str, Any]], path: Path) -> None:
    """Draws the training and evaluation loss over the steps, from `trainer.state.log_history`, as a PNG file.

    Nothing is drawn where nothing was logged.
    """
    kinds = {"loss": "training", "eval_loss": "held out", "router_loss": "router (part of training)"}
    curves = {label: {entry["step"]: entry[key] for entry in history if key in entry} for key, label in kinds.items()}
    curves = {label: points for label, points in curves.items() if points}
    if not curves:
        return
    try:
        import matplotlib
    except ImportError:
        print(f'{path.name} is left out: it needs matplotlib (pip install "minimind-v[train]").')
        return
    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for label, points in curves.items():
        axes.plot(list(points), list(points.values()), label=label, marker="o" if len(points) < 20 else None)
    axes.set(xlabel="step", ylabel="loss")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def write_model_card(trainer: "MiniMindVTrainer", metrics: dict[str, float]) -> None:
    """Writes README.md into `output_dir`: Hub metadata, and how this model was trained."""
    arguments, state = trainer.args, trainer.state
    folder = Path(arguments.output_dir)
    base, data = Path(arguments.model), Path(arguments.data)
    rows_per_step = arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
    facts = {
        "base": base.name if base.is_dir() else f"[{arguments.model}](https://huggingface.co/{arguments.model})",
        "stage": arguments.stage + (f", LoRA of rank {arguments.lora_rank}" if arguments.lora_rank else ""),
        "data": f"{data.name}, {len(trainer.train_dataset)} rows",
        "rows per step": rows_per_step,
        "steps": f"{state.global_step} ({state.epoch:.1f} epochs)",
        "learning rate": f"{arguments.learning_rate:g}, {SchedulerType(arguments.lr_scheduler_type).value}",
        "seed": arguments.seed,
        "training loss": f"{metrics['train_loss']:.4f} (mean)",
        "loss on held-out rows": f"{metrics['eval_loss']:.4f}" if "eval_loss" in metrics else None,
        "with": f"transformers {transformers.__version__}, torch {torch.__version__}",
    }
    lines = [f"| {name} | {value} |" for name, value in facts.items() if value is not None]
    curve = "\n![Loss over the steps](loss_curve.png)\n" if (folder / "loss_curve.png").exists() else ""
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        tags=["minimind_v", "vision-language-model"],
        base_model=None if base.is_dir() else arguments.model,
    )
    text = f"# {folder.resolve().name}\n\nA MiniMind-V model, fine-tuned.\n\n## Training\n\n| | |\n|---|---|\n"
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}{chr(10).join(lines)}\n{curve}").save(folder / "README.md")
