"""A run whose length is stated in minutes becomes a run of so many steps, like any other one."""

import json
import random

import pytest
import torch
from transformers import TrainerCallback

from llmkit.errors import UserError
from llmkit.finetuning.arguments import SFTArguments
from llmkit.training.arguments import PretrainArguments
from llmkit.training.budget import FEWEST, REHEARSAL, WARM_UP, evaluations, fix_length, saves
from llmkit.training.run_arguments import RunArguments
from small_run import losses, parts, trainer, weights


class Clock:
    """Seconds that pass by what is done: with each training step, validation batch and save, and not otherwise."""

    def __init__(self, step: float = 1.0, batch: float = 0.0, save: float = 0.0):
        self.now, self.step, self.batch, self.save = 0.0, step, batch, save

    def __call__(self) -> float:
        return self.now

    def pass_by(self, seconds: float) -> None:
        self.now += seconds

    def drives(self, make):
        """`make`, with trainers for which this clock goes on."""

        def driven(model, args):
            model.register_forward_hook(lambda module, *_: self.pass_by(self.step if module.training else self.batch))
            run = make(model, args)
            run.add_callback(_SlowSave(self))
            return run

        return driven


class _SlowSave(TrainerCallback):
    def __init__(self, clock: Clock):
        self.clock = clock

    def on_save(self, *args, **kwargs):
        self.clock.pass_by(self.clock.save)


def with_dropout(data, output_dir, **given):
    """Parts of a run that draws random numbers."""
    make, model, args = parts(data, output_dir, **given)
    model.config.resid_pdrop = 0.1
    return make, model, args


def no_clock() -> float:
    raise AssertionError("nothing is to be measured")


def fixed(data, output_dir, clock: Clock, **given) -> RunArguments:
    make, model, args = parts(data, output_dir, max_steps=-1, **given)
    fix_length(clock.drives(make), model, args, None, clock)
    return args


def test_steps_follow_from_the_pace(data, tmp_path):
    # 600 s: 3 steps of warm-up and 24 for 4% of the budget are measured with, the rest is the run's
    args = fixed(data, tmp_path, Clock(step=1), train_minutes=10)
    assert args.max_steps == 600 - WARM_UP - 24
    args = fixed(data, tmp_path, Clock(step=2), train_minutes=10)
    assert args.max_steps == (600 - 2 * (WARM_UP + 12)) // 2


def test_evaluations_and_saves_are_part_of_the_budget(data, tmp_path):
    often = {"eval_strategy": "steps", "eval_steps": 0.25, "save_strategy": "steps", "save_steps": 100}
    clock = Clock(step=1, batch=0.5, save=7)
    args = fixed(data, tmp_path, clock, train_minutes=10, per_device_eval_batch_size=16, **often)
    batches = -(-len(parts(data, tmp_path)[0].keywords["eval_dataset"]) // 16)

    def seconds(steps: int) -> float:
        return steps + 4 * batches * 0.5 + (-(-steps // 100) + 1) * 7

    left = 600 - clock.now
    assert clock.now < 60 and seconds(args.max_steps) <= left < seconds(args.max_steps + 1)


@pytest.mark.parametrize("seconds", [2.0, 90.0])
def test_at_least_some_steps_are_timed(data, tmp_path, seconds):
    clock = Clock(step=seconds)
    fixed(data, tmp_path, clock, train_minutes=10 * seconds)
    assert clock.now >= (WARM_UP + FEWEST) * seconds


def test_a_budget_that_is_too_small(data, tmp_path):
    with pytest.raises(UserError, match=r"train_minutes=1: .* take \d.* minutes here: give more, or max_steps"):
        fixed(data, tmp_path, Clock(step=20), train_minutes=1)


@pytest.mark.parametrize("rates", [{}, {"optim": "muon", "muon_learning_rate": 0.02}])
def test_a_rehearsal_hardly_moves_a_weight(data, tmp_path, rates):
    """So that it cannot diverge. At the run's own rate a matrix of Muon's moves by more than its size."""
    make, model, args = parts(data, tmp_path, max_steps=-1, train_minutes=10, **rates)
    rehearsed = []

    def watched(model, args):
        rehearsed.append(make(model, args))
        return rehearsed[-1]

    clock = Clock()
    fix_length(clock.drives(watched), model, args, None, clock)
    before = dict(model.named_parameters())
    (after,) = (weights(run) for run in rehearsed)
    for name in before:
        torch.testing.assert_close(after[name], before[name].detach(), atol=1e-4, rtol=0)


def test_it_is_the_run_of_that_many_steps_and_goes_on_as_one(data, tmp_path):
    how = {"save_strategy": "steps", "save_steps": 0.25, "eval_strategy": "steps", "eval_steps": 0.5}
    how |= {"warmup_steps": 0.2}
    clock = Clock(step=6)
    make, model, args = with_dropout(data, tmp_path / "budget", max_steps=-1, train_minutes=2, **how)
    before = {name: p.clone() for name, p in model.named_parameters()}
    random_before = random.getstate(), torch.get_rng_state()
    fix_length(clock.drives(make), model, args, None, clock)
    assert random.getstate() == random_before[0] and torch.equal(torch.get_rng_state(), random_before[1])
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert not (tmp_path / "budget" / REHEARSAL).exists()
    run = make(model, args)
    run.train()
    steps = (120 - 6 * (WARM_UP + FEWEST)) // 6
    assert run.state.global_step == args.max_steps == steps

    make, model, args = with_dropout(data, tmp_path / "plain", max_steps=steps, **how)
    plain = make(model, args)
    plain.train()
    assert losses(plain) == losses(run)
    expected = weights(plain)
    assert all(torch.equal(p, expected[name]) for name, p in weights(run).items())

    record = json.loads((tmp_path / "budget" / "log.jsonl").read_text().splitlines()[0])["run"]
    assert record["arguments"]["max_steps"] == steps and record["arguments"]["train_minutes"] == 2
    checkpoint = str(tmp_path / "budget" / f"checkpoint-{-(-steps // 4)}")
    make, model, args = with_dropout(data, tmp_path / "budget", max_steps=-1, train_minutes=2, **how)
    fix_length(make, model, args, checkpoint, no_clock)
    again = make(model, args)
    again.train(resume_from_checkpoint=checkpoint)
    assert losses(again) == losses(run)
    assert all(torch.equal(p, expected[name]) for name, p in weights(again).items())

    make, model, args = with_dropout(data, tmp_path / "budget", max_steps=-1, train_minutes=3, **how)
    with pytest.raises(UserError, match="resumed with train_minutes=3, and its run had train_minutes=2"):
        fix_length(make, model, args, checkpoint, no_clock)
    plain = str(tmp_path / "plain" / f"checkpoint-{steps}")
    with pytest.raises(UserError, match="resumed with train_minutes=3, and its run had no train_minutes"):
        fix_length(make, model, args, plain, no_clock)


def test_other_lengths_are_left_alone(data, tmp_path):
    make, model, args = parts(data, tmp_path, max_steps=5)
    fix_length(make, model, args, None, no_clock)
    assert args.max_steps == 5


def test_a_trainer_wants_its_length_fixed(data, tmp_path):
    with pytest.raises(UserError, match="train_minutes: call llmkit.training.budget.fix_length"):
        trainer(data, tmp_path, max_steps=-1, train_minutes=1)


@pytest.mark.parametrize("kind", [PretrainArguments, SFTArguments], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize(
    "given, message",
    [
        ({"max_steps": 10}, "train_minutes=4 and max_steps=10: give one of them"),
        ({"num_train_epochs": 2}, "train_minutes=4 and num_train_epochs=2: give one of them"),
        ({"train_minutes": 0.0}, "train_minutes=0.0: give minutes"),
        ({"train_minutes": float("nan")}, "train_minutes=nan: give minutes"),
    ],
    ids=str,
)
def test_one_length_is_given(kind, given, message):
    with pytest.raises(UserError, match=message):
        kind(**{"output_dir": "unused", "use_cpu": True, "report_to": "none", "train_minutes": 4} | given)


@pytest.mark.parametrize(
    "kind, given, message",
    [
        (SFTArguments, {"eval_strategy": "epoch"}, "eval_strategy: epoch does not go with train_minutes"),
        (SFTArguments, {"save_strategy": "epoch"}, "save_strategy: epoch does not go with train_minutes"),
        (PretrainArguments, {"batch_ramp_start": 32, "batch_ramp_tokens": 64}, "what batch_ramp_start takes"),
        (PretrainArguments, {"hellaswag_steps": 10, "logging_steps": 10}, "what hellaswag_steps takes"),
    ],
    ids=str,
)
def test_what_cannot_be_counted_is_refused(kind, given, message):
    with pytest.raises(UserError, match=message):
        kind(output_dir="unused", use_cpu=True, report_to="none", train_minutes=4, **given)


@pytest.mark.parametrize("steps", [1, 7, 8, 20])
@pytest.mark.parametrize(
    "how",
    [
        {"eval_strategy": "steps", "eval_steps": 0.25, "save_strategy": "steps", "save_steps": 3},
        {"eval_strategy": "steps", "eval_steps": 4, "eval_delay": 8, "save_strategy": "no", "eval_on_start": True},
        {"eval_strategy": "no", "save_strategy": "steps", "save_steps": 0.5},
    ],
    ids=str,
)
def test_counts_are_those_of_a_run(data, tmp_path, how, steps):
    counted = {"evaluations": 0, "saves": 0}

    class Count(TrainerCallback):
        def on_evaluate(self, *args, **kwargs):
            counted["evaluations"] += 1

        def on_save(self, *args, **kwargs):
            counted["saves"] += 1

    run = trainer(data, tmp_path, max_steps=steps, **how)
    run.add_callback(Count)
    run.train()
    run.evaluate()
    assert counted == {"evaluations": evaluations(run.args, steps), "saves": saves(run.args, steps)}


def test_a_part_of_the_run_is_no_step_that_is_always_due(data, tmp_path):
    """An evaluation is made up for where the interrupted run left it out, and nowhere else."""
    how = {"eval_strategy": "steps", "eval_steps": 0.5, "save_strategy": "steps", "save_steps": 2, "max_steps": 6}
    trainer(data, tmp_path, **how).train()
    again = trainer(data, tmp_path, **how)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [record["step"] for record in log if "eval_loss" in record] == [3, 6]
