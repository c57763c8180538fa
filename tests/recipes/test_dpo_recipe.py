"""`accelerate launch recipes/dpo_qlora.py` as a user runs it, on a tiny Phi with an SFT adapter."""

import json
import shutil
import subprocess
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ranks import on_ranks
from small_run import accelerate_launch, logged, phi_with_adapter, refusal, run_recipe

ROOT = Path(__file__).parents[2]
ANSWERS = {
    "What is the capital of France?": ("Paris, on the Seine.", "Rome."),
    "Who wrote Faust?": ("Goethe did.", "It was Schiller, I think."),
    "What is two and two?": ("Four.", "Five, or is it six?"),
    "Which sea is salt?": ("All of them.", "None."),
}
TRAINING = ["--max_length", "96", "--max_steps", "16", "--learning_rate", "5e-3", "--bf16", "false", "--beta", "0.3"]
TRAINING += ["--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "2", "--logging_steps", "2"]
TRAINING += ["--eval_strategy", "steps", "--eval_steps", "8", "--save_steps", "8", "--lr_schedule", "linear"]
TRAINING += ["--validation_fraction", "0.25", "--warmup_steps", "2", "--per_device_eval_batch_size", "3"]
TRAINING += ["--sample_tokens", "12", "--max_chosen_drop", "0.001"]


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """A base with an SFT adapter that is not zero, and preference pairs."""
    work = tmp_path_factory.mktemp("dpo")
    phi_with_adapter(work, [f"### Human: {question}\n### Assistant: {a}{b}" for question, (a, b) in ANSWERS.items()])
    rows = [{"prompt": question, "chosen": a, "rejected": b} for question, (a, b) in ANSWERS.items()]
    (work / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows * 8))
    return work


def arguments_of(work: Path, output: Path) -> list[object]:
    given = ["--config", ROOT / "recipes/dpo_qlora_quickstart.yaml", "--adapter", work / "sft", "--output_dir", output]
    return [*given, "--data_files", work / "pairs.jsonl", *TRAINING, "--use_cpu", "true"]


@pytest.fixture(scope="module")
def one_rank(work) -> Path:
    command = [*accelerate_launch("cpu"), "recipes/dpo_qlora.py", *map(str, arguments_of(work, work / "one"))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (work / "one" / "stdout").write_text(done.stdout)
    return work / "one"


def test_it_starts_as_the_reference_and_learns_to_prefer(one_rank):
    margin, change = logged(one_rank, "eval_rewards/margins"), logged(one_rank, "eval_chosen_change")
    assert sorted(margin) == [0, 8, 16]
    assert margin[0] == 0 and change[0] == 0, "the policy starts as the SFT adapter to the last bit"
    assert logged(one_rank, "eval_loss")[0] == pytest.approx(0.6931472)
    assert logged(one_rank, "rewards/accuracies")[16] == 1 and logged(one_rank, "rewards/margins")[16] > 1
    assert logged(one_rank, "trained_tokens")[16] > 16 * 4 * 4
    assert 0 <= logged(one_rank, "eval_answers_ended")[16] <= 1 and logged(one_rank, "eval_answer_tokens")[16] >= 0
    started = json.loads((one_rank / "log.jsonl").read_text().splitlines()[0])["run"]
    assert started["kind"] == "preference tuning"
    assert started["source"]["adapter"].endswith("sft") and started["source"]["lora_r"] == 4
    assert started["data"]["pairs"] == 24 and started["data"]["validation_pairs"] == 8


def test_it_says_what_it_does(one_rank):
    said = (one_rank / "stdout").read_text()
    assert "24 of 3 prompts" in said and "rejected:" in said and "|" in said
    assert not (one_rank / "ref").exists() and not (one_rank / "checkpoint-8" / "ref").exists()
    report = (one_rank / "report.html").read_text()
    assert "Preference accuracy" in report and "Against the reference" in report


def test_resumed_run_ends_with_the_same_bits(one_rank, work):
    again = work / "again"
    shutil.copytree(one_rank / "checkpoint-8", again / "checkpoint-8")
    shutil.copy(one_rank / "log.jsonl", again)
    on_ranks(1, run_recipe, "dpo_qlora", *arguments_of(work, again), "--resume_from_checkpoint", "latest")
    for key in ("loss", "trained_tokens", "eval_rewards/margins"):
        assert logged(again, key) == logged(one_rank, key)
    expected, found = (load_file(folder / "adapter_model.safetensors") for folder in (one_rank, again))
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_two_ranks_train_what_one_trains(one_rank, work):
    """Half the accumulation, the same losses, the same evaluation although the pairs do not divide by the ranks."""
    on_ranks(2, run_recipe, "dpo_qlora", *arguments_of(work, work / "two"), "--gradient_accumulation_steps", "1")
    for key in ("eval_rewards/margins", "eval_loss", "eval_preference_accuracy", "eval_logps/chosen"):
        one, two = logged(one_rank, key), logged(work / "two", key)
        assert two == pytest.approx(one, rel=1e-2, abs=1e-3), key
    assert logged(work / "two", "trained_tokens") == logged(one_rank, "trained_tokens")


def parts(work: Path, output: Path, **given):
    """What makes a trainer, the SFT model and the arguments, in this process."""
    from llmkit.finetuning.adapters import load_base_model
    from llmkit.finetuning.conversations import SourceArguments
    from llmkit.finetuning.preference_arguments import DPOArguments, PreferenceModelArguments
    from llmkit.finetuning.preference_trainer import PreferenceTrainer
    from llmkit.finetuning.preferences import encode_pairs, load_pairs

    start = PreferenceModelArguments(adapter=str(work / "sft"))
    start.resolve()
    args = DPOArguments(
        output_dir=str(output), use_cpu=True, bf16=False, report_to="none", max_length=96, disable_tqdm=True, **given
    )
    tokenizer = start.load_tokenizer()
    pairs, _ = load_pairs(SourceArguments(data_files=[str(work / "pairs.jsonl")], validation_fraction=0.25))
    rows = encode_pairs(pairs, tokenizer)
    model = start.put_adapter(load_base_model(start, torch.float32, torch.device("cpu")))
    data = {"train_rows": rows, "eval_rows": rows, "tokenizer": tokenizer, "description": "pairs"}
    return partial(PreferenceTrainer, lora_config=None, **data), model, args


def test_nobody_is_told_of_a_run(work, tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr("trl.trainer.base_trainer.send_telemetry", lambda *args, **kwargs: told.append(kwargs))
    monkeypatch.delenv("CI", raising=False)  # where TRL tells nothing
    make, model, args = parts(work, tmp_path)
    make(model, args)
    assert not told


def test_the_reference_is_the_sft_model(work, tmp_path):
    """Its log-probabilities, whatever the trained copy has become, are those of the SFT model loaded by itself."""
    from llmkit.finetuning.adapters import load_with_adapter

    make, model, args = parts(work, tmp_path)
    trainer = make(model, args)
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1
    inputs = next(iter(trainer.get_eval_dataloader()))
    found = torch.cat(trainer.compute_ref_log_probs(trainer.model, inputs))

    sft = load_with_adapter(str(work / "sft"), None, torch.device("cpu"))
    ids, answers = inputs["input_ids"], inputs["completion_mask"][:, 1:]
    with torch.no_grad():
        logits = sft(input_ids=ids, attention_mask=inputs["attention_mask"]).logits[:, :-1].log_softmax(-1)
    expected = (logits.gather(-1, ids[:, 1:, None]).squeeze(-1) * answers).sum(1)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)


def test_a_length_in_minutes_becomes_steps(work, tmp_path, capsys):
    """The rehearsal trains a copy, and leaves the SFT adapter without a reference beside it."""
    from llmkit.training.budget import fix_length

    make, model, args = parts(work, tmp_path, train_minutes=0.5, eval_strategy="steps", eval_steps=0.5)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    fix_length(make, model, args, None)
    assert args.max_steps > 1 and f"{args.max_steps:,} steps of " in capsys.readouterr().out
    assert list(model.peft_config) == ["default"]
    after = dict(model.named_parameters())
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)


def test_a_held_out_prompt_is_answered_where_none_is_given(one_rank):
    lines = [json.loads(line) for line in (one_rank / "log.jsonl").read_text().splitlines()]
    assert {line["prompt"] for line in lines if "prompt" in line} == {"### Human: Which sea is salt?\n### Assistant:"}


def test_the_result_is_an_adapter_as_any_other(one_rank, capsys):
    from llmkit.cli import main as llmkit

    llmkit(["merge", str(one_rank), str(one_rank.with_name("merged"))])
    assert "KL divergence" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--adapter", "{work}/nowhere"], "no such file or folder"),
        (["--adapter", "{work}/base"], "has no adapter_config.json"),
        (["--lora_r", "8"], "lora_r=8: the adapter"),
        (["--quantization", "none"], "quantization=none: the adapter"),
        (["--data_files", "{work}/nothing.jsonl"], "nothing.jsonl"),
        (["--data_files", "{work}/chats.jsonl"], "not one preference pair (2 rows: no chosen or no rejected answer)"),
        (["--data_files", "{work}/equal.jsonl"], "not one preference pair (2 rows: equal answers)"),
        (["--max_length", "500"], "max_length=500 is longer than the 128 positions"),
        (["--max_length", "8"], "nothing would be learned"),
        (["--loss_type", "dpo"], "loss_type=dpo: choose from sigmoid"),
        (["--loss_type", "sft", "--loss_weights", "1"], "learns no preference"),
        (["--loss_type", "sigmoid", "--loss_weights", "1", "2"], "`loss_weights` must have the same length"),
        (["--label_smoothing", "0.1"], "label_smoothing=0.1 is read by loss_type robust"),
        (["--loss_type", "exo_pair", "sft"], "exo_pair needs a label_smoothing above 0"),
        (["--precompute_ref_log_probs", "true"], "precompute_ref_log_probs=True is not supported"),
        (["--beta", "0"], "beta=0.0: must be above 0"),
        (["--neftune_noise_alpha", "5"], "neftune_noise_alpha"),
    ],
)
def test_mistakes_are_one_line(work, tmp_path, capsys, arguments, message):
    (work / "chats.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    (work / "equal.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "b "}\n' * 2)
    more = [text.format(work=work) for text in arguments]
    assert message in refusal("dpo_qlora", [*arguments_of(work, tmp_path / "run"), *more], capsys)
    assert not (tmp_path / "run").exists()


def test_a_start_without_adapter_and_model_is_refused():
    from llmkit.errors import UserError
    from llmkit.finetuning.preference_arguments import PreferenceModelArguments

    with pytest.raises(UserError, match="give the adapter of an SFT run"):
        PreferenceModelArguments().resolve()


def test_the_shipped_recipes_go_on_from_the_sft_recipes():
    from llmkit.finetuning.conversations import SourceArguments
    from llmkit.finetuning.preference_arguments import DPOArguments, PreferenceModelArguments
    from llmkit.recipe_parser import RecipeParser

    found = sorted((ROOT / "recipes").glob("dpo_qlora*.yaml"))
    assert len(found) >= 2
    for path in found:
        data, model, args = RecipeParser((SourceArguments, PreferenceModelArguments, DPOArguments), path).parse([])
        assert model.adapter == "runs/" + path.stem.replace("dpo", "sft") and "sigmoid" in args.loss_type
        assert (data.dataset_name is None) == path.stem.endswith("quickstart")
