"""Cross-entropy from hidden states, without ever holding the logits of a whole batch.

At a vocabulary of 50k the logits are the largest tensor of a training step: 16 sequences of 1,024 tokens need
3.3 GB for them in float32, and as much again for their gradient. Here the rows are taken a chunk at a time, and a
chunk's gradient is computed right after its loss, while its logits are still at hand. Nothing is recomputed: three
matrix products per row, as in the plain version, at the memory of one chunk.
"""

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

IGNORE_INDEX = -100

# Logits held at a time, in elements. CPUs: larger chunks gain nothing (measured: 512 to 1,024 rows of 50,257).
# GPUs: some thousand rows fill the chip, and half a gigabyte in float32 fits beside a model on a small one.
CHUNK_ELEMENTS = {"cpu": 2**25, "cuda": 2**27}

# Matrix products run fastest at sizes that the hardware's tiles divide: 50,257 columns become 50,304 (D2).
VOCAB_MULTIPLE = 128


class _LinearCrossEntropy(torch.autograd.Function):
    """Sum over rows of cross_entropy(hidden @ weight.T, targets), in nats, with its gradients made in forward."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, chunk_rows, dtype):
        needs_grad = any(ctx.needs_input_grad)
        vocab_size = weight.shape[0]
        # The padding columns are in the products alone: softmax, loss and gradients see `[:, :vocab_size]`.
        padded_weight = F.pad(weight.to(dtype), (0, 0, 0, -vocab_size % VOCAB_MULTIPLE))
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if needs_grad else None
        # Summed over chunks, so in float32 whatever the products' dtype is.
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_grad else None

        for start in range(0, hidden.shape[0], chunk_rows):
            rows = slice(start, start + chunk_rows)
            hidden_chunk = hidden[rows].to(dtype)  # (rows, n_embd)
            kept = (targets[rows] != IGNORE_INDEX).unsqueeze(-1)  # (rows, 1)
            target = targets[rows].unsqueeze(-1).where(kept, 0)
            product = hidden_chunk @ padded_weight.t()  # (rows, padded vocabulary)
            logits = product[:, :vocab_size].float()  # float32 already: a view, else a copy
            log_normalizer = logits.logsumexp(dim=-1, keepdim=True)
            total += (log_normalizer - logits.gather(-1, target)).where(kept, 0).sum()
            if needs_grad:
                # d loss / d logits = softmax - one_hot(target), and zero in rows without a target
                grad = logits.sub_(log_normalizer).exp_()
                grad.scatter_add_(-1, target, torch.full_like(log_normalizer, -1))
                grad.mul_(kept)
                if dtype != torch.float32:
                    product[:, :vocab_size] = grad
                product[:, vocab_size:] = 0
                grad_hidden[rows] = product @ padded_weight
                grad_weight += (product.t() @ hidden_chunk)[:vocab_size]

        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * grad_output, (grad_weight * grad_output).to(ctx.weight_dtype), None, None, None


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    num_items: torch.Tensor | int | None = None,
) -> torch.Tensor:
    """Cross-entropy of `hidden @ weight.T` against `targets`, a chunk of rows at a time.

    Args:
        hidden: final hidden states, (..., n_embd).
        weight: the output embedding, (vocab_size, n_embd).
        targets: token ids, already shifted, the shape of `hidden` without its last dimension; -100 is not counted.
        num_items: what the summed loss is divided by. Defaults to the number of targets here; a Trainer gives the
            number over all micro-batches and ranks of the step, so that accumulation does not change the gradient.

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
    total = _LinearCrossEntropy.apply(hidden, weight, targets, -(-rows // chunks), dtype)
    if num_items is None:
        num_items = (targets != IGNORE_INDEX).sum()
    return total / num_items
