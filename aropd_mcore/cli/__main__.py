import sys

from aropd_mcore.cli.entry import main

if __name__ == "__main__":
    sys.exit(main())
