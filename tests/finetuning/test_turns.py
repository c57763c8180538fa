"""Guanaco's turns: texts made from turns that are known, as hostile as people write them, against the splitter."""

import random

import pytest

from llmkit.finetuning.turns import Ambiguous, check_turns, split_guanaco

EXCHANGE = "### Human: hi\n### Assistant: ho"


def joined(turns: list[str]) -> str:
    return "".join(f"### {('Human', 'Assistant')[i % 2]}: {turn}" for i, turn in enumerate(turns))


def contents(text: str) -> list[str]:
    return [message["content"] for message in split_guanaco(text)]


# ------------------------------------------------------------------ made conversations

# Quotations of one marker and of a whole exchange; lines end and begin where the form needs it.
QUOTING = [
    "```\n{many}\n```",
    "```text\n{many}\n```\nDone.",
    "Run:```sh\necho {one}\n```",
    "~~~\n{many}\n~~~",
    "~~~ text\n{many}\n~~~~\nDone.",
    "````md\n```py\n{many}\n```\n````",
    "`````\n````\n{many}\n````\n`````",
    "1. This:\n  ```\n  {one}\n  ```",
    "Split at `{one}` here.",
    "Split at ``{one}`s`` here.",
    "Split at ```{one}``` here.",
    'It says "{one}", I think.',
    'print("{one}")',
    "print('{one}')",
    "It says “{one}”.",
    "Es heißt „{one}“.",
    "Il dit «{one}» ici.",
    "「{one}」と言う。",
    "> {one}\nas you wrote",
    "You wrote:\n> {one} and more\nWhy?",
    "Like this:\n\n    {one}\n    more\n\nDone.",
    "Like this:\n\n\t{one}\n\t{one}\n\nDone.",
    "#### Human: rights\nare a heading.",
    "A heading:\n##### Assistant: manager\nas a job.",
]
# Marks that are nobody's pair, and code that ends where a turn ends.
ODD = [
    "We copy ```a``` from ```b```.",
    "```py\nx = 1```",
    "```py\nx = 1\n```",
    "Use ```x = 1\ny = 2```",
    "Run:```sh\nls```",
    "```a``` and\n```\ncode\n```",
    "I like C#",
    "F##",
    'my 27" screen',
    "'tis the dogs' bone, isn't it",
    "rock 'n' roll",
    "he said “so",
    "5 > 3",
    "> a quotation that ends here",
    "def f():\n\n    return 1",
    "a `tick",
    "Bonjour « à",
    '"Yes," she said, "no."',
    "use # for headings",
    "blank or a single '#'.",
    "replace ' ' with '+', or '/'",
    "f(x, sep='', end=' ')",
    "~~struck~~ and ~ here",
]
PLAIN = ["Yes.", "Why?", "日本語で、お願い🙏", "a\n\nb\n- c", "Thanks!", "### Notes\nDone."]


@pytest.mark.parametrize("form", QUOTING)
@pytest.mark.parametrize("after", ["Thanks!", "```py\nx\n```", '"Yes"', "I like `a` and C#"])
def test_a_quoted_marker_starts_no_turn(form, after):
    for role in ("Human", "Assistant"):
        quotation = form.format(one=f"### {role}: x", many=EXCHANGE)
        for turns in ([quotation, "Sure.", after, "Yes."], ["Show me.", quotation, after, "Yes.", after, quotation]):
            assert contents(joined(turns)) == turns


def test_conversations_of_all_kinds_of_turns():
    """The turns that went in come out; a row is never read in another way, though it may be left out."""
    draw = random.Random(0)
    quoting = [form.format(one=f"### {role}: x", many=EXCHANGE) for form in QUOTING for role in ("Human", "Assistant")]
    left_out = 0
    for _ in range(3000):
        turns = [draw.choice(draw.choice([quoting, ODD, PLAIN])) for _ in range(2 * draw.randint(1, 4))]
        try:
            assert contents(joined(turns)) == turns, joined(turns)
        except Ambiguous:
            left_out += 1
    assert left_out < 30, "where the turns are whole, few rows are ambiguous"


def test_plain_and_odd_turns_are_all_read():
    draw = random.Random(1)
    for _ in range(3000):
        turns = [draw.choice(draw.choice([ODD, PLAIN])) for _ in range(2 * draw.randint(1, 4))]
        assert contents(joined(turns)) == turns, joined(turns)


def test_a_byte_order_mark_is_no_text():
    assert contents("\ufeff### Human: a### Assistant: b") == ["a", "b"]


# ------------------------------------------------------------------ what text cannot decide


@pytest.mark.parametrize(
    "turns",
    [
        ["Code?", "```py\nx", "And?", "```py\ny\n```"],  # the first fence was left open, or quotes what follows
        ["Code?", "```\nx", "And?", "```\ny\n```", "Why?", "```\nz"],
        ["Code?", "```\nx", "And?", "so\n```\ny\n```"],
        ["the '90s", "Yes.", "the dogs' bone", "Whose?"],
    ],
)
def test_what_has_two_readings_is_ambiguous(turns):
    with pytest.raises(Ambiguous) as error:
        split_guanaco(joined(turns))
    assert error.value.text == joined(turns)


def test_turns_that_must_alternate_decide_between_two_readings():
    """The marks are a pair in the first text, and not in the second: the other reading has two questions in a row."""
    assert contents("### Human: Is 'so ### Human: x' right?### Assistant: No.") == [
        "Is 'so ### Human: x' right?",
        "No.",
    ]
    assert contents(joined(["the '90s", "my parents' car"])) == ["the '90s", "my parents' car"]


def test_messages_of_other_types_are_malformed():
    for messages in (None, "[]", 3, {}, ["hi"], [None], [{"role": "user", "content": 1}], [{"role": "user"}]):
        with pytest.raises(ValueError, match="not a list|without a role"):
            check_turns(messages)
