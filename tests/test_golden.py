"""The recorded numbers of the original code, through the converter: logits, losses, gradients, greedy ids."""

import pytest
import torch
from original import CASES, GOLDEN, find_gradient, load_case, our_input_ids, read_json, recorded, recorded_images
from safetensors.torch import load_file

SUB_CASES = ["text", "one_image", "two_images", "batch2", "right_pad", "left_pad", "left_pad_image"]
SUB_CASES += ["one_image_naflex", "batch2_naflex"]
YARN = recorded("g2_dense_yarn", "g3v_dense_yarn")


def close(actual, expected, atol, rtol=1e-4):
    torch.testing.assert_close(torch.as_tensor(actual).float(), torch.as_tensor(expected), atol=atol, rtol=rtol)


def recorded_inputs(case, sub_case, hparams):
    """Keyword arguments for the model, and the 24 recorded columns of the vocabulary."""
    tensors = load_file(GOLDEN / case / "inputs.safetensors")
    input_ids = our_input_ids(tensors[f"{sub_case}.input_ids"], hparams)
    inputs = {"input_ids": input_ids, "attention_mask": tensors[f"{sub_case}.attention_mask"]}
    if hparams["subcases"][sub_case]["images"]:
        inputs |= recorded_images(tensors, sub_case, hparams)
    return inputs, tensors["cols"], tensors.get(f"{sub_case}.labels")


def compare_logits(logits, mask, cols, expected, prefix):
    close(logits.logsumexp(-1)[mask], expected[f"{prefix}.logsumexp"][mask], 2e-4)
    if f"{prefix}.logits" in expected:
        close(logits, expected[f"{prefix}.logits"], 2e-4)
    if f"{prefix}.logits_cols" in expected:
        close(logits[mask][:, cols], expected[f"{prefix}.logits_cols"][mask], 2e-4)
    if f"{prefix}.logits_last" in expected:
        last = mask.shape[1] - 1 - mask.flip(1).int().argmax(1)
        close(logits[torch.arange(len(last)), last], expected[f"{prefix}.logits_last"].view(len(last), -1), 2e-4)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("case", CASES + YARN)
def test_logits(case, attention):
    model, hparams = load_case(case)
    model.set_attn_implementation(attention)
    expected = load_file(GOLDEN / case / "expected.safetensors")
    compared = 0
    for sub_case in SUB_CASES:
        if sub_case not in hparams["subcases"]:
            continue
        inputs, cols, _ = recorded_inputs(case, sub_case, hparams)
        with torch.no_grad():
            outputs = model(**inputs, output_hidden_states=True)
        compare_logits(outputs.logits, inputs["attention_mask"].bool(), cols, expected, sub_case)
        if f"{sub_case}.final_norm" in expected:
            close(outputs.hidden_states[-1], expected[f"{sub_case}.final_norm"], 2e-4)
        if f"{sub_case}.image_embeds" in expected:
            embeds = expected[f"{sub_case}.image_embeds"]
            close(outputs.image_hidden_states, embeds.view(-1, embeds.shape[-1]), 5e-5, 1e-5)
        compared += 1
    assert compared == len(hparams["subcases"])


@pytest.mark.parametrize("case", [case for case in CASES if case.endswith("_moe")])
def test_variants_of_the_router(case):
    variants = read_json(f"{case}/hparams.json")["variants"]
    expected = load_file(GOLDEN / case / "expected.safetensors")
    assert variants
    for name, variant in variants.items():
        model, hparams = load_case(case, **variant["changed"])
        inputs, cols, _ = recorded_inputs(case, variant["inputs"], hparams)
        with torch.no_grad():
            logits = model(**inputs).logits
        compare_logits(logits, inputs["attention_mask"].bool(), cols, expected, f"variant.{name}")


@pytest.mark.parametrize("case", CASES)
def test_greedy_continuation(case):
    model, hparams = load_case(case)
    expected = read_json(f"{case}/greedy.json")
    ids = next(value for value in expected.values() if isinstance(value, list))
    inputs, _, _ = recorded_inputs(case, "one_image", hparams)
    generated = model.generate(**inputs, max_new_tokens=len(ids), do_sample=False, eos_token_id=-1)
    assert generated[0, inputs["input_ids"].shape[1] :].tolist() == ids


@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients(case):
    model, hparams = load_case(case)
    recorded = read_json(f"{case}/training.json")
    inputs, _, labels = recorded_inputs(case, "batch2", hparams)
    del inputs["attention_mask"]  # the recorded run had none
    coefficient = model.config.text_config.router_aux_loss_coef
    # The float16 buffer of G1 and G2 is not copied: their experts are compared with the float32 computation.
    is_buffered = "seq_aux_true.float32_buffer" in recorded
    suffix = "_float32_buffer" if is_buffered else ""

    with torch.no_grad():
        close(model(**inputs, labels=labels).loss, recorded["eval_ce_loss"], 5e-5, 1e-5)

    model.train()
    model.model.vision_tower.requires_grad_(False)
    outputs = model(**inputs, labels=labels)
    outputs.loss.backward()
    close(outputs.loss, recorded[f"train_total_loss{suffix}"], 5e-5, 1e-5)
    if not hparams["moe"]:
        assert outputs.aux_loss is None
    elif hparams["generation_id"] == "G0":  # which computes a router loss, but does not train with it
        assert coefficient == 0
        auxiliary = recorded["gate_seq_aux_true.float32_buffer"]["aux_loss"]
        close(hparams["constructor_args"]["aux_loss_alpha"] * outputs.aux_loss, auxiliary, 1e-6, 1e-5)
    else:
        auxiliary = recorded["seq_aux_true.float32_buffer"]["aux_loss"] if is_buffered else recorded["train_aux_loss"]
        close(coefficient * outputs.aux_loss, auxiliary, 1e-6, 1e-5)
    for name, norm in recorded[f"train_grad_norms{suffix}"].items():
        close(find_gradient(model, name).norm(), norm, 1e-5)


@pytest.mark.parametrize("case", recorded("g0_moe", "g1_moe", "g2_moe"))
def test_router_loss_over_the_batch(case):
    model, hparams = load_case(case, seq_aux=False)
    inputs, _, labels = recorded_inputs(case, "batch2", hparams)
    del inputs["attention_mask"]
    training = read_json(f"{case}/training.json")
    prefix = "gate_" if case == "g0_moe" else ""
    expected = training[f"{prefix}seq_aux_false.float32_buffer"]["aux_loss"]
    auxiliary = model.train()(**inputs, labels=labels).aux_loss
    close(hparams["constructor_args"]["aux_loss_alpha"] * auxiliary, expected, 1e-6, 1e-5)
