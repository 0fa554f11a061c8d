"""Training data: rows of `messages` and `images`, read from the forms that people have.

The schema is TRL's. A row is

    {"messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]},
                  {"role": "assistant", "content": "A cat."}],
     "images": ["cat.jpg"]}

Each image part stands for the next of `images`: paths (relative to the data file), URLs, bytes, or anything else that
the processor takes. Content may also be a string in which `<image>` marks the places of the images. Read as well:
- an image folder with captions: `metadata.jsonl` with `file_name` and `text`;
- the original project's Parquet: `conversations` (JSON) and `image_bytes` (one or several).
"""

import json
import re
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from ..processing_minimind_v import DEFAULT_PROMPT

MARKER = "<image>"


def read_rows(source: Any) -> tuple[Any, Path]:
    """Raw rows (a sequence) and the folder that relative picture paths start from.

    Args:
        source: `.jsonl` or `.parquet` file, folder with `metadata.jsonl`, or any sequence of rows such as a
            `datasets.Dataset`.

    Returns:
        Rows as dicts, those of a `.jsonl` file as lines of text yet to be parsed.

    Raises:
        FileNotFoundError: The file or folder does not exist, or the folder has no `metadata.jsonl`.
        ValueError: Another kind of file.
    """
    if not isinstance(source, (str, Path)):
        return source, Path()
    path = Path(source)
    if path.is_dir():
        path = path / "metadata.jsonl"
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist. Give a .jsonl or .parquet file, or a folder of pictures.")
    if path.suffix == ".parquet":
        import datasets

        return datasets.Dataset.from_parquet(str(path)), path.parent
    if path.suffix != ".jsonl":
        raise ValueError(f"{path} must be a .jsonl or .parquet file, or a folder with metadata.jsonl.")
    # Not splitlines(), which also splits at characters that JSON strings may hold. Lines are parsed one by one, so
    # that a broken one is one broken row.
    return path.read_text(encoding="utf-8").rstrip("\n").split("\n"), path.parent


def normalize_row(row: dict[str, Any] | str, folder: Path = Path()) -> list[dict[str, Any]]:
    """Messages whose image parts hold their picture, from any of the schemas above.

    Raises:
        ValueError: Not JSON, no known schema, turns of unknown or wrongly ordered roles, no answer to train on, or
            images and their places differ in number.
    """
    if isinstance(row, str):
        row = json.loads(row)
    if not isinstance(row, dict):
        raise ValueError(f"a row must be an object with messages and images, not a {type(row).__name__}")
    if "messages" in row:
        messages, images = row["messages"], row.get("images")
    elif "conversations" in row:
        messages, images = row["conversations"], row.get("image_bytes")
        messages = json.loads(messages) if isinstance(messages, str) else messages
        roles = ("user", "assistant")  # the first release names none: they take turns
        messages = [{"role": roles[i % 2], **message} for i, message in enumerate(messages)]
    elif "file_name" in row and ("text" in row or "caption" in row):
        answer = row["text"] if "text" in row else row["caption"]
        question = f"{MARKER}{row.get('prompt') or DEFAULT_PROMPT}"
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        images = [row["file_name"]]
    else:
        raise ValueError(
            "a row needs messages and images, or conversations and image_bytes, or file_name and text; "
            f"it has {sorted(row)}"
        )
    check_roles(messages)
    if images is None:
        images = []
    queue = list(images) if isinstance(images, (list, tuple)) else [images]
    expected, result = len(queue), []
    places = 0
    for message in messages:
        content = message.get("content") or ""
        if isinstance(content, str):
            pieces = re.split(f"({MARKER})", content) if message["role"] != "system" else [content]
            content = [{"type": "image"} if p == MARKER else {"type": "text", "text": p} for p in pieces if p]
        parts = []
        for part in content:
            if part["type"] == "image":
                places += 1
                if not {"image", "url", "path", "base64"} & {key for key, value in part.items() if value is not None}:
                    part = {"type": "image", "image": locate(queue.pop(0), folder) if queue else None}
                else:
                    expected += 1
            parts.append({key: value for key, value in part.items() if value is not None})
        if message["role"] == "assistant" and all(part["type"] == "text" for part in parts):
            parts = "".join(part["text"] for part in parts)
        result.append({**message, "content": parts})
    if places != expected:
        raise ValueError(f"the text has places for {places} images, but there are {expected}")
    if not any(message["role"] == "assistant" and message["content"] for message in result):
        raise ValueError("there is no assistant turn to train on")
    return result


def check_roles(messages: list[dict[str, Any]]) -> None:
    """Turns must come as a chat has them: perhaps a system message, then user (or tool) before every assistant.

    Raises:
        ValueError: They do not; the message shows the roles.
    """
    roles = [message.get("role") if isinstance(message, dict) else message for message in messages]
    known = all(role in ("user", "assistant", "tool") or (role == "system" and i == 0) for i, role in enumerate(roles))
    starts = roles[1:] if roles[:1] == ["system"] else roles
    pairs = zip(["assistant", *starts], starts, strict=False)
    if not known or any(before == after == "assistant" for before, after in pairs):
        raise ValueError(
            "the roles of a chat must be system (only first), then user or tool before each assistant, "
            f"but they are {roles[:12]}"
        )


def locate(image: Any, folder: Path) -> Any:
    """A path below `folder` if there is one; the bytes or path of a `datasets` image; anything else unchanged."""
    if isinstance(image, dict):
        image = image.get("bytes") or image.get("path")
    if isinstance(image, str) and (folder / image[:1000]).is_file():
        return str(folder / image)
    return image


def pictures_of(messages: list[dict[str, Any]]) -> list[Any]:
    """The pictures of normalised messages, in reading order."""
    parts = [part for message in messages if not isinstance(message["content"], str) for part in message["content"]]
    keys = ("image", "url", "path", "base64")
    return [next(part[key] for key in keys if key in part) for part in parts if part["type"] == "image"]


class MiniMindVDataset(Dataset):
    """Rows of a data source, normalised one by one; item `i` is `{"messages": ..., "row": i}`."""

    def __init__(self, source: Any) -> None:
        self.rows, self.folder = read_rows(source)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        try:
            return {"messages": normalize_row(self.rows[index], self.folder), "row": index}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"Row {index}: {error}") from error
