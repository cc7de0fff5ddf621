"""Figures as people read them."""

from __future__ import annotations


def duration(seconds: float) -> str:
    """`8 s`, `3 min 20 s`, `25 min`, `2 h 5 min`, `30 h`: two figures are enough."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h" if hours >= 10 else f"{hours} h {minutes} min"
    if minutes:
        return f"{minutes} min" if minutes >= 10 else f"{minutes} min {rest} s"
    return f"{rest} s"
