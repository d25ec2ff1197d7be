"""A model is saved in the type that it came in."""
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from calib_prune.core import CalibPruneError
from calib_prune.model.loading import load_model, save_model
from calib_prune.model.stored_types import (
    Stored,
    as_stored,
    check_saved_type,
    saved_type,
    stored_types,
)
from calib_prune.model.tiny import tiny_llama, tiny_model, tiny_tokenizer
from tests import processes
from tests.attack import call


def types_in(folder):
    with safe_open(folder / "model.safetensors", "pt") as f:
        return {k: f.get_slice(k).get_dtype() for k in f.keys()}


@pytest.mark.parametrize(
    "kind, name", [(torch.bfloat16, "BF16"), (torch.float16, "F16"), (torch.float32, "F32")]
)
def test_a_pruned_model_is_no_larger_than_the_dense_one(kind, name, tmp_path):
    dense = save_model(
        tiny_llama(max_position_embeddings=2048).to(kind), tiny_tokenizer(), tmp_path / "dense", {}
    )
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 400)
    processes.call("prune", "--model", dense, "--output", tmp_path / "out", "--calibration", text,
                   "--windows", "2", "--length", "64")
    assert {*types_in(tmp_path / "out").values()} == {name}
    assert (tmp_path / "out" / "model.safetensors").stat().st_size == (
        dense / "model.safetensors"
    ).stat().st_size
    record = json.loads((tmp_path / "out" / "calib_prune.json").read_text())
    assert record["dtype"] == "float32" and record["saved_dtype"] == str(kind).removeprefix(
        "torch."
    )
    processes.call("prune", "--model", dense, "--output", tmp_path / "wide", "--calibration", text,
                   "--windows", "2", "--length", "64", "--save-dtype", "float32")
    assert {*types_in(tmp_path / "wide").values()} == {"F32"}
    narrow, wide = (load_model(str(tmp_path / o))[0] for o in ("out", "wide"))
    for a, b in zip(narrow.parameters(), wide.parameters(), strict=True):
        assert torch.equal(a, b.to(kind).float())


def test_tensors_that_were_kept_in_float32_stay_so(tmp_path):
    model = tiny_model("deepseek_v3").bfloat16()
    model.model.layers[1].mlp.gate.float()
    folder = save_model(model, tiny_tokenizer(), tmp_path / "dense", {})
    most, others = stored_types(str(folder))
    assert most == torch.bfloat16 and set(others.values()) == {torch.float32} and all(
        "gate" in o for o in others)
    computed, tokenizer = load_model(str(folder))
    as_stored(computed, most, others)
    assert types_in(save_model(computed, tokenizer, tmp_path / "again", {})) == types_in(folder)


def test_types_that_are_not_ours_are_left_alone(tmp_path):
    folder = save_model(tiny_llama().double(), tiny_tokenizer(), tmp_path / "dense", {})
    assert stored_types(str(folder)) == (None, {})
    model = tiny_llama()
    as_stored(model, None)
    assert model.dtype == torch.float32


def test_what_a_type_cannot_hold_is_saved_as_it_was_computed():
    model = tiny_llama()
    model.model.layers[0].mlp.up_proj.weight.data[3, 3] = 1e6
    said = (
        r"After pruning, model.layers.0.mlp.up_proj.weight reaches 1e\+06, which overflows float16,"
        r" the type of its files.*saved in float32"
    )
    with pytest.warns(UserWarning, match=said):
        assert as_stored(model, torch.float16) == Stored("float32", 0)
    assert {o.dtype for o in model.parameters()} == {torch.float32}
    with pytest.raises(CalibPruneError, match="dtype"): saved_type("int8", "smollm2-135m")


def test_a_type_that_was_asked_for_and_overflows_is_refused():
    model = tiny_llama()
    model.model.layers[0].mlp.up_proj.weight.data[3, 3] = 1e6
    with pytest.raises(CalibPruneError, match="up_proj.weight .*float16. float32 and bfloat16"):
        as_stored(model, torch.float16, asked=True)
    assert model.dtype == torch.float32
    with pytest.raises(CalibPruneError, match="up_proj.weight"):
        check_saved_type(model, torch.float16)
    check_saved_type(model, torch.float16, changing={"model.layers.0.mlp.up_proj.weight"})
    check_saved_type(model, None)


@pytest.mark.parametrize("most", [torch.float32, None])
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_nan_and_infinity_are_never_saved(most, number):
    model = tiny_llama()
    model.lm_head.weight.data[3, 3] = number
    with pytest.raises(CalibPruneError, match="lm_head.weight"):
        as_stored(model, most)


def pruned(dense, tmp_path, *more):
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 400)
    done = call("prune", "--model", dense, "--output", tmp_path / "out", "--calibration", text,
                "--windows", "2", "--length", "64", "--method", "wanda", *more)
    return done.kind, " ".join(done.said.split())


def test_a_type_that_cannot_hold_a_norm_is_refused_before_the_work(tmp_path):
    model = tiny_llama()
    model.model.norm.weight.data[3] = 1e5
    dense = save_model(model, tiny_tokenizer(), tmp_path / "dense", {})
    kind, said = pruned(dense, tmp_path, "--save-dtype", "float16")
    assert (
        kind == "refused"
        and "model.norm.weight reaches 1e+05, which overflows float16" in said
        and "pruning" not in said
    )
    assert not (tmp_path / "out").exists()


def test_a_record_counts_the_zeros_of_the_saved_file(tmp_path):
    model = tiny_llama()
    # float16 holds nothing below 6e-8
    for layer in model.model.layers: layer.mlp.down_proj.weight.data *= 1e-7
    dense = save_model(model, tiny_tokenizer(), tmp_path / "dense", {})
    kind, said = pruned(dense, tmp_path, "--save-dtype", "float16", "--json")
    assert kind == "done" and '"weights rounded to zero by float16":' in said
    record, held = json.loads((tmp_path / "out/calib_prune.json").read_text()), load_file(
        tmp_path / "out/model.safetensors"
    )
    proj = {
        k.removeprefix("model.layers.").removesuffix(".weight"): o
        for k, o in held.items()
        if "proj" in k
    }
    zeros, numbers = sum(int((o == 0).sum()) for o in proj.values()), sum(
        o.numel() for o in proj.values()
    )
    assert record["achieved_sparsity"] == pytest.approx(zeros / numbers) and zeros / numbers > 0.55
    for o in record["layers"]:
        assert o["sparsity"] == pytest.approx(
            float((proj[f"{o['layer']}.{o['name']}"] == 0).float().mean())
        )
    assert record["rounded_to_zero"] > 1000
    assert not [o for o in record["layers"] if o["sparsity"] > 0.9 and "down_proj" not in o["name"]]


def test_tied_weights_stay_tied():
    model = tiny_llama(tie_word_embeddings=True)
    as_stored(model, torch.bfloat16)
    assert model.lm_head.weight is model.model.embed_tokens.weight and model.dtype == torch.bfloat16
