"""The command `minimind-v` as people run it: on real pictures, with mistakes, interrupted, in a terminal."""

import contextlib
import dataclasses
import functools
import http.server
import inspect
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
import time
import weakref
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from conftest import CHECKPOINT, REPOSITORY, caption_row, write_jsonl
from PIL import Image
from test_readme import CAPTIONS, README
from transformers import TrainingArguments

import minimind_v
from minimind_v import MiniMindVForConditionalGeneration
from minimind_v.inference.captioning import caption_images, find_images
from minimind_v.inference.engine import DEFAULT_MAX_NEW_TOKENS, Engine, encode, question, store_column_major
from minimind_v.inference.records import FIELDS, read_records
from minimind_v.training.train import TrainArguments
from minimind_v_cli.__main__ import main

IMAGES = REPOSITORY / "examples" / "images"
COMMANDS = ["caption", "chat", "compare", "demo", "check", "train", "evaluate", "convert", "export", "upload"]
# Where this tree is not installed but only on the path, there is no script; then what the script would run.
SCRIPT, INSTALLED = shutil.which("minimind-v", path=Path(sys.executable).parent), find_spec("minimind_v_cli")
IS_THIS = SCRIPT and INSTALLED and Path(INSTALLED.origin).parent.samefile(REPOSITORY / "cli")
COMMAND = [SCRIPT] if IS_THIS else [sys.executable, str(REPOSITORY / "cli")]
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
OPTIONS = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "encoding": "utf-8", "env": ENVIRONMENT}


def run(*arguments):
    """Runs the command line in this process; returns the exit status, or the text that Python would print."""
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as end:
        return end.code
    return 0


def run_process(command, *arguments):
    return subprocess.run([*command, *map(str, arguments)], timeout=200, cwd=REPOSITORY, **OPTIONS)


def captions(path):
    return {os.path.basename(record["image"]): record["caption"] for record in read_records(path)}


# --- Without a model -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [None, *COMMANDS])
def test_help_has_an_example_and_does_not_wait_for_torch(name):
    command = [sys.executable, "-X", "importtime", REPOSITORY / "cli"]
    result = run_process(command, *([name] if name else []), "--help")
    assert result.returncode == 0 and result.stdout.startswith(f"usage: minimind-v {name or 'COMMAND'} ")
    assert re.search(rf"Examples:\n(.*\n)?  +minimind-v {name or 'caption'} \S", result.stdout)
    imported = {line.split("|")[-1].strip() for line in result.stderr.splitlines()}
    assert "argparse" in imported and not imported & {"torch", "transformers", "accelerate", "PIL", "minimind_v"}


def test_no_command_and_version(capsys):
    assert run() == 0 and re.findall(r"^    ([a-z]+) ", capsys.readouterr().out, re.MULTILINE) == COMMANDS
    assert run("--version") == 0 and capsys.readouterr().out == f"minimind-v {minimind_v.__version__}\n"


def test_help_tells_the_defaults_of_answers(capsys):
    assert run("chat", "--help") == 0
    shown = " ".join(capsys.readouterr().out.split())
    parameters = inspect.signature(Engine).parameters
    for name in ("temperature", "top_p", "top_k"):
        assert re.search(rf"--{name.replace('_', '-')} \S+ [^-]*\(default: {parameters[name].default}\)", shown)
    assert f"or else {DEFAULT_MAX_NEW_TOKENS})" in shown
    listed = {option.replace("-", "_") for option in re.findall(r" --([\w-]+)", shown.partition("how to answer:")[2])}
    assert listed - {"sample", "no_thinking", "image"} == parameters.keys()


def test_help_of_train_lists_options_that_exist(capsys):
    assert run("train", "--help") == 0
    listed = {name.replace("-", "_") for name in re.findall(r"^  --([\w-]+)", capsys.readouterr().out, re.MULTILINE)}
    fields, library = ({field.name for field in dataclasses.fields(c)} for c in (TrainArguments, TrainingArguments))
    assert fields - library <= listed and listed - {"help_all"} <= fields


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--verison chat", "unrecognized argument --verison (did you mean --version?). See minimind-v --help."),
        ("captoin x.png", "invalid choice: 'captoin' (choose from "),
        ("caption", "the following arguments are required: IMAGE. See minimind-v caption --help."),
        ("chat --imag x", "unrecognized argument --imag (did you mean --image?). See minimind-v chat --help."),
        ("caption x.png --top-p 2", "argument --top-p: 2 is not from 0 to 1. See minimind-v caption --help."),
        ("caption x.png --top-k 0", "argument --top-k: 0 is not at least 1."),
        ("caption x.png --top-k 1.5", "argument --top-k: invalid int value: '1.5'."),
        ("compare a b --greedy --top-p 0.5", "--greedy draws nothing, so --top-p has no effect: leave out one of "),
        ("caption x.png --max-image-pixels 0", "argument --max-image-pixels: 0 is not at least 1."),
        ("chat --model no-folder", "argument --model: no-folder is neither a folder nor USER/REPO of the Hub."),
        ("convert a.pth b --relase x", "(did you mean --release?). See minimind-v convert --help."),
        ("upload my-model", "the following arguments are required: USER/REPO."),
    ],
)
def test_mistyped_commands_get_one_line(arguments, message, capsys):
    assert run(*arguments.split()) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and message in err


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        (
            ["caption", "x.png", "--model", "."],
            ValueError,
            r"\. has no config\.json with a model_type\. Name a checkpoint",
        ),
        (["caption", "."], FileNotFoundError, "No pictures were found for .* Name files, folders, patterns or"),
        (["train", "--model", str(CHECKPOINT), "--data", "."], FileNotFoundError, ".*metadata.jsonl does not exist"),
    ],
)
def test_errors_are_one_line_unless_debugged(arguments, error, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert re.match(rf"error: {message}.* \(--debug at the end shows where\.\)$", run(*arguments))
    with pytest.raises(error, match=message):
        main([*arguments, "--debug"])


def test_finding_images(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("b.PNG", "a.jpg", "a.txt", "a.eps", "a.pdf", ".hidden.png", "sub/c.webp", "odd[1].png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert find_images(["."]) == ["./a.jpg", "./b.PNG", "./odd[1].png", "./sub/c.webp"]
    url = "https://example.org/picture?id=[1]*"
    assert find_images(["odd[1].png", "*.PNG", "b.PNG", "none.png", url]) == ["odd[1].png", "b.PNG", "none.png", url]
    with pytest.raises(FileNotFoundError, match=r"for \*\.gif\. Name"):
        find_images(["a.jpg", "*.gif"])


@pytest.mark.parametrize(
    "content", [b"precious", b"precious\n", b'{"image": "a.png"}\n', b"\x89PNG\r\n\x1a\n", b"[]\n{"]
)
def test_output_that_is_something_else_is_left_as_it_is(content, tmp_path):
    path = tmp_path / "notes.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"notes\.txt holds something else than captions and is left as it is"):
        caption_images([str(IMAGES / "dog.png")], "What is this?", path)
    assert path.read_bytes() == content


# --- Answers ---------------------------------------------------------------------------------------------------------


def test_column_major_weights_keep_their_values(tmp_path):
    model = MiniMindVForConditionalGeneration.from_pretrained(CHECKPOINT, dtype=torch.float32)
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    ids = torch.arange(100, 120).view(1, -1)
    with torch.no_grad():
        logits = model(ids).logits
        store_column_major(model)
        torch.testing.assert_close(model(ids).logits, logits, atol=1e-5, rtol=1e-5)
    assert model.model.language_model.layers[0].mlp.up_proj.weight.stride(0) == model.lm_head.weight.stride(0) == 1
    assert not any(parameter.requires_grad for parameter in model.parameters())
    model.save_pretrained(tmp_path)
    loaded = MiniMindVForConditionalGeneration.from_pretrained(tmp_path).state_dict()
    assert loaded.keys() == weights.keys() and all(torch.equal(loaded[name], weights[name]) for name in weights)


@pytest.mark.filterwarnings("error")
def test_int8_captions_are_those_of_float32(capfd):
    engine = Engine(greedy=True, dtype="int8")
    images = sorted(IMAGES.glob("*.png"))
    chats = [[question([str(image)], "Describe this image.")] for image in images]
    assert engine.answer(encode(engine.processor, chats)) == [CAPTIONS[image.name][0] for image in images]
    assert "decoder 1.11M), cpu, float32, decoder int8" in capfd.readouterr().err
    layers = [engine.model.lm_head, engine.model.model.language_model.layers[0].mlp.up_proj]
    assert all(layer.weight().dtype == torch.qint8 for layer in layers)
    assert engine.model.model.multi_modal_projector.linear_1.weight.dtype == torch.float32


def test_options_reach_generate(capfd):
    engine = Engine(temperature=3.0, top_p=1.0, top_k=900, repetition_penalty=1.3, max_new_tokens=6, seed=1)
    images = sorted(map(str, IMAGES.glob("*.png")))
    chats = [[question([image], "What is this?")] for image in images]
    drawn = engine.answer(encode(engine.processor, chats))
    config = engine.model.generation_config
    assert (config.temperature, config.top_p, config.top_k, config.repetition_penalty) == (3, 1, 900, 1.3)
    assert engine.tokens <= 6 * len(chats)
    again = Engine(temperature=3.0, top_p=1.0, top_k=900, repetition_penalty=1.3, max_new_tokens=6, seed=1)
    assert again.answer(encode(again.processor, chats)) == drawn
    assert again.answer(encode(again.processor, chats)) != drawn

    greedy = Engine(greedy=True, dtype="bfloat16")
    assert str(greedy.model.dtype) == "torch.bfloat16"
    assert "minimind-v-emoji: 4.00M parameters (tower 2.82M, projector 0.07M, decoder 1.11M)" in capfd.readouterr().err
    # Rows of different lengths and numbers of images, padded on the left, answer as alone
    greedy.model.float()
    chats = [chats[0], [question([], "这是什么？")], [question(images[1:3], "What is in these two pictures?")]]
    alone = [greedy.answer(encode(greedy.processor, [chat]))[0] for chat in chats]
    assert alone[0] == CAPTIONS["apple.png"][0] and greedy.answer(encode(greedy.processor, chats)) == alone


@pytest.mark.parametrize("template", ["minimind3", "minimind2", None])
def test_thinking_switches_the_template(template, tmp_path):
    checkpoint = shutil.copytree(CHECKPOINT, tmp_path / "model")
    if template is None:
        with pytest.raises(ValueError, match="has no switch for thinking in its chat template"):
            Engine(str(checkpoint), thinking=True)
        return
    text = (REPOSITORY / "conversion" / "templates" / f"{template}.jinja").read_text(encoding="utf-8")
    (checkpoint / "chat_template.jinja").write_text(text, encoding="utf-8")
    ends = []
    for thinking in (True, False):
        engine = Engine(str(checkpoint), thinking=thinking)
        inputs = encode(engine.processor, [[question([], "Hello")]], engine.template_options)
        ends.append(engine.processor.decode(inputs["input_ids"][0]).rpartition("assistant\n")[2])
    assert ends == [{"minimind3": "<think>\n", "minimind2": ""}[template], "<think>\n\n</think>\n\n"]


# --- Captions --------------------------------------------------------------------------------------------------------


class SilentHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        """stderr is the command's."""


@contextlib.contextmanager
def served(folder):
    """A web server of this machine."""
    handler = functools.partial(SilentHandler, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_captions_go_on_after_an_interruption_and_past_broken_images(tmp_path, monkeypatch, capsys):
    for number in range(6):
        for image in IMAGES.glob("*.png"):
            shutil.copy(image, tmp_path / f"{number:02}-{image.name}")
    monkeypatch.chdir(tmp_path)
    output, options = Path("new", "captions.jsonl"), ["--output", "new/captions.jsonl", "--batch-size"]
    process = subprocess.Popen([*COMMAND, "caption", ".", *options, "1"], **OPTIONS)
    while process.poll() is None and not (output.exists() and output.stat().st_size > 1000):
        time.sleep(0.01)
    assert re.match(
        rf"error: {output} is being written by process {process.pid} on ", run("caption", ".", *options, 1)
    )
    process.kill()
    process.communicate()
    assert Path("new", ".captions.jsonl.lock").exists()  # of a dead process: no obstacle
    written = output.read_bytes().splitlines(keepends=True)
    assert 2 < len(written) < 6 * len(CAPTIONS)
    output.write_bytes(b"".join(written)[:-20])  # the last line half written

    Path("broken.png").write_text("not an image")
    with served(IMAGES) as url:
        more = ["missing.jpg", f"{url}/dog.png", f"{url}/none.png"]
        assert run("caption", ".", *more, *options, 5, "--workers", 1, "--allowed-hosts", "127.0.0.1") == 1
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert out == "" and len(lines) == 6
    assert lines[0] == f"{len(written) - 1} of {6 * len(CAPTIONS) + 4} pictures are in {output} already."
    assert lines[1].startswith("minimind-v-emoji: 4.00M parameters") and "tokens/s" in lines[5]
    for line, name in zip(lines[2:5], ("./broken.png", "missing.jpg", f"{url}/none.png"), strict=True):
        assert line.startswith(f"error: image ({name}) ")

    content = output.read_bytes()
    assert content.startswith(b"".join(written[:-1]))
    records = [json.loads(line) for line in content.decode().splitlines()]
    images = {f"./{number:02}-{name}": name for number in range(6) for name in sorted(CAPTIONS)}
    images[f"{url}/dog.png"] = "dog.png"
    common = ("Describe this image.", "minimind-v-emoji", "greedy")
    expected = [(image, *common, CAPTIONS[name][0]) for image, name in images.items()]
    assert records == [dict(zip(FIELDS, values, strict=True)) for values in expected]
    assert [path.name for path in output.parent.iterdir()] == [output.name]


# argv = a file of captions, lines. Writes into a part of it until it is killed.
PART_WRITER = """
import sys, time
from pathlib import Path
from minimind_v.common import locked
part = Path(sys.argv[1] + ".part-1")
with locked(part):
    part.write_text(sys.argv[2])
    print("begun", flush=True)
    time.sleep(60)
"""


def test_parts_of_a_living_run_are_not_touched(tmp_path):
    output, image = tmp_path / "captions.jsonl", str(IMAGES / "dog.png")
    record = dict(zip(FIELDS, (image, "What?", "minimind-v-emoji", "greedy", "A hot dog."), strict=True))
    line = json.dumps(record) + "\n"
    with subprocess.Popen([sys.executable, "-c", PART_WRITER, output, line], **OPTIONS) as process:
        assert process.stdout.readline() == "begun\n", process.stderr.read()
        with pytest.raises(BlockingIOError, match=rf"part-1 is being written by process {process.pid} on .* since 20"):
            caption_images([image], "What?", output, options={"greedy": True})
        assert (tmp_path / "captions.jsonl.part-1").read_text() == line and not output.exists()
        process.kill()
    caption_images([image], "What?", output, options={"greedy": True})  # what the killed process wrote is not lost
    assert output.read_text() == line and list(tmp_path.iterdir()) == [output]


def test_captions_of_other_options_are_made_again(tmp_path, capsys):
    output, images = tmp_path / "captions.jsonl", [str(IMAGES / name) for name in ("dog.png", "cat.png")]
    command = ["caption", *images, "--output", output]
    assert run(*command) == 0
    of_earlier_versions = [
        {name: value for name, value in record.items() if name != "options"} for record in read_records(output)
    ]
    write_jsonl(output, of_earlier_versions)
    with output.open("a") as file:
        file.write("\n")
    said = (
        f"{len(images)} captions in {output} were made with other options, or do not say with which: they stay there."
    )
    for options, name in (([], "greedy"), (["--max-new-tokens", "1"], "greedy, max_new_tokens=1")):
        before = read_records(output)
        capsys.readouterr()
        assert run(*command, *options) == 0
        assert capsys.readouterr().err.splitlines()[0] == said.replace("2", str(len(before)), 1)
        assert read_records(output)[: len(before)] == before
        assert [(r["image"], r["options"]) for r in read_records(output)[len(before) :]] == [(i, name) for i in images]
    for options in (["--greedy"], ["--max-new-tokens", "1", "--device", "cpu"]):
        assert run(*command, *options) == 0
        assert capsys.readouterr().err.splitlines() == [f"2 of 2 pictures are in {output} already."]


def test_one_image_of_a_batch_is_open_at_a_time(monkeypatch, tmp_path):
    opened, most = set(), 0
    convert = Image.Image.convert

    def count(image, *arguments, **options):
        nonlocal most
        result = convert(image, *arguments, **options)
        weakref.finalize(result, opened.discard, id(result))
        opened.add(id(result))
        most = max(most, len(opened))
        return result

    monkeypatch.setattr(Image.Image, "convert", count)
    caption_images(find_images([str(IMAGES)]), "What?", tmp_path / "captions.jsonl", 14, options={"greedy": True})
    assert 0 < most < 5


def test_two_processes_give_the_captions_of_one(tmp_path):
    images = find_images([str(IMAGES)])
    caption_images(images, "这是什么？", tmp_path / "one.jsonl", batch_size=8, options={"greedy": True})
    assert captions(tmp_path / "one.jsonl") == {name: chinese for name, (_, chinese) in CAPTIONS.items()}
    lines = (tmp_path / "one.jsonl").read_bytes().splitlines(keepends=True)
    # What three processes left behind
    (tmp_path / "two.jsonl").write_bytes(lines[5])
    (tmp_path / "two.jsonl.part-0").write_bytes(lines[1] + lines[2][:40])
    (tmp_path / "two.jsonl.part-2").write_bytes(b"")

    config = REPOSITORY / "examples" / "accelerate" / "ddp.yaml"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config, "--num_processes", "2"]
    command += ["--mixed_precision", "no", "--main_process_port", "0", "-m", "minimind_v_cli", "caption", IMAGES]
    options = ["--output", tmp_path / "two.jsonl", "--prompt", "这是什么？", "--batch-size", "2", "--device", "cpu"]
    result = run_process(command, *options)
    assert result.returncode == 0, result.stderr[-2000:]
    assert f"2 of {len(CAPTIONS)} pictures are in" in result.stderr and result.stderr.count("parameters") == 1
    assert (tmp_path / "two.jsonl").read_bytes() == b"".join(lines)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.jsonl", "two.jsonl"]


def test_limits_for_images_of_strangers(capsys):
    dog = IMAGES / "dog.png"
    with served(IMAGES) as url:
        host, address = "127.0.0.1", f"{url}/dog.png"
        for options, count in (
            (["--allowed-hosts", host], 1),
            (["--allowed-hosts", ""], 0),
            (["--allowed-hosts", "a.org,b.org"], 0),
        ):
            assert run("caption", address, *options) == 1 - count
            out, err = capsys.readouterr()
            assert len(out.splitlines()) == count and (count or f"error: image ({address}) " in err)
            compared = str(run("compare", dog, address, *options))
            assert compared == "0" if count else address in compared
            capsys.readouterr()
    assert run("caption", dog, "--max-image-pixels", 100) == 1
    assert f"error: image ({dog}) " in capsys.readouterr().err
    assert str(dog) in run("chat", "--image", dog, "--max-image-pixels", 100)
    assert str(dog) in run("compare", dog, dog, "--max-image-pixels", 100)


# --- Whole commands --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command", re.findall(r"^minimind-v ((?:caption|chat|compare) .*?)(?: +#.*)?$", README, re.MULTILINE)
)
def test_commands_of_the_readme(command, tmp_path, monkeypatch, capsys):
    (tmp_path / "examples").symlink_to(REPOSITORY / "examples")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.StringIO("What is this?\n"))
    assert run(*shlex.split(command)) == 0
    assert capsys.readouterr().out or captions(tmp_path / "captions.jsonl").keys() == CAPTIONS.keys()


def test_comparing_two_images(capsys):
    images = [str(IMAGES / name) for name in ("apple.png", "pizza.png")]
    assert run("compare", *images, "--prompt", "这是什么？") == 0
    engine = Engine(greedy=True)
    expected = engine.answer(encode(engine.processor, [[question(images, "这是什么？")]]))
    assert capsys.readouterr().out == expected[0] + "\n"


@pytest.mark.parametrize(
    "arguments, printed, status",
    [
        ("check rows.jsonl --preview 0", "row 0: image 0 of sample 0 (missing.png) is no file", "1"),
        ("train --help-all", "--lora_rank", "0"),
        ("convert missing.pth out --dtype float32", "", "error: missing.pth"),
        ("upload missing user/repo --dry-run", "", "error: missing is no folder."),
        ("export text user/missing out", "", "error: user/missing"),
    ],
)
def test_other_commands_run_their_tools(arguments, printed, status, tmp_path, monkeypatch, capsys):
    write_jsonl(tmp_path / "rows.jsonl", [caption_row("missing.png")])
    monkeypatch.chdir(tmp_path)
    assert str(run(*arguments.split())).startswith(status) and printed in capsys.readouterr().out


def test_hints_of_chat(monkeypatch, capsys):
    apple, pizza = (str(IMAGES / f"{name}.png") for name in ("apple", "pizza"))
    lines = [
        "What is this?",
        "And now?",
        f"/image {pizza}",
        "/reset",
        f"/image {pizza}",
        "这是什么？",
        f"/image {apple}",
    ]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
    assert run("chat", "--greedy") == 0
    out, err = capsys.readouterr()
    assert err.count("No picture was given: the model answers from the words alone. /image PATH adds one.") == 1
    assert err.count("Images for the next question: 1.") == 3
    # After the first picture of a conversation, and after /reset, there is no earlier one.
    assert err.count("/reset, then /image again.") == 1 and err.rstrip().endswith("/reset, then /image again.")
    assert CAPTIONS["pizza.png"][1] in out


@pytest.mark.parametrize("command", ["caption {image} --model {folder}", "upload {folder} user/repo --dry-run"])
@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_custom_code_is_neither_run_nor_asked_for(file, command, tmp_path, monkeypatch, capsys):
    folder = shutil.copytree(CHECKPOINT, tmp_path / "foreign")
    auto_map = {"AutoConfig": "foreign.Config", "AutoTokenizer": ["foreign.Tokenizer", None]}
    changes = {"auto_map": auto_map} | ({"model_type": "foreign"} if file == "config.json" else {})
    changes |= {"tokenizer_class": "Foreign"} if file != "config.json" else {}
    (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | changes))
    (folder / "foreign.py").write_text("raise SystemExit('it ran')")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asks"))
    status = run(*command.format(image=IMAGES / "dog.png", folder=folder).split())
    assert "it ran" not in str(status) and "trust_remote_code" not in "".join([str(status), *capsys.readouterr()])
    says = (
        "says 'foreign'|is a foreign model"
        if file == "config.json"
        else "needs code of its own, which is not run here"
    )
    assert re.match(rf"error: .*({says})", status) and "\n" not in status


@pytest.mark.skipif(not shutil.which("tmux"), reason="needs a terminal: install tmux")
def test_chat_in_a_terminal(tmp_path):
    def tmux(*arguments):
        return subprocess.check_output(["tmux", "-S", tmp_path / "tmux", *arguments], encoding="utf-8", cwd=REPOSITORY)

    def type_line(text, expected, count=1):
        """Types a line and returns the screen as soon as the text stands there so many times."""
        tmux("send-keys", "-t", "chat", "-l", text)
        tmux("send-keys", "-t", "chat", "Enter")
        return wait(expected, count)

    def wait(expected, count=1):
        deadline = time.monotonic() + 60
        while "status" not in (screen := tmux("capture-pane", "-p", "-J", "-t", "chat")):  # until the command ends
            assert time.monotonic() < deadline, screen
            if screen.count(expected) >= count and screen.rstrip().endswith(">"):
                return screen
            time.sleep(0.1)
        raise AssertionError(screen)

    command = " ".join([*COMMAND, "chat", "--greedy", "--image", "examples/images/apple.png"])
    path = f"PYTHONPATH={ENVIRONMENT['PYTHONPATH']}"
    tmux(
        "-u", "new-session", "-d", "-s", "chat", "-x", "150", "-y", "60", "-e", path, f"{command}; echo status $?; cat"
    )
    try:
        wait("/help shows more")
        type_line("What is this?", f"> What is this?\n{CAPTIONS['apple.png'][0]}\n5 tokens, ")
        type_line("/image nope.png", "error: image (nope.png) is no file")
        type_line("/image 'examples/images/pizza.png'", "Images for the next question: 1.")
        type_line("/image examples/images/dog.png", "Images for the next question: 2.")
        with_history = type_line("这是什么？", "tokens/s", 2)
        type_line("/reset", "A new conversation.")
        type_line("/image examples/images/pizza.png", "question: 1.", 2)
        type_line("这是什么？", f"> 这是什么？\n{CAPTIONS['pizza.png'][1]}\n")
        type_line("/nonsense", "error: There is no command /nonsense; /help lists them.")
        type_line("/help", "/exit         end")
        type_line("Write <|im_end|>.", "error: A user message contains the control token '<|im_end|>' as text.")
        tmux("send-keys", "-t", "chat", "half a line", "C-c")
        wait("/exit or Ctrl-D ends.")
        tmux("send-keys", "-t", "chat", "/exit", "Enter")
        deadline = time.monotonic() + 30
        while "status 0" not in (screen := tmux("capture-pane", "-p", "-t", "chat")) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert "status 0" in screen
    finally:
        tmux("kill-server")

    # The second answer is that to the whole conversation, with two pictures in its last question.
    images, engine = [str(IMAGES / f"{name}.png") for name in ("apple", "pizza", "dog")], Engine(greedy=True)
    chat = [question(images[:1], "What is this?"), {"role": "assistant", "content": CAPTIONS["apple.png"][0]}]
    chat.append(question(images[1:], "这是什么？"))
    assert f"> 这是什么？\n{engine.answer(encode(engine.processor, [chat]))[0]}\n" in with_history
