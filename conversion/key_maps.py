"""Names of tensors: the three generations of the original project, and this package.

A table has one line per kind of tensor, original name left, our name right; `*` stands for what both have in common.
Reading and writing use the same table. What a name alone cannot say is written out below it: the row order of q and k
in the first release, and the experts, which are one tensor here and one file entry each there.
"""

import re

import torch

GENERATIONS = {
    "minimind2-early": "MiniMind2-V of 2025-02 (tok_embeddings, layers.N.attention.wq; CLIP)",
    "minimind2": "MiniMind2-V of 2025-04 to 2025-12 (model.layers.N.self_attn.q_proj; CLIP)",
    "minimind3": "MiniMind-3V of 2026-04 and later (q/k norm; SigLIP, mlp projector)",
}
LAYER = "model.language_model.layers.*."
EARLY = {
    "tok_embeddings.weight": "model.language_model.embed_tokens.weight",
    "norm.weight": "model.language_model.norm.weight",
    "output.weight": "lm_head.weight",
    "layers.*.attention_norm.weight": LAYER + "input_layernorm.weight",
    "layers.*.ffn_norm.weight": LAYER + "post_attention_layernorm.weight",
    "layers.*.attention.wq.weight": LAYER + "self_attn.q_proj.weight",
    "layers.*.attention.wk.weight": LAYER + "self_attn.k_proj.weight",
    "layers.*.attention.wv.weight": LAYER + "self_attn.v_proj.weight",
    "layers.*.attention.wo.weight": LAYER + "self_attn.o_proj.weight",
    "layers.*.feed_forward.gate.weight": LAYER + "mlp.gate.weight",
    "layers.*.feed_forward.w1.weight": LAYER + "mlp.gate_proj.weight",
    "layers.*.feed_forward.w2.weight": LAYER + "mlp.down_proj.weight",
    "layers.*.feed_forward.w3.weight": LAYER + "mlp.up_proj.weight",
    "layers.*.feed_forward.experts.*.w1.weight": LAYER + "mlp.experts.*.gate_proj.weight",
    "layers.*.feed_forward.experts.*.w2.weight": LAYER + "mlp.experts.*.down_proj.weight",
    "layers.*.feed_forward.experts.*.w3.weight": LAYER + "mlp.experts.*.up_proj.weight",
    "layers.*.feed_forward.shared_experts.w1.weight": LAYER + "mlp.shared_experts.gate_proj.weight",
    "layers.*.feed_forward.shared_experts.w2.weight": LAYER + "mlp.shared_experts.down_proj.weight",
    "layers.*.feed_forward.shared_experts.w3.weight": LAYER + "mlp.shared_experts.up_proj.weight",
}
LATER = {
    "model.embed_tokens.weight": "model.language_model.embed_tokens.weight",
    "model.norm.weight": "model.language_model.norm.weight",
    "lm_head.weight": "lm_head.weight",
    "model.layers.*.weight": LAYER.removesuffix("*.") + "*.weight",
}
VISION = {
    "vision_encoder.vision_model.*": "model.vision_tower.*",
    "vision_proj.vision_proj.0.*": "model.multi_modal_projector.linear.*",
    "vision_proj.mlp.0.*": "model.multi_modal_projector.norm.*",
    "vision_proj.mlp.1.*": "model.multi_modal_projector.linear_1.*",
    "vision_proj.mlp.3.*": "model.multi_modal_projector.linear_2.*",
}
# Read and dropped, with the reason that the summary gives.
IGNORED = {
    r"vision_encoder\.(text_model\..*|text_projection\..*|visual_projection\..*|logit_scale)": "CLIP's text half",
    r"vision_encoder\.vision_model\.head\..*": "SigLIP's pooling head",
    r"vision_encoder\..*position_ids": "positions that old transformers versions saved",
    r".*mask.*": "masks, which the original drops as well",
}
PARTS = ("gate", "up", "down")


def detect_generation(names: list[str]) -> str | None:
    """The generation that uses these tensor names, or None."""
    if "tok_embeddings.weight" in names:
        return "minimind2-early"
    if "model.embed_tokens.weight" not in names:
        return None
    is_minimind3 = any(
        name.endswith("self_attn.q_norm.weight") or name.startswith("vision_proj.mlp.") for name in names
    )
    return "minimind3" if is_minimind3 else "minimind2"


def ignored_reason(name: str) -> str | None:
    return next((reason for pattern, reason in IGNORED.items() if re.fullmatch(pattern, name)), None)


def rename(name: str, generation: str, to_original: bool = False) -> str | None:
    """Our name of an original tensor (or the other way round); None if there is none."""
    for original, ours in ((EARLY if generation == "minimind2-early" else LATER) | VISION).items():
        source, target = (ours, original) if to_original else (original, ours)
        if match := re.fullmatch(re.escape(source).replace(r"\*", "(.+?)"), name):
            parts = iter(match.groups())
            return re.sub(r"\*", lambda _: next(parts), target)  # noqa: B023 - used at once
    return None


def rotate_rows(weight: torch.Tensor, head_dim: int, to_original: bool = False) -> torch.Tensor:
    """Row order of q and k `[heads * head_dim, hidden]`: the first release rotates adjacent pairs, others halves."""
    pairs = (2, head_dim // 2) if to_original else (head_dim // 2, 2)
    return weight.view(-1, *pairs, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def from_original(state: dict[str, torch.Tensor], generation: str, head_dim: int) -> dict[str, torch.Tensor]:
    """State dict of this package from an original one whose names are all known."""
    out = {}
    for name, tensor in state.items():
        if re.search(r"attention\.w[qk]\.", name):
            tensor = rotate_rows(tensor, head_dim)
        out[rename(name, generation)] = tensor
    for prefix in sorted({name.partition("experts.")[0] for name in out if ".mlp.experts." in name}):
        count = sum(name.startswith(prefix + "experts.") for name in out) // 3
        gate, up, down = (
            torch.stack([out.pop(f"{prefix}experts.{i}.{part}_proj.weight") for i in range(count)]) for part in PARTS
        )
        out[prefix + "experts.gate_up_proj"] = torch.cat([gate, up], dim=1)
        out[prefix + "experts.down_proj"] = down
        shared = len([name for name in out if re.fullmatch(re.escape(prefix) + r"shared_experts\.\d+\.up.*", name)])
        for part in PARTS if shared else ():
            tensors = [out.pop(f"{prefix}shared_experts.{i}.{part}_proj.weight") for i in range(shared)]
            out[f"{prefix}shared_experts.{part}_proj.weight"] = torch.cat(tensors, dim=1 if part == "down" else 0)
    return out


def to_original(
    state: dict[str, torch.Tensor], generation: str, head_dim: int, num_shared_experts: int
) -> dict[str, torch.Tensor]:
    """The inverse of [`from_original`]."""
    split = {}
    for name, tensor in state.items():
        prefix = name.partition("experts.")[0]
        if name.endswith(".mlp.experts.gate_up_proj"):
            for i, expert in enumerate(tensor):
                gate, up = expert.chunk(2)
                split |= {f"{prefix}experts.{i}.gate_proj.weight": gate, f"{prefix}experts.{i}.up_proj.weight": up}
        elif name.endswith(".mlp.experts.down_proj"):
            split |= {f"{prefix}experts.{i}.down_proj.weight": expert for i, expert in enumerate(tensor)}
        elif ".mlp.shared_experts." in name and generation != "minimind2-early":
            part = name.rpartition("shared_experts.")[2]
            chunks = tensor.chunk(num_shared_experts, dim=1 if part.startswith("down") else 0)
            split |= {f"{name.removesuffix(part)}{i}.{part}": chunk for i, chunk in enumerate(chunks)}
        else:
            split[name] = tensor
    out = {}
    for name, tensor in split.items():
        if generation == "minimind2-early" and re.fullmatch(r".*language_model.*self_attn\.[qk]_proj\.weight", name):
            tensor = rotate_rows(tensor, head_dim, to_original=True)
        out[rename(name, generation, to_original=True)] = tensor.contiguous()
    return out
