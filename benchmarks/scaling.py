"""Scaling: two ranks on one CPU beside one, measured; and what 8 to 512 GPUs will have to send, on paper.

    python benchmarks/scaling.py
    python benchmarks/scaling.py --paper --link_gbytes 50 --peak_tflops 989 --mfu 0.4 --batch_tokens 524288

Measured: `accelerate launch recipes/pretrain.py` on one rank and on two (gloo), the same batch of tokens, so that two
ranks have half each. Two ranks share the cores that one rank has alone: what is seen is the cost of sharing them and
of the all-reduce, and not a speed-up, which needs cores of their own.

On paper, a step of N ranks with P parameters, float32 masters and bf16 autocast, AdamW:

    DDP      sends 2 (N-1)/N x 4P bytes a rank (ring all-reduce of float32 gradients);
             holds 20P bytes a rank: parameters, gradients, two moments and DDP's buckets, each float32
    FSDP2    sends (N-1)/N x (2 x 2P + 4P) bytes a rank a micro-batch: all-gather of bf16 parameters for forward and
             again for backward, reduce-scatter of float32 gradients;
             holds 16P/N bytes a rank, and one block's parameters gathered

Activations come on top, alike in both. `of compute` is the time to send over the time to compute, 6P FLOPs a token at
the given share of the peak, for a rank's part of the batch in one micro-batch: below 1 it can be hidden behind the
backward pass, of which DDP and FSDP2 overlap most.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from llmkit import GPT2Config
from measuring import add_options, machine, print_table, report, take_turns, use_threads

ROOT = Path(__file__).parents[1]
RANKS = {"1 rank": "cpu", "2 ranks": "multi_cpu"}
FLOAT32, BF16 = 4, 2  # bytes


def sent_by_ddp(parameters: int, ranks: int) -> float:
    """Bytes that a rank sends in a step."""
    return 2 * (ranks - 1) / ranks * FLOAT32 * parameters


def sent_by_fsdp(parameters: int, ranks: int) -> float:
    """Bytes that a rank sends in a micro-batch."""
    return (ranks - 1) / ranks * (2 * BF16 + FLOAT32) * parameters


def held_by_ddp(parameters: int) -> float:
    """Bytes of a rank's parameters, gradients, two moments of Adam, and buckets, which are a copy of the gradients."""
    return 5 * FLOAT32 * parameters


def held_by_fsdp(parameters: int, ranks: int) -> float:
    """Bytes of a rank's part of parameters, gradients and Adam's two moments."""
    return 4 * FLOAT32 * parameters / ranks


def print_paper(options: argparse.Namespace) -> None:
    print(
        f"a batch of {options.batch_tokens:,} tokens, {options.mfu:.0%} of {options.peak_tflops:g} TFLOP/s a GPU, "
        f"links of {options.link_gbytes:g} GB/s a GPU"
    )
    titles = ("model", "GPUs", "DDP sends", "holds", "of compute", "FSDP2 sends", "holds", "of compute")
    print("".join(f"{title:>13}" for title in titles))
    for preset in ("124M", "1558M"):
        config = GPT2Config.from_preset(preset)
        parameters = config.num_parameters
        for ranks in (8, 64, 512):
            flops = config.flops_per_token() * options.batch_tokens / ranks
            compute = flops / (options.mfu * options.peak_tflops * 1e12)
            row = f"{preset:>13}{ranks:>13}"
            ways = (
                (sent_by_ddp(parameters, ranks), held_by_ddp(parameters)),
                (sent_by_fsdp(parameters, ranks), held_by_fsdp(parameters, ranks)),
            )
            for sent, held in ways:
                sending = sent / (options.link_gbytes * 1e9)
                row += f"{sent / 1e9:>10.2f} GB{held / 1e9:>10.2f} GB{sending / compute:>13.2f}"
            print(row)


def measure(options: argparse.Namespace) -> dict[str, float]:
    """Tokens per second as the run's own log has them, without the first of the logged stretches."""
    with tempfile.TemporaryDirectory() as folder:
        settings = {"n_layer": options.n_layer, "n_head": options.n_embd // 64, "n_embd": options.n_embd}
        settings |= {"block_size": 256, "total_batch_tokens": 8192, "per_device_train_batch_size": 8}
        settings |= {"max_steps": options.steps, "logging_steps": max(1, options.steps // 4), "eval_strategy": "no"}
        settings |= {"save_strategy": "no", "output_dir": folder, "warmup_steps": 2}
        command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
        command += [f"accelerate_configs/{RANKS[options.peer]}.yaml", "recipes/pretrain.py"]
        command += [str(word) for key, value in settings.items() for word in (f"--{key}", value)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{done.stdout}{done.stderr}")
        log = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]
    speeds = [line["tokens_per_second"] for line in log if "tokens_per_second" in line][1:]
    return {"tokens/s": sum(speeds) / len(speeds)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, rounds=3)
    parser.add_argument("--paper", action="store_true", help="only the table on paper")
    parser.add_argument("--n_layer", type=int, default=3)
    parser.add_argument("--n_embd", type=int, default=128, help="a multiple of 64")
    parser.add_argument("--steps", type=int, default=16, help="of 8,192 tokens")
    parser.add_argument("--link_gbytes", type=float, default=50, help="GB/s each way of a GPU; 50: 400 Gbit/s")
    parser.add_argument("--peak_tflops", type=float, default=989, help="of a GPU in bf16 (default: H100)")
    parser.add_argument("--mfu", type=float, default=0.4, help="the share of it that is reached")
    parser.add_argument("--batch_tokens", type=int, default=524_288, help="of all ranks together")
    options = parser.parse_args()
    use_threads(options.threads)
    if options.peer:
        report(measure(options))
        return
    if not options.paper:
        print(f"{options.n_layer} layers, {options.n_embd} wide, 8,192 tokens a step; {options.rounds} rounds")
        print(f"{machine('accelerate')}, {os.cpu_count()} cores")
        print_table(take_turns(list(RANKS), options.rounds), {"tokens/s": ",.0f"})
    print_paper(options)


if __name__ == "__main__":
    main()
