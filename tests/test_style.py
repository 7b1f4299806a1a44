"""The project's style: lines of at most 100 columns, one statement a line, functions of at most 40
lines, no conditional inside an f-string, no conditional inside another's branches."""
import ast
from collections import Counter

import pytest

from helpers import ROOT

FILES = sorted([*ROOT.glob("*.py"), *ROOT.glob("tests/**/*.py")])


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_style(path):
    text = path.read_text()
    nodes = list(ast.walk(ast.parse(text)))
    functions = [node for node in nodes if isinstance(node, ast.FunctionDef)]
    assert max(map(len, text.splitlines())) <= 100
    assert max(Counter(n.lineno for n in nodes if isinstance(n, ast.stmt)).values()) == 1
    assert not [f.name for f in functions if f.end_lineno - f.lineno >= 40]
    assert not [part.lineno for node in nodes if isinstance(node, ast.JoinedStr)
                for part in ast.walk(node) if isinstance(part, ast.IfExp)]
    assert not [node.lineno for node in nodes if isinstance(node, ast.IfExp)
                and isinstance(node.body, ast.IfExp) | isinstance(node.orelse, ast.IfExp)]
