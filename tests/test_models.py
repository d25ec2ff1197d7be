"Loading and saving: nothing from a model folder is executed, nothing half-written stays."
import json
import os
import pickle
import subprocess
import sys

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from calib_prune.core import CalibPruneError
from calib_prune.data.gguf import convert_gguf
from calib_prune.model.loading import (check_output, end_of_text_id, load_model, model_revision,
                                       save_model)
from calib_prune.model.tiny import tiny_llama, tiny_tokenizer


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
    assert {p.dtype for p in model.parameters()} == {dict(float32=torch.float32, bf16=torch.bfloat16, fp16=torch.float16)[dtype]}


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
    with pytest.raises(CalibPruneError, match="only as a pickle"): load_model(str(folder))
    assert not (tmp_path / "exploded").exists()


def test_code_in_a_model_folder_is_never_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = save_model(tiny_llama(), tiny_tokenizer(), tmp_path / "m", {})
    config = (folder / "config.json").read_text()
    (folder / "modeling_evil.py").write_text("open('exploded', 'w')\nclass Evil: pass\n")
    (folder / "config.json").write_text(config.replace('"model_type": "llama"', '"model_type": "evil", "auto_map": '
                                                       '{"AutoConfig": "modeling_evil.Evil", "AutoModelForCausalLM": "modeling_evil.Evil"}'))
    with pytest.raises(CalibPruneError, match="Cannot load"): load_model(str(folder))
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
    save_file({k: v for k, v in weights.items() if "layers.1" not in k}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CalibPruneError, match="lack 9 weights, such as model.layers.1"): load_model(str(folder))


def test_weights_that_do_not_fit_their_config(tmp_path):
    folder = save_model(tiny_llama(), tiny_tokenizer(), tmp_path / "m", {})
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace('"intermediate_size": 48', '"intermediate_size": 40'))
    with pytest.raises(CalibPruneError, match="Cannot load"): load_model(str(folder))


@pytest.mark.parametrize("name", ["num_hidden_layers", "vocab_size", "num_key_value_heads", "intermediate_size"])
def test_sizes_that_the_files_cannot_have_take_no_memory(tmp_path, name):
    folder = save_model(tiny_llama(), tiny_tokenizer(), tmp_path / "m", {})
    told = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(told | {name: 10**12}))
    with pytest.raises(CalibPruneError, match=f"{name} is 1,000,000,000,000, but its files hold 21 tensors"): load_model(str(folder))


def test_a_link_that_leads_out_of_a_model_is_not_followed(tmp_path):
    folder = save_model(tiny_llama(), tiny_tokenizer(), tmp_path / "m", {})
    (tmp_path / "secret").write_text("secret")
    (folder / "chat_template.jinja").symlink_to(tmp_path / "secret")
    with pytest.raises(CalibPruneError, match="chat_template.jinja is a link to .*secret, outside the model's folder"): load_model(str(folder))


def test_a_snapshot_of_the_hub_may_link_to_its_blobs(tmp_path):
    folder = save_model(tiny_llama(), tiny_tokenizer(), tmp_path / "snapshots/abc", {})
    (tmp_path / "blobs").mkdir()
    for o in [*folder.iterdir()]: o.rename(tmp_path / "blobs" / o.name), o.symlink_to(f"../../blobs/{o.name}")
    load_model(str(folder))


def test_a_token_numbered_beyond_reason(tmp_path):
    folder = save_model(tiny_llama(), tiny_tokenizer(), tmp_path / "m", {})
    told = json.loads((folder / "tokenizer.json").read_text())
    told["added_tokens"][0]["id"] = 10**9
    (folder / "tokenizer.json").write_text(json.dumps(told))
    with pytest.raises(CalibPruneError, match="it numbers a token 1,000,000,000"): load_model(str(folder))


def test_weights_that_are_a_pipe_are_not_waited_for(tmp_path):
    folder = save_model(tiny_llama(), tiny_tokenizer(), tmp_path / "m", {})
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "model.safetensors")
    with pytest.raises(CalibPruneError, match="model.safetensors is damaged.*not a file"): load_model(str(folder))


def test_the_current_folder_is_a_fine_output(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    save_model(tiny_llama(), tiny_tokenizer(), ".", {})
    load_model(".")
    assert [o.name for o in tmp_path.iterdir()] == ["here"], "the folder was filled, not replaced"


def test_an_output_below_a_file_is_refused_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CalibPruneError, match="cannot be made"): check_output(tmp_path / "file" / "out")


def test_occupied_output_is_left_alone(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(CalibPruneError, match="not empty"): save_model(tiny_llama(), tiny_tokenizer(), tmp_path / "out", {})
    assert [o.name for o in tmp_path.rglob("*")] == ["out", "thesis.txt"]


FULL_DISK = """
import resource, signal, sys
from calib_prune.core import CalibPruneError
from calib_prune.model.loading import save_model
from calib_prune.model.tiny import tiny_llama, tiny_tokenizer
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))
try: save_model(tiny_llama(), tiny_tokenizer(), sys.argv[1], {})
except CalibPruneError as e: print(e)
"""


def test_a_full_disk_leaves_nothing_behind(tmp_path):
    done = subprocess.run([sys.executable, "-c", FULL_DISK, str(tmp_path / "out")], capture_output=True, text=True)
    assert "Cannot save the model to" in done.stdout, done.stderr
    assert list(tmp_path.iterdir()) == []


def write_gguf(path, model):
    "A LLaMA as llama.cpp writes it: rotary rows of q and k interleaved, tensors renamed, a byte-level vocabulary."
    config, out = model.config, gguf.GGUFWriter(path, "llama")
    out.add_context_length(512), out.add_embedding_length(32), out.add_block_count(2), out.add_feed_forward_length(48)
    out.add_head_count(4), out.add_head_count_kv(2), out.add_layer_norm_rms_eps(config.rms_norm_eps)
    out.add_rope_freq_base(10000.0), out.add_vocab_size(264), out.add_rope_dimension_count(8)
    vocab = sorted(tiny_tokenizer().get_vocab().items(), key=lambda kv: kv[1])
    tokens = [t for t, _ in vocab] + ["ab"] + [f"<unused{i}>" for i in range(263 - len(vocab))]
    out.add_tokenizer_model("gpt2"), out.add_token_list(tokens), out.add_token_merges(["a b"])
    out.add_token_types([3] + [1] * 263), out.add_bos_token_id(0), out.add_eos_token_id(0), out.add_unk_token_id(0)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    for name, p in model.state_dict().items():
        heads = 4 if "q_proj" in name else 2 if "k_proj" in name else 0
        if heads: p = p.reshape(heads, 2, p.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(p.shape)
        out.add_tensor(names.get_name(name, try_suffixes=(".weight",)), p.numpy().astype(np.float32).copy())
    out.write_header_to_file(), out.write_kv_data_to_file(), out.write_tensors_to_file(), out.close()


def test_gguf_loads_and_converts_to_the_same_model(tmp_path):
    model, ids = tiny_llama(), torch.arange(1, 20)[None]
    write_gguf(tmp_path / "m.gguf", model)
    loaded, tokenizer = load_model(str(tmp_path / "m.gguf"))
    assert torch.allclose(loaded(ids).logits, model(ids).logits, atol=1e-5)
    assert end_of_text_id(tokenizer) == 0
    folder = convert_gguf(tmp_path / "m.gguf", tmp_path / "converted")
    again, _ = load_model(str(folder))
    assert torch.equal(again(ids).logits, loaded(ids).logits)


@pytest.mark.real
def test_the_default_model_speaks():
    model, tokenizer = load_model("smollm2-135m")
    ids = tokenizer("The capital of France is", return_tensors="pt")
    out = model.generate(**ids, max_new_tokens=4, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    assert "Paris" in tokenizer.decode(out[0])
    assert end_of_text_id(tokenizer) == 0 != tokenizer.eos_token_id
