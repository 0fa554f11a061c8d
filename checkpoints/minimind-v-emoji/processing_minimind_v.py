"""Processor of MiniMind-V: text and images -> model inputs.

The processor is strict where the stock path is silently wrong: every sample has exactly as many images as image
tokens, no image is ever cut, and nothing that a user types becomes an image or a turn.
"""

import os
import re
import threading
from typing import Any

import numpy as np
import torch
from transformers import AutoImageProcessor, BatchFeature, ProcessorMixin
from transformers.processing_utils import MultiModalData
from transformers.utils.chat_template_utils import DocstringParsingException, TypeHintParsingException, get_json_schema

from .bad_request_minimind_v import as_bad_request
from .chat_checking_minimind_v import check_chat, check_texts
from .downloading_minimind_v import host_names
from .image_loading_minimind_v import MAX_PIXELS, load_image
from .pipeline_minimind_v import DEFAULT_PROMPT, TRANSFORMERS_VERSION, MiniMindVImageToTextPipeline

GUARD = re.compile(r"\{#- Guard:.*?Guard: end\. -#\}", re.DOTALL)  # in our chat templates
TOKENIZER_LOCK = threading.Lock()  # A fast tokenizer keeps how to pad in itself, for all threads.
PLACE = object()  # in the place of an image, where only their number matters


class MiniMindVProcessor(ProcessorMixin):
    """Turns text with image tokens, and the images, into the inputs of MiniMind-V.

    Args:
        image_processor: CLIP's, SigLIP's or SigLIP2's (NaFlex) image processor, with the size of the tower.
        tokenizer: Fast tokenizer, padding on the left for generation.
        image_seq_length: Tokens that one image takes (the model's `config.image_seq_length`); left out, 64.
        image_token: The token that stands for an image in a prompt; left out, `<|image_pad|>`.
        chat_template: Jinja template; left out, the tokenizer's.

    Call it with `text` and `images`, or use `apply_chat_template(..., tokenize=True, return_dict=True)`. Images are
    given as in [`load_image`]: one, a list in reading order over the batch, or a list per sample. They are loaded one
    after the other, as [`load_image`] does with the attributes `max_image_pixels` and `allowed_hosts`; the latter can
    also be set by the environment variable MINIMIND_V_ALLOWED_HOSTS (names with commas between; empty: none).

    Returns `input_ids`, `attention_mask` `[B, T]` and `pixel_values` `[N, 3, height, width]`, N images in all; of
    NaFlex `pixel_values` `[N, P, pixels of a patch]`, `pixel_attention_mask` `[N, P]` and `spatial_shapes` `[N, 2]`.

    Raises:
        ValueError: Image tokens and images of a sample differ in number, truncation would cut an image, the prompt is
            longer than the model's positions, an image is broken, or a chat is (see [`check_chat`]).
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
        self.max_image_pixels, hosts = MAX_PIXELS, os.environ.get("MINIMIND_V_ALLOWED_HOSTS")
        self.allowed_hosts = None if hosts is None else host_names(hosts)
        self.max_text_bytes = tokenizer.model_max_length * max(map(len, tokenizer.get_vocab()))
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

    def __call__(self, images: Any = None, text: Any = None, **kwargs: Any) -> BatchFeature:
        """See the class. Threads wait for each other where text is tokenized, not where images are loaded."""
        if isinstance(images, (np.ndarray, torch.Tensor)) and images.ndim == 4:
            images = list(images)
        elif images is not None and not isinstance(images, (list, tuple)):
            images = [images]
        if len({isinstance(item, (list, tuple)) for item in images or []}) > 1:
            raise ValueError("images must be a list of images or a list of lists of images, not both in one list.")
        images = images or None
        if text is None:
            return super().__call__(images=images, **kwargs)
        places = images and [[PLACE] * len(item) if isinstance(item, (list, tuple)) else PLACE for item in images]
        with TOKENIZER_LOCK:
            inputs = super().__call__(images=places, text=text, **kwargs)
        if images is not None:
            inputs.update(super().__call__(images=images, **kwargs))
        return inputs

    def prepare_inputs_layout(self, images: Any = None, text: Any = None, **kwargs: Any) -> tuple:
        """Images as they are given: not loaded yet."""
        if not isinstance(text, (str, list, tuple, type(None))) or text in ([], ()):
            raise ValueError("`text` must be a string or list of strings.")
        _, text, videos, audio = super().prepare_inputs_layout(text=text, **kwargs)
        return images, text, videos, audio

    def validate_inputs(self, images: Any = None, text: Any = None, **kwargs: Any) -> None:
        """Every sample must have as many images as image tokens; of a flat list of images, only the sum is known."""
        if text is None:
            return super().validate_inputs(images=images, **kwargs)
        if not all(isinstance(sample, str) for sample in text):
            raise ValueError("`text` must be a string or list of strings.")
        if (size := max((check_texts(sample) for sample in text), default=0)) > self.max_text_bytes:
            raise ValueError(f"A prompt has {size} bytes, which is more than the model's positions can hold.")
        tokens, given = [sample.count(self.image_token) for sample in text], images or []
        nested = len(given) > 0 and isinstance(given[0], (list, tuple))
        given = [len(sample) for sample in given] if nested else [len(given)]
        if given != (tokens if nested else [sum(tokens)]):
            raise ValueError(
                "The number of image tokens in the prompts should be the same as the number of images, but they "
                f"are {tokens} and {given}. Pass one list of images per prompt, which may be empty."
            )

    def _process_images(self, images: Any, **kwargs: Any) -> tuple[dict, list[str]]:
        if not kwargs.get("do_rescale", True):
            raise ValueError(
                "do_rescale=False is not possible: images of any kind are loaded with 8 bits per channel."
            )
        options = {"is_cropped": kwargs.get("do_center_crop", getattr(self.image_processor, "do_center_crop", False))}
        options |= {"max_pixels": self.max_image_pixels, "allowed_hosts": self.allowed_hosts}
        data: dict[str, list[Any]] = {}
        nested = isinstance(images[0], (list, tuple))
        places = [
            (i, j, source) for i, item in enumerate(images) for j, source in enumerate(item if nested else [item])
        ]
        for i, j, source in places:  # one at a time, because images may be huge
            if source is not PLACE:
                image = load_image(source, f"image {j} of sample {i}" if nested else f"image {i}", **options)
                for name, values in self.image_processor(image, **kwargs | {"return_tensors": None}).items():
                    data.setdefault(name, []).extend(values)
        return data, [self.replace_image_token(data, index) for index in range(len(places))]

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

    @as_bad_request()
    def apply_chat_template(self, conversation: Any, *args: Any, **kwargs: Any) -> Any:
        """Renders a chat, or a list of chats; with `tokenize=True, return_dict=True`, makes the model's inputs.

        A message is `{"role": ..., "content": ...}`; content is a string or a list of parts
        `{"type": "text", "text": ...}` and `{"type": "image", "image": ...}` (or "url", "path", "base64").

        Raises:
            ValueError: As [`check_chat`]: what a user types must not become a turn or an image.
        """
        is_sanitized = kwargs.get("sanitize_control_tokens", False) and TRANSFORMERS_VERSION >= (5, 23)
        first = conversation[0] if isinstance(conversation, (list, tuple)) and conversation else None
        is_batched = isinstance(first, (list, tuple)) or hasattr(first, "messages")
        chats = [getattr(chat, "messages", chat) for chat in (conversation if is_batched else [conversation])]
        chats = [self.check_chat(chat, is_sanitized) for chat in chats]
        try:
            if kwargs.get("tools") is not None:  # a tool may be a function, whose docstring is text as well
                kwargs["tools"] = [get_json_schema(tool) if callable(tool) else tool for tool in kwargs["tools"]]
            check_texts([kwargs.get("tools"), kwargs.get("documents")], self.control_tokens)
        except (ValueError, TypeHintParsingException, DocstringParsingException) as error:
            raise ValueError(f"tools or documents of the chat: {error}.") from None
        if is_sanitized:  # then what the guard would refuse is encoded as plain text
            kwargs["chat_template"] = GUARD.sub("", kwargs.get("chat_template") or self.chat_template)
        return super().apply_chat_template(chats if is_batched else chats[0], *args, **kwargs)

    @property
    def control_tokens(self) -> list[str]:
        """What no text of a chat may contain."""
        return [token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special]

    def check_chat(self, messages: Any, is_sanitized: bool = False) -> list[dict[str, Any]]:
        """See [`check_chat`]."""
        return check_chat(messages, self.control_tokens, self.max_text_bytes, is_sanitized)


MiniMindVProcessor.register_for_auto_class()

__all__ = ["DEFAULT_PROMPT", "MiniMindVImageToTextPipeline", "MiniMindVProcessor"]
