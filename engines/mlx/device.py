"""Which device MLX computes on, and how much memory is there. The only file that knows of Metal and CUDA."""

from __future__ import annotations

from importlib import metadata
from typing import Any

import mlx.core as mx
import psutil

from engines.base import DeviceInfo
from engines.memory import process_peak, reset_process_peak, trim_process
from engines.peak import COPIED, Peak, peak, side_of

CACHE_LIMIT = 2 << 30
"""MLX keeps freed blocks for reuse, by default up to all memory; with varying shapes they would pile up."""


def choose_device() -> mx.Device:
    """The GPU (Metal or CUDA) where there is one, else the CPU; nothing is wired, which has crashed Macs."""
    device = mx.Device(mx.gpu) if mx.is_available(mx.Device(mx.gpu)) else mx.Device(mx.cpu)
    mx.set_default_device(device)
    mx.set_cache_limit(CACHE_LIMIT)
    return device


def number(scalar: mx.array) -> float:
    """A real scalar, evaluated."""
    value: Any = scalar.item()
    return float(value)


def random_state() -> mx.array:
    """The key of the random numbers, uint32 ``[2]``: the halves of a seed that gives the same numbers from here on."""
    state: Any = mx.random.state
    return state[0]


def describe(device: mx.Device) -> DeviceInfo:
    """Device, dtypes and memory. Gemma-3 overflows float16, so it is never offered."""
    if device.type == mx.cpu:
        return DeviceInfo("mlx", "cpu", metadata.version("mlx"), ("float32", "bfloat16"), psutil.virtual_memory().total)
    facts = mx.device_info()
    total = facts.get("max_recommended_working_set_size") or facts.get("memory_size") or psutil.virtual_memory().total
    kind = "metal" if mx.metal.is_available() else "cuda"
    return DeviceInfo("mlx", kind, metadata.version("mlx"), ("bfloat16", "float32"), int(total))


def used(device: mx.Device) -> int:
    """Bytes in use by the device's allocator; on a CPU, by the process."""
    if device.type == mx.cpu:
        return int(psutil.Process().memory_info().rss)
    return mx.get_active_memory()


def peak_memory(device: mx.Device) -> int:
    """The most bytes that were in use at once."""
    return process_peak() if device.type == mx.cpu else mx.get_peak_memory()


def reset_peak_memory(device: mx.Device) -> None:
    """Count from now on."""
    if device.type == mx.cpu:
        reset_process_peak()
    else:
        mx.reset_peak_memory()


def free(device: mx.Device) -> int:
    """Bytes that are still to be had."""
    if device.type == mx.cpu:
        return int(psutil.virtual_memory().available)
    return describe(device).memory_total - mx.get_active_memory()


def measure(device: mx.Device, dtype: mx.Dtype) -> Peak:
    """See ``engines.base.Engine.peak``."""
    side = side_of("cpu" if device.type == mx.cpu else "gpu")
    a, source = mx.ones((side, side), dtype), mx.ones(COPIED // dtype.size, dtype)
    mx.eval(a, source)
    # What is added has to be of the same dtype, or the sum is another's.
    one = mx.array(1, dtype)
    return peak(side, lambda: mx.eval(a @ a), lambda: mx.eval(source + one))


def release() -> None:
    """Give cached blocks back."""
    mx.clear_cache()
    trim_process()
