"""Every inherited argument does what its name says or is refused; a new one fails here by its name."""

import dataclasses
import math
import os

import pytest
import torch
from transformers import TrainingArguments
from trl import DPOConfig, SFTConfig

from llmkit.errors import UserError
from llmkit.finetuning import arguments as finetuning
from llmkit.finetuning import preference_arguments as preferences
from llmkit.finetuning.arguments import SFTArguments
from llmkit.finetuning.preference_arguments import DPOArguments
from llmkit.training import inherited_arguments as inherited
from llmkit.training.arguments import PretrainArguments

KINDS = {PretrainArguments: TrainingArguments, SFTArguments: SFTConfig, DPOArguments: DPOConfig}
FREE = {PretrainArguments: set(), SFTArguments: finetuning.FREE, DPOArguments: preferences.FREE}


@pytest.fixture(params=KINDS, ids=lambda kind: kind.__name__)
def kind(request):
    return request.param


def make(kind, **given):
    return kind(**{"output_dir": "unused", "use_cpu": True, "report_to": "none", **given})


def decisive(kind) -> set[str]:
    return {name for base in kind.__mro__ for name in vars(base).get("DECISIVE", ())}


def test_every_inherited_field_has_its_place(kind):
    fields = {field.name for field in dataclasses.fields(KINDS[kind])}
    free = inherited.FREE | FREE[kind]
    assert not fields - decisive(kind) - free - kind.REFUSED.keys(), "new: say whether it is honoured or refused"
    assert not decisive(kind) & kind.REFUSED.keys()


def test_what_is_decisive_is_a_field(kind):
    assert decisive(kind) <= {field.name for field in dataclasses.fields(kind)}


def another(default):
    """A value that a recipe could give and that is not the default."""
    if isinstance(default, bool):
        return not default
    return default + 1 if isinstance(default, int | float) else "something"


def test_refused_fields_are_refused_with_a_reason(kind):
    fields = [field for field in dataclasses.fields(kind) if field.name in kind.REFUSED]
    assert len(fields) > 30
    for field in fields:
        default = inherited.default_of(field)
        make(kind, **{field.name: default})
        with pytest.raises(UserError, match=f"^{field.name}=.* is not supported: .+; leave it out$"):
            make(kind, **{field.name: another(default)})


def test_only_non_blocking_is_taken_of_accelerators_configuration(kind):
    assert make(kind, accelerator_config={"non_blocking": True}).accelerator_config.non_blocking
    for given in ({"split_batches": True}, {"gradient_accumulation_kwargs": {"num_steps": 2}}):
        with pytest.raises(UserError, match=f"accelerator_config: {next(iter(given))}=.* is not supported"):
            make(kind, accelerator_config=given)


@pytest.mark.parametrize(
    "given",
    [
        {"adam_beta1": 1.5},
        {"adam_beta2": -0.1},
        {"adam_epsilon": math.nan},
        {"data_seed": -1},
        {"dataloader_num_workers": -1},
        {"eval_steps": 0},
        {"learning_rate": -1.0},
        {"learning_rate": math.nan},
        {"learning_rate": math.inf},
        {"logging_steps": 0},
        {"max_grad_norm": -1.0},
        {"max_steps": -2},
        {"max_steps": 10**13},
        {"num_train_epochs": math.nan},
        {"per_device_train_batch_size": 0},
        {"sample_tokens": 0},
        {"save_steps": 0},
        {"save_total_limit": -1},
        {"seed": -1},
        {"seed": 2**32},
        {"warmup_steps": -1},
        {"weight_decay": -0.1},
    ],
    ids=str,
)
def test_numbers_that_no_run_could_have(kind, given):
    ((name, value),) = given.items()
    with pytest.raises(UserError, match=f"^{name}={value}: must be "):
        make(kind, **given)


@pytest.mark.parametrize(
    "given, message",
    [
        ({"max_steps": 0}, "nothing to train"),
        ({"num_train_epochs": 0}, "nothing to train"),
        ({"max_steps": 10, "warmup_steps": 11}, "warmup_steps=11 is more than the 10 steps of the run"),
        ({"metric_for_best_model": "accuracy"}, "metric_for_best_model=accuracy: choose from loss, perplexity"),
        ({"save_strategy": "best", "eval_strategy": "steps"}, "save_strategy: best needs metric_for_best_model"),
        ({"torch_compile_backend": "nonsense"}, "torch_compile_backend=nonsense: choose from .*inductor"),
        ({"torch_compile_mode": "fast"}, "torch_compile_mode=fast: choose from default, reduce-overhead"),
        ({"optim": "galore_adamw"}, "optim=galore_adamw is not supported"),
        ({"optim_args": "nonsense"}, "optim=adamw_torch_fused: "),
    ],
    ids=str,
)
def test_names_and_settings_that_do_not_exist(kind, given, message):
    with pytest.raises(UserError, match=message):
        make(kind, **given)


@pytest.mark.parametrize("name", ["eval_strategy", "logging_strategy", "save_strategy"])
def test_a_pretraining_run_has_no_epochs(name):
    with pytest.raises(UserError, match=f"^{name}: epoch is not supported"):
        make(PretrainArguments, **{name: "epoch"})
    make(SFTArguments, **{name: "epoch"})


def test_fsdp_needs_several_processes():
    with pytest.raises(UserError, match="^fsdp shards a model over several processes"):
        make(PretrainArguments, fsdp="full_shard")


@pytest.mark.parametrize("configured", ["no", "bf16"])
def test_a_stated_precision_holds_against_accelerates(kind, configured, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", configured)
    assert make(kind, bf16=False).mixed_precision == "no"
    assert make(kind, bf16=True).mixed_precision == "bf16"
    unstated = make(kind)
    assert unstated.mixed_precision == ("bf16" if unstated.bf16 else "no")
    if configured == "bf16":
        assert unstated.bf16, "the accelerate configuration is followed where the recipe says nothing"


def test_a_precision_of_accelerates_that_trainer_has_not(kind, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    with pytest.raises(UserError, match="mixed_precision: fp8 of the accelerate configuration"):
        make(kind)


def test_accelerates_cpu_configuration_is_a_cpu(kind, monkeypatch):
    """On a machine with a GPU as well, whose precision and compiler are then not the CPU's."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    assert make(kind, use_cpu=False).use_cpu


def test_making_arguments_leaves_the_process_alone(kind, monkeypatch):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    threads, environment = torch.get_num_threads(), dict(os.environ)
    torch.set_num_threads(1)
    try:
        make(kind, report_to="wandb")
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(threads)
    assert "WANDB_MODE" not in os.environ
    changed = {name for name in os.environ if os.environ[name] != environment.get(name)}
    assert not changed, f"the environment changed: {changed}"
