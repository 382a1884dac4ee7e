"""A program in memory (lab/ops/program.py), and the calls that C++ executes it in (csrc/cpu/decode.cpp)."""

from __future__ import annotations

import ctypes
import struct
from typing import Any

import torch
from torch import Tensor

from lab.ops import native
from lab.ops.program import GROUP, INSTRUCTIONS, Program, Value

PACKED = range(1 << 20, 1 << 28)
"""Bytes of weights that are packed into three bytes each: fewer stay in the processor's own cache, more would take much memory twice."""
FLOATS: Any = {"dtype": torch.float32, "device": "cpu"}  # whatever torch's defaults are: the kernel gets addresses
INTEGERS: Any = {"dtype": torch.int64, "device": "cpu"}
WORTH = 64  # tokens after which packing, itself the work of a few tokens, has paid


class Loaded:
    """A program in memory, with the states as they stand after the tokens that were fed so far."""

    def __init__(self, program: Program) -> None:
        assert program.position is not None
        rows, logits = program.rows, program.logits
        self.program = program  # holds the weights
        self.arena = torch.zeros(sum(program.sizes.values()) + 2 * GROUP, **FLOATS)
        self.begins = {"states": 0, "scratch": program.sizes["states"]}
        for value, content in program.contents:
            self.view(value).copy_(content.flatten(1))
        matrices = [operands[2] for name, operands in program.lines if name == "linear"]
        self.packed: list[tuple[Tensor, Tensor]] = []
        packing = program.room >= WORTH and 4 * sum(matrix.numel() for matrix in matrices) in PACKED
        lines = [self.pack(*line) if packing and line[0] == "linear" else line for line in program.lines]
        self.code = torch.tensor([word for line in lines for word in self.words(*line)], **INTEGERS)
        self.clock = torch.cat([torch.zeros(1, **INTEGERS), program.position.long()])
        self.logits = self.view(logits)
        self.arguments = [ctypes.c_int64(n) for n in (logits.pitch, logits.width, rows)]
        self.left = program.room
        self.run = native.function("decode_float32")

    def pack(self, name: str, operands: tuple[Any, ...]) -> tuple[str, tuple[Any, ...]]:
        """A linear layer with its weights in 24 bits, relative to the largest of each row, or as it is where that would not be exact."""
        y, x, matrix, bias, N, K = operands
        size = ctypes.c_int64(N), ctypes.c_int64(K)
        packed = torch.empty(native.function("decode_packed_bytes")(*size), dtype=torch.uint8, device="cpu")
        scale = torch.empty(N, **FLOATS)
        pointers = [ctypes.c_void_p(t.data_ptr()) for t in (matrix, packed, scale)]
        if packed.numel() >= 4 * matrix.numel() or native.function("decode_pack_float32")(*pointers, *size):
            return name, operands
        self.packed.append((packed, scale))  # keeps them
        return "linear_packed", (y, x, packed, scale, bias, N, K)

    def view(self, value: Value) -> Tensor:
        assert isinstance(value.memory, str)
        return self.arena[self.begin(value) :].as_strided((self.program.rows, value.width), (value.pitch, 1))

    def begin(self, value: Value) -> int:
        """Its place in the arena, after a look at the bounds: the kernel has none."""
        assert isinstance(value.memory, str)
        end = value.offset + (self.program.rows - 1) * value.pitch + value.width
        if not 0 <= value.offset <= end <= self.program.sizes[value.memory]:
            raise ValueError(f"program: {value.name} ends at {end}, outside of its region of {self.program.sizes[value.memory]}")
        return self.begins[value.memory] + value.offset

    def words(self, name: str, operands: tuple[Any, ...]) -> list[int]:
        """An instruction as the kernel reads it."""
        words: list[int] = []
        for operand in operands:
            if isinstance(operand, Value):
                at = self.arena.data_ptr() + 4 * self.begin(operand) if isinstance(operand.memory, str) else address(operand)
                words += [at, operand.pitch]
            elif isinstance(operand, Tensor):
                words.append(operand.data_ptr())
            elif isinstance(operand, float):
                words += struct.unpack("q", struct.pack("d", operand))
            else:
                words.append(operand or 0)
        return [INSTRUCTIONS.index(name), len(words) + 2, *words]

    def step(self, token: Tensor) -> Tensor:
        """token (B,) -> logits (B, V), which the next step overwrites."""
        self._call(token, None, 1)
        return self.logits

    def greedy(self, token: Tensor, n: int) -> Tensor:
        """Feeds `token` (B,), then the most probable one each time: the n tokens after it, (n, B)."""
        chosen = torch.empty(n, len(token), **INTEGERS)
        self._call(token, chosen, n)
        return chosen

    def _call(self, token: Tensor, chosen: Tensor | None, n: int) -> None:
        token = token.long().contiguous()
        if token.shape != (self.program.rows,) or n > self.left:
            raise ValueError(f"program: {n} tokens {tuple(token.shape)} for {self.program.rows} rows with room for {self.left}")
        self.left -= n
        failed = self.run(
            ctypes.c_void_p(self.code.data_ptr()), ctypes.c_int64(len(self.code)), ctypes.c_void_p(self.clock.data_ptr()),
            ctypes.c_void_p(token.data_ptr()), None if chosen is None else ctypes.c_void_p(chosen.data_ptr()),
            ctypes.c_void_p(self.logits.data_ptr()), *self.arguments, ctypes.c_int64(n), ctypes.c_int64(native.allowed_threads()),
        )  # fmt: skip
        if failed:
            raise IndexError("program: a token or a position is not in its table")


def address(value: Value) -> int:
    assert isinstance(value.memory, Tensor)
    return value.memory.data_ptr() + 4 * value.offset if value.width else 0
