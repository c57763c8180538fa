"""llmkit: train a GPT-2 from scratch and fine-tune a small language model with the Hugging Face stack."""

import importlib
import logging

__version__ = "0.1.0"

# The public names and where they live. They are loaded on demand: `llmkit --help` need not wait for torch.
_HOMES = {
    "DataArguments": "llmkit.data.arguments",
    "GPT2Config": "llmkit.model.configuration_gpt2",
    "GPT2LMHeadModel": "llmkit.model.modeling_gpt2",
    "PretrainArguments": "llmkit.training.arguments",
    "PretrainTrainer": "llmkit.training.pretrain_trainer",
    "TokenWindows": "llmkit.data.windows",
    "load_tokenizer": "llmkit.data.tokenizer",
    "open_corpus": "llmkit.data.corpus",
    "prepare_pretraining_data": "llmkit.data.prepare",
    "prepare_shards": "llmkit.data.shards",
    "train_bpe_tokenizer": "llmkit.data.tokenizer",
    "train_character_tokenizer": "llmkit.data.tokenizer",
}
__all__ = list(_HOMES)

# peft imports bitsandbytes whatever is trained, and its advice on kernels would be the first line of every run.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
