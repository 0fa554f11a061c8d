"""Images from strangers: what is read and what is not, how much memory it takes, and threads."""

import io
import json
import os
import subprocess
import sys
import tempfile
import threading
import warnings

import numpy as np
import pytest
from conftest import CHECKPOINT, picture
from PIL import Image

from minimind_v import image_loading_minimind_v as image_loading
from minimind_v.image_loading_minimind_v import FORMATS, load_image


def save(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


# --- Kinds -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [kind for kind in FORMATS if kind != "HEIF"])
def test_every_format_that_is_read(kind):
    options = {"save_all": True, "append_images": [picture(2)]} if kind == "MPO" else {}
    content = save(picture(1, size=(32, 32)), kind, **options)
    with Image.open(io.BytesIO(content)) as expected:
        assert np.array_equal(np.asarray(load_image(content)), np.asarray(expected.convert("RGB")))


@pytest.mark.parametrize(
    "content, message",
    [
        (save(picture(), "EPS"), "it is a PostScript file: save it as PNG"),
        (save(picture(), "PDF"), "it is a PDF document"),
        (b"\xef\xbb\xbf <svg xmlns='http://www.w3.org/2000/svg'/>", "it is an SVG drawing"),
        (b"<?xml version='1.0'?><svg/>", "it is an SVG drawing"),
        (b"\0\0\0\x18ftypheic\0\0\0\0", "it is a HEIC picture: .*pillow_heif"),
        (b"\0\0\0\x18ftypisom\0\0\0\0", "it is a video"),
        (b"\x1aE\xdf\xa3 matroska", "it is a video"),
        (b"RIFF\0\0\0\0AVI LIST", "it is a video"),
        (b"<!DOCTYPE html><html>", "it is a web page"),
        (save(picture(), "TGA"), r"it is none of the kinds that are read \(JPEG, .*PNG"),
        (b"", "it is none of the kinds"),
    ],
)
def test_other_files_say_what_they_are(content, message):
    with pytest.raises(ValueError, match=f"image cannot be read as a picture: {message}"):
        load_image(content)


def test_no_other_program_is_started(tmp_path, monkeypatch):
    """PIL hands EPS to Ghostscript, also where a user has opened the image."""
    program = tmp_path / "gs"
    program.write_text(f"#!{sys.executable}\nopen({str(tmp_path / 'started')!r}, 'w')\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", None)
    content = save(picture(), "EPS")
    with pytest.raises(OSError):
        Image.open(io.BytesIO(content)).load()
    assert (tmp_path / "started").exists()  # this is how it would be seen
    (tmp_path / "started").unlink()
    for source in (content, Image.open(io.BytesIO(content))):
        with pytest.raises(ValueError, match="PostScript"):
            load_image(source)
    assert not (tmp_path / "started").exists()


def test_files_and_bytes_of_every_kind(tmp_path):
    content, expected = save(picture(), "PNG"), np.asarray(picture())
    with (
        tempfile.NamedTemporaryFile() as named,
        tempfile.TemporaryFile() as unnamed,
        tempfile.SpooledTemporaryFile() as spooled,
        open(os.pipe()[0], "rb") as never_written,
    ):
        never_written.close()
        for file in (named, unnamed, spooled):
            file.write(content)
        reading, writing = os.pipe()
        os.write(writing, content[:60000])
        os.close(writing)
        with open(reading, "rb") as pipe:
            sources = [bytearray(content), memoryview(content), named, unnamed, spooled, pipe]
            for source in sources:
                assert np.array_equal(np.asarray(load_image(source)), expected), type(source)
        (tmp_path / "image.png").write_bytes(content)
        with open(tmp_path / "image.png", encoding="latin-1") as text, pytest.raises(ValueError, match="binary mode"):
            load_image(text)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF", "AVIF"])
def test_first_frame_of_an_animation_is_said_once(kind, caplog):
    frames = [picture(seed, size=(32, 32)) for seed in range(3)]
    content = save(frames[0], kind, save_all=True, append_images=frames[1:])
    image_loading.logger.warning_once.cache_clear()
    with Image.open(io.BytesIO(content)) as expected:
        assert expected.n_frames == 3
        for _ in range(2):
            assert np.array_equal(np.asarray(load_image(content)), np.asarray(expected.convert("RGB")))
    assert caplog.text.count("only the first frame") == 1


# --- Sizes -----------------------------------------------------------------------------------------------------------

MODES = ["1", "L", "P", "RGB", "RGBA", "LA", "CMYK", "YCbCr", "I;16", "I", "F"]


def in_mode(mode, size):
    image = picture(1, size=size)
    if mode == "I;16":
        return Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    return image.convert(mode) if mode != "LA" else image.convert("RGBA").convert("LA")


@pytest.mark.parametrize("mode", MODES)
def test_tiles_change_nothing(mode, monkeypatch):
    image = in_mode(mode, (100, 70))
    whole = np.asarray(load_image(image))
    monkeypatch.setattr(image_loading, "TILE_SIDE", 16)
    assert np.array_equal(np.asarray(load_image(image)), whole)


@pytest.mark.parametrize("mode", MODES)
def test_huge_images_are_shrunk_by_a_whole_factor(mode, monkeypatch):
    image = in_mode(mode, (101, 70))
    whole = load_image(image)
    monkeypatch.setattr(image_loading, "TILE_SIDE", 16)
    monkeypatch.setattr(image_loading, "KEPT_PIXELS", 1000)
    assert np.array_equal(np.asarray(load_image(image)), np.asarray(whole.reduce(3)))
    monkeypatch.setattr(image_loading, "KEPT_PIXELS", 10**9)
    monkeypatch.setattr(image_loading, "KEPT_SIDE", 80)
    assert np.array_equal(np.asarray(load_image(image)), np.asarray(whole.reduce((2, 1))))


def test_shrunk_images_stand_upright(monkeypatch):
    monkeypatch.setattr(image_loading, "KEPT_PIXELS", 1000)
    exif = Image.Exif()
    exif[0x0112] = 6
    content = save(picture(1, size=(96, 60)), "PNG", exif=exif)
    expected = picture(1, size=(96, 60)).reduce(3).transpose(Image.Transpose.ROTATE_270)
    assert np.array_equal(np.asarray(load_image(content)), np.asarray(expected))


MEASURE = """
import json, sys, warnings
import numpy as np
warnings.simplefilter("error")
import minimind_v
from transformers import AutoProcessor
processor = AutoProcessor.from_pretrained(sys.argv[1])
processor(images=[np.zeros((40, 40, 3), np.uint8)], return_tensors="pt")
def read(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name)) / 1e6
for sources in json.loads(sys.argv[2]):
    open("/proc/self/clear_refs", "w").write("5")
    before = read("VmRSS")
    assert len(processor(images=sources, return_tensors="pt")["pixel_values"]) == len(sources)
    print(read("VmHWM") - before)
"""


@pytest.fixture(scope="module")
def huge(tmp_path_factory):
    """Files of few bytes and many pixels."""
    folder = tmp_path_factory.mktemp("huge")
    large = Image.new("RGB", (16384, 12288), (200, 100, 50))
    large.save(folder / "201MP.jpg")
    large.save(folder / "201MP_progressive.jpg", progressive=True)
    large.save(folder / "201MP.png", compress_level=1)
    Image.new("F", (12000, 7000), 0.5).save(folder / "84MP_float.tif", compression="tiff_lzw")
    Image.new("RGBA", (8000, 6000), (9, 9, 9, 9)).save(folder / "48MP_rgba.png", compress_level=1)
    Image.new("I;16", (7000, 7000), 9).save(folder / "49MP_16bit.png", compress_level=1)
    Image.new("L", (1, 89_000_000)).save(folder / "89MP_thin.png", compress_level=1)
    Image.new("RGB", (8000, 6000)).save(folder / "48MP.webp", quality=1, method=0)
    return folder


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="peak memory is read from Linux's /proc")
def test_memory(huge):
    """Above the idle process, in GB: one image of any accepted kind, and a batch of eight; without a warning."""
    batches = [[str(path)] for path in sorted(huge.iterdir())]
    batches.append([str(huge / name) for name in ["201MP.png"] + ["49MP_16bit.png"] * 3 + ["48MP_rgba.png"] * 4])
    command = [sys.executable, "-c", MEASURE, str(CHECKPOINT), json.dumps(batches)]
    peaks = list(map(float, subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()))
    assert len(peaks) == len(batches) == 9
    assert 0 < max(peaks[:-1]) < 1.2 and peaks[-1] < 1.5, dict(zip(map(str, batches), peaks, strict=True))


def test_more_than_fits_is_refused_before_decoding():
    for image, message in (
        (Image.new("1", (16000, 16000)), "more than 210000000 pixels"),
        (Image.new("1", (16000, 8000)), r"would take 2.\d GB"),
    ):
        kind = "PNG" if "pixels" in message else "WEBP"
        content = save(
            image if kind == "PNG" else image.convert("RGB"), kind, **({} if kind == "PNG" else {"quality": 1})
        )
        with pytest.raises(ValueError, match=message):
            load_image(content)
    assert load_image(save(Image.new("1", (16000, 16000)), "PNG"), max_pixels=256_000_000).size == (5334, 5334)


# --- Threads ---------------------------------------------------------------------------------------------------------


def test_threads_leave_the_warnings_of_the_process_alone():
    content = save(Image.new("1", (9500, 9500)), "PNG")  # above the size that PIL warns of
    errors = []

    def load():
        try:
            load_image(content)
        except Exception as error:
            errors.append(error)

    before = list(warnings.filters)
    with warnings.catch_warnings(record=True) as caught:
        inside = list(warnings.filters)
        threads = [threading.Thread(target=load) for _ in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert list(warnings.filters) == inside
    assert not errors and not caught and list(warnings.filters) == before
