"""All 13 tasks of RULER, generated offline by its own scripts. The first run downloads them and takes minutes."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmark.common.errors import BenchmarkError
from benchmark.quality import ruler
from benchmark.quality.prompting import Prompter
from benchmark.quality.ruler_package import RulerPackage, ruler_package
from benchmark.quality.ruler_worker import split_sentences
from benchmark.quality.workload import Workload

LENGTH = 2048  # the shortest at which every task has room for a question


@pytest.fixture(scope="module")
def package() -> RulerPackage:
    try:
        return ruler_package()
    except BenchmarkError as error:
        pytest.skip(f"RULER's generators cannot be had: {error}")


@pytest.fixture(scope="module")
def prompter(model: Path) -> Prompter:
    return Prompter(str(model))


@pytest.mark.parametrize("name", ruler.TASKS)
def test_task_is_generated_and_cut(name: str, package: RulerPackage, prompter: Prompter) -> None:
    (group,) = ruler.groups(Workload(prompter, 1, 0), LENGTH, [name], package)
    (sample,) = group.samples
    decode = prompter._tokenizer.decode
    context, question, answer = (decode(list(ids)) for ids in (group.context, sample.question, sample.answer))
    assert LENGTH / 4 < len(group.context) + len(sample.question) + sample.budget <= LENGTH
    # The context has the answer but not the question; the reply begins after the chat template.
    assert name == "qa_2" or sample.references[0] in context  # that one is answered by yes
    assert "?" in question or "Find all variables" in question
    assert "<|im_start|>assistant\n" in question and "<|im_start|>assistant" not in context
    assert question.count("<|im_end|>") == 1
    assert sample.scored and any(reference in answer for reference in sample.references)
    assert sample.metric == ("match_part" if name.startswith("qa") else "match_all")
    # RULER's own lists: 4 needles, 4 queries, a chain of 5 variables, 10 and 3 words.
    counts = {"niah_multivalue": 4, "niah_multiquery": 4, "vt": 5, "cwe": 10, "fwe": 3}
    if not name.startswith("qa"):
        assert len(sample.references) == counts.get(name, 1)


def test_a_length_that_no_prompt_fits_is_an_error(
    package: RulerPackage, prompter: Prompter, monkeypatch: pytest.MonkeyPatch
) -> None:
    # RULER's own script would look for one forever.
    monkeypatch.setattr(ruler, "SILENCE_S", 8.0)
    with pytest.raises(BenchmarkError, match=r"generator of qa_1 finds no prompt that fits --lengths 300"):
        ruler.groups(Workload(prompter, 1, 0), 300, ["qa_1"], package)


@pytest.mark.parametrize("data", ["nothing", "text.whl"])
def test_data_that_is_no_wheel_is_named(data: str, tmp_path: Path) -> None:
    (tmp_path / "text.whl").write_text("no archive")
    with pytest.raises(BenchmarkError, match=f"--data: .*{data.split('.')[0]}"):
        ruler_package(tmp_path / data)


def test_sentences_end_before_capitals() -> None:
    text = 'It cost 3.5 dollars. "Why?" she asked. No one knew!\nThe end'
    assert split_sentences(text) == ["It cost 3.5 dollars.", '"Why?" she asked.', "No one knew!", "The end"]
