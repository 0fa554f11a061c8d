"""Reading of small files."""

import json
from pathlib import Path
from typing import Any


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
