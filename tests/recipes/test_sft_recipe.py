"""`accelerate launch recipes/sft_qlora.py` as a user runs it, on a tiny Phi: one rank, two ranks, resumed, merged."""

import json
import math
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PhiForCausalLM, pipeline, set_seed

from llmkit.data.tokenizer import train_bpe_tokenizer
from ranks import on_ranks
from small_run import accelerate_launch, logged, phi_config, refusal, run_recipe

ROOT = Path(__file__).parents[2]
ANSWERS = {
    "What is the capital of France?": "Paris, on the Seine.",
    "Who wrote Faust?": "Goethe did.",
    "Show me a loop": "```python\nfor x in range(3):\n    print(x)\n```",
    "日本語で": "はい🎉",
}
TRAINING = ["--max_length", "96", "--max_steps", "80", "--learning_rate", "1e-2", "--lora_r", "16", "--bf16", "false"]
TRAINING += ["--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "2", "--logging_steps", "5"]
TRAINING += ["--eval_strategy", "steps", "--eval_steps", "40", "--save_steps", "40", "--lr_schedule", "linear"]
TRAINING += ["--validation_fraction", "0.17", "--lora_dropout", "0", "--warmup_steps", "5", "--max_grad_norm", "1"]
TRAINING += ["--sample_prompts", "null", "--sample_tokens", "20"]


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """A base of Phi's architecture with random weights, and conversations to learn by heart."""
    work = tmp_path_factory.mktemp("sft")
    tokenizer = train_bpe_tokenizer([f"### Human: {q}\n### Assistant: {a}" for q, a in ANSWERS.items()] * 3, 330)
    set_seed(0)
    # What is random here has to be as lively as a trained model is, for a low-rank update to steer it.
    model = PhiForCausalLM(phi_config(tokenizer, initializer_range=0.2))
    torch.nn.init.normal_(model.lm_head.bias, std=0.5)
    model.save_pretrained(work / "base")
    tokenizer.save_pretrained(work / "base")
    rows = [{"text": f"### Human: {question}### Assistant: {answer}"} for question, answer in ANSWERS.items()]
    (work / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows * 8))
    return work


def arguments_of(work: Path, output: Path) -> list[object]:
    given = ["--config", ROOT / "recipes/sft_qlora_quickstart.yaml", "--model", work / "base", "--output_dir", output]
    return [*given, "--data_files", work / "chats.jsonl", *TRAINING]


def run(work: Path, output: Path, *more: object, config: str = "cpu") -> subprocess.CompletedProcess:
    command = [*accelerate_launch(config), "recipes/sft_qlora.py", *arguments_of(work, output), *more]
    return subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def one_rank(work) -> Path:
    done = run(work, work / "one")
    assert done.returncode == 0, done.stderr
    (work / "one" / "stdout").write_text(done.stdout)
    return work / "one"


def test_it_learns_by_heart(one_rank):
    loss, validation = logged(one_rank, "loss"), logged(one_rank, "eval_loss")
    assert loss[80] < 0.05 and sorted(validation) == [0, 40, 80]
    assert validation[0] > 4 and validation[80] < 0.05
    assert logged(one_rank, "eval_perplexity")[0] == pytest.approx(math.exp(validation[0]))
    samples = [json.loads(line) for line in (one_rank / "log.jsonl").read_text().splitlines() if '"sample"' in line]
    assert [line["step"] for line in samples] == [0, 0, 40, 40, 80, 80], "the first two held-out questions"
    for question, first, last in zip(["Who wrote Faust?", "日本語で"], samples[:2], samples[-2:], strict=True):
        assert question in first["prompt"] == last["prompt"]
        assert last["sample"].endswith(f"### Assistant: {ANSWERS[question]}") != first["sample"].endswith(
            f"### Assistant: {ANSWERS[question]}"
        )
    trained = logged(one_rank, "trained_tokens")
    assert trained[80] > trained[40] > 40 and logged(one_rank, "tokens_per_second")[80] > 0


def test_it_says_what_it_does(one_rank):
    """The audit, one example, and the ledger: the base in 4 bits, nothing frozen upcast, adapters in float32."""
    said = (one_rank / "stdout").read_text()
    assert "end tokens trained  27 of 27 answers" in said
    assert "[[ Pa|" in said and "<|endoftext|>]]" in said
    config = json.loads((one_rank / "adapter_config.json").read_text())
    assert sorted(config["target_modules"]) == ["dense", "fc1", "fc2", "k_proj", "q_proj", "v_proj"]
    # 2 layers of 4 x 64^2 + 2 x 64 x 192 weights in 4 bits
    nf4 = next(line.split() for line in said.splitlines() if line.split()[:1] == ["nf4"])
    assert nf4[1:3] == ["frozen", f"{2 * (4 * 64**2 + 2 * 64 * 192):,}"]


def answer(model, tokenizer, question: str) -> str:
    """Greedy; without anything said about when to stop."""
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(**inputs, do_sample=False, max_new_tokens=40)[0, inputs["input_ids"].shape[1] :]
    assert output[-1] == tokenizer.eos_token_id and len(output) < 40, "it did not stop"
    return tokenizer.decode(output[:-1]).strip()


def test_adapter_and_merged_checkpoint_give_the_answers_and_stop(one_rank, capsys):
    """In plain transformers and PEFT; padding and end share an id, which took no end token out of training."""
    from llmkit.cli import main as llmkit

    merged = one_rank.with_name("merged")
    llmkit(["merge", str(one_rank), str(merged)])
    assert "KL divergence" in capsys.readouterr().out
    tokenizer = AutoTokenizer.from_pretrained(one_rank)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    for folder in (one_rank, merged):
        model = AutoModelForCausalLM.from_pretrained(folder)
        assert model.get_input_embeddings().weight.shape[0] == 512, "no embedding row was added"
        for question, expected in ANSWERS.items():
            assert answer(model, tokenizer, question) == expected
    assert not (merged / "adapter_config.json").exists()
    chat = pipeline("text-generation", str(merged))
    reply = chat([{"role": "user", "content": "Who wrote Faust?"}], max_new_tokens=40, do_sample=False)
    assert reply[0]["generated_text"][-1] == {"role": "assistant", "content": " Goethe did."}
    with pytest.raises(SystemExit):
        llmkit(["merge", str(one_rank), str(merged)])
    assert "is there already" in capsys.readouterr().err


def test_two_ranks_train_what_one_trains(one_rank, work):
    """Half the accumulation, the same losses, the same evaluation although the rows do not divide by the ranks."""
    done = run(work, work / "two", "--gradient_accumulation_steps", "1", config="multi_cpu")
    assert done.returncode == 0, done.stderr
    for key in ("loss", "eval_loss"):
        one, two = logged(one_rank, key), logged(work / "two", key)
        assert one.keys() == two.keys()
        # Sums in another order: equal to rounding at first, and close while rounding grows.
        assert [two[step] for step in sorted(two)][:3] == pytest.approx(
            [one[step] for step in sorted(one)][:3], rel=1e-3
        )
        assert two[80] < 0.05
    assert logged(work / "two", "trained_tokens") == logged(one_rank, "trained_tokens")


def test_resumed_run_ends_with_the_same_bits(one_rank, work):
    again = work / "again"
    shutil.copytree(one_rank / "checkpoint-40", again / "checkpoint-40")
    shutil.copy(one_rank / "log.jsonl", again)
    resume = ["--use_cpu", "true", "--resume_from_checkpoint", "latest"]
    on_ranks(1, run_recipe, "sft_qlora", *arguments_of(work, again), *resume)
    for key in ("loss", "trained_tokens"):
        assert logged(again, key) == logged(one_rank, key)
    expected, found = (load_file(folder / "adapter_model.safetensors") for folder in (one_rank, again))
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--model", "{work}/nowhere"], "nowhere': there is no such file or folder"),
        (["--model", "{work}/one"], "is an adapter: merge it first"),
        (["--data_files", "{work}/nothing.jsonl"], "nothing.jsonl"),
        (["--max_length", "500"], "max_length=500 is longer than the 128 positions"),
        (["--max_length", "8"], "nothing would be learned"),
        (["--fp16", "true", "--bf16", "false"], "fp16 does not work with Phi"),
        (["--fsdp", "full_shard"], "fsdp=full_shard is not supported"),
        (["--lora_r", "0"], "lora_r=0"),
        (["--quantization", "int3"], "quantization"),
        (["--learning_rat", "1"], "did you mean --learning_rate?"),
    ],
)
def test_mistakes_are_one_line(one_rank, work, tmp_path, capsys, arguments, message):
    more = [text.format(work=work) for text in arguments]
    assert message in refusal("sft_qlora", [*arguments_of(work, tmp_path / "run"), *more], capsys)
    assert not (tmp_path / "run").exists()


def test_llmkit_audit_shows_what_a_recipe_would_train(work, capsys):
    from llmkit.cli import main as llmkit

    config = str(ROOT / "recipes/sft_qlora_quickstart.yaml")
    data = ["--model", str(work / "base"), "--data_files", str(work / "chats.jsonl"), "--validation_fraction", "0.17"]
    llmkit(["audit", config, *data])
    assert "end tokens trained  27 of 27 answers" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        llmkit(["audit", config, *data, "--max_length", "8"])
    assert "nothing would be learned" in capsys.readouterr().err


def test_the_default_recipe_is_phi_2_on_guanaco():
    from llmkit.finetuning.adapters import AdapterArguments
    from llmkit.finetuning.arguments import SFTArguments
    from llmkit.finetuning.conversations import ConversationArguments
    from llmkit.recipe_parser import RecipeParser

    found = sorted((ROOT / "recipes").glob("sft_qlora*.yaml"))
    assert len(found) >= 2
    for path in found:
        data, adapter, args = RecipeParser((ConversationArguments, AdapterArguments, SFTArguments), path).parse([])
        assert adapter.quantization == "nf4" and args.packing
        if path.name == "sft_qlora.yaml":
            assert (data.dataset_name, adapter.model) == ("timdettmers/openassistant-guanaco", "microsoft/phi-2")
            assert args.activation_checkpointing and args.learning_rate == 2e-4
