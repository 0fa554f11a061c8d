"""Anything that shows a picture -> an upright 8-bit RGB image of PIL.

Strict where the stock path is silently wrong (EXIF orientation, 16-bit and float images, transparency), and careful
with what comes from strangers: limits of pixels and downloads, one clear error that names the input.
"""

import base64
import http.client
import io
import os
import time
import urllib.parse
import urllib.request
import warnings
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

URL_TIMEOUT = 20  # seconds, for the connection and for all of the content
MAX_DOWNLOAD_BYTES = 64 * 2**20
SMALLEST_IMAGE = 26  # bytes: a GIF of one pixel. Shorter base64 is a mistyped path.
MAX_ASPECT_RATIO = 4  # A centre crop to a square sees nothing beyond, with a margin for the resampling filter.


def load_image(source: Any, name: str = "image", is_cropped: bool = False) -> Image.Image:
    """Anything that shows a picture, as an upright 8-bit RGB image on white.

    Args:
        source: Path, http(s) URL, base64 or data-URL string, bytes, binary file, PIL image, or an array or tensor
            `[H, W]`, `[H, W, C]` or `[C, H, W]` with C = 1, 3 or 4: integers of 8 or 16 bits, or floats in [0, 1] or
            [0, 255].
        name: What error messages call it, such as "image 2 of sample 1".
        is_cropped: A centre crop to a square follows, so the ends of a very long image, which that does not see, are
            cut off: resizing its short side to the square would take gigabytes.

    Raises:
        ValueError: Not an image, broken, or with more pixels than `PIL.Image.MAX_IMAGE_PIXELS`.
        FileNotFoundError: A string that is no file, no URL and no base64.
        TypeError: Any other kind of object.
    """
    if isinstance(source, (str, os.PathLike)):
        text = os.fspath(source)
        name = f"{name} ({text if len(text) <= 200 else text[:60] + '...'})"
        if text[:8].lower().startswith(("http://", "https://")):
            source = _download(text, name)
        elif text.startswith("data:") or not os.path.isfile(text):
            encoded = "".join(text.rpartition(",")[2].split())
            try:
                source = base64.b64decode(encoded, validate=True)
            except ValueError:
                source = b""
            if not source or (len(source) < SMALLEST_IMAGE and not text.startswith("data:")):
                raise FileNotFoundError(f"{name} is no file, no http(s) URL and no base64 picture. Check the path.")
    if isinstance(source, bytes):
        source = io.BytesIO(source)
    is_file = isinstance(source, (str, os.PathLike, io.IOBase))
    if not is_file and not isinstance(source, (Image.Image, np.ndarray, torch.Tensor)):
        kinds = "a path, URL, base64 string, bytes, PIL image, array or tensor"
        raise TypeError(f"{name} must be {kinds}; got {type(source).__name__}.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            if isinstance(source, (np.ndarray, torch.Tensor)):
                image = _image_from_array(source)
            else:
                # Binary files need not be typing's IO[bytes]
                image = Image.open(source) if is_file else source  # pyright: ignore[reportArgumentType]
                image = _to_rgb(ImageOps.exif_transpose(image))
            return _cut_ends(image) if is_cropped else image
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise ValueError(
            f"{name} has more than {Image.MAX_IMAGE_PIXELS} pixels and was not decoded. Shrink it, or raise "
            "PIL.Image.MAX_IMAGE_PIXELS if you trust it."
        ) from None
    except Exception as error:  # decoders trip over hostile files in many ways
        raise ValueError(f"{name} cannot be read as a picture: {error}") from error


def _download(url: str, name: str) -> bytes:
    deadline, content = time.monotonic() + URL_TIMEOUT, b""
    try:
        request = urllib.request.Request(urllib.parse.quote(url, safe="%/:=&?~#+!$,;'@()*[]"))
        request.add_header("User-Agent", "minimind-v")
        with urllib.request.urlopen(request, timeout=URL_TIMEOUT) as response:
            while chunk := response.read1(2**16):
                content += chunk
                if len(content) > MAX_DOWNLOAD_BYTES or time.monotonic() > deadline:
                    raise ValueError(f"it takes more than {MAX_DOWNLOAD_BYTES} bytes or {URL_TIMEOUT} seconds")
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise ValueError(f"{name} cannot be downloaded: {error}") from error
    return content


def _cut_ends(image: Image.Image) -> Image.Image:
    """The middle of an image whose long side is more than `MAX_ASPECT_RATIO` times the short one."""
    width, height = image.size
    side = MAX_ASPECT_RATIO * min(width, height)
    left, top = max(0, (width - side) // 2), max(0, (height - side) // 2)
    return image.crop((left, top, left + min(width, side), top + min(height, side))) if left or top else image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith(("I", "F")):  # 16-bit and float images: PIL's own conversion clips them
        return Image.fromarray(_to_uint8(np.asarray(image))).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _image_from_array(array: np.ndarray | torch.Tensor) -> Image.Image:
    channels_first = isinstance(array, torch.Tensor)
    if channels_first:
        array = array.detach().cpu()
        array = (array.float() if array.is_floating_point() else array).numpy()
    if array.ndim == 3:
        first, last = (array.shape[axis] in (1, 3, 4) for axis in (0, 2))
        if first and (channels_first or not last):
            array = array.transpose(1, 2, 0)
        if array.shape[2] == 1:
            array = array[:, :, 0]
    if not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))) or not array.size:
        raise ValueError(f"an array must be [H, W], [H, W, C] or [C, H, W] with C = 1, 3 or 4; got {array.shape}")
    # It is one of numpy by now, which `numpy()` and indexing do not tell the type checker
    return _to_rgb(Image.fromarray(np.ascontiguousarray(_to_uint8(array))))  # pyright: ignore[reportArgumentType]


def _to_uint8(array: np.ndarray) -> np.ndarray:
    if array.dtype == np.uint8:
        return array
    low, peak = float(array.min()), float(array.max())
    if np.issubdtype(array.dtype, np.floating) and low >= -0.01 and peak <= 1.01:  # [0, 1] with rounding errors
        array, low, peak = array.clip(0, 1), 0.0, min(peak, 1.0)
    if not (np.isfinite(low) and np.isfinite(peak)) or low < 0:
        raise ValueError(f"pixel values must lie in [0, 1], [0, 255] or [0, 65535]; got {low} to {peak}")
    white = 65535 if array.dtype.type is np.uint16 or peak > 255 else 255
    if array.dtype == bool or (peak <= 1 and np.issubdtype(array.dtype, np.floating)):
        white = 1
    return np.rint(array.astype(np.float64) * (255 / max(white, peak))).astype(np.uint8)


__all__ = ["load_image"]
