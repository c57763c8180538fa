"""LoRA adapters on a quantized base: load the base, say what is trained, show what it costs."""

import os
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from peft import LoraConfig
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
)
from transformers.pytorch_utils import Conv1D
from transformers.utils import cached_file, extract_commit_hash

from llmkit.data.tokenizer import load_tokenizer
from llmkit.errors import UserError, reason
from llmkit.finetuning.conversations import add_chat_template


@dataclass
class AdapterArguments:
    """The base model and the adapter that is trained on it."""

    model: str = field(default="microsoft/phi-2", metadata={"help": "A causal LM on the Hub, or its folder."})
    model_revision: str | None = field(default=None, metadata={"help": "Its commit or branch on the Hub."})
    quantization: Literal["nf4", "none"] = field(
        default="nf4", metadata={"help": "Hold the base in 4 bits (NF4, double quantization), or as it is."}
    )
    lora_r: int = field(default=16, metadata={"help": "Rank of the update of each linear layer."})
    lora_alpha: int = field(default=32, metadata={"help": "The update is scaled by lora_alpha / lora_r."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout on the adapters' input."})
    attn_implementation: str = field(
        default="sdpa", metadata={"help": "sdpa, eager or, where installed, flash_attention_2."}
    )

    def __post_init__(self):
        if self.lora_r < 1 or self.lora_alpha < 1:
            raise UserError(f"lora_r={self.lora_r}, lora_alpha={self.lora_alpha}: must be at least 1")
        if not 0 <= self.lora_dropout < 1:
            raise UserError(f"lora_dropout={self.lora_dropout}: must be at least 0 and below 1")

    def lora_config(self, base: PreTrainedModel) -> LoraConfig:
        """LoRA on every linear layer but the head; the base is named, and pinned to its commit where it has one."""
        return LoraConfig(
            task_type="CAUSAL_LM",
            r=self.lora_r,
            lora_alpha=self.lora_alpha,
            lora_dropout=self.lora_dropout,
            target_modules=linear_layers(base),
            revision=self.model_revision,
            # An unquantized GPT-2 has its weights as (in, out); in 4 bits they are plain linear layers.
            fan_in_fan_out=base.config.model_type == "gpt2" and self.quantization == "none",
        )


def linear_layers(model: PreTrainedModel) -> list[str]:
    """The last names of all linear layers but the head, as in `["dense", "fc1", "fc2", ...]`."""
    head = model.get_output_embeddings()
    return sorted(
        {
            name.rpartition(".")[2]
            for name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear | Conv1D) and module is not head
        }
    )


def quantization_config(dtype: torch.dtype) -> BitsAndBytesConfig:
    """NF4 with double quantization (Dettmers et al. 2023), dequantized to `dtype` for each matrix product."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def load_base_config(args: AdapterArguments) -> PreTrainedConfig:
    """The base's configuration, before its weights are read.

    Makes a folder's path absolute, for elsewhere a relative one may be a name on the Hub, and the adapter keeps it.
    Pins `args.model_revision` of a base on the Hub to the commit that it stands for now: what is loaded after this is
    that commit, and the adapter names it.

    Raises:
        UserError: no such model, or it is an adapter.
    """
    if (Path(args.model) / "adapter_config.json").exists():
        raise UserError(f"model={args.model} is an adapter: merge it first with `llmkit merge`, or give its base")
    try:
        if Path(args.model).is_dir():
            args.model = os.path.abspath(args.model)
        else:
            file = cached_file(args.model, "config.json", revision=args.model_revision)
            args.model_revision = extract_commit_hash(file, None)
        return AutoConfig.from_pretrained(args.model, revision=args.model_revision, trust_remote_code=False)
    except (OSError, ValueError) as error:
        place = "no model in this folder" if Path(args.model).is_dir() else "no folder here, and not read from the Hub"
        raise UserError(f"model={args.model}: {place} ({reason(error)})") from error


def load_chat_tokenizer(args: AdapterArguments) -> PreTrainedTokenizerBase:
    """The base's tokenizer, with a chat template and a padding token.

    Padding is the end token where there is no other: labels are set turn by turn and padded with -100, so that it
    takes no end token out of training, and the embedding needs no new row.
    """
    tokenizer = load_tokenizer(args.model, args.model_revision)
    add_chat_template(tokenizer)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def check_run(args: TrainingArguments, config: PreTrainedConfig, max_length: int) -> None:
    """Refuse, before weights are read, what would fail late or train badly.

    Raises:
        UserError: sharded training, float16 on Phi, or more tokens than the base has positions.
    """
    if args.fsdp or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        raise UserError(
            "FSDP is not supported here: it cuts weights of one dtype, and 4-bit weights, bf16 embeddings and float32 "
            "adapters are three; the base fits on each GPU in 4 bits, so use accelerate_configs/multi_gpu.yaml (DDP)"
        )
    if config.model_type == "phi" and args.mixed_precision == "fp16":
        raise UserError("fp16 does not work with Phi, whose attention logits overflow float16: use bf16 or float32")
    if max_length > config.max_position_embeddings:
        raise UserError(
            f"max_length={max_length} is longer than the {config.max_position_embeddings} positions of the base"
        )


def load_base_model(args: AdapterArguments, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """The frozen base: linear layers in NF4, all else in `dtype`; nothing is upcast to float32.

    Each rank loads a whole copy onto its own device.
    """
    try:
        model = AutoModelForCausalLM.from_pretrained(
            args.model,
            revision=args.model_revision,
            dtype=dtype,
            device_map={"": device},
            quantization_config=quantization_config(dtype) if args.quantization == "nf4" else None,
            attn_implementation=args.attn_implementation,
            trust_remote_code=False,
            use_safetensors=True,
        )
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"model={args.model}: {reason(error)}") from error
    keep_training_layout(model)
    return model.requires_grad_(False)


def keep_training_layout(model: torch.nn.Module) -> None:
    """Keep bitsandbytes from repacking 4-bit weights for inference, which it does on CPUs with AVX512-BF16.

    It repacks them in place at the first forward pass in eval mode, for products that have no gradient: training after
    an evaluation would fail, or without biases go on with wrong gradients.
    """
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def dtype_ledger(model: torch.nn.Module) -> str:
    """A table of parameters and bytes, by dtype and by whether they are trained."""
    rows: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0])
    for parameter in model.parameters():
        kind, count = str(parameter.dtype).removeprefix("torch."), parameter.numel()
        size = count * parameter.element_size()
        if isinstance(parameter, Params4bit):
            state = parameter.quant_state
            kind, count = "nf4", state.shape.numel()
            nested = state.state2.absmax.nbytes if state.nested else 0
            size += state.absmax.nbytes + nested
        row = rows[kind, "trained" if parameter.requires_grad else "frozen"]
        row[0] += count
        row[1] += size
    lines = [f"{'dtype':>10}  {'':7}  {'parameters':>15}  {'MB':>10}"]
    lines += [
        f"{kind:>10}  {state:7}  {count:>15,}  {size / 1e6:>10,.1f}" for (kind, state), (count, size) in rows.items()
    ]
    total = [sum(column) for column in zip(*rows.values(), strict=True)]
    return "\n".join([*lines, f"{'total':>10}  {'':7}  {total[0]:>15,}  {total[1] / 1e6:>10,.1f}"])
