"""Texts of models and data cannot steer a terminal; a file or a pipe gets them as they are."""

import io
import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from llmkit.cli import main
from llmkit.console import has_color, say, shown
from llmkit.data.tokenizer import train_character_tokenizer
from llmkit.finetuning.audit import show_tokens

ROOT = Path(__file__).parents[1]
# Escape, its 8-bit form, bell, carriage return, backspace, delete, right-to-left override, isolate, line separator.
HOSTILE = "\x1b\x9b\x07\r\x08\x7f\u202e\u2066\u2028"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(capsys, monkeypatch) -> Callable[[], str]:
    """Standard output and standard error are a terminal; returns what was written there, and begins anew."""
    monkeypatch.setattr(type(sys.stdout), "isatty", lambda stream: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    return lambda: "".join(capsys.readouterr())


@pytest.fixture
def log_records():
    """Commands set how log records are made, for the whole process."""
    before = logging.getLogRecordFactory()
    yield
    logging.setLogRecordFactory(before)


def no_control(text: str) -> bool:
    return not set(HOSTILE) & set(text)


def test_only_a_terminal_is_protected(terminal):
    assert shown("a\x1b[31mb", Terminal()) == "a<U+001B>[31mb"
    assert shown("\x1b[31m" + HOSTILE, io.StringIO()) == "\x1b[31m" + HOSTILE
    text = "tab\t and line\n Grüße, 日本, עברית, 👩‍👩‍👧, no-break\xa0space"
    assert shown(text) == text
    assert shown(HOSTILE) == "".join(shown(character) for character in HOSTILE)
    say(f"step 1 {HOSTILE}")
    assert no_control(printed := terminal()) and "step 1 <U+001B>" in printed


@pytest.mark.parametrize(("name", "value"), [("NO_COLOR", "1"), ("TERM", "dumb")])
def test_colors_are_for_terminals_that_want_them(terminal, name, value, monkeypatch):
    assert has_color() and not has_color(io.StringIO())
    monkeypatch.setenv(name, value)
    assert not has_color()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    """A model with a vocabulary of little but control characters, and random weights."""
    from transformers import GPT2Config, GPT2LMHeadModel, set_seed

    folder = tmp_path_factory.mktemp("console") / "hostile"
    tokenizer = train_character_tokenizer([HOSTILE + "ab"])
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{{ eos_token }}{% endfor %}"
    set_seed(0)
    sizes = {"n_positions": 256, "n_embd": 8, "n_layer": 1, "n_head": 1, "bos_token_id": None}
    GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), eos_token_id=99, **sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


COMMANDS = {
    "generate": ["generate", "{checkpoint}", "a", "--seed", "0", "--max_new_tokens", "60"],
    "several": ["generate", "{checkpoint}", "a", "b", "--seed", "0", "--max_new_tokens", "60"],
    "chat": ["chat", "{checkpoint}", "--seed", "0", "--max_new_tokens", "60"],
    "tokenizer show": ["tokenizer", "show", "ab" + HOSTILE, "--tokenizer", "{checkpoint}"],
    "eval": ["eval", "{checkpoint}", "--text_files", "{text}"],
}


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS.keys())
def test_what_commands_print(command, checkpoint, tmp_path, terminal, monkeypatch, log_records):
    monkeypatch.setenv("NO_COLOR", "1")  # so that none of the escapes is ours
    monkeypatch.setattr("sys.stdin", io.StringIO("a\n"))
    text = tmp_path / "a\x1b[2Jb\u202e.txt"
    text.write_text("ab" * 50)
    main([part.format(checkpoint=checkpoint, text=text) for part in command])
    printed = terminal().replace("\r", "")  # progress bars have it
    assert no_control(printed) and ("<U+001B>" in printed or "<0x1B>" in printed)


def test_a_pipe_gets_what_the_model_wrote(checkpoint, capsys, log_records):
    main(["generate", checkpoint, "a", "--seed", "0", "--max_new_tokens", "60"])
    assert "\x1b" in capsys.readouterr().out


def test_errors_and_warnings(terminal, log_records):
    with pytest.raises(SystemExit):
        main(["generate", "x", "a", "--such\x1b[31m\x9b"])
    logging.getLogger("transformers").warning("a model of type `%s`", "\x1b[31mx")
    logging.getLogger("somebody.else").error("unformatted \x1b]0;x")
    printed = terminal()
    assert "such<U+001B>[31m<U+009B>" in printed and no_control(printed)


def test_an_audit_s_example(checkpoint, terminal):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    ids = tokenizer("a" + HOSTILE)["input_ids"]
    row = {"input_ids": ids, "labels": [-100, *ids[1:]]}
    assert no_control(show_tokens(row, tokenizer, color=False))
    colored = show_tokens(row, tokenizer, color=True)
    assert colored.count("\x1b") == colored.count("\x1b[") == 3 and no_control(colored.replace("\x1b", ""))


def test_an_audit(terminal, tmp_path, monkeypatch, log_records, checkpoint):
    rows = [{"text": f"### Human: a{HOSTILE}{n}### Assistant: b{HOSTILE}."} for n in range(60)]
    data = tmp_path / "chats\x1b[31m.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = str(ROOT / "recipes" / "sft_qlora_quickstart.yaml")
    monkeypatch.setenv("NO_COLOR", "1")
    main(["audit", recipe, "--model", checkpoint, "--data_files", str(data), "--report_to", "none"])
    printed = terminal().replace("\r", "")
    assert "<U+001B>" in printed and no_control(printed)
