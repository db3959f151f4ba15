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


def test_every_block_says_how_it_is_run() -> None:
    found = [block for path in DOCUMENTS for block in docs_check.blocks(path, path.name)]
    assert [block.place for block in found if block.kind is None] == []
    assert {block.kind for block in found} == {docs_check.RUNS, docs_check.ASKS, docs_check.SERVES, docs_check.GPU}
    for block in found:
        assert docs_check.commands(block, {"MODEL": "/the/model"})


def test_blocks_run_and_a_failure_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "<!-- runs on a CPU; 50 => 1; false => true -->\n```sh\ntest MODEL = /the/model\nfalse && test 50 = 1\n```\n"
        "<!-- needs a GPU -->\n```sh\nfalse\n```\n"
        "<!-- runs on a CPU, with a server -->\n```sh\ntest http://127.0.0.1:30000/x = http://127.0.0.1:7/x\n```\n"
        "<!-- serves on a CPU -->\n```sh\nserve 127.0.0.1:30000\n```\n"
        "```python\nnot shell\n```\n"
    )
    served = []

    def serve() -> tuple[str, object]:
        served.append("127.0.0.1:7")
        return served[-1], object()

    def serve_block(text: str, environment: dict[str, str]) -> bool:
        served.append(text)
        return True

    monkeypatch.setattr(docs_check, "serve_until_it_answers", serve_block)
    found = docs_check.blocks(page, "page.md")
    assert [block.place for block in found] == ["page.md:3", "page.md:8", "page.md:12", "page.md:16"]
    assert docs_check.check(found, dict(os.environ), "/the/model", serve) == 0
    assert served == ["serve 127.0.0.1:30000\n", "127.0.0.1:7"]
    assert "3 blocks run; need a GPU: page.md:8; failed or not marked: none" in capsys.readouterr().out

    for text, shown in (
        ("<!-- runs on a CPU -->\n```sh\necho seen\nfalse\necho unseen\n```\n", "\nseen\n"),
        ("<!-- runs on a CPU; 1 => 2 -->\n```sh\ntrue\n```\n", "'1' is to be replaced and is not there"),
        ("```sh\ntrue\n```\n", "0 blocks run"),
    ):
        page.write_text(text)
        (block,) = docs_check.blocks(page, "page.md")
        assert docs_check.check([block], dict(os.environ), "", serve) == 1
        out = capsys.readouterr().out
        assert shown in out and "\nunseen\n" not in out and f"['{block.place}']" in out
    assert docs_check.check([], dict(os.environ), "", serve) == 1, "there is nothing"


def test_a_variable_is_no_place_of_the_model(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("<!-- runs on a CPU -->\n```sh\nMODEL=1 x $MODEL MODEL\n```\n")
    (block,) = docs_check.blocks(page, "page.md")
    assert docs_check.commands(block, {"MODEL": "/m"}) == "MODEL=1 x $MODEL /m\n"
