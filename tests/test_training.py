"""Training: every data form, labels, what moves in each stage, the commands, and resuming."""

import io
import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from conftest import CHECKPOINT, make_model, picture
from original import GOLDEN, read_json
from safetensors.torch import load_file
from transformers import SiglipImageProcessorPil

from minimind_v import MiniMindVProcessor
from minimind_v.conversion.tokenizers import wrap_tokenizer
from minimind_v.training import MiniMindVDataCollator, MiniMindVDataset, freeze
from minimind_v.training.check import check
from minimind_v.training.data import normalize_row

golden = pytest.mark.skipif(not GOLDEN.is_dir(), reason="no ../shared/golden beside the repository")


def png(seed=0):
    buffer = io.BytesIO()
    picture(seed).save(buffer, "PNG")
    return buffer.getvalue()


def write_jsonl(path, rows):
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    return path


def caption_row(image, question="What is this?", answer="A cat."):
    content = [{"type": "image"}, {"type": "text", "text": question}]
    answer = [{"type": "text", "text": answer}]  # Arrow wants one type in all rows
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    return {"messages": messages, "images": [image]}


@pytest.fixture
def folder(tmp_path):
    """Six pictures with captions as an image folder."""
    rows = []
    for seed in range(6):
        (tmp_path / f"{seed}.png").write_bytes(png(seed))
        rows.append({"file_name": f"{seed}.png", "text": f"Picture {seed}."})
    write_jsonl(tmp_path / "metadata.jsonl", rows)
    return tmp_path


# --- Data -----------------------------------------------------------------------------------------------------------


def test_all_forms_of_data_give_the_same_rows(folder, processor):
    datasets = pytest.importorskip("datasets", reason="Parquet needs the extra `train`")
    question = "Describe this image."
    rows = [caption_row(f"{seed}.png", question, f"Picture {seed}.") for seed in range(6)]
    conversations = [
        [{"role": "user", "content": f"<image>{question}"}, {"role": "assistant", "content": f"Picture {seed}."}]
        for seed in range(6)
    ]
    original = [
        {"conversations": json.dumps(c, ensure_ascii=False), "image_bytes": png(seed)}
        for seed, c in enumerate(conversations)
    ]
    unnamed = [json.dumps([{"content": turn["content"]} for turn in c]) for c in conversations]
    several = [{"conversations": c, "image_bytes": [png(seed)]} for seed, c in enumerate(unnamed)]
    sources = [folder, write_jsonl(folder / "rows.jsonl", rows)]
    for name, content in (("original", original), ("several", several)):
        datasets.Dataset.from_list(content).to_parquet(folder / f"{name}.parquet")
        sources.append(folder / f"{name}.parquet")
    sources.append(datasets.Dataset.from_list([{**row, "images": [png(i)]} for i, row in enumerate(rows)]))
    collate = MiniMindVDataCollator(processor)
    batches = []
    for source in sources:
        dataset = MiniMindVDataset(source)
        batches.append(collate([dataset[i] for i in range(len(dataset))]))
    for batch in batches[1:]:
        assert batch.keys() == batches[0].keys()
        assert all(torch.equal(batch[key], batches[0][key]) for key in batch)


@pytest.mark.parametrize(
    "row, message",
    [
        ({"text": "a"}, "a row needs messages and images"),
        ({"messages": [{"role": "user", "content": "a"}]}, "no assistant turn"),
        (caption_row("a.png") | {"images": []}, "places for 1 images, but there are 0"),
        (caption_row("a.png") | {"images": ["a.png", "b.png"]}, "places for 1 images, but there are 2"),
    ],
)
def test_rows_that_cannot_be_trained_on(row, message):
    with pytest.raises(ValueError, match=message):
        normalize_row(row)


def test_missing_and_broken_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"metadata.jsonl does not exist"):
        MiniMindVDataset(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"a": 1}\n{oops\n')
    with pytest.raises(ValueError, match=r"Line 2 of .*rows.jsonl is not JSON"):
        MiniMindVDataset(tmp_path / "rows.jsonl")


# --- Collator -------------------------------------------------------------------------------------------------------


def test_batch_of_mixed_rows(processor):
    rows = [
        caption_row(picture(0), "What?", "A dog 狗。"),
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]},
        {
            "messages": [
                {"role": "user", "content": "<image> and <image>?"},
                {"role": "assistant", "content": "Two."},
                {"role": "user", "content": "Sure?"},
                {"role": "assistant", "content": "Yes."},
            ],
            "images": [picture(1), picture(2)],
        },
    ]
    collate = MiniMindVDataCollator(processor)
    batch = collate([{"messages": normalize_row(row)} for row in rows])
    learned = [processor.decode(labels[labels != -100]) for labels in batch["labels"]]
    end = "<|im_end|>\n"
    assert learned == [f"A dog 狗。{end}", f"Hello.{end}", f"Two.{end}Yes.{end}"]
    assert batch["pixel_values"].shape == (3, 3, 32, 32)
    lengths = batch["attention_mask"].sum(1)
    assert lengths.max() == batch["input_ids"].shape[1]  # padded to the longest, on the right
    for ids, labels, length in zip(batch["input_ids"], batch["labels"], lengths, strict=True):
        assert (ids[length:] == 0).all() and (labels[length:] == -100).all()
    assert (batch["labels"][batch["input_ids"] == 3] == -100).all()
    text_only = collate([{"messages": normalize_row(rows[1])}])
    assert "pixel_values" not in text_only


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("moe", [False, True])
def test_packed_rows_have_the_loss_of_separate_ones(moe, attention, processor):
    rows = [caption_row(picture(0)), caption_row(picture(1), "A longer question about it?", "A dog."), {
        "messages": [{"role": "user", "content": "No picture"}, {"role": "assistant", "content": "Right."}]
    }]  # fmt: skip
    items = [{"messages": normalize_row(row)} for row in rows]
    model = make_model(moe=moe, router_aux_loss_type="batch", router_aux_loss_coef=0.0).train()
    model.set_attn_implementation(attention)
    separate = MiniMindVDataCollator(processor)(items)
    packed = MiniMindVDataCollator(processor, packing=True)(items)
    assert packed["input_ids"].shape == (1, separate["attention_mask"].sum())
    gradients = []
    for batch in (separate, packed):
        model.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        gradients.append((loss.detach(), model.model.language_model.embed_tokens.weight.grad.clone()))
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-5, rtol=1e-4)


def test_long_and_broken_rows(processor, caplog):
    good, long = caption_row(picture(0)), caption_row(picture(1), answer="word " * 60)
    broken = caption_row(b"no picture")
    items = [{"messages": normalize_row(row), "row": i} for i, row in enumerate([good, long, broken])]
    collate = MiniMindVDataCollator(processor, max_length=60, on_broken="skip")
    assert collate(items)["input_ids"].shape[0] == 1
    assert collate.dropped.keys() == {1, 2} and len(caplog.records) == 2
    assert "more than max_length (60)" in collate.dropped[1] and "cannot be read" in collate.dropped[2]
    with pytest.raises(ValueError, match=r"Row 2: image 0 of sample 0 cannot be read as a picture"):
        MiniMindVDataCollator(processor)(items)
    with pytest.raises(ValueError, match="No row of this batch can be used"):
        collate(items[1:])


@golden
def test_labels_are_those_of_the_original():
    """MiniMind-3: token for token what the original's data set trains on."""
    recorded = read_json("tokenizers/parity_minimind3.json")
    tokenizer = wrap_tokenizer(GOLDEN / "tokenizers" / "minimind3", "minimind3", 32768)
    collate = MiniMindVDataCollator(MiniMindVProcessor(SiglipImageProcessorPil(), tokenizer, 64))
    chats, compared = {chat["index"]: chat for chat in recorded["conversations"]}, 0
    for row in recorded["training"]:
        turns = [{"role": turn["role"], "content": turn["content"]} for turn in chats[row["index"]]["messages"]]
        if chats[row["index"]].get("tools") or "<|im_end|>" in str(turns):
            continue
        count = sum(turn["content"].count("<image>") for turn in turns)
        encoded = collate.encode(normalize_row({"messages": turns, "images": [picture()] * count}))
        length = row["max_length"]
        if len(encoded["input_ids"]) > length:  # the original cuts such rows, here they are left out
            continue
        padding = length - len(encoded["input_ids"])
        assert encoded["input_ids"] + [0] * padding == row["input_ids"]
        assert encoded["labels"] + [-100] * padding == row["labels"]
        compared += 1
    assert compared >= 5


# --- Stages ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "stage, freeze_llm, moving",
    [
        ("pretrain", 0, ["multi_modal_projector"]),
        ("sft", 0, ["multi_modal_projector", "language_model"]),
        ("sft", 1, ["multi_modal_projector", "language_model.layers.0.", "language_model.layers.2."]),
        ("sft", 2, ["multi_modal_projector"]),
    ],
)
def test_only_the_parameters_of_the_stage_move(stage, freeze_llm, moving, processor):
    model = make_model(num_hidden_layers=3)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    names = freeze(model, stage, freeze_llm)
    model.train()
    assert not model.model.vision_tower.training and model.model.language_model.training
    batch = MiniMindVDataCollator(processor)([{"messages": normalize_row(caption_row(picture(0)))}])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model(**batch).loss.backward()
    optimizer.step()
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == set(names) == {name for name in before if any(part in name for part in moving)}


# --- Commands -------------------------------------------------------------------------------------------------------


def run(*arguments, **options):
    command = [sys.executable, "-m", "minimind_v.training", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=280, **options)


def test_check_reports_what_training_would_meet(folder, processor, tmp_path):
    rows = [caption_row(f"{seed}.png") for seed in range(3)]
    rows += [caption_row("missing.png"), caption_row("0.png", answer="long " * 400), {"messages": []}]
    data = write_jsonl(folder / "rows.jsonl", rows)
    report = check(data, CHECKPOINT, max_length=128)
    assert report["rows"] == 6 and report["images"] == 3 and len(report["tokens"]) == 3
    assert report["broken"].keys() == {3, 5} and report["too_long"].keys() == {4}
    assert report["preview"][0] == (
        "<|im_start|>user\n[image]What is this?<|im_end|>\n<|im_start|>assistant\n«A cat.<|im_end|>\n»"
    )
    result = run("check", data, "--max-length", 128)
    assert result.returncode == 1 and "2 broken" in result.stdout and "row 3: image 0 of sample 0" in result.stdout


TRAIN = ["--stage", "sft", "--learning-rate", "1e-3", "--per-device-train-batch-size", "2", "--use-cpu", "true"]
TRAIN += ["--max-steps", "12", "--logging-steps", "1", "--save-steps", "100", "--seed", "1"]


def test_interrupted_and_resumed_training_is_bit_identical(folder, tmp_path):
    command = ["train", "--model", CHECKPOINT, "--data", folder, *TRAIN]
    whole = run(*command, "--output-dir", tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr[-2000:]

    resumed = [
        sys.executable,
        "-m",
        "minimind_v.training",
        *map(str, command),
        "--output-dir",
        str(tmp_path / "parts"),
    ]
    process = subprocess.Popen(resumed, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    for line in process.stdout:
        if "'loss'" in line:  # the first step is done
            process.send_signal(signal.SIGTERM)
            break
    rest = process.stdout.read()
    assert process.wait(timeout=100) == 1 and "the checkpoint is saved. Go on with the same command" in rest
    saved = [name for name in os.listdir(tmp_path / "parts") if name.startswith("checkpoint-")]
    assert len(saved) == 1 and 1 <= int(saved[0].split("-")[1]) < 12
    second = run(*command, "--output-dir", tmp_path / "parts", "--resume-from-checkpoint", "latest")
    assert second.returncode == 0, second.stderr[-2000:]

    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts")]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    histories = []
    for name in ("whole", "parts"):
        state = json.loads((tmp_path / name / "trainer_state.json").read_text())
        histories.append([(entry["step"], entry["loss"]) for entry in state["log_history"] if "loss" in entry])
    assert histories[0] == histories[1] and len(histories[0]) == 12
    tower = load_file(CHECKPOINT / "model.safetensors")
    for name, tensor in weights[0].items():
        assert ("vision_tower" not in name) or torch.equal(tensor, tower[name].float())


def test_train_errors_are_one_line(tmp_path):
    result = run("train", "--model", CHECKPOINT, "--data", tmp_path, "--output-dir", tmp_path / "out")
    assert result.returncode == 1 and result.stderr.strip().splitlines()[-1].startswith("error: ")
    assert "metadata.jsonl does not exist" in result.stderr and "Traceback" not in result.stderr
    assert "usage:" in run().stderr
