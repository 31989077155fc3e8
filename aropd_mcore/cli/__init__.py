"""The `aropd` command: one module per subcommand defines its arguments and calls the work."""

from aropd_mcore.cli.entry import main, run

__all__ = ["main", "run"]
