import os

# Tests never reach a hub: what is not local is an error at once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

# Before anything imports Triton: without a GPU its kernels run in the interpreter.
import torch  # noqa: E402

if not torch.cuda.is_available(): os.environ.setdefault("TRITON_INTERPRET", "1")
