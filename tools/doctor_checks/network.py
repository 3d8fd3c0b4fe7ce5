"""Names, addresses, interfaces, InfiniBand, and the clock."""

from __future__ import annotations

import re
import socket
import time
from collections.abc import Iterator

from tools.doctor_checks.host import Finding, Host

# Bridges of containers and virtual machines: they look usable and lead nowhere.
_TRAPS = re.compile(r"(docker|virbr|veth|br-|cni|flannel|cali|podman|lxc|tun|tap|dummy|ifb|kube)")
_CHOICES = {"GLOO_SOCKET_IFNAME": "gloo", "NCCL_SOCKET_IFNAME": "NCCL"}
# Before this moment the project did not exist: a clock that says so was never set.
_EARLIEST = 1_750_000_000


def host_name(host: Host) -> Iterator[Finding]:
    """gloo binds to the address of the host's own name; a wrong one cannot be reached."""
    name = host.facts.get("hostname") or socket.gethostname()
    addresses = host.addresses_of(name)
    cure = "put the name with its address into /etc/hosts, or export GLOO_SOCKET_IFNAME=IFACE"
    outside = [a for a in addresses if not _loopback(a)]
    own = _own_addresses(host)
    several = int(host.env.get("SLURM_NNODES", "1") or 1) > 1
    if not addresses:
        yield Finding("error", "host name", f"{name} resolves to no address", cure)
    elif not outside:
        text = f"{name} resolves to {', '.join(addresses)} only: other nodes cannot answer gloo"
        yield Finding("error" if several else "note", "host name", text, cure)
    elif own and not set(outside) & own:
        text = f"{name} resolves to {', '.join(outside)}, which no interface here has"
        yield Finding("warning", "host name", text, cure)
    else:
        yield Finding("ok", "host name", f"{name} is {', '.join(outside)}")


def loopback(host: Host) -> Iterator[Finding]:
    """Ranks of one machine meet at localhost."""
    addresses = host.addresses_of("localhost")
    state = host.read("/sys/class/net/lo/operstate")
    flags = host.read("/sys/class/net/lo/flags")
    up = flags is None or int(flags, 16) & 1
    if not any(_loopback(address) for address in addresses):
        text = f"localhost resolves to {', '.join(addresses) or 'nothing'}"
        yield Finding("error", "loopback", text, "add '127.0.0.1 localhost' to /etc/hosts")
    elif state == "down" or not up:
        yield Finding("error", "loopback", "the interface lo is down", "ip link set lo up")
    elif "127.0.0.1" not in addresses:
        text = f"localhost is {', '.join(addresses)} only: programs that ask for IPv4 fail"
        yield Finding("warning", "loopback", text, "add '127.0.0.1 localhost' to /etc/hosts")
    else:
        yield Finding("ok", "loopback", "localhost is 127.0.0.1")


def interfaces(host: Host) -> Iterator[Finding]:
    """Which network gloo and NCCL would take, and whether what they were told exists."""
    names = [name for name in host.names("/sys/class/net") if name != "lo"]
    up = [name for name in names if host.read(f"/sys/class/net/{name}/operstate") != "down"]
    usable = [name for name in up if not _TRAPS.match(name)]
    for variable, library in _CHOICES.items():
        yield from _chosen(host, variable, library, names)
    unset = [variable for variable in _CHOICES if not host.env.get(variable)]
    traps = [name for name in up if _TRAPS.match(name)]
    several = int(host.env.get("SLURM_NNODES", "1") or 1) > 1
    if not names:
        yield Finding("note", "interfaces", "none but loopback: one machine only")
    elif unset and (len(usable) > 1 or (traps and several)):
        best = usable[0] if usable else "IFACE"
        text = f"{', '.join(usable) or 'none'} usable"
        text += f"; {', '.join(traps)} lead nowhere" if traps else ""
        cure = " ".join(f"{variable}={best}" for variable in unset)
        level = "warning" if several else "note"
        yield Finding(level, "interfaces", text, f"several nodes: export {cure} if a run hangs")
    else:
        yield Finding("ok", "interfaces", ", ".join(usable or names))


def _chosen(host: Host, variable: str, library: str, names: list[str]) -> Iterator[Finding]:
    text = host.env.get(variable, "")
    if not text:
        return
    # NCCL: prefixes, "=" for a whole name, "^" for all but these. gloo: whole names.
    excluded, exact = text.startswith("^"), text.lstrip("^").startswith("=")
    words = [word for word in text.lstrip("^=").split(",") if word]
    if library == "gloo":
        matched = all(word in [*names, "lo"] for word in words)
    else:
        known = [*names, "lo"]
        matched = any(
            n == word or (not exact and n.startswith(word)) for n in known for word in words
        )
    if not matched and not excluded:
        yield Finding(
            "error",
            variable,
            f"is {text!r}, but here are {', '.join(names) or 'only lo'}: {library} cannot start",
            f"unset {variable}, or name one of these",
        )
    elif library == "gloo" and (excluded or exact):
        text = f"is {text!r}: gloo knows neither ^ nor ="
        yield Finding("error", variable, text, f"export {variable}=NAME")
    elif not excluded and all(_TRAPS.match(word) or word == "lo" for word in words):
        several = int(host.env.get("SLURM_NNODES", "1") or 1) > 1
        level = "error" if several else "note"
        text = f"is {text!r}, which other nodes cannot reach"
        yield Finding(level, variable, text, f"unset {variable}, or name a real network")


def infiniband(host: Host) -> Iterator[Finding]:
    """Ports that are down make NCCL fall back to TCP, ten times slower."""
    devices = host.names("/sys/class/infiniband")
    states = {}
    for device in devices:
        for port in host.names(f"/sys/class/infiniband/{device}/ports"):
            folder = f"/sys/class/infiniband/{device}/ports/{port}"
            rate = host.read(f"{folder}/rate") or "?"
            states[f"{device}:{port}"] = (host.read(f"{folder}/state") or "?", rate)
    down = [name for name, (state, _) in states.items() if "ACTIVE" not in state]
    if not devices:
        yield Finding("ok", "InfiniBand", "no devices; NCCL uses sockets", value="none")
        return
    text = "; ".join(f"{name} {state}, {rate}" for name, (state, rate) in states.items())
    if len(down) == len(states):
        yield Finding(
            "error",
            "InfiniBand",
            f"no port is active: {text}",
            "ask the administrator; exclude the node",
            text,
        )
    elif down:
        cure = f"NCCL_IB_HCA=^{','.join(d.split(':')[0] for d in down)} leaves them out"
        yield Finding("note", "InfiniBand", text, cure, text)
    else:
        yield Finding("ok", "InfiniBand", text, value=text)
    if not host.names("/dev/infiniband"):
        text = "/dev/infiniband is missing: NCCL cannot use these devices"
        yield Finding(
            "error", "RDMA", text, "docker: --device /dev/infiniband; pyxis and Apptainer bring it"
        )


def clock(host: Host) -> Iterator[Finding]:
    """Certificates, file times and the order of logs over nodes rely on it."""
    now = host.facts.get("time", time.time())
    if now < _EARLIEST:
        yield Finding("error", "clock", f"says {time.ctime(now)}", "set it: start chronyd")
        return
    said = host.ask("timedatectl", "show", "--property=NTPSynchronized", "--value")
    tracking = host.ask("chronyc", "-n", "tracking") or ""
    offset = re.search(r"System time\s*:\s*([\d.]+) seconds", tracking)
    if offset and float(offset[1]) > 0.5:
        yield Finding("warning", "clock", f"is {offset[1]} s off", "chronyc makestep")
    elif (said or "").strip() == "no" and "Leap status     : Normal" not in tracking:
        yield Finding("warning", "clock", "is not synchronised", "start chronyd or ntpd")
    else:
        known = offset or (said or "").strip() == "yes"
        text = "synchronised" if known else "plausible; neither timedatectl nor chronyc answers"
        yield Finding("ok" if known else "note", "clock", text)


def _loopback(address: str) -> bool:
    return address.startswith("127.") or address == "::1"


def _own_addresses(host: Host) -> set[str]:
    """Addresses of this machine; empty where the kernel's table is not there."""
    found = set()
    lines = (host.read("/proc/net/fib_trie") or "").splitlines()
    for line, following in zip(lines, lines[1:]):
        if "host LOCAL" in following and (match := re.search(r"\|-- ([\d.]+)", line)):
            found.add(match[1])
    for line in (host.read("/proc/net/if_inet6") or "").splitlines():
        digits = line.split()[0]
        found.add(socket.inet_ntop(socket.AF_INET6, bytes.fromhex(digits)))
    return found


CHECKS = (host_name, loopback, interfaces, infiniband, clock)
