"""Pipelines with the package imported: no trust_remote_code, nothing printed."""

import os
import warnings

import pytest
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
