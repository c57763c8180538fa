"""Is what trains a run right? Some of its steps are taken and compared with what they mean.

The checks are given what makes the run's trainer, as `budget.fix_length` is. What they compare with is the
mean loss of one batch in one piece, without Trainer's division, and a run that nobody stopped. Under `accelerate
launch` all ranks take part.
"""

import copy
import itertools
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from accelerate.utils import broadcast_object_list, gather_object
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from llmkit.errors import UserError
from llmkit.files import release_folder
from llmkit.model.modeling_gpt2 import GPT2LMHeadModel
from llmkit.planning.doctor import ERROR, OK, WARNING, Finding
from llmkit.training.arguments import PretrainArguments
from llmkit.training.budget import rehearsal_arguments
from llmkit.training.pretrain_trainer import PretrainTrainer

Make = Callable[[GPT2LMHeadModel, PretrainArguments], PretrainTrainer]

PIECES = 4  # micro-batches of a rank whose gradient is compared with that of one piece
ROUNDING = {"no": 1e-4, "bf16": 5e-2, "fp16": 5e-2}  # of a gradient, relative, by precision
NEAR = 0.05  # of ln V: how far the first loss may be from it
STEPS, SECONDS = 60, 15.0  # the most that overfitting takes
PACE_SECONDS, PACE_STEPS = 8.0, 200
STEADY = 1.3  # times the median: what nine of ten steps have to stay below


def examine_training(
    make: Make, model: GPT2LMHeadModel, args: PretrainArguments, block_size: int, trained: bool = False
) -> Iterator[Finding]:
    """All checks, each made when it is asked for. The model is left as it was.

    Args:
        make: the run's trainer of a model and arguments.
        model: as the run would start with it.
        args: the run's.
        block_size: tokens of a window.
        trained: whether the model has learned before.
    """
    checks = {
        "gradient": gradient_of_parts,
        "first loss": partial(first_loss, trained=trained),
        "overfitting": one_batch_is_learned,
        "save and resume": resume_goes_on,
        "pace": pace_is_steady,
    }
    for name, check in checks.items():
        with _folder_of_all_ranks(args) as folder:
            small = partial(_small, args, folder / "run", block_size)
            try:
                state, text, fix = check(make, copy.deepcopy(model), small)
            except (RuntimeError, UserError) as error:
                state, text, fix = ERROR, f"{type(error).__name__}: {str(error).splitlines()[0]}", ""
        yield Finding(name, state, text, fix if state != OK else "")


@contextmanager
def _folder_of_all_ranks(args: PretrainArguments) -> Iterator[Path]:
    """A new folder on the disk of the runs, which is removed afterwards."""
    place = Path(args.output_dir or ".").absolute()
    while not place.exists():
        place = place.parent
    made = tempfile.TemporaryDirectory(prefix=".preflight-", dir=place) if args.process_index == 0 else None
    (name,) = broadcast_object_list([made.name if made else None])
    try:
        yield Path(name)
    finally:
        gather_object([None])  # no rank reads in it any more
        release_folder(Path(name) / "run")
        if made:
            made.cleanup()


Small = Callable[..., PretrainArguments]
Verdict = tuple[Literal["ok", "warning", "error"], str, str]  # state, text, fix


def _small(args: PretrainArguments, folder: Path, block_size: int, steps: int, pieces: int = 1, windows: int = 1):
    """The run's arguments for some steps of `pieces` micro-batches of `windows` windows on each rank."""
    small = rehearsal_arguments(args, folder, steps)
    small.per_device_train_batch_size = windows
    small.total_batch_tokens = pieces * windows * args.world_size * block_size
    small.batch_ramp_start = small.batch_ramp_tokens = None
    small.monitor_steps = small.hellaswag_steps = 0
    small.sample_prompts, small.torch_compile = [], False  # each of the trainers here would compile anew
    return small


class Watch(TrainerCallback):
    """Notes the loss and the gradient of each step, saves after the first if asked to, and times the steps.

    Attributes:
        losses: of each step, summed over its micro-batches on this rank.
        gradient: of the last step, by parameter.
        seconds: of each step.
    """

    def __init__(self, trainer: PretrainTrainer, saves: bool = False, keeps_gradient: bool = False, patience=math.inf):
        self.trainer, self.saves, self.keeps_gradient, self.patience = trainer, saves, keeps_gradient, patience
        self.losses: list[float] = []
        self.seconds: list[float] = []
        self.gradient: list[torch.Tensor] = []
        trainer.add_callback(self)

    def on_step_begin(self, args, state, control, **kwargs):
        self.started = time.perf_counter()

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.losses.append(sum(loss.item() for loss in self.trainer.guard.micro_losses))
        if self.keeps_gradient:
            self.gradient = _gradient(kwargs["model"])

    def on_step_end(self, args, state, control, **kwargs):
        if args.device.type != "cpu":
            torch.accelerator.synchronize(args.device)
        self.seconds.append(time.perf_counter() - self.started)
        control.should_save = self.saves and state.global_step == 1
        if self.patience < math.inf:
            enough = sum(self.seconds) > self.patience and len(self.seconds) > 4
            control.should_training_stop = any(gather_object([enough]))  # all ranks after the same step


def gradient_of_parts(make: Make, model: GPT2LMHeadModel, small: Small) -> Verdict:
    """Micro-batches on all ranks against the same windows in one piece, which no Trainer has divided."""
    _without_dropout(model)
    whole = copy.deepcopy(model)
    args = small(steps=1, pieces=PIECES)
    args.max_grad_norm = 0.0  # clipping would hide a gradient that is too large
    trainer = make(model, args)
    # private: what Trainer gives to a step, on its device
    batches = [trainer._prepare_inputs(batch) for batch in itertools.islice(trainer.get_train_dataloader(), PIECES)]
    batch = {name: trainer.accelerator.gather(torch.cat([each[name] for each in batches])) for name in batches[0]}
    watch = Watch(trainer, keeps_gradient=True)
    trainer.train()

    # pyrefly: ignore[bad-argument-type]  a decorator of transformers hides what `to` takes
    whole.to(args.device).train()
    _mean_loss(trainer, whole, batch).backward()
    expected = _gradient(whole)
    if not (size := _norm(expected)):
        return ERROR, "it is zero", "the loss does not depend on the weights"
    error = _norm([a - b for a, b in zip(expected, watch.gradient, strict=True)]) / size
    parts = f"{PIECES} micro-batches on {args.world_size} rank(s)"
    text = f"of one batch in one piece and in {parts}: the difference is {error:.1e} of it"
    fix = "the loss is not divided by the targets of the whole batch: see num_items_in_batch"
    return (OK if error < ROUNDING[args.mixed_precision] else ERROR), text, fix


def first_loss(make: Make, model: GPT2LMHeadModel, small: Small, trained: bool) -> Verdict:
    """New weights know nothing: every token is as likely as any other, and the loss is ln V."""
    trainer, batch = _one_batch(make, model, small)
    with torch.no_grad():
        loss = _mean_loss(trainer, trainer.model.eval(), batch).item()
    nothing = math.log(model.config.vocab_size)
    text = f"{loss:.3f} before the first step; ln {model.config.vocab_size:,} is {nothing:.3f}"
    if trained:
        return (
            (OK if loss < nothing else WARNING),
            text,
            "init_from has not learned this kind of text, nor this tokenizer",
        )
    fix = "the loss is not the mean over the targets, or the initialisation is another"
    return (OK if abs(loss - nothing) < NEAR * nothing else ERROR), text, fix


def one_batch_is_learned(make: Make, model: GPT2LMHeadModel, small: Small) -> Verdict:
    """A model that cannot learn two windows by heart, with the recipe's optimizer, learns nothing."""
    trainer, batch = _one_batch(make, model, small)
    optimizer = trainer.create_optimizer()
    losses, until = [], time.perf_counter() + SECONDS
    trainer.model.train()
    while len(losses) < STEPS and time.perf_counter() < until and (not losses or losses[-1] > losses[0] / 2):
        loss = _mean_loss(trainer, trainer.model, batch)
        loss.backward()
        nn.utils.clip_grad_norm_(trainer.model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    text = f"the loss of one batch went from {losses[0]:.3f} to {losses[-1]:.3f} in {len(losses)} steps"
    if losses[-1] <= losses[0] / 2:
        return OK, text, ""
    slow = losses[-1] < 0.95 * losses[0]
    return (WARNING if slow else ERROR), text, "look at learning_rate; llmkit lr-find proposes one"


def resume_goes_on(make: Make, model: GPT2LMHeadModel, small: Small) -> Verdict:
    """Three steps with a save after the first, and the last two again from there."""
    args = small(steps=3, pieces=2)
    again = copy.deepcopy(model)
    trainer = make(model, args)
    watch = Watch(trainer, saves=True)
    trainer.train()
    resumed = make(again, copy.copy(args))
    rewatch = Watch(resumed)
    resumed.train(resume_from_checkpoint=str(Path(args.output_dir) / "checkpoint-1"))
    error = max(abs(a - b) / abs(a) for a, b in zip(watch.losses[1:], rewatch.losses, strict=True))
    exact = "exactly" if error == 0 else f"to {error:.1e}"
    text = f"the losses of the next two steps are those of a run that was not stopped, {exact}"
    fix = "the checkpoint lacks something: the optimizer's state, random numbers or the place in the data"
    # A GPU may add up a gradient in another order.
    return (OK if error <= (0 if args.device.type == "cpu" else 1e-4) else ERROR), text, fix


def pace_is_steady(make: Make, model: GPT2LMHeadModel, small: Small) -> Verdict:
    """The recipe's micro-batch, one a step; the first steps find their memory and do not count."""
    args = small(steps=PACE_STEPS)
    trainer = make(model, args)
    watch = Watch(trainer, patience=PACE_SECONDS)
    trainer.train()
    seconds = watch.seconds[2:]
    median = statistics.median(seconds)
    slow = sorted(seconds)[int(0.9 * len(seconds))] / median
    speed = args.total_batch_tokens / median
    text = f"{speed:,.0f} tokens/s in small steps; 9 of 10 of {len(seconds)} take at most {slow:.2f} times the median"
    fix = "something else is at work on this machine, or a GPU is too hot: see nvidia-smi or top"
    return (OK if slow <= STEADY else WARNING), text, fix


def _one_batch(make: Make, model: GPT2LMHeadModel, small: Small) -> tuple[PretrainTrainer, dict[str, torch.Tensor]]:
    """A trainer, and a batch of two windows on its device."""
    _without_dropout(model)
    trainer = make(model, small(steps=1, windows=2))
    # private: likewise
    return trainer, trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))


def _mean_loss(trainer: PretrainTrainer, model: GPT2LMHeadModel, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Of a batch by itself: nothing is said of others that belong to its step."""
    with trainer.accelerator.autocast():
        loss = trainer.compute_loss(model, batch)
    assert isinstance(loss, torch.Tensor), "without return_outputs"
    return loss


def _without_dropout(model: GPT2LMHeadModel) -> None:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    for name in [name for name in vars(model.config) if name.endswith(("_pdrop", "_dropout"))]:
        setattr(model.config, name, 0.0)


def _gradient(model: nn.Module) -> list[torch.Tensor]:
    """A copy of the gradient of each parameter that has one, whole."""
    found = (parameter.grad for parameter in model.parameters() if parameter.grad is not None)
    return [(g.full_tensor() if isinstance(g, DTensor) else g).detach().clone() for g in found]


def _norm(tensors: list[torch.Tensor]) -> float:
    return nn.utils.get_total_norm(tensors).item()
