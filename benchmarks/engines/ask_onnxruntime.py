"""ONNX Runtime, with the program that every export brings: ask_onnxruntime.py MODEL QUESTIONS.json ANSWERS.json"""

import json
import os
import sys
import time
from pathlib import Path

import numpy as np
import onnxruntime
from report import write_report

model, questions, answers = sys.argv[1:]
sys.path.insert(0, model)
from chat import Chat  # noqa: E402 - it is in the folder

started = time.perf_counter()
chat = Chat(model, int(os.environ.get("OMP_NUM_THREADS", 0)))
load_seconds, results = time.perf_counter() - started, []


def time_rows(rows, tokens, past_length=96):
    """Seconds of so many steps of so many rows, on a cache of zeros: the program in the folder asks one row."""
    past = {
        name: np.zeros((rows, shape[1], past_length, shape[3]), np.float32) for name, shape in chat.model.cache.items()
    }
    start = time.perf_counter()
    for _ in range(tokens):
        _, past = chat.model.step(np.full((rows, 1), 5), past)
    return time.perf_counter() - start


for question in json.loads(Path(questions).read_text(encoding="utf-8")):
    if (rows := question.get("rows", 1)) > 1:
        count = question["max_new_tokens"] - 1
        times = {"first_token_seconds": 0.0, "seconds": time_rows(rows, count)}
        results.append({"id": question["id"], "text": "", "tokens": rows * (count + 1)} | times)
        continue
    started, pieces, times = time.perf_counter(), [], []
    for piece in chat.ask(question["text"], question["images"], question["max_new_tokens"]):
        pieces.append(piece)
        times.append(time.perf_counter() - started)
    results.append(
        {
            "id": question["id"],
            "text": "".join(pieces).strip(),
            "tokens": len(pieces),
            "first_token_seconds": times[0] if times else None,
            "seconds": time.perf_counter() - started,
        }
    )
write_report(answers, f"onnxruntime {onnxruntime.__version__}", load_seconds, results)
