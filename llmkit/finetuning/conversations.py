"""Conversations: where they come from, and which of their tokens are trained.

A conversation is a list of messages, `[{"role": "user", "content": ...}, {"role": "assistant", "content": ...}, ...]`.
What a model has to write is the answers and the token that ends each: exactly what follows the generation prompt of
the chat template that is saved with the tokenizer. All other tokens are read, not learned (label -100).
"""

import json
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetsError
from fsspec.core import url_to_fs
from jinja2 import TemplateError
from pyarrow import parquet
from transformers import BatchEncoding, PreTrainedTokenizerBase

from llmkit.data.sample_data import docstring_conversations
from llmkit.errors import UserError
from llmkit.finetuning.turns import Ambiguous, Malformed, Messages, check_turns, split_guanaco
from llmkit.hub_access import ask_hub_once
from llmkit.model.loss import IGNORE_INDEX
from llmkit.paths import check_names

# Guanaco's markers, with a line break before each but the first, and the end token after each answer. The generation
# prompt ends with the colon: the space belongs to an answer's first token, as byte-level BPEs split words.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if not loop.first -%}{{ "\\n" }}{%- endif -%}
{%- if message["role"] == "user" -%}{{ "### Human: " + message["content"] | trim }}
{%- elif message["role"] == "assistant" -%}{{ "### Assistant: " + message["content"] | trim + eos_token }}
{%- elif message["role"] == "system" and loop.first -%}{{ message["content"] | trim }}
{%- else -%}{{ raise_exception("the roles are user and assistant, after one system message or none") }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ "\\n### Assistant:" }}{%- endif -%}"""

# What belongs to a source of conversations: a recipe's prompts are questions such as that source has.
SOURCE = ("data_files", "dataset_name", "dataset_config", "dataset_split", "validation_split", "text_column")
SOURCE += ("sample_prompts",)


@dataclass
class SourceArguments:
    """Where the rows come from. With no source given: the docstrings of the standard library."""

    # A source on the command line takes the place of the one in the recipe's file, with all that belongs to it.
    REPLACES: ClassVar[Mapping[str, tuple[str, ...]]] = {"data_files": SOURCE, "dataset_name": SOURCE}

    data_files: list[str] | None = field(
        default=None, metadata={"help": "Paths, globs or URLs of .jsonl or .parquet files, one example a row."}
    )
    dataset_name: str | None = field(default=None, metadata={"help": "A dataset on the Hub, or a local folder."})
    dataset_config: str | None = field(
        default=None, metadata={"help": "The dataset's configuration, if it has several."}
    )
    dataset_split: str = field(default="train", metadata={"help": "The split of the dataset that is used."})
    validation_split: str | None = field(
        default=None,
        metadata={"help": "The dataset's split for validation. The default is a part of the training split."},
    )
    validation_fraction: float = field(
        default=0.02, metadata={"help": "The fraction of the training split that is held out for validation."}
    )

    def __post_init__(self):
        check_names(self, "dataset_name")
        if self.data_files and (self.dataset_name or self.validation_split):
            raise UserError(
                "data_files goes without dataset_name and validation_split: validation is a part of the files"
            )
        if not 0 < self.validation_fraction < 1:
            raise UserError(f"validation_fraction={self.validation_fraction}: must be between 0 and 1")


@dataclass
class ConversationArguments(SourceArguments):
    """Where the conversations come from, and which column of theirs holds text."""

    text_column: str = field(
        default="text",
        metadata={"help": "The column that holds guanaco's text, in rows without messages and prompts."},
    )


@dataclass
class Conversations:
    """The well-formed conversations of a source, and why its other rows are not among them."""

    NOUN: ClassVar[str] = "conversation"

    description: str
    rows: list[Messages] = field(default_factory=list)
    malformed: Counter[str] = field(default_factory=Counter)
    ambiguous: list[str] = field(default_factory=list)  # texts of those whose turns cannot be told

    def require_rows(self) -> None:
        """Refuse to go on without a conversation.

        Raises:
            UserError: there is none.
        """
        if not self.rows:
            reasons = "; ".join(f"{count} rows: {why}" for why, count in self.malformed.most_common())
            raise UserError(f"{self.description}: not one {self.NOUN} ({reasons or 'no rows'})")

    def add(self, row: object, parse: Callable[[dict], Any]) -> None:
        """Parse one row; where it is no conversation, count it by its reason."""
        try:
            if not isinstance(row, dict):
                raise Malformed("a line that is not a JSON object")
            self.rows.append(parse(row))
        except Malformed as error:
            self.malformed[str(error)] += 1
            if isinstance(error, Ambiguous):
                self.ambiguous.append(error.text)


# ------------------------------------------------------------------ reading


def load_conversations(args: ConversationArguments) -> tuple[Conversations, Conversations]:
    """Read the conversations for training and for validation.

    Raises:
        UserError: no such source, split or column, or not one row that can be used.
    """
    train = _read_split(args, args.dataset_split)
    if args.dataset_name and args.validation_split:
        return train, _read_split(args, args.validation_split)
    return hold_out(train, args.validation_fraction)


C = TypeVar("C", bound=Conversations)


def hold_out(conversations: C, fraction: float, group: Callable[[Any], str] | None = None) -> tuple[C, C]:
    """Split off a fraction of the conversations, evenly spaced: the same ones on every machine, and from all parts of
    a source that is sorted in some way. What was malformed stays with the first part.

    Args:
        group: of a row; rows of one group stay together, and the fraction is one of the groups. Default: each row is
            one.

    Raises:
        UserError: too few to hold out one.
    """
    rows, exact = conversations.rows, Fraction(str(fraction))
    numbers: dict = {}
    number_of = [numbers.setdefault(group(row) if group else i, len(numbers)) for i, row in enumerate(rows)]
    is_held_out = [int((i + 1) * exact) > int(i * exact) for i in number_of]
    held_out = [row for row, out in zip(rows, is_held_out, strict=True) if out]
    if not held_out:
        what = f"prompts of {conversations.NOUN}s" if group else f"{conversations.NOUN}s"
        raise UserError(
            f"{len(numbers)} {what} are too few to hold out validation_fraction={fraction}: give more of them, or "
            f"raise it to {1 / len(numbers):.2g}"
        )
    conversations.rows = [row for row, out in zip(rows, is_held_out, strict=True) if not out]
    return conversations, type(conversations)(conversations.description, held_out)


def _read_split(args: ConversationArguments, split: str) -> Conversations:
    rows, description = read_source(args, split)
    columns = dict.fromkeys(column for row in rows if isinstance(row, dict) for column in row)
    return read_rows(rows, row_parser(list(columns), args.text_column), Conversations(description))


def read_source(args: SourceArguments, split: str) -> tuple[Iterable[object], str]:
    """The rows of the files, of the dataset's split, or of the embedded conversations, and what to call them.

    Raises:
        UserError: no such source or split.
    """
    if args.data_files:
        rows = [row for path in args.data_files for row in _read_file(path)]
        return rows, ", ".join(Path(path).name for path in args.data_files)
    if args.dataset_name:
        if not Path(args.dataset_name).exists():
            ask_hub_once()
        try:
            rows = load_dataset(args.dataset_name, args.dataset_config, split=split)
        except (DatasetsError, ValueError, OSError) as error:
            raise UserError(f"{args.dataset_name}: {error}") from error
        return rows, f"{Path(args.dataset_name).name}, split {split}"
    return [{"text": text} for text in docstring_conversations()], "stdlib docstrings"


def _read_file(pattern: str) -> Iterator[object]:
    """The rows of the files that a path, a glob or a URL stands for; of JSON, what each line holds, or None where it
    is no JSON.

    Raises:
        UserError: no such file, or not one of these kinds.
    """
    try:
        files, path = url_to_fs(pattern)  # expands ~ as well
        # A name that happens to look like a glob is the file of that name if there is one.
        paths = [path] if files.isfile(path) else sorted(found for found in files.glob(path) if files.isfile(found))
        if not paths:
            raise UserError(f"data_files: there is no file {pattern}: check the path")
        for path in paths:
            with files.open(path, "rb", compression="infer") as file:
                if path.endswith(".parquet"):
                    for batch in parquet.ParquetFile(file).iter_batches():
                        yield from batch.to_pylist()
                else:
                    yield from (_parse_json(line) for line in file if line.strip())
    except UserError:
        raise
    except (ValueError, OSError, EOFError, zlib.error, ImportError) as error:
        raise UserError(f"data_files: {pattern} cannot be read: {error}") from error


def _parse_json(line: bytes) -> object:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def row_parser(columns: list[str], text_column: str = "text") -> Callable[[dict], Messages]:
    """What turns a row into a conversation: by its columns it is chat messages, prompt and completion, or guanaco.

    Raises:
        UserError: none of them is there.
    """
    if "messages" in columns:
        return lambda row: check_turns(row.get("messages"))
    if "prompt" in columns and "completion" in columns:
        return lambda row: check_turns(
            as_messages(row.get("prompt"), "user") + as_messages(row.get("completion"), "assistant")
        )
    if text_column in columns or not columns:
        return lambda row: split_guanaco(row.get(text_column))
    raise UserError(
        f"no column 'messages', 'prompt' and 'completion', or {text_column!r} (set text_column to the one that holds "
        f"guanaco text): there is {', '.join(columns)}"
    )


def as_messages(value: object, role: str) -> Messages:
    """A text as one message of a role; messages as they are.

    Raises:
        Malformed: it is neither.
    """
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    if not isinstance(value, list):
        raise Malformed("a prompt or a completion that is neither text nor messages")
    return value


def read_rows(rows: Iterable[object], parse: Callable[[dict], object], into: C) -> C:
    """Add the rows to `into`; those that are no conversations are counted by reason.

    Raises:
        UserError: not one row is a conversation.
    """
    for row in rows:
        into.add(row, parse)
    into.require_rows()
    return into


# ------------------------------------------------------------------ tokens


def add_chat_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Give a tokenizer without a chat template ours, and a beginning-of-text token where it adds one to texts."""
    if tokenizer.chat_template is None:
        starts_with_bos = tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
        tokenizer.chat_template = ("{{- bos_token -}}" if starts_with_bos else "") + CHAT_TEMPLATE


def encode(messages: Messages, tokenizer: PreTrainedTokenizerBase) -> dict[str, list[int]]:
    """Token ids of a conversation, and labels: the ids of what the model has to write, -100 elsewhere.

    An answer starts where the generation prompt ends, token by token, and goes up to its end token. So what is trained
    is what generation is asked for, whatever the template; one that renders a conversation's start in another way
    once the conversation goes on is refused.

    Raises:
        Malformed: the text holds a special token, or the template rewrites earlier turns.
    """
    if any(token in message["content"] for token in tokenizer.all_special_tokens for message in messages):
        raise Malformed("the text holds a special token")
    ids = _render(messages, tokenizer)
    labels = [IGNORE_INDEX] * len(ids)
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = _render(messages[:i], tokenizer, add_generation_prompt=True)
        turn = ids if i + 1 == len(messages) else _render(messages[: i + 1], tokenizer)
        if ids[: len(prompt)] != prompt or ids[: len(turn)] != turn:
            raise Malformed("the chat template renders a turn differently once the conversation goes on")
        start, end = len(prompt), len(turn)
        # A line break after the end token, as in ChatML, comes too late to be written by the model.
        while end > start and ids[end - 1] != tokenizer.eos_token_id:
            end -= 1
        end = end if end > start else len(turn)
        labels[start:end] = ids[start:end]
    return {"input_ids": ids, "labels": labels}


def _render(messages: Messages, tokenizer: PreTrainedTokenizerBase, add_generation_prompt: bool = False) -> list[int]:
    try:
        encoded = tokenizer.apply_chat_template(
            messages,
            add_generation_prompt=add_generation_prompt,
            return_dict=True,
            tokenizer_kwargs={"verbose": False},  # long ones are cut later, which the audit counts
        )
    except TemplateError as error:
        raise Malformed(f"the chat template refuses the conversation ({error})") from error
    assert isinstance(encoded, BatchEncoding), "with return_dict"
    return encoded["input_ids"]


def encode_all(
    conversations: Conversations, tokenizer: PreTrainedTokenizerBase, encode: Callable[..., dict] = encode
) -> Dataset:
    """All conversations as rows of token ids; counts those that cannot be encoded as malformed.

    Args:
        encode: what makes a row of one.
    """
    rows, kept = [], []
    for messages in conversations.rows:
        try:
            rows.append(encode(messages, tokenizer))
            kept.append(messages)
        except Malformed as error:
            conversations.malformed[str(error)] += 1
    conversations.rows = kept
    conversations.require_rows()
    return Dataset.from_list(rows)
