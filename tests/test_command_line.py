"""The command `minimind-v` as people run it: on real pictures, with mistakes, interrupted, in a terminal."""

import contextlib
import functools
import http.server
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
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from conftest import CHECKPOINT, REPOSITORY, caption_row, write_jsonl
from test_readme import CAPTIONS, README

from minimind_v import MiniMindVForConditionalGeneration
from minimind_v.inference.captioning import caption_pictures, find_pictures, read_records
from minimind_v.inference.engine import Engine, encode, question, store_by_column
from minimind_v_cli.__main__ import main

IMAGES = REPOSITORY / "examples" / "images"
# Where this tree is not installed but only on the path, there is no script; then what the script would run.
SCRIPT, INSTALLED = shutil.which("minimind-v", path=Path(sys.executable).parent), find_spec("minimind_v_cli")
IS_THIS = SCRIPT and INSTALLED and Path(INSTALLED.origin).parent.samefile(REPOSITORY / "cli")
COMMAND = [SCRIPT] if IS_THIS else [sys.executable, str(REPOSITORY / "cli")]
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
OPTIONS = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "encoding": "utf-8", "env": ENVIRONMENT}


def run(*arguments, command=COMMAND, **options):
    command = [*command, *map(str, arguments)]
    return subprocess.run(command, timeout=200, **OPTIONS | {"cwd": REPOSITORY} | options)


def captions(path):
    return {os.path.basename(record["image"]): record["caption"] for record in read_records(path)}


# --- Without a model -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [None, "caption", "chat", "compare"])
def test_help_has_an_example_and_does_not_wait_for_torch(name):
    command = [sys.executable, "-X", "importtime", REPOSITORY / "cli"]
    result = run(*([name] if name else []), "--help", command=command)
    assert result.returncode == 0 and re.search(rf"Example:\n +minimind-v {name or 'caption'} \S+", result.stdout)
    imported = {line.split("|")[-1].strip() for line in result.stderr.splitlines()}
    assert "typer" in imported and not imported & {"torch", "transformers", "accelerate", "PIL"}


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["caption"], "Missing argument 'pictures"),
        (["chat", "--imag", "x"], "No such option: --imag"),
        (["caption", "x.png", "--top-p", "2"], ". See minimind-v caption --help."),
        (["caption", "x.png", "--greedy", "--top-p", "0.5"], "--greedy draws nothing, so --top-p has no effect."),
        (["chat", "--model", "no-folder"], "--model no-folder is neither a folder nor USER/REPO of the Hub."),
    ],
)
def test_mistyped_commands_get_one_line(arguments, message):
    result = run(*arguments)
    assert result.returncode == 2 and result.stdout == "" and result.stderr.count("\n") == 1, result.stderr
    assert result.stderr.startswith("error: ") and message in result.stderr


def test_errors_are_one_line_unless_debugged(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["minimind-v", "caption", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"^error: No pictures were found for .* Name files, folders, patterns or"):
        main()
    sys.argv.append("--debug")
    with pytest.raises(FileNotFoundError, match="No pictures were found"):
        main()


def test_finding_pictures(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("b.PNG", "a.jpg", "a.txt", ".hidden.png", "sub/c.webp", "odd[1].png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert find_pictures(["."]) == ["./a.jpg", "./b.PNG", "./odd[1].png", "./sub/c.webp"]
    url = "https://example.org/picture?id=[1]*"
    assert find_pictures(["odd[1].png", "*.PNG", "b.PNG", "none.png", url]) == ["odd[1].png", "b.PNG", "none.png", url]
    with pytest.raises(FileNotFoundError, match=r"for \*\.gif\. Name"):
        find_pictures(["a.jpg", "*.gif"])


@pytest.mark.parametrize(
    "content", [b"precious", b"precious\n", b'{"image": "a.png"}\n', b"\x89PNG\r\n\x1a\n", b"[]\n{"]
)
def test_output_that_is_something_else_is_left_as_it_is(content, tmp_path):
    path = tmp_path / "notes.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"notes\.txt holds something else than captions and is left as it is"):
        caption_pictures([str(IMAGES / "dog.png")], "What is this?", path)
    assert path.read_bytes() == content


# --- Answers ---------------------------------------------------------------------------------------------------------


def test_weights_by_column_keep_their_values(tmp_path):
    model = MiniMindVForConditionalGeneration.from_pretrained(CHECKPOINT, dtype=torch.float32)
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    ids = torch.arange(100, 120).view(1, -1)
    with torch.no_grad():
        logits = model(ids).logits
        store_by_column(model)
        torch.testing.assert_close(model(ids).logits, logits, atol=1e-5, rtol=1e-5)
    assert model.model.language_model.layers[0].mlp.up_proj.weight.stride(0) == 1
    model.save_pretrained(tmp_path)
    loaded = MiniMindVForConditionalGeneration.from_pretrained(tmp_path).state_dict()
    assert loaded.keys() == weights.keys() and all(torch.equal(loaded[name], weights[name]) for name in weights)


def test_options_reach_generate(capfd):
    engine = Engine(temperature=3.0, top_p=1.0, top_k=900, repetition_penalty=1.3, max_new_tokens=6, seed=1)
    pictures = sorted(map(str, IMAGES.glob("*.png")))
    chats = [[question([picture], "What is this?")] for picture in pictures]
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
    # Rows of different lengths and numbers of pictures, padded on the left, answer as alone
    greedy.model.float()
    chats = [chats[0], [question([], "这是什么？")], [question(pictures[1:3], "What is in these two pictures?")]]
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


@contextlib.contextmanager
def served(folder):
    """A web server of this machine."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_captions_go_on_after_an_interruption_and_past_broken_pictures(tmp_path):
    for number in range(12):
        for picture in IMAGES.glob("*.png"):
            shutil.copy(picture, tmp_path / f"{number:02}-{picture.name}")
    output = tmp_path / "new" / "captions.jsonl"
    command = ["caption", ".", "--output", output.relative_to(tmp_path)]
    process = subprocess.Popen([*COMMAND, *command, "--batch-size", "1"], cwd=tmp_path, **OPTIONS)
    deadline = time.monotonic() + 100
    while not (output.exists() and output.stat().st_size > 1000) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.communicate()
    written = output.read_bytes().splitlines(keepends=True)
    assert 2 < len(written) < 12 * len(CAPTIONS)
    output.write_bytes(b"".join(written)[:-20])  # the last line half written

    (tmp_path / "broken.png").write_text("not a picture")
    with served(IMAGES) as url:
        more = ["missing.jpg", f"{url}/dog.png", f"{url}/none.png", "--batch-size", "5", "--workers", "1"]
        result = run(*command[:2], *more, *command[2:], cwd=tmp_path)
    assert result.returncode == 1 and result.stdout == ""
    lines = result.stderr.splitlines()
    assert lines[0] == f"{len(written) - 1} of {12 * len(CAPTIONS) + 4} pictures are in {command[-1]} already."
    assert lines[1].startswith("minimind-v-emoji: 4.00M parameters") and "tokens/s" in lines[-1] and len(lines) == 6
    for line, name in zip(lines[2:5], ("./broken.png", "missing.jpg", f"{url}/none.png"), strict=True):
        assert line.startswith(f"error: image ({name}) ")

    content = output.read_bytes()
    assert content.startswith(b"".join(written[:-1]))
    records = [json.loads(line) for line in content.decode().splitlines()]
    pictures = [f"./{number:02}-{name}" for number in range(12) for name in sorted(CAPTIONS)] + [f"{url}/dog.png"]
    assert records == [
        {"image": p, "prompt": "Describe this image.", "model": "minimind-v-emoji", "caption": CAPTIONS[p[-n:]][0]}
        for p in pictures
        for n in [len(p) - max(p.rfind("-"), p.rfind("/")) - 1]
    ]


def test_two_processes_give_the_captions_of_one(tmp_path):
    pictures = find_pictures([str(IMAGES)])
    caption_pictures(pictures, "这是什么？", tmp_path / "one.jsonl", batch_size=8, options={"greedy": True})
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
    result = run(*options, command=command)
    assert result.returncode == 0, result.stderr[-2000:]
    assert f"2 of {len(CAPTIONS)} pictures are in" in result.stderr and result.stderr.count("parameters") == 1
    assert (tmp_path / "two.jsonl").read_bytes() == b"".join(lines)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.jsonl", "two.jsonl"]


# --- The other commands ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", re.findall(r"^minimind-v (.*?)(?: +#.*)?$", README, flags=re.MULTILINE))
def test_commands_of_the_readme(command, tmp_path, monkeypatch, capsys):
    (tmp_path / "examples").symlink_to(REPOSITORY / "examples")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["minimind-v", *shlex.split(command)])
    monkeypatch.setattr(sys, "stdin", io.StringIO("What is this?\n"))
    with pytest.raises(SystemExit) as end:
        main()
    assert not end.value.code, end.value.code
    assert capsys.readouterr().out or captions(tmp_path / "captions.jsonl").keys() == CAPTIONS.keys()


def test_comparing_two_pictures(monkeypatch, capsys):
    pictures = [str(IMAGES / name) for name in ("apple.png", "pizza.png")]
    monkeypatch.setattr(sys, "argv", ["minimind-v", "compare", *pictures, "--prompt", "这是什么？"])
    with pytest.raises(SystemExit) as end:
        main()
    assert not end.value.code
    engine = Engine(greedy=True)
    expected = engine.answer(encode(engine.processor, [[question(pictures, "这是什么？")]]))
    assert capsys.readouterr().out == expected[0] + "\n"


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("train --help", "--lora_rank"),
        ("check rows.jsonl --preview 0", "row 0: image 0 of sample 0 (missing.png) is no file"),
        ("convert missing.pth out --dtype float32", "error: missing.pth"),
        ("upload missing user/repo --dry-run", "error: missing is no folder."),
    ],
)
def test_other_tools_read_their_own_options(arguments, message, tmp_path, monkeypatch, capsys):
    write_jsonl(tmp_path / "rows.jsonl", [caption_row("missing.png")])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["minimind-v", *arguments.split()])
    monkeypatch.setattr(sys, "path", sys.path.copy())
    with pytest.raises(SystemExit) as end:
        main()
    shown = capsys.readouterr().out + str(end.value.code)  # Python prints a text that ends a program
    assert message in shown and end.value.code != (0 if "rows" in arguments else 1)


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
        deadline = time.monotonic() + 100
        while time.monotonic() < deadline:
            screen = tmux("capture-pane", "-p", "-J", "-t", "chat")
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
