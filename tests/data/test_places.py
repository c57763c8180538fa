"""Shards behind a URL: the same bytes as in a folder, also where the connection fails anywhere."""

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path

import pytest
from fsspec.implementations.memory import MemoryFileSystem
from test_shards import DOCUMENTS

from llmkit.cli import main

OPTIONS = ["--vocab_size", "300", "--validation_fraction", "0.2", "--shard_tokens", "500"]
IN_TASKS = ["--executor", "local", "--tasks", "3", "--workers", "1"]


@pytest.fixture(autouse=True)
def texts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("texts").mkdir()
    for number, document in enumerate(DOCUMENTS[:60]):
        Path(f"texts/{number:02d}.txt").write_text(document)
    monkeypatch.setattr(MemoryFileSystem, "store", {})
    monkeypatch.setattr(MemoryFileSystem, "pseudo_dirs", [""])


def prepare(output, *options):
    main(["shards", "prepare", "--text_files", "texts", "--output", str(output), *OPTIONS, *options])


def refusal(capsys, output, *options) -> str:
    with pytest.raises(SystemExit):
        prepare(output, *options)
    return capsys.readouterr().err.splitlines()[-1]


def in_folder(folder) -> dict[str, bytes]:
    """What belongs to the dataset, by name."""
    paths = [path for path in Path(folder).rglob("*") if path.is_file() and not path.name.startswith(".")]
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
    return {name: data for name, data in files.items() if not name.startswith("logs/")}


def in_memory() -> dict[str, bytes]:
    return {path.removeprefix("/mine/"): file.getvalue() for path, file in MemoryFileSystem.store.items()}


@pytest.mark.parametrize("options", [[], IN_TASKS], ids=["one process", "tasks"])
def test_a_url_gets_the_bytes_of_a_folder(tmp_path, capsys, options):
    if options:
        pytest.importorskip("datatrove", reason="the scale extra is not installed")
    prepare("here", *options)
    expected = in_folder("here")
    assert {"manifest.json", "source.json", "tokenizer/tokenizer.json", "train_00003.bin"} <= expected.keys()
    for url in (f"file://{tmp_path}/not/there/yet", "memory://mine"):
        prepare(url, *options)
        told = capsys.readouterr().out.splitlines()[-1]
        assert told.endswith(f"in {url}")
        prepare(url, *options)  # it is done
        assert capsys.readouterr().out.splitlines()[-1] == told
    assert in_folder("not/there/yet") == in_memory() == expected
    assert Path("not/there/yet/logs").exists() is False  # they name users and paths


@pytest.mark.parametrize("options", [[], IN_TASKS], ids=["one process", "tasks"])
def test_a_connection_that_fails_anywhere_is_one_line_and_the_same_command_goes_on(capsys, monkeypatch, options):
    if options:
        pytest.importorskip("datatrove", reason="the scale extra is not installed")
    prepare("here", "--tokenizer", "bpe", *options)
    calls, fails = [], []

    def failing(method):
        def call(self, path, *args, **kwargs):
            calls.append(f"{method.__name__} {path}")
            if len(calls) in fails:
                raise ConnectionResetError(104, "Connection reset by peer")
            return method(self, path, *args, **kwargs)

        return call

    for name in ("put_file", "pipe_file", "mv", "rm"):
        monkeypatch.setattr(MemoryFileSystem, name, failing(getattr(MemoryFileSystem, name)))
    prepare("memory://mine", *options)
    steps = list(calls)
    assert any(step.endswith("train_00000.bin") for step in steps)
    for step in {*range(1, len(steps), len(steps) // 4), len(steps)}:
        MemoryFileSystem.store.clear()
        calls, fails = [], [step]
        line = refusal(capsys, "memory://mine", *options)
        assert "memory://mine" in line and "Connection reset by peer" in line, steps[step - 1]
        fails = []
        prepare("memory://mine", *options)
        assert in_memory() == in_folder("here"), steps[step - 1]


def test_a_task_that_is_done_is_not_run_again(monkeypatch, capsys):
    pytest.importorskip("datatrove", reason="the scale extra is not installed")
    put, puts = MemoryFileSystem.put_file, []

    def note(self, path, to, **kwargs):
        puts.append(to)
        if "parts/00001" in to and not any("parts/00001" in earlier for earlier in puts[:-1]):
            raise ConnectionResetError(104, "Connection reset by peer")
        return put(self, path, to, **kwargs)

    monkeypatch.setattr(MemoryFileSystem, "put_file", note)
    refusal(capsys, "memory://mine", *IN_TASKS)
    before = len(puts)
    prepare("memory://mine", *IN_TASKS)
    assert any("parts/00000" in to for to in puts[:before])
    assert {to.split("/")[3] for to in puts[before:]} == {"00001", "00002"}


@pytest.fixture
def s3(monkeypatch):
    """A bucket of a local server."""
    s3fs = pytest.importorskip("s3fs", reason="s3fs is not installed")
    moto = pytest.importorskip("moto.server", reason="moto is not installed")
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.get_host_and_port()[1]}")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    s3fs.S3FileSystem.clear_instance_cache()
    s3fs.S3FileSystem().mkdir("bucket")
    yield s3fs.S3FileSystem()
    s3fs.S3FileSystem().rm("bucket", recursive=True)  # the server's buckets are the process's
    server.stop()
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], [*IN_TASKS[:-1], "2"]], ids=["one process", "tasks"])
def test_a_bucket_gets_the_bytes_of_a_folder(s3, capsys, options):
    prepare("here", *options)
    prepare("s3://bucket/deep/mine", *options)
    names = s3.find("bucket")
    assert {name.removeprefix("bucket/deep/mine/"): s3.cat(name) for name in names} == in_folder("here")
    assert "cannot be written" in refusal(capsys, "s3://another/mine", *options)
    assert not s3.exists("another")


class NotWritten(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_error(404)

    do_HEAD = do_GET

    def log_message(self, *args):
        pass


def test_what_cannot_be_written_to_is_one_line_before_any_work(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("llmkit.data.prepare.opened_source", None)  # the work
    server = ThreadingHTTPServer(("127.0.0.1", 0), NotWritten)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/mine"
    line = refusal(capsys, url)
    server.shutdown()
    assert line.startswith(f"error: {url}: cannot be written")
    assert "nosuch" in refusal(capsys, "nosuch://bucket/mine")
    if find_spec("gcsfs") is None:
        assert "gcsfs" in refusal(capsys, "gs://bucket/mine")
    Path("other").mkdir()
    Path("other/thesis.txt").write_text("mine")
    assert "holds other files, such as thesis.txt" in refusal(capsys, f"file://{tmp_path}/other")
    assert Path("other/thesis.txt").exists() and len(list(Path("other").iterdir())) == 1
    Path("file").write_text("a file")
    assert "cannot be" in refusal(capsys, f"file://{tmp_path}/file/mine")


def test_another_text_or_setting_is_not_mixed_with_what_is_there(capsys):
    prepare("memory://mine")
    assert "made with vocab_size=300" in refusal(capsys, "memory://mine", "--vocab_size", "310")
    assert "made with shard_tokens 500" in refusal(capsys, "memory://mine", "--shard_tokens", "600")
    Path("texts/00.txt").write_text("Something else.")
    assert "made with another corpus" in refusal(capsys, "memory://mine")
