"""The configuration of an original checkpoint: sizes from its tensors, the rest from its arguments or its release."""

import math
import re
from typing import Any

import torch
from transformers import CLIPVisionConfig, PreTrainedConfig, SiglipVisionConfig

from ..configuration_minimind_v import MiniMindConfig

# What tensors cannot tell, as the original released it.
RELEASED = {"rope_theta": 1e6, "max_position_embeddings": 32768, "hidden_act": "silu"}
RELEASED_MINIMIND2 = {"num_attention_heads": 8, "rms_norm_eps": 1e-5}
RELEASED_MINIMIND2_EXPERTS = {"num_experts_per_tok": 2, "norm_topk_prob": True, "aux_loss_alpha": 0.1, "seq_aux": True}
RELEASED_MINIMIND3 = {"rms_norm_eps": 1e-6}
RELEASED_MINIMIND3_EXPERTS = {"num_experts_per_tok": 1, "norm_topk_prob": True, "router_aux_loss_coef": 5e-4}
# The first release's names for what the later ones call otherwise.
EARLY_ARGUMENTS = {
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "hidden_dim": "intermediate_size",
    "norm_eps": "rms_norm_eps",
}
YARN = {  # fixed in the original, whatever else its config says; on with inference_rope_scaling
    "rope_type": "yarn",
    "factor": 16.0,
    "original_max_position_embeddings": 2048,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "attention_factor": 1.0,
}
LAYER = "model.language_model.layers.0."


def text_config(
    shapes: dict[str, torch.Size], generation: str, arguments: dict[str, Any]
) -> tuple[MiniMindConfig, list[str]]:
    """Configuration of the decoder.

    Args:
        shapes: Shapes of the tensors under this package's names, experts one by one.
        generation: One of [`key_maps.GENERATIONS`].
        arguments: What is known of the original constructor's arguments, under its own names.

    Returns:
        The configuration, and what was assumed: "name = value" for each released default that was taken.

    Raises:
        ValueError: The arguments contradict the tensors.
    """
    is_minimind3, is_moe = generation == "minimind3", LAYER + "mlp.gate.weight" in shapes
    given = {EARLY_ARGUMENTS.get(name, name): value for name, value in arguments.items() if value is not None}
    if generation == "minimind2-early":
        given["max_position_embeddings"] = 32768  # the length of its table, whatever max_seq_len says
    released = RELEASED | (RELEASED_MINIMIND3 if is_minimind3 else RELEASED_MINIMIND2)
    if is_moe:
        released |= RELEASED_MINIMIND3_EXPERTS if is_minimind3 else RELEASED_MINIMIND2_EXPERTS
    assumed = [f"{name} = {value}" for name, value in released.items() if name not in given]
    values = released | given

    vocab_size, hidden_size = shapes["model.language_model.embed_tokens.weight"]
    if is_minimind3:
        head_dim = shapes[LAYER + "self_attn.q_norm.weight"][0]
        heads = shapes[LAYER + "self_attn.q_proj.weight"][0] // head_dim
    else:
        heads = values["num_attention_heads"]
        head_dim = hidden_size // heads
    width = shapes[LAYER + ("mlp.experts.0.gate_proj.weight" if is_moe else "mlp.gate_proj.weight")][0]
    sizes = {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "num_hidden_layers": 1 + max(int(name.split(".")[3]) for name in shapes if ".layers." in name[:30]),
        "num_attention_heads": heads,
        "num_key_value_heads": shapes[LAYER + "self_attn.k_proj.weight"][0] // head_dim,
        "head_dim": head_dim,
    }
    experts = {}
    if is_moe:
        experts["num_experts" if is_minimind3 else "n_routed_experts"] = shapes[LAYER + "mlp.gate.weight"][0]
    width_name = "moe_intermediate_size" if is_moe and is_minimind3 else "intermediate_size"
    for name, value in (sizes | experts | {width_name: width}).items():
        if name in given and given[name] != value:
            raise ValueError(f"The configuration says {name} = {given[name]}, but the tensors say {value}.")

    fields = {name: values[name] for name in ("rms_norm_eps", "max_position_embeddings", "hidden_act")}
    fields |= sizes | {"use_qk_norm": is_minimind3, "tie_word_embeddings": values.get("tie_word_embeddings", True)}
    fields["intermediate_size"] = values.get("intermediate_size") if is_moe and is_minimind3 else width
    fields["rope_parameters"] = {"rope_type": "default", "rope_theta": float(values["rope_theta"])}
    if values.get("inference_rope_scaling") and values["max_position_embeddings"] > 2048:
        fields["rope_parameters"] |= YARN
    if is_moe:
        shared = {name for name in shapes if re.match(re.escape(LAYER) + r"mlp\.shared_experts\..*up_proj", name)}
        fields |= {
            "use_moe": True,
            "moe_intermediate_size": width,
            "num_experts": shapes[LAYER + "mlp.gate.weight"][0],
        }
        fields |= {"num_shared_experts": len(shared), "num_experts_per_tok": values["num_experts_per_tok"]}
        # MiniMind2 leaves the single probability of top-1 as it is, MiniMind-3 normalises it to 1.
        fields["norm_topk_prob"] = values["norm_topk_prob"] and (is_minimind3 or values["num_experts_per_tok"] > 1)
        if is_minimind3:
            fields["router_aux_loss_coef"] = values["router_aux_loss_coef"]
        else:
            fields["router_aux_loss_coef"] = values["aux_loss_alpha"]
            fields["router_aux_loss_type"] = "sequence" if values["seq_aux"] else "batch"
    return MiniMindConfig(**fields, original_generation=generation), assumed


def vision_config(shapes: dict[str, torch.Size]) -> tuple[PreTrainedConfig, list[str]]:
    """Configuration of a tower that the checkpoint holds itself, and what was assumed.

    Raises:
        ValueError: Its head size is not the usual 64, so the number of heads cannot be told.
    """
    prefix = "model.vision_tower."
    hidden_size, _, patch_size, _ = shapes[prefix + "embeddings.patch_embedding.weight"]
    if hidden_size % 64:
        raise ValueError(
            f"The number of attention heads of the tower (width {hidden_size}) cannot be told from its tensors. Name "
            "its folder with --vision-encoder; the tensors of the checkpoint are still used."
        )
    is_clip = prefix + "embeddings.class_embedding" in shapes
    grid = math.isqrt(shapes[prefix + "embeddings.position_embedding.weight"][0])  # CLIP's CLS adds one, not a row
    layers = 1 + max(int(name.split(".")[4]) for name in shapes if name.startswith(prefix + "encoder.layers."))
    fields = {
        "hidden_size": hidden_size,
        "patch_size": patch_size,
        "image_size": grid * patch_size,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden_size // 64,
        "intermediate_size": shapes[prefix + "encoder.layers.0.mlp.fc1.weight"][0],
    }
    config = CLIPVisionConfig(**fields) if is_clip else SiglipVisionConfig(**fields, vision_use_head=False)
    return config, [f"tower: {hidden_size // 64} heads, activation {config.hidden_act}"]
