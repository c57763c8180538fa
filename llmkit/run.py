"""A finished or running run, read back from its folder: what its report, its model card and the Hub want to know."""

from dataclasses import dataclass
from pathlib import Path

from llmkit.errors import UserError
from llmkit.record import LOG, read_log


@dataclass(frozen=True)
class Run:
    """What `log.jsonl` tells of a run. Each record of a list has `step` and `time` (seconds since the epoch).

    Attributes:
        folder: the run's.
        record: of the last start: arguments, source, model, data, machine, versions (`run_record`).
        starts: one record for each start, resumed ones included.
        training: `loss`, `learning_rate`, `grad_norm`, `tokens_per_second` and so on, at each logged step.
        evaluations: `eval_loss`, `eval_perplexity` and so on.
        samples: `prompt` and `sample`.
        end: the last record of Trainer itself, with `train_runtime`; None while the run goes on or was killed.
    """

    folder: Path
    record: dict
    starts: list[dict]
    training: list[dict]
    evaluations: list[dict]
    samples: list[dict]
    end: dict | None


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
    return Run(
        folder=folder,
        record=starts[-1]["run"],
        starts=starts,
        training=[record for record in log if "loss" in record],
        evaluations=[record for record in log if "eval_loss" in record],
        samples=[record for record in log if "sample" in record],
        end=next((record for record in reversed(log) if "train_runtime" in record), None),
    )
