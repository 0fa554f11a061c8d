"""Anything that shows a picture -> an upright 8-bit RGB image of PIL.

Strict where the stock path is silently wrong (EXIF orientation, 16-bit and float images, transparency), and careful
with what comes from strangers: limits of pixels, memory and downloads, and one clear error that names the input.
"""

import base64
import contextlib
import ctypes
import functools
import io
import logging as std_logging
import math
import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image, ImageFile, ImageOps
from transformers.utils import logging

from .downloading_minimind_v import MAX_BYTES, Refusal, download, is_url, without_secrets

# What people send. Not EPS, for which PIL starts another program, and nothing that any file could be taken for. HEIF
# is there where the user has registered pillow-heif.
FORMATS = ("JPEG", "MPO", "PNG", "GIF", "WEBP", "AVIF", "TIFF", "BMP", "DIB", "JPEG2000", "PPM", "HEIF")
OTHERS = {  # how files begin that are often taken for pictures, what they are, and what to do
    b"%PDF": "a PDF document: save its page as PNG",
    b"<svg": "an SVG drawing: save it as PNG",
    b"<?xml": "an SVG drawing or another XML file: save the drawing as PNG",
    b"%!PS": "a PostScript file: save it as PNG",
    b"\xc5\xd0\xd3\xc6": "a PostScript file: save it as PNG",
    b"<!doctype": "a web page: give the address of the picture itself",
    b"<html": "a web page: give the address of the picture itself",
    b"\x1aE\xdf\xa3": "a video: save one of its frames as PNG",
}
HEIC = (b"heic", b"heix", b"hevc", b"mif1", b"msf1")

MAX_PIXELS = 210_000_000  # a photo of the largest telephones
MAX_DECODING_BYTES = 950_000_000
# Bytes per pixel: of PIL's images, elsewhere 4; and what decoders take besides, measured
PIXEL_BYTES = {"1": 1, "L": 1, "P": 1, "I;16": 2, "I;16B": 2, "I;16L": 2}
DECODER_BYTES = {"WEBP": 13, "AVIF": 10, "HEIF": 10, "JPEG2000": 15}
KEPT_PIXELS = 50_000_000  # Larger ones, and longer sides, are shrunk by a whole number while they are loaded.
KEPT_SIDE = 2**15
TILE_SIDE = 2**11  # Conversions go through tiles, because they take several times the memory of what is converted.
MAX_ASPECT_RATIO = 4  # A centre crop to a square sees nothing beyond, with a margin for the resampling filter.

SMALLEST_IMAGE = 26  # bytes: a GIF of one pixel. Shorter base64 is a mistyped path.

logger = logging.get_logger(__name__)


def load_image(
    source: Any,
    name: str = "image",
    *,
    is_cropped: bool = False,
    max_pixels: int = MAX_PIXELS,
    allowed_hosts: Sequence[str] | None = None,
) -> Image.Image:
    """Anything that shows a picture, as an upright 8-bit RGB image on white; of an animated one, the first frame.

    Decoding takes at most 1.2 GB. An image of more than `KEPT_PIXELS` pixels comes back smaller, by a whole factor.

    Args:
        source: Path, http(s) URL, base64 or data-URL string, bytes, binary file, PIL image, or an array or tensor
            `[H, W]`, `[H, W, C]` or `[C, H, W]` with C = 1, 3 or 4: integers of 8 or 16 bits, or floats in [0, 1] or
            [0, 255].
        name: What error messages call it, such as "image 2 of sample 1".
        is_cropped: A centre crop to a square follows, so the ends of a very long image, which that does not see, are
            cut off: resizing its short side to the square would take gigabytes.
        max_pixels: Larger images are refused before they are decoded.
        allowed_hosts: As for [`download`].

    Raises:
        ValueError: Not an image, broken, of a format that is not read, too large, or an URL that cannot be fetched.
        FileNotFoundError: A string that is no file, no URL and no base64.
        TypeError: Any other kind of object.
    """
    is_fetched = False
    if isinstance(source, (str, os.PathLike)):
        text = os.fspath(source)
        if is_url(text):
            name = f"{name} ({without_secrets(text)})"
            source, is_fetched = download(text, name, allowed_hosts), True
        else:
            name = f"{name} ({text if len(text) <= 200 else text[:60] + '...'})"
            source = _read_base64(text, name) if text.startswith("data:") or not os.path.isfile(text) else source
    kinds = (str, os.PathLike, bytes, bytearray, memoryview, Image.Image, np.ndarray, torch.Tensor)
    if not isinstance(source, kinds) and not hasattr(source, "read"):
        named = "a path, URL, base64 string, bytes, binary file, PIL image, array or tensor"
        raise TypeError(f"{name} must be {named}; got {type(source).__name__}.")
    try:
        if isinstance(source, (np.ndarray, torch.Tensor)):
            return _to_rgb(_image_from_array(source), is_cropped, max_pixels)
        if isinstance(source, Image.Image):
            return _to_rgb(source, is_cropped, max_pixels)
        if isinstance(source, (str, os.PathLike)):
            with open(source, "rb") as file:
                return _to_rgb(_open(file), is_cropped, max_pixels)
        file = io.BytesIO(source) if isinstance(source, (bytes, bytearray, memoryview)) else source
        return _to_rgb(_open(file), is_cropped, max_pixels)
    except Exception as error:  # decoders trip over hostile files in many ways
        # A decoder's words may hold bytes of the file, which are not for whoever gives the address of a server here
        reason = str(error) if isinstance(error, Refusal) or not is_fetched else "it is broken"
        reason, cause = reason or type(error).__name__, None if is_fetched else error
    raise ValueError(f"{name} cannot be read as a picture: {reason}") from cause


def _read_base64(text: str, name: str) -> bytes:
    encoded = "".join(text.rpartition(",")[2].split())
    try:
        content = base64.b64decode(encoded, validate=True)
    except ValueError:
        content = b""
    if not content or (len(content) < SMALLEST_IMAGE and not text.startswith("data:")):
        raise FileNotFoundError(f"{name} is no file, no http(s) URL and no base64 picture. Check the path.")
    return content


# --- Files -----------------------------------------------------------------------------------------------------------


def _open(file: Any) -> Image.Image:
    """The image of a binary file, not decoded yet.

    Not by `Image.open`, whose limit of pixels is the same for the whole process and warns where ours does not.
    """
    try:
        file.seek(0)
    except (AttributeError, OSError):  # a pipe, or what a server sends
        file = io.BytesIO(file.read(MAX_BYTES))
    start = file.read(256)
    if not isinstance(start, bytes):
        raise Refusal("it is a text file; open it in binary mode")
    Image.init()
    for name in FORMATS:
        factory, accepts = Image.OPEN.get(name, (None, None))
        if factory is not None and accepts is not None and accepts(start[:16].ljust(16)) is True:
            file.seek(0)
            _silence_decoders()
            return factory(file, "")
    raise Refusal(_what_else(start))


@functools.cache
def _silence_decoders() -> None:
    """libtiff and PIL also write to stderr what PIL raises."""
    std_logging.getLogger("PIL").addHandler(std_logging.NullHandler())  # which leaves handlers of the user's alone
    with contextlib.suppress(OSError, AttributeError):  # AttributeError: Windows
        ctypes.CDLL(Image.core.__file__).TIFFSetErrorHandler(None)


def _what_else(start: bytes) -> str:
    """What a file seems to be that is none of the pictures that are read, and what to do."""
    known = ", ".join(name for name in FORMATS if name in Image.OPEN)
    if start[4:8] == b"ftyp":
        is_heic = start[8:12] in HEIC
        advice = "a HEIC picture: save it as JPEG, or call pillow_heif.register_heif_opener() before"
        return f"it is {advice if is_heic else 'a video: save one of its frames as PNG'}"
    if start[:4] == b"RIFF" and start[8:12] == b"AVI ":
        return "it is a video: save one of its frames as PNG"
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    found = next((other for magic, other in OTHERS.items() if start.startswith(magic) or text.startswith(magic)), None)
    return f"it is {found}" if found else f"it is none of the kinds that are read ({known})"


# --- Images ----------------------------------------------------------------------------------------------------------


def _to_rgb(image: Image.Image, is_cropped: bool, max_pixels: int) -> Image.Image:
    """Upright RGB on white, no larger than is useful, from an image that need not be decoded yet."""
    _check_size(image, max_pixels)
    if getattr(image, "is_animated", False) and image.format != "MPO":
        logger.warning_once("Of animated pictures, only the first frame is used.")
    orientation = image.getexif().get(ExifTags.Base.Orientation)
    shrink = _shrink_factors(image.size)
    if shrink != (1, 1) and isinstance(image, ImageFile.ImageFile):
        image.draft(None, (image.width // shrink[0], image.height // shrink[1]))  # JPEG can decode fewer pixels
    image.load()
    if is_cropped:
        image = _cut_ends(image)
    white = _white_of(image) if image.mode.startswith(("I", "F")) else None
    shrink = _shrink_factors(image.size)
    output = Image.new("RGB", (math.ceil(image.width / shrink[0]), math.ceil(image.height / shrink[1])))
    for left, top, right, bottom in _tiles(image.size, shrink):
        tile = _tile_to_rgb(image.crop((left, top, right, bottom)), white)
        output.paste(tile.reduce(shrink) if shrink != (1, 1) else tile, (left // shrink[0], top // shrink[1]))
    if orientation is not None:
        output.getexif()[ExifTags.Base.Orientation] = orientation
        output = ImageOps.exif_transpose(output)
    return output


def _check_size(image: Image.Image, max_pixels: int) -> None:
    """Refuses what is too large, before it is decoded."""
    if image.format == "EPS":
        raise Refusal(_what_else(b"%!PS"))
    if (pixels := image.width * image.height) > max_pixels:
        raise Refusal(f"it has more than {max_pixels} pixels and was not decoded; shrink it, or raise max_pixels")
    if image.format == "TIFF" and pixels > (limit := Image.MAX_IMAGE_PIXELS or pixels):
        raise Refusal(
            f"PIL reads TIFF up to its own limit, PIL.Image.MAX_IMAGE_PIXELS ({limit}); save it as PNG or JPEG"
        )
    if isinstance(image, ImageFile.ImageFile) and (needed := _decoding_bytes(image)) > MAX_DECODING_BYTES:
        raise Refusal(f"decoding its {pixels} pixels would take {needed / 1e9:.1f} GB of memory; shrink it")


def _decoding_bytes(image: Image.Image) -> int:
    """About how much memory decoding takes."""
    width, height = image.size
    besides = DECODER_BYTES.get(image.format or "", 0) * width * height
    if image.format == "TIFF":  # a whole strip or tile is decoded at once, which may be the whole image
        rows = image.tag_v2.get(278, image.tag_v2.get(323, height))  # pyright: ignore[reportAttributeAccessIssue]
        besides = 4 * width * min(int(rows), height)
    if image.info.get("progressive"):  # two bytes for each coefficient; colours may have fewer
        areas = [layer[1] * layer[2] for layer in image.layer]  # pyright: ignore[reportAttributeAccessIssue]
        besides = 2 * width * height * sum(areas) // max(areas)
    if image.format in ("JPEG", "MPO"):  # draft() makes it smaller
        width, height = (side // factor for side, factor in zip(image.size, _shrink_factors(image.size), strict=True))
    return besides + width * height * PIXEL_BYTES.get(image.mode, 4) + 8 * height


def _shrink_factors(size: tuple[int, int]) -> tuple[int, int]:
    """Whole numbers by which width and height of a huge image are divided."""
    sides = [math.ceil(side / KEPT_SIDE) for side in size]
    rest = math.ceil(math.sqrt(max(1, size[0] / sides[0] * size[1] / sides[1] / KEPT_PIXELS)))
    return sides[0] * rest, sides[1] * rest


def _tiles(size: tuple[int, int], shrink: tuple[int, int]) -> Iterator[tuple[int, int, int, int]]:
    """Boxes that cover an image, with sides that `shrink` divides where they meet."""
    width, height = (math.ceil(TILE_SIDE / factor) * factor for factor in shrink)
    for top in range(0, size[1], height):
        for left in range(0, size[0], width):
            yield left, top, min(left + width, size[0]), min(top + height, size[1])


def _cut_ends(image: Image.Image) -> Image.Image:
    """The middle of an image whose long side is more than `MAX_ASPECT_RATIO` times the short one."""
    width, height = image.size
    side = MAX_ASPECT_RATIO * min(width, height)
    left, top = max(0, (width - side) // 2), max(0, (height - side) // 2)
    return image.crop((left, top, left + min(width, side), top + min(height, side))) if left or top else image


def _tile_to_rgb(image: Image.Image, white: float | None) -> Image.Image:
    if white is not None:  # 16-bit and float images: PIL's own conversion clips them
        return Image.fromarray(_to_uint8(np.asarray(image), white)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


# --- Values ----------------------------------------------------------------------------------------------------------


def _image_from_array(source: np.ndarray | torch.Tensor) -> Image.Image:
    if isinstance(source, torch.Tensor):
        source = source.detach().cpu()
        array, channels_first = (source.float() if source.is_floating_point() else source).numpy(), True
    else:
        array, channels_first = source, False
    if array.dtype.kind not in "biuf":
        raise Refusal(f"the values of an array must be integers or floats; got {array.dtype}")
    if array.ndim == 3:
        first, last = (array.shape[axis] in (1, 3, 4) for axis in (0, 2))
        if first and (channels_first or not last):
            array = array.transpose(1, 2, 0)
        if array.shape[2] == 1:
            array = array[:, :, 0]
    if not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))) or not array.size:
        raise Refusal(f"an array must be [H, W], [H, W, C] or [C, H, W] with C = 1, 3 or 4; got {array.shape}")
    if array.dtype != np.uint8:
        white = _white(array.dtype, float(array.min()), float(array.max()))
        output = np.empty(array.shape, np.uint8)
        for top in range(0, len(array), TILE_SIDE):
            output[top : top + TILE_SIDE] = _to_uint8(array[top : top + TILE_SIDE], white)
        array = output
    return Image.fromarray(np.ascontiguousarray(array))


def _white_of(image: Image.Image) -> float:
    """See [`_white`]; of an image of 16-bit, 32-bit or float values."""
    extremes = []
    for box in _tiles(image.size, (1, 1)):
        tile = np.asarray(image.crop(box))
        extremes.append((float(tile.min()), float(tile.max())))
    lows, peaks = np.array(extremes).T
    return _white(tile.dtype, float(lows.min()), float(peaks.max()))


def _white(dtype: np.dtype, low: float, peak: float) -> float:
    """The value that is white, where values of that type lie between `low` and `peak`."""
    is_float = np.issubdtype(dtype, np.floating)
    if is_float and low >= -0.01 and peak <= 1.01:  # [0, 1] with rounding errors
        return 1.0
    if not (np.isfinite(low) and np.isfinite(peak)) or low < 0:
        raise Refusal(f"pixel values must lie in [0, 1], [0, 255] or [0, 65535]; got {low} to {peak}")
    if dtype.type is np.bool_:
        return 1.0
    return max(65535.0 if dtype.type is np.uint16 or peak > 255 else 255.0, peak)


def _to_uint8(array: np.ndarray, white: float) -> np.ndarray:
    return np.rint(array.clip(0, white).astype(np.float64) * (255 / white)).astype(np.uint8)


__all__ = ["FORMATS", "MAX_PIXELS", "load_image"]
