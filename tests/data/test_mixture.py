"""Several sources: each step has the share of each that its weights say, and no window is drawn twice in a pass."""

import itertools
from collections import Counter

import numpy as np
import pytest
import torch
from test_windows import make_manifest

from llmkit.data.arguments import DataArguments
from llmkit.data.mixture import MixedWindows, compositions
from llmkit.data.windows import IGNORED, TokenWindows
from llmkit.errors import UserError
from llmkit.training.batch_ramp import Batches

BLOCK = 8
LENGTHS = {"web": 50, "code": 20, "books": 7}  # windows


def mixed(tmp_path, weights, split="train"):
    sources = {}
    for name in weights:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        manifest = make_manifest(folder, [LENGTHS[name] * BLOCK + 1], [BLOCK + 3])
        manifest.settings |= {"tokenizer": "t", "corpus": name}
        sources[name] = TokenWindows(manifest, split, BLOCK)
    return MixedWindows(sources, weights)


def constant(**weights):
    return {name: {0: weight} for name, weight in weights.items()}


def counts(weights, sizes):
    """Windows of each source in each step."""
    return np.diff(compositions(list(weights.values()), np.array(sizes)), axis=0)


def test_steps_have_exactly_the_shares_that_divide(tmp_path):
    assert counts(constant(web=2, code=1, books=1), [8] * 5).tolist() == [[4, 2, 2]] * 5
    assert counts(constant(web=0.7, code=0.2, books=0.1), [10] * 40).tolist() == [[7, 2, 1]] * 40
    assert counts(constant(web=1, code=0), [3] * 4).tolist() == [[3, 0]] * 4


@pytest.mark.parametrize("seed", range(5))
def test_what_rounding_takes_a_source_gets_later(seed):
    rng = np.random.default_rng(seed)
    weights = {str(k): {0: float(w)} for k, w in enumerate(rng.random(rng.integers(2, 9)) + 0.001)}
    sizes = rng.integers(1, 30, 400)
    drawn = compositions(list(weights.values()), sizes)
    shares = np.array([weight[0] for weight in weights.values()])
    wanted = sizes.cumsum()[:, None] * shares / shares.sum()
    assert (np.diff(drawn, axis=0) >= 0).all() and (np.diff(drawn, axis=0).sum(axis=1) == sizes).all()
    assert np.abs(drawn[1:] - wanted).max() < 1


def test_weights_change_at_their_step():
    weights = {"web": {0: 3, 4: 1, 6: 0}, "code": {0: 1}, "books": {0: 0, 6: 1}}
    assert counts(weights, [4] * 8).tolist() == [[3, 1, 0]] * 4 + [[2, 2, 0]] * 2 + [[0, 2, 2]] * 2


@pytest.mark.parametrize("micro_batches", [1, 2, 4])
def test_a_step_is_the_same_however_it_is_shared_out(tmp_path, micro_batches):
    """At other numbers of ranks a step has other micro-batches and the same windows, in the same order."""
    windows = mixed(tmp_path, constant(web=0.5, code=0.3, books=0.2))
    sampler = windows.sampler(Batches(10, full=8, micro_batches=micro_batches, start=8), seed=3)
    batches = list(sampler)
    assert len(batches) == len(sampler) == 10 * micro_batches
    steps = [sum(batches[at : at + micro_batches], []) for at in range(0, len(batches), micro_batches)]
    assert steps == [sampler.step_windows(step) for step in range(10)]
    whole = mixed(tmp_path, constant(web=0.5, code=0.3, books=0.2)).sampler(Batches(10, 8, 1, 8), seed=3)
    assert steps == list(whole)
    places = itertools.chain.from_iterable(sampler.batches.places(step) for step in range(1, 11))
    assert [sampler.windows(*place) for place in places] == batches


def test_each_source_is_read_in_passes_of_its_own(tmp_path):
    weights = constant(web=0.5, code=0.3, books=0.2)
    windows = mixed(tmp_path, weights)
    sampler = windows.sampler(Batches(30, full=8, micro_batches=1, start=8), seed=0)
    ends = np.cumsum(list(LENGTHS.values()))
    drawn = {name: [] for name in weights}
    for index in itertools.chain.from_iterable(sampler):
        number = int(np.searchsorted(ends, index, side="right"))
        drawn[list(weights)[number]].append(index)
    for (name, found), total in zip(drawn.items(), sampler.drawn[-1], strict=True):
        assert len(found) == total
        passes, rest = divmod(len(found), LENGTHS[name])
        assert set(Counter(found).values()) <= {passes, passes + 1} and len(found) == passes * LENGTHS[name] + rest
    assert len(drawn["books"]) > 5 * LENGTHS["books"]
    other = windows.sampler(Batches(30, full=8, micro_batches=1, start=8), seed=1)
    assert list(other) != list(sampler)
    assert (other.drawn == sampler.drawn).all()  # the seed decides which windows, and not how many


def test_a_growing_batch_is_composed_too(tmp_path):
    windows = mixed(tmp_path, constant(web=0.5, code=0.5))
    batches = Batches(6, full=8, micro_batches=2, start=2, ramp=20)
    sampler = windows.sampler(batches, seed=0)
    assert [len(batch) for batch in sampler] == list(batches)


def test_a_step_that_would_read_a_window_twice_is_refused(tmp_path):
    windows = mixed(tmp_path, constant(web=0.5, books=0.5))
    windows.sampler(Batches(6, full=14, micro_batches=1, start=14), seed=0)
    with pytest.raises(UserError, match="books has 7 windows, and a step would take 8 of them"):
        windows.sampler(Batches(6, full=16, micro_batches=1, start=16), seed=0)


def test_windows_are_those_of_the_sources(tmp_path):
    windows = mixed(tmp_path, constant(web=1, books=1))
    assert len(windows) == 57 and (windows.num_tokens, windows.vocab_size) == (57 * BLOCK + 2, 60_000)
    batch = windows.__getitems__([0, 49, 50, 56])
    own = [windows.sources["web"][0], windows.sources["web"][49], windows.sources["books"][0]]
    own += [windows.sources["books"][6]]
    for name, rows in batch.items():
        assert torch.equal(rows, torch.stack([row[name] for row in own]))
        assert torch.equal(windows[50][name], own[2][name])
    with pytest.raises(IndexError):
        windows[57]


def test_validation_windows_are_padded_at_the_end_of_the_last_source(tmp_path):
    windows = mixed(tmp_path, constant(web=1, books=1), split="validation")
    assert len(windows) == 4
    padded = windows.padded_to_multiple_of(3)
    assert len(padded) == 6 and len(windows) == 4
    batch = padded.__getitems__(list(range(6)))
    assert (batch["shift_labels"] != IGNORED).sum(dim=1).tolist() == [8, 2, 8, 2, 0, 0]


def test_the_fingerprint_is_that_of_all_sources(tmp_path):
    first, same = (mixed(tmp_path, constant(web=1, books=1)) for _ in range(2))
    assert first.manifest.fingerprint == same.manifest.fingerprint
    assert mixed(tmp_path, constant(web=1, code=1)).manifest.fingerprint != first.manifest.fingerprint
    assert first.manifest.splits["train"].tokens == first.num_tokens


def test_sources_of_two_tokenizers_are_refused(tmp_path):
    sources = mixed(tmp_path, constant(web=1, books=1)).sources
    sources["books"].manifest.settings["tokenizer"] = "other"
    with pytest.raises(UserError, match="web and books were tokenized differently"):
        MixedWindows(sources, constant(web=1, books=1))


# ----------------------------------------------------------------------------- as it is written down


WEB = {"weight": {"0": 0.7, "5000": 0.4}, "name": "web", "dataset_name": "some/web", "streaming": True}
CODE = {"weight": 0.3, "text_files": "code/**/*.py"}


def test_sources_as_they_are_written():
    web, code = DataArguments(data=[WEB, CODE], tokenizer="gpt2", validation_fraction=0.02).sources()
    assert (web.name, dict(web.weights), web.args.dataset_name) == ("web", {0: 0.7, 5000: 0.4}, "some/web")
    assert (code.name, dict(code.weights), code.args.text_files) == ("2", {0: 0.3}, ["code/**/*.py"])
    assert web.args.streaming and code.args.validation_fraction == 0.02 and code.args.tokenizer == "gpt2"
    assert [web.weight_at(step) for step in (0, 4999, 5000, 9999)] == [0.7, 0.7, 0.4, 0.4]


@pytest.mark.parametrize(
    "data, message",
    [
        ([WEB | {"weight": -1}], "source 1 has the weight -1"),
        ([WEB | {"weight": "much"}], "source 1 has the weight 'much'"),
        ([WEB | {"weight": {"10": 1}}], "source 1 has the weight"),
        ([WEB | {"weight": {"0": 1, "x": 1}}], "source 1 has the weight"),
        ([CODE, {"weight": 1}], "source 2 has no text"),
        ([CODE | {"vocab_size": 3}], "source 1 has an unknown key vocab_size"),
        ([WEB | {"streaming": "yes"}], "source 1: streaming is 'yes'"),
        ([WEB | {"text_files": ["a.txt"]}], "text_files and dataset_name are both set"),
        ([WEB, WEB], "give each source a name of its own"),
        ([CODE | {"weight": {"0": 1, "9": 0}}], "all weights are 0 after 9 steps"),
        (["not json"], "source 1 is 'not json'"),
        (["[1]"], "source 1 is"),
    ],
)
def test_sources_that_cannot_be_are_one_line(data, message):
    with pytest.raises(UserError, match=message):
        DataArguments(data=data, tokenizer="gpt2")


def test_what_is_said_beside_the_sources():
    with pytest.raises(UserError, match="give text_files, dataset_name and data_dir within them"):
        DataArguments(data=[CODE], tokenizer="gpt2", text_files=["a.txt"])
    with pytest.raises(UserError, match="tokenizer=bpe is trained on one source"):
        DataArguments(data=[CODE])
