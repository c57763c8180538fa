"""Preparing shards with datatrove: its executors run the tasks of `parts.py` here, on Slurm, or on Ray.

This module needs the `scale` extra. All machines have to see the shards' folder, or its URL, and local files of text,
under the same names.
"""

import hashlib
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from datatrove.executor.base import PipelineExecutor
from datatrove.executor.local import LocalPipelineExecutor
from datatrove.executor.ray import RayPipelineExecutor
from datatrove.executor.slurm import SlurmPipelineExecutor
from datatrove.pipeline.base import PipelineStep
from datatrove.utils.logging import logger
from multiprocess import process

from llmkit.console import say
from llmkit.data.manifest import Manifest
from llmkit.data.parts import Parts, finished
from llmkit.data.places import LocalPlace, Place
from llmkit.data.shards import shard_settings
from llmkit.errors import UserError

LOGS = "logs"  # datatrove's, in the shards' folder: of each task, and which of them have finished


class PreparePart(PipelineStep):
    """The first step and the only one: the shards of the part that belongs to the task's rank."""

    type, name = "🔢 - TOKENIZER", "llmkit shards"

    def __init__(self, parts: Parts):
        super().__init__()
        self.parts = parts

    def run(self, data=None, rank: int = 0, world_size: int = 1) -> None:
        with _logged_in_one_line():
            for split, shards in self.parts.prepare(rank).items():
                for count in ("tokens", "documents", "bytes"):
                    total = sum(getattr(shard, count) for shard in shards)
                    self.stat_update(f"{split}_{count}", value=total, unit="task")


class MergeParts(PipelineStep):
    """The last task, where no process waits for the others."""

    type, name = "🫂 - COMBINER", "llmkit shards"

    def __init__(self, parts: Parts):
        super().__init__()
        self.parts = parts

    def run(self, data=None, rank: int = 0, world_size: int = 1) -> None:
        with _logged_in_one_line():
            self.parts.merge()


@contextmanager
def _logged_in_one_line() -> Iterator[None]:
    """Keep datatrove from writing a traceback of what a user can fix."""
    logger.enable("datatrove.executor")  # a worker does several tasks
    try:
        yield
    except UserError as error:
        logger.error(str(error))
        logger.disable("datatrove.executor")
        raise


class _WorkerKilled(Exception):
    """Raised where the main thread waits for a pool that has lost a worker."""


@contextmanager
def _killed_workers_noticed(place: Place, workers: int) -> Iterator[None]:
    """Stop where a local worker has been killed, as for memory: its pool would wait for the worker's task for ever.

    The pool puts another process in the place of one that has ended. Processes are numbered as they are started, first
    datatrove's manager and then the workers, so one with a number beyond these is such a process. (A worker that is
    killed at once is never seen itself.)
    """
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(0.5):
            numbers = {child.name: int(re.split("[-:]", child.name)[-1]) for child in process.active_children()}
            managers = [number for name, number in numbers.items() if "Manager" in name]
            if managers and max(numbers.values()) > max(managers) + workers:
                os.kill(os.getpid(), signal.SIGUSR1)  # wakes the main thread, which waits for the pool
                return

    def wake(number: int, frame) -> None:
        raise _WorkerKilled

    # SIGINT would not do: a command in the background of a script ignores it.
    before = signal.signal(signal.SIGUSR1, wake)
    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    except _WorkerKilled:
        raise UserError(
            f"{place}: a worker was killed, perhaps because the memory was full: give fewer --workers, and the "
            "command goes on with the tasks that have not finished"
        ) from None
    finally:
        ended.set()
        signal.signal(signal.SIGUSR1, before)


def prepare_in_tasks(
    corpus,
    tokenizer,
    place: Place,
    *,
    executor: str,
    tasks: int,
    workers: int | None = None,
    slurm: Sequence[str] = (),
    validation_fraction: float,
    validation_split: str,
    shard_tokens: int = 100_000_000,
    num_workers: int = 1,
) -> Manifest | None:
    """`prepare_shards` in several tasks, which may run on several machines. What is finished is not done again.

    Args:
        executor: "local", "slurm" or "ray".
        tasks: into how many parts the corpus is divided. The shards are the same for the same number.
        workers: how many tasks run at a time: all cores by default, no limit on Slurm and Ray.
        slurm: what `sbatch` is told, as "partition=cpu"; "partition" and "time" are needed.
        num_workers: threads of each task.

    Returns:
        The manifest; None for Slurm, where the jobs have been submitted and may not have begun.

    Raises:
        UserError: what `prepare_shards` refuses; a task that failed, and what it said.
    """
    if tasks < 1 or num_workers < 1 or (workers is not None and workers < 1):
        raise UserError(f"tasks ({tasks}), workers ({workers}) and num_workers ({num_workers}) have to be positive")
    options = _slurm_options(slurm) if executor == "slurm" else {}
    settings = shard_settings(corpus, tokenizer, validation_fraction, validation_split, shard_tokens)
    if manifest := finished(place, settings):
        return manifest
    with place.alone():
        parts = Parts(corpus, tokenizer, place, settings, tasks, num_workers)
    logs = _logs(place)
    if executor == "slurm":
        _submit(parts, logs, workers, options)
        return None
    how = {"tasks": tasks, "logging_dir": str(logs / "tasks"), "skip_completed": isinstance(place, LocalPlace)}
    if executor == "local":
        run: PipelineExecutor = LocalPipelineExecutor(
            [PreparePart(parts)], workers=min(tasks, workers or os.cpu_count() or 1), **how
        )
    else:
        import ray

        ray.init(ignore_reinit_error=True)  # the cluster of RAY_ADDRESS, or this machine
        run = RayPipelineExecutor([PreparePart(parts)], workers=workers or -1, cpus_per_task=num_workers, **how)
    try:
        with _killed_workers_noticed(place, run.workers):
            run.run()
    finally:
        logger.enable("datatrove.executor")
    if isinstance(place, LocalPlace) and (failed := run.get_incomplete_ranks()):
        raise UserError(
            f"{place}: {len(failed):,} of {tasks:,} tasks failed, the first is task {failed[0]} (its log is "
            f"{logs}/tasks/logs/task_{failed[0]:05d}.log): fix the cause and give the "
            "command again; only these tasks are run"
        )
    return parts.merge()


def _logs(place: Place) -> Path:
    """The folder of datatrove's logs, which may name users and paths and are not for others to read.

    In a folder of shards they also say which tasks have finished. Behind a URL, the tasks' own records alone do.
    """
    if isinstance(place, LocalPlace):
        return place.directory / LOGS
    return Path(LOGS).absolute() / f"{place.name}-{hashlib.sha256(str(place).encode()).hexdigest()[:8]}"


def _slurm_options(given: Sequence[str]) -> dict[str, str]:
    options = {name: value for name, _, value in (text.lstrip("-").partition("=") for text in given)}
    for name in ("partition", "time"):
        if not options.get(name):
            raise UserError(f"slurm: {name} is missing: give --slurm partition=NAME time=HH:MM:SS")
    return options


def _submit(parts: Parts, logs: Path, workers: int | None, options: Mapping[str, str]) -> None:
    """Submit the tasks as an array of jobs, and after it a job that merges."""
    others = {name: value for name, value in options.items() if name not in ("partition", "time", "qos")}
    how = {
        "time": options["time"],
        "partition": options["partition"],
        "qos": options.get("qos", ""),
        "cpus_per_task": parts.num_workers,
        "sbatch_args": others,
        # The jobs find this environment's commands, whether or not it was activated.
        "env_command": f'export PATH="{Path(sys.executable).parent}:$PATH"',
        "skip_completed": isinstance(parts.place, LocalPlace),
    }
    name = parts.place.name
    prepare = SlurmPipelineExecutor(
        [PreparePart(parts)],
        tasks=len(parts.corpora),
        workers=workers or -1,
        logging_dir=str(logs / "tasks"),
        job_name=f"shards-{name}",
        **how,
    )
    merge = SlurmPipelineExecutor(
        [MergeParts(parts)],
        tasks=1,
        logging_dir=str(logs / "merge"),
        job_name=f"merge-{name}",
        depends=prepare,
        **how,
    )
    try:
        merge.run()
    except FileNotFoundError as error:
        raise UserError(f"slurm: {error.filename} is not there: run this where jobs are submitted") from error
    say(f"shards: submitted; the folder is a dataset when the job merge-{name} has ended. Logs are in {logs}")
