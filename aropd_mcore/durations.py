"""Durations in the notations of users and of Slurm."""

import re

_UNITS = re.compile(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?")
_CLOCK = re.compile(r"(?:(\d+)-)?(\d+):(\d\d):(\d\d)|(\d+)-(\d+)(?::(\d\d))?")


def parse_seconds(text: str) -> int:
    """Parse `3h55m`, `90m`, `1d`, `30s`, or Slurm's `3:55:00`, `1-02:30:00`, `1-02` to seconds.

    A bare number and Slurm's `90:00` are refused, since they are ambiguous.

    Raises:
        ValueError: the text has another form, or the duration is 0.
    """
    if (match := _UNITS.fullmatch(text)) and text:
        days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    elif match := _CLOCK.fullmatch(text):
        groups = match.groups()
        parts = groups[:4] if groups[1] else (*groups[4:], None)
        days, hours, minutes, seconds = (int(part or 0) for part in parts)
    else:
        raise ValueError(f"found {text!r}, expected a time such as 3h55m, 90m or 1-02:30:00")
    total = ((days * 24 + hours) * 60 + minutes) * 60 + seconds
    if not total:
        raise ValueError(f"found {text!r}, expected a time above 0, such as 3h55m")
    return total
