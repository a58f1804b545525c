"""`_core.pyi` is checked against the module that was built: the same names, the same parameters, both ways round."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

from llama1m_ext import _core

STUB = Path(_core.__file__).with_name("_core.pyi")


def described(node: ast.FunctionDef) -> list[tuple[str, str, bool]]:
    """(name, kind, has a default) of each parameter of a function in the stub."""
    args = node.args
    plain = [*args.posonlyargs, *args.args]
    missing = len(plain) - len(args.defaults)
    found = []
    for index, arg in enumerate(plain):
        kind = "POSITIONAL_ONLY" if index < len(args.posonlyargs) else "POSITIONAL_OR_KEYWORD"
        found.append((arg.arg, kind, index >= missing))
    if args.vararg:
        found.append((args.vararg.arg, "VAR_POSITIONAL", False))
    found += [
        (arg.arg, "KEYWORD_ONLY", default is not None)
        for arg, default in zip(args.kwonlyargs, args.kw_defaults, strict=True)
    ]
    if args.kwarg:
        found.append((args.kwarg.arg, "VAR_KEYWORD", False))
    return found


def built(function: object) -> list[tuple[str, str, bool]]:
    """The same of a function in the module, as its text signature says."""
    parameters = inspect.signature(function).parameters.values()
    return [(p.name, p.kind.name, p.default is not p.empty) for p in parameters]


def public(names: list[str]) -> set[str]:
    return {name for name in names if not name.startswith("_") or name == "__version__"}


def stub_names() -> dict[str, ast.AST]:
    found: dict[str, ast.AST] = {}
    for node in ast.parse(STUB.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found[node.name] = node
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found[node.target.id] = node
    return found


def test_the_stub_and_the_module_have_the_same_names():
    assert public(list(stub_names())) == public(dir(_core))


def test_every_function_has_the_stub_s_parameters():
    functions = {name: node for name, node in stub_names().items() if isinstance(node, ast.FunctionDef)}
    assert {"isa", "isa_levels", "peak_flops", "read_seconds"} <= set(functions)
    for name, node in functions.items():
        assert described(node) == built(getattr(_core, name)), name


def test_every_class_has_the_stub_s_methods():
    for name, node in stub_names().items():
        if not isinstance(node, ast.ClassDef) or node.name.endswith("Error") or name.startswith("_"):
            continue
        ours = getattr(_core, name)
        methods = {inner.name: inner for inner in node.body if isinstance(inner, ast.FunctionDef)}
        assert public(list(methods)) == public(list(vars(ours))), name
        for method, inner in methods.items():
            if not method.startswith("_") and not inner.decorator_list:
                assert described(inner) == built(getattr(ours, method)), f"{name}.{method}"


def test_every_function_and_class_says_what_it_does():
    for name in public(dir(_core)) - {"__version__"}:
        assert (getattr(_core, name).__doc__ or "").strip(), name


def test_a_wrong_stub_would_be_seen():
    node = ast.parse("def f(a, /, b: int, c=1, *rest, d, e=2, **more): ...").body[0]
    assert isinstance(node, ast.FunctionDef)

    def f(a, /, b, c=1, *rest, d, e=2, **more): ...

    def g(a, b, c, *rest, d, e, **more): ...

    assert described(node) == built(f) != built(g)
