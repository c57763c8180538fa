"""Numbers that say how good a language model is on held-out text."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch.utils.data import Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmkit.data.corpus import Corpus
from llmkit.data.encoding import fastest_encoder
from llmkit.data.windows import IGNORED, TokenWindows
from llmkit.errors import UserError


def loss_metrics(nats: float, tokens: int, tokens_per_byte: float | None) -> dict[str, float]:
    """Loss, perplexity and bits per byte from the summed cross-entropy of held-out text.

    Loss and perplexity are per token, so they compare models of one tokenizer. Bits per byte do not depend on the
    tokenizer: the bits that the model needs to encode the text, end-of-text tokens included, over its UTF-8 bytes.

    Args:
        nats: cross-entropy summed over the tokens.
        tokens: how many were predicted.
        tokens_per_byte: tokens over UTF-8 bytes of the whole split that they come from; None leaves bits per byte out.
    """
    loss = nats / tokens
    metrics = {"loss": loss, "perplexity": math.exp(loss) if loss < 700 else math.inf}
    if tokens_per_byte is not None:
        metrics["bits_per_byte"] = loss / math.log(2) * tokens_per_byte
    return metrics


class TextWindows(Dataset):
    """Text in a tokenizer's own tokens, cut as a validation split of token shards is: see `TokenWindows`.

    Documents follow each other with the end-of-text token between them and after the last one, and a window goes on
    over these ends, as in training; no other special token is added. Every token but the very first is a target once,
    with the tokens before it in its window as its context.

    Args:
        corpus: the documents; their tokens are held in memory, 8 bytes each.
        block_size: targets in a window.

    Raises:
        UserError: a text of less than two tokens.
    """

    def __init__(self, corpus: Corpus, tokenizer: PreTrainedTokenizerBase, block_size: int):
        encode, _ = fastest_encoder(tokenizer)
        documents, self.num_bytes = [], 0
        for document in corpus.documents():
            documents.append(encode([document])[0])
            self.num_bytes += len(document.encode())
        tokens = np.concatenate(documents).astype(np.int32)
        self.num_tokens = len(tokens)
        if self.num_tokens < 2:
            raise UserError(f"{corpus.description}: a text of {self.num_tokens} token(s) predicts nothing: give more")
        missing = -(self.num_tokens - 1) % block_size
        self.inputs = np.pad(tokens[:-1], (0, missing), constant_values=tokenizer.eos_token_id).reshape(-1, block_size)
        self.targets = np.pad(tokens[1:], (0, missing), constant_values=IGNORED).reshape(-1, block_size)
        self.block_size = block_size

    @property
    def tokens_per_byte(self) -> float:
        return self.num_tokens / self.num_bytes

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitems__(self, indices: list[int]) -> dict[str, torch.Tensor]:
        """`input_ids` and `shift_labels`, both (B, T) and int64."""
        batch = {"input_ids": self.inputs[indices], "shift_labels": self.targets[indices]}
        return {name: torch.from_numpy(rows.astype(np.int64)) for name, rows in batch.items()}


@torch.no_grad()
def evaluate_windows(
    model: PreTrainedModel, windows: TokenWindows | TextWindows, batch_size: int, accelerator: Accelerator
) -> dict[str, float]:
    """`loss`, `perplexity` and `bits_per_byte` of any causal language model, the windows shared out over the ranks.

    Memory is that of one batch's logits, and one row's in float32.
    """
    model.eval()
    sums = torch.zeros(2, dtype=torch.float64)  # nats, targets
    starts = range(0, len(windows), batch_size)
    mine = starts[accelerator.process_index :: accelerator.num_processes]
    hidden = None if accelerator.is_main_process else True  # None: where stderr is not a terminal
    for start in tqdm(mine, desc="loss", leave=False, disable=hidden):
        batch = windows.__getitems__(list(range(start, min(start + batch_size, len(windows)))))
        labels = batch["shift_labels"].to(model.device)
        logits = model(input_ids=batch["input_ids"].to(model.device), use_cache=False).logits  # (B, T, V)
        for row, targets in zip(logits, labels, strict=True):
            nats = F.cross_entropy(row.float(), targets, ignore_index=IGNORED, reduction="sum")
            sums += torch.tensor([nats.item(), (targets != IGNORED).sum().item()], dtype=torch.float64)
    # Two numbers of each rank, as objects: not every device that reduces tensors has float64.
    nats, targets = np.sum(gather_object([sums.tolist()]), axis=0)
    return loss_metrics(nats, int(targets), windows.tokens_per_byte)
