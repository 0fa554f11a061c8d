"""Checkpoints of this package -> other programs: the original project, and plain models of the library."""

from .export import export_text_backbone, export_to_original

__all__ = ["export_text_backbone", "export_to_original"]
