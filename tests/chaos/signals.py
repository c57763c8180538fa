"""Signals in every phase of a run: to its launcher, to one rank, or to all of them.

    python tests/chaos/signals.py

The launcher of two ranks is torch's own, which `accelerate launch` uses as well; that of one rank starts it and
waits, as accelerate's does. Each phase is slowed down, batch by batch or token by token, so that it lasts long, and a
signal comes within it. All processes have to end, with one whole checkpoint of that moment; the
run is started again, and its weights and losses are compared with those of a run without signals. Printed is the
longest time from a signal to the last process's end.
"""

import argparse
import ctypes
import itertools
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import psutil
import torch
from forked import HANG, KINDS, Kind, in_child, leave, make_sources, make_trainer, outcome, same, start, wait
from torch.distributed.launcher.api import LaunchConfig, launch_agent

from llmkit import files
from llmkit.data.preparation import Preparation
from llmkit.training import stopping
from llmkit.training.checkpoints import checkpoint_to_resume

# Seconds. Samples come faster, because the first rank finishes them where only another one was told.
UNITS = {"preparing": 2.0, "training": 2.0, "evaluating": 2.0, "sampling": 0.5, "HellaSwag": 2.0, "saving": 0.5}
TARGETS = ("launcher", "one rank", "all")
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
QUESTIONS = 80
# At one row each, so that evaluation and HellaSwag have many batches.
HOW = {"per_device_eval_batch_size": 1, "sample_prompts": ["1 times", "2 times", "3 times", "4 times", "5 times"]}
HOW |= {"sample_tokens": 12, "hellaswag_steps": 4}
PR_SET_PDEATHSIG = 1


def train(kind: Kind, sources: Path, folder: Path, phase: str | None) -> None:
    """A rank's program. The phase, if there is one, takes long, and its beginning is marked by a file."""
    stopping.listen()

    def slow(owner, name: str, first_step: int = 0) -> None:
        call = getattr(owner, name)

        def slowly(*args, **kwargs):
            if not first_step or run.state.global_step >= first_step:
                (folder / "mark").touch()
                time.sleep(UNITS[phase])
            return call(*args, **kwargs)

        setattr(owner, name, slowly)

    if phase == "preparing":
        slow(Preparation, "_append")
    run = make_trainer(kind, sources, folder, **HOW, hellaswag_file=str(sources / "hellaswag.jsonl"))
    if phase == "training":
        slow(run, "training_step", first_step=3)
    elif phase == "evaluating":
        slow(run, "prediction_step")
    elif phase == "sampling":
        slow(run.model, "prepare_inputs_for_generation")
    elif phase == "HellaSwag":
        slow(sys.modules["llmkit.evaluation.hellaswag"], "_batch_losses")
    elif phase == "saving":
        slow(files, "sync", first_step=4)
    run.train(resume_from_checkpoint=checkpoint_to_resume(run.args))
    if run.stopped:
        with (folder / "stopped").open("a") as file:
            file.write(run.stopped + "\n")
    leave(run)


def launch(ranks: int, work) -> None:
    """A launcher's program: it starts the ranks and waits for them."""
    if ranks == 1:
        os.environ["ACCELERATE_MIXED_PRECISION"] = "no"
        rank = os.fork()
        if rank == 0:
            work()
            os._exit(0)
        os.waitpid(rank, 0)
        return
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        run_id="signals",
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        local_addr="127.0.0.1",
        start_method="fork",
        monitor_interval=0.1,
        max_restarts=0,
    )
    launch_agent(config, _rank_of_agent, [work])


def _rank_of_agent(work) -> None:
    # A forked rank gets a signal when the launcher dies; one that is a program of its own does not.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, 0)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    launcher = os.getppid()
    work()
    if os.getppid() != launcher:
        os._exit(0)  # torch lets a forked rank wait until its launcher has read its result, which here is gone


class Trials:
    """Runs on some number of ranks, and the one that they are compared with."""

    def __init__(self, kind: Kind, sources: Path, folder: Path):
        self.kind, self.sources, self.folder = kind, sources, folder
        self.expected = self._finish(folder / f"whole {kind.ranks}")

    def _start(self, place: Path, phase: str | None) -> list[int]:
        place.mkdir(exist_ok=True)
        work = partial(train, self.kind, self.sources, place, phase)
        return start(lambda rank: launch(self.kind.ranks, work), 1, place / "out")

    def _finish(self, place: Path) -> tuple:
        ending = wait(self._start(place, None), patience=3 * HANG)
        assert ending.finished, (place / "out").read_text()
        weights, moments, logged, *_ = outcome(self.kind, place)
        return weights, moments, {record for record in logged if record[1] != "sample"}

    def trial(self, phase: str, target: str, number: signal.Signals) -> tuple[float, str | None]:
        """Returns the seconds from the signal to the last end, and what was wrong."""
        place = self.folder / "trial"
        (launcher,) = self._start(place, phase)
        _until((place / "mark").exists)
        ranks = psutil.Process(launcher).children()
        time.sleep(random.uniform(0, 1))
        sent = time.monotonic()
        if target == "launcher":
            os.kill(launcher, number)
        elif target == "all":
            os.killpg(launcher, number)
        else:
            random.choice(ranks).send_signal(number)
        hung = not _until(lambda: _ended([psutil.Process(launcher), *ranks]))
        seconds = time.monotonic() - sent
        if hung:
            os.killpg(launcher, signal.SIGKILL)
        wait([launcher])
        stopped = (place / "stopped").read_text().splitlines() if (place / "stopped").exists() else []
        problem = None
        if hung:
            problem = "it hung"
        elif phase != "preparing" and sum("checkpoint saved in" in line for line in stopped) != self.kind.ranks:
            problem = f"no checkpoint of all ranks: {stopped}"
        elif not same(self._finish(place), self.expected):
            problem = "the resumed run ended otherwise"
        if problem:
            print(f"{phase}, {number.name} to {target}: {problem}\n{(place / 'out').read_text()[-4000:]}", flush=True)
        shutil.rmtree(place)
        return seconds, problem


def _until(condition, seconds: float = HANG) -> bool:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


def _ended(processes: list[psutil.Process]) -> bool:
    return not any(each.is_running() and each.status() != psutil.STATUS_ZOMBIE for each in processes)


def write_questions(sources: Path) -> None:
    rows = [
        {"ind": n, "ctx": f"{n} times", "endings": [f"{m} is {n * m}" for m in (2, 3)], "label": n % 2}
        for n in range(QUESTIONS)
    ]
    (sources / "hellaswag.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", action="store_true", help="each signal to each target; else they take turns")
    parser.add_argument("--ranks", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--phases", nargs="*", default=list(UNITS), choices=list(UNITS))
    options = parser.parse_args()
    torch.set_num_threads(1)  # threads do not survive a fork
    turns, failed = itertools.cycle(SIGNALS), 0
    print(f"{'':<12}{'ranks':>6}{'signals':>9}{'whole':>7}{'longest seconds to the exit':>29}")
    with tempfile.TemporaryDirectory() as folder:
        sources = Path(folder) / "sources"
        sources.mkdir()
        assert in_child(partial(make_sources, sources)).finished
        write_questions(sources)
        for ranks in options.ranks:
            trials = Trials(next(kind for kind in KINDS if kind.ranks == ranks), sources, Path(folder))
            for phase in options.phases:
                each = [(t, n) for t in TARGETS for n in (SIGNALS if options.every else [next(turns)])]
                next(turns)  # so that the next phase gives the targets other ones
                ends = [trials.trial(phase, target, number) for target, number in each]
                whole = sum(problem is None for _, problem in ends)
                failed += len(ends) - whole
                longest = max(seconds for seconds, _ in ends)
                print(f"{phase:<12}{ranks:>6}{len(ends):>9}{whole:>7}{longest:>29.1f}", flush=True)
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
