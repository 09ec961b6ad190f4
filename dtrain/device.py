"""Where a rank computes: the CPU, or its own accelerator of this host.

Invariant: ranks of one host take its accelerators in turn, so that none is left over while another
is shared. No accelerator has confirmed this yet: see `docs/comm.md`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dtrain.errors import Refusal


def pick(asked: str, rank: int, hosts: Sequence[str]) -> torch.device:
    """Return the device of `rank`: number = position among the ranks of its host, modulo devices.

    Parameters
    ----------
    asked : "auto", "cpu" or "cuda"
        "auto" is CUDA where torch sees a device, else the CPU.
    hosts : sequence of str
        Host of each rank.

    Raises
    ------
    Refusal
        "cuda" where torch sees none.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if asked == "cuda" and not count:
        raise Refusal(
            f'device = "cuda", but torch {torch.__version__} sees no CUDA device on {hosts[rank]}: '
            'set device = "auto", or install a torch that fits the driver'
        )
    if asked == "cpu" or not count:
        return torch.device("cpu")
    near = [other for other, host in enumerate(hosts) if host == hosts[rank]]
    return torch.device("cuda", near.index(rank) % count)
