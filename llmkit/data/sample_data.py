"""The embedded data, which needs no download: the Python standard library's own sources and docstrings."""

import ast
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path

# Folders that are no good to learn Python from. What is left is about 10 MB of code written by people.
_LEFT_OUT = {
    "site-packages",  # not the standard library
    "dist-packages",
    "__pycache__",
    "test",  # as long as all the rest together, and its files are full of odd literals and encodings
    "tests",
    "idle_test",
    "encodings",  # generated: 120 tables of 256 lines each
    "pydoc_data",  # generated: the language reference as one dictionary of strings
}


def stdlib_sources() -> list[Path]:
    """The standard library's `.py` files on this machine, without its tests and generated tables, in a fixed order.

    Also left out are empty files and the build settings, which differ from one machine to the next.
    """
    # Of the interpreter that a virtual environment was made from: the environment holds no standard library.
    root = Path(sysconfig.get_path("stdlib"))
    return sorted(
        path
        for path in root.rglob("*.py")
        if _LEFT_OUT.isdisjoint(path.relative_to(root).parts)
        and not path.relative_to(root).parts[0].startswith(("_sysconfigdata", "_sysconfig_vars", "config-"))
        and path.stat().st_size > 0
    )


def docstring_conversations() -> Iterator[str]:
    """Questions about the standard library, answered by its docstrings, as guanaco writes conversations.

    Functions and classes without an underscore that have a docstring. Those with a short signature get a second turn
    that asks how to call them.
    """
    root = Path(sysconfig.get_path("stdlib"))
    for path in stdlib_sources():
        module = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
        if any(part.startswith("_") for part in module.split(".")):
            continue
        for name, node in _public_definitions(ast.parse(path.read_bytes())):
            docstring = ast.get_docstring(node) or ""
            answer = " ".join(docstring.split("\n\n")[0].split())
            if not 20 <= len(answer) <= 300:
                continue
            text = f"### Human: What does {module}.{name} do?### Assistant: {answer}"
            if isinstance(node, ast.FunctionDef) and len(signature := ast.unparse(node.args)) <= 80:
                call = f"{name.split('.')[-1]}({signature})"
                text += f"### Human: How do I call it?### Assistant: `{call}`"
            yield text


def docstring_preferences(answered: Sequence[tuple[str, str]]) -> Iterator[tuple[str, str, str]]:
    """Questions about the standard library with the answer that is preferred and one that is not.

    The preferred one is the docstring. The others are, in turn, for each question:

    - the docstring of another function;
    - the docstring cut short in its middle;
    - the docstring without its end: another one follows in the same answer.

    Args:
        answered: questions and docstrings. What is rejected comes from these alone, so that held-out docstrings are
            not seen where they are not among them.

    Yields:
        (question, preferred answer, other answer).
    """
    half = len(answered) // 2
    for i, (question, answer) in enumerate(answered):
        other, following = answered[i - half][1], answered[i - 1][1]
        words = answer.split()
        for rejected in (other, " ".join(words[: len(words) // 2]), f"{answer} {following}"):
            if rejected and rejected != answer:
                yield question, answer, rejected


def _public_definitions(tree: ast.Module) -> Iterator[tuple[str, ast.FunctionDef | ast.ClassDef]]:
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            yield node.name, node
            members = node.body if isinstance(node, ast.ClassDef) else []
            for member in members:
                if isinstance(member, ast.FunctionDef) and not member.name.startswith("_"):
                    yield f"{node.name}.{member.name}", member
