"""One training loop a peer, on the same random tokens: what `training_step.py` and `trainer_overhead.py` time.

Each function makes everything ready and returns another one, which trains `shape.steps` steps and returns the seconds
of those after the warm-up. Batches are in memory before the first step, but for llmkit's own, which come from shards
through its data loader.
"""

import argparse
import ast
import sys
import tempfile
import time
import types
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import transformers

from llmkit import GPT2Config, GPT2LMHeadModel
from llmkit.data.manifest import Manifest, Shard, Split
from llmkit.data.tokenizer import train_character_tokenizer
from llmkit.data.windows import TokenWindows
from llmkit.files import checksum
from llmkit.machine import set_up, set_up_cpu
from llmkit.model import modeling_gpt2
from llmkit.training.arguments import PretrainArguments
from llmkit.training.pretrain_trainer import PretrainTrainer
from measuring import forget_peak, synchronize, use_threads

# Sizes that the flags take their defaults from. A CPU takes minutes for a step of the second at its own batch.
SHAPES = {
    "small": {"n_layer": 6, "n_embd": 384, "n_head": 6, "block_size": 256, "batch_size": 12, "vocab_size": 50257},
    "124M": {"n_layer": 12, "n_embd": 768, "n_head": 12, "block_size": 1024, "batch_size": 4, "vocab_size": 50257},
    "tiny": {"n_layer": 2, "n_embd": 64, "n_head": 2, "block_size": 32, "batch_size": 2, "vocab_size": 256},
}
LEARNING_RATE, WEIGHT_DECAY = 6e-4, 0.1
WARMUP_STEPS = 2


def add_shape_options(parser: argparse.ArgumentParser, preset: str, steps: int) -> None:
    """`--preset`, each size by itself over it, `--steps`, `--bf16` and `--compile`."""
    parser.add_argument("--preset", choices=SHAPES, default=preset, help=f"sizes (default {preset})")
    for name in SHAPES[preset]:
        parser.add_argument(f"--{name}", type=int, help="instead of the preset's")
    parser.add_argument("--steps", type=int, default=steps, help=f"of a measurement (default {steps})")
    parser.add_argument("--bf16", action="store_true", help="autocast to bfloat16; else float32")
    parser.add_argument("--compile", action="store_true", help="torch.compile the models")


def parse_shape(parser: argparse.ArgumentParser, warmup_steps: int = WARMUP_STEPS) -> argparse.Namespace:
    """The command line, with the preset's sizes where it gives none; from here on the process keeps to `--threads`."""
    options = parser.parse_args()
    if options.steps <= warmup_steps:
        parser.error(f"--steps {options.steps}: the first {warmup_steps} are not counted, so give more")
    for name, value in SHAPES[options.preset].items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    use_threads(options.threads)
    return options


def describe(shape: argparse.Namespace) -> str:
    return (
        f"{shape.n_layer} layers, {shape.n_embd} wide, {shape.batch_size} x {shape.block_size} tokens, vocabulary "
        f"{shape.vocab_size:,}, {'bf16' if shape.bf16 else 'float32'}, compile {'on' if shape.compile else 'off'}"
    )


class Clock(transformers.TrainerCallback):
    """Seconds from the end of the warm-up to the end of the last step.

    A GPU is waited for at these two moments only: what a loop does on the CPU while the GPU works costs it nothing.
    """

    def __init__(self, steps: int):
        self.steps, self.done = steps, 0

    def on_step_end(self, args=None, state=None, control=None, **kwargs):
        self.done += 1
        if self.done == WARMUP_STEPS:
            synchronize()
            forget_peak()
            self.start = time.perf_counter()
        elif self.done == self.steps:
            synchronize()
            self.seconds = time.perf_counter() - self.start


# ------------------------------------------------------------------ data and models


def random_windows(shape: argparse.Namespace, folder: str) -> TokenWindows:
    """Shards of random tokens, enough for every step's batch to be another."""
    tokens = shape.batch_size * shape.block_size * (shape.steps + 2)
    ids = np.random.default_rng(0).integers(0, shape.vocab_size, tokens, dtype=np.uint16)
    ids.tofile(Path(folder) / "random.bin")
    shard = Shard("random.bin", tokens=tokens, documents=1, bytes=tokens, xxh3_64=checksum(Path(folder, "random.bin")))
    split = Split.of([shard])
    manifest = Manifest(
        directory=Path(folder),
        dtype="uint16",
        vocab_size=shape.vocab_size,
        eos_token_id=0,
        corpus="random tokens",
        settings={"corpus": "random", "tokenizer": "none"},
        splits=dict.fromkeys(("train", "validation"), split),
    )
    return TokenWindows(manifest, "train", shape.block_size)


def batches_in_memory(shape: argparse.Namespace) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(inputs, targets) of each step, both (B, T), where the model is."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with tempfile.TemporaryDirectory() as folder:
        windows = random_windows(shape, folder)
        starts = range(0, shape.steps * shape.batch_size, shape.batch_size)
        batches = [windows.__getitems__(range(start, start + shape.batch_size)) for start in starts]
    return [(batch["input_ids"].to(device), batch["shift_labels"].to(device)) for batch in batches]


def model_sizes(shape: argparse.Namespace) -> dict[str, int]:
    sizes = {"vocab_size": shape.vocab_size, "n_positions": shape.block_size, "n_layer": shape.n_layer}
    return sizes | {"n_embd": shape.n_embd, "n_head": shape.n_head, "bos_token_id": 0, "eos_token_id": 0}


def trainer_settings(shape: argparse.Namespace, folder: str) -> dict:
    """Arguments that both Trainers get."""
    return {
        "output_dir": folder,
        "max_steps": shape.steps,
        "per_device_train_batch_size": shape.batch_size,
        "learning_rate": LEARNING_RATE,
        "weight_decay": WEIGHT_DECAY,
        "bf16": shape.bf16,
        "torch_compile": shape.compile,
        "save_strategy": "no",
        "report_to": "none",
        "logging_steps": 10,
        "use_cpu": not torch.cuda.is_available(),
        "disable_tqdm": True,
    }


# ------------------------------------------------------------------ loops


def make_llmkit_trainer(shape: argparse.Namespace, folder: str, **given) -> PretrainTrainer:
    windows = random_windows(shape, folder)
    given["total_batch_tokens"] = shape.batch_size * shape.block_size
    args = PretrainArguments(**trainer_settings(shape, folder), **given)
    set_up(args)  # as a recipe does
    model = GPT2LMHeadModel(GPT2Config(**model_sizes(shape)))
    return PretrainTrainer(model, args, windows, windows, processing_class=train_character_tokenizer(["abc"]))


def recomputing(shape: argparse.Namespace, from_width: int) -> Callable[[], float]:
    """llmkit, but from this width on MLPs compute the activation function again in the backward pass."""
    modeling_gpt2.RECOMPUTE_FROM = from_width
    return llmkit(shape)


def llmkit(shape: argparse.Namespace, **given) -> Callable[[], float]:
    folder = tempfile.TemporaryDirectory()
    trainer, clock = make_llmkit_trainer(shape, folder.name, **given), Clock(shape.steps)
    trainer.add_callback(clock)

    def train() -> float:
        with folder:
            trainer.train()
        return clock.seconds

    return train


def stock(shape: argparse.Namespace, dropout: float = 0.0) -> Callable[[], float]:
    """transformers' GPT2LMHeadModel in its Trainer."""
    folder, clock = tempfile.TemporaryDirectory(), Clock(shape.steps)
    rates = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), dropout)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**model_sizes(shape), **rates))
    rows = [{"input_ids": ids, "labels": ids} for batch, _ in batches_in_memory(shape) for ids in batch.cpu()]
    args = transformers.TrainingArguments(**trainer_settings(shape, folder.name))
    trainer = transformers.Trainer(model, args, train_dataset=rows, callbacks=[clock])

    def train() -> float:
        with folder:
            trainer.train()
        return clock.seconds

    return train


def bare(shape: argparse.Namespace) -> Callable[[], float]:
    """The least loop around llmkit's model, with the optimizer that its Trainer makes."""
    if not torch.cuda.is_available():
        set_up_cpu()
    batches = batches_in_memory(shape)
    model = GPT2LMHeadModel(GPT2Config(**model_sizes(shape))).to(batches[0][0].device)
    step = bare_step(model, shape)

    def train() -> float:
        return _seconds(step, batches)

    return train


def bare_step(model: GPT2LMHeadModel, shape: argparse.Namespace) -> Callable[[torch.Tensor, torch.Tensor], None]:
    """A function that takes one step on (inputs, targets)."""
    model.train()
    decayed = [parameter for parameter in model.parameters() if parameter.dim() >= 2]
    rest = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    groups = [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, fused=True)
    run = torch.compile(model) if shape.compile else model

    def step(ids: torch.Tensor, targets: torch.Tensor) -> None:
        with autocast(shape, cache_enabled=False):  # as llmkit's trainers have it
            loss = run(input_ids=ids, shift_labels=targets).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def nanogpt(shape: argparse.Namespace) -> Callable[[], float]:
    """nanoGPT's model, optimizer and the body of its train.py's loop, from the checkout `--nanogpt`."""
    sys.path.insert(0, shape.nanogpt)
    from model import GPT, GPTConfig

    batches = batches_in_memory(shape)
    sizes = {"n_layer": shape.n_layer, "n_head": shape.n_head, "n_embd": shape.n_embd, "block_size": shape.block_size}
    model = GPT(GPTConfig(**sizes, vocab_size=_rounded_up(shape.vocab_size, 64), dropout=0.0, bias=True))
    model.to(batches[0][0].device)
    optimizer = model.configure_optimizers(WEIGHT_DECAY, LEARNING_RATE, (0.9, 0.95), batches[0][0].device.type)
    run = torch.compile(model) if shape.compile else model

    def step(x: torch.Tensor, y: torch.Tensor) -> None:
        with autocast(shape):
            _, loss = run(x, y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return lambda: _seconds(step, batches)


def build_nanogpt(shape: argparse.Namespace) -> Callable[[], float]:
    """build-nanogpt's model, optimizer and the body of its training loop, from the checkout `--build-nanogpt`."""
    script = definitions(Path(shape.build_nanogpt) / "train_gpt2.py", master_process=True)
    torch.set_float32_matmul_precision("high")  # as there
    batches = batches_in_memory(shape)
    sizes = {"n_layer": shape.n_layer, "n_head": shape.n_head, "n_embd": shape.n_embd, "block_size": shape.block_size}
    model = script.GPT(script.GPTConfig(**sizes, vocab_size=_rounded_up(shape.vocab_size, 128)))
    device = batches[0][0].device
    model.to(device)
    optimizer = model.configure_optimizers(WEIGHT_DECAY, LEARNING_RATE, device.type)
    run = torch.compile(model) if shape.compile else model

    def step(x: torch.Tensor, y: torch.Tensor) -> None:
        optimizer.zero_grad()
        with autocast(shape):
            _, loss = run(x, y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return lambda: _seconds(step, batches)


def definitions(path: Path, **names) -> types.ModuleType:
    """The classes of a script that trains when it is imported: its definitions alone are run, with `names` given."""
    tree = ast.parse(path.read_text())
    # Its two imports that download something when they run are of no use to the classes.
    imports = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    needed = [node for node in imports if "hellaswag" not in ast.unparse(node) and "tiktoken" not in ast.unparse(node)]
    tree.body = needed + [node for node in tree.body if isinstance(node, ast.ClassDef)]
    module = types.ModuleType(path.stem)
    module.__dict__.update(names)
    sys.modules[path.stem] = module  # where dataclasses look for it
    exec(compile(tree, path, "exec"), module.__dict__)
    return module


def autocast(shape: argparse.Namespace, cache_enabled: bool = True) -> torch.autocast:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.autocast(device, torch.bfloat16, enabled=shape.bf16, cache_enabled=cache_enabled)


def _seconds(step: Callable, batches: list[tuple[torch.Tensor, torch.Tensor]]) -> float:
    clock = Clock(len(batches))
    for x, y in batches:
        step(x, y)
        clock.on_step_end()
    return clock.seconds


def _rounded_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


LOOPS: dict[str, Callable[[argparse.Namespace], Callable[[], float]]] = {
    "llmkit": llmkit,
    "recompute never": lambda shape: recomputing(shape, sys.maxsize),
    "recompute always": lambda shape: recomputing(shape, 0),
    "adamw_bnb_8bit": lambda shape: llmkit(shape, optim="adamw_bnb_8bit"),
    "adamw_torch_8bit": lambda shape: llmkit(shape, optim="adamw_torch_8bit"),
    "stock": stock,
    "stock, dropout 0.1": lambda shape: stock(shape, dropout=0.1),
    "bare loop": bare,
    "nanoGPT": nanogpt,
    "build-nanogpt": build_nanogpt,
}
