"""A short `make chaos`: ten kills of pretraining on one rank and fine-tuning on two, in a process that forks."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_ten_kills():
    chaos = Path(__file__).with_name("chaos.py")
    command = [sys.executable, chaos, "--kills", "10", "--kinds", "0", "7"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    kills, *_, runs, survived, identical = map(int, done.stdout.splitlines()[-2].split()[1:])
    assert kills >= 10 and runs == survived == identical
