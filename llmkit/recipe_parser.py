"""How a recipe is read: a flat YAML file, and the command line over it."""

import argparse
import difflib
import json
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import yaml

from llmkit.errors import UserError
from llmkit.recipe_fields import module_alone

if TYPE_CHECKING:
    from transformers import HfArgumentParser
else:
    HfArgumentParser = module_alone("transformers.hf_argparser").HfArgumentParser

# Fields of TrainingArguments that hold a secret: `ps` shows command lines, and wandb and the run's log keep them.
SECRETS = ("hub_token",)


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML takes the last of two equal keys without a word; this says so."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise UserError(f"{self.name}, line {key_node.start_mark.line + 1}: key {key!r} stands there twice")
            seen.add(key)
        return super().construct_mapping(node, deep)


class RecipeParser(HfArgumentParser):
    """Reads a recipe: `--config FILE.yaml`, and any field as `--field value`, which wins over the file.

    A YAML value is read as if it stood on the command line, so that both know the same types: `6e-4` is a number
    (plain YAML calls it text), and `max_steps: many` is an error that names the file and the key. `null` gives a field
    its default, in the file and on the command line.

    A dataclass may have a class attribute `REPLACES`, as in `{"preset": ("n_layer", "n_head")}`: a preset on the
    command line takes the place of an `n_layer` in the file.

    Args:
        dataclass_types: the dataclasses to fill.
        default_config: the file that is read where no `--config` is given.
    """

    def __init__(self, dataclass_types, default_config: Path | str):
        super().__init__(dataclass_types, allow_abbrev=False)
        self.replaces = {
            name: keys for kind in dataclass_types for name, keys in getattr(kind, "REPLACES", {}).items()
        }
        self.add_argument("--config", default=str(default_config), help="recipe to run, a YAML file")
        self.source = ""

    def error(self, message: str):
        name, _, rest = message.removeprefix("argument ").partition(": ")
        name = name.split("/")[0]  # argparse knows each as --some_name/--some-name
        raise UserError(f"{self.source}{name}: {rest}" if rest else self.source + message)

    def parse(self, argv: list[str]) -> tuple:
        """The filled dataclasses, in the order of `dataclass_types`.

        Raises:
            UserError: an unknown or repeated key, a value of the wrong type, an unreadable file.
        """
        option = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        option.add_argument("--config", default=self.get_default("config"))
        option.error = self.error
        config = option.parse_known_args(argv)[0].config
        from_file = self._check_file(config)
        for name in SECRETS:
            if name in from_file or _stands_in(name, argv):
                raise UserError(
                    f"{name} is not taken from a recipe or a command line, where others could read it: log in once "
                    "with `hf auth login`, or set the environment variable HF_TOKEN"
                )
        argv, replaced = _without_nulls(argv)
        for key in replaced:
            if all(f"--{key}" not in action.option_strings for action in self._actions):
                self._refuse_unknown(f"--{key}")
        replaced |= {key for name in self.replaces if _stands_in(name, argv) for key in self.replaces[name]}
        file_argv = [text for key, value in from_file.items() if key not in replaced for text in _as_argv(key, value)]
        # The file alone, so that what is wrong in it is said of it; then the command line after it, which so wins.
        self.source = f"{config}: "
        self.parse_args(file_argv)
        self._check_texts(file_argv)
        self.source = ""
        self._check_texts(argv)
        if unknown := self.parse_known_args(argv)[1]:
            self._refuse_unknown(unknown[0])
        try:
            *parsed, _ = self.parse_args_into_dataclasses(file_argv + argv, look_for_args_file=False)
        except (ValueError, TypeError, ImportError, OSError) as error:
            raise UserError(str(error)) from error  # what transformers refuses
        return tuple(parsed)

    def _check_file(self, config: str) -> dict:
        content = _read_yaml(config)
        # private: argparse has no public list of what a parser takes.
        actions = {option: action for action in self._actions for option in action.option_strings}
        for key, value in content.items():
            if f"--{key}" not in actions or key == "config":
                self._refuse_unknown(str(key), f"{config}: ")
            if isinstance(value, list) and actions[f"--{key}"].nargs != "+":
                raise UserError(f"{config}: {key} takes one value, not a list: {value}")
        return content

    def _check_texts(self, argv: list[str]) -> None:
        """Refuse what no value can be: an empty text, and a NUL, which ends a string for the system."""
        key = ""
        for text in argv:
            key = _key(text) or key
            value = text.partition("=")[2] if text.startswith("--") and "=" in text else text
            if not value or "\0" in value:
                raise UserError(f"{self.source}{key} is {value!r}: give a value, or null for the default")

    def _refuse_unknown(self, given: str, source: str = "") -> NoReturn:
        known = [option.lstrip("-") for action in self._actions for option in action.option_strings]
        close = difflib.get_close_matches(given.split("=")[0].lstrip("-"), known, n=1)
        dashes = "--" if given.startswith("--") else ""
        hint = f"did you mean {dashes}{close[0]}?" if close else "see --help for what there is"
        raise UserError(f"{source}unknown argument {given.split('=')[0]}: {hint}")


def _stands_in(name: str, argv: list[str]) -> bool:
    return any(_key(text) == name for text in argv)


def _key(text: str) -> str | None:
    """The field that a flag such as --some-name=3 is for; None for a value."""
    return text.split("=")[0].removeprefix("--").replace("-", "_") if text.startswith("--") else None


def _without_nulls(argv: list[str]) -> tuple[list[str], set[str]]:
    """The command line without `--key null` and `--key=null`, and the keys that these clear."""
    kept: list[str] = []
    cleared: set[str] = set()
    for text in argv:
        if text == "null" and kept and (key := _key(kept[-1])) and "=" not in kept[-1]:
            kept.pop()
            cleared.add(key)
        elif (key := _key(text)) is not None and text.endswith("=null"):
            cleared.add(key)
        else:
            kept.append(text)
    return kept, cleared


def _read_yaml(path: str) -> dict:
    try:
        with open(path, encoding="utf-8") as file:
            content = yaml.load(file, _UniqueKeyLoader)
    except OSError as error:
        raise UserError(f"cannot read the recipe {path}: {error.strerror}") from error
    except UserError:
        raise
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:  # as of dates, lists as keys, depth
        raise UserError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: a recipe is a list of `key: value` lines")
    return content


def _as_argv(key, value) -> list[str]:
    if value is None:
        return []
    if isinstance(value, dict):
        return [f"--{key}", json.dumps(value)]
    if isinstance(value, list):
        items = [json.dumps(item) if isinstance(item, dict) else str(item) for item in value]
        return [f"--{key}", *items] if items else []
    return [f"--{key}={value}"]
