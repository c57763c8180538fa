"""Merge an adapter into its base, and prove that the merged model says what the adapter said."""

import itertools
import math
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit, Params4bit
from peft import LoraConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import (
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.pytorch_utils import Conv1D

from llmkit.data.sample_data import docstring_conversations
from llmkit.data.tokenizer import load_tokenizer
from llmkit.errors import UserError, reason
from llmkit.files import write_record
from llmkit.finetuning.adapters import (
    adapter_config,
    adapter_folder,
    base_of,
    check_not_quantized,
    load_with_adapter,
    put_on,
)
from llmkit.finetuning.conversations import encode
from llmkit.finetuning.turns import Malformed, split_guanaco
from llmkit.model.loss import IGNORE_INDEX
from llmkit.model.opening import context_length, open_config, open_model
from llmkit.paths import new_path

# The gate. Rounding the merged weights to bfloat16 moved a token's distribution by about 1e-4 nats where it was
# measured, and a wrong merge (a transposed or doubled update) by more than 0.1.
MAX_KL = 0.005  # nats per token, mean
MAX_PERPLEXITY_CHANGE = 0.01
GATE_CONVERSATIONS = 32
LONGEST_ROW = 1024  # tokens


@dataclass
class Comparison:
    """How far the merged model's next-token distributions are from those of base + adapter, over `tokens` tokens."""

    tokens: int
    kl: float
    max_logit_difference: float
    perplexity_adapter: float
    perplexity_merged: float

    @property
    def within_bounds(self) -> bool:
        change = abs(self.perplexity_merged / self.perplexity_adapter - 1)
        return self.kl <= MAX_KL and change <= MAX_PERPLEXITY_CHANGE

    def table(self) -> str:
        change = self.perplexity_merged / self.perplexity_adapter - 1
        rows = {
            "compared on": f"{self.tokens:,} tokens, base + adapter against the merged checkpoint",
            "KL divergence": f"{self.kl:.2e} nats per token (bound {MAX_KL})",
            "largest logit difference": f"{self.max_logit_difference:.3f}",
            "perplexity": f"{self.perplexity_adapter:.4f} -> {self.perplexity_merged:.4f}, "
            f"{change:+.3%} (bound {MAX_PERPLEXITY_CHANGE:.0%})",
        }
        return "\n".join(f"{name:>24}  {text}" for name, text in rows.items())


def merge_adapter(adapter: str, output: str, dtype: torch.dtype, base: str | None = None) -> Comparison:
    """Write the base with the adapter's update added to its weights as a plain checkpoint, if that changes nothing.

    A base that was trained on in 4 bits is dequantized first: the adapter has learned to correct that base, not the
    one that was quantized.

    Args:
        adapter: its folder, or its name on the Hub.
        output: a new folder.
        dtype: of the merged checkpoint.
        base: where the base is, if it is not where it was trained on.

    Raises:
        UserError: not a LoRA adapter, no base, `output` is there already, or the merged model is past the bounds.
    """
    new_path(output)
    folder = adapter_folder(adapter)
    config = adapter_config(folder)
    place, revision = base_of(adapter, config, base)
    tokenizer = load_tokenizer(str(folder))
    try:
        base_config = open_config(place, revision)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{adapter}: its base {place} does not load ({reason(error)}): set --base if it has moved"
        ) from error
    check_not_quantized(place, base_config)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    reference = load_with_adapter(adapter, base, device)
    return _save(_merge(reference, folder, place, revision, dtype), reference, tokenizer, Path(output))


def _save(
    merged: PreTrainedModel, reference: PeftModel, tokenizer: PreTrainedTokenizerBase, output: Path
) -> Comparison:
    """Write the merged model and its tokenizer to `output`, unless what was written is not what `reference` is."""
    dtype, ends = merged.dtype, tokenizer.eos_token_id
    merged.generation_config = GenerationConfig.from_model_config(merged.config)
    merged.generation_config.eos_token_id = merged.config.eos_token_id = ends
    merged.generation_config.pad_token_id = tokenizer.pad_token_id
    unfinished = output.with_name(output.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        merged.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        del merged  # which takes as much memory as the copy that is read next
        # From the disk, as anyone will load it.
        saved = open_model(unfinished, dtype=dtype, device_map={"": reference.device})
        lora = reference.peft_config["default"]
        assert isinstance(lora, LoraConfig), "as `adapter_config` has it"
        rows = gate_rows(tokenizer, reference.config, trained_tokens(lora))
        comparison = compare(reference, saved, rows)
        if not comparison.within_bounds:
            raise UserError(
                f"the merged model does not say what the adapter says (KL {comparison.kl:.2e} nats per token, "
                f"perplexity {comparison.perplexity_adapter:.4f} -> {comparison.perplexity_merged:.4f}), so it was "
                "not saved: try --dtype float32"
            )
        write_record(unfinished)
        unfinished.rename(output)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return comparison


def trained_tokens(config: LoraConfig) -> list[int]:
    """The tokens whose embeddings are part of an adapter (`trainable_token_indices`)."""
    indices = config.trainable_token_indices or []
    return sorted({i for part in indices.values() for i in part} if isinstance(indices, dict) else indices)


@torch.no_grad()
def _merge(reference: PeftModel, folder: Path, base: str, revision: str | None, dtype: torch.dtype) -> PreTrainedModel:
    """A plain model with the weights of base + update, added up in float32 and rounded once.

    PEFT adds the update, whatever it consists of, to a plain base that holds the dequantized weights.

    Raises:
        UserError: an update that a plain checkpoint has no place for.
    """
    plain = open_model(base, revision, dtype=dtype)
    merged = put_on(plain, folder, adapter_config(folder))
    trained_on = dict(reference.named_modules())
    for name, module in merged.named_modules():
        if isinstance(module, BaseTunerLayer):
            layer = module.get_base_layer().float()
            source = trained_on[name]
            assert isinstance(source, BaseTunerLayer), "the same adapter"
            _dequantize(source.get_base_layer(), layer)
            try:
                module.merge()
            except RuntimeError as error:
                if "lora_bias" not in str(error):
                    raise
                raise UserError(
                    f"{folder}: it has biases (lora_bias) for layers without one, so a plain checkpoint cannot hold "
                    "them: use the adapter as it is"
                ) from error
            layer.to(dtype)
        elif not name.endswith(".base_layer"):
            _dequantize(trained_on[name], module)
    return merged.unload()


def _dequantize(source: torch.nn.Module, target: torch.nn.Module) -> None:
    """Give a plain layer the weights of a layer in 4 bits, if `source` is one."""
    if isinstance(source, Linear4bit):
        assert isinstance(source.weight, Params4bit)
        weight = dequantize_4bit(source.weight.data, source.weight.quant_state)
        # GPT-2's own layers hold (in, out); in 4 bits they became (out, in) like all others.
        target.get_parameter("weight").copy_(weight.t() if isinstance(target, Conv1D) else weight)


def gate_rows(
    tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig, tokens: list[int]
) -> list[dict[str, list[int]]]:
    """Some of the embedded conversations, and a row of `tokens`, at most as long as the context.

    Where that ends before any answer begins, all that is read is predicted.
    """
    texts = itertools.islice(docstring_conversations(), 0, 10 * GATE_CONVERSATIONS, 10)
    rows = [_gate_row(text, tokenizer) for text in texts]
    if tokens:
        rows.append({"input_ids": tokens, "labels": [IGNORE_INDEX] * len(tokens)})
    context = min(context_length(config), LONGEST_ROW)
    rows = [{key: values[:context] for key, values in row.items()} for row in rows]
    has_targets = any(label != IGNORE_INDEX for row in rows for label in row["labels"][1:])
    return rows if has_targets else [{"input_ids": row["input_ids"], "labels": row["input_ids"]} for row in rows]


def _gate_row(text: str, tokenizer: PreTrainedTokenizerBase) -> dict[str, list[int]]:
    """A conversation in the adapter's own chat template; as plain text, all of it predicted, where there is none, or
    one that cannot be told apart into what is trained and what is read."""
    if tokenizer.chat_template is not None:
        with suppress(Malformed):
            return encode(split_guanaco(text), tokenizer)
    ids = tokenizer(text)["input_ids"]
    return {"input_ids": ids, "labels": ids}


@torch.no_grad()
def compare(reference: PreTrainedModel | PeftModel, merged: PreTrainedModel, rows: list[dict]) -> Comparison:
    """Compare next-token distributions after every token of the rows; perplexity is over the trained tokens."""
    tokens = trained = 0
    kl = largest = nats_reference = nats_merged = 0.0
    for row in rows:
        ids = torch.tensor([row["input_ids"]], device=merged.device)
        labels = torch.tensor(row["labels"], device=merged.device)[1:]
        expected = reference(input_ids=ids).logits[0].float()  # (T, V)
        found = merged(input_ids=ids).logits[0].float()
        log_p, log_q = expected.log_softmax(-1), found.log_softmax(-1)
        kl += (log_p.exp() * (log_p - log_q)).sum().item()
        largest = max(largest, (expected - found).abs().max().item())
        kept = labels >= 0
        index = labels.where(kept, 0).unsqueeze(-1)
        nats_reference -= (log_p[:-1].gather(-1, index).squeeze(-1) * kept).sum().item()
        nats_merged -= (log_q[:-1].gather(-1, index).squeeze(-1) * kept).sum().item()
        tokens += len(expected)
        trained += int(kept.sum())
    return Comparison(
        tokens, kl / tokens, largest, math.exp(nats_reference / trained), math.exp(nats_merged / trained)
    )
