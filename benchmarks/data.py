"""Data: text to token shards beside a tiktoken loop, and batches from shards.

    python benchmarks/data.py
    python benchmarks/data.py --megabytes 1000 --workers 1 2 4 8 --tokenizer DIR

Shards: llmkit's `prepare_shards` beside a loop in the manner of build-nanogpt's fineweb.py: a multiprocessing Pool
over documents, tiktoken's encode_ordinary, uint16, numpy shards. Both get the same documents, in memory, and the same
vocabulary, GPT-2's from a folder (`--tokenizer`) or a BPE of 8,192 trained on the standard library, whose sources are
the text. Each runs on as many cores as it has workers, for reading, writing and encoding together, and its start
counts: llmkit's is about a second with GPT-2's vocabulary, so give it enough text. llmkit writes besides a validation
split, checksums and what a restart needs.

Batches: through the recipe's data loader, from shards to tensors, without a model.
"""

import argparse
import itertools
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tiktoken
from tiktoken_ext.openai_public import r50k_pat_str
from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from llmkit.data.corpus import Corpus
from llmkit.data.readers import split_document
from llmkit.data.sample_data import stdlib_sources
from llmkit.data.shards import prepare_shards
from llmkit.data.tokenizer import load_tokenizer, train_bpe_tokenizer
from loops import SHAPES, make_llmkit_trainer
from measuring import add_options, machine, print_table, report, take_turns, use_threads

# Characters of a document: a comment, a web page (FineWeb-Edu's mean is about 4,000), a book.
LENGTHS = {"short": 300, "page": 4_000, "book": 1_000_000}
SHARD_TOKENS = 100_000_000


class Documents(Corpus):
    """Texts in memory."""

    def __init__(self, texts: list[str]):
        self.texts, self.description = texts, f"{len(texts):,} documents"

    def in_pieces(self, skip: int = 0) -> Iterator[list[str]]:
        return (list(split_document(text)) for text in itertools.islice(self.texts, skip, None))

    def num_bytes(self) -> int:
        return sum(map(len, self.texts))  # an estimate: the text is nearly all ASCII

    def fingerprint(self) -> str:
        return self.description


def documents(megabytes: float, length: int) -> list[str]:
    """The standard library's sources, as often as it takes, cut into documents."""
    source = "".join(path.read_text(encoding="utf-8", errors="replace") for path in stdlib_sources())
    text = (source * (1 + int(megabytes * 1e6) // len(source)))[: int(megabytes * 1e6)]
    return [text[start : start + length] for start in range(0, len(text), length)]


def run_llmkit(texts: list[str], tokenizer: PreTrainedTokenizerBase, workers: int, folder: Path) -> int:
    manifest = prepare_shards(Documents(texts), tokenizer, folder, validation_fraction=0.1, num_workers=workers)
    return sum(split.tokens for split in manifest.splits.values())


def run_tiktoken(texts: list[str], tokenizer: PreTrainedTokenizerBase, workers: int, folder: Path) -> int:
    shard, used, total = np.empty(SHARD_TOKENS, dtype=np.uint16), 0, 0
    with multiprocessing.Pool(workers, start_tiktoken, (tokenizer.get_vocab(), tokenizer.eos_token)) as pool:
        for ids in pool.imap(encode_with_tiktoken, texts, chunksize=16):
            if used + len(ids) > SHARD_TOKENS:
                np.save(folder / f"shard_{total}", shard[:used])
                used = 0
            shard[used : used + len(ids)] = ids
            used, total = used + len(ids), total + len(ids)
    np.save(folder / f"shard_{total}", shard[:used])
    return total


def start_tiktoken(vocabulary: dict[str, int], end: str) -> None:
    """In each process of the pool: tiktoken's own GPT-2, with this vocabulary."""
    global encoding, end_id
    to_byte = {character: byte for byte, character in bytes_to_unicode().items()}
    end_id = vocabulary.pop(end)
    ranks = {bytes(to_byte[character] for character in token): rank for token, rank in vocabulary.items()}
    encoding = tiktoken.Encoding("gpt2", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens={end: end_id})


def encode_with_tiktoken(text: str) -> np.ndarray:
    ids = np.array([end_id, *encoding.encode_ordinary(text)])
    assert (ids >= 0).all() and (ids < 2**16).all()
    return ids.astype(np.uint16)


def measure_preparation(options: argparse.Namespace, peer: str, workers: int) -> dict[str, float]:
    use_threads(workers)
    tokenizer = load_tokenizer(options.tokenizer)
    run = {"llmkit": run_llmkit, "tiktoken loop": run_tiktoken}[peer]
    speeds = {}
    for name, length in LENGTHS.items():
        texts = documents(options.megabytes, length)
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            tokens = run(texts, tokenizer, workers, Path(folder))
            speeds[f"{name} documents"] = tokens / (time.perf_counter() - start)
    return speeds


def measure_batches(options: argparse.Namespace, preset: str) -> dict[str, float]:
    # A model of no size: only the sizes of the batches matter, and it is never run.
    small = {"n_layer": 1, "n_embd": 64, "n_head": 1, "vocab_size": 256, "bf16": False, "compile": False}
    shape = argparse.Namespace(**SHAPES[preset] | small, steps=options.batches)
    with tempfile.TemporaryDirectory() as folder:
        loader = make_llmkit_trainer(shape, folder).get_train_dataloader()
        start = time.perf_counter()
        tokens = sum(batch["input_ids"].numel() for batch in loader)
    seconds = time.perf_counter() - start
    return {"tokens/s": tokens / seconds, "us/batch": 1e6 * seconds / options.batches}


def measure(options: argparse.Namespace) -> dict[str, float]:
    peer, _, what = options.peer.partition(": ")
    return measure_batches(options, what) if peer == "batches" else measure_preparation(options, peer, int(what))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, rounds=3)
    parser.add_argument("--megabytes", type=float, default=100, help="of text (default 100)")
    parser.add_argument("--workers", type=int, nargs="+", default=sorted({1, os.cpu_count()}), help="cores, in turn")
    parser.add_argument("--tokenizer", metavar="DIR", help="a tokenizer of GPT-2's kind, of at most 65,536 tokens")
    parser.add_argument("--batches", type=int, default=5000, help="drawn for the second table (default 5,000)")
    options = parser.parse_args()
    if options.peer:
        report(measure(options))
        return
    use_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        if not options.tokenizer:
            train_bpe_tokenizer(documents(5, LENGTHS["page"]), 8192).save_pretrained(folder)
            sys.argv += ["--tokenizer", folder]
        vocabulary = len(load_tokenizer(options.tokenizer or folder))
        print(f"{options.megabytes:g} MB of text, vocabulary {vocabulary:,}; {options.rounds} rounds\n{machine()}")
        for workers in options.workers:
            print(f"shards, tokens/s on {workers} core(s)")
            peers = [f"{peer}: {workers}" for peer in ("llmkit", "tiktoken loop")]
            figures = {f"{name} documents": ",.0f" for name in LENGTHS}
            print_table(take_turns(peers, options.rounds), figures)
        print("batches from shards, one process")
        results = take_turns([f"batches: {preset}" for preset in SHAPES], options.rounds)
        print_table(results, {"tokens/s": ",.0f", "us/batch": ",.0f"})


if __name__ == "__main__":
    main()
