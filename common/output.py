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
    if target.is_dir() and target.samefile(Path.cwd()):
        raise FileExistsError(f"{output} is the current folder, which cannot be replaced. Name a folder in it.")
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
            if target.is_dir() and (work / "new").is_dir():
                shutil.copymode(target, work / "new")  # a folder that others may not read stays so
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
