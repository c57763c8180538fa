"""Text from a checkpoint, with the KV cache: load it, continue prompts one by one or as a batch.

Everything goes through transformers' own `generate` on the model's stock class, so that the text is what `pipeline`
gives, whatever the architecture.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.generation.streamers import BaseStreamer
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import find_adapter_config_file

from llmkit.data.tokenizer import load_tokenizer
from llmkit.errors import UserError, reason
from llmkit.finetuning.adapters import quantization_config
from llmkit.finetuning.merge import load_with_adapter
from llmkit.machine import bf16_is_fast

DEFAULT_NEW_TOKENS = 128
Quantization = Literal["int8", "nf4"]


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen, and where a text ends besides at the model's end token.

    Args:
        max_new_tokens: None is 128, or as many as still fit the context.
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
        if not 0 <= self.temperature < math.inf:
            raise UserError(f"temperature is {self.temperature}: give 0 (always the likeliest token) or more")
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

    def arguments(self, tokenizer: PreTrainedTokenizerBase) -> dict:
        """The same for `generate`."""
        stop = {"stop_strings": list(self.stop), "tokenizer": tokenizer} if self.stop else {}
        if self.temperature == 0:
            how = {"do_sample": False, "temperature": None, "top_k": None, "top_p": None}
        else:
            how = {"do_sample": True, "temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p}
        return {
            **how,
            **stop,
            "num_return_sequences": self.num_samples,
            "pad_token_id": tokenizer.pad_token_id,
        }

    def cut(self, text: str) -> str:
        """The text up to the first stop text; `generate` ends with the token in which that is complete."""
        return text[: min((at for stop in self.stop if (at := text.find(stop)) >= 0), default=len(text))]


# ------------------------------------------------------------------ loading


def load_for_generation(
    checkpoint: str, quantize: Quantization | None = None, base: str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A checkpoint of any causal LM, or an adapter on its base, on the GPU where there is one, and its tokenizer.

    An adapter is not merged: its base is loaded as it was trained on, in 4 bits if it was.

    Args:
        checkpoint: a run's folder, one of its checkpoints, an adapter's folder, or a name on the Hub.
        quantize: of a plain checkpoint, as in `load_model`.
        base: where an adapter's base is, if it has moved.

    Raises:
        UserError: nothing there that loads, or options that do not go with it.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    adapter = _find_adapter(checkpoint)
    if adapter and quantize:
        raise UserError(
            f"quantize={quantize}: an adapter's base is loaded as it was trained on; to quantize in another way, "
            f"make a plain checkpoint first with `llmkit merge {checkpoint} FOLDER`"
        )
    if base and not adapter:
        raise UserError(f"base={base}: only adapters have a base, and {checkpoint} is none")
    tokenizer = load_tokenizer(checkpoint)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # masked wherever it pads
    if not adapter:
        return load_model(checkpoint, quantize, device), tokenizer
    model = load_with_adapter(checkpoint, base, device).get_base_model()
    if (Path(checkpoint) / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(checkpoint)
    return model, tokenizer


def load_model(checkpoint: str, quantize: Quantization | None, device: torch.device) -> PreTrainedModel:
    """A plain checkpoint in its stock class, with the weights as they were saved, or quantized.

    A quantized model holds its linear layers in 8 bits (LLM.int8, Dettmers et al. 2022) or in 4 (NF4), and embedding,
    head and the rest in bfloat16 where the machine is good at it, else float32.

    Raises:
        UserError: it does not load.
    """
    dtype = torch.bfloat16 if bf16_is_fast(device.type) else torch.float32
    quantized = {"int8": BitsAndBytesConfig(load_in_8bit=True), "nf4": quantization_config(dtype)}
    how = {"dtype": dtype, "quantization_config": quantized[quantize]} if quantize else {"dtype": "auto"}
    try:
        return AutoModelForCausalLM.from_pretrained(
            checkpoint, device_map={"": device}, trust_remote_code=False, use_safetensors=True, **how
        ).eval()
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{checkpoint}: its model does not load ({reason(error)})") from error


def _find_adapter(checkpoint: str) -> bool:
    """Whether it is an adapter.

    Raises:
        UserError: a local path at which there is no checkpoint at all.
    """
    folder = Path(checkpoint).expanduser()
    if folder.is_dir():
        if not any((folder / name).exists() for name in ("config.json", "adapter_config.json")):
            last = get_last_checkpoint(str(folder))
            hint = f"give one that its training saved, such as {last}" if last else "give a folder that training saved"
            raise UserError(
                f"{checkpoint}: no checkpoint in this folder (no config.json, no adapter_config.json): {hint}"
            )
    elif folder.exists() or folder.is_absolute() or checkpoint.startswith((".", "~")) or len(folder.parts) > 2:
        raise UserError(f"{checkpoint}: no such folder: give a checkpoint's folder, or a model's name on the Hub")
    try:
        return find_adapter_config_file(checkpoint) is not None
    except OSError as error:
        raise UserError(f"{checkpoint}: no folder here, and not read from the Hub ({error})") from error


# ------------------------------------------------------------------ prompts


@dataclass(frozen=True)
class Continuation:
    """What follows a prompt: its text, cut before a stop text, and the number of tokens generated for it, the end
    token not among them."""

    prompt: str
    text: str
    tokens: int


def continue_prompts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    sampling: Sampling,
    write: Callable[[str], None] | None = None,
) -> list[Continuation]:
    """Continue all prompts as one batch, padded on the left.

    Args:
        write: of a single continuation, receives its text piece by piece while it is generated.

    Raises:
        UserError: a prompt and its new tokens do not fit the context.
    """
    assert write is None or len(prompts) * sampling.num_samples == 1
    # Nothing: as a document begins.
    start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    rows = [tokenizer(prompt, verbose=False)["input_ids"] or [start] for prompt in prompts]
    max_new_tokens = min(_new_tokens(len(row), context_length(model), sampling.max_new_tokens) for row in rows)
    longest = max(len(row) for row in rows)
    padded = [[tokenizer.pad_token_id] * (longest - len(row)) + row for row in rows]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
    output = model.generate(
        torch.tensor(padded, device=model.device),
        attention_mask=torch.tensor(mask, device=model.device),
        max_new_tokens=max_new_tokens,
        streamer=PieceStreamer(tokenizer, sampling, write) if write else None,
        **sampling.arguments(tokenizer),
    )  # (len(prompts) * num_samples, longest + new tokens)
    continuations = []
    for prompt, row in zip((p for p in prompts for _ in range(sampling.num_samples)), output, strict=True):
        ids = row[longest:].tolist()
        while ids and ids[-1] == tokenizer.pad_token_id:
            ids.pop()
        text = sampling.cut(tokenizer.decode(ids, skip_special_tokens=True))
        continuations.append(Continuation(prompt, text, len(ids) - (ids[-1:] == [tokenizer.eos_token_id])))
    return continuations


def context_length(model: PreTrainedModel) -> int | float:
    """Tokens of prompt and continuation together; infinite for models without positions, as those with ALiBi."""
    return getattr(model.config, "max_position_embeddings", math.inf)


def _new_tokens(length: int, context: int | float, wanted: int | None) -> int:
    """How many tokens to generate after a prompt of `length` tokens."""
    room = context - length
    if room < 1:
        raise UserError(f"the prompt has {length} tokens and the model's context {context}: shorten it")
    if wanted is not None and wanted > room:
        raise UserError(
            f"the prompt's {length} tokens and max_new_tokens={wanted} are more than the context of {context}: "
            f"{room} new tokens fit, or shorten the prompt"
        )
    return min(room, DEFAULT_NEW_TOKENS) if wanted is None else wanted


class PieceStreamer(BaseStreamer):
    """Hands over a continuation's text as soon as it is certain: token by token, but for the bytes of an incomplete
    character and what may turn out to be the beginning of a stop text.

    transformers' TextStreamer waits for the next space, knows no stop texts, and loses spaces at the start of a line
    with tokenizers that mark the word and not the space. Decoding from the start each time takes 0.2 ms for a thousand
    tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, sampling: Sampling, write: Callable[[str], None]):
        self.tokenizer = tokenizer
        self.sampling = sampling
        self.write = write
        self.ids: list[int] | None = None
        self.written = 0

    def put(self, value: torch.Tensor) -> None:
        if self.ids is None:
            self.ids = []  # the first is the prompt
            return
        self.ids += value.tolist()
        text = self.sampling.cut(whole := self.tokenizer.decode(self.ids, skip_special_tokens=True))
        if text == whole:  # no stop text yet, but it may have begun
            begun = (n for stop in self.sampling.stop for n in range(1, len(stop)) if text.endswith(stop[:n]))
            text = text[: len(text) - max(begun, default=0)]
        self._write_up_to(text.rstrip("\N{REPLACEMENT CHARACTER}"))

    def end(self) -> None:
        self._write_up_to(self.sampling.cut(self.tokenizer.decode(self.ids or [], skip_special_tokens=True)))

    def _write_up_to(self, text: str) -> None:
        if len(text) > self.written:
            self.write(text[self.written :])
            self.written = len(text)
