"""A Space of the Hub that shows the web demo with one checkpoint: assemble, verify, upload."""

import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, RepoCard
from packaging.requirements import Requirement
from packaging.version import Version

from ..common import atomic_output, read_json
from ..demo import EXAMPLES, IMAGES
from .assemble import PACKAGE, WEIGHTS, check_checkpoint, clear_disk_errors
from .checks import CODE, CONFIGURATION, Check, check_privacy
from .publish import print_plan
from .upload import check_target, check_token, clear_hub_errors, compare
from .verify import Report, fresh_environment, list_files

CHECK = Path(__file__).with_name("space_check.py")
PARTS = ("common", "conversion", "demo", "inference")  # of this package: what the demo needs
CHECKPOINT_FILES = (*CONFIGURATION, "chat_template.jinja", "preprocessor_config.json", "tokenizer.json")
MARK = "<!-- written by hub_upload.py -->"
APP = '''"""The web demo of MiniMind-V, as `minimind-v demo` shows it."""

from pathlib import Path

from minimind_v.demo.app import LAUNCH, Demo, build

page = build(Demo({{{name!r}: {source}}}))

if __name__ == "__main__":
    page.launch(**LAUNCH)
'''
CARD = """
# {title}

{mark}
Ask {name} about your own pictures, compare two, and see where the model looks.

A model of this size knows little, and can be wrong and sound sure: do not let it decide anything about people.

The page is `minimind-v demo` of MiniMind-V for transformers; its code is beside this file.
"""


def assemble_space(model: str | Path, output: str | Path, *, repo_id: str, license: str = "apache-2.0") -> Path:
    """Writes all that the Space will hold into a folder: app, requirements, card, the code, and a local checkpoint.

    Args:
        model: Checkpoint folder, which the Space gets a copy of, or Hub repository, from which it loads.
        output: Folder to write; one that was assembled before is replaced.
        repo_id: `USER/SPACE`.
        license: As the Hub calls it.

    Returns:
        The output folder.

    Raises:
        FileExistsError: The output exists and was not assembled.
        FileNotFoundError, ValueError, OSError: As [`assemble`].
    """
    output, checkpoint = Path(output).expanduser(), Path(model).expanduser()
    is_local = checkpoint.is_dir()
    if is_local:
        check_checkpoint(checkpoint)
    check_replaceable(output)
    name = checkpoint.resolve().name if is_local else str(model)
    with clear_disk_errors(output), atomic_output(output, overwrite=True) as folder:
        copy_package(folder / "minimind_v")
        if is_local:
            (folder / "model").mkdir()
            for path in sorted(checkpoint.iterdir()):
                if path.name in CHECKPOINT_FILES or WEIGHTS.fullmatch(path.name):
                    shutil.copyfile(path, folder / "model" / path.name)
        source = 'Path(__file__).with_name("model")' if is_local else repr(name)
        app = APP.format(name=name, source=source)
        (folder / "app.py").write_text(
            app if is_local else app.replace("from pathlib import Path\n\n", ""), encoding="utf-8"
        )
        (folder / "requirements.txt").write_text("\n".join(requirements()) + "\n", encoding="utf-8")
        sdk = {"sdk": "gradio", "sdk_version": importlib.metadata.version("gradio"), "app_file": "app.py"}
        sdk["python_version"] = ".".join(platform.python_version_tuple()[:2])
        write_space_card(folder, CARD, repo_id, name, sdk | {"license": license}, is_local)
    return output


def check_replaceable(output: Path) -> None:
    """Raises a FileExistsError unless the folder is empty, absent, or an assembled Space."""
    card = output / "README.md"
    if output.exists() and any(output.iterdir()) and not (card.is_file() and MARK in card.read_text(encoding="utf-8")):
        raise FileExistsError(f"{output} exists and was not assembled here. Choose another folder with --output.")


def copy_package(target: Path) -> None:
    """The parts of this package that the demo needs."""
    target.mkdir(parents=True)
    for name in (*CODE, "__init__.py", "LICENSE"):
        shutil.copyfile(PACKAGE / name, target / name)
    for part in PARTS:
        shutil.copytree(PACKAGE / part, target / part, ignore=shutil.ignore_patterns("__pycache__", "*.pyi"))
    (target / "examples" / "images").mkdir(parents=True)
    for name in EXAMPLES:
        shutil.copyfile(IMAGES / f"{name}.png", target / "examples" / "images" / f"{name}.png")


def requirements() -> list[str]:
    """What this package requires, in the versions that are here; gradio comes with the Space."""
    needed = [Requirement(line) for line in importlib.metadata.requires("minimind-v") or []]
    names = sorted(each.name for each in needed if each.marker is None)
    return [f"{name}=={Version(importlib.metadata.version(name)).public}" for name in names]


def write_space_card(
    folder: Path, text: str, repo_id: str, name: str, metadata: dict[str, Any], is_local: bool
) -> None:
    """`README.md`, whose metadata tell the Hub how to run the Space.

    Args:
        folder: Where to write it.
        text: Template with the places `title`, `mark` and `name`.
        repo_id: `USER/SPACE`.
        name: Of the model.
        metadata: Besides title and looks.
        is_local: Whether the model is no repository of the Hub, to which the card could point.
    """
    title = repo_id.split("/")[-1]
    metadata = {"title": title, "emoji": "👁️", "colorFrom": "blue", "colorTo": "gray"} | metadata
    metadata |= {} if is_local else {"models": [name]}
    header = "\n".join(f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in metadata.items())
    RepoCard(f"---\n{header}\n---\n{text.format(title=title, mark=MARK, name=name)}").save(folder / "README.md")


def begin_report(folder: Path, *others: Path) -> Report:
    """A report on a folder, so far on what it and others in it tell of their maker."""
    report = Report(str(folder), list_files(folder), [])
    for part in (folder, *others):
        try:
            report.checks.append(Check("privacy", True, f"{part.name}: {check_privacy(part)}"))
        except ValueError as error:
            report.checks.append(Check("privacy", False, str(error)))
    return report


def verify_space(folder: str | Path) -> Report:
    """Starts the app in a fresh process, without the package that is installed here, and asks it about a picture.

    A Space with its own checkpoint is started offline and with empty caches.

    Args:
        folder: What [`assemble_space`] wrote.

    Returns:
        A report, as of [`verify`].
    """
    folder = Path(folder).expanduser().resolve()
    is_local = (folder / "model").is_dir()
    report = begin_report(folder, *([folder / "model"] if is_local else []))
    with tempfile.TemporaryDirectory() as elsewhere:
        result = Path(elsewhere, "answer.json")
        environment = fresh_environment(elsewhere) if is_local else dict(os.environ)
        environment["PYTHONDONTWRITEBYTECODE"] = "1"  # the folder stays as it was verified
        process = subprocess.run(
            [sys.executable, CHECK, folder, result],
            cwd=elsewhere,
            env=environment,
            capture_output=True,
            encoding="utf-8",
        )
        if result.exists():
            report.checks.append(Check("app", True, f"starts, and answers {read_json(result)!r:.60}"))
        else:
            reason = (process.stderr.strip() or "no message").splitlines()[-1]
            report.checks.append(Check("app", False, f"does not answer: {reason}"))
    return report


def upload_space(
    folder: str | Path,
    repo_id: str,
    *,
    report: Report,
    private: bool = False,
    message: str | None = None,
    sdk: str = "gradio",
) -> str:
    """Sends a verified Space in one commit, and reads it back. The Space is made where there is none.

    Args:
        folder: What [`assemble_space`] wrote.
        repo_id: `USER/SPACE`.
        report: What [`verify_space`] found.
        private: Make the Space private.
        message: First line of the commit.
        sdk: How the Hub runs it: `"gradio"` or `"static"`.

    Returns:
        The address of the commit.

    Raises:
        ValueError: The report has a failure, or the Space is public and shall be private.
        PermissionError, ConnectionError, OSError: As [`upload`].
    """
    if not report.ok:
        raise ValueError(f"{folder} is not uploaded, because it does not pass:\n{report}")
    folder = Path(folder)
    with clear_hub_errors(repo_id):
        api = HfApi(library_name="minimind-v")
        api.create_repo(repo_id, repo_type="space", space_sdk=sdk, private=private or None, exist_ok=True)
        if private and not api.space_info(repo_id).private:
            raise ValueError(
                f"The Space {repo_id} is public already. Make it private there first, or leave out --private."
            )
        commit = api.upload_folder(
            repo_id=repo_id,
            repo_type="space",
            folder_path=folder,
            allow_patterns=list(report.files),
            delete_patterns=["minimind_v/*", "model/*", "model-*/*"],  # what an earlier version left there
            commit_message=message or "Upload the web demo of MiniMind-V",
        )
        different, _ = compare(api, repo_id, commit.oid, folder, report.files, repo_type="space")
    if different:
        raise OSError(f"{repo_id} does not hold what was sent: {', '.join(different)} differ. Run it again.")
    return commit.commit_url


def publish_space(
    model: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    message: str | None = None,
    license: str | None = None,
    dry_run: bool = False,
    output: str | Path | None = None,
    sdk: str = "gradio",
    assemble: Callable[..., Path] = assemble_space,
    verify: Callable[[Path], Report] = verify_space,
) -> bool:
    """Assembles a Space, verifies it, and uploads it if it passed, as [`publish`] does a model.

    Args:
        model: Checkpoint folder or Hub repository.
        repo_id: `USER/SPACE`.
        private, message: As [`upload_space`] takes them.
        license: Of the Space; left out, `"apache-2.0"`.
        dry_run: Do all but the network, and print what would be sent.
        output: Folder to assemble; left out, the model's name with `-space` at its end.
        sdk: As for [`upload_space`].
        assemble, verify: The first two steps of another kind of Space.

    Returns:
        Whether the folder passed; if not, nothing was sent.
    """
    check_target(repo_id, None, False, None)
    if not dry_run:
        check_token()
    where = Path(model).expanduser()
    output = Path(output or f"{os.path.abspath(where) if where.is_dir() else where.name}-space").expanduser()
    print(f"Assembling {output}", file=sys.stderr)
    assemble(model, output, repo_id=repo_id, license=license or "apache-2.0")
    print("Asking it", file=sys.stderr)
    report = verify(output)
    print(report)
    if not report.ok:
        print("error: Nothing was uploaded, because the Space does not pass.", file=sys.stderr)
        return False
    if dry_run:
        print_plan(report, output, f"the Space {repo_id}")
        return True
    print(f"Uploading to the Space {repo_id}", file=sys.stderr)
    url = upload_space(output, repo_id, report=report, private=private, message=message, sdk=sdk)
    print(f"Read back and equal: {url}")
    return True
