"""What demo_in_browser.py and page_in_browser.py share: Chromium, its visitors, and the answers that they expect."""

import functools
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

from playwright.sync_api import BrowserContext, Locator

from minimind_v import EMBEDDED_MODEL, MiniMindVForConditionalGeneration, MiniMindVProcessor
from minimind_v.inference.engine import Engine, encode, question

IMAGES = Path(__file__).resolve().parents[1] / "examples" / "images"
WINDOWS = {"desktop": {"width": 1280, "height": 900}, "phone": {"width": 390, "height": 844}}
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--use-fake-device-for-media-stream",  # a camera
    "--use-fake-ui-for-media-stream",
]
EVENTS = {
    "drop": "new DragEvent('drop', { dataTransfer: files, bubbles: true, cancelable: true })",
    "paste": "new ClipboardEvent('paste', { clipboardData: files, bubbles: true, cancelable: true })",
}
LONG_TOKENS = 900


def collect_faults(context: BrowserContext) -> list[str]:
    """What a visitor must not see, as it comes: errors of the pages, and requests that leave this machine."""
    faults: list[str] = []

    def note_outside(url: str) -> None:
        if urlsplit(url).scheme in ("http", "https", "ws") and urlsplit(url).hostname != "127.0.0.1":
            faults.append(f"requested {url}")

    context.on("request", lambda request: note_outside(request.url))
    context.on("weberror", lambda error: faults.append(str(error.error)))
    return faults


def give(element: Locator, event: str, name: str, content: bytes) -> None:
    """Drops or pastes a PNG file on an element.

    Args:
        element: Of a page.
        event: One of `EVENTS`.
        name: Of the file.
        content: Of the file.
    """
    script = f"""(element, [name, content]) => {{
        const files = new DataTransfer();
        files.items.add(new File([new Uint8Array(content)], name, {{ type: "image/png" }}));
        element.dispatchEvent({EVENTS[event]});
    }}"""
    element.evaluate(script, [name, list(content)])


@functools.cache
def load_engine() -> Engine:
    return Engine(greedy=True, device="cpu")


def answer(images: Sequence[str | Path], text: str) -> str:
    """The command line's greedy answer."""
    engine = load_engine()
    return engine.answer(encode(engine.processor, [[question(list(map(str, images)), text)]]))[0]


def make_talkative(folder: Path) -> Path:
    """The embedded model without a word for the end, so that there is time to stop it."""
    model = MiniMindVForConditionalGeneration.from_pretrained(EMBEDDED_MODEL)
    model.generation_config.update(eos_token_id=None, suppress_tokens=[2, 3], max_new_tokens=LONG_TOKENS)
    model.save_pretrained(folder)
    MiniMindVProcessor.from_pretrained(EMBEDDED_MODEL).save_pretrained(folder)
    return folder
