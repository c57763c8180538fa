"""What is taken for a local path, and what is said where nothing is there."""

from pathlib import Path

import pytest

from llmkit.errors import UserError, exit_on_user_error
from llmkit.paths import checkpoint_path, existing_path, local_path


@pytest.fixture
def runs(tmp_path, monkeypatch) -> Path:
    """A folder `runs` in the working directory, with two runs in it."""
    monkeypatch.chdir(tmp_path)
    for name in ("pretrain", "sft_qlora"):
        (tmp_path / "runs" / name).mkdir(parents=True)
    return tmp_path / "runs"


@pytest.mark.parametrize("name", ["gpt2", "openai-community/gpt2", "pretrain"])
def test_other_names_are_the_hubs(name, runs):
    assert local_path(name) is None
    assert checkpoint_path(name) == name


def test_what_is_there_is_local(runs, monkeypatch):
    monkeypatch.setenv("HOME", str(runs))
    assert local_path("runs/pretrain") == Path("runs/pretrain")
    assert local_path("~/pretrain") == runs / "pretrain"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("runs/nope", "runs holds pretrain, sft_qlora"),
        ("runs/pretrian", "Did you mean runs/pretrain?"),
        ("rusn/pretrain/checkpoint-5", "Did you mean runs?"),
        ("./nope", ""),
        ("/no/where", ""),
        ("~no-such-user/x", ""),
        ("a/b/c", ""),
        ("runs/" + "x" * 300, ""),
        ("runs/zero\0", ""),
    ],
)
def test_a_missing_local_path_is_said_with_near_names(name, said, runs):
    with pytest.raises(UserError, match="there is no such file or folder") as raised:
        local_path(name)
    assert said in str(raised.value)


def test_an_empty_name():
    with pytest.raises(UserError, match="empty name"):
        local_path(" ")


def test_some_things_are_never_on_the_hub(runs):
    with pytest.raises(UserError, match="no such file or folder. Did you mean runs?"):
        existing_path("run")


def test_a_folder_without_a_checkpoint(runs):
    (runs / "file").touch()
    with pytest.raises(UserError, match="is a file"):
        checkpoint_path("runs/file")
    with pytest.raises(UserError, match="no config.json"):
        checkpoint_path("runs/pretrain")
    (runs / "pretrain" / "checkpoint-7").mkdir()
    with pytest.raises(UserError, match="such as runs/pretrain/checkpoint-7"):
        checkpoint_path("runs/pretrain")
    (runs / "pretrain" / "adapter_config.json").touch()
    assert checkpoint_path("runs/pretrain") == "runs/pretrain"


@pytest.mark.parametrize("name", ["none/at/all", "x" * 300])
def test_a_path_that_the_system_refuses_is_one_line(tmp_path, capsys, name):
    @exit_on_user_error
    def write():
        (tmp_path / name).write_text("")

    with pytest.raises(SystemExit) as ended:
        write()
    err = capsys.readouterr().err
    assert ended.value.code == 2 and err.count("\n") == 1 and err.endswith(": give another path\n") and name in err
