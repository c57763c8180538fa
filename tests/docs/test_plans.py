"""The table of plans in recipes/README.md is what `llmkit plan` says."""

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def plans():
    spec = importlib.util.spec_from_file_location("plans", ROOT / "docs" / "plans.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "name", ["pretrain_quickstart", "sft_qlora_quickstart", "dpo_qlora_quickstart", "pretrain_gpt2_124m"]
)
def test_rows_are_current(plans, name):
    (planned,) = (each for each in plans.PLANNED if each[0] == name)
    assert plans.row(*planned) in plans.README.read_text(), "python docs/plans.py writes the table"


def test_every_recipe_is_planned(plans):
    shipped = {path.stem for path in (ROOT / "recipes").glob("*.yaml")}
    assert {name for name, *_ in plans.PLANNED} == shipped
    text = plans.README.read_text()
    assert all(f"| `{name}` |" in text for name in shipped)
