"""Asks a checkpoint through `transformers serve`: python ask_serve.py CHECKPOINT QUESTIONS.json ANSWERS.json

Runs where transformers[serving] is installed and this package need not be. Starts the server itself, on a free port
of this machine. Greedy, in float32, streamed, one question at a time.
"""

import base64
import contextlib
import json
import mimetypes
import os
import platform
import resource
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from report import write_report

STARTING = 120  # seconds, at most


@contextlib.contextmanager
def serve(*arguments: str, log: Path, environment: dict[str, str] | None = None) -> Iterator[str]:
    """A server while the block runs; gives its URL. What it prints goes to the file `log`.

    Args:
        *arguments: The checkpoint (without one, the server loads what a request names), and options.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", *arguments, "--trust-remote-code"]
    command += ["--device", "cpu", "--host", "127.0.0.1", "--port", port]
    environment = {"HF_HUB_OFFLINE": "1", **(os.environ if environment is None else environment)}
    with open(log, "w", encoding="utf-8") as output:
        server = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment, cwd=log.parent)
        url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + STARTING
        try:
            while True:
                with contextlib.suppress(urllib.error.URLError), urllib.request.urlopen(f"{url}/health", timeout=5):
                    break
                if server.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"The server did not start: {log.read_text(encoding='utf-8')[-2000:]}")
                time.sleep(0.1)
            yield url
        finally:
            server.terminate()
            server.wait()


def request(url: str, checkpoint: str, content: Any, max_tokens: int = 32, **options: Any) -> tuple[int, str]:
    """Status and body of one greedy chat completion."""
    chat = {"model": checkpoint, "messages": [{"role": "user", "content": content}]}
    body = json.dumps(chat | {"temperature": 0, "max_tokens": max_tokens} | options).encode()
    headers = {"Content-Type": "application/json"}
    try:
        with urllib.request.urlopen(urllib.request.Request(f"{url}/v1/chat/completions", body, headers)) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def parts(text: str, *images: str | Path) -> list[dict[str, Any]]:
    """Content of a message: the images first, inside the request."""
    content: list[dict[str, Any]] = []
    for path in images:
        encoded = base64.b64encode(Path(path).read_bytes()).decode()
        image = {"url": f"data:{mimetypes.guess_type(path)[0]};base64,{encoded}"}
        content.append({"type": "image_url", "image_url": image})
    return [*content, {"type": "text", "text": text}]


def stream(url: str, checkpoint: str, content: Any, max_tokens: int) -> dict[str, Any]:
    """The answer to one question, with its times."""
    chat = {"model": checkpoint, "messages": [{"role": "user", "content": content}]}
    body = json.dumps(chat | {"temperature": 0, "max_tokens": max_tokens, "stream": True}).encode()
    began, first, text, tokens = time.perf_counter(), None, "", 0
    headers = {"Content-Type": "application/json"}
    with urllib.request.urlopen(urllib.request.Request(f"{url}/v1/chat/completions", body, headers)) as response:
        for line in response:
            if not line.startswith(b"data: "):
                continue
            chunk = json.loads(line[len(b"data: ") :])
            if "error" in chunk:
                raise RuntimeError(chunk["error"])
            if piece := chunk["choices"][0]["delta"].get("content"):
                first, text = first or time.perf_counter() - began, text + piece
            tokens = chunk.get("usage", {}).get("completion_tokens", tokens)
    seconds = time.perf_counter() - began
    return {"text": text.strip(), "tokens": tokens, "first_token_seconds": first or seconds, "seconds": seconds}


def ask(url: str, checkpoint: str, question: dict[str, Any]) -> dict[str, Any]:
    """The answer to one question, which so many users ask at once as it has rows."""
    content, tokens = parts(question["text"], *question["images"]), question["max_new_tokens"]
    rows, began = question.get("rows", 1), time.perf_counter()
    with ThreadPoolExecutor(rows) as users:
        answers = list(users.map(lambda _: stream(url, checkpoint, content, tokens), range(rows)))
    first = min(answer["first_token_seconds"] for answer in answers)
    times = {"first_token_seconds": first, "seconds": time.perf_counter() - began}
    return answers[0] | {"tokens": sum(answer["tokens"] for answer in answers)} | times


def main(checkpoint: str, questions_file: str, answers_file: str) -> None:
    from importlib.metadata import version

    questions = json.loads(Path(questions_file).read_text(encoding="utf-8"))
    start = time.perf_counter()
    with serve(checkpoint, "--dtype", "float32", log=Path(answers_file).resolve().with_suffix(".log")) as url:
        loaded = time.perf_counter()
        answers = [{"id": item["id"]} | ask(url, checkpoint, item) for item in questions]
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * (1 if platform.system() == "Darwin" else 1024)
    write_report(answers_file, f"transformers serve {version('transformers')}", loaded - start, answers, peak)


if __name__ == "__main__":
    main(*sys.argv[1:])
