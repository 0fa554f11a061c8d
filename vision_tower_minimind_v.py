"""What a vision tower takes and gives, told from configurations: CLIP, SigLIP, or SigLIP2 with NaFlex.

CLIP and SigLIP take images of one size. NaFlex takes an image of any shape as a list of its patches, which has a fixed
length: padding follows the last one.
"""

import copy
import math

from transformers import CONFIG_MAPPING, PreTrainedConfig

NAFLEX = "siglip2_vision_model"


def vision_tower_config(given: dict | PreTrainedConfig | None) -> PreTrainedConfig:
    """Configuration of the tower alone: of a whole CLIP or SigLIP model its vision half, of None that of MiniMind-3V.

    Raises:
        ValueError: Its images are not square.
    """
    if not isinstance(given, PreTrainedConfig):
        released = {"image_size": 256, "patch_size": 32, "vision_use_head": False}
        fields = released if given is None else copy.deepcopy(given)
        given = CONFIG_MAPPING[fields.setdefault("model_type", "siglip_vision_model")](**fields)
    if given.model_type in ("clip", "siglip", "siglip2"):
        given = given.vision_config
    if isinstance(size := getattr(given, "image_size", None), (list, tuple)):
        if size[0] != size[1]:
            raise ValueError(f"The vision tower takes square images only; got image_size {size}.")
        given = copy.deepcopy(given)  # what was passed in stays as it is
        given.image_size = size[0]
    return given


def image_shape(tower: PreTrainedConfig) -> tuple[int, ...]:
    """Shape of one image: `[channels, height, width]`, for NaFlex `[patches, patch_size * patch_size * channels]`."""
    if tower.model_type == NAFLEX:
        return tower.num_patches, tower.patch_size**2 * tower.num_channels
    return tower.num_channels, tower.image_size, tower.image_size


def count_positions(config: PreTrainedConfig) -> int:
    """Features of one image that the projector gets: one of each patch, and CLS where it is kept."""
    tower = config.vision_config
    if tower.model_type == NAFLEX:
        return tower.num_patches
    has_cls = tower.model_type == "clip_vision_model" and config.vision_feature_select_strategy == "full"
    return (tower.image_size // tower.patch_size) ** 2 + has_cls


def count_image_tokens(config: PreTrainedConfig) -> int:
    """Tokens that the projector makes of one image.

    Raises:
        ValueError: It cannot merge the positions of this tower in groups of `projector_merge_size`.
    """
    positions, size = count_positions(config), config.projector_merge_size
    is_possible = size > 0 and positions % size == 0
    if is_possible and config.projector_merge_order == "block":
        grid, block = math.isqrt(positions), math.isqrt(size)
        is_possible = (grid**2, block**2) == (positions, size) and grid % block == 0
        is_possible = is_possible and config.vision_config.model_type != NAFLEX  # whose grid is another in each image
    if not is_possible:
        merge = f"{size} positions ({config.projector_merge_order})"
        raise ValueError(f"projector_merge_size: {merge} cannot be one token; the tower has {positions} positions.")
    return positions // size
