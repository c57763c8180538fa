"""How the learning rate goes over a run: one field, `lr_schedule`, for both recipes.

    cosine     up over the warm-up, down half a cosine to the floor (Loshchilov and Hutter 2017; GPT-3)
    linear     up over the warm-up, straight down to the floor
    wsd        up, stable, and down at the end only (Hu et al. 2024), so that a run can be made longer before it decays
    one_cycle  up, then down to almost nothing, Adam's beta1 the other way (Smith 2018): torch's OneCycleLR
    constant   up, and there it stays
    range_test from range_test_min_lr to range_test_max_lr, in equal steps of the logarithm: what `llmkit lr-find` runs

All but one_cycle are functions of the tokens seen, counted in full batches, so that a batch that grows (`batch_ramp`)
leaves the schedule where it was. The first step is a step: its learning rate is 1 / warmup_steps of the peak, not 0.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR
from transformers.training_args import OptimizerNames

from llmkit.errors import UserError
from llmkit.training.mixin import ArgumentsMixin

RANGE_TEST = "range_test"


@dataclass
class ScheduleArguments(ArgumentsMixin):
    """The schedule of a run, stated in one way."""

    DECISIVE: ClassVar[set[str]] = {"lr_schedule", "min_lr_ratio", "decay_until_step"}

    lr_schedule: Literal["cosine", "linear", "wsd", "one_cycle", "constant", "range_test"] = field(
        default="cosine",
        metadata={"help": "The shape of the learning rate over the run."},
    )
    min_lr_ratio: float = field(
        default=0.0,
        metadata={"help": "The value at which cosine, linear and wsd end, as a fraction of learning_rate."},
    )
    decay_until_step: int | None = field(
        default=None,
        metadata={"help": "The step at which cosine and linear reach their end. The default is the last step."},
    )
    wsd_decay_steps: float = field(
        default=0.2, metadata={"help": "The length of wsd's decay in steps, or below 1 as a fraction of the run."}
    )
    range_test_min_lr: float = field(default=1e-5, metadata={"help": "The learning rate of range_test's first step."})
    range_test_max_lr: float = field(default=1.0, metadata={"help": "The learning rate of range_test's last step."})
    lr_scheduler_type: str | None = field(default=None, metadata={"help": "Not supported: give lr_schedule."})

    def __post_init__(self):
        self.lr_scheduler_type = "linear"  # Trainer wants one, to be made an enum
        super().__post_init__()
        self.lr_scheduler_type = None
        if not 0 <= self.min_lr_ratio <= 1:
            raise UserError(f"min_lr_ratio={self.min_lr_ratio}: it lies between 0 and 1, such as 0.1")
        if self.min_lr_ratio and self.lr_schedule in ("one_cycle", "constant", "range_test"):
            raise UserError(
                f"min_lr_ratio={self.min_lr_ratio} is for cosine, linear and wsd, not {self.lr_schedule}: set it to 0"
            )
        if self.decay_until_step is not None and self.lr_schedule not in ("cosine", "linear"):
            raise UserError(f"decay_until_step is for cosine and linear, not {self.lr_schedule}: leave it out")
        if not (self.wsd_decay_steps > 0 and math.isfinite(self.wsd_decay_steps)):
            raise UserError(f"wsd_decay_steps={self.wsd_decay_steps}: give steps, or a fraction of the run above 0")
        if not 0 < self.range_test_min_lr < self.range_test_max_lr < math.inf:
            raise UserError(
                f"range_test_min_lr={self.range_test_min_lr:g} and range_test_max_lr={self.range_test_max_lr:g}: give "
                "two above 0, the lower one first"
            )
        if self.lr_schedule == RANGE_TEST and self.learning_rate == 0:
            raise UserError("learning_rate=0: the test scales the recipe's learning rate, so give it one above 0")
        if self.max_steps > 0:  # else known when the data is: see `ExactTrainer.create_scheduler`
            check_schedule(self, self.max_steps)
        if self.lr_schedule == "one_cycle" and self.adam_beta1 != 0.9:
            raise UserError(
                f"adam_beta1={self.adam_beta1} has no effect: one_cycle takes beta1 from 0.95 to 0.85 and back"
            )


def relative_learning_rate(args: ScheduleArguments, num_steps: int, before: float, after: float) -> float:
    """The learning rate of a step as a fraction of its peak, for every schedule but one_cycle.

    Args:
        num_steps: of the run.
        before, after: what was trained before the step, and with it, in full batches: s and s + 1 for step s where
            all batches are of one size.
    """
    if args.lr_schedule == RANGE_TEST:
        low, high = args.range_test_min_lr, args.range_test_max_lr
        return low * (high / low) ** (before / max(1, num_steps - 1)) / args.learning_rate
    warmup = args.get_warmup_steps(num_steps)
    if before < warmup:
        return min(1.0, after / warmup)
    floor = args.min_lr_ratio
    match args.lr_schedule:
        case "constant":
            return 1.0
        case "wsd":
            length = _wsd_decay_steps(args, num_steps)
            start = num_steps - length
            # Hägele et al. 2024 found 1 - sqrt better than a straight line or a cosine.
            fraction = 1 - math.sqrt(min(1.0, max(0.0, before - start) / length))
        case _:
            end = args.decay_until_step or num_steps
            progress = (before - warmup) / (end - warmup) if before < end else 1.0
            fraction = 1 - progress if args.lr_schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return floor + (1 - floor) * fraction


def _wsd_decay_steps(args: ScheduleArguments, num_steps: int) -> int:
    steps = args.wsd_decay_steps
    return math.ceil(num_steps * steps) if steps < 1 else int(steps)


def check_schedule(args: ScheduleArguments, num_steps: int) -> None:
    """Refuse phases that do not fit into a run of `num_steps` full batches.

    Raises:
        UserError: the line says which.
    """
    warmup = args.get_warmup_steps(num_steps)
    if warmup > num_steps:
        raise UserError(f"warmup_steps={warmup} is more than the {num_steps} steps of the run: make it shorter")
    if args.lr_schedule == "wsd" and warmup + _wsd_decay_steps(args, num_steps) > num_steps:
        raise UserError(
            f"warmup_steps={warmup} and wsd_decay_steps={_wsd_decay_steps(args, num_steps)} do not fit into a run of "
            f"{num_steps} steps: make one shorter"
        )
    if args.decay_until_step is not None and not warmup < args.decay_until_step <= num_steps:
        raise UserError(
            f"decay_until_step={args.decay_until_step} lies between the end of the warm-up ({warmup}) and the last "
            f"step ({num_steps}), or is left out"
        )
    if args.lr_schedule == "one_cycle" and warmup and not 1 < warmup < num_steps:
        raise UserError(
            f"warmup_steps={warmup}: one_cycle rises for 2 steps at least, and fewer than the {num_steps} of the run; "
            "left out, for 30% of it"
        )


def decisive_length(args: ScheduleArguments) -> dict:
    """The arguments that say how long the run is, where its learning rates depend on that: else it may be made longer.

    A wsd run is made to be gone on with from before its decay, so neither its length nor wsd_decay_steps is fixed. A
    warm-up that is a fraction of the run is over by then.
    """
    falls_to_the_end = args.lr_schedule in ("cosine", "linear") and args.decay_until_step is None
    if not (falls_to_the_end or args.lr_schedule == "one_cycle"):
        return {}
    has_steps = args.max_steps > 0
    return {
        "max_steps": args.max_steps if has_steps else None,
        "num_train_epochs": None if has_steps else args.num_train_epochs,
    }


def describe_schedule(args: ScheduleArguments, num_steps: int) -> str:
    """The schedule in words, as in "warm-up 75 steps, cosine to 10% at step 1,750"."""
    warmup = args.get_warmup_steps(num_steps)
    match args.lr_schedule:
        case "one_cycle":
            return f"one cycle: up to step {warmup or round(0.3 * num_steps):,}, down to 0 at step {num_steps:,}"
        case "constant":
            course = "constant"
        case "range_test":
            return f"range test, from {args.range_test_min_lr:g} up to {args.range_test_max_lr:g}"
        case "wsd":
            start = num_steps - _wsd_decay_steps(args, num_steps)
            course = f"stable, from step {start:,} down to {args.min_lr_ratio:.0%} at step {num_steps:,}"
        case name:
            course = f"{name} to {args.min_lr_ratio:.0%} at step {args.decay_until_step or num_steps:,}"
    return f"warm-up {warmup:,} steps, {course}" if warmup else course


def create_schedule(
    optimizer: Optimizer,
    args: ScheduleArguments,
    num_steps: int,
    position: Callable[[int], float] = float,
) -> LRScheduler:
    """The scheduler, to be stepped once after each optimizer step. Each group keeps its own peak, its `lr`.

    Args:
        num_steps: of the run, in full batches.
        position: full batches trained before step s (a fraction where the first ones are smaller).

    Raises:
        UserError: an optimizer without a beta1 or momentum that one_cycle could cycle.
    """
    if args.lr_schedule == "one_cycle":
        warmup = args.get_warmup_steps(num_steps)
        peaks = [group["lr"] for group in optimizer.param_groups]
        try:
            return OneCycleLR(optimizer, peaks, num_steps, pct_start=warmup / num_steps if warmup else 0.3)
        except (ValueError, KeyError) as error:
            optim = OptimizerNames(args.optim).value
            raise UserError(f"one_cycle cycles beta1 or momentum, and optim={optim} has neither") from error
    return LambdaLR(optimizer, lambda s: relative_learning_rate(args, num_steps, position(s), position(s + 1)))
