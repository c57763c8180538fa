"""What SFT and preference tuning want of TRL's trainers alike: float32 adapters, counts, exact evaluation, saving."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from bitsandbytes.nn import Linear4bit
from datasets import Dataset, concatenate_datasets
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmkit.data.tokenizer import as_prompt, decode
from llmkit.finetuning.turns import Messages
from llmkit.model.opening import context_length
from llmkit.runs.record import run_record
from llmkit.runs.run import QUANTIZATION_CONFIG
from llmkit.training.base_trainer import ExactTrainer
from llmkit.training.callbacks import Throughput
from llmkit.training.run_arguments import RunArguments, check_length_is_fixed
from llmkit.training.schedules import decisive_length


class AdapterTrainer(ExactTrainer):
    """A base for TRL's trainers: `class MyTrainer(AdapterTrainer, SFTTrainer)`.

    It keeps trained adapters in float32, logs as pretraining does, evaluates every held-out row once, counts trained
    tokens so that the count survives resuming, and saves the base's quantization with the adapter. A subclass says
    what a batch trains (`trained_tokens`) and what a row without targets is (`without_targets`).

    Args:
        model: the frozen base, or the base with the adapter that is trained on.
        args: the arguments.
        kind: of the run, for its record.
        data: what is known of the data, for the record.
        source: the dataclasses that say where data and model came from, for the record.
        tokenizer: with chat template and padding token; saved with each checkpoint.
        decisive: what else a resumed run has to have the same, by name.
        **others: those of the TRL trainer.
    """

    eval_dataset: Dataset
    processing_class: PreTrainedTokenizerBase

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        args: RunArguments,
        kind: str,
        data: dict,
        source: Sequence,
        tokenizer: PreTrainedTokenizerBase,
        decisive: dict | None = None,
        **others,
    ):
        check_length_is_fixed(args)
        # Generation stops at the token that is trained to end an answer, whatever the base was told.
        model.generation_config.eos_token_id = model.config.eos_token_id = tokenizer.eos_token_id
        # The same rows make a step, however they are shared out.
        factors = "per_device_train_batch_size x gradient_accumulation_steps x ranks"
        rows = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        decisive = decisive_length(args) | {factors: rows} | (decisive or {})
        base = model.get_base_model() if isinstance(model, PeftModel) else model
        assert isinstance(base, PreTrainedModel)
        super().__init__(
            model,
            args,
            record=run_record(kind, args, base, data, source, decisive),
            throughput=Throughput(tokens_before=None, flops_per_token=0, peak=None),
            prompts=[as_prompt(question, tokenizer) for question in args.sample_prompts],
            context=context_length(model.config),
            add_special_tokens=False,  # the template has put them there
            processing_class=tokenizer,
            **others,
        )
        # TRL makes the adapters of a quantized base bfloat16, and that loses their small updates: on the quickstart's
        # base, at 2e-4 with a cosine, a step left 20% of the A weights as they were in the first half of 120 steps,
        # 78% in the second and 99% in the last tenth; in float32 it was none, none and 0.5%. Autocast still makes the
        # products bfloat16.
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        self.is_quantized = any(isinstance(module, Linear4bit) for module in model.modules())
        self.tokens_since_log = 0

    # private: a trainer of TRL's tells the Hub that it was made, with model type, device and number of ranks. The
    # documented switch (HF_HUB_DISABLE_TELEMETRY) is read when huggingface_hub is imported, which may be long before.
    def _send_telemetry(self) -> None:
        """Nothing: a run speaks to the Hub only where it is told to."""

    def trained_tokens(self, batch: dict[str, torch.Tensor]) -> int:
        """Tokens of a batch that are learned from."""
        raise NotImplementedError

    def without_targets(self, row: dict) -> dict:
        """The columns of a row that differ where it is there to fill a batch, and counts for nothing."""
        raise NotImplementedError

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The micro-batches of a step; counts its tokens, and the trained ones among them, over all ranks."""
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        read = sum(_num_tokens(batch) for batch in batches)
        trained = sum(self.trained_tokens(batch) for batch in batches)
        read, trained = self.accelerator.reduce(torch.tensor([read, trained], device=device), reduction="sum").tolist()
        self.tokens_since_log += read
        # The field of the trainer's state that is saved with each checkpoint for such a count.
        self.state.num_input_tokens_seen += trained
        return batches, num_items

    def describe_micro_batch(self, step: int, rank: int, micro_batch: int) -> str:
        ids = self.micro_batches[micro_batch]["input_ids"]
        return "conversations that begin " + ", ".join(
            repr(decode(self.processing_class, row[:24])) for row in ids[:3]
        )

    def get_eval_dataloader(self, eval_dataset=None):
        """Filled up with rows that have no targets, so that ranks get equally many and no row counts twice."""
        dataset: Dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        missing = -len(dataset) % (self.args.per_device_eval_batch_size * self.args.world_size)
        if missing:
            row = dataset[0]
            filler = Dataset.from_list([row | self.without_targets(row)], features=dataset.features)
            dataset = concatenate_datasets([dataset] + [filler] * missing)
        # pyrefly: ignore[bad-argument-type]  Trainer takes these datasets too, and says so of its other arguments
        return super().get_eval_dataloader(dataset)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs |= {"trained_tokens": self.state.num_input_tokens_seen}
            logs |= self.throughput.measure(self.state.global_step, self.tokens_since_log)
            self.tokens_since_log = 0
        super().log(logs, start_time)

    def finish_model(self, folder: Path) -> None:
        """How to stop, and how the base was quantized."""
        self.model.generation_config.save_pretrained(folder)
        if not self.saving:
            (Path(self.args.output_dir) / QUANTIZATION_CONFIG).unlink(missing_ok=True)  # of an earlier run
        if self.is_quantized:
            self.model.config.quantization_config.to_json_file(folder / QUANTIZATION_CONFIG)


def held_out_questions(
    conversations: Sequence[Messages], tokenizer: PreTrainedTokenizerBase, max_length: int, count: int = 2
) -> list[str]:
    """The first questions of the first conversations, each once: prompts to watch a model learn with.

    Those that take more than half of `max_length` tokens, with the template around them, are passed over.
    """
    found: dict[str, None] = {}
    for messages in conversations:
        question = next(message["content"] for message in messages if message["role"] == "user")
        prompt = tokenizer(as_prompt(question, tokenizer), add_special_tokens=False, verbose=False)["input_ids"]
        if len(found) < count and len(prompt) <= max_length // 2:
            found[question] = None
    return list(found)


def fingerprint(rows: Dataset) -> str:
    """A hash of all token ids and labels: what must not change when a run is resumed."""
    digest = hashlib.sha256()
    for batch in rows.with_format("numpy").iter(batch_size=1000):
        assert isinstance(batch, dict)
        for column in rows.column_names:
            digest.update(np.concatenate(batch[column]).astype(np.int32).tobytes())
    return digest.hexdigest()[:16]


def _num_tokens(batch: dict[str, torch.Tensor]) -> int:
    """Tokens of a batch without padding."""
    return int(batch["attention_mask"].sum()) if "attention_mask" in batch else batch["input_ids"].numel()
