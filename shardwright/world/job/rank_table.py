"""Reads a rank table: a JSON file that says which host and device every rank of a job has."""

from __future__ import annotations

import ipaddress
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shardwright.errors import WorldError, listed
from shardwright.world.job.job import Job, check_rank, read_number, read_port
from shardwright.world.job.mpi import read_ranks

_FILE = ("RANK_TABLE_FILE", "MINDSPORE_HCCL_CONFIG_PATH")


def read_rank_table(variables: Mapping[str, str]) -> Job | None:
    """Reads the job that the file named by ``RANK_TABLE_FILE`` describes, and this rank's place in it; None without one.

    The rank is ``RANK_ID``, else the one that mpirun gives. Ranks meet at ``MASTER_ADDR``, else at rank 0's server.

    Raises:
        WorldError: the file cannot be read, has problems (all are listed), or does not fit the variables.
    """
    name = next((name for name in _FILE if variables.get(name)), None)
    if name is None:
        return None
    path = Path(variables[name])
    try:
        table = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise WorldError(f"{name}: the rank table {path} cannot be read: {error}; name a JSON file") from None
    places = check_table(table, str(path))
    size = len(places)
    if variables.get("RANK_ID"):
        rank = read_number(variables, "RANK_ID")
    else:
        given = read_ranks(variables)
        if given is None:
            raise WorldError(f"RANK_ID is not set, so this process has no rank in {path}: export RANK_ID=<0 to {size - 1}>")
        rank = given[0]
    check_rank(rank, size, "RANK_ID", f"the number of devices in {path}")
    if variables.get("RANK_SIZE") and read_number(variables, "RANK_SIZE") != size:
        raise WorldError(f"RANK_SIZE is {variables['RANK_SIZE']}, but {path} lists {size} devices: export RANK_SIZE={size}")
    if size == 1:
        return None
    server, device = places[rank]
    if variables.get("DEVICE_ID") and read_number(variables, "DEVICE_ID") != device:
        raise WorldError(
            f"DEVICE_ID is {variables['DEVICE_ID']}, but {path} gives rank {rank} device {device}: export DEVICE_ID={device}"
        )
    here = [other for other, (host, _) in enumerate(places) if host == server]
    address = variables.get("MASTER_ADDR") or places[0][0]
    port = read_port(variables, f"rank table {json.dumps(table, sort_keys=True)}")
    return Job("rank table", rank, size, here.index(rank), len(here), address, port)


def check_table(table: Any, source: str) -> list[tuple[str, int]]:
    """Checks a rank table of either format whole; returns the host and device of every rank, in order.

    Raises:
        WorldError: all problems of the table, at once.

    >>> server = {"server_id": "10.0.0.1", "device": [{"device_id": "0", "device_ip": "", "rank_id": "0"}]}
    >>> check_table({"version": "1.0", "server_count": "1", "server_list": [server], "status": "completed"}, "one.json")
    [('10.0.0.1', 0)]
    """
    problems: list[str] = []
    servers = table.get("server_list") if isinstance(table, dict) else None
    if not isinstance(servers, list) or not servers or not all(isinstance(server, dict) for server in servers):
        raise WorldError(f"the rank table {source}: server_list must be a list of one server or more, each an object")
    if table.get("status") != "completed":
        problems.append(f"status is {table.get('status')!r}: it must be 'completed'")
    if str(table.get("server_count")) != str(len(servers)):
        problems.append(
            f'server_count is {table.get("server_count")!r}, but server_list has {len(servers)}: write "{len(servers)}"'
        )
    identifiers = [str(server.get("server_id", "")) for server in servers]
    problems += [f"server_list[{index}] has no server_id" for index, text in enumerate(identifiers) if not text]
    problems += [f"server_id {text} stands {count} times" for text, count in Counter(identifiers).items() if count > 1]
    if identifiers != sorted(identifiers):
        problems.append(f"servers are not in the order of their server_id: write them as {', '.join(sorted(identifiers))}")
    places, ranks = _read_devices(servers, identifiers, problems)
    if ranks != list(range(len(ranks))):
        problems.append(f"rank_ids are {ranks} in the file's order: they must be 0 to {len(ranks) - 1}, server after server")
    problems += _check_clusters(table, set(identifiers))
    if problems:
        raise WorldError(listed(f"the rank table {source}", problems, "nothing was run"))
    return places


def _read_devices(
    servers: list[dict[str, Any]], identifiers: list[str], problems: list[str]
) -> tuple[list[tuple[str, int]], list[int]]:
    places: list[tuple[str, int]] = []
    ranks: list[int] = []
    for server, identifier in zip(servers, identifiers, strict=True):
        # in the format of several clusters a server_id may be a mere name, and server_ip the address
        address = str(server.get("server_ip") or server.get("host_ip") or identifier)
        if server.get("server_ip") and not _is_address(address):
            problems.append(f"server {identifier}: server_ip is {address!r}, which is no address")
        devices = server.get("device")
        if not isinstance(devices, list) or not devices or not all(isinstance(device, dict) for device in devices):
            problems.append(f"server {identifier}: device must be a list of one device or more, each an object")
            continue
        numbers = []
        for index, device in enumerate(devices):
            read = [str(device.get(key, "")) for key in ("device_id", "rank_id")]
            for key, text in zip(("device_id", "rank_id"), read, strict=True):
                if not text.isdecimal():
                    problems.append(
                        f"server {identifier}, device[{index}]: {key} is {device.get(key)!r}: write a number from 0"
                    )
            if all(text.isdecimal() for text in read):
                numbers.append(int(read[0]))
                places.append((address, int(read[0])))
                ranks.append(int(read[1]))
        twice = [number for number, count in Counter(numbers).items() if count > 1]
        problems += [f"server {identifier}: device_id {number} stands more than once" for number in twice]
    return places, ranks


def _check_clusters(table: dict[str, Any], identifiers: set[str]) -> list[str]:
    """Checks the list of clusters, which only the format of several clusters has."""
    if "cluster_list" not in table:
        return []
    clusters = table["cluster_list"]
    if not isinstance(clusters, list) or not all(isinstance(cluster, dict) for cluster in clusters):
        return ["cluster_list must be a list of objects"]
    problems: list[str] = []
    members: list[str] = []
    for index, cluster in enumerate(clusters):
        if not cluster.get("cluster_id"):
            problems.append(f"cluster_list[{index}] has no cluster_id")
        listed = cluster.get("server_list")
        if not isinstance(listed, list) or not all(isinstance(server, dict) for server in listed):
            problems.append(f"cluster_list[{index}]: server_list must be a list of objects")
            continue
        members += [str(server.get("server_id", "")) for server in listed]
    counts = Counter(members)
    problems += [f"cluster_list names server {name}, which server_list has not" for name in sorted(set(members) - identifiers)]
    problems += [f"server {name} is in no cluster of cluster_list" for name in sorted(identifiers - set(members))]
    return problems + [f"server {name} is in {count} clusters" for name, count in counts.items() if count > 1]


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True
