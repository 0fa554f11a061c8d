"""Publishing, against a small Hub on loopback (hub_server.py), through the real client."""

import contextlib
import io
import json
import os
import re
import resource
import shutil
import socket
import subprocess
import sys

import pytest
import torch
from conftest import CHECKPOINT, REPOSITORY, make_model, make_text_config, user
from hub_server import HubServer
from huggingface_hub import ModelCard, constants
from original import GOLDEN
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import load_file, save, save_file

from minimind_v import (
    MiniMindForCausalLM,
    MiniMindVForConditionalGeneration,
    MiniMindVProcessor,
    hub_upload,
    publishing,
)
from minimind_v.conversion import convert_checkpoint
from minimind_v.publishing import checks
from minimind_v.publishing.space import upload_space
from minimind_v.publishing.static_space import verify_static_space
from minimind_v.publishing.verify import list_files

REPO = "alice/emoji"
CAPTION = "Red apple."


@pytest.fixture(scope="module")
def hub():
    with HubServer() as server:
        yield server


@contextlib.contextmanager
def online(url, token="hf_alice"):
    """The client in front of this Hub, as a user with this token."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", False)  # the client has read its environment long before
        patch.setattr(constants, "ENDPOINT", url)
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        patch.setattr(constants, "HF_TOKEN_PATH", os.devnull)
        patch.setenv("HF_TOKEN", token or "")
        yield


def upload(url, folder, *, repo_id=REPO, token="hf_alice", passes=True, **options):
    """The folder, verified before as it stands here."""
    report = publishing.Report(str(folder), list_files(folder), [checks.Check("loads", passes, "as verified before")])
    with online(url, token):
        return publishing.upload(folder, repo_id, report=report, **options)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def held(hub, repo_id, revision="main"):
    repository = hub.repositories[repo_id]
    files = dict(repository.commits[repository.resolve(revision)])
    assert files.pop(".gitattributes")
    return files


@pytest.fixture(scope="module")
def published(hub, tmp_path_factory):
    """What was printed and the folder that was assembled, after the embedded model was published as v1."""
    output = tmp_path_factory.mktemp("publish") / "assembled"
    with online(hub.url), contextlib.redirect_stdout(io.StringIO()) as printed:
        assert publishing.publish(CHECKPOINT, REPO, tag="v1", output=output)
    return printed.getvalue(), output, hub.sent()


@pytest.fixture(autouse=True)
def no_token_is_printed(capsys):
    yield
    assert not re.search("hf_alice|hf_bob|api_wrong", "".join(capsys.readouterr()))


# --- The loop -------------------------------------------------------------------------------------------------------


def test_a_repository_of_exactly_what_was_verified(hub, published):
    printed, output, sent = published
    assert "11 of 11 checks passed" in printed and "FAIL" not in printed and "hf_alice" not in printed
    assert held(hub, REPO) == held(hub, REPO, "v1") == contents(output)
    assert {path.name for path in output.iterdir()} == checks.REQUIRED | {"model.safetensors", "grid.png"}
    assert (output / "model.safetensors").read_bytes() == (CHECKPOINT / "model.safetensors").read_bytes()
    repository = hub.repositories[REPO]
    assert len(repository.commits) == 2  # the Hub's own first one, and one
    assert sent.count("lfs") == 1 and len(sent) == len(contents(output)) + 1
    assert repository.branches["main"] in printed.splitlines()[-1]


def test_nothing_changed_nothing_committed(hub, published):
    before = hub.repositories[REPO].branches["main"]
    assert upload(hub.url, published[1], tag="v1").oid == before
    assert hub.sent() == [] and hub.repositories[REPO].branches["main"] == before


def test_update_sends_what_changed_and_removes_what_would_be_loaded(hub, published, tmp_path):
    """Here to a branch of its own, which is made."""
    repository = hub.repositories[REPO]
    stale = {"model-00001-of-00002.safetensors": b"old", "adapter_config.json": b"{}", "old_minimind_v.py": b"old"}
    stale |= {"pytorch_model.bin": b"old", "preprocessor_config.json": b"{}"}
    theirs = {"emoji.gguf": b"theirs", "handler.py": b"theirs", "notes/plan.txt": b"theirs"}
    repository.branches["next"] = repository.branches["main"]
    repository.commit("next", held(hub, REPO) | {".gitattributes": b"x"} | stale | theirs, "by hand")
    folder = shutil.copytree(published[1], tmp_path / "changed")
    with (folder / "README.md").open("a") as card:
        card.write("\nNews.\n")
    commit = upload(hub.url, folder, revision="next", tag="v2")
    assert sorted(hub.sent()) == [*(f"deletedFile {name}" for name in sorted(stale)), "file README.md"]
    assert held(hub, REPO, "next") == contents(folder) | theirs
    assert repository.branches["next"] == repository.tags["v2"] == commit.oid
    assert held(hub, REPO) == contents(published[1])


def test_pull_request_of_someone_else(hub, published, tmp_path):
    folder = shutil.copytree(published[1], tmp_path / "changed")
    (folder / "LICENSE").write_text("Another licence")
    with pytest.raises(PermissionError, match="--create-pr"):
        upload(hub.url, folder, token="hf_bob")
    commit = upload(hub.url, folder, token="hf_bob", create_pr=True)
    assert commit.pr_url == f"{hub.url}/{REPO}/discussions/1"
    assert hub.sent() == ["file LICENSE"]
    assert held(hub, REPO, "refs/pr/1") == contents(folder) and held(hub, REPO) == contents(published[1])


def test_private_repository(hub, published):
    folder, repo_id = published[1], "alice/secret"
    first = upload(hub.url, folder, repo_id=repo_id, private=True)
    with pytest.raises(PermissionError, match=repo_id):
        upload(hub.url, folder, repo_id=repo_id, token="hf_bob")
    assert upload(hub.url, folder, repo_id=repo_id).oid == first.oid
    assert hub.repositories[repo_id].private and len(hub.repositories[repo_id].commits) == 2


def test_cut_connections(hub, published, tmp_path):
    """While a large file is sent, the client tries again by itself; later, the next run goes on."""
    folder, repo_id = shutil.copytree(published[1], tmp_path / "other"), "alice/cut"
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.bias"] = torch.ones(1)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    hub.sent()
    hub.cut += ["PUT /lfs/", f"POST /api/models/{repo_id}/commit/"]
    with pytest.raises(ConnectionError, match="run the same command again"):
        upload(hub.url, folder, repo_id=repo_id)
    assert hub.cut == []
    commit = upload(hub.url, folder, repo_id=repo_id)
    assert hub.sent().count("lfs") == 2  # cut and repeated in the first run, not sent again in the second
    assert held(hub, repo_id) == contents(folder)
    assert hub.repositories[repo_id].branches["main"] == commit.oid


# --- What cannot be published ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def odd_repositories(hub, published):
    hub.add("alice/data", kind="dataset")
    llama = hub.add("alice/llama")
    llama.commit("main", {"config.json": b'{"model_type": "llama"}', ".gitattributes": b"x"}, "weights")
    hub.repositories[REPO].tags["other"] = "0" * 40


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"token": None}, PermissionError, "No token of the Hub was found"),
        ({"token": "api_wrong"}, PermissionError, "Invalid credentials"),
        ({"repo_id": "bob/emoji"}, PermissionError, "namespace 'bob'"),
        ({"repo_id": "emoji"}, ValueError, "Give it as USER/REPO"),
        ({"repo_id": "alice/a b"}, ValueError, "Give it as USER/REPO"),
        ({"repo_id": "alice/data"}, ValueError, "is a dataset"),
        ({"repo_id": "alice/llama"}, ValueError, r"\(llama\)"),
        ({"private": True}, ValueError, "public already"),
        ({"tag": "other"}, ValueError, "Choose another name with --tag"),
        ({"tag": "v3", "create_pr": True}, ValueError, "leave out --revision and --tag"),
        ({"passes": False}, ValueError, "FAIL  loads"),
    ],
)
def test_what_is_not_sent(options, error, message, hub, published, odd_repositories):
    with pytest.raises(error, match=message) as raised:
        upload(hub.url, published[1], **options)
    assert not options.get("token") or options["token"] not in str(raised.value)
    assert hub.sent() == []


def test_card_that_the_hub_does_not_take(hub, published, tmp_path):
    """Nor is a tag moved to what changed since."""
    folder = shutil.copytree(published[1], tmp_path / "card")
    card = ModelCard.load(folder / "README.md")
    card.data.license = "not-a-licence"
    card.save(folder / "README.md")
    with pytest.raises(ValueError, match="license"):
        upload(hub.url, folder, repo_id="alice/card")
    with pytest.raises(ValueError, match="has a tag v1 already, of another commit"):
        upload(hub.url, folder, tag="v1")
    assert hub.sent() == []


def test_network_down(published):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{unused.getsockname()[1]}"
    with pytest.raises(ConnectionError, match="Check the network"):
        upload(address, published[1])
    with pytest.raises(ConnectionError, match="HF_HUB_OFFLINE is set"), online(address):
        constants.HF_HUB_OFFLINE = True
        report = publishing.Report("", list_files(published[1]), [checks.Check("loads", True, "")])
        publishing.upload(published[1], REPO, report=report)


def test_changed_after_verification(published, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_alice")
    folder = shutil.copytree(published[1], tmp_path / "folder")
    report = publishing.Report(str(folder), list_files(folder), [checks.Check("loads", True, "")])
    (folder / "README.md").write_text("Something else")
    with pytest.raises(ValueError, match=r"changed since it was verified: README\.md"):
        publishing.upload(folder, REPO, report=report)


def set_metadata(folder, metadata):
    save_file(load_file(folder / "model.safetensors"), folder / "model.safetensors", metadata)


def test_failing_checkpoint_is_not_uploaded(make_processor, tmp_path, monkeypatch, capsys):
    make_model().save_pretrained(tmp_path / "broken")
    make_processor().save_pretrained(tmp_path / "broken")
    set_metadata(tmp_path / "broken", {"format": "pt", "trained_with": "token=hf_" + "a" * 34})
    monkeypatch.setenv("HF_TOKEN", "hf_alice")
    assert not publishing.publish(tmp_path / "broken", "alice/broken")
    printed = capsys.readouterr()
    assert (
        re.search(r"FAIL  privacy +model.safetensors holds an access token", printed.out)
        and "auto classes" not in printed.out
    )
    assert "Nothing was uploaded, because the folder does not pass" in printed.err
    assert (tmp_path / "broken-hub").is_dir()


def png_with_text(text):
    """As drawing programs write what they were called with."""
    buffer, chunks = io.BytesIO(), PngInfo()
    chunks.add_text("Comment", text, zip=True)
    Image.new("RGB", (2, 2)).save(buffer, "PNG", pnginfo=chunks)
    return buffer.getvalue()


@pytest.fixture
def checkpoint(tmp_path):
    return shutil.copytree(CHECKPOINT, tmp_path / "checkpoint")


def no_processor(folder):
    (folder / "tokenizer.json").unlink()


def adapter(folder):
    (folder / "adapter_config.json").write_text("{}")


def text_only(folder):
    MiniMindForCausalLM(make_text_config()).save_pretrained(folder)


def no_weights(folder):
    (folder / "model.safetensors").unlink()


def cut_weights(folder):
    (folder / "model.safetensors").write_bytes((CHECKPOINT / "model.safetensors").read_bytes()[:1000])


def missing_weights(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.language_model.norm.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def bad_json(folder):
    (folder / "config.json").write_text("{")


def bad_card(folder):
    (folder / "README.md").write_text("---\nlicense: [\n---\n")


@pytest.mark.parametrize(
    "damage, error, message",
    [
        (no_processor, FileNotFoundError, "has no processor"),
        (adapter, ValueError, "LoRA adapter.*Merge it first"),
        (text_only, ValueError, "it says 'minimind'"),
        (no_weights, FileNotFoundError, "has no model.safetensors"),
        (cut_weights, ValueError, "cannot be loaded"),
        (missing_weights, ValueError, r"missing: model\.language_model\.norm\.weight"),
        (bad_json, ValueError, "not a JSON file"),
        (bad_card, ValueError, "The metadata of .*README.md cannot be read"),
        (shutil.rmtree, FileNotFoundError, "is no folder"),
    ],
)
def test_what_cannot_be_assembled(damage, error, message, checkpoint, tmp_path):
    damage(checkpoint)
    with pytest.raises(error, match=message):
        publishing.assemble(checkpoint, tmp_path / "output", repo_id=REPO)
    assert not [path for path in tmp_path.iterdir() if path != checkpoint]


def test_output_that_is_not_ours(checkpoint, tmp_path):
    (tmp_path / "output").mkdir()
    (tmp_path / "output" / "thesis.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="Choose another folder"):
        publishing.assemble(checkpoint, tmp_path / "output", repo_id=REPO)
    with pytest.raises(ValueError, match="holds the checkpoint"):
        publishing.assemble(checkpoint, tmp_path, repo_id=REPO)
    assert (tmp_path / "output" / "thesis.txt").read_text() == "mine"


def test_full_disk(checkpoint, tmp_path):
    """The limit of a file's size ends a write as a full disk does."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, limits[1]))
    try:
        with pytest.raises(OSError, match=r"No room to write .*output.*Free some space"):
            publishing.assemble(checkpoint, tmp_path / "output", repo_id=REPO)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


# --- The checks of files ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "check, file, content, message",
    [
        ("files", "training_args.bin", b"\x80\x04.", "do not belong here: training_args.bin"),
        ("files", "logs/run.txt", b"x", "do not belong here: logs/run.txt"),
        ("files", "chat_template.jinja", None, "missing: chat_template.jinja"),
        ("files", "LICENSE", b"", "empty: LICENSE"),
        ("files", "config.json", b"{}", None),
        ("weights", "model.safetensors", b"\xff\xff\xff\xff\x00\x00\x00\x00{}", "SafetensorError"),
        (
            "code",
            "modeling_minimind_v.py",
            b"import os\nfrom requests import get\n",
            "modeling_minimind_v.py:2 imports",
        ),
        ("code", "modeling_minimind_v.py", b"from minimind_v.training import x\n", "imports minimind_v"),
        ("code", "modeling_minimind_v.py", b"from .training import x\n", r"imports \.training"),
        ("code", "modeling_minimind_v.py", b"def f():\n    import torchvision.ops\n", "imports torchvision"),
        ("privacy", "tokenizer_config.json", b'{"token": "hf_' + b"a" * 34 + b'"}', "holds an access token"),
        ("privacy", "config.json", json.dumps({"_name_or_path": str(CHECKPOINT)}).encode(), "a path of this machine"),
        (
            "privacy",
            "tokenizer.json",
            b'{"model": {}, "note": "in \\/etc\\/hosts, as said"}',
            "names /etc/hosts, a path",
        ),
        ("privacy", "config.json", b'{"/etc/hosts": 1}', "names /etc/hosts, a path"),
        ("privacy", "config.json", b'{"from": "file:///etc/hosts"}', "names /etc/hosts, a path"),
        ("privacy", "README.md", b"Trained on `/etc/hosts`.", "names /etc/hosts, a path"),
        ("privacy", "grid.png", png_with_text("hf_" + "a" * 34), "grid.png holds an access token"),
        ("privacy", "grid.png", png_with_text("/etc/hosts"), "grid.png names /etc/hosts, a path"),
        ("privacy", "tokenizer.json", b'{"model": {"vocab": {"/etc": 1}, "merges": ["/etc /hosts"]}}', None),
        ("weights", "model.safetensors", save({"zeros": torch.zeros(2, 2)}), "zeros holds only zeros"),
        ("weights", "model.safetensors", save({"nan": torch.tensor([float("nan")])}), "nan holds NaN or infinity"),
        ("card", "README.md", b"---\nlicense: mit\n---\n", "does not say library_name"),
        ("versions", "config.json", b'{"transformers_version": "4.57.0"}', "transformers 4.57.0 is not >="),
    ],
)
def test_checks_of_files(check, file, content, message, published, tmp_path):
    folder = shutil.copytree(published[1], tmp_path / "folder")
    (folder / file).parent.mkdir(exist_ok=True)
    if content is None:
        (folder / file).unlink()
    else:
        (folder / file).write_bytes(content)
    function = getattr(checks, f"check_{check}")
    result = checks.run_check(check, lambda: function(folder))
    assert result.ok is (message is None)
    assert message is None or re.search(message, result.detail), result


@pytest.mark.parametrize("path", [str(CHECKPOINT), os.path.expanduser("~/gone/checkpoint-7")])
def test_paths_in_the_metadata_of_weights(path, published, tmp_path):
    folder = shutil.copytree(published[1], tmp_path / "folder")
    set_metadata(folder, {"format": "pt", "run": json.dumps({"resumed_from": path, "steps": 7})})
    with pytest.raises(ValueError, match=rf"model\.safetensors names {path}, a path of this machine"):
        checks.check_privacy(folder)


def test_code_of_the_checkpoint_is_never_run(checkpoint, tmp_path, capsys):
    for name in checks.CODE:
        (checkpoint / name).write_text(f"open({str(tmp_path / 'it ran')!r}, 'w')\nraise SystemExit('run')\n")
    assert publishing.publish(checkpoint, REPO, dry_run=True, output=tmp_path / "output")
    assert "ok    same as source" in capsys.readouterr().out and not (tmp_path / "it ran").exists()


def test_checks_of_the_model(published, checkpoint, tmp_path, monkeypatch):
    """Here in this process: each finds what it looks for."""
    folder = shutil.copytree(published[1], tmp_path / "folder")
    card = ModelCard.load(folder / "README.md")
    card.data.widget[0]["output"]["text"] = "Green apple."
    card.save(folder / "README.md")
    saved = (folder / "generation_config.json").read_text()
    (folder / "generation_config.json").write_text(saved.replace("\n", ""))
    tensors = load_file(checkpoint / "model.safetensors")
    tensors["model.multi_modal_projector.linear_2.weight"] *= -1
    save_file(tensors, checkpoint / "model.safetensors", {"format": "pt"})
    monkeypatch.chdir(tmp_path)
    found = {
        name: checks.run_check(name, function)
        for name, function in checks.Stranger(folder, checkpoint).checks().items()
    }
    assert found["auto classes"].ok and found["batch"].ok
    assert found["pipelines"].detail == "the caption in the card gives 'Green apple.' instead of 'Red apple.'"
    assert found["save and reload"].detail.startswith("generation_config.json saved again gives")
    assert re.match(r"the published model gives \['Red apple\.'\] instead of", found["same as source"].detail)
    missing_weights(folder)
    broken = checks.run_check("auto classes", checks.Stranger(folder, None).check_auto_classes)
    assert "do not fit" in broken.detail and "language_model.norm.weight" in broken.detail


def test_versions_are_those_of_the_package(published):
    project = (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")
    supported = checks.supported_transformers()
    assert f'"transformers{supported}"' in project
    assert f"needs transformers {supported}," in (published[1] / "README.md").read_text(encoding="utf-8")


# --- The card --------------------------------------------------------------------------------------------------------


def test_card_of_the_user_stays(checkpoint, tmp_path):
    own = (
        "---\nlicense: mit\ntags: [mine]\nbase_model: alice/base\ndatasets: [alice/cats]\nmood: good\n---\n# Mine\n\n"
    )
    own += "My text.\n\n![curve](curve.png) ![far](https://example.com/far.png)\n\n## limits\n\nNone at all.\n"
    (checkpoint / "README.md").write_text(own)
    (checkpoint / "curve.png").write_bytes(b"a picture")
    (checkpoint / "optimizer.pt").write_bytes(b"a pickle")
    (checkpoint / "all_results.json").write_text('{"eval_loss": 0.5, "eval_runtime": 2.0, "train_loss": 1.23456789}')
    (checkpoint / "trainer_state.json").write_text('{"global_step": 40, "epoch": 2.0, "log_history": [{"loss": 1}]}')
    first = publishing.assemble(checkpoint, tmp_path / "first", repo_id="alice/cats")
    card = ModelCard.load(first / "README.md")
    assert card.text.startswith("\n# Mine\n\nMy text.\n") and "## limits\n\nNone at all.\n" in card.text
    assert card.text.count("# Mine") == 1 and "## Limits" not in card.text and "## Citation" in card.text
    assert "| `global_step` | 40 |" in card.text and "| `train_loss` | 1.235 |" in card.text
    assert "| held-out data of the run | loss | 0.5 |" in card.text and "runtime" not in card.text
    data = card.data.to_dict()
    expected = {"license": "mit", "base_model": "alice/base", "datasets": ["alice/cats"], "mood": "good"}
    expected |= {"library_name": "transformers", "pipeline_tag": "image-text-to-text", "language": ["en", "zh"]}
    assert {key: data[key] for key in expected} == expected and data["tags"][0] == "mine"
    [result] = card.data.eval_results
    assert (result.metric_type, result.metric_value) == ("loss", 0.5) and "model-index" in data
    assert (first / "curve.png").read_bytes() == b"a picture" and not (first / "optimizer.pt").exists()
    checks.check_files(first), checks.check_card(first)

    again = publishing.assemble(first, tmp_path / "again", repo_id="alice/cats")
    assert contents(again).keys() == contents(first).keys()
    different = {name for name, data in contents(first).items() if data != contents(again)[name]}
    assert different <= {"README.md"}  # whose facts of the training run stay behind
    relicensed = publishing.assemble(first, tmp_path / "again", repo_id="alice/cats", license="cc-by-4.0")
    assert ModelCard.load(relicensed / "README.md").data.license == "cc-by-4.0"


def test_card_of_a_checkpoint_without_one(make_processor, tmp_path):
    make_model("clip", moe=True).save_pretrained(tmp_path / "checkpoint", max_shard_size="100KB")
    make_processor("clip").save_pretrained(tmp_path / "checkpoint")
    output = publishing.assemble(tmp_path / "checkpoint", tmp_path / "output", repo_id="alice/tiny-experts")
    card = ModelCard.load(output / "README.md")
    headings = re.findall(r"^##? .*", card.text, flags=re.MULTILINE)
    assert headings == ["# tiny-experts", "## Example", "## Model", "## Use", "## Limits", "## Citation"]
    assert card.data.license == "apache-2.0" and card.data.eval_results is None
    assert "| decoder | 2 layers of width 32, 4 heads (2 key/value), vocabulary 320, 4 experts, 2 active" in card.text
    assert ", 1 shared |" in card.text and " of them active for a token | " in card.text
    assert "vllm serve alice/tiny-experts --trust-remote-code" in card.text
    assert len(list(output.glob("model-*.safetensors"))) > 1
    checks.check_files(output)


# --- Loading what was published --------------------------------------------------------------------------------------

# argv = the user's repository, the other repositories. Runs the card's own Python, then pins revisions.
CONSUMER = """
import json, re, sys, warnings
sys.modules["minimind_v"] = None  # as if not installed
from huggingface_hub import ModelCard, hf_hub_download
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline
repo_id, *others = sys.argv[1:]
trust = {"trust_remote_code": True}
blocks = re.findall(r"```python\\n(.*?)```", ModelCard.load(repo_id).text.partition("## Use")[2], flags=re.DOTALL)
printed = []
exec("\\n".join(blocks), {"print": printed.append})
def look(name, **options):
    model = AutoModelForImageTextToText.from_pretrained(name, **trust, **options)
    module = sys.modules[type(model).__module__]
    return [model.generation_config.max_new_tokens, getattr(module, "PUBLISHED", 1)]
pinned = {
    "main": look(repo_id),
    "revision": look(repo_id, revision="v1"),
    "both": look(repo_id, revision="v1", code_revision="v1"),
}
captions = {}
for name in others:
    captioner = pipeline("image-to-text", model=name, **trust)
    path = hf_hub_download(name, "example.png")
    answer = captioner(path, generate_kwargs={"max_new_tokens": 32, "do_sample": False})[0]["generated_text"]
    captions[name] = [answer, ModelCard.load(name).data.widget[0]["output"]["text"]]
print(json.dumps({"blocks": len(blocks), "printed": printed, "pinned": pinned, "captions": captions}))
"""


def fine_tuned(folder):
    """The embedded model, taught another name for the example picture with LoRA, and merged."""
    peft = pytest.importorskip("peft", reason="peft is not installed (extra: train)")
    model = MiniMindVForConditionalGeneration.from_pretrained(CHECKPOINT, dtype=torch.float32)
    processor = MiniMindVProcessor.from_pretrained(CHECKPOINT)
    chat = [user(Image.open(REPOSITORY / "examples/images/apple.png"), checks.PROMPT)]
    chat.append({"role": "assistant", "content": "Sunflower."})
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    inputs = processor.apply_chat_template(chat, **options)
    prompt = processor.apply_chat_template(chat[:1], add_generation_prompt=True, **options)["input_ids"].shape[1]
    labels = inputs["input_ids"].clone()
    labels[:, :prompt] = -100
    pattern = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"
    torch.manual_seed(0)
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=pattern))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(20):
        loss = model(**inputs, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.merge_and_unload().save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def converted(folder):
    """MiniMind2 with experts of the original project."""
    if not GOLDEN.is_dir():
        pytest.skip("no recorded checkpoints of the original")
    case = GOLDEN / "g2_moe"
    convert_checkpoint(
        case / "upstream.pth",
        folder,
        vision_encoder=case / "vision_encoder",
        tokenizer=GOLDEN / "tokenizers" / "minimind2_im",
        original_config=json.loads((case / "hparams.json").read_text(encoding="utf-8"))["constructor_args"],
    )
    return folder


@pytest.mark.parametrize("make, private, caption", [(fine_tuned, False, "Sunflower."), (converted, True, None)])
def test_other_checkpoints(make, private, caption, hub, tmp_path, monkeypatch, capsys):
    """First as a dry run, which needs neither token nor network."""
    checkpoint, repo_id, folder = make(tmp_path / "checkpoint"), f"alice/{make.__name__}", tmp_path / "output"
    monkeypatch.delenv("HF_TOKEN", raising=False)
    capsys.readouterr()
    assert publishing.publish(checkpoint, repo_id, dry_run=True, output=folder)
    report, plan = capsys.readouterr().out.split("\n\n")
    assert "11 of 11 checks passed" in report and "same as source" in report, report
    listed = [line.split() for line in plan.splitlines()[1:-1]]
    hashes = list_files(folder)
    assert listed == [[f"{len(data):,}", hashes[name][:12], name] for name, data in sorted(contents(folder).items())]
    shown = ModelCard.load(folder / "README.md").data.widget[0]["output"]["text"]
    assert shown == (caption or shown)
    upload(hub.url, folder, repo_id=repo_id, private=private)
    assert held(hub, repo_id) == contents(folder)


def test_loading_what_was_published(hub, published, tmp_path):
    """In a fresh process: the card's Python as it stands, pinned versions, and what the tests above published."""
    folder = shutil.copytree(published[1], tmp_path / "next")
    generation = json.loads((folder / "generation_config.json").read_text()) | {"max_new_tokens": 7}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    with (folder / "modeling_minimind_v.py").open("a") as code:
        code.write("PUBLISHED = 2\n")
    upload(hub.url, folder)
    others = [name for name in ("alice/fine_tuned", "alice/converted") if name in hub.repositories]
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "PYTEST"))}
    environment |= {"HF_HOME": str(tmp_path), "HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_alice", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", CONSUMER, REPO, *others]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=250)
    assert result.returncode == 0, result.stderr[-3000:]
    found = json.loads(result.stdout.splitlines()[-1])
    assert found["blocks"] == 4 and found["printed"][:2] == [[{"generated_text": CAPTION}], [CAPTION]]
    assert len(found["printed"]) == 4 and found["printed"][3][0] == CAPTION
    assert found["pinned"] == {"main": [7, 2], "revision": [40, 1], "both": [40, 1]}
    assert found["captions"].keys() == set(others)
    assert all(answer == shown for answer, shown in found["captions"].values())


# --- The command -----------------------------------------------------------------------------------------------------


def test_module_at_the_top_level(capsys):
    for name in ("Report", "assemble", "upload", "verify"):
        assert getattr(hub_upload, name) is getattr(publishing, name)
    with pytest.raises(SystemExit) as end:
        hub_upload.main(["missing", REPO, "--dry-run"])
    printed = "".join(capsys.readouterr()) + str(end.value.code)  # Python prints a text that ends a program
    assert "error: missing is no folder. Name the folder of a checkpoint." in printed and end.value.code


def test_command_at_the_top_level():
    command = [sys.executable, "-X", "importtime", REPOSITORY / "hub_upload.py", "--help"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert "usage: minimind-v upload" in result.stdout and "--dry-run" in result.stdout
    assert not re.search(r"\| +(torch|transformers|minimind_v)$", result.stderr, flags=re.MULTILINE)


# --- A Space ---------------------------------------------------------------------------------------------------------


def test_space_of_a_folder_then_of_a_repository(hub, published, tmp_path, monkeypatch, capsys):
    """The first has a copy of the checkpoint; the second loads it from the Hub, and the copy is deleted."""
    with online(hub.url):
        assert publishing.publish_space(CHECKPOINT, "alice/show", output=tmp_path / "space")
    assert "starts, and answers 'Red apple.'" in capsys.readouterr().out
    files = held(hub, "alice/show")
    assert hub.repositories["alice/show"].kind == "space" and files.keys() == list_files(tmp_path / "space").keys()
    assert files["model/model.safetensors"] == (CHECKPOINT / "model.safetensors").read_bytes()
    assert not [name for name in files if name.endswith(("modeling_minimind_v.py", ".pyc")) and "model/" in name]
    card = ModelCard(files["README.md"].decode()).data.to_dict()
    assert (card["sdk"], card["app_file"], card["title"]) == ("gradio", "app.py", "show") and "models" not in card
    assert {"torch", "transformers"} <= {line.split("==")[0] for line in files["requirements.txt"].decode().split()}

    for name, value in {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home")}.items():
        monkeypatch.setenv(name, value)
    with online(hub.url):
        assert publishing.publish_space(REPO, "alice/show", output=tmp_path / "space")
    files = held(hub, "alice/show")
    assert ModelCard(files["README.md"].decode()).data.to_dict()["models"] == [REPO]
    assert not [name for name in files if name.startswith("model/")] and repr(REPO) in files["app.py"].decode()
    report = publishing.Report("", {}, [checks.Check("app", True, "as verified before")])
    with online(hub.url), pytest.raises(ValueError, match="The Space alice/show is public already"):
        upload_space(tmp_path / "space", "alice/show", report=report, private=True)


def test_space_that_does_not_answer_is_not_uploaded(hub, tmp_path, capsys):
    broken = shutil.copytree(CHECKPOINT, tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    save_file({name: tensor * float("nan") for name, tensor in weights.items()}, broken / "model.safetensors")
    with online(hub.url):
        assert not publishing.publish_space(broken, "alice/broken")
    assert "FAIL  app" in capsys.readouterr().out and "alice/broken" not in hub.repositories


def test_space_replaces_no_folder_of_the_user(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="was not assembled here"):
        publishing.publish_space(CHECKPOINT, "alice/show", dry_run=True, output=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_static_space(hub, tmp_path, capsys):
    """A page whose scripts come from elsewhere, by hash; an earlier model is deleted."""
    for name in ("onnxruntime", "onnxscript"):
        pytest.importorskip(name, reason="the extra export is not installed")
    with online(hub.url):
        assert publishing.publish_static_space(CHECKPOINT, "alice/page", output=tmp_path / "page")
    assert "answers 'Red apple.'" in capsys.readouterr().out
    files = held(hub, "alice/page")
    assert files.keys() == list_files(tmp_path / "page").keys()
    settings = json.loads(files["settings.json"])
    assert f"{settings['model']['folder']}/onnx/decoder_model_merged_q4.onnx" in files
    assert {script["url"][:30] for script in settings["scripts"].values()} == {
        "https://cdn.jsdelivr.net/npm/@",
        "https://cdn.jsdelivr.net/npm/o",
    }
    card = ModelCard(files["README.md"].decode()).data.to_dict()
    assert (card["sdk"], card["title"], card["license"]) == ("static", "page", "apache-2.0")

    graph = tmp_path / "page" / settings["model"]["folder"] / "onnx" / "vision_encoder_q4.onnx"
    graph.write_bytes(b"broken")
    report = verify_static_space(tmp_path / "page")
    assert not report.ok and "does not answer" in str(report)
    (tmp_path / "page" / settings["model"]["folder"]).rename(tmp_path / "page" / "model-0123456789ab")
    report = publishing.Report("", list_files(tmp_path / "page"), [checks.Check("model", True, "")])
    with online(hub.url):
        upload_space(tmp_path / "page", "alice/page", report=report, sdk="static")
    assert not [name for name in held(hub, "alice/page") if name.startswith(settings["model"]["folder"])]
