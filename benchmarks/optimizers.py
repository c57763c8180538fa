"""Optimizers, schedules or any other settings of a recipe beside each other, at equal tokens, over several seeds.

    python benchmarks/optimizers.py --results sweep.jsonl --jobs 2 --threads 1 --seeds 0 1 2 \\
        --setting "max_steps=600 optim=adamw_torch_fused learning_rate=3e-3,5e-3,1e-2 muon_learning_rate=null" \\
        --setting "max_steps=600 optim=muon learning_rate=5e-3 muon_learning_rate=1e-2,2e-2"

A setting is fields of the recipe; several values with commas between them are all tried, in all combinations. Each
run is recipes/pretrain.py in a process of its own, by default the quickstart's model on the embedded corpus. What a
run ended with is a line of the results file; a line that is there is not run again while the recipe is the same, so a
sweep can be stopped, gone on with and extended. The table is sorted by the mean validation bits per byte.
"""

import argparse
import hashlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue

from llmkit.runs.run import load_run

ROOT = Path(__file__).parents[1]
PINNED = sys.platform == "linux"  # elsewhere runs at a time share all cores


def expand(setting: str) -> list[dict[str, str]]:
    """Every combination of "a=1,2 b=3"."""
    pairs = [pair.partition("=") for pair in setting.split()]
    if wrong := [name for name, equals, value in pairs if not (equals and value)]:
        raise SystemExit(f"error: --setting {setting!r}: {wrong[0]} has no value: write it as name=value")
    names, values = [name for name, _, _ in pairs], [value.split(",") for _, _, value in pairs]
    return [dict(zip(names, combination, strict=True)) for combination in itertools.product(*values)]


def show(fields: dict[str, str]) -> str:
    return " ".join(f"{name}={value}" for name, value in fields.items())


def recipe_hash(config: str) -> str:
    """Of the recipe's text: all that a setting does not name comes from it, and it may change between two sweeps."""
    return hashlib.sha256(Path(config).read_bytes()).hexdigest()[:8]


def train(options: argparse.Namespace, fields: dict[str, str], seed: int, cores: set[int]) -> dict:
    """One run, on these cores alone. `bits_per_byte` is None where its loss became nan."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        fixed = {"output_dir": run, "seed": seed, "eval_strategy": "no", "save_strategy": "no", "report_to": "none"}
        command = [sys.executable, "recipes/pretrain.py", "--config", options.config]
        for name, value in {**fields, **fixed}.items():
            command += [f"--{name}", str(value)]
        started = time.perf_counter()
        done = subprocess.run(
            command,
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": str(len(cores)), "OMP_WAIT_POLICY": "PASSIVE"},
            preexec_fn=(lambda: os.sched_setaffinity(0, cores)) if PINNED else None,
            capture_output=True,
            text=True,
        )
        result = {"config": options.config, "recipe": recipe_hash(options.config), "setting": fields, "seed": seed}
        result["bits_per_byte"] = None
        result["seconds"] = round(time.perf_counter() - started, 1)
        if done.returncode:
            last = done.stderr.strip().splitlines()[-1]
            if "the loss is" not in last:
                raise SystemExit(f"{' '.join(command)}\n{last}")
            return result | {"error": last}
        log = load_run(run)
        last = log.evaluations[-1]
        return result | {
            "bits_per_byte": last["eval_bits_per_byte"],
            "loss": last["eval_loss"],
            "steps": last["step"],
            "parameters": log.record["model"]["parameters"],
        }


def table(results: list[dict], seeds: list[int]) -> str:
    """Settings by their mean; the spread is the standard deviation over the seeds."""
    rows = {}
    for result in results:
        rows.setdefault(show(result["setting"]), {})[result["seed"]] = result["bits_per_byte"]
    means = {
        name: statistics.fmean(found.values()) if None not in found.values() else float("inf")
        for name, found in rows.items()
    }
    width = max(map(len, rows))
    lines = [f"{'setting':<{width}}" + "".join(f"{f'seed {seed}':>9}" for seed in seeds) + f"{'mean':>9}{'spread':>9}"]
    for name in sorted(rows, key=means.get):
        cells = [rows[name].get(seed, "-") for seed in seeds]
        cells += [means[name] if means[name] < float("inf") else None]
        values = list(rows[name].values())
        cells += [statistics.stdev(values) if len(values) > 1 and None not in values else "-"]
        texts = ["diverged" if cell is None else cell if cell == "-" else f"{cell:.4f}" for cell in cells]
        lines.append(f"{name:<{width}}" + "".join(f"{text:>9}" for text in texts))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--setting", action="append", required=True, help="fields of the recipe, 'name=value ...'")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--config", default="recipes/pretrain_quickstart.yaml", help="the recipe")
    parser.add_argument("--results", type=Path, default=Path("optimizers.jsonl"), help="one line a run, appended to")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--threads", type=int, default=None, help="cores of a run; default: all, shared by the jobs")
    options = parser.parse_args()

    available = sorted(os.sched_getaffinity(0)) if PINNED else range(os.cpu_count())
    threads = options.threads or max(1, len(available) // options.jobs)
    if options.jobs * threads > len(available):
        raise SystemExit(f"error: {options.jobs} jobs of {threads} cores each, and there are {len(available)}")
    free = Queue()
    for job in range(options.jobs):
        free.put(set(available[job * threads : (job + 1) * threads]))

    wanted = [fields for setting in options.setting for fields in expand(setting)]
    minutes = "\ntrain_minutes:" in Path(options.config).read_text()
    if minutes and any("max_steps" not in fields for fields in wanted):
        raise SystemExit("error: the recipe's length is stated in minutes: add max_steps to each --setting")
    lines = options.results.read_text().splitlines() if options.results.exists() else []
    done = {(line["recipe"], show(line["setting"]), line["seed"]): line for line in map(json.loads, lines)}

    def work(fields: dict[str, str], seed: int) -> dict:
        cores = free.get()
        try:
            result = train(options, fields, seed, cores)
        finally:
            free.put(cores)
        with options.results.open("a") as file:
            file.write(json.dumps(result) + "\n")
        bits = result["bits_per_byte"]
        found = f"{bits:.4f} bits/byte" if bits is not None else result["error"]
        print(f"{show(fields)}, seed {seed}: {found}, {result['seconds']:.0f} s", flush=True)
        return result

    with ThreadPoolExecutor(options.jobs) as pool:
        runs = [(fields, seed) for seed in options.seeds for fields in wanted]
        keys = [(recipe_hash(options.config), show(fields), seed) for fields, seed in runs]
        started = [done.get(key) or pool.submit(work, *run) for key, run in zip(keys, runs, strict=True)]
        try:
            results = [found if isinstance(found, dict) else found.result() for found in started]
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    print(table(results, options.seeds))


if __name__ == "__main__":
    main()
