"""llm-compressor's prune of the same model on the same tokens; runs in bench/.venv, where
calib_prune is not installed."""
import json
import sys
import time
from pathlib import Path

from bench.machine import peak, versions


def modifier(method: str, sparsity: float):  # "gptq-4-64": 4 bits, groups of 64
    "llm-compressor's modifier, with the settings of ours."
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
    if method.startswith("gptq"):
        _, bits, group = method.split("-")
        weights = dict(num_bits=int(bits), type="int", symmetric=True, strategy="group",
                       group_size=int(group), observer="minmax")
        scheme = dict(targets=["Linear"], weights=weights)
        return GPTQModifier(config_groups={"group_0": scheme}, ignore=["lm_head"], block_size=128,
                            dampening_frac=0.01, actorder=None)
    return {"sparsegpt": SparseGPTModifier, "wanda": WandaPruningModifier}[method](
        sparsity=sparsity, targets=["Linear"], ignore=["lm_head"])


def main(
    model: str, tokens: str, method: str, sparsity: float, batch: int, layers: int, out: str
) -> dict:
    "Prune and save the linears' weights; what it took."
    import numpy as np
    from datasets import Dataset
    from llmcompressor import oneshot
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype="float32", num_hidden_layers=layers)
    tokenizer = AutoTokenizer.from_pretrained(model)
    windows = np.load(tokens)
    dataset = Dataset.from_dict(
        {"input_ids": windows.tolist(), "attention_mask": np.ones_like(windows).tolist()}
    )
    start = time.perf_counter()
    oneshot(
        model=loaded,
        tokenizer=tokenizer,
        dataset=dataset,
        pipeline="sequential",
        batch_size=batch,
        recipe=modifier(method, sparsity),
        num_calibration_samples=len(windows),
        max_seq_length=windows.shape[1],
        shuffle_calibration_samples=False,
    )
    seconds = time.perf_counter() - start
    weights = {
        k: v.contiguous() for k, v in loaded.state_dict().items() if ".layers." in k and v.ndim == 2
    }
    save_file(weights, Path(out))
    return dict(
        seconds=seconds, peak_bytes=peak(), version=versions("llmcompressor")["llmcompressor"]
    )


if __name__ == "__main__":
    _, model, tokens, method, sparsity, batch, layers, out = sys.argv
    print(json.dumps(main(model, tokens, method, float(sparsity), int(batch), int(layers), out)))
