"""Checkpoints of this package -> their decoder as a plain model of the library."""

from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    PreTrainedConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from ..common import atomic_output, quiet_library
from ..conversion.key_maps import LANGUAGE_MODEL
from .reading import read_own_checkpoint
from .summary import Summary
from .verification import compare_answers, greedy_answer


def library_config(text: PreTrainedConfig) -> PreTrainedConfig:
    """Configuration of the library's decoder with the same shapes: Qwen3-MoE, Qwen3, or without q/k norm Llama."""
    config_class = Qwen3MoeConfig if text.use_moe else Qwen3Config if text.use_qk_norm else LlamaConfig
    own = {"model_type", "architectures", "transformers_version", "layer_types"}
    known = {"head_dim", *config_class().to_dict()} - own
    return config_class(**{name: value for name, value in text.to_dict().items() if name in known})


def export_text_backbone(
    checkpoint: str | Path, output: str | Path, *, overwrite: bool = False, check: bool = True
) -> Summary:
    """Writes the decoder as a plain model of the library, for llama.cpp, MLX and others that know those.

    MiniMind-3 becomes Qwen3 or Qwen3-MoE, dense MiniMind2 becomes Llama; the numbers stay the same.

    Args:
        checkpoint: Folder of this package, with or without a tower.
        output: Folder to write.
        overwrite: Replace an existing folder.
        check: Ask both three questions, and refuse to write what answers differently.

    Returns:
        What was written and checked.

    Raises:
        AnswersDifferError: The output does not answer as the checkpoint.
        FileExistsError: The output exists and is not empty.
        ValueError: Not a checkpoint of this package, or no library model computes the same (experts of MiniMind2).
    """
    state, config = read_own_checkpoint(checkpoint)
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
    image_token = [config.image_token_id] if config.model_type == "minimind_v" else None
    model.generation_config = GenerationConfig(
        bos_token_id=1, eos_token_id=2, pad_token_id=0, suppress_tokens=image_token
    )
    with atomic_output(output, overwrite) as folder:
        with quiet_library():
            model.save_pretrained(folder)
        checked = "no: the checkpoint has no tokenizer to ask with"
        if Path(checkpoint, "tokenizer.json").exists():
            AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=False).save_pretrained(folder)
            checked = check_text(checkpoint, folder) if check else "no, as asked for"
    form = f"{type(model).__name__} of transformers, without tower and projector"
    return Summary(output, form, str(model.dtype).removeprefix("torch."), checked)


def check_text(checkpoint: str | Path, folder: Path) -> str:
    """Asks both without images, in float32."""
    with quiet_library():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return compare_answers(
        checkpoint, lambda question: greedy_answer(model, question.inputs), is_exact=True, with_images=False
    )
