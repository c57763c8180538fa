"""GPT-2 (Radford et al. 2019), whole, in the order a batch takes through it.

Parameters have the stock model's names, shapes and orientation, so a checkpoint of one is a checkpoint of the other:
what is trained here opens in `transformers` and in programs that read its checkpoints (docs/using.md lists those that
`llmkit verify` was run with), and what the stock class has saved opens here.
The difference is in training: the loss comes from the hidden states (`llmkit.model.loss`), and logits of a whole batch
are never made.

In the shape comments: B sequences, T tokens each, C = n_embd, H = n_head heads of D = C / H, V = vocab_size.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel, initialization
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.pytorch_utils import Conv1D  # a linear layer whose weight is (in, out), as OpenAI stored it
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from llmkit.model.configuration_gpt2 import GPT2Config
from llmkit.model.loss import IGNORE_INDEX, head_cross_entropy

# The width from which training computes the activation function twice and does not keep its result. This saves a fifth
# of the activations. At 128 it made a step in bfloat16 on a CPU 1 to 3% longer and its memory no smaller.
# torch.compile makes its own choice, and keeps the result.
RECOMPUTE_FROM: int = 256


def eager_attention(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """softmax(QK^T * scaling + mask) V with the weights at hand: what `output_attentions` needs, else use SDPA."""
    weights = query @ key.transpose(-1, -2) * scaling  # (B, H, T, T_past + T)
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = F.softmax(weights, dim=-1, dtype=torch.float32).to(value.dtype)
    output = F.dropout(weights, p=dropout, training=module.training) @ value  # (B, H, T, D)
    return output.transpose(1, 2), weights


def positions_to_keep(x: torch.Tensor, logits_to_keep: int | torch.Tensor) -> torch.Tensor:
    """The hidden states (B, T, C) whose logits are wanted, as transformers >= 5.21 has it in `slice_logits_to_keep`.

    Args:
        logits_to_keep: the number of last positions (0: all), or positions for every row (1-D) or for each (2-D), or
            a boolean mask (B, T), which gives (positions, C).
    """
    if isinstance(logits_to_keep, int):
        return x[:, -logits_to_keep:]
    if logits_to_keep.ndim == 1:
        return x[:, logits_to_keep]
    if logits_to_keep.dtype == torch.bool:
        return x[logits_to_keep]
    return torch.take_along_dim(x, logits_to_keep.unsqueeze(-1), dim=1)


class GPT2Attention(nn.Module):
    is_causal = True  # read by SDPA and flash attention: no mask tensor is needed for a plain causal pattern

    def __init__(self, config: GPT2Config, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.n_embd // config.n_head
        self.scaling = self.head_dim**-0.5
        self.c_attn = Conv1D(3 * config.n_embd, config.n_embd)
        self.c_proj = Conv1D(config.n_embd, config.n_embd)
        self.c_proj.is_residual_projection = True  # pyrefly: ignore[bad-argument-type]  torch's __setattr__

    def forward(self, x, past_key_values: Cache | None, attention_mask, **kwargs):
        B, T, C = x.shape
        query, key, value = self.c_attn(x).split(C, dim=-1)  # 3 times (B, T, C)
        # (B, T, C) -> (B, T, H, D) -> (B, H, T, D)
        query, key, value = (t.view(B, T, -1, self.head_dim).transpose(1, 2) for t in (query, key, value))
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)  # (B, H, T_past + T, D)
        # private: the implementation in use has no public name.
        # pyrefly: ignore[bad-argument-type]  it is None in a configuration only, which no model has yet
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        dropout = self.config.attn_pdrop if self.training else 0.0
        x, weights = attend(
            self, query, key, value, attention_mask, scaling=self.scaling, dropout=dropout, **kwargs
        )  # (B, T, H, D)
        x = self.c_proj(x.reshape(B, T, C))
        return F.dropout(x, self.config.resid_pdrop, self.training), weights


class GPT2MLP(nn.Module):
    def __init__(self, config: GPT2Config):
        super().__init__()
        inner = config.n_inner or 4 * config.n_embd
        self.config = config
        self.c_fc = Conv1D(inner, config.n_embd)
        self.c_proj = Conv1D(config.n_embd, inner)
        self.c_proj.is_residual_projection = True  # pyrefly: ignore[bad-argument-type]  torch's __setattr__
        # gelu_new is the same function spelled out in eight operations, each of which keeps its result for backward.
        name = config.activation_function
        self.act = ACT2FN["gelu_pytorch_tanh" if name == "gelu_new" else name]

    def forward(self, x):
        x = self.c_fc(x)  # (B, T, C) -> (B, T, 4C)
        recomputes = self.config.n_embd >= RECOMPUTE_FROM and not torch.compiler.is_compiling()
        if recomputes and self.training and torch.is_grad_enabled():
            # The backward pass needs act(x), which is as large as x, and computes it again rather than keep both.
            # c_proj itself is not run again: the recomputation ends where it has what was not kept.
            x = checkpoint(self._project, x, use_reentrant=False)
        else:
            x = self._project(x)
        return F.dropout(x, self.config.resid_pdrop, self.training)

    def _project(self, x):
        return self.c_proj(self.act(x))  # (B, T, 4C) -> (B, T, C)


class GPT2Block(GradientCheckpointingLayer):
    """Pre-LN: each half normalises its input and adds its output to the residual stream."""

    def __init__(self, config: GPT2Config, layer_idx: int):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = GPT2Attention(config, layer_idx)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = GPT2MLP(config)

    def forward(self, x, past_key_values: Cache | None = None, attention_mask=None, **kwargs):
        x = x + self.attn(self.ln_1(x), past_key_values, attention_mask, **kwargs)[0]
        return x + self.mlp(self.ln_2(x))


class GPT2PreTrainedModel(PreTrainedModel):
    config: GPT2Config
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    # private: what a model can do, transformers reads from these attributes of its class, and from nowhere else.
    _no_split_modules = ["GPT2Block"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {
        "hidden_states": GPT2Block,
        "attentions": OutputRecorder(GPT2Attention, layer_name=".attn", index=1),
    }
    # Causal masks, which OpenAI's checkpoints hold as buffers and nobody reads any more.
    _keys_to_ignore_on_load_unexpected = [r"attn\.(masked_)?bias$"]

    # private: the one place where transformers lets a model say how its weights begin.
    @torch.no_grad()
    def _init_weights(self, module):
        """N(0, 0.02), biases zero, LayerNorms one and zero; projections into the residual stream at
        0.02 / sqrt(2 * n_layer), since 2 * n_layer of them add up there."""
        super()._init_weights(module)
        if isinstance(module, Conv1D):
            # Marked on the leaf: modules without parameters of their own are never visited here.
            is_residual_projection = getattr(module, "is_residual_projection", False)
            scale = 1 / math.sqrt(2 * self.config.n_layer) if is_residual_projection else 1.0
            initialization.normal_(module.weight, mean=0.0, std=self.config.initializer_range * scale)
            initialization.zeros_(module.bias)


class GPT2Model(GPT2PreTrainedModel):
    def __init__(self, config: GPT2Config):
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.h = nn.ModuleList(GPT2Block(config, layer_idx) for layer_idx in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.post_init()

    def get_input_embeddings(self):
        return self.wte

    def set_input_embeddings(self, value):
        self.wte = value

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """Token ids or embeddings to final hidden states (B, T, C). Arguments as in `GPT2LMHeadModel.forward`."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.wte(input_ids)  # (B, T, C)
        past_length = past_key_values.get_seq_length() if past_key_values is not None else 0
        self._check_length(past_length, inputs_embeds.shape[1], position_ids)

        # Before a cache is made: positions that restart (packed documents) are only seen where there is none.
        causal_mask = create_causal_mask(
            self.config, inputs_embeds, attention_mask, past_key_values, position_ids=position_ids
        )
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            position_ids = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device).unsqueeze(0) + past_length

        x = F.dropout(inputs_embeds + self.wpe(position_ids), self.config.embd_pdrop, self.training)
        for block in self.h:
            x = block(
                x,
                past_key_values=past_key_values,
                attention_mask=causal_mask,
                position_ids=position_ids,
                use_cache=use_cache,
                **kwargs,
            )
        return BaseModelOutputWithPast(
            last_hidden_state=self.ln_f(x), past_key_values=past_key_values if use_cache else None
        )

    def _check_length(self, past_length, new_length: int, position_ids) -> None:
        if not isinstance(past_length, int):
            return  # a static cache counts in a tensor: reading it would stall the device and break a compiled graph
        length, limit = past_length + new_length, self.config.n_positions
        if length > limit and (position_ids is None or position_ids.max() >= limit):
            raise ValueError(
                f"a sequence of {length} tokens does not fit the model's context of n_positions={limit}: "
                "shorten the prompt or generate fewer tokens (max_new_tokens)"
            )


class GPT2LMHeadModel(GPT2PreTrainedModel, GenerationMixin):
    # private: transformers reads from the class which weights are one, and which are left out of a checkpoint.
    _tied_weights_keys = {"lm_head.weight": "transformer.wte.weight"}
    _keys_to_ignore_on_save = ["lm_head.weight"]  # tied: Trainer need not warn that a checkpoint lacks it

    def __init__(self, config: GPT2Config):
        super().__init__(config)
        # transformers guesses it from the class's name and finds nothing; Trainer counts the targets by it.
        self.loss_type = "ForCausalLM"
        self.transformer = GPT2Model(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        shift_labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """Logits of the next token, or the loss.

        Args:
            input_ids: (B, T).
            past_key_values: keys and values of earlier tokens.
            attention_mask: (B, T_past + T), 0 at padding.
            position_ids: (B, T) or (1, T). Positions that restart at 0 within a row mark packed documents: attention
                then stays within a document.
            inputs_embeds: (B, T, C), in place of `input_ids`.
            labels: (B, T), the input ids again; shifted here, so that token t predicts t + 1. -100 is not counted.
            shift_labels: (B, T), in place of `labels`: targets already shifted, the one at t follows the token at t.
            use_cache: return the cache; by default only where there are no targets.
            logits_to_keep: without `labels` or in evaluation, the number of last positions whose logits are made (0
                is all of them), or which positions: see `positions_to_keep`.
            num_items_in_batch: what the summed loss is divided by; the number of targets in this batch by default.

        Returns:
            `logits` (B, T or logits_to_keep, V), and with targets `loss`, in nats per token. While training with
            targets there are no logits: making them is what the loss is spared.

        Raises:
            ValueError: the sequence is longer than `config.n_positions`.
        """
        if labels is not None and shift_labels is None:
            shift_labels = F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
        if use_cache is None and shift_labels is not None:
            use_cache = False
        outputs = self.transformer(
            input_ids=input_ids,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        x = outputs.last_hidden_state  # (B, T, C)
        loss = logits = None
        if shift_labels is not None:
            loss = head_cross_entropy(x, self.lm_head, shift_labels, num_items_in_batch)
        if shift_labels is None or not self.training:
            logits = self.lm_head(positions_to_keep(x, logits_to_keep))
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
