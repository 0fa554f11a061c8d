"""The configuration of an original checkpoint: sizes from its tensors, the rest from its arguments or its release."""

import difflib
import math
import re
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPVisionConfig, PreTrainedConfig, Siglip2VisionConfig, SiglipVisionConfig

from ..common import read_json
from ..configuration_minimind_v import MiniMindConfig
from .key_maps import LANGUAGE_MODEL, TOWER

# What tensors cannot tell, as the original released it, under the names of our configuration.
RELEASED = {"rope_theta": 1e6, "max_position_embeddings": 32768, "hidden_act": "silu"}
RELEASED_MINIMIND1 = {"rope_theta": 1e4, "max_position_embeddings": 1024, "num_attention_heads": 16}
RELEASED_MINIMIND2 = {"num_attention_heads": 8, "rms_norm_eps": 1e-5}
RELEASED_MINIMIND2_EXPERTS = {
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "router_aux_loss_coef": 0.1,
    "seq_aux": True,
}
RELEASED_MINIMIND3 = {"rms_norm_eps": 1e-6}
RELEASED_MINIMIND3_EXPERTS = {"num_experts_per_tok": 1, "norm_topk_prob": True, "router_aux_loss_coef": 5e-4}
# The original's names for what our configuration calls otherwise.
ARGUMENTS = {
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "hidden_dim": "intermediate_size",
    "norm_eps": "rms_norm_eps",
    "n_routed_experts": "num_experts",
    "aux_loss_alpha": "router_aux_loss_coef",
}
# Its other arguments, which change no number here: fixed by the release, told by the tensors, or for training only.
OTHER_ARGUMENTS = {
    *("bos_token_id", "dropout", "eos_token_id", "flash_attn", "head_dim", "image_hidden_size", "image_ids"),
    *("image_special_token", "image_token_len", "inference_rope_scaling", "intermediate_size", "max_seq_len"),
    *("moe_intermediate_size", "multiple_of", "n_shared_experts", "rope_scaling", "scoring_func", "use_moe"),
    "vocab_size",
}
# What the library writes besides into a config.json
LIBRARY_FIELDS = {"auto_map", "torch_dtype", "use_cache", *PreTrainedConfig().to_dict()} - {"_name_or_path"}
YARN = {  # fixed in the original, whatever else its config says; on with inference_rope_scaling
    "rope_type": "yarn",
    "factor": 16.0,
    "original_max_position_embeddings": 2048,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "attention_factor": 1.0,
}
LAYER = LANGUAGE_MODEL + "layers.0."


def read_arguments(source: dict[str, Any] | str | Path) -> dict[str, Any]:
    """The original constructor's arguments, from a dict or JSON file of them.

    Raises:
        ValueError: One of them is not known, or none is there; the message suggests the nearest.
    """
    arguments = source if isinstance(source, dict) else read_json(source)
    name_of_source = "original_config" if isinstance(source, dict) else source
    released = RELEASED | RELEASED_MINIMIND2 | RELEASED_MINIMIND2_EXPERTS | RELEASED_MINIMIND3_EXPERTS
    known = {*ARGUMENTS, *ARGUMENTS.values(), *released, *OTHER_ARGUMENTS, "tie_word_embeddings"}
    if not isinstance(arguments, dict) or not known & arguments.keys():
        example = '{"num_attention_heads": 8, "rope_theta": 1e6}'
        raise ValueError(
            f"{name_of_source} holds no argument of the original's constructor. Give them as in {example}."
        )
    for name in arguments.keys() - known - LIBRARY_FIELDS:
        near = difflib.get_close_matches(name, known, n=1)
        advice = f"Did you mean {near[0]}?" if near else "Leave it out."
        raise ValueError(
            f"{name_of_source} holds {name}, which is no argument of the original's constructor. {advice}"
        )
    return arguments


def text_config(
    shapes: dict[str, torch.Size], release: str, arguments: dict[str, Any]
) -> tuple[MiniMindConfig, list[str]]:
    """Configuration of the decoder.

    Args:
        shapes: Shapes of the tensors under this package's names, experts one by one.
        release: One of [`key_maps.RELEASES`].
        arguments: What is known of the original constructor's arguments, under its own names.

    Returns:
        The configuration, and what was assumed: "name = value" for each released default that was taken.

    Raises:
        KeyError: A tensor that tells a size is missing; the key is its name.
        ValueError: The arguments contradict the tensors.
    """
    is_minimind3, is_moe = release.startswith("minimind3"), LAYER + "mlp.gate.weight" in shapes
    given = {ARGUMENTS.get(name, name): value for name, value in arguments.items() if value is not None}
    if release == "minimind2-early":
        given["max_position_embeddings"] = 32768  # the length of its table, whatever max_seq_len says
    if release == "minimind1":
        given |= {"router_aux_loss_coef": 0.0}  # it computed this loss, but trained without
        given |= {"max_position_embeddings": given["max_seq_len"]} if "max_seq_len" in given else {}
    released = RELEASED | (RELEASED_MINIMIND3 if is_minimind3 else RELEASED_MINIMIND2)
    released |= RELEASED_MINIMIND1 if release == "minimind1" else {}
    if is_moe:
        released |= RELEASED_MINIMIND3_EXPERTS if is_minimind3 else RELEASED_MINIMIND2_EXPERTS
    assumed = [f"{name} = {value}" for name, value in released.items() if name not in given]
    values: dict[str, Any] = {**released, **given}

    sizes = decoder_sizes(shapes, None if is_minimind3 else values["num_attention_heads"])
    if is_moe:
        sizes |= expert_sizes(shapes)
        if not is_minimind3:  # which calls the width of an expert so
            sizes["intermediate_size"] = sizes["moe_intermediate_size"]
    for name, value in sizes.items():
        if given.get(name, value) != value:
            raise ValueError(f"The configuration says {name} = {given[name]}, but the tensors say {value}.")

    fields: dict[str, Any] = {name: values[name] for name in ("rms_norm_eps", "max_position_embeddings", "hidden_act")}
    fields |= {"use_qk_norm": is_minimind3, "tie_word_embeddings": values.get("tie_word_embeddings", True)}
    fields |= {"rope_parameters": rope_parameters(values), "intermediate_size": values.get("intermediate_size")}
    if is_moe:
        fields |= router_fields(values, is_minimind3)
    fields |= {**sizes, "original_release": release}
    return MiniMindConfig(**fields), assumed


def decoder_sizes(shapes: dict[str, torch.Size], heads: int | None) -> dict[str, int]:
    """Sizes that the tensors tell; with q/k norm also the size of a head, else the number of heads must be given."""
    vocab_size, hidden_size = shapes[LANGUAGE_MODEL + "embed_tokens.weight"]
    if heads and hidden_size % (2 * heads):
        raise ValueError(
            f"The tensors, of hidden_size {hidden_size}, do not fit {heads} attention heads, as released. Say how "
            'many there are with --config (original_config), as in {"num_attention_heads": 4}.'
        )
    head_dim = hidden_size // heads if heads else shapes[LAYER + "self_attn.q_norm.weight"][0]
    sizes = {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "num_hidden_layers": count_layers(shapes, LANGUAGE_MODEL + "layers."),
        "num_attention_heads": shapes[LAYER + "self_attn.q_proj.weight"][0] // head_dim,
        "num_key_value_heads": shapes[LAYER + "self_attn.k_proj.weight"][0] // head_dim,
        "head_dim": head_dim,
    }
    if LAYER + "mlp.gate.weight" not in shapes:
        sizes["intermediate_size"] = shapes[LAYER + "mlp.gate_proj.weight"][0]
    return sizes


def expert_sizes(shapes: dict[str, torch.Size]) -> dict[str, int]:
    """Number and width of the experts; one joint shared expert (the early releases) counts as one."""
    shared = re.compile(re.escape(LAYER) + r"mlp\.shared_experts\..*up_proj\.weight")
    return {
        "num_experts": shapes[LAYER + "mlp.gate.weight"][0],
        "num_shared_experts": sum(shared.fullmatch(name) is not None for name in shapes),
        "moe_intermediate_size": shapes[LAYER + "mlp.experts.0.gate_proj.weight"][0],
    }


def router_fields(values: dict[str, Any], is_minimind3: bool) -> dict[str, Any]:
    """Fields of the router, which no tensor tells."""
    fields = {name: values[name] for name in ("num_experts_per_tok", "norm_topk_prob", "router_aux_loss_coef")}
    fields["use_moe"] = True
    if not is_minimind3:
        # MiniMind2 leaves the single probability of top-1 as it is, MiniMind-3 normalises it to 1.
        fields["norm_topk_prob"] = values["norm_topk_prob"] and values["num_experts_per_tok"] > 1
        fields["router_aux_loss_type"] = "sequence" if values["seq_aux"] else "batch"
    return fields


def rope_parameters(values: dict[str, Any]) -> dict[str, Any]:
    """RoPE, or YaRN under the original's condition."""
    parameters = {"rope_type": "default", "rope_theta": float(values["rope_theta"])}
    is_yarn = values.get("inference_rope_scaling") and values["max_position_embeddings"] > 2048
    return parameters | YARN if is_yarn else parameters


def count_layers(shapes: dict[str, torch.Size], prefix: str) -> int:
    return len({name.removeprefix(prefix).partition(".")[0] for name in shapes if name.startswith(prefix)})


def vision_config(shapes: dict[str, torch.Size]) -> tuple[PreTrainedConfig, list[str]]:
    """Configuration of a tower that the checkpoint holds itself, and what was assumed.

    Raises:
        ValueError: Its head size is not the usual 64, so the number of heads cannot be told.
    """
    patches = shapes[TOWER + "embeddings.patch_embedding.weight"]
    hidden_size, is_naflex = patches[0], len(patches) == 2  # whose patches are a linear layer's, not a convolution's
    if hidden_size % 64:
        raise ValueError(
            f"The number of attention heads of the tower (width {hidden_size}) cannot be told from its tensors. Name "
            "its folder with --vision-encoder; the tensors of the checkpoint are still used."
        )
    is_clip = TOWER + "embeddings.class_embedding" in shapes
    positions = shapes[TOWER + "embeddings.position_embedding.weight"][0]
    patch_size = math.isqrt(patches[1] // 3) if is_naflex else patches[2]
    fields: dict[str, Any] = {
        "hidden_size": hidden_size,
        "patch_size": patch_size,
        "num_hidden_layers": count_layers(shapes, TOWER + "encoder.layers."),
        "num_attention_heads": hidden_size // 64,
        "intermediate_size": shapes[TOWER + "encoder.layers.0.mlp.fc1.weight"][0],
    }
    if is_naflex:
        config = Siglip2VisionConfig(**fields, num_patches=positions, vision_use_head=False)
    else:
        fields["image_size"] = math.isqrt(positions) * patch_size  # CLIP's CLS adds one position, not a row
        config = CLIPVisionConfig(**fields) if is_clip else SiglipVisionConfig(**fields, vision_use_head=False)
    return config, [f"tower: {hidden_size // 64} heads, activation {config.hidden_act}"]
