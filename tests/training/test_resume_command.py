"""The line of a run that was stopped has the command that makes it go on."""

import subprocess
import sys

import pytest

from llmkit.training import resuming, stopping
from llmkit.training.resuming import how_to_go_on, resume_command

LATEST = "--resume_from_checkpoint latest"


@pytest.mark.parametrize(
    "words, expected",
    [
        (["/usr/bin/python3.11", "recipes/pretrain.py"], f"python recipes/pretrain.py {LATEST}"),
        (["torchrun", "train.py", "--text_files", "a b.txt"], f"torchrun train.py --text_files 'a b.txt' {LATEST}"),
        (["x", "--resume_from_checkpoint", "runs/checkpoint-2", "--seed", "1"], f"x --seed 1 {LATEST}"),
        (["x", "--resume-from-checkpoint=latest", "--seed", "1"], f"x --seed 1 {LATEST}"),
        (["x", "--hub_token", "hf_secret"], f"x --hub_token '***' {LATEST}"),
    ],
)
def test_the_command_as_one_would_type_it(words, expected):
    assert resume_command(words) == expected


def test_a_program_on_the_path_is_called_by_its_name(tmp_path, monkeypatch):
    program = tmp_path / "accelerate"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    words = ["/opt/python", str(program), "launch", "recipes/pretrain.py"]
    assert resume_command(words) == f"python {program} launch recipes/pretrain.py {LATEST}"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert resume_command(words) == f"accelerate launch recipes/pretrain.py {LATEST}"


def test_the_launchers_command_is_meant_where_there_is_one(monkeypatch):
    """It has options that this process never saw."""
    monkeypatch.setattr(stopping._Requests, "listening", True)
    program = "print(flush=True); input()"
    call = [sys.executable, "-c", program, "accelerate", "launch", "--config_file", "two.yaml", "x.py"]
    with subprocess.Popen(call, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as launcher:
        launcher.stdout.readline()  # from here on the system knows its command line
        monkeypatch.setattr(resuming, "launcher_of_this", lambda: launcher.pid)
        assert how_to_go_on().endswith(f"accelerate launch --config_file two.yaml x.py {LATEST}")
        launcher.kill()
    monkeypatch.setattr(sys, "orig_argv", ["python", "x.py"])
    assert how_to_go_on() == f"to go on: python x.py {LATEST}"
    monkeypatch.setattr(stopping._Requests, "listening", False)
    assert how_to_go_on() == f"to go on, give the same command with {LATEST}"
