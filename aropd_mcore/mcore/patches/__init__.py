"""Replacements of parts of Megatron-Core and torch, each with the reason beside it."""
