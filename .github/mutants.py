# SPDX-License-Identifier: MIT
"""Mutants of dsa.py, drawn at random, one small change each: which does no test notice?

    python .github/mutants.py FIRST-LAST[,FIRST-LAST] COUNT SEED WORKERS SECONDS [pytest's arguments]

The ranges are lines of dsa.py. mutmut passes over decorated functions, and so over every stage.
"""

import ast
import concurrent.futures
import copy
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


def mutant(tree, place):
    """The tree with its node at this place of ast.walk changed -> words and source; None if it cannot."""
    tree = copy.deepcopy(tree)
    nodes = list(ast.walk(tree))
    node, parents = nodes[place], {id(child): node for node in nodes for child in ast.iter_child_nodes(node)}
    said = f"{getattr(node, 'lineno', 0)}: {ast.unparse(node)[:90]}"
    if isinstance(node, ast.Compare) and type(node.ops[0]) in SWAPS:
        node.ops[0] = SWAPS[type(node.ops[0])]()
    elif isinstance(node, (ast.BinOp, ast.BoolOp)) and type(node.op) in SWAPS:
        node.op = SWAPS[type(node.op)]()
    elif isinstance(node, ast.Constant) and isinstance(node.value, (bool, int, float)):
        node.value = not node.value if isinstance(node.value, bool) else node.value + 1
    elif isinstance(node, (ast.If, ast.IfExp)):
        node.test = ast.UnaryOp(ast.Not(), node.test)
    elif isinstance(node, (ast.Assign, ast.AugAssign, ast.Expr)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            return None  # a docstring
        for _, value in ast.iter_fields(parents[id(node)]):
            if isinstance(value, list) and node in value:
                value[value.index(node)] = ast.Pass()
    else:
        return None
    return f"{type(node).__name__} at {said}", ast.unparse(ast.fix_missing_locations(tree))


def survives(found, seconds, tests):
    with tempfile.TemporaryDirectory() as folder:
        for name in ("test_dsa.py", "README.md", "pyproject.toml", "dsa_kernels.cu"):
            shutil.copy(ROOT / name, folder)
        Path(folder, "dsa.py").write_text(found[1])
        command = [sys.executable, "-m", "pytest", "-xq", "-p", "no:cacheprovider", "-p", "no:xdist", *tests]
        env = os.environ | {"OPENBLAS_NUM_THREADS": "1", "TMPDIR": folder}
        try:
            return not subprocess.run(
                command, cwd=folder, env=env, capture_output=True, timeout=seconds
            ).returncode
        except subprocess.TimeoutExpired:
            return False


def main(ranges, count, seed, workers, seconds, *tests):
    tree = ast.parse((ROOT / "dsa.py").read_text())
    spans = [range(*(int(x) + i for i, x in enumerate(part.split("-")))) for part in ranges.split(",")]
    functions = [x for x in ast.walk(tree) if isinstance(x, ast.FunctionDef)]
    inside = {id(x) for function in functions for statement in function.body for x in ast.walk(statement)}
    places = [
        i
        for i, x in enumerate(ast.walk(tree))
        if id(x) in inside and any(x.lineno in s for s in spans if hasattr(x, "lineno"))
    ]
    random.Random(int(seed)).shuffle(places)
    drawn = (found for place in places if (found := mutant(tree, place)))
    chosen = [found for _, found in zip(range(int(count)), drawn)]
    killed = 0
    with concurrent.futures.ThreadPoolExecutor(int(workers)) as pool:
        said = {pool.submit(survives, found, float(seconds), tests): found[0] for found in chosen}
        for number, done in enumerate(concurrent.futures.as_completed(said), 1):
            killed += not done.result()
            if done.result() or number % 50 == 0:
                print(
                    f"survives: {said[done]}" if done.result() else f"{number} mutants, {killed} killed",
                    flush=True,
                )
    print(f"{len(chosen)} mutants, {killed} killed")


if __name__ == "__main__":
    main(*sys.argv[1:])
