"""A recipe's mistakes are found by the fields as they are written, before torch is imported."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from llmkit.errors import UserError
from llmkit.recipe_fields import LAZY, written_dataclass
from llmkit.recipe_kinds import DPO, KINDS, PRETRAIN, SFT, check_recipe, parse_recipe
from llmkit.recipe_parser import RecipeParser

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


def options(types: list[type]) -> dict[str, tuple]:
    """What each option of a command line takes. A class that is not builtin counts as text."""
    found = {}
    for action in RecipeParser(types, "x")._actions:
        is_own = isinstance(action.type, type) and action.type.__module__ != "builtins"
        kind = str if is_own or action.choices else action.type
        for name in action.option_strings:
            found[name] = (action.nargs, action.const, kind)
    return found


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_the_written_fields_are_those_of_the_classes(kind):
    names = [name.rpartition(".") for name in kind.dataclasses]
    real = options([getattr(importlib.import_module(module), name) for module, _, name in names])
    written = options([written_dataclass(name) for name in kind.dataclasses])
    assert len(real) > 100
    assert written == real


@pytest.mark.parametrize(("short", "full"), LAZY.items())
def test_lazy_names_are_found_where_they_are(short, full):
    (package, name), (module, _, full_name) = short.split("."), full.rpartition(".")
    real = getattr(importlib.import_module(package), name)
    assert (real.__module__, real.__name__) == (module, full_name)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipes_are_right_and_of_their_kind(path):
    kind = next(kind for kind in (PRETRAIN, SFT, DPO) if path.name.startswith(kind.name))
    other = SFT if kind is PRETRAIN else PRETRAIN
    check_recipe(kind, [], path)
    with pytest.raises(UserError, match=f"looks like a recipe for `llmkit {kind.command}`"):
        check_recipe(other, [], path)


def test_a_recipe_that_fits_neither_kind_is_not_called_one(tmp_path):
    (tmp_path / "x.yaml").write_text("no_such_key: 1\n")
    with pytest.raises(UserError, match="unknown argument no_such_key") as raised:
        check_recipe(PRETRAIN, [], tmp_path / "x.yaml")
    assert "looks like" not in str(raised.value)


def test_parse_recipe_fills_the_classes(tmp_path):
    (tmp_path / "x.yaml").write_text(f"output_dir: {tmp_path}\nmax_steps: 3\n")
    data, model, args = parse_recipe(PRETRAIN, ["--n_layer", "2", "--use_cpu", "true"], tmp_path / "x.yaml")
    assert (data.tokenizer, model.n_layer, args.max_steps) == ("bpe", 2, 3)


# ------------------------------------------------------------------ answered without torch

HEAVY = ("torch", "peft", "bitsandbytes", "datasets", "transformers.modeling_utils", "transformers.trainer")


def answer(*argv: str) -> tuple[subprocess.CompletedProcess, set[str]]:
    """What a command answers, and the heavy libraries that it imported for that."""
    command = [sys.executable, "-X", "importtime", *argv]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    lines = done.stderr.splitlines()
    imported = {line.rpartition("|")[2].strip() for line in lines if line.startswith("import time:")}
    done.stderr = "\n".join(line for line in lines if not line.startswith("import time:"))
    return done, imported & set(HEAVY)


MISTAKES = [
    ("recipes/pretrain.py --max_stesp 3", "did you mean --max_steps"),
    ("recipes/pretrain.py --max_steps many", "invalid int value"),
    ("recipes/pretrain.py --config recipes/nope.yaml", "cannot read the recipe"),
    ("recipes/sft_qlora.py --config recipes/pretrain_quickstart.yaml", "llmkit train"),
    ("recipes/pretrain.py --learning_rate nan", "learning_rate=nan: must be at least 0"),
    ("recipes/sft_qlora.py --per_device_train_batch_size 0", "must be at least 1"),
    ("-m llmkit train recipes/pretrain_quickstart.yaml --logging_steps 0", "logging_steps=0.0: must be above 0"),
    ("-m llmkit train pretrain_quickstart --max_stesp 3", "did you mean --max_steps"),
    ("-m llmkit audit sft_qlora --max_lenght 3", "did you mean --max_length"),
    ("-m llmkit lr-find --config recipes/pretrain_nope.yaml", "no such file"),
    ("-m llmkit train", "no recipe"),
    ("-m llmkit train recipes/nope.yaml", "no such file"),
    ("-m llmkit train recipes/pretrain_quickstart.yaml --lr_schedule sine", "invalid choice"),
    ("-m llmkit train recipes/sft_qlora.yaml", "llmkit sft"),
    ("-m llmkit sft recipes/sft_qlora.yaml --num_processes 2 --lora_r x", "invalid int value"),
    ("-m llmkit lr-find --config recipes/pretrain_quickstart.yaml --max_stesp 3", "did you mean --max_steps"),
    ("-m llmkit audit recipes/sft_qlora.yaml --max_lenght 3", "did you mean --max_length"),
    ("-m llmkit audit recipes/nope.yaml", "no such file"),
    ("-m llmkit generate recipes/nope x", "no such file"),
    ("-m llmkit generate recipes x", "no checkpoint in this folder"),
    ("-m llmkit generate gpt2 x --temperature -1", "temperature is -1.0"),
    ("-m llmkit chat recipes/nope", "no such file"),
    ("-m llmkit eval recipes/nope", "no such file"),
    ("-m llmkit eval gpt2 --batch_size 0", "batch_size"),
    ("-m llmkit merge recipes/nope merged", "no such file"),
    ("-m llmkit merge gpt2 recipes", "is there already"),
    ("-m llmkit push recipes/nope me/x", "no such file"),
    ("-m llmkit report recipes/nope", "no such file"),
    ("-m llmkit tokenizer show x --tokenizer recipes/nope", "no such file"),
    ("-m llmkit tokenizer train --output x --kind character --vocab_size 3", "vocab_size is for --kind bpe"),
    ("-m llmkit shards prepare --output x --tokenizer recipes/nope", "no such file"),
]


@pytest.mark.parametrize(("command", "said"), MISTAKES, ids=[command for command, _ in MISTAKES])
def test_a_mistake_is_one_line_and_imports_nothing_heavy(command, said):
    done, heavy = answer(*command.split())
    assert done.returncode == 2
    assert said in done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 0
    assert heavy == set()


COMMANDS = [
    "train",
    "sft",
    "lr-find",
    "audit",
    "merge",
    "generate",
    "chat",
    "eval",
    "push",
    "report",
    "tokenizer",
    "shards",
]


@pytest.mark.parametrize(
    "command", [[], *([command] for command in COMMANDS), ["tokenizer", "train"], ["tokenizer", "show"]]
)
def test_help_imports_nothing_heavy(command):
    done, heavy = answer("-m", "llmkit", *command, "--help")
    assert (done.returncode, done.stderr, heavy) == (0, "", set())
    assert "usage: llmkit" in done.stdout


def test_help_of_a_recipe_shows_ours_by_subject_and_all_on_demand():
    short, long = (answer("-m", "llmkit", "train", "--help", *more)[0].stdout for more in ([], ["all"]))
    assert "Data:\n  --text_files list[str]\n" in short
    assert "--total_batch_tokens" in short and "--adam_epsilon" not in short
    assert "--adam_epsilon" in long and "--total_batch_tokens" in long
