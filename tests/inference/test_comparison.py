"""`llmkit compare`: two models' answers to the same prompts, as text and as a page."""

import re
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, pipeline, set_seed

from llmkit import cli
from llmkit.data.tokenizer import train_bpe_tokenizer
from llmkit.finetuning.adapters import AdapterArguments, load_base_model
from llmkit.finetuning.conversations import add_chat_template
from llmkit.inference.comparison import Answer, Answers, as_page, as_text
from small_run import lively_adapter


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """A plain checkpoint, and an adapter on it that has a chat template."""
    folder = tmp_path_factory.mktemp("models")
    tokenizer = train_bpe_tokenizer(["### Human: Why not?\n### Assistant: Because."] * 9, 300)
    set_seed(0)
    ends = {"bos_token_id": tokenizer.eos_token_id, "eos_token_id": tokenizer.eos_token_id}
    sizes = {"n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 64, "vocab_size": len(tokenizer)}
    GPT2LMHeadModel(GPT2Config(**sizes, **ends, initializer_range=0.3)).save_pretrained(folder / "plain")
    tokenizer.save_pretrained(folder / "plain")
    args = AdapterArguments(model=str(folder / "plain"), quantization="none")
    base = load_base_model(args, torch.float32, torch.device("cpu"))
    lively_adapter(base, args, std=0.2).save_pretrained(folder / "adapter")
    add_chat_template(tokenizer)
    tokenizer.save_pretrained(folder / "adapter")
    (folder / "prompts.txt").write_text("Why?\n\n  Why not?\n")
    return folder


def test_an_adapter_and_a_plain_checkpoint_answer_side_by_side(models, tmp_path, capsys, monkeypatch):
    """With the text that plain transformers gives, asked as a question where there is a chat template."""
    monkeypatch.setenv("COLUMNS", "400")
    names = [str(models / "plain"), str(models / "adapter")]
    page = tmp_path / "page.html"
    given = ["--prompts", str(models / "prompts.txt"), "--max_new_tokens", "12", "--output", str(page)]
    cli.main(["compare", *names, *given])
    said = capsys.readouterr().out
    plain = pipeline("text-generation", names[0])("Why?", max_new_tokens=12, do_sample=False, return_full_text=False)
    chat = pipeline("text-generation", names[1], tokenizer=names[1])
    asked = chat([{"role": "user", "content": "Why?"}], max_new_tokens=12, do_sample=False)
    texts = [plain[0]["generated_text"], asked[0]["generated_text"][-1]["content"]]
    assert texts[0].strip() != texts[1].strip()
    row = said[said.index("> Why?") : said.index("> Why not?")]
    for text in texts:
        assert " ".join(text.split()) in " ".join(row.split())
    assert "> Why not?" in said and "0 of 2 answers are the same" in said and f"wrote {page}" in said
    assert page.read_text().count("<pre>") == 4


def test_what_models_write_stays_text():
    models = [Answers("a", [Answer("<b>x</b>\n\nlong " + "word " * 9, 5, True)]), Answers("b", [Answer("", 0, False)])]
    page = as_page(["<script>"], models)
    assert "&lt;script&gt;" in page and "&lt;b&gt;x" in page and "<script" not in page and "0 tokens, cut" in page
    text = as_text(["Why?"], models, 43)
    assert all(len(line) <= 43 for line in text.splitlines() if " | " in line)
    assert re.search(r"<b>x</b> +\|  \[cut\]", text)
    assert "a: 1 of 1 answers end by themselves; 5.0 tokens in the mean" in text


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["{0}/plain", "{0}/nowhere", "--prompts", "{0}/prompts.txt"], "there is no such file or folder"),
        (["{0}/plain", "{0}/plain", "--prompts", "{0}/nothing.txt"], "nothing.txt': there is no such file"),
        (["{0}/plain", "{0}/plain", "--prompts", "{0}/empty.txt"], "holds no prompt"),
        (["{0}/plain", "{0}/plain", "--prompts", "{0}/plain"], "is not a text file"),
        (["{0}/plain", "{0}/plain", "--prompts", "{0}/bytes.txt"], "is not a text file in UTF-8"),
        (["{0}/plain", "{0}/plain", "--prompts", "{0}/prompts.txt", "--max_new_tokens", "0"], "max_new_tokens is 0"),
        (["{0}/plain", "{0}/plain", "--prompts", "{0}/prompts.txt", "--output", "{0}/plain"], "is a folder"),
        (["{0}/plain", "{0}/plain", "--prompts", "{0}/long.txt"], "the prompt has"),
        (["{0}/plain"], "the following arguments are required"),
    ],
)
def test_mistakes_are_one_line(models, capsys, arguments, message):
    (models / "empty.txt").write_text("\n \n")
    (models / "bytes.txt").write_bytes(b"\xff\xfe")
    (models / "long.txt").write_text("Why? " * 99)
    with pytest.raises(SystemExit) as ended:
        cli.main(["compare", *(text.format(models) for text in arguments)])
    (line,) = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and line.startswith("error: ") and message in line
