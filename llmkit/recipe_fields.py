"""The fields of a recipe's dataclasses as their source files state them, read without importing anything.

Importing TrainingArguments takes five seconds, for torch, peft and bitsandbytes come with it. Its fields stand in the
installed source file, so a recipe can be checked against them, and their help be shown, in a tenth of a second. The
parser itself is one file of transformers, and importing the package around it takes most of a second.
"""

import ast
import builtins
import dataclasses
import importlib.util
import typing
from functools import cache
from pathlib import Path
from types import ModuleType

# What `from PACKAGE import NAME` means where the package finds its names lazily.
LAZY = {
    "transformers.TrainingArguments": "transformers.training_args.TrainingArguments",
    "trl.DPOConfig": "trl.trainer.dpo_config.DPOConfig",
    "trl.SFTConfig": "trl.trainer.sft_config.SFTConfig",
}


class _Names(dict):
    """What annotations may name. All other names are enums here, which are written as text."""

    def __missing__(self, name: str):
        return getattr(typing, name, None) or getattr(builtins, name, str)


@dataclasses.dataclass(frozen=True)
class WrittenField:
    """A field as it is written: its type (an enum's is str), its default where that is a literal, and where it is."""

    name: str
    type: object
    default: object
    metadata: dict
    owner: str  # the dotted name of the class


@cache
def written_fields(dotted: str) -> tuple[WrittenField, ...]:
    """The fields of the dataclass `module.Class`, inherited ones first; a class overrides its bases."""
    module, _, name = LAZY.get(dotted, dotted).rpartition(".")
    tree = _parse(module)
    imported = {
        alias.asname or alias.name: f"{_absolute(node, module)}.{alias.name}"
        for node in tree.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    here = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
    fields: dict[str, WrittenField] = {}
    for base in reversed(here[name].bases):
        base = ast.unparse(base)
        for inherited in written_fields(f"{module}.{base}" if base in here else imported[base]):
            fields[inherited.name] = inherited
    for node in here[name].body:
        if isinstance(node, ast.AnnAssign) and not ast.unparse(node.annotation).startswith("ClassVar"):
            assert isinstance(node.target, ast.Name), "in the body of a class"
            default, metadata = _default_and_metadata(node.value)
            annotation = eval(ast.unparse(node.annotation), _Names())
            field = WrittenField(node.target.id, annotation, default, metadata, f"{module}.{name}")
            fields.pop(field.name, None)  # so that it is listed where its owner's are
            fields[field.name] = field
    return tuple(fields.values())


def written_dataclass(dotted: str) -> type:
    """A dataclass with the fields of `module.Class`, for an argument parser; it has none of its checks."""
    fields = []
    for written in written_fields(dotted):
        value = written.default
        if isinstance(value, list | dict):
            field = dataclasses.field(default_factory=value.copy, metadata=written.metadata)
        else:
            field = dataclasses.field(default=value, metadata=written.metadata)
        fields.append((written.name, written.type, field))
    return dataclasses.make_dataclass(dotted.rpartition(".")[2], fields)


def module_alone(module: str) -> ModuleType:
    """A module that imports nothing of its own package, without the package's `__init__`."""
    spec = importlib.util.spec_from_file_location(module.rpartition(".")[2], _source(module))
    assert spec and spec.loader, "a source file"
    alone = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(alone)
    return alone


@cache
def _parse(module: str) -> ast.Module:
    return ast.parse(_source(module).read_text(encoding="utf-8"))


def _source(module: str) -> Path:
    """The file of a module. Only `find_spec` of a top-level package imports nothing."""
    package, *parts = module.split(".")
    spec = importlib.util.find_spec(package)
    assert spec and spec.submodule_search_locations, "an installed package"
    path = Path(spec.submodule_search_locations[0], *parts)
    return path.with_suffix(".py") if path.with_suffix(".py").is_file() else path / "__init__.py"


def _absolute(node: ast.ImportFrom, module: str) -> str:
    parents = module.split(".")[: -node.level] if node.level else []
    return ".".join([*parents, *([node.module] if node.module else [])])


def _default_and_metadata(value: ast.expr | None) -> tuple[object, dict]:
    if not (isinstance(value, ast.Call) and ast.unparse(value.func).endswith("field")):
        return _literal(value), {}
    given = {keyword.arg: keyword.value for keyword in value.keywords}
    if "default_factory" in given:
        default = {"list": [], "dict": {}}.get(ast.unparse(given["default_factory"]))
    else:
        default = _literal(given.get("default"))
    return default, _literal(given.get("metadata")) or {}


def _literal(node: ast.expr | None):
    """The value of an expression, or None where only running the module would tell it."""
    try:
        return None if node is None else ast.literal_eval(node)
    except ValueError:
        return None
