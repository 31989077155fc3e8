"""Environment of this process that must be in force before CUDA starts and the job connects."""

import os
import resource
from contextlib import suppress

_MAX_CONNECTIONS = "CUDA_DEVICE_MAX_CONNECTIONS"
_ALLOCATOR = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
"""Names of the allocator's settings. PyTorch prefers the second one, which older versions lack."""

TRAINING_VARIABLES = (_MAX_CONNECTIONS, *_ALLOCATOR)
"""Variables of training on a GPU, which a vLLM server must not inherit. vLLM's all-reduce fails on
memory of expandable segments."""


def prepare_process() -> None:
    """Set the variables of training, and raise the limit of open files to its hard limit.

    Values that are set already remain. Child processes inherit both. CUDA reads the variables when
    it starts, so this precedes the first call of torch.cuda.
    """
    # Megatron launches communication and the overlapping matrix product in a fixed order. The order
    # holds only with one hardware queue.
    os.environ.setdefault(_MAX_CONNECTIONS, "1")
    # Lengths of responses differ from step to step. Blocks of fixed size would fragment memory;
    # expandable segments do not.
    if not any(name in os.environ for name in _ALLOCATOR):
        os.environ[_ALLOCATOR[0]] = "expandable_segments:True"
    # gloo connects each rank with every other rank. Many systems permit 1024 files by default.
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):  # some systems refuse an unlimited number
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
