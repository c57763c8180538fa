"""Two models' answers to the same prompts, side by side: as text and as a page."""

import html
import textwrap
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean

from llmkit.data.tokenizer import as_prompt
from llmkit.inference.generation import continue_prompts, load_for_generation
from llmkit.inference.sampling import Sampling
from llmkit.machine import set_up_generation
from llmkit.runs.report import static_page
from llmkit.runs.report.summary import moment

BATCH = 16  # prompts that are answered at a time


@dataclass(frozen=True)
class Answer:
    """What a model writes after a prompt.

    Attributes:
        tokens: without the end token.
        ended: whether the model ended it, rather than the limit of tokens.
    """

    text: str
    tokens: int
    ended: bool


@dataclass(frozen=True)
class Answers:
    """A model's name and its answers, in the order of the prompts."""

    model: str
    answers: list[Answer]

    def summary(self) -> str:
        ended = sum(answer.ended for answer in self.answers)
        length = mean(answer.tokens for answer in self.answers)
        return f"{ended} of {len(self.answers)} answers end by themselves; {length:.1f} tokens in the mean"


def answer_all(checkpoint: str, prompts: Sequence[str], max_new_tokens: int, base: str | None = None) -> Answers:
    """A checkpoint's likeliest answers. Its chat template asks each prompt as a question, where it has one; else the
    prompt is a text to continue.

    Raises:
        UserError: it does not load, or a prompt fills its context.
    """
    model, tokenizer = load_for_generation(checkpoint, base=base)
    set_up_generation(model)
    is_chat = tokenizer.chat_template is not None
    texts = [as_prompt(prompt, tokenizer) if is_chat else prompt for prompt in prompts]
    sampling = Sampling(temperature=0, max_new_tokens=max_new_tokens)
    found = []
    for start in range(0, len(texts), BATCH):
        batch = texts[start : start + BATCH]
        found += continue_prompts(model, tokenizer, batch, sampling, add_special_tokens=not is_chat)
    answers = [Answer(each.text.strip(), each.tokens, each.tokens < max_new_tokens) for each in found]
    return Answers(checkpoint, answers)


def as_text(prompts: Sequence[str], models: Sequence[Answers], width: int) -> str:
    """The answers in a column a model.

    Args:
        width: of all columns together, in characters.
    """
    column = max(16, (width - 3) // len(models))
    lines = [_row([each.model for each in models], column), "-+-".join(["-" * column] * len(models))]
    for index, prompt in enumerate(prompts):
        lines += ["", *textwrap.wrap(f"> {prompt}", width), ""]
        lines.append(_row([_marked(each.answers[index]) for each in models], column))
    return "\n".join([*lines, "", *_summary(models)])


def as_page(prompts: Sequence[str], models: Sequence[Answers]) -> str:
    """The answers on a page of HTML that loads nothing."""
    head = "".join(
        f"<div><b>{html.escape(each.model)}</b><p class='note'>{each.summary()}</p></div>" for each in models
    )
    cards = []
    for index, prompt in enumerate(prompts):
        texts = "".join(_cell(each.model, each.answers[index]) for each in models)
        cards.append(f"<section class='card'><h3>{html.escape(prompt)}</h3><div class='texts'>{texts}</div></section>")
    title = " and ".join(each.model for each in models)
    body = (
        f"<h1>{len(prompts)} prompts</h1>\n<div class='card across list'><div class='texts'>{head}</div>"
        f"<p class='note'>{_equal(models)}</p></div>\n<div class='samples'>{''.join(cards)}</div>\n"
        f"<footer>Made by llmkit, {moment(time.time())}.</footer>"
    )
    return static_page(title, body)


def _row(texts: Sequence[str], column: int) -> str:
    """Texts beside each other, each wrapped to its column."""
    wrapped = [[part for line in text.splitlines() for part in textwrap.wrap(line, column) or [""]] for text in texts]
    height = max(map(len, wrapped))
    padded = [lines + [""] * (height - len(lines)) for lines in wrapped]
    return "\n".join(" | ".join(f"{line:{column}}" for line in row).rstrip() for row in zip(*padded, strict=True))


def _marked(answer: Answer) -> str:
    return answer.text if answer.ended else f"{answer.text} [cut]"


def _cell(model: str, answer: Answer) -> str:
    length = f"{answer.tokens} tokens" + ("" if answer.ended else ", cut")
    return f"<div><p class='note'>{html.escape(model)}: {length}</p><pre>{html.escape(answer.text)}</pre></div>"


def _summary(models: Sequence[Answers]) -> list[str]:
    return [*(f"{each.model}: {each.summary()}" for each in models), _equal(models)]


def _equal(models: Sequence[Answers]) -> str:
    rows = zip(*([answer.text for answer in each.answers] for each in models), strict=True)
    same = sum(len(set(row)) == 1 for row in rows)
    return f"{same} of {len(models[0].answers)} answers are the same"
