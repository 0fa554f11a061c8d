"""Checkpoints of the original MiniMind-V project -> this package, and back."""

from .convert import convert_checkpoint
from .export import export_text_backbone, export_to_original

__all__ = ["convert_checkpoint", "export_text_backbone", "export_to_original"]
