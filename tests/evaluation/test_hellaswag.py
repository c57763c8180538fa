"""HellaSwag against a slow reference, in batches, on the stock model, and with what is wrong in its file."""

import json
import random

import pytest
import torch
from transformers import GPT2LMHeadModel as StockGPT2
from transformers import GPT2TokenizerFast

from llmkit import GPT2Config, GPT2LMHeadModel
from llmkit.data.tokenizer import train_bpe_tokenizer
from llmkit.errors import UserError
from llmkit.evaluation.hellaswag import (
    Question,
    accuracies,
    encode_hellaswag,
    ending_losses,
    load_hellaswag,
    results,
    score_hellaswag,
)

SENTENCE = "a man is on the roof and takes tiles off then he holds up one of them before water runs down"


def official_rows(count: int, seed: int = 0) -> list[dict]:
    """Questions with the fields of the published file, contexts and endings of many lengths."""
    rng = random.Random(seed)

    def text(low: int, high: int) -> str:
        return " ".join(rng.choices(SENTENCE.split(), k=rng.randint(low, high)))

    rows = []
    for index in range(count):
        context, start = text(3, 30).capitalize() + ".", rng.choice(["he", "one of them", ""])
        rows.append(
            {
                "ind": 10 * index,
                "activity_label": "Roof shingle removal",
                "ctx_a": context,
                "ctx_b": start,
                "ctx": f"{context} {start}".strip(),
                "split": "val",
                "split_type": "indomain",
                "label": rng.randrange(4),
                "endings": [text(1, 12) + "." for _ in range(4)],
                "source_id": "activitynet~v_-JhWjGDPHMY",
            }
        )
    return rows


def write_jsonl(path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def tokenizer() -> GPT2TokenizerFast:
    return train_bpe_tokenizer([SENTENCE] * 3, 290)


@pytest.fixture(scope="module")
def checkpoint(tokenizer, tmp_path_factory) -> str:
    """A stock checkpoint with weights large enough that the losses of endings differ."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model")
    config = GPT2Config(n_positions=256, n_embd=48, n_layer=2, n_head=4, initializer_range=0.3)
    GPT2LMHeadModel(config.for_tokenizer(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def slow_reference(model, tokenizer, row: dict) -> tuple[list[float], int, int]:
    """Each ending by itself: the mean and the sum of its tokens' losses, after the context's tokens."""
    sums, means = [], []
    context = tokenizer.encode(row["ctx"])
    for ending in row["endings"]:
        ids = torch.tensor([context + tokenizer.encode(" " + ending)])
        log_probabilities = model(ids).logits[0].double().log_softmax(-1)
        losses = [-log_probabilities[i - 1, ids[0, i]].item() for i in range(len(context), ids.shape[1])]
        sums.append(sum(losses))
        means.append(sum(losses) / len(losses))
    return sums, sums.index(min(sums)), means.index(min(means))


def test_agrees_with_the_definition_item_by_item(checkpoint, tokenizer, tmp_path):
    rows = official_rows(25)
    questions = encode_hellaswag(load_hellaswag(write_jsonl(tmp_path / "h.jsonl", rows)), tokenizer, context=256)
    model = StockGPT2.from_pretrained(checkpoint).eval()
    found = results(questions, ending_losses(model, questions, batch_size=4))
    correct = correct_norm = 0
    for row, item in zip(rows, found, strict=True):
        losses, prediction, prediction_norm = slow_reference(model, tokenizer, row)
        assert item["losses"] == pytest.approx(losses, rel=1e-5)
        assert (item["ind"], item["label"]) == (row["ind"], row["label"])
        assert (item["prediction"], item["prediction_norm"]) == (prediction, prediction_norm)
        correct += prediction == row["label"]
        correct_norm += prediction_norm == row["label"]
    assert any(item["prediction"] != item["prediction_norm"] for item in found)  # or the two would not be told apart
    metrics = score_hellaswag(model, questions, batch_size=4)
    assert metrics["hellaswag/acc"] == correct / 25
    assert metrics["hellaswag/acc_norm"] == correct_norm / 25
    assert metrics["hellaswag/questions"] == 25


def test_batches_and_our_model_change_nothing(checkpoint, tokenizer):
    questions = encode_hellaswag(official_rows(20, seed=1), tokenizer, context=64)
    assert 0 < sum(question.cut > 0 for question in questions) < 20
    stock, ours = StockGPT2.from_pretrained(checkpoint), GPT2LMHeadModel.from_pretrained(checkpoint)
    ours.train()
    expected = ending_losses(stock, questions, batch_size=1)
    for model, batch_size in [(stock, 3), (stock, 50), (ours, 1), (ours, 7)]:
        losses = ending_losses(model, questions, batch_size)
        assert losses == pytest.approx(expected, rel=1e-5)
        assert [item["prediction"] for item in results(questions, losses)] == expected.argmin(dim=1).tolist()
    assert ours.training


def test_a_model_that_always_makes_all_logits(checkpoint, tokenizer):
    class AllLogits(StockGPT2):
        def forward(self, input_ids, use_cache, **ignored):
            return super().forward(input_ids, use_cache=use_cache)

    questions = encode_hellaswag(official_rows(5), tokenizer, context=256)
    expected = ending_losses(StockGPT2.from_pretrained(checkpoint), questions, 5)
    assert torch.allclose(ending_losses(AllLogits.from_pretrained(checkpoint), questions, 5), expected)


def test_contexts_lose_their_beginning_and_endings_nothing(tokenizer):
    row = official_rows(1)[0] | {"ctx": "tiles " * 200}
    whole = encode_hellaswag([row], tokenizer, context=10_000)[0]
    cut = encode_hellaswag([row], tokenizer, context=50)[0]
    assert whole.cut == 0 and cut.cut == max(map(len, whole.rows)) - 51
    # 51 tokens: the model reads 50 of them and predicts the last.
    assert cut.rows == [tokens[-51:] for tokens in whole.rows]
    assert cut.lengths == whole.lengths == [len(tokenizer.encode(" " + ending)) for ending in row["endings"]]
    longest = max(whole.lengths)
    encode_hellaswag([row], tokenizer, context=longest)
    with pytest.raises(UserError, match=f"an ending has {longest} tokens, and the model reads {longest - 1}"):
        encode_hellaswag([row], tokenizer, context=longest - 1)


def test_accuracies_and_standard_errors_by_hand():
    # Sums choose ending 0 in all, means ending 1 in the last two; right is 0, 0, 1.
    losses = torch.tensor([[1.0, 9.0], [4.0, 6.0], [4.0, 6.0]]).double()
    lengths = [[1, 2], [1, 3], [1, 3]]
    questions = [
        Question(number=i, rows=[[0] * 4, [0] * 4], lengths=length, label=label, cut=0)
        for i, (length, label) in enumerate(zip(lengths, [0, 0, 1], strict=True))
    ]
    metrics = accuracies(questions, losses)
    assert metrics["hellaswag/acc"] == pytest.approx(2 / 3)
    assert metrics["hellaswag/acc_norm"] == pytest.approx(2 / 3)
    hits = torch.tensor([1.0, 1.0, 0.0])
    assert metrics["hellaswag/acc_stderr"] == pytest.approx((hits.std() / 3**0.5).item())
    assert [item["prediction_norm"] for item in results(questions, losses)] == [0, 1, 1]


def test_both_spellings_of_context_and_label(tmp_path):
    rows = official_rows(8)
    parts = [{key: value for key, value in row.items() if key != "ctx"} | {"label": str(row["label"])} for row in rows]
    assert any(row["ctx_b"] == "" for row in rows)
    expected = load_hellaswag(write_jsonl(tmp_path / "whole.jsonl", rows))
    assert load_hellaswag(write_jsonl(tmp_path / "parts.jsonl", parts)) == expected
    assert [row["ctx"] for row in expected] == [row["ctx"] for row in rows]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label": ""}, "no label: the test split has none"),
        ({"label": 4}, "the label is 4"),
        ({"label": 1.0}, "the label is 1.0"),
        ({"endings": ["one"]}, "two or more"),
        ({"endings": ["one", ""]}, "none empty"),
        ({"endings": ["a", "b", "c"], "label": 0}, "different numbers of endings"),
        ({"endings": None}, "line 2: not a question"),
        ({"ctx": 3}, "ctx has to be a text"),
    ],
)
def test_what_is_no_question_is_named(change, message, tmp_path):
    rows = official_rows(3)
    rows[1] |= change
    with pytest.raises(UserError, match=message):
        load_hellaswag(write_jsonl(tmp_path / "h.jsonl", rows))


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"not json\n", "line 1: not a question"), (b"", "no questions"), (b"\xff\xfe", "not a text")],
)
def test_what_is_no_jsonl_is_named(content, message, tmp_path):
    (tmp_path / "h.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_hellaswag(str(tmp_path / "h.jsonl"))


def test_a_missing_file_and_no_hub():
    with pytest.raises(UserError, match="no such file"):
        load_hellaswag("missing.jsonl")
    with pytest.raises(UserError, match="was not read from the Hub"):  # tests are offline
        load_hellaswag(None)


def test_a_line_is_what_ends_with_a_line_feed(tmp_path):
    """JSON may hold U+2028 and the like as they are, and so do files written with `ensure_ascii=False`."""
    rows = official_rows(3)
    rows[1]["ctx"] = "he\u2028goes\x85on\u2029"
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\r\n" for row in rows), encoding="utf-8")
    assert [row["ctx"] for row in load_hellaswag(str(path))] == [row["ctx"] for row in rows]


def test_one_question_has_no_standard_error():
    question = Question(number=0, rows=[[1, 2], [1, 3]], lengths=[1, 1], label=0, cut=0)
    assert accuracies([question], torch.tensor([[1.0, 2.0]])) == {
        "hellaswag/acc": 1.0,
        "hellaswag/acc_norm": 1.0,
        "hellaswag/questions": 1.0,
    }
