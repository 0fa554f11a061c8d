"""Checkpoints of the original project, converted once and kept beside the Hub's cache."""

import hashlib
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import constants

from ..common import atomic_output, quiet_library, read_json
from .convert import convert_checkpoint
from .reading import is_local
from .sources import fetch_checkpoint


def convert_once(source: str | Path, tell: Callable[[str], None] = print) -> str | Path:
    """A checkpoint of this package: `source` itself, or its conversion if it is of the original project.

    Conversions are in `$HF_HOME/minimind-v/converted`, one of each revision of a repository, and of each state of a
    local file or folder. What is deleted there is made again.

    Args:
        source: Checkpoint folder, `.pth` file or Hub repository.
        tell: Says in a line that something is converted.

    Returns:
        `source`, or the folder of its conversion.

    Raises:
        NotFetchedError: The repository is not in the cache and cannot be fetched.
        FileNotFoundError: It has no weights in the form of transformers, or there is no tokenizer for it.
        ValueError, OSError: As [`convert_checkpoint`] raises them.
    """
    revision = find_revision(source)
    if revision is None:
        return source
    is_here = is_local(source)
    name = Path(source).resolve().name if is_here else str(source).replace("/", "--")
    target = Path(constants.HF_HOME, "minimind-v", "converted", version("minimind-v"), f"{name}-{revision[:12]}")
    while not target.exists():
        try:
            with atomic_output(target) as folder:
                tell(f"{source} is a checkpoint of the original project: converting it, once, into {target}")
                checkpoint = source if is_here else fetch_checkpoint(str(source), revision=revision)
                summary = convert_checkpoint(checkpoint, folder)
                if not (folder / "tokenizer_config.json").exists():
                    raise FileNotFoundError(summary.notes[-1])
        except BlockingIOError:  # another process is at it
            time.sleep(1)
        except FileExistsError:
            if not target.exists():
                raise
    return target


def find_revision(source: str | Path) -> str | None:
    """The commit of a repository of the original, or a hash of a local checkpoint's state; None for anything else."""
    if not is_local(source):
        with quiet_library():  # a bar for one small file, at every use
            folder = fetch_checkpoint(str(source), files=["config.json"])
        if not (folder / "config.json").exists():  # weights of the original, or none at all
            return fetch_checkpoint(str(source)).name
        return folder.name if is_original(read_json(folder / "config.json")) else None
    path = Path(source).expanduser()
    if path.is_dir():
        if not (path / "config.json").exists() or not is_original(read_json(path / "config.json")):
            return None
        files = sorted(path.iterdir())
    elif path.is_file():
        files = [path]
    else:
        return None
    state = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.is_file()]
    return hashlib.sha256(repr(state).encode()).hexdigest()


def is_original(config: dict[str, Any]) -> bool:
    """Whether a `config.json` is the original's: its composite type has a hyphen, its text type is ours as well."""
    code = config.get("auto_map", {}).get("AutoConfig", "")
    is_ours = code.rpartition("--")[2].startswith("configuration_minimind_v.")
    return config.get("model_type") in ("minimind-v", "minimind") and not is_ours
