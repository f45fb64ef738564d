"""Sizes of memory in words and back: "4GiB" <-> bytes. No torch."""

import math
import re
from typing import Any

_UNITS = {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}


def parse_size(text: Any) -> int:
    """Bytes of a size such as 4GiB, 512MiB or 6GB.

    Raises:
        ValueError: if it is no number with a unit.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]i?b)\s*", str(text), re.IGNORECASE)
    if not match or not float(match[1]):
        raise ValueError(f"{text!r} is no size of memory; write for example 4GiB, 512MiB or auto")
    return round(float(match[1]) * _UNITS[match[2].lower()])


def as_size(num_bytes: float, up: bool = False) -> str:
    """A size for people, as `parse_size` reads it: 3.2GiB, 640MiB; `up` rounds up, so that it is no less."""
    unit, name = (2**30, "GiB") if num_bytes >= 2**30 else (2**20, "MiB")
    digits = 1 if name == "GiB" else 0
    value = num_bytes / unit
    if up:
        value = math.ceil(value * 10**digits) / 10**digits
    return f"{value:.{digits}f}{name}"
