"""The `aropd` command: one module per subcommand, with its arguments and its few lines of work."""

from aropd_mcore.cli.entry import main, run

__all__ = ["main", "run"]
