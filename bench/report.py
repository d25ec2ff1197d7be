"""From bench/results/*.json to the tables and charts of nbs/paper/bench.ipynb."""
import json
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from calib_prune.statistics.plots import annotate, headline

# By bench.run, and by bench.writing:
FILES = ("bfloat16", "busy", "errors", "growth", "kernel", "limit", "memory", "prune", "score",
         "second", "start")
# ability is no time: it may be of a later state of the code
WRITING, ABILITY = "writing", "ability"
COLUMNS = ("ours", "plain", "llm-compressor", "lm-eval", "generate", "generate, one by one",
           "limit")
COLOURS = dict(zip(COLUMNS, sns.color_palette("colorblind", len(COLUMNS)), strict=True))
NAMES = {"sparsegpt": "SparseGPT", "wanda": "Wanda"}
# errors within 1% count as equal (ours): the peer prunes one weight more in each block
EQUAL = 1.01


def load_results(folder: str | Path) -> dict[str, pd.DataFrame]:
    "The rows of every measurement by its name."
    def rows(name: str) -> list[dict]:
        file = Path(folder) / f"{name}.json"
        # measured where the processor has such products
        if name == "bfloat16" and not file.is_file(): return []
        return json.loads(file.read_text())["rows"]
    return {o: pd.DataFrame(rows(o)) for o in (*FILES, WRITING, ABILITY)}


def describe_machine(folder: str | Path, name: str = "prune") -> str:
    "One sentence about the machine of a file of measurements; most files have that of `prune`."
    o = json.loads((Path(folder) / f"{name}.json").read_text())["machine"]
    return (
        f"{o['cpu']}, {o['cores']} cores ({', '.join(o['vectors'])}), {o['memory_gib']} GiB,"
        f" {o['threads']} threads per measurement; Python {o['python']}, torch {o['torch']},"
        f" transformers {o['transformers']}."
    )


def by_who(frame: pd.DataFrame, value: str) -> dict[str, float]:
    "Median over rounds of a value, by implementation."
    return frame.groupby("who")[value].median().to_dict()


def times_faster(frame: pd.DataFrame, peer: str) -> float:
    "Median over rounds of peer's seconds / our seconds in the same round."
    wide = frame.pivot(index="turn", columns="who", values="seconds")
    return float((wide[peer] / wide["ours"]).median())


def best_rate(results: dict[str, pd.DataFrame]) -> float:
    "The best rate of products seen before or after the measurements."
    return results["limit"]["rate"].max()


def limit_seconds(results: dict[str, pd.DataFrame], method: str) -> float:
    "Seconds that a prune's unavoidable work takes at the best rate."
    return results["limit"]["flops"].iloc[0][method] / best_rate(results)


def busy_ratio(results: dict[str, pd.DataFrame], what: str) -> float:
    "Median over rounds of the time with busy processes / the quiet time in the same round."
    wide = results["busy"][lambda o: o["what"] == what].pivot(
        index="turn", columns="busy", values="seconds"
    )
    return float((wide.drop(columns=0).iloc[:, 0] / wide[0]).median())


def cells_ratio(results: dict[str, pd.DataFrame]) -> float:
    "Median over rounds of the time of cells in turn / side by side."
    wide = (
        results["busy"]
        .query("what == 'cells'")
        .pivot(index="turn", columns="how", values="seconds")
    )
    return float((wide["in turn"] / wide["side by side"]).median())


def kernel_rows(results: dict[str, pd.DataFrame]) -> list[dict]:
    return [{
        "measure": f"SparseGPT, {o['what'].replace('layer', 'one decoder layer')}", "unit": "s", **{
            who: float(np.median(s)) for who, s in o["seconds"].items()}}
            for _, o in results["kernel"].iterrows()]


def prune_rows(results: dict[str, pd.DataFrame]) -> list[dict]:
    rows = []
    for method, name in NAMES.items():
        mine, errors = (o[o["method"] == method] for o in (results["prune"], results["errors"]))
        limit = dict(limit=limit_seconds(results, method))
        rows += [{
            "measure": f"{name}, whole prune", "unit": "s", **by_who(mine, "seconds"), **limit}, {
                "measure": f"{name}, whole process", "unit": "s",
                **by_who(mine, "process_seconds")}, {
                    "measure": f"{name}, peak memory of the process", "unit": "MB", **{
                        k: v / 1e6 for k, v in by_who(mine, "peak_bytes").items()}}, {
                        "measure": f"{name}, mean reconstruction error", "unit": "%", **{
                            k: 100 * v for k, v in by_who(errors, "mean").items()}}, {
                            "measure": f"{name}, weights pruned", "unit": "%", **{
                                k: 100 * v for k, v in by_who(errors, "sparsity").items()}}]
    return rows


def ability_rows(results: dict[str, pd.DataFrame]) -> list[dict]:
    "What each implementation's models keep."
    rows = []
    for (method, part), mine in results[ABILITY].groupby(["method", "part"], sort=False):
        name = (
            f"{NAMES[method]}, kept {'in total' if part == 'total' else f'of {part}'}, answer bits"
        )
        rows.append(
            {"measure": name, "unit": "%", **{k: 100 * v for k, v in by_who(mine, "value").items()}}
        )
    return rows


def score_rows(results: dict[str, pd.DataFrame]) -> list[dict]:
    mine = results["score"].query("who != 'agreement'")
    what = f"Scoring, {int(mine['items'].iloc[0])} items"
    limit = dict(limit=mine["flops"].dropna().iloc[0] / best_rate(results))
    return [{"measure": what, "unit": "s", **by_who(mine, "seconds"), **limit},
            {"measure": f"{what}, whole process", "unit": "s", **by_who(mine, "process_seconds")},
            {"measure": f"{what}, peak memory of the process", "unit": "MB",
             **{k: v / 1e6 for k, v in by_who(mine, "peak_bytes").items()}}]


def second_rows(results: dict[str, pd.DataFrame]) -> list[dict]:
    "The second model's first layers."
    mine, rows = results["second"], []
    at_rate = mine.query("what == 'limit'").iloc[0]
    for what, name in dict(prune="SparseGPT", score="scoring").items():
        own = mine[mine["what"] == what]
        flops = at_rate["flops"]["sparsegpt"] if what == "prune" else own["flops"].dropna().iloc[0]
        rows.append({
            "measure": f"second model, first layers: {name}", "unit": "s",
            **by_who(own, "seconds"), "limit": flops / max(at_rate["rate"], best_rate(results))})
    return rows


def busy_rows(results: dict[str, pd.DataFrame]) -> list[dict]:
    "Ours, quiet and not."
    rows, mine = [], results["busy"]
    for what, name in dict(prune="SparseGPT, first layers", score="scoring").items():
        for busy, o in mine[mine["what"] == what].groupby("busy"):
            beside = f"{busy:.0f} busy processes beside" if busy else "nothing beside"
            rows.append(
                {"measure": f"{name}, {beside}", "unit": "s", "ours": o["seconds"].median()}
            )
    for how, o in mine.query("what == 'cells'").groupby("how", sort=False):
        name = f"{o['cells'].iloc[0]:.0f} cells {how}, first layers"
        rows.append({"measure": name, "unit": "s", "ours": o["seconds"].median()})
    return rows


def bfloat16_table(results: dict[str, pd.DataFrame]) -> pd.DataFrame:
    "What products of bfloat16 gain, and what they do to the scores of the dense model."
    mine = results["bfloat16"]
    if mine.empty: return pd.DataFrame(columns=["measure", "float32", "bfloat16"])
    rows = []
    for what, name in dict(prune="SparseGPT, first layers (s)", score="scoring (s)").items():
        seconds = mine[mine["what"] == what].groupby("dtype")["seconds"].median()
        rows.append((name, f"{seconds['float32']:.3g}", f"{seconds['bfloat16']:.3g}"))
    found = mine.query("what == 'agreement'").iloc[0]
    rows.append(
        (f"accuracies, mean of {found['accuracies']:.0f}", *(f"{o:.3f}" for o in found["accuracy"]))
    )
    rows.append((f"of them unlike, of {found['accuracies']:.0f}", "",
                 f"{found['accuracies_that_differ']:.0f}"))
    rows.append(("bits of the other items, sum", *(f"{o:,.1f}" for o in found["bits"])))
    rows.append(("largest relative difference of an item's bits (%)", "",
                 f"{100 * found['largest_relative_gap']:.2g}"))
    return pd.DataFrame(rows, columns=["measure", "float32", "bfloat16"])


def start_rows(results: dict[str, pd.DataFrame]) -> list[dict]:
    "What a cell costs before and after its work."
    seconds = results["start"]["seconds"].iloc[0]
    return [{
        "measure": f"a cell's start, imports, load and end, {how}", "unit": "s",
        "ours": seconds[how]["total"]} for how in ("cold", "warm")]


def token_rates(results: dict[str, pd.DataFrame]) -> pd.DataFrame:  # turn × who, tokens a second
    "How fast text is written, by round."
    mine = results[WRITING]
    return mine.assign(rate=mine["tokens"] / mine["seconds"]).pivot(
        index="turn", columns="who", values="rate"
    )


def writing_rows(results: dict[str, pd.DataFrame]) -> list[dict]:
    names = {"ours": "ours", "one at a time": "generate, one by one", "batches": "generate"}
    return [{
        "measure": "writing text", "unit": "tokens/s",
        **token_rates(results).median().rename(names)}]


def memory_rows(results: dict[str, pd.DataFrame]) -> list[dict]:
    return [{
        "measure": f"SparseGPT on {o['what']} tokens, memory above the interpreter's", "unit": "MB",
        "ours": o["peak_bytes"] / 1e6, "limit": o["needed_bytes"] / 1e6}
            for _, o in results["memory"].iterrows()]


def measure_table(results: dict[str, pd.DataFrame]) -> pd.DataFrame:
    "Medians of everything measured, one column per implementation."
    parts = (kernel_rows, prune_rows, ability_rows, score_rows, second_rows, busy_rows, start_rows,
             writing_rows, memory_rows)
    rows = [row for part in parts for row in part(results)]
    return pd.DataFrame(rows).reindex(columns=["measure", "unit", *COLUMNS])


def target_table(results: dict[str, pd.DataFrame]) -> pd.DataFrame:
    "Every target with what was measured, reached or not."
    prune, errors, score = results["prune"], results["errors"].set_index([
        "method", "who"])["mean"], results["score"]
    scored = score_rows(results)[0]
    sparse, agreement = (
        prune.query("method == 'sparsegpt'"),
        score.query("who == 'agreement'").iloc[0],
    )
    faster = {o["what"]: float(np.median(np.divide(o["seconds"]["plain"], o["seconds"]["ours"])))
              for _, o in results["kernel"].iterrows()}
    rows = [(f"solve {k.replace('layer', 'one decoder layer')}: plain / ours", ">=",
             6.0 if k == "layer" else 4.0, v) for k, v in faster.items()]
    exact = results["kernel"].query("what == 'layer'")["ours_from_exact"].iloc[0]
    rows += [
        ("one decoder layer: share of masks unlike the algorithm in float64", "<=", 0.0,
         exact["masks"]),
        ("one decoder layer: largest relative difference of weights from it", "<=", 1e-4,
         exact["weights"]),
        ("whole prune, SparseGPT: llm-compressor / ours", ">=", 2.7,
         times_faster(sparse, "llm-compressor")),
        ("mean reconstruction error, SparseGPT: ours / llm-compressor", "<=", EQUAL,
         errors["sparsegpt", "ours"] / errors["sparsegpt", "llm-compressor"]),
        ("whole prune, SparseGPT: ours / limit", "<=", 1.35,
         by_who(sparse, "seconds")["ours"] / limit_seconds(results, "sparsegpt")),
        ("scoring: lm-eval / ours", ">=", 3.5,
         times_faster(score.query("who != 'agreement'"), "lm-eval")),
        ("scoring: ours / limit", "<=", 1.5, scored["ours"] / scored["limit"]),
        ("scoring: accuracies that differ", "<=", 0.0, float(agreement["accuracies_that_differ"])),
        ("one busy process per core: a prune's time / its quiet time", "<=", 2.3,
         busy_ratio(results, "prune")),
        ("one busy process per core: a scoring's time / its quiet time", "<=", 2.3,
         busy_ratio(results, "score")),
        ("cells: one after the other / side by side on one core each", ">=", 1.0,
         cells_ratio(results)),
        ("a cell's start, imports, load and end, from a warm process, seconds", "<=", 4.0,
         start_rows(results)[1]["ours"])]
    rates, mine = token_rates(results), results[WRITING].query("who == 'ours'")
    size = f"{int(mine['texts'].iloc[0])} texts of up to 512 tokens"
    rows += [("writing text, tokens/s: ours / one text at a time", ">=", 3.0,
              (rates["ours"] / rates["one at a time"]).median()),
             (f"writing {size}, minutes", "<=", 15.0, mine["seconds"].median() / 60)]
    rows += [
        (f"peak memory, {o['what']} tokens: ours / needed", "<=", 1.15, o["ratio"])
        for _, o in results["memory"].iterrows()
    ]
    table = pd.DataFrame(rows, columns=["target", "sense", "wanted", "measured"])
    return table.assign(reached=np.where(table["sense"] == ">=", table["measured"] >=
                                         table["wanted"], table["measured"] <= table["wanted"]))


def quantising_table(folder: str | Path) -> pd.DataFrame:
    "GPTQ of the whole model compared with SparseGPT: medians of the rounds and of their ratios."
    file = json.loads((Path(folder) / "quantising.json").read_text())
    rows, plan = pd.DataFrame(file["rows"]), file["plan"]
    names = {"SparseGPT": "SparseGPT, 50 %", "GPTQ": f"GPTQ, {plan['bits']} bits",
             "GPTQ fitted": f"GPTQ, {plan['bits']} bits, fitted scales",
             "llm-compressor": f"llm-compressor's GPTQ, {plan['bits']} bits"}
    rounds, errors = rows[rows["turn"] > 0], rows[rows["turn"] == 0].set_index("who")["mean"]
    seconds = rounds.pivot(index="turn", columns="who", values="seconds")
    return pd.DataFrame([{
        "run": shown, "seconds": seconds[who].median(),
        "ratio to SparseGPT": (ratio := seconds[who] / seconds["SparseGPT"]).median(),
        "lowest": ratio.min(), "highest": ratio.max(),
        "mean error %": 100 * errors[who],
        "peak MB": rounds[rounds["who"] == who]["peak_bytes"].median() / 1e6}
        for who, shown in names.items()])


RECOVERIES = {"float32": "float32", "bfloat16": "mixed precision (bfloat16)",
              "bfloat16, weights as stored": "mixed precision without dither",
              "recomputed": "float32, gradient checkpointing",
              "bfloat16, rate 0.0003": "mixed precision, rate 0.0003",
              "bfloat16, rate 0.001": "mixed precision, rate 0.001",
              "llm-compressor": "llm-compressor's mask, next token"}


def recovering_table(folder: str | Path) -> pd.DataFrame:
    "Training of one pruned model in several ways, at equal tokens; retention once it is scored."
    rows = json.loads((Path(folder) / "recovering.json").read_text())["rows"]
    trained = {row["who"]: row for row in rows if row["of"] == "training"}
    scores = {row["who"]: row for row in rows if row["of"] == "scores"}
    lines = []
    for who, row in trained.items():
        whole, distils = trained["float32"], "trained" in row  # the peer predicts the next token
        line = {"run": RECOVERIES.get(who, who), "processor minutes": row["processor_seconds"] / 60,
                "ratio to float32": row["processor_seconds"] / whole["processor_seconds"],
                "loss": np.mean(row["losses"][-8:]) if distils else np.nan,
                "peak GiB": row["peak_bytes"] / 2**30}
        if who in scores:
            line |= {"total retention %": 100 * scores[who]["total"],
                     "KL, bits per token": scores[who]["divergence"]}
        lines.append(line)
    return pd.DataFrame(lines)


def splitting_table(folder: str | Path) -> pd.DataFrame:
    "Bits of the dense model and retention of pruned ones, with both tokenizers of SmolLM2."
    rows = json.loads((Path(folder) / "splitting.json").read_text())["rows"]
    bits = {(row["calibration"], row["digits"]): pd.Series(row["bits"]) for row in rows}
    dimension = pd.Series(rows[0]["dimensions"])
    columns = {"the studies' tokenizer": False, "the makers' tokenizer": True}
    changed = bits["", False].index[(bits["", False] - bits["", True]).abs() >= 0.0005]
    lines = [{"what": f"dense, {task}, bits per byte"} | {
        name: f"{bits['', digits][task]:.3f}" for name, digits in columns.items()}
        for task in changed]
    def total(calibration: str, digits: bool) -> float:
        kept = bits["", digits] / bits[calibration, digits]
        return 100 * kept.groupby(dimension).mean().mean()
    lines += [{"what": f"{calibration}, total retention, %"} | {
        name: f"{total(calibration, digits):.2f}" for name, digits in columns.items()}
        for calibration in dict.fromkeys(name for name, _ in bits) if calibration]
    return pd.DataFrame(lines)


def growth_table(results: dict[str, pd.DataFrame]) -> pd.DataFrame:  # axis, value, seconds, power
    "Our seconds against tokens, layers and width; `power`: of the growth since the value before."
    seconds = [
        o if np.isscalar(o) else float(np.median(o["ours"])) for o in results["growth"]["seconds"]
    ]
    frame = results["growth"].assign(seconds=seconds)
    parts = [o.assign(power=np.log(o["seconds"]).diff() / np.log(o["value"]).diff())
             for _, o in frame.sort_values("value").groupby("axis", sort=False)]
    return pd.concat(parts)[["axis", "value", "seconds", "power"]]


def shown_measures(table: pd.DataFrame) -> pd.DataFrame:
    "For people: three significant digits, nothing where nothing was measured."
    text = table.astype({o: object for o in COLUMNS})
    for o in COLUMNS:
        text[o] = ["" if pd.isna(v) else f"{v:,.0f}" if v >= 1000 else f"{v:.3g}" for v in table[o]]
    return text


def shown_targets(table: pd.DataFrame) -> pd.DataFrame:
    "For people: the wanted number with its sense, yes or no."
    wanted = [
        f"{'at least' if s == '>=' else 'at most'} {w:g}"
        for s, w in zip(table["sense"], table["wanted"])
    ]
    return pd.DataFrame(
        dict(target=table["target"],
             wanted=wanted,
             measured=[f"{v:.3g}" for v in table["measured"]],
             reached=np.where(table["reached"], "yes", "no")))


def prune_message(rounds: pd.DataFrame) -> str:  # of SparseGPT: who, seconds
    """How much faster our prune is than llm-compressor's, if every round of ours is faster than
    every round of theirs."""
    mine, theirs = (rounds.query("who == @who")["seconds"] for who in ("ours", "llm-compressor"))
    if mine.max() >= theirs.min(): return "SparseGPT and llm-compressor: the rounds overlap"
    faster = times_faster(rounds, "llm-compressor")
    return f"SparseGPT is faster than llm-compressor in every round (median {faster:.1f} times)"


def prune_chart(results: dict[str, pd.DataFrame], machine: str) -> Figure:
    "Seconds of every round of a whole prune, the median as a bar, the limit as a line."
    figure, axes = plt.subplots(1, 2, figsize=(7.2, 2.6), layout="constrained")
    for ax, (method, name) in zip(axes, NAMES.items(), strict=True):
        mine = results["prune"].query("method == @method")
        order = [o for o in COLUMNS if o in set(mine["who"])]
        sns.barplot(
            mine,
            x="seconds",
            y="who",
            hue="who",
            order=order,
            palette=COLOURS,
            estimator="median",
            errorbar=None,
            ax=ax,
        )
        sns.stripplot(
            mine, x="seconds", y="who", order=order, color="black", size=3, jitter=False, ax=ax
        )
        limit = limit_seconds(results, method)
        ax.axvline(limit, color="black", linestyle="--", linewidth=1.2)
        ax.annotate(f"limit {limit:.3g} s", (limit, 0.5),
                    xytext=(3, 0),
                    textcoords="offset points",
                    fontsize=7,
                    va="center")
        ax.set(title=name, xlabel="whole prune (s)", ylabel="")
    headline(figure, prune_message(results["prune"].query("method == 'sparsegpt'")))
    return annotate(
        figure, f"Bars: medians; dots: single rounds (n = 1 to 3), taken in turn. {machine}"
    )


def growth_message(table: pd.DataFrame) -> str:  # from `growth_table`
    "The powers of the growth up to the last value, as measured once."
    last = table.groupby("axis", sort=False)["power"].last()
    powers = ", ".join(f"{axis}^{last[axis]:.2f}" for axis in ("tokens", "layers", "width"))
    return f"Time grows as {powers} (one measurement each)"


def growth_chart(results: dict[str, pd.DataFrame], machine: str) -> Figure:
    """Our seconds against tokens and layers, and against width on logarithmic axes with a cubic
    beside."""
    labels = dict(tokens="calibration tokens (thousands)", layers="layers", width="hidden size")
    figure, axes = plt.subplots(1, 3, figsize=(8.4, 2.6), layout="constrained")
    table = growth_table(results)
    for ax, (axis, label) in zip(axes, labels.items(), strict=True):
        mine = table.query("axis == @axis")
        x, seconds = (
            mine["value"].to_numpy() / (1000 if axis == "tokens" else 1),
            mine["seconds"].to_numpy(),
        )
        ax.plot(x, seconds, marker="o", color=COLOURS["ours"], label="measured", zorder=3)
        if axis == "width":wide_panel(ax, x, seconds)
        else: straight_panel(ax, x, seconds)
        ax.set(xlabel=label, ylabel="solve one layer (s)" if axis == "width" else "prune (s)")
        ax.legend(loc="lower right", fontsize=8)
    headline(figure, growth_message(table))
    return annotate(figure, f"One measurement per point. {machine}")


def straight_panel(ax: Axes, x: np.ndarray, seconds: np.ndarray) -> None:
    "A straight line beside the measurements."
    a, b = np.polyfit(x, seconds, 1)
    ax.plot(
        x, a * x + b, linestyle="--", color="0.35", linewidth=2.5, alpha=0.6, label="straight line"
    )
    ax.set(xlim=(0, 1.05 * x[-1]), ylim=(0, 1.1 * seconds.max()))


def wide_panel(ax: Axes, x: np.ndarray, seconds: np.ndarray) -> None:
    "A cubic beside the measurements, on logarithmic axes."
    ax.plot(x, seconds[-1] * (x / x[-1])**3, linestyle="--", color="0.35", label="cubic")
    ax.set(xscale="log", yscale="log")
    ax.set_xticks(x, [f"{o:g}" for o in x])
    ax.minorticks_off()
