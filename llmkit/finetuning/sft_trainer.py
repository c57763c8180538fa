"""TRL's SFTTrainer on conversations that are tokens and labels already."""

from collections.abc import Sequence

import torch
from datasets import Dataset
from peft import LoraConfig
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTTrainer

from llmkit.finetuning.adapter_trainer import AdapterTrainer, fingerprint
from llmkit.finetuning.arguments import SFTArguments
from llmkit.model.loss import IGNORE_INDEX, is_plain_head, linear_cross_entropy
from llmkit.runs.run import FINE_TUNING


class ConversationTrainer(AdapterTrainer, SFTTrainer):
    """Trains an adapter on rows of `input_ids` and `labels`.

    SFTTrainer cuts and packs the rows, and computes the loss from the hidden states at the trained positions, in
    tiles.

    Args:
        model: the frozen base.
        args: the arguments.
        lora_config: the adapter that is put on it.
        train_rows, eval_rows: the encoded conversations.
        tokenizer: with chat template and padding token; saved with each checkpoint.
        description: of the data, for the log.
        source: the dataclasses that say where data and model came from, for the run's record.
    """

    args: SFTArguments

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
        super().__init__(
            model,
            args,
            FINE_TUNING,
            data={
                "description": description,
                "fingerprint": fingerprint(train_rows),
                "conversations": len(train_rows),
                "validation_conversations": len(eval_rows),
            },
            source=source,
            tokenizer=tokenizer,
            train_dataset=train_rows.filter(_has_targets, fn_kwargs={"max_length": args.max_length}),
            eval_dataset=eval_rows.filter(_has_targets, fn_kwargs={"max_length": args.max_length}),
            peft_config=lora_config,
        )
        self.has_plain_head = has_plain_head(model)

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
        # Evaluation fills its last batch with rows that have no targets.
        num_items = trained.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        # pyrefly: ignore[not-callable]  torch calls every attribute of a module a tensor or a module
        head = self.accelerator.unwrap_model(model).get_output_embeddings()
        loss = loss_of_trained(model, head, inputs, trained, labels[trained], num_items)
        if num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # DDP's mean over ranks becomes the sum that is divided
        return loss

    # Evaluation

    def without_targets(self, row: dict) -> dict:
        return {"labels": [IGNORE_INDEX] * len(row["labels"])}

    def trained_tokens(self, batch: dict[str, torch.Tensor]) -> int:
        return int((batch["labels"][:, 1:] != IGNORE_INDEX).sum())

    def sum_loss(self, model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        loss, _, _ = SFTTrainer.prediction_step(self, model, inputs, prediction_loss_only=True)
        assert isinstance(loss, torch.Tensor)
        targets = (inputs["labels"][:, 1:] != IGNORE_INDEX).sum().to(loss.device)
        return torch.stack([loss * targets, targets])


def loss_of_trained(
    model: nn.Module,
    head: nn.Linear,
    inputs: dict[str, torch.Tensor],
    trained: torch.Tensor | tuple[torch.Tensor, ...],
    targets: torch.Tensor,
    num_items: torch.Tensor | int,
) -> torch.Tensor:
    """Cross-entropy at the trained positions alone, summed and divided by `num_items`.

    Args:
        head: the model's.
        inputs: without labels, (B, T).
        trained: the index of the trained positions among the (B, T - 1) that have a next token.
        targets: their next tokens.
    """
    outputs = model(**inputs, use_cache=False, output_hidden_states=True, logits_to_keep=1)
    hidden = outputs.hidden_states[-1][:, :-1][trained]
    return linear_cross_entropy(hidden, head.weight, targets, num_items, head.bias)


@torch.no_grad()
def has_plain_head(model: PreTrainedModel) -> bool:
    """Whether logits are the head's product with the last hidden states, neither scaled nor capped (as Gemma 2's)."""
    ids = torch.arange(4, device=model.device).unsqueeze(0)
    mask = torch.ones_like(ids)
    outputs = model(ids, attention_mask=mask, use_cache=False, output_hidden_states=True)
    head = model.get_output_embeddings()
    hidden = outputs.hidden_states[-1]
    return is_plain_head(head, hidden) and torch.equal(head(hidden), outputs.logits)


def _has_targets(row: dict[str, list[int]], max_length: int) -> bool:
    """Whether something is left to train on where the row is cut. (TRL leaves out the others only without packing.)"""
    return any(label != IGNORE_INDEX for label in row["labels"][1:max_length])
