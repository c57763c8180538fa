"""The command by which a run that was stopped goes on."""

import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import psutil

from llmkit.runs.record import command_line
from llmkit.training.stopping import is_listening, launcher_of_this

FLAG = "--resume_from_checkpoint"


def how_to_go_on() -> str:
    """What a person is told: the command itself, where this process is a recipe's."""
    if is_listening():
        return f"to go on: {resume_command(_words())}"
    return f"to go on, give the same command with {FLAG} latest"  # a program of the user's own


def resume_command(words: Sequence[str]) -> str:
    """A command that started a run, as one would type it, with what makes it go on from the newest checkpoint."""
    kept, skip = [], False
    for word in command_line(words):
        name, equals, _ = word.replace("-", "_").partition("=")
        is_flag = name == FLAG.replace("-", "_")
        if not is_flag and not skip:
            kept.append(word)
        skip = is_flag and not equals
    return shlex.join([*_typed(kept), FLAG, "latest"])


def _words() -> list[str]:
    """The launcher's own command where there is one, for this process's is without its options."""
    if (launcher := launcher_of_this()) is not None:
        try:
            words = psutil.Process(launcher).cmdline()
        except psutil.Error:  # it has ended
            words = []
        if any("accelerate" in word or "torch" in word for word in words):
            return words
    return sys.orig_argv


def _typed(words: list[str]) -> list[str]:
    """`accelerate launch` for `/home/me/.venv/bin/python /home/me/.venv/bin/accelerate launch`."""
    if len(words) > 1 and shutil.which(name := Path(words[1]).name) == words[1]:
        return [name, *words[2:]]
    return ["python", *words[1:]] if Path(words[0]).name.startswith("python") else words
