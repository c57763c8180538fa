"""Merge an adapter into its base, and prove that the merged model says what the adapter said."""

import itertools
import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, PeftConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.pytorch_utils import Conv1D
from transformers.utils import cached_file

from llmkit.data.sample_data import docstring_conversations
from llmkit.data.tokenizer import load_tokenizer
from llmkit.errors import UserError, reason
from llmkit.finetuning.adapters import keep_training_layout
from llmkit.finetuning.conversations import encode
from llmkit.finetuning.turns import split_guanaco
from llmkit.runs.run import QUANTIZATION_CONFIG

# The gate. Rounding the merged weights to bfloat16 moved a token's distribution by about 1e-4 nats where it was
# measured, and a wrong merge (a transposed or doubled update) by more than 0.1.
MAX_KL = 0.005  # nats per token, mean
MAX_PERPLEXITY_CHANGE = 0.01
GATE_CONVERSATIONS = 32


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
    if Path(output).exists():
        raise UserError(f"{output} is there already: choose another folder or delete it")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    reference = load_with_adapter(adapter, base, device)
    tokenizer = load_tokenizer(adapter)
    rows = gate_rows(tokenizer, reference.config.max_position_embeddings)

    merged = _merge(reference, base, dtype)
    unfinished = Path(output).with_name(Path(output).name + ".unfinished")
    merged.generation_config = GenerationConfig.from_model_config(merged.config)
    merged.generation_config.eos_token_id = merged.config.eos_token_id = tokenizer.eos_token_id
    merged.generation_config.pad_token_id = tokenizer.pad_token_id
    merged.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    del merged
    # From the disk, as anyone will load it.
    saved = AutoModelForCausalLM.from_pretrained(
        unfinished, dtype=dtype, device_map={"": device}, trust_remote_code=False, use_safetensors=True
    )
    comparison = compare(reference, saved, rows)
    if not comparison.within_bounds:
        shutil.rmtree(unfinished)
        raise UserError(
            f"the merged model does not say what the adapter says (KL {comparison.kl:.2e} nats per token, perplexity "
            f"{comparison.perplexity_adapter:.4f} -> {comparison.perplexity_merged:.4f}), so it was not saved: try "
            "--dtype float32"
        )
    unfinished.rename(output)
    return comparison


def load_with_adapter(adapter: str, base: str | None, device: torch.device) -> PeftModel:
    """The base as it was trained on, quantized if it was, with the adapter on it."""
    try:
        config = PeftConfig.from_pretrained(adapter)
        quantization = Path(adapter) / QUANTIZATION_CONFIG
        quantized = BitsAndBytesConfig(**json.loads(quantization.read_text())) if quantization.exists() else None
        model = AutoModelForCausalLM.from_pretrained(
            base or config.base_model_name_or_path,
            revision=config.revision,
            dtype=quantized.bnb_4bit_compute_dtype if quantized else "auto",
            device_map={"": device},
            quantization_config=quantized,
            trust_remote_code=False,
            use_safetensors=True,
        )
        # PEFT would read adapter_model.bin, which is pickled, where there is no such file.
        cached_file(adapter, SAFETENSORS_WEIGHTS_NAME)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{adapter}: the adapter or its base does not load ({reason(error)}): set --base if it has moved"
        ) from error
    keep_training_layout(model)
    if not isinstance(config, LoraConfig) or config.use_dora or config.modules_to_save or config.bias != "none":
        raise UserError(f"{adapter}: only plain LoRA adapters are read here, no DoRA, biases or whole modules")
    return PeftModel.from_pretrained(model, adapter).eval()


@torch.no_grad()
def _merge(reference: PeftModel, base: str | None, dtype: torch.dtype) -> PreTrainedModel:
    """A plain model with the weights of base + update, added up in float32 and rounded once."""
    config = reference.peft_config["default"]
    merged = AutoModelForCausalLM.from_pretrained(
        base or config.base_model_name_or_path,
        revision=config.revision,
        dtype=dtype,
        trust_remote_code=False,
        use_safetensors=True,
    )
    for name, module in reference.get_base_model().named_modules():
        if isinstance(module, LoraLayer):
            layer, update = module.get_base_layer(), module.get_delta_weight("default").float()
        elif isinstance(module, Linear4bit) and not name.endswith(".base_layer"):
            layer, update = module, 0.0
        else:
            continue
        weight = layer.weight
        if isinstance(layer, Linear4bit):
            weight = dequantize_4bit(weight.data, weight.quant_state)
        weight = weight.float() + update
        target = merged.get_submodule(name)
        # GPT-2's own layers hold (in, out); in 4 bits they became (out, in) like all others.
        if isinstance(layer, Linear4bit) and isinstance(target, Conv1D):
            weight = weight.t()
        target.weight.copy_(weight)
    return merged


def gate_rows(tokenizer: PreTrainedTokenizerBase, context: int) -> list[dict[str, list[int]]]:
    """Some of the embedded conversations, encoded with the adapter's own chat template."""
    texts = itertools.islice(docstring_conversations(), 0, 10 * GATE_CONVERSATIONS, 10)
    rows = [encode(split_guanaco(text), tokenizer) for text in texts]
    return [{key: values[:context] for key, values in row.items()} for row in rows]


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
