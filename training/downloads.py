"""Pictures that training data names by their URL: fetched once, for all workers, epochs and trainings of a machine."""

import hashlib
import sys
import uuid
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

from huggingface_hub import constants

from ..downloading_minimind_v import download, is_allowed, without_secrets
from ..image_loading_minimind_v import load_image


def download_once(url: str, allowed_hosts: Sequence[str] | None = None) -> str:
    """Path of a file with the image of an http(s) URL, as it was when it was first asked for.

    The files are in `$HF_HOME/minimind-v/images`; what is deleted there is fetched again.

    Args:
        url: Of an image.
        allowed_hosts: As for [`download`]; other hosts are refused also where the file is there.

    Raises:
        ValueError: The host is not allowed, the URL cannot be fetched, or it shows no image.
    """
    name = f"the image {without_secrets(url)}"
    if not is_allowed(urlsplit(url).hostname or "", allowed_hosts):
        raise ValueError(f"{name} is not fetched: its host is not an allowed one")
    path = Path(constants.HF_HOME, "minimind-v", "images", hashlib.sha256(url.encode()).hexdigest())
    if not path.exists():
        content = download(url, name, allowed_hosts)
        load_image(content, name, max_pixels=sys.maxsize)  # a page that says "try later" is not kept
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{uuid.uuid4().hex}.part")
        try:
            part.write_bytes(content)
            part.replace(path)  # whole or not at all
        finally:
            part.unlink(missing_ok=True)
    return str(path)
