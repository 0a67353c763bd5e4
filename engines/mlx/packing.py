"""Quantised matrices in MLX: making them, and computing with them. torch has no kernels for this layout."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from engines.base import Progress
from engines.checkpoints import iterate_model, write_json, write_safetensors
from engines.gemma3 import Quantization, read_config
from engines.quantization import Packed, check_quantization, packed_shapes, quantized_names


class Packable(nn.Module):
    """A matrix ``[out, in]``, plain or packed.

    Attributes:
        weight: the matrix, or uint32 words of packed numbers; then ``scales`` and ``biases`` lie beside it.
        packing: how it is packed; None for a plain one.
    """

    def __init__(self, inner: int, out: int) -> None:
        super().__init__()
        self.weight = mx.zeros((out, inner))
        self.packing: Quantization | None = None

    def share(self, other: Packable) -> None:
        """Take the matrix of another module, which is not copied."""
        self.weight, self.packing = other.weight, other.packing
        if other.packing is not None:
            self.scales: mx.array = other.scales
            self.biases: mx.array = other.biases

    def pack(self, packed: Packed, dtype: mx.Dtype) -> None:
        """Take packed numbers, their scales and biases in ``dtype``."""
        self.packing = packed.quantization
        self.weight = mx.array(packed.weight)
        self.scales, self.biases = (array_of(part).astype(dtype) for part in (packed.scales, packed.biases))

    def times(self, x: mx.array) -> mx.array:
        """``x Wᵀ`` in the dtype of ``x``."""
        if (how := self.packing) is None:
            return x @ self.weight.astype(x.dtype).T
        scales, biases = self.scales.astype(x.dtype), self.biases.astype(x.dtype)
        return mx.quantized_matmul(
            x, self.weight, scales, biases, transpose=True, group_size=how.group_size, bits=how.bits
        )

    def rows(self, index: mx.array | slice) -> mx.array:
        """Some rows of the matrix, unpacked."""
        if (how := self.packing) is None:
            return self.weight[index]
        parts = self.weight[index], self.scales[index], self.biases[index]
        return mx.dequantize(*parts, group_size=how.group_size, bits=how.bits)

    def dense(self) -> mx.array:
        """The matrix in float32."""
        return self.rows(slice(None)).astype(mx.float32)


def quantise_folder(
    source: Path,
    target: Path,
    raw: Mapping[str, Any],
    quantization: Quantization,
    dtype: str,
    progress: Progress | None,
) -> None:
    """Write a plain model in mlx-lm's quantised layout, one matrix at a time.

    Args:
        target: a folder that exists.
        raw: the config that is written, quantisation aside.
        dtype: of scales, biases and norms, ``float32`` or ``bfloat16``.

    Raises:
        UnsupportedError: the model cannot be quantised so.
        CheckpointError: the files are broken, or the disk is full.
    """
    config = read_config(source)
    check_quantization(config, quantization)
    chosen, kind = set(quantized_names(config, quantization)), "BF16" if dtype == "bfloat16" else "F32"
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, shape in config.parameter_shapes().items():
        module = name.removesuffix(".weight")
        parts = packed_shapes(shape, quantization) if module in chosen else {"weight": shape}
        for part, size in parts.items():
            shapes[f"{module}.{part}"] = ("U32" if module in chosen and part == "weight" else kind, size)

    def arrays() -> Iterator[tuple[str, np.ndarray]]:
        done, total = 0, config.parameter_count()
        for name, stored in iterate_model(source, config.parameter_shapes()):
            module = name.removesuffix(".weight")
            value = array_of(stored).astype(mx.bfloat16 if dtype == "bfloat16" else mx.float32)
            if module in chosen:
                found: Any = mx.quantize(value, group_size=quantization.group_size, bits=quantization.bits)
                for part, array in zip(("weight", "scales", "biases"), found, strict=True):
                    yield f"{module}.{part}", _stored(array)
            else:
                yield name, _stored(value)
            done += stored.size
            if progress is not None:
                progress(done / total, f"packing {name}")

    write_safetensors(target / "model.safetensors", arrays(), shapes)
    write_json(target / "config.json", {**raw, "dtype": dtype, **quantization.block()})


def array_of(array: np.ndarray) -> mx.array:
    """A copy in MLX; uint16 is bfloat16."""
    if array.dtype == np.uint16:
        return mx.array(array).view(mx.bfloat16)
    return mx.array(array)


def _stored(array: mx.array) -> np.ndarray:
    """As it is written: bfloat16 as uint16."""
    return np.array(array.view(mx.uint16) if array.dtype == mx.bfloat16 else array)
