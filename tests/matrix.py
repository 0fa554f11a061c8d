"""Runs README's two commands on every supported version and prints two tables: python tests/matrix.py [--write]

Every row has a virtual environment of its own. That of a Python is empty: both commands run as they stand, and install
what constraints.txt says. That of a transformers version sees the packages of the running environment and replaces
transformers and what it pins. `--write` puts the tables into README.md. Unknown options go to pytest.
"""

import argparse
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

TRANSFORMERS = ["5.19.0", "5.20.2", version("transformers")]
PYTHONS = ["3.10", "3.12", "3.13"]
REPOSITORY = Path(__file__).resolve().parents[1]
README = REPOSITORY / "README.md"
HEADER = """\
| Python | transformers | torch | first command | passed | failed | skipped | time |
|---|---|---|---|---|---|---|---|
"""
VERSIONS = (
    "import platform, torch, transformers as t; print(platform.python_version(), t.__version__, torch.__version__)"
)


def find_interpreter(python: str) -> str:
    """Path of an interpreter that is given as a path, or as a version whose command (python3.12) is on PATH."""
    command = python if os.sep in python else f"python{python}"
    try:
        return subprocess.check_output([command, "-c", "import sys; print(sys.executable)"], text=True).strip()
    except (OSError, subprocess.CalledProcessError):
        sys.exit(f"error: {command} does not run. Put it on PATH, or give the path of an interpreter to --pythons.")


def run(command: str, environment: str) -> tuple[bool, str]:
    """Runs a line of shell as if the virtual environment were activated; returns its success and its output."""
    print(f"$ {command}", flush=True)
    variables = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    variables["PATH"] = f"{environment}/bin{os.pathsep}{variables['PATH']}"
    result = subprocess.run(command, shell=True, cwd=REPOSITORY, env=variables, capture_output=True, text=True)
    if result.returncode:
        print(result.stdout[-5000:], result.stderr[-2000:], flush=True)
    return result.returncode == 0, result.stdout


def replace_transformers(environment: str, transformers: str) -> None:
    """Shows the running environment's packages to `environment`; this version of transformers goes before them."""
    _, packages = run("python -c 'import sysconfig; print(sysconfig.get_path(\"purelib\"))'", environment)
    running = [path for path in sys.path if path.endswith("-packages")]
    Path(packages.strip(), "running_environment.pth").write_text("\n".join(running) + "\n")
    run(f"pip install transformers=={transformers} && pip install --no-deps -e .", environment)


def make_row(interpreter: str, transformers: str | None, pytest_arguments: list[str]) -> tuple[bool, str]:
    """Runs the two commands in a new virtual environment, which is deleted afterwards.

    Args:
        interpreter: Path of the Python.
        transformers: The version to test beside the packages of the running environment; `None`: a fresh installation.
        pytest_arguments: Appended to the second command.

    Returns:
        Whether all of it succeeded, and the row of the table.
    """
    block = re.search(r"## Two commands.*?```bash\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)[1]
    first, second = re.findall(r"^pip install .*", block, re.MULTILINE)
    with tempfile.TemporaryDirectory() as environment:
        subprocess.run([interpreter, "-m", "venv", environment], check=True)
        if transformers:
            replace_transformers(environment, transformers)
            first = first.split(" && ")[1]
            second = "python -m " + second.split(" && ")[1]  # the script `pytest` is the running environment's
        captions, _ = run(first, environment)
        _, versions = run(f"python -c '{VERSIONS}'", environment)
        tests, output = run(f"{second} -p no:cacheprovider {shlex.join(pytest_arguments)}", environment)
    summary = output.strip().rpartition("\n")[2]
    words = ("passed", "(?:failed|error)", "skipped")
    counts = [sum(map(int, re.findall(rf"(\d+) {word}", summary))) for word in words]
    minutes = sum(map(float, re.findall(r" in ([\d.]+)s", summary))) / 60
    cells = [*(versions.split() or 3 * ["?"]), "works" if captions else "fails", *counts, f"{minutes:.1f} min"]
    row = f"| {' | '.join(map(str, cells))} |"
    print(row, flush=True)
    return captions and tests, row


def write_table(name: str, table: str) -> None:
    """Puts a table between its two marks in README.md."""
    begin, end = f"<!-- {name} begin -->\n", f"<!-- {name} end -->"
    before, rest = README.read_text(encoding="utf-8").split(begin)
    README.write_text(before + begin + table + end + rest.split(end)[1], encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the tables into README.md")
    parser.add_argument(
        "--transformers", nargs="*", default=TRANSFORMERS, help="versions to test on this Python; none: no such table"
    )
    parser.add_argument(
        "--pythons", nargs="*", default=PYTHONS, help="versions on PATH, or paths of interpreters; none: no such table"
    )
    arguments, pytest_arguments = parser.parse_known_args()
    tables = {
        "transformers": [(sys.executable, transformers) for transformers in arguments.transformers],
        "pythons": [(find_interpreter(python), None) for python in arguments.pythons],
    }
    succeeded = True
    for name, environments in tables.items():
        if not environments:
            continue
        results = [make_row(*environment, pytest_arguments) for environment in environments]
        succeeded = succeeded and all(success for success, _ in results)
        table = HEADER + "".join(f"{row}\n" for _, row in results) + f"\n{time.strftime('%Y-%m-%d')}.\n"
        print(f"\n{table}", flush=True)
        if arguments.write:
            write_table(name, table)
    sys.exit(not succeeded)


if __name__ == "__main__":
    main()
