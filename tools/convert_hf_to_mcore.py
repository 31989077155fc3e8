"""Script of `aropd convert import`: converts an HF folder to a Megatron torch_dist checkpoint."""

import sys

from aropd_mcore.cli import main

if __name__ == "__main__":
    sys.exit(main(["convert", "import", *sys.argv[1:]]))
