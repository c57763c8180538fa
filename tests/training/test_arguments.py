"""Recipes say what is wrong with them in one line, and every shipped one is right."""

import math
import re
from pathlib import Path

import pytest
import torch
from accelerate.utils import FullyShardedDataParallelPlugin

from llmkit.data.arguments import DataArguments
from llmkit.data.tokenizer import train_character_tokenizer
from llmkit.errors import UserError
from llmkit.finetuning.adapters import AdapterArguments
from llmkit.finetuning.arguments import SFTArguments
from llmkit.finetuning.conversations import ConversationArguments
from llmkit.machine import bf16_is_fast
from llmkit.model.arguments import ModelArguments
from llmkit.recipe_parser import RecipeParser
from llmkit.training.arguments import PretrainArguments
from llmkit.training.pretrain_trainer import keep_sums_in_float32
from llmkit.training.run_arguments import use_one_gpu

RECIPES = Path(__file__).parents[2] / "recipes"
SHIPPED = sorted(RECIPES.glob("pretrain_*.yaml"))


def parse(path: Path, *argv: str):
    return RecipeParser((DataArguments, ModelArguments, PretrainArguments), path).parse(list(argv))


def recipe(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return path


def test_recipes_are_shipped():
    assert {"pretrain_quickstart", "pretrain_gpt2_124m", "pretrain_characters"} <= {path.stem for path in SHIPPED}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_recipe(path):
    """Parses, makes a model, and its header does the arithmetic of its fields."""
    data, model, args = parse(path)
    config = model.config()
    args.set_accumulation(model.block_size or config.n_positions)
    assert Path(args.output_dir) == Path("runs") / path.stem
    header = path.read_text().split("\n\n")[0]
    if args.train_minutes is None:
        tokens = args.max_steps * args.total_batch_tokens
        assert f"{args.max_steps:,} steps x {args.total_batch_tokens:,} = " in header
        scale, unit = (1e9, "B") if tokens >= 1e9 else (1e6, "M")
        assert f"= {tokens / scale:.1f}{unit} tokens" in header
    else:
        assert f"run   {args.train_minutes:g} minutes" in header
    (step,) = re.findall(r"step +(.*) tokens = (.*)", header)
    factors = [int(number.replace(",", "")) for number in re.findall(r"[\d,]*\d", step[1].split("(")[0])]
    assert step[0] == f"{args.total_batch_tokens:,}" and math.prod(factors) == args.total_batch_tokens
    assert factors[:2] == [args.per_device_train_batch_size, model.block_size or config.n_positions]


def test_a_home_is_found_in_every_path(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "hellaswag.jsonl").write_text("")
    for name in ("dataset_name", "tokenizer", "init_from", "base", "chats"):  # which have to be there
        (tmp_path / name).mkdir()
    keys = ["dataset_name", "tokenizer", "data_dir", "init_from", "output_dir", "resume_from_checkpoint"]
    text = "".join(f"{key}: ~/{key}\n" for key in keys) + "hellaswag_file: ~/hellaswag.jsonl\nhellaswag_steps: 500\n"
    parts = parse(recipe(tmp_path, text + "sample_prompts: [~/not a path]\nmax_steps: 1\n"))
    found = {key: value for part in parts for key, value in vars(part).items()}
    assert {key: found[key] for key in keys} == {key: str(tmp_path / key) for key in keys}
    assert found["hellaswag_file"] == str(tmp_path / "hellaswag.jsonl")
    assert found["sample_prompts"] == ["~/not a path"]
    assert AdapterArguments(model="~/base").model == str(tmp_path / "base")
    assert ConversationArguments(dataset_name="~/chats").dataset_name == str(tmp_path / "chats")


@pytest.mark.parametrize("wrong", [{"pad_to_multiple_of": 0}, {"dataset_num_proc": -1}])
def test_numbers_that_fine_tuning_cannot_use(tmp_path, wrong):
    with pytest.raises(UserError, match=f"{next(iter(wrong))}=.*: must be at least 1"):
        SFTArguments(output_dir=str(tmp_path), use_cpu=True, **wrong)


def test_command_line_wins_and_types_are_read_alike(tmp_path):
    path = recipe(
        tmp_path, "learning_rate: 6e-4\nmax_steps: 10\nbf16: false\nsample_prompts: [a b, c]\noutput_dir: x\n"
    )
    _, _, args = parse(path, "--max_steps", "20", "--bf16", "true")
    assert (args.learning_rate, args.max_steps, args.bf16, args.sample_prompts) == (6e-4, 20, True, ["a b", "c"])
    assert parse(tmp_path / "missing", f"--config={path}")[2].max_steps == 10


@pytest.mark.parametrize(
    "text, message",
    [
        ("max_step: 10", r"recipe.yaml: unknown argument max_step: did you mean max_steps\?"),
        ("max_steps: 10\nseed: 1\nmax_steps: 20", "recipe.yaml.*line 3: key 'max_steps' stands there twice"),
        ("max_steps: many", "recipe.yaml: --max_steps: invalid int value: 'many'"),
        ("max_steps: 1.5", "recipe.yaml: --max_steps: invalid int value: '1.5'"),
        ("max_steps: true", "recipe.yaml: --max_steps: invalid int value: 'True'"),
        ("bf16: perhaps", "recipe.yaml: --bf16.*perhaps"),
        ("validation_split: half", "recipe.yaml: --validation_split.*'half'.*document.*tail"),
        ("- a\n- b", "recipe.yaml: a recipe is"),
        ("learning_rate: [1, 2]", r"recipe.yaml: learning_rate takes one value, not a list: \[1, 2\]"),
        ("config: other.yaml", "recipe.yaml: unknown argument config"),
        ("a: [", "recipe.yaml is not valid YAML"),
        ("max_steps: " + "[" * 3000, "recipe.yaml is not valid YAML"),
        ("? [a, b]\n: 3", "recipe.yaml is not valid YAML"),
        ("max_steps: 2020-99-99", "recipe.yaml is not valid YAML"),
        ("accelerator_config: nonsense", "nonsense"),
        ("activation_checkpointing_kwargs: nonsense", "activation_checkpointing_kwargs=nonsense: give a mapping"),
        ("output_dir: ''", "recipe.yaml: output_dir is ''"),
        ('output_dir: "a\\0b"', r"output_dir is 'a\\x00b'"),
        ("init_from: ' '", "init_from is ' '"),
        ("init_from: ./nope", "init_from='./nope': there is no such file or folder"),
        ("tokenizer: ./nope", "tokenizer='./nope': there is no such file or folder"),
        ("dataset_name: /nope", "dataset_name='/nope': there is no such file or folder"),
        ("text_column: ''", "recipe.yaml: text_column is ''"),
        ("text_files: ['']", "recipe.yaml: text_files is ''"),
        ('run_name: "a\\0b"', r"recipe.yaml: run_name is 'a\\x00b'"),
        ("optim_target_modules: x", "optim_target_modules=x is not supported"),
    ],
)
def test_bad_recipes(tmp_path, text, message):
    with pytest.raises(UserError, match=message) as caught:
        parse(recipe(tmp_path, text))
    assert "\n" not in str(caught.value)


def test_bad_command_lines(tmp_path):
    path = recipe(tmp_path, "output_dir: x\n")
    for argv, message in [
        (["--max-step", "3"], r"unknown argument --max-step: did you mean --max[-_]steps\?"),
        (["--max_steps", "x"], "--max_steps.*invalid int value: 'x'"),
        (["--config", str(tmp_path / "none.yaml")], "cannot read the recipe .*none.yaml: No such file"),
        (
            ["--gradient_accumulation_steps", "4"],
            "gradient_accumulation_steps=4 is not supported: it is derived from",
        ),
        (["--label_smoothing_factor", "0.1"], "label_smoothing_factor=0.1 is not supported"),
        (["--total_batch_tokens", "0"], "total_batch_tokens=0: must be at least 1"),
        (["--max_steps", "0"], "nothing to train"),
        (["--sample_tokens", "0"], "sample_tokens=0: must be at least 1"),
        (["--learning_rate", "-1"], "learning_rate=-1.0: must be at least 0"),
        (["--validation_fraction", "1"], "validation_fraction=1.0: it lies between 0 and 1"),
        (["--vocab_size", "100"], "vocab_size is 100.*from 257"),
        (["--report_to", "nonsense"], "report_to=nonsense is not installed here"),
        (["--lr_scheduler_type", "linear"], "stated here as lr_schedule"),
        (["--text_files", "a", "--dataset_name", "b"], "both set"),
        (["--run_name", ""], "^run_name is ''"),
        (["--text_files", "a", ""], "^text_files is ''"),
        (["--run-name="], "^run_name is ''"),
    ]:
        with pytest.raises(UserError, match=message):
            parse(path, *argv)


@pytest.mark.parametrize(
    "model, message",
    [
        ({"n_embd": 100, "n_head": 3}, "n_embd=100 is not divisible by n_head=3: take .* n_embd=99"),
        ({"n_layer": 0}, "n_layer=0: must be at least 1"),
        ({"preset": "117M"}, "unknown preset '117M': choose one of 124M"),
        ({"init_from": "somewhere", "n_layer": 2}, "init_from brings its own shape"),
        ({"dropout": 2.0}, "dropout=2.0: it lies between 0 and 1"),
        ({"attn_implementation": "nonsense"}, "attn_implementation=nonsense: choose one of .*sdpa"),
    ],
)
def test_bad_models(model, message):
    with pytest.raises(UserError, match=message):
        ModelArguments(**model).config()


def test_a_preset_on_the_command_line_replaces_the_files_shape(tmp_path):
    path = recipe(tmp_path, "n_layer: 2\nn_head: 2\nn_embd: 32\nblock_size: 16\noutput_dir: x\n")
    parser = RecipeParser((DataArguments, ModelArguments, PretrainArguments), path)
    assert parser.parse(["--preset", "355M"])[1].config().num_parameters == 354_823_168
    assert parser.parse(["--n_layer", "3"])[1].config().n_layer == 3


def test_a_source_on_the_command_line_replaces_the_files(tmp_path):
    """A FineWeb recipe on text of one's own, and the other way round."""
    data, _, _ = parse(RECIPES / "pretrain_gpt2_124m.yaml", "--text_files", "a.txt", "b.txt")
    assert (data.text_files, data.dataset_name, data.dataset_config) == (["a.txt", "b.txt"], None, None)
    assert not data.streaming and data.data_dir is None, "the shards of FineWeb-Edu are not those of this text"
    assert data.tokenizer == "openai-community/gpt2"
    path = recipe(tmp_path, "text_files: [a.txt]\ndata_dir: there\noutput_dir: x\n")
    data, _, _ = parse(path, "--dataset-name=someone/texts", "--dataset_split", "train[:10%]")
    assert (data.text_files, data.dataset_name, data.dataset_split) == (None, "someone/texts", "train[:10%]")


def test_chats_on_the_command_line_replace_the_recipes():
    parser = RecipeParser((ConversationArguments, AdapterArguments, SFTArguments), RECIPES / "sft_qlora.yaml")
    data, adapter, _ = parser.parse(["--model", "my/model", "--data_files", "chats.jsonl"])
    assert adapter.model == "my/model" and data.data_files == ["chats.jsonl"]
    assert (data.dataset_name, data.validation_split, data.dataset_split) == (None, None, "train")


def test_null_clears_a_key(tmp_path):
    path = recipe(tmp_path, "max_steps: 10\nsample_prompts: [a, b]\ndata_seed: 3\nseed: 5\noutput_dir: x\n")
    _, _, args = parse(path, "--sample_prompts", "null", "--data-seed=null", "--seed", "7")
    assert (args.sample_prompts, args.data_seed, args.seed, args.max_steps) == ([], None, 7, 10)
    with pytest.raises(UserError, match="unknown argument --data_sed: did you mean --data_seed"):
        parse(path, "--data_sed", "null")


def test_what_the_model_is_made_of(tmp_path):
    """The attention asked for, the tokenizer's vocabulary, and a checkpoint's own tokenizer."""
    tokenizer = train_character_tokenizer(["abc"])
    shape = {"n_layer": 1, "n_head": 1, "n_embd": 8, "block_size": 8}
    model = ModelArguments(**shape, attn_implementation="eager").model(tokenizer, seed=1)
    assert model.config._attn_implementation == "eager"
    assert model.config.vocab_size == len(tokenizer) and model.config.eos_token_id == tokenizer.eos_token_id
    model.save_pretrained(tmp_path)
    again = ModelArguments(init_from=str(tmp_path)).model(tokenizer, seed=2)
    assert torch.equal(again.transformer.wte.weight, model.transformer.wte.weight)
    with pytest.raises(UserError, match="the tokenizer 6 and"):
        ModelArguments(init_from=str(tmp_path)).model(train_character_tokenizer(["abcd"]), seed=1)
    with pytest.raises(UserError, match="block_size=16 is more than .* 8"):
        ModelArguments(init_from=str(tmp_path), block_size=16).config()
    with pytest.raises(UserError, match="nowhere"):
        ModelArguments(init_from=str(tmp_path / "nowhere")).model(tokenizer, seed=1)


def test_accumulation_is_derived_from_tokens(tmp_path):
    args = PretrainArguments(output_dir=str(tmp_path), total_batch_tokens=4096, per_device_train_batch_size=4)
    args.set_accumulation(block_size=256)
    assert args.gradient_accumulation_steps == 4
    args.total_batch_tokens = 5000
    with pytest.raises(UserError, match="multiple of 1024.*total_batch_tokens 4096 or 5120$"):
        args.set_accumulation(block_size=256)
    args.total_batch_tokens = 256 * 6
    with pytest.raises(UserError, match="total_batch_tokens 1024 or 2048, or per_device_train_batch_size 3$"):
        args.set_accumulation(block_size=256)


def test_precision_is_chosen_from_the_machine(tmp_path):
    args = PretrainArguments(output_dir=str(tmp_path))
    if not torch.cuda.is_available():
        assert args.use_cpu and not args.torch_compile
        assert args.bf16 == bf16_is_fast("cpu")
    assert not PretrainArguments(output_dir=str(tmp_path), bf16=False).bf16


def test_a_process_keeps_to_one_gpu_and_does_not_wait_for_copies(tmp_path):
    args = PretrainArguments(output_dir=str(tmp_path), per_device_train_batch_size=3)
    assert args.accelerator_config.non_blocking == torch.cuda.is_available()
    args._n_gpu = 4  # what Trainer finds on a machine with four
    use_one_gpu(args)
    assert args.train_batch_size == 3


def test_fsdp_sums_as_ddp_does():
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
    plugin.set_mixed_precision("bf16")
    keep_sums_in_float32(plugin)
    policy = plugin.mixed_precision_policy
    assert (policy.param_dtype, policy.reduce_dtype, policy.output_dtype) == (torch.bfloat16, torch.float32, None)
