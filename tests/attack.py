"""An attack from outside: thousands of bad inputs to every command and reader, and what came of
each.

`python -m tests.torture --only inputs` runs all of it, with the further inputs of
tests/torture/inputs.py. Everything happens in folders of its own.
"""
import contextlib
import io
import itertools
import json
import os
import resource
import shutil
import signal
import struct
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import yaml

from tests import ROOT


@dataclass(frozen=True)
class Case:
    "One bad input."
    part: str                     # what is attacked
    name: str
    run: Callable[[Path], "Outcome"]  # in an empty folder


@dataclass(frozen=True)
class Outcome:
    "What a command did."
    kind: str           # "done", "refused" (a readable error), "usage", or "traceback"
    said: str = ""      # the error, or the end of the traceback
    json_ok: bool = True  # with --json: was one JSON object printed, without NaN


def strict(text: str):
    "JSON as other programs read it."
    def no(o): raise ValueError(o)
    return json.loads(text, parse_constant=no)


def call(*argv: str) -> Outcome:
    "Run the command line in this process."
    from calib_prune.cli.app import main
    out, err, before = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = ["calib-prune", *map(str, argv)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err): main()
        code = 0
    except SystemExit as e: code = e.code if isinstance(e.code, int) else 1
    except BaseException: return Outcome("traceback", traceback.format_exc()[-1500:])
    finally: sys.argv = before
    kind = {0: "done", 2: "usage"}.get(code, "refused")
    ok = True
    if "--json" in sys.argv or "--json" in argv:
        try: ok = isinstance(strict(out.getvalue()), dict)
        except ValueError: ok = False
    said = (out.getvalue() + err.getvalue())[-600:]
    if "Traceback (most recent call last)" in err.getvalue(): kind = "traceback"
    return Outcome(kind, said, ok)


def attempt(f: Callable) -> Outcome:
    "Call a function of the library: it may refuse, and nothing else."
    from calib_prune.core import CalibPruneError
    try: f()
    except CalibPruneError as e: return Outcome("refused", str(e))
    except BaseException: return Outcome("traceback", traceback.format_exc()[-1500:])
    return Outcome("done")


# --- what the cases start from

def base_model(folder: Path) -> Path:
    "A tiny model that works, made once."
    from calib_prune.model.loading import save_model
    from calib_prune.model.tiny import tiny_llama, tiny_tokenizer
    made = ROOT / "build/attack/model"
    if not (made / "calib_prune.json").is_file():
        shutil.rmtree(made, ignore_errors=True)
        save_model(tiny_llama(num_hidden_layers=1), tiny_tokenizer(), made, {})
    return Path(shutil.copytree(made, folder / "model"))


def base_gguf(folder: Path) -> Path:
    "A tiny model in a GGUF file."
    import gguf
    import numpy as np

    from calib_prune.model.tiny import tiny_tokenizer
    path = folder / "tiny.gguf"
    w = gguf.GGUFWriter(path, "llama")
    w.add_context_length(64)
    w.add_embedding_length(32)
    w.add_block_count(1)
    w.add_feed_forward_length(48)
    w.add_head_count(4)
    w.add_head_count_kv(4)
    w.add_layer_norm_rms_eps(1e-5)
    w.add_rope_dimension_count(8)
    w.add_vocab_size(258)
    vocab = sorted(tiny_tokenizer().get_vocab().items(), key=lambda o: o[1])
    w.add_tokenizer_model("gpt2")
    w.add_token_list([*(k for k, _ in vocab), "ab"])
    w.add_token_types([1] * 258)
    w.add_token_merges(["a b"]); w.add_bos_token_id(0); w.add_eos_token_id(0)
    rng = np.random.default_rng(0)
    def put(name, *shape): w.add_tensor(name, rng.normal(size=shape).astype(np.float32) / 8)
    put("token_embd.weight", 258, 32); put("output_norm.weight", 32); put("output.weight", 258, 32)
    for k, shape in dict(attn_q=(32, 32),
                         attn_k=(32, 32),
                         attn_v=(32, 32),
                         attn_output=(32, 32),
                         ffn_gate=(48, 32),
                         ffn_up=(48, 32),
                         ffn_down=(32, 48),
                         attn_norm=(32, ),
                         ffn_norm=(32, )).items():        put(f"blk.0.{k}.weight", *shape)
    w.write_header_to_file(); w.write_kv_data_to_file(); w.write_tensors_to_file(); w.close()
    return path


def text_file(folder: Path) -> Path:
    "Calibration text that works."
    path = folder / "text.txt"
    path.write_text("".join(f"Line {i}: {i} times {i} is {i * i}.\n" for i in range(60)))
    return path


def prune_with(folder: Path, *more: str, model=None) -> Outcome:
    "The smallest prune there is, with some arguments changed."
    given = [str(o) for o in more]
    usual = {
        "--model": model or folder / "model", "--calibration": folder / "text.txt",
        "--output": folder / "out", "--windows": 2, "--length": 16, "--method": "wanda"}
    return call(
        "prune", *given, *(str(o) for k, v in usual.items() if k not in given for o in (k, v))
    )


def must_refuse(found: Outcome) -> Outcome:
    "What came of an input that would give a wrong model in silence."
    return found if found.kind == "refused" else Outcome(
        "traceback", f"it was not refused: {found.kind} {found.said}")


# --- A: model folders

WRONG = (0, -1, "abc", None, [], {}, 1e308, True, 3.7)

def edited(path: Path, change: Callable[[dict], None]) -> None:
    "Change a JSON file."
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


TEXTS = {
    "empty": b"", "cut": b'{"a": ', "list": b"[]", "null": b"null", "bytes": b"\xff\xfe\x00",
    "deep": b"[" * 50_000, "conflict": b"<<<<<<< HEAD\n"}

def model_cases() -> Iterator[Case]:
    def case(name, change):
        def run(folder):
            model = base_model(folder)
            text_file(folder)
            change(model)
            return prune_with(folder)
        return Case("model folders", name, run)

    def put(file, key, value):
        return lambda m: edited(m / file, lambda o: o.__setitem__(key, value))

    keys = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
            "num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings",
            "rms_norm_eps", "hidden_act", "rope_parameters", "rope_theta", "tie_word_embeddings",
            "model_type", "architectures", "torch_dtype", "dtype", "attention_bias", "pad_token_id",
            "bos_token_id", "eos_token_id", "quantization_config", "sliding_window", "layer_types")
    for key, value in itertools.product(keys, WRONG):
        yield case(f"config.json {key}={value!r}", put("config.json", key, value))
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json",
                 "model.safetensors"):
        for name, data in TEXTS.items():
            yield case(
                f"{file} {name}", lambda m, file=file, data=data: (m / file).write_bytes(data)
            )
        yield case(f"{file} gone", lambda m, file=file: (m / file).unlink(missing_ok=True))
        yield case(
            f"{file} a folder",
            lambda m, file=file: ((m / file).unlink(missing_ok=True), (m / file).mkdir()),
        )
    for key in ("version", "model", "added_tokens", "normalizer", "pre_tokenizer", "post_processor",
                "decoder"):
        for value in (None, 0, "abc", [], {}, {"type": "Nope"}):
            yield case(f"tokenizer.json {key}={value!r}", put("tokenizer.json", key, value))
    for key in ("tokenizer_class", "bos_token", "eos_token", "pad_token", "model_max_length",
                "auto_map"):
        for value in WRONG:
            yield case(
                f"tokenizer_config.json {key}={value!r}", put("tokenizer_config.json", key, value)
            )
    for k in range(1, 20, 2):
        yield case(
            f"weights cut at {k}/20", lambda m, k=k: cut_file(m / "model.safetensors", k / 20)
        )
    for at in (0, 1, 7, 8, 9, 20, 60, 100, 200, 500):
        yield case(f"weights flipped at {at}", lambda m, at=at: flip(m / "model.safetensors", at))
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "model.bin"}}
    for name, told in {
            "a pickle": index, "elsewhere": {
                "weight_map": {"lm_head.weight": "../../other.safetensors"}}, "gone": {
                    "weight_map": {"lm_head.weight": "gone.safetensors"}}, "no map": {},
            "list": [], "null map": {"weight_map": None}, "number": {
                "weight_map": {"lm_head.weight": 5}}, "empty": {"weight_map": {}}}.items():
        def change(m, told=told):
            (m / "model.safetensors").rename(m / "other.safetensors")
            (m / "model.bin").write_bytes(b"\x80\x04.")
            (m / "model.safetensors.index.json").write_text(json.dumps(told))
        yield case(f"index: {name}", change)
    yield from silent_cases()


def silent_cases() -> Iterator[Case]:
    "Model folders of which a wrong model could be made, exit code 0."
    def case(name, change, *more):
        def run(folder):
            model = base_model(folder)
            text_file(folder)
            change(model)
            return must_refuse(prune_with(folder, *more))
        return Case("model folders", name, run)
    def weight(name, number):
        def change(m):
            from safetensors.torch import load_file, save_file
            held = load_file(m / "model.safetensors")
            held[name].view(-1)[-1] = number
            save_file(held, m / "model.safetensors", {"format": "pt"})
        return change
    def linked(name, target):
        def change(m):
            (m.parent / "secret").mkdir()
            (m.parent / "secret/x.jinja").write_text("secret")
            (m / name).parent.mkdir(exist_ok=True)
            (m / name).symlink_to(m.parent / target)
        return change

    for name in ("model.norm.weight", "lm_head.weight", "model.embed_tokens.weight",
                 "model.layers.0.mlp.up_proj.weight"):
        for number in (float("nan"), float("inf")):
            yield case(f"{name} of {number}", weight(name, number))
        for option in ("--dtype", "--save-dtype"):
            yield case(f"{name} of 1e5 {option} float16", weight(name, 1e5), option, "float16")
    for name, target in {
        "additional_chat_templates/x.jinja": "secret/x.jinja",
        "additional_chat_templates": "secret",
    }.items():
        yield case(f"{name} is a link", linked(name, target))
    yield case(
        "only a type of model", lambda m: (m / "config.json").write_text('{"model_type": "llama"}')
    )
    yield case("weights of a terabyte", lambda m: os.truncate(m / "model.safetensors", 1 << 40))


def cut_file(path: Path, share: float) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:int(share * len(data))])


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at % len(data)] ^= 0x55
    path.write_bytes(bytes(data))


def gguf_cases() -> Iterator[Case]:
    def case(name, change):
        def run(folder):
            path = base_gguf(folder)
            text_file(folder)
            change(path)
            return prune_with(folder, model=path)
        return Case("GGUF files", name, run)
    yield case("whole", lambda p: None)
    for k in range(0, 25): yield case(f"cut at {k}/25", lambda p, k=k: cut_file(p, k / 25))
    for at in (*range(0, 60, 4), *range(100, 4000, 300)):
        yield case(f"flipped at {at}", lambda p, at=at: flip(p, at))
    yield from silent_ggufs()


def silent_ggufs() -> Iterator[Case]:
    """GGUF files of which a wrong model could be made, or which could take memory and time without
    bound."""
    def case(name, change):
        def run(folder):
            path = base_gguf(folder)
            text_file(folder)
            change(path)
            return must_refuse(prune_with(folder, model=path))
        return Case("GGUF files", name, run)
    def text(of): return struct.pack("<Q", len(of)) + of
    named = text(b"general.architecture") + struct.pack("<I", 8) + text(b"llama")
    def small(tensors, values, rest=b""):
        return lambda p: p.write_bytes(
            b"GGUF" + struct.pack("<IQQ", 3, tensors, values) + named + rest
        )
    for name in (b"blk.0.ffn_up.weight", b"output_norm.weight", b"token_embd.weight"):
        yield case(
            f"{name.decode()} renamed",
            lambda p, name=name: p.write_bytes(p.read_bytes().replace(name, name[:-1] + b"x")),
        )
    for k in (40, 60):
        yield case(f"2^{k} tensors", small(2 ** k, 1))
        yield case(f"2^{k} values", small(0, 2 ** k))
        yield case(f"an array of 2^{k}", small(0, 2, text(b"a") + struct.pack("<IIQ", 9, 4, 2**k)))
        yield case(f"a text of 2^{k}", small(0, 2, text(b"a") + struct.pack("<IQ", 8, 2 ** k)))
    yield case("only an architecture", small(0, 1))
    yield case("a terabyte of nothing behind it", lambda p: os.truncate(p, 1 << 40))
    yield case("a terabyte of nothing", lambda p: (p.write_bytes(b""), os.truncate(p, 1 << 40)))


# --- B: presets

def preset_cases() -> Iterator[Case]:
    from calib_prune.study.presets import load_preset
    base = load_preset(ROOT / "presets/smoke.yaml")
    def case(name, make):
        def run(folder):
            path = folder / "preset.yaml"
            data = make()
            (
                path.write_bytes(data)
                if isinstance(data, bytes)
                else path.write_text(yaml.safe_dump(data))
            )
            return dry_run(path, folder)
        return Case("presets", name, run)
    def at(path, value):
        def make():
            data = json.loads(json.dumps(base))
            where = data
            for k in path[:-1]: where = where[k]
            where[path[-1]] = value
            return data
        return make
    paths = (
        [(k,) for k in base]
        + [(k, o) for k in base if isinstance(base[k], dict) for o in base[k]]
        + [("grid", 0, o) for o in base["grid"][0]]
        + [
            ("grid", 0, "methods", 0),
            ("grid", 0, "sparsities", 0),
            ("grid", 0, "seeds", 0),
            ("grid", 0, "windows", 0),
            ("tables", 0),
            ("strategies", "c4"),
        ]
    )
    for path, value in itertools.product(paths, (*WRONG, "../../x")):
        yield case(f"{'.'.join(map(str, path))}={value!r}", at(path, value))
    for name, data in TEXTS.items(): yield case(f"preset {name}", lambda data=data: data)
    for name, text in {
        "anchor": b"a: &a [*a]",
        "tag": b"!!python/object/apply:os.system ['true']",
        "keys": b"{1: 2, null: 3}",
        "number": b"5",
        "twice": b"name: a\nname: b\n",
    }.items():
        yield case(f"preset {name}", lambda text=text: text)
    options = ("pool", "most", "bins", "choice", "balance", "aggregation", "openings", "warmths",
               "length", "temperature", "top_k", "top_p", "repetition_penalty", "final_temperature",
               "over", "source", "prefix", "drop", "third", "read", "seed", "how", "")
    values = ("0", "-1", "abc", ".nan", ".inf", "[a]", "[", "{a:1}", "null", "true", "1e308", "2.5",
              "", "!!python/name:os.system", "2 pool=2")
    for protocol, option, value in itertools.product(
        ("igsp", "self-cal", "sgs", "third", ""), options, values
    ):
        mix = f"generated:{protocol} {option}={value}"
        yield case(f"strategies.c4={mix}", at(("strategies", "c4"), mix))


def dry_run(path: Path, folder: Path) -> Outcome:
    "`reproduce --dry-run` without Snakemake, which would only repeat what is checked before."
    import subprocess
    done = subprocess.CompletedProcess([], 0)
    before, subprocess.run = subprocess.run, lambda *a, **k: done
    old, results = Path.cwd(), ROOT / "results"
    there = set(results.iterdir()) if results.is_dir() else set()
    try: return call("reproduce", "--preset", path, "--dry-run")
    finally:
        subprocess.run = before
        os.chdir(old)
        made = (set(results.iterdir()) if results.is_dir() else set()) - there
        assert not made, f"a dry run made {made}"


# --- C: numbers

NUMBERS = ("0", "-1", "1", "nan", "inf", "-inf", "1e308", "1e-308", "2147483648",
           "9223372036854775808", "abc", "", "0.5", "1.5", "2:4", "٣")
OPTIONS = {
    "prune": ("--windows", "--length", "--seed", "--batch-tokens", "--block", "--damping",
              "--sparsity", "--dtype", "--device", "--method"),
    "evaluate": ("--limit", "--batch-tokens", "--dtype", "--device", "--tasks"),
    "measure": ("--windows", "--length", "--seed", "--prompts", "--batch-tokens", "--dtype"),
    "generate": ("--windows", "--length", "--text-length", "--seed", "--temperature", "--pool",
                 "--batch", "--balance", "--source")}

def number_cases() -> Iterator[Case]:
    for command, options in OPTIONS.items():
        for option, value, as_json in itertools.product(options, NUMBERS, (False, True)):
            more = [option, value] + (["--json"] if as_json else [])
            yield Case(
                "numbers",
                f"{command} {' '.join(more)}",
                lambda folder, command=command, more=more: run_command(folder, command, more),
            )


def run_command(folder: Path, command: str, more: list[str]) -> Outcome:
    "The smallest run of a command, with some arguments changed."
    model, text = base_model(folder), text_file(folder)
    usual = {
        "prune": {
            "--model": model, "--calibration": text, "--output": folder / "out",
            "--windows": 2, "--length": 16}, "evaluate": {
                "--model": model, "--tasks": "sciq", "--limit": 1}, "measure": {
                    "--calibration": text, "--tokenizer": model, "--windows": 2, "--length": 16,
                    "--prompts": 0},
        "generate": {
            "--model": model, "--protocol": "self-cal", "--output": folder / "own.jsonl",
            "--windows": 2, "--length": 8, "--text-length": 16}}[command]
    if more[0] in ("--pool", "--balance"):
        usual = usual | {"--protocol": "igsp", "--text-length": 64, "--windows": 1}
    if more[0] == "--source": usual = usual | {"--protocol": "sgs"}
    return call(
        command, *more, *(str(o) for k, v in usual.items() if k not in more for o in (k, v))
    )


# --- D: paths

TAKES = {
    "prune": ("--model", "--calibration", "--output", "--checkpoint"),
    "evaluate": ("--model", "--dense"),
    "measure": ("--calibration", "--model", "--tokenizer", "--own-text"),
    "generate": ("--model", "--output", "--source"),
    "reproduce": ("--preset",),
}

def path_cases() -> Iterator[Case]:
    names = {
        "empty": "", "space": " ", "user": "~nosuchuser/x", "user.txt": "~nosuchuser/x.txt",
        "long": "x" * 300, "long.txt": "x" * 300 + ".txt", "zero": "a\0b", "device": "/dev/null",
        "full": "/dev/full", "below a file": "{folder}/text.txt/x.txt",
        "dots": "../" * 60 + "proc/x.txt", "proc": "/proc/self/mem",
        "locked": "{folder}/locked/x.txt", "unicode": "\udcff.txt", "newline": "a\nb.txt",
        "deep": "a/" * 3000 + "x.txt", "fifo": "{folder}/fifo.txt", "loop": "{folder}/loop.txt",
        "dangling": "{folder}/dangling.jsonl", "below dangling": "{folder}/dangling.jsonl/x.jsonl",
        "no room": "x" * 240 + ".jsonl", "folder": "{folder}/model", "option": "--help.txt"}
    for (command, options), (kind, name), as_json in itertools.product(
            TAKES.items(), names.items(), (False, True)):
        for option in options:
            def run(folder, command=command, option=option, name=name, as_json=as_json):
                os.mkfifo(folder / "fifo.txt")
                (folder / "loop.txt").symlink_to(folder / "loop.txt")
                (folder / "dangling.jsonl").symlink_to(folder / "nowhere")
                (folder / "locked").mkdir(mode=0)
                given = [option, name.format(folder=folder)
                         ] + (["--json"] if as_json and command != "reproduce" else [])
                try:
                    return call("reproduce", *given,
                                "--dry-run") if command == "reproduce" else run_command(
                                    folder, command, given)
                finally: (folder / "locked").chmod(0o700)
            yield Case("paths", f"{command} {option} {kind}{' --json' * as_json}", run)
    for value in ("/dev/null", "{folder}/text.txt", "~nosuchuser/x", "x" * 300, "\udcff",
                  "{folder}/locked"):
        for command in ("fetch", "sources", "tasks", "prune", "measure"):
            def run(folder, value=value, command=command):
                (folder / "locked").mkdir(mode=0)
                before = os.environ.get("CALIB_PRUNE_CACHE")
                os.environ["CALIB_PRUNE_CACHE"] = value.format(folder=folder)
                try:
                    return call(command) if command in ("fetch", "sources",
                                                        "tasks") else run_command(
                                                            folder, command, ["--seed", "1"])
                finally:
                    (folder / "locked").chmod(0o700)
                    del os.environ["CALIB_PRUNE_CACHE"]
                    if before is not None: os.environ["CALIB_PRUNE_CACHE"] = before
            yield Case("paths", f"CALIB_PRUNE_CACHE={value[:20]} {command}", run)


# --- E: text

def text_cases() -> Iterator[Case]:
    import pyarrow as pa
    import pyarrow.parquet as pq
    def parquet(columns):

        def write(path):
            pq.write_table(pa.table(columns) if isinstance(columns, dict) else columns, path)
        return write
    def sparse(path):
        with open(path, "wb") as file: file.truncate(1 << 40)
    def bomb(path):
        "Two thousand bytes that are five gigabytes of blanks when all rows are unpacked."
        blanks = pa.DictionaryArray.from_arrays(pa.array([0] * 256, pa.int32()),
                                                pa.array([" " * 20_000_000]))
        pq.write_table(pa.table(dict(text=blanks)),
                       path,
                       compression="zstd",
                       store_schema=False,
                       write_statistics=False,
                       dictionary_pagesize_limit=1 << 30)
    def line(path): path.write_bytes(b'{"text": "' + b"a" * 70_000_000 + b'"}\n')

    two = pa.Table.from_arrays(
        [pa.array(["a b c " * 40]), pa.array(["d e f"])], names=["text", "text"])
    good = json.dumps(dict(text="a b c d " * 40)) + "\n"
    files = {
        "empty.txt": b"", "blank.txt": b" \n\t\n", "zero.txt": b"a\0b",
        "latin.txt": "é".encode("latin-1") * 50, "utf16.txt": "ab".encode("utf-16"),
        "bom.txt": b"\xef\xbb\xbf" + b"a b c " * 50, "form.txt": b"\f\f\f",
        "special.txt": b"<|endoftext|>" * 60, "long.txt": b"a" * 200_000,
        "surrogate.jsonl": b'{"text": "\\ud800"}\n', "deep.jsonl": b'{"text": ' + b"[" * 50_000 +
        b"]" * 50_000 + b"}\n", "number.jsonl": b'{"text": 5}\n', "null.jsonl": b'{"text": null}\n',
        "list.jsonl": b"[1, 2]\n", "cut.jsonl": good.encode() + b'{"text": "a',
        "other.jsonl": b'{"body": "a"}\n', "nan.jsonl": b'{"text": NaN}\n',
        "big.jsonl": b'{"text": 1' + b"0" * 5000 + b"}\n",
        "dup.jsonl": b'{"text": "a", "text": 5}\n', "blank.jsonl": b"\n\n", "empty.jsonl": b"",
        "bool.jsonl": b"true\n", "string.jsonl": b'"abc"\n', "ctrl.jsonl": b'{"text": "\x01"}\n',
        "cr.jsonl": good.encode().replace(b"\n", b"\r\n"),
        "u2028.jsonl": json.dumps(dict(text="a\u2028b " * 40), ensure_ascii=False).encode() + b"\n",
        "empty.parquet": b"", "magic.parquet": b"PAR1PAR1", "noise.parquet": bytes(range(256)) * 40,
        "two.parquet": parquet(two), "number.parquet": parquet(
            dict(text=[1, 2])), "nulls.parquet": parquet(
                dict(text=[None, "a b c " * 60])), "none.parquet": parquet(
                    dict(text=pa.array([None, None], pa.string()))), "struct.parquet": parquet(
                        dict(text=[dict(a=1)])),
        "binary.parquet": parquet(dict(text=[b"abc"])), "large.parquet": parquet(
            dict(text=pa.array(["a b c " * 60], pa.large_string()))), "dictionary.parquet": parquet(
                dict(text=pa.array(["a b c " * 60] * 3).dictionary_encode())),
        "bomb.parquet": bomb, "line.jsonl": line, **{
            f"sparse.{end}": sparse for end in ("txt", "jsonl", "parquet")}, "x.csv": b"a,b",
        "x": b"a"}
    cuts = {f"cut{k}.parquet": k for k in range(1, 12)}
    for command, as_json in itertools.product(("prune", "measure"), (False, True)):
        for name, content in (files | cuts).items():
            def run(folder, command=command, name=name, content=content, as_json=as_json):
                path = folder / name
                if callable(content): content(path)
                elif isinstance(content, bytes): path.write_bytes(content)
                else:
                    pq.write_table(pa.table(dict(text=["a b c d " * 40] * 5)), path)
                    cut_file(path, content / 12)
                return run_command(folder, command,
                                   ["--calibration", str(path)] + ["--json"] * as_json)
            yield Case("text", f"{command} {name}{' --json' * as_json}", run)
        mixes = ("{f}=0", "{f}=-1", "{f}=nan", "{f}=inf", "{f}=1e308", "{f}=1e-308", "{f}=", "={f}",
                 ",", "{f},", "{f},{f}", "{f},./{r}", "c4,c4", "=", "", "{f}:field", "{f}=1=2",
                 "hub:", "hub:a b", "hub:x/y[", "paper:nope", "paper:c4@", "uniform,c4", "C4",
                 "c4 math")
        for mix in mixes:
            def run(folder, command=command, mix=mix, as_json=as_json):
                text = text_file(folder)
                before = Path.cwd()
                os.chdir(folder)
                try:
                    return run_command(
                        folder, command,
                        ["--calibration", mix.format(f=text, r=text.name)] + ["--json"] * as_json)
                finally: os.chdir(before)
            yield Case("text", f"{command} --calibration {mix}{' --json' * as_json}", run)


# --- F: state that this package wrote, damaged

def state_cases() -> Iterator[Case]:
    damages = {
        **{k: (lambda p, d=d: p.write_bytes(d)) for k, d in TEXTS.items()}, "half": lambda p:
        cut_file(p, 0.5), "flipped": lambda p: flip(p, 40), "number": lambda p: p.write_text("5"),
        "string": lambda p: p.write_text('"abc"'), "wrong": lambda p: p.write_text('{"a": 1}'),
        "a folder": lambda p: (p.unlink(), p.mkdir())}
    def manifest(folder, damage):
        from calib_prune.core import cache_dir
        mine = folder / "cache"
        mine.mkdir()
        for o in ("models", "benchmarks", "sources"): (mine / o).symlink_to(cache_dir() / o)
        shutil.copy(cache_dir() / "manifest.json", mine)
        damage(mine / "manifest.json")
        before = os.environ.get("CALIB_PRUNE_CACHE")
        os.environ["CALIB_PRUNE_CACHE"] = str(mine)
        try: return run_command(folder, "measure", ["--calibration", "c4"])
        finally:
            del os.environ["CALIB_PRUNE_CACHE"]
            if before is not None: os.environ["CALIB_PRUNE_CACHE"] = before
    def checkpoint(folder, damage, file):
        from calib_prune.model.loading import load_model
        from calib_prune.pruning.walk import prune
        base_model(folder)
        import torch
        prune(load_model(str(folder / "model"))[0],
              torch.ones(2, 16, dtype=torch.int64),
              "wanda",
              checkpoint=folder / "cp")
        damage(next((folder / "cp").glob(file)))
        return attempt(lambda: prune(load_model(str(folder / "model"))[0],
                                     torch.ones(2, 16, dtype=torch.int64),
                                     "wanda",
                                     checkpoint=folder / "cp"))
    def output(folder, damage, file):
        usual = ["--method", "wanda", "--checkpoint", folder / "cp"]
        run = lambda: run_command(folder / "try", "prune", [str(o) for o in usual])
        (folder / "try").mkdir()
        import calib_prune.pruning.checkpoint as module
        # as if it were killed before
        before, module.remove_checkpoint = module.remove_checkpoint, lambda _: None
        try: run()
        finally: module.remove_checkpoint = before
        damage(folder / "try/out" / file)
        shutil.rmtree(folder / "try/model")
        found = run()
        return Outcome("traceback", f"believed: {found.said}") if found.kind == "done" else found
    def journal(folder, damage):
        from calib_prune.generation.baselines import self_cal
        from calib_prune.model.tiny import tiny_llama, tiny_tokenizer
        make = lambda: self_cal(
            tiny_llama(), tiny_tokenizer(), budget=40, length=16, journal=folder / "j")
        make()
        damage(folder / "j")
        return attempt(make)
    def task(folder, damage, file):
        from calib_prune.evaluation.tasks import TASKS, write_task
        out = write_task(TASKS["sciq"], 2, folder / "tasks")
        damage(next(out.glob(file)))
        return attempt(lambda: write_task(TASKS["sciq"], 2, folder / "tasks"))
    def result(folder, damage, file):
        import pandas as pd

        from calib_prune.study.results import load_cell, save_cell
        items = pd.DataFrame(dict(task=["sciq"] * 2, item=["0", "1"], value=[1.0, 0.0]))
        save_cell(folder, dict(cell="dense", calibration=None),
                  pd.DataFrame([dict(task="sciq", score=.5)]), items, pd.DataFrame(), {})
        damage(folder / file)
        return attempt(lambda: load_cell(folder / "dense.json"))
    def calibration(folder, damage):
        from calib_prune.calibration.sets import (
            build_calibration,
            load_calibration,
            save_calibration,
        )
        from calib_prune.model.tiny import tiny_tokenizer
        path = save_calibration(build_calibration(str(text_file(folder)), tiny_tokenizer(), 2, 16),
                                folder / "c.parquet")
        damage(path)
        return attempt(lambda: load_calibration(path))
    for name, damage in damages.items():
        for part, f in {
                "manifest": manifest, "checkpoint marker": lambda x, d: checkpoint(x, d, "*.json"),
                "checkpoint layer": lambda x, d: checkpoint(x, d, "layer*"),
                "record of an output": lambda x, d: output(x, d, "calib_prune.json"),
                "weights of an output": lambda x, d: output(x, d, "model.safetensors"),
                "journal": journal, "task items": lambda x, d: task(x, d, "items.jsonl"),
                "task configuration": lambda x, d: task(x, d, "*.yaml"),
                "rows": lambda x, d: result(x, d, "dense.json"),
                "items": lambda x, d: result(x, d, "dense.items.parquet"),
                "calibration set": calibration}.items():
            yield Case("damaged state",
                       f"{part} {name}",
                       lambda folder, f=f, damage=damage: f(folder, damage))


# seconds of work for a case, seconds in all, bytes of address space
PATIENCE, WAIT, MEMORY = 60, 120, 8 << 30


class Stuck(BaseException):
    "A case that does not end."


stuck: list[int] = []  # signals that came during a case: what it calls may swallow the error


def limits() -> None:
    "Let a case that hangs or eats the memory fail alone."
    def stop(number, _):
        stuck.append(number)
        raise Stuck
    for number in (signal.SIGALRM, signal.SIGPROF): signal.signal(number, stop)
    os.environ.update(HF_HUB_OFFLINE="1", PIP_NO_INDEX="1")  # nothing is fetched
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))


CASES = (model_cases, gguf_cases, preset_cases, number_cases, path_cases, text_cases, state_cases)


def try_case(case: Case) -> Outcome:
    "Run a case in a folder of its own."
    before = Path.cwd()
    with TemporaryDirectory() as d:
        os.chdir(d)  # what is written to a name such as "x" stays there
        stuck.clear()
        signal.alarm(WAIT)
        signal.setitimer(signal.ITIMER_PROF, PATIENCE)
        try: found = case.run(Path(d))
        except BaseException: found = Outcome("traceback", traceback.format_exc()[-1500:])
        finally:
            signal.alarm(0)
            signal.setitimer(signal.ITIMER_PROF, 0)
            os.chdir(before)
    return Outcome("traceback", f"it did not end: {found.said}") if stuck else found
