"""The scanner behind test_layering.py: reads a file's syntax tree and lists what breaks a house rule."""

import ast
import sys
from collections.abc import Iterator
from pathlib import PurePosixPath

ENGINES = {"vllm", "sglang"}
FRONTS = {"vllm": "vllm_model", "sglang": "sglang_model"}
ROOM = "engine_api.py"  # the one file of a front that imports its engine
DOOR = "lfm2_plugin/register.py"  # names engines and fronts, inside functions only
LIGHT = {f"{package}/__init__.py" for package in ("lfm2_plugin", *FRONTS.values())}
LIGHT |= {DOOR, "lfm2_plugin/switch.py", "lfm2_plugin/releases.py"}
FILE_LINES, FUNCTION_LINES = 400, 60
KERNEL_FILES = {"triton.py", "native.py"}
PATCHERS = {"setattr", "delattr", "delitem", "setitem", "object", "patch", "dict"}
SHOWS_A_FAULT = "# shows a fault"  # in tests only: a patched engine that demonstrates its own bug


def violations(path: str, source: str) -> list[str]:
    """Everything in a file that breaks a rule, as ``path:line: text``, in the order of the lines.

    Args:
        path: relative to the repository, with forward slashes; it decides which rules hold.
        source: the file's text.
    """
    tree = ast.parse(source)
    found = [
        *_imports(path, tree),
        *_heavy_imports(path, tree),
        *_patches(path, tree, source.splitlines()),
        *_version_comparisons(path, tree),
        *_lengths(path, tree, source),
    ]
    return [f"{path}:{line}: {text}" for line, text in sorted(found)]


def imported_modules(tree: ast.AST) -> Iterator[tuple[ast.AST, str]]:
    """Every absolute module that a tree imports, by statement or by ``import_module("...")``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node, node.module
        elif isinstance(node, ast.Call) and _name(node.func) in ("import_module", "__import__"):
            for argument in node.args[:1]:
                if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                    yield node, argument.value


def _imports(path: str, tree: ast.AST) -> Iterator[tuple[int, str]]:
    package, file = path.split("/")[0], PurePosixPath(path).name
    outside_functions = {id(node) for node in _top_level(tree)}
    for node, module in imported_modules(tree):
        root = module.split(".")[0]
        if package == "lfm2_plugin" and root in {*ENGINES, *FRONTS.values()}:
            if path != DOOR:
                yield node.lineno, f"the core imports {module}"
            elif id(node) in outside_functions:
                yield node.lineno, f"{DOOR} imports {module} outside a function"
        for engine, front in FRONTS.items():
            other = {*ENGINES, *FRONTS.values()} - {engine, front}
            if package == front and root in other:
                yield node.lineno, f"{front} imports {module}"
            if package == front and root == engine and file != ROOM:
                yield node.lineno, f"{module} is imported outside {front}/{ROOM}"


def _heavy_imports(path: str, tree: ast.Module) -> Iterator[tuple[int, str]]:
    if path not in LIGHT:
        return
    allowed = {*sys.stdlib_module_names, "lfm2_plugin"}
    top = {id(node) for node in _top_level(tree)}
    for node, module in imported_modules(tree):
        if id(node) in top and module.split(".")[0] not in allowed:
            yield node.lineno, f"{path} imports {module}; only the standard library may be"


def _patches(path: str, tree: ast.AST, lines: list[str]) -> Iterator[tuple[int, str]]:
    """Assignments to attributes of what was imported from an engine, in every spelling."""
    engine_names = _engine_names(tree)
    for node in ast.walk(tree):
        targets: list[ast.expr] = []
        if isinstance(node, ast.Assign | ast.Delete):
            targets = list(node.targets)
        elif isinstance(node, ast.AugAssign | ast.AnnAssign):
            targets = [node.target]
        elif isinstance(node, ast.Call) and _name(node.func) in PATCHERS and node.args:
            targets = [node.args[0]]
        for target in targets:
            if _patched(target, engine_names, call=isinstance(node, ast.Call)):
                if path.startswith("tests/") and SHOWS_A_FAULT in lines[node.lineno - 1]:
                    continue
                yield node.lineno, f"patches an engine: {ast.unparse(target)}"


def _patched(target: ast.expr, engine_names: set[str], call: bool) -> bool:
    if call and isinstance(target, ast.Constant) and isinstance(target.value, str):
        return target.value.split(".")[0] in ENGINES and "." in target.value
    if isinstance(target, ast.Tuple | ast.List):
        return any(_patched(element, engine_names, call) for element in target.elts)
    if not call and not isinstance(target, ast.Attribute | ast.Subscript):
        return False  # binding a bare name changes nothing of the engine's
    while isinstance(target, ast.Attribute | ast.Subscript):
        target = target.value
    return isinstance(target, ast.Name) and target.id in engine_names


def _engine_names(tree: ast.AST) -> set[str]:
    """Names that a file binds to an engine's modules, classes and functions."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] in ENGINES:
                    names.add(alias.asname or alias.name.split(".")[0])
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            from_room = module.split(".")[-1] == ROOM.removesuffix(".py")
            if from_room or (node.level == 0 and module.split(".")[0] in ENGINES):
                names |= {alias.asname or alias.name for alias in node.names}
    return names


def _version_comparisons(path: str, tree: ast.AST) -> Iterator[tuple[int, str]]:
    package = path.split("/")[0]
    if package not in {"lfm2_plugin", *FRONTS.values()} or PurePosixPath(path).name == ROOM:
        return
    words = {"__version__", "__version_tuple__", "Version", "parse_version", "version"}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Compare):
            continue
        if all(isinstance(op, ast.Is | ast.IsNot) for op in node.ops):
            continue
        for part in ast.walk(node):
            named = isinstance(part, ast.Attribute | ast.Name) and _name(part) in words - {
                "version"
            }
            called = isinstance(part, ast.Call) and _name(part.func) in words
            if named or called:
                yield node.lineno, f"compares versions: {ast.unparse(node)}"
                break


def _lengths(path: str, tree: ast.AST, source: str) -> Iterator[tuple[int, str]]:
    lines = source.count("\n") + 1
    if lines > FILE_LINES + 1:
        yield 1, f"{lines - 1} lines, more than {FILE_LINES}"
    if PurePosixPath(path).name in KERNEL_FILES:
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0]
            has_docstring = ast.get_docstring(node) is not None
            docstring = (first.end_lineno or 0) - first.lineno + 1 if has_docstring else 0
            length = (node.end_lineno or 0) - node.lineno + 1 - docstring
            if length > FUNCTION_LINES:
                yield node.lineno, f"{node.name}() has {length} lines, more than {FUNCTION_LINES}"


def _top_level(tree: ast.AST) -> Iterator[ast.AST]:
    """The nodes that run at import: everything outside function bodies."""
    for child in ast.iter_child_nodes(tree):
        yield child
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from _top_level(child)


def _name(node: ast.expr) -> str:
    """``f`` of ``f``, ``c`` of ``a.b.c``, empty for anything else."""
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""
