"""llmkit: train a GPT-2 from scratch and fine-tune a small language model with the Hugging Face stack."""

import logging

__version__ = "0.1.0"
__all__ = ["GPT2Config", "GPT2LMHeadModel"]

# peft imports bitsandbytes whatever is trained, and its advice on kernels would be the first line of every run.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def __getattr__(name):
    # Loaded on demand: `llmkit --help` need not wait for torch.
    if name == "GPT2Config":
        from llmkit.model.configuration_gpt2 import GPT2Config

        return GPT2Config
    if name == "GPT2LMHeadModel":
        from llmkit.model.modeling_gpt2 import GPT2LMHeadModel

        return GPT2LMHeadModel
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
