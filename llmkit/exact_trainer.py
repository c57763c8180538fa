"""What pretraining and fine-tuning want of Trainer alike: exact evaluation, honest resuming, no silent NaN."""

import math

import torch
from transformers import PrinterCallback, ProgressCallback, Trainer
from transformers.trainer_utils import EvalLoopOutput

from llmkit.callbacks import ProgressLine, StopOnSignal
from llmkit.errors import UserError
from llmkit.evaluation import loss_metrics
from llmkit.record import check_resume


class ExactTrainer(Trainer):
    """A base for Trainer and its subclasses: `class MyTrainer(ExactTrainer, SFTTrainer)`.

    `prediction_step` of the subclass appends (nats, targets) of each batch to `self.eval_sums` and returns nothing to
    gather; `self.record` is the run's record, which a checkpoint to resume has to fit.
    """

    record: dict
    tokens_per_byte: float | None = None  # of the validation text, where bits per byte are wanted

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.evaluated_step = -1
        self.eval_sums: list[torch.Tensor] = []
        self.add_callback(StopOnSignal(self.accelerator))
        self.remove_callback(PrinterCallback if self.args.disable_tqdm else ProgressCallback)
        self.add_callback(ProgressLine)

    def train(self, resume_from_checkpoint: str | None = None, **kwargs):
        """Trainer's, which would also resume a checkpoint of another run, on other data or with other settings."""
        if resume_from_checkpoint:
            check_resume(resume_from_checkpoint, self.record)
        return super().train(resume_from_checkpoint, **kwargs)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval") -> dict[str, float]:
        """Trainer's; asked again at the same step it does not do the work again."""
        if eval_dataset is not None:
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        if self.evaluated_step != self.state.global_step:
            self.metrics = super().evaluate(None, ignore_keys, metric_key_prefix)
            self.evaluated_step = self.state.global_step
        return self.metrics

    def evaluation_loop(self, dataloader, description, *args, metric_key_prefix="eval", **kwargs) -> EvalLoopOutput:
        """Trainer's loop, with the loss weighted by tokens over all batches and ranks (Trainer averages batches)."""
        self.eval_sums = []
        output = super().evaluation_loop(dataloader, description, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        sums = self.accelerator.gather(torch.stack(self.eval_sums)).cpu().double()
        nats, tokens = sums.view(-1, 2).sum(dim=0).tolist()
        metrics = loss_metrics(nats, int(tokens), self.tokens_per_byte)
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in metrics.items()})
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        super().log(logs, start_time)
        if not math.isfinite(logs.get("loss", 0.0)):
            raise UserError(
                f"the loss is {logs['loss']} at step {self.state.global_step}: lower learning_rate "
                f"({self.args.learning_rate}) or check the data, and resume from a checkpoint before this step"
            )
