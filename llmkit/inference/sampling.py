"""How the tokens of a text are chosen, and where it ends. Imports no torch: mistakes are answered at once."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmkit.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEFAULT_NEW_TOKENS = 128
LOWEST_TEMPERATURE = 1e-4  # logits divided by less than about 1e-36 are no longer finite in float32


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen, and where a text ends besides at the model's end token.

    Args:
        max_new_tokens: None is 128, or as many as still fit the context if those are fewer.
        temperature: divides the logits; 0 always takes the likeliest token, and top_k and top_p do nothing.
        top_k: choose among so many of the likeliest tokens only; 0 is all.
        top_p: choose among the likeliest tokens that together have this probability.
        stop: the text is cut before the first of these.
        num_samples: continuations of each prompt.

    Raises:
        UserError: a value out of its range.
    """

    max_new_tokens: int | None = None
    temperature: float = 0.8
    top_k: int = 50
    top_p: float = 1.0
    stop: Sequence[str] = ()
    num_samples: int = 1

    def __post_init__(self):
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens is {self.max_new_tokens}: give 1 or more, or leave it out")
        if self.temperature != 0 and not LOWEST_TEMPERATURE <= self.temperature < math.inf:
            raise UserError(
                f"temperature is {self.temperature}: give 0 (always the likeliest token) or a number from "
                f"{LOWEST_TEMPERATURE} on"
            )
        if self.top_k < 0:
            raise UserError(f"top_k is {self.top_k}: give a number of tokens, or 0 for all of them")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}: give a probability above 0 and up to 1")
        if "" in self.stop:
            raise UserError("stop is an empty text: give one that the model could write, or leave it out")
        if self.num_samples < 1:
            raise UserError(f"num_samples is {self.num_samples}: give 1 or more")
        if self.num_samples > 1 and self.temperature == 0:
            raise UserError(f"num_samples is {self.num_samples} and temperature 0: they would all be the same text")

    def arguments(self, tokenizer: "PreTrainedTokenizerBase") -> dict:
        """The keyword arguments that make `generate` of transformers choose its tokens this way."""
        stop = {"stop_strings": list(self.stop), "tokenizer": tokenizer} if self.stop else {}
        if self.temperature == 0:
            how = {"do_sample": False, "temperature": None, "top_k": None, "top_p": None}
        else:
            how = {"do_sample": True, "temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p}
        return {**how, **stop, "pad_token_id": tokenizer.pad_token_id}

    def cut(self, text: str) -> str:
        """The text up to the first stop text; `generate` ends with the token in which that is complete."""
        return text[: min((at for stop in self.stop if (at := text.find(stop)) >= 0), default=len(text))]
