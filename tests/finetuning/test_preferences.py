"""Preference pairs: TRL's formats, what is malformed, the embedded ones, and log-probabilities without logits."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, set_seed
from trl.trainer.utils import add_fused_lm_head

from llmkit.data.sample_data import docstring_preferences
from llmkit.data.tokenizer import train_bpe_tokenizer
from llmkit.errors import UserError
from llmkit.finetuning.answer_positions import AnswerPositions
from llmkit.finetuning.conversations import SourceArguments, add_chat_template, hold_out
from llmkit.finetuning.preference_arguments import DPOArguments
from llmkit.finetuning.preference_audit import audit_pairs, show_pair
from llmkit.finetuning.preference_trainer import answer_log_probs, chosen_warning
from llmkit.finetuning.preferences import Pairs, can_be_compared, encode_pair, encode_pairs, load_pairs, parse_pair
from llmkit.finetuning.turns import Malformed

USER = [{"role": "user", "content": "Why?"}]
PAIR = {"prompt": USER, "chosen": "Because.", "rejected": "No."}


def answer(text: str) -> list[dict]:
    return [{"role": "assistant", "content": text}]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Why?", "chosen": "Because.", "rejected": "No."},
        {"prompt": USER, "chosen": answer("Because."), "rejected": answer("No.")},
        {"chosen": USER + answer("Because."), "rejected": USER + answer("No.")},
        {"prompt": "Why?", "chosen": USER + answer("Because."), "rejected": USER + answer("No.")},  # UltraFeedback
        {"chosen": "\n\nHuman: Why?\n\nAssistant: Because.", "rejected": "\n\nHuman: Why?\n\nAssistant: No."},
    ],
    ids=["text", "messages", "whole conversations", "prompt within", "HH-RLHF"],
)
def test_trls_formats_are_read(row):
    assert parse_pair(row) == PAIR


@pytest.mark.parametrize(
    "row, why",
    [
        ({"prompt": "Why?", "chosen": "A", "rejected": "A "}, "equal answers"),
        ({"prompt": "Why?", "chosen": "A", "rejected": " "}, "an empty answer"),
        ({"prompt": "Why?", "chosen": "A"}, "no chosen or no rejected answer"),
        ({"chosen": answer("A"), "rejected": answer("B")}, "no prompt"),
        ({"chosen": USER + answer("A"), "rejected": [{"role": "user", "content": "How?"}] + answer("B")}, "different"),
        ({"prompt": 3, "chosen": "A", "rejected": "B"}, "neither text nor messages"),
        ({"prompt": "Why?", "chosen": [1], "rejected": "B"}, "an empty answer"),
    ],
)
def test_what_is_no_pair_is_told(row, why):
    with pytest.raises(Malformed, match=why):
        parse_pair(row)


def test_pairs_of_one_prompt_stay_together():
    rows = [{"prompt": str(i // 3), "chosen": "a", "rejected": "b"} for i in range(30)]
    train, validation = hold_out(Pairs("test", rows), 0.2, group=lambda pair: pair["prompt"])
    assert (len(train.rows), len(validation.rows)) == (24, 6)
    assert not {row["prompt"] for row in train.rows} & {row["prompt"] for row in validation.rows}
    with pytest.raises(UserError, match="10 prompts of preference pairs are too few"):
        hold_out(Pairs("test", rows), 0.01, group=lambda pair: pair["prompt"])


def test_embedded_pairs_prefer_the_whole_docstring():
    answered = [(f"What does f{i} do?", f"It returns number {i} of the list.") for i in range(6)]
    pairs = list(docstring_preferences(answered))
    assert len(pairs) == 18
    for question, chosen, rejected in pairs:
        assert (question, chosen) in answered and rejected != chosen
    other, cut, without_end = (pairs[i][2] for i in range(3))
    assert other in dict(answered).values() and answered[0][1].startswith(cut) and without_end.startswith(chosen[:10])


def test_no_held_out_docstring_was_trained_under_another_name(monkeypatch):
    texts = [f"### Human: What does f{i} do?### Assistant: It returns number {i % 45}." for i in range(60)]
    monkeypatch.setattr("llmkit.finetuning.conversations.docstring_conversations", lambda: texts)
    train, held_out = load_pairs(SourceArguments(validation_fraction=0.2))
    trained = {pair["chosen"] for pair in train.rows}
    assert len(trained) > 30 and held_out.rows and not trained & {pair["chosen"] for pair in held_out.rows}


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = train_bpe_tokenizer(["### Human: Why?\n### Assistant: Because. No."] * 9, 300)
    add_chat_template(tokenizer)
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def test_an_answer_is_what_sft_trains(tokenizer):
    several = [*USER, *answer("So."), {"role": "user", "content": "And?"}]
    row = encode_pair({"prompt": several, "chosen": "Because.", "rejected": "No."}, tokenizer)
    assert tokenizer.decode(row["prompt_ids"]).endswith("### Human: And?\n### Assistant:")
    assert tokenizer.decode(row["chosen_ids"]) == " Because." + tokenizer.eos_token
    assert row["rejected_ids"][-1] == tokenizer.eos_token_id


def test_the_audit_counts_and_warns(tokenizer):
    pairs = Pairs("test", [PAIR | {"chosen": "Because. " * 4}, PAIR])
    rows = encode_pairs(pairs, tokenizer)
    table = audit_pairs(pairs, rows, tokenizer, 64).table()
    assert "2 of 1 prompts" in table and "2 of 2 with their end" in table and "longer as a rule" in table
    assert "preferred:" in show_pair(rows[0], tokenizer, color=False)
    prompt = len(rows[0]["prompt_ids"])
    assert not can_be_compared(rows[0], prompt) and can_be_compared(rows[0], prompt + 3)
    with pytest.raises(UserError, match="nothing would be learned"):
        audit_pairs(pairs, rows, tokenizer, prompt).check()


def small_model() -> GPT2LMHeadModel:
    set_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=211, n_positions=32, n_embd=48, n_layer=2, n_head=4)).eval()


def pairs_of_tokens() -> dict[str, torch.Tensor]:
    ids = torch.randint(211, (4, 20), generator=torch.Generator().manual_seed(0))
    mask = torch.zeros_like(ids)
    mask[:, 8:15] = 1
    mask[1, 10:] = 0
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "completion_mask": mask}


@pytest.mark.parametrize("at_answers_alone", [False, True])
def test_log_probabilities_are_those_of_the_full_logits(at_answers_alone):
    model, inputs = small_model(), pairs_of_tokens()
    ids, mask = inputs["input_ids"], inputs["completion_mask"]
    with torch.no_grad():
        logits = model(ids).logits[:, :-1].log_softmax(-1)
    expected = (logits.gather(-1, ids[:, 1:, None]).squeeze(-1) * mask[:, 1:]).sum(1)
    add_fused_lm_head(model)
    if at_answers_alone:
        AnswerPositions(model)
    torch.testing.assert_close(answer_log_probs(model, inputs), expected, rtol=1e-5, atol=1e-4)


def test_the_head_at_answers_alone_gives_what_trls_gives_everywhere():
    """Every figure of each position, and the gradients; and it never sees the other positions."""
    fields = ("log_probs", "entropy", "mean_logits", "is_top1", "log_sum_sq_probs")
    inputs = pairs_of_tokens()
    labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
    found, shapes = [], []
    for at_answers_alone in (False, True):
        model = small_model()
        add_fused_lm_head(model, outputs=fields)
        if at_answers_alone:
            AnswerPositions(model)
            model.transformer.register_forward_hook(lambda *hooked: shapes.append(hooked[2].last_hidden_state.shape))
        outputs = model(inputs["input_ids"], labels=labels, fused_lm_head=True)
        (outputs.log_probs.sum() + outputs.entropy.sum()).backward()
        gradients = [parameter.grad for parameter in model.parameters()]
        found.append([*(outputs[name] for name in (*fields, "label_mask", "loss")), *gradients])
        untrained = model(inputs["input_ids"], labels=torch.full_like(labels, -100), fused_lm_head=True)
        assert not untrained.log_probs.any() and model(inputs["input_ids"]).logits.shape == (4, 20, 211)
    assert shapes == [(1, 23, 48), (4, 20, 48), (4, 20, 48)]  # of the second model, called three times
    for expected, compact in zip(*found, strict=True):
        torch.testing.assert_close(compact, expected, rtol=1e-4, atol=1e-5)


def test_the_warning_says_what_to_do(tmp_path):
    args = DPOArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", max_chosen_drop=0.2)
    assert chosen_warning(-0.19, args) is None and chosen_warning(0.3, args) is None
    assert "Add an SFT term (loss_type: [sigmoid, sft])" in chosen_warning(-0.21, args)
    args.loss_type = ["sigmoid", "sft"]
    assert "Give sft more weight in loss_weights" in chosen_warning(-0.21, args)
