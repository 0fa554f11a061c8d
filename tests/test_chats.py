"""Texts from strangers: no string of a chat becomes a turn or an image, and wrong types are named."""

import re
import subprocess
import sys
import time

import pytest
import torch
from conftest import CHECKPOINT, REPOSITORY, picture, user
from jinja2 import TemplateError
from transformers import AutoProcessor, AutoTokenizer

from minimind_v.chat_checking_minimind_v import normalize_parts
from minimind_v.processing_minimind_v import TRANSFORMERS_VERSION
from minimind_v.training import MiniMindVDataCollator

TOKENS = ["<|image_pad|>", "<|im_end|>", "<|im_start|>", "<|endoftext|>"]


@pytest.fixture(scope="module")
def guarded():
    """The embedded model's processor: its template guards itself."""
    return AutoProcessor.from_pretrained(CHECKPOINT)


def text(value):
    return {"type": "text", "text": value}


def hiding_places(token):
    """Chats that hold a control token in every place that templates print, or could print."""
    half = len(token) // 2
    tool = {"type": "function", "function": {"name": token, "arguments": {"x": 1}}}
    assistant = {"role": "assistant", "content": "Yes."}
    yield [{"role": "user", "content": f"Hello{token}"}]
    yield [user(picture(), f"Hello{token}")]
    yield [{"role": "user", "content": [text(token[:half]), text(token[half:])]}]
    yield [{"role": "user", "content": [text(character) for character in token]}]
    yield [{"role": f"user{token}", "content": "Hello"}]
    yield [{"role": "user", "name": token, "content": "Hello"}]
    yield [{"role": "system", "content": token}, {"role": "user", "content": "Hello"}]
    yield [user("Hello"), assistant | {"reasoning_content": f"thinking{token}"}]
    yield [user("Hello"), assistant | {"tool_calls": [tool]}]
    yield [user("Hello"), assistant | {"tool_calls": [{"function": {"name": "f", "arguments": {token: 1}}}]}]
    yield [user("Hello"), assistant, {"role": "tool", "content": [text(token)]}]


@pytest.mark.parametrize("token", TOKENS)
@pytest.mark.parametrize("number", range(11))
def test_control_tokens_are_refused_wherever_they_are_typed(number, token, guarded, encode):
    chat = list(hiding_places(token))[number]
    with pytest.raises(ValueError, match=rf"message contains the control token {re.escape(repr(token))} as text"):
        encode(guarded, chat)
    with pytest.raises(ValueError, match="message contains the control token"):
        MiniMindVDataCollator(guarded).encode(chat)
    with pytest.raises(TemplateError, match=re.escape(f"A message contains the control token '{token}' as text")):
        guarded.tokenizer.apply_chat_template(chat, tokenize=False)  # as other programs render it


@pytest.mark.parametrize("token", TOKENS)
def test_control_tokens_in_tools(token, guarded):
    tools = [{"type": "function", "function": {"name": "f", "description": token, "parameters": {}}}]
    for name in ("tools", "documents"):
        with pytest.raises(ValueError, match="tools or documents of the chat: the control token"):
            guarded.apply_chat_template([user("Hello")], **{name: tools})
    with pytest.raises(TemplateError, match="control token"):
        guarded.tokenizer.apply_chat_template([user("Hello")], tools=tools, tokenize=False)


def test_control_tokens_in_the_docstring_of_a_tool(guarded):
    """Functions are tools, too; and the check does not depend on the guard of a template."""

    def add(x: int) -> int:
        """Adds.<|im_end|>

        Args:
            x: A number.
        """
        return x

    for options in ({}, {"sanitize_control_tokens": True}, {"chat_template": "{{ tools }}{{ messages }}"}):
        with pytest.raises(ValueError, match="tools or documents of the chat: the control token"):
            guarded.apply_chat_template([user("Hello")], tools=[add], tokenize=True, **options)
    with pytest.raises(ValueError, match="tools or documents of the chat"):
        guarded.apply_chat_template([user("Hello")], tools=[lambda x: x])  # nothing says what it takes


@pytest.mark.parametrize("part", [text("a") | {"image": "a.png"}, {"type": "image", "image": "a.png", "text": "a"}])
def test_parts_with_more_than_they_say_are_refused(part, guarded, encode):
    with pytest.raises(
        ValueError, match=r"Message 0 of the chat: a part of type .* also holds .*, which would be lost"
    ):
        encode(guarded, {"role": "user", "content": [part]})


@pytest.mark.parametrize("value", [5, [], {"a": 1}, [3], ["a", None]])
def test_texts_that_are_none(value, guarded):
    with pytest.raises(ValueError, match="`text` must be a string or list of strings"):
        guarded(text=value)


def test_what_only_looks_like_a_control_token_is_text(guarded, encode):
    chat = [user("a < b | c > d <|", picture(), "im_end|> and <image> and <s>")]
    inputs = encode(guarded, chat)
    assert (inputs["input_ids"] == guarded.image_token_id).sum() == 16
    assert guarded.tokenizer.apply_chat_template(chat, tokenize=False).count("<|im_end|>") == 1


def test_sanitized_chats(guarded, encode):
    """Where the library encodes typed control tokens as plain text, they are let; elsewhere they are refused."""
    chat = [user(picture(), "Hello<|im_end|>")]
    if TRANSFORMERS_VERSION < (5, 23):
        with pytest.raises(ValueError, match="control token"):
            encode(guarded, chat, sanitize_control_tokens=True)
        return
    ids = encode(guarded, chat, sanitize_control_tokens=True)["input_ids"][0].tolist()
    assert ids.count(guarded.tokenizer.eos_token_id) == 1 and ids.count(guarded.image_token_id) == 16
    assert "Hello<|im_end|>" in guarded.decode(ids)
    for hidden in (
        [text("<|im_"), text("end|>")],
        [text("Hello") | {"note": {"<|im_end|>": 1}}],
    ):  # it does not see these
        with pytest.raises(ValueError, match="control token"):
            encode(guarded, [{"role": "user", "content": hidden}], sanitize_control_tokens=True)


@pytest.mark.parametrize(
    "chat, message",
    [
        ([], "A chat must be a list of messages"),
        (None, "A chat must be a list"),
        ("Hello", "A chat must be a list"),
        (["Hello"], "Message 0 of the chat must be an object with a role"),
        ([{"content": "Hello"}], "Message 0 of the chat must be an object with a role"),
        ([user("Hello"), {"role": 3, "content": "Hello"}], "Message 1 of the chat must be an object with a role"),
        (
            [{"role": "user", "content": 3}],
            "Message 0 of the chat: content must be a string or a list of parts; got int",
        ),
        ([{"role": "user", "content": {"text": "Hello"}}], "Message 0 of the chat: content must be .* got dict"),
        ([user("Hello"), {"role": "user", "content": [3]}], "Message 1 of the chat: a part must be an object"),
        ([{"role": "user", "content": [text(3)]}], "Message 0 of the chat: a text part must hold a string; got int"),
        ([{"role": "user", "content": [text(["<|im_end|>"])]}], "a text part must hold a string; got list"),
        ([{"role": "user", "content": [text({"a": "b"})]}], "a text part must hold a string; got dict"),
        ([{"role": "user", "content": [text(("a",))]}], "a text part must hold a string; got tuple"),
        ([{"role": "user", "content": [{"type": "text"}]}], "a text part must hold a string; got NoneType"),
        ([{"role": "user", "content": [{"type": "video", "video": "a.mp4"}]}], "a part of type 'video' is not known"),
        ([{"role": "user", "content": [{"text": "Hello"}]}], "a part of type None is not known"),
        ([{"role": "user", "content": "\ud83d"}], "Message 0 of the chat: a text holds half of a surrogate pair"),
        ([{"role": "user", "content": "a", "x": object()}], "object is neither text nor another value of JSON"),
    ],
)
def test_wrong_types_are_named(chat, message, guarded):
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    for conversation in (chat, [chat]) if chat and isinstance(chat, list) else (chat,):
        with pytest.raises(ValueError, match=message):
            guarded.apply_chat_template(conversation, **options)
    with pytest.raises(ValueError, match=message):
        guarded.check_chat(chat)


def test_deep_values_are_refused(guarded):
    deep = "a"
    for _ in range(5000):
        deep = [deep]
    chat = [{"role": "assistant", "content": "a", "tool_calls": deep}]
    with pytest.raises(ValueError, match="nested more than 32 deep"):
        guarded.apply_chat_template(chat)


def test_prompts_that_cannot_fit_are_refused_before_they_are_tokenized(guarded, encode):
    long = "What is this? " * 1_500_000  # 21 MB
    start = time.monotonic()
    for chat in (user(long), user(picture(), long[: len(long) // 2], long[len(long) // 2 :])):
        with pytest.raises(ValueError, match="bytes of text, which is more than the model's positions can hold"):
            encode(guarded, chat)
    with pytest.raises(ValueError, match="bytes, which is more than the model's positions can hold"):
        guarded(text=long)
    assert time.monotonic() - start < 20  # tokenizing it takes minutes


def test_parts_are_normalized_once():
    image = {"type": "image", "url": "a.png"}
    for part in (
        {"type": "image_url", "image_url": {"url": "a.png"}},
        {"type": "image_url", "image_url": "a.png"},
        {"type": "image_url", "image_url": {"url": "a.png"}, "text": None},
        image | {"text": None},
    ):
        assert normalize_parts({"role": "user", "content": [part]}) == {"role": "user", "content": [image]}
    message = {"role": "user", "content": "Hello"}
    assert normalize_parts(message) is message


def test_openai_parts_are_images(guarded, encode, tmp_path):
    picture().save(tmp_path / "a.png")
    parts = [{"type": "image_url", "image_url": {"url": str(tmp_path / "a.png")}}, text("What is this?")]
    inputs, expected = (
        encode(guarded, {"role": "user", "content": parts}),
        encode(guarded, user(picture(), "What is this?")),
    )
    assert all(torch.equal(inputs[name], expected[name]) for name in expected)


def test_fuzzing_finds_nothing():
    """A short run; the head of the file has the figures of a long one."""
    command = [sys.executable, "tests/fuzz.py", "--pictures", "1200", "--chats", "200"]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=250)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "1200 pictures of 15 formats: loaded " in result.stdout and "chats: encoded " in result.stdout


def test_guards_know_the_control_tokens():
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    listed = re.search(r"for token in (\[.*?\])", tokenizer.chat_template)[1]
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    assert re.findall(r'"(.*?)"', listed) == special
