"""Loads an assembled folder as a stranger would: in a fresh process, offline, without this package."""

import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub.utils.sha import sha_fileobj

from ..common import read_json
from .checks import Check

CHECKS = Path(__file__).with_name("checks.py")


@dataclass
class Report:
    """What [`verify`] found; `str()` of it is the text that the command prints.

    Attributes:
        folder: What was verified.
        files: Name and SHA-256 of every file at that time: [`upload`] sends nothing else.
        checks: One line each.
    """

    folder: str
    files: dict[str, str]
    checks: list[Check]

    @property
    def ok(self) -> bool:
        """Whether every check passed."""
        return bool(self.checks) and all(check.ok for check in self.checks)

    def __str__(self) -> str:
        lines = [f"{'ok  ' if check.ok else 'FAIL'}  {check.name:<16} {check.detail}" for check in self.checks]
        passed = sum(check.ok for check in self.checks)
        return "\n".join([*lines, f"{passed} of {len(self.checks)} checks passed: {self.folder}"])


def verify(folder: str | Path, checkpoint: str | Path | None = None) -> Report:
    """Loads an assembled folder as a stranger would, and looks into all of its files.

    In a fresh process: offline, with empty caches, without this package. Its code runs only when its files are right.

    Args:
        folder: What [`assemble`] wrote.
        checkpoint: Where it came from; left out, answers are not compared with it.

    Returns:
        A report; `report.ok` says whether every check passed.

    Raises:
        FileNotFoundError: No such folder.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder. Assemble one first.")
    report = Report(str(folder), list_files(folder), [])
    with tempfile.TemporaryDirectory() as elsewhere:
        environment = fresh_environment(elsewhere)
        result = Path(elsewhere, "checks.json")
        command = [sys.executable, CHECKS, folder.resolve(), result]
        command += [Path(checkpoint).expanduser().resolve()] if checkpoint else []
        process = subprocess.run(command, cwd=elsewhere, env=environment, capture_output=True, encoding="utf-8")
        if result.exists():
            report.checks = [Check(**check) for check in read_json(result)]
        if process.returncode:
            reason = (process.stderr.strip() or "no message").splitlines()[-1]
            report.checks.append(Check("fresh process", False, f"ended with status {process.returncode}: {reason}"))
    return report


def fresh_environment(elsewhere: str) -> dict[str, str]:
    """An environment with nothing of the user's: no token, no caches, no settings; and without the network."""
    theirs = ("HF_", "HUGGING", "TRANSFORMERS_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(theirs)}
    return environment | {"HF_HOME": f"{elsewhere}/home", "HF_HUB_OFFLINE": "1", "PYTHONIOENCODING": "utf-8"}


def list_files(folder: Path) -> dict[str, str]:
    """Name, with the folders it is in, and SHA-256 of every file."""
    files = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            files[path.relative_to(folder).as_posix()] = sha_fileobj(file).hex()
    return files
