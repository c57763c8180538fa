"""The model that a recipe describes: its shape, or the checkpoint it starts from.

Imports no torch before a model is made: a mistake in its shape is answered at once.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from llmkit.errors import UserError
from llmkit.hub_access import ask_hub_once
from llmkit.model.sizes import check_heads, preset_sizes
from llmkit.paths import check_names

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from llmkit.model.configuration_gpt2 import GPT2Config
    from llmkit.model.modeling_gpt2 import GPT2LMHeadModel

SHAPE = ("n_layer", "n_head", "n_embd", "block_size")


@dataclass
class ModelArguments:
    """The model's shape: a preset's, or its own where stated."""

    # A preset or a checkpoint on the command line takes the place of a shape, or the other one, in the recipe's file.
    REPLACES: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "preset": ("init_from", *SHAPE),
        "init_from": ("preset", *SHAPE),
    }

    preset: str | None = field(
        default=None, metadata={"help": "A published size: 124M, 355M, 774M, 1558M or gpt3-125M."}
    )
    init_from: str | None = field(
        default=None, metadata={"help": "Start from the weights of this checkpoint, such as openai-community/gpt2."}
    )
    block_size: int | None = field(default=None, metadata={"help": "The context length in tokens (n_positions)."})
    n_layer: int | None = field(default=None, metadata={"help": "The number of layers."})
    n_head: int | None = field(default=None, metadata={"help": "The number of attention heads of a layer."})
    n_embd: int | None = field(default=None, metadata={"help": "The width of the model, a multiple of n_head."})
    dropout: float = field(
        default=0.0, metadata={"help": "The dropout probability of embeddings, attention weights and residuals."}
    )
    attn_implementation: str = field(
        default="sdpa",
        metadata={
            "help": "The attention kernel: sdpa, eager, flex_attention or, where it is installed, flash_attention_2."
        },
    )

    def __post_init__(self):
        check_names(self, "init_from")
        # A relative path may be a name on the Hub for whoever reads the run's record elsewhere.
        if self.init_from is not None and os.path.isdir(self.init_from):
            self.init_from = os.path.abspath(self.init_from)
        self._check_shape()

    def _check_shape(self) -> None:
        shape = self._shape()
        if bad := [f"{key}={value}" for key, value in shape.items() if value < 1]:
            raise UserError(f"{', '.join(bad)}: must be at least 1")
        if not 0 <= self.dropout < 1:
            raise UserError(f"dropout={self.dropout}: it lies between 0 and 1")
        if self.init_from is not None:
            if self.preset or shape.keys() - {"n_positions"}:
                raise UserError("init_from brings its own shape: leave out preset, n_layer, n_head and n_embd")
            return
        try:
            sizes = preset_sizes(self.preset or "124M") | shape
            check_heads(sizes["n_embd"], sizes["n_head"])
        except ValueError as error:
            raise UserError(str(error)) from error

    def _shape(self) -> dict[str, int]:
        """The sizes that are stated, under the configuration's names."""
        shape = {"n_layer": self.n_layer, "n_head": self.n_head, "n_embd": self.n_embd, "n_positions": self.block_size}
        return {key: value for key, value in shape.items() if value is not None}

    def config(self) -> "GPT2Config":
        """The model's configuration, but for the vocabulary: see `GPT2Config.for_tokenizer`.

        Raises:
            UserError: an attention kernel that is not there, or a checkpoint whose configuration cannot be read.
        """
        from huggingface_hub.errors import StrictDataclassError
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        from llmkit.model.configuration_gpt2 import GPT2Config

        if self.attn_implementation not in (known := ["eager", *ALL_ATTENTION_FUNCTIONS.valid_keys()]):
            raise UserError(
                f"attn_implementation={self.attn_implementation}: choose one of {', '.join(sorted(known))}"
            )
        dropout = {"embd_pdrop": self.dropout, "attn_pdrop": self.dropout, "resid_pdrop": self.dropout}
        rest = {**dropout, "attn_implementation": self.attn_implementation}
        try:
            if self.init_from is None:
                return GPT2Config.from_preset(self.preset or "124M", **self._shape(), **rest)
            if not Path(self.init_from).exists():
                ask_hub_once()
            config = GPT2Config.from_pretrained(self.init_from, **rest)
            if self.block_size and self.block_size > config.n_positions:
                raise UserError(f"block_size={self.block_size} is more than {self.init_from}'s {config.n_positions}")
            return config
        except StrictDataclassError as error:
            raise UserError(str(error.__cause__)) from error
        except OSError as error:
            raise UserError(f"init_from={self.init_from}: its configuration was not read ({error})") from error
        except ValueError as error:
            raise UserError(str(error)) from error

    def model(self, tokenizer: "PreTrainedTokenizerBase", seed: int) -> "GPT2LMHeadModel":
        """A model with new weights, which the seed decides, or with those of `init_from`.

        Raises:
            UserError: a checkpoint that cannot be read, or has another vocabulary than the tokenizer.
        """
        import torch
        from transformers import set_seed

        from llmkit.model.modeling_gpt2 import GPT2LMHeadModel

        config = self.config()
        set_seed(seed)
        try:
            if self.init_from is None:
                return GPT2LMHeadModel(config.for_tokenizer(tokenizer))
            if (config.vocab_size, config.eos_token_id) != (len(tokenizer), tokenizer.eos_token_id):
                raise UserError(
                    f"{self.init_from} has {config.vocab_size} tokens and ends with {config.eos_token_id}, the "
                    f"tokenizer {len(tokenizer)} and {tokenizer.eos_token_id}: give --tokenizer {self.init_from}"
                )
            # Trained weights and their moments are float32, whatever the checkpoint was stored in; autocast makes the
            # products bfloat16.
            return GPT2LMHeadModel.from_pretrained(
                self.init_from, config=config, dtype=torch.float32, use_safetensors=True
            )
        except (ValueError, OSError, ImportError) as error:
            raise UserError(str(error)) from error
