"""A finished or running run, read back from its folder: what its report, its model card and the Hub want to know."""

import json
import math
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeGuard

from llmkit.errors import UserError

LOG = "log.jsonl"
# Saved with each adapter: how its base was quantized, without which it can not be merged.
QUANTIZATION_CONFIG = "quantization_config.json"
PRETRAINING, FINE_TUNING, PREFERENCE_TUNING = "pretraining", "fine-tuning", "preference tuning"
# What a run's record has at least. A part that a damaged log lacks, or has as another type, reads as it stands here.
LEAST_RECORD = {
    "arguments": {},
    "defaults": {},
    "source": {},
    "decisive": {},
    "model": {"parameters": 0, "attention": "unknown", "config": {}},
    "data": {"description": "unknown data", "fingerprint": "unknown"},
    "machine": {"device": "unknown device", "ranks": 1},
    "versions": {},
}
TEXTS = ("prompt", "sample")  # what a log holds beside numbers and the run's record
YEAR_10000 = 253_402_300_800  # in seconds since the epoch: the first moment that Python has no date for


@dataclass(frozen=True)
class Run:
    """What `log.jsonl` tells of a run. Each record of a list has `step` and `time` (seconds since the epoch).

    Attributes:
        folder: the run's.
        record: of the last start: arguments, source, model, data, machine, versions (`run_record`).
        log: every record, in the order of the file; the lists below are parts of it.
        starts: one record for each start, resumed ones included.
        training: `loss`, `learning_rate`, `grad_norm`, `tokens_per_second` and so on, at each logged step.
        evaluations: `eval_loss`, `eval_perplexity` and so on.
        samples: `prompt` and `sample`.
        end: the last record of Trainer itself, with `train_runtime`; None while the run goes on or was killed.
    """

    folder: Path
    record: dict
    log: list[dict]
    starts: list[dict]
    training: list[dict]
    evaluations: list[dict]
    samples: list[dict]
    end: dict | None

    @property
    def status(self) -> str:
        """`finished`, `stopped` (by a signal, a checkpoint saved), `diverged` (loss not finite), else `unfinished`.

        An unfinished run is still running, or was killed: the log does not tell which.
        """
        if self.end is not None:
            return "finished" if self.progress is None or self.progress > 0.9999 else "stopped"
        if "not_finite_step" in self.log[-1] or (self.training and not math.isfinite(self.training[-1]["loss"])):
            return "diverged"
        return "unfinished"

    @property
    def progress(self) -> float | None:
        """The part of the planned steps, or passes over the data, that is done; None before anything is logged."""
        if (steps := self.planned_steps) is not None:
            return self.log[-1]["step"] / steps
        epochs = [record["epoch"] for record in self.log if "epoch" in record]
        planned = self.record["arguments"].get("num_train_epochs", 3)  # 3 is Trainer's default
        return epochs[-1] / planned if epochs and _is_number(planned) and planned > 0 else None

    @property
    def planned_steps(self) -> int | None:
        """Trainer's steps of the whole run; None where it is planned in passes over the data.

        They are more than `max_steps`, which counts full batches, where the first batches are smaller.
        """
        steps = self.record.get("steps", self.record["arguments"].get("max_steps"))
        return steps if type(steps) is int and steps > 0 else None

    @property
    def kind(self) -> str:
        """`pretraining`, `fine-tuning` or `preference tuning`; logs of llmkit 0.1 say it by what their data was."""
        if isinstance(told := self.record.get("kind"), str):
            return told
        return FINE_TUNING if "conversations" in self.record["data"] else PRETRAINING

    @property
    def command(self) -> list[str]:
        """The words of the command that started it; none where the log does not tell."""
        words = self.record.get("command")
        return [word for word in words if isinstance(word, str)] if isinstance(words, list) else []

    @property
    def counted(self) -> str:
        """What its tokens are called: the others count those that they learned from, not all that they read."""
        return "tokens" if self.kind == PRETRAINING else "answer tokens"

    def seconds(self) -> list[float]:
        """Seconds of running at each record of `log`.

        The time between the end of one start and the next one does not count, nor does work after a checkpoint that
        a kill has lost: a resumed run's log goes on from the checkpoint.
        """
        seconds: list[float] = []
        before, began = 0.0, self.log[0]["time"]
        for record in self.log:
            if "run" in record and seconds:
                before, began = seconds[-1], record["time"]
            seconds.append(before + max(0.0, record["time"] - began))
        return seconds


def read_log(path: Path) -> list[dict]:
    """The records of a `log.jsonl`.

    A line that is no record is left out: the last one where a kill has cut it short, or one that something else wrote.
    """
    records = []
    for line in path.read_bytes().split(b"\n"):
        # RecursionError: brackets in brackets, thousands of them.
        with suppress(ValueError, RecursionError):
            record = json.loads(line)
            if isinstance(record, dict) and _has_step_and_time(record):
                records.append(record)
    return records


def _has_step_and_time(record: dict) -> bool:
    step, time = record.get("step"), record.get("time")
    return type(step) is int and 0 <= step < 2**53 and _is_number(time) and 0 <= time < YEAR_10000


def _is_number(value: object) -> TypeGuard[float]:
    """Whether it is a number that an array of float64 can hold; NaN and infinity are."""
    return type(value) is float or (type(value) is int and abs(value) < 2**63)


def _readable(record: dict) -> dict:
    """A line of the log, without what is neither a number nor the record of a run nor a sample."""
    kept: dict = {key: value for key, value in record.items() if _is_number(value) and key not in TEXTS}
    if isinstance(record.get("run"), dict):
        kept["run"] = _completed(record["run"], LEAST_RECORD)
    if all(isinstance(record.get(key), str) for key in TEXTS):
        kept |= {key: record[key] for key in TEXTS}
    return kept


def _completed(given: dict, least: dict) -> dict:
    """What is given, with what it lacks taken from `least`."""
    completed = dict(given)
    for key, value in least.items():
        if not isinstance(given.get(key), type(value)):
            completed[key] = value
        elif value and isinstance(value, dict):
            completed[key] = _completed(given[key], value)
    return completed


def load_run(folder: str | Path) -> Run:
    """Read the run in a folder, or the run that a checkpoint folder belongs to.

    Raises:
        UserError: no run's log there.
    """
    folder = Path(folder)
    if not (folder / LOG).exists() and (folder.parent / LOG).exists() and folder.name.startswith("checkpoint-"):
        folder = folder.parent
    try:
        log = [_readable(record) for record in read_log(folder / LOG)] if (folder / LOG).is_file() else []
    except OSError as error:
        raise UserError(f"cannot read {folder / LOG}: {error.strerror}") from error
    starts = [record for record in log if "run" in record]
    if not starts:
        raise UserError(f"{folder} is not the folder of a run: it has no {LOG} with the record of one")
    log = log[log.index(starts[0]) :]
    ends = [record for record in log[log.index(starts[-1]) :] if "train_runtime" in record]  # an earlier stop is none
    return Run(
        folder=folder,
        record=starts[-1]["run"],
        log=log,
        starts=starts,
        training=[record for record in log if "loss" in record],
        evaluations=[record for record in log if "eval_loss" in record],
        samples=[record for record in log if "sample" in record],
        end=ends[-1] if ends else None,
    )
