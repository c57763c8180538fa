"""Adapters on 4-bit bases: really quantized, trained as said, and merged without a change."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from huggingface_hub import constants
from peft import get_peft_model
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BloomConfig,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    MptConfig,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedModel,
    set_seed,
)
from transformers.pytorch_utils import Conv1D
from trl import SFTTrainer

from llmkit.data.tokenizer import load_tokenizer, train_bpe_tokenizer
from llmkit.errors import UserError
from llmkit.finetuning.adapters import (
    AdapterArguments,
    check_run,
    dtype_ledger,
    linear_layers,
    load_base_config,
    load_base_model,
    load_with_adapter,
)
from llmkit.finetuning.arguments import SFTArguments
from llmkit.finetuning.conversations import Conversations, add_chat_template, encode_all
from llmkit.finetuning.merge import compare, merge_adapter
from llmkit.finetuning.sft_trainer import ConversationTrainer, has_plain_head
from llmkit.finetuning.turns import split_guanaco
from llmkit.training.callbacks import Samples
from small_run import phi_config

CPU = torch.device("cpu")
CHATS = [
    f"### Human: What is {n} + {n}?### Assistant: It is {2 * n}.### Human: Sure?### Assistant: Yes." for n in range(24)
]


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, str]:
    """A GPT-2, whose layers hold transposed weights, some of them square, and a Phi."""
    folder = tmp_path_factory.mktemp("bases")
    tokenizer = train_bpe_tokenizer(CHATS, 300)
    special = {"bos_token_id": tokenizer.eos_token_id, "eos_token_id": tokenizer.eos_token_id, "vocab_size": 320}
    set_seed(0)
    gpt2 = GPT2Config(n_embd=64, n_layer=2, n_head=2, n_positions=128, initializer_range=0.1, **special)
    for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop"):
        setattr(gpt2, name, 0.0)
    phi = phi_config(tokenizer, initializer_range=0.1, **special)
    for name, model in (("gpt2", GPT2LMHeadModel(gpt2)), ("phi", PhiForCausalLM(phi))):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return {name: str(folder / name) for name in ("gpt2", "phi")}


def load(base: str, quantization: str = "nf4", dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return load_base_model(AdapterArguments(model=base, quantization=quantization), dtype, CPU)


def trainer(base: str, output_dir, quantization: str = "nf4", **arguments) -> ConversationTrainer:
    from llmkit.finetuning.adapters import load_chat_tokenizer

    adapter = AdapterArguments(model=base, quantization=quantization, lora_r=4, lora_alpha=8, lora_dropout=0.1)
    if any(name in (Path(base) / "config.json").read_text() for name in ("bloom", "mpt")):
        adapter.attn_implementation = "eager"  # they have no other
    defaults = {"max_length": 128, "max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 1e-2}
    defaults |= {"logging_steps": 1, "save_strategy": "no", "report_to": "none", "bf16": False, "packing": True}
    args = SFTArguments(output_dir=str(output_dir), use_cpu=True, **{**defaults, **arguments})
    tokenizer = load_chat_tokenizer(adapter)
    rows = encode_all(Conversations("chats", [split_guanaco(text) for text in CHATS]), tokenizer)
    model = load_base_model(adapter, args.compute_dtype, CPU)
    lora_config = adapter.lora_config(model)
    return ConversationTrainer(model, args, lora_config, rows, rows.select(range(5)), tokenizer, "chats")


def adapter_weights(run: ConversationTrainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in run.model.named_parameters() if p.requires_grad}


# ------------------------------------------------------------------ the loss


@pytest.mark.parametrize("name", ["gpt2", "phi"])
def test_the_loss_and_its_gradients_are_trls(bases, name, tmp_path):
    run = trainer(bases[name], tmp_path, activation_checkpointing=False)
    assert run.has_plain_head
    batch = next(iter(run.get_train_dataloader()))
    found = []
    for compute_loss in (SFTTrainer.compute_loss, ConversationTrainer.compute_loss):
        run.model.eval()  # no dropout; TRL's metrics want to know nothing of it
        run.model.zero_grad()
        loss = compute_loss(run, run.model, dict(batch), num_items_in_batch=torch.tensor(50))
        loss.backward()
        gradients = {n: p.grad.clone() for n, p in run.model.named_parameters() if p.grad is not None}
        found.append((loss.detach(), gradients))
    (their_loss, theirs), (our_loss, ours) = found
    torch.testing.assert_close(our_loss, their_loss)
    assert theirs.keys() == ours.keys() == adapter_weights(run).keys()
    for n, gradient in theirs.items():
        torch.testing.assert_close(ours[n], gradient, atol=1e-5, rtol=1e-3)


def test_a_head_that_caps_its_logits_is_left_to_trl():
    sizes = {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "head_dim": 16}
    config = Gemma2Config(**sizes, num_attention_heads=2, num_key_value_heads=2)
    assert not has_plain_head(Gemma2ForCausalLM(config).eval())
    config.final_logit_softcapping = None
    assert has_plain_head(Gemma2ForCausalLM(config).eval())


# ------------------------------------------------------------------ the base


@pytest.mark.parametrize("name", ["gpt2", "phi"])
def test_the_base_is_really_quantized(bases, name):
    """Each linear layer holds NF4 values close to the original; the whole computes with exactly these."""
    plain, quantized = load(bases[name], "none"), load(bases[name])
    layers = {name: module for name, module in quantized.named_modules() if isinstance(module, Linear4bit)}
    assert len(layers) == {"gpt2": 2 * 4, "phi": 2 * 6}[name]
    for layer, module in layers.items():
        original = plain.get_submodule(layer)
        values = dequantize_4bit(module.weight.data, module.weight.quant_state)
        values = values.t() if isinstance(original, Conv1D) else values
        error = (values - original.weight).norm() / original.weight.norm()
        assert 0.05 < error < 0.12, f"{layer}: NF4 rounds normal weights by about 9%"
        with torch.no_grad():
            original.weight.copy_(values)
    ids = torch.arange(40)[None] * 7
    with torch.no_grad():
        assert torch.allclose(plain(ids).logits, quantized(ids).logits, atol=1e-4)


def test_all_linear_layers_are_adapted(bases):
    assert linear_layers(load(bases["phi"])) == ["dense", "fc1", "fc2", "k_proj", "q_proj", "v_proj"]
    assert linear_layers(load(bases["gpt2"])) == ["c_attn", "c_fc", "c_proj"]
    assert linear_layers(load(bases["gpt2"], "none")) == ["c_attn", "c_fc", "c_proj"]


def test_an_evaluation_leaves_gradients_alone(bases):
    """bitsandbytes would repack the weights in eval mode on CPUs with AVX512-BF16, and lose the gradient."""
    gradients = []
    for evaluate_first in (False, True):
        model = load(bases["gpt2"])
        set_seed(0)
        model = get_peft_model(model, AdapterArguments(lora_dropout=0.0).lora_config(model))
        ids = torch.arange(40)[None] * 7
        if evaluate_first:
            with torch.no_grad():
                model.eval()(ids)
        model.train()(ids, labels=ids).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    dropout_off = {name for name in gradients[0] if "lora_B" in name}
    assert dropout_off and all(torch.equal(gradients[0][name], gradients[1][name]) for name in dropout_off)


def test_nothing_frozen_is_upcast(bases, tmp_path):
    run = trainer(bases["phi"], tmp_path, bf16=True)
    kinds = {(p.requires_grad, p.dtype) for p in run.model.parameters()}
    assert kinds == {(False, torch.uint8), (False, torch.bfloat16), (True, torch.float32)}
    lines = {line.split()[0]: line.split()[1:] for line in dtype_ledger(run.model).splitlines()[1:]}
    assert lines["nf4"][:2] == ["frozen", f"{2 * (4 * 64**2 + 2 * 64 * 192):,}"]
    trained = sum(p.numel() for p in run.model.parameters() if p.requires_grad)
    assert lines["float32"] == ["trained", f"{trained:,}", f"{trained * 4 / 1e6:,.1f}"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"fp16": True, "bf16": False}, "fp16 does not work with Phi"),
        ({"max_length": 129}, "longer than the 128 positions"),
    ],
)
def test_what_cannot_work_is_refused_early(bases, tmp_path, arguments, message):
    args = SFTArguments(output_dir=str(tmp_path), use_cpu=True, **arguments)
    config = PhiConfig.from_pretrained(bases["phi"])
    with pytest.raises(UserError, match=message):
        check_run(args, config, args.max_length)


def test_fsdp_in_the_accelerate_configuration_is_refused(bases, tmp_path, monkeypatch):
    args = SFTArguments(output_dir=str(tmp_path), use_cpu=True, max_length=64)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UserError, match="FSDP is not supported"):
        check_run(args, PhiConfig.from_pretrained(bases["phi"]), 64)


def test_a_base_on_the_hub_is_pinned_to_its_commit(bases, tmp_path, monkeypatch):
    """From a cache as a download leaves it: the branch `main` becomes the commit that it stood for."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--someone--tiny"
    shutil.copytree(bases["phi"], repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    args = AdapterArguments(model="someone/tiny")
    load_base_config(args)
    assert args.lora_config(load_base_model(args, torch.float32, CPU)).revision == commit


# ------------------------------------------------------------------ training


@pytest.mark.parametrize("name", ["gpt2", "phi"])
def test_packed_conversations_do_not_see_each_other(bases, name, tmp_path):
    """The summed loss of packed rows is that of the conversations one by one."""
    packed = trainer(bases[name], tmp_path / "a", packing=True, per_device_eval_batch_size=2)
    single = trainer(bases[name], tmp_path / "b", packing=False, per_device_eval_batch_size=1)
    assert len(packed.eval_dataset) < len(single.eval_dataset)
    assert packed.evaluate()["eval_loss"] == pytest.approx(single.evaluate()["eval_loss"], rel=1e-5)


def test_evaluation_is_weighted_by_tokens(bases, tmp_path):
    """Against plain logits; the batches are filled up with rows that must not count."""
    run = trainer(bases["phi"], tmp_path, packing=False, per_device_eval_batch_size=3)
    nats = tokens = 0
    for row in run.eval_dataset:
        with torch.no_grad():
            logits = run.model.eval()(torch.tensor([row["input_ids"]])).logits[0, :-1]
        labels = torch.tensor(row["labels"][1:])
        nats += torch.nn.functional.cross_entropy(logits, labels, reduction="sum").item()
        tokens += int((labels != -100).sum())
    assert run.evaluate()["eval_loss"] == pytest.approx(nats / tokens, rel=1e-5)


def test_accumulation_does_not_change_the_loss(bases, tmp_path):
    losses = []
    for batch_size, accumulation in ((4, 1), (1, 4)):
        how = {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": accumulation}
        run = trainer(bases["gpt2"], tmp_path / str(batch_size), packing=False, **how)
        run.model.peft_config["default"].lora_dropout = 0.0
        for module in run.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        run.train()
        losses.append([entry["loss"] for entry in run.state.log_history if "loss" in entry])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_resume_is_exact_with_dropout(bases, tmp_path):
    """Evaluations before and within the run draw random numbers; dropout must not notice."""
    how = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    whole = trainer(bases["gpt2"], tmp_path, **how)
    whole.train()
    again = trainer(bases["gpt2"], tmp_path, **how)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for name, weight in adapter_weights(whole).items():
        assert torch.equal(weight, adapter_weights(again)[name]), name
    steps = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    trained = [line["trained_tokens"] for line in steps if "trained_tokens" in line]
    assert len(trained) == 4 and trained == sorted(set(trained))


def test_small_updates_are_not_lost(bases, tmp_path):
    """At a learning rate whose steps bfloat16 would round away, float32 adapters still move."""
    run = trainer(bases["phi"], tmp_path, bf16=True, learning_rate=1e-6, lr_schedule="constant")
    before = adapter_weights(run)
    run.train()
    moved = [
        (weight != before[name]).float().mean() for name, weight in adapter_weights(run).items() if "lora_A" in name
    ]
    assert min(moved) > 0.5
    kept = [
        (weight.bfloat16() != before[name].bfloat16()).float().mean()
        for name, weight in adapter_weights(run).items()
        if "lora_A" in name
    ]
    assert max(kept) < 0.2, "the steps are too large to show anything"


def test_rows_without_an_answer_are_left_out_with_packing_too(bases, tmp_path, monkeypatch):
    """Those whose answer begins behind the cut."""
    tokens = []
    for chats in (CHATS, [*CHATS, f"### Human: {'why ' * 200}### Assistant: So."]):
        monkeypatch.setattr(sys.modules[__name__], "CHATS", chats)
        run = trainer(bases["gpt2"], tmp_path, packing=True)
        tokens.append(sum(len(ids) for ids in run.train_dataset["input_ids"]))
    assert tokens[0] == tokens[1]


def test_samples_begin_with_one_beginning_of_text(bases, tmp_path, monkeypatch):
    """The chat template writes it, and the tokenizer would add another to a text."""
    import llmkit.finetuning.adapters as adapters

    def load_bos_tokenizer(name, revision=None):
        tokenizer = load_tokenizer(name, revision)
        bos = (tokenizer.bos_token, tokenizer.bos_token_id)
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(f"{bos[0]} $A", special_tokens=[bos])
        return tokenizer

    monkeypatch.setattr(adapters, "load_tokenizer", load_bos_tokenizer)
    run = trainer(bases["gpt2"], tmp_path, sample_prompts=["Hi"], packing=False)
    assert run.processing_class("Hi")["input_ids"][0] == run.processing_class.bos_token_id, "the tokenizer adds one"
    samples = next(callback for callback in run.callback_handler.callbacks if isinstance(callback, Samples))
    given = []
    monkeypatch.setattr(run.model, "generate", lambda input_ids, **_: given.append(input_ids) or input_ids)
    samples.sample(run.model, samples.prompts[0])
    assert given[0][0].tolist().count(run.processing_class.bos_token_id) == 1


def test_a_quantization_record_of_an_earlier_run_does_not_stay(bases, tmp_path):
    for quantization, is_there in (("nf4", True), ("none", False)):
        trainer(bases["gpt2"], tmp_path, quantization).save_model()
        assert (tmp_path / "quantization_config.json").exists() == is_there


@pytest.mark.parametrize("kind", ["bloom", "mpt"])
def test_bases_without_positions_are_trained_and_merged(bases, tmp_path, kind):
    sizes = {"vocab_size": 320, "n_layer": 1, "n_head": 2, "eos_token_id": 299, "bos_token_id": 299}
    config = BloomConfig(hidden_size=32, **sizes) if kind == "bloom" else None
    config = config or MptConfig(
        **({"d_model": 32, "n_layers": 1, "n_heads": 2, "max_seq_len": 64, "vocab_size": 320})
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(bases["gpt2"]).save_pretrained(tmp_path / "base")
    args = SFTArguments(output_dir=str(tmp_path), use_cpu=True, max_length=64)
    check_run(args, config, args.max_length)
    run = trainer(str(tmp_path / "base"), tmp_path / "run", packing=False, sample_prompts=["Hi"], sample_tokens=3)
    run.train()
    run.save_model()
    assert merge_adapter(str(tmp_path / "run"), str(tmp_path / "merged"), torch.float32).within_bounds


# ------------------------------------------------------------------ merging


@pytest.mark.parametrize("name, quantization", [("gpt2", "nf4"), ("phi", "nf4"), ("gpt2", "none")])
def test_merged_is_base_and_adapter(bases, tmp_path, name, quantization):
    run = trainer(bases[name], tmp_path / "run", quantization)
    run.train()
    run.save_model()
    assert (tmp_path / "run" / "quantization_config.json").exists() == (quantization == "nf4")
    found = merge_adapter(str(tmp_path / "run"), str(tmp_path / "merged"), torch.float32)
    assert found.kl < 1e-6 and found.max_logit_difference < 1e-3, found
    assert found.perplexity_merged == pytest.approx(found.perplexity_adapter, rel=1e-5)
    rounded = merge_adapter(str(tmp_path / "run"), str(tmp_path / "rounded"), torch.bfloat16)
    assert rounded.within_bounds and rounded.kl > found.kl


def test_the_gate_closes(bases, tmp_path, monkeypatch):
    """A base without the adapter is not the same model; nothing is left behind."""
    run = trainer(bases["gpt2"], tmp_path / "run", max_steps=8)
    run.train()
    run.save_model()
    tokenizer = train_bpe_tokenizer(CHATS, 300)
    add_chat_template(tokenizer)
    rows = list(encode_all(Conversations("chats", [split_guanaco(text) for text in CHATS[:4]]), tokenizer))
    reference = load_with_adapter(str(tmp_path / "run"), None, CPU)
    assert not compare(reference, load(bases["gpt2"], "none"), rows).within_bounds
    monkeypatch.setattr("llmkit.finetuning.merge.MAX_KL", -1.0)
    with pytest.raises(UserError, match="does not say what the adapter says"):
        merge_adapter(str(tmp_path / "run"), str(tmp_path / "merged"), torch.float32)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_bad_merges_are_told(bases, tmp_path):
    with pytest.raises(UserError, match="nowhere"):
        merge_adapter(str(tmp_path / "nowhere"), str(tmp_path / "out"), torch.float32)
    with pytest.raises(UserError, match="is there already"):
        merge_adapter(str(tmp_path / "run"), str(tmp_path), torch.float32)
