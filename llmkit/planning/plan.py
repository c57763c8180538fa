"""What a run will take: the figures, as a table for people and as JSON for scripts."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass

import torch

from llmkit.machine import set_up_cpu
from llmkit.planning.hardware import Hardware
from llmkit.planning.memory import Step, StepMemory, largest_micro_batch, measured_pace, step_memory
from llmkit.training.budget import evaluations, saves
from llmkit.training.run_arguments import RunArguments

CHINCHILLA = 20  # tokens a parameter with the lowest loss for a given compute (Hoffmann et al. 2022)
USABLE = 0.92  # of a device's memory: the CUDA context, fragmentation and NCCL take some


@dataclass(frozen=True)
class Assumptions:
    """What is assumed of a run beside its recipe.

    Attributes:
        mfu: the share of the devices' peak that the run reaches.
        dollars_per_hour: the price of one device.
        measure: take some real steps on this machine and use their pace.
    """

    mfu: float = 0.4
    dollars_per_hour: float | None = None
    measure: bool = False


@dataclass(frozen=True)
class Sizes:
    """The sizes of a run on one device.

    Attributes:
        parameters: of the model, a tied embedding counted once.
        trained: those that are trained.
        row: tokens of a window or of a packed row.
        step_tokens: of an optimizer step over all ranks.
        micro_batch, accumulation: rows that a rank computes at a time, and how many times for a step.
        flops_per_token: forward and backward.
    """

    parameters: int
    trained: int
    row: int
    step_tokens: int
    micro_batch: int
    accumulation: int
    flops_per_token: float


@dataclass(frozen=True)
class Plan:
    """What a run will take. Bytes are of one rank; None where something is not known before the run.

    Attributes:
        steps, tokens, flops: of the whole run, forward and backward.
        train_tokens: in one pass over the data.
        memory: of a step at `sizes.micro_batch`.
        communication: bytes of DDP's buckets, a copy of the gradients.
        largest_micro_batch: that fits into the device's memory.
        fits: what it takes to fit: "as it is", "with activation_checkpointing", "with FSDP2", "with both", or None.
        hours, dollars: at `mfu` of the peak, at the measured pace, or as the recipe says.
        checkpoint, checkpoints: bytes of one, and the number that is kept.
        shards: bytes of the token shards.
        evaluations, samples, saves: that the run will make, the last evaluation and the saved model included.
    """

    hardware: Hardware
    sizes: Sizes
    model: str
    length: str
    steps: int | None
    tokens: int | None
    flops: float | None
    train_tokens: int | None
    memory: StepMemory
    communication: int
    largest_micro_batch: int
    fits: str | None
    tokens_per_second: float | None
    pace: str
    hours: float | None
    dollars: float | None
    checkpoint: int
    checkpoints: int | None
    shards: int | None
    evaluations: int | None
    samples: int | None
    saves: int | None

    @property
    def peak(self) -> int:
        """Bytes of one rank."""
        return self.memory.peak + self.communication

    @property
    def duration(self) -> str:
        """The hours for people."""
        if self.hours is None:
            return "not known"
        return f"{self.hours:,.1f} hours" if self.hours >= 1 else f"{self.hours * 60:.1f} minutes"

    def as_dict(self) -> dict:
        """For `--json`: the sizes of a step beside the figures of the run."""
        figures = asdict(self)
        return figures.pop("sizes") | figures | {"peak": self.peak}

    def table(self) -> str:
        """For people."""
        rows = [("model", self.model), *self._length(), *self._memory(), *self._time()]
        disk = f"checkpoints of {amount(self.checkpoint)}"
        disk = f"{self.checkpoints} {disk}" if self.checkpoints is not None else disk
        disk += f", shards of {amount(self.shards)}" if self.shards is not None else ""
        rows.append(("disk", disk))
        if self.steps is not None:
            counts = f"{self.evaluations} evaluations, {self.samples} samples, {self.saves} saves"
            rows.append(("on the way", counts))
        return "\n".join(f"{name:>10}  {text}" for name, text in rows)

    def _length(self) -> list[tuple[str, str]]:
        if self.steps is None or self.tokens is None:
            return [("run", self.length)]
        passes = f", {self.tokens / self.train_tokens:.2f} passes over the data" if self.train_tokens else ""
        rows = [("run", f"{self.steps:,} steps, {self.tokens:,} tokens{passes}")]
        if self.sizes.trained == self.sizes.parameters:
            ratio = self.tokens / self.sizes.parameters
            rows.append(("", f"{ratio:.1f} tokens a parameter (Chinchilla: {CHINCHILLA})"))
        return [*rows, ("compute", f"{self.flops:.2e} FLOPs")]

    def _memory(self) -> list[tuple[str, str]]:
        of, sizes = self.hardware, self.sizes
        named = asdict(self.memory) | {"DDP buckets": self.communication}
        named["the loss's chunk"] = named.pop("loss_chunk")
        fits = f"it fits {self.fits}" if self.fits else "it does not fit: take a smaller model or more memory"
        return [
            ("hardware", f"{of.count} x {of.name}, {amount(of.memory)} each"),
            ("step", f"{sizes.micro_batch} x {sizes.row} tokens on each device at a time, {sizes.accumulation} times"),
            ("memory", amounts(named)),
            ("", f"= {amount(self.peak)} on each device, {self.peak / of.memory:.0%} of its memory"),
            ("", f"{fits}; the largest micro-batch that fits is {self.largest_micro_batch}"),
        ]

    def _time(self) -> list[tuple[str, str]]:
        if self.hours is None and self.tokens_per_second:
            return [("time", f"{self.tokens_per_second:,.0f} tokens/s, {self.pace}; hours follow from the steps")]
        if self.hours is None:
            return [("time", "not known: --measure takes some steps here, or name a --gpu")]
        cost = f", {self.dollars:,.0f} dollars" if self.dollars is not None else ""
        at = f", at {self.tokens_per_second:,.0f} tokens/s, {self.pace}" if self.tokens_per_second else ""
        return [("time", f"{self.duration}{cost}{at}")]


def amount(size: float) -> str:
    """Bytes for people."""
    if size < 1e8:
        return f"{size / 1e6:.1f} MB"
    return f"{size / 1e9:.2f} GB" if size < 2e10 else f"{size / 1e9:,.0f} GB"


def amounts(parts: Mapping[str, int]) -> str:
    """Named bytes as a sum for people, without those that are too few for `amount`, which would say 0.0 MB."""
    return " + ".join(f"{name} {amount(size)}" for name, size in parts.items() if size >= 5e4)


def make_plan(
    model: str,
    sizes: Sizes,
    step: Callable[[int, bool], Step],
    args: RunArguments,
    hardware: Hardware,
    assumptions: Assumptions,
    *,
    steps_of_epochs: int | None,
    train_tokens: int | None,
    shards: int | None,
    prompts: int,
    can_shard: bool,
) -> Plan:
    """The plan of a run whose step is known.

    Args:
        model: what it is, in words.
        step: makes the step of a micro-batch, with or without activation checkpointing.
        steps_of_epochs: that `num_train_epochs` comes to, None where the data are not known.
        train_tokens: in one pass over the data.
        shards: bytes of the token shards.
        prompts: that are continued at each evaluation.
        can_shard: whether FSDP2 is supported for it.
    """
    found, buckets, most, fits = _fit(sizes, step, args, hardware, can_shard)
    rate, pace = _rate(sizes, step, args, hardware, assumptions)
    steps, length = _steps(args, sizes, rate, steps_of_epochs)
    tokens = steps * sizes.step_tokens if steps is not None else None
    hours = tokens / rate / 3600 if tokens is not None and rate else None
    if args.train_minutes is not None:
        hours = args.train_minutes / 60
    price = assumptions.dollars_per_hour
    looks = evaluations(args, steps) if steps is not None else None
    kept = saves(args, steps) if steps is not None else None
    return Plan(
        hardware=hardware,
        sizes=sizes,
        model=model,
        length=length,
        steps=steps,
        tokens=tokens,
        flops=float(tokens * sizes.flops_per_token) if tokens is not None else None,
        train_tokens=train_tokens,
        memory=found,
        communication=buckets,
        largest_micro_batch=most,
        fits=fits,
        tokens_per_second=rate,
        pace=pace,
        hours=hours,
        dollars=hours * price * hardware.count if hours is not None and price is not None else None,
        checkpoint=found.gradients + found.optimizer,  # the trained weights are as large as their gradients
        checkpoints=min(kept, args.save_total_limit or kept) if kept is not None else None,
        shards=shards,
        evaluations=looks,
        samples=looks * prompts if looks is not None else None,
        saves=kept + 1 if kept is not None else None,
    )


def _fit(
    sizes: Sizes, step: Callable[[int, bool], Step], args: RunArguments, hardware: Hardware, can_shard: bool
) -> tuple[StepMemory, int, int, str | None]:
    """The memory of a step, bytes of DDP's buckets, the largest micro-batch that fits, and what the recipe's takes."""
    # The arguments were resolved for this machine; what is planned for another one is what that one would choose.
    here = torch.bfloat16 if args.bf16 else None
    autocast = here if hardware.device_type == "cpu" else hardware.autocast
    compiled = hardware.device_type == "cuda" if args.compiles_by_default else bool(args.torch_compile)

    def memory(micro_batch: int, checkpointing: bool = bool(args.activation_checkpointing)) -> StepMemory:
        planned = step(micro_batch, checkpointing)
        return step_memory(planned, device_type=hardware.device_type, autocast=autocast, compiled=compiled)

    size = sizes.micro_batch
    # A CPU's loss goes in so small chunks that one of more rows would take long to run.
    other = 2 * size if hardware.device_type == "cuda" else size // 2 or 2
    found = memory(size)
    buckets = found.gradients if hardware.count > 1 else 0
    limit = hardware.memory * USABLE
    small, large = sorted([(size, found.peak + buckets), (other, memory(other).peak + buckets)])
    most = largest_micro_batch(small, large, limit)
    most = min(most, sizes.step_tokens // (sizes.row * hardware.count))  # a whole step
    # Far from the two sizes the peak may be in another part of the step, where memory grows faster. On a CPU the loss
    # takes too little for that.
    if most > large[0] and hardware.device_type == "cuda":
        reached = memory(most).peak + buckets
        if reached > limit:
            most = largest_micro_batch(large, (most, reached), limit)
    ranks = hardware.count if can_shard else 1
    return found, buckets, most, _what_fits(found, lambda: memory(size, True), buckets, limit, ranks)


def _rate(
    sizes: Sizes, step: Callable[[int, bool], Step], args: RunArguments, hardware: Hardware, assumptions: Assumptions
) -> tuple[float | None, str]:
    """Tokens per second of the whole run, None where nothing tells, and where they are from."""
    if assumptions.measure:
        if hardware.device_type == "cpu":
            set_up_cpu()
        autocast = torch.bfloat16 if args.bf16 else None
        checkpointing = bool(args.activation_checkpointing)
        pace = measured_pace(step(sizes.micro_batch, checkpointing), autocast, bool(args.torch_compile))
        return sizes.step_tokens / (sizes.accumulation * pace.micro_batch + pace.update), "measured here"
    if hardware.peak:
        rate = hardware.count * hardware.peak * assumptions.mfu / sizes.flops_per_token
        return rate, f"{assumptions.mfu:.0%} of the peak, assumed"
    return None, ""


def _steps(
    args: RunArguments, sizes: Sizes, rate: float | None, steps_of_epochs: int | None
) -> tuple[int | None, str]:
    """The number of steps, None where it is not known yet, and the run's length in words."""
    if args.max_steps > 0:
        return args.max_steps, f"{args.max_steps:,} steps"
    if args.train_minutes is not None:
        length = f"{args.train_minutes:g} minutes, in as many steps as fit (--measure takes some here)"
        return (max(1, int(60 * args.train_minutes * rate / sizes.step_tokens)) if rate else None), length
    return steps_of_epochs, f"{args.num_train_epochs:g} passes over data that were not read (--max_steps states steps)"


def _what_fits(
    found: StepMemory, checkpointed: Callable[[], StepMemory], buckets: int, limit: float, ranks: int
) -> str | None:
    """The least that has to be done for a step to fit: nothing, activation checkpointing, FSDP2, or both."""
    if found.peak + buckets <= limit:
        return "as it is"
    small = checkpointed()
    if small.peak + buckets <= limit:
        return "with activation_checkpointing: true"

    def sharded(memory: StepMemory) -> float:
        state = memory.weights + memory.gradients + memory.optimizer
        return state / ranks + memory.peak - state

    if ranks > 1 and sharded(found) <= limit:
        return "with accelerate_configs/fsdp2.yaml"
    if ranks > 1 and sharded(small) <= limit:
        return "with accelerate_configs/fsdp2.yaml and activation_checkpointing: true"
    return None
