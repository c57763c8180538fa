"""The list of a folder's runs shows each as it stands, and links to its page."""

import pytest
from test_run import end, loss, start, write_log

from llmkit import cli
from llmkit.files import hold_folder, release_folder


@pytest.fixture
def runs(tmp_path):
    folder = tmp_path / "runs"
    done = [start(0, 10.0), loss(20, 15.0, 2.5), {"step": 20, "time": 16.0, "eval_loss": 2.25}, end(20, 17.0)]
    write_log(folder / "done", done)
    (folder / "done/report.html").write_text("")
    write_log(folder / "sweep/a", [start(0, 100.0), loss(10, 105.0)])
    write_log(folder / "<b>odd\x1b[2J", [start(0, 50.0), loss(5, 55.0)])
    (folder / "bytes").mkdir()
    (folder / "bytes/log.jsonl").write_bytes(b"\xff\n")
    return folder


def test_the_runs_of_a_folder(runs, capsys):
    hold_folder(runs / "sweep/a")
    cli.main(["runs", str(runs)])
    release_folder(runs / "sweep/a")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split("  ")[0] == "run"
    assert lines[1].startswith("sweep/a") and "running at 50%, as of 20" in lines[1]
    assert lines[2].startswith("<b>odd") and "stopped at 25%, as of 1970-01-01 00:00 UTC" in lines[2]
    assert lines[3].split() == ["done", "finished", "1970-01-01", "00:00", "UTC", "2k", "2.5000", "2.2500"]
    assert lines[4].startswith("bytes") and "unreadable" in lines[4]
    assert lines[-1] == f"wrote {runs / 'index.html'}"
    text = (runs / "index.html").read_text()
    assert '<a href="done/report.html">done</a>' in text
    assert "&lt;b&gt;odd" in text and "<b>odd" not in text and "<script" not in text
    assert text.count("<a ") == 1  # the others have no page yet


def test_a_folder_without_runs_is_one_line(tmp_path, capsys):
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(SystemExit):
            cli.main(["runs", str(folder)])
        assert len(capsys.readouterr().err.splitlines()) == 1
    assert not list(tmp_path.iterdir())
