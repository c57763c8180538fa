"""A run that is asked to stop saves once and stops, whoever is asked and whatever it is doing."""

import json
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from llmkit.runs.run import read_log
from llmkit.training import stopping
from llmkit.training.callbacks import Samples
from llmkit.training.checkpoints import checkpoints_of, damage_of
from small_run import losses, trainer, weights

SAVING = {"save_strategy": "steps", "save_steps": 100}
SCRIPT = """
import sys, time
sys.path.insert(0, sys.argv[1])
from llmkit.data.manifest import load_manifest
from llmkit.data.tokenizer import load_tokenizer
from llmkit.errors import exit_on_user_error
from llmkit.training.checkpoints import checkpoint_to_resume
from llmkit.training.stopping import listen
from small_run import trainer
from transformers import TrainerCallback

class Slowly(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        time.sleep(float(sys.argv[5]))

@exit_on_user_error
def main():
    listen()
    data = load_manifest(sys.argv[2]), load_tokenizer(sys.argv[3])
    run = trainer(data, sys.argv[4], max_steps=100_000, save_strategy="steps", save_steps=int(sys.argv[6]),
                  per_device_train_batch_size=4, resume_from_checkpoint="latest")
    run.add_callback(Slowly)
    run.train(resume_from_checkpoint=checkpoint_to_resume(run.args))
    print(run.stopped, flush=True)

main()
"""


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


IDLE = """
import signal, sys, time
from llmkit.training import stopping
stopping.CLEANING_UP = 0.1
stopping.listen()
if sys.argv[1] == "others":
    signal.signal(signal.SIGUSR1, lambda *args: print("somebody else's", flush=True))
signal.raise_signal(signal.SIGUSR1)
time.sleep(2 * stopping.WATCH)
"""


@pytest.mark.slow
def test_before_and_after_training_a_signal_ends_the_process():
    """In a process of its own, which such a signal ends even if somebody catches the exit."""
    done = subprocess.run([sys.executable, "-c", IDLE, "ours"], capture_output=True, timeout=120)
    assert done.returncode == 128 + signal.SIGUSR1


@pytest.mark.slow
def test_a_signal_that_somebody_else_takes_is_theirs():
    """As Ctrl-C in a chat, which stops an answer."""
    done = subprocess.run([sys.executable, "-c", IDLE, "others"], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "somebody else's\n"), done.stderr


BUSY = """
import hashlib
from llmkit.training import stopping
stopping.CLEANING_UP = 0.1
stopping.listen()
print("listening", flush=True)
hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)  # many minutes in one call, in which no handler of Python's runs
"""


@pytest.mark.slow
def test_a_signal_within_a_librarys_long_call_ends_a_process_that_does_not_train():
    """As the training of a tokenizer on much text is one."""
    with subprocess.Popen([sys.executable, "-c", BUSY], stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"listening\n"
        process.send_signal(signal.SIGTERM)
        try:
            assert process.wait(timeout=60) == 128 + signal.SIGTERM
        finally:
            process.kill()


def start(
    data, tmp_path, ranks: int, step_seconds: float = 0.0, save_steps: int = 1_000_000, restarts: int = 0
) -> tuple[subprocess.Popen, Path]:
    """A long run under torch's launcher, of which the first steps are logged."""
    data[1].save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "script.py").write_text(SCRIPT)
    places = [Path(__file__).parents[1], data[0].directory, tmp_path / "tokenizer", tmp_path / "run"]
    command = [sys.executable, "-m", "torch.distributed.run", "--local-addr", "127.0.0.1", "--nproc_per_node", ranks]
    if restarts:  # as `accelerate launch` calls it, where ranks that start again get the store of those before them
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            command += ["--master-addr", "127.0.0.1", "--master-port", free.getsockname()[1]]
        command += ["--max-restarts", restarts]
    else:
        command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]
    command += [tmp_path / "script.py", *places, step_seconds, save_steps]
    with (tmp_path / "out").open("w") as out:
        process = subprocess.Popen(list(map(str, command)), stdout=out, stderr=out)
    log = tmp_path / "run" / "log.jsonl"
    wait(lambda: process.poll() is not None or (log.exists() and '"loss"' in log.read_text()))
    assert process.poll() is None, (tmp_path / "out").read_text()
    return process, tmp_path / "out"


def wait(condition, seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.05)


def ended(ranks: list[psutil.Process]) -> bool:
    return not any(rank.is_running() and rank.status() != psutil.STATUS_ZOMBIE for rank in ranks)


@pytest.mark.slow
@pytest.mark.parametrize("who", ["one rank", "launcher, killed", "launcher and ranks"])
def test_two_ranks_stop_together(data, tmp_path, who):
    process, out = start(data, tmp_path, 2)
    ranks = psutil.Process(process.pid).children()
    assert len(ranks) == 2
    if who == "one rank":
        ranks[1].send_signal(signal.SIGUSR1)
    elif who == "launcher, killed":
        process.kill()
    else:
        for each in (*ranks, process):
            each.send_signal(signal.SIGTERM)
    wait(lambda: ended(ranks))
    process.wait(timeout=60)
    (checkpoint,) = checkpoints_of(tmp_path / "run")
    assert damage_of(checkpoint) is None, out.read_text()
    assert out.read_text().count("checkpoint saved in") == 2  # each rank's line


@pytest.mark.slow
def test_a_rank_that_dies_ends_the_other_with_one_line_and_the_run_goes_on(data, tmp_path):
    """Under a launcher that may start the ranks again, from the last checkpoint."""
    process, out = start(data, tmp_path, 2, step_seconds=0.1, save_steps=2, restarts=1)
    wait(lambda: checkpoints_of(tmp_path / "run"))
    ranks = psutil.Process(process.pid).children()
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
    process, out = start(data, tmp_path, 1, step_seconds=30.0)
    (rank,) = psutil.Process(process.pid).children()
    rank.send_signal(signal.SIGINT)
    wait(lambda: "SIGINT: saving at the end of this step" in out.read_text())
    time.sleep(stopping.SAME_REQUEST + 0.1)
    rank.send_signal(signal.SIGINT)
    wait(lambda: ended([rank]), seconds=20)
    process.wait(timeout=60)
    assert not checkpoints_of(tmp_path / "run")
