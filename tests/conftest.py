"""One suite for three devices: the ``device`` fixture runs a test on NumPy, on the emulated device and on a GPU."""

import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import cupy_pagedkv.devices.backend as backend
import cupy_pagedkv.devices.cuda_backend as cuda_backend
from cupy_pagedkv.devices.emulated_backend import EmulatedBackend
from cupy_pagedkv.devices.numpy_backend import NumpyBackend
from cupy_pagedkv.emulator import RawKernel

specialisations: set[tuple[str, tuple[tuple[str, str | int], ...]]] = set()
"""(kernel, defines) of every kernel that was launched on the emulated device so far."""

attention_shapes: set[tuple[Any, ...]] = set()
"""What a thread block of attention was chosen for so far: all arguments of ``shape_of`` but architecture and room."""

_build_kernel = EmulatedBackend._build_kernel
_shape_of = cuda_backend.shape_of


def _recording_build_kernel(self: Any, name: str, defines: Any) -> Any:
    specialisations.add((name, defines))
    return _build_kernel(self, name, defines)


EmulatedBackend._build_kernel = _recording_build_kernel


def _recording_shape_of(*arguments: Any) -> Any:
    attention_shapes.add(arguments[:-2])
    return _shape_of(*arguments)


cuda_backend.shape_of = _recording_shape_of


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Compiling what the other tests used has to come after them."""
    items.sort(key=lambda item: "test_compilation" in item.nodeid)


class Device:
    """Where a test's arrays live, and how they get there and back."""

    def __init__(self, name: str, xp: Any) -> None:
        self.name = name
        self.xp = xp
        self.of_caches = "cuda" if name == "cupy" else "cpu"  # the `device` argument of a cache

    @property
    def checks_indices(self) -> bool:
        return self.name == "numpy"

    def array(self, host: np.ndarray) -> Any:
        """A contiguous copy on the device."""
        if self.name != "cupy":
            return host.view(f"V{host.itemsize}").copy().view(host.dtype)  # padding between fields, too
        # Through bytes, because CuPy does not make arrays of every dtype from NumPy's.
        flat = self.xp.asarray(np.ascontiguousarray(host).reshape(-1).view(np.uint8))
        return flat.view(host.dtype).reshape(host.shape)

    def skip_unless_it_has(self, dtype: np.dtype[Any]) -> None:
        """Skip where CuPy's arrays cannot be of ``dtype``, not even as views. NumPy's always can."""
        if self.name != "cupy":
            return
        try:
            self.xp.zeros(dtype.itemsize, np.uint8).view(dtype)
        except (TypeError, ValueError) as error:
            pytest.skip(f"CuPy has no arrays of {dtype}: {error}")

    def numpy(self, array: Any) -> np.ndarray:
        """A host copy of an array that must be where this device's arrays are."""
        assert type(array) is self.xp.ndarray, f"expected an array on {self.name}, got {type(array)}"
        if self.name != "cupy":
            return array.view(f"V{array.itemsize}").copy().view(array.dtype)  # padding between fields, too
        if not array.flags.c_contiguous:
            array = self.xp.ascontiguousarray(array)
        flat = array.reshape(-1).view(np.uint8)
        return self.xp.asnumpy(flat).view(array.dtype).reshape(array.shape)


@pytest.fixture
def gpu() -> None:
    """For tests that are of a GPU alone."""
    skip_without_gpu()


def skip_without_gpu() -> None:
    """Where CUPY_PAGEDKV_REQUIRE_GPU=1 says that there has to be one, its want fails the test."""
    count, reason = backend._usable_gpus()
    if not count:
        (pytest.fail if os.environ.get("CUPY_PAGEDKV_REQUIRE_GPU") == "1" else pytest.skip)(f"no GPU: {reason}")


@pytest.fixture(params=["numpy", "emulated", "cupy"])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    yield from _device(request.param, monkeypatch)


@pytest.fixture(params=["emulated", "cupy"])
def kernel_device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    """A device that runs the kernels."""
    yield from _device(request.param, monkeypatch)


def _device(name: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    monkeypatch.setattr(backend, "EMULATE", name == "emulated")
    monkeypatch.setattr(backend, "DEBUG", False)
    if name != "numpy":
        # Work that silently falls back to NumPy fails the test.
        for operation in (
            "reshape_and_cache", "gather_cache", "copy_blocks", "paged_attention", "merge_attention_states",
        ):  # fmt: skip
            monkeypatch.setattr(NumpyBackend, operation, None)
    if name == "cupy":
        skip_without_gpu()
        import cupy

        yield Device(name, cupy)
    else:
        yield Device(name, np)


@pytest.fixture
def debug(device: Device, monkeypatch: pytest.MonkeyPatch) -> Device:
    """The device under CUPY_PAGEDKV_DEBUG=1."""
    monkeypatch.setattr(backend, "DEBUG", True)
    return device


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, tuple[int, ...]]]:
    """(kernel, grid) of each launch of the test, on the emulated device."""
    made: list[tuple[str, tuple[int, ...]]] = []
    call = RawKernel.__call__

    def counting(self: Any, grid: Any, block: Any, args: Any, **options: Any) -> None:
        made.append((self.name, grid))
        call(self, grid, block, args, **options)

    monkeypatch.setattr(RawKernel, "__call__", counting)
    monkeypatch.setattr(backend, "EMULATE", True)
    return made


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    """Seeded by the test's name without its device, so that every device sees the same numbers."""
    name = request.node.nodeid
    for device_name in ("numpy", "emulated", "cupy"):
        name = name.replace(device_name, "")
    return np.random.default_rng(list(name.encode()))
