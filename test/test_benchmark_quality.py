"""The quality benchmark: scoring, pairing, run folders that resume, prompts, and its behaviour when a server fails."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from benchmark.common.errors import BenchmarkError
from benchmark.quality import comparison, conversation, needles, pairing, perplexity, recall, ruler, rules, run
from benchmark.quality.metrics import METRICS, judge
from benchmark.quality.prompting import Prompter
from benchmark.quality.run_folder import RunFolder, read_run
from benchmark.quality.samples import Sample, fingerprint
from benchmark.quality.workload import Workload

# ---- metrics ----


@pytest.mark.parametrize(
    ("metric", "reply", "references", "score"),
    [
        ("match_all", "they are 12 and 34.", ["12", "56"], 0.5),
        ("match_part", "in PARIS, France", ["Lyon", "paris"], 1),
        ("match_part", "nowhere", ["Lyon"], 0),
    ],
)
def test_replies_are_scored_by_their_text(metric: str, reply: str, references: list[str], score: float) -> None:
    assert METRICS[metric](reply, references) == score


@pytest.mark.parametrize(
    ("rows", "correct", "near_tie"),
    [
        ([{7: -0.1, 8: -3.0}, {9: -0.2, 1: -2.0}], 2, False),
        ([{7: -0.1, 8: -3.0}, {1: -0.695, 9: -0.7}], 1, True),
        ([{7: -0.1, 8: -3.0}, {1: -0.5, 9: -0.7}], 1, False),
        # A token that is not even listed is no near-tie, and one wrong token among near-ties decides.
        ([{1: -0.695, 7: -0.7}, {1: -0.1, 2: -3.0}], 0, False),
    ],
    ids=["exact", "near-tie", "wrong", "both"],
)
def test_forced_answers_need_every_first_choice(rows: list[dict[int, float]], correct: int, near_tie: bool) -> None:
    own = [row.get(token, -9.0) for row, token in zip(rows, (7, 9), strict=True)]
    verdict = judge([7, 9], own, rows)
    assert (verdict.correct, verdict.total, verdict.near_tie) == (correct, 2, near_tie)
    assert verdict.exact == (correct == 2)


# ---- intervals ----


def test_interval_is_about_the_mean_and_narrows_with_samples() -> None:
    few, many = ([0.0] * (3 * n) + [-1.0] * n for n in (5, 100))
    wide, narrow = pairing.interval([few]), pairing.interval([many])
    assert wide[0] < narrow[0] < -0.25 < narrow[1] < wide[1]
    # The normal approximation of 400 draws.
    assert narrow == pytest.approx((-0.25 - 1.96 * 0.433 / 20, -0.25 + 1.96 * 0.433 / 20), abs=0.005)
    assert pairing.interval([few]) == wide


def test_interval_without_any_variation_is_not_certainty() -> None:
    assert pairing.interval([[0.0] * 30]) == pytest.approx((-0.1, 0.1))
    assert pairing.interval([[0.0]]) == (-1, 1)
    assert pairing.interval([[-1.0] * 30]) == pytest.approx((-1, -0.9))
    # Four tasks of 30 samples leave half the uncertainty of one.
    assert pairing.interval([[0.0] * 30] * 4) == pytest.approx((-0.05, 0.05))


# ---- pairing ----


def _record(task: str, index: int, score: float, **more: Any) -> dict[str, Any]:
    record = {"key": f"ruler/{task}/4096/{index}", "suite": "ruler", "task": task, "length": 4096, "position": index}
    record |= {"hash": f"h{index}", "mode": "forced", "likelihood": False, "score": score, "near_tie": False}
    record |= {"context_tokens": 130, "prompt_tokens": 150, "cached_tokens": 128}
    record |= {"own": [-0.7], "top_tokens": [[1, 2]], "top": [[math.log(0.5), math.log(0.5)]]}
    return record | more


def _by_key(*records: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {record["key"]: record for record in records}


def test_pairs_need_the_same_prompts() -> None:
    full = _by_key(_record("a", 0, 1), _record("a", 1, 1))
    assert len(pairing.pairs(full, _by_key(_record("a", 1, 0)))) == 1
    with pytest.raises(BenchmarkError, match="a/4096/1 differently"):
        pairing.pairs(full, _by_key(_record("a", 1, 0, hash="other")))
    with pytest.raises(BenchmarkError, match="a/4096/1 differently"):
        pairing.pairs(full, _by_key(_record("a", 1, 0, mode="generate")))
    with pytest.raises(BenchmarkError, match="no sample in common"):
        pairing.pairs(full, _by_key(_record("b", 1, 0)))


def test_cells_count_what_is_lost_and_gained() -> None:
    full = _by_key(*(_record("a", i, float(i < 8)) for i in range(10)))
    flips = {0: _record("a", 0, 0.0, near_tie=True), 9: _record("a", 9, 1.0, cached_tokens=64)}
    (cell,), texts = pairing.cells(pairing.pairs(full, full | _by_key(*flips.values())))
    assert texts == []
    assert (cell.samples, cell.full, cell.other, cell.difference) == (10, 0.8, 0.8, 0)
    assert (cell.lost, cell.gained, cell.near_ties, cell.uncached) == (1, 1, 1, 1)
    assert cell.interval[0] < 0 < cell.interval[1]
    assert cell.mean_kl == 0


def test_kl_is_over_the_answers_tokens() -> None:
    halves, quarters = _record("a", 0, 1), _record("a", 0, 1, top=[[math.log(0.25), math.log(0.75)]])
    expected = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    assert pairing.divergences_of(halves, quarters) == pytest.approx([expected])
    generated = {key: value for key, value in halves.items() if key != "top"}
    assert pairing.divergences_of(halves, generated) == []


def test_text_is_compared_by_loss_and_choice() -> None:
    def passage(own: list[float], choice: int) -> dict[str, Any]:
        more = {"own": own, "top_tokens": [[choice, 3], [4, 5]], "top": [[-0.5, -1.0]] * 2}
        return _record("novels", 0, 0.5, suite="perplexity", likelihood=True, **more)

    found = pairing.pairs(_by_key(passage([-1.0, -2.0], 1)), _by_key(passage([-1.0, -2.2], 2)))
    tasks, (cell,) = pairing.cells(found)
    assert tasks == []
    assert (cell.full, cell.other) == pytest.approx((math.exp(1.5), math.exp(1.6)))
    assert cell.log_ratio == pytest.approx(0.1)
    assert cell.interval is None
    assert cell.agreement == 0.5
    assert cell.mean_kl > 0


def test_average_leaves_out_what_full_kv_cannot_do() -> None:
    full = _by_key(
        *(_record(task, i, float(i < good)) for task, good in (("a", 10), ("b", 8), ("c", 7)) for i in range(10))
    )
    other = full | _by_key(*(_record(task, 0, 0.0) for task in "abc"))
    found = pairing.pairs(full, other)
    average = pairing.loss(pairing.cells(found)[0], found, 0.8)
    assert average.counted == ["a @ 4096", "b @ 4096"]
    assert average.left_out == ["c @ 4096"]
    assert (average.full, average.other) == pytest.approx((0.9, 0.8))
    assert average.difference == pytest.approx(-0.1)
    assert average.interval is not None and average.interval[0] < -0.1 < average.interval[1]
    assert pairing.loss(pairing.cells(found)[0], found, 1.1).difference is None


# ---- run folders ----

SETTINGS = {"samples": 2, "lengths": (1024,)}


def test_run_goes_on_after_half_a_line(tmp_path: Path) -> None:
    with RunFolder(tmp_path / "run", SETTINGS, {"environment": {}}) as folder:
        folder.append({"key": "a", "score": 1})
        folder.append({"key": "b", "score": 0})
    samples = tmp_path / "run" / "samples.jsonl"
    samples.write_bytes(samples.read_bytes()[:-9])
    before = samples.read_bytes()
    about = (tmp_path / "run" / "run.json").read_bytes()
    with RunFolder(tmp_path / "run", SETTINGS, {"environment": "of another session"}) as folder:
        assert set(folder.done) == {"a"}
        folder.append({"key": "b", "score": 1})
    assert samples.read_bytes().startswith(before)
    assert (tmp_path / "run" / "run.json").read_bytes() == about
    assert [record["score"] for record in read_run(tmp_path / "run")[1].values()] == [1, 1]


def test_another_run_is_never_overwritten(tmp_path: Path) -> None:
    with RunFolder(tmp_path / "run", SETTINGS, {}) as folder:
        folder.append({"key": "a"})
        with pytest.raises(BenchmarkError, match="another process"):
            RunFolder(tmp_path / "run", SETTINGS, {})
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    with pytest.raises(BenchmarkError, match=r"other settings \(samples: 2 there, 3 now\)"):
        RunFolder(tmp_path / "run", {**SETTINGS, "samples": 3}, {})
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before

    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(BenchmarkError, match=r"no run\.json \(thesis\.txt"):
        RunFolder(tmp_path / "mine", SETTINGS, {})
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]
    with pytest.raises(BenchmarkError, match="not the folder of a run"):
        read_run(tmp_path / "mine")


# ---- reports ----


def _run_folder(folder: Path, server: dict[str, Any], scores: list[float], encoded: int, samples: int = 2) -> Path:
    settings = {"model": "m", "score": "forced", "seed": 0, "samples": samples, "server": server}
    with RunFolder(folder, settings, {"environment": {"gpu": None, "cpu": "a CPU"}}) as run_folder:
        for index, score in enumerate(scores):
            run_folder.append(_record("niah_single_1", index, score))
        text = {"suite": "perplexity", "likelihood": True, "key": "perplexity/novels/4096/0"}
        run_folder.append(_record("novels", 0, 0.5, **text))
        run_folder.end_session({"pages_encoded": encoded})
    return folder


def test_reports_of_two_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stock = _run_folder(tmp_path / "stock", {"attention_backend": "fa3"}, [1, 1, 1, 0], 0)
    seal = _run_folder(tmp_path / "seal", {"attention_backend": "mosaic"}, [1, 0, 1, 0], 9)
    outputs = [f"--{kind}={tmp_path / 'out' / kind}" for kind in ("json", "png", "markdown")]
    assert run.main(["--compare", str(stock), str(seal), "--floor", "70", *outputs]) == 0
    printed = capsys.readouterr().out
    assert "75.0%  50.0%" in printed
    assert "Counted: niah_single_1 @ 4096." in printed
    table = (tmp_path / "out" / "markdown").read_text()
    assert "| niah_single_1 | 4,096 | 150 | 4 | 75.0% | 50.0% | -25.0 [" in table
    assert "attention_backend mosaic (client on a CPU)" in table
    report = json.loads((tmp_path / "out" / "json").read_text())
    assert report["others"][0]["tasks"][0]["lost"] == 1
    assert (tmp_path / "out" / "png").read_bytes().startswith(b"\x89PNG")


def test_doubtful_comparisons_say_so(tmp_path: Path) -> None:
    stock = _run_folder(tmp_path / "stock", {"attention_backend": "fa3"}, [1, 1, 1, 0], 0)
    idle = _run_folder(tmp_path / "idle", {"attention_backend": "mosaic"}, [1, 1], 0)
    _, (found,) = comparison.compare([stock, idle], 0.8)
    assert found.missing == 2
    assert "2 samples of full KV are missing" in found.warnings[0]
    assert "no page was compressed" in found.warnings[1]
    assert run.main(["--compare", str(stock), str(idle)]) == 1
    other = _run_folder(tmp_path / "other", {}, [1], 0, samples=3)
    with pytest.raises(BenchmarkError, match="samples: 2 against 3"):
        comparison.compare([stock, other], 0.8)


# ---- prompts ----


@pytest.fixture(scope="module")
def prompter(model: Path) -> Prompter:
    return Prompter(str(model))


def _text(prompter: Prompter, ids: list[int]) -> str:
    return prompter._tokenizer.decode(ids)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Memo: some facts.\nWhat are all x for k in it? The x for k are", ("Memo: some facts.", "\nWhat are all x")),
        ("Memo: a fact.\nWhat is x for k in it? The x for k is", ("Memo: a fact.", "\nWhat is x")),
        (
            "Memo: one.\nWhat is x for j in it? The x for j is 5\n\nMemo: two.\nWhat is x for k in it? The x for k is",
            ("Memo: one.\nWhat is x for j in it? The x for j is 5\n\nMemo: two.", "\nWhat is x for k"),
        ),
    ],
    ids=["plural", "singular", "after-an-example"],
)
def test_prompts_are_cut_before_the_question(text: str, expected: tuple[str, str]) -> None:
    template, prefix = "Memo: {context}\nWhat are all {kind} for {query} in it?", " The {kind} for {query} are"
    context, question, begun = ruler.split_prompt(text, template, prefix)
    assert context + question + begun == text
    assert context == expected[0] and question.startswith(expected[1])
    assert begun.startswith(" The x for k ")
    with pytest.raises(BenchmarkError, match="does not end with its template's question"):
        ruler.split_prompt(text.replace("What", "Which"), template, prefix)


def test_only_values_of_an_answer_are_scored(prompter: Prompter) -> None:
    ids, scored = prompter.answer(" 123, cat, and 45", ["123", "cat", "45"])
    assert _text(prompter, ids) == " 123, cat, and 45"
    assert "".join(_text(prompter, [ids[offset]]).strip() for offset in scored) == "123cat45"


def test_needles_stand_between_sentences_in_order() -> None:
    text = " ".join(f"Sentence number {number} ends here." for number in range(20))
    full = needles.insert(text, ["N1.", "N2."], [0.3, 0.7])
    assert full.replace(" N1.", "").replace(" N2.", "") == text
    assert 0.25 < full.index("N1.") / len(full) < 0.4
    assert 0.65 < full.index("N2.") / len(full) < 0.8
    assert full.split("N1.")[0].endswith("here. ")
    assert needles.insert("One. Two.", ["N."], [1.0]) == "One. Two. N."


def test_conversations_are_exact_prefixes(prompter: Prompter) -> None:
    messages = [{"role": "system", "content": "Be brief."}]
    for part in range(3):
        messages += conversation._turn(f"part {part}", "", "Noted.")
    ids, steps, text = prompter.conversation(messages)
    assert _text(prompter, ids) == text
    assert len(steps) == 2 and sorted(steps) == steps and steps[-1] < len(ids)
    shorter, _, _ = prompter.conversation(messages[:-2])
    assert ids[: steps[-1]] == shorter
    asked = prompter.ask(messages, text, "Why?")
    expected = prompter.render([*messages, {"role": "user", "content": "Why?"}], True)
    assert _text(prompter, ids + asked) == expected


def test_plain_text_models_get_plain_text(prompter: Prompter, model: Path) -> None:
    plain = Prompter(str(model))
    plain._tokenizer.chat_template = None
    plain.is_chat = False
    assert plain.frame() == ("", "")
    assert plain.open_reply(" It is") == " It is" and prompter.open_reply(" It is") == "It is"
    _, _, text = plain.conversation(conversation._turn("part", "", "Noted."))
    assert text.startswith("User: Here is the next part") and text.endswith("Assistant: Noted.\n\n")
    assert plain.fingerprint != prompter.fingerprint


@pytest.fixture(scope="module")
def work(prompter: Prompter) -> Workload:
    work = Workload(prompter, samples=6, seed=0)
    try:
        work.passages  # noqa: B018
    except BenchmarkError as error:
        pytest.skip(f"no novels: {error}")
    return work


@pytest.mark.parametrize("suite", list(run.SUITES))
def test_suites_fill_the_length_and_repeat(suite: str, work: Workload) -> None:
    groups = run.SUITES[suite](work, 1600)
    assert sum(len(group.samples) for group in groups) == 6
    assert len({sample.key for group in groups for sample in group.samples}) == 6
    for group in groups:
        assert all(0 < step < len(group.context) for step in group.steps)
        for sample in group.samples:
            assert 0.8 * 1600 < len(group.context) + len(sample.question) + len(sample.answer) <= 1600
            assert sample.question and sample.answer and sample.scored
    # Fewer samples are the first ones of more; another seed has others.
    fewer = run.SUITES[suite](Workload(work.prompter, 1, 0), 1600)[0]
    assert fingerprint(fewer.context, fewer.samples[0]) == fingerprint(groups[0].context, groups[0].samples[0])
    assert run.SUITES[suite](Workload(work.prompter, 1, 1), 1600)[0].context != groups[0].context
    with pytest.raises(BenchmarkError, match="--lengths: "):
        run.SUITES[suite](work, 256)


def test_needles_and_facts_are_in_the_context_and_numbers_only_there(work: Workload) -> None:
    for suite, sentence in ((needles, "number of the {} is {}."), (recall, "code of the {} is {}.")):
        group = suite.groups(work, 1600)[0]
        context = _text(work.prompter, list(group.context))
        for sample in group.samples:
            question = _text(work.prompter, list(sample.question))
            thing = question.rpartition(" is")[0].split()[-1]
            assert context.count(sentence.format(thing, sample.references[0])) == 1
            assert sample.references[0] not in question
            assert _text(work.prompter, list(sample.answer)) == f" {sample.references[0]}"


def test_rules_are_in_the_system_prompt_and_their_words_only_there(work: Workload) -> None:
    group = rules.groups(work, 1600)[0]
    context = _text(work.prompter, list(group.context))
    requests = list(rules.EVENTS.items())
    for (event, request), sample in zip(requests, group.samples, strict=False):
        (word,) = sample.references
        assert context.count(rules.RULE.format(event=event, word=word)) == 1
        question = _text(work.prompter, list(sample.question))
        assert request in question and question.endswith(rules.BEGUN) and word not in question
        assert _text(work.prompter, list(sample.answer)) == f" {word}"


def test_scoring_text_computes_nothing_of_the_context_again(work: Workload) -> None:
    group = perplexity.groups(work, 1600)[0]
    assert len(group.context) % perplexity.PAGE == 0
    assert len(group.samples[0].question) == 1
    assert len(group.samples[0].answer) == perplexity.SCORED


def test_fingerprints_tell_prompts_apart() -> None:
    sample = Sample("s", "t", 1, 0, [1], [2], [0], ["a"], "match_all", 1)
    assert fingerprint([3, 4], sample) != fingerprint([3], sample)
    moved = Sample("s", "t", 1, 0, [4, 1], [2], [0], ["a"], "match_all", 1)
    assert fingerprint([3], moved) != fingerprint([3, 4], sample)


# ---- options ----


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "exactly one of --url, --prepare and --compare"),
        (["--url", "http://h", "--prepare"], "exactly one of"),
        (["--compare", "a"], "argument --compare: needs the run with full KV"),
        (["--url", "http://h", "--model-path", "m"], "argument --run: needed"),
        (["--prepare"], "argument --model-path: needed"),
        (["--prepare", "--model-path", "m", "--suite", "ruler,x"], "argument --suite: expected some of ruler,"),
        (["--prepare", "--model-path", "m", "--suite", "rules", "--tasks", "vt"], "argument --tasks: names tasks of"),
        (["--prepare", "--model-path", "m", "--lengths", "1024,5"], "argument --lengths: expected an integer"),
    ],
)
def test_options_that_do_not_fit(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run.parse_arguments(argv)
    assert message in capsys.readouterr().err
