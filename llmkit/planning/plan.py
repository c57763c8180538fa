"""What a recipe's run will take: tokens, steps, floating-point operations, memory, hours, cost and disk."""

import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from transformers import Trainer

from llmkit.data.arguments import DataArguments
from llmkit.data.manifest import MANIFEST, Manifest, load_manifest
from llmkit.errors import UserError
from llmkit.machine import GPUS, bf16_is_fast
from llmkit.model.arguments import ModelArguments
from llmkit.model.configuration_gpt2 import GPT2Config
from llmkit.model.modeling_gpt2 import GPT2LMHeadModel
from llmkit.planning.memory import StepMemory, largest_micro_batch, step_memory
from llmkit.training.arguments import PretrainArguments
from llmkit.training.optimizers import MUON, create_muon

CHINCHILLA = (
    20  # tokens for each parameter, where a given amount of compute gives the lowest loss (Hoffmann et al. 2022)
)
CHARACTERS = 128  # tokens of a character tokenizer before its text was read: a guess that is said to be one
USABLE = 0.92  # of a device's memory: the CUDA context, fragmentation and NCCL take some


@dataclass(frozen=True)
class Hardware:
    """What a run is planned for.

    Attributes:
        name: of one device.
        count: the number of devices, with a rank on each.
        device_type: "cpu" or "cuda".
        memory: bytes of one device.
        peak: its bfloat16 peak in FLOP/s, None where it is not known.
    """

    name: str
    count: int
    device_type: str
    memory: float
    peak: float | None

    @classmethod
    def of(cls, gpu: str | None, count: int) -> "Hardware":
        """A GPU by words of its name, such as "H200" or "A100 80GB", or this machine.

        Raises:
            UserError: no GPU or several different ones have that in their name.
        """
        if gpu is None:
            if torch.cuda.is_available():
                name, memory = torch.cuda.get_device_name(0), torch.cuda.mem_get_info(0)[1]
                return cls(name, count, "cuda", memory, GPUS[name].peak if name in GPUS else None)
            return cls("cpu", count, "cpu", os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / count, None)
        words = set(gpu.lower().split())
        found = {name: each for name, each in GPUS.items() if words <= set(name.lower().replace("-", " ").split())}
        if not found:
            raise UserError(f"gpu={gpu}: not known; choose from {', '.join(GPUS)}")
        if len(set(found.values())) > 1:
            raise UserError(f"gpu={gpu}: say which one of {', '.join(found)}")
        name, each = next(iter(found.items()))
        return cls(name, count, "cuda", each.memory, each.peak)

    @property
    def autocast(self) -> torch.dtype | None:
        """bfloat16 where a run would choose it, else None."""
        fast = self.device_type == "cuda" or bf16_is_fast(self.device_type)
        return torch.bfloat16 if fast else None


@dataclass(frozen=True)
class Plan:
    """What a run will take. Bytes are of one rank; None where something is not known before the run.

    Attributes:
        parameters: of the model, the tied embedding counted once.
        tokens: trained over the run.
        train_tokens: in one pass over the text.
        steps: optimizer steps.
        micro_batch, accumulation: sequences that a rank computes at a time, and how many times for a step.
        flops: of the whole run, forward and backward.
        memory: of a step at `micro_batch`.
        communication: bytes of DDP's buckets, a copy of the gradients.
        largest_micro_batch: that fits into the device's memory.
        fits: what it takes to fit: "as it is", "with activation_checkpointing", "with FSDP2", "with both", or None.
        hours, dollars: at `mfu` of the peak, or at the measured pace.
        checkpoint, checkpoints: bytes of one, and the number that is kept.
        shards: bytes of the token shards.
        evaluations, samples, saves: that the run will make.
    """

    hardware: Hardware
    parameters: int
    tokens: int
    train_tokens: int | None
    steps: int
    micro_batch: int
    accumulation: int
    flops: float
    memory: StepMemory
    communication: int
    largest_micro_batch: int
    fits: str | None
    tokens_per_second: float | None
    pace: str
    hours: float | None
    dollars: float | None
    checkpoint: int
    checkpoints: int
    shards: int | None
    evaluations: int
    samples: int
    saves: int

    def as_dict(self) -> dict:
        """For `--json`."""
        return asdict(self) | {"peak": self.memory.peak + self.communication}

    def table(self) -> str:
        """For people."""
        of, gb = self.hardware, 1e9
        rank = self.memory.peak + self.communication
        passes = f", {self.tokens / self.train_tokens:.2f} passes over the text" if self.train_tokens else ""
        ratio = self.tokens / self.parameters
        parts = {
            "weights": self.memory.weights,
            "gradients": self.memory.gradients,
            "optimizer": self.memory.optimizer,
            "activations": self.memory.activations,
            "DDP buckets": self.communication,
        }
        rows = [
            ("model", f"{self.parameters:,} parameters"),
            ("run", f"{self.steps:,} steps, {self.tokens:,} tokens{passes}"),
            ("", f"{ratio:.1f} tokens a parameter (Chinchilla: {CHINCHILLA})"),
            ("compute", f"{self.flops:.2e} FLOPs"),
            ("hardware", f"{of.count} x {of.name}, {of.memory / gb:.0f} GB each"),
            ("step", f"{self.micro_batch} sequences on each device at a time, {self.accumulation} times"),
            ("memory", " + ".join(f"{name} {size / gb:.2f}" for name, size in parts.items() if size)),
            ("", f"= {rank / gb:.2f} GB on each device, {rank / of.memory:.0%} of its memory"),
            ("", f"it fits {self.fits}" if self.fits else "it does not fit, not even sharded: take a smaller model"),
            ("", f"the largest micro-batch that fits is {self.largest_micro_batch}"),
        ]
        if self.hours is not None:
            cost = f", {self.dollars:,.0f} dollars" if self.dollars is not None else ""
            rows.append(
                ("time", f"{_duration(self.hours)}{cost}, at {self.tokens_per_second:,.0f} tokens/s, {self.pace}")
            )
        else:
            rows.append(("time", "not known: --measure takes some steps here, or name a --gpu"))
        disk = f"{self.checkpoints} checkpoint(s) of {self.checkpoint / gb:.2f} GB"
        disk += f", shards of {self.shards / gb:.2f} GB" if self.shards is not None else ""
        rows.append(("disk", disk))
        rows.append(("on the way", f"{self.evaluations} evaluations, {self.samples} samples, {self.saves} saves"))
        return "\n".join(f"{name:>10}  {text}" for name, text in rows)


def _duration(hours: float) -> str:
    return f"{hours:,.1f} hours" if hours >= 1 else f"{hours * 60:.1f} minutes"


def plan_pretraining(
    data_args: DataArguments,
    model_args: ModelArguments,
    args: PretrainArguments,
    hardware: Hardware,
    *,
    mfu: float = 0.4,
    dollars_per_hour: float | None = None,
    measure: bool = False,
) -> Plan:
    """The plan of a pretraining recipe. Nothing is downloaded, and no memory is taken except to measure.

    Args:
        mfu: the share of the devices' peak that the run is assumed to reach.
        dollars_per_hour: for one device.
        measure: take some real steps on this machine and use their pace.

    Raises:
        UserError: what a run would refuse, too.
    """
    config = model_args.config()
    manifest = prepared_shards(data_args)
    config.vocab_size = vocabulary_size(data_args, config)
    block_size = model_args.block_size or config.n_positions
    accumulation = args.accumulation(block_size, hardware.count)
    train_tokens = manifest.splits["train"].tokens if manifest else None
    if measure:
        rate, pace = measured_rate(config, args, block_size), "measured here"
    elif hardware.peak:
        rate = hardware.count * hardware.peak * mfu / config.flops_per_token(block_size)
        pace = f"{mfu:.0%} of the peak, assumed"
    else:
        rate, pace = None, ""
    if args.max_steps > 0:
        steps = args.max_steps
    elif args.train_minutes is not None:
        if rate is None:
            raise UserError("train_minutes needs a pace to count its steps: add --measure, a --gpu, or max_steps")
        steps = max(1, int(60 * args.train_minutes * rate / args.total_batch_tokens))
    elif train_tokens is not None:
        steps = max(1, round(args.num_train_epochs * train_tokens / args.total_batch_tokens))
    else:
        raise UserError(
            "num_train_epochs needs prepared text to count its tokens: give max_steps, or prepare it first"
        )
    tokens = steps * args.total_batch_tokens

    def memory(micro_batch: int, checkpointing: bool = bool(args.activation_checkpointing)) -> StepMemory:
        return pretraining_memory(config, args, micro_batch, block_size, hardware, accumulation > 1, checkpointing)

    micro_batch, twice = args.per_device_train_batch_size, 2 * args.per_device_train_batch_size
    found = memory(micro_batch)
    buckets = found.gradients if hardware.count > 1 else 0
    limit = hardware.memory * USABLE
    hours = tokens / rate / 3600 if rate else None
    evaluations = _every(args.eval_strategy, args.eval_steps, args.logging_steps, steps) + 1  # and one at the end
    saves = _every(args.save_strategy, args.save_steps, args.logging_steps, steps)
    return Plan(
        hardware=hardware,
        parameters=config.num_parameters,
        tokens=tokens,
        train_tokens=train_tokens,
        steps=steps,
        micro_batch=micro_batch,
        accumulation=accumulation,
        flops=float(tokens * config.flops_per_token(block_size)),
        memory=found,
        communication=buckets,
        largest_micro_batch=min(
            largest_micro_batch((micro_batch, found.peak + buckets), (twice, memory(twice).peak + buckets), limit),
            args.total_batch_tokens // (block_size * hardware.count),
        ),
        fits=_what_fits(found, lambda: memory(micro_batch, True), buckets, limit, hardware.count),
        tokens_per_second=rate,
        pace=pace,
        hours=hours,
        dollars=hours * dollars_per_hour * hardware.count if hours and dollars_per_hour is not None else None,
        checkpoint=found.weights + found.optimizer,
        checkpoints=min(saves, args.save_total_limit or saves),
        shards=_shard_bytes(manifest),
        evaluations=evaluations,
        samples=evaluations * len(args.sample_prompts),
        saves=saves,
    )


def pretraining_memory(
    config: GPT2Config,
    args: PretrainArguments,
    micro_batch: int,
    block_size: int,
    hardware: Hardware,
    accumulate: bool,
    checkpointing: bool = False,
) -> StepMemory:
    """The memory of a step of the model that `config` describes, at a micro-batch of so many windows."""

    def build() -> GPT2LMHeadModel:
        model = GPT2LMHeadModel(config)
        if checkpointing:
            model.activation_checkpointing_enable()
        return model.train()

    def loss_of(model: torch.nn.Module) -> torch.Tensor:
        ids = torch.zeros(micro_batch, block_size, dtype=torch.long)
        return model(ids, shift_labels=ids, num_items_in_batch=1).loss

    def create_optimizer(model: torch.nn.Module) -> torch.optim.Optimizer:
        assert isinstance(model, GPT2LMHeadModel), "that of `build`"
        if args.optim == MUON:
            return create_muon(model, args, decayed=())
        optimizer_class, how = Trainer.get_optimizer_cls_and_kwargs(args, model)
        return optimizer_class(model.parameters(), **how)

    # The arguments were resolved for this machine; what is planned for another one is what that one would choose.
    here = torch.bfloat16 if args.bf16 else None
    return step_memory(
        build,
        loss_of,
        create_optimizer,
        device_type=hardware.device_type,
        autocast=here if hardware.device_type == "cpu" else hardware.autocast,
        accumulate=accumulate,
    )


def measured_rate(config: GPT2Config, args: PretrainArguments, block_size: int, seconds: float = 10.0) -> float:
    """Tokens per second of real steps on this machine's device, on random tokens, the first two left out."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # pyrefly: ignore[bad-argument-type]  a decorator of transformers hides what `to` takes
    model = GPT2LMHeadModel(config).to(device).train()
    optimizer_class, how = Trainer.get_optimizer_cls_and_kwargs(replace(args, optim="adamw_torch_fused"), model)
    optimizer = optimizer_class(model.parameters(), **how)
    dtype = torch.bfloat16 if bf16_is_fast(device.type) else None
    ids = torch.randint(config.vocab_size, (args.per_device_train_batch_size, block_size), device=device)

    def step() -> None:
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            loss = model(ids, shift_labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()  # waits for a GPU
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(2):
        step()
    start, steps = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - start) < seconds or steps < 3:
        step()
        steps += 1
    return steps * ids.numel() / elapsed


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
        return (memory.weights + memory.gradients + memory.optimizer) / ranks + memory.activations

    if ranks > 1 and sharded(found) <= limit:
        return "with accelerate_configs/fsdp2.yaml"
    if ranks > 1 and sharded(small) <= limit:
        return "with accelerate_configs/fsdp2.yaml and activation_checkpointing: true"
    return None


def prepared_shards(args: DataArguments) -> Manifest | None:
    """What the recipe's `data_dir` holds, None where nothing is prepared."""
    folder = Path(args.data_dir) if args.data_dir else None
    return load_manifest(folder) if folder and (folder / MANIFEST).exists() else None


def vocabulary_size(args: DataArguments, config: GPT2Config) -> int:
    """Of the recipe's shards, or of the tokenizer that it will make."""
    if manifest := prepared_shards(args):
        return manifest.vocab_size
    if args.tokenizer == "bpe":
        return args.vocab_size
    return CHARACTERS if args.tokenizer == "character" else config.vocab_size


def _shard_bytes(manifest) -> int | None:
    if manifest is None:
        return None
    width = torch.empty(0, dtype=getattr(torch, manifest.dtype)).element_size()
    return sum(split.tokens for split in manifest.splits.values()) * width


def _every(strategy: str, every: float | None, logging_steps: float, steps: int) -> int:
    """How often something happens that a strategy of Trainer's decides."""
    if strategy == "no":
        return 0
    if strategy == "epoch":
        return 1  # the whole run is one epoch to Trainer
    every = every or logging_steps
    return steps // (max(1, int(steps * every)) if every < 1 else int(every))
