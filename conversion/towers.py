"""The vision tower of an original checkpoint: from the checkpoint itself, or from a folder or repository."""

import contextlib
import re
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    BaseImageProcessor,
    CLIPImageProcessorPil,
    CLIPVisionModel,
    PreTrainedConfig,
    Siglip2ImageProcessorPil,
    Siglip2VisionModel,
    SiglipImageProcessorPil,
    SiglipVisionModel,
)
from transformers.image_utils import SizeDict

from ..common import load_model, read_model_type
from ..vision_tower_minimind_v import NAFLEX
from .configurations import vision_config
from .key_maps import TOWER

TOWERS = {
    "clip": CLIPVisionModel,
    "clip_vision_model": CLIPVisionModel,
    "siglip": SiglipVisionModel,
    "siglip_vision_model": SiglipVisionModel,
    "siglip2": Siglip2VisionModel,
    "siglip2_vision_model": Siglip2VisionModel,
}


def read_tower(
    state: dict[str, torch.Tensor], vision_encoder: str | Path | None
) -> tuple[PreTrainedConfig, dict[str, torch.Tensor], list[str]]:
    """Configuration and tensors of the tower.

    Args:
        state: The checkpoint's tensors under this package's names. A tower among them is used.
        vision_encoder: Folder or Hub repository of a CLIP or SigLIP model; its configuration is used, and its tensors
            if the checkpoint has none.

    Returns:
        The configuration, the tensors that `state` lacks, and what was assumed.

    Raises:
        ValueError: There is no tower, or one of another kind.
        WeightsError: Its weights are not whole.
    """
    shapes = {name: tensor.shape for name, tensor in state.items() if name.startswith(TOWER)}
    if vision_encoder is None:
        if not shapes:
            raise ValueError(
                "The checkpoint has no vision tower. Name its folder or repository with --vision-encoder."
            )
        config, assumed = vision_config(shapes)
        return config, {}, assumed
    config = read_tower_config(vision_encoder)
    tensors = {} if shapes else read_tower_tensors(vision_encoder, config)
    if config.model_type != "clip_vision_model":
        config.vision_use_head = False  # the decoder reads the patches
    return config, tensors, []


def read_tower_config(vision_encoder: str | Path) -> PreTrainedConfig:
    """Configuration of a CLIP or SigLIP model's tower.

    Raises:
        ValueError: It is of another kind.
    """
    kind = read_model_type(vision_encoder)
    if kind not in TOWERS:
        raise ValueError(f"{vision_encoder} must be a CLIP or SigLIP model; it is a {kind!r}.")
    config = AutoConfig.from_pretrained(vision_encoder, trust_remote_code=False)
    config.name_or_path = ""  # where it was must not go along into the checkpoint
    return config.vision_config if config.model_type in ("clip", "siglip", "siglip2") else config


def read_tower_tensors(vision_encoder: str | Path, config: PreTrainedConfig) -> dict[str, torch.Tensor]:
    """Tensors of a CLIP or SigLIP model's tower, without SigLIP's pooling head, under this package's names."""
    state = load_model(vision_encoder, TOWERS[config.model_type], is_part=True, config=config).state_dict()
    state = {re.sub(r"^vision_model\.", "", name): tensor for name, tensor in state.items()}
    return {TOWER + name: tensor for name, tensor in state.items() if not name.startswith("head.")}


def make_image_processor(
    config: PreTrainedConfig, vision_encoder: str | Path | None, release: str
) -> BaseImageProcessor:
    """The image processor of `vision_encoder`, or the usual one for a tower of this configuration."""
    processor: Any = None
    if vision_encoder is not None:
        with contextlib.suppress(OSError):
            processor = AutoImageProcessor.from_pretrained(vision_encoder, backend="pil", trust_remote_code=False)
    processor = processor or usual_image_processor(config)
    if release == "minimind1":  # squashes images to squares, where CLIP crops them
        processor.size = SizeDict(height=config.image_size, width=config.image_size)
        processor.do_center_crop = False
    return processor


def usual_image_processor(config: PreTrainedConfig) -> BaseImageProcessor:
    """That of the model family."""
    if config.model_type == NAFLEX:
        return Siglip2ImageProcessorPil(patch_size=config.patch_size, max_num_patches=config.num_patches)
    side = config.image_size
    if config.model_type == "clip_vision_model":
        return CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    half = [0.5, 0.5, 0.5]
    return SiglipImageProcessorPil(size={"height": side, "width": side}, resample=2, image_mean=half, image_std=half)
