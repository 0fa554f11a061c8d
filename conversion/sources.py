"""What every release was published with: its vision tower and its tokenizer, found here or fetched from the Hub."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..common import read_json
from .published import PUBLISHED
from .reading import TOKENIZER_FILES, NotFetchedError, download, download_command, weight_files
from .tokenizers import IMAGE_TOKEN


@dataclass(frozen=True)
class Part:
    """A tower or tokenizer, and where it may be.

    Args:
        name: For messages.
        option: What names it to `minimind-v convert`.
        repository: On the Hub.
        folders: From the current folder, from that of the checkpoint, and from the one above; the first is where to
            put it.
        files: Of the repository; None is all that a model needs.
        fits: Whether a folder holds it.
    """

    name: str
    option: str
    repository: str
    folders: tuple[str, ...]
    files: list[str] | None
    fits: Callable[[Path], bool]


class MissingPartError(Exception):
    """A part is not here and cannot be fetched, for this reason."""


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
        published = PUBLISHED.values()
        source = next((s for s in published if repository in (model.hub for model in s.models)), None)
        if source is None:
            raise
        own = f"./{repository.partition('/')[2]}"
        model = download_command(repository, None, own, hub)
        tower = download_command(source.tower.hub, None, f"./{source.tower_folder}", hub)
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
    found: dict[str, Path] = {}
    notes: list[str] = []
    missing: list[Part] = []
    reasons: list[str] = []
    for part in [tower_of(release)] * needs_tower + [tokenizer_of(release)] * needs_tokenizer:
        try:
            found[part.name], origin = find(part, near, hub)
            notes.append(f"{part.name} of {origin}")
        except MissingPartError as error:
            missing.append(part)
            reasons.append(str(error))
    if missing:
        names = " and no ".join(part.name for part in missing)
        commands = [download_command(part.repository, part.files, f"./{part.folders[0]}", hub) for part in missing]
        options = " and ".join(part.option for part in missing)
        problem = (
            f"there is no {names} of {release} here, and none was fetched ({' and '.join(dict.fromkeys(reasons))}). "
            f"Where there is a connection, run {' && '.join(commands)} (here, or where the checkpoint is), or name "
            f"what you have with {options} of minimind-v convert"
        )
        if missing[0].name == "vision tower":
            raise ValueError(problem[0].upper() + problem[1:] + ".")
        notes.append(f"no tokenizer was given, so the output has no processor: {problem}")
    return found.get("vision tower"), found.get("tokenizer"), notes


def tower_of(release: str) -> Part:
    """The tower of a release. A clone of its repository often lies just beside the checkpoint."""
    source = PUBLISHED[release]
    folders = (source.tower_folder, Path(source.tower_folder).name)
    return Part("vision tower", "--vision-encoder", source.tower.hub, folders, None, is_tower)


def tokenizer_of(release: str) -> Part:
    """The tokenizer of a release."""
    source, fits = PUBLISHED[release], functools.partial(is_tokenizer, release=release)
    folders = (source.tokenizer_folder,)
    return Part("tokenizer", "--tokenizer", source.tokenizer.hub, folders, TOKENIZER_FILES, fits)


def find(part: Part, near: Path, hub: str) -> tuple[Path, str]:
    """Folder of a part, here or in the cache of the hub (where it is fetched to), and where it is from.

    Raises:
        MissingPartError: It is not here and cannot be fetched.
    """
    places = [base / folder for base in (Path(), near, near.parent) for folder in part.folders]
    if place := next(filter(part.fits, places), None):
        return place, str(place)
    try:
        place = download(part.repository, part.files, hub=hub)
    except NotFetchedError as error:
        raise MissingPartError(error.reason) from None
    if not part.fits(place):
        raise MissingPartError(f"{part.repository} has that of another release")
    return place, part.repository


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
    added = {token["id"]: token["content"] for token in read_json(folder / "tokenizer.json").get("added_tokens", [])}
    first = "<s>" if release in ("minimind1", "minimind2-early") else "<|im_start|>"
    return added.get(1) == first and (IMAGE_TOKEN in added.values()) == release.startswith("minimind3")
