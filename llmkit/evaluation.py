"""Numbers that say how good a language model is on held-out text."""

import math


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
