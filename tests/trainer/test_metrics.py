"""What a step reports of its rollouts; its token metrics are compared in test_step.py."""

from types import SimpleNamespace

import pytest
import torch

from aropd_mcore.config_file import load_config
from aropd_mcore.trainer.metrics import MetricsLog, rollout_metrics
from aropd_mcore.types import Rollout, Row, Views
from tests.support.ranks import run_ranks
from tests.support.tiny_runs import write_run

RESPONSES = [  # of two ranks: text, whether it ended by itself, the gold answer
    [("42 at once, then more words", True, "42"), ("a 421 is no 42", True, "42")],
    [("the answer comes last: 7", False, "7"), ("7.5 .................", True, "7.5")],
]


class Letters:
    """A tokenizer of characters."""

    def decode(self, ids: tuple[int, ...]) -> str:
        return "".join(map(chr, ids))


def test_lengths_truncation_and_early_answers_over_all_ranks():
    lengths = torch.tensor([len(text) for rank in RESPONSES for text, *_ in rank]).double()
    quantiles = torch.quantile(lengths, torch.tensor([0.1, 0.5, 0.9]).double()).tolist()
    for found in run_ranks(metrics_of_rank, 2):
        assert found == pytest.approx(
            {
                "response_length_mean": float(lengths.mean()),
                "response_length_p10": quantiles[0],
                "response_length_p50": quantiles[1],
                "response_length_p90": quantiles[2],
                "num_response_tokens": int(lengths.sum()),
                "num_cut_tokens": 4 * 3,
                "truncation_rate": 0.25,
                # 42 and 7.5 come early; 421 is another number, and 7 comes at the end.
                "premature_answer_rate": 0.5,
            }
        )


def metrics_of_rank() -> dict[str, float]:
    from aropd_mcore.mcore import runtime

    rt = runtime.start()
    responses = RESPONSES[rt.dp_rank]
    result = SimpleNamespace(
        views=[Views(Row("q", "r", answer), (1,), (1,), (1,), 3) for *_, answer in responses],
        rollouts=[
            Rollout(tuple(map(ord, text)), (), finished, 0) for text, finished, _ in responses
        ],
    )
    return rollout_metrics(result, Letters(), rt)  # type: ignore[arg-type]


def test_a_log_that_cannot_be_cut_back_is_left_alone_and_named(tmp_path):
    config = load_config(write_run(tmp_path))
    config.output_dir.mkdir()
    log = config.output_dir / "metrics.jsonl"
    log.write_text('{"step": 0}\n{"st\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2: expected a step's metrics"):
        MetricsLog(config, first_step=1)
    assert log.read_text().count("\n") == 3


@pytest.mark.slow
def test_a_wandb_run_has_an_id_of_its_own_and_keeps_it(tmp_path, monkeypatch):
    """Two fresh runs in one relative folder, as on two machines; then the second one again."""
    path = write_run(tmp_path)
    ids = []
    for folder in ("one", "two", "two"):
        (tmp_path / folder / "out").mkdir(parents=True, exist_ok=True)
        monkeypatch.chdir(tmp_path / folder)
        config = load_config(path, ["output_dir=out", "logging.wandb=offline"])
        log = MetricsLog(config, first_step=0)
        assert log._wandb.name == "out"
        ids.append(log._wandb.id)
        log.close()
    first, second, again = ids
    assert first != second == again
    assert (tmp_path / "two" / "out" / "wandb_id").read_text().strip() == second
