"""Pages of keys and values in numpy: the second definition of the layout in csrc/cuda/cache.h, by reshaping."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

PAGE = 64


@dataclass(frozen=True)
class Cache:
    q8: bool
    n_kv_heads: int
    head_dim: int
    n_layers: int = 1

    @property
    def shape(self) -> np.ndarray:
        return np.array([self.q8, self.n_layers, self.n_kv_heads, self.head_dim], np.int32)

    @property
    def wide(self) -> int:
        return (self.head_dim + 31) // 32 * 32

    def block(self, k: np.ndarray, v: np.ndarray) -> bytes:
        """One head's 64 keys and values, [64, head_dim]: float16, or (codes int8, scales float16 [64, wide/32])."""
        blocks = self.wide // 32
        if not self.q8:
            keys = self._padded(k).reshape(8, 8, blocks, 32).transpose(0, 2, 1, 3)
            values = self._padded(v).reshape(32, 2, self.wide).transpose(0, 2, 1)
            return keys.tobytes() + values.tobytes()
        (k_codes, k_scales), (v_codes, v_scales) = k, v
        keys = self._bytes(k_codes).reshape(4, 2, 8, blocks, 4, 8).transpose(0, 3, 2, 4, 1, 5)
        values = self._bytes(v_codes).reshape(4, 2, 4, 2, self.wide).transpose(0, 2, 4, 1, 3)
        scales = [s.reshape(8, 4, 2, blocks).transpose(3, 1, 0, 2) for s in (k_scales, v_scales)]
        return keys.tobytes() + values.tobytes() + scales[0].tobytes() + scales[1].tobytes()

    def unpacked(self, block: bytes) -> tuple[np.ndarray, np.ndarray]:
        """`block` the other way: what each key and value stands for, float64 [64, wide]."""
        blocks = self.wide // 32
        if not self.q8:
            both = np.frombuffer(block, np.float16).reshape(2, -1)
            keys = both[0].reshape(8, blocks, 8, 32).transpose(0, 2, 1, 3).reshape(PAGE, self.wide)
            values = both[1].reshape(32, self.wide, 2).transpose(0, 2, 1).reshape(PAGE, self.wide)
            return keys.astype(np.float64), values.astype(np.float64)
        codes = np.frombuffer(block, np.uint8, 2 * PAGE * self.wide).reshape(2, -1).astype(np.float64) - 128
        scales = np.frombuffer(block, np.float16, offset=2 * PAGE * self.wide).reshape(2, blocks, 4, 8, 2)
        keys = codes[0].reshape(4, blocks, 8, 4, 2, 8).transpose(0, 4, 2, 1, 3, 5).reshape(PAGE, blocks, 32)
        values = codes[1].reshape(4, 4, self.wide, 2, 2).transpose(0, 3, 1, 4, 2).reshape(PAGE, blocks, 32)
        each = scales.astype(np.float64).transpose(0, 3, 2, 4, 1).reshape(2, PAGE, blocks, 1)
        return (keys * each[0]).reshape(PAGE, self.wide), (values * each[1]).reshape(PAGE, self.wide)

    def _padded(self, x: np.ndarray) -> np.ndarray:
        return np.pad(x, [(0, 0), (0, self.wide - self.head_dim)])

    def _bytes(self, codes: np.ndarray) -> np.ndarray:
        return (self._padded(codes).astype(np.int16) + 128).astype(np.uint8)
