"""TRL's DPOTrainer on preference pairs that are token ids already, with an exact evaluation and an alarm."""

import math
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from datasets import Dataset
from peft import LoraConfig, PeftModel
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import DPOTrainer
from trl.trainer.utils import use_adapter

from llmkit.console import say
from llmkit.finetuning.adapter_trainer import AdapterTrainer, fingerprint
from llmkit.finetuning.answer_positions import AnswerPositions
from llmkit.finetuning.preference_arguments import DPOArguments
from llmkit.finetuning.preferences import can_be_compared
from llmkit.model.loss import IGNORE_INDEX
from llmkit.model.opening import context_length
from llmkit.runs.run import PREFERENCE_TUNING

REFERENCE = "ref"  # TRL's name for the frozen copy of the adapter that training starts from


class PreferenceTrainer(AdapterTrainer, DPOTrainer):
    """Trains an adapter on rows of `prompt_ids`, `chosen_ids` and `rejected_ids`.

    The reference is the model that training starts from. With an adapter on the base, DPOTrainer keeps a frozen copy
    of it on the same base; with a new adapter it is the base alone. Either way there is one base in memory. DPOTrainer
    takes log-probabilities from hidden states, a tile of logits at a time.

    Args:
        model: the base with the SFT adapter on it, or the frozen base.
        args: the arguments.
        lora_config: the new adapter; None where `model` has one.
        train_rows, eval_rows: the encoded pairs.
        tokenizer: with chat template and padding token; saved with each checkpoint.
        description: of the data, for the log.
        source: the dataclasses that say where data and model came from, for the run's record.
    """

    args: DPOArguments
    model: PeftModel
    eval_dataset: Dataset

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        args: DPOArguments,
        lora_config: LoraConfig | None,
        train_rows: Dataset,
        eval_rows: Dataset,
        tokenizer: PreTrainedTokenizerBase,
        description: str,
        source: Sequence = (),
    ):
        context = context_length(model.config)
        prompts = {tuple(ids): ids for ids in eval_rows["prompt_ids"] if len(ids) + args.sample_tokens <= context}
        self.length_prompts = list(prompts.values())[: args.length_prompts]
        super().__init__(
            model,
            args,
            PREFERENCE_TUNING,
            data={
                "description": description,
                "fingerprint": fingerprint(train_rows),
                "pairs": len(train_rows),
                "validation_pairs": len(eval_rows),
            },
            source=source,
            tokenizer=tokenizer,
            train_dataset=train_rows.filter(can_be_compared, fn_kwargs={"max_length": args.max_length}),
            eval_dataset=eval_rows.filter(can_be_compared, fn_kwargs={"max_length": args.max_length}),
            peft_config=lora_config,
        )
        base = self.model.get_base_model()
        assert isinstance(base, PreTrainedModel)
        if args.device.type != "cuda":
            AnswerPositions(base)
        self.has_reference = REFERENCE in self.model.peft_config
        if self.has_reference:
            # As it was saved: DPOTrainer rounds the trained copy of an adapter to bfloat16, and it would start as
            # something else than the reference.
            for name, parameter in self.model.named_parameters():
                if parameter.requires_grad:
                    copy = self.model.get_parameter(name.replace(".default.", f".{REFERENCE}."))
                    parameter.data = copy.data.clone()

    # private: TRL would render and tokenize texts itself, and supervise what follows the end token in some templates.
    # pyrefly: ignore[bad-override]  nothing of what TRL passes on is needed
    def _prepare_dataset(self, dataset: Dataset, *args) -> Dataset:
        return dataset

    def trained_tokens(self, batch: dict[str, torch.Tensor]) -> int:
        return int(batch["completion_mask"].sum())

    # Evaluation

    def without_targets(self, row: dict) -> dict:
        return {"chosen_ids": [], "rejected_ids": []}

    def sum_loss(self, model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Sums over the pairs of a batch, in the order in which `metrics_of` takes them.

        The loss is DPO's own (sigmoid) whatever loss is trained, so that runs with different losses compare.
        """
        with self.compute_loss_context_manager():
            log_probs = answer_log_probs(model, inputs)
            unwrapped = self.accelerator.unwrap_model(self.model)
            assert isinstance(unwrapped, PeftModel)
            with use_adapter(unwrapped, REFERENCE if self.has_reference else None):
                reference = answer_log_probs(self.model, inputs)
        change = (log_probs - reference).chunk(2)  # of the chosen answers, and of the rejected ones
        (chosen, rejected), tokens = log_probs.chunk(2), inputs["completion_mask"].sum(1).chunk(2)
        margin = self.beta * (change[0] - change[1])
        is_pair = tokens[0] > 0  # the others fill a batch
        per_token = chosen / tokens[0].clamp(min=1) > rejected / tokens[1].clamp(min=1)
        sums = (is_pair, -F.logsigmoid(margin), margin > 0, chosen > rejected, per_token)
        sums += (chosen, rejected, *change, *tokens)
        return torch.stack([(part * is_pair).sum().float() for part in sums])

    def metrics_of(self, totals: list[float], dataset: Dataset) -> dict[str, float]:
        pairs, loss, rewarded, preferred, per_token, chosen, rejected, chosen_change, rejected_change, *tokens = totals
        return {
            "loss": loss / pairs,
            "perplexity": math.exp(-chosen / tokens[0]),  # of the preferred answers
            "preference_accuracy": preferred / pairs,
            "preference_accuracy_per_token": per_token / pairs,
            "rewards/accuracies": rewarded / pairs,
            "rewards/margins": self.beta * (chosen_change - rejected_change) / pairs,
            "rewards/chosen": self.beta * chosen_change / pairs,
            "rewards/rejected": self.beta * rejected_change / pairs,
            "logps/chosen": chosen / pairs,
            "logps/rejected": rejected / pairs,
            "chosen_change": chosen_change / tokens[0],
            "rejected_change": rejected_change / tokens[1],
        }

    def evaluation_loop(self, *args, metric_key_prefix="eval", **kwargs):
        """With a warning where the preferred answers have become less likely."""
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        if self.is_world_process_zero():
            assert output.metrics is not None
            if warning := chosen_warning(output.metrics[f"{metric_key_prefix}_chosen_change"], self.args):
                say(warning)
        return output

    @torch.no_grad()
    def answer_metrics(self) -> dict[str, float]:
        """Mean tokens of the greedy answers to some held-out prompts, and the part of them that end by themselves."""
        if not self.length_prompts:
            return {}
        batch = self.processing_class.pad(
            {"input_ids": self.length_prompts}, padding_side="left", return_tensors="pt"
        ).to(self.model.device)
        tokens = self.model.generate(**batch, do_sample=False, max_new_tokens=self.args.sample_tokens)
        is_end = tokens[:, batch["input_ids"].shape[1] :] == self.processing_class.eos_token_id
        ended = is_end.any(dim=1)
        lengths = is_end.int().argmax(dim=1).where(ended, self.args.sample_tokens)
        return {"answer_tokens": lengths.float().mean().item(), "answers_ended": ended.float().mean().item()}

    def finish_model(self, folder: Path) -> None:
        """As in SFT; the reference is not saved, for it is the adapter that the run's record names."""
        super().finish_model(folder)
        shutil.rmtree(folder / REFERENCE, ignore_errors=True)


def answer_log_probs(model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The log-probability of each answer, in nats; first the chosen ones of the batch, then the rejected ones.

    Args:
        model: with the head that DPOTrainer gives it, which makes no logits.
        inputs: of DPOTrainer's collator, (2 x pairs, T).

    Returns:
        (2 x pairs,)
    """
    labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, IGNORE_INDEX)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    outputs = model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False, fused_lm_head=True)
    return outputs.log_probs.float().sum(dim=1)


def chosen_warning(change: float, args: DPOArguments) -> str | None:
    """What to do where the preferred answers are less likely than under the reference, else None.

    Args:
        change: of their log-probability, in nats per token.
    """
    if change >= -args.max_chosen_drop:
        return None
    has_sft = "sft" in args.loss_type
    sft_term = "Give sft more weight in loss_weights" if has_sft else "Add an SFT term (loss_type: [sigmoid, sft])"
    return (
        f"warning: the preferred answers have become less likely than under the reference, by {-change:.3f} nats per "
        f"token (max_chosen_drop {args.max_chosen_drop}). The rejected ones fall faster, so the accuracy can rise all "
        f"the same, but what the model writes instead is neither. {sft_term}, lower learning_rate "
        f"({args.learning_rate}) or raise beta ({args.beta})"
    )
