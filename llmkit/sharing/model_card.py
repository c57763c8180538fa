"""A model card from what was recorded of the run, and a picture of its loss. What was not recorded is not said."""

import json
import math
import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from safetensors import safe_open
from transformers import AutoConfig

from llmkit.runs.loss_curve import draw_loss
from llmkit.runs.metrics import METRICS
from llmkit.runs.run import LOG, PREFERENCE_TUNING, Run, load_run

PICTURE = "loss_curve.png"
TRAINER_STATE = "trainer_state.json"  # as Trainer names it, whose import takes seconds
# What is shown of a run's arguments, in this order, where it is in the record. Paths and names are not among it.
HYPERPARAMETERS = ("max_steps", "num_train_epochs", "total_batch_tokens", "per_device_train_batch_size")
HYPERPARAMETERS += ("gradient_accumulation_steps", "block_size", "max_length", "packing", "optim", "learning_rate")
HYPERPARAMETERS += ("muon_learning_rate", "lr_schedule", "lr_scheduler_type", "warmup_steps", "min_lr_ratio")
HYPERPARAMETERS += ("weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "dropout")
HYPERPARAMETERS += ("beta", "loss_type", "loss_weights", "label_smoothing", "bf16", "fp16", "seed", "data_seed")
EVALUATED = ("eval_loss", "eval_perplexity", "eval_bits_per_byte")
PREFERENCES = ("eval_preference_accuracy", "eval_preference_accuracy_per_token", "eval_rewards/accuracies")
PREFERENCES += ("eval_rewards/margins", "eval_chosen_change", "eval_rejected_change", "eval_answer_tokens")
PREFERENCES += ("eval_answers_ended",)


def run_of(checkpoint: Path) -> Run | None:
    """The run that wrote a checkpoint, as far as it had come by then; None where there is no log of one."""
    within = checkpoint.name.startswith("checkpoint-")
    if not (checkpoint / LOG).exists() and not (within and (checkpoint.parent / LOG).exists()):
        return None
    run = load_run(checkpoint)
    if not within:
        return run
    if (step := _step_of(checkpoint)) is None:
        return None
    log = [record for record in run.log if record["step"] <= step]
    while len(log) > 1 and "run" in log[-1]:  # a later start, which went on from this checkpoint
        log.pop()
    starts, training, evaluations, samples = (
        [record for record in log if key in record] for key in ("run", "loss", "eval_loss", "sample")
    )
    return replace(
        run,
        record=starts[-1]["run"],
        log=log,
        starts=starts,
        training=training,
        evaluations=evaluations,
        samples=samples,
        end=run.end if run.end in log else None,
    )


def _step_of(checkpoint: Path) -> int | None:
    """The step in a checkpoint's name; under another name, as `checkpoint-best`, that of the state saved with it."""
    number = checkpoint.name.removeprefix("checkpoint-")
    if number.isdecimal():
        return int(number)
    try:
        return int(_read(checkpoint / TRAINER_STATE)["global_step"])
    except (ValueError, KeyError, TypeError):
        return None


def write_model_card(
    folder: Path,
    repo_id: str,
    run: Run | None,
    license: str | None,
    base: str | None,
    dataset: str | None,
    sft_adapter: str | None = None,
) -> None:
    """Write `README.md`, and a picture of the loss where there is one, beside a model's files.

    Args:
        folder: with configs, weights and tokenizer.
        repo_id: the name that the model will have on the Hub.
        run: what is known of the training.
        license: as the Hub names it.
        base, dataset: the model that training started from and what it was trained on, where they are on the Hub.
        sft_adapter: the adapter that preference tuning started from, where it is on the Hub.
    """
    adapter = _read(folder / "adapter_config.json")
    hellaswag = _last(run.log if run else [], "hellaswag/acc_norm")
    name, results = repo_id.split("/")[-1], _eval_results(run, dataset, hellaswag)
    data = ModelCardData(
        library_name="peft" if adapter else "transformers",
        pipeline_tag="text-generation",
        base_model=base,
        base_model_relation="adapter" if adapter else None,
        datasets=[dataset] if dataset else None,
        license=license,
        tags=["llmkit", *(["lora"] if adapter else [])],
        model_name=name if results else None,
        eval_results=results or None,
    )
    sections = [f"# {name}", _introduction(folder, adapter, run, base, sft_adapter), _usage(folder, repo_id, run)]
    if run:
        drawn = draw_loss(run, folder / PICTURE)
        sections += [
            _section("Results", _results(run, hellaswag), f"![Loss over the steps]({PICTURE})" if drawn else ""),
            _section("Data", _data(run, dataset)),
            _section("Training", _training(run), _table(_hyperparameters(run, adapter))),
            _section("Samples", *_samples(run)),
        ]
    else:
        sections.append(_section("Training", "How it was trained is not recorded beside the checkpoint."))
    sections.append("This card was written by `llmkit push`" + (" from the run's log." if run else "."))
    card = ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(filter(None, sections)) + "\n")
    card.save(folder / "README.md")


# ------------------------------------------------------------------ what the model is


def _introduction(folder: Path, adapter: dict, run: Run | None, base: str | None, sft_adapter: str | None) -> str:
    count = sum(map(_parameters, folder.glob("*.safetensors")))
    if adapter:
        kind = _text(adapter["peft_type"]).replace("LORA", "LoRA")
        rank = f" of rank {adapter['r']} with {count:,} parameters" if kind == "LoRA" else ""
        assert base is not None, "`base_on_hub` refuses an adapter without one"
        text = f"A {kind} adapter{rank} for {_link(base)}"
        if quantization := _read(folder / "quantization_config.json"):
            text += f", trained on that base in {'4' if quantization['load_in_4bit'] else '8'} bits"
        text += "."
        if run and run.kind == PREFERENCE_TUNING:
            text += f" {_reference(run, sft_adapter)}"
    else:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        (architecture, *_) = config.architectures or [config.model_type]
        size = "" if hasattr(config, "quantization_config") else f" with {count:,} parameters"
        text = (
            f"A language model, `{architecture}`{size}: {config.num_hidden_layers} layers, "
            f"{config.num_attention_heads} heads, {config.hidden_size:,} wide, a context of "
            f"{config.max_position_embeddings:,} tokens, {config.vocab_size:,} tokens in its vocabulary."
        )
        started = run and run.record["source"].get("init_from")
        if base:
            text += f" Its training started from {_link(base)}."
        elif run and "train_tokens" in run.record["data"]:
            text += " Trained " + ("on from another checkpoint." if started else "from scratch.")
    if run and (run.progress or 1) < 0.9999:
        text += f" This is a checkpoint at step {run.log[-1]['step']:,}, {run.progress:.0%} of the planned training."
    return text


def _reference(run: Run, sft_adapter: str | None) -> str:
    """What preference tuning started from and was compared with."""
    if "adapter" not in run.record["source"]:
        return "It was tuned on preferences, with that base as the reference."
    start = _link(sft_adapter) if sft_adapter else "an adapter for that base that is not on the Hub"
    return f"It was tuned on preferences, starting from {start}, which is also the reference."


def _parameters(weights: Path) -> int:
    with safe_open(weights, framework="pt") as file:
        return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118, no mapping


def _usage(folder: Path, repo_id: str, run: Run | None) -> str:
    prompts = run.record["arguments"].get("sample_prompts", []) if run else []
    prompt = json.dumps(next(filter(None, prompts), "Hello"), ensure_ascii=False)  # a string of Python's as well
    tokenizer = ""
    if adapter := (folder / "adapter_config.json").exists():
        tokenizer = f', tokenizer="{repo_id}"'
    lines = [
        "from transformers import pipeline",
        "",
        f'generate = pipeline("text-generation", "{repo_id}"{tokenizer})',
    ]
    if (folder / "chat_template.jinja").exists() or "chat_template" in _read(folder / "tokenizer_config.json"):
        lines += [
            f'messages = [{{"role": "user", "content": {prompt}}}]',
            'print(generate(messages, max_new_tokens=100)[0]["generated_text"][-1]["content"])',
        ]
    else:
        lines += [f'print(generate({prompt}, max_new_tokens=50)[0]["generated_text"])']
    parts = [_code("\n".join(lines), "python")]
    if adapter:
        parts[0] = f"With `peft` installed:\n\n{parts[0]}"
    if quantization := _read(folder / "quantization_config.json"):
        given = {key: value for key, value in quantization.items() if key.startswith(("bnb_", "load_in_")) and value}
        settings = "".join(f"    {key}={json.dumps(value).replace('true', 'True')},\n" for key, value in given.items())
        parts.append("With the base as it was in training:")
        code = f"""
from peft import AutoPeftModelForCausalLM
from transformers import BitsAndBytesConfig

quantization = BitsAndBytesConfig(
{settings})
model = AutoPeftModelForCausalLM.from_pretrained("{repo_id}", quantization_config=quantization)
"""
        parts.append(_code(code.strip(), "python"))
    return _section("Use", *parts)


# ------------------------------------------------------------------ what the run was


def _data(run: Run, dataset: str | None) -> str:
    source, data = run.record["source"], run.record["data"]
    if dataset:
        config = f", configuration `{source['dataset_config']}`" if source.get("dataset_config") else ""
        name = f"{_link(dataset, 'datasets/')}{config}, split `{source.get('dataset_split', 'train')}`"
    elif source.get("dataset_name"):
        name = "a local dataset"
    elif source.get("text_files") or source.get("data_files"):
        name = "local files"  # their names are the user's own
    else:
        name = _text(data["description"])
    last, rows = _last(run.log, "epoch"), {"Source": name}
    if data.get("prepare") == "ahead":
        rows["To train on"] = f"about {data['train_tokens']:,} tokens, which were made during the training"
        rows["Held out"] = f"{data['validation_tokens']:,} tokens"
    elif "train_tokens" in data:
        rows["To train on"] = f"{data['train_tokens']:,} tokens in {data['train_documents']:,} documents"
        rows["Text to train on"] = f"{data['train_bytes'] / 1e6:,.1f} MB"
        rows["Held out"] = f"{data['validation_tokens']:,} tokens"
    elif "pairs" in data:
        rows["To train on"] = f"{data['pairs']:,} preference pairs"
        rows["Held out"] = f"{data['validation_pairs']:,} preference pairs"
    else:
        rows["To train on"] = f"{data['conversations']:,} conversations"
        rows["Held out"] = f"{data['validation_conversations']:,} conversations"
    for key, label in (("tokens", "Tokens seen"), ("trained_tokens", "Tokens trained on")):
        if record := _last(run.training, key):
            rows[label] = f"{record[key]:,}"
    if last:
        rows["Passes over the data"] = f"{last['epoch']:.2f}"
    return _table(rows)


def _results(run: Run, hellaswag: dict) -> str:
    evaluation = run.evaluations[-1] if run.evaluations else {}
    metrics = [METRICS[key] for key in EVALUATED + PREFERENCES if key in evaluation]
    rows = {metric.name.capitalize(): metric.write(evaluation[metric.key]) for metric in metrics}
    if hellaswag:
        error = hellaswag.get("hellaswag/acc_norm_stderr")
        metric = METRICS["hellaswag/acc_norm"]
        text = metric.write(hellaswag[metric.key]) + (f" ± {metric.write(error)}" if error else "")
        if questions := hellaswag.get("hellaswag/questions"):
            text += f" ({questions:,.0f} questions)"
        rows[metric.name] = text
    if run.training:
        rows["Training loss"] = METRICS["loss"].write(run.training[-1]["loss"])
    rows["At step"] = f"{run.log[-1]['step']:,}"
    return _table(rows)


def _training(run: Run) -> str:
    machine, versions = run.record["machine"], run.record["versions"]
    hours, minutes = divmod(round(run.seconds()[-1] / 60), 60)
    seconds = run.seconds()[-1]
    time = f"{hours} h {minutes} min" if hours else f"{minutes} min" if minutes > 1 else f"{seconds:.0f} s"
    parts = f", in {len(run.starts)} parts" if len(run.starts) > 1 else ""
    text = f"On {machine['ranks']} x {_text(machine['device'])}, in {time}, evaluations included{parts}"
    if speeds := sorted(record["tokens_per_second"] for record in run.training if "tokens_per_second" in record):
        text += f"; {speeds[len(speeds) // 2]:,.0f} tokens per second in the median"
    return text + ". With " + ", ".join(_text(f"{name} {number}") for name, number in versions.items()) + "."


def _hyperparameters(run: Run, adapter: dict) -> dict[str, str]:
    known = run.record["source"] | run.record["decisive"] | run.record["arguments"]
    rows = {name: known[name] for name in HYPERPARAMETERS if known.get(name) is not None}
    for name in ("r", "lora_alpha", "lora_dropout", "target_modules"):
        if name in adapter:
            rows["lora_r" if name == "r" else name] = adapter[name]
    return {f"`{name}`": _plain(value) for name, value in rows.items()}


def _plain(value: object) -> str:
    if isinstance(value, list):
        return _text(", ".join(sorted(map(str, value))))
    return f"{value:g}" if isinstance(value, float) else _text(value)


def _samples(run: Run) -> list[str]:
    latest = {record["prompt"]: record for record in run.samples}
    text = [_code(record["sample"].rstrip()) for record in latest.values()]
    return [f"Sampled during training, at step {run.samples[-1]['step']:,}:", *text] if text else []


def _eval_results(run: Run | None, dataset: str | None, hellaswag: dict) -> list[EvalResult]:
    """The measured numbers, of datasets that are on the Hub: the metadata has no way to say another one."""
    results = []
    if dataset and run and run.evaluations:
        last = run.evaluations[-1]
        measured = {key: last[key] for key in EVALUATED if math.isfinite(last.get(key, math.inf))}
        results += [_result(dataset, dataset, key.removeprefix("eval_"), value) for key, value in measured.items()]
    if hellaswag:
        results.append(_result("Rowan/hellaswag", "HellaSwag", "acc_norm", hellaswag["hellaswag/acc_norm"]))
    return results


def _result(dataset: str, name: str, metric: str, value: float) -> EvalResult:
    return EvalResult(
        task_type="text-generation", dataset_type=dataset, dataset_name=name, metric_type=metric, metric_value=value
    )


# ------------------------------------------------------------------ Markdown


def _section(title: str, *parts: str) -> str:
    text = "\n\n".join(filter(None, parts))
    return f"## {title}\n\n{text}" if text else ""


def _table(rows: dict[str, str]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {_cell(name)} | {_cell(value)} |" for name, value in rows.items())])


def _cell(markdown: str) -> str:
    """What would end a cell of a table, or its row, does so no more."""
    return " ".join(markdown.split()).replace("|", r"\|")


def _text(value: object) -> str:
    """A value of a log or a configuration as text alone: none of its signs is Markdown, and it stays in its line."""
    return re.sub(r"([\\`*\[\]<>])", r"\\\1", " ".join(str(value).split()))


def _code(text: str, language: str = "") -> str:
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}{language}\n{text}\n{fence}"


def _link(name: str, kind: str = "") -> str:
    return f"[{name}](https://huggingface.co/{kind}{name})"


def _last(records: Iterable[dict], key: str) -> dict:
    return next((record for record in reversed(list(records)) if key in record), {})


def _read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
