# SPDX-License-Identifier: MIT
"""Mutants of dsa.py, drawn at random, one small change each: which does no test notice?

    python .github/mutants.py FIRST-LAST[,FIRST-LAST] COUNT SEED WORKERS SECONDS [pytest's arguments]

The ranges are lines of dsa.py. mutmut passes over decorated functions, and so over every stage.
"""

import ast
import concurrent.futures
import os
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

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


def survives(source, place, seconds, tests):
    """What was changed, if the tests pass all the same; otherwise None."""
    said, source = mutant(source, place)
    with tempfile.TemporaryDirectory() as folder:
        for name in ("test_dsa.py", "README.md", "pyproject.toml", "dsa_kernels.cu"):
            shutil.copy(ROOT / name, folder)
        Path(folder, "dsa.py").write_text(source)
        command = [sys.executable, "-m", "pytest", "-xq", "-p", "no:cacheprovider", "-p", "no:xdist", *tests]
        env = os.environ | {"OPENBLAS_NUM_THREADS": "1", "TMPDIR": folder}
        try:
            done = subprocess.run(command, cwd=folder, env=env, capture_output=True, timeout=seconds)
        except subprocess.TimeoutExpired:
            return None
        return None if done.returncode else said


def main(ranges, count, seed, workers, seconds, *tests):
    source = (ROOT / "dsa.py").read_text()
    tree = ast.parse(source)
    spans = [range(*(int(x) + i for i, x in enumerate(part.split("-")))) for part in ranges.split(",")]
    functions = [x for x in ast.walk(tree) if isinstance(x, ast.FunctionDef)]
    inside = {id(x) for function in functions for statement in function.body for x in ast.walk(statement)}
    nodes = [(i, x) for i, x in enumerate(ast.walk(tree)) if id(x) in inside and can_change(x)]
    places = [i for i, x in nodes if any(x.lineno in span for span in spans)]
    random.Random(int(seed)).shuffle(places)
    places, killed = places[: int(count)], 0
    with concurrent.futures.ThreadPoolExecutor(int(workers)) as pool:
        runs = [pool.submit(survives, source, place, float(seconds), tests) for place in places]
        for number, done in enumerate(concurrent.futures.as_completed(runs), 1):
            killed += done.result() is None
            if done.result() or number % 25 == 0:
                print(
                    f"survives: {done.result()}" if done.result() else f"{number}, {killed} killed",
                    flush=True,
                )
    print(f"{len(places)} mutants, {killed} killed")


if __name__ == "__main__":
    main(*sys.argv[1:])
