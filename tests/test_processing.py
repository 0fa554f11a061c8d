"""The processor: everything that shows a picture, chats, and hostile input."""

import base64
import contextlib
import http.server
import io
import threading

import numpy as np
import pytest
import torch
from conftest import picture, user
from PIL import Image, ImageOps
from transformers import AutoProcessor

from minimind_v import MiniMindVProcessor
from minimind_v.image_loading_minimind_v import load_image


def png(image, **options):
    buffer = io.BytesIO()
    image.save(buffer, **{"format": "PNG"} | options)
    return buffer.getvalue()


@contextlib.contextmanager
def web_server(content):
    """A real server on loopback that answers every request with these bytes."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200 if content else 404)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/picture.png"
        server.shutdown()


def pixels(processor, image):
    return processor(text="<|image_pad|>", images=image, return_tensors="pt")["pixel_values"]


# --- What a picture may be ------------------------------------------------------------------------------------------


def test_all_sources_give_the_same_pixels(processor, tmp_path):
    image = picture(1)
    path = tmp_path / "picture.png"
    path.write_bytes(png(image))
    text = base64.b64encode(png(image)).decode()
    array = np.asarray(image)
    processor.allowed_hosts = ["127.0.0.1"]
    with web_server(png(image)) as url:
        sources = [str(path), path, url, text, "data:image/png;base64," + text, png(image), io.BytesIO(png(image))]
        sources += [image, array, array.transpose(2, 0, 1), torch.tensor(array), torch.tensor(array).permute(2, 0, 1)]
        sources += [array / 255.0, torch.tensor(array / 255.0).permute(2, 0, 1), array.astype(np.float32)]
        sources += [array.astype(np.uint16) * 257, array.astype(np.int64), torch.tensor(array).to(torch.int16)]
        expected = pixels(processor, image)
        assert expected.shape == (1, 3, 32, 32)
        for source in sources:
            assert torch.equal(pixels(processor, source), expected), type(source)
            assert torch.equal(pixels(processor, [source]), expected), type(source)
            assert torch.equal(pixels(processor, [[source]]), expected), type(source)


def test_batched_array_is_a_list_of_pictures(processor):
    images = [picture(seed) for seed in range(2)]
    stacked = np.stack([np.asarray(image) for image in images])
    text = "<|image_pad|><|image_pad|>"
    for batch in (stacked, torch.tensor(stacked).permute(0, 3, 1, 2)):
        result = processor(text=text, images=batch, return_tensors="pt")["pixel_values"]
        assert torch.equal(result, processor(text=text, images=images, return_tensors="pt")["pixel_values"])


@pytest.mark.parametrize("as_file", [True, False])
def test_exif_orientation_is_applied_to_files_and_objects(as_file):
    image = picture(2, size=(40, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned by 90 degrees
    content = png(image, exif=exif)
    loaded = load_image(content if as_file else Image.open(io.BytesIO(content)))
    assert loaded.size == (20, 40)
    assert np.array_equal(np.asarray(loaded), np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(content)))))


def test_unusual_modes_are_shown_right(tmp_path):
    grey = picture(1, mode="L")
    deep = np.asarray(grey).astype(np.uint16) * 257
    for source in (
        Image.fromarray(deep),
        png(Image.fromarray(deep)),
        Image.fromarray(deep.astype(np.int32), mode="I"),
    ):
        assert np.array_equal(np.asarray(load_image(source)), np.asarray(grey.convert("RGB")))
    float_image = Image.fromarray(np.asarray(grey).astype(np.float32) / 255)
    assert float_image.mode == "F"
    assert np.array_equal(np.asarray(load_image(float_image)), np.asarray(grey.convert("RGB")))
    almost_black = np.ones((3, 4, 6), np.uint8)  # 1 of 255, not 100 %
    for source in (almost_black, torch.tensor(almost_black)):
        assert np.asarray(load_image(source)).max() == 1
    floats = np.asarray(grey) / 255
    for rounded in (floats * 1.000001, floats - 1e-7):
        assert np.array_equal(np.asarray(load_image(rounded)), np.asarray(load_image(floats)))
    for mode in ("P", "CMYK", "YCbCr", "L", "1", "HSV"):
        converted = picture(1).convert(mode)
        assert np.array_equal(np.asarray(load_image(converted)), np.asarray(converted.convert("RGB"))), mode
    frames = [picture(seed) for seed in (3, 4)]
    path = tmp_path / "animated.gif"
    frames[0].save(path, save_all=True, append_images=frames[1:])
    assert np.array_equal(np.asarray(load_image(path)), np.asarray(Image.open(path).convert("RGB")))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_alpha_is_composited_on_white(mode):
    image = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    image.putpixel((0, 0), (10, 10, 10, 255))
    image.putpixel((1, 0), (0, 0, 0, 128))
    if mode == "P":
        image = Image.open(io.BytesIO(png(image.quantize(8))))
    loaded = np.asarray(load_image(image.convert(mode)))
    assert loaded[0, 0].tolist() == [10] * 3 and loaded[3, 3].tolist() == [255] * 3
    assert 126 <= loaded[0, 1, 0] <= 128


@pytest.mark.parametrize("size", [(1, 1), (2, 20000), (20000, 2), (1, 3)])
@pytest.mark.parametrize("tower", ["clip", "siglip"])
def test_extreme_sizes(size, tower, make_processor):
    values = pixels(make_processor(tower), Image.new("RGB", size, "white"))
    assert values.shape == (1, 3, 32, 32) and values.std(dim=(2, 3)).max() < 1e-3


def test_long_pictures_keep_what_the_crop_shows(make_processor):
    """Cutting a very long picture before resizing changes nothing in the square that is seen."""
    processor = make_processor("clip")
    long = picture(1, size=(640, 40))
    expected = processor.image_processor(long, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(pixels(processor, long), expected, atol=0.02, rtol=0)


@pytest.mark.parametrize(
    "source, error, message",
    [
        ("no/such/file.png", FileNotFoundError, r"image 0 .no/such/file.png. is no file"),
        (b"", ValueError, "image 0 cannot be read as a picture"),
        (b"not a picture", ValueError, "image 0 cannot be read as a picture"),
        (png(picture())[:-400], ValueError, "image 0 cannot be read as a picture: .*truncated"),
        ("data:image/png;base64,!!", FileNotFoundError, "image 0 .*no base64 picture"),
        ("data:image/png;base64,AAAA", ValueError, "image 0 .* cannot be read as a picture"),
        (3, TypeError, "image 0 must be a path.* got int"),
        (np.full((4, 4, 3), -1.0), ValueError, r"image 0 .*must lie in \[0, 1\]"),
        (np.full((4, 4, 3), np.nan), ValueError, "image 0 .*must lie in"),
        (np.zeros((6, 4, 5), np.uint8), ValueError, r"image 0 .*got \(6, 4, 5\)"),
        (np.zeros((0, 4, 3), np.uint8), ValueError, r"image 0 .*got \(0, 4, 3\)"),
    ],
)
def test_broken_pictures_are_named(source, error, message, processor):
    with pytest.raises(error, match=message):
        pixels(processor, source)


def test_broken_picture_in_a_batch_is_named(processor, tmp_path):
    path = tmp_path / "broken.jpg"
    path.write_bytes(b"\xff\xd8\xff nothing")
    with pytest.raises(ValueError, match=r"image 1 of sample 1 .*broken.jpg.* cannot be read"):
        processor(text=["<|image_pad|>", "<|image_pad|>" * 2], images=[[picture()], [picture(), str(path)]])


def test_too_many_pixels_are_refused_before_decoding(processor, monkeypatch):
    processor.max_image_pixels = 100
    content = png(picture())
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(ValueError, match=r"image 0 .*has more than 100 pixels and was not decoded"):
        pixels(processor, content)


def test_options_of_the_image_processor(make_processor):
    processor = make_processor("clip")
    with pytest.raises(ValueError, match="do_rescale=False is not possible"):
        processor(text="<|image_pad|>", images=picture(), do_rescale=False)
    long = picture(size=(400, 20))
    whole = processor(text="<|image_pad|>", images=long, do_center_crop=False, return_tensors="pt")["pixel_values"]
    assert whole.shape == (1, 3, 32, 640)


def test_addresses_with_unusual_characters(processor):
    processor.allowed_hosts = ["127.0.0.1"]
    with web_server(png(picture())) as url:
        for name in ("图.png", "a b.png?x=1&y=2"):
            assert torch.equal(pixels(processor, url.replace("picture.png", name)), pixels(processor, picture()))
        assert torch.equal(pixels(processor, url.replace("http", "HTTP")), pixels(processor, picture()))
    with pytest.raises(ValueError, match="cannot be downloaded"):
        pixels(processor, "http://127.0.0.1:bad/picture.png")


def test_download_that_fails(processor):
    processor.allowed_hosts = ["127.0.0.1"]
    with web_server(b"") as url, pytest.raises(ValueError, match=r"image 0 .* cannot be downloaded: .*404"):
        pixels(processor, url)


def test_hosts_from_the_environment(make_processor, monkeypatch):
    """For servers that load the processor, such as `transformers serve`."""
    for value, allowed in (("", []), ("127.0.0.1,a.org", ["127.0.0.1", "a.org"])):
        monkeypatch.setenv("MINIMIND_V_ALLOWED_HOSTS", value)
        processor = make_processor()
        assert processor.allowed_hosts == allowed
        with web_server(png(picture())) as url:
            if allowed:
                assert torch.equal(pixels(processor, url), pixels(processor, picture()))
            else:
                with pytest.raises(ValueError, match="fetching is switched off"):
                    pixels(processor, url)


# --- Text, batches and chats ----------------------------------------------------------------------------------------


def test_placeholder_becomes_as_many_tokens_as_the_picture_has(processor):
    inputs = processor(text="a<|image_pad|>b", images=picture(), return_mm_token_type_ids=True)
    assert inputs["input_ids"][0].count(3) == 16
    assert inputs["mm_token_type_ids"][0] == [int(token == 3) for token in inputs["input_ids"][0]]


def test_as_many_pictures_as_one_has_tokens(processor):
    inputs = processor(text="<|image_pad|>" * 16, images=[picture()] * 16)
    assert inputs["input_ids"][0].count(3) == 256


def test_other_parts_of_a_chat_are_refused(processor, encode):
    with pytest.raises(ValueError, match="part of type 'video'"):
        encode(processor, {"role": "user", "content": [{"type": "video", "video": "a.mp4"}]})
    with pytest.raises(ValueError, match="not both in one list"):
        processor(text=["a", "b"], images=[[picture()], picture()])


def test_text_replacement_offsets(processor):
    inputs = processor(
        text=["a<|image_pad|>b<|image_pad|>"], images=[[picture(), picture(1)]], return_text_replacement_offsets=True
    )
    first, second = inputs["text_replacement_offsets"][0]
    length = len("<|image_pad|>")
    assert first["span"] == (1, 1 + length) and first["new_span"] == (1, 1 + 16 * length)
    assert second["span"] == (2 + length, 2 + 2 * length) and second["replacement"] == "<|image_pad|>" * 16


def test_number_of_multimodal_tokens(processor):
    data = processor._get_num_multimodal_tokens(image_sizes=[[10, 10], [500, 20]])
    assert data["num_image_tokens"] == [16, 16] and data["num_image_patches"] == [1, 1]


def test_chat_with_parts_anywhere_and_several_turns(processor, encode):
    chat = [
        {"role": "system", "content": "Be short."},
        user("Look: ", picture(0), " and ", picture(1), "?"),
        {"role": "assistant", "content": "Two."},
        user(picture(2), "And this?"),
    ]
    inputs = encode(processor, chat)
    image = "<|image_pad|>" * 16
    assert processor.decode(inputs["input_ids"][0]) == (
        f"<|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user\nLook: {image} and {image}?<|im_end|>\n"
        f"<|im_start|>assistant\nTwo.<|im_end|>\n<|im_start|>user\n{image}And this?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert inputs["pixel_values"].shape[0] == 3
    for index in range(3):
        assert torch.equal(inputs["pixel_values"][index : index + 1], pixels(processor, picture(index)))


def test_batch_of_chats_with_different_numbers_of_pictures(processor, encode):
    chats = [user("none"), user(picture(0), "one"), user(picture(1), picture(2), "two")]
    inputs = encode(processor, *chats)
    assert (inputs["input_ids"] == 3).sum(1).tolist() == [0, 16, 32]
    assert inputs["attention_mask"][:, -1].all() and not inputs["attention_mask"][0, 0]  # padded on the left
    assert inputs["pixel_values"].shape[0] == 3
    assert "pixel_values" not in encode(processor, chats[0], chats[0])


def test_assistant_mask_covers_the_answers_only(processor):
    chats = [
        [user(picture(0), "What is this?"), {"role": "assistant", "content": "A cat 猫."}, user("Sure?")],
        [user("a"), {"role": "assistant", "content": "b"}, user(picture(1)), {"role": "assistant", "content": "c!"}],
    ]
    inputs = processor.apply_chat_template(
        chats,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        return_assistant_tokens_mask=True,
        processor_kwargs={"padding": True},
    )
    masks = torch.as_tensor(inputs["assistant_masks"]).bool()
    answers = [processor.decode(ids[mask]) for ids, mask in zip(inputs["input_ids"], masks, strict=True)]
    assert answers == ["A cat 猫.<|im_end|>\n", "b<|im_end|>\nc!<|im_end|>\n"]


@pytest.mark.parametrize(
    "text, images, message",
    [
        (["<|image_pad|>"], None, r"they are \[1\] and \[0\]"),
        (["no placeholder"], [[picture()]], r"they are \[0\] and \[1\]"),
        (["<|image_pad|>", "<|image_pad|>"], [[picture(), picture()], []], r"they are \[1, 1\] and \[2, 0\]"),
        (
            ["<|image_pad|>", "", "<|image_pad|>"],
            [[picture()], [], [picture()], []],
            r"\[1, 0, 1\] and \[1, 0, 1, 0\]",
        ),
        (["<|image_pad|>" * 2, "a"], [picture()] * 3, r"they are \[2, 0\] and \[3\]"),
        (["<|image_pad|>"], [[picture()], [picture()]], r"they are \[1\] and \[1, 1\]"),
    ],
)
def test_pictures_and_placeholders_must_agree_in_every_sample(text, images, message, processor):
    with pytest.raises(ValueError, match=message):
        processor(text=text, images=images)


@pytest.mark.parametrize("token", ["<|image_pad|>", "<|im_end|>", "<|im_start|>", "<|endoftext|>"])
def test_control_tokens_typed_by_a_user_are_refused(token, processor, encode):
    for chat in (user(picture(), f"Hello{token}"), {"role": "user", "content": f"{token}system"}):
        with pytest.raises(ValueError, match="user message contains the control token"):
            encode(processor, chat)


def test_truncation_never_cuts_a_picture(processor):
    options = {"images": [[picture()]], "truncation": True, "return_tensors": "pt"}
    text = ["<|image_pad|>What is this? Describe the picture."]
    assert processor(text=text, max_length=20, **options)["input_ids"].shape == (1, 20)
    processor.tokenizer.truncation_side = "right"
    with pytest.raises(ValueError, match=r"Mismatch in `image` token count .*truncation"):
        processor(text=text, max_length=10, **options)


def test_prompt_longer_than_the_model_is_refused(processor, caplog):
    with pytest.raises(ValueError, match=r"The prompt has \d+ tokens, but the model has only 512 positions"):
        processor(text="<|image_pad|>" + " x" * 600, images=picture())
    assert not caplog.records


def test_impossible_image_token_is_refused(make_processor):
    with pytest.raises(ValueError, match="image_token must be one token of the tokenizer; 'two tokens' is"):
        make_processor(image_token="two tokens")
    with pytest.raises(ValueError, match=r"'@@@@@@@@@@@@@@@@' is 16\. .* must be converted again"):  # earlier versions
        make_processor("clip", image_token="@" * 16)


# --- Saved and loaded -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tower", ["siglip", "clip"])
def test_save_and_load(tower, make_processor, encode, tmp_path):
    processor = make_processor(tower)
    processor.save_pretrained(tmp_path / "first")
    files = {path.name for path in (tmp_path / "first").iterdir()}
    assert {"processor_config.json", "chat_template.jinja", "tokenizer.json", "processing_minimind_v.py"} <= files
    assert not files & {"preprocessor_config.json", "chat_template.json"}
    loaded = MiniMindVProcessor.from_pretrained(tmp_path / "first")
    assert loaded.tokenizer.padding_side == "left" and loaded.chat_template == processor.chat_template
    assert (loaded.image_seq_length, loaded.image_token) == (16, "<|image_pad|>")
    loaded.save_pretrained(tmp_path / "second")
    for path in (tmp_path / "first").iterdir():
        assert path.read_bytes() == (tmp_path / "second" / path.name).read_bytes(), path.name
    chats = [user(picture(0), "What is this?"), user("a@b")]
    for key, value in encode(processor, *chats).items():
        assert torch.equal(encode(loaded, *chats)[key], value)


def test_tokenizer_and_image_processor_alone_are_enough(make_processor, tmp_path):
    """A library pipeline saves these two and not the processor."""
    processor = make_processor("clip")
    processor.tokenizer.save_pretrained(tmp_path)
    processor.image_processor.save_pretrained(tmp_path)
    loaded = MiniMindVProcessor.from_pretrained(tmp_path)
    assert (loaded.image_seq_length, loaded.image_token_id) == (16, processor.image_token_id)
    assert torch.equal(pixels(loaded, picture()), pixels(processor, picture()))


def test_auto_processor_finds_it(make_processor, tmp_path):
    make_processor().save_pretrained(tmp_path)
    assert type(AutoProcessor.from_pretrained(tmp_path)) is MiniMindVProcessor
