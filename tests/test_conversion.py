"""The converter: round trips, real sizes, tokenizers, hostile and interrupted input. (Its numbers: test_golden.py)"""

import json
import os
import pickle
import re
import subprocess
import sys

import pytest
import torch
from conftest import picture
from original import CASES, GENERATIONS, GOLDEN, TOKENIZERS, load_case, read_json
from PIL import Image
from safetensors.torch import load_file, save_file
from test_travel import run_elsewhere
from transformers import AutoModelForCausalLM, AutoProcessor, AutoTokenizer, CLIPVisionConfig, CLIPVisionModel

from minimind_v import MiniMindForCausalLM, MiniMindVConfig, MiniMindVForConditionalGeneration
from minimind_v.conversion import convert_checkpoint
from minimind_v.conversion.configurations import text_config
from minimind_v.conversion.convert import fill_model, vision_language_config
from minimind_v.conversion.key_maps import detect_generation, from_original, ignored_reason, rename
from minimind_v.conversion.tokenizers import wrap_tokenizer
from minimind_v.export import export_text_backbone, export_to_original

golden = pytest.mark.skipif(not GOLDEN.is_dir(), reason="no ../shared/golden beside the repository")
PARITY = [("minimind2", "minimind2-early"), ("minimind2_im", "minimind2"), ("minimind3", "minimind3")]


# --- There and back -------------------------------------------------------------------------------------------------


@golden
@pytest.mark.parametrize("case", CASES)
def test_export_gives_back_the_original_tensors(case, tmp_path):
    load_case(case, tmp_path)
    exported = torch.load(export_to_original(tmp_path / case, tmp_path / "back.pth"), weights_only=True)
    original = torch.load(GOLDEN / case / "upstream.pth", weights_only=True)
    assert exported.keys() == {name for name in original if not name.startswith("vision_encoder.")}
    for name, tensor in exported.items():
        assert torch.equal(tensor, original[name]) and tensor.dtype == original[name].dtype, name
    with_tower = export_to_original(tmp_path / case, tmp_path / "tower.pth", include_tower=True)
    with_tower = torch.load(with_tower, weights_only=True)
    for name in with_tower.keys() - exported.keys():
        assert name not in original or torch.equal(with_tower[name], original[name])
    again = convert_checkpoint(
        tmp_path / "back.pth",
        tmp_path / "again",
        vision_encoder=GOLDEN / case / "vision_encoder",
        original_config=read_json(f"{case}/hparams.json")["constructor_args"],
    )
    first, second = (load_file(folder / "model.safetensors") for folder in (tmp_path / case, again))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@golden
@pytest.mark.parametrize("case", CASES)
def test_text_backbone_is_a_model_of_the_library(case, tmp_path):
    model, hparams = load_case(case, tmp_path)
    if hparams["moe"] and hparams["generation_id"] != "G4":
        with pytest.raises(ValueError, match="No model of the library computes MiniMind2's experts"):
            export_text_backbone(tmp_path / case, tmp_path / "text")
        assert not (tmp_path / "text").exists()
        return
    backbone = AutoModelForCausalLM.from_pretrained(export_text_backbone(tmp_path / case, tmp_path / "text")).eval()
    kinds = {"g1_dense": "Llama", "g2_dense": "Llama", "g3v_dense": "Qwen3", "g3v_moe": "Qwen3Moe"}
    assert type(backbone).__name__ == kinds[case] + "ForCausalLM"
    ids = torch.randint(40, 6400, (2, 20))
    assert (backbone(ids).logits - model(ids).logits).abs().max() == 0
    assert AutoTokenizer.from_pretrained(tmp_path / "text")("你好").input_ids


@golden
def test_early_and_later_release_of_the_same_weights_agree(tmp_path):
    """Both names of one tensor set: the row order of q and k is the only difference."""
    state = torch.load(GOLDEN / "g1_dense" / "upstream.pth", weights_only=True)
    args = read_json("g1_dense/hparams.json")["constructor_args"]
    early, _ = load_case("g1_dense", tmp_path)
    later = {rename(name, "minimind2-early"): tensor for name, tensor in state.items() if not ignored_reason(name)}
    rotated = from_original({n: t for n, t in state.items() if not ignored_reason(n)}, "minimind2-early", 12)
    changed = {name for name in later if not torch.equal(later[name], rotated[name])}
    assert changed and all(name.endswith(("q_proj.weight", "k_proj.weight")) for name in changed)
    assert early.config.text_config.head_dim == args["dim"] // args["n_heads"]


# --- Other forms of input -------------------------------------------------------------------------------------------


@golden
def test_folder_in_the_originals_transformers_form(tmp_path):
    """bfloat16 `pytorch_model.bin`, tokenizer files and configuration in one folder; expected in float32."""
    output = convert_checkpoint(
        GOLDEN / "g3v_dense_hf", tmp_path / "out", vision_encoder=GOLDEN / "g3v_dense" / "vision_encoder"
    )
    stored = load_file(output / "model.safetensors")
    assert stored["model.language_model.norm.weight"].dtype == torch.bfloat16
    model = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32).eval()
    inputs = load_file(GOLDEN / "g3v_dense" / "inputs.safetensors")
    expected = load_file(GOLDEN / "g3v_dense_hf" / "expected.safetensors")
    images = torch.nn.functional.interpolate(inputs["images_small"], scale_factor=4, mode="nearest")
    for sub_case in ("text", "one_image"):
        options = {}
        if sub_case == "one_image":
            options["pixel_values"] = images[inputs["one_image.image_index"].flatten()]
        with torch.no_grad():
            logits = model(inputs[f"{sub_case}.input_ids"], **options).logits
        names = [name for name in expected if name.startswith(sub_case)]
        assert f"{sub_case}.logsumexp" in names
        torch.testing.assert_close(logits.logsumexp(-1), expected[f"{sub_case}.logsumexp"], atol=2e-4, rtol=1e-4)
        if f"{sub_case}.logits_cols" in names:
            columns = logits[..., inputs["cols"]]
            torch.testing.assert_close(columns, expected[f"{sub_case}.logits_cols"], atol=2e-4, rtol=1e-4)
    processor = AutoProcessor.from_pretrained(output)
    assert processor.image_seq_length == 64 and processor.image_token_id == 12


@golden
@pytest.mark.parametrize("case", ["g2_moe", "g3v_moe"])
def test_stripped_half_precision_and_prefixed_tensors(case, tmp_path):
    """As the original's training scripts save: no tower, float16; here also with the prefix of torch.compile."""
    state = torch.load(GOLDEN / case / "upstream.pth", weights_only=True)
    half = {f"_orig_mod.{k}": v.half() for k, v in state.items() if not k.startswith("vision_encoder.")}
    half["_orig_mod.mask"] = torch.zeros(1)
    torch.save(half, tmp_path / "half.pth")
    options = {"original_config": read_json(f"{case}/hparams.json")["constructor_args"]}
    with pytest.raises(ValueError, match=r"no vision tower.*--vision-encoder"):
        convert_checkpoint(tmp_path / "half.pth", tmp_path / "out", **options)
    options["vision_encoder"] = GOLDEN / case / "vision_encoder"
    stored = load_file(convert_checkpoint(tmp_path / "half.pth", tmp_path / "out", **options) / "model.safetensors")
    assert stored["model.language_model.embed_tokens.weight"].dtype == torch.float16
    whole = convert_checkpoint(tmp_path / "half.pth", tmp_path / "bf16", **options, dtype=torch.bfloat16)
    assert {t.dtype for t in load_file(whole / "model.safetensors").values()} == {torch.bfloat16}


@golden
@pytest.mark.parametrize("case", ["g1_dense", "g3v_moe"])
def test_text_only_checkpoint(case, tmp_path):
    hparams = read_json(f"{case}/hparams.json")
    state = torch.load(GOLDEN / case / "upstream.pth", weights_only=True)
    torch.save({k: v for k, v in state.items() if not k.startswith("vision_")}, tmp_path / "llm.pth")
    options = {"original_config": hparams["constructor_args"]}
    options["tokenizer"] = GOLDEN / "tokenizers" / TOKENIZERS[hparams["generation_id"]]
    text = convert_checkpoint(tmp_path / "llm.pth", tmp_path / "text", **options)
    model = AutoModelForCausalLM.from_pretrained(text).eval()
    assert type(model) is MiniMindForCausalLM
    expected = load_file(GOLDEN / case / "expected.safetensors")["text.logits"]
    ids = load_file(GOLDEN / case / "inputs.safetensors")["text.input_ids"]
    torch.testing.assert_close(model(ids).logits, expected, atol=2e-4, rtol=1e-4)
    options["vision_encoder"] = GOLDEN / case / "vision_encoder"
    start = AutoModelForCausalLM.from_pretrained(convert_checkpoint(tmp_path / "llm.pth", tmp_path / "vlm", **options))
    assert type(start) is MiniMindVForConditionalGeneration
    torch.testing.assert_close(start.eval()(ids).logits, expected, atol=2e-4, rtol=1e-4)
    projector = dict(start.model.multi_modal_projector.named_parameters())
    assert projector and all(parameter.isfinite().all() for parameter in projector.values())


def test_tower_in_the_checkpoint_needs_no_folder(tmp_path):
    """The tower's sizes are read from its tensors; random ones, with the usual head size of 64."""
    tower = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=1, patch_size=16
        )
    )
    model = MiniMindVForConditionalGeneration(
        MiniMindVConfig(
            text_config={"hidden_size": 64, "num_hidden_layers": 1, "use_qk_norm": False, "intermediate_size": 64},
            vision_config=tower.config,
            image_token_id=34,
            projector_type="linear",
        )
    )
    model.save_pretrained(tmp_path / "ours")
    export_to_original(tmp_path / "ours", tmp_path / "full.pth", include_tower=True)
    loaded = AutoModelForCausalLM.from_pretrained(convert_checkpoint(tmp_path / "full.pth", tmp_path / "out"))
    assert loaded.config.vision_config.image_size == 224 and loaded.config.image_seq_length == 196
    for name, parameter in model.named_parameters():
        assert torch.equal(loaded.get_parameter(name), parameter), name


# --- Real sizes -----------------------------------------------------------------------------------------------------


@golden
@pytest.mark.parametrize(
    "file, millions",
    [
        ("g1_512x8", 25.83),
        ("g1_768x16", 104.03),
        ("g2_512x8", 25.83),
        ("g2_768x16", 104.03),
        ("g3v_768x8", 63.91),
        ("g3v_moe_768x8", 198.42),
    ],
)
def test_released_sizes(file, millions):
    """Recorded names and shapes, on the meta device: none left over, none missing, and the published sizes."""
    with torch.device("meta"):
        state = {name: torch.empty(shape) for name, shape in read_json(f"keys_{file}.json").items()}
    generation = detect_generation(list(state))
    state = {name: tensor for name, tensor in state.items() if not ignored_reason(name)}
    shapes = {rename(name, generation): tensor.shape for name, tensor in state.items()}
    decoder, _ = text_config(shapes, generation, {})
    tower = CLIPVisionConfig(patch_size=16) if generation != "minimind3" else MiniMindVConfig().vision_config
    config = vision_language_config(decoder, tower)
    mapped = from_original(state, generation, decoder.head_dim)
    del mapped["lm_head.weight"]
    with torch.device("meta"):
        model = MiniMindVForConditionalGeneration(config)
    if generation == "minimind3":  # its checkpoints have no tower
        mapped |= {name: tensor for name, tensor in model.state_dict().items() if "vision_tower" in name}
    filled = fill_model(MiniMindVForConditionalGeneration, config, mapped, fresh_projector=False)
    count = sum(parameter.numel() for parameter in filled.model.language_model.parameters())
    assert round(count / 1e6, 2) == millions


def test_conversion_of_a_real_size_is_fast_and_small(tmp_path):
    """26M decoder and CLIP-B/16 with random weights: under a minute, under 3 GB, from a fresh process."""
    program = """
import resource, sys, time, torch
from transformers import CLIPVisionConfig
from minimind_v import MiniMindVConfig, MiniMindVForConditionalGeneration
from minimind_v.conversion import convert_checkpoint
from minimind_v.export import export_to_original
folder = sys.argv[1]
text = {"hidden_size": 512, "num_hidden_layers": 8, "num_key_value_heads": 2, "intermediate_size": 1408,
        "use_qk_norm": False, "rms_norm_eps": 1e-5}
config = MiniMindVConfig(text_config=text, vision_config=CLIPVisionConfig(patch_size=16), image_token_id=34,
                         projector_type="linear")
if sys.argv[2] == "write":
    MiniMindVForConditionalGeneration(config).save_pretrained(folder + "/ours")
    export_to_original(folder + "/ours", folder + "/random.pth", include_tower=True)
else:
    start = time.monotonic()
    convert_checkpoint(folder + "/random.pth", folder + "/out")
    print(time.monotonic() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
"""
    for step in ("write", "convert"):
        command = [sys.executable, "-c", program, str(tmp_path), step]
        result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    seconds, gigabytes = map(float, result.stdout.split())
    assert seconds < 60 and gigabytes < 3


# --- Tokenizers and pictures ----------------------------------------------------------------------------------------


@golden
@pytest.mark.parametrize("name, generation", PARITY)
def test_tokenizer_parity(name, generation):
    """Every recorded rendering, id and decoding, and the same chats written as lists of parts."""
    tokenizer = wrap_tokenizer(GOLDEN / "tokenizers" / name, generation, 32768)
    recorded = read_json(f"tokenizers/parity_{name}.json")
    marker, placeholder = recorded["image_marker"], recorded["image_text"] * recorded["image_repeat"]
    single = placeholder if generation != "minimind3" else recorded["image_text"]
    compared = 0
    for chat in recorded["conversations"]:
        messages = [dict(message) for message in chat["messages"]]
        parts = [dict(message) for message in chat["messages"]]
        for message, with_parts in zip(messages, parts, strict=True):
            if message["role"] != "system" and message.get("content"):
                pieces = re.split(f"({re.escape(marker)})", message["content"])
                with_parts["content"] = [
                    {"type": "image"} if piece == marker else {"type": "text", "text": piece} for piece in pieces
                ]
                message["content"] = message["content"].replace(marker, placeholder)
        for render in chat["render"]:
            expected = chat["render"][render["same_as"]] if "same_as" in render else render
            options = {"tokenize": False, "tools": chat.get("tools"), **render["kwargs"]}
            text = tokenizer.apply_chat_template(messages, **options)
            assert text == expected["text"]
            assert tokenizer(text)["input_ids"] == expected["ids"]
            if "tool_response" not in str(messages):
                assert tokenizer.apply_chat_template(parts, **options).replace(single, placeholder) == expected["text"]
            compared += 1
    for raw in recorded["raw"]:
        assert tokenizer(raw["text"])["input_ids"] == raw["ids"]
        assert tokenizer.decode(raw["ids"]) == raw["decoded"]
        assert tokenizer.decode(raw["ids"], skip_special_tokens=True) == raw["decoded_skip_special"]
    assert compared >= 58


@golden
@pytest.mark.parametrize("name, generation", PARITY)
def test_training_labels(name, generation):
    """What the generation blocks of the template mark is what the original trains on."""
    tokenizer = wrap_tokenizer(GOLDEN / "tokenizers" / name, generation, 32768)
    recorded = read_json(f"tokenizers/parity_{name}.json")
    compared, by_index = 0, {chat["index"]: chat for chat in recorded["conversations"]}
    for row in recorded["training"]:
        chat = by_index[row["index"]]
        if generation == "minimind2-early" and chat["messages"][-1]["role"] != "assistant":
            continue  # without an answer at its end, the first release trains on everything up to max_length
        placeholder = recorded["image_text"] * recorded["image_repeat"]
        # The original's data set takes nothing but role and content.
        messages = [{"role": message["role"], "content": message["content"]} for message in chat["messages"]]
        for message in messages:
            if message["role"] != "system":
                message["content"] = message["content"].replace(recorded["image_marker"], placeholder)
        encoded = tokenizer.apply_chat_template(
            messages, tools=chat.get("tools"), tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        compared += 1
        length = row["max_length"]
        ids = (encoded["input_ids"] + [tokenizer.pad_token_id] * length)[:length]
        mask = (list(encoded["assistant_masks"]) + [0] * length)[:length]
        assert ids == row["input_ids"]
        labels = [token if keep else -100 for token, keep in zip(ids, mask, strict=True)]
        expected = row["labels"] if generation == "minimind3" else row["equivalent_labels"]
        if generation != "minimind2-early":
            assert labels == expected
        else:  # the first release trained one token too late: not on the first of an answer, but on the one after it
            late = [0, *mask[:-1]]
            assert [token if keep else -100 for token, keep in zip(ids, late, strict=True)] == expected
    assert compared >= 8


@golden
@pytest.mark.parametrize("case, family", [("g2_dense", "clip"), ("g3v_dense", "siglip")])
def test_image_processor_grids(case, family, tmp_path):
    load_case(case, tmp_path)
    processor = AutoProcessor.from_pretrained(tmp_path / case)
    expected = load_file(GOLDEN / "images" / "expected.safetensors")
    pictures = sorted((GOLDEN / "images").glob("*.png"))
    assert len(pictures) == 3
    for path in pictures:
        image = Image.open(path).convert("RGB")  # as the original: alpha is cut off, not put on white
        values = processor(text=processor.image_token, images=image, return_tensors="pt")["pixel_values"]
        key = f"{family}.{path.stem}"
        torch.testing.assert_close(values[:, :, 4::8, 4::8].squeeze(0), expected[f"{key}.grid"].squeeze(0))
        torch.testing.assert_close(values.mean(dim=(0, 2, 3)), expected[f"{key}.mean"].flatten(), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(values.std(dim=(0, 2, 3)), expected[f"{key}.std"].flatten(), atol=1e-3, rtol=1e-3)


@golden
@pytest.mark.parametrize("case", ["g1_dense", "g2_moe", "g3v_dense"])
def test_converted_checkpoint_answers_questions(case, tmp_path):
    """Processor and model together: a chat with a picture and an e-mail address."""
    model, hparams = load_case(case, tmp_path)
    processor = AutoProcessor.from_pretrained(tmp_path / case)
    chat = [{"role": "user", "content": [{"type": "image", "image": picture()}, {"type": "text", "text": "me@home?"}]}]
    inputs = processor.apply_chat_template(
        chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    generated = model.generate(**inputs, max_new_tokens=5, do_sample=False)
    assert generated.shape[1] > inputs["input_ids"].shape[1]
    assert processor.tokenizer.padding_side == "left" and hparams["image_token_len"] == processor.image_seq_length


@golden
@pytest.mark.parametrize("case", ["g1_moe", "g3v_dense"])
def test_converted_checkpoint_travels(case, tmp_path):
    """In a fresh process, without this package: still the recorded logits."""
    load_case(case, tmp_path)
    ids = load_file(GOLDEN / case / "inputs.safetensors")["text.input_ids"]
    program = """
import json, sys, torch
sys.modules["minimind_v"] = None
from transformers import AutoModelForCausalLM, AutoProcessor
AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
print(json.dumps(model(torch.tensor(json.loads(sys.argv[2]))).logits.tolist()))
"""
    logits = torch.tensor(run_elsewhere(program, tmp_path / case, json.dumps(ids.tolist()), folder=tmp_path))
    expected = load_file(GOLDEN / case / "expected.safetensors")["text.logits"]
    torch.testing.assert_close(logits, expected, atol=2e-4, rtol=1e-4)


# --- Hostile and interrupted input ----------------------------------------------------------------------------------


class Evil:
    def __reduce__(self):
        return (os.system, ("touch pickle-was-executed",))


@golden
@pytest.mark.parametrize(
    "content, message",
    [
        (b"this is a text file", "cannot be read as a checkpoint of tensors"),
        (b"", "cannot be read as a checkpoint of tensors"),
        (b"PK\x03\x04 truncated", "cannot be read as a checkpoint of tensors"),
        (pickle.dumps(Evil()), "cannot be read as a checkpoint of tensors"),
        ("evil", "cannot be read as a checkpoint of tensors"),
        (["a", "list"], "does not hold a state dict"),
        ({"epoch": 3}, "does not hold a state dict"),
        ({"model": {"a": torch.zeros(1)}, "optimizer": {}}, "is not a checkpoint of MiniMind: its tensors .*'a'"),
        ({"bert.weight": torch.zeros(1)}, "is not a checkpoint of MiniMind"),
        ({}, "does not hold a state dict"),
    ],
    ids=str,
)
def test_files_that_are_no_checkpoints(content, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "file.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save({"model.embed_tokens.weight": Evil()} if content == "evil" else content, path)
    with pytest.raises(ValueError, match=message) as caught:
        convert_checkpoint(path, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert [file.name for file in tmp_path.iterdir()] == ["file.pth"]


@golden
@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s: s.pop("model.layers.1.self_attn.k_proj.weight"), r"missing: .*layers.1.self_attn.k_proj"),
        (lambda s: s.pop("model.layers.0.self_attn.k_proj.weight"), r"Missing tensor for minimind3: .*k_proj"),
        (lambda s: s.update({"model.layers.0.extra.weight": torch.zeros(2)}), r"unknown: .*layers.0.extra.weight"),
        (lambda s: s.update({"surprise": torch.zeros(2)}), "Unknown tensors for minimind3: surprise"),
        (lambda s: s.update({"model.norm.weight": torch.zeros(2)}), r"norm.weight \(2,\) instead of \(48,\)"),
        (lambda s: s.update({"lm_head.weight": s["lm_head.weight"] + 1}), "differs from the embedding"),
    ],
)
def test_tensors_that_do_not_fit_are_listed(change, message, tmp_path):
    state = torch.load(GOLDEN / "g3v_dense" / "upstream.pth", weights_only=True)
    change(state)
    save_file({name: tensor.clone() for name, tensor in state.items()}, tmp_path / "changed.safetensors")
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(
            tmp_path / "changed.safetensors",
            tmp_path / "out",
            vision_encoder=GOLDEN / "g3v_dense" / "vision_encoder",
            original_config=read_json("g3v_dense/hparams.json")["constructor_args"],
        )
    assert not (tmp_path / "out").exists()


@golden
def test_configuration_that_contradicts_the_tensors(tmp_path):
    args = read_json("g3v_dense/hparams.json")["constructor_args"] | {"num_hidden_layers": 4}
    with pytest.raises(ValueError, match="says num_hidden_layers = 4, but the tensors say 3"):
        convert_checkpoint(
            GOLDEN / "g3v_dense" / "upstream.pth",
            tmp_path / "out",
            vision_encoder=GOLDEN / "g3v_dense" / "vision_encoder",
            original_config=args,
        )


def test_missing_checkpoint_is_said_so(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file, no folder and no Hub repository"):
        convert_checkpoint(tmp_path / "nothing.pth", tmp_path / "out")


@golden
def test_existing_output_is_refused_and_kept_when_conversion_fails(tmp_path):
    output = tmp_path / "out"
    output.mkdir()
    (output / "mine.txt").write_text("keep")
    source = GOLDEN / "g2_dense" / "upstream.pth"
    with pytest.raises(FileExistsError, match=r"exists already.*--overwrite"):
        convert_checkpoint(source, output)
    with pytest.raises(ValueError, match="cannot be told from its tensors"):  # fails after reading: nothing is lost
        args = read_json("g2_dense/hparams.json")["constructor_args"]
        convert_checkpoint(source, output, original_config=args, overwrite=True)
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "mine.txt"]


@golden
def test_output_that_holds_the_source_is_refused(tmp_path):
    (tmp_path / "out").mkdir()
    source = tmp_path / "out" / "sft.pth"
    source.write_bytes((GOLDEN / "g2_dense" / "upstream.pth").read_bytes())
    with pytest.raises(ValueError, match=r"holds .*sft.pth, which is read"):
        convert_checkpoint(source, tmp_path / "out", overwrite=True)
    assert source.exists()


@golden
def test_interruption_leaves_nothing_half_written(tmp_path):
    program = """
import json, signal, sys
import minimind_v.conversion.convert as convert
signal.signal(signal.SIGINT, signal.default_int_handler)  # a process in the background starts without it
convert.wrap_tokenizer = lambda *_: signal.raise_signal(signal.SIGINT)  # Ctrl-C after the weights are written
config = json.load(open(sys.argv[1] + "/hparams.json"))["constructor_args"]
convert.convert_checkpoint(sys.argv[1] + "/upstream.pth", sys.argv[2], vision_encoder=sys.argv[1] + "/vision_encoder",
                           tokenizer="x/", original_config=config)
"""
    command = [sys.executable, "-c", program, str(GOLDEN / "g2_dense"), str(tmp_path / "out")]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode != 0 and "KeyboardInterrupt" in result.stderr
    assert list(tmp_path.iterdir()) == []


# --- Command --------------------------------------------------------------------------------------------------------


@golden
def test_command(tmp_path):
    (tmp_path / "original.json").write_text(json.dumps(read_json("g3v_moe/hparams.json")["constructor_args"]))
    case = GOLDEN / "g3v_moe"
    command = [sys.executable, "-m", "minimind_v.conversion", str(case / "upstream.pth"), "out"]
    command += ["--vision-encoder", str(case / "vision_encoder"), "--config", "original.json"]
    command += ["--tokenizer", str(GOLDEN / "tokenizers" / "minimind3"), "--dtype", "float32"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    for text in ("minimind3: MiniMind-3V", "4 experts, 1 active", "Tower", "active", "Written to   out"):
        assert text in result.stdout
    assert "writing" in result.stderr  # progress
    again = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert again.returncode == 1 and again.stderr.startswith("error: out exists already") and not again.stdout
    help_text = subprocess.run([*command[:3], "--help"], capture_output=True, text=True, cwd=tmp_path).stdout
    assert "examples:" in help_text and "--vision-encoder" in help_text


def test_generations_are_those_of_the_recorded_cases():
    assert set(GENERATIONS.values()) == {generation for _, generation in PARITY}
