"""Conversations, 4-bit bases and adapters: what TRL and PEFT leave to be done."""
