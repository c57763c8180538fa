"""The report's page stands alone, shows what the log says, and says nothing that should stay at home."""

import copy
import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from test_run import RECORD, end, loss, start, write_log
from transformers import TrainerCallback

import small_run
from llmkit import cli
from llmkit.data.token_view import Segmentation, Token, as_page
from llmkit.runs.report import page, run_names, write_report
from llmkit.runs.report.curves import charts, moving_average, thin, tokens
from llmkit.runs.report.summary import duration, plain, public, quantity, state
from llmkit.runs.run import load_run
from llmkit.training.arguments import PretrainArguments

LOGGED = [2.5 + 1 / step for step in range(1, 21)]
HOSTILE = "</script><script>alert(1)</script><!-- <b>&amp; \u2028 \ud83d"


def records(learning_rate: float = 0.01) -> list[dict]:
    """The log of a short run that was resumed once."""
    log = [start(0, 1000.0, learning_rate=learning_rate)]
    log += [loss(step, 1000.0 + step, value, grad_norm=0.5) for step, value in enumerate(LOGGED[:10], 1)]
    log += [{"step": 10, "time": 1012.0, "eval_loss": 2.75, "eval_perplexity": 15.6, "eval_runtime": 1.0}]
    log += [{"step": 10, "time": 1013.0, "prompt": "def", "sample": "def one"}]
    log += [start(10, 9000.0, learning_rate=learning_rate)]
    log += [loss(step, 8990.0 + step, value, grad_norm=0.5) for step, value in enumerate(LOGGED[10:], 11)]
    log += [{"step": 20, "time": 9011.0, "eval_loss": 2.5, "eval_perplexity": 12.2, "eval_runtime": 1.0}]
    log += [{"step": 20, "time": 9011.0, "hellaswag/acc": 0.25, "hellaswag/acc_norm": 0.27, "hellaswag/questions": 9}]
    return [*log, {"step": 20, "time": 9012.0, "prompt": "def", "sample": "def two"}, end(20, 9012.0)]


class Page(HTMLParser):
    """What a browser would find in the page: its elements, the text of each kind, and the embedded data."""

    def __init__(self, text: str):
        super().__init__()
        self.elements: list[tuple[str, dict]] = []
        self.texts: list[str] = []  # of each element, up to where the next one begins
        self.feed(text)
        self.close()
        [source] = [text for text in self.of("script") if text.startswith("{")]
        self.data = json.loads(source, parse_constant=lambda name: pytest.fail(f"JSON.parse refuses {name}"))

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self.texts.append("")

    def handle_data(self, data):
        if self.texts:
            self.texts[-1] += data

    def of(self, tag: str) -> list[str]:
        return [text for text, (found, _) in zip(self.texts, self.elements, strict=True) if found == tag]


def show(*folders: Path) -> Page:
    return Page(page([load_run(folder) for folder in folders], now=10_000.0))


@pytest.fixture
def run(tmp_path) -> Path:
    return write_log(tmp_path / "it", records())


def test_the_page_loads_nothing(run):
    found = show(run)
    assert [tag for tag, _ in found.elements].count("script") == 2
    for tag, attributes in found.elements:
        assert tag not in ("link", "img", "iframe", "base", "object")
        assert not attributes.keys() & {"src", "href", "srcset", "background", "onload", "onerror"}
    [style] = found.of("style")
    assert "url(" not in style and "@import" not in style
    text = page([load_run(run)], now=10_000.0)
    assert set(re.findall(r"https?://[^\"']*", text)) == {"http://www.w3.org/2000/svg"}  # the name of SVG's elements
    assert not re.search(r"\bfetch\(|XMLHttpRequest|import\(|innerHTML", text)
    assert "default-src 'none'" in text


def test_the_embedded_data_is_the_log(run):
    [shown] = show(run).data["runs"]
    for key, where in (("loss", "loss"), ("eval_loss", "eval_loss"), ("grad_norm", "grad_norm")):
        of_log = [record for record in records() if where in record]
        curve = shown["curves"][key]
        axis = shown["axes"][curve["axis"]]
        assert curve["values"] == pytest.approx([record[key] for record in of_log], rel=1e-6)
        assert axis["step"] == [record["step"] for record in of_log]
        assert axis["tokens"] == [100 * record["step"] for record in of_log]
    assert shown["curves"].keys() == {
        *("loss", "eval_loss", "eval_perplexity", "grad_norm", "hellaswag/acc", "hellaswag/acc_norm")
    }
    assert shown["samples"] == [{"prompt": "def", "steps": [10, 20], "texts": ["def one", "def two"]}]
    assert "validation loss 2.5000, perplexity 12.20, HellaSwag acc_norm 0.2700" in shown["headline"]
    assert "A GPT-2 of 12.3k parameters" in shown["headline"] and "2k tokens in 25 s" in shown["headline"]
    assert shown["state"] == {"kind": "finished", "text": "finished, resumed once"}


def test_the_time_is_the_runs_own(run):
    [shown] = show(run).data["runs"]
    axis = shown["axes"][shown["curves"]["loss"]["axis"]]
    # 10 s, then 3 s for evaluation and sample; the two hours until the resume do not count.
    assert axis["seconds"] == [*range(1, 11), *range(14, 24)]
    assert shown["resumes"] == {"step": [10], "tokens": [1000], "seconds": [13]}
    [starts] = [table for table in shown["tables"] if table["title"] == "Starts"]
    assert [[row[0], row[2], row[3]] for row in starts["rows"]] == [["0", "10", "0:00:13"], ["10", "20", "0:00:12"]]


def test_hostile_text_stays_text(tmp_path):
    log = records()
    log[0]["run"] = copy.deepcopy(log[0]["run"])
    for record in log:
        if "run" in record:
            record["run"]["data"] = record["run"]["data"] | {"description": HOSTILE}
        if "sample" in record:
            record |= {"prompt": HOSTILE, "sample": HOSTILE * 2}
    folder = write_log(tmp_path / "<b>it", log)
    (tmp_path / "plain").mkdir()
    found = show(folder)
    assert [tag for tag, _ in found.elements].count("script") == 2
    assert found.data["runs"][0]["samples"][0]["texts"] == [HOSTILE * 2] * 2
    assert found.of("title")[0].strip() == "<b>it"
    assert write_report([folder], tmp_path / "page.html").read_text(encoding="utf-8").count("</script>") == 2


def test_a_loss_that_is_not_a_number_is_a_gap_and_is_said(tmp_path):
    log = [start(0, 0.0), loss(1, 1.0), loss(2, 2.0, math.inf, grad_norm=math.nan), loss(3, 3.0, math.nan)]
    log += [{"step": 3, "time": 3.5, "eval_loss": math.nan, "eval_perplexity": math.inf}]
    [shown] = show(write_log(tmp_path, log)).data["runs"]
    assert shown["curves"]["loss"]["values"] == [3.0, None, None]
    assert ["loss", 2, "inf"] in shown["broken"] and ["loss", 3, "nan"] in shown["broken"]
    assert shown["state"]["text"] == "loss not finite at step 3"


def test_how_a_run_stands_depends_on_its_silence(tmp_path):
    run = load_run(write_log(tmp_path, [start(0, 0.0), loss(5, 200.0), loss(10, 600.0)]))
    assert state(run, now=700.0) == {"kind": "running", "text": "running at 50%, as of 1970-01-01 00:11 UTC"}
    assert state(run, now=600.0 + 3 * 400)["kind"] == "running"  # it was silent for 400 s before
    killed = {"kind": "stopped", "text": "stopped at 50%, as of 1970-01-01 00:10 UTC"}
    assert state(run, now=600.0 + 3 * 400 + 1) == killed


def test_a_run_whose_process_is_gone_is_stopped_at_once(tmp_path):
    run = load_run(write_log(tmp_path, [start(0, 0.0), loss(10, 600.0)]))
    assert state(run, now=601.0, alive=False)["text"] == "stopped at 50%, as of 1970-01-01 00:10 UTC"
    assert state(run, now=9999.0, alive=True)["text"] == "running at 50%, as of 1970-01-01 02:46 UTC"
    finished = load_run(write_log(tmp_path, [start(0, 0.0), loss(20, 600.0), end(20, 601.0)]))
    assert state(finished, now=601.0, alive=True)["kind"] == "finished"


def test_a_run_that_has_just_begun_has_a_page(tmp_path):
    found = show(write_log(tmp_path, [start(0, 0.0)]))
    assert found.data["charts"] == [] and found.data["runs"][0]["curves"] == {}


@pytest.mark.parametrize(
    "record", [{}, {key: 3 for key in RECORD}, {"data": {"tokens_per_byte": 0, "train_tokens": "x"}}]
)
def test_a_log_that_is_damaged_has_a_page(record, run, tmp_path):
    odd = {"step": 5, "time": 1.0, "loss": "x", "eval_loss": None, "prompt": 1, "sample": 2, "tokens_per_second": []}
    folder = write_log(tmp_path / "odd", [{"step": 0, "time": 0.0, "run": record}, odd, loss(6, 2.0)], cut="\x00{")
    assert show(folder).data["runs"][0]["curves"]["loss"]["values"] == [3.0]
    assert len(show(run, folder).data["runs"]) == 2


def test_runs_of_different_kinds_share_a_page(run, tmp_path):
    log = [{"step": 0, "time": 0.0, "run": {"kind": "fine-tuning", "source": {"model": "microsoft/phi-2"}}}]
    log += [{"step": step, "time": 1.0, "loss": 2.0, "trained_tokens": 10 * step} for step in (1, 2)]
    data = show(run, write_log(tmp_path / "chats", log)).data
    assert data["tokens"] == "trained tokens"
    assert data["runs"][1]["headline"].startswith("A LoRA adapter on phi-2")
    assert data["runs"][1]["axes"][0]["tokens"] == [10, 20]
    [_, final] = data["comparison"]
    assert {row[0] for row in final["rows"]} >= {"tokens trained", "answer tokens trained"}


def test_a_page_that_cannot_be_written_is_one_line(run, capsys):
    (run / "taken").write_text("")
    with pytest.raises(SystemExit):
        cli.main(["report", str(run), "--output", str(run / "taken/page.html")])
    assert capsys.readouterr().err.startswith(f"error: cannot write {run / 'taken/page.html'}: ")
    assert sorted(path.name for path in run.iterdir()) == ["log.jsonl", "taken"]


def test_nothing_private_is_on_the_page(tmp_path):
    log = records()
    for record in log:
        if "run" in record:
            record["run"] = copy.deepcopy(record["run"])
            record["run"]["source"] |= {
                "text_files": ["/home/alice/books/a.txt", "~alice/b.txt"],
                "tokenizer": "../alice/t",
            }
            record["run"]["data"]["description"] = "/home/alice/books (3 files)"
            record["run"]["arguments"] |= {"hub_token": "hf_secret", "run_name": "it"}
    text = page([load_run(write_log(tmp_path / "it", log))], now=10_000.0)
    assert "a.txt" in text
    for secret in ("alice", "hf_secret", str(tmp_path)):
        assert secret not in text


@pytest.mark.parametrize(
    ("path", "shown"),
    [
        ("/home/alice/runs/it", "…/it"),
        ("~/books/*.txt", "…/*.txt"),
        ("../../alice/it/", "…/it/"),
        ("/home/al ice/my runs, it's/the one", "…/the one"),
        ("file:///home/alice/my texts/a.txt", "…/a.txt"),
        (r"\\\\server\share\alice\a b.txt", "…/a b.txt"),
        ("C:/Users/Alice O'Neil/it", "…/it"),
        ("/home/alice", "~"),
        ("file:///Users/alice/", "~"),
        (r"C:\Users\alice", "~"),
        ("~alice", "~"),
        ("in /home/alice, and", "in ~, and"),
        ("me/model", "me/model"),
        ("https://huggingface.co/me/model", "https://huggingface.co/me/model"),
        ({"vocab_file": ["/home/alice/a b"]}, {"vocab_file": ["…/a b"]}),
        (r"C:\Users\alice\it", "…/it"),
        ("see /home/alice/a.txt, or /home/alice/b.txt", "see …/a.txt, or …/b.txt"),
        ("HuggingFaceFW/fineweb-edu (sample-10BT)", "HuggingFaceFW/fineweb-edu (sample-10BT)"),
        ("runs/it", "runs/it"),
        ("https://example.org/a/b", "https://example.org/a/b"),
        (["/a/b/c", 3], ["…/c", 3]),
    ],
)
def test_paths_lose_their_folders(path, shown):
    assert public(path) == shown


def test_a_long_curve_is_thinned_and_keeps_its_extremes():
    values = np.random.default_rng(0).normal(size=100_000)
    values[[777, 54_321]] = 50.0, -50.0
    values[60_000] = np.nan
    kept = thin(values)
    assert len(kept) <= 2003
    assert {0, 777, 54_321, 60_000, 99_999} <= set(kept.tolist())
    assert (np.diff(kept) > 0).all()
    # Nothing lies outside what is drawn, anywhere along the curve.
    for part in np.array_split(np.arange(100_000), 50):
        inside = values[kept[(kept >= part[0]) & (kept <= part[-1])]]
        assert np.nanmax(values[part]) == np.nanmax(inside) and np.nanmin(values[part]) == np.nanmin(inside)
    assert thin(values[:2000]).tolist() == list(range(2000))


def test_the_moving_average():
    values = np.array([1.0, 2, 6, np.nan, 4, 5, 30, 7, 8])
    expected = [np.mean(values[max(0, i - 2) : i + 3][~np.isnan(values[max(0, i - 2) : i + 3])]) for i in range(2, 7)]
    assert moving_average(values, 2)[2:7] == pytest.approx(expected)
    assert moving_average(np.full(100, 3.0), 10) == pytest.approx(np.full(100, 3.0))


def test_tokens_lie_between_those_that_were_logged(tmp_path):
    log = [start(0, 0.0), {"step": 0, "time": 0.0, "eval_loss": 4.0}]
    log += [
        {"step": step, "time": 1.0, "loss": 1.0, "trained_tokens": count} for step, count in ((10, 500), (20, 800))
    ]
    log += [{"step": step, "time": 2.0, "eval_loss": 4.0} for step in (15, 24)]  # 24: on at the pace of the last
    assert tokens(load_run(write_log(tmp_path, log))).tolist() == [0, 0, 500, 800, 650, 920]


def test_groups_share_a_chart_and_what_is_not_known_has_its_own(tmp_path):
    log = [start(0, 0.0), loss(1, 1.0), {"step": 3, "time": 2.0, "update_ratio/mlp": 1e-3, "update_ratio/wte": 2e-3}]
    log += [{"step": 4, "time": 3.0, "my_number": 7, "note": "text", "eval_runtime": 3.0}]
    found = show(write_log(tmp_path, log)).data
    lines = {spec["title"]: spec["lines"] for spec in found["charts"]}
    assert lines["Update-to-weight ratio"] == {"update_ratio/mlp": "mlp", "update_ratio/wte": "wte"}
    assert lines["my_number"] == {"my_number": "my_number"}
    assert lines.keys() == {"Loss", "Update-to-weight ratio", "my_number"}
    assert charts({"update_ratio/mlp"})[0]["group"] is True


@pytest.mark.parametrize(("factor", "shown"), [(1 + 1e-9, False), (2, True)])
def test_a_second_learning_rate_is_drawn_where_it_differs(factor, shown, tmp_path):
    log = [start(0, 0.0), loss(1, 1.0, learning_rate=1e-3, **{"lr/muon": 1e-3 * factor})]
    [chart] = [spec for spec in show(write_log(tmp_path, log)).data["charts"] if spec["title"] == "Learning rate"]
    assert ("lr/muon" in chart["lines"]) is shown


def test_where_a_run_comes_from_and_what_its_command_changed(tmp_path):
    files = [f"/home/alice/books/chapter_{n}.txt" for n in range(600)]
    command = [
        "recipes/pretrain.py",
        "--config",
        "/home/alice/mine.yaml",
        "--learning-rate=0.01",
        "--hub_token",
        "hf_s",
    ]
    command += ["--text_files", *files, "--max_steps", "20", "--run_name", "it's"]
    log = records()
    for record in log:
        if "run" in record:
            record["run"] = record["run"] | {"command": command, "commit": {"sha": "0123abc", "modified": True}}
            record["run"]["source"] = record["run"]["source"] | {"text_files": files}
    [shown] = show(write_log(tmp_path / "it", log)).data["runs"]
    tables = {table["title"]: dict(table["rows"]) for table in shown["tables"][:-1]}
    expected = "recipes/pretrain.py --config …/mine.yaml --learning-rate=0.01 --hub_token … --text_files "
    expected += "…/chapter_0.txt …/chapter_1.txt …/chapter_2.txt … --max_steps 20 --run_name 'it'\"'\"'s'"
    assert tables["How it was started"] == {
        "command": expected,
        "commit": "0123abc, with changes that were not committed",
    }
    assert tables["Settings"] == {"learning_rate": "0.01", "max_steps": "20", "text_files": "600 files"}
    assert tables["Other settings that are not at their defaults"] == {"n_layer": "2", "output_dir": "…/it"}


def test_settings_that_are_not_defaults_stand_apart(run):
    tables = {table["title"]: dict(table["rows"]) for table in show(run).data["runs"][0]["tables"][:-1]}
    assert tables["Settings"] == {"learning_rate": "0.01", "max_steps": "20", "n_layer": "2", "output_dir": "…/it"}
    assert tables["Settings at their defaults"] == {"seed": "42"}
    assert tables["Data"]["train tokens"] == "5,000 (5k)"
    assert tables["Data"]["tokens per byte"] == "0.2500 of the validation text (4.00 bytes a token)"
    assert tables["Data"]["epochs seen"] == "0.400"


def test_several_runs_are_told_apart_by_what_differs(run, tmp_path):
    other = records(learning_rate=0.03)
    for record in other:
        if "eval_loss" in record:
            record["eval_loss"] += 0.1
    found = show(run, write_log(tmp_path / "other", other)).data
    differing, final = found["comparison"]
    assert differing["rows"] == [["learning_rate", "0.01", "0.03"]]
    rows = {row[0]: row[1:] for row in final["rows"]}
    assert rows["validation loss"] == ["2.5000", "2.6000"]
    assert final["best"] == [[0, 0]]  # perplexity and HellaSwag are the same in both
    assert [shown["name"] for shown in found["runs"]] == ["it", "other"]


def test_losses_on_different_data_are_not_ranked(run, tmp_path):
    other = records()
    for record in other:
        if "run" in record:
            record["run"] = record["run"] | {"data": record["run"]["data"] | {"fingerprint": "another"}}
        if "eval_loss" in record:
            record["eval_loss"] += 0.1
        if "hellaswag/acc_norm" in record:
            record["hellaswag/acc_norm"] += 0.1
    final = show(run, write_log(tmp_path / "other", other)).data["comparison"][1]
    assert [[final["rows"][row][0], column] for row, column in final["best"]] == [["HellaSwag acc_norm", 1]]
    assert final["note"].endswith("do not compare.")


def test_runs_of_one_name_are_told_apart_by_the_folder_above(run, tmp_path):
    twin = write_log(tmp_path / "elsewhere/it", records())
    assert run_names([load_run(run), load_run(twin)]) == [f"{tmp_path.name}/it", "elsewhere/it"]


def test_a_fine_tune(tmp_path):
    log = records()
    for record in log:
        if "tokens" in record:
            record["trained_tokens"] = record.pop("tokens")
        if "run" in record:
            record["run"] = record["run"] | {
                "source": {"model": "/home/alice/base"},
                "data": {
                    "description": "my chats",
                    "fingerprint": "f",
                    "conversations": 10,
                    "validation_conversations": 2,
                },
            }
    found = show(write_log(tmp_path, log)).data
    assert found["runs"][0]["headline"].startswith(
        "A LoRA adapter on base (12.3k parameters) on my chats: 2k answer tokens"
    )
    assert found["tokens"] == "answer tokens"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (quantity(999), "999"),
        (quantity(999.6), "1k"),
        (quantity(1_234_567), "1.23M"),
        (quantity(9_999_745_024), "10B"),
        (duration(59.4), "59 s"),
        (duration(252), "4 min 12 s"),
        (duration(3600), "1 h"),
        (duration(11_130), "3 h 6 min"),
        (duration(86_400 * 2 + 3 * 3600), "2 d 3 h"),
    ],
)
def test_numbers_for_people(text, expected):
    assert text == expected


def test_the_command(run, tmp_path, capsys):
    cli.main(["report", str(run)])
    assert capsys.readouterr().out == f"wrote {run / 'report.html'}\n"
    assert Page((run / "report.html").read_text(encoding="utf-8")).data["title"] == "it"
    other = write_log(tmp_path / "other", records(0.03))
    output = tmp_path / "new/folder/both.html"
    cli.main(["report", str(run), str(other), str(run), "--output", str(output)])
    assert Page(output.read_text(encoding="utf-8")).data["title"] == "2 runs: it, other"


def test_a_folder_without_a_run_is_one_line_and_nothing_is_written(run, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for folder, message in (("empty", "is not the folder of a run"), ("missing", "there is no such file or folder")):
        with pytest.raises(SystemExit):
            cli.main(["report", str(run), str(tmp_path / folder)])
        error = capsys.readouterr().err
        assert str(tmp_path / folder) in error and message in error and error.count("\n") == 1
    assert not (run / "report.html").exists()


def test_a_real_run(data, tmp_path):
    what = {"eval_strategy": "steps", "eval_steps": 2, "sample_prompts": ["1 times 2"], "sample_tokens": 4}
    trainer = small_run.trainer(data, tmp_path / "real", **what)
    trainer.train()
    [shown] = Page(write_report([tmp_path / "real"]).read_text(encoding="utf-8")).data["runs"]
    assert shown["state"]["text"] == "finished"
    assert shown["curves"]["loss"]["values"] == pytest.approx(small_run.losses(trainer), rel=1e-6)
    assert shown["axes"][shown["curves"]["eval_loss"]["axis"]]["step"] == [2, 4, 6]
    assert shown["samples"][0]["steps"] == [2, 4, 6]
    assert f"validation loss {trainer.evaluate()['eval_loss']:.4f}" in shown["headline"]
    figures = {name: text for name, text, _ in shown["figures"]}
    assert 0.1 < float(figures["peak memory"].removesuffix(" GiB")) < 64
    assert all(value > 0 for value in shown["curves"]["cpu_utilization"]["values"])


class Watcher(TrainerCallback):
    """Reads the run's page when a step begins, as a browser would that reloads it."""

    def __init__(self, page: Path):
        self.page = page
        self.seen: dict[int, dict | None] = {}

    def on_step_begin(self, args, state, control, **kwargs):
        found = Page(self.page.read_text(encoding="utf-8")).data if self.page.exists() else None
        self.seen[state.global_step] = found


def test_a_run_that_goes_on_has_a_page_that_says_so(data, tmp_path):
    what = {"eval_strategy": "steps", "eval_steps": 2, "logging_steps": 10, "logging_first_step": True}
    trainer = small_run.trainer(data, tmp_path / "live", **what)
    trainer.add_callback(watcher := Watcher(tmp_path / "live/report.html"))
    trainer.train()
    assert watcher.seen[0] is None
    evaluated = {}
    for step, data in watcher.seen.items():
        if step:
            assert data["live"] and data["runs"][0]["state"]["kind"] == "running"
            curve = data["runs"][0]["curves"].get("eval_loss", {"values": []})
            evaluated[step] = len(curve["values"])
    assert evaluated == {1: 0, 2: 1, 3: 1, 4: 2, 5: 2}
    trainer.write_report()
    assert not Page((tmp_path / "live/report.html").read_text(encoding="utf-8")).data["live"]


def test_a_page_that_cannot_be_written_does_not_end_the_run(data, tmp_path, capsys):
    (tmp_path / "it/report.html").mkdir(parents=True)
    trainer = small_run.trainer(data, tmp_path / "it", eval_strategy="steps", eval_steps=3)
    trainer.train()
    assert trainer.state.global_step == 6
    assert "report.html: Is a directory; the run goes on" in capsys.readouterr().out


def test_the_first_step_is_logged_without_a_speed(data, tmp_path):
    default = PretrainArguments.logging_first_step
    trainer = small_run.trainer(data, tmp_path, logging_steps=3, logging_first_step=default)
    trainer.train()
    logged = {entry["step"]: entry for entry in trainer.state.log_history if "loss" in entry}
    assert list(logged) == [1, 3, 6]
    assert ["tokens_per_second" in entry for entry in logged.values()] == [False, True, True]
    assert logged[1]["loss"] == pytest.approx(math.log(300), abs=0.1)  # it knows nothing yet of 300 tokens


@pytest.fixture
def browse(tmp_path):
    """Opens a page in Chromium, in a window as wide as a phone's; returns its elements as HTML."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("needs Chromium")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--window-size=400,800"]

    def browse(text: str) -> str:
        path = tmp_path / "browsed.html"
        measure = (
            "{ const root = document.documentElement; root.dataset.overflow = root.scrollWidth - root.clientWidth; }"
        )
        path.write_text(text.replace("</body>", f"<script>{measure}</script></body>"), encoding="utf-8")
        command = [browser, *flags, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", path.as_uri()]

        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        assert "CONSOLE" not in done.stderr, done.stderr
        return done.stdout

    return browse


LONG = "pretrain_gpt2_124m_fineweb_edu_sample_10BT_cosine_lr_6e-4_seed_1337_the_second_try"


@pytest.mark.slow
def test_a_browser_draws_the_curves_on_a_phone(run, tmp_path, browse):
    broken = write_log(tmp_path / LONG, [*records()[:8], loss(8, 1009.0, math.nan)])
    for folders, lines in (([run], 6), ([broken], 2), ([run, broken], 8)):
        text = browse(page([load_run(folder) for folder in folders], now=10_000.0))
        drawn = re.findall(r'<path class="line[^>]* d="M([^"]*)"', text)
        assert len(drawn) == lines
        assert "NaN" not in "".join(drawn)
        assert 'data-overflow="0"' in text


@pytest.mark.slow
def test_a_curve_of_one_point_is_a_dot(tmp_path, browse):
    log = [start(0, 0.0), loss(1, 1.0), loss(2, 2.0, math.nan), loss(3, 3.0), loss(4, 3.0)]
    text = browse(page([load_run(write_log(tmp_path / "it", log))], now=10_000.0))
    assert len(re.findall(r'<circle class="dot"', text)) == 1
    text = browse(page([load_run(write_log(tmp_path / "it", log[:2]))], now=10_000.0))
    assert len(re.findall(r'<circle class="dot"', text)) == 1


@pytest.mark.slow
def test_a_name_breaks_between_its_words(tmp_path, browse):
    text = browse(page([load_run(write_log(tmp_path / LONG, records()))], now=10_000.0))
    assert "<h1>" + "_<wbr>".join(LONG.replace("-", "-<wbr>").split("_")) + "</h1>" in text


@pytest.mark.slow
def test_a_page_of_tokens_fits_a_phone(browse):
    tokens = [Token(7, "x" * 90), Token(8, " <b>\n\t")] * 2
    text = browse(as_page([Segmentation(f"/home/alice/{LONG}", 50257, tokens, 200, 0)] * 2))
    assert 'data-overflow="0"' in text


@pytest.mark.slow
@pytest.mark.parametrize(("now", "reloads"), [(700.0, True), (99_999.0, False)])
def test_a_page_reloads_itself_while_its_run_goes_on(now, reloads, tmp_path, browse):
    log = [start(0, 0.0), loss(5, 200.0), loss(10, 600.0)]
    text = page([load_run(write_log(tmp_path / "it", log))], now)
    note = "<script>window.setInterval = (call, ms) => { document.documentElement.dataset.every = ms; }</script>"
    text = browse(text.replace("<body>", f"<body>{note}"))
    assert ('data-every="15000"' in text) is reloads


def test_a_long_list_is_counted():
    """600 text files made a page of 16,604 pixels."""
    assert plain([f"{n}.txt" for n in range(600)]) == "600 values"
    assert plain(["a.txt", "b.txt"]) == "'a.txt', 'b.txt'"


def test_a_picture_of_the_loss_of_one_run(tmp_path, capsys):
    write_log(tmp_path / "run", records())
    picture = tmp_path / "loss.png"
    cli.main(["report", str(tmp_path / "run"), "--output", str(picture)])
    assert picture.read_bytes().startswith(b"\x89PNG") and "wrote" in capsys.readouterr().out
    write_log(tmp_path / "begun", records()[:2])
    for runs, message in ((["run", "begun"], "a picture shows one run"), (["begun"], "no curve yet")):
        with pytest.raises(SystemExit, match="2"):
            cli.main(["report", *(str(tmp_path / run) for run in runs), "--output", str(tmp_path / "other.png")])
        assert message in capsys.readouterr().err and not (tmp_path / "other.png").exists()
