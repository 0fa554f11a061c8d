"""Asks llama.cpp, with what `minimind-v export gguf` wrote: ask_llama_cpp.py FOLDER QUESTIONS.json ANSWERS.json

Needs llama-cpp-python only. Images go as they are, so that llama.cpp's own preparation is part of the answer.
"""

import base64
import json
import os
import resource
import sys
import time
from pathlib import Path

import llama_cpp
from llama_cpp._logger import llama_log_callback
from llama_cpp.llama_chat_format import MTMDChatHandler
from llama_cpp.mtmd_cpp import mtmd_helper_log_set

folder, questions, answers = map(Path, sys.argv[1:])
mtmd_helper_log_set(llama_log_callback, None)  # quiet, as the rest of llama-cpp-python is

started = time.perf_counter()
tower = next(folder.glob("mmproj-*.gguf"), None)
engine = llama_cpp.Llama(
    str(next(folder.glob("model-*.gguf"))),
    chat_handler=MTMDChatHandler(str(tower), verbose=False) if tower else None,
    n_ctx=1024,
    n_threads=int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)),
    verbose=False,
)
load_seconds = time.perf_counter() - started


def ask(messages, max_tokens):
    """Greedy answer, and how long it took."""
    start = time.perf_counter()
    reply = engine.create_chat_completion(messages, max_tokens=max_tokens, temperature=0, repeat_penalty=1)
    return reply, time.perf_counter() - start


given = []
for question in json.loads(questions.read_text(encoding="utf-8")):
    urls = [
        f"data:image/png;base64,{base64.b64encode(Path(path).read_bytes()).decode()}" for path in question["images"]
    ]
    content = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    content.append({"type": "text", "text": question["text"]})
    messages = [{"role": "user", "content": content if urls else question["text"]}]
    _, first_token_seconds = ask(messages, 1)
    reply, seconds = ask(messages, question["max_new_tokens"])
    given.append(
        {
            "id": question["id"],
            "text": reply["choices"][0]["message"]["content"].strip(),
            "tokens": reply["usage"]["completion_tokens"],
            "first_token_seconds": first_token_seconds,
            "seconds": seconds,
        }
    )
engine.close()

result = {
    "runtime": f"llama-cpp-python {llama_cpp.__version__}",
    "load_seconds": load_seconds,
    "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,  # as Linux counts it
    "answers": given,
}
answers.write_text(json.dumps(result, ensure_ascii=False, indent=1), encoding="utf-8")
