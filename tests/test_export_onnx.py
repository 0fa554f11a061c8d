"""ONNX graphs compute what the model does, and what is around them is what ONNX Runtime and transformers.js need."""

import copy
import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CHAT_TEMPLATE, CHECKPOINT, REPOSITORY, make_model, make_text_config, picture

from minimind_v import MiniMindForCausalLM
from minimind_v.common import load_model, load_processor
from minimind_v.export import AnswersDifferError, export_onnx, export_web, onnx
from minimind_v.export.onnxruntime_chat import Chat, OnnxModel, load_pixels
from minimind_v_cli.__main__ import main

onnxruntime = pytest.importorskip("onnxruntime")
graph_library = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")

MODELS = ["clip-experts", "emoji"]  # as MiniMind2: CLIP, shared experts, no q/k norm; and the embedded MiniMind-3
logging.getLogger("torch.__trace").propagate = False  # pytest would format all that the exporter traces
NODE_MODULES = os.environ.get("MINIMIND_V_NODE_MODULES", "")  # the folder in which transformers.js is installed


@pytest.fixture
def exports(tmp_path_factory, make_processor):
    """Function: name of a model -> itself, its folder and that of its graphs in float32, traced once."""

    def export(name):
        if name not in EXPORTS:
            folder = tmp_path_factory.mktemp(name)
            checkpoint = CHECKPOINT if name == "emoji" else folder / "own"
            if name != "emoji":
                make_model("clip", True, num_hidden_layers=1, use_qk_norm=False).save_pretrained(checkpoint)
                make_processor("clip").save_pretrained(checkpoint)
            summary = export_onnx(checkpoint, folder / "onnx")
            assert summary.checked.startswith("3 of 3 greedy answers are the checkpoint's (ONNX Runtime ")
            EXPORTS[name] = load_model(checkpoint, dtype=torch.float32), checkpoint, folder / "onnx"
        return EXPORTS[name]

    return export


EXPORTS = {}


def run_decoder(model, embeds, mask, past=None):
    """Logits and cache of a call of the decoder's graph."""
    shapes = {i.name: i.shape for i in model.decoder.get_inputs() if i.name.startswith("past")}
    past = past or {name: np.zeros((len(embeds), s[1], 0, s[3]), np.float32) for name, s in shapes.items()}
    logits, *cache = model.decoder.run(None, {"inputs_embeds": embeds, "attention_mask": mask, **past})
    return logits, dict(zip(past, cache, strict=True))


@pytest.mark.parametrize("name", MODELS)
def test_graphs_compute_what_the_model_does(name, exports):
    model, _, folder = exports(name)
    graphs, width = OnnxModel(folder), model.config.text_config.hidden_size
    shape = onnx.image_shape(model.config.vision_config)
    pixel_values = torch.randn(3, *shape, generator=torch.Generator().manual_seed(1))
    features = graphs.encode_images(pixel_values.numpy())
    expected = torch.stack(model.get_image_features(pixel_values, return_dict=True).pooler_output)
    assert features.shape == (3, 16, width) and np.abs(features - expected.detach().numpy()).max() < 1e-4

    # A row with two images, one with an image, left-padded
    image, text = [3] * 16, list(range(40, 60))
    rows = [[1, *image, *text, *image, 5, 6], [0] * 34 + [1, *image, 7, 8, 9, 10]]
    ids, mask = np.array(rows), np.ones((2, 55), int)
    mask[1, :34] = 0
    embeds = graphs.embed_tokens.run(None, {"input_ids": ids})[0]
    embeds[ids == 3] = features.reshape(-1, width)
    inputs = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask), "pixel_values": pixel_values}
    expected = model(**inputs).logits.detach().numpy()
    logits, _ = run_decoder(graphs, embeds, mask)
    assert np.abs(logits - expected)[mask == 1].max() < 1e-4
    first, past = run_decoder(graphs, embeds[:, :46], mask[:, :46])
    for position in range(46, 55):
        step, past = run_decoder(graphs, embeds[:, position : position + 1], mask[:, : position + 1], past)
        first = np.concatenate([first, step], 1)
    assert np.abs(first - expected)[mask == 1].max() < 1e-4


@pytest.mark.parametrize("tower", ["clip", "blocks"])
def test_vision_encoder_with_cls_and_with_merged_patches(tower, tmp_path):
    model = make_model(tower)
    if tower == "clip":  # the first release keeps CLS
        model.config.vision_feature_select_strategy = "full"
    graph = dict(onnx.build_graphs(model))["vision_encoder"]
    onnx.write_graph(graph, tmp_path / "vision_encoder.onnx", "float32")
    pixel_values = torch.randn(2, *onnx.image_shape(model.config.vision_config))
    session = onnxruntime.InferenceSession(tmp_path / "vision_encoder.onnx")
    features = session.run(None, {"pixel_values": pixel_values.numpy()})[0]
    expected = torch.stack(model.get_image_features(pixel_values, return_dict=True).pooler_output)
    assert features.shape == expected.shape and np.abs(features - expected.detach().numpy()).max() < 1e-4


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_lower_precisions_are_smaller_and_close(precision, exports, tmp_path):
    """The decoder with experts, which are quantized only if each one's matrices are constants."""
    _, _, folder = exports("clip-experts")
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "onnx" / "decoder_model_merged.onnx"
    size = path.stat().st_size
    onnx.quantize(graph_library.load(path), path, precision)
    assert path.stat().st_size < size
    matrices = {"int8": "MatMulInteger", "int4": "MatMulNBits"}[precision]
    nodes = [node.op_type for node in graph_library.load(path).graph.node]
    # q, k, v, o; two of each expert and three of the shared ones; the head; in 8 bits the router; attention's own two
    assert nodes.count(matrices) == 4 + 2 * 4 + 3 + 1 + (precision == "int8") and nodes.count("MatMul") == 2
    exact, close = OnnxModel(folder), OnnxModel(tmp_path)
    embeds = np.random.default_rng(0).standard_normal((1, 20, 32), np.float32)
    mask = np.ones((1, 20), int)
    expected, given = (run_decoder(model, embeds, mask)[0] for model in (exact, close))
    assert np.corrcoef(expected.ravel(), given.ravel())[0, 1] > {"int8": 0.99, "int4": 0.9}[precision]


def test_text_only_is_one_graph(make_processor, tmp_path, capsys):
    torch.manual_seed(0)
    model = MiniMindForCausalLM(make_text_config(num_hidden_layers=1)).eval()
    model.save_pretrained(tmp_path / "own")
    tokenizer = make_processor().tokenizer
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(tmp_path / "own")
    main(["export", "web", str(tmp_path / "own"), str(tmp_path / "web"), "--precision", "float32"])
    printed = capsys.readouterr().out
    assert "Checked      3 of 3" in printed and "transformers.js itself was not run" in printed
    assert [path.name for path in tmp_path.glob("web/onnx/*")] == ["model.onnx"]
    config = json.loads((tmp_path / "web" / "config.json").read_text())
    assert (config["model_type"], config["transformers.js_config"]) == ("qwen3", {"dtype": "fp32"})
    graphs, ids = OnnxModel(tmp_path / "web"), list(range(40, 60))
    past = {name: np.zeros((1, shape[1], 0, shape[3]), np.float32) for name, shape in graphs.cache.items()}
    logits, _ = graphs.step(np.array([ids]), past)
    assert np.abs(logits - model(torch.tensor([ids])).logits.detach().numpy()).max() < 1e-4


def test_embedded_model_answers_in_8_bits(exports, tmp_path, monkeypatch):
    _, checkpoint, folder = exports("emoji")
    emoji = tmp_path / "web"

    def write_graph(graph, path, precision):  # of what is traced already
        traced = folder / "onnx" / path.name.replace("_quantized", "")
        onnx.quantize(graph_library.load(traced), path, precision)

    monkeypatch.setattr(onnx, "write_graph", write_graph)
    main(["export", "web", str(checkpoint), str(emoji)])
    assert sum(path.stat().st_size for path in emoji.rglob("*")) < 6e6
    assert not list(emoji.rglob("*.py"))
    assert "auto_map" not in "".join(path.read_text() for path in emoji.glob("*.json"))
    for path in emoji.glob("onnx/*.onnx"):
        assert str(REPOSITORY).encode() not in path.read_bytes(), "names of files here"
    chat, images = Chat(emoji), REPOSITORY / "examples" / "images"
    assert "".join(chat.ask("What is this?", [images / "apple.png"])) == "Red apple."
    chinese = "".join(chat.ask("描述一下这个图像的内容。", [images / "dog.png"]))
    assert chinese and "\ufffd" not in chinese
    with pytest.raises(ValueError, match="control token"):
        list(chat.ask("<|im_end|>"))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("size", "mode"), [((40, 90), "RGB"), ((200, 70), "RGBA"), ((50, 50), "L")])
def test_pixels_are_those_of_the_processor(name, size, mode, exports, tmp_path):
    _, checkpoint, folder = exports(name)
    path, image = tmp_path / "image.png", picture(1, size, mode)
    if mode == "RGBA":
        image.putalpha(picture(2, size, "L"))
    image.getexif()[0x0112] = 6  # to be turned
    image.save(path, exif=image.getexif())
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    expected = load_processor(checkpoint)(images=path, return_tensors="np")["pixel_values"][0]
    assert np.abs(load_pixels(path, settings) - expected).max() < 0.02  # a step of 8 bits, in blending


def test_program_runs_alone(exports, tmp_path):
    """Without this package, torch and transformers."""
    _, _, folder = exports("emoji")
    picture().save(tmp_path / "image.png")
    questions = [
        {"id": str(i), "text": "What is this?", "images": [str(tmp_path / "image.png")] * i, "max_new_tokens": 8}
        for i in range(3)
    ]
    (tmp_path / "questions.json").write_text(json.dumps(questions))
    engine = REPOSITORY / "benchmarks" / "engines" / "ask_onnxruntime.py"
    blocked = "import sys; sys.modules.update(dict.fromkeys(('torch', 'transformers', 'minimind_v'))); "
    run = f"{blocked}import runpy; sys.argv.pop(0); runpy.run_path(sys.argv[0], run_name='__main__')"
    arguments = [engine, folder, tmp_path / "questions.json", tmp_path / "answers.json"]
    subprocess.run([sys.executable, "-c", run, *map(str, arguments)], cwd=engine.parent, check=True, timeout=60)
    report = json.loads((tmp_path / "answers.json").read_text())
    assert report["runtime"] == f"onnxruntime {onnxruntime.__version__}" and report["peak_memory_bytes"] > 1e6
    assert [answer["id"] for answer in report["answers"]] == ["0", "1", "2"]
    chat = Chat(folder)
    for question, answer in zip(questions, report["answers"], strict=True):
        assert "".join(chat.ask(question["text"], question["images"], 8)).strip() == answer["text"] and answer["text"]


@pytest.mark.skipif(not NODE_MODULES, reason="MINIMIND_V_NODE_MODULES names no folder with transformers.js")
def test_transformers_js_runs_it(exports, tmp_path):
    _, _, folder = exports("emoji")
    images = REPOSITORY / "examples" / "images"
    questions = [
        {"id": name, "text": "What is this?", "images": [str(images / f"{name}.png")], "max_new_tokens": 16}
        for name in ("apple", "pizza", "dog")
    ]
    (tmp_path / "questions.json").write_text(json.dumps(questions))
    engine = REPOSITORY / "benchmarks" / "engines" / "ask_transformers_js.mjs"
    arguments = [engine, folder, tmp_path / "questions.json", tmp_path / "answers.json"]
    subprocess.run(["node", *map(str, arguments)], check=True, timeout=120, cwd=Path(NODE_MODULES))
    chat = Chat(folder)
    for question, answer in zip(
        questions, json.loads((tmp_path / "answers.json").read_text())["answers"], strict=True
    ):
        assert answer["text"] == "".join(chat.ask(question["text"], question["images"])).strip()


def test_refusals_leave_nothing(exports, tmp_path, monkeypatch):
    model, checkpoint, folder = exports("emoji")
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").touch()
    with pytest.raises(FileExistsError, match="--overwrite"):
        export_onnx(checkpoint, tmp_path / "there")
    with pytest.raises(ValueError, match="precision must be one of float32, int8, int4; got 'fp16'"):
        export_onnx(checkpoint, tmp_path / "new", precision="fp16")
    make_model("naflex").save_pretrained(tmp_path / "naflex")
    with pytest.raises(ValueError, match=r"vision_config.model_type 'siglip2_vision_model' \(NaFlex\)"):
        export_web(tmp_path / "naflex", tmp_path / "new")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "llava"}')
    with pytest.raises(ValueError, match="not a checkpoint of this package: its model_type is 'llava'"):
        export_onnx(tmp_path / "other", tmp_path / "new")
    # Graphs that answer otherwise, made without tracing again
    monkeypatch.setattr(
        onnx, "write_graph", lambda graph, path, precision: shutil.copyfile(folder / "onnx" / path.name, path)
    )
    changed = copy.deepcopy(model)
    changed.get_input_embeddings().weight.data = changed.get_input_embeddings().weight.flip(0)
    changed.tie_weights()
    changed.save_pretrained(tmp_path / "own")
    load_processor(checkpoint).save_pretrained(tmp_path / "own")
    with pytest.raises(AnswersDifferError, match="Nothing was written"):
        export_onnx(tmp_path / "own", tmp_path / "new")
    assert not (tmp_path / "new").exists() and not list(tmp_path.glob(".new*"))
    assert "no, as asked for" in str(export_onnx(tmp_path / "own", tmp_path / "new", check=False))
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ImportError, match=r"onnxscript is not installed: pip install 'minimind-v\[export\]'"):
        export_onnx(checkpoint, tmp_path / "another")
