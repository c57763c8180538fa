"""Stopping when asked to: every rank after the same step, with one checkpoint.

SIGTERM, SIGINT (Ctrl-C), SIGUSR1 (a scheduler's warning), SIGHUP, and the end of the launcher ask a run to stop. While
it trains, it ends its step, or leaves its evaluation, saves and stops. At any other time there is nothing to save, and
the process ends. A second signal ends it at once: a save that is under way has no name yet, so nothing is harmed.
"""

import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable

import psutil
import torch
import torch.distributed as dist
from accelerate.utils import gather_object
from torch.utils.data import DataLoader
from transformers import TrainerCallback

from llmkit.signals import SIGNALS, ignore_signals

SAME_REQUEST = 2.0  # seconds: a terminal and Slurm signal the whole group, and the launcher passes on what it got
WATCH = 1.0  # seconds between two looks at the launcher
CLEANING_UP = 5.0  # seconds that a process which does not train has to end by itself


class _Requests:
    """What this process was asked."""

    listening = False
    training = False
    reason: str | None = None
    handlers: dict = {}  # to give back after the training
    first: float | None = None  # when the first signal came, in seconds of the monotonic clock


def listen() -> None:
    """Take the signals from here on, and watch the launcher, as a program of its own wants it; once is enough."""
    if _Requests.listening or threading.current_thread() is not threading.main_thread():
        return
    _Requests.listening = True
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup
            signal.signal(number, _receive)
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    # Python's handlers run when the main thread is next at it; a thread that reads the numbers need not wait for that.
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))
    threading.Thread(target=_watch, args=(reader, launcher_of_this(), os.getpid()), daemon=True).start()


def _receive(number: int, frame) -> None:
    _ask(signal.Signals(number).name)
    if not _Requests.training:
        sys.exit(128 + number)


def _ask(reason: str) -> None:
    if _Requests.reason is None:
        _Requests.reason = reason
        what = "saving at the end of this step" if _Requests.training else "nothing to save"
        if os.environ.get("LOCAL_RANK", "0") == "0":
            os.write(2, f"\n{reason}: {what}; once more ends at once\n".encode())  # print is not for handlers


def is_asked_to_stop() -> bool:
    """Whether this process was, while it trains."""
    return _Requests.training and _Requests.reason is not None


def is_listening() -> bool:
    """Whether this process is a program of llmkit's own; of somebody else's it is so during the training alone."""
    return _Requests.listening


def launcher_of_this() -> int | None:
    """The process that started this one, if it is accelerate's or torch's launcher: a shell may well end before."""
    if "ACCELERATE_MIXED_PRECISION" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ:
        return os.getppid()
    return None


def _watch(reader: int, launcher: int | None, process: int) -> None:
    """The thread's loop: end at a second signal, and ask for the end where the launcher is gone.

    Also end where the main thread does not come to its handler, which it does not within a library's long call, such
    as the training of a tokenizer.
    """
    ending: tuple[float, int] | None = None  # since when, and by which signal
    gone = launcher == 1 and not any("accelerate" in word or "torch" in word for word in psutil.Process(1).cmdline())
    while True:
        if select.select([reader], [], [], WATCH)[0]:
            for number in os.read(reader, 64):
                if number not in SIGNALS or signal.getsignal(number) is not _receive:
                    continue  # somebody else's, as the chat's Ctrl-C, which stops an answer
                now = time.monotonic()
                _Requests.first = now if _Requests.first is None else _Requests.first
                if now - _Requests.first > SAME_REQUEST:
                    os._exit(128 + number)
                if not _Requests.training:
                    ending = (now, number)
        elif launcher is not None and (gone or os.getppid() != launcher):
            launcher = None
            if _Requests.training:
                _ask("the launcher has ended")
            else:
                os.kill(process, signal.SIGTERM)
        is_late = ending is not None and time.monotonic() - ending[0] > CLEANING_UP
        if ending is not None and is_late and _Requests.listening and not _Requests.training:
            os._exit(128 + ending[1])


def leave_signals_to_the_run(worker_id: int) -> None:
    """A DataLoader's `worker_init_fn`: a signal to the whole group must not take away the data of the last step."""
    ignore_signals()


def keep_workers(loader: DataLoader) -> DataLoader:
    """Let the workers of a loader outlive a signal to the group."""
    inner = getattr(loader, "base_dataloader", loader)  # within accelerate's
    seed = inner.worker_init_fn

    def start(worker_id: int) -> None:
        leave_signals_to_the_run(worker_id)
        if seed is not None:
            seed(worker_id)

    inner.worker_init_fn = start
    return loader


class EvaluationStopped(Exception):
    """Raised on all ranks at the same batch of an evaluation, or of HellaSwag's questions."""


class StopOnRequest(TrainerCallback):
    """Ends the training of all ranks after the step in which one of them was asked to, or met a problem.

    The ranks agree on it at each step on the CPU: that waits for the slowest rank's Python, not for a device. It is
    also where a rank that has died is noticed.

    Attributes:
        problem: tells what keeps this rank from going on, or None.
        stopped: why the run was stopped before its end, or None.
        has_failed: whether that was a problem.
    """

    def __init__(self):
        self.problem: Callable[[], str | None] = lambda: None
        self.stopped: str | None = None
        self.has_failed = False
        self.group = None

    def on_train_begin(self, args, state, control, **kwargs):
        if not _Requests.listening:  # training in somebody else's program, which has its signals back afterwards
            _Requests.handlers = {number: signal.getsignal(number) for number in SIGNALS}
            listen()
        self.stopped = _Requests.reason = _Requests.first = None  # of an earlier training of this process
        self.has_failed = False
        _Requests.training = True

    def on_all_ranks(self, args, is_so: bool) -> bool:
        """Whether it is so on every rank; all ranks call it at the same time."""
        if args.world_size == 1:
            return is_so
        if self.group is None:
            self.group = dist.new_group(backend="gloo", timeout=args.ddp_timeout_delta)
        least = torch.tensor(int(is_so))
        dist.all_reduce(least, dist.ReduceOp.MIN, group=self.group)
        return bool(least.item())

    def agreed(self, args) -> bool:
        """Whether all ranks are to stop; they call it at the same time."""
        problem, request = self.problem(), _Requests.reason if _Requests.training else None
        if self.on_all_ranks(args, problem is None and request is None):
            return False
        problems, requests = gather_object([problem]), gather_object([request])
        self.has_failed = any(problems)
        self.stopped = next(filter(None, problems + requests))
        return True

    def on_step_end(self, args, state, control, **kwargs):
        if self.agreed(args):
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False  # it is made up for when the run goes on

    def on_save(self, args, state, control, **kwargs):
        if not self.stopped and self.agreed(args):
            control.should_training_stop = True

    def on_prediction_step(self, args, state, control, **kwargs):
        self.leave_evaluation(args)

    def on_evaluate(self, args, state, control, **kwargs):
        # After the samples, which the first rank makes alone and has left if it was asked to stop.
        if self._may_leave(args) and self.agreed(args):
            control.should_save = control.should_training_stop = True

    def leave_evaluation(self, args) -> None:
        """All ranks call it at the same time, between two batches.

        Raises:
            EvaluationStopped: on all ranks, if one of them was asked to stop.
        """
        if self._may_leave(args) and self.agreed(args):
            raise EvaluationStopped

    def leave_samples(self, args, together: bool) -> bool:
        """Whether to leave samples that are under way.

        Args:
            together: all ranks sample, and ask at the same time; else the first one alone does.
        """
        if not self._may_leave(args):
            return False
        return self.agreed(args) if together else _Requests.reason is not None

    @staticmethod
    def _may_leave(args) -> bool:
        # Where the best evaluation decides what is saved, leaving it would save nothing.
        return _Requests.training and args.save_strategy != "best"


def end_of_training() -> None:
    """From here on there is nothing to save, and a signal ends the process."""
    _Requests.training = False
    for number, handler in _Requests.handlers.items():
        signal.signal(number, handler)
    if _Requests.handlers:
        signal.set_wakeup_fd(-1)
        _Requests.listening, _Requests.handlers = False, {}
