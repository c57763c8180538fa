"""The speedrun compares one change at a time: without tricks a run is its baseline, and a trick does what it says."""

import dataclasses
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from llmkit.data.arguments import DataArguments
from llmkit.model.arguments import ModelArguments
from llmkit.training.arguments import PretrainArguments
from llmkit.training.optimizers import MatrixMuon

ROOT = Path(__file__).parents[1]
TINY = {"block_size": 16, "n_layer": 1, "n_head": 2, "n_embd": 16, "total_batch_tokens": 64}
TINY |= {"per_device_train_batch_size": 4, "learning_rate": 1e-2, "muon_learning_rate": 1e-2, "warmup_steps": 0.1}


@pytest.fixture(autouse=True)
def benchmarks_importable(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)


def test_without_tricks_a_step_is_torchs_muon():
    from benchmarks.speedrun.tricks import Tricks, TriedMuon

    torch.manual_seed(0)
    matrix, gradient = torch.randn(16, 48), torch.randn(16, 48)
    ours, theirs = torch.nn.Parameter(matrix.clone()), torch.nn.Parameter(matrix.clone())
    ours.grad = theirs.grad = gradient
    TriedMuon([ours], 1e-2, 0.1, Tricks(), 1).step()
    torch.optim.Muon([theirs], lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw").step()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-7)


def test_with_what_has_won_a_step_is_llmkits():
    from benchmarks.speedrun.tricks import Tricks, TriedMuon

    torch.manual_seed(0)
    for shape, parts in (((16, 48), 3), ((16, 64), 1)):
        matrix, gradient = torch.randn(shape), torch.randn(shape)
        ours, tried = torch.nn.Parameter(matrix.clone()), torch.nn.Parameter(matrix.clone())
        ours.grad = tried.grad = gradient
        TriedMuon([tried], 1e-2, 0.1, Tricks(split_qkv=True), 1).step()
        MatrixMuon([ours], [parts], torch.bfloat16, lr=1e-2, weight_decay=0.1).step()
        torch.testing.assert_close(ours, tried, rtol=0, atol=1e-7)


def test_tricks_change_the_step():
    from benchmarks.speedrun.tricks import POLAR_EXPRESS, Tricks, TriedMuon

    torch.manual_seed(0)
    gradient = torch.randn(16, 48)

    def step(**tricks) -> torch.Tensor:
        return TriedMuon([torch.nn.Parameter(torch.zeros(1, 1))], 1.0, 0.0, Tricks(**tricks), 1).update(gradient, {})

    # Each third is orthogonal by itself: 0.2 * sqrt(16) in all directions, but for what the iteration is off.
    thirds = step(split_qkv=True, coefficients=POLAR_EXPRESS).chunk(3, dim=1)
    for third in thirds:
        assert torch.linalg.svdvals(third).sub(0.8).abs().max() < 0.15
    assert torch.linalg.svdvals(step(coefficients=POLAR_EXPRESS).chunk(3, dim=1)[0]).min() < 0.3
    normalized, plain = step(normalized=0.95), step()
    assert normalized.norm() == pytest.approx(plain.norm().item(), rel=1e-3)
    columns = normalized.norm(dim=0)
    assert columns.max() / columns.min() < 1.001 < plain.norm(dim=0).max() / plain.norm(dim=0).min()


def test_aligned_windows_stay_within_a_document(data):
    from benchmarks.speedrun.tricks import Tricks, windows

    manifest, _ = data
    aligned, _ = windows(manifest, 16, Tricks(aligned=True))
    plain, _ = windows(manifest, 16, Tricks())
    eos = manifest.eos_token_id
    inputs = np.concatenate([aligned[i]["input_ids"].numpy()[None] for i in range(len(aligned))])
    assert not (inputs == eos).any(), "a document's end is a target only"
    assert any((plain[i]["input_ids"] == eos).any() for i in range(len(plain)))
    stream = plain._read(0, plain.num_tokens)
    targets = {place + more for place in aligned.places for more in range(1, 17)}
    begins = set((np.flatnonzero(stream == eos) + 1).tolist())
    assert targets == set(range(1, len(stream))) - begins, "every token of a document but its first is a target"


def test_every_variant_is_keys_that_the_recipes_know():
    from benchmarks.speedrun.variants import TRACKS, VARIANTS, settings

    kinds = (DataArguments, ModelArguments, PretrainArguments)
    known = {field.name for kind in kinds for field in dataclasses.fields(kind)}
    for track in TRACKS:
        for variant in VARIANTS:
            keys = settings(track, variant, 1_024_000)
            assert keys.keys() <= known
            assert keys["max_steps"] * keys["total_batch_tokens"] == pytest.approx(1_024_000, rel=0.01)


@pytest.mark.parametrize("variant", ["baseline", "tail average", "short windows", "half batch"])
def test_a_run_has_its_loss_curve_and_its_time(data, variant, monkeypatch):
    from benchmarks.speedrun import train, variants

    monkeypatch.setitem(variants.TRACKS, "tiny", TINY)
    manifest, tokenizer = data
    result = train.train("tiny", variant, 0, 640, tokenizer, manifest)
    assert result["steps"] == (20 if variant == "half batch" else 10)
    assert [tokens for tokens, _ in result["curve"]] == [384, 448, 512, 576, 640]
    assert result["loss"] == result["curve"][-1][1] < 5.7 and result["processor_seconds"] > 0


def test_table_pairs_runs_of_a_seed():
    from benchmarks.speedrun.table import tables, tokens_to

    curve = [[60, 3.0], [80, 2.0], [100, 1.5]]
    assert tokens_to(curve, 1.75) == 90 and tokens_to(curve, 1.4) is None and tokens_to(curve, 3.5) == 60

    def line(variant, seed, loss, data="a"):
        curve = [[80, loss + 0.5], [100, loss]]
        more = {"tokens": 100, "trained_tokens": 100, "data": data, "curve": curve, "processor_seconds": 2.0}
        return {"variant": variant, "seed": seed, "loss": loss, "bits_per_byte": loss / 2, **more}

    lines = [line("baseline", seed, 2.0 + seed / 10) for seed in range(3)]
    lines += [line("NorMuon", seed, 1.9 + seed / 10 + seed / 1000) for seed in range(2)]
    lines += [line("linear", 0, 1.0, "other data")]
    ((key, rows),) = tables(lines).items()
    assert key == (100, "a")
    (name, seeds, loss, bits, difference, p, tokens, pace, in_time), last = rows
    assert (name, seeds, loss, difference) == ("NorMuon", "2", "1.9505", "-0.0498 *")
    assert bits.startswith("0.9752 ± ") and float(p) < 0.05
    assert (tokens, pace, in_time) == ("96", "1.04", "1.04")
    assert last[:4] == ["baseline", "3", "2.1000", "1.0500 ± 0.0289"]


def test_the_command_line_says_what_it_takes(monkeypatch, capsys):
    from benchmarks.speedrun import train

    monkeypatch.setattr(sys, "argv", ["train", "characters", "--tokens", "100"])
    with pytest.raises(SystemExit):
        train.main()
    assert "--text is for the track characters, which needs it" in capsys.readouterr().err
