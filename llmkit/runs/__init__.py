"""The record of a run, written while it goes on and read back afterwards; no training happens here."""
