"""What a run does beside training: measure its speed, print a progress line, sample."""

import textwrap
import time
from collections.abc import Callable, Sequence

import torch
from accelerate import DistributedType
from accelerate.state import AcceleratorState
from tqdm.auto import tqdm
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
    TrainerCallback,
)
from transformers.trainer_callback import TrainerState

from llmkit.console import say
from llmkit.data.tokenizer import decode
from llmkit.errors import UserError
from llmkit.runs.metrics import METRICS
from llmkit.runs.record import JsonlLog
from llmkit.training.stopping import StopOnRequest


class Throughput(TrainerCallback):
    """Tokens per second over all ranks and, where the GPU's peak is known, MFU, between two logged steps.

    Evaluation, saving and sampling are not counted: the clock starts with the first step after a log, and stops where
    one of them comes between two logs.

    Args:
        tokens_before: of all ranks before step s; None where `measure` is told.
        flops_per_token: forward and backward.
        peak: FLOP/s of all ranks together, None where unknown.
    """

    def __init__(self, tokens_before: Callable[[int], int] | None, flops_per_token: int, peak: float | None):
        self.tokens_before = tokens_before
        self.flops_per_token = flops_per_token
        self.peak = peak
        self.started: float | None = None
        self.paused: float | None = None
        self.is_first = True

    def on_step_begin(self, args, state, control, **kwargs):
        now = time.perf_counter()
        if self.started is None:
            self.started, self.first_step = now, state.global_step
        elif self.paused is not None:
            self.started += now - self.paused
        self.paused = None

    def on_step_end(self, args, state, control, **kwargs):
        # Where Trainer's own callback, which comes first, has just decided on one of them.
        if control.should_evaluate or control.should_save:
            if args.device.type != "cpu":
                torch.accelerator.synchronize(args.device)  # the step's own work counts
            self.paused = time.perf_counter()

    def measure(self, step: int, tokens: int | None = None) -> dict[str, float]:
        """Figures for the steps since the last call; call it right after the loss was read from the device.

        The first step alone has none: it compiles, and finds its memory.

        Args:
            tokens: of those steps, where there is no `tokens_before`.
        """
        if self.started is None:
            return {}
        seconds = time.perf_counter() - self.started
        self.started = None
        is_first, self.is_first = self.is_first, False
        if is_first and step == self.first_step + 1:
            return {}
        if tokens is None:
            assert self.tokens_before is not None, "else the tokens are told"
            tokens = self.tokens_before(step) - self.tokens_before(self.first_step)
        speed = tokens / seconds
        mfu = {"mfu": speed * self.flops_per_token / self.peak} if self.peak else {}
        return {"tokens_per_second": speed, **mfu}


class StepsOfArguments(TrainerCallback):
    """Logs, evaluates and saves as the arguments say; a resumed run of Trainer's does so as its checkpoint says."""

    def on_train_begin(self, args, state, control, **kwargs):
        state.compute_steps(args, state.max_steps)


class ProgressLine(TrainerCallback):
    """A progress bar where there is a terminal, and a line per log that a person can read.

    Without a terminal, as in a log file, the line of a training loss ends with the time that is left.
    """

    def on_train_begin(self, args, state, control, **kwargs):
        # None: only where stderr is not a terminal
        disable = True if args.disable_tqdm or not state.is_world_process_zero else None
        self.bar = tqdm(total=state.max_steps, initial=state.global_step, unit="step", leave=False, disable=disable)
        self.started, self.first_step = time.perf_counter(), state.global_step

    def on_step_end(self, args, state, control, **kwargs):
        self.bar.update()

    def on_log(self, args, state: TrainerState, control, **kwargs):
        logs = kwargs["logs"]
        if "train_runtime" in logs:  # Trainer's last one, which repeats what a trainer has not logged yet
            return
        shown = [m.said.format(m.write(logs[m.key])) for m in METRICS.values() if m.said and m.key in logs]
        if "loss" in logs and self.bar.disable and (left := self._seconds_left(state)):
            shown.append(f"{tqdm.format_interval(left)} left")
        if state.is_world_process_zero and shown:
            say(f"step {state.global_step:>6,}/{state.max_steps:,} | " + " | ".join(shown))

    def on_train_end(self, args, state, control, **kwargs):
        self.bar.close()

    def _seconds_left(self, state: TrainerState) -> float:
        """As long a step as all so far took, their evaluations and saves included; 0 where nothing can be said."""
        done = state.global_step - self.first_step
        if done < 2:  # the first alone compiles, or comes after an evaluation
            return 0
        return (time.perf_counter() - self.started) / done * (state.max_steps - state.global_step)


class Samples(TrainerCallback):
    """Continues fixed prompts at each evaluation: prints them and keeps them in the JSONL log.

    The sampling has a seed of its own, so it neither changes the training's random numbers nor differs by rank. A run
    that is asked to stop leaves out the samples that it has not made.

    Args:
        context: the model's context length in tokens.
        stop: what tells whether the run is to stop.
        add_special_tokens: as the tokenizer does with a text; False where a chat template has put them in already.

    Raises:
        UserError: a prompt that leaves no room in the context.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[str],
        max_new_tokens: int,
        context: int,
        log: JsonlLog,
        stop: StopOnRequest,
        add_special_tokens: bool = True,
    ):
        self.stop, self.add_special_tokens = stop, add_special_tokens
        prompts = [prompt or tokenizer.eos_token for prompt in prompts]  # nothing: as a document begins
        for prompt in prompts:
            if (length := len(tokenizer(prompt, add_special_tokens=add_special_tokens)["input_ids"])) >= context:
                raise UserError(
                    f"the sample prompt {prompt[:20]!r} has {length} tokens, the model's context {context}: shorten it"
                )
        self.tokenizer = tokenizer
        self.context = context
        self.prompts = prompts
        self.max_new_tokens = max_new_tokens
        self.log = log

    @staticmethod
    def takes_part(state: TrainerState) -> bool:
        """Whether this rank samples. Where each holds a part of the model (FSDP), all of them have to, or none."""
        return state.is_world_process_zero or AcceleratorState().distributed_type == DistributedType.FSDP

    def on_evaluate(self, args, state, control, **kwargs):
        if not self.takes_part(state):
            return
        together = AcceleratorState().distributed_type == DistributedType.FSDP
        left = False

        def leave() -> bool:
            nonlocal left
            left = left or self.stop.leave_samples(args, together)
            return left

        for prompt in self.prompts:
            text = self.sample(kwargs["model"], prompt, leave)
            if left:
                return
            if state.is_world_process_zero:
                say(textwrap.indent(text, "    | "))
                self.log.write(state.global_step, {"prompt": prompt, "sample": text})

    def sample(self, model: PreTrainedModel, prompt: str, leave: Callable[[], bool] = lambda: False) -> str:
        """The prompt with its continuation, which ends where `leave`, called after each token, says so."""
        inputs = self.tokenizer(prompt, add_special_tokens=self.add_special_tokens, return_tensors="pt")
        inputs = inputs.to(model.device)
        room = self.context - inputs["input_ids"].shape[1]
        training = model.training
        model.eval()
        with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []), torch.no_grad():
            torch.manual_seed(0)
            # pyrefly: ignore[not-callable]  torch calls every attribute of a module a tensor or a module
            output = model.generate(
                **inputs,
                max_new_tokens=min(self.max_new_tokens, room),
                do_sample=True,
                temperature=0.8,
                top_k=50,
                pad_token_id=self.tokenizer.eos_token_id,
                stopping_criteria=StoppingCriteriaList([_Leave(leave)]),
            )
        model.train(training)
        return decode(self.tokenizer, output[0], skip_special_tokens=True)


class _Leave(StoppingCriteria):
    """Ends a generation where a function says so."""

    def __init__(self, leave: Callable[[], bool]):
        self.leave = leave

    def __call__(self, input_ids, scores, **kwargs) -> torch.Tensor:
        return torch.full((len(input_ids),), self.leave(), dtype=torch.bool, device=input_ids.device)
