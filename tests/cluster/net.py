"""Hosts of a cluster as network namespaces on one bridge of this machine.

    machine   dtrain0  10.77.0.254
                 |
        +--------+--------+------ ...
     dtrainv1  dtrainv2  dtrainv3         veth pairs
        |         |         |
       eth0      eth0      eth0           10.77.0.1, .2, .3 ...
    dtrain-n1  dtrain-n2  dtrain-n3       namespaces, host names n1, n2, n3

Invariant: this module creates, changes and deletes only the names and the subnet above; the caller
knows whether they are ours. Needs root and iproute2.
"""

from __future__ import annotations

import json
import re
import subprocess
from ipaddress import IPv4Network

BRIDGE = "dtrain0"
SUBNET = IPv4Network("10.77.0.0/24")
GATEWAY = "10.77.0.254"
MAX_HOSTS = 64


def space(host: int) -> str:
    """Return the namespace of a host; the first host is 1."""
    return f"dtrain-n{host}"


def link(host: int) -> str:
    """Return the name of a host's link at the bridge."""
    return f"dtrainv{host}"


def address(host: int) -> str:
    """Return the address of a host."""
    return str(SUBNET[host])


def call(*argv: str) -> str:
    """Run a command and return its output; RuntimeError quotes its error message."""
    result = subprocess.run(argv, capture_output=True, text=True, timeout=60)
    if result.returncode:
        message = (result.stderr or result.stdout).strip()
        raise RuntimeError(f"`{' '.join(argv)}` failed with code {result.returncode}: {message}")
    return result.stdout


def spaces() -> list[str]:
    """Return the namespaces of this machine that have one of our names."""
    lines = call("ip", "netns", "list").splitlines()
    names = [line.split()[0] for line in lines if line.strip()]
    return [name for name in names if re.fullmatch(r"dtrain-n\d+", name)]


def links() -> list[str]:
    """Return the links of this machine that have one of our names, the bridge included."""
    names = [str(row["ifname"]) for row in json.loads(call("ip", "-j", "link", "show"))]
    return [name for name in names if name == BRIDGE or re.fullmatch(r"dtrainv\d+", name)]


def routes() -> list[str]:
    """Return the routes of this machine in the subnet, those of interfaces included."""
    rows = json.loads(call("ip", "-j", "-4", "route", "show", "table", "all"))
    nets = [str(row["dst"]) for row in rows if row.get("dst", "default") != "default"]
    return sorted({net for net in nets if IPv4Network(net, strict=False).subnet_of(SUBNET)})


def taken() -> list[str]:
    """Return the existing objects that prevent `build`, one phrase each."""
    return (
        [f"namespace {name}" for name in spaces()]
        + [f"network link {name}" for name in links()]
        + [f"route to {net}" for net in routes()]
    )


def build(hosts: int) -> None:
    """Create the bridge and the hosts; RuntimeError if the kernel refuses."""
    call("ip", "link", "add", BRIDGE, "type", "bridge")
    call("ip", "addr", "add", f"{GATEWAY}/{SUBNET.prefixlen}", "dev", BRIDGE)
    call("ip", "link", "set", BRIDGE, "up")
    for host in range(1, hosts + 1):
        add_host(host)


def add_host(host: int) -> None:
    """Create one host and link it to the bridge."""
    ip = ("ip", "-n", space(host))
    call("ip", "netns", "add", space(host))
    call("ip", "link", "add", link(host), "type", "veth", "peer", "eth0", "netns", space(host))
    call("ip", "link", "set", link(host), "master", BRIDGE, "up")
    call(*ip, "addr", "add", f"{address(host)}/{SUBNET.prefixlen}", "dev", "eth0")
    call(*ip, "link", "set", "eth0", "up")
    call(*ip, "link", "set", "lo", "up")


def shape(hosts: int, rate: str | None) -> None:
    """Limit the rate at which each host sends, in tc's notation ("1gbit"); None removes the limit.

    tbf's latency limits the queue and is no propagation delay: with a larger one acknowledgements
    queue, which halves the bandwidth of two-way traffic.
    """
    for host in range(1, hosts + 1):
        device = ("dev", "eth0", "root")
        qdisc = ("tc", "-n", space(host), "qdisc")
        if rate:
            call(
                *qdisc, "replace", *device, "tbf", "rate", rate, "burst", "128kb", "latency", "2ms"
            )
        elif "tbf" in call(*qdisc, "show", "dev", "eth0"):
            call(*qdisc, "del", *device)


def pids() -> list[int]:
    """Return the processes that run on the hosts."""
    texts = (call("ip", "netns", "pids", name) for name in spaces())
    return [int(pid) for text in texts for pid in text.split()]


def remove() -> None:
    """Delete hosts, links and bridge, as far as they exist."""
    for name in spaces():
        call("ip", "netns", "del", name)
    # With a namespace the kernel deletes its veth pair, but with a delay.
    for name in links():
        subprocess.run(("ip", "link", "del", name), capture_output=True, timeout=60)
