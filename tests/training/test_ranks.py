"""What is said where the other ranks do not come, or do not answer any more."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from llmkit.errors import UserError
from llmkit.training import checkpoints
from small_run import trainer

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_ranks_that_do_not_come_are_one_line(tmp_path):
    """The first of two, alone, for a second."""
    (tmp_path / "text.txt").write_text("some text")
    variables = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
    variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    command = [sys.executable, "recipes/pretrain.py", "--text_files", tmp_path / "text.txt", "--ddp_timeout", "1"]
    command += ["--output_dir", tmp_path / "run"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | variables, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stderr
    assert "error: rank 0 cannot connect to the other ranks" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_folder_that_another_rank_does_not_see(data, tmp_path, monkeypatch):
    """Before the first step, and without a trace in the folder."""
    run = trainer(data, tmp_path / "run", save_strategy="steps", save_steps=2)
    monkeypatch.setattr(checkpoints, "gather_object", lambda seen: [*seen, False])
    with pytest.raises(UserError, match="rank 1 does not see .*run of rank 0.*a disk that all nodes share"):
        run.train()
    assert run.state.global_step == 0 and not list((tmp_path / "run").glob(".shared*"))
    run = trainer(data, tmp_path / "unsaved")  # without checkpoints there is nothing to share
    run.train()
