"""The recorded checkpoints of the original project, converted and loaded as a user would."""

import functools
import json
import re
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import interpolate, pad
from transformers import AutoModelForCausalLM

from minimind_v import MiniMindVForConditionalGeneration
from minimind_v.conversion import convert_checkpoint
from minimind_v.conversion.key_maps import rename
from minimind_v.conversion.tokenizers import IMAGE_TOKEN_IDS

# All that was recorded stands beside the repository; a part of it, one case of each kind, is in the repository.
SHARED = Path(__file__).resolve().parents[2] / "shared" / "golden"
GOLDEN = SHARED if SHARED.is_dir() else Path(__file__).parent / "golden"
GOLDEN_IDS = {  # recorded id -> release
    "G0": "minimind1",
    "G1": "minimind2-early",
    "G2": "minimind2",
    "G3i": "minimind3-naflex",
    "G3p": "minimind3-p16",
    "G4": "minimind3",
}
TOKENIZERS = dict.fromkeys(GOLDEN_IDS.values(), "minimind3")
TOKENIZERS |= {"minimind1": "minimind1", "minimind2-early": "minimind2", "minimind2": "minimind2_im"}
CONVERTED = tempfile.TemporaryDirectory(prefix="minimind-v-converted-")  # removed with the process


def recorded(*names: str) -> list[str]:
    """Those of these cases that are here."""
    return [name for name in names if (GOLDEN / name).is_dir()]


CASES = recorded(
    *("g0_dense", "g0_moe", "g1_dense", "g1_moe", "g2_dense", "g2_moe"),
    *("g3i_dense", "g3i_moe", "g3p_dense", "g3v_dense", "g3v_moe"),
)
assert {"g1_dense", "g2_moe", "g3v_dense", "g3v_moe"} <= set(CASES), f"{GOLDEN} is not complete"


def read_json(path: str) -> dict:
    return json.loads((GOLDEN / path).read_text(encoding="utf-8"))


def release_of(hparams: dict) -> str:
    return GOLDEN_IDS[hparams["generation_id"]]


@functools.cache
def convert_case(case: str, **changes: Any) -> Path:
    """Folder of a recorded case, converted once per process. `changes` are original constructor arguments."""
    hparams = read_json(f"{case}/hparams.json")
    weights = GOLDEN / hparams.get("weights_from", f"{case}/upstream.pth")
    summary = convert_checkpoint(
        weights,
        Path(CONVERTED.name, "-".join([case, *(f"{name}-{value}" for name, value in changes.items())])),
        vision_encoder=weights.parent / "vision_encoder",
        tokenizer=GOLDEN / "tokenizers" / TOKENIZERS[release_of(hparams)],
        original_config=hparams["constructor_args"] | changes,
    )
    return summary.output


def load_case(case: str, **changes: Any) -> tuple[MiniMindVForConditionalGeneration, dict]:
    """Model of a recorded case in eval mode, and its recorded hyperparameters."""
    hparams = read_json(f"{case}/hparams.json")
    model = AutoModelForCausalLM.from_pretrained(convert_case(case, **changes)).eval()
    assert model.config.text_config.original_release == release_of(hparams)
    return model, hparams


def placeholder_ids(record: dict) -> list[int]:
    """What the original writes in the place of an image, as recorded with a case."""
    return record.get("image_token_ids") or [record["image_token_id"]] * record["image_token_len"]


def with_image_token(ids: list[int], release: str, placeholder: list[int]) -> list[int]:
    """Recorded ids with our image token where the original writes a whole image."""
    ids, length = list(ids), len(placeholder)
    start = 0
    while start <= len(ids) - length:
        if ids[start : start + length] == placeholder:
            ids[start : start + length] = [IMAGE_TOKEN_IDS[release]] * length
            start += length
        else:
            start += 1
    return ids


def our_input_ids(input_ids: torch.Tensor, hparams: dict) -> torch.Tensor:
    """Recorded input ids `[B, T]` of a case as our model takes them, see [`with_image_token`]."""
    release, placeholder = release_of(hparams), placeholder_ids(hparams)
    return torch.tensor([with_image_token(row, release, placeholder) for row in input_ids.tolist()])


def recorded_images(tensors: dict[str, torch.Tensor], sub_case: str, hparams: dict) -> dict[str, torch.Tensor]:
    """The images of a sub-case, as the model takes them."""
    images = [image for name in ("images_small", "image_2_small") for image in tensors.get(name, ())]
    images = [images[i] for i in tensors[f"{sub_case}.image_index"].flatten()]
    images = [interpolate(image[None], scale_factor=4, mode="nearest")[0] for image in images]
    if "num_patches" not in hparams["vision"]:
        return {"pixel_values": torch.stack(images)}
    count, size = hparams["vision"]["num_patches"], hparams["vision"]["patch_size"]
    shapes = torch.tensor([[side // size for side in image.shape[1:]] for image in images])
    # [3, height, width] -> [patches, size * size * 3], and zeros for the patches that are not there
    patches = [image.unfold(1, size, size).unfold(2, size, size).permute(1, 2, 3, 4, 0) for image in images]
    patches = [patch.reshape(-1, size * size * 3) for patch in patches]
    patches = [pad(patch, (0, 0, 0, count - len(patch))) for patch in patches]
    mask = torch.arange(count) < shapes.prod(1, keepdim=True)
    return {"pixel_values": torch.stack(patches), "pixel_attention_mask": mask.int(), "spatial_shapes": shapes}


def find_gradient(model: MiniMindVForConditionalGeneration, original_name: str) -> torch.Tensor:
    """Gradient of the tensor that the original calls so. (The row order of the early releases' q and k is kept.)"""
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    name = rename(original_name, model.config.text_config.original_release)
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
