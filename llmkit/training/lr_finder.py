"""A learning-rate range test (Smith 2015, https://arxiv.org/abs/1506.01186): which learning rate a recipe wants.

A copy of the run, with its own weights, batches and optimizer, is trained for some steps while the learning rate grows
exponentially, until the loss diverges; `suggest` reads a good one off the curve.
"""

import csv
import math
import statistics
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainingArguments
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from llmkit.data.arguments import DataArguments
from llmkit.data.prepare import prepare_pretraining_data
from llmkit.data.windows import TokenWindows
from llmkit.errors import UserError
from llmkit.finetuning.adapters import (
    AdapterArguments,
    check_run,
    load_base_config,
    load_base_model,
    load_chat_tokenizer,
)
from llmkit.finetuning.audit import audit
from llmkit.finetuning.conversations import ConversationArguments, encode_all, load_conversations
from llmkit.finetuning.sft_trainer import ConversationTrainer, SFTArguments
from llmkit.model.arguments import REPLACES, ModelArguments
from llmkit.recipe_parser import RecipeParser
from llmkit.training.arguments import PretrainArguments
from llmkit.training.base_trainer import ExactTrainer
from llmkit.training.pretrain_trainer import PretrainTrainer

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


class RangeTest(ExactTrainer):
    """A base for a Trainer whose run is the test: `class Test(RangeTest, PretrainTrainer)`.

    It replaces the schedule, and takes what is logged for itself: nothing of it reaches a file or a service.
    """

    def test(self, min_lr: float, max_lr: float) -> list[Step]:
        """Train until the loss diverges, or all of `max_steps` are done. All ranks get the same steps."""
        # The learning rate of each step, equally spaced in its logarithm.
        self.rates = torch.logspace(math.log10(min_lr), math.log10(max_lr), self.args.max_steps, dtype=torch.double)
        self.steps: list[Step] = []
        self.train()
        return self.steps

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> LambdaLR:
        """Each group of the optimizer keeps its ratio to `learning_rate`."""
        factors = [*(self.rates / self.args.learning_rate).tolist(), 0.0]  # the last is for after the last step
        self.lr_scheduler = LambdaLR(optimizer or self.optimizer, factors.__getitem__)
        return self.lr_scheduler

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" not in logs:
            return
        step = self.state.global_step
        self.steps.append(Step(step, self.rates[step - 1].item(), logs["loss"]))
        if has_diverged([step.loss for step in self.steps], half_width(self.args.max_steps)):
            self.control.should_training_stop = True


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


class PretrainRangeTest(RangeTest, PretrainTrainer):
    """The test of a pretraining recipe."""


class ConversationRangeTest(RangeTest, ConversationTrainer):
    """The test of a fine-tuning recipe."""


def pretraining_test(recipe: str, fields: list[str], num_steps: int, folder: str) -> PretrainRangeTest:
    """The trainer that recipes/pretrain.py makes, for so many steps that leave nothing behind."""
    parser = RecipeParser((DataArguments, ModelArguments, PretrainArguments), recipe, REPLACES)
    data_args, model_args, args = parser.parse(fields)
    block_size = model_args.block_size or model_args.config().n_positions
    args.batch_ramp_start = args.batch_ramp_tokens = None  # the learning rate is the full batch's
    args.monitor_steps = args.hellaswag_steps = 0
    args.set_accumulation(block_size)
    leave_nothing(args, num_steps, folder)
    tokenizer, manifest = prepare_pretraining_data(data_args)
    windows = [TokenWindows(manifest, split, block_size) for split in ("train", "validation")]
    return PretrainRangeTest(model_args.model(tokenizer, args.seed), args, *windows, processing_class=tokenizer)


def fine_tuning_test(recipe: str, fields: list[str], num_steps: int, folder: str) -> ConversationRangeTest:
    """The trainer that recipes/sft_qlora.py makes, for so many steps that leave nothing behind."""
    parser = RecipeParser((ConversationArguments, AdapterArguments, SFTArguments), recipe)
    data_args, adapter_args, args = parser.parse(fields)
    check_run(args, load_base_config(adapter_args), args.max_length)
    leave_nothing(args, num_steps, folder)
    tokenizer = load_chat_tokenizer(adapter_args)
    train, validation = load_conversations(data_args)
    rows, validation_rows = encode_all(train, tokenizer), encode_all(validation, tokenizer)
    audit(train, rows, tokenizer, args.max_length).check()
    model = load_base_model(adapter_args, args.compute_dtype, args.device)
    lora_config = adapter_args.lora_config(model)
    return ConversationRangeTest(model, args, lora_config, rows, validation_rows, tokenizer, train.description)


# D6: a recipe's file is named after its script.
TESTS = {"pretrain": pretraining_test, "sft": fine_tuning_test}


def leave_nothing(args: TrainingArguments, num_steps: int, folder: str) -> None:
    """Log each step, and nowhere but here; neither evaluate nor save.

    Set after the recipe was read and checked, for its own steps and schedule are not to be checked against these.
    """
    if args.learning_rate == 0:
        raise UserError("learning_rate=0: the test scales the recipe's learning rate, so give it one above 0")
    args.output_dir, args.max_steps = folder, num_steps
    args.logging_strategy, args.logging_steps = IntervalStrategy.STEPS, 1
    args.eval_strategy, args.save_strategy, args.eval_on_start = IntervalStrategy.NO, SaveStrategy.NO, False
    args.report_to, args.push_to_hub, args.sample_prompts = [], False, []
    args.load_best_model_at_end = False


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
