"""Adapters of all kinds are merged by what they hold, and what cannot be merged is told before anything is written."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    set_seed,
)

from hub_server import hub_of_this_process
from llmkit.data.tokenizer import train_bpe_tokenizer
from llmkit.errors import UserError
from llmkit.finetuning.adapters import AdapterArguments, load_base_model, load_with_adapter
from llmkit.finetuning.conversations import add_chat_template
from llmkit.finetuning.merge import merge_adapter
from llmkit.inference.generation import load_for_generation
from llmkit.runs.run import QUANTIZATION_CONFIG

CPU = torch.device("cpu")
TEXTS = [f"### Human: What is {n} + {n}?### Assistant: It is {2 * n}." for n in range(24)]


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, str]:
    """A GPT-2, with biases, transposed weights and a tied head, and a Llama without any of these."""
    folder = tmp_path_factory.mktemp("bases")
    tokenizer = train_bpe_tokenizer(TEXTS, 300)
    ends = {"bos_token_id": tokenizer.eos_token_id, "eos_token_id": tokenizer.eos_token_id}
    set_seed(0)
    gpt2 = GPT2Config(n_embd=64, n_layer=2, n_head=2, n_positions=128, initializer_range=0.1, vocab_size=320, **ends)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    llama = LlamaConfig(**sizes, vocab_size=320, max_position_embeddings=128, initializer_range=0.1, **ends)
    for name, model in (("gpt2", GPT2LMHeadModel(gpt2)), ("llama", LlamaForCausalLM(llama))):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return {name: str(folder / name) for name in ("gpt2", "llama")}


def make_adapter(base: str, folder: Path, quantization: str = "nf4", template: bool = True, **lora) -> Path:
    """An adapter with weights as large as a training's, saved as the recipe saves it."""
    model = load_base_model(AdapterArguments(model=base, quantization=quantization), torch.float32, CPU)
    targets = ["c_attn", "c_fc"] if "gpt2" in base else ["q_proj", "up_proj"]
    how = {"task_type": "CAUSAL_LM", "r": 4, "target_modules": targets} | lora
    model = get_peft_model(model, LoraConfig(**how))
    set_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "magnitude" not in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    tokenizer = train_bpe_tokenizer(TEXTS, 300)
    if template:
        add_chat_template(tokenizer)
    tokenizer.save_pretrained(folder)
    if quantization == "nf4":
        model.config.quantization_config.to_json_file(folder / QUANTIZATION_CONFIG)
    return folder


KINDS = {
    "plain": {},
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True},
    "biases": {"bias": "all"},
    "tokens": {"trainable_token_indices": [301, 305, 310]},
    "lora_bias": {"lora_bias": True},
    "whole module": {"modules_to_save": ["ln_f"]},
}


@pytest.mark.parametrize("quantization", ["nf4", "none"])
@pytest.mark.parametrize("kind", KINDS)
def test_all_that_an_adapter_holds_is_merged(bases, tmp_path, kind, quantization):
    """The merged model's logits are the adapter's, for the tokens that no conversation has as well."""
    adapter = str(make_adapter(bases["gpt2"], tmp_path / "adapter", quantization, **KINDS[kind]))
    found = merge_adapter(adapter, str(tmp_path / "merged"), torch.float32)
    assert found.max_logit_difference < 1e-3
    reference = load_with_adapter(adapter, None, CPU)
    merged, plain = (AutoModelForCausalLM.from_pretrained(path) for path in (tmp_path / "merged", bases["gpt2"]))
    ids = torch.arange(200, 320)[None]
    with torch.no_grad():
        expected = reference(ids).logits
        assert torch.allclose(merged(ids).logits, expected, atol=1e-3)
        assert not torch.allclose(plain(ids).logits, expected, atol=0.1)


def test_tied_layers_and_a_head_that_is_its_own(bases, tmp_path):
    adapter = str(make_adapter(bases["llama"], tmp_path / "adapter", trainable_token_indices=[301, 310]))
    assert merge_adapter(adapter, str(tmp_path / "merged"), torch.float32).max_logit_difference < 1e-3


def test_the_gate_looks_at_the_trained_tokens(bases, tmp_path, monkeypatch):
    """A merge that loses them is not saved, though no conversation has them."""
    adapter = str(make_adapter(bases["gpt2"], tmp_path / "adapter", trainable_token_indices=[301, 305, 310]))
    monkeypatch.setattr("peft.tuners.trainable_tokens.layer.TrainableTokensLayer.merge", lambda self: None)
    with pytest.raises(UserError, match="does not say what the adapter says"):
        merge_adapter(adapter, str(tmp_path / "merged"), torch.float32)


REWRITING = "{% for m in messages %}{{ m['content'] if loop.last else 'x' }}{{ eos_token }}{% endfor %}"
REFUSING = "{{ raise_exception('never') }}"


@pytest.mark.parametrize("template", [None, REWRITING, REFUSING])
def test_any_chat_template_can_be_merged(bases, tmp_path, template):
    adapter = make_adapter(bases["gpt2"], tmp_path / "adapter", template=False)
    if template:
        (adapter / "chat_template.jinja").write_text(template)
    found = merge_adapter(str(adapter), str(tmp_path / "merged"), torch.float32)
    assert found.max_logit_difference < 1e-3 and found.perplexity_adapter > 1


def test_a_context_that_ends_before_any_answer(bases, tmp_path):
    """Nothing of the conversations would be predicted, so the gate predicts what it reads."""
    set_seed(0)
    short = GPT2Config.from_pretrained(bases["gpt2"], n_positions=8)
    GPT2LMHeadModel(short).save_pretrained(tmp_path / "short_gpt2")
    adapter = make_adapter(str(tmp_path / "short_gpt2"), tmp_path / "adapter")
    found = merge_adapter(str(adapter), str(tmp_path / "merged"), torch.float32)
    assert found.max_logit_difference < 1e-3 and found.perplexity_adapter > 1


# ------------------------------------------------------------------ what cannot be merged


def damage(adapter: Path, what: str, bases: dict[str, str]) -> None:
    config, weights = adapter / "adapter_config.json", adapter / "adapter_model.safetensors"
    if what == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif what == "empty":
        weights.write_bytes(b"")
    elif what == "missing keys":
        tensors = load_file(weights)
        del tensors[max(tensors)]
        save_file(tensors, weights)
    elif what == "no weights":
        weights.unlink()
    elif what in ("MAGIC", "IA3", None):
        config.write_text(json.dumps(json.loads(config.read_text()) | {"peft_type": what}))
    elif what == "cut configuration":
        config.write_text(config.read_text()[:40])
    elif what == "a list":
        config.write_text("[]")
    elif what == "cut record":
        (adapter / QUANTIZATION_CONFIG).write_text('{"load_in_4bit": tr')


@pytest.mark.parametrize(
    "what, message",
    [
        ("truncated", "damaged"),
        ("empty", "damaged"),
        ("missing keys", "the adapter lacks .*lora_B"),
        ("no weights", "has no adapter_model.safetensors"),
        ("MAGIC", "adapter_config.json: not an adapter's configuration.*MAGIC"),
        ("IA3", "only LoRA is supported"),
        (None, "adapter_config.json: not an adapter's configuration"),
        ("cut configuration", "adapter_config.json"),
        ("a list", "adapter_config.json"),
        ("cut record", "its base .* does not load"),
    ],
)
def test_a_damaged_adapter_is_told(bases, tmp_path, what, message):
    adapter = make_adapter(bases["gpt2"], tmp_path / "adapter")
    damage(adapter, what, bases)
    with pytest.raises(UserError, match=message):
        merge_adapter(str(adapter), str(tmp_path / "merged"), torch.float32)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_a_wrong_base_is_told(bases, tmp_path):
    adapter = str(make_adapter(bases["gpt2"], tmp_path / "adapter"))
    wider = GPT2LMHeadModel(GPT2Config(n_embd=128, n_layer=2, n_head=2, n_positions=128, vocab_size=320))
    wider.save_pretrained(tmp_path / "wider")
    for base, message in ((bases["llama"], "check --base"), (str(tmp_path / "wider"), "another shape")):
        with pytest.raises(UserError, match=message):
            merge_adapter(adapter, str(tmp_path / "merged"), torch.float32, base)
    with pytest.raises(UserError, match="nowhere"):
        merge_adapter(adapter, str(tmp_path / "merged"), torch.float32, "./nowhere")


def test_a_bias_without_a_place_is_told(bases, tmp_path):
    adapter = str(make_adapter(bases["llama"], tmp_path / "adapter", lora_bias=True))
    with pytest.raises(UserError, match="lora_bias.*use the adapter as it is"):
        merge_adapter(adapter, str(tmp_path / "merged"), torch.float32)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_a_plain_checkpoint_is_named_at_once(bases, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", None)  # no weights are read
    with pytest.raises(UserError, match="is a plain checkpoint, which has nothing to merge: it has no adapter_config"):
        merge_adapter(bases["gpt2"], str(tmp_path / "merged"), torch.float32)


@pytest.mark.parametrize("how", [{"load_in_8bit": True}, {"load_in_4bit": True}])
def test_a_base_that_was_saved_quantized_is_refused_early(bases, tmp_path, how, monkeypatch):
    adapter = str(make_adapter(bases["llama"], tmp_path / "adapter", "none"))
    quantized = AutoModelForCausalLM.from_pretrained(bases["llama"], quantization_config=BitsAndBytesConfig(**how))
    quantized.save_pretrained(tmp_path / "base")
    shutil.copy(Path(bases["llama"]) / "tokenizer.json", tmp_path / "base")
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", None)
    with pytest.raises(UserError, match="was saved quantized"):
        merge_adapter(adapter, str(tmp_path / "merged"), torch.float32, str(tmp_path / "base"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


# ------------------------------------------------------------------ by its name on the Hub


@pytest.fixture
def hub(tmp_path):
    with hub_of_this_process(tmp_path / "cache") as hub:
        yield hub


def test_an_adapter_by_its_name_is_the_one_in_the_folder(bases, tmp_path, hub):
    """Its base in 4 bits, its generation settings, and the same merged weights."""
    adapter = make_adapter(bases["gpt2"], tmp_path / "adapter")
    settings = {"eos_token_id": 7, "max_new_tokens": 11, "transformers_version": "5.0"}
    (adapter / "generation_config.json").write_text(json.dumps(settings))
    hub.add_model("me/adapter", {path.name: path.read_bytes() for path in adapter.iterdir()})
    here, there = (load_for_generation(name)[0] for name in (str(adapter), "me/adapter"))
    assert there.generation_config.eos_token_id == 7 and there.generation_config.max_new_tokens == 11
    ids = torch.arange(40)[None]
    with torch.no_grad():
        assert torch.equal(here(ids).logits, there(ids).logits)
    merged = {str(adapter): tmp_path / "ours", "me/adapter": tmp_path / "theirs"}
    for name, output in merged.items():
        merge_adapter(name, str(output), torch.float32)
    ours, theirs = (load_file(output / "model.safetensors") for output in merged.values())
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_what_is_no_adapter_on_the_hub_is_told(bases, tmp_path, hub):
    hub.add_model("me/plain", {"config.json": (Path(bases["gpt2"]) / "config.json").read_bytes()})
    with pytest.raises(UserError, match="plain checkpoint"):
        merge_adapter("me/plain", str(tmp_path / "merged"), torch.float32)
    with pytest.raises(UserError, match="me/nothing: no folder here, and not read from the Hub"):
        merge_adapter("me/nothing", str(tmp_path / "merged"), torch.float32)
