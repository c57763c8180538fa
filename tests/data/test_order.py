"""A pass has every window once, group by group where there are groups, and every rank draws its own."""

import itertools

import numpy as np
import pytest
from accelerate import skip_first_batches
from accelerate.data_loader import BatchSamplerShard
from test_windows import make_manifest
from torch.utils.data import DataLoader

from llmkit.data.arguments import DataArguments
from llmkit.data.mixture import MixedWindows
from llmkit.data.order import WindowBatchSampler, WindowOrder
from llmkit.data.windows import TokenWindows, collate_windows
from llmkit.errors import UserError
from llmkit.training.batch_ramp import Batches

GROUPS = [0, 7, 7, 20, 31, 50]  # of 50 windows; one group has none, as a shard that is shorter than a window


def sampler(num_windows, batch_sizes, seed):
    return WindowBatchSampler(WindowOrder([0, num_windows], seed), batch_sizes)


@pytest.mark.parametrize(("num_windows", "batch_size"), [(10, 4), (12, 4), (3, 5), (1, 4), (100, 1), (7, 7)])
def test_every_epoch_has_every_window_once(num_windows, batch_size):
    epochs = 6
    num_batches = -(-epochs * num_windows // batch_size)
    batches = list(sampler(num_windows, [batch_size] * num_batches, seed=3))
    assert len(batches) == num_batches and {len(batch) for batch in batches} == {batch_size}
    stream = sum(batches, [])
    assert all(type(index) is int for index in stream)
    orders = [stream[e * num_windows : (e + 1) * num_windows] for e in range(epochs)]
    for order in orders:
        assert sorted(order) == list(range(num_windows))
    if num_windows >= 10:
        assert len({tuple(order) for order in orders}) == epochs
        assert orders[0] != list(range(num_windows))


def test_order_is_a_function_of_the_seed():
    def first(seed):
        return next(iter(sampler(1000, [16] * 5, seed)))

    assert first(1) == first(1) != first(2)
    batches = sampler(10, [3] * 8, seed=1)
    assert list(batches) == list(batches) and len(batches) == 8


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**40])
def test_without_groups_the_order_is_that_of_earlier_runs(seed):
    """It was numpy's shuffle from (seed, pass), and a run from then can be resumed."""
    expected = []
    for number in range(3):
        one_pass = np.arange(90, dtype=np.uint32)
        np.random.default_rng([seed, number]).shuffle(one_pass)
        expected += one_pass.tolist()
    assert WindowOrder([0, 90], seed).windows(0, 270) == expected


@pytest.mark.parametrize("first_in_order", [False, True])
def test_a_pass_goes_group_by_group(first_in_order):
    order = WindowOrder(GROUPS, seed=4, first_in_order=first_in_order)
    found = [order.windows(50 * number, 50 * number + 50) for number in range(8)]
    of_groups = []  # of each pass, the groups in the order in which they come
    for one_pass in found:
        assert sorted(one_pass) == list(range(50)) and one_pass != list(range(50))
        numbers = np.searchsorted(GROUPS, one_pass, side="right") - 1
        of_groups.append([int(number) for number, _ in itertools.groupby(numbers)])
    assert all(sorted(groups) == [0, 2, 3, 4] for groups in of_groups)
    assert (of_groups[0] == [0, 2, 3, 4]) == first_in_order
    assert len(set(map(tuple, of_groups))) > 3  # later passes have seeded orders, of the groups and within them
    assert len({tuple(window for window in one_pass if window < 7) for one_pass in found}) == 8


def test_any_place_is_found_without_those_before_it():
    order = WindowOrder(GROUPS, seed=4)
    whole = order.windows(0, 170)
    for start, stop in itertools.combinations(range(0, 170, 3), 2):
        assert WindowOrder(GROUPS, seed=4).windows(start, stop) == whole[start:stop]
    for place in range(170):
        number, group, begin = order.group_at(place)
        assert number == place // 50 and begin <= place < begin + GROUPS[group + 1] - GROUPS[group]
        assert GROUPS[group] <= whole[place] < GROUPS[group + 1]


def test_the_first_groups_can_be_read_before_the_others_are_known():
    whole = WindowOrder(GROUPS, seed=4, first_in_order=True)
    growing = [0]
    order = WindowOrder(GROUPS[:2], seed=4, first_in_order=True)
    order.bounds = growing
    for bound in GROUPS[1:]:
        place = growing[-1]
        growing.append(bound)
        assert order.windows(place, bound) == whole.windows(place, bound)
    assert order.windows(0, 150) == whole.windows(0, 150)


@pytest.mark.parametrize(
    ("lengths", "group", "bounds"),
    [
        ([17, 8, 3, 20], None, [0, 9]),
        ([17, 8, 3, 20], 1, [0, 4, 5, 6, 9]),  # a window is of the shard that it begins in
        ([17, 8, 3, 20], 2, [0, 5, 9]),
        ([17, 8, 3, 20], 3, [0, 6, 9]),
        ([17, 8, 3, 20], 9, [0, 9]),
        ([20, 1, 1, 20], 1, [0, 4, 5, 5, 8]),  # the third begins within a window, and holds no beginning
        ([20, 1], 1, [0, 4, 4]),
    ],
)
def test_groups_of_shards(tmp_path, lengths, group, bounds):
    windows = TokenWindows(make_manifest(tmp_path, lengths, [9]), "train", 5, group)
    assert windows.group_bounds() == bounds
    assert sorted(windows.order(3).windows(0, len(windows))) == list(range(len(windows)))
    assert next(iter(windows.sampler([len(windows)], 3))) == windows.order(3).windows(0, len(windows))


def test_a_group_of_no_shards_is_refused():
    with pytest.raises(UserError, match="shard_group=0: give 1 or more shards"):
        DataArguments(shard_group=0)


# ----------------------------------------------------------------------------- ranks


def rank_batches(sampler, world_size):
    return [list(BatchSamplerShard(sampler, world_size, rank)) for rank in range(world_size)]


@pytest.mark.parametrize("bounds", [[0, 96], [0, 20, 55, 96]])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_are_disjoint_and_cover_every_window_once_an_epoch(bounds, world_size):
    num_windows, batch_size, epochs = 96, 3, 2
    per_epoch = num_windows // batch_size
    batches = WindowBatchSampler(WindowOrder(bounds, 5), [batch_size] * (epochs * per_epoch))
    ranks = rank_batches(batches, world_size)
    for epoch in range(epochs):
        mine = slice(epoch * per_epoch // world_size, (epoch + 1) * per_epoch // world_size)
        windows = [set(sum(batches[mine], [])) for batches in ranks]
        assert sum(map(len, windows)) == num_windows
        assert set.union(*windows) == set(range(num_windows))


@pytest.mark.parametrize("bounds", [[0, 50], GROUPS])
def test_an_optimizer_step_has_the_same_windows_at_any_world_size(bounds):
    batch_size, steps = 3, 20
    sampler = WindowBatchSampler(WindowOrder(bounds, 5), [batch_size] * (4 * steps))

    def global_batches(world_size, accumulation):
        ranks = rank_batches(sampler, world_size)
        assert {len(batches) for batches in ranks} == {steps * accumulation}
        return [
            sorted(sum((sum(batches[s * accumulation : (s + 1) * accumulation], []) for batches in ranks), []))
            for s in range(steps)
        ]

    alone = global_batches(1, 4)
    assert alone == [sorted(sum(list(sampler)[4 * s : 4 * s + 4], [])) for s in range(steps)]
    assert global_batches(2, 2) == alone
    assert global_batches(4, 1) == alone


@pytest.mark.parametrize("kind", ["one source", "in groups", "mixed"])
@pytest.mark.parametrize("steps", [0, 1, 3, 5])
def test_skipping_steps_is_starting_later(tmp_path, steps, kind):
    """What a resumed run skips is not drawn, either."""
    windows = TokenWindows(make_manifest(tmp_path, [60, 41], [11]), "train", 5, 1 if kind == "in groups" else None)
    if kind == "mixed":
        windows.manifest.settings |= {"tokenizer": "t", "corpus": "c"}
        windows = MixedWindows({"a": windows, "b": windows}, {"a": {0: 2}, "b": {0: 1}})
    sampler = windows.sampler(Batches(6, full=6, micro_batches=2, start=6), 1)  # lies across two passes
    for world_size in (1, 2):
        shard = BatchSamplerShard(sampler, world_size, world_size - 1)
        loader = DataLoader(windows, batch_sampler=shard, collate_fn=collate_windows)
        sampler.skipped = 0
        everything = [batch["input_ids"].tolist() for batch in loader]
        sampler.skipped = 2 * steps
        assert list(sampler)[: 2 * steps] == [[]] * (2 * steps)
        rest = [batch["input_ids"].tolist() for batch in skip_first_batches(loader, sampler.skipped // world_size)]
        assert rest == everything[sampler.skipped // world_size :]
