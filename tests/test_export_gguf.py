"""GGUF: what the files hold, read back; where llama-cpp-python is installed, what llama.cpp answers from them."""

import json
import re
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import CHECKPOINT, REPOSITORY, make_config
from original import CASES, convert_case
from PIL import Image
from torch.nn import functional as F
from transformers import AutoTokenizer, SiglipVisionConfig

from minimind_v.common import load_model, load_processor
from minimind_v.export import AnswersDifferError, export_gguf
from minimind_v.export.gguf import decoder_obstacles, tower_obstacles
from minimind_v.export.ollama import go_template
from minimind_v.export.reading import read_own_checkpoint
from minimind_v_cli.__main__ import main

gguf = pytest.importorskip("gguf", reason="gguf is not installed (extra: export)")

LAYER = {  # ours -> llama.cpp's, written down apart from the table that the export uses
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
}
SEEING = ["embedded", *(case for case in CASES if case.startswith("g3v"))]
DECODERS = ["embedded", *(case for case in CASES if case.startswith("g3") or not case.endswith("moe"))]


def checkpoint_of(case):
    return CHECKPOINT if case == "embedded" else convert_case(case)


def export(case, folder, **options):
    return export_gguf(checkpoint_of(case), folder / "gguf", **options)


def read(folder, kind):
    """Fields and tensors (as numbers) of a file."""
    (file,) = folder.glob(f"gguf/{kind}-*.gguf")
    reader = gguf.GGUFReader(file)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    tensors = {t.name: torch.tensor(gguf.dequantize(t.data, t.tensor_type)) for t in reader.tensors}
    return fields, tensors, types


def expected_decoder(case):
    """Tensors that llama.cpp wants, float32."""
    state, config = read_own_checkpoint(checkpoint_of(case))
    text = config.get_text_config()
    expected = {}
    for name, tensor in state.items():
        tensor = tensor.float()
        if match := re.fullmatch(r"model\.language_model\.layers\.(\d+)\.(.+?)(\.weight)?", name):
            block, part = f"blk.{match[1]}.", match[2]
            if part == "mlp.experts.gate_up_proj":
                width = text.moe_intermediate_size
                expected[f"{block}ffn_gate_exps.weight"] = tensor[:, :width]
                expected[f"{block}ffn_up_exps.weight"] = tensor[:, width:]
            elif part == "mlp.experts.down_proj":
                expected[f"{block}ffn_down_exps.weight"] = tensor
            else:
                if not text.use_qk_norm and part in ("self_attn.q_proj", "self_attn.k_proj"):
                    half = text.head_dim // 2  # row 2i of a head is our row i, row 2i + 1 our row i + half
                    order = [i + j for i in range(half) for j in (0, half)]
                    heads = tensor.view(-1, text.head_dim, text.hidden_size)
                    tensor = heads[:, order].reshape(tensor.shape)
                expected[f"{block}{LAYER[part]}.weight"] = tensor
        elif name == "model.language_model.embed_tokens.weight":
            expected["token_embd.weight"] = tensor
        elif name == "model.language_model.norm.weight":
            expected["output_norm.weight"] = tensor
    return expected, text


# --- The decoder -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", DECODERS)
def test_decoder_is_the_checkpoints(case, tmp_path):
    export(case, tmp_path, precision="f32", check=False)
    fields, tensors, types = read(tmp_path, "model")
    expected, text = expected_decoder(case)
    assert tensors.keys() == expected.keys() and set(types.values()) == {"F32"}
    for name, tensor in tensors.items():
        assert torch.equal(tensor, expected[name]), name
    kind = "qwen3moe" if text.use_moe else "qwen3" if text.use_qk_norm else "llama"
    of_kind = {
        "context_length": text.max_position_embeddings,
        "embedding_length": text.hidden_size,
        "block_count": text.num_hidden_layers,
        "feed_forward_length": text.intermediate_size,
        "attention.head_count": text.num_attention_heads,
        "attention.head_count_kv": text.num_key_value_heads,
        "attention.key_length": text.head_dim,
        "attention.value_length": text.head_dim,
        "rope.dimension_count": text.head_dim,
        "rope.freq_base": text.rope_parameters["rope_theta"],
        "attention.layer_norm_rms_epsilon": pytest.approx(text.rms_norm_eps),
        "vocab_size": text.vocab_size,
    }
    if text.use_moe:
        of_kind |= {"expert_count": text.num_experts, "expert_used_count": text.num_experts_per_tok}
        of_kind["expert_feed_forward_length"] = text.moe_intermediate_size
    assert fields["general.architecture"] == kind
    assert {name: fields[f"{kind}.{name}"] for name in of_kind} == of_kind


def test_matrix_that_is_not_tied_is_written(tmp_path):
    folder = tmp_path / "checkpoint"
    model = load_model(CHECKPOINT)
    model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.flip(0).contiguous())
    model.save_pretrained(folder)
    load_processor(CHECKPOINT).save_pretrained(folder)
    export_gguf(folder, tmp_path / "gguf", precision="f32", check=False)
    tensors = read(tmp_path, "model")[1]
    assert torch.equal(tensors["output.weight"], tensors["token_embd.weight"].flip(0))


@pytest.mark.parametrize("precision, bits", [("f16", None), ("q8_0", 8), ("q4_0", 4)])
@pytest.mark.parametrize("case", ["embedded", "g3v_moe"])
def test_lower_precisions_are_near(case, precision, bits, tmp_path):
    summary = export(case, tmp_path, precision=precision, check=False)
    fields, tensors, types = read(tmp_path, "model")
    kind = precision.upper()
    assert fields["general.file_type"] == gguf.LlamaFileType[f"MOSTLY_{kind}"]
    expected, _ = expected_decoder(case)
    found = set()
    for name, tensor in tensors.items():
        original, allowed = expected[name], {kind}
        if original.ndim == 1 or "gate_inp" in name:
            assert torch.equal(tensor, original) and types[name] == "F32", name
            continue
        if bits and original.shape[-1] % 32:
            allowed = {"F16"}
        elif bits == 4 and name == "token_embd.weight":
            allowed = {"Q8_0"}
        assert {types[name]} == allowed, name
        found |= allowed
        if types[name] == "F16":
            assert torch.equal(tensor, original.half().float()), name
        else:  # of 32 numbers the largest is 127 or -8 steps of a float16; +8 does not exist, so 7 has to do
            blocks = original.reshape(-1, 32)
            steps, error = (127, 0.5 + 127 * 2**-11) if types[name] == "Q8_0" else (8, 1 + 8 * 2**-11)
            limit = blocks.abs().amax(1, keepdim=True) / steps * error
            assert ((tensor.reshape(-1, 32) - blocks).abs() <= limit).all(), name
    assert kind in found
    is_mixed = bits is not None and case == "g3v_moe"
    assert any(note.startswith(f"F16 instead of {kind}") for note in summary.notes) == is_mixed
    assert summary.precision == f"{kind}, tower and projector F16"


@pytest.mark.parametrize("case", DECODERS)
def test_tokenizer_is_the_checkpoints(case, tmp_path):
    export(case, tmp_path, check=False)
    fields, _, _ = read(tmp_path, "model")
    tokenizer = AutoTokenizer.from_pretrained(checkpoint_of(case))
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    assert tokens == [tokenizer.convert_ids_to_tokens(i) for i in range(len(tokenizer))]
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    assert [token for token, kind in zip(tokens, types, strict=True) if kind == gguf.TokenType.CONTROL] == special
    own = [token.content for token in tokenizer.added_tokens_decoder.values() if not token.special]
    assert [token for token, kind in zip(tokens, types, strict=True) if kind == gguf.TokenType.USER_DEFINED] == own
    merges = json.loads((checkpoint_of(case) / "tokenizer.json").read_text("utf-8"))["model"]["merges"]
    assert fields["tokenizer.ggml.merges"] == [
        merge if isinstance(merge, str) else " ".join(merge) for merge in merges
    ]
    assert (fields["tokenizer.ggml.model"], fields["tokenizer.ggml.pre"]) == ("gpt2", "gpt-2")
    ids = [fields[f"tokenizer.ggml.{name}_token_id"] for name in ("bos", "eos", "padding")]
    assert ids == [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id]
    assert fields["tokenizer.ggml.add_bos_token"] is False
    assert fields["tokenizer.chat_template"] == tokenizer.chat_template
    assert fields["tokenizer.ggml.suppress_tokens"] == [tokenizer.convert_tokens_to_ids("<|image_pad|>")]


def test_rows_of_the_vocabulary_without_a_token_are_unused(tmp_path):
    folder = tmp_path / "checkpoint"
    model = load_model(CHECKPOINT)
    model.resize_token_embeddings(1600)
    model.save_pretrained(folder)
    load_processor(CHECKPOINT).save_pretrained(folder)
    export_gguf(folder, tmp_path / "gguf", check=False)
    fields, tensors, _ = read(tmp_path, "model")
    assert len(fields["tokenizer.ggml.tokens"]) == len(set(fields["tokenizer.ggml.tokens"])) == 1600
    assert fields["tokenizer.ggml.token_type"][1536:] == [gguf.TokenType.UNUSED] * 64
    assert len(tensors["token_embd.weight"]) == 1600


# --- Tower and projector ---------------------------------------------------------------------------------------------


def embed_like_llama_cpp(fields, tensors, pixel_values):
    """What llama.cpp computes from an mmproj file of Janus Pro (models/siglip.cpp), `[N, 3, S, S]` -> `[N, P, H]`."""
    width, heads = fields["clip.vision.embedding_length"], fields["clip.vision.attention.head_count"]
    eps = fields["clip.vision.attention.layer_norm_epsilon"]

    def linear(x, name):
        return F.linear(x, tensors[f"{name}.weight"], tensors.get(f"{name}.bias"))

    def norm(x, name):
        return F.layer_norm(x, (width,), tensors[f"{name}.weight"], tensors[f"{name}.bias"], eps)

    def gelu(x):
        return F.gelu(x, approximate="tanh")

    patch = fields["clip.vision.patch_size"]
    x = F.conv2d(pixel_values, tensors["v.patch_embd.weight"], tensors["v.patch_embd.bias"], stride=patch)
    x = x.flatten(2).transpose(1, 2) + tensors["v.position_embd.weight"]
    for layer in range(fields["clip.vision.block_count"]):
        block = f"v.blk.{layer}."
        y = norm(x, block + "ln1")
        q, k, v = (linear(y, f"{block}attn_{n}").unflatten(-1, (heads, -1)).transpose(1, 2) for n in "qkv")
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + linear(attended, block + "attn_out")
        x = x + linear(gelu(linear(norm(x, block + "ln2"), block + "ffn_up")), block + "ffn_down")
    return linear(gelu(linear(norm(x, "v.post_ln"), "mm.0")), "mm.1")


@pytest.mark.parametrize("precision", ["f32", "f16"])
@pytest.mark.parametrize("case", SEEING)
def test_tower_as_llama_cpp_runs_it_gives_our_features(case, precision, tmp_path):
    export(case, tmp_path, precision=precision, check=False)
    fields, tensors, types = read(tmp_path, "mmproj")
    folder = checkpoint_of(case)
    processor, model = load_processor(folder), load_model(folder, dtype=torch.float32)
    picture = Image.open(REPOSITORY / "examples" / "images" / "apple.png")
    pixel_values = processor(images=picture, return_tensors="pt").pixel_values
    with torch.no_grad():
        expected = torch.stack(model.get_image_features(pixel_values).pooler_output)
        given = embed_like_llama_cpp(fields, tensors, pixel_values)
    # The recorded towers are random: features with a variance of 0.003, beside which an eps of 1e-5 is not small
    limit = 1e-3 if case == "embedded" else 4e-3
    assert (given - expected).abs().max() < limit * (1 if precision == "f32" else 3) * expected.abs().max()
    tower = model.config.vision_config
    assert fields["clip.projector_type"] == "janus_pro" and fields["clip.use_gelu"] is True
    assert fields["clip.has_vision_encoder"] is True and fields["clip.vision.image_size"] == tower.image_size
    assert fields["clip.vision.block_count"] == tower.num_hidden_layers + 1
    assert fields["clip.vision.projection_dim"] == model.config.text_config.hidden_size
    assert fields["clip.vision.image_mean"] == list(processor.image_processor.image_mean)
    extra = {name: kind for name, kind in types.items() if f".{tower.num_hidden_layers}.ffn" in name}
    assert set(extra.values()) == {"F32"} and len(extra) == 2
    assert types["v.blk.0.attn_q.weight"] == types["mm.1.weight"] == precision.upper()


@pytest.mark.parametrize(
    "case, switch",
    [
        ("g0_dense", "clip_vision_model"),
        ("g1_dense", "clip_vision_model"),
        ("g3i_dense", "siglip2_vision_model"),
        ("g3i_dense", "projector_merge_size is 4"),
        ("g3p_dense", "projector_merge_size is 4"),
    ],
)
def test_decoder_alone_says_why(case, switch, tmp_path):
    if case not in CASES:
        pytest.skip("not recorded here")
    summary = export(case, tmp_path, check=False)
    assert sorted(path.name for path in summary.output.iterdir()) == ["Modelfile", "model-Q8_0.gguf"]
    note = next(note for note in summary.notes if note.startswith("Without the tower"))
    assert switch in note and "vLLM" in note and summary.precision == "Q8_0"


# --- Ollama ----------------------------------------------------------------------------------------------------------

GO = re.compile(
    r"(?:\{\{ if not \.System \}\}(.*?)\{\{ end \}\})?\{\{ range \.Messages \}\}"
    + "".join(
        rf'\{{\{{ if eq \.Role "{role}" \}}\}}(.*?)\{{\{{ end \}}\}}' for role in ("system", "user", "assistant")
    )
    + r"\{\{ end \}\}(.*)",
    re.DOTALL,
)


@pytest.mark.parametrize("case", DECODERS)
def test_go_template_writes_what_the_chat_template_writes(case):
    tokenizer = AutoTokenizer.from_pretrained(checkpoint_of(case))
    default, system, user, assistant, asked = GO.fullmatch(go_template(tokenizer)).groups()
    turns = {"system": system, "user": user, "assistant": assistant}
    conversation = [
        ("system", "Short!"),
        ("user", "你好"),
        ("assistant", "Hi."),
        ("user", "Again?"),
        ("assistant", "No."),
    ]
    for messages in (conversation[:2], conversation[1:2], conversation[1:4], conversation[:4]):
        written = "".join(turns[role].replace("{{ .Content }}", content) for role, content in messages)
        written = ("" if messages[0][0] == "system" else default or "") + written + asked
        chat = [{"role": role, "content": content} for role, content in messages]
        assert written == tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)


def test_modelfile(tmp_path):
    folder = export("embedded", tmp_path, check=False).output
    text = (folder / "Modelfile").read_text("utf-8")
    assert re.findall(r"^FROM \./(.+)$", text, re.MULTILINE) == ["model-Q8_0.gguf", "mmproj-F16.gguf"]
    assert all((folder / name).exists() for name in re.findall(r"^FROM (.+)$", text, re.MULTILINE))
    assert 'PARAMETER stop "<|im_end|>"' in text and "PARAMETER num_ctx 1024" in text
    assert go_template(AutoTokenizer.from_pretrained(CHECKPOINT)) in text


def test_chat_template_that_rewrites_earlier_turns_has_no_modelfile(tmp_path):
    folder = shutil.copytree(CHECKPOINT, tmp_path / "checkpoint")
    (folder / "chat_template.jinja").write_text("{{ messages | length }}{{ messages[-1]['content'] }}")
    output = export_gguf(folder, tmp_path / "gguf", check=False).output
    assert sorted(path.name for path in output.iterdir()) == ["mmproj-F16.gguf", "model-Q8_0.gguf"]


# --- What does not fit -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, switch",
    [
        ({"moe": True}, "num_shared_experts is 1"),
        ({"moe": True, "num_shared_experts": 0, "use_qk_norm": False}, "use_qk_norm is false"),
        ({"moe": True, "num_shared_experts": 0, "norm_topk_prob": False}, "norm_topk_prob is false"),
        ({"moe": True, "num_shared_experts": 0, "mlp_only_layers": [0]}, "mlp_only_layers"),
        ({"moe": True, "num_shared_experts": 0, "decoder_sparse_step": 2}, "decoder_sparse_step"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e6}}, "rope_type 'linear'"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"attention_bias": True}, "attention_bias is true"),
        ({"moe": True, "num_shared_experts": 0}, None),
        ({"use_qk_norm": False}, None),
    ],
)
def test_decoder_switches(changes, switch):
    found = list(decoder_obstacles(make_config(**changes).text_config))
    assert [reason for reason in found if switch in reason] if switch else not found


@pytest.mark.parametrize(
    "tower, changes, switch",
    [
        ("clip", {}, "clip_vision_model"),
        ("naflex", {}, "siglip2_vision_model"),
        ("blocks", {}, "projector_merge_size is 4"),
        ("siglip", {"projector_norm": False}, "projector_norm is false"),
        ("siglip", {"projector_type": "linear"}, "projector_type is 'linear'"),
        ("siglip", {"projector_hidden_act": "relu"}, "projector_hidden_act is 'relu'"),
        ("siglip", {"vision_config": SiglipVisionConfig(hidden_act="relu")}, "vision_config.hidden_act is 'relu'"),
        ("siglip", {}, None),
    ],
)
def test_tower_switches(tower, changes, switch):
    config = make_config(tower)
    for name, value in changes.items():
        setattr(config, name, value)
    found = list(tower_obstacles(config))
    assert [reason for reason in found if switch in reason] if switch else not found


@pytest.mark.skipif("g2_moe" not in CASES, reason="not recorded here")
def test_experts_of_minimind2_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"num_shared_experts is \d.* vLLM"):
        export("g2_moe", tmp_path)
    assert not list(tmp_path.iterdir())


def test_what_fails_leaves_nothing(tmp_path):
    folder = shutil.copytree(CHECKPOINT, tmp_path / "checkpoint")
    content = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    content["pre_tokenizer"] = {"type": "Whitespace"}
    (folder / "tokenizer.json").write_text(json.dumps(content), "utf-8")
    with pytest.raises(ValueError, match="not byte-level BPE"):
        export_gguf(folder, tmp_path / "gguf")
    for name in ("chat_template.jinja", "tokenizer.json"):
        (folder / name).unlink()
        with pytest.raises(ValueError, match=r"lacks tokenizer\.json or its chat template"):
            export_gguf(folder, tmp_path / "gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_output_that_exists_is_kept(tmp_path):
    (tmp_path / "gguf").mkdir()
    (tmp_path / "gguf" / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="--overwrite"):
        export("embedded", tmp_path, check=False)
    assert [path.name for path in (tmp_path / "gguf").iterdir()] == ["mine.txt"]
    export("embedded", tmp_path, check=False, overwrite=True)
    assert not (tmp_path / "gguf" / "mine.txt").exists()


def test_other_model_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="not a checkpoint of this package"):
        export_gguf(tmp_path, tmp_path / "gguf")


def test_missing_library_is_named(tmp_path):
    code = f"""
import sys
sys.modules["gguf"] = None
from minimind_v.export import export_gguf
try:
    export_gguf({str(CHECKPOINT)!r}, {str(tmp_path / "gguf")!r})
except ImportError as error:
    print(error)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert result.stdout == "GGUF needs the library gguf: pip install 'minimind-v[export]'\n", result.stderr


def test_command(tmp_path, capsys):
    assert not main(["export", "gguf", str(CHECKPOINT), str(tmp_path / "gguf"), "--precision", "q4_0", "--no-check"])
    printed = capsys.readouterr().out
    for part in ("model-Q4_0.gguf, 0.8 MB", "mmproj-F16.gguf", "no, as asked for", "pads an image", "was not run"):
        assert part in printed, part


# --- llama.cpp itself, where it is installed -------------------------------------------------------------------------


@pytest.fixture
def llama_cpp():
    return pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")


def test_without_llama_cpp_the_summary_says_how_to_check(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    assert "pip install llama-cpp-python" in export("embedded", tmp_path).checked


@pytest.mark.parametrize("case", DECODERS)
def test_llama_cpp_answers_as_the_checkpoint(case, tmp_path, llama_cpp):
    assert (
        export(case, tmp_path, precision="f32").checked == "3 of 3 greedy answers are the checkpoint's, by llama.cpp"
    )


@pytest.mark.parametrize("precision", ["f16", "q8_0", "q4_0"])
def test_llama_cpp_answers_as_the_embedded_model_in_lower_precision(precision, tmp_path, llama_cpp):
    checked = export("embedded", tmp_path, precision=precision).checked
    assert checked == "3 of 3 greedy answers are the checkpoint's, by llama.cpp"


def test_ask_script_needs_only_the_folder(tmp_path, llama_cpp):
    """`benchmarks/engines/ask_llama_cpp.py`, which is how tests/runtimes.py asks."""
    folder = export("embedded", tmp_path, check=False).output
    images = [str(REPOSITORY / "examples" / "images" / f"{name}.png") for name in ("apple", "dog")]
    asked = {"one": images[:1], "none": [], "two": images}
    questions = [
        {"id": name, "text": "What is this?", "images": paths, "max_new_tokens": 16} for name, paths in asked.items()
    ]
    (tmp_path / "questions.json").write_text(json.dumps(questions))
    script = REPOSITORY / "benchmarks" / "engines" / "ask_llama_cpp.py"
    command = [sys.executable, script, folder, tmp_path / "questions.json", tmp_path / "answers.json"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert result.returncode == 0 and not result.stdout + result.stderr
    given = json.loads((tmp_path / "answers.json").read_text("utf-8"))
    assert [answer["id"] for answer in given["answers"]] == list(asked)
    assert given["answers"][0]["text"] == "Red apple." and all(answer["tokens"] for answer in given["answers"])
    assert given["runtime"].startswith("llama-cpp-python ") and given["peak_memory_bytes"] > 1e7


def test_file_that_answers_otherwise_is_refused(tmp_path, llama_cpp, monkeypatch):
    monkeypatch.setattr("minimind_v.export.gguf_files.QUERY_OR_KEY", re.compile("nothing"))  # rows for the wrong RoPE
    with pytest.raises(AnswersDifferError):
        export("g1_dense", tmp_path, precision="f32")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("case", DECODERS)
def test_llama_cpp_splits_text_as_the_tokenizer(case, tmp_path, llama_cpp):
    folder = export(case, tmp_path, check=False).output
    engine = llama_cpp.Llama(str(folder / "model-Q8_0.gguf"), vocab_only=True, verbose=False)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint_of(case))
    texts = [
        "Hello,  world!\n\n  It's 12345 o'clock.",
        "描述一下这个图像的内容。",
        "a@b.c <x> ÿ \t\u00a0 naïve 🙂",
        "<think>\n",
    ]
    texts += ["x " + token for token in tokenizer.all_special_tokens]
    for text in texts:
        assert engine.tokenize(text.encode(), add_bos=False, special=True) == tokenizer.encode(text), text
        plain = engine.tokenize(text.encode(), add_bos=False, special=False)
        assert not set(plain) & set(tokenizer.all_special_ids), text
