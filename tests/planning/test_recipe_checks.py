"""What a recipe lacks on this machine is an error of `llmkit doctor --recipe`; each lack is made to happen."""

import http.server
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from hub_server import client_of
from llmkit.planning import doctor, recipe_checks
from llmkit.planning.doctor import ERROR, OK, WARNING
from llmkit.planning.recipe_checks import libraries, memory_and_disk
from llmkit.recipe_kinds import DPO, PRETRAIN, SFT, RecipeKind, kind_of, parse_recipe

RECIPES = Path(__file__).parents[2] / "recipes"
UNREACHABLE = "http://127.0.0.1:9"  # where nothing listens


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Recipes name folders of runs, which somebody may have made in the checkout."""
    monkeypatch.chdir(tmp_path)


def files(kind: RecipeKind, fields: list[str], cache: Path, hub: str = UNREACHABLE) -> dict[str, doctor.Finding]:
    """What `recipe_checks.files` finds."""
    with client_of(hub, cache):
        return {found.name: found for found in recipe_checks.files(kind, parse_recipe(kind, fields, ""))}


class Hub(http.server.BaseHTTPRequestHandler):
    """A Hub with one repository for all, one for those who accepted its conditions, and no other."""

    def do_GET(self):
        status, code = 404, "RepoNotFound"
        if self.path.endswith("/me/there"):
            status, code = 200, ""
        elif self.path.endswith("/me/gated"):
            status, code = 403, "GatedRepo"
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.end_headers()
        self.wfile.write(b'{"id": "me/there", "sha": "0123456789abcdef"}' if status == 200 else b"{}")

    def log_message(self, *_):
        pass


def test_what_is_on_the_hub_and_what_is_not(tmp_path):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    recipe = ["--config", str(RECIPES / "dpo_qlora.yaml"), "--use_cpu", "true"]
    fields = ["--dataset_name", "me/gated", "--adapter", "me/there", "--model", "me/nothing"]
    try:
        endpoint = f"http://127.0.0.1:{server.server_port}"
        found = files(DPO, recipe + fields, tmp_path, endpoint)
    finally:
        server.shutdown()
    assert found["adapter"].state == OK and "01234567" in found["adapter"].text
    assert found["dataset"].state == ERROR and "conditions" in found["dataset"].fix
    assert found["model"].state == ERROR and "is not on the Hub" in found["model"].text


def test_without_a_network_what_was_downloaded_is_there(tmp_path):
    repository = tmp_path / "hub" / "models--me--cached"
    (repository / "snapshots" / "abc").mkdir(parents=True)
    (repository / "snapshots" / "abc" / "config.json").write_text("{}")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    recipe = ["--config", str(RECIPES / "sft_qlora.yaml"), "--use_cpu", "true", "--model", "me/cached"]
    found = files(SFT, recipe, tmp_path)
    assert found["model"].state == WARNING and "was downloaded earlier" in found["model"].text
    assert found["dataset"].state == ERROR and "cannot be reached" in found["dataset"].text


def test_each_source_of_a_mixture_is_looked_for(tmp_path):
    recipe = ["--config", str(RECIPES / "pretrain_mixture.yaml"), "--use_cpu", "true"]
    with client_of(UNREACHABLE, tmp_path):
        found = recipe_checks.files(PRETRAIN, parse_recipe(PRETRAIN, recipe, ""))
        names = [each.text.split()[0] for each in found]
    assert names == ["HuggingFaceFW/fineweb-edu", "DKYoon/SlimPajama-6B", "openai-community/gpt2"]


def test_folders_that_are_here_and_that_are_not(tmp_path):
    recipe = ["--config", str(RECIPES / "dpo_qlora_quickstart.yaml"), "--model", str(tmp_path), "--use_cpu", "true"]
    found = files(DPO, recipe, tmp_path)  # whose adapter, runs/sft_qlora_quickstart, is not in this folder
    assert found["model"].state == OK
    assert found["adapter"].state == ERROR


def test_prepared_text_is_not_asked_for(tmp_path):
    (tmp_path / "manifest.json").touch()
    recipe = ["--config", str(RECIPES / "pretrain_gpt2_124m.yaml"), "--data_dir", str(tmp_path), "--use_cpu", "true"]
    recipe += ["--tokenizer", str(tmp_path)]
    assert list(files(PRETRAIN, recipe, tmp_path)) == ["tokenizer"]


def test_what_a_key_asks_for(tmp_path, monkeypatch):
    for name in ("HF_TOKEN", "WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))
    fields = ["--push_to_hub", "true", "--report_to", "wandb", "--use_cpu", "true"]
    recipe = parse_recipe(SFT, fields, RECIPES / "sft_qlora.yaml")
    found = {each.name: each for each in libraries(SFT, recipe)}
    assert found["4-bit kernels"].state == OK
    assert found["wandb"].state == WARNING
    assert found["push_to_hub"].state == ERROR


def test_a_compiler_that_a_recipe_asks_for_is_an_error(tmp_path):
    code = (
        "from llmkit.recipe_kinds import *; from llmkit.planning.recipe_checks import libraries; import sys; "
        "print(list(libraries(PRETRAIN, parse_recipe(PRETRAIN, sys.argv[1:], ''))))"
    )
    recipe = ["--config", str(RECIPES / "pretrain_quickstart.yaml"), "--use_cpu", "true", "--torch_compile", "true"]
    environment = {**os.environ, "CXX": "/bin/false", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", code, *recipe]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    (found,) = eval(done.stdout.splitlines()[-1], vars(doctor))
    assert found.state == ERROR and found.name == "torch.compile"


def test_what_a_run_takes_of_memory_and_disk(tmp_path):
    fields = ["--use_cpu", "true", "--output_dir", str(tmp_path / "run"), "--data_dir", str(tmp_path / "data")]
    recipe = parse_recipe(PRETRAIN, fields, RECIPES / "pretrain_quickstart.yaml")
    assert [each.state for each in memory_and_disk(PRETRAIN, recipe)] == [OK, OK]
    # 100 billion parameters, and 100 billion tokens of text
    fields += ["--preset", "null", "--n_layer", "2", "--n_head", "64", "--n_embd", "65536", "--block_size", "64"]
    fields += ["--total_batch_tokens", "64", "--per_device_train_batch_size", "1"]
    recipe = parse_recipe(PRETRAIN, fields, RECIPES / "pretrain_gpt2_774m.yaml")
    memory, run, shards = memory_and_disk(PRETRAIN, recipe)
    assert memory.state == ERROR and "a step takes" in memory.text and "take a smaller model" in memory.fix
    assert "data will hold up to 200 GB" in shards.text
    assert run.state == (OK if shutil.disk_usage(tmp_path).free > 5 * 12 * 103e9 else ERROR)


def test_a_run_that_would_be_refused():
    fields = ["--use_cpu", "true", "--per_device_train_batch_size", "7"]
    recipe = parse_recipe(PRETRAIN, fields, RECIPES / "pretrain_quickstart.yaml")
    (found,) = memory_and_disk(PRETRAIN, recipe)
    assert found.state == ERROR and "is not a multiple of" in found.text
    (found,) = memory_and_disk(DPO, parse_recipe(DPO, ["--use_cpu", "true"], RECIPES / "dpo_qlora.yaml"))
    assert found.state == ERROR and "runs/sft_qlora" in found.text  # which is not in this folder


@pytest.mark.parametrize(
    ("name", "text", "kind"),
    [
        ("sft_mine.yaml", "", SFT),
        ("mine.yaml", "lora_r: 4\nbeta: 0.2\n", DPO),
        ("mine.yaml", "n_layer: 2\n", PRETRAIN),
    ],
)
def test_the_kind_of_a_recipe(tmp_path, name, text, kind):
    (tmp_path / name).write_text(f"output_dir: x\n{text}")
    assert kind_of(tmp_path / name, []) is kind
