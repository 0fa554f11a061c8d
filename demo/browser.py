"""The page that runs a model in the browser: its files, the exported model, and a server for this machine.

The page itself is in `browser/`: `page.js` is what one sees, `worker.js` answers, `service-worker.js` keeps all for
use without a network. Its scripts, transformers.js and ONNX Runtime, are npm packages in the versions of
`scripts.json`, whose hashes the browser checks wherever they come from.
"""

import base64
import contextlib
import hashlib
import json
import shutil
import tempfile
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from .. import EMBEDDED_MODEL
from ..common import atomic_output, read_json, read_model_type
from ..conversion import convert_once
from ..export import export_web
from . import EXAMPLES, IMAGES

BROWSER = Path(__file__).with_name("browser")
PAGE = ("index.html", "style.css", "page.js", "worker.js", "picture.js", "service-worker.js")
CDN = "https://cdn.jsdelivr.net/npm/"
PRECISION = "int4"  # the smallest; its matrices have a kernel on GPUs, too
PORTS = range(7860, 7960)


def assemble_page(
    model: str | Path, output: str | Path, *, scripts: str | Path | None = None, overwrite: bool = False
) -> Path:
    """Writes a folder that any web server can show: page, model and examples, and the scripts or their addresses.

    Args:
        model: Checkpoint folder or Hub repository with a tower, also of the original.
        output: Folder to write.
        scripts: `node_modules` folder whose scripts are copied; left out, the page loads them from a CDN.
        overwrite: Replace an existing folder.

    Returns:
        The output folder.

    Raises:
        FileExistsError: The output exists and is not empty.
        FileNotFoundError: The folder of scripts lacks one.
        ImportError: What exports need is not installed.
        ValueError: A script is not the one that the page was made with, or the model cannot be exported.
    """
    checkpoint = convert_once(str(model))
    if (kind := read_model_type(checkpoint)) != "minimind_v":
        raise ValueError(f"{model} is of model_type {kind!r}, which sees no pictures. Name a vision-language model.")
    with atomic_output(Path(output).expanduser(), overwrite) as folder:
        (folder / "examples").mkdir(parents=True)
        for name in PAGE:
            shutil.copyfile(BROWSER / name, folder / name)
        for name in EXAMPLES:
            shutil.copyfile(IMAGES / f"{name}.png", folder / "examples" / f"{name}.png")
        addresses = place_scripts(folder, scripts)
        export_web(checkpoint, folder / "model", precision=PRECISION)
        files = sorted(path for path in (folder / "model").rglob("*") if path.is_file())
        # Browsers keep the model by its address, so a new one needs a new one
        digest = hashlib.sha256(b"".join(hashlib.sha256(path.read_bytes()).digest() for path in files)).hexdigest()
        size = sum(path.stat().st_size for path in files)
        (folder / "model").rename(folder / f"model-{digest[:12]}")
        name = Path(model).resolve().name if Path(model).exists() else str(model)
        settings = {
            "model": {"name": name, "folder": f"model-{digest[:12]}", "size": size},
            "scripts": addresses,
        }
        (folder / "settings.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    return Path(output)


def place_scripts(folder: Path, source: str | Path | None) -> dict[str, dict[str, Any]]:
    """Copies the scripts from a `node_modules` folder, if there is one.

    Returns:
        Address, size in bytes and hash of each script, as `settings.json` has them.
    """
    addresses = {}
    for name, script in read_json(BROWSER / "scripts.json").items():
        path = f"{script['package']}@{script['version']}/{script['file']}"
        if source is not None:
            found = Path(source).expanduser() / script["package"] / script["file"]
            if not found.is_file():
                raise FileNotFoundError(
                    f"{found} does not exist. Name the node_modules folder of: npm install @huggingface/transformers"
                )
            if integrity(found) != script["integrity"]:
                raise ValueError(f"{found} is not of {script['package']} {script['version']}. Install that version.")
            target = folder / "scripts" / path
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(found, target)
        address = ("scripts/" if source is not None else CDN) + path
        addresses[name] = {"url": address, "size": script["size"], "integrity": script["integrity"]}
    return addresses


def integrity(path: Path) -> str:
    """The hash of a file, as browsers check it."""
    return "sha384-" + base64.b64encode(hashlib.sha384(path.read_bytes()).digest()).decode()


class Handler(SimpleHTTPRequestHandler):
    """Files of one folder, which are asked for anew at each visit."""

    # Not what this machine says, which on Windows may be wrong
    extensions_map = {
        "": "application/octet-stream",
        ".css": "text/css; charset=utf-8",
        ".html": "text/html; charset=utf-8",
        ".js": "text/javascript; charset=utf-8",
        ".json": "application/json",
        ".mjs": "text/javascript; charset=utf-8",
        ".png": "image/png",
        ".wasm": "application/wasm",
    }

    def end_headers(self) -> None:
        self.send_header("Cache-Control", "no-cache")
        # With these two, a browser lets the page use several threads
        self.send_header("Cross-Origin-Opener-Policy", "same-origin")
        self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
        super().end_headers()

    def copyfile(self, source: Any, outputfile: Any) -> None:
        with contextlib.suppress(ConnectionError):  # a visitor who leaves while the page loads
            super().copyfile(source, outputfile)

    def list_directory(self, path: Any) -> None:
        self.send_error(404)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the terminal is the user's."""


def start_server(folder: Path, port: int | None = None) -> ThreadingHTTPServer:
    """A server of a folder, which nobody but this machine reaches; its `serve_forever` is for the caller to run.

    Args:
        folder: What [`assemble_page`] wrote.
        port: Of 127.0.0.1; left out, the first free one from 7860 on.

    Raises:
        OSError: The port is taken.
    """
    for candidate in [port] if port is not None else PORTS:
        with contextlib.suppress(OSError):
            return ThreadingHTTPServer(("127.0.0.1", candidate), partial(Handler, directory=str(folder)))
    taken = f"Port {port} is" if port is not None else f"The ports {PORTS[0]} to {PORTS[-1]} are"
    raise OSError(f"{taken} taken. Name another one with --port.")


def serve_page(model: str | Path = EMBEDDED_MODEL, port: int | None = None, scripts: str | Path | None = None) -> None:
    """Exports a model, and shows the page until it is interrupted.

    Args:
        model, scripts: As for [`assemble_page`].
        port: As for [`start_server`].

    Raises:
        ValueError, OSError, ImportError: As [`start_server`] and [`assemble_page`].
    """
    with tempfile.TemporaryDirectory() as temporary:
        print(f"Exporting {model} for the browser", flush=True)
        folder = assemble_page(model, Path(temporary, "page"), scripts=scripts)
        with start_server(folder, port) as server:
            print(f"The page is on http://127.0.0.1:{server.server_port} (Ctrl-C ends it)", flush=True)
            server.serve_forever()
