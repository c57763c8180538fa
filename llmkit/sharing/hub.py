"""Share a checkpoint on the Hub: what goes there, what is refused beforehand, what happens when the Hub is down.

huggingface_hub itself tries most requests again, for some 20 seconds; it does not for creating a repository, checking
a card and, without hf_xet, the commit, and it waits for ever for a server that says nothing. What is here sets a time
limit on each answer and makes a whole push again after some time: what is on the Hub by then is not sent again.
"""

import glob
import json
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, TypeVar

from huggingface_hub import HfApi, constants, get_session, get_token, set_client_factory
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError
from huggingface_hub.utils import disable_progress_bars, logging, validate_repo_id

from llmkit.console import say
from llmkit.errors import UserError
from llmkit.sharing.model_card import run_of, write_model_card
from llmkit.sharing.staging import CONFIGS, WEIGHTS, base_on_hub, check_checkpoint, stage

if TYPE_CHECKING:
    from transformers import TrainingArguments  # importing it takes seconds, for peft comes with it

TIMEOUT = 120.0  # seconds that a connection may be silent
WAITS = (5, 15, 60)  # seconds before a push is tried again as a whole
T = TypeVar("T")


class HubUnavailable(UserError):
    """The Hub does not answer, or with an error of its own: the same may work later."""


@dataclass(frozen=True)
class Repository:
    """Where on the Hub a checkpoint goes.

    Attributes:
        repo_id: `namespace/name`, or a name in the token's own namespace.
        private: whether a repository that is made is private; one that is there stays as it is.
        revision: the branch, made if it is not there.
        token: instead of the one that is logged in.
        license: for the model card, as the Hub names it (`apache-2.0`).
        base: the base model's name on the Hub, where the adapter names a local folder.
    """

    repo_id: str
    private: bool = True
    revision: str | None = None
    token: str | None = field(default=None, repr=False)
    license: str | None = None
    base: str | None = None

    def check(self) -> None:
        """Refuse what can be seen without the Hub.

        Raises:
            UserError: a bad name, no token, offline mode.
        """
        try:
            validate_repo_id(self.repo_id)
        except HFValidationError as error:
            raise UserError(f"{self.repo_id} cannot be a repository on the Hub: {error}") from error
        if constants.is_offline_mode():
            raise UserError(f"nothing can be pushed to {self.repo_id} with HF_HUB_OFFLINE set: unset it")
        if not (self.token or get_token()):
            raise UserError(
                f"no token to push to {self.repo_id} with: log in once with `hf auth login`, or set HF_TOKEN"
            )

    def open(self) -> "Repository":
        """Make the repository, and its branch, where they are not there yet, and check that they may be written to.

        Returns:
            This with its namespace, and whether it is private.

        Raises:
            UserError: it cannot be made or written to. HubUnavailable: the Hub does not answer.
        """
        self.check()
        api = self._api()
        with _explained(self):
            repo_id = api.create_repo(self.repo_id, private=self.private, exist_ok=True).repo_id
            api.auth_check(repo_id, write=True)
            if self.revision:
                api.create_branch(repo_id, branch=self.revision, exist_ok=True)
            private = bool(api.model_info(repo_id).private)
        return replace(self, repo_id=repo_id, private=private)

    def upload(self, folder: Path, message: str) -> str:
        """Commit all files of the folder; weights of an earlier push that this one does not replace are deleted.

        Returns:
            The repository's address, and whether it is private or public.
        """
        with _explained(self):
            api = self._api()
            # A pattern of the Hub's matches in folders as well, and what is there is somebody else's: names instead.
            names = [name for name in api.list_repo_files(self.repo_id, revision=self.revision) if "/" not in name]
            old = [name for name in names if any(fnmatchcase(name, pattern) for pattern in (*WEIGHTS, *CONFIGS))]
            commit = api.upload_folder(
                repo_id=self.repo_id,
                folder_path=folder,
                revision=self.revision,
                commit_message=message,
                delete_patterns=list(map(glob.escape, old)),
            )
        return f"{commit.repo_url} ({'private' if self.private else 'public'})"

    def has(self, repo_id: str, repo_type: str = "model") -> bool:
        """Whether the Hub has such a model, or dataset, for this token."""
        try:
            validate_repo_id(repo_id)
        except HFValidationError:
            return False
        with _explained(self):
            return self._api().repo_exists(repo_id, repo_type=repo_type)

    def _api(self) -> HfApi:
        _set_up_client()
        if not sys.stderr.isatty():
            disable_progress_bars()  # each time, for Trainer switches them on again
        return HfApi(endpoint=constants.ENDPOINT, token=self.token, library_name="llmkit")

    def command(self, checkpoint: str | Path) -> str:
        """The command line that pushes there; without the token, which is a secret."""
        given = {"revision": self.revision, "license": self.license, "base": self.base}
        flags = [] if self.private else ["--public"]
        flags += [part for name, value in given.items() if value for part in (f"--{name}", value)]
        return shlex.join(["llmkit", "push", str(checkpoint), self.repo_id, *flags])


@cache
def _set_up_client() -> None:
    default = get_session()

    def client():  # like huggingface_hub's own, which has no time limit
        return type(default)(event_hooks=default.event_hooks, follow_redirects=True, timeout=TIMEOUT)

    set_client_factory(client)
    if "HF_HUB_VERBOSITY" not in os.environ:
        logging.set_verbosity_error()  # it would tell of each request that is tried again


@contextmanager
def _explained(repository: Repository) -> Iterator[None]:
    """Tell in one line whatever the Hub's client, or hf_xet under it, raises."""
    try:
        yield
    except Exception as error:
        raise _explanation(error, repository) from error


def _explanation(error: Exception, repository: Repository) -> UserError:
    """Its line. An upload's error comes within another one, from the thread that it ran in."""
    name = repository.repo_id + (f" at {repository.revision}" if repository.revision else "")
    found: BaseException | None = error
    while found is not None and not isinstance(found, HTTPError):
        found = found.__cause__ or found.__context__
    if isinstance(found, HfHubHTTPError):
        status = found.response.status_code
        match status:
            case 401:
                return UserError(
                    f"the Hub does not accept the token (401): log in with `hf auth login` to push {name}"
                )
            case 403:
                return UserError(
                    f"the token may not write to {name} (403): take one with write access, or another name"
                )
            case 404:
                return UserError(f"the Hub has no {name}, or not for this token (404): check the name")
            case 409 | 412:
                return UserError(f"{name} was changed by somebody else at the same time ({status}): push again")
            case 408 | 429:
                return HubUnavailable(f"the Hub takes no more for now ({status})")
        if status >= 500:
            return HubUnavailable(f"the Hub has an error of its own ({status})")
        return UserError(f"the Hub refuses {name} ({status}): {found.server_message or found}")
    if isinstance(found, HTTPError):
        return HubUnavailable(f"the Hub does not answer ({type(found).__name__}: {found})")
    if isinstance(error, json.JSONDecodeError):  # the answer of some proxy
        return HubUnavailable("the Hub's answer makes no sense")
    return UserError(f"{name} was not pushed ({type(error).__name__}: {error})")


def patiently(work: Callable[[], T]) -> T:
    """The result of some work, tried again after a while where the Hub is not available."""
    for wait in WAITS:
        try:
            return work()
        except HubUnavailable as error:
            say(f"{error}: trying again in {wait} s")
            time.sleep(wait)
    return work()


def push(
    checkpoint: str | Path, repository: Repository, message: str, place: str | None = None, keep_card: bool = False
) -> str:
    """Push a checkpoint with its model card.

    Args:
        checkpoint: the folder of a run, of one of its checkpoints, or of any causal language model or LoRA adapter.
        place: where the links are made; the system's folder for temporary files if not given.
        keep_card: leave the card that is on the Hub as it is.

    Returns:
        The repository's address, and whether it is private or public.

    Raises:
        UserError: it cannot be pushed as it is, or not there. HubUnavailable: the Hub does not answer.
    """
    checkpoint = Path(checkpoint)
    check_checkpoint(checkpoint)
    with tempfile.TemporaryDirectory(prefix=".push-", dir=place) as name:
        folder = Path(name)
        stage(checkpoint, folder)
        run = run_of(checkpoint)
        repository.check()
        base = base_on_hub(folder, repository.base, run, repository.has)
        repository = repository.open()
        if not keep_card:
            source = run.record["source"] if run else {}
            dataset = _on_hub(repository, source.get("dataset_name"), "dataset")
            sft_adapter = _on_hub(repository, source.get("adapter"), "model")
            write_model_card(folder, repository.repo_id, run, repository.license, base, dataset, sft_adapter)
        return repository.upload(folder, message)


def _on_hub(repository: Repository, name: str | None, repo_type: str) -> str | None:
    """The name, if it is one on the Hub and of nothing that is here."""
    return name if name and not Path(name).exists() and repository.has(name, repo_type) else None


# ------------------------------------------------------------------ out of a training run


def check_push(args: "TrainingArguments", base: str | None = None) -> None:
    """Refuse, before anything is written, what could not be pushed when the run has ended.

    A Hub that is down is no reason to refuse: it is asked again at the end. Sets `hub_model_id` to the full name.

    Args:
        base: the model that an adapter is trained on.

    Raises:
        UserError: a bad name, no token or one without write access, a local base, what is not supported.
    """
    if not args.push_to_hub:
        return
    if args.hub_strategy not in ("end", "every_save") or args.hub_always_push:
        raise UserError(
            "hub_strategy checkpoint and all_checkpoints and hub_always_push are not supported, for the state of an "
            "optimizer is not shared: take hub_strategy end or every_save"
        )
    if base is not None and Path(base).is_dir():
        raise UserError(
            f"push_to_hub with model={base}: nobody else could load an adapter of a local folder; push the base "
            f"first, `llmkit push {base} me/base`, and give --model me/base"
        )
    repository = _repository(args)
    repository.check()
    if args.process_index == 0:
        try:
            args.hub_model_id = repository.open().repo_id
        except HubUnavailable as error:
            say(f"{error}: training goes on, and pushes to {repository.repo_id} later")


def _repository(args: "TrainingArguments") -> Repository:
    assert args.output_dir is not None, "TrainingArguments fills it in"
    name = args.hub_model_id or Path(args.output_dir).absolute().name  # as Trainer has it
    return Repository(name, args.hub_private_repo is not False, args.hub_revision, args.hub_token)


class RunPusher:
    """Pushes a run's checkpoints: those of its course in the background, the last one with patience.

    Args:
        args: of the run, checked by `check_push`.
    """

    def __init__(self, args: "TrainingArguments"):
        self.repository = _repository(args)
        assert args.output_dir is not None, "TrainingArguments fills it in"
        self.folder = args.output_dir
        self.under_way: Thread | None = None

    def push_soon(self, checkpoint: str, step: int) -> None:
        """Push in the background, if no push is under way; a failure is one line, and training goes on."""
        if self.under_way and self.under_way.is_alive():
            return

        def work():
            try:
                push(checkpoint, self.repository, f"Training in progress, step {step}", place=self.folder)
            except (UserError, OSError) as error:
                say(f"step {step} was not pushed, training goes on: {error}")

        # Not waited for if the run ends early: on SIGTERM there is no time.
        self.under_way = Thread(target=work, daemon=True)
        self.under_way.start()

    def push_last(self) -> str:
        """Push what the run has saved in its folder, and return the address.

        Raises:
            UserError: it did not work; the line says how to do it later.
        """
        if self.under_way:
            self.under_way.join()
        try:
            return patiently(lambda: push(self.folder, self.repository, "End of training"))
        except UserError as error:
            command = self.repository.command(self.folder)
            raise UserError(f"{self.folder} is saved, but not pushed: {error}. To push it later: {command}") from error
