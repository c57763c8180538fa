"""A learning-rate range test (Smith 2015, https://arxiv.org/abs/1506.01186): which learning rate a recipe wants.

The recipe itself is run with `lr_schedule: range_test` for some steps, in which the learning rate grows exponentially,
until the loss diverges; `suggest` reads a good one off the curve.
"""

import csv
import math
import runpy
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

from transformers import TrainerCallback

from llmkit.errors import UserError
from llmkit.recipe_kinds import RecipeKind

# The curve is smoothed over this part of it to each side: a quarter of a decade, where the test is over five.
WINDOW = 0.05
# How much of its fall the loss has done where the suggestion lies.
FALL = 0.95


@dataclass(frozen=True)
class Step:
    """One step of the test: its learning rate, and the loss before its update."""

    step: int
    learning_rate: float
    loss: float


class RangeTest(TrainerCallback):
    """Ends a run when its loss diverges."""

    def __init__(self):
        self.losses: list[float] = []

    def on_log(self, args, state, control, **kwargs):
        logs = kwargs["logs"]
        if "loss" in logs:
            self.losses.append(logs["loss"])
            if has_diverged(self.losses, half_width(state.max_steps)):
                control.should_training_stop = True


def half_width(num_steps: int) -> int:
    """Steps to each side that the smoothed curve is a mean of."""
    return max(1, round(WINDOW * num_steps))


def smooth(losses: list[float], half_width: int) -> list[float]:
    """The mean over as many steps on both sides, `half_width` where there are so many: it lags behind on neither."""
    smoothed = []
    for i in range(len(losses)):
        width = min(half_width, i, len(losses) - 1 - i)
        smoothed.append(statistics.fmean(losses[i - width : i + width + 1]))
    return smoothed


def has_diverged(losses: list[float], width: int) -> bool:
    """Whether the mean of the last losses has lost half of what was learned, and is a quarter above its lowest."""
    if not math.isfinite(losses[-1]):
        return True
    if len(losses) <= width:
        return False
    means = [statistics.fmean(losses[i : i + width]) for i in range(len(losses) - width + 1)]
    lowest = min(means)
    return means[-1] > lowest + max((means[0] - lowest) / 2, lowest / 4)


def suggest(steps: list[Step], half_width: int) -> float:
    """The learning rate at which the smoothed loss has done 95% of its fall.

    The points that are usually taken did worse beside sweeps of three small models with AdamW: the steepest descent of
    the smoothed loss lay up to 9 times below the sweep's best, fastai's "valley" up to 14 times, and the lowest loss,
    on a plateau where noise decides, up to 5 times above it. This one lay within a factor of 2.3 of all three.

    Raises:
        UserError: the loss never fell, or was no number from the start.
    """
    finite = [step for step in steps if math.isfinite(step.loss)]
    if not finite:
        raise UserError(f"the loss is {steps[0].loss} at the first step, whatever the learning rate: check the data")
    smoothed = smooth([step.loss for step in finite], half_width)
    first = statistics.fmean(step.loss for step in finite[:half_width])
    lowest = min(smoothed)
    if first - lowest < 0.01 * first:
        raise UserError(
            f"the loss began at {first:.3f} and never fell between {steps[0].learning_rate:.1e} and "
            f"{steps[-1].learning_rate:.1e}: if it rose at once, lower --min_lr; if it did not move, raise --max_lr"
        )
    limit = first - FALL * (first - lowest)
    return next(step.learning_rate for step, loss in zip(finite, smoothed, strict=True) if loss <= limit)


# What makes any recipe a test that leaves nothing behind but its log.
TEST = {"lr_schedule": "range_test", "warmup_steps": "0", "min_lr_ratio": "0", "decay_until_step": "null"}
TEST |= {"logging_strategy": "steps", "logging_steps": "1", "report_to": "none", "sample_prompts": "null"}
TEST |= {"eval_strategy": "no", "eval_on_start": "false", "save_strategy": "no", "load_best_model_at_end": "false"}
TEST |= {"push_to_hub": "false", "resume_from_checkpoint": "null"}
TEST_OF_KIND = {
    # The learning rate is the full batch's.
    "pretrain": {"batch_ramp_start": "null", "batch_ramp_tokens": "null", "monitor_steps": "0", "hellaswag_steps": "0"}
    | {"hellaswag_file": "null", "hellaswag_questions": "null"},
    "sft": {},
}


def run_recipe(config: Path, kind: RecipeKind, fields: list[str], test: dict[str, object]) -> None:
    """Run a recipe's script in this process as a range test.

    Args:
        fields: of the command line, which win over the file.
        test: what wins over both: the length of the test, its learning rates and its folder.
    """
    flags = [f"--{name}={value}" for name, value in (TEST | TEST_OF_KIND[kind.name] | test).items()]
    before = sys.argv
    sys.argv = [str(kind.script_path), "--config", str(config), *fields, *flags]
    try:
        runpy.run_path(str(kind.script_path), run_name="__main__")
    finally:
        sys.argv = before


def write_csv(steps: list[Step], half_width: int, path: Path) -> None:
    """`step,learning_rate,loss,smoothed`, a row a step."""
    smoothed = smooth([step.loss for step in steps], half_width)
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("step", "learning_rate", "loss", "smoothed"))
        for step, mean in zip(steps, smoothed, strict=True):
            writer.writerow((step.step, f"{step.learning_rate:.6g}", f"{step.loss:.6g}", f"{mean:.6g}"))


def draw(steps: list[Step], half_width: int, suggestion: float, title: str, path: Path) -> None:
    """The loss over the learning rate, raw and smoothed, with the suggestion."""
    from matplotlib.figure import Figure

    steps = [step for step in steps if math.isfinite(step.loss)]
    rates, losses = [step.learning_rate for step in steps], [step.loss for step in steps]
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    axes.semilogx(rates, losses, color="0.75", linewidth=1, label="loss of each step")
    axes.semilogx(rates, smooth(losses, half_width), color="C0", linewidth=2, label="smoothed")
    # What the loss diverges to would squeeze the part that matters.
    low, first = min(losses), losses[0]
    margin = max(first - low, 0.05 * first)
    axes.set_ylim(low - 0.1 * margin, first + 0.4 * margin)
    axes.axvline(suggestion, color="C1", linestyle="--", label=f"suggested: {suggestion:.1e}")
    axes.set(title=title, xlabel="learning rate", ylabel="training loss, nats per token")
    axes.grid(which="major", alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
