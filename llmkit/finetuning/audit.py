"""What a fine-tune would learn from its data, counted and shown before it starts."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from llmkit.console import shown
from llmkit.data.tokenizer import decode
from llmkit.errors import UserError
from llmkit.finetuning.conversations import Conversations
from llmkit.model.loss import IGNORE_INDEX

TRAINED, READ, PLAIN = "\033[1;32m", "\033[2m", "\033[0m"  # bold green, dim


@dataclass
class TokenCounts:
    """Counts over encoded examples, each cut at `max_length` as training cuts them."""

    examples: int
    tokens: int
    trained_tokens: int
    end_tokens: int  # trained ones
    longest: int
    truncated: int
    nothing_trained: int


def count_tokens(examples: Iterable[Sequence[int]], end_token_id: int, max_length: int) -> TokenCounts:
    """Count what is trained of examples, each given by its labels."""
    lengths, trained, ends = [], [], []
    for labels in examples:
        kept = np.asarray(labels[1:max_length])  # nothing comes before the first token that could predict it
        lengths.append(len(labels))
        trained.append(int((kept != IGNORE_INDEX).sum()))
        ends.append(int((kept == end_token_id).sum()))
    return TokenCounts(
        examples=len(lengths),
        tokens=sum(min(length, max_length) for length in lengths),
        trained_tokens=sum(trained),
        end_tokens=sum(ends),
        longest=max(lengths),
        truncated=sum(length > max_length for length in lengths),
        nothing_trained=trained.count(0),
    )


@dataclass
class Audit(TokenCounts):
    """What would be trained of the encoded conversations."""

    source: str
    answers: int
    malformed: dict[str, int]
    ambiguous: list[str]  # the texts
    max_length: int
    end_token: str

    def table(self) -> str:
        read = self.tokens - self.trained_tokens
        rows = {
            "source": self.source,
            "conversations": f"{self.examples:,}, the longest of {self.longest:,} tokens",
            "trained tokens": f"{self.trained_tokens:,} ({self.trained_tokens / max(1, self.tokens):.1%})",
            "read, not trained": f"{read:,} ({read / max(1, self.tokens):.1%})",
            "end tokens trained": f"{self.end_tokens:,} of {self.answers:,} answers ({self.end_token})",
            "cut": f"{self.truncated:,} at max_length {self.max_length:,}",
            "nothing to train": f"{self.nothing_trained:,}, left out",
            "malformed": f"{sum(self.malformed.values()):,}, left out",
        }
        details = [f"{count:,} {why}" for why, count in self.malformed.items()]
        if self.ambiguous:
            details.append(f"an ambiguous one: {_markers(self.ambiguous[0])}")
        width = max(map(len, rows))
        lines = [f"{name:>{width}}  {text}" for name, text in rows.items()]
        return "\n".join(lines + [f"{'':>{width}}    {detail}" for detail in details])

    def check_held_out(self) -> None:
        """Refuse held-out conversations that cannot be evaluated.

        Raises:
            UserError: no token of an answer is left.
        """
        if self.trained_tokens == 0:
            raise UserError(
                f"{self.source}: no answer of the {self.examples:,} held-out conversations starts within max_length "
                f"{self.max_length}, so they cannot be evaluated: raise max_length, or hold out others with "
                "validation_fraction or validation_split"
            )

    def check(self) -> None:
        """Refuse what would teach nothing, or never to stop.

        Raises:
            UserError: no token is trained, or no end token.
        """
        if self.trained_tokens == 0:
            raise UserError(
                f"{self.source}: nothing would be learned, for no answer starts within max_length {self.max_length}: "
                "raise it"
            )
        if self.end_tokens == 0:
            raise UserError(
                f"{self.source}: the end token {self.end_token} is never trained, so answers would not stop: raise "
                f"max_length ({self.max_length}) if all answers are cut, else let the chat template end an answer "
                "with the tokenizer's eos_token"
            )


def audit(conversations: Conversations, rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Audit:
    """Count what is trained in rows of `input_ids` and `labels`."""
    labels = rows.with_format("numpy")["labels"]
    return Audit(
        **vars(count_tokens(labels, tokenizer.eos_token_id, max_length)),
        source=conversations.description,
        answers=sum(message["role"] == "assistant" for messages in conversations.rows for message in messages),
        malformed=dict(conversations.malformed.most_common()),
        ambiguous=conversations.ambiguous,
        max_length=max_length,
        end_token=tokenizer.eos_token,
    )


def _markers(text: str) -> str:
    """The surroundings of each marker, on one line and with what is not printable escaped."""
    places = [marker.span() for marker in re.finditer("### (?:Human|Assistant):", text)]
    return " ... ".join(repr(text[max(0, start - 24) : end + 16]) for start, end in places)


def show_tokens(row: dict, tokenizer: PreTrainedTokenizerBase, color: bool) -> str:
    """One example token by token: `|` between tokens, trained ones green (or in [[ ]] without color), others dim."""
    before, between, after = (TRAINED, READ, PLAIN) if color else ("[[", "]]", "")
    text, was_trained = "" if not color else READ, False
    for piece, label in _pieces(row, tokenizer):
        trained = label != IGNORE_INDEX
        if trained != was_trained:
            text += before if trained else between
        elif text:
            text += "|"
        text += shown(piece)
        was_trained = trained
    return text + ((after or between) if color or was_trained else "")


def _pieces(row: dict, tokenizer: PreTrainedTokenizerBase):
    """The text and label of each token; tokens that only together make a character come as one."""
    pending: list[int] = []
    for token, label in zip(row["input_ids"], row["labels"], strict=True):
        pending.append(token)
        text = decode(tokenizer, pending, clean_up_tokenization_spaces=False)
        if "\ufffd" not in text:
            yield text, label
            pending = []
    if pending:
        yield decode(tokenizer, pending, clean_up_tokenization_spaces=False), row["labels"][-1]
