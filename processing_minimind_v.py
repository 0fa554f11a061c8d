"""Processor of MiniMind-V (text and images -> model inputs) and its image-to-text pipeline.

The processor is strict where the stock path is silently wrong: every sample has exactly as many images as image
tokens, no image is ever cut, and nothing that a user types becomes an image or a turn.
"""

import copy
import os
from typing import Any

import numpy as np
import torch
import transformers
from transformers import AutoImageProcessor, BatchFeature, ImageTextToTextPipeline, Pipeline, ProcessorMixin
from transformers.processing_utils import MultiModalData

from .image_loading_minimind_v import load_image

TRANSFORMERS_VERSION = tuple(int(part) for part in transformers.__version__.split(".")[:2])
DEFAULT_PROMPT = "Describe this image."


class MiniMindVProcessor(ProcessorMixin):
    """Turns text with image tokens, and the images, into the inputs of MiniMind-V.

    Args:
        image_processor: CLIP's or SigLIP's image processor, with the size of the tower.
        tokenizer: Fast tokenizer, padding on the left for generation.
        image_seq_length: Tokens that one image takes (the model's `config.image_seq_length`); left out, 64.
        image_token: The token that stands for an image in a prompt; left out, `<|image_pad|>`.
        chat_template: Jinja template; left out, the tokenizer's.

    Call it with `text` and `images`, or use `apply_chat_template(..., tokenize=True, return_dict=True)`. Images are
    given as in [`load_image`]: one, a list in reading order over the batch, or a list per sample.

    Returns `input_ids`, `attention_mask` `[B, T]` and `pixel_values` `[N, 3, height, width]`, N images in all.

    Raises:
        ValueError: Image tokens and images of a sample differ in number, truncation would cut an image, the prompt is
            longer than the model's positions, an image is broken, or a chat contains control tokens as text.
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
        placeholder = {"image_seq_length": self.image_seq_length, "image_token": self.image_token}
        tokenizer.init_kwargs["image_placeholder"] = placeholder
        for name in ("is_local", "local_files_only", "dtype"):  # how it was loaded is not to be saved with it
            tokenizer.init_kwargs.pop(name, None)
        ids = tokenizer.encode(self.image_token, add_special_tokens=False)
        if len(ids) != 1:
            advice = "One of an earlier version, which wrote an image as 196 times '@', must be converted again."
            given = f"{self.image_token[:20]!r} is {len(ids)}"
            raise ValueError(f"image_token must be one token of the tokenizer; {given}. {advice}")
        self.image_token_id = ids[0]
        # Too long a prompt is an error here, so the tokenizer need not warn of it.
        tokenizer.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"] = True
        self.auto_map = {"AutoProcessor": "processing_minimind_v.MiniMindVProcessor"}
        super().__init__(image_processor, tokenizer, chat_template=chat_template or tokenizer.chat_template)

    @classmethod
    def _get_arguments_from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> list:
        # PIL resizes images as in the original, whether or not torchvision is installed, which rounds differently.
        _, tokenizer = super()._get_arguments_from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        kwargs = {"backend": "pil"} | kwargs
        return [AutoImageProcessor.from_pretrained(pretrained_model_name_or_path, **kwargs), tokenizer]

    def prepare_inputs_layout(self, images: Any = None, text: Any = None, **kwargs: Any) -> tuple:
        """Loads the images; as a list, or as lists per sample if they were given so."""
        _, text, videos, audio = super().prepare_inputs_layout(text=text, **kwargs)
        if isinstance(images, (np.ndarray, torch.Tensor)) and images.ndim == 4:
            images = list(images)
        elif images is not None and not isinstance(images, (list, tuple)):
            images = [images]
        crops = kwargs.get("do_center_crop", getattr(self.image_processor, "do_center_crop", False))
        loaded: list[Any] = []
        for i, item in enumerate(images or []):
            if isinstance(item, (list, tuple)):
                loaded.append([load_image(x, f"image {j} of sample {i}", crops) for j, x in enumerate(item)])
            else:
                loaded.append(load_image(item, f"image {i}", crops))
        if len({isinstance(item, list) for item in loaded}) > 1:
            raise ValueError("images must be a list of images or a list of lists of images, not both in one list.")
        return loaded or None, text, videos, audio

    def validate_inputs(self, images: Any = None, text: Any = None, **kwargs: Any) -> None:
        """Every sample must have as many images as image tokens; of a flat list of images, only the sum is known."""
        if text is not None and all(isinstance(sample, str) for sample in text):
            tokens, given = [sample.count(self.image_token) for sample in text], images or []
            nested = len(given) > 0 and isinstance(given[0], list)
            given = [len(sample) for sample in given] if nested else [len(given)]
            if given != (tokens if nested else [sum(tokens)]):
                raise ValueError(
                    "The number of image tokens in the prompts should be the same as the number of images, but they "
                    f"are {tokens} and {given}. Pass one list of images per prompt, which may be empty."
                )
        super().validate_inputs(images=images, text=text, **kwargs)

    def _process_images(self, images: Any, **kwargs: Any) -> tuple[dict, list[str]]:
        if not kwargs.get("do_rescale", True):
            raise ValueError(
                "do_rescale=False is not possible: images of any kind are loaded with 8 bits per channel."
            )
        flat = [image for sample in images for image in (sample if isinstance(sample, list) else [sample])]
        return super()._process_images(flat, **kwargs) if flat else ({}, [])

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs: Any) -> str:
        """The text that one `image_token` becomes: as many tokens as the image has features."""
        return self.image_token * self.image_seq_length

    def _check_special_mm_tokens(self, text: list[str], text_inputs: BatchFeature, modalities: list[str]) -> None:
        super()._check_special_mm_tokens(text, text_inputs, modalities)  # truncation has cut no image
        longest, positions = max(map(len, text_inputs["input_ids"])), self.tokenizer.model_max_length
        if longest > positions:
            raise ValueError(
                f"The prompt has {longest} tokens, but the model has only {positions} positions. Shorten the text or "
                "pass fewer images."
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
        return super().apply_chat_template(conversation, *args, **kwargs)

    def check_chat(self, conversation: Any) -> None:
        """Raises a ValueError if a chat has parts that are neither text nor image, or control tokens as text."""
        control_tokens = [token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special]
        for message in conversation:
            if isinstance(message, (list, tuple)):
                self.check_chat(message)
                continue
            role, content = message.get("role"), message.get("content") or ""
            parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
            for part in parts:
                if part.get("type") not in ("text", "image", "image_url"):
                    kind = part.get("type")
                    raise ValueError(f"A {role} message has a part of type {kind!r}; only text and image are known.")
                if found := [token for token in control_tokens if token in (part.get("text") or "")]:
                    advice = "Remove it; pass an image as an image part."
                    since = "(From transformers 5.23 on, sanitize_control_tokens=True keeps it as plain text.)"
                    raise ValueError(
                        f"A {role} message contains the control token {found[0]!r} as text. {advice} {since}"
                    )


# --- Pipeline --------------------------------------------------------------------------------------------------------


class MiniMindVImageToTextPipeline(ImageTextToTextPipeline):
    """`pipeline("image-to-text", model=..., trust_remote_code=True)`: an image in, its caption out.

    Example:
        >>> captioner = pipeline("image-to-text", model="checkpoints/minimind-v-emoji", trust_remote_code=True)
        >>> captioner("examples/images/apple.png", prompt="What is this?", max_new_tokens=20)
        [{'generated_text': 'Red apple.'}]
    """

    def __call__(self, inputs: Any, prompt: str = DEFAULT_PROMPT, **kwargs: Any) -> list:
        """Captions one image as in [`load_image`], a list, a dataset or a generator of them.

        Args:
            inputs: The images.
            prompt: The question about each.
            **kwargs: `max_new_tokens`, `batch_size`, `generate_kwargs`, or any argument of `generate`.

        Returns:
            `[{"generated_text": str}]` for one image, a list of such lists for several.
        """
        return Pipeline.__call__(self, inputs, prompt=prompt, **kwargs)

    def preprocess(self, inputs: Any, prompt: str = DEFAULT_PROMPT, **kwargs: Any) -> BatchFeature:
        content = [{"type": "image", "image": inputs}, {"type": "text", "text": prompt}]
        options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
        return self.processor.apply_chat_template([{"role": "user", "content": content}], **options)

    def _forward(self, model_inputs: dict, generate_kwargs: dict | None = None) -> dict:
        options = dict(generate_kwargs or {})
        if TRANSFORMERS_VERSION >= (5, 20):
            options = self._prepare_generate_kwargs(options, return_dict_in_generate=False)
        else:  # until 5.20 is the lower bound: one whole config, because generate() warns of single options beside it
            options.pop(
                "return_dict_in_generate", None
            )  # which the library's pipelines write into what they are given
            config = copy.deepcopy(options.pop("generation_config", self.generation_config))
            options = config.update(**options, return_dict_in_generate=False)
            config.max_length = None if config.max_new_tokens is not None else config.max_length
            options["generation_config"] = config
        sequences = self.model.generate(**model_inputs, **options)
        rows, length = model_inputs["input_ids"].shape  # each row may have several answers
        return {"answers": sequences[:, length:].reshape(rows, -1, sequences.shape[-1] - length)}

    def postprocess(self, model_outputs: dict, **kwargs: Any) -> list[dict[str, str]]:
        texts = self.processor.batch_decode(model_outputs["answers"].flatten(0, -2), skip_special_tokens=True)
        return [{"generated_text": text.strip()} for text in texts]

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """Saves model and processor: a complete checkpoint."""
        self.model.save_pretrained(save_directory, **kwargs)
        self.processor.save_pretrained(save_directory)


MiniMindVProcessor.register_for_auto_class()

__all__ = ["MiniMindVImageToTextPipeline", "MiniMindVProcessor"]
