"""Query GPUs with NVML, NVIDIA's management library: a process that will fork must not initialize CUDA."""

import ctypes
import os
from collections.abc import Mapping
from pathlib import Path


def may_have_gpus() -> bool:
    """Whether this machine has device files of GPUs. To ask CUDA instead may initialize it if NVML does not work."""
    return any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/kfd").exists() or Path("/dev/dxg").exists()


def cpus_near_gpus(env: Mapping[str, str]) -> list[set[int]]:
    """The CPUs near each visible GPU, in CUDA's order; empty if NVML does not know them.

    Source: ``nvmlDeviceGetCpuAffinity`` of https://docs.nvidia.com/deploy/nvml-api/.
    """
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return []
    if nvml.nvmlInit_v2():
        return []
    try:
        count = ctypes.c_uint()
        nvml.nvmlDeviceGetCount_v2(ctypes.byref(count))
        visible = env.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(count.value))))
        found = [_cpus_near(nvml, name.strip()) for name in visible.split(",")]
    finally:
        nvml.nvmlShutdown()
    return found if all(found) else []


def _cpus_near(nvml: ctypes.CDLL, gpu: str) -> set[int]:
    """The CPUs near a GPU, given by its index or UUID; empty if NVML does not know them."""
    device, bits = ctypes.c_void_p(), 8 * ctypes.sizeof(ctypes.c_ulong)
    if gpu.isdigit():
        status = nvml.nvmlDeviceGetHandleByIndex_v2(int(gpu), ctypes.byref(device))
    else:
        status = nvml.nvmlDeviceGetHandleByUUID(gpu.encode(), ctypes.byref(device))
    words = (ctypes.c_ulong * (1 + (os.cpu_count() or 1) // bits))()
    if status or nvml.nvmlDeviceGetCpuAffinity(device, len(words), words):
        return set()
    return {bits * number + bit for number, word in enumerate(words) for bit in range(bits) if word >> bit & 1}
