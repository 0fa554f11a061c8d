"""Random views of drawings: what a tower must see past. All of it in batches of tensors."""

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F
from tqdm import tqdm

IMAGE_SIZE = 64
GREY = torch.tensor([0.3, 0.59, 0.11]).view(1, 3, 1, 1)


def read_rows(file: Path) -> list[dict]:
    """The rows of a file that prepare.py wrote."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def load_images(files: list[Path]) -> torch.Tensor:
    """`[N, 4, 72, 72]` uint8: red, green, blue, alpha."""
    pictures = np.stack([np.asarray(Image.open(file).convert("RGBA")) for file in tqdm(files, desc="pictures")])
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous()


def augment(pictures: torch.Tensor, strength: float = 1.0) -> torch.Tensor:
    """Views of drawings, `[B, 4, 72, 72]` uint8 to `[B, 3, 64, 64]` in [-1, 1].

    Turned, scaled, sheared, shifted, mirrored and bent; on white, black or any colour; with other hues, in grey, or as
    an outline only; blurred, and with a patch missing.

    Args:
        pictures: From [`load_images`].
        strength: 0 puts the drawings on white as they are; 1 is the strongest.
    """
    count = len(pictures)

    def uniform(low: float, high: float, *shape: int) -> torch.Tensor:
        return low + (high - low) * torch.rand(count, *(shape or (1, 1, 1)))

    def chance(share: float) -> torch.Tensor:
        return torch.rand(count, 1, 1, 1) < share * strength

    x = pictures.float() / 255
    x = torch.cat([x[:, :3] * x[:, 3:], x[:, 3:]], dim=1)

    # One resampling: the affine map, and a bend that is smooth over the picture.
    angle, shear = (strength * uniform(-1, 1, 1) * limit for limit in (0.35, 0.2))
    zoom = 1 + strength * uniform(-0.15, 0.45, 1)
    squeeze = 1 + strength * uniform(-0.12, 0.12, 1)
    mirror = torch.where(chance(0.5), -1.0, 1.0).view(-1, 1)
    rows = [mirror * zoom * squeeze * angle.cos(), zoom * (shear - angle.sin()), strength * uniform(-0.15, 0.15, 1)]
    rows += [mirror * zoom * squeeze * angle.sin(), zoom * angle.cos(), strength * uniform(-0.15, 0.15, 1)]
    grid = F.affine_grid(
        torch.cat(rows, dim=1).view(-1, 2, 3), [count, 4, IMAGE_SIZE, IMAGE_SIZE], align_corners=False
    )
    bend = F.interpolate(uniform(-0.12, 0.12, 2, 4, 4), IMAGE_SIZE, mode="bicubic", align_corners=False)
    x = F.grid_sample(x, grid + strength * (bend * chance(0.5)).permute(0, 2, 3, 1), align_corners=False)
    colours, alpha = x[:, :3], x[:, 3:]

    # Other hues: a rotation of the colour space around grey, other brightness and contrast, or grey.
    hue = strength * uniform(-1, 1) * torch.where(chance(0.15), 3.1, 0.25)
    third, root = (1 - hue.cos()) / 3, hue.sin() / 3**0.5
    diagonal = hue.cos() + third
    mixed = sum(
        weight * colours.roll(shift, dims=1) for weight, shift in ((diagonal, 0), (third - root, 1), (third + root, 2))
    )
    grey = (mixed * GREY).sum(dim=1, keepdim=True)
    mixed = torch.where(chance(0.15), grey, mixed + strength * uniform(-0.6, 0.3) * (mixed - grey))
    contrast = 1 + strength * uniform(-0.4, 0.3)
    mixed = alpha * (0.5 + strength * uniform(-0.15, 0.15)) + contrast * (mixed - 0.5 * alpha)

    # Lines only: where brightness or alpha changes. Or a contour around the colours, as many styles have it.
    mixed, bare = mixed.clamp(0, 1), torch.rand(count) < 0.12 * strength
    drawn = bare | (torch.rand(count) < 0.18 * strength)
    plane = torch.cat([grey, alpha], dim=1)[drawn]
    edges = F.max_pool2d(plane, 3, 1, 1) + F.max_pool2d(-plane, 3, 1, 1)
    lines = torch.maximum(2 * edges[:, :1], edges[:, 1:]).clamp(0, 1)
    only, contour = bare[drawn].view(-1, 1, 1, 1), edges[:, 1:]
    mixed[drawn] = torch.where(only, 0.3 * torch.rand(len(lines), 1, 1, 1) * lines, mixed[drawn] * (1 - contour))
    alpha[drawn] = torch.where(only, lines, torch.maximum(alpha[drawn], contour))

    pale = torch.where(bare.view(-1, 1, 1, 1), 0.5, 0.0)
    x = mixed + (1 - alpha) * torch.where(chance(0.55), pale + (1 - pale) * uniform(0, 1, 3, 1, 1), 1.0)
    soft = torch.rand(count) < 0.2 * strength
    x[soft] = F.avg_pool2d(x[soft], 3, 1, 1, count_include_pad=False)
    for i in (torch.rand(count) < 0.25 * strength).nonzero().flatten().tolist():
        top, left, height, width = (torch.rand(4) * torch.tensor([56, 56, 20, 20]) + torch.tensor([0, 0, 8, 8])).int()
        x[i, :, top : top + height, left : left + width] = torch.rand(3, 1, 1)
    return x.clamp(0, 1) * 2 - 1
