"""The format of token shards: what a folder of them holds, and how to find out.

A folder holds `train_00000.bin`, ..., `validation_00000.bin`, ..., plain arrays of little-endian `uint16` (`uint32`
for vocabularies over 65,536), and `manifest.json`, which is written last: a folder without it is not a dataset. Every
document is followed by `<|endoftext|>`. (build-nanogpt puts it before. In a flat stream the two differ by one token
at each end; after, the last document is closed like all others, and "finished" is what the token says.)
"""

import hashlib
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from huggingface_hub import constants
from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedTokenizerBase

from llmkit.data.fetching import PATIENCE, patiently, read
from llmkit.data.files import is_remote
from llmkit.data.tokenizer import tokenizer_fingerprint
from llmkit.errors import UserError
from llmkit.files import checksum

FORMAT_VERSION = 1
SPLITS = ("train", "validation")
MANIFEST, JOURNAL = "manifest.json", "journal.json"  # the journal is there while shards are being written
PARTS = "parts"  # a folder, there while several tasks write shards


@strict
@dataclass
class Shard:
    """One file of tokens: what it holds, and its checksum."""

    name: str
    tokens: int = 0
    documents: int = 0
    bytes: int = 0
    unknown_tokens: int = 0
    xxh3_64: str = ""

    def check_file(self, directory: Path, dtype: np.dtype) -> None:
        """Raise UserError if the file is missing or has another size; its contents are not read."""
        path = directory / self.name
        self.check_size(path.stat().st_size if path.exists() else None, path, dtype)

    def check_size(self, size: int | None, path: Path | str, dtype: np.dtype) -> None:
        """Raise UserError if the file has not the size that it should have; None for one that is missing."""
        expected = self.tokens * dtype.itemsize
        if size != expected:
            found = "is missing" if size is None else f"has {size:,} bytes instead of {expected:,}"
            raise UserError(f"{path} {found}: delete the folder and prepare the shards again")


@strict
@dataclass
class Split:
    """The shards of one split in order, and their sums.

    `bytes` are those of the UTF-8 text, so that bits_per_byte = loss * tokens / (ln 2 * bytes).
    """

    tokens: int
    documents: int
    bytes: int
    unknown_tokens: int
    shards: list[Shard]

    @classmethod
    def of(cls, shards: list[Shard]) -> "Split":
        """The split that has these shards."""
        counts = ("tokens", "documents", "bytes", "unknown_tokens")
        return cls(**{count: sum(getattr(shard, count) for shard in shards) for count in counts}, shards=shards)


@strict
@dataclass
class Manifest:
    """What a folder of finished shards holds and what it was made from; without a folder, tokens in memory.

    Of shards at a `url`, the folder is where they are kept on this machine when they have been fetched.
    """

    directory: Path | None
    dtype: str
    vocab_size: int
    eos_token_id: int
    corpus: str
    settings: dict[str, int | float | str]
    splits: dict[str, Split]
    url: str | None = None

    @property
    def place(self) -> str | None:
        """The folder or the URL, as it is given to find the shards again."""
        return self.url or (str(self.directory) if self.directory else None)

    @property
    def fingerprint(self) -> str:
        """A hash of the tokens, their order and what they mean; a copy of the folder has the same one."""
        checksums = {name: [shard.xxh3_64 for shard in split.shards] for name, split in self.splits.items()}
        parts = [self.settings["corpus"], self.settings["tokenizer"], checksums]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]

    def check(self) -> None:
        """Raise ValueError where the fields contradict each other, as those of a damaged file may."""
        names = [shard.name for split in self.splits.values() for shard in split.shards]
        counts = [count for split in self.splits.values() for count in (split.tokens, split.documents, split.bytes)]
        if tuple(self.splits) != SPLITS or any(not _is_plain(name) for name in names):
            raise ValueError("splits")
        if any(Split.of(split.shards) != split for split in self.splits.values()) or min(counts) < 1:
            raise ValueError("the counts of tokens, documents and bytes")
        if self.dtype not in ("uint16", "uint32") or not 0 <= self.eos_token_id < self.vocab_size:
            raise ValueError("dtype, vocab_size and eos_token_id")
        for name in ("corpus", "tokenizer"):
            if not isinstance(self.settings[name], str):
                raise ValueError(f"settings: {name}")

    def verify(self) -> None:
        """Read every shard and compare its checksum, so that no flipped byte is trained on.

        Those of a URL are compared when they are fetched.

        Raises:
            UserError: a shard is damaged.
        """
        if self.directory is None or self.url is not None:  # tokens in memory, which no disk has kept
            return
        shards = [shard for split in self.splits.values() for shard in split.shards]
        with ThreadPoolExecutor(max_workers=4) as pool:  # reading and hashing leave Python to itself
            found = pool.map(lambda shard: checksum(self.directory / shard.name), shards)
            for shard, digest in zip(shards, found, strict=True):
                if digest != shard.xxh3_64:
                    raise UserError(
                        f"{self.directory / shard.name} is damaged: its checksum is not the one of its preparation: "
                        "delete the folder and prepare the shards again"
                    )

    def fields(self) -> dict:
        """What `manifest.json` says. The folder is left out, so that it can be moved."""
        fields = asdict(self)
        del fields["directory"], fields["url"]
        return fields


def _is_plain(name: str) -> bool:
    """Whether it names a file within the folder."""
    return name not in ("", ".", "..") and os.path.basename(name) == name and "\0" not in name


def load_manifest(
    shard_dir: str | Path, tokenizer: PreTrainedTokenizerBase | None = None, patience: float = PATIENCE
) -> Manifest:
    """Read the manifest of a folder of shards; the files' sizes are checked, their contents are not read.

    Args:
        shard_dir: the folder, or a URL, of which the manifest alone is fetched.
        tokenizer: if given, it has to be the one that the shards were made with.
        patience: seconds for which a URL that cannot be reached is tried again.

    Raises:
        UserError: no finished shards there, a missing or truncated shard, another tokenizer.
    """
    if is_remote(str(shard_dir)):
        manifest = _at_url(str(shard_dir).rstrip("/"), patience)
    else:
        manifest = _in_folder(Path(shard_dir))
    if tokenizer is not None:
        check_tokenizer(manifest, tokenizer)
    return manifest


def check_tokenizer(manifest: Manifest, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise UserError if the shards were made with another one."""
    made_with, given = manifest.settings["tokenizer"], tokenizer_fingerprint(tokenizer)
    if made_with != given:
        raise UserError(
            f"{manifest.place}: its shards were made with another tokenizer (fingerprint {made_with}, not {given}): "
            "use that tokenizer, or prepare shards with this one in another folder"
        )


def _in_folder(directory: Path) -> Manifest:
    path = directory / MANIFEST
    if not path.exists():
        begun = (directory / JOURNAL).exists() or (directory / PARTS).exists()
        unfinished = "its preparation did not finish: run it again" if begun else "no shards"
        raise UserError(f"{directory}: {unfinished} ({MANIFEST} is missing)")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    manifest = parse_manifest(data, path, directory)
    for split in manifest.splits.values():
        for shard in split.shards:
            shard.check_file(directory, np.dtype(manifest.dtype))
    return manifest


def _at_url(url: str, patience: float) -> Manifest:
    path = f"{url}/{MANIFEST}"
    manifest = parse_manifest(patiently(lambda: read(path), path, time.monotonic() + patience), path, None)
    if any(not shard.name.endswith(".bin") for split in manifest.splits.values() for shard in split.shards):
        raise UserError(f"{path}: not a manifest of token shards (their names): choose another folder")
    manifest.directory, manifest.url = Path(constants.HF_HOME) / "llmkit" / "shards" / manifest.fingerprint, url
    return manifest


def parse_manifest(data: bytes, path: Path | str, directory: Path | None) -> Manifest:
    """What `manifest.json` holds, without a look at the shards.

    Args:
        path: where it was read, for messages.

    Raises:
        UserError: it is damaged, or of another version.
    """
    try:
        fields = json.loads(data)
        splits = {
            name: Split(**split | {"shards": [Shard(**shard) for shard in split["shards"]]})
            for name, split in fields.pop("splits").items()
        }
        manifest = Manifest(directory=directory, splits=splits, **fields)
        version = manifest.settings["format_version"]
        manifest.check()
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, StrictDataclassError) as error:
        raise UserError(f"{path}: not a manifest of token shards ({error}): choose another folder") from error
    if version != FORMAT_VERSION:
        raise UserError(
            f"{path}: format version {version}, this llmkit reads {FORMAT_VERSION}: prepare the shards again"
        )
    return manifest
