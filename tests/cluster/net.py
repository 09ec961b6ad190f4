"""Hosts of a cluster as network namespaces on one bridge of this machine.

    machine   dtrain0  10.77.0.254
                 |
        +--------+--------+------ ...
     dtrainv1  dtrainv2  dtrainv3         veth pairs
        |         |         |
       eth0      eth0      eth0           10.77.0.1, .2, .3 ...
    dtrain-n1  dtrain-n2  dtrain-n3       namespaces, host names n1, n2, n3

Invariant: nothing but the names and the subnet above is made, changed or deleted here; whether
they are ours is for the caller to know. Needs root and iproute2.
"""

from __future__ import annotations

import json
import re
import subprocess
from ipaddress import IPv4Network

BRIDGE = "dtrain0"
SUBNET = IPv4Network("10.77.0.0/24")
GATE = "10.77.0.254"
MOST = 64


def space(host: int) -> str:
    """Return the namespace of a host; hosts count from 1."""
    return f"dtrain-n{host}"


def link(host: int) -> str:
    """Return the bridge's end of a host's link."""
    return f"dtrainv{host}"


def address(host: int) -> str:
    """Return the address of a host."""
    return str(SUBNET[host])


def call(*argv: str) -> str:
    """Run a command and return its output; RuntimeError quotes what it said where it fails."""
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60)
    if done.returncode:
        said = (done.stderr or done.stdout).strip()
        raise RuntimeError(f"`{' '.join(argv)}` gave {done.returncode}: {said}")
    return done.stdout


def spaces() -> list[str]:
    """Return the namespaces of this machine that bear a name of ours."""
    lines = call("ip", "netns", "list").splitlines()
    names = [line.split()[0] for line in lines if line.strip()]
    return [name for name in names if re.fullmatch(r"dtrain-n\d+", name)]


def links() -> list[str]:
    """Return the links of this machine that bear a name of ours, the bridge included."""
    names = [str(row["ifname"]) for row in json.loads(call("ip", "-j", "link", "show"))]
    return [name for name in names if name == BRIDGE or re.fullmatch(r"dtrainv\d+", name)]


def routes() -> list[str]:
    """Return the routes of this machine, interfaces' own included, that lie in the subnet."""
    rows = json.loads(call("ip", "-j", "-4", "route", "show", "table", "all"))
    nets = [str(row["dst"]) for row in rows if row.get("dst", "default") != "default"]
    return sorted({net for net in nets if IPv4Network(net, strict=False).subnet_of(SUBNET)})


def taken() -> list[str]:
    """Return what stands in the way of `build`, one phrase each."""
    return (
        [f"namespace {name}" for name in spaces()]
        + [f"network link {name}" for name in links()]
        + [f"route to {net}" for net in routes()]
    )


def build(hosts: int) -> None:
    """Make the bridge and the hosts; RuntimeError where the kernel refuses."""
    call("ip", "link", "add", BRIDGE, "type", "bridge")
    call("ip", "addr", "add", f"{GATE}/{SUBNET.prefixlen}", "dev", BRIDGE)
    call("ip", "link", "set", BRIDGE, "up")
    for host in range(1, hosts + 1):
        attach(host)


def attach(host: int) -> None:
    """Make one host and link it to the bridge."""
    inside = ("ip", "-n", space(host))
    call("ip", "netns", "add", space(host))
    call("ip", "link", "add", link(host), "type", "veth", "peer", "eth0", "netns", space(host))
    call("ip", "link", "set", link(host), "master", BRIDGE, "up")
    call(*inside, "addr", "add", f"{address(host)}/{SUBNET.prefixlen}", "dev", "eth0")
    call(*inside, "link", "set", "eth0", "up")
    call(*inside, "link", "set", "lo", "up")


def shape(hosts: int, rate: str | None) -> None:
    """Bound what each host sends, such as "1gbit" (in the words of tc); None takes the bound off.

    tbf's latency bounds the queue and is no propagation delay: a larger one makes
    acknowledgements queue and halves the bandwidth of two-way traffic.
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
    """Return the processes that live on the hosts."""
    found = (call("ip", "netns", "pids", name) for name in spaces())
    return [int(pid) for text in found for pid in text.split()]


def raze() -> None:
    """Delete hosts, links and bridge; what is gone already is no error."""
    for name in spaces():
        call("ip", "netns", "del", name)
    # A namespace takes its end of the pair along, and so the other end, a moment later.
    for name in links():
        subprocess.run(("ip", "link", "del", name), capture_output=True, timeout=60)
