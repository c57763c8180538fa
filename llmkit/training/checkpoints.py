"""Checkpoints that are whole or not there, and which one a run goes on from.

A checkpoint is written into `.saving` of the run's folder. When all ranks are done, `complete.json` is written there,
with the size and the checksum of every file, and only then does the folder get its name. So `checkpoint-N` is whole
from its first moment, and what was damaged later is found before it is used.
"""

import shutil
import uuid
from collections.abc import Callable
from pathlib import Path

from accelerate.utils import broadcast_object_list, gather_object
from transformers import TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from llmkit.console import say
from llmkit.errors import UserError
from llmkit.files import COMPLETE, changed_file, hold_folder, read_record, sync, write_record
from llmkit.runs.run import LOG, read_log
from llmkit.training.ranks import lost_ranks_told

STAGING = ".saving"
SET_ASIDE = "set_aside"
NEEDED = ("*.safetensors", "optimizer*", "scheduler.pt", "rng_state*.pth", TRAINER_STATE_NAME)


def step_of(checkpoint: str | Path) -> int:
    """The step in a checkpoint folder's name, -1 for a folder with another name."""
    prefix, _, step = Path(checkpoint).name.rpartition("-")
    return int(step) if prefix == PREFIX_CHECKPOINT_DIR and step.isdecimal() else -1


def checkpoints_of(folder: Path) -> list[Path]:
    """The checkpoints of a run's folder by step, whole or not."""
    return sorted((path for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if step_of(path) >= 0), key=step_of)


# Saving


def seal(staged: Path, checkpoint: Path, ranks: int) -> None:
    """Give a checkpoint that was written into `staged` its record, and then its name.

    Raises:
        OSError: the disk is full or gone; nothing has the name then.
    """
    write_record(staged, step=step_of(checkpoint), ranks=ranks)
    if checkpoint.exists():
        remove(checkpoint)
    staged.rename(checkpoint)
    sync(checkpoint.parent)


def remove(checkpoint: Path) -> None:
    """Remove a checkpoint; its name goes first, so that a kill does not leave a part of it under that name."""
    doomed = checkpoint.parent / STAGING / f"removed-{checkpoint.name}"
    doomed.parent.mkdir(exist_ok=True)
    shutil.rmtree(doomed, ignore_errors=True)
    checkpoint.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def rotate(folder: Path, limit: int | None, best: str | None) -> None:
    """Keep the newest `limit` finished checkpoints, and the best one; others are neither counted nor touched."""
    if limit is None or limit <= 0:
        return
    finished = [path for path in checkpoints_of(folder) if (path / COMPLETE).exists()]
    for path in finished[:-limit]:
        if best is None or path.name != Path(best).name:
            remove(path)


def set_aside_after(folder: Path, step: int) -> None:
    """Move the checkpoints after `step`, which a run that goes on from there will not pass through again.

    They go into `set_aside_1` (2, 3, ...) with a copy of the log, and can be used from there. Without this, `latest`
    would return to them after the next stop.
    """
    later = [path for path in checkpoints_of(folder) if step_of(path) > step]
    log = read_log(folder / LOG) if (folder / LOG).exists() else []
    if not later and (step or not any(record.get("step") for record in log)):
        return
    number = 1 + sum(1 for _ in folder.glob(f"{SET_ASIDE}_*"))
    place = folder / f"{SET_ASIDE}_{number}"
    place.mkdir()
    if log:
        shutil.copy2(folder / LOG, place / LOG)
    for path in reversed(later):  # the newest first: `latest` would take it
        path.rename(place / path.name)
    sync(folder)
    names = ", ".join(path.name for path in later) or "the log of an earlier start without checkpoints"
    say(f"going on from step {step:,}: {names} set aside in {place}")


# Resuming


def checkpoint_to_resume(args: TrainingArguments) -> str | None:
    """The checkpoint folder that `--resume_from_checkpoint` means: a path, or `latest` of the run's own folder.

    `latest` is the newest that is whole to the last byte; which ones are passed over is said, and why. Where there is
    no checkpoint yet it starts afresh, so that a job which may be started again can always say it. The first rank
    decides, and all ranks have to see what it sees. The folder, if there is one, is kept to this process from here on.

    Raises:
        UserError: not a whole checkpoint; none that can be resumed; a run is already there and nothing says to go on
            with it; the ranks do not share a disk.
    """
    with lost_ranks_told(args):
        checkpoint = first_rank_decides(args, lambda: _choose(args))
        if checkpoint is not None:
            _check_that_all_ranks_see(Path(checkpoint))
    return checkpoint


def first_rank_decides(args: TrainingArguments, decide: Callable[[], str | None]) -> str | None:
    """What `decide` returns on the first rank, on all of them; a UserError of its is everybody's."""
    answer: list = [None, None]
    if args.process_index == 0:
        try:
            answer[0] = decide()
        except UserError as error:
            answer[1] = str(error)
    value, mistake = broadcast_object_list(answer)
    if mistake:
        raise UserError(mistake)
    return value


def _choose(args: TrainingArguments) -> str | None:
    assert args.output_dir is not None, "TrainingArguments fills it in"
    folder, wanted = Path(args.output_dir), args.resume_from_checkpoint
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output_dir={args.output_dir} is a file: give a folder")
    if folder.is_dir():
        hold_folder(folder)
    if wanted is None:
        check_unused(folder)
        return None
    if wanted != "latest":
        if damage := damage_of(Path(wanted)):
            raise UserError(f"resume_from_checkpoint={wanted} is not a whole checkpoint: {damage}; or say 'latest'")
        if Path(wanted).resolve().parent != folder.resolve():
            check_unused(folder)
        return wanted
    passed_over = []
    for checkpoint in reversed(checkpoints_of(folder)):
        damage = damage_of(checkpoint)
        if damage is None:
            return str(checkpoint)
        passed_over.append(f"{checkpoint.name}: {damage}")
        say(f"passed over {passed_over[-1]}")
    if passed_over:
        raise UserError(
            f"no checkpoint of {folder} can be resumed ({'; '.join(passed_over)}): take another --output_dir, or "
            "start from its weights with --init_from"
        )
    _check_that_nothing_is_missing(folder, args)
    return None


def check_unused(folder: Path) -> None:
    """Refuse to start a run where another one is.

    Raises:
        UserError: there are checkpoints, or the log of a run that had trained.
    """
    what = "the checkpoints" if checkpoints_of(folder) else "the log" if _last_step(folder) else None
    if what:
        raise UserError(
            f"{folder} holds {what} of a run: add --resume_from_checkpoint latest to go on with it, or take another "
            "--output_dir"
        )


def _check_that_nothing_is_missing(folder: Path, args: TrainingArguments) -> None:
    """Refuse to begin again under `latest` where a run has trained past its first save, or saves nothing to resume."""
    step = _last_step(folder)
    every = args.save_steps if args.save_steps >= 1 else float("inf")  # below 1 it is a part of an unknown length
    resumable = args.save_strategy != "no" and not args.save_only_model
    if step and (not resumable or step > every):
        raise UserError(
            f"{folder} holds the log of a run that came to step {step:,}, and no checkpoint to go on from: take "
            "another --output_dir, or delete this one to start again"
        )


def _last_step(folder: Path) -> int:
    log = read_log(folder / LOG) if (folder / LOG).exists() else []
    return max((record.get("step", 0) for record in log), default=0)


def damage_of(checkpoint: Path) -> str | None:
    """What keeps a run from being resumed from this folder exactly, or None. Every byte is read."""
    try:
        record = read_record(checkpoint)
    except FileNotFoundError:
        return f"{COMPLETE} is missing, which ends a save" if checkpoint.is_dir() else "there is no such folder"
    except ValueError as error:
        return str(error)
    names = [Path(name) for name in record["files"]]
    for kind in NEEDED:
        if not any(part.match(kind) for name in names for part in (name, *name.parents)):
            return f"it was saved without {kind}, so nothing can go on from it"
    if damage := changed_file(checkpoint, record):
        return damage
    if 0 <= step_of(checkpoint) != record["step"]:
        return f"it is that of step {record['step']:,}"
    return None


def check_that_all_ranks_share(folder: Path, args: TrainingArguments) -> None:
    """Refuse to train where a checkpoint would be scattered over the nodes' disks.

    Raises:
        UserError: a rank does not see what the first one writes.
    """
    name = None
    if args.process_index == 0:
        # A new name, for a network's file system may remember for a while that a file was not there.
        name = f".shared-{uuid.uuid4().hex}"
        (folder / name).touch()
    (name,) = broadcast_object_list([name])
    seen = gather_object([(folder / name).exists()])
    if args.process_index == 0:
        (folder / name).unlink()
    if not all(seen):
        raise UserError(
            f"rank {seen.index(False)} does not see {folder} of rank 0: each rank writes its part of a checkpoint "
            "there, so give an output_dir on a disk that all nodes share; data_dir may be on local disks"
        )


def _check_that_all_ranks_see(checkpoint: Path) -> None:
    """Compare the record of the chosen checkpoint over ranks, which each read it from their own disk."""
    path = checkpoint / COMPLETE
    seen = gather_object([path.read_bytes() if path.exists() else None])
    if blind := [rank for rank, record in enumerate(seen) if record != seen[0]]:
        raise UserError(
            f"rank {blind[0]} does not see {checkpoint} as rank 0 does: output_dir has to be on a disk that all "
            "nodes share"
        )


def ranks_of(checkpoint: str | Path) -> int:
    """How many ranks saved a checkpoint."""
    return read_record(Path(checkpoint))["ranks"]
