"""Pipelines with the package imported: no trust_remote_code, nothing printed."""

import os
import re
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import make_model, picture, user
from transformers import pipeline
from transformers.pipelines.pt_utils import KeyDataset
from transformers.utils import is_torchvision_available, logging

from minimind_v import MiniMindVImageToTextPipeline
from minimind_v.processing_minimind_v import TRANSFORMERS_VERSION

PROGRESS_BARS = ("Loading weights", "Writing model shards")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("checkpoint")


@pytest.fixture(autouse=True)
def saved(folder, make_processor):
    if not (folder / "config.json").exists():
        make_model("siglip").save_pretrained(folder)
        make_processor().save_pretrained(folder)


@pytest.fixture(autouse=True)
def quiet(caplog, capfd):
    """Every test here fails when something is printed, logged or warned of."""
    logging.enable_propagation()  # else the library's messages do not reach caplog
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield
    logging.disable_propagation()
    # The library's own pipelines warn so before 5.20, for any model; ours must not.
    messages = [record.getMessage() for record in caplog.get_records("call")]
    of_the_library = ("Passing `generation_config`", "Both `max_new_tokens`", "Ignoring clean_up_tokenization_spaces")
    test = os.environ["PYTEST_CURRENT_TEST"]
    if TRANSFORMERS_VERSION < (5, 20) and ("test_image_text_to_text" in test or "test_text_generation" in test):
        messages = [text for text in messages if not text.startswith(of_the_library)]
    assert messages == []
    captured = capfd.readouterr()
    lines = [line for line in captured.err.replace("\r", "\n").split("\n") if line]
    assert captured.out == "" and not [line for line in lines if not line.startswith(PROGRESS_BARS)]


@pytest.fixture
def captioner(folder):
    return pipeline("image-to-text", model=str(folder))


def texts(results):
    return [result["generated_text"] if isinstance(result, dict) else texts(result)[0] for result in results]


def test_image_to_text_takes_every_kind_of_input(captioner, tmp_path):
    assert type(captioner) is MiniMindVImageToTextPipeline
    images = [picture(seed) for seed in range(3)]
    paths = [str(tmp_path / f"{seed}.png") for seed in range(3)]
    for image, path in zip(images, paths, strict=True):
        image.save(path)
    single = [captioner(image) for image in images]
    assert all(len(result) == 1 and set(result[0]) == {"generated_text"} for result in single)
    assert len({result[0]["generated_text"] for result in single}) > 1
    assert [captioner(path) for path in paths] == single
    assert captioner(images) == captioner(paths) == captioner(paths, batch_size=2) == single
    assert list(captioner(image for image in images)) == single
    rows = [{"picture": path, "label": 0} for path in paths]
    assert list(captioner(KeyDataset(rows, "picture"), batch_size=3)) == single


def test_prompts_of_different_length_and_generation_options(captioner):
    image = picture(1)
    default, other = captioner(image), captioner(image, prompt="What? " * 20)
    assert default == captioner(image, prompt="Describe this image.") != other
    short = captioner(image, max_new_tokens=2)[0]["generated_text"]
    assert len(short) < len(default[0]["generated_text"])
    assert captioner(image, generate_kwargs={"max_new_tokens": 2})[0]["generated_text"] == short
    many = captioner(image, generate_kwargs={"num_return_sequences": 2, "num_beams": 2})
    assert len(many) == 2
    pictures = [picture(seed) for seed in range(3)]
    options = {"generate_kwargs": {"num_return_sequences": 2, "num_beams": 2}}
    assert captioner(pictures, batch_size=3, **options) == [captioner(image, **options) for image in pictures]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"promt": "What?"}, "There is no option 'promt'; did you mean 'prompt'?"),
        ({"max_tokens": 3}, "There is no option 'max_tokens'; did you mean 'max_new_tokens'?"),
        ({"foo": 3}, "There is no option 'foo'."),
        ({"prompt": ["What?", "Where?"]}, "prompt must be one string, for all images; got list"),
        ({"max_new_tokens": 3, "generate_kwargs": {"max_new_tokens": 4}}, "['max_new_tokens'] are given twice"),
    ],
)
def test_options_that_would_be_ignored_are_refused(options, message, captioner, folder):
    with pytest.raises(ValueError, match=re.escape(message)):
        captioner(picture(1), **options)
    if "generate_kwargs" not in options:  # which pipeline() itself takes
        with pytest.raises(ValueError, match=re.escape(message)):
            pipeline("image-to-text", model=str(folder), **options)


def test_options_of_generate_reach_it(captioner, folder):
    image = picture(1)
    assert captioner(image, num_beams=2, num_return_sequences=2) == captioner(
        image, generate_kwargs={"num_beams": 2, "num_return_sequences": 2}
    )
    default = pipeline("image-to-text", model=str(folder), prompt="What?")
    assert (
        default(image, max_new_tokens=7)
        == captioner(image, prompt="What?", max_new_tokens=7)
        != captioner(image, max_new_tokens=7)
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_refused(value, captioner):
    with torch.no_grad():
        captioner.model.lm_head.weight[5] = value
    for options in ({}, {"num_beams": 2}, {"do_sample": True, "top_k": 5}):
        with pytest.raises(ValueError, match="logits are not finite"):
            captioner(picture(1), **options)


def test_threads_get_the_answers_of_one(captioner):
    """A fast tokenizer keeps how to pad in itself, for all threads."""
    prompts = ["?", "What is this? " * 12, "Describe this image.", "Where? " * 5]
    images = [picture(seed) for seed in range(4)]
    expected = {prompt: captioner(images, prompt=prompt, batch_size=2, max_new_tokens=3) for prompt in prompts}
    chats = [[user(images[0], prompt)] for prompt in prompts]
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "processor_kwargs": {"padding": True}}
    padded = captioner.processor.apply_chat_template(chats, **options)["input_ids"]

    def work(number):
        prompt = prompts[number % 4]
        same = captioner(images, prompt=prompt, batch_size=2, max_new_tokens=3) == expected[prompt]
        rows = (captioner.processor.apply_chat_template(chats, **options)["input_ids"] for _ in range(20))
        return same and all(torch.equal(row, padded) for row in rows)

    with ThreadPoolExecutor(16) as threads:
        assert all(threads.map(work, range(64)))


def test_image_to_text_names_a_broken_picture(captioner, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"broken.png.* cannot be read as a picture"):
        captioner(str(tmp_path / "broken.png"))


def test_image_text_to_text_chats(folder):
    pipe = pipeline("image-text-to-text", model=str(folder))
    chat = [user(picture(0), "What is this?")]
    result = pipe(text=chat, max_new_tokens=4)[0]["generated_text"]
    assert result[-1]["role"] == "assistant"
    answer = pipe(text=chat, max_new_tokens=4, return_full_text=False)[0]["generated_text"]
    assert answer == result[-1]["content"]
    follow_up = [*chat, {"role": "assistant", "content": answer}, user(picture(1), "And this?")]
    assert pipe(text=follow_up, max_new_tokens=4, return_full_text=False)[0]["generated_text"]
    both = pipe(
        text=[chat, [user(picture(1), "A longer question about it.")]],
        batch_size=2,
        max_new_tokens=4,
        return_full_text=False,
    )
    assert texts(both)[0] == answer


def test_image_text_to_text_and_image_to_text_agree(folder, captioner):
    pipe = pipeline("image-text-to-text", model=str(folder))
    answer = pipe(text=[user(picture(0), "Describe this image.")], return_full_text=False)[0]["generated_text"]
    assert answer.strip() == captioner(picture(0))[0]["generated_text"]


def test_text_generation(folder):
    pipe = pipeline("text-generation", model=str(folder))
    assert pipe("Hello", max_new_tokens=3)[0]["generated_text"].startswith("Hello")
    chat = pipe([{"role": "user", "content": "Hello"}], max_new_tokens=3)[0]["generated_text"]
    assert chat[-1]["role"] == "assistant"


@pytest.mark.skipif(not is_torchvision_available(), reason="any-to-any needs torchvision")
def test_any_to_any(folder):
    pipe = pipeline("any-to-any", model=str(folder))
    assert pipe(text=[user(picture(0), "What is this?")], max_new_tokens=4, return_full_text=False)


def test_saved_pipeline_is_a_complete_checkpoint(folder, captioner, tmp_path):
    captioner.save_pretrained(tmp_path)
    assert {path.name for path in folder.iterdir()} == {path.name for path in tmp_path.iterdir()}
    assert (tmp_path / "config.json").read_text() == (folder / "config.json").read_text()
    assert pipeline("image-to-text", model=str(tmp_path))(picture(1)) == captioner(picture(1))
