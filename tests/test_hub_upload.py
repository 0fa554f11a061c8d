"""Publishing, against a small Hub on loopback (hub_server.py), through the real command and the real client."""

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
from huggingface_hub import ModelCard
from original import GOLDEN, load_case
from PIL import Image
from safetensors.torch import load_file, save_file

from minimind_v import MiniMindForCausalLM, MiniMindVForConditionalGeneration, MiniMindVProcessor

sys.path.append(str(REPOSITORY))  # hub_upload is a script of the clone, no part of the package
import hub_checks
import hub_upload

REPO = "alice/emoji"
CAPTION = "Red apple."
# Uploads several times in one process: argv = JSON list of {folder, repo_id, token, ...options of upload}.
UPLOADS = f"""
import json, os, sys
sys.path.append({str(REPOSITORY)!r})
import hub_upload
results = []
for case in json.loads(sys.argv[1]):
    os.environ.pop("HF_TOKEN", None)
    if token := case.pop("token", "hf_alice"):
        os.environ["HF_TOKEN"] = token
    folder = case.pop("folder")
    report = hub_upload.Report(folder, hub_upload.list_files(hub_upload.Path(folder)), [])
    report.checks = [hub_upload.Check("loads", case.pop("passes", True), "as verified before")]
    try:
        commit = hub_upload.upload(folder, report=report, **case)
        results.append({{"oid": commit.oid, "pr_url": commit.pr_url}})
    except Exception as error:
        results.append({{"error": type(error).__name__, "message": str(error)}})
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def hub():
    with HubServer() as server:
        yield server


def run(command, hub, tmp_path, token="hf_alice"):
    """A fresh process in front of this Hub. It may never print a token."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "PYTEST"))}
    environment |= {"HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1"}
    environment |= {"HF_ENDPOINT": hub if isinstance(hub, str) else hub.url} | ({"HF_TOKEN": token} if token else {})
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=250)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-3000:]
    assert not re.search("hf_alice|hf_bob|api_wrong", result.stdout + result.stderr)
    return result


def upload(hub, tmp_path, *cases):
    """What `hub_upload.upload` returned or raised in each case."""
    cases = [{"repo_id": REPO} | case | {"folder": str(case["folder"])} for case in cases]
    results = json.loads(run([sys.executable, "-c", UPLOADS, json.dumps(cases)], hub, tmp_path, token=None).stdout)
    return results if len(results) > 1 else results[0]


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def held(hub, repo_id, revision="main"):
    repository = hub.repositories[repo_id]
    files = dict(repository.commits[repository.resolve(revision)])
    assert files.pop(".gitattributes")
    return files


@pytest.fixture(scope="module")
def published(hub, tmp_path_factory):
    """The command's output and the folder it assembled, after the embedded model was published as v1."""
    tmp_path = tmp_path_factory.mktemp("publish")
    output = tmp_path / "assembled"
    arguments = [REPOSITORY / "hub_upload.py", CHECKPOINT, REPO, "--tag", "v1", "--output", output]
    return run([sys.executable, *arguments], hub, tmp_path), output, hub.sent()


# --- The loop -------------------------------------------------------------------------------------------------------


def test_command_creates_a_repository_of_exactly_what_it_verified(hub, published):
    result, output, sent = published
    assert "11 of 11 checks passed" in result.stdout and "FAIL" not in result.stdout
    assert held(hub, REPO) == held(hub, REPO, "v1") == contents(output)
    assert {path.name for path in output.iterdir()} == hub_checks.REQUIRED | {"model.safetensors", "grid.png"}
    assert (output / "model.safetensors").read_bytes() == (CHECKPOINT / "model.safetensors").read_bytes()
    repository = hub.repositories[REPO]
    assert len(repository.commits) == 2  # the Hub's own first one, and one
    assert sent.count("lfs") == 1 and len(sent) == len(contents(output)) + 1
    assert repository.branches["main"] in result.stdout.splitlines()[-1]


def test_nothing_changed_nothing_committed(hub, published, tmp_path):
    before = hub.repositories[REPO].branches["main"]
    assert upload(hub, tmp_path, {"folder": published[1], "tag": "v1"})["oid"] == before
    assert hub.sent() == [] and hub.repositories[REPO].branches["main"] == before


def test_update_sends_what_changed_and_removes_what_would_be_loaded(hub, published, tmp_path):
    """Here to a branch of its own, which the command makes."""
    repository = hub.repositories[REPO]
    stale = {"model-00001-of-00002.safetensors": b"old", "adapter_config.json": b"{}", "old_minimind_v.py": b"old"}
    stale |= {"pytorch_model.bin": b"old", "preprocessor_config.json": b"{}"}
    theirs = {"emoji.gguf": b"theirs", "handler.py": b"theirs", "notes/plan.txt": b"theirs"}
    repository.branches["next"] = repository.branches["main"]
    repository.commit("next", held(hub, REPO) | {".gitattributes": b"x"} | stale | theirs, "by hand")
    folder = shutil.copytree(published[1], tmp_path / "changed")
    with (folder / "README.md").open("a") as card:
        card.write("\nNews.\n")
    result = upload(hub, tmp_path, {"folder": folder, "revision": "next", "tag": "v2"})
    assert sorted(hub.sent()) == [*(f"deletedFile {name}" for name in sorted(stale)), "file README.md"]
    assert held(hub, REPO, "next") == contents(folder) | theirs
    assert repository.branches["next"] == repository.tags["v2"] == result["oid"]
    assert held(hub, REPO) == contents(published[1])


def test_pull_request_of_someone_else(hub, published, tmp_path):
    folder = shutil.copytree(published[1], tmp_path / "changed")
    (folder / "LICENSE").write_text("Another licence")
    refused, opened = upload(
        hub,
        tmp_path,
        {"folder": folder, "token": "hf_bob"},
        {"folder": folder, "token": "hf_bob", "create_pr": True},
    )
    assert refused["error"] == "PermissionError" and "--create-pr" in refused["message"]
    assert opened["pr_url"] == f"{hub.url}/{REPO}/discussions/1"
    assert hub.sent() == ["file LICENSE"]
    assert held(hub, REPO, "refs/pr/1") == contents(folder) and held(hub, REPO) == contents(published[1])


def test_private_repository(hub, published, tmp_path):
    folder, repo_id = published[1], "alice/secret"
    first, stranger, again = upload(
        hub,
        tmp_path,
        {"folder": folder, "repo_id": repo_id, "private": True},
        {"folder": folder, "repo_id": repo_id, "token": "hf_bob"},
        {"folder": folder, "repo_id": repo_id},
    )
    assert hub.repositories[repo_id].private and first["oid"] == again["oid"]
    assert stranger["error"] == "PermissionError" and repo_id in stranger["message"]
    assert len(hub.repositories[repo_id].commits) == 2


def test_cut_connections(hub, published, tmp_path):
    """While a large file is sent, the client tries again by itself; later, the next run goes on."""
    folder = shutil.copytree(published[1], tmp_path / "other")
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.bias"] = torch.ones(1)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    hub.sent()
    case = {"folder": folder, "repo_id": "alice/cut"}
    hub.cut += ["PUT /lfs/", "POST /api/models/alice/cut/commit/"]
    failed, finished = upload(hub, tmp_path, case, case)
    assert hub.cut == []
    assert failed["error"] == "ConnectionError" and "run the same command again" in failed["message"]
    sent = hub.sent()
    assert sent.count("lfs") == 2  # cut and repeated in the first run, not sent again in the second
    assert held(hub, "alice/cut") == contents(folder)
    assert hub.repositories["alice/cut"].branches["main"] == finished["oid"]


# --- What cannot be published ----------------------------------------------------------------------------------------


def test_what_the_hub_does_not_take(hub, published, tmp_path):
    hub.add("alice/data", kind="dataset")
    llama = hub.add("alice/llama")
    llama.commit("main", {"config.json": b'{"model_type": "llama"}', ".gitattributes": b"x"}, "weights")
    bad_card = shutil.copytree(published[1], tmp_path / "card")
    card = ModelCard.load(bad_card / "README.md")
    card.data.license = "not-a-licence"
    card.save(bad_card / "README.md")
    cases = [
        ({"token": None}, "PermissionError", "No token of the Hub was found"),
        ({"token": "api_wrong"}, "PermissionError", "Invalid credentials"),
        ({"repo_id": "bob/emoji"}, "PermissionError", "namespace 'bob'"),
        ({"repo_id": "emoji"}, "ValueError", "Give it as USER/REPO"),
        ({"repo_id": "alice/a b"}, "ValueError", "Give it as USER/REPO"),
        ({"repo_id": "alice/data"}, "ValueError", "is a dataset"),
        ({"repo_id": "alice/llama"}, "ValueError", "(llama)"),
        ({"private": True}, "ValueError", "public already"),
        ({"tag": "v2"}, "ValueError", "Choose another name with --tag"),
        ({"tag": "v3", "create_pr": True}, "ValueError", "leave out --revision and --tag"),
        ({"repo_id": "alice/card", "folder": bad_card}, "ValueError", "license"),
        ({"passes": False}, "ValueError", "FAIL  loads"),
    ]
    hub.repositories[REPO].tags["v2"] = "0" * 40
    results = upload(hub, tmp_path, *({"folder": published[1]} | case for case, _, _ in cases))
    for (case, error, message), result in zip(cases, results, strict=True):
        assert result.get("error") == error and message in result["message"], (case, result)
    assert hub.sent() == []


def test_network_down(published, tmp_path):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{unused.getsockname()[1]}"
    result = upload(address, tmp_path, {"folder": published[1]})
    assert result["error"] == "ConnectionError" and "Check the network" in result["message"]


def test_changed_after_verification(published, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_alice")
    folder = shutil.copytree(published[1], tmp_path / "folder")
    report = hub_upload.Report(str(folder), hub_upload.list_files(folder), [hub_upload.Check("loads", True, "")])
    (folder / "README.md").write_text("Something else")
    with pytest.raises(ValueError, match=r"changed since it was verified: README\.md"):
        hub_upload.upload(folder, REPO, report=report)


def command(monkeypatch, *arguments):
    """The command in this process, where HF_HUB_OFFLINE forbids the network."""
    monkeypatch.setattr(sys, "argv", ["hub_upload.py", *map(str, arguments)])
    hub_upload.main()


def test_failing_checkpoint_is_not_uploaded(make_processor, tmp_path, monkeypatch, capsys):
    model, processor = make_model(), make_processor()
    model.lm_head.weight.data[0, 0] = float("nan")
    model.save_pretrained(tmp_path / "broken")
    processor.save_pretrained(tmp_path / "broken")
    monkeypatch.setenv("HF_TOKEN", "hf_alice")
    with pytest.raises(SystemExit, match="Nothing was uploaded, because the folder does not pass"):
        command(monkeypatch, tmp_path / "broken", "alice/broken")
    printed = capsys.readouterr().out
    assert re.search(r"FAIL  weights .*holds NaN", printed) and "auto classes" not in printed
    assert (tmp_path / "broken-hub").is_dir()


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
        (missing_weights, ValueError, r"do not fit.*language_model\.norm\.weight"),
        (bad_json, ValueError, "not a JSON file"),
        (bad_card, ValueError, "The metadata of .*README.md cannot be read"),
        (shutil.rmtree, FileNotFoundError, "is no folder"),
    ],
)
def test_what_cannot_be_assembled(damage, error, message, checkpoint, tmp_path):
    damage(checkpoint)
    with pytest.raises(error, match=message):
        hub_upload.assemble(checkpoint, tmp_path / "output", repo_id=REPO)
    assert not [path for path in tmp_path.iterdir() if path != checkpoint]


def test_output_that_is_not_ours(checkpoint, tmp_path):
    (tmp_path / "output").mkdir()
    (tmp_path / "output" / "thesis.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="Choose another folder"):
        hub_upload.assemble(checkpoint, tmp_path / "output", repo_id=REPO)
    with pytest.raises(ValueError, match="holds the checkpoint"):
        hub_upload.assemble(checkpoint, tmp_path, repo_id=REPO)
    assert (tmp_path / "output" / "thesis.txt").read_text() == "mine"


def test_full_disk(checkpoint, tmp_path):
    """The limit of a file's size ends a write as a full disk does."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, limits[1]))
    try:
        with pytest.raises(OSError, match=r"No room to write .*output.*Free some space"):
            hub_upload.assemble(checkpoint, tmp_path / "output", repo_id=REPO)
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
        ("card", "README.md", b"---\nlicense: mit\n---\n", "does not say library_name"),
        ("versions", "config.json", b'{"transformers_version": "4.57.0"}', "transformers 4.57.0 is not >=5.16.1"),
    ],
)
def test_checks_of_files(check, file, content, message, published, tmp_path):
    folder = shutil.copytree(published[1], tmp_path / "folder")
    (folder / file).parent.mkdir(exist_ok=True)
    if content is None:
        (folder / file).unlink()
    else:
        (folder / file).write_bytes(content)
    function = getattr(hub_checks, f"check_{check}")
    result = hub_checks.run_check(check, lambda: function(folder))
    assert result.ok is (message is None)
    assert message is None or re.search(message, result.detail), result


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
        name: hub_checks.run_check(name, function)
        for name, function in hub_checks.Stranger(folder, checkpoint).checks().items()
    }
    assert found["auto classes"].ok and found["batch"].ok
    assert found["pipelines"].detail == "the caption in the card gives 'Green apple.' instead of 'Red apple.'"
    assert found["save and reload"].detail.startswith("generation_config.json saved again gives")
    assert re.match(r"the published model gives \['Red apple\.'\] instead of", found["same as source"].detail)
    missing_weights(folder)
    broken = hub_checks.run_check("auto classes", hub_checks.Stranger(folder, None).check_auto_classes)
    assert "do not fit" in broken.detail and "language_model.norm.weight" in broken.detail


def test_versions_are_those_of_the_package():
    project = (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")
    assert f'"transformers{hub_checks.TRANSFORMERS_RANGE}"' in project


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
    first = hub_upload.assemble(checkpoint, tmp_path / "first", repo_id="alice/cats")
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
    hub_checks.check_files(first), hub_checks.check_card(first)

    again = hub_upload.assemble(first, tmp_path / "again", repo_id="alice/cats")
    assert contents(again).keys() == contents(first).keys()
    different = {name for name, data in contents(first).items() if data != contents(again)[name]}
    assert different <= {"README.md"}  # whose facts of the training run stay behind
    relicensed = hub_upload.assemble(first, tmp_path / "again", repo_id="alice/cats", license="cc-by-4.0")
    assert ModelCard.load(relicensed / "README.md").data.license == "cc-by-4.0"


def test_card_of_a_checkpoint_without_one(make_processor, tmp_path):
    make_model("clip", moe=True).save_pretrained(tmp_path / "checkpoint")
    make_processor("clip").save_pretrained(tmp_path / "checkpoint")
    output = hub_upload.assemble(tmp_path / "checkpoint", tmp_path / "output", repo_id="alice/tiny-experts")
    card = ModelCard.load(output / "README.md")
    headings = re.findall(r"^##? .*", card.text, flags=re.MULTILINE)
    assert headings == ["# tiny-experts", "## Example", "## Model", "## Use", "## Limits", "## Citation"]
    assert card.data.license == "apache-2.0" and card.data.eval_results is None
    assert "| decoder | 2 layers of width 32, 4 heads (2 key/value), vocabulary 320, 4 experts, 2 active" in card.text
    assert ", 1 shared |" in card.text and " of them active for a token | " in card.text
    assert "vllm serve alice/tiny-experts --trust-remote-code" in card.text


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
    chat = [user(Image.open(REPOSITORY / "examples/images/apple.png"), hub_upload.PROMPT)]
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
    """MiniMind2 of the original project."""
    if not GOLDEN.is_dir():
        pytest.skip("no ../shared/golden beside the repository")
    load_case("g2_dense", folder.parent)
    return folder.parent / "g2_dense"


@pytest.mark.parametrize("make, private, caption", [(fine_tuned, False, "Sunflower."), (converted, True, None)])
def test_other_checkpoints(make, private, caption, hub, tmp_path, monkeypatch, capsys):
    """First as a dry run, which needs neither token nor network."""
    checkpoint, repo_id, folder = make(tmp_path / "checkpoint"), f"alice/{make.__name__}", tmp_path / "output"
    monkeypatch.delenv("HF_TOKEN", raising=False)
    capsys.readouterr()
    command(monkeypatch, checkpoint, repo_id, "--dry-run", "--output", folder)
    report, plan = capsys.readouterr().out.split("\n\n")
    assert "11 of 11 checks passed" in report and "same as source" in report, report
    listed = [line.split() for line in plan.splitlines()[1:-1]]
    hashes = hub_upload.list_files(folder)
    assert listed == [[f"{len(data):,}", hashes[name][:12], name] for name, data in sorted(contents(folder).items())]
    shown = ModelCard.load(folder / "README.md").data.widget[0]["output"]["text"]
    assert shown == (caption or shown)
    upload(hub, tmp_path, {"folder": folder, "repo_id": repo_id, "private": private})
    assert held(hub, repo_id) == contents(folder)


def test_loading_what_was_published(hub, published, tmp_path):
    """In a fresh process: the card's Python as it stands, pinned versions, and what the tests above published."""
    folder = shutil.copytree(published[1], tmp_path / "next")
    generation = json.loads((folder / "generation_config.json").read_text()) | {"max_new_tokens": 7}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    with (folder / "modeling_minimind_v.py").open("a") as code:
        code.write("PUBLISHED = 2\n")
    upload(hub, tmp_path, {"folder": folder})
    others = [name for name in ("alice/fine_tuned", "alice/converted") if name in hub.repositories]
    result = run([sys.executable, "-c", CONSUMER, REPO, *others], hub, tmp_path)
    found = json.loads(result.stdout.splitlines()[-1])
    assert found["blocks"] == 4 and found["printed"][:2] == [[{"generated_text": CAPTION}], [CAPTION]]
    assert len(found["printed"]) == 4 and found["printed"][3][0] == CAPTION
    assert found["pinned"] == {"main": [7, 2], "revision": [40, 1], "both": [40, 1]}
    assert found["captions"].keys() == set(others)
    assert all(answer == shown for answer, shown in found["captions"].values())
