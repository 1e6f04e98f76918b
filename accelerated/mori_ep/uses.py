"""Uses of MoRI in this package, read from its syntax trees.

Scope: attributes and calls of the library's modules, classes and objects, with their arguments and the results that are
taken apart; environment variables and compiled files that are named; source lines that texts cite. A value is known to
be the library's by the name it goes by in this package (:data:`ROOTS`) and by where it was assigned from. Where a
library object goes where it could not be followed, or arguments cannot be read off, :class:`UnclearUse` is raised
rather than a use missed. What this does not see: what a tensor that the library returned is used for.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

OPERATOR = "mori.ops:EpDispatchCombineOp"
HANDLE = "mori.ops.dispatch_combine:EpDispatchRoutingHandle"
LIBRARY = "library"

#: Names that stand for a library object wherever they appear in the package: variable, parameter or attribute.
ROOTS = {
    "library": LIBRARY,
    "_library": LIBRARY,
    "op": OPERATOR,
    "_op": OPERATOR,
    "routing": HANDLE,
    "_routing": HANDLE,
}
#: Fields of :class:`accelerated.mori_ep.library.MoriLibrary` that are the library's.
PARTS = {"ops": "mori.ops", "shmem": "mori.shmem", "detect_gpu_arch": "mori.jit.config:detect_gpu_arch"}
#: Classes whose instances are followed, by what makes them.
_MADE = {OPERATOR: OPERATOR}
#: Methods whose result is a tuple, so that what is taken from it is a use by position. The result, or what is left of
#: it from a position on, is followed as ``symbol[position:]``.
_TUPLES = (f"{OPERATOR}.dispatch", f"{OPERATOR}.combine")

_VARIABLE = re.compile(r"MORI_[A-Z0-9_]+")
_FILE = re.compile(r"libmori_\w+\.so|amd[_-]mori[\w-]*")
_RESULT = re.compile(r"(.+)\[(\d+):\]")
_CITATION = re.compile(r"(?<![\w/.])([\w/]+\.(?:py|hpp|cpp|hip)):(\d+(?:(?:[,-]|\s+and\s+)\d+)*)")


#: Keys of a dictionary with the module and line of each; None where they are not known.
_Keys = dict[str, tuple[str, int]] | None


class UnclearUse(ValueError):
    """The package does something with the library that cannot be read off. The message says where, and the fix."""


@dataclass(frozen=True)
class Use:
    """One place where the package uses a name of the library.

    Attributes:
        symbol: ``module:path`` of the library, ``environment NAME``, ``file NAME`` or ``cited FILE:LINE``.
        detail: name of an argument, ``[i]`` for a result, or "".
        module: file of the package.
        line: line in it.
    """

    symbol: str
    detail: str
    module: str
    line: int

    @property
    def argument(self) -> bool:
        """Whether the use is of an argument."""
        return bool(self.detail) and not self.detail.startswith("[")


def collect(sources: Mapping[str, str], parameters: Mapping[str, Sequence[str]]) -> list[Use]:
    """Uses in ``sources`` (text by file name), in order.

    Args:
        sources: modules of the package.
        parameters: names of the parameters of the library's callables, by which positions become names.

    Raises:
        UnclearUse: a library object, or the arguments of a call of the library, could not be followed.
    """
    trees = {name: ast.parse(text) for name, text in sources.items()}
    functions = _functions(trees)
    found: list[Use] = []
    for name, tree in trees.items():
        reader = _Reader(name, parameters, functions)
        reader.block(tree.body)
        found.extend(reader.uses)
        found.extend(_citations(name, sources[name]))
    return found


def _citations(module: str, text: str) -> Iterator[Use]:
    for matched in _CITATION.finditer(text):
        line = text.count("\n", 0, matched.start()) + 1
        for lines in re.findall(r"\d+(?:-\d+)?", matched[2]):
            yield Use(f"cited {matched[1]}:{lines}", "", module, line)


def _functions(trees: Mapping[str, ast.Module]) -> dict[str, tuple[str, ast.FunctionDef]]:
    """Module and tree of functions by name, and of constructors by that of their class."""
    found: dict[str, tuple[str, ast.FunctionDef]] = {}
    for module, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and node.name != "__init__":
                found[node.name] = module, node
            elif isinstance(node, ast.ClassDef):
                makers = [part for part in node.body if isinstance(part, ast.FunctionDef) and part.name == "__init__"]
                found.update((node.name, (module, maker)) for maker in makers)
    return found


class _Reader:
    """Reads one module, statement by statement."""

    def __init__(
        self,
        module: str,
        parameters: Mapping[str, Sequence[str]],
        functions: Mapping[str, tuple[str, ast.FunctionDef]],
    ) -> None:
        self.uses: list[Use] = []
        self._module, self._parameters, self._functions = module, parameters, functions
        self._names: dict[str, str] = {}
        self._keys: dict[str, _Keys] = {}

    def block(self, body: Sequence[ast.stmt]) -> None:
        """Read statements in order."""
        for statement in body:
            self._statement(statement)

    def _statement(self, node: ast.stmt) -> None:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            if any(name.partition(".")[0] == "mori" for name in names):
                raise self._unclear(node, "imports MoRI", "import it with importlib, as library.py does")
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            self._signature(node)
            outer = self._names, self._keys
            self._names, self._keys = dict(self._names), {}
            self.block(node.body)
            self._names, self._keys = outer
        elif isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value is not None:
            self._assign(node.targets if isinstance(node, ast.Assign) else [node.target], node.value)
        elif isinstance(node, ast.Expr):
            self._value(node.value)  # dropped, so it goes nowhere
        elif isinstance(node, (ast.If, ast.While)):
            self._value(node.test)
            self.block([*node.body, *node.orelse])
        else:
            for child in ast.iter_child_nodes(node):
                self._child(child)

    def _signature(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        """Decorators, which are called, and defaults, which go to their parameters."""
        for decorator in node.decorator_list:
            self._value(decorator)
        places, named = [*node.args.posonlyargs, *node.args.args], node.args.kwonlyargs
        defaults = zip(places[len(places) - len(node.args.defaults) :], node.args.defaults, strict=True)
        for parameter, default in (*defaults, *zip(named, node.args.kw_defaults, strict=True)):
            if default is not None:
                self._no_escape(default, ROOTS.get(parameter.arg, ""))

    def _child(self, node: ast.AST) -> None:
        if isinstance(node, ast.stmt):
            self._statement(node)
        elif isinstance(node, ast.expr):
            self._no_escape(node)
        else:
            for child in ast.iter_child_nodes(node):
                self._child(child)

    def _assign(self, targets: Sequence[ast.expr], value: ast.expr) -> None:
        kind = self._value(value)
        for target in targets:
            name = _named(target.value if isinstance(target, ast.Subscript) else target)
            if isinstance(target, ast.Name):
                self._names.pop(target.id, None)
                self._keys[target.id] = self._spread(value, self._module)
                if kind:
                    self._names[target.id] = kind
            elif isinstance(target, ast.Subscript) and isinstance(target.slice, ast.Constant) and name:
                self._value(target.slice)
                if (keys := self._keys.get(name)) is not None:
                    keys[str(target.slice.value)] = self._module, target.lineno
                if kind and ROOTS.get(str(target.slice.value)) != kind:
                    raise self._unclear(value, f"puts {kind} under {target.slice.value!r}", "use a name of ROOTS")
            elif isinstance(target, ast.Tuple):
                self._take(target, kind)
            elif kind and ROOTS.get(name) != kind:
                raise self._unclear(value, f"stores {kind} as {name or 'something'}", "use a name of ROOTS")

    def _take(self, target: ast.Tuple, kind: str) -> None:
        """Names for parts of a value; of a result, each is a use by position, and the rest may be taken last."""
        result = _RESULT.fullmatch(kind)
        if kind and not result:
            raise self._unclear(target, f"takes {kind} apart", "use it where it is")
        for index, part in enumerate(target.elts):
            starred = isinstance(part, ast.Starred)
            named = part.value if isinstance(part, ast.Starred) else part
            if isinstance(named, ast.Name):
                self._names.pop(named.id, None)
                self._keys.pop(named.id, None)
            if result is None:
                continue
            position = int(result[2]) + index
            if not starred:
                self._use(result[1], target, f"[{position}]")
            elif index + 1 < len(target.elts) or not isinstance(named, ast.Name):
                raise self._unclear(target, f"takes the middle of {kind}", "name each, or the last ones as a rest")
            else:
                self._names[named.id] = f"{result[1]}[{position}:]"

    def _no_escape(self, node: ast.expr, allowed: str = "") -> str:
        """Read an expression whose value must be no library object but one of the kind ``allowed``."""
        kind = self._value(node)
        if kind and kind != allowed:
            raise self._unclear(node, f"hands {kind} on", "use it where it is, or under a name of ROOTS")
        return kind

    def _value(self, node: ast.expr) -> str:
        """Read an expression; symbol of the library that it is, or ""."""
        if isinstance(node, ast.Constant):
            self._constant(node)
            return ""
        if isinstance(node, ast.Name):
            return self._peek(node)
        if isinstance(node, ast.Attribute):
            return self._attribute(self._value(node.value), node.attr, node)
        if isinstance(node, ast.Call):
            return self._call(node)
        if isinstance(node, ast.Subscript):
            return self._item(node)
        if isinstance(node, ast.IfExp):
            self._value(node.test)
            kinds = [self._value(node.body), self._value(node.orelse)]
            return next((kind for kind in kinds if kind), "")
        if isinstance(node, (ast.Compare, ast.BoolOp, ast.UnaryOp)):
            kinds = [self._value(child) for child in ast.iter_child_nodes(node) if isinstance(child, ast.expr)]
            return next((kind for kind in kinds if kind), "") if isinstance(node, ast.BoolOp) else ""
        if isinstance(node, ast.NamedExpr):
            self._assign([node.target], node.value)
            return self._peek(node.target)
        if isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                self._no_escape(value, ROOTS.get(str(key.value), "") if isinstance(key, ast.Constant) else "")
            return ""
        for child in ast.iter_child_nodes(node):
            self._child(child)
        return ""

    def _item(self, node: ast.Subscript) -> str:
        """Read what is taken by an index: of a result, that position."""
        kind = self._value(node.value)
        result = _RESULT.fullmatch(kind)
        self._no_escape(node.slice)
        if result and isinstance(node.slice, ast.Constant) and type(node.slice.value) is int:
            self._use(result[1], node, f"[{int(result[2]) + node.slice.value}]")
        elif kind:
            raise self._unclear(node, f"takes something of {kind}", "take each result by its position")
        return ""

    def _constant(self, node: ast.Constant) -> None:
        text = node.value if isinstance(node.value, str) else ""
        if _VARIABLE.fullmatch(text):
            self._use(f"environment {text}", node)
        elif _FILE.fullmatch(text):
            self._use(f"file {text}", node)

    def _peek(self, node: ast.expr) -> str:
        """Symbol of a name or attribute without counting a use."""
        if isinstance(node, ast.Name):
            return self._names.get(node.id) or ROOTS.get(node.id, "")
        return self._member(self._peek(node.value), node.attr) if isinstance(node, ast.Attribute) else ""

    @staticmethod
    def _member(owner: str, name: str) -> str:
        if owner == LIBRARY:
            return PARTS.get(name, "")
        if owner:
            return f"{owner}.{name}" if ":" in owner else f"{owner}:{name}"
        return ROOTS.get(name, "")

    def _attribute(self, owner: str, name: str, node: ast.expr) -> str:
        if _RESULT.fullmatch(owner):
            raise self._unclear(node, f"takes {name} of {owner}", "take each result by its position")
        symbol = self._member(owner, name)
        if owner and ":" in symbol:
            self._use(symbol, node)
            # What an object of the library holds or returns is a tensor or a number; only callables are followed.
            return symbol if symbol in self._parameters or owner.count(":") == 0 else ""
        return symbol

    def _call(self, node: ast.Call) -> str:
        name = _named(node.func)
        first = node.args[0] if node.args else None
        if name == "import_module" and isinstance(first, ast.Constant) and str(first.value).split(".")[0] == "mori":
            self._use(str(first.value), node)
            return str(first.value)
        if name in ("getattr", "hasattr") and first is not None and (owner := self._value(first)):
            for rest in node.args[1:]:
                self._value(rest)
            chosen = node.args[1]
            if isinstance(chosen, ast.Constant):
                self._attribute(owner, str(chosen.value), node)
            else:
                self._use(owner, node, "[member]")
            return ""
        symbol = self._value(node.func)
        if not symbol:
            return self._foreign(node, name)
        self.uses.extend(self._arguments(node, symbol))
        for value in (*node.args, *(keyword.value for keyword in node.keywords)):
            self._no_escape(value, HANDLE)
        return f"{symbol}[0:]" if symbol in _TUPLES else _MADE.get(symbol, "")

    def _foreign(self, node: ast.Call, name: str) -> str:
        """A call of something that is not the library's: a library object may go to a parameter of ROOTS only."""
        called = self._functions[name][1] if name in self._functions else None
        names = [argument.arg for argument in called.args.args if argument.arg != "self"] if called else []
        for index, value in enumerate(node.args):
            self._no_escape(value, ROOTS.get(names[index], "") if index < len(names) else "")
        for keyword in node.keywords:
            given = keyword.arg or ""
            self._no_escape(keyword.value, PARTS.get(given, "") or ROOTS.get(given, ""))
        return ""

    def _arguments(self, node: ast.Call, symbol: str) -> Iterator[Use]:
        names = self._parameters.get(symbol)
        if names is None and (node.args or node.keywords):
            raise self._unclear(node, f"calls {symbol}, whose parameters are not recorded", "record its signature")
        for index, value in enumerate(node.args):
            if isinstance(value, ast.Starred) or index >= len(names or ()):
                raise self._unclear(node, f"gives {symbol} positions that it lacks or hides", "name the arguments")
            yield Use(symbol, (names or ())[index], self._module, node.lineno)
        for keyword in node.keywords:
            if keyword.arg is not None:
                yield Use(symbol, keyword.arg, self._module, node.lineno)
                continue
            keys = self._spread(keyword.value, self._module)
            if keys is None:
                raise self._unclear(node, f"spreads arguments of {symbol}", "spread a dictionary with constant keys")
            yield from (Use(symbol, name, *where) for name, where in keys.items())

    def _spread(self, node: ast.expr, module: str) -> _Keys:
        """Keys of a dictionary in ``module`` and where they are; None if they cannot be read off."""
        if isinstance(node, ast.Dict):
            keys = {str(key.value): (module, key.lineno) for key in node.keys if isinstance(key, ast.Constant)}
            return keys if len(keys) == len(node.keys) else None
        if isinstance(node, ast.IfExp):
            chosen, other = self._spread(node.body, module), self._spread(node.orelse, module)
            return None if chosen is None or other is None else {**chosen, **other}
        if isinstance(node, ast.Name):
            return self._keys.get(node.id)
        if isinstance(node, ast.Call) and _named(node.func) in self._functions:
            home, called = self._functions[_named(node.func)]
            returned = [part.value for part in ast.walk(called) if isinstance(part, ast.Return) and part.value]
            return self._spread(returned[0], home) if len(returned) == 1 and isinstance(returned[0], ast.Dict) else None
        return None

    def _use(self, symbol: str, node: ast.expr, detail: str = "") -> None:
        self.uses.append(Use(symbol, detail, self._module, node.lineno))

    def _unclear(self, node: ast.AST, what: str, fix: str) -> UnclearUse:
        return UnclearUse(f"{self._module}:{getattr(node, 'lineno', 0)} {what}, which cannot be followed; {fix}")


def _named(node: ast.expr) -> str:
    """Last name of a name or attribute."""
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""
