"""Conversations: where they come from, how text becomes turns, and which of its tokens are trained.

A conversation is a list of messages, `[{"role": "user", "content": ...}, {"role": "assistant", "content": ...}, ...]`.
What a model has to write is the answers and the token that ends each: exactly what follows the generation prompt of
the chat template that is saved with the tokenizer. All other tokens are read, not learned (label -100).
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetsError
from transformers import PreTrainedTokenizerBase

from llmkit.data.sample_data import docstring_conversations
from llmkit.errors import UserError
from llmkit.model.loss import IGNORE_INDEX

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

Messages = list[dict[str, str]]


@dataclass
class ConversationArguments:
    """Where the conversations come from. With no source given: the docstrings of the standard library."""

    data_files: list[str] | None = field(
        default=None, metadata={"help": "Paths or globs of .jsonl or .parquet files, one conversation a row."}
    )
    dataset_name: str | None = field(default=None, metadata={"help": "A dataset on the Hub, or a local folder."})
    dataset_config: str | None = field(default=None, metadata={"help": "The dataset's configuration, if it has any."})
    dataset_split: str = field(default="train", metadata={"help": "The split that is trained on."})
    validation_split: str | None = field(
        default=None, metadata={"help": "The dataset's split for validation; by default a part of the training split."}
    )
    validation_fraction: float = field(default=0.02, metadata={"help": "That part."})
    text_column: str = field(
        default="text", metadata={"help": "The column of guanaco text, where there are no messages and no prompts."}
    )


class Malformed(ValueError):
    """A row that is not trained on; the message is the reason, the same for all rows of that kind."""


@dataclass
class Conversations:
    """The well-formed conversations of a source, and why its other rows are not among them."""

    description: str
    rows: list[Messages] = field(default_factory=list)
    malformed: Counter[str] = field(default_factory=Counter)


# ------------------------------------------------------------------ reading


def load_conversations(args: ConversationArguments) -> tuple[Conversations, Conversations]:
    """Read the conversations for training and for validation.

    Raises:
        UserError: no such source, split or column, or not one row that can be used.
    """
    if args.data_files and (args.dataset_name or args.validation_split):
        raise UserError("data_files goes without dataset_name and validation_split: validation is a part of the files")
    if not 0 < args.validation_fraction < 1:
        raise UserError(f"validation_fraction={args.validation_fraction}: must be between 0 and 1")
    train = _read_split(args, args.dataset_split)
    if args.dataset_name and args.validation_split:
        return train, _read_split(args, args.validation_split)
    # Every n-th row: the same ones on every machine, and from all parts of a source that is sorted in some way.
    every = max(2, round(1 / args.validation_fraction))
    validation = Conversations(train.description, train.rows[every - 1 :: every])
    if not validation.rows:
        raise UserError(f"{len(train.rows)} conversations are too few to hold out one in {every}: give more")
    del train.rows[every - 1 :: every]
    return train, validation


def _read_split(args: ConversationArguments, split: str) -> Conversations:
    if not args.data_files and not args.dataset_name:
        return read_rows(
            ({"text": text} for text in docstring_conversations()), row_parser(["text"]), "stdlib docstrings"
        )
    source = args.dataset_name or ", ".join(args.data_files)
    try:
        if args.dataset_name:
            dataset = load_dataset(args.dataset_name, args.dataset_config, split=split)
        else:
            kind = "parquet" if args.data_files[0].endswith(".parquet") else "json"
            dataset = load_dataset(kind, data_files=args.data_files, split="train")
    except (DatasetsError, ValueError, OSError) as error:
        raise UserError(f"{source}: {error}") from error
    return read_rows(
        dataset, row_parser(dataset.column_names, args.text_column), f"{Path(source).name}, split {split}"
    )


def row_parser(columns: list[str], text_column: str = "text") -> Callable[[dict], Messages]:
    """What turns a row into a conversation: by its columns it is chat messages, prompt and completion, or guanaco.

    Raises:
        UserError: none of them is there.
    """
    if "messages" in columns:
        return lambda row: check_turns(row["messages"])
    if "prompt" in columns and "completion" in columns:
        return lambda row: check_turns(
            _as_messages(row["prompt"], "user") + _as_messages(row["completion"], "assistant")
        )
    if text_column in columns:
        return lambda row: split_guanaco(row[text_column])
    raise UserError(
        f"no column 'messages', 'prompt' and 'completion', or {text_column!r} (set text_column to the one that holds "
        f"guanaco text): there is {', '.join(columns)}"
    )


def _as_messages(value: str | Messages, role: str) -> Messages:
    return [{"role": role, "content": value}] if isinstance(value, str) else list(value or [])


def read_rows(rows: Iterable[dict], parse: Callable[[dict], Messages], description: str) -> Conversations:
    """The rows as conversations; those that are none are counted by reason.

    Raises:
        UserError: not one row is a conversation.
    """
    conversations = Conversations(description)
    for row in rows:
        try:
            conversations.rows.append(parse(row))
        except Malformed as error:
            conversations.malformed[str(error)] += 1
    if not conversations.rows:
        reasons = "; ".join(f"{count} rows: {why}" for why, count in conversations.malformed.most_common())
        raise UserError(f"{description}: not one conversation ({reasons or 'no rows'})")
    return conversations


# ------------------------------------------------------------------ turns

_MARKER = re.compile(r"(?<!#)### (Human|Assistant):")

# Where a marker is quoted and starts no turn. Guanaco writes turns without a separator, so that a real marker may
# follow a quotation mark or a code fence at once: a span counts as quoted only if it both opens and closes.
_QUOTED = re.compile(
    r"""
      (?P<code> ```(?:(?!```).)*?\n[ \t]*```(?!\w) )         # a fenced block, closed at the start of a line
    | (?P<inline> (?<!`)`(?![`\s])[^`\n]*(?<!\s)`(?!`) )     # `inline code`
    | (?<![^\s(\[{>:])"(?!\s)[^"\n]*(?<!\s)"(?!\w)          # a "quotation" within a line, in either kind of marks
    | “[^“”\n]*”
    | ^[ \t]*>[> \t]*\#\#\#[ ](?:Human|Assistant):[^\n]*   # a quoted line
    """,
    re.VERBOSE | re.DOTALL | re.MULTILINE,
)


def split_guanaco(text: str | None) -> Messages:
    """Split `### Human: ... ### Assistant: ...` into turns, of which there may be many.

    Markers in code, quotation marks or quoted lines belong to the text around them. A last question without an
    answer is left out: there is nothing to learn from it.

    Raises:
        Malformed: the turns are not Human, Assistant, Human, ... from the start on, or one of them is empty.
    """
    text = text or ""
    quoted = [match for match in _QUOTED.finditer(text) if _MARKER.search(match.group())]
    if any(match["code"] for match in quoted) and text.count("```") % 2:
        raise Malformed("a marker near a code block that is not closed")
    markers = [
        match
        for match in _MARKER.finditer(text)
        if not any(span.start() <= match.start() < span.end() for span in quoted)
    ]
    if not markers or text[: markers[0].start()].strip():
        raise Malformed("does not start with ### Human:")
    ends = [marker.start() for marker in markers[1:]] + [len(text)]
    roles = {"Human": "user", "Assistant": "assistant"}
    return check_turns(
        [
            {"role": roles[marker[1]], "content": text[marker.end() : end].strip()}
            for marker, end in zip(markers, ends, strict=True)
        ]
    )


def check_turns(messages: Messages) -> Messages:
    """The messages, if user and assistant take turns, and without a last question that has no answer.

    Raises:
        Malformed: they do not, or a turn is empty, or no answer is left.
    """
    if any(not isinstance(message.get("content"), str) or "role" not in message for message in messages or []):
        raise Malformed("a message without a role and text as its content")
    turns = [{"role": message["role"], "content": message["content"]} for message in messages or []]
    if turns and turns[-1]["role"] == "user":
        turns.pop()
    first = 1 if turns and turns[0]["role"] == "system" else 0
    if len(turns) == first:
        raise Malformed("no answer")
    if any(turn["role"] != ("user", "assistant")[i % 2] for i, turn in enumerate(turns[first:])):
        raise Malformed("user and assistant do not take turns")
    if not all(turn["content"].strip() for turn in turns[first:]):
        raise Malformed("an empty turn")
    return turns


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
    return tokenizer.apply_chat_template(
        messages,
        add_generation_prompt=add_generation_prompt,
        return_dict=True,
        tokenizer_kwargs={"verbose": False},  # long ones are cut later, which the audit counts
    )["input_ids"]


def encode_all(conversations: Conversations, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """All conversations as rows of `input_ids` and `labels`; counts those that cannot be encoded as malformed."""
    rows = []
    for messages in conversations.rows:
        try:
            rows.append(encode(messages, tokenizer))
        except Malformed as error:
            conversations.malformed[str(error)] += 1
    if not rows:
        raise UserError(f"{conversations.description}: {'; '.join(conversations.malformed)}")
    return Dataset.from_list(rows)
