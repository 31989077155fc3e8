"""Script of `aropd convert export`: converts a Megatron or training checkpoint to an HF folder."""

import sys

from aropd_mcore.cli import main

if __name__ == "__main__":
    sys.exit(main(["convert", "export", *sys.argv[1:]]))
