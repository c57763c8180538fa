"""Cross-entropy from hidden states, without ever holding the logits of a whole batch.

At a vocabulary of 50k the logits are the largest tensor of a training step: 16 sequences of 1,024 tokens need
3.3 GB for them in float32, and as much again for their gradient. Here the rows are taken a chunk at a time, and a
chunk's gradient is computed right after its loss, while its logits are still at hand. Nothing is recomputed: three
matrix products per row, as in the plain version, at the memory of one chunk.

torch 2.13 has `torch.nn.functional.linear_cross_entropy`; on CPU it was measured slower, and in bfloat16 less exact.
"""

from typing import TypeGuard

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

IGNORE_INDEX = -100

# Logits held at a time, in elements. CPUs: twice as many make the products 2 to 4% faster (333 to 667 rows of 50,257).
# GPUs: some thousand rows fill the chip, and half a gigabyte in float32 fits beside a model on a small one.
CHUNK_ELEMENTS = {"cpu": 2**24, "cuda": 2**27}

# A CPU's caches hold so many for the passes of the softmax; a GPU takes the chunk at once.
SOFTMAX_ELEMENTS = 2**20

# Matrix products run fastest at sizes that the hardware's tiles divide: 50,257 columns become 50,304 (D2).
VOCAB_MULTIPLE = 128

# Whether the weight is copied to be padded. On a CPU the products are as fast where only the rows of the logits are
# padded, so that each begins at such a multiple.
PADS_WEIGHT = {"cpu": False}
GRADIENT_ROWS = 2**13  # of the weight's gradient on a CPU, a part in bfloat16 before it is added to the sum
ROW_MULTIPLE = 128  # on GPUs: chunks of 64 x 1,024 rows would be 2,622


def _loss_and_gradient(logits, targets, vocab_size: int, needs_grad: bool) -> torch.Tensor:
    """The summed loss of some rows; with `needs_grad`, the logits become the gradient by them.

    Args:
        logits: (rows, padded vocabulary).
        targets: (rows,).
        vocab_size: columns from here on are padding, of probability zero.

    Returns:
        Nats, a float32 scalar. The gradient is softmax - one_hot, zero in rows without a target and in the padding.
    """
    kept = (targets != IGNORE_INDEX).unsqueeze(-1)  # (rows, 1)
    target = targets.unsqueeze(-1).where(kept, 0)
    logits[:, vocab_size:] = -torch.inf
    # What costs time beside the products is to read and write the wide tensor, so all of it happens in place.
    exp = logits.float()  # float32 already: the same memory, else a copy
    exp -= exp.amax(dim=-1, keepdim=True)
    target_logit = exp.gather(-1, target)
    exp.exp_()
    normalizer = exp.sum(dim=-1, keepdim=True)  # (rows, 1)
    nats = (normalizer.log() - target_logit).where(kept, 0).sum()
    if needs_grad:
        scale = kept / normalizer
        torch.mul(exp, scale, out=logits)
        # Here and not in `exp`, so that a compiler need not write that wide float32 tensor; `scatter_` does the same,
        # in bfloat16 on a CPU a hundred times slower.
        at_target = ((target_logit.exp() - normalizer) * scale).to(logits.dtype)
        logits[torch.arange(len(target), device=target.device), target.squeeze(-1)] = at_target.squeeze(-1)
    return nats


def _add_gradient(total: torch.Tensor, grad: torch.Tensor, hidden: torch.Tensor) -> None:
    """Add the weight's gradient by some rows to its sum.

    Args:
        total: (vocab_size, n_embd), float32 whatever the products' dtype is.
        grad: by the logits, (rows, vocab_size or more: what is padding there is left out).
        hidden: (rows, n_embd).
    """
    if grad.dtype == torch.float32:
        # Without a second tensor of the weight's size: on a CPU a fifth faster as well.
        total.addmm_(grad[:, : len(total)].t(), hidden)
    elif total.device.type == "cpu" and not torch.compiler.is_compiling():
        # A part at a time, which is as fast here and leaves out most of that tensor.
        grad = grad[:, : len(total)]
        for part, columns in zip(total.split(GRADIENT_ROWS), grad.split(GRADIENT_ROWS, dim=1), strict=True):
            part += columns.t() @ hidden
    else:
        total += (grad.t() @ hidden)[: len(total)]


class _LinearCrossEntropy(torch.autograd.Function):
    """Sum over rows of cross_entropy(hidden @ weight.T + bias, targets), in nats, and its gradients with it."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, chunk_rows, dtype):
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        needs_grad = needs_hidden or needs_weight or needs_bias
        vocab_size = weight.shape[0]
        weight, ctx.dtypes = weight.to(dtype), (weight.dtype, None if bias is None else bias.dtype)
        padding = -vocab_size % VOCAB_MULTIPLE
        pads_weight = PADS_WEIGHT.get(hidden.device.type, True) or torch.compiler.is_compiling()
        if padding and pads_weight:
            weight = F.pad(weight, (0, 0, 0, padding))
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        sums = {"dtype": torch.float32, "device": hidden.device}
        grad_weight = torch.zeros(vocab_size, hidden.shape[1], **sums) if needs_weight else None
        grad_bias = torch.zeros(vocab_size, **sums) if needs_bias else None

        softmax_rows = max(1, SOFTMAX_ELEMENTS // vocab_size) if hidden.device.type == "cpu" else chunk_rows
        for start in range(0, hidden.shape[0], chunk_rows):
            rows = slice(start, start + chunk_rows)
            hidden_chunk = hidden[rows].to(dtype)  # (rows, n_embd)
            # (rows, padded vocabulary)
            if pads_weight:
                logits = hidden_chunk @ weight.t()
            else:
                logits = hidden_chunk.new_empty(len(hidden_chunk), vocab_size + padding)
                torch.mm(hidden_chunk, weight.t(), out=logits[:, :vocab_size])
            if bias is not None:
                logits[:, :vocab_size] += bias
            for part, target in zip(logits.split(softmax_rows), targets[rows].split(softmax_rows), strict=True):
                # Not in place: under torch.compile, torch 2.11 loses the gradients of an output that was changed.
                total = total + _loss_and_gradient(part, target, vocab_size, needs_grad)
            grad = logits[:, : weight.shape[0]]
            if grad_hidden is not None:
                grad_hidden[rows] = grad @ weight
            if grad_weight is not None:
                _add_gradient(grad_weight, grad, hidden_chunk)
            if grad_bias is not None:
                grad_bias += grad.sum(dim=0, dtype=torch.float32)[:vocab_size]
            del logits, grad, part  # the next chunk's takes its place, not a place beside it

        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):  # pyrefly: ignore[bad-override]  torch's has a number of gradients, and this is one
        grad_hidden, grad_weight, grad_bias = ctx.saved_tensors
        weight_dtype, bias_dtype = ctx.dtypes
        # In place: they are needed once. A second backward pass over the same graph is refused by autograd.
        grad_hidden = None if grad_hidden is None else grad_hidden.mul_(grad_output)
        grad_weight = None if grad_weight is None else grad_weight.mul_(grad_output).to(weight_dtype)
        grad_bias = None if grad_bias is None else grad_bias.mul_(grad_output).to(bias_dtype)
        return grad_hidden, grad_weight, grad_bias, None, None, None


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    num_items: torch.Tensor | int | None = None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Cross-entropy of `hidden @ weight.T + bias` against `targets`, a chunk of rows at a time.

    Args:
        hidden: final hidden states, (..., n_embd).
        weight: the output embedding, (vocab_size, n_embd). No gradient is made for it where it is frozen.
        targets: token ids, already shifted, the shape of `hidden` without its last dimension; -100 is not counted.
        num_items: what the summed loss is divided by. Defaults to the number of targets here; a Trainer gives the
            number over all micro-batches and ranks of the step, so that accumulation does not change the gradient.
        bias: the head's, (vocab_size,), as Phi has one and GPT-2 has none.

    Returns:
        The loss in nats, a float32 scalar. Products run in autocast's dtype where autocast is on; softmax, loss and
        the sum of the weight's gradient are float32 always.
    """
    device_type = hidden.device.type
    autocast = torch.is_autocast_enabled(device_type)
    dtype = torch.get_autocast_dtype(device_type) if autocast else hidden.dtype
    hidden, targets = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    rows = hidden.shape[0]
    chunks = max(1, round(rows * weight.shape[0] / CHUNK_ELEMENTS.get(device_type, CHUNK_ELEMENTS["cuda"])))
    chunk_rows = max(1, -(-rows // chunks))
    if device_type != "cpu":
        chunk_rows = -(-chunk_rows // ROW_MULTIPLE) * ROW_MULTIPLE
    total = _LinearCrossEntropy.apply(hidden, weight, bias, targets, chunk_rows, dtype)
    if num_items is None:
        num_items = (targets != IGNORE_INDEX).sum()
    return total / num_items


def is_plain_head(head: nn.Module | None, hidden: torch.Tensor) -> TypeGuard[nn.Linear]:
    """Whether `linear_cross_entropy` with the head's weight gives what the head itself would.

    Only for a linear layer whose weight is on the device of the hidden states: an adapter on the head or a quantized
    one is a class of its own, and accelerate keeps the weight of an offloaded one elsewhere until it is called.
    """
    return type(head) is nn.Linear and head.weight.device == hidden.device


def head_cross_entropy(
    hidden: torch.Tensor, head: nn.Module, targets: torch.Tensor, num_items: torch.Tensor | int | None = None
) -> torch.Tensor:
    """Cross-entropy of `head(hidden)` against `targets`: in chunks where the head is plain, else from all its logits.

    Arguments and result as in `linear_cross_entropy`.
    """
    if is_plain_head(head, hidden):
        return linear_cross_entropy(hidden, head.weight, targets, num_items, head.bias)
    logits = head(hidden).flatten(0, -2).float()  # (rows, vocab_size)
    if num_items is None:
        num_items = (targets != IGNORE_INDEX).sum()
    return F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORE_INDEX, reduction="sum") / num_items
