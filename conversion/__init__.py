"""Checkpoints of the original MiniMind-V project -> this package."""

from .convert import Summary, convert_checkpoint
from .key_maps import RELEASES
from .once import convert_once

__all__ = ["RELEASES", "Summary", "convert_checkpoint", "convert_once"]
