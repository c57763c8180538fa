"""The card says what the log says, in metadata that the Hub reads, and nothing that is the user's own."""

import json
import math
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from llmkit import GPT2Config, GPT2LMHeadModel
from llmkit.sharing.model_card import run_of, write_model_card

RUN = {
    "arguments": {
        "output_dir": "/home/lovelace/runs/secret",
        "run_name": "lovelace's",
        "max_steps": 40,
        "learning_rate": 6e-4,
        "sample_prompts": ['say "hello"'],
        "hub_model_id": "lovelace/secret",
        "report_to": ["wandb"],
    },
    "source": {"text_files": ["/home/lovelace/diary/*.txt"], "data_dir": "/home/lovelace/data", "block_size": 64},
    "decisive": {"learning_rate": 6e-4, "seed": 42, "optim": "adamw_torch_fused", "data_seed": None},
    "model": {"parameters": 1, "config": {}},
    "data": {
        "description": "diary.txt",
        "train_tokens": 20_000,
        "train_documents": 3,
        "train_bytes": 54_321_000,
        "validation_tokens": 1_000,
    },
    "machine": {"device": "NVIDIA H200", "ranks": 8, "cpus": 96},
    "versions": {"llmkit": "0.1.0", "torch": "2.13.0"},
}


def training(step: int, time: float, loss: float) -> dict:
    return {"step": step, "time": time, "loss": loss, "tokens": 512 * step, "tokens_per_second": 1000.0 + step}


def evaluation(step: int, time: float, loss: float) -> dict:
    return {"step": step, "time": time, "eval_loss": loss, "eval_perplexity": math.exp(loss), "epoch": step / 39}


LOG = [
    {"step": 0, "time": 1000.0, "run": RUN},
    training(10, 1600.0, 5.5),
    training(20, 2200.0, 4.5),
    evaluation(20, 2300.0, 4.6) | {"eval_bits_per_byte": 1.75},
    {"step": 20, "time": 2310.0, "prompt": "p", "sample": "p and\n```\nfenced"},
    {"step": 20, "time": 9000.0, "run": RUN},  # resumed from checkpoint-20, hours later
    training(40, 9600.0, 3.5),
    evaluation(40, 9700.0, 3.6) | {"eval_bits_per_byte": 1.37},
    {
        "step": 40,
        "time": 9800.0,
        "hellaswag/acc": 0.28,
        "hellaswag/acc_norm": 0.3125,
        "hellaswag/acc_norm_stderr": 0.0046,
        "hellaswag/questions": 10042,
    },
    {"step": 40, "time": 9900.0, "train_runtime": 900.0},
]


@pytest.fixture
def run(tmp_path, tiny_config) -> Path:
    """A run's folder with two checkpoints and a log of two starts."""
    folder = tmp_path / "run"
    for checkpoint in (folder, folder / "checkpoint-20", folder / "checkpoint-40"):
        GPT2LMHeadModel(GPT2Config(**tiny_config)).save_pretrained(checkpoint)
    write_log(folder, LOG)
    return folder


def write_log(folder: Path, records: list[dict]) -> None:
    (folder / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def card(folder: Path, checkpoint: Path, **how: str | None) -> ModelCard:
    given = {"license": None, "base": None, "dataset": None} | how
    write_model_card(folder, "me/model", run_of(checkpoint), **given)
    return ModelCard.load(folder / "README.md")


def test_it_tells_what_the_log_tells(run):
    found = card(run, run, license="apache-2.0")
    assert found.data.to_dict() == {
        "library_name": "transformers",
        "license": "apache-2.0",
        "pipeline_tag": "text-generation",
        "tags": ["llmkit"],
        "model-index": [
            {
                "name": "model",
                "results": [
                    {
                        "task": {"type": "text-generation"},
                        "dataset": {"name": "HellaSwag", "type": "Rowan/hellaswag"},
                        "metrics": [{"type": "acc_norm", "value": 0.3125}],
                    }
                ],
            }
        ],
    }
    parameters = GPT2LMHeadModel.from_pretrained(run).num_parameters()
    for text in (
        f"`GPT2LMHeadModel` with {parameters:,} parameters: 3 layers, 4 heads, 48 wide, a context of 64 tokens, 211",
        "Trained from scratch.",
        "| Validation loss | 3.6000 |\n| Perplexity | 36.60 |\n| Bits per byte | 1.3700 |",
        "| HellaSwag acc_norm | 0.3125 ± 0.0046 (10,042 questions) |",
        "| To train on | 20,000 tokens in 3 documents |\n| Text to train on | 54.3 MB |\n| Held out | 1,000 tokens |",
        "| Tokens seen | 20,480 |\n| Passes over the data | 1.03 |",
        "On 8 x NVIDIA H200, in 37 min, evaluations included, in 2 parts; 1,020 tokens per second in the median.",
        "With llmkit 0.1.0, torch 2.13.0.",
        "| `learning_rate` | 0.0006 |",
        "````\np and\n```\nfenced\n````",
        'print(generate("say \\"hello\\"", max_new_tokens=50)',
        "![Loss over the steps](loss_curve.png)",
    ):
        assert text in found.content, text
    assert "data_seed" not in found.content


def test_it_tells_nothing_of_the_user_s_own(run):
    content = card(run, run).content
    assert "local files" in content
    for word in ("lovelace", "diary", "secret", "/home", "wandb", str(run)):
        assert word not in content


def test_a_checkpoint_knows_what_was_known_then(run):
    """Also where a later start went on from it."""
    content = card(run / "checkpoint-20", run / "checkpoint-20").content
    assert "| Validation loss | 4.6000 |" in content and "| At step | 20 |" in content
    assert "in 22 min, evaluations included;" in content and "a checkpoint at step 20, 50% of" in content
    assert "3.6" not in content and "HellaSwag" not in content
    assert "of the planned training" not in card(run / "checkpoint-40", run / "checkpoint-40").content


def test_a_checkpoint_under_another_name_knows_its_step_by_its_state(run):
    best = (run / "checkpoint-20").rename(run / "checkpoint-best")
    assert "not recorded beside" in card(best, best).content
    for damaged in ("", "[]", '{"global_step": []}'):
        (best / "trainer_state.json").write_text(damaged)
        assert run_of(best) is None
    (best / "trainer_state.json").write_text('{"global_step": 20}')
    assert "| At step | 20 |" in card(best, best).content


def test_signs_of_a_log_are_no_markdown(run):
    odd = "a|b\n\n# c <b>*d*</b> [e](f) `g`"
    as_text = r"a\|b # c \<b\>\*d\*\</b\> \[e\](f) \`g\`"
    record = RUN | {
        "source": {},
        "data": RUN["data"] | {"description": odd},
        "decisive": {"optim": odd},
        "machine": {"device": odd, "ranks": 1},
        "versions": {odd: "1"},
    }
    write_log(run, [LOG[0] | {"run": record}, *LOG[1:4]])
    content = card(run, run).content
    assert f"| Source | {as_text} |" in content and f"| `optim` | {as_text} |" in content
    in_a_sentence = as_text.replace(r"\|", "|")
    assert f"On 1 x {in_a_sentence}, in" in content and f"With {in_a_sentence} 1." in content
    assert content.count(odd) == 0 and "<b>" not in content.replace(r"\<b\>", "")


def test_datasets_and_bases_on_the_hub_are_metadata(run):
    record = RUN | {"source": {"dataset_name": "org/text", "dataset_config": "small", "init_from": "org/base"}}
    write_log(run, [LOG[0] | {"run": record}, *LOG[1:4]])
    found = card(run, run, base="org/base", dataset="org/text")
    assert (found.data.base_model, found.data.datasets) == ("org/base", ["org/text"])
    measured = {result.metric_type: result.metric_value for result in found.data.eval_results}
    assert measured == {"loss": 4.6, "perplexity": math.exp(4.6), "bits_per_byte": 1.75}
    assert "[org/text](https://huggingface.co/datasets/org/text), configuration `small`" in found.content
    assert "Its training started from [org/base]" in found.content
    private = card(run, run).content  # neither is on the Hub
    assert "a local dataset" in private and "on from another checkpoint" in private and "org/" not in private


def test_an_adapter(tmp_path):
    from peft import LoraConfig, get_peft_model

    base = GPT2LMHeadModel(GPT2Config(vocab_size=211, n_positions=64, n_embd=48, n_layer=2, n_head=4, eos_token_id=0))
    adapter = get_peft_model(base, LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True))
    adapter.save_pretrained(tmp_path)
    settings = {"load_in_4bit": True, "load_in_8bit": False, "bnb_4bit_quant_type": "nf4"}
    (tmp_path / "quantization_config.json").write_text(json.dumps(settings))
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    data = {"description": "chats.jsonl", "conversations": 1234, "validation_conversations": 56}
    record = RUN | {"source": {"data_files": ["chats.jsonl"]}, "data": data}
    write_log(tmp_path, [LOG[0] | {"run": record}, {"step": 5, "time": 1005.0, "loss": 2.0, "trained_tokens": 777}])
    found = card(tmp_path, tmp_path, base="org/base")
    assert (found.data.library_name, found.data.base_model, found.data.tags) == (
        "peft",
        "org/base",
        ["llmkit", "lora"],
    )
    assert found.data.to_dict()["base_model_relation"] == "adapter"
    parameters = 2 * 4 * (48 + 3 * 48)  # layers x rank x (in + out)
    for text in (
        f"A LoRA adapter of rank 4 with {parameters:,} parameters for [org/base]",
        'pipeline("text-generation", "me/model", tokenizer="me/model")',
        'messages = [{"role": "user", "content": "say \\"hello\\""}]',
        'BitsAndBytesConfig(\n    load_in_4bit=True,\n    bnb_4bit_quant_type="nf4",\n)',
        "| To train on | 1,234 conversations |\n| Held out | 56 conversations |\n| Tokens trained on | 777 |",
        "| `lora_r` | 4 |",
        "in 5 s",
    ):
        assert text in found.content, text
    assert "chats" not in found.content and "loss_curve" not in found.content, "one point is no curve"


def test_a_preference_run_names_base_adapter_and_pairs(tmp_path):
    from peft import LoraConfig, get_peft_model

    base = GPT2LMHeadModel(GPT2Config(vocab_size=211, n_positions=64, n_embd=48, n_layer=2, n_head=4, eos_token_id=0))
    get_peft_model(base, LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True)).save_pretrained(tmp_path)
    data = {"description": "pairs", "pairs": 1234, "validation_pairs": 56}
    source = {"adapter": "org/sft", "dataset_name": "org/pairs", "dataset_split": "train_prefs"}
    record = RUN | {"kind": "preference tuning", "source": source, "data": data}
    evaluated = {
        "eval_loss": 0.5,
        "eval_preference_accuracy": 0.75,
        "eval_answer_tokens": 17.25,
        "eval_chosen_change": -0.01,
    }
    write_log(tmp_path, [LOG[0] | {"run": record}, {"step": 5, "time": 1005.0} | evaluated])
    found = card(tmp_path, tmp_path, base="org/base", dataset="org/pairs", sft_adapter="org/sft")
    for text in (
        "parameters for [org/base](https://huggingface.co/org/base). It was tuned on preferences, starting from "
        "[org/sft](https://huggingface.co/org/sft), which is also the reference.",
        "[org/pairs](https://huggingface.co/datasets/org/pairs), split `train_prefs`",
        "| To train on | 1,234 preference pairs |",
        "| Preference accuracy | 75.0% |",
        "| Tokens of an answer | 17.2 |",
    ):
        assert text in found.content, text
    assert (found.data.base_model, found.data.datasets) == ("org/base", ["org/pairs"])
    local = card(tmp_path, tmp_path, base="org/base").content  # the adapter and the pairs are nowhere on the Hub
    assert "starting from an adapter for that base that is not on the Hub" in local and "org/sft" not in local


def test_without_a_log_little_is_said(run):
    (run / "log.jsonl").unlink()
    assert run_of(run / "checkpoint-20") is None
    found = card(run, run)
    assert "not recorded beside the checkpoint" in found.content and 'generate("Hello"' in found.content
    assert "## Results" not in found.content and found.data.eval_results is None


def test_the_picture_shows_both_curves_on_no_background(run):
    import numpy as np
    from matplotlib.image import imread

    write_log(run, [*LOG[:3], training(30, 2210.0, math.nan), *LOG[3:]])
    card(run, run)
    picture = imread(run / "loss_curve.png")  # (H, W, 4)
    assert picture[0, 0, 3] == 0 and picture.shape == (600, 1200, 4)
    opaque = picture[picture[..., 3] == 1][:, :3]
    for color in ("3b8ed8", "d9731a"):
        wanted = np.array([int(color[i : i + 2], 16) / 255 for i in (0, 2, 4)])
        assert (abs(opaque - wanted).max(axis=1) < 0.01).sum() > 500


def test_configurations_keep_no_paths(run, tmp_path):
    """Also of checkpoints from elsewhere, at any depth; texts of tokens and templates stay."""
    from llmkit.sharing.staging import stage

    tokenizer = {
        "tokenizer_file": "/home/ada/my models/tokenizer.json",
        "vocab_file": "models of ada/vocab.json",
        "cache_dir": "file:///home/ada/.cache/hub",
        "special_tokens_map_file": r"\\\\ada\share\map.json",
        "added_tokens_decoder": {"0": {"content": "/home/token"}},
        "chat_template": "/home/{{ messages }}",
        "eos_token": "/home/token",
    }
    change = {
        "text_config": {"_name_or_path": "/home/ada/inner", "path": "C:/Users/ada/o'neil, x"},
        "data_dir": "/home/ada",
    }
    change |= {"name_or_path": "/home/ada/it", "auto_map": {"AutoConfig": "ada.Config"}}
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | change))
    (run / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    folder = tmp_path / "staged"
    folder.mkdir()
    stage(run, folder)
    assert json.loads((folder / "config.json").read_text()) == config | {
        "text_config": {"path": "o'neil, x"},
        "data_dir": "~",
    }
    assert json.loads((folder / "tokenizer_config.json").read_text()) == tokenizer | {
        "tokenizer_file": "tokenizer.json",
        "vocab_file": "vocab.json",
        "cache_dir": "hub",
        "special_tokens_map_file": "map.json",
    }
