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
from .tables import FACTORS, NEAREST

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
        for token in range(task * n // tasks, (task + 1) * n // tasks):
            total, slot, w = out[token], slots[token], weights[token]
            total[:] = 0
            for t in range(0, whole, 8):  # eight rows in flight hide the latency of memory
                row0, row1 = values[slot[t]], values[slot[t + 1]]
                row2, row3 = values[slot[t + 2]], values[slot[t + 3]]
                row4, row5 = values[slot[t + 4]], values[slot[t + 5]]
                row6, row7 = values[slot[t + 6]], values[slot[t + 7]]
                w0, w1, w2, w3 = w[t], w[t + 1], w[t + 2], w[t + 3]
                w4, w5, w6, w7 = w[t + 4], w[t + 5], w[t + 6], w[t + 7]
                for v in range(width):
                    x0, x1 = w0 * _wide(row0[v]), w1 * _wide(row1[v])
                    x2, x3 = w2 * _wide(row2[v]), w3 * _wide(row3[v])
                    x4, x5 = w4 * _wide(row4[v]), w5 * _wide(row5[v])
                    x6, x7 = w6 * _wide(row6[v]), w7 * _wide(row7[v])
                    total[v] += (x0 + x1 + x2 + x3) + (x4 + x5 + x6 + x7)
            for t in range(whole, reads):
                row = values[slot[t]]
                for v in range(width):
                    total[v] += w[t] * _wide(row[v])


@kernel
def gather_dot(values, rows, starts, order, grad_read, reads, out, tasks):
    """``out[e] = values[slot of e] . grad_read[e // reads]``, fetching each row once."""
    width = values.shape[1]
    bounds = _shares(starts, tasks)
    for task in numba.prange(tasks):
        for r in range(bounds[task], bounds[task + 1]):
            _prefetch(values, rows[min(r + 1, len(rows) - 1)])
            row = values[rows[r]]
            for e in range(starts[r], starts[r + 1]):
                grad = grad_read[order[e] // reads]
                total = out.dtype.type(0)
                for v in range(width):
                    total += _wide(row[v]) * grad[v]
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
    first_column,
    tasks,
):
    """Adam on the rows whose gradient has a non-zero element; gains are 1 - beta."""
    width = grads.shape[1]
    settings, chance = (step_size, beta1, gain1, beta2, gain2, eps), (key, first_column)
    bounds = _shares(starts, tasks)
    for task in numba.prange(tasks):
        gradient, wide = np.empty(width, grads.dtype), np.empty((2, width), grads.dtype)
        for r in range(bounds[task], bounds[task + 1]):
            if not _row_gradient(r, starts, order, bags, weights, grads, gradient):
                continue
            ahead = rows[min(r + 1, len(rows) - 1)]
            _prefetch(values, ahead)
            _prefetch(exp_avg, ahead)
            _prefetch(exp_avg_sq, ahead)
            _adam_row(values, exp_avg, exp_avg_sq, rows[r], gradient, wide, settings, chance)


def _adam_row(values, exp_avg, exp_avg_sq, slot, gradient, wide, settings, chance):
    """Adam on a row. Each number is widened, moved and rounded in one go, except in 8 bits."""


@overload(_adam_row)
def _compile_adam_row(values, exp_avg, exp_avg_sq, slot, gradient, wide, settings, chance):
    if isinstance(exp_avg, types.BaseTuple):
        return _adam_row_in_8_bits

    def adam_row(values, exp_avg, exp_avg_sq, slot, gradient, wide, settings, chance):
        step_size, beta1, gain1, beta2, gain2, eps = settings
        seed = _seed(slot, chance)
        row, row_avg, row_avg_sq = values[slot], exp_avg[slot], exp_avg_sq[slot]
        for v in range(len(gradient)):
            g, bits = gradient[v], _mix(np.uint32(seed + np.uint32(v)))
            avg = beta1 * _wide(row_avg[v]) + gain1 * g
            avg_sq = beta2 * _wide(row_avg_sq[v]) + gain2 * g * g
            x = _wide(row[v]) - step_size * avg / (np.sqrt(avg_sq) + eps)
            _store(row, v, x, chance, bits, FACTORS[0])
            _store(row_avg, v, avg, chance, bits, FACTORS[1])
            _store(row_avg_sq, v, avg_sq, chance, bits, FACTORS[2])

    return adam_row


def _adam_row_in_8_bits(values, exp_avg, exp_avg_sq, slot, gradient, wide, settings, chance):
    """``_adam_row`` with moments in a ``Float8Table``, whose blocks are coded as a whole."""
    step_size, beta1, gain1, beta2, gain2, eps = settings
    seed, row = _seed(slot, chance), values[slot]
    avg, avg_sq = wide[0], wide[1]  # unpacked, they would not vectorise
    _decode(exp_avg, slot, avg)
    _decode(exp_avg_sq, slot, avg_sq)
    for v in range(len(gradient)):
        g = gradient[v]
        avg[v] = beta1 * avg[v] + gain1 * g
        avg_sq[v] = beta2 * avg_sq[v] + gain2 * g * g
        x = _wide(row[v]) - step_size * avg[v] / (np.sqrt(avg_sq[v]) + eps)
        _store(row, v, x, chance, _mix(np.uint32(seed + np.uint32(v))), FACTORS[0])
    _encode(exp_avg, slot, avg, chance, seed, FACTORS[1])
    _encode(exp_avg_sq, slot, avg_sq, chance, seed, FACTORS[2])


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


def _wide(x):
    """A number of a table, as float32 if it is stored in bfloat16 or int8."""


@overload(_wide)
def _compile_wide(x):
    if x == types.int8:
        return lambda x: np.float32(x)
    if x == types.uint16:
        return lambda x: _as_float(np.uint32(x) << np.uint32(16))
    return lambda x: x


def _store(row, v, x, chance, bits, factor):
    """Write a number to a row of a table.

    To bfloat16 it is rounded with random bits, or to nearest if the key in ``chance`` is
    ``NEAREST``.
    """


@overload(_store)
def _compile_store(row, v, x, chance, bits, factor):
    if row.dtype != types.uint16:

        def keep(row, v, x, chance, bits, factor):
            row[v] = x

        return keep

    def narrow(row, v, x, chance, bits, factor):
        exact = _as_bits(x)
        noise = np.uint32(bits * np.uint32(factor)) >> np.uint32(16)
        if chance[0] == NEAREST:
            noise = np.uint32(0x7FFF) + (exact >> np.uint32(16) & np.uint32(1))
        rounded = np.uint16(np.uint32(exact + noise) >> np.uint32(16))
        row[v] = NAN_BFLOAT16 if x != x else rounded

    return narrow


@part
def _seed(slot, chance):
    """What the hash of a slot's first column starts from; see ``tables.StochasticRounding``."""
    key, first_column = chance
    return np.uint32(_mix(np.uint32(slot) ^ np.uint32(key)) + np.uint32(first_column))


def _decode(values, slot, wide):
    """Read a row of a ``Float8Table``, given as its codes and exponents."""


@overload(_decode)
def _compile_decode(values, slot, wide):
    signed = values[0].dtype.signed
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

    return decode


def _encode(values, slot, row, chance, seed, factor):
    """Round a row to the numbers of a ``Float8Table``, and write it; see ``float8.encode``."""


@overload(_encode)
def _compile_encode(values, slot, row, chance, seed, factor):
    signed = values[0].dtype.signed
    lowest, base = np.float32(limits(signed)[0]), np.uint32(limits(signed)[1])

    def encode(values, slot, row, chance, seed, factor):
        codes, exponents = values
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
                y = _as_float(np.uint32(_as_bits(x[v]) & MAGNITUDE)) * scale
                low, by = (lowest, np.uint32(8)) if y < lowest else (ZERO, np.uint32(0))
                z = _as_bits(y + low)
                if chance[0] == NEAREST:
                    noise = np.uint32(NEAREST_PART + (z >> np.uint32(20) & np.uint32(1)))
                else:
                    bits = _mix(np.uint32(first + np.uint32(v)))
                    noise = np.uint32(np.uint32(bits * np.uint32(factor)) >> np.uint32(12))
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
