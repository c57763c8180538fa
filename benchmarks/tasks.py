"""Shards in several tasks: what N processes are worth beside one, and the memory of the largest of them.

    python benchmarks/tasks.py                                       # 8 files of 25 MB, 8 tasks, 1 and 2 at a time
    python benchmarks/tasks.py --rounds 3                            # in turns, and the medians
    python benchmarks/tasks.py --files 100000 --megabytes 100 --tasks 4 --workers 1
    python benchmarks/tasks.py --files 1 --megabytes 1000 --one_line --tasks 1 --workers 1
    python benchmarks/tasks.py --files 1 --megabytes 1000 --array --tasks 1 --workers 1
    python benchmarks/tasks.py --megabytes 730 --tasks 2 --workers 1            # about 200 million tokens

The text is the standard library's sources, as often as it takes, cut into files of equal size. With `--one_line` every
line end is a space. With `--array` a file is one JSON array in one line, of rows of 4,000 characters. `llmkit shards
prepare --executor local` runs in a process of its own with a BPE of 4,096 tokens. `seconds` are from its start to its
end, with imports and the merge; `tasks` from the start of the first task to the end of the last one, as datatrove's
logs tell. `memory` is the peak of the largest process, libraries included: the largest worker, or with one worker the
command itself, where the tasks then run. No worker may reach 2,000 MB. `of N times one` is the rate of N tasks at a
time beside N times the rate of one, round by round. `encoding alone` is the same of N processes that do nothing but
make tokens of one file's text in memory: what the machine itself gives to N processes that share nothing else.
"""

import argparse
import json
import multiprocessing
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path

from llmkit.data.encoding import fastest_encoder
from llmkit.data.sample_data import stdlib_sources
from llmkit.data.tokenizer import load_tokenizer, train_bpe_tokenizer
from measuring import cpu_name

TIME = re.compile(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3}")
ROW = 4000  # characters of a row in an array, and of a text that is encoded alone


def write_text(folder: Path, files: int, megabytes: float, one_line: bool, array: bool) -> None:
    """Files of one size, each another part of the text."""
    source = "".join(path.read_text(encoding="utf-8", errors="replace") for path in stdlib_sources())
    if one_line:
        source = source.replace("\n", " ")
    size, place = int(megabytes * 1e6) // files, 0
    for number in range(files):
        with (folder / f"{number:06d}.{'json' if array else 'txt'}").open("w") as file:
            left = size
            while left > 0:
                part = source[place : place + (min(left, ROW) if array else left)]
                file.write(("[" if left == size else ", ") + json.dumps({"text": part}) if array else part)
                left -= len(part)
                place = (place + len(part)) % len(source)
            file.write("]" if array else "")


def seconds_of_tasks(logs: Path) -> float:
    """From the first line of the tasks' logs to the last one."""
    times = [
        datetime.fromisoformat(found[0])
        for log in logs.glob("task_*.log")
        for line in log.read_text().splitlines()
        if (found := TIME.match(line))
    ]
    return (max(times) - min(times)).total_seconds()


def measure(options: argparse.Namespace, text: Path, tokenizer: Path, workers: int) -> tuple[int, float, float, float]:
    """Tokens, seconds of the command, seconds of its tasks, and peak memory of its largest process in MB."""
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        output = Path(folder) / "shards"
        command = [
            sys.executable,
            "-m",
            "llmkit",
            "shards",
            "prepare",
            "--text_files",
            str(text),
            "--output",
            str(output),
        ]
        command += ["--tokenizer", str(tokenizer), "--executor", "local", "--tasks", str(options.tasks)]
        # A process of its own between, so that its peak is that of this command's processes alone.
        script = (
            "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, capture_output=True); "
            "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
        )
        start = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-c", script, *command, "--workers", str(workers)], check=True, stdout=subprocess.PIPE
        )
        seconds = time.perf_counter() - start
        tokens = sum(path.stat().st_size for path in output.glob("*.bin")) // 2
        return tokens, seconds, seconds_of_tasks(output / "logs/tasks/logs"), int(done.stdout) / 1e3


def encode_alone(tokenizer: Path, file: Path, barrier, seconds) -> None:
    """In a process of its own: puts into `seconds` what the tokens of a file take, from its text in memory."""
    encode, _ = fastest_encoder(load_tokenizer(str(tokenizer)))
    text = file.read_text()
    rows = [text[start : start + ROW] for start in range(0, len(text), ROW)]
    encode(rows[:100])
    barrier.wait()
    begun = time.perf_counter()
    for start in range(0, len(rows), 100):
        encode(rows[start : start + 100])
    seconds.put(time.perf_counter() - begun)


def seconds_alone(tokenizer: Path, file: Path, processes: int) -> float:
    """Of the slowest of so many processes at a time."""
    spawned = multiprocessing.get_context("spawn")
    barrier, seconds = spawned.Barrier(processes), spawned.Queue()
    given = tokenizer, file, barrier, seconds
    started = [spawned.Process(target=encode_alone, args=given) for _ in range(processes)]
    for process in started:
        process.start()
    slowest = max(seconds.get() for _ in started)
    for process in started:
        process.join()
    return slowest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=8)
    parser.add_argument("--megabytes", type=float, default=200, help="of text in all files together (default 200)")
    parser.add_argument("--one_line", action="store_true", help="no line ends")
    parser.add_argument("--array", action="store_true", help="JSON instead of text, in one line")
    parser.add_argument("--tasks", type=int, default=8)
    parser.add_argument("--workers", type=int, nargs="+", default=sorted({1, os.cpu_count() or 1}))
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--folder", help="for the text and the shards (default: the system's temporary folder)")
    options = parser.parse_args()
    print(f"{options.files:,} files, {options.megabytes:,.0f} MB, {options.tasks} tasks; {cpu_name()}")
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        text, tokenizer = Path(folder) / "text", Path(folder) / "tokenizer"
        text.mkdir()
        write_text(text, options.files, options.megabytes, options.one_line, options.array)
        sources = (path.read_text(encoding="utf-8", errors="replace") for path in stdlib_sources())
        train_bpe_tokenizer(sources, 4096).save_pretrained(tokenizer)
        first = min(text.iterdir())
        rounds, alone = [], []
        for _ in range(options.rounds):
            rounds.append({workers: measure(options, text, tokenizer, workers) for workers in options.workers})
            alone.append({workers: seconds_alone(tokenizer, first, workers) for workers in options.workers})
    print(
        "workers       tokens  seconds    tasks  tokens/s of the tasks  memory MB    of N times one    encoding alone"
    )
    for workers in options.workers:
        tokens, seconds, tasks, memory = map(statistics.median, zip(*(each[workers] for each in rounds), strict=True))
        row = f"{workers:>7} {tokens:>12,} {seconds:>8.1f} {tasks:>8.1f} {tokens / tasks:>22,.0f} {memory:>10,.0f}"
        if workers > 1 and 1 in options.workers:
            row += spread([each[1][2] / each[workers][2] / workers for each in rounds])
            row += spread([each[1] / each[workers] for each in alone])  # each process has a whole file
        print(row, flush=True)


def spread(worth: list[float]) -> str:
    return f"  {statistics.median(worth):>5.2f} ({min(worth):.2f}..{max(worth):.2f})"


if __name__ == "__main__":
    main()
