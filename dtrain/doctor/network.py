"""Measurements between ranks: latency and bandwidth of neighbours, offsets of clocks, transport.

Invariant: one pair is measured at a time, so pairs do not share a link.
"""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, final

import torch

from dtrain.doctor.finding import Finding

if TYPE_CHECKING:
    from dtrain.comm.communicator import Comm

ROUND_TRIPS = 30
"""Round trips of an empty message; the latency is half of the fastest."""


LEAST_S, REPETITIONS = 0.2, 4
"""Seconds that a transfer which gives the bandwidth must take, and how many there are.

The fastest counts: others had to wait for a core, or for other programs on the link.
"""


FIRST_BYTES, MAX_BYTES = 1 << 18, 1 << 26


MAX_PAIRS = 32
"""Pairs that are measured, those between nodes first."""


TAG_DATA, TAG_REPLY = 0, 1


@final
@dataclass(frozen=True)
class Link:
    """The measured connection of two ranks.

    Attributes
    ----------
    is_between_nodes : bool
        Whether its ends are on different nodes.
    latency_s : float
        Half of the fastest round trip of a small message.
    bytes_per_s : float
        Rate of one large message.
    """

    first: int
    second: int
    hosts: Sequence[str]
    is_between_nodes: bool
    latency_s: float
    bytes_per_s: float


def ring_pairs(nodes: Sequence[int], limit: int = MAX_PAIRS) -> list[tuple[int, int]]:
    """Return the pairs of neighbours of a ring that are measured, those between nodes first.

    Parameters
    ----------
    nodes : sequence of int
        Node of each rank.
    """
    size = len(nodes)
    if size < 2:
        return []
    pairs = [(rank, (rank + 1) % size) for rank in range(size if size > 2 else 1)]
    pairs.sort(key=lambda pair: nodes[pair[0]] == nodes[pair[1]])
    return pairs[:limit]


def measure_links(comm: Comm) -> list[Link]:
    """Return the links of the ring, the same on all ranks. Collective over the group."""
    links = []
    numbers = {rank: node for node, ranks in enumerate(comm.topology.nodes) for rank in ranks}
    nodes = [numbers[rank] for rank in range(comm.size)]
    for first, second in ring_pairs(nodes):
        result = None
        if comm.rank == first:
            result = _measure_as_sender(comm, second)
        elif comm.rank == second:
            _answer(comm, first)
        latency_s, rate = comm.allgather_object(result)[first]
        hosts = (comm.hosts[first], comm.hosts[second])
        apart = nodes[first] != nodes[second]
        links.append(Link(first, second, hosts, apart, latency_s, rate))
    return links


def _measure_as_sender(comm: Comm, peer: int) -> tuple[float, float]:
    """Return latency and bytes per second to a peer that runs `_answer`."""
    times = [_time_message(comm, peer, 8, again=True) for _ in range(ROUND_TRIPS)]
    latency_s = min(times) / 2
    count = FIRST_BYTES
    while True:
        elapsed = _time_message(comm, peer, count, again=True)
        if elapsed >= LEAST_S or count >= MAX_BYTES:
            break
        grow = max(2.0, min(8.0, 1.2 * LEAST_S / elapsed))
        count = min(MAX_BYTES, int(count * grow))
    last = REPETITIONS - 1
    further = [_time_message(comm, peer, count, again=turn < last) for turn in range(REPETITIONS)]
    return latency_s, count / max(min(elapsed, *further) - latency_s, 1e-9)


def _time_message(comm: Comm, peer: int, count: int, again: bool) -> float:
    """Send the length of the next message, then the message; return the seconds to its reply."""
    _send(comm, peer, torch.tensor([count, again]), TAG_DATA)
    _receive(comm, peer, 1, TAG_REPLY)
    data = torch.zeros(count, dtype=torch.uint8)
    start = time.perf_counter()
    comm.isend(data, peer, TAG_DATA)
    _receive(comm, peer, 1, TAG_REPLY)
    elapsed = time.perf_counter() - start
    comm.flush()
    return elapsed


def _answer(comm: Comm, peer: int) -> None:
    """Reply to the messages of `_measure_as_sender`."""
    again, reply = 1, torch.zeros(1, dtype=torch.int64)
    while again:
        count, again = _receive(comm, peer, 2, TAG_DATA).tolist()
        comm.post_recv(peer, TAG_DATA, [((count,), torch.uint8)])
        _send(comm, peer, reply, TAG_REPLY)
        comm.recv(peer, TAG_DATA)
        _send(comm, peer, reply, TAG_REPLY)


def _send(comm: Comm, peer: int, data: torch.Tensor, tag: int) -> None:
    comm.isend(data, peer, tag)
    comm.flush()


def _receive(
    comm: Comm, peer: int, count: int, tag: int, dtype: torch.dtype = torch.int64
) -> torch.Tensor:
    comm.post_recv(peer, tag, [((count,), dtype)])
    message = comm.recv(peer, tag)
    assert isinstance(message, torch.Tensor)
    return message


def measure_clock_offsets(comm: Comm, turns: int = 5) -> list[float]:
    """Return the offset of each rank's clock from rank 0's, in seconds. Collective over the group.

    Only the first rank of each node asks. The offset of the fastest of several round trips counts.
    """
    first_ranks = [ranks[0] for ranks in comm.topology.nodes if ranks[0]]
    offset = 0.0
    for asker in first_ranks:
        if comm.rank == asker:
            offset = min(_ask_clock(comm) for _ in range(turns))[1]
        elif comm.rank == 0:
            for _ in range(turns):
                _receive(comm, asker, 1, TAG_DATA)
                _send(comm, asker, torch.tensor([time.time()], dtype=torch.float64), TAG_REPLY)
    offsets = [float(value) for value in comm.allgather_object(offset)]
    for ranks in comm.topology.nodes:
        for rank in ranks:
            offsets[rank] = offsets[ranks[0]]
    return offsets


def _ask_clock(comm: Comm) -> tuple[float, float]:
    """Return the round trip to rank 0, and the offset of this clock from its."""
    start = time.time()
    _send(comm, 0, torch.zeros(1, dtype=torch.int64), TAG_DATA)
    there = float(_receive(comm, 0, 1, TAG_REPLY, torch.float64))
    end = time.time()
    return end - start, (start + end) / 2 - there


def parse_transports(display: str) -> dict[str, str]:
    """Return the transports inside nodes and between them, by Open MPI's table of connections."""
    found = re.findall(r"^\s*(on|off)-host:\s*all connections are (\S+)", display, re.MULTILINE)
    names = {"on": "inside nodes", "off": "between nodes"}
    return {names[side]: name for side, name in found if name != "n/a"}


def check_links(
    links: Sequence[Link], transports: dict[str, str], has_fast_network: bool
) -> list[Finding]:
    """Return the findings of the network.

    Parameters
    ----------
    transports : dict
        By "inside nodes" and "between nodes", where the library tells.
    has_fast_network : bool
        Whether the kernel has an InfiniBand or a similar device.
    """
    findings = []
    if has_fast_network and transports.get("between nodes") == "tcp":
        findings.append(
            Finding(
                "network.fast-unused",
                "problem",
                "messages between nodes travel by TCP, and this node has a faster network",
                "load the site's MPI module (with UCX or libfabric); MPI wheels know TCP only",
            )
        )
    elif has_fast_network and not transports and any(link.is_between_nodes for link in links):
        findings.append(
            Finding(
                "network.transport-unknown",
                "note",
                "the library does not tell its transport, and this node has a fast network",
                "compare the measured rate with that of the network; UCX_LOG_LEVEL=info, "
                "FI_LOG_LEVEL=info or I_MPI_DEBUG=5 print the transport",
            )
        )
    if transports.get("inside nodes") == "tcp":
        findings.append(
            Finding(
                "network.no-shared-memory",
                "note",
                "messages inside a node travel by TCP, not by shared memory",
                "unset OMPI_MCA_btl, or add `sm` to it; look for space in /dev/shm",
            )
        )
    return [*findings, *_check_slow_pairs(links)]


def _check_slow_pairs(links: Sequence[Link]) -> list[Finding]:
    """Return the finding of pairs between nodes that are much slower than the others."""
    between = [link for link in links if link.is_between_nodes]
    if len(between) < 3:
        return []
    usual = statistics.median(link.bytes_per_s for link in between)
    slow = [link for link in between if link.bytes_per_s < usual / 3]
    return [
        Finding(
            "network.slow-pair",
            "problem",
            f"{link.hosts[0]} -> {link.hosts[1]}: {rate_text(link.bytes_per_s)}, and the usual "
            f"pair has {rate_text(usual)}",
            "exclude the node that slow pairs have in common (`--exclude`), and report it",
        )
        for link in slow
    ]


def rate_text(bytes_per_s: float) -> str:
    """Return a rate in bits and bytes, as networks and models are measured."""
    return f"{bytes_per_s * 8 / 1e9:.3g} Gbit/s ({bytes_per_s / 1e6:,.0f} MB/s)"


def network_summary(links: Sequence[Link], transports: dict[str, str]) -> str:
    """Return the line of the network."""
    parts = []
    for name, between in (("between nodes", True), ("inside nodes", False)):
        group = [link for link in links if link.is_between_nodes is between]
        if not group:
            continue
        latency = statistics.median(link.latency_s for link in group)
        rate = statistics.median(link.bytes_per_s for link in group)
        transport = transports.get(name, "an unknown transport")
        parts.append(f"{name} by {transport}: {latency * 1e6:,.0f} us, {rate_text(rate)}")
    return "; ".join(parts)


def links_table(links: Sequence[Link]) -> list[dict[str, object]]:
    """Return the links as plain values."""
    return [asdict(link) for link in links]
