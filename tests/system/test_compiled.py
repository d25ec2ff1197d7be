"""Compiled kernels: kept on disk, never trusted when damaged or foreign, the same numbers in any
number of threads."""
import ast
import hashlib
import importlib.util
import json
import multiprocessing
import os
import platform
import shutil
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import llvmlite.binding as llvm
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import calib_prune
from calib_prune.kernels import compiled as compiled_module
from calib_prune.kernels import tiles
from calib_prune.kernels.attention import attention, causal
from calib_prune.kernels.compiled import cores, in_threads, kernel_folder, one_each, threads
from calib_prune.kernels.tiles import CACHED_ROWS, COLS, ROWS, add_product
from calib_prune.pruning.hessian import SecondMoment
from calib_prune.pruning.sparsegpt import sparsegpt

PACKAGE = Path(calib_prune.__file__).parent

# --- processes

CHILD = """
import json, os
os.environ |= env
os.dup2(os.open(out + ".err", os.O_WRONLY | os.O_CREAT), 2)
import llvmlite.binding as llvm, numba, torch
numba.config.reload_config()
exec(before)
from calib_prune.kernels import compiled, tiles

def product(rows, cols, depth, lower=False):
    "Whole numbers, so every order of the sums is exact."
    rng = torch.Generator().manual_seed(rows)
    a, b = (torch.randint(-9, 9, shape, generator=rng).float() for shape in ((rows, depth), (depth, cols)))
    total = torch.ones(rows, cols)
    tiles.add_product(total, a, b, lower)
    return torch.equal(*(o.tril() if lower else o for o in (total, 1 + a @ b)))

right = product(2 * tiles.ROWS, 2 * tiles.COLS, 300)
exec(after)
kernels = {name: o.stats for name, o in vars(tiles).items() if hasattr(o, "stats")}
count = lambda what: {name: n for name, o in kernels.items() if (n := sum(getattr(o, what).values()))}
json.dump(dict(right=right, hits=count("cache_hits"), misses=count("cache_misses")), open(out, "w"))
"""  # noqa: E501
ONCE = {"_whole_tiles": 1}  # the kernel of that product


def start(cache, before="", after="", **env):
    """A process that never saw our package, forked from one that has torch and numba: a second
    faster than a fresh one."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "numba"])
    start.count = getattr(start, "count", 0) + 1
    out = str(cache.parent / f"{cache.name}.{start.count}.json")
    values = dict(env={"CALIB_PRUNE_CACHE": str(cache)} | env, out=out, before=before, after=after)
    process = context.Process(target=exec, args=(CHILD, values | {"__name__": "child"}))
    process.start()
    return process, Path(out)


def finish(process, out):
    process.join(600)
    if process.is_alive(): process.kill()
    said = Path(f"{out}.err").read_text()
    assert process.exitcode == 0, said or f"exit code {process.exitcode}"
    return SimpleNamespace(said=said, **json.loads(out.read_text()))


def run(cache, *args, **kw): return finish(*start(cache, *args, **kw))


def files(cache):
    return {o: (o.stat().st_mtime_ns, o.read_bytes()) for o in cache.rglob("*") if o.is_file()}


def check_whole(cache):
    "Another process finds everything, and changes nothing."
    before, again = files(cache), run(cache)
    assert again.right and again.hits == ONCE and not again.misses and not again.said
    assert files(cache) == before and not any(".tmp." in o.name for o in before)


@pytest.fixture(scope="module")
def warm(tmp_path_factory):
    "A cache that one process filled."
    cache = tmp_path_factory.mktemp("kernels") / "warm"
    first = run(cache)
    assert first.right and first.misses == ONCE and not first.hits and not first.said
    return cache


@pytest.fixture
def copy(warm, tmp_path): return Path(shutil.copytree(warm, tmp_path / "copy"))


def test_a_second_process_loads_instead_of_compiling(warm):
    assert len(list((warm / "kernels").iterdir())) == 1
    check_whole(warm)


DAMAGE = {
    "truncated.nbc": lambda o: o[: len(o) // 2],
    "flipped.nbc": lambda o: flipped(o, len(o) // 2, 0),
    "garbage.nbi": lambda o: b"\x93garbage" * 50,
    "empty.nbi": lambda o: b"",
}


def flipped(data, at, bit):
    data = bytearray(data)
    data[at] ^= 1 << bit
    return bytes(data)


@pytest.mark.parametrize("how", DAMAGE)
def test_damaged_code_is_compiled_anew(how, copy):
    (file,) = copy.rglob(f"*{Path(how).suffix}")
    file.write_bytes(DAMAGE[how](file.read_bytes()))
    found = run(copy)
    assert found.right and found.misses == ONCE and not found.hits and not found.said
    check_whole(copy)


NOWHERE = {  # where the kernels cannot be kept, and what makes it so
    "kernels is a file": lambda o: (o.mkdir(), (o / "kernels").write_text(""), o)[-1],
    "below a file": lambda o: (o.write_text(""), o / "below" / "it")[-1],
    "no right to write": lambda o: (o.mkdir(), o.chmod(0o500), o)[-1]}


@pytest.mark.parametrize("why", NOWHERE)
def test_a_folder_that_cannot_be_written_costs_time_and_one_warning(why, tmp_path):
    if why == "no right to write" and os.geteuid() == 0: pytest.skip("root may write everywhere")
    cache = NOWHERE[why](tmp_path / "cache")
    found = run(
        tmp_path / "any",
        "import warnings; warnings.simplefilter('always')",
        CALIB_PRUNE_CACHE=str(cache),
    )
    assert found.right and found.misses == ONCE
    assert found.said.count("UserWarning") == 1 and str(
        cache) in found.said and "Traceback" not in found.said
    assert "Set CALIB_PRUNE_CACHE to a folder that can be written" in found.said


FULL = """
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, ({room}, resource.RLIM_INFINITY))
"""
ROOM = "resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)"


def test_a_full_disk_costs_time_and_one_warning(tmp_path):
    "The index still finds room, the code does not."
    found = run(tmp_path / "cache", FULL.format(room=20_000), ROOM)
    assert found.right and found.said.count("UserWarning") == 1 and "Traceback" not in found.said
    assert [o.suffix for o in files(tmp_path / "cache")] == [".nbi"]
    again = run(tmp_path / "cache")
    assert again.right and again.misses == ONCE and not again.said


def test_a_damaged_index_on_a_full_disk(copy):
    for o in copy.rglob("*.nbi"): o.write_bytes(b"garbage")
    assert run(copy, FULL.format(room=0), ROOM).right


def test_a_cache_that_is_a_file_does_not_stop_the_import(tmp_path):
    (tmp_path / "cache").write_text("")
    assert run(tmp_path / "cache").right


def test_the_whole_package_warns_once(tmp_path):
    cache = NOWHERE["below a file"](tmp_path / "cache")
    found = run(
        tmp_path / "any",
        after="from calib_prune.pruning import methods",
        CALIB_PRUNE_CACHE=str(cache),
    )
    assert found.said.count("UserWarning") == 1


def test_two_processes_that_start_at_once(tmp_path):
    started = [start(tmp_path / "cache") for _ in range(2)]
    assert all(finish(*o).right for o in started)
    check_whole(tmp_path / "cache")


# --- in which folder

@pytest.mark.parametrize(
    "before, env",
    [("llvm.get_host_cpu_name = lambda: 'generic'", {}), ("", {"NUMBA_CPU_NAME": "generic"})],
)
def test_code_for_another_processor_is_never_loaded(before, env, copy):
    mine, other = files(copy), run(copy, before, **env)
    assert other.right and other.misses == ONCE and not other.hits
    if not env: assert mine.items() <= files(copy).items(), "it has a folder of its own"
    assert run(copy, before, **env).hits == ONCE
    assert run(copy).hits == ONCE, "the first one's code is still there"


def test_whatever_machine_code_depends_on_leads_to_another_folder(tmp_path, monkeypatch):
    source = tmp_path / "kernel.py"
    source.write_text("x = 1")
    first = kernel_folder([source])
    assert kernel_folder([source]) == first and first not in (
        kernel_folder([]),
        kernel_folder([source, source]),
    )
    features, count = llvm.get_host_cpu_features(), 0
    for owner, name, value in (
        (llvm, "get_host_cpu_name", lambda: "another"),
        (llvm, "get_host_cpu_features", lambda: features | {"new": True}),
        (llvm, "get_host_cpu_features", lambda: {}),
        (platform, "machine", lambda: "another"),
        (platform, "python_version", lambda: "3.99.0"),
        (compiled_module.numba, "__version__", "9.9"),
        (compiled_module.llvmlite, "__version__", "9.9"),
    ):
        with monkeypatch.context() as m:
            m.setattr(owner, name, value)
            assert kernel_folder([source]) != first, name
        count += kernel_folder([source]) == first
    assert count == 7
    monkeypatch.setattr(llvm, "get_host_cpu_features", lambda: features | {"absent": False})
    assert kernel_folder([source]) == first, "what a processor lacks says nothing"
    source.write_text("x = 2")
    assert kernel_folder([source]) != first
    source.write_text("x = 1")
    assert kernel_folder([source]) == first
    monkeypatch.setenv("CALIB_PRUNE_CACHE", str(tmp_path))
    assert kernel_folder([source]).parent == tmp_path / "kernels"


def imported_from(file):
    "Name → the file of our package that a module takes it from."
    found = {}
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            folder = file.parents[node.level - 1]
            found |= {
                o.asname or o.name: folder.joinpath(*node.module.split(".")).with_suffix(".py")
                for o in node.names
            }
    return found


def made_from(function):
    "The files that a kernel takes things from, directly or through the kernels that it calls."
    file = Path(function.__code__.co_filename)
    found, taken = {file}, imported_from(file)
    for name in function.__code__.co_names:
        if name in taken: found.add(taken[name])
        if hasattr(function.__globals__.get(name), "py_func"):
            found |= made_from(function.__globals__[name].py_func)
    return found


MODULES = [o for o in sorted(PACKAGE.rglob("*.py")) if "\n@compiled(" in o.read_text()]


@pytest.mark.parametrize("module", [pytest.param(o, id=o.stem) for o in MODULES])
def test_every_kernel_names_the_files_that_it_is_made_from(module, monkeypatch):
    "Or else code that was compiled before a change of them would be loaded after it."
    kernels, original = [], compiled_module.compiled
    # its imports first: their kernels are their own
    importlib.import_module(f"calib_prune.{module.parent.name}.{module.stem}")
    note = lambda *parts: lambda f: (kernels.append((f, parts)), original(*parts)(f))[1]
    monkeypatch.setattr(compiled_module, "compiled", note)
    name = f"calib_prune.{module.parent.name}.{module.stem}_again"
    spec = importlib.util.spec_from_file_location(name, module)
    again = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, again)
    spec.loader.exec_module(again)
    assert kernels
    for kernel, parts in kernels:
        assert made_from(kernel) <= {module, *(PACKAGE / o for o in parts)}, kernel.__name__


# --- damage anywhere, with a kernel that compiles at once

TOY = """
from calib_prune.kernels.compiled import compiled
@compiled()
def square(a): return a * a
@compiled()
def toy(n):
    s = 0
    for o in range(n): s += square(o)
    return s
"""


def load_toy(folder):
    "The kernels as a new process would load them."
    spec = importlib.util.spec_from_file_location("toy_kernel", folder / "toy.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["toy_kernel"] = module
    try: spec.loader.exec_module(module)
    finally: del sys.modules["toy_kernel"]
    return module


@pytest.fixture
def toy_files(tmp_path, monkeypatch):
    "A folder with a kernel that calls another, and the files of both."
    monkeypatch.setenv("CALIB_PRUNE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "toy.py").write_text(TOY)
    assert load_toy(tmp_path).toy(4) == 14
    return tmp_path, {o: data for o, (_, data) in files(tmp_path / "cache").items()}


# a flipped name may lie in a folder that is not there
@pytest.mark.filterwarnings("ignore:Compiled kernels cannot be kept")
@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kernel=st.sampled_from(["toy", "square"]),
    kind=st.sampled_from(["nbc", "nbi"]),
    place=st.floats(0, 1, exclude_max=True),
    bit=st.one_of(st.none(), st.integers(0, 7)),
)
def test_damage_anywhere_is_found_or_harmless(toy_files, kernel, kind, place, bit):
    "A flipped bit, or (None) all bytes from there on lost."
    folder, whole = toy_files
    for o, data in whole.items(): o.write_bytes(data)
    (file,) = [o for o in whole if f".{kernel}-" in o.name and o.suffix == f".{kind}"]
    at = int(place * len(whole[file]))
    file.write_bytes(whole[file][:at] if bit is None else flipped(whole[file], at, bit))
    found = getattr(load_toy(folder), kernel)
    assert found(4) == (14 if kernel == "toy" else 16)
    assert kind == "nbi" or not found.stats.cache_hits, "damaged code was run"
    again = getattr(load_toy(folder), kernel)
    assert again(4) == (14 if kernel == "toy" else 16) and (kind == "nbi" or again.stats.cache_hits)


def test_code_ends_in_its_own_hash(warm):
    for o in warm.rglob("*.nbc"):
        assert hashlib.sha256(o.read_bytes()[:-32]).digest() == o.read_bytes()[-32:]


# --- threads

@pytest.fixture
def torch_threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_no_more_threads_than_cores_or_than_torch_may_use(torch_threads, monkeypatch):
    assert 1 <= cores() <= (os.cpu_count() or 1)
    torch_threads(64)
    assert threads() == cores()
    torch_threads(1)
    assert threads() == 1
    torch_threads(64)
    monkeypatch.setattr(compiled_module, "cores", lambda: 3)
    assert threads() == 3


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no such call on this system")
def test_cores_are_those_that_the_process_may_use(warm):
    bind = "os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); torch.set_num_threads(64)"
    assert run(warm, bind, "right &= compiled.cores() == compiled.threads() == 1").right


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def product(rows, cols, lower):
    total = random(rows, cols)
    add_product(total, random(300, rows, seed=1).T, random(300, cols, seed=2), lower=lower)
    return total.tril() if lower else total


def second_moment(width):
    stats = SecondMoment(width)
    stats.update(random(500, width))
    return stats.matrix()


def attended(sets, heads, kv_heads, tokens):
    q, k, v = (
        random(sets, h, tokens, COLS, seed=n) for n, h in enumerate((heads, kv_heads, kv_heads))
    )
    return attention(q, k, v, causal(sets, tokens), .2)


def pruned(**how):
    x = random(600, 160) @ random(160, 160, seed=1)
    return sparsegpt(random(5 * COLS + 3, 160, seed=2), x.T @ x / 600, block=64, **how)


WORK = {
    "whole tiles": lambda: product(3 * CACHED_ROWS, 6 * COLS, False),
    "any tiles": lambda: product(3 * CACHED_ROWS + 1, 6 * COLS + 5, False),
    "lower tiles": lambda: product(5 * ROWS * COLS, 5 * ROWS * COLS, True),
    "second moment": lambda: second_moment(301),
    "attention, heads apart": lambda: attended(5, 8, 4, 131),
    "attention, heads shared": lambda: attended(1, 6, 2, 203),
    "sparsegpt": lambda: pruned(sparsity=0.6).weight,
    "sparsegpt 2:4": lambda: pruned(pattern="2:4").weight,
    "sparsegpt's error": lambda: torch.tensor(pruned().error),
}


@pytest.mark.parametrize("work", WORK)
def test_the_number_of_threads_changes_no_bit(work, monkeypatch):
    monkeypatch.setattr(tiles, "SMALL", 0)
    used, original = set(), ThreadPoolExecutor.submit
    monkeypatch.setattr(ThreadPoolExecutor, "submit", lambda self, f, share, n:
                        (used.add(n), original(self, f, share, n))[1])
    results = []
    for n in (1, 2, 3, 5):
        monkeypatch.setattr(compiled_module, "threads", lambda n=n: n)
        results.append(WORK[work]())
    assert used == {2, 3, 5}, "other threads did take part"
    for o in results[1:]: assert torch.equal(o, results[0])


@pytest.mark.parametrize("failing", [[0], [1], [4], [0, 2]])
def test_an_error_in_any_share_reaches_the_caller_when_all_have_ended(failing):
    ended = []
    def work(share, shares):
        if share in failing: raise KeyError(share)
        threading.Event().wait(.05)
        ended.append(share)
    with pytest.raises(KeyError, match=str(failing[0])): in_threads(work, 5)
    assert sorted(ended) == [o for o in range(5) if o not in failing]
    in_threads(lambda share, shares: ended.append(shares), 3)  # the threads are still there
    assert ended[-3:] == [3, 3, 3]


def test_every_share_is_done_once_and_one_of_them_here():
    done = []
    in_threads(lambda *o: done.append((*o, threading.get_ident())), 7)
    assert sorted(o[:2] for o in done) == [(o, 7) for o in range(7)]
    assert [o[2] for o in done if not o[0]] == [threading.get_ident()]
    assert len({o[2] for o in done}) <= cores() + 1


def test_many_callers_at_once(monkeypatch):
    """More callers than threads, each with shares for others: nobody waits for ever, and nobody
    gets another's numbers."""
    monkeypatch.setattr(tiles, "SMALL", 0)
    monkeypatch.setattr(compiled_module, "threads", lambda: 3)
    expected, found = product(150, 100, False), []
    work = lambda: found.extend(product(150, 100, False) for _ in range(5))
    callers = [threading.Thread(target=work, daemon=True) for _ in range(6)]
    for o in callers: o.start()
    for o in callers: o.join(60)
    assert len(found) == 30 and all(torch.equal(o, expected) for o in found)


def test_one_item_per_thread(monkeypatch):
    """At least two items per thread: each in one thread, in order; else in this thread, which may
    use all threads."""
    before = torch.get_num_threads()
    monkeypatch.setattr(compiled_module, "threads", lambda: 2)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "set_num_threads", (asked := []).append)
        # each of two threads has to take one of the first two items
        together = threading.Barrier(2)
        def work(o):
            if o < 2: together.wait(60)
            return o, threading.current_thread().name, threading.get_ident()
        seen = one_each(work, [*range(9)])
        assert asked == [1, 2]
    assert [o[0] for o in seen] == [*range(9)]
    own = threading.get_ident()
    assert own in {o[2] for o in seen[:2]} and all(
        o[1].startswith("kernel") for o in seen if o[2] != own
    ), "this thread helps"
    here = one_each(lambda o: threading.get_ident(), [*range(3)])
    assert set(here) == {threading.get_ident()}
    assert (
        one_each(lambda o: one_each(lambda k: k + o, [*range(7)]), [0] * 6) == [[*range(7)]] * 6
    ), "inside, one thread does all"
    torch.set_num_threads(before)


def test_an_error_of_one_item_reaches_the_caller_and_threads_are_as_before(monkeypatch):
    before = torch.get_num_threads()
    monkeypatch.setattr(compiled_module, "threads", lambda: before + 1)
    with pytest.raises(KeyError, match="3"):
        one_each(lambda o: {}[o] if o in (3, 4) else o, [*range(2 * before + 2), 3, 4])
    assert torch.get_num_threads() == before + 1, "what `threads` said before"
    torch.set_num_threads(before)


FORK = """
import signal, threading, torch
torch.set_num_threads(1)  # torch's own threads do not survive a fork; ours have to
compiled.threads, tiles.SMALL = (lambda: 3), 0
all_there = threading.Barrier(compiled.cores() + 1)
compiled.in_threads(lambda *_: all_there.wait(), all_there.parties)
child = os.fork()
if not child:
    signal.alarm(30)
    os._exit(0 if product(tiles.ROWS, 9 * tiles.COLS, 30) else 1)
right &= os.waitpid(child, 0)[1] == 0 and product(tiles.ROWS, 9 * tiles.COLS, 30)
"""


def test_it_works_after_a_fork(warm): assert run(warm, after=FORK).right


# --- other processors

SSE = ["64bit", "cmov", "cx8", "fxsr", "mmx", "sse", "sse2", "x87"]
AVX2 = [
    *SSE, "avx", "avx2", "bmi", "bmi2", "cx16", "f16c", "fma", "lzcnt", "movbe", "popcnt", "sse3",
    "sse4.1", "sse4.2", "ssse3", "xsave"]
OTHER = """
features = llvm.get_host_cpu_features()
for o in features: features[o] &= o in {keep}
llvm.get_host_cpu_features, llvm.get_host_cpu_name = (lambda: features), (lambda: {name!r})
"""
REGISTERS = """
code = "".join(tiles._whole_tiles.inspect_asm().values())
right &= tiles.LANES == {lanes} and "xmm" in code and [o for o in ("ymm", "zmm") if o in code] == {registers}
"""  # noqa: E501
THE_REST = """
for lower in (False, True): right &= product(2 * tiles.ROWS + 1, 2 * tiles.COLS + 3, 260, lower) and product(70, 65, 260, lower)
right &= product(tiles.ROWS * tiles.COLS, tiles.ROWS * tiles.COLS, 20, True)
from calib_prune.kernels.attention import attention, causal
from calib_prune.pruning.sweep import sweep_compiled, sweep_torch
q, k, v = torch.randn(3, 1, 2, 70, tiles.COLS)
wide = torch.nn.functional.scaled_dot_product_attention(q.double(), k.double(), v.double(), is_causal=True, scale=.3)
right &= torch.allclose(attention(q, k, v, causal(1, 70), .3).double(), wide.transpose(1, 2), atol=1e-5)
for pattern in (None, (2, 4)):
    weight, upper = torch.randn(40, 2 * tiles.COLS + 3), torch.randn(40, 40).triu() / 9 + torch.eye(40)
    ours, theirs, masks = weight.clone(), weight.double(), [weight.abs() < .5, weight.abs() < .5]
    squares = sweep_compiled(ours, masks[0], upper, pattern), sweep_torch(theirs, masks[1], upper.double(), pattern)
    right &= torch.allclose(ours.double(), theirs, rtol=1e-4, atol=1e-4) and torch.equal(*masks)
    right &= abs(squares[0] / squares[1] - 1) < 1e-5
"""  # noqa: E501


@pytest.mark.skipif(platform.machine() != "x86_64", reason="these are processors of another kind")
@pytest.mark.parametrize("before, env, lanes, registers, more", [
    (OTHER.format(keep=AVX2, name="haswell"), {}, 8, ["ymm"], ""),
    (OTHER.format(keep=SSE, name="x86-64"), {}, 8, [], THE_REST),
    ("", {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": ""}, "tiles.LANES", [], "")],
                         ids=["without AVX-512", "without AVX", "as numba is told"])
def test_processors_with_fewer_instructions(before, env, lanes, registers, more, tmp_path):
    if registers and not llvm.get_host_cpu_features().get("avx2"):
        pytest.skip("this processor has no AVX2")
    found = run(
        tmp_path / "cache", before, REGISTERS.format(lanes=lanes, registers=registers) + more, **env
    )
    assert found.right and not found.said
