"""A fine-tuning run is resumed as the run that it was."""

from functools import partial

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, set_seed

from llmkit.data.tokenizer import train_bpe_tokenizer
from llmkit.errors import UserError
from llmkit.finetuning.adapters import AdapterArguments, load_base_model, load_chat_tokenizer
from llmkit.finetuning.arguments import SFTArguments
from llmkit.finetuning.conversations import Conversations, encode_all
from llmkit.finetuning.sft_trainer import ConversationTrainer
from llmkit.training.budget import fix_length
from small_run import losses

CHATS = [
    [{"role": "user", "content": f"{n} times 2?"}, {"role": "assistant", "content": f"{2 * n}, that is."}]
    for n in range(16)
]
BATCH = "per_device_train_batch_size x gradient_accumulation_steps x ranks"


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> list[str]:
    """Two bases that differ in their weights alone."""
    folder = tmp_path_factory.mktemp("bases")
    tokenizer = train_bpe_tokenizer(["### Human: 1 times 2?\n### Assistant: 2, that is."], 300)
    sizes = {"n_positions": 64, "n_embd": 32, "n_layer": 1, "n_head": 2, "eos_token_id": tokenizer.eos_token_id}
    for seed in (1, 2):
        set_seed(seed)
        GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **sizes)).save_pretrained(folder / str(seed))
        tokenizer.save_pretrained(folder / str(seed))
    return [str(folder / "1"), str(folder / "2")]


def trainer(base: str, output_dir, lora: dict | None = None, **given) -> ConversationTrainer:
    make, model, args = parts(base, output_dir, lora, **given)
    return make(model, args)


def parts(base: str, output_dir, lora: dict | None = None, **given):
    """What makes the trainer, of a model and arguments, and these two."""
    adapter = AdapterArguments(model=base, **{"lora_r": 4, "lora_alpha": 8, "quantization": "none", **(lora or {})})
    how = {"max_length": 48, "max_steps": 4, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "save_steps": 2}
    how |= {"logging_steps": 1, "report_to": "none", "bf16": False, "eval_on_start": False}
    args = SFTArguments(output_dir=str(output_dir), use_cpu=True, **{**how, **given})
    tokenizer = load_chat_tokenizer(adapter)
    rows = encode_all(Conversations("chats", CHATS), tokenizer)
    model = load_base_model(adapter, args.compute_dtype, torch.device("cpu"))
    config = adapter.lora_config(model)
    how = {"lora_config": config, "train_rows": rows, "eval_rows": rows.select(range(4)), "tokenizer": tokenizer}
    return partial(ConversationTrainer, **how, description="chats", source=(adapter,)), model, args


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
