"""Writes everything that a model repository holds into a folder: weights, configuration, processor, code, card."""

import contextlib
import errno
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import pipeline

from ..common import WeightsError, atomic_output, load_model, load_processor, read_json
from .card import BEGIN, write_card
from .checks import CODE, GREEDY, PROMPT, card_images

PACKAGE = Path(__file__).resolve().parents[1]  # the code that is published is the code that runs here
WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json")


def assemble(checkpoint: str | Path, output: str | Path, *, repo_id: str, license: str | None = None) -> Path:
    """Writes all that the repository will hold into a folder, which appears only when it is complete.

    The weights are copied byte for byte; configuration, processor and tokenizer are written anew, with the code of
    this package. A card (`README.md`) of the checkpoint stays: its metadata win, its text stands first, and its
    sections take the place of those with the same heading.

    Args:
        checkpoint: Folder written by `save_pretrained`, `Trainer`, or this package's commands.
        output: Folder to write; one that was assembled before is replaced.
        repo_id: `USER/REPO`, for the commands in the card.
        license: Licence of the weights, as the Hub calls it; left out, the card's, else `"apache-2.0"`.

    Returns:
        The output folder.

    Raises:
        FileNotFoundError: No such folder, no weights in safetensors, or no processor.
        FileExistsError: The output exists, is not empty, and was not assembled.
        ValueError: Not a vision-language checkpoint of this package, or its files are broken.
        OSError: The disk is full, or the output cannot be written.
    """
    checkpoint, output = Path(checkpoint).expanduser(), Path(output).expanduser()
    check_checkpoint(checkpoint)
    check_output(output, checkpoint)
    weights = [path for path in checkpoint.iterdir() if WEIGHTS.fullmatch(path.name)]
    with clear_disk_errors(output), atomic_output(output, overwrite=True) as folder:
        check_space(weights, output.parent)
        model, processor = load(checkpoint)
        model.config.save_pretrained(folder)
        model.generation_config.save_pretrained(folder)
        processor.save_pretrained(folder)
        for path in (*weights, *(PACKAGE / name for name in CODE), PACKAGE / "LICENSE"):
            shutil.copyfile(path, folder / path.name)
        shutil.copyfile(PACKAGE / "examples" / "images" / "apple.png", folder / "example.png")
        make_pipeline: Any = pipeline  # whose overloads know the library's own tasks only
        captioner = make_pipeline("image-to-text", model=model, processor=processor, device="cpu")
        answers = captioner(str(folder / "example.png"), prompt=PROMPT, generate_kwargs=dict(GREEDY))
        card = write_card(checkpoint, model, repo_id, license, caption=answers[0]["generated_text"])
        card.save(folder / "README.md")
        for name in card_images(card.text) - {"example.png"}:
            if (checkpoint / name).is_file():
                shutil.copyfile(checkpoint / name, folder / name)
    return output


def check_checkpoint(checkpoint: Path) -> None:
    """Raises unless the folder has what a vision-language checkpoint of this package has."""
    if not checkpoint.is_dir():
        raise FileNotFoundError(f"{checkpoint} is no folder. Name the folder of a checkpoint.")
    names = {path.name for path in checkpoint.iterdir()}
    if "adapter_config.json" in names:
        raise ValueError(
            f"{checkpoint} holds a LoRA adapter, which does not load by itself. Merge it first: "
            "PeftModel.from_pretrained(base, adapter).merge_and_unload().save_pretrained(folder)."
        )
    kind = read_json(checkpoint / "config.json").get("model_type") if "config.json" in names else None
    if kind != "minimind_v":
        raise ValueError(
            f"{checkpoint} is not a vision-language checkpoint of this package: its config.json must say model_type "
            f"'minimind_v'; it says {kind!r}. (minimind-v convert makes one of the original's weights.)"
        )
    if not any(WEIGHTS.fullmatch(name) for name in names):
        raise FileNotFoundError(f"{checkpoint} has no model.safetensors. Save the model with save_pretrained.")
    if "tokenizer.json" not in names or not names & {"processor_config.json", "preprocessor_config.json"}:
        raise FileNotFoundError(
            f"{checkpoint} has no processor (tokenizer.json and processor_config.json). Save the one that the model "
            f"was trained with there: processor.save_pretrained({str(checkpoint)!r})."
        )


def check_output(output: Path, checkpoint: Path) -> None:
    """Raises unless nothing is lost when `output` is replaced."""
    if checkpoint.resolve().is_relative_to(output.resolve()):
        raise ValueError(f"The output {output} holds the checkpoint. Choose another folder with --output.")
    card = output / "README.md"
    assembled = card.is_file() and BEGIN in card.read_text(encoding="utf-8")
    if output.exists() and not assembled and (output.is_file() or any(output.iterdir())):
        raise FileExistsError(f"{output} exists and was not assembled here. Choose another folder with --output.")


def check_space(weights: list[Path], disk: Path) -> None:
    """Raises if the weights do not fit, before time is spent on them."""
    needed, free = sum(path.stat().st_size for path in weights), shutil.disk_usage(disk).free
    if free < needed:
        raise OSError(errno.ENOSPC, f"{needed / 1e6:.0f} MB are needed, {free / 1e6:.0f} MB are free")


@contextlib.contextmanager
def clear_disk_errors(output: Path) -> Iterator[None]:
    """One clear OSError where the disk is full."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        advice = "Free some space, or choose another disk with --output."
        raise OSError(error.errno, f"No room to write {output} ({error.strerror}). {advice}") from error


def load(checkpoint: Path) -> tuple[Any, Any]:
    """Model and processor; raises a ValueError unless the files are whole and the weights fit the configuration."""
    try:
        return load_model(checkpoint, trust_remote_code=False), load_processor(checkpoint)
    except WeightsError as error:
        raise ValueError(str(error)) from error
    except Exception as error:  # broken files make the readers fail in many ways
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{checkpoint} cannot be loaded: {reason} Save it again.") from error
