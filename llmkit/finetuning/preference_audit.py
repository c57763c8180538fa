"""What preference tuning would learn from its pairs, counted and shown before it starts."""

from dataclasses import dataclass

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from llmkit.errors import UserError
from llmkit.finetuning.audit import show_tokens
from llmkit.finetuning.preferences import Pairs, can_be_compared
from llmkit.model.loss import IGNORE_INDEX

# A longer answer is preferred by readers, and then by a model that learns nothing but that: from here on it is said.
MUCH_LONGER = 1.25  # mean length of preferred answers over that of rejected ones
MOSTLY_LONGER = 0.65  # of the pairs


@dataclass
class PairAudit:
    """Counts over the encoded pairs, each cut at `max_length` as training cuts them; lengths are in tokens."""

    source: str
    pairs: int
    prompts: int
    longest: int
    prompt_tokens: int
    chosen_tokens: int
    rejected_tokens: int
    chosen_longer: int  # pairs
    chosen_ends: int  # end tokens that are learned from
    rejected_ends: int
    chosen_cut: int
    rejected_cut: int
    nothing_to_compare: int
    malformed: dict[str, int]
    max_length: int
    end_token: str

    def table(self) -> str:
        rows = {
            "source": self.source,
            "pairs": f"{self.pairs:,} of {self.prompts:,} prompts, the longest of {self.longest:,} tokens",
            "prompts": f"{self.prompt_tokens / self.pairs:.1f} tokens in the mean, read and not trained",
            "preferred answers": f"{self.chosen_tokens / self.pairs:.1f} tokens in the mean, "
            f"{self.chosen_ends:,} of {self.pairs:,} with their end ({self.end_token})",
            "rejected answers": f"{self.rejected_tokens / self.pairs:.1f} tokens in the mean, "
            f"{self.rejected_ends:,} of {self.pairs:,} with their end",
            "preferred is longer": f"in {self.chosen_longer:,} pairs ({self.chosen_longer / self.pairs:.1%})",
            "cut": f"{self.chosen_cut:,} preferred and {self.rejected_cut:,} rejected answers at max_length "
            f"{self.max_length:,}",
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
        much = self.chosen_tokens > MUCH_LONGER * self.rejected_tokens
        if much or self.chosen_longer > MOSTLY_LONGER * self.pairs:
            found.append(
                "warning: the preferred answers are longer as a rule, and a model may learn just that: watch the "
                "length of answers, or take loss_type: sigmoid_norm, which counts per token"
            )
        if self.chosen_cut > 0.1 * self.pairs:
            found.append("warning: more than a tenth of the preferred answers lose their end: raise max_length")
        return found

    def check(self) -> None:
        """Refuse pairs that would teach nothing, or never to stop.

        Raises:
            UserError: no two answers differ within max_length, or no preferred answer has its end there.
        """
        if self.nothing_to_compare == self.pairs:
            raise UserError(
                f"{self.source}: nothing would be learned, for the two answers of no pair differ within max_length "
                f"{self.max_length}: raise it"
            )
        if self.chosen_ends == 0:
            raise UserError(
                f"{self.source}: no preferred answer has its end token {self.end_token} within max_length "
                f"{self.max_length}, so answers would not stop: raise it, or let the chat template end an answer with "
                "the tokenizer's eos_token"
            )


def audit_pairs(pairs: Pairs, rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int) -> PairAudit:
    """Count what is compared in rows of `prompt_ids`, `chosen_ids` and `rejected_ids`."""
    kept: dict[str, list] = {name: [] for name in ("prompt", "chosen", "rejected")}
    longest = nothing = 0
    cut = {"chosen": 0, "rejected": 0}
    for row in rows:
        assert isinstance(row, dict)
        prompt = row["prompt_ids"]
        room = max(0, max_length - len(prompt))
        kept["prompt"].append(prompt[:max_length])
        for answer in cut:
            ids = row[f"{answer}_ids"]
            longest = max(longest, len(prompt) + len(ids))
            cut[answer] += len(ids) > room
            kept[answer].append(ids[:room])
        nothing += not can_be_compared(row, max_length)
    end = tokenizer.eos_token_id
    return PairAudit(
        source=pairs.description,
        pairs=len(rows),
        prompts=len({str(pair["prompt"]) for pair in pairs.rows}),
        longest=longest,
        prompt_tokens=sum(map(len, kept["prompt"])),
        chosen_tokens=sum(map(len, kept["chosen"])),
        rejected_tokens=sum(map(len, kept["rejected"])),
        chosen_longer=sum(len(a) > len(b) for a, b in zip(kept["chosen"], kept["rejected"], strict=True)),
        chosen_ends=sum(ids[-1:] == [end] for ids in kept["chosen"]),
        rejected_ends=sum(ids[-1:] == [end] for ids in kept["rejected"]),
        chosen_cut=cut["chosen"],
        rejected_cut=cut["rejected"],
        nothing_to_compare=nothing,
        malformed=dict(pairs.malformed.most_common()),
        max_length=max_length,
        end_token=tokenizer.eos_token,
    )


def show_pair(row: dict[str, list[int]], tokenizer: PreTrainedTokenizerBase, color: bool) -> str:
    """One pair token by token, as `show_tokens` shows a conversation."""
    lines = []
    for name, answer in (("preferred", "chosen_ids"), ("rejected", "rejected_ids")):
        labels = [IGNORE_INDEX] * len(row["prompt_ids"]) + row[answer]
        encoded = {"input_ids": row["prompt_ids"] + row[answer], "labels": labels}
        lines.append(f"{name}:\n{show_tokens(encoded, tokenizer, color)}")
    return "\n\n".join(lines)
