"""The plan of any recipe."""

from llmkit.planning.finetuning import plan_finetuning
from llmkit.planning.hardware import Hardware
from llmkit.planning.plan import Assumptions, Plan
from llmkit.planning.pretraining import plan_pretraining
from llmkit.recipe_kinds import PRETRAIN, RecipeKind


def plan_recipe(kind: RecipeKind, recipe: tuple, hardware: Hardware, assumptions: Assumptions) -> Plan:
    """What the recipe's run will take.

    Args:
        recipe: its filled dataclasses, as `parse_recipe` gives them.

    Raises:
        UserError: what a run would refuse, too.
    """
    data_args, model_args, args = recipe
    if kind is PRETRAIN:
        return plan_pretraining(data_args, model_args, args, hardware, assumptions)
    return plan_finetuning(model_args, args, hardware, assumptions)
