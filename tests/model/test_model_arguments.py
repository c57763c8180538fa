"""The model that a recipe describes."""

import pytest
import torch

from llmkit import GPT2Config, GPT2LMHeadModel
from llmkit.model.arguments import ModelArguments


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_checkpoint_in_half_precision_is_trained_in_float32(data, tmp_path, dtype):
    _, tokenizer = data
    config = GPT2Config(n_positions=16, n_embd=32, n_layer=2, n_head=2).for_tokenizer(tokenizer)
    GPT2LMHeadModel(config).to(dtype).save_pretrained(tmp_path)
    model = ModelArguments(init_from=str(tmp_path)).model(tokenizer, seed=0)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    model.save_pretrained(tmp_path / "again")
    assert GPT2Config.from_pretrained(tmp_path / "again").dtype == torch.float32
