"""Training of a pruned model with llm-compressor's constant mask and the trainer of transformers;
runs in bench/.venv, where calib_prune is not installed. Unlike ours, it learns the next token, from
one model, trains embeddings too, and its first step has rate 0."""
import json
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from bench.machine import peak, versions


def main(model: str, tokens: str, steps: int, batch: int, rate: float, out: str) -> dict:
    "Train on the next token with the zeros held, and save all weights, since all are trained."
    import numpy as np
    import torch
    from datasets import Dataset
    from llmcompressor.core import EventType, active_session, callbacks
    from llmcompressor.modifiers.pruning import ConstantPruningModifier
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype="float32")
    given = np.load(tokens)
    windows = given[np.arange(steps * batch) % len(given)]
    rows = Dataset.from_dict(dict(input_ids=windows.tolist(), labels=windows.tolist()))
    session = active_session()
    session.initialize(model=loaded, recipe=ConstantPruningModifier(targets=["Linear"], start=0))
    losses = []

    class Hold(TrainerCallback):
        "The events of the session, in its order."
        def on_step_begin(self, *_, **__): callbacks.event(EventType.BATCH_START)

        def on_pre_optimizer_step(self, *_, **__):
            callbacks.event(EventType.LOSS_CALCULATED, loss=losses[-1] if losses else 0.0)
            callbacks.event(EventType.OPTIM_PRE_STEP)

        def on_optimizer_step(self, *_, **__): callbacks.event(EventType.OPTIM_POST_STEP)

        def on_step_end(self, *_, **__): callbacks.event(EventType.BATCH_END)

        def on_log(self, args, state, control, logs=None, **_):
            if "loss" in (logs or {}): losses.append(logs["loss"])

    class InOrder(Trainer):
        "The windows in the order of the file."
        def _get_train_sampler(self, *_): return torch.utils.data.SequentialSampler(rows)

    with TemporaryDirectory() as place:
        asked = TrainingArguments(
            place, max_steps=steps, per_device_train_batch_size=1,
            gradient_accumulation_steps=batch, learning_rate=rate, lr_scheduler_type="cosine",
            warmup_steps=2, weight_decay=0.0, max_grad_norm=1.0, use_cpu=True, save_strategy="no",
            logging_steps=1, report_to=[], disable_tqdm=True)
        start = time.process_time()
        InOrder(loaded, asked, train_dataset=rows, callbacks=[Hold()]).train()
        seconds = time.process_time() - start
    weights = {k: p.data.to(torch.bfloat16).contiguous() for k, p in loaded.named_parameters()}
    save_file(weights, Path(out))
    return dict(processor_seconds=seconds, peak_bytes=peak(), losses=losses,
                version=versions("llmcompressor")["llmcompressor"])


if __name__ == "__main__":
    _, model, tokens, steps, batch, rate, out = sys.argv
    print(json.dumps(main(model, tokens, int(steps), int(batch), float(rate), out)))
