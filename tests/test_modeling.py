"""The model: equal to the library's own where it should be, and complete in what users of transformers expect."""

import re
import warnings

import pytest
import torch
from conftest import IDS, KINDS, make_config, make_model, make_text_config, picture, split_images, user
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from minimind_v import MiniMindForCausalLM, MiniMindVForConditionalGeneration, MiniMindVModel
from minimind_v.modeling_minimind_v import MiniMindVPatchMerger

kinds = pytest.mark.parametrize("tower, moe", KINDS, ids=IDS)


@pytest.fixture
def make_inputs(make_processor, encode):
    """Two rows, one with two pictures and one with one, left-padded, with labels on the text after the pictures."""

    def make(tower, rows=2):
        chats = [user("a", picture(0), "b", picture(1), "What?"), user(picture(2), "Describe it!")][:rows]
        inputs = dict(encode(make_processor(tower), *chats))
        labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == 3, -100)
        return inputs | {"labels": labels.masked_fill(inputs["attention_mask"] == 0, -100)}

    return make


# --- Equal to the library -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config_class, model_class, changes",
    [
        (Qwen3Config, Qwen3ForCausalLM, {}),
        (Qwen3MoeConfig, Qwen3MoeForCausalLM, {"moe": True, "num_shared_experts": 0}),
        (LlamaConfig, LlamaForCausalLM, {"use_qk_norm": False}),
    ],
)
@pytest.mark.parametrize("tied", [True, False])
def test_same_weights_in_the_librarys_model_give_the_same_logits(config_class, model_class, changes, tied):
    torch.manual_seed(0)
    ours = MiniMindForCausalLM(make_text_config(**changes, tie_word_embeddings=tied)).eval()
    fields = ours.config.to_dict()
    for name in ("model_type", "auto_map", "architectures"):
        fields.pop(name)
    theirs = model_class(config_class(**fields)).eval()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    ids = torch.randint(4, 320, (2, 20))
    with torch.no_grad():
        difference = (ours(ids).logits - theirs(ids).logits).abs().max()
    assert difference == 0


# --- Backends, precisions, compilation ------------------------------------------------------------------------------


@pytest.mark.parametrize("tower, moe", [("clip", True), ("siglip", False)])
@pytest.mark.parametrize("attention", ["eager", "flex_attention", "flash_attention_2"])
def test_attention_backends_agree(tower, moe, attention, make_inputs):
    if attention == "flash_attention_2":
        pytest.importorskip("flash_attn", reason="flash attention is not installed")
    model, inputs = make_model(tower, moe), make_inputs(tower)
    with torch.no_grad():
        expected = model(**inputs).logits
        model.set_attn_implementation(attention)
        assert model.config.text_config._attn_implementation == attention
        actual = model(**inputs).logits
    mask = inputs["attention_mask"].bool()
    torch.testing.assert_close(actual[mask], expected[mask], atol=1e-4, rtol=1e-4)


@kinds
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(tower, moe, dtype, make_inputs, tmp_path):
    inputs = make_inputs(tower)
    model = make_model(tower, moe)
    for parameter in model.parameters():
        parameter.data.mul_(0.25 if parameter.ndim > 1 else 1)
    model.save_pretrained(tmp_path)
    half = MiniMindVForConditionalGeneration.from_pretrained(tmp_path, dtype=dtype).eval()
    assert half.dtype == dtype and half.model.language_model.rotary_emb.inv_freq.dtype == torch.float32
    with torch.no_grad():
        logits, expected = half(**inputs).logits, model(**inputs).logits
    assert logits.dtype == dtype and logits.isfinite().all()
    mask = inputs["attention_mask"].bool()
    assert torch.nn.functional.cosine_similarity(logits[mask].float(), expected[mask], dim=-1).min() > 0.99


@kinds
def test_compiled_forward_is_one_graph(tower, moe, make_inputs):
    model, inputs = make_model(tower, moe), make_inputs(tower)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(**inputs).logits, model(**inputs).logits, atol=1e-4, rtol=1e-4)


@kinds
def test_gradient_checkpointing_changes_nothing(tower, moe, make_inputs):
    inputs, gradients = make_inputs(tower), []
    for checkpointing in (False, True):
        model = make_model(tower, moe).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(**inputs, use_cache=False).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


# --- Weights --------------------------------------------------------------------------------------------------------


@kinds
def test_saved_and_loaded_is_the_same_model(tower, moe, make_inputs, tmp_path):
    model, inputs = make_model(tower, moe), make_inputs(tower)
    model.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.bin"))
    for model_class in (MiniMindVForConditionalGeneration, AutoModelForCausalLM):
        loaded, report = model_class.from_pretrained(tmp_path, output_loading_info=True)
        assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        with torch.no_grad():
            assert torch.equal(loaded.eval()(**inputs).logits, model(**inputs).logits)
    base = MiniMindVModel.from_pretrained(tmp_path).eval()
    inputs.pop("labels")
    with torch.no_grad():
        hidden_states = base(**inputs).last_hidden_state
        assert torch.equal(hidden_states, model(**inputs, output_hidden_states=True).hidden_states[-1])


@kinds
def test_parts_on_different_devices(tower, moe, make_inputs, tmp_path):
    """`device_map`: here the tower is read from the disk for every call, as accelerate does for what has no room."""
    if tower == "naflex":
        pytest.skip(
            "the library's NaFlex tower reads a weight of a module that it does not call: accelerate misses it"
        )
    model, inputs = make_model(tower, moe), make_inputs(tower)
    model.save_pretrained(tmp_path)
    device_map = {"model.vision_tower": "disk", "model.multi_modal_projector": "cpu", "model.language_model": "cpu"}
    placed = MiniMindVForConditionalGeneration.from_pretrained(
        tmp_path, device_map=device_map | {"lm_head": "cpu"}, offload_folder=tmp_path / "offload"
    ).eval()
    assert placed.hf_device_map["model.vision_tower"] == "disk"
    inputs.pop("labels")
    with torch.no_grad():
        torch.testing.assert_close(placed(**inputs).logits, model(**inputs).logits)
    options = {"do_sample": False, "max_new_tokens": 4}
    assert torch.equal(placed.generate(**inputs, **options), model.generate(**inputs, **options))


@pytest.mark.parametrize("moe", [False, True])
@pytest.mark.parametrize("changes", [{}, {"use_qk_norm": False}, {"mlp_only_layers": [0]}], ids=str)
def test_tensor_parallel_plan_names_what_is_there(moe, changes):
    """Every entry matches a module or parameter, and attention, FFN and experts are all split."""
    model = make_model(moe=moe, **changes)
    names = [name for name, _ in [*model.model.language_model.named_modules(), *model.named_parameters()]]
    plan = model.config.text_config.base_model_tp_plan
    patterns = [entry.replace(".", r"\.").replace("*", r"\d+") for entry in plan]
    unmatched = [p for p in patterns if not any(re.search(rf"(^|\.){p}(\.weight)?$", name) for name in names)]
    assert not unmatched
    assert {"layers.*.self_attn.q_proj", "layers.*.self_attn.o_proj"} <= plan.keys()
    assert ("layers.*.mlp.experts" in plan) == moe
    assert ("layers.*.mlp.up_proj" in plan) == (not moe or "mlp_only_layers" in changes)
    assert model._tp_plan["lm_head"] == "colwise_gather_output"


def test_meta_device_model_has_the_same_tensors():
    with torch.device("meta"):
        empty = MiniMindVForConditionalGeneration(make_config(moe=True))
    assert {n: p.shape for n, p in empty.named_parameters()} == {
        n: p.shape for n, p in make_model(moe=True).named_parameters()
    }


@pytest.mark.parametrize("tied", [True, False])
def test_tied_embeddings_and_resizing(tied, make_inputs):
    model, inputs = make_model(tie_word_embeddings=tied), make_inputs("siglip")
    before = model(**inputs).logits
    assert (model.get_input_embeddings().weight is model.lm_head.weight) == tied
    model.resize_token_embeddings(330)
    assert (model.get_input_embeddings().weight is model.lm_head.weight) == tied
    assert model.config.text_config.vocab_size == 330
    after = model(**inputs)
    assert after.logits.shape[-1] == 330 and after.loss.isfinite()
    torch.testing.assert_close(after.logits[..., :320], before)


# --- Inputs and outputs ---------------------------------------------------------------------------------------------


@kinds
def test_rows_do_not_see_each_other_or_the_padding(tower, moe, make_inputs, make_processor, encode):
    model, inputs = make_model(tower, moe), make_inputs(tower)
    alone = make_inputs(tower, rows=1)
    length = alone["input_ids"].shape[1]
    with torch.no_grad():
        batch_logits, logits = model(**inputs).logits, model(**alone).logits
    torch.testing.assert_close(batch_logits[0, -length:], logits[0], atol=1e-4, rtol=1e-4)


def test_text_only_leaves_the_tower_unused(make_inputs):
    model = make_model()
    model.model.vision_tower.register_forward_hook(lambda *_: pytest.fail("the tower ran"))
    ids = torch.randint(4, 320, (2, 9))
    text_model = MiniMindForCausalLM(model.config.text_config).eval()
    text_model.load_state_dict(
        {k.replace("language_model.", ""): v for k, v in model.state_dict().items()}, strict=False
    )
    torch.testing.assert_close(model(ids).logits, text_model(ids).logits)


@kinds
def test_text_encodes_a_blank_image_where_other_processes_may_have_images(tower, moe, monkeypatch):
    model, ids, calls = make_model(tower, moe), torch.randint(4, 320, (2, 9)), []
    expected = model(ids).logits
    model.model.vision_tower.register_forward_hook(lambda *_: calls.append(1))
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    logits = model(ids).logits
    logits.sum().backward()
    assert len(calls) == 1 and torch.equal(logits, expected)
    for part in (model.model.multi_modal_projector, model.model.vision_tower.encoder):
        assert all(p.grad is not None and not p.grad.any() for p in part.parameters())


@kinds
def test_features_and_embeddings_as_inputs(tower, moe, make_inputs):
    model, inputs = make_model(tower, moe), make_inputs(tower)
    expected = model(**inputs).logits
    given, images = split_images(inputs)
    features = model.get_image_features(**images)
    assert len(features.pooler_output) == 3 and features.pooler_output[0].shape == (16, 32)
    assert torch.equal(model(**given, mm_encoder_outputs={"image": features}).logits, expected)
    embeds = model.get_input_embeddings()(given.pop("input_ids"))
    assert torch.equal(model(**given, inputs_embeds=embeds, **images).logits, expected)


def test_wrong_inputs_get_one_clear_error(make_inputs):
    model, inputs = make_model(), make_inputs("siglip")
    with pytest.raises(ValueError, match=r"^Image features and image tokens do not match, tokens: 48, features: 32$"):
        model(**inputs | {"pixel_values": inputs["pixel_values"][:2]})
    ids = inputs["input_ids"].clone()
    ids[0, (ids[0] == 3).nonzero()[0]] = 5  # a placeholder run that was cut
    with pytest.raises(ValueError, match=r"^Image features and image tokens do not match, tokens: 47, features: 48$"):
        model(**inputs | {"input_ids": ids})
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model(pixel_values=inputs["pixel_values"])
    features = {"image": model.get_image_features(inputs["pixel_values"])}
    with pytest.raises(ValueError, match="not as both"):
        model(**inputs, mm_encoder_outputs=features)


def test_naflex_needs_what_its_processor_gives(make_inputs):
    model, inputs = make_model("naflex"), make_inputs("naflex")
    for name in ("pixel_attention_mask", "spatial_shapes"):
        with pytest.raises(ValueError, match="also needs pixel_attention_mask and spatial_shapes"):
            model(**{key: value for key, value in inputs.items() if key != name})
    with pytest.raises(ValueError, match=r"pixel_values must be \[N, 64, 192\]; got \[3, 63, 192\]"):
        model(**inputs | {"pixel_values": inputs["pixel_values"][:, 1:]})


@pytest.mark.parametrize(
    "order, tokens",
    [
        ("sequence", [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15]]),
        ("block", [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]),
    ],
)
def test_merged_patches(order, tokens):
    """Of a grid of 4 x 4 patches in reading order, with two channels."""
    config = make_config("blocks")
    config.projector_merge_order = order
    patches = torch.arange(32.0).view(1, 16, 2)
    merged = MiniMindVPatchMerger(config)(patches)
    assert torch.equal(merged[0], torch.stack([patches[0, token].flatten() for token in tokens]))


def test_output_as_tuple_and_recorded_states(make_inputs):
    model, inputs = make_model(), make_inputs("siglip")
    model.set_attn_implementation("eager")
    outputs = model(**inputs, output_hidden_states=True, output_attentions=True)
    assert len(outputs.hidden_states) == 3 and len(outputs.attentions) == 2
    assert outputs.image_hidden_states.shape == (48, 32)
    loss, logits = model(**inputs, return_dict=False)[:2]
    assert torch.equal(loss, outputs.loss) and torch.equal(logits, outputs.logits)
    inputs.pop("labels")
    torch.testing.assert_close(model(**inputs, logits_to_keep=1).logits, logits[:, -1:])
    torch.testing.assert_close(model(**inputs, logits_to_keep=torch.tensor([2, 5])).logits, logits[:, [2, 5]])
    positions = torch.tensor([[2, 5], [7, 1]])
    kept = model(**inputs, logits_to_keep=positions).logits
    torch.testing.assert_close(kept, torch.stack([logits[0, positions[0]], logits[1, positions[1]]]))


# --- Losses ---------------------------------------------------------------------------------------------------------


def test_loss_is_the_cross_entropy_of_the_next_token(make_inputs):
    model, inputs = make_model(), make_inputs("siglip")
    outputs = model(**inputs)
    targets = inputs["labels"][:, 1:].reshape(-1)
    expected = torch.nn.functional.cross_entropy(outputs.logits[:, :-1].reshape(-1, 320), targets, ignore_index=-100)
    torch.testing.assert_close(outputs.loss, expected)
    summed = model(**inputs, num_items_in_batch=100).loss
    torch.testing.assert_close(summed, expected * (targets != -100).sum() / 100)


@kinds
def test_accumulated_batches_add_up_to_the_whole_one(tower, moe, make_inputs):
    """The rows one by one with the item count of both: the same loss, except that experts balance per batch."""
    model, inputs = make_model(tower, moe).train(), make_inputs(tower)
    items = (inputs["labels"][:, 1:] != -100).sum()
    losses = []
    for row, images in ((0, slice(0, 2)), (1, slice(2, 3))):
        rest, images = split_images(inputs, images)
        part = {key: value[row : row + 1] for key, value in rest.items()}
        outputs = model(**part, **images, num_items_in_batch=items)
        share = (part["labels"][:, 1:] != -100).sum() / items
        if moe:
            outputs.loss -= model.config.text_config.router_aux_loss_coef * outputs.aux_loss * share
        losses.append(outputs.loss)
    whole = model.eval()(**inputs).loss
    torch.testing.assert_close(sum(losses), whole, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("loss_type", ["switch", "sequence", "batch"])
def test_router_loss(loss_type, make_inputs):
    model, inputs = make_model("clip", moe=True), make_inputs("clip")
    text = model.config.text_config
    text.router_aux_loss_type = loss_type
    plain = model(**inputs)
    assert plain.aux_loss is None and plain.router_logits is None  # not in training, not asked for
    asked = model(**inputs, output_router_logits=True)
    trained = model.train()(**inputs)
    expected = 0.0
    for layer in asked.router_logits:
        rows = [row[mask.bool()] for row, mask in zip(layer.view(2, -1, 4), inputs["attention_mask"], strict=True)]
        assert len(rows[0]) != len(rows[1])
        for group in rows if loss_type == "sequence" else [torch.cat(rows)]:
            probabilities = group.softmax(-1)
            counts = torch.zeros(4).index_add(0, probabilities.topk(2).indices.flatten(), torch.ones(2 * len(group)))
            loss = 4 * (counts / len(group) * probabilities.mean(0)).sum()
            expected = expected + loss / {"switch": 1, "sequence": 2 * 2, "batch": 2}[loss_type]
    torch.testing.assert_close(asked.aux_loss, expected)
    torch.testing.assert_close(trained.aux_loss, expected)
    for outputs in (asked, trained):
        torch.testing.assert_close(outputs.loss, plain.loss + text.router_aux_loss_coef * expected)


@pytest.mark.parametrize("loss_type", ["switch", "sequence", "batch"])
def test_router_loss_of_packed_and_padded_rows(loss_type):
    """Packed, padded on either side, and without padding: one loss, that of the rows."""
    model = make_model("clip", moe=True, router_aux_loss_type=loss_type).train()
    rows = [torch.randint(4, 320, (1, length)) for length in (5, 9, 7)]
    positions = torch.cat([torch.arange(row.shape[1]) for row in rows])[None]
    packed = model(torch.cat(rows, dim=1), position_ids=positions, labels=torch.cat(rows, dim=1)).aux_loss
    for sides in ((0, 1), (1, 0)):
        pads = [tuple(side * (9 - row.shape[1]) for side in sides) for row in rows]
        ids = torch.cat([torch.nn.functional.pad(row, pad) for row, pad in zip(rows, pads, strict=True)])
        mask = torch.cat([torch.nn.functional.pad(row * 0 + 1, pad) for row, pad in zip(rows, pads, strict=True)])
        padded = model(ids, attention_mask=mask, labels=ids).aux_loss
        torch.testing.assert_close(padded, packed)
    if loss_type == "sequence":
        torch.testing.assert_close(sum(model(row, labels=row).aux_loss for row in rows) / 3, packed)


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 3, 48, 32), (1, 1, 32, 32), (1, 32, 32, 3)])
@pytest.mark.parametrize("tower", ["clip", "siglip"])
def test_images_of_another_shape_are_refused(shape, tower, make_inputs):
    inputs = make_inputs(tower) | {"pixel_values": torch.zeros(shape)}
    with pytest.raises(ValueError, match=r"pixel_values must be \[N, 3, 32, 32\]; got \["):
        make_model(tower)(**inputs)


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_expert_implementations_agree(implementation, make_inputs):
    model, inputs = make_model("clip", moe=True), make_inputs("clip")
    expected = model(**inputs).logits
    model.set_experts_implementation(implementation)
    torch.testing.assert_close(model(**inputs).logits, expected, atol=1e-4, rtol=1e-4)


def test_distributed_training_with_a_batch_of_text(make_inputs, tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = make_model("clip").train()
        model.model.vision_tower.requires_grad_(False)
        parallel = torch.nn.parallel.DistributedDataParallel(model)
        inputs, ids = make_inputs("clip"), torch.randint(4, 320, (1, 9))
        text = {"input_ids": ids, "labels": ids}
        for batch in (inputs, text, inputs):
            parallel(**batch).loss.backward()
        assert torch.equal(model(**text).loss, model.eval()(**text).loss)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("text_only", [True, False])
def test_packed_rows_do_not_see_each_other(text_only):
    """Not in training, in evaluation, nor without labels, as label smoothing calls the model."""
    model = make_model()
    if text_only:
        model = MiniMindForCausalLM(model.config.text_config).eval()
    ids = torch.randint(4, 320, (1, 600))
    positions = torch.arange(100).repeat(6)[None]
    alone = model(ids[:, 100:200]).logits
    for options in ({}, {"labels": ids}):
        packed = model(ids, position_ids=positions, **options)
        torch.testing.assert_close(packed.logits[:, 100:200], alone, atol=1e-4, rtol=1e-4)


def test_evaluation_with_metrics(make_inputs, tmp_path):
    """Outputs that are not predictions (caches, features, router logits) stay out of what Trainer gathers."""
    from transformers import Trainer, TrainingArguments

    model, inputs = make_model("clip", moe=True), make_inputs("clip", rows=1)
    row = {key: value[0] for key, value in inputs.items() if key != "pixel_values"}
    arguments = TrainingArguments(
        tmp_path, report_to="none", remove_unused_columns=False, use_cpu=True, disable_tqdm=True,
        per_device_eval_batch_size=1, label_names=["labels"],
    )  # fmt: skip
    rows = [row | {"pixel_values": inputs["pixel_values"]}, {key: value[-4:] for key, value in row.items()}]

    def collate(items):
        pixels = {"pixel_values": items[0]["pixel_values"]} if "pixel_values" in items[0] else {}
        return {key: items[0][key][None] for key in row} | pixels

    shapes = []
    trainer = Trainer(
        model, arguments, data_collator=collate, eval_dataset=rows,
        compute_metrics=lambda output: shapes.append(output.predictions.shape) or {},
    )  # fmt: skip
    assert trainer.evaluate()["eval_loss"] > 0
    assert shapes == [(2, len(row["input_ids"]), 320)]


def test_no_warning_in_training_or_generation(make_inputs, caplog, capfd):
    model, inputs = make_model(moe=True), make_inputs("siglip")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.train()(**inputs).loss.backward()
        inputs.pop("labels")
        model.eval().generate(**inputs, do_sample=False, max_new_tokens=3)
    assert not caplog.records and not capfd.readouterr().err
