"""Processor of MiniMind-V (text and pictures -> model inputs) and its image-to-text pipeline.

The processor is strict where the stock path is silently wrong: every sample has exactly as many pictures as
placeholders, no placeholder run is ever cut, and nothing that a user types becomes an image or a turn.
"""

import copy
import os
from itertools import groupby
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from transformers import BatchFeature, ImageTextToTextPipeline, Pipeline, ProcessorMixin
from transformers.models.auto.image_processing_auto import AutoImageProcessor  # 5.16's top level wants torchvision
from transformers.processing_utils import MultiModalData

from .image_loading_minimind_v import load_image

TRANSFORMERS_VERSION = tuple(int(part) for part in transformers.__version__.split(".")[:2])
# A centre crop to a square sees nothing beyond this ratio of sides, with a margin for the resampling filter.
MAX_ASPECT_RATIO = 4
DEFAULT_PROMPT = "Describe this image."


class MiniMindVProcessor(ProcessorMixin):
    """Turns text with image placeholders, and the pictures, into the inputs of MiniMind-V.

    Args:
        image_processor: CLIP's or SigLIP's image processor, with the size of the tower.
        tokenizer: Fast tokenizer, padding on the left for generation.
        image_seq_length: Tokens that one picture takes (the model's `config.image_seq_length`).
        image_token: How a picture is written in a prompt: one token, which is repeated `image_seq_length` times, or
            the whole run already (MiniMind2 writes 196 times `@`; so a single `@` in a text stays text).
        chat_template: Jinja template; left out, the tokenizer's.

    Call it with `text` and `images`, or use `apply_chat_template(..., tokenize=True, return_dict=True)`. Pictures are
    given as in [`load_image`]: one, a list in reading order over the batch, or a list per sample.

    Returns `input_ids`, `attention_mask` `[B, T]` and `pixel_values` `[N, 3, height, width]`, N images in all.

    Raises:
        ValueError: Placeholders and pictures of a sample differ in number, truncation would cut a picture, the prompt
            is longer than the model's positions, a picture is broken, or a chat contains control tokens as text.
    """

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        image_seq_length: int | None = None,
        image_token: str | None = None,
        chat_template: str | None = None,
    ) -> None:
        # The tokenizer carries both values too: a library pipeline saves it, but not the processor.
        saved = tokenizer.init_kwargs.get("image_placeholder", {})
        self.image_seq_length = image_seq_length or saved.get("image_seq_length", 64)
        self.image_token = image_token or saved.get("image_token", "<|image_pad|>")
        tokenizer.init_kwargs["image_placeholder"] = {
            "image_seq_length": self.image_seq_length,
            "image_token": self.image_token,
        }
        for name in ("is_local", "local_files_only", "dtype"):  # how it was loaded is not to be saved with it
            tokenizer.init_kwargs.pop(name, None)
        ids = tokenizer.encode(self.image_token, add_special_tokens=False)
        if len(set(ids)) != 1 or len(ids) not in (1, self.image_seq_length):
            raise ValueError(
                f"image_token must be one token of the tokenizer, or {self.image_seq_length} times the same token "
                f"(image_seq_length); {self.image_token!r} gives the ids {ids[:8]}."
            )
        self.image_token_id = ids[0]
        self.image_placeholder = self.image_token * (self.image_seq_length // len(ids))
        # Too long a prompt is an error here, so the tokenizer need not warn of it.
        tokenizer.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"] = True
        self.auto_map = {"AutoProcessor": "processing_minimind_v.MiniMindVProcessor"}
        super().__init__(image_processor, tokenizer, chat_template=chat_template or tokenizer.chat_template)

    @classmethod
    def _get_arguments_from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> list:
        # PIL resizes pictures as in the original, whether or not torchvision is installed, which rounds differently.
        _, tokenizer = super()._get_arguments_from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        kwargs = {"backend": "pil"} | kwargs
        return [AutoImageProcessor.from_pretrained(pretrained_model_name_or_path, **kwargs), tokenizer]

    def prepare_inputs_layout(self, images: Any = None, text: Any = None, **kwargs: Any) -> tuple:
        """Loads all pictures; keeps the nesting, so that samples can be told apart."""
        _, text, videos, audio = super().prepare_inputs_layout(text=text, **kwargs)
        if isinstance(images, (np.ndarray, torch.Tensor)) and images.ndim == 4:
            images = list(images)
        if images is not None and not isinstance(images, (list, tuple)):
            images = [images]
        nested = [isinstance(item, (list, tuple)) for item in images or []]
        if any(nested) and not all(nested):
            raise ValueError("images must be a list of images or a list of lists of images, not both in one list.")
        crops = kwargs.get("do_center_crop", getattr(self.image_processor, "do_center_crop", False))
        if all(nested):
            images = [
                [self._load(image, f"image {i} of sample {sample}", crops) for i, image in enumerate(group)]
                for sample, group in enumerate(images or [])
            ]
            counts = [len(group) for group in images]
        else:
            images = [self._load(image, f"image {i}", crops) for i, image in enumerate(images)]
            counts = [len(images)]
        if isinstance(text, list) and all(isinstance(sample, str) for sample in text):
            placeholders = [sample.count(self.image_token) for sample in text]
            placeholders = placeholders if all(nested) else [sum(placeholders)]
            if placeholders != counts:  # then the prompts may be expanded already
                text = [sample.replace(self.image_placeholder, self.image_token) for sample in text]
        return images or None, text, videos, audio

    @staticmethod
    def _load(source: Any, name: str, crops: bool) -> Image.Image:
        picture = load_image(source, name)
        width, height = picture.size
        side = MAX_ASPECT_RATIO * min(width, height)
        if crops and max(width, height) > side:
            # Resizing the short side of a very long picture would take gigabytes for what the crop throws away.
            left, top = max(0, (width - side) // 2), max(0, (height - side) // 2)
            picture = picture.crop((left, top, left + min(width, side), top + min(height, side)))
        return picture

    def validate_inputs(self, images: Any = None, text: Any = None, **kwargs: Any) -> None:
        """Every sample must have as many pictures as placeholders."""
        if isinstance(text, list) and all(isinstance(sample, str) for sample in text):
            expected = [sample.count(self.image_token) for sample in text]
            received = [len(group) for group in images] if images and isinstance(images[0], list) else None
            if received is None:  # a flat list, in reading order: only the total can be compared
                expected, received = [sum(expected)], [len(images or [])]
            rule = "The number of image tokens in the prompts should be the same as the number of images, but"
            if len(expected) != len(received):
                raise ValueError(
                    f"{rule} there are {len(text)} prompts and {len(received)} lists of images. Pass one list per "
                    "prompt, an empty one where it has no image."
                )
            for sample, (in_text, given) in enumerate(zip(expected, received, strict=True)):
                if in_text != given:
                    where = f"sample {sample}" if len(text) == len(expected) else "the batch"
                    raise ValueError(
                        f"{rule} {where} has {in_text} in the text and {given} images. Write one placeholder per "
                        "image (an image part in a chat), and none in the user's own words."
                    )
        super().validate_inputs(images=images or None, text=text, **kwargs)

    def _process_images(self, images: Any, **kwargs: Any) -> tuple[dict, list[str]]:
        if not kwargs.get("do_rescale", True):
            raise ValueError(
                "do_rescale=False is not possible: images of any kind are loaded with 8 bits per channel."
            )
        flat = [picture for sample in images for picture in (sample if isinstance(sample, list) else [sample])]
        return super()._process_images(flat, **kwargs) if flat else ({}, [])

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs: Any) -> str:
        """The text that one `image_token` becomes: as many tokens as the image has features."""
        return self.image_placeholder

    def create_mm_token_type_ids(self, input_ids: list) -> list[list[int]]:
        """1 for the tokens of an image, 0 for text. Only what fills whole images counts, as in the model."""
        rows = []
        for ids in input_ids:
            rows.append([])
            ids = ids if isinstance(ids, list) else ids.tolist()
            for is_image, run in groupby(ids, key=lambda token: token == self.image_token_id):
                length = len(list(run))
                of_images = length // self.image_seq_length * self.image_seq_length if is_image else 0
                rows[-1] += [1] * of_images + [0] * (length - of_images)
        return rows

    def _check_special_mm_tokens(self, text: list[str], text_inputs: BatchFeature, modalities: list[str]) -> None:
        for sample, (prompt, ids, types) in enumerate(
            zip(text, text_inputs["input_ids"], self.create_mm_token_type_ids(text_inputs["input_ids"]), strict=True)
        ):
            expected = prompt.count(self.image_placeholder) * self.image_seq_length
            if sum(types) != expected:
                raise ValueError(
                    f"Truncation to {len(ids)} tokens would cut an image of sample {sample}, whose images take "
                    f"{expected} tokens. Raise max_length, disable truncation, or pass fewer images."
                )
            if len(ids) > self.tokenizer.model_max_length:
                raise ValueError(
                    f"Sample {sample} has {len(ids)} tokens, but the model has only {self.tokenizer.model_max_length} "
                    "positions. Shorten the text or pass fewer images."
                )

    def _get_num_multimodal_tokens(self, image_sizes: list[list[int]] | None = None, **kwargs: Any) -> MultiModalData:
        """Number of placeholder tokens of each image, given their sizes (height, width). For vLLM."""
        if image_sizes is None:
            return MultiModalData()
        count = len(image_sizes)
        return MultiModalData(num_image_tokens=[self.image_seq_length] * count, num_image_patches=[1] * count)

    def apply_chat_template(self, conversation: Any, *args: Any, **kwargs: Any) -> Any:
        """Renders a chat, or a list of chats; with `tokenize=True, return_dict=True`, makes the model's inputs.

        A message is `{"role": ..., "content": ...}`; content is a string or a list of parts
        `{"type": "text", "text": ...}` and `{"type": "image", "image": ...}` (or "url", "path", "base64").

        Raises:
            ValueError: With `tokenize=True`, a text contains a control token: what a user types must not become a turn
                or an image.
        """
        if kwargs.get("tokenize") and not kwargs.get("sanitize_control_tokens"):
            self.check_chat(conversation)
        if kwargs.get("return_assistant_tokens_mask") and TRANSFORMERS_VERSION < (5, 18):
            # It looks for the answers where they stood before the placeholders were expanded: so expand them first.
            template = kwargs.get("chat_template") or self.chat_template
            kwargs["chat_template"] = template.replace(self.image_token, self.image_placeholder)
        return super().apply_chat_template(conversation, *args, **kwargs)

    def check_chat(self, conversation: Any) -> None:
        """Raises a ValueError if a chat has parts that are neither text nor image, or control tokens as text."""
        control_tokens = {token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special}
        control_tokens.add(self.image_token)
        for message in conversation:
            if isinstance(message, (list, tuple)):
                self.check_chat(message)
                continue
            content = message.get("content") or ""
            parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
            for part in parts:
                if part.get("type") not in ("text", "image", "image_url"):
                    kind = part.get("type")
                    raise ValueError(
                        f"A {message.get('role')} message has a part of type {kind!r}; only text and image."
                    )
            parts = [part.get("text") or "" for part in parts]
            for token in control_tokens:
                if any(token in part for part in parts):
                    raise ValueError(
                        f"A {message.get('role')} message contains the control token {token[:20]!r} as text. Remove "
                        "it; pass an image as an image part. (With transformers >= 5.23, "
                        "sanitize_control_tokens=True keeps it as plain text.)"
                    )


# --- Pipeline --------------------------------------------------------------------------------------------------------


class MiniMindVImageToTextPipeline(ImageTextToTextPipeline):
    """`pipeline("image-to-text", model=..., trust_remote_code=True)`: a picture in, its caption out.

    Example:
        >>> captioner = pipeline("image-to-text", model="checkpoints/minimind-v-emoji", trust_remote_code=True)
        >>> captioner("examples/images/apple.png", prompt="What is this?", max_new_tokens=20)
        [{'generated_text': 'Red apple.'}]
    """

    def __call__(self, inputs: Any, prompt: str | None = None, **kwargs: Any) -> list:
        """Captions one picture, a list of pictures, or a dataset or generator of pictures.

        Args:
            inputs: A picture as in [`load_image`], or several.
            prompt: The question about it; left out, "Describe this image."
            **kwargs: `max_new_tokens`, `batch_size`, `generate_kwargs`, or any argument of `generate`.

        Returns:
            `[{"generated_text": str}]` for one picture, a list of such lists for several.
        """
        if prompt is not None:
            kwargs["prompt"] = prompt
        return Pipeline.__call__(self, inputs, **kwargs)

    def preprocess(self, inputs: Any, prompt: str = DEFAULT_PROMPT, **kwargs: Any) -> BatchFeature:
        content = [{"type": "image", "image": inputs}, {"type": "text", "text": prompt}]
        return self.processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )

    def _forward(self, model_inputs: dict, generate_kwargs: dict | None = None) -> dict:
        options = dict(generate_kwargs or {})
        options.pop("return_dict_in_generate", None)  # the library's pipelines before 5.20 write it into what they get
        if TRANSFORMERS_VERSION >= (5, 20):
            options = self._prepare_generate_kwargs(options, return_dict_in_generate=False)
        else:  # one whole config: generate() warns of single options besides it
            config = copy.deepcopy(options.pop("generation_config", self.generation_config))
            options = config.update(**options, return_dict_in_generate=False)
            if config.max_new_tokens is not None:
                config.max_length = None
            options["generation_config"] = config
        sequences = self.model.generate(**model_inputs, **options)
        rows = model_inputs["input_ids"].shape[0]  # each may have several answers
        return {
            "generated_sequence": sequences.view(rows, -1, sequences.shape[-1]),
            "input_ids": model_inputs["input_ids"],
        }

    def postprocess(self, model_outputs: dict, **kwargs: Any) -> list[dict[str, str]]:
        answers = model_outputs["generated_sequence"].flatten(0, -2)[:, model_outputs["input_ids"].shape[-1] :]
        texts = self.processor.batch_decode(answers, skip_special_tokens=True)
        return [{"generated_text": text.strip()} for text in texts]

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """Saves model and processor: a complete checkpoint."""
        self.model.save_pretrained(save_directory, **kwargs)
        self.processor.save_pretrained(save_directory)


MiniMindVProcessor.register_for_auto_class()

__all__ = ["MiniMindVImageToTextPipeline", "MiniMindVProcessor"]
