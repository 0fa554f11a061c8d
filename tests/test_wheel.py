"""The package as users get it: a wheel in an environment of its own, used outside the clone."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
from conftest import REPOSITORY, write_jsonl
from original import GOLDEN

pytest.importorskip("setuptools", minversion="77", reason="building needs setuptools 77 (extra: test)")
APPLE = REPOSITORY / "examples" / "images" / "apple.png"


def build(kind, source, folder):
    """A distribution of the sources, "sdist" or "wheel", made as `python -m build` does it."""
    code = f"from setuptools import build_meta; print(build_meta.build_{kind}({str(folder)!r}))"
    result = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    return folder / result.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    """The unpacked source distribution."""
    folder = tmp_path_factory.mktemp("sdist")
    with tarfile.open(build("sdist", REPOSITORY, folder)) as archive:
        archive.extractall(folder, filter="data")
    return next(path for path in folder.iterdir() if path.is_dir())


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory):
    return build("wheel", sdist, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory):
    """The wheel and pip, and from the running environment what the wheel depends on."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=True)
    install = [folder / "bin" / "python", "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", wheel]
    subprocess.run(install, check=True)
    site_packages = next(folder.glob("lib/python*/site-packages"))
    # Packages only: the lines of .pth files in these folders, such as those of an editable install, are not run
    running = [path for path in sys.path if path.endswith("-packages")]
    (site_packages / "running_environment.pth").write_text("\n".join(running) + "\n")
    return folder


@pytest.fixture
def run(environment, tmp_path):
    """Runs a program of the environment in an empty folder and returns what it prints."""
    variables = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "PYTHON"))}
    variables |= {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

    def run(program, *arguments):
        command = [environment / "bin" / program, *arguments]
        options = {"cwd": tmp_path, "env": variables, "capture_output": True, "encoding": "utf-8", "timeout": 200}
        result = subprocess.run(command, **options)
        assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
        return result.stdout

    return run


@pytest.mark.skipif(not (REPOSITORY / ".git").exists(), reason="the sources are not a clone")
def test_source_distribution_has_what_git_has(sdist):
    tracked = subprocess.check_output(["git", "ls-files", "-z"], cwd=REPOSITORY, text=True).split("\0")
    tracked = {name for name in tracked if not name.startswith(".") and (REPOSITORY / name).is_file()}
    found = {path.relative_to(sdist).as_posix() for path in sdist.rglob("*") if path.is_file()}
    assert tracked <= found, f"MANIFEST.in leaves out {sorted(tracked - found)}"


def test_wheel_has_the_packages_and_what_they_need(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name.split("/")[0].partition("-")[0] for name in names} == {"minimind_v", "minimind_v_cli"}
    assert {"minimind_v/LICENSE", "minimind_v/publishing/card_template.md", "minimind_v/hub_upload.py"} <= names
    images = {f"minimind_v/examples/images/{name}.png" for name in ("apple", "dog", "pizza", "sunflower")}
    assert {name for name in names if "/examples/" in name} == images
    assert not [name for name in names if "/tests/" in name or "/benchmarks/" in name]
    assert wheel.stat().st_size < 10e6


def test_caption(run, environment):
    where = run("python", "-c", "from importlib.util import find_spec; print(find_spec('minimind_v').origin)")
    assert Path(where.strip()).is_relative_to(environment)
    assert json.loads(run("minimind-v", "caption", APPLE))["caption"] == "Red apple."


def test_upload(run, environment, tmp_path):
    model = next(environment.glob("lib/python*/site-packages/minimind_v/checkpoints/minimind-v-emoji"))
    printed = run("minimind-v", "upload", model, "alice/emoji", "--dry-run", "--output", "out", "--license", "mit")
    assert "11 of 11 checks passed" in printed and "Would be sent to alice/emoji (main):" in printed
    assert "license: mit\n" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert (tmp_path / "out" / "LICENSE").read_bytes() == (REPOSITORY / "LICENSE").read_bytes()


def test_check(run, tmp_path):
    (tmp_path / "images").mkdir()
    shutil.copy(APPLE, tmp_path / "images")
    write_jsonl(tmp_path / "images" / "metadata.jsonl", [{"file_name": "apple.png", "text": "A red apple."}])
    printed = run("minimind-v", "check", "images", "--html", "check.html")
    assert "A red apple." in printed and "A red apple." in (tmp_path / "check.html").read_text(encoding="utf-8")


@pytest.mark.skipif(not GOLDEN.is_dir(), reason="no recorded checkpoints of the original")
def test_convert(run, tmp_path):
    case = GOLDEN / "g3v_dense"
    hparams = json.loads((case / "hparams.json").read_text(encoding="utf-8"))
    (tmp_path / "original.json").write_text(json.dumps(hparams["constructor_args"]))
    arguments = [case / "upstream.pth", "out", "--config", "original.json"]
    arguments += ["--vision-encoder", case / "vision_encoder", "--tokenizer", GOLDEN / "tokenizers" / "minimind3"]
    run("minimind-v", "convert", *arguments)
    assert json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))["model_type"] == "minimind_v"
    assert (tmp_path / "out" / "chat_template.jinja").is_file()
