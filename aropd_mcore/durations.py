"""Durations as people and Slurm write them."""

import re

_UNITS = re.compile(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?")
_CLOCK = re.compile(r"(?:(\d+)-)?(\d+):(\d\d):(\d\d)|(\d+)-(\d+)(?::(\d\d))?")


def seconds_of(text: str) -> int:
    """Seconds of `3h55m`, `90m`, `1d`, `30s`, or Slurm's `3:55:00`, `1-02:30:00`, `1-02`.

    A bare number, and Slurm's `90:00`, are refused: minutes to one reader and hours to another.

    Raises:
        ValueError: anything else, and no time at all.
    """
    if (match := _UNITS.fullmatch(text)) and text:
        days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    elif match := _CLOCK.fullmatch(text):
        found = match.groups()
        parts = found[:4] if found[1] else (*found[4:], None)
        days, hours, minutes, seconds = (int(part or 0) for part in parts)
    else:
        raise ValueError(f"expected a time such as 3h55m, 90m or 1-02:30:00, found {text!r}")
    total = ((days * 24 + hours) * 60 + minutes) * 60 + seconds
    if not total:
        raise ValueError(f"expected a time above 0, such as 3h55m, found {text!r}")
    return total
