"""Devices: shared memory and synchronisation."""

from __future__ import annotations

import functools

import torch


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Return the bytes of shared memory that one block of a kernel may use on a CUDA device."""
    properties = torch.cuda.get_device_properties(device)
    return int(getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block))


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished its queued work."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
