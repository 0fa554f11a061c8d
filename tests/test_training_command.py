"""The commands `check` and `train`: what they print and refuse, and what a training leaves behind."""

import json
import logging
import os
import re
import signal
import subprocess
import sys

import pytest
import torch
from conftest import CHECKPOINT, caption_row, make_model, png, write_jsonl
from PIL import Image
from safetensors.torch import load_file
from transformers import pipeline

from minimind_v.training import MiniMindVDataCollator, MiniMindVDataset
from minimind_v.training.arguments import TrainArguments
from minimind_v.training.check import check, show
from minimind_v.training.output_folder import last_checkpoint
from minimind_v.training.report import plot_losses
from minimind_v.training.train import main, train
from minimind_v_cli.__main__ import main as command_line_main

PROGRAM = ["-m", "minimind_v_cli", "train"]  # behind `python` or `accelerate launch`, where a test needs a process


# --- check -----------------------------------------------------------------------------------------------------------


def test_check_reports_what_training_would_meet(folder, capsys):
    rows = [caption_row(f"{seed}.png") for seed in range(3)]
    rows += [caption_row("missing.png"), caption_row("0.png", answer="long " * 400), {"messages": []}]
    data = write_jsonl(folder / "rows.jsonl", rows)
    report = check(data, CHECKPOINT, max_length=128)
    assert report["rows"] == 6 and report["images"] == 3 and len(report["tokens"]) == 3
    assert report["broken"].keys() == {3, 5} and report["too_long"].keys() == {4}
    preview = "<|im_start|>user\n[image]What is this?<|im_end|>\n<|im_start|>assistant\n«A cat.<|im_end|>\n»"
    assert report["preview"][0] == preview
    assert show(data, model=CHECKPOINT, max_length=128, preview=1, html_file=None, workers=0) == 2
    printed = capsys.readouterr().out
    assert "2 broken" in printed and "row 3: image 0 of sample 0" in printed and printed.count(preview) == 1


def test_check_writes_a_page(folder, tmp_path, capsys):
    rows = [caption_row("0.png", question="<b>What</b>?"), caption_row("missing.png")]
    data, page = write_jsonl(folder / "rows.jsonl", rows), tmp_path / "page.html"
    assert show(data, model=CHECKPOINT, max_length=None, preview=0, html_file=page, workers=1) == 1
    assert "page.html" in capsys.readouterr().out
    text = page.read_text()
    assert "<mark>A cat.&lt;|im_end|&gt;" in text and "&lt;b&gt;What&lt;/b&gt;?" in text and "<b>" not in text
    assert text.count('<img src="data:image/png;base64,') == 1 and "row 1: image 0 of sample 0" in text


class RowsThatStop(list):
    """Raises what ends a data loader, and not an error, where a row is None."""

    def __getitem__(self, index):
        return super().__getitem__(index) or next(iter(()))


def test_nothing_in_a_row_is_taken_for_the_end_of_the_data(folder, tmp_path):
    rows = [caption_row(f"{folder}/{i % 6}.png") for i in range(12)]
    rows[2]["images"] = [None]
    report = check(RowsThatStop([*rows, None, rows[0]]), CHECKPOINT)
    assert report["broken"] == {2: "image 0 of the row is null", 12: "StopIteration"} and len(report["tokens"]) == 12
    write_jsonl(folder / "rows.jsonl", rows)
    options = {"num_train_epochs": 1, "per_device_train_batch_size": 4, "on_broken": "skip", "check_data": False}
    trainer = train(arguments(tmp_path, CHECKPOINT, folder / "rows.jsonl", **options))
    assert trainer.state.global_step == 3


# --- train -----------------------------------------------------------------------------------------------------------


def command_line(data, output, *more):
    options = ["--model", CHECKPOINT, "--data", data, "--output-dir", output, "--stage", "sft", "--use-cpu", "true"]
    options += ["--learning-rate", "1e-3", "--per-device-train-batch-size", 2, "--max-steps", 12, "--seed", 1]
    return [str(option) for option in [*options, "--logging-steps", 1, "--save-steps", 5, *more]]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Data, and what a training that nothing interrupts makes of it."""
    folder = tmp_path_factory.mktemp("whole")
    rows = []
    for seed in range(6):
        (folder / f"{seed}.png").write_bytes(png(seed))
        rows.append({"file_name": f"{seed}.png", "text": f"Picture {seed}."})
    write_jsonl(folder / "metadata.jsonl", rows)
    main(command_line(folder, folder / "out"))
    return folder


@pytest.mark.parametrize("signal_name", ["SIGTERM", "SIGKILL"])
def test_interrupted_and_resumed_training_is_bit_identical(signal_name, whole, tmp_path):
    options = command_line(whole, tmp_path)
    process = subprocess.Popen(
        [sys.executable, "-u", *PROGRAM, *options], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    losses = 0
    for line in process.stdout:
        assert "Loading weights" not in line
        losses += "'loss'" in line
        if losses == (1 if signal_name == "SIGTERM" else 7):  # a step after the checkpoint of step 5
            process.send_signal(getattr(signal, signal_name))
            break
    rest = process.stdout.read()
    saved = sorted(os.listdir(tmp_path))
    if signal_name == "SIGTERM":
        assert process.wait(timeout=100) == 1 and "the checkpoint is saved. Go on with the same command" in rest
        assert saved and all(1 <= int(name.split("-")[1]) < 12 for name in saved)  # on a busy machine past step 5
    else:
        assert process.wait(timeout=100) == -signal.SIGKILL and "checkpoint-5" in saved and "config.json" not in saved
        (tmp_path / "checkpoint-11").mkdir()  # as one whose writing was cut off
        assert last_checkpoint(tmp_path).endswith(("checkpoint-5", "checkpoint-10"))
    main([*options, "--resume-from-checkpoint", "latest"])

    weights = [load_file(folder / "model.safetensors") for folder in (whole / "out", tmp_path)]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    histories = []
    for folder in (whole / "out", tmp_path):
        state = json.loads((folder / "trainer_state.json").read_text())
        histories.append([(entry["step"], entry["loss"]) for entry in state["log_history"] if "loss" in entry])
    assert histories[0] == histories[1] and len(histories[0]) == 12
    tower = load_file(CHECKPOINT / "model.safetensors")
    for name, tensor in weights[0].items():
        assert ("vision_tower" not in name) or torch.equal(tensor, tower[name].float())


def test_a_training_leaves_a_model_with_its_story(folder, tmp_path, recwarn):
    """Held-out loss and answers, cached features, LoRA with checkpointing, TensorBoard, curve and card, in one run."""
    pytest.importorskip("peft", reason="LoRA needs the extra `train`")
    pytest.importorskip("matplotlib", reason="the loss curve needs the extra `train`")
    pytest.importorskip("tensorboard", reason="logging needs the extra `train`")
    out = tmp_path / "out"
    more = ["--eval-fraction", "0.34", "--cache-image-features", tmp_path / "features", "--lora-rank", "4"]
    more += ["--report-to", "tensorboard", "--eval-strategy", "steps", "--eval-steps", "6"]
    main(command_line(folder, out, *more, "--gradient-checkpointing", "true"))
    metrics = json.loads((out / "all_results.json").read_text())
    assert {"train_loss", "eval_loss", "rows_left_out"} <= metrics.keys()
    samples = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert [sample["step"] for sample in samples] == [6, 6, 12, 12]
    assert all(sample["expected"] == f"Picture {sample['row']}." for sample in samples)
    assert list((out / "runs").rglob("events.out.tfevents*"))
    assert (out / "loss_curve.png").stat().st_size > 5000
    assert not (out / "adapter" / "README.md").exists()  # which PEFT fills with "[More Information Needed]"
    card = (out / "README.md").read_text()
    assert "LoRA of rank 4" in card and f"{metrics['eval_loss']:.4f}" in card and "loss_curve.png" in card
    assert len(list((tmp_path / "features").rglob("*.safetensors"))) == 1
    # the merged model answers as at the last evaluation, from the files alone
    caption = pipeline("image-to-text", model=str(out), trust_remote_code=True)
    answers = [caption(str(folder / f"{sample['row']}.png"))[0]["generated_text"] for sample in samples[2:]]
    assert answers == [sample["answer"].strip() for sample in samples[2:]]
    assert not [warning for warning in recwarn if "is_gradient_checkpointing" in str(warning.message)]  # PEFT's doing


def arguments(tmp_path, model, data, **changes):
    options = {"learning_rate": 3e-3, "use_cpu": True, "report_to": "none", "logging_steps": 1, "save_strategy": "no"}
    return TrainArguments(model=str(model), data=str(data), output_dir=str(tmp_path / "out"), **options | changes)


def logged(trainer):
    """The last logged value of each kind."""
    return {key: value for entry in trainer.state.log_history for key, value in entry.items()}


@pytest.mark.parametrize("moe", [False, True])
def test_sixteen_pictures_are_learned_exactly(moe, processor, tmp_path):
    """From random weights, with a frozen tower: every greedy caption is exact."""
    model = make_model(moe=moe, hidden_size=64, intermediate_size=128)
    model.generation_config.update(eos_token_id=2, max_new_tokens=16)
    model.save_pretrained(tmp_path / "start")
    processor.save_pretrained(tmp_path / "start")
    rows = []
    for seed in range(16):
        (tmp_path / f"{seed}.png").write_bytes(png(seed))
        rows.append({"file_name": f"{seed}.png", "text": f"{seed * 37} 图片 is here."})
    write_jsonl(tmp_path / "metadata.jsonl", rows)
    options = {"num_train_epochs": 30, "learning_rate": 6e-3, "per_device_train_batch_size": 8, "packing": True}
    trainer = train(arguments(tmp_path, tmp_path / "start", tmp_path, **options))
    losses = [entry for entry in trainer.state.log_history if "loss" in entry]
    if moe:
        assert all(entry["router_loss"] > 0 for entry in losses)
    else:
        assert "router_loss" not in losses[0]
    caption = pipeline("image-to-text", model=str(tmp_path / "out"), trust_remote_code=True)
    answers = [caption(str(tmp_path / row["file_name"]), max_new_tokens=16)[0]["generated_text"] for row in rows]
    exact = sum(answer == row["text"] for answer, row in zip(answers, rows, strict=True))
    assert exact / 16 > 0.95, answers


def test_broken_rows_are_found_before_the_first_step(folder, tmp_path, capsys):
    lines = [json.dumps(caption_row(f"{seed}.png", "What is this?", f"Picture {seed}.")) for seed in range(6)]
    lines += ["{broken", json.dumps(caption_row("missing.png")), json.dumps(caption_row("0.png", answer="long " * 99))]
    roles = [{"role": "assistant", "content": "A"}, {"role": "assistant", "content": "B"}]
    lines += [json.dumps({"messages": roles}), json.dumps(caption_row("0.png") | {"images": []})]
    Image.new("1", (400, 200)).save(folder / "huge.png")
    lines += [json.dumps(caption_row("huge.png"))]
    (folder / "rows.jsonl").write_text("\n".join(lines))
    options = {"max_steps": 2, "max_length": 60, "max_image_pixels": 70_000}
    with pytest.raises(ValueError, match="5 of 12 rows are broken") as error:
        train(arguments(tmp_path, CHECKPOINT, folder / "rows.jsonl", **options))
    reasons = ["row 6: Expecting property name", "row 7: image 0 of sample 0", "row 9: the roles of a chat must be"]
    reasons += ["row 10: the text has places for 1 images", "row 11: image 0 of sample 0", "--on-broken skip"]
    assert all(reason in str(error.value) for reason in reasons)
    assert "it has more than 70000 pixels and was not decoded" in str(error.value)
    trainer = train(arguments(tmp_path, CHECKPOINT, folder / "rows.jsonl", on_broken="skip", **options))
    assert len(trainer.train_dataset) == 6 and "row 8: " in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "all_results.json").read_text())["rows_left_out"] == 6


@pytest.mark.parametrize("workers, packing", [(0, False), (2, True)])
def test_broken_rows_that_training_meets_are_left_out_and_counted(workers, packing, folder, tmp_path):
    """Not found beforehand: also lines that are not JSON, a whole batch of broken rows, and in the workers."""
    lines = [json.dumps(caption_row(f"{seed}.png")) for seed in range(3)]
    lines += ["{broken", json.dumps(caption_row("missing.png")), json.dumps(caption_row(None))]
    (folder / "rows.jsonl").write_text("\n".join(lines))
    options = {"check_data": False, "on_broken": "skip", "per_device_train_batch_size": 2, "num_train_epochs": 2}
    options |= {"dataloader_num_workers": workers, "packing": packing, "train_sampling_strategy": "sequential"}
    trainer = train(arguments(tmp_path, CHECKPOINT, folder / "rows.jsonl", **options))
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert [loss > 0 for loss in losses] == [True, True, False] * 2 and losses[2] == losses[5] == 0
    assert json.loads((tmp_path / "out" / "all_results.json").read_text())["rows_left_out"] == 3
    assert all(parameter.isfinite().all() for parameter in trainer.model.parameters())
    options["on_broken"] = "error"
    with pytest.raises(ValueError, match=r"^Row 3: Expecting property name"):
        train(arguments(tmp_path, CHECKPOINT, folder / "rows.jsonl", **options, overwrite=True))


def test_a_training_without_a_single_usable_row_is_no_success(folder, tmp_path):
    data = write_jsonl(folder / "rows.jsonl", [caption_row("missing.png"), caption_row(None)])
    with pytest.raises(ValueError, match="None of the 2 rows could be trained on"):
        train(arguments(tmp_path, CHECKPOINT, data, check_data=False, on_broken="skip", max_steps=1))
    assert not (tmp_path / "out" / "config.json").exists()


def test_held_out_rows_are_always_checked(folder, tmp_path, capsys):
    rows = [caption_row(f"{seed}.png") for seed in range(6)] + [caption_row("missing.png")] * 6
    data = write_jsonl(folder / "rows.jsonl", rows)
    options = {"check_data": False, "on_broken": "skip", "eval_fraction": 0.5, "max_steps": 1}
    trainer = train(arguments(tmp_path, CHECKPOINT, data, **options))
    numbers = [trainer.eval_dataset[i]["row"] for i in range(len(trainer.eval_dataset))]
    assert numbers and all(number < 6 for number in numbers)
    left_out = re.findall(r"row (\d+): image 0", capsys.readouterr().out)
    assert len(left_out) == 6 - len(numbers) and all(int(number) >= 6 for number in left_out)
    assert logged(trainer)["eval_loss"] > 0


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("moe", [False, True])
def test_losses_are_those_of_separate_rows(moe, smoothing, processor, folder, tmp_path):
    """Of training and evaluation, packed or not, with smoothed labels or not: as computed here row by row."""
    model = make_model(moe=moe, router_aux_loss_type="batch", router_aux_loss_coef=0.0)
    model.save_pretrained(tmp_path / "start")
    processor.save_pretrained(tmp_path / "start")
    rows = [caption_row(f"{seed}.png", answer="A picture. " * (seed + 1)) for seed in range(4)]
    data = write_jsonl(folder / "rows.jsonl", rows)
    total = count = 0
    collate, dataset = MiniMindVDataCollator(processor), MiniMindVDataset(data)
    for i in range(4):
        batch = collate([dataset[i]])
        labels = batch.pop("labels")[0, 1:]
        logits = model(**batch).logits[0, :-1]
        options = {"reduction": "sum", "label_smoothing": smoothing, "ignore_index": -100}
        total += torch.nn.functional.cross_entropy(logits, labels, **options).item()
        count += (labels != -100).sum().item()
    for packing in (False, True):
        options = {"max_steps": 1, "learning_rate": 0.0, "packing": packing, "label_smoothing_factor": smoothing}
        options |= {"eval_data": str(data), "num_samples": 0, "overwrite": True}
        trainer = train(arguments(tmp_path, tmp_path / "start", data, **options))
        log = logged(trainer)
        assert log["loss"] == pytest.approx(total / count, rel=1e-4)
        assert log["eval_loss"] == pytest.approx(total / count, rel=1e-4)
        assert ("router_loss" in log) == moe


def test_evaluation_weighs_packed_batches_as_separate_rows(folder, tmp_path):
    rows = [caption_row(f"{seed}.png", answer="A. " * 3 ** (seed // 2)) for seed in range(6)]
    data = write_jsonl(folder / "rows.jsonl", rows)
    losses = []
    for packing in (False, True):
        options = {"max_steps": 1, "learning_rate": 0.0, "packing": packing, "eval_data": str(data), "num_samples": 0}
        options |= {"per_device_eval_batch_size": 4, "overwrite": True}
        trainer = train(arguments(tmp_path, CHECKPOINT, data, **options))
        losses.append(logged(trainer)["eval_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize(
    "options, rates",
    [
        ({}, [1e-3, 5.5e-4]),  # the original's: a cosine down to 10 %
        ({"lr_scheduler_type": "linear"}, [1e-3, 5e-4]),
        ({"lr_scheduler_type": "cosine"}, [1e-3, 5e-4]),
        ({"lr_scheduler_kwargs": {"min_lr_rate": 0.5}}, [1e-3, 7.5e-4]),
    ],
)
def test_every_scheduler_works(options, rates, folder, tmp_path):
    trainer = train(arguments(tmp_path, CHECKPOINT, folder, max_steps=2, learning_rate=1e-3, **options))
    logged = [entry["learning_rate"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged == pytest.approx(rates)


def test_a_short_training_has_a_curve_too(folder, tmp_path, capsys, recwarn):
    pytest.importorskip("matplotlib", reason="the loss curve needs the extra `train`")
    trainer = train(arguments(tmp_path, CHECKPOINT, folder, max_steps=3, logging_steps=10))
    assert [entry["step"] for entry in trainer.state.log_history if "loss" in entry] == [1, 2, 3]
    assert (tmp_path / "out" / "loss_curve.png").exists()
    assert f"minimind-v caption PICTURE --model {tmp_path / 'out'}\n" in capsys.readouterr().out
    plot_losses([], tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists() and not [w for w in recwarn if "handles" in str(w.message)]


def test_a_training_that_diverges_is_no_success(folder, tmp_path):
    options = {"learning_rate": 1e5, "max_steps": 4, "max_grad_norm": 0.0}
    with pytest.raises(ValueError, match=r"The training has diverged: .* Begin anew with a lower --learning-rate"):
        train(arguments(tmp_path, CHECKPOINT, folder, **options))
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_checkpoints_and_steps_that_are_none(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere is no checkpoint of a training"):
        train(arguments(tmp_path, CHECKPOINT, folder, resume_from_checkpoint=str(tmp_path / "nowhere")))
    with pytest.raises(ValueError, match="--max-steps 0 trains nothing"):
        arguments(tmp_path, CHECKPOINT, folder, max_steps=0)


def test_two_trainings_do_not_mix_in_one_folder(folder, tmp_path):
    pytest.importorskip("peft", reason="LoRA needs the extra `train`")
    out = tmp_path / "out"
    train(arguments(tmp_path, CHECKPOINT, folder, max_steps=1, lora_rank=2, eval_fraction=0.2, save_strategy="steps"))
    assert {"adapter", "checkpoint-1", "samples.jsonl"} <= {path.name for path in out.iterdir()}
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    with pytest.raises(FileExistsError, match=r"out is not empty.*--overwrite.*--resume-from-checkpoint latest"):
        train(arguments(tmp_path, CHECKPOINT, folder, max_steps=1))
    with pytest.raises(FileExistsError, match=r"out is not empty"):
        train(arguments(tmp_path, CHECKPOINT, folder, resume_from_checkpoint=str(tmp_path / "other" / "checkpoint-1")))
    with pytest.raises(FileNotFoundError, match=r"missing.jsonl does not exist"):  # then nothing is deleted either
        train(arguments(tmp_path, CHECKPOINT, folder / "missing.jsonl", max_steps=1, overwrite=True))
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    train(arguments(tmp_path, CHECKPOINT, folder, max_steps=1, overwrite=True))
    assert not {"adapter", "checkpoint-1", "samples.jsonl"} & {path.name for path in out.iterdir()}
    with pytest.raises(FileNotFoundError, match=r"out has no complete checkpoint to go on from. Start without"):
        train(arguments(tmp_path, CHECKPOINT, folder, max_steps=1, resume_from_checkpoint="latest"))
    with pytest.raises(ValueError, match=r"--overwrite would delete .*out, because it is in --output-dir"):
        train(arguments(tmp_path, out, folder, max_steps=1, overwrite=True))
    with pytest.raises(ValueError, match="--overwrite begins anew, --resume-from-checkpoint goes on"):
        arguments(tmp_path, CHECKPOINT, folder, overwrite=True, resume_from_checkpoint="latest")


def test_the_newest_checkpoints_stay_whatever_the_clock_says(folder, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    out, options = tmp_path / "out", {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 1}
    train(arguments(tmp_path, CHECKPOINT, folder, max_steps=2, **options))
    os.utime(out / "checkpoint-2", (2e9, 2e9))
    (out / "checkpoint-9").mkdir()  # of an interrupted training that had come further
    train(arguments(tmp_path, CHECKPOINT, folder, max_steps=4, resume_from_checkpoint="latest", **options))
    assert sorted(path.name for path in out.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-9"]
    assert "missing keys" not in caplog.text


def test_rows_left_out_of_the_training_data_stay_in_the_held_out_data(folder, tmp_path):
    rows = [caption_row("missing.png"), caption_row("0.png"), caption_row("1.png")]
    data, held_out = write_jsonl(folder / "a.jsonl", rows), write_jsonl(folder / "b.jsonl", rows[::-1])
    options = {"max_steps": 1, "on_broken": "skip", "eval_data": str(held_out)}
    trainer = train(arguments(tmp_path, CHECKPOINT, data, **options))
    assert [trainer.train_dataset[i]["row"] for i in range(len(trainer.train_dataset))] == [1, 2]
    assert [trainer.eval_dataset[i]["row"] for i in range(len(trainer.eval_dataset))] == [0, 1]


@pytest.mark.parametrize(
    "options, message",
    [
        (["--epochs", "3"], "error: unrecognized argument --epochs (did you mean --num-train-epochs?)."),
        (["--batch-size", "3"], "error: unrecognized argument --batch-size (did you mean --per-device-train-batch"),
        (["--learn-rate=3"], "error: unrecognized argument --learn-rate=3 (did you mean --learning-rate?)."),
        (["--xyz"], "error: unrecognized argument --xyz. See"),
        (["--stage", "finetune"], "error: argument --stage: invalid choice: 'finetune' (choose from"),
        (["--model", "no_such_folder"], "error: --model no_such_folder is neither a folder nor USER/REPO of the Hub."),
        (["--freeze-llm", "3"], "error: argument --freeze_llm/--freeze-llm: invalid choice: '3' (choose from"),
        (["--lora-rank", "4", "--stage", "pretrain"], "error: --lora-rank adapts the whole decoder"),
        (["--eval-fraction", "1.5"], "error: --eval-fraction must be from 0 to below 1"),
        (["--data", ""], "error: Name a checkpoint with --model and training data with --data."),
    ],
)
def test_mistakes_of_the_command_line_are_one_line(options, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit:
        main(["--model", str(CHECKPOINT), "--data", str(tmp_path), *options])
    assert exit.value.code == 2
    printed = capsys.readouterr().err
    assert printed.startswith(message) and printed.endswith(". See minimind-v train --help.\n")
    assert printed.count("\n") == 1


def test_data_that_is_missing_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"metadata.jsonl does not exist. A folder of pictures"):
        train(arguments(tmp_path, CHECKPOINT, tmp_path))


def test_missing_extras_are_named(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("minimind_v.training.arguments.is_tensorboard_available", lambda: False)
    with pytest.raises(ImportError, match=r'--report-to tensorboard needs .*: pip install "minimind-v\[train\]"'):
        arguments(tmp_path, CHECKPOINT, folder, report_to="tensorboard")


def test_limits_for_pictures_of_strangers(folder, tmp_path):
    """Of check and of training; a host is refused before it is asked."""
    rows = [caption_row("0.png"), caption_row("large.png"), caption_row("http://127.0.0.1:9/a.png")]
    Image.new("RGB", (400, 200)).save(folder / "large.png")
    data = write_jsonl(folder / "rows.jsonl", rows)
    limits = {"max_image_pixels": 70_000, "allowed_hosts": "example.com"}
    broken = check(data, CHECKPOINT, max_image_pixels=70_000, allowed_hosts=["example.com"])["broken"]
    assert broken.keys() == {1, 2} and "more than 70000 pixels" in broken[1] and "not an allowed one" in broken[2]
    assert check(data, CHECKPOINT)["broken"].keys() == {2}  # a private address
    trainer = train(arguments(tmp_path, CHECKPOINT, data, max_steps=1, on_broken="skip", **limits))
    assert len(trainer.train_dataset) == 1
    options = ["--max-image-pixels", "70000", "--allowed-hosts", "example.com,127.0.0.1"]
    with pytest.raises(SystemExit) as exit:
        command_line_main(["check", str(data), *options])
    assert exit.value.code == 1
