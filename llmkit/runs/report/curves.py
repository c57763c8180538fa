"""The curves of a run's report: every number that was logged, over steps, tokens and time."""

import math

import numpy as np

from llmkit.runs.metrics import METRICS
from llmkit.runs.run import Run

MAX_BUCKETS = 1000  # of a long curve; each keeps its lowest and its highest point

# What is logged beside the curves, and says nothing over time.
LEFT_OUT = {
    "step",
    "time",
    "epoch",
    "tokens",
    "trained_tokens",
    "num_tokens",
    "eval_num_tokens",
    "total_flos",
    "train_loss",
}
LEFT_OUT |= {"hellaswag/questions", "hellaswag/acc_stderr", "hellaswag/acc_norm_stderr"}
TIMINGS = ("_runtime", "_per_second", "_preparation_time")  # of Trainer's own, with train_ or eval_ before them

# How charts are drawn, by title; their lines are those of `METRICS`.
#   wide: across the page; noisy: with a moving average; log: follows the switch of the scale; percent: as such;
#   group: of several runs each line gets a chart of its own
HOW = {
    "Loss": ("wide", "noisy", "log"),
    "Validation bits per byte": ("log",),
    "Validation perplexity": ("log",),
    "HellaSwag": ("percent",),
    "Gradient norm": ("noisy", "log"),
    "Tokens per second": ("noisy",),
    "Model FLOPs utilization (MFU)": ("noisy", "percent"),
    "Token accuracy": ("percent",),
    "Preference accuracy": ("percent",),
    "Answers that end": ("percent",),
    "Utilization": ("percent",),
}
# Families of keys, one line a source of the data, or a group of parameters.
GROUPS = [
    ("tokens/", "Tokens read of each source", ("group",)),
    ("epochs/", "Epochs of each source", ("group",)),
    ("update_ratio/", "Update-to-weight ratio", ("group", "log")),
    ("grad_norm/", "Gradient norm by group", ("group", "log")),
    ("param_norm/", "Parameter norm", ("group", "log")),
]


def charts(keys: set[str]) -> list[dict]:
    """The charts for the curves that some run has; a number that is not known here gets one of its own."""
    drawn: dict[str, dict[str, str]] = {}
    for metric in METRICS.values():
        if metric.chart and metric.key in keys:
            drawn.setdefault(metric.chart, {})[metric.key] = metric.curve or metric.name
    specs = [(title, lines, HOW.get(title, ())) for title, lines in drawn.items()]
    for prefix, title, how in GROUPS:
        specs.append((title, {key: key.removeprefix(prefix) for key in sorted(keys) if key.startswith(prefix)}, how))
    known = {key for _, lines, _ in specs for key in lines}
    specs += [(key, {key: key}, ()) for key in sorted(keys - known)]
    return [{"title": title, "lines": lines, **dict.fromkeys(how, True)} for title, lines, how in specs if lines]


def curves(run: Run) -> dict:
    """What is drawn of a run.

    Returns:
        `axes`: columns `step`, `tokens` and `seconds`, each shared by the curves that were logged together;
        `curves`: for each key its `axis` (an index), its `values`, None where not finite, and their moving average
        `smooth` where a noisy curve has enough of them; `resumes`: where the run was resumed, as an axis; `broken`:
        [key, step, value] of what was not finite.
    """
    steps = np.array([record["step"] for record in run.log])
    columns = {"step": steps, "tokens": tokens(run), "seconds": np.array(run.seconds())}
    noisy = {key for key, metric in METRICS.items() if "noisy" in HOW.get(metric.chart, ())} - {"eval_loss"}
    axes: dict[tuple, dict] = {}
    found, broken = {}, []
    for key, indices in logged(run).items():
        at = np.array(indices)
        values = np.array([run.log[index][key] for index in indices], dtype=float)
        broken += [[key, int(steps[at[i]]), str(values[i])] for i in np.flatnonzero(~np.isfinite(values))]
        kept = thin(values)
        shared = tuple(at[kept])
        if shared not in axes:
            axes[shared] = {name: _short(column[at[kept]]) for name, column in columns.items()}
        found[key] = {"axis": list(axes).index(shared), "values": _short(values[kept])}
        if key in noisy and len(values) >= 50:
            found[key]["smooth"] = _short(moving_average(values, len(values) // 50)[kept])
    begins = [index for index, record in enumerate(run.log) if "run" in record]
    resumes = {name: _short(column[begins[1:]]) for name, column in columns.items()}
    return {"axes": list(axes.values()), "curves": found, "resumes": resumes, "broken": broken}


def logged(run: Run) -> dict[str, list[int]]:
    """Every number that was logged over time, and the records of the log that have it."""
    found: dict[str, list[int]] = {}
    for index, record in enumerate(run.log):
        for key, value in record.items():
            if type(value) in (int, float):
                found.setdefault(key, []).append(index)
    left_out = {key for key in found if key.startswith(("train_", "eval_")) and key.endswith(TIMINGS)} | LEFT_OUT
    # The rate of Muon's part, where it is the other part's as well.
    rates = [(run.log[i]["lr/muon"], run.log[i].get("learning_rate", 0.0)) for i in found.get("lr/muon", [])]
    if all(math.isclose(muon, other, rel_tol=1e-6) for muon, other in rates):
        left_out.add("lr/muon")
    return {key: indices for key, indices in found.items() if key not in left_out}


def tokens(run: Run) -> np.ndarray:
    """Tokens trained at each record of the log: those logged with the loss, and what lies between by its step.

    Those of a fine-tune are the ones that it learned from (`trained_tokens`), not all that it read.
    """
    steps, counts = [0], [0]
    for record in run.training:
        count = record.get("tokens", record.get("trained_tokens"))
        if count is not None and record["step"] > steps[-1]:
            steps.append(record["step"])
            counts.append(count)
    last = run.log[-1]["step"]
    if len(steps) > 1 and last > steps[-1]:  # went on after the last logged loss, at the same pace
        pace = (counts[-1] - counts[-2]) / (steps[-1] - steps[-2])
        counts.append(counts[-1] + pace * (last - steps[-1]))
        steps.append(last)
    return np.rint(np.interp([record["step"] for record in run.log], steps, counts)).astype(np.int64)


def thin(values: np.ndarray) -> np.ndarray:
    """Indices of some thousand points of a long curve, its ends and its extremes among them, and what is not finite.

    Each of MAX_BUCKETS runs of points keeps its lowest and its highest, so a spike of a single step stays.
    """
    if len(values) <= 2 * MAX_BUCKETS:
        return np.arange(len(values))
    kept = {0, len(values) - 1, *np.flatnonzero(~np.isfinite(values))[:MAX_BUCKETS].tolist()}
    for bucket in np.array_split(np.arange(len(values)), MAX_BUCKETS):
        finite = bucket[np.isfinite(values[bucket])]
        if len(finite):
            kept |= {int(finite[values[finite].argmin()]), int(finite[values[finite].argmax()])}
    return np.array(sorted(kept))


def moving_average(values: np.ndarray, reach: int) -> np.ndarray:
    """The mean of the finite values from `reach` before to `reach` after each; at the ends of a quarter as many."""
    n = len(values)
    finite = np.isfinite(values)
    sums = np.concatenate([[0.0], np.where(finite, values, 0.0).cumsum()])
    counts = np.concatenate([[0], finite.cumsum()])
    index = np.arange(n)
    around = np.clip(np.minimum(index, n - 1 - index), reach // 4, reach)
    low, high = np.maximum(index - around, 0), np.minimum(index + around + 1, n)
    with np.errstate(invalid="ignore"):
        return (sums[high] - sums[low]) / (counts[high] - counts[low])


def _short(values: np.ndarray) -> list:
    """For JSON: 7 significant digits, as many as float32 has; None for what JSON has no number for."""
    if values.dtype.kind == "i":
        return values.tolist()
    return [float(f"{value:.7g}") if math.isfinite(value) else None for value in values.tolist()]
