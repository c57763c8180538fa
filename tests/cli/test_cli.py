import dataclasses
import errno
import io
import re
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from llmkit import cli
from llmkit.data.arguments import DataArguments
from llmkit.data.manifest import load_manifest
from llmkit.data.tokenizer import train_bpe_tokenizer, train_character_tokenizer
from llmkit.errors import UserError, exit_on_user_error

ROOT = Path(__file__).parents[2]


@pytest.fixture
def text_file(tmp_path) -> str:
    path = tmp_path / "text.txt"
    path.write_text(Path(dataclasses.__file__).read_text(encoding="utf-8"), encoding="utf-8")
    return str(path)


def failing(argv: list[str], capsys) -> str:
    """The one line on stderr of a command that a user got wrong."""
    with pytest.raises(SystemExit) as raised:
        cli.main(argv)
    assert raised.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err


# ----------------------------------------------------------------------------- tokenizer train


def test_tokenizer_train_writes_a_bpe_and_says_so(text_file, tmp_path, capsys):
    output = tmp_path / "made/tokenizer"
    cli.main(["tokenizer", "train", "--output", str(output), "--vocab_size", "500", "--text_files", text_file])
    out = capsys.readouterr().out
    assert "text.txt" in out
    assert "500 tokens" in out
    assert str(output) in out
    assert len(AutoTokenizer.from_pretrained(output)) == 500


def test_tokenizer_train_of_characters_on_the_first_documents(tmp_path, capsys):
    for name, text in [("a.txt", "ab"), ("b.txt", "bc"), ("c.txt", "xyz")]:
        (tmp_path / name).write_text(text)
    files = str(tmp_path / "*.txt")
    output = str(tmp_path / "t")
    flags = ["--kind", "character", "--max_documents", "2", "--text_files", files]
    cli.main(["tokenizer", "train", "--output", output, *flags])
    assert set(AutoTokenizer.from_pretrained(output).get_vocab()) == {"a", "b", "c", "<|endoftext|>", "<|unknown|>"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--vocab_size", "100"], "vocab_size is 100"),
        (["--vocab_size", "many"], "invalid int value: 'many'"),
        (["--kind", "character", "--vocab_size", "300"], "vocab_size is for --kind bpe"),
        (["--kind", "words"], "'words'"),
        (["--max_documents", "0"], "max_documents is 0"),
        (["--vocab", "300"], "--vocab"),  # no abbreviations: the names are those of the recipes
        (["--text_files", "missing.txt"], "missing.txt"),
        (["--dataset_name", "/no/such/folder"], "/no/such/folder"),
    ],
)
def test_tokenizer_train_mistakes_are_one_line_and_write_nothing(flags, message, text_file, tmp_path, capsys):
    output = tmp_path / "tokenizer"
    corpus = [] if {"--text_files", "--dataset_name"} & set(flags) else ["--text_files", text_file]
    assert message in failing(["tokenizer", "train", "--output", str(output), *corpus, *flags], capsys)
    assert not output.exists()


def test_tokenizer_train_does_not_replace_a_tokenizer(text_file, tmp_path, capsys):
    (tmp_path / "tokenizer.json").write_text("mine")
    argv = ["tokenizer", "train", "--output", str(tmp_path), "--text_files", text_file]
    assert "holds a tokenizer already" in failing(argv, capsys)
    assert (tmp_path / "tokenizer.json").read_text() == "mine"


# ----------------------------------------------------------------------------- tokenizer show


def test_tokenizer_show_of_a_file_a_text_and_standard_input(text_file, tmp_path, capsys, monkeypatch):
    text = "import sys\n"
    folder = str(tmp_path / "tokenizer")
    train_bpe_tokenizer([Path(text_file).read_text(encoding="utf-8")], 400).save_pretrained(folder)
    (tmp_path / "short.py").write_text(text)
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    shown = []
    for source in (text, str(tmp_path / "short.py"), "-"):
        cli.main(["tokenizer", "show", source, "--tokenizer", folder])
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1] == shown[2]
    assert shown[0].split("\n")[0].replace("│", "") == "import·sys↵"
    assert re.search(r"text +11 bytes\n +tokens +\d", shown[0])
    assert "\033[" not in shown[0]  # this is no terminal
    cli.main(["tokenizer", "show", text, "--tokenizer", folder, "--color"])
    assert "\033[48;5;" in capsys.readouterr().out


def test_tokenizer_show_compares_with_published_files(tmp_path, capsys):
    document = Path(__file__).read_text()
    bpe = train_bpe_tokenizer([document], 400)
    bpe.save_pretrained(tmp_path / "bpe")
    (tmp_path / "published").mkdir()
    bpe.backend_tokenizer.model.save(str(tmp_path / "published"))
    names = ["--tokenizer", str(tmp_path / "bpe"), "--compare", str(tmp_path / "published")]
    cli.main(["tokenizer", "show", "import sys", *names])
    first, second = re.findall(r"--- .*\n(.*)\n", capsys.readouterr().out)
    assert first == second and "import" in first


def test_tokenizer_show_compares_and_makes_a_page(text_file, tmp_path, capsys):
    document = Path(text_file).read_text(encoding="utf-8")
    train_bpe_tokenizer([document], 400).save_pretrained(tmp_path / "bpe")
    train_character_tokenizer([document]).save_pretrained(tmp_path / "data" / "tokenizer")
    names = ["--tokenizer", str(tmp_path / "bpe"), "--compare", str(tmp_path / "data")]  # a folder as shards have it
    cli.main(["tokenizer", "show", "import sys", *names, "--ids"])
    out = capsys.readouterr().out
    assert len(re.findall(r"^ +\d+ +\d+  .$", out, flags=re.MULTILINE)) >= len("import sys")
    assert re.search(r"tokens +\d +10\n", out)
    cli.main(["tokenizer", "show", "import sys", *names, "--html", str(tmp_path / "page.html")])
    assert (tmp_path / "page.html").read_text(encoding="utf-8").count("<section>") == 2
    assert "saved" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["x"], "no tokenizer: give --tokenizer"),
        (["{tmp}", "--tokenizer", "{tmp}"], "is a folder: give one text file"),
        (["", "--tokenizer", "{tmp}"], "there is no text"),
        (["{tmp}/latin", "--tokenizer", "{tmp}"], "not a text in UTF-8"),
        (["x", "--tokenizer", "{tmp}"], "this folder holds no tokenizer"),
        (["x", "--tokenizer", "{tmp}", "--html", "{tmp}/no/page.html"], "its folder does not exist"),
    ],
)
def test_tokenizer_show_mistakes_are_one_line(argv, message, tmp_path, capsys):
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    assert message in failing(["tokenizer", "show", *(word.format(tmp=tmp_path) for word in argv)], capsys)


# ----------------------------------------------------------------------------- shards prepare


@pytest.fixture
def tokenizer(text_file, tmp_path) -> str:
    train_bpe_tokenizer([Path(text_file).read_text(encoding="utf-8")], 300).save_pretrained(tmp_path / "tokenizer")
    return str(tmp_path / "tokenizer")


def test_shards_prepare_makes_shards_and_says_how_many_tokens(text_file, tokenizer, tmp_path, capsys):
    argv = ["shards", "prepare", "--output", str(tmp_path / "shards"), "--tokenizer", tokenizer]
    argv += ["--text_files", text_file, "--validation_split", "tail", "--validation_fraction", "0.25"]
    cli.main(argv)
    splits = load_manifest(tmp_path / "shards").splits
    train, validation = splits["train"], splits["validation"]
    assert validation.bytes == pytest.approx(Path(text_file).stat().st_size / 4, rel=0.01)
    said = f"{train.tokens:,} tokens to train on and {validation.tokens:,} for validation"
    assert said in capsys.readouterr().out


def test_shards_prepare_hands_over_every_flag(text_file, tokenizer, monkeypatch):
    received = {}

    def stop(args, **how):
        received.update(vars(args), **how)
        raise UserError("far enough")

    monkeypatch.setattr("llmkit.data.prepare.prepare_pretraining_data", stop)
    flags = {"validation_fraction": 0.2, "validation_split": "tail", "num_workers": 3, "shard_tokens": 77}
    argv = ["shards", "prepare", "--output", "shards", "--tokenizer", tokenizer, "--text_files", text_file]
    with pytest.raises(SystemExit):
        cli.main(argv + [word for name, value in flags.items() for word in (f"--{name}", str(value))])
    expected = {**flags, "tokenizer": tokenizer, "text_files": [text_file], "data_dir": "shards"}
    assert expected.items() <= received.items()


OF_A_RUN = {"data", "data_dir", "prepare", "shard_cache_gb", "shard_group"}  # fields that say how shards are used


def test_defaults_of_shards_prepare_are_the_recipes():
    """So that shards prepared on a login node are found again by a recipe that says the same."""
    args = vars(cli.parser().parse_args(["shards", "prepare", "--output", "o"]))
    fields = [field for field in dataclasses.fields(DataArguments) if field.name not in OF_A_RUN]
    defaults = {field.name: field.default for field in fields}
    assert defaults == {name: args[name] for name in defaults}


def test_every_field_of_the_data_arguments_is_a_flag_that_reads_its_type():
    """`data_dir` is `--output` there, and several sources are prepared one after the other."""
    given = {"text_files": ["a", "b"], "dataset_name": "n", "dataset_config": "c", "dataset_split": "s"}
    given |= {"text_column": "t", "streaming": True, "tokenizer": "x", "vocab_size": 300}
    given |= {"validation_fraction": 0.5, "validation_split": "tail"}
    assert given.keys() == {field.name for field in dataclasses.fields(DataArguments)} - OF_A_RUN
    argv = ["shards", "prepare", "--output", "o"]
    for name, value in given.items():
        argv += [f"--{name}", *([] if value is True else map(str, value if isinstance(value, list) else [value]))]
    args = vars(cli.parser().parse_args(argv))
    assert {name: args[name] for name in given} == given


def test_a_file_where_a_folder_should_be(text_file, tokenizer, capsys):
    argv = ["shards", "prepare", "--output", text_file, "--tokenizer", tokenizer, "--text_files", text_file]
    assert text_file in failing(argv, capsys)


def test_shards_prepare_without_such_a_tokenizer(text_file, tmp_path, capsys):
    tokenizer, output = str(tmp_path / "missing"), tmp_path / "shards"
    argv = ["shards", "prepare", "--output", str(output), "--tokenizer", tokenizer, "--text_files", text_file]
    assert tokenizer in failing(argv, capsys)
    assert not output.exists()


# ----------------------------------------------------------------------------- the command


def test_help_does_not_wait_for_heavy_libraries():
    code = (
        "import sys\n"
        "from llmkit.cli import main\n"
        "try: main(['shards', 'prepare', '--help'])\n"
        "except SystemExit as end: assert end.code == 0\n"
        "print({'torch', 'transformers', 'datasets', 'numpy'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "--validation_fraction" in done.stdout
    assert done.stdout.endswith("set()\n")


def test_as_a_module_a_mistake_has_status_2_and_no_traceback():
    done = subprocess.run(
        [sys.executable, "-m", "llmkit", "tokenizer"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


def test_a_reader_that_has_enough_is_no_error(text_file, tokenizer):
    argv = [sys.executable, "-m", "llmkit", "tokenizer", "show", text_file, "--tokenizer", tokenizer]
    with subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 141


# ----------------------------------------------------------------------------- exit_on_user_error


def run(error: BaseException, capsys) -> tuple[int, str]:
    @exit_on_user_error
    def main():
        raise error

    with pytest.raises(SystemExit) as raised:
        main()
    return raised.value.code, capsys.readouterr().err


def test_the_end_does_not_look_at_all_objects_again():
    """Python's last search for garbage takes 1.5 seconds where torch and transformers were imported."""
    script = "import atexit, gc; atexit.register(lambda: print(gc.get_freeze_count(), len(gc.get_objects())))\n"
    script += "from llmkit.errors import exit_on_user_error\nexit_on_user_error(lambda: None)()\n"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    out_of_sight, looked_at = map(int, done.stdout.split())
    assert out_of_sight > 1000 > looked_at


def test_a_user_error_is_one_line_and_status_2(capsys):
    assert run(UserError("a.txt: is\n  empty"), capsys) == (2, "error: a.txt: is empty\n")


@pytest.mark.parametrize(("local_rank", "said"), [("0", "error: x\n"), ("1", "")])
def test_only_the_first_local_rank_speaks(local_rank, said, capsys, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    assert run(UserError("x"), capsys) == (2, said)


def test_ctrl_c_is_quiet(capsys):
    assert run(KeyboardInterrupt(), capsys) == (130, "")


def test_a_full_disk_is_told_with_the_file(capsys):
    status, line = run(OSError(errno.ENOSPC, "No space left on device", "runs/model.safetensors"), capsys)
    assert status == 2
    assert "the disk is full while writing runs/model.safetensors" in line


def test_a_full_disk_is_told_when_another_error_wraps_it(capsys):
    wrapped = RuntimeError("could not save")
    wrapped.__cause__ = OSError(errno.ENOSPC, "No space left on device")
    assert "the disk is full:" in run(wrapped, capsys)[1]
    assert "the disk is full:" in run(RuntimeError("I/O error: No space left on device (os error 28)"), capsys)[1]


@pytest.mark.parametrize("error", [ValueError("a defect"), OSError(errno.EACCES, "no")])
def test_a_defect_keeps_its_traceback(error):
    @exit_on_user_error
    def main():
        raise error

    with pytest.raises(type(error)) as raised:
        main()
    assert raised.value is error


def test_what_main_is_given_arrives():
    seen = []
    exit_on_user_error(lambda *args, **kwargs: seen.append((args, kwargs)))(1, b=2)
    assert seen == [((1,), {"b": 2})]
