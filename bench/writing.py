"""Speed of writing text: ours beside transformers' `generate`, one by one and in batches. `python
-m bench.writing all`."""
import time
from dataclasses import dataclass
from typing import Annotated, Iterator

import typer

from bench.machine import peak
from bench.run import Step, code_of, put, run_missing

MEASURED, STAGES = code_of("kernels", "model", "generation", bench=("machine", "writing")), (
    "self-cal",
)
# the slow peer writes fewer: it is compared by tokens a second
TEXTS = {"ours": 64, "one at a time": 4, "batches": 32}
app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__
)


@dataclass(frozen=True)
class Plan:
    "How much is measured."
    length: int = 512  # tokens of a text, at most
    batch: int = 32
    rounds: int = 2
    model: str = "smollm2-135m"


def ours(model, tokenizer, texts: int, length: int, batch: int, seed: int) -> int:
    "Write texts as the protocols do; returns how many tokens were written."
    from calib_prune.generation.sampling import Sampling
    from calib_prune.generation.writing import Writer
    writer = Writer(model, tokenizer, Sampling(top_k=50, top_p=0.95), length, seed, batch)
    writer.begin("bench")
    writer.write([writer.job(f"text {i}") for i in range(texts)])
    return writer.tokens


def theirs(model, tokenizer, texts: int, length: int, batch: int, seed: int) -> int:
    "The same texts by transformers' own loop, up to and without their end."
    import torch

    from calib_prune.generation.writing import end_tokens, start_token
    torch.manual_seed(seed)
    ends, written = end_tokens(model, tokenizer), 0
    prompt = torch.full((1, 1), start_token(tokenizer))
    for k in range(0, texts, batch):
        rows = prompt.expand(min(batch, texts - k), 1)
        made = model.generate(
            rows,
            attention_mask=torch.ones_like(rows),
            do_sample=True,
            temperature=1.0,
            top_k=50,
            top_p=0.95,
            max_new_tokens=length,
            eos_token_id=list(ends),
            pad_token_id=min(ends),
        )[:, 1:].tolist()
        written += sum(next((i for i, t in enumerate(row) if t in ends), len(row)) for row in made)
    return written


@app.command()
def one(
    who: str, turn: int, length: int = 512, batch: int = 32, model: str = "smollm2-135m"
) -> None:
    "One implementation, once."
    from calib_prune.model.loading import load_model
    loaded, tokenizer = load_model(model)
    write = ours if who == "ours" else theirs
    write(loaded, tokenizer, 2, 8, 2, 0)  # first-use costs
    start = time.perf_counter()
    tokens = write(
        loaded, tokenizer, TEXTS[who], length, 1 if who == "one at a time" else batch, turn
    )
    put(
        dict(
            texts=TEXTS[who], tokens=tokens, seconds=time.perf_counter() - start, peak_bytes=peak()
        )
    )


@app.command()
def answers(
    items: Annotated[int, typer.Option(help="per task")] = 6,
    batch: int = 32,
    model: str = "smollm2-135m",
) -> None:
    """Answers that a model writes to HumanEval, MBPP and GSM8K: ours, then by lm-eval and
    transformers' `generate`."""
    from calib_prune.evaluation.scoring import evaluate, scores
    from calib_prune.model.loading import load_model
    loaded, tokenizer = load_model(model)
    rows = []
    for who in "ours", "lm-eval":
        evaluate(loaded, tokenizer, "sciq", limit=2)  # first-use costs
        start = time.perf_counter()
        found = scores(
            evaluate(
                loaded, tokenizer, "generate", limit=items, batch_size=batch, stock=who == "lm-eval"
            )
        )
        seconds = time.perf_counter() - start
        rows.append(
            dict(who=who,
                 answers=int(found["n"].sum()),
                 seconds=seconds,
                 right=[*(found["score"] * found["n"]).round()]))
    put(rows)


def steps(plan: Plan) -> Iterator[Step]:
    "Every measurement, rounds interleaved."
    for turn in range(1, plan.rounds + 1):
        for who in TEXTS:
            options = [
                "--length",
                str(plan.length), "--batch",
                str(plan.batch), "--model", plan.model]
            yield Step(
                "writing",
                dict(who=who, turn=turn),
                ["-m", "bench.writing", "one", who, str(turn), *options],
            )


@app.command(name="all")
def run_all(
    threads: Annotated[int, typer.Option(help="threads of each measurement")] = 2,
    fresh: Annotated[bool, typer.Option(help="forget the results that are there")] = False,
) -> None:
    "Run what is missing."
    run_missing("writing", Plan(), steps(Plan()), MEASURED, STAGES, threads, fresh)


if __name__ == "__main__": app()
