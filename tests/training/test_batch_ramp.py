"""A batch that grows: how it grows, what each step trains, and that it is exact on resume."""

import shutil

import numpy as np
import pytest
import torch
import torch._dynamo.config

from llmkit.errors import UserError
from llmkit.machine import set_up
from llmkit.training.batch_ramp import Batches
from small_run import BLOCK, losses, trainer, weights

RAMP = {"batch_ramp_start": 3 * BLOCK, "batch_ramp_tokens": 30 * BLOCK, "per_device_train_batch_size": 4}


@pytest.mark.parametrize(
    ("full_steps", "full", "start", "ramp"),
    [(10, 16, 2, 60), (10, 16, 16, 0), (40, 8, 2, 1000), (3, 8, 3, 11), (1, 8, 2, 5), (100, 7, 6, 9), (2, 8, 2, 16)],
)
def test_the_tokens_are_those_of_the_full_batches(full_steps, full, start, ramp):
    batches = Batches(full_steps, full, micro_batches=2, start=start, ramp=ramp)
    sizes = batches.step_sizes.tolist()
    assert sum(sizes) == full_steps * full and max(sizes) <= full and min(sizes) >= 2
    assert len(sizes) == batches.num_steps == len(batches) // 2
    seen = 0
    for step, size in enumerate(sizes[:-2]):  # the last two take what is left
        assert size == (round(start + (full - start) * seen / ramp) if seen < ramp else full)
        assert batches.windows_before(step) == seen and batches.full_batches_before(step) == seen / full
        seen += size
    micro = np.array(list(batches)).reshape(-1, 2)
    assert (micro.sum(axis=1) == sizes).all() and (abs(micro[:, 0] - micro[:, 1]) <= 1).all()
    assert batches.windows_before(batches.num_steps + 1) == full_steps * full


def test_gpt3s_ramp():
    """32k to 0.5M tokens over 4B: what it costs in steps."""
    batches = Batches(full_steps=572_205, full=256, micro_batches=8, start=16, ramp=4_000_000_000 // 2048)
    assert batches.step_sizes[0] == 16 and batches.step_sizes[-3] == 256
    ramp_steps = int((batches.step_sizes < 256).sum())
    # d(batch)/d(step) = batch * (full - start) / ramp: an exponential, so ramp / (full - start) * ln(full / start)
    assert ramp_steps == pytest.approx(1_953_125 / 240 * np.log(16), rel=0.01)
    assert batches.num_steps - 572_205 == pytest.approx(ramp_steps - 1_953_125 / 256, rel=0.01)


def test_every_size_may_have_its_compiled_graph(data, tmp_path):
    with torch._dynamo.config.patch(recompile_limit=1):
        run = trainer(data, tmp_path, **RAMP, torch_compile=True)
        set_up(run.args)
        assert torch._dynamo.config.recompile_limit > len(set(run.batches)) > 1


@pytest.mark.parametrize("accumulation", [2, 4])
def test_a_ramped_run_is_a_loop_over_its_windows(data, tmp_path, accumulation):
    """Tokens, learning rates, losses and weights of a plain loop without micro-batches."""
    how = {**RAMP, "per_device_train_batch_size": 8 // accumulation, "warmup_steps": 2, "weight_decay": 0.0}
    if accumulation == 4:
        how["batch_ramp_start"] = 4 * BLOCK
    run = trainer(data, tmp_path, **how, max_grad_norm=0.0, optim="sgd", learning_rate=0.5)
    twin = type(run.model)(run.model.config)
    twin.load_state_dict(run.model.state_dict())
    run.train()

    sizes = run.batches.step_sizes.tolist()
    assert sum(sizes) == 6 * 8 and len(set(sizes)) > 4
    order = run.train_dataset.order(run.args.seed).windows(0, 48)
    optimizer, seen, expected = torch.optim.SGD(twin.parameters(), lr=0.5), 0, []
    twin.train()
    for size in sizes:
        before, after = seen / 8, (seen + size) / 8
        rate = min(1, after / 2) if before < 2 else (1 + np.cos(np.pi * (before - 2) / 4)) / 2
        optimizer.param_groups[0]["lr"] = 0.5 * rate
        windows = [run.train_dataset[index] for index in order[seen : seen + size]]
        batch = {name: torch.stack([window[name] for window in windows]) for name in windows[0]}
        loss = twin(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seen += size
        expected.append((seen * BLOCK, loss.item(), 0.5 * rate))
    found = [(e["tokens"], e["loss"], e["learning_rate"]) for e in run.state.log_history if "loss" in e]
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    for name, weight in twin.named_parameters():
        torch.testing.assert_close(weights(run)[name], weight.detach(), rtol=1e-4, atol=1e-6)


def test_resuming_inside_the_ramp_ends_with_the_same_bits(data, tmp_path):
    how = {**RAMP, "save_strategy": "steps", "save_steps": 4}
    whole = trainer(data, tmp_path / "whole", **how)
    whole.train()
    assert whole.batches.step_sizes[4] < 8, "not inside the ramp"
    shutil.copytree(tmp_path / "whole" / "checkpoint-4", tmp_path / "again" / "checkpoint-4")
    again = trainer(data, tmp_path / "again", **how)
    again.train(resume_from_checkpoint=str(tmp_path / "again" / "checkpoint-4"))
    rest = whole.batches.num_steps - 4
    assert losses(again)[-rest:] == losses(whole)[-rest:]
    assert all(torch.equal(weight, weights(again)[name]) for name, weight in weights(whole).items())
    run = trainer(data, tmp_path / "whole", **{**how, "batch_ramp_tokens": 20 * BLOCK})
    with pytest.raises(UserError, match="resumed with batch_ramp_tokens=320, and its run had 480"):
        run.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))


def test_speed_and_summary(data, tmp_path):
    run = trainer(data, tmp_path, **RAMP, logging_steps=3)
    text = run.summary()
    assert "128 tokens = 4 x 16 x 2 accumulated x 1 rank(s), from 48 over the first 480" in text
    assert f"{run.batches.num_steps} steps (6 full batches) = 768 tokens" in text
    assert run.record["arguments"]["max_steps"] == 6 and run.record["steps"] == run.batches.num_steps
    run.throughput.started, run.throughput.first_step = 0.0, 2
    windows = sum(run.batches.step_sizes[2:5])
    speed = run.throughput.measure(5)["tokens_per_second"]
    run.throughput.started, run.throughput.first_step = 0.0, 0
    assert speed / run.throughput.measure(1)["tokens_per_second"] == pytest.approx(windows / 3, rel=0.01)


def test_what_is_refused(data, tmp_path):
    for given, message in [
        ({"batch_ramp_start": 16}, "batch_ramp_start and batch_ramp_tokens belong together"),
        (
            {"batch_ramp_start": 40, "batch_ramp_tokens": 99},
            "batch_ramp_start=40: give a multiple of block_size=16",
        ),
        ({"batch_ramp_start": 16, "batch_ramp_tokens": 99}, "batch_ramp_start=16: give .* from 32 .* to .*=128"),
        ({"batch_ramp_start": 256, "batch_ramp_tokens": 99}, "batch_ramp_start=256: give"),
        ({"batch_ramp_start": 32, "batch_ramp_tokens": 0}, "batch_ramp_tokens=0: must be at least 1"),
        ({**RAMP, "lr_schedule": "one_cycle"}, "one_cycle counts steps of one size"),
    ]:
        with pytest.raises(UserError, match=message):
            trainer(data, tmp_path, **{"per_device_train_batch_size": 4, **given})
