"""What llmkit uses of other packages though they do not promise it: a list, and the reason beside each use."""

import ast
import importlib
import inspect
import pkgutil
import re
from pathlib import Path

import pytest
import torch

import llmkit

ROOT = Path(__file__).parents[1]
# The module whose source says that the name is there, for each name that begins with an underscore.
PRIVATE = {
    "_actions": "argparse",
    "_attn_implementation": "transformers.configuration_utils",
    "_can_compile_fullgraph": "transformers.modeling_utils",
    "_can_record_outputs": "transformers.modeling_utils",
    "_created_lr_scheduler": "transformers.trainer",
    "_dynamo": "torch",
    "_get_output_dir": "transformers.trainer",
    "_init_weights": "transformers.modeling_utils",
    "_internal_call": "transformers.trainer",
    "_keys_to_ignore_on_load_unexpected": "transformers.modeling_utils",
    "_keys_to_ignore_on_save": "transformers.modeling_utils",
    "_load_rng_state": "transformers.trainer",
    "_n_gpu": "transformers.training_args",
    "_no_split_modules": "transformers.modeling_utils",
    "_push_from_checkpoint": "transformers.trainer",
    "_reset_state": "accelerate.state",
    "_save_checkpoint": "transformers.trainer",
    "_skip_keys_device_placement": "transformers.modeling_utils",
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
    """Private names of other packages' classes that ours have as well, and so stand in for."""
    found = set()
    for info in pkgutil.walk_packages(llmkit.__path__, "llmkit."):
        if info.name == "llmkit.__main__":
            continue
        for ours in vars(importlib.import_module(info.name)).values():
            if inspect.isclass(ours) and ours.__module__ == info.name:
                bases = [base for base in ours.__mro__ if not base.__module__.startswith("llmkit.")]
                source = "".join(inspect.getsource(ours).split())
                names = set(vars(ours)) | set(re.findall(r"self\.(_[a-z]\w*)=", source))
                # torch's and Python's own machinery sets some on every class.
                found |= {name for name in names if any(_mentions(base, name) for base in bases)}
    return {name for name in found if is_private(name) and not name.startswith("_abc")} - {"_is_full_backward_hook"}


def _mentions(base: type, name: str) -> bool:
    package = base.__module__.split(".")[0]
    if package not in ("transformers", "trl", "accelerate", "peft", "torch") or base.__module__.startswith("torch._C"):
        return False
    return re.search(rf"\b{name}\b", inspect.getsource(base)) is not None


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
