"""A short `make chaos`: ten kills, in a process of its own since it forks."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_ten_kills():
    chaos = Path(__file__).with_name("chaos.py")
    done = subprocess.run([sys.executable, chaos, "--kills", "10"], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    kills, runs, survived, identical = map(int, done.stdout.splitlines()[-1].split()[1:])
    assert kills >= 10 and runs == survived == identical
