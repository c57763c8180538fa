"""A training step of llmkit's GPT-2 in PretrainTrainer beside the stock GPT-2 in Trainer, on this machine.

    python benchmarks/training_step.py                       # 6 layers, 384 wide, context 256, vocabulary 50,257
    python benchmarks/training_step.py --rounds 5 --bf16

Both train the same random tokens, with the same sizes, dropout 0 and the same AdamW. Each measurement is a process of
its own, and the two take turns, so that a drift of the machine meets both. The table gives medians over the rounds,
and the ratio of each round's pair: tokens per second of the steps after the first two, and the growth of the
process's peak memory from before the first step.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import transformers

from llmkit import GPT2Config, GPT2LMHeadModel
from llmkit.arguments import PretrainArguments
from llmkit.dataset import TokenWindows
from llmkit.hardware import device_name
from llmkit.manifest import Manifest, Shard, Split
from llmkit.tokenizer import train_character_tokenizer
from llmkit.trainer import PretrainTrainer

WARMUP_STEPS = 2


class StepTimes(transformers.TrainerCallback):
    """When each step ended."""

    def __init__(self):
        self.ends = []

    def on_step_end(self, args, state, control, **kwargs):
        if args.device.type == "cuda":
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())


def random_shards(directory: Path, vocab_size: int, tokens: int) -> Manifest:
    ids = np.random.default_rng(0).integers(0, vocab_size, tokens, dtype=np.uint16)
    ids.tofile(directory / "random.bin")
    split = Split.of([Shard("random.bin", tokens=tokens, documents=1, bytes=tokens)])
    settings = {"corpus": "random", "tokenizer": "none"}
    return Manifest(
        directory, "uint16", vocab_size, 0, "random tokens", settings, dict.fromkeys(("train", "validation"), split)
    )


def peak_memory() -> int:
    """Bytes: of the GPU where there is one, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(options: argparse.Namespace) -> dict:
    """One process's measurement of `options.which`."""
    with tempfile.TemporaryDirectory() as folder:
        tokens = options.batch_size * options.block_size
        manifest = random_shards(Path(folder), options.vocab_size, tokens * (options.steps + 2))
        sizes = {"vocab_size": options.vocab_size, "n_positions": options.block_size, "n_layer": options.n_layer}
        sizes |= {"n_embd": options.n_embd, "n_head": options.n_embd // 64, "bos_token_id": 0, "eos_token_id": 0}
        dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
        shared = {"output_dir": folder, "max_steps": options.steps, "per_device_train_batch_size": options.batch_size}
        shared |= {"bf16": options.bf16, "torch_compile": options.compile, "save_strategy": "no", "report_to": "none"}
        shared |= {"logging_steps": 10, "use_cpu": not torch.cuda.is_available(), "disable_tqdm": True}
        windows = TokenWindows(manifest, "train", options.block_size)
        if options.which == "llmkit":
            model = GPT2LMHeadModel(GPT2Config(**sizes))
            args = PretrainArguments(**shared, total_batch_tokens=tokens)
            tokenizer = train_character_tokenizer(["abc"])
            trainer = PretrainTrainer(model, args, windows, windows, processing_class=tokenizer)
        else:
            model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **dropout))
            rows = [{"input_ids": w["input_ids"], "labels": w["input_ids"]} for w in windows]
            trainer = transformers.Trainer(model, transformers.TrainingArguments(**shared), train_dataset=rows)
        times = StepTimes()
        trainer.add_callback(times)
        before = peak_memory()
        trainer.train()
        seconds = times.ends[-1] - times.ends[WARMUP_STEPS - 1]
        return {
            "tokens_per_second": (options.steps - WARMUP_STEPS) * tokens / seconds,
            "memory": peak_memory() - before,
        }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--n_layer", type=int, default=6)
    parser.add_argument("--n_embd", type=int, default=384)
    parser.add_argument("--block_size", type=int, default=256)
    parser.add_argument("--batch_size", type=int, default=12)
    parser.add_argument("--vocab_size", type=int, default=50257)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--which", choices=("llmkit", "stock"), help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    options = parse()
    if options.which:
        print("measured", json.dumps(measure(options)))
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(
        f"{options.n_layer} layers, {options.n_embd} wide, {options.batch_size} x {options.block_size} tokens, "
        f"vocabulary {options.vocab_size:,}, {'bf16' if options.bf16 else 'float32'}, "
        f"compile {'on' if options.compile else 'off'}; {device_name(device)}, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}, transformers {transformers.__version__}; {options.rounds} rounds"
    )
    results = {"llmkit": [], "stock": []}
    for _ in range(options.rounds):
        for which, found in results.items():
            command = [sys.executable, *sys.argv, "--which", which]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                sys.exit(done.stderr)
            found.append(json.loads(done.stdout.split("measured ")[1]))
    print(f"{'':>10}{'tokens/s':>12}{'min..max':>20}{'memory growth':>16}")
    for which, found in results.items():
        speeds = [result["tokens_per_second"] for result in found]
        memory = statistics.median(result["memory"] for result in found) / 1e6
        spread = f"{min(speeds):,.0f}..{max(speeds):,.0f}"
        print(f"{which:>10}{statistics.median(speeds):>12,.0f}{spread:>20}{memory:>13,.0f} MB")
    pairs = list(zip(results["llmkit"], results["stock"], strict=True))
    ratios = {key: statistics.median(ours[key] / stock[key] for ours, stock in pairs) for key in pairs[0][0]}
    print(f"{'ratio':>10}{ratios['tokens_per_second']:>12.2f}{'':>20}{ratios['memory']:>13.2f}")


if __name__ == "__main__":
    main()
