"""Ranks that start together, and what is said where one is lost."""

import os

import torch.distributed as dist
from accelerate import PartialState
from transformers import TrainingArguments

from llmkit.errors import UserError


def join_ranks(args: TrainingArguments) -> None:
    """Start the process group of CPU ranks with `ddp_timeout`, which Trainer leaves out under `use_cpu`.

    Raises:
        RankLost: the ranks do not find each other.
    """
    if not args.use_cpu or dist.is_initialized():
        return
    PartialState._reset_state()  # private: TrainingArguments does the same before it makes its own
    try:
        PartialState(cpu=True, backend=args.ddp_backend, timeout=args.ddp_timeout_delta)
    except RuntimeError as error:
        raise RankLost(
            f"rank {os.environ.get('RANK', '0')} cannot connect to the other ranks ({str(error).splitlines()[0]}): "
            "each node has to be started, and to reach the others"
        ) from error


class RankLost(UserError):
    """Another rank has ended, or cannot be reached."""

    of_one_rank = True


def lost_rank(error: Exception, args: TrainingArguments) -> str | None:
    """The line to print if an error is that of a connection to another rank, else None."""
    if args.world_size == 1 or not isinstance(error, RuntimeError):
        return None
    text = str(error)
    signs = ("Connection closed by peer", "Connection reset", "Broken pipe", "Timed out", "timeout", "Socket")
    if not (isinstance(error, dist.DistError) or any(sign in text for sign in signs)):
        return None
    what = f"rank {args.process_index} has lost another rank ({text.splitlines()[0]})"
    if "timed out" in text.lower() or "timeout" in text:
        cause = f"nothing came for ddp_timeout={args.ddp_timeout} seconds, so look at the network between the nodes"
    else:
        cause = "the launcher names the one that ended first"
    return f"{what}: {cause}; the last checkpoint is untouched, and --resume_from_checkpoint latest goes on from it"
