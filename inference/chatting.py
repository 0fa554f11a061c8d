"""A conversation in the terminal, and single questions about several images."""

import contextlib
import os
import sys
from typing import Any

from PIL import Image
from transformers import BatchFeature

from ..image_loading_minimind_v import load_image
from .engine import Engine, encode, note, question, report_speed

HELP = """\
/image PATH   add a picture (file or URL) to the next question; several are possible
/reset        forget the conversation
/help         this text
/exit         end (or Ctrl-D); Ctrl-C stops an answer"""

# Tried with the embedded model: half of its answers are about the earlier image.
EARLIER_IMAGE = """\
The conversation has an earlier image, and a model that was trained on single ones may answer about that. To ask about
this one alone: /reset, then /image again."""


def ask_once(images: list[str], text: str, options: dict[str, Any]) -> None:
    """Prints the answer to one question about some images.

    Args:
        images: Paths or URLs.
        text: The question.
        options: Of [`Engine`].
    """
    engine = Engine(**options)
    inputs = encode(engine.processor, [[question(images, text)]], engine.template_options)
    print_answer(engine, inputs)
    report_speed(engine.tokens, engine.seconds)


def print_answer(engine: Engine, inputs: BatchFeature) -> str:
    """Prints the answer to one chat as it comes, and returns it."""
    pieces = []
    for piece in engine.stream(inputs):
        print(piece, end="", flush=True)
        pieces.append(piece)
    print()
    return "".join(pieces).strip()


def open_image(source: str, processor: Any) -> Image.Image:
    """The image, opened once for all questions of a conversation, as `processor` may open it."""
    limits = {"max_pixels": processor.max_image_pixels, "allowed_hosts": processor.allowed_hosts}
    return load_image(os.path.expanduser(source), **limits)


def has_images(chat: list[dict[str, Any]]) -> bool:
    """Whether a user's message has an image."""
    return any(part["type"] == "image" for turn in chat if turn["role"] == "user" for part in turn["content"])


def talk(images: list[str], options: dict[str, Any]) -> None:
    """Asks for questions until the end of the input; answers are printed as they come.

    Args:
        images: Paths or URLs, for the first question.
        options: Of [`Engine`].
    """
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  input() then has a line editor and a history
    engine = Engine(**options)
    pending, chat = [open_image(image, engine.processor) for image in images], []
    is_hint_due = True
    note("Ask a question; /image PATH adds a picture to it, /help shows more.")
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            note("\n/exit or Ctrl-D ends.")
            continue
        name, _, argument = line.partition(" ")
        if name == "/exit":
            return
        if name == "/help":
            print(HELP)
        elif name == "/reset":
            pending, chat = [], []
            note("A new conversation.")
        elif name == "/image":
            try:
                pending.append(open_image(argument.strip(" '\""), engine.processor))
                note(f"Images for the next question: {len(pending)}.")
                if has_images(chat):
                    note(EARLIER_IMAGE)
            except (OSError, ValueError) as error:
                print(f"error: {error}", file=sys.stderr)
        elif name.startswith("/"):
            print(f"error: There is no command {name}; /help lists them.", file=sys.stderr)
        elif line:
            turn = question(pending, line)
            if is_hint_due and not has_images([*chat, turn]):
                note("No picture was given: the model answers from the words alone. /image PATH adds one.")
                is_hint_due = False
            engine.tokens, engine.seconds = 0, 0.0
            try:
                inputs = encode(engine.processor, [[*chat, turn]], engine.template_options)
                answer = print_answer(engine, inputs)
            except ValueError as error:
                print(f"error: {error} (/reset forgets the conversation.)", file=sys.stderr)
            except KeyboardInterrupt:
                note("\nStopped; this question does not count.")
            else:
                chat += [turn, {"role": "assistant", "content": answer}]
                pending = []
                report_speed(engine.tokens, engine.seconds)
