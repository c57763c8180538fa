"""What older versions of the packages lack: the one place that asks which version is here."""

from dataclasses import dataclass, field

import transformers
from packaging.version import Version
from transformers import PreTrainedModel

from llmkit.training.mixin import ArgumentsMixin

RENAMES_CHECKPOINTING = Version(transformers.__version__) < Version("5.23")


@dataclass
class CheckpointingArguments(ArgumentsMixin):
    """`activation_checkpointing` also for transformers before 5.23, where it is called `gradient_checkpointing`.

    For TrainingArguments and its subclasses, before them in the list of bases.
    """

    activation_checkpointing: bool | None = field(
        default=None,
        metadata={
            "help": "Recompute activations in the backward pass. This takes a fifth longer and far less memory."
        },
    )
    activation_checkpointing_kwargs: dict | str | None = field(
        default=None, metadata={"help": "Keyword arguments of `activation_checkpointing_enable`."}
    )

    def __post_init__(self):
        if RENAMES_CHECKPOINTING:
            self.gradient_checkpointing = bool(self.activation_checkpointing)
            self.gradient_checkpointing_kwargs = self.activation_checkpointing_kwargs
        super().__post_init__()


def enable_activation_checkpointing(model: PreTrainedModel, kwargs: dict | str | None = None) -> None:
    """`model.activation_checkpointing_enable(kwargs)`, whose name is older before transformers 5.23."""
    if RENAMES_CHECKPOINTING:
        model.gradient_checkpointing_enable(kwargs)
    else:
        model.activation_checkpointing_enable(kwargs)
