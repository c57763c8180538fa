"""A run whose length is stated in minutes: `train_minutes` in place of `max_steps`.

Before the run, a rehearsal takes some real steps with a copy of the model, in a folder of its own that is removed
afterwards, and times them, some validation batches, the samples, the report and a save. The slowest rank's figures
decide how many steps fit. From there on it is a run of so many steps like any other one: its schedule, evaluations and
saves lie over exactly these steps, `max_steps` of its record says how many, and a resumed run takes that number and
measures nothing.
"""

import bisect
import copy
import itertools
import math
import random
import shutil
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
from accelerate.utils import gather_object
from accelerate.utils.memory import clear_device_cache
from transformers import PreTrainedModel, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from llmkit.console import say
from llmkit.errors import UserError
from llmkit.files import hold_folder, release_folder
from llmkit.runs.run import LOG, read_log
from llmkit.training.callbacks import Samples
from llmkit.training.checkpoints import first_rank_decides
from llmkit.training.run_arguments import RunArguments

if TYPE_CHECKING:
    from llmkit.training.base_trainer import ExactTrainer

REHEARSAL = ".rehearsal"  # in the run's folder, so that saves go to the same disk
WARM_UP = 3  # steps that are not timed: they compile, find their memory and fill caches
FEWEST, MOST = 5, 1000  # steps that are timed
PART, LONGEST = 0.04, 60.0  # they take this part of the budget, and not more than so many seconds
SIZED = 256  # batches that say how large one is in the mean, where padding makes them differ
EVALUATED = 4  # validation batches that are timed

Arguments = TypeVar("Arguments", bound=RunArguments)


@dataclass(frozen=True)
class Pace:
    """What a run's parts take, in seconds.

    Attributes:
        setup: from making the trainer to the first step.
        step: an optimizer step.
        evaluation: of the whole validation set, with the samples and the report.
        save: a checkpoint.
    """

    setup: float
    step: float
    evaluation: float
    save: float

    def seconds(self, args: RunArguments, steps: int) -> float:
        """Of a run of `steps` steps up to its last evaluation and the saved model."""
        on_the_way = evaluations(args, steps) * self.evaluation + (saves(args, steps) + 1) * self.save
        return self.setup + steps * self.step + on_the_way


def fix_length(
    make: Callable[[PreTrainedModel, RunArguments], "ExactTrainer"],
    model: PreTrainedModel,
    args: RunArguments,
    resume_from: str | None,
    clock: Callable[[], float] = time.perf_counter,
) -> None:
    """Set `max_steps` of arguments with `train_minutes`; others are left as they are. All ranks call it together.

    Random states and the model are left as they were.

    Args:
        make: the run's trainer (an `ExactTrainer`) of a model and arguments.
        model: as it will be given to `make` afterwards.
        resume_from: the checkpoint folder that the run will go on from.
        clock: seconds.

    Raises:
        UserError: not even one step fits; or the checkpoint's run had another length.
    """
    if args.train_minutes is None:
        return
    if resume_from is not None:
        args.max_steps = _recorded_steps(Path(resume_from), args)
        return
    started = clock()
    pace = _rehearse(make, model, args, clock)
    spent = max(gather_object([clock() - started]))
    seconds = 60 * args.train_minutes - spent
    steps = bisect.bisect_right(range(1, 10**8), seconds, key=lambda steps: pace.seconds(args, steps))
    if steps == 0:
        least = (spent + pace.seconds(args, 1)) / 60
        raise UserError(
            f"train_minutes={args.train_minutes:g}: measuring the pace, one step, its evaluation and its save take "
            f"{least:.2g} minutes here: give more, or max_steps"
        )
    args.max_steps = steps
    if args.process_index == 0:
        say(
            f"train_minutes {args.train_minutes:g}: {steps:,} steps of {pace.step:.3g} s, "
            f"{evaluations(args, steps)} evaluations of {pace.evaluation:.2g} s, {saves(args, steps) + 1} saves of "
            f"{pace.save:.2g} s; measuring took {spent:.0f} s"
        )


def _recorded_steps(checkpoint: Path, args: RunArguments) -> int:
    """The length of the run that wrote a checkpoint, which has to have had the same budget."""
    log = checkpoint.parent / LOG
    starts = [record["run"] for record in read_log(log) if "run" in record] if log.exists() else []
    if starts and (had := starts[-1]["arguments"].get("train_minutes")) != args.train_minutes:
        length = f"train_minutes={had:g}" if had else "no train_minutes"
        raise UserError(
            f"{checkpoint} would be resumed with train_minutes={args.train_minutes:g}, and its run had {length}: give "
            "the run's own setting, or start another run from its weights"
        )
    return TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME)).max_steps


# How often something happens in a run


def interval(every: float | None, steps: int) -> int:
    """Trainer's `logging_steps`, `eval_steps` or `save_steps` in steps; below 1 it is a part of the run."""
    assert every is not None, "TrainingArguments fills it in"
    return math.ceil(steps * every) if every < 1 else int(every)


def evaluations(args: RunArguments, steps: int) -> int:
    """Evaluations of a run of `steps` steps; there is always one of its last step."""
    on_the_way = 0
    if args.eval_strategy == IntervalStrategy.STEPS:
        every = interval(args.eval_steps, steps)
        on_the_way = max(0, (steps - 1) // every - max(0, math.ceil(args.eval_delay / every) - 1))
    again = args.load_best_model_at_end  # other weights than those of the last step
    return args.eval_on_start + on_the_way + 1 + again


def saves(args: RunArguments, steps: int) -> int:
    """Checkpoints that a run of `steps` steps writes, at most; with `save_strategy: steps` one is of its last step."""
    if args.save_strategy == SaveStrategy.STEPS:
        return math.ceil(steps / interval(args.save_steps, steps))
    return evaluations(args, steps) if args.save_strategy == SaveStrategy.BEST else 0


# The rehearsal


class _Stopwatch(TrainerCallback):
    """Times steps after the warm-up, ends the training when there are enough of them, and times a save."""

    def __init__(self, trainer: "ExactTrainer", clock: Callable[[], float], seconds: float):
        self.trainer, self.clock, self.seconds = trainer, clock, seconds
        self.sizes: list[int] = []  # of the micro-batches of the steps that are timed
        self.last = -1

    def _now(self, args: RunArguments) -> float:
        if args.device.type != "cpu":
            torch.accelerator.synchronize(args.device)
        return self.clock()

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 0:
            self.ready = self._now(args)
        if state.global_step == WARM_UP - 1:
            self.before = self._now(args)

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == WARM_UP:
            step = max(gather_object([self._now(args) - self.before]))
            self.last = WARM_UP + min(MOST, max(FEWEST, int(self.seconds / step)))
            self.started = self._now(args)
        elif state.global_step > WARM_UP:
            self.sizes += map(_size, self.trainer.micro_batches)
        if state.global_step == self.last:
            self.ended = self._now(args)
            self.step = (self.ended - self.started) / (self.last - WARM_UP)
            control.should_save = control.should_training_stop = True

    def on_save(self, args, state, control, **kwargs):
        self.save = self._now(args) - self.ended


def _rehearse(make: Callable, model: PreTrainedModel, args: RunArguments, clock: Callable[[], float]) -> Pace:
    """The pace of the slowest rank."""
    assert args.train_minutes is not None
    folder = Path(args.output_dir) / REHEARSAL

    def take() -> None:
        folder.parent.mkdir(parents=True, exist_ok=True)
        hold_folder(folder.parent)
        shutil.rmtree(folder, ignore_errors=True)  # of a rehearsal that was killed

    first_rank_decides(args, take)
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            some = rehearsal_arguments(args, folder, WARM_UP + MOST)
            for rate in {"learning_rate", "muon_learning_rate"} & vars(some).keys():
                if getattr(some, rate) is not None:  # so small that the weights hardly move and no step can diverge
                    setattr(some, rate, getattr(some, rate) * 1e-6)
            pace = _timed(make, copy.deepcopy(model), some, clock, PART * 60 * args.train_minutes)
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        release_folder(folder)
        if args.process_index == 0:
            shutil.rmtree(folder, ignore_errors=True)
        clear_device_cache(garbage_collection=True)  # a trainer and its callbacks refer to each other
    return Pace(*(max(each) for each in zip(*gather_object([pace]), strict=True)))


def rehearsal_arguments(args: Arguments, folder: Path, steps: int) -> Arguments:
    """The run's arguments for some steps alone, at one rate: nothing is logged, evaluated, saved or shared."""
    args = copy.copy(args)
    args.output_dir, args.max_steps, args.train_minutes = str(folder), steps, None
    args.lr_schedule, args.warmup_steps, args.min_lr_ratio, args.decay_until_step = "constant", 0, 0.0, None
    args.logging_strategy = args.eval_strategy = IntervalStrategy.NO
    args.save_strategy, args.load_best_model_at_end, args.eval_on_start = SaveStrategy.NO, False, False
    args.report_to, args.push_to_hub, args.disable_tqdm, args.logging_first_step = [], False, True, False
    return args


def _timed(
    make: Callable, model: PreTrainedModel, args: RunArguments, clock: Callable[[], float], seconds: float
) -> tuple[float, float, float, float]:
    """This rank's pace, `setup, step, evaluation, save`, of steps that take about `seconds`."""
    begun = clock()
    trainer = make(model, args)
    watch = _Stopwatch(trainer, clock, min(seconds, LONGEST))
    trainer.remove_callback(trainer.stop_on_request)  # there is nothing to save: a signal ends the process
    trainer.add_callback(watch)
    trainer.train()
    step = watch.step * _relative_size(trainer, watch.sizes)
    return watch.ready - begun, step, _time_of_evaluation(trainer, clock), watch.save


def _size(batch: dict[str, torch.Tensor]) -> int:
    """Tokens with padding, which the time of a step grows with."""
    return batch["input_ids"].numel()


def _relative_size(trainer: "ExactTrainer", timed: list[int]) -> float:
    """A batch of the run, in the mean, beside those that were timed: a few padded ones may be shorter or longer."""
    timed = gather_object(timed)
    if len(set(timed)) == 1:  # on all ranks, which go through the loader together
        return 1.0
    sizes = [_size(batch) for batch in itertools.islice(trainer.get_train_dataloader(), SIZED)]
    return statistics.mean(sizes) / statistics.mean(timed)


def _time_of_evaluation(trainer: "ExactTrainer", clock: Callable[[], float]) -> float:
    """Of a whole evaluation, from some of its batches, with samples and report."""
    trainer.model.eval()
    loader = trainer.get_eval_dataloader()
    batches = list(itertools.islice(loader, EVALUATED))
    trainer.prediction_step(trainer.model, batches[0], True)  # the first one finds its memory
    trainer.eval_sums[-1].tolist()
    started = clock()
    for batch in batches:
        trainer.prediction_step(trainer.model, batch, True)
        trainer.eval_sums[-1].tolist()  # waits for a GPU
    seconds = (clock() - started) / len(batches) * len(loader)
    started = clock()
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, Samples) and callback.takes_part(trainer.state):
            for prompt in callback.prompts:
                callback.sample(trainer.model, prompt)
    trainer.answer_metrics()
    trainer.write_report()
    return seconds + clock() - started
