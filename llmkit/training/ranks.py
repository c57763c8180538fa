"""Ranks that start together, and what is said where one is lost."""

import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import gather_object
from transformers import TrainingArguments

from llmkit.errors import UserError
from llmkit.signals import ignore_signals


def join_ranks(args: TrainingArguments) -> None:
    """Start the process group where Trainer would not do it right.

    Trainer leaves out `ddp_timeout` under `use_cpu`. And where a launcher starts the ranks again with the store that
    it has, as `accelerate launch --max_restarts` does, they would find the addresses of those before them there.

    Raises:
        RankLost: the ranks do not find each other.
    """
    again = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    again = again and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    if dist.is_initialized() or not (args.use_cpu or again):
        return
    PartialState._reset_state()  # private: TrainingArguments does the same before it makes its own
    try:
        how = _parts_of_a_restart() if again else {}
        PartialState(cpu=args.use_cpu, backend=args.ddp_backend, timeout=args.ddp_timeout_delta, **how)
    except RuntimeError as error:
        raise RankLost(
            f"rank {os.environ.get('RANK', '0')} cannot connect to the other ranks ({str(error).splitlines()[0]}): "
            "each node has to be started, and to reach the others"
        ) from error


def _parts_of_a_restart() -> dict:
    """What `init_process_group` wants where a part of the launcher's store is to be this start's alone."""
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    name = f"restart {os.environ['TORCHELASTIC_RESTART_COUNT']}"
    ranks = {"rank": int(os.environ["RANK"]), "world_size": int(os.environ["WORLD_SIZE"])}
    return {"store": dist.PrefixStore(name, store), **ranks}


class RankLost(UserError):
    """Another rank has ended, or cannot be reached."""

    of_one_rank = True


Processes = list[tuple[str, int]]  # of the ranks, in their order: the machine's name and the process's number


def processes_of_ranks() -> Processes:
    """All ranks call it together."""
    return gather_object([(socket.gethostname(), os.getpid())])


@contextmanager
def lost_ranks_told(args: TrainingArguments, processes: Processes | None = None) -> Iterator[None]:
    """Turn the error of a connection to another rank into one line, which names the rank as far as it can be known.

    Args:
        processes: those of the ranks, which may come while this is at work.

    Raises:
        RankLost: another rank has ended, or cannot be reached.
    """
    try:
        yield
    except RuntimeError as error:
        if args.world_size == 1 or not _is_of_a_connection(error):
            raise
        ignore_signals()  # the launcher's, which would interrupt the line that says why
        which, text = "another rank", str(error).splitlines()[0]
        if "timed out" in text.lower() or "timeout" in text:
            cause = (
                f"nothing came for ddp_timeout={args.ddp_timeout} seconds, so look at the network between the nodes"
            )
        else:
            cause = "look for its own last line, or for a killed process in the system's log"
            if ended := " and ".join(map(str, _ended(processes or []))):
                which, text = f"rank {ended}", "its process has ended"
        raise RankLost(
            f"rank {args.process_index} has lost {which} ({text}): {cause}; the last checkpoint is untouched, and "
            "--resume_from_checkpoint latest goes on from it"
        ) from error


def _is_of_a_connection(error: RuntimeError) -> bool:
    signs = ("Connection closed by peer", "Connection reset", "Broken pipe", "Timed out", "timeout", "Socket")
    return isinstance(error, dist.DistError) or any(sign in str(error) for sign in signs)


def _ended(processes: Processes) -> list[int]:
    """The ranks of this machine whose process has ended. Its connections are closed a moment before it has."""
    for _ in range(20):
        here = [(rank, number) for rank, (machine, number) in enumerate(processes) if machine == socket.gethostname()]
        if ended := [rank for rank, number in here if not _runs(number)]:
            return ended
        time.sleep(0.05)
    return []


def _runs(process: int) -> bool:
    try:
        return psutil.Process(process).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
