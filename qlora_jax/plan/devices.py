"""Devices to plan for: the descriptions that compilers need, and the figures that bound a program's time.

    h100        one H100                  h100x4       four of them
    v5e         one TPU v5e chip          v5e:2x2      a slice of four, by its topology

XLA compiles for an NVIDIA GPU from a description alone, a text proto: the compute capability decides the instructions, the
sizes of caches, registers and shared memory decide fusion, and cuDNN's version decides which of its attention kernels exist.
libtpu knows a TPU by the name of its topology; the two cores of a v4 or v5p chip are one device (megacore).

The memory of a GPU is the total that CUDA reports, that of a TPU the available HBM that libtpu reports. On a GPU the CUDA
context and the libraries need some hundred MiB of it. A new device is one entry of `DEVICES`.
"""

import dataclasses
import difflib
import math
import re
from typing import Literal

from qlora_jax.errors import OptionError
from qlora_jax.nn.attention_target import AttentionTarget

Platform = Literal["cuda", "tpu"]
_MIB = 2**20
_GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Device:
    """One kind of accelerator.

    Attributes:
        name: the key in `DEVICES`.
        description: the vendor's name.
        platform: the platform of its compiler, "cuda" or "tpu".
        memory_bytes: the bytes of one device's own memory.
        bandwidth: the bytes a second between that memory and the device.
        flops: the dense bfloat16 operations a second with float32 sums; a multiplication and an addition are two.
        dimensions: the dimensions of a TPU's topology; 0 for GPUs.
        target_config: the text proto of a GPU; None for a TPU, whose name is enough.
        clock: the cycles a second of a TPU, in which its compiler counts; None for a GPU.
        cores: the multiprocessors of a GPU; None for TPUs.
        capability: the compute capability of a GPU; None for TPUs.
    """

    name: str
    description: str
    platform: Platform
    memory_bytes: int
    bandwidth: float
    flops: float
    dimensions: int = 0
    target_config: str | None = None
    clock: float | None = None
    cores: int | None = None
    capability: tuple[int, int] | None = None

    @property
    def target(self) -> AttentionTarget:
        """The device as the choice of attention kernels knows it."""
        return AttentionTarget("gpu" if self.platform == "cuda" else "tpu", self.capability)


@dataclasses.dataclass(frozen=True)
class Machine:
    """Devices of one kind that work together.

    Attributes:
        device: the kind of the devices.
        shape: a TPU's topology, or the number of GPUs.
    """

    device: Device
    shape: tuple[int, ...]

    @property
    def count(self) -> int:
        """The number of devices."""
        return math.prod(self.shape)

    @property
    def name(self) -> str:
        """The name by which `machine_named` finds this machine."""
        if self.count == 1:
            return self.device.name
        size = "x".join(map(str, self.shape))
        return f"{self.device.name}:{size}" if self.device.platform == "tpu" else f"{self.device.name}x{size}"

    @property
    def description(self) -> str:
        """The vendor's name of the devices, with their number."""
        return self.device.description if self.count == 1 else f"{self.count} x {self.device.description}"

    @property
    def topology(self) -> str:
        """The name of the topology for the compiler."""
        if self.device.platform == "cuda":
            return self.device.name
        return f"{self.device.name}:{'x'.join(map(str, self.shape))}"


# Pallas does not know some GPUs by name; each is described by the name of one that it knows, of the same compute capability.
_KNOWN_TO_JAX = {"NVIDIA GeForce RTX 3090": "NVIDIA A10"}


@dataclasses.dataclass(frozen=True)
class _GPU:
    """The values of a GPU that CUDA's device query reports, and its peak."""

    name: str
    description: str
    capability: tuple[int, int]
    memory_bytes: int
    bandwidth: float
    flops: float
    cores: int
    l2_bytes: int
    fpus_per_core: int
    threads_per_core: int
    clock_ghz: float
    shared_memory_per_core: int
    shared_memory_per_block: int
    cudnn: tuple[int, int] = (9, 10)

    def device(self) -> Device:
        """Return the GPU as a device, with its description for the compiler."""
        (major, minor), (cudnn_major, cudnn_minor) = self.capability, self.cudnn
        target_config = f"""
        gpu_device_info {{
            threads_per_block_limit: 1024
            threads_per_warp: 32
            shared_memory_per_block: 49152
            shared_memory_per_core: {self.shared_memory_per_core}
            threads_per_core_limit: {self.threads_per_core}
            core_count: {self.cores}
            fpus_per_core: {self.fpus_per_core}
            block_dim_limit_x: 2147483647
            block_dim_limit_y: 65535
            block_dim_limit_z: 65535
            memory_bandwidth: {self.bandwidth:.0f}
            l2_cache_size: {self.l2_bytes}
            clock_rate_ghz: {self.clock_ghz}
            device_memory_size: {self.memory_bytes}
            shared_memory_per_block_optin: {self.shared_memory_per_block}
            cuda_compute_capability {{ major: {major} minor: {minor} }}
            registers_per_core_limit: 65536
            registers_per_block_limit: 65536
        }}
        platform_name: "CUDA"
        dnn_version_info {{ major: {cudnn_major} minor: {cudnn_minor} }}
        device_description_str: "{_KNOWN_TO_JAX.get(self.description, self.description)}"
    """
        return Device(
            self.name,
            self.description,
            "cuda",
            self.memory_bytes,
            self.bandwidth,
            self.flops,
            target_config=target_config,
            cores=self.cores,
            capability=self.capability,
        )


# Cores, clocks, caches, memory and bandwidth of A100, H100, H200 and B200: OpenXLA's own descriptions of them
# (openxla/xla, xla/backends/gpu/target_config/specs/*.txtpb), which are device queries of real ones. Those of L4 and
# RTX 4090: "NVIDIA Ada GPU Architecture"; of RTX 3090: "NVIDIA Ampere GA102 GPU Architecture"; their memory: CUDA's
# totalGlobalMem as torch.cuda.get_device_properties prints it (22692, 24217 and 24259 MiB under Linux). Sizes by compute
# capability: CUDA C++ Programming Guide, "Technical Specifications". Peaks are those of dense bfloat16
# Tensor Cores with float32 sums, half of what data sheets say with sparsity: A100's (312), H100's and H200's (1979 / 2), HGX
# B200's (4500 / 2), L4's (242 / 2), the two papers (330.4 / 2 and 142 / 2). Those of the last three are cores x clock x 1024
# operations on an L4, 512 on a GeForce. OpenXLA's files were read themselves; the peaks, and the values of L4, RTX 4090
# and RTX 3090, were read in third-party tables of these papers.
_GPUS = (
    _GPU(
        "h100",
        "NVIDIA H100 80GB HBM3",
        capability=(9, 0),
        memory_bytes=84_942_979_072,
        bandwidth=3.35232e12,
        flops=989.4e12,
        cores=132,
        l2_bytes=50 * _MIB,
        fpus_per_core=128,
        threads_per_core=2048,
        clock_ghz=1.98,
        shared_memory_per_core=233_472,
        shared_memory_per_block=232_448,
    ),
    _GPU(
        "h200",
        "NVIDIA H200 141GB HBM3e",
        capability=(9, 0),
        memory_bytes=151_397_597_184,
        bandwidth=4.8e12,
        flops=989.4e12,
        cores=132,
        l2_bytes=50 * _MIB,
        fpus_per_core=128,
        threads_per_core=2048,
        clock_ghz=1.98,
        shared_memory_per_core=233_472,
        shared_memory_per_block=232_448,
    ),
    _GPU(
        "b200",
        "NVIDIA B200",
        capability=(10, 0),
        memory_bytes=191_514_411_008,
        bandwidth=7.67232e12,
        flops=2250e12,
        cores=148,
        l2_bytes=132_644_864,
        fpus_per_core=128,
        threads_per_core=2048,
        clock_ghz=1.965,
        shared_memory_per_core=233_472,
        shared_memory_per_block=232_448,
    ),
    _GPU(
        "a100-80",
        "NVIDIA A100-SXM4-80GB",
        capability=(8, 0),
        memory_bytes=85_100_068_864,
        bandwidth=2.03904e12,
        flops=312e12,
        cores=108,
        l2_bytes=40 * _MIB,
        fpus_per_core=64,
        threads_per_core=2048,
        clock_ghz=1.41,
        shared_memory_per_core=167_936,
        shared_memory_per_block=166_912,
    ),
    _GPU(
        "a100-40",
        "NVIDIA A100-SXM4-40GB",
        capability=(8, 0),
        memory_bytes=42_298_834_944,
        bandwidth=1.5552e12,
        flops=312e12,
        cores=108,
        l2_bytes=40 * _MIB,
        fpus_per_core=64,
        threads_per_core=2048,
        clock_ghz=1.41,
        shared_memory_per_core=167_936,
        shared_memory_per_block=166_912,
    ),
    _GPU(
        "l4",
        "NVIDIA L4",
        capability=(8, 9),
        memory_bytes=22_692 * _MIB,
        bandwidth=300e9,
        flops=121e12,
        cores=58,
        l2_bytes=48 * _MIB,
        fpus_per_core=128,
        threads_per_core=1536,
        clock_ghz=2.04,
        shared_memory_per_core=102_400,
        shared_memory_per_block=101_376,
    ),
    _GPU(
        "rtx4090",
        "NVIDIA GeForce RTX 4090",
        capability=(8, 9),
        memory_bytes=24_217 * _MIB,
        bandwidth=1008e9,
        flops=165.2e12,
        cores=128,
        l2_bytes=72 * _MIB,
        fpus_per_core=128,
        threads_per_core=1536,
        clock_ghz=2.52,
        shared_memory_per_core=102_400,
        shared_memory_per_block=101_376,
    ),
    _GPU(
        "rtx3090",
        "NVIDIA GeForce RTX 3090",
        capability=(8, 6),
        memory_bytes=24_259 * _MIB,
        bandwidth=936.2e9,
        flops=71e12,
        cores=82,
        l2_bytes=6 * _MIB,
        fpus_per_core=128,
        threads_per_core=1536,
        clock_ghz=1.695,
        shared_memory_per_core=102_400,
        shared_memory_per_block=101_376,
    ),
)
# Peaks and bandwidths of a chip: Google Cloud's pages "TPU v4" (275 teraflops, 1200 GBps), "TPU v5e" (197, 819), "TPU v5p"
# (459, 2765) and "TPU v6e" (918, 1638), docs.cloud.google.com/tpu/docs.
# Memory: the "available HBM" of libtpu's own message when a program asks for more.
# Clocks: the peak divided by the operations of a cycle, which are 2 for each cell of the matrix units (8 of 128 x 128 in a
# chip of v4 and v5p, 4 in one of v5e; 2 of 256 x 256 in one of v6e, each with two rows a cycle, since libtpu expects fewer
# cycles of a large product than one row a cycle takes).
_TPUS = (
    Device("v4", "TPU v4", "tpu", int(30.75 * _GIB), 1200e9, 275e12, 3, clock=1.05e9),
    Device("v5e", "TPU v5e", "tpu", int(15.75 * _GIB), 819e9, 197e12, 2, clock=1.5e9),
    Device("v5p", "TPU v5p", "tpu", int(95.74 * _GIB), 2765e9, 459e12, 3, clock=1.75e9),
    Device("v6e", "TPU v6e", "tpu", int(31.25 * _GIB), 1638e9, 918e12, 2, clock=1.75e9),
)
DEVICES: dict[str, Device] = {device.name: device for device in (*(gpu.device() for gpu in _GPUS), *_TPUS)}


def machine_named(name: str) -> Machine:
    """Return the machine of a name such as `h100`, `h100x4`, `v5e` or `v5e:2x2`.

    Raises:
        OptionError: there is no such device (the message lists the nearest names and all names), or no such topology.
    """
    kind, colon, size = name.strip().lower().partition(":")
    device = DEVICES.get(kind)
    if device is None and not colon and (parts := re.fullmatch(r"(.+?)x(\d+)", kind)):
        device, size = DEVICES.get(parts[1]), parts[2]
    if device is None:
        same = [known for known in DEVICES if kind and kind in known]
        near = same or difflib.get_close_matches(kind, DEVICES, n=3, cutoff=0.4)
        hint = f"; did you mean {' or '.join(near)}?" if near else ";"
        raise OptionError(f"unknown device {name!r}{hint} known: {', '.join(DEVICES)} (several: h100x4, v5e:2x2)")
    if device.platform == "cuda":
        if colon or size == "0":
            raise OptionError(f"device {name!r}: expected {device.name} or a number of them such as {device.name}x4")
        return Machine(device, (int(size or 1),))
    if not size:
        return Machine(device, (1,) * device.dimensions)
    shape = tuple(int(side) for side in size.split("x") if side.isdigit())
    if len(shape) != device.dimensions or 0 in shape or "x".join(map(str, shape)) != size:
        example = "x".join(["2", "2", "1"][: device.dimensions])
        raise OptionError(
            f"device {name!r}: expected a topology of {device.dimensions} sides such as {device.name}:{example}, "
            f"found {size!r}"
        )
    if any(side > 1 and side % 2 for side in shape):
        raise OptionError(f"device {name!r}: expected sides of 1 or even ones, as Cloud TPU has them, found {size!r}")
    return Machine(device, shape)
