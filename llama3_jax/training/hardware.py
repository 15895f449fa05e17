"""The denominator of MFU: what the devices could do at most."""

import jax

# Dense bfloat16 FLOP/s a device, from NVIDIA's data sheets (those that give sparse figures: half).
# The longest name that a device's begins with counts.
PEAK_FLOPS = {
    "NVIDIA A100": 312e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA H100 80GB HBM3": 989.4e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H200": 989.4e12,
    "NVIDIA H200 NVL": 835e12,
    "NVIDIA GH200": 989.4e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA GB200": 2500e12,
}


def peak_flops() -> tuple[float | None, str]:
    """FLOP/s of one device and where the figure comes from; None where the table has no such device.

    Nothing is measured: a product's speed is no peak, and an MFU against it could exceed 100%.
    """
    kind = jax.devices()[0].device_kind
    known = [name for name in PEAK_FLOPS if kind.startswith(name)]
    if not known:
        return None, f"no peak is known of {kind}"
    return PEAK_FLOPS[max(known, key=len)], f"data sheet of {max(known, key=len)}"
