"""How far a training step of llmkit's GPT-2 is from the time that its matrix products alone take on this machine.

    python benchmarks/limit.py                                          # 6 layers, 384 wide, 12 x 256 tokens
    python benchmarks/limit.py --preset 124M --batch_size 1 --steps 5
    python benchmarks/limit.py --bf16

A PretrainTrainer takes real steps. In one of them each matrix product, forward and backward, is noted: its operation,
and the sizes, strides and type of its operands. Afterwards each of these products is timed alone in the same process,
on operands of the same layout. Their sum is the first row, and the last column is relative to it. The other steps run
under PyTorch's profiler, whose operations are added up by part:

    products        the matrix products within the step: linear layers and head, not those of attention
    attention       scaled_dot_product_attention with its own products
    loss            what the loss does beside its products: softmax, its gradient, copies
    optimizer       clipping and AdamW
    element-wise    LayerNorm, GELU, residual sums, embeddings, conversions to bfloat16
    Python          the rest of forward and backward, in which no operation runs
    Trainer         the rest of the step: batches, callbacks, schedule, log
"""

import argparse
import statistics
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._python_dispatch import TorchDispatchMode  # private: the documented way to see every operation
from transformers import TrainerCallback

from loops import WARMUP_STEPS, add_shape_options, describe, make_llmkit_trainer, parse_shape
from measuring import add_options, machine, print_parts, report, take_turns

PRODUCTS = ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::baddbmm")
LOSS = "_LinearCrossEntropy"  # the autograd.Function of llmkit.model.loss; its backward pass has a longer name
ALONE, STEP = "products, alone", "step"
SECONDS = 0.3  # that each product is timed for, at least

Layout = tuple[tuple[int, ...], tuple[int, ...], torch.dtype]
Product = tuple[Callable, tuple[Layout, ...], tuple[tuple[str, Layout], ...]]  # with the operands that have a name


class Products(TorchDispatchMode):
    """Counts the matrix products that run while it is on, by operation and the layouts of their operands."""

    def __init__(self):
        super().__init__()
        self.counted: Counter[Product] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if f"aten::{func.overloadpacket.__name__}" in PRODUCTS:
            named = tuple((name, _layout(value)) for name, value in (kwargs or {}).items() if torch.is_tensor(value))
            self.counted[func, tuple(_layout(value) for value in args if torch.is_tensor(value)), named] += 1
        return func(*args, **(kwargs or {}))


def _layout(tensor: torch.Tensor) -> Layout:
    return tuple(tensor.shape), tensor.stride(), tensor.dtype


def seconds_alone(products: Counter[Product]) -> float:
    """The time of all products, each timed by itself: the median of its repetitions, as often as it was counted."""
    return sum(count * _seconds_of(*product) for product, count in products.items())


@torch.no_grad()
def _seconds_of(func: Callable, layouts: tuple[Layout, ...], named: tuple[tuple[str, Layout], ...]) -> float:
    operands, others = [_tensor(*layout) for layout in layouts], {name: _tensor(*layout) for name, layout in named}
    func(*operands, **others)
    seconds: list[float] = []
    while sum(seconds) < SECONDS:
        start = time.perf_counter()
        func(*operands, **others)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def _tensor(shape: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Random numbers; also of a layout that repeats elements, as of a bias that stands for every row."""
    length = 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
    return torch.randn(length).to(dtype).as_strided(shape, stride)


class Watch(TrainerCallback):
    """Notes the products of the last step of the warm-up, and profiles and times the steps after it."""

    def __init__(self, trainer):
        self.products = Products()
        self.profile = profile(activities=[ProfilerActivity.CPU])
        self.started, self.seconds = 0.0, []
        _name(trainer, "compute_loss", "forward")
        _name(trainer.accelerator, "backward", "backward")
        _name(trainer.accelerator, "clip_grad_norm_", "optimizer")

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == WARMUP_STEPS - 1:
            self.products.__enter__()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == WARMUP_STEPS:
            self.products.__exit__(None, None, None)
            self.profile.start()
        elif state.global_step > WARMUP_STEPS:
            self.seconds.append(time.perf_counter() - self.started)
        self.started = time.perf_counter()

    def on_train_end(self, args, state, control, **kwargs):
        self.profile.stop()


def _name(owner: object, name: str, part: str) -> None:
    """Let the profiler know a method by the name of the part that it is."""
    function = getattr(owner, name)

    def named(*args, **kwargs):
        with record_function(part):
            return function(*args, **kwargs)

    setattr(owner, name, named)


def by_part(events) -> dict[str, float]:
    """Seconds of the profiled operations by part, each without those that it calls."""
    seconds: dict[str, float] = defaultdict(float)
    for event in events:
        names = [event.name]
        parent = event
        while (parent := parent.cpu_parent) is not None:
            names.append(parent.name)
        if part := _part(names):
            seconds[part] += event.self_cpu_time_total / 1e6
    return seconds


def _part(names: list[str]) -> str | None:
    """The part of an operation, by its name and those of what it was called by, from the inside to the outside."""
    if any(name == "optimizer" or name.startswith("Optimizer.") for name in names):
        return "optimizer"
    if not {"forward", "backward"} & set(names):
        return None
    if names[0] in PRODUCTS:
        return "products"
    if any("scaled_dot_product" in name for name in names):
        return "attention"
    if any(LOSS in name for name in names):
        return "loss"
    return "element-wise" if any(name.startswith("aten::") for name in names) else "Python"


def measure(options: argparse.Namespace) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_llmkit_trainer(options, folder)
        watch = Watch(trainer)
        trainer.add_callback(watch)
        trainer.train()
    step = statistics.mean(watch.seconds)
    parts = {part: seconds / len(watch.seconds) for part, seconds in by_part(watch.profile.events()).items()}
    parts["Trainer"] = step - sum(parts.values())
    rows = {ALONE: seconds_alone(watch.products.counted), **dict(sorted(parts.items(), key=lambda item: -item[1]))}
    return {name: 1e3 * seconds for name, seconds in [*rows.items(), (STEP, step)]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, rounds=3)
    add_shape_options(parser, preset="small", steps=6)
    options = parse_shape(parser)
    if options.peer:
        report(measure(options))
        return
    print(f"{describe(options)}; {options.rounds} rounds of {options.steps} steps\n{machine()}", flush=True)
    rounds = take_turns(["llmkit"], options.rounds)["llmkit"]
    print_parts(rounds, whole=ALONE, share="x products", form=".2f")


if __name__ == "__main__":
    main()
