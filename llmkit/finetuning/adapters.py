"""LoRA adapters on a quantized base: load the base, put an adapter on it, say what is trained, show what it costs."""

import json
import os
import warnings
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from huggingface_hub import snapshot_download
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model_state_dict
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from transformers import (
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
)
from transformers.pytorch_utils import Conv1D
from transformers.utils import GENERATION_CONFIG_NAME, cached_file, extract_commit_hash

from llmkit.data.tokenizer import load_tokenizer
from llmkit.errors import UserError, reason
from llmkit.finetuning.conversations import add_chat_template
from llmkit.hub_access import ask_hub_once
from llmkit.model.opening import context_length, open_config, open_model
from llmkit.paths import check_names, local_path
from llmkit.runs.run import QUANTIZATION_CONFIG

# The files of an adapter, as patterns.
ADAPTER_FILES = ("*.json", SAFETENSORS_WEIGHTS_NAME, "merges.txt", "*.jinja", "tokenizer.model")


@dataclass
class AdapterArguments:
    """The base model and the adapter that is trained on it."""

    # What a resumed run has to have the same.
    DECISIVE: ClassVar[set[str]] = {"model", "model_revision", "quantization", "lora_r", "lora_alpha", "lora_dropout"}

    model: str = field(
        default="microsoft/phi-2", metadata={"help": "A causal language model on the Hub, or its folder."}
    )
    model_revision: str | None = field(default=None, metadata={"help": "The model's commit or branch on the Hub."})
    quantization: Literal["nf4", "none"] = field(
        default="nf4",
        metadata={"help": "Hold the base model in 4 bits (nf4, with double quantization), or as it is (none)."},
    )
    lora_r: int = field(default=16, metadata={"help": "The rank of the adapters."})
    lora_alpha: int = field(default=32, metadata={"help": "The adapters' output is scaled by lora_alpha / lora_r."})
    lora_dropout: float = field(default=0.05, metadata={"help": "The dropout probability of the adapters' input."})
    attn_implementation: str = field(
        default="sdpa",
        metadata={"help": "The attention kernel: sdpa, eager or, where it is installed, flash_attention_2."},
    )

    def __post_init__(self):
        check_names(self, "model")
        if self.lora_r < 1 or self.lora_alpha < 1:
            raise UserError(f"lora_r={self.lora_r}, lora_alpha={self.lora_alpha}: must be at least 1")
        if not 0 <= self.lora_dropout < 1:
            raise UserError(f"lora_dropout={self.lora_dropout}: must be at least 0 and below 1")
        if "/" in self.attn_implementation:
            raise UserError(
                f"attn_implementation={self.attn_implementation}: only code of installed packages is run, not that "
                "of a kernel on the Hub: choose sdpa, eager or flash_attention_2"
            )

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
            ask_hub_once()
            file = cached_file(args.model, "config.json", revision=args.model_revision)
            args.model_revision = extract_commit_hash(file, None)
        config = open_config(args.model, args.model_revision)
    except (OSError, ValueError) as error:
        place = "no model in this folder" if Path(args.model).is_dir() else "no folder here, and not read from the Hub"
        raise UserError(f"model={args.model}: {place} ({reason(error)})") from error
    check_not_quantized(args.model, config)
    return config


def check_not_quantized(base: str, config: PreTrainedConfig) -> None:
    """Refuse a base that was saved quantized.

    Raises:
        UserError: it was.
    """
    if getattr(config, "quantization_config", None) is not None:
        raise UserError(
            f"the base {base} was saved quantized: give the checkpoint that it was made from, which llmkit quantizes "
            "itself"
        )


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
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        raise UserError(
            "FSDP is not supported here: it cuts weights of one dtype, and 4-bit weights, bf16 embeddings and float32 "
            "adapters are three; the base fits on each GPU in 4 bits, so use accelerate_configs/multi_gpu.yaml (DDP)"
        )
    if config.model_type == "phi" and args.mixed_precision == "fp16":
        raise UserError("fp16 does not work with Phi, whose attention logits overflow float16: use bf16 or float32")
    if max_length > context_length(config):
        raise UserError(f"max_length={max_length} is longer than the {context_length(config)} positions of the base")


def load_base_model(args: AdapterArguments, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """The frozen base: linear layers in NF4, all else in `dtype`; nothing is upcast to float32.

    Each rank loads a whole copy onto its own device.
    """
    try:
        model = open_model(
            args.model,
            args.model_revision,
            dtype=dtype,
            device_map={"": device},
            quantization_config=quantization_config(dtype) if args.quantization == "nf4" else None,
            attn_implementation=args.attn_implementation,
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


# ------------------------------------------------------------------ adapters that were saved


def adapter_folder(adapter: str) -> Path:
    """The folder of an adapter; of one on the Hub, its files of one commit are downloaded.

    Raises:
        UserError: no such folder or name, or it holds no adapter.
    """
    folder = local_path(adapter)
    if folder is None:
        ask_hub_once()
        try:
            folder = Path(snapshot_download(adapter, allow_patterns=[*ADAPTER_FILES]))
        except (OSError, ValueError) as error:
            raise UserError(f"{adapter}: no folder here, and not read from the Hub ({error})") from error
    if not (folder / CONFIG_NAME).exists():
        kind = "a plain checkpoint, which has nothing to merge" if (folder / "config.json").exists() else "no adapter"
        raise UserError(f"{adapter} is {kind}: it has no {CONFIG_NAME}")
    if not (folder / SAFETENSORS_WEIGHTS_NAME).exists():  # PEFT would read adapter_model.bin, which is pickled
        raise UserError(f"{adapter}: the adapter has no {SAFETENSORS_WEIGHTS_NAME}")
    return folder


def adapter_config(folder: Path) -> LoraConfig:
    """The configuration of the adapter in a folder.

    Raises:
        UserError: it is damaged, or not LoRA's.
    """
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder / CONFIG_NAME}: not an adapter's configuration of this PEFT ({error!r})") from error
    if not isinstance(config, LoraConfig):
        raise UserError(f"{folder}: an adapter of the kind {config.peft_type}, and only LoRA is supported")
    return config


def base_of(adapter: str, config: LoraConfig, moved: str | None) -> tuple[str, str | None]:
    """Where the base of an adapter is, and its commit on the Hub.

    Args:
        moved: where it is, if it is not where the adapter was trained on it.

    Raises:
        UserError: nothing says where.
    """
    if moved:
        return moved, None
    if config.base_model_name_or_path is None:
        raise UserError(f"{adapter}: its configuration does not name its base: set --base")
    return config.base_model_name_or_path, config.revision


def load_with_adapter(adapter: str, base: str | None, device: torch.device) -> PeftModel:
    """The base as it was trained on, quantized if it was, with the adapter on it and its generation settings.

    Args:
        adapter: its folder, or its name on the Hub.
        base: where the base is, if it is not where it was trained on.

    Raises:
        UserError: adapter or base do not load, or do not fit each other.
    """
    folder = adapter_folder(adapter)
    config = adapter_config(folder)
    place, revision = base_of(adapter, config, base)
    record, settings = folder / QUANTIZATION_CONFIG, folder / GENERATION_CONFIG_NAME
    try:
        quantized = BitsAndBytesConfig(**json.loads(record.read_text())) if record.exists() else None
        model = open_model(
            place,
            revision,
            dtype=quantized.bnb_4bit_compute_dtype if quantized else "auto",
            device_map={"": device},
            quantization_config=quantized,
        )
        if settings.exists():
            model.generation_config = GenerationConfig.from_pretrained(folder)
    except (OSError, ValueError, TypeError, ImportError, SafetensorError) as error:
        raise UserError(
            f"{adapter}: its base {place} does not load ({reason(error)}): set --base if it has moved"
        ) from error
    keep_training_layout(model)
    return put_on(model, folder, config).eval()


def put_on(model: PreTrainedModel, folder: Path, config: LoraConfig) -> PeftModel:
    """A model with the adapter in a folder on it.

    Raises:
        UserError: the adapter's file is damaged, or made for another model.
    """
    with warnings.catch_warnings():
        # Of keys that are missing, which are looked at here, and of GPT-2's weights, which are (in, out) unless in 4
        # bits: PEFT finds out by itself.
        warnings.filterwarnings("ignore", category=UserWarning, module="peft")
        try:
            found = PeftModel.from_pretrained(model, str(folder), config=config)
            with safe_open(folder / SAFETENSORS_WEIGHTS_NAME, framework="pt") as file:
                missing = get_peft_model_state_dict(found, save_embedding_layers=False).keys() - set(file.keys())
        except (ValueError, KeyError, SafetensorError) as error:
            raise UserError(f"{folder}: the adapter is damaged, or of another base ({error}): check --base") from error
        except RuntimeError as error:
            if "size mismatch" not in str(error):
                raise
            raise UserError(f"{folder}: the adapter was made for a base of another shape: check --base") from error
    if missing:
        raise UserError(f"{folder}: the adapter lacks {min(missing)}: it is damaged, or of another base")
    return found


def dtype_ledger(model: torch.nn.Module) -> str:
    """A table of parameters and bytes, by dtype and by whether they are trained."""
    rows: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0])
    for parameter in model.parameters():
        kind, count = str(parameter.dtype).removeprefix("torch."), parameter.numel()
        size = count * parameter.element_size()
        if isinstance(parameter, Params4bit):
            state = parameter.quant_state
            assert state is not None and state.shape is not None, "quantized when it was loaded"
            kind, count = "nf4", state.shape.numel()
            nested = state.state2.absmax.nbytes if state.state2 is not None else 0
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
