# SPDX-License-Identifier: MIT
# dsa.py 0.1.0.  Copy this file alone, or with dsa_kernels.cu for the GPU, into any project.
"""DeepSeek Sparse Attention: NumPy to read, CUDA to run.

    I[t,s] = sum_j weights[t,j] * relu(index_q[t,j] . index_k[s])         (1)  index_scores
    S[t]   = the top_k keys of row t by I, ties to the lowest index        (2)  select_topk
    out[t] = softmax over S[t] of (scale * q[t] . k[s])  @  v[s]           (3)  sparse_attention

A cheap indexer (1) scores every earlier token for each query, the best top_k are kept (2), and exact
attention runs over only those (3). The cost of attention falls from T*S to T*top_k, and as top_k reaches S
the result is dense attention. The paper: "DeepSeek-V3.2: Pushing the Frontier of Open Large Language Models".

Axes     ... any number of batch axes, also none   T queries   S keys   K = min(top_k, S) kept keys
         H query heads   G key/value heads: query head h reads group h // (H / G), G = 1 is multi-query
         D query/key width   Dv value width   J index heads   E index width
Windows  k_start, k_end: integers [..., T]. Query t may see the keys s with k_start[t] <= s < k_end[t]; by
         default causal and aligned at the end: k_start = 0, k_end[t] = S - T + t + 1 (in select_topk all
         keys). This one pair says causality, padding, packed sequences, chunked prefill and decode.
Indices  kept keys ascending, then -1. A query without keys has out 0 and lse -inf, and merges as nothing.
Numbers  float16, bfloat16 and float32 accumulate in float32, float64 in float64. `out` has the dtype of q.
Errors   TypeError: the wrong kind of object or dtype. ValueError: a wrong shape or value. IndexError: a key
         that does not exist. Each names the argument, its value and what was expected, and changes nothing.
GPU      the same functions take CuPy arrays of the current device, and launch the kernels of dsa_kernels.cu
         (section 12) on the current stream. The stages do not wait for results, so what stands in an array
         is no error there: an index that is no key is absent, NaN is never selected.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import functools
import inspect
import json
import math
import numbers
import operator
import os
import re
import sys
import tempfile
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

__version__ = "0.1.0"

# ----------------------------------------------------------------------------------------------------------
# 1. Arrays: how they are checked, and the threads that work on them
# ----------------------------------------------------------------------------------------------------------

KEY_TILE = 512  # keys that are multiplied at a time, by about as many rows: 1 MB of float32, an L2 cache
ROW_BUFFER = 2**22  # scores of a block of queries that are held at a time
FLOATS = ("float16", "bfloat16", "float32", "float64")


def _library(name, x, others=None):
    """numpy or cupy, whose array x is, as the others are; CuPy is never imported to find out."""
    cupy = sys.modules.get("cupy", np)
    isarray = isinstance(x, (np.ndarray, cupy.ndarray))
    _expect(isarray, name, f"a {type(x).__module__}.{type(x).__name__}", "a NumPy or CuPy array", TypeError)
    xp = np if isinstance(x, np.ndarray) else cupy
    others = others or xp
    _expect(xp is others, name, f"a {xp.__name__} array", f"one of {others.__name__}, as others", TypeError)
    return xp


def _expect(ok, name, value, expected, error=ValueError):
    if not ok:
        raise error(f"{name} is {value}, expected {expected}")


def _check_type(name, x, kind):
    _expect(isinstance(x, kind), name, f"a {type(x).__name__}", f"a {kind.__name__}", TypeError)


def _dims(xp=None, **arrays):
    """Check q=(q, "... T H D"), ... against each other -> the size of each axis; "..." is the batch shape,
    "xp" the library of the arrays, numpy or cupy.
    """
    n: dict[str, Any] = {}
    owner: dict[str, str] = {}
    for name, (x, axes, *dtypes) in arrays.items():
        n["xp"] = xp = _library(name, x, xp)
        allowed = dtypes or FLOATS
        _expect(x.dtype.name in allowed, name, f"of dtype {x.dtype}", f"one of {allowed}", TypeError)
        batch, last = axes.startswith("..."), axes.replace("...", "").split()
        lead = x.ndim - len(last)
        fits = lead == 0 or (lead > 0 and batch)
        _expect(fits, name, f"of shape {x.shape}", f"axes [{', '.join(axes.split())}]")
        for axis, size in zip(["..."] * batch + last, [x.shape[:lead]] * batch + list(x.shape[lead:])):
            if n.setdefault(axis, size) != size:
                raise ValueError(f"{name} has {axis} = {size}, but {owner[axis]} has {axis} = {n[axis]}")
            owner.setdefault(axis, name)
    if "H" in n and "G" in n:
        _expect(n["G"] and n["H"] % n["G"] == 0, "G", f"{n['G']} in k", f"a divisor of H = {n['H']} in q")
    return n


def _accumulator(*arrays):
    return np.dtype(np.float64 if any(x.dtype == np.float64 for x in arrays) else np.float32)


def _check_integers(name, x, xp=np):
    _library(name, x, xp)
    _expect(x.dtype.kind in "iu", name, f"of dtype {x.dtype}", "integers", TypeError)


def _check_indices(name, indices, n):
    _check_integers(name, indices, n.get("xp", np))
    shape = (*n["..."], n["T"])
    _expect(indices.shape[:-1] == shape, name, f"of shape {indices.shape}", f"{(*shape, 'K')}")
    looked_at = indices.size and isinstance(indices, np.ndarray)  # on a GPU that would wait for it
    for key in (indices.min(), indices.max()) if looked_at else ():
        _expect(-1 <= key < n["S"], f"a key in {name}", key, f"-1 or a key in [0, {n['S']})", IndexError)


def _integer(name, value, least):
    index = None if isinstance(value, bool) else getattr(value, "__index__", None)
    _expect(index, name, repr(value), "an integer", TypeError)
    number = operator.index(value)
    _expect(number >= least, name, number, f"at least {least}")
    return number


def _quota(top_k, local_window, num_sink_tokens):
    forced = (_integer("local_window", local_window, 0), _integer("num_sink_tokens", num_sink_tokens, 0))
    top_k = _integer("top_k", top_k, 1)
    both = "local_window + num_sink_tokens"
    _expect(sum(forced) <= top_k, both, f"{forced[0]} + {forced[1]}", f"at most top_k = {top_k}")
    return (top_k, *forced)


_num_threads: int | None = None
_blas_lock = threading.Lock()
_blas_users: list[Any] = []  # one entry for each call under way; the first can give BLAS its threads back


def set_num_threads(n):
    """Work on blocks of queries with n threads, by default (None) one per CPU. No bit of a result changes."""
    global _num_threads
    _num_threads = None if n is None else _integer("n", n, 1)


def get_num_threads():
    """The number of threads that work on blocks of queries.

    >>> set_num_threads(2); get_num_threads()
    2
    >>> set_num_threads(None)
    """
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return cpus if _num_threads is None else _num_threads


@functools.cache
def _blas():
    try:
        from threadpoolctl import ThreadpoolController
    except ImportError:
        return None
    return ThreadpoolController()


@contextlib.contextmanager
def _one_blas_thread():
    """Hold BLAS to one thread, as its threads and ours would fight for the cores; yields if that worked."""
    if (blas := _blas()) is None:
        yield False
        return
    with _blas_lock:
        _blas_users.append(None if _blas_users else blas.limit(limits=1, user_api="blas"))
    try:
        yield True
    finally:
        with _blas_lock:
            if len(_blas_users) == 1:
                _blas_users[0].restore_original_limits()
            _blas_users.pop()


def _for_blocks(batch, num_queries, block, work, add=lambda b, result: None):
    """Call work(b, t0, t1) for each batch entry b and block of queries, whatever the number of threads.

    What it returns goes to add(b, result) in the order of the blocks, one at a time: so are sums over queries
    taken, whose bits would otherwise depend on who comes first.
    """

    def run(b, t):
        with np.errstate(all="ignore"):  # the code answers for -inf - -inf and the like
            return b, work(b, t, min(t + block, num_queries))

    jobs = [(b, t) for b in np.ndindex(*batch) for t in range(0, num_queries, block)]
    with np.errstate(all="ignore"), _one_blas_thread() as alone:
        threads = min(get_num_threads(), len(jobs)) if alone else 1
        if threads <= 1:
            for job in jobs:
                add(*run(*job))
            return
        with ThreadPoolExecutor(threads) as pool:
            # So few are under way that results which wait to be added take little memory.
            under_way: collections.deque = collections.deque()
            for job in jobs:
                under_way.append(pool.submit(run, *job))
                if len(under_way) > 2 * threads:
                    add(*under_way.popleft().result())
            for done in under_way:  # an error in a thread is raised here, or above
                add(*done.result())


# ----------------------------------------------------------------------------------------------------------
# 2. Windows: which keys a query may see
# ----------------------------------------------------------------------------------------------------------


def _windows(n, k_start, k_end):
    """k_start and k_end as int64 [..., T], clipped to the real keys, with the causal default filled in.

    On a GPU int32, and None for a default, which kernels know.
    """
    shape, xp = (*n["..."], n["T"]), n.get("xp", np)
    causal = np.arange(n["T"]) + (n["S"] - n["T"] + 1)
    windows = []
    for name, w, default in (("k_start", k_start, np.zeros_like(causal)), ("k_end", k_end, causal)):
        if w is None:
            windows.append(np.broadcast_to(default.clip(0), shape) if xp is np else None)
            continue
        _check_integers(name, w, xp)
        fits = 0 < w.ndim <= len(shape) and w.shape[-1] == n["T"]
        fits = fits and all(a in (1, b) for a, b in zip(w.shape[::-1], shape[::-1]))
        _expect(fits, name, f"of shape {w.shape}", f"{shape}")
        w = xp.minimum(w, w.dtype.type(min(n["S"], np.iinfo(w.dtype).max)))
        w = xp.broadcast_to(xp.maximum(w.astype(np.int64), 0), shape)
        windows.append(w if xp is np else xp.ascontiguousarray(w, np.int32))
    return tuple(windows)


def _explicit(n, windows):
    """Windows that stand for a default on a GPU, as arrays."""
    if n["xp"] is np:
        return windows
    defaults = _windows({**n, "xp": np}, None, None)
    return tuple(n["xp"].asarray(default) if w is None else w for w, default in zip(windows, defaults))


def _span(start, end):
    """The range of keys that a block of windows touches; (0, 0) if they are all empty."""
    seen = start < end
    return (int(start[seen].min()), int(end[seen].max())) if seen.any() else (0, 0)


def padded_window(lengths, num_queries):
    """Causal windows of a right-padded batch: lengths [B] -> k_start, k_end [B, T]; padding sees nothing.

    >>> padded_window(np.array([3, 1]), 3)[1].tolist()
    [[1, 2, 3], [1, 0, 0]]
    """
    num_queries = _integer("num_queries", num_queries, 0)
    lengths = _lengths(lengths, most=num_queries)
    end = _causal_end(np.zeros_like(lengths), lengths, num_queries)
    return np.zeros_like(end), end


def _causal_end(start, lengths, num_queries):
    """k_end [B, T] of sequences with lengths[b] new tokens behind start[b] others; padding sees nothing."""
    t = np.arange(num_queries)
    return np.where(t < lengths[:, None], start[:, None] + t + 1, 0)


def _every_key(windows, width):
    """The indices of all keys in windows [..., T], of at most `width` -> [..., T, width] int32."""
    start, end = windows
    keys = start[..., None] + _library("k_start", start).arange(width)
    return np.where(keys < end[..., None], keys, -1).astype(np.int32)


def packed_window(lengths):
    """Causal windows of sequences laid end to end: lengths [B] -> k_start, k_end [sum of lengths].

    >>> [w.tolist() for w in packed_window(np.array([3, 2]))]
    [[0, 0, 0, 3, 3], [1, 2, 3, 4, 5]]
    """
    lengths = _lengths(lengths)
    return np.repeat(np.cumsum(lengths) - lengths, lengths), np.arange(lengths.sum()) + 1


def pad_batch(sequences, multiple=64):
    """Right-pad arrays [T_i, ...] with zeros to one [B, T, ...], T a multiple of `multiple`; and lengths [B].

    >>> padded, lengths = pad_batch([np.ones(3), np.ones(1)], multiple=4)
    >>> padded.tolist(), lengths.tolist()
    ([[1.0, 1.0, 1.0, 0.0], [1.0, 0.0, 0.0, 0.0]], [3, 1])
    """
    multiple = _integer("multiple", multiple, 1)
    _expect(len(sequences), "sequences", "empty", "at least one array")
    for i, x in enumerate(sequences):
        _dims(**{f"sequences[{i}]": (x, "...")})
        like = x.ndim > 0 and (x.shape[1:], x.dtype) == (sequences[0].shape[1:], sequences[0].dtype)
        _expect(like, f"sequences[{i}]", f"{x.dtype} of shape {x.shape}", f"[T_i, *{sequences[0].shape[1:]}]")
    lengths = np.array([len(x) for x in sequences])
    longest = -(-int(lengths.max()) // multiple) * multiple
    padded = np.zeros_like(sequences[0], shape=(len(sequences), longest, *sequences[0].shape[1:]))
    for row, x in zip(padded, sequences):
        row[: len(x)] = x
    return padded, lengths


def _lengths(lengths, batch=None, most=None):
    """lengths as int64 [B], each at least 0 and at most `most`; None in a batch: `most` everywhere."""
    if lengths is None and batch is not None and most is not None:
        return np.full(batch, most)
    lengths = np.asarray(lengths)
    _check_integers("lengths", lengths)
    fits = lengths.ndim == 1 and batch in (None, len(lengths))
    _expect(fits, "lengths", f"of shape {lengths.shape}", "[B]" if batch is None else f"{(batch,)}")
    fits = (lengths >= 0).all() and (most is None or (lengths <= most).all())
    _expect(fits, "lengths", lengths.tolist(), "0 or more" if most is None else f"0 to {most}")
    return lengths.astype(np.int64)


# ----------------------------------------------------------------------------------------------------------
# 3. The lightning indexer, equation (1)
# ----------------------------------------------------------------------------------------------------------


def index_scores(index_q, index_k, weights, *, k_start=None, k_end=None):
    """Equation (1), the relevance of every key to every query (V3.2 report, eq. 1). There is no hidden scale.

    index_q [..., T, J, E], index_k [..., S, E], weights [..., T, J] of either sign
    -> scores [..., T, S], float32 (float64 for float64 input), -inf outside the window
    In fp8, index_q holds e4m3 codes, uint8, whose scales are in the weights, and index_k [..., S, E + 4] the
    entries of a KVCache(storage="fp8"), codes and a scale: relu(q8 . k8) * weights, summed, times the scale.

    >>> q, k, w = np.array([[[1.0], [-1.0]]]), np.array([[2.0], [-3.0]]), np.array([[1.0, 0.5]])
    >>> index_scores(q, k, w)                      # key 0: 1 * relu(2);  key 1: 0.5 * relu(3)
    array([[2. , 1.5]])
    """
    n, windows, index_q, index_k = _index_dims(index_q, index_k, weights, k_start, k_end)
    return _index_scores(n, index_q, index_k, weights, windows)


def _index_scores(n, index_q, index_k, weights, windows, place=0):
    """index_scores, where key 0 of each batch entry stands at column place[b] of a tile."""
    if n["xp"] is not np:
        return _gpu_index_scores(n, index_q, index_k, weights, windows)
    scores = np.full((*n["..."], n["T"], n["S"]), -np.inf, _accumulator(index_q, index_k, weights))
    rows = _lightning_rows(index_q, index_k, weights, windows, place)

    def work(b, t0, t1):
        for t, keys, x in rows(b, t0, t1):
            if len(keys):
                scores[b][t : t + len(x), keys[0] : keys[-1] + 1] = x

    _for_blocks(n["..."], n["T"], _score_rows(n), work)
    return scores


def _index_dims(index_q, index_k, weights, k_start, k_end):
    """Check, and decode e4m3 codes unless a kernel does -> sizes, windows, index_q, index_k."""
    coded = getattr(index_q, "dtype", None) == np.uint8
    entry, *dtypes = ("entry", "uint8") if coded else ("E",)
    arrays = {"index_q": (index_q, "... T J E", *dtypes), "index_k": (index_k, f"... S {entry}", *dtypes)}
    n = _dims(**arrays, weights=(weights, "... T J"))
    if coded:
        fits, entries = n["entry"] == n["E"] + 4 and n["E"] <= FP8_BLOCK, f"[..., S, E + 4] with E = {n['E']}"
        _expect(fits, "index_k", f"of shape {index_k.shape}", f"{entries} of at most 128")
        if n["xp"] is np:
            index_q, index_k = E4M3[index_q], _unpack(index_k, n["E"], 0)
    return n, _windows(n, k_start, k_end), index_q, index_k


def _score_rows(n):
    """How many queries to score at a time."""
    return max(1, min(64, KEY_TILE // max(1, n["J"]), ROW_BUFFER // max(1, n["S"])))


def _score_block(index_q, index_k, weights, lo, hi, place=0):
    """Equation (1) for a block of queries [T, J, E] and the keys lo..hi of index_k [S, E] -> [T, hi - lo].

    The order in which BLAS adds up a product may depend on the shape of the call and on the place in it. So
    all calls are alike, one query by KEY_TILE keys from a multiple of KEY_TILE on, and a score has the same
    bits in any batch, block or chunk; and in any shard, whose key 0 stands at column `place` of a tile.
    """
    dtype = _accumulator(index_q, index_k, weights)
    T, J, E = index_q.shape
    lo, hi = lo + place, hi + place  # columns, from the start of key 0's tile on
    first, last = lo - lo % KEY_TILE, -(-hi // KEY_TILE) * KEY_TILE
    q = index_q.astype(dtype, order="C")  # [T, J, E]
    w = weights.astype(dtype, order="C")[:, None, :]  # [T, 1, J]
    keys, zero = np.zeros_like(q, shape=(E, KEY_TILE)), np.zeros_like(q, shape=KEY_TILE)
    r, scores = np.empty_like(q, shape=(T, J, KEY_TILE)), np.empty_like(q, shape=(T, 1, last - first))
    for s in range(first, last, KEY_TILE):
        tile = index_k[max(0, s - place) : max(0, s - place + KEY_TILE)]
        column = max(0, place - s)
        keys[:, column : column + len(tile)] = tile.T
        np.matmul(q, keys, out=r)  # [T, J, KEY_TILE]
        np.maximum(r, zero, out=r)  # four times as fast as with the scalar 0
        np.matmul(w, r, out=scores[:, :, s - first : s - first + KEY_TILE])  # [T, 1, KEY_TILE]            (1)
    return scores[:, 0, lo - first : hi - first]


class Explanation(NamedTuple):
    """Why a query kept a key or not, see explain."""

    contributions: Any  # [J], what each index head adds to the score
    score: float
    rank: int  # 0 is the first in the order (-score, index): a plain top_k keeps the key if top_k > rank
    num_visible: int


def explain(index_q, index_k, weights, t, s, *, k_start=None, k_end=None):
    """What each head adds to the score of key s for query t, and the key's rank among those that t sees.

    index_q [T, J, E], index_k [S, E], weights [T, J] -> Explanation. ValueError where t does not see s.

    >>> q, k, w = np.array([[[1.0], [-1.0]]]), np.array([[2.0], [-3.0]]), np.array([[1.0, 0.5]])
    >>> explain(q, k, w, 0, 1)
    Explanation(contributions=array([0. , 1.5]), score=1.5, rank=1, num_visible=2)
    """
    n, (start, end), index_q, index_k = _index_dims(index_q, index_k, weights, k_start, k_end)
    _expect(n["..."] == (), "index_q", f"of shape {index_q.shape}", "[T, J, E] without batch axes")
    t, s = _integer("t", t, 0), _integer("s", s, 0)
    _expect(t < n["T"], "t", t, f"a query below T = {n['T']}")
    _expect(start[t] <= s < end[t], "s", s, f"a key in the window [{start[t]}, {end[t]}) of query {t}")
    row = slice(t, t + 1)
    x = index_scores(index_q[row], index_k, weights[row], k_start=start[row], k_end=end[row])[0]  # [S]
    parts = weights[t] * np.maximum(index_q[t].astype(x.dtype) @ index_k[s].astype(x.dtype), 0)  # [J]
    rank = int((x > x[s]).sum() + (x[:s] == x[s]).sum())
    return Explanation(parts, float(x[s]), rank, int(end[t] - start[t]))


# ----------------------------------------------------------------------------------------------------------
# 4. Selection, equation (2), and every selector
# ----------------------------------------------------------------------------------------------------------


def select_topk(scores, top_k, *, local_window=0, num_sink_tokens=0, k_start=None, k_end=None):
    """Equation (2): of each row's visible keys, the first top_k in the order (-score, index).

    scores [..., T, S]. Without windows every score above -inf is visible; -inf is never selected.
    The last local_window and the first num_sink_tokens visible keys are always kept, and count towards top_k.
    -> indices [..., T, K] int32: kept keys ascending, then -1. ValueError for NaN inside a window.

    >>> select_topk(np.array([[3.0, 1.0, 3.0, 2.0], [1.0, 1.0, 1.0, -np.inf]]), 2)
    array([[0, 2],
           [0, 1]], dtype=int32)
    >>> select_topk(np.array([[3.0, 1.0, 3.0, 2.0]]), 2, local_window=1)
    array([[0, 3]], dtype=int32)
    """
    n = _dims(scores=(scores, "... T S"))
    causal = not (k_start is None and k_end is None)
    if not causal and n["xp"] is np:
        k_end = np.full(n["T"], n["S"])
    windows, quota = _windows(n, k_start, k_end), _quota(top_k, local_window, num_sink_tokens)
    if n["xp"] is not np:
        return _gpu_select_topk(n, scores, quota, windows, causal)
    dtype = _accumulator(scores)
    rows = _scored_rows(windows, lambda b, t0, t1, lo, hi: scores[b][t0:t1, lo:hi].astype(dtype, copy=False))
    return _select(n, quota, rows, block=64)


def lightning_select(
    index_q, index_k, weights, top_k, *, local_window=0, num_sink_tokens=0, k_start=None, k_end=None
):
    """select_topk(index_scores(...)) without ever holding [T, S] scores: (1) and (2), a block at a time.

    index_q [..., T, J, E], index_k [..., S, E], weights [..., T, J] -> indices [..., T, K] int32
    """
    n, windows, index_q, index_k = _index_dims(index_q, index_k, weights, k_start, k_end)
    quota = _quota(top_k, local_window, num_sink_tokens)
    if n["xp"] is not np:
        return _gpu_lightning_select(n, index_q, index_k, weights, quota, windows)
    return _select(n, quota, _lightning_rows(index_q, index_k, weights, windows), block=_score_rows(n))


def _lightning_rows(index_q, index_k, weights, windows, place=0):
    place = np.broadcast_to(place, index_q.shape[:-3])

    def score(b, t0, t1, lo, hi):
        return _score_block(index_q[b][t0:t1], index_k[b], weights[b][t0:t1], lo, hi, int(place[b]))

    return _scored_rows(windows, score)


def _scored_rows(windows, score):
    """rows for _select out of score(b, t0, t1, lo, hi) -> [t1 - t0, hi - lo], for a range of keys."""

    def rows(b, t0, t1):
        start, end = (w[b][t0:t1, None] for w in windows)
        lo, hi = _span(start, end)
        keys = _library("k_start", start).arange(lo, hi)
        yield t0, keys, np.where((keys >= start) & (keys < end), score(b, t0, t1, lo, hi), -np.inf)

    return rows


def _select(n, quota, rows, *, block):
    """Select for every query -> indices [..., T, K]. quota = (top_k, local_window, num_sink_tokens).

    rows(b, t0, t1) yields t, keys [N], ascending, and their scores x [M, N] for the queries t to t + M, -inf
    for keys that a query does not see.
    """
    top_k, local_window, num_sink_tokens = quota
    indices = n["xp"].full((*n["..."], n["T"], min(top_k, n["S"])), -1, np.int32)
    if n["xp"] is not np:
        return _gpu_select(n, quota, rows, indices, block)

    def work(b, t0, t1):
        for t, keys, x in rows(b, t0, t1):
            for wrong in np.flatnonzero(np.isnan(x.min(axis=1, initial=np.inf))):
                _expect(False, f"a score in the window of query {(*b, t + int(wrong))}", "NaN", "a number")
            table, seen = indices[b][t : t + len(x)], x > -np.inf
            count = seen.sum(1)
            for few in np.flatnonzero(count <= top_k):
                table[few, : count[few]] = keys[seen[few]]
            more = np.flatnonzero(count > top_k)
            if len(more) and not (local_window or num_sink_tokens):
                table[more] = keys[_top_k(x if len(more) == len(x) else x[more], top_k)]
            elif len(more):
                place = np.cumsum(seen[more], axis=1)  # 1 is the first visible key, count the last
                kept = ((place <= num_sink_tokens) | (place > count[more, None] - local_window)) & seen[more]
                best = _top_k(np.where(kept, -np.inf, x[more]), top_k - local_window - num_sink_tokens)
                np.put_along_axis(kept, best, True, axis=1)
                table[more] = keys[np.flatnonzero(kept).reshape(len(more), top_k) % len(keys)]

    _for_blocks(n["..."], n["T"], block, work)
    return indices


def _top_k(x, top_k):
    """Equation (2): x [M, N] with at least top_k scores above -inf a row -> positions [M, top_k]."""
    if _library("scores", x) is not np:
        n = {"...": (), "T": len(x), "S": x.shape[1], "xp": _library("scores", x)}
        return _gpu_select_topk(n, x, (top_k, 0, 0), (None, None), causal=False)
    columns = None
    if top_k == 0:
        return np.zeros((len(x), 0), np.intp)
    # Every 16th score gives a threshold that somewhat more than top_k scores should reach; only those go on.
    # Where fewer than top_k reach it, all go on: the rest is exact either way.
    m = top_k // 16 + math.isqrt(top_k) + 4
    if 32 * m < x.shape[1]:
        reach = x >= _largest(x[:, ::16], m)
        count = np.count_nonzero(reach, axis=1)
        if count.min() >= top_k:
            place = np.arange(count.max()) < count[:, None]  # who goes on, side by side
            columns, reached = np.zeros(place.shape, np.intp), np.full(place.shape, -np.inf, x.dtype)
            flat = np.flatnonzero(reach)
            columns[place], reached[place] = flat % x.shape[1], x.ravel()[flat]
            x = reached
    kth = _largest(x, top_k)
    best = x >= kth
    for t in np.flatnonzero(best.sum(1) > top_k):  # ties go to the lowest index
        ties = np.flatnonzero(x[t] == kth[t])
        best[t, ties[top_k - np.count_nonzero(best[t]) :]] = False
    best = np.flatnonzero(best).reshape(len(x), top_k) % x.shape[1]
    return best if columns is None else np.take_along_axis(columns, best, axis=1)


def _largest(x, k):
    """The k-th largest of each row: x [M, N] -> [M, 1]."""
    return np.partition(x, x.shape[1] - k, axis=1)[:, x.shape[1] - k, None]


def predictive_select(
    index_q, index_k, weights, top_k, candidates,
    *, widen=0, local_window=0, num_sink_tokens=0, k_start=None, k_end=None,
):  # fmt: skip
    """lightning_select that scores only candidates [..., T, C], such as the indices of the previous layer.

    Each candidate brings `widen` neighbours on both sides; window and sink tokens are always among them.
    T*C scores instead of T*S. Equal to lightning_select where the candidates hold every visible key.
    """
    n, windows, index_q, index_k = _index_dims(index_q, index_k, weights, k_start, k_end)
    _check_indices("candidates", candidates, n)
    offsets = n["xp"].arange(-_integer("widen", widen, 0), widen + 1)
    quota, windows = _quota(top_k, local_window, num_sink_tokens), _explicit(n, windows)

    def near(b, t, start, end):
        keys = candidates[b][t].astype(np.int64)
        return (keys[keys >= 0][:, None] + offsets).ravel()

    return _select(n, quota, _near_rows(index_q, index_k, weights, windows, quota, near), block=64)


def _near_rows(index_q, index_k, weights, windows, quota, near):
    """rows for _select that score, by (1), only near(b, t, start, end) and the window and sink tokens."""
    xp = _library("index_q", index_q)

    def rows(b, t0, t1):
        for t in range(t0, t1):
            start, end = int(windows[0][b][t]), int(windows[1][b][t])
            last, first = xp.arange(end - quota[1], end), xp.arange(start, start + quota[2])
            keys = np.unique(np.concatenate([near(b, t, start, end), last, first]))
            keys = keys[(keys >= start) & (keys < end)]
            row = slice(t, t + 1)
            yield t, keys, _score_block(index_q[b][row], index_k[b][keys], weights[b][row], 0, len(keys))

    return rows


# Every selector has one signature, takes what it needs and returns what lightning_select returns, so that all
# can be compared at equal K; with local_window > 0 each is a hybrid of that window and itself. A selector is
# written as kind(args, **options) -> rows for _select, out of the checked arguments.


def _selector(kind):
    """The public selector of a kind."""

    def select(
        q, k, top_k,
        *, index_q=None, index_k=None, weights=None,
        local_window=0, num_sink_tokens=0, k_start=None, k_end=None, **options,
    ):  # fmt: skip
        n = _dims(q=(q, "... T H D"), k=(k, "... S G D"))
        quota = _quota(top_k, local_window, num_sink_tokens)
        block = max(1, min(64, ROW_BUFFER // max(1, n["S"] * n["H"])))
        indexer = (index_q, index_k, weights)
        fits = options.keys() <= known.keys()
        _expect(fits, "the options", sorted(options), f"some of {list(known)}", TypeError)
        windows = _windows(n, k_start, k_end)
        if kind is _lightning and n["xp"] is not np:
            return _gpu_lightning_select(_check_indexer(q, k, *indexer), *indexer, quota, windows)
        windows = _explicit(n, windows)
        args = SimpleNamespace(q=q, k=k, indexer=indexer, n=n, windows=windows, quota=quota)
        with np.errstate(all="ignore"):  # keys that nobody sees may hold anything
            rows = kind(args, **options)
        return _select(n, quota, rows, block=block)

    known = dict(list(inspect.signature(kind).parameters.items())[1:])
    select.__doc__ = f"{kind.__doc__}\n\n    Options: {', '.join(map(str, known.values())) or 'none'}."
    select.__name__ = select.__qualname__ = kind.__name__[1:]
    return select


def _check_indexer(q, k, index_q, index_k, weights):
    return _dims(
        q=(q, "... T H D"), k=(k, "... S G D"),
        index_q=(index_q, "... T J E"), index_k=(index_k, "... S E"), weights=(weights, "... T J"),
    )  # fmt: skip


def _summed_heads(args):
    """q [..., T, G, D] and k [..., S, G, D] in which a dot product is the sum of all heads' logits."""
    n = args.n
    q = args.q.reshape(*n["..."], n["T"], n["G"], n["H"] // n["G"], n["D"])
    q = q.sum(-2, dtype=_accumulator(args.q, args.k))
    return q, args.k.astype(q.dtype)


def _flat(x):
    return x.reshape(*x.shape[:-2], x.shape[-2] * x.shape[-1])


def _lightning(args):
    """Equations (1) and (2), as lightning_select."""
    _check_indexer(args.q, args.k, *args.indexer)
    index_q, index_k, weights = args.indexer
    return _lightning_rows(index_q, index_k, weights, args.windows)


def _hierarchical(args, block=64, oversample=4):
    """Equation (1) on mean-pooled blocks of keys, then on the oversample * top_k keys of the best blocks.

    The first and the last visible block are always in, since they may be visible only in part.
    """
    n = _check_indexer(args.q, args.k, *args.indexer)
    index_q, index_k, weights = args.indexer
    block, keys = _integer("block", block, 1), _integer("oversample", oversample, 1) * args.quota[0]
    sizes = n["xp"].minimum(block, n["S"] - n["xp"].arange(0, n["S"], block))[:, None]
    pooled = np.pad(index_k, [(0, 0)] * (index_k.ndim - 2) + [(0, -n["S"] % block), (0, 0)])
    pooled = pooled.reshape(*n["..."], len(sizes), block, n["E"]).sum(-2, dtype=_accumulator(index_k))
    pooled /= sizes.astype(pooled.dtype)  # [..., S/block, E]

    def near(b, t, start, end):
        lo, hi = start // block, -(-end // block)
        blocks, most = n["xp"].arange(lo, hi), -(-keys // block) + 2
        if len(blocks) > most:
            x = _score_block(index_q[b][t : t + 1], pooled[b], weights[b][t : t + 1], lo + 1, hi - 1)
            _expect(not np.isnan(x).any(), f"a score in the window of query {(*b, t)}", "NaN", "a number")
            blocks = np.concatenate([blocks[:1], lo + 1 + _top_k(x, most - 2)[0], blocks[-1:]])
        return (blocks[:, None] * block + n["xp"].arange(block)).ravel()

    return _near_rows(index_q, index_k, weights, args.windows, args.quota, near)


def _approximate(args, dim=64, seed=0, projection=None):
    """The sum of all heads' logits, in a random (or the given [D, R]) projection to `dim` dimensions."""
    n = args.n
    if projection is None:
        rng, shape = np.random.default_rng(_integer("seed", seed, 0)), (n["D"], _integer("dim", dim, 1))
        projection = n["xp"].asarray(rng.standard_normal(shape))
    _dims(k=(args.k, "... S G D"), projection=(projection, "D R"))
    summed = _summed_heads(args)
    q, k = (_flat(x @ projection.astype(x.dtype)) for x in summed)  # [..., T, G*R], [..., S, G*R]
    return _scored_rows(args.windows, lambda b, t0, t1, lo, hi: q[b][t0:t1] @ k[b][lo:hi].T)


def _lsh(args, bits=64, oversample=4, seed=0):
    """Random hyperplanes: the oversample * top_k keys nearest in Hamming distance, then by their logits."""
    q, k = map(_flat, _summed_heads(args))  # [..., T, G*D], [..., S, G*D]
    rng, bits = np.random.default_rng(_integer("seed", seed, 0)), _integer("bits", bits, 1)
    planes = args.n["xp"].asarray(rng.standard_normal((q.shape[-1], bits), np.float32))
    sign_q, sign_k = (np.where(x @ planes >= 0, 1, -1).astype(np.float32) for x in (q, k))
    many = _integer("oversample", oversample, 1) * args.quota[0]

    def score(b, t0, t1, lo, hi):
        x = q[b][t0:t1] @ k[b][lo:hi].T
        agree = sign_q[b][t0:t1] @ sign_k[b][lo:hi].T  # bits - 2 * Hamming distance
        for t, (start, end) in enumerate(zip(*((w[b][t0:t1] - lo).tolist() for w in args.windows))):
            if end - start > many:
                far = ~np.isnan(x[t, start:end])  # NaN is an error, and not to be hidden
                far[_top_k(agree[t : t + 1, start:end], many)] = False
                x[t, start:end][far] = np.finfo(x.dtype).min  # seen, but behind every candidate
        return x

    return _scored_rows(args.windows, score)


def _learned(args, mlp=None, hidden=16, seed=0):
    """An MLP on [q; k], each summed over heads: w_out . relu(w_q q + w_k k + b).

    mlp = (w_q [F, G*D], w_k [F, G*D], b [F], w_out [F]); None is an untrained, random one of `hidden` units.
    """
    if mlp is None:
        rng, F = np.random.default_rng(_integer("seed", seed, 0)), _integer("hidden", hidden, 1)
        width = args.n["G"] * args.n["D"]
        mlp = [args.n["xp"].asarray(rng.standard_normal(shape)) for shape in ((F, width), (F, width), F, F)]
    _, _, hidden_q, hidden_k = _hidden_units(args, *mlp)

    def score(b, t0, t1, lo, hi):
        x = np.zeros_like(hidden_q, shape=(t1 - t0, hi - lo))
        for f, weight in enumerate(mlp[3].tolist()):
            x += weight * np.maximum(hidden_q[b][t0:t1, f, None] + hidden_k[b][lo:hi, f], 0)
        return x

    return _scored_rows(args.windows, score)


def _hidden_units(args, w_q, w_k, bias, w_out):
    """q and k summed over heads, [..., T, G*D] and [..., S, G*D], and w_q q + b and w_k k, [..., F]."""
    q, k = map(_flat, _summed_heads(args))
    _dims(q=(q, "... T GD"), w_q=(w_q, "F GD"), w_k=(w_k, "F GD"), b=(bias, "F"), w_out=(w_out, "F"))
    return q, k, q @ w_q.T.astype(q.dtype) + bias.astype(q.dtype), k @ w_k.T.astype(k.dtype)


def _pattern(args, order):
    """A static pattern: order(start [T, 1], end [T, 1], keys, queries [T, 1]) -> scores [T, keys]."""

    def score(b, t0, t1, lo, hi):
        (start, end), arange = (w[b][t0:t1, None] for w in args.windows), args.n["xp"].arange
        return order(start, end, arange(lo, hi), arange(t0, t1)[:, None]).astype(np.float64)

    return _scored_rows(args.windows, score)


def _window(args):
    """The last top_k keys."""
    return _pattern(args, lambda start, end, s, t: s)


def _strided(args):
    """Every stride-th key, back from the last, with the smallest stride that needs at most top_k keys."""

    def order(start, end, s, t):
        stride = np.maximum(1, -(-(end - start) // args.quota[0]))
        return -((end - 1 - s) % stride)

    return _pattern(args, order)


def _global(args):
    """The first top_k keys, as global tokens that every query sees."""
    return _pattern(args, lambda start, end, s, t: -s)


def _random(args, seed=0):
    """Any top_k keys, in the order of a hash (splitmix64) of the seed and of both places in the sequence."""
    seed, n = np.random.default_rng(_integer("seed", seed, 0)).integers(2**63, dtype=np.uint64), args.n

    def order(start, end, s, t):
        # A causal window ends behind its query's own place, however the sequence is cut; of others that place
        # goes into the hash, as queries that see the same keys are to choose differently.
        x = ((end - start).astype(np.uint64) << np.uint64(32)) + (s - start).astype(np.uint64)
        x += (t + (n["S"] - n["T"] + 1) - end).astype(np.uint64) * np.uint64(0xD1342543DE82EF95)
        x = (x + seed) * np.uint64(0x9E3779B97F4A7C15)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
        return x >> np.uint64(11)

    return _pattern(args, order)


def _oracle(args, scale=None):
    """The keys of largest attention mass over all heads: as much as one set for all heads can capture."""
    return _scored_rows(args.windows, _mass(args.n, args.q, args.k, _scale(args.n, scale), args.windows))


def _mass(n, q, k, scale, windows):
    """score for _scored_rows: the attention probabilities of the keys lo..hi, summed over all heads."""
    dtype = _accumulator(q, k)

    def score(b, t0, t1, lo, hi):
        s = n["xp"].arange(lo, hi)
        sees = (s >= windows[0][b][t0:t1, None]) & (s < windows[1][b][t0:t1, None])  # [T, S]
        keys = k[b][lo:hi].astype(dtype).transpose(1, 2, 0)  # [G, D, S]
        x = _group_rows(q[b][t0:t1], n["G"], scale, dtype) @ keys
        x = np.where(sees[:, None], x.reshape(n["G"], t1 - t0, n["H"] // n["G"], hi - lo), -np.inf)
        return _softmax(x)[0].sum((0, 2))

    return score


def _softmax(x):
    """Over the last axis, of which -inf has no part -> probabilities, 0 where no part is left, and lse."""
    limits = np.finfo(x.dtype)
    top = np.maximum(x.max(-1, keepdims=True), limits.min) if x.shape[-1] else x.sum(-1, keepdims=True)
    p = np.exp(x - top)
    total = np.maximum(p.sum(-1, keepdims=True), limits.tiny)
    return p / total, top + np.log(total)


KINDS = _lightning, _approximate, _lsh, _learned, _hierarchical, _window, _strided, _global, _random, _oracle
SELECTORS = {kind.__name__[1:]: _selector(kind) for kind in KINDS}

# ----------------------------------------------------------------------------------------------------------
# 5. Attention, equation (3)
# ----------------------------------------------------------------------------------------------------------


def dense_attention(q, k, v=None, *, d_v=None, scale=None, k_start=None, k_end=None, sink=None):
    """Attention over every visible key, a tile at a time: softmax(scale * q . k) @ v.

    q [..., T, H, D], k [..., S, G, D], v [..., S, G, Dv]; v=None with d_v=n says that v is k[..., :n], the
    latent of MLA, which is stored once. scale is D ** -0.5 by default; sink [H]: see apply_sink.
    -> out [..., T, H, Dv] in q's dtype, lse [..., T, H], the natural log of the sum of exponentials

    >>> out, lse = dense_attention(np.zeros((2, 1, 1)), np.zeros((2, 1, 1)), np.array([[[2.0]], [[4.0]]]))
    >>> out.ravel().tolist(), np.exp(lse).ravel().round(6).tolist()
    ([2.0, 3.0], [1.0, 2.0])
    """
    n, v, scale = _attention_dims(q, k, v, d_v, scale, sink)
    windows = _windows(n, k_start, k_end)
    if n["xp"] is not np:
        return _gpu_attention(n, q, k, v, None, windows, scale, sink)

    def tiles(b, t0, t1):
        start, end = (w[b][t0:t1] for w in windows)
        lo, hi = _span(start, end)
        for s0 in range(lo, hi, KEY_TILE):
            s1 = min(s0 + KEY_TILE, hi)
            s = np.arange(s0, s1)[:, None]
            all_see = start.max() <= s0 and s1 <= end.min()
            yield k[b][s0:s1], v[b][s0:s1], None if all_see else (s >= start) & (s < end)

    return _attend(n, q, scale, sink, lambda b, t0, t1: [(t0, t1, tiles(b, t0, t1))], _accumulator(q, k, v))


def sparse_attention(q, k, v, indices, *, d_v=None, scale=None, sink=None, out_dtype=None):
    """Equation (3): exact attention over the keys in indices [..., T, K], one set for all heads of a query.

    Slots of -1 are absent wherever they stand, an index that repeats counts as often as it stands, and a key
    in no row is never looked at. IndexError for other indices outside [0, S). Otherwise as dense_attention.
    out_dtype: by default q's; float32 for parts of 16 bits that are yet to be merged.

    >>> k, v = np.zeros((3, 1, 1)), np.array([[[1.0]], [[2.0]], [[6.0]]])
    >>> sparse_attention(np.zeros((1, 1, 1)), k, v, np.array([[0, 2, -1]]))[0].item()
    3.5
    """
    tied = v is None
    n, v, scale = _attention_dims(q, k, v, d_v, scale, sink)
    _check_indices("indices", indices, n)
    out_dtype = _out_dtype(out_dtype, q, _accumulator(q, k, v))
    if n["xp"] is not np:
        return _gpu_attention(n, q, k, v, indices, None, scale, sink, out_dtype=out_dtype)

    width = max(1, min(KEY_TILE, indices.shape[-1]))
    own = threading.local()  # each thread gathers into its own buffers: fresh ones would cost as much again

    def gathered(b, keys):
        if not hasattr(own, "buffers"):
            own.buffers = [np.empty((width, *x.shape[-2:]), x.dtype) for x in ((k,) if tied else (k, v))]
        for i in range(0, len(keys), width):
            tile = _take(k[b], keys[i : i + width], own.buffers[0])
            yield tile, tile[..., :d_v] if tied else _take(v[b], keys[i : i + width], own.buffers[1]), None

    def streamed(b, lo, mask):
        for s in range(0, len(mask), KEY_TILE):
            seen = mask[s : s + KEY_TILE]
            yield k[b][lo + s :][: len(seen)], v[b][lo + s :][: len(seen)], seen

    def parts(b, t0, t1):
        rows = indices[b][t0:t1].astype(np.int64)
        there = rows >= 0
        count = np.count_nonzero(there)
        # To gather a key costs as much as to stream about 2.5 of them. Where the block's keys lie close
        # enough together, stream them all under a mask, which cannot count an index that repeats.
        lo, hi = int(rows.min(initial=n["S"], where=there)), int(rows.max(initial=-1)) + 1
        if count and (t1 - t0) * (hi - lo) <= 2.5 * count:
            mask = np.zeros((hi - lo, t1 - t0), bool)
            mask[rows[there] - lo, np.nonzero(there)[0]] = True
            if np.count_nonzero(mask) == count:
                yield t0, t1, streamed(b, lo, mask)
                return
        for t, row in enumerate(rows, t0):
            yield t, t + 1, gathered(b, row[row >= 0])

    return _attend(n, q, scale, sink, parts, _accumulator(q, k, v), out_dtype)


def _attention_dims(q, k, v, d_v, scale, sink):
    """The checks of everything that attends -> sizes, the values, the scale."""
    _expect(v is not None or d_v is not None, "v", v, "an array, or d_v=n where the values are k[..., :n]")
    _expect(v is None or d_v is None, "d_v", d_v, "None where v is given")
    most = _dims(q=(q, "... T H D"), k=(k, "... S G D"))["D"]
    _expect(d_v is None or _integer("d_v", d_v, 1) <= most, "d_v", d_v, f"at most k's D = {most}")
    v = k[..., :d_v] if v is None else v
    extra = {} if sink is None else {"sink": (sink, "H")}
    n = _dims(q=(q, "... T H D"), k=(k, "... S G D"), v=(v, "... S G Dv"), **extra)
    return n, v, _scale(n, scale)


def _out_dtype(out_dtype, q, accumulator):
    dtype = np.dtype(q.dtype if out_dtype is None else out_dtype)
    _expect(dtype in (q.dtype, accumulator), "out_dtype", dtype, f"{q.dtype} or {accumulator}", TypeError)
    return dtype


def _scale(n, scale):
    if scale is None:
        return max(1, n["D"]) ** -0.5
    _expect(isinstance(scale, numbers.Real) and math.isfinite(scale), "scale", scale, "a finite number")
    return float(scale)


def _take(x, rows, out):
    # np.take is twice as fast as x[rows], but where x is not contiguous it first copies all of it.
    return np.take(x, rows, axis=0, mode="clip", out=out[: len(rows)]) if x.flags.c_contiguous else x[rows]


def _group_rows(q, groups, scale, dtype):
    """q [T, H, D] -> scale * q as [G, T * H/G, D]: one product for all heads of a group."""
    T, H, D = q.shape
    rows = q.reshape(T, groups, H // groups, D).transpose(1, 0, 2, 3)
    return np.multiply(rows, scale, dtype=dtype).reshape(groups, -1, D)


def _attend(n, q, scale, sink, parts, dtype, out_dtype=None):
    """Attend in blocks of queries. parts(b, t0, t1) yields a, z and tiles: what the queries a..z attend to.

    A tile: keys [N, G, D], values [N, G, Dv], and either None or which of them each query sees, [N, z - a].
    """
    T, H, G = n["T"], n["H"], n["G"]
    out = np.empty((*n["..."], T, H, n["Dv"]), q.dtype if out_dtype is None else out_dtype)
    lse = np.empty((*n["..."], T, H), dtype)

    def work(b, t0, t1):
        r = H // G
        rows = _group_rows(q[b][t0:t1], G, scale, dtype)  # [G, T * r, D]
        o, log_sum = np.empty((*rows.shape[:2], n["Dv"]), dtype), np.empty((*rows.shape[:2], 1), dtype)
        for a, z, tiles in parts(b, t0, t1):
            some = slice((a - t0) * r, (z - t0) * r)
            o[:, some], log_sum[:, some, 0] = _online_softmax(rows[:, some], tiles, n["Dv"])
        o, log_sum = (x.reshape(G, t1 - t0, r, -1).swapaxes(0, 1) for x in (o, log_sum))  # [T, G, H/G, Dv]
        o, lse[b][t0:t1] = o.reshape(t1 - t0, H, n["Dv"]), log_sum.reshape(t1 - t0, H)
        out[b][t0:t1] = o if sink is None else apply_sink(o, lse[b][t0:t1], sink)

    _for_blocks(n["..."], T, max(1, min(64, 2 * KEY_TILE // max(1, H))), work)
    return out, lse


def _online_softmax(q, tiles, d_v):
    """Softmax attention of q [G, R, D], scaled, in one pass over tiles -> out [G, R, d_v], lse [G, R].

    m is the maximum so far, total the sum of exp(logit - m); when m grows, what was summed is rescaled. Rows
    that have seen no key keep m = -inf, and use 0 in its place, since -inf - -inf is NaN.
    """
    G, R, _ = q.shape
    m, total, acc = np.full((G, R), -np.inf, q.dtype), np.zeros((G, R), q.dtype), None
    for tile_k, tile_v, mask in tiles:
        keys = tile_k.astype(q.dtype, copy=False).transpose(1, 0, 2)  # [G, N, D]
        values = tile_v.astype(q.dtype, copy=False).transpose(1, 0, 2)  # [G, N, Dv]
        s = keys @ q.swapaxes(1, 2)  # [G, N, R]
        if mask is not None:
            np.copyto(s, -np.inf, where=np.repeat(~mask, R // mask.shape[1], axis=1))
        new = np.maximum(m, _over_keys(np.maximum, s))
        safe = np.where(new == -np.inf, 0, new)
        s -= safe[:, None]
        p = np.exp(s, out=s)  # exp2 is faster, but thirty times as slow on -inf
        part = _weighted_values(p, values, mask)  # [G, R, Dv]
        if acc is None:
            total, acc = _over_keys(np.add, p), part
        else:
            rescale = np.exp(m - safe)
            total = total * rescale + _over_keys(np.add, p)
            acc *= rescale[:, :, None]
            acc += part
        m = new
    if acc is None:
        return np.zeros((G, R, d_v), q.dtype), m
    acc /= np.where(total == 0, 1, total)[:, :, None]
    return acc, m + np.log(total)


def _over_keys(reduce, x):
    """x [G, N, R] reduced to [G, R]; eight keys side by side, as NumPy is slow on short last axes."""
    G, N, R = x.shape
    if N % 8 == 0:
        x = reduce.reduce(x.reshape(G, N // 8, 8 * R), axis=1).reshape(G, 8, R)
    return reduce.reduce(x, axis=1)


def _weighted_values(p, values, mask):
    """p [G, N, R], values [G, N, Dv] -> [G, R, Dv]; 0 * NaN is NaN: a row multiplies only what it sees."""
    odd = () if mask is None else np.flatnonzero(~np.isfinite(values).all((0, 2)))
    if len(odd) == 0:
        return p.swapaxes(1, 2) @ values
    finite = values.copy()
    finite[:, odd] = 0
    out = p.swapaxes(1, 2) @ finite
    for i in odd:
        sees = np.repeat(mask[i], p.shape[2] // mask.shape[1])
        out[:, sees] += p[:, i, sees, None] * values[:, i, None]
    return out


def merge_attention(outs, lses):
    """Attention over the union of disjoint key sets, out of the attention over each, computed without sink.

    outs of [..., T, H, Dv] and lses of [..., T, H], in lists or stacked on axis 0 -> out, lse.
    With L = logsumexp(lses): out = sum_i exp(lse_i - L) out_i. The empty set, (0, -inf), changes nothing.

    >>> outs, lses = [np.array([[[2.0]]]), np.array([[[5.0]]])], [np.log([[2.0]]), np.log([[1.0]])]
    >>> out, lse = merge_attention(outs, lses)
    >>> out.round(6).item(), np.exp(lse).round(6).item()
    (3.0, 3.0)
    """
    outs, lses = list(outs), list(lses)
    fits = len(outs) == len(lses) > 0
    _expect(fits, "the number of outs", len(outs), f"1 or more, as of lses: {len(lses)}")
    checked = {f"outs[{i}]": (out, "... T H Dv") for i, out in enumerate(outs)}
    _dims(**checked, **{f"lses[{i}]": (lse, "... T H") for i, lse in enumerate(lses)})
    dtype = _accumulator(*outs, *lses)
    with np.errstate(all="ignore"):
        top = np.stack(lses).max(0).astype(dtype)
        top[top == -np.inf] = 0
        shares = [np.exp(lse - top) for lse in lses]
        total = sum(shares)
        whole = np.where(total == 0, 1, total)
        merged = sum((share / whole)[..., None] * out.astype(dtype) for share, out in zip(shares, outs))
        return merged.astype(outs[0].dtype), (top + np.log(total)).astype(dtype)


def apply_sink(out, lse, sink):
    """Give the sink [H], a learned logit z per head without a value, its share: out / (1 + exp(z - lse)).

    Once, after any merge; lse does not include it. z = -inf has no effect, z = +inf gives 0.

    >>> apply_sink(np.array([[[6.0]]]), np.log([[2.0]]), np.log([1.0])).round(6).item()
    4.0
    """
    _dims(out=(out, "... T H Dv"), lse=(lse, "... T H"), sink=(sink, "H"))
    with np.errstate(all="ignore"):
        dtype = _accumulator(out, lse, sink)
        z = sink.astype(dtype)
        share = np.where(z == -np.inf, dtype.type(1), 1 / (1 + np.exp(z - lse)))
        return (out.astype(dtype) * share[..., None]).astype(out.dtype)


# ----------------------------------------------------------------------------------------------------------
# 6. All of DSA: configure, select, attend
# ----------------------------------------------------------------------------------------------------------

SELECTION_RATIOS = {"aggressive": 0.01, "balanced": 0.03, "conservative": 0.05, "safe": 0.10}


@dataclass(frozen=True)
class DSAConfig:
    """How dsa_attention selects. ValueError for an invalid value or combination.

    top_k keys of each query, or ceil(sparse_ratio * S) where a ratio is given (see SELECTION_RATIOS), are
    chosen by strategy: "dynamic", by global_selection; "hybrid", the same beside a local_window of the last
    keys; "fixed", by pattern. num_sink_tokens first keys are always kept. global_selection: "lightning" (1),
    "approximate", "lsh", "learned" or "hierarchical"; pattern: "window", "strided", "global" or "random".
    indexer_precision: "fp32", "fp16" or "fp8", to which index_q and index_k are rounded.
    fallback_dense_threshold: every key is kept while S is at most that (None: top_k). progressive_sparsity:
    more keys in the first layers, see top_k_at. batch_pad_to_multiple: what lists of sequences are padded to.
    cache_strategy: "lru", how a HybridKVCache chooses whom it keeps in its fast tier.
    """

    top_k: int = 2048
    sparse_ratio: float | None = None
    strategy: str = "dynamic"
    local_window: int = 0  # 128 and 256 are usual for hybrid
    num_sink_tokens: int = 0
    global_selection: str = "lightning"
    pattern: str = "window"
    batch_pad_to_multiple: int = 64
    cache_strategy: str = "lru"
    indexer_precision: str = "fp32"
    fallback_dense_threshold: int | None = None
    progressive_sparsity: bool = False

    def __post_init__(self):
        choices = {
            "strategy": ("fixed", "dynamic", "hybrid"),
            "global_selection": ("lightning", "approximate", "lsh", "learned", "hierarchical"),
            "pattern": ("window", "strided", "global", "random"),
            "cache_strategy": ("lru",),
            "indexer_precision": PRECISIONS,
            "progressive_sparsity": (False, True),
        }
        least = {"top_k": 1, "local_window": 0, "num_sink_tokens": 0, "batch_pad_to_multiple": 1}
        if self.fallback_dense_threshold is not None:
            least["fallback_dense_threshold"] = 0
        for field, allowed in choices.items():
            value = getattr(self, field)
            _expect(value in allowed, field, repr(value), f"one of {allowed}")
        try:
            for field, low in least.items():
                _integer(field, getattr(self, field), low)
        except TypeError as error:
            raise ValueError(*error.args) from None
        ratio, strategy, window = self.sparse_ratio, self.strategy, self.local_window
        if ratio is None:
            _quota(self.top_k, window, self.num_sink_tokens)
        else:
            fits = isinstance(ratio, numbers.Real) and not isinstance(ratio, bool) and 0 < ratio <= 1
            _expect(fits, "sparse_ratio", repr(ratio), "None or a number above 0 and up to 1")
        _expect(strategy != "hybrid" or window > 0, "local_window", 0, "at least 1 in strategy 'hybrid'")
        _expect(strategy != "dynamic" or window == 0, "local_window", window, "0, or strategy 'hybrid'")

    def top_k_at(self, layer=0, n_layers=1, num_keys=None):
        """top_k of one layer; num_keys is needed for a sparse_ratio. At least the window and the sink tokens.

        With progressive_sparsity it falls from 2 * top_k in the first layer to top_k / 2 in the last.

        >>> [DSAConfig(top_k=64, progressive_sparsity=True).top_k_at(layer, 3) for layer in range(3)]
        [128, 64, 32]
        >>> DSAConfig(sparse_ratio=SELECTION_RATIOS["balanced"]).top_k_at(num_keys=1000)
        30
        """
        n_layers, layer = _integer("n_layers", n_layers, 1), _integer("layer", layer, 0)
        _expect(layer < n_layers, "layer", layer, f"less than n_layers = {n_layers}")
        top_k: float = self.top_k
        if self.sparse_ratio is not None:
            _expect(num_keys is not None, "num_keys", None, "a number, as sparse_ratio is set")
            top_k = self.sparse_ratio * _integer("num_keys", num_keys, 0)
        if self.progressive_sparsity and n_layers > 1:
            top_k *= 2 ** (1 - 2 * layer / (n_layers - 1))
        return max(math.ceil(round(top_k, 9)), self.local_window + self.num_sink_tokens, 1)

    def _quota_at(self, layer, n_layers, num_keys):
        """The arguments of select_topk for that many keys, and whether these are so few that all are kept."""
        top_k, most = self.top_k_at(layer, n_layers, num_keys), self.fallback_dense_threshold
        quota = {"top_k": top_k, "local_window": self.local_window, "num_sink_tokens": self.num_sink_tokens}
        return quota, num_keys <= (top_k if most is None else most)

    def _selector(self):
        return self.pattern if self.strategy == "fixed" else self.global_selection


def dsa_attention(
    q, k, v, index_q, index_k, weights, config,
    *, d_v=None, scale=None, sink=None, k_start=None, k_end=None, lengths=None,
    cache=None, candidates=None, layer=0, n_layers=1, **options,
):  # fmt: skip
    """DeepSeek Sparse Attention: select as config says, attend to what was selected -> out, lse, indices.

    The arrays are those of dense_attention and index_scores. The indices say what was attended to, also where
    that was dense. Sequences that differ in length stand right-padded in a batch, with lengths [B] in place
    of k_start and k_end; or q to weights are lists of arrays [T_i, ...], which are then padded to
    config.batch_pad_to_multiple. Padding gives 0, -inf and -1.
    cache: its streams are k, v if there is one, and index_k, which are appended to it; lengths counts each
    sequence's new tokens, and q are the queries of these. If anything raises, the cache is as it was.
    candidates: for predictive_select, instead of a selector. layer, n_layers: for progressive_sparsity.
    options: of the selector, see SELECTORS.
    """
    _check_type("config", config, DSAConfig)
    if isinstance(q, (list, tuple)):
        _expect(lengths is None, "lengths", lengths, "None with lists of sequences, which have their own")
        arrays = {"q": q, "k": k, "v": v, "index_q": index_q, "index_k": index_k, "weights": weights}
        (q, k, v, index_q, index_k, weights), lengths = _pad_lists(arrays, config.batch_pad_to_multiple)
    kwargs = {"d_v": d_v, "scale": scale, "sink": sink}
    n, lengths = _dsa_dims((q, k, v), (index_q, index_k, weights), kwargs, (k_start, k_end), cache, lengths)
    choose = functools.partial(_choose, config, (layer, n_layers), candidates, options)
    if cache is None:
        if lengths is not None:
            k_start, k_end = map(n["xp"].asarray, padded_window(lengths, n["T"]))
        windows = _windows(n, k_start, k_end)
        indices = choose(q, k, index_q, index_k, weights, windows, lengths)
        return (*sparse_attention(q, k, v, indices, **kwargs), indices)
    with cache.appended(lengths=lengths, k=k, index_k=index_k, **({} if v is None else {"v": v})):
        windows, keys, index_keys = cache.window(n["T"], lengths), cache.read("k"), cache.read("index_k")
        indices = choose(q, keys, index_q, index_keys, weights, windows, cache.lengths)
        return (*cache.attend(q, indices, **kwargs), indices)


def _dsa_dims(main, indexer, kwargs, windows, cache, lengths):
    """The checks of dsa_attention -> sizes, and lengths [B] if any are given."""
    q, k, _ = main
    n = _check_indexer(q, k, *indexer) | _attention_dims(*main, **kwargs)[0]
    if cache is not None or lengths is not None:
        alone = all(w is None for w in windows)
        _expect(alone, "k_start or k_end", "an array", "None with lengths or with a cache")
        fits = len(n["..."]) == 1 and n["T"] == n["S"]
        _expect(fits, "q", f"of shape {q.shape}", f"[B, T, H, D] of the same T as k, of shape {k.shape}")
        lengths = None if lengths is None else _lengths(lengths, n["..."][0], n["T"])
    if cache is not None:
        _check_type("cache", cache, KVCache)
        _expect(n["..."] == (cache.batch,), "B", f"{n['...'][0]} in q", f"the cache's batch = {cache.batch}")
    return n, lengths


def _pad_lists(arrays, multiple):
    """Lists of sequences as right-padded arrays, and the lengths that they agree on."""
    lengths = np.array([len(x) for x in arrays["q"]])
    for name, x in arrays.items():
        if x is not None:
            own = [len(y) for y in x]
            _expect(own == lengths.tolist(), f"the lengths in {name}", own, f"those in q, {lengths.tolist()}")
    return [None if x is None else pad_batch(x, multiple)[0] for x in arrays.values()], lengths


def _choose(config, layer, candidates, options, q, k, index_q, index_k, weights, windows, lengths):
    """The indices that config says. Where it goes by the number of keys, each sequence goes by its own."""
    by_length = config.sparse_ratio or config.fallback_dense_threshold
    if by_length and lengths is not None and len(set(lengths.tolist())) > 1:
        parts = []
        for b, length in enumerate(lengths):
            near = None if candidates is None else candidates[b]
            own = (q[b], k[b, :length], index_q[b], index_k[b, :length], weights[b], [w[b] for w in windows])
            parts.append(_choose(config, layer, near, options, *own, lengths=None))
        widest = max(x.shape[-1] for x in parts)
        indices = np.full_like(parts[0], -1, shape=(*q.shape[:2], widest))
        for row, part in zip(indices, parts):
            row[:, : part.shape[-1]] = part
        return indices
    num_keys = k.shape[-3] if lengths is None else int(lengths.max(initial=0))
    quota, dense = config._quota_at(*layer, num_keys)
    if dense:  # every visible key
        n = {"...": q.shape[:-3], "T": q.shape[-3], "S": k.shape[-3], "xp": _library("q", q)}
        return _every_key(_explicit(n, windows), min(max(1, num_keys), n["S"]))
    index_q, index_k = (_at_precision(x, config.indexer_precision) for x in (index_q, index_k))
    common = {"index_q": index_q, "index_k": index_k, "weights": weights, **quota}
    common |= {"k_start": windows[0], "k_end": windows[1]}
    if candidates is not None:
        return predictive_select(candidates=candidates, **common, **options)
    return SELECTORS[config._selector()](q, k, **common, **options)


# ----------------------------------------------------------------------------------------------------------
# 7. fp8
# ----------------------------------------------------------------------------------------------------------

FP8_BLOCK = 128  # values that share a scale
PRECISIONS = ("fp32", "fp16", "fp8")  # of the indexer

# The value of each code: a sign, 4 bits of exponent with bias 7, 3 of mantissa; no infinity, two NaN.
E4M3 = np.array([math.ldexp(i % 8 + 8 * (i > 7), max(i // 8, 1) - 10) for i in range(127)] + [math.nan])
E4M3 = np.concatenate([E4M3, -E4M3]).astype(np.float32)


def quantize_fp8(x, *, block=FP8_BLOCK, scale="ue8m0"):
    """x [..., N] -> e4m3 codes, uint8 [..., N], and a scale for each block, float32 [..., ceil(N / block)].

    amax is a block's largest magnitude, at least 1e-4. scale "float": amax / 448, of e4m3's largest number;
    "ue8m0": that rounded up to a power of two. Codes of x / scale, at most 448, are rounded half to even.
    NaN stays NaN.

    >>> quantize_fp8(np.array([448.0, -1.0, 1.0625, 1.1875, 0.0]))           # 1.0625 and 1.1875 are ties
    (array([126, 184,  56,  58,   0], dtype=uint8), array([1.], dtype=float32))
    """
    _dims(x=(x, "... N"))
    _expect(scale in ("ue8m0", "float"), "scale", repr(scale), "'ue8m0' or 'float'")
    return _quantize(x, _integer("block", block, 1), scale, 1e-4)


def _quantize(x, block, scale, least):
    if _library("x", x) is not np:
        return _gpu_quantize(x, block, scale, least)
    x = x.astype(_accumulator(x), copy=False)
    with np.errstate(all="ignore"):
        amax = np.fmax.reduceat(np.abs(x), np.arange(0, x.shape[-1], block), axis=-1).astype(np.float32)
        scales = np.clip(amax, np.float32(least), np.finfo(np.float32).max) / np.float32(448)
        if scale == "ue8m0":  # on the bits: the exponent, one more if the mantissa is not 0
            scales = ((scales.view(np.uint32) + 0x7FFFFF) & 0xFF800000).view(np.float32)
        x = x / np.repeat(scales, block, axis=-1)[..., : x.shape[-1]]
        size = np.minimum(np.abs(x), 448)
        digits = np.minimum(4 - np.frexp(size)[1], 9)  # after the binary point; 9 for subnormals
        size = np.ldexp(np.rint(np.ldexp(size, digits)), -digits)
        # What is left is a float32 with a mantissa of 3 bits, whose exponent has the bias 127 in place of 7.
        normal = (size.astype(np.float32).view(np.uint32) >> 20) - (120 << 3)
        codes = np.where(np.isnan(size), 127, np.where(size < 2**-6, size * 2**9, normal))
    return codes.astype(np.uint8) | np.signbit(x).astype(np.uint8) << 7, scales


def dequantize_fp8(codes, scales, *, block=FP8_BLOCK):
    """What quantize_fp8 made: codes uint8 [..., N], scales [..., N / block] -> float32 [..., N].

    >>> dequantize_fp8(np.array([126, 184], np.uint8), np.array([0.5], np.float32)).tolist()
    [224.0, -0.5]
    """
    xp = _check_bytes("codes", codes)
    _dims(xp, scales=(scales, "... N"))
    shape = (*codes.shape[:-1], -(-codes.shape[-1] // _integer("block", block, 1)))
    _expect(scales.shape == shape, "scales", f"of shape {scales.shape}", f"{shape}")
    scales = xp.repeat(scales.astype(np.float32), block, axis=-1)[..., : codes.shape[-1]]
    with np.errstate(over="ignore"):
        return xp.asarray(E4M3)[codes] * scales


def _check_bytes(name, x):
    xp = _library(name, x)
    fits = x.dtype == np.uint8 and x.ndim > 0
    _expect(fits, name, f"of {x.ndim} axes and dtype {x.dtype}", "uint8 [..., N]", TypeError)
    return xp


def pack_kv_fp8(kv):
    """V3.2's cache entry of a token, latent and k_pe: kv [..., 576] -> uint8 [..., 656], as FlashMLA has it.

    512 e4m3 codes | 4 float32 scales, powers of two of at least 1e-4 | 64 bfloat16.
    """
    n = _dims(kv=(kv, "... D"))
    _expect(n["D"] == 576, "D", f"{n['D']} in kv", "576")
    return _pack(kv, 64)


def unpack_kv_fp8(packed):
    """What pack_kv_fp8 made: packed uint8 [..., 656] -> float32 [..., 576]."""
    _check_bytes("packed", packed)
    _expect(packed.shape[-1] == 656, "packed", f"of shape {packed.shape}", "[..., 656]")
    return _unpack(packed, 576, 64)


def _packed_bytes(width, rope):
    return width - rope + 4 * -(-(width - rope) // FP8_BLOCK) + 2 * rope


def _pack(x, rope):
    """x [..., D], the last `rope` values in bfloat16, the others in e4m3 -> uint8 [..., _packed_bytes]."""
    if _library("x", x) is not np:
        return _gpu_pack(x, rope)
    # With rope a scale is max(amax / 448, 1e-4) rounded up; without, for index keys, that of quantize_fp8.
    codes, scales = _quantize(x[..., : x.shape[-1] - rope], FP8_BLOCK, "ue8m0", 448e-4 if rope else 1e-4)
    tail = np.ascontiguousarray(x[..., x.shape[-1] - rope :], np.float32)
    bits = tail.view(np.uint32)
    bits = np.where(np.isnan(tail), 0x7FC0, (bits + (bits >> 16 & 1) + 0x7FFF) >> 16).astype("<u2")
    scales = np.ascontiguousarray(scales, "<f4").view(np.uint8)
    return np.concatenate([codes, scales, bits.view(np.uint8)], -1)


def _unpack(packed, width, rope):
    xp, scales, tail = _library("packed", packed), width - rope, packed.shape[-1] - 2 * rope
    x = xp.empty((*packed.shape[:-1], width), np.float32)
    scale = xp.ascontiguousarray(packed[..., scales:tail]).view("<f4")
    x[..., :scales] = dequantize_fp8(packed[..., :scales], scale)
    x[..., scales:] = _widened(xp.ascontiguousarray(packed[..., tail:]).view("<u2"))
    return x


def _widened(bits):
    """bfloat16, given as its bits, to float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _at_precision(x, precision):
    """index_q or index_k as an indexer of that precision sees it.

    fp8: scales of ue8m0 are powers of two, so eq. (1) over these values has the bits of the fp8 kernel's
    relu(q8 . k8) * (weights * scale_q), summed over the heads, times scale_k.
    """
    if precision == "fp8":
        x = dequantize_fp8(*quantize_fp8(x))
        if _library("x", x) is np:
            return x
        import ml_dtypes

        return x.astype(ml_dtypes.bfloat16)  # exact, and what tensor cores take
    return x.astype(np.float16) if precision == "fp16" else x


# ----------------------------------------------------------------------------------------------------------
# 8. Caches
# ----------------------------------------------------------------------------------------------------------


class KVCache:
    """What the tokens so far left behind, for a batch of sequences, each of its own length.

    capacity: tokens per sequence; grow doubles it when it is full, otherwise a full cache raises ValueError.
    storage: "float64", "float32", "float16", "bfloat16" or "fp8", which keeps the last qk_rope_head_dim
    values of "k" in bfloat16. streams: what a token leaves, name=shape.
    attend reads "k" (G, D) and "v" (G, Dv), or "k" alone if it is a tied latent, the indexer "index_k" (E,).
    xp: numpy, or cupy for a cache on the current GPU.

    >>> cache = KVCache(4, k=(1, 2), index_k=(3,))
    >>> cache.append(k=np.ones((1, 3, 1, 2)), index_k=np.ones((1, 3, 3)))
    >>> cache.lengths.tolist(), cache.bytes_per_token
    ([3], 20)
    """

    def __init__(
        self, capacity, *, batch=1, storage="float32", grow=False, qk_rope_head_dim=64, xp=np, **streams
    ):
        self.xp, libraries = xp, (np, sys.modules.get("cupy", np))
        _expect(xp in libraries, "xp", repr(xp), "numpy or cupy")
        capacity, self.batch = _integer("capacity", capacity, 1), _integer("batch", batch, 1)
        _expect(storage in (*FLOATS, "fp8"), "storage", repr(storage), f"one of {(*FLOATS, 'fp8')}")
        _expect(streams, "streams", "empty", "at least one, such as k=(1, 576)")
        if storage == "bfloat16":
            try:
                import ml_dtypes  # noqa: F401, gives NumPy the dtype of this name
            except ImportError:
                raise ImportError("storage 'bfloat16' needs ml_dtypes: pip install ml_dtypes") from None
        self.dtype = np.dtype(storage.replace("fp8", "uint8"))
        self.storage, self.grow, self.closed = storage, bool(grow), False
        for name, shape in streams.items():
            fits = isinstance(shape, tuple) and len(shape) > 0
            _expect(fits, name, repr(shape), "the shape of a stream, a tuple such as (1, 576)")
        self.streams = {name: tuple(_integer(name, n, 1) for n in shape) for name, shape in streams.items()}
        self.qk_rope_head_dim = _integer("qk_rope_head_dim", qk_rope_head_dim, 0)
        self._stored = dict(self.streams)  # but in fp8 the last axis is of bytes
        for name, shape in self.streams.items() if storage == "fp8" else ():
            rope = self._rope(name)
            _expect(shape[-1] > rope, name, f"of shape {shape}", f"a last axis above {rope} for fp8")
            self._stored[name] = (*shape[:-1], _packed_bytes(shape[-1], rope))
        self.capacity, self._lengths = 0, np.zeros(self.batch, np.int64)
        self._data: dict[str, Any] = {}  # the streams in memory, [B, capacity, *shape]
        self._allocate(capacity)

    @property
    def lengths(self):
        """How many tokens each sequence holds, int64 [B]."""
        return self._lengths.copy()

    @property
    def bytes_per_token(self):
        return sum(map(math.prod, self._stored.values())) * self.dtype.itemsize

    @property
    def nbytes(self):
        """Bytes of memory held, whether tokens fill them yet or not."""
        return sum(x.nbytes for x in self._data.values())

    def append(self, *, lengths=None, **tokens):
        """Add tokens[name] [B, T, *shape] to every stream; for sequence b the first lengths[b], or all."""
        self._check_open()
        given, own = sorted(tokens), sorted(self.streams)
        _expect(given == own, "the streams given", given, f"the cache's {own}")
        count = np.shape(tokens[next(iter(self.streams))])[1:2]
        for name, shape in self.streams.items():
            _dims(self.xp, **{name: (tokens[name], "...")})
            expected = (self.batch, *count, *shape)
            _expect(tokens[name].shape == expected, name, f"of shape {tokens[name].shape}", f"{expected}")
        new = _lengths(lengths, self.batch, *count)
        need = int((self._lengths + new).max())
        if need > self.capacity:
            most = f"at most capacity = {self.capacity} tokens, not {need}, or grow=True"
            _expect(self.grow, "the cache", "full", most)
            self._allocate(max(need, 2 * self.capacity))
        for b, (start, more) in enumerate(zip(self._lengths.tolist(), new.tolist())):
            self._write(b, start, {name: self._encode(name, x[b, :more]) for name, x in tokens.items()})
        self._set_lengths(self._lengths + new)

    @contextlib.contextmanager
    def appended(self, *, lengths=None, **tokens):
        """append, for a with block: if that raises, the cache forgets the tokens."""
        before = self.lengths
        self.append(lengths=lengths, **tokens)
        try:
            yield
        except BaseException:
            self.truncate(before)
            raise

    def read(self, name):
        """A view (a copy of fp8) [B, longest length, *shape] of a stream; undefined beyond its own length."""
        return self._decode(name, self.stored(name))

    def stored(self, name):
        """As read, but as it is stored: of fp8 the bytes, for index_scores."""
        self._check_open()
        _expect(name in self.streams, "name", repr(name), f"one of {sorted(self.streams)}")
        return self._stream(name)[:, : self._lengths.max()]

    def window(self, num_tokens, lengths=None):
        """k_start, k_end [B, T] of the num_tokens appended last, the first lengths[b] (default: all) real."""
        self._check_open()
        num_tokens = _integer("num_tokens", num_tokens, 0)
        new = _lengths(lengths, self.batch, num_tokens)
        most = self._lengths.tolist()
        _expect((new <= most).all(), "num_tokens", new.tolist(), f"at most the tokens held, {most}")
        end = self.xp.asarray(_causal_end(self._lengths - new, new, num_tokens))
        return np.zeros_like(end), end

    def attend(self, q, indices, *, d_v=None, scale=None, sink=None, out_dtype=None):
        """sparse_attention of q [B, T, H, D] over the streams "k" and "v", at indices [B, T, K]."""
        self._check_open()
        n = _dims(q=(q, "B T H D"))
        _expect(n["B"] == self.batch, "B", f"{n['B']} in q", f"the cache's batch = {self.batch}")
        shape = {"...": (self.batch,), "T": n["T"], "S": int(self._lengths.max()), "xp": self.xp}
        _check_indices("indices", indices, shape)
        kwargs = {"d_v": d_v, "scale": scale, "sink": sink, "out_dtype": out_dtype}
        if self.xp is not np and "k" in self._data:
            return self._attend_resident(q, indices, **kwargs)
        parts, indices = [], indices if self.xp is np else indices.get()
        for b, length in enumerate(self._lengths):
            used = np.unique(indices[b][indices[b] >= 0])
            _check_indices("indices", used[None], {"...": (), "T": 1, "S": length})
            rows = {name: self._decode(name, x) for name, x in self._rows(b, used).items()}
            own = self.xp.asarray(np.where(indices[b] < 0, -1, np.searchsorted(used, indices[b])))
            k, v = rows["k"], rows.get("v")
            parts.append(sparse_attention(q[b], k, v, own, **kwargs))
        return tuple(np.stack(x) for x in zip(*parts))

    def _attend_resident(self, q, indices, d_v, scale, sink, out_dtype):
        """attend where kernels read the streams as they are stored."""
        if self.storage != "fp8" or "v" in self.streams or self.streams["k"][0] > 1:
            k, v = self.read("k"), self.read("v") if "v" in self.streams else None
            kwargs = {"scale": scale, "sink": sink, "out_dtype": out_dtype}
            return sparse_attention(q, k, v, indices, d_v=d_v, **kwargs)
        k, D, rope = self.stored("k"), self.streams["k"][-1], self.qk_rope_head_dim
        n = _dims(q=(q, "... T H D"), **({} if sink is None else {"sink": (sink, "H")}))
        _expect(n["D"] == D, "D", f"{n['D']} in q", f"{D}, as in the cache")
        _expect(_integer("d_v", d_v, 1) <= D, "d_v", d_v, f"at most k's D = {D}")
        n |= {"S": k.shape[1], "G": 1, "Dv": d_v}
        out_dtype = _out_dtype(out_dtype, q, _accumulator(q))
        args = (n, q, k, None, indices, None, _scale(n, scale), sink)
        return _gpu_attention(*args, packed=(D - rope, rope), out_dtype=out_dtype)

    def truncate(self, lengths):
        """Forget the tokens of each sequence b from lengths[b] on, such as a rejected draft."""
        self._check_open()
        lengths = _lengths(lengths, self.batch)
        most = self._lengths.tolist()
        _expect((lengths <= most).all(), "lengths", lengths.tolist(), f"at most {most}")
        self._set_lengths(lengths)

    def close(self):
        """Give the memory back. To append, read or attend after that raises ValueError."""
        self.closed = True
        self._data.clear()

    def __enter__(self):
        self._check_open()
        return self

    def __exit__(self, *error):
        self.close()

    def _check_open(self):
        _expect(not self.closed, "the cache", "closed", "an open one")

    def _set_lengths(self, lengths):
        self._lengths = lengths

    def _resident(self):
        """The streams that are in memory as a whole, and the shapes in which they are stored."""
        return self._stored

    def _rope(self, name):
        """How many of a stream's last values fp8 leaves in bfloat16."""
        return self.qk_rope_head_dim if name == "k" else 0

    def _encode(self, name, x):
        return _pack(x, self._rope(name)) if self.storage == "fp8" else x

    def _decode(self, name, x):
        return x if self.storage != "fp8" else _unpack(x, self.streams[name][-1], self._rope(name))

    def _allocate(self, capacity):
        grown = {}
        for name, shape in self._resident().items():
            grown[name] = self.xp.zeros((self.batch, capacity, *shape), self.dtype)
            grown[name][:, : self.capacity] = self._data.get(name, 0)
        self._data, self.capacity = grown, capacity

    def _write(self, b, start, tokens):
        for name, x in tokens.items():
            self._data[name][b, start : start + len(x)] = x

    def _stream(self, name):
        return self._data[name]

    def _rows(self, b, used):
        """The tokens `used` of sequence b, for each stream that attention reads."""
        return {name: self._data[name][b, used] for name in ("k", "v") if name in self.streams}


class HybridKVCache(KVCache):
    """A KVCache in two tiers, with the same results to the bit, whatever is evicted.

    The slow tier, a memory-mapped file, holds every token of the streams that attention reads. The fast tier,
    of at most fast_bytes of memory, holds copies of each sequence's last local_window tokens and, of the
    others, those selected most recently (LRU). Streams named index_*, which the indexer reads whole at every
    step, stay in memory besides. path: the file to make (it must not exist, and stays after close); None: a
    temporary one, which close removes. hits and misses count tokens, bytes_moved is what misses read.
    With xp=cupy the slow tier is pinned memory of the host, and misses are read by the GPU over the bus.
    OSError, with the cache as it was: the path cannot be written, or the disk is full.
    """

    PINNED = np.iinfo(np.int64).max

    def __init__(self, capacity, *, fast_bytes, local_window=0, path=None, **kwargs):
        self.fast_bytes = _integer("fast_bytes", fast_bytes, 1)
        self.local_window = _integer("local_window", local_window, 0)
        self.path = path
        self._file: Any = None
        self._slow: Any
        self._slot_of: Any
        self.hits = self.misses = self.bytes_moved = self._clock = 0
        super().__init__(capacity, **kwargs)

    @property
    def fast_nbytes(self):
        """Bytes of the fast tier that hold tokens now."""
        return int((self._stamp >= 0).sum()) * self._fast[0].nbytes

    @property
    def nbytes(self):
        """Bytes of memory held, without the slow tier."""
        return super().nbytes + sum(x.nbytes for x in (self._fast, self._stamp, self._owner, self._slot_of))

    def close(self):
        super().close()
        if self.xp is not np:
            self.xp.cuda.get_current_stream().synchronize()  # it may still read the slow tier
        self._slow = None  # views that were read keep the mapping, and only they
        self._fast = self._stamp = self._owner = self._slot_of = np.zeros((1, 0))
        if self._file is not None:
            self._file.close()  # removes it if it is temporary

    def _resident(self):
        return {name: shape for name, shape in self._stored.items() if name.startswith("index_")}

    def _allocate(self, capacity):
        if self.capacity == 0:
            self._open_tiers()
        # The capacity is the first axis, so that a growing file keeps what it holds in place.
        shape = (capacity, self.batch, self._fast.shape[1])
        slow = self._mapped(shape) if self.xp is np else self._pinned(shape)
        slot_of = np.full((self.batch, capacity), -1)
        slot_of[:, : self.capacity] = self._slot_of
        super()._allocate(capacity)  # the last that can fail
        self._slow, self._slot_of = slow, slot_of

    def _mapped(self, shape):
        nbytes = math.prod(shape) * self.dtype.itemsize
        try:
            # Take room for all of it, so that a full disk is an error here, not a crash at a later write.
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(self._file.fileno(), 0, nbytes)
            self._file.seek(0, os.SEEK_END)
            while (missing := nbytes - self._file.tell()) > 0:
                self._file.write(bytes(min(missing, 2**20)))
            self._file.flush()
        except OSError as error:
            if self.capacity == 0:
                self._file.close()
                Path(self.path).unlink(missing_ok=True)
            message = f"the slow tier cannot hold {nbytes} bytes: {error.strerror}"
            raise OSError(error.errno, message, str(self.path)) from error
        return np.asarray(np.memmap(self._file, self.dtype, "r+", shape=shape))

    def _pinned(self, shape):
        """An array of CuPy's in memory of the host, where its kernels reach it."""
        cuda, nbytes = self.xp.cuda, math.prod(shape) * self.dtype.itemsize
        memory = cuda.alloc_pinned_memory(nbytes)
        pointer = cuda.MemoryPointer(cuda.UnownedMemory(memory.ptr, nbytes, memory), 0)
        slow = self.xp.ndarray(shape, self.dtype, pointer)
        if self.capacity:
            slow[: self.capacity] = self._slow
            cuda.get_current_stream().synchronize()  # before the old memory goes to whoever asks next
        return slow

    def _open_tiers(self):
        self._columns, width = {}, 0  # where each stream stands in a token's record
        for name in self.streams.keys() - self._resident().keys():
            self._columns[name] = slice(width, width + math.prod(self._stored[name]))
            width = self._columns[name].stop
        _expect("k" in self._columns, "streams", sorted(self.streams), "k among them")
        record = width * self.dtype.itemsize
        least = max(1, self.batch * self.local_window) * record
        fits = self.fast_bytes >= least
        _expect(fits, "fast_bytes", self.fast_bytes, f"at least {least}, for the local windows")
        self._fast = self.xp.zeros((self.fast_bytes // record, width), self.dtype)
        slots = len(self._fast)
        self._stamp = np.full(slots, -1)  # when a slot was last used; PINNED in a local window, -1 if empty
        self._owner = np.zeros((slots, 2), np.int64)  # the (sequence, token) in each slot
        self._slot_of = np.full((self.batch, 0), -1)  # the slot of each token, -1 if it has none
        if self.xp is not np:
            _expect(self.path is None, "path", repr(self.path), "None where the slow tier is pinned memory")
            return
        if self.path is None:
            self._file = tempfile.NamedTemporaryFile(prefix="dsa-")  # noqa: SIM115
        else:
            self._file = open(self.path, "x+b")  # noqa: SIM115
        self.path = self._file.name

    def _write(self, b, start, tokens):
        super()._write(b, start, {name: tokens[name] for name in self._resident()})
        for name, columns in self._columns.items():
            rows = self._slow[start : start + len(tokens[name]), b, columns]
            rows[...] = tokens[name].reshape(rows.shape)

    def _stream(self, name):
        if name in self._data:
            return self._data[name]
        whole = self._slow[:, :, self._columns[name]].swapaxes(0, 1)
        return whole.reshape(self.batch, self.capacity, *self._stored[name])

    def _rows(self, b, used):
        slots = self._slot_of[b, used]
        hit = slots >= 0
        at = self.xp.asarray
        rows = self.xp.empty((len(used), self._fast.shape[1]), self.dtype)
        rows[at(hit)] = self._fast[at(slots[hit])]
        rows[at(~hit)] = missed = self._slow[at(used[~hit]), b]
        self.hits += int(hit.sum())
        self.misses += int((~hit).sum())
        self.bytes_moved += missed.nbytes
        self._clock += 1
        self._stamp[slots[hit]] = np.maximum(self._stamp[slots[hit]], self._clock)  # what is pinned stays so
        self._admit(b, used[~hit], missed, self._clock)
        split = {name: self.xp.ascontiguousarray(rows[:, columns]) for name, columns in self._columns.items()}
        return {name: x.reshape(-1, *self._stored[name]) for name, x in split.items()}

    def _admit(self, b, tokens, rows, stamp):
        """Copy tokens into the slots unused for longest; where these are too few, only the latest tokens."""
        free = np.flatnonzero(self._stamp < self._clock)
        free = free[np.argsort(self._stamp[free], kind="stable")[: len(tokens)]]
        evicted = self._owner[free[self._stamp[free] >= 0]]
        self._slot_of[evicted[:, 0], evicted[:, 1]] = -1
        tokens, rows = tokens[len(tokens) - len(free) :], rows[len(rows) - len(free) :]
        self._fast[self.xp.asarray(free)], self._stamp[free] = rows, stamp
        self._owner[free, 0], self._owner[free, 1], self._slot_of[b, tokens] = b, tokens, free

    def _set_lengths(self, lengths):
        """Forget what lies beyond the new lengths, and pin the new local windows in place of the old ones."""
        self._clock += 1
        self._stamp[self._stamp == self.PINNED] = self._clock - 1
        for b, (old, new) in enumerate(zip(self._lengths.tolist(), lengths.tolist())):
            gone = self._slot_of[b, new:old]
            self._stamp[gone[gone >= 0]] = -1
            gone[:] = -1
        for b, new in enumerate(lengths.tolist()):
            window = np.arange(max(0, new - self.local_window), new)
            slots = self._slot_of[b, window]
            self._stamp[slots[slots >= 0]] = self.PINNED
            rows = self._slow[self.xp.asarray(window[slots < 0]), b]
            self._admit(b, window[slots < 0], rows, self.PINNED)
        self._lengths = lengths


# ----------------------------------------------------------------------------------------------------------
# 9. One DeepSeek-V3.2 layer
# ----------------------------------------------------------------------------------------------------------

WEIGHTS = {  # the name in DeepSeek's code: the name in the checkpoint, axes: fields of LayerDims, or free
    "wq_a": ("q_a_proj", "q_lora_rank dim"),
    "q_norm": ("q_a_layernorm", "q_lora_rank"),
    "wq_b": ("q_b_proj", "n_heads*(qk_nope_head_dim+qk_rope_head_dim) q_lora_rank"),
    "wkv_a": ("kv_a_proj_with_mqa", "kv_lora_rank+qk_rope_head_dim dim"),
    "kv_norm": ("kv_a_layernorm", "kv_lora_rank"),
    "wkv_b": ("kv_b_proj", "n_heads*(qk_nope_head_dim+v_head_dim) kv_lora_rank"),
    "wo": ("o_proj", "dim n_heads*v_head_dim"),
    "indexer.wq_b": ("indexer.wq_b", "index_n_heads*index_head_dim q_lora_rank"),
    "indexer.wk": ("indexer.wk", "index_head_dim dim"),
    "indexer.k_norm": ("indexer.k_norm", "index_head_dim"),
    "indexer.k_norm.bias": ("indexer.k_norm.bias", "index_head_dim"),
    "indexer.weights_proj": ("indexer.weights_proj", "index_n_heads dim"),
}
LAYER_PREFIX = re.compile(r"(?:model\.)?layers\.(\d+)\.(?:self_attn|attn)\.")
SCALES = ".weight_scale_inv"  # ends the name of the scales, of 128 x 128 blocks, of an fp8 weight
SAFETENSORS = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "F8_E4M3": "u1"}


@dataclass(frozen=True)
class LayerDims:
    """The sizes and switches of a DSALayer; the other sizes follow from its weights. Defaults: V3.2."""

    n_heads: int = 128
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    index_n_heads: int = 64
    index_head_dim: int = 128
    index_topk: int = 2048
    norm_eps: float = 1e-6  # of RMSNorm and LayerNorm
    rope_theta: float = 10000.0
    rope_factor: float = 40.0  # by how much YaRN extended original_seq_len; 1: no YaRN
    original_seq_len: int = 4096
    beta_fast: float = 32  # pairs that turn more often than this in original_seq_len keep their frequency
    beta_slow: float = 1  # those that turn less often are slowed by rope_factor
    mscale: float = 1.0
    index_rope_interleaved: bool = False  # True: the indexer of the GLM-5 family
    hadamard: bool = False  # spread outliers of the indexer's vectors, for fp8; no exact score changes
    indexer_precision: str = "fp32"  # as in DSAConfig

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type == "int":
                _integer(field.name, value, 1)
            elif field.type == "float":
                number = isinstance(value, numbers.Real) and not isinstance(value, bool)
                fits = number and math.isfinite(value) and (value > 0 or field.name == "mscale")
                _expect(fits, field.name, repr(value), "a positive, finite number")
            elif field.type == "bool":
                _expect(isinstance(value, bool), field.name, repr(value), "True or False")
        rope, E, precision = self.qk_rope_head_dim, self.index_head_dim, self.indexer_precision
        _expect(rope % 2 == 0 and rope <= E, "qk_rope_head_dim", rope, f"even, at most index_head_dim = {E}")
        _expect(not self.hadamard or E & (E - 1) == 0, "index_head_dim", E, "a power of 2, for hadamard")
        _expect(self.rope_theta > 1, "rope_theta", self.rope_theta, "above 1")
        _expect(self.rope_factor >= 1, "rope_factor", self.rope_factor, "at least 1")
        ordered = self.beta_fast >= self.beta_slow
        _expect(ordered, "beta_fast", self.beta_fast, f"at least beta_slow = {self.beta_slow}")
        _expect(precision in PRECISIONS, "indexer_precision", repr(precision), f"one of {PRECISIONS}")

    def softmax_scale(self):
        """(nope + rope)^-0.5, with YaRN times the square of its factor.

        >>> round(LayerDims().softmax_scale(), 8)
        0.13523378
        """
        m = 0.1 * self.mscale * math.log(self.rope_factor) + 1
        return (self.qk_nope_head_dim + self.qk_rope_head_dim) ** -0.5 * m * m

    def frequencies(self):
        """By how much each pair of RoPE turns from one position to the next, [qk_rope_head_dim / 2]."""
        d, i = self.qk_rope_head_dim, np.arange(self.qk_rope_head_dim // 2)

        def pair(turns):  # the (fractional) pair that turns so often in original_seq_len positions
            turned = math.log(self.original_seq_len / (2 * math.pi * turns))
            return d * turned / (2 * math.log(self.rope_theta))

        lo, hi = math.floor(pair(self.beta_fast)), math.ceil(pair(self.beta_slow))
        lo, hi = (min(max(x, 0), d - 1) for x in (lo, hi))
        slowed = np.clip((i - lo) / max(hi - lo, 0.001), 0, 1)
        f = self.rope_theta ** (-2 * i / d)
        return f / self.rope_factor * slowed + f * (1 - slowed)


class DSALayer:
    """DeepSeek-V3.2's attention layer: MLA over the keys that the lightning indexer selects.

    weights: arrays [out, in] under the names of the checkpoint or of DeepSeek's code, see WEIGHTS, also
    with model.layers.N.self_attn. before them; dims: the fields of LayerDims. ValueError for a weight that
    is missing, superfluous or of a wrong shape. A layer without indexer.* weights takes its selection from
    another layer: layer(x, indices=indices).

    Attributes: dim and kv_lora_rank, which follow from the weights, dims, has_indexer, and streams, what a
    token leaves in a cache.
    """

    def __init__(self, weights, **dims):
        self.dims = d = LayerDims(**dims)
        self.weights, n = _named_weights(weights, d)
        self.dim, self.kv_lora_rank = n["dim"], n["kv_lora_rank"]
        self.has_indexer = "indexer.wk" in self.weights
        index_k = {"index_k": (d.index_head_dim,)} if self.has_indexer else {}
        self.streams = {"k": (1, n["kv_lora_rank+qk_rope_head_dim"]), **index_k}
        self.xp, i = n["xp"], np.arange(d.index_head_dim)
        signs = (-1.0) ** np.bitwise_count(i[:, None] & i)  # Sylvester's matrix, entry by entry
        self._hadamard = self.xp.asarray(signs * d.index_head_dim**-0.5)
        self._frequencies = d.frequencies()

    @classmethod
    def from_safetensors(cls, path, layer=0, **dims):
        """A layer of a checkpoint: its folder, its model.safetensors.index.json, or a .safetensors file.

        fp8 weights are multiplied by their scales, one for each block of 128 x 128. What DeepSeek's script
        converted works too, if it is in one part (model0-mp1). dims: where config.json differs from V3.2.
        ValueError or TypeError where something is missing, cut short, or of another kind.
        """
        path, layer = os.path.expanduser(os.fspath(path)), _integer("layer", layer, 0)
        files = [path]
        if os.path.isdir(path):
            index = os.path.join(path, "model.safetensors.index.json")
            whole = [os.path.join(path, x) for x in sorted(os.listdir(path)) if x.endswith(".safetensors")]
            files = [index] if os.path.exists(index) else whole
        if len(files) == 1 and files[0].endswith(".json"):
            with open(files[0], encoding="utf-8") as file:
                shards = json.load(file).get("weight_map", {})
            shards = {file for name, file in shards.items() if _of_layer(name, layer)}
            files = [os.path.join(os.path.dirname(files[0]), file) for file in sorted(shards)]
        weights: dict[str, Any] = {}
        for name in files:
            weights |= _read_safetensors(name, layer)
        _expect(weights, "path", repr(path), f"a checkpoint with attention weights of layer {layer}")
        for name in [name for name in weights if name.endswith(SCALES)]:
            own = name.removesuffix(SCALES) + ".weight"
            scales, codes = weights.pop(name), weights.get(own, np.zeros(0))
            _expect(codes.dtype == np.uint8, name, "given", f"fp8 weights for it, {own}")
            shape = tuple(-(-size // FP8_BLOCK) for size in codes.shape)
            fits = scales.shape == shape
            _expect(fits, name, f"of shape {scales.shape}", f"{shape}, one for 128 x 128 weights")
            scales = np.repeat(scales, FP8_BLOCK, axis=0)[: len(codes)]
            weights[own] = dequantize_fp8(codes, scales)
        for name, x in weights.items():
            scales = name.removesuffix(".weight") + SCALES
            _expect(x.dtype != np.uint8, scales, "missing", f"the scales of {name}, which is fp8")
        return cls(weights, **dims)

    def new_cache(self, batch, capacity, storage="float32", grow=False, **tiers):
        """An empty cache for this layer alone, of what tokens leave: latent and k_pe, and the index key.

        The arguments are KVCache's; with fast_bytes, and local_window or path, it is a HybridKVCache.
        """
        kind = HybridKVCache if tiers else KVCache
        kwargs = {"batch": batch, "storage": storage, "grow": grow, "xp": self.xp, **tiers}
        return kind(capacity, qk_rope_head_dim=self.dims.qk_rope_head_dim, **kwargs, **self.streams)

    def __call__(self, x, cache=None, *, lengths=None, indices=None, core="auto"):
        """x [B, T, dim], normed -> y [B, T, dim] in x's dtype, and the selection, indices [B, T, K].

        x has gone through the norm before the attention, which is no part of this layer. All is computed in
        float32, or float64 if x or a weight is; if x alone is, that converts the weights at every call.
        indices are int32, ascending, then -1; K = min(index_topk, keys so far).
        lengths [B]: how many of each sequence's T tokens are real; the rows of the others are 0, and -1.
        cache: of this layer's streams; x continues its sequences, each from its own length on, and a call
        that raises leaves it as it was. indices: attend to these instead of selecting.
        core: "absorbed" attends to the latents themselves, "expanded" to the keys and values of every head,
        made from them; "auto" takes the cheaper one. They differ by rounding.
        """
        n, dtype = _dims(self.xp, x=(x, "B T dim")), _accumulator(x, *self.weights.values())
        _expect(n["dim"] == self.dim, "dim", f"{n['dim']} in x", f"{self.dim}")
        _expect(core in ("auto", "absorbed", "expanded"), "core", repr(core), "auto, absorbed or expanded")
        able = indices is not None or self.has_indexer
        _expect(able, "indices", None, "another layer's, as this layer has no indexer weights")
        new = _lengths(lengths, n["B"], n["T"])
        real = np.arange(n["T"]) < new[:, None]
        finite = self.xp is not np or np.isfinite(x[real]).all()  # on a GPU that would wait for it
        _expect(finite, "x", "NaN or infinite in a real token", "finite numbers")
        start = np.zeros(n["B"], np.int64)
        if cache is not None:
            _check_type("cache", cache, KVCache)
            has = (cache.streams, cache.qk_rope_head_dim, cache.batch)
            needs = (self.streams, self.dims.qk_rope_head_dim, n["B"])
            own = f"{needs}, as new_cache makes it"
            _expect(has == needs, "cache", f"of (streams, qk_rope_head_dim, batch) = {has}", own)
            start = cache.lengths
        k_end = _causal_end(start, new, n["T"])
        if indices is not None:
            shape = {"...": real.shape[:1], "T": n["T"], "S": k_end.max(initial=0), "xp": self.xp}
            _check_indices("indices", indices, shape)
            seen = self.xp is not np or (indices < k_end[..., None]).all()
            _expect(seen, "indices", "ahead of a token", "only keys up to the token, -1 for padding")
        w = {name: weight.astype(dtype, copy=False) for name, weight in self.weights.items()}
        q, tokens, indexer = self._project(w, x.astype(dtype), start, selects=indices is None)
        with contextlib.nullcontext() if cache is None else cache.appended(lengths=new, **tokens):
            if indices is None:
                indices = self._select(indexer, tokens["index_k"], cache, self.xp.asarray(k_end))
            y = self._core(w, q, tokens["k"], indices, cache, core) @ w["wo"].T
        return y.astype(x.dtype), indices

    def _select(self, indexer, index_k, cache, k_end):
        """Equations (1) and (2) for the indexer's queries and weights over the cache or index_k [B, S, E]."""
        rounded = self.xp is not np and self.dims.indexer_precision == "fp8"
        if cache is not None and cache.storage == "fp8" and rounded and self.dims.index_head_dim <= FP8_BLOCK:
            codes, scales = quantize_fp8(indexer["index_q"])  # exact, as it is rounded already
            indexer = {"index_q": codes, "weights": indexer["weights"] * scales[..., 0]}
            index_k = cache.stored("index_k")
        elif cache is not None:
            index_k = cache.read("index_k")
            index_k = index_k.astype(indexer["index_q"].dtype, copy=False) if rounded else index_k
        return lightning_select(**indexer, index_k=index_k, top_k=self.dims.index_topk, k_end=k_end)

    def _project(self, w, x, start, selects=True):
        """The tokens x [B, T, dim] at positions from start [B] on -> q [B, T, H, nope + rope], what the
        tokens leave (the streams: k is [c | k_pe]), and, if it selects, the indexer's queries and weights.
        """
        d, batch = self.dims, x.shape[:2]
        nope, rope, J, E = d.qk_nope_head_dim, d.qk_rope_head_dim, d.index_n_heads, d.index_head_dim
        angles = (start[:, None] + np.arange(batch[1]))[..., None] * self._frequencies  # [B, T, rope / 2]
        qr = _rms_norm(_by_rows(x, w["wq_a"]), w["q_norm"], d.norm_eps)
        q = (qr @ w["wq_b"].T).reshape(*batch, d.n_heads, nope + rope)
        q[..., nope:] = _rotate(q[..., nope:], angles, interleaved=True)
        k = (x @ w["wkv_a"].T)[:, :, None]  # [B, T, 1, R + rope]
        k[..., :-rope] = _rms_norm(k[..., :-rope], w["kv_norm"], d.norm_eps)
        k[..., -rope:] = _rotate(k[..., -rope:], angles, interleaved=True)
        if not self.has_indexer:
            return q, {"k": k}, {}

        def prepared(u):  # a vector of the indexer [B, T, J, E]
            u[..., :rope] = _rotate(u[..., :rope], angles, d.index_rope_interleaved)
            u = u @ self._hadamard.astype(u.dtype) if d.hadamard else u
            return _at_precision(u, d.indexer_precision)

        index_k = _by_rows(x, w["indexer.wk"])
        index_k -= index_k.mean(-1, keepdims=True)  # LayerNorm
        index_k = _rms_norm(index_k, w["indexer.k_norm"], d.norm_eps) + w["indexer.k_norm.bias"]
        tokens = {"k": k, "index_k": prepared(index_k[:, :, None])[:, :, 0]}
        if not selects:
            return q, tokens, {}
        index_q = prepared(_by_rows(qr, w["indexer.wq_b"]).reshape(*batch, J, E))
        weights = _by_rows(x, w["indexer.weights_proj"]) * (J**-0.5 * E**-0.5)
        return q, tokens, {"index_q": index_q, "weights": weights}

    def _core(self, w, q, k, indices, cache, core):
        """Equation (3) of q [B, T, H, nope + rope] over the cache or latents k [B, S, 1, R + rope], in one of
        its two forms -> [B, T, H * v].
        """
        d, R, T, K = self.dims, self.kv_lora_rank, q.shape[1], indices.shape[-1]
        nope, rope, each = d.qk_nope_head_dim, d.qk_rope_head_dim, d.qk_nope_head_dim + d.v_head_dim
        S = k.shape[1] if cache is None else int(cache.lengths.max(initial=0))
        up, q = w["wkv_b"].reshape(d.n_heads, each, R), q.swapaxes(1, 2)  # [H, nope + v, R], [B, H, T, ...]
        if core == "auto":
            # Fewer multiplications a head? Expanded keys are worth it where all are streamed under a mask.
            streamed = 2.5 * K >= S and self.xp is np and not isinstance(cache, HybridKVCache)
            expanded = S * R * each + T * S * (each + rope) < T * R * each + T * K * (2 * R + rope)
            core = "expanded" if streamed and expanded else "absorbed"
        if core == "expanded":
            k = k if cache is None else cache.read("k")
            out = self._attend_expanded(q, k[:, None, :, 0], up, indices[:, None])
        else:  # q . W c = qW . c
            latent_q = np.empty_like(q, shape=(*q.shape[:3], R + rope), order="C")
            np.matmul(q[..., :nope], up[:, :nope], out=latent_q[..., :R])
            latent_q[..., R:] = q[..., nope:]
            attend = functools.partial(sparse_attention, k=k, v=None) if cache is None else cache.attend
            out, _ = attend(latent_q.swapaxes(1, 2), indices=indices, d_v=R, scale=d.softmax_scale())
            out = out.swapaxes(1, 2) @ up[:, nope:].swapaxes(1, 2)  # [B, H, T, v]
        return out.swapaxes(1, 2).reshape(*indices.shape[:2], d.n_heads * d.v_head_dim)

    def _attend_expanded(self, q, k, up, indices):
        """q [B, H, T, nope + rope], latents k [B, 1, S, R + rope], up [H, nope + v, R] -> [B, H, T, v].

        A head is a batch entry of its own, which makes for larger products, and few are expanded at a time.
        """
        d, R, some = self.dims, self.kv_lora_rank, max(1, 2**25 // max(1, k.size))
        out = np.empty_like(q, shape=(*q.shape[:3], d.v_head_dim))
        for h in range(0, d.n_heads, some):
            q_h, kv = q[:, h : h + some], k[..., :R] @ up[h : h + some].swapaxes(1, 2)  # [B, h, S, nope + v]
            k_pe = np.broadcast_to(k[..., R:], (*kv.shape[:3], d.qk_rope_head_dim))
            keys, values = np.split(kv, [d.qk_nope_head_dim], axis=-1)
            keys = np.concatenate([keys, k_pe], -1)[..., None, :]  # [B, h, S, 1, nope + rope]
            same = np.broadcast_to(indices, (*q_h.shape[:3], indices.shape[-1]))
            heads = (q_h[..., None, :], keys, values[..., None, :])
            out[:, h : h + some] = sparse_attention(*heads, same, scale=d.softmax_scale())[0][..., 0, :]
        return out


def _by_rows(x, weight):
    """x [B, T, in] @ weight [out, in].T with the same bits for a token in any batch, block or chunk.

    As in _score_block, all calls of BLAS are alike: one row by a part of the weight that fits an L2 cache.
    """
    if _library("x", x) is not np:
        return x @ weight.T
    out = np.empty((*x.shape[:2], 1, len(weight)), x.dtype)
    part = max(1, KEY_TILE**2 // weight.shape[1])

    def work(b, t0, t1):
        for i in range(0, len(weight), part):
            np.matmul(x[b][t0:t1, None], weight[i : i + part].T, out=out[b][t0:t1, :, i : i + part])

    _for_blocks(x.shape[:1], x.shape[1], 64, work)
    return out[:, :, 0]


def _rms_norm(x, weight, eps):
    return weight * x / np.sqrt((x * x).mean(-1, keepdims=True) + eps)


def _rotate(x, angles, interleaved):
    """RoPE: turn each pair of x [B, T, H, d] by angles [B, T, d / 2].

    The pairs are (2i, 2i + 1) if interleaved, otherwise (i, i + d / 2).
    """
    d, xp = x.shape[-1], _library("x", x)
    i, j = (slice(0, d, 2), slice(1, d, 2)) if interleaved else (slice(0, d // 2), slice(d // 2, d))
    cos, sin = (xp.asarray(f(angles)[:, :, None], x.dtype) for f in (np.cos, np.sin))
    out, a, b = np.empty_like(x), x[..., i], x[..., j]
    out[..., i], out[..., j] = a * cos - b * sin, a * sin + b * cos
    return out


def _weight_name(name):
    """A weight's name in WEIGHTS, out of any of its names; of another name what follows the prefix."""
    name = LAYER_PREFIX.sub("", name, count=1).removesuffix(".weight")
    return {alias: ours for ours, (alias, _) in WEIGHTS.items()}.get(name, name)


def _of_layer(name, layer):
    prefix = LAYER_PREFIX.match(name)
    return int(prefix[1]) == layer if prefix else _weight_name(name.replace(SCALES, ".weight")) in WEIGHTS


def _named_weights(weights, d):
    """The weights by their names in WEIGHTS, checked, in one dtype; and the sizes of their axes."""
    found: dict[str, Any] = {}
    given: dict[str, str] = {}
    for key, x in weights.items():
        name = _weight_name(key)
        _expect(name in WEIGHTS, key, "no weight of this layer", f"one of {list(WEIGHTS)}")
        _expect(name not in found, key, f"the same weight as {given.get(name)}", "each once")
        found[name], given[name] = x, key
    indexed = any(name.startswith("indexer.") for name in found)
    for name, (alias, _) in WEIGHTS.items():
        needed = indexed or not name.startswith("indexer.")
        _expect(name in found or not needed, f"{name} ({alias})", "missing", "it among the weights")
    n = _dims(**{given[name]: (x, WEIGHTS[name][1]) for name, x in found.items()})
    known = vars(d) | {"kv_lora_rank": n["kv_lora_rank"]}
    for name, x in found.items():
        for axis, size in zip(WEIGHTS[name][1].split(), x.shape):
            if all(word in known for word in re.findall(r"\w+", axis)):
                expected = eval(axis, {}, known)  # a product in WEIGHTS
                _expect(size == expected, given[name], f"of shape {x.shape}", f"{axis} = {expected}")
    dtype = _accumulator(*found.values())
    return {name: x.astype(dtype, copy=False) for name, x in found.items()}, n


def _read_safetensors(path, layer):
    """The tensors of a layer in a file, bfloat16 as float32 and fp8, which safetensors' own NumPy side lacks,
    as its codes. A file is a length, a header in JSON, and the tensors.
    """
    found, total = {}, os.path.getsize(path)
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        whole = "a whole safetensors file (is it a Git LFS pointer?)"
        _expect(0 < size <= total - 8, path, f"a file of {total} bytes", whole)
        try:
            header = json.loads(file.read(size))
        except ValueError:
            raise ValueError(f"{path} is without a readable header, expected {whole}") from None
    for raw, entry in header.items():
        name = re.sub(r"\.scale$", SCALES, raw)  # so DeepSeek's conversion script calls it
        if name != "__metadata__" and _of_layer(name, layer):
            dtype, count = SAFETENSORS.get(entry["dtype"]), math.prod(entry["shape"])
            _expect(dtype, name, f"of dtype {entry['dtype']}", f"one of {[*SAFETENSORS]}", TypeError)
            first = 8 + size + entry["data_offsets"][0]
            _expect(first + count * np.dtype(dtype).itemsize <= total, path, "cut short", f"all of {name}")
            x = np.fromfile(path, dtype, count, offset=first)
            found[name] = (_widened(x) if x.dtype == np.uint16 else x).reshape(entry["shape"])
    return found


# ----------------------------------------------------------------------------------------------------------
# 10. Training the indexer
# ----------------------------------------------------------------------------------------------------------

# The indexer learns to score high what the main attention looks at: first in a dense warm-up, with everything
# else frozen, then inside its own selection, while the model learns through the sparse attention. What a key
# gets from many queries is added up block by block, in order: no number of threads changes a bit.


def sparse_attention_backward(
    q, k, v, indices, out, lse, dout, *, d_v=None, scale=None, sink=None, deterministic=True
):
    """The gradients of out, lse = sparse_attention(q, k, v, indices, ...), for dout [..., T, H, Dv], out's.

    q [..., T, H, D], k [..., S, G, D], v [..., S, G, Dv] (or None), indices [..., T, K], lse [..., T, H].
    With P = exp(scale * q.k - logaddexp(lse, sink)) and dS = P * (dout.v - dout.out), summed over all slots:
    dq = scale * dS k, dk = scale * dS q, dv = P dout, dsink = -exp(sink - logaddexp(lse, sink)) * dout.out
    -> dq, dk, dv, dsink, like q, k, v, sink in shape and dtype; dv is None where v is, and dk holds both
    parts; dsink is None without sink. Slots of -1 scatter nowhere. Errors as in sparse_attention.
    deterministic=False lets a GPU add up what a key gets in any order, by atomics, without sorting first.
    Of bfloat16 a GPU rounds P and dS to it, for its tensor cores, and sums in float32.

    >>> one, v, slots = np.ones((1, 1, 1)), np.array([[[1.0]], [[3.0]]]), np.array([[0, 1]])
    >>> out, lse = sparse_attention(one, 0 * v, v, slots)
    >>> dq, dk, dv, _ = sparse_attention_backward(one, 0 * v, v, slots, out, lse, one)
    >>> dk.ravel().round(6).tolist(), dv.ravel().round(6).tolist()
    ([-0.5, 0.5], [0.5, 0.5])
    """
    tied = v is None
    n, v, scale = _attention_dims(q, k, v, d_v, scale, sink)
    outs = {"out": (out, "... T H Dv"), "lse": (lse, "... T H"), "dout": (dout, "... T H Dv")}
    _dims(q=(q, "... T H D"), v=(v, "... S G Dv"), **outs)
    _check_indices("indices", indices, n)
    dtype, r, D = _accumulator(q, k, v), n["H"] // n["G"], n["D"]
    width = D if tied else D + n["Dv"]  # of [dk | dv]
    dq, dkv = (n["xp"].zeros(shape, dtype) for shape in (q.shape, (*k.shape[:-1], width)))
    z = n["xp"].full(n["H"], -np.inf, dtype) if sink is None else sink.astype(dtype)
    dz = np.zeros_like(z)

    def work(b, t0, t1):
        rows = indices[b][t0:t1].astype(np.int64)  # [T, K]
        keys, values = (_gather(x[b], rows, dtype).swapaxes(1, 2) for x in (k, v))  # [T, G, K, D]
        heads = (x[b][t0:t1].astype(dtype).reshape(len(rows), n["G"], r, -1) for x in (q, out, dout, lse))
        q_t, out_t, dout_t, lse_t = heads  # [T, G, H/G, D], Dv, Dv, 1
        z_t = z.reshape(n["G"], r, 1)
        p = np.exp(scale * (q_t @ keys.swapaxes(2, 3)) - np.logaddexp(lse_t, z_t))  # [T, G, H/G, K]
        delta = (dout_t * out_t).sum(-1, keepdims=True)
        ds = scale * p * (dout_t @ values.swapaxes(2, 3) - delta)
        ds = np.where(rows[:, None, None] >= 0, ds, 0)  # of p, _by_key drops what is absent
        dq[b][t0:t1] = (ds @ keys).reshape(len(rows), n["H"], D)
        slots = np.empty((*keys.shape[:-1], width), dtype)
        slots[..., :D] = ds.swapaxes(2, 3) @ q_t
        from_v = slots[..., : n["Dv"]] if tied else slots[..., D:]
        from_v[:] = p.swapaxes(2, 3) @ dout_t + (from_v if tied else 0)
        from_z = np.where(lse_t == -np.inf, 0, delta / (1 + np.exp(lse_t - z_t)))
        return *_by_key(rows, slots.swapaxes(1, 2)), from_z.sum(0).ravel()

    def add(b, result):
        keys, sums, from_z = result
        dkv[b][keys] += sums
        dz[:] -= from_z

    if n["xp"] is np:
        _for_blocks(n["..."], n["T"], _slot_rows(indices, n["G"] * (D + n["Dv"]) + n["H"]), work, add)
    else:
        heads = (q, k, None if tied else v, out, dout)
        _gpu_attention_backward(n, *heads, indices, lse, z, scale, dq, dkv, dz, deterministic)
    dk, dv = dkv[..., :D].astype(k.dtype), None if tied else dkv[..., D:].astype(v.dtype)
    return dq.astype(q.dtype), dk, dv, None if sink is None else dz.astype(sink.dtype)


def attention_target(q, k, *, scale=None, k_start=None, k_end=None, indices=None):
    """What the indexer learns: the main attention's probabilities, summed over heads, L1-normalised.

    q [..., T, H, D], k [..., S, G, D] -> p [..., T, S] over the window (dense warm-up); or, with indices
    [..., T, K], p [..., T, K], a softmax inside the selected set (sparse stage), in which windows hide keys
    only if they are given. 0 for keys not seen. float32, float64 for float64 input.

    >>> attention_target(np.ones((1, 2, 1)), np.log([[[1.0]], [[3.0]]])).round(6)
    array([[0.25, 0.75]])
    """
    n = _dims(q=(q, "... T H D"), k=(k, "... S G D"))
    windows, scale = _support(n, k_start, k_end, indices), _scale(n, scale)
    if n["xp"] is not np:
        return _gpu_attention_target(n, q, k, indices, windows, scale)
    dtype, width = _accumulator(q, k), n["S"] if indices is None else indices.shape[-1]
    target, mass = np.zeros((*n["..."], n["T"], width), dtype), _mass(n, q, k, scale, windows)

    def dense(b, t0, t1):
        lo, hi = _span(*(w[b][t0:t1] for w in windows))
        target[b][t0:t1, lo:hi] = mass(b, t0, t1, lo, hi) / n["H"]

    def sparse(b, t0, t1):
        rows = _visible(indices[b][t0:t1], *(w[b][t0:t1] for w in windows))  # [T, K]
        keys = _gather(k[b], rows, dtype).transpose(0, 2, 3, 1)  # [T, G, D, K]
        heads = q[b][t0:t1].astype(dtype).reshape(len(rows), n["G"], n["H"] // n["G"], n["D"])
        x = np.where(rows[:, None, None] >= 0, scale * (heads @ keys), -np.inf)
        target[b][t0:t1] = _softmax(x)[0].sum((1, 2)) / n["H"]

    if indices is None:
        _for_blocks(n["..."], n["T"], max(1, min(64, ROW_BUFFER // max(1, 4 * n["S"] * n["H"]))), dense)
    else:
        _for_blocks(n["..."], n["T"], _slot_rows(indices, n["G"] * n["D"] + n["H"]), sparse)
    return target


def indexer_loss(
    index_q, index_k, weights, target, *, indices=None, k_start=None, k_end=None, deterministic=True
):
    """KL(p || softmax(I)), summed over all rows, of the scores I of (1); and its gradients, in closed form.

    index_q [..., T, J, E], index_k [..., S, E], weights [..., T, J]: as in index_scores.
    target: attention_target's, [..., T, S], or [..., T, K] with the same indices; a row of zeros, and a row
    that sees no key, adds nothing. With rows p that sum to 1, dI = softmax(I) - p.
    -> loss, (d_index_q, d_index_k, d_weights), these in shape and dtype like what they belong to; the loss a
    float, on a GPU an array without axes. deterministic: as in sparse_attention_backward.

    >>> one = np.ones((1, 1, 1))
    >>> loss, grads = indexer_loss(one, np.log([[1.0], [3.0]]), one[0], np.array([[0.25, 0.75]]))
    >>> round(abs(loss), 6), grads[1].round(6).ravel().tolist()
    (0.0, [0.0, 0.0])
    """
    parts = {"index_q": (index_q, "... T J E"), "index_k": (index_k, "... S E")}
    parts["weights"] = (weights, "... T J")
    n = _dims(**parts, target=(target, "... T S" if indices is None else "... T K"))
    windows = _support(n, k_start, k_end, indices)
    if n["xp"] is not np:
        return _gpu_indexer_loss(n, index_q, index_k, weights, target, indices, windows, deterministic)
    dtype = _accumulator(index_q, index_k, weights)
    d_q, d_k, d_w = (np.zeros(x.shape, dtype) for x in (index_q, index_k, weights))
    losses = np.zeros((*n["..."], n["T"]))

    def work(b, t0, t1):
        start, end = (w[b][t0:t1] for w in windows)
        if indices is None:
            lo, hi = _span(start, end)
            rows, p = _visible(np.arange(lo, hi)[None], start, end), target[b][t0:t1, lo:hi]
            keys = np.where((rows >= 0).any(0)[:, None], index_k[b][lo:hi], 0).astype(dtype)  # [N, E]
        else:
            rows, p = _visible(indices[b][t0:t1], start, end), target[b][t0:t1]
            keys = _gather(index_k[b], rows, dtype)  # [T, N, E]
        sees, (M, N) = rows >= 0, rows.shape  # [T, N]
        q, w = (x[b][t0:t1].astype(dtype) for x in (index_q, weights))
        q[~sees.any(1)] = w[~sees.any(1)] = 0  # of who sees nothing, and may be anything
        q = q.reshape(M * n["J"], n["E"]) if indices is None else q  # one product where all share the keys
        r = (q @ keys.swapaxes(-1, -2)).reshape(M, n["J"], N)
        on = np.maximum(r, 0, out=r)
        scores = (w[:, None] @ on)[:, 0]  # [T, N]                                                      (1)
        losses[b][t0:t1], d_scores = _kl(p, scores, sees)
        d_w[b][t0:t1] = (on @ d_scores[..., None])[..., 0]
        d_r = d_scores[:, None] * w[..., None]  # [T, J, N]
        d_r *= on > 0
        d_r = d_r.reshape(*q.shape[:-1], N)
        d_q[b][t0:t1] = (d_r @ keys).reshape(M, n["J"], n["E"])
        d_keys = d_r.swapaxes(-1, -2) @ q
        return (slice(lo, hi), d_keys) if indices is None else _by_key(rows, d_keys)

    def add(b, result):
        d_k[b][result[0]] += result[1]

    held = n["J"] * 16 + (0 if indices is None else n["E"])
    _for_blocks(n["..."], n["T"], _slot_rows(target, held), work, add)
    grads = (d.astype(x.dtype) for d, x in zip((d_q, d_k, d_w), (index_q, index_k, weights)))
    return float(losses.sum()), tuple(grads)


def _kl(p, scores, sees):
    """KL(p || softmax(scores)) of each row [T] over the keys it sees, and its slope along scores [T, N]."""
    scores, p = np.where(sees, scores, -np.inf), np.where(sees, p, 0).astype(scores.dtype)
    soft, lse = _softmax(scores)
    losses = np.where(p > 0, p * (np.log(p) - scores + lse), 0).sum(1)
    return losses, np.where(sees, p.sum(1, keepdims=True) * soft - p, 0)


def learned_loss(q, k, mlp, target, *, indices=None, k_start=None, k_end=None):
    """indexer_loss of the scorer SELECTORS["learned"], w_out . relu(w_q q + w_k k + b).

    q [..., T, H, D], k [..., S, G, D], mlp = (w_q [F, G*D], w_k [F, G*D], b [F], w_out [F]);
    q and k are summed over the heads of a group, as there -> loss, (d_w_q, d_w_k, d_b, d_w_out)

    The scorer is (1) with index_q[t, f] = [unit vector f, (w_q q + b)[t, f]], index_k[s] = [(w_k k)[s], 1]
    and weights = w_out.
    """
    n = _dims(q=(q, "... T H D"), k=(k, "... S G D"))
    with _one_blas_thread():
        q, k, hidden_q, hidden_k = _hidden_units(SimpleNamespace(q=q, k=k, n=n), *mlp)
    F, w_out = len(mlp[3]), mlp[3].astype(hidden_q.dtype)
    unit = np.broadcast_to(n["xp"].eye(F, dtype=q.dtype), (*hidden_q.shape, F))
    index_q = np.concatenate([unit, hidden_q[..., None]], -1)  # [..., T, F, F + 1]
    index_k = np.concatenate([hidden_k, np.ones_like(hidden_k[..., :1])], -1)  # [..., S, F + 1]
    weights, windows = np.broadcast_to(w_out, hidden_q.shape), {"k_start": k_start, "k_end": k_end}
    loss, (d_q, d_k, d_w) = indexer_loss(index_q, index_k, weights, target, indices=indices, **windows)
    rows = (x.reshape(-1, x.shape[-1]) for x in (d_q[..., -1], q, d_k[..., :-1], k, d_w))
    d_hidden, q, d_k, k, d_w = rows  # [..., F] and [..., G*D], without batch axes
    with _one_blas_thread():
        grads = (d_hidden.T @ q, d_k.T @ k, d_hidden.sum(0), d_w.sum(0))
    return loss, tuple(d.astype(x.dtype) for d, x in zip(grads, mlp))


def _support(n, k_start, k_end, indices):
    """The windows, which hide nothing by default where indices say what a query sees."""
    if indices is not None:
        _check_indices("indices", indices, n)
        fits = n.get("K", indices.shape[-1]) == indices.shape[-1]
        _expect(fits, "indices", f"of shape {indices.shape}", f"K = {n.get('K')} of target")
        k_end = n["xp"].full(n["T"], n["S"]) if k_end is None else k_end
    return _windows(n, k_start, k_end)


def _visible(rows, start, end):
    """Keys [..., T, K], or [1, K] of all queries, with -1 for those outside the windows [..., T], int64."""
    rows = rows.astype(np.int64)
    return np.where((rows >= start[..., None]) & (rows < end[..., None]), rows, -1)


def _slot_rows(slots, numbers):
    """How many queries to work on at a time, whose slots [..., T, K] hold so many numbers each."""
    return max(1, min(64, ROW_BUFFER // 4 // max(1, slots.shape[-1] * numbers)))


def _gather(x, rows, dtype):
    """x [S, ...] at rows [T, K] -> [T, K, ...], 0 where a row is -1."""
    taken, there = np.zeros((*rows.shape, *x.shape[1:]), dtype), rows >= 0
    taken[there] = x[rows[there]]
    return taken


def _by_key(rows, x):
    """x [T, K, ...] of the slots rows [T, K], added up by key -> keys [N], ascending, sums [N, ...]."""
    order = np.argsort(rows, axis=None, kind="stable")
    keys = rows.ravel()[order]
    first = np.flatnonzero(np.diff(keys, prepend=-1))  # of a key's slots; -1 sorts first, and has none
    return keys[first], np.add.reduceat(x.reshape(rows.size, *x.shape[2:])[order], first)


# ----------------------------------------------------------------------------------------------------------
# 11. A sequence sharded over machines, through MPI
# ----------------------------------------------------------------------------------------------------------
# Rank r holds a contiguous range of the keys, which may be empty, and every rank holds the queries. Selection
# is a reduction: the first top_k of all keys are the first top_k of what the shards select, and the first and
# last keys of all, which are forced, are among the first and last of the shards. So a shard selects by (2),
# and of these candidates, in the order of ranks and thus of keys, (2) selects again.

SHARD_BUFFER = 2**26  # numbers in a rank's buffers for a chunk of queries, unless a single query needs more


def sharded_select(
    index_q, index_k_shard, weights, top_k, comm,
    *, local_window=0, num_sink_tokens=0, k_start=None, k_end=None,
):  # fmt: skip
    """lightning_select where the keys are spread over the ranks of comm, an mpi4py communicator.

    All ranks call with the same arguments, but for index_k_shard [..., S_r, E], keys that follow those of
    rank r - 1; k_start and k_end count keys over all ranks. What one rank raises, all raise.
    -> indices [..., T, K] on every rank, bit for bit as on one; int64 where there are more than 2**31 keys
    Of each query every rank sends its candidates, at most top_k of 8 bytes (12 in float64), to the rank that
    decides, and that one sends 4 * top_k bytes to all: on R ranks at most 12 * R * top_k bytes, in float64
    16, with int64 8 more, and never a key.

        mpiexec -n 4 python -m mpi4py program.py             # indices = sharded_select(..., MPI.COMM_WORLD)
    """
    quota = {"top_k": top_k, "local_window": local_window, "num_sink_tokens": num_sink_tokens}
    with _together(comm):
        n, _, index_q, index_k = _index_dims(index_q, index_k_shard, weights, k_start, k_end)
        _quota(**quota)
    at = _layout(comm, n, n["S"], (index_q, index_k, weights), **quota)
    windows = _whole_windows(n, at, k_start, k_end)
    return _select_sharded(comm, n, at, quota, windows, index_q, index_k, weights)


def sharded_attention(
    q, k_shard, v_shard, index_q, index_k_shard, weights, config, comm,
    *, d_v=None, scale=None, sink=None, k_start=None, k_end=None,
    cache=None, lengths=None, owner=None, layer=0, n_layers=1,
):  # fmt: skip
    """dsa_attention where the keys are spread over the ranks of comm: select as sharded_select, then attend.

    All ranks call with the same arguments, but for k_shard [..., S_r, G, D], v_shard and index_k_shard;
    config selects by equation (1). What one rank raises, all raise.
    -> out, lse, indices on every rank: the indices bit for bit as on one, out and lse to rounding
    Each rank attends to its own members, and the parts are merged as by merge_attention: beside what
    sharded_select sends, two sums over the ranks, of H and of H * (Dv + 1) numbers a query.
    cache: this rank's shard. k_shard, v_shard and index_k_shard are then the new tokens, the same on every
    rank, with lengths [B] as in dsa_attention; rank `owner`, by default the last, keeps them, and no rank
    behind it may hold keys. If any rank raises, every cache is as it was.
    """
    # The last rank takes what is decoded. In blocks dealt in turn the shards would grow alike, but no shard
    # would be a range: ties, forced keys and windows would need the place of every key. A long prompt goes in
    # chunks to owner=0, 1, ...; what is decoded is short beside it.
    main, indexer = (q, k_shard, v_shard), (index_q, index_k_shard, weights)
    with _together(comm):
        given = lengths is not None or owner is not None
        _expect(cache is not None or not given, "lengths or owner", "given", "None without a cache")
        owner = comm.size - 1 if owner is None else _integer("owner", owner, 0)
        _expect(owner < comm.size, "owner", owner, f"a rank up to {comm.size - 1}")
        _check_type("config", config, DSAConfig)
        by, kwargs = config._selector(), {"d_v": d_v, "scale": scale, "sink": sink}
        _expect(by == "lightning", "the selector of config", repr(by), "'lightning'")
        n, new = _dsa_dims(main, indexer, kwargs, (k_start, k_end), cache, lengths)
        _windows(n, k_start, k_end)  # their shapes; below they count the keys of all ranks
        new = np.full(n["..."], n["T"]) if new is None else new
    mine = new * (comm.rank == owner)
    same = {"config": config, "layer": (layer, n_layers), "scale": scale, "owner": owner}
    same |= {"lengths": new.tolist(), "cache": cache and cache.storage}
    at = _layout(comm, n, n["S"] if cache is None else cache.lengths + mine, (*main, *indexer), **same)
    behind = at.shards[owner + 1 :, new > 0]
    _expect(not behind.any(), "owner", owner, "a rank behind which none holds keys")
    alike = (at.total == at.num_keys).all() or not (config.sparse_ratio or config.fallback_dense_threshold)
    _expect(alike, "the lengths", at.total.tolist(), "all the same where config goes by the number of keys")
    tokens = {"k": k_shard, "index_k": index_k_shard} | ({} if v_shard is None else {"v": v_shard})
    attend = functools.partial(sparse_attention, k=k_shard, v=v_shard)
    with contextlib.ExitStack() as undo:
        with _together(comm):
            if cache is not None:
                undo.enter_context(cache.appended(lengths=mine, **tokens))
                index_k_shard, attend = cache.read("index_k"), cache.attend
                k_end = _causal_end(at.total - new, new, n["T"])
            index_q, index_k = (_at_precision(x, config.indexer_precision) for x in (index_q, index_k_shard))
        windows = _whole_windows(n, at, k_start, k_end)
        quota, dense = config._quota_at(layer, n_layers, at.num_keys)
        if dense:
            indices = n["xp"].asarray(_every_key(windows, at.num_keys))
        else:
            indices = _select_sharded(comm, n, at, quota, windows, index_q, index_k, weights)
        with _together(comm):
            first, size = (n["xp"].asarray(x)[..., None, None] for x in (at.first, at.size))
            own = np.where((indices >= first) & (indices < first + size), indices - first, -1)
            kept = [cache] if cache is not None else [x for x in (k_shard, v_shard) if x is not None]
            kwargs |= {"sink": None, "out_dtype": _accumulator(q, *kept)}  # q's, once it is merged
            out, lse = attend(q, indices=own.astype(np.int32), **kwargs)
    for t in _chunks(n, n["H"] * (n["Dv"] + 1)):
        out[..., t, :, :], lse[..., t, :] = _merge_shards(comm, out[..., t, :, :], lse[..., t, :])
    out = out if sink is None else apply_sink(out, lse, sink)
    return out.astype(q.dtype, copy=False), lse, indices


@contextlib.contextmanager
def _together(comm, where=""):
    """What a block raises on any rank, raise on all, in the words of the first: none waits for another."""
    error, kinds = None, (TypeError, ValueError, IndexError, MemoryError)
    try:
        yield
    except Exception as raised:
        error = raised
    failed = np.empty(comm.size, bool)
    comm.Allgather(np.array([error is not None]), failed)
    if failed.any():
        kind = next((x for x in kinds if isinstance(error, x)), RuntimeError)
        first = int(failed.argmax())
        kind, text = comm.bcast((kind, f"rank {first}{where}: {error}"), first)
        raise kind(text) from error


def _layout(comm, n, sizes, arrays, **same):
    """Agree on where shards of `sizes` keys stand. ValueError on every rank if they were not called alike."""
    same |= {**n, "S": None, "xp": n["xp"].__name__}
    same["dtypes"] = [x.dtype.name for x in arrays if x is not None]
    sums, shards = np.empty(comm.size, np.int64), np.empty((comm.size, *n["..."]), np.int64)
    comm.Allgather(np.array([zlib.crc32(repr(same).encode())]), sums)
    ranks = comm.allgather(same) if (sums != sums[0]).any() else [same]
    for name in same:
        values = [rank[name] for rank in ranks]
        _expect(values.count(values[0]) == len(ranks), f"{name}, by rank,", values, "the same on every rank")
    comm.Allgather(np.array(np.broadcast_to(sizes, n["..."]), np.int64), shards)
    total = shards.sum(0)
    return SimpleNamespace(
        shards=shards,  # how many keys each rank holds of each sequence of the batch [ranks, ...]
        first=shards[: comm.rank].sum(0),  # the place of this rank's first key [...]
        size=shards[comm.rank],
        total=total,
        longest=int(shards.max(initial=0)),  # keys of the largest shard
        num_keys=int(total.max(initial=0)),  # and of the longest sequence
    )


def _whole_windows(n, at, *windows):
    """Windows that count the keys of all ranks, in NumPy."""
    host = (w if w is None or isinstance(w, np.ndarray) else w.get() for w in windows)
    return _windows({**n, "S": at.num_keys, "xp": np}, *host)


def _chunks(n, width):
    """Slices of the queries: with `width` numbers for each, over the batch, a chunk fills SHARD_BUFFER."""
    step = max(1, SHARD_BUFFER // max(1, math.prod(n["..."]) * width))
    return [slice(t, min(t + step, n["T"])) for t in range(0, n["T"], step)]


def _select_sharded(comm, n, at, quota, windows, index_q, index_k, weights):
    """Equation (2) over the keys of all ranks, each of which decides for some queries -> [..., T, K]."""
    place, width = np.int32 if at.num_keys <= 2**31 else np.int64, min(quota["top_k"], at.num_keys)
    indices = n["xp"].empty((*n["..."], n["T"], width), place)
    for t in _chunks(n, at.longest):
        with _together(comm, f", counting queries from {t.start}" if t.start else ""):
            part = (index_q[..., t, :, :], index_k, weights[..., t, :], [w[..., t] for w in windows])
            offers = _candidates(n, at, quota, place, *part)
        N, W = offers[0].shape
        rows = np.diff(N * np.arange(comm.size + 1) // comm.size)  # for how many queries each rank decides
        mine = rows[comm.rank]
        dealt = (_exchange(comm.Alltoallv, x, (comm.size, mine, W), W * rows).swapaxes(0, 1) for x in offers)
        best, keys = (x.reshape(mine, comm.size * W) for x in dealt)  # by rank, and thus by ascending key
        kept = select_topk(best, **quota)[:, :width]
        chosen = np.where(kept < 0, -1, np.take_along_axis(keys, np.maximum(kept, 0), -1))
        indices[..., t, :] = _exchange(comm.Allgatherv, chosen, indices[..., t, :].shape, None, width * rows)
    return indices


def _candidates(n, at, quota, place, index_q, index_k, weights, windows):
    """What a shard selects -> scores and keys [N, W] of N queries, -inf where none is; W on all ranks."""
    xp, first, size = n["xp"], at.first[..., None], at.size[..., None]
    windows = [xp.asarray(np.clip(w - first, 0, size), np.int32) for w in windows]
    n = {**n, "T": weights.shape[-2], "S": index_k.shape[-2]}
    scores = _index_scores(n, index_q, index_k, weights, windows, at.first % KEY_TILE)
    kept = select_topk(scores, **quota)  # [..., T, at most W]
    shape = (*kept.shape[:-1], min(quota["top_k"], at.longest))
    best, keys = xp.full(shape, -np.inf, scores.dtype), xp.zeros(shape, place)
    found = np.take_along_axis(scores, np.maximum(kept, 0), -1)
    best[..., : kept.shape[-1]] = np.where(kept < 0, -np.inf, found)
    keys[..., : kept.shape[-1]] = kept + xp.asarray(first)[..., None]
    return [x.reshape(math.prod(shape[:-1]), shape[-1]) for x in (best, keys)]


def _exchange(collective, x, shape, sent=None, received=None, **op):
    """The array of this shape that an MPI collective makes of every rank's x.

    sent, received: how many numbers go to each rank and come from it, where that is not the same for all.
    Where MPI is not CUDA-aware, CuPy arrays go through the host's memory; where it is, it still knows nothing
    of streams, and has to be called after what is under way to x has ended. No buffer's address is null, as
    that of an empty CuPy array is: where some ranks gave one, Intel's MPI was seen to wait forever.
    """
    xp, x = _library("x", x), x.ravel()
    x = x if xp is np or _cuda_aware() else x.get()
    x = x if x.size else np.empty_like(x, shape=1)[:-1]
    y = np.empty_like(x, shape=math.prod(shape) + 1)[:-1]
    if not isinstance(x, np.ndarray):
        xp.cuda.get_current_stream().synchronize()
    collective([x, sent], [y, received], **op)
    return xp.asarray(y).reshape(shape)


@functools.cache
def _cuda_aware():
    """Whether MPI says that it reads GPUs' memory, by a function that Open MPI, MPICH and their kin have."""
    from mpi4py import MPI

    ask = getattr(ctypes.CDLL(MPI.__file__), "MPIX_Query_cuda_support", None)
    return bool(ask and ask())


def _merge_shards(comm, out, lse):
    """merge_attention of every rank's out [..., T, H, Dv] and lse [..., T, H], on every rank."""
    from mpi4py import MPI

    with np.errstate(all="ignore"):
        top = _exchange(comm.Allreduce, lse, lse.shape, op=MPI.MAX)
        top[top == -np.inf] = 0
        share = np.exp(lse - top)[..., None]
        part = np.concatenate([out * share, share], axis=-1)
        whole = _exchange(comm.Allreduce, part, part.shape)
        total = whole[..., -1:]
        return whole[..., :-1] / np.where(total == 0, 1, total), top + np.log(total[..., 0])


# ----------------------------------------------------------------------------------------------------------
# 12. On the GPU: how the kernels of dsa_kernels.cu are launched
# ----------------------------------------------------------------------------------------------------------

PORTABLE_KERNELS = False  # True: only kernels that all GPUs from sm_80 on run, as if this were one of them
TYPES = {
    "uint8": "unsigned char", "float16": "__half", "bfloat16": "__nv_bfloat16", "float32": "float",
    "float64": "double",
}  # fmt: skip
SCORE_BYTES = 2**29  # scores that lightning_select holds at a time
FEW = 8  # queries a sequence whose scoring is bound by memory
SLOT_BYTES = 2**31  # what the slots of a chunk of queries hold in training
CUDA_R = {"float32": 0, "float64": 1, "bfloat16": 14}  # cuBLAS's numbers of dtypes
UNITS = {2: "short", 4: "int", 8: "int2", 16: "int4"}  # by bytes
TILES = {128: 4, 256: 2, 512: 1}  # tiles of 16 keys that fit a warp's registers, by the keys' width


class Chip(NamedTuple):
    """What of a GPU decides which kernels it runs. sm: its compute capability, 90 for 9.0."""

    device: int
    sm: int
    shared: int  # bytes that a block may ask for
    processors: int


@functools.cache
def chip_of(device, portable):
    gpu = sys.modules["cupy"].cuda.Device(device)
    sm, has = int(gpu.compute_capability), gpu.attributes
    shared, processors = has["MaxSharedMemoryPerBlockOptin"], has["MultiProcessorCount"]
    return Chip(device, *((min(sm, 80), min(shared, 166912)) if portable else (sm, shared)), processors)


def chip(x):
    return chip_of(x.data.device_id, PORTABLE_KERNELS)


class Kernel:
    """A kernel of dsa_kernels.cu with its constants, each a number, a word or a dtype; see `kernel`."""

    def __init__(self, chip, name, block, **constants):
        self.chip, self.name, self.block = chip, name, (block,)
        self.function: Any = None
        named = {key: TYPES.get(getattr(x, "name", ""), x) for key, x in sorted(constants.items())}
        arch = ("-arch=sm_90a",) if name.endswith("_wgmma") else ()
        defined = (f"-D{key}={value}" for key, value in named.items())
        self.options = "-std=c++17", f"-D{name.upper()}", *arch, *defined
        self.large_cluster = named.get("BLOCKS", 1) > 8  # has to be allowed, by attribute 14

    def compile(self):
        """Compile it; CuPy keeps it on disk."""
        cupy = sys.modules["cupy"]
        file = Path(__file__).with_name("dsa_kernels.cu")
        _expect(file.exists(), "dsa_kernels.cu", "missing", f"it beside {__file__}", FileNotFoundError)
        with cupy.cuda.Device(self.chip.device):
            module = cupy.RawModule(code=file.read_text(encoding="utf-8"), options=self.options)
            raw = module.get_function(self.name)
            raw.max_dynamic_shared_size_bytes = self.chip.shared - raw.shared_size_bytes
            if self.large_cluster:
                cupy.cuda.driver.funcSetAttribute(raw.kernel.ptr, 14, 1)
            self.function = raw.kernel

    def __call__(self, grid, *args, shared=0):
        """Launch on the current stream. shared: bytes of dynamic shared memory.

        Arrays have to be contiguous; an int arrives as long long, a NumPy number as what it is, None as a
        null pointer.
        """
        ndarray, device = sys.modules["cupy"].ndarray, self.chip.device
        for x in args:
            if isinstance(x, ndarray) and not (x.flags.c_contiguous and x.data.device_id == device):
                raise ValueError(f"an array is not contiguous on device {device}, as the others are")
        if min(grid) > 0:
            if self.function is None:
                compile_together(self)
            self.function(grid, self.block, tuple(0 if x is None else x for x in args), shared)


kernel = functools.cache(Kernel)


def compile_together(*kernels):
    """Compile those of the kernels that are not yet, side by side."""
    todo = [x for x in kernels if x.function is None]
    if todo:
        timer = threading.Timer(1, say_that_it_compiles)
        timer.start()
        try:
            with ThreadPoolExecutor(len(todo)) as pool:
                list(pool.map(Kernel.compile, todo))
        finally:
            timer.cancel()


@functools.cache
def say_that_it_compiles():
    print("dsa: compiling CUDA kernels, once; CuPy keeps them on disk", file=sys.stderr)


def aligned(x, multiple=1):
    """x contiguous and at a multiple of 16 bytes, as kernels read it; its last axis padded to a multiple."""
    more = -x.shape[-1] % multiple
    if x.flags.c_contiguous and x.data.ptr % 16 == 0 and not more:
        return x
    padded = sys.modules["cupy"].zeros((*x.shape[:-1], x.shape[-1] + more), x.dtype)
    padded[..., : x.shape[-1]] = x
    return padded


def pointer(x):
    """Where x begins, as an array that a launch takes, wherever its other elements stand."""
    return sys.modules["cupy"].ndarray((1,), x.dtype, x.data)


def entries(x):
    """x [..., N, E] as a pointer to contiguous rows, and how many of them from a batch entry to the next.

    The keys of a cache that is not full stand further apart than they are many; they are not copied.
    """
    if x.ndim != 3:
        x = x.reshape(math.prod(x.shape[:-2]), *x.shape[-2:])
    row = x.shape[-1] * x.itemsize
    whole = x.size and x.strides[1:] == (row, x.itemsize) and x.strides[0] % max(1, row) == 0
    if not whole or x.data.ptr % 16:
        return aligned(x), x.shape[1]
    return pointer(x), x.strides[0] // row


@functools.cache
def score_plan(chip, dtype, real, J, E, few):
    """The kernel of (1) for index_q and index_k of a dtype, and a block's queries, keys and shared memory."""
    row, tiles = E * dtype.itemsize, next((m for width, m in TILES.items() if width >= E), 0)
    fp8, hopper = dtype == np.uint8, chip.sm == 90
    if chip.sm < 80 or dtype.itemsize > 2 or real == np.float64 or not tiles * J * E:
        return kernel(chip, "index_scores_fma", 256, REAL=real), 8, 512 // real.itemsize, 0
    if hopper and J in (32, 64, 128) and row in (128, 256):
        if few and fp8 and J <= 64:
            return kernel(chip, "index_scores_few_wgmma", 128, J=J), FEW, 256, 43008
        shared = -(-(512 * row + 3652 + 6 * J) // 1024) * 1024  # struct Shared of the kernel
        found = kernel(chip, "index_scores_wgmma", 384, ELEMENT=dtype, J=J, E=E)
        return found, 192, 512 if fp8 else 256, shared
    heads, vector = min(-(-J // 8) * 8, 64 if E <= 256 else 32), 16 // dtype.itemsize
    sizes = {"J": J, "E": E, "PITCH": -(-E // vector) * vector, "HEADS": heads, "TILES": tiles}
    shared = 2 * heads * (-(-row // 64) * 64 + 20)  # 2 of the kernel's struct Stage
    return kernel(chip, "index_scores_mma", 128, ELEMENT=dtype, **sizes), 64, 64 * tiles, shared


def score_plan_of(n, index_q, index_k, real):
    dtype = index_q.dtype if index_q.dtype == index_k.dtype else real
    return score_plan(chip(index_q), dtype, real, n["J"], n["E"], n["T"] <= FEW)


def gpu_index_scores(n, index_q, index_k, weights, k_start=None, k_end=None, offset=None, out=None):
    """offset: S - T, unless the T queries are some of all."""
    T, S, J, E = n["T"], n["S"], n["J"], n["E"]
    real = _accumulator(index_q, index_k, weights)
    found, queries, keys, shared = score_plan_of(n, index_q, index_k, real)
    scores = n["xp"].empty((*n["..."], T, S), real) if out is None else out
    sizes: tuple[int, ...] = ()
    if found.name == "index_scores_fma":
        sizes = J, E
        if index_q.dtype == np.uint8:
            index_q, index_k = n["xp"].asarray(E4M3)[index_q], _unpack(index_k, E, 0)
        index_q, index_k = index_q.astype(real, copy=False), index_k.astype(real, copy=False)
    index_q, (index_k, apart) = aligned(index_q, 16 // index_q.itemsize if not sizes else 1), entries(index_k)
    weights = aligned(weights.astype(real, copy=False))
    sizes = T, S, S - T if offset is None else offset, apart, *sizes
    blocks = math.prod(n["..."]) * -(-T // queries) * -(-S // keys)
    found((blocks,), index_q, index_k, weights, k_start, k_end, scores, *sizes, shared=shared)
    return scores


@functools.cache
def topk_plan(chip, real, rows, num_keys, forced):
    """The kernel of (2) for so many rows of so many keys, a row's blocks, and shared memory."""
    block = 512 if rows > 128 else 1024
    held = next((x for x in (8, 16, 32) if num_keys <= x * block), 64)  # keys of a thread
    if real == np.float32 and not forced and held <= 2**14 // block:
        return kernel(chip, "select_topk_held", block, REAL=real, BLOCK=block, HELD=held, ROOM=16), 1, 0
    room, blocks = 2**15 if chip.shared > 75000 else 2**14, blocks_of_row(chip, rows, num_keys)
    shared = 8480 + room // real.itemsize * (real.itemsize + 4)  # struct Shared of the kernel
    together = shared + 40000 + -(-(num_keys + 3) // (32 * blocks)) * 4
    if blocks > 1 and together <= chip.shared:
        sizes = {"BLOCK": 512, "BLOCKS": blocks, "ROOM": room}
        return kernel(chip, "select_topk_cluster", 512, REAL=real, **sizes), blocks, together
    block = 512 if blocks > 1 or rows > 128 else 1024
    return kernel(chip, "select_topk", block, REAL=real, BLOCK=block, ROOM=room), 1, shared


def blocks_of_row(chip, rows, num_keys):
    """How many blocks share a row in select_topk: as many as find room, where rows are few and long."""
    if chip.sm < 90 or num_keys < 8192:
        return 1
    most = 16 if chip.sm in (90, 100, 103) else 8  # blocks in a cluster
    return next(x for x in (most, 8, 4, 2, 1) if rows * x <= 64 or x == 1)


def gpu_select_topk(
    n, scores, top_k, local_window=0, num_sink_tokens=0, k_start=None, k_end=None, offset=None, out=None
):
    T, S, xp = n["T"], n["S"], n["xp"]
    scores = xp.ascontiguousarray(scores, _accumulator(scores))
    indices = xp.empty((*n["..."], T, min(top_k, S)), np.int32) if out is None else out
    if offset is None:
        offset = S if k_start is None and k_end is None else S - T  # S: up to the end
    rows = math.prod(n["..."]) * T
    quota = top_k, local_window, num_sink_tokens
    found, blocks, shared = topk_plan(chip(scores), scores.dtype, rows, S, any(quota[1:]))
    args = scores, k_start, k_end, indices, T, S, indices.shape[-1], offset, *quota
    found((rows * blocks,), *args, shared=shared)
    return indices


def gpu_lightning_select(
    n, index_q, index_k, weights, top_k, local_window=0, num_sink_tokens=0, k_start=None, k_end=None
):
    """(1), then (2), for as many queries at a time as SCORE_BYTES hold."""
    xp, T, S, quota = n["xp"], n["T"], n["S"], (top_k, local_window, num_sink_tokens)
    real, rows = _accumulator(index_q, index_k, weights), math.prod(n["..."]) * T
    most = max(1, SCORE_BYTES // max(1, S * real.itemsize))  # queries at a time
    ranked = topk_plan(chip(index_q), real, min(rows, most), S, any(quota[1:]))
    compile_together(score_plan_of(n, index_q, index_k, real)[0], ranked[0])
    if rows <= most:
        scores = gpu_index_scores(n, index_q, index_k, weights, k_start, k_end)
        return gpu_select_topk(n, scores, *quota, k_start, k_end, S - T)
    indices = xp.empty((*n["..."], T, min(top_k, S)), np.int32)
    most = most if most < 64 else most - most % 64  # whole blocks of index_scores_mma
    scores = xp.empty((min(most, T), S), real)
    for b in np.ndindex(*n["..."]):
        for t in range(0, T, most):
            part, offset = slice(t, min(t + most, T)), S - T + t
            some, x = {**n, "...": (), "T": part.stop - t}, scores[: part.stop - t]
            own = {"offset": offset}
            own |= {
                key: w[b][part] for key, w in {"k_start": k_start, "k_end": k_end}.items() if w is not None
            }
            index = index_q[b][part], index_k[b], weights[b][part]
            gpu_index_scores(some, *index, **own, out=x)
            gpu_select_topk(some, x, *quota, **own, out=indices[b][part])
    return indices


def strided(x):
    """x [..., N, G, D] as what a kernel takes: a pointer, and the strides of batch, N and G, in elements.

    A view is read where it stands, if its last axis is contiguous and its batch axes are one; else copied.
    """
    xp = sys.modules["cupy"]
    if x.ndim != 4:
        x = x.reshape(math.prod(x.shape[:-3]), *x.shape[-3:])
    if x.size == 0:
        return xp.zeros(1, x.dtype), (0, 0, 0)
    if x.strides[-1] != x.itemsize and x.shape[-1] > 1:
        x = xp.ascontiguousarray(x)
    return pointer(x), tuple(stride // x.itemsize for stride in x.strides[:3])


def alignment(x, strides, width):
    """The largest copy in bytes, up to 16, to which every row of x is aligned."""
    return math.gcd(16, x.data.ptr, *(stride * x.itemsize for stride in (*strides, width)))


def slot_indices(indices, num_keys):
    """indices as int32, contiguous; what stands outside [0, num_keys) stays so."""
    xp = sys.modules["cupy"]
    if indices.dtype != np.int32:
        wide = indices.astype(np.int64)
        indices = xp.where((wide >= 0) & (wide < num_keys), wide, -1).astype(np.int32)
    return xp.ascontiguousarray(indices)


class Heads(NamedTuple):
    """What of a call of attention decides its kernel. dtypes: of q, k, v; align: of rows of k, v, in bytes;
    real, out: dtypes of sums and of out; tied: v is k[..., :Dv]; rank, rope: parts of packed keys, else 0.
    """

    dtypes: tuple
    align: tuple
    real: Any
    out: Any
    H: int
    G: int
    D: int
    Dv: int
    tied: bool
    rank: int
    rope: int


def mma_tile(chip, heads, a):
    """Heads and keys of a block of attend_mma, and its shared memory; None where none fits.

    The first that fits: 227 KB on sm_90, 163 on sm_80, 99 on sm_86, sm_89 and sm_120. Sums of 16 heads by 16
    values take 8 of a thread's 255 registers, of which it can spare 128.
    """
    row, v_row, pairs = -(-a.D // 64) * 64, -(-a.Dv // 64) * 64, -(-a.Dv // 128)
    packed = -(-_packed_bytes(a.D, a.rope) // 16) * 16 if a.rank else 2 * row + (0 if a.tied else 4 * v_row)
    for block, keys in ((64, 64), (64, 32), (32, 64), (32, 32), (16, 64), (16, 32)):
        columns = min(8 // min(2, block // 16), keys // 8)
        shared = block * (2 * row + 128) + keys * (2 * row + packed + 8) + 4 * block * (columns + 1)
        fits = shared <= chip.shared and block // 16 * pairs * 8 <= 128
        if fits and (block == 16 or heads > block // 2):
            return block, keys, shared
    return None


def attend_tile(chip, a):
    """Which kernel attends: its name, the heads and keys of a block, its shared memory and its constants."""
    (q, k, v), heads, real, common = a.dtypes, a.H // a.G, a.real, {"R8": a.rank, "ROPE": a.rope}
    common["TIED"] = int(a.tied)
    whole = a.rank % 8 == a.rope % 8 == 0 and a.align[0] >= 4 and q.name == "bfloat16"
    alike = whole if a.rank else q == k == v
    tensor_cores = q.itemsize == 2 and alike and chip.sm >= 80 and a.D * a.Dv
    small = heads <= 16 and a.D + a.Dv <= (512 if heads < 8 else 256) and max(a.D, a.Dv) <= 256
    if tensor_cores and small and not a.rank and a.align == (16, 16) and a.D % 8 == a.Dv % 8 == 0:
        return "attend_few_mma", heads, 64, 0, {"D": a.D, "DV": a.Dv, "TYPE": q}
    if tensor_cores and heads >= 8:
        tile, sizes = mma_tile(chip, heads, a), {**common, "D": a.D, "DV": a.Dv, "TYPE": q}
        latent = a.tied and a.G == 1 and heads >= 32 and a.D in (512, 576) and a.Dv == 512
        if latent and tile and chip.sm == 90 and a.align[0] == 16 and a.rank in (0, 512):
            return "attend_wgmma", 64, 64, 3 * 128 * a.D + 9072, sizes  # struct Plan of the kernel
        if tile:
            sizes |= {"KEYS": tile[1], "VEC": a.align[0], "VVEC": a.align[1]}
            return "attend_mma", *tile, sizes
    most = next(x for x in (8, 4, 2, 1) if x == 1 or x * a.D * real.itemsize <= 40960)
    block = min(most, 1 << max(0, heads - 1).bit_length())
    types = {"QT": q, "KT": k, "VT": v, "ACC": real, "COLUMNS": -(-a.Dv // 128) or 1}
    return "attend", block, 32, block * a.D * real.itemsize, common | types


@functools.lru_cache(maxsize=4096)
def attention_plan(chip, rows, slots, a):
    """The kernels that attend and merge, their grid, shared memory, and how many splits have how many slots.

    Few rows of queries share out the keys over more blocks, whose number depends on the shapes alone.
    """
    name, heads, keys, shared, sizes = attend_tile(chip, a)
    blocks = rows * a.G * -(-(a.H // a.G) // heads)
    splits = max(1, min(128 // max(1, blocks), -(-slots // keys)))
    chunk = max(1, -(-slots // (splits * keys)) * keys)
    splits = max(1, -(-slots // chunk))
    grid = (min(blocks * splits, chip.processors),) if name == "attend_wgmma" else (blocks, splits)
    block = {"attend_mma": 256, "attend_wgmma": 512}.get(name, 128)
    attend = kernel(chip, name, block, HEADS=heads, OUT=a.real if splits > 1 else a.out, **sizes)
    columns = -(-a.Dv // 128) or 1
    most = max(1, 512 // a.real.itemsize // columns)  # splits that fit a thread's registers
    types = {"ACC": a.real, "OUT": a.out, "COLUMNS": columns, "LOADS": min(most, 8 if splits <= 8 else 32)}
    merge = kernel(chip, "merge_attention", 128, **types) if splits > 1 else None
    return attend, merge, grid, shared, splits, chunk


def gpu_attention(
    n, q, k, v, d_v, scale, sink, indices=None, k_start=None, k_end=None, out_dtype=None, rope=None
):
    """Equation (3) over indices [..., T, K], or, where they are None, over windows.

    v=None: the values are the first d_v of each key. rope: k is uint8 [..., S, 1, packed], as _pack makes it
    of keys with so many rotated values. Values that are k[..., :Dv] are read once.
    """
    xp, (T, S, H, D), G = sys.modules["cupy"], (n[axis] for axis in ("T", "S", "H", "D")), k.shape[-2]
    rows, packed = math.prod(n["..."]) * T, rope is not None
    slots = S if indices is None else indices.shape[-1]
    Dv = d_v if v is None else v.shape[-1]
    tied = v is None or (Dv <= D and (k.data.ptr, k.strides, k.dtype) == (v.data.ptr, v.strides, v.dtype))
    width, real = k.shape[-1], _accumulator(q, *(() if packed else (k, k if v is None else v)))
    k, k_strides = strided(k)
    v, v_strides = (k, k_strides) if tied else strided(v)
    align = alignment(k, k_strides, width), alignment(v, v_strides, Dv)
    types = (q.dtype, k.dtype, v.dtype), align, real, np.dtype(out_dtype or q.dtype)
    a = Heads(*types, H, G, D, Dv, tied, *((D - rope, rope) if packed else (0, 0)))
    attend, merge, grid, shared, splits, chunk = attention_plan(chip(q), rows, slots, a)
    q, indices = aligned(q), None if indices is None else slot_indices(indices, S)
    sink = None if sink is None else xp.ascontiguousarray(sink, real)
    found = out, lse = xp.empty((*n["..."], T, H, Dv), a.out), xp.empty((*n["..."], T, H), real)
    if merge:
        compile_together(attend, merge)
        found = xp.empty((splits, rows, H, Dv), real), xp.empty((splits, rows, H), real)
    sizes = T, S, H, G, -1 if indices is None else slots, chunk, *k_strides, *v_strides
    more = {"attend": (D, Dv), "attend_wgmma": (rows, splits)}.get(attend.name, ())
    args = q, k, v, indices, k_start, k_end, None if merge else sink, *found, *sizes, np.float64(scale), *more
    attend(grid, *args, shared=shared)
    if merge:
        merge((rows * H,), *found, sink, out, lse, splits, rows * H, H, Dv)
    return out, lse


def gpu_attend_to_entries(cache, q, indices, rows, d_v, scale, sink, out_dtype):
    """sparse_attention over an fp8 cache, whose entries kernels read as they are stored if they are tied."""
    if "v" in cache.streams or cache.streams["k"][0] > 1:
        k, v = cache.read("k"), cache.read("v") if "v" in cache.streams else None
        return sparse_attention(q, k, v, indices, d_v=d_v, scale=scale, sink=sink, out_dtype=out_dtype)
    k, D, rope = cache.stored("k"), cache.streams["k"][-1], cache.qk_rope_head_dim
    n = _dims(q=(q, "... T H D"), **({} if sink is None else {"sink": (sink, "H")}))
    _expect(n["D"] == D, "D", f"{n['D']} in q", f"{D}, as in the cache")
    _expect(_integer("d_v", d_v, 1) <= D, "d_v", d_v, f"at most k's D = {D}")
    n, scale = n | {"S": k.shape[1]}, D**-0.5 if scale is None else scale
    return gpu_attention(n, q, k, None, d_v, scale, sink, indices, out_dtype=out_dtype, rope=rope)


def gpu_quantized(x, block, scale, least):
    """_quantize, byte for byte."""
    xp = sys.modules["cupy"]
    x, codes = xp.ascontiguousarray(x), xp.empty(x.shape, np.uint8)
    scales = xp.empty((*x.shape[:-1], -(-x.shape[-1] // block)), np.float32)
    write_codes(x, codes, scales, (0, 0), x.shape[-1], block, scale, least)
    return codes, scales


def gpu_packed(x, rope):
    """_pack, byte for byte."""
    xp, codes = sys.modules["cupy"], x.shape[-1] - rope
    packed = xp.empty((*x.shape[:-1], _packed_bytes(x.shape[-1], rope)), np.uint8)
    offsets, least = (codes, packed.shape[-1] - 2 * rope), 448e-4 if rope else 1e-4
    write_codes(xp.ascontiguousarray(x), packed, packed, offsets, codes, FP8_BLOCK, "ue8m0", least)
    return packed


def write_codes(x, out, scales, offsets, width, block, scale, least):
    """quantize_fp8: the first `width` values of each row of x to out, their scales at an offset in scales."""
    rows, rope = math.prod(x.shape[:-1]), x.shape[-1] - width
    warps = rows * (-(-width // block) + (rope > 0))
    sizes = rows, width, rope, x.shape[-1], out.shape[-1], scales.shape[-1] * scales.itemsize, *offsets
    types = {"BLOCK": block, "UE8M0": int(scale == "ue8m0"), "XT": x.dtype, "ACC": _accumulator(x)}
    code = kernel(chip(x), "quantize_fp8", 256, **types)
    code((-(-warps // 8),), x, out, scales, *sizes, np.float32(least))


# Training: what section 10 does for a block of queries, here for as many, M, as SLOT_BYTES hold. N: the slots
# of a query, or all keys.


def gpu_sparse_attention_backward(n, q, k, v, indices, out, lse, dout, d_v, scale, sink, deterministic):
    xp, (S, H, G, D), Dv = n["xp"], (n[axis] for axis in ("S", "H", "G", "D")), out.shape[-1]
    alike = v is not None and q.dtype == k.dtype == v.dtype == dout.dtype and q.itemsize == 2
    if alike and H <= 4 * G and D % 8 == Dv % 8 == 0 < min(D, Dv) and max(D, Dv) <= 128:
        return gradients_by_rows(n, q, k, v, indices, out, lse, dout, np.float64(scale), sink)
    acc, N, r = _accumulator(q, k, *(() if v is None else (v,))), indices.shape[-1], H // G
    like, width = (q, k, v), D if v is None else D + Dv  # of [dk | dv]
    dq, dkv = xp.zeros(q.shape, acc), xp.zeros((*k.shape[:-1], width), acc)
    z = xp.full(H, -np.inf, acc) if sink is None else sink.astype(acc)
    dz, scale = xp.zeros_like(z), np.float64(scale)
    kind, (q, k, v, out, dout) = factors(acc, q, k, v, out, dout)
    lse, both_bytes = xp.ascontiguousarray(lse, acc), kind.itemsize + acc.itemsize
    attend = kernel(chip(q), "attend_backward", 256, TYPE=kind, ACC=acc)
    for b, t in query_chunks(n, 2 * H * D * kind.itemsize + N * ((G * width + 2 * H) * both_bytes + 32)):
        M, rows = t.stop - t.start, indices[b][t].astype(np.int64)
        rows = np.where((rows >= 0) & (rows < S), rows, -1).astype(np.int32)
        keys = gathered(k[b], rows)  # [M * G, N, D]
        values = keys[..., :Dv] if v is None else gathered(v[b], rows)
        q_t, dout_t = q[b][t].reshape(M * G, r, D), dout[b][t].reshape(M * G, r, Dv)
        s = product(q_t, keys.swapaxes(1, 2), xp.empty((M * G, r, N), acc))
        dp = product(dout_t, values.swapaxes(1, 2), xp.empty((M * G, r, N), acc))
        pairs, from_z = xp.empty((M * G, 2, r, N), kind), xp.empty((M, H), acc)
        args = s, dp, rows, out[b][t], lse[b][t], dout[b][t], z, pairs, from_z, N, H, G, Dv, scale
        attend((M * H,), *args)
        product(pairs[:, 0], keys, dq[b][t].reshape(M * G, r, D))
        dz -= from_z.sum(0)
        add_by_key(rows, slot_gradients(pairs, q_t, dout_t, v is None), dkv[b], deterministic)
    dk, dv = dkv[..., :D].astype(like[1].dtype), None if v is None else dkv[..., D:].astype(like[2].dtype)
    return dq.astype(like[0].dtype), dk, dv, None if sink is None else dz.astype(sink.dtype)


def gradients_by_rows(n, q, k, v, indices, out, lse, dout, scale, sink):
    """gpu_sparse_attention_backward of small heads: dq over each query's keys, then dk and dv over each key's
    queries, whose rows are read again. No slot is stored, and the order of sums is that of the queries.
    """
    xp, (T, S, H, G), K = n["xp"], (n[axis] for axis in "TSHG"), indices.shape[-1]
    q, k, v, dout = map(aligned, (q, k, v, dout))
    delta, lse = (dout.astype(np.float32) * out.astype(np.float32)).sum(-1), lse.astype(np.float32)
    z = xp.full(H, -np.inf, np.float32) if sink is None else sink.astype(np.float32)
    norms = xp.stack([np.logaddexp(lse, z) * math.log2(math.e), delta], -1, dtype=np.float32)
    types, gpu = {"TYPE": q.dtype, "D": q.shape[-1], "DV": v.shape[-1]}, chip(q)
    by_query, by_key = (kernel(gpu, "attend_backward_rows", 128, BY_KEY=x, **types) for x in (0, 1))
    compile_together(by_query, by_key)
    dq, dk, dv = (xp.empty(x.shape, x.dtype) for x in (q, k, v))
    for b in np.ndindex(*n["..."]):
        rows = slot_indices(indices[b], S)
        by_query((T * H,), q[b], dout[b], k[b], v[b], norms[b], rows, None, dq[b], None, S, H, G, K, scale)
        queries, first = slots_by_key(rows, xp.arange(T)[:, None], S)
        queries = queries.astype(np.int32)
        by_key((S * G,), k[b], v[b], q[b], dout[b], norms[b], queries, first, dk[b], dv[b], S, H, G, K, scale)
    from_z = np.where(lse == -np.inf, 0, delta / (1 + np.exp(lse - z)))
    return dq, dk, dv, None if sink is None else -from_z.reshape(-1, H).sum(0).astype(sink.dtype)


def slots_by_key(rows, place, num_keys):
    """The places of the slots rows [M, N], by key, ascending; and where each key's begin, [num_keys + 1]."""
    xp = sys.modules["cupy"]
    order = xp.sort((rows.astype(np.int64) << 32 | place).ravel())
    first = xp.searchsorted(order, xp.arange(num_keys + 1) << 32)
    return order & 2**32 - 1, first


def slot_gradients(pairs, q, dout, tied):
    """[dS q | P dout] of each slot, or their sum where tied; pairs [Z, 2, r, N], q and dout [Z, r, width]."""
    xp, (Z, _, r, N), D, Dv = sys.modules["cupy"], pairs.shape, q.shape[-1], dout.shape[-1]
    slots = xp.empty((Z, N, D if tied else D + Dv), _accumulator(pairs))
    by_key = pairs.reshape(Z, 2 * r, N).swapaxes(1, 2)
    if tied:  # one product: [dS, P]^T [q, dout]
        both = xp.zeros((Z, 2, r, D), pairs.dtype)
        both[:, 0], both[:, 1, :, :Dv] = q, dout
        return product(by_key, both.reshape(Z, 2 * r, D), slots)
    product(by_key[..., :r], q, slots[..., :D])
    product(by_key[..., r:], dout, slots[..., D:])
    return slots


def seen_windows(n, k_start, k_end, indices):
    """k_start and k_end as arrays; where indices say what a query sees, nothing is hidden by default."""
    xp, T, S, shape = n["xp"], n["T"], n["S"], (*n["..."], n["T"])
    start = xp.zeros(shape, np.int32) if k_start is None else k_start
    if k_end is None:
        causal = (xp.arange(T) + (S - T + 1)).clip(0)
        k_end = xp.broadcast_to(causal if indices is None else xp.full(T, S), shape)
    return start, k_end


def gpu_attention_target(n, q, k, scale, k_start, k_end, indices):
    """attention_target, from the products of all heads by kernels attention_lse and attention_target."""
    xp, (S, H, G, D) = n["xp"], (n[axis] for axis in ("S", "H", "G", "D"))
    acc, r, N = _accumulator(q, k), H // G, S if indices is None else indices.shape[-1]
    target, (start, end) = xp.zeros((*n["..."], n["T"], N), acc), seen_windows(n, k_start, k_end, indices)
    kind, (q, k) = factors(acc, q, k)
    scale, key_bytes = np.float64(scale), 32 + (indices is not None) * G * D * kind.itemsize
    sum_up, share = (kernel(chip(q), name, 256, ACC=acc) for name in ("attention_lse", "attention_target"))
    for b, t in query_chunks(n, N * (H * acc.itemsize + key_bytes)):
        M = t.stop - t.start
        rows = _visible(xp.arange(S)[None] if indices is None else indices[b][t], start[b][t], end[b][t])
        if indices is None:  # a group's heads of all queries share the keys
            heads = xp.ascontiguousarray(q[b][t].reshape(M, G, r, D).swapaxes(0, 1)).reshape(G, M * r, D)
            keys, strides = k[b].swapaxes(0, 1), (r * N, M * r * N)
        else:
            heads, keys, strides = q[b][t].reshape(M * G, r, D), gathered(k[b], rows), (H * N, r * N)
        s = product(heads, keys.swapaxes(1, 2), xp.empty((*heads.shape[:2], N), acc))
        sees, lse, sizes = rows >= 0, xp.empty((M, H), acc), (N, H, r, *strides, scale)
        sum_up((-(-M * H // 8),), s, sees, lse, M, *sizes)
        share((M * -(-N // 256),), s, sees, lse, target[b][t], *sizes)
    return target


def gpu_indexer_loss(n, index_q, index_k, weights, target, indices, k_start, k_end, deterministic):
    """indexer_loss; in the dense warm-up one product serves all queries, as they share the keys."""
    xp, (T, S, J, E) = n["xp"], (n[axis] for axis in ("T", "S", "J", "E"))
    like, N, (start, end) = (
        (index_q, index_k, weights),
        target.shape[-1],
        seen_windows(n, k_start, k_end, indices),
    )
    acc, losses = _accumulator(*like), xp.zeros((*n["..."], T))
    kind, (index_q, index_k) = factors(acc, index_q, index_k)
    d_q, d_k, d_w = (xp.zeros(x.shape, acc) for x in like)
    both_bytes, gpu = kind.itemsize + acc.itemsize, chip(index_q)
    weigh = kernel(gpu, "weigh_heads", 256, ACC=acc)
    backward = kernel(gpu, "indexer_backward", 256, TYPE=kind, ACC=acc)
    for b, t in query_chunks(n, N * ((J + (indices is not None) * E) * both_bytes + 10 * acc.itemsize + 32)):
        M, window = t.stop - t.start, (start[b][t], end[b][t])
        rows = _visible(xp.arange(S)[None] if indices is None else indices[b][t], *window).astype(np.int32)
        sees = rows >= 0  # [M, N]
        some = sees.any(1)
        w = np.where(some[:, None], weights[b][t].astype(acc), 0)
        if indices is None:  # what nobody sees, or sees nothing, is 0
            q = gathered(index_q[b][t].reshape(M, 1, J * E), np.where(some, xp.arange(M), -1)[None])
            keys = gathered(index_k[b][:, None], np.where(sees.any(0), xp.arange(S), -1)[None])
            q = q.reshape(1, M * J, E)
        else:
            q, keys = index_q[b][t], gathered(index_k[b][:, None], rows)  # [M, J, E], [M, N, E]
        r = product(q, keys.swapaxes(1, 2), xp.empty((*q.shape[:2], N), acc))
        scores, d_r = xp.empty((M, N), acc), xp.empty(r.shape, kind)
        weigh((M * -(-N // 256),), r, w, scores, N, J)
        losses[b][t], d_scores = _kl(target[b][t], scores, sees)
        backward((M * J,), r, d_scores, w, d_r, d_w[b][t], N, J)
        product(d_r, keys, d_q[b][t].reshape(q.shape))
        slots = product(d_r.swapaxes(1, 2), q, xp.empty((len(q), N, E), acc))
        if indices is None:
            d_k[b] += slots[0]
        else:
            add_by_key(rows, slots, d_k[b][:, None], deterministic)
    return losses.sum(), tuple(d.astype(x.dtype, copy=False) for d, x in zip((d_q, d_k, d_w), like))


def query_chunks(n, bytes_each):
    """b and a slice of its queries, as many as hold SLOT_BYTES; and M * G is a grid's y, which ends there."""
    most = max(1, min(SLOT_BYTES // max(1, bytes_each), 65535 // max(1, n.get("G", 1))))
    for b in np.ndindex(*n["..."]) if n.get("H", 1) else ():
        for t in range(0, n["T"], most):
            yield b, slice(t, min(t + most, n["T"]))


def factors(acc, *arrays):
    """The arrays, contiguous, in a dtype that cuBLAS multiplies and sums in acc: the one they have, or acc.

    Not float16: gradients of its scores are often so small that it would round them to 0.
    """
    xp, given = sys.modules["cupy"], [x for x in arrays if x is not None]
    kind, *others = {x.dtype for x in given}
    bfloat16 = kind.name == "bfloat16" and chip(given[0]).sm >= 80
    kind = kind if bfloat16 and not others and acc == np.float32 else acc
    return kind, [None if x is None else xp.ascontiguousarray(x, kind) for x in arrays]


def gathered(x, rows):
    """x [S, G, D] at rows [M, N] -> [M * G, N, D], zeros where a row is no key."""
    xp, (S, G, D), (M, N) = sys.modules["cupy"], x.shape, rows.shape
    taken = xp.empty((M * G, N, D), x.dtype)
    unit = math.gcd(16, x.data.ptr, D * x.itemsize)  # bytes at a time
    gather = kernel(chip(x), "gather", 256, UNIT=UNITS[unit])
    gather((-(-N // 8), M * G), x, rows.astype(np.int32, copy=False), taken, N, S, G, D * x.itemsize // unit)
    return taken


def product(a, b, out):
    """out[...] = a @ b by cuBLAS, for a [N, m, k] and b [N, k, n] of one dtype; sums are the accumulator's.

    Of each of the last two axes of a and b one is contiguous; out [N, m, n] may be wider than they are.
    """
    cupy = sys.modules["cupy"]
    cublas, one, (N, m, k) = cupy.cuda.cublas, np.ones(1, _accumulator(a)), a.shape
    compute = cublas.CUBLAS_COMPUTE_64F if one.itemsize == 8 else cublas.CUBLAS_COMPUTE_32F

    def operand(x):
        """Is it transposed?, a pointer, the type, the lengths of a row and of a matrix."""
        rows, columns = x.shape[1:]
        matrix, row, column = (stride // x.itemsize for stride in x.strides)
        straight = (column == 1 or columns == 1) and (row >= columns or rows == 1)
        row = max(row, columns) if straight else column
        return int(not straight), x.data.ptr, CUDA_R[x.dtype.name], row, matrix

    if 0 in (*out.shape, k):
        out[...] = 0
        return out
    (a_t, *a_is), (b_t, *b_is), (_, *out_is) = map(operand, (a, b, out))
    # cuBLAS goes by columns, to which our rows are the transpose: out^T = b^T a^T.
    sizes, zero = (out.shape[2], m, k), np.zeros_like(one)
    cublas.gemmStridedBatchedEx(
        cupy.cuda.get_cublas_handle(), b_t, a_t, *sizes, one.ctypes.data, *b_is, *a_is,
        zero.ctypes.data, *out_is, N, compute, cublas.CUBLAS_GEMM_DEFAULT,
    )  # fmt: skip
    return out


def add_by_key(rows, slots, sums, deterministic):
    """sums [S, G, W] += slots [M * G, N, W] of the keys rows [M, N], -1 for none."""
    xp, (M, N), (S, G, width), acc = sys.modules["cupy"], rows.shape, sums.shape, sums.dtype
    if not slots.size:
        return
    if not deterministic:
        add = kernel(chip(slots), "add_by_atomics", 256, ACC=acc)
        add((-(-N // 8), M * G), slots, rows, sums, N, G, width)
        return
    order, first = slots_by_key(rows, xp.arange(M)[:, None] * (G * N) + xp.arange(N), S)  # of the first group
    add = kernel(chip(slots), "add_by_key", 128, ACC=acc, COLUMNS=-(-width // 128))
    add((S * G,), slots, order, first, sums, N, G, width)


GPU = {
    "index_scores": gpu_index_scores,
    "select_topk": gpu_select_topk,
    "lightning_select": gpu_lightning_select,
    "dense_attention": gpu_attention,
    "sparse_attention": gpu_attention,
    "attend_to_entries": gpu_attend_to_entries,
    "quantized": gpu_quantized,
    "packed": gpu_packed,
    "sparse_attention_backward": gpu_sparse_attention_backward,
    "attention_target": gpu_attention_target,
    "indexer_loss": gpu_indexer_loss,
}
KERNELS |= {(name, "cupy"): run for name, run in GPU.items()}
