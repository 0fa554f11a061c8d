"""Fine-tuning with transformers' Trainer: data, collator, stages, and the training command."""

from .collator import MiniMindVDataCollator
from .data import MiniMindVDataset
from .stages import freeze

__all__ = ["MiniMindVDataCollator", "MiniMindVDataset", "freeze"]
