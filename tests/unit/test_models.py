"Loading and saving: nothing from a model folder is executed, nothing half-written stays."
import json
import math
import os
import pickle
import re
import resource
import signal
import struct
import time

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from calib_prune.core import CalibPruneError
from calib_prune.data.gguf import convert_gguf
from calib_prune.model import loading
from calib_prune.model.loading import (
    check_output,
    end_of_text_id,
    load_model,
    load_tokenizer,
    model_revision,
    not_finite,
    save_model,
    weight_count,
)
from calib_prune.model.stored_types import quantised_type
from calib_prune.model.tiny import tiny_llama, tiny_tokenizer
from calib_prune.pipeline.evaluate import check_tokenizers


def test_round_trip_through_plain_transformers(tmp_path):
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    folder = save_model(model, tokenizer, tmp_path / "out", {"why": "test"})
    again = AutoModelForCausalLM.from_pretrained(folder)
    ids = AutoTokenizer.from_pretrained(folder)("Grüße, 世界", return_tensors="pt")["input_ids"]
    assert torch.equal(ids, tokenizer("Grüße, 世界", return_tensors="pt")["input_ids"])
    assert torch.equal(again(ids).logits, model(ids).logits)


@pytest.mark.parametrize("dtype", ["float32", "bf16", "fp16"])
def test_number_formats(tmp_path, dtype):
    folder = str(save_model(tiny_llama(), tiny_tokenizer(), tmp_path / "out", {}))
    model, _ = load_model(folder, dtype)
    assert {p.dtype for p in model.parameters()} == {
        dict(float32=torch.float32, bf16=torch.bfloat16, fp16=torch.float16)[dtype]
    }


@pytest.mark.parametrize("gib, said", [(1.1, "Use bfloat16 .1.0 GiB., or a machine"),
                                       (0.9, "GiB. Use a machine with more memory")])
def test_a_model_larger_than_the_memory_is_refused_before_it_is_loaded(
    tmp_path, monkeypatch, gib, said
):
    model = tiny_llama()
    folder = save_model(model, tiny_tokenizer(), tmp_path / "out", {})
    count = sum(parameter.numel() for parameter in model.parameters())
    assert weight_count(folder) == count
    monkeypatch.setattr(loading, "total_memory", lambda device: gib * count * 2 / 2**30)
    monkeypatch.setattr(loading, "_load", lambda *_: pytest.fail("loaded"))
    with pytest.raises(CalibPruneError, match=f"{count:,} weights need .* float32, and this") as e:
        load_model(str(folder))
    assert re.search(said.replace("1.0", f"{count * 2 / 2**30:.1f}"), str(e.value))


def test_revision_follows_the_weights(tmp_path):
    first = save_model(tiny_llama(0), tiny_tokenizer(), tmp_path / "a", {})
    same = save_model(tiny_llama(0), tiny_tokenizer(), tmp_path / "b", {"other": "record"})
    other = save_model(tiny_llama(1), tiny_tokenizer(), tmp_path / "c", {})
    assert model_revision(str(first)) == model_revision(str(same)) != model_revision(str(other))


class Bomb:
    def __reduce__(self): return (open, ("exploded", "w"))


def test_pickles_are_never_opened(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = save_model(tiny_llama(), tiny_tokenizer(), tmp_path / "m", {})
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(CalibPruneError, match="pickle"): load_model(str(folder))
    assert not (tmp_path / "exploded").exists()


def test_code_in_a_model_folder_is_never_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = save_model(tiny_llama(), tiny_tokenizer(), tmp_path / "m", {})
    config = (folder / "config.json").read_text()
    (folder / "modeling_evil.py").write_text("open('exploded', 'w')\nclass Evil: pass\n")
    (folder / "config.json").write_text(
        config.replace(
            '"model_type": "llama"', '"model_type": "evil", "auto_map": '
            '{"AutoConfig": "modeling_evil.Evil", "AutoModelForCausalLM": "modeling_evil.Evil"}'))
    with pytest.raises(CalibPruneError): load_model(str(folder))
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("make, message", [
    (lambda d: (d / "x").mkdir(), "no config.json"),
    (lambda d: ((d / "x").mkdir(), (d / "x/config.json").write_text("{}")), "no weights"),
    (lambda d: ((d / "x").mkdir(), (d / "x/config.json").write_text('{"model_type": "llama"}'),
                (d / "x/model.safetensors").write_bytes(b"half a file")), "Cannot load .*x"),
    (lambda d: (d / "x").write_text("hello"), "not a GGUF file"),
    (lambda d: (d / "x.gguf").write_text("hello"), "Cannot load .*x"),
])
def test_broken_models(tmp_path, make, message):
    make(tmp_path)
    (path,) = tmp_path.glob("x*")
    with pytest.raises(CalibPruneError, match=message): load_model(str(path))


def test_missing_weights_are_never_made_up(tmp_path):
    folder = save_model(tiny_llama(), tiny_tokenizer(), tmp_path / "m", {})
    weights = load_file(folder / "model.safetensors")
    save_file({k: v for k, v in weights.items() if "layers.1" not in k},
              folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CalibPruneError, match=" 9 .* model.layers.1"):
        load_model(str(folder))


def test_weights_that_do_not_fit_their_config(tmp_path):
    folder = save_model(tiny_llama(), tiny_tokenizer(), tmp_path / "m", {})
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(
        config.replace('"intermediate_size": 48', '"intermediate_size": 40')
    )
    with pytest.raises(CalibPruneError): load_model(str(folder))


@pytest.mark.parametrize(
    "name", ["num_hidden_layers", "vocab_size", "num_key_value_heads", "intermediate_size"]
)
def test_sizes_that_the_files_cannot_have_take_no_memory(tmp_path, name):
    folder = save_model(tiny_llama(), tiny_tokenizer(), tmp_path / "m", {})
    told = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(told | {name: 10**12}))
    with pytest.raises(CalibPruneError, match=f"{name} is 1,000,000,000,000"):
        load_model(str(folder))


def test_a_link_that_leads_out_of_a_model_is_not_followed(tmp_path):
    folder = save_model(tiny_llama(), tiny_tokenizer(), tmp_path / "m", {})
    (tmp_path / "secret").write_text("secret")
    (folder / "chat_template.jinja").symlink_to(tmp_path / "secret")
    with pytest.raises(CalibPruneError, match="chat_template.jinja .*secret"):
        load_model(str(folder))


def test_a_snapshot_of_the_hub_may_link_to_its_blobs(tmp_path):
    folder = save_model(tiny_llama(), tiny_tokenizer(), tmp_path / "snapshots/abc", {})
    (tmp_path / "blobs").mkdir()
    for o in [*folder.iterdir()]:
        o.rename(tmp_path / "blobs" / o.name), o.symlink_to(f"../../blobs/{o.name}")
    (tmp_path / "blobs/template").write_text("{{ messages }}")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates/x.jinja").symlink_to("../../../blobs/template")
    load_model(str(folder))


@pytest.mark.parametrize("link, target", [("additional_chat_templates/x.jinja", "secret/x.jinja"),
                                          ("additional_chat_templates", "secret"),
                                          ("a/b/c/x.json", "secret/x.jinja"),
                                          ("model.safetensors.d", "blobs"),
                                          ("x.safetensors", "secret")])
def test_no_link_below_a_model_leads_out_of_it(tmp_path, link, target):
    "The hub's blobs are blobs of a snapshot only."
    folder = save_model(tiny_llama(), tiny_tokenizer(), tmp_path / "own/m", {})
    for name in ("secret", "blobs"): (tmp_path / name).mkdir()
    (tmp_path / "secret/x.jinja").write_text("secret")
    (folder / link).parent.mkdir(parents=True, exist_ok=True)
    (folder / link).symlink_to(tmp_path / target)
    with pytest.raises(CalibPruneError, match=link):
        load_model(str(folder))


def changed_model(folder, name, number, at=0):
    "A tiny model with one other number."
    model = tiny_llama()
    model.state_dict()[name].view(-1)[at] = number
    return str(save_model(model, tiny_tokenizer(), folder, {}))


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", [
    "model.norm.weight", "lm_head.weight", "model.embed_tokens.weight",
    "model.layers.1.mlp.up_proj.weight"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_nan_and_infinity_in_a_file_are_refused(tmp_path, name, number, dtype):
    with pytest.raises(CalibPruneError, match=name):
        load_model(changed_model(tmp_path / "m", name, number, -1), dtype)


@pytest.mark.parametrize("number, dtype, fits", [(1e5, "float16", "float32 and bfloat16 can"),
                                                 (-1e5, "fp16", "float32 and bfloat16 can"),
                                                 (3.4e38, "bfloat16", "float32 can")])
def test_a_weight_that_overflows_is_named_with_the_types_that_hold_it(
    tmp_path, number, dtype, fits
):
    folder = changed_model(tmp_path / "m", "model.norm.weight", number)
    with pytest.raises(
            CalibPruneError,
            match=rf"model.norm.weight reaches {abs(number):.3g}, which overflows. {fits} hold it".
            replace("+", r"\+")):
        load_model(folder, dtype)
    if abs(number) < 1e6: load_model(folder, "bfloat16")


def test_a_buffer_may_hold_what_masks_hold():
    model = tiny_llama()
    model.register_buffer("mask", torch.tensor([0, -torch.inf]))
    assert not_finite(model) is None
    for number in (torch.inf, torch.nan):
        model.mask = torch.tensor([number, 0])
        assert not_finite(model) == "mask"
    model.register_buffer("mask", torch.tensor([torch.nan]), persistent=False)
    assert not_finite(model) is None, "no file holds it"


def test_a_model_that_computes_nan_is_refused(tmp_path):
    folder = save_model(tiny_llama(), tiny_tokenizer(), tmp_path / "m", {})
    told = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(told | dict(rms_norm_eps=-1e9)))
    with pytest.raises(CalibPruneError, match="NaN .* torch.float32"):
        load_model(str(folder))


def test_a_tokenizer_without_its_unknown_token_is_refused(tmp_path):
    "It would fail at the first character that is not in its vocabulary, in scoring after hours."
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    tiny_llama().save_pretrained(tmp_path)
    backend = Tokenizer(models.WordPiece({"a": 0, "e": 1}, unk_token="[UNK]"))
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="e").save_pretrained(tmp_path)
    with pytest.raises(CalibPruneError, match=r"the tokenizer of .*Missing \[UNK\] token"):
        load_model(str(tmp_path))


def test_sizes_by_default_take_no_memory(tmp_path):
    folder = save_model(tiny_llama(), tiny_tokenizer(), tmp_path / "m", {})
    (folder / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(CalibPruneError, match="vocab_size is 32,000"):
        load_model(str(folder))


def test_a_token_numbered_beyond_reason(tmp_path):
    folder = save_model(tiny_llama(), tiny_tokenizer(), tmp_path / "m", {})
    told = json.loads((folder / "tokenizer.json").read_text())
    told["added_tokens"][0]["id"] = 10**9
    (folder / "tokenizer.json").write_text(json.dumps(told))
    with pytest.raises(CalibPruneError, match="1,000,000,000"):
        load_model(str(folder))


def test_weights_that_are_a_pipe_are_not_waited_for(tmp_path):
    folder = save_model(tiny_llama(), tiny_tokenizer(), tmp_path / "m", {})
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "model.safetensors")
    with pytest.raises(CalibPruneError, match="model.safetensors .*not a file"):
        load_model(str(folder))


def test_the_current_folder_is_a_fine_output(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    save_model(tiny_llama(), tiny_tokenizer(), ".", {})
    load_model(".")
    assert [o.name for o in tmp_path.iterdir()] == ["here"], "the folder was filled, not replaced"


def test_an_output_below_a_file_is_refused_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CalibPruneError):
        check_output(tmp_path / "file" / "out")


def test_occupied_output_is_left_alone(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(CalibPruneError):
        save_model(tiny_llama(), tiny_tokenizer(), tmp_path / "out", {})
    assert [o.name for o in tmp_path.rglob("*")] == ["out", "thesis.txt"]


def test_a_full_disk_leaves_nothing_behind(tmp_path):
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, limit[1]))
    try:
        with pytest.raises(CalibPruneError, match="out"):
            save_model(tiny_llama(), tiny_tokenizer(), tmp_path / "out", {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)
    assert list(tmp_path.iterdir()) == []


def write_gguf(path, model, file_type=gguf.LlamaFileType.ALL_F32, splitting="gpt-2", **more):
    "A LLaMA as llama.cpp writes it: rotary rows of q and k interleaved, tensors renamed, a byte-level vocabulary."  # noqa: E501
    config, out = model.config, gguf.GGUFWriter(path, "llama")
    out.add_file_type(file_type), out.add_context_length(512), out.add_embedding_length(32)
    out.add_block_count(2), out.add_feed_forward_length(48)
    out.add_head_count(4), out.add_head_count_kv(2), out.add_layer_norm_rms_eps(config.rms_norm_eps)
    out.add_rope_freq_base(config.rope_parameters["rope_theta"])
    out.add_vocab_size(264), out.add_rope_dimension_count(8)
    vocab = sorted(tiny_tokenizer().get_vocab().items(), key=lambda kv: kv[1])
    tokens = [t for t, _ in vocab] + ["ab"] + [f"<unused{i}>" for i in range(263 - len(vocab))]
    out.add_tokenizer_model("gpt2"), out.add_token_list(tokens), out.add_token_merges(["a b"])
    if splitting: out.add_tokenizer_pre(splitting)
    out.add_token_types([3] + [1] * 263), out.add_bos_token_id(0), out.add_eos_token_id(
        0
    ), out.add_unk_token_id(0)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    for name, p in more.items(): out.add_tensor(name + ".weight" * ("." not in name), p.numpy())
    for name, p in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings: continue
        heads = 4 if "q_proj" in name else 2 if "k_proj" in name else 0
        if heads:
            p = p.reshape(heads, 2, p.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(p.shape)
        out.add_tensor(
            names.get_name(name, try_suffixes=(".weight",)), p.numpy().astype(np.float32).copy()
        )
    out.write_header_to_file(), out.write_kv_data_to_file(), out.write_tensors_to_file(), out.close(
    )


def test_gguf_loads_and_converts_to_the_same_model(tmp_path):
    model, ids = tiny_llama(), torch.arange(1, 20)[None]
    write_gguf(tmp_path / "m.gguf", model)
    loaded, tokenizer = load_model(str(tmp_path / "m.gguf"))
    assert torch.allclose(loaded(ids).logits, model(ids).logits, atol=1e-5)
    assert end_of_text_id(tokenizer) == 0
    folder = convert_gguf(tmp_path / "m.gguf", tmp_path / "converted")
    again, _ = load_model(str(folder))
    assert torch.equal(again(ids).logits, loaded(ids).logits)


@pytest.mark.parametrize("splitting, pieces", [
    ("smollm", ["ĊĊ", "5", "8", "Ġcm", "ĠĠ", "1"]), ("gpt-2", ["Ċ", "Ċ", "58", "Ġcm", "Ġ", "Ġ1"])])
def test_a_gguf_file_splits_text_as_it_says(tmp_path, splitting, pieces):
    write_gguf(tmp_path / "m.gguf", tiny_llama(), splitting=splitting)
    file = str(tmp_path / "m.gguf")
    for tokenizer in (load_tokenizer(file), load_model(file)[1],
                      load_tokenizer(str(convert_gguf(file, tmp_path / "converted")))):
        split = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("\n\n58 cm  1")
        assert [piece for piece, _ in split] == pieces
    folder = convert_gguf(file, tmp_path / "as-studied", digits=False)
    split = load_tokenizer(str(folder)).backend_tokenizer.pre_tokenizer
    assert [piece for piece, _ in split.pre_tokenize_str("58 1")] == ["58", "Ġ1"]


def test_a_gguf_file_is_compared_with_the_folder_it_was_made_from(tmp_path):
    "The file has all tokens of the folder, and not the rules of its tokenizer.json."
    write_gguf(tmp_path / "m.gguf", tiny_llama())
    file, folder = str(tmp_path / "m.gguf"), save_model(tiny_llama(), tiny_tokenizer(),
                                                        tmp_path / "m", {})
    check_tokenizers(str(folder), [file])
    check_tokenizers(file, [str(folder), str(convert_gguf(file, tmp_path / "converted"))])
    words = folder / "tokenizer.json"
    words.write_text(words.read_text().replace('"a":', '"x-":').replace('"b":', '"a":'))
    for dense, model in ((folder, file), (file, folder)):
        with pytest.raises(CalibPruneError, match="has another tokenizer"):
            check_tokenizers(str(dense), [str(model)])


def test_a_gguf_file_with_an_unknown_splitting_is_read_with_a_warning(tmp_path, recwarn):
    write_gguf(tmp_path / "known.gguf", tiny_llama(), splitting="llama-bpe")
    load_tokenizer(str(tmp_path / "known.gguf"))
    assert not [one for one in recwarn if "splitting" in str(one.message)]
    write_gguf(tmp_path / "m.gguf", tiny_llama(), splitting="deepseek-llm")
    with pytest.warns(UserWarning, match="m.gguf names the text splitting 'deepseek-llm'"):
        load_tokenizer(str(tmp_path / "m.gguf"))
    write_gguf(tmp_path / "old.gguf", tiny_llama(), splitting="")
    with pytest.warns(UserWarning, match="old.gguf names no text splitting"):
        load_tokenizer(str(tmp_path / "old.gguf"))


def other_gguf(folder, change):
    "A GGUF file whose bytes were changed, and its name."
    write_gguf(folder / "m.gguf", tiny_llama())
    data = bytearray((folder / "m.gguf").read_bytes())
    change(data)
    (folder / "m.gguf").write_bytes(data)
    return str(folder / "m.gguf")


def renamed(old, new):
    def change(data): data[:] = data.replace(old, new)
    return change


@pytest.mark.parametrize(
    "old, new, said",
    [
        (
            b"blk.1.ffn_up.weight",
            b"blk.1.ffn_uq.weight",
            (
                r"lacks 1 weights of the model, such as model.layers.1.mlp.up_proj.weight; .*"
                r" blk.1.ffn_uq.weight"
            ),
        ),
        (
            b"\x0d\0\0\0\0\0\0\0output.weight",
            b"\x0d\0\0\0\0\0\0\0outqut.weight",
            "weights, but the model has .* outqut.weight",
        ),
        (
            b"output_norm.weight",
            b"output_morn.weight",
            r"lacks 1 weights of the model, such as model.norm.weight; .* output_morn.weight",
        ),
    ],
)
def test_a_gguf_file_with_a_renamed_tensor_is_refused(tmp_path, old, new, said):
    path = other_gguf(tmp_path, renamed(old, new))
    with pytest.raises(CalibPruneError, match=said): load_model(path)
    with pytest.raises(CalibPruneError, match=said): convert_gguf(path, tmp_path / "converted")
    assert not (tmp_path / "converted").exists()


def test_a_gguf_file_may_have_tied_embeddings_and_tables_that_are_computed(tmp_path):
    model = tiny_llama(tie_word_embeddings=True)
    write_gguf(tmp_path / "m.gguf", model, rope_freqs=torch.ones(4))
    loaded, _ = load_model(str(tmp_path / "m.gguf"))
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def llama3_factors(theta, factor, dim=8):
    "The table of factors, as llama.cpp's convert_hf_to_gguf.py computes it."
    factors = []
    for i in range(0, dim, 2):
        wavelength = 2 * math.pi * theta ** (i / dim)
        smooth = (8192 / wavelength - 1) / (4 - 1)
        factors.append(1 / ((1 - smooth) / factor + smooth))
        if wavelength < 8192 / 4: factors[-1] = 1
        elif wavelength > 8192: factors[-1] = factor
    return torch.tensor(factors)


def test_a_gguf_file_of_llama_3_has_its_rotary_scaling(tmp_path):
    rule = dict(rope_type="llama3", rope_theta=500_000.0, factor=8.0, low_freq_factor=1.0,
                high_freq_factor=4.0, original_max_position_embeddings=8192)
    model, ids = tiny_llama(rope_parameters=rule), torch.arange(1, 200)[None] % 200
    write_gguf(tmp_path / "m.gguf", model, rope_freqs=llama3_factors(500_000.0, 8.0))
    loaded, _ = load_model(str(tmp_path / "m.gguf"))
    assert torch.allclose(loaded(ids).logits, model(ids).logits, atol=1e-5)
    again, _ = load_model(str(convert_gguf(tmp_path / "m.gguf", tmp_path / "converted")))
    assert again.config.rope_parameters["factor"] == 8.0
    assert torch.equal(again(ids).logits, loaded(ids).logits)
    write_gguf(tmp_path / "plain.gguf", model)
    without, _ = load_model(str(tmp_path / "plain.gguf"))
    assert not torch.allclose(without(ids).logits, model(ids).logits, atol=1e-5)


@pytest.mark.parametrize("name", ["rope_freqs", "rope_factors_long"])
def test_a_gguf_file_with_another_rotary_table_is_refused(tmp_path, name):
    write_gguf(tmp_path / "m.gguf", tiny_llama(), **{name: torch.tensor([1.0, 2.0, 3.0, 4.0])})
    with pytest.raises(CalibPruneError, match=f"m.gguf: its table {name}"):
        load_model(str(tmp_path / "m.gguf"))


def test_a_gguf_file_with_tensors_that_the_model_has_no_place_for_is_refused(tmp_path):
    write_gguf(tmp_path / "m.gguf", tiny_llama(), **{"blk.0.attn_q.bias": torch.ones(32)})
    with pytest.raises(CalibPruneError, match="blk.0.attn_q.bias"):
        load_model(str(tmp_path / "m.gguf"))


def test_nan_in_a_gguf_file_is_refused(tmp_path):
    model = tiny_llama()
    model.model.norm.weight.data[3] = float("nan")
    write_gguf(tmp_path / "m.gguf", model)
    with pytest.raises(CalibPruneError, match="model.norm.weight"):
        load_model(str(tmp_path / "m.gguf"))


def test_what_is_beside_a_gguf_file_is_no_part_of_it(tmp_path):
    write_gguf(tmp_path / "m.gguf", tiny_llama())
    before = load_tokenizer(str(tmp_path / "m.gguf")).get_vocab()
    (tmp_path / "additional_chat_templates").mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json", "generation_config.json",
                 "additional_chat_templates/x.jinja"):
        (tmp_path / name).write_text("secret")
    model, tokenizer = load_model(str(tmp_path / "m.gguf"))
    assert tokenizer.get_vocab() == load_tokenizer(str(tmp_path / "m.gguf")).get_vocab() == before
    out = save_model(model, tokenizer, tmp_path / "out", {})
    assert not [o for o in out.rglob("*") if o.is_file() and b"secret" in o.read_bytes()]


def text(of): return struct.pack("<Q", len(of)) + of


def small_gguf(tensors, values, *rest):
    "A file with the counts that are said, an architecture, and something more."
    named = text(b"general.architecture") + struct.pack("<I", 8) + text(b"llama")
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, values) + named + b"".join(rest)


@pytest.mark.parametrize("data, said", [
    (small_gguf(2**40, 1), "announces 1,099,511,627,776 tensors, but 53 bytes follow"),
    (small_gguf(0, 2**40), "announces 1,099,511,627,776 values"),
    (small_gguf(0, 2, text(b"a"), struct.pack(
        "<IIQ", 9, 4, 2**40)), "announces 1,099,511,627,776 items of an array, but 0 bytes follow"),
    (small_gguf(0, 2, text(b"a"), struct.pack(
        "<IIQ", 9, 8, 2**40)), "announces 1,099,511,627,776 items of an array"),
    (small_gguf(0, 2, text(b"a"), struct.pack("<IQ", 8, 2**
                                              40)), "announces 1,099,511,627,776 bytes of text"),
    (small_gguf(0, 2, struct.pack("<Q", 2**40)), "announces 1,099,511,627,776 bytes of text"),
    (small_gguf(1, 1, text(b"t"), struct.pack("<IQIQ", 1, 2**40, 0,
                                              0)), "its tensors end at byte 4,398,046,511,232"),
    (small_gguf(1, 1, text(b"t"), struct.pack("<IQIQ", 1, 8, 0, 0),
                b"\0" * 999), "its head lacks llama.block_count"),
    (small_gguf(0, 1), "it holds no tensors"), (b"GGUF", "ends within its head"),
    (b"", "empty file"), (b"half a file", "does not begin as")])
def test_a_small_gguf_file_takes_neither_memory_nor_time(tmp_path, data, said):
    (path := tmp_path / "m.gguf").write_bytes(data)
    for read in (load_model, load_tokenizer, model_revision):
        began = time.process_time()
        with pytest.raises(CalibPruneError, match=said): read(str(path))
        assert time.process_time() - began < 5


@pytest.mark.parametrize("name", ["m.gguf", "m/model.safetensors"])
@pytest.mark.parametrize("head", [True, False])
def test_a_file_of_a_terabyte_of_nothing_is_not_read(tmp_path, name, head):
    write_gguf(tmp_path / "m.gguf", tiny_llama())
    save_model(tiny_llama(), tiny_tokenizer(), tmp_path / "m", {})
    if not head: (tmp_path / name).write_bytes(b"")
    os.truncate(tmp_path / name, 1 << 40)
    asked = tmp_path / name if name == "m.gguf" else tmp_path / "m"
    for read in (load_model, model_revision):
        with pytest.raises(CalibPruneError, match="Cannot load .*m"): read(str(asked))


@pytest.mark.real
def test_the_default_model_speaks():
    model, tokenizer = load_model("smollm2-135m")
    ids = tokenizer("The capital of France is", return_tensors="pt")
    out = model.generate(
        **ids, max_new_tokens=4, do_sample=False, pad_token_id=tokenizer.eos_token_id
    )
    assert "Paris" in tokenizer.decode(out[0])
    assert end_of_text_id(tokenizer) == 0 != tokenizer.eos_token_id


def test_the_type_of_a_gguf_file_is_known(tmp_path):
    kind = gguf.LlamaFileType.MOSTLY_Q4_K_M
    write_gguf(tmp_path / "m.gguf", tiny_llama(), file_type=kind)
    folder = save_model(tiny_llama(), tiny_tokenizer(), tmp_path / "out", {})
    asked = (str(tmp_path / "m.gguf"), str(folder), "smollm2-135m", "qwen2.5-coder-1.5b")
    assert [quantised_type(model) for model in asked] == ["Q4_K_M", None, "Q4_1", "Q4_K_M"]


def test_a_second_dose_of_rounding_changes_the_layers_and_nothing_else(tmp_path):
    write_gguf(tmp_path / "m.gguf", tiny_llama())
    plain, rounded = (convert_gguf(tmp_path / "m.gguf", tmp_path / name, again)
                      for name, again in (("plain", False), ("rounded", True)))
    before, after = (load_file(folder / "model.safetensors") for folder in (plain, rounded))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    inside = {name for name, weight in before.items()
              if ".layers." in name and weight.ndim == 2 and weight.shape[1] % 32 == 0}
    assert changed == inside and len(inside) == 12
    change = [(before[name] - after[name]).norm() / before[name].norm() for name in inside]
    assert 0.03 < min(change) and max(change) < 0.15
