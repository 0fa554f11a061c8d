"""Names of tensors: the releases of the original project, and this package.

A table has one line per kind of tensor, original name left, our name right; `*` stands for what both have in common.
Reading and writing use the same table. What a name alone cannot say is written out below it: the row order of q and k
in the first two releases, and the experts, which are one tensor here and one file entry each there.
"""

import re
from collections.abc import Iterable
from typing import Any

import torch

RELEASES = {
    "minimind1": "MiniMind-V-v1 of 2024-10 to 2025-02 (names of minimind2-early, 16 heads; CLIP with CLS)",
    "minimind2-early": "MiniMind2-V of 2025-02 (tok_embeddings, layers.N.attention.wq; CLIP)",
    "minimind2": "MiniMind2-V of 2025-04 to 2025-12 (model.layers.N.self_attn.q_proj; CLIP)",
    "minimind3-naflex": "MiniMind-3V of 2026-04-01 (q/k norm; SigLIP2 NaFlex, mlp projector of four patches, no norm)",
    "minimind3-p16": "MiniMind-3V of 2026-04-19 (q/k norm; SigLIP, mlp projector of 2 x 2 patches)",
    "minimind3": "MiniMind-3V of 2026-04-20 and later (q/k norm; SigLIP, mlp projector)",
}
EARLY_RELEASES = ("minimind1", "minimind2-early")  # one naming, and q and k for pairs that stand side by side
LANGUAGE_MODEL, TOWER, PROJECTOR = "model.language_model.", "model.vision_tower.", "model.multi_modal_projector."
LAYER = LANGUAGE_MODEL + "layers.*."
EARLY = {
    "tok_embeddings.weight": LANGUAGE_MODEL + "embed_tokens.weight",
    "norm.weight": LANGUAGE_MODEL + "norm.weight",
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
    "model.embed_tokens.weight": LANGUAGE_MODEL + "embed_tokens.weight",
    "model.norm.weight": LANGUAGE_MODEL + "norm.weight",
    "lm_head.weight": "lm_head.weight",
    "model.layers.*.weight": LAYER + "weight",
}
VISION = {
    "vision_encoder.vision_model.*": TOWER + "*",
    "vision_proj.vision_proj.0.*": PROJECTOR + "linear.*",
}
MLP = {
    "vision_proj.mlp.0.*": PROJECTOR + "norm.*",
    "vision_proj.mlp.1.*": PROJECTOR + "linear_1.*",
    "vision_proj.mlp.3.*": PROJECTOR + "linear_2.*",
}
MLP_WITHOUT_NORM = {
    "vision_proj.mlp.0.*": PROJECTOR + "linear_1.*",
    "vision_proj.mlp.2.*": PROJECTOR + "linear_2.*",
}
# Read and dropped, with the reason that the summary gives.
IGNORED = {
    r"vision_encoder\.(text_model\..*|text_projection\..*|visual_projection\..*|logit_scale)": "CLIP's text half",
    r"vision_encoder\.vision_model\.head\..*": "SigLIP's pooling head",
    r"vision_encoder\..*position_ids": "positions that old transformers versions saved",
    r".*mask.*": "masks, which the original drops as well",
}
EXPERT = re.compile(r"(.*\.mlp\.)experts\.\d+\.gate_proj\.weight")
SHARED_EXPERT = re.compile(r"(.*\.mlp\.)shared_experts\.\d+\.gate_proj\.weight")  # the early releases have only one
QUERY_OR_KEY = re.compile(re.escape(LANGUAGE_MODEL) + r".*self_attn\.[qk]_proj\.weight")
PARTS = ("gate", "up", "down")


def detect_release(
    shapes: dict[str, torch.Size], arguments: dict[str, Any], tower_width: int | None = None
) -> list[str]:
    """The releases that a checkpoint may be of: none, one, or two that nothing tells apart.

    Args:
        shapes: Shapes of the tensors under the original's names.
        arguments: What is known of the original constructor's arguments.
        tower_width: Width of the vision tower, if it is known.
    """
    if "tok_embeddings.weight" in shapes:
        return detect_early_release(shapes, arguments)
    if "model.embed_tokens.weight" not in shapes:
        return []
    if "vision_proj.mlp.2.weight" in shapes:
        return ["minimind3-naflex"]
    if norm := shapes.get("vision_proj.mlp.0.weight"):
        return detect_merging(norm[0], arguments.get("image_hidden_size") or tower_width)
    return ["minimind3" if any(name.endswith("self_attn.q_norm.weight") for name in shapes) else "minimind2"]


def detect_early_release(shapes: dict[str, torch.Size], arguments: dict[str, Any]) -> list[str]:
    """Which of the two releases with the same names: by their arguments, else by the heads that were released."""
    image = {*(arguments.get("image_special_token") or ()), *(arguments.get("image_ids") or ())}
    if image & {"<", 30}:
        return ["minimind1"]
    if image & {"@", 34} or "rope_theta" in arguments:  # which minimind1 has not
        return ["minimind2-early"]
    signs = {"minimind1"} if "dim" in arguments else set()  # they are all there, and rope_theta is not
    q, k = (shapes.get(f"layers.0.attention.{name}.weight") for name in ("wq", "wk"))
    query_heads_per_key = q[0] // k[0] if q and k and q[0] % k[0] == 0 else 0
    signs |= {2: {"minimind1"}, 4: {"minimind2-early"}}.get(query_heads_per_key, set())
    return list(signs if len(signs) == 1 else EARLY_RELEASES)


def detect_merging(norm_width: int, tower_width: int | None) -> list[str]:
    """Whether the projector merges patches: its norm is then several times as wide as the tower (released: 768)."""
    if tower_width and norm_width % tower_width == 0:
        return ["minimind3" if norm_width == tower_width else "minimind3-p16"]
    return {768: ["minimind3"], 4 * 768: ["minimind3-p16"]}.get(norm_width, ["minimind3-p16", "minimind3"])


def ignored_reason(name: str) -> str | None:
    """Why an original tensor is not converted; None if it is."""
    return next((reason for pattern, reason in IGNORED.items() if re.fullmatch(pattern, name)), None)


def rename(name: str, release: str, to_original: bool = False) -> str | None:
    """Our name of an original tensor (or the other way round); None if there is none."""
    language_model = EARLY if release in EARLY_RELEASES else LATER
    mlp = MLP_WITHOUT_NORM if release == "minimind3-naflex" else MLP
    for original, ours in (language_model | VISION | mlp).items():
        source, target = (ours, original) if to_original else (original, ours)
        if match := re.fullmatch(re.escape(source).replace(r"\*", "(.+?)"), name):
            parts = iter(match.groups())
            return re.sub(r"\*", lambda _: next(parts), target)  # noqa: B023 - used at once
    return None


def rename_all(names: Iterable[str], release: str, to_original: bool = False) -> dict[str, str]:
    """The new name of each tensor that has one, as [`rename`] gives it."""
    return {name: new for name in names if (new := rename(name, release, to_original)) is not None}


def rotate_rows(weight: torch.Tensor, head_dim: int, to_original: bool = False) -> torch.Tensor:
    """Row order of q and k `[heads * head_dim, hidden]`: the early releases rotate adjacent pairs, others halves."""
    pairs = (2, head_dim // 2) if to_original else (head_dim // 2, 2)
    return weight.view(-1, *pairs, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def from_original(state: dict[str, torch.Tensor], release: str, head_dim: int) -> dict[str, torch.Tensor]:
    """State dict of this package's vision-language model.

    Args:
        state: Original tensors; [`rename`] must know every name.
        release: One of [`RELEASES`].
        head_dim: Size of one attention head of the decoder.
    """
    names = rename_all(state, release)
    out = {names[name]: tensor for name, tensor in state.items()}
    if release in EARLY_RELEASES:
        out = {n: rotate_rows(t, head_dim) if QUERY_OR_KEY.fullmatch(n) else t for n, t in out.items()}
    for prefix in sorted({match[1] for match in map(EXPERT.fullmatch, out) if match}):
        experts = pop_experts(out, prefix + "experts.")
        gates_and_ups = [torch.cat([expert["gate"], expert["up"]]) for expert in experts]
        out[prefix + "experts.gate_up_proj"] = torch.stack(gates_and_ups)
        out[prefix + "experts.down_proj"] = torch.stack([expert["down"] for expert in experts])
    for prefix in sorted({match[1] for match in map(SHARED_EXPERT.fullmatch, out) if match}):
        experts = pop_experts(out, prefix + "shared_experts.")
        for part in PARTS:  # several are one of their joint width, which computes their sum
            joint = torch.cat([expert[part] for expert in experts], dim=shared_dimension(part))
            out[f"{prefix}shared_experts.{part}_proj.weight"] = joint
    return out


def pop_experts(state: dict[str, torch.Tensor], prefix: str) -> list[dict[str, torch.Tensor]]:
    """Takes the numbered experts out of the state dict; each as its three matrices under the names of [`PARTS`]."""
    experts = []
    while f"{prefix}{len(experts)}.gate_proj.weight" in state:
        experts.append({part: state.pop(f"{prefix}{len(experts)}.{part}_proj.weight") for part in PARTS})
    return experts


def shared_dimension(part: str) -> int:
    """Dimension of a matrix along which shared experts are joined."""
    return 1 if part == "down" else 0


def to_original(
    state: dict[str, torch.Tensor], release: str, head_dim: int, num_shared_experts: int
) -> dict[str, torch.Tensor]:
    """The inverse of [`from_original`]; `num_shared_experts` is the number that one joint matrix holds."""
    split: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        prefix, _, matrix = name.rpartition("experts.")
        if name.endswith(".mlp.experts.gate_up_proj"):
            for i, expert in enumerate(tensor):
                gate, up = expert.chunk(2)
                split |= {f"{prefix}experts.{i}.gate_proj.weight": gate, f"{prefix}experts.{i}.up_proj.weight": up}
        elif name.endswith(".mlp.experts.down_proj"):
            split |= {f"{prefix}experts.{i}.down_proj.weight": expert for i, expert in enumerate(tensor)}
        elif ".mlp.shared_experts." in name and release not in EARLY_RELEASES:
            chunks = tensor.chunk(num_shared_experts, dim=shared_dimension(matrix.partition("_")[0]))
            split |= {f"{prefix}experts.{i}.{matrix}": chunk for i, chunk in enumerate(chunks)}
        else:
            split[name] = tensor
    if release in EARLY_RELEASES:
        split = {n: rotate_rows(t, head_dim, True) if QUERY_OR_KEY.fullmatch(n) else t for n, t in split.items()}
    names = rename_all(split, release, to_original=True)
    return {names[name]: tensor.contiguous() for name, tensor in split.items()}
