"""What a chat must look like before it is rendered: known parts, text that is text, nothing that passes for a token.

A control token in a text, such as `<|im_end|>`, would end the user's turn and begin another one, or take the place of
an image. Tokens are looked for in every string of a chat, and across neighbouring text parts.
"""

import itertools
from collections.abc import Collection, Iterator
from typing import Any

IMAGE_KEYS = ("image", "url", "path", "base64")  # where an image part may hold its image
MAX_DEPTH = 32  # of lists and objects in each other


def normalize_parts(message: dict[str, Any]) -> dict[str, Any]:
    """The message with its content as a string, or as parts of the types "text" and "image".

    OpenAI's `{"type": "image_url", "image_url": {"url": ...}}` becomes `{"type": "image", "url": ...}`; values that
    are None, as in the columns of a table, are left out.

    Raises:
        ValueError: The content is something else, a part has an unknown type, its text is no string.
    """
    content = message.get("content")
    if content is None or isinstance(content, str):
        return message
    if not isinstance(content, (list, tuple)):
        raise ValueError(f"content must be a string or a list of parts; got {type(content).__name__}")
    return {**message, "content": [_normalize_part(part) for part in content]}


def _normalize_part(part: Any) -> dict[str, Any]:
    if not isinstance(part, dict):
        raise ValueError(f"a part must be an object with a type; got {type(part).__name__}")
    part = {key: value for key, value in part.items() if value is not None}
    kind = part.get("type")
    if kind == "image_url":
        image = part.get("image_url")
        image = image.get("url") if isinstance(image, dict) else image
        return {"type": "image"} | ({} if image is None else {"url": image})
    if kind not in ("text", "image"):
        raise ValueError(f"a part of type {kind!r:.40} is not known; text and image are (and image_url)")
    other = next((key for key in (IMAGE_KEYS if kind == "text" else ("text",)) if key in part), None)
    if other is not None:
        raise ValueError(f"a part of type {kind!r} also holds {other!r}, which would be lost; give it its own part")
    if kind == "text" and not isinstance(part.get("text"), str):
        raise ValueError(f"a text part must hold a string; got {type(part.get('text')).__name__}")
    return part


def check_chat(
    messages: Any, control_tokens: Collection[str], max_bytes: float, is_sanitized: bool = False
) -> list[dict[str, Any]]:
    """The messages of one chat with normalised parts, if nothing is wrong with them.

    Args:
        messages: List of `{"role": ..., "content": ...}`.
        control_tokens: What no text may contain.
        max_bytes: Of all texts together, in UTF-8.
        is_sanitized: The library will encode control tokens as plain text, where one string holds them.

    Raises:
        ValueError: The chat is empty or too long, or a message is of a wrong form or contains a control token; the
            error says which message.
    """
    if not isinstance(messages, (list, tuple)) or not messages:
        raise ValueError("A chat must be a list of messages, and hold at least one.")
    checked, length = [], 0
    for number, message in enumerate(messages):
        role = message.get("role") if isinstance(message, dict) else None
        if not isinstance(role, str):
            raise ValueError(f"Message {number} of the chat must be an object with a role and content.")
        try:
            checked.append(normalize_parts(message))
            length += _check_message(checked[-1], control_tokens, is_sanitized)
        except ControlToken as error:
            role = role if role.isidentifier() else "chat"
            raise ValueError(
                f"A {role} message contains the control token {error.token!r} as text. It is message {number}: remove "
                "it there; pass an image as an image part. (sanitize_control_tokens=True keeps it as plain text, from "
                "transformers 5.23 on.)"
            ) from None
        except ValueError as error:
            raise ValueError(f"Message {number} of the chat: {error}.") from None
    if length > max_bytes:
        raise ValueError(f"The chat has {length} bytes of text, which is more than the model's positions can hold.")
    return checked


def _check_message(message: dict[str, Any], control_tokens: Collection[str], is_sanitized: bool) -> int:
    """Bytes of the texts of a message, in every place but its images."""
    content = message.get("content") or ""
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    values = [value for key, value in message.items() if key != "content"]
    values += [value for part in parts for key, value in part.items() if key not in IMAGE_KEYS]
    length = check_texts(values, control_tokens, is_sanitized)
    for is_text, group in itertools.groupby(parts, key=lambda part: part["type"] == "text"):
        texts = [part["text"] for part in group] if is_text else []
        for token in control_tokens:
            if "".join(texts).count(token) > sum(text.count(token) for text in texts):
                raise ControlToken(token)  # split over two parts
    return length


class ControlToken(ValueError):
    """A text contains `token`."""

    def __init__(self, token: str) -> None:
        super().__init__(f"the control token {token!r} stands in a text; remove it")
        self.token = token


def check_texts(value: Any, control_tokens: Collection[str] = (), is_sanitized: bool = False) -> int:
    """Bytes in UTF-8 of all strings in a string, list or dict.

    Raises:
        ValueError: One contains a control token or half of a surrogate pair, or is no value of JSON.
    """
    length = 0
    for text, is_name in _strings(value):
        for token in control_tokens:
            if token in text and (not is_sanitized or is_name):  # the library sanitizes values only
                raise ControlToken(token)
        try:
            length += len(text.encode("utf-8"))
        except UnicodeEncodeError:
            raise ValueError("a text holds half of a surrogate pair, which is no character") from None
    return length


def _strings(value: Any, is_name: bool = False, depth: int = 0) -> Iterator[tuple[str, bool]]:
    """All strings in a value of JSON, with whether they are names of objects."""
    if depth > MAX_DEPTH:
        raise ValueError(f"lists and objects are nested more than {MAX_DEPTH} deep")
    if isinstance(value, str):
        yield value, is_name
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _strings(key, True, depth + 1)
            yield from _strings(item, False, depth + 1)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _strings(item, False, depth + 1)
    elif not isinstance(value, (int, float, type(None))):
        raise ValueError(f"{type(value).__name__} is neither text nor another value of JSON")


__all__ = ["IMAGE_KEYS", "check_chat", "check_texts", "normalize_parts"]
