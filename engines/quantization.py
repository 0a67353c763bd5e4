"""MLX's affine quantisation on disk: which tensors a folder has in place of a weight, and what they mean.

A row of a weight is cut into groups; a number q of some bits in a group stands for ``scale * q + bias``. The q of a row
are one stream of bits, the lowest first, in 32-bit words. Source: ``mlx.core.quantize`` and mlx-lm's layout, where
``X.weight`` (U32), ``X.scales`` and ``X.biases`` stand for a matrix X.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from engines.checkpoints import (
    FLOATS,
    StoredTensor,
    as_float32,
    check_shapes,
    iterate_model,
    model_tensors,
    read_array,
    text_tensors,
)
from engines.errors import CheckpointError, UnsupportedError
from engines.gemma3 import Gemma3Config, Quantization
from engines.training import TrainingSettings

PARTS = ("weight", "scales", "biases")
PACKED = ("U32",)


def check_quantization(config: Gemma3Config, quantization: Quantization) -> None:
    """Whether a model can be quantised so.

    Raises:
        UnsupportedError: no matrix of it is cut evenly into groups, or it is quantised already.
    """
    if config.quantization is not None:
        raise UnsupportedError(f"the model has {config.quantization.bits} bits already: take the unquantised one")
    if not quantized_names(config, quantization):
        raise UnsupportedError(
            f"no matrix of the model is cut evenly into groups of {quantization.group_size}: take --group-size 32"
        )


def check_trainable(config: Gemma3Config, settings: TrainingSettings, adapted: bool) -> None:
    """Whether a model can be trained so.

    Args:
        adapted: whether it has adapters, which a new training would merge.

    Raises:
        UnsupportedError: packed weights would have to change.
    """
    if config.quantization is None:
        return
    if settings.lora is None or settings.rest or settings.merging:
        raise UnsupportedError(f"{_rounded(config)}: train plain adapters (--method lora), or the unquantised model")
    if adapted:
        raise UnsupportedError(
            f"{_rounded(config)}, so its adapters cannot be merged: load it anew and train from there"
        )


def check_adapted(config: Gemma3Config) -> None:
    """Refuse to merge into packed weights.

    Raises:
        UnsupportedError: they are packed.
    """
    if config.quantization is not None:
        raise UnsupportedError(
            f"{_rounded(config)}: keep the adapter beside it, or fuse it with `gemma-tui adapters fuse`"
        )


def _rounded(config: Gemma3Config) -> str:
    bits = config.quantization.bits if config.quantization else 0
    return f"weights of {bits} bits take no updates, whose size is below their rounding"


def quantized_names(config: Gemma3Config, quantization: Quantization) -> tuple[str, ...]:
    """The modules that mlx-lm quantises: matrices whose rows are cut evenly into groups."""
    return tuple(
        name.removesuffix(".weight") for name, shape in config.parameter_shapes().items()
        if len(shape) == 2 and shape[1] % quantization.group_size == 0
    )  # fmt: skip


def packed_shapes(shape: tuple[int, ...], quantization: Quantization) -> dict[str, tuple[int, int]]:
    """Shapes of the three tensors of a matrix ``[out, in]``."""
    out, inner = shape
    groups = inner // quantization.group_size
    return {"weight": (out, inner * quantization.bits // 32), "scales": (out, groups), "biases": (out, groups)}


@dataclass(frozen=True)
class Packed:
    """The numbers of a quantised matrix as they are stored.

    Attributes:
        weight: uint32 ``[out, in * bits / 32]``.
        scales, biases: ``[out, in / group_size]``, as ``engines.checkpoints.read_array`` gives them.
    """

    weight: np.ndarray
    scales: np.ndarray
    biases: np.ndarray
    quantization: Quantization

    def unpacked(self) -> np.ndarray:
        """The matrix, float32 ``[out, in]``."""
        bits, size = self.quantization.bits, self.quantization.group_size
        out = len(self.weight)
        stream = np.unpackbits(np.ascontiguousarray(self.weight).view(np.uint8), axis=1, bitorder="little")
        numbers = np.packbits(stream.reshape(-1, bits), axis=1, bitorder="little").astype(np.float32)
        scales, biases = (as_float32(part)[..., None] for part in (self.scales, self.biases))
        return (numbers.reshape(out, -1, size) * scales + biases).reshape(out, -1)


def iterate_quantized(
    folder: Path, config: Gemma3Config, shapes: Mapping[str, tuple[int, ...]] | None = None
) -> Iterator[tuple[str, np.ndarray | Packed]]:
    """Every parameter of a quantised text model by its Hugging Face name, one at a time; norms are plain arrays.

    Args:
        shapes: of the parameters that are wanted; None for all.

    Raises:
        CheckpointError: a tensor is missing, of another kind, or of another shape than the config says.
    """
    quantization = config.quantization
    if quantization is None:
        yield from iterate_model(folder, shapes or config.parameter_shapes())
        return
    stored = text_tensors(model_tensors(folder))
    plain = check_parameters(folder, stored, config)
    for name in [name for name in config.parameter_shapes() if shapes is None or name in shapes]:
        if name in plain:
            yield name, read_array(stored[name])
        else:
            module = name.removesuffix(".weight")
            weight, scales, biases = (read_array(stored[f"{module}.{part}"], _kinds(part)) for part in PARTS)
            yield name, Packed(weight, scales, biases, quantization)


def check_parameters(
    where: Path | str, stored: Mapping[str, StoredTensor], config: Gemma3Config
) -> dict[str, tuple[int, ...]]:
    """Whether the tensors of a text model are those that its config asks for; returns shapes of what is not packed.

    Raises:
        CheckpointError: one is missing, of another kind, or of another shape; the message begins with ``where``.
    """
    shapes, quantization = config.parameter_shapes(), config.quantization
    if quantization is None:
        check_shapes(where, stored, shapes)
        return shapes
    plain = {n: s for n, s in shapes.items() if f"{n.removesuffix('.weight')}.scales" not in stored}
    check_shapes(where, stored, plain)
    for name in shapes.keys() - plain.keys():
        _check_packed(where, name, stored, shapes[name], quantization)
    return plain


def iterate_dense(
    folder: Path, config: Gemma3Config, shapes: Mapping[str, tuple[int, ...]] | None = None
) -> Iterator[tuple[str, np.ndarray]]:
    """Names and raw arrays of a text model as ``iterate_model`` gives them, quantised ones as the float32 they mean.

    Args:
        shapes: of the parameters that are wanted; None for all.
    """
    yield from map(_dense, iterate_quantized(folder, config, shapes))  # which keeps nothing of what it gave


def _dense(parameter: tuple[str, np.ndarray | Packed]) -> tuple[str, np.ndarray]:
    name, value = parameter
    return name, value.unpacked() if isinstance(value, Packed) else value


def _kinds(part: str) -> tuple[str, ...]:
    return PACKED if part == "weight" else FLOATS


def _check_packed(
    where: Path | str, name: str, stored: Mapping[str, StoredTensor], shape: tuple[int, ...], quantization: Quantization
) -> None:
    module = name.removesuffix(".weight")
    if len(shape) != 2 or shape[1] % quantization.group_size:
        raise CheckpointError(f"{where}: {module} cannot be quantised in groups of {quantization.group_size}")
    for part, expected in packed_shapes(shape, quantization).items():
        tensor = stored.get(f"{module}.{part}")
        if tensor is None:
            raise CheckpointError(f"{where} lacks {module}.{part}: take a whole copy")
        kinds = _kinds(part)
        if tensor.shape != expected or tensor.dtype not in kinds:
            raise CheckpointError(
                f"{where}: {module}.{part} is {tensor.dtype} {list(tensor.shape)}, where {quantization.bits} bits in "
                f"groups of {quantization.group_size} need {kinds[0]} {list(expected)}: take another copy"
            )
