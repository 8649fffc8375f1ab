"""What command line options take: functions from a text to its value, for argparse's `type`."""

from __future__ import annotations

import argparse
import re

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_UNITS |= {f"{prefix}I": 1 << shift for prefix, shift in (("K", 10), ("M", 20), ("G", 30), ("T", 40))}


def size(text: str) -> int:
    """Bytes from `1048576`, `512MiB`, `4GiB`, `2GB`, `1.5G`."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([KMGT]?I?)B?", text.strip().upper())
    if match is None or match[2] == "I":
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; write bytes or for example 512MiB or 4GiB")
    return int(float(match[1]) * _UNITS[match[2]])


def positive(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isascii() or not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def natural(text: str) -> int:
    """A whole number, 0 included."""
    if not text.isascii() or not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")
    return int(text)


def days(text: str) -> float:
    """More than none, at most ten thousand."""
    value = _number(text)
    if not 0 < value <= 10_000:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of days above 0, at most 10000")
    return value


def port(text: str) -> int:
    """A TCP port; 0 lets the system choose a free one."""
    if not text.isascii() or not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port from 0 to 65535")
    return int(text)


def seconds(text: str) -> float:
    """A finite time in seconds, 0 or more."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds, 0 or more")
    return value


def share(text: str) -> float:
    """A part, above 0 to 1."""
    value = _number(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0, at most 1")
    return value


def factor(text: str) -> float:
    """A number of at least 1."""
    value = _number(text)
    if not 1 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 1")
    return value


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return float("nan")


def rate(text: str) -> float:
    """A finite number above 0."""
    if (value := seconds(text)) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not above 0")
    return value


def lora_module(text: str) -> tuple[str, str]:
    """`name=path` as vLLM's --lora-modules takes it."""
    name, separator, path = text.partition("=")
    if not (name and separator and path):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=PATH")
    return name, path
