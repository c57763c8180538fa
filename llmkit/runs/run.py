"""A finished or running run, read back from its folder: what its report, its model card and the Hub want to know."""

import json
import math
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from llmkit.errors import UserError

LOG = "log.jsonl"


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
        if self.training and not math.isfinite(self.training[-1]["loss"]):
            return "diverged"
        return "unfinished"

    @property
    def progress(self) -> float | None:
        """The part of the planned steps, or passes over the data, that is done; None before anything is logged."""
        arguments = self.record["arguments"]
        # `steps` are Trainer's: more than max_steps, which counts full batches, where the first ones are smaller.
        if (steps := self.record.get("steps", arguments.get("max_steps", -1))) > 0:
            return self.log[-1]["step"] / steps
        epochs = [record["epoch"] for record in self.log if "epoch" in record]
        return epochs[-1] / arguments.get("num_train_epochs", 3) if epochs else None  # 3: Trainer's default

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
    """The records of a `log.jsonl`, without a last line that a kill cut short."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        with suppress(json.JSONDecodeError):
            records.append(json.loads(line))
    return records


def load_run(folder: str | Path) -> Run:
    """Read the run in a folder, or the run that a checkpoint folder belongs to.

    Raises:
        UserError: no run's log there.
    """
    folder = Path(folder)
    if not (folder / LOG).exists() and (folder.parent / LOG).exists() and folder.name.startswith("checkpoint-"):
        folder = folder.parent
    log = read_log(folder / LOG) if (folder / LOG).is_file() else []
    starts = [record for record in log if "run" in record]
    if not starts:
        raise UserError(f"{folder} is not the folder of a run: no {LOG} with its record is there")
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
