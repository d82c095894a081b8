"""Simulate the time of an update on many workers, from the speeds of devices and links.

Every time is bytes divided by bytes per second, plus a latency for each step of a collective. No
part overlaps another one, except the all-reduce of the model's other gradients with its backward
pass.
"""

import math
import time
from typing import Callable, Dict, NamedTuple, Tuple

import torch

from ...memory import ValueTable, kernels
from ...memory.gradient import entries_of_rows
from ...memory.kernels import Entries
from .exchange import Table, columns_of, factor_bytes

FLOAT = 4  # bytes
SORT = 96  # bytes moved for each entry that is sorted: four passes over keys and indices
COLLECTIVES = 6  # of a read from split tables: counts, slots, weights, columns; back: two
BACKWARD = 2 / 3  # share of the base step that can hide the all-reduce of the other gradients


class Cluster(NamedTuple):
    """Workers and their links.

    Attributes:
        workers: W.
        per_node: workers in a node.
        intra: bytes/s that each worker receives from its node.
        inter: bytes/s that each worker receives from other nodes; the workers of a node receive
            together for all of them.
        latency: seconds for each step of a collective.
    """

    workers: int
    per_node: int
    intra: float
    inter: float
    latency: float


class Device(NamedTuple):
    """Bytes/s of a device's memory, per kind of kernel.

    Attributes:
        read: rows gathered for a sum or a dot product.
        update: rows of gradient, values and moments, read and written by Adam.
        stream: whole tables, read or written in order.
    """

    read: float
    update: float
    stream: float


class Training(NamedTuple):
    """A model with memories, and its batches.

    Attributes:
        table: the value table of each memory.
        layers: number of memories, each with its own table.
        tokens: tokens per worker and update.
        passes: batches that are accumulated for an update.
        base: seconds of an update of the model without memories on one worker.
        rest: bytes of all gradients except those of tables.
        query: seconds of a memory's query network and search, forward and backward, per update.
    """

    table: Table
    layers: int
    tokens: int
    passes: int
    base: float
    rest: float
    query: float


class _Group(NamedTuple):
    """Workers that take part in a collective, and how many of them share a node."""

    members: int
    per_node: int


def simulate(
    cluster: Cluster, device: Device, training: Training, form: str, shards: int = 1
) -> Dict[str, float]:
    """Seconds of one update, by part.

    Args:
        cluster: the workers.
        device: each worker's.
        training: the model and its batches.
        form: "plain" (no memories), "factors", "dense", or "owned": workers reduce and scatter
            dense gradients, each updates a part of the rows, and all gather the values.
        shards: workers that split a table by columns.

    Returns:
        "base": the model without memories; "rest": its all-reduce, as far as nothing hides it;
        "read": queries, search and reads; "group": exchange within groups of shards; "between":
        exchange of the gradient between groups; "update": sums of the gradient and Adam; "total".

    Raises:
        ValueError: groups do not fit the cluster or the table; the message says why.
    """
    everyone, group, replicas = _groups(cluster, shards)
    reduced = _all_reduce(cluster, everyone, training.rest)
    parts = dict.fromkeys(("read", "group", "between", "update"), 0.0)
    if form != "plain":
        columns = columns_of(training.table, shards)
        tokens = training.tokens * shards  # whose reads this worker's columns serve
        parts["read"] = training.query + 2 * _row_bytes(columns, tokens) / device.read
        parts["group"] = _within_group(cluster, group, training)
        exchange = {"factors": _factors, "dense": _dense, "owned": _owned}[form]
        if replicas.members == 1:  # nothing is exchanged, so the gradient stays as it is
            exchange = _factors
        parts["between"], parts["update"] = exchange(cluster, replicas, device, columns, tokens)
    found = {
        "base": training.base,
        "rest": max(0.0, reduced - BACKWARD * training.base),
        **{name: training.layers * seconds for name, seconds in parts.items()},
    }
    return {**found, "total": sum(found.values())}


def held_bytes(cluster: Cluster, table: Table, form: str, shards: int = 1) -> float:
    """Bytes of values and moments that each worker holds for a table.

    Args:
        cluster: the workers.
        table: the table.
        form: as for ``simulate``.
        shards: as for ``simulate``.

    Raises:
        ValueError: the columns cannot be divided evenly.
    """
    values = FLOAT * table.n_slots * columns_of(table, shards).v_dim
    owners = cluster.workers // shards if form == "owned" else 1
    return values * (1 + 2 / owners)


def _groups(cluster: Cluster, shards: int) -> Tuple[_Group, _Group, _Group]:
    """All workers, those that split a table, and those with the same columns."""
    workers, per_node = cluster.workers, min(cluster.per_node, cluster.workers)
    for name, n, whole in (("a node", per_node, workers), ("shards", shards, workers)):
        if n < 1 or whole % n:
            raise ValueError(f"{name} has {n} workers, must be a divisor of {whole}")
    if max(shards, per_node) % min(shards, per_node):
        raise ValueError(f"shards has {shards} workers, must fit nodes of {per_node}")
    same_columns = _Group(workers // shards, max(1, per_node // shards))
    return _Group(workers, per_node), _Group(shards, min(shards, per_node)), same_columns


# --- collectives ------------------------------------------------------------------------------


def _seconds(cluster: Cluster, group: _Group, total: float, steps: float) -> float:
    """Seconds until every member has received all but its own part of a total.

    The links of all members of a node carry what comes from other nodes, once; within the node
    each passes it on. Both go on at the same time.
    """
    members, per_node = group
    if members == 1:
        return 0.0
    over_links = total * (1 - per_node / members) / (per_node * cluster.inter)
    within = total * (1 - 1 / members) / cluster.intra if per_node > 1 else 0.0
    return max(over_links, within) + steps * math.log2(members) * cluster.latency


def _all_gather(cluster: Cluster, group: _Group, bytes_each: float) -> float:
    return _seconds(cluster, group, bytes_each * group.members, 1)


def _all_reduce(cluster: Cluster, group: _Group, n_bytes: float) -> float:
    """A reduce-scatter and an all-gather of the same bytes."""
    return 2 * _seconds(cluster, group, n_bytes, 1)


def _all_to_all(cluster: Cluster, group: _Group, bytes_each: float) -> float:
    members, per_node = group
    if members == 1:
        return 0.0
    over_links = bytes_each * (1 - per_node / members) / cluster.inter
    within = bytes_each * (per_node - 1) / members / cluster.intra
    return max(over_links, within) + math.log2(members) * cluster.latency


# --- the parts of a memory --------------------------------------------------------------------


def _row_bytes(table: Table, tokens: float) -> float:
    """Bytes of all rows that tokens read."""
    return FLOAT * tokens * table.reads * table.v_dim


def _rows_read(table: Table, tokens: float) -> float:
    """Expected number of rows that uniform random reads hit."""
    return table.n_slots * -math.expm1(-tokens * table.reads / table.n_slots)


def _within_group(cluster: Cluster, group: _Group, training: Training) -> float:
    """Look-ups and columns of split tables, forward and backward."""
    n_shards, table, tokens = group.members, training.table, training.tokens / training.passes
    look_ups = _all_gather(cluster, group, 2 * FLOAT * table.reads * tokens)  # slots, weights
    returned = _all_to_all(cluster, group, FLOAT * table.reads * tokens * n_shards)
    columns = 2 * _all_to_all(cluster, group, FLOAT * table.v_dim * tokens)
    more = (COLLECTIVES - 4) * math.log2(n_shards) * cluster.latency  # four are counted above
    return training.passes * (look_ups + returned + columns + more)


def _factors(
    cluster: Cluster, replicas: _Group, device: Device, columns: Table, tokens: int
) -> Tuple[float, float]:
    """Seconds between groups, and of the update, with factors."""
    between = _all_gather(cluster, replicas, factor_bytes(columns, tokens))
    every = tokens * replicas.members
    sums = _row_bytes(columns, every) / device.read + SORT * every * columns.reads / device.stream
    return between, sums + _adam(device, columns, _rows_read(columns, every))


def _dense(
    cluster: Cluster, replicas: _Group, device: Device, columns: Table, tokens: int
) -> Tuple[float, float]:
    """Seconds between groups, and of the update, with one dense all-reduce."""
    n_bytes = FLOAT * columns.n_slots * columns.v_dim
    scan = n_bytes / device.stream  # for rows that are not zero
    adam = _adam(device, columns, _rows_read(columns, tokens * replicas.members))
    sums = _own_sum(device, columns, tokens)
    return _all_reduce(cluster, replicas, n_bytes), sums + scan + adam


def _owned(
    cluster: Cluster, replicas: _Group, device: Device, columns: Table, tokens: int
) -> Tuple[float, float]:
    """Seconds between groups, and of the update, if each worker updates a part of the rows."""
    n_bytes = FLOAT * columns.n_slots * columns.v_dim
    between = 2 * _seconds(cluster, replicas, n_bytes, 1)  # gradients go, values come
    scan = n_bytes / device.stream
    adam = _adam(device, columns, _rows_read(columns, tokens * replicas.members))
    return between, _own_sum(device, columns, tokens) + (scan + adam) / replicas.members


def _own_sum(device: Device, columns: Table, tokens: int) -> float:
    """The dense gradient of a worker's own tokens: zeros, sorted reads, sums, rows written."""
    n_bytes = FLOAT * columns.n_slots * columns.v_dim
    written = n_bytes + FLOAT * columns.v_dim * _rows_read(columns, tokens)
    sort = SORT * tokens * columns.reads
    return _row_bytes(columns, tokens) / device.read + (written + sort) / device.stream


def _adam(device: Device, columns: Table, rows: float) -> float:
    """Gradient read; values and two moments read and written."""
    return 7 * FLOAT * columns.v_dim * rows / device.update


# --- speeds of this machine -------------------------------------------------------------------


def measure(table: Table, tokens: int, repeats: int = 5) -> Device:
    """Measure the speeds of this machine's CPU with the memory's kernels.

    Args:
        table: a table larger than the caches.
        tokens: tokens of a read.
        repeats: times each kernel runs; the fastest counts.
    """
    values = ValueTable(table.n_slots, table.v_dim).weight.detach()
    slots = torch.randint(table.n_slots, (tokens, table.reads))
    weights = torch.rand(tokens, table.reads)
    read = _fastest(lambda: kernels.gather_sum(values, slots, weights), repeats)
    moments = [torch.zeros_like(values) for _ in range(2)]
    entries: Entries = entries_of_rows(torch.arange(table.n_slots), torch.ones_like(values))
    update = _fastest(
        lambda: kernels.adam_rows(values, *moments, entries, 1e-3, (0.9, 0.999), 1e-8), repeats
    )
    stream = _fastest(values.zero_, repeats)
    n_bytes = FLOAT * table.n_slots * table.v_dim
    return Device(_row_bytes(table, tokens) / read, 7 * n_bytes / update, n_bytes / stream)


def _fastest(work: Callable[[], object], repeats: int) -> float:
    work()  # compiles
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)
