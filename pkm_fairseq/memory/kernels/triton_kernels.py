"""The programs of the triton backend, each compiled on first use.

One program sums each number, in one order, without atomics. So every run gives the same bits.
Programs never access memory out of range, whatever the slots are.
"""

import triton
import triton.language as tl

from .tables import FACTORS

FACTOR_VALUES, FACTOR_AVG, FACTOR_AVG_SQ = map(tl.constexpr, FACTORS)

# ---------------------------------------------------------------- search


@triton.jit
def topk_pairs(
    half_scores,
    rank1,
    rank2,
    scores,
    index1,
    index2,
    knn,
    n_keys,
    n_candidates,
    KEYS: tl.constexpr,  # noqa: N803
    KNN: tl.constexpr,  # noqa: N803
    CANDIDATES: tl.constexpr,  # noqa: N803
):
    """Search for one token and head; constants are the sizes rounded up to powers of two.

    half_scores (H, 2, N, S), pairs of ranks (C,); fills scores and sub-keys (N, H, K).
    """
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    tokens, heads = tl.num_programs(0), tl.num_programs(1)
    half1 = half_scores + (head * 2 * tokens + token) * n_keys
    half2 = half_scores + ((head * 2 + 1) * tokens + token) * n_keys
    best1, key1 = _best(half1, n_keys, KEYS, KNN)
    best2, key2 = _best(half2, n_keys, KEYS, KNN)  # (K,)

    c = tl.arange(0, CANDIDATES)
    real = c < n_candidates
    rank1 = tl.load(rank1 + c, mask=real, other=0).to(tl.int32)
    rank2 = tl.load(rank2 + c, mask=real, other=0).to(tl.int32)
    sums = tl.gather(best1, rank1, 0) + tl.gather(best2, rank2, 0)  # (C,)
    score, chosen = _unpack(tl.topk(_pack(sums, c, real), KNN))  # (K,)

    k = tl.arange(0, KNN)
    out = (token * heads + head) * knn + k
    tl.store(scores + out, score, mask=k < knn)
    chosen1 = tl.gather(key1, tl.gather(rank1, chosen, 0), 0)
    tl.store(index1 + out, chosen1.to(tl.int64), mask=k < knn)
    chosen2 = tl.gather(key2, tl.gather(rank2, chosen, 0), 0)
    tl.store(index2 + out, chosen2.to(tl.int64), mask=k < knn)


@triton.jit
def _best(
    half_scores,
    n_keys,
    KEYS: tl.constexpr,  # noqa: N803
    KNN: tl.constexpr,  # noqa: N803
):
    """The best half scores, descending, and their sub-keys."""
    key = tl.arange(0, KEYS)
    x = tl.load(half_scores + key, mask=key < n_keys, other=0)
    return _unpack(tl.topk(_pack(x, key, key < n_keys), KNN))


@triton.jit
def _pack(x, index, real):
    """Pack floats and indices into unique integers of the same order; NaN first, padding last."""
    image = x.to(tl.int32, bitcast=True)
    image ^= (image >> 31) & 0x7FFFFFFF  # for negative floats, larger bits mean a smaller number
    image = tl.where(x != x, 0x7FFFFFFF, image)
    image = tl.where(real, image, -0x80000000)
    return (image.to(tl.int64) << 32) | index.to(tl.int64)


@triton.jit
def _unpack(packed):
    """The floats and the indices that were packed."""
    image = (packed >> 32).to(tl.int32)
    bits = image ^ ((image >> 31) & 0x7FFFFFFF)
    return bits.to(tl.float32, bitcast=True), (packed & 0x7FFFFFFF).to(tl.int32)


@triton.jit
def grad_query(
    keys,
    index,
    grad_scores,
    grad_query,
    half,
    knn,
    n_keys,
    width,
    ROWS: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
):
    """``grad_query[n, h, half] = sum over k of grad_scores[n, h, k] * keys[h, half, index[k]]``."""
    token, head, heads = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    columns = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    query = token * heads + head
    keys += (head * 2 + half) * n_keys * width
    index += query * knn
    grad_scores += query * knn
    total = _weighted_rows(keys, index, grad_scores, n_keys, knn, width, columns, ROWS, BLOCK)
    tl.store(grad_query + (query * 2 + half) * width + columns, total, mask=columns < width)


@triton.jit
def grad_half_scores(
    index,
    grad_scores,
    grad_half,
    half,
    knn,
    n_keys,
    BLOCK: tl.constexpr,  # noqa: N803
):
    """``grad_half[h, half, n, s] = sum over k with index[n, h, k] == s of grad_scores[n, h, k]``.

    Comparing every sub-key with every index avoids atomics.
    """
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    tokens, heads = tl.num_programs(0), tl.num_programs(1)
    key = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    first = (token * heads + head) * knn
    total = tl.zeros([BLOCK], grad_half.dtype.element_ty)
    for k in range(knn):
        grad = tl.load(grad_scores + first + k)
        total += tl.where(key == tl.load(index + first + k), grad, 0.0)
    out = grad_half + ((head * 2 + half) * tokens + token) * n_keys + key
    tl.store(out, total, mask=key < n_keys)


# ---------------------------------------------------------------- values


@triton.jit
def gather_sum(
    values,
    slots,
    weights,
    out,
    n_slots,
    reads,
    width,
    ROWS: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
):
    """``out[n] = sum over t of weights[n, t] * values[slots[n, t]]``, a token and some columns."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    slots += token * reads
    weights += token * reads
    total = _weighted_rows(values, slots, weights, n_slots, reads, width, columns, ROWS, BLOCK)
    tl.store(out + token * width + columns, total, mask=columns < width)


@triton.jit
def _weighted_rows(
    table,
    slots,
    weights,
    n_slots,
    reads,
    width,
    columns,
    ROWS: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
):
    """``sum over t of weights[t] * table[slots[t]]``; NaN if a slot is out of range."""
    total = tl.zeros([ROWS, BLOCK], weights.dtype.element_ty)
    for start in range(0, reads, ROWS):  # several rows in flight hide the latency of memory
        t = start + tl.arange(0, ROWS)
        slot = tl.load(slots + t, mask=t < reads, other=0)
        weight = tl.load(weights + t, mask=t < reads, other=0)
        valid = (slot >= 0) & (slot < n_slots)
        weight = tl.where(valid, weight, float("nan"))
        inside = (valid & (t < reads))[:, None] & (columns < width)[None, :]
        rows = tl.load(table + slot[:, None] * width + columns[None, :], mask=inside, other=0)
        total += weight[:, None] * rows.to(total.dtype)
    return tl.sum(total, axis=0)


@triton.jit
def gather_dot(
    values,
    slots,
    grad_read,
    out,
    n_slots,
    reads,
    width,
    ROWS: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
):
    """``out[n, t] = values[slots[n, t]] . grad_read[n]``, a token and some of its reads."""
    token = tl.program_id(0).to(tl.int64)
    t = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    slot = tl.load(slots + token * reads + t, mask=t < reads, other=0)
    valid = (slot >= 0) & (slot < n_slots)
    total = tl.zeros([ROWS, BLOCK], grad_read.dtype.element_ty)
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        grad = tl.load(grad_read + token * width + columns, mask=columns < width, other=0)
        inside = (valid & (t < reads))[:, None] & (columns < width)[None, :]
        rows = tl.load(values + slot[:, None] * width + columns[None, :], mask=inside, other=0)
        total += rows.to(total.dtype) * grad[None, :]
    product = tl.where(valid, tl.sum(total, axis=1), float("nan"))
    tl.store(out + token * reads + t, product, mask=t < reads)


@triton.jit
def adam_rows(
    values,
    exp_avg,
    exp_avg_sq,
    slots,
    weights,
    bags,
    grads,
    n_slots,
    n_entries,
    width,
    step_size: tl.float64,  # scalars are float32 by default
    beta1: tl.float64,
    gain1: tl.float64,
    beta2: tl.float64,
    gain2: tl.float64,
    eps: tl.float64,
    key: tl.int64,
    first_column: tl.int64,
    ROWS: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
):
    """Adam on a row whose gradient has a non-zero element; gains are 1 - beta.

    There is one program per entry. Entries are sorted by slot, and the program of a slot's first
    entry does the work for all of them. BLOCK must cover a whole row, because only the whole
    gradient of a row shows whether it has a non-zero element.
    """
    slot, is_first = _first_of_slot(slots)
    if is_first & (slot >= 0) & (slot < n_slots):
        columns = tl.arange(0, BLOCK)
        number = grads.dtype.element_ty
        entries = slots, weights, bags, grads, n_entries
        g = _row_gradient(entries, slot, width, columns, ROWS, BLOCK).to(number)
        if tl.max((g != 0).to(tl.int32)) != 0:
            inside = columns < width
            row = slot * width + columns
            avg = tl.load(exp_avg + row, mask=inside, other=0).to(number)
            avg_sq = tl.load(exp_avg_sq + row, mask=inside, other=0).to(number)
            value = tl.load(values + row, mask=inside, other=0).to(number)
            avg = tl.full((), beta1, number) * avg + tl.full((), gain1, number) * g
            avg_sq = tl.full((), beta2, number) * avg_sq + tl.full((), gain2, number) * g * g
            root = _sqrt(avg_sq) + tl.full((), eps, number)
            value -= _divide(tl.full((), step_size, number) * avg, root)
            seed = _mix(slot.to(tl.uint32) ^ key.to(tl.uint32))
            chance = _mix(seed + (columns + first_column).to(tl.uint32))
            value = _round(value, values.dtype.element_ty, chance, FACTOR_VALUES, key)
            avg = _round(avg, exp_avg.dtype.element_ty, chance, FACTOR_AVG, key)
            avg_sq = _round(avg_sq, exp_avg_sq.dtype.element_ty, chance, FACTOR_AVG_SQ, key)
            tl.store(exp_avg + row, avg, mask=inside)
            tl.store(exp_avg_sq + row, avg_sq, mask=inside)
            tl.store(values + row, value, mask=inside)


@triton.jit
def row_squares(
    slots,
    weights,
    bags,
    grads,
    squares,
    n_entries,
    width,
    ROWS: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
):
    """The squared norm of each row's gradient, at the first entry of its slot."""
    slot, is_first = _first_of_slot(slots)
    if is_first:
        entries = slots, weights, bags, grads, n_entries
        g = _row_gradient(entries, slot, width, tl.arange(0, BLOCK), ROWS, BLOCK).to(tl.float64)
        tl.store(squares + tl.program_id(0), tl.sum(g * g))


@triton.jit
def _first_of_slot(slots):
    """The slot of this program's entry, and whether it is the first entry of that slot."""
    e = tl.program_id(0)
    slot = tl.load(slots + e)
    before = tl.load(slots + e - 1, mask=e > 0, other=0)
    return slot, (e == 0) | (before != slot)


@triton.jit
def _row_gradient(
    entries,
    slot,
    width,
    columns,
    ROWS: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
):
    """Sum the entries of a slot; they are contiguous and begin with this program's entry."""
    slots, weights, bags, grads, n_entries = entries
    total = tl.zeros([ROWS, BLOCK], grads.dtype.element_ty)
    start = tl.program_id(0)
    more = start >= 0
    while more:
        e = start + tl.arange(0, ROWS)
        same = tl.load(slots + e, mask=e < n_entries, other=0) == slot
        same = same & (e < n_entries)
        bag = tl.load(bags + e, mask=same, other=0)
        weight = tl.load(weights + e, mask=same, other=0).to(total.dtype)
        inside = same[:, None] & (columns < width)[None, :]
        rows = tl.load(grads + bag[:, None] * width + columns[None, :], mask=inside, other=0)
        total += weight[:, None] * rows
        start += ROWS
        more = tl.min(same.to(tl.int32)) == 1
    return tl.sum(total, axis=0)


@triton.jit
def _sqrt(x):
    """The root rounded to nearest; for float32, plain ``sqrt`` may round otherwise."""
    root = tl.sqrt(x) if x.dtype == tl.float64 else tl.sqrt_rn(x)
    return root


@triton.jit
def _divide(x, y):
    """The quotient rounded to nearest; for float32, plain ``/`` may round otherwise."""
    quotient = x / y if x.dtype == tl.float64 else tl.div_rn(x, y)
    return quotient


@triton.jit
def _round(x, number: tl.constexpr, chance, factor: tl.constexpr, key):
    """Round a row to its table's dtype; a key of -1 rounds bfloat16 to nearest, ties to even."""
    if number == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        noise = (chance * tl.full((), factor, tl.uint32) >> 16).to(tl.int32)
        noise = tl.where(key < 0, 0x7FFF + ((bits >> 16) & 1), noise)
        bits = (bits + noise) >> 16 << 16  # by hand: the interpreter truncates to bfloat16
        x = tl.where(x != x, float("nan"), bits.to(tl.float32, bitcast=True))
    return x.to(number)


@triton.jit
def _mix(x):
    """``tables.mix`` of numbers in uint32."""
    x = (x ^ (x >> 16)) * tl.full((), 0x85EBCA6B, tl.uint32)
    x = (x ^ (x >> 13)) * tl.full((), 0xC2B2AE35, tl.uint32)
    return x ^ (x >> 16)
