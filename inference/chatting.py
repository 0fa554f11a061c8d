"""A conversation in the terminal, and single questions about several images."""

import contextlib
import os
import sys
from typing import Any

from ..image_loading_minimind_v import load_image
from .engine import Engine, encode, note, question, report_speed

HELP = """\
/image PATH   add a picture (file or URL) to the next question; several are possible
/reset        forget the conversation
/help         this text
/exit         end (or Ctrl-D); Ctrl-C stops an answer"""


def ask_once(images: list[str], text: str, options: dict[str, Any]) -> None:
    """Prints the answer to one question about some images.

    Args:
        images: Paths or URLs.
        text: The question.
        options: Of [`Engine`].
    """
    chat = [question([load_image(image) for image in images], text)]
    engine = Engine(**options)
    engine.answer(encode(engine.processor, [chat], engine.template_options), stream=True)
    report_speed(engine.tokens, engine.seconds)


def talk(images: list[str], options: dict[str, Any]) -> None:
    """Asks for questions until the end of the input; answers are printed as they come.

    Args:
        images: Paths or URLs, for the first question.
        options: Of [`Engine`].
    """
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  input() then has a line editor and a history
    pending, chat = [load_image(image) for image in images], []
    engine = Engine(**options)
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
                pending.append(load_image(os.path.expanduser(argument.strip(" '\""))))
                note(f"Images for the next question: {len(pending)}.")
            except (OSError, ValueError) as error:
                print(f"error: {error}", file=sys.stderr)
        elif name.startswith("/"):
            print(f"error: There is no command {name}; /help lists them.", file=sys.stderr)
        elif line:
            turn = question(pending, line)
            engine.tokens, engine.seconds = 0, 0.0
            try:
                answer = engine.answer(encode(engine.processor, [[*chat, turn]], engine.template_options), stream=True)
            except ValueError as error:
                print(f"error: {error} (/reset forgets the conversation.)", file=sys.stderr)
            except KeyboardInterrupt:
                note("\nStopped; this question does not count.")
            else:
                chat += [turn, {"role": "assistant", "content": answer[0]}]
                pending = []
                report_speed(engine.tokens, engine.seconds)
