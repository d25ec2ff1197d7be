#!/bin/bash
# setup_peers.sh PYTHON: the peer that we measure ourselves against, in an environment of its own, bench/.venv.
# llm-compressor pins its own transformers, so it can't live beside ours; pip picks its torch.
set -euo pipefail
cd "$(dirname "$0")"
[ -x .venv/bin/python ] || "${1:-python3}" -m venv .venv
.venv/bin/python -m pip install --quiet --upgrade llmcompressor
.venv/bin/python -c 'from importlib.metadata import version as v; print("llm-compressor", v("llmcompressor"), "torch", v("torch"))'
