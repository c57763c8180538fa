"""SIGKILL at random instants: prints what was tried, what survived, and what ended bit for bit the same.

    python tests/chaos/chaos.py --kills 200

Each trial is a run of a small model that prepares its data, trains, evaluates, samples and saves. It is killed,
started again with `latest`, killed again, and so on, until it is let go to its end. Half of the kills come at a random
time, the other half at a random file that the run opens, renames or removes, or a few milliseconds later: that is
where preparation and saves are. Of two ranks, one or both are killed; the other one has to end as well, by itself or
told to by SIGTERM, as launchers do it. Then the shards, the weights, the optimizer's state and everything logged are
compared with those of a run that nobody killed.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from functools import partial
from pathlib import Path

import torch
from forked import FINISHED, KINDS, Kind, in_child, make_sources, outcome, prepare, same, start, train, wait

from llmkit import files

EVENTS = ("open", "os.rename", "os.remove", "os.mkdir", "os.truncate", "shutil.rmtree")  # Python's audit events
COLUMNS = ("kills", "preparing", "training", "saving", "runs", "survived", "identical")


def count_files(folder: Path, at: int, then) -> list[int]:
    """Call `then` at the file event of that number within a folder. Returns the running count."""
    seen = [0]

    def hook(event: str, args: tuple) -> None:
        if event in EVENTS and isinstance(args[0], (str, Path)) and str(args[0]).startswith(str(folder)):
            seen[0] += 1
            if seen[0] == at:
                then()

    sys.addaudithook(hook)
    return seen


def count_then_write(kind: Kind, sources: Path, folder: Path, place: Path) -> None:
    """A whole run, with the number of its file events in a file."""
    seen, prepared = count_files(folder, -1, None), 0
    if not kind.fine_tuning:
        prepare(sources, folder)
        prepared = seen[0]
    train(kind, sources, folder)
    place.write_text(json.dumps([prepared, seen[0]]))


def kill_later(seconds: float, together: bool) -> None:
    def kill() -> None:
        time.sleep(seconds)
        os.killpg(0, signal.SIGKILL) if together else os.kill(os.getpid(), signal.SIGKILL)

    if seconds:
        threading.Thread(target=kill, daemon=True).start()
    else:
        kill()


class Trials:
    """Runs of one kind, and how they came out.

    Attributes:
        row: the counts of the table.
        longest: seconds from a rank's death to the end of the other.
    """

    def __init__(self, kind: Kind, sources: Path, folder: Path, rng: random.Random):
        self.kind, self.sources, self.folder, self.rng = kind, sources, folder, rng
        self.row, self.longest = Counter(), 0.0
        whole, count = folder / f"whole {kind}", folder / "count"
        began = time.perf_counter()
        counted = partial(count_then_write, kind, sources, whole, count)
        ending = wait(self._start(whole, lambda rank: train(kind, sources, whole) if rank else counted()))
        assert ending.finished, (whole / "out").read_text()
        self.seconds, (self.prepared, self.events) = time.perf_counter() - began, json.loads(count.read_text())
        self.expected = outcome(kind, whole)

    def _start(self, place: Path, work) -> list[int]:
        place.mkdir(exist_ok=True)
        return start(work, self.kind.ranks, place / "out")

    def trial(self, kills: int) -> None:
        """One run, started again until `kills` kills have hit it or it ends before them."""
        place = self.folder / "trial"
        self.row["runs"] += 1
        for _ in range(kills):
            ending = self._attempt(place)
            self.longest = max(self.longest, ending.alone)
            if ending.failed:
                self._report(place, f"a start failed: {ending}")
                break
            if not ending.killed:
                break
            self.row["kills"] += 1
            self.row[_phase(self.kind, place)] += 1
        ending = wait(self._start(place, lambda rank: train(self.kind, self.sources, place)))
        self.row["survived"] += ending.finished
        identical = ending.finished and same(outcome(self.kind, place), self.expected)
        self.row["identical"] += identical
        if not identical:
            self._report(place, f"the last start: {ending}")
        shutil.rmtree(place)

    def _attempt(self, place: Path):
        """A start that is to be killed, at a random time or at a random file event of a random rank."""
        by_time, together = self.rng.random() < 0.5, self.rng.random() < 0.3
        victim = self.rng.randrange(self.kind.ranks)
        if by_time:
            group = self._start(place, lambda rank: train(self.kind, self.sources, place))
            time.sleep(self.rng.uniform(0, self.seconds))
            os.killpg(group[0], signal.SIGKILL) if together else os.kill(group[victim], signal.SIGKILL)
            return wait(group)
        is_new = not (place / "data" / "manifest.json").exists() and self.prepared
        at = self.rng.randint(1, self.prepared if is_new and self.rng.random() < 0.7 else self.events)
        after = self.rng.choice((0, self.rng.uniform(0, 0.02)))

        def work(rank: int) -> None:
            if rank == victim:
                count_files(place, at, partial(kill_later, after, together))
            train(self.kind, self.sources, place)

        return wait(self._start(place, work))

    def _report(self, place: Path, what: str) -> None:
        print(f"{self.kind}, run {self.row['runs']}: {what}\n{(place / 'out').read_text()[-3000:]}", flush=True)


def _phase(kind: Kind, place: Path) -> str:
    """What a killed run was at, by what it left."""
    if not kind.fine_tuning and not (place / "data" / "manifest.json").exists():
        return "preparing"
    return "saving" if (place / "run" / ".saving").exists() else "training"


def chaos(folder: Path, kills: int, seed: int, kinds: list[Kind]) -> list[Trials]:
    """Kill runs of each kind in turn until `kills` kills have hit."""
    rng = random.Random(seed)
    sources = folder / "sources"
    sources.mkdir()
    assert in_child(partial(make_sources, sources)).statuses.popitem()[1] == FINISHED
    rows = [Trials(kind, sources, folder, rng) for kind in kinds]
    while (hit := sum(row.row["kills"] for row in rows)) < kills:
        min(rows, key=lambda row: row.row["kills"]).trial(min(rng.randint(1, 5), kills - hit))
    return rows


def table(rows: list[Trials]) -> str:
    total = sum((row.row for row in rows), Counter())
    lines = [f"{'':<32}" + "".join(f"{column:>11}" for column in COLUMNS)]
    for name, row in [*((str(row.kind), row.row) for row in rows), ("all", total)]:
        lines.append(f"{name:<32}" + "".join(f"{row[column]:>11}" for column in COLUMNS))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", type=int, nargs="*", help="numbers of kinds, from 0; all by default")
    options = parser.parse_args()
    torch.set_num_threads(1)  # threads do not survive a fork
    files.PATIENCE = 10.0
    kinds = KINDS if options.kinds is None else [KINDS[number] for number in options.kinds]
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        rows = chaos(Path(folder), options.kills, options.seed, kinds)
    print(table(rows))
    alone = max(row.longest for row in rows)
    print(f"{time.perf_counter() - began:.0f} s; a rank whose other was killed ended after at most {alone:.1f} s")
    total = sum((row.row for row in rows), Counter())
    sys.exit(any(total[column] != total["runs"] for column in ("survived", "identical")))


if __name__ == "__main__":
    main()
