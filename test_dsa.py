# SPDX-License-Identifier: MIT
# /// script
# requires-python = ">=3.10"
# dependencies = ["numpy>=2.0", "pytest>=9", "hypothesis", "ml_dtypes", "threadpoolctl"]
# ///
"""DeepSeek Sparse Attention: the rules of its stages and the properties of dsa.py, against brute force.

    pytest test_dsa.py                            the whole suite, against dsa.py beside it
    python test_dsa.py --impl my_module           the rules below alone, for my_module.py: a report
    python test_dsa.py --impl my_module --stages index_scores --arrays torch:cuda --dtypes bfloat16
    HYPOTHESIS_PROFILE=ci pytest test_dsa.py      more examples, new ones on every run

`pytest test_dsa.py --impl my_module` is the same report; beside a copy of this file alone, pytest knows the
options by `python -m pytest -p test_dsa`. A module has some of the functions below, called as here; it is
given arrays of one library (--arrays) and returns the same kind. It fails (status 1) if a rule is broken, a
stage of --stages is missing, or nothing was tested. --dtypes, --heads, --widths and --max-top-k say what a
kernel supports, --tolerance is a factor on what is allowed, --strict asks for errors too.

The rules of a stage, in the order in which they are tried. T queries, S keys, H query heads, G key heads, J
index heads; any leading batch axes. A stage leaves its input as it was, and a result depends on no other row.

index_scores(index_q, index_k, weights, *, k_start=None, k_end=None) -> scores
  scores[t,s] = sum_j weights[t,j] * relu(index_q[t,j] . index_k[s]): signed weights, no scale, no softmax
select_topk(scores, top_k, *, local_window=0, num_sink_tokens=0, k_start=None, k_end=None) -> indices
  the top_k greatest scores of a row: their positions, ascending, in int32
  of equal scores the lowest positions are kept
  -inf is never selected; a row is filled with -1 at its end, up to width min(top_k, S)
lightning_select(index_q, index_k, weights, top_k, *, local_window=0, num_sink_tokens=0, k_start=None,
                 k_end=None) -> indices
  the keys of the top_k greatest index scores, ties to the lowest, ascending, in int32; then -1 at the end
sparse_attention(q, k, v, indices, *, d_v=None, scale=None, sink=None) -> out, lse
dense_attention(q, k, v=None, *, d_v=None, scale=None, k_start=None, k_end=None, sink=None) -> out, lse
  out[t] = softmax(scale * q[t] . k[s]) @ v[s] over the keys of row t, lse[t] = ln(sum of exponentials)
  without scale it is D ** -0.5
  query head h reads key head h // (H / G)
merge_attention(outs, lses) -> out, lse
  two disjoint sets of keys: lse = log(exp(lses[0]) + exp(lses[1])), out = sum_i exp(lses[i] - lse) * outs[i]
  any number of sets, one too, in lists or stacked on a first axis
  a set without keys (out 0, lse -inf) changes nothing; of only such sets out is 0 and lse -inf
apply_sink(out, lse, sink) -> out
  out * 1 / (1 + exp(sink[h] - lse))
  a row without keys (out 0, lse -inf) stays 0; a sink of -inf changes nothing, +inf gives 0

select_topk, lightning_select
  the last local_window and the first num_sink_tokens visible keys are always kept, and count towards top_k
select_topk
  a window hides what is outside it, NaN too, and is clipped; forced keys are the first and last inside it
index_scores, lightning_select, dense_attention
  without windows row t sees the keys s <= S - T + t; one that sees none has scores -inf, out 0, lse -inf
  row t sees k_start[t] <= s < k_end[t], clipped to [0, S), nothing if k_start >= k_end; either may be absent
sparse_attention
  slots of -1 are absent wherever they stand; a row of nothing but -1 has out 0 and lse -inf
  a listed key counts as often as it stands, in any order
  runs of -1 as wide as any tile, in front, inside and at the end
sparse_attention, dense_attention
  with v=None the values are k[..., :d_v]
  a sink z[h] multiplies out by 1 / (1 + exp(z[h] - lse)), -inf and +inf too; lse is without it
every stage
  leading batch axes, any number; windows have them, or 1 in their place, or [T] for all
  strided and transposed views mean what they hold
index_scores, lightning_select, sparse_attention, dense_attention
  keys that no row sees or lists may hold NaN or infinity: first and last key, where -1 may point, too
  any number of heads and any width: 1, 3, 31, 65, 129

index_scores
  scores are float32, float64 if any input is: 16-bit input, also mixed, is summed in float32
  random floats: the error stays within roundings of that sum
  numbers near 100 in float16: products beyond 65504 do not overflow
select_topk
  -0.0 equals 0.0, denormals differ from 0, +inf is the greatest, in any dtype
  float64 scores are compared as float64
  long rows, whatever shares a bucket: all equal, in [1, 1.245), rounded to 1/32, 70,000 different ones
lightning_select
  any dtype, several in one call too: small integers are exact in all, and select the same
  random floats: nothing left out beats what is kept by more than a rounding
  thousands of keys, random floats, of which a part is kept, hundreds of them as they are near or first
  equal keys of random floats are ties, wherever they stand
sparse_attention, dense_attention
  logits far beyond the range of exp
  out has q's dtype, lse is float32, float64 if any input is; indices are int32 or int64
  random floats: sums are kept in the dtype of lse
  thousands of keys, all alike: the sum of their exponentials does not stop at 256 or 2048
  thousands of keys, hundreds of queries, random floats: what tiles of any size give is put together
index_scores, select_topk
  thousands of keys, hundreds of queries and of keys that are kept as they are near or first
merge_attention
  lses far beyond the range of exp
  out has the dtype of outs, lse that of lses; sums are kept in the latter
apply_sink
  lse and sink far beyond the range of exp
  the result has out's dtype
"""

import copy
import difflib
import doctest
import functools
import importlib.util
import inspect
import itertools
import json
import math
import multiprocessing
import os
import pickle
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import traceback
import tracemalloc
import types
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import FrozenInstanceError, dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, assume, example, given, settings
from hypothesis import strategies as st

# 0. Harness: tolerances, the arguments of a call as text, oracles -------------------------------------------

phases = [phase for phase in Phase if phase is not Phase.explain]  # it lists lines of NumPy
quiet: dict[str, Any] = {"deadline": None, "database": None}
settings.register_profile("default", max_examples=40, derandomize=True, phases=phases, **quiet)
settings.register_profile("ci", max_examples=150, print_blob=True, **quiet)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))  # @given fixes its own at import
EXAMPLES = settings().max_examples
slow = settings(max_examples=max(5, EXAMPLES // 5))

INF, NAN = math.inf, math.nan
F32, F64, F16, BFLOAT16 = DTYPES = [np.dtype(x) for x in ("f4", "f8", "f2", ml_dtypes.bfloat16)]
TOLERANCE = {F64: 1e-12, F32: 2e-5, F16: 1e-3, BFLOAT16: 8e-3}  # of max(1, |expected|): a few roundings


STAGE: dict[str, Any] = {}  # (positional, all arguments, results, rules below its signature or name)
SENTENCES: list[str] = []  # all rules
said = re.sub(r"\n {9,}", " ", __doc__ or "")
for head, below in re.findall(r"((?:^\w.*\n)+)((?:^  \S.*\n)+)", said, re.M):
    for name, arguments, results in re.findall(r"^(\w+)\((.*)\) -> (.*)", head, re.M):
        required, _, keywords = (re.findall(r"(\w+)(?:=\w+)?", x) for x in arguments.partition("*"))
        STAGE[name] = required, required + keywords, results.split(", "), []
    SENTENCES += (rules := [x.strip() for x in below.splitlines()])
    for name in STAGE if head == "every stage\n" else STAGE.keys() & re.findall(r"\w+", head):
        STAGE[name][3].extend(rules)
STAGES = list(STAGE)


def difference(name, actual, expected, tolerance):
    """The largest error, as a part of max(1, |expected|), and in words where it first passes the tolerance.
    NaN is never right, infinities are where they are expected; where NaN is expected, anything is."""
    if actual.shape != expected.shape:
        return INF, f"{name} has shape {actual.shape}, not {expected.shape}"
    a, e = actual.astype(F64), expected.astype(F64)
    with np.errstate(invalid="ignore"):
        error = np.where((a == e) | np.isnan(e), 0, np.abs(a - e) / np.maximum(1, np.abs(e)))
    bad, words = ~(error <= tolerance), None
    largest = float(np.nan_to_num(error, nan=INF, posinf=INF).max(initial=0))
    if bad.any():
        at = tuple(np.argwhere(bad)[0].tolist())
        by = f", by up to {largest:.3g}, allowed {tolerance:.1g}" if 0 < tolerance < largest < INF else ""
        words = f"{name}{list(at)} is {actual[at]}, not {expected[at]}; {bad.sum()} of {bad.size} differ{by}"
    return largest, words


def assert_close(actual, expected, tolerance, name="result"):
    """Infinities where they are expected, finite elsewhere (NaN never passes), and close."""
    wrong = difference(name, np.asarray(actual), np.asarray(expected), tolerance)[1]
    assert not wrong, wrong


def assert_attention(actual, expected, dtype):
    """(out, lse): out rounds to q's dtype, lse only to the accumulator's."""
    assert_close(actual[0], expected[0], TOLERANCE[dtype], "out")
    assert_close(actual[1], expected[1], TOLERANCE[accumulator(dtype)], "lse")


def assert_same(actual, expected):
    """Bit for bit, also the dtype."""
    pairs = zip(actual, expected, strict=True) if isinstance(actual, tuple) else [(actual, expected)]
    for i, (a, e) in enumerate(pairs):
        assert a.dtype == e.dtype and a.shape == e.shape, (i, a.dtype, e.dtype, a.shape, e.shape)
        same = a.tobytes() == e.tobytes()
        assert same, difference(f"part {i}", a, e, 0)[1] or f"part {i}: another sign of zero or NaN"


def named(dtype):
    return "ml_dtypes.bfloat16" if dtype == BFLOAT16 else f"np.{dtype.name}"


# What a kernel supports, None is anything; and a factor on the tolerances.
LIMITS = {"dtypes": DTYPES, "heads": None, "widths": None, "max_top_k": None, "tolerance": 1.0}
SCOPE = {"np": np, "ml_dtypes": ml_dtypes}
NUMBERS = {  # what follows np.random.default_rng(seed), for an array of a shape
    "small": "integers(-2, 3, {0})", "normal": "standard_normal({0})", "distinct": "random({0}).argsort(-1)",
    "hundreds": "integers(90, 100, {0})", "ones": "integers(1, 2, {0})", "equal": "standard_normal({0})",
    "special": "choice([-np.inf, -3e38, 3e38, np.inf, *4 * [-1e-44, -0.0, 0.0, 1e-44]], {0})",
    "close": "choice(1 + np.arange(-9, 9) * 2.0**-50, {0})",
    "ends": "choice([0.0, 2.5, -3.0, -np.inf, np.inf], {0})",
}  # fmt: skip
SHAPES = {  # of what is drawn, in the order in which it is
    "index_q": "*batch, T, J, E", "index_k": "*batch, S, E", "weights": "*batch, T, J",
    "q": "*batch, T, H, D", "k": "*batch, S, G, D", "v": "*batch, S, G, Dv", "scores": "*batch, T, S",
    "lses": "n, *batch, T, H", "outs": "n, *batch, T, H, Dv", "lse": "*batch, T, H",
    "out": "*batch, T, H, Dv", "sink": "H",
}  # fmt: skip
PROBLEM = [*STAGE["dense_attention"][1][:-1], *STAGE["lightning_select"][1]]
EVERY = ((), (), (1,), (3,), (2, 2))  # batch axes
UNEVEN = (1, 3, 31, 65, 65)  # heads and widths, the widest most often
MANY_HEADS = (1, 2, 3, 4, 6, 8, 16, 24)  # from 8 on in 16 bits: attend_mma
TABLES = {  # each key once, in order; with -1 anywhere; any number of times; not the first and last
    "kept": "np.sort({rng}.integers(0, 99, (*{batch}, {T}, {S})).argsort(-1)[..., :{K}])",
    "holes": "({rng}.random((*{batch}, {T}, 2 * {S})).argsort(-1)[..., :{width}] - {S}).clip(-1)",
    "any": "{rng}.integers(-1, {S}, (*{batch}, {T}, {width}))",
    "inner": "{rng}.choice([-1, *range(1, {S} - 1)], (*{batch}, {T}, {width}))",
    "tiles": "np.pad({rng}.integers(-1, {S}, ({T}, {width})), [(0, 0), {edge}], constant_values=-1)",
}


@st.composite
def expressions(
    draw, stage, limits=LIMITS, *, numbers="small", dtypes=None, mixed=False, batches=((),), queries=(1, 5),
    keys=(1, 12), heads=(1, 2, 3), groups=(1,), widths=(1, 2, 3, 4, 7), scales=(1.0, 0.5, 0.0), windows=False,
    hidden=0.0, forced=False, tied: Any = False, sinks="", table="kept", unseen=False, sets=(2, 2), spread=3,
):  # fmt: skip
    """{argument: Python expression} of a call: what a report prints is what was computed. Shapes are small,
    windows go from none to anything, and top_k is far below S most of the time."""

    def pick(options, limit=None):  # of what a kernel supports; all that, if it is none of the options
        return draw(st.sampled_from([x for x in options if limit is None or x in limit] or limit))

    rng = lambda method: f"np.random.default_rng({draw(st.integers(0, 9999))}).{method}"  # noqa: E731
    names, most, kinds = STAGE[stage][1] if stage else PROBLEM, limits["max_top_k"], limits["dtypes"]
    if numbers == "rows":
        text, top_k, _ = pick(row for row in ROWS.values() if row[2])
        text = f"({text}).astype({named(accumulator(kinds[0]))})"
        return {"scores": text, "top_k": str(min(top_k, most or top_k))}
    dtype, batch = pick(dtypes or kinds[:1], kinds), pick(batches)
    T, S = draw(st.integers(*queries)), draw(st.integers(*keys))
    H, J = (pick(heads, limits["heads"]) for _ in range(2))
    n: dict[str, Any] = {"batch": batch, "T": T, "S": S, "H": H, "J": J}
    n["G"] = pick([g for g in groups if H % g == 0] or [1])
    n |= {axis: pick(widths, limits["widths"]) for axis in ("D", "E", "Dv")}
    tied = draw(st.booleans()) if tied is None else tied
    n |= {"Dv": min(n["Dv"], n["D"]) if tied else n["Dv"], "n": "lses" in names and draw(st.integers(*sets))}
    some = [S // 3, S // 5] if S > 1000 else [1, 2, 3, 5, 7, S // 3 + 1, S, S + 3]
    top_k = pick(some, range(1, (most or S + 3) + 1))
    a, b, bad = S // 4, S - S // 4, unseen and pick(["np.nan", "np.inf"])  # unseen outside [a, b)
    call: dict[str, str] = {}
    if windows and "k_start" in names:
        shape = (*pick([batch, (), (1,) * len(batch)]), T)
        ends = f"integers(-2, {pick([1, 4, S + 2])}, ", f"integers({pick([-2, a, S])}, {S + 4}, "
        far = f"choice([-(2**62), -(2**32), 0, 1, {S}], ", f"choice([0, {S}, 2**31 + 1, 2**32, 2**62], "
        kind, ends = pick([("int32", ends), ("int64", ends), ("int64", far)])  # far: beyond 32 bits
        ends = (f"integers({a}, {b + 1}, ",) * 2 if unseen else ends
        call["k_start"], call["k_end"] = (f"{rng(x)}{shape}).astype(np.{kind})" for x in ends)
        if not unseen and "scores" not in names:
            call.pop(pick(["", "k_start", "k_end"]), None)
    if "indices" in names:
        width = draw(st.integers(1, min(2 * S, most or 2 * S)))
        edge = pick([(128, 0), (0, 128), (64, 300)]) if table == "tiles" else ()
        text = TABLES[table].format(rng=rng("")[:-1], K=min(top_k, S), width=width, edge=edge, **n)
        call["indices"] = f"{text}.astype({pick(['np.int32', 'np.int64']) if mixed else 'np.int32'})"
    if unseen:
        seen = "indices" if "indices" in names else f"np.arange({a}, {b})"
        call["seen"] = f"np.isin(np.arange({S}), {seen})[:, None]"
    skipped = {"v": tied, "sink": not sinks}
    for name in (x for x in SHAPES if x in names and not skipped.get(x)):
        own, lse = {"sink": sinks, "lse": "normal", "lses": "normal"}.get(name, numbers), name[:3] == "lse"
        shape = eval(f"({SHAPES[name]},)", n)
        text = rng(NUMBERS[own].format(shape))
        if own in ("small", "normal") and "default_rng(0)" in text:  # what Hypothesis shrinks to
            text = f"np.ones({shape})"
        text = f"({spread / (1 if lse else 3)} * {text})" if lse or name == "sink" else text
        if hidden and (lse or name == "scores"):
            text = f"np.where({rng(f'random({shape})')} < {pick([hidden, hidden, 1.0])}, -np.inf, {text})"
        elif hidden and name[:3] == "out":
            text = f"({text} * np.isfinite({name.replace('out', 'lse')})[..., None])"
        elif unseen and name in ("k", "v", "index_k"):
            text = f"np.where(seen{'' if name == 'index_k' else '[..., None]'}, {text}, {bad})"
        if windows and name == "scores":
            at = f"np.arange({S})"
            text = f"np.where(({at} >= k_start[..., None]) & ({at} < k_end[..., None]), {text}, np.nan)"
        kind = pick(dtypes, kinds) if mixed else accumulator(dtype) if lse else dtype
        call[name] = f"{text}.astype({'np.float32' if name == 'sink' else named(kind)})"
        if numbers == "equal" and name == "index_k":
            call[name] += f"[..., [0] * {S}, :]"
    if "q" in names:
        call |= ({"v": "None", "d_v": str(n["Dv"])} if tied else {}) | {"scale": str(pick(scales))}
    if "top_k" in names:
        call["top_k"] = str(top_k)
        if forced:
            call["local_window"] = str(local := draw(st.integers(0, min(top_k, 4 if S < 500 else 300))))
            call["num_sink_tokens"] = str(draw(st.integers(0, min(top_k - local, 3 if S < 500 else 100))))
    if "lses" in names and (sets == (2, 2) or draw(st.booleans())):  # else stacked
        call = {name: f"list({text})" for name, text in call.items()}
    return call


def evaluate(call):
    """The values of the expressions, each of which may use those before it."""
    values: dict[str, Any] = {}
    with np.errstate(over="ignore"):  # large numbers in float16
        for name, text in call.items():
            values[name] = eval(text, SCOPE, values)
    return values


@dataclass
class Problem:
    """One drawn case; lo and hi [*batch, T] are its windows clipped to real keys."""

    batch: tuple
    top_k: int
    forced: dict  # local_window, num_sink_tokens
    windows: dict  # k_start, k_end, each or both or none
    scale: float | None
    q: np.ndarray
    k: np.ndarray
    v: np.ndarray | None
    latent: dict  # d_v where v is None
    index_q: np.ndarray
    index_k: np.ndarray
    weights: np.ndarray

    def __post_init__(self):
        self.T, self.S = self.q.shape[-3], self.k.shape[-3]
        self.index, self.kv = (self.index_q, self.index_k, self.weights), (self.k, self.v)
        self.values = self.k[..., : self.latent["d_v"]] if self.v is None else self.v
        self.lo, self.hi = reach(self.batch, self.T, self.S, **self.windows)


def small(rng, *shape):
    return rng.integers(-2, 3, shape).astype(np.float64)


def normal(rng, *shape):
    return rng.standard_normal(shape)


@st.composite
def problems(draw, data=small, dtypes=DTYPES, windows=True, batches=EVERY, max_keys=70, mixed=False):
    """Small problems of every kind; windows default or anything at all."""
    values = evaluate(draw(expressions(
        None, numbers=data.__name__, dtypes=dtypes, windows=windows and draw(flags), batches=batches,
        keys=(1, max_keys), queries=(1, 6), heads=MANY_HEADS, groups=(1, 2, 3), scales=(None, 0.5, 1.0),
        forced=True, tied=None, mixed=mixed,
    )))  # fmt: skip
    parts = {"forced": "local_window num_sink_tokens", "windows": "k_start k_end", "latent": "d_v"}
    for part, names in parts.items():
        values[part] = {name: values.pop(name) for name in names.split() if name in values}
    return Problem(values["q"].shape[:-3], **values)


one_of, flags, seeds = st.sampled_from, st.booleans(), st.integers(0, 2**32 - 1)
any_dtype, wide_floats = one_of(DTYPES), one_of([F32, F64])
sinks = st.lists(one_of([-INF, -3.0, 0.0, 2.5, INF]), min_size=24, max_size=24)


def accumulator(*dtypes):
    """Float64 if any input is float64, else float32."""
    return F64 if F64 in dtypes else F32


def due(stage, given):
    """The dtypes of a stage's results for these arguments, of which the first is q, outs or out."""
    floats = [y.dtype for x in given for y in as_list(x) if y.dtype in DTYPES]
    named = {"indices": np.dtype(np.int32), "out": floats[0]}
    return [named.get(part, accumulator(*floats)) for part in STAGE[stage][2]]


def as_list(x):
    """The arrays of an argument: one, several, or none."""
    return list(x) if isinstance(x, list | tuple) else [x] if isinstance(x, np.ndarray) else []


def reach(batch, T, S, k_start=None, k_end=None):
    """The window of every row, clipped to [0, S); empty ones have lo == hi."""
    k_start = np.zeros(T, np.int64) if k_start is None else k_start
    k_end = S - T + 1 + np.arange(T) if k_end is None else k_end
    lo = np.broadcast_to(np.clip(k_start, 0, S), (*batch, T)).astype(np.int64)
    return lo, np.maximum(lo, np.broadcast_to(np.clip(k_end, 0, S), (*batch, T)))


def index_scores_by_hand(index_q, index_k, weights, **windows):
    """Eq. (1) as written: I[t,s] = sum_j weights[t,j] * relu(index_q[t,j] . index_k[s]), -inf outside."""
    q, k, w = (x.astype(F64) for x in (index_q, index_k, weights))
    with np.errstate(invalid="ignore"):  # what is hidden may be anything
        each = np.maximum(np.einsum("...tje,...se->...tjs", q, k), 0)
        scores = np.einsum("...tj,...tjs->...ts", w, each)
    lo, hi = (x[..., None] for x in reach(scores.shape[:-2], *scores.shape[-2:], **windows))
    return np.where((np.arange(scores.shape[-1]) >= lo) & (np.arange(scores.shape[-1]) < hi), scores, -INF)


def select_by_sort(row, lo, hi, top_k, local_window=0, num_sink_tokens=0):
    """Eq. (2): the first K visible keys in the order (forced first, score descending, index ascending)."""
    row, lo = np.asarray(row, F64), max(lo, 0)
    visible = lo + np.flatnonzero(row[lo : max(hi, lo)] > -INF)
    free = np.ones(len(visible))
    free[:num_sink_tokens] = free[max(len(visible) - local_window, 0) :] = 0
    kept = sorted(visible[np.lexsort((visible, -row[visible], free))[:top_k]].tolist())
    return kept + [-1] * (min(top_k, len(row)) - len(kept))


def select_by_hand(scores, top_k, *, k_start=None, k_end=None, **forced):
    """Eq. (2) row by row; without windows every score is visible."""
    *batch, T, S = scores.shape
    lo, hi = reach(batch, T, S, 0 if k_start is None else k_start, S if k_end is None else k_end)
    rows = [select_by_sort(scores[at], lo[at], hi[at], top_k, **forced) for at in np.ndindex(*batch, T)]
    return np.reshape(np.array(rows, np.int32), (*batch, T, min(top_k, S)))


def lightning_by_hand(index_q, index_k, weights, top_k, *, k_start=None, k_end=None, **forced):
    """Eq. (2) of eq. (1), in float64."""
    scores = index_scores_by_hand(index_q, index_k, weights, k_start=k_start, k_end=k_end)
    return select_by_hand(scores, top_k, **forced)


def attention_by_hand(q, k, v=None, indices=None, *, d_v=None, scale=None, sink=None, **windows):
    """Eq. (3) row by row: softmax over its keys, the listed or the visible, as often as they stand there."""
    *batch, T, H, D = q.shape
    q, k = q.astype(F64), k.astype(F64)
    v = k[..., :d_v] if v is None else v.astype(F64)
    group = np.arange(H) // (H // k.shape[-2])
    lo, hi = reach(batch, T, k.shape[-3], **windows)
    out, lse = np.zeros((*q.shape[:-1], v.shape[-1])), np.full(q.shape[:-1], -INF)
    for at in np.ndindex(*batch, T):
        keys = np.arange(lo[at], hi[at]) if indices is None else indices[at][indices[at] >= 0]
        if len(keys):
            own_k, own_v = k[at[:-1]][keys][:, group], v[at[:-1]][keys][:, group]  # [n, H, D], [n, H, Dv]
            logits = np.einsum("hd,nhd->nh", q[at], own_k) * (D**-0.5 if scale is None else scale)
            with np.errstate(invalid="ignore"):
                share = np.exp(logits - logits.max(0))
                out[at] = np.einsum("nh,nhv->hv", share / share.sum(0), own_v)
            lse[at] = logits.max(0) + np.log(share.sum(0))
    return (out if sink is None else sink_by_hand(out, lse, sink)), lse


def merge_by_hand(outs, lses):
    """L = logsumexp of the lses, out = sum of exp(lse - L) * out; of empty sets the empty set."""
    outs, lses = np.array(outs).astype(F64), np.array(lses).astype(F64)
    lse = np.logaddexp.reduce(lses, 0)
    return (outs * np.exp(lses - np.where(lse > -INF, lse, 0))[..., None]).sum(0), lse


def sink_by_hand(out, lse, sink):
    """A sink is one more key, of value 0."""
    with np.errstate(over="ignore", invalid="ignore"):
        share = np.where(lse > -INF, 1 / (1 + np.exp(sink.astype(F64) - lse)), 0)
    return out.astype(F64) * share[..., None]


dense_by_hand = sparse_by_hand = attention_by_hand  # which have windows, or indices
BY_HAND: dict[str, Any] = dict(zip(STAGES, (
    index_scores_by_hand, select_by_hand, lightning_by_hand, attention_by_hand, attention_by_hand,
    merge_by_hand, sink_by_hand,
), strict=True))  # fmt: skip
ONE: dict[str, Any] = {"queries": (1, 1)}
FORCED: dict[str, Any] = {"forced": True, "windows": True, "keys": (2, 24)}
MIXED = {"dtypes": DTYPES, "mixed": True}
FLOATS: dict[str, Any] = {"numbers": "normal", "dtypes": DTYPES, "keys": (1, 70), "heads": MANY_HEADS}
GROUPS: dict[str, Any] = {"heads": (6, 2, 3, 4, 8), "groups": (2, 3, 4)}
DEFAULT, ANY, LOGITS, ENDS = {"scales": (None,)}, {"table": "any"}, {"sinks": "normal"}, {"sinks": "ends"}
FEW: dict[str, Any] = {"examples": 12}
MANY: dict[str, Any] = FEW | {"keys": (600, 2600), "queries": (130, 300), "heads": (1, 2), "windows": True}
LOOSE = {"slack": 16}  # for who takes exp(logits - lse), or adds one by one
RULES: dict[str, dict[str, Any]] = dict(zip(SENTENCES, [  # what is drawn for each rule of the docstring
    ONE,  # index_scores
    {"numbers": "distinct"} | ONE, ONE, {"hidden": 0.5},  # select_topk
    ONE | {"keys": (1, 24)},  # lightning_select
    ONE, ONE | DEFAULT, ONE | GROUPS,  # attention
    ONE, {"sets": (1, 5)}, {"hidden": 0.4, "sets": (1, 4)},  # merge_attention
    LOGITS, ENDS | {"hidden": 0.4},  # apply_sink
    {"forced": True, "hidden": 0.3}, FORCED, {"queries": (1, 9)}, FORCED | {"keys": (2, 9)},  # what is seen
    {"table": "holes"}, ANY, {"table": "tiles"}, {"tied": True} | ONE,
    ENDS | {"windows": True, "table": "holes"},
    FORCED | GROUPS | ANY | ENDS  # every stage
    | {"batches": ((2,), (1,), (3,), (2, 2), (2, 1)), "tied": None, "hidden": 0.3},
    LOGITS | {"strided": True, "batches": ((), (2,))},
    {"windows": True, "unseen": True, "keys": (4, 16), "batches": ((), (2,)), "table": "inner"},
    DEFAULT | {"heads": UNEVEN, "widths": (*UNEVEN, 129, 129), "keys": (1, 70), "queries": (1, 2)},
    MIXED, FLOATS, {"numbers": "hundreds", "dtypes": [F16], "widths": (64,)},  # index_scores
    {"numbers": "special", "keys": (1, 40), "queries": (1, 30), "dtypes": DTYPES},  # select_topk
    {"numbers": "close", "dtypes": [F64]},
    {"numbers": "rows"} | FEW,
    MIXED | {"forced": True, "keys": (1, 70)},  # lightning_select
    FLOATS | {"keys": (300, 500), "heads": (1, 2, 3)},
    {"numbers": "normal", "keys": (2000, 3000), "queries": (130, 300), "forced": True} | FEW,
    {"numbers": "equal", "keys": (299, 1100), "heads": (2, 8, 12, 64), "widths": (31, 64, 65, 129)},
    {"scales": (30.0,), "keys": (1, 40)} | LOOSE, MIXED | ANY, FLOATS | GROUPS | DEFAULT | ANY,  # attention
    ONE | LOOSE | {"numbers": "ones", "keys": (2500, 3000), "widths": (1,), "dtypes": DTYPES},
    MANY | ANY | {"numbers": "normal", "scales": (1.0,)} | LOOSE, MANY | {"forced": True},
    {"spread": 60, "sets": (1, 3)}, FLOATS | {"hidden": 0.2},  # merge_attention
    LOGITS | {"spread": 60}, LOGITS | FLOATS,  # apply_sink
], strict=True))  # fmt: skip
RNG = "np.random.default_rng(7)."
ROWS = {  # where production kernels were wrong: scores, K, whether for reports
    "all equal": ("np.full((1, 16385), 1.5, np.float32)", 2048, True),
    "all in [1, 1.245)": (f"{RNG}uniform(1, 1.245, (1, 16385)).astype(np.float32)", 2048, True),
    "round(x * 32) / 32": (f"({RNG}standard_normal((1, 30000)) * 32).round() / 32", 2048, True),
    "70,000 different": (f"{RNG}permutation(70000)[None].astype(np.float32)", 100, True),
    "64 x 262144": (f"{RNG}standard_normal((64, 262144), np.float32)", 2048, False),
    "relu(x - 1.28)": (f"({RNG}standard_normal((4, 30000)) - 1.28).clip(0)", 4096, True),
    "zeros of both signs": (f"{RNG}choice(np.float32([-1, -0.0, 0.0, 1]), (4, 5000))", 2600, False),
    "denormals": (f"np.float32({RNG}integers(-9, 9, (4, 1584)) * ([9e-43, *[1e-44] * 15] * 99))", 300, False),
    "infinities": (f"{RNG}choice([-np.inf, 1.0, np.inf], (4, 3000))", 1500, False),
    "K = 65,536": (f"({RNG}standard_normal((2, 100_000)) * 64).round()", 65536, False),
}


class Stages:
    """A module's functions: NumPy arrays go in, read-only or moved to xp, and come back as NumPy."""

    def __init__(self, module, xp, device="cpu"):
        self.module, self.xp, self.device = module, xp, device

    def __getattr__(self, name):
        return functools.partial(self.call, getattr(self.module, name))

    def call(self, function, /, *args, **kwargs):
        given = {key: x if key == "lengths" else self.give(x) for key, x in kwargs.items()}
        return self.back(function(*map(self.give, args), **given))

    def give(self, x, strided=False, writable=False):
        """x in arrays of xp; strided: every other number of one whose first and last axes are exchanged."""
        if isinstance(x, list | tuple):
            return [self.give(part, strided, writable) for part in x]
        if not isinstance(x, np.ndarray):
            return x
        if strided:
            wide = np.stack([x, np.full_like(x, 77)], axis=-1).swapaxes(0, -2)
            return self.give(np.ascontiguousarray(wide), writable=writable)[..., 0].swapaxes(0, -1)
        if self.xp.__name__ == "torch":
            bits = x.view(np.int16) if x.dtype == BFLOAT16 else x  # which torch.from_numpy does not know
            return self.xp.from_numpy(bits.copy()).view(getattr(self.xp, x.dtype.name)).to(self.device)
        x = self.xp.asarray(x).view()
        if self.xp is np:
            x.flags.writeable = writable
        return x

    def back(self, x):
        if isinstance(x, list | tuple):
            return tuple(map(self.back, x))
        if x is None or (isinstance(x, float) and self.xp is np):
            return x
        torch = self.xp.__name__ == "torch"
        kind = self.xp.Tensor if torch else self.xp.ndarray
        assert isinstance(x, kind), f"it returned {type(x).__name__}, not an array of {self.xp.__name__}"
        if not torch:
            return x if self.xp is np else x.get()
        x = x.detach().cpu().contiguous()
        return x.view(self.xp.int16).numpy().view(BFLOAT16) if x.dtype == self.xp.bfloat16 else x.numpy()


@dataclass
class Verdict:
    """What is known of a module's stage: how many of its rules hold, which do not, and the largest errors."""

    impl: Stages
    stage: str
    limits: dict[str, Any] = field(default_factory=lambda: LIMITS)
    reason: str = ""  # why it was not tested
    held: int = 0
    examples: int = 0
    broken: dict = field(default_factory=dict)  # rule: what came of it, but for places and numbers
    wrong: tuple | None = None  # the smallest call that breaks the first, and lines on what came of it
    silent: list = field(default_factory=list)  # bad input for which no error was raised
    errors: dict = field(default_factory=dict)  # (part, dtype): largest error, tolerance

    def judge(self, options, call):
        """Lines on what is wrong with this call's results, if they are: found, expected, first difference."""
        impl, (positional, names, parts, _), drawn = self.impl, STAGE[self.stage], evaluate(call)
        values = {name: drawn[name] for name in names if name in drawn}
        given = {name: impl.give(copy.deepcopy(x), "strided" in options, True) for name, x in values.items()}
        keywords = {name: x for name, x in given.items() if name not in positional}
        try:
            found = impl.back(getattr(impl.module, self.stage)(*map(given.get, positional), **keywords))
            found = found if isinstance(found, tuple) else (found,)
            kinds = [type(x).__name__ for x in found]
            if kinds != ["ndarray"] * len(parts):  # pytest would explain an assert
                raise AssertionError(f"it returned {', '.join(kinds)}, not arrays {', '.join(parts)}")
            found = dict(zip(parts, found, strict=True))
        except Exception as error:  # whatever a module under test does is its author's to read
            last, words = traceback.extract_tb(error.__traceback__)[-1], " ".join(str(error).split())[:150]
            place = f" ({last.name}, line {last.lineno})" * (last.filename != __file__)
            raised = f"it raised {type(error).__name__}: {words}{place}"
            return [words if isinstance(error, AssertionError) else raised]  # that of Stages.back
        for name, x in values.items():
            after = as_list(impl.back(given[name])) if as_list(x) else []
            if [a.tobytes() for a in as_list(x)] != [a.tobytes() for a in after]:
                return [f"it changed its input {name}"]
        expected, kinds = BY_HAND[self.stage](**values), due(self.stage, values.values())
        terms = math.prod(values["index_q"].shape[-2:]) if "index_q" in values else 1
        factor = self.limits["tolerance"] * options.get("slack", max(1, terms**0.5 / 16))
        for name, dtype, e in zip(parts, kinds, expected if len(parts) > 1 else [expected], strict=True):
            a = found[name]
            lines = [f"returned {name} = {shown(a)}", f"expected {name} = {shown(e.astype(dtype))}"]
            if a.dtype != dtype:
                return [*lines, f"{name} is {a.dtype}, not {dtype}"]
            if name == "indices" and options.get("numbers") == "normal" and a.shape == e.shape:
                a, e = kept_scores((a, e), values)
                name, dtype = "score of indices", due("index_scores", values.values())[0]
            allow = TOLERANCE.get(dtype, 0.0) * factor
            largest, words = difference(name, a, e, allow)
            if words:
                if name == "indices" and a.shape == e.shape:
                    order, least = a.view(np.uint32), TOLERANCE[F32] if "index_q" in values else 0
                    a, e = kept_scores((a, e), values)  # in order, -1 behind all, and as great: a wrong tie
                    tied = (np.sort(order) == order).all() and difference(name, a, e, least)[0] <= least
                    words = f"a wrong tie, {words}" if tied else words
                return [*lines, words]
            before = self.errors.get((name, dtype), (0.0, allow))
            self.errors[name, dtype] = max(before, (largest, allow))
        return []

    def search(self, options, examples, seconds):
        """(A call that breaks a rule, lines on it), or nothing: Hypothesis shrinks it for some seconds."""
        found: list[Any] = []
        drawn = {key: x for key, x in options.items() if key not in ("strided", "slack", "examples")}

        @settings(
            max_examples=min(examples, options.get("examples", examples)), report_multiple_bugs=False,
            phases=(Phase.generate, Phase.shrink), suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        @given(call=expressions(self.stage, self.limits, **drawn))
        def holds(call):
            if found and time.monotonic() > found[0][2] + seconds:
                return
            self.examples += 1
            if wrong := self.judge(options, call):
                found.append((call, wrong, time.monotonic()))
                raise AssertionError

        try:
            holds()
        except Exception:  # of which a flaky kernel makes another
            if not found:
                raise
        return found and min(found, key=lambda wrong: sum(map(np.size, evaluate(wrong[0]).values())))[:2]

    def breaks(self, sentence, call, lines):
        """One more broken rule, and what may be the cause of others too: a tie, a dtype, an error."""
        cause = re.sub(r"\b\d+|\[.*| has shape.*", "", lines[-1])
        cause = re.sub(r" is \w+, not \w+$", " has another dtype", cause)
        cause = cause if " " in cause else f"{self.stage}: {cause} is wrong"
        self.broken[sentence] = cause, lines[-1] if "raised" in cause else cause
        self.wrong = self.wrong or (call, lines)

    def examine(self, strict=False, examples=60, seconds=3.0):
        """The stage's rules in order, and the smallest call that shows the first broken one."""
        impl, (positional, _, _, rules) = self.impl, STAGE[self.stage]
        for sentence in rules:
            options = RULES[sentence]
            if not any(dtype in self.limits["dtypes"] for dtype in options.get("dtypes", DTYPES)):
                continue
            if wrong := self.search(options, examples, seconds):
                self.breaks(sentence, *wrong)
                examples, seconds = min(examples, 12), 0  # the other rules are only counted
            else:
                self.held += 1
        on_host = impl.device == "cpu" and impl.xp.__name__ != "cupy"  # else it may end the process
        for name, error, changes, _ in BAD_CALLS if strict or on_host else ():
            if name == self.stage and error is not TypeError:
                arguments = {key: ONES[key] for key in positional} | changes
                try:
                    getattr(impl.module, name)(**{key: impl.give(x) for key, x in arguments.items()})
                except Exception:  # any error will do: its type is the library's affair
                    continue
                self.silent += changes
                if strict:  # a rule for each bad input that passes
                    call = {key: literal(x) for key, x in arguments.items()}
                    words = f"it raised nothing, where {error.__name__} is due"
                    self.breaks(f"bad input raises an error: here {', '.join(changes)}", call, [words])

    def lines(self, width=110):
        """A failed stage's rule, the call that breaks it, and what came of it, in few lines."""
        positional, names, results, _ = STAGE[self.stage]
        call, ending = self.wrong or ({}, [])
        fill = textwrap.TextWrapper(width, subsequent_indent="      ", break_on_hyphens=False).wrap
        start = fill(f"{self.stage} breaks a rule: {next(iter(self.broken))}")
        ending = [line for text in ending for line in fill(f"  {text}")]
        texts = {name: literal(x) if np.size(x) <= 40 else call[name] for name, x in evaluate(call).items()}
        arrays = {name: text for name, text in texts.items() if "np." in text}
        if not any("seen" in text for text in arrays.values()):
            arrays.pop("seen", None)
        inline = {name: name if name in arrays else text for name, text in texts.items() if name in names}
        first = [inline.pop(name) for name in positional]
        arguments = ", ".join([*first, *(f"{name}={text}" for name, text in inline.items())])
        lines = [line for name, text in arrays.items() for line in fill(f"  {name} = {text}")]
        lines += fill(f"  {', '.join(results)} = {self.stage}({arguments})")
        return [*start, *lines, *ending]

    def row(self):
        """One line of the table: passed, failed or not tested, rules, examples, the largest error."""
        if not (asked := self.held + len(self.broken)):
            return f"{self.stage:18}not tested: {self.reason or 'no rule is left within these limits'}"
        largest = "exact" if self.held else ""
        if errors := [(error / most, error, most, key) for key, (error, most) in self.errors.items() if most]:
            _, error, most, (part, dtype) = max(errors, key=lambda x: x[0])
            largest = f"{part} off by {error:.1e} of {most:.1e} allowed ({dtype})"
        rules = f"{self.held:4} of {asked:2} rules hold{self.examples:6} examples"
        return f"{self.stage:18}{'FAILED' if self.broken else 'passed'}{rules}  {largest}"


def literal(x):
    """An argument as an expression that can be pasted."""
    if isinstance(x, list):
        return f"list({literal(np.stack(x))})"
    if not isinstance(x, np.ndarray):
        return repr(x)
    return f"np.array({x.tolist()}, {named(x.dtype)})".replace("nan", "np.nan").replace("inf", "np.inf")


def shown(x, most=80):
    """An array's numbers on one line, the first of them if there are many."""
    numbers = np.round(x.astype(F64), 6) if x.dtype in DTYPES else x
    text = str((numbers if x.size <= 200 else numbers.ravel()[:50]).tolist())
    return text if len(text) <= most else f"{text[:most]}... {x.shape}"


def kept_scores(selections, values):
    """The scores of selections in falling order, which hardly change where a rounding swaps two keys."""
    index = {x: values[x] for x in STAGE["index_scores"][1] if x in values}
    scores = values["scores"] if "scores" in values else index_scores_by_hand(**index)
    scores = np.concatenate([scores, np.full((*scores.shape[:-1], 1), -INF)], -1)  # -1 reads the last
    kept = [np.clip(x, -1, scores.shape[-1] - 1).astype(np.int64) for x in selections]
    return [-np.sort(-np.take_along_axis(scores, x, -1), -1) for x in kept]


def conform(module, stages=None, arrays="numpy", limits=LIMITS, strict=False, say=print, **effort):
    """Examines a module's stages, says what it found; the exit status, 0 if all is right."""
    if not 0 < limits["tolerance"] < INF:  # roundings are above 0, and nothing above infinity
        raise pytest.UsageError(f"--tolerance is {limits['tolerance']}, expected a finite number above 0")
    library, _, device = arrays.partition(":")
    if device and not importlib.import_module(library).cuda.is_available():
        raise ImportError("torch finds no CUDA device")
    impl = Stages(module, poisoned(importlib.import_module(library)), device=device or "cpu")
    others = [name for name, x in vars(module).items() if callable(x) and name not in STAGES]
    verdicts = [Verdict(impl, stage, limits) for stage in STAGES]
    for verdict in verdicts:
        if stages and verdict.stage not in stages:
            verdict.reason = "not in --stages"
        elif not callable(getattr(module, verdict.stage, None)):
            near = difflib.get_close_matches(verdict.stage, others, 1, 0.8)
            hint = f", but {near[0]}: did you mean {verdict.stage}?" if near else ""
            verdict.reason = f"{module.__name__} has no {verdict.stage}{hint}"
        else:
            with warnings.catch_warnings():  # of overflow in the module, of Hypothesis outside a test
                warnings.simplefilter("ignore")
                verdict.examine(strict, **effort)
        if verdict.broken:
            say("\n".join(verdict.lines()))
    say("\n".join([f"\n{module.__name__}, given arrays of {arrays}:", *(x.row() for x in verdicts)]))
    for verdict in verdicts if not strict else ():
        if silent := ", ".join(dict.fromkeys(verdict.silent)):
            say(textwrap.shorten(f"{verdict.stage} does not raise an error for bad {silent}", 110))
    lists = {name: x for name, x in limits.items() if isinstance(x, list) and x != DTYPES}
    unasked = [f"{name} other than {', '.join(map(str, x))}" for name, x in lists.items()]
    unasked += [f"top_k above {most}"] if (most := limits["max_top_k"]) else []
    unasked += ["above 300 queries, 3,000 keys (70,000 in select_topk)", "bad input (--strict)"][: 2 - strict]
    say(textwrap.fill(f"not asked: {'; '.join(unasked)}", 110, subsequent_indent="  "))
    findings: dict[str, list] = {}  # cause: the rules and stages, the most basic first
    for verdict in verdicts:
        for rule, (cause, words) in verdict.broken.items():
            findings.setdefault(cause, []).append((words, rule, verdict.stage))
    for i, found in enumerate(findings.values(), 1):
        (words, rule, _), all_of = found[0], ", ".join(dict.fromkeys(stage for *_, stage in found))
        text = f"finding {i} of {len(findings)}: {words}, in {len(found)} rules of {all_of}, first: {rule}"
        say(textwrap.fill(text, 110, subsequent_indent="  "))
    tested = [verdict.stage for verdict in verdicts if verdict.held or verdict.broken]
    failed = [verdict.stage for verdict in verdicts if verdict.broken]
    if missing := [stage for stage in stages or () if stage not in tested]:
        say(f"NOT TESTED, though asked for: {', '.join(missing)}")
    right = f"{len(tested)} stages tested, none failed" if tested else "NOTHING WAS TESTED"
    say(f"FAILED: {', '.join(failed)}" if failed else right)
    return int(bool(failed or missing or not tested))


def some_of(known, text):
    """The words of an option, with commas between: numbers, or of those that are known."""
    fits = known.__contains__ if known else lambda word: word.isdecimal() and int(word) > 0
    if wrong := [word for word in text.split(",") if not fits(word)]:
        raise pytest.UsageError(f"{wrong[0]!r} is none of {', '.join(known) or 'the numbers from 1 on'}")
    return [word if known else int(word) for word in text.split(",")]


of = lambda *known: functools.partial(some_of, known)  # noqa: E731
REPORT = {  # the options beside --impl and pytest's --strict: what they take, and words
    "stages": (of(*STAGES), "functions to test, with commas between (default: all that the module has)"),
    "arrays": (of("numpy", "cupy", "torch", "torch:cuda"), "numpy, cupy, torch or torch:cuda"),
    "dtypes": (of(*map(str, DTYPES)), "dtypes that it supports, such as float32,bfloat16"),
    "heads": (of(), "numbers of heads that it supports, such as 64,128"),
    "widths": (of(), "widths of vectors that it supports, such as 64,576"),
    "max_top_k": (lambda text: min(some_of((), text)), "the largest top_k that it supports"),
    "tolerance": (float, "a factor on the errors allowed, above 0"),
}


def pytest_addoption(parser):
    group = parser.getgroup("dsa", "DeepSeek Sparse Attention (test_dsa.py)")
    group.addoption("--impl", default="dsa", help="module to report on; dsa alone runs the whole suite")
    for name, (kind, words) in REPORT.items():
        group.addoption(f"--{name.replace('_', '-')}", type=kind, help=words)


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """Another module than dsa is reported on, and dsa with an option of the report; else the suite runs."""
    name, strict = config.getoption("--impl", "dsa"), bool(config.getoption("strict", False))
    given = {key: x for key in REPORT if (x := config.getoption(key, None)) is not None}
    config.option.reportchars += "s"  # skips, by their reason
    if config.option.help or (name == "dsa" and not given and importlib.util.find_spec(name)):
        return None
    sys.path.insert(0, os.getcwd())
    given["dtypes"] = [x for x in DTYPES if str(x) in given.get("dtypes", map(str, DTYPES))]
    stages, (arrays, *_) = given.pop("stages", None), given.pop("arrays", ["numpy"])
    try:
        return conform(importlib.import_module(name), stages, arrays, LIMITS | given, strict)
    except ImportError as error:
        print(f"NOTHING WAS TESTED: {error} (--impl names the module to test, without .py)")
        return 2


def array_libraries():
    """NumPy, and CuPy where it is installed and finds a device."""
    try:
        return ["numpy", "cupy"][: 1 + bool(importlib.import_module("cupy").cuda.runtime.getDeviceCount())]
    except Exception:  # ImportError without CuPy, RuntimeError or CuPy's own error without a driver
        return ["numpy"]


def poisoned(xp):
    """xp; of CuPy, new memory is full of 0x7F7F7F7F, so that what a kernel forgets to write is seen."""
    if xp.__name__ == "cupy" and getattr(xp.cuda.get_allocator(), "__name__", "") != "poisoned_memory":
        allocate = xp.cuda.get_allocator()

        def poisoned_memory(nbytes):
            memory = allocate(nbytes)
            if nbytes:
                memory.memset_async(0x7F, nbytes)
            return memory

        xp.cuda.set_allocator(poisoned_memory)
    return xp


@pytest.fixture(scope="session")
def dsa():
    """dsa.py; what its Part I lacks, where it is alone, is skipped."""

    def missing(name):
        if re.match("_|hypothesis_|.*_example", name):  # Hypothesis asks anything for these
            raise AttributeError(name)
        pytest.skip(f"Part I alone has no {name}")

    module = importlib.import_module("dsa")
    if not hasattr(module, "DSALayer"):
        vars(module)["__getattr__"] = missing
    return module


@pytest.fixture(scope="session", params=array_libraries())
def impl(dsa, request):
    """dsa.py on NumPy arrays or on the GPU."""
    return Stages(dsa, poisoned(importlib.import_module(request.param)))


def sparse(impl, p, indices, **kwargs):
    return impl.sparse_attention(p.q, *p.kv, indices, **p.latent, scale=p.scale, **kwargs)


def select(impl, p, **kwargs):
    return impl.lightning_select(*p.index, p.top_k, **(p.forced | p.windows | kwargs))


def drawn_indices(p, seed):
    """[*batch, T, C] of any visible or invisible keys, -1 anywhere, in any type of integers."""
    rng = np.random.default_rng(seed)
    kind = rng.choice(["int64", "int32", "int16", "uint8", "uint64"])
    indices = rng.integers(-1, p.S, (*p.batch, p.T, int(rng.integers(1, 2 * p.S))))
    return indices.clip(-1 if kind[0] == "i" else 0).astype(kind)


def padded(indices, width):
    """The same selection in a wider table."""
    edges = [(0, 0)] * (indices.ndim - 1) + [(0, width - indices.shape[-1])]
    return np.pad(indices, edges, constant_values=-1)


def overwritten(p, keys, value):
    """The same problem with other numbers at these positions of k, v and index_k."""
    p = copy.deepcopy(p)
    for x, axis in ((p.k, -3), (p.v, -3), (p.index_k, -2)):
        if x is not None:
            np.moveaxis(x, axis, 0)[list(keys)] = value
    return replace(p)


def together(*acts):
    """All at once, each in a thread."""
    with ThreadPoolExecutor(len(acts)) as pool:
        list(pool.map(lambda act: act(), acts))


def refused(words, call, *args, error=ValueError, **kwargs):
    """The call raises this error, in such words."""
    with pytest.raises(error, match=words or None), np.errstate(all="ignore"):
        call(*args, **kwargs)


def all_refused(table, scope, state):
    """Each call of a table raises its error, a ValueError if it names none, in its words; the state stays."""
    before = state()
    for error, words, call in re.findall(r"(\w+Error )?(\S.*?): (.*?)(?: \| |\n)", table):
        refused(words, eval, call, scope, error=eval(error or "ValueError"))
        assert state() == before, call


def readme(start="[^`]*?>>>"):
    """README.md beside this file, and its first block of Python that starts so, or the test is skipped."""
    file = Path(__file__).with_name("README.md")
    if not file.exists():
        pytest.skip("a copy of test_dsa.py without README.md beside it")
    text = file.read_text(encoding="utf-8")
    return text, re.findall(rf"```python\n({start}[^`]*)```", text)[0]


# 1. The rules of the stages, and bad input ------------------------------------------------------------------


@pytest.mark.parametrize("stage, sentence", [(x, rule) for x in STAGE for rule in STAGE[x][3]])
def test_rule(impl, stage, sentence):
    """The rules at the top of this file, in their order: each stage alone, against brute force."""
    verdict = Verdict(impl, stage, broken={sentence: ""})
    verdict.wrong = verdict.search(RULES[sentence], EXAMPLES, 5.0)
    assert not verdict.wrong, "\n".join(verdict.lines())


@pytest.mark.parametrize("name", ROWS)
def test_select_topk_on_rows_that_broke_others(impl, name):
    """Whatever shares a bucket, an exponent or a value: the first K of the order."""
    scores, top_k = eval(ROWS[name][0], SCOPE), ROWS[name][1]
    np.testing.assert_array_equal(impl.select_topk(scores, top_k), select_by_hand(scores, top_k))


SIZES = {"batch": (), "n": 2, "T": 3, "S": 6, "H": 4, "G": 2, "D": 5, "Dv": 3, "J": 2, "E": 4}
ONES: dict[str, Any] = {name: np.ones(eval(f"({shape},)", SIZES)) for name, shape in SHAPES.items()}
ONES |= {  # what is wrong below is mostly 17
    "top_k": 4, "indices": np.zeros((3, 2), np.int32),
    "candidates": np.zeros((3, 2), np.int32), "dout": np.ones((3, 4, 3)), "target": np.ones((3, 6)),
    "mlp": (np.ones((7, 10)), np.ones((7, 10)), np.ones(7), np.ones(7)),
    "t": 2, "s": 1, "sequences": [np.ones((2, 3))] * 2, "n": None, "lengths": np.array([2, 3]),
    "num_queries": 4, "capacity": 4, "streams": (1, 2), "x": np.ones((2, 200)), "kv": np.ones((2, 576)),
    "codes": np.zeros((2, 200), np.uint8), "scales": np.ones((2, 2)), "packed": np.zeros((2, 656), np.uint8),
}  # fmt: skip
LEARNING = ["attention_target", "indexer_loss", "learned_loss"]
SELECTING = ["select_topk", "lightning_select", "predictive_select"]
GROUPS_OF = {
    "SELECTING": SELECTING, "ATTENDING": ["dense_attention", "sparse_attention", "sparse_attention_backward"],
    "INDEXING": ["index_scores", "lightning_select", "predictive_select", "explain", "indexer_loss"],
    "WINDOWED": ["dense_attention", "index_scores", *SELECTING, *LEARNING], "LOSSES": LEARNING[1:],
    "GATHERING": ["sparse_attention", "sparse_attention_backward", *LEARNING],
}  # fmt: skip
BAD_INPUT = """
ATTENDING: q=ones(17) => q 17 | k=ones((6, 2, 17)) => k 17 5 | v=ones((17, 2, 3)) => v 17 6
| k=ones((6, 3, 5)), v=ones((6, 3, 3)) => H G 4 3 | v=ones((6, 1, 3)) => v 1 2 | sink=ones(17) => sink 17 4
| k=ones((17, 6, 2, 5)), v=ones((17, 6, 2, 3)) => k 17 | v=None, d_v=17 => d_v 17 5 | v=None, d_v=0 => d_v 0
| q=[[[1.0] * 5] * 4] * 3 => TypeError | q=ones((3, 4, 5), int) => TypeError
| q=ma.ones((3, 4, 5)) => TypeError q MaskedArray | k=ones((6, 2, 5), complex) => TypeError
| v=full((6, 2, 3), "a") => TypeError | scale=10**400 | q=alien => TypeError cupy
WINDOWED: k_end=zeros(17, int) => k_end 17 3 | k_start=zeros((2, 3), int) => k_start 2
| k_start=zeros((), int) | k_end=zeros(3, float32) => TypeError | k_start=zeros(3) => TypeError
INDEXING: index_q=ones(17) => index_q 17 | index_k=ones((6, 17)) => index_k 17 4
| weights=ones((3, 17)) => weights 17 2 | weights=ones((3, 2), bool) => TypeError
| index_k="keys" => TypeError index_k str | index_q=alien => TypeError cupy
SELECTING: top_k=0 | top_k=2.5 => TypeError | top_k=array([17]) => TypeError top_k 17 | local_window=-1
| num_sink_tokens=-1 | local_window=3, num_sink_tokens=2 => local_window num_sink_tokens top_k 3 2 4
select_topk: scores=ones(17) => scores 17 | scores=where(arange(99)[:, None] == 77, nan, ones(6)) => NaN 77,
| scores=ones((3, 6), int) => TypeError | scores=ones((2, 4, 3, 6)), k_end=ones((2, 17, 3), int) => k_end 17
lightning_select: weights=full((3, 2), nan) => NaN
GATHERING: indices=repeat([[5], [-17], [2]], 6, 1) => IndexError indices -17
| indices=zeros((3, 2)) => TypeError | indices=repeat([[-1], [17], [2]], 6, 1) => IndexError indices 17
| indices=zeros((17, 2), int) => indices 17 3 | indices=full((3, 6), 2**32) => IndexError indices 4294967296
predictive_select: candidates=zeros((3, 2)) => TypeError | widen=-1
| candidates=zeros((17, 2), int) => candidates 17 3 | weights=full((3, 2), nan) => NaN
merge_attention: lses=[ones((3, 4))] * 3 => outs lses 2 3 | lses=[ones((3, 17))] * 2 => lses 17
apply_sink: sink=ones(17) => sink 17 4 | lse=ones((3, 17)) => lse 17 | out=alien => TypeError cupy
sparse_attention_backward: dout=ones((3, 4, 17)) => dout 17 3 | lse=ones((17, 4)) => lse 17 3
| out=ones((3, 17, 3)) => out 17 4
LOSSES: target=ones((3, 17)) => target 17 6 | indices=zeros((3, 2), int) => indices 2 target 6
learned_loss: mlp=(*ONES["mlp"][:3], ones(17)) => w_out 17 7 | q=alien => TypeError cupy
attention_target: scale=nan | scale=10**400 | q=alien => TypeError cupy
explain: t=0, s=4 => s 4 | weights=full((3, 2), nan) => NaN 2
pad_batch: multiple=0 | sequences=[ones((2, 3)), ones((2, 17))] => sequences 17
| sequences=[] => sequences empty | sequences=[ones(())]
packed_window: lengths=array([2, -17]) => lengths -17 | lengths=ones(2) => TypeError
padded_window: lengths=array([2, 17]) => lengths 17 | num_queries=-1
DSAConfig: top_k=None, sparse_ratio=0.1 => top_k None | strategy=array(["dynamic"]) => strategy array
| top_k=2.5 | fallback_dense_threshold=-1 | strategy="hybrid", local_window=0 | progressive_sparsity=1
| strategy="magic" | batch_pad_to_multiple=0 | indexer_precision="int4" | pattern="strided"
| sparse_ratio=0.0 | sparse_ratio=1.5 | num_sink_tokens=-1 | cache_strategy="fifo" | num_sink_tokens=2049
| top_k=0 | pattern="spiral" | local_window=7 | local_window=-1 | global_selection="lsh", strategy="fixed"
dsa_attention: **two(stack), lengths=array([3, 2]), k_end=ones((2, 3), int) => lengths k_end
| **two(stack, k=ones((2, 6, 2, 5)), v=None, d_v=5, index_k=ones((2, 6, 4))), lengths=ones(2, int) => q T
| **two(list, q=[[1.0]] * 2) => TypeError q list | **two(stack), lengths=ones(2) => TypeError lengths float64
| **two(stack), lengths=array([3, -1]) => lengths -1 | **two(list), lengths=array([3, 3]) => lengths None
| **two(list, k=[ones((3, 2, 5))]) => lengths k | **two(stack), lengths=array([3, 4]) => lengths 4
| blocksize=1 => TypeError blocksize options | **two(stack), lengths=array([3]) => lengths
| config={"top_k": 3} => TypeError | top_k=1 => TypeError top_k options | q=[[[1.0]]] => TypeError k
| layer=0.5 => TypeError | n_layers=2.5 => TypeError | cache={} => TypeError
KVCache: capacity=0 | grow="no" | batch=0 | storage="int3" | streams=2 | streams=()
| streams=(2, 0) => streams 0 | xp="numpy"
set_num_threads: n=0 | n=-1 | n=1.5 => TypeError
quantize_fp8: scale="e5m2" | block=0 | x=[1.0] => TypeError | x=zeros(3, uint8) => TypeError
dequantize_fp8: codes=ones((2, 200)) => TypeError | scales=ones((2, 3))
pack_kv_fp8: kv=ones((2, 577)) => 577
unpack_kv_fp8: packed=ones((2, 656)) => TypeError | packed=zeros(655, uint8) => packed 655
LayerDims: qk_rope_head_dim=7 | qk_rope_head_dim=130 => qk_rope_head_dim 130 128
| hadamard=True, index_head_dim=96 => index_head_dim 96 | n_heads=0 | norm_eps=True | rope_factor=0.5
| rope_theta=1.0 | norm_eps=0 | mscale="a" | beta_fast=nan | beta_slow=5e-324 | hadamard=1
| original_seq_len=10**400 | beta_fast=0.5 | index_rope_interleaved="False" | indexer_precision="int4"
"""  # functions: changes => the error, if no ValueError; its words, if not argument and value or dtype
CUPY: Any = types.ModuleType("cupy")  # a stand-in, whose arrays beside NumPy's are an error, and never copied
CUPY.ndarray = type("ndarray", (), {"__module__": "cupy", "shape": (3, 4, 5), "ndim": 3, "dtype": F32})


def bad_calls():
    """(function, error, {argument: what to change}, words of its message) for each function of each line."""
    main = {name: ONES[name][:3] for name in ("q", "k", "v", "index_q", "index_k", "weights")}
    two = lambda kind, **others: {name: kind([x, x]) for name, x in main.items()} | others  # noqa: E731
    scope = vars(np) | {"ma": np.ma, "ONES": ONES, "alien": CUPY.ndarray(), "two": two}
    for line in BAD_INPUT.strip().replace("\n|", " |").splitlines():
        names, _, calls = line.partition(": ")
        for name, call in itertools.product(GROUPS_OF.get(names, [names]), calls.split(" | ")):
            code, _, words = call.partition(" => ")
            error = next((x for x in (TypeError, IndexError) if words.startswith(x.__name__)), ValueError)
            changes, usual = eval(f"dict({code})", scope), ""
            for key, x in changes.items():
                kind = getattr(x, "dtype", type(x).__name__) if error is TypeError else ""
                usual += f"{key} {x if isinstance(x, int | float | str) else kind} "
            yield name, error, changes, words.removeprefix(error.__name__) or usual


BAD_CALLS = list(bad_calls())


@pytest.mark.parametrize("name, error, changes, fragments", BAD_CALLS)
def test_bad_input_is_an_error_that_names_it(dsa, name, error, changes, fragments, monkeypatch):
    """The good call works; with one argument changed, the error names it and the sizes or values at odds."""
    takes = inspect.signature(function := getattr(dsa, name)).parameters.values()
    own = {x.name for x in takes if x.default is x.empty or x.name == "v"}
    good = {key: x for key, x in ONES.items() if key in own}
    monkeypatch.setitem(sys.modules, "cupy", CUPY)
    for config in [dsa.DSAConfig(top_k=3), dsa.DSAConfig(top_k=99)] if "config" in own else [None]:
        good |= {"config": config} if config else {}  # of which the second keeps all keys
        function(**good)
        with pytest.raises(error) as caught:
            function(**(good | changes))
        assert caught.type is error or name == "DSAConfig"  # whose top_k may be of a wrong type, too
        for fragment in fragments.split():
            assert re.search(rf"(?<![\w]){re.escape(fragment)}(?![\w])", str(caught.value)), str(caught.value)


def test_what_else_is_refused(dsa, monkeypatch, tmp_path):
    """No streams, no k, more keys than int32 counts, what a storage makes infinite, no communicator, kernels;
    by a report, options that ask for nothing, as a tolerance that no rounding is within, or every error."""
    refused("streams is empty", dsa.KVCache, 4)
    refused("^streams is .*k among", dsa.HybridKVCache, 4, fast_bytes=99, v=(1, 3))
    index_k = np.broadcast_to(np.float32(1), (2**31, 4))  # of no queries: no memory even without the check
    refused("S is 2147483648", dsa.lightning_select, np.ones((0, 2, 4)), index_k, np.ones((0, 2)), 1)
    for storage, most in (("float16", 7e4), ("float32", 1e39), ("bfloat16", 3.4e38), ("fp8", 3.4e38)):
        with dsa.KVCache(3, storage=storage, k=(1, 65)) as cache:
            refused(f"^k is .*{storage}", cache.append, k=np.full((1, 2, 1, 65), most))
            assert cache.lengths.tolist() == [0]
    for comm in (None, 3, types.SimpleNamespace(rank=0, size=1)):
        refused("^comm is .*communicator", dsa.sharded_select, [], [], [], 3, comm, error=TypeError)
        refused("^comm is .*communicator", dsa.sharded_attention, *[[]] * 6, 3, comm, error=TypeError)
    for wrong in (0, -1, NAN, INF):
        refused("--tolerance", conform, dsa, limits=LIMITS | {"tolerance": wrong}, error=pytest.UsageError)
    for name, text in (("heads", "0"), ("stages", "dsa"), ("dtypes", "int8")):
        refused(text, REPORT[name][0], text, error=pytest.UsageError)
    monkeypatch.setitem(sys.modules, "cupy", CUPY)
    monkeypatch.setattr(dsa, "__file__", str(tmp_path / "dsa.py"))  # dsa.py was copied alone
    message = re.escape(f"dsa_kernels.cu is missing, expected it beside {tmp_path}")
    refused(message, dsa.Kernel(dsa.Chip(0, 90, 0, 1), "select_topk", 512).compile, error=FileNotFoundError)


# 2. What only a whole module, or a long one, shows: bits, tiles, errors -------------------------------------


@given(p=problems(windows=False), wrong=one_of([0, 1, 2**31, 2**32, -2, -(2**31), -(2**32)]), at=seeds)
def test_a_nan_that_is_seen_and_an_index_that_is_no_key_are_errors(impl, p, wrong, at):
    """In any row, not clipped, not wrapped; kernels do not check: none selects NaN or reads such a key."""
    indices, s, all_seen = np.full((*p.batch, p.T, 3), -1, np.int64), at % p.S, {"k_end": np.full(p.T, p.S)}
    nothing, nan = sparse(impl, p, indices), overwritten(p, [s], NAN)
    indices[..., -1, 1] = p.S + wrong if wrong in (0, 1) else wrong
    if impl.xp is not np:
        assert (select(impl, nan, **all_seen) != s).all()
        assert_same(sparse(impl, p, indices), nothing)
        if -(2**31) <= wrong < 2**31:  # int32 reaches the kernel as it stands
            assert_same(sparse(impl, p, indices.astype(np.int32)), nothing)
        return
    scores = np.zeros((*p.batch, p.T, p.S), np.float32)
    scores[..., -1, s] = NAN
    refused(r"(?i)nan", select, impl, nan, **all_seen)
    for windows in ({}, {"k_start": np.full(p.T, s), "k_end": np.full(p.T, s + 1)}):
        refused(r"(?i)nan", impl.select_topk, scores, p.top_k, **p.forced, **windows)
    refused("", sparse, impl, p, indices, error=IndexError)


@pytest.mark.parametrize("dtype", [F16, BFLOAT16], ids=str)
@pytest.mark.parametrize("H, G, D, Dv, T, K, scale", [
    (128, 1, 576, None, 80, 200, None), (33, 1, 576, None, 160, 64, -0.1), (100, 1, 512, None, 80, 129, 0),
    (64, 1, 576, None, 160, 1, None),
    *((*x, T, K, None) for T, K in ((1, 650), (150, 90), (3, 5)) for x in (
        (4, 4, 64, 64), (8, 2, 128, 128), (7, 1, 40, 24), (20, 2, 64, 128), (3, 3, 256, 8))),
])  # fmt: skip
def test_attention_at_the_widths_of_kernels(impl, H, G, D, Dv, T, K, scale, dtype):
    """V3.2's latents, in more jobs than a GPU has SMs, and few heads that share keys, in splits or one: -1
    anywhere, rows of nothing, tiles of nothing, a NaN that nobody selects, large logits, any scale, sinks."""
    rng, S = np.random.default_rng(D + H + K), 700
    q, k, v = (normal(rng, 2, *x).astype(dtype) for x in ((T, H, D), (S, G, D), (S, G, Dv or 1)))
    q[:, ::5], k[:, 0], v[:, 0] = q[:, ::5] * 20, NAN, NAN
    indices = rng.random((2, T, S - 1)).argsort(-1)[..., :K] + 1
    indices = np.where(rng.random(indices.shape) < rng.choice([0, 0.1, 0.99], (2, T, 1)), -1, indices)
    indices[:, ::7, : K // 2], indices[:, 5::7, K // 3 :], indices[:, 3:4] = -1, -1, -1
    rows = sorted({0, 1, 3, 5, 7, T // 2, T - 1} & {*range(T)})
    v, options = v if Dv else None, {} if Dv else {"d_v": 512}
    options |= {"scale": scale, "sink": (normal(rng, H) * 3).astype(F32)}
    windows = {"k_start": rng.integers(1, 300, (2, T)), "k_end": rng.integers(0, S, (2, T))}
    some = {name: x[:, rows] for name, x in windows.items()}
    found = [impl.sparse_attention(q, k, v, indices, **options)]
    expected = [sparse_by_hand(q[:, rows], k, v, indices[:, rows], **options)]
    found += [impl.dense_attention(q, k, v, **options, **windows)] if Dv else []
    expected += [dense_by_hand(q[:, rows], k, v, **options, **some)] if Dv else []
    for (out, lse), e in zip(found, expected, strict=True):
        assert_close(out[:, rows], e[0], TOLERANCE[dtype], "out")
        assert_close(lse[:, rows], e[1], 1e-3 if Dv else TOLERANCE[F32], "lse")


def index_rows(seed, T, S, dtype, batch=()):
    """Random floats with every key about four times, half of them one ulp off: any other rounding shows."""
    rng = np.random.default_rng(seed)
    J, E = int(rng.choice([1, 2, 3, 5, 8, 12])), int(rng.choice([3, 16, 33, 64, 128]))
    keys = normal(rng, *batch, S // 4 + 1, E)[..., rng.integers(0, S // 4 + 1, S), :].astype(dtype)
    if dtype in (F32, F64):
        nudged = (rng.random(S) < 0.5)[:, None] & (np.arange(E) == rng.integers(0, E, S)[:, None])
        keys = np.where(nudged, np.nextafter(keys, dtype.type(9)), keys)
    return normal(rng, *batch, T, J, E).astype(dtype), keys, normal(rng, *batch, T, J).astype(dtype)


@slow
@given(
    seed=seeds, T=st.integers(1, 300), S=st.integers(30, 300) | st.integers(900, 3000),
    K=one_of([1, 7, 64, 333]), dtype=any_dtype,
)  # fmt: skip
def test_selection_does_not_depend_on_chunking_batch_or_padding(impl, seed, T, S, K, dtype):
    """Bit for bit: in chunks of any size, over all keys or those so far; alone, in a batch, amid NaN."""
    T = min(T, S)
    batched = index_rows(seed, T, S, dtype, (3,))
    iq, ik, w = (x[0] for x in batched)
    whole, end = impl.lightning_select(iq, ik, w, K), S - T + 1 + np.arange(T)
    assert_same(impl.lightning_select(*map(np.asfortranarray, (iq, ik, w)), K), whole)
    for n in {1, 1 + seed % 7, 64, 1 + T // 2} if T > 1 else ():
        for rows in (slice(t, t + n) for t in range(0, T, n if n > 1 else max(1, T // 9))):
            so_far = impl.lightning_select(iq[rows], ik[: end[rows][-1]], w[rows], K)
            assert_same(padded(so_far, whole.shape[-1]), whole[rows])
            ends = {"k_start": np.zeros(len(end[rows]), int), "k_end": end[rows]}
            assert_same(impl.lightning_select(iq[rows], ik, w[rows], K, **ends), whole[rows])
    for at_once in (5, 70) if impl.xp is not np else ():  # rows of scores that a GPU holds
        with mock.patch.object(impl.module, "SCORE_BYTES", at_once * S * 4):
            assert_same(impl.lightning_select(iq, ik, w, K), whole)
    T, end, batched = min(T, 60), end[:60], [batched[0][:, :60], batched[1], batched[2][:, :60]]
    alone = [impl.lightning_select(*(x[b] for x in batched), K, k_end=end) for b in range(3)]
    assert_same(impl.lightning_select(*batched, K, k_end=end), np.stack(alone))
    for left, right in ((1, 0), (seed % 130, 1 + seed % 77), (513 + seed % 700, 0)):
        keys = np.pad(ik.astype(F64), [(left, right), (0, 0)], constant_values=NAN).astype(dtype)
        iq5, w5 = (np.pad(x[:T], [(0, 5)] + [(0, 0)] * (x.ndim - 1)) for x in (iq, w))
        start, stop = np.full(T + 5, left), np.pad(left + end, (0, 5), constant_values=left)
        shifted = impl.lightning_select(iq5, keys, w5, min(K, S), k_start=start, k_end=stop)
        assert_same(shifted[:T], np.where(alone[0] < 0, -1, alone[0] + left).astype(np.int32))
        assert (shifted[T:] == -1).all()


@pytest.mark.parametrize("value", [NAN, INF])
def test_a_value_that_one_row_lists_is_its_alone(impl, value):
    """And in one number, also where most keys are kept, which tempts to attend densely under a mask."""
    q, k, v = (p := tokens(0, (), 300)).q[:9], p.k, p.v
    indices = np.where((np.arange(9)[:, None] > 0) & (np.arange(300) == 7), -1, np.arange(300))
    expected = impl.sparse_attention(q, k, v, indices)[0]
    expected[0, :, 0], v[7, :, 0] = NAN, value  # where anything may be
    found = impl.sparse_attention(q, k, v, indices)[0]
    assert_close(found, expected, TOLERANCE[F64])
    assert not np.isfinite(found[0, :, 0]).any()


@given(p=problems())
def test_no_slot_at_all_is_the_empty_set(impl, p):
    """K = 0, also where S = 0: out 0 and lse -inf. Nor is it an error to have no heads, or no index heads."""
    few = p.q[..., :0, :], p.index[0][..., :0, :], p.index[2][..., :0]
    none = impl.sparse_attention(few[0], p.k, p.k, np.zeros((*p.batch, p.T, 2), np.int32))[1]
    assert none.shape == (*p.batch, p.T, 0)
    assert not impl.index_scores(few[1], p.index[1], few[2], k_end=np.full(p.T, p.S)).any()
    target = impl.attention_target(few[0], p.k)
    assert not target.any() and not impl.indexer_loss(few[1], p.index[1], few[2], target)[0]
    for k in (p.k[..., :0, :, :], p.k):
        out, lse = impl.sparse_attention(p.q, k, k, np.zeros((*p.batch, p.T, 0), np.int32))
        assert not out.any() and (lse == -INF).all()


# 3. The harness itself: modules with one bug ----------------------------------------------------------------

TYPED = """
def typed(stage, by_hand):
    def call(*args, **options):
        found, dtypes = by_hand(*args, **options), due(stage, [*args, *options.values()])
        return found.astype(*dtypes) if len(dtypes) < 2 else tuple(map(np.ndarray.astype, found, dtypes))
    return call
globals().update({stage: typed(stage, globals()[name]) for stage, name in NAMES.items()})
"""
NAMES = {stage: oracle.__name__ for stage, oracle in BY_HAND.items()}
ORACLES = dict.fromkeys([accumulator, due, as_list, reach, select_by_sort, *BY_HAND.values()])
RIGHT = "\n".join([*map(inspect.getsource, ORACLES), TYPED])  # the oracles, in the dtypes that are due
PLANTED = """
index_scores
np.maximum(np.einsum("...tje,...se->...tjs", q, k), 0) => np.einsum("...tje,...se->...tjs", q, k)
(x.astype(F64) for x => (x.astype(F32) for x | (x.astype(index_q.dtype) for x
scores, -INF) => scores, 0) | scores[..., np.arange(scores.shape[-1]) % 512], -INF)
np.zeros(T, np.int64) if k_start is None else k_start => np.zeros(T, np.int64)
np.clip(k_end, 0, S) => np.clip(np.int32(k_end), 0, S)
np.broadcast_to(np.clip(k_start, 0, S), => np.broadcast_to(np.clip(k_start, 0, S).ravel()[:T],
index_k, weights)) => index_k[(slice(1),) * (index_k.ndim - 2)], weights))
each = np.maximum => index_q[:] = 0; each = np.maximum
select_topk
(visible, -row => (-visible, -row | (visible, np.copysign(1, row[visible]) < 0, -row
-row[visible], free => row[visible], free | -row[visible] * (abs(row[visible]) > 1e-38), free
np.asarray(row, F64) => np.asarray(row, F32)
sorted(visible[ => list(visible[
[:top_k]].tolist()) => [: top_k + num_sink_tokens]].tolist())[:top_k]
np.array(rows, np.int32) => np.fmod(rows, 65536).astype(np.int32)
[-1] * => [0] *
free[:num_sink_tokens] = free => free[visible < num_sink_tokens] = free | free
= free[max(len(visible) - local_window, 0) :] = 0 => = 0
lightning_select
return select_by_hand(scores, top_k, **forced) => return select_by_hand(scores, top_k)
return select_by_hand(scores, => return select_by_hand(scores.astype(np.float16),
return select_by_hand(scores, => scores.T[::4] = scores.T[::4].astype(F32); return select_by_hand(scores,
weights, k_start=k_start, k_end=k_end) => weights, k_end=k_end)
sparse_attention
D**-0.5 if scale is None else scale => 1.0 if scale is None else scale | D**-0.5
np.arange(H) // (H // k.shape[-2]) => np.arange(H) % k.shape[-2]
k[..., :d_v] if v is None => k[..., -d_v:] if v is None
np.log(share.sum(0)) => np.log2(share.sum(0)) | np.log(share.astype(np.float16).cumsum(0, np.float16)[-1])
"out": floats[0] => "out": F64
accumulator(*floats)) => floats[0])
lse, sink)), lse => lse, sink)), lse if sink is None else np.logaddexp(lse, sink)
q, k = q.astype(F64), k.astype(F64) => q, k = q.astype(F32), k.astype(F32)
indices[at][indices[at] >= 0] => indices[at] | np.unique(indices[at][indices[at] >= 0])
dense_attention
np.arange(lo[at], hi[at]) => np.arange(lo[at], hi[at] - 1) | np.arange(hi[at]) | np.arange(lo[at], hi[at])%512
np.clip(k_start, 0, S), => k_start,
merge_attention
np.where(lse > -INF, lse, 0) => lse
np.array(outs).astype(F64), np.array(lses) => np.array(outs[:2]).astype(F64), np.array(lses[:2])
apply_sink
sink.astype(F64) - lse => lse - sink.astype(F64) | sink[0].astype(F64) - lse
np.where(lse > -INF, 1 / (1 + np.exp(sink.astype(F64) - lse)), 0) => 1 / (1 + np.exp(sink.astype(F64) - lse))
"""  # a stage, and pieces of the module above with what makes them wrong


def report_on(source, stages=None, **effort):
    """The status of a report on a module of this source, and its lines."""
    said: list[str] = []
    module = types.ModuleType("mine")
    vars(module).update(np=np, F32=F32, F64=F64, INF=INF, DTYPES=DTYPES, STAGE=STAGE, NAMES=NAMES)
    exec(source, vars(module))
    status = conform(module, stages, say=said.append, **effort)
    return status, "\n".join(said).splitlines()


@pytest.mark.parametrize("stage, right, wrong", [
    (stage, right, wrong) for stage, lines in re.findall(r"^(\w+)\n((?:.* => .*\n)+)", PLANTED, re.M)
    for right, wrongs in (line.split(" => ") for line in lines.splitlines()) for wrong in wrongs.split(" | ")
])  # fmt: skip
def test_the_report_finds_a_planted_bug(stage, right, wrong):
    """Status 1, the function named, and in less than 25 lines a call that can be pasted."""
    assert right in RIGHT
    status, said = report_on(RIGHT.replace(right, wrong), [stage], examples=40, seconds=0.1)
    block = list(itertools.takewhile(bool, said))
    assert status == 1 and block[0].startswith(f"{stage} breaks a rule: ") and said[-1] == f"FAILED: {stage}"
    assert len(block) < 25 and max(map(len, block)) <= 140
    inputs = itertools.dropwhile(lambda line: not re.match(r"  \w+ = ", line), block)
    call = itertools.takewhile(lambda line: not re.match("  (returned|it) ", line), inputs)
    exec(textwrap.dedent("\n".join(call)).replace(f"{stage}(", f"BY_HAND['{stage}']("), SCOPE | globals())


@pytest.mark.parametrize("source, stages, status, words", [
    (RIGHT, None, 0, f"select_topk does not raise.*{len(STAGES)} stages tested, none failed$"),
    ("", None, 1, "NOTHING WAS TESTED$"),
    ("def index_score(*args): pass", None, 1, "did you mean index_scores?.*NOTHING WAS TESTED$"),
    (f"{RIGHT}del merge_attention", ["apply_sink", "merge_attention"], 1, "NOT TESTED.*merge"),
    (RIGHT.replace("(visible, -row", "(-visible, -row"), None, 1, "finding 1 of 1: a wrong tie.*FAILED: "),
    ("".join(f"def {x}(*_, **__): return np.ones(3)\n" for x in STAGES), None, 1, f"FAILED: .*{STAGES[-1]}$"),
])  # fmt: skip
def test_the_report_says_what_it_has_tested(source, stages, status, words):
    """Nothing tested, or a stage asked for and missing, is a failure; 150 lines are the most."""
    found, said = report_on(source, stages, examples=10, seconds=0.1)
    assert found == status and re.search(words, "\n".join(said[-12:]), re.S), said
    assert len(said) <= (150 if "FAILED" in said[-1] else 40)


# 8. explain, predictive_select, SELECTORS -------------------------------------------------------------------

FAR = 10**12  # nothing is allocated by a number that a caller gives


@given(p=problems(batches=[()], max_keys=12))
def test_explain_gives_the_parts_of_a_score_and_its_rank(dsa, p):
    """The contributions add up to eq. (1), and the rank is the place in the order that selection sorts by."""
    scores, (q, k, w) = index_scores_by_hand(*p.index, **p.windows), in_float64(p.index)
    ranks = np.argsort(-scores, axis=-1, kind="stable").argsort(-1)
    for (t, s), expected in np.ndenumerate(scores):
        if expected == -INF:
            refused(r"\bs\b", dsa.explain, *p.index, t, s, **p.windows)
        else:
            contributions, score, rank = dsa.explain(*p.index, t, s, **p.windows)
            assert np.array_equal(contributions, w[t] * np.maximum(q[t] @ k[s], 0))
            assert score == expected and rank == ranks[t, s]


@given(p=problems(), seed=seeds, widen=one_of([0, 1, 2, 3, FAR]), block=one_of([1, 2, 3, 4, FAR]))
def test_predictive_select_is_exact_among_its_candidates(dsa, p, seed, widen, block):
    """Eq. (2) over candidates, or blocks, neighbours and forced keys; lightning when all keys are there.
    hierarchical's are the blocks of the best means, as many as oversample * K keys fill, and both ends.
    Scores are index_scores' to the bit, of keys that are an ulp apart too, whoever else looks at them."""
    candidates = drawn_indices(p, seed)[..., : max(1, p.S // 3)].astype(int) // block
    scores = index_scores_by_hand(*p.index, **p.windows)
    w, z = p.forced["local_window"], p.forced["num_sink_tokens"]
    for b, t in itertools.product(np.ndindex(*p.batch), range(p.T)):
        visible, s = range(p.lo[b][t], p.hi[b][t]), np.arange(p.S)
        first = block * candidates[b][t][candidates[b][t] >= 0, None]
        seen = ((s >= first - widen) & (s < first + block + widen)).any(0)
        seen[[*visible[:z], *visible[max(0, len(visible) - w) :]]] = True
        scores[b][t, ~seen] = -INF
    predict = functools.partial(dsa.predictive_select, *p.index, p.top_k, **p.forced, **p.windows)
    expected = select_by_hand(scores, p.top_k, **p.forced, k_start=p.lo, k_end=p.hi)
    np.testing.assert_array_equal(predict(candidates, widen=widen, block=block), expected)
    everything = np.broadcast_to(np.arange(p.S), (*p.batch, p.T, p.S))
    actual = predict(everything.astype(np.uint64 if seed % 2 else np.int16))
    assert_same(actual, dsa.lightning_select(*p.index, p.top_k, **p.forced, **p.windows))
    last, oversample = (p.hi - 1) // 4, 1 + seed % 3
    first = np.minimum(p.lo // 4, last)  # of an empty window too
    means = np.stack([p.index_k[..., s : s + 4, :].astype(F64).mean(-2) for s in range(0, p.S, 4)], -2)
    most = {"top_k": math.ceil(oversample * p.top_k / 4), "k_start": first + 1, "k_end": last}
    best = lightning_by_hand(p.index_q, means, p.weights, **most)
    blocks = np.concatenate([first[..., None], best, last[..., None]], -1)
    assert_same(by_selector(dsa, p, "hierarchical", oversample=oversample), predict(blocks, block=4))
    S = 500 + 200 * (seed % 2)  # up to 512 the queries of a block share their keys
    index, candidates = index_rows(seed, 30, S, F32), np.random.default_rng(seed).integers(-1, S, (30, 99))
    seen = (candidates[..., None] == np.arange(S)).any(1)
    scores = np.where(seen, dsa.index_scores(*index), -INF)
    assert_same(dsa.predictive_select(*index, 20, candidates), dsa.select_topk(scores, 20))


OPTIONS: dict[str, dict] = {  # small, so that blocks and projections mean something at these sizes
    "lightning": {}, "approximate": {"dim": 2}, "lsh": {"bits": 5, "oversample": 2}, "learned": {"seed": 3},
    "hierarchical": {"block": 4, "oversample": 1}, "window": {}, "strided": {}, "global": {},
    "random": {"seed": 1}, "oracle": {"scale": 0.5},
}  # fmt: skip
SELECTOR_NAMES = list(OPTIONS)
STATIC = ["window", "strided", "global", "random"]


def by_selector(dsa, p, name, **kwargs):
    names = dict(zip(("index_q", "index_k", "weights"), p.index, strict=True))
    kwargs = p.forced | p.windows | OPTIONS[name] | kwargs
    return dsa.SELECTORS[name](p.q, p.k, kwargs.pop("top_k", p.top_k), **names, **kwargs)


@pytest.mark.parametrize("name", SELECTOR_NAMES)
@given(p=problems(data=normal, dtypes=[F32, F64, BFLOAT16]), value=one_of([-9.0, 9.0]), data=st.data())
def test_every_selector_keeps_exactly_k_visible_keys(dsa, name, p, value, data):
    """Equal K or no comparison: one format, count and forced keys; what no row may see changes no row."""
    indices = by_selector(dsa, p, name)
    assert indices.dtype == np.int32 and indices.shape == (*p.batch, p.T, min(p.top_k, p.S))
    for b, t in itertools.product(np.ndindex(*p.batch), range(p.T)):
        visible, row = range(p.lo[b][t], p.hi[b][t]), indices[b][t].tolist()
        kept = row[: min(p.top_k, len(visible))]
        assert row[len(kept) :] == [-1] * (len(row) - len(kept)) and kept == sorted(set(kept))
        last = max(0, len(visible) - p.forced["local_window"])
        assert {*visible[: p.forced["num_sink_tokens"]], *visible[last:]} <= {*kept} <= {*visible}
    if name in STATIC:
        blind = replace(overwritten(p, range(p.S), NAN), q=np.full_like(p.q, NAN))
        assert_same(by_selector(dsa, blind, name), indices)
    t = data.draw(st.integers(0, p.T - 1))  # keys that only other rows see say nothing to this one
    unseen = [*range(p.lo[..., t].min()), *range(p.hi[..., t].max(), p.S)]
    assert_same(by_selector(dsa, overwritten(p, unseen, value), name)[..., t, :], indices[..., t, :])
    k, index_k = np.insert(p.k, [0] * 4, 0, axis=-3), np.insert(p.index_k, [0] * 4, 0, axis=-2)
    p = replace(p, k=k, index_k=index_k, windows={"k_start": p.lo + 4, "k_end": p.hi + 4})
    found = padded(by_selector(dsa, p, name), p.S)  # nor those in front of all windows, a block of them
    assert_same(np.where(found < 0, -1, found - 4), padded(indices, p.S))


@pytest.mark.parametrize("name", SELECTOR_NAMES)
def test_every_selector_takes_nothing_and_refuses_nan(dsa, name):
    """No query, key or batch is an empty table, more than all keys is all of them, and equal keys tie."""
    assert sorted(dsa.SELECTORS) == sorted(SELECTOR_NAMES)  # a contract: bench.py and DSAConfig go by them
    for batch, T, S in (((2,), 0, 9), ((2,), 3, 0), ((0,), 3, 9)):
        keys = tokens(0, batch, S)
        few = replace(tokens(0, batch, T), k=keys.k, v=keys.v, index_k=keys.index_k)
        indices = by_selector(dsa, few, name, top_k=4)
        assert indices.shape == (*batch, T, min(4, S)) and (indices == -1).all()
    p = tokens(0, (), 9)
    for forced in ({}, {"local_window": 2**64}, {"num_sink_tokens": 2**63, "local_window": 2**63}):
        assert_same(by_selector(dsa, p, name, top_k=2**64, **forced), by_selector(dsa, p, name, top_k=9))
    p, last = tokens(0, (), 300), np.uint8(255)  # nor is counted in a caller's narrow integers
    assert dsa.explain(*p.index, last, last)[1:] == dsa.explain(*p.index, 255, 255)[1:]
    p = overwritten(p, [200], NAN)
    if name not in STATIC:
        refused("NaN", by_selector, dsa, p, name, top_k=4)
    for option in ("blocksize", "place"):
        refused(option, by_selector, dsa, p, name, **{option: 3}, error=TypeError)
    rng, shapes = np.random.default_rng(0), ((64, 1, 32), (1, 1, 32), (64, 8, 64), (1, 64), (64, 8))
    q, k, index_q, index_k, weights = (normal(rng, *x).astype(F32) for x in shapes)
    alike = {"k": np.repeat(k, 101, 0), "index_k": np.repeat(index_k, 101, 0), "top_k": 8}
    for n in (64, 1) if name not in STATIC and name != "oracle" else ():
        own = {"index_q": index_q[:n], "weights": weights[:n], "k_end": np.full(n, 101)}
        found = dsa.SELECTORS[name](q[:n], **alike, **own)
        np.testing.assert_array_equal(found, np.tile(np.arange(8), (n, 1)))


def mlp_by_hand(q, k, w_q, w_k, bias, w_out):
    """The learned scores, w_out . relu(w_q q + w_k k + b), q summed over a group's heads."""
    of_key = k.reshape(*k.shape[:-2], -1)
    of_group = q.reshape(*q.shape[:-2], k.shape[-2], -1, k.shape[-1]).sum(-2).reshape(*q.shape[:-2], -1)
    features = (of_group @ w_q.T + bias)[..., None, :] + (of_key @ w_k.T)[..., None, :, :]  # [..., T, S, F]
    return np.maximum(features, 0) @ w_out


@given(p=problems(data=normal, dtypes=[F32, F64, BFLOAT16]))
def test_a_selector_is_equation_2_of_scores_of_its_own(dsa, p):
    """With nothing left out; oracle's are attention summed over heads: no other K keys hold more of it."""
    windows, scale, D = {"k_start": p.lo, "k_end": p.hi}, OPTIONS["oracle"]["scale"], p.q.shape[-1]
    s, end, size = np.arange(p.S), p.hi[..., None], (p.hi - p.lo)[..., None]
    stride, rng, G = np.maximum(1, np.ceil(size / p.top_k)), np.random.default_rng(p.T), p.k.shape[-2]
    if p.q.dtype == F64:
        names = np.broadcast_to(np.eye(p.S)[:, None], (*p.k.shape[:-1], p.S))
        mass = dense_by_hand(p.q, p.k, names, scale=scale, **windows)[0].sum(-2)
        expected = select_by_hand(mass, p.top_k, **windows, **p.forced)
        np.testing.assert_array_equal(by_selector(dsa, p, "oracle"), expected)
    p.q, p.k = (np.round(x.astype(F64) * 4) for x in (p.q, p.k))
    mlp = *np.round(normal(rng, 2, 3, G * D) * 2), np.array([1.0, -2, 3]), np.array([1.0, 2, -1])
    products = np.einsum("...thd,...shd->...ts", p.q, p.k.repeat(p.q.shape[-2] // G, -2))
    of_index = dsa.index_scores(*p.index, **p.windows)
    for name, scores, options in (
        ("lightning", of_index, {}), ("hierarchical", of_index, {"oversample": p.S + 8}),
        ("hierarchical", of_index, {"block": FAR}),
        ("window", s, {}), ("global", -s, {}), ("strided", -((end - 1 - s) % stride), {}),
        ("approximate", products, {"projection": np.eye(D)}), ("lsh", products, {"oversample": p.S}),
        ("learned", mlp_by_hand(p.q, p.k, *mlp), {"mlp": mlp}),
    ):  # fmt: skip
        scores = np.broadcast_to(scores, (*p.batch, p.T, p.S))
        expected = select_by_hand(scores, p.top_k, **windows, **p.forced)
        np.testing.assert_array_equal(by_selector(dsa, p, name, **options), expected)
    refused("projection", by_selector, dsa, p, "approximate", projection=np.eye(D + 1))


def test_a_seed_and_a_precision_change_what_is_selected(dsa):
    """random draws anew for each query; fp16 rounds the indexer's q and k to float16, and to no infinity."""
    shapes = (9, 2, 8), (90, 2, 8), (9, 3, 8), (90, 8), (9, 3)
    q, k, index_q, index_k, weights = (normal(np.random.default_rng(9), *shape) for shape in shapes)
    alike = {"k_start": np.zeros(9, int), "k_end": np.full(9, 90)}
    for name in ("approximate", "lsh", "random"):
        zero, same, one = (dsa.SELECTORS[name](q, k, 9, seed=seed, **alike) for seed in (0, 0, 1))
        assert (zero == same).all() and (zero != one).any()
    assert len({tuple(row) for row in zero.tolist()}) == 9
    index_k = index_k[:1] + 1e-4 * index_k  # so alike that rounding decides
    config = dsa.DSAConfig(top_k=9, indexer_precision="fp16")
    found = dsa.dsa_attention(q, k, k, index_q, index_k, weights, config)[2]
    rounded = dsa.lightning_select(index_q.astype(F16), index_k.astype(F16), weights, 9)
    assert (found == rounded).all() and (found != dsa.lightning_select(index_q, index_k, weights, 9)).any()
    large, ends = index_k * np.where(np.arange(90) < 80, 1, 1e6)[:, None], {"k_end": np.full(9, 80)}
    with np.errstate(all="raise"):  # which no query sees, and then all
        found = [dsa.dsa_attention(q, k, k, index_q, x, weights, config, **ends)[2] for x in (index_k, large)]
        assert (dsa.dsa_attention(q, k, k, index_q, 1e30 * large, weights, config)[2] >= 0).all()
    assert_same(*found)


# 9. DSAConfig -----------------------------------------------------------------------------------------------


def test_config_defaults_and_immutability(dsa):
    """The table of the specification, in a dataclass that nobody can change under a running model."""
    config = dsa.DSAConfig()
    assert list(vars(config).items()) == [
        ("top_k", 2048), ("sparse_ratio", None), ("strategy", "dynamic"), ("local_window", 0),
        ("num_sink_tokens", 0), ("global_selection", "lightning"), ("pattern", "window"),
        ("batch_pad_to_multiple", 64), ("cache_strategy", "lru"), ("indexer_precision", "fp32"),
        ("fallback_dense_threshold", None), ("progressive_sparsity", False),
    ]  # fmt: skip
    assert dsa.SELECTION_RATIOS == {"aggressive": 0.01, "balanced": 0.03, "conservative": 0.05, "safe": 0.10}
    refused("top_k", setattr, config, "top_k", 5, error=FrozenInstanceError)
    forced: Any = {"local_window": np.uint8(200), "num_sink_tokens": np.uint8(100)}  # 44 in uint8
    ratio = dsa.DSAConfig(sparse_ratio=np.float16(0.125), strategy="hybrid", **forced)
    assert [ratio.top_k_at(num_keys=n) for n in (1000, 10**6)] == [300, 125000]
    refused("num_keys is None", ratio.top_k_at)


@given(top_k=st.integers(1, 5000), n=st.integers(2, 80), S=st.integers(1, 10**6), window=st.integers(0, 50))
def test_top_k_at(dsa, top_k, n, S, window):
    """A ratio of S, rounded up; progressive from 2 K to K / 2 by equal factors, at least the forced."""
    for ratio in dsa.SELECTION_RATIOS.values():
        assert dsa.DSAConfig(sparse_ratio=ratio).top_k_at(num_keys=S) == max(1, math.ceil(ratio * S))
    kept = {"strategy": "hybrid" if window else "dynamic", "local_window": min(window, top_k)}
    config, least = dsa.DSAConfig(top_k=top_k, progressive_sparsity=True, **kept), max(1, min(window, top_k))
    for layer in range(n):
        step, exact = config.top_k_at(layer, n), 2 * top_k * 0.25 ** (layer / (n - 1))
        assert isinstance(step, int) and least <= step and abs(step - max(least, exact)) <= 1
        assert layer > 0 or step == 2 * top_k
    assert config.top_k_at(0, 1) == dsa.DSAConfig(top_k=top_k).top_k_at(n - 1, n) == top_k


# 10. Batches and dsa_attention ------------------------------------------------------------------------------


def attend(dsa, p, config, rows=None, **kwargs):
    """dsa_attention on a problem, or on some rows of its token axes."""
    arrays = [x if rows is None or x is None else x[rows] for x in (p.q, *p.kv, *p.index)]
    return dsa.dsa_attention(*arrays, config, **(p.latent | {"scale": p.scale} | kwargs))


def tokens(seed, batch, T, dtype=F64, tied=False):
    """A problem whose queries and keys are the same T tokens, in random floats."""
    rng = np.random.default_rng(seed)
    array = lambda *shape: rng.standard_normal((*batch, T, *shape)).astype(dtype)  # noqa: E731
    v, latent = (None, {"d_v": 3}) if tied else (array(2, 3), {})
    main, index = (array(4, 5), array(2, 5), v, latent), (array(2, 4), array(4), array(2))
    return Problem(batch, 5, {}, {}, None, *main, *index)


def assert_as_alone(found, b, n, alone, dtype):
    """Of a ragged batch the first n rows of sequence b are as alone, the others padding: 0, -inf and -1."""
    out, lse, indices = (x[b] for x in found)
    assert_attention((out[:n], lse[:n]), alone[:2], dtype)
    np.testing.assert_array_equal(padded(indices[:n], 64), padded(alone[2], 64))
    assert (out[n:] == 0).all() and (lse[n:] == -INF).all() and (indices[n:] == -1).all()


@given(p=problems() | problems(data=normal), z=st.none() | sinks)
def test_dsa_attention_selects_then_attends(dsa, p, z):
    """Equations (1) to (3) in one call, whose indices say what was kept or that it was dense."""
    z = None if z is None else np.array(z[: p.q.shape[-2]], np.float32)
    strategy = "hybrid" if p.forced["local_window"] else "dynamic"
    every = select_by_hand(np.zeros((*p.batch, p.T, p.S)), p.S, k_start=p.lo, k_end=p.hi)
    scale = None if p.scale is None else np.array(p.scale)  # which is a number, too
    for top_k, dense in ((p.top_k, None), (max(p.top_k, p.S - 1), None), (p.top_k, p.S - 1), (p.top_k, p.S)):
        config = dsa.DSAConfig(top_k, strategy=strategy, fallback_dense_threshold=dense, **p.forced)
        few = (top_k if dense is None else dense) >= p.S
        blind = replace(p, index_q=np.full_like(p.index_q, NAN)) if few else p  # it is not looked at
        kept = every if few else dsa.lightning_select(*p.index, top_k, **p.forced, **p.windows)
        out, lse, indices = attend(dsa, blind, config, sink=z, scale=scale, **p.windows)
        np.testing.assert_array_equal(indices, kept)
        assert_attention((out, lse), sparse(dsa, p, kept, sink=z), p.q.dtype)
    if p.windows:  # one end leaves the other causal, also of scores alone, of which else all are visible
        scores = dsa.index_scores(*p.index, k_end=np.full(p.T, p.S))
        assert_same(dsa.select_topk(scores, p.top_k, **p.forced, **p.windows), select(dsa, p))


@pytest.mark.parametrize("name", SELECTOR_NAMES[:-1])
def test_dsa_attention_uses_the_selector_that_its_config_names(dsa, name):
    """strategy, global_selection and pattern pick of SELECTORS; options reach it; ways to set K agree."""
    p, fixed = tokens(0, (2,), 90), name in STATIC
    choice = {"strategy": "fixed", "pattern": name} if fixed else {"global_selection": name}
    window: dict[str, Any] = {} if fixed else {"local_window": 4, "strategy": "hybrid"}
    for fields, call in (
        ({"top_k": 9}, {}), ({"sparse_ratio": 0.1}, {}), ({"top_k": 9} | window, {}),
        ({"top_k": 9, "progressive_sparsity": True}, {"layer": 1, "n_layers": 3}),
    ):  # fmt: skip
        forced = {"num_sink_tokens": 2, "local_window": fields.get("local_window", 0)}
        indices = attend(dsa, p, dsa.DSAConfig(**choice | fields | forced), **OPTIONS[name], **call)[2]
        np.testing.assert_array_equal(indices, by_selector(dsa, p, name, top_k=9, **forced))
    with new_cache(dsa, "KVCache", p, 90, storage="fp8", qk_rope_head_dim=1) as cache:  # reads what it needs
        found = attend(dsa, p, dsa.DSAConfig(top_k=9, **choice), cache=cache, **OPTIONS[name])[2]
        stored = replace(p, k=cache.read("k"), index_k=cache.read("index_k"))
        np.testing.assert_array_equal(found, by_selector(dsa, stored, name, top_k=9))


# 11. KVCache and HybridKVCache ------------------------------------------------------------------------------

CACHES = pytest.mark.parametrize("kind", ["KVCache", "HybridKVCache"])
COPIES: Any = copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))
STORAGES = ["float64", "float32", "float16", "bfloat16", "fp8"]


def new_cache(dsa, kind, p, capacity, fast_tokens=3, local_window=0, **kwargs):
    """A cache for a problem's tokens; a hybrid one has fast room for its windows and a few more."""
    streams = {name: x.shape[2:] for name, x in streams_of(p).items()}
    kwargs = {"batch": p.batch[0], "storage": "float64"} | kwargs
    if kind == "HybridKVCache":
        itemsize = {"float32": 4, "float16": 2, "bfloat16": 2}.get(kwargs["storage"], 8)
        width = sum(math.prod(shape) for name, shape in streams.items() if name != "index_k")
        kwargs["fast_bytes"] = (kwargs["batch"] * local_window + fast_tokens) * width * itemsize
        kwargs["local_window"] = local_window
    return getattr(dsa, kind)(capacity, **kwargs, **streams)


def streams_of(p, rows: Any = ...) -> dict[str, Any]:
    return {n: x[rows] for n, x in (("k", p.k), ("v", p.v), ("index_k", p.index_k)) if x is not None}


def snapshot(cache):
    stored = [[cache.read(x)[b, :n].tobytes() for b, n in enumerate(cache.lengths)] for x in ("k", "index_k")]
    return cache.lengths.tolist(), stored


@slow
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=4), seed=seeds, tied=flags,
    dtype=wide_floats, grow=flags, step=one_of([1, 3, 40]), multiple=one_of([1, 3, 64]),
    options=one_of([
        {}, {"strategy": "fixed", "pattern": "random"}, {"sparse_ratio": 0.2},
        {"fallback_dense_threshold": 9}, {"strategy": "fixed", "pattern": "random", "sparse_ratio": 0.2},
        {"num_sink_tokens": 1}, {"strategy": "hybrid", "local_window": 3, "num_sink_tokens": 1},
    ]),
)  # fmt: skip
@example(lengths=[3], seed=0, tied=False, dtype=F32, grow=True, step=3, multiple=64, options={})
@CACHES
def test_sequences_are_as_if_alone(dsa, kind, lengths, seed, tied, dtype, grow, step, multiple, options):
    """Padded, end to end, or through a cache in steps of any sizes: none sees another, or padding (NaN)."""
    assume(max(lengths) > 0 and ("pattern" not in options or "random" in dsa.SELECTORS))  # of Part II
    lengths, rng, B, T = np.array(lengths), np.random.default_rng(seed), len(lengths), max(lengths) + 1
    by_length = options.keys() & {"sparse_ratio", "fallback_dense_threshold"}  # of the whole axis
    p, done = tokens(seed, (B,), T, dtype, tied), np.zeros(B, int)
    every: list[Any] = [p.q, *p.kv, *p.index]
    config = dsa.DSAConfig(top_k=5, batch_pad_to_multiple=multiple, **options)
    alone = [attend(dsa, p, config, rows=(i, slice(n))) for i, n in enumerate(lengths)]
    for x, (i, n) in itertools.product(every, enumerate(lengths)):
        x is None or x[i, n:].fill(NAN)
    lists: Any = [None if x is None else [x[i, :n] for i, n in enumerate(lengths)] for x in every]
    listed = dsa.dsa_attention(*lists, config, **p.latent)
    assert listed[0].shape[1] == -(-max(lengths) // multiple) * multiple
    assert listed[2].shape[2] <= max(lengths)  # goes by keys, not by padding
    found = [listed, attend(dsa, p, config, lengths=lengths)]
    if not by_length:
        packed = [None if x is None else np.concatenate(x) for x in lists]
        k_start, k_end = dsa.packed_window(lengths)
        assert dsa.padded_window(0 * lengths, 0)[1].shape == (len(lengths), 0)
        joined = dsa.dsa_attention(*packed, config, **p.latent, k_start=k_start, k_end=k_end)
        joined = (*joined[:2], np.where(joined[2] < 0, -1, joined[2] - k_start[:, None]))
        found.append([np.split(x, np.cumsum(lengths)[:-1]) for x in joined])
    for result, (i, n) in itertools.product(found, enumerate(lengths)):
        assert_as_alone(result, i, n, alone[i], dtype)
    kwargs = {"capacity": 1 if grow else T - 1, "grow": grow, "storage": dtype.name}
    with new_cache(dsa, kind, p, local_window=config.local_window, **kwargs) as cache:
        while (done < lengths).any():
            new = lengths if by_length else np.minimum(lengths - done, rng.integers(0, step + 1, B))
            rows = np.arange(max(new)) + np.zeros((B, 1), int)
            rows = np.where(rows < new[:, None], done[:, None] + rows, -1)  # the last of all is NaN
            part = [None if x is None else x[np.arange(B)[:, None], rows] for x in every]
            found = dsa.dsa_attention(*part, config, **p.latent, cache=cache, lengths=new)
            for i, n in enumerate(new):
                assert_as_alone(found, i, n, [x[done[i] : done[i] + n] for x in alone[i]], dtype)
            done += new
            assert cache.lengths.tolist() == done.tolist() and cache.lengths.dtype == np.int64


@given(
    seed=seeds, tied=flags, storage=one_of(STORAGES), window=st.integers(0, 2),
    fast_tokens=st.integers(1, 6), steps=st.lists(one_of("aaatssc"), min_size=1, max_size=20),
)  # fmt: skip
def test_both_caches_are_a_list_of_tokens(dsa, seed, tied, storage, window, fast_tokens, steps):
    """Append, truncate, attend, copy, save, load in any order as on plain arrays; the hybrid to the bit."""
    rng, p = np.random.default_rng(seed), tokens(seed, (2,), 1, tied=tied)
    kwargs = {"storage": storage, "grow": True, "qk_rope_head_dim": 1}
    plain = new_cache(dsa, "KVCache", p, 2, **kwargs)
    hybrid = new_cache(dsa, "HybridKVCache", p, 2, fast_tokens, window, **kwargs)
    slow_bytes = plain.bytes_per_token - (8 if storage == "fp8" else 4 * plain.dtype.itemsize)

    def stored(more):  # each stream as the storage keeps it
        if storage != "fp8":
            return {name: x.astype(storage) for name, x in streams_of(more).items()}
        other = new_cache(dsa, "KVCache", p, 9, **kwargs)
        other.append(**streams_of(more))
        return {name: other.read(name) for name in other.streams}

    model = {name: [x[b, :0] for b in range(2)] for name, x in stored(p).items()}
    for number, step in enumerate(steps):
        lengths, more = np.array([len(x) for x in model["k"]]), tokens(seed + number, (2,), 4, tied=tied)
        if step == "a":
            new = rng.integers(0, 5, 2)
            seen = np.arange(4) < new[:, None]  # who sees all before it and itself; padding sees nothing
            ends = np.where(seen, lengths[:, None] + 1 + np.arange(4), 0)
            for cache in (plain, hybrid):
                cache.append(**streams_of(more), lengths=new)
                assert [x.tolist() for x in cache.window(4, new)] == [(0 * ends).tolist(), ends.tolist()]
            for name, x in stored(more).items():
                model[name] = [np.concatenate([model[name][b], x[b, : new[b]]]) for b in range(2)]
        elif step == "t":
            new = rng.integers(0, lengths + 1)
            plain.truncate(new), hybrid.truncate(new)
            model = {name: [x[b][: new[b]] for b in range(2)] for name, x in model.items()}
        elif step == "c":
            with tempfile.TemporaryDirectory() as folder:
                cache, path = (plain, hybrid)[seed % 2], Path(folder) / "a session"
                cache.save(path)
                assert [x.name for x in Path(folder).iterdir()] == ["a session"]
                others = dsa.KVCache.load(path), *(way(plain) for way in COPIES)
            for other in others:
                assert type(other) is dsa.KVCache and snapshot(other) == snapshot(cache)
                assert all(getattr(other, x) == getattr(cache, x) for x in ("capacity", "grow", "storage"))
                batch = rng.integers(0, 2, rng.integers(1, 4))
                other.reorder(batch)
                other.append(**{name: x[batch] for name, x in streams_of(more).items()})
                assert other.lengths.tolist() == (lengths[batch] + 4).tolist()
                for (name, x), (i, b) in itertools.product(model.items(), enumerate(batch)):
                    np.testing.assert_array_equal(other.read(name)[i, : lengths[b]], x[b])
            for way in (*COPIES, dsa.HybridKVCache.reorder):
                refused(r"KVCache\.load", way, hybrid, error=TypeError)
        elif lengths.min() > 0:
            q, options = rng.standard_normal((2, 1, 4, 5)), p.latent | {"sink": np.zeros(4)}
            indices = np.stack([padded(np.sort(rng.permutation(n)[:3])[None], 3) for n in lengths])
            before = hybrid.hits + hybrid.misses, hybrid.misses, hybrid.bytes_moved
            found = plain.attend(q, indices, **options)
            assert_same(hybrid.attend(q, indices, **options), found)
            for b in range(2):
                kv = model["k"][b], None if tied else model["v"][b]
                expected = dsa.sparse_attention(q[b], *kv, indices[b], **options)
                assert_attention((found[0][b], found[1][b]), expected, F64)
            assert hybrid.hits + hybrid.misses - before[0] == (indices >= 0).sum()
            assert hybrid.bytes_moved - before[2] == (hybrid.misses - before[1]) * slow_bytes
        for cache, name, b in itertools.product((plain, hybrid), model, range(2)):
            assert cache.lengths.tolist() == [len(x) for x in model[name]]
            np.testing.assert_array_equal(cache.read(name)[b, : cache.lengths[b]], model[name][b])
    hybrid.close()


def test_the_fast_tier_keeps_the_window_and_the_most_recently_used(dsa):
    """Counted by hand: two free slots, and a window of one token that is never evicted and never a miss."""
    p, asked = tokens(0, (1,), 10), [[s] for s in (0, 1, 0, 2, 0, 1, 9, 3, 4, 5, 9)]
    asked += [*range(10)], [4, 5], [0, 1, 2, 3], [2, 3]  # what was hit stays, and of what was missed the last
    with new_cache(dsa, "HybridKVCache", p, 10, fast_tokens=2, local_window=1) as cache:
        cache.append(**streams_of(p))
        for kept, hits in zip(asked, (0, 0, 1, 1, 2, 2, 3, 3, 3, 3, 4, 7, 9, 9, 11), strict=True):
            cache.attend(p.q[:, :1], np.array([[kept]]))
            assert cache.hits == hits
    with new_cache(dsa, "HybridKVCache", p, 10, fast_tokens=1, local_window=2) as cache:
        for t in range(10):
            cache.append(**streams_of(p, np.s_[:, t : t + 1]))
            for kept in ([0], [1], [t - 1, t]) if t > 2 else [[0]] * (t == 0):
                cache.attend(p.q[:, :1], np.array([[kept]]))
            assert cache.hits == (2 * t - 2 if t > 2 else 1)


def test_the_fast_tier_forgets_what_a_truncation_takes(dsa):
    """What is appended in its place is read anew, into the room that it left, which evicts nobody."""
    p, every, found = tokens(0, (2,), 6), np.tile(np.arange(4), (2, 1, 1)), []
    for kind in ("KVCache", "HybridKVCache"):
        with new_cache(dsa, kind, p, 6, fast_tokens=8) as cache:
            cache.append(**streams_of(p, np.s_[:, :4]))
            cache.attend(p.q[:, :1], every)
            cache.truncate(np.array([2, 4]))
            cache.append(**streams_of(p, np.s_[:, 4:]), lengths=np.array([2, 0]))
            found.append(cache.attend(p.q[:, :1], every[..., 2:]) + cache.attend(p.q[:, :1], every))
    assert_same(*found)
    assert (cache.hits, cache.misses) == (2 + 8, 8 + 2)


CACHE_REFUSES = """
streams: cache.append(k=good["k"]) | extra: add(extra=p.k) | ^index_k: add(index_k=p.index_k[:, :2])
^k: add(k=good["k"][..., :1]) | ^d_v .*6: read(0, d_v=6) | B = 1: read(0, q[:1]) | num_tokens: cache.window(7)
lengths: add(lengths=array([1, 4])) | lengths: add(lengths=array([1, -1])) | lengths: add(lengths=array([1]))
lengths: cut(array([7, 3])) | lengths: cut(array([-1, 3])) | lengths: cut(array([6]))
NaN: step(replace(p, index_k=p.index_k * NAN, k=p.k * 9)) | sink: step(p, sink=np.ones(17))
index_q: step(replace(p, index_q=p.index_q[..., :1])) | k_end: step(p, k_end=np.ones((2, 3), int))
IndexError 6: read(6) | IndexError -2: read(-2) | IndexError 3: read(3)
TypeError ^index_k: add(index_k=[[1]]) | TypeError blocksize: step(p, blocksize=3)
"""  # error, if it is no ValueError, words: call; 3 is no key of sequence 1
REORDER_REFUSES = "".join(f"batch: cache.reorder(array({x}, int))\n" for x in ("[2]", "[-1]", "[]", "[[0]]"))
NO_ROOM = "full.*capacity: step(p, rows=np.s_[:, :9]) | full.*capacity: add(**streams_of(p))\n"
CLOSED = """
closed: add() | closed: cache.__enter__() | closed: cut(np.zeros(2, int)) | closed: read(0)
closed: cache.read("k") | closed: cache.append_then(int, **good) | closed: cache.window(1)
"""


@CACHES
@pytest.mark.parametrize("grow", [False, True])
def test_a_cache_refuses_and_stays_as_it_was(dsa, kind, grow):
    """An error that names what is wrong, an append before it taken back; the right tokens then have room."""
    p, config = tokens(0, (2,), 9, tied=True), dsa.DSAConfig(top_k=3)
    good, q = streams_of(p, np.s_[:, 6:]), p.q[:, :1]
    cache = new_cache(dsa, kind, p, 6 if grow else 9, grow=grow, local_window=2)
    add = lambda **changes: cache.append(**good | changes)  # noqa: E731
    read = lambda s, q=q, d_v=3: cache.attend(q, np.full((2, 1, 1), s), d_v=d_v)  # noqa: E731
    step, cut = functools.partial(attend, dsa, config=config, rows=np.s_[:, 6:], cache=cache), cache.truncate
    parts, scope = [CACHE_REFUSES], {"array": np.array} | globals() | locals()
    parts += [REORDER_REFUSES] if kind == "KVCache" and hasattr(cache, "reorder") else []  # of Part II
    with cache:
        cache.append(**streams_of(p, np.s_[:, :6]), lengths=np.array([6, 3]))
        all_refused("".join(parts if grow else [*parts, NO_ROOM]), scope, lambda: snapshot(cache))
        add(lengths=np.array([3, 0]))
        np.testing.assert_array_equal(cache.read("k")[0], p.k[0])
    all_refused(CLOSED, scope, lambda: cache.closed)
    assert cache.closed


def test_a_full_disk_is_an_error_that_leaves_the_cache_as_it_was(dsa, tmp_path, monkeypatch):
    """To make the file, to grow it, to close it or to save a session; all works once the disk has room."""
    resource = pytest.importorskip("resource", reason="without RLIMIT_FSIZE no full disk can be staged")
    most = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fails(act, nbytes, words="cannot hold"):  # where no file may grow beyond nbytes
        resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, most[1]))
        try:
            refused(words, act, error=OSError)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, most)

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    p, config, path = tokens(0, (2,), 64), dsa.DSAConfig(top_k=7), tmp_path / "file"
    make = functools.partial(new_cache, dsa, "HybridKVCache", p)
    for where, words in ((None, "hold"), (path, "file"), (tmp_path / "missing" / "f", "missing")):
        fails(functools.partial(make, 64, path=where), 2048, words)
    refused("fast_bytes", make, 6, local_window=2, fast_tokens=-1)
    assert list(tmp_path.iterdir()) == []
    with make(8, grow=True, path=path) as cache:
        first, rest = np.s_[:, :8], np.s_[:, 8:]
        attend(dsa, p, config, rows=first, cache=cache)
        before = snapshot(cache)
        go_on = functools.partial(attend, dsa, p, config, rows=rest, cache=cache)
        fails(go_on, 16 * cache.bytes_per_token)
        assert snapshot(cache) == before
        for actual, whole in zip(go_on(), attend(dsa, p, config), strict=True):
            assert_close(actual, whole[rest], 1e-12)
        fails(cache.close, 300, "too large")
        np.testing.assert_array_equal(cache.read("k"), p.k)
    with make(64, path=path) as cache:
        np.testing.assert_array_equal(cache.read("k"), p.k)
    path.unlink()
    with new_cache(dsa, "KVCache", p, 64) as cache:  # and a session that cannot be replaced stays
        cache.append(**streams_of(p, first)), cache.save(path)
        session = path.read_bytes()
        fails(functools.partial(cache.save, path), len(session) - 100, "too large")
        assert [x.read_bytes() for x in tmp_path.iterdir()] == [session]


def lines(dsa, act, stop=None, first=lambda: None):
    """The lines of dsa.py that act() runs in this thread, each after first(); line `stop` ends it."""
    seen: dict[tuple[str, int], None] = {}

    def trace(frame, event, _):
        if event == "line" and (at := (frame.f_code.co_name, frame.f_lineno)) not in seen:
            seen[at] = first()
            if at == stop:
                raise KeyboardInterrupt
        return trace if frame.f_code.co_filename == dsa.__file__ else None

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        act()
    finally:
        sys.settrace(before)
    return list(seen)


@pytest.mark.parametrize("storage", ["float64", "fp8"])  # the others are stored as the first
@CACHES
def test_what_ends_a_call_at_any_line_leaves_the_cache_as_it_was(dsa, kind, storage):
    """Its tokens, its answers, nothing held; and what is appended next is not taken for what was to be."""
    p, other, q = tokens(1, (2,), 9), tokens(2, (2,), 3), tokens(1, (2,), 9).q[:, :1]
    config = dsa.DSAConfig(top_k=3, strategy="hybrid", local_window=1)
    rows, indices = np.s_[:, 4:9], np.array([[[0, 1, 2, 3]], [[2, -1, 0, 1]]])
    kwargs = {"fast_tokens": 1, "local_window": 2, "storage": storage, "grow": True, "qk_rope_head_dim": 1}

    def make():
        cache = new_cache(dsa, kind, p, 6, **kwargs)
        cache.append(**streams_of(p, np.s_[:, :4]), lengths=np.array([4, 3]))
        cache.attend(q, indices[..., :2])
        return cache

    def state(cache):  # and what comes after it
        with cache:
            before, hits = snapshot(cache), getattr(cache, "hits", -1)
            answer = cache.attend(q, indices)
            cache.append(**streams_of(other))
            answer += cache.attend(q, np.array([np.arange(6)[None]] * 2))  # the window, which is a hit
            return getattr(cache, "hits", 0) > hits, before, snapshot(cache), [x.tobytes() for x in answer]

    acts: list[Any] = [
        lambda cache: cache.append(**streams_of(p, rows), lengths=np.array([5, 2])),
        lambda cache: cache.truncate(np.array([1, 3])), lambda cache: cache.attend(q, indices[..., 1:]),
        lambda cache: attend(dsa, p, config, rows=rows, cache=cache),
        *([lambda cache: cache.reorder(np.array([1, 1, 0]))] if kind == "KVCache" else []),
    ]  # fmt: skip
    expected = state(make())
    for act in acts:
        with make() as once, make() as cache:
            act(once)  # before, as what checks find is kept
            found = lines(dsa, functools.partial(act, cache))
        assert len(found) > 5
        for at in found:
            cache = make()
            refused("", lines, dsa, functools.partial(act, cache), at, error=KeyboardInterrupt)
            assert state(cache) == expected, at


def test_what_ends_a_call_at_any_line_gives_blas_its_threads_back(dsa):
    """Of which it has one meanwhile; whoever calls NumPy next has as many as before."""
    threadpoolctl = pytest.importorskip("threadpoolctl")
    call = functools.partial(dsa.lightning_select, *index_rows(0, 90, 1500, F32), 9)
    controller = threadpoolctl.ThreadpoolController().select(user_api="blas")
    count = lambda: [x.num_threads for x in controller.lib_controllers]  # noqa: E731
    one = lambda: np.testing.assert_array_equal(dsa.on_one_blas_thread(count), 1)  # noqa: E731
    with threadpoolctl.threadpool_limits(2):
        before, expected = count(), call()
        one()
        for at in lines(dsa, call):
            with threadpoolctl.threadpool_limits(1):
                call()  # whose number is not to come back
            with pytest.raises(KeyboardInterrupt) as error:  # kept, with its frames
                lines(dsa, call, at)
            assert count() == before, (at, error)
            assert_same(call(), expected)
        for _ in range(20):  # on any thread, whoever of them was the first
            together(one, lambda: (call(), call()))
            assert count() == before
        with mock.patch.dict(sys.modules):
            del sys.modules[dsa.__name__]
            another = importlib.import_module(dsa.__name__)  # a copy, which knows nothing of the first
        both = threading.Barrier(2, timeout=9)
        waits = functools.partial(another.on_one_blas_thread, lambda: (both.wait(), both.wait()))
        other = threading.Thread(target=waits)
        dsa.on_one_blas_thread(lambda: [act() for act in (other.start, both.wait)])  # ends before the other
        both.wait()
        other.join()
        assert count() == before


@CACHES
def test_readers_of_one_cache_get_what_one_alone_gets(dsa, kind):
    """Four at once, of a fast tier far too small; while another has it none waits, and all are misses."""
    n, rng, interval, found = 20000, np.random.default_rng(0), sys.getswitchinterval(), []
    p, many = tokens(0, (2,), n), [(30, np.int64)] * 37 + [(1, np.uint64), (9, np.int16), (2500, np.int64)]
    asked = [np.sort(rng.integers(0, n, (2, 1, K)), axis=-1).astype(dtype) for K, dtype in many]
    with new_cache(dsa, kind, p, n, 50, 3) as cache, new_cache(dsa, "KVCache", p, n) as plain:
        plain.append(**streams_of(p)), cache.append(**streams_of(p))
        expected = [plain.attend(p.q[:, :1], indices.astype(np.int64)) for indices in asked]

        def read(i):
            for j in range(i, i + 80):
                found.append((j % 40, cache.attend(p.q[:, :1], asked[j % 40])))

        sys.setswitchinterval(1e-6)
        together(*(functools.partial(read, 10 * i) for i in range(4)))
        sys.setswitchinterval(interval)
        read(40)
        if kind == "HybridKVCache":
            least = p.index_k.nbytes + 2 * n * 8 + cache.fast_bytes
            assert least < cache.nbytes < least + 4096 < plain.nbytes
            used = sum(len(np.unique(x)) for both in asked for x in both)
            assert cache.hits + cache.misses == 10 * used
            hits, of_window = [1], (p.q[:, :1], np.full((2, 1, 1), n - 1))

            def meanwhile():  # up to the first line where the other has the fast tier
                if hits[-1]:
                    reader = threading.Thread(target=cache.attend, args=of_window, daemon=True)
                    hits.append(-cache.hits)
                    reader.start()
                    reader.join(20)
                    hits[-1] += cache.hits
                    assert not reader.is_alive()

            lines(dsa, functools.partial(read, 0), first=meanwhile)
            assert {*hits} == {0, 1, 2}
        for i, result in found:
            assert_same(result, expected[i])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_changes_nothing(dsa, tmp_path):
    """It reads what there was, may not append, and neither its close nor its end is one of the session."""
    p, path = tokens(0, (2,), 6), tmp_path / "slow"
    with new_cache(dsa, "HybridKVCache", p, 9, path=path) as cache:
        cache.append(**streams_of(p, np.s_[:, :4]))

        def child():
            np.testing.assert_array_equal(cache.read("k"), p.k[:, :4])
            refused("read-only", cache.read("k").fill, 0)
            refused("fork", cache.append, **streams_of(p))
            cache.close()

        (process := multiprocessing.get_context("fork").Process(target=child)).start()
        process.join()
        assert process.exitcode == 0 and not path.exists()
        np.testing.assert_array_equal(cache.read("k"), p.k[:, :4])
        cache.append(**streams_of(p, np.s_[:, 4:]))
        np.testing.assert_array_equal(cache.read("k"), p.k)


def test_a_file_that_save_did_not_write_is_refused(dsa, tmp_path):
    """Cut short, a bit turned, streams of other shapes: ValueError with the path, nothing else."""
    p, path, bad = tokens(0, (2,), 6), tmp_path / "right", tmp_path / "wrong"
    cache = new_cache(dsa, "KVCache", p, 9)
    cache.append(**streams_of(p))
    cache.save(os.fsencode(path))
    whole, arrays, k = path.read_bytes(), dict(np.load(path)), np.load(path)["stream_k"]
    wrong = [b"", b"PK", *(whole[:n] for n in range(1, len(whole), 37))]
    wrong += [whole[:n] + bytes([whole[n] ^ 1]) + whole[n + 1 :] for n in range(0, len(whole), 3)]
    meta = np.array(str(arrays["meta"]).replace('"grow": false, ', ""))
    for x in (*({"stream_k": y} for y in (k[:, 1:], k[..., :1], k.astype(">f8"))), {"meta": meta}):
        np.savez(bad, **arrays | x)
        wrong.append(bad.with_suffix(".npz").read_bytes())
    for data in wrong:
        bad.write_bytes(data)
        try:
            other = dsa.KVCache.load(bad)
        except ValueError as error:
            assert "wrong" in str(error)
        else:  # a bit that says nothing, such as a date
            assert snapshot(other) == snapshot(cache)


def test_a_session_of_two_tiers_goes_on(dsa, tmp_path):
    """By the same call or by KVCache.load, of the same streams; until it is closed again the file stays."""
    p, path = tokens(0, (2,), 6), tmp_path / "slow"
    again = functools.partial(new_cache, dsa, "HybridKVCache", p, 5, path=path)
    for start, end in ((0, 4), (4, 6)):
        with again(local_window=1, grow=True) as cache:
            cache.append(**streams_of(p, np.s_[:, start:end]))
            assert cache.lengths.tolist() == [end] * 2
    with new_cache(dsa, "HybridKVCache", p, 1, path=os.fsencode(path), grow=True) as cache:
        for name, x in streams_of(p).items():
            np.testing.assert_array_equal(cache.read(name), x)
        assert cache.capacity >= 6 and snapshot(dsa.KVCache.load(path)) == snapshot(cache)
        cache.truncate(np.array([2, 3])), cache.save(path)
        assert snapshot(dsa.KVCache.load(path)) == snapshot(cache)
    wrong = replace(p, index_k=p.index_k[..., 1:]), tokens(0, (2,), 6, tied=True), tokens(0, (3,), 6)
    for words, other in zip(("index_k", "streams", r"\(3, "), wrong, strict=True):
        refused(words, new_cache, dsa, "HybridKVCache", other, 5, path=path)
    refused("full", new_cache, dsa, "HybridKVCache", p, 1, path=path)
    whole = path.read_bytes()
    for cut in (whole[:-8], whole[8:], whole[:64] + whole[72:], b"of another program", b""):
        path.write_bytes(cut)
        refused("slow", again)
        assert path.read_bytes() == cut and len([*tmp_path.iterdir()]) == 1
    path.write_bytes(whole)
    with again(grow=True, storage="float32") as cache:
        cache.append(**streams_of(p))
        assert path.read_bytes() == whole
    cache = dsa.KVCache.load(path)
    assert cache.storage == "float32" and cache.lengths.tolist() == [8, 9]
    np.testing.assert_array_equal(cache.read("k")[0, :2], p.k[0, :2].astype(F32))


@pytest.mark.parametrize("dtype", [F16, F32, F64])
def test_neither_byte_order_nor_error_state_changes_a_bit(dsa, dtype, tmp_path):
    """Of floats and of integers, in each stage, in fp8 and through a cache; of arrays in a file, too."""
    p, config = tokens(0, (2,), 40, dtype), dsa.DSAConfig(top_k=5)
    mapped = np.memmap(tmp_path / "q", dtype, "w+", shape=p.q.shape)
    mapped[:] = p.q * dtype.type(1e-3)
    indices, main = dsa.lightning_select(*p.index, 9), (p.q, *p.kv, *p.index)
    out, lse = dsa.sparse_attention(p.q, *p.kv, indices)
    calls: list[Any] = [
        (lambda *x: dsa.merge_attention(x[:2], x[2:]), out, out, lse, lse),
        (dsa.apply_sink, out, lse, lse[0, 0]), (lambda *x: dsa.pad_batch(x), *out),
        (dsa.sparse_attention_backward, p.q, *p.kv, indices, out, lse, out),
        (functools.partial(dsa.dense_attention, k_end=np.zeros(40, int)), mapped, *p.kv),
        (dsa.dense_attention, p.q, *p.kv), (dsa.index_scores, *p.index), (dsa.select_topk, p.q[..., 0], 3),
        (dsa.lightning_select, *p.index, 9), (dsa.sparse_attention, p.q, *p.kv, indices),
        (dsa.quantize_fp8, p.q), (dsa.pack_kv_fp8, np.tile(p.k, 116)[..., :576]),
        (lambda *x: dsa.dsa_attention(*x, config), *main),
    ]  # fmt: skip
    for storage in ("float64", "float16", "fp8"):
        new = functools.partial(new_cache, dsa, "KVCache", p, 40, storage=storage, qk_rope_head_dim=1)
        calls.append((lambda *x, new=new: dsa.dsa_attention(*x, config, cache=new()), *main))
    for call, *args in calls:
        swapped = [x.astype(x.dtype.newbyteorder()) if isinstance(x, np.ndarray) else x for x in args]
        with np.errstate(all="raise"):
            found = call(*swapped)
        for actual, expected in zip(found, call(*args), strict=True):
            np.testing.assert_array_equal(actual, expected)
            assert expected is None or actual.dtype == expected.dtype, call


# 12. Threads, memory, documentation -------------------------------------------------------------------------


@slow
@given(seed=seeds, dtype=any_dtype, sparse=flags)
def test_threads_never_change_a_bit(dsa, seed, dtype, sparse):
    """Of selections, outputs and gradients: on any number of them, BLAS's or ours, and side by side."""
    p, index = tokens(seed, (2,), 150 + seed % 100, dtype), index_rows(seed, 90, 1500, dtype)
    one = tokens(seed, (), 200 + seed % 100, dtype)
    few = np.random.default_rng(seed).integers(-1, one.T, (one.T, 9), np.int32) if sparse else None
    calls: list[Any] = [lambda: dsa.lightning_select(*index, 64), lambda: dsa.dense_attention(p.q, *p.kv)]
    wide = replace(p, q=p.q.repeat(999, -1), k=p.k.repeat(999, -1))  # enough work a query for threads
    calls += [functools.partial(attend, dsa, x, dsa.DSAConfig(top_k=9)) for x in (p, wide)]
    calls += [lambda: lessons(dsa, one, few)] if "random" in dsa.SELECTORS else []  # of Part II
    try:
        dsa.set_num_threads(1)
        expected = [call() for call in calls]
        same = [lambda call=f, x=x: assert_same(call(), x) for f, x in zip(calls, expected, strict=True)]
        for n, blas in ((1, 1), (2, 1), (2, 2), (5, None), (None, None)):
            dsa.set_num_threads(n)
            assert dsa.get_num_threads() == n if n else dsa.get_num_threads() >= 1
            with pytest.importorskip("threadpoolctl").threadpool_limits(blas):
                for act in same:
                    act()
        together(*same)
    finally:
        dsa.set_num_threads(None)


@pytest.mark.parametrize("call, least, most", [
    ("dsa.index_scores(index[0][: n // 4], index[1], index[2][: n // 4])", 0.25, 1),
    ("dsa.lightning_select(*index, 64)", 0, 0.25), ("dsa.dense_attention(q, k, v)", 0, 0.25),
    ("dsa.dsa_attention(q, k, v, *index, dsa.DSAConfig(top_k=64))", 0, 0.25),
    ("dsa.sparse_attention(q, k, v, few)", 0, 0.25),
    ("dsa.sparse_attention(q[: n // 2, :1], k[: n // 2, :1], v[: n // 2, :1], many)", 0, 0.125),
    ("lessons(dsa, p, few)", 0, 0.25), ("lessons(dsa, p, None)", 0, 1.25),
])  # fmt: skip
def test_no_stage_holds_queries_times_keys(dsa, call, least, most, request):
    """In units of a float32 [T, S], 256 MB at 8,192: only what returns it, or a part, holds as much."""
    n, many = 8192, np.tile(np.arange(3000, dtype=np.int32), (4096, 1))
    dsa.set_num_threads(2)  # each holds a block
    request.addfinalizer(lambda: dsa.set_num_threads(None))
    p, few = tokens(0, (), n, F32), np.random.default_rng(0).integers(-1, n, (n, 64), np.int32)
    q, (k, v), index = p.q, p.kv, p.index
    tracemalloc.start()
    request.addfinalizer(tracemalloc.stop)
    eval(call, globals() | locals())
    assert least < tracemalloc.get_traced_memory()[1] / (4 * n * n) < most


def test_the_examples_run(dsa):
    """Those of the docstrings, and of README's block with >>>."""
    runner, report = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE), [""]
    for test in doctest.DocTestFinder().find(dsa):
        runner.run(test, out=report.append)
    assert runner.tries > 20 and not runner.failures, "".join(report)
    block = doctest.DocTestParser().get_doctest(readme()[1], {}, "README.md", "README.md", 0)
    assert block.examples and not runner.run(block, out=report.append).failed, "".join(report)


# 13. fp8 and the DeepSeek-V3.2 layer ------------------------------------------------------------------------

SMALL = {
    "n_heads": 4, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 12, "index_n_heads": 4,
    "index_head_dim": 16, "index_topk": 6,
}  # fmt: skip
DIM, Q_RANK, R = 64, 24, 32
HIDDEN = normal(np.random.default_rng(7), 2, 50, DIM)
CHECKPOINT = {
    "wq_a": "q_a_proj", "q_norm": "q_a_layernorm", "wq_b": "q_b_proj", "wkv_a": "kv_a_proj_with_mqa",
    "kv_norm": "kv_a_layernorm", "wkv_b": "kv_b_proj", "wo": "o_proj",
}  # fmt: skip
E4M3 = ml_dtypes.float8_e4m3fn


def layer_weights(seed=0, dtype=F64, indexer=True, dim=DIM):
    """Random weights under the names of DeepSeek's code; norms away from 1 and a bias away from 0."""
    rng, d = np.random.default_rng(seed), types.SimpleNamespace(**SMALL)
    shapes = {
        "wq_a": (Q_RANK, dim), "wq_b": (d.n_heads * 24, Q_RANK), "wkv_a": (R + 8, dim),
        "wkv_b": (d.n_heads * 28, R), "wo": (dim, d.n_heads * 12), "indexer.wq_b": (64, Q_RANK),
        "indexer.wk": (16, dim), "indexer.weights_proj": (4, dim),
    }  # fmt: skip
    w = {name: 2 * normal(rng, *shape) / shape[1] ** 0.5 for name, shape in shapes.items()}
    w |= {name: 1 + 0.3 * normal(rng, n) for name, n in (("q_norm", Q_RANK), ("kv_norm", R))}
    w |= {"indexer.k_norm": 1 + 0.3 * normal(rng, 16), "indexer.k_norm.bias": normal(rng, 16)}
    return {name: x.astype(dtype) for name, x in w.items() if indexer or not name.startswith("indexer.")}


def checkpoint_names(weights, prefix="model.layers.3.self_attn."):
    names = {name: prefix + CHECKPOINT.get(name, name) for name in weights}
    return {n if n.endswith("bias") else n + ".weight": weights[name] for name, n in names.items()}


def yarn_by_hand(rope, theta=1e4, factor=40.0, length=4096, fast=32, slow=1):
    lo, hi = (rope * math.log(length / (2 * math.pi * beta)) / (2 * math.log(theta)) for beta in (fast, slow))
    lo, hi = (min(max(x, 0), rope - 1) for x in (math.floor(lo), math.ceil(hi)))
    i = np.arange(rope // 2)
    f, s = theta ** (-2 * i / rope), 1 - np.clip((i - lo) / max(hi - lo, 0.001), 0, 1)
    return f / factor * (1 - s) + f * s


def layer_by_hand(w, x, interleaved=False, hadamard=False, eps=(1e-6, 1e-6), mscale=1.0, on_rope=1.0, **yarn):
    """Section 3 of the specification for one sequence x [T, dim], over the oracles of its stages.
    eps: of the RMSNorms and of the LayerNorm; on_rope: the factor on cos and sin.
    -> y [T, dim], indices [T, K], index keys [T, E], index scores [T, T]
    """
    T, (H, nope, rope, _, J, E, top_k) = len(x), SMALL.values()
    turns = on_rope * np.exp(1j * np.outer(np.arange(T), yarn_by_hand(rope, **yarn)))[:, None]

    def linear(z, name, *heads):
        return (z @ w[name].T).reshape(T, *heads, -1)

    def norm(z, name, eps=eps[0]):
        return w[name] * z / np.sqrt((z * z).mean(-1, keepdims=True) + eps)

    def turn(u, at, interleaved):  # the dims from `at` on of u [T, n, dims]
        pairs = at + np.arange(rope).reshape((-1, 2) if interleaved else (2, -1), order="C")
        i, j = pairs.T if interleaved else pairs
        z, u = (u[..., i] + 1j * u[..., j]) * turns, u.copy()
        u[..., i], u[..., j] = z.real, z.imag
        return u

    qr, kv, z = norm(linear(x, "wq_a"), "q_norm"), linear(x, "wkv_a"), linear(x, "indexer.wk")
    q = turn(linear(qr, "wq_b", H), nope, True)
    up = linear(norm(kv[:, :R], "kv_norm"), "wkv_b", H)
    k_pe = turn(kv[:, None, R:], 0, True).repeat(H, 1)
    index_k = norm(z - z.mean(-1, keepdims=True), "indexer.k_norm", eps[1]) + w["indexer.k_norm.bias"]
    index = [turn(u, 0, interleaved) for u in (linear(qr, "indexer.wq_b", J), index_k[:, None])]
    if hadamard:
        index = [u @ functools.reduce(np.kron, [np.array([[1, 1], [1, -1]])] * 4) / 4 for u in index]
    index_q, index_k = index[0], index[1][:, 0]
    scores = index_scores_by_hand(index_q, index_k, linear(x, "indexer.weights_proj") * (J * E) ** -0.5)
    indices = select_by_hand(scores, top_k)
    scale = (nope + rope) ** -0.5 * (0.1 * mscale * math.log(yarn.get("factor", 40)) + 1) ** 2
    keys = np.concatenate([up[..., :nope], k_pe], -1)
    out, _ = sparse_by_hand(q, keys, up[..., nope:], indices, scale=scale)
    return linear(out.reshape(T, -1), "wo"), indices, index_k, scores


def indexer_of(dsa, layer, x):
    """index_q, index_k, weights, which selections hardly constrain."""
    with mock.patch.object(dsa, "lightning_select", wraps=dsa.lightning_select) as select:
        layer(x)
    args, kwargs = select.call_args
    return inspect.signature(dsa.lightning_select).bind(*args, **kwargs).args[:3]


@slow
@given(
    seed=seeds, lengths=st.lists(st.integers(0, 40), min_size=1, max_size=3),
    step=one_of([1, 4, 30, None]), dtype=wide_floats, left=flags, way=one_of(COPIES),
    mode=one_of([{"index_rope_interleaved": True}, {"hadamard": True, "indexer_precision": "fp8"}]),
)  # fmt: skip
def test_the_layer_selects_the_same_in_any_chunks(dsa, seed, lengths, step, mode, dtype, left, way):
    """In chunks or single tokens, alone or in a ragged batch, padded with NaN on either side (trap 9)."""
    assume(max(lengths) > 0)
    rng, B, T, w = np.random.default_rng(seed), len(lengths), max(lengths), layer_weights(seed, dtype)
    layer, x = dsa.DSALayer(w, **SMALL | mode), normal(rng, B, T, DIM).astype(dtype)
    other = dsa.DSALayer(layer_weights(seed, dtype, indexer=False), **SMALL)
    x[rng.random((B, T)) < 0.2] = x[0, 0]  # repeated tokens: near ties, which rounding would decide
    whole, done = [layer(x[b : b + 1, :n]) for b, n in enumerate(lengths)], np.zeros(B, int)
    old, layer = layer, way(layer)
    old.weights["wo"] *= 2  # of which a copy knows nothing
    caches: Any = layer.new_cache(B, T, dtype.name, fast_bytes=1000), other.new_cache(B, 1, dtype.name, True)
    caches, reads, tolerance = caches if step else (None, None), 0, 1e-12 if dtype == F64 else 1e-4
    while (done < lengths).any():
        new = np.minimum(lengths - done, rng.integers(0, step + 1, B) if step else T)
        at = max(new) - new if left else 0 * new
        part, padding = np.full((B, max(new), DIM), NAN, dtype), {"starts": at} if left else {"lengths": new}
        for b, n in enumerate(new):
            part[b, at[b] : at[b] + n] = x[b, done[b] : done[b] + n]
        y, indices = layer(part, caches[0], **padding)
        assert_close(other(part, caches[1], indices=indices, **padding)[0], y, tolerance)
        for b, n in enumerate(new):
            here, rows = slice(at[b], at[b] + n), slice(done[b], done[b] + n)
            assert_close(y[b, here], whole[b][0][0, rows], tolerance)
            assert (padded(indices[b, here], 9) == padded(whole[b][1][0, rows], 9)).all()
            assert not np.delete(y[b], here, 0).any() and (np.delete(indices[b], here, 0) == -1).all()
        done += new
        assert not step or caches[0].lengths.tolist() == caches[1].lengths.tolist() == done.tolist()
        if step and max(new) > 0:  # "auto" reads what is selected, where it would expand all
            assert reads < (reads := caches[0].hits + caches[0].misses)


def test_an_index_key_has_the_same_bits_in_any_chunk(dsa):
    """At a width where BLAS itself does not, and however arrays lie in memory, which a copy changes."""
    w, x = layer_weights(0, F32, dim=20_000), np.random.default_rng(0).standard_normal((2, 37, 20_000), F32)
    flipped = lambda z: z[..., ::-1].copy()[..., ::-1]  # noqa: E731

    def keys(x, chunk=37, lying=np.array):
        layer = dsa.DSALayer({name: lying(z) for name, z in w.items()}, **SMALL)
        cache = layer.new_cache(len(x), 37)
        for t in range(0, 37, chunk):
            layer(x[:, t : t + chunk], cache)
        return cache.read("index_k")

    whole = keys(x)
    assert_close(whole[1], layer_by_hand(w, x[1])[2], 1e-3)
    assert_same(keys(x[1:].copy(), 17), whole[1:])
    for lying in (np.asfortranarray, flipped):
        assert_same(keys(lying(x), 1), whole)
        assert_same(keys(x, lying=lying), whole)


@pytest.mark.parametrize("name, named", [*itertools.product(layer_weights(), [dict, checkpoint_names])])
def test_a_weight_missing_extra_or_misshapen_is_named(dsa, name, named):
    """In the words of whoever gave it."""
    w, key = named(layer_weights()), next(iter(named({name: 0})))
    x, less = w[key], {n: x for n, x in w.items() if n != key}
    plain = re.escape(key.split("self_attn.")[-1].removesuffix(".weight"))
    wrong = [(less | {key: y}, plain) for y in (x[..., :-1], x[:-1], x[None], np.ones(()))]
    wrong += [(less, plain), (checkpoint_names({name: x}, "layers.5.attn.") | w, f"{plain}.*same")]
    wrong += [(w | {n: x}, n) for n in ("indexer.wv.weight", "model.layers.4.self_attn.q_b_proj.bias")]
    for weights, match in wrong:
        refused(match, dsa.DSALayer, weights, **SMALL)


LAYER_REFUSES = """
^x is: layer(nan[:, :2], cache) | ^x is: layer(x[:, :1] * INF) | NaN: layer(np.copysign(1.7e308, x), cache)
dim.* 5.* 64: layer(x[..., :5], cache) | core: layer(x, cache, core="no") | full: layer(HIDDEN[:, :3], cache)
cache: layer(x[:1], cache) | cache: layer(x, other) | cache: layer(x, narrow)
^lengths is: layer(x, cache, lengths=rows + 1) | ^lengths is: layer(x, starts=[1, 1], lengths=[2, 2])
^starts is: layer(x, starts=[1, 3]) | ^starts is: layer(x, starts=[1]) | ^starts is: layer(x, starts=[-1, 0])
^indices is: sharing(x) | ^indices has T = 1, but x: layer(x, cache, indices=first[:, :1])
^indices is: layer(x, cache, indices=slots(11)) | ^indices is: layer(HIDDEN[:, :9], growing, indices=ahead)
IndexError indices: layer(x[:, :1], starts=[1, 1], indices=slots(0)[:, :1])
config: new(config=config(strategy="fixed")) | config: new(config=config(global_selection="lsh"))
layer is 3: new(config=config(progressive_sparsity=True), layer=3)
fp8.*fp16: new(config=config(indexer_precision="fp16"), indexer_precision="fp8")
IndexError indices: layer(x, cache, indices=slots(12)) | TypeError indices: layer(x, indices=slots(0.5))
TypeError ^cache is a: layer(x, {}) | TypeError ^starts is: layer(x, starts=[0.5, 1])
TypeError ^weights is a list, expected a Mapping: dsa.DSALayer([np.ones(3)])
TypeError ^wq_a is a builtins.list: dsa.DSALayer({"wq_a": [1.0]})
TypeError ^config is a dict: new(config={"top_k": 3}) | TypeError fast_byte: new_cache(local_window=4)
TypeError fast_byte: new_cache(fast_byte=9) | TypeError fast_byte: new_cache(fast_byte=(1,), fast_bytes=10**4)
"""


def test_the_layer_refuses_and_leaves_its_cache_as_it_was(dsa):
    """NaN in x or in what comes of it, no room, another layer's cache, indices that do not fit; or Ctrl-C."""
    new = functools.partial(dsa.DSALayer, layer_weights(), **SMALL)
    layer, sharing = new(), dsa.DSALayer(layer_weights(indexer=False), **SMALL)
    cache, nan = layer.new_cache(2, 12), np.where(np.arange(DIM) == 3, NAN, HIDDEN)
    first = layer(HIDDEN[:, :10], cache)[1]
    rows, x, config = np.array([2, 0]), HIDDEN[:, :2], dsa.DSAConfig
    other = dsa.KVCache(12, batch=2, qk_rope_head_dim=8, k=(1, 576), index_k=(16,))
    narrow = dsa.KVCache(12, batch=2, qk_rope_head_dim=4, **layer.streams)
    growing, ahead = layer.new_cache(2, 4, grow=True), np.full((2, 9, 1), 8)
    own = {"slots": lambda s: np.full((2, 2, 1), s), "new_cache": functools.partial(layer.new_cache, 1, 8)}
    others = other, narrow, growing
    state = lambda: (snapshot(cache), [(x.capacity, x.lengths.tolist()) for x in others])  # noqa: E731
    all_refused(LAYER_REFUSES, globals() | locals() | own, state)
    act, before = functools.partial(layer, x[:, :1], cache, starts=rows // 2), snapshot(cache)
    act()
    for at in lines(dsa, act):
        cache.truncate(np.array([10, 10]))
        refused("", lines, dsa, act, at, error=KeyboardInterrupt)
        assert snapshot(cache) == before, at
    with np.errstate(all="raise"):  # what is in padding is not seen
        layer(np.where([[[True]], [[False]]], x, INF), cache, lengths=rows)
    assert cache.lengths.tolist() == [12, 10]
    y, indices = layer(HIDDEN[:, :0])
    assert y.shape == (2, 0, DIM) and indices.shape == (2, 0, 0)
    dsa.LayerDims(n_heads=1, qk_rope_head_dim=128, rope_factor=1)  # the least, and the most, that may be
    v32, plain = dsa.LayerDims().shapes(), vars(dsa.LayerDims())
    own = {name: np.array(value)[()] for name, value in plain.items() if type(value) in (int, float)}
    assert [*map(type, vars(dsa.LayerDims(**own)).values())] == [*map(type, plain.values())]  # not NumPy's
    assert (v32["wq_b"], v32["wkv_a"]) == ((24576, 1536), (576, 7168))


def write_safetensors(path, tensors):
    """The format: 8 bytes of header length, a header in JSON, the bytes. {name: (dtype, array) or floats}."""
    kinds: dict[Any, str] = {F64: "F64", F32: "F32", F16: "F16", BFLOAT16: "BF16"}
    header: dict = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, x in tensors.items():
        dtype, x = x if isinstance(x, tuple) else (kinds[x.dtype], x)
        span, data = [len(data), len(data) + x.nbytes], data + x.tobytes()
        header[name] = {"dtype": dtype, "shape": x.shape, "data_offsets": span}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


MODEL, INDEX = "model.safetensors", "model.safetensors.index.json"
SIZES = {"num_attention_heads": 4, "max_position_embeddings": 2560, **SMALL}
del SIZES["n_heads"]
V32_CONFIG, GLM_CONFIG = ({**SIZES, "model_type": name} for name in ("deepseek_v32", "glm_moe_dsa"))
YARN: dict[str, Any] = {"factor": 40, "original_max_position_embeddings": 64, "beta_fast": 32, "beta_slow": 1}
YARN_5 = YARN | {"rope_type": "yarn", "rope_theta": 5000.0}  # as transformers 5 writes it
BOTH_MSCALES = {"mscale": 1.0, "mscale_all_dim": 1.0}
OLD_YARN = YARN | BOTH_MSCALES | {"type": "yarn"}


def write_checkpoint(folder, tensors, config=V32_CONFIG, shards=1):
    """In one file, or in some with an index that lists others, which are not there."""
    folder.mkdir(exist_ok=True)
    if config:
        (folder / "config.json").write_text(json.dumps(config))
    files = {f"part{i}.safetensors": dict([*tensors.items()][i::shards]) for i in range(shards)}
    for file, part in files.items() if shards > 1 else [(MODEL, tensors)]:
        write_safetensors(folder / file, part)
    if shards > 1:
        listed = {name: file for file, part in files.items() for name in part} | {"model.norm.weight": "none"}
        (folder / INDEX).write_text(json.dumps({"weight_map": listed}))


def test_from_safetensors_reads_one_layer(dsa, tmp_path):
    """One file or shards with an index; among other layers' tensors, or bare."""
    w, sizes = layer_weights(dtype=F32), SMALL | {"rope_factor": 1.0}
    own, expected = checkpoint_names(w), dsa.DSALayer(w, **sizes)(HIDDEN)
    more = own | checkpoint_names({name: 2 * x for name, x in w.items()}, "model.layers.33.self_attn.")
    write_checkpoint(tmp_path / "a", more, shards=2)
    write_safetensors(tmp_path / "a.safetensors", more | {"model.norm.weight": np.ones(3, F32)})
    write_safetensors(tmp_path / "bare.safetensors", checkpoint_names(w, ""))
    for path, own in (("a", {}), (f"a/{INDEX}", {}), ("a.safetensors", sizes), ("bare.safetensors", sizes)):
        read = functools.partial(dsa.DSALayer.from_safetensors, str(tmp_path / path), **own)
        assert_same(read(layer=3)(HIDDEN), expected)
        if path != "bare.safetensors":
            assert not np.array_equal(read(layer=33)(HIDDEN)[0], expected[0])
            for layer, error in ((4, ValueError), ("3", TypeError)):
                refused("layer", read, layer=layer, error=error)
    (tmp_path / "config.json").symlink_to(tmp_path / "gone")
    refused("config.json", read, layer=3, error=FileNotFoundError)


with_yarn = lambda **more: V32_CONFIG | {"rope_parameters": YARN_5 | more}  # noqa: E731
NO_YARN: dict[str, Any] = {"factor": 1.0, "mscale": 0.0}
OF_YARN_5: dict[str, Any] = {"length": 64, "theta": 5000.0}
FACTOR = {m: 0.1 * m * math.log(40) + 1 for m in (0.7, 1, 1.3)}  # YaRN's, by mscale
PLAIN_FACTOR = OF_YARN_5 | {"mscale": 0.0, "on_rope": FACTOR[1]}
CONFIGS: list[Any] = [  # config.json, if there is one, what layer_by_hand computes for it, the dims given
    (V32_CONFIG | {"rope_theta": 1e4, "rope_scaling": OLD_YARN}, {"length": 64}),
    (with_yarn(**BOTH_MSCALES), OF_YARN_5), (with_yarn(mscale_all_dim=1.3), PLAIN_FACTOR | {"mscale": 1.3}),
    (with_yarn(mscale=0.7, mscale_all_dim=1.3),
     OF_YARN_5 | {"mscale": 1.3, "on_rope": FACTOR[0.7] / FACTOR[1.3]}),
    (with_yarn(mscale=0.7, mscale_all_dim=0), PLAIN_FACTOR),
    (with_yarn(attention_factor=1.7, **BOTH_MSCALES), OF_YARN_5 | {"on_rope": 1.7}),
    (with_yarn(factor=None, mscale_all_dim=1), PLAIN_FACTOR | {"mscale": 1.0}),
    (with_yarn(original_max_position_embeddings=None) | {"max_position_embeddings": 64}, PLAIN_FACTOR),
    (with_yarn() | {"rope_scaling": {"type": "default", "factor": 8}, "rope_theta": 8e6},
     NO_YARN | {"theta": 8e6}),
    (with_yarn(factor=1, original_max_position_embeddings=1), NO_YARN | {"theta": 5000.0}),  # the least
    *((with_yarn(rope_theta=theta, beta_fast=fast, beta_slow=slow, attention_factor=1),  # all fast, all slow
       {"length": 64, "theta": theta, "mscale": 0.0, "fast": fast, "slow": slow})
      for theta, fast, slow in ((5000.0, 0.9, 0.1), (1.5, 32, 1), (5000.0, 50, 20), (5000.0, 4, 4))),
    (V32_CONFIG, NO_YARN | {"hadamard": True}, {"hadamard": True}), (None, {}, SMALL),
    (GLM_CONFIG | {"rms_norm_eps": 1e-5, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
     NO_YARN | {"theta": 1e6, "interleaved": True, "eps": (1e-5, 1e-6)}),
    (GLM_CONFIG | {"indexer_rope_interleave": False}, NO_YARN),
    (V32_CONFIG | {"indexer_rope_interleave": True}, NO_YARN | {"interleaved": True}),
    ({"model_type": "any", "text_config": GLM_CONFIG}, NO_YARN | {"interleaved": True}),
    (with_yarn(attention_factor=1.7), NO_YARN | {"theta": 5000.0}, {"rope_factor": 1}),
    (with_yarn(attention_factor=1.7), PLAIN_FACTOR | {"factor": 7.0, "on_rope": 1.7}, {"rope_factor": 7.0}),
    (V32_CONFIG | {"model_type": "llama"}, NO_YARN | {"eps": (0.5, 1e-6)},
     {"index_rope_interleaved": False, "norm_eps": 0.5}),
]  # fmt: skip


@pytest.mark.parametrize("config, oracle, given", [(*row, {})[:3] for row in CONFIGS])
def test_config_json_says_what_the_layer_computes(dsa, tmp_path, config, oracle, given):
    """Both cores, index keys, scores to 1e-12, the same selections, K = 6 of 30 (trap 1); given dims win."""
    w, x = layer_weights(), HIDDEN[:, :30]
    write_checkpoint(tmp_path, checkpoint_names(w), config)
    read = dsa.DSALayer.from_safetensors
    layer = read(tmp_path / MODEL, 3, **given)
    index = indexer_of(dsa, layer, x)
    for b, row in enumerate(x):
        y, indices, *of_index = layer_by_hand(w, row, **oracle)
        for core in ("absorbed", "expanded"):
            own_y, own_indices = layer(x, core=core)
            assert_close(own_y[b], y, 1e-12)
            np.testing.assert_array_equal(own_indices[b], indices)
        for actual, expected in zip((index[1], dsa.index_scores(*index)), of_index, strict=True):
            assert_close(actual[b], expected, 1e-12)
    for same in (config, tmp_path, str(tmp_path / "config.json")) if config else ():
        assert dsa.LayerDims.from_config(same, **given) == layer.dims
    own = read(tmp_path / MODEL, 3, **given | {"index_topk": 5, "mscale": 2.0}).dims
    assert own == replace(layer.dims, index_topk=5, mscale=2.0)
    for call in (read, dsa.LayerDims.from_config):
        refused("none", call, tmp_path / "none", error=FileNotFoundError)


@pytest.mark.parametrize("types, shares", [
    ({"indexer_types": ["full", "full", "shared", "shared", "full"]}, "ffssff"),  # one less than layers
    ({"index_topk_pattern": "FFSSF"}, "ffssff"), ({}, "ffffff"),
    ({"index_topk_freq": 2}, "ffsfsf"), ({"index_topk_freq": 4, "index_skip_topk_offset": 1}, "fsssfs"),
    ({"index_topk_freq": 2, "num_hidden_layers": 4}, "ffsfff"),
], ids=str)  # fmt: skip
def test_layers_that_share_an_indexer_have_none(dsa, tmp_path, types, shares):
    """config.json says which, also where the file has indexer weights for them; the last selection serves."""
    w, indices = layer_weights(), None
    for i, kind in enumerate(shares):
        write_checkpoint(tmp_path, checkpoint_names(w, f"layers.{i}.attn."), GLM_CONFIG | types)
        layer = dsa.DSALayer.from_safetensors(tmp_path, i)
        assert layer.has_indexer == (kind == "f")
        y, indices = layer(HIDDEN, indices=None if layer.has_indexer else indices)
        assert_close(y, dsa.DSALayer(w, **vars(layer.dims))(HIDDEN)[0], 1e-12)


def scaled(x, kind, dtype):
    """x as fp8 codes with scales of a kind, or one with so many axes, and dtype; and what they stand for."""
    shape = {"block": [-(-n // 128) for n in x.shape], "row": [len(x), 1]}.get(kind) or [1] * int(kind)
    powers = np.random.default_rng(0).integers(-3, 3, shape)
    spread = np.exp2(powers.astype(F64))
    scales: Any = (powers + 127).astype(np.uint8) if dtype == "F8_E8M0" else spread
    scales = scales.astype({"F32": F32, "BF16": BFLOAT16}.get(dtype, np.uint8))
    if kind == "block":
        spread = spread.repeat(128, 0).repeat(128, 1)[: len(x), : x.shape[1]]
    codes = (x / spread).astype(E4M3)
    return codes, np.asarray(scales), (codes.astype(F64) * spread).astype(F32)


SCALES = ["block", "row", "0", "1", "2"], ["F32", "BF16", "F8_E8M0"], ["_scale_inv", "_scale", ".scale"]
KINDS = [*itertools.product(*SCALES), *((None, dtype, "") for dtype in DTYPES)]


@pytest.mark.parametrize("kind, dtype, ending", KINDS)
def test_weights_of_every_kind(dsa, tmp_path, kind, dtype, ending):
    """Exactly as stored, in the widest float that any of them needs, by any names; y has the dtype of x."""
    w, at = layer_weights(dtype=F32 if kind else dtype), "model.language_model.layers.3.self_attn."
    for name, shape in (("wkv_a", (168, DIM)), ("kv_norm", 160), ("wkv_b", (112, 160))):
        w[name] = np.resize(w[name], shape)  # more than one block of 128 x 128
    names = checkpoint_names(w, at)
    if ending == ".scale":
        names = [f"layers.3.attn.{name}" if "bias" in name else f"layers.3.attn.{name}.weight" for name in w]
    buffers = "attn.k_scale rotary_emb.inv_freq q_a_proj.input_scale k_scale v_scale q_scale"
    others = ["model.vision_tower.layers.3.self_attn.q_proj.weight", *(at + name for name in buffers.split())]
    tensors: dict[str, Any] = dict.fromkeys(others, np.ones(1, F32))
    for ours, name in zip(list(w), names, strict=True):
        tensors[name] = w[ours]
        if kind and w[ours].ndim == 2:
            codes, scales, w[ours] = scaled(w[ours], kind, dtype)
            tensors[name] = "F8_E4M3", codes
            tensors[(name if ending[0] == "_" else name.removesuffix(".weight")) + ending] = dtype, scales
    write_checkpoint(tmp_path, tensors, {"text_config": V32_CONFIG})
    layer = dsa.DSALayer.from_safetensors(tmp_path, 3, index_topk=50)
    for name, z in layer.weights.items():
        assert_same(z, w[name].astype(accumulator(w[name].dtype)))
    x = HIDDEN if kind else HIDDEN.astype(dtype)
    exact = dsa.DSALayer({name: z.astype(F64) for name, z in w.items()}, **vars(layer.dims))(x.astype(F64))[0]
    y, error = layer(x)[0], {F32: 1e-5, F16: 1e-3, BFLOAT16: 1e-2}.get(x.dtype, 0)
    assert y.dtype == x.dtype and np.abs(y.astype(F64) - exact).max() <= error * np.abs(exact).max()


# What is changed in a good checkpoint, whose q_b_proj has 96 x 24 numbers.
renamed = lambda old, new: lambda x: {name.replace(old, new): x[name] for name in x}  # noqa: E731
Q_B = "model.layers.3.self_attn.q_b_proj"
BY_ROW, BYTES = np.ones((96, 1), F32), np.zeros((96, 24), np.uint8)
AS: dict[str, Any] = {
    "F32": BY_ROW, "one": BY_ROW[0, 0], "two": BY_ROW.repeat(2, 1), "I64": ("I64", np.ones(1, int)),
    "codes": ("F8_E4M3", BYTES), "flat": ("F8_E4M3", BYTES[0]), "NaN": ("F8_E8M0", BYTES[:1, :1] + 255),
}  # fmt: skip
STORED_AS = """
int8: .weight I8 .weight_scale F32 | I64: .weight I64 | F8_E5M2: .weight F8_E5M2 | 4 bits: .weight F4
AWQ: .qweight I32 .qzeros I32 .scales F32 | with MXFP4: .weight_scale U8 .weight F4 | with MXFP4: _blocks U8
with NVFP4: .weight_scale_2 F32 .weight U8 | with NVFP4: .weight_scale F8_E4M3 .weight U8 | 4 bits: .weight U8
with NVFP4: .weight_global_scale F32 .weight_packed U8 | 4 bits: .weight_packed U8 | with bias: .bias F32
no weight: .more F32 | fp8: .weight F32 .weight_scale F32 | fp8: .weight_scale F32
one weight_scale_inv: .weight codes | with .*, .*, e: .weight codes .weight_scale F32 .weight_scale_inv F32
one weight_scale_inv: .weight flat .weight_scale one | of shape .96, 2.: .weight codes .weight_scale two
F8_E8M0: .weight F8_E8M0 | nan: .weight codes .weight_scale NaN
"""  # what is said of q_b_proj, if it is stored so


def q_b_proj(stored):
    own = {Q_B + e: AS.get(x, (x, BY_ROW.view(np.uint8))) for e, x in re.findall(r"(\S+) (\S+)", stored)}
    return lambda tensors: {name: x for name, x in tensors.items() if Q_B not in name} | own


END = sum(x.nbytes for x in layer_weights().values())
LAST = b"[%d, %d]" % (END - 128, END)
SPANS = b"[12288, 0]", b"[8, 12288]", b"[8, 12296]", b'["0", 8]', b"[0, 8, 9]"  # of 24 x 64 numbers
REFUSED: list[tuple[Any, str]] = [  # fields of config.json, the tensors, or a file; what the error says
    ({"rope_scaling": {"type": "linear", "factor": 4.0}}, "linear"),
    ({"rope_scaling": {"factor": 4.0}}, "factor"), ({"rope_scaling": "yarn"}, "^RoPE in config.json is a"),
    ({"rope_parameters": {"indexed_attention": YARN_5}}, "indexed_attention"),
    ({"rope_parameters": YARN_5 | {"truncate": False}}, "truncate"),
    ({"rope_parameters": YARN_5 | {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    *(({"rope_parameters": YARN_5 | {"factor": factor}}, "factor is") for factor in (-4, 0, 10**400, "4")),
    (with_yarn(original_max_position_embeddings=None) | {"max_position_embeddings": None}, "original_max_p"),
    (with_yarn(factor=None) | {"max_position_embeddings": -1}, "max_position_embeddings is"),
    *(({name: value}, name) for name, value in (
        ("rope_interleave", False), ("partial_rotary_factor", 0.5), ("n_heads", 4), ("rope_factor", 40.0),
        ("indexer_types", 5), ("indexer_types", ["bogus"]), ("index_topk_freq", -1),
        ("index_skip_topk_offset", "1"), ("index_skip_topk_offset", 1.5))),
    ({"model_type": "llama"}, "llama"), ({"rms_norm_eps": "1e-6"}, "norm_eps"),
    ({"num_attention_heads": 4.0}, "n_heads"), ({"num_attention_heads": 8}, "q_b_proj"),
    *((q_b_proj(stored), f"q_b_proj.*{words}") for words, stored in
      (case.split(": ") for case in STORED_AS.strip().replace("\n", " | ").split(" | "))),
    (renamed("kv_b_proj.weight", "k_b_proj.weight"), "k_b_proj.* split"),
    (renamed("q_a_proj.weight", "q_proj.weight"), "q_proj.* full rank"),
    (renamed("q_a_proj.weight", "mlp.weight"), "q_a_proj"), (lambda tensors: {}, "^path is"),
    (lambda tensors: tensors | {"draft." + name: x for name, x in tensors.items()}, "draft"),
    (renamed("self_attn.indexer", "indexer"), r"3\.indexer"), (("adapter_config.json", "{}"), "adapter"),
    *((lambda tensors, own=own: tensors | {f"base.{own}.lora_A.weight": np.ones(1)}, "lora_A")
      for own in (Q_B, Q_B.replace("q_b", "o"))),
    *(((MODEL, lambda raw, at=at: raw.replace(*at, 1)), f"{MODEL} is no whole") for at in (
        *((b"[0, 12288]", span) for span in SPANS), (b"[24, 64]", b"[24, 65]"), (b"F64", b"F16"),
        (b": [24, 64]", b":[-24,-64]"), (b"offsets", b"offset "))),
    ((MODEL, lambda raw: raw.replace(LAST, b"[%d, %d]" % (END - 120, END + 8)) + bytes(8)), "its bytes from"),
    ((MODEL, lambda raw: raw.replace(LAST, b"[%d, %d]" % (END - 136, END - 8))[:-8]), "is too small"),
    *(((MODEL, lambda raw, n=n: raw[:n]), f"{MODEL} is no whole") for n in (0, 4, 100, -1)),
    *(((MODEL, change), f"{MODEL} is no whole") for change in (
        lambda raw: raw + b"more", lambda raw: b"\t" + bytes(7) + b"no header" + bytes(9))),
    (("model-2.safetensors", lambda raw: raw), "another file"),
    *((("config.json", text), "config.json is without") for text in ("{", "[1]")),
    ((INDEX, "version https://git-lfs"), f"{INDEX} is without"), ((INDEX, "{}"), f"weight_map in .*{INDEX}"),
    ((INDEX, json.dumps({"weight_map": {Q_B.replace("q_b_proj", "kv_a_layernorm"): "gone"}})), "gone"),
]  # fmt: skip


@pytest.mark.parametrize("change, match", REFUSED)
def test_a_checkpoint_that_is_not_understood_is_refused(dsa, tmp_path, change, match):
    """What an input means is used or refused, never dropped: the tensor and its format, by name."""
    tensors, fields = checkpoint_names(layer_weights()), change if isinstance(change, dict) else {}
    write_checkpoint(tmp_path, change(tensors) if callable(change) else tensors, V32_CONFIG | fields)
    if isinstance(change, tuple):
        (name, content), model = change, (tmp_path / MODEL).read_bytes()
        (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content(model))
    refused(match, dsa.DSALayer.from_safetensors, tmp_path, 3, error=(ValueError, TypeError, OSError))


@pytest.mark.parametrize("kwargs, layer, n_layers", [
    ({"sparse_ratio": 0.3, "strategy": "hybrid", "local_window": 4, "num_sink_tokens": 2}, 0, 1),
    ({"top_k": 4, "fallback_dense_threshold": 17}, 0, 1), ({"top_k": 8}, 5, 3),
    ({"top_k": 8, "progressive_sparsity": True}, 0, 3), ({"top_k": 8, "progressive_sparsity": True}, 2, 3),
], ids=str)  # fmt: skip
def test_a_config_selects_in_place_of_index_topk(dsa, tmp_path, kwargs, layer, n_layers):
    """Scores by hand, sorted: ratio, window, sink tokens, dense fallback, by each sequence's own length."""
    w, config, x, lengths = layer_weights(), dsa.DSAConfig(**kwargs), HIDDEN[:, :40], np.array([40, 17])
    own = dsa.DSALayer(w, **SMALL, config=config, layer=layer, n_layers=n_layers)
    (y, indices), cache = own(x, lengths=lengths), own.new_cache(2, 40, "float64")
    own(x[:, :39], cache, lengths=lengths - 1)
    step_y, step = own(x[[0, 1], lengths - 1][:, None], cache)
    place = (layer, n_layers) if config.progressive_sparsity else (0, 1)
    for b, n in enumerate(lengths.tolist()):
        quota = {name: getattr(config, name) for name in ("local_window", "num_sink_tokens")}
        quota["top_k"] = n if n <= kwargs.get("fallback_dense_threshold", 0) else config.top_k_at(*place, n)
        expected = padded(select_by_hand(layer_by_hand(w, x[b, :n])[3], **quota), 40)
        assert (padded(indices[b, :n], 40) == expected).all() and (indices[b, n:] == -1).all()
        assert (padded(step[b], 40) == expected[-1]).all()
        assert_close(step_y[b, 0], y[b, n - 1], 1e-12)
    assert own(x[:, :0], cache)[0].shape == (2, 0, x.shape[-1])
    rope = OLD_YARN | {"original_max_position_embeddings": 4096}
    for said, own_n in ((n_layers, None), (99, n_layers)):
        known = V32_CONFIG | {"num_hidden_layers": said, "rope_scaling": rope}
        write_checkpoint(tmp_path, checkpoint_names(w, f"layers.{layer}.attn."), known)
        loaded = dsa.DSALayer.from_safetensors(tmp_path, layer, config=config, n_layers=own_n)
        assert_same(loaded(x, lengths=lengths), (y, indices))
    assert_same(own(x), own(x, lengths=np.array([40, 40])))
    if config.progressive_sparsity:
        refused("n_layers is 0", dsa.DSALayer.from_safetensors, tmp_path, layer, config=config, n_layers=0)


TINY: dict[str, Any] = SIZES | {
    "vocab_size": 99, "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32, "n_group": 1,
    "num_hidden_layers": 4, "num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "topk_group": 1, "first_k_dense_replace": 3, "kv_lora_rank": 32, "q_lora_rank": 24,
    "initializer_range": 0.2,
    "index_n_heads": 16,  # so many that hardly a score is 0, where torch decides ties otherwise
}  # fmt: skip
MODELS: dict[str, tuple[str, dict]] = {
    "v32": ("DeepseekV32", {}),
    "v32, YaRN": ("DeepseekV32", {"rope_parameters": YARN_5 | BOTH_MSCALES}),
    "v32, mscales": ("DeepseekV32", {"rope_parameters": YARN_5 | {"mscale": 0.7, "mscale_all_dim": 1.3}}),
    "v32, neither": ("DeepseekV32", {"rope_parameters": YARN_5}),
    "v32, attention_factor": ("DeepseekV32", {"rope_parameters": YARN_5 | {"attention_factor": 1.7}}),
    "glm 5": ("GlmMoeDsa", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "glm 5.2": ("GlmMoeDsa", {"index_topk_freq": 2, "index_skip_topk_offset": 1}),
}


@functools.cache
def tiny_model(name):
    """A random model of transformers, its norms away from 1."""
    transformers, torch = pytest.importorskip("transformers", minversion="5"), pytest.importorskip("torch")
    kind, more = MODELS[name]
    torch.manual_seed(0)
    config = getattr(transformers, kind + "Config")(**TINY | more)
    model = getattr(transformers, kind + "ForCausalLM")(config).eval().requires_grad_(False)
    for key, weight in model.named_parameters():
        if "norm" in key:
            weight += 0.3 * torch.randn(weight.shape)
    return model


@pytest.mark.parametrize("name", MODELS)
def test_a_folder_that_transformers_wrote_is_all_that_is_needed(dsa, tmp_path, name):
    """Each layer's output to 1e-5 of the largest in float32, and its selection."""
    model, torch, indices = tiny_model(name), sys.modules["torch"], None
    seen: dict[Any, Any] = {}  # of each of its modules what it was given, and what it returned
    note: Any = lambda module, _, kwargs, out: seen.update({module: (kwargs, out)})  # noqa: E731
    hook = torch.nn.modules.module.register_module_forward_hook(note, with_kwargs=True)
    model(torch.randint(0, 99, (2, 50), generator=torch.Generator().manual_seed(1)))
    hook.remove()
    model.save_pretrained(tmp_path)
    eps = {"norm_eps": 1e-6} if "glm" in name else {}  # with which it computes, whatever it writes
    for i, block in enumerate(model.model.layers):
        layer, (kwargs, out) = dsa.DSALayer.from_safetensors(tmp_path, i, **eps), seen[block.self_attn]
        indexer = getattr(block.self_attn, "indexer", None)
        assert layer.has_indexer == (indexer in seen)
        y, indices = layer(kwargs["hidden_states"].numpy(), indices=None if layer.has_indexer else indices)
        expected = out[0].numpy()
        assert np.abs(y - expected).max() <= 1e-5 * np.abs(expected).max()
        for b, t in itertools.product(range(2), range(50)) if layer.has_indexer else ():
            kept = seen[indexer][1][b, t].tolist()
            assert set(indices[b, t]) - {-1} == {s for s in kept if s <= t}


@pytest.mark.parametrize("xp", array_libraries())
@pytest.mark.parametrize(
    "name, attention", [*itertools.product(MODELS, ["sdpa"]), ("v32", "eager"), ("glm 5.2", "eager")]
)
def test_a_model_of_transformers_runs_on_the_readmes_attention(name, xp, attention):
    """Logits to 1e-4, padded or not; the same tokens, where generate takes some back or a chunk is empty."""
    block, original = readme(r"import[^`]*torch\.nn\.Module")[1], tiny_model(name)
    torch = sys.modules["torch"]
    original.set_attn_implementation(attention)
    ids = torch.randint(1, 99, (3, 40), generator=torch.Generator().manual_seed(2))
    mask = (torch.arange(40) >= torch.tensor([0, 7, 31])[:, None]).long()
    batch, real = {"input_ids": ids * mask, "attention_mask": mask}, mask.bool()
    how = {"do_sample": False, "max_new_tokens": 8, "pad_token_id": 0, "eos_token_id": None}
    expected, tokens = original(**batch).logits[real], original.generate(**batch, **how)
    on = {k: x.to("cuda" if xp == "cupy" else "cpu") for k, x in batch.items()}

    def replaced(config="None"):
        model, text = copy.deepcopy(original).to(on["input_ids"].device), block
        changes = {"xp=np": f"xp={xp}", "import dsa, ": f"import dsa, {xp}, ", "tokens=20": "tokens=2"}
        for old, new in (changes | {"config = None": f"config = {config}"}).items():
            assert old in text
            text = text.replace(old, new)
        exec(text, {"model": model, "batch": dict(on)})
        return model

    model, single = replaced(), original(input_ids=ids[:1]).logits
    assert (model(**on).logits.cpu()[real] - expected).abs().max() < 1e-4
    error = model(input_ids=ids[:1].to(model.device)).logits.cpu() - single
    assert error.abs().max() < 1e-4 * max(1, single.abs().max())
    dense = replaced("dsa.DSAConfig(top_k=6)")
    sparse = replaced("dsa.DSAConfig(sparse_ratio=0.03, strategy='hybrid', local_window=4)")
    for same in (model, dense):
        assert same.generate(**on, **how).cpu().equal(tokens)
    for n, more in ((3, {"prefill_chunk_size": 6}), (1, {"prompt_lookup_num_tokens": 3})):
        own = {k: x[:n] for k, x in on.items()} | how | more
        assert copy.deepcopy(model).generate(**own).cpu().equal(tokens[:n])
    assert not torch.allclose(sparse(**on).logits.cpu()[real], expected, atol=1e-2)
    assert sparse.generate(**on, **how).shape == tokens.shape


def test_the_readmes_lines_load_a_layer_and_run_it(dsa, tmp_path, monkeypatch, capsys):
    """The block of README.md, on a small checkpoint instead of V3.2's."""
    block = readme("import[^`]*from_safetensors")[1]
    tensors = checkpoint_names(layer_weights(dtype=F32), "model.layers.30.self_attn.")
    write_checkpoint(tmp_path / "DeepSeek-V3.2", tensors, shards=2)
    monkeypatch.chdir(tmp_path)
    exec(block, {})
    assert capsys.readouterr().out == f"(1, 1, {DIM}) (1, 1, 64) [300] {32 + 4 + 2 * 8 + 16 + 4}\n"


@given(
    seed=seeds, N=one_of([1, 16, 128, 200, 384]), size=one_of([128, 31, FAR]), k=st.integers(-8, 5),
    scale=one_of(["ue8m0", "float"]), dtype=any_dtype, amax=one_of([0.0, 448.0, 448 + 2.0**-15, 1e30]),
)  # fmt: skip
def test_fp8_is_e4m3_of_x_over_its_scale(impl, seed, N, size, scale, dtype, amax, k):
    """Byte for byte as ml_dtypes rounds; ue8m0 steps up one ulp above 448 * 2^k."""
    rng, most = np.random.default_rng(seed), float(ml_dtypes.finfo(dtype).max)
    x = normal(rng, 3, N) * np.exp2(rng.integers(-20, 10, (3, 1))) * (rng.random((3, N)) < 0.7)
    x[0] = amax * 2.0**k * np.where(np.arange(N) % size, x[0].clip(-1, 1), 1)
    x = x.clip(-most, most).astype(dtype)
    codes, scales = impl.quantize_fp8(x, scale=scale, block=size)
    assert codes.shape == x.shape and scales.shape == (3, -(-N // size)) and scales.dtype == F32
    values = impl.dequantize_fp8(codes, scales, block=size)
    for b, i in np.ndindex(*scales.shape):
        own, s = slice(size * i, size * (i + 1)), scales[b, i]
        block = x[b, own].astype(accumulator(dtype))
        amax = np.maximum(np.abs(block).max().astype(F32), F32.type(1e-4)) / F32.type(448)
        assert s == (2.0 ** math.ceil(math.log2(amax)) if scale == "ue8m0" else amax)
        rounded = (block / s).clip(-448, 448).astype(E4M3)
        assert codes[b, own].tobytes() == rounded.tobytes()
        np.testing.assert_array_equal(values[b, own], rounded.astype(F32) * s)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_656_bytes_of_a_token(impl, dsa, dtype):
    """512 codes, 4 scales that are powers of two of at least 1e-4, 64 bfloat16 as ml_dtypes rounds them. All
    codes have ml_dtypes' values, NaN and -0 included, which give the codes back."""
    every, ones = np.arange(256, dtype=np.uint8), np.ones(2, F32)
    assert_same(dsa.dequantize_fp8(every, ones), every.view(E4M3).astype(F32))
    assert_same(dsa.quantize_fp8(every.view(E4M3).astype(F32)), (every, ones))
    assert dsa.quantize_fp8(np.array([INF, -1e300]))[0].tolist() == [126, 254]
    kv = normal(np.random.default_rng(0), 3, 2, 576) * np.exp2(np.arange(6) * 4 - 16).reshape(3, 2, 1)
    kv[0, 0, :128], kv[..., -3:] = 0, [NAN, 1 + 2.0**-8, 1 + 3 * 2.0**-8]  # two ties
    kv = kv.astype(dtype)
    if impl.xp is not np:  # whose NaN has other bits
        kv[..., -3] = 0
    elif dtype == F32:
        kv.view(np.uint32)[0, 1, -3] = 0x7FFFFFFF  # a NaN that must not be carried away
    latent, rope = kv[..., :512].reshape(3, 2, 4, 128), kv[..., 512:].astype(BFLOAT16)
    amax = np.maximum(np.abs(latent.astype(F64)).max(-1, keepdims=True) / 448, 1e-4)
    scales = np.exp2(np.ceil(np.log2(amax))).astype(F32)
    codes, packed = (latent / scales).astype(E4M3), impl.pack_kv_fp8(kv)
    parts = [np.ascontiguousarray(x).reshape(3, 2, -1).view(np.uint8) for x in (codes, scales, rope)]
    assert_same(packed, np.concatenate(parts, -1))
    expected = np.concatenate([(codes.astype(F32) * scales).reshape(3, 2, 512), rope.astype(F32)], -1)
    np.testing.assert_array_equal(impl.unpack_kv_fp8(packed), expected)
    with dsa.KVCache(4, storage="fp8", k=(1, 576), index_k=(128,)) as cache:
        assert cache.bytes_per_token == 656 + 132 and cache.nbytes == 4 * 788
        cache.append(k=kv[None, 0, :, None], index_k=kv[None, 0, :, 128:256])
        np.testing.assert_array_equal(cache.read("k")[0, :, 0], dsa.unpack_kv_fp8(packed[0]))
        assert_same(cache.read("index_k")[0], dsa.dequantize_fp8(*dsa.quantize_fp8(kv[0, :, 128:256])))


@given(seed=seeds, E=one_of([8, 31, 128]), J=one_of([1, 3, 64]))
def test_codes_are_scored_as_what_they_stand_for(impl, dsa, seed, E, J):
    """As decoded, which is the formula's bit for bit: relu(q8 . k8) * (w * s_q), summed, times s_k."""
    rng = np.random.default_rng(seed)
    q, k, w = (rng.standard_normal(shape, F32) for shape in ((2, 9, J, E), (2, 70, E), (2, 9, J)))
    (q8, s_q), (k8, s_k) = dsa.quantize_fp8(q), dsa.quantize_fp8(k)
    scaled_w, back = w * s_q[..., 0], dsa.dequantize_fp8(q8, s_q)
    with dsa.KVCache(70, batch=2, storage="fp8", index_k=(E,)) as cache:
        cache.append(index_k=k)
        entries, keys = cache.stored("index_k"), cache.read("index_k")
    expected = dsa.index_scores(back, keys, w)
    formula = dsa.index_scores(q8.view(E4M3).astype(F32), k8.view(E4M3).astype(F32), scaled_w)
    assert_same(expected, formula * s_k[..., 0][:, None])
    found = impl.index_scores(q8, entries, scaled_w)
    sizes = [np.linalg.norm(x, axis=-1) for x in (q * w[..., None], k)]
    size = sizes[0].sum(-1)[..., None] * sizes[1][:, None]  # of it, Hopper's tensor cores keep 14 bits
    assert_close(found / size, expected / size, 5e-5 if (J, E) == (64, 128) else 1e-6)
    assert_same(impl.lightning_select(q8, entries, scaled_w, 7), impl.select_topk(found, 7))
    main, config = (q[:, :, :1, :4], *2 * [k[:, :, None, :4]]), dsa.DSAConfig(5, indexer_precision="fp8")
    assert_same(dsa.dsa_attention(*main, q, k, w, config)[2], dsa.lightning_select(back, keys, w, 5))
    for wrong, error in ((entries[..., :-1], ValueError), (keys, TypeError)):
        refused("index_k", impl.index_scores, q8, wrong, w, error=error)
    wide = np.zeros((1, 1, 129), np.uint8), np.zeros((1, 133), np.uint8)
    refused(r"^E is 129", dsa.index_scores, *wide, w[:1, 0, :1])


def test_the_fp8_layer_quantises_what_its_indexer_compares(dsa):
    """Both sides, after RoPE and Hadamard, the key once, before it is cached, at the cost of its rounding."""
    w = layer_weights()
    new, tiny = functools.partial(dsa.DSALayer, w, **SMALL, hadamard=True), 1e-9 * w["indexer.wq_b"]
    exact, fp8 = new(), new(indexer_precision="fp8")
    *both, weights = indexer_of(dsa, exact, HIDDEN)
    rounded = [dsa.dequantize_fp8(*dsa.quantize_fp8(x)) for x in both]
    assert_same(indexer_of(dsa, fp8, HIDDEN), (*rounded, weights))
    assert_same(fp8(HIDDEN)[1], dsa.lightning_select(*rounded, weights, 6))
    assert (fp8(HIDDEN)[1] != dsa.lightning_select(*both, weights, 6)).any()
    for same in (fp8, dsa.DSALayer(w | {"indexer.wq_b": tiny}, **vars(fp8.dims))):  # whose codes are compared
        assert_same(same(HIDDEN, same.new_cache(2, 50, "fp8"))[1], same(HIDDEN)[1])
    cached = exact(HIDDEN, exact.new_cache(2, 50, "fp8"))[1]  # of which the keys alone are rounded
    assert_same(cached, dsa.lightning_select(both[0], rounded[1], weights, 6))
    for config, dims in ("fp8", {}), ("fp32", {"indexer_precision": "fp8"}):
        assert_same(new(config=dsa.DSAConfig(top_k=6, indexer_precision=config), **dims)(HIDDEN), fp8(HIDDEN))
    whole = new(index_topk=50)  # all keys, so that only the stored numbers differ
    for storage, error in (("float32", 1e-6), ("bfloat16", 1e-2), ("fp8", 0.1)):
        y, exact_y = whole(HIDDEN, whole.new_cache(2, 50, storage))[0], whole(HIDDEN)[0]
        assert 0 < np.abs(y - exact_y).max() < error * np.abs(exact_y).max()


# 14. Training the indexer -----------------------------------------------------------------------------------


@given(p=problems(dtypes=[F16, BFLOAT16]), seed=seeds)
def test_out_in_float32_is_what_is_rounded(impl, p, seed):
    """Parts that are merged later lose nothing before; any third dtype is refused."""
    indices = drawn_indices(p, seed)
    out, lse = sparse(impl, p, indices)
    wide = sparse(impl, p, indices, out_dtype=F32)
    assert wide[0].dtype == F32
    assert_same((wide[0].astype(out.dtype), wide[1]), (out, lse))
    if impl.xp is np:  # tensor cores round P to 16 bits all the same
        q, k, v = (None if x is None else x.astype(F32) for x in (p.q, *p.kv))
        assert_close(wide[0], sparse(impl, replace(p, q=q, k=k, v=v), indices)[0], TOLERANCE[F32])
    words = "out_dtype is float64, expected q's dtype or float32"
    refused(words, sparse, impl, p, indices, out_dtype="float64", error=TypeError)


def trained_on(p, seed, sparse):
    """A selected set, windowed or not, or windows: as options, and keys [*batch, T, K], -1 where absent."""
    windowed = not sparse or (seed % 2 == 0 and len(p.windows) == 2)
    keys = drawn_indices(p, seed) if sparse else np.broadcast_to(np.arange(p.S), (*p.batch, p.T, p.S))
    kwargs = ({"indices": keys} if sparse else {}) | (p.windows if windowed else {})
    seen = (keys >= p.lo[..., None]) & (keys < p.hi[..., None]) if windowed else keys >= 0
    return kwargs, np.where(seen, keys.astype(int), -1)


def target_by_hand(p, keys):
    """Eq. (3) of values that name their key: its share, over the slots that list it, mean of heads."""
    names = np.broadcast_to(np.eye(p.S)[:, None], (*p.k.shape[:-1], p.S))
    of_keys = sparse_by_hand(p.q, p.k, names, keys, scale=p.scale)[0].mean(-2)  # [..., T, S]
    times = (keys[..., None] == keys[..., None, :]).sum(-1)
    return np.where(keys >= 0, np.take_along_axis(of_keys, keys.clip(0), -1) / times, 0)


def kl_by_hand(target, scores, keys):
    """KL(p || softmax(I)) over a row's slots, summed over rows."""
    at = np.where(keys >= 0, np.take_along_axis(scores, keys.clip(0), -1), -INF)
    with np.errstate(divide="ignore", invalid="ignore"):
        each = target * (np.log(target) - at + np.logaddexp.reduce(at, -1, keepdims=True))
    return each[(keys >= 0) & (target > 0)].sum()


@given(p=problems(), seed=seeds, sparse=flags)
def test_the_target_is_attentions_and_the_losses_are_kls(impl, p, seed, sparse):
    """Over the window, or inside the selected set, by eq. (1) and by the MLP; rows that see nothing add 0."""
    (kwargs, keys), acc = trained_on(p, seed, sparse), accumulator(p.q.dtype)
    target = impl.attention_target(p.q, p.k, scale=p.scale, **kwargs)
    expected = target_by_hand(p, keys)
    assert target.dtype == acc
    assert_close(target, expected, TOLERANCE[acc])
    scores = index_scores_by_hand(*p.index, k_end=np.full(p.T, p.S))
    loss = impl.indexer_loss(*p.index, expected, **kwargs)[0]
    assert isinstance(loss, float) if impl.xp is np else loss.shape == ()
    assert_close(loss, kl_by_hand(expected, scores, keys), 10 * TOLERANCE[acc])
    q, k, C = p.q.astype(F32), p.k.astype(F32), math.prod(p.k.shape[-2:])
    rngs, shapes = np.random.default_rng(seed).spawn(4), ((3, C), (3, C), (3,), (3,))
    mlp = [small(rng, *shape) for rng, shape in zip(rngs, shapes, strict=True)]
    views = (impl.give(x, strided=True) for x in (q, k, mlp, expected))
    loss, grads = impl.learned_loss(*views, **kwargs)
    assert [x.dtype for x in grads] == [F64] * 4
    assert_close(loss, kl_by_hand(expected, mlp_by_hand(q, k, *mlp), keys), 1e-4)
    for wrong in (NAN, -0.25) if (keys >= 0).any() else ():  # what is no probability has no loss
        expected.flat[np.argmax(keys >= 0)] = wrong
        for loss, *args in ((impl.indexer_loss, *p.index), (impl.learned_loss, q, k, mlp)):
            assert np.isnan(loss(*args, expected, **kwargs)[0])


@given(p=problems(data=normal, dtypes=[F64]), seed=seeds, sparse=flags, z=one_of([None, 0.7, -3, INF, -INF]))
def test_gradients_are_slopes(impl, p, seed, sparse, z):
    """Of sum(out * dout), and of the KL by eq. (1) and by the MLP, in a random direction of each argument."""
    (kwargs, keys), indices = trained_on(p, seed, sparse), drawn_indices(p, seed)
    rng, C, options = np.random.default_rng(seed), math.prod(p.k.shape[-2:]), p.latent | {"scale": p.scale}
    target = target_by_hand(p, keys) * rng.integers(0, 3, (*p.batch, p.T, 1))
    mlp = [rng.standard_normal(shape) for shape in ((3, C), (3, C), 3, 3)]
    dout = rng.standard_normal((*p.q.shape[:-1], p.values.shape[-1]))

    def attend(q, k, v, sink):
        out, lse = impl.sparse_attention(q, k, v, indices, sink=sink, **options)
        grads = impl.sparse_attention_backward(q, k, v, indices, out, lse, dout, sink=sink, **options)
        return (out * dout).sum(), grads

    functions: Any = (
        (attend, (p.q, *p.kv, None if z is None else z + rng.standard_normal(p.q.shape[-2]))),
        (lambda *index: impl.indexer_loss(*index, target, **kwargs), p.index),
        (lambda *mlp: impl.learned_loss(p.q, p.k, mlp, target, **kwargs), mlp),
    )
    for f, parts in functions:
        for i, (x, grad) in enumerate(zip(parts, f(*parts)[1], strict=True)):
            assert (grad is None) == (x is None)
            if x is not None:
                along = rng.standard_normal(x.shape)
                above, below = (f(*parts[:i], x + h * along, *parts[i + 1 :])[0] for h in (1e-7, -1e-7))
                slope, size = (above - below) / 2e-7, max(1, abs(above) / 100)
                assert_close((grad * along).sum() / size, slope / size, 1e-5)  # kinks are rare within a step


def assert_gradients(actual, expected, like, tolerance, least=1.0):
    """Of the dtype and shape of what they belong to, and close, in units of the largest, or of the least."""
    for a, e, x in zip(actual, expected, like, strict=True):
        assert (a is None) == (x is None)
        if x is not None:
            assert a.dtype == x.dtype and a.shape == x.shape
            size = max(least, np.abs(e).max(initial=0))
            assert_close(a.astype(F64) / size, e / size, max(tolerance, TOLERANCE[x.dtype]))


def in_float64(args):
    return [x if x is None or x.dtype.kind in "iu" else x.astype(F64) for x in args]


@given(
    p=problems(mixed=True), seed=seeds, sparse=flags, strided=flags, z=one_of([None, 0.7]),
    value=one_of([NAN, INF, 7.0]),
)  # fmt: skip
def test_gradients_in_any_dtype_are_those_in_float64(impl, p, seed, sparse, strided, z, value):
    """Rounded to the dtype of what they belong to, in any layout. Small integers: products of exactly 0 are
    common, and pass on nothing, as negative ones do. Keys outside every window or set, between windows too,
    slots that are absent, on a GPU by any number that is no key, and queries without keys hold anything."""
    if seed % 4 < 2:  # narrow windows, with others between them
        start = np.random.default_rng(seed).integers(0, p.S, (*p.batch, p.T))
        p = replace(p, windows={"k_start": start, "k_end": start + seed % 3})
    dsa, (kwargs, keys), dirty = impl.module, trained_on(p, seed, sparse), copy.deepcopy(p)
    seen, none = (keys[..., None] == np.arange(p.S)).any((-2, -3)), (keys < 0).all(-1)
    for names, mask in (("q index_q weights", none), ("k v index_k", ~seen)):
        for x in (getattr(dirty, name) for name in names.split()):
            if x is not None:
                x[mask] = value
    exactly = {"indices": keys} if sparse else kwargs
    if impl.xp is not np and sparse and seed % 3:
        no_keys = [p.S, 255, 2**31 - 1, 2**32 + 1, 2**40, -2, -(2**40)]
        kwargs["indices"] = np.where(keys < 0, np.random.default_rng(seed).choice(no_keys, keys.shape), keys)
    give = functools.partial(impl.give, strided=strided)

    def within(*arrays):  # on a GPU, P and dS are rounded too
        kinds = [x.dtype for x in arrays]
        return TOLERANCE[accumulator(*kinds)] if impl.xp is np else 4 * max(TOLERANCE[x] for x in kinds)

    sink = None if z is None else np.full(p.q.shape[-2], z, p.q.dtype if seed % 2 else F32)
    options, (wide,), target = p.latent | {"scale": p.scale}, in_float64([sink]), target_by_hand(p, keys)
    out, lse = impl.sparse_attention(p.q, *p.kv, keys, sink=sink, **options)
    dout = normal(np.random.default_rng(seed), *out.shape).astype(p.q.dtype)
    args, junk = (p.q, *p.kv, keys, out, lse, dout), np.where(none[..., None, None], value, dout)
    expected = dsa.sparse_attention_backward(*in_float64(args), sink=wide, **options)
    slots = kwargs["indices"] if kwargs.keys() == {"indices"} else keys
    args = dirty.q, *dirty.kv, slots, out, lse, junk.astype(dout.dtype)
    grads = impl.sparse_attention_backward(*map(give, args), sink=sink, **options)
    assert_gradients(grads, expected, (p.q, *p.kv, sink), within(p.q, p.k, p.values))
    found = impl.attention_target(give(dirty.q), give(dirty.k), scale=p.scale, **kwargs)
    assert_close(found, target, TOLERANCE[F32])
    (q, k, w), junk = in_float64(p.index), np.where(keys < 0, value, target)
    loss, grads = impl.indexer_loss(*map(give, dirty.index), give(junk), **kwargs)
    exact, expected = dsa.indexer_loss(q, k, w, target, **exactly)
    assert_close(loss, exact, 10 * TOLERANCE[F32])
    assert_gradients(grads, expected, p.index, within(*p.index))
    # Products lowered by 1e-9, of which those of exactly 0 are negative, give the same.
    less = [np.concatenate([x, np.full_like(x[..., :1], y)], -1) for x, y in ((q, 1), (k, -1e-9))]
    parts = zip(dsa.indexer_loss(*less, w, target, **exactly)[1], expected, strict=True)
    assert_gradients([x[..., : e.shape[-1]] for x, e in parts], expected, expected, 1e-6)


def lessons(dsa, p, indices, k_end=None):
    """The target and the losses with their gradients; with indices also those of the attention."""
    q, (k, v), of_key, sink = p.q, p.kv, p.k.reshape(p.S, -1), p.k[0].ravel()[:4]
    mlp = of_key[:3], of_key[3:6], of_key[6, :3], of_key[7, :3]
    some = {"k_end": k_end} if indices is None else {"indices": indices}
    target = dsa.attention_target(q, k, **some)
    losses = dsa.indexer_loss(*p.index, target, **some), dsa.learned_loss(q, k, mlp, target, **some)
    found = [target, *(x for loss, grads in losses for x in (loss, *grads))]
    if indices is not None:
        out, lse = dsa.sparse_attention(q, k, v, indices, sink=sink)
        found += dsa.sparse_attention_backward(q, k, v, indices, out, lse, out[..., ::-1, :], sink=sink)
    return tuple(map(np.asarray, found))


@pytest.mark.parametrize("xp", array_libraries())
def test_the_readmes_lines_train_an_indexer(dsa, capsys, xp):
    """The block of README.md, shortened: the KL falls in both stages, and its Function passes gradcheck."""
    torch, (text, block) = pytest.importorskip("torch"), readme("import dsa, torch")
    for long, short in (("range(151)", "range(31)"), ("step < 100", "step < 20"), ("step % 50", "step % 10")):
        assert block.count(long) == 1
        block = block.replace(long, short)
    if xp == "cupy":
        gpu, line = (re.findall(x, text)[0] for x in (r"torch.set_default_device.*?\)", r"`(give, back.*)`"))
        block = re.sub("give, back = .*", f"import cupy; {gpu}; {line}", block, count=1)
    names: dict[str, Any] = {}
    try:
        exec(block, names)
        out = capsys.readouterr().out
        warm, warmer, sparse, sparser = (float(line.split()[1]) for line in out.splitlines())
        assert warmer < 0.9 * warm and sparser < sparse < warm
        leaf: Any = lambda *shape: torch.randn(shape, dtype=torch.float64, requires_grad=True)  # noqa: E731
        indices, target = np.array([[0, 2, -1], [1, 3, 0]]), np.array([[0.5, 0.5, 0], [0.2, 0.3, 0.5]])
        indices, target = (importlib.import_module(xp).asarray(x) for x in (indices, target))
        f = lambda *x: names["IndexerLoss"].apply(*x, target, indices)  # noqa: E731
        assert torch.autograd.gradcheck(f, (leaf(2, 2, 3), leaf(4, 3), leaf(2, 2)))
        if xp == "cupy":  # bfloat16 passes without a copy, both ways, by the README's other lines
            q = names["cupy"].from_dlpack(x := torch.randn(4, 1, 64).bfloat16())
            out = dsa.sparse_attention(q[:2], q, q, indices)[0]
            found = torch.from_dlpack(out.view("int16")).view(torch.bfloat16)
            assert (x.data_ptr(), found.data_ptr()) == (q.data.ptr, out.data.ptr) and q.dtype == BFLOAT16
    finally:
        torch.set_default_device("cpu")


@slow
@given(seed=seeds, dtype=any_dtype, sparse=flags)
def test_gradients_of_many_blocks_are_added_in_their_order(dsa, seed, dtype, sparse):
    """A query's gradient is its own, a key's the sum over chunks of queries, to the bit by its own alone."""
    S, T = 300, 200 + seed % 100
    p, ends = tokens(seed, (), S, dtype), np.arange(S - T, S) + 1
    indices = np.random.default_rng(seed).integers(-1, S, (T, 9), np.int32)

    def run(t=slice(None)):
        few = (x[S - T :][t] for x in (p.q, p.index_q, p.weights))
        part = replace(p, **dict(zip(("q", "index_q", "weights"), few, strict=True)))
        return lessons(dsa, part, indices[t] if sparse else None, ends[t])

    chunks = [run(slice(a, a + T // 3)) for a in range(0, T, T // 3)] if dtype == F64 else []
    for whole, *parts in zip(run(), *chunks, strict=True) if chunks else ():
        own = np.shape(whole)[:1] == (T,)
        assert_close(np.concatenate(parts) if own else sum(parts), whole, 1e-12 if own else 1e-10)
    q, (k, v) = p.q[S - T :], p.kv  # by the order of a key's queries, which other keys do not change
    out, lse = dsa.sparse_attention(q, k, v, indices)
    rest = out, lse, out
    one_key = np.where(indices == indices.max(), indices, -1)
    every, alone = (dsa.sparse_attention_backward(q, k, v, slots, *rest)[1:3] for slots in (indices, one_key))
    assert_same(*(tuple(x[indices.max()] for x in grads) for grads in (every, alone)))


# 15. A sequence sharded by MPI: the functions ranks_* run on every rank of 1 to 4 processes


def mpi(ranks, code, timeout=150):
    """The ended run of `code` on so many ranks of this machine."""
    scripts = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    mpiexec = shutil.which("mpiexec", path=scripts)
    if mpiexec is None or importlib.util.find_spec("mpi4py") is None:
        pytest.skip('needs MPI: pip install -e ".[mpi]" mpich')
    env = {  # Open MPI refuses root, and more ranks than cores, unless told otherwise
        "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe", "OPENBLAS_NUM_THREADS": "1",
        "OPENBLAS_CORETYPE": "HASWELL",  # there the bits of a product may depend on its place
        "MPIEXEC_TIMEOUT": str(timeout),  # of Open MPI and MPICH: then all ranks are ended
    }  # fmt: skip
    code = f"import numpy as np, dsa, test_dsa; from mpi4py import MPI; comm = MPI.COMM_WORLD; {code}"
    command = [mpiexec, "-n", str(ranks), sys.executable, "-m", "mpi4py", "-c", code]
    run = functools.partial(subprocess.run, capture_output=True, text=True, timeout=timeout + 20)
    return run(command, env=os.environ | env, cwd=Path(__file__).parent)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("what, on", [
    *itertools.product(["stages", "cache"], array_libraries()), ("errors", "numpy"), ("traffic", "numpy")
])  # fmt: skip
def test_sharded_is_as_one(dsa, what, on, ranks):
    """On every rank, what ranks_stages, ranks_cache, ... say; by NCCL if each has a GPU of its own."""
    xp = ", test_dsa.gpu_of(comm)" if on == "cupy" else ""
    done = mpi(ranks, f"test_dsa.ranks_{what}(dsa, comm{xp}); print('fine')", timeout=300)
    assert done.returncode == 0 and done.stdout.count("fine") == ranks, done.stdout + done.stderr


def gpu_of(comm):
    """CuPy, on a GPU that is this rank's alone where there are enough."""
    cupy = poisoned(importlib.import_module("cupy"))
    cupy.cuda.Device(comm.rank % cupy.cuda.runtime.getDeviceCount()).use()
    return cupy


@pytest.mark.parametrize("end", ["comm.this_is_wrong", "os.kill(os.getpid(), 9)"])
def test_a_rank_that_dies_ends_all(dsa, end):
    """Also outside dsa.py and while the others wait for it: mpi4py, or mpiexec, sees to it."""
    run = f"import os; comm.rank == 1 and {end}; x = np.ones((3, 1, 1)); "
    run += "print('alive', dsa.sharded_select(x, x[:, 0], x[..., 0], 2, comm))"
    done = mpi(3, run, timeout=60)
    assert done.returncode != 0 and "alive" not in done.stdout
    assert "this_is_wrong" in done.stderr or "kill" in end


def test_the_readmes_lines_run_on_ranks(dsa):
    """Its block under MPI: each of 8 * 64 selected keys is on one rank."""
    done = mpi(3, "pass\n" + readme("[^`]*sharded_attention")[1])
    counts = [int(x) for x in re.findall(r"rank \d of 3: (\d+) of 512 are here", done.stdout)]
    assert done.returncode == 0 and len(counts) == 3 and sum(counts) == 512, done.stdout + done.stderr


def sharded(comm, rng, *arrays):
    """This rank's part of each (array, axis of the keys), cut at random places, which may coincide."""
    S = {x.shape[axis] for x, axis in arrays}.pop()
    edges = np.concatenate([[0], np.sort(rng.integers(0, S + 1, comm.size - 1)), [S]])
    return [x.take(range(edges[comm.rank], edges[comm.rank + 1]), axis) for x, axis in arrays]


def sharded_problem(seed):
    """Every second has fewer keys than ranks, or hardly more; keys that repeat tie, also across shards."""
    rng, batch = np.random.default_rng(seed), ((), (), (2,), (2, 1))[seed % 4]
    T, top_k, S = rng.integers((1, 1, 0), (7, 20, 8 if seed % 2 else 1500)).tolist()
    forced = {"local_window": top_k // 3 % 5, "num_sink_tokens": top_k // 2 % 4}
    ends = {"k_start": rng.integers(-2, S + 2, T), "k_end": rng.integers(-2, S + 4, (*batch, T))}
    windows, dtype, data = {} if seed % 3 else ends, DTYPES[seed % 3], normal if seed % 5 else small
    array = lambda *shape: data(rng, *batch, *shape).astype(dtype)  # noqa: E731
    repeat, tied = rng.integers(0, S // 2 + 1, S), seed % 7 == 0
    p = Problem(
        batch, top_k, forced, windows, None,
        array(T, 4, 8), array(S, 2, 8), None if tied else array(S, 2, 3), {"d_v": 5} if tied else {},
        array(T, 8, 33), array(S // 2 + 1, 33).take(repeat, -2), array(T, 8),
    )  # fmt: skip
    return rng, dtype, p


def ranks_stages(dsa, comm, xp=np):
    """Selections bit for bit: ties, windows and forced keys across borders, empty shards, chunks of queries;
    out and lse to rounding, and the same bits on every rank."""
    stages, far, layout = Stages(dsa, xp), 2**31, dsa.layout

    def behind(*args):  # as if rank -1 held 2**31 keys, which nobody sees
        at = layout(*args)
        at.edges, at.n["S"] = at.edges + far, at.n["S"] + far
        return at

    for seed in range(60):
        rng, dtype, p = sharded_problem(seed)
        dsa.SHARD_BUFFER = 500 if seed % 4 == 3 else 2**27
        hybrid = {"strategy": "hybrid" if p.forced["local_window"] else "dynamic", **p.forced}
        dense, precision = (None, 0, 30)[seed % 3], ("fp32", "fp16", "fp8")[seed // 2 % 3]
        config = dsa.DSAConfig(p.top_k, indexer_precision=precision, fallback_dense_threshold=dense, **hybrid)
        if seed % 11 == 5:
            config = replace(config, sparse_ratio=0.02, progressive_sparsity=True)
        p = replace(p, k=p.k.astype(F64)) if seed % 9 == 2 else p  # dtypes may differ
        if xp is np and (seed % 10 == 6 or seed % 12 == 3):
            p, dtype = replace(p, q=p.q.astype(BFLOAT16)), BFLOAT16
        k, v, index_k = sharded(comm, rng, (p.k, -3), (p.values, -3), (p.index_k, -2))
        index = p.index_q, index_k, p.weights
        actual = stages.sharded_select(*index, p.top_k, comm, **p.forced, **p.windows)
        assert_same(actual, select(stages, p))
        if seed == 2:
            with mock.patch.object(dsa, "layout", behind):
                actual = stages.sharded_select(*index, p.top_k, comm, k_start=np.full(p.T, far))
            assert_same(actual, stages.lightning_select(*p.index, p.top_k) + np.int64(far))
        v, sink = None if p.v is None else v, normal(rng, 4).astype(dtype)
        kwargs = p.windows | p.latent | {"sink": sink, "layer": 2, "n_layers": 3}
        kwargs["scale"] = 400.0 if seed % 6 == 1 else None  # in float64 logits whose exp is infinite
        shards, whole = [p.q, k, v, p.index_q, index_k, p.weights], (p.q, *p.kv, *p.index)
        if xp is np and seed == 1:
            shards = [x.astype(x.dtype.newbyteorder(">")) for x in shards]
        out, lse, indices = stages.sharded_attention(*shards, config, comm, **kwargs)
        expected = stages.dsa_attention(*whole, config, **kwargs)
        assert_same(indices, expected[2])
        assert (out.dtype, lse.dtype) == (expected[0].dtype, expected[1].dtype)
        assert_attention((out, lse), expected[:2], dtype)
        if dtype in (F16, BFLOAT16):  # one rounding, after the merge; bfloat16's parts travel as float16
            wide = (x if x is None else x.astype(F64) for x in (p.q, *p.kv))
            exact = dsa.sparse_attention(*wide, indices, **p.latent)
            exact = dsa.apply_sink(*exact, sink.astype(F64))
            once, part = (2**-11, 0) if dtype == F16 else (2**-8, 2**-11 * np.abs(p.values).max(initial=0))
            assert (np.abs(out - exact) <= 1.01 * (once * np.abs(exact) + part) + 1e-6).all()
        assert comm.bcast(mine := out.tobytes() + lse.tobytes()) == mine
        *own, _ = stages.sharded_attention(*shards, config, comm, **kwargs, scatter=True)
        edges, N = [lse[..., 0].size * r // comm.size for r in (comm.rank, comm.rank + 1)], lse[..., 0].size
        share = (x.reshape(N, *x.shape[len(p.batch) + 1 :])[slice(*edges)] for x in (out, lse))
        assert_same(tuple(own), tuple(share))


def ranks_cache(dsa, comm, xp=np):
    """A prompt in chunks over the ranks, then decoding on the last, is as one cache; errors change none."""
    stages = Stages(dsa, xp)
    attend, alone = stages.sharded_attention, stages.dsa_attention
    for seed, storage in enumerate(("float64", "float32", "fp8", "float32")):
        rng, dtype = np.random.default_rng(seed), F64 if storage == "float64" else F32
        p = tokens(seed, (2,), 24, dtype, seed % 2 == 0)
        config = dsa.DSAConfig(top_k=5, strategy="hybrid", local_window=2, num_sink_tokens=1)
        kind = "HybridKVCache" if seed == 3 else "KVCache"
        kwargs = {"capacity": 2, "grow": True, "storage": storage, "xp": xp, "qk_rope_head_dim": 1}
        (one, mine), done = (new_cache(dsa, kind, p, local_window=2, **kwargs) for _ in range(2)), 0
        for owner in [*range(comm.size), None, None, None]:
            new = 24 // (comm.size + 1) if owner is not None else 1
            rows, lengths = (slice(None), slice(done, done + new)), rng.integers(0, new + 1, 2)
            arrays = (p.q[rows], p.k[rows], None if p.v is None else p.v[rows], *(x[rows] for x in p.index))
            options, before = p.latent | {"lengths": lengths}, snapshot(mine)
            if one.lengths.max() > 8 and lengths.any() and xp is np:  # a GPU does not look for NaN
                bad = (*arrays[:3], arrays[3].copy(), *arrays[4:], config, comm)
                bad[3][lengths > 0, 0] = NAN
                refused(r"rank \d.*NaN", attend, *bad, cache=mine, owner=owner, **options)
            assert snapshot(mine) == before
            actual = attend(*arrays, config, comm, cache=mine, owner=owner, **options)
            expected = alone(*arrays, config, cache=one, **options)
            assert_same(actual[2], expected[2])
            assert_attention(actual[:2], expected[:2], dtype)
            assert comm.allreduce(mine.lengths).tolist() == one.lengths.tolist()
            done += new
        if comm.size > 1:
            before = snapshot(mine)
            refused("^owner is 0.*behind", attend, *arrays, config, comm, cache=mine, owner=0, **p.latent)
            assert snapshot(mine) == before


def ranks_errors(dsa, comm):
    """What is wrong on one rank is raised on all, by that rank's number; after it, all go on together."""
    p, few, config, rng = tokens(2, (2,), 9), tokens(0, (1,), 4), dsa.DSAConfig, np.random.default_rng(2)
    select, attend, last, several = dsa.sharded_select, dsa.sharded_attention, comm.size - 1, comm.size > 1
    index_k, k, v = sharded(comm, rng, (p.index_k, -2), (p.k, -3), (p.values, -3))
    index = {"index_q": p.index_q, "index_k_shard": index_k, "weights": p.weights}
    args, shards = index | {"top_k": p.top_k}, {"q": p.q, "k_shard": k, "v_shard": v, **index}
    every, mine, nan = shards | {"config": config()}, comm.rank == last, np.full((2, 3, 4), NAN)
    start, end, sink = np.zeros(p.T, int), np.full(p.T, 9), np.zeros(4)

    def raises(error, message, what, there=(), **here):  # what is given here, on the last rank, and on others
        with pytest.raises(error, match="^" + message):
            what[0](**{**what[1], **(here if mine else dict(there))}, comm=comm)

    is_nan = "counting queries from {}, a score in the window of query .*{}) is NaN"
    far, late = ({"k_start": start, "k_end": np.where(np.arange(p.T) < n, 0, 10**6)} for n in (0, p.T - 1))
    selects, attends = (select, args | far), (attend, every)
    for what, error, message, wrong in (
        (selects, ValueError, is_nan.format(0, "\\"), {"index_k_shard": nan}),
        (selects, TypeError, "index_k is a builtins.list", {"index_k_shard": [1.0]}),
        (selects, ValueError, "weights has J = 1, but index_q has J = 2", {"weights": p.weights[..., :1]}),
        (selects, ValueError, "top_k is 0, expected an integer of at least 1", {"top_k": 0}),
        (attends, ValueError, ".*'window', expected 'lightning'", {"config": config(strategy="fixed")}),
        (attends, TypeError, "cache is a NoneType", {"owner": 0}),
        (attends, TypeError, "cache is a NoneType", {"lengths": [1]}),
        (attends, TypeError, "cache is a int", {"cache": 3}),
    ):
        raises(error, f"rank {last}: {message}", what, **wrong)
    with mock.patch.object(dsa, "SHARD_BUFFER", 1):  # each query on its own, and only the last one sees a key
        message = is_nan.format(p.T - 1, "0,?\\")
        raises(ValueError, f"rank {last}: {message}", (select, args | late), index_k_shard=nan)
    cached = dict(zip(shards, (few.q, *few.kv, *few.index), strict=True)) | {"config": config()}
    for what, name, here, there in (
        (selects, "top_k", 7, p.top_k), (selects, "top_k", 7, 8 + comm.rank), (selects, "k_start", end, None),
        (selects, "index_q", p.index_q.astype(F32), p.index_q), (attends, "k_end", end, None),
        (attends, "sink", None, sink), (attends, "q", p.q.astype(F32), p.q), (attends, "layer", 1, 0),
        ((attend, cached), "cache", new_cache(dsa, "KVCache", few, 9), None),
    ) if several else ():  # fmt: skip
        raises(ValueError, f"{name} is .* on rank .*the same", what, {name: there}, **{name: here})
    for where, name, top_k in ((np, "take_along_axis", 3), (dsa, "every_key", 10**6)) if several else ():
        full: Any = {"side_effect": MemoryError("full")} if mine else {"wraps": getattr(where, name)}
        with mock.patch.object(where, name, **full):
            raises(MemoryError, f"rank {last}: full", (attend, every | {"config": config(top_k)}))
    none, whole = ([x[:0] for x in each] for each in (shards.values(), (p.q, p.k, p.values, *p.index)))
    assert_same(select(*none[3:], p.top_k, comm), dsa.lightning_select(*whole[3:], p.top_k))
    for each in (config(3), config(10**6)):
        assert_same(attend(*none, each, comm), dsa.dsa_attention(*whole, each))
    out, lse, _ = attend(**every | {"q": p.q[..., :0, :]}, comm=comm, sink=np.zeros(0))  # no heads
    assert (out.shape[-2:], lse.shape[-1]) == ((0, 3), 0)
    mail = np.zeros(1), comm.rank ^ 1  # of the caller's own, under way meanwhile
    pending = [comm.Irecv(*mail)] if mail[1] < comm.size else []
    assert_same(select(**args, comm=comm), dsa.lightning_select(*p.index, p.top_k))
    for request in pending:
        comm.Send(np.ones(1), mail[1])
        request.Wait()
        assert mail[0] == 1


def ranks_traffic(dsa, comm):
    """A query moves at most 12 * R * top_k bytes, however many the keys; its merge what is documented."""
    T, top_k, R = 50, 30, comm.size
    rows = np.diff(T * np.arange(R + 1) // R)[comm.rank]
    names = ("Allgather", "Isend", "Irecv")  # no other, as one that pickles
    calls = {name: mock.Mock(side_effect=getattr(comm, name)) for name in names}
    traffic: Any = types.SimpleNamespace(rank=comm.rank, size=R, Free=dict, Dup=lambda: traffic, **calls)
    moved = lambda name: sum(x.args[0].nbytes for x in calls[name].call_args_list)  # noqa: E731
    for S in (400, 4000):
        for call in calls.values():
            call.reset_mock()
        rng = np.random.default_rng(S)
        index_q, part, weights = (normal(rng, *x).astype(F32) for x in ((T, 2, 8), (S // R, 8), (T, 2)))
        dsa.sharded_select(index_q, part, weights, top_k, traffic, k_end=np.full(T, S))
        assert moved("Isend") == T * 8 * top_k + R * rows * 4 * top_k and moved("Allgather") <= 150
        assert moved("Irecv") == R * rows * 8 * top_k + T * 4 * top_k
        sent, index = moved("Isend"), (index_q, part, weights, dsa.DSAConfig(top_k))
        options: Any = {"d_v": 8, "k_end": np.full(T, S), "scatter": True}
        dsa.sharded_attention(index_q.astype(BFLOAT16), part[:, None], None, *index, traffic, **options)
        assert moved("Isend") == 2 * sent + T * 2 * (8 * 2 + 4 + 4)  # out in float16, its scale and lse, once


# 16. On the GPU (the stages above were tested on both; what follows needs one, but for the compiler)


@pytest.fixture(scope="session", params=[False, True], ids=["", "portable"])
def cupy(dsa, request):
    """CuPy; a Hopper card also runs what others do."""
    if "cupy" not in array_libraries():
        pytest.skip("needs CuPy and a GPU")
    cupy = poisoned(importlib.import_module("cupy"))
    if request.param and int(cupy.cuda.Device().compute_capability) < 90:
        pytest.skip("this GPU runs portable kernels in any case")
    dsa.PORTABLE_KERNELS = request.param
    yield cupy
    dsa.PORTABLE_KERNELS = False


def on(cupy, function, *args, **kwargs):
    """What a function returns for arrays on the GPU, as NumPy arrays."""
    return Stages(None, cupy).call(function, *args, **kwargs)


def test_that_kernels_compile_is_said_once(dsa, capsys, monkeypatch):
    """They compile side by side; what takes over a second is said, the first time; an error is raised."""
    dsa.say_once.cache_clear()
    under_way = threading.Barrier(3)

    def compile_slowly(kernel):
        under_way.wait(timeout=60)
        threading.Event().wait(1.2)
        kernel.function = len

    for said in (1, 0):
        monkeypatch.setattr(dsa.Kernel, "compile", compile_slowly)
        kernels = [dsa.Kernel(dsa.Chip(0, 90, 0, 1), "gather", 256) for _ in range(3)]
        kernels[0].wait()
        assert capsys.readouterr().err.count("compiling") == said
    monkeypatch.setattr(dsa.Kernel, "compile", lambda kernel: 1 / 0)
    failing = dsa.Kernel(dsa.Chip(0, 90, 0, 1), "gather", 256)
    for _ in range(2):
        refused("", failing.wait, error=ZeroDivisionError)


@pytest.mark.parametrize("name", SELECTOR_NAMES)
def test_selectors_on_the_gpu_are_numpys(dsa, cupy, name):
    """Small integers make all but logits and projections exact; those may swap a key at the boundary."""
    rng = np.random.default_rng(1)
    shapes = {"q": (2, 20, 4, 8), "k": (2, 300, 2, 8), "index_q": (2, 20, 3, 8), "index_k": (2, 300, 8)}
    arrays = {key: small(rng, *shape) for key, shape in (shapes | {"weights": (2, 20, 3)}).items()}
    for kwargs in ({}, {"local_window": 5, "num_sink_tokens": 2, "k_start": rng.integers(0, 30, (2, 20))}):
        expected = dsa.SELECTORS[name](**arrays, top_k=24, **kwargs)
        found = on(cupy, dsa.SELECTORS[name], **arrays, top_k=24, **kwargs)
        same = np.mean([np.isin(a, b).mean() for a, b in zip(found, expected, strict=True)])
        assert same == 1 if name not in ("approximate", "lsh", "learned", "oracle") else same > 0.98
        assert found.dtype == np.int32 and found.shape == expected.shape


@pytest.mark.parametrize("storage", ["float32", "bfloat16", "fp8"])
@pytest.mark.parametrize("H, rope, k, v", [
    (128, 64, (1, 576), ()), (40, 64, (1, 576), ()), (6, 8, (1, 36), ()), (8, 16, (2, 64), (2, 32))
])  # fmt: skip
def test_caches_on_the_gpu_are_numpys(dsa, cupy, monkeypatch, storage, H, rope, k, v):
    """Two tiers to the bits of one: ragged, few queries and many, with growth and a rejected draft, a small
    fast tier, NaN that no row looks at; and no file is made."""
    rng, Dv = np.random.default_rng(H), {576: 512, 36: 24}.get(k[1])
    dtype = F32 if storage == "float32" else BFLOAT16
    streams: Any = {"k": k, "index_k": (8,)} | ({"v": v} if v else {})
    kwargs: Any = {"batch": 2, "storage": storage, "qk_rope_head_dim": rope, "grow": True} | streams
    fast: Any = {"fast_bytes": 90 * dsa.KVCache(1, **kwargs).bytes_per_token, "local_window": 3}
    numpys = dsa.HybridKVCache(400, **fast, **kwargs)  # whose file is made now
    monkeypatch.setattr(tempfile, "TemporaryFile", None)
    one, two = dsa.KVCache(150, xp=cupy, **kwargs), dsa.HybridKVCache(150, xp=cupy, **fast, **kwargs)

    def alike(call, **given):
        caches = (numpys, one, two)
        expected, *found = (on(x.xp, functools.partial(call, x), **given, d_v=Dv) for x in caches)
        assert [x.tobytes() for x in found[0]] == [x.tobytes() for x in found[1]]
        assert_close(found[0][0], expected[0].astype(F64), TOLERANCE[dtype])
        assert_close(found[0][1], expected[1], 1e-4)
        np.testing.assert_array_equal(found[0][2:], expected[2:])
        assert len({(x.hits, x.misses, x.bytes_moved) for x in (numpys, two)}) == 1

    for T, lengths in ((130, [130, 90]), (1, [1, 0]), (80, [80, 7]), (3, [2, 3])):
        shapes = {"q": (H, k[1]), "index_q": (2, 8), "weights": (2,)} | streams
        numbers = {x: normal if x in "qkv" else small for x in shapes}
        new = {x: numbers[x](rng, 2, T, *shape).astype(F32) for x, shape in shapes.items()}
        new |= {"q": new["q"].astype(dtype), "v": new.get("v"), "lengths": np.array(lengths)}
        alike(lambda x, **new: dsa.dsa_attention(**new, config=dsa.DSAConfig(top_k=60), cache=x), **new)
        indices = rng.integers(-1, one.lengths[:, None, None], (2, T, 60 if T > 9 else 333))
        indices[1, T - 1] = -1
        for kept in (indices, np.full_like(indices, -1)):
            alike(dsa.KVCache.attend, q=new["q"], indices=kept)
        for cache in (numpys, one, two) if T == 80 else ():
            cache.truncate(np.array([99, 60]))
    for cache in (numpys, one, two):
        cache.append(**{x: cache.xp.full((2, 1, *shape), NAN, F32) for x, shape in streams.items()})
    alike(dsa.KVCache.attend, q=new["q"], indices=indices)
    assert two.hits > 0 and two.misses > 0
    numpys.close(), two.close()


@pytest.mark.parametrize("precision", ["fp32", "fp8"])
@pytest.mark.parametrize("storage", [None, "as weights", "fp8"])
@pytest.mark.parametrize("dtype", [F64, BFLOAT16], ids=str)
def test_the_layer_on_the_gpu_is_numpys(dsa, cupy, dtype, storage, precision):
    """NumPy's in float64, of either core, also from caches; bfloat16's weights stay so, with float32 sums."""
    dims = SMALL | {"indexer_precision": precision} | ({"index_topk": 50} if dtype == BFLOAT16 else {})
    w, x = layer_weights(dtype=dtype), HIDDEN.astype(dtype)
    exact = dsa.DSALayer({name: z.astype(F64) for name, z in w.items()}, **dims)
    layer = copy.deepcopy(dsa.DSALayer({name: cupy.asarray(z) for name, z in w.items()}, **dims))
    assert layer.weights["wo"].dtype == dtype and layer.weights["q_norm"].dtype == accumulator(dtype)
    kind = dtype.name if storage == "as weights" else storage
    caches = [z.new_cache(2, 50, kind) if storage else None for z in (exact, layer)]
    chunks = [(slice(0, 20), [20, 11]), (slice(20, 21), [1, 1]), (slice(21, 40), [19, 0])]
    chunks += [(slice(40, 50), [10, 10])]
    for rows, lengths in chunks if storage else [(slice(0, 50), [50, 31])]:
        for core in ("auto",) if storage else ("auto", "expanded"):
            options: Any = {"lengths": np.array(lengths), "core": core}
            y, indices = exact(x[:, rows].astype(F64), caches[0], **options)
            own, own_indices = on(cupy, layer, x[:, rows], caches[1], **options)
            np.testing.assert_array_equal(own_indices, indices)
            size = 1.0 if dtype == F64 else np.abs(y).max()
            assert own.dtype == dtype
            assert_close(own.astype(F64) / size, y / size, 1e-9 if dtype == F64 else 2e-2)


@pytest.mark.parametrize("numbers", [small, normal])
@pytest.mark.parametrize("J, E, dtype", [
    (64, 128, "e4m3"), (32, 128, "e4m3"), (31, 128, "e4m3"), (9, 128, "e4m3"), (64, 128, BFLOAT16),
    (128, 128, F16), (32, 64, F16),
])  # fmt: skip
def test_index_scores_of_many_heads(dsa, cupy, J, E, dtype, numbers):
    """Hopper has kernels for these: integers and powers of two are exact, NaN stays; else within 1e-3;
    of a query in one order, and so to the same bits, alone, among few and among many."""
    rng = np.random.default_rng(7)
    sizes = (2, 1, 3), (2, 3, 70), (2, 201, 1300), (1, 1, 1000), (3, 2, 257), (2, 8, 513), (2, 3, 4)
    for batch, T, S in sizes:
        q, k, w = (numbers(rng, batch, *shape).astype(F32) for shape in ((T, J, E), (S, E), (T, J)))
        if dtype == "e4m3":
            (q, s_q), (k, s_k) = dsa.quantize_fp8(q), dsa.quantize_fp8(k)
            s_k *= np.exp2(rng.integers(-3, 4, s_k.shape)).astype(F32)
            k, w = np.concatenate([k, s_k.view(np.uint8)], -1), w * s_q[..., 0]
        else:
            q, k = q.astype(dtype), k.astype(dtype)
        if numbers is small:
            k[-1, 2, 5] = 127 if dtype == "e4m3" else NAN
        start, end = rng.integers(-9, S, (batch, T)), rng.integers(0, S + 9, (batch, T))
        for windows in ({}, {"k_end": end}, {"k_start": start, "k_end": end}):
            found = on(cupy, dsa.index_scores, q, k, w, **windows)
            expected = dsa.index_scores(q, k, w, **windows)
            size = 0 if numbers is small else 1e-3 * np.abs(expected[expected > -INF]).max(initial=0)
            np.testing.assert_allclose(found, expected, rtol=0, atol=size)
        for part in (slice(0, 1), slice(3, 5), slice(12, 19), slice(9, 30)) if T > 30 and size else ():
            own = {name: x[:, part] for name, x in windows.items()}
            assert_same(on(cupy, dsa.index_scores, q[:, part], k, w[:, part], **own), found[:, part])


def test_offsets_beyond_32_bits(dsa, cupy):
    """T * S > 2^31 scores, and a cache of more than 2^31 numbers: the last rows and keys are right."""
    T, S, rng = 17_000, 131_072, np.random.default_rng(3)
    if cupy.cuda.runtime.memGetInfo()[0] < 40e9:
        pytest.skip("needs 40 GB of GPU memory")
    index = [small(rng, *shape).astype(F32) for shape in ((T, 1, 16), (S, 16), (T, 1))]
    on_gpu, rows = [*map(cupy.asarray, index)], np.array([0, T // 2, T - 1])
    scores = dsa.index_scores(*on_gpu)
    indices = dsa.select_topk(scores, 64)
    some, window = (index[0][rows], index[1], index[2][rows]), {"k_end": rows + S - T + 1}
    assert_same(scores[rows].get(), dsa.index_scores(*some, **window))
    expected = dsa.lightning_select(*some, 64, **window)
    for found in (indices, dsa.lightning_select(*on_gpu, 64)):
        np.testing.assert_array_equal(found[rows].get(), expected)
    del scores
    N = 2**31 // 576 + 1000
    k, last = cupy.zeros((N, 1, 576), BFLOAT16), normal(rng, 64, 1, 576).astype(BFLOAT16)
    k[-64:] = cupy.asarray(last)
    q, at = normal(rng, 2, 16, 576).astype(BFLOAT16), np.stack([np.arange(64), np.arange(63, -1, -1)])
    out, lse = dsa.sparse_attention(q.astype(F64), last.astype(F64), None, at, d_v=512)
    for dtype in (BFLOAT16, F32):
        found = on(cupy, dsa.sparse_attention, q.astype(dtype), k, None, at + N - 64, d_v=512)
        assert_close(found[0], out, 2e-2)
        assert_close(found[1], lse, 1e-4)


@pytest.mark.parametrize("dtype", [BFLOAT16, F16, F32], ids=str)
@pytest.mark.parametrize("T, K, H, G, D, Dv", [
    (45, 150, 128, 1, 576, None), (45, 150, 128, 1, 576, 64), (50, 30, 3, 3, 64, 64), (50, 30, 4, 1, 40, 24),
    (50, 30, 8, 2, 128, 64), (50, 150, 24, 2, 64, 128), (50, 150, 16, 1, 40, 24), (20, 200, 8, 1, 576, None),
    (20, 64, 96, 1, 512, None), (20, 70, 40, 1, 576, None),
])  # fmt: skip
def test_gradients_on_the_gpu(dsa, cupy, monkeypatch, T, K, H, G, D, Dv, dtype):
    """Near NumPy's float64, in one chunk of queries and in many; the same bits again."""
    rng, S, J, E, latent = np.random.default_rng(13), 400, 64, 128, {} if Dv else {"d_v": 512}
    shapes = (T, H, D), (S, G, D), (S, G, Dv or 1), (T, J, E), (S, E), (T, J), (T, H, Dv or 512)
    q, k, v, *index, dout = (normal(rng, 2, *shape).astype(dtype) for shape in shapes)
    index[:2] = map(np.rint, index[:2])  # their products are exact, as the gradient of relu jumps at 0
    indices, sink = rng.integers(5, S, (2, T, K)).astype(np.int32), normal(rng, H).astype(F32)
    indices[rng.random(indices.shape) < 0.1], indices[..., 0], indices[:, 7] = -1, 6, -1
    k[:, 2], v[:, 2] = NAN, NAN
    v, options = v if Dv else None, latent | {"sink": sink}
    out, lse = dsa.sparse_attention(q, k, v, indices, **options)
    backward = q, k, v, indices, out, lse, dout
    expected = dsa.sparse_attention_backward(*in_float64(backward), **latent, sink=sink.astype(F64))
    target = dsa.attention_target(*in_float64((q, k)), indices=indices)
    loss, of_index = dsa.indexer_loss(*in_float64(index), target, indices=indices)
    tolerance = {BFLOAT16: 8e-3, F16: 1e-3, F32: 3e-5}[dtype]  # NumPy's float32 errs by 5e-6

    def run(**kwargs):
        grads = on(cupy, dsa.sparse_attention_backward, *backward, **options, **kwargs)
        found, more = on(cupy, dsa.indexer_loss, *index, target.astype(F32), indices=indices, **kwargs)
        assert_close(found / loss, 1.0, 1e-5)
        assert_gradients((*grads, *more), (*expected, *of_index), (q, k, v, sink, *index), tolerance, 0)
        return tuple(x for x in (*grads, *more, np.float64(found)) if x is not None)

    for nbytes in (2**31, 2**21):
        monkeypatch.setattr(dsa, "SLOT_BYTES", nbytes)
        assert_close(on(cupy, dsa.attention_target, q, k, indices=indices), target, 1e-5)
        assert_same(run(), run())


def test_neither_place_nor_chip_nor_run_changes_a_bit(dsa, cupy, monkeypatch):
    """A sequence anywhere in a batch, again, in a captured CUDA graph, also of what is written in later, and
    on a GPU of fewer multiprocessors; and if portable kernels are asked for, nothing of Hopper's runs."""
    rng, launch, names = np.random.default_rng(14), dsa.Kernel.__call__, set()
    shapes = (3, 5, 128, 576), (3, 900, 1, 576), (3, 5, 64, 128), (3, 900, 128), (3, 5, 64)
    x = [cupy.asarray(normal(rng, *shape).astype(BFLOAT16)) for shape in shapes]
    x[4] = x[4].astype(F32)

    def run(q, k, *index):
        indices = dsa.lightning_select(*index, 200)
        return indices, *dsa.sparse_attention(q, k, None, indices, d_v=512)

    def fewer(kernel, grid, *args, **kwargs):
        names.add(f"{kernel.name} {kernel.options}")
        launch(kernel, (7,) if kernel.name == "attend_wgmma" else grid, *args, **kwargs)

    expected = on(cupy, run, *x)
    assert_same(on(cupy, run, *x), expected)
    turned = on(cupy, run, *(cupy.ascontiguousarray(y[[2, 0, 1]]) for y in x))
    assert_same(turned, tuple(y[[2, 0, 1]] for y in expected))
    with monkeypatch.context() as patch:
        patch.setattr(dsa.Kernel, "__call__", fewer)
        assert_same(on(cupy, run, *x), expected)
    portable = dsa.PORTABLE_KERNELS or cupy.cuda.Device().compute_capability != "90"
    assert portable == (not any("sm_90a" in name or "BLOCKS=16" in name for name in names)), names
    with cupy.cuda.Stream(non_blocking=True) as stream:
        run(*x)  # warm
        stream.begin_capture()
        found = run(*x)
        graph = stream.end_capture()
        for _ in range(2):
            for y in x[0], x[2]:
                y[...] = cupy.asarray(normal(rng, *y.shape).astype(BFLOAT16))
            graph.launch()
            stream.synchronize()
            assert_same(tuple(y.get() for y in found), on(cupy, run, *x))


def test_keys_whose_rows_stand_apart(dsa, cupy):
    """One key is contiguous wherever it stands; what is known of it does not hold for several."""
    q, k, w = (cupy.asarray(normal(np.random.default_rng(5), *x)) for x in ((2, 4, 16), (18, 16), (2, 4)))
    for x in ((q, k[: 2 * S : 2], w) for S in (1, 5)):
        np.testing.assert_allclose(dsa.index_scores(*x).get(), dsa.index_scores(*(y.get() for y in x)), 1e-12)


@pytest.mark.parametrize("T, sizes", [
    (3, (1, 9, 100, 4096, 4099, 8190, 8193, 16384)), (130, (9, 8192, 12_001)),
    (4, (30_003, 140_003)), (8, (30_003,)), (16, (30_003,)), (17, (30_003,)),
])  # fmt: skip
def test_rows_that_a_block_holds_or_a_cluster_shares(dsa, cupy, T, sizes):
    """Every length that fills registers or does not, at any alignment; by 16, 8, 4 blocks of a row, or one:
    ties, equal rows, ascending and descending ones, holes, denormals, NaN, all or none in the sample."""
    rng = np.random.default_rng(18)
    for S in sizes:
        x, sampled, (start, end) = normal(rng, T, S), np.arange(S) % 128 < 8, rng.integers(0, S + 1, (2, T))
        rows = (
            x, np.round(4 * x), 0 * x, np.sort(x), -np.sort(x), np.where(x > 1.5, x, -INF), x * 1e-42,
            np.where(x > 2, NAN, x), x + 9 * sampled, x - 9 * sampled,
        )  # fmt: skip
        forced: Any = {"local_window": 65, "num_sink_tokens": 7} if S > 2**14 else {}
        options = forced, {"k_start": start}, {"k_end": end}, {"k_start": start, "k_end": end}
        top_ks, dtypes = ((72, 2048, 9000), (F32, F64)) if S > 2**14 else ((1, 72, 2048), [F32])
        for scores, top_k, dtype, kwargs in itertools.product(rows, top_ks, dtypes, options):
            scores = scores.astype(dtype)
            found = on(cupy, dsa.select_topk, scores, top_k, **kwargs)
            scores[np.isnan(scores)] = -INF  # kernels do not check: it is never selected
            np.testing.assert_array_equal(found, dsa.select_topk(scores, top_k, **kwargs))


COMPILED = """
index_scores_fma REAL=float,double
index_scores_mma ELEMENT=bf16,half,code J=64 E=128 PITCH=128 HEADS=64 TILES=4
index_scores_mma ELEMENT=bf16 J=3 E=30 PITCH=32 HEADS=8 TILES=4
index_scores_few_wgmma J=32,64 TOGETHER=1,2
index_scores_wgmma ELEMENT/J/E=code/64/128,code/32/128,bf16/64/128,bf16/32/128,half/128/64
select_topk REAL=float,double HELD=0
    BLOCK/BLOCKS/CAPACITY=512/1/2048,1024/1/3584,512/1/4096,512/4/4096,512/8/3584,512/16/8192
select_topk REAL=float BLOCK/HELD=512/8,512/16,512/32,1024/8,1024/16 BLOCKS=1 CAPACITY=1
attend HEADS/COLUMNS=1/1,8/4 TIED=0 R8=0 ROPE=0
  QT/KT/VT/OUT/ACC=float/float/float/float/float,double/double/double/double/double,bf16/bf16/bf16/bf16/float
attend HEADS/COLUMNS=1/1,8/4 TIED=1 QT/KT/VT/OUT/ACC=half/half/half/half/float R8=0 ROPE=0
attend HEADS=8 COLUMNS=4 TIED=1 QT/KT/VT/OUT/ACC=float/code/code/float/float R8=512 ROPE=64
attend_few_mma TYPE/OUT=bf16/bf16,half/float HEADS/D/DV=1/64/64,4/128/128,16/128/128,7/256/256,3/40/24
attend_backward_rows TYPE=bf16,half D/DV=64/64,128/128,40/24 BY_KEY=0,1
attend_backward_mma D/DV=64/64,128/128,40/24
attend_backward_keys_mma D/DV/TIED/COLUMNS=576/512/1/192,512/512/1/128,128/128/0/128,40/24/0/64 SEGMENTS=8
attend_mma D=576 DV=512 HEADS=64 KEYS=64 TIED=1 TYPE=bf16 OUT/R8/ROPE/VEC/VVEC=bf16/0/0/16/16,float/512/64/4/4
attend_mma D=40 DV=24 HEADS=16 KEYS=32 TIED=0 TYPE=half OUT=half R8=0 ROPE=0 VEC=8 VVEC=16
attend_wgmma D/TYPE/OUT=576/bf16/bf16,512/half/float DV=512 HEADS=64 TIED=1 R8=0 ROPE=0
attend_wgmma D=576 TYPE=bf16 OUT=bf16,float DV=512 HEADS=64 TIED=1 R8=512 ROPE=64
merge_attention ACC/OUT/LOADS=float/float/8,float/bf16/32,double/double/16 COLUMNS=4
attend_backward TYPE/ACC=float/float,double/double,bf16/float
attend_backward_norms TYPE/OUT/ACC=float/float/float,double/double/double,bf16/float/float,half/half/float
attend_backward_wgmma D=512,576
attention_target ACC=float,double STEP=0,1
indexer_loss TYPE/ACC=float/float,double/double,bf16/float STEP=0,1,2
gather UNIT=short,int,int2,int4
add_by_key ACC/WIDE=float/1,float/4,double/2
quantize_fp8 BLOCK=128 UE8M0=1 XT/ACC=float/float,double/double,half/float,bf16/float
made_of_x ACC/OUT=float/float,float/bf16,double/double
rotate ACC/TYPE=float/float,float/bf16,double/double
"""  # each kernel with constants that the launchers of dsa.py give it: A/B=1/2,3/4 is 1 and 2, or 3 and 4


def kernels():
    """(name, {constant: value}, architecture): every choice in each line, where launchers take the kernel."""
    types_of = {"half": "__half", "bf16": "__nv_bfloat16", "code": "unsigned char"}
    archs = ["sm_75", "sm_80", "sm_90a", "sm_100", "sm_120"]
    for line in COMPILED.strip().replace("\n ", " ").splitlines():
        names, *options = line.split()
        axes: Any = ([(keys, x) for x in some.split(",")] for keys, some in (x.split("=") for x in options))
        for name, *chosen in itertools.product(names.split(","), *axes):
            both = (zip(keys.split("/"), values.split("/"), strict=True) for keys, values in chosen)
            constants = {key: types_of.get(x, x) for each in both for key, x in each}
            own = {"mma": archs[1:], "wgmma": ["sm_90a"]}.get(name.split("_")[-1], archs)
            for arch in archs[2:] if int(constants.get("BLOCKS", 1)) > 1 else own:
                yield name, constants, arch


@pytest.mark.skipif(not Path(__file__).with_name("dsa_kernels.cu").exists(), reason="no dsa_kernels.cu here")
@pytest.mark.parametrize("name, constants, arch", [*kernels()])
def test_every_kernel_compiles(dsa, name, constants, arch):
    """Without a GPU; on sm_90a nothing spills, by a compiler newer than CUDA 13.0's (six kernels do)."""
    nvrtc = pytest.importorskip("cuda.bindings.nvrtc", reason="NVRTC is not installed: no kernel is compiled")
    import nvidia

    (headers, *_) = (x.parent for root in nvidia.__path__ for x in Path(root).rglob("include/cuda_bf16.h"))
    source = Path(__file__).with_name("dsa_kernels.cu").read_bytes()
    options = ["-std=c++17", f"-arch={arch}", f"-I{headers}", f"-I{headers}/cccl", "--ptxas-options=-v"]
    options += ["-ftz=true", "-default-device"]  # as CuPy has them
    options += [f"-D{key}={value}" for key, value in ({name.upper(): 1} | constants).items()]
    program = nvrtc.nvrtcCreateProgram(source, b"dsa_kernels.cu", 0, [], [])[1]
    (result,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
    log = bytearray(nvrtc.nvrtcGetProgramLogSize(program)[1])
    nvrtc.nvrtcGetProgramLog(program, log)  # what ptxas says of registers and spills, too
    assert result == nvrtc.nvrtcResult.NVRTC_SUCCESS, log.decode()
    if arch == "sm_90a":
        assert b"serialized" not in log, log.decode()
        assert b" 0 bytes spill stores" in log or nvrtc.nvrtcVersion()[1:] < (13, 1), log.decode()


@pytest.mark.skipif(not Path(__file__).with_name("dsa_kernels.cu").exists(), reason="no dsa_kernels.cu here")
def test_no_kernel_is_forgotten(dsa):
    """Every kernel of dsa_kernels.cu is among those that are compiled."""
    source = Path(__file__).with_name("dsa_kernels.cu").read_text()
    names = {name.lower() for name in re.findall(r"^#ifdef (\w+)$", source, re.M)}
    assert names == {name for name, *_ in kernels()}


if __name__ == "__main__":
    raise SystemExit(pytest.main(["-p", "test_dsa", __file__, *sys.argv[1:]]))
