"""The layout is what the design says: who imports whom, who prints, and what starts quickly."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OURS = ("latent_cache", "stage1_autoencoder", "stage2_flow", "pipelines")
ALLOWED = {
    "latent_cache": {"latent_cache"},
    "stage1_autoencoder": {"stage1_autoencoder"},
    "stage2_flow": {"stage2_flow", "latent_cache"},
    "pipelines": set(OURS),
}
FILES = [path.relative_to(ROOT) for package in OURS for path in sorted((ROOT / package).rglob("*.py"))]


def nodes(source: str) -> Iterator[ast.AST]:
    return ast.walk(ast.parse(source))


def imported(source: str) -> set[str]:
    """Top-level packages that a file imports anywhere, in functions too."""
    names = set()
    for node in nodes(source):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add("." * node.level + (node.module or ""))
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("__import__", "importlib.import_module"):
            names |= {argument.value for argument in node.args if isinstance(argument, ast.Constant)}
    return {name if name.startswith(".") else name.partition(".")[0] for name in names}


def prints(source: str) -> bool:
    return any(isinstance(node, ast.Call) and ast.unparse(node.func) == "print" for node in nodes(source))


def test_there_are_files_to_check():
    assert {path.parts[0] for path in FILES} == set(OURS)
    assert len(FILES) > 40


@pytest.mark.parametrize("file", FILES, ids=str)
def test_imports_go_in_the_designed_direction(file):
    names = imported((ROOT / file).read_text(encoding="utf-8"))
    assert not [name for name in names if name.startswith(".")], "relative imports hide where a name comes from"
    forbidden = (names & set(OURS)) - ALLOWED[file.parts[0]]
    assert not forbidden, f"{file} may not import {sorted(forbidden)}"
    assert "tests" not in names


@pytest.mark.parametrize("file", [file for file in FILES if file.parts[0] != "pipelines"], ids=str)
def test_stages_and_store_print_nothing(file):
    assert not prints((ROOT / file).read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("import torch.nn as nn, zarr", {"torch", "zarr"}),
        ("from pipelines.config import x", {"pipelines"}),
        ("def f():\n    from stage2_flow import loss", {"stage2_flow"}),
        ("from . import x", {"."}),
        ("import importlib\nimportlib.import_module('pipelines.config')", {"importlib", "pipelines"}),
    ],
)
def test_the_checker_sees_imports(source, names):
    assert imported(source) == names
    assert not prints(source)
    assert prints("def f():\n    print('x')")


def test_the_command_line_starts_without_heavy_imports():
    script = (
        "import sys, pipelines.__main__; print(sorted({'torch', 'wandb', 'zarr', 'numpy', 'dask'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_no_file_names_a_place_on_somebodys_machine():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("no git checkout")
    place = re.compile(r"(?<![\w.:/}~])/(?:home|root|Users|mnt|work|workspace|scratch|opt)/\w")
    assert place.search('path = "' + "/" + 'home/me"')
    found = []
    for name in listed.stdout.splitlines():
        path = ROOT / name
        if not path.is_file():
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        found += [f"{name}:{number}" for number, line in enumerate(text.splitlines(), 1) if place.search(line)]
    assert not found
