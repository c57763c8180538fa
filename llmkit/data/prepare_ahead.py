"""Tokenizing ahead of a run: `prepare: ahead` (see `ahead.py`).

A child process of each node's first rank writes the shards, and ends when that rank does. All ranks read from the
journal of its folder which shards are whole.
"""

import atexit
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import replace
from multiprocessing.connection import Connection, wait
from pathlib import Path

from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from llmkit.console import say
from llmkit.data.ahead import LOOK, AheadWindows, finished_shards, first_group
from llmkit.data.arguments import DataArguments
from llmkit.data.corpus import Corpus
from llmkit.data.manifest import MANIFEST, Manifest, load_manifest
from llmkit.data.preparation import check_settings
from llmkit.data.prepare import is_prepared_elsewhere, opened_source, prepare_pretraining_data
from llmkit.data.shards import make_manifest, shard_settings
from llmkit.data.windows import TokenWindows
from llmkit.errors import UserError
from llmkit.signals import ignore_signals


class PreparingProcess:
    """A child process that prepares the shards of a source, and ends when this one does, however it ends."""

    def __init__(self, args: DataArguments, how: Mapping[str, int]):
        context = multiprocessing.get_context("spawn")  # a fork would have this one's threads, and its ranks' sockets
        self.told, teller = context.Pipe(duplex=False)
        self._problem: str | None = None
        self.process = context.Process(target=_prepare, args=(args, dict(how), teller))
        self.process.start()
        teller.close()
        atexit.register(self.stop)

    def problem(self) -> str | None:
        """What it has failed of; None while it is at work, and when it is done."""
        code = self.process.exitcode
        if code and self._problem is None:
            try:
                self._problem = str(self.told.recv())
            except EOFError:
                what = f"was ended by signal {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
                self._problem = f"the process that tokenizes the text {what}"
        return self._problem

    def stop(self) -> None:
        """End it. It goes on after its last full shard when it is started again."""
        self.process.kill()
        self.process.join()


def _prepare(args: DataArguments, how: dict[str, int], teller: Connection) -> None:
    """The child's work."""
    ignore_signals()  # they are for the run, which ends this one
    parent = multiprocessing.parent_process()
    assert parent is not None, "this is a child"
    threading.Thread(target=lambda: (wait([parent.sentinel]), os._exit(1)), daemon=True).start()
    os.nice(10)  # a step that could be made comes first
    tqdm.set_lock(threading.RLock())  # its own is one between processes, which is left behind where this one is killed
    try:
        prepare_pretraining_data(args, close_together=True, show_progress=False, **how)
    except UserError as error:
        teller.send(str(error))
        sys.exit(1)


def prepare_ahead(
    args: DataArguments, block_size: int, **how: int
) -> tuple[PreTrainedTokenizerBase, AheadWindows, TokenWindows]:
    """Start to tokenize the text, and wait for the first group of shards. All ranks call it.

    Args:
        how: `prepare_shards`' `shard_tokens` and `num_workers`.

    Raises:
        UserError: what `prepare_pretraining_data` and `TokenWindows` refuse.
    """
    group, child = args.shard_group or 1, None
    if is_prepared_elsewhere(args):
        tokenizer, manifest = prepare_pretraining_data(args)
        check_settings(manifest.directory, manifest.settings, {"close_together": 1})
        first, expected = first_group(manifest, group), manifest.splits["train"].tokens
        return (
            tokenizer,
            AheadWindows(first, block_size, group, expected),
            TokenWindows(first, "validation", block_size),
        )
    with opened_source(args) as (corpus, tokenizer, directory):
        settings = shard_settings(
            corpus,
            tokenizer,
            args.validation_fraction,
            args.validation_split,
            close_together=True,
            **{name: value for name, value in how.items() if name == "shard_tokens"},
        )
        if not (directory / MANIFEST).exists() and os.environ.get("LOCAL_RANK", "0") == "0":
            child = PreparingProcess(replace(args, data_dir=str(directory)), how)
            say(f"shards: training starts when the first {group} of {directory} are whole")
        try:
            while (first := _first_group(directory, corpus, tokenizer, settings, group)) is None:
                if child and (problem := child.problem()):
                    raise UserError(problem)
                time.sleep(LOOK)
        except UserError:
            if child:
                child.stop()
            raise
    train = AheadWindows(first, block_size, group, _expected_tokens(corpus, first), child)
    return tokenizer, train, TokenWindows(first, "validation", block_size)


def _first_group(
    directory: Path, corpus: Corpus, tokenizer: PreTrainedTokenizerBase, settings: dict, group: int
) -> Manifest | None:
    """The first group's manifest if it is whole, whether or not more will come."""
    if (directory / MANIFEST).exists():
        manifest = load_manifest(directory, tokenizer)
        check_settings(directory, manifest.settings, settings)
    else:
        shards = finished_shards(directory, settings)
        if len(shards["train"]) < group or not shards["validation"]:
            return None
        manifest = make_manifest(corpus, tokenizer, settings, shards, directory)
    return first_group(manifest, group)


def _expected_tokens(corpus: Corpus, first: Manifest) -> int | None:
    """Tokens of the training split, reckoned from the size of the text and what it became in the first group."""
    num_bytes, train = corpus.num_bytes(), first.splits["train"]
    share = 1 - float(first.settings["validation_fraction"])
    return None if num_bytes is None else max(train.tokens, round(num_bytes * share * train.tokens / train.bytes))
