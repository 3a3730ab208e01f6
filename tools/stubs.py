"""Write the stubs (*.pyi) by which editors and mypy know the names of `import basd`: after any change of a public name, of its
arguments, or of a class that it takes or returns.

    python tools/stubs.py

They are read off the imported package, since methods that are added by `@patch` and names that are imported on their first use
are not in the text of one file. A type outside of the stubbed modules, torch and the standard library is `Any`.
"""
import ast
import dataclasses
import importlib
import inspect
import sys
import textwrap
from collections import defaultdict
from pathlib import Path
from types import GenericAlias, NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import torch
from torch import nn

import basd

FOLDER = Path(basd.__file__).parent
STUBBED = ["core.features", "core.registry", "models.taps", "models.teachers", "runs.recipes", "training.task"]
BARE = {dict: "dict[str, Any]", list: "list[Any]", tuple: "tuple[Any, ...]", set: "set[Any]", type: "type[Any]"}
RETURNED = {"__len__": "int", "__contains__": "bool"}
SPECIAL = [*RETURNED, "__iter__", "__getitem__"]
HEAD = "# Written by tools/stubs.py. Do not edit.\n"


class Stub:
    "The text of one stub: definitions are added, and what they name is imported"
    def __init__(self, module): self.module, self.imports, self.lines = module, defaultdict(set), []

    def name(self, module, name):
        if module != self.module: self.imports[module].add(name)
        return name

    def any(self): return self.name("typing", "Any")

    def type(self, t):
        "The type `t` as text"
        origin, args = get_origin(t), get_args(t)
        if t in (None, NoneType): return "None"
        if origin in (Union, UnionType): return " | ".join(dict.fromkeys(map(self.type, args)))
        if origin is Annotated: return self.type(args[0])
        if origin is Literal: return f"{self.name('typing', 'Literal')}[{', '.join(map(repr, args))}]"
        if isinstance(t, GenericAlias) and origin in BARE:
            return f"{origin.__name__}[{', '.join('...' if a is ... else self.type(a) for a in args)}]"
        if t in BARE: self.any(); return BARE[t]
        if not isinstance(t, type) or "<locals>" in t.__qualname__: return self.any()
        if t is torch.Tensor: return self.name("torch", "Tensor")
        if t.__module__ == "builtins": return t.__name__
        if issubclass(t, nn.Module) and getattr(nn, t.__name__, None) is t: self.name("torch", "nn"); return f"nn.{t.__name__}"
        ours = t.__module__.removeprefix("basd.")
        if ours in STUBBED or t.__module__.split(".")[0] in sys.stdlib_module_names: return self.name(t.__module__, t.__name__)
        return self.any()

    def parameter(self, p):
        kind = {p.VAR_POSITIONAL: "*", p.VAR_KEYWORD: "**"}.get(p.kind, "")
        t = self.type(p.annotation) if p.annotation is not p.empty else self.any()
        if p.default is None and t != "Any" and "None" not in t.split(" | "): t += " | None"
        plain = p.default is None or isinstance(p.default, (bool, int, float, str))
        return f"{kind}{p.name}: {t}" + ("" if p.default is p.empty else f" = {p.default!r}" if plain else " = ...")

    def parameters(self, f, of=None):
        seen, out = set(), []
        for i,p in enumerate(inspect.signature(f).parameters.values()):
            if of is not None and i == 0: out.append(p.name); continue
            if p.kind == p.KEYWORD_ONLY and not seen & {p.KEYWORD_ONLY, p.VAR_POSITIONAL}: out.append("*")
            seen.add(p.kind)
            out.append(self.parameter(p))
        return ", ".join(out)

    def returned(self, f, of=None):
        t = inspect.signature(f).return_annotation
        inner = inspect.unwrap(f)
        if inspect.isgeneratorfunction(inner) and inner is not f:       # a context manager
            return f"{self.name('contextlib', 'AbstractContextManager')}[{self.type(*get_args(t) or [object()])}]"
        if t is not inspect.Signature.empty: return self.type(t)
        found = [n.value for n in ast.walk(tree(inner)) if isinstance(n, (ast.Return, ast.Yield)) and n.value is not None]
        if of and found and all(isinstance(v, ast.Name) and v.id == "self" for v in found): return of.__name__
        return RETURNED.get(inner.__name__) or (self.any() if found else "None")

    def function(self, name, f, indent="", of=None):
        self.lines.append(f"{indent}def {name}({self.parameters(f, of)}) -> {self.returned(f, of)}: ...")

    def class_(self, c):
        bases = [b for b in c.__bases__ if b is not object]
        if fields := getattr(c, "_fields", None):
            self.lines.append(f"class {c.__name__}({self.name('typing', 'NamedTuple')}):")
            self.lines += [f"    {n}: {self.type(c.__annotations__[n])}" + " = ..."*(n in c._field_defaults) for n in fields]
        elif dataclasses.is_dataclass(c):
            self.lines += [f"@{self.name('dataclasses', 'dataclass')}", f"class {c.__name__}:"]
            for f in dataclasses.fields(c):
                free = f.default is f.default_factory is dataclasses.MISSING
                value = "" if free and f.init else " = ..." if f.init else f" = {self.name('dataclasses', 'field')}(init=False)"
                self.lines.append(f"    {f.name}: {self.type(f.type)}{value}")
        else:
            self.lines.append(f"class {c.__name__}({', '.join(map(self.type, bases))}):" if bases else f"class {c.__name__}:")
            self.lines += [f"    {n}: {t}" for n,t in attributes(c, self).items()]
        for n,f in vars(c).items():
            if n.startswith("_") and n not in SPECIAL and (n != "__init__" or dataclasses.is_dataclass(c)): continue
            if isinstance(f, property): self.lines += ["    @property", f"    def {n}(self) -> {self.returned(f.fget)}: ..."]
            elif isinstance(f, (staticmethod, classmethod)):
                if fields: continue
                self.lines.append(f"    @{type(f).__name__}")
                self.function(n, f.__func__, "    ", c if isinstance(f, classmethod) else None)
            elif inspect.isfunction(f):
                self.function(n, f, "    ", c)
                if n == "forward": self.function("__call__", f, "    ", c)
        if self.lines[-1].endswith(f"{c.__name__}:") or self.lines[-1].startswith("class"): self.lines[-1] += " ..."

    def text(self):
        lines = [f"from {m} import {', '.join(sorted(names))}" for m,names in sorted(self.imports.items())]
        inherits = any(l.endswith("(nn.Module):") for l in self.lines)
        return "\n".join([HEAD + "# mypy: disable-error-code=override\n"*inherits, *lines, "", *self.lines]) + "\n"


def tree(f): return ast.parse(textwrap.dedent(inspect.getsource(f)))


def attributes(c, stub):
    "name → type of what `__init__` assigns: that of the parameter of this name, or of the constant, or Any"
    if "__init__" not in vars(c): return {}
    given = {n: p.annotation for n,p in inspect.signature(c.__init__).parameters.items() if p.annotation is not p.empty}
    found = {}
    for n in (n for n in ast.walk(tree(c.__init__)) if isinstance(n, ast.Assign)):
        for t in [e for t in n.targets for e in (t.elts if isinstance(t, ast.Tuple) else [t])]:
            if isinstance(t, ast.Attribute) and getattr(t.value, "id", "") == "self" and not t.attr.startswith("_"):
                constant = t in n.targets and getattr(n.value, "value", None)
                found[t.attr] = (stub.type(given[t.attr]) if t.attr in given
                                 else type(constant).__name__ if isinstance(constant, (int, str)) and constant is not False else stub.any())
    return found


def module_stub(name):
    "Text of the stub of `basd.name`"
    module = importlib.import_module(f"basd.{name}")
    stub = Stub(module.__name__)
    for n in module.__all__:
        o = getattr(module, n)
        if inspect.isclass(o): stub.class_(o)
        elif inspect.isfunction(inspect.unwrap(o)): stub.function(n, o)
        else: stub.lines.append(f"{n}: {stub.type(type(o))}")
    stub.lines.append(f"def __getattr__(name: str) -> {stub.any()}: ...     # the others are not public")
    return stub.text()


def face_stub():
    "Text of the stub of `import basd`"
    stub = Stub("basd")
    for n in basd.__all__:
        o = getattr(basd, n)
        if inspect.isclass(o): stub.imports[o.__module__].add(f"{n} as {n}")
        elif inspect.isfunction(inspect.unwrap(o)): stub.function(n, o)
        else: stub.lines.append(f"{n}: {stub.type(type(o))}")
    stub.lines += ["__version__: str", f"__all__ = {basd.__all__}"]
    return stub.text()


def stubs():
    "file → its text"
    return {FOLDER/"__init__.pyi": face_stub(), **{FOLDER/f"{n.replace('.', '/')}.pyi": module_stub(n) for n in STUBBED}}


if __name__ == "__main__":
    for path, text in stubs().items(): path.write_text(text, encoding="utf-8")
