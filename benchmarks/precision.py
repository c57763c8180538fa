"""bfloat16 beside float32 on this machine: training steps of two sizes, and Muon's.

    python benchmarks/precision.py

llmkit trains in bfloat16, and Muon iterates in it, where the processor multiplies it in hardware
(`llmkit.machine.bf16_is_fast`, which the second line of the table's head tells). Each measurement is a process of its
own. `3 x 128` are tokens/s of the quickstart's model, `6 x 384` of a larger one, both with AdamW. `Muon 128` and
`Muon 384` are the milliseconds that Muon's step takes for the matrices of a layer of that width, of three layers.
"""

import argparse
import time

import torch

from llmkit.machine import bf16_is_fast
from llmkit.training.optimizers import MatrixMuon
from loops import LOOPS, WARMUP_STEPS
from measuring import add_options, machine, print_table, report, synchronize, take_turns, use_threads
from spinning import QUICKSTART

SHAPES = {
    "3 x 128": QUICKSTART,
    "6 x 384": {"n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256, "batch_size": 12, "vocab_size": 4096},
}
LAYERS = 3
DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def training(shape: dict[str, int], steps: int, bf16: bool) -> float:
    """Tokens per second."""
    seconds = LOOPS["llmkit"](argparse.Namespace(**shape, steps=steps, bf16=bf16, compile=False))()
    return (steps - WARMUP_STEPS) * shape["batch_size"] * shape["block_size"] / seconds


def muon_step(width: int, dtype: torch.dtype) -> float:
    """Milliseconds a layer: the best of three."""
    shapes = [(width, 3 * width), (width, width), (width, 4 * width), (4 * width, width)] * LAYERS
    parameters = [torch.nn.Parameter(torch.randn(shape, device=DEVICE)) for shape in shapes]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    optimizer = MatrixMuon(parameters, [3, 1, 1, 1] * LAYERS, dtype)
    best = float("inf")
    for _ in range(4):  # the first one finds its kernels
        start = time.perf_counter()
        optimizer.step()
        synchronize()
        best = min(best, time.perf_counter() - start)
    return 1e3 * best / LAYERS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, rounds=3)
    parser.add_argument("--steps", type=int, default=12, help="of a measurement (default 12)")
    options = parser.parse_args()
    use_threads(options.threads)
    if options.peer:
        dtype = DTYPES[options.peer]
        figures = {name: training(shape, options.steps, dtype is torch.bfloat16) for name, shape in SHAPES.items()}
        report(figures | {f"Muon {width}": muon_step(width, dtype) for width in (128, 384)})
        return
    print(machine())
    print(f"bf16_is_fast: {bf16_is_fast(DEVICE.type)}; {options.rounds} rounds of {options.steps} steps")
    figures = dict.fromkeys(SHAPES, ",.0f") | {"Muon 128": ".1f", "Muon 384": ".1f"}
    print_table(take_turns(list(DTYPES), options.rounds), figures)


if __name__ == "__main__":
    main()
