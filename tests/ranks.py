"""Functions in processes of their own, one or several ranks, without the seconds that the imports take.

A process is forked from one which has imported torch, transformers and llmkit, and has done nothing else: no thread
of it is lost. It has the environment, the folder and the imports' path of the test, and starts with none of its state.
"""

import json
import os
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from io import StringIO
from multiprocessing import set_forkserver_preload
from pathlib import Path

import torch
import torch.distributed as dist
from torch.multiprocessing import ProcessContext, start_processes

set_forkserver_preload(["pytest", "llmkit.training.pretrain_trainer", "llmkit.finetuning.preference_trainer"])
HANG = 300.0  # seconds


def on_ranks(number: int, work: Callable, *arguments: object) -> list:
    """Call a function of a module on each of so many ranks. One is a plain process, not a rank.

    Returns:
        What each rank's call returns, as JSON gives it back.

    Raises:
        ProcessRaisedException: the first rank that failed, with its traceback.
        ProcessExitedException: the first rank that ended by itself, with its status.
    """
    with tempfile.TemporaryDirectory() as folder:
        context, end = start(number, _noted, folder, work, arguments), time.monotonic() + HANG
        try:
            while not context.join(timeout=1.0):
                assert time.monotonic() < end, "the ranks did not end"
        finally:
            for process in context.processes:
                process.kill()
        return [json.loads(Path(folder, str(rank)).read_text()) for rank in range(number)]


def start(number: int, work: Callable, *arguments: object) -> ProcessContext:
    """As `on_ranks`, of processes that the test itself waits for, or kills."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    variables = dict(os.environ)
    if number > 1:
        variables |= {"WORLD_SIZE": str(number), "LOCAL_WORLD_SIZE": str(number)}
        variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return start_processes(_process, (variables, work, arguments), number, join=False, start_method="forkserver")


def _process(rank: int, variables: dict[str, str], work: Callable, arguments: tuple) -> None:
    os.environ.clear()
    os.environ.update(variables)
    if "WORLD_SIZE" in variables:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        torch.set_num_threads(1)  # as launchers have it
    work(*arguments)
    if dist.is_initialized():  # no rank takes its connections away while another one works
        dist.barrier()
        dist.destroy_process_group()


def _noted(folder: str, work: Callable, arguments: tuple) -> None:
    result = work(*arguments)
    Path(folder, os.environ.get("RANK", "0")).write_text(json.dumps(result))


def printed(work: Callable, *arguments: object) -> str:
    """What a call prints, for `on_ranks`."""
    with redirect_stdout(StringIO()) as text:
        work(*arguments)
    return text.getvalue()


def print_into(file: Path) -> None:
    """Let this process print into a file, whatever prints: what it prints and its errors."""
    with file.open("a") as opened:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os.dup2(opened.fileno(), 1)
        os.dup2(opened.fileno(), 2)
