"""Nodes that one machine plays: NCCL takes ranks of different ones for different machines, and goes over sockets."""

from __future__ import annotations

import os

# TCP on the loopback device, with as many sockets and threads as it takes to be as fast as it gets.
_SOCKETS = {
    "NCCL_NET": "Socket",
    "NCCL_IB_DISABLE": "1",
    "NCCL_SOCKET_IFNAME": "lo",
    "NCCL_SOCKET_NTHREADS": "4",
    "NCCL_NSOCKS_PERTHREAD": "4",
    "NCCL_MNNVL_ENABLE": "0",
}


def pretend_nodes(node_size: int) -> dict[str, str]:
    """Let NCCL believe that every ``node_size`` neighbouring ranks are a machine; call it before groups are made.

    Ranks of one such node keep NVLink, or whatever the machine has. Variables that are set already stay. gloo has no
    nodes, and works as before.

    Args:
        node_size: ranks per node; torchrun's ``LOCAL_RANK`` says which this one is.

    Returns:
        What was set, for the record.
    """
    local = int(os.environ.get("LOCAL_RANK", "0"))
    wanted = {**_SOCKETS, "NCCL_HOSTID": f"node{local // node_size}"}
    for name, value in wanted.items():
        os.environ.setdefault(name, value)
    return {name: os.environ[name] for name in wanted}
