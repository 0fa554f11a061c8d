"""Reading a checkpoint of this package for export."""

from pathlib import Path

import torch
from transformers import AutoConfig, PreTrainedConfig

from ..common import read_model_type
from ..conversion.key_maps import LANGUAGE_MODEL
from ..conversion.reading import read_checkpoint


def read_own_checkpoint(checkpoint: str | Path) -> tuple[dict[str, torch.Tensor], PreTrainedConfig]:
    """Tensors under the vision-language model's names, the output matrix always among them, and the configuration.

    Raises:
        ValueError: Not a checkpoint of this package.
    """
    kind = read_model_type(checkpoint)
    if kind not in ("minimind", "minimind_v"):
        raise ValueError(f"{checkpoint} is not a checkpoint of this package: its model_type is {kind!r}.")
    config = AutoConfig.from_pretrained(checkpoint, trust_remote_code=False)
    state, _, _ = read_checkpoint(checkpoint)
    if config.model_type == "minimind":
        state = {k.replace("model.", LANGUAGE_MODEL, 1) if k.startswith("model.") else k: v for k, v in state.items()}
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state[LANGUAGE_MODEL + "embed_tokens.weight"]
    return state, config
