"""Each check fails where what it looks at is really broken."""

import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from llmkit.cli import main as llmkit
from llmkit.planning import training_checks
from llmkit.planning.doctor import ERROR, OK, WARNING, Finding
from llmkit.training.pretrain_trainer import PretrainTrainer
from ranks import on_ranks, printed
from small_run import BLOCK, parts


def findings(make, model, args, start="new weights") -> dict[str, Finding]:
    checked = training_checks.examine_training(make, model, args, start, BLOCK)
    return {found.name: found for found in checked}


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    monkeypatch.setattr(training_checks, "PACE_STEPS", 12)


def broken(make: partial, kind: type[PretrainTrainer]) -> partial:
    """The same trainer, of a subclass."""
    return partial(kind, **make.keywords)


def test_a_recipe_that_is_right(data, tmp_path):
    make, model, args = parts(data, tmp_path)
    model.config.resid_pdrop = 0.1
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    found = findings(make, model, args)
    assert {name: f.state for name, f in found.items() if name != "pace"} == dict.fromkeys(
        ["gradient", "first loss", "overfitting", "save and resume"], OK
    ), found
    assert "exactly" in found["save and resume"].text and "4 micro-batches on 1 rank(s)" in found["gradient"].text
    assert f"ln {model.config.vocab_size} is {math.log(model.config.vocab_size):.3f}" in found["first loss"].text
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert model.config.resid_pdrop == 0.1 and not list(tmp_path.iterdir())


class MeanOfMicroBatches(PretrainTrainer):
    """Leaves out Trainer's count of the targets, so that each micro-batch counts as a whole batch."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return super().compute_loss(model, inputs, return_outputs)


class ForgetsRandomNumbers(PretrainTrainer):
    def _load_rng_state(self, checkpoint):
        torch.manual_seed(12345)


class ForgetsMoments(PretrainTrainer):
    def _load_optimizer_and_scheduler(self, checkpoint):
        pass


def test_a_loss_that_is_not_divided_by_the_targets_of_the_step(data, tmp_path):
    make, model, args = parts(data, tmp_path)
    found = findings(broken(make, MeanOfMicroBatches), model, args)
    assert found["gradient"].state == ERROR and "the relative difference is 3.0e+00" in found["gradient"].text
    assert "num_items_in_batch" in found["gradient"].fix


def test_a_model_with_another_loss(data, tmp_path):
    """The sum over targets; and one that does not depend on what the model says."""
    make, model, args = parts(data, tmp_path)

    class Sum(type(model)):
        def forward(self, *inputs, **kwargs):
            output = super().forward(*inputs, **kwargs)
            output.loss = output.loss * 10
            return output

    class Nothing(type(model)):
        def forward(self, *inputs, **kwargs):
            output = super().forward(*inputs, **kwargs)
            targets = kwargs["shift_labels"].numel()
            parts = targets / (kwargs.get("num_items_in_batch") or targets)
            output.loss = parts * math.log(self.config.vocab_size) + 0 * output.loss
            return output

    model.__class__ = Sum
    found = findings(make, model, args)
    assert found["first loss"].state == ERROR
    model.__class__ = Nothing
    found = findings(make, model, args)
    assert found["overfitting"].state == ERROR and found["first loss"].state == OK
    assert found["gradient"].state == ERROR and "it is zero" in found["gradient"].text


@pytest.mark.parametrize("kind", [ForgetsRandomNumbers, ForgetsMoments])
def test_a_resume_that_forgets(data, tmp_path, kind):
    make, model, args = parts(data, tmp_path)
    model.config.resid_pdrop = 0.1
    found = findings(broken(make, kind), model, args)
    assert found["save and resume"].state == ERROR and "to " in found["save and resume"].text


def test_a_pace_that_is_not_steady(data, tmp_path, monkeypatch):
    """Each third step takes five times as long."""
    make, model, args = parts(data, tmp_path)
    now, reads = 0.0, 0

    def clock() -> float:
        nonlocal now, reads
        reads += 1
        now += 0.5 if reads % 6 == 0 else 0.1
        return now

    monkeypatch.setattr(training_checks, "time", SimpleNamespace(perf_counter=clock))
    state, text, fix = training_checks.pace_is_steady(
        make, model, partial(training_checks._small, args, tmp_path / "run", BLOCK)
    )
    assert state == WARNING and "5.00 times the median" in text and "nvidia-smi" in fix


def test_weights_that_have_learned(data, tmp_path):
    make, model, args = parts(data, tmp_path)
    assert findings(make, model, args, start="trained weights")["first loss"].state == WARNING


@pytest.mark.slow
def test_two_ranks_take_the_steps_together(tmp_path):
    """The command itself, on the quickstart: each line once, and nothing is left in the folder of the runs."""
    command = ["doctor", "--recipe", "pretrain_quickstart", "--dropout", "0.1", "--use_cpu", "true"]
    command += ["--output_dir", str(tmp_path / "run"), "--data_dir", str(tmp_path / "data")]
    said = "".join(on_ranks(2, printed, llmkit, command))
    lines = {name: line for line in said.splitlines() for name in [line[:18].strip()]}
    assert lines["gradient"].split()[1] == "ok" and "4 micro-batches on 2 rank(s)" in lines["gradient"], said
    assert " ok " in lines["first loss"] and " ok " in lines["overfitting"]
    assert " ok " in lines["save and resume"] and "exactly" in lines["save and resume"]
    assert said.count("a step of one row") == 1
    assert not list(tmp_path.iterdir())
