"""A run on shards at a URL is the run on the same shards in a folder, and a network that fails does not lose it."""

import json
import os
import signal
import subprocess
import threading
import time
from functools import partial

import pytest
import torch
from huggingface_hub import constants

from llmkit.cli import main
from llmkit.data import fetching
from llmkit.data.manifest import load_manifest
from llmkit.data.mixture import MixedWindows
from llmkit.data.windows import TokenWindows
from llmkit.errors import UserError
from shard_server import FOR_EVER
from small_run import BLOCK, accelerate_launch, losses, trainer, weights

HOW = {"max_steps": 60, "save_strategy": "steps", "save_steps": 20, "windows": partial(TokenWindows, shard_group=2)}


def data_at(server, many_shards):
    return load_manifest(server.url), many_shards[1]


def fetched_late(run, server) -> str:
    """A shard of training that the first two groups of the run's order do not have, so that it is fetched later."""
    run.train()
    names = [name for name in server.asked(".bin") if name.startswith("train")]
    return names[-1]


def test_a_run_is_that_of_the_folder_and_is_resumed_exactly(many_shards, server, tmp_path, monkeypatch):
    here = trainer(many_shards, tmp_path / "here", **HOW)
    there = trainer(data_at(server, many_shards), tmp_path / "there", **HOW, dataloader_num_workers=2)
    for run in (here, there):
        run.train()
    assert losses(here) == losses(there)
    for name, weight in weights(here).items():
        assert torch.equal(weight, weights(there)[name]), name
    # Resumed on another machine, whose cache is empty: it fetches what comes next, and nothing of what is over.
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "another"))
    first = list(dict.fromkeys(server.asked(".bin")))
    server.requests.clear()
    again = trainer(data_at(server, many_shards), tmp_path / "there", **HOW)
    again.train(str(tmp_path / "there" / "checkpoint-40"))
    assert losses(again)[-20:] == losses(here)[-20:]
    assert 0 < len(server.asked(".bin")) < len(first) and set(server.asked(".bin")) <= set(first)


def test_a_resumed_run_begins_with_the_shards_of_its_next_steps(many_shards, server, tmp_path, monkeypatch):
    """With groups of one shard that is this shard; those after it are missed when a step reads them."""
    order = TokenWindows(server.url, "train", BLOCK, 1).order(42)
    for step in range(30, 60):  # to one in a new group, none of whose windows is the one that ends in the next shard
        _, group, begin = order.group_at(8 * step)
        if begin > 8 * (step - 1) and order.bounds[group + 1] - 1 not in order.windows(8 * step, 8 * (step + 2)):
            break
    first = f"train_{group:05d}.bin"
    how = HOW | {"windows": partial(TokenWindows, shard_group=1), "save_steps": step}
    whole = trainer(data_at(server, many_shards), tmp_path / "run", **how)
    whole.train()
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "another"))
    monkeypatch.setattr(fetching, "PATIENCE", 0.1)
    server.requests.clear()
    server.failures |= {f"train_{n:05d}.bin": [500] * FOR_EVER for n in range(20) if f"train_{n:05d}.bin" != first}
    again = trainer(data_at(server, many_shards), tmp_path / "run", **how)
    with pytest.raises(UserError, match="cannot be fetched: .*500.* checkpoint saved"):
        again.train(str(tmp_path / "run" / f"checkpoint-{step}"))
    last = again.state.global_step
    assert step < last < 60 and losses(again)[step:last] == losses(whole)[step:last]


def test_a_network_that_does_not_come_back_ends_in_a_checkpoint(many_shards, server, tmp_path, monkeypatch):
    late = fetched_late(trainer(data_at(server, many_shards), tmp_path / "whole", **HOW), server)
    whole = trainer(data_at(server, many_shards), tmp_path / "whole2", **HOW)
    whole.train()
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "another"))
    monkeypatch.setattr(fetching, "PATIENCE", 0.1)
    server.failures[late] = [500] * FOR_EVER
    how = HOW | {"save_steps": 1000}
    run = trainer(data_at(server, many_shards), tmp_path / "run", **how)
    with pytest.raises(
        UserError, match=rf"^stopped \(http\S+/{late} cannot be fetched: .*500.*\) at step \d+ of 60, "
    ) as told:
        run.train()
    step = run.state.global_step
    assert 0 < step < 60 and f"step {step} of 60, checkpoint saved in" in str(told.value)
    assert "--resume_from_checkpoint latest" in str(told.value)
    server.failures.clear()
    again = trainer(data_at(server, many_shards), tmp_path / "run", **how)
    again.train(str(tmp_path / "run" / f"checkpoint-{step}"))
    assert losses(again)[-(60 - step) :] == losses(whole)[-(60 - step) :]
    for name, weight in weights(whole).items():
        assert torch.equal(weight, weights(again)[name]), name


def test_without_the_first_shards_nothing_is_begun(many_shards, server, tmp_path, monkeypatch):
    monkeypatch.setattr(fetching, "PATIENCE", 0.1)
    server.failures["validation_00000.bin"] = [500] * FOR_EVER
    run = trainer(data_at(server, many_shards), tmp_path / "run", **HOW)
    with pytest.raises(UserError, match="validation_00000.bin cannot be fetched"):
        run.train()
    assert not list((tmp_path / "run").glob("*"))


def test_a_run_that_waits_for_a_shard_can_be_stopped(many_shards, server, tmp_path, monkeypatch):
    late = fetched_late(trainer(data_at(server, many_shards), tmp_path / "whole", **HOW), server)
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "another"))
    server.requests.clear()
    server.failures[late] = ["stall"]
    run = trainer(data_at(server, many_shards), tmp_path / "run", **HOW)
    steps = []

    def stop_when_it_waits() -> None:
        while not (server.asked(late) and steps[-3:] == [run.state.global_step] * 3 and run.state.global_step):
            steps.append(run.state.global_step)
            time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=stop_when_it_waits, daemon=True)
    thread.start()
    run.train()
    thread.join()
    step = run.state.global_step
    assert 0 < step < 60 and run.stopped.startswith(f"stopped (SIGTERM) at step {step} of 60, checkpoint saved")
    assert (tmp_path / "run" / f"checkpoint-{step}").exists()


def test_a_mixture_with_a_url(many_shards, data, server, tmp_path):
    def windows(manifests, split, block_size):
        sources = {name: TokenWindows(made, split, block_size, 2) for name, made in manifests.items()}
        return MixedWindows(sources, {"a": {0: 3, 10: 1}, "b": {0: 1}})

    runs = []
    for place in (many_shards[0], load_manifest(server.url)):
        runs.append(
            trainer(({"a": place, "b": data[0]}, data[1]), tmp_path / str(len(runs)), windows=windows, max_steps=40)
        )
        runs[-1].train()
    assert losses(runs[0]) == losses(runs[1])


RECIPE = """
data_dir: {url}
shard_group: 1
block_size: 16
n_layer: 1
n_head: 2
n_embd: 16
total_batch_tokens: 256
per_device_train_batch_size: 8
learning_rate: 1.0e-2
max_steps: 12
logging_steps: 1
output_dir: {folder}/run
report_to: none
eval_strategy: "no"
save_strategy: "no"
use_cpu: true
bf16: false
"""


@pytest.mark.slow
def test_the_doctor_fetches_no_shards(many_shards, server, tmp_path, monkeypatch):
    many_shards[1].save_pretrained(server.folder / "tokenizer")
    recipe = tmp_path / "pretrain_there.yaml"
    recipe.write_text(RECIPE.format(url=server.url, folder=tmp_path))
    monkeypatch.chdir(tmp_path)
    main(["doctor", "--recipe", str(recipe)])
    assert set(server.requests) == {"manifest.json"}


def test_a_plan_and_questions_about_a_url(many_shards, server, tmp_path, capsys):
    many_shards[1].save_pretrained(server.folder / "tokenizer")
    recipe = tmp_path / "pretrain_there.yaml"
    recipe.write_text(RECIPE.format(url=server.url, folder=tmp_path))
    main(["plan", str(recipe)])
    assert not server.asked(".bin") and "passes over the data" in capsys.readouterr().out
    run = trainer(data_at(server, many_shards), tmp_path / "run", **(HOW | {"max_steps": 2, "save_steps": 1}))
    run.train()
    main(["blame", str(tmp_path / "run"), "--step", "2"])
    told = capsys.readouterr().out
    assert told.count("window") >= 8 and "times" in told
    main(["eval", str(tmp_path / "run" / "checkpoint-2")])
    assert server.url in capsys.readouterr().out


@pytest.mark.slow
def test_two_ranks_stop_together_without_a_shard(many_shards, server, tmp_path):
    """A shard that is gone is not waited for: both ranks save after the same step, and one of them says why."""
    many_shards[1].save_pretrained(server.folder / "tokenizer")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.format(url=server.url, folder=tmp_path).replace("max_steps: 12", "max_steps: 200"))
    windows = TokenWindows(server.url, "train", 16, 1)
    later = windows.order(42).group_at(len(windows) - 1)[1]
    server.failures[f"train_{later:05d}.bin"] = [404] * FOR_EVER
    done = subprocess.run(
        [*accelerate_launch("multi_cpu"), "recipes/pretrain.py", "--config", str(recipe)],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HOME": str(tmp_path / "home")},
    )
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode != 0 and len(lines) == 1, done.stderr
    assert f"train_{later:05d}.bin cannot be fetched: there is no such file" in lines[0]
    (checkpoint,) = (tmp_path / "run").glob("checkpoint-*")
    assert f"at step {checkpoint.name.rpartition('-')[2]} of" in lines[0]
    fetched = [name for name in server.asked(".bin") if name != f"train_{later:05d}.bin"]
    assert len(fetched) == len(set(fetched)), "the ranks share the cache"
    log = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert log[-1]["step"] == int(checkpoint.name.rpartition("-")[2])
