"""Damaged files and full disks: prints what was found, and what came out.

    python tests/chaos/damage.py

Every file of finished checkpoints and of prepared shards is damaged in several ways, one at a time: bits flipped at
the beginning, in the middle, at the end and at random places, cut by one byte, by half and to nothing, made longer,
removed. Each has to be found before the file is used, by what looks at them when a run is resumed or begins, or is
harmless: what is used is the same (a blank in a JSON file, the name of the corpus).

A full disk is a small file system in memory (a mount, which takes root; else no file may grow past a limit) that has
the run and its shards. The run may go on without its checkpoints or end with one line; with room again it is started
again, and what it ends with is compared with what a run on a large disk gives.
"""

import argparse
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import torch
from forked import KINDS, Kind, in_child, make_sources, outcome, prepare, same, start, train, wait

from llmkit.errors import UserError, exit_on_user_error
from llmkit.training.checkpoints import checkpoints_of, damage_of

ROOM = 8 << 20  # bytes; more than a run takes


def damages(whole: bytes, rng: random.Random):
    """A file's contents, damaged in each way; None for a file that is gone."""
    places = [0, len(whole) // 2, len(whole) - 1, *(rng.randrange(len(whole)) for _ in range(3))]
    for place in places if whole else []:
        yield whole[:place] + bytes([whole[place] ^ 1 << rng.randrange(8)]) + whole[place + 1 :]
    if whole:
        yield from (whole[:-1], whole[: len(whole) // 2], b"")
    yield whole + b"\0"
    yield None


def damage_all(folder: Path, look, out: Path) -> None:
    """Damage each file of a folder in each way. The counts go into a file, with what was not found.

    Args:
        look: what would be used of the folder as it is, or None where the damage is found.
    """
    rng, files, tried, harmless, missed = random.Random(0), 0, 0, 0, []
    expected = look()
    assert expected is not None, f"{folder} is whole"
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.endswith(".lock")):
        files += 1
        whole = path.read_bytes()
        for damaged in damages(whole, rng):
            path.unlink()
            if damaged is not None:
                path.write_bytes(damaged)
            tried += 1
            used = look()
            harmless += used == expected
            if used not in (None, expected):
                missed.append(f"{path.relative_to(folder)}: {_difference(whole, damaged)}")
            path.write_bytes(whole)
    assert look() == expected, "it is whole again"
    out.write_text(json.dumps([files, tried, harmless, missed]))


def _difference(whole: bytes, damaged: bytes | None) -> str:
    if damaged is None or len(damaged) != len(whole):
        return "removed" if damaged is None else f"{len(damaged)} bytes instead of {len(whole)}"
    place = next(index for index in range(len(whole)) if whole[index] != damaged[index])
    return f"{whole[max(0, place - 40) : place + 8]!r}, became {damaged[place : place + 1]!r} at {place}"


def checkpoint_used(checkpoint: Path) -> str | None:
    """Every byte of a checkpoint is used, or none."""
    return None if damage_of(checkpoint) else "all of it"


def shards_used(sources: Path, folder: Path) -> list | None:
    """What a run that begins on prepared shards would use of them; None if it ends with one line."""
    try:
        tokenizer, manifest = prepare(sources, folder)
        manifest.verify()
    except UserError:
        return None
    counts = {name: (split.tokens, split.bytes, split.documents) for name, split in manifest.splits.items()}
    shards = [shard.name for split in manifest.splits.values() for shard in split.shards]
    meaning = manifest.fingerprint, manifest.dtype, manifest.vocab_size, manifest.eos_token_id
    return [counts, shards, meaning, tokenizer.backend_tokenizer.to_str(), tokenizer.special_tokens_map]


class Disk:
    """A folder with little room, and later with enough."""

    def __init__(self, folder: Path, size: int):
        self.folder, self.size = folder, size
        folder.mkdir()
        self.mounted = _mount(folder, f"size={size // 1024}k")

    def limit(self) -> None:
        """In the process that is to run out of room."""
        if not self.mounted:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, resource.RLIM_INFINITY))

    def make_room(self) -> None:
        if self.mounted:
            assert _mount(self.folder, f"remount,size={ROOM // 1024}k")

    def remove(self) -> None:
        if self.mounted:
            subprocess.run(["umount", self.folder], check=True)
        shutil.rmtree(self.folder, ignore_errors=True)


def _mount(folder: Path, options: str) -> bool:
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder]
    return os.geteuid() == 0 and subprocess.run(command, capture_output=True).returncode == 0


def fill(kind: Kind, sources: Path, folder: Path, expected: tuple, size: int, output: Path) -> tuple[bool, bool]:
    """A run on a small disk. Returns whether it was too small, and whether all came out well."""
    disk = Disk(folder, size)

    @exit_on_user_error
    def work(rank: int) -> None:
        disk.limit()
        train(kind, sources, folder)

    first = wait(start(work, kind.ranks, output))
    text = output.read_text()
    full = not first.finished or "could not be saved" in text
    well = not first.hung and "Traceback" not in text
    disk.make_room()
    if not checkpoints_of(folder / "run"):  # none had room: going on is refused, with the advice to begin again
        shutil.rmtree(folder / "run", ignore_errors=True)
    again = wait(start(lambda rank: train(kind, sources, folder), kind.ranks, output))
    well = well and again.finished and same(outcome(kind, folder), expected)
    if not well:
        print(f"{kind}, a disk of {size:,} bytes: {first}, then {again}\n{output.read_text()[-4000:]}", flush=True)
    disk.remove()
    output.unlink()
    return full, well


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--disks", type=int, default=24, help="how many small disks")
    parser.add_argument("--largest", type=int, default=2_000, help="of them, in KiB")
    options = parser.parse_args()
    torch.set_num_threads(1)  # threads do not survive a fork
    rng, failed, expected = random.Random(0), False, {}
    kinds = [kind for kind in KINDS if "AdamW" in kind.name]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sources, counts = folder / "sources", folder / "counts"
        sources.mkdir()
        assert in_child(partial(make_sources, sources)).finished
        print(f"{'damaged':<44}{'files':>7}{'damages':>9}{'found':>7}{'harmless':>10}")
        for kind in kinds:
            place = folder / str(kind)
            place.mkdir()
            assert wait(start(lambda rank: train(kind, sources, place), kind.ranks)).finished  # noqa: B023
            expected[kind] = outcome(kind, place)
            last = checkpoints_of(place / "run")[-1]
            checks = [(f"checkpoint of {kind}", last, partial(checkpoint_used, last))]
            if kind == kinds[0]:
                checks.append(("shards", place / "data", partial(shards_used, sources, place)))
            for what, damaged, look in checks:
                ending = in_child(partial(damage_all, damaged, look, counts), folder / "out")
                assert ending.finished, (folder / "out").read_text()
                files, tried, harmless, missed = json.loads(counts.read_text())
                found = tried - harmless - len(missed)
                print(f"{what:<44}{files:>7}{tried:>9}{found:>7}{harmless:>10}", *missed, sep="\n    ", flush=True)
                failed = failed or bool(missed)
        print(f"{'disks':<44}{'tried':>7}{'too small':>11}{'well':>6}")
        for kind in kinds:
            sizes = [rng.randrange(20, options.largest) << 10 for _ in range(options.disks // len(kinds))]
            ends = [fill(kind, sources, folder / "disk", expected[kind], size, folder / "out") for size in sizes]
            full, well = (sum(column) for column in zip(*ends, strict=True))
            print(f"{kind!s:<44}{len(ends):>7}{full:>11}{well:>6}", flush=True)
            failed = failed or well < len(ends)
    sys.exit(failed)


if __name__ == "__main__":
    main()
