"""Rows of chats -> a padded batch with labels on the assistant's turns."""

import functools
import logging
from typing import Any, Literal

import torch
from torch.nn.utils.rnn import pad_sequence

from ..processing_minimind_v import MiniMindVProcessor
from .data import images_of
from .image_features import ImageFeatureCache

IGNORE_INDEX = -100  # label of a token that is not trained on

logger = logging.getLogger(__name__)


class MiniMindVDataCollator:
    """Makes batches for `Trainer` from items of [`MiniMindVDataset`] (or any `{"messages": [...]}`).

    Tokens that the chat template's generation blocks mark (the assistant's answers with their end) are trained on;
    the labels of prompt, image and padding tokens are -100. Rows are padded on the right, to the longest of the batch.

    Args:
        processor: Processor of the model.
        max_length: Rows with more tokens are left out whole, never cut, and counted in `dropped`.
        packing: Put all rows of the batch into one, without padding. `position_ids` that start again keep them from
            attending to each other, by the library's own mechanism; the loss is that of the separate rows.
        image_features: Filled cache of the tower's output, which then stands in `pixel_values`; the model's tower must
            have been prepared by [`pass_features_through`].
        on_broken: What happens to rows with unreadable images or wrong counts: `"error"`, or `"skip"` (left out,
            reported in the log and in `dropped`).

    Returns (when called):
        `input_ids`, `labels` and `attention_mask` (packed: `position_ids`), int64 `[B, T]`, and, if there are
        images, `pixel_values` `[N, 3, height, width]`.

    Raises:
        ValueError: A broken row with `on_broken="error"`, or no row of the batch could be used.
    """

    def __init__(
        self,
        processor: MiniMindVProcessor,
        max_length: int | None = None,
        on_broken: Literal["error", "skip"] = "error",
        packing: bool = False,
        image_features: ImageFeatureCache | None = None,
    ) -> None:
        self.processor = processor
        self.max_length = max_length or processor.tokenizer.model_max_length
        self.on_broken = on_broken
        self.packing = packing
        self.image_features = image_features
        self.dropped: dict[Any, str] = {}

    def encode(self, messages: list[dict[str, Any]]) -> dict[str, Any]:
        """One chat: lists `input_ids` and `labels`, and `pixel_values` if it has images.

        Raises:
            ValueError: An unreadable image, a control token in a text, or an image that `image_features` has not.
        """
        processor = self.processor
        processor.check_chat(messages)
        # The tokenizer alone: the processor gives the same ids, but would open images whose features are at hand.
        encoded = processor.tokenizer.apply_chat_template(
            messages,
            chat_template=processor.chat_template,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        ids, labels = [], []
        for token, is_answer in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True):
            repeats = processor.image_seq_length if token == processor.image_token_id else 1
            ids += [token] * repeats
            labels += [token if is_answer else IGNORE_INDEX] * repeats
        row = {"input_ids": ids, "labels": labels}
        if images := images_of(messages):
            row["pixel_values"] = self.encode_images(images)
        return row

    def encode_images(self, images: list[Any]) -> torch.Tensor:
        """`[N, 3, height, width]`, or the tower's features `[N, positions, width]` where a cache has them."""
        cached = [self.image_features.get(image) if self.image_features else None for image in images]
        features = [feature for feature in cached if feature is not None]
        if len(features) == len(images):
            return torch.stack(features)
        samples: list[Any] = [images]
        pixel_values = self.processor(images=samples, return_tensors="pt")["pixel_values"]
        if self.image_features:
            raise ValueError("a picture is not among the cached image features")
        return pixel_values

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        rows = []
        for item in items:
            number, reason = item.get("row"), None
            try:
                row = self.encode(item["messages"])
                if len(row["input_ids"]) > self.max_length:
                    reason = f"{len(row['input_ids'])} tokens are more than max_length ({self.max_length})"
            except (OSError, ValueError, TypeError) as error:
                reason = str(error)
                if self.on_broken == "error":
                    raise ValueError(f"Row {number}: {reason}") from error
            if reason is None:
                rows.append(row)
            elif number is None or number not in self.dropped:
                self.dropped[number] = reason
                logger.warning("Row %s is left out: %s", number, reason)
        if not rows:
            raise ValueError(
                f"No row of this batch can be used: {list(self.dropped.items())[-len(items) :]}. Remove such rows "
                "(`minimind-v check` lists them) or raise max_length."
            )
        ids, labels = ([torch.tensor(row[key]) for row in rows] for key in ("input_ids", "labels"))
        if self.packing:
            positions = [torch.arange(len(row)) for row in ids]
            batch = {"input_ids": torch.cat(ids), "labels": torch.cat(labels), "position_ids": torch.cat(positions)}
            batch = {key: value[None] for key, value in batch.items()}
        else:
            pad = functools.partial(pad_sequence, batch_first=True)
            batch = {
                "input_ids": pad(ids, padding_value=self.processor.tokenizer.pad_token_id),
                "labels": pad(labels, padding_value=IGNORE_INDEX),
                "attention_mask": pad([torch.ones_like(row) for row in ids]),
            }
        if pixels := [row["pixel_values"] for row in rows if "pixel_values" in row]:
            batch["pixel_values"] = torch.cat(pixels)
        return batch
