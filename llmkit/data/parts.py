"""A preparation of token shards in several tasks: each makes the shards of its part of the corpus, the last merges.

    shards/parts/plan.json          what the tasks have to agree on
    shards/parts/00000/             the shards of the first part, and `part.json` when it is whole
    shards/train_00000.bin ...      after the merge, the parts' shards in the order of the tasks

The parts are consecutive stretches of the corpus, so the documents come in the order in which one process writes them,
and each is held out or not by its hash alone. What the shards hold depends on the number of tasks, because each task
closes its last shards, and on nothing else: not on where tasks run, how many at a time, or in what order they end.

A task that was killed goes on after its last full shard, as a preparation by one process does. How the tasks are run
is the business of `executors.py`.
"""

import json
import os
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict

from huggingface_hub.errors import StrictDataclassError
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from llmkit.data.corpus import Corpus
from llmkit.data.encoding import token_dtype
from llmkit.data.manifest import JOURNAL, MANIFEST, PARTS, SPLITS, Manifest, Shard
from llmkit.data.places import LocalPlace, Place
from llmkit.data.preparation import Preparation, check_settings
from llmkit.data.shards import check_disk, check_splits, hold_out_whole, make_manifest, shard_settings
from llmkit.errors import UserError
from llmkit.files import json_bytes

PLAN = f"{PARTS}/plan.json"


class Parts:
    """The tasks of one preparation. A task needs nothing but this object, which can be sent to another machine.

    Args:
        corpus, tokenizer: what is tokenized, and with what.
        place: where the shards come together; all tasks see it under the same name.
        settings: of the shards (`shard_settings`).
        tasks: into how many parts the corpus is divided.
        num_workers: threads of each task.

    Raises:
        UserError: the corpus cannot be divided so often, the disk is too small, or the place holds the parts of
            another preparation.
    """

    def __init__(
        self,
        corpus: Corpus,
        tokenizer: PreTrainedTokenizerBase,
        place: Place,
        settings: dict,
        tasks: int,
        num_workers: int = 1,
    ):
        self.corpora = corpus.divided(tasks) if tasks > 1 else [corpus]
        self.corpus, self.tokenizer, self.place = corpus, tokenizer, place
        self.settings, self.num_workers = settings, num_workers
        if self._is_there(JOURNAL):
            raise UserError(
                f"{place}: its preparation by one process did not finish: give its command again, without "
                "--executor, or delete the folder"
            )
        is_planned = self._is_there(PLAN)
        if not is_planned:
            where = place.directory if isinstance(place, LocalPlace) else str(place)
            check_disk(corpus, corpus.num_bytes(), tokenizer, where, done=0)
        # The whole corpus decides it: a part may have too few documents to tell.
        self.plan = settings | {"tasks": tasks, "whole_documents": hold_out_whole(corpus, settings)}
        if is_planned:
            check_settings(place, self._read(PLAN), self.plan)
        else:
            place.write(PLAN, json_bytes(self.plan))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.corpus.description}, {len(self.corpora)} tasks)"

    def _is_there(self, name: str) -> bool:
        return self.place.size(name) is not None

    def _read(self, name: str) -> dict:
        try:
            return dict(json.loads(self.place.read(name)))
        except (OSError, ValueError, TypeError, RecursionError) as error:
            raise UserError(
                f"{self.place}/{name} is damaged ({error}): delete its folder and prepare the shards again"
            ) from error

    def prepare(self, task: int) -> dict[str, list[Shard]]:
        """Do the work of a task, or what is left of it. Returns the shards of its part.

        Raises:
            UserError: text that cannot be read, a full disk, a folder that was made with other settings.
        """
        with self.place.working(_folder(task)) as (folder, finished):
            if not self._is_there(_record(task)):
                settings = self.plan | {"task": task}
                with closing(
                    Preparation(self.corpora[task], self.tokenizer, folder, settings, finished)
                ) as preparation:
                    preparation.write(self.plan["whole_documents"], self.num_workers, tqdm(disable=True))
                    shards = preparation.finish()
                part = {split: [asdict(shard) for shard in written] for split, written in shards.items()}
                self.place.write(_record(task), json_bytes({"settings": settings, "shards": part}))
        return self._shards(task)

    def _shards(self, task: int) -> dict[str, list[Shard]]:
        part, name = self._read(_record(task)), f"{self.place}/{_record(task)}"
        try:
            check_settings(name, part["settings"], self.plan | {"task": task})
            return {split: [Shard(**shard) for shard in part["shards"][split]] for split in SPLITS}
        except (TypeError, KeyError, AttributeError, StrictDataclassError) as error:
            raise UserError(f"{name} is damaged ({error}): delete {self.place}") from error

    def merge(self) -> Manifest:
        """Check the parts of all tasks, and make one dataset of them. Killed in the middle, it can be done again.

        Raises:
            UserError: a task has not finished, a shard is missing or truncated, a split is empty.
        """
        with self.place.alone():
            if not self._is_there(MANIFEST):
                moves = list(self._moves())
                shards = {split: [shard for of, _, shard in moves if of == split] for split in SPLITS}
                check_splits(self.corpus, shards, self.settings["validation_fraction"])
                for _, source, shard in moves:
                    if self._is_there(source):
                        self.place.move(source, shard.name)
                manifest = make_manifest(self.corpus, self.tokenizer, self.settings, shards, None)
                self.place.write(MANIFEST, json_bytes(manifest.fields()))
            self.place.remove(PARTS)
        return self.place.manifest()

    def _moves(self) -> Iterator[tuple[str, str, Shard]]:
        """Each shard's split, its file in the folder of its task, and what it is called in the end."""
        if missing := [task for task in range(len(self.corpora)) if not self._is_there(_record(task))]:
            raise UserError(
                f"{self.place}: {len(missing):,} of {len(self.corpora):,} tasks have not finished (the first is "
                f"{missing[0]}): give the command again, and only these are run"
            )
        dtype, count = token_dtype(self.tokenizer), dict.fromkeys(SPLITS, 0)
        for task in range(len(self.corpora)):
            for split, shards in self._shards(task).items():
                for shard in shards:
                    source, name = f"{_folder(task)}/{shard.name}", f"{split}_{count[split]:05d}.bin"
                    count[split] += 1
                    size = self.place.size(source)
                    if size is not None:
                        shard.check_size(size, f"{self.place}/{source}", dtype)
                    else:  # a merge that was killed has moved it
                        shard.check_size(self.place.size(name), f"{self.place}/{name}", dtype)
                    shard.name = name
                    yield split, source, shard


def prepare_alone(
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerBase,
    place: Place,
    *,
    validation_fraction: float,
    validation_split: str,
    shard_tokens: int = 100_000_000,
    num_workers: int | None = None,
) -> Manifest:
    """`prepare_shards` for any place: this process does the only task. The shards are the same.

    Raises:
        UserError: what `prepare_shards` refuses, and a place that cannot be written to.
    """
    if num_workers is not None and num_workers < 1:
        raise UserError(f"num_workers is {num_workers}: give 1 or more threads")
    settings = shard_settings(corpus, tokenizer, validation_fraction, validation_split, shard_tokens)
    if manifest := finished(place, settings):
        return manifest
    parts = Parts(corpus, tokenizer, place, settings, 1, num_workers or os.cpu_count() or 1)
    parts.prepare(0)
    return parts.merge()


def finished(place: Place, settings: dict) -> Manifest | None:
    """The manifest where all is done; what a merge leaves that is killed at its end is removed.

    Raises:
        UserError: the shards were made with other settings.
    """
    if place.size(MANIFEST) is None:
        return None
    manifest = place.manifest()
    check_settings(place, manifest.settings, settings)
    place.remove(PARTS)
    place.remove(f"{MANIFEST}.tmp")
    return manifest


def _folder(task: int) -> str:
    return f"{PARTS}/{task:05d}"


def _record(task: int) -> str:
    """Says that a task is done, and what its shards are."""
    return f"{_folder(task)}/part.json"
