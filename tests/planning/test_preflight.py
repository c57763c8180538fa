"""The checks of fine-tuning recipes on a tiny base: they pass where the trainer is right, and fail where it is not."""

import json
import os
from pathlib import Path

import pytest
import torch

from llmkit.finetuning.preference_trainer import PreferenceTrainer
from llmkit.finetuning.sft_trainer import ConversationTrainer
from llmkit.planning import preflight, training_checks
from llmkit.planning.doctor import ERROR, OK, WARNING, Finding
from llmkit.recipe_kinds import DPO, SFT, RecipeKind, parse_recipe
from small_run import phi_with_adapter

ROOT = Path(__file__).parents[2]
ANSWERS = ["Paris, on the Seine, where it has been for two thousand years.", "Rome.", "Four, I think.", "All of them."]
TRAINING = ["--max_length", "64", "--max_steps", "100", "--learning_rate", "5e-3", "--bf16", "false"]
TRAINING += ["--use_cpu", "true", "--report_to", "none", "--validation_fraction", "0.1"]


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """A base, an adapter on it, and data of both kinds with answers of different lengths."""
    work = tmp_path_factory.mktemp("preflight")
    phi_with_adapter(work, [f"### Human: What is {n}?\n### Assistant: {answer}" for n, answer in enumerate(ANSWERS)])
    pairs = [(f"What is {n}?", ANSWERS[n % 4], ANSWERS[n * 3 % 4 - 1]) for n in range(40)]
    rows = {
        "pairs": [{"prompt": q, "chosen": a, "rejected": b} for q, a, b in pairs],
        "chats": [
            {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]} for q, a, _ in pairs
        ],
    }
    for name, lines in rows.items():
        (work / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (work / "empty.yaml").write_text("{}")
    return work


def findings(kind: RecipeKind, work: Path, *fields: str) -> dict[str, Finding]:
    own = ["--model", str(work / "base"), "--data_files", str(work / "chats.jsonl")]
    if kind is DPO:
        own = ["--adapter", str(work / "sft"), "--data_files", str(work / "pairs.jsonl")]
    recipe = parse_recipe(
        kind, [*own, *TRAINING, "--output_dir", str(work / "run"), *fields], default_config=work / "empty.yaml"
    )
    return {found.name: found for found in preflight.preflight(kind, recipe)}


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    monkeypatch.setattr(training_checks, "PACE_STEPS", 8)


@pytest.mark.parametrize("how", [(SFT, "true"), (SFT, "false"), (DPO, None)], ids=["packed", "padded", "pairs"])
def test_a_recipe_that_is_right(work, how):
    kind, packing = how
    before = set(os.listdir(work))
    fields = ["--packing", packing] if packing else ["--loss_type", "sigmoid", "sft", "--loss_weights", "1.0", "1.0"]
    found = findings(kind, work, *fields)
    expected = dict.fromkeys(["gradient", "first loss", "overfitting", "save and resume"], OK)
    expected |= {"first loss": WARNING} if kind is SFT else {}  # the base has learned nothing
    assert {name: f.state for name, f in found.items() if name != "pace"} == expected, found
    assert "exactly" in found["save and resume"].text and "4 micro-batches on 1 rank(s)" in found["gradient"].text
    assert (f"ln {2 if kind is DPO else 512} is" in found["first loss"].text) and set(os.listdir(work)) == before
    assert ("without the SFT term" in found["gradient"].text) == (kind is DPO)


def test_a_loss_that_is_the_mean_of_each_micro_batch(work, monkeypatch):
    """Conversations with few trained tokens would count as much as those with many."""
    compute = ConversationTrainer.compute_loss

    def mean(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return compute(self, model, inputs) / self.args.gradient_accumulation_steps

    monkeypatch.setattr(ConversationTrainer, "compute_loss", mean)
    found = findings(SFT, work, "--packing", "false")
    assert found["gradient"].state == ERROR and "num_items_in_batch" in found["gradient"].fix


def test_training_that_does_not_start_from_its_reference(work, monkeypatch):
    init = PreferenceTrainer.__init__

    def moved(self, *args, **kwargs):
        init(self, *args, **kwargs)
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad and "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.2)

    monkeypatch.setattr(PreferenceTrainer, "__init__", moved)
    found = findings(DPO, work)
    assert found["first loss"].state == ERROR and "compared with" in found["first loss"].fix


def test_a_rate_that_teaches_nothing(work):
    assert findings(SFT, work, "--learning_rate", "1e-9")["overfitting"].state == ERROR


def test_nothing_is_downloaded(work, monkeypatch):
    """The recipe that is shipped: neither its dataset nor its base is here."""
    recipe = parse_recipe(SFT, ["--use_cpu", "true"], default_config=ROOT / "recipes" / "sft_qlora.yaml")
    (found,) = preflight.preflight(SFT, recipe)
    assert found.state == WARNING and "timdettmers/openassistant-guanaco" in found.text
    assert found.fix.startswith("hf download timdettmers/openassistant-guanaco --repo-type dataset")
