"""The tables of a run's report. A table has a `title`, `columns`, `rows` of text, a `note`, and may be `folded`."""

import math
import shlex

from llmkit.runs.report.summary import NOT_A_SETTING, figures, moment, plain, public, quantity
from llmkit.runs.run import Run

LONGEST_LIST = 3  # of files; a longer one is counted
LONGEST_TEXT = 500  # characters of a setting
NOT_OF_THE_MODEL = {"transformers_version", "_name_or_path", "dtype", "architectures", "quantization_config"}


def table(title: str, columns: list[str], rows: list[list[str]], note: str = "", folded: bool = False) -> dict:
    return {"title": title, "columns": columns, "rows": rows, "note": note, "folded": folded}


def settings(run: Run) -> tuple[dict[str, str], dict[str, str]]:
    """The settings that are not llmkit's defaults, and those that are, as far as the log tells them."""
    record = run.record
    changed = record["arguments"] | record["source"]
    defaults = record["defaults"] | record["decisive"]  # older logs have the decisive ones only
    shown = [{key: setting(key, part[key]) for key in sorted(part)} for part in (changed, defaults)]
    told, rest = [{key: value for key, value in part.items() if not key.endswith("_token")} for part in shown]
    return told, {key: value for key, value in rest.items() if key not in changed}


def setting(key: str, value) -> str:
    """A setting's value without folders, and in a length that can be read."""
    if key.endswith("_files") and isinstance(value, list) and len(value) > LONGEST_LIST:
        return f"{len(value):,} files"
    text = plain(public(value))
    return text if len(text) <= LONGEST_TEXT else f"{text[:LONGEST_TEXT]}… ({len(text):,} characters)"


def command_line(words: list[str]) -> str:
    """The command that started a run, as one would type it, without secrets, folders and long lists of files."""
    shown: list[str] = []
    values, secret = 0, False  # after the last option
    for word in words:
        option, _, value = word.partition("=")
        if word.startswith("-"):
            values, secret = 0, option.endswith("_token")
            if value:
                word = f"{option}={'…' if secret else public(value)}"
            shown.append(_quoted(word))
            continue
        values += 1
        if values <= LONGEST_LIST:
            shown.append("…" if secret else _quoted(public(word)))
        elif values == LONGEST_LIST + 1:
            shown.append("…")
    return " ".join(shown)


def _quoted(word: str) -> str:
    """A word for the shell; the sign for folders that were left out needs no quotes."""
    bare = word.replace("…", ".")
    return word if shlex.quote(bare) == bare else shlex.quote(word)


def origin(run: Run) -> dict[str, str]:
    """The command that started the run, and the code that it ran, where the log tells them."""
    found = {}
    if words := run.command:
        found["command"] = command_line(words)
    commit = run.record.get("commit")
    if isinstance(commit, dict) and isinstance(commit.get("sha"), str):
        found["commit"] = commit["sha"] + (", with changes that were not committed" if commit.get("modified") else "")
    return found


def settings_tables(run: Run) -> list[dict]:
    """The settings: what was changed on the command line, what else is not at its default, and what is."""
    changed, defaults = settings(run)
    given = {word.partition("=")[0].lstrip("-").replace("-", "_") for word in run.command if word.startswith("--")}
    own = {key: text for key, text in changed.items() if key in given}
    others = {key: text for key, text in changed.items() if key not in given}
    if run.command:
        note = "Those given on the command line." if own else "None was given on the command line."
        tables = [
            table("Settings", ["", ""], rows(own), note),
            table("Other settings that are not at their defaults", ["", ""], rows(others), folded=True),
        ]
    else:
        tables = [table("Settings", ["", ""], rows(changed), "Those that are not at their defaults.")]
    return [*tables, table("Settings at their defaults", ["", ""], rows(defaults), folded=True)]


def run_tables(run: Run) -> list[dict]:
    """What a run was, as its log tells it."""
    model = run.record["model"]
    config = {key: value for key, value in model["config"].items() if key not in NOT_OF_THE_MODEL}
    shape = {"parameters": f"{model['parameters']:,}", "attention": model["attention"]}
    shape |= {key: plain(public(value)) for key, value in config.items()}
    machine = {key: plain(value) for key, value in environment(run).items()}
    started = origin(run)
    return [
        *([table("How it was started", ["", ""], rows(started))] if started else []),
        *settings_tables(run),
        table("Data", ["", ""], rows(data_ledger(run))),
        table("Model", ["", ""], rows(shape)),
        table("Machine and versions", ["", ""], rows(machine)),
        starts(run),
    ]


def rows(named: dict[str, str]) -> list[list[str]]:
    return [[name, text] for name, text in named.items()]


def environment(run: Run) -> dict:
    return run.record["machine"] | run.record["versions"]


def data_ledger(run: Run) -> dict[str, str]:
    """What the run learned from, and how often it has seen it."""
    data = run.record["data"]
    ledger = {key.replace("_", " "): f"{value:,}" for key, value in data.items() if type(value) is int}
    for key, value in data.items():
        if key.endswith(("_tokens", "_bytes")) and type(value) is int:
            ledger[key.replace("_", " ")] = f"{value:,} ({quantity(value)})"
    per_byte = data.get("tokens_per_byte")
    if isinstance(per_byte, float) and per_byte > 0:
        ledger["tokens per byte"] = f"{per_byte:.4f} of the validation text ({1 / per_byte:.2f} bytes a token)"
    epochs = [entry["epoch"] for entry in run.log if "epoch" in entry]
    if epochs:
        ledger["epochs seen"] = f"{epochs[-1]:.3f}"
    fingerprint = {"fingerprint": data["fingerprint"]}
    return {"description": public(data["description"]), **ledger, **fingerprint}


def starts(run: Run) -> dict:
    """Every start, with its step and time, and how long it ran."""
    found, seconds = [], run.seconds()
    begins = [index for index, record in enumerate(run.log) if "run" in record]
    for begin, end in zip(begins, [*begins[1:], len(run.log)], strict=True):
        record, machine = run.log[begin], run.log[begin]["run"]["machine"]
        ran = seconds[end - 1] - seconds[begin]
        where = f"{machine['ranks']} x {machine['device']}"
        found.append(
            [f"{record['step']:,}", moment(record["time"]), f"{run.log[end - 1]['step']:,}", _clock(ran), where]
        )
    columns = ["from step", "at", "to step", "ran", "on"]
    if len({row[-1] for row in found}) == 1:  # the machine of the table above
        columns, found = columns[:-1], [row[:-1] for row in found]
    note = "What a kill lost after the last checkpoint is not counted." if len(found) > 1 else ""
    return table("Starts", columns, found, note)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def differences(runs: list[Run]) -> dict:
    """What the runs differ in, with what follows from that (parameters, tokens): a run a column."""
    columns = []
    for run in runs:
        model, (changed, defaults) = run.record["model"], settings(run)
        known = {key: value for key, value in model["config"].items() if key not in NOT_OF_THE_MODEL}
        known |= {"parameters": quantity(model["parameters"]), "attention": model["attention"]} | environment(run)
        data = {f"data: {key}": value for key, value in data_ledger(run).items() if key != "epochs seen"}
        columns.append(data | {key: plain(public(value)) for key, value in known.items()} | defaults | changed)
    names = [name for name in dict.fromkeys(key for column in columns for key in column) if name not in NOT_A_SETTING]
    cells = [[name, *(column.get(name, "default") for column in columns)] for name in names]
    return {"title": "What differs", "rows": [row for row in cells if len(set(row[1:])) > 1]}


def comparison(runs: list[Run]) -> dict:
    """The key figures of several runs, a run a column; `best` lists [row, run] of the best, where they compare."""
    columns = [figures(run) for run in runs]
    same_data = len({run.record["data"]["fingerprint"] for run in runs}) == 1
    found, best = [], []
    for name in dict.fromkeys(name for column in columns for name in column):
        cells = [column.get(name) for column in columns]
        ranks = [cell["rank"] for cell in cells if cell and math.isfinite(cell.get("rank", math.nan))]
        for index, cell in enumerate(cells):
            comparable = len(ranks) > 1 and (same_data or name.startswith("HellaSwag"))
            if comparable and cell and cell.get("rank") == min(ranks) < max(ranks):
                best.append([len(found), index])
        found.append([name, *(cell["text"] if cell else "" for cell in cells)])
    note = "" if same_data else "The runs had different data or tokenizers: their losses do not compare."
    return {"title": "Final figures", "rows": found, "best": best, "note": note}
