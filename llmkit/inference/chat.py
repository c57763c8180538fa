"""A conversation with a fine-tuned model, in its chat template and with its KV cache."""

import itertools
import signal
from collections.abc import Callable

import torch
from jinja2 import TemplateError
from transformers import (
    BatchEncoding,
    DynamicCache,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.cache_utils import DynamicLayer

from llmkit.data.tokenizer import decode
from llmkit.errors import UserError
from llmkit.inference.generation import PieceStreamer
from llmkit.inference.sampling import DEFAULT_NEW_TOKENS, Sampling
from llmkit.model.opening import context_length


class Interrupt(StoppingCriteria):
    """While this context is open, Ctrl-C ends the generation after the token at hand, and raises nothing: the KV cache
    stays whole."""

    def __enter__(self) -> "Interrupt":
        self.received = False
        self.previous = signal.signal(signal.SIGINT, self._receive)
        return self

    def __exit__(self, *_) -> None:
        signal.signal(signal.SIGINT, self.previous)

    def _receive(self, signum, frame) -> None:
        self.received = True

    def __call__(self, input_ids: torch.LongTensor, scores, **kwargs) -> torch.BoolTensor:
        # pyrefly: ignore[bad-return]  torch calls no tensor a BoolTensor
        return torch.full((len(input_ids),), self.received, device=input_ids.device)


class Chat:
    """A conversation in the tokenizer's chat template. Keys and values of earlier turns are kept, as far as the
    template renders these turns with the same tokens again.

    Args:
        system: instructions that stand before the conversation, in templates that have a place for them.

    Raises:
        UserError: the tokenizer has no chat template, or the template has no system prompt.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        sampling: Sampling,
        system: str | None = None,
    ):
        if tokenizer.chat_template is None:
            raise UserError(
                f"{tokenizer.name_or_path}: its tokenizer has no chat template, so it was not trained to chat: "
                "`llmkit generate` continues a text with it, and recipes/sft_qlora.py teaches it to answer"
            )
        self.model = model
        self.tokenizer = tokenizer
        self.sampling = sampling
        self.instructions = [] if system is None else [{"role": "system", "content": system}]
        self._check_instructions()
        self.reset()

    def reset(self) -> None:
        """Forget everything that was said."""
        self.messages: list[dict[str, str]] = []
        self.forgotten = 0  # turns that the context had no room for
        self.cache: DynamicCache | None = None
        self.cached: list[int] = []  # the tokens whose keys and values the cache holds

    def answer(self, question: str, write: Callable[[str], None]) -> str:
        """The answer, which is handed over piece by piece as well. Ctrl-C (in the main thread) ends it early.

        Where the context gets full, the oldest turns are forgotten, until there is room for `max_new_tokens` or half
        of the context.

        Raises:
            UserError: the question alone fills the context; the conversation stays as it was.
        """
        asked = {"role": "user", "content": question}
        context, wanted = context_length(self.model.config), self.sampling.max_new_tokens or DEFAULT_NEW_TOKENS
        if (length := len(self._render([asked]))) >= context:
            raise UserError(f"the question has {length} tokens and the model's context {context}: shorten it")
        self.messages.append(asked)
        while len(ids := self._render(self.messages)) + min(wanted, context / 2) > context and len(self.messages) > 1:
            del self.messages[:2]
            self.forgotten += 1

        self._crop_cache(ids)
        streamer = PieceStreamer(self.tokenizer, self.sampling, write)
        with Interrupt() as interrupt:
            # pyrefly: ignore[not-callable]  torch calls every attribute of a module a tensor or a module
            output = self.model.generate(
                torch.tensor([ids], device=self.model.device),
                attention_mask=torch.ones(1, len(ids), dtype=torch.long, device=self.model.device),
                past_key_values=self.cache,
                max_new_tokens=min(wanted, context - len(ids)),
                streamer=streamer,
                stopping_criteria=StoppingCriteriaList([interrupt]),
                **self.sampling.arguments(self.tokenizer),
            )[0].tolist()
        streamer.finish()
        self.cached = output[: self.cache.get_seq_length()]
        text = self.sampling.cut(decode(self.tokenizer, output[len(ids) :], skip_special_tokens=True))
        self.messages.append({"role": "assistant", "content": text})
        return text

    def _render(self, messages: list[dict[str, str]]) -> list[int]:
        """The tokens of a conversation that an answer is to follow."""
        encoded = self.tokenizer.apply_chat_template(
            self.instructions + messages,
            add_generation_prompt=True,
            return_dict=True,
            tokenizer_kwargs={"verbose": False},  # its length is looked at here
        )
        assert isinstance(encoded, BatchEncoding), "with return_dict"
        return encoded["input_ids"]

    def _check_instructions(self) -> None:
        for message in self.instructions:
            try:
                shown = self.tokenizer.apply_chat_template([message, {"role": "user", "content": ""}], tokenize=False)
            except TemplateError:
                shown = ""
            if message["content"].strip() not in shown:
                raise UserError(
                    f"system: the chat template of {self.tokenizer.name_or_path} has no system prompt: leave it out"
                )

    def _crop_cache(self, ids: list[int]) -> None:
        """Keep of the cache what belongs to the first of these tokens; at least the last is left to be computed."""
        both = zip(self.cached, ids[:-1], strict=False)
        same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], both))
        # What a sliding window or a recurrent state has forgotten does not come back by cropping.
        if self.cache is None or any(type(layer) is not DynamicLayer for layer in self.cache.layers):
            self.cache = DynamicCache(config=self.model.config)
        elif same < len(self.cached):
            self.cache.crop(same - len(self.cached))
