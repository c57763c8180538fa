"""What is printed for people."""

import sys

from tqdm.auto import tqdm


def say(line: str) -> None:
    """Print above the progress bar, at once also where output goes to a file."""
    tqdm.write(line, file=sys.stdout)
    sys.stdout.flush()
