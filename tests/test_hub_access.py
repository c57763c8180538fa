"""A Hub that cannot be reached is asked once, and what was downloaded before still opens."""

import os
import subprocess
import sys

import pytest

UNREACHABLE = "http://127.0.0.1:9"  # the port of the discard service, where nothing listens


NO_SHAPE = ["--n_layer", "null", "--n_head", "null", "--n_embd", "null"]


@pytest.mark.parametrize(
    "command",
    [
        ["generate", "nobody/nothing", "x"],
        ["merge", "nobody/nothing", "merged"],
        ["tokenizer", "show", "x", "--tokenizer", "nobody/nothing"],
        ["train", "pretrain_quickstart", "--init_from", "nobody/nothing", *NO_SHAPE],
        ["shards", "prepare", "--output", "shards", "--dataset_name", "nobody/nothing"],
    ],
    ids=lambda command: command[0],
)
def test_a_hub_that_cannot_be_reached_is_asked_once(command, tmp_path):
    settings = {"HF_ENDPOINT": UNREACHABLE, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-m", "llmkit", *command],
        env={**os.environ, **settings},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    said, error = done.stderr.splitlines()
    assert done.returncode == 2
    assert said.startswith(f"the Hub ({UNREACHABLE}) cannot be reached") and "Retrying" not in done.stderr
    assert error.startswith("error: ") and "nobody/nothing" in error
