"""What `llmkit plan` says of a recipe is what the recipe's run would do."""

import json
from pathlib import Path

import pytest
import torch

from llmkit import GPT2Config, GPT2LMHeadModel, cli
from llmkit.planning.hardware import Hardware
from llmkit.training.arguments import PretrainArguments
from llmkit.training.budget import evaluations, saves
from small_run import phi_with_adapter

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
    large = ("--per_device_train_batch_size", "128")
    assert "activation_checkpointing" in plan(capsys, *gpu, "4", recipe, *large)["fits"]
    # 1.6 billion parameters in two layers: 26 GB with gradients and moments, of which an L4 has room for an eighth
    shape = ("--preset", "null", "--n_layer", "2", "--n_head", "64", "--n_embd", "8192", "--block_size", "64")
    batch = ("--total_batch_tokens", "512", "--per_device_train_batch_size", "1")
    assert plan(capsys, *gpu, "1", recipe, *shape, *batch)["fits"] is None
    assert "fsdp2" in plan(capsys, *gpu, "8", recipe, *shape, *batch)["fits"]


def test_the_table_has_every_part(capsys):
    cli.main(["plan", str(RECIPES / "pretrain_quickstart.yaml"), "--max_steps", "10", "--eval_steps", "5"])
    table = capsys.readouterr().out
    assert "10 steps, 40,960 tokens" in table and "2 evaluations, 4 samples" in table and "--measure" in table


def test_options_stand_before_and_after_the_recipe(capsys):
    recipe = "pretrain_gpt2_124m"
    after = plan(capsys, recipe, "--gpu", "L4", "--max_steps", "1000", "--gpus", "2")
    assert after == plan(capsys, "--gpus", "2", "--gpu", "L4", recipe, "--max_steps", "1000")
    assert after["steps"] == 1000 and after["hardware"]["count"] == 2


def test_evaluations_and_saves_are_those_of_the_run(capsys):
    how = ["--max_steps", "20", "--eval_steps", "0.25", "--save_steps", "7", "--eval_on_start", "true"]
    found = plan(capsys, "--gpu", "L4", "pretrain_quickstart", *how)
    args = PretrainArguments(
        output_dir="unused", use_cpu=True, eval_strategy="steps", eval_steps=0.25, save_steps=7, eval_on_start=True
    )
    assert (found["evaluations"], found["saves"]) == (evaluations(args, 20), saves(args, 20) + 1) == (5, 4)


def test_minutes_take_the_pace(capsys):
    recipe = [str(RECIPES / "pretrain_gpt2_124m.yaml"), "--train_minutes", "90", "--hellaswag_steps", "0"]
    found = plan(capsys, "--gpu", "H200", *recipe)
    assert found["hours"] == 1.5
    assert found["steps"] * found["step_tokens"] / found["tokens_per_second"] == pytest.approx(5400, rel=1e-2)


def test_without_a_pace_the_rest_is_planned(capsys):
    """Where no pace is known, minutes are minutes, and memory is memory; the steps are for --measure."""
    found = plan(capsys, "pretrain_quickstart", "--use_cpu", "true")
    assert found["steps"] is None and found["hours"] == 4 / 60 and found["memory"]["weights"] > 4e6
    cli.main(["plan", "pretrain_quickstart", "--use_cpu", "true"])
    table = capsys.readouterr().out
    assert "4 minutes, in as many steps as fit (--measure takes some here)" in table and "4.0 minutes" in table


def test_a_measured_pace_counts_the_steps(capsys, monkeypatch):
    monkeypatch.setattr("llmkit.planning.memory.MEASURED", 0.1)
    cached = set()
    forward = GPT2LMHeadModel.forward

    def watched(*args, **kwargs):
        cached.add(torch.is_autocast_cache_enabled())
        return forward(*args, **kwargs)

    monkeypatch.setattr(GPT2LMHeadModel, "forward", watched)
    shape = ["--n_layer", "1", "--n_embd", "16", "--vocab_size", "300", "--block_size", "16"]
    batch = ["--total_batch_tokens", "64", "--per_device_train_batch_size", "2", "--use_cpu", "true"]
    found = plan(capsys, "--measure", "pretrain_quickstart", *shape, *batch)
    assert found["pace"] == "measured here" and found["accumulation"] == 2
    assert cached == {False}, "as in training"
    assert found["steps"] == pytest.approx(240 * found["tokens_per_second"] / 64, abs=1)


def test_a_gpu_is_planned_as_it_compiles(capsys):
    recipe = ["--gpu", "H100 HBM3", "pretrain_gpt2_124m", "--n_layer", "2"]
    compiled, eager = plan(capsys, *recipe), plan(capsys, *recipe, "--torch_compile", "false")
    of_one = 2 * 64 * 1024 * 4 * 768  # bytes of an activation function's result, in bfloat16
    more = compiled["memory"]["activations"] - eager["memory"]["activations"]
    assert more == pytest.approx(2 * of_one, rel=0.2)


def test_the_largest_micro_batch_fits(capsys):
    """With activation checkpointing the peak of small batches is in the loss, and that of large ones in a layer."""
    recipe = ["--gpu", "L4", "pretrain_gpt2_124m", "--activation_checkpointing", "true"]
    recipe += ["--n_layer", "2", "--n_embd", "2048", "--n_head", "16"]

    def of(micro_batch: int, micro_batches: int) -> dict:
        tokens = 1024 * micro_batch * micro_batches
        return plan(
            capsys, *recipe, "--per_device_train_batch_size", str(micro_batch), "--total_batch_tokens", str(tokens)
        )

    largest = of(2, 1024)["largest_micro_batch"]
    assert 8 < largest < 2048, "not beyond the sizes that were planned, or a whole step"
    found = of(largest, 1)
    assert found["fits"] == "as it is"
    assert sum(found["memory"].values()) > 0.8 * 0.92 * found["hardware"]["memory"]


def test_the_shards_of_a_dataset_whose_page_says_its_tokens(capsys):
    found = plan(capsys, "--gpu", "H200", "pretrain_gpt2_774m")
    assert found["shards"] == 2 * 10**11 and found["train_tokens"] == 10**11


def test_fine_tuning_the_known_base(capsys):
    cli.main(["plan", "--gpu", "L4", "--gpus", "2", "sft_qlora", "--max_length", "128", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["trained"] == 23_592_960  # as the recipe says
    assert found["parameters"] == 2_779_683_840 + found["trained"]
    # Linear layers in 4 bits and their statistics, embeddings and head in bf16, adapters in float32.
    quantized = 32 * (4 * 2560**2 + 2 * 2560 * 10240)
    embeddings = 2 * 51200 * 2560
    adapters = 4 * found["trained"]
    assert found["memory"]["weights"] == pytest.approx(quantized * 0.516 + 2 * embeddings + adapters, rel=0.01)
    assert found["memory"]["gradients"] == found["communication"] == adapters
    assert found["checkpoint"] == pytest.approx(3 * adapters, rel=0.01)
    assert found["fits"] == "as it is" and found["step_tokens"] == 2 * 16 * 128
    assert found["steps"] is None and found["length"].startswith("3 passes over data that were not read")


def test_fine_tuning_a_base_that_is_here(capsys, tmp_path):
    config = GPT2Config(n_layer=2, n_head=2, n_embd=64, vocab_size=300, n_positions=64)
    config.save_pretrained(tmp_path)
    recipe = ["sft_qlora_quickstart", "--model", str(tmp_path), "--max_length", "64", "--use_cpu", "true"]
    cli.main(["plan", *recipe, "--max_steps", "10", "--sample_prompts", "a", "b", "c"])
    table = capsys.readouterr().out
    assert f"gpt2 of {config.num_parameters:,} parameters in 4 bits (NF4)" in table
    assert "10 steps, 10,240 tokens" in table
    assert "3 evaluations, 9 samples" in table  # before the first step, in the middle and at the end


def test_preference_tuning_reads_pairs_and_keeps_a_frozen_copy_of_its_adapter(capsys, tmp_path):
    phi_with_adapter(tmp_path, ["Four. All of them."])
    how = ["--max_length", "64", "--max_steps", "10", "--use_cpu", "true", "--bf16", "false"]
    new = ["--adapter", "null", "--model", str(tmp_path / "base"), "--lora_r", "4"]
    found = plan(capsys, "dpo_qlora", *new, *how)
    assert found["step_tokens"] == 2 * 32 * 2 * 64 and found["samples"] > 0
    more = plan(capsys, "dpo_qlora", "--adapter", str(tmp_path / "sft"), *how)
    assert more["memory"]["gradients"] == found["memory"]["gradients"]
    assert more["memory"]["weights"] == found["memory"]["weights"] + found["memory"]["gradients"]


def test_sharding_is_not_proposed_where_it_is_refused(capsys, tmp_path):
    GPT2Config(n_layer=6, n_head=64, n_embd=16384, n_positions=64).save_pretrained(tmp_path)  # 38 GB in bf16
    recipe = ["sft_qlora", "--model", str(tmp_path), "--quantization", "none", "--max_length", "64"]
    assert plan(capsys, "--gpu", "L4", "--gpus", "8", *recipe)["fits"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpus", "0"], "gpus=0"),
        (["--optim=adamw_bnb_8bit", "--muon_learning_rate=null"], "plan with optim: adamw_torch_fused"),
        (["--mfu", "1.5"], "mfu=1.5"),
        (["--dollars_per_hour", "nan"], "dollars_per_hour=nan"),
        (["--measure", "--gpu", "H200"], "leave out --gpu"),
        (["--gpu", "Voodoo"], "not known"),
        (["--gpu", "A100"], "A100-SXM4-40GB"),
        (["--gpu", "H200", "--gpus", "3"], "is not a multiple of"),
        (["dpo_qlora", "--adapter", "runs/nothing"], "runs/nothing"),
        (
            ["sft_qlora", "--model", "nobody/nothing"],
            "model=nobody/nothing: no folder here, and not read from the Hub",
        ),
        (["sft_qlora", "--max_length", "4096"], "longer than the 2048 positions of the base"),
    ],
)
def test_mistakes_are_one_line(capsys, arguments, message):
    recipe = [] if arguments[0] in ("sft_qlora", "dpo_qlora") else [str(RECIPES / "pretrain_quickstart.yaml")]
    with pytest.raises(SystemExit, match="2"):
        cli.main(["plan", *arguments, *recipe])
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_gpus_of_one_memory_and_peak_need_no_more_words():
    assert Hardware.of("A100 80GB", 1).memory == 80e9
