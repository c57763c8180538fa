"""A run whose text is still being tokenized (`data/prepare_ahead.py`) waits for its shards, and stops with them."""

import time

import torch
import torch.distributed as dist
from accelerate.utils import gather_object
from transformers import TrainerCallback

from llmkit.console import say
from llmkit.data.ahead import AheadWindows
from llmkit.data.prepare_ahead import LOOK
from llmkit.errors import UserError
from llmkit.training.batch_ramp import Batches
from llmkit.training.stopping import StopOnRequest

ALL = 1 << 62  # windows, where no more are needed


class WaitForShards(TrainerCallback):
    """Lets no step begin before the windows that are read during it are there, on all ranks.

    It waits at the end of the step before, where the run can be stopped with a checkpoint. There it also stops where
    the text cannot be tokenized.

    Args:
        read_ahead: micro-batches, over all ranks, that the loaders have read beyond the step that is trained.

    Attributes:
        problem: what the preparation has failed of, on all ranks.
    """

    def __init__(self, windows: AheadWindows, batches: Batches, stop: StopOnRequest, read_ahead: int):
        self.windows, self.batches, self.stop = windows, batches, stop
        self.steps_ahead = 1 + -(-read_ahead // batches.micro_batches)
        self.looked, self.is_done = 0.0, False
        self.problem: str | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        self.wait(args, state)
        if self.problem or self.stop.stopped:
            raise UserError(self.problem or f"stopped ({self.stop.stopped}) while it waited for shards")

    def on_step_end(self, args, state, control, **kwargs):
        if not control.should_training_stop:
            self.wait(args, state)
        if self.problem or self.stop.stopped:
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False  # it is made up for when the run goes on

    def wait(self, args, state) -> None:
        """Until the next step can be made, or the run is to stop. All ranks call it at the same time."""
        is_told = False
        needed = self.batches.windows_before(state.global_step + self.steps_ahead)
        while not self.is_done:
            known, is_well = self._agreed(args)
            self.is_done = known >= self.batches.windows_before(self.batches.num_steps)
            if self.is_done:
                return
            if not is_well:
                self.problem = next(filter(None, gather_object([self._own_problem()])))
                self.stop.stopped = self.problem
            if self.problem or known >= needed:
                return
            if not is_told and state.is_world_process_zero:
                say(f"step {state.global_step + 1:,} waits for its shards: tokenizing is slower than training")
            is_told = True
            time.sleep(LOOK)
            if self.stop.agreed(args):
                return

    def _own_problem(self) -> str | None:
        return self.windows.child.problem() if self.windows.child else None

    def _agreed(self, args) -> tuple[int, bool]:
        """The windows that every rank can read, and whether no rank has a problem."""
        if time.monotonic() - self.looked >= LOOK:
            self.windows.look()
            self.looked = time.monotonic()
        mine = [ALL if self.windows.complete else len(self.windows), int(self._own_problem() is None)]
        if args.world_size == 1:
            return mine[0], bool(mine[1])
        least = torch.tensor(mine)
        dist.all_reduce(least, dist.ReduceOp.MIN, group=self.stop.group)
        return int(least[0]), bool(least[1])
