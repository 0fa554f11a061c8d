"""Two processes (gloo, CPU) train as one does, and what they save loads alone."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import CHECKPOINT, REPOSITORY, caption_row, png, write_jsonl
from safetensors.torch import load_file
from transformers import pipeline

TRAIN = ["--model", CHECKPOINT, "--max-steps", 4, "--learning-rate", 1e-3, "--logging-steps", 1, "--use-cpu", "true"]
TRAIN += ["--train-sampling-strategy", "sequential", "--save-strategy", "no"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folder with data, two rows with a picture and two without in turn, and what one process makes of it."""
    folder = tmp_path_factory.mktemp("runs")
    pictures, texts = [], []
    for seed in range(8):
        (folder / f"{seed}.png").write_bytes(png(seed))
        pictures.append(caption_row(f"{seed}.png", answer=f"A picture, number {seed}."))
        question = [{"type": "text", "text": "Hello there."}]
        answer = [{"type": "text", "text": "Hi, and good day to you." * (1 + seed % 3)}]
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        texts.append({"messages": messages, "images": []})
    rows = [row for i in range(0, 8, 2) for row in pictures[i : i + 2] + texts[i : i + 2]]
    write_jsonl(folder / "rows.jsonl", rows)
    launch(folder, "single", 4, [sys.executable, "-m", "minimind_v.training", "train"])
    return folder


def launch(folder, name, rows_per_process, command):
    options = ["--data", folder / "rows.jsonl", "--output-dir", folder / name]
    options += ["--per-device-train-batch-size", rows_per_process]
    command = [str(argument) for argument in [*command, *TRAIN, *options]]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run(command, capture_output=True, text=True, timeout=280, env=environment)
    assert result.returncode == 0, result.stderr[-3000:]


def history(folder, name):
    state = json.loads((folder / name / "trainer_state.json").read_text())
    return [(entry["loss"], entry["grad_norm"]) for entry in state["log_history"] if "loss" in entry]


@pytest.mark.parametrize(
    "name, program",
    [("ddp", ["-m", "minimind_v.training", "train"]), ("fsdp2", [Path(__file__).parent / "fsdp_on_cpu.py"])],
)
def test_two_processes_train_as_one(name, program, runs):
    """Also where one process has two rows with pictures and the other none at all: it must not wait for ever."""
    config = REPOSITORY / "examples" / "accelerate" / f"{name}.yaml"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config, "--num_processes", 2]
    launch(runs, name, 2, [*command, "--mixed_precision", "no", "--main_process_port", 0, *program])
    assert len(history(runs, "single")) == 4
    torch.testing.assert_close(history(runs, name), history(runs, "single"), rtol=1e-4, atol=1e-5)
    weights, expected = (load_file(runs / folder / "model.safetensors") for folder in (name, "single"))
    for key, tensor in expected.items():
        torch.testing.assert_close(weights[key], tensor, rtol=1e-3, atol=1e-4)
    caption = pipeline("image-to-text", model=str(runs / name), trust_remote_code=True)
    assert type(caption.model).__name__ == "MiniMindVForConditionalGeneration"
    assert caption(str(runs / "0.png"))[0]["generated_text"]
