"""A static Space of the Hub: the page whose visitors' browsers run the model. Assemble, verify, upload."""

from functools import partial
from pathlib import Path

from ..common import read_json
from ..demo import EXAMPLES
from ..demo.browser import assemble_page
from .assemble import clear_disk_errors
from .checks import Check
from .space import begin_report, check_replaceable, publish_space, write_space_card
from .verify import Report

CARD = """
# {title}

{mark}
Ask {name} about your own pictures. It runs in your browser, which loads it once: no picture leaves your device.

A model of this size knows little, and can be wrong and sound sure: do not let it decide anything about people.

The page is `minimind-v demo --browser` of MiniMind-V for transformers. Its scripts, transformers.js and ONNX Runtime,
come from cdn.jsdelivr.net, and run only if their hashes are those in `settings.json`.
"""


def assemble_static_space(model: str | Path, output: str | Path, *, repo_id: str, license: str = "apache-2.0") -> Path:
    """Writes all that the Space will hold into a folder: page, exported model, card.

    Arguments and result are those of [`assemble_space`].

    Raises:
        FileExistsError: The output exists and was not assembled.
        ImportError, OSError, ValueError: As [`assemble_page`].
    """
    output = Path(output).expanduser()
    check_replaceable(output)
    with clear_disk_errors(output):
        assemble_page(model, output, overwrite=True)
        name = read_json(output / "settings.json")["model"]["name"]
        metadata = {"sdk": "static", "license": license}
        write_space_card(output, CARD, repo_id, name, metadata, is_local=Path(model).exists())
    return output


def verify_static_space(folder: str | Path) -> Report:
    """Asks the model of the folder about a picture with ONNX Runtime, and looks into all files.

    Args:
        folder: What [`assemble_static_space`] wrote.

    Returns:
        A report, as of [`verify`].
    """
    folder = Path(folder)
    model = folder / read_json(folder / "settings.json")["model"]["folder"]
    report = begin_report(folder, model)
    try:
        from ..export.onnxruntime_chat import Chat  # of the extra

        pieces = Chat(model).ask("What is this?", [folder / "examples" / f"{EXAMPLES[0]}.png"])
        report.checks.append(Check("model", True, f"answers {''.join(pieces)!r:.60}"))
    except Exception as error:  # of whatever kind: it is not to be uploaded
        report.checks.append(Check("model", False, f"does not answer: {error}"))
    return report


publish_static_space = partial(publish_space, sdk="static", assemble=assemble_static_space, verify=verify_static_space)
