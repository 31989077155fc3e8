"""Greedy accuracy on held-out problems, with the privileged views' opinion of the responses."""

import argparse
import json
from pathlib import Path

from aropd_mcore.config_file import load_config
from aropd_mcore.data.dataset import RowDataset
from aropd_mcore.mcore import runtime
from aropd_mcore.mcore.runtime import Runtime
from aropd_mcore.numerics.position_metrics import token_metrics
from aropd_mcore.trainer.batch import form_batch
from aropd_mcore.trainer.build import build_run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", type=Path, help="aropd.yaml: its views and objective")
    parser.add_argument("rows", type=Path, help="held-out rows")
    parser.add_argument("models", type=Path, nargs="+", help="HF folders")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    args = parser.parse_args()
    here = runtime.start()
    results = {str(model): evaluate(args.config, args.rows, model, here) for model in args.models}
    runtime.stop(leave_job=True)
    args.out.write_text(json.dumps(results, indent=2) + "\n")


def evaluate(config_path: Path, rows: Path, model: Path, here: Runtime) -> dict[str, float]:
    """Respond greedily to every row once, and score the responses under the model's own views."""
    num_rows = len(RowDataset.load([rows]))
    config = load_config(
        config_path,
        [
            f"model.path={model}",
            f"data.train=[{rows}]",
            "data.shuffle=false",
            "parallel.tensor=1",
            "rollout.temperature=0",
            "teacher.kind=live",
            f"training.global_batch_size={num_rows}",
            f"training.micro_batch_size={num_rows}",
        ],
    )
    run = build_run(config, here)
    taken = run.source.take(0)
    views, rollouts = taken.views, taken.rollouts
    microbatches = form_batch(config, here, views, rollouts, run.pad_token_id).microbatches
    assert run.teacher is not None
    sums = run.student.forward_backward(microbatches, run.teacher.score(microbatches))
    decode = run.view_builder.tokenizer.decode
    responses = [str(decode(list(r.response_ids[:-1]))) for r in rollouts]
    num_right = sum(
        response.rpartition(";")[2] == view.row.answer
        for response, view in zip(responses, views, strict=True)
    )
    return {
        "accuracy": num_right / num_rows,
        "response_length": sum(len(r.response_ids) for r in rollouts) / num_rows,
        "hindsight_token_rate": token_metrics(sums)["hindsight_token_rate"],
    }


if __name__ == "__main__":
    main()
