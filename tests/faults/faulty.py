"""`python -m tests.faults.faulty FAULTS train ...`: `aropd` with faults in a rank's data loader.

FAULTS is a JSON object:

    rank              the rank with the faults
    prompts_per_step  rows per step
    slow              seconds to wait before each row
    raise             step from which loading a row raises an error
    hang              step from which loading a row never returns

All keys but the first two are optional: {"rank": 1, "prompts_per_step": 8, "slow": 0.5, "hang": 2}.
"""

import json
import os
import sys
import time
from typing import Any

from aropd_mcore import cli, lifetime
from aropd_mcore.data.dataset import RowDataset
from aropd_mcore.types import Row


def install(faults: dict[str, Any]) -> None:
    if int(os.environ["RANK"]) != faults["rank"]:
        return
    row_at = RowDataset.row_at

    def faulty_row_at(self: RowDataset, position: int, **options: Any) -> Row:
        step = position // faults["prompts_per_step"]
        if step >= faults.get("raise", step + 1):
            raise RuntimeError(f"an injected error at row {position}")
        if step >= faults.get("hang", step + 1):
            time.sleep(10_000)
        if "slow" in faults:
            time.sleep(faults["slow"])
        return row_at(self, position, **options)

    RowDataset.row_at = faulty_row_at  # type: ignore[method-assign]


if __name__ == "__main__":
    lifetime.end_with_launcher()
    install(json.loads(sys.argv[1]))
    sys.exit(cli.main(sys.argv[2:]))
