"""Checkpoints of any form -> tensors: a file, a folder or a Hub repository."""

import contextlib
import re
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError
from safetensors.torch import load_file

from ..common import read_json
from .published import modelscope_name

FILE_SUFFIXES = (".pth", ".pt", ".bin", ".safetensors", ".json")
TOKENIZER_FILES = ["tokenizer.json", "tokenizer_config.json"]


class NotFetchedError(FileNotFoundError):
    """A repository is not in the cache and cannot be fetched.

    Args:
        repository: Its name.
        reason: Why not.
        commands: Command lines that fetch it, and what goes with it, where there is a connection.
        advice: What to do then.
    """

    def __init__(self, repository: str, reason: str, commands: list[str], advice: str = "") -> None:
        super().__init__(
            f"{repository} is not in the cache and was not fetched ({reason}). Where there is a connection, run "
            f"{' && '.join(commands)}{advice}"
        )
        self.reason = reason


def is_local(source: str | Path) -> bool:
    """Whether this names a file or folder here, and not a Hub repository (`user/name`)."""
    is_repository = re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)) and not str(source).endswith(FILE_SUFFIXES)
    return Path(source).expanduser().exists() or not is_repository


def read_checkpoint(checkpoint: str | Path) -> tuple[dict[str, torch.Tensor], dict[str, Any], Path | None]:
    """Reads a file of tensors, or a folder in the form of transformers.

    Args:
        checkpoint: `.pth`, `.bin` or `.safetensors` file, or folder. Pickles are read with `weights_only=True`, so
            that they cannot run code.

    Returns:
        The tensors by name, the content of `config.json` (empty without one), and the folder (None for a file).

    Raises:
        FileNotFoundError: There is no such file or folder, or the folder holds no weights.
        ValueError: The file is not a checkpoint of tensors; the message says why.
    """
    path = Path(checkpoint)
    if path.is_file():
        return read_tensors(path), {}, None
    if not path.is_dir():
        raise FileNotFoundError(f"{checkpoint} is no file, no folder and no Hub repository (user/name).")
    config = read_json(path / "config.json") if (path / "config.json").exists() else {}
    return {name: tensor for file in weight_files(path) for name, tensor in read_tensors(file).items()}, config, path


def download(
    repository: str, files: list[str] | None = None, revision: str | None = None, hub: str = "huggingface"
) -> Path:
    """Folder in the cache with the files of a repository, which are fetched (with a progress bar) if need be.

    Args:
        repository: On the Hub, or the mirror that HF_ENDPOINT names, or on ModelScope.
        files: The ones to fetch; left out, configuration, tokenizer and one form of the weights.
        revision: Branch, tag or commit; left out, the main branch.
        hub: `"huggingface"` or `"modelscope"`.

    Raises:
        NotFetchedError: There is no connection, or no such repository.
        FileNotFoundError: The repository has no weights in the form of transformers.
        ImportError: The package modelscope is missing.
    """
    fetch: Any = snapshot_download if hub == "huggingface" else modelscope_download()
    name = modelscope_name(repository) if hub == "modelscope" else repository
    try:
        if files is not None:
            return Path(fetch(name, revision=revision, allow_patterns=files))
        for weights in ("*.safetensors", "pytorch_model*.bin"):
            folder = Path(fetch(name, revision=revision, allow_patterns=["*.json", "*.txt", weights]))
            with contextlib.suppress(FileNotFoundError):
                weight_files(folder)
                return folder
    except OSError as error:
        own = f"./{name.partition('/')[2]}"
        command = download_command(repository, files, own, hub)
        raise NotFetchedError(name, reason_of(error), [command], f", and name the folder {own}") from error
    raise FileNotFoundError(
        f"{name} has neither model.safetensors nor pytorch_model.bin. Fetch the file of weights that you mean, and "
        f"name that: {download_command(repository, ['FILE.pth'], './out', hub)}"
    )


def modelscope_download() -> Any:
    """The function of the package modelscope that is like `huggingface_hub.snapshot_download`."""
    try:
        from modelscope import snapshot_download
    except ImportError:
        advice = "pip install 'minimind-v[modelscope]'"
        raise ImportError(f"Fetching from ModelScope needs the package modelscope: {advice}") from None
    return snapshot_download


def download_command(repository: str, files: list[str] | None, folder: str, hub: str) -> str:
    """The command line that fetches files of a repository (None: all) into a folder."""
    if hub == "modelscope":
        words = ["modelscope download --model", modelscope_name(repository), *(files or []), "--local_dir", folder]
    else:
        words = ["hf download", repository, *(files or []), "--local-dir", folder]
    return " ".join(words)


def reason_of(error: OSError) -> str:
    """Why something was not fetched, in a few words."""
    if isinstance(error, RepositoryNotFoundError):
        return "there is no such repository, or it is private"
    if isinstance(error, LocalEntryNotFoundError):
        return "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "no connection"
    return str(error).strip().partition("\n")[0]


def weight_files(folder: Path) -> list[Path]:
    """The files that hold a folder's weights: one, or the shards that its index names."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{name}.index.json"
        if index.exists():
            return sorted({folder / shard for shard in read_json(index)["weight_map"].values()})
        if (folder / name).exists():
            return [folder / name]
    raise FileNotFoundError(f"{folder} has neither model.safetensors nor pytorch_model.bin. Name the file of weights.")


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The state dict of one file."""
    try:
        if path.suffix == ".safetensors":
            content = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip_file(path))
    except OSError:
        raise
    except Exception as error:  # what is no checkpoint makes the readers fail in many ways
        # Not their words: torch advises to set weights_only=False, which would run the code of a hostile file.
        is_code = "GLOBAL" in str(error)  # pickle's instruction that imports what it names
        reason = "it holds more than tensors, which could run code" if is_code else "another kind, or cut off"
        advice = "Name a .pth, .bin or .safetensors file of weights, or a folder of them."
        raise ValueError(f"{path} cannot be read as a checkpoint of tensors ({reason}). {advice}") from None
    if isinstance(content, dict) and isinstance(content.get("model"), dict):
        content = content["model"]  # the original's files for resuming also hold the optimizer
    if not isinstance(content, dict) or not content or not all(torch.is_tensor(value) for value in content.values()):
        raise ValueError(
            f"{path} does not hold a state dict (names and tensors); it holds a {type(content).__name__}."
        )
    # Prefixes that torch.compile and DistributedDataParallel leave
    return {re.sub(r"^(_orig_mod\.|module\.)+", "", name): tensor.contiguous() for name, tensor in content.items()}


def is_zip_file(path: Path) -> bool:
    """Whether the tensors can stay on disk until they are used (the form that torch writes since 1.6)."""
    with path.open("rb") as file:
        return file.read(2) == b"PK"
