"""Checkpoints that bring Python code: no command runs it, asks about it, or opens pickled weights."""

import ast
import io
import json
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel

from llmkit.cli import main
from llmkit.data.tokenizer import train_bpe_tokenizer

ROOT = Path(__file__).parents[2]
CODE = """
from pathlib import Path
Path({marker!r}).write_text("it ran")
from transformers import GPT2Config, GPT2LMHeadModel, GPT2Tokenizer
class Config(GPT2Config):
    model_type = "evil"
class Model(GPT2LMHeadModel):
    config_class = Config
class Tokenizer(GPT2Tokenizer):
    pass
def generate(model, *args, **kwargs):
    return model.generate(*args, **kwargs)
"""
AUTO_MAP = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model", "AutoTokenizer": ["evil.Tokenizer"] * 2}
SFT = ["--config", str(ROOT / "recipes" / "sft_qlora_quickstart.yaml"), "--model"]
OUT = ["--output_dir", "{tmp}/run"]
PRETRAIN = ["--config", str(ROOT / "recipes" / "pretrain_quickstart.yaml"), "--data_dir", "{tmp}/data", *OUT]
OPENING = {
    "generate": ["generate", "{evil}", "hello"],
    "chat": ["chat", "{evil}"],
    "eval": ["eval", "{evil}", "--text_files", __file__],
    "tokenizer show": ["tokenizer", "show", "hello", "--tokenizer", "{evil}"],
    "tokenizer show --compare": ["tokenizer", "show", "hello", "--tokenizer", "{good}", "--compare", "{evil}"],
    "shards prepare": [
        "shards",
        "prepare",
        "--output",
        "{tmp}/data",
        "--text_files",
        __file__,
        "--tokenizer",
        "{evil}",
    ],
    "audit": ["audit", *SFT[1:2], "--model", "{evil}"],
    "merge": ["merge", "{adapter}", "{tmp}/merged"],
    "merge --base": ["merge", "{good_adapter}", "{tmp}/merged", "--base", "{evil}"],
    "generate, adapter": ["generate", "{adapter}", "hello"],
    "push": ["push", "{evil}", "me/evil"],
    "lr-find sft": ["lr-find", *SFT, "{evil}"],
    "lr-find pretrain": ["lr-find", *PRETRAIN[:-2], "--init_from", "{evil}", "--tokenizer", "{evil}"],
    "recipe pretrain": ["recipes/pretrain.py", *PRETRAIN, "--tokenizer", "{evil}"],
    "recipe sft": ["recipes/sft_qlora.py", *SFT, "{evil}", *OUT],
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """A good checkpoint and an evil one, with an adapter on each."""
    folder = tmp_path_factory.mktemp("own_code")
    found = {name: folder / name for name in ("good", "evil", "good_adapter", "adapter", "marker")}
    tokenizer = train_bpe_tokenizer([Path(__file__).read_text()], 300)
    config = GPT2Config(vocab_size=len(tokenizer), n_positions=64, n_embd=16, n_layer=1, n_head=2, eos_token_id=0)
    for name, adapter in (("good", "good_adapter"), ("evil", "adapter")):
        model = GPT2LMHeadModel(config)
        model.save_pretrained(found[name])
        tokenizer.save_pretrained(found[name])
        model.config._name_or_path = model.name_or_path = str(found[name])
        get_peft_model(model, LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True)).save_pretrained(
            found[adapter]
        )
        tokenizer.save_pretrained(found[adapter])
    code = CODE.format(marker=str(found["marker"]))
    (found["evil"] / "evil.py").write_text(code)
    for name in ("good", "evil"):  # transformers knows this file's name
        (found[name] / "custom_generate").mkdir()
        (found[name] / "custom_generate" / "generate.py").write_text(code)
    change(found["evil"] / "config.json", model_type="evil", auto_map=AUTO_MAP)
    change(found["evil"] / "tokenizer_config.json", auto_map=AUTO_MAP, tokenizer_class="Tokenizer")
    return found


def change(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def run(command: list[str], monkeypatch) -> None:
    """A command, with somebody at the keyboard who says yes to whatever is asked."""
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 50))
    if command[0].startswith("recipes/"):
        monkeypatch.setattr(sys, "argv", command)
        runpy.run_path(str(ROOT / command[0]), run_name="__main__")
    else:
        main(command)


@pytest.mark.parametrize("command", OPENING.values(), ids=OPENING.keys())
def test_no_command_runs_or_asks(command, folders, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.chdir(tmp_path)
    places = {"tmp": str(tmp_path)} | {name: str(path) for name, path in folders.items()}
    try:
        with pytest.raises(SystemExit) as ended:
            run([part.format(**places) for part in command], monkeypatch)
        assert not folders["marker"].exists(), "code of the checkpoint has run"
    finally:
        folders["marker"].unlink(missing_ok=True)
    out, err = capsys.readouterr()
    assert ended.value.code == 2
    assert "custom code" not in out and "trust_remote_code" not in out + err
    assert err.splitlines()[-1].startswith("error: ") and not (tmp_path / "run").exists()


def test_a_known_model_with_its_own_generate_is_run_with_ours(folders, monkeypatch, capsys):
    run(["generate", str(folders["good"]), "hello", "--max_new_tokens", "2", "--seed", "0"], monkeypatch)
    assert "2 tokens" in capsys.readouterr().err and not folders["marker"].exists()


@pytest.mark.parametrize("kernel", ["kernels-community/flash-attn2", {"": "kernels-community/flash-attn2"}])
@pytest.mark.parametrize(
    "command",
    [
        ["generate", "{kernel}", "hello"],
        ["eval", "{kernel}", "--text_files", __file__],
        ["generate", "{good_adapter}", "hello", "--base", "{kernel}"],
        ["merge", "{good_adapter}", "{tmp}/merged", "--base", "{kernel}"],
        ["lr-find", *SFT, "{kernel}"],
    ],
    ids=" ".join,
)
def test_no_kernel_is_fetched_from_the_hub(command, kernel, folders, tmp_path, monkeypatch, capsys):
    shutil.copytree(folders["good"], tmp_path / "kernel")
    change(tmp_path / "kernel" / "config.json", _attn_implementation=kernel)
    places = {"tmp": str(tmp_path), "kernel": str(tmp_path / "kernel"), "good_adapter": str(folders["good_adapter"])}
    with pytest.raises(SystemExit) as ended:
        run([part.format(**places) for part in command], monkeypatch)
    assert ended.value.code == 2
    assert "asks for the attention kernel" in capsys.readouterr().err.splitlines()[-1]


def test_verify_opens_no_kernel_from_the_hub_either(folders, tmp_path, monkeypatch, capsys):
    shutil.copytree(folders["good"], tmp_path / "kernel")
    change(tmp_path / "kernel" / "config.json", _attn_implementation="kernels-community/flash-attn2")
    with pytest.raises(SystemExit) as ended:
        run(["verify", str(tmp_path / "kernel")], monkeypatch)
    assert ended.value.code == 1
    assert "asks for the attention kernel" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["good", "good_adapter"])
def test_pickled_weights_are_not_opened(name, folders, tmp_path, monkeypatch, capsys):
    folder = tmp_path / name
    folder.mkdir()
    for path in folders[name].iterdir():
        if path.is_file() and path.suffix != ".safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
    for pickled in ("pytorch_model.bin", "adapter_model.bin"):
        torch.save({}, folder / pickled)
    monkeypatch.setattr("torch.load", lambda *args, **kwargs: pytest.fail("unpickled"))
    with pytest.raises(SystemExit):
        run(["generate", str(folder), "hello"], monkeypatch)
    assert "safetensors" in capsys.readouterr().err.splitlines()[-1]


def test_every_call_that_could_run_code_says_not_to():
    """Of transformers' Auto classes, in all of llmkit and the recipes; those of datasets and PEFT run none."""
    found = 0
    for path in (*(ROOT / "llmkit").rglob("*.py"), *(ROOT / "recipes").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            owner = ast.unparse(node.func.value)
            if node.func.attr not in ("from_pretrained", "from_config") or not owner.startswith("Auto"):
                continue
            given = {keyword.arg: keyword.value for keyword in node.keywords}
            refused = "trust_remote_code" in given and ast.unparse(given["trust_remote_code"]) == "False"
            assert refused, (path, node.lineno)
            found += 1
    assert found >= 3
