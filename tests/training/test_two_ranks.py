"""One launch of two ranks for what has to be the same at one: schedules, Muon, growing batches, what is watched."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_budget import Clock, fixed
from test_schedules import expected_one_cycle, watched
from transformers import TrainerCallback

from llmkit import files
from llmkit.data.mixture import MixedWindows
from llmkit.data.windows import TokenWindows
from llmkit.training.checkpoints import checkpoint_to_resume, ranks_of
from ranks import on_ranks
from small_run import BLOCK, losses, rounding, trainer

TOGETHER = {"optim": "muon", "weight_decay": 0.1, "max_steps": 4, "per_device_train_batch_size": 4, "warmup_steps": 2}
TOGETHER |= {"batch_ramp_start": 3 * BLOCK, "batch_ramp_tokens": 16 * BLOCK, "monitor_steps": 2, "hellaswag_steps": 4}
WATCHED = ("loss", "tokens", "learning_rate", "lr/", "grad_norm", "param_norm", "update_ratio", "hellaswag")


def work_of_a_rank(data, folder: Path, questions: str) -> list:
    found = watched(data, folder / "one_cycle")
    dropped = train_with_dropout(data, folder / "dropout")
    train_together(data, folder / "together", questions)
    return [found, dropped, steps_of_a_budget(data, folder / "budget"), train_mixture(data, folder / "mixture")]


def train_together(data, output_dir, questions) -> None:
    run = trainer(data, output_dir, **TOGETHER, hellaswag_file=questions)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # so that sums have one order in both, for Muon rounds them to bfloat16
    run.train()
    torch.set_num_threads(threads)
    run.save_model()


def train_with_dropout(data, output_dir) -> list:
    """What the first step drops out in this process, and the losses of a run and of its last steps, done again."""
    how = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1, "per_device_train_batch_size": 4}
    runs, masks = [], []
    for checkpoint in (None, f"{output_dir}/checkpoint-1"):
        run = trainer(data, output_dir, **how, resume_from_checkpoint=checkpoint)
        run.model.config.resid_pdrop = 0.5
        run.model.transformer.h[0].mlp.register_forward_hook(lambda *args: masks.append((args[-1] == 0).tolist()))
        run.train(resume_from_checkpoint=checkpoint)
        runs.append(losses(run))
    return [masks[0], *runs]


def steps_of_a_budget(data, output_dir) -> int:
    """The steps that a rank takes to fit into 10 minutes, where a step of rank 1 is twice as slow."""
    rank = int(os.environ["RANK"])
    return fixed(data, output_dir, Clock(step=1 + rank), train_minutes=10, per_device_train_batch_size=4).max_steps


def train_mixture(data, output_dir) -> list:
    """The windows of each micro-batch in this process, and what was logged of the sources and the loss."""

    def windows(manifest, split, block_size):
        sources = {name: TokenWindows(manifest, split, block_size) for name in ("one", "other")}
        return MixedWindows(sources, {"one": {0: 3, 3: 1}, "other": {0: 1}})

    run = trainer(data, output_dir, windows=windows, max_steps=5, per_device_train_batch_size=4)
    seen = []
    run.model.register_forward_pre_hook(
        lambda model, args, kwargs: seen.append(kwargs["input_ids"].tolist()), with_kwargs=True
    )
    run.train()
    logged = [{k: v for k, v in entry.items() if k.startswith(("loss", "tokens/"))} for entry in run.state.log_history]
    return [seen, [entry for entry in logged if "loss" in entry]]


@pytest.fixture(scope="module")
def two_ranks(data, hellaswag, tmp_path_factory) -> tuple[Path, list]:
    """The folder of the runs, and what each rank found."""
    folder = tmp_path_factory.mktemp("ranks")
    return folder, on_ranks(2, work_of_a_rank, data, folder, hellaswag)


def test_each_rank_steps_its_schedule_once_a_step(two_ranks):
    assert [found[0] for found in two_ranks[1]] == [[list(pair) for pair in expected_one_cycle()]] * 2


def test_muon_on_growing_batches_and_what_is_watched(two_ranks, data, hellaswag, tmp_path):
    train_together(data, tmp_path, hellaswag)
    run = two_ranks[0] / "together"
    expected, found = load_file(tmp_path / "model.safetensors"), load_file(run / "model.safetensors")
    assert expected.keys() == found.keys() and all((expected[name] == found[name]).all() for name in expected)
    logs = []
    for folder in (tmp_path, run):
        records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()[1:]]
        logs.append(
            [
                {k: v for k, v in record.items() if k.startswith(WATCHED) and k != "tokens_per_second"}
                for record in records
            ]
        )
    assert [sorted(record) for record in logs[0]] == [sorted(record) for record in logs[1]]
    assert sum("hellaswag/acc" in record for record in logs[0]) == 1
    assert sum("update_ratio/mlp" in record for record in logs[0]) > 1
    for expected, found in zip(*logs, strict=True):
        assert found == pytest.approx(expected, rel=rounding(4))


def test_ranks_drop_out_other_units_and_resume_with_them(two_ranks):
    (mask, *runs), (other_mask, *_) = (found[1] for found in two_ranks[1])
    assert mask != other_mask
    assert runs[1] == runs[0]


def test_the_steps_of_a_mixture_are_the_same_on_two_ranks(two_ranks, data, tmp_path):
    (first, logged), (second, _) = (found[3] for found in two_ranks[1])
    both = list(zip(first, second, strict=True))
    alone, expected = train_mixture(data, tmp_path)
    assert both == list(zip(alone[::2], alone[1::2], strict=True)) and len(both) == 5
    assert [entry["tokens/one"] // BLOCK for entry in expected] == [6, 12, 18, 22, 26]
    for found, entry in zip(logged, expected, strict=True):
        assert found == pytest.approx(entry, rel=rounding(5))


EACH_TWO = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6, "per_device_train_batch_size": 4}


def go_on(data, folder, until: int) -> None:
    """From the newest checkpoint up to a step, as a job that is ended there."""
    run = trainer(data, folder, **EACH_TWO, resume_from_checkpoint="latest")
    run.add_callback(EndAt(until))
    run.train(resume_from_checkpoint=checkpoint_to_resume(run.args))


class EndAt(TrainerCallback):
    def __init__(self, step: int):
        self.step = step

    def on_save(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


def test_from_one_rank_to_two_and_back(data, tmp_path):
    """Each step has the same batch, and the losses are those of a run on one rank, to rounding."""
    trainer(data, tmp_path / "whole", **EACH_TWO).train()
    run = tmp_path / "run"
    go_on(data, run, 2)
    files.release_folder(run)
    on_ranks(2, go_on, data, run, 4)
    assert ranks_of(run / "checkpoint-4") == 2
    go_on(data, run, 6)
    logged = [
        {
            record["step"]: record["loss"]
            for record in map(json.loads, path.read_text().splitlines())
            if "loss" in record
        }
        for path in (tmp_path / "whole" / "log.jsonl", run / "log.jsonl")
    ]
    assert list(logged[1]) == [1, 2, 3, 4, 5, 6]
    assert logged[1] == pytest.approx(logged[0], rel=1e-6)


def test_the_slower_rank_decides_how_many_steps_fit(two_ranks, data, tmp_path):
    """Alone it takes two micro-batches a step, so as long as rank 1 if they are half as slow."""
    steps = [found[2] for found in two_ranks[1]]
    expected = fixed(data, tmp_path, Clock(step=1), train_minutes=10, per_device_train_batch_size=4).max_steps
    assert steps == [expected] * 2
