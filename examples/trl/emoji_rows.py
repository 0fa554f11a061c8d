"""The pictures of examples/images as a `datasets` dataset, for the examples beside this file."""

from pathlib import Path
from typing import Any

from datasets import Dataset, Image, List

EXAMPLES = Path(__file__).resolve().parents[1]


def question(text: str = "What is in this picture?") -> dict[str, Any]:
    """A user's turn with one picture."""
    return {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}


def answer(text: str) -> dict[str, Any]:
    """The assistant's turn."""
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def load_rows(columns: Any) -> Dataset:
    """One row per picture: `images`, and what `columns(name)` returns for the picture's name, such as "apple"."""
    paths = sorted((EXAMPLES / "images").glob("*.png"))
    rows = [{"images": [str(path)]} | columns(path.stem) for path in paths]
    return Dataset.from_list(rows).cast_column("images", List(Image()))
