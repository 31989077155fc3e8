"""Measure greedy accuracy on held-out problems, response length and hindsight token rate."""

import argparse
import json
from pathlib import Path

import aropd_mcore as aropd


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", type=Path, help="aropd.yaml, for its views and objective")
    parser.add_argument("rows", type=Path, help="held-out rows")
    parser.add_argument("models", type=Path, nargs="+", help="HF folders")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    args = parser.parse_args()
    results = {str(model): evaluate(args.config, args.rows, model) for model in args.models}
    args.out.write_text(json.dumps(results, indent=2) + "\n")


def evaluate(config_path: Path, rows: Path, model: Path) -> dict[str, float]:
    """Sample one greedy response per row, and score the responses with the model as teacher."""
    sampling = {
        "config": config_path,
        "temperature": 0.0,
        "max_response_tokens": aropd.load_config(config_path).rollout.max_response_tokens,
        "num_processes": 1,
    }
    responses = aropd.generate(model, rows, **sampling)
    diagnosis = aropd.diagnose(model, rows, rows=len(responses), read=0, **sampling)
    num_right = sum(
        response.finish_reason == "stop"
        and response.text.rpartition("\n")[2] == response.fields["answer"]
        for response in responses
    )
    return {
        "accuracy": num_right / len(responses),
        "response_length": diagnosis["metrics"]["response_length_mean"],
        "hindsight_token_rate": diagnosis["metrics"]["hindsight_token_rate"],
    }


if __name__ == "__main__":
    main()
