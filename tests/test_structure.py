"""The house: imports go one way, from the foot of the list to its head, and no file or function outgrows its reader."""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ORDER = [
    "hps",
    "helper",
    "running",
    "preprocessing",
    "files",
    "models",
    "vqvae",
    "vqvae2_wrapper",
    "diffusion",
    "loading",
    "datasets_cbis",
    "datasets",
    "evaluation",
    "restoration",
    "logger",
    "training",
    "trainer",
    "main",
    "benchmarks",
]
SCRIPT = ("preprocessing", "calibrate")  # run from a shell as main-*.py are, and imported by none
MODULES = [path for path in sorted(ROOT.rglob("*.py")) if path.relative_to(ROOT).parts[0] not in (".venv", "tests")]


def place(name: str) -> int:
    return ORDER.index(name.split(".")[0].split("-")[0])


def test_imports_go_one_way():
    for path in MODULES:
        parts = path.relative_to(ROOT).with_suffix("").parts
        parts = ("main",) if parts == SCRIPT else parts
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                if name.split(".")[0] in ORDER and name.split(".")[0] != parts[0]:
                    assert place(name) < place(parts[0]), f"{path} imports {name}"


def test_no_16_bit_picture_is_turned_by_pillow():
    """Pillow 13 interpolates 16-bit images (mode I;16) well in `resize`, but in `rotate` and `transform` as if they had 8 bits."""
    for path in MODULES:
        calls = (
            node.func for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)
        )
        names = {function.attr for function in calls if isinstance(function, ast.Attribute)}
        assert not names & {"rotate", "transform"}, path


def test_no_file_and_no_function_outgrows_its_reader():
    for path in MODULES:
        source = path.read_text(encoding="utf-8")
        if path.name != "hps.py":  # a table
            assert source.count("\n") <= 500, path
        for node in ast.walk(ast.parse(source)):
            if (
                isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name != "parse_arguments"
            ):  # a table of flags
                assert node.end_lineno - node.lineno < 60, f"{path}: {node.name}"
