"""Replacements of parts of Megatron-Core and torch. Each states its reason."""
