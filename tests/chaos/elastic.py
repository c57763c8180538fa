"""A run that goes on at another number of ranks: 1, 2, 4 and 1 again, each with another micro-batch.

    python tests/chaos/elastic.py

40 steps in float32, ten at each number of ranks, with what every rank is given to train on written down. Beside it the
same run on one rank, which nobody interrupts. Printed is whether each step had the same texts in the same order, and
the largest relative difference of a step's loss.
"""

import json
import sys
import tempfile
from functools import partial
from pathlib import Path

import torch
from forked import Kind, checkpoint_to_resume, in_child, leave, make_sources, make_trainer, start, wait
from transformers import TrainerCallback

EACH = 10  # steps at one number of ranks
PRETRAINING = Kind("pretraining"), [(1, 8), (2, 2), (4, 1), (1, 2)]  # ranks and windows of a micro-batch
FINE_TUNING = Kind("fine-tuning", fine_tuning=True), [(1, 4), (2, 1), (4, 1), (1, 2)]
BATCH = {"pretraining": 8, "fine-tuning": 4}
LIMIT = 1e-6


class EndAt(TrainerCallback):
    def __init__(self, step: int):
        self.step = step

    def on_save(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


def train(kind: Kind, sources: Path, folder: Path, ranks: int, micro_batch: int, until: int, rank: int) -> None:
    """Go on up to a step. The texts of each micro-batch go into a file of the rank."""
    how = {"max_steps": 4 * EACH, "save_steps": EACH, "per_device_train_batch_size": micro_batch}
    how |= {"learning_rate": 1e-3, "eval_strategy": "no"}
    if kind.fine_tuning:
        how |= {"gradient_accumulation_steps": BATCH[kind.name] // micro_batch // ranks}
    run = make_trainer(kind, sources, folder, dropout=0.0, **how)
    run.add_callback(EndAt(until))
    step = run.training_step

    def training_step(model, inputs, *args, **kwargs):
        record = [run.state.global_step + 1, len(run.guard.micro_losses), rank, _texts(inputs)]
        with (folder / f"texts_{rank}").open("a") as file:
            file.write(json.dumps(record) + "\n")
        return step(model, inputs, *args, **kwargs)

    run.training_step = training_step
    run.train(resume_from_checkpoint=checkpoint_to_resume(run.args))
    leave(run)


def _texts(inputs: dict[str, torch.Tensor]) -> list[list[int]]:
    """The rows of a micro-batch, without padding."""
    ids = inputs["input_ids"]
    kept = inputs.get("attention_mask", torch.ones_like(ids)).bool()
    return [row[mask].tolist() for row, mask in zip(ids, kept, strict=True)]


def texts(folder: Path) -> dict[int, list]:
    """What each step was trained on, in order."""
    records = [json.loads(line) for path in folder.glob("texts_*") for line in path.read_text().splitlines()]
    steps: dict[int, list] = {}
    for step, _, _, rows in sorted(records):
        steps.setdefault(step, []).extend(rows)
    return steps


def losses(folder: Path) -> dict[int, float]:
    records = map(json.loads, (folder / "run" / "log.jsonl").read_text().splitlines())
    return {record["step"]: record["loss"] for record in records if "loss" in record}


def prove(kind: Kind, parts: list[tuple[int, int]], sources: Path, folder: Path) -> list[str]:
    """Train the run and the one that it is compared with. Returns the lines of the table."""
    lines = []
    for place, plan in ((folder / "whole", [(*parts[0], 4 * EACH)]), (folder / "elastic", _ends(parts))):
        place.mkdir(parents=True)
        for ranks, micro_batch, until in plan:
            work = partial(train, kind, sources, place, ranks, micro_batch, until)
            ending = wait(start(work, ranks, place / "out"), patience=300)
            assert ending.finished, (place / "out").read_text()
    whole, found = (texts(folder / name) for name in ("whole", "elastic"))
    expected, logged = (losses(folder / name) for name in ("whole", "elastic"))
    assert (
        list(expected) == list(range(1, 4 * EACH + 1)) and sum(map(len, whole.values())) == 4 * EACH * BATCH[kind.name]
    )
    for ranks, micro_batch, until in _ends(parts):
        steps = range(until - EACH + 1, until + 1)
        same = sum(found.get(step) == whole[step] for step in steps)
        apart = max(abs(logged[step] - expected[step]) / expected[step] for step in steps)
        lines.append(
            f"{kind.name:<12}{until - EACH + 1:>3} to {until:>2}{ranks:>7}{micro_batch:>13}{same:>9} of {EACH}"
            f"{apart:>20.1e}"
        )
        if same < EACH or apart > LIMIT:
            lines[-1] += "  FAILED"
    return lines


def _ends(parts: list[tuple[int, int]]) -> list[tuple[int, int, int]]:
    return [(*part, (number + 1) * EACH) for number, part in enumerate(parts)]


def main() -> None:
    torch.set_num_threads(1)  # threads do not survive a fork
    lines = [f"{'':<12}{'steps':>8}{'ranks':>8}{'micro-batch':>13}{'same texts':>14}{'loss apart by':>20}"]
    with tempfile.TemporaryDirectory() as folder:
        sources = Path(folder) / "sources"
        sources.mkdir()
        assert in_child(partial(make_sources, sources)).finished
        for kind, parts in (PRETRAINING, FINE_TUNING):
            lines += prove(kind, parts, sources, Path(folder) / kind.name)
    print("\n".join(lines))
    sys.exit(any(line.endswith("FAILED") for line in lines))


if __name__ == "__main__":
    main()
