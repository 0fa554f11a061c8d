"""Asks a checkpoint through vLLM's class LLM: python ask_vllm.py CHECKPOINT QUESTIONS.json ANSWERS.json

Runs where vllm is installed and this package need not be. Greedy, in float32, one question at a time.
"""

import json
import os
import sys
import time
from pathlib import Path

from report import write_report

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # one process, whose memory is counted
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")


def main(checkpoint: str, questions_file: str, answers_file: str) -> None:
    start = time.perf_counter()
    import vllm

    questions = json.loads(Path(questions_file).read_text(encoding="utf-8"))
    images = max((len(question["images"]) for question in questions), default=0)
    is_text = "vision_config" not in json.loads((Path(checkpoint) / "config.json").read_text(encoding="utf-8"))
    options = {} if is_text else {"limit_mm_per_prompt": {"image": max(images, 1)}}
    model = vllm.LLM(
        checkpoint,
        trust_remote_code=True,
        dtype="float32",  # left out, float32 weights are computed in bfloat16
        allowed_local_media_path="/",
        disable_log_stats=False,  # they hold the time of the first token
        enforce_eager=True,  # compiling takes longer than all questions
        **options,
    )
    loaded = time.perf_counter()
    answers = []
    for question in questions:
        content = [{"type": "image_url", "image_url": {"url": Path(path).as_uri()}} for path in question["images"]]
        content.append({"type": "text", "text": question["text"]})
        sampling = vllm.SamplingParams(temperature=0, max_tokens=question["max_new_tokens"])
        began = time.perf_counter()
        rows = question.get("rows", 1)
        output = model.chat([[{"role": "user", "content": content}]] * rows, sampling, use_tqdm=False)[0]
        seconds, ids = time.perf_counter() - began, list(output.outputs[0].token_ids)
        # Not its own text, which lacks what comes after bytes that are no whole character: of random weights, most.
        text = model.get_tokenizer().decode(ids, skip_special_tokens=True).strip()
        answer = {"id": question["id"], "text": text, "ids": ids, "tokens": rows * len(ids), "seconds": seconds}
        answers.append(answer | {"first_token_seconds": output.metrics.first_token_latency})
    write_report(answers_file, f"vLLM {vllm.__version__}", loaded - start, answers)


if __name__ == "__main__":
    main(*sys.argv[1:])
