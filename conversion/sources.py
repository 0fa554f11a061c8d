"""What every release was published with: its vision tower and its tokenizer, found here or fetched from the Hub."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..common import read_json
from .reading import TOKENIZER_FILES, NotFetchedError, download, download_command, weight_files
from .tokenizers import IMAGE_TOKEN


class MissingPart(Exception):
    """A tower or tokenizer that is not here and cannot be fetched.

    Args:
        reason: Why not.
        command: What gets it, where there is a connection.
    """

    def __init__(self, reason: str, command: str) -> None:
        super().__init__(f"{reason}: {command}")
        self.reason, self.command = reason, command


@dataclass(frozen=True)
class Published:
    """Where a release's tower and tokenizer are.

    Args:
        tower, tokenizer: Repositories of the Hub.
        tower_folder, tokenizer_folder: Where README and code of the original have them, in a clone of it.
        models: Repositories of the models themselves, in the form of transformers.
    """

    tower: str
    tower_folder: str
    tokenizer: str
    tokenizer_folder: str
    models: tuple[str, ...] = ()


PUBLISHED = {
    "minimind1": Published(
        tower="openai/clip-vit-base-patch32",
        tower_folder="model/clip_model/clip-vit-base-patch32",
        tokenizer="jingyaogong/minimind-v-v1",
        tokenizer_folder="model/minimind_tokenizer",
        models=("jingyaogong/minimind-v-v1", "jingyaogong/minimind-v-v1-small"),
    ),
    "minimind2-early": Published(
        tower="openai/clip-vit-base-patch16",
        tower_folder="model/vision_model/clip-vit-base-patch16",
        # Its tokenizer.json is that of the release before, byte for byte; MiniMind2-V may hold the later release's.
        tokenizer="jingyaogong/minimind-v-v1",
        tokenizer_folder="model/minimind_tokenizer",
    ),
    "minimind2": Published(
        tower="openai/clip-vit-base-patch16",
        tower_folder="model/vision_model/clip-vit-base-patch16",
        tokenizer="jingyaogong/MiniMind2-V",
        tokenizer_folder="model",
        models=("jingyaogong/MiniMind2-V", "jingyaogong/MiniMind2-Small-V"),
    ),
    "minimind3-naflex": Published(
        tower="jingyaogong/siglip2-base-p16-ve",
        tower_folder="model/siglip2-base-p16-ve",
        tokenizer="jingyaogong/minimind-3v",
        tokenizer_folder="model",
    ),
    "minimind3-p16": Published(
        tower="jingyaogong/siglip2-base-p16-256-ve",
        tower_folder="model/siglip2-base-p16-256-ve",
        tokenizer="jingyaogong/minimind-3v",
        tokenizer_folder="model",
    ),
    "minimind3": Published(
        tower="jingyaogong/siglip2-base-p32-256-ve",
        tower_folder="model/siglip2-base-p32-256-ve",
        tokenizer="jingyaogong/minimind-3v",
        tokenizer_folder="model",
        models=("jingyaogong/minimind-3v", "jingyaogong/minimind-3v-moe"),
    ),
}
OPTIONS = {"vision tower": "--vision-encoder", "tokenizer": "--tokenizer"}


def fetch_checkpoint(
    repository: str, files: list[str] | None = None, revision: str | None = None, hub: str = "huggingface"
) -> Path:
    """Folder of a checkpoint's repository, as [`download`] gives it, and with the same arguments.

    Raises:
        NotFetchedError: It cannot be had. The message lists what its conversion needs, if it is one of the original's.
    """
    try:
        return download(repository, files, revision, hub)
    except NotFetchedError as error:
        source = next((source for source in PUBLISHED.values() if repository in source.models), None)
        if source is None:
            raise
        own = f"./{repository.partition('/')[2]}"
        model = download_command(repository, [], own, hub)
        tower = download_command(source.tower, [], f"./{source.tower_folder}", hub)
        raise NotFetchedError(repository, error.reason, [model, tower], f", and name the folder {own}") from error


def find_parts(
    release: str, near: Path, needs_tower: bool, needs_tokenizer: bool, hub: str = "huggingface"
) -> tuple[Path | None, Path | None, list[str]]:
    """What a release was published with: found where the original's README has people put it, or else fetched.

    Args:
        release: One of [`PUBLISHED`].
        near: Folder of the checkpoint. It, the folder above and the current one are searched.
        needs_tower, needs_tokenizer: What to find.
        hub: Where to fetch from, as for [`download`].

    Returns:
        Folder of the tower, folder of the tokenizer, and notes where they are from. What is not needed is None, and
        so is a tokenizer that cannot be had, because the model is whole without it; a note says how to get it.

    Raises:
        ValueError: The tower cannot be had. The message says how to get all that is missing.
    """
    source = PUBLISHED[release]
    searches = {}
    if needs_tower:
        # A clone of the tower's repository often lies just beside the checkpoint.
        folders = [source.tower_folder, Path(source.tower_folder).name]
        searches["vision tower"] = (source.tower, folders, is_tower, None)
    if needs_tokenizer:
        fits = functools.partial(is_tokenizer, release=release)
        searches["tokenizer"] = (source.tokenizer, [source.tokenizer_folder], fits, TOKENIZER_FILES)
    found: dict[str, Path] = {}
    notes: list[str] = []
    missing: dict[str, MissingPart] = {}
    for part, search in searches.items():
        try:
            found[part], origin = find(near, *search, hub)
            notes.append(f"{part} of {origin}")
        except MissingPart as error:
            missing[part] = error
    if missing:
        problem = describe_missing(missing, release)
        if "vision tower" in missing:
            raise ValueError(problem[0].upper() + problem[1:] + ".")
        notes.append(f"no tokenizer was given, so the output has no processor: {problem}")
    return found.get("vision tower"), found.get("tokenizer"), notes


def describe_missing(missing: dict[str, MissingPart], release: str) -> str:
    """What is missing, why, and how to get it."""
    reasons = " and ".join(dict.fromkeys(error.reason for error in missing.values()))
    commands = " && ".join(error.command for error in missing.values())
    options = " and ".join(OPTIONS[part] for part in missing)
    return (
        f"there is no {' and no '.join(missing)} of {release} here, and none was fetched ({reasons}). Where there is "
        f"a connection, run {commands} (here, or where the checkpoint is), or name what you have with {options} of "
        "minimind-v convert"
    )


def find(
    near: Path, repository: str, folders: list[str], fits: Callable[[Path], bool], files: list[str] | None, hub: str
) -> tuple[Path, str]:
    """A folder here, or else that of a repository in the Hub's cache, where it is fetched to.

    Args:
        near: Folder of the checkpoint.
        repository: On the Hub.
        folders: Where it may be, from the current folder, from `near`, and from the folder above that.
        fits: Whether a folder holds what is looked for.
        files: Of the repository; None is all that a model needs.
        hub: Where it is, as for [`download`].

    Returns:
        The folder, and its name or that of the repository.

    Raises:
        MissingPart: It is not here and cannot be fetched.
    """
    places = [base / folder for base in (Path(), near, near.parent) for folder in folders]
    if place := next(filter(fits, places), None):
        return place, str(place)
    try:
        place, reason = download(repository, files, hub=hub), f"{repository} holds that of another release"
        if fits(place):
            return place, repository
    except NotFetchedError as error:
        reason = error.reason
    command = download_command(repository, files or [], f"./{folders[0]}", hub)
    raise MissingPart(reason, command)


def is_tower(folder: Path) -> bool:
    """Whether this is a folder of a model: a clone without Git LFS has pointers in the place of weights."""
    try:
        return (folder / "config.json").exists() and all(file.stat().st_size > 1000 for file in weight_files(folder))
    except FileNotFoundError:
        return False


def is_tokenizer(folder: Path, release: str) -> bool:
    """Whether this folder has the tokenizer of a release; in a clone of the original it may be another's."""
    if not (folder / "tokenizer.json").exists():
        return False
    added = {token["id"]: token["content"] for token in read_json(folder / "tokenizer.json")["added_tokens"]}
    first = "<s>" if release in ("minimind1", "minimind2-early") else "<|im_start|>"
    return added.get(1) == first and (IMAGE_TOKEN in added.values()) == release.startswith("minimind3")
