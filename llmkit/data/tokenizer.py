"""Tokenizers: train a byte-level BPE or a character tokenizer, or load an existing one.

What is trained here is saved with `save_pretrained` and opens with plain `AutoTokenizer.from_pretrained`, without
llmkit.
"""

import hashlib
import json
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, GPT2Tokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from llmkit.data.arguments import check_vocab_size
from llmkit.data.readers import split_document
from llmkit.errors import UserError, reason
from llmkit.hub_access import ask_hub_once
from llmkit.paths import local_path

END_OF_TEXT = "<|endoftext|>"
UNKNOWN = "<|unknown|>"

logger = logging.getLogger(__name__)


def train_bpe_tokenizer(documents: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE with GPT-2's pre-tokenization.

    Ids are laid out as GPT-2's: the 256 bytes, then the merges in the order learned, then `<|endoftext|>`. With all
    bytes present nothing is ever unknown, and `decode(encode(text)) == text` for any text. The library uses every
    core; 10 MB of Python take about 2 s on two.

    Args:
        documents: the text to learn from, read once.
        vocab_size: total number of tokens, `<|endoftext|>` included. A text with too few distinct words to reach it
            gives fewer tokens, and a warning.
    """
    check_vocab_size(vocab_size)
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[],
        show_progress=False,
    )
    # The cores share the work text by text, so one large file is handed over in pieces.
    backend.train_from_iterator((piece for document in documents for piece in split_document(document)), trainer)
    model = json.loads(backend.to_str())["model"]
    tokenizer = byte_level_bpe(model["vocab"], [tuple(merge) for merge in model["merges"]])
    if len(tokenizer) < vocab_size:
        logger.warning(
            "The text was too small for a vocabulary of %s tokens: it gave %s.",
            f"{vocab_size:,}",
            f"{len(tokenizer):,}",
        )
    return tokenizer


def byte_level_bpe(vocab: dict[str, int], merges: Sequence[tuple[str, ...]]) -> PreTrainedTokenizerFast:
    """A byte-level BPE with GPT-2's pre-tokenization from a vocabulary and its merges, most frequent first.

    `<|endoftext|>` is beginning and end of text, and gets the next free id if the vocabulary lacks it.
    """
    # transformers' own class for it, so that the saved folder names a class which every release of transformers,
    # and every tool that reads GPT-2 checkpoints, knows.
    return GPT2Tokenizer(
        vocab=vocab if END_OF_TEXT in vocab else {**vocab, END_OF_TEXT: len(vocab)},
        merges=merges,  # pyrefly: ignore[bad-argument-type]  it takes pairs, and says that it takes texts
        clean_up_tokenization_spaces=False,
    )


def bpe_from_files(vocab_file: str | Path, merges_file: str | Path) -> PreTrainedTokenizerFast:
    """The tokenizer of published GPT-2 style files, `vocab.json` and `merges.txt`."""
    vocab = json.loads(Path(vocab_file).read_text(encoding="utf-8"))
    lines = Path(merges_file).read_text(encoding="utf-8").split("\n")
    merges = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
    return byte_level_bpe(vocab, merges)


def _is_vocabulary_alone(folder: Path) -> bool:
    """Whether a folder holds GPT-2's published files and nothing that tells AutoTokenizer what they are."""
    others = ("tokenizer.json", "tokenizer_config.json", "config.json")
    return all((folder / name).is_file() for name in ("vocab.json", "merges.txt")) and not any(
        (folder / name).exists() for name in others
    )


def train_character_tokenizer(documents: Iterable[str]) -> PreTrainedTokenizerFast:
    """One token per character (Unicode code point) of the documents, in code point order, then two special tokens.

    A character that the documents do not have becomes `<|unknown|>`, one for each; count them with
    `unknown_token_id`.
    """
    characters: set[str] = set()
    for document in documents:
        characters.update(document)
    vocab = {token: index for index, token in enumerate([*sorted(characters), END_OF_TEXT, UNKNOWN])}
    # A BPE without merges leaves characters alone, several times faster than splitting a text into one-letter words.
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token=UNKNOWN))
    # Lines instead of a whole document at a time: changes no id, and makes encoding three times faster.
    backend.pre_tokenizer = pre_tokenizers.Split("\n", "merged_with_previous")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        unk_token=UNKNOWN,
        clean_up_tokenization_spaces=False,
    )


def load_tokenizer(name_or_path: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Load a tokenizer from a folder, or from the Hub at some revision.

    Raises:
        UserError: it is not there, it is not one of the fast ones that preparing shards needs, or it has no
            end-of-text token to separate documents with.
    """
    path = local_path(name_or_path)
    if path and not path.is_dir():
        raise UserError(f"tokenizer {name_or_path}: this is a file; give a tokenizer's folder or its name on the Hub")
    try:
        if path and _is_vocabulary_alone(path):
            return bpe_from_files(path / "vocab.json", path / "merges.txt")
        if path is None:
            ask_hub_once()
        tokenizer = AutoTokenizer.from_pretrained(
            str(path or name_or_path), revision=revision, trust_remote_code=False
        )
    except Exception as error:  # of a damaged tokenizer.json, the tokenizers package raises Exception itself
        place = "this folder holds no tokenizer" if path else "not a folder here, and not read from the Hub"
        raise UserError(f"tokenizer {name_or_path}: {place} ({reason(error)})") from error
    # By a GPT-2's config.json AutoTokenizer makes one without any token where its files are not there.
    if tokenizer is None or not tokenizer("a")["input_ids"]:
        raise UserError(f"tokenizer {name_or_path}: no tokenizer's files there: copy those that belong to the model")
    if not tokenizer.is_fast:
        raise UserError(f"tokenizer {name_or_path}: it has no fast version (tokenizer.json); choose one that has")
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"tokenizer {name_or_path}: it has no end-of-text token, which separates documents; "
            "choose one that has, or set eos_token in its tokenizer_config.json"
        )
    return tokenizer


def decode(tokenizer: PreTrainedTokenizerBase, ids, **how: bool) -> str:
    """The text of one list, array or tensor of ids; `tokenizer.decode` also takes several, and gives a list then."""
    text = tokenizer.decode(ids, **how)
    assert isinstance(text, str)
    return text


def as_prompt(question: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """The question as the model is asked it, up to where its answer begins."""
    messages = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert isinstance(prompt, str)
    return prompt


def document_encoder(tokenizer: PreTrainedTokenizerBase) -> tokenizers.Tokenizer:
    """A copy of the tokenizer's fast backend that encodes documents as they are.

    It neither pads nor truncates, adds no special token, and reads the text of a special token as ordinary text: a
    document that quotes `<|endoftext|>` does not end there. Call `encode_batch_fast(texts)` and read each `.ids`;
    the caller writes `tokenizer.eos_token_id` between documents.

    Pickling or copying the result loses the last property (tokenizers does not serialise it): a worker process gets
    the tokenizer and calls this function itself.
    """
    encoder = tokenizers.Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    encoder.no_padding()
    encoder.no_truncation()
    encoder.post_processor = None
    encoder.encode_special_tokens = True
    return encoder


def unknown_token_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The id that stands for text which the vocabulary lacks; None if there is no such text, as in a byte-level BPE.

    To count what was lost, count this id in the encoded documents. (GPT-2 calls `<|endoftext|>` its unknown token
    as well, and never produces it for text.)
    """
    return None if tokenizer.unk_token_id == tokenizer.eos_token_id else tokenizer.unk_token_id


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of what decides a document's ids: vocabulary, merges, normalisation, pre-tokenization, added tokens.

    Saving, loading, the folder, padding, truncation and `model_max_length` do not change it.
    """
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    # Of a special token only its text and id matter, since document_encoder never looks for it in a text.
    added = [
        [token["id"], token["content"]] if token["special"] else _without_defaults(token)
        for token in state["added_tokens"]
    ]
    parts = [_without_defaults(state[part]) for part in ("normalizer", "pre_tokenizer", "model")]
    text = json.dumps([*parts, added, tokenizer.eos_token_id], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _without_defaults(component: dict | None) -> dict:
    """Leave out options that are off, so that a new option in a later tokenizers release changes no fingerprint."""
    return {key: value for key, value in (component or {}).items() if value not in (None, False, "")}
