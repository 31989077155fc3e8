"""Tests of tables and of plots of metrics.jsonl."""

import json

import pytest
from matplotlib import image
from rich.console import Console

from aropd_mcore.evaluation.figures import plot_curves, read_metrics, results_table


def write_metrics(path, *, num_steps, **curves):
    lines = [
        {"step": step, **{name: curve(step) for name, curve in curves.items()}}
        for step in range(num_steps)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_plot_curves_of_two_runs_shows_both_and_skips_absent_metrics(tmp_path):
    runs = {
        "AR-OPD": write_metrics(
            tmp_path / "a.jsonl",
            num_steps=40,
            loss=lambda s: None if s == 7 else 1 / (s + 1),  # a skipped step
            kl=lambda s: -s,
        ),
        "SFT": write_metrics(tmp_path / "b.jsonl", num_steps=5, loss=lambda s: 2.0),
    }
    panels = {"loss": "loss", "kl": "KL", "absent": "in neither run"}
    plot_curves(runs, tmp_path / "both.png", panels=panels)
    plot_curves({"AR-OPD": runs["AR-OPD"]}, tmp_path / "one.png", panels=panels)
    both, one = (image.imread(tmp_path / name) for name in ("both.png", "one.png"))
    assert both.shape == one.shape and (both != one).any()


@pytest.mark.parametrize(
    ("text", "message"),
    [(None, "no such file"), ('{"step": 0}\n{"step"\n', r"metrics\.jsonl:2: not JSON")],
)
def test_read_metrics_of_an_unreadable_file_names_it(tmp_path, text, message):
    path = tmp_path / "metrics.jsonl"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_metrics(path)


def test_results_table_has_one_row_per_model(capsys):
    rows = {"base": {"accuracy": 0.365, "length": 31.5}, "after": {"accuracy": 0.93, "length": 30}}
    table = results_table(
        "results", rows, [("accuracy", "right", ".1%"), ("length", "tokens", ".1f")]
    )
    Console(width=80).print(table)
    printed = capsys.readouterr().out
    for text in ("right", "tokens", "base", "36.5%", "31.5", "after", "93.0%", "30.0"):
        assert text in printed
