"""House rules that a machine can hold: layout, docstrings, lengths, names, sleeps, marks of unfinished work.

Every rule is a plain function from text to problems, `file:line: what and why`, so that the second half of
this file can feed each rule a bad sample: a rule that cannot fail is not a rule. Generated code is exempt.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
import tomllib
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCE_ROOTS = ("operator", "node_agent", "gateway", "cli")
PACKAGES = {"layercast_operator", "layercast_agent", "layercast_gateway", "layercast_cli"}
NOT_PACKAGES = (*SOURCE_ROOTS, "proto", "proto/gen", "tests", "bench", "tools")
FUNCTION_LINES_MAX = 60
FILE_LINES_MAX = 400
NESTING_MAX = 3
ADR_LINES_MAX = 70
DOCSTRING_WORDS_MIN = 4

# A module or class is named for what it is about; these words are about nothing.
BANNED_WORDS = frozenset({"utils", "util", "helpers", "helper", "common", "manager", "base", "misc"})

# Tests that may sleep, each with the reason why no event can be awaited there.
SLEEPS_ALLOWED: dict[str, str] = {
    "tests/worker/conftest.py": "polls the status of a worker process, whose service has no call that waits",
    "tests/worker/inprocess.py": "looks at a replica as its status does; nothing tells of every change of it",
    "tests/worker/test_fault_runs.py": "a fault comes at a moment that is drawn, whatever happens then",
    "tests/cluster/operator_world.py": "keeps nodes alive that have no kubelet, and asks an API server again",
    "tests/cluster/test_operator_kubernetes.py": "asks an API server again: what it waits for is another process's",
}

Problems = list[str]


def is_package(folder: Path) -> Problems:
    """A source root that is a package shadows others: operator/__init__.py hides the standard library's."""
    stray = folder / "__init__.py"
    return [f"{stray}:1: source roots and tests are no packages, remove it"] if stray.exists() else []


def no_docstring(path: str, tree: ast.Module, source: str) -> Problems:
    """A file opens by saying why it exists; repeating its name says nothing."""
    words = re.findall(r"[A-Za-z]{2,}", ast.get_docstring(tree) or "")
    if not source.strip():
        return [f"{path}:1: empty module; a docstring says why it exists"]
    if len(words) < DOCSTRING_WORDS_MIN:
        return [f"{path}:1: the module's docstring does not say why it exists"]
    return []


def too_long(path: str, tree: ast.Module, source: str) -> Problems:
    """A file and a function are small enough to hold in the head."""
    problems = []
    if (lines := len(source.splitlines())) > FILE_LINES_MAX:
        problems.append(f"{path}:1: {lines} lines in a file, at most {FILE_LINES_MAX}")
    for function in _functions(tree):
        if (lines := (function.end_lineno or 0) - function.lineno + 1) > FUNCTION_LINES_MAX:
            where = f"{path}:{function.lineno}"
            problems.append(f"{where}: {function.name} has {lines} lines, at most {FUNCTION_LINES_MAX}")
    return problems


def too_deep(path: str, tree: ast.Module, source: str) -> Problems:
    """Choices and loops nest at most three deep; `with` is no choice and does not count."""
    problems = []
    for function in _functions(tree):
        depth = max((_depth(statement) for statement in function.body), default=0)
        if depth > NESTING_MAX:
            where = f"{path}:{function.lineno}"
            problems.append(f"{where}: {function.name} nests {depth} deep, at most {NESTING_MAX}")
    return problems


def has_global(path: str, tree: ast.Module, source: str) -> Problems:
    """State has an owner that is passed in."""
    found = (node for node in ast.walk(tree) if isinstance(node, ast.Global))
    return [f"{path}:{node.lineno}: `global {', '.join(node.names)}`; pass it in" for node in found]


def banned_name(path: str, tree: ast.Module, source: str) -> Problems:
    """Modules, folders and classes are named by the field's words."""
    problems = []
    for part in Path(path).with_suffix("").parts:
        if bad := _banned(part):
            problems.append(f"{path}:1: `{bad}` in a module's name says nothing about it")
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and (bad := _banned(node.name)):
            problems.append(f"{path}:{node.lineno}: `{bad}` in class {node.name} says nothing about it")
    return problems


def stub(path: str, tree: ast.Module, source: str) -> Problems:
    """Nothing is committed half done: no marks of unfinished work, no bodies that only refuse."""
    comments = [
        t for t in tokenize.generate_tokens(io.StringIO(source).readline) if t.type == tokenize.COMMENT
    ]
    problems = [
        f"{path}:{comment.start[0]}: {found.group()} in a comment; open an issue instead"
        for comment in comments
        if (found := _UNFINISHED.search(comment.string))
    ]
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and "NotImplementedError" in ast.unparse(node):
            problems.append(f"{path}:{node.lineno}: a stub; build it or leave it out")
    return problems


def sleeps(path: str, tree: ast.Module, source: str) -> Problems:
    """A test waits for an event with a deadline; a sleep is too long or too short, never right."""
    if path in SLEEPS_ALLOWED or not path.startswith("tests/"):
        return []
    return [
        f"{path}:{node.lineno}: {ast.unparse(node)}: wait for an event with a deadline instead"
        for node in _sleep_calls(tree)
    ]


def mocks(path: str, tree: ast.Module, source: str) -> Problems:
    """Real parts in a fake world: a mock of our own class tests the mock."""
    names = [
        (node.lineno, alias.name if isinstance(node, ast.Import) else f"{node.module}.{alias.name}")
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    ]
    return [
        f"{path}:{line}: {name}: use the real class, or a small fake of the other side"
        for line, name in names
        if name.startswith("unittest.mock") or name == "mock"
    ]


def unfinished_text(path: str, text: str) -> Problems:
    """The same marks in files that are not Python: protos, scripts, the Makefile, manifests."""
    return [
        f"{path}:{number}: {found.group()} in a comment; open an issue instead"
        for number, line in enumerate(text.splitlines(), start=1)
        if (found := _UNFINISHED.search(line)) and line.lstrip().startswith(("#", "//", "{{/*"))
    ]


def bad_adr(path: str, text: str) -> Problems:
    """A decision record is one page that says when, in what state, what was decided and against what."""
    name = Path(path).stem
    number = name.partition("-")[0]
    wanted = {
        rf"\A# {number}\. \S": "first line `# NNNN. Title` with the number of the file",
        r"^Date: \d{4}-\d\d-\d\d$": "a line `Date: YYYY-MM-DD`",
        r"^Status: (proposed|accepted|rejected|superseded by \d{4})$": "a line `Status: accepted`",
        r"^## Context\n\n\S": "a section `## Context`",
        r"^## Decision\n\n\S": "a section `## Decision`",
        r"^## Alternatives\n\n\S": "a section `## Alternatives`",
        r"^## Consequences\n\n\S": "a section `## Consequences`",
    }
    problems = (
        [] if re.fullmatch(r"\d{4}-[a-z0-9-]+", name) else [f"{path}:1: named NNNN-what-was-decided.md"]
    )
    problems += [
        f"{path}:1: misses {what}" for pattern, what in wanted.items() if not re.search(pattern, text, re.M)
    ]
    if (lines := len(text.splitlines())) > ADR_LINES_MAX:
        problems.append(f"{path}:1: {lines} lines, one page is at most {ADR_LINES_MAX}")
    return problems


PythonRule = Callable[[str, ast.Module, str], Problems]
PYTHON_RULES: tuple[PythonRule, ...] = (
    no_docstring, too_long, too_deep, has_global, banned_name, stub, sleeps, mocks,
)  # fmt: skip
_UNFINISHED = re.compile(r"\b(?:TODO|FIXME|XXX)\b")
_NESTING = (ast.If, ast.For, ast.AsyncFor, ast.While, ast.Try, ast.TryStar, ast.Match)
_Function = ast.FunctionDef | ast.AsyncFunctionDef


def _functions(tree: ast.AST) -> Iterator[_Function]:
    return (node for node in ast.walk(tree) if isinstance(node, _Function))


def _depth(node: ast.AST) -> int:
    if isinstance(node, _Function | ast.ClassDef):
        return 0  # counted on its own
    inner = max((_depth(child) for child in _nested(node)), default=0)
    return inner + 1 if isinstance(node, _NESTING) else inner


def _nested(node: ast.AST) -> Iterator[ast.AST]:
    """Children of a statement, `elif` taken as a sibling of its `if`, as it reads."""
    for child in ast.iter_child_nodes(node):
        is_elif = isinstance(node, ast.If) and node.orelse == [child] and isinstance(child, ast.If)
        yield from _nested(child) if is_elif else (child,)


def _banned(name: str) -> str | None:
    words = re.findall(r"[A-Z]?[a-z0-9]+|[A-Z]+(?![a-z])", name)
    return next((word for word in words if word.lower() in BANNED_WORDS), None)


def _sleep_calls(tree: ast.Module) -> Iterator[ast.Call]:
    """Calls of time.sleep and asyncio.sleep under any name; `asyncio.sleep(0)` only yields."""
    imported = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module in {"time", "asyncio"}
        for alias in node.names
        if alias.name == "sleep"
    }
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        yields = [ast.unparse(argument) for argument in node.args] == ["0"]
        if called in {"time.sleep", "asyncio.sleep", *imported} and not yields:
            yield node


_parse = cache(ast.parse)  # every rule reads every file


def _check(path: str, source: str, rules: Iterable[PythonRule]) -> Problems:
    tree = _parse(source, path)
    return [problem for rule in rules for problem in rule(path, tree, source)]


def _python_files() -> list[Path]:
    folders = (*SOURCE_ROOTS, "tests", "tools", "bench")
    return sorted(file for folder in folders for file in (ROOT / folder).rglob("*.py"))


def _other_files() -> list[Path]:
    patterns = (
        "proto/layercast/**/*.proto",
        "tools/*.sh",
        "Makefile",
        ".ci/run",
        "manifests/**/*",
        "charts/**/*",
    )
    return sorted(f for pattern in patterns for f in ROOT.glob(pattern) if f.is_file() and f.suffix != ".tgz")


# --- the repository -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", PYTHON_RULES, ids=lambda rule: rule.__name__)
def test_python_files(rule: PythonRule) -> None:
    problems = [
        problem
        for file in _python_files()
        for problem in _check(str(file.relative_to(ROOT)), file.read_text(), [rule])
    ]
    assert not problems, "\n" + "\n".join(problems)


def test_source_roots_are_no_packages() -> None:
    folders = [ROOT / name for name in NOT_PACKAGES]
    folders += [folder for folder in (ROOT / "tests").rglob("*") if folder.is_dir()]
    problems = [problem for folder in folders for problem in is_package(folder)]
    assert not problems, "\n" + "\n".join(problems)
    assert not list((ROOT / "tests").rglob("operator")), "tests/operator would shadow the standard library"


def test_other_files_are_finished() -> None:
    files = _other_files()
    problems = [p for f in files for p in unfinished_text(str(f.relative_to(ROOT)), f.read_text())]
    assert not problems, "\n" + "\n".join(problems)


def test_decisions_are_recorded_whole() -> None:
    files = sorted((ROOT / "docs" / "adr").glob("*.md"))
    problems = [p for file in files for p in bad_adr(str(file.relative_to(ROOT)), file.read_text())]
    assert not problems, "\n" + "\n".join(problems)
    numbers = [int(file.name[:4]) for file in files]
    assert len(numbers) == len(set(numbers)), "each decision record has a number of its own"


def test_allowed_sleeps_exist() -> None:
    stale = [name for name in SLEEPS_ALLOWED if not list(_sleep_calls(ast.parse((ROOT / name).read_text())))]
    assert not stale, f"no sleep left in {stale}: take it off the list"


def test_every_package_is_checked_and_shipped() -> None:
    """A package that mypy, the wheel or the import contracts do not list is silently unchecked."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]
    found = {file.parent.name for root in SOURCE_ROOTS for file in (ROOT / root).glob("*/__init__.py")}
    assert found == PACKAGES
    assert found == set(project["mypy"]["packages"])
    assert found == set(project["importlinter"]["root_packages"]) - {"layercast"}
    assert found == {Path(p).name for p in project["hatch"]["build"]["targets"]["wheel"]["packages"]} - {
        "layercast"
    }
    assert {*SOURCE_ROOTS, "proto/gen"} == set(project["hatch"]["build"]["dev-mode-dirs"])
    assert project["mypy"]["strict"] is True


# --- the rules, each against a sample that breaks it --------------------------------------------------------

GOOD = '"""Why this file exists, in words."""\n\n\ndef one() -> int:\n    return 1\n'
DEEP = "for a in x:\n    if a:\n        while a:\n            if a:\n                a = 0\n"
FLAT = (
    "for a in x:\n    if a:\n        a = 1\n    elif not a:\n        a = 2\n    elif a == 3:\n        a = 4\n"
)


def _body(statements: str) -> str:
    return GOOD + "\n\ndef two(x):\n" + "".join(f"    {line}\n" for line in statements.splitlines())


BAD_SAMPLES = {
    "no docstring": (no_docstring, "cli/a.py", "x = 1\n", "cli/a.py:1:"),
    "docstring is a name": (no_docstring, "cli/a.py", '"""Layercast."""\n', "does not say why"),
    "empty module": (no_docstring, "cli/a/__init__.py", "", "empty module"),
    "long function": (too_long, "cli/a.py", _body("x += 1\n" * 60), "cli/a.py:8: two has 61 lines"),
    "long file": (too_long, "cli/a.py", GOOD + "x = 1\n" * 400, "405 lines in a file"),
    "deep": (too_deep, "cli/a.py", _body(DEEP), "cli/a.py:8: two nests 4 deep"),
    "global": (has_global, "cli/a.py", _body("global y\ny = 1"), "cli/a.py:9: `global y`"),
    "banned module": (banned_name, "cli/string_utils.py", GOOD, "`utils` in a module"),
    "banned folder": (banned_name, "cli/common/a.py", GOOD, "`common` in a module"),
    "banned class": (banned_name, "cli/a.py", "class KVManager:\n    x = 1\n", "`Manager` in class"),
    "mark": (stub, "cli/a.py", GOOD + "x = 1  # TODO: more\n", "cli/a.py:6: TODO"),
    "stub": (stub, "cli/a.py", _body("raise NotImplementedError"), "cli/a.py:9: a stub"),
    "sleep": (sleeps, "tests/a.py", _body("time.sleep(1)"), "tests/a.py:9: time.sleep(1)"),
    "sleep by name": (sleeps, "tests/a.py", "from time import sleep as nap\nnap(2)\n", "tests/a.py:2: nap"),
    "async sleep": (sleeps, "tests/a.py", "import asyncio\nasyncio.sleep(0.1)\n", "tests/a.py:2:"),
    "mock": (mocks, "tests/a.py", "from unittest.mock import MagicMock\n", "tests/a.py:1: unittest.mock"),
}  # fmt: skip

GOOD_SAMPLES = {
    "plain": ("cli/a.py", GOOD),
    "elif is flat": ("cli/a.py", _body(FLAT)),
    "mark in a string": ("cli/a.py", GOOD + "x = 'TODO'\n"),
    "sleep outside tests": ("cli/a.py", _body("time.sleep(1)")),
    "yielding": ("tests/a.py", _body("asyncio.sleep(0)")),
    "words inside words": ("cli/database.py", GOOD + "class CommonnessIndex:\n    x = 1\n"),
    "nested function counts alone": ("cli/a.py", _body("for a in x:\n    def f():\n" + "\n".join(
        f"        {line}" for line in FLAT.splitlines()))),
}  # fmt: skip


@pytest.mark.parametrize("sample", BAD_SAMPLES)
def test_rule_finds_what_is_wrong(sample: str) -> None:
    rule, path, source, expected = BAD_SAMPLES[sample]
    problems = _check(path, source, [rule])
    assert len(problems) == 1
    assert expected in problems[0]


@pytest.mark.parametrize("sample", GOOD_SAMPLES)
def test_rules_accept_what_is_right(sample: str) -> None:
    path, source = GOOD_SAMPLES[sample]
    assert _check(path, source, PYTHON_RULES) == []


def test_stray_package_is_found(tmp_path: Path) -> None:
    assert is_package(tmp_path) == []
    (tmp_path / "__init__.py").touch()
    assert len(is_package(tmp_path)) == 1


def test_unfinished_text_is_found() -> None:
    assert unfinished_text("a.proto", "// fine\n  // FIXME soon\n") == [
        "a.proto:2: FIXME in a comment; open an issue instead"
    ]


def test_bad_decision_record_is_found() -> None:
    good = "# 0001. T\n\nDate: 2026-11-21\nStatus: accepted\n\n" + "\n".join(
        f"## {name}\n\nWords.\n" for name in ("Context", "Decision", "Alternatives", "Consequences")
    )
    assert bad_adr("docs/adr/0001-t.md", good) == []
    assert bad_adr("docs/adr/0001-t.md", good.replace("## Alternatives\n\nWords.\n", "")) == [
        "docs/adr/0001-t.md:1: misses a section `## Alternatives`"
    ]
    assert "Date" in bad_adr("docs/adr/0001-t.md", good.replace("2026-11-21", "today"))[0]
    assert len(bad_adr("docs/adr/0002-t.md", good)) == 1
    assert len(bad_adr("docs/adr/0001-t.md", good + "x\n" * 80)) == 1
