"""Is what trains a run right? Some of its steps are taken and compared with what they mean.

The checks are given what makes the run's trainer, as `budget.fix_length` is, whatever the run trains. What they
compare with is the mean loss of one batch in one piece, without Trainer's division, and a run that nobody stopped.
Under `accelerate launch` all ranks take part.
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
import torch.nn.functional as F
from accelerate.utils import broadcast_object_list, gather_object
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, TrainerCallback

from llmkit.errors import UserError
from llmkit.files import release_folder
from llmkit.finetuning.preference_arguments import DPOArguments
from llmkit.model.loss import IGNORE_INDEX
from llmkit.planning.doctor import ERROR, OK, WARNING, Finding
from llmkit.training.arguments import PretrainArguments
from llmkit.training.base_trainer import ExactTrainer
from llmkit.training.budget import rehearsal_arguments
from llmkit.training.run_arguments import RunArguments

Make = Callable[[PreTrainedModel, RunArguments], ExactTrainer]
Start = Literal["new weights", "trained weights", "reference"]  # what a run starts from

PIECES = 4  # micro-batches of a rank whose gradient is compared with that of one piece
ROUNDING = {"no": 1e-4, "bf16": 5e-2, "fp16": 5e-2}  # of a gradient, relative, by precision
# How far the first loss may be from what it has to be, relative. The reference is computed as the model is.
NEAR: dict[Start, float] = {"new weights": 0.05, "reference": 1e-3}
# A batch is learned when its loss is below this part of the first one. New weights learn fast; adapters are trained at
# rates that keep what a model knows.
LEARNED: dict[Start, float] = {"new weights": 0.5, "trained weights": 0.9, "reference": 0.9}
STEPS, SECONDS = 60, 15.0  # the most that overfitting takes
PACE_SECONDS, PACE_STEPS = 8.0, 200
STEADY = 1.3  # times the median: what nine of ten steps have to stay below


def examine_training(
    make: Make, model: PreTrainedModel, args: RunArguments, start: Start, block_size: int | None = None
) -> Iterator[Finding]:
    """All checks, each made when it is asked for. The model is left as it was.

    Args:
        make: the run's trainer of a model and arguments.
        model: as the run would give it to `make`.
        args: the run's.
        start: new weights, ones that have learned before, or for preference tuning those of the reference.
        block_size: tokens of a window, in pretraining.
    """
    checks = {
        "gradient": gradient_of_parts,
        "first loss": partial(first_loss, start=start),
        "overfitting": partial(one_batch_is_learned, learned=LEARNED[start]),
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
def _folder_of_all_ranks(args: RunArguments) -> Iterator[Path]:
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


Small = Callable[..., RunArguments]
Verdict = tuple[Literal["ok", "warning", "error"], str, str]  # state, text, fix


def _small(args: RunArguments, folder: Path, block_size: int | None, steps: int, pieces: int = 1, rows: int = 1):
    """The run's arguments for some steps of `pieces` micro-batches of `rows` rows on each rank."""
    small = rehearsal_arguments(args, folder, steps)
    small.per_device_train_batch_size = rows
    if isinstance(small, PretrainArguments):
        assert block_size is not None, "of its windows"
        small.total_batch_tokens = pieces * rows * args.world_size * block_size
        small.batch_ramp_start = small.batch_ramp_tokens = None
        small.monitor_steps = small.hellaswag_steps = 0
    else:
        small.gradient_accumulation_steps = pieces
    small.logging_steps = small.eval_steps = small.save_steps = 1  # Trainer compares them with a checkpoint's
    small.sample_prompts, small.torch_compile = [], False  # each of the trainers here would compile anew
    return small


class Watch(TrainerCallback):
    """Notes the loss and the gradient of each step, saves after the first if asked to, and times the steps.

    Attributes:
        losses: of each step, summed over its micro-batches on this rank.
        gradient: of the last step, by parameter.
        seconds: of each step.
    """

    def __init__(self, trainer: ExactTrainer, saves: bool = False, keeps_gradient: bool = False, patience=math.inf):
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


def gradient_of_parts(make: Make, model: PreTrainedModel, small: Small) -> Verdict:
    """Micro-batches on all ranks against the same rows in one piece, which no Trainer has divided."""
    args = small(steps=1, pieces=PIECES)
    args.max_grad_norm = 0.0  # clipping would hide a gradient that is too large
    note = ""
    if isinstance(args, DPOArguments) and "sft" in args.loss_type:
        # TRL's SFT term is a mean over the tokens of each micro-batch, so that its parts are not the whole.
        args.loss_type, args.loss_weights = ["sigmoid"], None
        note = ", without the SFT term"
    trainer = make(model, args)
    _without_dropout(trainer.model)
    batch = _one_piece(trainer, PIECES)
    if not getattr(trainer.model, "is_loaded_in_4bit", False):  # those are there, and refuse to be moved
        trainer.model.to(args.device)
    _mean_loss(trainer, trainer.model.train(), batch).backward()
    expected = _gradient(trainer.model)
    trainer.model.zero_grad()
    watch = Watch(trainer, keeps_gradient=True)
    trainer.train()

    if not (size := _norm(expected)):
        return ERROR, "it is zero", "the loss does not depend on the weights"
    error = _norm([a - b for a, b in zip(expected, watch.gradient, strict=True)]) / size
    parts = f"{PIECES} micro-batches on {args.world_size} rank(s)"
    text = f"of one batch in one piece and in {parts}{note}: the relative difference is {error:.1e}"
    fix = "the loss is not divided by the targets of the whole batch: see num_items_in_batch"
    return (OK if error < ROUNDING[args.mixed_precision] else ERROR), text, fix


def first_loss(make: Make, model: PreTrainedModel, small: Small, start: Start) -> Verdict:
    """New weights know nothing: every token is as likely as any other, and the loss is ln V.

    Preference tuning starts from its reference: either answer of a pair is as likely as before, and the loss is ln 2.
    """
    trainer, batch = _one_batch(make, model, small)
    trainer.model.eval()
    with torch.no_grad():
        loss = trainer.metrics_of(trainer.sum_loss(trainer.model, batch).tolist(), trainer.eval_dataset)["loss"]
    choices = 2 if start == "reference" else trainer.model.config.vocab_size
    nothing = math.log(choices)
    text = f"{loss:.3f} before the first step; ln {choices:,} is {nothing:.3f}"
    if start == "trained weights":
        fix = "the model has not learned this kind of text, nor this tokenizer"
        return (OK if loss < nothing else WARNING), text, fix
    fix = "the loss is not the mean over the targets, or the initialisation is another"
    if start == "reference":
        fix = "the model that is trained is not the one that it is compared with"
    return (OK if abs(loss - nothing) < NEAR[start] * nothing else ERROR), text, fix


def one_batch_is_learned(make: Make, model: PreTrainedModel, small: Small, learned: float) -> Verdict:
    """A model that cannot learn two rows by heart, with the recipe's optimizer, learns nothing."""
    trainer, batch = _one_batch(make, model, small)
    optimizer = trainer.create_optimizer()
    losses, until = [], time.perf_counter() + SECONDS
    trainer.model.train()
    while len(losses) < STEPS and time.perf_counter() < until and (not losses or losses[-1] > learned * losses[0]):
        loss = _mean_loss(trainer, trainer.model, batch)
        loss.backward()
        nn.utils.clip_grad_norm_(trainer.model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    text = f"the loss of one batch went from {losses[0]:.3f} to {losses[-1]:.3f} in {len(losses)} steps"
    if losses[-1] <= learned * losses[0]:
        return OK, text, ""
    slow = losses[-1] < (0.1 * learned + 0.9) * losses[0]  # a tenth of the way
    return (WARNING if slow else ERROR), text, "look at learning_rate; llmkit lr-find proposes one"


def resume_goes_on(make: Make, model: PreTrainedModel, small: Small) -> Verdict:
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


def pace_is_steady(make: Make, model: PreTrainedModel, small: Small) -> Verdict:
    """One row a step; the first steps find their memory and do not count."""
    args = small(steps=PACE_STEPS)
    trainer = make(model, args)
    watch = Watch(trainer, patience=PACE_SECONDS)
    trainer.train()
    seconds = watch.seconds[2:]
    median = statistics.median(seconds)
    slow = sorted(seconds)[int(0.9 * len(seconds))] / median
    text = f"{median:.2g} s a step of one row; 90% of {len(seconds)} steps take at most {slow:.2f} times the median"
    fix = "something else is at work on this machine, or a GPU is too hot: see nvidia-smi or top"
    return (OK if slow <= STEADY else WARNING), text, fix


def _one_batch(make: Make, model: PreTrainedModel, small: Small) -> tuple[ExactTrainer, dict[str, torch.Tensor]]:
    """A trainer, and a batch of two rows on its device."""
    trainer = make(model, small(steps=1, rows=2))
    _without_dropout(trainer.model)
    # private: what Trainer gives to a step, on its device
    return trainer, trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))


def _one_piece(trainer: ExactTrainer, pieces: int) -> dict[str, torch.Tensor]:
    """The next micro-batches of all ranks as one batch, on this rank's device."""
    own = [dict(batch) for batch in itertools.islice(trainer.get_train_dataloader(), pieces)]
    batches = [
        {name: value.cpu() for name, value in batch.items() if isinstance(value, torch.Tensor) and value.dim() == 2}
        for batch in gather_object(own)
    ]
    if "position_ids" in batches[0]:  # packed: each is one long row already, whose parts follow from the positions
        whole = {name: torch.cat([batch[name] for batch in batches], dim=1) for name in batches[0]}
    else:
        longest = max(batch["input_ids"].shape[1] for batch in batches)
        for batch in batches:
            for name, tensor in batch.items():
                filler = IGNORE_INDEX if "labels" in name else 0
                batch[name] = F.pad(tensor, (0, longest - tensor.shape[1]), value=filler)
        # Of pairs, first all preferred answers, then all others.
        halves = 2 if "completion_mask" in batches[0] else 1
        whole = {
            name: torch.cat([batch[name].chunk(halves)[half] for half in range(halves) for batch in batches])
            for name in batches[0]
        }
    # private: likewise
    return trainer._prepare_inputs(whole)


def _mean_loss(trainer: ExactTrainer, model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Of a batch by itself: nothing is said of others that belong to its step."""
    with trainer.accelerator.autocast():
        loss = trainer.compute_loss(model, batch)
    assert isinstance(loss, torch.Tensor), "without return_outputs"
    return loss


def _without_dropout(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in [name for name, value in vars(module).items() if name.endswith("_dropout") and value]:
            setattr(module, name, 0.0)  # of attention, which takes a number
    for name in [name for name in vars(model.config) if name.endswith(("_pdrop", "_dropout"))]:
        setattr(model.config, name, 0.0)


def _gradient(model: nn.Module) -> list[torch.Tensor]:
    """A copy of the gradient of each parameter that has one, whole."""
    found = (parameter.grad for parameter in model.parameters() if parameter.grad is not None)
    return [(g.full_tensor() if isinstance(g, DTensor) else g).detach().clone() for g in found]


def _norm(tensors: list[torch.Tensor]) -> float:
    return nn.utils.get_total_norm(tensors).item()
