"""What PretrainTrainer adds to a training step: beside a bare PyTorch loop around the same model, on the same batches.

    python benchmarks/trainer_overhead.py                            # a tiny model: milliseconds a step
    python benchmarks/trainer_overhead.py --preset 124M --block_size 256 --batch_size 2 --steps 12    # in percent
    python benchmarks/trainer_overhead.py --profile                  # where the time of the tiny model's step goes

Both models start from the same weights. After each step of the Trainer a callback takes the bare loop's step, so that
the two take turns within a process, step by step: what disturbs one disturbs the other. The Trainer's step goes from
the end of that callback to the next one, with its data loader, scheduler, callbacks and a log every ten steps.
"""

import argparse
import copy
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable

from transformers import TrainerCallback

from loops import add_shape_options, bare_step, batches_in_memory, describe, make_llmkit_trainer, parse_shape
from measuring import add_options, machine, print_parts, report, synchronize, take_turns

WARMUP_STEPS = 5


class PairedSteps(TrainerCallback):
    """Takes a bare step after each of the Trainer's, and times both, in seconds."""

    def __init__(self, step: Callable, batches: list):
        self.step, self.batches = step, batches
        self.trainer: list[float] = []
        self.bare: list[float] = []

    def on_train_begin(self, args, state, control, **kwargs):
        self.started = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        synchronize()
        ended = time.perf_counter()
        self.step(*self.batches[state.global_step - 1])
        synchronize()
        self.trainer.append(ended - self.started)
        self.started = time.perf_counter()
        self.bare.append(self.started - ended)


class Parts(TrainerCallback):
    """Seconds in each part of a Trainer's step, without what is in the parts that it calls."""

    def __init__(self, trainer):
        self.seconds: dict[str, float] = defaultdict(float)
        self.inner = [0.0]  # seconds in the parts that each running part has called
        self._time(trainer, "get_batch_samples", "fetch the batches")
        self._time(trainer, "training_step", "training_step, rest")
        self._time(trainer, "compute_loss", "compute_loss, rest")
        self._time(trainer, "_maybe_log_save_evaluate", "logs")
        self._time(trainer.callback_handler, "call_event", "callbacks")
        self._time(trainer.accelerator, "backward", "backward")
        self._time(trainer.accelerator, "clip_grad_norm_", "clip gradients")

    def on_train_begin(self, args, state, control, model=None, optimizer=None, lr_scheduler=None, **kwargs):
        self._time(model, "forward", "forward")
        self._time(model, "zero_grad", "zero gradients")
        self._time(optimizer, "step", "optimizer")
        self._time(lr_scheduler, "step", "scheduler")

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == WARMUP_STEPS:
            self.seconds.clear()
            self.started = time.perf_counter()

    def on_train_end(self, args, state, control, **kwargs):
        self.total = time.perf_counter() - self.started

    def _time(self, owner: object, name: str, part: str) -> None:
        function = getattr(owner, name)

        def timed(*args, **kwargs):
            self.inner.append(0.0)
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                synchronize()
                seconds = time.perf_counter() - start
                self.seconds[part] += seconds - self.inner.pop()
                self.inner[-1] += seconds

        setattr(owner, name, timed)


def measure(options: argparse.Namespace) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_llmkit_trainer(options, folder)
        pairs = PairedSteps(bare_step(copy.deepcopy(trainer.model), options), batches_in_memory(options))
        trainer.add_callback(pairs)
        trainer.train()
    ours, bare = (1e3 * statistics.mean(steps[WARMUP_STEPS:]) for steps in (pairs.trainer, pairs.bare))
    differences = [a - b for a, b in zip(pairs.trainer[WARMUP_STEPS:], pairs.bare[WARMUP_STEPS:], strict=True)]
    typical = 1e3 * statistics.median(differences)
    return {"Trainer": ours, "bare loop": bare, "overhead, mean": ours - bare, "overhead, median": typical}


def profile(options: argparse.Namespace) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_llmkit_trainer(options, folder)
        parts = Parts(trainer)
        trainer.add_callback(parts)
        trainer.train()
    parts.seconds["Trainer's loop, rest"] = parts.total - sum(parts.seconds.values())
    steps = options.steps - WARMUP_STEPS
    return {part: 1e3 * seconds / steps for part, seconds in sorted(parts.seconds.items(), key=lambda item: -item[1])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, rounds=3)
    add_shape_options(parser, preset="tiny", steps=200)
    parser.add_argument("--profile", action="store_true", help="the parts of a step, instead of the comparison")
    options = parse_shape(parser, WARMUP_STEPS)
    if options.peer:
        report(profile(options) if options.profile else measure(options))
        return
    print(f"{describe(options)}; {options.rounds} rounds of {options.steps} steps\n{machine()}")
    rounds = take_turns(["llmkit"], options.rounds)["llmkit"]
    print_parts(rounds, whole="bare loop", share="of a bare step", form=".1%")


if __name__ == "__main__":
    main()
