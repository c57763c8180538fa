"""The arguments of preference tuning: DPOConfig, the adapter to go on from, and what is ours."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from peft import PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import DPOConfig

from llmkit.data.tokenizer import load_tokenizer
from llmkit.errors import UserError
from llmkit.finetuning.adapters import AdapterArguments, adapter_config, adapter_folder, load_chat_tokenizer, put_on
from llmkit.finetuning.arguments import FREE as FREE_IN_SFT
from llmkit.finetuning.arguments import SFTArguments
from llmkit.finetuning.conversations import add_chat_template
from llmkit.runs.run import QUANTIZATION_CONFIG
from llmkit.training.run_arguments import RunArguments

FREE = FREE_IN_SFT - {"eval_packing"}
_REFERENCE = "the reference is the model that training started from, frozen, and computed with each batch"
# The losses of this TRL, and which of them read an argument that the others would ignore.
LOSSES = ("sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired")
LOSSES += ("apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm")
READ_BY = {
    "label_smoothing": ("robust", "exo_pair", "aot", "aot_unpaired"),
    "discopop_tau": ("discopop",),
}
DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")
OF_ANY_DIVERGENCE = ("sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft")


@dataclass
class DPOArguments(RunArguments, DPOConfig):
    """DPOConfig with what the machine is good for chosen by itself, samples, and an alarm."""

    REPLACES: ClassVar[Mapping[str, tuple[str, ...]]] = {**RunArguments.REPLACES, "loss_type": ("loss_weights",)}
    DECISIVE: ClassVar[set[str]] = {
        "beta",
        "dataloader_drop_last",
        "disable_dropout",
        "discopop_tau",
        "f_alpha_divergence_coef",
        "f_divergence_type",
        "label_smoothing",
        "ld_alpha",
        "loss_type",
        "loss_weights",
        "max_length",
        "use_weighting",
    }
    REFUSED: ClassVar[Mapping[str, str]] = {
        name: reason
        for name, reason in SFTArguments.REFUSED.items()
        if name in DPOConfig.__dataclass_fields__ and name != "loss_type"
    } | {
        "padding_free": "TRL's trainer ignores it at present",
        "precompute_ref_batch_size": _REFERENCE,
        "precompute_ref_log_probs": _REFERENCE,
        "ref_model_mixup_alpha": _REFERENCE,
        "ref_model_sync_steps": _REFERENCE,
        "sync_ref_model": _REFERENCE,
    }

    sample_prompts: list[str] = field(
        default_factory=list,
        metadata={"help": "Questions answered at each evaluation. Without any, two of the held-out ones are taken."},
    )
    sample_tokens: int = field(default=128, metadata={"help": "The longest sample answer, in tokens."})
    length_prompts: int = field(
        default=16,
        metadata={"help": "Held-out prompts answered at each evaluation, to log how long answers are; 0: none."},
    )
    max_chosen_drop: float = field(
        default=0.1,
        metadata={
            "help": "Warn where held-out preferred answers are less likely than under the reference by more than "
            "this many nats per token."
        },
    )

    # Other defaults than DPOConfig's, each for a reason.
    activation_checkpointing: bool | None = field(
        default=True,
        metadata={
            "help": "Recompute activations in the backward pass. This takes a fifth longer and far less memory."
        },
    )
    eval_on_start: bool = field(default=True, metadata={"help": "Evaluate before the first step, to compare with."})

    def __post_init__(self):
        super().__post_init__()
        if self.max_length is None or self.max_length < 2:
            raise UserError(f"max_length={self.max_length}: give the number of tokens that an example is cut at")
        if self.activation_offloading and self.use_cpu:
            raise UserError("activation_offloading moves activations from a GPU to the CPU: leave it out on a CPU")
        if self.neftune_noise_alpha:
            raise UserError("neftune_noise_alpha would put noise into the reference as well: leave it out")
        if not self.beta > 0:
            raise UserError(f"beta={self.beta}: must be above 0")
        if self.max_chosen_drop < 0 or self.length_prompts < 0:
            raise UserError("max_chosen_drop and length_prompts cannot be negative")
        self._check_losses()

    compute_dtype = SFTArguments.compute_dtype

    def _check_losses(self) -> None:
        """Refuse losses that TRL does not have, and arguments that the chosen ones would ignore.

        Raises:
            UserError: the line names the argument and what it may be.
        """
        if unknown := [name for name in self.loss_type if name not in LOSSES]:
            raise UserError(f"loss_type={unknown[0]}: choose from {', '.join(LOSSES)}")
        if self.loss_type == ["sft"]:
            raise UserError("loss_type=sft alone learns no preference: add another, as in loss_type: [sigmoid, sft]")
        defaults = DPOConfig.__dataclass_fields__
        for name, losses in READ_BY.items():
            if getattr(self, name) != defaults[name].default and not set(self.loss_type) & set(losses):
                raise UserError(f"{name}={getattr(self, name)} is read by loss_type {', '.join(losses)} alone")
        if not 0 <= self.label_smoothing < 0.5:
            raise UserError(f"label_smoothing={self.label_smoothing}: must be at least 0 and below 0.5")
        if "exo_pair" in self.loss_type and self.label_smoothing == 0:
            raise UserError("loss_type=exo_pair needs a label_smoothing above 0, such as 1e-3")
        if self.ld_alpha is not None and not 0 <= self.ld_alpha <= 1:
            raise UserError(f"ld_alpha={self.ld_alpha}: must be between 0 and 1")
        if self.f_divergence_type not in DIVERGENCES:
            raise UserError(f"f_divergence_type={self.f_divergence_type}: choose from {', '.join(DIVERGENCES)}")
        if self.f_divergence_type != "reverse_kl" and not set(self.loss_type) <= set(OF_ANY_DIVERGENCE):
            raise UserError(
                f"f_divergence_type={self.f_divergence_type} goes with loss_type {', '.join(OF_ANY_DIVERGENCE)}"
            )
        if self.f_alpha_divergence_coef != 0.5 and self.f_divergence_type != "alpha_divergence":
            raise UserError("f_alpha_divergence_coef is read by f_divergence_type: alpha_divergence alone")
        if self.use_weighting and set(self.loss_type) & {"aot", "aot_unpaired"}:
            raise UserError("use_weighting does not go with loss_type aot and aot_unpaired, which sort the pairs")


@dataclass
class PreferenceModelArguments(AdapterArguments):
    """The adapter of an SFT run that is trained on, which is also the reference; or a base with a new adapter."""

    DECISIVE: ClassVar[set[str]] = {"adapter_sha256"}
    REPLACES: ClassVar[Mapping[str, tuple[str, ...]]] = {"adapter": ("model", "model_revision")}

    model: str | None = field(
        default=None,
        metadata={"help": "A causal LM to put a new adapter on, or where an adapter's base is now."},
    )
    adapter: str | None = field(
        default=None,
        metadata={"help": "The adapter to start from: the folder of an SFT run, or an adapter on the Hub."},
    )

    @property
    def adapter_sha256(self) -> str | None:
        """Of the adapter's weights, which a resumed run has to have as they were."""
        if self.adapter is None:
            return None
        return hashlib.sha256((adapter_folder(self.adapter) / SAFETENSORS_WEIGHTS_NAME).read_bytes()).hexdigest()

    def resolve(self) -> None:
        """Fill in what follows from the adapter: its base and how it was quantized, its rank and scale.

        Raises:
            UserError: no model, no such adapter, or settings that the adapter does not have.
        """
        if self.adapter is None:
            if self.model is None:
                raise UserError("give the adapter of an SFT run (--adapter runs/sft_qlora), or a model to start from")
            return
        folder = adapter_folder(self.adapter)
        config = adapter_config(folder)
        own: dict[str, object] = {
            "lora_r": config.r,
            "lora_alpha": config.lora_alpha,
            "lora_dropout": config.lora_dropout,
        }
        own["quantization"] = _quantization(folder)
        for name, value in own.items():
            given, default = getattr(self, name), AdapterArguments.__dataclass_fields__[name].default
            if given not in (value, default):
                raise UserError(f"{name}={given}: the adapter {self.adapter} has {value}; leave it out")
            setattr(self, name, value)
        if self.model is None:
            self.model, self.model_revision = config.base_model_name_or_path, config.revision

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """The adapter's own, or the base's; with a chat template and a padding token."""
        if self.adapter is None:
            return load_chat_tokenizer(self)
        tokenizer = load_tokenizer(str(adapter_folder(self.adapter)))
        add_chat_template(tokenizer)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer

    def put_adapter(self, base: PreTrainedModel) -> PeftModel:
        """The base with the SFT adapter on it, which is to be trained."""
        assert self.adapter is not None
        folder = adapter_folder(self.adapter)
        model = put_on(base, folder, adapter_config(folder))
        model.set_adapter("default")  # PEFT has frozen it
        return model


def _quantization(folder: Path) -> str:
    """How the base of a saved adapter was held.

    Raises:
        UserError: in 8 bits, or in 4 of another kind.
    """
    if not (folder / QUANTIZATION_CONFIG).exists():
        return "none"
    record = json.loads((folder / QUANTIZATION_CONFIG).read_text())
    if record.get("bnb_4bit_quant_type") != "nf4" or not record.get("bnb_4bit_use_double_quant"):
        raise UserError(f"{folder}: its base was not quantized as llmkit does it (NF4, double quantization)")
    return "nf4"
