"""Models of the original by their names: tower and tokenizer from here or the Hub, conversion once for every use."""

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import original
import pytest
import torch
from conftest import CHECKPOINT, png
from hub_server import HubServer, ModelScopeServer
from huggingface_hub import constants
from original import GOLDEN, TOKENIZERS, convert_case, read_json, release_of
from safetensors.torch import load_file

from minimind_v.conversion import RELEASES, convert_checkpoint, convert_once
from minimind_v.conversion.published import PUBLISHED
from minimind_v.conversion.sources import find_parts
from minimind_v.processing_minimind_v import MiniMindVProcessor
from minimind_v_cli.__main__ import main

NAMES = {
    "g0_dense": "jingyaogong/minimind-v-v1",
    "g1_dense": "jingyaogong/MiniMind2-V",
    "g2_moe": "jingyaogong/MiniMind2-V",
    "g3i_dense": "jingyaogong/minimind-3v",
    "g3p_dense": "jingyaogong/minimind-3v",
    "g3v_dense": "jingyaogong/minimind-3v",
}
CASES = [case for case in NAMES if case in original.CASES]


def read_folder(folder, names=None):
    return {path.name: path.read_bytes() for path in folder.iterdir() if names is None or path.name in names}


def tokenizer_files(release):
    return read_folder(GOLDEN / "tokenizers" / TOKENIZERS[release], ("tokenizer.json", "tokenizer_config.json"))


def weights(case, change=0.0):
    """The original's state dict as its scripts save it: without the tower."""
    state = torch.load(GOLDEN / case / "upstream.pth", weights_only=True)
    state = {name: tensor + change for name, tensor in state.items() if not name.startswith("vision_encoder.")}
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def release_of_case(case):
    return release_of(read_json(f"{case}/hparams.json"))


def model_repository(case, change=0.0):
    """Files of a repository in the original's transformers form."""
    config = read_json(f"{case}/hparams.json")["constructor_args"] | {
        "model_type": "minimind" if case == "g0_dense" else "minimind-v",
        "auto_map": {"AutoConfig": "model_vlm.VLMConfig", "AutoModelForCausalLM": "model_vlm.MiniMindVLM"},
    }
    files = {"config.json": json.dumps(config).encode(), "pytorch_model.bin": weights(case, change)}
    return (
        files | tokenizer_files(release_of_case(case)) | {"model_vlm.py": b"raise SystemExit('code of a repository')"}
    )


def tower_repository(case):
    """Files of the tower's repository; CLIP's has no safetensors, but other forms of the weights."""
    folder = GOLDEN / case / "vision_encoder"
    files = read_folder(folder)
    if case in ("g0_dense", "g1_dense", "g2_moe"):
        buffer = io.BytesIO()
        torch.save(load_file(folder / "model.safetensors"), buffer)
        del files["model.safetensors"]
        files |= {"pytorch_model.bin": buffer.getvalue(), "tf_model.h5": b"never fetched"}
    return files


def write_folder(folder, files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture
def hub():
    with HubServer() as server:
        yield server


@pytest.fixture
def publish(hub):
    """Puts what a case needs on the Hub; what is said of it may be changed."""

    def publish(case, **model_changes):
        source = PUBLISHED[release_of_case(case)]
        hub.publish(source.tower.hub, tower_repository(case))
        hub.publish(source.tokenizer.hub, model_repository(case))
        return hub.publish(NAMES[case], model_repository(case, **model_changes))

    return publish


@pytest.fixture
def online(hub, tmp_path, monkeypatch):
    """The client in this process, in front of this Hub and with an empty cache."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    template = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "home" / "hub"))
    monkeypatch.chdir(tmp_path)


def run(folder, *arguments, endpoint="http://127.0.0.1:9", offline=False, **variables):
    """The command in a fresh process, which works in `folder` and has its cache there."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "PYTEST"))}
    environment |= {"HF_HOME": str(folder / "home"), "HF_ENDPOINT": endpoint, "OMP_NUM_THREADS": "1"}
    environment |= {"HF_HUB_DISABLE_XET": "1"} | ({"HF_HUB_OFFLINE": "1"} if offline else {}) | variables
    command = [sys.executable, "-m", "minimind_v_cli", *map(str, arguments)]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)


def assert_same_model(folder, case):
    """Tensors, processor and template are those of a conversion with everything given."""
    expected = convert_case(case)
    ours, theirs = (load_file(path / "model.safetensors") for path in (folder, expected))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    for name in ("tokenizer.json", "chat_template.jinja", "processor_config.json"):
        assert (folder / name).read_bytes() == (expected / name).read_bytes(), name


# --- convert ---------------------------------------------------------------------------------------------------------


def test_every_release_has_its_sources():
    assert RELEASES.keys() <= PUBLISHED.keys()
    for source in PUBLISHED.values():
        assert Path(source.tower_folder).name == source.tower.hub.partition("/")[2]


@pytest.mark.parametrize("case", CASES)
def test_repository_of_the_original(case, publish, online, tmp_path):
    publish(case)
    summary = convert_checkpoint(NAMES[case], tmp_path / "ours")
    assert_same_model(summary.output, case)
    assert f"vision tower of {PUBLISHED[summary.release].tower.hub}" in str(summary)


@pytest.mark.parametrize("case", CASES)
def test_file_of_weights(case, publish, online, hub, tmp_path):
    publish(case)
    (tmp_path / "sft.pth").write_bytes(weights(case))
    arguments = read_json(f"{case}/hparams.json")["constructor_args"]
    summary = convert_checkpoint("sft.pth", "ours", original_config=arguments)
    assert_same_model(summary.output, case)
    fetched = [line for line in hub.log if line.startswith("GET /") and "/resolve/" in line]
    assert fetched and not [line for line in fetched if ".h5" in line or line.endswith("/model_vlm.py")]
    assert len([line for line in fetched if ".bin" in line or ".safetensors" in line]) == 1  # the tower's, once


def test_command(publish, hub, tmp_path):
    """In a fresh process as a user has it; then once more from the cache, without a connection."""
    publish("g3v_dense")
    result = run(tmp_path, "convert", "jingyaogong/minimind-3v", "ours", endpoint=hub.url)
    assert result.returncode == 0 and "100%" in result.stderr, result.stderr[-2000:]
    assert_same_model(tmp_path / "ours", "g3v_dense")
    result = run(tmp_path, "convert", "jingyaogong/minimind-3v", "again", offline=True)
    assert result.returncode == 0, result.stderr[-2000:]
    assert_same_model(tmp_path / "again", "g3v_dense")


@pytest.mark.parametrize("offline", [True, False])
def test_what_cannot_be_had_is_listed(offline, tmp_path):
    (tmp_path / "sft_vlm_512.pth").write_bytes(weights("g2_moe"))
    result = run(tmp_path, "convert", "sft_vlm_512.pth", "ours", offline=offline)
    assert result.returncode == 1 and result.stderr.count("\n") == 1 and not (tmp_path / "ours").exists()
    tower = "hf download openai/clip-vit-base-patch16 --local-dir ./model/vision_model/clip-vit-base-patch16"
    tokenizer = "hf download jingyaogong/MiniMind2-V tokenizer.json tokenizer_config.json --local-dir ./model"
    assert f"run {tower} && {tokenizer} (here, or where the checkpoint is)" in result.stderr, result.stderr
    assert "name what you have with --vision-encoder and --tokenizer of minimind-v convert" in result.stderr
    assert ("HF_HUB_OFFLINE is set" if offline else "(no connection)") in result.stderr
    if not offline:
        return
    # Doing what it says is enough.
    write_folder(tmp_path / "model", tokenizer_files("minimind2"))
    write_folder(tmp_path / "model" / "vision_model" / "clip-vit-base-patch16", tower_repository("g2_moe"))
    arguments = read_json("g2_moe/hparams.json")["constructor_args"]
    (tmp_path / "arguments.json").write_text(json.dumps(arguments))
    result = run(tmp_path, "convert", "sft_vlm_512.pth", "ours", "--config", "arguments.json", offline=True)
    assert result.returncode == 0, result.stderr
    assert_same_model(tmp_path / "ours", "g2_moe")


@pytest.mark.parametrize("command", ["convert jingyaogong/minimind-3v ours", "compare a.png a.png --model {}"])
def test_what_a_name_needs_is_listed(command, tmp_path, monkeypatch):
    """The model and its tower, in one line."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(SystemExit) as end:
        main(command.format("jingyaogong/minimind-3v").split())
    assert re.search(
        r"minimind-3v is not in the cache and was not fetched \(HF_HUB_OFFLINE is set\)\. .* run "
        r"hf download jingyaogong/minimind-3v --local-dir \./minimind-3v && "
        r"hf download jingyaogong/siglip2-base-p32-256-ve --local-dir \./model/siglip2-base-p32-256-ve, "
        r"and name the folder \./minimind-3v \(",
        str(end.value.code),
    )


def test_without_a_tokenizer_the_model_is_converted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    summary = convert_checkpoint(
        GOLDEN / "g3v_dense" / "upstream.pth", "ours", vision_encoder=GOLDEN / "g3v_dense" / "vision_encoder"
    )
    assert "hf download jingyaogong/minimind-3v tokenizer.json tokenizer_config.json --local-dir ./model" in str(
        summary
    )
    assert (tmp_path / "ours" / "model.safetensors").exists()


@pytest.mark.parametrize("release", PUBLISHED)
@pytest.mark.parametrize("place", ["current", "checkpoint", "above", "beside"])
def test_folders_of_the_originals_readme(release, place, tmp_path, monkeypatch):
    """From a clone of the original, or with a checkpoint in its folder `out`; a tokenizer of another is left alone."""
    source = PUBLISHED[release]
    clone, elsewhere = tmp_path / "minimind-v", write_folder(tmp_path / "elsewhere", {})
    tower = write_folder(clone / source.tower_folder, {"config.json": b"{}", "model.safetensors": bytes(2000)})
    kind = {"minimind1": "minimind2-early", "minimind3-naflex": "minimind3", "minimind3-p16": "minimind3"}
    files = tokenizer_files(kind.get(release, release))
    tokenizer = write_folder(clone / source.tokenizer_folder, files)
    near = {"current": elsewhere, "checkpoint": clone, "above": write_folder(clone / "out", {}), "beside": elsewhere}
    monkeypatch.chdir(clone if place == "current" else elsewhere)
    if place == "beside":
        tower = tower.rename(elsewhere / tower.name)
        found, _, _ = find_parts(release, elsewhere, needs_tower=True, needs_tokenizer=False)
        assert found.resolve() == tower
        return
    found = find_parts(release, near[place], needs_tower=True, needs_tokenizer=True)
    assert [path.resolve() for path in found[:2]] == [tower, tokenizer] and len(found[2]) == 2
    other = "minimind2" if files == tokenizer_files("minimind3") else "minimind3"
    write_folder(tokenizer, tokenizer_files(other))
    (tower / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")  # cloned without LFS
    with pytest.raises(ValueError, match="no vision tower and no tokenizer of"):
        find_parts(release, near[place], needs_tower=True, needs_tokenizer=True)


# --- ModelScope ------------------------------------------------------------------------------------------------------


def test_from_modelscope(tmp_path):
    """Without a connection to the Hub; under the Hub's names, and under its own."""
    pytest.importorskip("modelscope")
    files = {"gongjy/minimind-3v": model_repository("g3v_dense")}
    files["gongjy/siglip2-base-p32-256-ve"] = tower_repository("g3v_dense")
    (tmp_path / "sft.pth").write_bytes(weights("g3v_dense"))
    (tmp_path / "arguments.json").write_text(json.dumps(read_json("g3v_dense/hparams.json")["constructor_args"]))
    with ModelScopeServer(files) as server:
        variables = {"MODELSCOPE_ENDPOINT": server.url, "MODELSCOPE_CACHE": str(tmp_path / "modelscope")}
        for number, source in enumerate(["jingyaogong/minimind-3v", "gongjy/minimind-3v", "sft.pth"]):
            config = ["--config", "arguments.json"] if source == "sft.pth" else []
            result = run(
                tmp_path,
                "convert",
                source,
                f"ours{number}",
                *config,
                "--from",
                "modelscope",
                offline=True,
                **variables,
            )
            assert result.returncode == 0, result.stderr[-2000:]
            assert_same_model(tmp_path / f"ours{number}", "g3v_dense")
        assert not [line for line in server.log if line.endswith(".py")]
        (tmp_path / "sft.pth").write_bytes(weights("g2_moe"))
        result = run(tmp_path, "convert", "sft.pth", "ours", "--from", "modelscope", offline=True, **variables)
    wanted = (
        "run modelscope download --model openai-mirror/clip-vit-base-patch16 --local_dir ./model/vision_model/clip"
    )
    assert result.returncode == 1 and wanted in result.stderr, result.stderr


def test_modelscope_is_an_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "modelscope", None)
    with pytest.raises(ImportError, match=r"pip install 'minimind-v\[modelscope\]'"):
        convert_checkpoint("gongjy/minimind-3v", tmp_path / "ours", hub="modelscope")


# --- caption, chat, compare ------------------------------------------------------------------------------------------


def caption(folder, model, **options):
    """What the command answers, and what it says of a conversion."""
    result = run(folder, "caption", "a.png", "--model", model, "--max-new-tokens", "8", **options)
    assert result.returncode == 0, result.stderr[-2000:]
    record = json.loads(result.stdout)
    assert record["model"] == str(model)
    return record["caption"], [line for line in result.stderr.splitlines() if "original project" in line]


def test_caption_by_a_name_of_the_original(publish, hub, tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    commit = publish("g3v_dense")
    first, said = caption(tmp_path, "jingyaogong/minimind-3v", endpoint=hub.url)
    [converted] = (tmp_path / "home" / "minimind-v" / "converted").glob("*/*")
    assert converted.name == f"jingyaogong--minimind-3v-{commit[:12]}" and len(said) == 1 and str(converted) in said[0]
    assert_same_model(converted, "g3v_dense")
    assert not list(converted.parent.glob(".*"))
    commit = publish("g3v_dense", change=0.1)
    for options in ({"offline": True}, {}):  # the revision that is here, also where nobody has set the variable
        assert caption(tmp_path, "jingyaogong/minimind-3v", **options) == (first, [])
    second, said = caption(tmp_path, "jingyaogong/minimind-3v", endpoint=hub.url)
    assert second != first and len(said) == 1 and commit[:12] in said[0]


def test_file_of_the_original_is_converted_again_when_it_changes(online, publish, tmp_path):
    publish("g2_moe")
    said = []
    (tmp_path / "sft.pth").write_bytes(weights("g2_moe"))
    first = convert_once("sft.pth", said.append)
    assert convert_once(tmp_path / "sft.pth", said.append) == first and len(said) == 1
    assert MiniMindVProcessor.from_pretrained(first).image_token == "<|image_pad|>"
    (tmp_path / "sft.pth").write_bytes(weights("g2_moe", change=0.1))
    second = convert_once("sft.pth", said.append)
    assert second != first and len(said) == 2
    publish("g3v_dense")
    folder = write_folder(tmp_path / "minimind-3v", model_repository("g3v_dense"))
    third = convert_once(folder, said.append)
    assert_same_model(third, "g3v_dense")


def test_two_processes_share_one_conversion(publish, hub, tmp_path):
    publish("g3v_dense")
    code = (
        "import sys; from minimind_v.conversion import convert_once; print(convert_once(sys.argv[1], lambda _: None))"
    )
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "PYTEST"))}
    environment |= {"HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-c", code, "jingyaogong/minimind-3v"]
    running = [
        subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    found = {process.communicate(timeout=120)[0] for process in running}
    assert len(found) == 1 and [process.returncode for process in running] == [0, 0]
    assert_same_model(Path(found.pop().strip()), "g3v_dense")


def test_without_a_tokenizer_nothing_is_kept(online, publish, hub, tmp_path):
    """A model without it cannot answer, and must not stand in the way when the tokenizer can be had."""
    publish("g3v_dense")
    files = model_repository("g3v_dense")
    hub.publish("bob/minimind-3v", {name: files[name] for name in ("config.json", "pytorch_model.bin")})
    tokenizer = hub.repositories.pop("jingyaogong/minimind-3v")
    with pytest.raises(FileNotFoundError, match=r"no tokenizer .*hf download jingyaogong/minimind-3v tokenizer\.json"):
        convert_once("bob/minimind-3v")
    assert not list((tmp_path / "home").glob("minimind-v/converted/*/*"))
    hub.repositories["jingyaogong/minimind-3v"] = tokenizer
    assert_same_model(convert_once("bob/minimind-3v"), "g3v_dense")


def test_repository_of_weights_alone(online, hub):
    hub.publish("jingyaogong/minimind-3v-pytorch", {"sft_vlm_768.pth": weights("g3v_dense"), "README.md": b"Weights."})
    for use in (convert_once, lambda name: convert_checkpoint(name, "ours")):
        with pytest.raises(
            FileNotFoundError, match=r"hf download jingyaogong/minimind-3v-pytorch FILE\.pth --local-dir"
        ):
            use("jingyaogong/minimind-3v-pytorch")


def test_what_is_not_the_originals_is_used_as_it_is(online, hub, tmp_path, monkeypatch):
    hub.publish("alice/emoji", read_folder(CHECKPOINT))
    text = {
        "model_type": "minimind",
        "auto_map": {"AutoConfig": "alice/text--configuration_minimind_v.MiniMindConfig"},
    }
    hub.publish("alice/text", {"config.json": json.dumps(text).encode()})
    with (
        monkeypatch.context() as patch,
        pytest.raises(FileNotFoundError, match="run hf download jingyaogong/minimind-3v"),
    ):
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        convert_once("jingyaogong/minimind-3v", pytest.fail)
    with pytest.raises(FileNotFoundError, match=r"alice/missing .*\(there is no such repository, or it is private\)"):
        convert_once("alice/missing", pytest.fail)
    for source in (CHECKPOINT, "alice/emoji", "alice/text", "no/folder/at/all"):
        assert convert_once(source, pytest.fail) == source
    assert not (tmp_path / "home" / "minimind-v").exists()
