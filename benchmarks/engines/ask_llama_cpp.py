"""Asks llama.cpp, with what `minimind-v export gguf` wrote: ask_llama_cpp.py FOLDER QUESTIONS.json ANSWERS.json

Needs llama-cpp-python only. Images go as they are, so that llama.cpp's own preparation is part of the answer.
"""

import base64
import json
import os
import sys
import time
from pathlib import Path

import llama_cpp
from llama_cpp._logger import llama_log_callback
from llama_cpp.llama_chat_format import MTMDChatHandler
from llama_cpp.mtmd_cpp import mtmd_helper_log_set
from report import write_report

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
    """Greedy answer with its times, of a prompt that the engine has not seen."""
    engine.reset()
    began, first, pieces = time.perf_counter(), None, []
    for chunk in engine.create_chat_completion(
        messages, max_tokens=max_tokens, temperature=0, repeat_penalty=1, stream=True
    ):
        if piece := chunk["choices"][0]["delta"].get("content"):
            first = first or time.perf_counter() - began
            pieces.append(piece)
    seconds = time.perf_counter() - began
    text = "".join(pieces)
    tokens = len(engine.tokenize(text.encode(), add_bos=False)) + 1  # the end token has no text
    times = {"first_token_seconds": first or seconds, "seconds": seconds}
    return {"text": text.strip(), "tokens": min(tokens, max_tokens)} | times


def time_rows(rows, tokens, past_length=96):
    """Seconds of so many steps of so many rows, each with a past of its own: the chat has one row."""
    options = engine.context_params
    options.n_ctx, options.n_seq_max = rows * (past_length + tokens), rows
    context = llama_cpp.llama_init_from_model(engine.model, options)
    batch = llama_cpp.llama_batch_init(options.n_batch, 0, 1)

    def decode(places):
        """One pass over (row, position) pairs."""
        batch.n_tokens = len(places)
        for slot, (row, position) in enumerate(places):
            batch.token[slot], batch.pos[slot], batch.logits[slot] = 5, position, True
            batch.n_seq_id[slot], batch.seq_id[slot][0] = 1, row
        if llama_cpp.llama_decode(context, batch):
            raise RuntimeError("llama.cpp could not decode the rows")

    for row in range(rows):
        decode([(row, position) for position in range(past_length)])
    began = time.perf_counter()
    for step in range(tokens):
        decode([(row, past_length + step) for row in range(rows)])
    seconds = time.perf_counter() - began
    llama_cpp.llama_batch_free(batch)
    llama_cpp.llama_free(context)
    return seconds


given = []
for question in json.loads(questions.read_text(encoding="utf-8")):
    if (rows := question.get("rows", 1)) > 1:
        count = question["max_new_tokens"] - 1
        times = {"first_token_seconds": 0.0, "seconds": time_rows(rows, count)}
        given.append({"id": question["id"], "text": "", "tokens": rows * (count + 1)} | times)
        continue
    urls = [
        f"data:image/png;base64,{base64.b64encode(Path(path).read_bytes()).decode()}" for path in question["images"]
    ]
    content = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    content.append({"type": "text", "text": question["text"]})
    messages = [{"role": "user", "content": content if urls else question["text"]}]
    given.append({"id": question["id"]} | ask(messages, question["max_new_tokens"]))
engine.close()

write_report(answers, f"llama-cpp-python {llama_cpp.__version__}", load_seconds, given)
