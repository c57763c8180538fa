"""How long a save keeps a run waiting, and on what: GPT-2 124M with its AdamW state by default.

    python benchmarks/saving.py                             # 124M: 1.5 GB a checkpoint, about 4 GB of memory
    python benchmarks/saving.py --folder /mnt/disk          # on the disk that runs are going to be on
    python benchmarks/saving.py --preset small --steps 10

Each step is followed by a save of PretrainTrainer's, of which two are kept. The first save is left out: nothing is
removed yet, and torch loads what it writes with. A step here is one micro-batch, so that a CPU is done in minutes.
"""

import argparse
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import patch

from transformers import TrainerCallback

from llmkit.training import checkpoints, saving
from loops import add_shape_options, describe, make_llmkit_trainer, parse_shape
from measuring import add_options, machine, report, synchronize, take_turns

KEPT = 2
# What is timed: where it is looked up, its name there, and what the table calls it.
PARTS = [
    (None, "save_model", "weights into files"),
    (None, "_save_optimizer_and_scheduler", "optimizer into files"),
    (checkpoints, "sync", "fsync"),
    (checkpoints, "checksum", "checksums"),
    (saving, "rotate", "rotate"),
]


class SaveAfterEachStep(TrainerCallback):
    """Times the steps, the saves, and the parts of these, in seconds."""

    def __init__(self, trainer):
        self.trainer = trainer
        self.steps: list[float] = []
        self.saves: list[dict[str, float]] = []

    def timed(self, function: Callable, part: str) -> Callable:
        def call(*args, **kwargs):
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.parts[part] += time.perf_counter() - start

        return call

    def on_step_begin(self, args, state, control, **kwargs):
        self.started = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        synchronize()
        start = time.perf_counter()
        self.steps.append(start - self.started)
        self.parts = defaultdict(float)
        with ExitStack() as stack:
            for owner, name, part in PARTS:
                owner = owner or self.trainer
                stack.enter_context(patch.object(owner, name, self.timed(getattr(owner, name), part)))
            self.trainer._save_checkpoint(self.trainer.model, trial=None)
        total = time.perf_counter() - start
        rest = total - sum(self.parts.values())
        checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        size = sum(path.stat().st_size for path in checkpoint.iterdir())
        self.saves.append({**self.parts, "rest": rest, "whole save": total, "MB": size / 1e6})


def measure(options: argparse.Namespace) -> dict[str, float]:
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        trainer = make_llmkit_trainer(options, folder)
        trainer.args.save_total_limit = KEPT
        saves = SaveAfterEachStep(trainer)
        trainer.add_callback(saves)
        trainer.train()
    found = {name: statistics.median(save[name] for save in saves.saves[1:]) for name in saves.saves[-1]}
    return found | {"step": statistics.median(saves.steps[1:])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, rounds=1)
    add_shape_options(parser, preset="124M", steps=4)
    parser.add_argument("--folder", help="where the checkpoints are written (default: the system's temporary folder)")
    parser.set_defaults(batch_size=1, block_size=256)
    options = parse_shape(parser)
    if options.peer:
        report(measure(options))
        return
    print(f"{describe(options)}; {options.rounds} rounds of {options.steps} saves\n{machine()}")
    rounds = take_turns(["llmkit"], options.rounds)["llmkit"]
    size = statistics.median(measured.pop("MB") for measured in rounds)
    whole = statistics.median(measured["whole save"] for measured in rounds)
    print(f"{size:,.0f} MB a checkpoint, {size / whole:,.0f} MB/s")
    print(f"{'seconds':>22}{'median':>10}{'min..max':>20}{'of the save':>14}")
    for part in rounds[0]:
        values = [measured[part] for measured in rounds]
        spread = f"{min(values):.2f}..{max(values):.2f}"
        print(f"{part:>22}{statistics.median(values):>10.2f}{spread:>20}{statistics.median(values) / whole:>14.0%}")


if __name__ == "__main__":
    main()
