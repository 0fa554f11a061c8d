"""Checkpoints of this package -> the original's key names, or a plain model of the library."""

from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    PreTrainedConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from ..common import atomic_output
from ..configuration_minimind_v import MiniMindConfig
from ..conversion.convert import LANGUAGE_MODEL, TOWER, read_checkpoint
from ..conversion.key_maps import to_original


def read_ours(checkpoint: str | Path) -> tuple[dict[str, torch.Tensor], PreTrainedConfig]:
    """Tensors under the vision-language model's names, and the configuration."""
    config = AutoConfig.from_pretrained(checkpoint)
    if config.model_type not in ("minimind", "minimind_v"):
        raise ValueError(f"{checkpoint} is not a checkpoint of this package: its model_type is {config.model_type!r}.")
    state, _, _ = read_checkpoint(checkpoint)
    if config.model_type == "minimind":
        state = {k.replace("model.", LANGUAGE_MODEL, 1) if k.startswith("model.") else k: v for k, v in state.items()}
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state[LANGUAGE_MODEL + "embed_tokens.weight"]
    return state, config


def export_to_original(
    checkpoint: str | Path, output: str | Path, *, include_tower: bool = False, overwrite: bool = False
) -> Path:
    """Writes a state dict under the names of the generation that the checkpoint came from.

    Args:
        checkpoint: Folder of this package.
        output: The `.pth` file to write.
        include_tower: Also write `vision_encoder.*`; the original's own training scripts leave it out.
        overwrite: Replace an existing file.

    Returns:
        The output file.

    Raises:
        FileExistsError: The output exists.
        ValueError: Not a checkpoint of this package.
    """
    state, config = read_ours(checkpoint)
    text, output = config.get_text_config(), Path(output)
    generation = text.to_dict().get("original_generation") or ("minimind3" if text.use_qk_norm else "minimind2")
    if not include_tower:
        state = {name: tensor for name, tensor in state.items() if not name.startswith(TOWER)}
    state = to_original(state, generation, text.head_dim, text.num_shared_experts)
    with atomic_output(output, overwrite) as file:
        torch.save(state, file)
    return output


def library_config(text: MiniMindConfig) -> PreTrainedConfig:
    """Configuration of the library's decoder with the same shapes: Qwen3-MoE, Qwen3, or without q/k norm Llama."""
    config_class = Qwen3MoeConfig if text.use_moe else Qwen3Config if text.use_qk_norm else LlamaConfig
    own = {"model_type", "architectures", "transformers_version", "layer_types"}
    known = {"head_dim", *config_class().to_dict()} - own
    return config_class(**{name: value for name, value in text.to_dict().items() if name in known})


def export_text_backbone(checkpoint: str | Path, output: str | Path, *, overwrite: bool = False) -> Path:
    """Writes the decoder as a plain model of the library, for llama.cpp, MLX and others that know those.

    MiniMind-3 becomes Qwen3 or Qwen3-MoE, dense MiniMind2 becomes Llama; the numbers stay the same.

    Args:
        checkpoint: Folder of this package, with or without a tower.
        output: Folder to write.
        overwrite: Replace an existing folder.

    Returns:
        The output folder.

    Raises:
        FileExistsError: The output exists and is not empty.
        ValueError: Not a checkpoint of this package, or no library model computes the same (experts of MiniMind2).
    """
    state, config = read_ours(checkpoint)
    text, output = config.get_text_config(), Path(output)
    if text.use_moe and (text.num_shared_experts or not text.use_qk_norm):
        raise ValueError(
            "No model of the library computes MiniMind2's experts (shared experts without a gate, no q/k norm). Only "
            "dense MiniMind2 and MiniMind-3 decoders can be exported; use this package for the others."
        )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(library_config(text))
    state = {
        name.replace(LANGUAGE_MODEL, "model."): tensor
        for name, tensor in state.items()
        if name.startswith((LANGUAGE_MODEL, "lm_head."))
    }
    model.load_state_dict(state, strict=True, assign=True)
    model.tie_weights()
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=0)
    with atomic_output(output, overwrite) as folder:
        model.save_pretrained(folder)
        if Path(checkpoint, "tokenizer.json").exists():
            AutoTokenizer.from_pretrained(checkpoint).save_pretrained(folder)
    return output
