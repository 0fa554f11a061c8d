"""The examples of TRL's trainers, as they are, for a few steps: they learn, and what they save answers."""

import json
import os
import subprocess
import sys

import pytest
from conftest import REPOSITORY
from transformers import pipeline

pytest.importorskip("trl", minversion="1.16", reason="the examples are written for TRL 1.16")


@pytest.mark.slow
@pytest.mark.parametrize("example", ["sft", "dpo", "grpo"])
def test_trl_trains(example, tmp_path):
    command = [sys.executable, REPOSITORY / "examples" / "trl" / f"{example}.py", "--output_dir", tmp_path]
    command += ["--max_steps", "4", "--use_cpu", "true", "--save_steps", "4"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=280, env=environment)
    assert result.returncode == 0, result.stderr[-3000:]
    state = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())
    entries = [entry for entry in state["log_history"] if "loss" in entry]
    assert len(entries) == 4 and any(entry["grad_norm"] > 0 for entry in entries)
    if example != "grpo":  # whose loss is about 0 by construction
        assert entries[-1]["loss"] < entries[0]["loss"]
    caption = pipeline("image-to-text", model=str(tmp_path), trust_remote_code=True)
    assert caption(str(REPOSITORY / "examples" / "images" / "dog.png"))[0]["generated_text"]
