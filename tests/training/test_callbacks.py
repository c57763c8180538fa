"""What a run does beside training."""

from types import SimpleNamespace

import torch
from transformers import TrainerControl, TrainerState

from llmkit.training import callbacks
from llmkit.training.callbacks import Throughput


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
