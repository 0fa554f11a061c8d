"""Checkpoints of this package -> the original's key names."""

from pathlib import Path

import torch
from transformers import PreTrainedConfig

from ..common import atomic_output
from ..conversion.key_maps import TOWER, to_original
from .reading import read_own_checkpoint
from .summary import Summary


def export_to_original(
    checkpoint: str | Path, output: str | Path, *, include_tower: bool = False, overwrite: bool = False
) -> Summary:
    """Writes a state dict under the names of the release that the checkpoint came from.

    A checkpoint that came from none gets the names of the newest release with its architecture.

    Args:
        checkpoint: Folder of this package.
        output: The `.pth` file to write.
        include_tower: Also write `vision_encoder.*`; the original's own training scripts leave it out.
        overwrite: Replace an existing file.

    Returns:
        What was written.

    Raises:
        FileExistsError: The output exists.
        ValueError: Not a checkpoint of this package.
    """
    state, config = read_own_checkpoint(checkpoint)
    text, output = config.get_text_config(), Path(output)
    release = getattr(text, "original_release", None) or nearest_release(config)
    if not include_tower:
        state = {name: tensor for name, tensor in state.items() if not name.startswith(TOWER)}
    state = to_original(state, release, text.head_dim, text.num_shared_experts)
    with atomic_output(output, overwrite) as file:
        torch.save(state, file)
    dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in state.values()})
    return Summary(
        output, f"state dict of the release {release}", ", ".join(dtypes), "not needed: tensors as they are"
    )


def nearest_release(config: PreTrainedConfig) -> str:
    """The newest release with the architecture of a configuration of this package."""
    if not config.get_text_config().use_qk_norm:
        return "minimind2"
    if not getattr(config, "projector_norm", True):
        return "minimind3-naflex"
    return "minimind3-p16" if getattr(config, "projector_merge_size", 1) > 1 else "minimind3"
