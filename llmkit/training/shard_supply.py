"""What a run does about its shards: they are checked before its first step, and waited for where they are not here."""

import itertools
from concurrent.futures import ThreadPoolExecutor

from llmkit.console import say
from llmkit.data.ahead import AheadWindows, TokenizedAhead
from llmkit.data.mixture import MixedWindows, MixtureSampler
from llmkit.data.order import WindowBatchSampler
from llmkit.data.read_ahead import ReadAhead
from llmkit.data.windows import TokenWindows
from llmkit.errors import UserError
from llmkit.training.base_trainer import ExactTrainer
from llmkit.training.batch_ramp import Batches
from llmkit.training.checkpoints import step_of


class ShardSupply(ExactTrainer):
    """Trainer on token shards: all ranks wait for those that are still to be tokenized or fetched, or all stop."""

    train_dataset: TokenWindows | MixedWindows
    eval_dataset: TokenWindows | MixedWindows
    sampler: WindowBatchSampler | MixtureSampler
    batches: Batches
    supply: ReadAhead | TokenizedAhead

    def train(self, resume_from_checkpoint=None, *args, **kwargs):
        """As `ExactTrainer`'s.

        Raises:
            UserError: also where a shard cannot be had any more; what was trained is saved before.
        """
        drawn = self._drawn(self.batches.num_steps)
        if isinstance(self.train_dataset, AheadWindows):
            self.supply = TokenizedAhead(self.train_dataset, *drawn)
        else:
            sources = list(zip(_sources(self.train_dataset), self.sampler.orders, drawn, strict=True))
            self.supply = ReadAhead(sources, _sources(self.eval_dataset))
            places = self._places(step_of(resume_from_checkpoint) if resume_from_checkpoint else 0)
            if problem := self._first_problem(self.supply.lack_of_room(max(stop - start for start, stop in places))):
                raise UserError(problem)
        self.stop_on_request.problem = self.supply.problem
        try:
            output = super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            self.supply.close()
        if self.stop_on_request.has_failed:
            raise UserError(str(self.stopped))
        return output

    def take_folder(self, resume_from: str | None, fingerprint: str) -> None:
        """Also waits for the first shards, and has the first rank of each node compare the checksums of local ones."""
        problem, step = None, step_of(resume_from) if resume_from else 0
        if not self._shards_came(step):
            raise UserError(str(self.stop_on_request.stopped))
        self.sampler.skipped = step * self.batches.micro_batches
        place = min(self.batches.windows_before(step), int(self.batches.ends[-1]) - 1)
        with ThreadPoolExecutor(max_workers=1) as pool:
            pool.submit(self.sampler.windows, place, place + 1)  # meanwhile: it shuffles the group that comes first
            try:
                if self.is_local_process_zero():
                    self.train_dataset.verify()
            except UserError as error:
                problem = str(error)
        if problem := self._first_problem(problem):
            raise UserError(problem)
        super().take_folder(resume_from, fingerprint)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """Trainer's, once the shards of the step are here; without them the run saves, and stops before the step."""
        if not self._shards_came(self.state.global_step):
            self.control.should_training_stop = True
            self.control.should_save = self.saved_step != self.state.global_step
            return [], None
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def _shards_came(self, step: int) -> bool:
        """Wait for what is read by the step after `step` steps and ahead of it; False if the run is to stop instead.

        All ranks call it before the same step. They agree where there is something to wait for, and there alone.
        """
        if not self.supply.want(self._places(step)):
            return True
        for looks in itertools.count():
            if self.stop_on_request.agreed(self.args):
                break
            if looks == 1 and self.is_world_process_zero():
                say(f"step {step + 1:,} waits for its shards: {self.supply.why}")
            if self.stop_on_request.on_all_ranks(self.args, self.supply.wait()):
                return True
        return False

    def _places(self, step: int) -> list[tuple[int, int]]:
        """Of each source, what the step after `step` steps reads, and accelerate and the workers ahead of it."""
        in_workers = self.args.dataloader_num_workers * (self.args.dataloader_prefetch_factor or 2)  # 2 is torch's
        ahead = -(-(1 + in_workers) // self.args.gradient_accumulation_steps)  # steps
        return list(zip(self._drawn(step), self._drawn(step + 1 + ahead), strict=True))

    def _drawn(self, step: int) -> list[int]:
        """Windows of each source in the first `step` steps."""
        if isinstance(self.sampler, MixtureSampler):
            return self.sampler.drawn[min(step, self.batches.num_steps)].tolist()
        return [self.batches.windows_before(step)]


def _sources(windows: TokenWindows | MixedWindows) -> list[TokenWindows]:
    return list(windows.sources.values()) if isinstance(windows, MixedWindows) else [windows]
