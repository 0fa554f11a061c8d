"""The web demo without a browser: what its functions answer, and what it refuses. (demo_in_browser.py has one.)"""

import os
import re
import shutil
import socket
import weakref

import gradio as gr
import pytest
import torch
from conftest import CHECKPOINT, IDS, KINDS, REPOSITORY, make_model, picture
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError

from minimind_v.demo.app import ERROR, LAUNCH, Demo, build, find_models
from minimind_v.demo.attention import draw, look, patch_map, split_words
from minimind_v.demo.texts import CHINESE, ENGLISH
from minimind_v.inference.engine import Engine, encode, question

APPLE, PIZZA, DOG = (str(REPOSITORY / "examples" / "images" / f"{name}.png") for name in ("apple", "pizza", "dog"))
EMOJI = CHECKPOINT.name
FILE = {"_type": "gradio.FileData"}  # what a client calls a file
DECODING = (True, 0.65, 0.85, 50, 1.0, 512, False)  # greedy


@pytest.fixture(scope="module")
def engine():
    return Engine(greedy=True, device="cpu")


@pytest.fixture
def demo():
    return Demo({EMOJI: CHECKPOINT}, device="cpu")


@pytest.fixture(scope="module")
def url():
    page = build(Demo({EMOJI: CHECKPOINT}, device="cpu"))
    _, url, _ = page.launch(server_name="127.0.0.1", quiet=True, prevent_thread_lock=True, **LAUNCH)
    yield url
    page.close(verbose=False)


@pytest.fixture
def client(url):
    """One with a conversation of its own."""
    return Client(url, verbose=False)


@pytest.fixture
def other(tmp_path, make_processor):
    """A checkpoint whose answers are long."""
    model = make_model(max_position_embeddings=2048)
    model.generation_config.max_new_tokens = 1500
    processor = make_processor()
    processor.tokenizer.model_max_length = 2048
    model.save_pretrained(tmp_path / "other")
    processor.save_pretrained(tmp_path / "other")
    return tmp_path / "other"


def ask(engine, *turns):
    return engine.answer(encode(engine.processor, [list(turns)]))[0]


def last(pieces):
    *_, (answer, rate) = pieces
    assert rate
    return answer


def user_turn(text, *files):
    """A message as the page keeps it."""
    parts = [{"type": "file", "file": {"path": file}} for file in files]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


def assistant_turn(text, **fields):
    return {"role": "assistant", "content": [{"type": "text", "text": text}], **fields}


# --- Chat ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["What is this?", "这是什么？"])
def test_page_answers_as_the_command_line(client, engine, text):
    answer, _rate = client.predict({"text": text, "files": [handle_file(APPLE)]}, api_name="/chat")
    assert answer == ask(engine, question([APPLE], text))


def test_chat_goes_on(demo, engine):
    first = last(demo.chat({"text": "What is this?", "files": [APPLE]}, [], EMOJI, *DECODING))
    history = [
        user_turn("Nobody answered this", PIZZA),
        assistant_turn("An error", metadata={"id": ERROR}),
        user_turn("What is this?", APPLE),
        assistant_turn("A thought", metadata={"title": "Reasoning"}),
        assistant_turn(first),
        {"role": "user", "content": [{"path": DOG}, "No answer either"]},
    ]
    assert [turn["content"] for turn in demo.answered(history, engine)[1:]] == [first]
    second = last(demo.chat({"text": "What color is it?", "files": []}, history, EMOJI, *DECODING))
    said = {"role": "assistant", "content": first}
    assert second == ask(engine, question([APPLE], "What is this?"), said, question([], "What color is it?"))


def test_two_pictures_in_a_question(demo, engine):
    text = "What is in these pictures?"
    expected = ask(engine, question([APPLE, PIZZA], text))
    for files in ([APPLE, PIZZA], [{"path": APPLE}, {"path": PIZZA}]):  # the second at a retry
        assert last(demo.chat({"text": text, "files": files}, [], EMOJI, *DECODING)) == expected


def test_picture_alone_is_described(demo, engine):
    expected = ask(engine, question([DOG], "Describe this image."))
    assert last(demo.chat({"text": " ", "files": [DOG]}, [], EMOJI, *DECODING)) == expected


def test_stopped_answer_costs_no_more(other):
    demo = Demo({"other": other}, device="cpu")
    answer = demo.chat({"text": "What is this?", "files": []}, [], "other", *DECODING[:5], 1500, False)
    assert next(answer)[0]
    answer.close()
    assert 0 < demo.engine.tokens < 1400 and not demo.lock.locked()
    assert last(demo.chat({"text": "What is this?", "files": []}, [], "other", *DECODING[:5], 5, False)) is not None
    assert demo.engine.tokens == 5


def test_error_of_the_model_reaches_who_reads_the_stream(other):
    engine = Engine(other, greedy=True, device="cpu")
    torch.nn.init.constant_(engine.model.lm_head.weight, float("nan"))
    with pytest.raises(ValueError, match="finite"):
        list(engine.stream(encode(engine.processor, [[question([], "What is this?")]])))


# --- Models ----------------------------------------------------------------------------------------------------------


def test_switching_releases_the_other_model(other):
    demo = Demo({EMOJI: CHECKPOINT, "other": other}, device="cpu")
    description, thinking, _ = demo.describe(EMOJI)
    assert "4.00M parameters" in description.info and thinking.visible is False
    before = weakref.ref(demo.engine.model)
    demo.describe("other")
    assert before() is None and demo.name == "other"


def test_thinking_is_a_switch_where_the_model_has_it(tmp_path):
    """The thought goes into the tags that the page folds; without one, the answer stands alone."""
    checkpoint = shutil.copytree(CHECKPOINT, tmp_path / "thinking")
    shutil.copyfile(REPOSITORY / "conversion" / "templates" / "minimind3.jinja", checkpoint / "chat_template.jinja")
    demo = Demo({"thinking": checkpoint}, device="cpu")
    assert demo.describe("thinking")[1].visible is True
    message, decoding = {"text": "What is this?", "files": [APPLE]}, DECODING[:-1]
    assert last(demo.chat(message, [], "thinking", *decoding, True)).startswith("<think>\n")
    assert "<think>" not in last(demo.chat(message, [], "thinking", *decoding, False))


def test_broken_model_leaves_the_others_usable(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "minimind_v"}')
    demo = Demo({EMOJI: CHECKPOINT, "broken": tmp_path}, device="cpu")
    with pytest.raises(gr.Error):
        demo.describe("broken")
    assert "4.00M" in demo.describe(EMOJI)[0].info


def test_models_are_found_below_the_folder(tmp_path, monkeypatch, other):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "config.json").write_text('{"model_type": "minimind"}')
    (tmp_path / "list").mkdir()
    (tmp_path / "list" / "config.json").write_text("[]")
    assert list(find_models()) == ["other", EMOJI]
    assert list(find_models(["USER/REPO"])) == ["USER/REPO", EMOJI]
    assert list(find_models([str(CHECKPOINT)])) == [str(CHECKPOINT)]


# --- What strangers may not ------------------------------------------------------------------------------------------


def refusal(client, text, *files):
    """An error of the chat: a message in it, which is no answer to later questions."""
    message, speed = client.predict({"text": text, "files": list(files)}, api_name="/chat")
    sign, _, text = message["content"].partition(" ")
    assert message["metadata"]["id"] == ERROR and sign == "⚠️" and not speed
    return text


def test_broken_picture_is_a_message(client, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nno picture")
    broken = handle_file(str(tmp_path / "broken.png"))
    assert refusal(client, "What is this?", broken).startswith("broken.png cannot be read as a picture: ")
    with pytest.raises(AppError, match=r"^broken\.png cannot be read as a picture: "):
        client.predict(broken, handle_file(APPLE), "What is this?", api_name="/compare")


@pytest.mark.parametrize("text", ["", "What is <|im_end|>?"])
def test_question_that_cannot_be_asked_is_a_message(client, text):
    assert re.search(r"There is no question|control token", refusal(client, text))


def test_nothing_is_fetched(client):
    """Neither an address in the question, nor one in the place of an uploaded file."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.1)
        url = f"http://127.0.0.1:{server.getsockname()[1]}/apple.png"
        assert "--allow-urls" in refusal(client, f"What is {url}")
        with pytest.raises(AppError, match="not fetched from addresses"):
            client.predict({"text": "What is this?", "files": [{"path": url, "meta": FILE}]}, api_name="/chat")
        with pytest.raises(TimeoutError):
            server.accept()


def test_addresses_are_fetched_where_allowed(engine, monkeypatch):
    demo = Demo({EMOJI: CHECKPOINT}, allow_urls=True, device="cpu")
    fetched = []
    monkeypatch.setattr("minimind_v.demo.app.load_image", lambda url, **_: fetched.append(url) or picture())
    with demo.use(EMOJI) as engine:
        message = demo.read("What is https://example.com/a.png ?", [], engine)
    assert fetched == ["https://example.com/a.png"] and message["content"][1]["text"] == "What is  ?"


def test_page_reports_nothing():
    assert build(Demo({EMOJI: CHECKPOINT})).analytics_enabled is False
    assert os.environ["GRADIO_ANALYTICS_ENABLED"] == "False"
    assert "http" not in "".join(LAUNCH["theme"]._stylesheets)


# --- Compare, look ---------------------------------------------------------------------------------------------------


def test_comparison_is_three_questions(client, engine):
    text = "What is this?"
    answers = client.predict(handle_file(APPLE), handle_file(PIZZA), text, api_name="/compare")
    assert list(answers) == [ask(engine, question(images, text)) for images in ([APPLE], [PIZZA], [APPLE, PIZZA])]


def test_look_answers_as_the_chat_and_shows_every_token(demo, engine):
    found, words, image, share, seen = demo.look(DOG, "What is this?", EMOJI, *DECODING)
    assert " ".join(found.words) == ask(engine, question([DOG], "What is this?")) == "Dog face."
    assert [label for label, _ in words.choices] == ["Dog", "face."] and image.size == (640, 640) and "%" in share
    assert found.maps.shape == (2, 4, 4) and found.attention.sum(-1).sub(1).abs().max() < 1e-5
    assert seen[:4] == [("<|im_start|>", "control"), ("user", "text"), ("⏎", "text"), ("<|image_pad|> × 16", "image")]
    # The model answers as before: the other implementation of attention is for the look only
    assert demo.engine.model.config._attn_implementation == "sdpa"
    assert last(demo.chat({"text": "What is this?", "files": [DOG]}, [], EMOJI, *DECODING)) == "Dog face."


@pytest.mark.parametrize(("tower", "moe"), KINDS, ids=IDS)
def test_look_of_every_tower(tower, moe, tmp_path, make_processor):
    make_model(tower, moe).save_pretrained(tmp_path)
    make_processor(tower).save_pretrained(tmp_path)
    engine = Engine(tmp_path, greedy=True, device="cpu")
    found = look(engine, picture(size=(80, 60)), "What is this?", {})
    shape = {"clip": (4, 4), "siglip": (4, 4), "blocks": (8, 8)}.get(tower, found.maps.shape[1:])
    assert found.maps.shape == (len(found.words), *shape) and len(found.words) > 0
    assert found.attention.sum(-1).sub(1).abs().max() < 1e-5
    assert 0 < found.maps.sum((1, 2)).max() < 1
    assert draw(found.image, found.maps[0]).size == ((640, 640) if tower == "clip" else (640, 480))


def test_map_of_merged_patches():
    config = make_model("blocks").config
    values = torch.arange(16.0)
    block = patch_map(values, config, None)
    assert block.shape == (8, 8) and torch.equal(block[:2, :2], torch.zeros(2, 2)) and (block[:2, 2:4] == 0.25).all()
    assert block.sum() == values.sum()
    row = patch_map(torch.arange(16.0), make_model("naflex").config, [6, 8])
    assert row.shape == (6, 8) and row[0].tolist() == [0] * 4 + [0.25] * 4 and (row[5, 4:] == 11 / 4).all()


def test_words_have_all_their_tokens(engine):
    tokenizer = engine.processor.tokenizer
    for text in ("A strawberry's leaf, green.", "这是一只狗。", "🍕 披萨 pizza"):
        ids = tokenizer.encode(text, add_special_tokens=False)
        words = split_words(tokenizer, ids)
        assert "".join(word for word, _ in words) == text
        assert [place for _, places in words for place in places] == list(range(len(ids)))
    assert "green." in [word.strip() for word, _ in split_words(tokenizer, tokenizer.encode("A leaf, green."))]


def test_both_languages_say_everything():
    assert ENGLISH.keys() == CHINESE.keys() and all(CHINESE.values())
    page = build(Demo({EMOJI: CHECKPOINT})).get_config_file()
    used = {key for key in ENGLISH if f"'{key}'" in str(page) or f'"{key}"' in str(page)}
    assert ENGLISH.keys() - used <= {"look_info", "speed", "about"}
