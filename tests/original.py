"""The recorded checkpoints of the original project, converted and loaded as a user would."""

import json
import re
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from minimind_v import MiniMindVForConditionalGeneration
from minimind_v.conversion import convert_checkpoint
from minimind_v.conversion.key_maps import rename

GOLDEN = Path(__file__).resolve().parents[2] / "shared" / "golden"
CASES = ["g1_dense", "g1_moe", "g2_dense", "g2_moe", "g3v_dense", "g3v_moe"]
GENERATIONS = {"G1": "minimind2-early", "G2": "minimind2", "G4": "minimind3"}
TOKENIZERS = {"G1": "minimind2", "G2": "minimind2_im", "G4": "minimind3"}


def read_json(path: str) -> dict:
    return json.loads((GOLDEN / path).read_text(encoding="utf-8"))


def load_case(case: str, folder: Path, **changes) -> tuple[MiniMindVForConditionalGeneration, dict]:
    """Model of a recorded case in eval mode, converted into `folder`. `changes` are original constructor arguments."""
    hparams = read_json(f"{case}/hparams.json")
    weights = GOLDEN / hparams.get("weights_from", f"{case}/upstream.pth")
    output = convert_checkpoint(
        weights,
        folder / case,
        vision_encoder=weights.parent / "vision_encoder",
        tokenizer=GOLDEN / "tokenizers" / TOKENIZERS[hparams["generation_id"]],
        original_config=hparams["constructor_args"] | changes,
        overwrite=True,
    )
    model = AutoModelForCausalLM.from_pretrained(output, trust_remote_code=True).eval()
    assert model.config.text_config.original_generation == GENERATIONS[hparams["generation_id"]]
    return model, hparams


def find_gradient(model: MiniMindVForConditionalGeneration, original_name: str) -> torch.Tensor:
    """Gradient of the tensor that the original calls so. (The row order of the first release's q and k is kept.)"""
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    name = rename(original_name, model.config.text_config.original_generation)
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
