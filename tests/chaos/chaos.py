"""SIGKILL at random instants: `make chaos` prints what was tried, what survived and what ended bit for bit the same.

    python tests/chaos/chaos.py --kills 200

Each trial is a run of a small model in a child that is forked from this process, so that imports are paid once. It is
killed with SIGKILL after a random time, resumed with `latest` and killed again, until it ends by itself. A third of
the kills come in the middle of a save, weighted by where in it. Then weights, optimizer, and every logged loss are
compared with those of a run that nobody killed.
"""

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[1]))

from llmkit import files
from llmkit.data.corpus import open_corpus
from llmkit.data.manifest import load_manifest
from llmkit.data.shards import prepare_shards
from llmkit.data.tokenizer import load_tokenizer, train_bpe_tokenizer
from llmkit.training import checkpoints
from llmkit.training.checkpoints import checkpoint_to_resume
from small_run import BLOCK, trainer

STEPS = 8
HOW = {"save_strategy": "steps", "save_steps": 2, "max_steps": STEPS, "per_device_train_batch_size": 4}
HOW |= {"save_total_limit": 2, "eval_strategy": "steps", "eval_steps": 4}
KINDS = {
    "adamw": {},
    "muon": {"optim": "muon"},
    "ramp": {"batch_ramp_start": 3 * BLOCK, "batch_ramp_tokens": 16 * BLOCK},
}
FINISHED, FAILED = 0, 3


def make_data(folder: Path) -> None:
    """Shards of a little text, and their tokenizer. In a child: its threads would be missing after a fork."""
    for number in range(40):
        (folder / f"{number}.txt").write_text("".join(f"{number} times {n} is {number * n}\n" for n in range(30)))
    corpus = open_corpus([str(folder / "*.txt")])
    tokenizer = train_bpe_tokenizer(corpus.documents(), 300)
    prepare_shards(corpus, tokenizer, folder / "shards", validation_fraction=0.1)
    tokenizer.save_pretrained(folder / "tokenizer")


def train(data: Path, folder: Path, kind: str, kill_at_write: int | None = None) -> None:
    """Start or go on, as a job does that always says `latest`.

    Args:
        kill_at_write: end by SIGKILL before this file of the run's saves reaches the disk, counted over the start.
    """
    if kill_at_write is not None:
        left = [kill_at_write]

        def counting(call):
            def counted(*args):
                left[0] -= 1
                if left[0] < 0:
                    os.kill(os.getpid(), 9)
                return call(*args)

            return counted

        checkpoints.sync = counting(files.sync)
        checkpoints.write_whole = counting(files.write_whole)
    parts = load_manifest(data / "shards"), load_tokenizer(str(data / "tokenizer"))
    run = trainer(parts, folder, **HOW, **KINDS[kind], resume_from_checkpoint="latest")
    run.train(resume_from_checkpoint=checkpoint_to_resume(run.args))


def in_child(work, kill_after: float | None) -> tuple[bool, bool]:
    """Run in a forked child. Returns whether it was killed, and whether it failed by itself."""
    child = os.fork()
    if child == 0:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 1)
            os.dup2(nowhere.fileno(), 2)
        try:
            work()
        except BaseException:
            os._exit(FAILED)
        os._exit(FINISHED)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, 9)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status), os.WIFEXITED(status) and os.WEXITSTATUS(status) == FAILED


def outcome(folder: Path) -> tuple:
    """What a run has come to: weights, the optimizer's state, and what was logged at each step."""
    last = folder / f"checkpoint-{STEPS}"
    state = torch.load(last / "optimizer.pt", weights_only=True)["state"]
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    logged = {
        (record["step"], key): record[key] for record in records for key in ("loss", "eval_loss") if key in record
    }
    return load_file(last / "model.safetensors"), state, logged


def same(found: tuple, expected: tuple) -> bool:
    weights = all(torch.equal(found[0][name], weight) for name, weight in expected[0].items())
    moments = all(
        torch.equal(torch.as_tensor(found[1][key][name]), torch.as_tensor(value))
        for key, values in expected[1].items()
        for name, value in values.items()
    )
    return weights and moments and found[2] == expected[2]


def chaos(folder: Path, kills: int, seed: int, kinds=tuple(KINDS)) -> dict[str, Counter]:
    """Kill runs of each kind until `kills` kills have hit. Returns the table's rows."""
    rng, rows, expected, seconds = random.Random(seed), {}, {}, {}
    assert in_child(partial(make_data, folder), None) == (False, False)
    for kind in kinds:
        start = time.perf_counter()
        ended = in_child(partial(train, folder, folder / f"whole_{kind}", kind), None)
        assert ended == (False, False), "a run that nobody killed did not end by itself"
        seconds[kind] = time.perf_counter() - start
        expected[kind] = outcome(folder / f"whole_{kind}")
        rows[kind] = Counter()
    trial = 0
    while sum(row["kills"] for row in rows.values()) < kills:
        trial += 1
        kind = kinds[trial % len(kinds)]
        row, run = rows[kind], folder / f"trial_{trial}"
        row["runs"] += 1
        for _ in range(rng.choice((1, 1, 2))):
            within_save = rng.random() < 1 / 3
            count = rng.randrange(40) if within_save else None
            after = None if within_save else rng.uniform(0, seconds[kind])
            killed, failed = in_child(partial(train, folder, run, kind, count), after)
            row["kills"] += killed
            row["failed"] += failed
        _, failed = in_child(partial(train, folder, run, kind), None)
        row["survived"] += not failed
        row["bit-identical"] += not failed and same(outcome(run), expected[kind])
        shutil.rmtree(run, ignore_errors=True)
    return rows


def table(rows: dict[str, Counter]) -> str:
    columns = ("kills", "runs", "survived", "bit-identical")
    total = sum(rows.values(), Counter())
    lines = [f"{'':>8}" + "".join(f"{column:>15}" for column in columns)]
    for name, row in [*rows.items(), ("all", total)]:
        lines.append(f"{name:>8}" + "".join(f"{row[column]:>15}" for column in columns))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)  # threads do not survive a fork
    files.PATIENCE = 10.0
    with tempfile.TemporaryDirectory() as folder:
        rows = chaos(Path(folder), options.kills, options.seed)
    print(table(rows))
    sys.exit(any(row["bit-identical"] != row["runs"] for row in rows.values()))


if __name__ == "__main__":
    main()
