"""Training data: rows of `messages` and `images`, read from the forms that people have.

The schema is TRL's. A row is

    {"messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]},
                  {"role": "assistant", "content": "A cat."}],
     "images": ["cat.jpg"]}

Each image part stands for the next of `images`: paths (relative to the data file), URLs, bytes, or anything else that
the processor takes. A part may also hold its image itself, as OpenAI's parts of the type `image_url` do, and content
may be a string in which `<image>` marks the places of the images. Read as well:
- an image folder with captions: `metadata.jsonl` with `file_name` and `text`;
- the original project's Parquet: `conversations` (JSON) and `image_bytes` (one or several).
"""

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset, Subset

from ..chat_checking_minimind_v import IMAGE_KEYS, normalize_parts
from ..downloading_minimind_v import is_url
from ..processing_minimind_v import DEFAULT_PROMPT
from .downloads import download_once

MARKER = "<image>"


def read_rows(source: Any) -> tuple[Any, Path]:
    """Raw rows (a sequence) and the folder that relative image paths start from.

    Args:
        source: `.jsonl` or `.parquet` file, folder with `metadata.jsonl`, or any sequence of rows such as a
            `datasets.Dataset`.

    Returns:
        Rows as dicts, those of a `.jsonl` file as lines of text yet to be parsed.

    Raises:
        FileNotFoundError: The file or folder does not exist, or the folder has no `metadata.jsonl`.
        ValueError: Another kind of file, or an empty one.
        ImportError: Parquet without `datasets`.
    """
    if not isinstance(source, (str, Path)):
        return source, Path()
    path = Path(source)
    if path.is_dir():
        path = path / "metadata.jsonl"
        if not path.exists():
            raise FileNotFoundError(
                f"{path} does not exist. A folder of pictures needs this file, with one line for each picture: "
                '{"file_name": "cat.png", "text": "A cat."}'
            )
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist. Give a .jsonl or .parquet file, or a folder of pictures.")
    if path.suffix == ".parquet":
        try:
            import datasets
        except ImportError as error:
            raise ImportError('Parquet needs the library datasets: pip install "minimind-v[train]"') from error
        return datasets.Dataset.from_parquet(str(path)), path.parent
    if path.suffix != ".jsonl":
        raise ValueError(f"{path} must be a .jsonl or .parquet file, or a folder with metadata.jsonl.")
    # Not splitlines(), which also splits at characters that JSON strings may hold. Lines are parsed one by one, so
    # that a broken one is one broken row; blank ones are none.
    try:
        lines = [line for line in path.read_text(encoding="utf-8-sig").split("\n") if line.strip()]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not in UTF-8 ({error}). Save it in UTF-8.") from error
    if not lines:
        raise ValueError(f"{path} is empty. It needs one row, a JSON object, per line.")
    return lines, path.parent


def normalize_row(
    row: dict[str, Any] | str, folder: Path = Path(), allowed_hosts: Sequence[str] | None = None
) -> list[dict[str, Any]]:
    """Messages whose image parts hold their image, from any of the schemas above.

    Args:
        row: A row, or the line of a `.jsonl` file that it stands in.
        folder: Where relative image paths start from.
        allowed_hosts: As for [`download_once`].

    Raises:
        ValueError: Not JSON, no known schema, turns of unknown or wrongly ordered roles, parts of unknown kinds, no
            answer to train on, an image that is null or cannot be fetched, or images and their places differ in
            number.
    """
    if isinstance(row, str):
        row = json.loads(row)
    messages, images = messages_and_images(row)
    check_roles(messages)
    messages = place_images(messages, images, folder, allowed_hosts)
    if not any(message["role"] == "assistant" and message["content"] for message in messages):
        raise ValueError("there is no assistant turn to train on")
    return messages


def messages_and_images(row: Any) -> tuple[list[dict[str, Any]], list[Any]]:
    """The messages of a row and the images that are not in them, as they stand in any of the schemas above.

    Raises:
        ValueError: The row has none of the schemas.
    """
    if not isinstance(row, dict):
        raise ValueError(f"a row must be an object with messages and images, not a {type(row).__name__}")
    if "messages" in row:
        messages, images = row["messages"], row.get("images")
        if images is None:
            images = row.get("image")
    elif "conversations" in row:
        messages, images = row["conversations"], row.get("image_bytes")
        messages = json.loads(messages) if isinstance(messages, str) else messages
        roles = ("user", "assistant")  # the first release names none: they take turns
        messages = [{"role": roles[i % 2], **message} for i, message in enumerate(messages)]
    elif "file_name" in row and ("text" in row or "caption" in row):
        answer = row["text"] if "text" in row else row["caption"]
        question = f"{MARKER}{row.get('prompt') or DEFAULT_PROMPT}"
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        images = row["file_name"]
    else:
        raise ValueError(
            "a row needs messages and images, or conversations and image_bytes, or file_name and text; "
            f"it has {sorted(row)}"
        )
    if images is None:
        return messages, []
    return messages, list(images) if isinstance(images, (list, tuple)) else [images]


def check_roles(messages: Any) -> None:
    """Turns must come as a chat has them: perhaps a system message, then user (or tool) before every assistant.

    Raises:
        ValueError: They do not; the message shows the roles.
    """
    if not isinstance(messages, (list, tuple)):
        raise ValueError(f"messages must be a list, not a {type(messages).__name__}")
    roles = [message.get("role") if isinstance(message, dict) else message for message in messages]
    known = all(role in ("user", "assistant", "tool") or (role == "system" and i == 0) for i, role in enumerate(roles))
    starts = roles[1:] if roles[:1] == ["system"] else roles
    pairs = zip(["assistant", *starts], starts, strict=False)
    if not known or any(before == after == "assistant" for before, after in pairs):
        raise ValueError(
            "the roles of a chat must be system (only first), then user or tool before each assistant, "
            f"but they are {roles[:12]}"
        )


def place_images(
    messages: list[dict[str, Any]], images: list[Any], folder: Path, allowed_hosts: Sequence[str] | None
) -> list[dict[str, Any]]:
    """The messages with their content as parts, of which each image part has its image or the next of `images`.

    The content of an assistant's turn without images is a string.

    Args:
        messages: With content as a string or a list of parts.
        images: Those that are not in the messages, in reading order.
        folder: Where relative image paths start from.
        allowed_hosts: As for [`download_once`].

    Raises:
        ValueError: There are more places than images, or fewer, or an image is null or cannot be fetched.
    """
    contents = [split_content(message) for message in messages]
    places = [part for parts in contents for part in parts if part["type"] == "image"]
    empty = [part for part in places if part.keys().isdisjoint(IMAGE_KEYS)]
    if len(empty) != len(images):
        there = len(places) - len(empty) + len(images)
        raise ValueError(f"the text has places for {len(places)} images, but there are {there}")
    for part, image in zip(empty, images, strict=True):
        part["image"] = image
    for number, part in enumerate(places):
        image = locate(image_of(part), folder, allowed_hosts)
        if image is None:
            raise ValueError(f"image {number} of the row is null")
        part.clear()
        part.update(type="image", image=image)
    result = []
    for message, parts in zip(messages, contents, strict=True):
        if message["role"] == "assistant" and all(part["type"] == "text" for part in parts):
            parts = "".join(part["text"] for part in parts)
        result.append({**message, "content": parts})
    return result


def split_content(message: dict[str, Any]) -> list[dict[str, Any]]:
    """The content of a message as parts; `<image>` in a string (but not in a system message) is an image part.

    Raises:
        ValueError: The content is neither a string nor a list of text and image parts.
    """
    content = message.get("content")
    if isinstance(content, str) or content is None:
        pieces = [content or ""] if message["role"] == "system" else re.split(f"({MARKER})", content or "")
        return [{"type": "image"} if piece == MARKER else {"type": "text", "text": piece} for piece in pieces if piece]
    return normalize_parts(message)["content"]


def locate(image: Any, folder: Path, allowed_hosts: Sequence[str] | None = None) -> Any:
    """A file where there is one: below `folder`, or downloaded; what a dict such as a `datasets` image holds.

    Returns:
        The path, the image if it is something else, or None if it is null or empty.

    Raises:
        ValueError: An URL cannot be fetched.
    """
    if isinstance(image, dict):
        image = next((image[key] for key in ("bytes", *IMAGE_KEYS) if image.get(key) is not None), None)
    # Not Path.is_file, which raises an error where base64 is too long for a name
    if isinstance(image, str) and os.path.isfile(folder / image[:1000]):
        return str(folder / image)
    if isinstance(image, str) and is_url(image):
        return download_once(image, allowed_hosts)
    return None if isinstance(image, (str, bytes)) and not image else image


def image_of(part: dict[str, Any]) -> Any:
    """What an image part holds, or None."""
    return next((part[key] for key in IMAGE_KEYS if part.get(key) is not None), None)


def images_of(messages: list[dict[str, Any]]) -> list[Any]:
    """The images of normalized messages, in reading order."""
    parts = [part for message in messages if not isinstance(message["content"], str) for part in message["content"]]
    return [image_of(part) for part in parts if part["type"] == "image"]


def text_of(message: dict[str, Any]) -> str:
    """The text of a normalized message, without its images."""
    content = message["content"]
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def split_last_answer(messages: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], str]:
    """The chat up to the last answer that is not empty, and that answer."""
    last = max(i for i, message in enumerate(messages) if message["role"] == "assistant" and message["content"])
    return messages[:last], text_of(messages[last])


def reason(error: Exception) -> str:
    """What an exception says, in one line, with its kind where the words alone would be a riddle."""
    text = " ".join(str(error).split())
    return text if isinstance(error, (ValueError, OSError)) and text else f"{type(error).__name__} {text}".rstrip()


class MiniMindVDataset(Dataset):
    """Rows of a data source, normalized one by one.

    Item `i` is `{"row": i, "messages": ...}`, or `{"row": i, "error": reason}` if the row is broken: the collator
    decides what becomes of it.

    Args:
        source: See [`read_rows`].
        allowed_hosts: The only hosts whose image URLs are fetched; left out, every one with a public address.
    """

    def __init__(self, source: Any, allowed_hosts: Sequence[str] | None = None) -> None:
        self.rows, self.folder = read_rows(source)
        self.allowed_hosts = allowed_hosts

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(f"there are {len(self)} rows; got {index}")  # this is how Python knows where rows end
        try:
            return {"row": index, "messages": normalize_row(self.rows[index], self.folder, self.allowed_hosts)}
        except Exception as error:  # of any kind: rows are what people write
            return {"row": index, "error": reason(error)}


Rows = MiniMindVDataset | Subset[dict[str, Any]]  # all rows of a data source, or some
