"""From launch to the first step, from resuming to the next one, and to the answer where nothing is to be trained.

    python benchmarks/startup.py
    python benchmarks/startup.py --sizes_mb 1 10000 --positions 1000 1000000

Everything goes through the real `accelerate launch recipes/pretrain.py`, with a model of no size. Seconds go from the
command to the line of its first step. `imports` are those that a run needs, in a process that does nothing else; what
`accelerate launch` itself imports comes on top of them. `generate --help` and `a mistake`, a wrong value given to
`llmkit train`, are answered without these imports.
The shards are what the recipe makes of a little text, and then more files of zeros, sparse, of 100 million tokens each
with the manifest to match. A resumed run has the checkpoint of a run of two steps with its position set ahead, so that
nobody has to train a million steps first.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from llmkit.data.manifest import MANIFEST
from llmkit.files import checksum
from llmkit.training.checkpoints import COMPLETE, seal
from measuring import add_options, machine, print_table, report, take_turns, use_threads

ROOT = Path(__file__).parents[1]
SHARD_TOKENS = 100_000_000
TEXT = "The quick brown fox jumps over the lazy dog.\n" * 2000
SIZES = {"n_layer": 1, "n_head": 1, "n_embd": 64, "block_size": 256, "total_batch_tokens": 256, "vocab_size": 300}
REST = {"per_device_train_batch_size": 1, "per_device_eval_batch_size": 64, "eval_strategy": "no", "logging_steps": 1}
REST |= {"validation_split": "tail", "save_strategy": "steps", "save_steps": 2, "warmup_steps": 0, "report_to": "none"}


def recipe(work: Path, output: str, max_steps: int, *more: str) -> list[str]:
    settings = SIZES | REST | {"max_steps": max_steps, "data_dir": work / "data", "output_dir": work / output}
    flags = [str(word) for key, value in settings.items() for word in (f"--{key}", value)]
    return [*launch(), "--text_files", str(work / "text.txt"), *flags, *more]


def launch() -> list[str]:
    config = ["--config_file", "accelerate_configs/cpu.yaml"]
    return [sys.executable, "-m", "accelerate.commands.launch", *config, "recipes/pretrain.py"]


# The commands that end without a step, and their status.
LLMKIT = [sys.executable, "-m", "llmkit"]
ANSWERS = {
    "imports": ([sys.executable, "-c", "import llmkit.training.pretrain_trainer"], 0),
    "generate --help": ([*LLMKIT, "generate", "--help"], 0),
    "a mistake": ([*LLMKIT, "train", "pretrain_quickstart", "--max_steps", "none"], 2),
}


def prepare(work: Path, positions: list[int]) -> None:
    """A run of two steps on a little text, and a copy of it for each position."""
    (work / "text.txt").write_text(TEXT)
    done = subprocess.run(recipe(work, "run", 2), cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{done.stdout}{done.stderr}")
    for position in positions:
        checkpoint = work / f"at_{position}" / f"checkpoint-{position}"
        staged = checkpoint.with_name("staged")
        shutil.copytree(work / "run" / "checkpoint-2", staged)
        state = json.loads((staged / "trainer_state.json").read_text())
        (staged / "trainer_state.json").write_text(json.dumps(state | {"global_step": position}))
        (staged / COMPLETE).unlink()
        seal(staged, checkpoint, ranks=1)
        # Without the run's log, by which the recipe would tell that the data are no longer the same.


def grow(data: Path, megabytes: float) -> None:
    """Sparse shards up to this size, in place of those that were added before."""
    original, path = data / "original.json", data / MANIFEST
    if not original.exists():
        shutil.copy(path, original)
    manifest = json.loads(original.read_text())
    train = manifest["splits"]["train"]
    missing = int(megabytes * 1e6) // 2 - train["tokens"]
    while missing > 0:
        tokens = min(SHARD_TOKENS, missing)
        name = f"train_{len(train['shards']):05d}.bin"
        with (data / name).open("wb") as file:
            file.truncate(2 * tokens)
        shard = train["shards"][0] | {"name": name, "tokens": tokens, "xxh3_64": checksum(data / name)}
        train["shards"].append(shard)
        for count in ("tokens", "documents", "bytes", "unknown_tokens"):
            train[count] += shard[count]
        missing -= tokens
    path.write_text(json.dumps(manifest))


def seconds_to(text: str | None, command: list[str], status: int = 0) -> float:
    """Wall time until a line of the output has the text, or until the command ends, with this status."""
    start = time.perf_counter()
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        lines = []
        for line in process.stdout:
            lines.append(line)
            if text is not None and text in line:
                found = time.perf_counter() - start
                process.communicate()
                return found
    if text is not None or process.returncode != status:
        sys.exit("".join(lines))
    return time.perf_counter() - start


def measure(options: argparse.Namespace) -> dict[str, float]:
    if options.peer in ANSWERS:
        return {"seconds": seconds_to(None, *ANSWERS[options.peer])}
    work = Path(options.work)
    what, _, rest = options.peer.partition(", ")
    megabytes = float(rest.split(" MB")[0].replace(",", ""))
    grow(work / "data", megabytes)
    output = f"{options.peer} {options.turn}"
    if what == "fresh":
        return {"seconds": seconds_to("| loss", recipe(work, output, 1))}
    position = int(what.removeprefix("resumed at ").replace("_", ""))
    shutil.copytree(work / f"at_{position}", work / output)
    command = recipe(work, output, position + 1, "--resume_from_checkpoint", "latest")
    return {"seconds": seconds_to("| loss", command)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, rounds=3)
    parser.add_argument("--sizes_mb", type=float, nargs="+", default=[1, 10_000], help="of the shards")
    parser.add_argument("--positions", type=int, nargs="+", default=[1000, 1_000_000], help="steps before resuming")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    options = parser.parse_args()
    use_threads(options.threads)
    os.environ["PYTHONUNBUFFERED"] = "1"
    if options.peer:
        report(measure(options))
        return
    with tempfile.TemporaryDirectory() as work:
        prepare(Path(work), options.positions)
        sys.argv += ["--work", work]
        peers = [*ANSWERS]
        for size in options.sizes_mb:
            peers.append(f"fresh, {size:,.0f} MB")
            peers += [f"resumed at {position:_}, {size:,.0f} MB" for position in options.positions]
        print(f"command to first step, a step of 256 tokens; {options.rounds} rounds\n{machine('accelerate')}")
        print_table(take_turns(peers, options.rounds), {"seconds": ",.1f"})


if __name__ == "__main__":
    main()
