"""GPT-2's configuration, and what a model of each size costs."""

import copy

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from llmkit.model.sizes import check_heads, preset_sizes


@strict
class GPT2Config(PreTrainedConfig):
    """The stock GPT-2 configuration (same names, same `model_type`) with dropout off unless asked for.

    Keys that change the stock architecture (`add_cross_attention`, `scale_attn_by_inverse_layer_idx`,
    `reorder_and_upcast_attn`, `scale_attn_weights`) are accepted with their stock default alone.
    """

    model_type = "gpt2"
    keys_to_ignore_at_inference = ["past_key_values"]
    attribute_map = {
        "hidden_size": "n_embd",
        "max_position_embeddings": "n_positions",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
    }

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int | None = None  # 4 * n_embd
    activation_function: str = "gelu_new"
    resid_pdrop: float | int = 0.0
    embd_pdrop: float | int = 0.0
    attn_pdrop: float | int = 0.0
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    use_cache: bool = True
    bos_token_id: int | None = 50256
    eos_token_id: int | list[int] | None = 50256
    pad_token_id: int | None = None
    tie_word_embeddings: bool = True
    # Stock switches that this model does not have, declared so that a checkpoint using one is refused, not misread.
    add_cross_attention: bool = False
    scale_attn_by_inverse_layer_idx: bool = False
    reorder_and_upcast_attn: bool = False
    scale_attn_weights: bool = True

    @classmethod
    def from_preset(cls, name: str, **kwargs) -> "GPT2Config":
        """The configuration of a published size, e.g. `from_preset("124M", vocab_size=50257)`.

        Raises:
            ValueError: no such size.
        """
        return cls(**{**preset_sizes(name), **kwargs})

    def validate_architecture(self):
        """Checked by `@strict` when a configuration is made."""
        super().validate_architecture()
        check_heads(self.n_embd, self.n_head)
        stock = {"add_cross_attention": False, "scale_attn_by_inverse_layer_idx": False}
        stock |= {"reorder_and_upcast_attn": False, "scale_attn_weights": True, "tie_word_embeddings": True}
        for key, value in stock.items():
            if getattr(self, key) != value:
                raise ValueError(f"{key}={getattr(self, key)} is not supported: only {key}={value} is GPT-2")

    def for_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> "GPT2Config":
        """A copy with the tokenizer's vocabulary size and special tokens."""
        config = copy.deepcopy(self)
        config.vocab_size = len(tokenizer)
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            setattr(config, name, getattr(tokenizer, name))
        return config

    def to_dict(self) -> dict:
        """With `n_ctx`, as OpenAI's configuration has it: llama.cpp's converter reads the context length there."""
        return {**super().to_dict(), "n_ctx": self.n_positions}

    @property
    def num_parameters(self) -> int:
        """Parameters of the model, the tied embedding counted once."""
        inner = self.n_inner or 4 * self.n_embd
        embeddings = (self.vocab_size + self.n_positions) * self.n_embd
        attention = 4 * self.n_embd**2 + 4 * self.n_embd  # c_attn: C x 3C + 3C, c_proj: C x C + C
        mlp = 2 * self.n_embd * inner + inner + self.n_embd
        layer_norms = 2 * self.n_embd
        return embeddings + self.n_layer * (attention + mlp + 2 * layer_norms) + layer_norms

    def flops_per_token(self, sequence_length: int | None = None) -> int:
        """Floating-point operations of forward and backward for one token in a sequence (default: a full block).

        6 per parameter in a matrix product (2 forward, 4 backward; position embeddings are looked up, not
        multiplied), and 12 * n_layer * n_embd * sequence_length for attention's two products, counted unmasked, as
        in PaLM's appendix B (Chowdhery et al. 2022) and nanoGPT.
        """
        sequence_length = sequence_length or self.n_positions
        matmul_parameters = self.num_parameters - self.n_positions * self.n_embd
        return 6 * matmul_parameters + 12 * self.n_layer * self.n_embd * sequence_length
