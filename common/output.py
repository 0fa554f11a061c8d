"""Output that is whole or absent: one writer at a time, and nothing of the user is lost whatever happens."""

import contextlib
import ctypes
import errno
import os
import platform
import shutil
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout


@contextlib.contextmanager
def locked(output: Path) -> Iterator[None]:
    """Keeps every other process from writing `output` until the block ends, or this process does, also when killed.

    Args:
        output: File or folder in an existing folder. The lock is hidden files beside it.

    Raises:
        BlockingIOError: Another process writes it; the message says which one, where and since when.
    """
    path = Path(os.path.realpath(output))
    # Who holds it stands in a file of its own, because some versions of filelock empty the one that they wait for.
    path, holder = (path.with_name(f".{path.name}.{ending}") for ending in ("lock", "holder"))
    lock = FileLock(path, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        who = ""
        with contextlib.suppress(OSError):  # it may be ending
            who = holder.read_text(encoding="utf-8")
        advice = "Wait until it has ended, or choose another name."
        raise BlockingIOError(f"{output} is being written by {who or 'another process'}. {advice}") from None
    try:
        started = datetime.now().isoformat(" ", "seconds")
        holder.write_text(f"process {os.getpid()} on {platform.node()} since {started}", encoding="utf-8")
        yield
    finally:
        for file in (holder, path):  # while it is held, so that they are nobody else's
            with contextlib.suppress(OSError):  # Windows deletes no open file
                file.unlink()
        lock.release()


@contextlib.contextmanager
def atomic_output(output: Path, overwrite: bool = False) -> Iterator[Path]:
    """A path next to `output`; what the block writes there takes its place in the end, or vanishes if the block fails.

    One process at a time can do so. What a killed one left is put in order by the next.

    Args:
        output: File or folder to write.
        overwrite: Replace what is there.

    Raises:
        FileExistsError: `output` is a file or a folder that is not empty, and `overwrite` is false; or it was changed
            while the block ran, and is left as it is.
        BlockingIOError: Another process writes it.
    """
    target = Path(os.path.realpath(output))
    target.parent.mkdir(parents=True, exist_ok=True)
    with locked(target):
        work = target.with_name(f".{target.name}.unfinished")
        recover(work, target)
        before = contents(target)
        if before and not overwrite:
            raise FileExistsError(f"{output} exists already. Choose another name, or overwrite it with --overwrite.")
        work.mkdir()
        try:
            yield work / "new"
            if contents(target) != before:
                raise FileExistsError(f"{output} was changed meanwhile and is left as it is. Run it again.")
            put_in_place(work, target)
        except BaseException:
            if not (work / "old").exists():  # else it is the user's, and could not be moved back
                shutil.rmtree(work, ignore_errors=True)
            raise
        shutil.rmtree(work, ignore_errors=True)


def contents(path: Path) -> dict[Path, tuple[int, ...]]:
    """Identity, size and time of a file, or of all in a folder; nothing for an empty folder."""
    files = [path] if path.is_file() else path.rglob("*")
    return {file: (stat.st_ino, stat.st_size, stat.st_mtime_ns) for file in files for stat in [file.lstat()]}


def put_in_place(work: Path, output: Path) -> None:
    """Moves `work/new` to `output`, and what stood there into `work`."""
    new, old = work / "new", work / "old"
    try:
        if output.exists():
            if exchange(new, output):
                return
            output.rename(old)
        new.rename(output)
    except BaseException as error:
        if old.exists():
            old.rename(output)
        if not isinstance(error, OSError) or error.errno not in (errno.EBUSY, errno.EXDEV):
            raise
        fill_mount_point(work, output)


def fill_mount_point(work: Path, output: Path) -> None:
    """Copies `work/new` into an empty folder that cannot be moved, because it is a mount point."""
    if not output.is_dir() or any(output.iterdir()):
        raise FileExistsError(
            f"{output} is a mount point, which cannot be replaced. Empty it, or name a folder in it."
        )
    complete = (work / "new").rename(work / "complete")
    try:
        shutil.copytree(complete, output, dirs_exist_ok=True)
    except BaseException:
        for path in output.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        raise


def recover(work: Path, output: Path) -> None:
    """Finishes what a process was killed in, as by SIGKILL, if its result was whole; else removes it."""
    new, old, complete = work / "new", work / "old", work / "complete"
    if complete.exists():
        shutil.copytree(complete, output, dirs_exist_ok=True)
    elif new.exists() and old.exists():
        if output.exists():
            raise FileExistsError(f"{old} stood at {output} until a process was killed. Move one of them away.")
        new.rename(output)
    if work.exists():
        shutil.rmtree(work)


def exchange(one: Path, other: Path) -> bool:
    """Swaps two paths in one step, so that no moment is without either; says whether system and disk can do that."""
    libc, here, swap = ctypes.CDLL(None) if os.name == "posix" else None, -100, 2
    paths = os.fsencode(os.path.abspath(one)), os.fsencode(os.path.abspath(other))
    if hasattr(libc, "renameat2"):  # Linux
        return libc.renameat2(here, paths[0], here, paths[1], swap) == 0
    if hasattr(libc, "renamex_np"):  # macOS
        return libc.renamex_np(*paths, swap) == 0
    return False
<<<<<<< ours
=======


# --- Models ----------------------------------------------------------------------------------------------------------


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


def load_processor(source: str | Path) -> ProcessorMixin:
    """The processor of a checkpoint folder or Hub repository, from classes of the library and this package only.

    Raises:
        ValueError: It needs code of its own.
        OSError: There is none.
    """
    try:
        return AutoProcessor.from_pretrained(source, trust_remote_code=False)
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        message = f"The processor or tokenizer of {source} needs code of its own, which is not run here."
        raise ValueError(f"{message} Save it again with the classes of this package.") from error


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


# --- Files -----------------------------------------------------------------------------------------------------------


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
>>>>>>> theirs
