"""Training data from several sources: what share of each step comes from which of them.

Each source has shards, windows and a seeded order of its own. How many windows of each are in the batch of a step is
reckoned from the weights, so that after every step the sources' shares of all windows so far are the weights, to about
one window. Which windows they are follows from the seed. So the composition and the content of a step are functions of
(seed, step), at any number of ranks, and a resumed run replays nothing.
"""

import copy
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler
from transformers import PreTrainedTokenizerBase

from llmkit.data.ahead import AheadWindows, manifest_of_run
from llmkit.data.manifest import SPLITS, Manifest, Shard, Split, load_manifest
from llmkit.data.order import BatchSizes
from llmkit.data.windows import TokenWindows
from llmkit.errors import UserError

Weights = Mapping[int, float]  # the weight of a source after so many steps, from 0 on


class StepBatches(BatchSizes, Protocol):
    """The micro-batches of a run, in windows, and how they make up its steps (`batch_ramp.Batches`)."""

    micro_batches: int  # of a step
    step_sizes: np.ndarray  # windows of each step
    ends: np.ndarray  # windows of the steps before each step


class MixedWindows(Dataset):
    """The windows of one split of several sources, numbered through in the order of the sources.

    For training, `sampler` draws them by weight. For validation they are all there, each once: the loss is that of the
    held-out text of all sources together.

    Args:
        sources: windows of one block size and one tokenizer, by the source's name.
        weights: of each source.

    Raises:
        UserError: shards that were made with different tokenizers.
    """

    def __init__(self, sources: Mapping[str, TokenWindows], weights: Mapping[str, Weights]):
        self.sources, self.weights = dict(sources), {name: dict(weights[name]) for name in sources}
        first = next(iter(self.sources.values()))
        self.block_size, self.vocab_size = first.block_size, first.vocab_size
        self.num_tokens = sum(windows.num_tokens for windows in self.sources.values())
        self.num_bytes = sum(windows.num_bytes for windows in self.sources.values())
        # ends[k] is the number of the first window after source k.
        self.ends = np.cumsum([len(windows) for windows in self.sources.values()])
        self.num_windows = int(self.ends[-1])
        self.manifest = _manifest({name: windows.manifest for name, windows in self.sources.items()})

    @property
    def tokens_per_byte(self) -> float:
        """Turns a mean loss per token into bits per byte: loss * tokens_per_byte / ln 2."""
        return self.num_tokens / self.num_bytes

    def __len__(self) -> int:
        return self.num_windows

    def __getitems__(self, indices: Sequence[int]) -> dict[str, torch.Tensor]:
        """`input_ids` and `shift_labels`, both (B, T) and int64."""
        rows = [windows.__getitems__([own]) for windows, own in map(self.locate, indices)]
        return {name: torch.cat([row[name] for row in rows]) for name in ("input_ids", "shift_labels")}

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """`input_ids` and `shift_labels`, both (T,) and int64."""
        return {name: batch[0] for name, batch in self.__getitems__([index]).items()}

    def locate(self, index: int) -> tuple[TokenWindows, int]:
        """Where a window comes from: the windows of its source, and its number in them."""
        if not 0 <= index < self.num_windows:
            raise IndexError(f"window {index} of {self.num_windows}")
        # A window that only pads a batch is one of the last source.
        source = min(int(np.searchsorted(self.ends, index, side="right")), len(self.ends) - 1)
        return list(self.sources.values())[source], index - int(self.ends[source - 1] if source else 0)

    def padded_to_multiple_of(self, multiple: int) -> "MixedWindows":
        """The same windows, and as many after them, with every label ignored, as make `len` a multiple."""
        padded = copy.copy(self)
        padded.num_windows = -(-self.num_windows // multiple) * multiple
        *others, (name, last) = self.sources.items()
        longer = copy.copy(last)
        longer.num_windows = len(last) + padded.num_windows - self.num_windows
        padded.sources = {**dict(others), name: longer}
        return padded

    def beginnings(self, tokenizer: PreTrainedTokenizerBase, count: int = 2) -> list[str]:
        """Beginnings of the first documents of each source, as prompts to watch a model learn with."""
        found = [windows.beginnings(tokenizer, 1) for windows in self.sources.values()]
        return list(dict.fromkeys(itertools.chain.from_iterable(found)))[:count]

    def verify(self) -> None:
        """Read every shard of every source and compare its checksum.

        Raises:
            UserError: a shard is damaged.
        """
        for windows in self.sources.values():
            windows.manifest.verify()

    def sampler(self, batches: StepBatches, seed: int) -> "MixtureSampler":
        """The order in which a run draws the windows."""
        return MixtureSampler(list(self.sources.values()), self.weights, batches, seed)


def windows_of_record(data: Mapping, split: str, block_size: int) -> TokenWindows | MixedWindows:
    """The windows of the run whose record has this `data`.

    Raises:
        UserError: the shards are not there any more, or hold other tokens now.
    """
    if data.get("prepare") == "ahead":
        first, group = _recorded(data), data["shard_group"]
        return AheadWindows(first, block_size, group) if split == "train" else TokenWindows(first, split, block_size)
    if "sources" not in data:
        return TokenWindows(_recorded(data), split, block_size, data.get("shard_group"))
    windows, weights = {}, {}
    for name, source in data["sources"].items():
        windows[name] = TokenWindows(_recorded(source), split, block_size, source.get("shard_group"))
        weights[name] = {int(step): weight for step, weight in source["weights"].items()}
    return MixedWindows(windows, weights)


def _recorded(source: Mapping) -> Manifest:
    manifest = manifest_of_run(load_manifest(source["directory"]), source)
    if manifest.fingerprint != source["fingerprint"]:
        raise UserError(f"{manifest.place} holds other tokens than those of the run: find the run's own shards")
    return manifest


class MixtureSampler(Sampler[list[int]]):
    """Micro-batches of window numbers of `MixedWindows`, over all ranks and the whole run.

    Args:
        sources: the windows of each.
        weights: of each source, in the same order.
        batches: the micro-batches of the run.

    Attributes:
        skipped: the batches of whole steps that a resumed run does not want, as in `WindowBatchSampler`.

    Raises:
        UserError: a step would take more windows of a source than it has.
    """

    drop_last = False  # read by accelerate's BatchSamplerShard, which lets batches without a `batch_size` vary
    skipped = 0

    def __init__(
        self, sources: Sequence[TokenWindows], weights: Mapping[str, Weights], batches: StepBatches, seed: int
    ):
        self.batches, self.seed = batches, seed
        lengths = [len(windows) for windows in sources]
        # drawn[s, k]: windows of source k in the steps before step s, which counts from 0.
        self.drawn = compositions(list(weights.values()), batches.step_sizes)
        for name, length, most in zip(weights, lengths, np.diff(self.drawn, axis=0).max(axis=0), strict=True):
            if most > length:
                raise UserError(
                    f"data: {name} has {length:,} windows, and a step would take {most:,} of them: give it a smaller "
                    "weight, or more text, or take a smaller total_batch_tokens"
                )
        seeds = np.random.SeedSequence(seed).generate_state(len(lengths)).tolist()
        self.orders = [windows.order(own) for windows, own in zip(sources, seeds, strict=True)]
        self.firsts = [0, *itertools.accumulate(lengths)]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        yield from itertools.repeat([], self.skipped)
        sizes = itertools.islice(self.batches, self.skipped, None)
        for step in range(self.skipped // self.batches.micro_batches, len(self.batches.step_sizes)):
            rest = self.step_windows(step)
            for size in itertools.islice(sizes, self.batches.micro_batches):
                yield rest[:size]
                rest = rest[size:]

    def step_windows(self, step: int) -> list[int]:
        """The windows of a step, counted from 0, in the order in which its micro-batches share them out."""
        found = np.concatenate(
            [
                np.array(order.windows(int(start), int(stop)), dtype=np.int64) + first
                for order, first, start, stop in zip(
                    self.orders, self.firsts, self.drawn[step], self.drawn[step + 1], strict=False
                )
            ]
        )
        # Mixed, so that no rank gets all of one source.
        return np.random.default_rng([self.seed, step]).permutation(found).tolist()

    def windows(self, start: int, stop: int) -> list[int]:
        """The windows from place `start` to before `stop` of the whole run's order; both are in one step."""
        step = int(np.searchsorted(self.batches.ends, start, side="right")) - 1
        before = int(self.batches.ends[step])
        return self.step_windows(step)[start - before : stop - before]


def compositions(weights: Sequence[Weights], step_sizes: np.ndarray) -> np.ndarray:
    """How many windows of each source the steps before each step have: (steps + 1, sources), the first row zeros.

    A step's windows are shared out by how many each source lacks to its share of all windows so far, whole windows
    first and the rest by the largest remainder, so that what rounding takes from a source now, it gets later.
    """
    drawn = np.zeros((len(step_sizes) + 1, len(weights)), dtype=np.int64)
    wanted = np.zeros(len(weights))
    changes = {step for weight in weights for step in weight}
    shares = wanted
    for step, size in enumerate(step_sizes):
        if step in changes:
            now = np.array([weight[max(begin for begin in weight if begin <= step)] for weight in weights])
            shares = now / now.sum()
        wanted = wanted + shares * size
        lacking = np.maximum(wanted - drawn[step], 0.0)
        parts = lacking / lacking.sum() * size
        given = np.floor(parts + 1e-9).astype(np.int64)
        largest = np.argsort(given - parts, kind="stable")[: size - given.sum()]
        given[largest] += 1
        drawn[step + 1] = drawn[step] + given
    return drawn


def _manifest(manifests: Mapping[str, Manifest]) -> Manifest:
    """What the sources are together, for the record of a run: one shard stands for all of a source's."""
    first_name, first = next(iter(manifests.items()))
    for name, manifest in manifests.items():
        if manifest.settings["tokenizer"] != first.settings["tokenizer"]:
            raise UserError(
                f"data: {first_name} and {name} were tokenized differently: prepare both with one tokenizer"
            )
    splits = {}
    for split in SPLITS:
        parts = {name: manifest.splits[split] for name, manifest in manifests.items()}
        splits[split] = Split.of(
            [
                Shard(name, part.tokens, part.documents, part.bytes, part.unknown_tokens, manifests[name].fingerprint)
                for name, part in parts.items()
            ]
        )
    corpus = "; ".join(f"{name}: {manifest.corpus}" for name, manifest in manifests.items())
    settings = {"corpus": corpus, "tokenizer": first.settings["tokenizer"]}
    return Manifest(None, first.dtype, first.vocab_size, first.eos_token_id, corpus, settings, splits)
