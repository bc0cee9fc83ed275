"""What the GPUs of each compute capability have, how many blocks of a kernel fit, and how much has to be in flight."""

from typing import NamedTuple

__all__ = ["ARCHITECTURES", "Architecture", "Occupancy", "occupancy_of"]


class Architecture(NamedTuple):
    """Limits of a multiprocessor; and one GPU of that compute capability, by name."""

    threads: int
    blocks: int
    shared_memory: int
    """Bytes, of a multiprocessor."""
    shared_memory_of_block: int
    """Bytes that a block can have at most."""
    gpu: str
    multiprocessors: int
    bandwidth: float
    """Of its memory, in bytes a second."""
    latency: float
    """Of a read from its memory when little else goes on, in seconds."""

    @property
    def bytes_in_flight(self) -> float:
        """What Little's law asks of each multiprocessor, so that the memory is never idle."""
        return self.bandwidth * self.latency / self.multiprocessors


KB = 1024
REGISTERS = 65536
"""Of a multiprocessor, on all of these. A warp gets them 256 at a time, and a thread 255 at most."""

# Limits: CUDA programming guide, "Compute Capabilities", table "Technical Specifications per Compute Capability".
# GPUs: NVIDIA's data sheets. Latencies: a pointer chased through hundreds of megabytes of an A100 (80 GB), H100 PCIe
# and L40 (github.com/te42kyfo/gpu-benches in June 2024, gpu-latency/*.txt: milliseconds by jumps). T4: 434 cycles at
# 1.59 GHz, from memory of Jia et al., "Dissecting the NVidia Turing T4 GPU via Microbenchmarking" (2019), and not found
# again. Where none was found, that of the GPU in brackets stands in.
ARCHITECTURES: dict[int, Architecture] = {
    75: Architecture(1024, 16, 64 * KB, 64 * KB, "T4", 40, 320e9, 273e-9),
    80: Architecture(2048, 32, 164 * KB, 163 * KB, "A100 SXM 80 GB", 108, 2039e9, 406e-9),
    86: Architecture(1536, 16, 100 * KB, 99 * KB, "A40 (latency of A100)", 84, 696e9, 406e-9),
    89: Architecture(1536, 24, 100 * KB, 99 * KB, "RTX 4090 (latency of L40)", 128, 1008e9, 254e-9),
    90: Architecture(2048, 32, 228 * KB, 227 * KB, "H200 (latency of H100)", 132, 4800e9, 375e-9),
    100: Architecture(2048, 32, 228 * KB, 227 * KB, "B200 (latency of H100)", 148, 8000e9, 375e-9),
    120: Architecture(1536, 24, 100 * KB, 99 * KB, "RTX 5090 (latency of L40)", 170, 1792e9, 254e-9),
}


class Occupancy(NamedTuple):
    """How many blocks of a kernel a multiprocessor holds."""

    blocks: int
    limited_by: str
    share: float
    """Of the threads that a multiprocessor can hold."""


def _up(n: int, unit: int) -> int:
    return -(-n // unit) * unit


def occupancy_of(arch: int, threads: int, registers: int, shared_memory: int) -> Occupancy:
    """Of blocks of ``threads`` that take ``registers`` each, and ``shared_memory`` bytes a block.

    >>> occupancy_of(90, threads=128, registers=80, shared_memory=0)
    Occupancy(blocks=6, limited_by='registers', share=0.375)
    """
    has = ARCHITECTURES[arch]
    warps = -(-threads // 32)
    limits = {
        "threads": has.threads // (32 * warps),
        "blocks": has.blocks,
        # CUDA occupancy calculator: a warp's registers are rounded up to 256, and warps go to four quarters in turn.
        "registers": REGISTERS // 4 // _up(32 * registers, 256) * 4 // warps,
        # The system takes 1 KB of each block from 8.0 on; the rest is rounded up to 128 bytes (256 before).
        "shared memory": has.shared_memory // max(1, _up(shared_memory, 128) + KB * (arch >= 80)),
    }
    limited_by, blocks = min(limits.items(), key=lambda limit: limit[1])
    return Occupancy(blocks, limited_by, blocks * warps * 32 / has.threads)
