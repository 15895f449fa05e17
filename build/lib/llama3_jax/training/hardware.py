"""The denominator of MFU: what the devices could do at most."""

import time

import jax
import jax.numpy as jnp

# Dense bfloat16 FLOP/s a device, from the makers' data sheets.
PEAK_FLOPS = {
    "NVIDIA A100": 312e12,
    "NVIDIA H100 80GB HBM3": 989.4e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H200": 989.4e12,
}


def peak_flops() -> tuple[float, str]:
    """FLOP/s of one device and where the figure comes from.

    A device without an entry in the table, such as a CPU, is measured by a large float32 product.
    """
    kind = jax.devices()[0].device_kind
    for name, flops in PEAK_FLOPS.items():
        if kind.startswith(name):
            return flops, f"data sheet of {name}"
    return _measured_flops() / jax.local_device_count(), f"measured float32 product on {kind}"


def _measured_flops(size: int = 1024, repeats: int = 5) -> float:
    product = jax.jit(jnp.matmul)
    x = jnp.ones((size, size), jnp.float32)
    product(x, x).block_until_ready()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        product(x, x).block_until_ready()
        times.append(time.perf_counter() - start)
    return 2 * size**3 / min(times)
