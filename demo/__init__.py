"""A page to try models with one's own pictures: chat, compare, and see where the model looks."""

from .app import serve

__all__ = ["serve"]
