"""A step whose loss or gradient is not finite, or far off, does no harm, and is told with its text."""

import json
import math

import pytest
import torch

from llmkit import cli
from llmkit.errors import UserError
from llmkit.training.checkpoints import checkpoints_of
from llmkit.training.nonfinite import StepGuard
from small_run import losses, trainer, weights

MICRO = {"per_device_train_batch_size": 4, "save_strategy": "steps", "save_steps": 2}


def poisoned(data, folder, step: int, what: str = "loss", **arguments):
    """A run whose second micro-batch of a step has a loss, or only a gradient, that is not a number."""
    run = trainer(data, folder, **{**MICRO, **arguments})
    forward, calls = run.model.forward, []

    def model(*args, **kwargs):
        output = forward(*args, **kwargs)
        if run.model.training and run.state.global_step == step - 1:
            calls.append(1)
            if len(calls) == 2 and what == "loss":
                output.loss = output.loss * torch.nan
            elif len(calls) == 2:
                output.loss.register_hook(lambda grad: grad * torch.nan)
        return output

    run.model.forward = model
    return run


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_it_reaches_no_weight_and_no_checkpoint(data, tmp_path, what):
    """Between two logs, as nothing else looks; the checkpoint before is the last one and it is clean."""
    run = poisoned(data, tmp_path, 4, what, logging_steps=10)
    with pytest.raises(UserError, match=f"the {what} is not finite at step 4.*nothing of it reached the weights"):
        run.train()
    assert all(torch.isfinite(weight).all() for weight in weights(run).values())
    states = run.optimizer.state_dict()["state"].values()
    assert all(torch.isfinite(value).all() for state in states for value in state.values())
    assert [path.name for path in checkpoints_of(tmp_path)] == ["checkpoint-2"]


def test_the_message_names_the_text(data, tmp_path):
    run = poisoned(data, tmp_path, 4)
    with pytest.raises(UserError) as told:
        run.train()
    start = str(told.value)
    assert "micro-batch 2 of rank 0: train_00000.bin, token" in start and "times" in start
    # What it names is what that micro-batch was made of.
    windows = list(run.sampler)[3 * 2 + 1]
    assert [run.sampler.windows(*run.batches.places(4)[1])] == [windows]
    stream = run.train_dataset.shards[0][:]
    offset = int(start.split("token ")[1].split(":")[0].replace(",", ""))
    end = data[0].eos_token_id
    assert offset == 0 or stream[offset - 1] == end
    first = windows[0] * 16
    assert offset <= first and end not in stream[offset:first]


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "muon"])
def test_a_skipped_step_moves_nothing_and_is_skipped_again(data, tmp_path, optim):
    """Weights and moments stay, the schedule goes on; a resumed run ends with the same bits."""
    how = {"on_nonfinite": "skip", "optim": optim}
    run = poisoned(data, tmp_path / "run", 4, **how)
    seen = {}
    save = run._save_checkpoint

    def note(*args):
        seen[run.state.global_step] = weights(run)
        save(*args)

    run._save_checkpoint, run.args.save_steps = note, 1
    run.train()
    before, after = seen[2], seen[4]
    assert any(not torch.equal(before[name], after[name]) for name in before)  # by step 3
    records = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [record["skipped_step"] for record in records if "skipped_step" in record] == [4]
    assert run.guard.skipped == [4] and all(map(math.isfinite, losses(run)))
    again = poisoned(data, tmp_path / "run", 4, **how)
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert again.guard.skipped == [4]
    assert all(torch.equal(weight, weights(again)[name]) for name, weight in weights(run).items())
    last = trainer(data, tmp_path / "run", **MICRO, **how)
    last.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-6"))
    assert last.guard.skipped == [4]  # it came with the checkpoint


@pytest.fixture
def judging_optimizer(monkeypatch):
    """The way of a GPU with a fused optimizer, which the CPU's fused AdamW can go as well."""
    monkeypatch.setattr(StepGuard, "_optimizer_can_judge", staticmethod(lambda args, optimizer: True))


def test_the_optimizer_leaves_a_step_out_and_nobody_waits(data, tmp_path, monkeypatch):
    """The verdict on a step is read in the next one; weights, moments and their count are as in the other way."""
    expected = poisoned(data, tmp_path / "expected", 4, on_nonfinite="skip", logging_steps=10, save_strategy="no")
    expected.train()
    monkeypatch.setattr(StepGuard, "_optimizer_can_judge", staticmethod(lambda args, optimizer: True))
    run = poisoned(data, tmp_path / "run", 4, on_nonfinite="skip", logging_steps=10, save_strategy="no")
    known = []
    read = run.guard._read
    monkeypatch.setattr(run.guard, "_read", lambda *args: (read(*args), known.append(list(run.guard.skipped))))
    run.train()
    assert known[3] == [] and known[4] == [4]  # in steps 4 and 5
    assert run.guard.recent == expected.guard.recent and len(run.guard.recent) == 5
    assert all(torch.equal(weight, weights(run)[name]) for name, weight in weights(expected).items())
    states = [each.optimizer.state_dict()["state"] for each in (run, expected)]
    assert all(torch.equal(value, states[1][n][key]) for n, state in states[0].items() for key, value in state.items())


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_late_verdict_comes_before_anything_is_saved(data, tmp_path, judging_optimizer, what):
    run = poisoned(data, tmp_path, 4, what, logging_steps=10)
    with pytest.raises(UserError, match=f"the {what} is not finite at step 4"):
        run.train()
    assert run.state.global_step == 4  # in which a checkpoint was due
    assert [path.name for path in checkpoints_of(tmp_path)] == ["checkpoint-2"]
    assert all(torch.isfinite(weight).all() for weight in weights(run).values())


def test_the_skipped_step_itself(data, tmp_path):
    run = poisoned(data, tmp_path, 1, on_nonfinite="skip", max_steps=1)
    before = weights(run)
    run.train()
    assert all(torch.equal(weight, before[name]) for name, weight in weights(run).items())
    assert not run.optimizer.state_dict()["state"]


def test_more_than_ten_are_too_many(data, tmp_path):
    run = trainer(data, tmp_path, learning_rate=1e30, max_grad_norm=0.0, on_nonfinite="skip", max_steps=30)
    with pytest.raises(UserError, match="number 11 that was left out of 1,000 steps"):
        run.train()


@pytest.mark.parametrize("how", ["ignore", "warn", "skip"])
def test_spikes(data, tmp_path, how, capsys, monkeypatch):
    monkeypatch.setattr("llmkit.training.nonfinite.FEWEST", 4)
    run = trainer(data, tmp_path, on_spike=how, max_steps=8, learning_rate=1e-4)
    forward = run.model.forward

    def model(*args, **kwargs):
        output = forward(*args, **kwargs)
        if run.state.global_step == 5:
            output.loss = output.loss * 3
        return output

    run.model.forward = model
    run.train()
    told = "the loss of step 6 is" in capsys.readouterr().out
    assert (told, run.guard.skipped) == {"ignore": (False, []), "warn": (True, []), "skip": (True, [6])}[how]
    assert len(losses(run)) == 8


def test_blame_prints_what_a_step_was_trained_on(data, tmp_path, capsys):
    """Every window of the batch, where the loader gave it; and mistakes in one line."""
    run = trainer(data, tmp_path, **MICRO, batch_ramp_start=6 * 16, batch_ramp_tokens=12 * 16)
    batches = list(run.sampler)[2:4]
    run.train()
    run.processing_class.save_pretrained(tmp_path)
    capsys.readouterr()
    cli.main(["blame", str(tmp_path), "--step", "2"])
    lines = capsys.readouterr().out.splitlines()
    shown = [line.split(": ")[0] for line in lines]
    expected = [
        f"rank 0, micro-batch {micro + 1}, window {window:,}"
        for micro, batch in enumerate(batches)
        for window in batch
    ]
    assert list(dict.fromkeys(shown)) == expected
    assert all("train_00000.bin, token" in line and "times" in line for line in lines)
    for step in ("0", "9999"):
        with pytest.raises(SystemExit):
            cli.main(["blame", str(tmp_path), "--step", step])
        assert "the run has steps 1 to" in capsys.readouterr().err
