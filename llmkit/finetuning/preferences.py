"""Preference pairs: a prompt, the answer that is preferred, and one that is not.

TRL's preference formats are read: a prompt with two answers, or two whole conversations that differ in their last
answer, each as text or as messages. Prompt and answers are rendered by the tokenizer's chat template, as SFT renders
them, and an answer ends with the token that SFT has trained to end it.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, TypedDict

from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl import extract_prompt

from llmkit.data.sample_data import docstring_preferences
from llmkit.finetuning.conversations import (
    ConversationArguments,
    Conversations,
    SourceArguments,
    as_messages,
    encode,
    encode_all,
    hold_out,
    load_conversations,
    read_rows,
    read_source,
)
from llmkit.finetuning.turns import Malformed, Messages, check_turns
from llmkit.model.loss import IGNORE_INDEX


class Pair(TypedDict):
    """The messages up to the user's last one, and two answers to it."""

    prompt: Messages
    chosen: str
    rejected: str


_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):[ ]?")  # of texts as those of Anthropic's HH-RLHF
_ROLES = {"Human": "user", "Assistant": "assistant"}


@dataclass
class Pairs(Conversations):
    """The well-formed pairs of a source, and why its other rows are not among them."""

    NOUN: ClassVar[str] = "preference pair"

    rows: list[Pair] = field(default_factory=list)


def load_pairs(args: SourceArguments) -> tuple[Pairs, Pairs]:
    """Read the pairs for training and for validation. All pairs of one prompt are on the same side.

    With no source given, the pairs are made from the standard library's docstrings, and no function or docstring that
    SFT trains on is among the held-out ones.

    Raises:
        UserError: no such source or split, or not one row that can be used.
    """
    if not (args.data_files or args.dataset_name):
        return _load_docstring_pairs(args.validation_fraction)
    train = read_rows(*_source(args, args.dataset_split))
    if args.dataset_name and args.validation_split:
        return train, read_rows(*_source(args, args.validation_split))
    return hold_out(train, args.validation_fraction, group=lambda pair: str(pair["prompt"]))


def _source(args: SourceArguments, split: str):
    rows, description = read_source(args, split)
    return rows, parse_pair, Pairs(description)


def _load_docstring_pairs(validation_fraction: float) -> tuple[Pairs, Pairs]:
    """Pairs of the functions that SFT trains on, and of those that it holds out.

    Some functions have the same docstring. A held-out function whose docstring SFT has trained under another name is
    left out, so that no preferred answer of the held-out pairs was ever trained.
    """
    train, held_out = load_conversations(ConversationArguments(validation_fraction=validation_fraction))
    trained = {messages[1]["content"] for messages in train.rows}
    held_out.rows = [messages for messages in held_out.rows if messages[1]["content"] not in trained]
    return _docstring_pairs(train), _docstring_pairs(held_out)


def _docstring_pairs(conversations: Conversations) -> Pairs:
    asked = [(messages[0]["content"], messages[1]["content"]) for messages in conversations.rows]
    rows: list[Pair] = [
        {"prompt": [{"role": "user", "content": question}], "chosen": chosen, "rejected": rejected}
        for question, chosen, rejected in docstring_preferences(asked)
    ]
    return Pairs("stdlib docstrings, preferred", rows)


# ------------------------------------------------------------------ reading


def parse_pair(row: dict) -> Pair:
    """A row in one of TRL's formats as a pair.

    Raises:
        Malformed: an answer is missing, empty or the same as the other, or the answers are to different prompts.
    """
    chosen, rejected, prompt = row.get("chosen"), row.get("rejected"), row.get("prompt")
    if chosen is None or rejected is None:
        raise Malformed("no chosen or no rejected answer")
    if prompt is None and isinstance(chosen, str) and isinstance(rejected, str):
        prompt, chosen, rejected = _split_texts(chosen, rejected)
    chosen, rejected = (check_turns(_conversation(prompt, answer)) for answer in (chosen, rejected))
    if chosen[:-1] != rejected[:-1]:
        raise Malformed("the answers are to different prompts")
    if chosen[-1]["content"].strip() == rejected[-1]["content"].strip():
        raise Malformed("equal answers")
    return {"prompt": chosen[:-1], "chosen": chosen[-1]["content"], "rejected": rejected[-1]["content"]}


def _conversation(prompt: object, answer: object) -> Messages:
    """Prompt and answer as one conversation. An answer that begins with the user's turn is one already."""
    messages = as_messages(answer, "assistant")
    last = messages[-1] if messages and isinstance(messages[-1], dict) else {}
    if last.get("role") != "assistant" or not str(last.get("content") or "").strip():
        raise Malformed("an empty answer")
    if isinstance(messages[0], dict) and messages[0].get("role") in ("system", "user"):
        return messages
    if prompt is None:
        raise Malformed("no prompt")
    return as_messages(prompt, "user") + messages


def _split_texts(chosen: str, rejected: str) -> tuple[Messages | str, Messages | str, Messages | str]:
    """Prompt and answers of two texts that begin with the prompt."""
    if _TURN.match(chosen) and _TURN.match(rejected):
        return "", _turns(chosen), _turns(rejected)
    parts = extract_prompt({"chosen": chosen, "rejected": rejected})
    # pyrefly: ignore[bad-return]  of texts the parts are texts
    return parts["prompt"], parts["chosen"], parts["rejected"]


def _turns(text: str) -> Messages:
    _, *parts = _TURN.split(text)
    return [
        {"role": _ROLES[role], "content": content.strip()}
        for role, content in zip(parts[::2], parts[1::2], strict=True)
    ]


# ------------------------------------------------------------------ tokens


def encode_pair(pair: Pair, tokenizer: PreTrainedTokenizerBase) -> dict[str, list[int]]:
    """`prompt_ids`, and `chosen_ids` and `rejected_ids`, which end with the end token: what a model has to write.

    Raises:
        Malformed: as `encode`.
    """
    row = {}
    for answer in ("chosen", "rejected"):
        encoded = encode([*pair["prompt"], {"role": "assistant", "content": pair[answer]}], tokenizer)
        end = max(i for i, label in enumerate(encoded["labels"]) if label != IGNORE_INDEX) + 1
        start = end - 1
        while encoded["labels"][start - 1] != IGNORE_INDEX:  # earlier answers are apart: a question stands between
            start -= 1
        row["prompt_ids"] = encoded["input_ids"][:start]
        row[f"{answer}_ids"] = encoded["input_ids"][start:end]
    return row


def encode_pairs(pairs: Pairs, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """All pairs as rows of token ids; counts those that cannot be encoded as malformed."""
    return encode_all(pairs, tokenizer, encode_pair)


def can_be_compared(row: dict[str, Sequence[int]], max_length: int) -> bool:
    """Whether the answers still differ where the row is cut: else the pair has nothing to teach."""
    room = max_length - len(row["prompt_ids"])
    return room > 0 and row["chosen_ids"][:room] != row["rejected_ids"][:room]
