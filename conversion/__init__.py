"""Checkpoints of the original MiniMind-V project -> this package."""

from .convert import convert_checkpoint

__all__ = ["convert_checkpoint"]
