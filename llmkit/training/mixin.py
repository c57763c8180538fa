"""The base of dataclasses that stand before TrainingArguments, or a subclass of it, in a list of bases."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import TrainingArguments as ArgumentsMixin
else:

    class ArgumentsMixin:
        """TrainingArguments to a type checker, and empty otherwise.

        As a real base, TrainingArguments would bring its defaults along, over those of a subclass such as SFTConfig.
        """
