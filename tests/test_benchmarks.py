"""The benchmarks compare equals: the same tokens, the same steps; and their tables say what was measured."""

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from llmkit.data.manifest import load_manifest
from llmkit.data.tokenizer import train_bpe_tokenizer

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(autouse=True)
def benchmarks_importable(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.setattr(sys, "argv", ["benchmark"])


def test_table_has_medians_spreads_and_the_median_of_the_ratios(capsys):
    from measuring import print_table

    ours, theirs = [{"tokens/s": speed} for speed in (10, 20, 40)], [{"tokens/s": speed} for speed in (10, 5, 20)]
    print_table({"ours": ours, "theirs": theirs}, {"tokens/s": ".0f"})
    _, first, second, _ = capsys.readouterr().out.splitlines()
    assert first.split() == ["ours", "20", "10..40", "1.00"]
    assert second.split() == ["theirs", "10", "5..20", "2.00"]


def test_definitions_are_taken_from_a_script_that_trains_when_imported(tmp_path):
    from loops import definitions

    script = tmp_path / "train_it.py"
    script.write_text(
        "import math\nfrom dataclasses import dataclass\nfrom hellaswag import nothing\n"
        "@dataclass\nclass Config:\n    width: int = 3\n    def area(self): return math.prod((self.width, SCALE))\n"
        "raise RuntimeError('training')\n"
    )
    assert definitions(script, SCALE=5).Config(width=2).area() == 10


def test_tiktoken_loop_writes_as_many_tokens_as_llmkit(tmp_path):
    from data import LENGTHS, documents, run_llmkit, run_tiktoken

    texts = documents(0.03, LENGTHS["short"])
    tokenizer = train_bpe_tokenizer(texts, 400)
    (tmp_path / "theirs").mkdir()
    tokens = run_tiktoken(texts, tokenizer, 1, tmp_path / "theirs")
    assert run_llmkit(texts, tokenizer, 1, tmp_path / "ours") == tokens > len(texts) == 100
    (shard,) = (tmp_path / "theirs").glob("*.npy")
    manifest = load_manifest(tmp_path / "ours")
    files = [tmp_path / "ours" / shard.name for split in manifest.splits.values() for shard in split.shards]
    ours = np.concatenate([np.fromfile(file, dtype=np.uint16) for file in files])
    # Held-out documents apart, and the end token after a document, not before: the same tokens, in another order.
    assert (np.sort(ours) == np.sort(np.load(shard))).all()


def test_grown_shards_are_a_manifest_that_loads(tmp_path):
    from data import documents, run_llmkit
    from startup import SHARD_TOKENS, grow

    texts = documents(0.02, 300)
    run_llmkit(texts, train_bpe_tokenizer(texts, 300), 1, tmp_path)
    for megabytes in (500, 1):
        grow(tmp_path, megabytes)
        train = load_manifest(tmp_path).splits["train"]
        assert train.tokens == sum(shard.tokens for shard in train.shards) == megabytes * 500_000
        assert max(shard.tokens for shard in train.shards) <= SHARD_TOKENS


def test_trainer_and_bare_loop_take_turns():
    from loops import SHAPES
    from trainer_overhead import WARMUP_STEPS, measure, profile

    shape = argparse.Namespace(**SHAPES["tiny"], steps=WARMUP_STEPS + 2, bf16=False, compile=False)
    measured = measure(shape)
    assert measured["Trainer"] - measured["bare loop"] == pytest.approx(measured["overhead, mean"])
    parts = profile(shape)
    assert {"forward", "backward", "optimizer", "callbacks", "fetch the batches"} < parts.keys()
    assert all(milliseconds > 0 for milliseconds in parts.values())


def test_bytes_sent_and_held():
    from scaling import held_by_ddp, sent_by_ddp, sent_by_fsdp

    parameters = 1_000
    assert sent_by_ddp(parameters, 1) == sent_by_fsdp(parameters, 1) == 0
    assert sent_by_ddp(parameters, 2) == 4_000  # half of the gradient to the other rank, and half of the sum
    assert sent_by_fsdp(parameters, 2) == 4_000  # a half of 2,000 bytes, twice, and of 4,000 once
    assert held_by_ddp(parameters) == 16_000


def test_command_line_prints_a_table_of_processes_that_took_turns(tmp_path):
    script = tmp_path / "turns.py"
    shutil.copy(BENCHMARKS / "measuring.py", tmp_path)
    script.write_text(
        "import argparse, measuring\nparser = argparse.ArgumentParser()\nmeasuring.add_options(parser, rounds=1)\n"
        "options = parser.parse_args()\n"
        "if options.peer:\n    measuring.report({'turn': options.turn, 'name': len(options.peer)})\n"
        "else:\n    print(measuring.take_turns(['a', 'bb'], options.rounds))\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True)
    expected = {peer: [{"turn": 0, "name": len(peer)}] for peer in ("a", "bb")}
    assert done.stdout.strip() == str(expected)
