"""Schedules: golden values, no wasted step, one_cycle equal to torch's at any number of ranks, exact on resume."""

import math
import shutil

import pytest
import torch
from torch.optim import AdamW
from torch.optim.lr_scheduler import OneCycleLR

from llmkit.errors import UserError
from llmkit.finetuning.arguments import SFTArguments
from llmkit.training.arguments import PretrainArguments
from llmkit.training.schedules import create_schedule, describe_schedule
from small_run import losses, trainer, weights

STEPS = 20


def arguments(**given) -> PretrainArguments:
    return PretrainArguments(output_dir="unused", use_cpu=True, report_to="none", **{"learning_rate": 1.0, **given})


def rates(args: PretrainArguments, num_steps: int = STEPS, lrs: tuple = (1.0,), position=float) -> list[list[float]]:
    """The learning rates of each group at each step of a loop as Trainer's."""
    optimizer = AdamW([{"params": [torch.zeros(1, requires_grad=True)], "lr": lr} for lr in lrs])
    schedule = create_schedule(optimizer, args, num_steps, position)
    found = []
    for _ in range(num_steps):
        found.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    return found


def single(args: PretrainArguments, **kwargs) -> list[float]:
    return [rate for (rate,) in rates(args, **kwargs)]


def test_cosine_is_build_nanogpts():
    found = single(arguments(warmup_steps=4, min_lr_ratio=0.1))
    for step, rate in enumerate(found):
        if step < 4:
            assert rate == (step + 1) / 4
        else:
            assert rate == pytest.approx(0.1 + 0.5 * (1 + math.cos(math.pi * (step - 4) / (STEPS - 4))) * 0.9)
    assert found[0] > 0, "the first step was wasted"


def test_linear_and_an_end_before_the_runs():
    assert single(arguments(lr_schedule="linear")) == pytest.approx([1 - s / STEPS for s in range(STEPS)])
    for name in ("linear", "cosine"):
        found = single(arguments(lr_schedule=name, warmup_steps=2, decay_until_step=12, min_lr_ratio=0.25))
        assert found[:2] == [0.5, 1.0] and found[7] == pytest.approx((1 + 0.25) / 2)
        assert found[12:] == [0.25] * 8 and found[11] > 0.25


def test_wsd():
    found = single(arguments(lr_schedule="wsd", warmup_steps=2, wsd_decay_steps=8, min_lr_ratio=0.1))
    assert found[:12] == [0.5] + [1.0] * 11
    assert found[12:] == pytest.approx([0.1 + 0.9 * (1 - math.sqrt(n / 8)) for n in range(8)])
    fraction = single(arguments(lr_schedule="wsd", warmup_steps=0.1, wsd_decay_steps=0.4, min_lr_ratio=0.1))
    assert fraction == found


def test_constant():
    assert single(arguments(lr_schedule="constant", warmup_steps=3)) == pytest.approx([1 / 3, 2 / 3] + [1.0] * 18)


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd", "one_cycle", "constant"])
def test_groups_keep_their_own_peak(name):
    found = rates(arguments(lr_schedule=name, warmup_steps=3), lrs=(1.0, 0.02, 3.0))
    for one, second, third in found:
        assert (second, third) == pytest.approx((0.02 * one, 3 * one))


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd", "constant"])
def test_smaller_batches_take_the_schedule_as_it_was(name):
    """Twice as many steps of half the size: at the same tokens, the same rate but for a step's width."""
    args = arguments(lr_schedule=name, warmup_steps=4)
    whole, halves = single(args), single(args, position=lambda step: step / 2)
    assert halves[0] == whole[0] / 2
    assert halves[8::2] == pytest.approx(whole[4:10])


def test_phases_that_do_not_fit_are_refused():
    for given, message in [
        ({"lr_schedule": "wsd", "warmup_steps": 3, "wsd_decay_steps": 8}, "warmup_steps=3 and wsd_decay_steps=8 do"),
        (
            {"decay_until_step": 11},
            "decay_until_step=11 lies between the end of the warm-up .0.",
        ),
        ({"decay_until_step": 3, "warmup_steps": 3}, "decay_until_step=3 lies"),
        ({"lr_schedule": "wsd", "decay_until_step": 3}, "decay_until_step is for cosine and linear, not wsd"),
        ({"lr_schedule": "constant", "min_lr_ratio": 0.1}, "min_lr_ratio=0.1 is for cosine, linear and wsd"),
        ({"min_lr_ratio": 1.5}, "min_lr_ratio=1.5: it lies between 0 and 1"),
        ({"lr_schedule": "wsd", "wsd_decay_steps": 0}, "wsd_decay_steps=0: give steps"),
        ({"lr_schedule": "one_cycle", "warmup_steps": 1}, "one_cycle rises for 2 steps at least"),
        ({"lr_schedule": "one_cycle", "adam_beta1": 0.8}, "adam_beta1=0.8 has no effect"),
        ({"lr_scheduler_type": "linear"}, "stated here as lr_schedule"),
        ({"lr_scheduler_kwargs": {"min_lr_rate": 0.1}}, "stated here as lr_schedule"),
    ]:
        for make in (arguments, lambda **given: SFTArguments(output_dir="unused", use_cpu=True, **given)):
            with pytest.raises(UserError, match=message):
                make(max_steps=10, **given)


def test_in_words():
    args = arguments(warmup_steps=75, min_lr_ratio=0.1)
    assert describe_schedule(args, 1750) == "warm-up 75 steps, cosine to 10% at step 1,750"
    args = arguments(lr_schedule="wsd")
    assert describe_schedule(args, 1000) == "stable, from step 800 down to 0% at step 1,000"


# ----------------------------------------------------------------------------- one_cycle, through Trainer

ONE_CYCLE = {"lr_schedule": "one_cycle", "warmup_steps": 4, "max_steps": 10, "per_device_train_batch_size": 2}


def watched(data, output_dir, resume=None, **given) -> list[tuple[float, float]]:
    """Learning rate and beta1 of each step of a run, as the optimizer had them when it took the step."""
    run = trainer(data, output_dir, **ONE_CYCLE, **given)
    found = []
    create = run.create_optimizer

    def create_watched(model=None):
        optimizer = create(model)
        optimizer.register_step_pre_hook(
            lambda optimizer, *_: found.append(
                (optimizer.param_groups[-1]["lr"], optimizer.param_groups[-1]["betas"][0])
            )
        )
        return optimizer

    run.create_optimizer = create_watched
    run.train(resume_from_checkpoint=resume)
    watched.last = run
    return found


def expected_one_cycle() -> list[tuple[float, float]]:
    optimizer = AdamW([torch.zeros(1, requires_grad=True)], lr=1e-2)
    schedule = OneCycleLR(optimizer, max_lr=1e-2, total_steps=10, pct_start=0.4)
    found = []
    for _ in range(10):
        found.append((optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["betas"][0]))
        optimizer.step()
        schedule.step()
    return found


def test_one_cycle_is_torchs(data, tmp_path):
    found = watched(data, tmp_path)
    assert found == expected_one_cycle()
    assert max(found)[0] == 1e-2 and min(beta for _, beta in found) == 0.85 and found[0][1] == 0.95
    assert [entry["learning_rate"] for entry in watched.last.state.log_history if "loss" in entry] == [
        rate for rate, _ in found
    ]


def test_one_cycle_resumes_exactly(data, tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 6}
    watched(data, tmp_path / "whole", **saving)
    whole = watched.last
    shutil.copytree(tmp_path / "whole" / "checkpoint-6", tmp_path / "again" / "checkpoint-6")
    found = watched(data, tmp_path / "again", resume=str(tmp_path / "again" / "checkpoint-6"), **saving)
    assert found == expected_one_cycle()[6:]
    assert losses(watched.last)[-4:] == losses(whole)[-4:]
    assert all(torch.equal(weight, weights(watched.last)[name]) for name, weight in weights(whole).items())
    run = trainer(data, tmp_path / "whole", **{**ONE_CYCLE, "max_steps": 12})
    with pytest.raises(UserError, match="resumed with max_steps=12, and its run had 10"):
        run.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-6"))


def test_a_wsd_run_goes_on_longer(data, tmp_path):
    """What wsd is for: from a checkpoint before the decay, the same steps as a run that was meant to be longer."""
    how = {"lr_schedule": "wsd", "wsd_decay_steps": 2, "save_strategy": "steps", "save_steps": 4}
    trainer(data, tmp_path / "short", **how, max_steps=6).train()
    longer = trainer(data, tmp_path / "long", **how, max_steps=9)
    longer.train()
    again = trainer(data, tmp_path / "short", **how, max_steps=9)
    again.train(resume_from_checkpoint=str(tmp_path / "short" / "checkpoint-4"))
    assert all(torch.equal(weight, weights(again)[name]) for name, weight in weights(longer).items())
