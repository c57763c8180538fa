"""What one recipe needs of this machine, for `llmkit doctor --recipe`: the same lines as `doctor`'s own."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from llmkit.data.arguments import DataArguments
from llmkit.data.manifest import MANIFEST
from llmkit.errors import UserError
from llmkit.hub_access import is_cached
from llmkit.machine import why_not_compile
from llmkit.paths import local_path
from llmkit.planning.doctor import ERROR, OK, WARNING, Finding, four_bit_kernels, wandb_login
from llmkit.planning.hardware import Hardware
from llmkit.planning.plan import Assumptions, amount
from llmkit.planning.preflight import preflight
from llmkit.planning.recipe_plan import plan_recipe
from llmkit.recipe_kinds import PRETRAIN, RecipeKind


def examine_recipe(kind: RecipeKind, recipe: tuple) -> Iterator[Finding]:
    """All checks, in the order of the table, each made when it is asked for.

    Args:
        kind: of the recipe.
        recipe: its filled dataclasses, as `parse_recipe` gives them: data, model, training.
    """
    checks: list[Callable[[RecipeKind, tuple], Iterator[Finding]]] = [files, libraries, memory_and_disk, preflight]
    for check in checks:
        yield from check(kind, recipe)


def files(kind: RecipeKind, recipe: tuple) -> Iterator[Finding]:
    """Datasets, tokenizers, models and adapters: whether they are here, or can be read from the Hub."""
    for what, name, repo_type in _named(kind, recipe):
        try:
            place = local_path(name)
        except UserError as error:  # of an adapter; a recipe with another path that is not there is no recipe
            yield Finding(what, ERROR, str(error), "train it first, or give its path or its name on the Hub")
            continue
        if place is not None:
            yield Finding(what, OK, f"{name} is a folder of this machine")
        else:
            yield _on_hub(what, name, repo_type)


def _named(kind: RecipeKind, recipe: tuple) -> Iterator[tuple[str, str, str]]:
    """What a recipe names that is a folder here or a repository on the Hub: `(what, name, type of repository)`."""
    data, model, _ = recipe
    if kind is not PRETRAIN:
        named = (("dataset", data.dataset_name, "dataset"), ("model", model.model, "model"))
        named += (("adapter", getattr(model, "adapter", None), "model"),)  # preference tuning's
    else:
        sources = [source.args for source in data.sources()] or [data]
        named = tuple(("dataset", source.dataset_name, "dataset") for source in sources if not _is_prepared(source))
        tokenizer = None if data.tokenizer in ("bpe", "character") else data.tokenizer
        named += (("tokenizer", tokenizer, "model"), ("model", model.init_from, "model"))
    return ((what, name, repo_type) for what, name, repo_type in named if name is not None)


def _is_prepared(source: DataArguments) -> bool:
    return source.shards_url is not None or source.data_dir is not None and (Path(source.data_dir) / MANIFEST).exists()


def _on_hub(what: str, name: str, repo_type: str) -> Finding:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        found = HfApi().repo_info(name, repo_type=repo_type)
        return Finding(what, OK, f"{name} is on the Hub (commit {(found.sha or 'unknown')[:8]})")
    except GatedRepoError:
        fix = f"accept its conditions on the Hub's page of {name}, and log in: hf auth login"
        return Finding(what, ERROR, f"{name} is on the Hub, for those who accepted its conditions", fix)
    except RepositoryNotFoundError:
        fix = "look for a mistake in the name; if it is private, log in: hf auth login"
        return Finding(what, ERROR, f"{name} is not on the Hub, or it is private", fix)
    except Exception as error:  # no answer: of httpx or httpx2, by the version of huggingface_hub
        reason = " ".join(str(error).split())[:100]
    if is_cached(name, repo_type):
        fix = "if a file of it is missing, the run will say which: download it where there is a network"
        return Finding(what, WARNING, f"{name} was downloaded earlier, and the Hub cannot be reached now", fix)
    fix = "look at the network or HF_ENDPOINT, or download it elsewhere and give its folder"
    return Finding(what, ERROR, f"{name} is not on this machine, and the Hub cannot be reached ({reason})", fix)


def libraries(kind: RecipeKind, recipe: tuple) -> Iterator[Finding]:
    """What the recipe asks for by a key, and would end without: 4-bit layers, torch.compile, logins."""
    _, model, args = recipe
    if kind is not PRETRAIN and model.quantization == "nf4":
        for found in four_bit_kernels():
            yield Finding(found.name, OK if found.state == OK else ERROR, found.text, found.fix)
    if args.torch_compile and not args.compiles_by_default:
        backend = args.torch_compile_backend or "inductor"
        if reason := why_not_compile(args.device.type, backend, args.torch_compile_mode):
            text = f"torch_compile: true, and torch.compile does not work here ({reason})"
            yield Finding("torch.compile", ERROR, text, "install a C++ compiler, or set torch_compile: false")
    if "wandb" in args.report_to:
        yield from wandb_login()
    if args.push_to_hub:
        from huggingface_hub import get_token

        if get_token() is None:
            yield Finding("push_to_hub", ERROR, "nobody is logged in to the Hub", "hf auth login")


def memory_and_disk(kind: RecipeKind, recipe: tuple) -> Iterator[Finding]:
    """Whether a step fits into this machine's memory, and what the run writes onto its disks."""
    try:
        plan = plan_recipe(kind, recipe, Hardware.of(None, max(1, torch.cuda.device_count())), Assumptions())
    except UserError as error:
        yield Finding("memory", ERROR, f"not known, for a run would be refused: {error}")
        return
    text = f"a step takes {amount(plan.peak)} of {amount(plan.hardware.memory)} on each device"
    if plan.fits == "as it is":
        yield Finding("memory", OK, text)
    else:
        fix = f"it fits {plan.fits}" if plan.fits else "take a smaller model"
        fix += f", or with per_device_train_batch_size {plan.largest_micro_batch}" if plan.largest_micro_batch else ""
        yield Finding("memory", ERROR, text, fix)
    data, _, args = recipe
    # While one checkpoint is written, the ones that are kept are there, and at the end the model beside them.
    kept = args.save_total_limit or plan.checkpoints or 1
    needs = {args.output_dir: (kept + 2) * plan.checkpoint}
    if kind is PRETRAIN and plan.shards and not _is_prepared(data):
        needs[data.data_dir or "data"] = plan.shards
    for folder, size in needs.items():
        place = Path(folder).absolute()
        while not place.exists():
            place = place.parent
        free = shutil.disk_usage(place).free
        text = f"{folder} will hold up to {amount(size)}, {amount(free)} are free"
        fix = "" if size < free else "free some space, or give a folder on another disk"
        yield Finding("disk", OK if size < free else ERROR, text, fix)
