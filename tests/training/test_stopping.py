"""A run that is asked to stop saves once and stops, whoever is asked and whatever it is doing."""

import hashlib
import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
from transformers import TrainerCallback

from llmkit.errors import exit_on_user_error
from llmkit.runs.run import read_log
from llmkit.training import stopping
from llmkit.training.callbacks import Samples
from llmkit.training.checkpoints import checkpoint_to_resume, checkpoints_of, damage_of
from ranks import print_into, start
from small_run import losses, trainer, weights

SAVING = {"save_strategy": "steps", "save_steps": 100}
SCRIPT = """
import os, sys
sys.path[:0] = [sys.argv[1], os.path.dirname(sys.argv[1])]
from llmkit.data.manifest import load_manifest
from llmkit.data.tokenizer import load_tokenizer
from test_stopping import long_run
long_run((load_manifest(sys.argv[2]), load_tokenizer(sys.argv[3])), sys.argv[4], *map(float, sys.argv[5:]))
"""


class Slowly(TrainerCallback):
    """All steps but the first, which is to be seen in the log."""

    def __init__(self, seconds: float):
        self.seconds = seconds

    def on_step_begin(self, args, state, control, **kwargs):
        time.sleep(self.seconds if state.global_step else 0)


@exit_on_user_error
def long_run(data, folder, step_seconds: float = 0.0, save_steps: float = 1_000_000) -> None:
    """What a rank does: a run that ends when it is told to."""
    stopping.listen()
    how = {"max_steps": 100_000, "save_strategy": "steps", "save_steps": int(save_steps)}
    run = trainer(data, folder, **how, per_device_train_batch_size=4, resume_from_checkpoint="latest")
    run.add_callback(Slowly(step_seconds))
    run.train(resume_from_checkpoint=checkpoint_to_resume(run.args))
    print(run.stopped, flush=True)


@pytest.fixture(autouse=True)
def own_handlers(monkeypatch):
    """The test's process keeps its handlers, and goes on where a run's would end."""
    monkeypatch.setattr(stopping, "CLEANING_UP", float("inf"))
    before = {number: signal.getsignal(number) for number in stopping.SIGNALS}
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it is ignored, and stays so
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
    signal.set_wakeup_fd(-1)
    stopping._Requests.listening = False
    stopping._Requests.reason = None


@pytest.mark.parametrize("number", stopping.SIGNALS)
def test_a_signal_saves_and_the_resumed_run_ends_with_the_same_bits(data, tmp_path, number):
    whole = trainer(data, tmp_path / "whole")
    whole.train()
    run = trainer(data, tmp_path / "run", **SAVING)
    forward = run.model.forward

    def interrupted(*args, **kwargs):
        if run.state.global_step == 2 and run.model.training:
            signal.raise_signal(number)
            signal.raise_signal(number)  # the launcher's, after the group's
        return forward(*args, **kwargs)

    run.model.forward = interrupted
    run.train()
    assert run.state.global_step == 3
    assert f"stopped ({signal.Signals(number).name}) at step 3 of 6, checkpoint saved in" in run.stopped
    assert damage_of(tmp_path / "run" / "checkpoint-3") is None
    again = trainer(data, tmp_path / "run", **SAVING)
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    assert losses(again) == losses(whole)
    assert all(torch.equal(weight, weights(again)[name]) for name, weight in weights(whole).items())


def test_a_signal_during_an_evaluation_or_a_save(data, tmp_path, monkeypatch):
    """Neither waits for another step; the evaluation is made up for."""
    how = {"save_strategy": "steps", "save_steps": 3, "eval_strategy": "steps", "eval_steps": 2}
    run = trainer(data, tmp_path, **how)
    step = run.prediction_step

    def interrupted(*args, **kwargs):
        signal.raise_signal(signal.SIGTERM)
        return step(*args, **kwargs)

    run.prediction_step = interrupted
    run.train()
    assert run.state.global_step == 2 and "checkpoint saved" in run.stopped
    assert not any("eval_loss" in record for record in run.state.log_history)
    again = trainer(data, tmp_path, **how)
    monkeypatch.setattr(again, "save_model", _signalling(again.save_model))
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert again.state.global_step == 3 and "checkpoint saved" in again.stopped
    records = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if "eval_loss" in record] == [2]


def test_a_signal_during_samples_leaves_them(data, tmp_path):
    """At the next token, and without another step."""
    how = SAVING | {"eval_strategy": "steps", "eval_steps": 2, "sample_prompts": ["1 times", "2 times"]}
    run = trainer(data, tmp_path, **how)
    (samples,) = [callback for callback in run.callback_handler.callbacks if isinstance(callback, Samples)]
    sample, made = samples.sample, []

    def interrupted(*args):
        signal.raise_signal(signal.SIGTERM)
        made.append(sample(*args))
        return made[-1]

    samples.sample = interrupted
    run.train()
    assert run.state.global_step == 2 and damage_of(tmp_path / "checkpoint-2") is None
    tokens = len(data[1](made[0])["input_ids"]) - len(data[1]("1 times")["input_ids"])
    assert len(made) == 1 and tokens <= 2  # one token, which may be two when its text is cut again
    records = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert any("eval_loss" in record for record in records) and not any("sample" in record for record in records)


def test_a_signal_during_hellaswag_leaves_it_and_it_is_made_up_for(data, hellaswag, tmp_path):
    how = SAVING | {"hellaswag_steps": 2, "hellaswag_file": hellaswag, "per_device_eval_batch_size": 4}
    whole = trainer(data, tmp_path / "whole", **how)
    whole.train()
    run = trainer(data, tmp_path / "run", **how)
    forward, scored = run.model.forward, []

    def interrupted(*args, **kwargs):
        if not run.model.training:
            signal.raise_signal(signal.SIGTERM)
            scored.append(run.state.global_step)
        return forward(*args, **kwargs)

    run.model.forward = interrupted
    run.train()
    assert scored == [2] and run.model.training
    assert run.state.global_step == 2 and damage_of(tmp_path / "run" / "checkpoint-2") is None
    trainer(data, tmp_path / "run", **how).train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    expected, found = (
        [{k: v for k, v in record.items() if k in ("step", "loss") or k.startswith("hellaswag")} for record in records]
        for records in (map(json.loads, (tmp_path / name / "log.jsonl").open()) for name in ("whole", "run"))
    )
    assert [record for record in found if len(record) > 1] == [record for record in expected if len(record) > 1]
    assert sum("hellaswag/acc" in record for record in found) == 3


def _signalling(save):
    def save_model(*args, **kwargs):
        save(*args, **kwargs)
        signal.raise_signal(signal.SIGTERM)

    return save_model


def idle(out: Path, other: bool) -> None:
    """A process that gets a signal without a run, which somebody else may have taken."""
    print_into(out)
    stopping.CLEANING_UP = 0.1
    stopping.listen()
    if other:
        signal.signal(signal.SIGUSR1, lambda *_: print("somebody else's", flush=True))
    signal.raise_signal(signal.SIGUSR1)
    time.sleep(2 * stopping.WATCH)


@pytest.mark.slow
def test_before_and_after_training_a_signal_ends_the_process(tmp_path):
    (process,) = start(1, idle, tmp_path / "out", False).processes
    process.join(120)
    assert process.exitcode == 128 + signal.SIGUSR1


@pytest.mark.slow
def test_a_signal_that_somebody_else_takes_is_theirs(tmp_path):
    """As Ctrl-C in a chat, which stops an answer."""
    (process,) = start(1, idle, tmp_path / "out", True).processes
    process.join(120)
    assert (process.exitcode, (tmp_path / "out").read_text()) == (0, "somebody else's\n")


def busy(out: Path) -> None:
    stopping.CLEANING_UP = 0.1
    stopping.listen()
    out.touch()
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)  # minutes in one call, in which no handler of Python's runs


@pytest.mark.slow
def test_a_signal_within_a_librarys_long_call_ends_a_process_that_does_not_train(tmp_path):
    """As the training of a tokenizer on much text is one."""
    (process,) = start(1, busy, tmp_path / "listening").processes
    wait((tmp_path / "listening").exists)
    process.terminate()
    process.join(60)
    process.kill()
    assert process.exitcode == 128 + signal.SIGTERM


def printing_run(data, tmp_path: Path, step_seconds: float = 0.0) -> None:
    print_into(tmp_path / "out")
    long_run(data, tmp_path / "run", step_seconds)


def begin(data, tmp_path, ranks: int, step_seconds: float = 0.0) -> list[psutil.Process]:
    """The ranks of a long run, without a launcher, when their first step is logged."""
    processes = start(ranks, printing_run, data, tmp_path, step_seconds).processes
    wait_for_a_step(tmp_path, lambda: all(process.is_alive() for process in processes))
    return [psutil.Process(process.pid) for process in processes]


def launch(data, tmp_path, *more: float, restarts: int = 0) -> tuple[subprocess.Popen, list[psutil.Process]]:
    """torch's launcher with two ranks of a long run, when their first step is logged."""
    data[1].save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "script.py").write_text(SCRIPT)
    places = [Path(__file__).parent, data[0].directory, tmp_path / "tokenizer", tmp_path / "run"]
    command = [sys.executable, "-m", "torch.distributed.run", "--local-addr", "127.0.0.1", "--nproc_per_node", 2]
    if restarts:  # as `accelerate launch` calls it, where ranks that start again get the store of those before them
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            command += ["--master-addr", "127.0.0.1", "--master-port", free.getsockname()[1]]
        command += ["--max-restarts", restarts]
    else:
        command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]
    with (tmp_path / "out").open("w") as out:
        process = subprocess.Popen(
            list(map(str, [*command, tmp_path / "script.py", *places, *more])), stdout=out, stderr=out
        )
    wait_for_a_step(tmp_path, lambda: process.poll() is None)
    ranks = psutil.Process(process.pid).children()
    assert len(ranks) == 2
    return process, ranks


def wait_for_a_step(tmp_path, is_alive: Callable[[], bool]) -> None:
    log = tmp_path / "run" / "log.jsonl"
    wait(lambda: not is_alive() or (log.exists() and '"loss"' in log.read_text()))
    assert is_alive(), (tmp_path / "out").read_text()


def wait(condition, seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.05)


def ended(ranks: list[psutil.Process]) -> bool:
    return not any(rank.is_running() and rank.status() != psutil.STATUS_ZOMBIE for rank in ranks)


def both_have_saved(tmp_path) -> None:
    """Into one checkpoint, and each rank has said so."""
    text = (tmp_path / "out").read_text()
    (checkpoint,) = checkpoints_of(tmp_path / "run")
    assert damage_of(checkpoint) is None, text
    assert text.count("checkpoint saved in") == 2, text


@pytest.mark.slow
def test_two_ranks_stop_together_where_one_is_asked(data, tmp_path):
    ranks = begin(data, tmp_path, 2)
    ranks[1].send_signal(signal.SIGUSR1)
    wait(lambda: ended(ranks))
    both_have_saved(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("who", ["launcher, killed", "launcher and ranks"])
def test_two_ranks_stop_together(data, tmp_path, who):
    process, ranks = launch(data, tmp_path)
    if who == "launcher, killed":
        process.kill()
    else:
        for each in (*ranks, process):
            each.send_signal(signal.SIGTERM)
    wait(lambda: ended(ranks))
    process.wait(timeout=60)
    both_have_saved(tmp_path)


@pytest.mark.slow
def test_a_rank_that_dies_ends_the_other_with_one_line_and_the_run_goes_on(data, tmp_path):
    """Under a launcher that may start the ranks again, from the last checkpoint."""
    process, ranks = launch(data, tmp_path, 0.1, 2, restarts=1)
    out = tmp_path / "out"
    wait(lambda: checkpoints_of(tmp_path / "run"))
    ranks[1].kill()
    wait(lambda: ended(ranks))
    text = out.read_text()
    assert "error: rank 0 has lost rank 1 (its process has ended): look for its own last line" in text, text
    assert "llmkit/training" not in text  # no traceback but the launcher's, which names the rank

    def steps(kind: str) -> list[int]:
        return [record["step"] for record in read_log(tmp_path / "run" / "log.jsonl") if kind in record]

    wait(lambda: process.poll() is not None or (len(steps("run")) == 2 and steps("loss")[-1] > steps("run")[1]))
    process.terminate()
    process.wait(timeout=60)
    assert steps("run")[1] % 2 == 0 and steps("run")[1] > 0, out.read_text()
    assert out.read_text().count("checkpoint saved in") == 2


@pytest.mark.slow
def test_a_second_signal_ends_a_long_step_at_once(data, tmp_path):
    (rank,) = begin(data, tmp_path, 1, step_seconds=60.0)
    rank.send_signal(signal.SIGINT)
    wait(lambda: "SIGINT: saving at the end of this step" in (tmp_path / "out").read_text())
    time.sleep(stopping.SAME_REQUEST + 0.1)
    rank.send_signal(signal.SIGINT)
    wait(lambda: ended([rank]), seconds=20)
    assert not checkpoints_of(tmp_path / "run")
