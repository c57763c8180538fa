"""Training from Python: token ids, a model and a trainer, without a recipe."""

from transformers import AutoModelForCausalLM

from llmkit import GPT2Config, GPT2LMHeadModel
from llmkit.data.tokenizer import train_bpe_tokenizer
from llmkit.data.windows import TokenWindows
from llmkit.training.arguments import PretrainArguments
from llmkit.training.pretrain_trainer import PretrainTrainer

TEXT = "".join(f"{n} times {m} is {n * m}.\n" for n in range(20) for m in range(20))


def test_a_model_is_trained_from_token_ids(tmp_path):
    tokenizer = train_bpe_tokenizer([TEXT], 300)
    ids = tokenizer(TEXT)["input_ids"]
    train, validation = TokenWindows.from_tokens(ids[200:], ids[:200], tokenizer, block_size=16)
    config = GPT2Config(n_layer=1, n_head=2, n_embd=32, n_positions=16).for_tokenizer(tokenizer)
    args = PretrainArguments(
        output_dir=str(tmp_path), max_steps=40, total_batch_tokens=512, learning_rate=1e-2, use_cpu=True
    )
    trainer = PretrainTrainer(GPT2LMHeadModel(config), args, train, validation, tokenizer)
    trainer.train()
    trainer.save_model()
    assert trainer.evaluate()["eval_bits_per_byte"] < 3
    assert trainer.record["data"]["directory"] is None
    assert AutoModelForCausalLM.from_pretrained(tmp_path).num_parameters() == trainer.model.num_parameters()
