"""Torture by poisoned models and data, and by hostile programs in the sandbox.

Nothing that comes in a file may run, no secret may come out, and no try may use up memory or time.
`python -m tests.torture.poison [--short]`.
"""
import gzip
import json
import os
import pickle
import random
import shutil
import signal
import struct
import sys
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.attack import Outcome, attempt, base_gguf, dry_run, edited, prune_with, text_file
from tests.torture import alone
from tests.torture.alone import SKIP, Results

SECRET = "torture-secret-5f1c"   # what must not be read
TOKEN = "torture-canary"         # in the names of files that must not appear
MEMORY_MB = 1500                 # what a try may take


@dataclass(frozen=True)
class Poison:
    "One poisoned input."
    name: str
    # in a folder with a model, text, a secret; the canary is `folder/CANARY`
    act: Callable[[Path], Outcome]
    refused: bool = False           # must it be refused, not merely be harmless?
    seconds: float = 20


class Bomb:
    "What runs when it is unpickled."
    def __init__(self, canary: Path): self.canary = str(canary)
    def __reduce__(self): return open, (self.canary, "w")


def code(folder: Path) -> str:
    "Python that leaves the canary."
    return f"open({str(folder / TOKEN)!r}, 'w').close()\n"


def evil_module(folder: Path) -> str:
    "A module of custom code, as model folders have it."
    return (
        code(folder)
        + "class Evil:\n    def __init__(self, *a, **k): pass\n    @classmethod\n    def"
        f" from_pretrained(cls, *a, **k): open({str(folder / TOKEN)!r}, 'w'); return cls()\n"
    )


# --- models

def of_model(
    name: str, change: Callable[[Path, Path], object], refused: bool = False, seconds: float = 20
) -> Poison:
    "A prune of a model folder that was changed."
    def act(folder):
        change(folder / "model", folder)
        return prune_with(folder)
    return Poison(f"model: {name}", act, refused, seconds)


def pickles() -> Iterator[Poison]:
    def write(path: Path, folder: Path, kind: str):
        bomb = Bomb(folder / TOKEN)
        if kind == "torch":
            import torch
            torch.save(bomb, path)
        elif kind == "numpy":
            import numpy as np
            with open(path, "wb") as f:
                np.save(f, np.array([bomb], dtype=object), allow_pickle=True)
        else:
            path.write_bytes(pickle.dumps(bomb, int(kind)))
    for name in ("pytorch_model.bin", "model.pt", "model.pth", "model.ckpt", "consolidated.00.pth"):
        for kind in ("0", "5", "torch"):
            def only(m, folder, name=name, kind=kind):
                (m / "model.safetensors").unlink()
                write(m / name, folder, kind)
            yield of_model(f"only {name}, {kind}", only, refused=True)
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "rng_state.pth",
                 "adapter_model.bin", "tokenizer.pkl", "weights.npy", "special_tokens_map.json",
                 "vocab.json", "merges.txt", "tokenizer.model", "added_tokens.json",
                 "chat_template.jinja", "preprocessor_config.json", "processor_config.json",
                 "spiece.model", "tf_model.h5", "flax_model.msgpack"):
        yield of_model(
            f"{name} beside the weights",
            lambda m, f, name=name: write(m / name, f, "numpy" if name.endswith("npy") else "2"),
        )
    for name in ("model.safetensors", "tokenizer.json", "config.json", "generation_config.json",
                 "tokenizer_config.json"):
        yield of_model(
            f"{name} is a pickle", lambda m, f, name=name: write(m / name, f, "torch"), refused=True
        )
    def index(m, folder):
        (m / "model.safetensors").unlink()
        write(m / "part.bin", folder, "2")
        (m / "pytorch_model.bin.index.json").write_text(
            json.dumps({"weight_map": {"lm_head.weight": "part.bin"}})
        )
    yield of_model("pickles with an index", index, refused=True)
    def adapter(m, folder):
        write(m / "adapter_model.bin", folder, "torch")
        (m / "adapter_config.json").write_text(
            json.dumps(
                dict(peft_type="LORA",
                     base_model_name_or_path=str(m),
                     r=1,
                     task_type="CAUSAL_LM",
                     auto_mapping=dict(parent_library="evil", base_model_class="Evil"))))
        (m / "evil.py").write_text(evil_module(folder))
    yield of_model("a pickled adapter", adapter)


def custom_code() -> Iterator[Poison]:
    evil = {
        o: "evil.Evil" for o in ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoTokenizer",
                                 "AutoProcessor", "AutoImageProcessor")}
    evil["AutoTokenizer"] = ["evil.Evil", "evil.Evil"]
    def plant(m, folder):
        for name in ("evil.py", "modeling_evil.py", "configuration_evil.py", "tokenization_evil.py",
                     "__init__.py", "model.py", "generate.py"):
            (m / name).write_text(evil_module(folder))
        (m / "custom_generate").mkdir()
        (m / "custom_generate/generate.py").write_text(evil_module(folder))
    def put(name, file, **values):
        def change(m, folder):
            plant(m, folder)
            if not (m / file).exists(): (m / file).write_text("{}")
            edited(m / file, lambda o: o.update(values))
        return of_model(f"{file}: {name}", change)

    for file in ("config.json", "tokenizer_config.json", "generation_config.json",
                 "preprocessor_config.json", "processor_config.json", "adapter_config.json",
                 "special_tokens_map.json"):
        yield put("auto_map", file, auto_map=evil)
    yield put(
        "auto_map elsewhere", "config.json", auto_map={k: "owner/other--evil.Evil" for k in evil}
    )
    yield put("auto_map to a path", "config.json", auto_map={k: "../model/evil.Evil" for k in evil})
    yield put("an unknown kind", "config.json", model_type="evil", auto_map=evil)
    yield put("an unknown kind without a map", "config.json", model_type="evil")
    for name in ("Evil", "evil.Evil", "os.system", "../evil", "RagTokenizer", "CanineTokenizer",
                 "T5Tokenizer", "LlamaTokenizer", "__import__"):
        yield put(f"tokenizer_class {name}", "tokenizer_config.json", tokenizer_class=name)
    yield put("tokenizer_class", "config.json", tokenizer_class="evil.Evil")
    yield put(
        "custom_generate", "generation_config.json", custom_generate=".", trust_remote_code=True
    )
    yield put(
        "trust_remote_code",
        "config.json",
        trust_remote_code=True,
        auto_map=evil,
        code_revision="main",
    )
    for name in ("evil/kernels", "kernels-community/flash-attn", "paged|evil/kernels:evil",
                 "flash_attention_2", "os.system"):
        yield put(
            f"attention {name}",
            "config.json",
            _attn_implementation=name,
            attn_implementation=name,
            experts_implementation=name,
        )
    for name in ("gptq", "awq", "bitsandbytes", "hqq", "torchao", "quark", "quanto",
                 "compressed-tensors", "aqlm", "fp8", "evil"):
        yield put(
            f"quantised by {name}",
            "config.json",
            quantization_config=dict(quant_method=name, bits=4, modules_to_not_convert=["evil"]),
        )
    for name in ("evil.relu", "__import__('os').system('true')", "../x"):
        yield put(f"hidden_act {name}", "config.json", hidden_act=name)
    yield put("architectures", "config.json", architectures=["os.system", "../../Evil"])
    yield put(
        "base model elsewhere",
        "config.json",
        _name_or_path="owner/evil",
        base_model_name_or_path="owner/evil",
    )


def templates() -> Iterator[Poison]:
    attacks = {
        "classes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "globals": "{{ cycler.__init__.__globals__.os.popen('touch CANARY') }}",
        "lipsum": "{{ lipsum.__globals__['os'].system('touch CANARY') }}",
        "loop": "{% for i in range(10**9) %}x{% endfor %}", "power": "{{ 'x' * 10**10 }}",
        "include": "{% include '/etc/passwd' %}", "format": "{{ '{0.__class__}'.format(1) }}",
        "broken": "{% for", "import": "{% import 'os' as os %}"}
    for name, text in attacks.items():
        def change(m, folder, text=text):
            text = text.replace("CANARY", str(folder / TOKEN))
            edited(m / "tokenizer_config.json", lambda o: o.update(chat_template=text))
            (m / "chat_template.jinja").write_text(text)
            (m / "additional_chat_templates").mkdir()
            (m / "additional_chat_templates/evil.jinja").write_text(text)
        yield of_model(f"chat template: {name}", change)


def tokenizers() -> Iterator[Poison]:

    def put(name, change, **more):
        return of_model(
            f"tokenizer.json: {name}", lambda m, f: edited(m / "tokenizer.json", change), **more
        )

    def split(pattern):
        return {
            "type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    yield put("a slow pattern", lambda o: o.update(pre_tokenizer=split(r"(\w+\s?)+\.\.\.$")))
    yield put(
        "a pattern that eats memory",
        lambda o: o.update(pre_tokenizer=split("((a{0,5000}){0,5000}){0,5000}")),
    )
    yield put("a token number of 10^9", lambda o: o["model"]["vocab"].update(evil=10 ** 9))
    yield put("a token number of 2^63", lambda o: o["model"]["vocab"].update(evil=2 ** 63))
    yield put(
        "an added token of 10^9",
        lambda o: o["added_tokens"].append(dict(o["added_tokens"][0], id=10**9, content="evil")),
    )
    yield put(
        "a normaliser of noise",
        lambda o: o.update(normalizer={"type": "Precompiled", "precompiled_charsmap": "//////8="}),
    )
    yield put(
        "a normaliser of growth", lambda o: o.update(
            normalizer={
                "type": "Sequence", "normalizers": [{
                    "type": "Replace", "pattern": {"String": "e"}, "content": "e" * 40}] * 4}))
    yield put(
        "deep", lambda o: o.update(normalizer=json.loads('{"type": "Sequence", "normalizers": [' *
                                                         400 + "]}" * 400)))
    yield put(
        "padding to 10^9", lambda o: o.update(
            padding={
                "strategy": {"Fixed": 10**9}, "direction": "Right", "pad_to_multiple_of": None,
                "pad_id": 0, "pad_type_id": 0, "pad_token": "<|endoftext|>"}))
    yield put(
        "truncation to 1", lambda o: o.update(truncation=dict(
            direction="Right", max_length=1, strategy="LongestFirst", stride=0)))
    yield of_model(
        "tokenizer.json: a million tokens",
        lambda m, f: edited(
            m / "tokenizer.json", lambda o: o["added_tokens"].extend(
                dict(o["added_tokens"][0], id=300 + i, content=f"<{i}>") for i in range(100_000))),
        seconds=60)
    yield of_model(
        "tokenizer_config.json: added tokens of 10^9", lambda m, f: edited(
            m / "tokenizer_config.json", lambda o: o.update(added_tokens_decoder={
                str(10**9): {"content": "evil", "special": True}},
                                                            model_max_length=10**30)))


def weights() -> Iterator[Poison]:
    # make: header, size of the data → bytes of the whole file
    def header(name, make, refused=True, seconds=20):
        def change(m, folder):
            data = (m / "model.safetensors").read_bytes()
            size = int.from_bytes(data[:8], "little")
            made = make(json.loads(data[8:8 + size]), data[8 + size:])
            (m / "model.safetensors").write_bytes(made)
        return of_model(f"safetensors: {name}", change, refused, seconds)

    def with_header(head, data):
        return struct.pack("<Q", len(text := json.dumps(head).encode())) + text + data

    def first(head): return next(k for k in head if k != "__metadata__")
    def changed(**values): return lambda h, d: with_header(h | {first(h): h[first(h)] | values}, d)
    for n in (0, 1, 2 ** 31, 10 ** 8 + 1, 2 ** 62, 2 ** 64 - 1):
        yield header(
            f"a header of {n} bytes",
            lambda h, d, n=n: struct.pack("<Q", n) + json.dumps(h).encode() + d,
        )
    yield header(
        "a header of blanks", lambda h, d: struct.pack("<Q", 9 * 10**7) + b" " * (9 * 10**7)
    )
    yield header("a header of brackets", lambda h, d: struct.pack("<Q", 10 ** 6) + b"[" * 10 ** 6)
    yield header(
        "a header of text", lambda h, d: struct.pack("<Q", 10**7) + b'{"' + b"a" * (10**7 - 2)
    )
    yield header(
        "a million tensors", lambda h, d: with_header(
            h | {
                f"x{i}": dict(dtype="F32", shape=[0], data_offsets=[0, 0])
                for i in range(100_000)}, d), False, 90)
    yield header("a tensor of 2^62 numbers", changed(shape=[2 ** 31, 2 ** 31]))
    yield header("a shape that wraps to 0", changed(shape=[2 ** 32, 2 ** 32]))
    yield header("offsets outside", changed(data_offsets=[0, 10 ** 15]))
    yield header("offsets backwards", changed(data_offsets=[4096, 0]))
    yield header("negative offsets", changed(data_offsets=[-4, 0]))
    yield header("an unknown type", changed(dtype="PICKLE"))
    yield header("a shape of text", changed(shape="(1,)"))
    def overlap(h, d):
        names = [k for k in h if k != "__metadata__"]
        return with_header(
            h | {names[1]: h[names[1]] | dict(data_offsets=h[names[0]]["data_offsets"])}, d
        )
    yield header("overlaps", overlap)
    def twice(h, d):
        text = json.dumps(h).encode()
        name = json.dumps(first(h)).encode()
        text = text[:-1] + b", " + name + b": " + json.dumps(h[first(h)]
                                                             | dict(shape=[1])).encode() + b"}"
        return struct.pack("<Q", len(text)) + text + d
    yield header("the same name twice", twice)
    yield header("a hole", lambda h, d: with_header(h, d + b"x" * 64))
    yield of_model(
        "safetensors: another file of noise beside it",
        lambda m, f: (m / "extra.safetensors").write_bytes(b"\xff" * 64),
        refused=True,
    )
    def index(name, told, refused=True):
        def change(m, folder):
            (m / "model.safetensors").rename(folder / "outside.safetensors")
            (m / "inside").mkdir()
            shutil.copy(folder / "outside.safetensors", m / "inside/x.safetensors")
            (m / "x.safetensors").symlink_to(folder / "gone.safetensors")
            (m / "model.safetensors.index.json").write_text(
                json.dumps({"weight_map": {"lm_head.weight": told(folder)}})
            )
        return of_model(f"index: {name}", change, refused)
    yield index("leads up", lambda f: "../outside.safetensors")
    yield index("is absolute", lambda f: str(f / "outside.safetensors"))
    yield index("leads to a secret", lambda f: str(f / "secret.txt"))
    yield index("leads below", lambda f: "inside/x.safetensors")
    yield index("leads to a link to nowhere", lambda f: "x.safetensors")
    yield index("leads to a device", lambda f: "/dev/zero")
    yield index("a name of a zero byte", lambda f: "a\0.safetensors")
    yield index("a long name", lambda f: "x" * 5000 + ".safetensors")


def links() -> Iterator[Poison]:
    files = ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json",
             "model.safetensors", "special_tokens_map.json", "chat_template.jinja")
    for name in files:
        for kind, target in {
                "a secret": "secret.txt", "an endless device": "/dev/zero", "itself": None,
                "a pipe": "pipe", "a folder": "."}.items():
            if kind == "itself" and name == "chat_template.jinja": continue
            def change(m, folder, name=name, kind=kind, target=target):
                (m / name).unlink(missing_ok=True)
                if kind == "a pipe": os.mkfifo(m / name)
                else:
                    (m / name).symlink_to(folder /
                                          target if target == "secret.txt" else target or name)
            yield of_model(f"{name} is {kind}", change, seconds=10)
    def text(kind, make):
        def act(folder):
            make(folder / "text.txt", folder)
            return prune_with(folder)
        return Poison(f"text is {kind}", act, refused=True, seconds=10)
    def linked(target): return lambda p, f: (p.unlink(), p.symlink_to(target))
    yield text("an endless device", linked("/dev/zero"))
    yield text("a pipe", lambda p, f: (p.unlink(), os.mkfifo(p)))
    yield text("endless noise", linked("/dev/urandom"))


def configurations() -> Iterator[Poison]:
    sizes = dict(
        vocab_size=(10**7, 10**9, 2**62),
        hidden_size=(10**5, 10**9),
        intermediate_size=(10**7, 10**12),
        num_hidden_layers=(3000, 10**6, 10**12),
        num_attention_heads=(10**6, 10**12),
        num_key_value_heads=(10**6,),
        head_dim=(10**6, 10**12),
        max_position_embeddings=(10**12, 2**62),
    )
    for key, values in sizes.items():
        for value in values:
            yield of_model(
                f"config.json: {key} of {value:.0e}",
                lambda m, f, k=key, v=value: edited(m / "config.json", lambda o: o.update({k: v})),
            )
    more = {
        "experts": dict(model_type="mixtral", num_local_experts=10**5), "position tables": dict(
            model_type="opt", max_position_embeddings=10**9),
        "rope factors": dict(rope_parameters=dict(
            rope_type="longrope", rope_theta=1e4, short_factor=[1.0] * 10**6, long_factor=[1.0])),
        "labels": dict(num_labels=10**8),
        "layer types": dict(layer_types=["full_attention"] * 10**6), "a rope of 1e308": dict(
            rope_parameters=dict(rope_type="linear", factor=1e308, rope_theta=1e308)),
        "sub-configurations": dict(text_config=dict(hidden_size=10**9)),
        "pruned heads": dict(pruned_heads={"0": list(range(10**5))})}
    for name, values in more.items():
        yield of_model(
            f"config.json: {name}",
            lambda m, f, v=values: edited(m / "config.json", lambda o: o.update(v)),
        )


def ggufs() -> Iterator[Poison]:
    def of_gguf(name, change, refused=True):
        def act(folder):
            path = base_gguf(folder)
            change(path)
            return prune_with(folder, model=path)
        return Poison(f"GGUF: {name}", act, refused)
    def put(at, kind, value):
        def change(path):
            data = bytearray(path.read_bytes())
            struct.pack_into(kind, data, at, value)
            path.write_bytes(bytes(data))
        return change
    for n in (2 ** 20, 2 ** 31, 2 ** 62, 2 ** 64 - 1):
        yield of_gguf(f"{n} tensors", put(8, "<Q", n))
        yield of_gguf(f"{n} keys", put(16, "<Q", n))
        yield of_gguf(f"a name of {n} bytes", put(24, "<Q", n))
    yield of_gguf("version 2^31", put(4, "<I", 2 ** 31))
    def after(key, kind, value, skip=4):  # skip: the type
        def change(path):
            data = bytearray(path.read_bytes())
            struct.pack_into(kind, data, data.index(key.encode()) + len(key) + skip, value)
            path.write_bytes(bytes(data))
        return change

    for key in ("block_count", "embedding_length", "feed_forward_length", "attention.head_count",
                "vocab_size"):
        for n in (0, 10**5, 2**31 - 1):
            yield of_gguf(f"{key} of {n}", after(f"llama.{key}", "<I", n))
    yield of_gguf(
        "context_length of 2^32 - 1", after("llama.context_length", "<I", 2**32 - 1), refused=False
    )
    for n in (2 ** 24, 2 ** 40, 2 ** 63):
        yield of_gguf(f"{n} tokens", after("tokenizer.ggml.tokens", "<Q", n, 8))
    yield of_gguf("arrays in arrays", after("tokenizer.ggml.tokens", "<I", 9, 4))
    yield of_gguf("an unknown type", after("tokenizer.ggml.tokens", "<I", 99, 4))
    for n in (5, 2**31):
        yield of_gguf(f"a tensor of {n} dimensions", after("token_embd.weight", "<I", n, 0))
    for n in (2**33, 2**62):
        yield of_gguf(f"a tensor {n} wide", after("token_embd.weight", "<Q", n, 4))
    yield of_gguf("a tensor of an unknown type", after("token_embd.weight", "<I", 99, 20))
    yield of_gguf("a tensor outside", after("token_embd.weight", "<Q", 2 ** 50, 24))
    def architecture(name):
        def change(path): path.write_bytes(path.read_bytes().replace(b"llama", name))
        return change
    for name in (b"../..", b"evil.", b"\xff\xff\xff\xff\xff"):
        yield of_gguf(f"architecture {name!r}", architecture(name))


# --- data and archives

def archives() -> Iterator[Poison]:
    def fetching(name, write, wrong_pin=False):
        "Fetch from a wheel on this machine."
        def act(folder):
            from dataclasses import replace

            from calib_prune.core import file_sha256
            from calib_prune.data.fetch import fetch
            from calib_prune.data.files import documents
            from calib_prune.data.wheels import Entry, NamedModel, Wheel, lines
            index = folder / "index"
            index.mkdir()
            path = index / "cptest_one-1.0-py3-none-any.whl"
            with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as z:
                z.writestr(
                    "cptest_one-1.0.dist-info/METADATA",
                    "Metadata-Version: 2.1\nName: cptest-one\nVersion: 1.0\n",
                )
                z.writestr(
                    "cptest_one-1.0.dist-info/WHEEL",
                    "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
                )
                z.writestr("cptest_one-1.0.dist-info/RECORD", "")
                write(z, folder)
            pin = Wheel("cptest-one", "1.0", file_sha256(path), 0.001)
            if wrong_pin: pin = replace(pin, sha256="0" * 64)
            named = NamedModel("m", "", "", pin.name, "m.gguf")
            entries = [
                Entry("sources", "x", pin.name,
                      lambda w: documents(r["text"] for r in lines(w, "t.jsonl.gz"))),
                Entry("models", "m", pin.name, named.make)]
            os.environ.update(PIP_FIND_LINKS=str(index), PIP_NO_INDEX="1")
            return attempt(
                lambda: fetch(root=folder / "cache", entries=entries, pins={pin.name: pin})
            )
        return Poison(f"wheel: {name}", act, refused=True, seconds=60)
    text = gzip.compress(b'{"text": "a"}\n')
    def outside(z, folder):
        z.writestr("t.jsonl.gz", text)
        for name in (f"../../{TOKEN}", f"/{folder}/{TOKEN}", "m.gguf/../../x"):
            z.writestr(name, "evil")
        z.writestr("m.gguf", b"GGUF")
    yield fetching("paths that lead outside", outside)
    yield fetching(
        "another file than the pinned one",
        lambda z, f: z.writestr("t.jsonl.gz", gzip.compress(b"0" * 10**8)),
        wrong_pin=True,
    )
    yield fetching("a member that is missing", lambda z, f: z.writestr("other", ""))
    def link(z, folder):
        z.writestr("t.jsonl.gz", text)
        info = zipfile.ZipInfo("m.gguf")
        info.external_attr = 0o120777 << 16
        z.writestr(info, str(folder / "secret.txt"))
    yield fetching("a model that is a link to a secret", link)
    yield fetching(
        "a model that is no model",
        lambda z, f: (z.writestr("t.jsonl.gz", text), z.writestr("m.gguf", os.urandom(500))),
    )
    yield fetching(
        "text that is a pickle",
        lambda z, f: z.writestr("t.jsonl.gz", gzip.compress(pickle.dumps(Bomb(f / TOKEN)))),
    )
    yield fetching(
        "text that is no gzip", lambda z, f: z.writestr("t.jsonl.gz", b"\x1f\x8b" + b"\xff" * 60)
    )
    yield fetching(
        "text of the wrong form",
        lambda z, f: z.writestr("t.jsonl.gz", gzip.compress(b'{"text": 5}\n')),
    )


def tables() -> Iterator[Poison]:
    import pyarrow as pa
    import pyarrow.parquet as pq
    def parquet(name, make, refused=False):
        def act(folder):
            table = make(folder)
            if isinstance(table, pa.Table): pq.write_table(table, folder / "x.parquet")
            return prune_with(folder, "--calibration", str(folder / "x.parquet"))
        return Poison(f"parquet: {name}", act, refused, 60)
    words = "some words and 1 2 3 numbers. " * 40
    def extension(folder):
        bomb = pickle.dumps(Bomb(folder / TOKEN))
        field = pa.field("text",
                         pa.string(),
                         metadata={
                             b"ARROW:extension:name": b"arrow.py_extension_type",
                             b"ARROW:extension:metadata": bomb})
        return pa.Table.from_arrays([pa.array([words] * 4)], schema=pa.schema([field]))
    yield parquet("a pickled extension type", extension)
    def pandas_metadata(folder):
        about = {
            b"pandas": (
                b'{"columns": [{"name": "text", "numpy_type": "object", "metadata": "__import__"}],'
                b' "index_columns": ["evil"]}'
            )
        }
        return pa.table(dict(text=[words] * 4)).replace_schema_metadata(
            about | {b"calib_prune": pickle.dumps(Bomb(folder / TOKEN))}
        )
    yield parquet("strange metadata", pandas_metadata)
    yield parquet(
        "pickles in a column",
        lambda f: pa.table(dict(text=[pickle.dumps(Bomb(f / TOKEN))] * 4)),
        refused=True,
    )
    def bomb(folder):
        row = pa.table(dict(text=["a b " * 500_000]))
        with pq.ParquetWriter(folder / "x.parquet", row.schema, compression="zstd") as out:
            for _ in range(300): out.write_table(row)
    yield parquet("a small file of 600 MB of text", bomb)
    def damaged(at):
        def make(folder):
            pq.write_table(pa.table(dict(text=[words] * 40)), folder / "x.parquet")
            data = bytearray((folder / "x.parquet").read_bytes())
            for i in range(at, min(at + 8, len(data) - 12)): data[i] = 0xFF
            (folder / "x.parquet").write_bytes(bytes(data))
        return make
    for at in (4, 20, 60, 110, 150, 220, 300): yield parquet(f"damaged at {at}", damaged(at))
    yield parquet(
        "a footer of 2 GB",
        lambda f: (f / "x.parquet").write_bytes(b"PAR1" + b"\xff" * 64 + struct.pack(
            "<I", 2**31 - 1) + b"PAR1"), True)
    def loaded(name, make):
        def act(folder):
            from calib_prune.calibration.sets import load_calibration
            make(folder / "c.parquet", folder)
            return attempt(lambda: load_calibration(folder / "c.parquet"))
        return Poison(f"calibration set: {name}", act, refused=True)
    yield loaded("a pickle", lambda p, f: p.write_bytes(pickle.dumps(Bomb(f / TOKEN))))
    about = {
        b"calib_prune": json.dumps(dict(tokenizer="x", seed=0, sources={}, content="x")).encode()
    }
    yield loaded("tokens that are pickles", lambda p, f: pq.write_table(
        pa.table(dict(tokens=[pickle.dumps(Bomb(f / TOKEN))])).replace_schema_metadata(about), p))
    yield loaded(
        "metadata that is a pickle", lambda p, f: pq.write_table(
            pa.table(dict(tokens=[[1, 2]])).replace_schema_metadata({
                b"calib_prune": pickle.dumps(Bomb(f / TOKEN))}), p))
    def kept(name, write):
        "The kept tokens of a text, replaced by poison."
        def act(folder):
            os.environ["CALIB_PRUNE_CACHE"] = str(folder / "cache")
            first = prune_with(folder, "--output", str(folder / "out1"))
            if first.kind != "done": return Outcome("traceback", first.said)
            for o in (folder / "cache/tokens").iterdir(): write(o, folder)
            return prune_with(folder)
        return Poison(f"kept tokens: {name}", act)
    import numpy as np
    yield kept(
        "pickled objects", lambda p, f: np.save(
            p.open("wb"), np.array([Bomb(f / TOKEN)], dtype=object), allow_pickle=True))
    yield kept("a pickle", lambda p, f: p.write_bytes(pickle.dumps(Bomb(f / TOKEN))))
    yield kept(
        "a header of code",
        lambda p, f: p.write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", 90) + (
            f"{{'descr': open('{f / TOKEN}','w'), 'fortran_order': False, 'shape': (1,)}}").encode(
            ).ljust(90)))
    yield kept(
        "a shape of 10^15", lambda p, f: p.write_bytes(b"\x93NUMPY\x01\x00" + struct.pack(
            "<H", 86) + b"{'descr': '<i4', 'fortran_order': False, 'shape': (1000000000000000,), }".
                                                       ljust(86)))
    yield kept("an endless device", lambda p, f: (p.unlink(), p.symlink_to("/dev/zero")))


def presets() -> Iterator[Poison]:
    texts = {
        "apply": "!!python/object/apply:os.system ['touch CANARY']",
        "new": "!!python/object/new:os.system ['touch CANARY']",
        "name": "name: !!python/name:os.system",
        "module": "name: !!python/module:os",
        "tuple": "name: !!python/tuple [1]",
        "object": "name: !!python/object:os.system {}",
        "function": "name: !function os.system",
        "include": "name: !include /etc/passwd",
        "laughs": (
            "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n"
            + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12))
            + "name: *a11\n"
        ),
        "laughing keys": (
            "a0: &a0 {x: 1}\n"
            + "".join(
                f"a{i}: &a{i} {{" + ", ".join(f"k{j}: *a{i - 1}" for j in range(10)) + "}\n"
                for i in range(1, 12)
            )
        ),
        "merges": (
            "a0: &a0 {x: 1}\n"
            + "".join(
                f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 10)}]}}\n" for i in range(1, 8)
            )
        ),
        "itself": "a: &a {b: *a}",
        "a list of itself": "name: &a [*a]",
        "deep": "a: " + "[" * 3000 + "]" * 3000,
        "flow": "{" * 3000,
        "a long number": "name: 1" + "0" * 100_000,
        "a hexadecimal number": "resamples: 0x" + "f" * 100_000,
        "sexagesimal": "resamples: 9" + ":59" * 20_000,
        "a date": "name: 0000-00-00",
        "a long key": "? " + "[a]" + "\n: b",
        "binary": "name: !!binary |\n  /////w==",
        "a set": "name: !!set {a, b}",
        "tags": (
            "%TAG ! tag:yaml.org,2002:python/\n---\nname: !object/apply:os.system ['touch CANARY']"
        ),
    }
    for name, text in texts.items():
        def act(folder, text=text):
            (folder / "p.yaml").write_text(text.replace("CANARY", str(folder / TOKEN)))
            return dry_run(folder / "p.yaml", folder)
        yield Poison(f"preset: {name}", act, refused=True)
        if name in ("apply", "laughs", "deep", "itself"):
            def profile(folder, text=text):
                from calib_prune.cli.reproduce import check_profile
                (folder / "profile").mkdir()
                (folder / "profile/config.yaml").write_text(
                    text.replace("CANARY", str(folder / TOKEN))
                )
                return attempt(lambda: check_profile(str(folder / "profile"), folder))
            yield Poison(f"profile: {name}", profile)
    def own(name, *argv):
        def act(folder):
            found = alone.say(*(str(o).replace("CANARY", str(folder /
                                                             TOKEN)).replace("FOLDER", str(folder))
                                for o in argv))
            return Outcome(*found)
        return Poison(f"new-study: {name}", act)

    yield own("a sparsity of code", "new-study", "FOLDER/s", "--sparsity",
              "!!python/object/apply:os.system ['touch CANARY']")
    yield own("a model of code", "new-study", "FOLDER/s", "--model",
              "x: !!python/object/apply:os.system ['touch CANARY']")
    yield own("a name of code", "new-study", "FOLDER/$(touch CANARY)", "--model", "FOLDER/model",
              "--calibration", "FOLDER/text.txt")
    yield own(
        "a method of code", "new-study", "FOLDER/s", "--method", "\\1; !!python/name:os.system"
    )


def kept_tasks() -> Iterator[Poison]:
    "The cache's tasks, in which lm-eval would import functions."
    def tasks(name, plant):
        def act(folder):
            os.environ["CALIB_PRUNE_CACHE"] = str(cache := folder / "cache")
            cache.mkdir()
            for o in ("benchmarks", "models", "sources", "manifest.json"):
                (cache / o).symlink_to(alone.PLACE / "cache" / o)
            run = lambda: Outcome(
                *alone.say("evaluate", "--model", folder / "model", "--tasks", "sciq", "--limit", 2)
            )
            if (first := run()).kind != "done": return Outcome("traceback", first.said)
            home = next((cache / "tasks").iterdir())
            (home / "evil.py").write_text(code(folder) + "def f(*a): return 0\n")
            plant(home, folder)
            return run()
        return Poison(f"kept tasks: {name}", act)
    def add(home, text): (home / "sciq.yaml").write_text((home / "sciq.yaml").read_text() + text)
    yield tasks("a function", lambda h, f: add(h, "process_results: !function evil.f\n"))
    yield tasks(
        "an include", lambda h, f: ((h / "x.yaml").write_text("process_docs: !function evil.f\n"),
                                    add(h, "include: x.yaml\n")))
    yield tasks(
        "another file", lambda h, f: (h / "z.yaml").write_text(
            "task: sciq\ndataset_path: evil.py\nprocess_docs: !function evil.f\n"))
    yield tasks(
        "a group", lambda h, f:
        (h / "a.yaml").write_text("group: sciq\ntask: [sciq]\nprocess_docs: !function evil.f\n"))
    def arrows(home, folder):
        for o in home.rglob("*"):
            if o.suffix in (".arrow", ".json") and "arrow" in str(o.parent):
                o.write_bytes(pickle.dumps(Bomb(folder / TOKEN)))
    yield tasks("pickles for Arrow files", arrows)


GROUPS = (pickles, custom_code, templates, tokenizers, weights, links, configurations, ggufs,
          archives, tables, presets, kept_tasks)


def what_went_wrong(poison: Poison, folder: Path, ended: alone.Ended) -> str:
    "Why a try failed; empty if nothing is wrong."
    if (folder / TOKEN).exists(): return "code in it was run"
    if "normaliser" in poison.name and ended.fault == f"it died: status {-signal.SIGABRT}":
        return (
            f"{SKIP}the tokenizers library aborts the process where memory ends: nothing that calls"
            " it can catch that"
        )
    if ended.fault: return ended.fault[-500:]
    kind, said = ended.value
    if kind == "traceback": return f"traceback: {said[-500:]}"
    if SECRET in said: return "a secret was shown"
    if any(SECRET.encode() in o.read_bytes() for o in (folder / "out").rglob("*") if o.is_file()):
        return "a secret was copied"
    if any(o.stat().st_mode & 0o111 != 0o111 for o in (folder / "out").rglob("*") if o.is_dir()):
        return "a folder that cannot be entered"
    if ended.peak_mb > MEMORY_MB: return f"it took {ended.peak_mb} MB"
    if poison.refused and kind == "done": return "it was not refused"
    return ""


def poisoned(poison: Poison, world: Path) -> str:
    "Make a try in a copy of the world."
    with alone.scratch() as folder:
        shutil.copytree(world, folder, dirs_exist_ok=True)
        def act():
            os.chdir(folder)
            found = poison.act(folder)
            return [found.kind, found.said]
        return what_went_wrong(poison, folder, alone.in_fork(act, poison.seconds, 3 << 30))


def poison_world(folder: Path) -> None:
    "A tiny model, text and a secret."
    from calib_prune.model.loading import save_model
    from calib_prune.model.tiny import tiny_llama, tiny_tokenizer
    save_model(tiny_llama(num_hidden_layers=1, max_position_embeddings=2048), tiny_tokenizer(),
               folder / "model", {})
    text_file(folder)
    (folder / "secret.txt").write_text(SECRET)


def poisons(short: bool, rng: random.Random) -> Results:
    with alone.scratch() as world:
        poison_world(world)
        for group in GROUPS:
            tries = [o for o in group() if alone.wanted(o.name)]
            if group is kept_tasks and not (alone.PLACE / "cache/benchmarks").exists():
                yield "poison", "kept tasks", f"{SKIP}the benchmarks are not fetched"
                continue
            if short: tries = sorted(rng.sample(tries, min(len(tries), 7)), key=lambda o: o.name)
            for o in tries: yield "poison", o.name, poisoned(o, world)


def results(short: bool, seed: int) -> Results:
    rng = random.Random(seed)
    yield from poisons(short, rng)
    from tests.torture.programs import programs
    yield from programs(short, rng)


if __name__ == "__main__": sys.exit(alone.main(results))
