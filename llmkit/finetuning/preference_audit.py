"""What preference tuning would learn from its pairs, counted and shown before it starts."""

from dataclasses import dataclass

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from llmkit.errors import UserError
from llmkit.finetuning.audit import TokenCounts, count_tokens, show_tokens
from llmkit.finetuning.preferences import Pairs, can_be_compared
from llmkit.model.loss import IGNORE_INDEX

# A longer answer is preferred by readers, and then by a model that learns nothing but that: from here on it is said.
MUCH_LONGER = 1.25  # mean length of preferred answers over that of rejected ones
MOSTLY_LONGER = 0.65  # of the pairs


@dataclass
class PairAudit:
    """What would be learned from the encoded pairs, each answer cut at `max_length` as training cuts it."""

    source: str
    prompts: int
    prompt_tokens: int
    chosen: TokenCounts
    rejected: TokenCounts
    chosen_longer: int  # pairs
    nothing_to_compare: int
    malformed: dict[str, int]
    max_length: int
    end_token: str

    def table(self) -> str:
        pairs, longest = self.chosen.examples, max(self.chosen.longest, self.rejected.longest)
        rows = {
            "source": self.source,
            "pairs": f"{pairs:,} of {self.prompts:,} prompts, the longest of {longest:,} tokens",
            "prompts": f"{self.prompt_tokens / pairs:.1f} tokens in the mean, read and not trained",
            "preferred answers": f"{self.chosen.trained_tokens / pairs:.1f} tokens in the mean, "
            f"{self.chosen.end_tokens:,} of {pairs:,} with their end ({self.end_token})",
            "rejected answers": f"{self.rejected.trained_tokens / pairs:.1f} tokens in the mean, "
            f"{self.rejected.end_tokens:,} of {pairs:,} with their end",
            "preferred is longer": f"in {self.chosen_longer:,} pairs ({self.chosen_longer / pairs:.1%})",
            "cut": f"{self.chosen.truncated:,} preferred and {self.rejected.truncated:,} rejected answers at "
            f"max_length {self.max_length:,}",
            "nothing to compare": f"{self.nothing_to_compare:,}, left out",
            "malformed": f"{sum(self.malformed.values()):,}, left out",
        }
        details = [f"{count:,} {why}" for why, count in self.malformed.items()] + self.warnings()
        width = max(map(len, rows))
        lines = [f"{name:>{width}}  {text}" for name, text in rows.items()]
        return "\n".join(lines + [f"{'':>{width}}    {detail}" for detail in details])

    def warnings(self) -> list[str]:
        """What may go wrong with these pairs, a line each."""
        found = []
        much = self.chosen.trained_tokens > MUCH_LONGER * self.rejected.trained_tokens
        if much or self.chosen_longer > MOSTLY_LONGER * self.chosen.examples:
            found.append(
                "warning: the preferred answers are longer as a rule, and a model may learn just that: watch the "
                "length of answers, or take loss_type: sigmoid_norm, which counts per token"
            )
        if self.chosen.truncated > 0.1 * self.chosen.examples:
            found.append("warning: more than a tenth of the preferred answers lose their end: raise max_length")
        return found

    def check(self) -> None:
        """Refuse pairs that would teach nothing, or never to stop.

        Raises:
            UserError: no two answers differ within max_length, or no preferred answer has its end there.
        """
        if self.nothing_to_compare == self.chosen.examples:
            raise UserError(
                f"{self.source}: nothing would be learned, for the two answers of no pair differ within max_length "
                f"{self.max_length}: raise it"
            )
        if self.chosen.end_tokens == 0:
            raise UserError(
                f"{self.source}: no preferred answer has its end token {self.end_token} within max_length "
                f"{self.max_length}, so answers would not stop: raise it, or let the chat template end an answer with "
                "the tokenizer's eos_token"
            )


def audit_pairs(pairs: Pairs, rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int) -> PairAudit:
    """Count what is compared in rows of `prompt_ids`, `chosen_ids` and `rejected_ids`."""
    prompts, lists = rows["prompt_ids"], rows.to_list()
    end = tokenizer.eos_token_id
    chosen, rejected = (
        count_tokens((_labels(row, answer) for row in lists), end, max_length) for answer in ("chosen", "rejected")
    )
    # Both answers have the same room, and where the rejected one fills it, the preferred one is not longer.
    longer = (
        min(len(row["chosen_ids"]), max_length - len(row["prompt_ids"])) > len(row["rejected_ids"]) for row in lists
    )
    return PairAudit(
        source=pairs.description,
        prompts=len({str(pair["prompt"]) for pair in pairs.rows}),
        prompt_tokens=sum(min(len(prompt), max_length) for prompt in prompts),
        chosen=chosen,
        rejected=rejected,
        chosen_longer=sum(longer),
        nothing_to_compare=sum(not can_be_compared(row, max_length) for row in lists),
        malformed=dict(pairs.malformed.most_common()),
        max_length=max_length,
        end_token=tokenizer.eos_token,
    )


def _labels(row: dict[str, list[int]], answer: str) -> list[int]:
    return [IGNORE_INDEX] * len(row["prompt_ids"]) + row[f"{answer}_ids"]


def show_pair(row: dict[str, list[int]], tokenizer: PreTrainedTokenizerBase, color: bool) -> str:
    """One pair token by token, as `show_tokens` shows a conversation."""
    lines = []
    for name, answer in (("preferred", "chosen"), ("rejected", "rejected")):
        encoded = {"input_ids": row["prompt_ids"] + row[f"{answer}_ids"], "labels": _labels(row, answer)}
        lines.append(f"{name}:\n{show_tokens(encoded, tokenizer, color)}")
    return "\n\n".join(lines)
