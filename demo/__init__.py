"""Pages to try models with one's own pictures: `app` on gradio, `browser` without a server that computes."""

from pathlib import Path

IMAGES = Path(__file__).resolve().parents[1] / "examples" / "images"
EXAMPLES = ("apple", "dog", "pizza", "sunflower")  # what both pages show of them
