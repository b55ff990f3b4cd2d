"""The audit: every count by hand, kept + dropped = read, and the same report in any order."""

import json
import math
import os
import random
import subprocess
import sys

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dpo_utils.audit import audit, main
from dpo_utils.data import PreferenceDataError, load_preferences


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
    (pair("What is nine?", "same", " SAME"), "identical after folding"),
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
OWN = "Question,Best Answer,Worst\nWhy?,So.,No.\n"
MAPPED = {"prompt": "Question", "chosen": "Best Answer", "rejected": "Worst"}


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
    expected = {}
    for number, (_, name) in enumerate(DIRTY, 1):
        if name:
            expected.setdefault(name, []).append(number)
    assert found(report) == expected
    assert (report.rows, report.kept, report.pairs, report.prompts) == (17, 9, 9, 7)
    lines = str(report).splitlines()
    first = "rows in memory: 17 rows read = 9 kept + 8 dropped; 9 pairs on 7 prompts"
    assert (
        lines[0] == first and lines[1] == "  dropped missing value                    2  rows 5, 6"
    )
    many = audit([GOOD[0]] * 9).noted["duplicate pair"], str(audit([GOOD[0]] * 9))
    assert many[0] == [*range(1, 10)] and "rows 1, 2, 3, 4, 5, 6, 7, 8 ..." in many[1]


def test_lengths_and_the_length_only_baseline_by_hand():
    report = audit(GOOD)
    assert report.length_only == {"characters": 0.5}  # (1 + 0 + 1/2) / 3
    lengths = report.lengths["characters"]
    assert lengths["chosen"] == {"min": 1, "median": 2, "mean": 2.33, "p95": 3.8, "max": 4}
    assert lengths["rejected"]["mean"] == 2.33 and lengths["prompt"]["max"] == 14
    assert audit(GOOD[:1]).length_only["characters"] == 1
    last = "  characters: the longer answer is the chosen one in 0.500 of the pairs"
    assert str(report).splitlines()[-1] == last
    sides = (("user", "Why?"), ("assistant", "So."), ("assistant", "No!!"))
    talk = pair(*([{"role": role, "content": text}] for role, text in sides))
    assert [side["max"] for side in audit([talk]).lengths["characters"].values()] == [4, 3, 4]


def test_ranked_rows_count_missing_and_tied_scores():
    scores = [[3, 2, 1], [2, 2, 1], [1, 1, 1], [1, None, 2], [1, 2]]
    rows = [{"prompt": f"{s}?", "responses": ["a", "b", "c"], "scores": s} for s in scores]
    report = audit(rows)
    expected = {"tied scores": [3], "missing score": [4, 5], "some scores tied": [2]}
    assert found(report) == expected and (report.kept, report.pairs) == (2, 5)


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
    long = pair("What is one? two two two", "yes", "no")  # 11: no room for an answer
    report = audit([*rows, long], tokenizer, max_length=11)
    assert found(report) == {
        "identical tokens": [2],
        "identical after truncation": [3],
        "completion cut": [4],
        "end-of-text marker": [5],
        "prompt too long": [7],
    }
    assert (report.kept, report.rows, report.length_only["tokens"]) == (3, 7, 2.5 / 3)
    assert report.lengths["tokens"]["prompt"] == dict.fromkeys("min median mean p95 max".split(), 8)
    assert report.lengths["tokens"]["chosen"]["max"] == 5


def test_a_ranked_row_is_dropped_only_when_no_pair_is_left(tokenizer):
    row = {"prompt": "one?", "responses": ["yes", "strange", "unknown"], "scores": [3, 2, 1]}
    report = audit([row], tokenizer)
    assert (report.kept, report.pairs, found(report)) == (1, 2, {})


def test_without_max_length_nothing_is_cut(tokenizer):
    report = audit([pair("What is one?", "yes " * 5000, "no")], tokenizer)
    assert found(report) == {} and report.lengths["tokens"]["chosen"]["max"] == 5001


def test_what_is_not_checked_is_not_called_clean(tokenizer):
    truncation = ["prompt too long", "identical after truncation", "completion cut"]
    for options, unchecked in [
        ({}, ["identical tokens", *truncation, "prompt also held out"]),
        ({"tokenizer": tokenizer, "held_out": HELD_OUT}, truncation),
        ({"tokenizer": tokenizer, "max_length": 50, "held_out": HELD_OUT}, []),
    ]:
        report = audit(GOOD, **options)
        assert sorted(report.unchecked) == sorted(unchecked)
        assert not set(unchecked) & {*report.dropped, *report.noted}
        assert str(report).count("(needs") == len(unchecked)


def random_rows(seed: int) -> list[dict]:
    """Rows from a small alphabet, so that every kind of fault and repeat comes up."""
    rng = random.Random(seed)
    answers = ["yes", "no", "YES", " yes ", "one two", "two one yes", "strange", "", None, 3]
    answers += ["it</s>", "a\0"]
    prompts = ["What is one?", "what is ONE?", "What is two?", "two two two two", "", None]
    return [pair(rng.choice(prompts), rng.choice(answers), rng.choice(answers)) for _ in range(60)]


@pytest.mark.parametrize("seed", range(3))
def test_kept_and_dropped_are_all_rows_in_any_order(tokenizer, seed):
    rows, held_out = random_rows(seed), [pair("WHAT is two?", "a", "b")]
    order = random.Random(seed).sample(range(60), 60)
    report = audit(rows, tokenizer, 9, held_out)
    shuffled = audit([rows[i] for i in order], tokenizer, 9, held_out)
    dropped = [row for numbers in report.dropped.values() for row in numbers]
    assert len(dropped) == len(set(dropped)) == 60 - report.kept and len(found(report)) >= 8
    back = {
        name: sorted(order[row - 1] + 1 for row in rows) for name, rows in found(shuffled).items()
    }
    assert back == found(report)
    for field in ("kept", "pairs", "prompts", "lengths", "length_only"):
        assert getattr(shuffled, field) == getattr(report, field)


def test_the_audit_agrees_with_the_loader(tmp_path):
    loaded = load_preferences(ROWS, on_error="skip", quarantine=tmp_path / "q.jsonl")
    aside = [json.loads(line) for line in (tmp_path / "q.jsonl").read_text().splitlines()]
    report = audit(ROWS)
    assert len(loaded) == report.pairs
    dropped = {(name, row) for name, numbers in report.dropped.items() for row in numbers}
    assert {(record["reason"], record["row"]) for record in aside} == dropped
    notes = {"duplicate pair", "conflicting pair", "end-of-text marker"}
    assert found(audit(loaded)).keys() == notes


def test_what_cannot_be_used_is_reported_and_only_an_empty_set_is_refused(tmp_path):
    path = tmp_path / "dirty.jsonl"
    path.write_bytes(json.dumps(GOOD[0]).encode() + b'\n{"prompt"\n{"prompt": "Tr\xe9"}\n[1]\n')
    expected = {"broken row": [2], "missing value": [3], "wrong type": [4]}
    assert found(audit(path)) == expected and audit(path).kept == 1
    report = audit([pair("Why?", None, "b")])
    assert (report.kept, report.lengths, report.length_only) == (0, {}, {})
    assert "1 dropped" in str(report) and audit(["text"]).dropped["wrong type"] == [1]
    with pytest.raises(PreferenceDataError, match="it holds no rows"):
        audit([])


def test_the_file_and_the_held_out_set_may_name_their_columns_differently(tmp_path):
    path = tmp_path / "own.csv"
    path.write_text(OWN)
    report = audit(path, held_out=[pair("WHY?", "x", "y")], columns=MAPPED)
    assert report.noted["prompt also held out"] == [1]
    assert audit(path, held_out=path, columns=MAPPED).noted["prompt also held out"] == [1]


def test_the_command_names_columns_and_ends_with_2_where_it_cannot_read(tmp_path, capsys):
    path = tmp_path / "own.csv"
    path.write_text(OWN)
    assert main([str(path), *(f"--column={ours}={own}" for ours, own in MAPPED.items())]) == 0
    assert "1 rows read = 1 kept" in capsys.readouterr().out
    for file, told in ((path, "columns={'prompt': 'your name for it'"), ("no.csv", "no such file")):
        assert main([str(file)]) == 2
        captured = capsys.readouterr()
        assert captured.out == "" and captured.err.count("\n") == 1 and told in captured.err


def test_the_command_prints_the_same_json_under_any_hash_seed(tmp_path):
    path = tmp_path / "dirty.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in random_rows(0)))
    command, outputs = [sys.executable, "-m", "dpo_utils.audit", str(path), "--json"], set()
    for seed in ("1", "2"):
        environment = os.environ | {"PYTHONHASHSEED": seed}
        outputs.add(subprocess.check_output(command, env=environment, text=True))
    assert len(outputs) == 1
    report = json.loads(outputs.pop())
    dropped = sum(part["count"] for part in report["dropped"].values())
    assert report["rows"] == 60 == report["kept"] + dropped
