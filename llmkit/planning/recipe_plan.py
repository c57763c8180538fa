"""The plan of any recipe that can be planned."""

from llmkit.errors import UserError
from llmkit.planning.finetuning import plan_finetuning
from llmkit.planning.hardware import Hardware
from llmkit.planning.plan import Assumptions, Plan
from llmkit.planning.pretraining import plan_pretraining
from llmkit.recipe_kinds import DPO, PRETRAIN, RecipeKind


def plan_recipe(kind: RecipeKind, recipe: tuple, hardware: Hardware, assumptions: Assumptions) -> Plan:
    """What the recipe's run will take.

    Args:
        recipe: its filled dataclasses, as `parse_recipe` gives them.

    Raises:
        UserError: preference tuning, or what a run would refuse, too.
    """
    if kind is DPO:
        raise UserError(
            "preference tuning has no plan, because its step goes through TRL's own head: plan the SFT recipe of the "
            "adapter, with twice the rows (--per_device_train_batch_size), which a pair has"
        )
    data_args, model_args, args = recipe
    if kind is PRETRAIN:
        return plan_pretraining(data_args, model_args, args, hardware, assumptions)
    return plan_finetuning(model_args, args, hardware, assumptions)
