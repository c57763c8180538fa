"""From a plain PyTorch loop to llmkit's training step, one optimisation at a time, on this machine.

    python benchmarks/ladder.py                       # 4 layers, 256 wide: some minutes on 2 cores
    python benchmarks/ladder.py --preset 124M         # GPT-2 124M, for a GPU
    python benchmarks/ladder.py --output ladder.png   # the picture, and its place

    float32          transformers' GPT2LMHeadModel, eager attention, its loss from whole logits, AdamW as it comes
    TF32             matrix products of float32 numbers in TensorFloat-32
    bf16             autocast to bfloat16
    SDPA             attention by scaled_dot_product_attention
    compile          torch.compile
    padded           the vocabulary rounded up to a multiple of 128
    fused AdamW      the optimizer in one kernel
    chunked loss     llmkit's GPT2LMHeadModel: loss and its gradient from hidden states, a chunk of rows at a time

Each rung keeps what is below it. All train the same random tokens with dropout 0. A rung is a process of its own, so
its peak memory is its own too; the first steps, which compile and warm up, are not counted. `ms a step` is the median
over the steps with the fastest and the slowest beside it. Memory holds weights, gradients, optimizer state,
activations and logits: on a GPU the peak of what was allocated, on a CPU the growth of the process at its peak from
before the model was made, which includes what torch.compile leaves behind in it.
"""

import argparse
import contextlib
import dataclasses
import shutil
import statistics
import sysconfig
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
import torch
import torch.nn.functional as F
import transformers
from matplotlib.figure import Figure

import llmkit
from llmkit.machine import bf16_is_fast
from llmkit.model.loss import VOCAB_MULTIPLE
from measuring import add_options, forget_peak, machine, peak_resident, report, synchronize, take_turns, use_threads

WARMUP_STEPS = 2
# The first is of a size that a laptop takes seconds for.
PRESETS = {
    "laptop": {"n_layer": 4, "n_embd": 256, "n_head": 4, "block_size": 256, "batch_size": 8},
    "124M": {"n_layer": 12, "n_embd": 768, "n_head": 12, "block_size": 1024, "batch_size": 8},
}
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclasses.dataclass(frozen=True)
class Rung:
    """What is switched on at a rung."""

    tf32: bool = False
    bf16: bool = False
    attention: str = "eager"
    compile: bool = False
    padded: bool = False
    fused: bool = False
    llmkit: bool = False


# What each rung above the first switches on.
CHANGES = {
    "TF32": {"tf32": True},
    "bf16": {"bf16": True},
    "SDPA": {"attention": "sdpa"},
    "compile": {"compile": True},
    "padded": {"padded": True},
    "fused AdamW": {"fused": True},
    "chunked loss": {"llmkit": True},
}


def rungs(without: Sequence[str] = ()) -> dict[str, Rung]:
    """From the lowest to the highest, those that this machine has and nobody wants left out."""
    below = Rung()
    found = {"float32": below}
    for name, change in CHANGES.items():
        if name in without or lacks(name):
            continue
        found[name] = dataclasses.replace(below, **change)
        if name != "bf16" or bf16_is_fast(DEVICE.type):
            below = found[name]
    return found


def lacks(name: str) -> str | None:
    """Why a rung cannot be measured here, if so."""
    if name == "TF32" and not transformers.utils.is_torch_tf32_available():
        return "needs an NVIDIA GPU of 2020 (Ampere) or later"
    if name == "compile":
        if not any(map(shutil.which, ("c++", "g++", "clang++"))):
            return "needs a C++ compiler"
        if not Path(sysconfig.get_path("include"), "Python.h").exists():
            return "needs Python's headers (python3-dev)"
    return None


def measure(rung: Rung, options: argparse.Namespace) -> dict:
    """Seconds of each counted step, and bytes at the peak."""
    before = psutil.Process().memory_info().rss
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high" if rung.tf32 else "highest")
    model = make_model(rung, options).to(DEVICE).train()
    # None: as it comes, which is a loop over the parameters on a CPU and over groups of them on a GPU.
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.1, fused=rung.fused or None)
    run = torch.compile(model) if rung.compile else model
    autocast = torch.autocast(DEVICE.type, torch.bfloat16) if rung.bf16 else contextlib.nullcontext()
    seconds = []
    for step in range(WARMUP_STEPS + options.steps):
        if step == WARMUP_STEPS:
            forget_peak()
        ids = torch.randint(options.vocab_size, (options.batch_size, options.block_size + 1)).to(DEVICE)
        synchronize()
        start = time.perf_counter()
        with autocast:
            loss = loss_of(run, rung, ids)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        synchronize()
        seconds.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() if DEVICE.type == "cuda" else peak_resident() - before
    return {"seconds": seconds[WARMUP_STEPS:], "memory": peak}


def make_model(rung: Rung, options: argparse.Namespace) -> transformers.PreTrainedModel:
    package = llmkit if rung.llmkit else transformers
    vocab_size = options.vocab_size
    if rung.padded and not rung.llmkit:  # llmkit's pads its matrix products itself
        vocab_size = -(-vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
    config = package.GPT2Config(
        vocab_size=vocab_size,
        n_positions=options.block_size,
        n_layer=options.n_layer,
        n_embd=options.n_embd,
        n_head=options.n_head,
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
        **dict.fromkeys(("bos_token_id", "eos_token_id"), 0),
        attn_implementation=rung.attention,
        use_cache=False,
    )
    return package.GPT2LMHeadModel(config)


def loss_of(model: torch.nn.Module, rung: Rung, ids: torch.Tensor) -> torch.Tensor:
    """The mean cross-entropy of tokens (B, T + 1), each predicted from those before it."""
    inputs, targets = ids[:, :-1], ids[:, 1:]
    if rung.llmkit:
        return model(input_ids=inputs, shift_labels=targets).loss
    logits = model(input_ids=inputs).logits  # (B, T, V)
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, rounds=1)
    parser.add_argument("--preset", choices=PRESETS, default="laptop", help="sizes (default: laptop)")
    for name in PRESETS["laptop"]:
        parser.add_argument(f"--{name}", type=int, help="instead of the preset's")
    parser.add_argument("--vocab_size", type=int, default=50257, help="(default: 50257)")
    parser.add_argument("--steps", type=int, default=6, help=f"counted, after {WARMUP_STEPS} others (default: 6)")
    parser.add_argument(
        "--without", nargs="+", choices=CHANGES, default=[], help="rungs to leave out, such as compile, which is slow"
    )
    parser.add_argument("--output", default="ladder.png", help="the picture (default: ladder.png)")
    options = parser.parse_args()
    for name, value in PRESETS[options.preset].items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    return options


@dataclasses.dataclass(frozen=True)
class Row:
    """What a rung came to: median, fastest and slowest step in ms, tokens a second, peak in MB, gains, a remark."""

    name: str
    median: float
    fastest: float
    slowest: float
    speed: float
    memory: float
    over_before: float
    over_first: float
    remark: str


def summarize(results: dict[str, list[dict]], tokens: int) -> list[Row]:
    """A row for each rung that was measured, from the lowest to the highest; `tokens` of a step."""
    rows: list[Row] = []
    for name, rounds in results.items():
        times = [1000 * seconds for measured in rounds for seconds in measured["seconds"]]
        median = statistics.median(times)
        memory = statistics.median(measured["memory"] for measured in rounds) / 1e6
        slow = name == "bf16" and not bf16_is_fast(DEVICE.type)
        rows.append(
            Row(
                name=name,
                median=median,
                fastest=min(times),
                slowest=max(times),
                speed=1000 * tokens / median,
                memory=memory,
                over_before=rows[-1].median / median if rows else 1.0,
                over_first=rows[0].median / median if rows else 1.0,
                remark="this machine has no bf16 in hardware: off again above" if slow else "",
            )
        )
    return rows


def table(rows: list[Row]) -> str:
    lines = [
        f"{'':>12} {'ms a step':>10} {'min..max':>17} {'tokens/s':>9} {'memory':>10} {'x before':>9} {'x first':>8}"
    ]
    measured = {row.name: row for row in rows}
    for name in ("float32", *CHANGES):
        if name not in measured:
            lines.append(f"{name:>12} skipped: {lacks(name) or 'left out'}")
            continue
        row = measured[name]
        lines.append(
            f"{name:>12} {row.median:>10,.1f} {f'{row.fastest:,.1f}..{row.slowest:,.1f}':>17} {row.speed:>9,.0f} "
            f"{row.memory:>7,.0f} MB {row.over_before:>9.2f} {row.over_first:>8.2f}  {row.remark}".rstrip()
        )
    return "\n".join(lines)


def draw(rows: list[Row], title: str, path: str) -> None:
    """Speed and memory of each rung, side by side, the lowest rung at the bottom."""
    figure = Figure(figsize=(9, 0.45 * len(rows) + 1.4), layout="constrained")
    speeds, memories = figure.subplots(ncols=2, sharey=True)
    names = [row.name for row in rows]
    bars = speeds.barh(names, [row.speed for row in rows], color="C0")
    speeds.bar_label(bars, [f"{row.speed:,.0f}  ({row.over_first:.2f}x)" for row in rows], padding=3)
    speeds.set(xlabel="tokens per second", xlim=(0, 1.35 * max(row.speed for row in rows)))
    bars = memories.barh(names, [row.memory for row in rows], color="C1")
    memories.bar_label(bars, [f"{row.memory:,.0f}" for row in rows], padding=3)
    memories.set(xlabel="peak memory, MB", xlim=(0, 1.2 * max(row.memory for row in rows)))
    figure.suptitle(title, fontsize="medium")
    figure.savefig(path, dpi=150)


def main() -> None:
    options = parse()
    use_threads(options.threads)
    if options.peer:
        report(measure(rungs(options.without)[options.peer], options))
        return
    print(
        f"{options.n_layer} layers, {options.n_embd} wide, {options.batch_size} x {options.block_size} tokens, "
        f"vocabulary {options.vocab_size:,}; {options.rounds} x {options.steps} steps a rung\n{machine()}",
        flush=True,
    )
    results = take_turns(list(rungs(options.without)), options.rounds)
    tokens = options.batch_size * options.block_size
    rows = summarize(results, tokens)
    print(table(rows), flush=True)
    draw(rows, f"GPT-2, {options.n_layer} layers, {options.n_embd} wide: {machine()}", options.output)
    print(f"saved {options.output}")


if __name__ == "__main__":
    main()
