"""A run on several sources: resumed exactly, at another number of micro-batches too, and what was read is logged."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llmkit.cli import main
from llmkit.data.corpus import open_corpus
from llmkit.data.mixture import MixedWindows
from llmkit.data.shards import prepare_shards
from llmkit.data.windows import TokenWindows
from llmkit.errors import UserError
from llmkit.runs.report import write_report
from llmkit.runs.run import load_run
from small_run import BLOCK, losses, rounding, trainer, weights

WEIGHTS = {"sums": {0: 3, 3: 1}, "products": {0: 1}}


@pytest.fixture(scope="module")
def sources(data, tmp_path_factory):
    """Two manifests of one tokenizer, and the tokenizer."""
    products, tokenizer = data
    folder = tmp_path_factory.mktemp("sums")
    for number in range(20):
        (folder / f"{number}.txt").write_text("".join(f"{number} and {n} is {number + n}\n" for n in range(20)))
    sums = prepare_shards(open_corpus([str(folder)]), tokenizer, folder / "shards", validation_fraction=0.2)
    return {"sums": sums, "products": products}, tokenizer


def mixture(shares=WEIGHTS):
    def windows(manifests, split, block_size):
        return MixedWindows({name: TokenWindows(made, split, block_size) for name, made in manifests.items()}, shares)

    return windows


def test_a_mixture_is_resumed_exactly_and_logged(sources, tmp_path):
    whole = trainer(sources, tmp_path / "whole", windows=mixture())
    assert "sums" in whole.summary() and "epochs" in whole.summary()
    whole.train()
    part = trainer(sources, tmp_path / "part", windows=mixture(), save_strategy="steps", save_steps=2)
    part.train()
    run = trainer(sources, tmp_path / "part", windows=mixture())
    run.train(str(tmp_path / "part" / "checkpoint-4"))
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(run)[name])
    # 8 windows a step: 6 and 2 for three steps, then 4 and 4.
    log = load_run(tmp_path / "part").training
    assert [record["tokens/sums"] // BLOCK for record in log] == [6, 12, 18, 22, 26, 30]
    assert [record["tokens/products"] // BLOCK for record in log] == [2, 4, 6, 10, 14, 18]
    last = log[-1]
    for name, windows in run.train_dataset.sources.items():
        assert last[f"epochs/{name}"] == pytest.approx(last[f"tokens/{name}"] / BLOCK / len(windows))
    page = write_report([tmp_path / "part"]).read_text()
    assert "Epochs of each source" in page and "Tokens read of each source" in page


def test_micro_batches_do_not_change_a_step(sources, tmp_path):
    one = trainer(sources, tmp_path / "one", windows=mixture())
    four = trainer(sources, tmp_path / "four", windows=mixture(), per_device_train_batch_size=2)
    for run in (one, four):
        run.train()
    assert losses(four) == pytest.approx(losses(one), rel=rounding(6))


def test_other_weights_or_sources_are_not_resumed(sources, tmp_path):
    trainer(sources, tmp_path, windows=mixture(), max_steps=2, save_strategy="steps", save_steps=1).train()
    other = {"sums": {0: 3, 3: 2}, "products": {0: 1}}
    with pytest.raises(UserError, match="would be resumed with weights="):
        trainer(sources, tmp_path, windows=mixture(other), max_steps=2).train(str(tmp_path / "checkpoint-1"))
    alone = (sources[0]["products"], sources[1])
    with pytest.raises(UserError, match="was trained on other data"):
        trainer(alone, tmp_path, max_steps=2).train(str(tmp_path / "checkpoint-1"))


@pytest.mark.slow
def test_a_recipe_with_several_sources(sources, tmp_path, capsys, monkeypatch):
    """As it is written in YAML: prepared, trained, and asked what a step was trained on."""
    sources[1].save_pretrained(tmp_path / "tokenizer")
    for name in ("sums", "products"):
        (tmp_path / name).mkdir()
        for number in range(20):
            text = "".join(f"{number} {name} {n} is {number * n}\n" for n in range(20))
            (tmp_path / name / f"{number}.txt").write_text(text)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"""
tokenizer: {tmp_path}/tokenizer
validation_fraction: 0.2
data:
  - {{name: sums, weight: {{0: 3, 2: 1}}, text_files: {tmp_path}/sums}}
  - name: products
    weight: 1
    text_files: {tmp_path}/products
block_size: 16
n_layer: 1
n_head: 2
n_embd: 16
total_batch_tokens: 128
per_device_train_batch_size: 8
max_steps: 4
logging_steps: 1
output_dir: {tmp_path}/run
report_to: none
eval_strategy: "no"
save_strategy: "no"
use_cpu: true
bf16: false
"""
    )
    script = str(Path(__file__).parents[2] / "recipes/pretrain.py")
    done = subprocess.run(
        [sys.executable, script, "--config", str(recipe)], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    record = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert [line["tokens/sums"] // 16 for line in record if "loss" in line] == [6, 12, 16, 20]
    monkeypatch.chdir(tmp_path)  # the shards are in its folder `data`
    main(["blame", str(tmp_path / "run"), "--step", "1"])
    told = capsys.readouterr().out
    assert "sums" in told and "products" in told and told.count("window") >= 8
