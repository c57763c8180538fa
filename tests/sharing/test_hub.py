"""Both recipes and `llmkit push` against a Hub on this machine, through huggingface_hub's own client."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import close_session, constants

from hub_server import DROP, READER, SILENT, WRITER, Failure, Hub, hub_of_this_process
from llmkit.cli import main as llmkit
from llmkit.runs.run import QUANTIZATION_CONFIG
from small_run import accelerate_launch, run_recipe, trainer, write_sums

ROOT = Path(__file__).parents[2]
TINY = ["--n_layer", "1", "--n_head", "2", "--n_embd", "32", "--block_size", "64", "--vocab_size", "300"]
TINY += ["--total_batch_tokens", "512", "--per_device_train_batch_size", "8", "--per_device_eval_batch_size", "8"]
TINY += ["--max_steps", "8", "--eval_steps", "4", "--save_steps", "4", "--logging_steps", "2", "--bf16", "false"]
TINY += ["--warmup_steps", "2", "--sample_tokens", "4"]


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A Hub, and this process as a client of it that is logged in."""
    home = tmp_path_factory.mktemp("home")
    with hub_of_this_process(home) as hub, pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_TOKEN", WRITER)
        patch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
        yield hub


@pytest.fixture(autouse=True)
def well(hub):
    """Each test begins with a Hub that works."""
    hub.failures.clear()
    hub.requests.clear()


@pytest.fixture
def waits(monkeypatch) -> list[float]:
    """The seconds that were to be waited; nobody waits for them."""
    waits: list[float] = []
    monkeypatch.setattr("time.sleep", waits.append)
    return waits


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    return write_sums(tmp_path_factory.mktemp("private_texts"))


def pretraining(texts: Path, run: Path) -> list[object]:
    return [*TINY, "--text_files", texts / "*.txt", "--data_dir", texts / "data", "--output_dir", run]


@pytest.fixture(scope="module")
def pretrained(hub, texts, tmp_path_factory) -> Path:
    """A run that found the Hub down when it began."""
    run = tmp_path_factory.mktemp("runs") / "pretrained"
    hub.failures.append(down := Failure("POST", "/repos/create", 503, times=1))
    run_recipe("pretrain", *pretraining(texts, run), "--push_to_hub", "true", "--hub_private_repo", "false")
    assert not hub.repos["me/pretrained"].private
    assert not down.times
    return run


@pytest.fixture(scope="module")
def adapter(hub, pretrained, texts) -> Path:
    """An adapter of the model that the run before has pushed, which is now loaded from the Hub."""
    rows = [{"text": f"### Human: {n} times 2?### Assistant: {2 * n}."} for n in range(120)]
    (texts / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = pretrained.with_name("adapter")
    arguments = ["--model", "me/pretrained", "--data_files", texts / "chats.jsonl", "--output_dir", run]
    arguments += ["--max_steps", "4", "--eval_steps", "4", "--save_steps", "2", "--logging_steps", "1"]
    arguments += ["--max_length", "64", "--gradient_accumulation_steps", "1", "--bf16", "false", "--warmup_steps", "1"]
    arguments += [
        "--sample_tokens",
        "4",
        "--push_to_hub",
        "true",
        "--hub_strategy",
        "end",
    ]
    run_recipe("sft_qlora", "--config", ROOT / "recipes" / "sft_qlora_quickstart.yaml", *arguments)
    return run


@pytest.fixture(scope="module")
def plain(pretrained, tmp_path_factory) -> Path:
    """The same model without a log."""
    return shutil.copytree(
        pretrained, tmp_path_factory.mktemp("plain") / "saved", ignore=lambda *_: ["log.jsonl", "checkpoint-4"]
    )


def pushed(hub: Hub, repo_id: str, revision: str = "main") -> dict[str, bytes]:
    return hub.repos[repo_id].files(revision)


def test_a_pretrained_checkpoint_is_what_was_pushed(hub, pretrained):
    files, local = pushed(hub, "me/pretrained"), {path.name: path for path in pretrained.iterdir() if path.is_file()}
    assert sorted(files) == [
        ".gitattributes",
        "README.md",
        "config.json",
        "generation_config.json",
        "loss_curve.png",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert all(files[name] == local[name].read_bytes() for name in ("model.safetensors", "tokenizer.json"))
    assert json.loads(files["config.json"]) == json.loads(local["config.json"].read_text())
    assert any(files["model.safetensors"] == content for content in hub.objects.values()), "not through LFS"
    messages = hub.repos["me/pretrained"].messages
    assert messages[1] == "Training in progress, step 4"
    assert messages[-1] in ("Training in progress, step 8", "End of training")  # the latter if it changes anything
    assert "| At step | 8 |" in files["README.md"].decode()


def test_an_adapter_is_what_was_pushed_and_names_its_base(hub, adapter):
    files = pushed(hub, "me/adapter")
    assert hub.repos["me/adapter"].private and hub.repos["me/adapter"].messages == [
        "initial commit",
        "End of training",
    ]
    for name in ("adapter_model.safetensors", "tokenizer.json", "chat_template.jinja"):
        assert files[name] == (adapter / name).read_bytes()
    assert json.loads(files[QUANTIZATION_CONFIG])["load_in_4bit"]
    config = json.loads(files["adapter_config.json"])
    assert config["base_model_name_or_path"] == "me/pretrained"
    assert config["revision"] == hub.repos["me/pretrained"].branches["main"]
    assert "base_model: me/pretrained\n" in files["README.md"].decode()


def test_nothing_private_is_pushed(hub, pretrained, adapter, texts):
    """No token, no path, no name of a file of text, no log, no optimizer; and the token lies on no disk."""
    for repo_id in ("me/pretrained", "me/adapter"):
        files = pushed(hub, repo_id)
        names = " ".join(files)
        assert not any(word in names for word in ("log", "optimizer", "training_args", "checkpoint", "rng"))
        for word in (
            WRITER,
            str(pretrained.parent),
            texts.name,
            "*.txt",
            "chats",
            str(Path.home()),
        ):
            assert not any(word.encode() in content for content in files.values()), (repo_id, word)
        # A host's name may be two letters, which weights and vocabularies hold by chance.
        host = re.compile(rf"\b{re.escape(os.uname().nodename)}\b".encode())
        assert not any(
            host.search(content) for name, content in files.items() if name.endswith(("README.md", "config.json"))
        )
    for path in (*pretrained.rglob("*"), *adapter.rglob("*")):
        assert path.is_dir() or WRITER.encode() not in path.read_bytes(), path


def test_secrets_are_refused_in_recipes_and_new_ones_are_noticed(tmp_path, capsys):
    from llmkit.finetuning.sft_trainer import SFTArguments
    from llmkit.recipe_parser import SECRETS
    from llmkit.training.arguments import PretrainArguments

    fields = {field.name for part in (PretrainArguments, SFTArguments) for field in dataclasses.fields(part)}
    tokens_of_text = {"eos_token", "pad_token"}
    assert {
        name for name in fields if name.endswith(("_token", "_key", "secret", "password"))
    } - tokens_of_text == set(SECRETS)
    (tmp_path / "pretrain_mine.yaml").write_text(f"hub_token: {WRITER}\n")
    with pytest.raises(SystemExit):
        run_recipe("pretrain", "--config", tmp_path / "pretrain_mine.yaml")
    error = capsys.readouterr().err
    assert "hub_token is not taken from" in error and "HF_TOKEN" in error and WRITER not in error


FRESH = """
import sys
sys.modules["llmkit"] = None  # importing it raises
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer, pipeline
how = {"max_new_tokens": 8, "do_sample": False}
for model in sys.argv[1], "me/pretrained":
    print(repr(pipeline("text-generation", model)("7 times 3 is", **how)[0]["generated_text"]))
question = [{"role": "user", "content": "3 times 2?"}]
for adapter in sys.argv[2], "me/adapter":
    print(pipeline("text-generation", adapter, tokenizer=adapter)(question, **how)[0]["generated_text"][-1])
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = AutoPeftModelForCausalLM.from_pretrained(adapter).generate(**inputs, **how)
    print(tokenizer.decode(output[0]))
"""


def environment(hub: Hub, home: Path, token: str = WRITER) -> dict[str, str]:
    settings = {"HF_ENDPOINT": hub.address, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(home)}
    return {**os.environ, **settings, "HF_TOKEN": token, "HF_HUB_DISABLE_TELEMETRY": "1"}


def test_both_open_by_their_names_without_llmkit(hub, pretrained, adapter, tmp_path):
    """In a fresh process, in plain transformers and PEFT: what the local folders say, word for word."""
    done = subprocess.run(
        [sys.executable, "-c", FRESH, pretrained, adapter],
        env=environment(hub, tmp_path),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    local, named, *chats = done.stdout.splitlines()
    assert named == local and "7 times 3 is" in local
    assert len(chats) % 2 == 0 and chats[: len(chats) // 2] == chats[len(chats) // 2 :]


def failed(capsys, *arguments: object) -> str:
    """The one line with which `llmkit push` refuses."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        llmkit(["push", *map(str, arguments)])
    assert ended.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and WRITER not in lines[0]
    return lines[0]


def test_a_checkpoint_of_the_run_s_course_and_a_branch(hub, pretrained, capsys):
    """Its card tells what was known then; another push to the same name replaces the weights and leaves the rest."""
    llmkit(["push", str(pretrained / "checkpoint-4"), "course", "--revision", "early", "--license", "mit"])
    assert f"pushed {pretrained / 'checkpoint-4'} to {hub.address}/me/course (private)" in capsys.readouterr().out
    assert hub.repos["me/course"].private and list(pushed(hub, "me/course")) == [".gitattributes"]
    files = pushed(hub, "me/course", "early")
    assert files["model.safetensors"] == (pretrained / "checkpoint-4" / "model.safetensors").read_bytes()
    card = files["README.md"].decode()
    assert "| At step | 4 |" in card and "50% of the planned training" in card and "license: mit" in card
    theirs = ("notes.txt", "model-gguf/notes.safetensors", "model/model.safetensors", "sub/config.json")
    added = {"model-00001-of-00002.safetensors": b""} | dict.fromkeys(theirs, b"mine")
    hub.repos["me/course"].commit("early", files | added, "")
    llmkit(["push", str(pretrained), "me/course", "--revision", "early", "--keep_card"])
    again = pushed(hub, "me/course", "early")
    assert again["model.safetensors"] == (pretrained / "model.safetensors").read_bytes()
    assert again["README.md"] == files["README.md"] and all(again[name] == b"mine" for name in theirs)
    assert "model-00001-of-00002.safetensors" not in again


def test_an_adapter_on_a_local_base(hub, pretrained, adapter, tmp_path, capsys):
    local = tmp_path / "local"
    shutil.copytree(adapter, local)
    config = json.loads((local / "adapter_config.json").read_text())
    (local / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(pretrained)}))
    assert "--base me/base" in failed(capsys, local, "me/local")
    change = {"base_model_name_or_path": "me/pretrained", "revision": None}  # a folder `me/pretrained`, or the model
    (local / "adapter_config.json").write_text(json.dumps(config | change))
    assert "such as --base me/pretrained" in failed(capsys, local, "me/local")
    (local / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(pretrained)}))
    assert "--base me/none is not a model on the Hub" in failed(capsys, local, "me/local", "--base", "me/none")
    assert "me/local" not in hub.repos
    llmkit(["push", str(local), "me/local", "--base", "me/pretrained"])
    found = json.loads(pushed(hub, "me/local")["adapter_config.json"])
    assert (found["base_model_name_or_path"], found["revision"]) == ("me/pretrained", None)
    assert str(pretrained) in (local / "adapter_config.json").read_text(), "the local folder has changed"


@pytest.mark.parametrize("lacking", ["peft_type", "base_model_name_or_path"])
def test_a_damaged_adapter_is_one_line(adapter, tmp_path, capsys, lacking):
    config = json.loads(Path(shutil.copytree(adapter, tmp_path / "bad"), "adapter_config.json").read_text())
    for damaged in ({**config, lacking: None}, [config]):
        (tmp_path / "bad/adapter_config.json").write_text(json.dumps(damaged))
        assert "adapter_config.json is damaged" in failed(capsys, tmp_path / "bad", "me/bad")


@pytest.mark.parametrize(
    "failure",
    [
        Failure("POST", "/repos/create", 500, times=1),
        Failure("POST", "/validate-yaml", 502, times=1),
        Failure("POST", "/preupload", 503, times=1),
        Failure("PUT", "/lfs/", DROP, times=2),  # the connection drops in the middle of the weights
        Failure("POST", "/commit", 504, times=1),
        Failure("POST", "/commit", DROP, times=1),
    ],
    ids=str,
)
def test_what_passes_is_tried_again(hub, plain, waits, failure, request):
    hub.objects.clear()  # so that the weights are sent
    hub.failures.append(failure)
    name = f"me/again-{request.node.callspec.indices['failure']}"
    llmkit(["push", str(plain), name])
    assert failure.times == 0 and waits
    assert "not recorded beside the checkpoint" in pushed(hub, name)["README.md"].decode()
    assert pushed(hub, name)["model.safetensors"] == (plain / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    "failure, message",
    [
        (Failure("POST", "/repos/create", 401), "does not accept the token (401)"),
        (Failure("POST", "/commit", 403), "may not write to me/refused (403)"),
        (Failure("POST", "/preupload", 404), "the Hub has no me/refused"),
        (Failure("POST", "/commit", 409), "changed by somebody else at the same time (409)"),
        (Failure("POST", "/repos/create", 400), "the Hub refuses me/refused (400)"),
        (Failure("PUT", "/lfs/", 503), "the Hub has an error of its own (503)"),
        (Failure("PUT", "/lfs/", DROP), "the Hub does not answer"),
    ],
    ids=str,
)
def test_what_lasts_is_one_line(hub, plain, waits, capsys, failure, message):
    hub.objects.clear()  # so that the weights are sent
    hub.failures.append(failure)
    assert message in failed(capsys, plain, "me/refused")
    assert [wait for wait in waits if wait > 8] == ([15, 60] if failure.status in (DROP, 503) else [])


def test_a_hub_that_says_nothing_is_not_waited_for(hub, plain, waits, capsys, monkeypatch):
    monkeypatch.setattr("llmkit.sharing.hub.TIMEOUT", 0.2)
    close_session()  # the next client has that limit
    hub.failures.append(Failure("POST", "/repos/create", SILENT))
    assert "the Hub does not answer (ReadTimeout" in failed(capsys, plain, "me/silent")
    assert waits == [5, 15, 60]
    close_session()


def test_a_token_that_may_not_write_is_refused_before_a_byte_is_sent(hub, plain, capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", READER)
    assert "may not write to me/pretrained (403)" in failed(capsys, plain, "me/pretrained")
    monkeypatch.setenv("HF_TOKEN", "hf_nobody")
    assert "does not accept the token (401)" in failed(capsys, plain, "me/pretrained")
    assert not any("PUT" in request or "/commit/" in request for request in hub.requests)


def test_the_way_of_hf_xet_s_uploads(hub, plain, monkeypatch):
    """With it installed, huggingface_hub commits on another path; this Hub asks for plain uploads there."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    monkeypatch.setattr("hub_server.LFS", ())
    llmkit(["push", str(plain), "me/pipelined"])
    assert pushed(hub, "me/pipelined")["model.safetensors"] == (plain / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda folder: shutil.rmtree(folder), "no such file or folder"),
        (lambda folder: (folder / "model.safetensors").unlink(), "holds no weights in safetensors files"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"\1" * 99), "model.safetensors is damaged"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json is damaged"),
        (lambda folder: (folder / "config.json").unlink(), "no checkpoint in this folder"),
        (lambda folder: (folder / "config.json").write_text('{"architectures": ["BertModel"]}'), "holds a BertModel"),
        (lambda folder: (folder / "tokenizer_config.json").unlink(), "has no tokenizer"),
    ],
)
def test_what_nobody_could_load_is_not_pushed(hub, plain, tmp_path, capsys, damage, message):
    shutil.copytree(plain, tmp_path / "run")
    damage(tmp_path / "run")
    assert message in failed(capsys, tmp_path / "run", "me/damaged")
    assert not hub.requests


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--hub_model_id", "not/a/name"], "not/a/name cannot be a repository"),
        (["--hub_model_id", "others/model"], "may not write to others/model (403)"),
        ([f"--hub_token={READER}"], "hub_token is not taken from a recipe or a command line"),
        (["--hub-token", READER], "hub_token is not taken from a recipe or a command line"),
        (["--hub_strategy", "checkpoint"], "take hub_strategy end or every_save"),
        (["no token"], "no token to push to me/never with"),
        (["offline"], "HF_HUB_OFFLINE"),
    ],
)
def test_what_could_not_be_pushed_is_not_trained(
    hub, pretrained, texts, tmp_path, capsys, monkeypatch, arguments, message
):
    if arguments == ["no token"]:
        monkeypatch.delenv("HF_TOKEN")
    if arguments == ["offline"]:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    given = arguments if arguments[0].startswith("--") else []
    with pytest.raises(SystemExit) as ended:
        run = tmp_path / "run"
        run_recipe("pretrain", *pretraining(texts, run), "--push_to_hub", "true", "--hub_model_id", "me/never", *given)
    error = capsys.readouterr().err.splitlines()[-1]
    assert ended.value.code == 2 and error.startswith("error: ") and message in error
    assert not run.exists() and "me/never" not in hub.repos and READER not in error


@pytest.mark.slow
def test_two_ranks_end_with_their_result_where_the_hub_fails(hub, texts, pretrained, tmp_path):
    """Pushes fail in training, which goes on, and at the end: the run is whole, the line says how to push it."""
    hub.failures.append(Failure("POST", "/commit", 403))
    arguments = [*pretraining(texts, tmp_path / "run"), "--total_batch_tokens", "1024", "--push_to_hub", "true"]
    done = subprocess.run(
        [*accelerate_launch("multi_cpu"), "recipes/pretrain.py", *map(str, arguments), "--hub_private_repo", "false"],
        cwd=ROOT,
        env=environment(hub, tmp_path / "home"),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode != 0
    assert "step 4 was not pushed, training goes on: the token may not write to me/run (403)" in done.stdout
    assert f"saved {tmp_path / 'run'}" in done.stdout
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and lines[0].endswith(f": llmkit push {tmp_path / 'run'} me/run --public")
    hub.failures.clear()
    llmkit(lines[0].rpartition("llmkit ")[2].split())
    assert pushed(hub, "me/run")["model.safetensors"] == (tmp_path / "run" / "model.safetensors").read_bytes()
    assert WRITER not in done.stdout + done.stderr


def test_a_token_given_in_python_is_not_saved_with_a_run_that_is_not_pushed(data, tmp_path):
    run = trainer(data, tmp_path / "run", hub_token=WRITER, save_strategy="steps", save_steps=1, max_steps=1)
    run.train()
    assert list(tmp_path.rglob("training_args.bin"))
    assert not any(WRITER.encode() in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())


def test_importing_the_uploader_does_not_import_a_model():
    code = (
        "import sys, llmkit.sharing.hub; print([name for name in sys.modules if name.startswith(tuple(sys.argv[1:]))])"
    )
    rooms = [f"llmkit.{room}" for room in ("model", "data", "training", "finetuning", "inference")]
    done = subprocess.run([sys.executable, "-c", code, *rooms], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
