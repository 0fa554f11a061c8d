"""In `transformers serve`, what a user sent wrong is answered with status 400 and our message."""

import contextlib
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def as_bad_request() -> Iterator[None]:
    """What is raised within, where `transformers serve` runs, also tells that server how to answer.

    It answers every exception with status 500 and without a word, save the one of the library that it is built with,
    which must not become a requirement here.

    Raises:
        ValueError, FileNotFoundError: As raised within, with the same message.
    """
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        if "transformers.cli.serving.server" not in sys.modules:
            raise
        kind = ValueError if isinstance(error, ValueError) else FileNotFoundError

        class BadRequest(kind, sys.modules["starlette.exceptions"].HTTPException):
            status_code, detail, headers = 400, str(error), None
            __str__ = kind.__str__

        raise BadRequest(str(error)) from error


__all__ = ["as_bad_request"]
