"""Train variants of a recipe at equal tokens, on the same data, over seeds: what learns more from each token?

    python -m benchmarks.speedrun.train stdlib --tokens 1024000 --seeds 0 1 --variants baseline "split QKV"
    python -m benchmarks.speedrun.train characters --text tinyshakespeare.txt --tokens 460800 --seeds 0 1 2 3 4
    python -m benchmarks.speedrun.table stdlib

The tracks, their stock architectures and the variants are in `variants.py`, what a recipe cannot say in `tricks.py`.
`stdlib` trains on the standard library's sources, as the quickstart does, `characters` on a text file. Tokenizer and
shards are made once, in `data/`; their fingerprint is in each result, and results of other data are not compared.

All runs take turns in this process, on one thread by default. Each adds a line to `results/TRACK.jsonl` and is not run
again when it is there, so a sweep can be stopped and gone on with. The same seed means the same initial weights and
the same windows in the same order in all variants (but where the variant changes just these), so that their
differences are paired. Time is the processor's, of the training steps alone.
"""

import argparse
import contextlib
import dataclasses
import datetime
import hashlib
import io
import json
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import torch
from transformers import TrainerCallback
from transformers.utils.logging import disable_progress_bar

from benchmarks.measuring import cpu_name
from benchmarks.speedrun.tricks import Tricks, TriedTrainer, windows
from benchmarks.speedrun.variants import BASELINE, TRACKS, VARIANTS, settings
from llmkit.data.arguments import DataArguments
from llmkit.data.prepare import prepare_pretraining_data
from llmkit.machine import set_up_cpu
from llmkit.model.arguments import ModelArguments
from llmkit.training.arguments import PretrainArguments

RESULTS = Path(__file__).with_name("results")
# Evaluated in tenths of the run, from the sixth on: where a better variant passes the baseline's last loss.
EVALUATION = {"eval_strategy": "steps", "eval_steps": 0.1, "eval_delay": 0.55}


class StepTime(TrainerCallback):
    """Seconds of processor time, of all threads, between the begin and the end of the steps."""

    seconds = 0.0

    def on_step_begin(self, args, state, control, **kwargs):
        self.began = time.process_time()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds += time.process_time() - self.began


def fill(kind: type, keys: dict, **more):
    """A dataclass of the recipe, with those of the keys that are its fields."""
    names = {field.name for field in dataclasses.fields(kind)}
    return kind(**{name: value for name, value in keys.items() if name in names}, **more)


def run_id(track: str, variant: str, seed: int, tokens: int, data: str) -> str:
    """Of what decides a run's outcome: changed settings of a variant make another run."""
    tricks = dataclasses.asdict(VARIANTS[variant].tricks)
    tried = {name: value for name, value in tricks.items() if value != getattr(Tricks(), name)}
    parts = [settings(track, variant, tokens), tried, seed, data]
    return hashlib.sha256(json.dumps([track, *parts], sort_keys=True).encode()).hexdigest()[:12]


def train(track: str, variant: str, seed: int, tokens: int, tokenizer, manifest) -> dict:
    """One run: its line of the results."""
    keys, tricks = settings(track, variant, tokens), VARIANTS[variant].tricks
    model_args = fill(ModelArguments, keys)
    model = model_args.model(tokenizer, seed)
    train_windows, validation_windows = windows(manifest, model_args.block_size, tricks)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        quiet = {
            "output_dir": folder,
            "save_strategy": "no",
            "report_to": "none",
            "use_cpu": True,
            "logging_steps": 0.1,
        }
        keys |= quiet | EVALUATION | {"eval_delay": round(EVALUATION["eval_delay"] * keys["max_steps"])}
        args = fill(PretrainArguments, keys, seed=seed)
        trainer = TriedTrainer(model, args, train_windows, validation_windows, tokenizer)
        trainer.set_tricks(tricks)
        clock = StepTime()
        trainer.add_callback(clock)
        trainer.train()
        if trainer.stopped:
            raise SystemExit("stopped: the run is not in the results; the same command goes on with it")
        trainer.evaluate()
        log = {line["step"]: line for line in trainer.state.log_history if "eval_loss" in line}
    curve = [[trainer.tokens_before(step), line["eval_loss"]] for step, line in sorted(log.items())]
    last = log[args.max_steps]
    return {
        "seed": seed,
        "steps": args.max_steps,
        "trained_tokens": curve[-1][0],
        "loss": last["eval_loss"],
        "bits_per_byte": last["eval_bits_per_byte"],
        "processor_seconds": round(clock.seconds, 2),
        "curve": curve,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("track", choices=TRACKS)
    parser.add_argument("--tokens", type=int, required=True, help="the length of each run")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=[BASELINE], metavar="NAME")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--text", help="the text file of the track `characters`")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    if (options.text is None) == (options.track == "characters"):
        parser.error("--text is for the track characters, which needs it")

    set_up_cpu()
    torch.set_num_threads(options.threads)
    disable_progress_bar()
    text = {"text_files": [options.text]} if options.text else {}
    tokenizer, manifest = prepare_pretraining_data(fill(DataArguments, TRACKS[options.track], **text))
    data = hashlib.sha256(json.dumps([s.xxh3_64 for split in manifest.splits.values() for s in split.shards]).encode())
    data = data.hexdigest()[:12]
    machine = {"machine": cpu_name(), "threads": torch.get_num_threads()}
    machine |= {name: version(name) for name in ("torch", "transformers")}

    RESULTS.mkdir(exist_ok=True)
    results = RESULTS / f"{options.track}.jsonl"
    done = {json.loads(line)["id"] for line in results.read_text().splitlines()} if results.exists() else set()
    for seed in options.seeds:
        for variant in options.variants:
            name = run_id(options.track, variant, seed, options.tokens, data)
            if name in done:
                continue
            head = {"id": name, "variant": variant, "tokens": options.tokens, "data": data}
            result = train(options.track, variant, seed, options.tokens, tokenizer, manifest)
            date = datetime.date.today().isoformat()
            with results.open("a") as file:
                file.write(json.dumps(head | result | machine | {"date": date}) + "\n")
            print(
                f"{variant}, seed {seed}: loss {result['loss']:.4f}, {result['bits_per_byte']:.4f} bits/byte, "
                f"{result['processor_seconds']:.0f} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
