"""Checkpoints of this package -> other programs: the original project, plain models of the library, other runtimes."""

from .gguf import export_gguf
from .onnx import export_onnx, export_web
from .original import export_to_original
from .summary import Summary
from .text import export_text_backbone, library_config
from .verification import AnswersDifferError

__all__ = [
    "AnswersDifferError",
    "Summary",
    "export_gguf",
    "export_onnx",
    "export_text_backbone",
    "export_to_original",
    "export_web",
    "library_config",
]
