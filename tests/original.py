"""Reads the recorded checkpoints of the original project: a small key map, and configurations from its arguments."""

import json
import math
import re
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoConfig

from minimind_v import MiniMindVConfig, MiniMindVForConditionalGeneration

GOLDEN = Path(__file__).resolve().parents[2] / "shared" / "golden"
CASES = ["g1_dense", "g1_moe", "g2_dense", "g2_moe", "g3v_dense", "g3v_moe"]

G1_NAMES = {
    r"^tok_embeddings\.": "model.language_model.embed_tokens.",
    r"^output\.": "lm_head.",
    r"^norm\.": "model.language_model.norm.",
    r"^layers\.(\d+)\.attention_norm\.": r"model.language_model.layers.\1.input_layernorm.",
    r"^layers\.(\d+)\.ffn_norm\.": r"model.language_model.layers.\1.post_attention_layernorm.",
    r"^layers\.(\d+)\.attention\.w([qkvo])\.": r"model.language_model.layers.\1.self_attn.\2_proj.",
    r"^layers\.(\d+)\.feed_forward\.": r"model.language_model.layers.\1.mlp.",
    r"\.w1\.": ".gate_proj.",
    r"\.w2\.": ".down_proj.",
    r"\.w3\.": ".up_proj.",
}
NAMES = {
    r"^model\.(embed_tokens|layers|norm)": r"model.language_model.\1",
    r"^vision_encoder\.vision_model\.": "model.vision_tower.",
    r"^vision_proj\.vision_proj\.0\.": "model.multi_modal_projector.linear.",
    r"^vision_proj\.mlp\.0\.": "model.multi_modal_projector.norm.",
    r"^vision_proj\.mlp\.1\.": "model.multi_modal_projector.linear_1.",
    r"^vision_proj\.mlp\.3\.": "model.multi_modal_projector.linear_2.",
}


def read_json(path):
    return json.loads((GOLDEN / path).read_text(encoding="utf-8"))


def text_arguments(args, generation):
    """Arguments of `MiniMindConfig` from those of the original's constructor."""
    if generation == "G1":
        width = args["hidden_dim"]
        if width is None:
            width = args["multiple_of"] * math.ceil(int(2 * (4 * args["dim"]) / 3) / args["multiple_of"])
        out = {
            "hidden_size": args["dim"],
            "num_hidden_layers": args["n_layers"],
            "num_attention_heads": args["n_heads"],
            "num_key_value_heads": args["n_kv_heads"],
            "intermediate_size": width,
            "rms_norm_eps": args["norm_eps"],
            "max_position_embeddings": 32768,
        }
    else:
        width = args["intermediate_size"]
        if width is None:
            raw = math.pi * args["hidden_size"] if generation == "G4" else int(args["hidden_size"] * 8 / 3)
            width = 64 * math.ceil(raw / 64)
        same = ["hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "rms_norm_eps"]
        out = {key: args[key] for key in [*same, "max_position_embeddings"]} | {"intermediate_size": width}
    out |= {"vocab_size": args["vocab_size"], "use_moe": args["use_moe"], "use_qk_norm": generation == "G4"}
    out["num_experts_per_tok"], out["norm_topk_prob"] = args["num_experts_per_tok"], args["norm_topk_prob"]
    out["rope_parameters"] = {"rope_type": "default", "rope_theta": args["rope_theta"]}
    if args.get("inference_rope_scaling") and args["max_position_embeddings"] > 2048:
        out["rope_parameters"] |= {
            "rope_type": "yarn",
            "factor": 16.0,
            "original_max_position_embeddings": 2048,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "attention_factor": 1.0,
        }
    if generation == "G4":
        out |= {"num_experts": args["num_experts"], "router_aux_loss_coef": args["router_aux_loss_coef"]}
        out |= {"moe_intermediate_size": args["moe_intermediate_size"], "head_dim": args["head_dim"]}
        out["tie_word_embeddings"] = args["tie_word_embeddings"]
    else:
        out |= {"num_experts": args["n_routed_experts"], "router_aux_loss_coef": args["aux_loss_alpha"]}
        out["num_shared_experts"] = int(args["n_shared_experts"]) if args["use_moe"] else 0
        out["router_aux_loss_type"] = "sequence" if args["seq_aux"] else "batch"
        out["norm_topk_prob"] = args["norm_topk_prob"] and args["num_experts_per_tok"] > 1
    return out


def rotate_half_rows(weight, head_dim):
    """G1 rotates adjacent pairs: inside each head, even rows first, then odd ones."""
    heads = weight.view(-1, head_dim // 2, 2, weight.shape[1])
    return heads.transpose(1, 2).reshape(weight.shape)


def rename(key, is_g1):
    """Name of one original tensor here; experts are still one by one."""
    for pattern, new in ((G1_NAMES if is_g1 else {}) | NAMES).items():
        key = re.sub(pattern, new, key)
    return key


def convert_keys(state, config):
    """Original state dict -> state dict of `MiniMindVForConditionalGeneration`."""
    is_g1, out = "tok_embeddings.weight" in state, {}
    for key, value in state.items():
        if re.match(r"vision_encoder\.(text_model|.*projection|logit_scale|.*position_ids)", key):
            continue
        if is_g1 and re.search(r"attention\.w[qk]\.", key):
            value = rotate_half_rows(value, config.text_config.head_dim)
        out[rename(key, is_g1)] = value
    for prefix in sorted({key.partition("experts.")[0] for key in out if ".mlp.experts." in key}):
        experts = range(config.text_config.num_experts)
        gate, up, down = (
            torch.stack([out.pop(f"{prefix}experts.{i}.{name}_proj.weight") for i in experts])
            for name in ("gate", "up", "down")
        )
        out[prefix + "experts.gate_up_proj"] = torch.cat([gate, up], dim=1)
        out[prefix + "experts.down_proj"] = down
        shared = sorted(key for key in out if re.match(re.escape(prefix) + r"shared_experts\.\d", key))
        for name, dim in (("gate", 0), ("up", 0), ("down", 1)):
            if parts := [out.pop(key) for key in shared if f".{name}_proj." in key]:
                out[f"{prefix}shared_experts.{name}_proj.weight"] = torch.cat(parts, dim=dim)
    return out


def find_gradient(model, original_name):
    """Gradient of the tensor that the original calls so. (The row order of G1's q and k is not undone.)"""
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    name = rename(original_name, original_name.startswith(("tok_embeddings", "layers.", "norm.", "output.")))
    width = model.config.text_config.moe_intermediate_size
    part = re.fullmatch(r"(.*\.)(experts|shared_experts)\.(\d+)\.(gate|up|down)_proj\.weight", name)
    if part is None:
        return gradients[name]
    prefix, kind, index, matrix = part[1], part[2], int(part[3]), part[4]
    if kind == "shared_experts":
        rows = slice(index * width, (index + 1) * width)
        gradient = gradients[f"{prefix}shared_experts.{matrix}_proj.weight"]
        return gradient[:, rows] if matrix == "down" else gradient[rows]
    if matrix == "down":
        return gradients[f"{prefix}experts.down_proj"][index]
    return gradients[f"{prefix}experts.gate_up_proj"][index].chunk(2)[matrix == "up"]


def load_case(case, weights=None, **changes):
    """Model of a recorded case in float32, in eval mode. `changes` are original constructor arguments."""
    hparams = read_json(f"{case}/hparams.json")
    generation, weights = hparams["generation_id"], weights or hparams.get("weights_from", f"{case}/upstream.pth")
    folder = GOLDEN / Path(weights).parent / "vision_encoder"
    tower = AutoConfig.from_pretrained(folder)
    args = hparams["constructor_args"] | changes
    config = MiniMindVConfig(
        text_config=text_arguments(args, generation),
        vision_config=getattr(tower, "vision_config", tower),
        image_token_id=hparams["image_token_id"],
        projector_type="mlp" if generation == "G4" else "linear",
    )
    state = torch.load(GOLDEN / weights, weights_only=True)
    if generation == "G4":
        tower = load_file(folder / "model.safetensors")
        state |= {f"vision_encoder.{key}": value for key, value in tower.items()}
    model = MiniMindVForConditionalGeneration(config)
    model.load_state_dict(convert_keys(state, config), strict=True)
    return model.eval(), hparams
