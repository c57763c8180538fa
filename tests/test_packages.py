"""What llmkit uses of other packages though they do not promise it: a list, and the reason beside each use."""

import ast
import importlib
import inspect
import re
import tomllib
from functools import cache
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
# The module whose source says that the name is there, for each name that begins with an underscore.
PRIVATE = {
    "_actions": "argparse",
    "_adjust_lr": "torch.optim._muon",
    "_attn_implementation": "transformers.configuration_utils",
    "_can_compile_fullgraph": "transformers.modeling_utils",
    "_can_record_outputs": "transformers.modeling_utils",
    "_cdata": "torch.storage",
    "_created_lr_scheduler": "transformers.trainer",
    "_prepare_inputs": "transformers.trainer",
    "_prepare_dataset": "trl.trainer.dpo_trainer",
    "_dynamo": "torch",
    "_get_grad_norm": "transformers.trainer",
    "_get_output_dir": "transformers.trainer",
    "_inductor": "torch",
    "_init_group": "torch.optim._muon",
    "_init_weights": "transformers.modeling_utils",
    "_internal_call": "transformers.trainer",
    "_is_mkldnn_bf16_supported": "torch._inductor.utils",
    "_keys_to_ignore_on_load_unexpected": "transformers.modeling_utils",
    "_keys_to_ignore_on_save": "transformers.modeling_utils",
    "_load_rng_state": "transformers.trainer",
    "_muon": "torch.optim",
    "_n_gpu": "transformers.training_args",
    "_no_split_modules": "transformers.modeling_utils",
    "_push_from_checkpoint": "transformers.trainer",
    "_python_dispatch": "torch.utils",
    "_pytree": "torch.utils",
    "_reset_state": "accelerate.state",
    "_save_checkpoint": "transformers.trainer",
    "_skip_keys_device_placement": "transformers.modeling_utils",
    "_subclasses": "torch",
    "_supports_attention_backend": "transformers.modeling_utils",
    "_supports_flash_attn": "transformers.modeling_utils",
    "_supports_flex_attn": "transformers.modeling_utils",
    "_supports_sdpa": "transformers.modeling_utils",
    "_tied_weights_keys": "transformers.modeling_utils",
}


def sources() -> dict[Path, str]:
    return {path: path.read_text() for folder in ("llmkit", "recipes") for path in (ROOT / folder).rglob("*.py")}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name.strip("_") != ""


def touched() -> set[str]:
    """Private names that are read or set on something, imported, given as arguments, or inherited and overridden."""
    own, found = set(), set()
    for node in (node for text in sources().values() for node in ast.walk(ast.parse(text))):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            own.add(node.name)
        elif isinstance(node, ast.Attribute):
            (own if isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self" else found).add(node.attr)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            module = getattr(node, "module", None) or ""
            names = module.split(".") + [part for alias in node.names for part in alias.name.split(".")]
            found |= set(names)
        elif isinstance(node, ast.keyword) and node.arg:
            found.add(node.arg)
    return {name for name in found - own if is_private(name)} | inherited()


def inherited() -> set[str]:
    """Private names that a class of ours writes and a class of another package that it is made from has as well."""
    found = set()
    for path, text in sources().items():
        for node in ast.parse(text).body:
            names = written(node) if isinstance(node, ast.ClassDef) and node.bases else set()
            if names:  # few, and only their modules are imported
                module = importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
                bases = "".join(map(source_of, getattr(module, node.name).__mro__))
                found |= {name for name in names if re.search(rf"\b{name}\b", bases)}
    return found


def written(node: ast.ClassDef) -> set[str]:
    """Private names that a class defines or sets on `self`; what others set on it at run time is not among them."""
    body = [*node.body, *(part for part in ast.walk(node) if isinstance(part, ast.Attribute))]
    targets = [target for part in body if isinstance(part, ast.Assign) for target in part.targets]
    targets += [part.target for part in body if isinstance(part, ast.AnnAssign)]
    names = {target.id for target in targets if isinstance(target, ast.Name)}
    names |= {part.name for part in body if isinstance(part, ast.FunctionDef)}
    names |= {
        part.attr
        for part in body
        if isinstance(part, ast.Attribute) and isinstance(part.ctx, ast.Store) and ast.unparse(part.value) == "self"
    }
    return {name for name in names if is_private(name)}


@cache
def source_of(base: type) -> str:
    is_foreign = base.__module__.split(".")[0] in ("transformers", "trl", "accelerate", "peft", "torch")
    return inspect.getsource(base) if is_foreign and not base.__module__.startswith("torch._C") else ""


@pytest.mark.parametrize("name", PRIVATE)
def test_a_private_name_is_still_there(name):
    module = importlib.import_module(PRIVATE[name])
    there = hasattr(module, name) or re.search(rf"\b{name}\b", inspect.getsource(module))
    assert there, f"{PRIVATE[name]} has lost {name}, which llmkit uses"


def test_compiled_graphs_are_limited_where_llmkit_raises_the_limit():
    assert isinstance(torch._dynamo.config.recompile_limit, int)


def test_every_private_name_is_listed_with_its_reason():
    assert touched() == set(PRIVATE), "list in PRIVATE what is used, and take out what is not"
    lines = [line for text in sources().values() for line in text.splitlines()]
    explained = " ".join(
        " ".join(lines[at : at + 14])
        for at, line in enumerate(lines)
        if re.search(r"# private\b", line, re.IGNORECASE)
    )
    without = [name for name in PRIVATE if not re.search(rf"\b{name}\b", explained)]
    assert not without, f"no line `# private: ...` says why llmkit uses {', '.join(without)}"


def test_an_installation_has_every_package_and_the_recipes():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    packages = {".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "llmkit").rglob("__init__.py")}
    assert set(settings["packages"]) == packages | {"llmkit.recipes"}
    assert settings["package-dir"] == {"llmkit.recipes": "recipes"}
