"""A training step of llmkit's GPT-2 beside other ways to take it, on this machine: speed and memory.

    python benchmarks/training_step.py                       # 6 layers, 384 wide, context 256, vocabulary 50,257
    python benchmarks/training_step.py --bf16 --rounds 5
    python benchmarks/training_step.py --preset 124M --steps 4 --bf16
    python benchmarks/training_step.py --nanogpt ~/nanoGPT --build-nanogpt ~/build-nanogpt

    llmkit               the model in PretrainTrainer, batches from shards
    recompute never      the same, but no MLP computes its activation function again in the backward pass
    recompute always     the same, but every MLP does; llmkit's do at a width of 256 and more
    adamw_bnb_8bit       llmkit with this `optim`, which is bitsandbytes' AdamW with moments of 8 bits
    adamw_torch_8bit     likewise torchao's
    stock                transformers' GPT2LMHeadModel in Trainer, dropout 0
    stock, dropout 0.1   the same with its default dropout, as one who does not ask gets it
    bare loop            llmkit's model without a Trainer
    nanoGPT              karpathy/nanoGPT's model, optimizer and loop, from the checkout given
    build-nanogpt        karpathy/build-nanogpt's, likewise

The rows with another setting of llmkit are measured where `--peers` names them.

All train random tokens at the same sizes with AdamW and clipping. Of the last two only the steps run here, without
checkpoints, log or scheduler, on batches that are in memory; they pad the vocabulary, as their own scripts do.

Each measurement is a process of its own, and they take turns. tokens/s and memory are those of the steps after
the first two. Memory is by how much the process (on a GPU: what is allocated) was larger at its peak than before the
first step: activations, logits, gradients and optimizer state, not the weights. A ratio is the median of the rounds'
ratios. With --compile, `before s` is the time that the first two steps and all around the steps took; most of it is
the compiling, unless it is found in torch's cache of earlier runs.
"""

import argparse
import importlib.util
import time

from loops import LOOPS, WARMUP_STEPS, add_shape_options, describe, parse_shape
from measuring import PeakMemory, add_options, machine, print_table, report, take_turns

EIGHT_BIT = {"adamw_bnb_8bit": "bitsandbytes", "adamw_torch_8bit": "torchao"}
ON_REQUEST = {"recompute never", "recompute always", *EIGHT_BIT}


def measure(options: argparse.Namespace) -> dict[str, float]:
    train = LOOPS[options.peer](options)
    memory = PeakMemory()
    start = time.perf_counter()
    seconds = train()
    before = time.perf_counter() - start - seconds
    tokens = (options.steps - WARMUP_STEPS) * options.batch_size * options.block_size
    return {"tokens/s": tokens / seconds, "memory MB": memory.growth() / 1e6, "before s": before}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, rounds=3)
    add_shape_options(parser, preset="small", steps=8)
    parser.add_argument("--peers", nargs="+", choices=LOOPS, help="which of them (default: all that are there)")
    parser.add_argument("--nanogpt", metavar="DIR", help="a checkout of karpathy/nanoGPT")
    parser.add_argument("--build-nanogpt", metavar="DIR", help="a checkout of karpathy/build-nanogpt")
    options = parse_shape(parser)
    if options.peer:
        report(measure(options))
        return
    missing = {"nanoGPT": not options.nanogpt, "build-nanogpt": not options.build_nanogpt}
    missing |= {peer: importlib.util.find_spec(package) is None for peer, package in EIGHT_BIT.items()}
    if options.peers and (without := [peer for peer in options.peers if missing.get(peer)]):
        parser.error(
            f"{without[0]} needs what is not here: --nanogpt DIR, --build-nanogpt DIR, bitsandbytes or torchao"
        )
    peers = options.peers or [peer for peer in LOOPS if not missing.get(peer) and peer not in ON_REQUEST]
    print(f"{describe(options)}; {options.rounds} rounds of {options.steps} steps\n{machine()}")
    figures = {"tokens/s": ",.0f", "memory MB": ",.0f"} | ({"before s": ",.1f"} if options.compile else {})
    print_table(take_turns(peers, options.rounds), figures)


if __name__ == "__main__":
    main()
