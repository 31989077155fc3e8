"""The only package that imports megatron.

Importing any module of it imports `runtime` first, which installs the CPU mode where there is no
GPU before megatron.core is imported.
"""

from aropd_mcore.mcore import runtime as runtime
