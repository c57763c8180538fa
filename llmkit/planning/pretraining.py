"""The plan of a pretraining recipe: its real model's step, and the tokens of its text where that is prepared."""

from pathlib import Path

import numpy as np
import torch
from transformers import Trainer

from llmkit.data.arguments import DataArguments
from llmkit.data.corpus import open_corpus
from llmkit.data.manifest import MANIFEST, Manifest, load_manifest
from llmkit.data.prepare import default_data_dir
from llmkit.machine import bf16_is_fast
from llmkit.model.arguments import ModelArguments
from llmkit.model.configuration_gpt2 import GPT2Config
from llmkit.model.modeling_gpt2 import GPT2LMHeadModel
from llmkit.planning.hardware import Hardware
from llmkit.planning.memory import Step
from llmkit.planning.plan import Assumptions, Plan, Sizes, make_plan
from llmkit.training.arguments import PretrainArguments
from llmkit.training.compatibility import enable_activation_checkpointing
from llmkit.training.optimizers import MUON, create_muon

# Tokens that FineWeb-Edu's page on the Hub states of its samples, by GPT-2's tokenizer.
STATED_TOKENS = {"sample-10BT": 10**10, "sample-100BT": 10**11, "sample-350BT": 35 * 10**10}
CHARACTERS = 128  # tokens of a character tokenizer before its text was read: a guess that is said to be one


def plan_pretraining(
    data_args: DataArguments,
    model_args: ModelArguments,
    args: PretrainArguments,
    hardware: Hardware,
    assumptions: Assumptions,
) -> Plan:
    """The plan of a pretraining recipe. Nothing is downloaded, and no memory is taken except to measure.

    Raises:
        UserError: what a run would refuse, too.
    """
    config = model_args.config()
    manifest = prepared_shards(data_args)
    config.vocab_size = vocabulary_size(data_args, config)
    block_size = model_args.block_size or config.n_positions
    accumulation = args.accumulation(block_size, hardware.count)
    sizes = Sizes(
        parameters=config.num_parameters,
        trained=config.num_parameters,
        row=block_size,
        step_tokens=args.total_batch_tokens,
        micro_batch=args.per_device_train_batch_size,
        accumulation=accumulation,
        flops_per_token=config.flops_per_token(block_size),
    )

    def step(micro_batch: int, checkpointing: bool) -> Step:
        return pretraining_step(config, args, micro_batch, block_size, accumulation > 1, checkpointing)

    train_tokens = manifest.splits["train"].tokens if manifest else _stated_tokens(data_args)
    epochs = args.num_train_epochs * train_tokens / args.total_batch_tokens if train_tokens else None
    return make_plan(
        f"GPT-2 of {config.num_parameters:,} parameters",
        sizes,
        step,
        args,
        hardware,
        assumptions,
        steps_of_epochs=max(1, round(epochs)) if epochs else None,
        train_tokens=train_tokens,
        shards=_shard_bytes(manifest, train_tokens, config.vocab_size),
        prompts=len(args.sample_prompts) or 2,  # two beginnings of held-out documents, where none is given
        can_shard=True,
    )


def pretraining_step(
    config: GPT2Config,
    args: PretrainArguments,
    micro_batch: int,
    block_size: int,
    accumulate: bool = False,
    checkpointing: bool = False,
) -> Step:
    """A step of the model that `config` describes, at a micro-batch of so many windows."""

    def build() -> GPT2LMHeadModel:
        model = GPT2LMHeadModel(config)
        if checkpointing:
            enable_activation_checkpointing(model, args.activation_checkpointing_kwargs)
        return model.train()

    def loss_of(model: torch.nn.Module) -> torch.Tensor:
        # Of no pattern: once it is learned, gradients are so small that CPUs take many times longer for them.
        ids, targets = torch.randint(config.vocab_size, (2, micro_batch, block_size))
        return model(ids, shift_labels=targets, num_items_in_batch=targets.numel()).loss

    def create_optimizer(model: torch.nn.Module) -> torch.optim.Optimizer:
        assert isinstance(model, GPT2LMHeadModel), "that of `build`"
        if args.optim == MUON:
            return create_muon(model, args, decayed=(), has_bf16=bf16_is_fast(args.device.type))
        optimizer_class, how = Trainer.get_optimizer_cls_and_kwargs(args, model)
        return optimizer_class(model.parameters(), **how)

    return Step(build, loss_of, create_optimizer, accumulate)


def prepared_shards(args: DataArguments) -> Manifest | None:
    """The shards that a run would find, in the folder that is given or in the one that local text would get.

    Of a URL, the manifest alone is read.
    """
    if args.shards_url:
        return load_manifest(args.shards_url, patience=0)
    if args.data_dir:
        folder = Path(args.data_dir)
    elif args.dataset_name or args.text_files:
        return None  # its fingerprint takes reading it, and it may be large or elsewhere
    else:
        folder = Path(default_data_dir(args, open_corpus()))
    return load_manifest(folder) if (folder / MANIFEST).exists() else None


def vocabulary_size(args: DataArguments, config: GPT2Config) -> int:
    """Of the recipe's shards, or of the tokenizer that it will make."""
    if manifest := prepared_shards(args):
        return manifest.vocab_size
    if args.tokenizer == "bpe":
        return args.vocab_size
    return CHARACTERS if args.tokenizer == "character" else config.vocab_size


def _stated_tokens(args: DataArguments) -> int | None:
    if args.dataset_name != "HuggingFaceFW/fineweb-edu" or args.dataset_config is None:
        return None
    return STATED_TOKENS.get(args.dataset_config)


def _shard_bytes(manifest: Manifest | None, train_tokens: int | None, vocab_size: int) -> int | None:
    if manifest:
        tokens = sum(split.tokens for split in manifest.splits.values())
        return tokens * np.dtype(manifest.dtype).itemsize
    return train_tokens * (2 if vocab_size <= 2**16 else 4) if train_tokens else None
