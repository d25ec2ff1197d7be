"""Options of the generation protocols: one check for presets, the command line and programs; and
what a preset may say."""
import json
import math

import pytest
import yaml

from calib_prune.cli.generate import generate_command as on_the_command_line
from calib_prune.cli.reproduce import check_names
from calib_prune.core import CalibPruneError
from calib_prune.generation.igsp import PROTOCOLS, generate, protocol_with
from calib_prune.generation.options import OPTIONS, check_options
from calib_prune.generation.sampling import Sampling
from calib_prune.model.tiny import tiny_llama, tiny_tokenizer
from calib_prune.study.presets import load_preset, protocol_of
from tests.attack import ROOT

WRONG = [
    "igsp pool=-1", "igsp pool=.nan", "igsp pool=.inf", "igsp pool=true", "igsp pool=[1]",
    "igsp most=0", "igsp length=0", "igsp length=1", "igsp length=6.5", "igsp balance=[a]",
    "igsp balance=medians", "igsp balance=false", "igsp bins=0", "igsp bins=2.5", "igsp choice=.5",
    "igsp choice=9", "igsp aggregation=1", "igsp dimensions=null", "igsp openings=0",
    "igsp openings=-1", "igsp openings=7", "igsp openings=true", "igsp openings={}",
    "igsp warmths=[]", "igsp warmths=[0]", "igsp warmths=1", "igsp warmths=[.nan]",
    "igsp temperature=0", "igsp temperature=hot", "igsp temperature=.inf", "igsp temperature=true",
    "igsp top_k=-1", "igsp top_k=2.5", "igsp top_p=0", "igsp top_p=1.5", "igsp top_p=.nan",
    "igsp repetition_penalty=0", "igsp repetition_penalty=null", "igsp budget=5", "igsp seed=1",
    "igsp model=x", "igsp how=1", "igsp sampling=1", "igsp journal=x", "self-cal length=0",
    "self-cal length=null", "self-cal length=99999999999999999", "self-cal over=-1",
    "self-cal over=1.5", "self-cal final_temperature=-1", "self-cal start=5", "self-cal pool=2",
    "sgs source=[1,2]", "sgs source=5", "sgs source=nowhere", "sgs source=nowhere.txt",
    "sgs prefix=0", "sgs prefix=1.5", "sgs prefix=600", "sgs drop=1", "sgs drop=-.1",
    "sgs drop=.nan", "third third=lowest", "third third=[low]", "third read=2", "third read=3.5",
    "third length=1", "third prompts={}", "third temperature=1", "nothing", "igsp pool=[",
    "igsp pool={a: 1}", "igsp pool", "igsp pool=", "igsp =2", "igsp pool=2 pool=4",
    "igsp pool=!!python/name:os.system", "", "igsp pool=2  length=64 pool=2", "igsp pool=&a[*a]"]


@pytest.mark.parametrize("wrong", WRONG)
def test_a_dry_run_refuses_every_wrong_option(wrong, tmp_path):
    smoke = load_preset(ROOT / "presets/smoke.yaml")
    (path := tmp_path / "p.yaml").write_text(
        yaml.safe_dump(smoke | dict(strategies=dict(own=f"generated:{wrong}")))
    )
    with pytest.raises(CalibPruneError, match="own|igsp|sgs|self-cal|third|nothing"):
        check_names(load_preset(path))


@pytest.mark.parametrize("right", [
    "igsp", "igsp pool=2 balance=null", "igsp warmths=[1,0.5] openings=1 top_k=0",
    "self-cal temperature=1 over=0", "self-cal final_temperature=null", "sgs source=c4 drop=0",
    "third third=high read=3", "igsp pool=1.0 balance=null"])
def test_right_options_pass(right):
    protocol, settings = protocol_of(f"generated:{right}")
    assert callable(protocol_with(protocol, settings))


@pytest.mark.parametrize("protocol, wrong", [("igsp", dict(pool=math.nan)),
                                             ("igsp", dict(balance=["a"])),
                                             ("self-cal", dict(length=0)),
                                             ("sgs", dict(source=[1, 2])),
                                             ("third", dict(read=True))])
def test_programs_get_the_same_refusal(protocol, wrong):
    "A call by settings, and a call of the protocol itself."
    with pytest.raises(CalibPruneError) as by_settings:
        generate(tiny_llama(), tiny_tokenizer(), protocol, settings=wrong)
    with pytest.raises(CalibPruneError) as itself:
        PROTOCOLS[protocol].run(tiny_llama(), tiny_tokenizer(), **wrong)
    assert str(by_settings.value) == str(itself.value) and f"{next(iter(wrong))} is" in str(
        itself.value
    )


@pytest.mark.parametrize("wrong", [
    dict(pool=-1.0),
    dict(pool=math.nan),
    dict(balance="medians"),
    dict(text_length=0),
    dict(temperature=math.nan),
    dict(protocol="sgs", source="nowhere"),
    dict(protocol="self-cal", temperature=-1.0)])
def test_the_command_line_gets_the_same_refusal(wrong, tmp_path):
    with pytest.raises(
        CalibPruneError, match="(pool|length|temperature) is|Unknown (balance|source)"
    ):
        on_the_command_line("no-model-is-loaded", str(tmp_path / "x.jsonl"), **wrong)


def test_every_option_of_a_protocol_is_checked():
    import inspect
    given = {
        "model", "tokenizer", "budget", "seed", "sampling", "prompts", "journal", "about",
        "progress", "how"}
    for name, protocol in PROTOCOLS.items():
        own = set(inspect.signature(protocol.run).parameters) - given
        of_sampling = set(Sampling.__dataclass_fields__) if protocol.sampling else set()
        assert set(OPTIONS[name].__annotations__) == own | of_sampling
        check_options(name, {
            k: o.default
            for k, o in inspect.signature(protocol.run).parameters.items() if k in own})


@pytest.mark.parametrize("twice", [
    "name: a\nname: b\n", "strategies: {c4: c4, c4: math}\n", "a: [{x: 1, x: 1}]\n",
    "hardware:\n  flops: 1.0\n  \"flops\": 2.0\n"])
def test_a_repeated_key_is_refused(twice, tmp_path):
    (path := tmp_path / "p.yaml").write_text(twice)
    with pytest.raises(CalibPruneError): load_preset(path)


def test_the_presets_of_the_repository_pass():
    for path in [o for o in (ROOT / "presets").rglob("*.yaml") if o.parent.name != "base"]:
        for mix in load_preset(path)["strategies"].values():
            if own := protocol_of(mix): assert json.dumps(own) and protocol_with(*own)


@pytest.mark.parametrize("wrong", [
    dict(strategies={"a-b": "c4", "a_b": "math"}),
    dict(strategies={"A": "c4", "a": "math"}),
    dict(strategies={"x" * 101: "c4"}),
    dict(tables=["main", "main"]),
    dict(device="cuda:99999999999999999999"),
    dict(revision=""),
    dict(name="x" * 300),
    dict(model=" "),
    dict(model="nowhere"),
    dict(model="/nowhere/model"),
    dict(strategies={"c4": "c4,generated:igsp"})])
def test_what_a_preset_may_not_say(wrong, tmp_path):
    "Each of these passed a dry run, and failed in Snakemake or in every run."
    smoke = load_preset(ROOT / "presets/smoke.yaml")
    (path := tmp_path / "p.yaml").write_text(yaml.safe_dump(smoke | wrong))
    with pytest.raises(CalibPruneError): check_names(load_preset(path))


def test_a_preset_names_the_dimension_of_its_own_benchmark(tmp_path, monkeypatch):
    "Another dimension ended every table in a KeyError, after all models."
    smoke = load_preset(ROOT / "presets/smoke.yaml")
    monkeypatch.chdir(tmp_path)
    for name in ("law", "court"):
        (tmp_path / f"{name}.jsonl").write_text(
            "".join(f'{{"prompt": "{n}", "answer": "b"}}\n' for n in range(9)))
    scored = lambda *tasks: smoke | dict(scoring=smoke["scoring"] | dict(tasks=[*tasks]))
    check_names(scored("sciq", "Code=court.jsonl"))
    with pytest.raises(CalibPruneError, match="is law, .*Math only.*: Code=law.jsonl"):
        check_names(scored("sciq", "law.jsonl"))


@pytest.mark.parametrize("part, wrong", [("scoring", dict(tasks=[])),
                                         ("scoring", dict(tasks=["sciq", "sciq"])),
                                         ("heldout", dict(window=1))])
def test_what_a_section_may_not_say(part, wrong, tmp_path):
    smoke = load_preset(ROOT / "presets/smoke.yaml")
    (path := tmp_path / "p.yaml").write_text(yaml.safe_dump(smoke | {part: smoke[part] | wrong}))
    with pytest.raises(CalibPruneError, match=f"{part}.{next(iter(wrong))}"): load_preset(path)


def test_one_sparsity_in_two_ways_is_one_job(tmp_path):
    smoke = load_preset(ROOT / "presets/smoke.yaml")
    (path := tmp_path / "p.yaml").write_text(
        yaml.safe_dump(smoke | dict(grid=[smoke["grid"][0] | dict(sparsities=["0.6", 0.6])]))
    )
    with pytest.raises(CalibPruneError): load_preset(path)
