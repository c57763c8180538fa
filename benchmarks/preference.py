"""What preference tuning changes, on functions that neither the SFT run nor the preference runs have trained on.

    python benchmarks/preference.py runs/sft_qlora_quickstart --seeds 0 1 2
    python benchmarks/preference.py runs/sft_qlora_quickstart --seeds 0 -- --loss_type sigmoid --learning_rate 1e-4

The first line trains `recipes/dpo_qlora_quickstart.yaml` from the adapter, once with each seed, and measures the
adapter and all that was trained from it. Fields of the recipe come after `--`. A row has

- `prefers`: the share of the held-out pairs whose preferred answer has a higher log-probability than the rejected
  one; `per token` divides both by their number of tokens first; `other`, `cut` and `run on` are `per token` of the
  pairs whose rejected answer is another function's docstring, the docstring cut short, or the docstring followed by
  another one;
- `reward`: TRL's reward accuracy, the share of the pairs whose preferred answer has gained more log-probability on
  the adapter than the rejected one. The adapter itself has none;
- `ends` and `tokens`: the share of greedy answers to the held-out questions that end within 64 tokens, and their
  mean length;
- `SFT ppl`: the perplexity of the answers in the conversations that the SFT run holds out.
"""

import argparse
import math
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch
from transformers.utils.logging import disable_progress_bar

from llmkit.data.tokenizer import load_tokenizer
from llmkit.finetuning.conversations import ConversationArguments, SourceArguments, encode_all, load_conversations
from llmkit.finetuning.preferences import Pair, encode_pairs, load_pairs
from llmkit.inference.comparison import answer_all
from llmkit.inference.generation import load_for_generation
from llmkit.model.loss import IGNORE_INDEX
from measuring import machine, use_threads

RECIPES = Path(__file__).parents[1] / "recipes"
KINDS = ("other", "cut", "run on")
LONGEST_ANSWER = 64  # tokens
BATCH = 16


def train(sft: str, seed: int, output: Path, fields: list[str]) -> float:
    """Run the recipe, and return the minutes that the whole command took."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1"]
    command += ["--mixed_precision", "no", "--dynamo_backend", "no", str(RECIPES / "dpo_qlora.py")]
    command += ["--config", str(RECIPES / "dpo_qlora_quickstart.yaml"), "--adapter", sft, "--seed", str(seed)]
    started = time.perf_counter()
    done = subprocess.run([*command, "--output_dir", str(output), *fields], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{output.name} failed:\n{done.stdout}{done.stderr}")
    return (time.perf_counter() - started) / 60


@torch.no_grad()
def log_probs(model, rows: list[tuple[list[int], list[int]]]) -> torch.Tensor:
    """The log-probability of each row's labelled tokens, in nats, from full logits in float32: (rows,)."""
    found = []
    for start in range(0, len(rows), BATCH):
        batch = rows[start : start + BATCH]
        longest = max(len(ids) for ids, _ in batch)
        ids = torch.tensor([ids + [0] * (longest - len(ids)) for ids, _ in batch])
        labels = torch.tensor([labels + [IGNORE_INDEX] * (longest - len(labels)) for _, labels in batch])[:, 1:]
        mask = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids, _ in batch])
        logits = model(ids.to(model.device), attention_mask=mask.to(model.device)).logits[:, :-1].float().cpu()
        each = logits.log_softmax(-1).gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        found.append((each * (labels != IGNORE_INDEX)).sum(1))
    return torch.cat(found).double()


def _share(is_so: torch.Tensor) -> float:
    return is_so.double().mean().item()


def kind(pair: Pair) -> str:
    """What makes the rejected answer the worse one."""
    if pair["rejected"].startswith(pair["chosen"]):
        return "run on"
    return "cut" if pair["chosen"].startswith(pair["rejected"]) else "other"


class HeldOut:
    """The held-out pairs, questions and conversations, as tokens."""

    def __init__(self, sft: str):
        tokenizer = load_tokenizer(sft)
        _, pairs = load_pairs(SourceArguments())
        rows = encode_pairs(pairs, tokenizer)
        self.answers = [
            (row["prompt_ids"] + row[name], [IGNORE_INDEX] * len(row["prompt_ids"]) + row[name])
            for name in ("chosen_ids", "rejected_ids")
            for row in rows
        ]
        self.tokens = torch.tensor([len(row[name]) for name in ("chosen_ids", "rejected_ids") for row in rows])
        self.kinds = [kind(pair) for pair in pairs.rows]
        self.questions = list(dict.fromkeys(pair["prompt"][0]["content"] for pair in pairs.rows))
        _, conversations = load_conversations(ConversationArguments())
        self.conversations = [
            (row["input_ids"], row["labels"]) for row in encode_all(conversations, tokenizer).to_list()
        ]

    def measure(self, adapter: str, reference: torch.Tensor | None) -> tuple[dict[str, float], torch.Tensor]:
        """The figures of an adapter, and the log-probabilities of its answers.

        Args:
            reference: those of the adapter that it was trained from.
        """
        model, _ = load_for_generation(adapter)
        found = log_probs(model, self.answers)
        chosen, rejected = found.chunk(2)
        per_token = torch.greater(*(found / self.tokens).chunk(2))
        figures = {"prefers": _share(chosen > rejected), "per token": _share(per_token)}
        for name in KINDS:
            figures[name] = _share(per_token[torch.tensor([of == name for of in self.kinds])])
        if reference is not None:
            figures["reward"] = _share(torch.greater(*(found - reference).chunk(2)))
        answers = answer_all(adapter, self.questions, LONGEST_ANSWER).answers
        figures["ends"] = statistics.mean(answer.ended for answer in answers)
        figures["tokens"] = statistics.mean(answer.tokens for answer in answers)
        nats = -log_probs(model, self.conversations).sum().item()
        trained = sum(label != IGNORE_INDEX for _, labels in self.conversations for label in labels)
        figures["SFT ppl"] = math.exp(nats / trained)
        return figures, found


FORMATS = dict.fromkeys(("prefers", "per token", *KINDS, "reward", "ends"), ".1%")
FORMATS |= {"tokens": ".1f", "SFT ppl": ".2f", "minutes": ".1f"}


def print_table(rows: dict[str, dict[str, float]]) -> None:
    width = max(map(len, rows)) + 2
    print(" " * width + "".join(f"{name:>11}" for name in FORMATS))
    for name, figures in rows.items():
        cells = (f"{figures[key]:{form}}" if key in figures else "" for key, form in FORMATS.items())
        print(f"{name:>{width}}" + "".join(f"{cell:>11}" for cell in cells), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sft", help="the adapter of the SFT quickstart")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, help="CPU cores to use (default: all)")
    parser.add_argument("--output_dir", help="keep the runs here (default: they are deleted)")
    options, fields = parser.parse_known_args()
    fields = [field for field in fields if field != "--"]
    use_threads(options.threads)
    disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)  # peft still calls transformers by older names

    held_out = HeldOut(options.sft)
    print(
        f"{len(held_out.kinds)} pairs of {len(held_out.questions)} functions and {len(held_out.conversations)} "
        f"conversations, held out; {' '.join(fields) or 'the recipe as it is'}"
    )
    print(machine("trl", "peft", "bitsandbytes"), flush=True)
    figures, reference = held_out.measure(options.sft, None)
    rows, tuned = {"SFT": figures}, []
    with tempfile.TemporaryDirectory() as temporary:
        for seed in options.seeds:
            output = Path(options.output_dir or temporary) / f"seed_{seed}"
            minutes = train(options.sft, seed, output, fields)
            figures, _ = held_out.measure(str(output), reference)
            tuned.append(figures | {"minutes": minutes})
            rows[f"seed {seed}"] = tuned[-1]
    if len(tuned) > 1:
        rows["mean"] = {key: statistics.mean(each[key] for each in tuned) for key in tuned[0]}
        rows["spread (max - min)"] = {
            key: max(each[key] for each in tuned) - min(each[key] for each in tuned) for key in tuned[0]
        }
    print_table(rows)


if __name__ == "__main__":
    main()
