"""A text cut into its tokens, to look at: in the terminal, or as a page for a browser.

(`tokenizers.tools.EncodingVisualizer` draws one mark for all tokens of a character and has neither ids nor a dark
mode, so the page is made here.)
"""

import html
import itertools
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from llmkit.data.tokenizer import document_encoder, unknown_token_id

# Backgrounds of the 256 colours that terminals share, light enough for black text; five, so that neighbours differ.
COLORS = (153, 157, 223, 217, 183)
BLACK, PLAIN = "\033[38;5;16m", "\033[0m"
SEPARATOR = "│"
MOST_FREQUENT = 8


@dataclass(frozen=True)
class Token:
    """One token of a text: its id, and the text that it stands for with everything that is not a printable character
    as `<0xE2>`, a byte in hexadecimal. Line ends and tabs are left as they are."""

    id: int
    text: str


@dataclass(frozen=True)
class Segmentation:
    """A text in the tokens of one tokenizer.

    Attributes:
        name: the tokenizer's.
        vocabulary: its number of tokens.
        num_bytes: of the text in UTF-8.
        unknown: tokens that stand for text which the vocabulary lacks.
    """

    name: str
    vocabulary: int
    tokens: list[Token]
    num_bytes: int
    unknown: int

    def facts(self) -> dict[str, str]:
        """What there is to say of it, as text, by name."""
        counts = Counter(token.text for token in self.tokens).most_common(MOST_FREQUENT)
        facts = {
            "tokenizer": self.name,
            "vocabulary": f"{self.vocabulary:,}",
            "text": f"{self.num_bytes:,} bytes",
            "tokens": f"{len(self.tokens):,}",
            "different tokens": f"{len({token.id for token in self.tokens}):,}",
            "bytes a token": f"{self.num_bytes / max(1, len(self.tokens)):.2f}",
        }
        if often := [f"{mark_whitespace(text)} {count:,}" for text, count in counts if count > 1]:
            facts["most frequent"] = "  ".join(often)
        if self.unknown:
            facts["unknown"] = f"{self.unknown:,}"
        return facts


def segment(text: str, tokenizer: PreTrainedTokenizerBase, name: str) -> Segmentation:
    """The text as training reads it: no special tokens are added, and the text of one is ordinary text."""
    encoding, unknown = document_encoder(tokenizer).encode(text), unknown_token_id(tokenizer)
    return Segmentation(
        name=name,
        vocabulary=len(tokenizer),
        tokens=[Token(*pair) for pair in zip(encoding.ids, _texts(text, encoding, tokenizer), strict=True)],
        num_bytes=len(text.encode()),
        unknown=sum(token == unknown for token in encoding.ids),
    )


def _texts(text: str, encoding, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    if '"ByteLevel"' in json.dumps(json.loads(tokenizer.backend_tokenizer.to_str())["decoder"]):
        # The vocabulary spells bytes as characters: a token's bytes are known also where it ends within a character.
        byte_of = {character: byte for byte, character in bytes_to_unicode().items()}
        for token in encoding.tokens:
            is_bytes = all(character in byte_of for character in token)
            yield printable(bytes(byte_of[character] for character in token) if is_bytes else token.encode())
        return
    spans = [(-1, -1), *encoding.offsets, (-1, -1)]
    for token, before, (start, end), after in zip(encoding.tokens, spans, spans[1:], spans[2:], strict=False):
        # Tokens that share a character are its bytes, spelled `<0xE2>`, or what a normalizer made of it.
        shared = start == end or (start, end) in (before, after)
        yield printable((token if shared else text[start:end]).encode())


def printable(data: bytes) -> str:
    """Text with each byte that is no character, or one that moves the cursor or hides, as `<0xE2>`."""
    text = data.decode(errors="surrogateescape")  # a byte 0xE2 that is no character becomes U+DCE2
    return "".join(
        character
        if character.isprintable() or character in "\n\t"
        else "".join(f"<0x{byte:02X}>" for byte in character.encode(errors="surrogateescape"))
        for character in text
    )


def mark_whitespace(text: str) -> str:
    """Spaces, tabs and line ends as signs."""
    return text.replace(" ", "·").replace("\t", "⇥").replace("\n", "↵")


def in_terminal(segmentation: Segmentation, color: bool) -> str:
    """The text with its tokens in alternating colours, or with `│` between them and `·` for spaces; `↵` before each
    line end."""
    if not color:
        tokens = (mark_whitespace(token.text).replace("↵", "↵\n") for token in segmentation.tokens)
        return SEPARATOR.join(tokens)
    text = ""
    for token, number in zip(segmentation.tokens, itertools.cycle(COLORS), strict=False):
        start = f"\033[48;5;{number}m{BLACK}"
        shown = token.text.replace("\t", "⇥")
        # Plain at the line's end: terminals would paint the rest of the line.
        text += start + shown.replace("\n", f"↵{PLAIN}\n{start}") + PLAIN
    return text


def with_ids(segmentation: Segmentation) -> str:
    """A line a token: its place, its id, its text."""
    rows = enumerate(segmentation.tokens)
    return "\n".join(f"{place:>6}  {token.id:>7}  {mark_whitespace(token.text)}" for place, token in rows)


def facts_table(segmentations: list[Segmentation]) -> str:
    """The facts of each tokenizer, side by side."""
    columns = [segmentation.facts() for segmentation in segmentations]
    names = list(dict.fromkeys(itertools.chain(*columns)))
    first = max(map(len, names))
    widths = [max(len(column.get(name, "")) for name in names) for column in columns]
    lines = [
        "  ".join(
            [name.rjust(first), *(column.get(name, "-").ljust(w) for column, w in zip(columns, widths, strict=True))]
        )
        for name in names
    ]
    return "\n".join(line.rstrip() for line in lines)


STYLE = """
:root { color-scheme: light dark; }
body { margin: clamp(.75rem, 4vw, 2rem); font: 1rem/1.7 ui-monospace, Menlo, Consolas, monospace;
  background: light-dark(#fff, #16181d); color: light-dark(#1b1d22, #e4e6eb); }
main { display: flex; flex-wrap: wrap; gap: 2.5rem; }
section { flex: 1 1 min(24rem, 100%); min-width: 0; }
table { border-collapse: collapse; margin-bottom: 1.5rem; font-size: .85rem; line-height: 1.5; }
th { text-align: left; font-weight: normal; opacity: .65; padding-right: 1.5rem; white-space: nowrap; }
th, td { vertical-align: top; overflow-wrap: anywhere; }
.tokens { white-space: pre-wrap; overflow-wrap: anywhere; }
.tokens span { border-radius: .2rem; padding: .1rem 0; }
.tokens span:hover { outline: 2px solid currentColor; }
.tokens i { font-style: normal; opacity: .5; }
.c0 { background: light-dark(#bfe0ff, #1d4468); } .c1 { background: light-dark(#c5f2c7, #1f5130); }
.c2 { background: light-dark(#ffe6a8, #5f4a12); } .c3 { background: light-dark(#ffd0d0, #652e36); }
.c4 { background: light-dark(#e2d3fb, #45326b); }
"""


def as_page(segmentations: list[Segmentation]) -> str:
    """A page that needs nothing but itself: tokens in colours, id and text of each where the mouse is."""
    sections = "".join(f"<section>{_facts_html(s)}{_tokens_html(s)}</section>" for s in segmentations)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>Tokens</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<style>{STYLE}</style>\n</head>\n<body>\n<main>{sections}</main>\n</body>\n</html>\n"
    )


def _facts_html(segmentation: Segmentation) -> str:
    rows = segmentation.facts().items()
    return "<table>" + "".join(f"<tr><th>{name}<td>{html.escape(text)}" for name, text in rows) + "</table>"


def _tokens_html(segmentation: Segmentation) -> str:
    spans = []
    for place, token in enumerate(segmentation.tokens):
        title = html.escape(f"{token.id}  {mark_whitespace(token.text)}")
        shown = html.escape(token.text).replace("\t", "<i>⇥</i>\t").replace("\n", "<i>↵</i>\n")
        spans.append(f'<span class="c{place % len(COLORS)}" title="{title}">{shown}</span>')
    return f'<div class="tokens">{"".join(spans)}</div>'
