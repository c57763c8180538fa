"""DPOTrainer's head at the positions of answers alone.

The head that TRL puts on a model takes log-probabilities from hidden states, a tile of logits at a time. On a GPU it
does so at the positions that have a label, elsewhere at all of them, prompts and padding too. On a CPU, with the
quickstart's model, batches and vocabulary of 4,096, a fifth of the positions have a label, and the head took 71% of a
training step's time.
"""

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import ModelOutput

from llmkit.model.loss import IGNORE_INDEX

PER_TOKEN = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1", "label_mask")


class AnswerPositions:
    """Hooks on a model with TRL's head: hidden states and labels go in without the other positions, and what comes
    out gets zeros there, which is what the head itself returns.

    Args:
        model: a causal language model on which `add_fused_lm_head` was called.
    """

    def __init__(self, model: PreTrainedModel):
        self.has_label: torch.Tensor | None = None  # (B, T - 1), during a forward pass
        model.register_forward_pre_hook(self._take_labels, with_kwargs=True)
        model.base_model.register_forward_hook(self._take_hidden_states)
        model.register_forward_hook(self._put_back)

    def _take_labels(self, model: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if not kwargs.get("fused_lm_head"):
            return args, kwargs
        labels = kwargs["labels"][:, 1:]
        has_label = labels != IGNORE_INDEX
        if not has_label.any():  # of a batch that only fills an evaluation
            return args, kwargs
        self.has_label = has_label
        return args, kwargs | {"labels": None, "shift_labels": labels[has_label].unsqueeze(0)}  # (1, N)

    def _take_hidden_states(self, backbone: nn.Module, args: tuple, output: ModelOutput) -> None:
        if self.has_label is not None:
            hidden = output["last_hidden_state"]  # (B, T, C)
            output["last_hidden_state"] = hidden[:, :-1][self.has_label].unsqueeze(0)  # (1, N, C)

    def _put_back(self, model: nn.Module, args: tuple, output: ModelOutput) -> None:
        if self.has_label is None:
            return
        for name in PER_TOKEN:
            if (values := output.get(name)) is not None:
                output[name] = values.new_zeros(self.has_label.shape).masked_scatter(self.has_label, values)
        self.has_label = None
