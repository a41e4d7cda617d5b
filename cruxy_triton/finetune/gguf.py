"""Reads a GGUF file: its metadata, and its tensors as float32 (F32, F16, Q4_1, Q8_0).

The format is that of https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, the blocks those of ggml-quants.c
beside it: 32 values each, Q4_1 with scale and minimum in float16 (value = d*q + m), Q8_0 with a scale (value = d*q).
"""

import struct
from pathlib import Path
from typing import Any

import numpy as np

from cruxy_triton.errors import UserError

_SCALARS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_BLOCK = 32
# type number: (name, one block of it)
_KINDS = {
    0: ("F32", np.dtype("<f4")),
    1: ("F16", np.dtype("<f2")),
    3: ("Q4_1", np.dtype([("d", "<f2"), ("m", "<f2"), ("q", "u1", _BLOCK // 2)])),
    8: ("Q8_0", np.dtype([("d", "<f2"), ("q", "i1", _BLOCK)])),
}


class GGUF:
    """An open file: `fields` (its metadata), and its tensors by name; raises UserError for one it cannot read."""

    def __init__(self, path: Path) -> None:
        self._bytes: Any = np.memmap(path, mode="r")
        self._at = 0
        magic, version, tensors, fields = self._unpack("<4sIQQ")
        if magic != b"GGUF" or version not in (2, 3):
            raise UserError(f"{path} is no GGUF file of version 2 or 3")
        self.fields: dict[str, Any] = {self._string(): self._value(*self._unpack("<I")) for _ in range(fields)}
        self._places: dict[str, tuple[tuple[int, ...], int, int]] = {}
        for _ in range(tensors):
            name = self._string()
            shape = self._unpack(f"<{self._unpack('<I')[0]}Q")
            self._places[name] = (shape[::-1], *self._unpack("<IQ"))
        alignment = self.fields.get("general.alignment", 32)
        self._data = -(-self._at // alignment) * alignment

    def _unpack(self, layout: str) -> tuple[Any, ...]:
        found = struct.unpack_from(layout, self._bytes, self._at)
        self._at += struct.calcsize(layout)
        return found

    def _string(self) -> str:
        (length,) = self._unpack("<Q")
        return self._unpack(f"<{length}s")[0].decode("utf-8")

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            inner, count = self._unpack("<IQ")
            return [self._value(inner) for _ in range(count)]
        return self._unpack("<" + _SCALARS[kind])[0]

    def names(self) -> list[str]:
        return list(self._places)

    def tensor(self, name: str) -> np.ndarray:
        """The tensor as float32, row-major: its last dimension is the contiguous one."""
        shape, kind, offset = self._places[name]
        if kind not in _KINDS:
            known = ", ".join(known for known, _ in _KINDS.values())
            raise UserError(f"tensor {name} is of GGUF type {kind}; expected one of {known}")
        block = _KINDS[kind][1]
        count = int(np.prod(shape)) // (1 if block.names is None else _BLOCK)
        start = self._data + offset
        blocks = self._bytes[start : start + count * block.itemsize].view(block)
        if block.names is None:
            return blocks.astype(np.float32).reshape(shape)
        codes = blocks["q"]
        if "m" in block.names:  # the low halves of the bytes are the first 16 values
            codes = np.concatenate([codes & 15, codes >> 4], axis=1)
        values = blocks["d"].astype(np.float32)[:, None] * codes.astype(np.float32)
        if "m" in block.names:
            values += blocks["m"].astype(np.float32)[:, None]
        return values.reshape(shape)
