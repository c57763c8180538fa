"""The kinds of recipes: which script runs one, which dataclasses its keys fill, and its `--help`.

What a recipe's file and command line say is checked against the fields as they are written before anything heavy is
imported, so that a mistake is answered at once.
"""

import importlib
import re
import sys
import textwrap
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import llmkit
from llmkit.errors import UserError
from llmkit.paths import check_names, existing_path
from llmkit.recipe_fields import WrittenField, written_dataclass, written_fields

WIDTH = 100  # of the help

# The dataclasses whose modules import no torch. All others' own checks come after the heavy imports.
LIGHT = ("llmkit.data.arguments.DataArguments", "llmkit.model.arguments.ModelArguments")
# Fields that name a file or folder, or what is on the Hub; and fields that list files.
PATHS = ("adapter", "dataset_name", "init_from", "model", "tokenizer")
FILES = ("data_files", "text_files")


@dataclass(frozen=True)
class RecipeKind:
    """A kind of recipe.

    Attributes:
        name: how the names of its files begin.
        command: the `llmkit` command that runs it.
        script: the file with its `main()`.
        dataclasses: the dotted names of those that its keys fill, in the order of `parse_recipe`.
    """

    name: str
    command: str
    script: str
    dataclasses: tuple[str, ...]

    @property
    def script_path(self) -> Path:
        return recipes_folder() / self.script


PRETRAIN = RecipeKind(
    name="pretrain",
    command="train",
    script="pretrain.py",
    dataclasses=(
        "llmkit.data.arguments.DataArguments",
        "llmkit.model.arguments.ModelArguments",
        "llmkit.training.arguments.PretrainArguments",
    ),
)
SFT = RecipeKind(
    name="sft",
    command="sft",
    script="sft_qlora.py",
    dataclasses=(
        "llmkit.finetuning.conversations.ConversationArguments",
        "llmkit.finetuning.adapters.AdapterArguments",
        "llmkit.finetuning.arguments.SFTArguments",
    ),
)
DPO = RecipeKind(
    name="dpo",
    command="prefer",
    script="dpo_qlora.py",
    dataclasses=(
        "llmkit.finetuning.conversations.SourceArguments",
        "llmkit.finetuning.preference_arguments.PreferenceModelArguments",
        "llmkit.finetuning.preference_arguments.DPOArguments",
    ),
)
KINDS = (PRETRAIN, SFT, DPO)


def recipes_folder() -> Path:
    """Where llmkit's recipes and their scripts are: within the package if it is installed, beside it in a checkout."""
    package = Path(llmkit.__file__).parent
    installed = package / "recipes"
    return installed if installed.is_dir() else package.parent / "recipes"


def recipe_path(name: str) -> Path:
    """The recipe file with this path, or the one of llmkit's own with this name, such as `pretrain_quickstart`.

    Raises:
        UserError: there is no such file.
    """
    own = recipes_folder() / f"{name}.yaml"
    return own if Path(name).name == name and own.is_file() else existing_path(name)


def kind_of(path: Path, fields: Sequence[str]) -> RecipeKind:
    """The kind of a recipe: that which its file's name begins with, else the first one that its keys fit.

    Args:
        fields: of the command line, over the file's.
    """
    for kind in KINDS:
        if path.name.startswith(f"{kind.name}_"):
            return kind
    return _other_kind(None, fields, path) or PRETRAIN


def parse_recipe(kind: RecipeKind, argv: Sequence[str], default_config: Path | str) -> tuple:
    """The filled dataclasses of a recipe. `--help` prints the fields and ends the program.

    Args:
        argv: what follows the script's name: `--config FILE.yaml`, and fields as `--field value`.
        default_config: the file that is read where no `--config` is given.

    Raises:
        UserError: an unknown or repeated key, a value of the wrong type, an unreadable file, a recipe of another kind,
            or what a dataclass refuses.
    """
    check_recipe(kind, argv, default_config)

    from llmkit.recipe_parser import RecipeParser

    modules = [name.rpartition(".") for name in kind.dataclasses]
    types = [getattr(importlib.import_module(module), name) for module, _, name in modules]
    return RecipeParser(types, default_config).parse(list(argv))


def check_recipe(kind: RecipeKind, argv: Sequence[str], default_config: Path | str) -> None:
    """Refuse what can be refused without torch: see `parse_recipe`. `--help` ends the program here."""
    if {"-h", "--help"} & set(argv):
        print(help_text(kind, everything="all" in argv))
        sys.exit(0)

    from llmkit.recipe_parser import RecipeParser
    from llmkit.training.ranges import check_ranges

    try:
        written = [written_dataclass(name) for name in kind.dataclasses]
        parsed = RecipeParser(written, default_config).parse(list(argv))
    except UserError as error:
        if other := _other_kind(kind, argv, default_config):
            raise UserError(f"{error}. This looks like a recipe for `llmkit {other.command}`") from error
        raise
    check_ranges(parsed[-1])
    for name, values in zip(kind.dataclasses, parsed, strict=True):
        _check_values(name, values)


def _check_values(dotted: str, values: object) -> None:
    """Refuse what a dataclass refuses where its module imports no torch; of any, files and folders not there."""
    given = vars(values)
    if dotted in LIGHT:
        module, _, name = dotted.rpartition(".")
        getattr(importlib.import_module(module), name)(**given)
    check_names(values, *(name for name in PATHS if name in given))
    for name in FILES:
        if given.get(name):
            from llmkit.data.files import check_there

            check_there(given[name], name)


def _other_kind(kind: RecipeKind | None, argv: Sequence[str], default_config: Path | str) -> RecipeKind | None:
    """Another kind than this one, if the recipe and its command line are right as one of that kind."""
    from llmkit.recipe_parser import RecipeParser

    for other in KINDS:
        try:
            if other is not kind:
                RecipeParser([written_dataclass(name) for name in other.dataclasses], default_config).parse(list(argv))
                return other
        except UserError:
            pass
    return None


def help_text(kind: RecipeKind, everything: bool) -> str:
    """The fields by subject: llmkit's own, or those inherited from transformers and TRL as well."""
    by_class: dict[str, list[WrittenField]] = defaultdict(list)
    for name in kind.dataclasses:
        for field in written_fields(name):
            by_class[field.owner].append(field)
    own = {owner: fields for owner, fields in by_class.items() if owner.startswith("llmkit.")}
    parts = [
        f"usage: llmkit {kind.command} RECIPE [--config_file FILE] [--num_processes N] [--FIELD VALUE ...]",
        _wrapped(
            "RECIPE is a YAML file, or the name of a recipe that comes with llmkit: "
            f"{', '.join(sorted(path.stem for path in recipes_folder().glob(f'{kind.name}_*.yaml')))}."
        ),
        _wrapped(
            "Each key of a recipe is an option, and an option wins over the recipe's key. `--FIELD null` clears a "
            "key. With --config_file (of accelerate) or --num_processes, the recipe is started by `accelerate launch`."
        ),
    ]
    for owner, fields in (by_class if everything else own).items():
        subject = re.sub("(?<=[a-z])[A-Z]", lambda m: f" {m[0].lower()}", owner.rpartition(".")[2])
        subject = subject.removesuffix(" arguments").removesuffix("Arguments")
        parts.append("\n".join([f"{subject}:", *(_option(field) for field in fields)]))
    if not everything:
        count = sum(map(len, by_class.values())) - sum(map(len, own.values()))
        parts.append(
            f"{count} more, such as learning_rate and max_steps, come from transformers and TRL: see --help all."
        )
    return "\n\n".join(parts)


def _option(field: WrittenField) -> str:
    kind = field.type.__name__ if isinstance(field.type, type) else str(field.type).removesuffix(" | None")
    default = "" if field.default in (None, [], "") else f" (default: {field.default})"
    lines = _wrapped(f"{field.metadata.get('help', '')}{default}", indent=" " * 6)
    return f"  --{field.name} {kind.replace('typing.', '')}\n{lines}"


def _wrapped(text: str, indent: str = "") -> str:
    return textwrap.fill(text, WIDTH, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)
