"""`transformers serve` on our folders: a process that does not import this package, asked over HTTP."""

import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import CHECKPOINT, REPOSITORY
from original import GOLDEN, TOKENIZERS, convert_case, read_json, recorded, release_of
from transformers import AutoModelForCausalLM, AutoProcessor

from minimind_v import MiniMindForCausalLM
from minimind_v.conversion import convert_checkpoint

sys.path.insert(0, str(REPOSITORY / "benchmarks" / "engines"))
from ask_serve import parts, request, serve, stream

for module in ("fastapi", "openai", "uvicorn"):
    pytest.importorskip(module, reason="pip install 'minimind-v[serve]'")
# Older than 5.21, it imports requests without asking for it.
pytest.importorskip("transformers.cli.transformers", reason="pip install requests", exc_type=ImportError)

IMAGES = REPOSITORY / "examples" / "images"
BROKEN = {"url": "data:image/png;base64,iVBORw0KGgo="}  # nothing but how a PNG begins
QUESTIONS = [("What is this?", "apple"), ("这是什么？", "apple"), ("Describe.", "dog", "pizza"), ("Who are you?",)]


def start(folder, *arguments):
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "PYTEST", "PYTHON"))}
    environment |= {"HF_HOME": str(folder), "HF_MODULES_CACHE": str(folder / "modules")}
    return serve(*arguments, "--dtype", "float32", log=folder / "log.txt", environment=environment)


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    """As somebody starts it who has one folder, the embedded one."""
    with start(tmp_path_factory.mktemp("one"), str(CHECKPOINT)) as url:
        yield url


@pytest.fixture(scope="module")
def url_of_any(tmp_path_factory):
    """A server that loads the model that a request names."""
    with start(tmp_path_factory.mktemp("any")) as url:
        yield url


@pytest.fixture(scope="module")
def embedded():
    return AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32).eval()


def generate(model, folder, text, *images, max_new_tokens=32):
    """What the same checkpoint answers here."""
    processor = AutoProcessor.from_pretrained(folder)  # of a text-only checkpoint, the tokenizer
    content = [{"type": "image", "image": str(path)} for path in images] + [{"type": "text", "text": text}]
    content = content if images else text
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    ids = model.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens)[0, inputs["input_ids"].shape[1] :]
    return processor.decode(ids, skip_special_tokens=True)


def answer(url, folder, content, **options):
    status, body = request(url, str(folder), content, **options)
    assert status == 200, body
    return json.loads(body)["choices"][0]["message"]["content"]


@pytest.mark.parametrize("question", QUESTIONS, ids=str)
def test_answers_and_streams_what_generate_answers(url, embedded, question):
    text, *images = question
    images = [IMAGES / f"{name}.png" for name in images]
    expected, content = generate(embedded, CHECKPOINT, text, *images), parts(text, *images)
    assert answer(url, CHECKPOINT, content) == expected
    assert stream(url, str(CHECKPOINT), content, 32)["text"] == expected.strip() != ""


def test_several_at_once(url):
    contents = [parts("What is this?", path) for path in sorted(IMAGES.glob("*.png"))]
    alone = [answer(url, CHECKPOINT, content) for content in contents]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda content: answer(url, CHECKPOINT, content), contents)) == alone
    assert len(set(alone)) == len(contents)


@pytest.mark.parametrize("is_streamed", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize(
    "content, message",
    [
        (parts("a <|im_end|> b"), "contains the control token '<|im_end|>'"),
        ("What is <|image_pad|>?", "contains the control token '<|image_pad|>'"),
        (
            [{"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}],
            "cannot be read as a pic",
        ),
        (
            [{"type": "image_url", "image_url": {"url": "no such file.png"}}],
            "is no file, no http(s) URL and no base64",
        ),
        ([{"type": "image_url", "image_url": {"url": "http://127.0.0.1:9/x.png"}}], "has a private address"),
        (parts("What is this? " * 999), "the model has only 1024 positions"),
        ([{"type": "video_url", "video_url": {"url": "film.mp4"}}], "a part of type 'video' is not known"),
    ],
    ids=["turn", "image", "broken", "missing", "private", "long", "video"],
)
def test_what_users_send_wrong_is_answered_with_400_and_the_reason(url, content, message, is_streamed):
    status, body = request(url, str(CHECKPOINT), content, stream=is_streamed)
    assert status == 400
    assert message in json.loads(body)["detail"]


@pytest.mark.parametrize(
    "case", [*recorded("g0_dense", "g3i_dense", "g3p_dense"), "g1_dense", "g2_moe", "g3v_dense", "g3v_moe"]
)
def test_every_release(url_of_any, case):
    folder = convert_case(case)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for names in (["apple"], ["dog", "pizza"], []):
        images = [IMAGES / f"{name}.png" for name in names]
        expected = generate(model, folder, "What?", *images, max_new_tokens=8)
        assert answer(url_of_any, folder, parts("What?", *images), max_tokens=8) == expected


@pytest.mark.parametrize("case", [*recorded("g0_dense"), "g3v_moe"])
def test_text_only_checkpoint(url_of_any, case, tmp_path):
    hparams = read_json(f"{case}/hparams.json")
    state = torch.load(GOLDEN / case / "upstream.pth", weights_only=True)
    torch.save({k: v for k, v in state.items() if not k.startswith("vision_")}, tmp_path / "llm.pth")
    tokenizer = GOLDEN / "tokenizers" / TOKENIZERS[release_of(hparams)]
    options = {"original_config": hparams["constructor_args"], "tokenizer": tokenizer}
    folder = convert_checkpoint(tmp_path / "llm.pth", tmp_path / "text", **options).output
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert type(model) is MiniMindForCausalLM
    expected = generate(model, folder, "Who are you?", max_new_tokens=8)
    assert answer(url_of_any, folder, "Who are you?", max_tokens=8) == expected != ""


@pytest.mark.parametrize(
    "part, kind",
    [({"type": "text", "text": "<|im_end|>"}, ValueError), ({"type": "image", "url": "no.png"}, FileNotFoundError)],
    ids=["text", "file"],
)
def test_error_stays_what_it_was(part, kind, monkeypatch):
    processor, chat = AutoProcessor.from_pretrained(CHECKPOINT), [{"role": "user", "content": [part]}]
    monkeypatch.delitem(sys.modules, "transformers.cli.serving.server", raising=False)
    with pytest.raises(kind) as elsewhere:
        processor.apply_chat_template(chat, tokenize=True, return_dict=True)
    pytest.importorskip("starlette.exceptions")
    monkeypatch.setitem(sys.modules, "transformers.cli.serving.server", sys)
    with pytest.raises(kind) as served:
        processor.apply_chat_template(chat, tokenize=True, return_dict=True)
    assert not hasattr(elsewhere.value, "status_code") and served.value.status_code == 400
    assert str(served.value) == str(elsewhere.value) == served.value.detail
