"""The words and tables of a run's report."""

import math
import re
from datetime import UTC, datetime

from llmkit.paths import WHOLE_PATH, last_name
from llmkit.runs.metrics import COMPARED, METRICS
from llmkit.runs.report.curves import tokens
from llmkit.runs.run import PRETRAINING, Run

MAX_LISTED = 20  # of a setting's values, such as the names of text files
MAX_SAMPLES = 100  # of a prompt
NOT_A_SETTING = {
    "output_dir",
    "resume_from_checkpoint",
    "logging_dir",
    "run_name",
    "data_dir",
    "debug",
    "disable_tqdm",
}
# A path that says where somebody keeps things: absolute, from a home, or upwards.
PATH = re.compile(r"""(?<![\w.:/\\~])(?:/|~|\.\.[/\\]|[A-Za-z]:[/\\])[^\s'",;:()|]*[/\\]([^\s'",;:()|/\\]+)""")


def public(value):
    """A record's value with folders taken out of its paths, for a report may be passed on.

    A value that is a path as a whole may hold any sign; within a text, a path ends at a space, a quote or a comma.
    """
    if isinstance(value, str):
        if WHOLE_PATH.fullmatch(value) and not PATH.search(value.partition(" ")[2]):
            return _short(value)
        return PATH.sub(lambda match: _short(match[0]), value)
    if isinstance(value, dict):
        return {key: public(item) for key, item in value.items()}
    return [public(item) for item in value] if isinstance(value, list) else value


def _short(path: str) -> str:
    slash = path[-1] if path[-1] in "/\\" else ""
    name = last_name(path)
    return name if name == "~" else f"…/{name}{slash}"


def quantity(number: float) -> str:
    """1234567 -> 1.23M."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size * 0.9995:
            return f"{number / size:.3g}{unit}" if number < size * 999.5 else f"{number / size:,.0f}{unit}"
    return f"{number:.3g}"


def duration(seconds: float) -> str:
    """The two largest units: 45 s, 4 min 12 s, 3 h 5 min, 2 d 3 h."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    for size, unit, part, smaller in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if seconds >= size:
            whole, rest = divmod(round(seconds / part), size // part)
            return f"{whole} {unit} {rest} {smaller}" if rest else f"{whole} {unit}"
    raise AssertionError


def moment(time: float) -> str:
    """Seconds since the epoch, for a reader anywhere."""
    return datetime.fromtimestamp(time, UTC).strftime("%Y-%m-%d %H:%M UTC")


def plain(value) -> str:
    """A setting as one writes it in a recipe."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, (list, tuple)):
        if len(value) > MAX_LISTED:
            return f"{len(value):,} values"
        return ", ".join(repr(item) if isinstance(item, str) else plain(item) for item in value) or "none"
    if isinstance(value, dict):
        return ", ".join(f"{key}: {plain(item)}" for key, item in value.items()) or "none"
    return "none" if value is None else str(value)


def state(run: Run, now: float, alive: bool | None = None) -> dict[str, str]:
    """`kind` (finished, running, stopped, diverged) and `text` of how the run stands.

    Args:
        now: in seconds since the epoch.
        alive: whether its process is there. Where None, nothing tells, and a silence longer than any before it makes
            it a run that is not.
    """
    kind, last = run.status, run.log[-1]
    percent = f" at {run.progress:.0%}" if run.progress is not None else ""
    times = [record["time"] for record in run.log[run.log.index(run.starts[-1]) :]]
    text = f"loss not finite at step {last['step']:,}" if kind == "diverged" else kind
    if kind == "stopped":
        text = f"stopped{percent}, can be resumed"
    elif kind == "unfinished":
        longest = max((later - sooner for sooner, later in zip(times, times[1:], strict=False)), default=0)
        alive = now - last["time"] <= max(300, 3 * longest) if alive is None else alive
        kind = "running" if alive else "stopped"
        text = f"{kind}{percent}, as of {moment(now if alive else last['time'])}"
    resumes = len(run.starts) - 1
    often = {0: "", 1: ", resumed once", 2: ", resumed twice"}.get(resumes, f", resumed {resumes} times")
    return {"kind": kind, "text": text + often}


def model_name(run: Run) -> str:
    """What was trained, in a few words."""
    model, source = run.record["model"], run.record["source"]
    config = model["config"]
    if run.kind != PRETRAINING:
        base = public(str(source.get("model") or config.get("_name_or_path") or config.get("model_type")))
        return f"A LoRA adapter on {base.rstrip('/').split('/')[-1]} ({quantity(model['parameters'])} parameters)"
    sizes = {"n_layer": "{} layers", "n_embd": "{} wide"}
    shape = [text.format(plain(config[key])) for key, text in sizes.items() if key in config]
    block = run.record["data"].get("block_size")
    shape += [f"context {block:,}"] if type(block) is int else []
    shape += [f"from {public(str(source['init_from']))}"] if "init_from" in source else []
    brackets = f" ({', '.join(shape)})" if shape else ""
    return f"A GPT-2 of {quantity(model['parameters'])} parameters{brackets}"


def headline(run: Run) -> str:
    """The run in one line."""
    text = f"{model_name(run)} on {public(run.record['data']['description'])}: "
    text += f"{quantity(tokens(run)[-1])} {run.counted} in {duration(run.seconds()[-1])}"
    final = [(metric, last_value(run, metric.key)) for metric in COMPARED]
    return (
        ", ".join([text, *(f"{metric.name} {metric.write(value)}" for metric, value in final if value is not None)])
        + "."
    )


def last_value(run: Run, key: str) -> float | None:
    return next((record[key] for record in reversed(run.log) if key in record), None)


def figures(run: Run) -> dict[str, dict]:
    """The key figures by name: `text`, a `note`, and where runs can be ranked by it their `rank`, lowest best."""
    found = {}
    for metric in COMPARED:
        values = [(record[metric.key], record["step"]) for record in run.log if metric.key in record]
        if not values:
            continue
        last, at = values[-1]
        sign = 1 if metric.best == "lowest" else -1
        finite = [pair for pair in values if math.isfinite(pair[0])] or values
        best, step = min(finite, key=lambda pair: sign * pair[0])
        error = last_value(run, f"{metric.key}_stderr")
        note = f"± {metric.write(error)} standard error" if error is not None else f"at step {at:,}"
        note = f"best {metric.write(best)} at step {step:,}" if step != at and best != last else note
        found[metric.name] = {"text": metric.write(last), "note": note, "rank": sign * last}
    if run.training:
        metric = METRICS["loss"]
        found[metric.name] = {"text": metric.write(run.training[-1]["loss"]), "note": "the last one logged"}
    epoch = last_value(run, "epoch")
    note = f"{epoch:.2f} passes over the data" if epoch is not None else ""
    found[f"{run.counted} trained"] = {"text": quantity(tokens(run)[-1]), "note": note}
    planned = run.planned_steps
    found["steps"] = {"text": f"{run.log[-1]['step']:,}", "note": f"of {planned:,}" if planned else ""}
    stints = f"over {len(run.starts)} starts" if len(run.starts) > 1 else "evaluation and samples included"
    found["time"] = {"text": duration(run.seconds()[-1]), "note": stints}
    machine = run.record["machine"]
    notes = {
        "tokens_per_second": f"median, on {machine['ranks']} x {machine['device']}",
        "mfu": "median",
        "cpu_utilization": "median, of the first process",
        "gpu_utilization": "median, of the first GPU",
    }
    for key, note in notes.items():
        if values := sorted(record[key] for record in run.training if key in record):
            found[METRICS[key].name] = {"text": METRICS[key].write(values[len(values) // 2]), "note": note}
    for key, note in (("memory_gib", "of the first process"), ("gpu_memory_gib", "of the first GPU")):
        if values := [record[key] for record in run.training if key in record]:
            found[METRICS[key].name] = {"text": f"{METRICS[key].write(max(values))} GiB", "note": note}
    return found


def samples(run: Run) -> list[dict]:
    """Each prompt with the `steps` and `texts` of its continuations, some of them where there are very many."""
    found: dict[str, list[dict]] = {}
    for record in run.samples:
        found.setdefault(record["prompt"], []).append(record)
    shown = []
    for prompt, records in found.items():
        count = min(len(records), MAX_SAMPLES)
        kept = [records[round(i * (len(records) - 1) / max(1, count - 1))] for i in range(count)]
        texts = [record["sample"] for record in kept]
        shown.append({"prompt": prompt, "steps": [record["step"] for record in kept], "texts": texts})
    return shown
