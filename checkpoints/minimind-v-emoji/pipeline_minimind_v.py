"""The image-to-text pipeline of MiniMind-V: an image in, its caption out."""

import copy
import difflib
import functools
import inspect
import os
from typing import Any

import torch
import transformers
from transformers import (
    BatchFeature,
    GenerationConfig,
    GenerationMixin,
    ImageTextToTextPipeline,
    LogitsProcessor,
    Pipeline,
)

TRANSFORMERS_VERSION = tuple(int(part) for part in transformers.__version__.split(".")[:2])
DEFAULT_PROMPT = "Describe this image."


@functools.cache
def options_of_generate() -> frozenset[str]:
    """What `generate()` takes by name."""
    names = {*GenerationConfig().to_dict(), *inspect.signature(GenerationMixin.generate).parameters}
    return frozenset(names - {"self", "kwargs", "transformers_version"})


class FiniteLogits(LogitsProcessor):
    """Raises a ValueError instead of answering with logits that are NaN or infinite."""

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        if (scores.isnan() | scores.isposinf()).any():  # -inf is what generate() gives tokens that it rules out
            advice = "Its weights are broken, or too large for float16: load it in float32."
            raise ValueError(f"The model's logits are not finite. {advice}")
        return scores


class MiniMindVImageToTextPipeline(ImageTextToTextPipeline):
    """`pipeline("image-to-text", model=..., trust_remote_code=True)`: an image in, its caption out.

    Example:
        >>> captioner = pipeline("image-to-text", model="checkpoints/minimind-v-emoji", trust_remote_code=True)
        >>> captioner("examples/images/apple.png", prompt="What is this?", max_new_tokens=20)
        [{'generated_text': 'Red apple.'}]
    """

    def __call__(self, inputs: Any, prompt: str | None = None, **kwargs: Any) -> list:
        """Captions one image as in [`load_image`], a list, a dataset or a generator of them.

        Args:
            inputs: The images.
            prompt: The question about each; left out, "Describe this image."
            **kwargs: `max_new_tokens`, `batch_size`, `generate_kwargs`, or any argument of `generate`.

        Returns:
            `[{"generated_text": str}]` for one image, a list of such lists for several.
        """
        if isinstance(inputs, (list, tuple)) and not inputs:
            return []
        return Pipeline.__call__(self, inputs, prompt=prompt, **kwargs)

    def _sanitize_parameters(
        self, prompt: str | None = None, generate_kwargs: dict | None = None, **kwargs: Any
    ) -> tuple[dict, dict, dict]:
        for name in kwargs.keys() - options_of_generate():
            near = difflib.get_close_matches(
                name, [*options_of_generate(), "prompt", "generate_kwargs", "batch_size"], n=1
            )
            raise ValueError(f"There is no option {name!r}" + (f"; did you mean {near[0]!r}?" if near else "."))
        if not isinstance(generate_kwargs, (dict, type(None))):
            raise ValueError(f"generate_kwargs must be a dict; got {type(generate_kwargs).__name__}.")
        if not isinstance(prompt, (str, type(None))):
            raise ValueError(f"prompt must be one string, for all images; got {type(prompt).__name__}.")
        if twice := kwargs.keys() & (generate_kwargs or {}).keys():
            raise ValueError(f"{sorted(twice)} are given twice, once in generate_kwargs.")
        options = {"generate_kwargs": {**(generate_kwargs or {}), **kwargs}} if generate_kwargs or kwargs else {}
        return {} if prompt is None else {"prompt": prompt}, options, {}

    def preprocess(self, inputs: Any, prompt: str = DEFAULT_PROMPT) -> BatchFeature:
        content = [{"type": "image", "image": inputs}, {"type": "text", "text": prompt}]
        options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
        return self.processor.apply_chat_template([{"role": "user", "content": content}], **options)

    def _forward(self, model_inputs: dict, generate_kwargs: dict | None = None) -> dict:
        options = dict(generate_kwargs or {})
        options["logits_processor"] = [*(options.get("logits_processor") or []), FiniteLogits()]
        if TRANSFORMERS_VERSION >= (5, 20):
            options = self._prepare_generate_kwargs(options, return_dict_in_generate=False)
        else:  # until 5.20 is the lower bound: one whole config, because generate() warns of single options beside it
            options.pop("return_dict_in_generate", None)  # which the library's pipelines write into what they get
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


__all__ = ["DEFAULT_PROMPT", "FiniteLogits", "MiniMindVImageToTextPipeline"]
