"""Open checkpoints of any causal LM, with the code of installed packages alone."""

import json
import sys
from pathlib import Path

from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel


def open_config(place: str | Path, revision: str | None = None) -> PreTrainedConfig:
    """The configuration of a checkpoint: a folder, or a name on the Hub.

    Raises:
        OSError, ValueError: there is none, it is damaged, or it names code that is not installed: its own, or an
            attention kernel on the Hub, which transformers would download and run.
    """
    content, _ = PreTrainedConfig.get_config_dict(place, revision=revision)
    if kernel := _hub_kernel(content):
        raise ValueError(f"it asks for the attention kernel {kernel}, and only code of installed packages is run")
    return AutoConfig.from_pretrained(place, revision=revision, trust_remote_code=False)


def open_model(place: str | Path, revision: str | None = None, **how) -> PreTrainedModel:
    """A checkpoint's model, from safetensors.

    Args:
        place: a folder, or a name on the Hub.
        **how: dtype, device_map, quantization_config and the like, as `from_pretrained` has them.

    Raises:
        OSError, ValueError, ImportError, SafetensorError: it does not load, or see `open_config`.
    """
    config = open_config(place, revision)
    return AutoModelForCausalLM.from_pretrained(
        place, revision=revision, config=config, trust_remote_code=False, use_safetensors=True, **how
    )


def context_length(config: PreTrainedConfig) -> int:
    """The most tokens that a model reads; `sys.maxsize` where nothing limits it, as with Bloom's ALiBi."""
    return getattr(config, "max_position_embeddings", getattr(config, "max_seq_len", sys.maxsize))  # the latter: MPT


def _hub_kernel(content: dict) -> str | None:
    """The first attention implementation of a configuration, or of a part of it, that is a name on the Hub."""
    for key, value in content.items():
        if key.endswith("attn_implementation") and "/" in (text := json.dumps(value)):
            return text
        if isinstance(value, dict) and (found := _hub_kernel(value)):
            return found
    return None
