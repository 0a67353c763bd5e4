"""The weights a model began with, for both engines: read or made again, so that no second copy is kept."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path

import numpy as np

from engines.adapters import Factors
from engines.base import ModelInfo
from engines.blending import merged
from engines.checkpoints import as_bfloat16, as_float32
from engines.initialisation import gemma3_weights
from engines.quantization import iterate_dense
from engines.training import LoRASettings


def first_weights(
    info: ModelInfo, seed: int, adapter: tuple[Factors, LoRASettings] | None, modules: Collection[str]
) -> Iterator[tuple[str, np.ndarray]]:
    """Names and float32 weights ``[out, in]`` of linears, rounded as the model holds them.

    Args:
        seed: of a model that was made, not loaded.
        adapter: what was loaded onto the model, and counts as part of it.
    """
    wanted = set(modules)
    shapes = {n: s for n, s in info.config.parameter_shapes().items() if n.removesuffix(".weight") in wanted}
    stored = iterate_dense(Path(info.folder), info.config, shapes) if info.folder else gemma3_weights(info.config, seed)
    for name, array in stored:
        module = name.removesuffix(".weight")
        if module not in wanted:
            continue
        value = as_float32(array)
        # What packed numbers mean is never rounded: MLX multiplies by it group by group.
        if info.dtype == "bfloat16" and info.config.quantization is None:
            value = as_float32(as_bfloat16(value))
        if adapter is not None and module in adapter[0]:
            value = merged(value, adapter[0][module], adapter[1])
        yield module, value
