"""Which text is held out for validation, and the pieces in which text goes to the encoder.

Whole documents are held out by a hash of their text: no state, no order, and exact copies never fall on both sides.
Or, for one or a few long texts, the end of every document is.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import xxhash

from llmkit.data.corpus import Corpus
from llmkit.data.tokenizer import split_document

# Characters in a piece and in a batch of pieces, which a thread gets at a time: enough to hide the hand-over, little
# enough to keep every core busy.
BATCH_CHARACTERS = 1 << 18
HASHED_CHARACTERS = 1 << 25  # read beforehand, at most, to see to it that each split gets a document


class Piece(NamedTuple):
    """A stretch of a document. The pieces of a long one share the cores."""

    split: str
    text: str
    ends_text: bool  # `<|endoftext|>` follows
    ends_document: bool  # nothing of the document follows in either split


def split_pieces(
    corpus: Corpus, skip: int, validation_fraction: float, validation_split: str, can_cut: bool
) -> Iterator[Piece]:
    """The text of a corpus without its first `skip` documents, in its order; cut into pieces if `can_cut`."""
    by_document = validation_split == "document"
    threshold = _threshold(corpus, validation_fraction) if by_document else 0
    for document in corpus.documents(skip=skip):
        if by_document:
            parts = [("validation" if _hash(document) < threshold else "train", document)]
        else:
            cut = int(len(document) * (1 - validation_fraction))
            parts = [("train", document[:cut]), ("validation", document[cut:])]
            parts = [(split, text) for split, text in parts if text]
        for split, text in parts:
            *begin, end = split_document(text, BATCH_CHARACTERS) if can_cut else [text]
            for piece in begin:
                yield Piece(split, piece, False, False)
            yield Piece(split, end, True, split == parts[-1][0])


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


def _hash(document: str) -> int:
    return xxhash.xxh3_64_intdigest(document.encode())


def _threshold(corpus: Corpus, fraction: float) -> float:
    """Documents whose hash is below this are held out.

    It is that fraction of the largest hash, which may hold out none of a few documents, or all. For those it is moved:
    the document with the smallest hash is held out, and the one with the largest is not. Seeing one on each side takes
    the first 1 / fraction documents or so; where it takes more than 32M characters, nothing is moved.
    """
    threshold = fraction * 2**64
    smallest, largest, characters = 2**64, 0, 0
    for document in corpus.documents():
        value = _hash(document)
        smallest, largest = min(smallest, value), max(largest, value)
        characters += len(document)
        if smallest < threshold <= largest or characters > HASHED_CHARACTERS:
            return threshold
    return min(max(threshold, smallest + 1), largest)
