"""Clicks through the web demo in headless Chromium, as its users do, and takes pictures of the page.

    python tests/demo_in_browser.py SCREENSHOTS [--chromium /usr/bin/chromium]

Needs the extra demo, `pip install playwright` and a Chromium. What is checked: answers equal the greedy ones of the
command line, in both languages; retry, undo, clear, stop, a second model, two pictures, pictures that are pasted,
dragged, taken and given as examples, a broken file, compare, look; no request leaves this machine, and the browser
reports no error.
"""

import argparse
import contextlib
import tempfile
from pathlib import Path

from browsing import FLAGS, IMAGES, WINDOWS, answer, collect_faults, give, make_talkative
from playwright.sync_api import Page, expect, sync_playwright

from minimind_v import EMBEDDED_MODEL
from minimind_v.demo.app import LAUNCH, Demo, build
from minimind_v.demo.texts import CHINESE, ENGLISH

ROCKET, CROWN, APPLE, PIZZA, DOG = (
    str(IMAGES / f"{name}.png") for name in ("rocket", "crown", "apple", "pizza", "dog")
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("screenshots", type=Path)
    parser.add_argument("--chromium", default="/usr/bin/chromium")
    arguments = parser.parse_args()
    arguments.screenshots.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        models = {EMBEDDED_MODEL.name: EMBEDDED_MODEL, "talkative": make_talkative(Path(folder, "talkative"))}
        app = build(Demo(models, device="cpu"))
        _, url, _ = app.launch(server_name="127.0.0.1", quiet=True, prevent_thread_lock=True, **LAUNCH)
        browser = playwright.chromium.launch(executable_path=arguments.chromium, args=FLAGS)
        for number, (size, scheme, words) in enumerate(
            [("desktop", "light", ENGLISH), ("desktop", "dark", CHINESE), ("phone", "dark", ENGLISH)]
        ):
            language = "zh-CN" if words is CHINESE else "en-US"
            context = browser.new_context(
                locale=language, color_scheme=scheme, viewport=WINDOWS[size], reduced_motion="reduce"
            )
            page, faults = context.new_page(), collect_faults(context)
            page.goto(url)
            prefix = str(arguments.screenshots / f"{size}-{scheme}")
            visit(page, words, prefix)
            if number == 0:
                add_in_other_ways(page)
                misuse(page, words, Path(folder), prefix)
            assert not faults, faults
            print(f"{size}, {scheme}, {language}: as expected", flush=True)
            context.close()
        browser.close()
        app.close(verbose=False)


def ask(page: Page, text: str, *files: str) -> None:
    """Uploads and asks, in the chat."""
    if files:
        with page.expect_file_chooser() as chooser:
            page.get_by_test_id("upload-button").first.click()
        chooser.value.set_files(files)
        expect(page.locator(".thumbnail-image")).to_have_count(len(files))
    page.get_by_test_id("textbox").first.fill(text)
    page.get_by_test_id("textbox").first.press("Enter")


def expect_answer(page: Page, text: str) -> None:
    expect(page.get_by_test_id("bot").last).to_have_text(text, timeout=20_000)
    expect(page.locator(".submit-button")).to_be_visible(timeout=20_000)


def clear(page: Page) -> None:
    """Clears the conversation, and waits until the server has heard of it."""
    page.wait_for_timeout(1000)
    page.locator(".icon-button-wrapper button").first.click()
    expect(page.get_by_test_id("bot")).to_have_count(0)
    page.wait_for_timeout(1000)


def visit(page: Page, words: dict[str, str], prefix: str) -> None:
    """A chat about a picture, two pictures in a question, the other two tabs."""
    expect(page.get_by_text("4.00M parameters")).to_be_visible(timeout=30_000)
    expect(page.get_by_text(words["about"])).to_be_visible()
    page.screenshot(path=f"{prefix}-start.png")
    text = words["compare_question"]
    ask(page, text, ROCKET)
    expect_answer(page, answer([ROCKET], text))
    expect(page.get_by_text(words["speed"])).to_be_visible()
    page.screenshot(path=f"{prefix}-chat.png")
    page.get_by_role("button", name="Retry" if words is ENGLISH else "重试").click()
    expect_answer(page, answer([ROCKET], text))
    clear(page)
    ask(page, text, CROWN, ROCKET)
    expect_answer(page, answer([CROWN, ROCKET], text))

    page.get_by_role("tab", name=words["compare"]).click()
    page.get_by_role("button", name=words["compare_button"], exact=True).click()
    for name, images in (("first", [APPLE]), ("second", [PIZZA]), ("both", [APPLE, PIZZA])):
        expect(page.get_by_label(words[f"about_{name}"])).to_have_value(answer(images, text), timeout=20_000)
    page.screenshot(path=f"{prefix}-compare.png", full_page=True)

    page.get_by_role("tab", name=words["look"]).click()
    page.get_by_role("button", name=words["look_button"], exact=True).click()
    radios = page.get_by_role("radio")
    expect(radios.first).to_be_visible(timeout=20_000)
    said = "".join(radios.nth(place).locator("xpath=..").inner_text() for place in range(radios.count()))
    assert said == answer([DOG], text).replace(" ", ""), said
    before = page.locator(".image-frame img").last.get_attribute("src")
    radios.nth(1).check()
    expect(page.locator(".image-frame img").last).not_to_have_attribute("src", before)
    page.screenshot(path=f"{prefix}-look.png", full_page=True)
    page.get_by_role("tab", name=words["chat"]).click()


def add_in_other_ways(page: Page) -> None:
    """Pictures that are pasted, dragged and taken with the camera, an example, and a question taken back."""
    reload(page)
    box, thumbnails = page.get_by_test_id("textbox").first, page.locator(".thumbnail-image")
    for count, event in enumerate(("paste", "drop"), 1):
        give(box, event, "picture.png", Path(ROCKET).read_bytes())
        expect(thumbnails).to_have_count(count)
    ask(page, "What is this?")
    expect_answer(page, answer([ROCKET, ROCKET], "What is this?"))
    page.get_by_role("button", name="Undo").click()
    expect(page.get_by_test_id("bot")).to_have_count(0)
    expect(box).to_have_value("What is this?")
    reload(page)

    page.get_by_text(ENGLISH["camera"]).click()
    page.get_by_role("button", name="Click to Access Webcam").click()
    page.wait_for_function("document.querySelector('video')?.currentTime > 0")  # before, there is nothing to take
    page.get_by_role("button", name="capture photo").click()
    expect(thumbnails).to_have_count(1, timeout=20_000)
    ask(page, "What is this?")
    expect(page.get_by_test_id("bot").last).not_to_be_empty(timeout=20_000)
    page.get_by_text(ENGLISH["camera"]).click()
    clear(page)

    page.get_by_role("button", name="Select example 1").click()
    expect_answer(page, answer([APPLE], "What is this?"))
    clear(page)


def reload(page: Page) -> None:
    page.reload()
    expect(page.get_by_text("4.00M parameters")).to_be_visible(timeout=30_000)


def misuse(page: Page, words: dict[str, str], folder: Path, prefix: str) -> None:
    """A broken file, another model that is stopped, and back."""
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nno picture")
    ask(page, "What is this?", str(folder / "broken.png"))
    expect(page.get_by_text("broken.png cannot be read as a picture")).to_be_visible(timeout=20_000)
    page.screenshot(path=f"{prefix}-broken.png")
    expect(page.locator(".submit-button")).to_be_visible()

    page.get_by_label(words["model"]).click()
    page.get_by_role("option", name="talkative").click()
    page.get_by_text(words["options"]).click()
    ask(page, "What is this?", APPLE)
    stop = page.locator(".stop-button")
    stop.wait_for(timeout=20_000)
    with contextlib.suppress(AssertionError):
        expect(page.get_by_test_id("bot").last).not_to_be_empty(timeout=3_000)
    page.screenshot(path=f"{prefix}-streaming.png")
    stop.click()
    expect(page.locator(".submit-button")).to_be_visible(timeout=20_000)
    stopped = page.get_by_test_id("bot").last.inner_text()
    page.wait_for_timeout(500)
    assert page.get_by_test_id("bot").last.inner_text() == stopped, "It went on after the stop"

    page.get_by_label(words["model"]).click()
    page.get_by_role("option", name=EMBEDDED_MODEL.name).click()
    clear(page)
    ask(page, "What is this?", APPLE)
    expect_answer(page, answer([APPLE], "What is this?"))


if __name__ == "__main__":
    main()
