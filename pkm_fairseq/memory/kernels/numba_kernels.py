"""The loops of the numba backend: plain functions over numpy arrays, compiled on first use.

Work is split into tasks so that one thread sums each number, in one order. So every run gives the
same bits, at any number of threads. numba has no bfloat16: kernels receive the bits of such a table
as uint16, and widen them to float32 row by row.
"""

import numba
import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic, overload

from .float8 import BLOCK, LEAST_EXPONENT, LEAST_PART, NEAREST_PART, NO_NUMBER, limits
from .tables import NEAREST

# Sums may be reordered and fused, which vectorises them; NaN and infinity keep their meaning.
SUMS = {"reassoc", "contract", "nsz"}

GROUPS_PER_NEIGHBOUR = 2  # groups of scores of one half; more leave fewer to rank
BISECTIONS = 12
LANES = 32  # floats that a vectorised loop takes at once
ROW_WORK = 8  # cost to fetch and store a row; unit: cost to add an entry
LINE = 64  # bytes in a cache line
NAN_BFLOAT16 = np.uint16(0x7FC0)
MAGNITUDE = np.uint32(0x7FFFFFFF)  # of float32's bits
ZERO = np.float32(0)

# like torch: 0 / 0 is NaN, not an exception
kernel = numba.njit(parallel=True, cache=True, fastmath=SUMS, error_model="numpy")
part = numba.njit(cache=True, fastmath=SUMS, error_model="numpy")


# ---------------------------------------------------------------- search


@kernel
def topk_pairs(half, rank1, rank2, out_scores, out_index1, out_index2, tasks):
    """Fill scores and sub-keys (N, H, K) from half scores (H, 2, N, S) and pairs of ranks (C,)."""
    n, heads, knn = out_scores.shape
    n_keys = half.shape[3]
    n_groups = max(GROUPS_PER_NEIGHBOUR * knn, 16)
    room = max(n_keys, len(rank1)) + LANES
    for task in numba.prange(tasks):
        best, sums = np.empty(n_groups, half.dtype), np.empty(len(rank1), half.dtype)
        kept, kept_at = np.empty(room, half.dtype), np.empty(room, np.int32)
        rank = np.empty(room, half.dtype)
        top1, top2 = np.empty(knn, half.dtype), np.empty(knn, half.dtype)
        at1, at2, at = np.empty(knn, np.int32), np.empty(knn, np.int32), np.empty(knn, np.int32)
        for token in range(task * n // tasks, (task + 1) * n // tasks):
            for h in range(heads):
                if _has_nan(half[h, 0, token]) or _has_nan(half[h, 1, token]):
                    out_scores[token, h], out_index1[token, h], out_index2[token, h] = np.nan, 0, 0
                    continue
                bound = _bound(half[h, 0, token], knn, best)
                _rank(half[h, 0, token], bound, kept, kept_at, rank, top1, at1)
                bound = _bound(half[h, 1, token], knn, best)
                _rank(half[h, 1, token], bound, kept, kept_at, rank, top2, at2)
                for c in range(len(sums)):
                    sums[c] = top1[rank1[c]] + top2[rank2[c]]
                if _has_nan(sums):  # opposite infinities
                    out_scores[token, h], out_index1[token, h], out_index2[token, h] = np.nan, 0, 0
                    continue
                bound = _bisect(sums, knn)
                _rank(sums, bound, kept, kept_at, rank, out_scores[token, h], at)
                for k in range(knn):
                    out_index1[token, h, k] = at1[rank1[at[k]]]
                    out_index2[token, h, k] = at2[rank2[at[k]]]


@part
def _bound(x, knn, best):
    """A bound that at least ``knn`` elements of x reach, and not many more.

    Split the elements into groups. If the maxima of ``knn`` groups reach a bound, at least ``knn``
    elements reach it. So only the maxima need to be bisected.
    """
    n_groups = len(best)
    if len(x) < 2 * n_groups:
        return x.dtype.type(-np.inf)
    best[:] = x[:n_groups]
    for start in range(n_groups, len(x) - n_groups + 1, n_groups):
        for g in range(n_groups):
            best[g] = max(best[g], x[start + g])
    return _bisect(best, knn)


@part
def _bisect(x, knn):
    """A bound that at least ``knn`` elements of x reach, and not many more."""
    low, high = x[0], x[0]
    for value in x:
        low, high = min(low, value), max(high, value)
    for _ in range(BISECTIONS):
        middle = low + (high - low) / 2
        reached = np.int32(0)
        for value in x:
            reached += np.int32(value >= middle)
        if reached < knn:
            high = middle
        else:
            low = middle
            if reached <= knn + knn // 8:
                break
    return low


@part
def _rank(x, bound, kept, kept_at, rank, top, top_at):
    """Sort the elements of x that reach the bound, descending and stable; keep the top."""
    n = 0
    for i in range(len(x)):
        kept[n], kept_at[n] = x[i], i
        n += x[i] >= bound
    padded = (n + LANES - 1) // LANES * LANES  # whole vectors are faster
    for i in range(padded):
        rank[i] = 0
    for i in range(n, padded):
        kept[i] = -np.inf
    for j in range(n):
        other = kept[j]
        for i in range(padded):  # comparing in floating point vectorises
            rank[i] += x.dtype.type(other > kept[i])
    top_at[:] = -1
    for i in range(n):
        r = int(rank[i])
        while r < len(top) and top_at[r] >= 0:  # an equal one came first
            r += 1
        if r < len(top):
            top[r], top_at[r] = kept[i], kept_at[i]


@part
def _has_nan(x):
    nan = np.int32(0)
    for i in range(len(x)):
        nan |= np.int32(x[i] != x[i])
    return nan != 0


@kernel
def grad_query(keys, index1, index2, grad_scores, grad_query, tasks):
    """``grad_query[n, h, p] = sum over k of grad_scores[n, h, k] * keys[h, p, index_p(k)]``."""
    n, heads, knn = index1.shape
    for task in numba.prange(tasks):
        for token in range(task * n // tasks, (task + 1) * n // tasks):
            for h in range(heads):
                grad_query[token, h] = 0
                for k in range(knn):
                    grad = grad_scores[token, h, k]
                    _add(grad_query[token, h, 0], grad, keys[h, 0, index1[token, h, k]])
                    _add(grad_query[token, h, 1], grad, keys[h, 1, index2[token, h, k]])


@kernel
def grad_keys(query, index1, index2, grad_scores, grad_keys, _tasks):
    """``grad_keys[h, p, index_p(k)] += grad_scores[n, h, k] * query[n, h, p]``; it starts at 0."""
    n, heads, knn = index1.shape
    for half in numba.prange(heads * 2):
        h, p = half // 2, half % 2
        index = index1 if p == 0 else index2
        for token in range(n):
            for k in range(knn):
                grad_key = grad_keys[h, p, index[token, h, k]]
                _add(grad_key, grad_scores[token, h, k], query[token, h, p])


@part
def _add(total, factor, x):
    """``total += factor * x``; both have the same width."""
    for v in range(len(total)):
        total[v] += factor * x[v]


@numba.njit(cache=True, fastmath={"nsz"})
def _add_rounded(total, factor, x):
    """Like ``_add``, but round each product before adding, so that cancelling gives exactly 0."""
    for v in range(len(total)):
        total[v] += factor * x[v]


# ---------------------------------------------------------------- values


@kernel
def gather_sum(values, slots, weights, out, tasks):
    """``out[n] = sum over t of weights[n, t] * values[slots[n, t]]``."""
    n, reads = slots.shape
    width = values.shape[1]
    whole = reads - reads % 8
    for task in numba.prange(tasks):
        wide = np.empty((8, width), out.dtype)
        for token in range(task * n // tasks, (task + 1) * n // tasks):
            total, slot, w = out[token], slots[token], weights[token]
            total[:] = 0
            for t in range(0, whole, 8):  # eight rows in flight hide the latency of memory
                _fetch_narrow(values, slot[t + 8 : t + 16])
                row0 = _row(values, slot[t], wide[0])
                row1 = _row(values, slot[t + 1], wide[1])
                row2 = _row(values, slot[t + 2], wide[2])
                row3 = _row(values, slot[t + 3], wide[3])
                row4 = _row(values, slot[t + 4], wide[4])
                row5 = _row(values, slot[t + 5], wide[5])
                row6 = _row(values, slot[t + 6], wide[6])
                row7 = _row(values, slot[t + 7], wide[7])
                w0, w1, w2, w3 = w[t], w[t + 1], w[t + 2], w[t + 3]
                w4, w5, w6, w7 = w[t + 4], w[t + 5], w[t + 6], w[t + 7]
                for v in range(width):
                    total[v] += (w0 * row0[v] + w1 * row1[v] + w2 * row2[v] + w3 * row3[v]) + (
                        w4 * row4[v] + w5 * row5[v] + w6 * row6[v] + w7 * row7[v]
                    )
            for t in range(whole, reads):
                _add(total, w[t], _row(values, slot[t], wide[0]))


@kernel
def gather_dot(values, rows, starts, order, grad_read, reads, out, tasks):
    """``out[e] = values[slot of e] . grad_read[e // reads]``, fetching each row once."""
    width = values.shape[1]
    bounds = _shares(starts, tasks)
    for task in numba.prange(tasks):
        wide = np.empty(width, out.dtype)
        for r in range(bounds[task], bounds[task + 1]):
            _prefetch(values, rows[min(r + 1, len(rows) - 1)])
            row = _row(values, rows[r], wide)
            for e in range(starts[r], starts[r + 1]):
                grad = grad_read[order[e] // reads]
                total = out.dtype.type(0)
                for v in range(width):
                    total += row[v] * grad[v]
                out[order[e]] = total


@kernel
def adam_rows(
    values,
    exp_avg,
    exp_avg_sq,
    rows,
    starts,
    order,
    bags,
    weights,
    grads,
    step_size,
    beta1,
    gain1,
    beta2,
    gain2,
    eps,
    key,
    key_avg,
    key_avg_sq,
    first_column,
    tasks,
):
    """Adam on the rows whose gradient has a non-zero element; gains are 1 - beta."""
    width = values.shape[1]
    bounds = _shares(starts, tasks)
    for task in numba.prange(tasks):
        gradient, wide = np.empty(width, grads.dtype), np.empty((3, width), grads.dtype)
        for r in range(bounds[task], bounds[task + 1]):
            if not _row_gradient(r, starts, order, bags, weights, grads, gradient):
                continue
            ahead = rows[min(r + 1, len(rows) - 1)]
            _prefetch(values, ahead)
            _prefetch(exp_avg, ahead)
            _prefetch(exp_avg_sq, ahead)
            slot = rows[r]
            row = _row(values, slot, wide[0])
            avg, avg_sq = _row(exp_avg, slot, wide[1]), _row(exp_avg_sq, slot, wide[2])
            for v in range(width):
                g = gradient[v]
                avg[v] = beta1 * avg[v] + gain1 * g
                avg_sq[v] = beta2 * avg_sq[v] + gain2 * g * g
                row[v] -= step_size * avg[v] / (np.sqrt(avg_sq[v]) + eps)
            _store(values, slot, row, key, first_column)
            _store(exp_avg, slot, avg, key_avg, first_column)
            _store(exp_avg_sq, slot, avg_sq, key_avg_sq, first_column)


@kernel
def row_squares(starts, order, bags, weights, grads, squares, tasks):
    """The squared norm of each row's gradient."""
    bounds = _shares(starts, tasks)
    for task in numba.prange(tasks):
        gradient = np.empty(grads.shape[1], grads.dtype)
        for r in range(bounds[task], bounds[task + 1]):
            _row_gradient(r, starts, order, bags, weights, grads, gradient)
            total = 0.0
            for v in range(len(gradient)):
                total += np.float64(gradient[v]) * np.float64(gradient[v])
            squares[r] = total


@part
def _row_gradient(r, starts, order, bags, weights, grads, gradient):
    """Sum a row's entries into ``gradient``; return whether any element is non-zero."""
    first = order[starts[r]]
    weight, grad = weights[first], grads[bags[first]]
    for v in range(len(gradient)):
        gradient[v] = weight * grad[v]
    for i in range(starts[r] + 1, starts[r + 1]):
        _add_rounded(gradient, weights[order[i]], grads[bags[order[i]]])
    nonzero = np.int32(0)
    for v in range(len(gradient)):
        nonzero |= np.int32(gradient[v] != 0)
    return nonzero != 0


@part
def group(slots, n_slots):
    """Sort entries by slot: the rows that occur (R,), their starts (R + 1,), entries (E,)."""
    place = np.zeros(n_slots + 1, np.int64)  # first counts, then the place of the next entry
    for slot in slots:
        place[slot + 1] += 1
    n_rows = 0
    for slot in range(n_slots):
        n_rows += place[slot + 1] > 0
    rows, starts = np.empty(n_rows, np.int64), np.empty(n_rows + 1, np.int64)
    r = 0
    for slot in range(n_slots):
        if place[slot + 1] > 0:
            rows[r], starts[r] = slot, place[slot]
            r += 1
        place[slot + 1] += place[slot]
    starts[n_rows] = len(slots)
    order = np.empty(len(slots), np.int64)
    for entry in range(len(slots)):
        slot = slots[entry]
        order[place[slot]] = entry
        place[slot] += 1
    return rows, starts, order


@part
def _shares(starts, tasks):
    """The first row of each task (tasks + 1,), so that tasks have equal work despite hot rows."""
    n_rows = len(starts) - 1
    bounds = np.empty(tasks + 1, np.int64)
    bounds[0], r = 0, 0
    total = starts[n_rows] + ROW_WORK * n_rows
    for task in range(1, tasks):
        while starts[r] + ROW_WORK * r < total * task // tasks:
            r += 1
        bounds[task] = r
    bounds[tasks] = n_rows
    return bounds


def _row(values, slot, wide):
    """A row of the table, widened into ``wide`` unless it is stored as float32 or float64."""


@overload(_row)
def _compile_row(values, slot, wide):
    if isinstance(values, types.BaseTuple):
        return _decoder(values[0].dtype.signed)
    if values.dtype == types.int8:

        def convert(values, slot, wide):
            for v in range(len(wide)):
                wide[v] = values[slot, v]
            return wide

        return convert
    if values.dtype != types.uint16:
        return lambda values, slot, wide: values[slot]

    def widen(values, slot, wide):
        bits = wide.view(np.uint32)
        for v in range(len(bits)):
            bits[v] = np.uint32(values[slot, v]) << np.uint32(16)
        return wide

    return widen


def _fetch_narrow(values, slots):
    """Prefetch rows that ``_row`` will widen one after the other, and so wait for one by one."""


@overload(_fetch_narrow)
def _compile_fetch_narrow(values, slots):
    if values.dtype not in (types.uint16, types.int8):
        return lambda values, slots: None

    def fetch(values, slots):
        for slot in slots:
            _prefetch(values, slot)

    return fetch


def _store(values, slot, row, key, first_column):
    """Round a row that ``_row`` widened, using the key, and write it back to the table."""


@overload(_store)
def _compile_store(values, slot, row, key, first_column):
    if isinstance(values, types.BaseTuple):
        return _encoder(values[0].dtype.signed)
    if values.dtype != types.uint16:
        return lambda values, slot, row, key, first_column: None  # it was updated in place

    def narrow(values, slot, row, key, first_column):
        bits = row.view(np.uint32)
        seed = _mix(np.uint32(slot) ^ np.uint32(key)) + np.uint32(first_column)
        for v in range(len(bits)):
            if row[v] != row[v]:
                values[slot, v] = NAN_BFLOAT16
                continue
            if key == NEAREST:
                noise = np.uint32(0x7FFF) + (bits[v] >> np.uint32(16) & np.uint32(1))
            else:
                noise = _mix(np.uint32(seed + np.uint32(v))) >> np.uint32(16)
            values[slot, v] = np.uint16(np.uint32(bits[v] + noise) >> np.uint32(16))

    return narrow


def _decoder(signed):
    """``_row`` for a ``Float8Table``, given as its codes and exponents."""
    lowest, base = np.float32(limits(signed)[0]), np.uint32(limits(signed)[1])

    def decode(values, slot, wide):
        codes, exponents = values
        for block in range(exponents.shape[1]):
            scale = _as_float(np.uint32(exponents[slot, block]) << np.uint32(23))
            columns = slice(block * BLOCK, (block + 1) * BLOCK)
            out, own = wide[columns], codes[slot, columns]
            for v in range(len(out)):
                code = own[v]
                magnitude = np.uint32(abs(np.int32(code)))
                low, by = (lowest, np.uint32(8)) if magnitude < 8 else (ZERO, np.uint32(0))
                unit = _as_float(np.uint32(magnitude + base + by) << np.uint32(20)) - low
                out[v] = unit * (-scale if code < 0 else scale)
        return wide

    return decode


def _encoder(signed):
    """``_store`` for a ``Float8Table``; see ``float8.encode``."""
    lowest, base = np.float32(limits(signed)[0]), np.uint32(limits(signed)[1])

    def encode(values, slot, row, key, first_column):
        codes, exponents = values
        seed = np.uint32(_mix(np.uint32(slot) ^ np.uint32(key)) + np.uint32(first_column))
        for block in range(exponents.shape[1]):
            columns = slice(block * BLOCK, (block + 1) * BLOCK)
            x, own = row[columns], codes[slot, columns]
            most = np.uint32(0)
            for v in range(len(x)):
                most = max(most, np.uint32(_as_bits(x[v]) & MAGNITUDE))
            exponent = max(np.uint32(most + LEAST_PART) >> np.uint32(23), np.uint32(LEAST_EXPONENT))
            if exponent > 253:
                exponents[slot, block], own[:] = NO_NUMBER, 0
                continue
            exponents[slot, block] = exponent
            scale = _as_float(np.uint32(254 - exponent) << np.uint32(23))
            first = np.uint32(seed + np.uint32(block * BLOCK))
            for v in range(len(x)):
                bits = _as_bits(x[v])
                y = _as_float(np.uint32(bits & MAGNITUDE)) * scale
                low, by = (lowest, np.uint32(8)) if y < lowest else (ZERO, np.uint32(0))
                z = _as_bits(y + low)
                if key == NEAREST:
                    noise = np.uint32(NEAREST_PART + (z >> np.uint32(20) & np.uint32(1)))
                else:
                    noise = np.uint32(_mix(np.uint32(first + np.uint32(v))) >> np.uint32(12))
                code = np.uint32(np.uint32(np.uint32(z + noise) >> np.uint32(20)) - base - by)
                if signed:
                    own[v] = -np.int32(code) if x[v] < 0 else np.int32(code)
                else:
                    own[v] = max(code, np.uint32(y > 0))

    return encode


@intrinsic
def _as_float(_context, bits):
    """The float32 of these bits, uint32."""

    def generate(_context, builder, _signature, args):
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.uint32), generate


@intrinsic
def _as_bits(_context, x):
    """The bits of a float32, as uint32."""

    def generate(_context, builder, _signature, args):
        return builder.bitcast(args[0], ir.IntType(32))

    return types.uint32(types.float32), generate


@part
def _mix(x):
    """``tables.mix`` of a number in uint32."""
    x = np.uint32((x ^ x >> np.uint32(16)) * np.uint32(0x85EBCA6B))
    x = np.uint32((x ^ x >> np.uint32(13)) * np.uint32(0xC2B2AE35))
    return np.uint32(x ^ x >> np.uint32(16))


@intrinsic
def _prefetch_line(_context, values, _slot, _v):
    """Prefetch the cache line of ``values[slot, v]``."""

    def generate(context, builder, signature, args):
        array = context.make_array(signature.args[0])(context, builder, args[0])
        shape = cgutils.unpack_tuple(builder, array.shape)
        strides = cgutils.unpack_tuple(builder, array.strides)
        pointer = cgutils.get_item_pointer2(
            context, builder, array.data, shape, strides, "C", args[1:], wraparound=False
        )
        pointer = builder.bitcast(pointer, ir.IntType(8).as_pointer())
        i32 = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [pointer.type, i32, i32, i32])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        read, keep_in_l2, data = (ir.Constant(i32, flag) for flag in (0, 2, 1))
        builder.call(function, [pointer, read, keep_in_l2, data])
        return context.get_dummy_value()

    return types.void(values, types.intp, types.intp), generate


def _prefetch(values, slot):
    """Prefetch a row of the table; the processor cannot predict its address."""


@overload(_prefetch)
def _compile_prefetch(values, slot):
    if isinstance(values, types.BaseTuple):
        return lambda values, slot: _prefetch_row(values[0], slot)
    return lambda values, slot: _prefetch_row(values, slot)


@part
def _prefetch_row(values, slot):
    for v in range(0, values.shape[1], LINE // values.itemsize):
        _prefetch_line(values, slot, v)
