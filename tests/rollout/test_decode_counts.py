"""Decoding is bound neither by the host nor by new shapes: counts of tools/benchmarks."""

import sys
from unittest.mock import patch

from tests.conftest import REPO
from tests.support.ranks import run_ranks


def counts_of_two_batches() -> list[dict]:
    from aropd_mcore.mcore import runtime

    with patch.object(sys, "path", [str(REPO / "tools" / "benchmarks"), *sys.path]):
        import rollout
        import rollout_counts
    ranks = runtime.start()
    small = rollout.MODEL | {"hidden_size": 64, "intermediate_size": 64, "vocab_size": 256}
    batches = rollout_counts.count(rollout.random_model(small, ranks), ranks)
    assert "host reads per 200 tokens" in rollout_counts.report(batches)
    return [vars(counts) for counts in batches]


def test_decoding_200_tokens_meets_one_shape_and_reads_every_16_tokens():
    first, second = run_ranks(counts_of_two_batches, 1)[0]
    assert len(first["attention_shapes"] | second["attention_shapes"]) == 1
    for counts in (first, second):
        # 13 reads for 200 tokens, and two of all responses at the end.
        assert counts["host_reads"] == 15
        # 13 flags that ask for a stop; the places of prompts, their lengths, and finished rows.
        assert counts["tensors_from_host"] <= 13 + 6
    assert (first["cache_allocations"], second["cache_allocations"]) == (1, 0)
    # Four responses share each of the two prompts, whose last token belongs to the first step.
    assert (first["prompt_tokens"], second["prompt_tokens"]) == (2 * 39, 2 * 43)
