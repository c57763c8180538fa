"""Fine-tuning for tests: a GPT-2 of one layer, an adapter, and some sums as conversations; no files but the base's."""

from functools import partial

import torch
from transformers import GPT2Config, GPT2LMHeadModel, set_seed

from llmkit.data.tokenizer import train_bpe_tokenizer
from llmkit.finetuning.adapters import AdapterArguments, load_base_model, load_chat_tokenizer
from llmkit.finetuning.arguments import SFTArguments
from llmkit.finetuning.conversations import Conversations, encode_all
from llmkit.finetuning.sft_trainer import ConversationTrainer

CHATS = [
    [{"role": "user", "content": f"{n} times 2?"}, {"role": "assistant", "content": f"{2 * n}, that is."}]
    for n in range(16)
]


def make_base(folder, seed: int = 1) -> str:
    """A base model with its tokenizer in a folder. Returns the folder."""
    tokenizer = train_bpe_tokenizer(["### Human: 1 times 2?\n### Assistant: 2, that is."], 300)
    sizes = {"n_positions": 64, "n_embd": 32, "n_layer": 1, "n_head": 2, "eos_token_id": tokenizer.eos_token_id}
    sizes |= {"embd_pdrop": 0.0, "resid_pdrop": 0.0, "attn_pdrop": 0.0}
    set_seed(seed)
    GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def trainer(base: str, output_dir, lora: dict | None = None, **given) -> ConversationTrainer:
    make, model, args = parts(base, output_dir, lora, **given)
    return make(model, args)


def parts(base: str, output_dir, lora: dict | None = None, **given):
    """What makes the trainer, of a model and arguments, and these two."""
    adapter = AdapterArguments(model=base, **{"lora_r": 4, "lora_alpha": 8, "quantization": "none", **(lora or {})})
    how = {"max_length": 48, "max_steps": 4, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "save_steps": 2}
    how |= {"logging_steps": 1, "report_to": "none", "bf16": False, "eval_on_start": False}
    args = SFTArguments(output_dir=str(output_dir), use_cpu=True, **{**how, **given})
    tokenizer = load_chat_tokenizer(adapter)
    rows = encode_all(Conversations("chats", CHATS), tokenizer)
    model = load_base_model(adapter, args.compute_dtype, torch.device("cpu"))
    config = adapter.lora_config(model)
    how = {"lora_config": config, "train_rows": rows, "eval_rows": rows.select(range(4)), "tokenizer": tokenizer}
    return partial(ConversationTrainer, **how, description="chats", source=(adapter,)), model, args
