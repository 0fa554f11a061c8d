"""The baseline of an evaluation: the same questions about other images."""

import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

from torch.utils.data import Dataset

from .data import images_of


class ShuffledImages(Dataset):
    """Rows with the images of others: permuted so that no row keeps one of its own, as far as that is possible.

    Args:
        rows: Items of [`MiniMindVDataset`].
        keys: Of each row, what tells its images from others, in reading order.
        seed: Of the permutation.

    Raises:
        ValueError: There are no two images that differ.
    """

    def __init__(self, rows: Dataset, keys: Sequence[Sequence[str]], seed: int = 0) -> None:
        self.rows = rows
        if len({key for row in keys for key in row}) < 2:
            raise ValueError("There are no two different pictures to exchange. Leave out --shuffle-images.")
        # Blocks of places with an image of the same row, in random order: moved on by the longest block, all leave it.
        first: dict[str, int] = {}
        blocks = {(i, place): first.setdefault(key, i) for i, row in enumerate(keys) for place, key in enumerate(row)}
        order = random.Random(seed).sample(range(len(keys)), len(keys))
        places = sorted(blocks, key=lambda place: order[blocks[place]])
        step = max(Counter(blocks.values()).values())
        self.sources = {place: places[(i + step) % len(places)] for i, place in enumerate(places)}

    def __len__(self) -> int:
        return len(self.rows)  # pyright: ignore[reportArgumentType]

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = self.rows[index]
        places = ((index, place) for place in range(len(images_of(item["messages"]))))
        sources = (self.sources[place] for place in places)
        images = iter([images_of(self.rows[row]["messages"])[place] for row, place in sources])
        for message in item["messages"]:
            for part in message["content"] if not isinstance(message["content"], str) else ():
                if part["type"] == "image":
                    part["image"] = next(images)
        return item
