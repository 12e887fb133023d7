"""Rules of the code base that a reviewer would otherwise have to remember.

Everything is read from the source text with ``ast``; nothing is imported. Each checker is also run
on a made-up file that breaks its rule.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

REPO = Path(__file__).parents[1]
PACKAGES = ("il_net", "sbr_cnn")
PACKAGE_FILES = sorted(path for name in PACKAGES for path in (REPO / name).rglob("*.py"))
ALL_FILES = [*PACKAGE_FILES, REPO / "train_net.py", *sorted((REPO / "tools").glob("*.py"))]

# (who, may not import): packages by dotted prefix.
FORBIDDEN_IMPORTS = [
    ("il_net", "sbr_cnn"),
    ("sbr_cnn", "il_net"),
    # What measures models stands on everything else.
    ("il_net.data", "il_net.benchmark"),
    ("il_net.modeling", "il_net.benchmark"),
    ("il_net.curation", "il_net.benchmark"),
    ("il_net.evaluation", "il_net.benchmark"),
    ("il_net.engine", "il_net.benchmark"),
    ("il_net.data", "il_net.curation"),
    ("il_net.modeling", "il_net.curation"),
    ("il_net.curation", "il_net.modeling"),
    ("il_net.curation", "il_net.engine"),
    ("il_net.curation", "il_net.evaluation"),
    ("il_net.data", "il_net.modeling"),
    ("il_net.modeling", "il_net.data"),
    ("il_net.data", "il_net.engine"),
    ("il_net.data", "il_net.evaluation"),
    ("il_net.modeling", "il_net.engine"),
    ("il_net.modeling", "il_net.evaluation"),
    ("il_net.evaluation", "il_net.engine"),
    # sbr_cnn says what to train: no data, no trainer, no evaluation.
    ("sbr_cnn", "detectron2.data"),
    ("sbr_cnn", "detectron2.engine"),
    ("sbr_cnn", "detectron2.evaluation"),
    # Libraries do not know their command lines.
    ("il_net", "tools"),
    ("il_net", "train_net"),
    ("sbr_cnn", "tools"),
    ("sbr_cnn", "train_net"),
    # It imports pkg_resources, which current setuptools no longer has.
    ("", "detectron2.model_zoo"),
]
# File -> functions that talk to a terminal by design; None is the whole file.
MAY_PRINT = {"il_net/check.py": None, "il_net/data/synthetic.py": {"main"}}


def module_name(path: Path) -> str:
    parts = path.relative_to(REPO).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_modules(tree: ast.AST, module: str, is_package: bool) -> Iterator[tuple[int, str]]:
    """(line, absolute dotted name) of every import anywhere in a file; names may be attributes."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module.split(".") if is_package else module.split(".")[:-1]
                package = package[: len(package) - (node.level - 1)]
                base = ".".join([*package, *filter(None, [base])])
            for alias in node.names:
                yield node.lineno, f"{base}.{alias.name}"


def is_inside(name: str, package: str) -> bool:
    return not package or name == package or name.startswith(f"{package}.")


def forbidden(source: str, module: str, is_package: bool = False) -> list[str]:
    """Imports of a file that FORBIDDEN_IMPORTS rules out."""
    return [
        f"line {line}: {module} imports {name}"
        for line, name in imported_modules(ast.parse(source), module, is_package)
        for who, what in FORBIDDEN_IMPORTS
        if is_inside(module, who) and is_inside(name, what)
    ]


@pytest.mark.parametrize("path", ALL_FILES, ids=lambda p: p.relative_to(REPO).as_posix())
def test_imports_keep_the_layers_apart(path):
    is_package = path.name == "__init__.py"
    assert forbidden(path.read_text(), module_name(path), is_package) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("il_net.predict", "import sbr_cnn"),
        ("il_net.predict", "from sbr_cnn.config import add_sbr_cnn_config"),
        ("sbr_cnn.schedule", "from il_net import config"),
        ("il_net.data.mapper", "from ..engine import launch"),
        ("il_net.data.mapper", "from .. import evaluation"),
        ("il_net.data.mapper", "def f():\n    from ..modeling.ema import step"),
        ("il_net.modeling.ema", "from ..data.datasets import register_datasets"),
        ("il_net.evaluation.coco", "import il_net.engine.trainer"),
        ("sbr_cnn.loop_heads", "from detectron2.data import MetadataCatalog"),
        ("tools.predict", "from detectron2 import model_zoo"),
        ("train_net", "import detectron2.model_zoo as zoo"),
    ],
)
def test_a_forbidden_import_is_found(module, source):
    assert len(forbidden(source, module)) == 1


def test_relative_imports_of_a_package_file_start_at_the_package():
    # In il_net/data/__init__.py one dot is il_net.data; in il_net/data/x.py as well.
    for module, is_package in (("il_net.data", True), ("il_net.data.x", False)):
        names = imported_modules(ast.parse("from .y import z"), module, is_package)
        assert list(names) == [(1, "il_net.data.y.z")]


def test_a_like_named_package_is_not_confused():
    assert forbidden("import il_net_extra, detectron2.database", "sbr_cnn.schedule") == []


def prints(source: str, allowed: set[str] | None = frozenset()) -> list[int]:
    """Lines that call ``print`` outside the allowed top-level functions."""
    if allowed is None:
        return []
    return [
        node.lineno
        for top in ast.parse(source).body
        if not (isinstance(top, ast.FunctionDef) and top.name in allowed)
        for node in ast.walk(top)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "print"
    ]


def bare_excepts(source: str) -> list[int]:
    return [
        node.lineno
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.ExceptHandler) and node.type is None
    ]


@pytest.mark.parametrize("path", PACKAGE_FILES, ids=lambda p: p.relative_to(REPO).as_posix())
def test_packages_log_instead_of_printing(path):
    name = path.relative_to(REPO).as_posix()
    assert prints(path.read_text(), MAY_PRINT.get(name, frozenset())) == []


@pytest.mark.parametrize("path", ALL_FILES, ids=lambda p: p.relative_to(REPO).as_posix())
def test_no_bare_except(path):
    assert bare_excepts(path.read_text()) == []


def test_prints_and_bare_excepts_are_found():
    source = "def main():\n    print(1)\n\nclass A:\n    def f(self):\n        print(2)\n"
    assert prints(source) == [2, 6]
    assert prints(source, {"main"}) == [6]
    assert prints(source, None) == []
    assert bare_excepts("try:\n    f()\nexcept:\n    pass\n") == [3]
    assert bare_excepts("try:\n    f()\nexcept ValueError:\n    pass\n") == []


def public_functions(
    tree: ast.Module,
) -> Iterator[tuple[str, ast.FunctionDef, ast.ClassDef | None]]:
    """Public functions, methods of public classes, and their constructors."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            yield node.name, node, None
        elif isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            for method in node.body:
                if isinstance(method, ast.FunctionDef) and (
                    not method.name.startswith("_") or method.name == "__init__"
                ):
                    yield f"{node.name}.{method.name}", method, node


def unannotated(source: str) -> list[str]:
    """Public functions with a parameter or a return value without annotation.

    ``self`` and ``cls`` need none; nor do ``*args`` and ``**kwargs`` of a method that hands them
    to its parent, whose signature they are.
    """
    found = []
    for name, function, owner in public_functions(ast.parse(source)):
        arguments = function.args
        named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
        static = any(
            isinstance(d, ast.Name) and d.id == "staticmethod" for d in function.decorator_list
        )
        if owner is not None and not static:
            named = named[1:]
        rest = [a for a in (arguments.vararg, arguments.kwarg) if a is not None]
        if owner is None or not _calls_super(function):
            named += rest
        missing = [a.arg for a in named if a.annotation is None]
        if function.returns is None:
            missing.append("return")
        if missing:
            found.append(f"line {function.lineno}: {name}: {', '.join(missing)}")
    return found


def _calls_super(function: ast.FunctionDef) -> bool:
    return any(isinstance(node, ast.Name) and node.id == "super" for node in ast.walk(function))


def undocumented(source: str) -> list[str]:
    """Public classes and functions without a docstring.

    Constructors are described by their class (``Args:`` of its docstring). A method needs none of
    its own if a base class, or a ``Protocol`` of the same file, documents a method of that name.
    """
    tree = ast.parse(source)
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    documented = {
        name: {m.name for m in node.body if isinstance(m, ast.FunctionDef) and _explains(m)}
        for name, node in classes.items()
    }
    protocols = [name for name, node in classes.items() if "Protocol" in _bases(node)]
    found = [] if ast.get_docstring(tree) or not source.strip() else ["the module"]
    for name, node in classes.items():
        if not name.startswith("_") and not _explains(node):
            found.append(f"line {node.lineno}: {name}")
    for name, function, owner in public_functions(tree):
        if _explains(function) or function.name == "__init__":
            continue
        parents = [*_bases(owner), *protocols] if owner else []
        inherited = any(function.name in documented.get(parent, ()) for parent in parents)
        stub = owner is not None and "Protocol" in _bases(owner)
        if not inherited and not stub:
            found.append(f"line {function.lineno}: {name}")
    return found


def _bases(node: ast.ClassDef) -> list[str]:
    return [ast.unparse(base).split("[")[0].split(".")[-1] for base in node.bases]


def _explains(node: ast.ClassDef | ast.FunctionDef) -> bool:
    return bool((ast.get_docstring(node) or "").strip())


@pytest.mark.parametrize("path", PACKAGE_FILES, ids=lambda p: p.relative_to(REPO).as_posix())
def test_public_signatures_are_annotated(path):
    assert unannotated(path.read_text()) == []


@pytest.mark.parametrize("path", PACKAGE_FILES, ids=lambda p: p.relative_to(REPO).as_posix())
def test_public_names_have_docstrings(path):
    assert undocumented(path.read_text()) == []


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("def f(x: int): ...", ["line 1: f: return"]),
        ("def f(x) -> int: ...", ["line 1: f: x"]),
        ("def f(*, x, **rest) -> int: ...", ["line 1: f: x, rest"]),
        ("def _f(x): ...", []),
        ("class A:\n def m(self) -> int: ...", []),
        ("class A:\n def __init__(self, x) -> None: ...", ["line 2: A.__init__: x"]),
        ("class A:\n @staticmethod\n def m(x) -> int: ...", ["line 3: A.m: x"]),
        ("class A:\n def m(self, **kw) -> None: super().m(**kw)", []),
        ("class A:\n def m(self, **kw) -> None: g(**kw)", ["line 2: A.m: kw"]),
    ],
)
def test_missing_annotations_are_found(source, expected):
    assert unannotated(source) == expected


PARENT = "'m'\nclass P:\n 'p'\n def m(self): 'x'\n"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("x = 1", ["the module"]),
        ("'m'\ndef f(): ...", ["line 2: f"]),
        ("'m'\ndef _f(): ...", []),
        ("'m'\nclass A: ...", ["line 2: A"]),
        ("'m'\nclass A:\n 'a'\n def m(self): ...", ["line 4: A.m"]),
        ("'m'\nclass A:\n 'a'\n def __init__(self): ...", []),
        (PARENT + "class A(P):\n 'a'\n def m(self): ...", []),
        (PARENT + "class A:\n 'a'\n def m(self): ...", ["line 7: A.m"]),
        (PARENT.replace("P:", "P(Protocol):") + "class A:\n 'a'\n def m(self): ...", []),
    ],
)
def test_missing_docstrings_are_found(source, expected):
    assert undocumented(source) == expected
