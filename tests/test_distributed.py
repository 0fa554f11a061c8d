"""Two processes (gloo, CPU) train and evaluate as one does, and what they save loads alone."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import CHECKPOINT, REPOSITORY, caption_row, png, write_jsonl
from safetensors.torch import load_file
from test_training_command import PROGRAM
from transformers import pipeline

from minimind_v.training.train import main

TRAIN = ["--model", CHECKPOINT, "--max-steps", 4, "--learning-rate", 1e-3, "--logging-steps", 1, "--use-cpu", "true"]
TRAIN += ["--train-sampling-strategy", "sequential", "--save-strategy", "no", "--eval-strategy", "steps"]
TRAIN += ["--eval-steps", 2, "--num-samples", 3]
FSDP = [Path(__file__).parent / "fsdp_on_cpu.py"]


def command_line(folder, name, rows_per_process):
    options = ["--data", folder / "rows.jsonl", "--eval-data", folder / "held-out.jsonl"]
    options += ["--output-dir", folder / name, "--per-device-train-batch-size", rows_per_process]
    options += ["--per-device-eval-batch-size", rows_per_process]
    return [str(option) for option in [*TRAIN, *options]]


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
    write_jsonl(folder / "held-out.jsonl", rows[:4])
    main(command_line(folder, "single", 4))
    return folder


def launch(config, program, options):
    """Runs a training in two processes."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config, "--num_processes", 2]
    command += ["--mixed_precision", "no", "--main_process_port", 0, *program, *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=120, env=environment)


def history(folder, name):
    """Losses and gradient norms of the steps, and losses of the evaluations."""
    log = json.loads((folder / name / "trainer_state.json").read_text())["log_history"]
    steps = [(entry["loss"], entry["grad_norm"]) for entry in log if "loss" in entry]
    return steps, [entry["eval_loss"] for entry in log if "eval_loss" in entry]


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "fsdp2-tower"])
def test_two_processes_train_and_evaluate_as_one(name, runs):
    """Also where one process has two rows with pictures and the other none at all: it must not wait for ever."""
    program, config = PROGRAM if name == "ddp" else FSDP, runs / f"{name}.yaml"
    text = (REPOSITORY / "examples" / "accelerate" / f"{name.removesuffix('-tower')}.yaml").read_text()
    if name == "fsdp2-tower":  # the weights of the tower's layers are spread over the processes too, layer by layer
        text = text.replace(": Qwen3MoeDecoderLayer\n", ": Qwen3MoeDecoderLayer,SiglipEncoderLayer\n")
    config.write_text(text)
    result = launch(config, program, command_line(runs, name, 2))
    assert result.returncode == 0, result.stderr[-3000:]

    steps, evaluations = history(runs, "single")
    assert len(steps) == 4 and len(evaluations) == 2
    torch.testing.assert_close(history(runs, name), (steps, evaluations), rtol=1e-4, atol=1e-5)
    samples = [(runs / folder / "samples.jsonl").read_text() for folder in (name, "single")]
    assert samples[0] == samples[1]
    weights, expected = (load_file(runs / folder / "model.safetensors") for folder in (name, "single"))
    for key, tensor in expected.items():
        torch.testing.assert_close(weights[key], tensor, rtol=1e-3, atol=1e-4)
    caption = pipeline("image-to-text", model=str(runs / name), trust_remote_code=True)
    assert type(caption.model).__name__ == "MiniMindVForConditionalGeneration"
    assert caption(str(runs / "0.png"))[0]["generated_text"]


def test_a_process_with_nothing_but_broken_rows_goes_on(tmp_path):
    """In the first step one process has none to train on, in the last neither has; as one process with all rows."""
    images = ["0.png", "1.png", *["missing.png"] * 2, "0.png", "missing.png", "1.png", "1.png", *["missing.png"] * 4]
    for seed in range(2):
        (tmp_path / f"{seed}.png").write_bytes(png(seed))
    write_jsonl(tmp_path / "rows.jsonl", [caption_row(image) for image in images])
    write_jsonl(tmp_path / "held-out.jsonl", [caption_row("0.png"), caption_row("missing.png"), caption_row("1.png")])
    more = ["--check-data", "false", "--on-broken", "skip", "--max-steps", "3"]
    main([*command_line(tmp_path, "single", 4), *more])
    config = REPOSITORY / "examples" / "accelerate" / "ddp.yaml"
    result = launch(config, PROGRAM, [*command_line(tmp_path, "ddp", 2), *more])
    assert result.returncode == 0, result.stderr[-3000:]
    (steps, evaluations), (expected, expected_evaluations) = (history(tmp_path, name) for name in ("ddp", "single"))
    torch.testing.assert_close(steps, expected, rtol=1e-4, atol=1e-5)
    assert len(steps) == 3 and steps[2] == (0, 0)
    # Before the last step, in which DDP gives the projector gradients of 0, which move it, and one process gives none
    assert evaluations[0] == pytest.approx(expected_evaluations[0], rel=1e-4)
    for name in ("single", "ddp"):
        assert json.loads((tmp_path / name / "all_results.json").read_text())["rows_left_out"] == 7


@pytest.mark.skipif(torch.cuda.is_available(), reason="with GPUs the processes see each other")
def test_processes_that_do_not_see_each_other_are_refused(runs):
    options = [option for option in command_line(runs, "alone", 2) if option not in ("--use-cpu", "true")]
    result = launch(REPOSITORY / "examples" / "accelerate" / "ddp.yaml", PROGRAM, options)
    assert result.returncode != 0 and not (runs / "alone").exists()
    assert "error: 2 processes were launched, but each sees itself alone" in result.stderr
