"""The Python example of docs/data.md runs, and is as short as the page says."""

import json
import re
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "data.md"


def test_the_example_trains_on_a_dataset(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (example,) = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    assert len([line for line in example.splitlines() if line.strip()]) < 20
    names: dict = {}
    exec(compile(example, str(PAGE), "exec"), names)
    logged = [json.loads(line) for line in (tmp_path / "runs/times/log.jsonl").read_text().splitlines()]
    losses = [record["eval_loss"] for record in logged if "eval_loss" in record]
    assert len(losses) == 2 and losses[1] < losses[0]
    assert (tmp_path / "runs/times/model.safetensors").exists()
    assert logged[0]["run"]["data"]["description"] == "tokens in memory"
    assert names["trainer"].state.global_step == 20
