"""Our GPT-2 is the stock GPT-2: same parameters, logits, loss, gradients and text, from the same files."""

import math
import resource
import subprocess
import sys
import weakref

import accelerate
import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import StaticCache

from llmkit import GPT2Config, GPT2LMHeadModel
from llmkit.model import modeling_gpt2
from ranks import on_ranks


@pytest.fixture(params=["narrow", "wide"])
def width(request, monkeypatch) -> None:
    """What the width decides, for models that are narrow both times."""
    if request.param == "wide":
        monkeypatch.setattr(modeling_gpt2, "RECOMPUTE_FROM", 0)


@pytest.fixture
def ours(tiny_config) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(**tiny_config)).eval()
    # A trained model's spread: at the initial 0.02 errors would drown in the residual stream.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@pytest.fixture
def stock(ours, tmp_path) -> transformers.GPT2LMHeadModel:
    ours.save_pretrained(tmp_path)
    return transformers.GPT2LMHeadModel.from_pretrained(tmp_path).eval()


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(1, 211, shape, generator=torch.Generator().manual_seed(seed))


def test_parameters_are_stock(ours, stock):
    mine, theirs = dict(ours.named_parameters()), dict(stock.named_parameters())
    assert list(mine) == list(theirs)
    assert all(mine[name].shape == theirs[name].shape for name in theirs)
    assert ours.lm_head.weight is ours.transformer.wte.weight
    assert stock.config.model_type == "gpt2" and stock.config.architectures == ["GPT2LMHeadModel"]
    assert stock.config.n_ctx == stock.config.n_positions == 64  # llama.cpp's converter reads n_ctx


@pytest.mark.usefixtures("width")
@pytest.mark.parametrize("masked", [False, True])
def test_loss_and_gradients_equal_stock(ours, stock, masked):
    ids = tokens(3, 29)
    labels, mask = ids.clone(), torch.ones_like(ids)
    if masked:  # ragged rows: padding on the right of one, a masked prompt in another
        labels[0, 20:], mask[0, 20:] = -100, 0
        labels[1, :11] = -100
    for model in (ours, stock):
        model.train()
    mine = ours(ids, attention_mask=mask, labels=labels)
    theirs = stock(ids, attention_mask=mask, labels=labels)
    assert mine.logits is None, "training must not make the logits"
    assert mine.loss.item() == pytest.approx(theirs.loss.item(), abs=1e-5)
    mine.loss.backward()
    theirs.loss.backward()
    for (name, p), q in zip(ours.named_parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, atol=1e-5, rtol=0, msg=lambda text, name=name: f"{name}: {text}")


def test_logits_equal_stock_both_ways(stock, tmp_path):
    stock.save_pretrained(tmp_path / "stock")
    ours = GPT2LMHeadModel.from_pretrained(tmp_path / "stock").eval()
    ids = tokens(2, 40)
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, stock(ids).logits, atol=1e-5, rtol=0)


def test_opens_openai_era_checkpoints(stock, tmp_path):
    """`openai-community/gpt2` holds no `transformer.` prefix, and the causal masks as buffers."""
    state = {
        name.removeprefix("transformer."): p for name, p in stock.state_dict().items() if name != "lm_head.weight"
    }
    state |= {f"h.{layer}.attn.bias": torch.ones(1, 1, 64, 64) for layer in range(3)}
    stock.config.save_pretrained(tmp_path)
    torch.save(state, tmp_path / "pytorch_model.bin")
    ours, report = GPT2LMHeadModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(tokens(1, 9)).logits, stock(tokens(1, 9)).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("attention", ["eager", "flex_attention"])
def test_attention_implementations_agree(ours, attention):
    ids, mask = tokens(2, 16), torch.ones(2, 16, dtype=torch.long)
    mask[0, :5] = 0
    with torch.no_grad():
        expected = ours(ids, attention_mask=mask).logits
        ours.set_attn_implementation(attention)
        found = ours(ids, attention_mask=mask).logits
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], atol=1e-5, rtol=0)


def test_every_parameter_is_initialised():
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=1000, n_positions=200, n_embd=128, n_layer=6, n_head=4)
    for name, p in GPT2LMHeadModel(config).named_parameters():
        if name.endswith("bias"):
            assert (p == 0).all(), name
        elif ".ln_" in name:
            assert (p == 1).all(), name
        else:
            expected = 0.02 / math.sqrt(2 * 6) if "c_proj" in name else 0.02
            assert p.std().item() == pytest.approx(expected, rel=0.03), name
            assert p.mean().item() == pytest.approx(0, abs=expected / 20), name


def loss_from_logits(model, ids: torch.Tensor) -> torch.Tensor:
    logits = model(ids).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def test_the_loss_of_an_offloaded_model_is_that_of_its_logits(ours):
    """accelerate keeps the weights elsewhere, and the head's own is empty until the head is called."""
    ids = tokens(2, 30)
    with torch.no_grad():
        expected = ours(ids, labels=ids).loss
        accelerate.cpu_offload(ours, execution_device="cpu")
        assert ours.lm_head.weight.device.type == "meta"
        torch.testing.assert_close(ours(ids, labels=ids).loss, expected)
        torch.testing.assert_close(ours(ids, labels=ids, num_items_in_batch=1).loss, expected * 58)


def test_an_adapter_on_the_head_is_trained(ours):
    ids = tokens(2, 30)
    peft_model = get_peft_model(ours, LoraConfig(target_modules=["lm_head"], init_lora_weights=False)).train()
    loss = peft_model(ids, labels=ids).loss
    torch.testing.assert_close(loss, loss_from_logits(peft_model, ids))
    loss.backward()
    gradients = [p.grad for p in peft_model.parameters() if p.requires_grad]
    assert len(gradients) == 2 and all(gradient.abs().sum() > 0 for gradient in gradients)


@pytest.mark.parametrize("which", [0, 3, torch.tensor([1, 5]), torch.tensor([[1, 5], [0, 2]])])
def test_logits_are_made_of_the_positions_asked_for(ours, which):
    ids = tokens(2, 8)
    with torch.no_grad():
        whole, some = ours(ids).logits, ours(ids, logits_to_keep=which).logits
        mask = torch.rand(2, 8, generator=torch.Generator().manual_seed(0)) > 0.5
        torch.testing.assert_close(ours(ids, logits_to_keep=mask).logits, whole[mask])
    if isinstance(which, int):
        which = torch.arange(8)[-which:]
    expected = [row[at] for row, at in zip(whole, which.expand(2, -1), strict=True)]
    torch.testing.assert_close(some, torch.stack(expected))


@pytest.mark.parametrize("micro", [1, 2, 5])
def test_loss_does_not_depend_on_the_split(ours, micro):
    """Rows of different lengths, cut into micro-batches: the same loss and gradient as all at once."""
    ours.train()
    ids = tokens(10, 32)
    labels = ids.clone()
    for row in range(10):
        labels[row, 32 - 3 * row :] = -100
    count = (labels[:, 1:] != -100).sum()
    ours(ids, labels=labels).loss.backward()
    expected = ours.transformer.wte.weight.grad.clone()
    whole = ours(ids, labels=labels).loss.item()
    ours.zero_grad()
    total = 0.0
    for rows in torch.arange(10).split(micro):
        loss = ours(ids[rows], labels=labels[rows], num_items_in_batch=count).loss
        loss.backward()
        total += loss.item()
    assert total == pytest.approx(whole, rel=1e-6)
    torch.testing.assert_close(ours.transformer.wte.weight.grad, expected, rtol=1e-5, atol=1e-7)


def test_shift_labels_are_labels_shifted(ours):
    ids = tokens(2, 30)
    shifted = torch.nn.functional.pad(ids[:, 1:], (0, 1), value=-100)
    assert ours(ids, labels=ids).loss.item() == ours(ids, shift_labels=shifted).loss.item()


@pytest.mark.parametrize("implementation", [None, "static"])
def test_cached_generation_equals_uncached(ours, implementation):
    """Left-padded prompts of different lengths, greedy."""
    ids, mask = tokens(3, 12), torch.ones(3, 12, dtype=torch.long)
    ids[0, :7], mask[0, :7] = 0, 0
    ids[1, :2], mask[1, :2] = 0, 0
    how = {"do_sample": False, "max_new_tokens": 20, "min_new_tokens": 20, "pad_token_id": 0}
    plain = ours.generate(ids, attention_mask=mask, use_cache=False, **how)
    cached = ours.generate(ids, attention_mask=mask, cache_implementation=implementation, **how)
    assert cached.tolist() == plain.tolist()


def test_static_cache_equals_dynamic(ours):
    ids = tokens(2, 10)
    cache = StaticCache(config=ours.config, max_cache_len=32)
    with torch.no_grad():
        first = ours(ids[:, :6], past_key_values=cache).logits
        rest = ours(ids[:, 6:], past_key_values=cache, position_ids=torch.arange(6, 10).unsqueeze(0)).logits
        torch.testing.assert_close(torch.cat([first, rest], 1), ours(ids).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("use_cache", [False, True])
def test_packed_documents_do_not_see_each_other(ours, use_cache):
    a, b = tokens(1, 9, seed=1), tokens(1, 14, seed=2)
    positions = torch.cat([torch.arange(9), torch.arange(14)]).unsqueeze(0)
    with torch.no_grad():
        packed = ours(torch.cat([a, b], 1), position_ids=positions, use_cache=use_cache).logits
        torch.testing.assert_close(packed[:, :9], ours(a).logits, atol=1e-5, rtol=0)
        torch.testing.assert_close(packed[:, 9:], ours(b).logits, atol=1e-5, rtol=0)


@pytest.mark.usefixtures("width")
def test_activation_checkpointing_changes_nothing(ours):
    ids = tokens(2, 20)
    ours.train()
    ours(ids, labels=ids).loss.backward()
    expected = {name: p.grad.clone() for name, p in ours.named_parameters()}
    ours.zero_grad()
    ours.gradient_checkpointing_enable()
    ours(ids, labels=ids).loss.backward()
    for name, p in ours.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], msg=name)


def test_a_wide_model_keeps_one_tensor_of_its_mlp_a_layer(tiny_config, monkeypatch):
    def run(recompute_from: int) -> tuple[int, int]:
        """How many results of the activation function are alive before backward, and the FLOPs of a step."""
        monkeypatch.setattr(modeling_gpt2, "RECOMPUTE_FROM", recompute_from)
        model = GPT2LMHeadModel(GPT2Config(**tiny_config)).train()
        results = []
        for block in model.transformer.h:
            block.mlp.act.register_forward_hook(lambda _, __, result: results.append(weakref.ref(result)))
        with FlopCounterMode(display=False) as counter:
            loss = model(tokens(2, 20), labels=tokens(2, 20)).loss
            alive = sum(result() is not None for result in results)
            loss.backward()
        return alive, counter.get_total_flops()

    (kept, products), (not_kept, the_same) = run(10**6), run(0)
    assert (kept, not_kept) == (tiny_config["n_layer"], 0)
    assert products == the_same


@pytest.mark.slow
def test_compiles_to_one_graph(ours):
    ids = tokens(2, 32)
    ours.train()
    expected = ours(ids, labels=ids).loss
    expected.backward()
    gradients = {name: p.grad.clone() for name, p in ours.named_parameters()}
    ours.zero_grad()
    compiled = torch.compile(ours, fullgraph=True)
    loss = compiled(ids, labels=ids).loss
    loss.backward()
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=0)
    for name, p in ours.named_parameters():
        torch.testing.assert_close(p.grad, gradients[name], atol=1e-5, rtol=0, msg=name)


def test_generation_stays_in_the_vocabulary(ours):
    """211 tokens are padded to 256 in the loss's products; no sampling setting may find the other 45."""
    how = {"do_sample": True, "max_new_tokens": 40, "min_new_tokens": 40, "pad_token_id": 0}
    for settings in ({"temperature": 100.0, "top_k": 0}, {"top_k": 500}, {"top_p": 1.0, "top_k": 0}):
        assert ours.generate(tokens(16, 4), **how, **settings).max() < 211
    assert ours(tokens(1, 4)).logits.shape[-1] == 211


def test_context_is_refused_not_overrun(ours):
    with pytest.raises(ValueError, match="65 tokens.*n_positions=64"):
        ours(tokens(1, 65))
    with pytest.raises(ValueError, match="n_positions=64.*max_new_tokens"):
        ours.generate(tokens(1, 60), max_new_tokens=10, min_new_tokens=10, pad_token_id=0)


def test_num_parameters_and_flops():
    published = {"124M": 124_439_808, "355M": 354_823_168, "774M": 774_030_080, "1558M": 1_557_611_200}
    for name, count in published.items():
        config = GPT2Config.from_preset(name)
        assert config.num_parameters == count
        with torch.device("meta"):
            assert sum(p.numel() for p in GPT2LMHeadModel(config).parameters()) == count
    # 6 * (124,439,808 - 1024 * 768) + 12 * 12 * 768 * 1024
    assert GPT2Config.from_preset("124M").flops_per_token() == 855_166_464
    with pytest.raises(ValueError, match="124M, 355M"):
        GPT2Config.from_preset("117M")


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"n_embd": 50}, "n_embd=50 is not divisible by n_head=4"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True is not supported"),
        ({"n_layer": "3"}, "expected int"),
    ],
)
def test_wrong_configurations_are_refused(tiny_config, wrong, message):
    with pytest.raises(Exception, match=message):
        GPT2Config(**{**tiny_config, **wrong})


OPENS_WITHOUT_LLMKIT = """
import sys
sys.modules["llmkit"] = None  # importing it raises
import torch, transformers
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])
assert type(model).__module__.startswith("transformers."), type(model)
print(model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=12, do_sample=False, pad_token_id=0)[0].tolist())
"""


def test_greedy_text_is_the_same_without_llmkit(ours, tmp_path):
    ours.save_pretrained(tmp_path)
    printed = subprocess.run(
        [sys.executable, "-c", OPENS_WITHOUT_LLMKIT, tmp_path], capture_output=True, text=True, check=True
    ).stdout
    expected = ours.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=12, do_sample=False, pad_token_id=0)[0].tolist()
    assert printed.strip() == str(expected)


def growth_of_a_step(config: type, model: type) -> int:
    """By how many kB a training step at GPT-2's vocabulary makes this process larger."""
    sizes = {"n_positions": 256, "n_embd": 64, "n_layer": 2, "n_head": 2}
    network = model(config(**sizes, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)).train()
    ids = torch.randint(0, 50257, (8, 256))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    network(ids, labels=ids).loss.backward()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in other units")
def test_peak_memory_is_at_most_half_of_stock():
    """Where the logits are most of the memory: 2,048 rows of 50,257."""
    (ours,) = on_ranks(1, growth_of_a_step, GPT2Config, GPT2LMHeadModel)
    (stock,) = on_ranks(1, growth_of_a_step, transformers.GPT2Config, transformers.GPT2LMHeadModel)
    assert ours * 2 < stock, f"ours grew by {ours} kB, stock by {stock} kB"
