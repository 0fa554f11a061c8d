"""What each training stage of the original moves: the tower never, the projector always, the decoder by stage."""

from typing import Literal

from ..modeling_minimind_v import MiniMindVForConditionalGeneration

# Learning rates of the original's scripts for MiniMind-3V.
LEARNING_RATES = {"pretrain": 4e-4, "sft": 5e-6}


def freeze(
    model: MiniMindVForConditionalGeneration, stage: Literal["pretrain", "sft"], freeze_llm: Literal[0, 1, 2] = 0
) -> list[str]:
    """Sets `requires_grad` for a stage and puts the tower into eval mode for good.

    Args:
        model: The model to train.
        stage: `"pretrain"` moves the projector only; `"sft"` the decoder too.
        freeze_llm: For SFT: 0 moves all of the decoder, 1 its first and last layer, 2 none of it.

    Returns:
        Names of the parameters that will move.
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
    # Trainer calls model.train() before every epoch; the frozen tower stays as it was trained.
    tower = model.model.vision_tower.eval()
    tower.train = lambda mode=True: tower
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]
