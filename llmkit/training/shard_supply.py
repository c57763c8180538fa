"""What a run does about its shards: they are checked before its first step, and those of URLs are fetched in time."""

from concurrent.futures import ThreadPoolExecutor

from llmkit.data.mixture import MixedWindows, MixtureSampler
from llmkit.data.order import WindowBatchSampler
from llmkit.data.read_ahead import ReadAhead
from llmkit.data.windows import TokenWindows
from llmkit.errors import UserError
from llmkit.training.base_trainer import ExactTrainer
from llmkit.training.batch_ramp import Batches
from llmkit.training.checkpoints import step_of
from llmkit.training.stopping import is_asked_to_stop


class ShardSupply(ExactTrainer):
    """Trainer on token shards, whose ranks all wait for a shard that has to be fetched, and all stop without it."""

    train_dataset: TokenWindows | MixedWindows
    eval_dataset: TokenWindows | MixedWindows
    sampler: WindowBatchSampler | MixtureSampler
    batches: Batches
    read_ahead: ReadAhead
    lost_shard: str | None = None  # why the run was stopped, if a shard did not come

    def train(self, resume_from_checkpoint=None, *args, **kwargs):
        """As `ExactTrainer`'s.

        Raises:
            UserError: also where a shard cannot be fetched any more; what was trained is saved before.
        """
        drawn = self._drawn(self.batches.num_steps)
        sources = list(zip(_sources(self.train_dataset), self.sampler.orders, drawn, strict=True))
        self.read_ahead = ReadAhead(sources, _sources(self.eval_dataset))
        self.lost_shard = None
        try:
            output = super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            self.read_ahead.close()
        if self.lost_shard is not None:
            self.stop_on_request.stopped = self.lost_shard
            raise UserError(str(self.stopped))
        return output

    def take_folder(self, resume_from: str | None, fingerprint: str) -> None:
        """Also has the first shards fetched, and the first rank of each node read local ones and compare checksums."""
        problem, step = None, step_of(resume_from) if resume_from else 0
        self.sampler.skipped = step * self.batches.micro_batches
        place = min(self.batches.windows_before(step), int(self.batches.ends[-1]) - 1)
        with ThreadPoolExecutor(max_workers=1) as pool:
            pool.submit(self.sampler.windows, place, place + 1)  # meanwhile: it shuffles the group that comes first
            try:
                places = self._places(step)
                self.read_ahead.check_room(max(stop - start for start, stop in places))
                self.read_ahead.move(places)
                self.read_ahead.wait(is_asked_to_stop)
                if self.is_local_process_zero():
                    self.train_dataset.verify()
            except UserError as error:
                problem = str(error)
        if problem := self._first_problem(problem):
            raise UserError(problem)
        super().take_folder(resume_from, fingerprint)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """Trainer's, once the shards of the step are here; without them the run saves, and stops before the step."""
        if self.read_ahead.move(self._places(self.state.global_step)) and not self._shards_came():
            self.control.should_training_stop = True
            self.control.should_save = self.saved_step != self.state.global_step
            return [], None
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def _places(self, step: int) -> list[tuple[int, int]]:
        """Of each source, what the step after `step` steps reads, and accelerate and the workers ahead of it."""
        ahead = 1 + self.args.dataloader_num_workers * (self.args.dataloader_prefetch_factor or 2)
        last = step + 1 - (-ahead // self.args.gradient_accumulation_steps)
        return list(zip(self._drawn(step), self._drawn(last), strict=True))

    def _drawn(self, step: int) -> list[int]:
        """Windows of each source in the first `step` steps."""
        if isinstance(self.sampler, MixtureSampler):
            return self.sampler.drawn[min(step, self.batches.num_steps)].tolist()
        return [self.batches.windows_before(step)]

    def _shards_came(self) -> bool:
        """Whether to go on; all ranks call it before the same step, for their groups of shards are the same."""
        problem = None
        try:
            self.read_ahead.wait(is_asked_to_stop)
        except UserError as error:
            problem = str(error)
        self.lost_shard = self._first_problem(problem)
        return self.lost_shard is None and not self.stop_on_request.agreed(self.args)


def _sources(windows: TokenWindows | MixedWindows) -> list[TokenWindows]:
    return list(windows.sources.values()) if isinstance(windows, MixedWindows) else [windows]
