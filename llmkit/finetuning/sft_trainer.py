"""TRL's SFTTrainer on conversations that are tokens and labels already: speed, logs, exact evaluation and resume."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from bitsandbytes.nn import Linear4bit
from datasets import Dataset, concatenate_datasets
from peft import LoraConfig
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTTrainer

from llmkit.finetuning.adapters import context_length
from llmkit.finetuning.arguments import SFTArguments
from llmkit.finetuning.turns import Messages
from llmkit.model.loss import IGNORE_INDEX, is_plain_head, linear_cross_entropy
from llmkit.runs.record import run_record
from llmkit.runs.run import FINE_TUNING, QUANTIZATION_CONFIG
from llmkit.training.base_trainer import ExactTrainer
from llmkit.training.callbacks import Throughput
from llmkit.training.run_arguments import check_length_is_fixed
from llmkit.training.schedules import decisive_length


class ConversationTrainer(ExactTrainer, SFTTrainer):
    """Trains an adapter on rows of `input_ids` and `labels`.

    SFTTrainer cuts and packs the rows, and computes the loss from the hidden states at the trained positions, in
    tiles. What is added here: adapters in float32, progress and logs as in pretraining, an evaluation that is weighted
    by tokens, a count of trained tokens that survives resuming, and the quantization saved with the adapter.

    Args:
        model: the frozen base.
        args: the arguments.
        lora_config: the adapter that is put on it.
        train_rows, eval_rows: the encoded conversations.
        tokenizer: with chat template and padding token; saved with each checkpoint.
        description: of the data, for the log.
        source: the dataclasses that say where data and model came from, for the run's record.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        args: SFTArguments,
        lora_config: LoraConfig,
        train_rows: Dataset,
        eval_rows: Dataset,
        tokenizer: PreTrainedTokenizerBase,
        description: str,
        source: Sequence = (),
    ):
        check_length_is_fixed(args)
        # Generation stops at the token that is trained to end an answer, whatever the base was told.
        model.generation_config.eos_token_id = model.config.eos_token_id = tokenizer.eos_token_id
        data = {
            "description": description,
            "fingerprint": _fingerprint(train_rows),
            "conversations": len(train_rows),
            "validation_conversations": len(eval_rows),
        }
        # The same rows make a step, however they are shared out.
        factors = "per_device_train_batch_size x gradient_accumulation_steps x ranks"
        rows = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        decisive = decisive_length(args) | {factors: rows}
        record = run_record(FINE_TUNING, args, model, data, source, decisive)
        super().__init__(
            model,
            args,
            record=record,
            throughput=Throughput(tokens_before=None, flops_per_token=0, peak=None),
            prompts=[_as_prompt(question, tokenizer) for question in args.sample_prompts],
            context=context_length(model.config),
            add_special_tokens=False,  # the template has put them there
            processing_class=tokenizer,
            train_dataset=train_rows.filter(_has_targets, fn_kwargs={"max_length": args.max_length}),
            eval_dataset=eval_rows.filter(_has_targets, fn_kwargs={"max_length": args.max_length}),
            peft_config=lora_config,
        )
        # SFTTrainer makes the adapters of a quantized base bfloat16, and that loses their small updates: on the
        # quickstart's base, at 2e-4 with a cosine, a step left 20% of the A weights as they were in the first half of
        # 120 steps, 78% in the second and 99% in the last tenth; in float32 it was none, none and 0.5%. Autocast
        # still makes the products bfloat16.
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        self.has_plain_head = has_plain_head(model)
        self.is_quantized = any(isinstance(module, Linear4bit) for module in model.modules())
        self.tokens_since_log = 0

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The micro-batches of a step; counts its tokens, and the trained ones among them, over all ranks."""
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        read = sum(_num_tokens(batch) for batch in batches)
        trained = sum(int((batch["labels"][:, 1:] != IGNORE_INDEX).sum()) for batch in batches)
        read, trained = self.accelerator.reduce(torch.tensor([read, trained], device=device), reduction="sum").tolist()
        self.tokens_since_log += read
        self.micro_batches = batches
        # The field of the trainer's state that is saved with each checkpoint for such a count.
        self.state.num_input_tokens_seen += trained
        return batches, num_items

    def describe_micro_batch(self, step: int, rank: int, micro_batch: int) -> str:
        ids = self.micro_batches[micro_batch]["input_ids"]
        return "conversations that begin " + ", ".join(repr(self.processing_class.decode(row[:24])) for row in ids[:3])

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """From the hidden states at the trained positions alone, in chunks whose gradient is made along with the loss.

        TRL's own makes each tile of logits twice, and on a CPU those of all positions, with products in float32.
        """
        if not self.has_plain_head:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        assert not return_outputs, "nobody asks for logits here"
        labels = inputs["labels"][:, 1:]
        trained = labels != IGNORE_INDEX
        inputs = {name: value for name, value in inputs.items() if name != "labels"}
        outputs = model(**inputs, use_cache=False, output_hidden_states=True, logits_to_keep=1)
        hidden = outputs.hidden_states[-1][:, :-1][trained]
        # Evaluation fills its last batch with rows that have no targets.
        num_items = trained.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        head = self.accelerator.unwrap_model(model).get_output_embeddings()
        loss = linear_cross_entropy(hidden, head.weight, labels[trained], num_items, head.bias)
        if num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # DDP's mean over ranks becomes the sum that is divided
        return loss

    # Evaluation

    def get_eval_dataloader(self, eval_dataset: Dataset | None = None):
        """Filled up with rows that have no labels, so that ranks get equally many and no row counts twice."""
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        missing = -len(dataset) % (self.args.per_device_eval_batch_size * self.args.world_size)
        if missing:
            filler = dataset.select([0]).map(lambda row: {"labels": [IGNORE_INDEX] * len(row["labels"])})
            dataset = concatenate_datasets([dataset] + [filler] * missing)
        return super().get_eval_dataloader(dataset)

    def sum_loss(self, model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        loss, _, _ = SFTTrainer.prediction_step(self, model, inputs, prediction_loss_only=True)
        targets = (inputs["labels"][:, 1:] != IGNORE_INDEX).sum().to(loss.device)
        return torch.stack([loss * targets, targets])

    # Logging and saving

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs |= {"trained_tokens": self.state.num_input_tokens_seen}
            logs |= self.throughput.measure(self.state.global_step, self.tokens_since_log)
            self.tokens_since_log = 0
        super().log(logs, start_time)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The adapter and the tokenizer, how to stop, and how the base was quantized."""
        super().save_model(output_dir, _internal_call)
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            self.model.generation_config.save_pretrained(folder)
            (folder / QUANTIZATION_CONFIG).unlink(missing_ok=True)  # of an earlier run into this folder
            if self.is_quantized:
                self.model.config.quantization_config.to_json_file(folder / QUANTIZATION_CONFIG)


@torch.no_grad()
def has_plain_head(model: PreTrainedModel) -> bool:
    """Whether logits are the head's product with the last hidden states, neither scaled nor capped (as Gemma 2's)."""
    ids = torch.arange(4, device=model.device).unsqueeze(0)
    outputs = model(ids, use_cache=False, output_hidden_states=True)
    head = model.get_output_embeddings()
    hidden = outputs.hidden_states[-1]
    return is_plain_head(head, hidden) and torch.equal(head(hidden), outputs.logits)


def _has_targets(row: dict[str, list[int]], max_length: int) -> bool:
    """Whether something is left to train on where the row is cut. (TRL leaves out the others only without packing.)"""
    return any(label != IGNORE_INDEX for label in row["labels"][1:max_length])


def held_out_questions(
    conversations: Sequence[Messages], tokenizer: PreTrainedTokenizerBase, max_length: int, count: int = 2
) -> list[str]:
    """The first questions of the first conversations, each once: prompts to watch a model learn with.

    Those that take more than half of `max_length` tokens, with the template around them, are passed over.
    """
    found: dict[str, None] = {}
    for messages in conversations:
        question = next(message["content"] for message in messages if message["role"] == "user")
        prompt = tokenizer(_as_prompt(question, tokenizer), add_special_tokens=False, verbose=False)["input_ids"]
        if len(found) < count and len(prompt) <= max_length // 2:
            found[question] = None
    return list(found)


def _as_prompt(question: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """The question as the model is asked it, up to where its answer begins."""
    messages = [{"role": "user", "content": question}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)


def _num_tokens(batch: dict[str, torch.Tensor]) -> int:
    """Tokens of a batch without padding."""
    return int(batch["attention_mask"].sum()) if "attention_mask" in batch else batch["input_ids"].numel()


def _fingerprint(rows: Dataset) -> str:
    """A hash of all tokens and labels: what must not change when a run is resumed."""
    digest = hashlib.sha256()
    for batch in rows.with_format("numpy").iter(batch_size=1000):
        for column in ("input_ids", "labels"):
            digest.update(np.concatenate(batch[column]).astype(np.int32).tobytes())
    return digest.hexdigest()[:16]
