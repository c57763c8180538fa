"""One process's work on token shards: a corpus, or a part of one, becomes the shards of a folder.

The work is pipelined over threads of the process: one reads the corpus and writes the shards in its order, the
others tokenize. So the result does not depend on the number of threads.

When a shard is full, the open files of *both* splits are flushed, and a journal records which shards are finished, how
long the open ones are, and how many documents that took. A run that was killed goes on from there, and ends with the
same bytes as one that was not.
"""

import json
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
from huggingface_hub.errors import StrictDataclassError
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from llmkit.data.corpus import Corpus
from llmkit.data.encoding import fastest_encoder, map_in_order, token_dtype
from llmkit.data.holdout import Piece, in_batches, split_pieces
from llmkit.data.manifest import JOURNAL, SPLITS, Shard
from llmkit.data.shard_writer import ShardWriter
from llmkit.data.tokenizer import unknown_token_id
from llmkit.errors import UserError
from llmkit.files import write_json


def check_settings(directory: object, found: dict, wanted: dict) -> None:
    different = [
        f"another {name}" if name in ("corpus", "tokenizer") else f"{name} {found.get(name)} instead of {value}"
        for name, value in wanted.items()
        if found.get(name) != value
    ]
    if different:
        raise UserError(
            f"{directory}: its shards were made with {', '.join(different)}: choose another folder or delete this one"
        )


class Preparation:
    """One process's work on a folder whose lock it holds. The first `documents` of the corpus are in the files."""

    def __init__(
        self,
        corpus: Corpus,
        tokenizer: PreTrainedTokenizerBase,
        directory: Path,
        settings: dict,
        finished: Callable[[Path], None] | None = None,
    ):
        self.finished = finished  # called with each shard that is full, under its name
        self.corpus, self.directory, self.settings = corpus, directory, settings
        self.dtype = token_dtype(tokenizer)
        self.unknown_id = unknown_token_id(tokenizer)
        self.encode, self.can_cut = fastest_encoder(tokenizer)
        self.documents = 0
        shards = {split: [Shard(f"{split}_00000.bin")] for split in SPLITS}
        if (directory / JOURNAL).exists():
            try:
                journal = json.loads((directory / JOURNAL).read_text(encoding="utf-8"))
                found, self.documents = dict(journal["settings"]), int(journal["documents"])
                shards = {split: [Shard(**shard) for shard in journal["shards"][split]] for split in SPLITS}
            except (OSError, ValueError, TypeError, KeyError, RecursionError, StrictDataclassError) as error:
                raise UserError(
                    f"{directory / JOURNAL} is damaged ({error}): delete the folder and prepare the shards again"
                ) from error
            check_settings(directory, found, settings)
        self.writers = {split: ShardWriter(directory, split, self.dtype, shards[split]) for split in SPLITS}

    def write(self, whole: bool, num_workers: int, bar: tqdm) -> None:
        """Tokenize what is left of the corpus.

        Args:
            whole: documents are held out whole; else the end of each is.
            num_workers: threads that tokenize.
            bar: shows the bytes of text that are done.
        """
        fraction = self.settings["validation_fraction"]
        batches = in_batches(split_pieces(self.corpus, self.documents, fraction, whole, self.can_cut))
        tokens_before, start = self.sum("tokens"), time.perf_counter()
        for batch, encoded in map_in_order(self._encode, batches, num_workers):
            for piece, ids in zip(batch, encoded, strict=True):
                self._append(piece, ids)
            rate = (self.sum("tokens") - tokens_before) / (time.perf_counter() - start)
            bar.set_postfix_str(f"{tqdm.format_sizeof(rate)} tokens/s", refresh=False)
            bar.update(self.sum("bytes") - bar.n)

    def finish(self) -> dict[str, list[Shard]]:
        """Close the last shards. Returns those of each split, none where a split has no text."""
        self._commit(full=1)
        return {split: writer.finished_shards for split, writer in self.writers.items()}

    def close(self) -> None:
        """Close the files, also after an error."""
        for writer in self.writers.values():
            writer.close()

    def sum(self, count: str) -> int:
        """A count over all shards that have been written."""
        return sum(getattr(shard, count) for writer in self.writers.values() for shard in writer.shards)

    def _encode(self, batch: list[Piece]) -> tuple[list[Piece], list[np.ndarray]]:
        return batch, self.encode([piece.text for piece in batch])

    def _append(self, piece: Piece, ids: np.ndarray) -> None:
        writer = self.writers[piece.split]
        writer.append(ids if piece.ends_text else ids[:-1])
        shard = writer.open_shard
        shard.bytes += len(piece.text.encode())
        shard.documents += piece.ends_text
        if self.unknown_id is not None:
            shard.unknown_tokens += int(np.count_nonzero(ids == self.unknown_id))
        if piece.ends_document:
            self.documents += 1
            full = self.settings["shard_tokens"]
            if any(writer.open_shard.tokens >= full for writer in self.writers.values()):
                self._commit(1 if self.settings.get("close_together") else full)

    def _commit(self, full: int) -> None:
        """Close the shards of at least `full` tokens, and record how far both splits are.

        The journal comes before the new names: after it, a restart can give them; before it, the files are only
        longer than the last journal says, and a restart cuts them.
        """
        closed = [writer.close_shard() for writer in self.writers.values() if writer.open_shard.tokens >= full]
        for writer in self.writers.values():
            writer.flush()
        shards = {split: [asdict(shard) for shard in writer.shards] for split, writer in self.writers.items()}
        journal = {"settings": self.settings, "documents": self.documents, "shards": shards}
        write_json(self.directory / JOURNAL, journal)
        for partial, shard in closed:
            partial.replace(shard)
            if self.finished:
                self.finished(shard)
