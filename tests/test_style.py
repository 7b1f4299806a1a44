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
    statements = Counter(node.lineno for node in nodes if isinstance(node, ast.stmt))
    functions = [node for node in nodes if isinstance(node, ast.FunctionDef)]
    in_strings = [part for node in nodes if isinstance(node, ast.JoinedStr)
                  for part in ast.walk(node) if isinstance(part, ast.IfExp)]
    chained = [node for node in nodes if isinstance(node, ast.IfExp)
               and isinstance(node.body, ast.IfExp) | isinstance(node.orelse, ast.IfExp)]
    found = {
        "long lines": [i for i, line in enumerate(text.splitlines(), 1) if len(line) > 100],
        "statements on one line": [line for line, n in statements.items() if n > 1],
        "long functions": [f.name for f in functions if f.end_lineno - f.lineno >= 40],
        "conditionals in f-strings": [node.lineno for node in in_strings],
        "chained conditionals": [node.lineno for node in chained],
    }
    assert not any(found.values()), found
