"""What tells others of a run while it goes on: its page, and its checkpoints on the Hub."""

from pathlib import Path

from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy

from llmkit.console import say
from llmkit.errors import UserError
from llmkit.files import COMPLETE
from llmkit.runs.report import write_report
from llmkit.sharing.hub import RunPusher


class LiveReport(TrainerCallback):
    """Writes `report.html` of the run's folder at the first log line and after each evaluation. No run ends for it."""

    def __init__(self) -> None:
        self.is_training = self.is_there = False  # the page of this start

    def on_train_begin(self, args, state, control, **kwargs):
        self.is_training, self.is_there = True, False

    def on_train_end(self, args, state, control, **kwargs):
        self.is_training = False

    def on_log(self, args, state, control, **kwargs):
        if not self.is_there:
            self.on_evaluate(args, state, control)

    def on_evaluate(self, args, state, control, **kwargs):
        if not (self.is_training and state.is_world_process_zero):
            return
        self.is_there = True
        try:
            write_report([args.output_dir])
        except UserError as error:
            say(f"{error}; the run goes on")


class PushCheckpoints(TrainerCallback):
    """Pushes each finished checkpoint in the background, with `push_to_hub` and `hub_strategy: every_save`."""

    def __init__(self, pusher: RunPusher):
        self.pusher = pusher

    def on_save(self, args, state, control, **kwargs):
        checkpoint = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        wanted = state.is_world_process_zero and args.hub_strategy == HubStrategy.EVERY_SAVE
        if wanted and (checkpoint / COMPLETE).exists():  # not where the save failed
            self.pusher.push_soon(str(checkpoint), state.global_step)
