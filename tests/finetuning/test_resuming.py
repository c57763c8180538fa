"""A fine-tuning run is resumed as the run that it was."""

import pytest
from transformers import set_seed

from llmkit.errors import UserError
from llmkit.finetuning.conversations import Conversations, encode_all
from llmkit.training.budget import fix_length
from small_run import losses
from small_sft import make_base, parts, trainer

BATCH = "per_device_train_batch_size x gradient_accumulation_steps x ranks"


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> list[str]:
    """Two bases that differ in their weights alone."""
    folder = tmp_path_factory.mktemp("bases")
    return [make_base(folder / str(seed), seed) for seed in (1, 2)]


@pytest.fixture(scope="module")
def run(bases, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    trainer(bases[0], folder).train()
    return folder


@pytest.mark.parametrize(
    "name, changed",
    [
        ("lora_alpha", {"lora": {"lora_alpha": 16}}),
        ("lora_dropout", {"lora": {"lora_dropout": 0.2}}),
        ("quantization", {"lora": {"quantization": "nf4"}}),
        ("max_length", {"max_length": 40}),
        ("packing", {"packing": True}),
        ("learning_rate", {"learning_rate": 1e-3}),
        ("max_grad_norm", {"max_grad_norm": 0.3}),
        ("max_steps", {"max_steps": 6}),
        (BATCH, {"per_device_train_batch_size": 4}),
        (BATCH, {"gradient_accumulation_steps": 2}),
    ],
    ids=str,
)
def test_what_decides_the_result_cannot_change(run, bases, name, changed):
    with pytest.raises(UserError, match=f"checkpoint-2 would be resumed with {name}=.*, and its run had"):
        trainer(bases[0], run, **changed).train(resume_from_checkpoint=str(run / "checkpoint-2"))


def test_another_base_is_refused(run, bases):
    with pytest.raises(UserError, match="resumed with model=.*2, and its run had .*1: give the run's own setting"):
        trainer(bases[1], run).train(resume_from_checkpoint=str(run / "checkpoint-2"))


def test_a_step_may_be_shared_out_otherwise(run, bases):
    again = trainer(bases[0], run, per_device_train_batch_size=1, gradient_accumulation_steps=2, logging_steps=2)
    again.train(resume_from_checkpoint=str(run / "checkpoint-2"))
    assert again.state.global_step == 4


def test_minutes_become_the_run_of_that_many_steps(bases, tmp_path):
    """Measuring the pace leaves nothing behind: not in the frozen base, nor in the random numbers of the adapter."""
    how = {"lora": {"quantization": "nf4", "lora_dropout": 0.1}, "save_strategy": "no"}
    set_seed(42)
    make, model, args = parts(bases[0], tmp_path / "budget", **how, max_steps=-1, train_minutes=1)
    ticks = iter(range(10**6))  # each look at the clock takes three seconds
    fix_length(make, model, args, None, lambda: 3.0 * next(ticks))
    assert args.max_steps > 4
    budget = make(model, args)
    budget.train()
    set_seed(42)
    make, model, plain = parts(bases[0], tmp_path / "plain", **how, max_steps=args.max_steps)
    plain = make(model, plain)
    plain.train()
    assert losses(budget) == losses(plain) and len(losses(plain)) == args.max_steps


@pytest.mark.parametrize("seed", range(4))
def test_the_pace_is_that_of_batches_as_large_as_the_run_s(bases, tmp_path, seed):
    """A few padded batches may be shorter or longer than the others. Here a step takes a second for each token."""
    seconds = 0

    def pass_by(module, args, given):
        nonlocal seconds
        seconds += given["input_ids"].numel() if module.training else 0

    answers = ["2, that is. " * (8 if n % 4 == 0 else 1) for n in range(128)]
    chats = [[{"role": "user", "content": "1?"}, {"role": "assistant", "content": answer}] for answer in answers]
    make, model, args = parts(bases[0], tmp_path, seed=seed, max_steps=-1, train_minutes=60.0)
    make.keywords["train_rows"] = encode_all(Conversations("chats", chats), make.keywords["tokenizer"])
    model.register_forward_pre_hook(pass_by, with_kwargs=True)
    fix_length(make, model, args, None, lambda: seconds)
    make(model, args).train()
    assert seconds == pytest.approx(3600, rel=0.05)
