"""Clicks through the page that runs the model in the browser, as its users do, and takes pictures of it.

    python tests/page_in_browser.py SCREENSHOTS NODE_MODULES [--chromium /usr/bin/chromium]

Needs the extra export, `pip install playwright`, a Chromium, and the folder of npm install @huggingface/transformers.
What is checked: answers equal the greedy ones of `minimind-v caption`, about every example picture in both languages
and about photos of other sizes; choosing, dropping, pasting and the camera; stop; a broken file, a control token; a
changed script is not run; everything works by keyboard, and again when the server is gone; no request leaves this
machine, and the browser reports no error.
"""

import argparse
import contextlib
import functools
import json
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from browsing import FLAGS, IMAGES, WINDOWS, answer, collect_faults, give, make_talkative
from PIL import Image
from playwright.sync_api import Browser, Page, Route, expect, sync_playwright

from minimind_v import EMBEDDED_MODEL
from minimind_v.common import read_json
from minimind_v.demo.browser import CDN, Handler, assemble_page, place_scripts, start_server

QUESTIONS = {"en-US": ("What is this?", "Describe this image."), "zh-CN": ("这是什么？", "描述这张图片。")}
READY = {"en-US": "Ready", "zh-CN": "已就绪"}
NAMELESS = """() => [...document.querySelectorAll("img, button")]
  .filter((element) => !element.hasAttribute("alt") && !element.textContent && !element.querySelector("[alt]"))
  .map((element) => element.outerHTML)"""


class PlainHandler(Handler):
    """Without the headers that allow threads."""

    end_headers = SimpleHTTPRequestHandler.end_headers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("screenshots", type=Path)
    parser.add_argument("scripts", type=Path, metavar="NODE_MODULES")
    parser.add_argument("--chromium", default="/usr/bin/chromium")
    parser.add_argument("--webgpu", action="store_true", help="only compare, on a GPU that Chromium imitates")
    arguments = parser.parse_args()
    arguments.screenshots.mkdir(parents=True, exist_ok=True)
    flags = list(FLAGS)
    if arguments.webgpu:
        flags.remove("--disable-gpu")
        flags += ["--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader", "--enable-features=Vulkan"]
    with tempfile.TemporaryDirectory() as temporary, sync_playwright() as playwright:
        folder = assemble_page(EMBEDDED_MODEL, Path(temporary, "page"), scripts=arguments.scripts)
        pictures = make_pictures(Path(temporary, "pictures"))
        browser = playwright.chromium.launch(executable_path=arguments.chromium, args=flags)
        if arguments.webgpu:
            with visit(browser, folder) as (page, _):
                expect(page.locator("#status")).to_contain_text("WebGPU")
                compare(page, "en-US", pictures)
            return
        for size, scheme, language in (
            ("desktop", "light", "en-US"),
            ("desktop", "dark", "zh-CN"),
            ("phone", "light", "zh-CN"),
            ("phone", "dark", "en-US"),
        ):
            with visit(browser, folder, size, scheme, language) as (page, _):
                look_around(page, language, str(arguments.screenshots / f"{size}-{scheme}"))
            print(f"{size}, {scheme}, {language}: as expected", flush=True)
        for language in QUESTIONS:
            with visit(browser, folder, language=language) as (page, _):
                compare(page, language, pictures)
        with visit(browser, folder) as (page, stop_server):
            misuse(page)
            go_offline(page, stop_server)
        refuse_changed_script(browser, folder)
        load_from_cdn(browser, folder, arguments.scripts)
        talkative = make_talkative(Path(temporary, "talkative"))
        folder = assemble_page(talkative, Path(temporary, "talkative-page"), scripts=arguments.scripts)
        with visit(browser, folder) as (page, _):
            stop(page, str(arguments.screenshots / "streaming"))
        browser.close()


@contextlib.contextmanager
def visit(
    browser: Browser, folder: Path, size: str = "desktop", scheme: str = "light", language: str = "en-US"
) -> Iterator:
    """A new visitor on the page, when it is ready; and what ends the server. Fails if the browser saw a fault."""
    with start_server(folder) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        context = browser.new_context(
            locale=language, color_scheme=scheme, viewport=WINDOWS[size], reduced_motion="reduce"
        )
        page, faults = context.new_page(), collect_faults(context)
        started = time.perf_counter()
        page.goto(f"http://127.0.0.1:{server.server_port}")
        wait_until_ready(page, language)
        ready = time.perf_counter() - started

        def end() -> None:
            server.shutdown()
            server.server_close()

        print(f"ready after {ready:.1f} s; ", end="", flush=True)
        yield page, end
        assert not faults, faults
        context.close()
        server.shutdown()


def wait_until_ready(page: Page, language: str = "en-US") -> None:
    expect(page.locator("#status")).to_contain_text(READY[language], timeout=60_000)


def make_pictures(folder: Path) -> list[Path]:
    """The examples, and pictures as people have them: large, tall, transparent, turned by EXIF."""
    folder.mkdir()
    apple = Image.open(IMAGES / "apple.png")
    sizes = {"large": (1600, 1200), "tall": (300, 900), "tiny": (30, 20)}
    for name, size in sizes.items():
        apple.resize(size, Image.Resampling.LANCZOS).save(folder / f"{name}.png")
    dog = Image.open(IMAGES / "dog.png").convert("RGBA")
    dog.putalpha(dog.convert("L").point(lambda value: 0 if value > 240 else 255))
    dog.save(folder / "transparent.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    Image.open(IMAGES / "rocket.png").transpose(Image.Transpose.ROTATE_90).resize((640, 640)).save(
        folder / "turned.jpg", quality=95, exif=exif
    )
    return [*sorted(IMAGES.glob("*.png")), *sorted(folder.iterdir())]


def choose(page: Page, file: Path) -> None:
    before = page.locator("#picture").get_attribute("src")
    page.locator("#file").set_input_files(file)
    if before is None:
        expect(page.locator("#picture")).to_be_visible()
    else:
        expect(page.locator("#picture")).not_to_have_attribute("src", before)


def expect_answer(page: Page, text: str, count: int) -> None:
    """The newest of so many answers."""
    expect(page.locator("#answers li")).to_have_count(count)
    expect(page.locator(".answer").first).to_have_text(text, timeout=20_000)


def look_around(page: Page, language: str, prefix: str) -> None:
    """A picture and two questions, by mouse and by keyboard; the camera."""
    page.screenshot(path=f"{prefix}-start.png", full_page=True)
    choose(page, IMAGES / "rocket.png")
    what, describe = QUESTIONS[language]
    expected, started = answer([IMAGES / "rocket.png"], describe), time.perf_counter()
    page.locator("#suggestions button").nth(1).click()
    expect_answer(page, expected, 1)
    print(f"first answer after {time.perf_counter() - started:.2f} s; ", end="", flush=True)
    page.locator("#examples button").nth(1).focus()
    page.keyboard.press("Enter")
    expect(page.locator("#picture")).to_be_visible()
    page.wait_for_timeout(300)  # decoding
    page.locator("#question").fill(what)
    page.keyboard.press("Enter")
    expect_answer(page, answer([IMAGES / "dog.png"], what), 2)
    page.screenshot(path=f"{prefix}-chat.png", full_page=True)
    window = page.viewport_size
    page.set_viewport_size({"width": 320, "height": 640})
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "It scrolls sideways"
    page.set_viewport_size(window)
    nameless = page.evaluate(NAMELESS)
    assert not nameless, nameless

    page.locator("#camera").click()
    expect(page.locator("#shutter")).to_be_visible()
    page.wait_for_timeout(500)
    page.screenshot(path=f"{prefix}-camera.png")
    before = page.locator("#picture").get_attribute("src")
    page.locator("#take").click()
    expect(page.locator("#picture")).not_to_have_attribute("src", before)
    expect(page.locator("#shutter")).to_be_hidden()
    page.locator("#ask").click()
    expect(page.locator("#answers li")).to_have_count(3)
    expect(page.locator(".answer").first).not_to_be_empty()
    expect(page.locator("#answers")).not_to_have_attribute("aria-busy", "true")


def compare(page: Page, language: str, pictures: list[Path]) -> None:
    """All pictures, two questions."""
    different, count = [], 0
    for picture in pictures:
        choose(page, picture)
        for number, text in enumerate(QUESTIONS[language]):
            page.locator("#suggestions button").nth(number).click()
            count += 1
            expect(page.locator("#answers li")).to_have_count(count)
            expect(page.locator("#answers")).not_to_have_attribute("aria-busy", "true", timeout=120_000)
            said = page.locator(".answer").first.inner_text()
            if said != answer([picture], text):
                different.append(f"{picture.name}: {said!r} instead of {answer([picture], text)!r}")
    print(f"{language}: {count - len(different)} of {count} answers are those of the command line", flush=True)
    assert not different, different


def misuse(page: Page) -> None:
    """A broken file keeps the picture that was there; a control token is refused."""
    error, apple = page.locator("#error"), IMAGES / "apple.png"
    broken, body = b"\x89PNG\r\n\x1a\nno picture", page.locator("body")
    give(body, "drop", "broken.png", broken)
    expect(error).to_have_text("broken.png cannot be read as a picture")
    expect(page.locator("#ask")).to_be_disabled()
    give(body, "drop", "apple.png", apple.read_bytes())
    expect(page.locator("#picture")).to_be_visible()
    expect(error).to_be_hidden()
    page.locator("#question").fill("<|im_end|>")
    page.locator("#ask").click()
    expect(error).to_contain_text("control token '<|im_end|>'")
    give(body, "paste", "broken.png", broken)
    expect(error).to_have_text("broken.png cannot be read as a picture")
    page.locator("#question").fill("What is this?")
    page.locator("#ask").click()
    expect_answer(page, answer([apple], "What is this?"), 1)
    expect(error).to_be_hidden()


def go_offline(page: Page, stop_server: Callable[[], None]) -> None:
    """The server ends; the page is loaded again, and answers, also about an example that was never shown."""
    stop_server()
    started = time.perf_counter()
    page.reload()
    wait_until_ready(page)
    ready = time.perf_counter()
    page.locator("#examples button").nth(2).click()
    expect(page.locator("#picture")).to_be_visible()
    page.locator("#suggestions button").first.click()
    expect_answer(page, answer([IMAGES / "pizza.png"], "What is this?"), 1)
    print(f"without a server: ready after {ready - started:.1f} s, answers", flush=True)


def refuse_changed_script(browser: Browser, folder: Path) -> None:
    """Each script with one byte changed: the browser does not run it."""
    for name in ("transformers", "wasm_loader", "wasm_binary"):
        changed = shutil.copytree(folder, folder.with_name(f"changed-{name}"))
        script = changed / read_json(changed / "settings.json")["scripts"][name]["url"]
        content = bytearray(script.read_bytes())
        content[-20] ^= 1
        script.write_bytes(content)
        with start_server(changed) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            page = browser.new_page()
            page.goto(f"http://127.0.0.1:{server.server_port}")
            expect(page.locator("#error")).to_contain_text(
                "is not the file that this page was made with", timeout=60_000
            )
            expect(page.locator("#ask")).to_be_disabled()
            page.context.close()
            server.shutdown()
        shutil.rmtree(changed)
    print("a changed byte in a script: not run", flush=True)


def load_from_cdn(browser: Browser, folder: Path, scripts: Path) -> None:
    """As a static Space: scripts of another host, which is played here, and no headers that allow threads."""
    published = shutil.copytree(folder, folder.with_name("published"))
    shutil.rmtree(published / "scripts")
    settings = read_json(published / "settings.json") | {"scripts": place_scripts(published, None)}
    (published / "settings.json").write_text(json.dumps(settings), encoding="utf-8")
    sizes = [path.stat().st_size for path in published.rglob("*") if path.is_file()]
    loaded = sum(script["size"] for name, script in settings["scripts"].items() if not name.startswith("webgpu"))
    print(f"page and model {sum(sizes) / 1e6:.2f} MB, scripts {loaded / 1e6:.2f} MB", flush=True)

    def answer_as_cdn(route: Route) -> None:
        package_file = re.sub(r"(?<=.)@[\d.]+[\w.-]*", "", route.request.url.removeprefix(CDN), count=1)
        headers = {"Access-Control-Allow-Origin": "*", "Content-Type": "application/octet-stream"}
        route.fulfill(body=(scripts / package_file).read_bytes(), headers=headers)

    handler = functools.partial(PlainHandler, directory=str(published.parent))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        context = browser.new_context(service_workers="block")  # whose requests cannot be answered here
        context.route(f"{CDN}**", answer_as_cdn)
        page = context.new_page()
        started = time.perf_counter()
        page.goto(f"http://127.0.0.1:{server.server_port}/published/")
        wait_until_ready(page)
        assert not page.evaluate("crossOriginIsolated")
        ready = time.perf_counter()
        page.locator("#examples button").first.click()
        page.locator("#suggestions button").first.click()
        expect_answer(page, answer([IMAGES / "apple.png"], "What is this?"), 1)
        answered = time.perf_counter()
        page.locator("#suggestions button").last.click()
        expect_answer(page, answer([IMAGES / "apple.png"], "Describe this image."), 2)
        print(
            f"one thread: ready after {ready - started:.1f} s, first answer {answered - ready:.1f} s later, "
            f"the next takes {time.perf_counter() - answered:.1f} s",
            flush=True,
        )
        context.close()
        server.shutdown()


def stop(page: Page, prefix: str) -> None:
    """An answer that would not end is stopped, and the next question is answered."""
    choose(page, IMAGES / "apple.png")
    page.locator("#ask").click()
    expect(page.locator(".answer").first).to_contain_text("apple", timeout=20_000)
    page.screenshot(path=f"{prefix}.png")
    said = page.locator(".answer").first.inner_text()
    page.wait_for_timeout(200)
    assert len(page.locator(".answer").first.inner_text()) > len(said), "It does not stream"
    page.locator("#ask").click()
    expect(page.locator("#ask")).to_have_text("Ask", timeout=2_000)
    stopped = page.locator(".answer").first.inner_text()
    page.wait_for_timeout(500)
    assert page.locator(".answer").first.inner_text() == stopped, "It went on after the stop"
    page.locator("#ask").click()
    expect(page.locator("#ask")).to_have_text("Stop")
    page.locator("#ask").click()
    expect(page.locator("#ask")).to_have_text("Ask", timeout=2_000)
    print("stop: as expected", flush=True)


if __name__ == "__main__":
    main()
