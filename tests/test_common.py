"""Output that is whole or absent, through real processes, signals and mount points; models that are whole."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import CHECKPOINT
from safetensors.torch import load_file, save_file
from transformers import pipeline
from transformers.pipelines import PIPELINE_REGISTRY
from transformers.utils import logging

from minimind_v.common import CheckedModel, WeightsError, atomic_output, quiet_library
from minimind_v.common import output as writing
from minimind_v.publishing import assemble
from minimind_v_cli.__main__ import main

# --- Output ----------------------------------------------------------------------------------------------------------

# argv = the output. Writes a folder that holds "new", as `body` says; a line on stdout says that it has begun.
WRITER = """
import os, signal, sys, time
from pathlib import Path
from minimind_v.common import output as writing
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs inherit that it is ignored
output = Path(sys.argv[1])
def kill(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)
{before}
with writing.atomic_output(output, overwrite=True) as folder:
    folder.mkdir()
    (folder / "file.txt").write_text("new")
    print("begun", flush=True)
    {body}
"""
# As on a system that cannot swap two paths: killed between the two renames.
KILLED_BETWEEN = """
writing.exchange = lambda *_: False
rename = Path.rename
def rename_once(*paths):
    rename(*paths)
    kill()
Path.rename = rename_once
"""
KILLED_AFTER_EXCHANGE = "exchange = writing.exchange; writing.exchange = lambda *paths: exchange(*paths) and kill()"


@contextlib.contextmanager
def writer(output, before="", body="time.sleep(60)"):
    """A process that has begun to write `output`."""
    code = WRITER.format(before=before, body=body)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen([sys.executable, "-c", code, output], stdout=subprocess.PIPE, env=environment) as process:
        assert process.stdout.readline() == b"begun\n"
        try:
            yield process
        finally:
            process.kill()


def write(output, text="mine", overwrite=True):
    with atomic_output(output, overwrite) as folder:
        folder.mkdir()
        (folder / "file.txt").write_text(text)


def read(output):
    assert [path.name for path in output.iterdir()] == ["file.txt"]
    return (output / "file.txt").read_text()


@pytest.fixture
def output(tmp_path):
    """A folder of the user's, and nothing beside it."""
    write(tmp_path / "out", "old")
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]
    return tmp_path / "out"


def test_second_writer_is_told_of_the_first(output):
    with writer(output) as process:
        with pytest.raises(BlockingIOError, match=f"is being written by process {process.pid} on .* since 20.* Wait"):
            write(output)
        assert read(output) == "old"
    write(output)  # its lock died with it, and what it had written is gone
    assert read(output) == "mine" and list(output.parent.iterdir()) == [output]


@pytest.mark.parametrize("before", [KILLED_BETWEEN, KILLED_AFTER_EXCHANGE])
def test_killed_while_one_takes_the_place_of_the_other(before, output):
    with writer(output, before, body="pass") as process:
        assert process.wait(60) == -signal.SIGKILL
    if before is KILLED_AFTER_EXCHANGE:
        assert read(output) == "new"
    with pytest.raises(FileExistsError, match="exists already"):
        write(output, overwrite=False)  # the next run, here one that does not overwrite, puts it in order
    assert read(output) == "new" and list(output.parent.iterdir()) == [output]


def test_killed_between_the_renames_and_made_anew_by_the_user(output):
    with writer(output, KILLED_BETWEEN, body="pass") as process:
        assert process.wait(60) == -signal.SIGKILL
    output.mkdir()
    (output / "file.txt").write_text("newest")
    with pytest.raises(FileExistsError, match="until a process was killed"):
        write(output)
    assert read(output) == "newest" and read(output.parent / ".out.unfinished" / "old") == "old"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_of_the_command_leave_nothing(number, output):
    before = "from minimind_v_cli.__main__ import exit_on_sigterm\nexit_on_sigterm()"
    with writer(output, before) as process:
        process.send_signal(number)
        process.wait(60)
    assert read(output) == "old" and list(output.parent.iterdir()) == [output]


@pytest.mark.parametrize("existed", [False, True])
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_the_user_makes_meanwhile_stays(kind, existed, tmp_path):
    output = tmp_path / "out"
    if existed:
        output.mkdir() if kind == "folder" else output.write_text("old")
        (output / "file.txt" if kind == "folder" else output).write_text("old")
    with (
        pytest.raises(FileExistsError, match="was changed meanwhile and is left as it is"),
        atomic_output(output, overwrite=existed) as new,
    ):
        new.write_text("new")
        if kind == "folder":
            output.mkdir(exist_ok=True)
        (output / "file.txt" if kind == "folder" else output).write_text("the user's")
    assert (output / "file.txt" if kind == "folder" else output).read_text() == "the user's"
    assert list(tmp_path.iterdir()) == [output]


@pytest.mark.parametrize("swaps", [True, False])
def test_files_and_links_are_replaced(swaps, tmp_path, monkeypatch):
    if not swaps:
        monkeypatch.setattr(writing, "exchange", lambda *_: False)
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").write_text("old")
    (tmp_path / "link").symlink_to(Path("there", "file"))
    with atomic_output(tmp_path / "link", overwrite=True) as new:
        new.write_text("new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "there" / "file").read_text() == "new"
    assert len(list(tmp_path.rglob("*"))) == 3


@pytest.fixture(params=["tmpfs", "bind"])
def mount_point(request, tmp_path):
    """An empty folder that cannot be moved: of another disk, and of the same."""
    (tmp_path / "elsewhere").mkdir()
    folder = tmp_path / "out"
    folder.mkdir()
    source = ["-t", "tmpfs", "tmpfs"] if request.param == "tmpfs" else ["--bind", tmp_path / "elsewhere"]
    with contextlib.suppress(FileNotFoundError):
        if subprocess.run(["mount", *source, folder], capture_output=True).returncode == 0:
            yield folder
            subprocess.run(["umount", folder], check=True)
            return
    pytest.skip("a mount point can be made by root only")


def test_mount_point(mount_point):
    write(mount_point, overwrite=False)
    assert read(mount_point) == "mine"
    with pytest.raises(FileExistsError, match="exists already"):
        write(mount_point, "again", overwrite=False)
    with pytest.raises(FileExistsError, match="is a mount point, which cannot be replaced"):
        write(mount_point, "again")
    assert read(mount_point) == "mine" and not list(mount_point.parent.glob(".*"))


def test_killed_while_a_mount_point_is_filled(mount_point):
    before = "writing.shutil.copytree = kill"
    with writer(mount_point, before, body="pass") as process:
        assert process.wait(60) == -signal.SIGKILL
    with pytest.raises(FileExistsError, match="exists already"):
        write(mount_point, overwrite=False)
    assert read(mount_point) == "new" and not list(mount_point.parent.glob(".*"))


# --- Models ----------------------------------------------------------------------------------------------------------


def drop(part):
    return lambda tensors: [tensors.pop(name) for name in list(tensors) if part in name]


def fill(name, value):
    return lambda tensors: tensors[name].fill_(value)


NORM, HEAD = "model.language_model.norm.weight", "model.language_model.embed_tokens.weight"
BROKEN = {
    "no projector": (drop("multi_modal_projector"), r"missing: model\.multi_modal_projector\.\S+"),
    "no tower": (drop("vision_tower"), r"missing: model\.vision_tower\.\S+.* and \d+ more\. Save"),
    "no norm": (drop(NORM), rf"missing: {NORM}\. Save or fetch it again"),
    "unknown": (lambda tensors: tensors.update(more=torch.ones(1)), r"unknown: more\."),
    "shape": (lambda tensors: tensors.update({NORM: torch.ones(3)}), rf"of the wrong shape: {NORM} \(3,\) instead of"),
    "NaN": (fill(NORM, float("nan")), rf"with NaN or infinity: {NORM}\."),
    "infinity": (fill(HEAD, float("inf")), rf"with NaN or infinity: {HEAD}\."),
    "zeros": (
        fill("model.multi_modal_projector.linear_2.weight", 0),
        r"all zeros: model\.multi_modal_projector\.linear_2",
    ),
}


@pytest.fixture(params=BROKEN)
def broken(request, tmp_path):
    """A checkpoint whose weights are not whole, and what is said of them."""
    change, message = BROKEN[request.param]
    folder = shutil.copytree(CHECKPOINT, tmp_path / "broken")
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder, message


def test_broken_weights_give_no_answer(broken, capfd):
    """In the command line and in publishing, in one line, which names the tensors."""
    folder, message = broken
    image = str(CHECKPOINT.parents[1] / "examples" / "images" / "apple.png")
    with pytest.raises(SystemExit) as end:
        main(["caption", image, "--model", str(folder)])
    assert re.match(rf"error: The weights of {folder} are broken\. Tensors {message}", end.value.code)
    with pytest.raises(ValueError, match=message):
        assemble(folder, folder.parent / "output", repo_id="alice/broken")
    assert capfd.readouterr() == ("", "")


def test_pipelines_refuse_broken_weights(broken, monkeypatch):
    folder, message = broken
    monkeypatch.setitem(PIPELINE_REGISTRY.supported_tasks["image-to-text"], "pt", (CheckedModel,))
    with pytest.raises(WeightsError, match=message):
        pipeline("image-to-text", model=str(folder))


def test_pipeline_options_reach_the_model(monkeypatch):
    monkeypatch.setitem(PIPELINE_REGISTRY.supported_tasks["image-to-text"], "pt", (CheckedModel,))
    captioner = pipeline("image-to-text", model=str(CHECKPOINT), dtype=torch.float16)
    assert captioner.model.dtype == torch.float16 and captioner.model.config.dtype == torch.float16


def test_logits_that_are_not_finite_give_no_answer(tmp_path, capsys):
    folder = shutil.copytree(CHECKPOINT, tmp_path / "huge")
    tensors = load_file(folder / "model.safetensors")
    tensors[NORM] *= 1e38
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    image = str(CHECKPOINT.parents[1] / "examples" / "images" / "apple.png")
    with pytest.raises(SystemExit) as end:
        main(["caption", image, "--model", str(folder)])
    assert end.value.code.startswith("error: The model's logits are not finite.") and not capsys.readouterr().out


def test_library_speaks_as_before():
    bars, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    with pytest.raises(OSError), quiet_library():
        assert not logging.is_progress_bar_enabled()
        raise OSError
    assert (logging.is_progress_bar_enabled(), logging.get_verbosity()) == (bars, verbosity)


def test_an_empty_folder_keeps_its_mode(tmp_path, monkeypatch):
    output = tmp_path / "output"
    output.mkdir()
    output.chmod(0o700)
    with atomic_output(output) as folder:
        folder.mkdir()
    assert output.stat().st_mode & 0o777 == 0o700
    monkeypatch.chdir(output)
    with pytest.raises(FileExistsError, match="is the current folder"), atomic_output(Path(".")) as folder:
        folder.mkdir()
