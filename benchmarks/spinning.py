"""How long threads of a CPU wait for each other without sleeping (GOMP_SPINCOUNT), and what that does to the speed.

    python benchmarks/spinning.py              # on a quiet machine
    python benchmarks/spinning.py --busy 1     # beside a process that keeps a core busy

torch's builds for Linux bring GNU's libgomp. Each measurement is a process of its own: training steps of the
quickstart's model, then 64 tokens from a model of 6 layers, 384 wide, which is large enough for all threads.
"""

import argparse
import os
import subprocess
import sys
import time

import torch

from llmkit import GPT2Config, GPT2LMHeadModel
from loops import LOOPS, WARMUP_STEPS
from measuring import add_options, machine, print_table, report, run_peer, use_threads

QUICKSTART = {"n_layer": 3, "n_head": 2, "n_embd": 128, "block_size": 256, "batch_size": 16, "vocab_size": 4096}
LARGER = {"n_layer": 6, "n_head": 6, "n_embd": 384, "vocab_size": 4096, "bos_token_id": 0, "eos_token_id": 0}
NEW_TOKENS = 64


def measure(steps: int) -> dict[str, float]:
    shape = argparse.Namespace(**QUICKSTART, steps=steps, bf16=False, compile=False)
    seconds = LOOPS["llmkit"](shape)()
    trained = (steps - WARMUP_STEPS) * shape.batch_size * shape.block_size
    model = GPT2LMHeadModel(GPT2Config(**LARGER)).eval()
    model.generation_config.eos_token_id = None  # nothing ends early
    prompt = torch.zeros(1, 16, dtype=torch.long)
    how = {"attention_mask": torch.ones_like(prompt), "pad_token_id": 0, "do_sample": False}
    model.generate(prompt, max_new_tokens=4, **how)
    start = time.perf_counter()
    model.generate(prompt, max_new_tokens=NEW_TOKENS, **how)
    return {"trained/s": trained / seconds, "generated/s": NEW_TOKENS / (time.perf_counter() - start)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, rounds=5)
    parser.add_argument("--counts", nargs="+", default=["default", "1000", "10000"], help="values of GOMP_SPINCOUNT")
    parser.add_argument("--steps", type=int, default=12, help="training steps of a measurement (default 12)")
    parser.add_argument("--busy", type=int, default=0, help="processes beside it that compute (default 0)")
    options = parser.parse_args()
    use_threads(options.threads)
    if options.peer:
        report(measure(options.steps))
        return
    print(f"{options.busy} busy processes beside it; {options.rounds} rounds of {options.steps} steps\n{machine()}")
    neighbours = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(options.busy)]
    results: dict[str, list[dict[str, float]]] = {count: [] for count in options.counts}
    try:
        for turn in range(options.rounds):
            for count in options.counts[:: -1 if turn % 2 else 1]:
                os.environ.pop("GOMP_SPINCOUNT", None)
                if count != "default":
                    os.environ["GOMP_SPINCOUNT"] = count
                results[count].append(run_peer(count, turn))
    finally:
        for neighbour in neighbours:
            neighbour.kill()
    print_table(results, {"trained/s": ",.0f", "generated/s": ",.1f"})


if __name__ == "__main__":
    main()
