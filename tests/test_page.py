"""The page that runs a model in the browser, without one. (page_in_browser.py has one.)"""

import json
import os
import re
import threading
import urllib.request
from http.client import HTTPConnection
from pathlib import Path

import pytest
from conftest import CHECKPOINT, REPOSITORY

from minimind_v.common import read_json
from minimind_v.demo.browser import (
    BROWSER,
    CDN,
    EXAMPLES,
    PAGE,
    assemble_page,
    integrity,
    place_scripts,
    serve_page,
    start_server,
)
from minimind_v_cli.__main__ import main

NODE_MODULES = os.environ.get("NODE_MODULES")  # of npm install @huggingface/transformers


@pytest.fixture
def server(tmp_path):
    (tmp_path / "page" / "sub").mkdir(parents=True)
    for name in ("index.html", "page.js", "a.mjs", "a.wasm", "a.onnx", "sub/a.json"):
        (tmp_path / "page" / name).write_text(name)
    (tmp_path / "secret").write_text("secret")
    with start_server(tmp_path / "page") as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def test_page_is_whole():
    """What its files name is there, and the lists of files name all."""
    assert {path.name for path in BROWSER.iterdir()} == {*PAGE, "scripts.json"}
    texts = {name: (BROWSER / name).read_text(encoding="utf-8") for name in PAGE}
    named = set(re.findall(r'(?:href|src)="([\w.-]+)"', texts["index.html"]))
    named |= set(re.findall(r'"(?:\./)?([\w-]+\.js)"', texts["page.js"] + texts["worker.js"]))
    assert named == {*PAGE} - {"index.html"}
    kept = re.search(r"PAGE = \[(.*)\]", texts["service-worker.js"])[1]
    assert set(re.findall(r'"([\w.-]+\.\w+)"', kept)) == {*PAGE, "settings.json"} - {"index.html", "service-worker.js"}
    for name in EXAMPLES:
        assert f'"{name}"' in texts["service-worker.js"] and len(re.findall(rf"\b{name}: ", texts["page.js"])) == 2


def test_page_speaks_both_languages_of_everything():
    script = (BROWSER / "page.js").read_text(encoding="utf-8")
    english, chinese = (re.findall(r"^    (\w+):", part, re.MULTILINE) for part in re.split(r"\n  zh: ", script)[:2])
    assert english == chinese and {"about", "ask", "stop"} < {*english}
    page = (BROWSER / "index.html").read_text(encoding="utf-8")
    assert set(re.findall(r'data-words="(\w+)"', page)) <= {*english}


def test_scripts_of_the_cdn_have_versions_and_hashes(tmp_path):
    addresses = place_scripts(tmp_path, None)
    assert addresses.keys() == {
        "transformers",
        *(f"{d}_{p}" for d in ("wasm", "webgpu") for p in ("loader", "binary")),
    }
    for script in addresses.values():
        assert re.fullmatch(re.escape(CDN) + r"(@\w+/)?[\w-]+@\d[\w.-]+/dist/[\w.-]+", script["url"])
        assert re.fullmatch(r"sha384-[\w+/]{64}", script["integrity"])
    assert not any(tmp_path.iterdir())
    loaded = sum(script["size"] for name, script in addresses.items() if not name.startswith("webgpu"))
    assert loaded < 15e6, "With a model of 5 MB, the page would be larger than 20 MB"


@pytest.mark.skipif(NODE_MODULES is None, reason="NODE_MODULES does not name the folder of npm")
def test_scripts_are_those_of_npm(tmp_path):
    for script in place_scripts(tmp_path, NODE_MODULES).values():
        file = tmp_path / script["url"]
        assert integrity(file) == script["integrity"] and file.stat().st_size == script["size"]


def test_missing_and_changed_scripts_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"npm install @huggingface/transformers"):
        place_scripts(tmp_path / "page", tmp_path)
    script = read_json(BROWSER / "scripts.json")["transformers"]
    file = tmp_path / script["package"] / script["file"]
    file.parent.mkdir(parents=True)
    file.write_bytes(b"changed")
    with pytest.raises(ValueError, match=r"is not of @huggingface/transformers 4\.3\.1\. Install that version"):
        place_scripts(tmp_path / "page", tmp_path)


def test_assembled_page(tmp_path):
    pytest.importorskip("onnxscript", reason="the extra export is not installed")
    pytest.importorskip("onnxruntime", reason="the extra export is not installed")
    page = assemble_page(CHECKPOINT, tmp_path / "page")
    settings = read_json(page / "settings.json")
    model = page / settings["model"]["folder"]
    sizes = [path.stat().st_size for path in model.rglob("*") if path.is_file()]
    assert settings["model"]["name"] == CHECKPOINT.name and settings["model"]["size"] == sum(sizes)
    assert re.fullmatch(r"model-[0-9a-f]{12}", model.name) and (model / "onnx" / "vision_encoder_q4.onnx").exists()
    assert {path.name for path in page.iterdir()} == {*PAGE, "settings.json", "examples", model.name}
    total = sum(path.stat().st_size for path in page.rglob("*") if path.is_file())
    scripts = {name: script["size"] for name, script in settings["scripts"].items() if not name.startswith("webgpu")}
    assert total + sum(scripts.values()) < 20e6
    with pytest.raises(FileExistsError):
        assemble_page(CHECKPOINT, page)


def test_text_only_model_is_refused(tmp_path):
    (tmp_path / "text").mkdir()
    code = {"AutoConfig": "configuration_minimind_v.MiniMindConfig"}
    config = json.dumps({"model_type": "minimind", "auto_map": code})
    (tmp_path / "text" / "config.json").write_text(config)
    with pytest.raises(ValueError, match="'minimind', which sees no pictures"):
        assemble_page(tmp_path / "text", tmp_path / "page")


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/", "text/html; charset=utf-8"),
        ("/page.js", "text/javascript; charset=utf-8"),
        ("/a.mjs", "text/javascript; charset=utf-8"),
        ("/a.wasm", "application/wasm"),
        ("/a.onnx", "application/octet-stream"),
        ("/sub/a.json", "application/json"),
    ],
)
def test_server_says_what_files_are(server, path, kind):
    with urllib.request.urlopen(f"http://127.0.0.1:{server.server_port}{path}", timeout=10) as response:
        assert response.headers["Content-Type"] == kind
        assert response.headers["Cross-Origin-Embedder-Policy"] == "require-corp"
        assert response.headers["Cross-Origin-Opener-Policy"] == "same-origin"


@pytest.mark.parametrize("path", ["/../secret", "/%2e%2e/secret", "/sub/..%2f..%2fsecret", "//secret", "/sub/", "/no"])
def test_server_shows_nothing_else(server, path):
    connection = HTTPConnection("127.0.0.1", server.server_port, timeout=10)
    connection.request("GET", path)  # as it is: urllib would tidy it up
    response = connection.getresponse()
    assert response.status == 404 and b"secret" not in response.read().replace(path.encode(), b"")


def test_taken_port(server):
    with pytest.raises(OSError, match=rf"Port {server.server_port} is taken\. Name another one with --port\."):
        start_server(REPOSITORY, server.server_port)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--browser", "--share"], "leave out the other options"),
        (["--browser", str(CHECKPOINT), str(REPOSITORY)], "--browser shows one model; got 2"),
        (["--scripts", "node_modules"], "--scripts is an option of --browser: add it"),
    ],
)
def test_options_that_contradict_each_other(arguments, message, capsys):
    with pytest.raises(SystemExit) as end:
        main(["demo", *arguments])
    assert end.value.code == 2 and message in capsys.readouterr().err


def test_command(monkeypatch):
    called = []
    monkeypatch.setattr(
        "minimind_v.demo.browser.serve_page", lambda *models, **options: called.append((models, options))
    )
    main(["demo", "--browser", str(CHECKPOINT), "--port", "8000", "--scripts", "node_modules"])
    main(["demo", "--browser"])
    assert called == [
        ((str(CHECKPOINT),), {"port": 8000, "scripts": "node_modules"}),
        ((), {"port": None, "scripts": None}),
    ]


def test_serve_page_ends_with_nothing_left(monkeypatch, capsys):
    """Ctrl-C while it serves: the folder of the page is gone."""
    folders = []

    def assemble(model, output, *, scripts):
        Path(output).mkdir()
        folders.append(Path(output))
        return output

    def interrupt(server):
        raise KeyboardInterrupt

    monkeypatch.setattr("minimind_v.demo.browser.assemble_page", assemble)
    monkeypatch.setattr("minimind_v.demo.browser.ThreadingHTTPServer.serve_forever", interrupt)
    with pytest.raises(KeyboardInterrupt):
        serve_page()
    assert re.search(r"The page is on http://127\.0\.0\.1:\d+ \(Ctrl-C ends it\)", capsys.readouterr().out)
    assert not folders[0].exists()
