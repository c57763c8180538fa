"""Generating and chatting: the text that plain transformers gives, streamed, cut, batched, cached and quantized."""

import copy
import io
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from transformers import BitsAndBytesConfig, GPT2Config, GPT2LMHeadModel, pipeline, set_seed

from llmkit import cli
from llmkit.data.tokenizer import load_tokenizer, train_bpe_tokenizer
from llmkit.errors import UserError
from llmkit.finetuning.adapters import AdapterArguments, load_base_model
from llmkit.finetuning.conversations import add_chat_template
from llmkit.inference.chat import Chat
from llmkit.inference.generation import PieceStreamer, Sampling, continue_prompts, load_for_generation
from llmkit.runs.run import QUANTIZATION_CONFIG
from small_run import lively_adapter

ROOT = Path(__file__).parents[2]
TEXT = "def read(path):\n    return open(path).read()\n\n\ndef write(path, text):\n    open(path, 'w').write(text)\n"
CONTEXT = 128
GREEDY = Sampling(temperature=0, max_new_tokens=24)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    """A GPT-2 with large random weights, which writes something else at every step, and no chat template."""
    folder = str(tmp_path_factory.mktemp("checkpoint"))
    tokenizer = train_bpe_tokenizer([TEXT], 300)
    tokenizer.save_pretrained(folder)
    sizes = {"n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": CONTEXT, "vocab_size": len(tokenizer)}
    special = {"bos_token_id": tokenizer.eos_token_id, "eos_token_id": tokenizer.eos_token_id}
    set_seed(0)
    model = GPT2LMHeadModel(GPT2Config(**sizes, **special, initializer_range=0.3))
    with torch.no_grad():
        # Never the likeliest: the end token, and what is no ASCII and might be no character.
        silent = [id for id in range(len(tokenizer)) if not tokenizer.decode([id]).isascii()]
        model.transformer.wte.weight[[*silent, tokenizer.eos_token_id]] = 0
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(checkpoint, tmp_path_factory) -> str:
    """An adapter that matters, with a chat template, on the checkpoint in 4 bits."""
    folder = tmp_path_factory.mktemp("adapter")
    args = AdapterArguments(model=checkpoint)
    base = load_base_model(args, torch.float32, torch.device("cpu"))
    lively_adapter(base, args, std=0.1).save_pretrained(folder)
    base.config.quantization_config.to_json_file(folder / QUANTIZATION_CONFIG)
    tokenizer = load_tokenizer(checkpoint)
    add_chat_template(tokenizer)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def loaded(checkpoint):
    return load_for_generation(checkpoint)


def failing(argv: list[str], capsys) -> str:
    """The one line on stderr of a command that a user got wrong."""
    with pytest.raises(SystemExit) as raised:
        cli.main(argv)
    out, err = capsys.readouterr()
    assert (raised.value.code, out, err.count("\n")) == (2, "", 1)
    return err


# ------------------------------------------------------------------ llmkit generate


def test_greedy_text_is_the_pipelines(checkpoint, capsys):
    cli.main(["generate", checkpoint, "def read", "--temperature", "0", "--max_new_tokens", "30"])
    out, err = capsys.readouterr()
    complete = pipeline("text-generation", checkpoint)
    expected = complete("def read", max_new_tokens=30, do_sample=False)[0]["generated_text"]
    assert len(expected) > len("def read") + 20
    assert out == expected + "\n"
    assert err.startswith("30 tokens in ") and err.endswith(" tokens/s\n")


def test_an_adapter_speaks_on_the_base_it_was_trained_on(checkpoint, adapter):
    model, tokenizer = load_for_generation(adapter)
    assert sum(isinstance(module, Linear4bit) for module in model.modules()) == 2 * 4
    four_bits = BitsAndBytesConfig.from_dict({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"})
    complete = pipeline("text-generation", adapter, tokenizer=adapter, model_kwargs={"quantization_config": four_bits})
    base, _ = load_for_generation(checkpoint, "nf4")
    ids = tokenizer(TEXT, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected, found, without = (m(ids).logits.float() for m in (complete.model, model, base))
    # Not the text: two logits may be as near as rounding, which depends on the processor and on bfloat16.
    assert (found - expected).norm() < 0.05 * expected.norm() < (without - expected).norm()
    assert continue_prompts(model, tokenizer, ["def read"], GREEDY)[0].text


def test_a_batch_is_its_prompts_one_by_one(loaded, checkpoint, capsys):
    prompts = ["def read(path):\n    return", "", "x"]
    single = [continue_prompts(*loaded, [prompt], GREEDY)[0] for prompt in prompts]
    assert continue_prompts(*loaded, prompts, GREEDY) == single
    cli.main(["generate", checkpoint, *prompts, "--temperature", "0", "--max_new_tokens", "24"])
    out = capsys.readouterr().out
    assert out == f"\n{'-' * 40}\n".join(each.prompt + each.text for each in single) + "\n"


def test_samples_differ_and_a_seed_repeats_them(checkpoint, capsys):
    argv = ["generate", checkpoint, "def", "--num_samples", "2", "--max_new_tokens", "20", "--seed"]
    outs = []
    for seed in "5", "5", "6":
        cli.main([*argv, seed])
        outs.append(capsys.readouterr().out)
    assert outs[0] == outs[1] != outs[2]
    first, second = outs[0].split("-" * 40)
    assert first.strip() != second.strip()


def test_a_prompt_from_stdin_loses_its_last_line_break(checkpoint, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("def read\n"))
    flags = ["--temperature", "0", "--max_new_tokens", "9"]
    cli.main(["generate", checkpoint, "-", *flags])
    piped = capsys.readouterr().out
    cli.main(["generate", checkpoint, "def read", *flags])
    assert piped == capsys.readouterr().out


@pytest.mark.parametrize("prompts", [1, 2])
def test_text_ends_before_the_stop_text(loaded, checkpoint, prompts, capsys):
    whole = continue_prompts(*loaded, ["def read"], GREEDY)[0]
    stop = whole.text[9:12]
    before = whole.text[: whole.text.index(stop)]
    found = continue_prompts(*loaded, ["def read"], Sampling(temperature=0, max_new_tokens=24, stop=[stop, "never"]))
    assert found[0].text == before
    assert found[0].tokens < whole.tokens
    flags = ["--stop", "never", "--stop", stop, "--temperature", "0", "--max_new_tokens", "24"]
    cli.main(["generate", checkpoint, *["def read"] * prompts, *flags])
    assert f"def read{before}\n" in capsys.readouterr().out


def test_without_max_new_tokens_the_context_is_the_limit(loaded):
    prompt = "x " * 50
    length = len(loaded[1](prompt)["input_ids"])
    found = continue_prompts(*loaded, [prompt], Sampling(temperature=0))
    assert found[0].tokens == CONTEXT - length > 10


def test_a_long_prompt_does_not_shorten_its_neighbours(loaded):
    prompts = ["x " * 50, "def read"]
    whole = Sampling(temperature=0, max_new_tokens=100)
    for sampling in Sampling(temperature=0), whole:
        single = [continue_prompts(*loaded, [prompt], sampling)[0] for prompt in prompts]
        assert continue_prompts(*loaded, prompts, sampling) == single
    assert [each.tokens for each in single] == [100, 100]
    assert [each.slid for each in single] == [True, False]


def test_the_window_slides_when_more_is_wanted_than_fits(loaded, checkpoint, capsys):
    """Whenever the context is full, its last half is the beginning of the next window."""
    model, tokenizer = loaded
    ids = window = tokenizer("def read")["input_ids"]
    for _ in range(300):
        with torch.no_grad():
            token = model(torch.tensor([window])).logits[0, -1].argmax().item()
        ids, window = [*ids, token], [*window, token]
        if len(window) == CONTEXT:
            window = window[-CONTEXT // 2 :]
    cli.main(["generate", checkpoint, "def read", "--temperature", "0", "--max_new_tokens", "300"])
    out, err = capsys.readouterr()
    assert out == tokenizer.decode(ids) + "\n"
    assert err.count(f"the context of {CONTEXT} tokens") == 1
    cli.main(["generate", checkpoint, "def read", "--temperature", "0"])
    assert "context" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["x " * 128], "the prompt has 2"),
        (["x", "--max_new_tokens", "0"], "max_new_tokens is 0"),
        (["x", "--temperature", "-1"], "temperature is -1.0"),
        (["x", "--temperature", "nan"], "temperature is nan"),
        (["x", "--temperature", "1e-45"], "temperature is 1e-45"),
        (["x", "--seed", "9" * 20], "a seed is a whole number"),
        (["x", "--seed", "-1"], "a seed is a whole number"),
        (["caf\udce9"], r"'caf\udce9' is not UTF-8"),
        (["x", "--top_k", "-1"], "top_k is -1"),
        (["x", "--top_p", "1.5"], "top_p is 1.5"),
        (["x", "--stop", ""], "stop is an empty text"),
        (["x", "--num_samples", "0"], "num_samples is 0"),
        (["x", "--num_samples", "2", "--temperature", "0"], "all be the same text"),
        (["x", "--quantize", "int4"], "'int8', 'nf4'"),
        (["x", "--base", "other"], "only adapters have a base"),
        (["-", "-"], "more than once"),
    ],
)
def test_mistakes_are_one_line(flags, message, checkpoint, capsys):
    assert message in failing(["generate", checkpoint, *flags], capsys)


@pytest.mark.parametrize("attention", ["flash_attention_2", "org/kernel", "nonsense"])
def test_a_configuration_that_names_an_attention_which_is_not_here(attention, checkpoint, tmp_path, capsys):
    shutil.copytree(checkpoint, tmp_path / "foreign")
    config = json.loads((tmp_path / "foreign/config.json").read_text())
    (tmp_path / "foreign/config.json").write_text(json.dumps(config | {"attn_implementation": attention}))
    assert "its model does not load" in failing(["generate", str(tmp_path / "foreign"), "x"], capsys)


def test_folders_that_are_no_checkpoint(checkpoint, adapter, tmp_path, capsys):
    assert "no such file or folder" in failing(["generate", str(tmp_path / "missing"), "x"], capsys)
    assert "no config.json" in failing(["generate", str(tmp_path), "x"], capsys)
    (tmp_path / "checkpoint-7").mkdir()
    assert f"such as {tmp_path}/checkpoint-7" in failing(["generate", str(tmp_path), "x"], capsys)
    (tmp_path / "config.json").write_text((Path(checkpoint) / "config.json").read_text())
    assert "no tokenizer's files there" in failing(["generate", str(tmp_path), "x"], capsys)
    load_tokenizer(checkpoint).save_pretrained(tmp_path)
    assert "does not load" in failing(["generate", str(tmp_path), "x"], capsys)
    (tmp_path / "model.safetensors").write_bytes(b"broken")
    assert "does not load" in failing(["generate", str(tmp_path), "x"], capsys)
    assert "llmkit merge" in failing(["generate", adapter, "x", "--quantize", "int8"], capsys)
    assert "set --base" in failing(["generate", adapter, "x", "--base", str(tmp_path / "gone")], capsys)


def test_help_does_not_wait_for_torch():
    code = (
        "import sys\n"
        "from llmkit.cli import main\n"
        "try: main(['generate', '--help'])\n"
        "except SystemExit: print({'torch', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.endswith("set()\n")


# ------------------------------------------------------------------ streaming


def test_pieces_are_whole_characters_and_come_at_once(loaded):
    tokenizer, pieces = loaded[1], []
    text = "déjà vu: 日本語 🙂\nnaïve"
    ids = tokenizer(text)["input_ids"]
    assert len(ids) > len(text), "characters of several tokens"
    streamer = PieceStreamer(tokenizer, Sampling(), pieces.append)
    streamer.put(torch.tensor([[1, 2, 3]]))  # the prompt
    for token in ids:
        streamer.put(torch.tensor([token]))
    assert "".join(pieces) == text, "before the end is known"
    streamer.finish()
    assert "".join(pieces) == text
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)
    assert len(pieces) > 15


def test_a_stop_text_is_not_begun(loaded):
    tokenizer, pieces = loaded[1], []
    streamer = PieceStreamer(tokenizer, Sampling(stop=["XYZ", "\n\n\n"]), pieces.append)
    streamer.put(torch.tensor([[1]]))
    seen = []
    for token in tokenizer("aXYb\n\ncXYZd")["input_ids"]:
        streamer.put(torch.tensor([token]))
        seen.append("".join(pieces))
    streamer.finish()
    assert seen[0] == "a"
    assert seen[1:3] == ["a", "a"]  # X, Y
    assert "aXYb" in seen
    assert "".join(pieces) == "aXYb\n\nc"


# ------------------------------------------------------------------ quantized


def test_quantized_models_say_nearly_the_same(checkpoint, loaded):
    ids = torch.arange(100)[None] * 3 % 290
    with torch.no_grad():
        expected = loaded[0](ids).logits.log_softmax(-1)
    divergence = {}
    for kind, layer in ("int8", Linear8bitLt), ("nf4", Linear4bit):
        model, _ = load_for_generation(checkpoint, kind)
        assert sum(isinstance(module, layer) for module in model.modules()) == 2 * 4
        assert model.lm_head.weight is model.transformer.wte.weight, "still tied, and not quantized"
        assert model.lm_head.weight.is_floating_point()
        with torch.no_grad():
            found = model(ids).logits.float().log_softmax(-1)
        divergence[kind] = (expected.exp() * (expected - found)).sum(-1).mean().item()
    nothing = -(expected.exp() * expected).sum(-1).mean().item()  # against random logits it would be of this size
    assert 0 < divergence["int8"] < divergence["nf4"] < nothing
    assert divergence["int8"] < 0.05 * nothing


# ------------------------------------------------------------------ chat

QUESTIONS = ["read(path)?", "write?", "And then?"]


def say_nothing(piece: str) -> None:
    pass


@pytest.fixture(scope="module")
def chatting(adapter):
    return load_for_generation(adapter)


def test_the_cache_between_turns_changes_nothing(chatting):
    """The same answers as from a fresh start each turn, and later turns compute only what is new."""
    sampling = Sampling(temperature=0, max_new_tokens=10)
    kept, fresh = Chat(*chatting, sampling), Chat(*chatting, sampling)
    lengths = []
    hook = chatting[0].transformer.wte.register_forward_hook(
        lambda module, args, output: lengths.append(args[0].shape[1])
    )
    for turn, question in enumerate(QUESTIONS):
        pieces, computed = [], []
        for chat, write in (kept, pieces.append), (fresh, say_nothing):
            lengths.clear()
            answer = chat.answer(question, write)
            computed.append(lengths[0])
        assert "".join(pieces) == answer == kept.messages[-1]["content"] != ""
        assert computed[0] == computed[1] if turn == 0 else computed[0] < computed[1] - 30
        fresh.cache, fresh.cached = None, []
    hook.remove()


def test_a_full_context_forgets_the_oldest_turns(chatting):
    """Of the cache only what the next prompt begins with is kept, so the answers are again those of a fresh start."""
    chat, fresh = (Chat(*chatting, Sampling(temperature=0, max_new_tokens=20)) for _ in range(2))
    for question in QUESTIONS:
        fresh.cache, fresh.cached = None, []
        assert chat.answer(question, say_nothing) == fresh.answer(question, say_nothing)
    assert chat.forgotten > 0
    assert chat.messages[-2]["content"] == QUESTIONS[-1]
    assert len(chat.messages) == 2 * (len(QUESTIONS) - chat.forgotten)
    asked = list(chat.messages)
    with pytest.raises(UserError, match=f"context {CONTEXT}: shorten it"):
        chat.answer("x " * CONTEXT, say_nothing)
    assert chat.messages == asked != []
    assert chat.answer("again?", say_nothing)


def test_ctrl_c_ends_an_answer_and_not_the_chat(chatting):
    chat = Chat(*chatting, Sampling(temperature=0, max_new_tokens=30))
    whole = Chat(*chatting, Sampling(temperature=0, max_new_tokens=30)).answer("read?", say_nothing)
    handler = signal.getsignal(signal.SIGINT)
    answer = chat.answer("read?", lambda piece: signal.raise_signal(signal.SIGINT))
    assert 0 < len(answer) < len(whole) and whole.startswith(answer)
    assert signal.getsignal(signal.SIGINT) is handler
    assert chat.answer("write?", say_nothing)


def test_chat_through_a_pipe(adapter, chatting, monkeypatch, capsys):
    lines = ["read?", "", "write?", "/reset", "read?", "x " * CONTEXT, "z" * 80, "/exit", "not read"]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    cli.main(["chat", adapter, "--temperature", "0", "--max_new_tokens", "12"])
    out, err = capsys.readouterr()
    chat = Chat(*chatting, Sampling(temperature=0, max_new_tokens=12))
    first, second = chat.answer("read?", say_nothing), chat.answer("write?", say_nothing)
    chat.reset()
    again, last = chat.answer("read?", say_nothing), chat.answer("z" * 80, say_nothing)
    assert again == first and chat.forgotten == 1
    assert out == "".join(f"{answer.lstrip()}\n" for answer in (first, second, again, last))
    assert err.startswith("error: the question has ")
    assert f"(the context of {CONTEXT} tokens is full: the oldest turn was forgotten)" in err


def test_chat_takes_a_system_prompt(chatting):
    sampling = Sampling(temperature=0, max_new_tokens=8)
    chat, plain = Chat(*chatting, sampling, system="Be brief."), Chat(*chatting, sampling)
    assert chat.answer("read?", say_nothing) != plain.answer("read?", say_nothing)
    assert chatting[1].decode(chat.cached).startswith("Be brief.\n### Human: read?")
    chat.reset()
    chat.answer("write?", say_nothing)
    assert chatting[1].decode(chat.cached).startswith("Be brief.\n### Human: write?")


@pytest.mark.parametrize("template", ["{{ messages[-1].content }}", "{{ raise_exception('no system') }}"])
def test_a_template_without_a_system_prompt_refuses_one(chatting, template):
    model, tokenizer = chatting
    other = copy.deepcopy(tokenizer)
    other.chat_template = template
    with pytest.raises(UserError, match="has no system prompt"):
        Chat(model, other, Sampling(), system="Be brief.")


def test_chat_commands(adapter, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("/help\n/hlep\n/exit"))
    cli.main(["chat", adapter])
    out, err = capsys.readouterr()
    assert out == ""
    assert all(f"\n{command} " in f"\n{err}" for command in ("/help", "/reset", "/exit"))
    assert "error: /hlep is not a command" in err


def test_chat_needs_a_template(checkpoint, capsys):
    assert "no chat template" in failing(["chat", checkpoint], capsys)
