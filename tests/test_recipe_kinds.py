"""A recipe's mistakes are found by the fields as they are written, before torch is imported."""

import importlib
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
def test_shipped_recipes_are_right_and_of_their_kind(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # whatever runs of theirs the checkout has
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
