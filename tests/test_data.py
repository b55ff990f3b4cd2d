"""Loading: every source, every schema, every kind of bad row, the split by prompt."""

import csv
import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from datasets import Dataset

from dpo_utils import rows as rows_module
from dpo_utils.data import (
    ASSETS,
    PreferenceDataError,
    fold,
    load_demonstrations,
    load_preferences,
    prompt_key,
    split_by_prompt,
)
from dpo_utils.profiles import load_profile
from dpo_utils.train import training_data

GOOD = [{"prompt": f"Question {n}?", "chosen": f"True answer {n}", "rejected": f"False answer {n}"} for n in (1, 2, 3)]
SHARED = os.environ.get("DPO_SHARED_DATA")
needs_shared = pytest.mark.skipif(not SHARED, reason="set DPO_SHARED_DATA to the folder of real data")


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def write_jsonl(path: Path, records) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def write_csv(path: Path, records) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(records[0]))
        writer.writeheader()
        writer.writerows(records)
    return path


def refused(source, **options) -> str:
    """The message with which a source is refused: one line, always."""
    with pytest.raises(PreferenceDataError) as error:
        load_preferences(source, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


# ---- sources ----


def test_json_jsonl_csv_and_parquet_give_the_same_rows(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(GOOD))
    (tmp_path / "b.json").write_text(json.dumps({"data": GOOD}))
    write_jsonl(tmp_path / "c.jsonl", GOOD)
    write_csv(tmp_path / "d.csv", GOOD)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(GOOD), tmp_path / "e.parquet")
    for path in sorted(tmp_path.iterdir()):
        for source in (path, str(path)):
            loaded = load_preferences(source)
            assert loaded.column_names == ["prompt", "chosen", "rejected"] and loaded.to_list() == GOOD, path


def test_rows_in_memory_load_too():
    assert load_preferences(GOOD).to_list() == load_preferences(Dataset.from_list(GOOD)).to_list() == GOOD


@pytest.mark.parametrize("name", ["pairs.jsonl", "pairs.csv", "pairs.json"])
def test_bom_crlf_and_blank_lines_change_nothing(tmp_path, name):
    records = [GOOD[0] | {"chosen": "two\nlines"}, *GOOD[1:]]
    path = tmp_path / name
    if name.endswith("csv"):
        write_csv(path, records)
    elif name.endswith("jsonl"):
        write_jsonl(path, records)
    else:
        path.write_text(json.dumps(records, indent=1))
    text = path.read_bytes().replace(b"\r\n", b"\n")
    path.write_bytes(b"\xef\xbb\xbf" + text.replace(b"\n", b"\r\n") + b"\r\n\r\n")
    assert load_preferences(path).to_list() == records


def test_words_that_look_like_missing_values_are_answers(tmp_path):
    records = [
        {"prompt": "Symbol of sodium?", "chosen": "NA", "rejected": "None"},
        {"prompt": "A Danish place?", "chosen": "nan", "rejected": "null"},
    ]
    assert load_preferences(write_csv(tmp_path / "na.csv", records)).to_list() == records


def test_columns_maps_a_files_own_names(tmp_path):
    path = write_csv(
        tmp_path / "own.csv",
        [{"Type": "x", "Question": "Why?", "Best Answer": "So.", "Best Incorrect Answer": "No.", "Source": "s"}],
    )
    mapped = {"prompt": "Question", "chosen": "Best Answer", "rejected": "Best Incorrect Answer"}
    expected = [{"prompt": "Why?", "chosen": "So.", "rejected": "No."}]
    assert load_preferences(path, columns=mapped).to_list() == expected
    row = {"prompt": "Why?", "chosen": "No.", "rejected": "x", "better": "So."}  # the mapping wins
    assert load_preferences([row], columns={"chosen": "better", "rejected": "chosen"}).to_list() == expected


def test_keep_carries_extra_columns():
    loaded = load_preferences([row | {"topic": "t"} for row in GOOD], keep=("topic",))
    assert loaded.column_names == ["prompt", "chosen", "rejected", "topic"] and set(loaded["topic"]) == {"t"}
    assert "'topc'" in refused([row | {"topic": "t"} for row in GOOD], keep=("topc",))


def test_bundled_sets_load():
    tiny = load_preferences("tiny")
    assert len(tiny) > 100 and tiny.column_names == ["prompt", "chosen", "rejected"]
    held_out = load_preferences("tiny", split="test")
    assert not {prompt_key(p) for p in tiny["prompt"]} & {prompt_key(p) for p in held_out["prompt"]}
    assert load_demonstrations("tiny").column_names == ["prompt", "completion"]


@pytest.mark.skipif(not (ASSETS / "misconceptions.jsonl").exists(), reason="misconceptions.jsonl is not written yet")
def test_misconceptions_load():
    assert len(load_preferences("misconceptions", keep=("topic",))) >= 240


def test_a_hub_id_goes_to_the_hub_with_its_split_and_revision(monkeypatch):
    asked = []

    def fake(name, split, revision):
        asked.append((name, split, revision))
        return Dataset.from_list(GOOD)

    monkeypatch.setattr(rows_module, "load_dataset", fake)
    assert load_preferences("owner/name", split="train_prefs", revision="a" * 40).to_list() == GOOD
    assert asked == [("owner/name", "train_prefs", "a" * 40)]


@pytest.mark.parametrize(
    "error, told",
    [
        (ConnectionError("Couldn't reach 'owner/name' on the Hub (OfflineModeIsEnabled)"), "use a local file"),
        (ValueError("Unknown split \"train\". Should be one of ['train_prefs']."), "train_prefs"),
        (RuntimeError("Dataset scripts are no longer supported"), "refs/convert/parquet"),
    ],
)
def test_what_the_hub_refuses_is_told_in_one_line(monkeypatch, error, told):
    def fake(*_, **__):
        raise error

    monkeypatch.setattr(rows_module, "load_dataset", fake)
    message = refused("owner/name")
    assert message.startswith("owner/name") and told in message


def test_offline_without_a_cache_says_what_to_do(tmp_path):
    code = "from dpo_utils.data import load_preferences; load_preferences('jondurbin/truthy-dpo-v0.1')"
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60)
    last = run.stderr.strip().splitlines()[-1]
    assert "PreferenceDataError: jondurbin/truthy-dpo-v0.1: not in the cache" in last and "use a local file" in last


# ---- schemas ----


def test_truthy_dpo_keeps_system_turns():
    row = {
        "id": "0f1",
        "source": "truthy_dpo",
        "system": "You are an unbiased assistant.",
        "prompt": "Is it?",
        "chosen": "It is.",
        "rejected": "It is not.",
    }
    loaded = load_preferences([row, row | {"system": "", "prompt": "Was it?"}]).to_list()
    assert loaded[0]["prompt"] == [{"role": "system", "content": "You are an unbiased assistant."}, user("Is it?")]
    assert loaded[1] == {"prompt": [user("Was it?")], "chosen": [assistant("It is.")], "rejected": [assistant("It is not.")]}


def test_hh_rlhf_prompt_is_the_shared_beginning():
    talk = "\n\nHuman: Hi\n\nAssistant: Hello!\n\nHuman: Help me?\n\nAssistant:"
    loaded = load_preferences([{"chosen": talk + " Of course.", "rejected": talk + " No."}]).to_list()
    assert loaded == [
        {
            "prompt": [user("Hi"), assistant("Hello!"), user("Help me?")],
            "chosen": [assistant("Of course.")],
            "rejected": [assistant("No.")],
        }
    ]


def test_hh_rlhf_twice_the_same_transcript_is_an_identical_pair():
    talk = "\n\nHuman: Hi\n\nAssistant: Hello!"
    assert "identical, found 'Hello!'" in refused([{"chosen": talk, "rejected": talk}])


def test_hh_rlhf_conversations_that_part_early_are_counted_drops(capsys):
    talk = "\n\nHuman: Hi\n\nAssistant:"
    rows = [
        {"chosen": talk + " A", "rejected": talk + " B"},
        {side: f"{talk} {side}\n\nHuman: More\n\nAssistant: {side}" for side in ("chosen", "rejected")},
    ]
    assert len(load_preferences(rows)) == 1
    assert "2 rows read, 1 kept, 1 dropped (1 parted early)" in capsys.readouterr().out


def test_text_without_a_prompt_column_is_not_taken_for_a_transcript():
    assert "opens with \\n\\nHuman:" in refused([{"chosen": "Yes.", "rejected": "No."}])


def test_ultrafeedback_messages_and_scores(capsys):
    row = {
        "prompt": "Why?",
        "prompt_id": "p",
        "chosen": [user("Why?"), assistant("So.")],
        "rejected": [user("Why?"), assistant("No.")],
        "messages": [user("Why?"), assistant("So.")],
        "score_chosen": 8.0,
        "score_rejected": 6.5,
    }
    loaded = load_preferences([row, row | {"score_rejected": 8.0}]).to_list()
    assert loaded == [{"prompt": [user("Why?")], "chosen": [assistant("So.")], "rejected": [assistant("No.")]}]
    assert "1 tied scores" in capsys.readouterr().out
    assert "scores contradict, found 6.0 and 6.5" in refused([row | {"score_chosen": 6.0}])
    assert "missing score" in refused([row | {"score_chosen": None}])


def test_webgpt_prefers_the_higher_score_and_drops_ties(capsys):
    row = {
        "question": {"dataset": "eli5", "id": "q1", "full_text": "Why is the sky blue?"},
        "quotes_0": {"title": [], "extract": []},
        "answer_0": "Magic.",
        "tokens_0": {"prefix": [], "completion": []},
        "score_0": -0.5,
        "quotes_1": {"title": [], "extract": []},
        "answer_1": "Scattering [1].",
        "tokens_1": {"prefix": [], "completion": []},
        "score_1": 0.5,
    }
    loaded = load_preferences([row, row | {"score_0": 0.0, "score_1": 0.0}]).to_list()
    assert loaded == [{"prompt": "Why is the sky blue?", "chosen": "Scattering [1].", "rejected": "Magic."}]
    assert "2 rows read, 1 kept, 1 dropped (1 tied scores)" in capsys.readouterr().out


def test_arena_votes(capsys):
    row = {
        "question_id": "q",
        "model_a": "m",
        "model_b": "n",
        "winner": "model_b",
        "judge": "arena_user_1",
        "conversation_a": [user("Hi"), assistant("A")],
        "conversation_b": [user("Hi"), assistant("B")],
        "turn": 1,
        "anony": True,
        "language": "English",
        "tstamp": 1.0,
    }
    longer = {side: row[side] + [user("More"), assistant("C")] for side in ("conversation_a", "conversation_b")}
    rows = [row, row | {"winner": "model_a"}, row | {"winner": "tie"}, row | {"winner": "tie (bothbad)"}, row | longer]
    loaded = load_preferences(rows).to_list()
    assert [(pair["chosen"], pair["rejected"]) for pair in loaded] == [
        ([assistant("B")], [assistant("A")]),
        ([assistant("A")], [assistant("B")]),
    ]
    assert loaded[0]["prompt"] == [user("Hi")]
    assert "5 rows read, 2 kept, 3 dropped (1 parted early, 2 tied scores)" in capsys.readouterr().out
    assert "row 1, column 'winner': unknown label, found 'model_c'" in refused([row | {"winner": "model_c"}])


def test_ranked_answers_give_a_pair_for_every_strict_gap():
    row = {"prompt": "Why?", "responses": ["good", "fair", "also fair", "bad"], "scores": [3, 2, 2, 1]}
    pairs = [(pair["chosen"], pair["rejected"]) for pair in load_preferences([row])]
    assert pairs == [("good", "fair"), ("good", "also fair"), ("good", "bad"), ("fair", "bad"), ("also fair", "bad")]


@pytest.mark.parametrize(
    "scores, told",
    [
        ([1, None], "missing score, found None"),
        ([1, math.nan], "missing score, found nan"),
        ([1], "found 2 responses and 1 scores"),
        ([1, "2"], "missing score, found '2' (str)"),
        ([1, True], "missing score, found True (bool)"),
        (None, "missing value"),
        (3, "wrong type, found 3 (int)"),
    ],
)
def test_ranked_scores_must_be_there(scores, told):
    message = refused([{"prompt": "Why?", "responses": ["a", "b"], "scores": scores}])
    assert message.startswith("rows in memory, row 1, column 'scores': ") and told in message


def test_a_data_set_of_ties_alone_is_refused():
    assert "no row is left of 1" in refused([{"prompt": "Why?", "responses": ["a", "b"], "scores": [1, 1]}])


def test_instruction_and_input_are_joined():
    row = {"instruction": "Correct this.", "input": "He go.", "output": "He goes.", "chosen": "He goes.", "rejected": "No."}
    loaded = load_preferences([row, row | {"input": ""}, row | {"input": None}]).to_list()
    assert [pair["prompt"] for pair in loaded] == ["Correct this.\n\nHe go.", "Correct this.", "Correct this."]
    assert "column 'input': wrong type, found 7 (int)" in refused([row | {"input": 7}])


def test_conversational_rows_stay_and_lose_only_extra_keys():
    row = {"prompt": [user("Hi") | {"name": "x"}], "chosen": [assistant("A")], "rejected": [assistant("B")]}
    assert load_preferences([row]).to_list() == [row | {"prompt": [user("Hi")]}]


@pytest.mark.parametrize(
    "change, told",
    [
        ({"chosen": [user("A")]}, "column 'chosen': bad turns, found the roles ['user']"),
        ({"chosen": [assistant("A"), assistant("C")]}, "column 'chosen': bad turns"),
        ({"prompt": [user("Hi"), assistant("So")]}, "column 'prompt': bad turns"),
        ({"prompt": [{"role": "human", "content": "Hi"}]}, "column 'prompt': bad turns, found the roles ['human']"),
        ({"prompt": [{"role": ["user"], "content": "Hi"}]}, "column 'prompt': bad turns"),
        ({"chosen": [assistant(None)]}, "column 'chosen': missing value"),
        ({"chosen": [assistant(" ")]}, "column 'chosen': blank"),
        ({"chosen": []}, "column 'chosen': blank"),
        ({"chosen": "A"}, "mixed forms"),
        ({"chosen": [assistant("B")]}, "identical"),
    ],
)
def test_bad_messages_are_refused(change, told):
    row = {"prompt": [user("Hi")], "chosen": [assistant("A")], "rejected": [assistant("B")]}
    assert told in refused([row | change])


def test_text_among_messages_is_refused_wherever_it_stands():
    talk = [{"prompt": [user(str(n))], "chosen": [assistant("A")], "rejected": [assistant("B")]} for n in range(3)]
    assert "row 1: mixed forms, found text where most rows hold messages" in refused([GOOD[0], *talk])
    assert "row 4: mixed forms" in refused([*talk, GOOD[0]])


def test_demonstrations_in_four_forms():
    dolly = {"instruction": "Sum up.", "context": "Long text.", "response": "Short.", "category": "summarization"}
    alpaca = {"instruction": "Sum up.", "input": "Long text.", "output": "Short."}
    expected = [{"prompt": "Sum up.\n\nLong text.", "completion": "Short."}]
    assert load_demonstrations([dolly]).to_list() == load_demonstrations([alpaca]).to_list() == expected
    assert load_demonstrations(expected).to_list() == expected
    talk = [{"role": "system", "content": "Be kind."}, user("Hi"), assistant("Hello!")]
    assert load_demonstrations([{"messages": talk}]).to_list() == [{"prompt": talk[:2], "completion": talk[2:]}]
    with pytest.raises(PreferenceDataError, match="row 1, column 'completion': bad turns"):
        load_demonstrations([{"messages": talk[:2]}])


# ---- bad rows ----

BAD = [
    ({"chosen": None}, "missing value, found None (NoneType)"),
    ({"chosen": math.nan}, "missing value, found nan (float)"),
    ({"chosen": 42}, "wrong type, found 42 (int)"),
    ({"chosen": True}, "wrong type, found True (bool)"),
    ({"chosen": ["a", "b"]}, "wrong type, found ['a', 'b'] (list)"),
    ({"chosen": {"text": "a"}}, "wrong type, found {'text': 'a'} (dict)"),
    ({"chosen": ""}, "blank, found '' (str)"),
    ({"chosen": " \t\u3000\n"}, "blank"),
    ({"chosen": "\u200b \ufeff"}, "blank"),
    ({"chosen": "a\0b"}, "NUL character, found 'a\\x00b' (str)"),
    ({"chosen": "a\ud800"}, "lone surrogate, found 'a\\ud800' (str)"),
    ({"rejected": "True answer 2"}, "identical, found 'True answer 2' (str)"),
    ({"rejected": " TRUE  answer ２"}, "identical after folding"),
]


@pytest.mark.parametrize("change, told", BAD)
def test_a_bad_cell_is_named_by_file_row_line_column_and_fix(tmp_path, change, told):
    path = write_jsonl(tmp_path / "pairs.jsonl", [GOOD[0], GOOD[1] | change, GOOD[2]])
    message, column = refused(path), next(iter(change))
    assert message.startswith(f"{path}, row 2 (line 2), column {column!r}: {told}")
    assert rows_module.REASONS[told.split(",")[0]] in message and 'on_error="skip"' in message


@pytest.mark.parametrize("field", ["prompt", "chosen", "rejected"])
def test_every_column_is_looked_at(field):
    assert f"row 3, column {field!r}: wrong type" in refused([*GOOD[:2], GOOD[2] | {field: 1.5}])


def test_the_files_own_column_is_named(tmp_path):
    path = write_csv(tmp_path / "own.csv", [{"Q": "Why?", "A": "So.", "B": ""}])
    message = refused(path, columns={"prompt": "Q", "chosen": "A", "rejected": "B"})
    assert message.startswith(f"{path}, row 1 (line 2), column 'B': blank")


def test_a_misspelt_key_in_one_row_is_named():
    row = {"prompt": "Why?", "chosn": "So.", "rejected": "No."}
    assert "row 2, column 'chosen': missing value, found no such key but 'chosn'" in refused([GOOD[0], row])


def test_misspelt_columns_are_suggested(tmp_path):
    path = write_csv(tmp_path / "typo.csv", [{"promt": "Why?", "Chosen": "So.", "rejected": "No."}])
    message = refused(path)
    assert "no column 'prompt', 'chosen'" in message
    assert "columns={'prompt': 'promt', 'chosen': 'Chosen'}" in message
    assert load_preferences(path, columns={"prompt": "promt", "chosen": "Chosen"})["chosen"] == ["So."]
    assert "Did you mean 'promt'?" in refused(path, columns={"prompt": "PROMPTS", "chosen": "Chosen"})
    write_csv(path, [{"promt": "Why?", "chosen": "So.", "REJECTED": "No."}])
    assert "columns={'prompt': 'promt', 'rejected': 'REJECTED'}" in refused(path)
    write_csv(path, [{"promt": "Why?", "chosen": "So.", "rejected": "No."}])
    assert "columns={'prompt': 'promt'}" in refused(path)


def test_columns_win_over_a_schema_of_the_same_file():
    row = {"question": "Why?", "answer_0": "So.", "answer_1": "No.", "score_0": 0, "score_1": 1}
    mapped = {"prompt": "question", "chosen": "answer_0", "rejected": "answer_1"}
    assert load_preferences([row])["chosen"] == ["No."] and load_preferences([row], columns=mapped)["chosen"] == ["So."]


def test_invalid_utf8_names_the_line(tmp_path):
    lines = [json.dumps(row).encode() for row in GOOD]
    lines[1] = lines[1].replace(b"True", b"Tr\xe9e")
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    (tmp_path / "b.json").write_bytes(b"[\n" + b",\n".join(lines) + b"]")
    text = write_csv(tmp_path / "c.csv", GOOD).read_bytes().replace(b"True answer 2", b"Tr\xe9e")
    (tmp_path / "c.csv").write_bytes(text)
    assert "row 2 (line 2): invalid UTF-8, byte 0xe9" in refused(tmp_path / "a.jsonl")
    assert "invalid UTF-8, byte 0xe9 at position" in (message := refused(tmp_path / "b.json")) and "line 3" in message
    assert "row 2 (line 3): invalid UTF-8, on line 3" in refused(tmp_path / "c.csv")


def test_a_broken_json_line_is_named(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(GOOD[0]) + '\n{"prompt": "Why?", \n' + json.dumps(GOOD[2]))
    assert "row 2 (line 2): broken row, not JSON on line 2" in refused(path)
    path.write_text("\n" + json.dumps(GOOD[0]) + "\n\n{}")
    assert "row 2 (line 4), column 'prompt': missing value" in refused(path)
    (tmp_path / "b.json").write_text('[\n{"prompt": "a",\n "chosen" "b"}]')
    assert "broken JSON" in (message := refused(tmp_path / "b.json")) and "line 3" in message
    write_jsonl(tmp_path / "c.json", GOOD)
    assert "name it .jsonl" in refused(tmp_path / "c.json")
    (tmp_path / "d.jsonl").write_text('"text"\n[1]\n')
    assert "row 1 (line 1): wrong type, found 'text' (str) where an object" in refused(tmp_path / "d.jsonl")
    (tmp_path / "e.json").write_text('{"rows": []}')
    assert "holds an array of rows" in refused(tmp_path / "e.json")
    (tmp_path / "f.jsonl").write_text("[" * 100_000)
    assert "broken row" in refused(tmp_path / "f.jsonl")


def test_broken_csv_is_named_by_line(tmp_path):
    head, path = "prompt,chosen,rejected\n", tmp_path / "a.csv"
    path.write_text(head + "a,b,c\nd,e\n")
    assert "row 2 (line 3): broken row, 2 cells under 3 columns" in refused(path)
    path.write_text(head + 'a,"b\nstill b",c\nd,"e"x,f\n')
    assert "row 2 (line 4): broken row, lines 4 to 4" in refused(path)
    path.write_text(head + 'a,b,c\nd,"e,f\ng,h,i\n')
    assert "line 3: unexpected end of data" in refused(path, on_error="skip")
    path.write_text("prompt,chosen,chosen\na,b,c\n")
    assert "two columns have one name" in refused(path)


def test_a_long_csv_cell_is_read_whole(tmp_path):
    path = write_csv(tmp_path / "long.csv", [GOOD[0] | {"chosen": "long " * 40_000}])
    assert len(load_preferences(path)[0]["chosen"]) == 200_000


def test_an_empty_file_is_refused(tmp_path):
    for name, text in [
        ("a.json", ""),
        ("b.json", "[]"),
        ("c.jsonl", ""),
        ("d.jsonl", "\n \n"),
        ("e.csv", ""),
        ("f.csv", "prompt,chosen,rejected\n"),
        ("g.parquet", ""),
    ]:
        (tmp_path / name).write_text(text)
        assert "empty, it holds no rows" in refused(tmp_path / name), name


def test_sources_that_are_not_there_are_refused(tmp_path):
    assert "no such file" in refused(tmp_path / "none.jsonl")
    assert "no such file" in refused("data/none.csv")  # a path that looks like a hub id
    assert "Did you mean 'misconceptions'" in refused("misconception")
    (tmp_path / "a.xlsx").write_text("x")
    assert "suffix '.xlsx' is none of .json, .jsonl, .csv, .parquet" in refused(tmp_path / "a.xlsx")
    (tmp_path / "b.parquet").write_text("x")
    assert "not a readable parquet file" in refused(tmp_path / "b.parquet")
    assert "Use split_by_prompt" in refused(write_jsonl(tmp_path / "c.jsonl", GOOD), split="test")
    with pytest.raises(ValueError, match="use 'raise' or 'skip'"):
        load_preferences(GOOD, on_error="ignore")


def test_skip_sets_bad_rows_aside_with_reasons(tmp_path, capsys):
    path = write_jsonl(tmp_path / "pairs.jsonl", [GOOD[0], *(GOOD[1] | change for change, _ in BAD), GOOD[2]])
    with path.open("ab") as file:
        file.write(b'{"prompt": "Tr\xe9e"}\n{"prompt"\n')
    assert load_preferences(path, on_error="skip").to_list() == [GOOD[0], GOOD[2]]
    aside = [json.loads(line) for line in (tmp_path / "pairs.jsonl.quarantine.jsonl").read_text().splitlines()]
    assert [record["row"] for record in aside] == [*range(2, len(BAD) + 2), len(BAD) + 3, len(BAD) + 4]
    reasons = [told.split(",")[0] for _, told in BAD]
    assert [record["reason"] for record in aside] == [*reasons, "invalid UTF-8", "broken row"]
    assert aside[2]["data"] == GOOD[1] | {"chosen": 42} and aside[-1]["data"] == '{"prompt"\n'
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and f"{len(BAD) + 4} rows read, 2 kept, {len(BAD) + 2} dropped" in out


def test_skip_writes_where_it_is_told(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [GOOD[0], GOOD[1] | {"chosen": None}]
    load_preferences(rows, on_error="skip", quarantine=tmp_path / "here.jsonl")
    load_preferences(rows, on_error="skip")
    assert (tmp_path / "here.jsonl").read_text() == (tmp_path / "rows_in_memory.quarantine.jsonl").read_text()
    assert "Pass quarantine=" in refused(rows, on_error="skip", quarantine=tmp_path / "no" / "folder.jsonl")


def test_skip_that_leaves_nothing_is_refused(tmp_path):
    path = write_jsonl(tmp_path / "pairs.jsonl", [row | {"chosen": ""} for row in GOOD])
    assert "no row is left of 3" in refused(path, on_error="skip")


# ---- folding and the split ----


def test_fold_by_hand():
    assert fold("  Ｗhat\u00a0is\n\tITS Straße? ") == "what is its strasse?"
    assert fold("ﬁve \u1e9b\u0323") == "five \u1e69"
    for text in ("ẞ", "İx", "ſt", "ǰ", "Å", "½", "\u0345\u0301", "ϓ"):
        assert fold(fold(text)) == fold(text)


def test_prompt_key_leaves_system_turns_out():
    system = {"role": "system", "content": "Be brief."}
    assert prompt_key([system, user("Why  NOT?")]) == prompt_key([user("why not?")]) == prompt_key("Why not?")


def many(n: int = 60) -> list[dict]:
    """n prompts, each in three spellings."""
    spellings = (str, str.upper, lambda text: f" {text}\u00a0")
    return [
        {"prompt": spell(f"Question number {i}?"), "chosen": f"yes {i} {j}", "rejected": "no"}
        for i in range(n)
        for j, spell in enumerate(spellings)
    ]


def test_split_by_prompt_keeps_spellings_together():
    train, test = split_by_prompt(Dataset.from_list(many()), held_out=0.2)
    assert (len(train), len(test)) == (144, 36)  # 48 and 12 prompts, three rows each
    assert not {fold(p) for p in train["prompt"]} & {fold(p) for p in test["prompt"]}


def test_split_by_prompt_ignores_row_order():
    rows = many()
    expected = {row["chosen"] for row in split_by_prompt(Dataset.from_list(rows))[1]}
    for seed in range(5):
        shuffled = random.Random(seed).sample(rows, len(rows))
        assert {row["chosen"] for row in split_by_prompt(Dataset.from_list(shuffled))[1]} == expected
    assert {row["chosen"] for row in split_by_prompt(Dataset.from_list(rows), seed=1)[1]} != expected


def test_split_by_prompt_ignores_the_hash_seed():
    code = (
        "from datasets import Dataset; from dpo_utils.data import split_by_prompt\n"
        "rows = [{'prompt': f'q {i}'} for i in range(40)]\n"
        "print(split_by_prompt(Dataset.from_list(rows))[1]['prompt'][:])"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code], env=os.environ | {"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1 and outputs.pop().count("q ") == 8


def test_split_by_prompt_always_leaves_both_sides():
    two = Dataset.from_list(GOOD[:2])
    assert [len(side) for share in (0.01, 0.99) for side in split_by_prompt(two, share)] == [1, 1, 1, 1]
    with pytest.raises(PreferenceDataError, match="one distinct prompt"):
        split_by_prompt(Dataset.from_list(GOOD[:1]))
    with pytest.raises(ValueError, match="between 0 and 1"):
        split_by_prompt(two, held_out=1)


# ---- real files ----


@needs_shared
def test_polite_rows():
    path = Path(SHARED) / "polite" / "instruction-data-with-preference.json"
    assert "row 123, column 'rejected': identical" in refused(path)
    assert len(load_demonstrations(path)) == 1100


@needs_shared
def test_truthfulqa_csv():
    mapped = {"prompt": "Question", "chosen": "Best Answer", "rejected": "Best Incorrect Answer"}
    loaded = load_preferences(Path(SHARED) / "truthfulqa" / "TruthfulQA_part.csv", columns=mapped)
    assert len(loaded) == 407 and loaded[0]["rejected"] == "Fortune cookies originated in Japan"


def test_own_names_of_columns_come_from_the_environment(monkeypatch, tmp_path):
    path = tmp_path / "mine.csv"
    path.write_text("Question,Best Answer,Worst\n" + "".join(f"Why {i}?,So.,No.\n" for i in range(5)))
    mine = load_profile("tiny", dataset=str(path))
    with pytest.raises(PreferenceDataError, match=r"in the notebooks, set DPO_COLUMNS='prompt=[^,]+,chosen=[^,]+,rejected=[^,]+'"):
        training_data("dpo", mine)
    monkeypatch.setenv("DPO_COLUMNS", "prompt=Question,chosen=Best Answer,rejected=Worst")
    train, held_out = training_data("dpo", mine)
    assert (len(train), len(held_out), train[0]["chosen"], train[0]["rejected"]) == (4, 1, "So.", "No.")
    with pytest.raises(PreferenceDataError, match="no column"):  # what is said in code wins
        training_data("dpo", mine, columns={"prompt": "Question"})
    assert len(training_data("dpo", load_profile("tiny"))[0]) == 1200
    monkeypatch.setenv("DPO_COLUMNS", "Question")
    with pytest.raises(ValueError, match="DPO_COLUMNS='Question': write OURS=THEIRS"):
        training_data("dpo", mine)
