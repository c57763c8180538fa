"""What pretraining and fine-tuning want of Trainer alike: exact evaluation, honest resuming, no harm from NaN."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from accelerate.utils import AutocastKwargs
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader
from transformers import (
    PreTrainedTokenizerBase,
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
)
from transformers.trainer_utils import EvalLoopOutput

from llmkit.console import say
from llmkit.errors import UserError
from llmkit.evaluation.held_out import loss_metrics
from llmkit.runs.record import JsonlLog, check_resume
from llmkit.runs.report import write_report
from llmkit.sharing.hub import RunPusher
from llmkit.training.callbacks import ProgressLine, Samples, StepsOfArguments, Throughput
from llmkit.training.lr_finder import RangeTest
from llmkit.training.memory import out_of_memory
from llmkit.training.monitoring import ResourceUse
from llmkit.training.nonfinite import StepGuard
from llmkit.training.ranks import Processes, lost_ranks_told, processes_of_ranks
from llmkit.training.reporting import LiveReport, PushCheckpoints
from llmkit.training.resuming import how_to_go_on
from llmkit.training.run_arguments import RunArguments
from llmkit.training.saving import ResumedState, WholeCheckpoints
from llmkit.training.schedules import RANGE_TEST, check_schedule, create_schedule
from llmkit.training.stopping import EvaluationStopped, StopOnRequest, end_of_training, keep_workers


class ExactTrainer(WholeCheckpoints):
    """A base for Trainer and its subclasses: `class MyTrainer(ExactTrainer, SFTTrainer)`.

    A subclass says how the loss of a validation batch is summed (`sum_loss`), what the sums are as metrics if they are
    not a loss per token (`metrics_of`), where its steps stand in the schedule if they are not full batches
    (`schedule_position`), and how many tokens a byte of its text has (`tokens_per_byte`).

    Args:
        model, args: as Trainer's.
        record: the run's (`run_record`): it heads the log, and a checkpoint to resume has to fit it.
        throughput: what measures the run's speed.
        prompts: texts that are continued at each evaluation.
        context: the model's context length in tokens.
        add_special_tokens: whether prompts get the tokenizer's own, as its BOS.
        **others: Trainer's, or those of the other base.

    Raises:
        UserError: a prompt that leaves no room in the context.
    """

    model: Any  # a PreTrainedModel, or a PeftModel on one
    lr_scheduler: LRScheduler | None

    def __init__(
        self,
        model: nn.Module,
        args: RunArguments,
        record: dict,
        throughput: Throughput,
        prompts: Sequence[str],
        context: int,
        processing_class: PreTrainedTokenizerBase,
        add_special_tokens: bool = True,
        **others,
    ):
        log = JsonlLog(args.output_dir, record)
        self.stop_on_request = StopOnRequest()
        callbacks: list[TrainerCallback] = [throughput, log]
        if prompts:
            length = args.sample_tokens
            stop = self.stop_on_request
            callbacks.append(Samples(processing_class, prompts, length, context, log, stop, add_special_tokens))
        with lost_ranks_told(args):  # TRL's trainers let ranks wait for each other while they prepare their rows
            super().__init__(model, args=args, processing_class=processing_class, callbacks=callbacks, **others)
        # Its cache of converted weights is for weights that a forward pass uses twice. Here none is, and it would hold
        # all copies until the end of the pass, also those that the backward pass makes again.
        self.accelerator.autocast_handler = AutocastKwargs(cache_enabled=False)
        self.record, self.throughput = record, throughput
        self.evaluated_step = -1
        self.eval_sums: list[torch.Tensor] = []
        self.pusher = RunPusher(self.args) if self.args.push_to_hub else None
        if self.pusher:
            self.add_callback(PushCheckpoints(self.pusher))
        self.args.hub_token = None  # Trainer pickles its arguments beside each checkpoint
        self.add_callback(StepsOfArguments)
        self.add_callback(ResumedState)
        self.add_callback(self.stop_on_request)
        self.guard = StepGuard(self.accelerator, self.log, self.describe_micro_batch)
        # A range test goes on until its loss diverges. The guard comes after what may ask for a save.
        self.add_callback(RangeTest if args.lr_schedule == RANGE_TEST else self.guard)
        self.remove_callback(PrinterCallback if self.args.disable_tqdm else ProgressCallback)
        self.add_callback(ProgressLine)
        # Trainer seeds all ranks alike, and they would drop out the same units. The order of the data is stated apart,
        # for accelerate would take it from each rank's own seed.
        config = self.accelerator.dataloader_config
        config.data_seed = self.args.seed if config.data_seed is None else config.data_seed
        if self.args.process_index > 0:
            torch.manual_seed(self.args.seed + self.args.process_index)
        self.resources = ResourceUse(self.args.device)
        self.add_callback(LiveReport)

    def train(self, resume_from_checkpoint=None, *args, **kwargs):
        """Trainer's, which would also resume a checkpoint of another run, on other data or with other settings."""
        if resume_from_checkpoint:
            check_resume(resume_from_checkpoint, self.record)
        processes: Processes = []
        try:
            with lost_ranks_told(self.args, processes):
                processes += processes_of_ranks()
                self.take_folder(resume_from_checkpoint, self.record["data"]["fingerprint"])
                return super().train(resume_from_checkpoint, *args, **kwargs)
        except RuntimeError as error:
            if message := out_of_memory(error, self.args):
                raise UserError(message) from error
            raise
        finally:
            end_of_training()

    @property
    def stopped(self) -> str | None:
        """What a person is told where `train` was asked to stop before its end, else None."""
        if self.stop_on_request.stopped is None:
            return None
        step, saved = self.state.global_step, self.saved_step
        where = f"stopped ({self.stop_on_request.stopped}) at step {step:,} of {self.state.max_steps:,}"
        if saved == step:
            return f"{where}, checkpoint saved in {self.args.output_dir}; {how_to_go_on()}"
        return f"{where}, and its checkpoint could not be saved; from the last one that was, {how_to_go_on()}"

    def create_scheduler(self, num_training_steps: int, optimizer: Optimizer | None = None) -> LRScheduler:
        """`lr_schedule`'s. It is stepped once a step at any number of ranks, for accelerate does not wrap it."""
        if self.lr_scheduler is None:
            check_schedule(self.args, num_training_steps)
            optimizer = optimizer or self.optimizer
            assert optimizer is not None, "Trainer has made it first"
            self.lr_scheduler = create_schedule(optimizer, self.args, num_training_steps, self.schedule_position)
            # private: Trainer's mark of a scheduler of its own; without it a second `train` would go on with this one.
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def describe_micro_batch(self, step: int, rank: int, micro_batch: int) -> str:
        """What is said of a micro-batch's text where its loss is not finite; called on that rank, in that step."""
        raise NotImplementedError

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """Trainer's; `micro_batches` are those of the step that is taken."""
        self.micro_batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        return self.micro_batches, num_items

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.guard.micro_losses.append(loss)
        return loss.nan_to_num(0.0, 0.0, 0.0)  # into Trainer's running sum, which would never recover

    # private: the norm is there once a step, before the optimizer moves; a callback would have to make it again.
    def _get_grad_norm(self, model, grad_norm=None):
        self.guard.grad_norm = super()._get_grad_norm(model, grad_norm)
        return self.guard.grad_norm

    def get_train_dataloader(self) -> DataLoader:
        return keep_workers(super().get_train_dataloader())

    def schedule_position(self, step: int) -> float:
        """Full batches trained before a step, which is what schedules count."""
        return float(step)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval") -> dict[str, float]:
        """Trainer's; asked again at the same step it does not do the work again.

        Unless the weights may be others than that step's, as those of the best step at the end of training are.
        """
        if eval_dataset is not None:
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        other_weights = self.args.load_best_model_at_end and not self.is_in_train
        if self.evaluated_step != self.state.global_step or other_weights:
            try:
                # Its loader draws a random number: a run that is told to stop leaves an evaluation out, and has to
                # go on with the same dropout masks and the same order.
                with torch.random.fork_rng(devices=[]):
                    self.metrics = super().evaluate(None, ignore_keys, metric_key_prefix)
            except EvaluationStopped:
                self.control.should_save = self.control.should_training_stop = True
                best = self.args.metric_for_best_model
                return {f"eval_{best.removeprefix('eval_')}": math.nan} if best else {}
            self.evaluated_step = self.state.global_step
        return self.metrics

    def sum_loss(self, model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """The summed loss of a validation batch in nats, and its number of targets: a tensor of these two."""
        raise NotImplementedError

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Notes the batch's sums for `evaluation_loop`, and returns no predictions to gather."""
        with torch.no_grad():
            self.eval_sums.append(self.sum_loss(model, inputs))
        return None, None, None

    def evaluation_loop(self, dataloader, description, *args, metric_key_prefix="eval", **kwargs) -> EvalLoopOutput:
        """Trainer's loop, with sums over all batches and ranks (Trainer averages batches)."""
        self.eval_sums = []
        output = super().evaluation_loop(dataloader, description, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        sums = self.accelerator.gather(torch.stack(self.eval_sums)).cpu().double()
        totals = sums.view(-1, sums.shape[-1]).sum(dim=0).tolist()
        metrics = self.metrics_of(totals, dataloader.dataset)
        if self.is_world_process_zero():
            metrics |= self.answer_metrics()
        assert output.metrics is not None
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in metrics.items()})
        return output

    def metrics_of(self, totals: list[float], dataset) -> dict[str, float]:
        """The metrics of an evaluation, from what `sum_loss` gave, added up over all batches and ranks."""
        nats, tokens = totals
        return loss_metrics(nats, int(tokens), self.tokens_per_byte(dataset))

    def answer_metrics(self) -> dict[str, float]:
        """The metrics of an evaluation that take generated text; the first rank alone generates it."""
        return {}

    def tokens_per_byte(self, dataset) -> float | None:
        """Of the text that is evaluated, where bits per byte are wanted."""
        return None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs |= self.resources.measure()
        super().log(logs, start_time)

    def write_report(self) -> None:
        """Write `report.html` of the run's folder from its log."""
        if self.is_world_process_zero():
            write_report([self.args.output_dir])

    # Sharing on the Hub, in place of Trainer's way, where a push that fails ends the run

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Nothing: `check_push` has made the repository, before anything else was made."""

    def create_model_card(self, *args, **kwargs) -> None:
        """Nothing: a card is written of the run's log when it is pushed, not with each checkpoint."""

    # pyrefly: ignore[bad-override]  Trainer's arguments would have no effect here
    def push_to_hub(self) -> None:
        """Push what `save_model` has saved, if `push_to_hub` is set: the last thing to do, when no other rank waits.

        Raises:
            UserError: it did not work; nothing is lost, and the line says how to do it later.
        """
        if self.pusher and self.is_world_process_zero():
            say(f"pushed to {self.pusher.push_last()}")
