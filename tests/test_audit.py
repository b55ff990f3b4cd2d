"""The audit: every count by hand, kept + dropped = read, the same report in any order and under any hash seed."""

import json
import math
import os
import random
import subprocess
import sys

import pytest
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import dpo_utils.audit
from dpo_utils.audit import main
from dpo_utils.data import PreferenceDataError, audit, load_preferences


def pair(prompt, chosen, rejected):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


# One fault a row, named where it is counted; the good rows have lengths that are easy to count.
DIRTY = [
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
    (pair("What is eleven?", "\udcff", "b"), "lone surrogate"),
    (pair("What is red?", "dup", "other"), "duplicate pair"),
    (pair("what IS red?", "Dup", "other"), "duplicate pair"),
    (pair("What is blue?", "x1", "x2"), "conflicting pair"),
    (pair("What is  blue?", "x2", "x1"), "conflicting pair"),
    (pair("What is held out?", "cc", "dd"), "prompt also held out"),
    (pair("What is the end?", "it</s>", "this!!"), "end-of-text marker"),
]
HELD_OUT = [pair("what is HELD out?", "x", "y")]
GOOD = [row for row, _ in DIRTY[:3]]


@pytest.fixture(scope="module")
def tokenizer():
    """One token a word; words it does not know are all the same token."""
    words = ["<|end|>", "<unk>", "Instruct", "Output", ":", "What", "is", "yes", "no", "one", "two"]
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", unk_token="<unk>")


def found(report) -> dict[str, list[int]]:
    return {name: rows for part in (report.dropped, report.noted) for name, rows in part.items() if rows}


def test_every_finding_has_its_rows():
    report = audit([row for row, _ in DIRTY], held_out=HELD_OUT)
    expected = {}
    for number, (_, name) in enumerate(DIRTY, 1):
        if name:
            expected.setdefault(name, []).append(number)
    assert found(report) == expected
    assert (report.rows, report.kept, report.pairs, report.prompts) == (17, 9, 9, 7)


def test_lengths_and_the_length_only_baseline_by_hand():
    report = audit(GOOD)
    assert report.length_only == {"characters": 0.5}  # (1 + 0 + 1/2) / 3
    lengths = report.lengths["characters"]
    assert lengths["chosen"] == {"min": 1, "median": 2.0, "mean": 2.33, "p95": 3.8, "max": 4}
    assert lengths["rejected"]["mean"] == 2.33 and lengths["prompt"]["max"] == 14
    assert audit(GOOD[:1]).length_only["characters"] == 1 and audit(GOOD[1:2]).length_only["characters"] == 0


def test_messages_are_measured_by_their_content():
    row = pair(
        [{"role": "user", "content": "Why?"}], [{"role": "assistant", "content": "So."}], [{"role": "assistant", "content": "No!!"}]
    )
    assert [side["max"] for side in audit([row]).lengths["characters"].values()] == [4, 3, 4]


def test_ranked_rows_count_missing_and_tied_scores():
    def ranked(scores):
        return {"prompt": f"Rank {scores}?", "responses": ["a", "b", "c"], "scores": scores}

    report = audit([ranked([3, 2, 1]), ranked([2, 2, 1]), ranked([1, 1, 1]), ranked([1, None, 2]), ranked([1, 2])])
    assert found(report) == {"tied scores": [3], "missing score": [4, 5], "some scores tied": [2]}
    assert (report.rows, report.kept, report.pairs) == (5, 2, 5)


def test_tokens_are_counted_apart_from_text(tokenizer):
    # "Instruct: What is one?\nOutput:" is 8 tokens: Instruct : What is one <unk> Output :
    report = audit(
        [
            pair("What is one?", "yes", "no"),  # 8 + 2 with EOS
            pair("What is one?", "strange", "unknown"),  # both <unk>
            pair("What is one?", "yes yes yes yes", "yes yes yes no"),  # alike in 3 tokens
            pair("What is one?", "yes no yes no", "no"),  # cut, still different
            pair("What is one? two two two", "yes", "no"),  # 11: no room
            pair("What is one?", "yes <|end|>", "no"),
            pair("What is one?", "yes yes", "no"),  # 11: just fits
        ],
        tokenizer,
        max_length=11,
    )
    assert found(report) == {
        "identical tokens": [2],
        "identical after truncation": [3],
        "completion cut": [4],
        "prompt too long": [5],
        "end-of-text marker": [6],
    }
    assert (report.kept, report.rows) == (3, 7)
    assert report.lengths["tokens"]["prompt"] == {"min": 8, "median": 8.0, "mean": 8.0, "p95": 8.0, "max": 8}
    assert report.lengths["tokens"]["chosen"]["max"] == 5 and report.length_only["tokens"] == 2.5 / 3


def test_what_is_not_checked_is_not_called_clean(tokenizer):
    truncation = ["prompt too long", "identical after truncation", "completion cut"]
    for options, unchecked in [
        ({}, ["identical tokens", *truncation, "prompt also held out"]),
        ({"tokenizer": tokenizer, "held_out": HELD_OUT}, truncation),
        ({"tokenizer": tokenizer, "max_length": 50, "held_out": HELD_OUT}, []),
    ]:
        report = audit(GOOD, **options)
        assert report.unchecked == unchecked
        assert not set(unchecked) & {*report.dropped, *report.noted}
        assert str(report).count("(needs") == len(unchecked)


def test_without_max_length_nothing_is_cut(tokenizer):
    report = audit([pair("What is one?", "yes " * 5000, "no")], tokenizer)
    assert found(report) == {} and report.lengths["tokens"]["chosen"]["max"] == 5001


def test_a_ranked_row_is_dropped_only_when_no_pair_is_left(tokenizer):
    row = {"prompt": "What is one?", "responses": ["yes", "strange", "unknown"], "scores": [3, 2, 1]}
    report = audit([row], tokenizer)
    assert (report.kept, report.pairs, found(report)) == (1, 2, {})


def random_rows(seed: int) -> list[dict]:
    """Rows from a small alphabet, so that every kind of fault and repeat comes up."""
    rng = random.Random(seed)
    answers = ["yes", "no", "YES", " yes ", "one two", "two one yes", "strange", "", None, 3, "it</s>", "a\0"]
    prompts = ["What is one?", "what is ONE?", "What is two?", "two two two two", "", None]
    return [pair(rng.choice(prompts), rng.choice(answers), rng.choice(answers)) for _ in range(60)]


@pytest.mark.parametrize("seed", range(5))
def test_kept_and_dropped_are_all_rows_in_any_order(tokenizer, seed):
    rows = random_rows(seed)
    order = random.Random(seed).sample(range(len(rows)), len(rows))
    held_out = [pair("WHAT is two?", "a", "b")]
    report = audit(rows, tokenizer, 9, held_out)
    shuffled = audit([rows[i] for i in order], tokenizer, 9, held_out)
    dropped = [row for numbers in report.dropped.values() for row in numbers]
    assert len(dropped) == len(set(dropped)) and report.kept + len(dropped) == report.rows == 60
    assert len(found(report)) >= 8
    back = {name: sorted(order[row - 1] + 1 for row in numbers) for name, numbers in found(shuffled).items()}
    assert back == found(report)
    for field in ("kept", "pairs", "prompts", "lengths", "length_only"):
        assert getattr(shuffled, field) == getattr(report, field), field


def test_the_audit_agrees_with_the_loader(tmp_path):
    rows = [row for row, _ in DIRTY]
    loaded = load_preferences(rows, on_error="skip", quarantine=tmp_path / "q.jsonl")
    aside = [json.loads(line) for line in (tmp_path / "q.jsonl").read_text().splitlines()]
    report = audit(rows)
    assert len(loaded) == report.pairs
    assert {(record["reason"], record["row"]) for record in aside} == {
        (name, row) for name, numbers in report.dropped.items() for row in numbers
    }
    assert found(audit(loaded)).keys() == {"duplicate pair", "conflicting pair", "end-of-text marker"}


def test_a_file_is_read_leniently(tmp_path):
    path = tmp_path / "dirty.jsonl"
    path.write_bytes(json.dumps(GOOD[0]).encode() + b'\n{"prompt"\n"Tr\xe9e"\n[1]\n')
    report = audit(path)
    assert found(report) == {"broken row": [2], "invalid UTF-8": [3], "wrong type": [4]} and report.kept == 1


def test_a_data_set_with_nothing_left_is_still_reported(tmp_path):
    report = audit([pair("Why?", None, "b")])
    assert (report.kept, report.lengths, report.length_only) == (0, {}, {}) and "1 dropped" in str(report)
    assert audit(["text"]).dropped["wrong type"] == [1]
    with pytest.raises(PreferenceDataError, match="it holds no rows"):
        audit([])


def test_columns_name_the_files_own(tmp_path, capsys):
    path = tmp_path / "own.csv"
    path.write_text("Question,Best Answer,Worst\nWhy?,So.,No.\n")
    mapped = {"prompt": "Question", "chosen": "Best Answer", "rejected": "Worst"}
    assert audit(path, columns=mapped).kept == 1
    assert main(["audit", str(path), *(f"--column={ours}={own}" for ours, own in mapped.items())]) == 0
    assert main(["audit", str(path)]) == 2
    assert "columns={'prompt': 'your name for it'" in capsys.readouterr().err


def test_held_out_needs_not_have_the_same_columns(tmp_path):
    path = tmp_path / "own.csv"
    path.write_text("Question,Best Answer,Worst\nWhy?,So.,No.\n")
    report = audit(
        path, held_out=[pair("WHY?", "x", "y")], columns={"prompt": "Question", "chosen": "Best Answer", "rejected": "Worst"}
    )
    assert report.noted["prompt also held out"] == [1]


def test_the_command_prints_the_same_under_any_hash_seed(tmp_path):
    path = tmp_path / "dirty.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in random_rows(0)))
    command = [sys.executable, "-m", "dpo_utils.data", "audit", str(path), "--json"]
    outputs = {
        subprocess.run(command, env=os.environ | {"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1
    report = json.loads(outputs.pop())
    assert report["rows"] == 60 == report["kept"] + sum(part["count"] for part in report["dropped"].values())


def test_the_table_can_be_read():
    lines = str(audit(Dataset.from_list(GOOD))).splitlines()
    assert lines[0] == "rows in memory: 3 rows read = 3 kept + 0 dropped; 3 pairs on 3 prompts"
    assert "duplicate pair" in " ".join(lines[1:5]) and lines[1].startswith("  none: ")
    assert lines[-1] == "  characters: the longer answer is the chosen one in 0.500 of the pairs"
    table = str(audit([row for row, _ in DIRTY]))
    assert "  dropped missing value                    2  rows 5, 6" in table
    assert dpo_utils.audit.row_list(list(range(1, 9))) == "rows 1, 2, 3, 4, 5, 6, 7, 8"
    assert dpo_utils.audit.row_list(list(range(1, 10))) == "rows 1, 2, 3, 4, 5, 6, 7, 8 ..."


def test_a_file_that_is_not_there_ends_the_command_with_one_line(capsys):
    assert main(["audit", "none.jsonl"]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and "no such file" in captured.err
