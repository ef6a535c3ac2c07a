# SPDX-License-Identifier: MIT
# dsa.py 0.1.0.  Copy this file alone, or with dsa_kernels.cu for the GPU, into any project.
"""DeepSeek Sparse Attention: NumPy to read, CUDA to run.

    I[t,s]  = sum_j weights[t,j] * relu(index_q[t,j] . index_k[s])        (1)  index_scores
    kept[t] = the top_k keys of row t by I, ties to the lowest index      (2)  select_topk
    out[t]  = softmax over kept[t] of (scale * q[t] . k[s])  @  v[s]      (3)  sparse_attention

A cheap indexer (1) scores every earlier token for each query, the best top_k are kept (2), and exact
attention runs over only those (3): it costs T*top_k, and T*S only in (1), which has few and narrow heads.
top_k = S is dense attention. The paper: "DeepSeek-V3.2: Pushing the Frontier of Open Large Language Models".

Axes     ... any number of batch axes, also none   T queries   S keys   K = min(top_k, S) kept keys
         H query heads   G key/value heads: query head h reads group h // (H / G), G = 1 is multi-query
         D query/key width   Dv value width   J index heads   E index width   N keys of a tile or block
         Heads come after tokens: torch's [B, H, T, D] would be read as H tokens of T heads.
Windows  k_start, k_end: integers [..., T]. Query t may see the keys s with k_start[t] <= s < k_end[t]. The
         default is causal, aligned at the end: k_start = 0, k_end[t] = S - T + t + 1, so where T > S the
         first T - S queries see nothing. (select_topk given neither: all keys are visible.) This one pair
         says causality, padding, packed sequences, chunked prefill and decode.
Indices  kept keys ascending, then -1. A query without keys has out 0 and lse -inf, and merges as nothing.
Numbers  float16, bfloat16 and float32 accumulate in float32, float64 in float64. `out` has the dtype of q.
Errors   TypeError: the wrong kind of object or dtype. ValueError: a wrong shape or value. IndexError: a key
         that does not exist. Each names the argument, its value and what was expected, and changes nothing.

Part I, all above the cut line, is the method and works alone: 1 stages, 2 the indexer and its
selection, 3 attention, 4 windows and batches, 5 all of DSA, 6 the cache, 7 checks, 8 threads. Part II adds
more threads, selectors, fp8, a cache in two tiers, the V3.2 layer, training, many machines and the GPU.
"""

import functools
import inspect
import math
import numbers
import re
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

__version__ = "0.1.0"
__all__ = [  # noqa: RUF022, in the order of the file
    "index_scores", "select_topk", "lightning_select", "dense_attention", "sparse_attention",
    "merge_attention", "apply_sink", "padded_window", "packed_window", "pad_batch", "SELECTION_RATIOS",
    "SELECTORS", "DSAConfig", "dsa_attention", "KVCache", "set_num_threads", "get_num_threads",
]  # fmt: skip

# 1. What a stage is ---------------------------------------------------------------------------------------

KERNELS: dict[tuple[str, str], Any] = {}  # (stage, library): what runs a stage on the arrays of that library
CHECKS: dict[str, Any] = {}  # stage: what checks its arrays in place of `sizes`


def stage(declared, most=lambda n: 64, through=None):
    """Declare a stage by the axes of its arrays and results: @stage("q [..., T, D] -> out [..., T] q").

    The function below it is the definition, in NumPy, for blocks of up to most(n) queries of one sequence:
    arrays without `...`, windows k_start and k_end [T] filled in, scale a number. Other stages reach it as
    name.block. A call by name checks the arguments, then runs the blocks on threads (`through`: in_blocks) or
    calls the KERNELS of another library. After a result's axes: its dtype, or the argument that has or is it.
    """
    arrays, results = map(axes_of, declared.split(" -> "))

    def declare(block):
        name, signature = block.__name__, inspect.signature(block)
        optional = {"v", *(x for x, parameter in signature.parameters.items() if parameter.default is None)}
        bind: dict[str, Any] = {}  # Python itself binds the arguments: fast, and with its own errors
        exec(f"def {name}{signature}: return locals()", bind)

        @functools.wraps(block)
        def run(*args, **kwargs):
            given = bind[name](*args, **kwargs)
            n = CHECKS.get(name, sizes)(arrays, given, optional)  # n: the size of each axis
            check_options(n, given)  # also fills in scale, k_start, k_end and n["K"]
            if n["xp"] is not np:
                return KERNELS[name, n["xp"].__name__](n, **given)
            return (through or in_blocks)(block, arrays, results, n, given, most(n))

        run.block = block  # type: ignore[attr-defined]
        run.__doc__ = f"{block.__doc__}\n    {declared}\n"
        return run

    return declare


def axes_of(declared):
    """{"q": (("...", "T", "H", "D"), "")} of "q [..., T, H, D]": names, axes and the word behind them."""
    found = re.findall(r"(\w+) \[([^]]*)\](?: (\w+))?", declared)
    return {name: (tuple(axes.split(", ")), word) for name, axes, word in found}


# 2. The lightning indexer and its selection, equations (1) and (2) ----------------------------------------

partition = np.partition  # a later part knows a faster way for long rows
KEY_TILE = 512  # keys, and rows, of one product, about: 512 * 512 float32 are 1 MB, an L2 cache


@stage("index_q [..., T, J, E], index_k [..., S, E], weights [..., T, J] -> scores [..., T, S]")
def index_scores(index_q, index_k, weights, *, k_start=None, k_end=None):
    """Equation (1), the relevance of every key to every query (V3.2 report, eq. 1). There is no hidden scale.

    weights are of either sign; scores float32 (float64 for float64 input), -inf outside the window.

    >>> q, k, w = np.array([[[1.0], [-1.0]]]), np.array([[2.0], [-3.0]]), np.array([[1.0, 0.5]])
    >>> index_scores(q, k, w)                      # key 0: 1 * relu(2);  key 1: 0.5 * relu(3)
    array([[2. , 1.5]])
    """
    (T, J, E), (lo, hi), dtype = index_q.shape, span(k_start, k_end), accumulator(index_q, index_k, weights)
    tile = KEY_TILE // 2 if J >= 8 else KEY_TILE  # with the 16 below 320 keys: see score
    index_q, weights = index_q.astype(dtype, "C"), weights.astype(dtype, "C")[:, None]  # [T, 1, J]
    scores, zero = np.full((T, len(index_k)), -np.inf, dtype), np.zeros(tile + 16, dtype)  # scalar 0 is slow

    def score(first):
        # BLAS may sum in another order in another shape or place (OpenBLAS on AVX2: the 8 keys at either end;
        # from 8 heads on, those behind 320). So every product has one shape, with 8 zero keys at either end.
        keys, r = np.zeros((E, tile + 16), dtype), np.empty((T, J, tile + 16), dtype)
        for s in range(first, min(first + 8 * KEY_TILE, hi), tile):
            k_s = index_k[s : s + tile]  # [N, E]
            own = slice(8, 8 + len(k_s))
            keys[:, own] = k_s.T
            np.maximum(np.matmul(index_q, keys, out=r), zero, out=r)  # [T, J, tile + 16]
            scores[:, s : s + tile] = (weights @ r)[:, 0, own]  # [T, N]                                  (1)

    list(spread(score, range(lo, hi, 8 * KEY_TILE)))
    return hidden(scores, k_start, k_end)


@stage("scores [..., T, S] -> indices [..., T, K] int32")
def select_topk(scores, top_k, *, local_window=0, num_sink_tokens=0, k_start=None, k_end=None):
    """Equation (2): each row's first top_k visible keys in the order (-score, index); returned ascending.

    Visible: above -inf and in the window, by default all keys. The last local_window and first
    num_sink_tokens visible keys are always kept, as part of top_k. ValueError for NaN inside a window.

    >>> select_topk(np.array([[3.0, 1.0, 3.0, 2.0], [1.0, 1.0, 1.0, -np.inf]]), 2)
    array([[0, 2],
           [0, 1]], dtype=int32)
    """
    (T, S), (lo, hi), forced = scores.shape, span(k_start, k_end), local_window + num_sink_tokens
    x = hidden(scores[:, lo:hi].astype(accumulator(scores)), k_start - lo, k_end - lo)  # [T, N]
    for t in np.flatnonzero(np.isnan(x.min(1, initial=np.inf))):  # min passes NaN on; the first row raises
        raise FloatingPointError(int(t))  # row t of this block; in_blocks says which query that is
    kept = np.zeros(x.shape, bool)
    if forced:
        seen, first, last = x > -np.inf, min(num_sink_tokens, S), min(local_window, S)
        place = np.cumsum(seen, axis=1)  # [T, N], 1 is the first visible key
        kept = seen & ((place <= first) | (place > place[:, -1:] - last))
        x[kept] = -np.inf
    k, kth = top_k - forced, np.full((T, 1), np.finfo(x.dtype).min)  # the k-th best score, never -inf
    if k < x.shape[1]:
        kth = np.maximum(kth, partition(x, -k, axis=1)[:, -k, None] if k else np.inf)  # [T, 1]
    best = x >= kth  # [T, N]                                                                             (2)
    for t in np.flatnonzero(np.count_nonzero(best, axis=1) > k):  # the last of the ties are too many
        ties = np.flatnonzero(x[t] == kth[t])
        best[t, ties[k - np.count_nonzero(best[t]) :]] = False  # a negative index
    kept |= best
    indices = np.full((T, min(top_k, S)), -1, np.int32)
    there = np.arange(indices.shape[1]) < np.count_nonzero(kept, axis=1)[:, None]  # [T, K], not -1
    indices[there] = lo + np.flatnonzero(kept) % max(1, hi - lo)  # place in [T, N] -> key
    return indices


@stage("index_q [..., T, J, E], index_k [..., S, E], weights [..., T, J] -> indices [..., T, K] int32")
def lightning_select(
    index_q, index_k, weights, top_k, *, local_window=0, num_sink_tokens=0, k_start=None, k_end=None
):
    """select_topk(index_scores(...)) without ever holding [T, S] scores: (1) and (2), a block at a time."""
    forced = {"local_window": local_window, "num_sink_tokens": num_sink_tokens}
    scores = index_scores.block(index_q, index_k, weights, k_start=k_start, k_end=k_end)  # [T, S], of a block
    return select_topk.block(scores, top_k, k_start=k_start, k_end=k_end, **forced)


# 3. Attention, equation (3) -------------------------------------------------------------------------------

ATTENTION = "q [..., T, H, D], k [..., S, G, D], v [..., S, G, Dv], sink [H]"


@stage(f"{ATTENTION} -> out [..., T, H, Dv] q, lse [..., T, H]")
def dense_attention(q, k, v=None, *, d_v=None, scale=None, k_start=None, k_end=None, sink=None):
    """Attention over every visible key, a tile at a time: softmax(scale * q . k) @ v.

    v=None with d_v=n says that v is k[..., :n], the latent of MLA, which is stored once. scale is D ** -0.5
    by default; sink [H]: see apply_sink. lse is the natural log of the sum of exponentials.

    >>> out, lse = dense_attention(np.zeros((2, 1, 1)), np.zeros((2, 1, 1)), np.array([[[2.0]], [[4.0]]]))
    >>> out.ravel().tolist(), np.exp(lse).ravel().round(6).tolist()
    ([2.0, 3.0], [1.0, 2.0])
    """
    v, (lo, hi) = k[..., :d_v] if v is None else v, span(k_start, k_end)
    q = np.multiply(q, scale, dtype=accumulator(q, k, v))

    def tile(part):
        s = np.arange(part.start, part.stop)[:, None]  # [N, 1]
        seen = (s >= k_start) & (s < k_end)  # [N, T]
        return attend(q, k[part], v[part], None if seen.all() else seen)

    out, lse = over_tiles(tile, q, lo, hi)
    return out if sink is None else apply_sink(out, lse, sink), lse


@stage(f"{ATTENTION}, indices [..., T, K] int -> out [..., T, H, Dv] out_dtype, lse [..., T, H]")
def sparse_attention(q, k, v, indices, *, d_v=None, scale=None, sink=None, out_dtype=None):
    """Equation (3): exact attention over the keys in indices [..., T, K], one set for all heads of a query.

    Slots of -1 are absent wherever they stand, an index that repeats counts each time, and a key in no row is
    never looked at. IndexError outside [-1, S). Otherwise as dense_attention. out_dtype: by default q's, or
    float32 for parts of 16 bits yet to be merged. A thread holds up to 2,048 gathered keys, 512 of wide ones.

    >>> k, v = np.zeros((3, 1, 1)), np.array([[[1.0]], [[2.0]], [[6.0]]])
    >>> sparse_attention(np.zeros((1, 1, 1)), k, v, np.array([[0, 2, -1]]))[0].item()
    3.5
    """
    values, wide, heads = k[..., :d_v] if v is None else v, max(1, k[:1].size), max(1, q.shape[1])
    q = np.multiply(q, scale, dtype=accumulator(q, k, values))
    out, lse = np.empty((*q.shape[:2], values.shape[2]), q.dtype), np.empty(q.shape[:2], q.dtype)
    longest = max(1, min(4, 2**12 // wide, 256 // heads))  # KEY_TILEs; threads share a query of many heads

    def tile(t, keys, seen, part):
        k_s = k.take(keys[part], 0, mode="clip")  # [N, G, D], the fastest way
        v_s = k_s[..., :d_v] if v is None else v.take(keys[part], 0, mode="clip")  # [N, G, Dv]
        return attend(q[t], k_s, v_s, None if seen is None else seen[part])

    for t, keys, seen in key_sets(indices, len(k), heads // k.shape[1]):
        out[t], lse[t] = over_tiles(functools.partial(tile, t, keys, seen), q[t], 0, len(keys), longest)
    return out if sink is None else apply_sink(out, lse, sink), lse


def key_sets(indices, num_keys, heads):
    """Yield (queries, a slice; their keys [N]; seen [N, T], None if all). Later, rows may share keys."""
    for t, row in enumerate(indices):
        yield slice(t, t + 1), row[row >= 0], None


def attend(q, k, v, seen=None):
    """(3) on one tile: scaled q [T, H, D], k [N, G, D], v [N, G, Dv], seen [N, T], None: all -> out, lse."""
    (T, H, D), (N, G, _) = q.shape, k.shape
    keys, values = (x.astype(q.dtype, copy=False).swapaxes(0, 1) for x in (k, v))  # [G, N, D], [G, N, Dv]
    rows = q.reshape(T, G, H // G, D).transpose(1, 3, 0, 2).reshape(G, D, R := T * (H // G))  # [G, D, R]
    x = keys @ rows  # [G, N, R], as BLAS is faster with the longer side first
    if seen is not None:
        np.copyto(x, -np.inf, where=np.repeat(~seen, H // G, axis=1))
    side = math.gcd(N, KEY_TILE // R) if 1 < R < KEY_TILE < x.size else 1  # max is slow on short rows, so
    tops = x.reshape(G, N // side, side * R).max(1).reshape(G, side, R) if side > 1 else x  # of `side` keys
    top = tops.max(1, keepdims=True, initial=np.finfo(x.dtype).min)  # finite, as -inf - -inf is NaN
    p = np.exp(np.subtract(x, top, out=x), out=x)
    total = np.ones((1, N), x.dtype) @ p  # [G, 1, R], several times as fast as p.sum(1)
    out = p.swapaxes(1, 2) @ values / np.where(total == 0, 1, total).swapaxes(1, 2)  # [G, R, Dv]         (3)
    out = out.reshape(G, T, H // G, v.shape[2]).swapaxes(0, 1).reshape(T, H, v.shape[2])
    lse = (top + np.log(total)).reshape(G, T, H // G).swapaxes(0, 1).reshape(T, H)
    if seen is not None and not np.isfinite(out).all():  # 0 * NaN is NaN: then each query over its keys alone
        for t, own in enumerate(seen.T):
            out[t], lse[t] = (x[0] for x in attend(q[t : t + 1], k[own], v[own]))
    return out, lse


def over_tiles(work, q, lo, hi, longest=16):
    """Merge out, lse = work(slice) over tiles of keys lo..hi, which depend on q [T, H, D], not on threads."""
    step = KEY_TILE * max(1, min(longest, 2**20 // max(1, len(q) * q.shape[1]) // KEY_TILE))  # or one tile
    tiles = [slice(s, min(s + step, hi)) for s in range(lo, max(hi, lo + 1), step)]
    return functools.reduce(lambda done, more: merge_attention(*zip(done, more)), spread(work, tiles))


@np.errstate(all="ignore")
def merge_attention(outs, lses):
    """Attention over the union of disjoint key sets, from the attention over each, computed without sink.

    outs of [..., T, H, Dv], lses of [..., T, H], in lists or stacked on axis 0 -> out, in the first's dtype,
    and lse. With L = logsumexp(lses): out = sum_i exp(lse_i - L) out_i. The empty set is (0, -inf).

    >>> outs, lses = [np.array([[[2.0]]]), np.array([[[5.0]]])], [np.log([[2.0]]), np.log([[1.0]])]
    >>> out, lse = merge_attention(outs, lses)
    >>> out.round(6).item(), np.exp(lse).round(6).item()
    (3.0, 3.0)
    """
    outs, lses = [*outs], [*lses]
    expect(len(outs) == len(lses) > 0, "the number of outs", len(outs), f"that of lses, {len(lses)}, above 0")
    checked = {f"outs[{i}]": (out, "... T H Dv") for i, out in enumerate(outs)}
    dims(**checked, **{f"lses[{i}]": (lse, "... T H") for i, lse in enumerate(lses)})
    dtype = accumulator(*outs, *lses)
    top = np.maximum(functools.reduce(np.maximum, lses), np.finfo(dtype).min, dtype=dtype)  # finite
    shares = [np.exp(lse - top) for lse in lses]  # [..., T, H] each
    total = functools.reduce(np.add, shares)
    parts = (out * (share / np.where(total == 0, 1, total))[..., None] for out, share in zip(outs, shares))
    return functools.reduce(np.add, parts).astype(outs[0].dtype.type, copy=False), top + np.log(total)


@np.errstate(all="ignore")
def apply_sink(out, lse, sink):
    """Scale out for a sink [H], a learned logit z per head that has no value: out / (1 + exp(z - lse)).

    out [..., T, H, Dv], lse [..., T, H] -> out. Once, after any merge; lse does not include it. z = -inf has
    no effect, z = +inf gives 0.

    >>> apply_sink(np.array([[[6.0]]]), np.log([[2.0]]), np.log([1.0])).round(6).item()
    4.0
    """
    dims(out=(out, "... T H Dv"), lse=(lse, "... T H"), sink=(sink, "H"))
    dtype = accumulator(out, lse, sink)
    x = sink.astype(dtype) - np.maximum(lse, np.finfo(dtype).min, dtype=dtype)  # z - lse; -inf - -inf is NaN
    return (out / (1 + np.exp(x))[..., None]).astype(out.dtype.type, copy=False)


# 4. Windows and batches: which keys a query may see -------------------------------------------------------


def padded_window(lengths, num_queries):
    """Causal windows of a right-padded batch, S = T: lengths [B] -> k_start, k_end [B, T]; padding sees none.

    >>> padded_window(np.array([3, 1]), 3)[1].tolist()
    [[1, 2, 3], [1, 0, 0]]
    """
    lengths = check_lengths(lengths, most=integer("num_queries", num_queries, 0))
    k_end = causal_end(0 * lengths, lengths, num_queries)
    return 0 * k_end, k_end


def packed_window(lengths):
    """Causal windows of sequences laid end to end: lengths [B] -> k_start, k_end [sum of lengths].

    >>> [w.tolist() for w in packed_window(np.array([3, 2]))]
    [[0, 0, 0, 3, 3], [1, 2, 3, 4, 5]]
    """
    lengths = check_lengths(lengths)
    return np.repeat(np.cumsum(lengths) - lengths, lengths), np.arange(lengths.sum()) + 1


def pad_batch(sequences, multiple=64, name="sequences"):
    """Right-pad arrays [T_i, ...] with zeros to one [B, T, ...], T a multiple of `multiple`; and lengths [B].

    >>> padded, lengths = pad_batch([np.ones(3), np.ones(1)], multiple=4)
    >>> padded.tolist(), lengths.tolist()
    ([[1.0, 1.0, 1.0, 0.0], [1.0, 0.0, 0.0, 0.0]], [3, 1])
    """
    expect(len(sequences), name, "empty", "at least one array")
    for i, x in enumerate(sequences):
        dims(**{f"{name}[{i}]": (x, "...")})
        like = x.ndim > 0 and (x.shape[1:], x.dtype.type) == (sequences[0].shape[1:], sequences[0].dtype.type)
        expect(like, f"{name}[{i}]", f"of {x.dtype} {x.shape}", f"[T_i, ...] as {sequences[0].shape}")
    lengths, multiple = np.array([len(x) for x in sequences]), integer("multiple", multiple, 1)
    shape = len(sequences), -(-int(lengths.max()) // multiple) * multiple, *sequences[0].shape[1:]
    padded = np.zeros_like(sequences[0], sequences[0].dtype.type, shape=shape)
    for row, x in zip(padded, sequences):
        row[: len(x)] = x
    return padded, lengths


def causal_end(start, lengths, num_queries):
    """k_end [B, T] where lengths[b] new tokens follow start[b] older ones; padding sees nothing."""
    return np.where((t := np.arange(num_queries)) < lengths[:, None], start[:, None] + t + 1, 0)


def every_key(windows, width):
    """All keys of windows [..., T], none longer than `width`, then -1 -> [..., T, width] int32."""
    start, end = (w[..., None].astype(np.int32) for w in windows)
    keys = start + library("k_start", start).arange(width, dtype=np.int32)
    return np.where(keys < end, keys, -1).astype(np.int32, copy=False)


def span(start, end):
    """(first, end) of the keys that a block of windows touches; (0, 0) if they are all empty."""
    seen = start < end
    return (int(start[seen].min()), int(end[seen].max())) if seen.any() else (0, 0)


def hidden(scores, start, end):
    """scores [T, N], set to -inf outside the windows [T], in place. A window may be empty anywhere."""
    for row, lo, hi in zip(scores, np.maximum(start, 0).tolist(), np.maximum(end, start).tolist()):
        row[:lo] = row[max(0, hi) :] = -np.inf
    return scores


# 5. All of DSA: configure, select, attend -----------------------------------------------------------------

SELECTION_RATIOS = {"aggressive": 0.01, "balanced": 0.03, "conservative": 0.05, "safe": 0.10}
PRECISIONS: dict[str, Any] = {"fp32": lambda x: x}  # of the indexer: how index_q and index_k are rounded
SELECTORS: dict[str, Any] = {}  # select(q, k, top_k, *, index_q, ..., **options) -> indices; not "lightning"
DSA_AXES = axes_of(f"{ATTENTION}, index_q [..., T, J, E], index_k [..., S, E], weights [..., T, J]")


@dataclass(frozen=True)
class DSAConfig:
    """How dsa_attention selects. ValueError for an invalid value or combination.

    top_k keys of each query, or ceil(sparse_ratio * S), S being that of the call (see SELECTION_RATIOS), are
    chosen by strategy: "dynamic", by global_selection; "hybrid", the same beside a local_window of the last
    keys; "fixed", by pattern. num_sink_tokens first keys are always kept.
    """

    top_k: int = 2048
    sparse_ratio: float | None = None
    strategy: Literal["dynamic", "fixed", "hybrid"] = "dynamic"
    local_window: int = 0  # 128 and 256 are usual for hybrid
    num_sink_tokens: int = 0
    global_selection: Literal["lightning", "approximate", "lsh", "learned", "hierarchical"] = "lightning"
    pattern: Literal["window", "strided", "global", "random"] = "window"
    batch_pad_to_multiple: int = 64  # of lists of sequences
    cache_strategy: Literal["lru"] = "lru"  # what a HybridKVCache keeps near
    indexer_precision: str = "fp32"  # to which index_q and index_k are rounded, of PRECISIONS
    fallback_dense_threshold: int | None = None  # all keys are kept for S up to that; None: up to top_k
    progressive_sparsity: Literal[False, True] = False  # top_k falls from layer to layer: see top_k_at

    def __post_init__(self):
        for name, kind in DSAConfig.__annotations__.items():
            value, allowed = getattr(self, name), tuple(PRECISIONS) if kind is str else get_args(kind)
            if kind is int or (value is not None and name == "fallback_dense_threshold"):
                least = int(name in ("top_k", "batch_pad_to_multiple"))
                object.__setattr__(self, name, integer(name, value, least, ValueError))
            elif type(None) not in allowed:
                fits = type(value) is type(allowed[0]) and value in allowed
                expect(fits, name, repr(value), f"one of {allowed}")
        ratio, strategy, window = self.sparse_ratio, self.strategy, self.local_window
        fits = ratio is None or (is_number(ratio) and 0 < ratio <= 1)
        expect(fits, "sparse_ratio", repr(ratio), "None, or above 0 and up to 1 as SELECTION_RATIOS")
        expect(strategy != "hybrid" or window > 0, "local_window", 0, "at least 1 in strategy 'hybrid'")
        expect(strategy != "dynamic" or window == 0, "local_window", window, "0, or strategy 'hybrid'")
        idle, value = ("global_selection", "lightning") if strategy == "fixed" else ("pattern", "window")
        expect(vars(self)[idle] == value, idle, repr(vars(self)[idle]), f"{value!r} in strategy {strategy!r}")
        if ratio is None:
            check_options({"S": 0}, {**vars(self)})

    def top_k_at(self, layer=0, n_layers=1, num_keys=None):
        """top_k of one layer; num_keys is needed for a sparse_ratio. At least the window and the sink tokens.

        With progressive_sparsity it falls from 2 * top_k in the first layer to top_k / 2 in the last.

        >>> [DSAConfig(top_k=64, progressive_sparsity=True).top_k_at(layer, 3) for layer in range(3)]
        [128, 64, 32]
        """
        n_layers, layer, top_k = integer("n_layers", n_layers, 1), integer("layer", layer, 0), self.top_k
        expect(layer < n_layers, "layer", layer, f"less than n_layers = {n_layers}")
        if self.sparse_ratio is not None:
            top_k = float(self.sparse_ratio) * integer("num_keys", num_keys, 0, ValueError)
        if self.progressive_sparsity and n_layers > 1:
            top_k *= 2 ** (1 - 2 * layer / (n_layers - 1))
        return max(math.ceil(round(top_k, 9)), self.local_window + self.num_sink_tokens, 1)  # 0.07 * 100 > 7

    def quota_at(self, layer, n_layers, num_keys):
        """The arguments of select_topk for that many keys, and whether these are so few that all are kept."""
        top_k, few = self.top_k_at(layer, n_layers, num_keys), self.fallback_dense_threshold
        forced = {"local_window": self.local_window, "num_sink_tokens": self.num_sink_tokens}
        return {"top_k": top_k, **forced}, num_keys <= (top_k if few is None else few)

    def selector(self):
        """The name in SELECTORS, or "lightning"."""
        return self.pattern if self.strategy == "fixed" else self.global_selection


def dsa_attention(
    q, k, v, index_q, index_k, weights, config, *, d_v=None, scale=None, sink=None, k_start=None, k_end=None,
    lengths=None, cache=None, layer=0, n_layers=1, **options,
):  # fmt: skip
    """DeepSeek Sparse Attention: select as config says, attend to what was selected -> out, lse, indices.

    q [..., T, H, D], k [..., S, G, D], v [..., S, G, Dv] or None, index_q [..., T, J, E], index_k
    [..., S, E], weights [..., T, J] -> out [..., T, H, Dv], lse [..., T, H] and indices [..., T, K]: what was
    attended to. d_v to k_end: see dense_attention. Sequences that differ in length stand right-padded in a
    batch, with lengths [B] in place of windows; or q to weights are lists of arrays [T_i, ...], which are
    padded to config.batch_pad_to_multiple. Padding gives 0, -inf and -1. cache: k, v if any and index_k are
    appended to it; lengths counts each sequence's new tokens, those of q. layer, n_layers: for
    progressive_sparsity. options: of SELECTORS. Where all keys are kept, index arrays are only checked.
    """
    check_type("config", config, DSAConfig)
    arrays = {"q": q, "k": k, "v": v, "index_q": index_q, "index_k": index_k, "weights": weights}
    if isinstance(q, (list, tuple)):
        expect(lengths is None, "lengths", lengths, "None with lists of sequences, which have their own")
        wrong = [name for name, x in arrays.items() if not isinstance(x, (list, tuple, type(None)))]
        expect(not wrong, " and ".join(wrong), "no list", "one, as other arguments are", TypeError)
        for name in [name for name, x in arrays.items() if x is not None]:
            arrays[name], own = pad_batch(arrays[name], config.batch_pad_to_multiple, name)
            lengths = own if lengths is None else lengths
            expect((*own,) == (*lengths,), f"the lengths in {name}", own, f"those in q, {lengths}")
    kwargs = {"d_v": d_v, "scale": scale, "sink": sink}
    n, lengths = dsa_dims(arrays, kwargs, (k_start, k_end), cache, lengths)
    choose = functools.partial(choose_keys, config, (layer, n_layers), options)
    if cache is None:
        if lengths is not None:
            k_start, k_end = map(n["xp"].asarray, padded_window(lengths, n["T"]))
        windows, main = windows_of(n, k_start, k_end), [arrays[x] for x in "qkv"]
        indices, every = choose(arrays, windows, lengths)
        if every:  # without gathering them
            return (*dense_attention(*main, k_start=windows[0], k_end=windows[1], **kwargs), indices)
        return (*sparse_attention(*main, indices, **kwargs), indices)

    def attend_to_cache():
        read = cache.stored if config.selector() == "lightning" else cache.read  # that needs only k's shape
        keys = {"k": read("k"), "index_k": cache.read("index_k")}
        indices, _ = choose({**arrays, **keys}, cache.window(n["T"], lengths), cache.lengths)
        return (*cache.attend(arrays["q"], indices, **kwargs), indices)

    tokens = {name: arrays[name] for name in ("k", "v", "index_k") if arrays[name] is not None}
    return cache.append_then(attend_to_cache, lengths=lengths, **tokens)


def dsa_dims(arrays, options, windows, cache, lengths):
    """The checks of dsa_attention -> sizes, and lengths [B] if any are given."""
    n = sizes(DSA_AXES, given := arrays | options, ("v", "sink"))
    check_options(n, given)
    if cache is not None:
        check_type("cache", cache, KVCache)
    if cache is not None or lengths is not None:
        expect(all(w is None for w in windows), "k_start or k_end", "given", "None with lengths or a cache")
        fits = len(n["..."]) == 1 and n["T"] == n["S"]
        expect(fits, "q", f"of shape {arrays['q'].shape}", f"[B, T, H, D] of the same T as k, {n['S']}")
        lengths = None if lengths is None else check_lengths(lengths, n["..."][0], n["T"])
    return n, lengths


def choose_keys(config, layer, options, arrays, windows, lengths):
    """The indices that config chooses, by each sequence's own S if it matters, and if that is all keys."""
    arrays = {name: x for name, x in arrays.items() if x is not None and name != "v"}
    if lengths is not None and lengths.size and (config.sparse_ratio or config.fallback_dense_threshold):
        each = []
        for b, S in enumerate(lengths.tolist()):
            own = {x: y[b : b + 1, : S if x in ("k", "index_k") else None] for x, y in arrays.items()}
            each.append(choose_keys(config, layer, options, own, [w[b : b + 1] for w in windows], None)[0])
        K = max(x.shape[-1] for x in each)
        more = [np.pad(x, [(0, 0), (0, 0), (0, K - x.shape[-1])], constant_values=-1) for x in each]
        return np.concatenate(more), False
    select: Any = SELECTORS.get(chosen := config.selector())
    unknown = options.keys() - getattr(select, "options", ())
    expect(not unknown, "among the options", sorted(unknown), f"those of the selector {chosen!r}", TypeError)
    expect(select or chosen == "lightning", "the selector", repr(chosen), "one that this file has")
    (*batch, T, _, _), xp = arrays["q"].shape, library("q", arrays["q"])
    S = arrays["k"].shape[-3] if lengths is None else int(lengths.max(initial=0))
    quota, dense = config.quota_at(*layer, S)
    if dense:
        return every_key(filled({"...": tuple(batch), "T": T, "S": S, "xp": xp}, windows), S), True
    index = {x: PRECISIONS[config.indexer_precision](arrays[x]) for x in ("index_q", "index_k")}
    index |= {"weights": arrays["weights"], **quota, "k_start": windows[0], "k_end": windows[1], **options}
    return (lightning_select(**index) if chosen == "lightning" else select(**arrays | index)), False


# 6. The cache ---------------------------------------------------------------------------------------------

ATTENDED = axes_of("q [B, T, H, D], indices [B, T, K] int, sink [H]")  # what a cache attends with
STORAGES: dict[str, Any] = dict.fromkeys(("float64", "float32", "float16", "bfloat16"))  # None: as they are


class KVCache:
    """What the tokens so far left behind, for a batch of sequences, each of its own length.

    capacity: tokens per sequence; grow doubles it when it is full, otherwise a full cache raises ValueError.
    storage: "float64", "float32", "float16", "bfloat16", or another of STORAGES, which may keep the last
    qk_rope_head_dim values of "k", those RoPE turns, more exactly. streams: what a token leaves, name=shape.
    attend reads "k" (G, D) and "v" (G, Dv), or "k" alone if it is a tied latent, the indexer "index_k" (E,).
    Any number of threads may read and attend; to change the cache is the caller's to lock. xp: whose arrays.

    >>> cache = KVCache(4, k=(1, 2), index_k=(3,))
    >>> cache.append(k=np.ones((1, 3, 1, 2)), index_k=np.ones((1, 3, 3)))
    >>> cache.lengths.tolist(), cache.bytes_per_token
    ([3], 20)
    """

    def __init__(
        self, capacity, *, batch=1, storage="float32", grow=False, qk_rope_head_dim=64, xp=np, **streams
    ):
        capacity, self.batch = integer("capacity", capacity, 1), integer("batch", batch, 1)
        expect(hasattr(xp, "ndarray"), "xp", repr(xp), "numpy, or another library that has kernels")
        expect(isinstance(grow, bool), "grow", repr(grow), "False or True")
        expect(storage in STORAGES, "storage", repr(storage), f"one of {tuple(STORAGES)}")
        expect(streams, "streams", "empty", "at least one, such as k=(1, 576)")
        for name, shape in streams.items():
            fits = isinstance(shape, tuple) and shape and name != "lengths"
            expect(fits, name, repr(shape), "the shape of a stream, a tuple such as (1, 576)")
        if storage == "bfloat16":
            import ml_dtypes  # noqa: F401, gives NumPy the dtype of this name
        self.xp, self.storage, self.grow, self.closed = xp, storage, grow, False
        self.streams = {name: tuple(integer(name, n, 1) for n in shape) for name, shape in streams.items()}
        self.qk_rope_head_dim = integer("qk_rope_head_dim", qk_rope_head_dim, 0)
        self._codec = codec = STORAGES[storage] and STORAGES[storage](self)
        self.dtype = codec.dtype if codec else np.dtype(storage)
        self._stored = codec.shapes if codec else self.streams
        self.bytes_per_token = sum(map(math.prod, self._stored.values())) * self.dtype.itemsize
        self.capacity, self._lengths = 0, np.zeros(self.batch, np.int64)
        self._data: dict[str, Any] = {}  # the streams, [B, capacity, *shape]
        self._allocate(capacity)

    @property
    def lengths(self):
        """How many tokens each sequence holds, int64 [B]. All that asks for it refuses a closed cache."""
        expect(not self.closed, "the cache", "closed", "an open one")
        return self._lengths.copy()

    @property
    def nbytes(self):
        """Bytes of memory held, whether tokens fill them yet or not."""
        return sum(x.nbytes for x in self._data.values())

    @np.errstate(all="ignore")
    def append(self, *, lengths=None, **tokens):
        """Add tokens[name] [B, T, *shape] to every stream; for sequence b the first lengths[b], or all."""
        expect(tokens.keys() == self.streams.keys(), "the streams given", [*tokens], [*self.streams])
        for name, x in tokens.items():
            sizes({name: (("...",), "")}, tokens, (), self.xp)
            expected = (self.batch, *next(iter(tokens.values())).shape[1:2], *self.streams[name])
            expect(x.shape == expected, name, f"of shape {x.shape}", expected)
        new = check_lengths(lengths, self.batch, x.shape[1])
        need, room = max((self.lengths + new).tolist()), f"at most capacity = {self.capacity}, or grow=True"
        expect(need <= self.capacity or self.grow, "the cache", f"full, for {need} tokens", room)
        rows = [(b, name, x[b, :n]) for b, n in enumerate(new.tolist()) for name, x in tokens.items()]
        for _, name, x in rows if self.xp is np else ():  # another library would have to be waited for
            if self._codec:
                self._codec.check_range(name, x)
            elif not np.can_cast(x.dtype, self.dtype):
                lost = (np.isfinite(x) & ~np.isfinite(x.astype(self.dtype))).any()
                expect(not lost, name, f"beyond {self.dtype}'s largest number", "less, or another storage")
        if need > self.capacity:
            self._allocate(max(need, 2 * self.capacity))
        for b, name, x in rows:
            place = self._data[name][b, self._lengths[b] : self._lengths[b] + len(x)]
            if self._codec:
                self._codec.encode(name, x, place)
            else:
                place[...] = x
        self._set_lengths(self._lengths + new)

    def append_then(self, work, *, lengths=None, **tokens):
        """append, then return work(); if either raises, the cache is as it was."""
        before = self.lengths
        try:
            self.append(lengths=lengths, **tokens)
            return work()
        except BaseException:
            self._set_lengths(before)
            raise

    def read(self, name):
        """A view (a copy if encoded) [B, longest length, *shape]; beyond a sequence's length undefined."""
        return self._codec.decode(name, self.stored(name)) if self._codec else self.stored(name)

    def stored(self, name):
        """As read, but as it is stored, encoded or not."""
        expect(name in self.streams, "name", repr(name), f"one of {[*self.streams]}")
        longest = max(self.lengths.tolist())
        return self._data[name][:, :longest]

    def window(self, num_tokens, lengths=None):
        """k_start, k_end [B, T] of the num_tokens appended last, the first lengths[b] (default: all) real."""
        new = check_lengths(lengths, self.batch, integer("num_tokens", num_tokens, 0))
        check_lengths(new, self.batch, self.lengths, "num_tokens")
        end = self.xp.asarray(causal_end(self._lengths - new, new, num_tokens))
        return np.zeros_like(end), end

    def attend(self, q, indices, *, d_v=None, scale=None, sink=None, out_dtype=None):
        """sparse_attention of q [B, T, H, D] over the streams "k" and "v", at indices [B, T, K]."""
        n = sizes(ATTENDED, {"q": q, "indices": indices, "sink": sink}, ("sink",), self.xp)
        expect(n["B"] == self.batch, "B", f"{n['B']} in q", f"the cache's batch = {self.batch}")
        for b, length in enumerate(self.lengths.tolist() if self.xp is np else ()):
            check_keys("indices", indices[b], length)
        return self._attend(q, indices, {"d_v": d_v, "scale": scale, "sink": sink, "out_dtype": out_dtype})

    def truncate(self, lengths):
        """Forget the tokens of each sequence b from lengths[b] on, such as a rejected draft."""
        self._set_lengths(check_lengths(np.asarray(lengths), self.batch, self.lengths))

    def close(self):
        """Give the memory back. To append, read or attend after that raises ValueError."""
        self.closed, self._data = True, {}

    def __enter__(self):
        expect(not self.closed, "the cache", "closed", "an open one")
        return self

    def __exit__(self, *error):
        self.close()

    def _set_lengths(self, lengths):  # this and what follows, a cache of codes or of two tiers overrides
        self._lengths = lengths

    def _attend(self, q, indices, kwargs):
        v = self.read("v") if "v" in self.streams else None
        return sparse_attention(q, self.read("k"), v, indices, **kwargs)

    def _allocate(self, capacity):
        self._data, self.capacity = {name: self._longer(name, capacity) for name in self._stored}, capacity

    def _longer(self, name, capacity):
        x = self.xp.zeros((self.batch, capacity, *self._stored[name]), self.dtype)
        x[:, : self.capacity] = self._data.get(name, 0)
        return x


# 7. Checks ------------------------------------------------------------------------------------------------

FLOATS = ("float16", "bfloat16", "float32", "float64")
F32, F64 = np.dtype(np.float32), np.dtype(np.float64)


def expect(ok, name, value, expected, error=ValueError):
    if not ok:
        raise error(f"{name} is {value}, expected {expected}")


def check_type(name, x, kind):
    expect(isinstance(x, kind), name, f"a {type(x).__name__}", f"a {kind.__name__}", TypeError)


def library(name, x, others=None):
    """The module whose array x is: numpy, or another that KERNELS knows; and the same as the others'."""
    home, wanted = type(x).__module__, "numpy" if others is None else others.__name__
    known = home == wanted or (others is None and ("index_scores", home) in KERNELS)
    known = known and isinstance(x, sys.modules[home].ndarray) and type(x).__name__ != "matrix"
    expect(known, name, f"a {home}.{type(x).__name__}", f"an array of {wanted}, as by asarray", TypeError)
    return sys.modules[home]


def dims(xp=None, **arrays):
    """sizes, called as dims(q=(q, "... T H D"), ...); a dtype may follow the axes."""
    declared = {name: (tuple(axes.split()), *(word or [""])) for name, (_, axes, *word) in arrays.items()}
    return sizes(declared, {name: x for name, (x, *_) in arrays.items()}, (), xp)


def sizes(declared, given, optional, xp=None):
    """Check arrays against each other -> the size of each axis; "...": the batch shape, "xp": the library."""
    n: dict[str, Any] = {}
    for name, (axes, word) in declared.items():
        if (x := given[name]) is None and name in optional:
            continue
        xp, shape, allowed = library(name, x, xp), x.shape, (word,) if word else FLOATS
        fits = x.dtype.kind in "iu" if word == "int" else x.dtype.type.__name__ in allowed
        expect(fits, name, f"of dtype {x.dtype}", " or ".join(allowed), TypeError)
        if axes[0] == "..." and (batch := len(shape) - len(axes) + 1) >= 0:
            shape = shape[:batch], *shape[batch:]  # the batch shape is one entry
        expect(len(shape) == len(axes), name, f"of shape {x.shape}", f"axes [{', '.join(axes)}]")
        for axis, size in zip(axes, shape):
            if n.setdefault(axis, size) != size:
                owner = next(x for x in declared if axis in declared[x][0] and given[x] is not None)
                what = "batch axes " if axis == "..." else f"{axis} = "
                raise ValueError(f"{name} has {what}{size}, but {owner} has {what}{n[axis]}")
    if "G" in n and "H" in n:
        expect(n["G"] and n["H"] % n["G"] == 0, "G", n["G"], f"a divisor of H = {n['H']}")
    expect(n.get("S", 0) < 2**31, "S", n.get("S"), "less than 2**31, as indices are int32")
    return n | {"xp": xp}


def accumulator(*arrays):
    return F64 if np.float64 in [x.dtype.type for x in arrays] else F32


def is_number(value):
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def integer(name, x, least, error=TypeError):
    whole = type(x) is int or (isinstance(x, numbers.Integral) and not isinstance(x, bool))
    if not whole or x < least:
        raise (ValueError if whole else error)(f"{name} is {x!r}, expected an integer of at least {least}")
    return int(x)


def check_lengths(lengths, batch=None, most=None, name="lengths"):
    """lengths as int64 [B], each from 0 to `most`, a number or [B]; None, if batch is given: all `most`."""
    if lengths is None and batch is not None:
        return np.full(batch, most)
    lengths = np.asarray(lengths)
    B = dims(**{name: (lengths, "B", "int")})["B"]
    fits = batch in (None, B) and (lengths >= 0).all() and (most is None or (lengths <= most).all())
    expect(fits, name, lengths.tolist(), f"{B if batch is None else batch} numbers from 0 to {most}")
    return lengths.astype(np.int64)


def check_keys(name, indices, S):
    """Keys from -1 to S - 1; those of another library are not looked at, which would wait for a device."""
    for s in (indices.min(), indices.max()) if isinstance(indices, np.ndarray) and indices.size else ():
        expect(-1 <= s < S, f"a key in {name}", s, f"-1 or a key in [0, {S})", IndexError)


def windows_of(n, k_start, k_end):
    """k_start and k_end as integers [..., T], clipped to the real keys; None stays None but in NumPy."""
    xp, shape, windows = n["xp"], (*n["..."], n["T"]), []
    for name, w in (("k_start", k_start), ("k_end", k_end)):
        if w is not None:
            own = dims(xp, **{name: (w, "... T", "int")})
            fits = own["T"] == n["T"] and w.ndim <= len(shape)
            fits = fits and all(a in (1, b) for a, b in zip(w.shape[::-1], shape[::-1]))
            expect(fits, name, f"of shape {w.shape}", shape)
            w = w.clip(0, min(n["S"], np.iinfo(w.dtype).max))
            w = xp.broadcast_to(w, shape).astype(np.int64 if xp is np else np.int32, "C")
        windows.append(w)
    return filled(n, windows) if xp is np else windows


def filled(n, windows):
    """Windows as arrays; None becomes the causal default, in which the queries are the last T of S tokens."""
    end = np.maximum(np.arange(n["S"] - n["T"] + 1, n["S"] + 1), 0)
    whole = (np.broadcast_to(w, (*n["..."], n["T"])) for w in (0 * end, end))
    return [n["xp"].asarray(causal) if w is None else w for w, causal in zip(windows, whole)]


def check_options(n, given):
    """Check options by name (d_v, scale, top_k, windows, indices, out_dtype); fill in given and n."""
    if "d_v" in given:
        tied, d_v = given["v"] is None, given["d_v"]
        expect(tied != (d_v is None), "d_v", d_v, "a number if v is None, else None")
        if tied and not n.setdefault("Dv", integer("d_v", d_v, 1)) == d_v <= n["D"]:
            raise ValueError(f"d_v is {d_v}, expected at most k's D = {n['D']}, and as in out")
    if given.get("scale", n) is None:
        given["scale"] = max(1, n["D"]) ** -0.5
    elif "scale" in given:
        scale = given["scale"].item() if getattr(given["scale"], "ndim", 1) == 0 else given["scale"]
        expect(is_number(scale) and abs(scale) <= sys.float_info.max, "scale", repr(scale), "a finite number")
        given["scale"] = float(scale)
    if "top_k" in given:
        for name, least in (("top_k", 1), ("local_window", 0), ("num_sink_tokens", 0)):
            given[name] = integer(name, given[name], least)
        top_k, forced = given["top_k"], (given["local_window"], given["num_sink_tokens"])
        if sum(forced) > top_k:
            raise ValueError(f"local_window, num_sink_tokens are {forced}, expected up to {top_k = } in all")
        n["K"] = min(top_k, n["S"])
    if "k_start" in given and (n["xp"] is np or given["k_start"] is not None or given["k_end"] is not None):
        alone = given.get("indices") is not None or ("scores" in given and given["k_start"] is None)
        if alone and given["k_end"] is None:  # the keys are chosen already, or scores say it: all are visible
            given["k_end"] = n["xp"].full(n["T"], n["S"])
        given["k_start"], given["k_end"] = windows_of(n, given["k_start"], given["k_end"])
    if given.get("indices") is not None:
        check_keys("indices", given["indices"], n["S"])
    if given.get("out_dtype", n) is None:
        given["out_dtype"] = given["q"].dtype
    elif "out_dtype" in given:
        own = [given["q"].dtype, accumulator(*(given[x] for x in "qkv" if given[x] is not None))]
        expect((x := given["out_dtype"]) in own, "out_dtype", x, f"q's dtype or {own[1]}", TypeError)
        given["out_dtype"] = own[own.index(x)]


# 8. Threads -----------------------------------------------------------------------------------------------

THREADS: list[int | None] = [None]  # what set_num_threads set
BLAS: dict[str, Any] = {}  # a later part: how to "hold" it to one thread, and how many "threads" we then have


def set_num_threads(n):
    """Work on blocks of queries, or tiles of keys, with n threads; None, the default: see get_num_threads."""
    THREADS[0] = None if n is None else integer("n", n, 1)


def get_num_threads():
    """How many threads work: by default 1 beside BLAS's own, or one per CPU if threadpoolctl holds BLAS."""
    return THREADS[0] or (BLAS["threads"]() if BLAS else 1)


def on_one_blas_thread(work):
    """work(), while NumPy does not warn, and BLAS keeps to one thread where a later part knows how."""
    with np.errstate(all="ignore"):  # the code answers for -inf - -inf and the like
        return BLAS["hold"](work) if BLAS else work()


def in_blocks(block, arrays, results, n, given, most, take=lambda more: None):
    """Run block on all blocks of queries -> the whole results; what it returns besides: take((b, more))."""
    cut = {x: axes[1] == "T" for x, (axes, _) in arrays.items() if axes[0] == "..." and given[x] is not None}
    sums, whole = accumulator(*(given[x] for x in cut)), []
    cut |= {x: True for x in ("k_start", "k_end") if x in given}
    for axes, word in results.values():
        shape = (n.get(axis, n.get("S")) for axis in axes[1:])  # without indices K is S
        dtype = getattr(given[word], "dtype", given[word]) if word in given else np.dtype(word or sums)
        whole.append(np.empty((*n["..."], *shape), dtype))

    def work(job):
        b, t = job
        own = {x: given[x][(*b, t) if by_query else b] for x, by_query in cut.items()}
        try:
            found = block(**{**given, **own})
        except FloatingPointError as wrong:
            query = (*b, t.start + wrong.args[0])
            raise ValueError(f"a score in the window of query {query} is NaN, expected a number") from None
        found = found if isinstance(found, tuple) else (found,)
        for x, part in zip(whole, found):
            x[(*b, t)] = part
        return b, found[len(whole) :]

    few = n.get("K", 2e9) <= KEY_TILE and "lse" in results and n["K"] * n["D"] * (n["H"] + 4 * n["G"]) < 2**19
    run = map if few else spread  # a query of few keys is so little work that threads wait for Python's lock
    on_one_blas_thread(lambda: list(map(take, run(work, blocks(n, most)))))  # no frame that an error keeps
    return tuple(whole) if len(whole) > 1 else whole[0]


def blocks(n, most=64):
    """Every (b, slice of queries), sized so that a block's products and rows of scores stay small."""
    T, (J, H, G) = n["T"], (n.get(axis) or 1 for axis in "JHG")
    width = 2 * H * KEY_TILE if "H" in n else n.get("S") or 1  # attention holds tiles, others whole rows
    step = max(1, min(most, KEY_TILE // max(J, H // G), 2**22 // width))
    return [(b, slice(t, min(t + step, T))) for b in np.ndindex(*n["..."]) for t in range(0, T, step)]


def spread(work, jobs):
    """Yield work(job) of each job, in order; done by threads, unless this is one of them."""
    threads, name, under_way = min(get_num_threads(), len(jobs)), "a thread of dsa", []
    if threads <= 1 or threading.current_thread().name.startswith(name):
        yield from map(work, jobs)
        return
    with ThreadPoolExecutor(threads, name) as pool:
        for job in jobs:
            under_way.append(pool.submit(on_one_blas_thread, functools.partial(work, job)))
            if len(under_way) > 2 * threads:  # so that results which wait to be taken fill little memory
                yield under_way.pop(0).result()
        yield from (found.result() for found in under_way)


# -------------------------------- cut here: Part I, the method, works alone --------------------------------

import bisect
import collections.abc
import contextlib
import copy
import importlib.util
import itertools
import json
import os
import tempfile
import weakref
import zlib
from concurrent.futures import wait
from pathlib import Path
from types import SimpleNamespace

__all__ += [  # noqa: RUF022
    "explain", "predictive_select", "quantize_fp8", "dequantize_fp8", "pack_kv_fp8", "unpack_kv_fp8",
    "HybridKVCache", "LayerDims", "DSALayer", "sparse_attention_backward", "attention_target", "indexer_loss",
    "learned_loss", "sharded_select", "sharded_attention", "PORTABLE_KERNELS",
]  # fmt: skip

# 2, 3, 7 and 8, continued: long rows, wide tables, BLAS beside our threads, forks, checks at a GPU's pace --

# For all copies of this file in a process: the calls under way that want BLAS on one thread, and the threads
# that each BLAS had before the first of them.
BLAS_USERS, BLAS_BEFORE, BLAS_LOCK = vars(threading).setdefault("_dsa_blas", (set(), [], threading.RLock()))


@functools.cache
def blas_libraries():
    """Those in this process, by threadpoolctl; none without it."""
    if importlib.util.find_spec("threadpoolctl") is None:
        return []
    controller = importlib.import_module("threadpoolctl").ThreadpoolController()
    return controller.select(user_api="blas").lib_controllers


def threads_beside_blas():
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return cpus if blas_libraries() else 1


def hold_blas(work):
    """work(), while BLAS keeps to one thread; whatever ends it, that is undone."""
    me = object()
    try:
        try:
            share_blas(me, hold=True)
            return work()
        finally:
            share_blas(me, hold=False)
    finally:
        if me in BLAS_USERS:  # that was interrupted
            share_blas(me, hold=False)


def share_blas(me, hold):
    with BLAS_LOCK:
        if hold:
            BLAS_USERS.add(me)
            BLAS_BEFORE[:] = BLAS_BEFORE or [lib.num_threads for lib in blas_libraries()]
        last = {me} >= BLAS_USERS
        for lib, before in zip(blas_libraries(), BLAS_BEFORE):
            if hold or last or getattr(lib, "threading_layer", None) == "openmp":  # each thread's own
                release = getattr(lib, "clear_controlling_thread", lambda force: None)
                release(force=True)  # threadpoolctl from 3.8 on hears one thread, the first, unless told
                lib.set_num_threads(1 if hold else before)
                release(force=True)
        if not hold:
            BLAS_BEFORE[:] = () if last else BLAS_BEFORE
            BLAS_USERS.discard(me)


BLAS |= {"threads": threads_beside_blas, "hold": hold_blas}
if hasattr(os, "register_at_fork"):  # not while BLAS's threads change; what is under way is the parent's
    os.register_at_fork(
        before=BLAS_LOCK.acquire,
        after_in_parent=BLAS_LOCK.release,
        after_in_child=lambda: [BLAS_USERS.clear(), BLAS_LOCK.release()],
    )


def remembered(find):
    """find, which is sizes, but what it found of arrays alike is kept, by all but S, which grows; and arrays
    of another byte order become native ones.
    """
    known: dict[Any, Any] = {}

    def sizes(declared, given, optional, xp=None):
        key, S = [xp], None
        try:
            for name, axes in declared.items():
                if (x := given[name]) is not None or name not in optional:
                    shape = x.shape
                    if "S" in axes[0]:
                        at = axes[0].index("S") - len(axes[0])
                        S = shape[at] if S is None else S
                        shape = shape[:at], shape[at] - S, shape[at:][1:], S < 2**31
                    key += name, axes, type(x), x.dtype, shape
            n = known[tuple(key)].copy()
        except (AttributeError, IndexError, KeyError, TypeError):  # not seen, or an error
            n = find(declared, given, optional, xp)
            swapped = [x for x in declared if given[x] is not None and not given[x].dtype.isnative]
            given |= {x: given[x].astype(given[x].dtype.type) for x in swapped}
            if len(known) < 2**14 and not swapped:
                known[tuple(key)] = n.copy()
        if S is not None:
            n["S"] = S
        return n

    return sizes


def shared(alone):
    """key_sets, in one set where one product is cheaper than one a row."""

    def key_sets(indices, num_keys, heads):
        if (T := len(indices)) < 2:
            return alone(indices, num_keys, heads)
        rows, there = indices.astype(np.int64), np.zeros(num_keys + 1, bool)
        there[rows] = True
        there[-1] = False  # what is absent, -1
        keys, slots = np.flatnonzero(there), np.count_nonzero(rows >= 0)
        if heads * len(keys) * T <= (heads + 6) * slots:  # measured: a row alone costs 6 heads more
            seen = np.zeros((len(keys) + 1, T), bool)
            seen[np.where(rows < 0, -1, np.cumsum(there)[rows] - 1), np.arange(T)[:, None]] = True
            if np.count_nonzero(seen[:-1]) == slots:
                return [(slice(None), keys, seen[:-1])]
        return alone(indices, num_keys, heads)

    return key_sets


def of_sample(whole):
    """partition, by -k, of only what reaches a bound: every 16th number says what somewhat over k reach."""

    def partition(x, kth, axis):
        m = -kth // 16 + math.isqrt(-kth) + 4
        if 32 * m < x.shape[1]:
            reach = x >= partition(x[:, ::16], -m, axis)[:, -m, None]
            count = np.count_nonzero(reach, axis=1)
            if count.min() >= -kth:  # or else all go on
                place = np.arange(count.max()) < count[:, None]  # side by side
                reached = np.full(place.shape, -np.inf, x.dtype)
                reached[place], x = np.compress(reach.ravel(), x), reached
        return whole(x, kth, axis=axis)

    return partition


sizes, key_sets, partition = remembered(sizes), shared(key_sets), of_sample(partition)


# 9. Why a key was kept, and other ways to select ----------------------------------------------------------

INDEXER = "index_q [..., T, J, E], index_k [..., S, E], weights [..., T, J]"


def explain(index_q, index_k, weights, t, s, *, k_start=None, k_end=None):
    """What each head adds to the score of key s for query t, and the key's rank among those that t sees.

    index_q [T, J, E], index_k [S, E], weights [T, J] -> contributions [J], which add up to the score, the
    score, and the rank: a plain top_k keeps the key if top_k > rank. ValueError where t does not see s.

    >>> q, k, w = np.array([[[1.0], [-1.0]]]), np.array([[2.0], [-3.0]]), np.array([[1.0, 0.5]])
    >>> explain(q, k, w, 0, 1)
    (array([0. , 1.5]), 1.5, 1)
    """
    n = dims(index_q=(index_q, "T J E"), index_k=(index_k, "S E"), weights=(weights, "T J")) | {"...": ()}
    t, s = integer("t", t, 0), integer("s", s, 0)
    expect(t < n["T"], "t", t, f"a query below T = {n['T']}")
    start, end = (w[t : t + 1] for w in filled(n, windows_of(n, k_start, k_end)))
    expect(start <= s < end, "s", s, f"a key in the window [{start[0]}, {end[0]}) of query {t}")
    x = index_scores(index_q[t : t + 1], index_k, weights[t : t + 1], k_start=start, k_end=end)[0]  # [S]
    expect(not np.isnan(x).any(), f"a score in the window of query {(t,)}", "NaN", "a number")
    heads = index_q[t, :, None], index_k[s : s + 1], weights[t, :, None]  # each as a query of its own
    parts = index_scores(*heads, k_end=n["xp"].ones(n["J"], int))[:, 0]  # [J]
    return parts, float(x[s]), int((x > x[s]).sum() + (x[:s] == x[s]).sum())


@stage(f"{INDEXER}, candidates [..., T, C] int -> indices [..., T, K] int32")
def predictive_select(
    index_q, index_k, weights, top_k, candidates,
    *, widen=0, block=1, local_window=0, num_sink_tokens=0, k_start=None, k_end=None,
):  # fmt: skip
    """lightning_select that scores only candidates, such as the indices of the previous layer, or blocks.

    Each candidate brings `widen` neighbours on both sides; window and sink tokens are always among them.
    Of many keys it takes T*C scores instead of T*S. Equal to lightning_select where the candidates hold every
    visible key. A candidate c stands for the keys from c * block to c * block + block - 1.
    """
    forced = {"local_window": local_window, "num_sink_tokens": num_sink_tokens}
    seen = near(candidates, widen, block, len(index_k), k_start, k_end, **forced)
    scores = np.full(seen.shape, -np.inf, accumulator(index_q, index_k, weights))
    alone = [slice(t, t + 1) for t in range(len(seen))]
    for own in alone if len(index_k) > KEY_TILE else [slice(None)]:  # few more scores cost less than calls do
        keys = np.flatnonzero(seen[own].any(0))
        ends = np.full(len(seen[own]), len(keys))
        x = index_scores.block(index_q[own], index_k[keys], weights[own], k_start=0 * ends, k_end=ends)
        scores[own, keys] = np.where(seen[own, keys], x, -np.inf)
    return select_topk.block(scores, top_k, k_start=k_start, k_end=k_end, **forced)


def near(candidates, widen, block, S, start, end, local_window, num_sink_tokens):
    """Which keys each query looks at: those near candidates [T, C] and those that are always kept, [T, S]."""
    block, widen = min(integer("block", block, 1), max(1, S)), min(integer("widen", widen, 0), S)
    local_window, num_sink_tokens = min(local_window, S), min(num_sink_tokens, S)
    T, xp, start, end = len(start), library("k_start", start), start[:, None], end[:, None]
    check_keys("candidates", candidates, -(-S // block))
    s, first = xp.arange(S), candidates.astype(np.int64)[..., None]
    keys = block * first + xp.arange(-widen, block + widen)  # [T, C, block + 2 * widen]
    seen = xp.zeros((T, S + 1), bool)  # the last: of no key
    seen[xp.arange(T)[:, None, None], np.where(first < 0, -1, keys).clip(-1, S)] = True
    seen = seen[:, :-1] | (s >= end - local_window) | (s < start + num_sink_tokens)
    return seen & (s >= start) & (s < end)


@stage("q [..., T, heads, Dq], k [..., S, groups, Dk] -> indices [..., T, K] int32")
def select_by(q, k, score, *, top_k, local_window=0, num_sink_tokens=0, k_start=None, k_end=None):
    """select_topk of score(q, k, s, start, end), [T, N] or [N], of keys s [N] and windows [T, 1] alike."""
    (lo, hi), rest = span(k_start, k_end), {"local_window": local_window, "num_sink_tokens": num_sink_tokens}
    found = score(q, k[lo:hi], np.arange(hi - lo), k_start[:, None] - lo, k_end[:, None] - lo)
    scores = np.full((len(q), len(k)), -np.inf, found.dtype)
    scores[:, lo:hi] = found
    return select_topk.block(scores, top_k, k_start=k_start, k_end=k_end, **rest)


class Selection:
    """A checked call of one of SELECTORS, which are its methods. With a local_window each is a hybrid."""

    def __init__(self, given):
        self.n = sizes(DSA_AXES, given, DSA_AXES.keys() - {"q", "k"})
        check_options(self.n, given)
        self.q, self.k, *self.index = (given[x] for x in ("q", "k", "index_q", "index_k", "weights"))
        self.windows = {x: given[x] for x in ("k_start", "k_end")}
        self.rest = self.windows | {x: given[x] for x in ("top_k", "local_window", "num_sink_tokens")}

    def _drawn(self, seed, *shapes, dtype=np.float64):
        rng = np.random.default_rng(integer("seed", seed, 0))
        return [self.n["xp"].asarray(rng.standard_normal(shape, dtype)) for shape in shapes]

    def lightning(self):
        """Equations (1) and (2), as lightning_select."""
        return lightning_select(*self.index, **self.rest)

    def hierarchical(self, *, block=64, oversample=4):
        """Equation (1) on mean-pooled blocks of keys, then on the oversample * top_k keys of the best blocks,
        and of the first and the last visible one, which may be visible only in part.
        """
        (index_q, x, weights), n, oversample = self.index, self.n, integer("oversample", oversample, 1)
        dims(index_q=(index_q, "... T J E"), index_k=(x, "... S E"), weights=(weights, "... T J"))
        block = min(integer("block", block, 1), max(1, n["S"]))
        pooled = x[..., : n["S"] // block * block, :].reshape(*n["..."], n["S"] // block, block, n["E"])
        pooled = pooled.sum(-2, dtype=accumulator(x)) / block  # [..., S // block, E]
        start, end = filled(n, self.windows.values())
        last, most = (end - 1) // block, -(-oversample * self.rest["top_k"] // block)
        first = np.minimum(start // block, last)
        best = lightning_select(index_q, pooled, weights, most, k_start=first + 1, k_end=last)
        blocks = np.concatenate([first[..., None], best, last[..., None]], -1)
        return predictive_select(*self.index, candidates=blocks, block=block, **self.rest)

    def approximate(self, *, dim=64, seed=0, projection=None):
        """The sum of all heads' logits, in a random (or the given [D, R]) projection to `dim` dimensions."""
        if projection is None:
            (projection,) = self._drawn(seed, (self.n["D"], integer("dim", dim, 1)))
        n = dims(k=(self.k, "... S G D"), projection=(projection, "D R"))
        grouped = (x.reshape(*x.shape[:-1], n["G"], n["D"]) for x in features(self.q, self.k))
        both = ((x @ projection.astype(x.dtype)).reshape(*x.shape[:-2], n["G"] * n["R"]) for x in grouped)
        return lightning_select(*logits(*both), **self.rest)

    def lsh(self, *, bits=64, oversample=4, seed=0):
        """Random hyperplanes: the oversample * top_k keys nearest by Hamming distance, then by logits."""
        many, both = integer("oversample", oversample, 1) * self.rest["top_k"], features(self.q, self.k)
        (planes,) = self._drawn(seed, (both[0].shape[-1], integer("bits", bits, 1)), dtype=np.float32)
        sides = (by_rows(x, planes.T.astype(x.dtype, "C")) for x in both)
        signs = (np.where(x == 0, 1, np.sign(x)) for x in sides)  # whose product falls with the distance
        nearest = lightning_select(*logits(*signs), many, **self.windows)
        return predictive_select(*logits(*both), candidates=nearest, **self.rest)

    def learned(self, *, mlp=None, seed=0):
        """An MLP on [q; k], each summed over heads: w_out . relu(w_q q + w_k k + b).

        mlp = (w_q [F, G*D], w_k [F, G*D], b [F], w_out [F]); None is an untrained, random one of 16 units.
        """
        q, k = features(self.q, self.k)
        mlp = self._drawn(seed, *[(16, k.shape[-1])] * 2, 16, 16) if mlp is None else mlp
        return lightning_select(*as_indexer(q, k, mlp), **self.rest)

    def window(self):
        """The last top_k keys."""
        return select_by(self.q, self.k, lambda q, k, s, *window: 1.0 * s, **self.rest)

    def global_(self):  # `global` is a word of Python's own
        """The first top_k keys, as global tokens that every query sees."""
        return select_by(self.q, self.k, lambda q, k, s, *window: 1.0 * -s, **self.rest)

    def strided(self):
        """Every stride-th key, back from the last, with the smallest stride that needs at most top_k keys."""

        def place(q, k, s, start, end):
            stride = np.maximum(1, -((start - end) // max(1, self.n["K"])))
            return 1.0 * -((end - 1 - s) % stride)

        return select_by(self.q, self.k, place, **self.rest)

    def random(self, *, seed=0):
        """Any top_k keys, by a hash (splitmix64) of the seed and of both places in the sequence."""
        seed, n = np.random.default_rng(integer("seed", seed, 0)).integers(2**63, dtype=np.uint64), self.n

        def order(place, k, s, start, end):
            x = ((end - start << 32) + s - start).astype(np.uint64)  # [T, N]
            x += place[:, 0].astype(np.int64).astype(np.uint64) * np.uint64(0xD1342543DE82EF95)
            x = (x + seed) * np.uint64(0x9E3779B97F4A7C15)
            for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
                x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
            return (x >> np.uint64(11)).astype(np.float64)

        # A causal window ends at its query, however the sequence is cut, or all end as far before it. Else
        # that place goes into the hash, as queries that see the same keys are to choose differently.
        start, end = filled(n, self.windows.values())
        place = n["xp"].arange(n["S"] - n["T"] + 1, n["S"] + 1) - end  # [..., T]
        least = np.sort(np.where(start < end, place, n["S"] + n["T"]))[..., :1]
        causal = ((start >= end) | (place == least)).all(-1, keepdims=True)
        return select_by(np.where(causal, 0.0, place)[..., None, None], self.k, order, **self.rest)

    def oracle(self, *, scale=None):
        """The keys of largest attention mass, to rounding, over all heads: the most that a set can hold."""
        check_options(self.n, given := {"scale": scale})
        return select_by(self.q, self.k, functools.partial(mass, **given), **self.rest)


def selector(choose):
    """One of SELECTORS, out of a method of Selection."""

    def select(
        q, k, top_k, *, index_q=None, index_k=None, weights=None,
        local_window=0, num_sink_tokens=0, k_start=None, k_end=None, **options,
    ):  # fmt: skip
        given = {"v": None, "sink": None, **locals()}
        return on_one_blas_thread(lambda: choose(Selection(given), **options))

    select.options = known = choose.__kwdefaults__ or {}  # type: ignore[attr-defined]
    select.__doc__ = f"{choose.__doc__}\n\n    Options: {known or 'none'}."
    return select


SELECTORS |= {name.strip("_"): selector(x) for name, x in vars(Selection).items() if name[0] != "_"}


def features(q, k):
    """q summed over the heads of a group, and k, as [..., G * D]: their product is the sum of all logits."""
    (*batch, S, G, D), T = k.shape, q.shape[-3]
    q = q.reshape(*batch, T, G, q.shape[-2] // G, D).sum(-2, dtype=accumulator(q, k))
    return q.reshape(*batch, T, G * D), k.astype(q.dtype).reshape(*batch, S, G * D)


def logits(q, k):
    """index_q, index_k and weights by which (1) is q [..., T, F] . k [..., S, F]: x = relu(x) - relu(-x)."""
    signs = library("q", q).asarray([1, -1], q.dtype)
    return np.stack([q, -q], -2), k, np.broadcast_to(signs, (*q.shape[:-1], 2))


def as_indexer(q, k, mlp):
    """index_q, index_k and weights by which (1) is w_out . relu(w_q q + w_k k + b), of features q and k."""
    expect(isinstance(mlp, (tuple, list)) and len(mlp) == 4, "mlp", mlp, "(w_q, w_k, b, w_out)", TypeError)
    w_q, w_k, b, w_out = mlp
    n = dims(q=(q, "... T GD"), w_q=(w_q, "F GD"), w_k=(w_k, "F GD"), b=(b, "F"), w_out=(w_out, "F"))
    w_q, w_k, b, w_out = (x.astype(q.dtype, order="C") for x in mlp)
    hidden_q = by_rows(q, w_q) + b  # [..., T, F]
    unit = np.broadcast_to(n["xp"].eye(n["F"], dtype=q.dtype), (*hidden_q.shape, n["F"]))
    index_q = np.concatenate([unit, hidden_q[..., None]], -1)  # [..., T, F, F + 1]: unit f, then hidden f
    index_k = np.pad(by_rows(k, w_k), [(0, 0)] * (k.ndim - 1) + [(0, 1)], constant_values=1)  # [..., F + 1]
    return index_q, index_k, np.broadcast_to(w_out, hidden_q.shape)


def mass(q, k, s, start, end, scale):
    """The attention probabilities of the keys s [N] in the windows [T, 1], summed over heads -> [T, N]."""
    (T, H, D), (N, G, _), dtype = q.shape, k.shape, accumulator(q, k)
    q = np.multiply(q, scale, dtype=dtype).reshape(T, G, H // G, D).swapaxes(0, 1).reshape(G, T * (H // G), D)
    x = (q @ k.astype(dtype).transpose(1, 2, 0)).reshape(G, T, H // G, N)
    return softmax(np.where(((s >= start) & (s < end))[:, None], x, -np.inf))[0].sum((0, 2))


def softmax(x):
    """Over the last axis, of which -inf has no part -> probabilities, 0 where no part is left, and lse."""
    limits = np.finfo(x.dtype)
    top = np.maximum(x.max(-1, keepdims=True), limits.min) if x.shape[-1] else x.sum(-1, keepdims=True)
    p = np.exp(x - top)
    total = np.maximum(p.sum(-1, keepdims=True), limits.tiny)
    return p / total, top + np.log(total)


# 10. fp8: e4m3 codes with a scale for each block ----------------------------------------------------------

FP8_BLOCK = 128  # values that share a scale

# The value of each code: a sign, 4 bits of exponent with bias 7, 3 of mantissa; no infinity, two NaN.
E4M3 = np.array([math.ldexp(i % 8 + 8 * (i > 7), max(i // 8, 1) - 10) for i in range(127)] + [math.nan])
E4M3 = np.concatenate([E4M3, -E4M3]).astype(np.float32)


def by_library(function):
    """A function whose first argument is an array: another library's KERNELS run it by its name."""

    @functools.wraps(function)
    def run(x, *args, **kwargs):
        return KERNELS.get((function.__name__, library("x", x).__name__), function)(x, *args, **kwargs)

    return run


def quantize_fp8(x, *, block=FP8_BLOCK, scale="ue8m0"):
    """x [..., N] -> e4m3 codes, uint8 [..., N], and a scale for each block, float32 [..., ceil(N / block)].

    amax is a block's largest magnitude, at least 1e-4. scale "float": amax / 448, of e4m3's largest number;
    "ue8m0": that rounded up to a power of two. Codes of x / scale, at most 448, are rounded half to even.
    NaN stays NaN.

    >>> quantize_fp8(np.array([448.0, -1.0, 1.0625, 1.1875, 0.0]))           # 1.0625 and 1.1875 are ties
    (array([126, 184,  56,  58,   0], dtype=uint8), array([1.], dtype=float32))
    """
    n = dims(x=(x, "... N"))
    expect(scale in ("ue8m0", "float"), "scale", repr(scale), "'ue8m0' or 'float'")
    return quantized(x, min(integer("block", block, 1), max(FP8_BLOCK, n["N"])), scale, 1e-4)


@by_library
@np.errstate(all="ignore")
def quantized(x, block, scale, least):
    """quantize_fp8, unchecked, of which amax is at least `least`."""
    x = x.astype(accumulator(x), copy=False)
    amax = np.fmax.reduceat(np.abs(x), np.arange(0, x.shape[-1], block), axis=-1).astype(np.float32)
    scales = np.clip(amax, np.float32(least), np.finfo(np.float32).max) / np.float32(448)
    if scale == "ue8m0":  # on the bits: the exponent, one more if the mantissa is not 0
        scales = ((scales.view(np.uint32) + 0x7FFFFF) & 0xFF800000).view(np.float32)
    x = x / np.repeat(scales, block, axis=-1)[..., : x.shape[-1]]
    size = np.clip(np.abs(x), 2.0**-11, 448)  # 0 itself has no exponent
    digits = np.minimum(4 - np.frexp(size)[1], 9)  # after the binary point; 9 for subnormals
    codes = np.rint(np.ldexp(size, digits)) + 8 * (9 - digits)  # a mantissa of 16 steps up the exponent
    return np.where(np.isnan(x), 127, codes).astype(np.uint8) | np.signbit(x).astype(np.uint8) << 7, scales


@np.errstate(over="ignore")  # of what was near float32's largest number
def dequantize_fp8(codes, scales, *, block=FP8_BLOCK):
    """What quantize_fp8 made: codes uint8 [..., N], scales [..., N / block] -> float32 [..., N].

    >>> dequantize_fp8(np.array([126, 184], np.uint8), np.array([0.5], np.float32)).tolist()
    [224.0, -0.5]
    """
    n = dims(codes=(codes, "... N", "uint8"), scales=(scales, "... M"))
    block = min(integer("block", block, 1), max(FP8_BLOCK, n["N"]))
    expect(n["M"] == -(-n["N"] // block), "scales", f"of shape {scales.shape}", f"one for {block} codes each")
    return n["xp"].asarray(E4M3)[codes] * np.repeat(scales.astype(np.float32), block, -1)[..., : n["N"]]


@by_library
def rounded_to_fp8(x):
    """index_q or index_k in fp8: as scales are powers of two, (1) has the bits of scaled sums of codes."""
    return dequantize_fp8(*quantize_fp8(x))


def pack_kv_fp8(kv):
    """V3.2's cache entry of a token, latent and k_pe: kv [..., 576] -> uint8 [..., 656], as FlashMLA has it.

    512 e4m3 codes | 4 float32 scales, powers of two of at least 1e-4 | 64 bfloat16.
    """
    n = dims(kv=(kv, "... D"))
    expect(n["D"] == 576, "D", f"{n['D']} in kv", "576")
    return packed(kv, 64)


def unpack_kv_fp8(packed):
    """What pack_kv_fp8 made: packed uint8 [..., 656] -> float32 [..., 576]."""
    dims(packed=(packed, "... N", "uint8"))
    expect(packed.shape[-1] == 656, "packed", f"of shape {packed.shape}", "[..., 656]")
    return unpacked(packed, 576, 64)


def packed_bytes(width, rope):
    return width - rope + 4 * -(-(width - rope) // FP8_BLOCK) + 2 * rope


@by_library
def packed(x, rope, out=None):
    """x [..., D], the last `rope` in bfloat16, the others in e4m3 -> uint8 [..., packed_bytes], or to out."""
    # With rope a scale is max(amax / 448, 1e-4) rounded up; without, for index keys, that of quantize_fp8.
    codes, scales = quantized(x[..., : x.shape[-1] - rope], FP8_BLOCK, "ue8m0", 448e-4 if rope else 1e-4)
    tail = x[..., x.shape[-1] - rope :].astype(np.float32, order="C")
    bits = tail.view(np.uint32)
    bits = np.where(np.isnan(tail), 0x7FC0, (bits + (bits >> 16 & 1) + 0x7FFF) >> 16).astype("<u2")
    return np.concatenate([codes, scales.astype("<f4").view(np.uint8), bits.view(np.uint8)], -1, out=out)


def unpacked(entries, width, rope):
    """What packed made -> float32 [..., width]."""
    codes, scales, bits = np.split(entries, [width - rope, entries.shape[-1] - 2 * rope], axis=-1)
    codes = dequantize_fp8(codes, scales.copy().view("<f4"))
    return np.concatenate([codes, widened(bits.copy().view("<u2"))], -1)


def widened(bits):
    """bfloat16, given as its bits, to float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


class Entries:
    """Storage "fp8": a token as `packed`, of "k" the last qk_rope_head_dim values in bfloat16."""

    def __init__(self, cache):
        self.dtype, self.shapes, self.widths = np.dtype(np.uint8), {}, {}
        for name, shape in cache.streams.items():
            self.widths[name] = width, rope = shape[-1], cache.qk_rope_head_dim if name == "k" else 0
            expect(width > rope, name, f"of shape {shape}", f"a last axis above {rope} for fp8")
            self.shapes[name] = *shape[:-1], packed_bytes(width, rope)

    def check_range(self, name, x):
        largest = float(np.fmax.reduce(np.abs(x), axis=None, initial=0))
        expect(largest < 248 * 2.0**120, name, largest, "what fp8 with a scale can hold")

    def encode(self, name, x, out):
        packed(x, self.widths[name][1], out)

    def decode(self, name, x):
        return unpacked(x, *self.widths[name])

    def attend(self, cache, q, indices, **kwargs):
        parts = []
        for b, (used, own) in enumerate(map(among_used, indices)):  # no other key is decoded
            k, v = (self.decode(x, cache.stored(x)[b, used]) if x in self.widths else None for x in "kv")
            parts.append(sparse_attention(q[b], k, v, own, **kwargs))
        return tuple(map(np.stack, zip(*parts)))


def among_used(indices):
    """The keys that indices name, ascending, and at which of these each slot is, or -1."""
    used = np.unique(indices[indices >= 0]).astype(np.int64)
    return used, np.where(indices < 0, -1, np.searchsorted(used, indices)).astype(np.int32)


def on_host(x):
    """x as a NumPy array, wherever it lives."""
    return x.get() if hasattr(x, "get") else x


def sizes_of_codes(arrays, given, optional):
    """sizes, for (1) also of index_q in codes, whose scales are in the weights, and index_k as in Entries."""
    if getattr(given["index_q"], "dtype", None) != np.uint8:
        return sizes(arrays, given, optional)
    n = sizes(arrays | CODED, given, optional)
    wide = n.pop("bytes")
    expect(wide == n["E"] + 4, "index_k", f"of {wide} bytes a key", f"E + 4 = {n['E'] + 4}")
    if n["xp"] is np:
        expect(n["E"] <= FP8_BLOCK, "E", f"{n['E']} in index_q", f"at most {FP8_BLOCK} in 8 bits")
        given |= {"index_q": E4M3[given["index_q"]], "index_k": unpacked(given["index_k"], n["E"], 0)}
    return n


CODED = axes_of("index_q [..., T, J, E] uint8, index_k [..., S, bytes] uint8")
CHECKS |= dict.fromkeys(("index_scores", "lightning_select", "predictive_select"), sizes_of_codes)
PRECISIONS["fp16"] = lambda x: np.clip(x.astype(accumulator(x)), -65504, 65504).astype(np.float16)
PRECISIONS["fp8"], STORAGES["fp8"] = rounded_to_fp8, Entries


# 11. Caches that last, and a cache in two tiers -----------------------------------------------------------

SAVED = "capacity", "batch", "storage", "grow", "qk_rope_head_dim"  # of a cache, beside its streams


class Session(KVCache):
    """Methods of KVCache: a session outlasts its process, copies are independent, codes are attended to."""

    def save(self, path):
        """Write the tokens to a file (NumPy's npz, no pickle), from which KVCache.load goes on.

        What stood there before is replaced at the end, so that nothing is lost if anything ends it early.
        """
        meta = json.dumps({x: getattr(self, x) for x in (*SAVED, "streams")} | {"order": sys.byteorder})
        data = {f"stream_{name}": on_host(self.stored(name)) for name in self.streams}
        path = os.path.realpath(os.fsdecode(path))
        part = Path(f"{path}.{os.getpid()}.{threading.get_ident()}.npz")
        try:
            np.savez(part, meta=meta, lengths=self.lengths, **data)
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)

    @staticmethod
    def load(path, *, xp=np):
        """The KVCache that save wrote, also of a cache in two tiers. ValueError where the file is none."""
        try:
            with np.load(path) as data:
                meta = json.loads(data["meta"].item())
                expect((order := meta.pop("order")) == sys.byteorder, "the byte order", order, sys.byteorder)
                streams = {name: tuple(shape) for name, shape in meta.pop("streams").items()}
                cache = KVCache(xp=xp, **{x: meta[x] for x in SAVED} | meta, **streams)
                lengths = check_lengths(data["lengths"], cache.batch, cache.capacity)
                for name, x in cache._data.items():
                    kept, rows = data[f"stream_{name}"], x[:, : lengths.max()]
                    found, own = ((y.dtype.isnative, y.dtype.str[1:], y.shape) for y in (kept, rows))
                    expect(found == own, f"{name} (native order, dtype, shape)", found, own)
                    rows[...] = xp.asarray(kept.view(cache.dtype))
                cache._set_lengths(lengths)
                return cache
        except Exception as error:  # a zip that is cut or changed has many kinds
            if isinstance(error, (MemoryError, ImportError)) or getattr(error, "filename", None):
                raise
            raise ValueError(f"path is {os.fspath(path)!r}, expected what a cache saved: {error}") from error

    def reorder(self, batch):
        """Keep the sequences batch [B'], integers, in that order, any of them more than once: a beam."""
        batch = check_lengths(batch, most=self.batch - 1, name="batch")
        expect(len(batch), "batch", "empty", "at least one sequence")
        data = {name: x[self.xp.asarray(batch)] for name, x in self._data.items()}
        self.__dict__.update(batch=len(batch), _lengths=self.lengths[batch], _data=data)

    def _attend(self, q, indices, kwargs):
        kernel = KERNELS.get(("attend_to_cache", self.xp.__name__), self._codec and self._codec.attend)
        return kernel(self, q, indices, **kwargs) if kernel else attend_as_read(self, q, indices, kwargs)

    __copy__ = copy.deepcopy

    def __getstate__(self):
        return {**self.__dict__, "xp": self.xp.__name__}  # a module can be neither copied nor pickled

    def __setstate__(self, state):
        self.__dict__.update(state, xp=importlib.import_module(state["xp"]))


attend_as_read = KVCache._attend
for method in ("save", "load", "reorder", "_attend", "__copy__", "__getstate__", "__setstate__"):
    setattr(KVCache, method, vars(Session)[method])


class HybridKVCache(Session):
    """A KVCache in two tiers, with the same results to the bit, whatever is evicted.

    The slow tier, a memory-mapped file, holds every token of the streams that attention reads; the fast tier,
    of at most fast_bytes of memory, copies of each sequence's last local_window tokens and, of the others,
    those selected most recently (LRU). Streams named index_*, which the indexer reads whole at every step,
    stay in memory besides. path: where close saves the session, which the same call then loads to go on; the
    slow tier is an unnamed file in that folder, by default the temporary one. Neither copied nor reordered.
    hits and misses count tokens, bytes_moved is what misses read. attend holds the tokens that it reads, of
    all sequences, two or three times. Of threads that attend at once, one has the fast tier, the others miss.
    A forked process can read the cache, but not append to it. On a GPU the slow tier is pinned memory of the
    host, and misses are read by the GPU over the bus. OSError, with the cache as it was: the path cannot be
    written, or the disk is full.
    """

    # What attention reads of a token, its record, is row token * batch + b of _slow [rows, W]. At every line,
    # the fast tier has a row if _owner[s] is it for s = _slot_of[row], and then _fast[s] is the same record,
    # and of a token there is. So whatever interrupts, the worst is a miss.

    def __init__(self, capacity, *, fast_bytes, local_window=0, path=None, **kwargs):
        self.fast_bytes = integer("fast_bytes", fast_bytes, 1)
        self.local_window = integer("local_window", local_window, 0)
        self.path = None if path is None else os.path.realpath(os.fsdecode(path))
        self.hits = self.misses = self.bytes_moved = self._clock = 0
        self._lock, self._process = threading.Lock(), os.getpid()
        super().__init__(capacity, **kwargs)
        if self.path and os.path.exists(self.path):
            before = Session.load(self.path, xp=self.xp)
            self.append(lengths=before.lengths, **{name: before.read(name) for name in before.streams})

    @property
    def nbytes(self):
        """Bytes of memory held, without the slow tier."""
        more = self._fast, self._stamp, self._owner, self._slot_of
        return super().nbytes - self._slow.nbytes + sum(x.nbytes for x in more)

    def append(self, **kwargs):
        expect(os.getpid() == self._process, "the cache", "that of a process that forked", "one made here")
        super().append(**kwargs)

    def stored(self, name):
        x = super().stored(name)
        return np.broadcast_to(x, x.shape)  # not to be written to, as by a forked child into the file

    def reorder(self, batch=None):
        raise TypeError("a HybridKVCache is not reordered, copied or pickled: save it, and use KVCache.load")

    __getstate__ = reorder

    def _allocate(self, capacity):
        index = [name for name in self._stored if name.startswith("index_")]
        if not self._data:
            self._kept = {name: shape for name, shape in self._stored.items() if name not in index}
            expect("k" in self._kept, "streams", sorted(self.streams), "k among them")
            width = sum(map(math.prod, self._kept.values()))
            record, least = width * self.dtype.itemsize, max(1, self.batch * self.local_window)
            slots, expected = self.fast_bytes // record, f"at least {least * record}, for the local windows"
            expect(slots >= least, "fast_bytes", self.fast_bytes, expected)
            self._fast: Any = self.xp.zeros((slots, width), self.dtype)
            self._slow, self._slot_of = self._fast[:0], np.zeros(0, np.int64)  # where a row was last
            self._owner, self._stamp = np.full(slots, -1), np.arange(-slots, 0)  # which row, last used when
        rows, slow_tier = capacity * self.batch, KERNELS.get(("slow_tier", self.xp.__name__), mapped)
        slow = slow_tier(self, (rows, self._fast.shape[1]), self._slow)
        slot_of = np.pad(self._slot_of, (0, rows - len(self._slot_of)))
        data = self._split(slow.reshape(capacity, self.batch, -1).swapaxes(0, 1))
        data |= {name: self._longer(name, capacity) for name in index}
        self._slow, self._slot_of, self._data, self.capacity = slow, slot_of, data, capacity

    def _split(self, records):
        """The streams in records [..., W], views [..., *shape]."""
        ends = [*itertools.accumulate(map(math.prod, self._kept.values()))]
        columns = zip(self._kept.items(), np.split(records, ends[:-1], axis=-1))
        return {name: x.reshape(*x.shape[:-1], *shape) for (name, shape), x in columns}

    def _set_lengths(self, lengths):
        if (lengths < self._lengths).any():  # then the fast tier forgets them, too
            slots = np.flatnonzero(self._owner >= lengths.min() * self.batch)
            tokens, b = np.divmod(self._owner[slots], self.batch)
            slots = slots[tokens >= lengths[b]]
            self._owner[slots] = self._stamp[slots] = -1
        self._lengths = lengths

    def _attend(self, q, indices, kwargs):
        """As a KVCache of the used tokens of all alone: by the same kernels, so to the same bits."""
        tokens, B, b = on_host(indices).astype(np.int64), self.batch, np.arange(self.batch)[:, None]
        there = (tokens >= 0) & (tokens < self._lengths[:, None, None])  # which on a GPU nobody has checked
        rows, own = among_used(np.where(there, tokens * B + b[..., None], -1))
        if self._lock.locked():  # another thread has the fast tier, perhaps one that a fork left behind
            records, hits, misses = self._slow[self.xp.asarray(rows)], 0, len(rows)  # [N, W]
        else:
            with self._lock:
                last = self._lengths[:, None] - np.arange(self.local_window, 0, -1)  # [B, local_window]
                self._clock += 1
                self._fetch((last * B + b)[last >= 0])
                records, hits, misses = self._fetch(rows)
        self.hits, self.misses = self.hits + hits, self.misses + misses
        self.bytes_moved += misses * self._fast[0].nbytes
        near, streams = KVCache.__new__(KVCache), self._split(records).items()
        data = {x: np.broadcast_to(self.xp.ascontiguousarray(y), (B, *y.shape)) for x, y in streams}
        near.__dict__.update(self.__dict__, _data=data, _lengths=np.array([len(rows)]))
        return near._attend(q, self.xp.asarray(own), kwargs)

    def _fetch(self, rows):
        """The records [N, W] of rows [N], hits, and misses, which go to the slots unused for longest."""
        slots, at = self._slot_of[rows], self.xp.asarray
        hit = self._owner[slots] == rows
        self._stamp[slots[hit]] = self._clock
        records, there = self._fast[at(slots)], np.flatnonzero(~hit)
        if most := min(len(there), len(self._stamp)):
            records[at(there)] = missed = self._slow[at(rows[there])]
            free = np.argpartition(self._stamp, most - 1)[:most]
            free = free[self._stamp[free] < self._clock]  # what was asked for just now stays
            late = len(there) - len(free)  # of too many the last are kept
            self._owner[free], new = -1, rows[there[late:]]
            self._fast[at(free)], self._slot_of[new] = missed[late:], free
            self._owner[free], self._stamp[free] = new, self._clock
        return records, len(rows) - len(there), len(there)

    def close(self):
        if self.path and not self.closed and os.getpid() == self._process:
            self.save(self.path)
        super().close()  # views that were read keep the mapping, and only they
        self._slow = self._fast = self._stamp = self._owner = self._slot_of = np.zeros(0, np.int64)


def mapped(cache, shape, before):
    """The slow tier in an unnamed file, mapped to memory, which begins with what it held before."""
    nbytes, folder = math.prod(shape) * cache.dtype.itemsize, cache.path and os.path.dirname(cache.path)
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            # Take room for all of it, so that a full disk is an error here, not a crash at a later write.
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, nbytes)
            for at in range(file.seek(0, os.SEEK_END), nbytes, 2**20):
                file.write(bytes(min(nbytes - at, 2**20)))
            slow = np.asarray(np.memmap(file, cache.dtype, "r+", shape=shape))
    except OSError as e:
        raise OSError(e.errno, f"the slow tier cannot hold {nbytes} bytes: {e.strerror}", cache.path) from e
    slow[: len(before)] = before
    return slow


# 12. One DeepSeek-V3.2 layer ------------------------------------------------------------------------------

WEIGHTS = {  # the name in the checkpoint: in DeepSeek's code, and in a layer
    "q_a_proj": "wq_a", "q_a_layernorm": "q_norm", "q_b_proj": "wq_b", "kv_a_proj_with_mqa": "wkv_a",
    "kv_a_layernorm": "kv_norm", "kv_b_proj": "wkv_b", "o_proj": "wo",
}  # fmt: skip
OF_X = ("wq_a", "wkv_a", "indexer.wk", "indexer.weights_proj")  # the weights that multiply a layer's input
NORMS = ("q_norm", "kv_norm", "indexer.k_norm", "indexer.k_norm.bias")  # those of what they make
IN_CONFIG = {  # the name in config.json of those dims that have another one there
    "n_heads": "num_attention_heads", "norm_eps": "rms_norm_eps",
    "index_rope_interleaved": "indexer_rope_interleave", "rope_factor": "factor", "mscale": "mscale_all_dim",
    "original_seq_len": "original_max_position_embeddings", "rope_attention_factor": "attention_factor",
}  # fmt: skip
LAYER_AXES = axes_of("x [B, T, dim], indices [B, T, K] int")
LEAST = {"mscale": -1e99, "rope_factor": 1, "rope_theta": 1 + 1e-9}  # of other dims: above 0


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
    norm_eps: float = 1e-6  # of the latents' RMSNorm
    index_norm_eps: float = 1e-6  # of the index key's LayerNorm
    rope_theta: float = 10000.0
    rope_factor: float = 40.0  # by how much YaRN extended original_seq_len; 1: no YaRN
    original_seq_len: int = 4096
    beta_fast: float = 32.0  # pairs that turn more often than this in original_seq_len keep their frequency
    beta_slow: float = 1.0  # those that turn less often are slowed by rope_factor
    mscale: float = 1.0  # of YaRN's factor in the softmax scale; 0: no factor
    rope_attention_factor: float = 1.0  # on cos and sin
    index_rope_interleaved: bool = False  # True: the indexer of the GLM-5 family
    hadamard: bool = False  # spread outliers of the indexer's vectors, for fp8; no exact score changes
    indexer_precision: str = "fp32"  # as in DSAConfig

    def __post_init__(self):
        for name, value in vars(self).items():
            kind = type(getattr(LayerDims, name))  # its default's
            if kind in (int, float):
                real(name, integer(name, value, 1) if kind is int else value, LEAST.get(name, 1e-99))
            else:
                allowed = (False, True) if kind is bool else tuple(PRECISIONS)
                expect(type(value) is kind and value in allowed, name, repr(value), f"one of {allowed}")
            object.__setattr__(self, name, kind(value))  # a scalar of NumPy's would widen what it multiplies
        rope, E, slow = self.qk_rope_head_dim, self.index_head_dim, self.beta_slow
        expect(rope % 2 == 0 and rope <= E, "qk_rope_head_dim", rope, f"even, at most index_head_dim = {E}")
        expect(not self.hadamard or E & (E - 1) == 0, "index_head_dim", E, "a power of 2, for hadamard")
        expect(self.beta_fast >= slow, "beta_fast", self.beta_fast, f"at least beta_slow = {slow}")

    @classmethod
    def from_config(cls, config, **dims):
        """The dims in a checkpoint's config.json: its path, its folder's, or what it holds, a dict.

        dims: these win, also in what follows from them. ValueError for RoPE, or a layout, that is not known.
        """
        config, original = read_json(config), IN_CONFIG["original_seq_len"]
        foreign = sorted(IN_CONFIG.keys() & config.keys())  # DeepSeek's code has its own names
        expect(not foreign, "config.json", f"with {foreign}", f"{[IN_CONFIG[name] for name in foreign]}")
        rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
        check_type("RoPE in config.json", rope, dict)
        kind = rope.get("rope_type", rope.get("type", None if "factor" in rope else "default"))
        known = kind in ("default", "yarn") and not any(isinstance(x, dict) for x in rope.values())
        expect(known, "RoPE in config.json", rope, "default or YaRN's, of one kind in all layers")
        said = {"mscale_all_dim": 0.0} | config | {name: x for name, x in rope.items() if x is not None}
        for name in ("rope_interleave", "partial_rotary_factor", "truncate"):
            expect(said.get(name, 1) == 1, f"{name} in config.json", said.get(name), "true, or 1")
        said[original] = config.get(original, said.get(original, config.get("max_position_embeddings")))
        if not (yarn := kind == "yarn" and dims.get("rope_factor") != 1):
            said |= {"factor": 1.0, **dict.fromkeys((original, "mscale_all_dim", "attention_factor"))}
        names = {name: IN_CONFIG.get(name, name) for name in LayerDims.__annotations__}
        found = {name: said[own] for name, own in names.items() if said.get(own) is not None} | dims
        if yarn:
            length, m, all_dim = found.get("original_seq_len"), said.get("mscale"), said["mscale_all_dim"]
            length, longest = real(original, length, 1), said.get("max_position_embeddings")
            if "rope_factor" not in found:
                found["rope_factor"] = real("max_position_embeddings", longest) / length
            log = math.log(real("factor", found["rope_factor"], 1))
            top, bottom = (real("mscale", m), real("mscale_all_dim", all_dim)) if m and all_dim else (1, 0)
            found.setdefault("rope_attention_factor", (0.1 * top * log + 1) / (0.1 * bottom * log + 1))
        if "index_rope_interleaved" not in found:  # transformers drops it on saving
            model = str(config.get("model_type", "deepseek"))
            expect(model.startswith(("glm", "deepseek")), "model_type", repr(model), "GLM's or DeepSeek's")
            found["index_rope_interleaved"] = model.startswith("glm")
        return cls(**found)

    def shapes(self, dim=7168, q_lora_rank=1536, kv_lora_rank=512):
        """The shape of each weight, by its name in a layer.

        >>> LayerDims().shapes()["wkv_b"]
        (32768, 512)
        """
        (H, nope, rope, v, J, E, *_), Q, R = vars(self).values(), q_lora_rank, kv_lora_rank
        return {
            "wq_a": (Q, dim), "q_norm": (Q,), "wq_b": (H * (nope + rope), Q), "wkv_a": (R + rope, dim),
            "kv_norm": (R,), "wkv_b": (H * (nope + v), R), "wo": (dim, H * v), "indexer.wq_b": (J * E, Q),
            "indexer.wk": (E, dim), "indexer.k_norm": (E,), "indexer.k_norm.bias": (E,),
            "indexer.weights_proj": (J, dim),
        }  # fmt: skip

    def frequencies(self):
        """By how much each pair of RoPE turns from one position to the next, [qk_rope_head_dim / 2]."""
        d, i, theta = self.qk_rope_head_dim, np.arange(self.qk_rope_head_dim // 2), self.rope_theta
        beta = np.array([self.beta_fast, self.beta_slow])  # which pairs turn so often in the original length?
        lo, hi = d * np.log(self.original_seq_len / (2 * math.pi * beta)) / (2 * math.log(theta))
        lo, hi = np.clip((np.floor(lo), np.ceil(hi)), 0, d - 1)
        slowed = np.clip((i - lo) / max(hi - lo, 0.001), 0, 1)
        f = theta ** (-2 * i / d)
        return f / self.rope_factor * slowed + f * (1 - slowed)


class DSALayer:
    """DeepSeek-V3.2's attention layer: MLA over the keys that the lightning indexer selects.

    weights: arrays [out, in] under the names of the checkpoint or of DeepSeek's code, see WEIGHTS, also
    with model.layers.N.self_attn. before them; dims: the fields of LayerDims, whose shapes() are expected.
    ValueError for a weight that is missing, superfluous or of a wrong shape. A layer without indexer.*
    weights takes its selection from another layer: layer(x, indices=indices).
    On a GPU matrices in bfloat16 stay so; what they multiply is rounded to it, and sums are float32. Those
    that multiply x are copied, to lie one behind another.
    config: a DSAConfig, which selects in place of index_topk, always by the layer's own indexer; layer and
    n_layers are for its progressive_sparsity.

    Attributes, which no call changes: weights, dims, config, dim, kv_lora_rank, has_indexer, and streams,
    what a token leaves in a cache.
    """

    def __init__(self, weights, *, config=None, layer=0, n_layers=1, **dims):
        d = LayerDims(**dims)
        self.config = config = DSAConfig(top_k=d.index_topk) if config is None else config
        check_type("config", config, DSAConfig)
        expect(config.selector() == "lightning", "config", config, "one that selects by lightning")
        given, own = d.indexer_precision, config.indexer_precision
        expect("fp32" in (given, own) or given == own, "indexer_precision", given, f"{own}, as in config")
        self.dims = d = d if own == "fp32" else LayerDims(**vars(d) | {"indexer_precision": own})
        self.weights = w = named_weights(weights, d)
        self.dim, self.kv_lora_rank, self.has_indexer = len(w["wo"]), len(w["kv_norm"]), "indexer.wk" in w
        index_k = {"index_k": (d.index_head_dim,)} if self.has_indexer else {}
        self.streams = {"k": (1, self.kv_lora_rank + d.qk_rope_head_dim), **index_k}
        self._place = (layer, n_layers) if config.progressive_sparsity else (0, 1)
        config.top_k_at(*self._place, num_keys=0)  # raises if there is no such layer
        self._choice = DSAConfig(**vars(config) | {"indexer_precision": "fp32"})  # of what is rounded already
        i = np.arange(d.index_head_dim)  # Sylvester's matrix, entry by entry:
        self._hadamard = (-1.0) ** np.bitwise_count(i[:, None] & i) * d.index_head_dim**-0.5

    @classmethod
    def from_safetensors(cls, path, layer=0, *, config=None, n_layers=None, **dims):
        """A layer of a checkpoint: its folder, its model.safetensors.index.json, or a .safetensors file.

        The dims are those of config.json beside it, without one V3.2's, but for those given here. fp8 weights
        are multiplied by their scales, for blocks of 128 x 128, rows, or all. What DeepSeek's script
        converted works too, if it is in one part (model0-mp1).
        ValueError or TypeError where something is missing, cut short, or of another kind.
        """
        path, said = Path(path).expanduser(), {}
        weights = read_layer(path, integer("layer", layer, 0))
        if os.path.lexists(file := (path if path.is_dir() else path.parent) / "config.json"):
            said = read_json(file)
            dims = vars(LayerDims.from_config(said, **dims))
        if kinds := said.get("indexer_types") or said.get("index_topk_pattern"):
            known = isinstance(kinds, (list, str)) and all(x in ("F", "S", "full", "shared") for x in kinds)
            expect(known, "indexer_types in config.json", kinds, "full or shared")
            follows = layer < len(kinds) and kinds[layer] in ("S", "shared")
        else:
            freq = integer("index_topk_freq", said.get("index_topk_freq", 1), 1)
            offset = integer("index_skip_topk_offset", said.get("index_skip_topk_offset", 2), 0)
            layers = integer("num_hidden_layers", said.get("num_hidden_layers", layer + 1), 1)
            follows = layer < layers and max(layer - offset + 1, 0) % freq > 0
        if follows:  # it takes the selection of the last layer that has an indexer
            weights = {name: x for name, x in weights.items() if "indexer." not in name}
        n_layers = said.get("num_hidden_layers") if n_layers is None else n_layers
        return cls(weights, config=config, layer=layer, n_layers=n_layers, **dims)

    @property
    def xp(self):
        """numpy or cupy, whose arrays the weights are."""
        return library("weights", self.weights["wo"])

    __copy__ = copy.deepcopy

    def new_cache(
        self, batch, capacity, storage="float32", grow=False, *, fast_bytes=None, local_window=0, path=None
    ):
        """An empty cache for this layer alone, of what tokens leave: latent and k_pe, and the index key.

        The arguments are KVCache's; with fast_bytes, and local_window or path, it is a HybridKVCache.
        """
        tiers = {"fast_bytes": fast_bytes, "local_window": local_window, "path": path}
        kind, tiers = (KVCache, {}) if [*tiers.values()] == [None, 0, None] else (HybridKVCache, tiers)
        own = {"qk_rope_head_dim": self.dims.qk_rope_head_dim, "xp": self.xp, **self.streams, **tiers}
        return kind(capacity, batch=batch, storage=storage, grow=grow, **own)

    @np.errstate(all="ignore")  # as in a stage
    def __call__(self, x, cache=None, *, lengths=None, starts=None, indices=None, core="auto"):
        """x [B, T, dim], normed -> y [B, T, dim] in x's dtype, and the selection, indices [B, T, K].

        x has gone through the norm before the attention, which is no part of this layer. All is computed in
        float32, or float64 if x or a weight is; if x alone is, that converts the weights at every call.
        indices, int32, ascending, then -1, count a sequence's real tokens; K = min(index_topk, keys so far).
        lengths [B]: how many of each sequence's T tokens are real; or starts [B]: before which they are
        padding, on the left. Padding leaves nothing in a cache, and its rows are 0, and -1.
        cache: of this layer's streams; x continues its sequences, each from its own length on, and a call
        that raises leaves it as it was. indices: attend to these instead of selecting.
        core: "absorbed" attends to the latents themselves, "expanded" to the keys and values of every head,
        made from them; "auto" takes the cheaper one. They differ by rounding.
        """
        xp, able = self.xp, self.has_indexer or indices is not None
        sizes(LAYER_AXES, {"x": x, "indices": indices}, ("indices",), xp)
        (B, T, dim), start = x.shape, np.zeros(len(x), np.int64)
        expect(dim == self.dim, "dim", f"{dim} in x", self.dim)
        expect(core in ("auto", "absorbed", "expanded"), "core", repr(core), "auto, absorbed or expanded")
        expect(able, "indices", None, "another layer's, as this one has no indexer")
        back = None
        if starts is not None:  # as if the padding stood behind
            expect(lengths is None, "lengths", lengths, "None with starts")
            lengths, (b, t) = T - check_lengths(starts, B, T, "starts"), np.ogrid[:B, :T]
            at, back = (tuple(map(xp.asarray, (b, (t + by[:, None]) % T))) for by in (T - lengths, lengths))
            x, indices = (None if z is None else z[at] for z in (x, indices))
        new = check_lengths(lengths, B, T)
        if cache is not None:
            check_type("cache", cache, KVCache)
            has = (cache.streams, cache.qk_rope_head_dim, cache.batch)
            own = (self.streams, self.dims.qk_rope_head_dim, B)
            expect(has == own, "(streams, qk_rope_head_dim, batch) of cache", has, own)
            start = cache.lengths
        if indices is not None:
            check_keys("indices", indices, max(start + new, default=0))
        k_end = causal_end(start, new, T)
        if xp is np:  # a GPU would wait for what is asked of the contents of arrays
            expect(np.isfinite(x[k_end > 0]).all(), "x", "NaN or infinite in a real token", "finite numbers")
            behind = indices is None or (indices < k_end[..., None]).all()
            expect(behind, "indices", "ahead of a token", "only keys up to the token, -1 for padding")
        return self._run(x, cache, start, new, k_end, indices, core, back)

    def _run(self, x, cache, start, new, k_end, indices, core, back):
        """What __call__ checked: new[b] tokens behind start[b], which see up to k_end; results go `back`."""
        d, w, (B, T), choice = self.dims, self.weights, x.shape[:2], self._choice
        if accumulator(x) == np.float64:
            w = {name: z.astype(np.float64, copy=False) for name, z in w.items()}
        own = x.astype(w["wo"].dtype, copy=False)
        turn = turns(own, start, d)
        qr, k, *indexer = made_of_x(own, w, turn, d)
        both = d.indexer_precision, getattr(cache, "storage", None)
        codes = both == ("fp8", "fp8") and d.index_head_dim <= FP8_BLOCK  # are compared, as they are stored

        def compared(u):  # u [B, T, J, E] of the indexer as (1) sees it; of codes, what they are made of
            u = u @ self.xp.asarray(self._hadamard, u.dtype) if d.hadamard else u
            return u if codes else PRECISIONS[d.indexer_precision](u)

        tokens = {"k": k} | ({"index_k": compared(indexer[0])[:, :, 0]} if indexer else {})

        def selected(keys, weights):  # (1) and (2), over the cache or keys [B, T, E]
            q = by_rows(qr, w["indexer.wq_b"]).reshape(B, T, d.index_n_heads, d.index_head_dim)
            rotate(q[..., : d.qk_rope_head_dim], turn, d.index_rope_interleaved)
            q = compared(q)
            if codes:
                q, scales = quantized(q, FP8_BLOCK, "ue8m0", 1e-4)
                keys, weights = cache.stored("index_k"), weights * scales[..., 0]
            elif cache is not None:
                keys = cache.read("index_k")
                keys = keys.astype(q.dtype, copy=False) if q.dtype.name == "bfloat16" else keys  # of a GPU
            S, by_length = keys.shape[1], choice.sparse_ratio or choice.fallback_dense_threshold
            default = not by_length and T and (k_end == np.arange(S - T, S) + 1).all()  # a GPU gets none
            windows = [None, None] if default else [self.xp.asarray(z) for z in (0 * k_end, k_end)]
            arrays = {"q": q, "k": keys[:, :, None], "index_q": q, "index_k": keys, "weights": weights}
            lengths = start + new if by_length else None
            return choose_keys(choice, self._place, {}, arrays, windows, lengths)[0]

        def attended():
            chosen = selected(tokens["index_k"], indexer[1]) if indices is None else indices
            heads = self._core(w, turn, qr, k, chosen, cache, core)  # (3)
            found = projected(heads, w["wo"], x.dtype), chosen
            return found if back is None else tuple(z[back] for z in found)

        return attended() if cache is None else cache.append_then(attended, lengths=new, **tokens)

    def _core(self, w, turn, qr, k, indices, cache, core):
        """Equation (3) for qr [B, T, Q], over the cache or latents k [B, S, 1, R + rope] -> [B, T, H * v]."""
        d, R, (B, T), H, K = self.dims, self.kv_lora_rank, qr.shape[:2], self.dims.n_heads, indices.shape[-1]
        nope, rope, each = d.qk_nope_head_dim, d.qk_rope_head_dim, d.qk_nope_head_dim + d.v_head_dim
        q = projected(qr, w["wq_b"], w["wkv_b"].dtype).reshape(B, T, H, nope + rope)
        up, out = w["wkv_b"].reshape(H, each, R), self.xp.empty((B, T, H, d.v_head_dim), q.dtype)
        m = 0.1 * d.mscale * math.log(d.rope_factor) + 1  # YaRN's
        scale = (nope + rope) ** -0.5 * m * m
        if core == "auto" and self.xp is np and not isinstance(cache, HybridKVCache):
            # Fewer multiplications a head? Expanded keys are worth it where all are streamed under a mask.
            S = k.shape[1] if cache is None else int(cache.lengths.max(initial=0))
            fewer = S * R * each + T * S * (each + rope) < T * R * each + T * K * (2 * R + rope)
            core = "expanded" if fewer and 2.5 * K >= S else core
        if core != "expanded":  # q . W c = qW . c
            latent_q = self.xp.empty((B, T, H, R + rope), q.dtype)
            by_heads(q[..., :nope], up[:, :nope], latent_q[..., :R])
            rotate(q[..., nope:], turn, True, out=latent_q[..., R:])
            attend = sparse_attention if cache is None else cache.attend
            own = {"k": k.astype(q.dtype, copy=False), "v": None} if cache is None else {}
            latents, _ = attend(latent_q, indices=indices, d_v=R, scale=scale, **own)
            by_heads(latents, up[:, nope:].swapaxes(1, 2), out)
            return out.reshape(B, T, H * d.v_head_dim)
        # A head is a batch entry, which makes for larger products, and few are expanded at a time.
        rotate(q[..., nope:], turn, interleaved=True)
        k = (k if cache is None else cache.read("k")).swapaxes(1, 2)  # [B, 1, S, R + rope]
        some = max(1, 2**25 // max(1, k.size))
        for h in (slice(h, h + some) for h in range(0, H, some)):
            kv = k[..., :R] @ up[h].swapaxes(1, 2)  # [B, h, S, nope + v]
            k_pe = np.broadcast_to(k[..., R:], (*kv.shape[:3], rope))
            keys = np.concatenate([kv[..., :nope], k_pe], -1)  # [B, h, S, nope + rope]
            heads = q.swapaxes(1, 2)[:, h, :, None], keys[..., None, :], kv[..., None, nope:]
            same = np.broadcast_to(indices[:, None], (*kv.shape[:2], T, K))
            out.swapaxes(1, 2)[:, h] = sparse_attention(*heads, same, scale=scale)[0][..., 0, :]
        return out.reshape(B, T, H * d.v_head_dim)


@by_library
def made_of_x(x, w, turn, d):
    """Of x: qr [B, T, Q], [c | k_pe] [B, T, 1, R + rope], an indexer's keys [B, T, 1, E] and weights."""
    R, rope = len(w["kv_norm"]), d.qk_rope_head_dim
    qr = rms_norm(by_rows(x, w["wq_a"]), w["q_norm"], d.norm_eps)
    k = projected(x, w["wkv_a"])[:, :, None]
    k[..., :R] = rms_norm(k[..., :R], w["kv_norm"], d.norm_eps)
    rotate(k[..., R:], turn, interleaved=True)
    if "indexer.wk" not in w:
        return qr, k
    index_k = by_rows(x, w["indexer.wk"])[:, :, None]
    index_k -= index_k.mean(-1, keepdims=True)  # LayerNorm
    index_k = rms_norm(index_k, w["indexer.k_norm"], d.index_norm_eps) + w["indexer.k_norm.bias"]
    rotate(index_k[..., :rope], turn, d.index_rope_interleaved)
    factor = d.index_n_heads**-0.5 * d.index_head_dim**-0.5
    return qr, k, index_k, by_rows(x, w["indexer.weights_proj"]) * factor


@by_library
@stage("x [..., T, N], weight [O, N] -> y [..., T, O]")
def by_rows(x, weight):
    """x @ weight.T, in NumPy with the same bits for a token in any batch, block, chunk or order in memory."""
    # As in index_scores, all calls of BLAS are alike: one row by a part of the weight that fits an L2 cache.
    # cuBLAS chooses by the number of rows: on a GPU scores that all but tie may rank in another order.
    x, weight = np.ascontiguousarray(x), np.ascontiguousarray(weight)
    y, part = np.empty((len(x), 1, len(weight)), x.dtype), max(1, KEY_TILE**2 // max(1, weight.shape[1]))
    for i in range(0, len(weight), part):
        np.matmul(x[:, None], weight[i : i + part].T, out=y[:, :, i : i + part])  # [T, 1, part]
    return y[:, 0]


@by_library
def projected(x, weight, dtype=None):
    """x [..., in] @ weight [out, in].T; with batch axes in front a product would copy weight.T."""
    y = (x.reshape(-1, x.shape[-1]) @ weight.T).reshape(*x.shape[:-1], len(weight))
    return y.astype(dtype or y.dtype, copy=False)


@by_library
def by_heads(x, weight, out):
    """x [B, T, H, in] @ weight [H, in, out], each head by its own -> out [B, T, H, out]."""
    np.matmul(x.swapaxes(1, 2), weight, out=out.swapaxes(1, 2))


def rms_norm(x, weight, eps):
    return weight * x / np.sqrt((x * x).mean(-1, keepdims=True) + eps)


@by_library
def turns(x, start, d):
    """cos and sin of RoPE for tokens x [B, T, ...] at positions from start [B] on, [B, T, 1, rope / 2]."""
    angles = (start[:, None] + np.arange(x.shape[1]))[..., None, None] * d.frequencies()
    return [(d.rope_attention_factor * f(angles)).astype(x.dtype) for f in (np.cos, np.sin)]


@by_library
def rotate(x, turn, interleaved, out=None):
    """RoPE turns the pairs of x [B, T, H, d], (2i, 2i + 1) or (i, i + d / 2), in place or to out."""
    (cos, sin), d, out = turn, x.shape[-1], x if out is None else out
    i, j = (slice(0, d, 2), slice(1, d, 2)) if interleaved else (slice(0, d // 2), slice(d // 2, d))
    out[..., i], out[..., j] = x[..., i] * cos - x[..., j] * sin, x[..., i] * sin + x[..., j] * cos


def named_weights(weights, d):
    """The weights by their names in a layer, checked against d, as their library's layer wants them."""
    check_type("weights", weights, collections.abc.Mapping)
    names = {name: name for name in d.shapes()} | WEIGHTS  # each that is known: in a layer
    xp: Any = None
    keys: dict[Any, str] = {}  # what the weights are called here, by their names in a layer
    for key, x in weights.items():
        name = names.get(NAME.fullmatch(key)[3])
        expect(name, key, "no weight of this layer", f"one of {[*names]}")
        expect(name not in keys, key, f"the same weight as {keys.get(name)}", "each once")
        keys[name], xp = key, dims(xp, **{key: (x, "...")})["xp"]
    for name in d.shapes() if keys.keys() - WEIGHTS.values() else WEIGHTS.values():
        expect(name in keys, " or ".join(x for x in names if names[x] == name), "missing", "a weight")
    named = {name: weights[key] for name, key in keys.items()}
    sizes = {keys[name]: (*named[name].shape, 0)[0] for name in ("wo", "q_norm", "kv_norm")}
    shapes = d.shapes(*sizes.values())
    for name, x in named.items():
        expect(x.shape == (s := shapes[name]), keys[name], f"of shape {x.shape}", f"{s}, for lengths {sizes}")
    dtype, as_kept = accumulator(*named.values()), KERNELS.get(("as_kept", xp.__name__))
    return as_kept(named, dtype) if as_kept else {x: named[x].astype(dtype, copy=False) for x in named}


# A tensor's name in a checkpoint: its prefix, the layer's number in that, if any, and its name in a layer.
NAME: Any = re.compile(r"((?:(?:.*\.)?layers\.(\d+)\.)?(?:(?:self_)?attn\.)?)(.*?)(?:\.weight)?", re.DOTALL)
SCALE = re.compile(r"\.(weight_scale_inv|weight_scale|scale)$")  # of an fp8 weight; the last is DeepSeek's
BUFFER = re.compile(r"\b(([qkv]|kv|prob|input)_scale|(k|v|kv|pe|k_scale)_cache|(cos|sin)_cached)$|inv_freq$")
E8M0 = np.append(np.ldexp(np.float32(1), np.arange(-127, 128)), np.float32("nan"))  # the value of each code
STORED: dict[str, Any] = {  # what a file holds: as NumPy reads it, and what makes floats of that
    "F64": ("<f8", np.array), "F32": ("<f4", np.array), "F16": ("<f2", np.array),
    "BF16": ("<u2", widened), "F8_E4M3": ("u1", E4M3.take), "F8_E8M0": ("u1", E8M0.take),
}  # fmt: skip
REFUSED = {  # patterns of "name dtype" that occur in checkpoints of other kinds only
    r"scale_2 |global_scale |scale(_inv)? F8_E4M3": "NVFP4", r"scale(_inv)? U8|_blocks |_scales ": "MXFP4",
    r"\.(qweight|qzeros|scales|g_idx) ": "AWQ or GPTQ", r" I8$": "int8", r"(?<!k_norm)\.bias ": "biases",
    r"weight_packed | (U8|F4)$": "4 bits packed in bytes (NVFP4, MXFP4 or int4)",
    r"\b(w_)?(k_b|v_b|uk|uv|kc|vc)(_proj)?\b|embed_q|unembed_out": "a split kv_b_proj",
    r"\bq_proj\b": "queries of full rank, without q_a_proj", r"(?<!scale)(?<!_inv) F8_E8M0$": "scales alone",
}  # fmt: skip


def read_json(path):
    """A JSON file without nulls: a folder's config.json; of a model that also sees, its text's. Or a dict."""
    found = path
    if not isinstance(path, dict):
        path = Path(path).expanduser()
        path = path / "config.json" if path.is_dir() else path
        try:
            found = json.loads(path.read_bytes())
        except (ValueError, RecursionError) as error:
            found = error
    expect(isinstance(found, dict), path, f"without a JSON object: {found!s:.99}", "it (a Git LFS pointer?)")
    return {name: x for name, x in (found | (found.get("text_config") or {})).items() if x is not None}


def real(name, value, least=1e-99):
    """value, a number of which, up to 1e99, nothing overflows that is made of the dims."""
    fits = is_number(value) and least <= (value if isinstance(value, int) else float(value)) <= 1e99
    expect(fits, name, repr(value), f"a number from {least} to 1e99")
    return value


def of_layer(names, layer):
    """Those of a layer's attention, which stand behind the same words as its kv_norm; no buffers."""
    parsed = {name: NAME.fullmatch(name).groups() for name in names if not BUFFER.search(name)}
    own = {name: x for name, x in parsed.items() if x[1] in (None, str(layer))}
    prefixes = {prefix for prefix, _, word in own.values() if word in ("kv_norm", "kv_a_layernorm")}
    for name, (prefix, _, word) in own.items() if prefixes else ():
        ours = re.match(r"indexer|w?(q|kv)_[ab]|\w+\.lora_", word)  # not a vision tower's
        expect(prefix in prefixes or not ours, name, "beside the weights", f"it behind {sorted(prefixes)}")
    return [name for name, (prefix, *_) in own.items() if prefix in prefixes]


def read_layer(path, layer):
    """The weights of a layer's attention in a checkpoint, by full name, as floats."""
    index, adapters = path / "model.safetensors.index.json", [*path.glob("adapter_*")]
    expect(not adapters, "path", f"with {[*map(str, adapters)]}", "weights that are merged")
    files = [index] if index.exists() else sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if files and files[0].suffix == ".json":
        listed = read_json(files[0]).get("weight_map")
        expect(isinstance(listed, dict), f"weight_map in {files[0]}", listed, "the file of each tensor")
        files = sorted({files[0].parent / listed[name] for name in of_layer(listed, layer)})
    tensors: dict[str, Any] = {}
    for file in files:
        for name, tensor in read_safetensors(file).items():
            expect(name not in tensors, name, f"in {file} and another file", "in one (split for ranks?)")
            tensors[name] = tensor
    tensors = {name: tensors[name] for name in of_layer(tensors, layer)}
    expect(tensors, "path", repr(str(path)), f"a checkpoint with kv_a_layernorm, or kv_norm, of {layer = }")
    floats, scales = {}, collections.defaultdict[str, list](list)  # the names of each fp8 weight's scales
    for name, (dtype, x) in tensors.items():
        kinds = [kind for pattern, kind in REFUSED.items() if re.search(pattern, f"{name} {dtype}")]
        words = " or ".join(kinds or ["another dtype"])
        expect(dtype in STORED and not kinds, name, f"{dtype}, as with {words}", "floats, or fp8 with scales")
        floats[name], of = STORED[dtype][1](x), SCALE.sub(".weight", name)
        if dtype == "F8_E4M3" or of != name:
            scales[of] += [name] if of != name else []
    for name, own in scales.items():
        dtype, x = tensors.get(name, ("not there", np.zeros(0)))
        one = (dtype, x.ndim, len(own)) == ("F8_E4M3", 2, 1)
        expect(one, name, f"{dtype}, {x.shape}, with {own}", "fp8 [out, in], with one weight_scale_inv")
        z, blocks = floats.pop(own[0]).astype(np.float32), tuple(-(-n // FP8_BLOCK) for n in x.shape)
        fits = z.shape in (blocks, (len(x), 1), (1, 1), (1,), ()) and np.isfinite(z).all()
        expect(fits, own[0], f"of shape {z.shape}, up to {z.max(initial=0)}", f"{blocks}, by rows, or one")
        if z.shape == blocks:
            z = z.repeat(FP8_BLOCK, 0).repeat(FP8_BLOCK, 1)[: len(x), : x.shape[1]]
        floats[name] *= z
    return floats


def read_safetensors(path):
    """A file's tensors, {name: (dtype, array)}, mapped. It is a length, a header in JSON, and the tensors."""
    tensors, at = {}, 0
    try:
        raw = np.memmap(path, np.uint8, "r")
        start = 8 + int.from_bytes(raw[:8].tobytes(), "little")
        header, data = json.loads(raw[8:start].tobytes()), raw[start:]
        header.pop("__metadata__", None)
        for name, x in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            dtype, (begin, end) = x["dtype"], x["data_offsets"]
            shape, stored = (tuple(x["shape"]), STORED[dtype][0]) if dtype in STORED else (end - begin, "u1")
            tensors[name] = dtype, (array := np.ndarray(shape, stored, data, at))
            expect((begin, end) == (at, at + array.nbytes), name, x, f"its bytes from {at} on")
            at += array.nbytes
        expect(at == len(data), "it", f"of {len(raw)} bytes", start + at)
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no whole safetensors file (a Git LFS pointer?): {error}") from None
    return tensors


# 13. Training the indexer ---------------------------------------------------------------------------------
# The indexer learns to score high what the main attention looks at: first in a dense warm-up, over the
# window, with all else frozen; then inside its own set, while the model learns through sparse attention.


@np.errstate(all="ignore")
def with_sums(block, arrays, results, n, given, most):
    """in_blocks, whose last results, those without T in their axes, are sums over all blocks, like the array
    that their dtype names. What a block adds is such an array, or (keys, parts) for its sequence, or None.
    """
    by_query = {x: kind for x, kind in results.items() if "T" in kind[0]}
    like = [given[word] for x, (_, word) in results.items() if x not in by_query]
    whole = (given[x] for x, (axes, _) in arrays.items() if axes[0] == "...")  # not the sink
    dtype = accumulator(*(x for x in whole if x is not None))
    sums: list[Any] = [None if x is None else np.zeros(x.shape, dtype) for x in like]

    def add(more):
        b, parts = more
        for x, part in zip(sums, parts):
            if isinstance(part, tuple):
                x[b][part[0]] += part[1]
            elif part is not None:
                x += part

    found = in_blocks(block, arrays, by_query, n, given, most, add)
    found = found if isinstance(found, tuple) else (found,)
    return *found, *(x if x is None else x.astype(own.dtype, copy=False) for x, own in zip(sums, like))


def slots(numbers):
    """most of a stage whose queries hold numbers(n) in each of K slots, or S: up to 2**20 in a block."""
    return lambda n: min(64, 2**20 // max(1, n.get("K", n["S"]) * numbers(n)))


@stage(
    f"{ATTENTION}, indices [..., T, K] int, out [..., T, H, Dv], lse [..., T, H], dout [..., T, H, Dv]"
    " -> dq [..., T, H, D] q, dk [..., S, G, D] k, dv [..., S, G, Dv] v, dsink [H] sink",
    most=slots(lambda n: n["G"] * (n["D"] + n["Dv"]) + n["H"]),
    through=with_sums,
)
def sparse_attention_backward(q, k, v, indices, out, lse, dout, *, d_v=None, scale=None, sink=None):
    """The gradients of out, lse = sparse_attention(q, k, v, indices, ...), for dout, out's.

    With P = exp(scale * q.k - logaddexp(lse, sink)) and dS = P * (dout.v - dout.out), summed over all slots:
    dq = scale * dS k, dk = scale * dS q, dv = P dout, dsink = -exp(sink - logaddexp(lse, sink)) * dout.out.
    dv is None where v is, and dk holds both parts; dsink is None without sink. Slots of -1 scatter nowhere.
    Errors as in sparse_attention. Runs agree bit for bit. Of bfloat16 a GPU rounds P and dS to it, and sums
    in float32.

    >>> one, v, slots = np.ones((1, 1, 1)), np.array([[[1.0]], [[3.0]]]), np.array([[0, 1]])
    >>> out, lse = sparse_attention(one, 0 * v, v, slots)
    >>> dq, dk, dv, _ = sparse_attention_backward(one, 0 * v, v, slots, out, lse, one)
    >>> dk.ravel().round(6).tolist(), dv.ravel().round(6).tolist()
    ([-0.5, 0.5], [0.5, 0.5])
    """
    (T, H, D), G, rows = q.shape, k.shape[1], indices.astype(np.int64)
    r, dtype, values = H // G, accumulator(q, k, k if v is None else v), k[..., :d_v] if v is None else v
    keys, values = (gather(x, rows, dtype).swapaxes(1, 2) for x in (k, values))  # [T, G, K, D], [T, G, K, Dv]
    q, out, dout = (x.astype(dtype).reshape(T, G, r, x.shape[2]) for x in (q, out, dout))
    lse = lse.astype(dtype).reshape(T, G, r, 1)
    z = (np.full(H, -np.inf) if sink is None else sink).astype(dtype).reshape(G, r, 1)
    p = np.exp(scale * (q @ keys.swapaxes(2, 3)) - np.logaddexp(lse, z))  # [T, G, H/G, K]
    delta = (dout * out).sum(-1, keepdims=True)  # [T, G, H/G, 1]
    ds = scale * p * (dout @ values.swapaxes(2, 3) - delta)
    ds = np.where(rows[:, None, None] >= 0, ds, 0)  # of p, by_key drops what is absent
    parts = [ds.swapaxes(2, 3) @ q, p.swapaxes(2, 3) @ dout]  # of dk and dv, [T, G, K, D], [T, G, K, Dv]
    if v is None:
        parts[0][..., :d_v] += parts.pop()
    dk, *dv = by_key(rows, *(x.swapaxes(1, 2) for x in parts))
    dz = np.where(lse == -np.inf, 0, delta / (1 + np.exp(lse - z))).sum(0).ravel()
    return (ds @ keys).reshape(T, H, D), dk, dv[0] if dv else None, None if sink is None else -dz


@stage(
    "q [..., T, H, D], k [..., S, G, D], indices [..., T, K] int -> target [..., T, K]",
    most=slots(lambda n: n["H"] + n["G"] * n["D"] * ("K" in n)),
)
def attention_target(q, k, *, scale=None, k_start=None, k_end=None, indices=None):
    """What the indexer learns: the main attention's probabilities, summed over heads, L1-normalised.

    Over the window (dense warm-up: K is S), or, with indices, inside the selected set (sparse stage), where
    windows hide keys only if given; 0 for keys not seen. float32, float64 for float64 input.

    >>> attention_target(np.ones((1, 2, 1)), np.log([[[1.0]], [[3.0]]])).round(6)
    array([[0.25, 0.75]])
    """
    (T, H, D), (S, G, _), dtype = q.shape, k.shape, accumulator(q, k)
    if indices is None:
        (lo, hi), target = span(k_start, k_end), np.zeros((T, S), dtype)
        target[:, lo:hi] = mass(q, k[lo:hi], np.arange(lo, hi), k_start[:, None], k_end[:, None], scale)
        return target / max(1, H)
    rows = visible(indices, k_start, k_end)  # [T, K]
    keys = gather(k, rows, dtype).transpose(0, 2, 3, 1)  # [T, G, D, K]
    x = scale * (q.astype(dtype).reshape(T, G, H // G, D) @ keys)  # [T, G, H/G, K]
    return softmax(np.where(rows[:, None, None] >= 0, x, -np.inf))[0].sum((1, 2)) / max(1, H)


def indexer_loss(index_q, index_k, weights, target, *, indices=None, k_start=None, k_end=None):
    """KL(p || softmax(I)), summed over all rows, of the scores I of (1); and its gradients, in closed form.

    index_q [..., T, J, E], index_k [..., S, E], weights [..., T, J]: as in index_scores.
    target: attention_target's, [..., T, S], or with the same indices [..., T, K]; of rows p that sum to 1, dI
    is softmax(I) - p. A row of zeros, or without keys, adds nothing; NaN, or less than 0, makes the loss NaN.
    -> loss, a float64, on a GPU in an array without axes, and (d_index_q, d_index_k, d_weights), in shape and
    dtype like what they belong to.

    >>> one = np.ones((1, 1, 1))
    >>> loss, grads = indexer_loss(one, np.log([[1.0], [3.0]]), one[0], np.array([[0.25, 0.75]]))
    >>> abs(loss.item()) < 1e-6, grads[1].round(6).ravel().tolist()
    (True, [0.0, 0.0])
    """
    if indices is None:
        dims(index_k=(index_k, "... S E"), target=(target, "... T S"))
    windows = {"k_start": k_start, "k_end": k_end}
    losses, d_q, d_w, d_k = loss_of_rows(index_q, index_k, weights, target, indices, **windows)
    return losses.sum(dtype=np.float64), (d_q, d_k, d_w)


@stage(
    f"{INDEXER}, target [..., T, K], indices [..., T, K] int -> losses [..., T],"
    " d_q [..., T, J, E] index_q, d_w [..., T, J] weights, d_k [..., S, E] index_k",
    most=slots(lambda n: n["J"] * 16 + n["E"] if n["K"] < n["S"] else n["J"] * 4),
    through=with_sums,
)
def loss_of_rows(index_q, index_k, weights, target, indices=None, *, k_start=None, k_end=None):
    """The KL of each row, and the gradients of their sum. Without indices K is S: a block shares its keys."""
    (T, J, E), (lo, hi), dtype = index_q.shape, span(k_start, k_end), accumulator(index_q, index_k, weights)
    dense = indices is None
    rows = visible(np.arange(lo, hi)[None] if dense else indices, k_start, k_end)  # [T, N]
    sees, target = rows >= 0, target[:, lo:hi] if dense else target
    keys = gather(index_k, rows.max(0, keepdims=True, initial=-1) if dense else rows, dtype)  # [1 or T, N, E]
    q, w = (x.astype(dtype) for x in (index_q, weights))
    q[~sees.any(1)] = w[~sees.any(1)] = 0  # of who sees nothing, and may be anything
    q = q.reshape(len(keys), T // len(keys) * J, E)  # one product for all that share the keys
    on = np.maximum((q @ keys.swapaxes(1, 2)).reshape(T, J, sees.shape[1]), 0)  # [T, J, N]
    scores = np.where(sees, (w[:, None] @ on)[:, 0], -np.inf)  # [T, N]                                    (1)
    (soft, lse), p = softmax(scores), np.where(sees, target, 0).astype(dtype)
    losses = np.where(p != 0, p * (np.log(p) - scores + lse), 0).sum(1)
    d_scores = np.where(sees, p.sum(1, keepdims=True) * soft - p, 0)
    d_r = (d_scores[:, None] * w[..., None] * (on > 0)).reshape(*q.shape[:2], sees.shape[1])  # as q @ keys
    d_keys = d_r.swapaxes(1, 2) @ q  # as keys
    d_k = (slice(lo, hi), d_keys[0]) if dense else by_key(rows, d_keys)[0]
    return losses, (d_r @ keys).reshape(T, J, E), (on @ d_scores[..., None])[..., 0], d_k


def learned_loss(q, k, mlp, target, **options):
    """indexer_loss of the scorer SELECTORS["learned"], w_out . relu(w_q q + w_k k + b): see as_indexer.

    q [..., T, H, D], k [..., S, G, D], mlp = (w_q [F, G*D], w_k [F, G*D], b [F], w_out [F]); q and k are
    summed over the heads of a group, as there; options of indexer_loss -> loss, (d_w_q, d_w_k, d_b, d_w_out)
    """
    dims(q=(q, "... T H D"), k=(k, "... S G D"))

    def work():
        flat_q, flat_k = features(q, k)  # [..., T, G * D], [..., S, G * D]
        loss, (d_q, d_k, d_w) = indexer_loss(*as_indexer(flat_q, flat_k, mlp), **options | {"target": target})
        rows = (x.reshape(-1, x.shape[-1]) for x in (d_q[..., -1], flat_q, d_k[..., :-1], flat_k, d_w))
        d_hidden, q_rows, d_k, k_rows, d_w = rows  # [..., F] and [..., G * D], without batch axes
        grads = d_hidden.T @ q_rows, d_k.T @ k_rows, d_hidden.sum(0), d_w.sum(0)
        return loss, tuple(d.astype(x.dtype.type) for d, x in zip(grads, mlp))

    return on_one_blas_thread(work)


def visible(rows, start, end):
    """Keys [T, K], or [1, K] of all queries, with -1 for those outside the windows [T], int64."""
    rows = rows.astype(np.int64)
    return np.where((rows >= start[:, None]) & (rows < end[:, None]), rows, -1)


def gather(x, rows, dtype):
    """x [S, ...] at rows [T, K] -> [T, K, ...], 0 where a row is -1."""
    taken, there = np.zeros((*rows.shape, *x.shape[1:]), dtype), rows >= 0
    taken[there] = x[rows[there]]
    return taken


def by_key(rows, *slots):
    """Of each array [T, K, ...] of the slots rows [T, K], its sums by key: keys [N], ascending, and [N, ...];
    added up in the order of queries, as blocks are, so that threads change no bit.
    """
    order = np.argsort(rows, axis=None, kind="stable")
    keys = rows.ravel()[order]
    first = np.flatnonzero(np.diff(keys, prepend=-1))  # of a key's slots; -1 sorts first, and has none
    return [(keys[first], np.add.reduceat(x.reshape(rows.size, *x.shape[2:])[order], first)) for x in slots]


# 14. A sequence sharded over machines ---------------------------------------------------------------------
# Rank r holds a contiguous range of the keys, which may be empty, and every rank the queries. A shard selects
# by (2), and of these candidates, in the order of ranks and thus of keys, (2) selects again: the first top_k
# of all keys are among the first of the shards, as are the first and last keys of all, which are forced. Each
# rank attends by (3) to the members it holds, and merges, as it decides, for its share of the queries.

SHARD_BUFFER = 2**28  # scores that a rank holds at a time, unless a query has more
nccl_key = functools.cache(lambda: sys.modules["mpi4py.MPI"].Comm.Create_keyval())  # as MPI's attribute


def sharded_select(
    index_q, index_k_shard, weights, top_k, comm,
    *, local_window=0, num_sink_tokens=0, k_start=None, k_end=None,
):  # fmt: skip
    """lightning_select where the keys are spread over the ranks of comm, such as mpi4py's MPI.COMM_WORLD.

    All ranks (mpiexec -n 4 python -m mpi4py program.py) call alike, but for index_k_shard [..., S_r, E], keys
    that follow those of rank r - 1; k_start and k_end count the keys of all. What one rank raises, all raise.
    -> indices [..., T, K] on every rank, bit for bit as on one; int64 where there are more than 2**31 keys
    Between R ranks a query moves at most 12 * R * top_k bytes, in float64 16, with int64 8 more, never a key;
    all queries go at once, of which 2**31 bytes from one rank to another need MPI 4.
    """
    call = {**locals(), "index_k": index_k_shard}
    with together(comm):
        floats = {name: DSA_AXES[name] for name in ("index_q", "index_k", "weights")}
        n = sizes_of_codes(floats, own := dict(call), ())
        check_options(dict(n), dict(call))
    at = layout(comm, n, n["S"], call)
    quota = {"top_k": top_k, "local_window": local_window, "num_sink_tokens": num_sink_tokens}
    return select_over_shards(at, quota, (k_start, k_end), *(own[x] for x in floats))


def sharded_attention(
    q, k_shard, v_shard, index_q, index_k_shard, weights, config, comm,
    *, d_v=None, scale=None, sink=None, k_start=None, k_end=None,
    cache=None, lengths=None, owner=None, layer=0, n_layers=1, scatter=False,
):  # fmt: skip
    """dsa_attention where the keys are spread over the ranks of comm: select as sharded_select, then attend.

    Ranks call alike, but for k_shard [..., S_r, G, D], v_shard and index_k_shard; config selects by (1).
    -> out, lse, indices on every rank: the indices bit for bit as on one, out and lse to rounding
    Each rank attends to the members it holds, and sends H * (Dv + 1) numbers a query, those of out in float16
    beside a scale if q is bfloat16, to those that merge; these send out and lse to all. scatter=True: each
    keeps its share of all N queries, out [M, H, Dv] and lse [M, H], from N * r // R to N * (r + 1) // R.
    cache: this rank's shard. k_shard, v_shard and index_k_shard are then the new tokens, the same on every
    rank, with lengths [B] as in dsa_attention; rank `owner`, by default the last, keeps them, and no rank
    behind it may hold keys. What one rank raises, all raise, and every cache is as it was.
    """
    # A long prompt goes in chunks to owner=0, 1, ...; what is decoded, short beside it, to the last rank. In
    # blocks dealt in turn shards would grow alike, but ties, forced keys and windows go by ranges.
    call = {**locals(), "k": k_shard, "v": v_shard, "index_k": index_k_shard}
    with contextlib.ExitStack() as undo:
        at, selection, attend = agreement(undo, comm, config, cache, owner, (k_start, k_end), call)
        indices = select_over_shards(at, *selection)
        first, end = at.xp.asarray(at.edges[comm.rank :][:2, ..., None, None])

        def offers():
            own = np.where((indices >= first) & (indices < end), indices - first, -1).astype(np.int32)
            out, lse = attend(q, indices=own, d_v=d_v, scale=scale)
            if q.dtype.name != "bfloat16":
                return out, lse
            largest = np.maximum(out.max(-1), -out.min(-1))[..., None]  # float16 rounds a tenth as much of it
            largest = np.where((largest > 0) & (largest < np.inf), largest, 1)
            return np.divide(out, largest, out=np.empty_like(out, np.float16)), lse, largest

        def merge(outs, lses, largest=None):  # [R, M, H, Dv], [R, M, H], [R, M, H, 1]
            out, lse = merge_attention(outs if largest is None else outs * largest, lses)
            return (out if sink is None else apply_sink(out, lse, sink)).astype(q.dtype.type, copy=False), lse

        return *decided(at, offers, merge, scatter), indices


def agreement(undo, comm, config, cache, owner, windows, call):
    """The checks of sharded_attention; new tokens are kept -> layout, what to select from, what attends."""
    with together(comm):
        check_type("config", config, DSAConfig)
        expect((by := config.selector()) == "lightning", "the selector of config", repr(by), "'lightning'")
        if any(x is not None for x in (cache, call["lengths"], owner)):
            check_type("cache", cache, KVCache)
        owner = comm.size - 1 if owner is None else integer("owner", owner, 0)
        n, new = dsa_dims(call, {}, windows, cache, call["lengths"])
        new = np.full(n["..."], n["T"]) if new is None else new
        held = {x: call[x] for x in ("k", "v", "index_k") if call[x] is not None}
        attend, shard = functools.partial(sparse_attention, k=call["k"], v=call["v"]), n["S"]
        if cache is not None:
            undo.push(lambda kind, *_, before=cache.lengths: kind and cache.truncate(before))
            cache.append(lengths=new * (comm.rank == owner), **held)
            attend, shard, held = cache.attend, cache.lengths, {"k": cache, "index_k": cache.read("index_k")}
        index = [PRECISIONS[config.indexer_precision](x) for x in (call["index_q"], held.pop("index_k"))]
        attend = functools.partial(attend, out_dtype=accumulator(call["q"], *held.values()))  # of parts
    at = layout(comm, n, shard, call | {"lengths": new.tolist(), "cache": cache and cache.storage})
    behind = (at.edges[-1] - at.edges[min(owner + 1, comm.size)]) * new
    expect(owner < comm.size and not behind.any(), "owner", owner, "a rank behind which none holds keys")
    alike = (at.edges[-1] == at.n["S"]).all() or not (config.sparse_ratio or config.fallback_dense_threshold)
    expect(alike, "the lengths", at.edges[-1].tolist(), "all alike where config goes by the number of keys")
    quota, dense = config.quota_at(call["layer"], call["n_layers"], at.n["S"])
    windows = windows if cache is None else (None, causal_end(at.edges[-1] - new, new, n["T"]))
    return at, (None if dense else quota, windows, *index, call["weights"]), attend


def select_over_shards(at, quota, windows, q, k, weights):
    """Equation (2) over the keys of all ranks -> indices [..., T, K]; every visible key without a quota."""
    xp, S, windows = at.xp, at.n["S"], windows_of(at.n, *map(on_host, windows))
    if quota is None:
        with together(at.comm):
            return xp.asarray(every_key(windows, S))
    K, (first, end) = min(quota["top_k"], S), at.edges[at.comm.rank :][:2, ..., None]
    lo, hi = (xp.asarray(np.clip(w, first, end) - first, np.int32) for w in windows)

    def offers():  # what this shard selects: scores and keys [..., T, K], -inf where none is
        best = xp.full((*at.queries, K), -np.inf, accumulator(q, k, weights))
        keys = xp.zeros(best.shape, np.int32 if S <= 2**31 else np.int64)
        step = SHARD_BUFFER // max(1, k.shape[-2] * math.prod(at.queries[:-1]))
        step = step // 192 * 192 or max(1, step)  # whole blocks of the GPU's kernel
        for t in (slice(t, t + step) for t in range(0, at.queries[-1], step)):
            window = {"k_start": lo[..., t], "k_end": hi[..., t]}
            scores = index_scores(q[..., t, :, :], k, weights[..., t, :], **window)
            try:
                kept = select_topk(scores, **quota)
            except ValueError as error:
                raise ValueError(f"counting queries from {t.start}, {error}") from None
            own = np.s_[..., t, : kept.shape[-1]]
            best[own] = np.where(kept < 0, -np.inf, np.take_along_axis(scores, kept, -1))
            keys[own] = kept + xp.asarray(first, keys.dtype)[..., None]
        return best, keys

    def decide(*both):  # of candidates [R, M, K], side by side and thus by ascending key
        best, keys = (np.concatenate([*x], -1) for x in both)
        kept = select_topk(best, **quota)[:, :K]
        return [np.where(kept < 0, -1, np.take_along_axis(keys, kept, -1))]

    return decided(at, offers, decide)[0]


def decided(at, offers, decide, scatter=False):
    """decide(*offers [R, M, ...]) by every rank for its share of the N queries -> [..., T, ...], or, if each
    keeps what it decided, [M, ...]; offers() -> arrays [..., T, ...], of a rank's own keys.
    """
    R, N, queries = at.comm.size, math.prod(at.queries), len(at.queries)
    rows = [slice(N * r // R, N * (r + 1) // R) for r in range(R)]
    with together(at.comm):
        own = [at.ship(x.reshape(N, *x.shape[queries:])) for x in offers()]
        parts = [np.empty_like(x, shape=(R, *x[rows[at.comm.rank]].shape)) for x in own]
    at.move(((r, x[rows[r]]) for r in range(R) for x in own), ((r, y[r]) for r in range(R) for y in parts))
    with together(at.comm):
        found = decide(*map(at.xp.asarray, parts))
        own = [] if scatter else [at.ship(x) for x in found]
        whole = [np.empty_like(x, shape=(N, *x.shape[1:])) for x in own]
    at.move(((r, x) for r in range(R) for x in own), ((r, y[rows[r]]) for r in range(R) for y in whole))
    return found if scatter else [at.xp.asarray(y).reshape(*at.queries, *y.shape[1:]) for y in whole]


def layout(comm, n, shard, call):
    """Agree on where shards of so many keys stand. ValueError on every rank if they were not called alike."""
    xp, said = n["xp"], {**n, "S": 0, "xp": n["xp"].__name__, **call, "comm": 0}
    said = {x: np.dtype(y.dtype.type) if getattr(y, "shape", ()) else y for x, y in said.items()}  # axes in n
    words = gathered(comm, [zlib.crc32(repr(x).encode()) for x in said.values()])  # [R, names]
    for name, x in itertools.compress(said.items(), (words != words[0]).any(0)):
        raise ValueError(f"{name} is {x} on rank {comm.rank}, expected the same on every rank")
    edges = np.insert(gathered(comm, shard).cumsum(0), 0, 0, 0)  # of ranks [R + 1], or [R + 1, B]
    nccl = KERNELS.get(("ranks", xp.__name__), lambda comm: None)(comm)
    ship, move = (xp.ascontiguousarray, nccl) if nccl else (on_host, functools.partial(by_mpi, comm))
    n, queries = {**n, "S": int(edges[-1].max()), "xp": np}, (*n["..."], n["T"])
    return SimpleNamespace(comm=comm, n=n, xp=xp, queries=queries, edges=edges, ship=ship, move=move)


@contextlib.contextmanager
def together(comm):
    """What a block raises on any rank, raise on all, in the words of the first: none waits for another."""
    expect(hasattr(comm, "Isend") and bool(comm), "comm", repr(comm), "a communicator of mpi4py", TypeError)
    error, kinds = None, (TypeError, ValueError, IndexError, MemoryError)
    try:
        yield
    except Exception as raised:
        error = raised
    if (failed := gathered(comm, error is not None)).any():
        kind, first = next((x for x in kinds if isinstance(error, x)), RuntimeError), int(failed.argmax())
        raise comm.bcast(kind(f"rank {first}: {error}"), first) from error


def gathered(comm, x):
    """Every rank's numbers x [...] -> [R, ...]."""
    comm.Allgather(x := np.asarray(x), every := np.empty((comm.size, *x.shape), x.dtype))
    return every


def by_mpi(comm, sent, filled):
    """Send (rank, array), ..., and fill others of NumPy's; what goes to a rank comes in the order it went."""
    own = comm.Dup()  # apart from what the caller has under way
    both = (own.Irecv, filled), (own.Isend, sent)
    for request in [call(x.view(np.uint8), rank) for call, parts in both for rank, x in parts if x.size]:
        request.Wait()
    own.Free()


def by_nccl(api, pair, sent, filled):
    """by_mpi for CuPy arrays, on the current stream: one group of NCCL's calls, and no wait."""
    stream = sys.modules["cupy"].cuda.get_current_stream().ptr
    api.groupStart()
    for move, rank, x in [(pair.send, *part) for part in sent] + [(pair.recv, *part) for part in filled]:
        if x.size:
            move(x.data.ptr, x.nbytes, api.NCCL_INT8, rank, stream)
    api.groupEnd()


@functools.partial(KERNELS.setdefault, ("ranks", "cupy"))
def nccl_ranks(comm):
    """by_nccl between the GPUs of comm's ranks, made once; False unless all have NCCL and their own GPU."""
    if (move := comm.Get_attr(nccl_key())) is None:
        with together(comm):
            api, cuda = importlib.import_module("cupy.cuda.nccl"), sys.modules["cupy"].cuda
            gpu = api.available and (os.uname().nodename, cuda.runtime.deviceGetPCIBusId(cuda.Device().id))
            name = api.get_unique_id() if gpu and comm.rank == 0 else None
        gpus, names = zip(*comm.allgather((gpu, name)))
        if move := all(gpus) and len(set(gpus)) == comm.size:
            move = functools.partial(by_nccl, api, api.NcclCommunicator(comm.size, names[0], comm.rank))
        elif comm.rank == 0:
            print("dsa: no NCCL, or no GPU for each rank: arrays go through the host", file=sys.stderr)
        comm.Set_attr(nccl_key(), move)
    return move


# 15. On the GPU: how the kernels of dsa_kernels.cu are launched -------------------------------------------
# A stage looks up its plan, all that sizes, dtypes and chip decide: kernel, constants, grid and numbers. The
# function that a plan returns makes the stage's results and launches. How many keys a cache holds, which
# grows by each token, is no part of a plan but where they are few.

PORTABLE_KERNELS = False  # True: only kernels that all GPUs from sm_80 on run, as if this were one of them
TYPES = {"uint8": "u8", "float16": "__half", "bfloat16": "bf16", "float32": "float", "float64": "double"}
ONE_ZERO = [np.array([1, 0], dtype) for dtype in "fd"]  # which cuBLAS reads from memory
UNITS = {2: "short", 4: "int", 8: "int2", 16: "int4"}  # by bytes
CUDA_R = {"f": 0, "d": 1, "E": 14}  # cuBLAS's numbers of dtypes, float32, float64 and bfloat16
# How cuBLAS sums in a dtype: where it finds 1 and 0, CUBLAS_COMPUTE_32F or 64F, and its own algorithm.
SUMS = {x.dtype: (x.ctypes.data, x[1:].ctypes.data, (how, -1)) for x, how in zip(ONE_ZERO, (68, 70))}
SCORE_BYTES = 2**29  # scores that lightning_select holds at a time
SLOT_BYTES = 2**31  # what the slots of a chunk of queries hold in training
FEW = 8  # queries a sequence whose scoring is bound by memory
TOPK_KEYS = 2**12, 2**13 - 1, 2**13, 2**14, 2**31  # up to how many keys a row is ranked alike
# A GPU: its compute capability, 90 for 9.0, bytes that a block may ask for, and number of processors.
Chip = collections.namedtuple("Chip", "device sm shared processors")

COMPILERS = ThreadPoolExecutor(16, "dsa compiles")
plan, say_once = functools.lru_cache(maxsize=4096), functools.cache(print)
several_devices = functools.cache(lambda: sys.modules["cupy"].cuda.runtime.getDeviceCount() > 1)
# What CuPy makes of an int at a launch, in a third of a microsecond; its own type is made in a tenth.
long_long = functools.cache(lambda: getattr(sys.modules["cupy"].cuda.function, "CIntptr", np.int64))


@functools.cache
def chip_of(device, portable):
    gpu = sys.modules["cupy"].cuda.Device(device)
    sm, has = int(gpu.compute_capability), gpu.attributes
    found = Chip(device, sm, has["MaxSharedMemoryPerBlockOptin"], has["MultiProcessorCount"])
    return found._replace(sm=min(sm, 80), shared=min(found.shared, 166912)) if portable else found


def chip(x):
    return chip_of(x.data.device_id, PORTABLE_KERNELS)


class Kernel:
    """A kernel with its constants, numbers, words or dtypes; it is compiled at once, beside others."""

    def __init__(self, chip, name, block, **constants):
        self.chip, self.name, self.block = chip, name, (block,)
        self.function: Any = None
        named = {key: TYPES.get(getattr(x, "name", ""), x) for key, x in sorted(constants.items())}
        self.options = "-std=c++17", f"-D{name.upper()}", *(f"-D{key}={x}" for key, x in named.items())
        self.options += ("-arch=sm_90a",) * name.endswith("_wgmma")
        self.compiling: Any = COMPILERS.submit(self.compile)

    def compile(self):
        cupy, file = sys.modules["cupy"], Path(__file__).with_name("dsa_kernels.cu")
        expect(file.exists(), "dsa_kernels.cu", "missing", f"it beside {__file__}", FileNotFoundError)
        with cupy.cuda.Device(self.chip.device):
            module = cupy.RawModule(code=file.read_text(encoding="utf-8"), options=self.options)
            raw = module.get_function(self.name)
            raw.max_dynamic_shared_size_bytes = self.chip.shared - raw.shared_size_bytes
            if "-DBLOCKS=16" in self.options:  # a cluster of more than 8 has to be allowed, by attribute 14
                cupy.cuda.driver.funcSetAttribute(raw.kernel.ptr, 14, 1)
            (self.null,), self.function = as_arguments(0), raw.kernel

    def wait(self):
        """Until it is compiled, or anew if that failed; what takes over a second is said once."""
        compiling, self.compiling = self.compiling or COMPILERS.submit(self.compile), None
        if not wait([compiling], 1).done:
            say_once("dsa: compiling CUDA kernels, once; CuPy keeps them on disk", file=sys.stderr)
        compiling.result()

    def __call__(self, grid, arrays, numbers, shared=0):
        """Launch on the current stream: arrays as pointers, None as null, and numbers as_arguments."""
        if several_devices():
            cupy = sys.modules["cupy"]
            on = {x.data.device_id for x in arrays if isinstance(x, cupy.ndarray)}
            on.add(cupy.cuda.runtime.getDevice())
            expect(on == {self.chip.device}, "the arrays' or the current device", on, self.chip.device)
        if 0 not in grid:
            if self.function is None:
                self.wait()
            arguments = [self.null if x is None else x for x in arrays] + numbers
            self.function(grid, self.block, arguments, shared)


kernel = functools.cache(Kernel)


def as_arguments(*numbers):
    """What a launch takes for an int, as a long long, and for a number of NumPy's, as what it is."""
    made = long_long()  # kernels read what they need of 8 bytes
    return [made(x if type(x) is int else int(x.view(f"i{x.itemsize}"))) for x in numbers]


def launch(name, block, grid, arrays, sizes, shared=0, **constants):
    """Launch a kernel on the device of its first array."""
    kernel(chip(arrays[0]), name, block, **constants)(grid, arrays, as_arguments(*sizes), shared)


def like(x):
    """What of an array decides how it is read: its dtype, strides and address modulo 16."""
    return x.dtype, x.strides, x.data.ptr % 16


def aligned(x, dtype=None, multiple=1):
    """x in dtype, contiguous and at a multiple of 16 bytes; its last axis padded to a multiple."""
    x, more = x if dtype is None or x.dtype == dtype else x.astype(dtype), -x.shape[-1] % multiple
    if not more and x.flags.c_contiguous and x.data.ptr % 16 == 0:
        return x
    padded = sys.modules["cupy"].zeros((*x.shape[:-1], x.shape[-1] + more), x.dtype)
    padded[..., : x.shape[-1]] = x
    return padded


def standing(x, axes):
    """x [..., *axes] with one batch axis and a contiguous last one; keys stay where they are in a cache."""
    x = x if x.ndim <= axes + 1 else x.reshape(math.prod(x.shape[:-axes]), *x.shape[-axes:])
    return x if x.strides[-1] == x.itemsize or x.shape[-1] == 1 else aligned(x)


def slot_indices(indices):
    """indices as int32, contiguous; what is no key stays so."""
    wide = indices if indices.dtype == np.int32 else indices.astype(np.int64).clip(-1, 2**31 - 1)
    return sys.modules["cupy"].ascontiguousarray(wide, np.int32)


def score_kernel(chip, dtype, real, J, E, T):
    """The kernel of (1) for index_q and index_k in dtype; a block's queries, keys and shared memory."""
    row = E * dtype.itemsize  # tiles: those of 16 keys that fit a warp's registers
    tiles = next((m for width, m in ((128, 4), (256, 2), (512, 1)) if width >= E), 0)
    if chip.sm < 80 or dtype.itemsize > 2 or real == np.float64 or row % 4 or not tiles * J * E:
        return kernel(chip, "index_scores_fma", 256, REAL=real), 8, 512 // real.itemsize, 0
    if chip.sm == 90 and J in (32, 64, 128) and row in (128, 256):
        if T <= FEW and dtype == np.uint8 and J <= 64:
            found = kernel(chip, "index_scores_few_wgmma", 128, J=J, TOGETHER=1 + (T > 1))
            return found, FEW, 256, 34816 + 8192 * (1 + (T > 1))  # struct Few of the kernel
        shared = -(-(512 * row + 3780 + 13 * J // 2) // 1024) * 1024  # struct Shared of the kernel
        found = kernel(chip, "index_scores_wgmma", 384, ELEMENT=dtype, J=J, E=E)
        return found, FEW if T <= FEW else 208, 512 // dtype.itemsize, shared
    heads, vector = min(-(-J // 8) * 8, 64 if E <= 256 else 32), 16 // dtype.itemsize
    sizes = {"J": J, "E": E, "PITCH": -(-E // vector) * vector, "HEADS": heads, "TILES": tiles}
    shared = 2 * heads * (-(-row // 64) * 64 + 20)  # 2 of the kernel's struct Stage
    return kernel(chip, "index_scores_mma", 128, ELEMENT=dtype, **sizes), 64, 64 * tiles, shared


@plan
def queries_of_block(processors, batch, T, S, most, keys):
    """Of index_scores_wgmma, at most `most`, so that no last round is nearly empty if windows end at S."""
    if batch * T * S > 8 * processors * most * keys:  # so many rounds that the last one hardly matters
        return 192
    whole = max(0, S - T) // keys  # tiles that all queries see
    seen = [min(T, S - s) for s in range(whole * keys, S, keys)]  # of the other tiles, by how many

    def cost(queries):  # a block begins in the time of 6 queries by 512 keys
        blocks = batch * (whole * -(-T // queries) + sum(-(-x // queries) for x in seen))
        return -(-blocks // processors) * (queries + 3072 // keys)

    return min(range(8, most + 1, 8), key=cost)


@plan
def score_plan(chip, batch, T, J, E, *likes):
    """(1) for arrays of these likes: the chip, the dtype of scores, and what launches it."""
    (q, k, w), blocks, fits = (dtype for dtype, *_ in likes), math.prod(batch), False
    real, made, first = F64 if F64 in (q, k, w) else F32, long_long(), as_arguments(T)
    found, queries, keys, shared = score_kernel(chip, q if q == k else real, real, J, E, T)
    plain, by_wgmma = found.name == "index_scores_fma", found.name == "index_scores_wgmma"
    dtype, vector, more = (real, 1, (J, E)) if plain else (q, 16 // q.itemsize, (queries,) * by_wgmma)
    last, row = as_arguments(*more), max(1, (E + 4 * (dtype == np.uint8)) * dtype.itemsize)  # bytes of a key
    if found.name.endswith("_wgmma") and (J, E) == (64, 128) and "ml_dtypes" in sys.modules:
        # A guess: DeepSeek-V3.2's attention, which takes longest to compile, will follow its indexer.
        rope, half = (64, np.dtype("bfloat16")) if k == np.uint8 else (None, k)
        latents = half, (k, (), 0), None
        attention_plan(chip, batch, T, (128, 1, 576, 512, rope), 2048, True, 1.0, None, *latents)

    def run(index_q, index_k, weights, k_start, k_end, offset, scores):
        nonlocal fits
        if not fits:
            given = index_q, index_k, weights
            if plain and q == np.uint8:
                index_q, index_k = sys.modules["cupy"].asarray(E4M3)[index_q], unpacked(index_k, E, 0)
            index_q, weights = aligned(index_q, dtype, vector), aligned(weights, real)
            index_k = standing(index_k.astype(dtype, copy=False), 2)
            if index_k.strides[-2] != row or index_k.strides[0] % row or index_k.data.ptr % 16:
                index_k = aligned(index_k)
            same = all(x is y for x, y in zip(given, (index_q, index_k, weights)))
            fits = same and index_k.strides[-2] == row  # of one key it may not be; all like these will fit
        S, many, more = index_k.shape[-2], queries, last
        if by_wgmma and T > FEW:
            many = queries_of_block(chip.processors, blocks, T, min(S, offset + T), queries, keys)
            more = as_arguments(many)
        grid, apart = (blocks * -(-T // many) * -(-S // keys),), index_k.strides[0] // row
        arrays = index_q, index_k, weights, k_start, k_end, scores
        found(grid, arrays, [*first, made(S), made(offset), made(apart), *more], shared)

    return chip, real, run


def scoring(n, q, k, w):
    return score_plan(chip(q), n["..."], n["T"], n["J"], n["E"], like(q), like(k), like(w))


def gpu_index_scores(n, index_q, index_k, weights, k_start, k_end):
    _, real, score = scoring(n, index_q, index_k, weights)
    scores = n["xp"].empty((*n["..."], n["T"], n["S"]), real)
    score(index_q, index_k, weights, k_start, k_end, n["S"] - n["T"], scores)
    return scores


@plan
def topk_plan(chip, real, batch, T, num_keys, top_k, local_window, num_sink_tokens):
    """(2) for rows of up to so many keys, one of TOPK_KEYS: what ranks scores, an array or a pointer."""
    rows, simple = math.prod(batch) * T, real == np.float32 and local_window == num_sink_tokens == 0
    block = 512 if rows > 128 else 1024
    # How many keys stay in a thread's registers, or how many blocks share a row: of few long ones, many.
    held = next((x for x in (8, 16, 32) if simple and num_keys <= min(x * block, 2**14)), 0)
    most = 1 if chip.sm < 90 or num_keys < 8192 or held else 16 if chip.sm in (90, 100, 103) else 8
    blocks = next((x for x in (16, 8, 4) if x <= most and rows * x <= 64), 1)
    block = 512 if blocks > 1 else block
    # Runs that a block has room for: two blocks fit a multiprocessor of sm_90 and of sm_80
    runs = [1] if held else [8192] * (top_k > 2048) + [4096 if chip.sm == 90 else 3584, 2048]
    fixed = 8500 + 2 * held * block + 40000 * (blocks > 1)  # struct Shared of the kernel, but for its runs
    capacity = next(x for x in runs if fixed + 20 * x <= chip.shared)
    sizes = {"BLOCK": block, "BLOCKS": blocks, "HELD": held, "CAPACITY": capacity}
    found, grid = kernel(chip, "select_topk", block, REAL=real, **sizes), (rows * blocks,)
    made, shared, new = long_long(), fixed + 20 * capacity, sys.modules["cupy"].ndarray
    first, last = as_arguments(T), as_arguments(top_k)

    def run(S, offset, scores, k_start, k_end, indices=None):
        K, forced = min(top_k, S), (made(min(local_window, S)), made(min(num_sink_tokens, S)))
        indices = new((*batch, T, K), np.int32) if indices is None else indices
        numbers = [*first, made(S), made(K), made(offset), *last, *forced]
        found(grid, (scores, k_start, k_end, indices), numbers, shared)
        return indices

    return run


def ranking(n, chip, real, top_k, local_window, num_sink_tokens):
    expect(n["S"] <= 2**31 - 2**17, "S", n["S"], "at most 2**31 - 2**17 on a GPU")
    alike = TOPK_KEYS[bisect.bisect_left(TOPK_KEYS, n["S"])]
    return topk_plan(chip, real, n["..."], n["T"], alike, top_k, local_window, num_sink_tokens)


def gpu_select_topk(n, scores, top_k, local_window, num_sink_tokens, k_start, k_end):
    real, S = accumulator(scores), n["S"]
    rank = ranking(n, chip(scores), real, top_k, local_window, num_sink_tokens)
    offset = S if k_start is None and k_end is None else S - n["T"]  # S: of all rows all keys are visible
    return rank(S, offset, aligned(scores, real), k_start, k_end)


def gpu_lightning_select(n, index_q, index_k, weights, k_start, k_end, last=0, indices=None, **quota):
    """(1), then (2), for as many queries at a time as SCORE_BYTES hold. last: how many more follow."""
    batch, T, S = n["..."], n["T"], n["S"]
    (on, real, score), rows = scoring(n, index_q, index_k, weights), math.prod(batch) * T
    most = max(1, SCORE_BYTES // max(1, S * real.itemsize))  # queries at a time
    if rows <= most:
        rank = ranking(n, on, real, **quota)  # compiles beside the scores
        memory = sys.modules["cupy"].cuda.alloc(rows * S * real.itemsize)  # an array costs four times as much
        (scores,), offset = as_arguments(memory.ptr), S - T - last
        score(index_q, index_k, weights, k_start, k_end, offset, scores)
        return rank(S, offset, scores, k_start, k_end, indices)
    most = most if most < 64 else most - most % 64  # whole blocks of index_scores_mma
    indices = n["xp"].empty((*batch, T, n["K"]), np.int32)
    for b, t in itertools.product(np.ndindex(*batch), range(0, T, most)):
        part, end = (*b, slice(t, t + most)), min(T, t + most)
        some, given = n | {"...": (), "T": end - t}, (index_q, weights, k_start, k_end)
        q, w, start, stop = (x if x is None else x[part] for x in given)
        gpu_lightning_select(some, q, index_k[b], w, start, stop, T - end, indices[part], **quota)
    return indices


def attend_tile(chip, shape, real, tied, q, *given):
    """Which kernel attends: its name, its block and the heads and keys of that, shared memory, constants."""
    (H, G, D, Dv, rope), (k, v) = shape, (dtype for dtype, *_ in given)
    heads, rank = H // G, 0 if rope is None else D - rope  # rank: the values of packed keys in 8 bits
    widths = packed_bytes(D, rope) if rank else D * k.itemsize, Dv * v.itemsize
    align = [math.gcd(16, at, *strides[:-1], width) for (_, strides, at), width in zip(given, widths)]
    stored, sizes = {"R8": rank, "ROPE": rope or 0, "TIED": int(tied)}, {"D": D, "DV": Dv, "TYPE": q}
    alike = rank % 8 == stored["ROPE"] % 8 == 0 and q.name == "bfloat16" if rank else q == k == v
    tensor_cores = q.itemsize == 2 and alike and min(align) >= 4 and chip.sm >= 80 and D * Dv
    small = 0 < heads <= 16 and D + Dv <= (512 if heads < 8 else 256) and max(D, Dv) <= 256
    if tensor_cores and small and not rank and align == [16, 16] and D % 8 == Dv % 8 == 0:
        return "attend_few_mma", 128, heads, 64, 0, sizes
    latent = tied and G == 1 and heads >= 32 and D in (512, 576) and Dv == 512 and rank in (0, 512)
    if tensor_cores and latent and chip.sm == 90 and align[0] == 16:
        return "attend_wgmma", 512, 64, 64, 3 * 128 * D + 9216, stored | sizes  # struct Plan of the kernel
    row, columns = -(-D // 64) * 64, -(-Dv // 128) or 1
    key = 8 + 2 * row + (-(-widths[0] // 16) * 16 if rank else 2 * row) + (0 if tied else 256 * -(-Dv // 64))
    # The first tile that fits shared memory, with keys of so many bytes, and registers: 16 heads by 16 values
    # take 8 of 128 that a thread can spare.
    for block, keys in itertools.product((64, 32, 16), (64, 32)) if tensor_cores and heads >= 8 else ():
        maxima = 4 * block * (min(8 // min(2, block // 16), keys // 8) + 1)
        shared = block * (2 * row + 128) + keys * key + maxima
        fits = shared <= chip.shared and block // 16 * columns * 8 <= 128
        if fits and (block == 16 or block < 2 * heads):
            tile = {"KEYS": keys, "VEC": align[0], "VVEC": align[1]}
            return "attend_mma", 256, block, keys, shared, stored | sizes | tile
    some = next(x for x in (8, 4, 2, 1) if x == 1 or (x < 2 * heads and x * D * real.itemsize <= 40960))
    types = {"QT": q, "KT": k, "VT": v, "ACC": real, "COLUMNS": columns}
    return "attend", 128, some, 32, some * D * real.itemsize, stored | types


@plan
def attention_plan(chip, batch, T, shape, slots, sparse, scale, dtype, q, k, v):
    """What launches (3), of so many slots a query, for q in a dtype and arrays like k and v, or k alone."""
    (H, G, D, Dv, _), rows, tied, v = shape, math.prod(batch) * T, v is None, v or k
    real, out_dtype = F64 if F64 in (q, k[0], v[0]) else F32, np.dtype(dtype or q)
    name, block, heads, keys, shared, sizes = attend_tile(chip, shape, real, tied, q, k, v)
    # Few rows of queries share their tiles of keys out over more blocks, whose parts are merged.
    blocks, tiles = rows * G * -(-(H // G) // heads), max(1, -(-slots // keys))
    each = -(-tiles // min(tiles, max(1, 128 // max(1, blocks))))  # tiles of keys in a split
    splits, columns = -(-tiles // each), -(-Dv // 128) or 1
    grid = (min(blocks * splits, chip.processors),) if name == "attend_wgmma" else (blocks, splits)
    attend = kernel(chip, name, block, HEADS=heads, OUT=real if splits > 1 else out_dtype, **sizes)
    loads = min(max(1, 512 // real.itemsize // columns), 8 if splits <= 8 else 32)  # fit a thread's registers
    types = {"ACC": real, "OUT": out_dtype, "COLUMNS": columns, "LOADS": loads}
    merge = kernel(chip, "merge_attention", 128, **types) if splits > 1 else None
    strides = [stride // x.itemsize for x, at, _ in (k, v) for stride in (0, *at)[-4:-1]]
    more = {"attend": (D, Dv), "attend_wgmma": (rows, splits)}.get(name, ())
    last = as_arguments(H, G, slots if sparse else -1, each * keys, *strides, np.float64(scale), *more)
    xp, made, first = sys.modules["cupy"], long_long(), as_arguments(T)
    merged, results = as_arguments(splits, rows * H, H, Dv), (*batch, T, H, Dv)
    lse_bytes, lse_at = rows * H * real.itemsize, -(-rows * H * Dv * out_dtype.itemsize // 16) * 16

    def run(num_keys, sink, *arrays):
        numbers = [*first, made(num_keys), *last]
        memory = xp.cuda.alloc(lse_at + lse_bytes)  # for both, as it costs half as much as a launch
        out, lse = xp.ndarray(results, out_dtype, memory), xp.ndarray(results[:-1], real, memory + lse_at)
        ends = None if sink is None else xp.ascontiguousarray(sink, real), out, lse
        if merge:
            memory = xp.cuda.alloc(splits * lse_bytes * (Dv + 1))
            parts = as_arguments(memory.ptr, memory.ptr + splits * lse_bytes * Dv)
            attend(grid, (*arrays, None, *parts), numbers, shared)
            merge((rows * H,), (*parts, *ends), merged)
        else:
            attend(grid, (*arrays, *ends), numbers, shared)
        return out, lse

    return run


def gpu_attention(n, q, k, v, d_v, scale, sink, indices=None, k_start=None, k_end=None, out_dtype=None):
    """(3) over indices, or else windows. n["rope"]: k [..., S, 1, packed] is packed, with that rope."""
    on, D, Dv = chip(q), n["D"], d_v if v is None else v.shape[-1]
    # Values that are k[..., :Dv] are read once.
    tied = v is None or (Dv <= D and (k.data.ptr, k.strides, k.dtype) == (v.data.ptr, v.strides, v.dtype))
    q, k, v = aligned(q), standing(k, 3), None if tied else standing(v, 3)
    slots, indices = (n["S"], None) if indices is None else (indices.shape[-1], slot_indices(indices))
    shape, sparse = (n["H"], k.shape[-2], D, Dv, n.get("rope")), indices is not None
    how = slots, sparse, scale, out_dtype, q.dtype, like(k), v if tied else like(v)
    run = attention_plan(on, n["..."], n["T"], shape, *how)
    return run(n["S"], sink, q, k, k if tied else v, indices, k_start, k_end)


def gpu_attend_to_cache(cache, q, indices, **options):
    """sparse_attention over a cache as it is stored, also over the entries of tied latents in fp8."""
    (B, T, H, D), k, v = q.shape, cache.streams.get("k"), cache.streams.get("v")
    rope = cache.qk_rope_head_dim if cache._codec else None
    fits = k and len(k) == 2 and k[1] == D and H % k[0] == 0 and (not v or (len(v) == 2 and v[0] == k[0]))
    if not fits or (rope is not None and (v or k[0] > 1)):  # an error, or what has to be decoded
        return sparse_attention(q, cache.read("k"), cache.read("v") if v else None, indices, **options)
    n = {"...": (B,), "T": T, "S": max(cache.lengths.tolist()), "H": H, "D": D, "xp": cache.xp, "rope": rope}
    check_options(n, given := {"q": q, "k": cache._data["k"], "v": cache._data.get("v"), **options})
    return gpu_attention(n, indices=indices, **given)


def gpu_quantized(x, block, scale, least, rope=0, entries=None):
    """quantized, byte for byte; or packed to entries [rows, bytes]."""
    xp, (*rows, width), acc = sys.modules["cupy"], x.shape, accumulator(x)
    blocks, codes = -(-(width - rope) // block), entries
    if entries is None:
        codes, scales = xp.empty(x.shape, np.uint8), xp.empty((*rows, blocks), np.float32)
        place = width, 4 * blocks, 0, 0  # how far apart rows are, and where scales and the bfloat16 begin
    else:
        scales, place = entries, (*entries.strides[:1] * 2, width - rope, entries.shape[1] - 2 * rope)
    sizes = x.size // max(1, width), width - rope, rope, width, *place, np.float32(least)
    grid = (-(-sizes[0] * (blocks + (rope > 0)) // 8),)
    x, how = xp.ascontiguousarray(x), {"BLOCK": block, "UE8M0": int(scale == "ue8m0"), "XT": x.dtype}
    launch("quantize_fp8", 256, grid, (x, codes, scales), sizes, ACC=acc, **how)
    return codes, scales


def gpu_packed(x, rope, out=None):
    """packed, byte for byte."""
    width = packed_bytes(x.shape[-1], rope)
    out = sys.modules["cupy"].ndarray((*x.shape[:-1], width), np.uint8) if out is None else out
    rows = out.reshape(-1, width)
    gpu_quantized(x, FP8_BLOCK, "ue8m0", 448e-4 if rope else 1e-4, rope, rows)
    if rows.data.ptr != out.data.ptr:  # a copy, as they are not evenly apart
        out[...] = rows.reshape(out.shape)
    return out


# Training: what section 13 does for a block of queries, here for as many, M, as SLOT_BYTES hold. N: the slots
# of a query, or all keys; r: the heads of a group.
def gpu_sparse_attention_backward(n, q, k, v, indices, out, lse, dout, d_v, scale, sink):
    (H, G, D), Dv, tied = (n[axis] for axis in "HGD"), out.shape[-1], v is None
    r, inputs, on = H // G, (q, k, k if tied else v), chip(q)
    acc, alike = accumulator(*inputs), {x.dtype for x in inputs} == {dout.dtype}
    z, norms = sink if sink is None else sink.astype(acc), n["xp"].empty((*lse.shape, 2), acc)
    lse, dout, out = aligned(lse, acc), aligned(dout), aligned(out)
    arrays, sizes, grid = (dout, out, lse, z, norms), (lse.size, H, Dv), (-(-lse.size // 8),)
    launch("attend_backward_norms", 256, grid, arrays, sizes, TYPE=dout.dtype, OUT=out.dtype, ACC=acc)
    # Which of the three ways below is fastest, as measured
    by_mma = q.dtype.name == "bfloat16" and on.sm >= 80
    narrow = alike and not tied and q.itemsize == 2 and D % 8 == Dv % 8 == 0 < min(D, Dv) <= max(D, Dv) <= 128
    latent = alike and tied and G == 1 and D in (512, 576) and Dv == 512 and (H % 32 == 0 or H < 32)
    pairs = by_mma and ((latent and on.sm == 90) or (narrow and 2 < r <= 16))
    others = gradients_by_rows if narrow and r <= 4 else gradients_of_slots
    grads = (gradients_of_pairs if pairs else others)(n, q, k, v, indices, dout, norms, scale)
    if z is not None:
        from_z = np.where(lse == -np.inf, 0, norms[..., 1] / (1 + np.exp(lse - z)))
        grads += (-from_z.sum(tuple(range(lse.ndim - 1))),)
    wanted = itertools.zip_longest(grads, (q, k, v, sink))
    return tuple(None if x is None else d.astype(x.dtype, copy=False) for d, x in wanted)


def gradients_of_slots(n, q, k, v, indices, dout, norms, scale):
    """dq, dk and dv of any shape and type: the keys of each slot are gathered, cuBLAS multiplies them."""
    xp, (S, H, G, D), N, Dv = n["xp"], (n[axis] for axis in "SHGD"), indices.shape[-1], dout.shape[-1]
    r, tied, acc, width = H // G, v is None, norms.dtype, D if v is None else D + Dv
    kind, (q, k, dout, *v) = factors(acc, q, k, dout, *(() if tied else (v,)))
    dq, dkv = xp.empty(q.shape, acc), xp.zeros((*k.shape[:-1], width), acc)  # [dk | dv]
    bytes_each = 2 * H * D * kind.itemsize + N * ((G * width + 2 * H) * (kind.itemsize + acc.itemsize) + 32)
    for b, at, rows in query_chunks(n, indices, bytes_each, whole=chip(q).processors):
        M, keys = len(rows), gathered_slots(k[b], rows)  # [M * G, N, D]
        values = keys[..., :Dv] if tied else gathered_slots(v[0][b], rows)
        q_t, dout_t = q[at].reshape(M * G, r, D), dout[at].reshape(M * G, r, Dv)
        s, dp = product(q_t, keys.swapaxes(1, 2)), product(dout_t, values.swapaxes(1, 2))  # [M * G, r, N]
        pairs = xp.empty((M * G, 2, r, N), kind)  # dS and P
        arrays, sizes = (s, dp, rows, norms[at], pairs), (N, H, G, S, np.float64(scale))
        launch("attend_backward", 256, (M * H,), arrays, sizes, TYPE=kind, ACC=acc)
        product(pairs[:, 0], keys, dq[at].reshape(M * G, r, D))
        by_key = pairs.reshape(M * G, 2 * r, N).swapaxes(1, 2)
        if tied:  # one product: [dS, P]^T [q, dout]
            both = xp.zeros((M * G, 2, r, D), kind)
            both[:, 0], both[:, 1, :, :Dv] = q_t, dout_t
            slots = product(by_key, both.reshape(M * G, 2 * r, D))
        else:  # [dS^T q, P^T dout]
            slots = xp.empty((M * G, N, width), acc)
            product(by_key[..., :r], q_t, slots[..., :D])
            product(by_key[..., r:], dout_t, slots[..., D:])
        add_by_key(rows, slots, dkv[b])
    return dq, dkv[..., :D], dkv[..., D:]


def gradients_of_pairs(n, q, k, v, indices, dout, norms, scale):
    """Of latents and narrow heads in bfloat16: kernels find dq and, all that is stored, a slot's dS and P."""
    xp, (S, H, G, D), N, tied = n["xp"], (n[axis] for axis in "SHGD"), indices.shape[-1], v is None
    many, parts = tied and H > 8, -(-H // 32) if tied else -(-H // G // 8)
    q, k, dout, *v = map(aligned, (q, k, dout, *(() if tied else (v,))))
    width, dq = D if tied else D + dout.shape[-1], xp.empty(q.shape, q.dtype)
    sums = xp.zeros((*k.shape[:-1], width), np.float32)
    of_slot, blocks = (64 * parts,) if tied else (G, parts, 2, 8), -(-parts // 2)  # of latents, a query's
    bytes_each = N * 2 * math.prod(of_slot) + many * (128 * parts * D + N * (4 * D + 32))
    whole = max(1, chip(q).processors // blocks) if many else 1  # whose blocks take a turn of all processors
    for b, at, rows in query_chunks(n, indices, bytes_each, whole=whole):
        M, pairs = len(rows), xp.empty((len(rows), N, *of_slot), q.dtype)
        if tied:
            both = xp.empty((M, 64 * parts, D), q.dtype) if many else None
            arrays = q[at], dout[at], k[b], norms[at], rows, dq[at], both, pairs
            sizes, shared = (S, H, N, np.float64(scale)), 384 * D + 8192 + D // 4  # struct Plan of the kernel
            launch("attend_backward_wgmma", 384, (M * blocks,), arrays, sizes, shared, D=D)
        else:
            pairs_of_rows(q[at], dout[at], k[b], v[0][b], norms[at], rows, dq[at], pairs, scale)
        if many:  # cuBLAS multiplies the pairs by [q, dout], both in parts of 32 heads
            add_by_key(rows, product(pairs, both), sums[b])
        elif N * S:  # a kernel does, and adds up, for a tile of keys at a time
            add_by_tile(q[at], dout[at], rows, pairs, sums[b], tied)
    return dq, sums[..., :D], sums[..., D:]


def pairs_of_rows(q, dout, k, v, norms, rows, dq, pairs, scale):
    """dq of narrow heads in bfloat16, and the pairs, if they are wanted."""
    (S, G, D), (M, N), H, DV = k.shape, rows.shape, q.shape[1], v.shape[2]
    arrays, sizes = (q, dout, k, v, norms, rows, dq, pairs), (S, H, G, N, np.float64(scale))
    shared = 2**14 * (-(-D // 64) + -(-DV // 64))  # struct Tiles of 4 warps
    launch("attend_backward_mma", 128, (M * G * -(-H // G // 8),), arrays, sizes, shared, D=D, DV=DV)


def add_by_tile(q, dout, rows, pairs, sums, tied):
    """sums [S, G, D or D + Dv] += what the slots rows [M, N] bring, of q [M, H, D] and dout."""
    (S, G, _), (_, H, D), Dv, tiles = sums.shape, q.shape, dout.shape[2], -(-len(sums) // 128)
    columns = 192 if D == 576 else 128 if max(D, Dv) > 64 else 64
    blocks = tiles * G * (-(-D // columns) + (0 if tied else -(-Dv // columns)))
    segments, block = max(1, 1536 // blocks), 2 * columns  # so that a tile that all see takes no longer
    parts = sys.modules["cupy"].empty((segments, *sums.shape), sums.dtype)
    order, first = slots_by_key((rows >> 7).astype(np.uint16 if S <= 2**23 else np.int32), tiles)
    shared = -(-(55344 + 256 * (columns + 8) + 12 * (640 // block * block) + block // 8) // 16) * 16
    arrays, sizes = (q, dout, rows, pairs, order, first, parts), (S, H, G, rows.shape[1])
    how = {"D": D, "DV": Dv, "TIED": int(tied), "COLUMNS": columns, "SEGMENTS": segments}
    launch("attend_backward_keys_mma", block, (blocks * segments,), arrays, sizes, shared, **how)
    sums += parts.sum(0)


def gradients_by_rows(n, q, k, v, indices, dout, norms, scale):
    """Of narrow heads that few share a key: dq over a query's keys, then dk and dv over a key's queries."""
    xp, (T, S, H, G), K, D = n["xp"], (n[axis] for axis in "TSHG"), indices.shape[-1], q.shape[-1]
    how = {"sizes": (S, H, G, K, np.float64(scale)), "TYPE": q.dtype, "D": D, "DV": v.shape[-1]}
    by_mma, (q, k, v, dout) = q.dtype.name == "bfloat16" and chip(q).sm >= 80, map(aligned, (q, k, v, dout))
    dq, *dk_dv = (xp.empty(x.shape, x.dtype) for x in (q, k, v))
    for b in np.ndindex(*n["..."]):
        rows, pairs = slot_indices(indices[b]), (q[b], dout[b], k[b], v[b], norms[b])
        if by_mma:
            pairs_of_rows(*pairs, rows, dq[b], None, scale)
        else:
            launch("attend_backward_rows", 128, (T * H,), (*pairs, rows, None, dq[b], None), BY_KEY=0, **how)
        order, first = slots_by_key(rows, S)
        queries = (order // K).astype(np.int32)
        arrays = k[b], v[b], q[b], dout[b], norms[b], queries, first, *(x[b] for x in dk_dv)
        launch("attend_backward_rows", 128, (S * G,), arrays, BY_KEY=1, **how)
    return dq, *dk_dv


def gpu_attention_target(n, q, k, indices=None, *, scale, k_start, k_end):
    """attention_target; over windows one product serves all queries, as they share a group's keys."""
    xp, (S, H, G, D), acc = n["xp"], (n[axis] for axis in "SHGD"), accumulator(q, k)
    r, N, dense = H // G, S if indices is None else indices.shape[-1], indices is None
    target, (kind, (q, k)) = xp.zeros((*n["..."], n["T"], N), acc), factors(acc, q, k)
    bytes_each = N * (H * acc.itemsize + 32 + (not dense) * G * D * kind.itemsize)
    for b, at, rows in query_chunks(n, indices, bytes_each, (k_start, k_end)):
        M, heads = len(rows), q[at].reshape(len(rows), G, r, D)
        if dense:
            heads = xp.ascontiguousarray(heads.swapaxes(0, 1)).reshape(G, M * r, D)
            keys, strides = k[b].swapaxes(0, 1), (r * N, M * r * N)  # [G, N, D]
        else:
            heads, keys, strides = heads.reshape(M * G, r, D), gathered_slots(k[b], rows), (H * N, r * N)
        arrays = product(heads, keys.swapaxes(1, 2)), rows, xp.empty((M, H), acc), target[at]
        for step, (block, grid) in enumerate(((32, M * H), (256, M * -(-N // 256)))):
            sizes = S, N, H, r, *strides, np.float64(scale)
            launch("attention_target", block, (grid,), arrays, sizes, ACC=acc, STEP=step)
    return target


def gpu_loss_of_rows(n, index_q, index_k, weights, target, indices, k_start, k_end):
    """indexer_loss; over windows one product serves all queries, as they share the keys."""
    xp, (S, J, E), like = n["xp"], (n[axis] for axis in "SJE"), (index_q, weights, index_k)
    acc, N, dense = accumulator(*like), target.shape[-1], indices is None
    kind, (index_q, index_k) = factors(acc, index_q, index_k)
    weights, target = aligned(weights, acc), aligned(target, acc)
    losses, d_k = xp.empty((*n["..."], n["T"])), xp.zeros(index_k.shape, acc)
    d_q, d_w = xp.empty(index_q.shape, kind), xp.empty(weights.shape, acc)
    bytes_each = N * ((J + (not dense) * E) * (kind.itemsize + acc.itemsize) + 2 * acc.itemsize + 32)
    for b, at, rows in query_chunks(n, indices, bytes_each, (k_start, k_end)):
        M, q, keys = len(rows), index_q[at], rows  # [M, J, E]
        if dense:  # what nobody sees, or sees nothing, is 0
            seen, sees = ((rows >= 0).any(axis) for axis in (0, 1))
            q = gathered_slots(q.reshape(M, 1, J * E), np.where(sees, xp.arange(M), -1)[None])
            q, keys = q.reshape(1, M * J, E), np.where(seen, xp.arange(S), -1)[None]
        keys = gathered_slots(index_k[b][:, None], keys)  # [1 or M, N, E]
        r = product(q, keys.swapaxes(1, 2))  # [M, J, N], or [1, M * J, N]
        d_i, d_r = xp.empty((M, N), acc), xp.empty(r.shape, kind)
        arrays = r, weights[at], target[at], rows, d_i, d_w[at], d_r, losses[at]
        for step, grid in enumerate((M * -(-N // 256), M, M * J)):
            launch("indexer_loss", 256, (grid,), arrays, (S, N, J), ACC=acc, TYPE=kind, STEP=step)
        product(d_r, keys, d_q[at].reshape(q.shape))
        slots = product(d_r.swapaxes(1, 2), q)  # [1 or M, N, E]
        if dense:
            d_k[b] += slots[0]
        else:
            add_by_key(rows, slots, d_k[b][:, None])
    return losses, *(d.astype(x.dtype, copy=False) for d, x in zip((d_q, d_w, d_k), like))


def query_chunks(n, indices, bytes_each, windows=(), whole=1):
    """b, where so many of its queries stand as SLOT_BYTES hold, and their slots [M, N] int32: of indices, or
    all keys where they are None; -1 for what windows hide.

    M * G is a grid's y, which ends at 65,535. whole: M is a multiple of it if more queries fit.
    """
    most = max(1, min(SLOT_BYTES // max(1, bytes_each), 65535 // n.get("G", 1)))
    most = most - most % whole or most
    hide = indices is None or any(w is not None for w in windows)
    windows = filled(n, windows) if hide else ()
    for b, t in itertools.product(np.ndindex(*n["..."]), range(0, n["T"], most)) if n.get("H", 1) else ():
        at = *b, slice(t, t + most)
        rows = n["xp"].arange(n["S"])[None] if indices is None else indices[at]
        yield b, at, slot_indices(visible(rows, *(w[at] for w in windows)) if hide else rows)


def factors(acc, *arrays):
    """A dtype that cuBLAS multiplies and sums in acc, and the arrays in it, `aligned`: theirs, or acc.

    Not float16: gradients of its scores are often so small that it would round them to 0.
    """
    kind, *others = {x.dtype for x in arrays}
    if others or kind.name != "bfloat16" or acc != np.float32 or chip(arrays[0]).sm < 80:
        kind = acc
    return kind, [aligned(x.astype(kind, copy=False)) for x in arrays]


def gathered_slots(x, rows):
    """x [S, G, D] at rows [M, N] -> [M * G, N, D], zeros where a row is no key."""
    (S, G, D), (M, N), rows = x.shape, rows.shape, rows.astype(np.int32, copy=False)
    taken = sys.modules["cupy"].empty((M * G, N, D), x.dtype)
    unit = math.gcd(16, x.data.ptr, D * x.itemsize)  # bytes at a time
    sizes = N, S, G, D * x.itemsize // unit
    launch("gather", 256, (-(-N // 8), M * G), (x, rows, taken), sizes, UNIT=UNITS[unit])
    return taken


def product(a, b, out=None):
    """a [N, m, k] @ b [N, k, n] of one dtype, by cuBLAS -> [N, m, n], or out, in the dtype of its sums.

    Of the last two axes of a and b one is contiguous; the rows of out may stand further apart. a and out may
    be [B, T, N, k or n], of evenly spaced rows m = B * T: to make views of them takes time.
    """
    cupy = sys.modules["cupy"]
    out = cupy.empty((*a.shape[:2], b.shape[2]), accumulator(a)) if out is None else out
    if not a.size * out.size:
        out[...] = 0
        return out
    before, between, after, how = product_plan(*((x.shape, x.strides, x.dtype) for x in (a, b, out)))
    handle, multiply = cupy.cuda.get_cublas_handle(), cupy.cuda.cublas.gemmStridedBatchedEx
    multiply(handle, *before, b.data.ptr, *between, a.data.ptr, *after, out.data.ptr, *how)
    return out


@plan
def product_plan(a, b, out):
    """What cuBLAS is told of such arrays: in front of their pointers, between them and behind."""

    def operand(shape, strides, dtype):  # [N, m, k], transposed?, type, the lengths of a row and of a matrix
        if len(shape) == 4:
            shape, strides = (shape[2], shape[0] * shape[1], shape[3]), (strides[2], strides[1], strides[3])
        (_, rows, columns), (matrix, row, column) = shape, (stride // dtype.itemsize for stride in strides)
        straight = (column == 1 or columns == 1) and (row >= columns or rows == 1)
        row = max(row, columns) if straight else column
        return shape, int(not straight), CUDA_R[dtype.char], row, matrix

    # cuBLAS goes by columns, to which our rows are the transpose: out^T = b^T a^T.
    ((N, m, k), a_t, *a_is), (b_shape, b_t, *b_is), (_, _, *out_is) = (operand(*x) for x in (a, b, out))
    one, zero, how = SUMS[F64 if a[2] == F64 else F32]
    return (b_t, a_t, b_shape[2], m, k, one), b_is, (*a_is, zero), (*out_is, N, *how)


def add_by_key(rows, slots, sums):
    """sums [S, G, W] += slots [M * G, N, W] of the keys rows [M, N]; others than 0 .. S - 1 are none."""
    (S, G, width), acc = sums.shape, sums.dtype
    if slots.size:
        wide = math.gcd(width, 16 // acc.itemsize)  # values that a thread takes of a row
        arrays, sizes = (slots, *slots_by_key(rows, S), sums), (rows.shape[1], G, width // wide)
        block = min(1024, -(-width // wide // 32) * 32)
        launch("add_by_key", block, (S * G,), arrays, sizes, ACC=acc, WIDE=wide)


def slots_by_key(rows, num_keys):
    """The slots rows [M, N] by key, and of one key in order; and where each key's begin, [num_keys + 1]."""
    rows, keys = rows.ravel(), sys.modules["cupy"].arange(num_keys + 1)
    order = rows.argsort(kind="stable")
    return order, rows[order].searchsorted(keys)


def gpu_select_by(n, q, k, score, top_k, k_start, k_end, **forced):
    """select_topk of score(q, k, s, start, end), array code, for blocks of queries; q: one or several."""
    xp, windows, queries = n["xp"], filled(n, (k_start, k_end)), q if isinstance(q, tuple) else (q,)
    indices = xp.empty((*n["..."], n["T"], n["K"]), np.int32)
    for b, t in blocks(n):
        start, end = (w[b][t] for w in windows)
        x = score(*(x[b][t] for x in queries), k[b], xp.arange(n["S"]), start[:, None], end[:, None])
        x = xp.broadcast_to(x, (len(start), n["S"]))
        indices[b][t] = select_topk(x, top_k, k_start=start, k_end=end, **forced)
    return indices


def gpu_predictive_select(n, index_q, index_k, weights, top_k, candidates, widen, block, **rest):
    forced = {name: rest[name] for name in ("local_window", "num_sink_tokens")}

    def score(index_q, weights, candidates, index_k, s, start, end):
        start, end = start[:, 0], end[:, 0]
        seen = near(candidates, widen, block, n["S"], start, end, **forced)
        return np.where(seen, index_scores(index_q, index_k, weights, k_start=start, k_end=end), -np.inf)

    return gpu_select_by(n, (index_q, weights, candidates), index_k, score, top_k, **rest)


def gpu_slow_tier(cache, shape, before):
    """The slow tier as an array of CuPy's in pinned memory of the host, where kernels reach it."""
    expect(cache.path is None, "path", repr(cache.path), "None, as the slow tier is no file")
    cuda, nbytes = cache.xp.cuda, math.prod(shape) * cache.dtype.itemsize
    memory = cuda.alloc_pinned_memory(nbytes)
    owner = lambda: memory  # noqa: E731
    weakref.finalize(owner, cuda.Device().synchronize).atexit = False  # who still reads it does so until here
    at = cuda.MemoryPointer(cuda.UnownedMemory(memory.ptr, nbytes, owner), 0)
    slow = cache.xp.ndarray(shape, cache.dtype, at)
    slow[: len(before)] = before
    return slow


def gpu_rounded_to_fp8(x):
    """rounded_to_fp8 in bfloat16, which is exact, and what tensor cores take."""
    return dequantize_fp8(*quantize_fp8(x)).astype(importlib.import_module("ml_dtypes").bfloat16)


# The layer, whose weights may be in bfloat16: what multiplies them is rounded to it, and sums are float32.
def gpu_as_kept(w, dtype):
    """In dtype, but matrices in bfloat16 where all are; those of OF_X lie one behind another."""
    xp, half = sys.modules["cupy"], {x.dtype.name for x in w.values() if x.ndim == 2} == {"bfloat16"}
    kept = {x: xp.ascontiguousarray(w[x], w[x].dtype if half and w[x].ndim == 2 else dtype) for x in w}
    own = {name: kept[name] for name in OF_X if name in kept}
    *ends, _ = itertools.accumulate(map(len, own.values()))
    return kept | dict(zip(own, xp.split(xp.concatenate([*own.values()]), ends)))


def gpu_made_of_x(x, w, turn, d):
    """One product and one launch. The indexer's weights have no factor, which would change no selection."""
    cupy, (B, T, _), (cos, sin, *place) = sys.modules["cupy"], x.shape, turn
    own, norms = [w[name] for name in OF_X if name in w], [w.get(name) for name in NORMS]
    y = gpu_projected(x, cupy.concatenate(own) if own[0].base is None else own[0].base)  # None: of a copy
    Q, R, rope, E = len(norms[0]), len(norms[1]), d.qk_rope_head_dim, d.index_head_dim
    normed, arrays = cupy.ndarray((B, T, Q), x.dtype), (*norms, cos, sin)
    eps, interleaved = map(np.float64, (d.norm_eps, d.index_norm_eps)), int(d.index_rope_interleaved)
    sizes, grid = (*place, y.shape[-1], Q, R, rope, E, interleaved, *eps), (B * T, 2 + (len(own) > 2))
    launch("made_of_x", 256, grid, (y, normed, *arrays), sizes, ACC=y.dtype, OUT=x.dtype)
    k, at = y[:, :, None, Q : Q + R + rope], Q + R + rope
    return (normed, k, y[:, :, None, at : at + E], y[..., at + E :]) if len(own) > 2 else (normed, k)


def gpu_projected(x, weight, dtype=None):
    cupy, acc, (N, width) = sys.modules["cupy"], accumulator(weight), weight.shape
    x = aligned(x, weight.dtype)
    y = cupy.ndarray((*x.shape[:-1], N), dtype if dtype == weight.dtype else acc)
    if y.size:  # by columns, to which our rows are the transpose: y^T = weight x^T
        kind, (one, zero, how), multiply = CUDA_R[weight.dtype.char], SUMS[acc], cupy.cuda.cublas.gemmEx
        factors = weight.data.ptr, kind, width, x.data.ptr, kind, width
        out, sizes = (y.data.ptr, CUDA_R[y.dtype.char], N), (N, y.size // N, width)
        multiply(cupy.cuda.get_cublas_handle(), 1, 0, *sizes, one, *factors, zero, *out, *how)
    return y.astype(dtype or acc, copy=False)


@functools.lru_cache(maxsize=8)
def turn_table(d, length, dtype, device):
    """cos and sin at the first positions, [length, 1, rope / 2]; all layers of a model share it."""
    xp = sys.modules["cupy"]
    with xp.cuda.Device(device):
        angles = xp.arange(length)[:, None, None] * xp.asarray(d.frequencies())
        table = [(d.rope_attention_factor * f(angles)).astype(dtype) for f in (np.cos, np.sin)]
        xp.cuda.get_current_stream().synchronize()  # as other streams may read it next
    return table


def gpu_turns(x, start, d):
    """cos and sin, the place of the first token in them, and after how many tokens it begins again there."""
    T, start = x.shape[1], start.tolist()
    last = max(start, default=0)
    cos, sin = turn_table(d, 1 << max(12, (last + T).bit_length()), accumulator(x), x.data.device_id)
    if start.count(last) == len(start):  # then nothing goes to the device
        return cos, sin, last, T
    at = sys.modules["cupy"].asarray(np.add.outer(start, np.arange(T)))
    return cos[at], sin[at], 0, at.size


def gpu_rotate(x, turn, interleaved, out=None):
    (B, T, H, d), (cos, sin, *place), y = x.shape, turn, x if out is None else out
    apart = [stride // x.itemsize for stride in (*x.strides[1:3], *y.strides[1:3])]
    sizes, grid = (*place, H, d // 2, *apart, int(interleaved)), (B * T, -(-H * d // 512))
    launch("rotate", 256, grid, (x, y, cos, sin), sizes, TYPE=x.dtype, ACC=cos.dtype)


# gpu_x runs x where the arrays are CuPy's.
gpu_dense_attention = gpu_sparse_attention = gpu_attention
gpu_by_heads, gpu_by_rows = product, gpu_projected
KERNELS |= {(name[4:], "cupy"): run for name, run in [*globals().items()] if name.startswith("gpu_")}
