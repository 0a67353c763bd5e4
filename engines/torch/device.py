"""Which device torch computes on, and how much memory is there. The only file that knows of MPS and CUDA."""

from __future__ import annotations

import psutil
import torch
import torch.nn.functional as F

from engines.base import DeviceInfo
from engines.memory import process_peak, reset_process_peak, trim_process
from engines.peak import COPIED, Peak, peak, side_of

FEW_ROWS = 16


def choose_device() -> torch.device:
    """CUDA where there is one, then MPS, then the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def describe(device: torch.device) -> DeviceInfo:
    """Device, dtypes and memory. Gemma-3 overflows float16, so it is never offered."""
    dtypes = ("float32", "bfloat16") if device.type == "cpu" else ("bfloat16", "float32")
    return DeviceInfo("torch", device.type, torch.__version__, dtypes, _total(device))


def used(device: torch.device) -> int:
    """Bytes in use by the device's allocator; on a CPU, by the process."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    if device.type == "mps":
        return torch.mps.current_allocated_memory()
    return int(psutil.Process().memory_info().rss)


def peak_memory(device: torch.device) -> int:
    """The most bytes that were in use at once; MPS tells what its allocator holds, which seldom shrinks."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    return process_peak()


def reset_peak_memory(device: torch.device) -> None:
    """Count from now on."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif device.type == "mps":
        torch.mps.empty_cache()
    else:
        reset_process_peak()


def free(device: torch.device) -> int:
    """Bytes that are still to be had."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory()
    return int(psutil.virtual_memory().available)


def release(device: torch.device) -> None:
    """Give cached blocks back."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    if device.type == "mps":
        torch.mps.empty_cache()
    if device.type == "cpu":
        trim_process()


def measure(device: torch.device, dtype: torch.dtype) -> Peak:
    """See ``engines.base.Engine.peak``."""
    side = side_of(device.type)
    a = torch.ones((side, side), dtype=dtype, device=device)
    source = torch.ones(COPIED // dtype.itemsize, dtype=dtype, device=device)
    product, target = torch.empty_like(a), torch.empty_like(source)

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if device.type == "mps":
            torch.mps.synchronize()

    def multiply() -> None:
        torch.matmul(a, a, out=product)
        wait()

    def copy() -> None:
        target.copy_(source)
        wait()

    return peak(side, multiply, copy)


def linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """``x Wᵀ``, ``[..., in]`` times ``[out, in]``.

    Decoding multiplies one row or a few. MKL does that up to four times faster as ``(W xᵀ)ᵀ``, and a single row twice
    as fast when it is doubled, since its matrix-vector product reads the weights at half the speed.
    """
    rows = x.numel() // x.shape[-1]
    if rows > FEW_ROWS or x.device.type != "cpu" or torch.is_grad_enabled() or not torch.backends.mkl.is_available():
        return F.linear(x, weight)
    columns = x.reshape(rows, -1).repeat(2 if rows == 1 else 1, 1).T
    return (weight @ columns).T[:rows].reshape(*x.shape[:-1], -1)


def _total(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    if device.type == "mps":
        return torch.mps.recommended_max_memory()
    return psutil.virtual_memory().total
