"""`benchmarks/ladder.py`: every rung trains the same model, and the table and the picture say what was measured."""

import argparse
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

ROOT = Path(__file__).parents[2]
SIZES = {"n_layer": 1, "n_embd": 32, "n_head": 2, "block_size": 16, "batch_size": 2, "vocab_size": 100}


@pytest.fixture(scope="module")
def ladder():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import ladder

        yield ladder
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))


def test_every_rung_has_the_same_loss(ladder):
    """To rounding; but for the padded one, whose further tokens take a share of the softmax."""
    sizes = argparse.Namespace(**SIZES)
    torch.manual_seed(0)
    ids = torch.randint(sizes.vocab_size, (2, sizes.block_size + 1))
    rungs = {name: rung for name, rung in ladder.rungs().items() if name in ("float32", "SDPA", "chunked loss")}
    weights = ladder.make_model(rungs["float32"], sizes).state_dict()
    losses = []
    for rung in rungs.values():
        model = ladder.make_model(rung, sizes).train()
        model.load_state_dict(weights)
        losses.append(ladder.loss_of(model, rung, ids).item())
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)
    padded = ladder.make_model(ladder.rungs()["padded"], sizes)
    assert padded.config.vocab_size == 128 and padded.lm_head.weight.shape[0] == 128


def test_the_table_says_how_much_each_rung_gained(ladder):
    results = {name: [] for name in ladder.rungs(without=["compile"])}
    for position, rounds in enumerate(results.values()):
        rounds += [{"seconds": [0.1 / 2**position, 0.1 / 2**position], "memory": 5e6}] * 2
    rows = ladder.summarize(results, tokens=100)
    assert [row.over_before for row in rows] == pytest.approx([1.0] + [2.0] * (len(rows) - 1))
    assert rows[-1].over_first == pytest.approx(2 ** (len(rows) - 1)) and rows[0].speed == pytest.approx(1000)
    text = ladder.table(rows)
    assert all(name in text for name in ladder.CHANGES) and "compile skipped: left out" in text
    assert text.count("skipped: ") == 1 + len(ladder.CHANGES) - len(rows)


def test_what_is_measured(ladder, tmp_path):
    """The lowest and the highest rung, in this process, down to the picture."""
    sizes = argparse.Namespace(**SIZES, steps=2)
    rungs = ladder.rungs(without=["TF32", "bf16", "SDPA", "compile", "padded", "fused AdamW"])
    assert list(rungs) == ["float32", "chunked loss"]
    results = {name: [ladder.measure(rung, sizes)] for name, rung in rungs.items()}
    assert all(len(rounds[0]["seconds"]) == 2 for rounds in results.values())
    ladder.draw(ladder.summarize(results, tokens=32), "two rungs", str(tmp_path / "ladder.png"))
    with Image.open(tmp_path / "ladder.png") as image:
        assert image.size[0] > 600
