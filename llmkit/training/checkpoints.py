"""Which checkpoint a run goes on from, and whether it is whole."""

import json
import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers import TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from llmkit.errors import UserError


def checkpoint_to_resume(args: TrainingArguments) -> str | None:
    """The checkpoint folder that `--resume_from_checkpoint` means: a path, or `latest` of the run's own folder.

    One that a kill cut short is passed over. `latest` in a folder without any starts afresh, so that a job which may
    be started again can always say it.

    Raises:
        UserError: not a whole checkpoint; or a run is already there and nothing says to go on with it.
    """
    folder = Path(args.output_dir)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output_dir={args.output_dir} is a file: give a folder")
    found = [path for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.name.split("-")[-1].isdigit()]
    checkpoints = sorted(found, key=lambda path: int(path.name.split("-")[-1]))
    wanted = args.resume_from_checkpoint
    if wanted is None:
        if checkpoints:
            raise UserError(
                f"{args.output_dir} holds the checkpoints of a run: add --resume_from_checkpoint latest to go on with "
                "it, or take another --output_dir"
            )
        return None
    if wanted != "latest":
        if damage := _damage(Path(wanted)):
            raise UserError(f"resume_from_checkpoint={wanted} is not a whole checkpoint: {damage}; or say 'latest'")
        return wanted
    return next((str(path) for path in reversed(checkpoints) if not _damage(path)), None)


def _damage(checkpoint: Path) -> str | None:
    """What keeps a run from being resumed from this folder exactly, or None. Only the files' frames are read."""
    for kind in ("*.safetensors", "optimizer*", "scheduler.pt", "rng_state*.pth", TRAINER_STATE_NAME):
        if not list(checkpoint.glob(kind)):
            return f"{kind} is missing"
    try:
        json.loads((checkpoint / TRAINER_STATE_NAME).read_text())
    except ValueError:
        return f"{TRAINER_STATE_NAME} is cut short"
    for path in checkpoint.iterdir():
        if path.suffix in (".pt", ".pth", ".bin") and not zipfile.is_zipfile(path):
            return f"{path.name} is cut short"
        if path.suffix == ".safetensors":
            try:
                safe_open(path, framework="pt")
            except SafetensorError:
                return f"{path.name} is cut short"
    return None
