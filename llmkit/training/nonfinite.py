"""Steps that would do harm: a loss or a gradient that is not finite, or a loss far above those before it.

The step is judged after its gradient is summed over ranks and clipped, and before the optimizer moves: what is left
out reaches neither weights nor moments. Its text counts as trained, so batches and schedule stay where they are, and a
resumed run leaves out the same steps.
"""

import math
import statistics
from collections.abc import Callable
from typing import NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from llmkit.console import say
from llmkit.errors import UserError

WINDOW = 128  # steps that a loss is compared with, as in llm.c
FEWEST = 32  # with fewer of them nothing is called a spike
MAX_SKIPPED = 10  # steps left out of any 1,000
AMONG = 1000


class Pending(NamedTuple):
    """A step whose loss is still on its way from the device, where the optimizer has judged it."""

    step: int
    losses: torch.Tensor
    loss: torch.Tensor
    arrived: torch.cuda.Event | None


class StepGuard(TrainerCallback, ExportableState):
    """Judges each step, and stops the run or leaves the step out.

    torch's fused optimizers leave out a step by themselves where a tensor of the device says so. There the verdict is
    read while the next step is computed, or before anything is saved, and the device never waits. With other
    optimizers, under FSDP, and where spikes are judged, it is read before the optimizer moves.

    Args:
        accelerator: whose ranks share the losses.
        log: `trainer.log`.
        describe: what to say of the text of a micro-batch, by step, rank and micro-batch.
    """

    def __init__(
        self, accelerator: Accelerator, log: Callable[[dict], None], describe: Callable[[int, int, int], str]
    ):
        self.accelerator, self.log, self.describe = accelerator, log, describe
        self.micro_losses: list[torch.Tensor] = []  # of this rank's micro-batches of the step, on its device
        self.grad_norm: torch.Tensor | float = 0.0  # of the step, over all ranks
        self.recent: list[float] = []  # losses of the steps before
        self.skipped: list[int] = []  # steps left out
        self.pending: Pending | None = None

    def state(self) -> dict:
        """What a checkpoint keeps, so that a resumed run judges as an uninterrupted one."""
        return {"args": {}, "attributes": {"recent": self.recent, "skipped": self.skipped}}

    def on_train_begin(self, args, state, control, **kwargs):
        # Trainer restores callbacks only as objects of its own making.
        saved = state.stateful_callbacks.get(type(self).__name__, {}).get("attributes", {})
        self.recent, self.skipped = saved.get("recent", []), saved.get("skipped", [])
        self.pending = None

    def on_step_begin(self, args, state, control, **kwargs):
        self.micro_losses = []

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        step = state.global_step + 1
        losses = torch.stack(self.micro_losses).detach().float()
        # In float16 the loss scale overflows now and then, and its scaler leaves such a step out itself.
        norm = self.grad_norm.full_tensor() if isinstance(self.grad_norm, DTensor) else self.grad_norm
        norm = 0.0 if args.fp16 else 0 * norm
        # One number over all ranks: the loss, which is not finite where any rank's loss or the gradient is not.
        total = self.accelerator.reduce(losses.sum() / args.world_size + norm, reduction="sum")
        optimizer = kwargs["optimizer"].optimizer  # within accelerate's
        if self._optimizer_can_judge(args, optimizer):
            self.leave_to(optimizer, args, step, losses, total)
            return
        if not self._judge(args, step, losses, total.item()):
            optimizer.zero_grad(set_to_none=True)  # without gradients the optimizer touches nothing

    def on_step_end(self, args, state, control, **kwargs):
        if control.should_save or control.should_evaluate or control.should_log or control.should_training_stop:
            self.settle(args)

    @staticmethod
    def _optimizer_can_judge(args, optimizer: torch.optim.Optimizer) -> bool:
        """Whether it pays, and the optimizer takes `found_inf` and every parameter is a plain tensor."""
        if args.device.type == "cpu" or args.fp16 or args.on_spike != "ignore":
            return False
        fused = all(group.get("fused") for group in optimizer.param_groups)
        sharded = any(isinstance(p, DTensor) for group in optimizer.param_groups for p in group["params"])
        return fused and not sharded

    def leave_to(self, optimizer: torch.optim.Optimizer, args, step: int, losses: torch.Tensor, total: torch.Tensor):
        """Let the optimizer leave the step out if `total` is not finite, and read the verdict on the step before."""
        # What GradScaler gives to a fused optimizer: 1.0 where it has to do nothing.
        # pyrefly: ignore[missing-attribute]  torch sets it in the same way
        optimizer.found_inf = 1 - total.isfinite().float()
        loss, arrived = total.to("cpu", non_blocking=True), None
        if total.is_cuda:
            arrived = torch.cuda.Event()
            arrived.record()
        before, self.pending = self.pending, Pending(step, losses, loss, arrived)
        self._read(args, before)

    def settle(self, args) -> None:
        """Read the verdict that is still on its way; all ranks call it at the same step."""
        before, self.pending = self.pending, None
        self._read(args, before)

    def _read(self, args, pending: Pending | None) -> None:
        if pending is not None:
            if pending.arrived is not None:
                pending.arrived.synchronize()
            self._judge(args, pending.step, pending.losses, pending.loss.item())

    def _judge(self, args, step: int, losses: torch.Tensor, loss: float) -> bool:
        """Whether a step counts."""
        if not math.isfinite(loss):
            self._not_finite(args, step, losses)
        elif args.on_spike == "ignore" or not self._is_spike(args, step, loss):
            self.recent = [*self.recent, loss][-WINDOW:]
            return True
        return False

    def _not_finite(self, args, step: int, losses: torch.Tensor) -> None:
        """Stop, or count the step as left out."""
        own = [index for index, loss in enumerate(losses.tolist()) if not math.isfinite(loss)]
        text = self.describe(step, args.process_index, own[0]) if own else ""
        found = gather_object([(args.process_index, own[0] if own else None, text)])
        where = [f"micro-batch {micro + 1} of rank {rank}: {text}" for rank, micro, text in found if micro is not None]
        what = f"the loss is not finite at step {step:,} ({where[0]})" if where else ""
        what = what or f"the gradient is not finite at step {step:,}, all losses are"
        if args.on_nonfinite == "stop":
            self.log({"not_finite_step": step})
            raise UserError(
                f"{what}; nothing of it reached the weights: lower learning_rate ({args.learning_rate}), look at the "
                "text, or leave such steps out with on_nonfinite: skip, and resume from the last checkpoint"
            )
        self._skip(step, what)

    def _is_spike(self, args, step: int, loss: float) -> bool:
        """Whether to leave out a step for its loss; warns of it where that is all that was asked for."""
        if len(self.recent) < FEWEST:
            return False
        deviation = statistics.pstdev(self.recent) or math.inf
        score = (loss - statistics.fmean(self.recent)) / deviation
        if score <= args.spike_zscore:
            return False
        what = f"the loss of step {step:,} is {loss:.4f}, {score:.1f} standard deviations above those before it"
        if args.on_spike == "skip":
            self._skip(step, what)
            return True
        if self.accelerator.is_main_process:
            say(what)
        return False

    def _skip(self, step: int, what: str) -> None:
        self.skipped.append(step)
        recent = [skipped for skipped in self.skipped if skipped > step - AMONG]
        if len(recent) > MAX_SKIPPED:
            raise UserError(
                f"{what}; it is number {len(recent)} that was left out of {AMONG:,} steps: something else is wrong, "
                "look at the data and the learning rate, and resume from the last checkpoint"
            )
        if self.accelerator.is_main_process:
            say(f"{what}: left out")
        self.log({"skipped_step": step})
