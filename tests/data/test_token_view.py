"""A text in its tokens: nothing of it gets lost, bytes and white space show, and a page needs nothing else."""

import re
from html.parser import HTMLParser

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from llmkit.data.token_view import as_page, facts_table, in_terminal, mark_whitespace, printable, segment, with_ids
from llmkit.data.tokenizer import train_bpe_tokenizer, train_character_tokenizer

TEXT = 'def naïve(x):\n\treturn "日本🙂"  # <b>a & b</b> | é<|endoftext|>\n'


@pytest.fixture(scope="module")
def bpe() -> PreTrainedTokenizerFast:
    return train_bpe_tokenizer(["def read(x):\n    return x  # the naïve é\n"] * 5, 290)


def bytes_of(shown: str) -> bytes:
    """The bytes that a token's shown text stands for."""
    parts = re.split(r"<0x([0-9A-F]{2})>", shown)
    return b"".join(bytes.fromhex(part) if i % 2 else part.encode() for i, part in enumerate(parts))


def test_tokens_of_a_byte_level_bpe_are_its_bytes(bpe):
    found = segment(TEXT, bpe, "mine")
    assert b"".join(bytes_of(token.text) for token in found.tokens) == TEXT.encode()
    assert [token.id for token in found.tokens] != bpe.encode(TEXT)  # there <|endoftext|> is one token, not text
    shown = [token.text for token in found.tokens]
    assert "<0xE6>" in shown and "<0xF0>" in shown  # 日 and 🙂 begin so; neither is in the text that was learned from
    assert any("ï" in text for text in shown)  # which is, and becomes a token of a whole character
    assert (found.vocabulary, found.num_bytes, found.unknown) == (len(bpe), len(TEXT.encode()), 0)


def test_tokens_of_characters_show_the_text_also_where_it_is_unknown():
    found = segment("abXé\n", train_character_tokenizer(["abc\n"]), "characters")
    assert [token.text for token in found.tokens] == ["a", "b", "X", "é", "\n"]
    assert found.unknown == 2
    assert re.search(r"unknown +2$", facts_table([found]))


def test_tokens_of_a_byte_fallback_vocabulary_show_their_bytes():
    """As Llama's: pieces with ▁ for a space, and bytes for what the vocabulary lacks."""
    vocab = {"<unk>": 0, "▁hi": 1, "▁": 2, "!": 3} | {f"<0x{byte:02X}>": 4 + byte for byte in range(256)}
    merges = [("▁", "h"), ("▁h", "i")]
    vocab |= {"h": 260, "i": 261, "▁h": 262}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges, byte_fallback=True, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="<unk>")
    shown = [token.text for token in segment("hi hi!é", tokenizer, "pieces").tokens]
    assert shown == ["hi", " hi", "!", "<0xC3>", "<0xA9>"]


def test_what_would_move_the_cursor_or_hide_is_shown_as_bytes():
    assert printable(b"a\x1b[2Jb\x00\r") == "a<0x1B>[2Jb<0x00><0x0D>"
    assert printable("a\u200b\u202e\xa0b".encode()) == "a<0xE2><0x80><0x8B><0xE2><0x80><0xAE><0xC2><0xA0>b"
    assert printable(b"\xe2\x80") == "<0xE2><0x80>"
    assert printable("日本 é\t\n".encode()) == "日本 é\t\n"


def test_without_color_separators_and_white_space_are_signs(bpe):
    plain = in_terminal(segment("x  y\n\tz", bpe, "mine"), color=False)
    assert plain.replace("│", "") == "x··y↵\n⇥z"
    assert plain.count("│") == len(bpe.encode("x  y\n\tz")) - 1


def test_in_color_neighbours_differ_and_no_line_ends_in_color(bpe):
    found = segment(TEXT, bpe, "mine")
    colored = in_terminal(found, color=True)
    backgrounds = re.findall(r"\033\[48;5;(\d+)m", colored)
    plain = re.sub(r"\033\[[\d;]*m", "", colored)
    assert plain == "".join(token.text for token in found.tokens).replace("\n", "↵\n").replace("\t", "⇥")
    assert all(line.endswith("\033[0m") or not line for line in colored.split("\n"))
    one_each = in_terminal(segment("def x", bpe, "mine"), color=True)
    assert len(set(re.findall(r"48;5;(\d+)m", one_each))) == len(segment("def x", bpe, "mine").tokens) > 1
    assert len(backgrounds) == len(found.tokens) + TEXT.count("\n")


def test_ids_are_the_ids(bpe):
    rows = [line.split(maxsplit=2) for line in with_ids(segment("def x  # é", bpe, "mine")).splitlines()]
    assert [int(row[1]) for row in rows] == bpe.encode("def x  # é")
    assert rows[0] == ["0", str(bpe.encode("def")[0]), "def"]


def test_facts_of_two_tokenizers_stand_side_by_side(bpe):
    text = "xxxx"
    table = facts_table([segment(text, bpe, "one"), segment(text, train_character_tokenizer(["xy"]), "two")])
    lines = {line.strip().split("  ")[0]: line.split()[-2:] for line in table.splitlines()}
    assert lines["tokenizer"] == ["one", "two"]
    assert lines["vocabulary"] == [str(len(bpe)), "4"]
    assert lines["tokens"] == [str(len(bpe.encode(text))), "4"]
    assert lines["bytes a token"][1] == "1.00"


class Spans(HTMLParser):
    """The text and the title of each token of a page."""

    def __init__(self, page: str):
        super().__init__()
        self.spans: list[list[str]] = []
        self.addresses: list[str] = []
        self.inside = self.sign = False
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        fields = dict(attributes)
        self.addresses += [value for name, value in attributes if name in ("src", "href")]
        if tag == "span":
            self.spans.append([fields["title"], ""])
            self.inside = True
        self.sign = tag == "i"

    def handle_endtag(self, tag):
        self.inside = self.inside and tag != "span"
        self.sign = False

    def handle_data(self, data):
        if self.inside and not self.sign:
            self.spans[-1][1] += data


def test_a_page_holds_the_tokens_and_asks_for_nothing_else(bpe):
    found = segment(TEXT, bpe, "<mine>")
    page = as_page([found, found])
    spans = Spans(page)
    assert [text for _, text in spans.spans] == [token.text for token in found.tokens] * 2
    titles = [f"{token.id}  {mark_whitespace(token.text)}" for token in found.tokens]
    assert [title for title, _ in spans.spans] == titles * 2
    assert spans.addresses == [] and "http" not in page and "url(" not in page
    assert "<td>&lt;mine&gt;" in page
