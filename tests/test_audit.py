"""The audit: every count by hand, kept + dropped = read, and the same report in any order."""

import json
import math
import random
import re

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dpo_utils.audit import audit, main
from dpo_utils.data import PreferenceDataError
from dpo_utils.profiles import ASSETS


def pair(prompt, chosen, rejected):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


DIRTY = [  # one fault a row, and the name under which it is counted
    (pair("What is one?", "aaaa", "bb"), None),  # longer chosen
    (pair("What is two?", "a", "bbb"), None),  # shorter chosen
    (pair("What is three?", "aa", "bb"), None),  # a tie
    (pair("What is four?", 4, "b"), "wrong type"),
    (pair("What is five?", None, "b"), "missing value"),
    (pair("What is six?", math.nan, "b"), "missing value"),
    (pair("What is seven?", "a", " "), "blank"),
    (pair("What is eight?", "same", "same"), "identical"),
    (pair("What is nine?", "same", " SAME"), "same after folding"),
    (pair("What is ten?", "a\0", "b"), "NUL character"),
    (pair("What is eleven?", "\ud8ff", "b"), "lone surrogate"),
    (pair("What is red?", "dup", "other"), "duplicate pair"),
    (pair("what IS red?", "Dup", "other"), "duplicate pair"),
    (pair("What is blue?", "x1", "x2"), "conflicting pair"),
    (pair("What is  blue?", "x2", "x1"), "conflicting pair"),
    (pair("What is held out?", "cc", "dd"), "prompt also held out"),
    (pair("What is the end?", "it</s>", "this!!"), "end-of-text marker"),
]
ROWS = [row for row, _ in DIRTY]
GOOD = ROWS[:3]
HELD_OUT = [pair("what is HELD out?", "x", "y")]


@pytest.fixture(scope="module")
def tokenizer():
    """One token a word; words it does not know are all the same token."""
    words = "<|end|> <unk> Instruct Output : What is yes no one two".split()
    vocabulary = {word: n for n, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    marks = {"eos_token": "<|end|>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **marks)


def found(report) -> dict[str, list[int]]:
    return {name: rows for name, rows in (report.noted | report.dropped).items() if rows}


def test_every_finding_has_its_rows_in_the_report_and_the_table():
    report = audit(ROWS, held_out=HELD_OUT)
    every = [(name, n) for n, (_, name) in enumerate(DIRTY, 1) if name]
    assert sorted((name, n) for name, rows in found(report).items() for n in rows) == sorted(every)
    assert (report.rows, report.kept, report.pairs, report.prompts) == (17, 10, 10, 8)
    total, *lines = str(report).splitlines()
    assert total == "rows in memory: 17 rows read = 10 kept + 7 dropped; 10 pairs on 8 prompts"
    assert lines[1].split() == "dropped missing value 2 rows 5, 6".split()
    assert "9  rows 1, 2, 3, 4, 5, 6, 7, 8 ..." in str(audit([GOOD[0]] * 9))


def test_lengths_and_the_length_only_baseline_by_hand():
    report = audit(GOOD)
    assert report.length_only == {"characters": 0.5}  # (1 + 0 + 1/2) / 3
    by_hand = {"count": 3, "mean": 2.33, "min": 1, "50%": 2, "95%": 3.8, "max": 4}
    assert report.lengths["characters"]["chosen"] == by_hand
    assert str(report).endswith("the longer answer is the chosen one in 0.500 of the pairs")
    said = [[{"role": r, "content": "Why"}] for r in ("user", "assistant")]
    talk = pair(*said, [{"role": "assistant", "content": "No!!"}])
    assert [side["max"] for side in audit([talk]).lengths["characters"].values()] == [3, 3, 4]


def test_ranked_rows_count_missing_and_tied_scores():
    scores = [[3, 2, 1], [2, 2, 1], [1, 1, 1], [1, None, 2], [1, 2]]
    rows = [{"prompt": f"{s}?", "responses": ["a", "b", "c"], "scores": s} for s in scores]
    expected = {"tied scores": [3], "missing score": [4, 5], "some scores tied": [2]}
    assert found(report := audit(rows)) == expected and (report.kept, report.pairs) == (2, 5)


def test_tokens_are_counted_apart_from_text(tokenizer):
    # "Instruct: What is one?\nOutput:" is 8 tokens: Instruct : What is one <unk> Output :
    answers = [
        ("yes", "no"),  # 8 + 2 with EOS
        ("strange", "unknown"),  # both <unk>
        ("yes yes yes yes", "yes yes yes no"),  # the same in 3 tokens
        ("yes no yes no", "no"),  # cut, still different
        ("yes <|end|>", "no"),
        ("yes yes", "no"),  # 11 with EOS: just fits
    ]
    rows = [pair("What is one?", *sides) for sides in answers]
    rows.append(pair("What is one? two two two", "yes", "no"))  # 11: no room for an answer
    report = audit(rows, tokenizer, max_length=11)
    expected = {"identical tokens": [2], "identical after truncation": [3], "completion cut": [4]}
    assert found(report) == expected | {"end-of-text marker": [5], "prompt too long": [7]}
    assert (report.kept, report.rows, report.length_only["tokens"]) == (3, 7, pytest.approx(5 / 6))
    assert [side["max"] for side in report.lengths["tokens"].values()] == [8, 5, 2]


def test_a_row_is_kept_while_one_pair_is_left_and_nothing_is_cut_without_max_length(tokenizer):
    row = {"prompt": "one?", "responses": ["yes", "strange", "unknown"], "scores": [3, 2, 1]}
    assert found(report := audit([row], tokenizer)) == {} and (report.kept, report.pairs) == (1, 2)
    report = audit([pair("What is one?", "yes " * 5000, "no")], tokenizer)  # nothing is cut
    assert found(report) == {} and report.lengths["tokens"]["chosen"]["max"] == 5001


def test_what_is_not_checked_is_not_called_clean(tokenizer):
    truncation = ["prompt too long", "identical after truncation", "completion cut"]
    for options, unchecked in [
        ((), ["identical tokens", *truncation, "prompt also held out"]),
        ((tokenizer, None, HELD_OUT), truncation),
        ((tokenizer, 50, HELD_OUT), []),
    ]:
        report = audit(GOOD, *options)
        assert sorted(report.unchecked) == sorted(unchecked)
        assert not set(unchecked) & {*report.dropped, *report.noted}
        assert ("not checked for want of arguments" in str(report)) is bool(unchecked)


def test_kept_and_dropped_are_all_rows_in_any_order(tokenizer):
    order = random.Random(0).sample(range(len(ROWS)), len(ROWS))
    report = audit(ROWS, tokenizer, 9, HELD_OUT)
    shuffled = audit([ROWS[i] for i in order], tokenizer, 9, HELD_OUT)
    dropped = [row for numbers in report.dropped.values() for row in numbers]
    assert len(dropped) == len(set(dropped)) == len(ROWS) - report.kept
    back = {name: sorted(order[row - 1] + 1 for row in n) for name, n in found(shuffled).items()}
    assert back == found(report) and shuffled.lengths == report.lengths


def test_what_cannot_be_used_is_reported_and_only_an_empty_set_is_refused(tmp_path):
    path = tmp_path / "dirty.jsonl"
    path.write_bytes(json.dumps(GOOD[0]).encode() + b'\n{"prompt"\n{"prompt": "Tr\xe9"}\n[1]\n')
    expected = {"broken row": [2], "invalid UTF-8": [3], "not an object": [4]}
    assert found(audit(path)) == expected and audit(path).kept == 1
    report = audit([pair("Why?", None, "b")])
    assert (report.kept, report.lengths, report.length_only) == (0, {}, {})
    assert audit(["text"]).dropped == {"not an object": [1]}
    with pytest.raises(PreferenceDataError, match="it holds no rows"):
        audit([])


def test_the_command_names_columns_and_ends_with_2_where_it_cannot_read(tmp_path, capsys):
    path = tmp_path / "own.csv"
    path.write_text("Question,Best Answer,Worst\nWhy?,So.,No.\n")
    own = {"prompt": "Question", "chosen": "Best Answer", "rejected": "Worst"}
    for held_out in ([pair("WHY?", "x", "y")], path):  # the mapping is for files
        report = audit(path, held_out=held_out, columns=own)
        assert report.noted["prompt also held out"] == [1]
    main([str(path), *(f"--column={ours}={theirs}" for ours, theirs in own.items())])
    assert "1 rows read = 1 kept" in capsys.readouterr().out
    for file, told in ((path, "columns={'prompt': 'your name for it'"), ("no.csv", "no such file")):
        with pytest.raises(SystemExit, match="2"):
            main([str(file)])
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1 and told in err


def test_the_command_takes_a_tokenizer_a_length_and_held_out_pairs(tmp_path, capsys):
    rows = [{"prompt": f"Why {i}?", "chosen": "So it is." * i, "rejected": "No."} for i in (1, 9)]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    more = ["--tokenizer", str(ASSETS / "tiny"), "--max-length", "24", "--held-out", str(path)]
    main([str(path), *more])
    out = capsys.readouterr().out
    assert re.search(r"completion cut +1 +rows 2", out) and "tokens" in out
    assert re.search(r"prompt also held out +2 +rows 1, 2", out)
    main([str(path), *more, "--json"])
    noted = json.loads(capsys.readouterr().out)["noted"]
    assert noted["prompt also held out"] == {"count": 2, "rows": [1, 2]}
