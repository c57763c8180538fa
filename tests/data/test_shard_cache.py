"""Shards at a URL are read as those of a folder, whatever the network does, and the cache keeps its bound."""

import itertools
import multiprocessing
import os
import re
import time
from pathlib import Path
from types import SimpleNamespace

import fsspec
import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.errors import RepositoryNotFoundError

from hub_server import Repo, hub_of_this_process
from llmkit.data import fetching, read_ahead
from llmkit.data.arguments import DataArguments
from llmkit.data.fetching import Unreachable
from llmkit.data.manifest import Manifest
from llmkit.data.prepare import prepare_windows
from llmkit.data.read_ahead import ReadAhead
from llmkit.data.windows import TokenWindows
from llmkit.errors import UserError
from shard_server import FOR_EVER

BLOCK = 16


def cached() -> list[str]:
    """What the cache has, but for the files of locks."""
    return sorted(path.name for path in Path(constants.HF_HOME).glob("llmkit/shards/*/*") if path.suffix != ".lock")


def sizes(manifest: Manifest) -> list[int]:
    return [2 * shard.tokens for shard in manifest.splits["train"].shards]


def test_windows_and_their_order_are_those_of_the_folder(many_shards, server):
    for split in ("train", "validation"):
        here, there = (TokenWindows(place, split, BLOCK, 3) for place in (many_shards[0], server.url + "/"))
        assert server.requests[-1] == "manifest.json", "opening reads no shard"
        batches = [[8] * (2 * len(here) // 8)] * 2
        orders = [list(windows.sampler(sizes, 5)) for windows, sizes in zip((here, there), batches, strict=True)]
        assert orders[0] == orders[1]
        for batch in orders[0]:
            for name, tensor in here.__getitems__(batch).items():
                assert torch.equal(tensor, there.__getitems__(batch)[name])
    names = [shard.name for split in many_shards[0].splits.values() for shard in split.shards]
    assert sorted(server.asked(".bin")) == sorted(names), "each is fetched once"
    assert (there.manifest.fingerprint, there.manifest.place) == (many_shards[0].fingerprint, server.url)
    assert TokenWindows(server.url, "train", BLOCK).shard_group == 4


def test_other_file_systems(many_shards, server):
    fs = fsspec.filesystem("memory")
    for path in many_shards[0].directory.glob("*.*"):
        fs.pipe_file(f"/some/{path.name}", path.read_bytes())
    expected = TokenWindows(many_shards[0], "train", BLOCK)[7]["input_ids"]
    for url in ("memory://some", many_shards[0].directory.as_uri()):
        assert torch.equal(TokenWindows(url, "train", BLOCK)[7]["input_ids"], expected)


def test_shards_of_the_hub(many_shards, tmp_path, monkeypatch):
    """Through the Hub's own file system, at a branch as well."""
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
    folder = many_shards[0].directory
    many_shards[1].save_pretrained(tmp_path / "tokenizer")
    files = {f"shards/{path.name}": path.read_bytes() for path in folder.glob("*.*")}
    files |= {f"shards/tokenizer/{path.name}": path.read_bytes() for path in (tmp_path / "tokenizer").iterdir()}
    with hub_of_this_process(tmp_path) as hub:
        with pytest.raises(
            UserError, match="hf://datasets/me/other/manifest.json cannot be fetched: there is no such"
        ):
            prepare_windows(DataArguments(data_dir="hf://datasets/me/other"), BLOCK)
        repo = hub.repos["datasets/me/corpus"] = Repo()
        repo.branches["v1"] = repo.commit("main", files, "shards")
        for place in ("datasets/me/corpus", "datasets/me/corpus@v1"):
            tokenizer, *there = prepare_windows(DataArguments(data_dir=f"hf://{place}/shards"), BLOCK)
            assert tokenizer.get_vocab() == many_shards[1].get_vocab()
            for windows in there:
                here = TokenWindows(many_shards[0], windows.split, BLOCK)
                for index in range(0, len(here), 7):
                    assert torch.equal(windows[index]["input_ids"], here[index]["input_ids"])


@pytest.mark.parametrize("failure", [500, 503, "reset", "short", "wrong", "stall"])
def test_what_goes_wrong_is_tried_again(many_shards, server, failure, monkeypatch, capsys):
    monkeypatch.setattr(fetching, "STALLED", 0.2)
    server.failures["train_00001.bin"] = [failure, failure]
    windows, expected = (TokenWindows(place, "train", BLOCK) for place in (server.url, many_shards[0]))
    index = windows.starts[1] // BLOCK + 2
    assert torch.equal(windows[index]["input_ids"], expected[index]["input_ids"])
    assert server.asked("train_00001.bin") == ["train_00001.bin"] * 3
    told = capsys.readouterr().out.splitlines()
    assert 1 <= len(told) <= 2 and "/train_00001.bin cannot be fetched now, trying again in" in told[0]
    assert cached() == ["train_00001.bin"]


@pytest.mark.parametrize(
    ("failure", "message"),
    [(500, "500"), ("wrong", "another checksum"), ("short", r"bytes came instead of")],
)
def test_patience_ends_with_one_line(server, failure, message, monkeypatch):
    monkeypatch.setattr(fetching, "PATIENCE", 0.2)
    server.failures["train_00000.bin"] = [failure] * FOR_EVER
    begun = time.monotonic()
    with pytest.raises(Unreachable, match=rf"^http://\S+/train_00000.bin cannot be fetched: .*{message}"):
        TokenWindows(server.url, "train", BLOCK)[0]
    assert len(server.asked("train_00000.bin")) > 2 and time.monotonic() - begun < 10
    assert cached() == []


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (404, "there is no such file$"),
        (401, "the server answers 401: check the"),
        (403, "the server answers 403: check the"),
    ],
)
def test_an_answer_that_would_be_the_same_again_is_not_asked_for_again(server, status, message):
    server.failures["train_00000.bin"] = [status]
    with pytest.raises(Unreachable, match=rf"/train_00000.bin cannot be fetched: .*{message}"):
        TokenWindows(server.url, "train", BLOCK)[0]
    assert len(server.asked("train_00000.bin")) == 1


class GcsError(Exception):
    code = 401


class NoCredentialsError(Exception):
    pass


HUB = RepositoryNotFoundError("no", response=SimpleNamespace(status_code=401, headers={}, request=None))


@pytest.mark.parametrize(
    ("error", "cause", "message"),
    [
        (PermissionError("The AWS Access Key Id you provided does not exist"), None, "The AWS Access Key Id"),
        (NoCredentialsError("Unable to locate credentials"), None, "Unable to locate credentials: check the"),
        (OSError("Forbidden: bucket/shard\nno access"), None, "Forbidden: bucket/shard no access: check the"),
        (GcsError("Login required"), None, "the server answers 401: check the credentials"),
        (FileNotFoundError("me/corpus"), HUB, "the server answers 401: give a token"),
    ],
)
def test_each_file_system_refuses_in_its_own_way(error, cause, message):
    def attempt():
        raise error from cause

    url = "hf://datasets/me/corpus/manifest.json" if cause else "s3://bucket/manifest.json"
    with pytest.raises(Unreachable, match=f"^{url} cannot be fetched: {message}.* may read it"):
        fetching.patiently(attempt, url, time.monotonic() + 100)


# ----------------------------------------------------------------------------- the cache


def test_the_oldest_that_nobody_holds_makes_room(many_shards, server):
    whole = sizes(many_shards[0])
    cache = TokenWindows(server.url, "train", BLOCK, cache_gb=(sum(whole[:3]) + 400) / 1e9).cache
    names = [f"train_{number:05d}.bin" for number in range(6)]
    held = cache.hold(names[0])
    cache.hold(names[1]).close()
    cache.hold(names[2]).close()
    os.utime(cache.folder / names[1], (1, 1))
    assert cached() == names[:3]
    cache.hold(names[3]).close()
    assert cached() == [names[0], names[2], names[3]]
    for name in names[4:] * 2:
        cache.hold(name).close()
        assert sum((cache.folder / name).stat().st_size for name in cached()) <= cache.limit
        assert names[0] in cached(), "it is held"
    held.close()


def test_a_cache_that_is_in_use_is_waited_for(many_shards, server, monkeypatch):
    cache = TokenWindows(server.url, "train", BLOCK, cache_gb=(max(sizes(many_shards[0])) + 10) / 1e9).cache
    held = cache.hold("train_00000.bin")
    monkeypatch.setattr(fetching, "PATIENCE", 0.1)
    with pytest.raises(Unreachable, match="GB of the shard cache are in use, and it takes up to"):
        cache.hold("train_00001.bin")
    held.close()
    cache.hold("train_00001.bin").close()
    assert cached() == ["train_00001.bin"]


def test_what_a_killed_process_left_is_in_nobodys_way(many_shards, server):
    whole = sizes(many_shards[0])
    cache = TokenWindows(server.url, "train", BLOCK, cache_gb=(max(whole) + 10) / 1e9).cache
    cache.folder.mkdir(parents=True)
    for name in ("train_00000", "train_00001"):
        (cache.folder / f"{name}.partial").write_bytes(b"half")
        with (cache.folder / f"{name}.room").open("wb") as room:
            room.truncate(whole[0])
    assert cache.hold("train_00000.bin").read() == (server.folder / "train_00000.bin").read_bytes()
    assert cached() == ["train_00000.bin"]


def read_in_a_fork(windows: TokenWindows, start, found) -> None:
    start.wait()
    found.put(windows[3]["input_ids"].tolist())


def test_several_processes_fetch_a_shard_once(many_shards, server):
    fork = multiprocessing.get_context("fork")
    windows, start, found = TokenWindows(server.url, "train", BLOCK), fork.Event(), fork.Queue()
    processes = [fork.Process(target=read_in_a_fork, args=(windows, start, found)) for _ in range(4)]
    for process in processes:
        process.start()
    start.set()
    rows = [found.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert rows == [TokenWindows(many_shards[0], "train", BLOCK)[3]["input_ids"].tolist()] * 4
    assert server.asked(".bin") == ["train_00000.bin"]


def test_a_fork_keeps_nothing_in_the_cache(many_shards, server):
    """As a DataLoader's worker, which lives as long as the run; it can read what was open when it was forked."""
    windows = TokenWindows(server.url, "train", BLOCK, cache_gb=(2 * max(sizes(many_shards[0])) + 10) / 1e9)
    windows[3]
    held = windows.cache.hold("train_00000.bin")
    fork = multiprocessing.get_context("fork")
    end, read = fork.Event(), fork.Queue()
    process = fork.Process(target=lambda: (read.put(windows[3]["input_ids"].tolist()), end.wait()))
    process.start()
    assert read.get(timeout=60) == windows[3]["input_ids"].tolist()
    held.close()
    for name in ("train_00001.bin", "train_00002.bin"):
        windows.cache.hold(name).close()
    end.set()
    process.join()
    assert cached() == ["train_00001.bin", "train_00002.bin"]


# ----------------------------------------------------------------------------- reading ahead


def names_of_group(windows: TokenWindows, group: int) -> set[str]:
    """Its shards, and the next one, in which its last window ends."""
    shards = windows.manifest.splits["train"].shards
    first, stop = windows.group_bounds()[group : group + 2]
    tokens = range(first * BLOCK, min(stop * BLOCK, windows.num_tokens - 1) + 1)
    return {
        shard.name
        for shard, begin in zip(shards, windows.starts, strict=False)
        if range(max(begin, tokens[0]), min(begin + shard.tokens, tokens[-1] + 1))
    }


def wait_for(ahead: ReadAhead, places: list[tuple[int, int]]) -> None:
    """As a run, which calls `want` again at its next step, and has the rest fetched then."""
    ahead.want(places)
    while not ahead.wait():
        assert ahead.problem() is None
    assert not ahead.want(places)


def test_the_next_group_is_fetched_while_one_is_at_work(server):
    windows, held_out = (TokenWindows(server.url, split, BLOCK, 2) for split in ("train", "validation"))
    order = windows.order(1)
    ahead = ReadAhead([(windows, order, 2 * len(windows))], [held_out])
    groups, place, validation = [], 0, {shard.name for shard in windows.manifest.splits["validation"].shards}
    while place < 2 * len(windows):
        _, group, begin = order.group_at(place)
        groups.append(group)
        size = order.bounds[group + 1] - order.bounds[group]
        wait_for(ahead, [(place, place + 2)])
        place = begin + size
        names = {name for _, name in ahead.files}
        wanted = set().union(*(names_of_group(windows, number) for number in groups[-2:])) | validation
        if place < 2 * len(windows):
            wanted |= names_of_group(windows, order.group_at(place)[1])
        assert names == wanted, "the group before, this one, and the one after"
    ahead.close()


@pytest.fixture
def no_more(monkeypatch):
    """No windows are looked at but those that are asked for. A test's shards have too few for others."""
    monkeypatch.setattr(read_ahead, "MORE", 0)


def test_what_the_next_steps_read_comes_first_and_alone(server, no_more):
    """Of a group of one shard that is this shard: the others cannot keep a resumed run from its step."""
    windows, held_out = (TokenWindows(server.url, split, BLOCK, 1) for split in ("train", "validation"))
    order = windows.order(1)
    _, group, place = order.group_at(len(windows) // 2)
    first, validation = (
        f"train_{group:05d}.bin",
        {shard.name for shard in held_out.manifest.splits["validation"].shards},
    )
    ahead = ReadAhead([(windows, order, len(windows))], [held_out])
    assert ahead.want([(place, place + 3)])
    while not ahead.wait():
        assert ahead.problem() is None
    assert {name for _, name in ahead.files} == {first} | validation == set(server.asked(".bin"))
    assert not ahead.want([(place + 1, place + 4)]), "the same shards"
    assert names_of_group(windows, group) < {name for _, name in ahead.files}
    ahead.close()


def test_windows_are_read_from_the_shards_that_are_wanted_for_them(server, no_more):
    """Also those of which a window has its last target alone, and those that are shorter than a window."""
    for block_size in (BLOCK, 700, 2100):
        windows = TokenWindows(server.url, "train", block_size, 3)
        order, tokens = windows.order(1), [range(a, b) for a, b in itertools.pairwise(windows.starts)]
        for place in range(0, len(windows), 5):
            ahead = ReadAhead([(windows, order, len(windows))], [])
            numbers = order.windows(place, min(place + 2, len(windows)))
            read = {n * block_size + offset for n in numbers for offset in range(block_size + 1)}
            ahead.want([(place, place + len(numbers))])
            expected = {f"train_{number:05d}.bin" for number, of in enumerate(tokens) if read & set(of)}
            assert {name for _, name in ahead.wanted} == expected
            ahead.close()


@pytest.mark.parametrize("batch", [1, 4, 23])
def test_every_shard_is_wanted_before_its_windows_are_read(server, batch):
    """Step by step through two passes, also with steps that lie across several groups, and with one that reads
    nothing."""
    windows = TokenWindows(server.url, "train", BLOCK, 2)
    order, tokens = windows.order(1), [range(a, b) for a, b in itertools.pairwise(windows.starts)]
    total = 2 * len(windows)
    ahead = ReadAhead([(windows, order, total)], [])
    for place in range(0, total, batch):
        for stop in (place, min(place + batch, total)):
            if ahead.want([(place, stop)]):
                while not ahead.wait():
                    assert ahead.problem() is None
        read = {n * BLOCK + offset for n in order.windows(place, stop) for offset in range(BLOCK + 1)}
        expected = {f"train_{number:05d}.bin" for number, of in enumerate(tokens) if read & set(of)}
        here = {name for (_, name), file in ahead.files.items() if file.done()}
        assert expected <= {name for _, name in ahead.wanted} & here
        held, (_, group, begin) = {name for _, name in ahead.held}, order.group_at(place)
        assert names_of_group(windows, group) <= held, "the rest of the group is fetched as well"
        if (after := begin + order.bounds[group + 1] - order.bounds[group]) < total:
            assert names_of_group(windows, order.group_at(after)[1]) <= held, "and the group after it"
    ahead.close()


def test_a_failed_read_ahead_is_made_good_when_the_shard_is_wanted(server, monkeypatch):
    monkeypatch.setattr(fetching, "PATIENCE", 0.05)
    windows = TokenWindows(server.url, "train", BLOCK, 1)
    order = windows.order(1)
    _, first, _ = order.group_at(0)
    begin = order.bounds[first + 1] - order.bounds[first]
    later = f"train_{order.group_at(begin)[1]:05d}.bin"
    server.failures[later] = [500] * FOR_EVER
    ahead = ReadAhead([(windows, order, len(windows))], [])
    wait_for(ahead, [(0, 1)])
    while not ahead.files[windows.cache, later].done():
        time.sleep(0.01)
    assert not ahead.want([(0, 1)]) and ahead.problem() is None
    asked = len(server.asked(later))
    assert ahead.want([(begin, begin + 1)])
    while ahead.problem() is None:
        assert not ahead.wait()
    assert later in ahead.problem() and len(server.asked(later)) > asked
    ahead.close()


def test_a_cache_that_cannot_hold_three_groups_is_refused(many_shards, server):
    whole = sizes(many_shards[0])
    for group, gb in ((1, 2 * max(whole) / 1e9), (4, sum(whole[:9]) / 1e9)):
        windows, held_out = (TokenWindows(server.url, split, BLOCK, group, gb) for split in ("train", "validation"))
        lack = ReadAhead([(windows, windows.order(1), 9)], [held_out]).lack_of_room(8)
        assert re.match("shard_cache_gb=.*three groups of shards and the validation split", lack)
    enough = 2 * sum(split.tokens for split in many_shards[0].splits.values()) / 1e9
    windows, held_out = (TokenWindows(server.url, split, BLOCK, 1, enough) for split in ("train", "validation"))
    assert ReadAhead([(windows, windows.order(1), 9)], [held_out]).lack_of_room(8) is None
    assert not server.asked(".bin")


# ----------------------------------------------------------------------------- recipes


def test_a_recipe_names_a_url(many_shards, server):
    many_shards[1].save_pretrained(server.folder / "tokenizer")
    for given in ({}, {"tokenizer": str(server.folder / "tokenizer")}, {"validation_fraction": 0.1}):
        args = DataArguments(data_dir=server.url, shard_cache_gb=0.5, **given)
        tokenizer, train, validation = prepare_windows(args, BLOCK)
        assert tokenizer.get_vocab() == many_shards[1].get_vocab()
        assert (train.shard_group, train.cache.limit, validation.manifest.url) == (4, 5 * 10**8, server.url)
    assert len(server.asked("tokenizer.json")) == 1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"text_files": ["a.txt"]}, "leave out text_files, dataset_name"),
        ({"dataset_name": "some/text"}, "leave out text_files, dataset_name"),
        ({"prepare": "ahead"}, "leave out text_files, dataset_name and prepare"),
        ({"shard_cache_gb": 0}, "shard_cache_gb=0: give gigabytes"),
        ({"data_dir": "https://host/x?key=1"}, "without . and #"),
    ],
)
def test_recipes_that_are_refused(given, message):
    with pytest.raises(UserError, match=message):
        DataArguments(**({"data_dir": "https://host/x"} | given))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"validation_fraction": 0.3}, "were made with validation_fraction 0.1 instead of 0.3"),
        ({"vocab_size": 999}, "were made with vocab_size 300 instead of 999"),
        ({"data_dir": "nowhere"}, "nowhere/manifest.json cannot be fetched: there is no such file"),
        ({"data_dir": "nosuch://host/x"}, "Protocol not known: nosuch"),
    ],
)
def test_shards_that_do_not_fit_the_recipe(server, change, message):
    if "://" not in change.get("data_dir", "://"):
        change = {"data_dir": f"{server.url}/{change['data_dir']}"}
    with pytest.raises(UserError, match=message):
        prepare_windows(DataArguments(**({"data_dir": server.url} | change)), BLOCK)


def test_a_url_of_a_mixture(many_shards, server):
    many_shards[1].save_pretrained(server.folder / "tokenizer")
    sources = [{"weight": 1, "data_dir": server.url, "name": "there"}]
    sources += [{"weight": 1, "data_dir": many_shards[0].directory.as_uri(), "name": "here"}]
    args = DataArguments(data=sources, tokenizer=str(server.folder / "tokenizer"))
    _, train, _ = prepare_windows(args, BLOCK)
    assert [windows.shard_group for windows in train.sources.values()] == [4, 4]
    half = len(train) // 2
    assert torch.equal(train[3]["input_ids"], train[half + 3]["input_ids"])
