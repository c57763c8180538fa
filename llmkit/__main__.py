"""`python -m llmkit` is the `llmkit` command; `accelerate launch -m llmkit` runs it on several ranks."""

from llmkit.cli import main

main()
