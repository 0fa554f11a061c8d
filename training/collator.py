"""Rows of chats -> a padded batch with labels on the assistant's turns."""

import functools
import logging
from collections.abc import MutableMapping
from typing import Any, Literal

import torch
from torch.nn.utils.rnn import pad_sequence

from ..processing_minimind_v import MiniMindVProcessor
from .data import images_of, reason
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
        on_broken: What happens to broken rows, such as those with unreadable images: `"error"`, or `"skip"` (left out,
            reported in the log and in `dropped`).

    Attributes:
        dropped: Row number -> why it was left out. With the workers of a data loader, give it a mapping that they
            share, such as `multiprocessing.Manager().dict()`.

    Returns (when called):
        `input_ids`, `labels` and `attention_mask` (packed: `position_ids`), int64 `[B, T]`, and, if there are
        images, what the image processor makes of them, `pixel_values` `[N, ...]` and others. In the place of a row
        that is left out stands one token that is not trained on: every process of a training takes part in every
        step, also with nothing but such rows.

    Raises:
        ValueError: A broken row with `on_broken="error"`.
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
        self.dropped: MutableMapping[Any, str] = {}

    def encode(self, messages: list[dict[str, Any]]) -> dict[str, Any]:
        """One chat: lists `input_ids` and `labels`, and `pixel_values` if it has images.

        Raises:
            ValueError: An unreadable image, a control token in a text, or an image that `image_features` has not.
        """
        processor = self.processor
        messages = processor.check_chat(messages)
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
            row |= self.encode_images(images)
        return row

    def encode_images(self, images: list[Any]) -> dict[str, torch.Tensor]:
        """Inputs `[N, ...]`; the tower's features as `pixel_values` `[N, positions, width]` where a cache has them."""
        cached = [self.image_features.get(image) if self.image_features else None for image in images]
        features = [feature for feature in cached if feature is not None]
        if len(features) == len(images):
            return {"pixel_values": torch.stack(features)}
        samples: list[Any] = [images]
        inputs = self.processor(images=samples, return_tensors="pt")
        if self.image_features:
            raise ValueError("a picture is not among the cached image features")
        return dict(inputs)

    def try_to_encode(self, item: dict[str, Any]) -> tuple[dict[str, Any], None] | tuple[None, str]:
        """The encoded chat of an item, or what is wrong with it."""
        if "error" in item:
            return None, item["error"]
        try:
            return self.encode(item["messages"]), None
        except Exception as error:  # of any kind: decoders and templates trip over what people write in many ways
            return None, reason(error)

    def encode_or_drop(self, item: dict[str, Any]) -> dict[str, Any]:
        """The encoded chat of an item; for one that is left out, a single token that is not trained on.

        Raises:
            ValueError: A broken row with `on_broken="error"`.
        """
        number = item.get("row")
        row, problem = self.try_to_encode(item)
        if row is None and self.on_broken == "error":
            raise ValueError(f"Row {number}: {problem}")
        if row is not None and len(row["input_ids"]) > self.max_length:
            problem = f"{len(row['input_ids'])} tokens are more than max_length ({self.max_length})"
        elif row is not None:
            return row
        if number is None or number not in self.dropped:
            self.dropped[number] = str(problem)
            logger.warning("Row %s is left out: %s", number, problem)
        return {"input_ids": [self.processor.tokenizer.pad_token_id], "labels": [IGNORE_INDEX]}

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        rows = [self.encode_or_drop(item) for item in items]
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
        for name in self.processor.image_processor.model_input_names:
            if images := [row[name] for row in rows if name in row]:
                batch[name] = torch.cat(images)
        return batch
