"""What is trainable in each stage of the original: the tower never, the projector always, the decoder by stage."""

import warnings
from pathlib import Path
from typing import Any, Literal

import torch

from ..modeling_minimind_v import MiniMindVForConditionalGeneration

# Of the original's scripts for MiniMind-3V. For LoRA, which the original has not, measured with three seeds on
# examples/images (rank 8, 30 steps): of 8 captions, 5e-3 learns 4, 1e-2 5 or 6, 2e-2 7 or 8, 3e-2 6; the rates that
# are usual for large models, up to 2e-3, learn none.
LEARNING_RATES = {"pretrain": 4e-4, "sft": 5e-6, "lora": 2e-2}
# PEFT's own "all-linear" would adapt the tower too. Routed experts are no Linear modules and stay as they are.
LORA_TARGETS = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"


def freeze(
    model: MiniMindVForConditionalGeneration, stage: Literal["pretrain", "sft"], freeze_llm: Literal[0, 1, 2] = 0
) -> list[str]:
    """Sets `requires_grad` for a stage; the tower stays in eval mode, and builds no graph, for good.

    Args:
        model: The model to train.
        stage: `"pretrain"`: only the projector is trainable; `"sft"`: the decoder too.
        freeze_llm: For SFT: all of the decoder is trainable (0), its first and last layer (1), or none of it (2).

    Returns:
        Names of the trainable parameters.
    """
    decoder = model.model.language_model
    model.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(True)
    if stage == "sft" and freeze_llm == 0:
        decoder.requires_grad_(True)
        model.lm_head.requires_grad_(True)
    elif stage == "sft" and freeze_llm == 1:
        decoder.layers[0].requires_grad_(True)
        decoder.layers[-1].requires_grad_(True)
    tower = model.model.vision_tower.eval()
    tower.train = lambda mode=True: tower  # Trainer calls model.train(); the tower stays as it was trained
    # Frozen parameters alone do not do it: PEFT makes the embeddings of every model inside require gradients.
    tower.forward = torch.no_grad()(tower.forward)
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def add_lora(model: MiniMindVForConditionalGeneration, rank: int) -> Any:
    """Low-rank adapters (arXiv:2106.09685) in all linear layers of the decoder; the projector is trainable as a whole.

    Returns:
        PEFT model around `model`.

    Raises:
        ImportError: PEFT is not installed.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ImportError('LoRA needs PEFT: pip install "minimind-v[train]"') from error
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=2 * rank,
        target_modules=LORA_TARGETS,
        modules_to_save=["multi_modal_projector"],
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT asks the model for an attribute that has a new name
        return get_peft_model(model, config)


def merge_lora(model: MiniMindVForConditionalGeneration, adapter: str | Path) -> MiniMindVForConditionalGeneration:
    """The model with the adapter of that folder added to its weights: an ordinary model again."""
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return PeftModel.from_pretrained(model, adapter).merge_and_unload()
