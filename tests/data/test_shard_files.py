"""Shards are read as files that may change or be many."""

import os
import pickle
import resource

import numpy as np
import pytest
from test_windows import make_manifest

from llmkit.data import shard_files
from llmkit.data.shard_files import DamagedShard
from llmkit.data.windows import TokenWindows


def test_more_shards_than_a_process_may_open(tmp_path, monkeypatch):
    """Ninety shards, where forty more files than are open now may be."""
    windows = TokenWindows(make_manifest(tmp_path, [9] * 90, [9]), "train", 8)
    monkeypatch.setattr(shard_files, "MAX_OPEN", 20)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    opened = max(map(int, os.listdir("/proc/self/fd")))
    resource.setrlimit(resource.RLIMIT_NOFILE, (opened + 40, hard))
    try:
        for _ in range(2):  # the second time, of the first shards, after their files were closed
            read = np.concatenate([windows[index]["input_ids"].numpy() for index in range(len(windows))])
            assert (read == np.arange(len(read)) + 1000).all()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("read_before", [False, True])
def test_a_shard_that_is_truncated_under_a_run_is_an_error_with_its_name(tmp_path, read_before):
    """Memory-mapped, it is a bus error without a word."""
    windows = TokenWindows(make_manifest(tmp_path, [5000, 5000], [9]), "train", 8)
    if read_before:
        windows[1200]
    os.truncate(tmp_path / "train_00001.bin", 4096)
    assert windows[600]["input_ids"][0] == 1000 + 4800
    with pytest.raises(DamagedShard, match="train_00001.bin has become shorter than .* bytes: put the file back"):
        windows[1200]


def test_a_copy_for_another_process_opens_its_own_files(tmp_path):
    windows = TokenWindows(make_manifest(tmp_path, [20, 20], [9]), "train", 8)
    windows[0]
    copy = pickle.loads(pickle.dumps(windows))
    assert not copy.shards[0].files.opened and copy.shards[0].files is copy.shards[1].files
    assert (copy[3]["input_ids"] == windows[3]["input_ids"]).all()
