"""Keep what the pages say of the code current: the lines that they point at, and the reference of a recipe's keys.

    python docs/build.py           # rewrite the pages
    python docs/build.py --check   # exit with status 1 where one is stale

A page points into the code as {{path:Name}} when it is written, where Name is a function, a class or Class.method.
This turns it into a link to the line of its definition, and afterwards corrects the line whenever the code moves.
`reference.md` is written as a whole, from the dataclasses that a recipe fills.
"""

import ast
import dataclasses
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
REFERENCE = ROOT / "docs" / "reference.md"
PAGES = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "CONTRIBUTING.md"]
POINTER = re.compile(r"\{\{(?P<path>[\w/]+\.py):(?P<name>[\w.]+)\}\}")
LINK = re.compile(r"\[`(?P<name>[\w.]+)` in [\w.]+, line \d+\]\((?P<up>(?:\.\./)?)(?P<path>[\w/]+\.py)#L\d+\)")


def line_of(path: str, name: str) -> int:
    """The line, counted from 1, of a function, a class or `Class.method` of a file below the repository's root.

    Raises:
        KeyError: the file defines no such name.
    """
    node: ast.AST = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    for part in name.split("."):
        found = {child.name: child for child in ast.iter_child_nodes(node) if hasattr(child, "name")}
        node = found[part]
    return node.lineno


def link(match: re.Match) -> str:
    path, name = match["path"], match["name"]
    line = line_of(path, name)
    up = match.groupdict().get("up", "@")
    return f"[`{name}` in {Path(path).name}, line {line}]({up}{path}#L{line})"


def current(page: Path) -> str:
    """The page's text with every pointer and link at the line where its name is defined now."""
    up = "" if page.parent == ROOT else "../"
    return LINK.sub(link, POINTER.sub(link, page.read_text(encoding="utf-8")).replace("](@", f"]({up}"))


def reference() -> str:
    """The page of all keys of the recipes: ours with what they do, the inherited ones, and those that are refused."""
    from llmkit.data.arguments import DataArguments
    from llmkit.finetuning.adapters import AdapterArguments
    from llmkit.finetuning.arguments import SFTArguments
    from llmkit.finetuning.conversations import ConversationArguments, SourceArguments
    from llmkit.finetuning.preference_arguments import DPOArguments, PreferenceModelArguments
    from llmkit.model.arguments import ModelArguments
    from llmkit.training.arguments import PretrainArguments

    lines = [
        "# Every key of a recipe",
        "",
        "This page is written by `make docs` from the dataclasses that a recipe fills. A key stands in a recipe's",
        "YAML file as `key: value`, or on the command line as `--key value`. `--key null` clears it.",
    ]
    kinds = {
        "Pretraining (`pretrain_*.yaml`)": {
            "Data": DataArguments, "Model": ModelArguments, "Training": PretrainArguments
        },
        "Fine-tuning (`sft_qlora_*.yaml`)": {
            "Data": ConversationArguments, "Model and adapter": AdapterArguments, "Training": SFTArguments
        },
        "Preference tuning (`dpo_qlora_*.yaml`)": {
            "Data": SourceArguments, "Model and adapter": PreferenceModelArguments, "Training": DPOArguments
        },
    }  # fmt: skip
    for title, subjects in kinds.items():
        lines += ["", f"## {title}"]
        for subject, arguments in subjects.items():
            lines += ["", f"### {subject}", "", "| key | default | |", "|---|---|---|", *own_keys(arguments)]
        refused = subjects["Training"].REFUSED
        inherited = [field for field in dataclasses.fields(subjects["Training"]) if field.name not in ours(arguments)]
        lines += [
            "",
            "### Inherited from Trainer",
            "",
            "These do what the documentation of transformers (and of TRL, in",
        ]
        lines += ["fine-tuning) says:", ""]
        lines += [", ".join(f"`{f.name}` ({default_of(f)})" for f in inherited if f.name not in refused) + "."]
        lines += ["", "These are refused:", "", "| key | reason |", "|---|---|"]
        lines += [f"| `{name}` | {reason} |" for name, reason in sorted(refused.items())]
    return "\n".join(lines) + "\n"


def ours(arguments: type) -> set[str]:
    """The fields that a class of llmkit declares, new ones and those with another default."""
    classes = [each for each in arguments.__mro__ if each.__module__.startswith("llmkit")]
    return {name for each in classes for name in vars(each).get("__annotations__", {})}


def own_keys(arguments: type) -> Iterator[str]:
    refused = getattr(arguments, "REFUSED", {})
    for field in dataclasses.fields(arguments):
        if field.name in ours(arguments) and field.name not in refused:
            text = field.metadata.get("help", "")
            yield f"| `{field.name}` | {default_of(field)} | {text} |".replace("|  |", "| |")


def default_of(field: dataclasses.Field) -> str:
    value = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    value = getattr(value, "value", value)  # of an enum
    if isinstance(value, bool):
        return str(value).lower()
    return "none" if value in (None, "", [], {}) else str(value)


def main() -> None:
    texts = {page: current(page) for page in PAGES if page != REFERENCE} | {REFERENCE: reference()}
    stale = {page: text for page, text in texts.items() if not page.exists() or page.read_text("utf-8") != text}
    if "--check" in sys.argv:
        sys.exit(f"stale, run `make docs`: {', '.join(page.name for page in stale)}" if stale else 0)
    for page, text in stale.items():
        page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
