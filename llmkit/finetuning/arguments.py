"""The arguments of a fine-tuning run: SFTConfig and what is ours."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from trl import SFTConfig

from llmkit.errors import UserError
from llmkit.training.inherited_arguments import REFUSED
from llmkit.training.run_arguments import RunArguments

# Beside `llmkit.training.inherited_arguments`, of what SFTConfig adds, or what holds for fine-tuning alone.
FREE = {
    "activation_offloading",
    "dataset_num_proc",
    "eval_packing",
    "gradient_accumulation_steps",  # with the micro-batch and the ranks it is decisive: see ConversationTrainer
    "pad_to_multiple_of",
}
_MODEL = "the base model is stated as model, model_revision and quantization"
_TOKENIZER = "the tokenizer's own template and end token are trained, saved and merged"
_LABELS = "exactly the answers and the token that ends each are trained, which `llmkit audit` shows"
_FSDP = "4-bit weights, bf16 embeddings and float32 adapters cannot be sharded together: take DDP"


@dataclass
class SFTArguments(RunArguments, SFTConfig):
    """SFTConfig with what the machine is good for chosen by itself, and samples."""

    DECISIVE: ClassVar[set[str]] = {"dataloader_drop_last", "max_length", "packing", "shuffle_dataset"}
    REFUSED: ClassVar[Mapping[str, str]] = REFUSED | {
        "assistant_only_loss": _LABELS,
        "chat_template_path": _TOKENIZER,
        "completion_only_loss": _LABELS,
        "dataloader_persistent_workers": "a resumed run would draw other random numbers than one that went on",
        "dataset_kwargs": "conversations are encoded before the trainer sees them",
        "dataset_text_field": "the column is stated as text_column",
        "eos_token": _TOKENIZER,
        "fsdp": _FSDP,
        "fsdp_config": _FSDP,
        "loss_type": "the loss is the cross-entropy of the trained tokens (nll)",
        "model_init_kwargs": _MODEL,
        "packing_strategy": "conversations are packed whole (bfd), so that none sees another and the audit is right",
        "pad_token": _TOKENIZER,
        "padding_free": "packing: true does the same",
        "router_aux_loss_coef": "the loss of a mixture of experts is not supported",
        "train_sampling_strategy": "rows come in a random order, which a resumed run repeats",
        "truncation_mode": "a conversation that is too long loses its end, as the audit counts it",
        "trust_remote_code": "only the code of installed packages is run",
    }

    sample_prompts: list[str] = field(
        default_factory=list,
        metadata={"help": "Questions answered at each evaluation. Without any, two of the held-out ones are taken."},
    )
    sample_tokens: int = field(default=128, metadata={"help": "The longest sample answer, in tokens."})

    # Other defaults than SFTConfig's, each for a reason.
    activation_checkpointing: bool | None = field(
        default=True,
        metadata={
            "help": "Recompute activations in the backward pass. This takes a fifth longer and far less memory."
        },
    )
    eval_on_start: bool = field(default=True, metadata={"help": "Evaluate before the first step, for comparison."})

    def __post_init__(self):
        super().__post_init__()
        if self.max_length is None or self.max_length < 2:
            raise UserError(f"max_length={self.max_length}: give the number of tokens that an example is cut at")
        for name in ("dataset_num_proc", "pad_to_multiple_of"):
            if isinstance(number := getattr(self, name), int) and number < 1:
                raise UserError(f"{name}={number}: must be at least 1")
        if self.activation_offloading and self.use_cpu:
            raise UserError("activation_offloading moves activations from a GPU to the CPU: leave it out on a CPU")

    @property
    def compute_dtype(self) -> torch.dtype:
        """Of the frozen weights outside the linear layers, and of the products with them."""
        return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.mixed_precision, torch.float32)
