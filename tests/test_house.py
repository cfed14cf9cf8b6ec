"""The house is what the design says: who imports whom, what stands where, who prints, and what starts quickly."""

import ast
import importlib
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines.commands import COMMANDS

ROOT = Path(__file__).parents[1]
PACKAGES = ("latent_cache", "stage1_autoencoder", "stage2_flow", "pipelines")
ALLOWED = {
    "latent_cache": {"latent_cache"},
    "stage1_autoencoder": {"stage1_autoencoder"},
    "stage2_flow": {"stage2_flow", "latent_cache"},
    "pipelines": set(PACKAGES),
}
# Rooms of `pipelines`, from the top: each imports from those below it.
LAYERS = (
    "__main__", "commands", "stages", "upkeep", "play", "report", "bench", "training", "evaluation", "sampling",
    "predictor", "sharing", "encoding", "official", "prediction", "loading", "data", "runtime", "config", "errors",
)  # fmt: skip
FILES = [path.relative_to(ROOT) for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
MODULES = {".".join(path.with_suffix("").parts).removesuffix(".__init__"): path for path in FILES}


def imports(source: str) -> Iterator[str]:
    """The modules that a source imports anywhere, in functions too; of `from a import b` a.b if it is one of ours."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            whole = "." * node.level + (node.module or "")
            names = [f"{whole}.{alias.name}" for alias in node.names]
            yield from (name if name in MODULES else whole for name in names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("__import__", "importlib.import_module"):
            yield from (word.value for word in node.args if isinstance(word, ast.Constant))


def imported_modules(path: Path) -> set[str]:
    """Our own modules that a file imports."""
    return set(imports((ROOT / path).read_text(encoding="utf-8"))) & MODULES.keys()


def layer(module: str) -> str:
    return module.split(".")[1]


def test_there_is_a_house_to_check():
    assert {path.parts[0] for path in FILES} == set(PACKAGES)
    assert len(FILES) > 40
    assert list(imports("from pipelines.config import x")) == ["pipelines.config"]
    assert list(imports("from pipelines import config, x")) == ["pipelines.config", "pipelines"]
    assert list(imports("def f():\n    import torch.nn as nn, zarr")) == ["torch.nn", "zarr"]
    assert list(imports("import importlib\nimportlib.import_module('a.b')")) == ["importlib", "a.b"]
    assert next(imports("from . import x")) == "."


@pytest.mark.parametrize("file", FILES, ids=str)
def test_packages_import_in_the_designed_direction(file):
    names = {name.partition(".")[0] for name in imports((ROOT / file).read_text(encoding="utf-8"))}
    assert "" not in names, "relative imports hide where a name comes from"
    assert not (names & set(PACKAGES)) - ALLOWED[file.parts[0]]
    assert "tests" not in names


@pytest.mark.parametrize("module", [module for module in MODULES if module.startswith("pipelines.")])
def test_rooms_import_from_those_below_them(module):
    own = LAYERS.index(layer(module))
    above = [
        name
        for name in imported_modules(MODULES[module])
        if name.startswith("pipelines.") and LAYERS.index(layer(name)) < own
    ]
    assert not above, f"{module} may import from {', '.join(LAYERS[own:])}"


def test_no_module_imports_itself_by_a_detour():
    below = {module: imported_modules(path) - {module} for module, path in MODULES.items()}
    # A package's __init__ runs before its modules: they don't import it for that.
    while leaves := [module for module, names in below.items() if not names & below.keys()]:
        for module in leaves:
            del below[module]
    assert not below, "a cycle of imports among these"


def test_module_names_are_unique():
    names = Counter(path.stem for path in FILES if path.stem not in ("__init__", "__main__", "config", "errors"))
    assert not [name for name, count in names.items() if count > 1]


def test_a_prefix_that_repeats_is_a_folder():
    for folder in {path.parent for path in FILES if path.parts[0] == "pipelines" and "commands" not in path.parts}:
        stems = [path.stem for path in FILES if path.parent == folder]
        prefixes = Counter(stem.partition("_")[0] for stem in stems if "_" in stem.strip("_"))
        assert not [prefix for prefix, count in prefixes.items() if count > 3], folder


def test_what_stands_flat_in_pipelines():
    flat = {path.stem for path in FILES if path.parent == Path("pipelines")}
    assert flat == {"__init__", "__main__", "stages", "errors", "predictor", "loading"}


def test_a_command_line_word_is_a_file():
    files = {path.stem.replace("_", "-") for path in FILES if path.parent.name == "commands"} - {"--init--"}
    assert files == set(COMMANDS)
    for module, path in MODULES.items():
        if not module.startswith("pipelines.commands") and module != "pipelines.__main__":
            assert not [name for name in imported_modules(path) if name.startswith("pipelines.commands")], module
    for name in COMMANDS:
        command = importlib.import_module(f"pipelines.commands.{name.replace('-', '_')}")
        assert command.HELP
        assert callable(command.add_arguments)
        assert callable(command.run)


@pytest.mark.parametrize("file", [file for file in FILES if file.parts[0] != "pipelines"], ids=str)
def test_stages_and_store_print_nothing(file):
    calls = [
        node for node in ast.walk(ast.parse((ROOT / file).read_text(encoding="utf-8"))) if isinstance(node, ast.Call)
    ]
    assert not [node for node in calls if ast.unparse(node.func) == "print"]


def test_files_are_replaced_locked_and_digested_in_one_place():
    alone = re.compile(r"os\.replace\(|fcntl|os\.fsync\(|hashlib\.file_digest\(")
    found = [
        str(file)
        for file in FILES
        if file.parts[0] == "pipelines" and alone.search((ROOT / file).read_text(encoding="utf-8"))
    ]
    assert not set(found) - {"pipelines/runtime/files.py"}


@pytest.mark.parametrize("words", [["--help"], ["sample", "--help"], ["sample", "--no-such-option"]])
def test_help_and_wrong_usage_load_nothing_heavy(words):
    script = (
        "import sys, river_two_stage, pipelines.__main__ as river\n"
        f"try: river.main({words!r})\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'wandb', 'zarr', 'numpy', 'dask'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


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
