"""How a run saves: beside the place, on all ranks or not at all, and on with the training if the disk is full."""

import os
import shutil
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import broadcast_object_list, gather_object
from safetensors import SafetensorError
from torch import nn
from transformers import Trainer, TrainerCallback, set_seed
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from llmkit.console import say
from llmkit.errors import UserError
from llmkit.files import hold_folder, write_record
from llmkit.runs.run import LOG, read_log
from llmkit.training.budget import interval
from llmkit.training.checkpoints import (
    STAGING,
    check_that_all_ranks_share,
    check_unused,
    first_rank_decides,
    ranks_of,
    rotate,
    seal,
    set_aside_after,
    step_of,
)
from llmkit.training.run_arguments import RunArguments

# A full disk is OSError to Python, SafetensorError to safetensors, RuntimeError to torch's archive writer.
WRITE_ERRORS = (OSError, SafetensorError, RuntimeError)


class WholeCheckpoints(Trainer):
    """Trainer whose checkpoints are whole or not there (see `checkpoints.py`).

    Trainer writes into the final place, takes whatever lies there for a checkpoint, and ends the run if it cannot
    write.
    """

    args: RunArguments
    saving = False
    saved_step = -1  # the last one that is on the disk

    def take_folder(self, resume_from: str | None, fingerprint: str) -> None:
        """Make the run's folder this run's alone, before anything in it changes.

        Raises:
            UserError: another process is at work there, another run is there, or the ranks have other data or do not
                share the folder.
        """
        folder = Path(self.args.output_dir)
        data = gather_object([fingerprint])
        if different := [rank for rank, found in enumerate(data) if found != data[0]]:
            raise UserError(
                f"rank {different[0]} has other data than rank 0 (fingerprints {data[different[0]]} and {data[0]}): "
                "prepare the shards once, and copy them to every node or use a common disk"
            )

        def take() -> None:
            folder.mkdir(parents=True, exist_ok=True)
            hold_folder(folder)
            if resume_from is None and self.args.resume_from_checkpoint is None:
                check_unused(folder)
            set_aside_after(folder, step_of(resume_from) if resume_from else 0)

        first_rank_decides(self.args, take)
        if self.args.save_strategy != "no":
            check_that_all_ranks_share(folder, self.args)
        if resume_from:
            self.args.eval_on_start = self._evaluation_is_missing(resume_from)

    def _evaluation_is_missing(self, resume_from: str) -> bool:
        """Whether a checkpoint's evaluation has to be made up for: a run that is told to stop leaves it out."""
        step = step_of(resume_from)
        log = Path(self.args.output_dir) / LOG
        steps = self.args.max_steps  # not known beforehand where it is stated in epochs
        if steps < 1:
            steps = TrainerState.load_from_json(str(Path(resume_from) / TRAINER_STATE_NAME)).max_steps
        due = self.args.eval_strategy == "steps" and step % interval(self.args.eval_steps, steps) == 0 and log.exists()
        missing = due and not any("eval_loss" in record and record["step"] == step for record in read_log(log))
        return bool(broadcast_object_list([missing])[0])

    # private: it is the one name for where Trainer puts a checkpoint, and there is no public one.
    def _get_output_dir(self, trial) -> str:
        folder = super()._get_output_dir(trial)
        return str(Path(folder) / STAGING) if self.saving else folder

    # private: every save goes through it, and no callback comes before one.
    def _save_checkpoint(self, model: nn.Module, trial) -> None:
        step = self.state.global_step
        checkpoint = Path(self.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{step}"
        staged = checkpoint.parent / STAGING / checkpoint.name
        with suppress(OSError):
            self._clear_staging(staged)
        self.accelerator.wait_for_everyone()
        problem = self._first_problem(self._lack_of_room(staged, model) if self.is_fsdp_enabled else None)
        if problem is None:
            problem = self._first_problem(self._write(staged, model, trial))
        if problem is None:
            problem = self._first_problem(self._finish(staged, checkpoint) if self.args.should_save else None)
        if problem is None:
            self.saved_step = step
        # What a rank without a common disk wrote beside rank 0's checkpoint, or what is left of a failed save.
        if self.is_local_process_zero():
            shutil.rmtree(staged.parent, ignore_errors=True)
        if problem and self.args.on_save_failure == "stop":
            raise UserError(f"{problem}; earlier checkpoints are untouched: free some space and resume from the last")
        if problem and self.is_world_process_zero():
            say(f"{problem}; earlier checkpoints are untouched, the run goes on and tries again at the next save")

    def _clear_staging(self, staged: Path) -> None:
        """Remove what a killed save left, before any rank writes."""
        if self.is_local_process_zero():
            shutil.rmtree(staged, ignore_errors=True)
            staged.mkdir(parents=True, exist_ok=True)

    def _lack_of_room(self, staged: Path, model: nn.Module) -> str | None:
        """What keeps a checkpoint from being written: under FSDP no rank can leave a save that others wait in.

        The room is taken and given back, so that quotas and limits count as well.
        """
        if not self.args.should_save:
            return None
        size = 16 * sum(parameter.numel() for parameter in model.parameters())  # float32: weights twice, 2 moments
        try:
            with (staged / "room").open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, size)
            (staged / "room").unlink()
        except OSError as error:
            return f"the checkpoint of step {self.state.global_step:,} could not be saved: {_reason(error, staged)}"
        return None

    def _write(self, staged: Path, model: nn.Module, trial) -> str | None:
        """This rank's part of a checkpoint. Returns what went wrong."""
        # Trainer would wait at a barrier for the folder of the best checkpoint, where a rank that failed never comes.
        best, self.state.best_global_step = self.state.best_global_step, None
        self.saving = True
        try:
            super()._save_checkpoint(model, trial)
        except WRITE_ERRORS as error:
            if self.is_fsdp_enabled:  # the other ranks wait for this one's part of the weights
                raise
            return f"the checkpoint of step {self.state.global_step:,} could not be saved: {_reason(error, staged)}"
        finally:
            self.saving = False
            self.state.best_global_step = best
        return None

    def _finish(self, staged: Path, checkpoint: Path) -> str | None:
        """Name the checkpoint, once every rank has written. Returns what went wrong."""
        try:
            if best := self.state.best_global_step:
                self.state.best_model_checkpoint = str(checkpoint.with_name(f"{PREFIX_CHECKPOINT_DIR}-{best}"))
            self.state.save_to_json(str(staged / TRAINER_STATE_NAME))
            seal(staged, checkpoint, self.args.world_size)
            rotate(checkpoint.parent, self.args.save_total_limit, self.state.best_model_checkpoint)
        except OSError as error:
            return f"the checkpoint of step {self.state.global_step:,} could not be saved: {_reason(error, staged)}"
        return None

    @staticmethod
    def _first_problem(problem: str | None) -> str | None:
        """The first rank's problem on all ranks, which also waits for all of them."""
        return next((found for found in gather_object([problem]) if found), None)

    # private: Trainer's own pushing, of what has no name yet.
    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        pass

    # private: Trainer leaves a rank without a state of its own to repeat the random numbers of the run's beginning.
    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        if checkpoint is not None and ranks_of(checkpoint) != self.args.world_size:
            parts = np.random.SeedSequence([self.args.seed, step_of(checkpoint), self.args.process_index])
            set_seed(int(parts.generate_state(1)[0]))

    # private: with `_internal_call`, Trainer does not push what it saves.
    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Trainer's, each file of which is whole or not there, with a record of their checksums; it does not push."""
        target = Path(output_dir or self.args.output_dir)
        if self.saving or self.is_fsdp_enabled:  # `_save_checkpoint` names the whole folder
            super().save_model(output_dir, _internal_call=True)
            if self.args.should_save:
                self.finish_model(target)
            return
        staged = target / STAGING / "model"
        super().save_model(str(staged), _internal_call=True)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            self.finish_model(staged)
            write_record(staged, step=self.state.global_step)
            for path in staged.iterdir():
                path.replace(target / path.name)
            shutil.rmtree(staged.parent, ignore_errors=True)

    def finish_model(self, folder: Path) -> None:
        """Add to a saved model what Trainer does not save; on the rank that saves."""


class ResumedState(TrainerCallback):
    """Puts right what a checkpoint's state says of the folder that it was in."""

    def on_train_begin(self, args, state, control, **kwargs):
        if state.best_global_step:
            best = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.best_global_step}"
            state.best_model_checkpoint = str(best) if best.exists() else None


def _reason(error: Exception, place: Path) -> str:
    """An error's first line, and how much room there is, for torch does not tell a full disk from other failures."""
    if isinstance(error, torch.OutOfMemoryError):
        raise error
    parents = (path for path in place.parents if path.exists())
    free = shutil.disk_usage(next(parents)).free
    return f"{str(error).splitlines()[0]} ({free / 1e6:,.0f} MB free)"
