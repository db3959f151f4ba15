"""Documents: links lead somewhere, and what is marked as runnable is found and run."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

import docs_check  # noqa: E402

DOCUMENTS = sorted({path for pattern in docs_check.DOCUMENTS for path in ROOT.glob(pattern)})


def anchors(text: str) -> set[str]:
    """Of a document's headings, as they are rendered."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path: Path) -> None:
    text = path.read_text()
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith(("http://", "https://")):
            continue
        file, _, anchor = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        assert target.exists(), f"{path.name}: {link}"
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target.read_text()), f"{path.name}: {link}"
    # Files that a document names without a link: figures and tests.
    for named in re.findall(r"`((?:benchmark|test|examples|scripts|docs)/[\w./*{},-]+\.\w+)`", text):
        for each in _expand(named):
            assert list(ROOT.glob(each)), f"{path.name}: {each}"


def _expand(pattern: str) -> list[str]:
    braces = re.fullmatch(r"(.*)\{(.+)\}(.*)", pattern)
    return [braces[1] + part + braces[3] for part in braces[2].split(",")] if braces else [pattern]


def test_every_example_is_run_by_a_test() -> None:
    tests = (ROOT / "test" / "test_server_dropin.py").read_text()
    for example in (ROOT / "examples").glob("*.py"):
        assert f'run_example("{example.name}"' in tests, example.name


def test_marked_blocks_are_found_in_the_documents() -> None:
    found = [block for path in DOCUMENTS for block in docs_check.blocks(path, path.name)]
    assert sum(block.marked for block in found) >= 4 and any(block.needs_server for block in found)
    written = sum(path.read_text().count("<!-- runs on a CPU") for path in DOCUMENTS)
    assert sum(block.marked for block in found) == written, "a mark without a block below it"


def test_what_is_marked_runs_and_a_failure_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "<!-- runs on a CPU -->\n```sh\ntest MODEL = /the/model\n```\n"
        "```sh\nfalse  # not marked\n```\n"
        "<!-- runs on a CPU, with a server -->\n```sh\ntest http://127.0.0.1:30000/x = http://127.0.0.1:7/x\n```\n"
        "```python\nnot shell\n```\n"
    )
    served = []

    def serve() -> tuple[str, object]:
        served.append("127.0.0.1:7")
        return served[0], object()

    found = docs_check.blocks(page, "page.md")
    assert [(block.place, block.marked, block.needs_server) for block in found] == [
        ("page.md:3", True, False),
        ("page.md:6", False, False),
        ("page.md:10", True, True),
    ]
    assert docs_check.check(found, dict(os.environ), "/the/model", serve) == 0
    assert served == ["127.0.0.1:7"] and "2 blocks run, 1 not marked and not run" in capsys.readouterr().out

    page.write_text("<!-- runs on a CPU -->\n```sh\necho seen\nfalse\necho unseen\n```\n")
    assert docs_check.check(docs_check.blocks(page, "page.md"), dict(os.environ), "", serve) == 1
    shown = capsys.readouterr().out
    assert "\nseen\n" in shown and "\nunseen\n" not in shown and "failed: ['page.md:3']" in shown
    assert docs_check.check([], dict(os.environ), "", serve) == 1, "nothing was marked"
