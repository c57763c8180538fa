"""Which text is held out for validation, and the pieces in which text goes to the encoder.

Whole documents are held out by a hash of their text: no state, no order, and exact copies never fall on both sides.
Where the documents are too few for that, as one or two books are, or where it is asked for, the end of each is.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import xxhash

from llmkit.data.corpus import Corpus
from llmkit.errors import UserError

# Characters in a batch of pieces, which a thread gets at a time: enough to hide the hand-over, little enough to keep
# every core busy.
BATCH_CHARACTERS = 1 << 18
LOOKED_AT = 1 << 25  # characters, at most, that are read beforehand to see what the hash holds out
ENOUGH_DOCUMENTS = 8  # on each side; then the share cannot be far from what was asked for
LONGEST = 15_000_000  # characters of a document in one piece: its tokenizer took 103 bytes for each, measured on 2 MB
TOLERANCE = 3  # a share this many times too large or too small is not what was asked for


class Piece(NamedTuple):
    """A stretch of a document. The pieces of a long one share the cores."""

    split: str
    text: str
    ends_text: bool  # `<|endoftext|>` follows
    ends_document: bool  # nothing of the document follows in either split


def by_document(corpus: Corpus, fraction: float) -> bool:
    """Whether holding out whole documents gives about the fraction of the text that is asked for.

    As long as it is not certain, documents are read and hashed, up to `LOOKED_AT` characters; from there on, their
    number is reckoned from the size of the corpus.
    """
    documents, characters = [0, 0], [0, 0]  # to train on, held out
    for pieces in corpus.in_pieces():
        held_out, length = _measure(pieces, fraction)
        documents[held_out] += 1
        characters[held_out] += length
        if min(documents) >= ENOUGH_DOCUMENTS:
            return True
        if sum(characters) >= LOOKED_AT:
            total = corpus.num_bytes()
            expected = sum(documents) * min(fraction, 1 - fraction) * (total or 0) / sum(characters)
            return total is None or expected >= ENOUGH_DOCUMENTS
    train, held_out = characters
    share = held_out / max(1, train + held_out)
    return fraction / TOLERANCE <= share <= TOLERANCE * fraction and 1 - share >= (1 - fraction) / TOLERANCE


def split_pieces(corpus: Corpus, skip: int, fraction: float, whole: bool, can_cut: bool) -> Iterator[Piece]:
    """The text of a corpus without its first `skip` documents, in its order.

    Args:
        fraction: the part to hold out: of the documents, or of each document's characters, at least one of them.
        whole: documents are held out whole; else the end of each is.
        can_cut: pieces may be encoded apart from each other; else a document is one piece.

    Raises:
        UserError: a document is too long for one piece.
    """
    for pieces in corpus.in_pieces(skip):
        held_out, length = _measure(pieces, fraction)
        cut = (0 if held_out else length) if whole else max(1, min(int(length * (1 - fraction)), length - 1))
        if not can_cut:
            if length > LONGEST:
                raise UserError(
                    f"{corpus.description}: a document has {length:,} characters, and this tokenizer takes a document "
                    f"in one piece, of {LONGEST:,} at most: divide it, or take a tokenizer with GPT-2's word pattern, "
                    "as llmkit tokenizer train makes it"
                )
            pieces = ["".join(pieces)]
        position = 0
        for text in pieces:
            to_cut = max(0, cut - position)
            for split, part in (("train", text[:to_cut]), ("validation", text[to_cut:])):
                position += len(part)
                if part:
                    yield Piece(split, part, position in (cut, length), position == length)


def in_batches(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """Lists of consecutive pieces that together have `BATCH_CHARACTERS` or more."""
    batch, characters = [], 0
    for piece in pieces:
        batch.append(piece)
        characters += len(piece.text)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _measure(pieces: Iterable[str], fraction: float) -> tuple[bool, int]:
    """Whether the hash of a document is among the lowest `fraction` of all hashes, and its length in characters."""
    digest, length = xxhash.xxh3_64(), 0
    for text in pieces:
        digest.update(text.encode())
        length += len(text)
    return digest.intdigest() < fraction * 2**64, length
