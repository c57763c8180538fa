"""`llmkit verify`: does a checkpoint open elsewhere, and does it say there what it says here?

First, `evidence.py` compares the checkpoint with what its training recorded: checksums, configuration, end token,
tokenizer, and the validation loss, which is measured again. This comes first because the consumers read the same
files as we do, and would agree with us on a checkpoint that is wrong. Then each consumer that is installed answers the
questions of `questions.py` in a process of its own in which llmkit cannot be imported (`consumers.py`), and its
answers are compared with those of our model. An adapter is opened by peft on its base; then it is merged, and the
merged checkpoint is verified like any other.
"""

import math
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import ADAPTER_CONFIG_NAME

from llmkit.data.tokenizer import load_tokenizer
from llmkit.errors import UserError, reason
from llmkit.hub_access import ask_hub_once
from llmkit.model.modeling_gpt2 import GPT2LMHeadModel
from llmkit.model.opening import open_config, open_model
from llmkit.paths import local_path
from llmkit.runs.run import QUANTIZATION_CONFIG
from llmkit.sharing.evidence import Check, check_files, check_loss, check_saved, find_shards
from llmkit.sharing.questions import AGREES, DIFFERS, INSTALL, NOT_INSTALLED, Ours, Row, ask, ask_ours
from llmkit.sharing.staging import CONFIGS, TOKENIZER, WEIGHTS

# What checkpoints and adapters are made for: where one of these does not open them, that is a disagreement.
PROMISED = ("transformers", "peft")
EXPORTS = ("onnxruntime", "ctranslate2", "llama.cpp")  # those with a format of their own


@dataclass(frozen=True)
class Settings:
    """How consumers are asked.

    Attributes:
        only: these consumers, each of which has to open the checkpoint; all where there are none.
        python: the interpreter that runs them.
        llama_cpp: a checkout of llama.cpp, for its converter.
        keep: a folder for what is made of the checkpoint: the consumers' own formats, the merged adapter.
        base: where an adapter's base is, if it has moved.
        data_dir: where the shards of the run are, if they have moved.
        loss: whether to measure the validation loss again.
    """

    only: Sequence[str] = ()
    python: str = sys.executable
    llama_cpp: str | None = None
    keep: Path | None = None
    base: str | None = None
    data_dir: str | None = None
    loss: bool = True


@dataclass
class Report:
    """All that was found about a checkpoint."""

    checkpoint: str
    checks: list[Check] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    required: Sequence[str] = ()

    @property
    def agrees(self) -> bool:
        """Whether nothing speaks against the checkpoint: what is not installed does not, unless it was asked for."""
        return all(check.same is not False for check in self.checks) and not any(map(self._is_wrong, self.rows))

    def _is_wrong(self, row: Row) -> bool:
        if row.state == DIFFERS or row.consumer in self.required:
            return row.state != AGREES
        return row.consumer in PROMISED and row.state not in (AGREES, NOT_INSTALLED)

    def as_dict(self) -> dict:
        """For JSON, which has no infinity."""
        rows = [asdict(row) | {"logits": _finite(row.logits)} for row in self.rows]
        checks = [asdict(check) for check in self.checks]
        return {"checkpoint": self.checkpoint, "agrees": self.agrees, "checks": checks, "consumers": rows}

    def table(self) -> str:
        """The checks, and below them a row a consumer."""
        words = {True: "yes", False: "NO", None: "-"}
        lines = [f"{check.name:>16}  {words[check.same]:3}  {check.text}" for check in self.checks]
        columns = ("consumer", "opened", "logits differ by", "same text", "stops", "same tokens", "same chat")
        cells: list[tuple[str, ...]] = [columns]
        for row in self.rows:
            far = "-" if row.logits is None else f"{row.logits:.1e} (of {row.bound:.1e})"
            flags = [words[flag] for flag in (row.same_text, row.stops, row.same_tokens, row.same_chat)]
            opened = "yes" if row.state in (AGREES, DIFFERS) else "no"
            cells.append((row.version or row.consumer, opened, far, *flags))
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        notes = [f"{row.consumer}: {row.state}, {row.note}" for row in self.rows if row.note]
        if self.rows:
            lines += ["", *("  ".join(map(str.ljust, line, widths)).rstrip() for line in cells), *notes]
        return "\n".join(lines)


def _finite(number: float | None) -> float | None:
    return number if number is not None and math.isfinite(number) else None


def verify(checkpoint: str, settings: Settings, say: Callable[[str], None]) -> Report:
    """Check a checkpoint, or an adapter, against its own record and in its consumers.

    Args:
        checkpoint: a folder, or a name on the Hub.
        say: is told what is being waited for.

    Raises:
        UserError: there is no such checkpoint, or the shards in `data_dir` are others.
    """
    folder = _local(checkpoint)
    report = Report(checkpoint, [check_files(folder)], required=settings.only)
    manifest = find_shards(folder, settings.data_dir)
    is_adapter = (folder / ADAPTER_CONFIG_NAME).exists()
    with tempfile.TemporaryDirectory() as name:
        asker = Asker(report, settings, Path(name), say)
        try:
            tokenizer = load_tokenizer(str(folder))
            if is_adapter:
                folder = asker.ask_adapter(folder, tokenizer)
            else:
                report.checks += check_saved(folder, tokenizer, folder, manifest)
            model = load_ours(folder)
        except UserError as error:
            report.checks.append(Check("opens here", False, str(error)))
            return report
        if settings.loss and not is_adapter:
            say("measuring the validation loss" if manifest else "looking for the run's shards")
            report.checks.append(check_loss(folder, model, manifest))
        ours = ask_ours(model, tokenizer, folder)
        del model  # a consumer takes as much memory
        for consumer in INSTALL:
            if consumer != "peft":
                asker.ask(consumer, ours)
    return report


def _local(checkpoint: str) -> Path:
    """The folder of a checkpoint; of one on the Hub, the files that consumers read are downloaded."""
    if (folder := local_path(checkpoint)) is not None:
        return folder.absolute()
    ask_hub_once()
    try:
        return Path(snapshot_download(checkpoint, allow_patterns=[*WEIGHTS, *TOKENIZER, *CONFIGS]))
    except (OSError, ValueError) as error:
        raise UserError(f"{checkpoint}: no folder here, and not read from the Hub ({error})") from error


@dataclass
class Asker:
    """Asks consumers one after the other and writes down what they say."""

    report: Report
    settings: Settings
    work: Path
    say: Callable[[str], None]

    def ask(self, consumer: str, ours: Ours, **more: object) -> None:
        """Add a consumer's row to the report, if it was asked for."""
        if self.settings.only and consumer not in self.settings.only:
            return
        self.say(f"asking {consumer}")
        work = self.work / consumer
        keep = self.settings.keep if consumer in EXPORTS else None
        export = (keep or work) / ("export" if keep is None else consumer)
        for folder in (work, export):
            folder.mkdir(parents=True)
        more["llama_cpp"] = self.settings.llama_cpp
        self.report.rows.append(ask(consumer, ours, self.settings.python, work, export, **more))
        if not any(export.iterdir()):
            export.rmdir()

    def ask_adapter(self, folder: Path, tokenizer: PreTrainedTokenizerBase) -> Path:
        """Verify an adapter on its base, and merge it.

        Returns:
            The folder of the merged checkpoint.

        Raises:
            UserError: adapter or base do not load, or the merged model does not say what the adapter says.
        """
        from llmkit.finetuning.adapters import adapter_config, load_with_adapter  # importing peft takes seconds
        from llmkit.finetuning.merge import merge_adapter

        config = adapter_config(folder)
        base = self.settings.base or config.base_model_name_or_path or ""
        if Path(base).is_dir():
            self.report.checks.append(replace(check_files(Path(base)), name="files of base"))
        self.report.checks += check_saved(folder, tokenizer, base, None)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model = load_with_adapter(str(folder), self.settings.base, device).get_base_model()
        assert isinstance(model, PreTrainedModel)
        # bitsandbytes computes products of 4-bit weights in bfloat16 where a CPU has instructions for that.
        is_quantized = (folder / QUANTIZATION_CONFIG).exists()
        kept_in = "bfloat16" if is_quantized else str(model.dtype).removeprefix("torch.")
        revision = None if self.settings.base else config.revision
        self.ask("peft", ask_ours(model, tokenizer, folder, kept_in), base=base, revision=revision)
        self.say("merging the adapter")
        merged = (self.settings.keep or self.work) / "merged"
        found = merge_adapter(str(folder), str(merged), torch.bfloat16, self.settings.base)
        text = f"KL {found.kl:.1e} nats a token from base + adapter, a logit at most {found.max_logit_difference:.3f}"
        self.report.checks.append(Check("merged", True, text))
        return merged


def load_ours(folder: str | Path) -> PreTrainedModel:
    """Our own model for GPT-2, the stock one of this process for others; in float32.

    Raises:
        UserError: it does not load.
    """
    try:
        if open_config(folder).model_type == "gpt2":
            return GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32, use_safetensors=True).eval()
        return open_model(folder, dtype=torch.float32).eval()
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        raise UserError(f"{folder}: its model does not load ({reason(error)})") from error
