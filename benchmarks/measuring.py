"""How the benchmarks measure: peers take turns in processes of their own, and a table shows medians and spreads.

A script that imports this is started by its user without `--peer`, and starts itself with it, once for each peer and
turn. So a drift of the machine meets all peers, and each one's peak memory is its own.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import psutil
import torch


def add_options(parser: argparse.ArgumentParser, rounds: int) -> None:
    """`--rounds` and `--threads`, and the `--peer` by which a script starts itself."""
    parser.add_argument("--rounds", type=int, default=rounds, help=f"turns of each peer (default {rounds})")
    parser.add_argument("--threads", type=int, help="CPU cores to use (default: all)")
    parser.add_argument("--peer", help=argparse.SUPPRESS)
    parser.add_argument("--turn", type=int, help=argparse.SUPPRESS)


def use_threads(threads: int | None) -> None:
    """Keep this process and those it starts to so many cores; without an argument, to all of them."""
    if threads is None:
        return
    if platform.system() == "Linux":  # elsewhere the number of threads has to do
        os.sched_setaffinity(0, set(sorted(os.sched_getaffinity(0))[:threads]))
    os.environ["OMP_NUM_THREADS"] = str(threads)
    torch.set_num_threads(threads)


def machine(*packages: str) -> str:
    """The hardware and the versions, for a table's head."""
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    else:
        device = f"{cpu_name()}, {torch.get_num_threads()} threads"
    versions = [f"{name} {version(name)}" for name in ("torch", "transformers", *packages)]
    return ", ".join([device, *versions])


def cpu_name() -> str:
    if platform.system() == "Linux":
        with open("/proc/cpuinfo") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
        if names:
            return names[0]
    return platform.processor() or platform.machine()


class PeakMemory:
    """Bytes by which memory grew, at its peak, from when this was made: allocated on a GPU, resident on a CPU."""

    def __init__(self):
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        else:
            self.before = psutil.Process().memory_info().rss

    def growth(self) -> int:
        if torch.cuda.is_available():
            return torch.cuda.max_memory_allocated() - self.before
        return peak_resident() - self.before


def peak_resident(who: int = resource.RUSAGE_SELF) -> int:
    """Bytes of this process at its peak; with RUSAGE_CHILDREN, of the largest process that it has waited for."""
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(who).ru_maxrss * unit


def forget_peak() -> None:
    """Let the peak start anew, without what compiling took."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    elif platform.system() == "Linux":
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets the peak resident set size


def synchronize() -> None:
    """Wait for the GPU, where there is one: time is only known after that."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def take_turns(peers: list[str], rounds: int) -> dict[str, list[dict[str, float]]]:
    """What each peer measured in each round; every second round goes backwards."""
    results = {peer: [] for peer in peers}
    for turn in range(rounds):
        for peer in peers[:: -1 if turn % 2 else 1]:
            results[peer].append(run_peer(peer, turn))
    return results


def run_peer(peer: str, turn: int) -> dict[str, float]:
    command = [sys.executable, *sys.argv, "--peer", peer, "--turn", str(turn)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{peer} failed:\n{done.stdout}{done.stderr}")
    return json.loads(done.stdout.rpartition("measured ")[2])


def report(measured: dict[str, float]) -> None:
    """In a process that was started with `--peer`: hand its measurement back."""
    print("\nmeasured", json.dumps(measured))


def print_table(results: dict[str, list[dict[str, float]]], figures: dict[str, str]) -> None:
    """A row a peer: for each figure the median over the rounds, the spread, and the first peer's ratio to this one.

    Args:
        figures: the keys to show, each with its format, as in `{"tokens/s": ",.0f"}`.
    """
    first = next(iter(results))
    width = max(map(len, results)) + 2
    print(" " * width + "".join(f"{name:>18}{'min..max':>28}{'ratio':>8}" for name in figures))
    for peer, rounds in results.items():
        row = f"{peer:>{width}}"
        for name, form in figures.items():
            values = [measured[name] for measured in rounds]
            pairs = zip(results[first], rounds, strict=True)
            ratio = statistics.median(reference[name] / this[name] for reference, this in pairs)
            spread = f"{min(values):{form}}..{max(values):{form}}"
            row += f"{statistics.median(values):>18{form}}{spread:>28}{ratio:>8.2f}"
        print(row)
    if len(results) > 1:
        print(f"ratio: {first} / this row, the median of the rounds'", flush=True)


def print_parts(rounds: list[dict[str, float]], whole: str, share: str, form: str) -> None:
    """A row a part, in milliseconds: the median over the rounds, the spread, and its ratio to the part `whole`.

    Args:
        share: the head of the last column, which is empty where no round has the part `whole`.
        form: the format of the ratio.
    """
    print(f"{'ms/step':>22}{'median':>10}{'min..max':>20}{share:>16}")
    of = statistics.median(measured.get(whole, 0.0) for measured in rounds)
    for part in rounds[0]:
        values = [measured.get(part, 0.0) for measured in rounds]
        ratio = f"{statistics.median(values) / of:{form}}" if of else ""
        spread = f"{min(values):.3f}..{max(values):.3f}"
        print(f"{part:>22}{statistics.median(values):>10.3f}{spread:>20}{ratio:>16}")
