"""README's commands and Python, run as they stand, and the captions of the example pictures."""

import ast
import json
import os
import re
import subprocess
import sys

import pytest
from conftest import CHECKPOINT, CODE, REPOSITORY

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
PICTURES = sorted((REPOSITORY / "examples" / "images").glob("*.png"))
CAPTIONS = {  # file name -> (English, Chinese), from the table of sources
    match[1]: (match[2], match[3])
    for match in re.finditer(
        r"\| `(\S+\.png)` \|.*\| ([^|]*\.) ([^|]*。) \|", (REPOSITORY / "examples/images/README.md").read_text("utf-8")
    )
}


@pytest.fixture
def elsewhere(tmp_path):
    """Environment of a fresh user: no caches, no network, this package not importable."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "PYTEST", "PYTHON"))}
    return environment | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "2"}


def run(command, environment):
    result = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=250)
    assert result.returncode == 0, result.stderr[-3000:]
    return result


@pytest.mark.parametrize("prompt, language", [(None, 0), ("这是什么？", 1)])
def test_first_command_prints_true_captions(prompt, language, elsewhere):
    command = README.split("pip install -c constraints.txt -e . && ")[1].split("\n")[0].split()
    assert command == ["python", "examples/caption.py", "examples/images"]
    result = run([sys.executable, *command[1:], *(["--prompt", prompt] if prompt else [])], elsewhere)
    assert len(PICTURES) >= 6
    assert result.stdout.splitlines() == [f"examples/images/{p.name}: {CAPTIONS[p.name][language]}" for p in PICTURES]
    errors = [line for line in re.split(r"[\r\n]+", result.stderr) if line and not line.startswith("Loading weights")]
    assert errors == []


def test_python_of_the_readme(elsewhere):
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(blocks) == 6
    result = run([sys.executable, "-c", "\n".join(blocks)], elsewhere)
    (english, chinese), (_, second_chinese) = CAPTIONS["apple.png"], CAPTIONS["pizza.png"]
    lines = [ast.literal_eval(line) for line in result.stdout.splitlines()]
    assert lines[:3] == [[{"generated_text": english}], [{"generated_text": chinese}], [english]]
    assert len(lines[3]) == 1 and lines[4] == [english, second_chinese]


def test_fine_tuning_of_the_readme(tmp_path):
    block = re.search(r"```bash\n(minimind-v check examples/images.*?)```", README, re.DOTALL)[1]
    for name in ("checkpoints", "examples"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    for command in block.replace("\\\n", "").strip().splitlines():
        program, *arguments = command.split()
        module = ["-m", "minimind_v_cli"] if program == "minimind-v" else []
        command = [sys.executable, *module, *arguments]
        result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=250)
        assert result.returncode == 0, result.stderr[-3000:]
    rows = map(json.loads, (REPOSITORY / "examples/images/metadata.jsonl").read_text("utf-8").splitlines())
    learned = [f"examples/images/{row['file_name']}: {row['text']}" for row in rows]
    assert len(learned) >= 8 and set(learned) <= set(result.stdout.splitlines())
    assert "<mark>A red apple" in (tmp_path / "check.html").read_text("utf-8")


def test_checkpoint_carries_the_present_code():
    for file in CODE:
        assert (CHECKPOINT / file).read_bytes() == (REPOSITORY / file).read_bytes(), f"copy {file} to {CHECKPOINT}"


def test_readme_names_files_that_exist():
    names = r"\]\((?!http)([^)#]+)\)|^\| `([^`-][^`]*)`(?:, `([^`]+)`)? \|"
    for name in re.findall(names, README, flags=re.MULTILINE):
        for path in filter(None, name):
            assert (REPOSITORY / path).exists(), path
