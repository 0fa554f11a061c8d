"""What the tooling folders share: output that is whole or absent, JSON files, numbers of parameters."""

import contextlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel


@contextlib.contextmanager
def atomic_output(output: Path, overwrite: bool = False) -> Iterator[Path]:
    """A path next to `output`; what the block writes there takes its place in the end, or vanishes if the block fails.

    Args:
        output: File or folder to write.
        overwrite: Replace what is there.

    Raises:
        FileExistsError: `output` is a file or a folder that is not empty, and `overwrite` is false.
    """
    if not overwrite and output.exists() and (output.is_file() or any(output.iterdir())):
        raise FileExistsError(f"{output} exists already. Choose another name, or overwrite it with --overwrite.")
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}-", dir=output.parent) as beside:
        old, new = Path(beside, "old"), Path(beside, "new")
        yield new
        if output.exists():
            output.rename(old)
        try:
            new.rename(output)
        except BaseException:
            if old.exists():
                old.rename(output)
            raise


def read_json(path: str | Path) -> Any:
    """Content of a JSON file.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is not JSON; the message names it.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not a JSON file: {error}") from error


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
