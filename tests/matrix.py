"""Runs the tests on every supported transformers version and prints a table: python tests/matrix.py [--write]

Each version gets a virtual environment of its own that sees the packages of the running one and replaces transformers
and what it pins. `--write` puts the table into README.md.
"""

import argparse
import platform
import re
import subprocess
import sys
import sysconfig
import tempfile
import time
import venv
from pathlib import Path

import torch
import transformers

VERSIONS = ["5.16.1", "5.19.0", "5.20.2", transformers.__version__]
REPOSITORY = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- matrix begin -->\n", "<!-- matrix end -->"


def run_tests(version: str, folder: Path, arguments: list[str]) -> str:
    """One row of the table."""
    print(f"transformers {version}", flush=True)
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    site_packages = subprocess.check_output(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True
    )
    Path(site_packages.strip(), "running_environment.pth").write_text(sysconfig.get_path("purelib") + "\n")
    for requirement in ([f"transformers=={version}"], ["--no-deps", "-e", str(REPOSITORY)]):
        subprocess.run([python, "-m", "pip", "install", "--quiet", *requirement], check=True)
    start = time.monotonic()
    result = subprocess.run(
        [python, "-m", "pytest", REPOSITORY / "tests", "-q", "-p", "no:cacheprovider", *arguments],
        capture_output=True,
        text=True,
    )
    minutes = (time.monotonic() - start) / 60
    summary = result.stdout.strip().splitlines()[-1]
    words = ("passed", "(?:failed|error)", "skipped")
    passed, failed, skipped = (sum(map(int, re.findall(rf"(\d+) {word}", summary))) for word in words)
    if result.returncode:
        print(result.stdout[-5000:], result.stderr[-2000:])
    row = f"| {version} | {passed} | {failed} | {skipped} | {minutes:.1f} min |"
    print(row, flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the table into README.md")
    parser.add_argument("--versions", nargs="+", default=VERSIONS, help="transformers versions to test")
    arguments, pytest_arguments = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = [run_tests(version, Path(folder, version), pytest_arguments) for version in arguments.versions]
    machine = f"Python {platform.python_version()}, torch {torch.__version__}, {platform.machine()}"
    table = "\n".join(["| transformers | passed | failed | skipped | time |", "|---|---|---|---|---|", *rows])
    table = f"{table}\n\n{time.strftime('%Y-%m-%d')}, {machine}.\n"
    print("\n" + table)
    if arguments.write:
        readme = REPOSITORY / "README.md"
        before, rest = readme.read_text(encoding="utf-8").split(BEGIN)
        readme.write_text(before + BEGIN + table + END + rest.split(END)[1], encoding="utf-8")
    sys.exit(any(int(row.split("|")[3]) for row in rows))


if __name__ == "__main__":
    main()
