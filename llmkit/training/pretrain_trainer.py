"""Trainer for pretraining, extended at its seams: data loaders, the count of targets, evaluation, logging."""

import dataclasses
from collections.abc import Sequence

import torch
import transformers
from accelerate.utils import FullyShardedDataParallelPlugin, gather_object
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.utils.data import DataLoader

from llmkit.data.ahead import AheadWindows
from llmkit.data.lookup import documents_of
from llmkit.data.mixture import MixedWindows, MixtureSampler
from llmkit.data.windows import TokenWindows, collate_windows
from llmkit.errors import UserError
from llmkit.evaluation.hellaswag import encode_hellaswag, load_hellaswag
from llmkit.machine import bf16_is_fast, device_name, peak_flops
from llmkit.model.loss import IGNORE_INDEX
from llmkit.model.modeling_gpt2 import GPT2LMHeadModel
from llmkit.runs.record import run_record, windows_record
from llmkit.runs.run import PRETRAINING
from llmkit.training.arguments import PretrainArguments
from llmkit.training.callbacks import Throughput
from llmkit.training.monitoring import HellaSwagInTraining, ParameterMonitor
from llmkit.training.optimizers import OPTIMIZERS, is_fully_sharded, named_learning_rates
from llmkit.training.run_arguments import check_length_is_fixed
from llmkit.training.schedules import decisive_length, describe_schedule
from llmkit.training.shard_supply import ShardSupply
from llmkit.training.stopping import leave_signals_to_the_run


class PretrainTrainer(ShardSupply):
    """Trains on windows of token shards.

    The batch of step s is a function of the seed and s alone: `WindowOrder` orders all windows, and the ranks
    and micro-batches of a step share out its part of that order. So the same text is trained at any number of ranks,
    and a resumed run goes on where it stopped.

    Args:
        model: the model.
        args: with `max_steps` or `num_train_epochs`; the accumulation is set from `total_batch_tokens`.
        train_dataset, eval_dataset: windows of one block size, of one source or of several.
        processing_class: the tokenizer, saved with each checkpoint.
        source: the dataclasses that say where data and model came from, for the run's record.

    Raises:
        UserError: a batch that cannot be shared out, or that is larger than the training set.
    """

    args: PretrainArguments
    model: GPT2LMHeadModel
    train_dataset: TokenWindows | MixedWindows
    eval_dataset: TokenWindows | MixedWindows
    processing_class: transformers.PreTrainedTokenizerBase

    def __init__(
        self,
        model: GPT2LMHeadModel,
        args: PretrainArguments,
        train_dataset: TokenWindows | MixedWindows,
        eval_dataset: TokenWindows | MixedWindows,
        processing_class: transformers.PreTrainedTokenizerBase,
        source: Sequence = (),
    ):
        check_length_is_fixed(args)
        block_size = self.block_size = train_dataset.block_size
        args.set_accumulation(block_size)
        if args.total_batch_tokens > (tokens := len(train_dataset) * block_size):
            raise UserError(
                f"total_batch_tokens={args.total_batch_tokens:,}: the training split has {tokens:,} tokens in windows "
                f"of {block_size}, and a step reads none of them twice: take less, or more text"
            )
        if train_dataset.vocab_size > model.config.vocab_size:
            raise UserError(
                f"the windows have ids of a vocabulary of {train_dataset.vocab_size:,} tokens, and the model has "
                f"{model.config.vocab_size:,}: make it with GPT2Config(...).for_tokenizer(tokenizer)"
            )
        if args.max_steps == -1:
            windows = args.num_train_epochs * len(train_dataset)
            args.max_steps = max(1, round(windows * block_size / args.total_batch_tokens))
        data = windows_record(train_dataset, eval_dataset)
        decisive = decisive_length(args)
        if isinstance(train_dataset, MixedWindows):
            groups = {name: windows.shard_group for name, windows in train_dataset.sources.items()}
            decisive |= {"weights": train_dataset.weights, "shard_group": groups}
        else:
            decisive |= {"shard_group": train_dataset.shard_group, "prepare": data["prepare"]}
        record = run_record(PRETRAINING, args, model, data, source, decisive)
        # From here on, Trainer's steps: more than the full batches that were asked for where the first are smaller.
        self.full_steps, self.batches = args.max_steps, args.batches(block_size)
        args.max_steps = record["steps"] = self.batches.num_steps
        seed = args.seed if args.data_seed is None else args.data_seed
        self.sampler = train_dataset.sampler(self.batches, seed)
        args.remove_unused_columns = False  # `shift_labels` reaches the model

        peak = peak_flops(args.device) if args.bf16 else None
        throughput = Throughput(
            tokens_before=self.tokens_before,
            flops_per_token=model.config.flops_per_token(block_size),
            peak=peak * args.world_size if peak else None,
        )
        super().__init__(
            model,
            args,
            record,
            throughput,
            prompts=args.sample_prompts,
            context=model.config.n_positions,
            processing_class=processing_class,
            data_collator=collate_windows,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
        )
        if is_fully_sharded(args):
            plugin = self.accelerator.state.fsdp_plugin
            assert plugin is not None, "under FSDP"
            keep_sums_in_float32(plugin)
        self.monitor = ParameterMonitor(model, args.monitor_steps) if args.monitor_steps else None
        if self.monitor:
            self.add_callback(self.monitor)
        if args.hellaswag_steps:
            rows = load_hellaswag(args.hellaswag_file)[: args.hellaswag_questions]
            questions = encode_hellaswag(rows, processing_class, model.config.n_positions)
            batch_size = max(1, args.per_device_eval_batch_size // len(rows[0]["endings"]))
            every, stop = args.hellaswag_steps, self.stop_on_request
            self.add_callback(HellaSwagInTraining(questions, every, batch_size, self.accelerator, self.log, stop))

    def create_optimizer(self, model=None):
        if self.args.optim in OPTIMIZERS and self.optimizer is None:
            model = self.model if model is None else model
            decayed = self.get_decay_parameter_names(model)
            has_bf16 = all(gather_object([bf16_is_fast(self.args.device.type)]))
            self.optimizer = OPTIMIZERS[self.args.optim](model, self.args, decayed, has_bf16)
        return super().create_optimizer(model)

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        return super().create_scheduler(self.full_steps, optimizer)

    def tokens_before(self, step: int) -> int:
        """Targets that were trained when `step` steps were done."""
        return self.batches.windows_before(step) * self.block_size

    def schedule_position(self, step: int) -> float:
        return self.batches.full_batches_before(step)

    # Data

    def get_train_dataloader(self) -> DataLoader:
        """All batches of the run as one epoch to Trainer; passes over the text are the sampler's business."""
        return self.accelerator.prepare(self._loader(self.train_dataset, batch_sampler=self.sampler))

    def describe_micro_batch(self, step: int, rank: int, micro_batch: int) -> str:
        start, stop = self.batches.places(step)[micro_batch * self.args.world_size + rank]
        documents = [
            document
            for window in self.sampler.windows(start, stop)
            for document in documents_of(*self.train_dataset.locate(window), self.processing_class)
        ]
        more = f" and {len(documents) - 3} more documents" if len(documents) > 3 else ""
        return "; ".join(map(str, documents[:3])) + more

    def get_eval_dataloader(self, eval_dataset=None) -> DataLoader:
        dataset: TokenWindows | MixedWindows = eval_dataset or self.eval_dataset
        batch_size = self.args.per_device_eval_batch_size
        dataset = dataset.padded_to_multiple_of(batch_size * self.args.world_size)
        return self.accelerator.prepare(self._loader(dataset, batch_size=batch_size))

    def _loader(self, dataset: TokenWindows | MixedWindows, **batching) -> DataLoader:
        return DataLoader(
            dataset,
            collate_fn=collate_windows,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
            worker_init_fn=leave_signals_to_the_run,
            prefetch_factor=self.args.dataloader_prefetch_factor,
            multiprocessing_context=self.args.dataloader_multiprocessing_context,
            **batching,
        )

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The micro-batches of a step, and its number of targets over all of them and all ranks.

        Trainer counts where it finds `labels`; these batches have `shift_labels` alone.
        """
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not batches:
            return batches, None
        targets = sum((batch["shift_labels"] != IGNORE_INDEX).sum() for batch in batches)
        return batches, self.accelerator.reduce(targets, reduction="sum")

    # Evaluation

    def sum_loss(self, model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        # Divided by one item, the loss is the sum. Nobody looks at logits here, so there are those of one position.
        nats = model(**inputs, num_items_in_batch=1, logits_to_keep=1).loss
        return torch.stack([nats, (inputs["shift_labels"] != IGNORE_INDEX).sum()])

    def tokens_per_byte(self, dataset: TokenWindows | MixedWindows) -> float:
        return dataset.tokens_per_byte

    # Logging

    def floating_point_ops(self, inputs) -> int:
        return self.throughput.flops_per_token * inputs["input_ids"].numel()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        tokens = self.tokens_before(self.state.global_step)
        if "loss" in logs:
            logs |= {"tokens": tokens}
            logs |= self.throughput.measure(self.state.global_step)
            logs |= self._read_of_each_source(self.state.global_step)
            if self.monitor:
                logs |= self.monitor.measured(self.state.global_step, logs.get("grad_norm"))
            assert self.optimizer is not None
            logs |= named_learning_rates(self.optimizer, logs["learning_rate"], self.args.learning_rate)
        # Trainer's epoch is the whole run here. Passes over the text are what a reader means.
        self.state.epoch = tokens / self.train_tokens
        super().log(logs, start_time)

    def _read_of_each_source(self, step: int) -> dict[str, float]:
        """Targets of each source of a mixture when `step` steps were done, and passes over it."""
        read = {}
        if isinstance(self.train_dataset, MixedWindows) and isinstance(self.sampler, MixtureSampler):
            for (name, windows), drawn in zip(
                self.train_dataset.sources.items(), self.sampler.drawn[step].tolist(), strict=True
            ):
                read |= {f"tokens/{name}": drawn * self.block_size, f"epochs/{name}": drawn / len(windows)}
        return read

    @property
    def train_tokens(self) -> int:
        """Targets in one pass over the training set."""
        if isinstance(self.train_dataset, AheadWindows):  # nobody knows yet
            return self.train_dataset.expected_tokens or self.full_steps * self.args.total_batch_tokens
        return len(self.train_dataset) * self.train_dataset.block_size

    def summary(self) -> str:
        """What will be trained, on what and how, as a short table."""
        args, config, data = self.args, self.model.config, self.train_dataset
        batch = (
            f"{args.per_device_train_batch_size} x {data.block_size} x {args.gradient_accumulation_steps} accumulated"
        )
        tokens = self.full_steps * args.total_batch_tokens
        step = f"{args.total_batch_tokens:,} tokens = {batch} x {args.world_size} rank(s)"
        steps = f"{args.max_steps:,} steps"
        schedule = describe_schedule(args, self.full_steps)
        if args.batch_ramp_start is not None:
            step += f", from {args.batch_ramp_start:,} over the first {args.batch_ramp_tokens:,}"
            steps += f" ({self.full_steps:,} full batches)"
            schedule += ", in full batches"
        so_far = " so far" if isinstance(data, AheadWindows) and not data.complete else ""
        chosen = [f"{args.mixed_precision} autocast" if args.mixed_precision != "no" else "float32"]
        chosen += ["TF32"] if args.tf32 else []
        chosen += [f"{config._attn_implementation} attention", f"compile {'on' if args.torch_compile else 'off'}"]
        rows = {
            "model": f"{config.num_parameters:,} parameters: {config.n_layer} layers, {config.n_head} heads, "
            f"{config.n_embd} wide, {config.n_positions} context, {config.vocab_size:,} tokens",
            "data": f"{data.num_tokens:,} tokens to train on{so_far}, {self.eval_dataset.num_tokens:,} held out",
            "sources": ", ".join(
                f"{key.removeprefix('epochs/')} {epochs:.2f} epochs"
                for key, epochs in self._read_of_each_source(args.max_steps).items()
                if key.startswith("epochs/")
            ),
            "step": step,
            "run": f"{steps} = {tokens:,} tokens = {tokens / self.train_tokens:.2f} epochs",
            "optimizer": args.describe_optimizer(),
            "schedule": schedule,
            "machine": f"{args.world_size} x {device_name(args.device)}, {', '.join(chosen)}",
        }
        return "\n".join(f"{name:>10}  {text}" for name, text in rows.items() if text)


def keep_sums_in_float32(plugin: FullyShardedDataParallelPlugin) -> None:
    """DDP's mixed precision: under FSDP2 accelerate would sum gradients in bfloat16, and round the loss to it."""
    policy = plugin.mixed_precision_policy
    if isinstance(policy, MixedPrecisionPolicy):  # FSDP2's
        plugin.mixed_precision_policy = dataclasses.replace(policy, reduce_dtype=torch.float32, output_dtype=None)
