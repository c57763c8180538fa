"""Small models and shards that many tests share."""

import json
import os
import signal
import sys
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


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> tuple:
    """Shards of some text with enough documents for a split, and their tokenizer: (Manifest, tokenizer)."""
    from llmkit.data.corpus import open_corpus
    from llmkit.data.shards import prepare_shards
    from llmkit.data.tokenizer import train_bpe_tokenizer

    folder = tmp_path_factory.mktemp("data")
    for number in range(40):
        (folder / f"{number}.txt").write_text("".join(f"{number} times {n} is {number * n}\n" for n in range(30)))
    corpus = open_corpus([str(folder / "*.txt")])
    tokenizer = train_bpe_tokenizer(corpus.documents(), 300)
    return prepare_shards(corpus, tokenizer, folder / "shards", validation_fraction=0.1), tokenizer


@pytest.fixture(scope="session")
def many_shards(data, tmp_path_factory) -> tuple:
    """As `data`, in a dozen shards for training: (Manifest, tokenizer)."""
    from llmkit.data.corpus import open_corpus
    from llmkit.data.shards import prepare_shards

    manifest, tokenizer = data
    corpus = open_corpus([str(manifest.directory.parent / "*.txt")])
    folder = tmp_path_factory.mktemp("many_shards")
    return prepare_shards(corpus, tokenizer, folder, validation_fraction=0.1, shard_tokens=1000), tokenizer


@pytest.fixture
def server(many_shards, tmp_path, monkeypatch):
    """The shards of `many_shards` at a URL, with an empty cache, and little patience."""
    from huggingface_hub import constants

    from llmkit.data import fetching
    from shard_server import serving

    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(fetching, "FIRST_PAUSE", 0.02)
    monkeypatch.setattr(fetching, "PATIENCE", 20.0)
    monkeypatch.setattr(fetching, "_told_until", 0.0)  # what an earlier test was told is told again
    with serving(many_shards[0].directory) as server:
        yield server


@pytest.fixture(scope="session")
def hellaswag(tmp_path_factory) -> str:
    """Questions in the official format, short enough for the tiny context."""
    path = tmp_path_factory.mktemp("hellaswag") / "hellaswag_val.jsonl"
    rows = [
        {"ind": n, "ctx": f"{n} times", "endings": [f"{m} is {n * m}" for m in (2, 3, 4, 5)], "label": n % 4}
        for n in range(9)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
HANDLERS = {number: signal.getsignal(number) for number in SIGNALS}


@pytest.fixture(autouse=True)
def own_signals():
    """Give the process its signals back, which a recipe that has run in it takes for the rest of its life."""
    yield
    stopping = sys.modules.get("llmkit.training.stopping")
    if stopping is not None and stopping._Requests.listening:
        signal.set_wakeup_fd(-1)
        for number, handler in HANDLERS.items():
            signal.signal(number, handler)
        stopping._Requests.listening = False
