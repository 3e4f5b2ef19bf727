"""Reads JSON arrays of token ids without making a Python integer of each. Pure."""

from __future__ import annotations

import itertools

import msgspec
import numpy as np

from driftgate.trace import I32

__all__ = ["ids_of", "read_all_ids", "read_ids"]

MAX_TOKEN_ID = 2**31 - 1

_PLACES = 8
"""Digits that one 64-bit word holds: vocabularies have six."""

_PAIRS = np.uint64(0x00FF00FF00FF00FF)
_FOURS = np.uint64(0x0000FFFF0000FFFF)
_DIGITS = np.uint64(0x0F0F0F0F0F0F0F0F)


def read_ids(array: bytes) -> I32 | None:
    """The ids of a JSON array; None where it has anything but digits and commas, or a number of
    more than eight digits."""
    read = read_all_ids(array)
    return None if read is None else read[0]


def read_all_ids(*arrays: bytes) -> list[I32] | None:
    """The ids of several JSON arrays, in the time of one; None where one of them cannot be read.

    The eight bytes from each number's start are one word, shifted so that what follows the number
    falls out. Three steps then join neighbouring digits, pairs and fours, in all words at once.
    """
    if not all(array.startswith(b"[") for array in arrays):
        return None  # a number or a text, which would lose its first and last character
    starts = list(itertools.accumulate([len(array) - 1 for array in arrays], initial=0))
    text = b",".join([b"", *[array[1:-1] for array in arrays], b"," * (_PLACES - 1)])
    view = np.frombuffer(text, np.uint8)
    gaps = (view - np.uint8(ord("0")) > 9).nonzero()[0]
    if np.count_nonzero(view == ord(",")) != len(gaps):
        return None
    gaps = gaps[: 1 - _PLACES]
    lengths = np.diff(gaps)
    if lengths.min() < 2 or lengths.max() > _PLACES + 1:
        return None
    words = np.ndarray(len(text) - _PLACES, f"V{_PLACES}", text, 1, (1,))
    value = words.take(gaps[:-1]).view("<u8")
    value <<= (8 * (_PLACES + 1 - lengths)).view(np.uint64)
    value &= _DIGITS
    for base, bits, mask in ((10, 8, _PAIRS), (100, 16, _FOURS), (10_000, 32, None)):
        value = value * np.uint64(base) + (value >> np.uint64(bits))
        if mask is not None:
            value &= mask
    # Where each array begins, one comma after another: whose numbers these are.
    return np.split(value.astype(np.int32), np.searchsorted(gaps, starts[1:-1]))


def ids_of(array: bytes) -> I32:
    """The ids of a JSON array in any spelling. ValueError, OverflowError or what a decoder raises
    where they are none."""
    read = read_ids(array)
    if read is not None:
        return read
    ids = np.array(msgspec.json.decode(array, type=list[int]), dtype=np.int64)
    if len(ids) and (ids.min() < 0 or ids.max() > MAX_TOKEN_ID):
        raise ValueError(f"{ids.min()} .. {ids.max()} are no token ids")
    return ids.astype(np.int32)
