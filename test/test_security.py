"""What SECURITY.md says of the code as a whole: nothing from outside is unpickled or executed, nothing listens on a
network."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = [*(ROOT / "python").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]

MODULES = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"}
"""They make objects of bytes by running what the bytes say."""
CALLS = {"eval", "exec", "recv_pyobj", "send_pyobj"}
PICKLED_BY_DEFAULT = {"load", "save"}
"""Of torch; numpy's `load` refuses pickles unless it is told otherwise."""


def nodes(path: Path) -> Iterator[ast.AST]:
    yield from ast.walk(ast.parse(path.read_text()))


def violations(path: Path) -> Iterator[str]:
    """Lines of a file that could execute what they read."""
    for node in nodes(path):
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            if {name.partition(".")[0] for name in modules} & MODULES:
                yield f"{path}:{node.lineno}: imports {modules}"
        elif isinstance(node, ast.Call):
            function = node.func
            name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
            owner = ast.unparse(function.value) if isinstance(function, ast.Attribute) else ""
            allows = any(
                keyword.arg == "allow_pickle" and getattr(keyword.value, "value", True) is not False
                for keyword in node.keywords
            )
            # `model.eval()` is no evaluation.
            if (name in CALLS and not (name == "eval" and owner)) or allows:
                yield f"{path}:{node.lineno}: calls {ast.unparse(function)}"
            if owner == "torch" and name in PICKLED_BY_DEFAULT:
                yield f"{path}:{node.lineno}: torch.{name} pickles"


def test_nothing_is_unpickled_or_evaluated() -> None:
    assert len(SOURCES) > 100
    assert [line for path in SOURCES for line in violations(path)] == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from cloudpickle import loads",
        "import torch\ntorch.load(p)",
        "import numpy as np\nnp.load(p, allow_pickle=True)",
        "np.load(p, allow_pickle=flag)",
        "socket.recv_pyobj()",
        "eval(text)",
    ],
)
def test_the_search_finds_what_it_looks_for(source: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.py"
    path.write_text(source)
    assert list(violations(path))
    path.write_text("import numpy as np\nnp.load(p, allow_pickle=False)\nmodel.eval()\nload(data)\n")
    assert not list(violations(path))


def test_nothing_but_private_sockets_is_bound() -> None:
    bound = []
    for path in SOURCES:
        for node in nodes(path):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "bind":
                bound.append((path.name, ast.unparse(node.args[0])))
        assert not re.search(r"0\.0\.0\.0|tcp://|AF_INET", path.read_text()), path
    assert [(name, argument.startswith("f'ipc://")) for name, argument in bound] == [("process.py", True)]
    assert '--host "${HOST:-127.0.0.1}"' in (ROOT / "scripts" / "serve.sh").read_text()
