"""How a row's text or messages become turns, and what makes a row unfit to train on."""

import re
from dataclasses import dataclass, field

_MARKER = r"\#\#\#[ ](?:Human|Assistant):"
_QUOTES_MARKER = re.compile(_MARKER)
ROLES = {"Human": "user", "Assistant": "assistant"}

Messages = list[dict[str, str]]


class Malformed(ValueError):
    """A row that is not trained on; the message is the reason, the same for all rows of that kind."""


class Ambiguous(Malformed):
    """A row whose turns its text alone does not decide.

    Attributes:
        text: the row's.
    """

    def __init__(self, text: str):
        super().__init__("ambiguous: a marker that may start a turn or be quoted")
        self.text = text


def check_turns(messages: object) -> Messages:
    """The messages, if user and assistant take turns, and without a last question that has no answer.

    Raises:
        Malformed: they do not, or a turn is empty, or no answer is left.
    """
    if not isinstance(messages, list):
        raise Malformed("messages that are not a list")
    for message in messages:
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise Malformed("a message without a role and text as its content")
        if not isinstance(message["content"], str):
            raise Malformed("a message without a role and text as its content")
        try:
            message["content"].encode()
        except UnicodeEncodeError:
            raise Malformed("text with half a character (a lone surrogate)") from None
    turns = [{"role": message["role"], "content": message["content"]} for message in messages]
    if turns and turns[-1]["role"] == "user":
        turns.pop()
    first = 1 if turns and turns[0]["role"] == "system" else 0
    if len(turns) == first:
        raise Malformed("no answer")
    if any(turn["role"] != ("user", "assistant")[i % 2] for i, turn in enumerate(turns[first:])):
        raise Malformed("user and assistant do not take turns")
    if not all(turn["content"].strip() for turn in turns[first:]):
        raise Malformed("an empty turn")
    return turns


# ------------------------------------------------------------------ guanaco

# What a reading looks at in a turn, from left to right. `^` is the start of a line or of the turn.
_TOKENS = re.compile(
    rf"""
      (?=[`~"'“„‘«「\#]|^[ \t>]+[`~])(?:  # no token begins otherwise; this makes the search fast
      (?P<fence>  # text may stand before it only if nothing but a language follows, as in "Run: ```sh"
        ^[ \t>]*(?:`{{3,}}(?![^\n]*`)|~{{3,}}) | (?<!`)`{{3,}}(?=\w*[ \t]*$) )
    | (?P<span> (?<!`)(?:
        `(?![`\s])[^`\n]*(?<!\s)`
      | (?P<run>``+)(?![`\s])(?:(?!(?<!`)(?P=run)(?!`))[^\n])*(?<![\s`])(?P=run) )(?!`) )
    | (?P<lines> (?<!`)(?P<wide>`{{3,}})(?![`\s])(?:(?!(?P=wide)|{_MARKER}).)*(?P=wide)(?!`) )
    | (?P<quotation>
        (?<![^\s(\[{{<>=:,/])"(?!\s)[^"\n]*(?<!\s)"(?!\w)
      | (?<!\w)'(?={_MARKER})(?:[^'\n]|(?<=\w)'(?=\w))*(?<!\s)'(?!\w)
      | “[^“”\n]*” | „[^“”„\n]*[“”] | ‘(?:[^‘’\n]|(?<=\w)’(?=\w))*’ | «[^«»\n]*» | 「[^「」\n]*」 )
    | (?P<pair> (?<![\w.,!?)])(?P<mark>["']|(?<!`)`(?!`))(?:(?!(?P=mark))[^\n]|(?<=\w)'(?=\w))*(?P=mark)(?![\w`]) )
    | (?P<marker> (?<!\#)\#*(?P<start>\#\#\#)[ ](?P<role>Human|Assistant): )
    )
    """,
    re.VERBOSE | re.DOTALL | re.MULTILINE,
)
_FIRST = re.compile(r"[\ufeff\s]*### (?P<role>Human|Assistant):")  # after a byte order mark, if there is one
_CLOSING = r"^[ \t>]*{fence}{mark}*(?![{mark}\w])|(?<!{mark}){fence}{mark}*(?=[ \t]*(?:$|### (?:Human|Assistant):))"
# Within a block: a fence with a language or right after a marker, which opens another block, or a marker right after
# a word, as code seldom has it and turns that follow each other do. The fence that seems to open the block was left
# open then.
_DOUBTFUL = re.compile(
    rf"(?:^[ \t>]*(?=(?:`+|~+)\w)|{_MARKER}\s*)(?P<fence>`{{3,}}|~{{3,}})|[^\s\"'`(\[{{<>=|\#]{_MARKER}", re.MULTILINE
)


def split_guanaco(text: str | None) -> Messages:
    """Split `### Human: ... ### Assistant: ...` into turns, of which there may be many.

    Turns follow each other without a separator. A marker starts a turn wherever it stands, unless its turn quotes it:

    - in a fenced block: from three or more backticks or tildes at the start of a line to as many at the start or at
      the end of a line (backticks may also open one at the end of a line, as in "Run:```sh");
    - between backticks, or between quotation marks of any kind, that open and close tightly within a line;
    - at the start of a line that begins with `>`, or that is indented code (four spaces or a tab, after an empty or
      an indented line).

    `#### Human:` at the start of a line is a heading; elsewhere the first `#` belongs to the turn before, as in C#.
    A last question without an answer is left out: there is nothing to learn from it.

    Ambiguous is a row where a fenced block quotes a marker and some fence is left open, another one opens within the
    block, the marker follows a word directly, or the turns do not alternate; and one where the marks around a marker
    may be a pair (single quotes, or quotation marks and backticks beside white space) or belong to two turns, if both
    give turns that alternate.

    Raises:
        Malformed: the turns are not Human, Assistant, Human, ... from the start on, or one of them is empty.
        Ambiguous: as above.
    """
    if not isinstance(text, str | None):
        raise Malformed("text that is not a string")
    text = text or ""
    readings, reasons = [], []
    for pairs_quote in (True, False):
        reading = _Reading(pairs_quote)
        reading.read(text)
        if reading.doubtful and reading.quoted_in_block:
            raise Ambiguous(text)
        try:
            readings.append(check_turns(reading.turns))
        except Malformed as error:
            reasons.append(Ambiguous(text) if reading.quoted_in_block else error)
    if not readings:
        raise reasons[0]
    if readings[0] != readings[-1]:
        raise Ambiguous(text)
    return readings[0]


@dataclass
class _Reading:
    """The turns of a text, taken one way.

    Attributes:
        pairs_quote: whether marks that may belong to two turns are taken for a pair.
        quoted_in_block: a fenced block quotes a marker.
        doubtful: a fence is left open, or such a block may be none.
        unclosed: fences that nothing closes in what is left of the text. (To search for each again would take time
            with the square of their number.)
    """

    pairs_quote: bool
    turns: Messages = field(default_factory=list)
    quoted_in_block: bool = False
    doubtful: bool = False
    unclosed: set[str] = field(default_factory=set)

    def read(self, text: str) -> None:
        marker = _FIRST.match(text)
        if marker is None:
            raise Malformed("does not start with ### Human:")
        while marker:
            role, text = ROLES[marker["role"]], text[marker.end() :]
            marker = self._end_of_turn(text)
            content = text[: marker.start("start")] if marker else text
            self.turns.append({"role": role, "content": content.strip()})

    def _end_of_turn(self, text: str) -> re.Match | None:
        """The marker that ends the turn at the start of `text`, if any does."""
        position = 0
        while token := _TOKENS.search(text, position):
            position = token.end()
            match token.lastgroup:
                case "fence":
                    position = self._end_of_block(text, token)
                case "pair" if not self.pairs_quote and _QUOTES_MARKER.search(token.group()):
                    position = token.start() + 1
                case "marker":
                    line = text[text.rfind("\n", 0, token.start()) + 1 : token.start()]
                    if _is_quoted_line(text[: token.start()]):
                        position = end if (end := text.find("\n", token.end())) >= 0 else len(text)
                    elif line.strip() or token.start() == token.start("start"):  # else it is a heading
                        return token
        return None

    def _end_of_block(self, text: str, opening: re.Match) -> int:
        """Where the block that a fence opens ends; where nothing closes it, the end of the fence."""
        fence = opening.group().strip(" \t>")
        start = end if (end := text.find("\n", opening.end())) >= 0 else len(text)
        if fence in self.unclosed or _QUOTES_MARKER.search(text, opening.end(), start):
            self.doubtful = True
            return opening.end()
        closing = re.compile(_CLOSING.format(fence=fence, mark=fence[0]), re.MULTILINE).search(text, start)
        if closing is None:
            self.unclosed.add(fence)
            self.doubtful = True
            return opening.end()
        content = text[start : closing.end()]
        if _QUOTES_MARKER.search(content):
            self.quoted_in_block = True
            signs = _DOUBTFUL.finditer(content)
            self.doubtful = self.doubtful or any(fence in (sign["fence"] or fence) for sign in signs)
        return closing.end()


def _is_quoted_line(before: str) -> bool:
    """Whether the text before a marker makes the rest of its line a quotation or indented code."""
    *earlier, line = before.rsplit("\n", 2)
    if line.strip(" \t>"):
        return False
    indented = ("    ", "\t")
    is_code = line.startswith(indented) and earlier and (not earlier[-1].strip() or earlier[-1].startswith(indented))
    return ">" in line or bool(is_code)
