"""Processor of MiniMind-V (pictures and text -> model inputs) and its image-to-text pipeline.

The processor is strict where the stock path is silently wrong: every picture comes out as upright 8-bit RGB whatever
it went in as, every sample has exactly as many pictures as placeholders, and no placeholder run is ever cut.
"""

import base64
import copy
import io
import os
import urllib.request
import warnings
from itertools import groupby
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image, ImageOps
from transformers import BatchFeature, ImageTextToTextPipeline, Pipeline, ProcessorMixin
from transformers.models.auto.image_processing_auto import AutoImageProcessor  # 5.16's top level wants torchvision
from transformers.processing_utils import MultiModalData

TRANSFORMERS_VERSION = tuple(int(part) for part in transformers.__version__.split(".")[:2])
URL_TIMEOUT = 20  # seconds
MAX_DOWNLOAD_BYTES = 64 * 2**20
# A centre crop to a square sees nothing beyond this ratio of sides, with a margin for the resampling filter.
MAX_ASPECT_RATIO = 4
DEFAULT_PROMPT = "Describe this image."


# --- Pictures --------------------------------------------------------------------------------------------------------


def load_picture(source: Any, name: str = "image") -> Image.Image:
    """Anything that shows a picture, as upright 8-bit RGB on white.

    Args:
        source: Path, http(s) URL, base64 or data-URL string, bytes, binary file, PIL image, or an array or tensor
            `[H, W]`, `[H, W, C]` or `[C, H, W]` with C = 1, 3 or 4: integers of 8 or 16 bits, or floats in [0, 1] or
            [0, 255].
        name: What error messages call it, such as "image 2 of sample 1".

    Raises:
        ValueError: Not a picture, broken, or with more pixels than `PIL.Image.MAX_IMAGE_PIXELS`.
        FileNotFoundError: A string that is no file, no URL and no base64.
        TypeError: Any other kind of object.
    """
    if isinstance(source, (str, os.PathLike)):
        text = os.fspath(source)
        name = f"{name} ({text if len(text) <= 200 else text[:60] + '...'})"
        if text.startswith(("http://", "https://")):
            source = _download(text, name)
        elif text.startswith("data:") or not os.path.isfile(text):
            try:
                source = base64.b64decode("".join(text.rpartition(",")[2].split()), validate=True)
            except ValueError:
                message = f"{name} is no file, no http(s) URL and no base64 picture. Check the path."
                raise FileNotFoundError(message) from None
    if isinstance(source, bytes):
        source = io.BytesIO(source)
    is_file = isinstance(source, (str, os.PathLike)) or hasattr(source, "read")
    if not is_file and not isinstance(source, (Image.Image, np.ndarray, torch.Tensor)):
        kinds = "a path, URL, base64 string, bytes, PIL image, array or tensor"
        raise TypeError(f"{name} must be {kinds}; got {type(source).__name__}.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            if isinstance(source, (np.ndarray, torch.Tensor)):
                return _picture_from_array(source)
            return _to_rgb(ImageOps.exif_transpose(Image.open(source) if is_file else source))
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise ValueError(
            f"{name} has more than {Image.MAX_IMAGE_PIXELS} pixels and was not decoded. Shrink it, or raise "
            "PIL.Image.MAX_IMAGE_PIXELS if you trust it."
        ) from None
    except Exception as error:  # decoders trip over hostile files in many ways
        raise ValueError(f"{name} cannot be read as a picture: {error}") from error


def _download(url: str, name: str) -> bytes:
    try:
        request = urllib.request.Request(url, headers={"User-Agent": "minimind-v"})
        with urllib.request.urlopen(request, timeout=URL_TIMEOUT) as response:
            content = response.read(MAX_DOWNLOAD_BYTES + 1)
    except (OSError, ValueError) as error:
        raise ValueError(f"{name} cannot be downloaded: {error}") from error
    if len(content) > MAX_DOWNLOAD_BYTES:
        raise ValueError(f"{name} is larger than {MAX_DOWNLOAD_BYTES} bytes and was not downloaded.")
    return content


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith(("I", "F")):  # 16-bit and float images: PIL's own conversion clips them
        return Image.fromarray(_to_uint8(np.asarray(image))).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _picture_from_array(array: np.ndarray | torch.Tensor) -> Image.Image:
    channels_first = isinstance(array, torch.Tensor)
    if channels_first:
        array = array.detach().cpu()
        array = (array.float() if array.is_floating_point() else array).numpy()
    if array.ndim == 3:
        first, last = (array.shape[axis] in (1, 3, 4) for axis in (0, 2))
        if first and (channels_first or not last):
            array = array.transpose(1, 2, 0)
        if array.shape[2] == 1:
            array = array[:, :, 0]
    if not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))) or not array.size:
        raise ValueError(f"an array must be [H, W], [H, W, C] or [C, H, W] with C = 1, 3 or 4; got {array.shape}")
    return _to_rgb(Image.fromarray(np.ascontiguousarray(_to_uint8(array))))


def _to_uint8(array: np.ndarray) -> np.ndarray:
    if array.dtype == np.uint8:
        return array
    low, peak = float(array.min()), float(array.max())
    if not (np.isfinite(low) and np.isfinite(peak)) or low < 0:
        raise ValueError(f"pixel values must lie in [0, 1], [0, 255] or [0, 65535]; got {low} to {peak}")
    white = 65535 if array.dtype.type is np.uint16 or peak > 255 else 255
    if array.dtype == bool or (peak <= 1 and np.issubdtype(array.dtype, np.floating)):
        white = 1
    return np.rint(array.astype(np.float64) * (255 / max(white, peak))).astype(np.uint8)


# --- Processor -------------------------------------------------------------------------------------------------------


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
    given as in [`load_picture`]: one, a list in reading order over the batch, or a list per sample.

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
        return [AutoImageProcessor.from_pretrained(pretrained_model_name_or_path, backend="pil", **kwargs), tokenizer]

    def prepare_inputs_layout(self, images: Any = None, text: Any = None, **kwargs: Any) -> tuple:
        """Loads all pictures; keeps the nesting, so that samples can be told apart."""
        _, text, videos, audio = super().prepare_inputs_layout(text=text, **kwargs)
        if text is not None:  # a prompt may be expanded already
            expanded, token = self.image_placeholder, self.image_token
            text = [sample.replace(expanded, token) if isinstance(sample, str) else sample for sample in text]
        if isinstance(images, (np.ndarray, torch.Tensor)) and images.ndim == 4:
            images = list(images)
        if images is not None and not isinstance(images, (list, tuple)):
            images = [images]
        if images is None or not len(images):
            return None, text, videos, audio
        if isinstance(images[0], (list, tuple)):
            images = [
                [self._load(picture, f"image {i} of sample {sample}") for i, picture in enumerate(pictures)]
                for sample, pictures in enumerate(images)
            ]
        else:
            images = [self._load(picture, f"image {i}") for i, picture in enumerate(images)]
        return images, text, videos, audio

    def _load(self, source: Any, name: str) -> Image.Image:
        picture = load_picture(source, name)
        width, height = picture.size
        short = min(width, height)
        if getattr(self.image_processor, "do_center_crop", False) and max(width, height) > MAX_ASPECT_RATIO * short:
            # Resizing the short side of a very long picture would take gigabytes for what the crop throws away.
            side = MAX_ASPECT_RATIO * short
            left, top = max(0, (width - side) // 2), max(0, (height - side) // 2)
            picture = picture.crop((left, top, left + min(width, side), top + min(height, side)))
        return picture

    def validate_inputs(self, images: Any = None, text: Any = None, **kwargs: Any) -> None:
        """Every sample must have as many pictures as placeholders."""
        if isinstance(text, list) and all(isinstance(sample, str) for sample in text):
            expected = [sample.count(self.image_token) for sample in text]
            received = [len(sample) for sample in images] if images and isinstance(images[0], list) else None
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
            self._refuse_control_tokens(conversation)
        if kwargs.get("return_assistant_tokens_mask") and TRANSFORMERS_VERSION < (5, 18):
            # It looks for the answers where they stood before the placeholders were expanded: so expand them first.
            template = kwargs.get("chat_template") or self.chat_template
            kwargs["chat_template"] = template.replace(self.image_token, self.image_placeholder)
        return super().apply_chat_template(conversation, *args, **kwargs)

    def _refuse_control_tokens(self, conversation: Any) -> None:
        control_tokens = {token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special}
        control_tokens.add(self.image_token)
        for message in conversation:
            if isinstance(message, (list, tuple)):
                self._refuse_control_tokens(message)
                continue
            content = message.get("content") or ""
            parts = [content] if isinstance(content, str) else [part.get("text") or "" for part in content]
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
            inputs: A picture as in [`load_picture`], or several.
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
        model_inputs = self.processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        return BatchFeature({**model_inputs, "text": prompt})  # "text" is what the parent's _forward expects

    def _forward(self, model_inputs: dict, generate_kwargs: dict | None = None) -> dict:
        if TRANSFORMERS_VERSION >= (5, 20):
            return super()._forward(model_inputs, generate_kwargs)
        # Here the parent passes a whole generation config and single options besides it, which generate() warns of.
        generate_kwargs = dict(generate_kwargs or {})
        config = copy.deepcopy(generate_kwargs.pop("generation_config", self.generation_config))
        others = config.update(**generate_kwargs)
        inputs = {key: value for key, value in model_inputs.items() if key != "text"}
        sequences = self.model.generate(**inputs, generation_config=config, **others)
        return {"generated_sequence": sequences, "input_ids": inputs["input_ids"]}

    def postprocess(self, model_outputs: dict, **kwargs: Any) -> list[dict[str, str]]:
        answers = model_outputs["generated_sequence"].flatten(0, -2)[:, model_outputs["input_ids"].shape[-1] :]
        texts = self.processor.batch_decode(answers, skip_special_tokens=True)
        return [{"generated_text": text.strip()} for text in texts]

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """Saves model and processor: a complete checkpoint."""
        self.model.save_pretrained(save_directory, **kwargs)
        self.processor.save_pretrained(save_directory)


MiniMindVProcessor.register_for_auto_class()

__all__ = ["MiniMindVImageToTextPipeline", "MiniMindVProcessor", "load_picture"]
