import random
import subprocess
import sys
from pathlib import Path

import pytest
import regex
from transformers import AutoTokenizer, GPT2Tokenizer, PreTrainedTokenizerFast

from llmkit.data.corpus import open_corpus
from llmkit.data.tokenizer import (
    END_OF_TEXT,
    UNKNOWN,
    bpe_from_files,
    document_encoder,
    load_tokenizer,
    split_document,
    tokenizer_fingerprint,
    train_bpe_tokenizer,
    train_character_tokenizer,
    unknown_token_id,
)
from llmkit.errors import UserError

PUBLISHED = Path(__file__).parents[3] / "shared/data/gpt2_tokenizer"
TEXT = Path(random.__file__).read_text(encoding="utf-8")  # any page of ordinary text
NASTY = [
    "",
    " ",
    "  two  spaces  ",
    "\n\n\r\n\t end \n",
    "it's we'll I'D 'tis",
    "naïve café, 東京都, Ελλάδα, العربية, हिन्दी",
    "👩‍👩‍👧‍👦 e\u0301 \u200b\u00a0\ufeff",
    "\x00\x01\x1c\x7f\x85\u2028",
    f"before{END_OF_TEXT}after {UNKNOWN} <|endof text|>",
    "x" * 300 + " " * 300 + "1234567890" * 30,
    "def f(x):\n    return  x ** 2  # ok , right ?\n",
]


def random_texts(count: int, seed: int = 0) -> list[str]:
    """Strings over all planes of Unicode, with much white space and punctuation, so that rules get to meet."""
    rng = random.Random(seed)
    pools = [" \n\t\r", "'.,;?! ", "etaoin'sSTRL", "0123456789", "éß東京λя\u0301"]

    def character() -> str:
        if rng.random() < 0.8:
            return rng.choice(rng.choice(pools))
        point = rng.randrange(0x110000 - 0x800)
        return chr(point if point < 0xD800 else point + 0x800)  # surrogates are no characters

    return ["".join(character() for _ in range(rng.randrange(200))) for _ in range(count)]


@pytest.fixture(scope="module")
def bpe() -> PreTrainedTokenizerFast:
    return train_bpe_tokenizer([TEXT], 600)


@pytest.fixture(scope="module")
def character() -> PreTrainedTokenizerFast:
    return train_character_tokenizer([TEXT])


@pytest.fixture(scope="module")
def published() -> PreTrainedTokenizerFast:
    if not PUBLISHED.is_dir():
        pytest.skip("GPT-2's published vocabulary is not here")
    return bpe_from_files(PUBLISHED / "vocab.json", PUBLISHED / "merges.txt")


# ----------------------------------------------------------------------------- byte-level BPE


@pytest.mark.parametrize("texts", [NASTY, random_texts(300)], ids=["nasty", "random"])
def test_bpe_round_trip_is_exact(bpe, texts):
    encoder = document_encoder(bpe)
    for text in texts:
        assert bpe.decode(bpe(text).input_ids) == text
        assert bpe.decode(encoder.encode(text).ids) == text


def test_bpe_has_the_size_asked_for_and_the_layout_of_gpt2(bpe):
    assert len(bpe) == bpe.vocab_size == 600
    assert bpe.bos_token_id == bpe.eos_token_id == bpe.unk_token_id == 599
    assert bpe.convert_ids_to_tokens([0, 1, 255]) == ["!", '"', "Ń"]  # bytes in the order of GPT-2's vocab.json
    assert len(document_encoder(bpe).encode(TEXT).ids) < len(TEXT.encode()) / 2


def test_bpe_training_is_deterministic(bpe):
    assert tokenizer_fingerprint(train_bpe_tokenizer(iter([TEXT]), 600)) == tokenizer_fingerprint(bpe)


def test_bpe_of_only_bytes():
    assert len(train_bpe_tokenizer([TEXT], 257)) == 257


@pytest.mark.parametrize("size", [256, 0, -1])
def test_bpe_smaller_than_its_bytes_is_refused(size):
    with pytest.raises(UserError, match=f"vocab_size is {size}.*257"):
        train_bpe_tokenizer([TEXT], size)


def test_bpe_says_when_the_text_was_too_small(caplog):
    tokenizer = train_bpe_tokenizer(["a small text"], 5000)
    assert len(tokenizer) < 300
    assert "too small for a vocabulary of 5,000 tokens" in caplog.text


def test_an_unreadable_document_ends_training_with_its_own_error():
    def documents():
        yield "fine"
        raise UserError("books/b.txt: not UTF-8")

    with pytest.raises(UserError, match="books/b.txt"):
        train_bpe_tokenizer(documents(), 300)


# ----------------------------------------------------------------------------- GPT-2's published vocabulary


def test_published_files_give_the_ids_of_gpt2tokenizer(published):
    stock = GPT2Tokenizer(vocab=str(PUBLISHED / "vocab.json"), merges=str(PUBLISHED / "merges.txt"))
    assert len(published) == len(stock) == 50257
    assert published("Hello world").input_ids == [15496, 995]  # from GPT-2's documentation
    texts = [TEXT, *NASTY, *random_texts(300, seed=1)]
    assert published(texts).input_ids == stock(texts).input_ids


def test_published_files_give_the_ids_of_the_algorithm_as_published(published):
    """Against a plain transcription of the paper's algorithm, since GPT2Tokenizer shares our library."""
    pattern = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in printable]
    alphabet = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(hidden)}
    vocab = published.get_vocab()
    lines = (PUBLISHED / "merges.txt").read_text(encoding="utf-8").splitlines()[1:]
    rank = {tuple(line.split()): i for i, line in enumerate(lines)}

    def reference(text: str) -> list[int]:
        ids = []
        for word in pattern.findall(text):
            parts = [alphabet[byte] for byte in word.encode()]
            while len(parts) > 1:
                best = min(zip(parts, parts[1:], strict=False), key=lambda pair: rank.get(pair, len(rank)))
                if best not in rank:
                    break
                i = 0
                while i < len(parts) - 1:
                    if (parts[i], parts[i + 1]) == best:
                        parts[i : i + 2] = ["".join(best)]
                    i += 1
            ids += [vocab[part] for part in parts]
        return ids

    encoder = document_encoder(published)
    for text in [TEXT[:5000], *NASTY, *random_texts(100, seed=2)]:
        assert encoder.encode(text).ids == reference(text)


# ----------------------------------------------------------------------------- characters


def test_character_tokenizer_has_one_token_a_character(character):
    ids = document_encoder(character).encode(TEXT).ids
    assert len(ids) == len(TEXT)
    assert character.decode(ids) == TEXT
    assert len(character) == len(set(TEXT)) + 2


def test_character_round_trip_is_exact_for_seen_characters():
    texts = [*NASTY, *random_texts(100)]
    tokenizer = train_character_tokenizer(texts)
    encoder = document_encoder(tokenizer)
    for text in texts:
        assert tokenizer.decode(encoder.encode(text).ids) == text
        assert len(encoder.encode(text).ids) == len(text)


def test_unseen_characters_are_unknown_one_by_one(character):
    ids = document_encoder(character).encode("a東京b☃\n").ids
    assert ids.count(unknown_token_id(character)) == 3
    assert character.decode(ids) == f"a{UNKNOWN * 2}b{UNKNOWN}\n"


def test_a_byte_level_bpe_knows_everything(bpe):
    assert unknown_token_id(bpe) is None


# ----------------------------------------------------------------------------- saved and loaded


@pytest.mark.parametrize("kind", ["bpe", "character"])
@pytest.mark.parametrize("config", [None, '{"model_type": "gpt2"}'], ids=["alone", "in a checkpoint"])
def test_saved_folder_opens_without_llmkit_and_gives_the_same_ids(kind, config, request, tmp_path):
    tokenizer = request.getfixturevalue(kind)
    tokenizer.save_pretrained(tmp_path)
    if config:
        (tmp_path / "config.json").write_text(config)
    text = f"  def f( x ) :\n\t'it''s'  {END_OF_TEXT} 東京 .\n\n"
    code = (
        "import sys; sys.modules['llmkit'] = None\n"
        "from transformers import AutoTokenizer\n"
        "t = AutoTokenizer.from_pretrained('.')\n"
        "ids = t(sys.argv[1]).input_ids\n"
        "print(repr((ids, t.decode(ids), len(t), t.eos_token, t.bos_token)))"
    )
    done = subprocess.run([sys.executable, "-c", code, text], cwd=tmp_path, capture_output=True, text=True, check=True)
    ids = tokenizer(text).input_ids
    assert eval(done.stdout) == (ids, tokenizer.decode(ids), len(tokenizer), END_OF_TEXT, END_OF_TEXT)


@pytest.mark.parametrize("kind", ["bpe", "character"])
def test_fingerprint_survives_saving_and_what_does_not_change_ids(kind, request, tmp_path):
    tokenizer = request.getfixturevalue(kind)
    fingerprint = tokenizer_fingerprint(tokenizer)
    tokenizer.save_pretrained(tmp_path)
    for cls in (AutoTokenizer, PreTrainedTokenizerFast):
        loaded = cls.from_pretrained(tmp_path, model_max_length=7, pad_token=END_OF_TEXT)
        loaded(["a longer text than seven tokens", "b"], truncation=True, padding=True)
        assert tokenizer_fingerprint(loaded) == fingerprint


def test_fingerprint_tells_tokenizers_apart(bpe, character, tmp_path):
    bpe.save_pretrained(tmp_path)
    prefixed = AutoTokenizer.from_pretrained(tmp_path, add_prefix_space=True)
    extended = AutoTokenizer.from_pretrained(tmp_path)
    extended.add_tokens(["return"])
    others = [character, train_bpe_tokenizer([TEXT], 601), train_bpe_tokenizer([TEXT.upper()], 600)]
    assert len({tokenizer_fingerprint(t) for t in [bpe, prefixed, extended, *others]}) == 6


def test_load_tokenizer_opens_a_folder(bpe, tmp_path):
    bpe.save_pretrained(tmp_path)
    assert tokenizer_fingerprint(load_tokenizer(str(tmp_path))) == tokenizer_fingerprint(bpe)


@pytest.mark.parametrize("name", ["/nowhere/at/all", "./nowhere", "~no-such-user/tokenizer", "runs/nowhere/tokenizer"])
def test_load_tokenizer_of_no_folder(name):
    with pytest.raises(UserError, match=f"'{name}': there is no such file or folder"):
        load_tokenizer(name)


@pytest.mark.parametrize("damaged", ["", "{", "[]", '{"model": {}}', "a letter"])
def test_load_tokenizer_of_a_damaged_file(bpe, tmp_path, damaged):
    bpe.save_pretrained(tmp_path)
    path = tmp_path / "tokenizer.json"
    path.write_text(path.read_text().replace("ByteLevel", "ByteLevex", 1) if damaged == "a letter" else damaged)
    with pytest.raises(UserError, match="holds no tokenizer"):
        load_tokenizer(str(tmp_path))


def test_load_tokenizer_of_an_empty_folder(tmp_path):
    with pytest.raises(UserError, match="holds no tokenizer") as raised:
        load_tokenizer(str(tmp_path))
    assert "\n" not in str(raised.value)


def test_load_tokenizer_without_end_of_text(bpe, tmp_path):
    PreTrainedTokenizerFast(tokenizer_object=bpe.backend_tokenizer).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="no end-of-text token"):
        load_tokenizer(str(tmp_path))


# ----------------------------------------------------------------------------- encoding documents


@pytest.mark.parametrize("kind", ["bpe", "character"])
def test_special_text_in_a_document_is_ordinary_text(kind, request):
    tokenizer = request.getfixturevalue(kind)
    text = f"print('{END_OF_TEXT}')"
    assert tokenizer.eos_token_id in tokenizer(text).input_ids
    [encoding] = document_encoder(tokenizer).encode_batch_fast([text])
    assert tokenizer.eos_token_id not in encoding.ids


def test_document_encoder_neither_cuts_nor_pads_nor_adds_and_leaves_the_tokenizer_alone(bpe, tmp_path):
    bpe.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, add_bos_token=True, pad_token=END_OF_TEXT)
    tokenizer([TEXT, "b"], truncation=True, max_length=8, padding=True)  # leaves its settings in the backend
    before = tokenizer.backend_tokenizer.to_str()
    long, short = document_encoder(tokenizer).encode_batch_fast([TEXT, "b"])
    assert long.ids == document_encoder(bpe).encode(TEXT).ids
    assert short.ids == [bpe.convert_tokens_to_ids("b")]
    assert tokenizer.backend_tokenizer.to_str() == before
    assert tokenizer(f"b{END_OF_TEXT}").input_ids == [599, short.ids[0], 599]


@pytest.mark.parametrize("kind", ["bpe", "character", "published"])
def test_pieces_of_a_document_have_the_ids_of_the_whole(kind, request):
    encoder = document_encoder(request.getfixturevalue(kind))
    for text in [TEXT, *NASTY, *random_texts(200, seed=3)]:
        pieces = list(split_document(text, size=10))
        assert "".join(pieces) == text
        assert [i for piece in pieces for i in encoder.encode(piece).ids] == encoder.encode(text).ids
    assert len(list(split_document(TEXT, size=1000))) > 10


def test_training_on_the_embedded_corpus_reads_all_of_it():
    characters = set().union(*open_corpus().documents())
    assert len(train_character_tokenizer(open_corpus().documents())) == len(characters) + 2


def test_published_files_alone_are_a_tokenizer(tmp_path):
    """A folder with vocab.json and merges.txt, as GPT-2's were published, and nothing that says what they are."""
    bpe = train_bpe_tokenizer(["hello world, hello words " * 20], 280)
    bpe.backend_tokenizer.model.save(str(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["merges.txt", "vocab.json"]
    loaded = load_tokenizer(str(tmp_path))
    text = "hello worlds\n\t1234 é"
    assert loaded(text)["input_ids"] == bpe(text)["input_ids"] and loaded.eos_token_id == bpe.eos_token_id
    (tmp_path / "merges.txt").write_text("a b c\n")
    with pytest.raises(UserError, match="this folder holds no tokenizer"):
        load_tokenizer(str(tmp_path))
