"""Trains the embedded model from nothing: data, teacher, tower, projector and decoder, evaluation.

    python examples/emoji/train.py

Each step is a command of its own, which is printed and can be run alone. A step that is finished is not run again, and
an interrupted one goes on from its last checkpoint.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import matplotlib
import torch
from matplotlib import pyplot
from transformers import AutoModelForImageTextToText, AutoProcessor

import minimind_v  # noqa: F401 - makes the model known to the Auto classes

HERE = Path(__file__).resolve().parent


def run(name: str, *command: object, minutes: Path) -> None:
    """Runs a command of this Python and adds the minutes it took to a file."""
    arguments = [sys.executable, *map(str, command)]
    print(f"{name}: {' '.join(arguments[1:])}", flush=True)
    start = time.time()
    subprocess.run(arguments, check=True)
    spent = json.loads(minutes.read_text()) if minutes.exists() else {}
    spent[name] = round(spent.get(name, 0) + (time.time() - start) / 60, 2)
    minutes.write_text(json.dumps(spent, indent=1))


def plot_losses(work: Path, file: Path) -> None:
    """Draws the training loss of the three stages side by side."""
    matplotlib.use("agg")
    stages = {"teacher": "1. teacher", "tower": "2. tower", "sft": "3. projector and decoder"}
    figure, axes = pyplot.subplots(1, len(stages), figsize=(9, 2.6), layout="constrained")
    for plot, (folder, title) in zip(axes, stages.items(), strict=True):
        state = json.loads((work / folder / "trainer_state.json").read_text())
        points = [(entry["step"], entry["loss"]) for entry in state["log_history"] if "loss" in entry]
        plot.plot(*zip(*points, strict=True))
        plot.set(title=title, xlabel="step", ylabel="loss", ylim=(0, None))
        plot.grid(alpha=0.3)
    figure.savefig(file, dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packages", type=Path, default=Path("data/packages"), help="folder of the npm tarballs")
    parser.add_argument("--data", type=Path, default=Path("data/emoji"), help="folder of the data set")
    parser.add_argument("--work", type=Path, default=Path("data/emoji-run"), help="folder of the stages")
    parser.add_argument("--output", type=Path, default=Path("checkpoints/minimind-v-emoji"))
    options = parser.parse_args()
    data, work = options.data, options.work
    work.mkdir(parents=True, exist_ok=True)
    minutes = work / "minutes.json"

    if not (data / "tokenizer/tokenizer.json").exists():
        run("data", HERE / "prepare.py", "--output", data, "--packages", options.packages, minutes=minutes)
    if not (work / "tower.json").exists():
        run("tower", HERE / "train_tower.py", "--data", data, "--output", work, minutes=minutes)
    if not (work / "chats/train.jsonl").exists():
        run("chats", HERE / "chats.py", "--data", data, "--output", work / "chats", minutes=minutes)

    training = ["-m", "minimind_v_cli", "train", "--data", work / "chats/train.jsonl"]
    training += ["--cache-image-features", work / "features", "--report-to", "none", "--logging-steps", "50"]
    training += ["--per-device-train-batch-size", "64", "--adam-beta2", "0.98", "--resume-from-checkpoint", "latest"]
    training += ["--model", work / "start", "--output-dir", work / "sft", "--stage", "sft", "--max-steps", "2400"]
    training += ["--learning-rate", "2e-3", "--warmup-steps", "50", "--save-steps", "250"]
    training += ["--check-data", "false"]  # prepare.py and chats.py write no broken rows
    if not (work / "sft/all_results.json").exists():
        run("projector and decoder", *training, minutes=minutes)

    options.output.mkdir(parents=True, exist_ok=True)
    card = options.output / "README.md"
    kept = card.read_text(encoding="utf-8") if card.exists() else (work / "sft/README.md").read_text(encoding="utf-8")
    AutoModelForImageTextToText.from_pretrained(work / "sft", dtype=torch.bfloat16).save_pretrained(options.output)
    AutoProcessor.from_pretrained(work / "sft").save_pretrained(options.output)
    card.write_text(kept, encoding="utf-8")
    run("evaluation", HERE / "evaluate.py", "--data", data, "--model", options.output, "--output", work / "results",
        minutes=minutes)  # fmt: skip
    plot_losses(work, HERE / "losses.png")
    shutil.copy(work / "results/results.json", HERE)
    shutil.copy(work / "results/answers.tsv", HERE)
    shutil.copy(work / "results/grid.png", options.output)


if __name__ == "__main__":
    main()
