"""HellaSwag (Zellers et al. 2019): which of four endings does a model find most likely?

Scored as build-nanogpt scores it, by completion: the loss of an ending's tokens after the context's, tokenized each
for itself, the ending with a space before it. `acc` takes the ending of the lowest summed loss, `acc_norm` that of
the lowest loss per token. (lm-evaluation-harness puts the activity's name before the context, takes WikiHow's markup
out of the text, and its `acc_norm` is per character. By build-nanogpt's account GPT-2 124M has an `acc_norm` of 0.2955
this way and of 0.3114 that way.)
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmkit.data.tokenizer import document_encoder
from llmkit.errors import UserError
from llmkit.hub_access import ask_hub_once

DATASET, SPLIT = "Rowan/hellaswag", "validation"  # 10,042 questions
IGNORED_ID = 0  # fills up shorter rows; what stands behind a causal model's tokens does not change them


@dataclass(frozen=True)
class Question:
    """One question in tokens.

    Attributes:
        number: `ind` of the dataset.
        rows: for each ending, the context's tokens followed by the ending's.
        lengths: tokens of each ending.
        label: the number of the right ending.
        cut: tokens that the longest row had too many, cut from the context's beginning.
    """

    number: int
    rows: list[list[int]]
    lengths: list[int]
    label: int
    cut: int


def load_hellaswag(source: str | None) -> list[dict]:
    """The questions as `ind`, `ctx`, `endings` and `label`.

    Args:
        source: a JSONL file in the dataset's own format; None reads the validation split from the Hub.

    Raises:
        UserError: no such file or dataset, or a line that is not a question with its answer.
    """
    if source is not None:
        path = Path(source).expanduser()
        if not path.is_file():
            raise UserError(f"hellaswag={source}: no such file: give a JSONL file such as hellaswag_val.jsonl, or hub")
        try:
            # Not `splitlines`, which also cuts at U+2028 and others that JSON has in texts.
            lines = [line for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
        except UnicodeDecodeError as error:
            raise UserError(f"hellaswag={source}: not a text file: give a JSONL file, or hub") from error
        rows = [_question(line, f"{source}, line {number}") for number, line in enumerate(lines, start=1)]
    else:
        from datasets import load_dataset

        ask_hub_once()
        try:
            rows = [_question(row, DATASET) for row in load_dataset(DATASET, split=SPLIT)]
        except (OSError, ValueError) as error:
            raise UserError(f"{DATASET} was not read from the Hub ({error}): give its JSONL file instead") from error
    if not rows:
        raise UserError(f"hellaswag={source}: no questions: give a JSONL file such as hellaswag_val.jsonl, or hub")
    if len({len(row["endings"]) for row in rows}) > 1:
        raise UserError(f"hellaswag={source}: questions with different numbers of endings: give all the same number")
    return rows


def _question(row, place: str) -> dict:
    """One question: a line of the file, or a row from the Hub, where labels are strings."""
    try:
        row = json.loads(row) if isinstance(row, str) else row
        context = row["ctx"] if "ctx" in row else f"{row['ctx_a']} {row['ctx_b']}".strip()
        endings, label = list(row["endings"]), row["label"]
        texts = [context, *endings]
        number = int(row.get("ind", -1))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{place}: not a question of HellaSwag ({error!r}): it has ctx, endings and label") from error
    if label in ("", None):
        raise UserError(f"{place}: no label: the test split has none, take the validation split")
    if not all(isinstance(text, str) and text for text in texts) or len(endings) < 2:
        raise UserError(f"{place}: ctx has to be a text, endings two or more of them, none empty")
    if str(label) not in map(str, range(len(endings))):
        raise UserError(f"{place}: the label is {label!r}: it has to be the number of an ending, from 0")
    return {"ind": number, "ctx": context, "endings": endings, "label": int(label)}


def encode_hellaswag(rows: Sequence[dict], tokenizer: PreTrainedTokenizerBase, context: int) -> list[Question]:
    """Questions in tokens, without special ones; contexts that are too long lose their beginning.

    Args:
        rows: what `load_hellaswag` gives.
        context: tokens that the model can read.

    Raises:
        UserError: an ending that does not fit behind a single token.
    """
    encoder = document_encoder(tokenizer)
    contexts = [encoding.ids for encoding in encoder.encode_batch_fast([row["ctx"] for row in rows])]
    texts = [f" {ending}" for row in rows for ending in row["endings"]]
    endings = iter([encoding.ids for encoding in encoder.encode_batch_fast(texts)])
    questions = []
    for row, before in zip(rows, contexts, strict=True):
        after = [next(endings) for _ in row["endings"]]
        longest = max(map(len, after))
        if longest > context:
            raise UserError(
                f"HellaSwag question {row['ind']}: an ending has {longest} tokens, and the model reads {context}: "
                "its context is too short for this dataset"
            )
        questions.append(
            Question(
                number=row["ind"],
                # One more token than the model reads: the last one is only predicted.
                rows=[(before + ending)[-context - 1 :] for ending in after],
                lengths=list(map(len, after)),
                label=row["label"],
                cut=max(0, len(before) + longest - context - 1),
            )
        )
    return questions


def score_hellaswag(
    model: PreTrainedModel,
    questions: Sequence[Question],
    batch_size: int,
    accelerator: Accelerator | None = None,
    before_batch: Callable[[], None] | None = None,
) -> dict[str, float]:
    """Accuracies and their standard errors; see `ending_losses` for the arguments and `accuracies` for the result."""
    return accuracies(questions, ending_losses(model, questions, batch_size, accelerator, before_batch=before_batch))


@torch.no_grad()
def ending_losses(
    model: PreTrainedModel,
    questions: Sequence[Question],
    batch_size: int,
    accelerator: Accelerator | None = None,
    progress: bool = False,
    before_batch: Callable[[], None] | None = None,
) -> torch.Tensor:
    """The summed loss of each ending's tokens, in nats: (questions, endings), float64, on the CPU of every rank.

    A batch has questions of about one length. Ranks share out whole batches, so the numbers do not depend on how many
    ranks there are. Memory is that of one batch's logits, from its shortest context on.

    Args:
        model: any causal language model; it is put into evaluation mode meanwhile.
        batch_size: questions in a batch, each with all its endings.
        accelerator: with several ranks, each has to call this.
        progress: show a progress bar where there is a terminal.
        before_batch: called on every rank before each batch; what it raises ends the scoring.
    """
    ranks, rank = (accelerator.num_processes, accelerator.process_index) if accelerator else (1, 0)
    # Longest first: what does not fit into memory shows at once.
    order = sorted(range(len(questions)), key=lambda i: -max(map(len, questions[i].rows)))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    losses = torch.zeros(len(questions), len(questions[0].rows), device=model.device)
    training = model.training
    model.eval()
    hidden = None if progress and rank == 0 else True  # None: where stderr is not a terminal
    try:
        for start in tqdm(range(0, len(batches), ranks), desc="HellaSwag", leave=False, disable=hidden):
            if before_batch is not None:
                before_batch()
            mine = start + rank
            # Every rank calls the model equally often: where each holds a part of it (FSDP), they have to.
            batch = batches[min(mine, len(batches) - 1)]
            result = _batch_losses(model, [questions[i] for i in batch])
            if mine < len(batches):
                losses[batch] = result
    finally:
        model.train(training)
    if accelerator is not None:
        losses = accelerator.reduce(losses, reduction="sum")  # of one rank's losses and the others' zeros
    return losses.double().cpu()


def _batch_losses(model: PreTrainedModel, questions: Sequence[Question]) -> torch.Tensor:
    """(questions, endings), float32."""
    rows = [torch.tensor(row) for question in questions for row in question.rows]
    lengths = [length for question in questions for length in question.lengths]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=IGNORED_ID).to(model.device)
    first = min(len(row) - length for row, length in zip(rows, lengths, strict=True))  # of all endings' tokens
    kept = ids.shape[1] - first
    # Sliced as well, for models that do not know `logits_to_keep`.
    logits = model(input_ids=ids[:, :-1], logits_to_keep=kept, use_cache=False).logits[:, -kept:]
    losses = []
    for row, length, row_logits, row_ids in zip(rows, lengths, logits, ids[:, first:], strict=True):
        stop = len(row) - first
        ending = slice(stop - length, stop)
        losses.append(F.cross_entropy(row_logits[ending].float(), row_ids[ending], reduction="sum"))
    return torch.stack(losses).view(len(questions), -1)


def choices(questions: Sequence[Question], losses: torch.Tensor) -> tuple[list[int], list[int]]:
    """The endings of the lowest loss, and of the lowest loss per token; of equal ones the first."""
    lengths = torch.tensor([question.lengths for question in questions])
    return losses.argmin(dim=1).tolist(), (losses / lengths).argmin(dim=1).tolist()


def accuracies(questions: Sequence[Question], losses: torch.Tensor) -> dict[str, float]:
    """`hellaswag/acc`, `hellaswag/acc_norm`, each with `_stderr`, and `hellaswag/questions`, their number.

    One question has no `_stderr`.
    """
    metrics = {}
    count = len(questions)
    for name, chosen in zip(("acc", "acc_norm"), choices(questions, losses), strict=True):
        correct = sum(choice == question.label for choice, question in zip(chosen, questions, strict=True))
        share = correct / count
        metrics[f"hellaswag/{name}"] = share
        if count > 1:  # of the mean of independent questions, with the sample's own variance
            metrics[f"hellaswag/{name}_stderr"] = math.sqrt(share * (1 - share) / (count - 1))
    return metrics | {"hellaswag/questions": float(count)}


def results(questions: Sequence[Question], losses: torch.Tensor) -> list[dict]:
    """For each question what was chosen, and the loss of each ending in nats, summed and per token."""
    rows = zip(questions, losses.tolist(), *choices(questions, losses), strict=True)
    return [
        {
            "ind": question.number,
            "label": question.label,
            "prediction": lowest,
            "prediction_norm": lowest_mean,
            "losses": row,
            "losses_per_token": [loss / length for loss, length in zip(row, question.lengths, strict=True)],
            "cut": question.cut,
        }
        for question, row, lowest, lowest_mean in rows
    ]
