"Recovery: the kept weights are trained, the zeros stay, an interruption changes nothing."
import json
import math
import shutil
import warnings
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from calib_prune.advice.report import report_on, settings_lines
from calib_prune.calibration.sets import build_calibration
from calib_prune.cli.recover import left_by_recover
from calib_prune.core import CalibPruneError
from calib_prune.model.loading import RECORD_FILE, save_model
from calib_prune.model.tiny import (
    MIXTURES,
    TINY_FAMILIES,
    tiny_llama,
    tiny_model,
    tiny_tokenizer,
)
from calib_prune.pipeline import recover
from calib_prune.pipeline.prune import has_pruned_zeros, prune_model
from calib_prune.pipeline.recover import RecoverSettings, lost_zeros, recover_model, shuffled
from calib_prune.pruning import recovery
from calib_prune.pruning.experts import one_by_one
from calib_prune.pruning.layers import decoder_layers, prunable
from calib_prune.pruning.recovery import (
    Trainer,
    Training,
    default_rate,
    masks_of,
    train,
    trained_matrices,
    window_loss,
)
from tests.processes import call

WINDOWS = torch.randint(1, 200, (6, 24), generator=torch.Generator().manual_seed(0))
QUICK = dict(length=32, batch=2, rate=1e-3)


def halved(model):
    "A model without the smaller half of each weight, experts included."
    for layer in decoder_layers(model):
        with one_by_one(layer):
            for linear in prunable(layer).values():
                weight = linear.weight.data
                weight[weight.abs() < weight.abs().median()] = 0
    return model


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    "A dense model, its text, and the model pruned in 2:4."
    folder = tmp_path_factory.mktemp("models")
    save_model(tiny_llama(0), tiny_tokenizer(), folder / "dense", {})
    (folder / "notes.txt").write_text(" ".join(f"word {i}" for i in range(900)))
    prune_model(folder / "dense", folder / "pruned", calibration=str(folder / "notes.txt"),
                windows=4, length=32, method="magnitude", sparsity="2:4")
    return folder


def recovered(models, out, **how):
    return recover_model(models / "pruned", models / "dense", out,
                         **dict(text=str(models / "notes.txt"), tokens=20 * 2 * 32) | QUICK | how)


def test_the_loss_is_that_of_its_definition():
    student, teacher, window = tiny_llama(1), tiny_llama(0), WINDOWS[0]
    with torch.no_grad():
        mine, theirs = (model(window[None]).logits[0].float() for model in (student, teacher))
        p, q = ((logits / 2).softmax(-1) for logits in (theirs, mine))
        wanted = 4 * (p * (p.log() - q.log())).sum(-1).mean()
        mine_loss = float(window_loss(student, teacher, window, 2.0))
        assert mine_loss == pytest.approx(float(wanted), 1e-4)
        crossed = F.cross_entropy(mine[:-1], window[1:])
        assert float(window_loss(student, None, window)) == pytest.approx(float(crossed), 1e-6)


@pytest.mark.parametrize("family", [*TINY_FAMILIES, *MIXTURES])
def test_only_kept_weights_of_the_layers_change(family, tmp_path):
    model, dense = halved(tiny_model(family)), tiny_model(family)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer = Trainer(model, dense, Training(steps=3, batch=2, rate=1e-3))
    assert train(trainer, WINDOWS, tmp_path, "a")
    assert len(trainer.masks) >= len(decoder_layers(model))
    for name, p in model.named_parameters():
        if name in trainer.masks: assert (p[~trainer.masks[name]] == 0).all(), name
        assert torch.equal(p, before[name]) != (name in trainer.parameters), name


def test_steps_are_plain_adamw_on_the_kept_weights():
    "Against torch's own optimiser on a copy."
    dense, copy = tiny_llama(0), halved(tiny_llama(0))
    trainer = Trainer(halved(tiny_llama(0)), dense, Training(steps=10, batch=2, rate=1e-3))
    theirs = {name: p for name, p in copy.named_parameters() if name in trainer.parameters}
    optimiser = torch.optim.AdamW(theirs.values(), lr=0.0, weight_decay=0.0)
    for step in range(2):
        rate = trainer.schedule.get_last_lr()[0]
        recovery.take_step(trainer, WINDOWS)
        optimiser.zero_grad()
        part = WINDOWS[2 * step:2 * step + 2]
        (sum(window_loss(copy, dense, window) for window in part) / 2).backward()
        for name, kept in trainer.masks.items(): theirs[name].grad *= kept
        torch.nn.utils.clip_grad_norm_(theirs.values(), 1.0)
        optimiser.param_groups[0]["lr"] = rate
        optimiser.step()
        for name, kept in trainer.masks.items(): theirs[name].data *= kept
    assert rate > 0.9e-3
    fresh, moved = dict(halved(tiny_llama(0)).named_parameters()), 0
    for name, p in trainer.parameters.items():
        torch.testing.assert_close(p.data, theirs[name].data)
        moved += not torch.equal(p, fresh[name])
    assert moved == len(theirs)


@pytest.mark.parametrize("how", [{}, dict(dtype="bfloat16")], ids=["float32", "bfloat16"])
def test_an_interruption_changes_no_bit(models, tmp_path, monkeypatch, how):
    "Also where the second run saves less for the backward pass."
    long = dict(tokens=50 * 2 * 32) | how
    whole = recovered(models, tmp_path / "whole", **long)
    steps = recovery.take_step

    def cut(trainer, windows):
        if trainer.done == 31: raise KeyboardInterrupt
        return steps(trainer, windows)
    monkeypatch.setattr(recovery, "take_step", cut)
    with pytest.raises(KeyboardInterrupt): recovered(models, tmp_path / "cut", **long)
    assert (tmp_path / "cut.state").is_dir() and not (tmp_path / "cut").exists()
    state = json.loads((tmp_path / "cut.state/state.json").read_text())
    assert state["done"] == 20
    taken = []
    monkeypatch.setattr(recovery, "take_step", lambda trainer, windows: (
        taken.append(trainer.done), steps(trainer, windows))[1])
    with pytest.warns(UserWarning, match="Goes on after step 20 of 50"):
        again = recovered(models, tmp_path / "cut", **long, gradient_checkpointing=True)
    assert taken == [*range(20, 50)], "from the stored state on"
    assert not (tmp_path / "cut.state").exists()
    assert again.record["weights"] == whole.record["weights"] != json.loads(
        (models / "pruned/calib_prune.json").read_text())["weights"]
    assert again.record["recovery"]["steps"] == 50


def test_a_model_that_another_tool_pruned_keeps_its_zeros_and_has_no_report(models, tmp_path):
    """A folder without a record is trained: `quantize` knows that it has zeros, and `report` says
    what is missing."""
    shutil.copytree(models / "pruned", tmp_path / "foreign")
    (tmp_path / "foreign" / RECORD_FILE).unlink()
    made = str(recover_model(tmp_path / "foreign", models / "dense", tmp_path / "made", tokens=64,
                             text=str(models / "notes.txt"), **QUICK).folder)
    assert has_pruned_zeros(made)
    with pytest.raises(CalibPruneError, match="no record of how it was pruned"):
        report_on(made, models / "dense")


def test_zeros_of_the_files_stay_zeros(models, tmp_path):
    done = recovered(models, tmp_path / "out")
    masks = masks_of(recover.load_model(str(models / "pruned"))[0])
    assert done.whole and masks and lost_zeros(masks, tmp_path / "out") == 0
    made = done.record["recovery"]
    assert made["tokens"] == 20 * 2 * 32 and made["last_loss"] < made["first_loss"]
    assert made["before"] and made["text"]["seed"] == 1000
    file = next((tmp_path / "out").glob("*.safetensors"))
    weights = load_file(file)
    name = next(name for name in weights if "q_proj.weight" in name)
    assert ((weights[name].reshape(-1, 4) == 0).sum(1) >= 2).all(), "2:4"
    weights[name] = torch.ones_like(weights[name])
    save_file(weights, file, {"format": "pt"})
    assert lost_zeros(masks, tmp_path / "out") == weights[name].numel() // 2


def test_a_report_says_that_the_model_was_trained(models, tmp_path):
    record = recovered(models, tmp_path / "out").record
    said = {row["setting"]: row["value"] for row in settings_lines(record)}
    assert said["training"] == "1,280 tokens in 20 steps" and said["learning rate"] == "0.001"
    before = f"{record['recovery']['start_loss']:.3f} → "
    assert said["loss (distil) before and after"].startswith(before)


def test_every_step_sees_text_of_all_kinds(models):
    text = build_calibration("c4,codeio", tiny_tokenizer(), 16, 32, 0)
    mixed = shuffled(text, 0)
    assert not torch.equal(mixed, text.tokens) and torch.equal(mixed, shuffled(text, 0))
    assert {*map(tuple, mixed.tolist())} == {*map(tuple, text.tokens.tolist())}


def test_a_rate_that_is_too_high_is_halved(tmp_path, monkeypatch):
    "Steps at the full rate break the weights; at half the rate they do not."
    plain, rates = torch.optim.AdamW.step, []

    def step(self, *more):
        rates.append(self.param_groups[0]["lr"])
        plain(self, *more)
        if 25 < len(rates) and rates[-1] > 0.5e-3:
            self.param_groups[0]["params"][0].data.fill_(math.inf)
    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    trainer = Trainer(halved(tiny_llama(0)), tiny_llama(0), Training(steps=60, batch=2, rate=1e-3))
    said = []
    assert train(trainer, WINDOWS, tmp_path, "a", warn=said.append)
    assert trainer.done == 60 and trainer.halvings == len(said) == 1 and "half the rate" in said[0]
    assert max(rates[26:]) <= 0.5e-3 < max(rates)


def test_without_a_rate_the_weights_give_it(models, tmp_path):
    "A model with weights of eight times the size gets eight times the rate, in two digits."
    dense = recover.load_model(str(models / "dense"))[0]
    made = recovered(models, tmp_path / "out", rate=0).record["recovery"]
    sizes = [p.data.square().mean().sqrt() for p in trained_matrices(dense).values()]
    assert made["rate"] == default_rate(dense)
    assert made["rate"] == pytest.approx(0.0015 * float(torch.stack(sizes).median()), rel=0.05)
    for p in trained_matrices(dense).values(): p.data *= 8
    assert default_rate(dense) == pytest.approx(8 * made["rate"], rel=0.05)
    assert made["start_loss"] > made["last_loss"]


def test_a_loss_that_rises_is_said(models, tmp_path, recwarn):
    recovered(models, tmp_path / "good", rate=0)
    assert not [w for w in recwarn if "The loss rose" in str(w.message)]
    with pytest.warns(UserWarning, match=r"The loss rose .*--rate 30 is probably too high"):
        made = recovered(models, tmp_path / "bad", rate=30).record["recovery"]
    assert made["first_loss"] > 1.3 * made["start_loss"]


def test_after_three_halvings_the_last_good_state_is_kept(tmp_path, monkeypatch):
    trainer = Trainer(halved(tiny_llama(0)), tiny_llama(0), Training(steps=60, batch=2, rate=1e-3))
    calls, plain = [], recovery.gradients

    def broken(trainer, windows, step):
        loss = plain(trainer, windows, step)
        calls.append(step)
        return math.nan if step == 25 else loss
    monkeypatch.setattr(recovery, "gradients", broken)
    said = []
    assert not train(trainer, WINDOWS, tmp_path, "a", warn=said.append)
    assert calls.count(25) == 4 and trainer.done == 20 and "training stops" in said[-1]
    assert all(p.isfinite().all() for p in trainer.student.parameters())


def test_minutes_become_steps(models, tmp_path, monkeypatch):
    "By the time of two steps, on a clock by which a step takes 15 seconds."
    ticks = iter((0.0, 30.0))
    monkeypatch.setattr(recover.time, "perf_counter", lambda: next(ticks))
    done = recovered(models, tmp_path / "out", tokens=0, minutes=2)
    assert done.record["recovery"]["steps"] == 8


@pytest.mark.parametrize("what, said", [
    (dict(loss="hinge"), "Unknown loss 'hinge'"), (dict(rate=-1), "--rate is -1, but must be"),
    (dict(minutes=0, tokens=0), "--minutes is 0"), (dict(tokens=-5), "--tokens is -5"),
    (dict(length=0), "--length is 0"), (dict(minutes=math.inf, tokens=0), "--minutes is inf"),
    (dict(batch=1.5), "--batch is 1.5"), (dict(text="c44"), "Unknown source 'c44'"),
    (dict(dtype="float16"), "use float32 or bfloat16"), (dict(dtype="b16"), "Unknown dtype 'b16'"),
    (dict(length=4096), "longer than the model's context"),
    (dict(speed=1), "Unknown setting 'speed'")])
def test_wrong_settings_are_refused_before_training(models, tmp_path, what, said):
    with pytest.raises(CalibPruneError, match=said): recovered(models, tmp_path / "out", **what)
    assert not [*tmp_path.iterdir()], "neither an output nor a folder for the state"


def test_a_bad_source_is_not_taken_for_a_short_one(models, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"body": "no field text"}\n')
    mix = f"{models / 'notes.txt'},{tmp_path / 'bad.jsonl'}"
    with pytest.raises(CalibPruneError, match="text"):
        recover.recovery_text(tiny_tokenizer(), RecoverSettings(mix, tokens=640, length=32))


def test_a_text_that_is_read_again_is_said_and_equal_windows_are_not(models, tmp_path):
    long = dict(tokens=200 * 2 * 32)
    with pytest.warns(UserWarning, match=r"windows of 32 tokens, which are read \d+\.\d times"):
        recovered(models, tmp_path / "short", **long)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        done = recovered(models, tmp_path / "asked", windows=5)
    assert done.record["recovery"]["windows_read"] == 5
    with pytest.raises(CalibPruneError, match="windows"):
        recovered(models, tmp_path / "more", windows=5000)


def test_models_that_do_not_fit_are_refused(models, tmp_path):
    other = tmp_path / "other"
    save_model(tiny_llama(0, num_hidden_layers=3), tiny_tokenizer(), other, {})
    text = dict(text=str(models / "notes.txt"), tokens=64, **QUICK)
    for name in ("dense", "pruned"):  # a model's own zeros are no mask
        with pytest.raises(CalibPruneError, match="or only zeros that its dense model has, too"):
            recover_model(models / name, models / name, tmp_path / "a", **text)
    with pytest.raises(CalibPruneError, match="The models differ in"):
        recover_model(models / "pruned", other, tmp_path / "b", **text)
    (few := tmp_path / "words.txt").write_text("two words")
    with pytest.raises(CalibPruneError, match="tokens"):
        recovered(models, tmp_path / "c", text=str(few))
    assert not any((tmp_path / name).exists() for name in "abc")


def test_models_with_different_tokenizers_are_refused(models, tmp_path):
    shutil.copytree(models / "dense", other := tmp_path / "other")
    stored = json.loads((file := other / "tokenizer.json").read_text())
    words = stored["model"]["vocab"]
    first, second = [*words][-2:]
    words[first], words[second] = words[second], words[first]
    file.write_text(json.dumps(stored))
    with pytest.raises(CalibPruneError, match="have different tokenizers: give the model that"):
        recover_model(models / "pruned", other, tmp_path / "out", tokens=64,
                      text=str(models / "notes.txt"), **QUICK)


def test_too_little_memory_is_said_before_training(models, tmp_path, monkeypatch):
    monkeypatch.setattr(recover, "total_memory", lambda device: 0.0001)
    monkeypatch.setattr(recover, "load_model", pytest.fail)
    with pytest.raises(CalibPruneError, match="one window, and there are 0.0 GiB. Use a machine"):
        recovered(models, tmp_path / "out")
    long = RecoverSettings(length=64)
    less = recover.training_memory(str(models / "pruned"), replace(
        long, gradient_checkpointing=True))
    needs = recover.training_memory(str(models / "pruned"), long)
    monkeypatch.setattr(recover, "total_memory", lambda device: (needs + less) / 2)
    with pytest.raises(CalibPruneError, match="With --gradient-checkpointing it needs"):
        recovered(models, tmp_path / "out", length=64)


@contextmanager
def saved_numbers(*models):
    "Inside, numbers that are saved for the backward pass, except for weights, by their storage."
    weights = {p.untyped_storage().data_ptr() for model in models for p in model.parameters()}
    sizes = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            sizes[storage.data_ptr()] = storage.nbytes() / recover.FLOAT_BYTES
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor): yield sizes


@pytest.mark.parametrize("family", [*TINY_FAMILIES, *MIXTURES])
@pytest.mark.parametrize("dtype", recovery.MATMUL_DTYPES)
def test_recomputed_layers_give_the_same_bits_and_save_less(family, dtype):
    dense, results = tiny_model(family), []
    for recomputed in (False, True):
        student = halved(tiny_model(family))
        trainer = Trainer(student, dense, Training(3, 1e-4, batch=2, dtype=dtype))
        with (recovery.recomputed_layers(student, recomputed),
              saved_numbers(student, dense) as sizes):
            loss = recovery.gradients(trainer, WINDOWS, 0)
        grads = [p.grad for p in trainer.parameters.values() if p.grad is not None]
        results.append((loss, grads, sum(sizes.values())))
    (plain_loss, plain, saved), (loss, grads, saved_less) = results
    assert plain_loss == loss and saved_less < 0.8 * saved and len(plain) == len(grads)
    assert all(torch.equal(one, other) for one, other in zip(plain, grads))


@pytest.mark.parametrize("family", [*TINY_FAMILIES, *MIXTURES])
def test_the_estimated_memory_of_a_window_is_about_what_is_saved(family):
    student, dense, window = tiny_model(family), tiny_model(family), torch.arange(1, 65)
    Trainer(student, dense, Training(1, 1e-4))
    with saved_numbers(student, dense) as sizes:
        window_loss(student, dense, window).backward()
    estimate = recover._saved_activations(student, RecoverSettings(length=64))
    assert 0.7 < sum(sizes.values()) / estimate < 1.25


def test_the_teacher_has_no_second_copy_in_bfloat16():
    student, dense = halved(tiny_llama(0)), tiny_llama(0)
    trainer = Trainer(student, dense, Training(1, 1e-4, dtype="bfloat16"))
    assert not any(p.requires_grad for p in dense.parameters())
    assert all(p.requires_grad for p in trainer.parameters.values())


def test_checkpointing_changes_no_bit_of_a_model(models, tmp_path, monkeypatch):
    plain = recovered(models, tmp_path / "plain")
    calls, checkpoint = [], recovery.checkpoint
    monkeypatch.setattr(recovery, "checkpoint", lambda *a, **k: calls.append(1) or checkpoint(
        *a, **k))
    less = recovered(models, tmp_path / "less", gradient_checkpointing=True)
    assert calls and plain.record["weights"] == less.record["weights"]


def test_mixed_precision_reaches_the_weights_and_the_record(models, tmp_path):
    made = [recovered(models, tmp_path / dtype, dtype=dtype)
            for dtype in ("float32", "bfloat16", "bf16")]
    assert [one.record["recovery"]["dtype"] for one in made] == ["float32", "bfloat16", "bfloat16"]
    weights = [one.record["weights"] for one in made]
    assert weights[0] != weights[1] == weights[2]


def test_mixed_precision_moves_the_loss_little_and_weights_stay_float32():
    dense, losses = tiny_llama(0), {}
    for dtype in recovery.MATMUL_DTYPES:
        trainer = Trainer(halved(tiny_llama(0)), dense, Training(9, 1e-3, batch=2, dtype=dtype))
        for _ in range(9): recovery.take_step(trainer, WINDOWS)
        losses[dtype] = trainer.losses
        assert {p.dtype for p in trainer.parameters.values()} == {torch.float32}
    assert losses["bfloat16"] != losses["float32"]
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.05)


def test_too_little_disk_is_said_before_training(models, tmp_path, monkeypatch):
    monkeypatch.setattr(recover.shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
    monkeypatch.setattr(recover, "load_model", pytest.fail)
    with pytest.raises(CalibPruneError, match="states of the training need up to 0.0 GiB"):
        recovered(models, tmp_path / "out")


def test_files_of_the_user_are_never_removed(models, tmp_path):
    (tmp_path / "out.state").mkdir()
    (tmp_path / "out.state/thesis.txt").write_text("mine")
    with pytest.raises(CalibPruneError, match="holds thesis.txt"):
        recovered(models, tmp_path / "out")
    assert (tmp_path / "out.state/thesis.txt").read_text() == "mine"


def test_an_interruption_after_the_model_is_saved_says_so(models, tmp_path, monkeypatch):
    def stop(*_): raise KeyboardInterrupt
    monkeypatch.setattr(recover, "lost_zeros", stop)
    with pytest.raises(KeyboardInterrupt): recovered(models, tmp_path / "out", tokens=64)
    said = left_by_recover(str(tmp_path / "out"))
    assert said == f"{tmp_path / 'out'} already holds a complete model and is unchanged."


def test_a_state_of_another_run_is_refused(models, tmp_path, monkeypatch):
    def stop(*_): raise KeyboardInterrupt
    monkeypatch.setattr(recovery, "take_step", stop)
    with pytest.raises(KeyboardInterrupt): recovered(models, tmp_path / "out")
    with pytest.raises(CalibPruneError, match="other models, text or settings"):
        recovered(models, tmp_path / "out", rate=2e-3)


def test_the_command(models, tmp_path):
    done = call("recover", "--model", models / "pruned", "--dense", models / "dense", "--text",
                models / "notes.txt", "--tokens", 640, "--length", 32, "--output", tmp_path / "out",
                "--dtype", "bf16", "--gradient-checkpointing", "--json")
    assert "Training takes about 0.0 GiB of memory." in done.stderr
    said = json.loads(done.stdout)
    assert said["recovery"]["steps"] == said["recovery"]["planned"] == 5
    assert said["method"] == "magnitude" and RecoverSettings().seed == said["recovery"]["text"][
        "seed"]
    assert "trained after pruning" in call("reproduce", "--from", tmp_path / "out", code=1).stderr


def test_weights_that_were_saved_in_bfloat16_get_dither_and_zeros_stay():
    "In mixed precision, small changes of weights that are numbers of bfloat16 would be lost."
    model = halved(tiny_llama(0)).bfloat16().float()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer = Trainer(model, tiny_llama(0), Training(3, 1e-4, batch=2, dtype="bfloat16"))
    for name, p in trainer.parameters.items():
        assert torch.equal(p.bfloat16().float(), before[name]), name
        off = ((p.data != before[name]) & (before[name] != 0)).sum() / (before[name] != 0).sum()
        assert off > 0.95 if p.dim() >= 2 else off == 0, name
    for name, kept in trainer.masks.items(): assert (trainer.parameters[name][~kept] == 0).all()
    student = halved(tiny_llama(0)).bfloat16().float()
    same = Trainer(student, tiny_llama(0), Training(3, 1e-4, batch=2))
    assert all(torch.equal(p, before[name]) for name, p in same.parameters.items())
