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
    from scaling import held_by_ddp, held_by_fsdp, sent_by_ddp, sent_by_fsdp

    parameters = 1_000
    assert sent_by_ddp(parameters, 1) == sent_by_fsdp(parameters, 1) == 0
    assert sent_by_ddp(parameters, 2) == 4_000  # half of the gradient to the other rank, and half of the sum
    assert sent_by_fsdp(parameters, 2) == 4_000  # a half of 2,000 bytes, twice, and of 4,000 once
    assert held_by_ddp(parameters) == 20_000
    assert held_by_fsdp(parameters, 4) == 4_000


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


def test_the_limit_replays_the_products_of_a_real_step():
    from limit import ALONE, STEP, measure
    from loops import SHAPES

    measured = measure(argparse.Namespace(**SHAPES["tiny"], steps=4, bf16=False, compile=False))
    parts = {"products", "attention", "loss", "optimizer", "element-wise", "Python", "Trainer"}
    assert parts | {ALONE, STEP} == measured.keys()
    assert measured[STEP] == pytest.approx(sum(measured[part] for part in parts))


def test_products_are_noted_with_the_layouts_that_they_have():
    import torch

    from limit import Products, seconds_alone

    x, weight = torch.randn(5, 3), torch.randn(3, 7)
    out = torch.empty(5, 8)
    with Products() as products:
        x @ weight
        x @ weight
        torch.mm(x, weight, out=out[:, :7])
        x + x
    assert sorted(products.counted.values()) == [1, 2]
    _, operands, named = next(product for product, count in products.counted.items() if count == 1)
    assert [layout[:2] for layout in operands] == [((5, 3), (3, 1)), ((3, 7), (7, 1))]
    assert named == (("out", ((5, 7), (8, 1), torch.float32)),)
    assert seconds_alone(products.counted) > 0


def test_what_is_alive_at_the_peak_is_what_a_plan_says(capsys, monkeypatch):
    import memory

    monkeypatch.setattr(sys, "argv", ["memory.py", "--n_layer", "2", "--vocab_size", "5001", "--batch_size", "2"])
    memory.main()
    table = dict(line.strip().rsplit(maxsplit=2)[:2] for line in capsys.readouterr().out.splitlines()[1:])
    parameters = (5001 + 256) * 384 + 2 * (12 * 384**2 + 13 * 384) + 2 * 384
    assert int(table["weights"]) == round(4 * parameters / 1e6)
    assert int(table["moments"]) == round(8 * parameters / 1e6)


def test_gpu_benchmarks_fit_20_minutes_and_need_a_gpu(capsys):
    import torch

    import gpu

    assert sum(minutes for *_, minutes in gpu.BENCHMARKS) < 20
    assert all((BENCHMARKS / command.split()[0]).is_file() for _, command, _ in gpu.BENCHMARKS)
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit):
            gpu.main()
        assert "there is no CUDA GPU here" in capsys.readouterr().err
