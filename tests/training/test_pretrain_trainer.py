"""The Trainer trains what it says: the same loss however a step is cut up, exact resume, exact evaluation."""

import dataclasses
import json
import math
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from llmkit.data.windows import TokenWindows
from llmkit.errors import UserError
from llmkit.runs.record import code_version, command_line
from llmkit.training.arguments import PretrainArguments
from llmkit.training.checkpoints import checkpoint_to_resume
from llmkit.training.schedules import decisive_length
from ranks import on_ranks
from small_run import BLOCK, losses, rounding, trainer, weights


def test_accumulation_does_not_change_the_loss(data, tmp_path):
    runs = []
    for size in (8, 4, 1):
        run = trainer(data, tmp_path / str(size), per_device_train_batch_size=size)
        run.train()
        assert run.args.gradient_accumulation_steps == 8 // size
        runs.append(run)
    assert losses(runs[0])[-1] < losses(runs[0])[0] - 0.5, "nothing was learned"
    for run in runs[1:]:
        assert losses(run) == pytest.approx(losses(runs[0]), rel=rounding(6))


class RaggedWindows(TokenWindows):
    """Windows of which only some targets count, a different number in each."""

    def __getitems__(self, indices):
        batch = super().__getitems__(indices)
        for row, index in enumerate(indices):
            batch["shift_labels"][row, 1 + index % (BLOCK - 1) :] = -100
        return batch


def ragged_losses(data, folder: Path, size: int) -> list[float]:
    run = trainer(data, folder, windows=RaggedWindows, per_device_train_batch_size=size)
    run.train()
    return losses(run)


def test_ragged_targets_on_ranks_and_micro_batches(data, tmp_path):
    """Eight windows a step, with 1 to 15 targets each: 1 x 8, 4 x 2, and two ranks of 2 x 2 have one loss."""
    found = [ragged_losses(data, tmp_path / str(size), size) for size in (8, 2)]
    found.append(on_ranks(2, ragged_losses, data, tmp_path / "ranks", 2)[0])
    assert found[1] == pytest.approx(found[0], rel=rounding(6))
    assert found[2] == pytest.approx(found[0], rel=rounding(6))


def test_first_loss_is_the_models(data, tmp_path):
    """Trainer's figure is the mean cross-entropy of the step's windows, and about ln(vocabulary) at the start."""
    run = trainer(data, tmp_path, per_device_train_batch_size=2)
    batches = list(run.get_train_dataloader())[:4]
    with torch.no_grad():
        logits = [run.model.eval()(batch["input_ids"]).logits for batch in batches]
    targets = torch.cat([batch["shift_labels"] for batch in batches])
    expected = torch.nn.functional.cross_entropy(torch.cat(logits).flatten(0, 1), targets.flatten()).item()
    run.train()
    assert losses(run)[0] == pytest.approx(expected, rel=1e-6)
    assert losses(run)[0] == pytest.approx(math.log(300), abs=0.2)


def test_converted_weights_are_not_held_for_a_second_use(data, tmp_path):
    """autocast would keep a bfloat16 copy of each weight until the end of the forward pass."""
    run = trainer(data, tmp_path, max_steps=1, bf16=True)
    seen = set()

    def look(*_) -> None:
        seen.add((torch.is_autocast_enabled("cpu"), torch.is_autocast_cache_enabled()))

    run.model.transformer.register_forward_hook(look)
    run.train()
    assert seen == {(True, False)}


def test_resumed_run_ends_with_the_same_bits(data, tmp_path):
    how = {"save_strategy": "steps", "save_steps": 4, "max_steps": 10, "per_device_train_batch_size": 4}
    whole = trainer(data, tmp_path / "whole", **how)
    whole.train()
    shutil.copytree(tmp_path / "whole" / "checkpoint-4", tmp_path / "again" / "checkpoint-4")
    again = trainer(data, tmp_path / "again", **how, resume_from_checkpoint="latest")
    again.train(resume_from_checkpoint=checkpoint_to_resume(again.args))
    assert losses(again)[-6:] == losses(whole)[-6:]
    for name, weight in weights(whole).items():
        assert torch.equal(weight, weights(again)[name]), name


def test_a_run_in_groups_of_shards_is_resumed_exactly(many_shards, tmp_path):
    """Past several groups, and not in other groups than the run's."""
    assert len(many_shards[0].splits["train"].shards) > 5
    how = {"save_strategy": "steps", "save_steps": 10, "max_steps": 30, "per_device_train_batch_size": 4}
    how |= {"windows": partial(TokenWindows, shard_group=2)}
    whole = trainer(many_shards, tmp_path, **how)
    whole.train()
    log = (tmp_path / "log.jsonl").read_text()
    again = trainer(many_shards, tmp_path, **how)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-20"))
    assert losses(again)[-10:] == losses(whole)[-10:]
    for name, weight in weights(whole).items():
        assert torch.equal(weight, weights(again)[name]), name
    assert json.loads(log.splitlines()[0])["run"]["data"]["shard_group"] == 2
    for group in (None, 3):
        with pytest.raises(UserError, match=f"would be resumed with shard_group={group}, and its run had 2"):
            other = trainer(many_shards, tmp_path, **{**how, "windows": partial(TokenWindows, shard_group=group)})
            other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-20"))


def test_evaluation_is_weighted_by_tokens(data, tmp_path):
    """The last window is short and the last batch filled up; neither may count for more than its tokens."""
    run = trainer(data, tmp_path, per_device_eval_batch_size=7)
    metrics = run.evaluate()
    manifest, _ = data
    windows = TokenWindows(manifest, "validation", BLOCK)
    assert len(windows) % 7 and (windows.num_tokens - 1) % BLOCK, "this set would not show a mistake"
    nats = tokens = 0.0
    for window in windows:
        with torch.no_grad():
            logits = run.model(window["input_ids"][None]).logits[0]
        nats += torch.nn.functional.cross_entropy(logits, window["shift_labels"], reduction="sum").item()
        tokens += (window["shift_labels"] != -100).sum().item()
    assert tokens == windows.num_tokens - 1
    assert metrics["eval_loss"] == pytest.approx(nats / tokens, rel=1e-6)
    assert metrics["eval_perplexity"] == pytest.approx(math.exp(nats / tokens), rel=1e-5)
    bits = nats / tokens * windows.num_tokens / math.log(2) / manifest.splits["validation"].bytes
    assert metrics["eval_bits_per_byte"] == pytest.approx(bits, rel=1e-6)


def test_bits_per_byte_are_those_of_the_text_evaluated(data, tmp_path):
    run = trainer(data, tmp_path)
    manifest, _ = data
    metrics = run.evaluate(other := TokenWindows(manifest, "train", BLOCK))
    assert other.tokens_per_byte != pytest.approx(run.eval_dataset.tokens_per_byte, rel=1e-3), "would show nothing"
    expected = metrics["eval_loss"] / math.log(2) * other.tokens_per_byte
    assert metrics["eval_bits_per_byte"] == pytest.approx(expected)


@pytest.mark.parametrize("metric", ["loss", "perplexity", "bits_per_byte"])
def test_the_best_model_is_kept_and_evaluated(data, tmp_path, metric):
    """At a learning rate that spoils the model after its first steps, the best evaluation is not the last one."""
    how = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1, "learning_rate": 3.0}
    run = trainer(data, tmp_path, **how, load_best_model_at_end=True, metric_for_best_model=metric)
    run.train()
    found = {entry["step"]: entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry}
    best = min(found, key=found.get)
    assert best != max(found), "this run would show nothing"
    assert run.state.best_model_checkpoint.endswith(f"checkpoint-{best}")
    assert run.evaluate()["eval_loss"] == pytest.approx(found[best])


def test_what_is_logged(data, tmp_path):
    run = trainer(data, tmp_path, eval_strategy="steps", eval_steps=3, sample_prompts=["3 times"], sample_tokens=5)
    run.train()
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    record = lines[0]["run"]
    assert record["kind"] == "pretraining" and record["data"]["train_tokens"] == run.train_dataset.num_tokens
    assert record["code"].keys() == {"commit", "changed"} and record["command"] == command_line()
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6]
    for line in steps:
        assert {"learning_rate", "grad_norm", "tokens", "epoch"} <= line.keys()
        assert ("tokens_per_second" in line) == (line["step"] > 1), "the first step alone has no speed"
        assert line["tokens"] == line["step"] * 8 * BLOCK
        assert line["epoch"] == pytest.approx(line["tokens"] / run.train_tokens)
        assert "mfu" not in line, "a CPU's peak is not known"
    assert [line["step"] for line in lines if "eval_bits_per_byte" in line] == [3, 6]
    samples = [line["sample"] for line in lines if "sample" in line]
    assert len(samples) == 2 and all(text.startswith("3 times") for text in samples)


def test_a_command_is_recorded_without_its_secrets(monkeypatch):
    given = ["pretrain.py", "--hub_token", "hf_a", "--hub-token=hf_b", "--push_to_hub", "true"]
    monkeypatch.setattr(sys, "argv", given)
    assert command_line() == ["pretrain.py", "--hub_token", "***", "--hub-token=***", "--push_to_hub", "true"]


@pytest.mark.skipif(not (Path(__file__).parents[2] / ".git").exists(), reason="no git checkout")
def test_the_code_is_recorded_by_its_commit():
    told = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True)
    assert code_version()["commit"] == told.stdout.strip()
    assert isinstance(code_version()["changed"], bool)


def test_samples_leave_training_alone(data, tmp_path):
    plain = trainer(data, tmp_path / "a", eval_strategy="steps", eval_steps=2)
    sampled = trainer(data, tmp_path / "b", eval_strategy="steps", eval_steps=2, sample_prompts=["1 times"])
    plain.train()
    sampled.train()
    assert losses(plain) == losses(sampled)


def test_a_prompt_longer_than_the_context_is_refused(data, tmp_path):
    with pytest.raises(UserError, match="the sample prompt '0000.* tokens, the model's context 16: shorten it"):
        trainer(data, tmp_path, sample_prompts=["0" * 99])


def test_a_step_never_reads_a_window_twice(data, tmp_path):
    for total in (10**20, 10**5 * BLOCK):
        with pytest.raises(UserError, match=f"total_batch_tokens={total:,}: the training split has .* tokens"):
            trainer(data, tmp_path, total_batch_tokens=total, per_device_train_batch_size=1)


def test_summary_states_the_run(data, tmp_path):
    text = trainer(data, tmp_path, per_device_train_batch_size=2).summary()
    assert "128 tokens = 2 x 16 x 4 accumulated x 1 rank(s)" in text
    assert "6 steps = 768 tokens" in text
    assert f"{data[0].splits['train'].tokens:,} tokens to train on" in text


def test_epochs_become_steps(data, tmp_path):
    run = trainer(data, tmp_path, max_steps=-1, num_train_epochs=2)
    assert run.args.max_steps == round(2 * len(run.train_dataset) / 8)


def test_a_loss_that_is_not_a_number_stops_the_run(data, tmp_path):
    run = trainer(data, tmp_path, learning_rate=1e30, max_grad_norm=0.0)
    with pytest.raises(UserError, match="the (loss|gradient) is not finite at step .*: lower learning_rate"):
        run.train()


def test_a_resumed_run_logs_evaluates_and_saves_as_it_is_told(data, tmp_path):
    """Trainer would go on with the steps that its checkpoint has."""
    how = {"save_strategy": "steps", "eval_strategy": "steps", "max_steps": 8}
    trainer(data, tmp_path, **how, save_steps=2, eval_steps=2, logging_steps=2).train()
    again = trainer(data, tmp_path, **how, save_steps=3, eval_steps=4, logging_steps=1)
    shutil.rmtree(tmp_path / "checkpoint-6")
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    log = again.state.log_history
    assert [entry["step"] for entry in log if "loss" in entry] == [2, 3, 4, 5, 6, 7, 8]
    assert [entry["step"] for entry in log if "eval_loss" in entry] == [2, 4, 8]
    assert (tmp_path / "checkpoint-3").exists() and (tmp_path / "checkpoint-6").exists()


def test_workers_are_started_and_prefetch_as_told(data, tmp_path):
    loader = trainer(data, tmp_path, dataloader_num_workers=1, dataloader_prefetch_factor=3).get_train_dataloader()
    assert loader.prefetch_factor == 3


def test_resuming_with_other_settings_is_refused(data, tmp_path):
    """What the optimizer's state would override, what would give other batches, and another model."""
    how = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    trainer(data, tmp_path, **how).train()
    with (tmp_path / "log.jsonl").open("a") as log:
        log.write('{"step": 4, "lo')  # as a kill leaves it
    changes = {"learning_rate": 1e-5, "total_batch_tokens": 16 * BLOCK, "seed": 7, "weight_decay": 0.2}
    changes |= {"max_grad_norm": 0.5, "bf16": True, "max_steps": 5, "optim": "muon"}
    for name, value in changes.items():
        with pytest.raises(UserError, match=f"checkpoint-2 would be resumed with {name}={value}, and its run had"):
            trainer(data, tmp_path, **{**how, name: value}).train(
                resume_from_checkpoint=str(tmp_path / "checkpoint-2")
            )
    run = trainer(data, tmp_path / "elsewhere", **how)
    run.record["model"]["config"]["n_head"] = 4
    with pytest.raises(UserError, match="resumed with n_head=4, and its run had 2"):
        run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_what_a_resumed_run_may_change(data, tmp_path):
    """Other micro-batches of the same batch; and a length that the learning rates do not depend on."""
    how = {"save_strategy": "steps", "save_steps": 2, "lr_schedule": "constant"}
    trainer(data, tmp_path, **how, max_steps=4).train()
    again = trainer(data, tmp_path, **how, max_steps=6, per_device_train_batch_size=2, save_total_limit=1)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert again.state.global_step == 6


def test_the_length_of_a_run_is_decisive_where_its_learning_rates_depend_on_it():
    def length(**given) -> dict:
        return decisive_length(PretrainArguments(output_dir="unused", use_cpu=True, max_steps=100, **given))

    fixed = {"max_steps": 100, "num_train_epochs": None}
    for name in ("cosine", "linear", "one_cycle"):
        assert length(lr_schedule=name) == fixed
    for given in ({"lr_schedule": "wsd"}, {"lr_schedule": "constant"}, {"decay_until_step": 50}):
        assert length(**given, warmup_steps=5) == {}
    epochs = PretrainArguments(output_dir="unused", use_cpu=True, num_train_epochs=2)
    assert decisive_length(epochs) == {"max_steps": None, "num_train_epochs": 2}


def test_resuming_on_other_data_is_refused(data, tmp_path):
    how = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    trainer(data, tmp_path, **how).train()
    manifest, tokenizer = data
    other = dataclasses.replace(manifest, settings={**manifest.settings, "corpus": "another"})
    run = trainer((other, tokenizer), tmp_path, **how)
    with pytest.raises(UserError, match="was trained on other data"):
        run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
