"""Checkpoints of this package -> other programs: the original project, and plain models of the library."""

from .original import export_to_original
from .text import export_text_backbone, library_config

__all__ = ["export_text_backbone", "export_to_original", "library_config"]
