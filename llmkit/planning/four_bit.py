"""bitsandbytes' 4-bit layer on tensors without content.

`Params4bit` is a tensor class of its own, which no fake tensor can be. All that it stores and computes goes through
functions and operators of bitsandbytes that know fake tensors. So the layer here is bitsandbytes' own, with what
`quantize_4bit` makes of the weight in a plain parameter; the sizes and the forward and backward passes are theirs.
"""

from unittest.mock import patch

import bitsandbytes
import torch
from bitsandbytes import functional
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D


class PlainLinear4bit(bitsandbytes.nn.Linear4bit):
    """A linear layer in NF4 with double quantization, whose weight is a plain parameter with the state on it.

    Args:
        source: the dense layer, whose bias is kept.
        dtype: of the products.
    """

    def __init__(self, source: torch.nn.Linear | Conv1D, dtype: torch.dtype):
        weight = source.weight.t() if isinstance(source, Conv1D) else source.weight  # (out, in)
        how = {"compress_statistics": True, "quant_type": "nf4"}
        packed, state = functional.quantize_4bit(weight.detach().contiguous(), **how)
        # Linear4bit's own would make a Params4bit.
        torch.nn.Linear.__init__(self, weight.shape[1], weight.shape[0], bias=False, device="meta")
        self.compute_dtype, self.compute_type_is_set = dtype, True
        self.quant_state, self.quant_storage = state, packed.dtype
        self.weight = torch.nn.Parameter(packed, requires_grad=False)
        vars(self.weight).update(how, quant_state=state)  # what bitsandbytes and PEFT look for on a weight
        self.bias = source.bias
        # The statistics are stored as the weight is.
        assert state.state2 is not None, "double quantization"
        for name, value in (("absmax", state.absmax), ("code", state.code), ("absmax2", state.state2.absmax)):
            self.register_buffer(name, value, persistent=False)
        self.support_avx512bf16_for_cpu = False  # as `keep_training_layout` has it


def quantize_layers(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Replace all linear layers but the head, as transformers does where a model is loaded in 4 bits."""
    head = model.get_output_embeddings()
    # bitsandbytes keeps its code book for the statistics in a module's dict, and reads values to make it. Here it has
    # a book of that size in its place, which must not stay there.
    with patch.dict(functional.name2qmap, {"dynamic": torch.zeros(256)}):
        for name, module in list(model.named_modules()):
            if isinstance(module, torch.nn.Linear | Conv1D) and module is not head:
                model.set_submodule(name, PlainLinear4bit(module, dtype))
    vars(model)["is_loaded_in_4bit"] = True  # what PEFT asks
