"""Text from a checkpoint, with the KV cache: load it, continue prompts one by one or as a batch.

Everything goes through transformers' own `generate` on the model's stock class, so that the text is what `pipeline`
gives, whatever the architecture.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from transformers import (
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.generation.streamers import BaseStreamer
from transformers.utils import find_adapter_config_file

from llmkit.data.tokenizer import decode, load_tokenizer
from llmkit.errors import UserError, reason
from llmkit.hub_access import ask_hub_once
from llmkit.inference.sampling import DEFAULT_NEW_TOKENS, Sampling
from llmkit.machine import bf16_is_fast
from llmkit.model.opening import context_length, open_model
from llmkit.paths import checkpoint_path

Quantization = Literal["int8", "nf4"]


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
    checkpoint = checkpoint_path(checkpoint)
    if not Path(checkpoint).exists():
        ask_hub_once()
    adapter = _is_adapter(checkpoint)
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
    from llmkit.finetuning.adapters import load_with_adapter  # here, since importing peft takes seconds

    model = load_with_adapter(checkpoint, base, device).get_base_model()
    assert isinstance(model, PreTrainedModel)
    return model, tokenizer


def load_model(checkpoint: str, quantize: Quantization | None, device: torch.device) -> PreTrainedModel:
    """A plain checkpoint in its stock class, with the weights as they were saved, or quantized.

    A quantized model holds its linear layers in 8 bits (LLM.int8, Dettmers et al. 2022) or in 4 (NF4), and embedding,
    head and the rest in bfloat16 where the machine is good at it, else float32.

    Raises:
        UserError: it does not load.
    """
    dtype = torch.bfloat16 if bf16_is_fast(device.type) else torch.float32
    how: dict[str, Any] = (
        {"dtype": dtype, "quantization_config": _quantization(quantize, dtype)} if quantize else {"dtype": "auto"}
    )
    try:
        return open_model(checkpoint, device_map={"": device}, **how).eval()
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise UserError(f"{checkpoint}: its model does not load ({reason(error)})") from error


def _quantization(kind: Quantization, dtype: torch.dtype) -> BitsAndBytesConfig:
    from llmkit.finetuning.adapters import quantization_config  # here, since importing peft takes seconds

    return BitsAndBytesConfig(load_in_8bit=True) if kind == "int8" else quantization_config(dtype)


def _is_adapter(checkpoint: str) -> bool:
    try:
        return find_adapter_config_file(checkpoint) is not None
    except OSError as error:
        raise UserError(f"{checkpoint}: no folder here, and not read from the Hub ({error})") from error


# ------------------------------------------------------------------ prompts


@dataclass(frozen=True)
class Continuation:
    """What follows a prompt.

    Attributes:
        text: cut before a stop text.
        tokens: how many were generated for it, the end token not among them.
        slid: whether the text is longer than the context, so that its end did not follow from its beginning.
    """

    prompt: str
    text: str
    tokens: int
    slid: bool


@dataclass
class _Row:
    """A text that is being continued: its tokens, and how many more are wanted."""

    prompt: str
    ids: list[int]
    length: int  # of the prompt
    wanted: int

    def window(self, context: int) -> list[int]:
        """What the model reads next: all tokens if one more fits the context, else the last half of a context."""
        return self.ids if len(self.ids) < context else self.ids[-max(1, context // 2) :]


def continue_prompts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    sampling: Sampling,
    write: Callable[[str], None] | None = None,
    add_special_tokens: bool = True,
) -> list[Continuation]:
    """Continue all prompts as one batch, padded on the left.

    Where `max_new_tokens` is more than fits the context, the window slides: whenever a text fills the context, its
    last half is read again as a new beginning (nanoGPT moves on token by token, and so computes every window anew).
    Each prompt has the whole context to itself, however long its neighbours are.

    Args:
        write: of a single continuation, receives its text piece by piece while it is generated.
        add_special_tokens: as the tokenizer does with a text; False where a chat template has put them in already.

    Raises:
        UserError: a prompt fills the context.
    """
    assert write is None or len(prompts) * sampling.num_samples == 1
    context = context_length(model.config)
    # Nothing: as a document begins.
    start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    rows = []
    for prompt in prompts:
        ids = tokenizer(prompt, add_special_tokens=add_special_tokens, verbose=False)["input_ids"] or [start]
        wanted = _new_tokens(len(ids), context, sampling.max_new_tokens)
        rows += [_Row(prompt, ids, len(ids), wanted) for _ in range(sampling.num_samples)]
    streamer = PieceStreamer(tokenizer, sampling, write) if write else None
    going = rows
    while going:
        _continue_rows(model, tokenizer, going, sampling, streamer)
        going = [row for row in going if row.wanted]
    if streamer:
        streamer.finish()
    return [
        Continuation(
            prompt=row.prompt,
            text=sampling.cut(decode(tokenizer, row.ids[row.length :], skip_special_tokens=True)),
            tokens=len(row.ids) - row.length,
            slid=len(row.ids) > context,
        )
        for row in rows
    ]


def _continue_rows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[_Row],
    sampling: Sampling,
    streamer: "PieceStreamer | None",
) -> None:
    """Generate for all rows until the first one has what it wants or fills the context."""
    context = context_length(model.config)
    windows = [row.window(context) for row in rows]
    count = min(min(row.wanted, context - len(window)) for row, window in zip(rows, windows, strict=True))
    longest = max(map(len, windows))
    padded = [[tokenizer.pad_token_id] * (longest - len(window)) + window for window in windows]
    mask = [[0] * (longest - len(window)) + [1] * len(window) for window in windows]
    # pyrefly: ignore[not-callable]  torch calls every attribute of a module a tensor or a module
    output = model.generate(
        torch.tensor(padded, device=model.device),
        attention_mask=torch.tensor(mask, device=model.device),
        max_new_tokens=count,
        streamer=streamer,
        **sampling.arguments(tokenizer),
    )[:, longest:].tolist()  # (rows, count)
    end_tokens = model.generation_config.eos_token_id
    end_tokens = set(end_tokens if isinstance(end_tokens, list) else [end_tokens])
    for row, new in zip(rows, output, strict=True):
        end = next((at for at, token in enumerate(new) if token in end_tokens), None)
        new = new[:end]
        while new and new[-1] == tokenizer.pad_token_id:  # after a stop text
            new.pop()
        row.ids = row.ids + new
        text = decode(tokenizer, row.ids[row.length :], skip_special_tokens=True)
        row.wanted = 0 if end is not None or sampling.cut(text) != text else row.wanted - count


def _new_tokens(length: int, context: int, wanted: int | None) -> int:
    """How many tokens to generate after a prompt of `length` tokens."""
    room = context - length
    if room < 1:
        raise UserError(f"the prompt has {length} tokens and the model's context {context}: shorten it")
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
        self.ids: list[int] = []
        self.at_prompt = True  # what `generate` hands over first
        self.written = 0

    def put(self, value: torch.Tensor) -> None:
        if self.at_prompt:
            self.at_prompt = False
            return
        self.ids += value.tolist()
        text = self.sampling.cut(whole := decode(self.tokenizer, self.ids, skip_special_tokens=True))
        if text == whole:  # no stop text yet, but it may have begun
            begun = (n for stop in self.sampling.stop for n in range(1, len(stop)) if text.endswith(stop[:n]))
            text = text[: len(text) - max(begun, default=0)]
        self._write_up_to(text.rstrip("\N{REPLACEMENT CHARACTER}"))

    def end(self) -> None:
        self.at_prompt = True  # the text may go on in another call of `generate`

    def finish(self) -> None:
        """Write what was held back, for the text is complete."""
        self._write_up_to(self.sampling.cut(decode(self.tokenizer, self.ids, skip_special_tokens=True)))

    def _write_up_to(self, text: str) -> None:
        if len(text) > self.written:
            self.write(text[self.written :])
            self.written = len(text)
