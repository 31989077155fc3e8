"""The only package that imports megatron.

Importing any of its modules first imports `runtime`. On a machine without a GPU, `runtime` installs
the CPU mode before megatron.core is imported.
"""

from aropd_mcore.mcore import runtime as runtime
