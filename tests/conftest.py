"""Small models and shards that many tests share."""

import os
from pathlib import Path

import pytest

# No test reaches the Hub by accident; those that mean to are marked `network`.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Idle threads sleep instead of spinning: tests that start several processes would wait for each other.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

SHARED_DATA = Path(__file__).parents[2] / "shared" / "data"


def pytest_collection_modifyitems(items):
    import torch  # after the environment above, which its threads read once

    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture
def tiny_config() -> dict:
    """Sizes of a GPT-2 that runs in milliseconds; none is a multiple of another, so that mix-ups show."""
    return {"vocab_size": 211, "n_positions": 64, "n_embd": 48, "n_layer": 3, "n_head": 4, "eos_token_id": 0}
