"""Training: every data form, labels, what is trainable in each stage, cached image features, LoRA."""

import base64
import functools
import http.server
import json
import os
import random
import socket
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import caption_row, make_model, picture, png, user, write_jsonl
from original import GOLDEN, convert_case, load_case, read_json, recorded
from transformers import AutoProcessor, SiglipImageProcessorPil

from minimind_v import MiniMindVForConditionalGeneration, MiniMindVProcessor
from minimind_v.conversion.tokenizers import wrap_tokenizer
from minimind_v.training import MiniMindVDataCollator, MiniMindVDataset, freeze
from minimind_v.training.check import inspect_rows
from minimind_v.training.data import images_of, normalize_row
from minimind_v.training.image_features import ImageFeatureCache, pass_features_through
from minimind_v.training.stages import add_lora, merge_lora
from minimind_v.vision_tower_minimind_v import image_shape

golden = pytest.mark.skipif(not GOLDEN.is_dir(), reason="no ../shared/golden beside the repository")


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


def part_row(part):
    """A row whose question has this part."""
    return {"messages": [{"role": "user", "content": [part]}, {"role": "assistant", "content": "A cat."}]}


@pytest.mark.parametrize(
    "row, message",
    [
        ({"text": "a"}, "a row needs messages and images"),
        ({"messages": [{"role": "user", "content": "a"}]}, "no assistant turn"),
        (caption_row("a.png") | {"images": []}, "places for 1 images, but there are 0"),
        (caption_row("a.png") | {"images": ["a.png", "b.png"]}, "places for 1 images, but there are 2"),
        (
            {"messages": [{"role": "human", "content": "a"}, {"role": "assistant", "content": "b"}]},
            r"\['human', ",
        ),
        ({"messages": [{"role": "assistant", "content": "b"}]}, "user or tool before each assistant"),
        ({"messages": ["a"]}, r"roles .* but they are \['a'\]"),
        ("[1, 2]", "a row must be an object with messages and images, not a list"),
        ({"messages": 3}, "messages must be a list, not a int"),
        (caption_row(None), "image 0 of the row is null"),
        (caption_row({"bytes": None, "path": None}), "image 0 of the row is null"),
        (caption_row(""), "image 0 of the row is null"),
        (
            {"messages": [{"role": "user", "content": ["a"]}, {"role": "assistant", "content": "b"}]},
            "a part must be an object with a type; got str",
        ),
        (part_row({"type": "video", "video": "a.mp4"}), "'video'"),
        (part_row({"type": "image_url", "image_url": {"url": ""}}), "image 0 of the row is null"),
    ],
)
def test_rows_that_cannot_be_trained_on(row, message):
    with pytest.raises(ValueError, match=message):
        normalize_row(row)


def test_rows_of_a_data_set_end(tmp_path):
    """Python's loops end where a sequence raises IndexError."""
    dataset = MiniMindVDataset([caption_row(png()), {"messages": []}])
    assert [item["row"] for item in dataset] == [0, 1] and "error" in list(dataset)[1]
    for index in (-1, 2):
        with pytest.raises(IndexError):
            dataset[index]


def test_images_under_other_names_are_not_lost(tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    answer = {"role": "assistant", "content": "A cat."}
    row = {"messages": [{"role": "user", "content": "<image>What?"}, answer], "image": "a.png"}
    assert images_of(normalize_row(row, tmp_path)) == [str(tmp_path / "a.png")]
    row["messages"][0]["content"] = "What?"
    with pytest.raises(ValueError, match="places for 0 images, but there are 1"):
        normalize_row(row, tmp_path)
    mixed = [{"type": "text", "text": "What?", "image": "a.png"}]
    with pytest.raises(ValueError, match="also holds 'image', which would be lost"):
        normalize_row({"messages": [{"role": "user", "content": mixed}, answer]}, tmp_path)


def test_base64_images_of_any_length(tmp_path):
    """Also those that are too long for the name of a file, with no slash in their first characters."""
    for length in (100, 255, 256, 1000, 4096, 9999):
        text = "A" * length
        row = caption_row(text)
        assert images_of(normalize_row(row, tmp_path)) == [text]


def test_files_of_windows(tmp_path):
    row = json.dumps(caption_row("a.png"))
    (tmp_path / "rows.jsonl").write_bytes(f"{row}\r\n{row}\r\n".encode("utf-8-sig"))
    (tmp_path / "a.png").write_bytes(png())
    assert all("messages" in item for item in MiniMindVDataset(tmp_path / "rows.jsonl"))
    (tmp_path / "rows.jsonl").write_bytes(row.encode("utf-16"))
    with pytest.raises(ValueError, match=r"rows.jsonl is not in UTF-8 .* Save it in UTF-8"):
        MiniMindVDataset(tmp_path / "rows.jsonl")


def test_missing_and_broken_files_are_named(tmp_path, monkeypatch):
    with pytest.raises(
        FileNotFoundError, match=r'metadata.jsonl does not exist. .* one line .* \{"file_name": "cat.png"'
    ):
        MiniMindVDataset(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"a.jsonl does not exist. Give a .jsonl or .parquet file"):
        MiniMindVDataset(tmp_path / "a.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n \n")
    with pytest.raises(ValueError, match=r"empty.jsonl is empty. It needs one row"):
        MiniMindVDataset(tmp_path / "empty.jsonl")
    (tmp_path / "rows.txt").write_text("a")
    with pytest.raises(ValueError, match=r"rows.txt must be a .jsonl or .parquet file"):
        MiniMindVDataset(tmp_path / "rows.txt")
    (tmp_path / "rows.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r'Parquet needs .* pip install "minimind-v\[train\]"'):
        MiniMindVDataset(tmp_path / "rows.parquet")
    (tmp_path / "rows.jsonl").write_text('{"text": "a\u2028b"}\n\n{oops\n')
    dataset = MiniMindVDataset(tmp_path / "rows.jsonl")
    assert len(dataset) == 2
    assert dataset[0]["row"] == 0 and dataset[0]["error"].endswith("it has ['text']")
    assert dataset[1]["row"] == 1 and dataset[1]["error"].startswith("Expecting property name")


def test_an_image_part_may_hold_its_image_in_any_form(folder, processor):
    """Among them OpenAI's: each gives the batch of the image part that takes the next of `images`."""
    url = f"data:image/png;base64,{base64.b64encode(png(0)).decode()}"
    parts = [{"type": "image", "path": "0.png"}, {"type": "image", "base64": url.partition(",")[2]}]
    parts += [{"type": "image", "image": {"bytes": png(0), "path": None}}, {"type": "image", "url": url}]
    parts += [{"type": "image_url", "image_url": {"url": url}}, {"type": "image_url", "image_url": url, "text": None}]
    rows = [caption_row("0.png", question="", answer="A cat."), *map(part_row, parts)]
    collate = MiniMindVDataCollator(processor)
    expected, *batches = [collate([{"messages": normalize_row(row, folder)}]) for row in rows]
    for batch in batches:
        assert batch.keys() == expected.keys() and all(torch.equal(batch[key], expected[key]) for key in batch)


@pytest.fixture
def host(folder):
    """Address of a web server with the files of `folder`, and the paths that it was asked for."""
    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            asked.append(self.path)

    handler = functools.partial(Handler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()


def test_pictures_of_urls_are_fetched_once(host, folder, processor, tmp_path, monkeypatch):
    """Over epochs, workers and trainings; what is no picture is not kept."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "home"))
    (address, asked), hosts = host, ["127.0.0.1"]
    (folder / "later.html").write_text("<html>Try later.")
    rows = [caption_row(f"{address}/{name}") for name in ("0.png", "1.png?secret=1", "later.html", "none.png")]
    for workers in (0, 2, 0):
        dataset = MiniMindVDataset(rows, allowed_hosts=hosts)
        report = inspect_rows(dataset, MiniMindVDataCollator(processor), workers)
        assert report["good"] == [0, 1] and report["broken"].keys() == {2, 3}
        assert "cannot be downloaded" in report["broken"][3] and "/later.html" in report["broken"][2]
    assert asked.count("/0.png") == asked.count("/1.png?secret=1") == 1 and asked.count("/later.html") == 3
    assert len([path for path in (tmp_path / "home").rglob("*") if path.is_file()]) == 2
    # also where the file is there, a host that is not allowed is refused
    assert "its host is not an allowed one" in MiniMindVDataset(rows, allowed_hosts=[])[0]["error"]


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
    trained = [processor.decode(labels[labels != -100]) for labels in batch["labels"]]
    end = "<|im_end|>\n"
    assert trained == [f"A dog 狗。{end}", f"Hello.{end}", f"Two.{end}Yes.{end}"]
    assert batch["pixel_values"].shape == (3, 3, 32, 32)
    lengths = batch["attention_mask"].sum(1)
    assert lengths.max() == batch["input_ids"].shape[1]  # padded to the longest, on the right
    for ids, labels, length in zip(batch["input_ids"], batch["labels"], lengths, strict=True):
        assert (ids[length:] == 0).all() and (labels[length:] == -100).all()
    assert (batch["labels"][batch["input_ids"] == 3] == -100).all()
    text_only = collate([{"messages": normalize_row(rows[1])}])
    assert "pixel_values" not in text_only


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("tower, moe", [("siglip", False), ("siglip", True), ("blocks", False), ("naflex", False)])
def test_packed_rows_have_the_loss_of_separate_ones(tower, moe, attention, make_processor):
    processor = make_processor(tower)
    rows = [caption_row(picture(0)), caption_row(picture(1), "A longer question about it?", "A dog."), {
        "messages": [{"role": "user", "content": "No picture"}, {"role": "assistant", "content": "Right."}]
    }]  # fmt: skip
    items = [{"messages": normalize_row(row)} for row in rows]
    model = make_model(tower, moe, router_aux_loss_type="batch", router_aux_loss_coef=0.0).train()
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
    batch = collate(items)
    assert (batch["labels"] != -100).any(1).tolist() == [True, False, False]
    assert batch["attention_mask"].sum(1).tolist()[1:] == [1, 1] and len(batch["pixel_values"]) == 1
    assert collate.dropped.keys() == {1, 2} and len(caplog.records) == 2
    assert "more than max_length (60)" in collate.dropped[1] and "cannot be read" in collate.dropped[2]
    with pytest.raises(ValueError, match=r"Row 2: image 0 of sample 0 cannot be read as a picture"):
        MiniMindVDataCollator(processor)(items)
    batch = collate([*items[1:], {"row": 3, "error": "not JSON"}])  # nothing but broken rows: nothing to train on
    assert batch["input_ids"].shape == (3, 1) and (batch["labels"] == -100).all() and "pixel_values" not in batch
    assert collate.dropped[3] == "not JSON"
    with pytest.raises(ValueError, match="Row 3: not JSON"):
        MiniMindVDataCollator(processor)([{"row": 3, "error": "not JSON"}])
    packed = MiniMindVDataCollator(processor, max_length=60, on_broken="skip", packing=True)
    assert packed(items[1:])["position_ids"].tolist() == [[0, 0]]


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
    "stage, freeze_llm, trainable",
    [
        ("pretrain", 0, ["multi_modal_projector"]),
        ("sft", 0, ["multi_modal_projector", "language_model"]),
        ("sft", 1, ["multi_modal_projector", "language_model.layers.0.", "language_model.layers.2."]),
        ("sft", 2, ["multi_modal_projector"]),
    ],
)
def test_only_the_parameters_of_the_stage_are_trained(stage, freeze_llm, trainable, processor):
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
    assert changed == set(names) == {name for name in before if any(part in name for part in trainable)}


def test_the_frozen_tower_builds_no_graph(processor, folder, tmp_path):
    """Nor where its embeddings are made to require gradients, as for gradient checkpointing with adapters."""
    model = make_model()
    freeze(model, "pretrain")
    model.enable_input_require_grads()
    model.train()
    dataset, graphs = MiniMindVDataset(folder), []
    model.model.vision_tower.register_forward_hook(
        lambda module, inputs, output: graphs.append(output.last_hidden_state.requires_grad)
    )
    cache = ImageFeatureCache(tmp_path / "features", model, processor)
    cache.fill(dataset)
    pass_features_through(model)
    for features in (None, cache):
        model.zero_grad()
        model(**MiniMindVDataCollator(processor, image_features=features)([dataset[0]])).loss.backward()
        assert all(parameter.grad is not None for parameter in model.model.multi_modal_projector.parameters())
    assert len(graphs) == 2 and not any(graphs)


# --- Cached image features ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tower", ["siglip", "clip", "blocks", "naflex"])
def test_cached_features_give_the_same_loss(tower, make_processor, folder, tmp_path):
    """Pictures as files, bytes and objects, several in a row, and a row of text; loss and gradients are equal."""
    processor = make_processor(tower)
    model = make_model(tower).train()
    freeze(model, "sft")
    two = [{"role": "user", "content": "<image> and <image>?"}, {"role": "assistant", "content": "Two."}]
    text = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    rows = [caption_row(str(folder / "0.png")), {"messages": two, "images": [png(1), picture(2)]}, {"messages": text}]
    dataset = MiniMindVDataset(rows)
    cache = ImageFeatureCache(tmp_path / "features", model, processor)
    cache.fill(dataset)
    pass_features_through(model)
    positions = {"siglip": 16, "clip": 17}.get(tower, 64)
    gradients = []
    for features in (None, cache):
        batch = MiniMindVDataCollator(processor, image_features=features)([dataset[i] for i in range(3)])
        shape = (positions, 32) if features else image_shape(model.config.vision_config)
        assert batch["pixel_values"].shape[1:] == shape
        assert ("spatial_shapes" in batch) == (tower == "naflex" and features is None)
        model.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        gradients.append([loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-6, rtol=1e-5)
    assert len(gradients[0]) > 10


@pytest.mark.parametrize("case", recorded("g0_dense", "g0_moe", "g3i_moe", "g3p_dense"))
def test_converted_releases_are_trained_and_answer(case, tmp_path):
    """Packed and with cached features the same loss, in beams the same answers, and saved the same model."""
    model, processor = load_case(case)[0].train(), AutoProcessor.from_pretrained(convert_case(case))
    model.config.text_config.router_aux_loss_coef = 0.0  # experts balance over a batch, which packing changes
    freeze(model, "sft")
    two = [user(picture(2), "and", picture(3, (90, 20))), {"role": "assistant", "content": "Two."}]
    rows = MiniMindVDataset([caption_row(picture(1, (30, 80))), {"messages": two}, {"messages": [user("Hi"), two[1]]}])
    items, cache = [rows[i] for i in range(3)], ImageFeatureCache(tmp_path / "features", model, processor)
    cache.fill(rows)
    losses = [model(**MiniMindVDataCollator(processor, packing=packing)(items)).loss for packing in (False, True)]
    pass_features_through(model)
    losses.append(model(**MiniMindVDataCollator(processor, image_features=cache)(items)).loss)
    torch.testing.assert_close(torch.stack(losses), losses[0].expand(3), atol=1e-5, rtol=1e-5)
    losses[0].backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)

    model.eval().save_pretrained(tmp_path / "saved")
    loaded = MiniMindVForConditionalGeneration.from_pretrained(tmp_path / "saved").eval().double()
    loaded.set_experts_implementation("eager")  # the grouped kernel has no float64
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "processor_kwargs": {"padding": True}}
    chats = [[user(picture(1, (30, 80)), "What?")], two[:1]]
    answers = []
    for batch in (chats, chats[:1], chats[1:]):
        inputs = processor.apply_chat_template(batch, add_generation_prompt=True, **options)
        generated = loaded.generate(**inputs, num_beams=3, do_sample=False, max_new_tokens=6)
        answers += generated[:, inputs["input_ids"].shape[1] :].tolist()
    assert answers[:2] == answers[2:]


def test_the_cache_keeps_each_picture_once_and_notices_changes(folder, processor, tmp_path, monkeypatch):
    model, calls = make_model(), []
    model.model.vision_tower.register_forward_hook(lambda module, inputs, output: calls.append(len(inputs[0])))
    (folder / "copy.png").write_bytes((folder / "0.png").read_bytes())
    (folder / "broken.png").write_bytes(b"no picture")
    names = ["0.png", "1.png", "copy.png", "broken.png", "missing.png"]
    rows = MiniMindVDataset(write_jsonl(folder / "rows.jsonl", [caption_row(name) for name in names]))

    def fill(model, processor=processor, dtype=torch.float32):
        calls.clear()
        cache = ImageFeatureCache(tmp_path / "features", model, processor, dtype)
        cache.fill(rows)
        return cache

    cache = fill(model)
    assert sum(calls) == 2 and len(cache.shards) == 2
    assert torch.equal(cache.get(str(folder / "0.png")), cache.get(png(0)))
    assert cache.get(str(folder / "broken.png")) is None and cache.get("missing.png") is None
    with pytest.raises(ValueError, match=r"Row 3: image 0 of sample 0 .*broken.png.* cannot be read as a picture"):
        MiniMindVDataCollator(processor, image_features=cache)([rows[3]])
    fill(model)
    assert calls == []  # a later run reads what is there
    (folder / "1.png").write_bytes(png(5))
    assert fill(model) and sum(calls) == 1  # a changed picture is another picture
    assert fill(model, dtype=torch.bfloat16).get(png(0)).dtype == torch.bfloat16 and sum(calls) == 2
    processor.image_processor.image_mean = [0.4] * 3
    assert fill(model) and sum(calls) == 2
    with torch.no_grad():
        model.model.vision_tower.encoder.layers[0].mlp.fc1.bias[0] += 1e-3
    assert fill(model) and sum(calls) == 2
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    model.model.vision_tower.encoder.layers[0].mlp.fc1.bias.data.zero_()
    with pytest.raises(OSError, match=r"Features of 3 pictures need 0.0 GB .* 0.0 GB free. Choose another folder"):
        fill(model)


def test_an_interrupted_cache_goes_on(folder, processor, tmp_path, monkeypatch):
    monkeypatch.setattr("minimind_v.training.image_features.SHARD_SIZE", 2)
    model, seen = make_model(), []

    def interrupt(module, inputs):
        seen.append(len(inputs[0]))
        if len(seen) == 3:
            raise KeyboardInterrupt

    handle = model.model.vision_tower.register_forward_pre_hook(interrupt)
    rows, cache = MiniMindVDataset(folder), ImageFeatureCache(tmp_path / "features", model, processor)
    with pytest.raises(KeyboardInterrupt):
        cache.fill(rows, batch_size=1)
    handle.remove()
    cache = ImageFeatureCache(tmp_path / "features", model, processor)
    assert len(cache.shards) == 2
    cache.fill(rows, batch_size=1)
    assert len(cache.shards) == 6 and not list(tmp_path.rglob("*.part"))
    shard = next(tmp_path.rglob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-10])
    assert len(ImageFeatureCache(tmp_path / "features", model, processor).shards) == 4 and not shard.exists()


def test_a_damaged_cache_is_never_believed(folder, processor, tmp_path, monkeypatch):
    """A single flipped bit anywhere in a shard, met by two processes at a time."""
    model, rows, rng = make_model(), MiniMindVDataset(folder), random.Random(0)
    cache = ImageFeatureCache(tmp_path / "features", model, processor)
    cache.fill(rows)
    (shard,) = tmp_path.rglob("*.safetensors")
    content = shard.read_bytes()
    for _ in range(20):
        damaged, place = bytearray(content), rng.randrange(len(content))
        damaged[place] ^= 1 << rng.randrange(8)
        shard.write_bytes(damaged)
        assert not ImageFeatureCache(tmp_path / "features", model, processor).shards and not shard.exists()
    unlink = Path.unlink

    def unlink_as_second(path, missing_ok=False):
        unlink(path)
        unlink(path, missing_ok)

    shard.write_bytes(damaged)
    monkeypatch.setattr(Path, "unlink", unlink_as_second)
    assert not ImageFeatureCache(tmp_path / "features", model, processor).shards


def test_what_dead_processes_left_in_the_cache_goes(processor, tmp_path):
    model = make_model()
    folder = ImageFeatureCache(tmp_path / "features", model, processor).folder
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    names = [f"a.safetensors.{host}.{process.pid}.part" for host in (socket.gethostname(), "another-host")]
    names.append(f"a.safetensors.{socket.gethostname()}.{os.getpid()}.part")
    for name in names:
        (folder / name).write_bytes(b"")
    ImageFeatureCache(tmp_path / "features", model, processor)
    assert sorted(path.name for path in folder.iterdir()) == sorted(names[1:])


# --- LoRA -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("moe", [False, True])
def test_lora_adapts_the_decoder_only_and_merges_back(moe, processor, tmp_path):
    pytest.importorskip("peft", reason="LoRA needs the extra `train`")
    model = make_model(moe=moe)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    freeze(model, "sft")
    model = add_lora(model, rank=4)
    batch = MiniMindVDataCollator(processor)([{"messages": normalize_row(caption_row(picture(0)))}])
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all(("language_model" in name and "lora_" in name) or "multi_modal_projector" in name for name in trainable)
    assert len([name for name in trainable if "lora_A" in name]) == (2 * 4 + 2 * 3)  # attention; FFN, or shared expert
    optimizer = torch.optim.AdamW(trainable.values(), lr=1e-2)
    for _ in range(2):
        model(**batch).loss.backward()
        optimizer.step()
    model.eval().save_pretrained(tmp_path / "adapter")
    expected = model(**batch).logits
    merged = merge_lora(make_model(moe=moe), tmp_path / "adapter")
    assert type(merged).__name__ == "MiniMindVForConditionalGeneration"
    assert merged.state_dict().keys() == make_model(moe=moe).state_dict().keys()
    torch.testing.assert_close(merged(**batch).logits, expected, atol=1e-4, rtol=1e-4)
    changed = {name for name, parameter in merged.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed and not any("vision_tower" in name for name in changed)
