"""Turns and masks: what is trained is the answers and their end tokens, token by token, and nothing else."""

import gzip
import json
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from llmkit.data.tokenizer import bpe_from_files, train_bpe_tokenizer
from llmkit.errors import UserError
from llmkit.finetuning.adapter_trainer import held_out_questions
from llmkit.finetuning.audit import audit, show_tokens
from llmkit.finetuning.conversations import (
    ConversationArguments,
    Conversations,
    add_chat_template,
    encode,
    encode_all,
    hold_out,
    load_conversations,
    read_rows,
    row_parser,
)
from llmkit.finetuning.turns import Malformed, check_turns, split_guanaco

GPT2_FILES = Path(__file__).parents[3] / "shared" / "data" / "gpt2_tokenizer"

CODE = (
    "Like this:\n\n```python\n# ### Assistant: not a turn\n### Human: nor this\nprint('hi')\n```\n\n### Notes\nDone."
)
TEXTS = {
    "one turn": "### Human: What is 2 + 2?### Assistant: 4",
    "many turns": "### Human: Hi### Assistant: Hello!\n### Human: How are you?### Assistant: Fine. ### Human: Good.",
    "code": f"### Human: Show me markdown### Assistant: {CODE}### Human: Thanks!### Assistant: You're welcome.",
    "fence against a marker": "### Human: Code?### Assistant: ```py\nx = 1\n```### Human: More### Assistant: No.",
    "quotation": '### Human: What does "### Assistant: hi" mean in "### Human: x"?### Assistant: It starts a turn.',
    "quoted word at the end": '### Human: Translate "hello"### Assistant: "Bonjour"### Human: "No"?### Assistant: Non',
    "inline code": "### Human: Explain `### Human:` please### Assistant: It's a marker: `### Assistant: x`.",
    "quoted line": "### Human: I read:\n> ### Human: hi ### Assistant: ho\nWhy?### Assistant: A prompt.",
    "other scripts": "### Human: 日本語で、お願い🙏### Assistant: はい。🎉### Human: Спасибо!### Assistant: مرحبا 👋",
    "headers": "### Human: ### Title\ntext\n#### Human: x### Assistant: ## A\n### B\n#### Assistant: y",
}
TURNS = {
    "one turn": ["What is 2 + 2?", "4"],
    "many turns": ["Hi", "Hello!", "How are you?", "Fine."],
    "code": ["Show me markdown", CODE, "Thanks!", "You're welcome."],
    "fence against a marker": ["Code?", "```py\nx = 1\n```", "More", "No."],
    "quotation": ['What does "### Assistant: hi" mean in "### Human: x"?', "It starts a turn."],
    "quoted word at the end": ['Translate "hello"', '"Bonjour"', '"No"?', "Non"],
    "inline code": ["Explain `### Human:` please", "It's a marker: `### Assistant: x`."],
    "quoted line": ["I read:\n> ### Human: hi ### Assistant: ho\nWhy?", "A prompt."],
    "other scripts": ["日本語で、お願い🙏", "はい。🎉", "Спасибо!", "مرحبا 👋"],
    "headers": ["### Title\ntext\n#### Human: x", "## A\n### B\n#### Assistant: y"],
}


def conversation(turns: list[str]) -> list[dict]:
    return [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    """Few merges, so that most characters of other scripts are several tokens; end and padding share an id."""
    tokenizer = train_bpe_tokenizer(list(TEXTS.values()) * 2, 420)
    add_chat_template(tokenizer)
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


@pytest.mark.parametrize("name", TEXTS)
def test_guanaco_text_is_split_into_turns(name):
    assert split_guanaco(TEXTS[name]) == conversation(TURNS[name])


@pytest.mark.parametrize(
    "text, reason",
    [
        (None, "does not start with"),
        ("Hello there", "does not start with"),
        ("Preface ### Human: a### Assistant: b", "does not start with"),
        ("### Assistant: b", "take turns"),
        ("### Human: a### Human: b### Assistant: c", "take turns"),
        ("### Human: a", "no answer"),
        ("### Human: a### Assistant: ", "empty turn"),
        ("### Human: ### Assistant: b", "empty turn"),
        ("### Human: ```\na### Assistant: b\n```\n### Human: c\n```### Assistant: d", "ambiguous"),
        (7, "not a string"),
        (["### Human: a### Assistant: b"], "not a string"),
    ],
)
def test_malformed_rows_say_why(text, reason):
    with pytest.raises(Malformed, match=reason):
        split_guanaco(text)


def slow_reference(messages: list[dict], tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Ids and labels piece by piece, from the format as it is described, without the template and without the code."""
    ids, labels = [], []

    def add(text: str, trained: bool) -> None:
        piece = tokenizer.encode(text, add_special_tokens=False)
        ids.extend(piece)
        labels.extend(piece if trained else [-100] * len(piece))

    for number, message in enumerate(messages):
        separator = "\n" if number else ""
        if message["role"] == "user":
            add(f"{separator}### Human: {message['content'].strip()}", trained=False)
        elif message["role"] == "system":
            add(separator + message["content"].strip(), trained=False)
        else:
            add(f"{separator}### Assistant:", trained=False)
            add(f" {message['content'].strip()}", trained=True)
            ids.append(tokenizer.eos_token_id)
            labels.append(tokenizer.eos_token_id)
    return ids, labels


CONVERSATIONS = {name: conversation(turns) for name, turns in TURNS.items()}
CONVERSATIONS["system"] = [{"role": "system", "content": "Be brief."}, *conversation(["Hi", "Hello"])]
CONVERSATIONS["empty turns"] = conversation(["", "", "Still there?", "Yes."])
CONVERSATIONS["white space"] = conversation(["  a \n", "\n\n  b\n  c \n", "d", "  "])


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_masks_are_those_of_a_slow_reference(name, tokenizer):
    ids, labels = slow_reference(CONVERSATIONS[name], tokenizer)
    assert encode(CONVERSATIONS[name], tokenizer) == {"input_ids": ids, "labels": labels}


@pytest.mark.skipif(not GPT2_FILES.exists(), reason="GPT-2's tokenizer is not here")
def test_masks_with_gpt2s_own_tokenizer():
    gpt2 = bpe_from_files(GPT2_FILES / "vocab.json", GPT2_FILES / "merges.txt")
    add_chat_template(gpt2)
    for messages in CONVERSATIONS.values():
        ids, labels = slow_reference(messages, gpt2)
        assert encode(messages, gpt2) == {"input_ids": ids, "labels": labels}


def test_a_line_break_after_the_end_token_is_not_trained(tokenizer):
    """A template in the manner of ChatML, which goes on after the end token."""
    chatml = train_bpe_tokenizer(["a b"], 257)
    chatml.chat_template = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + eos_token + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    )
    labels = encode(conversation(["a", "b", "c", "d"]), chatml)["labels"]
    trained = chatml.decode([label for label in labels if label != -100])
    assert trained == " b<|endoftext|> d<|endoftext|>"


def test_a_template_that_rewrites_earlier_turns_is_refused(tokenizer):
    rewriting = train_bpe_tokenizer(["a b"], 257)
    rewriting.chat_template = (
        "{% for m in messages %}{{ m['content'] if loop.last else 'x' }}{{ eos_token }}{% endfor %}"
    )
    with pytest.raises(Malformed, match="renders a turn differently"):
        encode(conversation(["a", "b", "c", "d"]), rewriting)


def test_a_quoted_end_token_is_refused(tokenizer):
    """It would be trained as an end in the middle of an answer."""
    with pytest.raises(Malformed, match="special token"):
        encode(conversation(["Which token ends a text?", "It is <|endoftext|>, I think."]), tokenizer)


def test_all_formats_give_the_same_conversation(tmp_path):
    """Guanaco text, prompt and completion, messages; JSONL and Parquet."""
    from datasets import Dataset

    rows = {
        "guanaco": {"text": TEXTS["one turn"]},
        "plain": {"prompt": "What is 2 + 2?", "completion": "4"},
        "chat": {"prompt": conversation(["What is 2 + 2?"]), "completion": [{"role": "assistant", "content": "4"}]},
        "messages": {"messages": conversation(["What is 2 + 2?", "4"]), "text": "ignored"},
    }
    for name, row in rows.items():
        (tmp_path / f"{name}.jsonl").write_text(f"{json.dumps(row)}\n" * 4)
        Dataset.from_list([row] * 4).to_parquet(tmp_path / f"{name}.parquet")
        for suffix in ("jsonl", "parquet"):
            path = str(tmp_path / f"{name}.{suffix}")
            train, validation = load_conversations(ConversationArguments(data_files=[path], validation_fraction=0.5))
            assert train.rows == validation.rows == [conversation(["What is 2 + 2?", "4"])] * 2, path


def test_a_part_of_a_split(tmp_path):
    rows = [{"text": f"### Human: {n}?### Assistant: {n}!"} for n in range(40)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    args = {"dataset_name": str(tmp_path), "validation_fraction": 0.5}
    train, validation = load_conversations(ConversationArguments(dataset_split="train[:10%]", **args))
    assert sorted(messages[0]["content"] for messages in train.rows + validation.rows) == ["0?", "1?", "2?", "3?"]
    for split in ("train[", "train[:200%]", "nope[:10%]"):
        with pytest.raises(UserError):
            load_conversations(ConversationArguments(dataset_split=split, **args))


def test_the_first_held_out_questions_are_prompts(tokenizer):
    first, second, long = ([{"role": "user", "content": text}] for text in ("One?", "Two?", "long " * 99))
    rows = [[{"role": "system", "content": "Be brief."}, *first], long, first, second, [*second, *first]]
    assert held_out_questions(rows, tokenizer, 64) == ["One?", "Two?"]
    assert held_out_questions(rows, tokenizer, 64, count=1) == ["One?"]
    assert held_out_questions([], tokenizer, 64) == []


def test_malformed_rows_are_counted(tmp_path, tokenizer):
    texts = ["### Human: a### Assistant: say <|endoftext|>", "### Human: a", "nothing", "nothing else"]
    texts += [TEXTS["one turn"]] * 5
    (tmp_path / "x.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    train, _ = load_conversations(
        ConversationArguments(data_files=[str(tmp_path / "x.jsonl")], validation_fraction=0.3)
    )
    rows = encode_all(train, tokenizer)
    assert dict(train.malformed) == {
        "no answer": 1,
        "does not start with ### Human:": 2,
        "the text holds a special token": 1,
    }
    table = audit(train, rows, tokenizer, 64).table()
    assert "4, left out" in table and "2 does not start with ### Human:" in table


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"data_files": ["none.jsonl"]}, "none.jsonl"),
        ({"dataset_name": "no/such/folder"}, "no/such/folder"),
        ({"data_files": ["x.jsonl"], "dataset_name": "y"}, "data_files goes without"),
        ({"data_files": ["{tmp}/other.jsonl"]}, "there is question, answer"),
        ({"data_files": ["{tmp}/broken.jsonl"]}, "broken.jsonl"),
        ({"data_files": ["{tmp}/bad.jsonl"]}, "not one conversation .*1 rows: does not start"),
        ({"validation_fraction": 1.5}, "validation_fraction=1.5"),
    ],
)
def test_bad_sources_are_told(tmp_path, arguments, message):
    (tmp_path / "other.jsonl").write_text('{"question": "a", "answer": "b"}\n')
    (tmp_path / "broken.jsonl").write_text('{"text": "a\n')
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n')
    if "data_files" in arguments:
        arguments["data_files"] = [path.format(tmp=tmp_path) for path in arguments["data_files"]]
    with pytest.raises(UserError, match=message):
        load_conversations(ConversationArguments(**arguments))


@pytest.mark.parametrize("column", ["messages", "text", "prompt"])
def test_a_bad_row_does_not_end_the_run(tmp_path, column):
    """Whatever a row holds, it is counted, and the others are read."""
    good = {
        "messages": {"messages": conversation(["a", "b"])},
        "text": {"text": "### Human: a### Assistant: b"},
        "prompt": {"prompt": "a", "completion": "b"},
    }[column]
    values = [None, 7, [], ["x"], [None], {"role": "user"}, [{"role": "user", "content": None}], "\ud800"]
    values += ["[]"] if column != "prompt" else []
    bad = [json.dumps({**good, column: value}) for value in values]
    bad += ["[1]", "null", '"text"', "{", "{}", "[" * 20_000, '{"other": 1}']
    lines = [json.dumps(good), *bad, "", json.dumps(good)]
    (tmp_path / "x.jsonl").write_text("\n".join(lines))
    train, validation = load_conversations(
        ConversationArguments(data_files=[str(tmp_path / "x.jsonl")], validation_fraction=0.5)
    )
    assert train.rows == validation.rows == [conversation(["a", "b"])]
    assert sum(train.malformed.values()) == len(bad)


def test_an_empty_file_is_told(tmp_path):
    (tmp_path / "x.jsonl").write_text("")
    with pytest.raises(UserError, match="x.jsonl: not one conversation .no rows"):
        load_conversations(ConversationArguments(data_files=[str(tmp_path / "x.jsonl")]))


def test_files_are_found_as_a_shell_finds_them(tmp_path, monkeypatch):
    """By ~ and globs, compressed too, and by a name that looks like a glob."""
    monkeypatch.setenv("HOME", str(tmp_path))
    line = json.dumps({"prompt": "a", "completion": "b"}) + "\n"
    (tmp_path / "a[1].jsonl").write_text(line * 2)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress((line * 3).encode()))
    for paths, rows in ((["~/a[1].jsonl"], 2), (["~/*.jsonl*"], 5), (["~/b.jsonl.gz", "~/a[1].jsonl"], 5)):
        parts = load_conversations(ConversationArguments(data_files=paths, validation_fraction=0.5))
        assert sum(len(part.rows) for part in parts) == rows


@pytest.mark.parametrize("fraction", [0.02, 0.1, 1 / 3, 0.4, 0.5, 0.6, 0.75, 0.9, 0.99])
def test_the_fraction_that_was_asked_for_is_held_out(fraction):
    rows = [conversation([str(n), "b"]) for n in range(400)]
    train, validation = hold_out(Conversations("test", list(rows)), fraction)
    assert len(validation.rows) == pytest.approx(400 * fraction, abs=1) and train.rows
    assert sorted(map(str, train.rows + validation.rows)) == sorted(map(str, rows))
    places = [int(messages[0]["content"]) for messages in validation.rows]
    assert max(b - a for a, b in zip(places, places[1:], strict=False)) <= 1 / fraction + 1, "evenly spaced"


def test_unknown_roles_are_malformed():
    with pytest.raises(Malformed, match="take turns"):
        check_turns([{"role": "user", "content": "a"}, {"role": "tool", "content": "b"}])
    with pytest.raises(Malformed, match="without a role"):
        check_turns([{"from": "human", "value": "a"}])


# ------------------------------------------------------------------ audit


def test_the_audit_counts(tokenizer):
    conversations = Conversations("test", [CONVERSATIONS["one turn"], CONVERSATIONS["code"]])
    rows = encode_all(conversations, tokenizer)
    lengths = [len(ids) for ids in rows["input_ids"]]
    trained = [sum(label != -100 for label in labels) for labels in rows["labels"]]
    found = audit(conversations, rows, tokenizer, max_length=1000)
    assert (found.tokens, found.trained_tokens, found.truncated) == (sum(lengths), sum(trained), 0)
    assert (found.end_tokens, found.answers, found.nothing_trained) == (3, 3, 0)
    cut = audit(conversations, rows, tokenizer, max_length=lengths[1] - 1)
    assert (cut.truncated, cut.end_tokens, cut.trained_tokens) == (1, 2, sum(trained) - 1)
    found.check()
    cut.check()


def test_the_audit_stops_what_would_teach_nothing(tokenizer):
    conversations = Conversations("test", [CONVERSATIONS["quotation"]])
    rows = encode_all(conversations, tokenizer)
    with pytest.raises(UserError, match="nothing would be learned"):
        audit(conversations, rows, tokenizer, max_length=8).check()
    with pytest.raises(UserError, match="end token .*is never trained"):
        audit(conversations, rows, tokenizer, max_length=len(rows[0]["input_ids"]) - 1).check()


def test_the_audit_stops_a_template_without_end_token(tokenizer):
    endless = train_bpe_tokenizer(["a b"], 257)
    endless.chat_template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"  # noqa: E501
    conversations = Conversations("test", [conversation(["a", "b"])])
    with pytest.raises(UserError, match="never trained, so answers would not stop"):
        audit(conversations, encode_all(conversations, endless), endless, max_length=60).check()


def test_the_audit_takes_any_length(tokenizer):
    conversations = Conversations("test", [CONVERSATIONS["code"]])
    rows = encode_all(conversations, tokenizer)
    assert audit(conversations, rows, tokenizer, 10**21) == replace(
        audit(conversations, rows, tokenizer, 1000), max_length=10**21
    )


def test_held_out_conversations_need_an_answer_and_no_end(tokenizer):
    conversations = Conversations("test", [CONVERSATIONS["quotation"]])
    rows = encode_all(conversations, tokenizer)
    audit(conversations, rows, tokenizer, max_length=len(rows[0]["input_ids"]) - 1).check_held_out()
    with pytest.raises(UserError, match="held-out conversations .* cannot be evaluated"):
        audit(conversations, rows, tokenizer, max_length=8).check_held_out()


def test_the_audit_shows_an_ambiguous_row(tokenizer):
    text = "### Human: Code?### Assistant: ```\nx\x1b[2J### Human: And?### Assistant: ```py\ny\n```"
    conversations = read_rows(
        [{"text": text}, {"text": TEXTS["one turn"]}], row_parser(["text"]), Conversations("test")
    )
    table = audit(conversations, encode_all(conversations, tokenizer), tokenizer, 64).table()
    assert "1, left out" in table and "1 ambiguous" in table
    assert r"```\nx\x1b[2J### Human: And?" in table and "\x1b" not in table


def test_tokens_are_shown_in_two_colors(tokenizer):
    row = encode(CONVERSATIONS["other scripts"], tokenizer)
    plain = show_tokens(row, tokenizer, color=False)
    colored = show_tokens(row, tokenizer, color=True)
    text = tokenizer.decode(row["input_ids"])
    assert plain.replace("|", "").replace("[[", "").replace("]]", "") == text.replace("|", "")
    assert plain.count("[[") == 2 and "<|endoftext|>]]" in plain
    assert colored.count("\033[1;32m") == 2 and colored.endswith("\033[0m")


def test_the_embedded_conversations_are_well_formed():
    train, validation = load_conversations(ConversationArguments())
    assert len(train.rows) > 1000 and len(validation.rows) > 20 and not train.malformed
    assert {len(messages) for messages in train.rows} == {2, 4}, "one turn, or two"
    assert ("What does json.dumps do?", True) in {
        (messages[0]["content"], messages[1]["content"].startswith("Serialize")) for messages in train.rows
    }
