"""What `llmkit plan` says of a recipe is what the recipe's run would do."""

import json
from pathlib import Path

import pytest

from llmkit import cli
from llmkit.planning.plan import Hardware

RECIPES = Path(__file__).parents[2] / "recipes"


def plan(capsys, *arguments: str) -> dict:
    cli.main(["plan", "--json", *arguments])
    return json.loads(capsys.readouterr().out)


def test_the_124m_run_on_eight_gpus(capsys):
    found = plan(
        capsys, "--gpu", "H200", "--gpus", "8", "--dollars_per_hour", "2", str(RECIPES / "pretrain_gpt2_124m.yaml")
    )
    assert found["parameters"] == 124_439_808
    assert found["tokens"] == 19_073 * 524_288
    assert found["micro_batch"] * found["accumulation"] * 1024 * 8 == 524_288
    # weights, gradients and two moments, 4 bytes each; DDP holds another copy of the gradients
    assert found["memory"]["weights"] == found["memory"]["gradients"] == found["communication"] == 4 * 124_439_808
    assert found["peak"] == sum(found["memory"].values()) + found["communication"]
    assert found["flops"] == pytest.approx(found["tokens"] * 6 * 124e6, rel=0.2)
    assert found["hours"] == pytest.approx(found["flops"] / (8 * 989e12 * 0.4) / 3600)
    assert found["dollars"] == pytest.approx(found["hours"] * 16)
    assert found["fits"] == "as it is"


def test_what_does_not_fit_is_said_with_what_would_help(capsys):
    gpu, recipe = ("--gpu", "L4", "--gpus"), str(RECIPES / "pretrain_gpt2_124m.yaml")
    assert "activation_checkpointing" in plan(capsys, *gpu, "8", recipe)["fits"]
    # 1.6 billion parameters in two layers: 26 GB with gradients and moments, of which an L4 has room for an eighth
    shape = ("--preset", "null", "--n_layer", "2", "--n_head", "64", "--n_embd", "8192", "--block_size", "64")
    batch = ("--total_batch_tokens", "512", "--per_device_train_batch_size", "1")
    assert plan(capsys, *gpu, "1", recipe, *shape, *batch)["fits"] is None
    assert "fsdp2" in plan(capsys, *gpu, "8", recipe, *shape, *batch)["fits"]


def test_the_table_has_every_part(capsys):
    cli.main(["plan", str(RECIPES / "pretrain_quickstart.yaml"), "--max_steps", "10", "--eval_steps", "5"])
    table = capsys.readouterr().out
    assert "10 steps, 40,960 tokens" in table and "3 evaluations" in table and "--measure" in table


def test_minutes_take_the_pace(capsys):
    recipe = [str(RECIPES / "pretrain_gpt2_124m.yaml"), "--train_minutes", "90", "--hellaswag_steps", "0"]
    found = plan(capsys, "--gpu", "H200", *recipe)
    assert found["hours"] == pytest.approx(1.5, rel=1e-2)
    with pytest.raises(SystemExit, match="2"):
        cli.main(["plan", *recipe])
    assert "train_minutes needs a pace" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpus", "0"], "gpus=0"),
        (["--mfu", "1.5"], "mfu=1.5"),
        (["--dollars_per_hour", "nan"], "dollars_per_hour=nan"),
        (["--measure", "--gpu", "H200"], "leave out --gpu"),
        (["--gpu", "Voodoo"], "not known"),
        (["--gpu", "A100"], "A100-SXM4-40GB"),
        (["--gpu", "H200", "--gpus", "3"], "is not a multiple of"),
    ],
)
def test_mistakes_are_one_line(capsys, arguments, message):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["plan", *arguments, str(RECIPES / "pretrain_quickstart.yaml")])
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_gpus_of_one_memory_and_peak_need_no_more_words():
    assert Hardware.of("A100 80GB", 1).memory == 80e9
