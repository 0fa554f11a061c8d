"""The structure of the repository: what imports what, what is light, what is named."""

import ast
import subprocess
from pathlib import Path

import pytest
from conftest import CHECKPOINT, REPOSITORY

# Each may import what stands on an earlier line, and its own folder.
LAYERS = [
    sorted(path.stem for path in REPOSITORY.glob("*_minimind_v.py")),
    ["common"],
    ["__init__"],
    ["conversion"],
    ["export"],
    ["inference"],
    ["training"],
    ["demo"],
    ["publishing"],
    ["cli"],
    ["hub_upload"],
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}


def imported_parts(path: Path) -> set[str]:
    """The folders and files of this repository that a file imports, by the names in `RANK`."""
    parts = set()
    folder = path.parent.relative_to(REPOSITORY).parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level:
            base = ["minimind_v", *folder[: len(folder) - node.level + 1]]
            names = [[*base, *(node.module or alias.name).split(".")] for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module.split(".")]
            if node.module == "minimind_v":
                names = [["minimind_v", alias.name] for alias in node.names]
        for name in names:
            if name[0] == "minimind_v_cli":
                parts.add("cli")
            elif name[0] == "minimind_v":
                parts.add(name[1] if len(name) > 1 and name[1] in RANK else "__init__")
            elif name[0] in ("tests", "conftest"):
                parts.add(name[0])
    return parts


@pytest.mark.parametrize("name", RANK)
def test_no_import_runs_upward(name):
    folder = REPOSITORY / name
    files = sorted(folder.rglob("*.py")) if folder.is_dir() else [folder.with_suffix(".py")]
    assert files
    for file in files:
        upward = {part for part in imported_parts(file) - {name} if RANK.get(part, len(LAYERS)) >= RANK[name]}
        if name in LAYERS[0]:
            upward -= set(LAYERS[0])
        assert not upward, f"{file.relative_to(REPOSITORY)} imports {upward}"


def test_every_python_file_of_the_package_has_a_place():
    parts = {path.name for path in REPOSITORY.iterdir() if path.is_dir() and (path / "__init__.py").exists()}
    parts |= {path.stem for path in REPOSITORY.glob("*.py")}
    assert parts == set(RANK)


@pytest.mark.skipif(not (REPOSITORY / ".git").exists(), reason="not a clone: git cannot say what belongs to it")
def test_repository_is_light():
    tracked = subprocess.check_output(["git", "ls-files", "-z"], cwd=REPOSITORY, text=True).split("\0")
    sizes = {path: (REPOSITORY / path).stat().st_size for path in tracked if path and (REPOSITORY / path).exists()}
    assert sum(sizes.values()) < 40e6
    assert sum(size for path, size in sizes.items() if path.startswith("tests/golden/")) < 10e6
    assert sum(path.stat().st_size for path in CHECKPOINT.iterdir()) < 15e6
    pickles = [path for path in tracked if path.endswith((".bin", ".pth", ".pt", ".pkl"))]
    assert all(path.startswith("tests/golden/") for path in pickles)
