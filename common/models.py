"""Models and processors of a checkpoint, if it is whole; numbers of parameters."""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging

from ..processing_minimind_v import MiniMindVProcessor


class WeightsError(Exception):
    """The weights of a checkpoint are not whole. (No ValueError: `pipeline` would try another class after it.)"""


class CheckedModel:
    """What `pipeline("image-to-text")` loads models with, in the place of `AutoModelForImageTextToText`."""

    @classmethod
    def from_pretrained(cls, source: str | Path, **options: Any) -> PreTrainedModel:
        """[`load_model`]."""
        return load_model(source, **options)


def load_model(
    source: str | Path, model_class: Any = AutoModelForImageTextToText, is_part: bool = False, **options: Any
) -> PreTrainedModel:
    """A model whose weights are whole: the library's own loading fills gaps with random numbers.

    Args:
        source: Checkpoint folder or Hub repository.
        model_class: A class of the library or this package; left out, that of vision-language models.
        is_part: The model is a part of what the checkpoint holds.
        options: For its `from_pretrained`.

    Raises:
        WeightsError: Tensors are missing, unknown, of the wrong shape, or hold NaN, infinity or only zeros; the
            message lists them.
        OSError: There is no such checkpoint.
    """
    with quiet_library():
        loaded: Any = model_class.from_pretrained(
            source, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    model, found = loaded
    parameters = {
        name: parameter
        for name, parameter in model.named_parameters()
        if not parameter.is_meta and parameter.element_size() > 1  # neither offloaded nor quantized
    }
    check_tensors(
        source,
        {
            "missing": found["missing_keys"],
            "unknown": [] if is_part else found["unexpected_keys"],
            "of the wrong shape": [
                f"{name} {tuple(a)} instead of {tuple(b)}" for name, a, b in found["mismatched_keys"]
            ],
            "with NaN or infinity": [name for name, tensor in parameters.items() if not tensor.isfinite().all()],
            "all zeros": [name for name, tensor in parameters.items() if tensor.ndim > 1 and not tensor.any()],
        },
    )
    return model


def load_processor(
    source: str | Path, max_image_pixels: int | None = None, allowed_hosts: Sequence[str] | None = None
) -> MiniMindVProcessor:
    """The processor of a checkpoint folder or Hub repository, from classes of the library and this package only.

    Args:
        source: Checkpoint folder or Hub repository.
        max_image_pixels: Larger images are refused; left out, the processor's own limit.
        allowed_hosts: The only hosts from which images are fetched; empty: none; left out, as the processor's own.

    Raises:
        ValueError: It needs code of its own.
        OSError: There is none.
    """
    try:
        processor = AutoProcessor.from_pretrained(source, trust_remote_code=False)
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        message = f"The processor or tokenizer of {source} needs code of its own, which is not run here."
        raise ValueError(f"{message} Save it again with the classes of this package.") from error
    if max_image_pixels is not None:
        processor.max_image_pixels = max_image_pixels
    if allowed_hosts is not None:
        processor.allowed_hosts = allowed_hosts
    return processor


def check_tensors(source: str | Path, problems: dict[str, Iterable[str]]) -> None:
    """Raises a WeightsError that lists the names of tensors by what is wrong with them, unless there are none."""
    listed = [f"{kind}: {shorten(sorted(names))}" for kind, names in problems.items() if names]
    if listed:
        raise WeightsError(f"The weights of {source} are broken. Tensors {'; '.join(listed)}. Save or fetch it again.")


def shorten(names: list[str]) -> str:
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")


@contextlib.contextmanager
def quiet_library() -> Iterator[None]:
    """No progress bars for seconds, and no warnings of what is checked anyway."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def read_model_type(source: str | Path) -> str:
    """What the configuration of a checkpoint folder or Hub repository calls the model. No code of it is run.

    Raises:
        ValueError: It has no configuration that says so.
        OSError: There is no such checkpoint.
    """
    kind = PreTrainedConfig.get_config_dict(source)[0].get("model_type")
    if kind is None:
        raise ValueError(f"{source} has no config.json with a model_type. Name a checkpoint of transformers' form.")
    return kind


def count_parameters(model: PreTrainedModel) -> dict[str, int]:
    """Number of parameters of each part: "tower", "projector", "decoder", and with experts "active".

    "active" is the decoder without the experts that a token skips.
    """
    parts: dict[str, int] = {}
    inactive, text = 0, model.config.get_text_config()
    for name, parameter in model.named_parameters():
        part = next((part for part in ("tower", "projector") if f"{part}." in name), "decoder")
        parts[part] = parts.get(part, 0) + parameter.numel()
        if ".mlp.experts." in name:
            inactive += parameter.numel() * (text.num_experts - text.num_experts_per_tok) // text.num_experts
    if inactive:
        parts["active"] = parts["decoder"] - inactive
    return parts
