# SPDX-License-Identifier: MIT
"""Mutants of dsa.py, drawn at random, one small change each: which does no test notice?

    python .github/mutants.py FIRST-LAST[,FIRST-LAST] COUNT SEED WORKERS SECONDS [pytest's arguments]

The ranges are lines of dsa.py. mutmut passes over decorated functions, and so over every stage. First all
tests run once, to see which of them call which function: those that call a mutant's come first, the quickest
in front, and the first that fails ends its run.
"""

import ast
import collections
import concurrent.futures
import json
import math
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SWAPS = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Add: ast.Sub,
    ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Mod: ast.Add,
    ast.Pow: ast.Mult,
    ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.And: ast.Or, ast.Or: ast.And,
}  # fmt: skip


def can_change(node):
    """Whether a mutant of it is made: operators, constants, branches, statements that are no docstring."""
    if isinstance(node, ast.Compare):
        return type(node.ops[0]) in SWAPS
    if isinstance(node, (ast.BinOp, ast.BoolOp)):
        return type(node.op) in SWAPS
    if isinstance(node, ast.Constant):
        return isinstance(node.value, (bool, int, float))
    docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    return isinstance(node, (ast.If, ast.IfExp, ast.Assign, ast.AugAssign, ast.Expr)) and not docstring


def mutant(source, place):
    """The source with its node at this place of ast.walk changed -> words and source."""
    tree = ast.parse(source)
    nodes = list(ast.walk(tree))
    node, parents = nodes[place], {id(child): node for node in nodes for child in ast.iter_child_nodes(node)}
    said = f"{getattr(node, 'lineno', 0)}: {ast.unparse(node)[:90]}"
    if isinstance(node, ast.Compare):
        node.ops[0] = SWAPS[type(node.ops[0])]()
    elif isinstance(node, (ast.BinOp, ast.BoolOp)):
        node.op = SWAPS[type(node.op)]()
    elif isinstance(node, ast.Constant):
        node.value = not node.value if isinstance(node.value, bool) else node.value + 1
    elif isinstance(node, (ast.If, ast.IfExp)):
        node.test = ast.UnaryOp(ast.Not(), node.test)
    else:
        for _, value in ast.iter_fields(parents[id(node)]):
            if isinstance(value, list) and node in value:
                value[value.index(node)] = ast.Pass()
    return f"{type(node).__name__} at {said}", ast.unparse(ast.fix_missing_locations(tree))


# This file is a plugin of the runs that it starts. first.json: {test: its place} in a mutant's.
CALLERS: dict = collections.defaultdict(dict)  # line where a function of dsa.py begins: {test: its seconds}
FIRST = Path("first.json")


def pytest_collection_modifyitems(items):
    if FIRST.exists():
        first = json.loads(FIRST.read_text())
        items.sort(key=lambda item: first.get(item.nodeid, math.inf))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    called, begin = set(), time.perf_counter()

    def note(frame, event, arg):
        if frame.f_code.co_filename.endswith("/dsa.py"):
            called.add(frame.f_code.co_firstlineno)

    for module in () if FIRST.exists() else (sys, threading):
        module.settrace(note)
    try:
        return (yield)
    finally:
        sys.settrace(None)
        threading.settrace(None)
        for line in called:
            CALLERS[line][item.nodeid] = round(time.perf_counter() - begin, 3)


def pytest_sessionfinish():
    if not FIRST.exists():
        Path("callers.json").write_text(json.dumps(CALLERS))


def run(source, tests, first=None, seconds=None):
    """The status of the tests for this dsa.py, and which of them call what, if all begin as they stand."""
    with tempfile.TemporaryDirectory() as folder:
        for name in ("test_dsa.py", "README.md", "pyproject.toml", "dsa_kernels.cu"):
            shutil.copy(ROOT / name, folder)
        Path(folder, "dsa.py").write_text(source)
        if first is not None:
            Path(folder, FIRST).write_text(json.dumps(first))
        env = os.environ | {
            "OPENBLAS_NUM_THREADS": "1",
            "TMPDIR": folder,
            "PYTHONPATH": str(ROOT / ".github"),
        }
        plugins = ("-p", "mutants", "-p", "no:cacheprovider", "-p", "no:xdist")
        command = [sys.executable, "-m", "pytest", "-xq", *plugins, *tests]
        try:
            done = subprocess.run(command, cwd=folder, env=env, capture_output=True, timeout=seconds)
        except subprocess.TimeoutExpired:
            return "too long", None
        callers = Path(folder, "callers.json")
        return done.returncode, callers.exists() and json.loads(callers.read_text())


def main(ranges, count, seed, workers, seconds, *tests):
    source = (ROOT / "dsa.py").read_text()
    spans = [range(*(int(x) + i for i, x in enumerate(part.split("-")))) for part in ranges.split(",")]
    inside = {}  # place of a node in ast.walk: where its function begins
    nodes = list(ast.walk(ast.parse(source)))
    places = {id(node): place for place, node in enumerate(nodes)}
    for function in (x for x in nodes if isinstance(x, ast.FunctionDef)):  # inner ones come after outer ones
        begin = min([function.lineno, *(x.lineno for x in function.decorator_list)])
        inside |= {places[id(x)]: begin for statement in function.body for x in ast.walk(statement)}
    chosen = [i for i in inside if can_change(nodes[i]) and any(nodes[i].lineno in span for span in spans)]
    random.Random(int(seed)).shuffle(chosen)
    begin, (status, callers) = time.time(), run(source, tests)
    if status:
        sys.exit(f"status {status} of the tests without a mutant")
    print(f"{time.time() - begin:.0f} s without a mutant", flush=True)

    def survivor(place):
        said, changed = mutant(source, place)
        return None if run(changed, tests, callers.get(str(inside[place]), {}), float(seconds))[0] else said

    chosen, killed = chosen[: int(count)], 0
    with concurrent.futures.ThreadPoolExecutor(int(workers)) as pool:
        runs = [pool.submit(survivor, place) for place in chosen]
        for number, done in enumerate(concurrent.futures.as_completed(runs), 1):
            killed += done.result() is None
            if done.result():
                print(f"survives: {done.result()}", flush=True)
            elif number % 25 == 0:
                print(f"{number}, {killed} killed", flush=True)
    print(f"{len(chosen)} mutants, {killed} killed, {time.time() - begin:.0f} s")


if __name__ == "__main__":
    main(*sys.argv[1:])
