"""What needs a process of its own to be seen: how much memory something takes, and an installation
that cannot be written to."""
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from calib_prune.model.loading import save_model
from calib_prune.model.tiny import tiny_llama, tiny_tokenizer
from tests.processes import run

GROWTH = """
import re, sys, threading
from pathlib import Path
import torch
from calib_prune.model.loading import load_model
from calib_prune.pruning.walk import prune

def own(): return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) >> 10
model, _ = load_model(sys.argv[1])
prune(load_model(sys.argv[2])[0], torch.ones(2, 16, dtype=torch.int64), "wanda", 0.5)  # kernels are loaded
before, most, done = own(), 0, threading.Event()
def watch():
    global most
    while not done.wait(0.002): most = max(most, own())
watcher = threading.Thread(target=watch)
watcher.start()
prune(model, torch.arange(32).view(2, 16), "wanda", 0.5, checkpoint=sys.argv[3] if len(sys.argv) > 3 else None)
done.set()
watcher.join()
model.save_pretrained(sys.argv[1] + "-pruned" + str(len(sys.argv)))
print(most - before)
"""  # noqa: E501


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the memory from /proc")
def test_finished_layers_lie_on_disk(tmp_path):
    """With a checkpoint the memory is that of a layer, however many there are; without one, every
    layer that was changed stays in it."""
    sizes = dict(hidden_size=512, intermediate_size=1024, num_attention_heads=4)
    # 300 MB in its layers
    save_model(tiny_llama(**sizes, num_hidden_layers=32), tiny_tokenizer(), tmp_path / "deep", {})
    save_model(tiny_llama(**sizes, num_hidden_layers=1), tiny_tokenizer(), tmp_path / "flat", {})
    grown = {}
    for more in ((), (tmp_path / "cp",)):
        done = run(tmp_path / "deep", tmp_path / "flat", *more, program=GROWTH)
        grown[len(more)] = int(done.stdout.split()[-1])  # MB
    assert grown[0] > 150 and grown[1] < grown[0] / 2, grown
    a, b = (load_file(tmp_path / f"deep-pruned{k}" / "model.safetensors") for k in (3, 4))
    assert a.keys() == b.keys() and all(
        torch.equal(a[k], b[k]) for k in a
    ), "where the weights lay changes nothing"


def repeated(path, n, **how):
    "A text of 20 MB in each of n rows, in a file of two thousand bytes."
    texts = pa.DictionaryArray.from_arrays(
        pa.array([0] * n, pa.int32()), pa.array(["a b c d e\n" * 2_000_000])
    )
    table = pa.table(
        {"text": texts if how.get("use_dictionary", True) else texts.cast(pa.string())}
    )
    pq.write_table(
        table, path, compression="zstd", write_statistics=False, store_schema=False, **how
    )
    assert path.stat().st_size < 5000


@pytest.mark.parametrize("how", [dict(dictionary_pagesize_limit=1 << 30),
                                 dict(use_dictionary=False, column_encoding="DELTA_BYTE_ARRAY")])
@pytest.mark.parametrize(
    "n, says", [(20, "20 rows"),
                (60, "makes 1,0.* bytes or more out of [12],...\\. No text is so repetitive")])
def test_a_small_parquet_file_does_not_fill_the_memory(tmp_path, how, n, says):
    repeated(tmp_path / "a.parquet", n, **how)
    code = """
import resource, sys
from pathlib import Path
import pyarrow.compute, pyarrow.parquet
from calib_prune.calibration.readers import CalibPruneError, read_parquet_column
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
before = peak()
try: print(sum(1 for _ in read_parquet_column(Path(sys.argv[1]), "text")), "rows")
except CalibPruneError as e: print(e)
print(peak() - before)"""
    said, megabytes = run(tmp_path / "a.parquet", program=code).stdout.splitlines()
    assert re.search(says, said) and int(megabytes) < 600


def test_read_only_installation(tmp_path):
    """The compiled sweep writes nothing next to the package, and works in a fresh process with
    nowhere to write."""
    code = ("import torch; from calib_prune.pruning.sparsegpt import sparsegpt; "
            "print(sparsegpt(torch.eye(4), torch.eye(4), 0.75).sparsity)")
    out = run(program=code, PYTHONDONTWRITEBYTECODE="1", CALIB_PRUNE_CACHE="/dev/null/none",
              NUMBA_CACHE_DIR=str(tmp_path))
    assert out.stdout.strip() == "0.75" and not any(tmp_path.iterdir())
