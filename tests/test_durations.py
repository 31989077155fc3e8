"""Durations in the notations of users and of Slurm."""

import pytest

from aropd_mcore.durations import parse_seconds


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("3h55m", 14100),
        ("90m", 5400),
        ("30s", 30),
        ("1d2h3m4s", 93784),
        ("3:55:00", 14100),
        ("1-02:30:00", 95400),
        ("1-02:30", 95400),
        ("2-00", 172800),
        ("100:00:01", 360001),
    ],
)
def test_parse_seconds_of_known_notation_returns_seconds(text, seconds):
    assert parse_seconds(text) == seconds


@pytest.mark.parametrize(
    "text", ["", "90", "90:00", "5m3h", "3h55", "-1h", "1.5h", "3h 5m", "0s", "0-00", "soon"]
)
def test_parse_seconds_of_unknown_notation_is_refused(text):
    with pytest.raises(ValueError, match="expected a time") as error:
        parse_seconds(text)
    assert repr(text) in str(error.value)
