"""What a run does beside training."""

import re
from types import SimpleNamespace

import torch
from transformers import TrainerControl, TrainerState

from llmkit.training import callbacks
from llmkit.training.callbacks import ProgressLine, Throughput
from small_run import trainer


def test_speed_counts_the_steps_alone(monkeypatch):
    """Steps of one second; an evaluation and a checkpoint of 100 s each, between two logs and at one."""
    now = 0.0
    monkeypatch.setattr(callbacks.time, "perf_counter", lambda: now)
    throughput = Throughput(lambda step: 10 * step, flops_per_token=3, peak=60.0)
    args, state = SimpleNamespace(device=torch.device("cpu")), TrainerState()
    measured = []
    for step in range(1, 11):
        control = TrainerControl(should_evaluate=step % 3 == 0, should_save=step == 5, should_log=step % 5 == 0)
        throughput.on_step_begin(args, state, control)
        now += 1
        state.global_step = step
        throughput.on_step_end(args, state, control)
        if control.should_log:
            measured.append(throughput.measure(step))
        now += 100 * (control.should_evaluate + control.should_save)
    assert measured == [{"tokens_per_second": 10.0, "mfu": 0.5}] * 2


def test_a_log_file_says_how_long_it_still_takes(data, tmp_path, capsys):
    trainer(data, tmp_path, max_steps=4, disable_tqdm=False).train()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    left = [re.search(r" \| (\d\d:\d\d) left$", line) for line in lines]
    assert [bool(found) for found in left] == [False, True, True, False], "nothing is known after one step"


def test_trainers_last_log_is_no_line(capsys):
    line, state = ProgressLine(), TrainerState(max_steps=3, global_step=3, is_world_process_zero=True)
    line.on_train_begin(SimpleNamespace(disable_tqdm=True), state, None)
    for logs in ({"loss": 1.0}, {"train_runtime": 2.0, "rewards/margins": 0.0}):
        line.on_log(None, state, None, logs=logs)
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_the_time_left_is_that_of_the_steps_so_far(monkeypatch):
    now = iter([100.0, 130.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(now))
    line, state = ProgressLine(), TrainerState(max_steps=100, global_step=10)
    args = SimpleNamespace(disable_tqdm=True)
    line.on_train_begin(args, state, None)
    state.global_step = 20
    assert line._seconds_left(state) == 3.0 * 80
