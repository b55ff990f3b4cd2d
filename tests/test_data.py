"""Loading: every source, every schema, every kind of bad row, and the split by prompt."""

import gzip
import json
import math
import random
from pathlib import Path
from unittest.mock import Mock

import pandas as pd
import pyarrow.parquet
import pytest
from datasets import Dataset, DatasetDict

from dpo_utils import rows
from dpo_utils.audit import audit
from dpo_utils.data import (
    PreferenceDataError,
    columns_asked_for,
    fold,
    load_demonstrations,
    load_preferences,
    prompt_key,
    split_by_prompt,
    training_data,
)
from dpo_utils.profiles import load_profile

GOOD = [
    {"prompt": f"Question {n}?", "chosen": f"True answer {n}", "rejected": f"False answer {n}"}
    for n in (1, 2, 3)
]


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


BROUGHT = [json.loads(line) for line in (Path(__file__).parent / "brought.jsonl").open("rb")]
Q, A, B = user("q"), assistant("a"), assistant("b")
TALK = {"prompt": [user("Hi")], "chosen": [assistant("A")], "rejected": [assistant("B")]}


def write(path: Path, records) -> Path:
    """A .jsonl or .csv file of the records."""
    if path.suffix == ".csv":
        pd.DataFrame(records).to_csv(path, index=False)
    else:
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def refused(source, load=load_preferences, **options) -> str:
    """The message with which a source is refused: one line, always."""
    with pytest.raises(PreferenceDataError) as error:
        load(source, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_json_jsonl_csv_and_parquet_give_the_same_rows(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(GOOD))
    (tmp_path / "b.json").write_text(json.dumps({"data": GOOD}))
    write(tmp_path / "c.jsonl", GOOD)
    write(tmp_path / "d.csv", GOOD)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(GOOD), tmp_path / "e.parquet")
    for source in (*tmp_path.iterdir(), str(tmp_path / "a.json"), GOOD, Dataset.from_list(GOOD)):
        loaded = load_preferences(source)
        assert loaded.column_names == ["prompt", "chosen", "rejected"] and loaded.to_list() == GOOD
    write(tmp_path / "c.jsonl", GOOD[:2])  # a changed file is read anew
    assert len(load_preferences(tmp_path / "c.jsonl")) == 2


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "json"])
def test_bom_crlf_and_blank_lines_change_nothing(tmp_path, suffix):
    records = [GOOD[0] | {"chosen": "two\nlines"}, *GOOD[1:]]
    path = write(tmp_path / f"pairs.{suffix}", records)
    if suffix == "json":
        path.write_text(json.dumps(records, indent=1))
    text = path.read_bytes().replace(b"\r\n", b"\n").replace(b"\n", b"\r\n")
    path.write_bytes(b"\xef\xbb\xbf" + text + b"\r\n\r\n")
    assert load_preferences(path).to_list() == records


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_answers_that_look_like_something_else_stay_text(tmp_path, suffix):
    answers = {"NA": "None", "nan": "null", "2020-01-01": "1990-12-31", "1.0": "long " * 40_000}
    records = [{"prompt": f"{a}?", "chosen": a, "rejected": b} for a, b in answers.items()]
    assert load_preferences(write(tmp_path / f"a.{suffix}", records)).to_list() == records


def test_columns_maps_a_files_own_names(tmp_path):
    own = {"Question": "Why?", "Best Answer": "So.", "Worst": "No.", "Source": "s"}
    path = write(tmp_path / "own.csv", [own])
    mapped = {"prompt": "Question", "chosen": "Best Answer", "rejected": "Worst"}
    expected = [{"prompt": "Why?", "chosen": "So.", "rejected": "No."}]
    assert load_preferences(path, columns=mapped).to_list() == expected
    write(path, [own | {"Worst": ""}])
    assert f"{path}, row 1 (line 2), column 'Worst': blank" in refused(path, columns=mapped)
    row = {"prompt": "Why?", "chosen": "No.", "rejected": "x", "better": "So."}
    swapped = {"chosen": "better", "rejected": "chosen"}  # the mapping wins
    assert load_preferences([row], columns=swapped).to_list() == expected
    row = {"question": "Why?", "answer_0": "So.", "answer_1": "No.", "score_0": 0, "score_1": 1}
    mapped = {"prompt": "question", "chosen": "answer_0", "rejected": "answer_1"}
    assert load_preferences([row])["chosen"] == ["No."]  # also over another schema
    assert load_preferences([row], columns=mapped).to_list() == expected


def test_keep_carries_extra_columns():
    rows = [row | {"topic": "t"} for row in GOOD]
    loaded = load_preferences(rows, keep=("topic",))
    assert loaded.to_list() == rows and loaded.column_names[-1] == "topic"
    assert "'topc'" in refused(rows, keep=("topc",))
    rows[1]["topic"] = "Tr\udce9e"
    assert "row 2, column 'topic': invalid UTF-8" in refused(rows, keep=("topic",))


def test_bundled_sets_load():
    tiny, held_out = load_preferences("tiny"), load_preferences("tiny", split="test")
    assert len(tiny) > 100 and tiny.column_names == ["prompt", "chosen", "rejected"]
    assert not {prompt_key(p) for p in tiny["prompt"]} & {prompt_key(p) for p in held_out["prompt"]}
    assert load_demonstrations("tiny").column_names == ["prompt", "completion"]
    assert len(load_preferences("misconceptions", keep=("topic",))) >= 240
    assert len(load_demonstrations("instructions")) > 100


@pytest.mark.parametrize("kind", [ConnectionError, ValueError, RuntimeError])
def test_a_hub_id_goes_to_the_hub_and_what_it_refuses_is_told_in_one_line(monkeypatch, kind):
    monkeypatch.setattr(rows, "load_dataset", hub := Mock(side_effect=kind("Not\nthere")))
    asked = {"split": "train_prefs", "revision": "abc"}
    assert "Not there. Connect once" in refused("owner/name", **asked)
    hub.assert_called_with("owner/name", **asked)


def test_sources_that_are_not_there_are_refused(tmp_path):
    assert "no such file" in refused(tmp_path / "none.jsonl")
    assert "no such file" in refused("data/none.csv")  # though it looks like a hub id
    (tmp_path / "a.xlsx").write_text("x")
    assert "Give a .json .jsonl .csv .parquet file" in refused(tmp_path / "a.xlsx")
    (tmp_path / "b.parquet").write_text("x")
    assert "b.parquet: cannot be read, " in refused(tmp_path / "b.parquet")
    assert "Use split_by_prompt" in refused(write(tmp_path / "c.jsonl", GOOD), split="test")


def test_truthy_dpo_keeps_system_turns():
    bare = {"id": "0f1", "prompt": "Is it?", "chosen": "Yes.", "rejected": "No."}
    row = bare | {"system": "Be fair."}
    loaded = load_preferences([row, row | {"system": ""}, row | {"system": None}, bare])
    answers = {"chosen": [assistant("Yes.")], "rejected": [assistant("No.")]}
    system = {"role": "system", "content": "Be fair."}
    asked = [[system, user("Is it?")], *[[user("Is it?")]] * 3]
    assert loaded.to_list() == [{"prompt": prompt} | answers for prompt in asked]
    talk = row | {side: [user("Is it?"), *answers[side]] for side in answers}
    assert load_preferences([talk]).to_list() == loaded.to_list()[:1]


def test_hh_rlhf_prompt_is_the_shared_beginning(capsys):
    talk = "\n\nHuman: Hi\n\nAssistant: Hello!\n\nHuman: Help me?\n\nAssistant:"
    early = [f"\n\nHuman: Hi\n\nAssistant: {a}\n\nHuman: Go\n\nAssistant: {a}" for a in "ab"]
    rows = [{"chosen": talk + " Of course.", "rejected": talk + " No."}]
    rows += [{"chosen": early[0], "rejected": early[1]}]
    expected = {"prompt": [user("Hi"), assistant("Hello!"), user("Help me?")]}
    expected |= {"chosen": [assistant("Of course.")], "rejected": [assistant("No.")]}
    assert load_preferences(rows).to_list() == [expected]
    assert "2 rows read, 1 kept, 1 dropped (1 diverged early)" in capsys.readouterr().out
    assert "identical, found 'No.'" in refused([rows[0] | {"chosen": talk + " No."}])
    assert "not a transcript, found 'Yes.'" in refused([{"chosen": "Yes.", "rejected": "No."}])


def test_ultrafeedback_messages_and_scores():
    talks = {side: [user("Why?"), assistant(side)] for side in ("chosen", "rejected")}
    row = {"prompt": "Why?", **talks, "score_chosen": 8.0, "score_rejected": 6.5, "messages": []}
    loaded = load_preferences([row, row | {"score_rejected": 8.0}]).to_list()
    answers = {side: [assistant(side)] for side in ("chosen", "rejected")}
    assert loaded == [{"prompt": [user("Why?")]} | answers]
    assert "scores contradict, found [6.0, 6.5]" in refused([row | {"score_chosen": 6.0}])
    assert "missing score, found [None, 6.5]" in refused([row | {"score_chosen": None}])


def test_webgpt_prefers_the_higher_score_and_drops_ties(capsys):
    row = {"question": {"id": "q1", "full_text": "Why is the sky blue?"}, "quotes_0": {"title": []}}
    row |= {"answer_0": "Magic.", "score_0": -0.5, "answer_1": "Scattering [1].", "score_1": 0.5}
    better = {"prompt": "Why is the sky blue?", "chosen": "Scattering [1].", "rejected": "Magic."}
    assert load_preferences([row, row | {"score_0": 0.5}]).to_list() == [better]
    assert "2 rows read, 1 kept, 1 dropped (1 tied scores)" in capsys.readouterr().out


def test_arena_votes(capsys):
    row = {"model_a": "m", "model_b": "n", "winner": "model_b", "turn": 1}
    row |= {f"conversation_{side.lower()}": [user("Hi"), assistant(side)] for side in "AB"}
    longer = {key: [*row[key], user("More"), assistant("C")] for key in row if key[0] == "c"}
    votes = ("model_b", "model_a", "tie", "tie (bothbad)")
    loaded = load_preferences([row | {"winner": vote} for vote in votes] + [row | longer])
    swapped = {"prompt": [user("Hi")], "chosen": [assistant("B")], "rejected": [assistant("A")]}
    assert loaded.to_list() == [swapped, TALK]
    assert "3 dropped (1 diverged early, 2 tied scores)" in capsys.readouterr().out
    assert "'winner': missing score, found 'model_c'" in refused([row | {"winner": "model_c"}])


def test_ranked_answers_give_a_pair_for_every_strict_gap():
    row = {"prompt": "Why?", "responses": ["a", "b", "c", "d"], "scores": [3, 2, 2, 1]}
    pairs = [pair["chosen"] + pair["rejected"] for pair in load_preferences([row])]
    assert pairs == ["ab", "ac", "ad", "bd", "cd"]
    assert "no row is left of 1" in refused([row | {"scores": [1] * 4}])


@pytest.mark.parametrize("scores", [[1, None], [1, math.nan], [1], [1, "2"], [1, True], None, 3])
def test_ranked_scores_must_be_there(scores):
    told = f"rows in memory, row 1, column 'scores': missing score, found {scores}"
    assert told in refused([{"prompt": "Why?", "responses": ["a", "b"], "scores": scores}])


def test_instruction_and_input_are_joined():
    row = {"instruction": "Correct.", "input": "He go.", "output": "x"}
    row |= {"chosen": "y", "rejected": "z"}
    rows = [row, row | {"input": " "}, row | {"input": None}, row | {"input": math.nan}]
    asked = ["Correct.\n\nHe go.", *["Correct."] * 3]
    assert load_preferences(rows)["prompt"] == asked == load_demonstrations(rows)["prompt"]
    assert "column 'input': wrong type, found 7 (int)" in refused([row | {"input": 7}])


def test_demonstrations_in_four_forms():
    expected = [{"prompt": "Sum up.\n\nLong text.", "completion": "Short."}]
    dolly = {"instruction": "Sum up.", "context": "Long text.", "response": "Short.", "id": 1}
    alpaca = {"instruction": "Sum up.", "input": "Long text.", "output": "Short."}
    for source in ([dolly], [alpaca], expected):
        assert load_demonstrations(source).to_list() == expected
    talk = [{"role": "system", "content": "Be kind."}, user("Hi"), assistant("Hello!")]
    loaded = load_demonstrations([{"messages": talk}]).to_list()
    assert loaded == [{"prompt": talk[:2], "completion": talk[2:]}]
    message = refused([{"messages": talk[:2]}], load_demonstrations)
    assert "row 1, column 'completion': bad turns" in message


@pytest.mark.parametrize(
    "change, told",
    [
        ({"chosen": [user("A")]}, "column 'chosen': bad turns, found ['user']"),
        ({"chosen": [assistant("A"), assistant("C")]}, "column 'chosen': bad turns"),
        ({"prompt": [user("Hi"), assistant("So")]}, "column 'prompt': bad turns"),
        ({"prompt": [{"role": "robot", "content": "Hi"}]}, "bad turns, found ['robot']"),
        ({"chosen": [assistant(None)]}, "column 'chosen': missing value"),
        ({"chosen": []}, "column 'chosen': blank"),
        ({"chosen": "A"}, "mixed forms"),
        ({"chosen": [assistant("B")]}, "identical"),
    ],
)
def test_bad_messages_are_refused_and_good_ones_lose_only_extra_keys(change, told):
    assert load_preferences([TALK | {"prompt": [user("Hi") | {"name": "x"}]}]).to_list() == [TALK]
    assert told in refused([TALK | change])


def test_text_among_messages_is_refused_wherever_it_is():
    assert "row 1, column 'prompt': mixed forms" in refused([GOOD[0], TALK, TALK])
    assert "row 3, column 'prompt': mixed forms" in refused([TALK, TALK, GOOD[0]])


BAD = [
    ({"chosen": None}, "missing value, found None (NoneType)"),
    ({"chosen": math.nan}, "missing value, found nan (float)"),
    ({"chosen": 42}, "wrong type, found 42 (int)"),
    ({"chosen": ["a", "b"]}, "wrong type, found ['a', 'b'] (list)"),
    ({"prompt": {"text": "a"}}, "wrong type, found {'text': 'a'} (dict)"),
    ({"rejected": ""}, "blank, found '' (str)"),
    ({"chosen": "\u200b \t\u3000\n\ufeff"}, "blank"),
    ({"chosen": "a\0b"}, "NUL character, found 'a\\x00b' (str)"),
    ({"prompt": "a\ud800"}, "lone surrogate, found 'a\\ud800' (str)"),
    ({"rejected": "True answer 2"}, "identical, found 'True answer 2' (str)"),
]


@pytest.mark.parametrize("change, told", BAD)
def test_a_bad_cell_is_named_by_file_row_line_column_and_remedy(tmp_path, change, told):
    path = write(tmp_path / "pairs.jsonl", [GOOD[0], GOOD[1] | change, GOOD[2]])
    message, (column,) = refused(path), change
    assert message.startswith(f"{path}, row 2 (line 2), column {column!r}: {told}")
    remedy = rows.REMEDIES.get(told.split(",")[0], "Correct or remove it")
    assert f'{remedy}; 1 bad of 3 rows. on_error="skip" sets them aside' in message


def short(value) -> str:
    """A text, or messages as u:question a:answer."""
    told = [f"{turn['role'][0]}:{turn['content']}" for turn in value if isinstance(turn, dict)]
    return value if isinstance(value, str) else " ".join(told)


@pytest.mark.parametrize("case", BROUGHT, ids=lambda case: case["what"])
def test_what_people_bring_is_read_or_refused_by_row_or_named(case, capsys):
    row = case["row"]
    if "error" in case:
        assert "row 1, column" in (message := refused([row])) and case["error"] in message
        return
    (pair,) = load_preferences([row])
    unused = [f"not used: {case['unused']}"] if "unused" in case else []
    said = [f"rows in memory: {name}, though 1 rows hold something there" for name in unused]
    assert capsys.readouterr().out.splitlines() == said
    assert {n: r for n, r in audit([row]).noted.items() if "used" in n} == dict.fromkeys(
        unused, [1]
    )
    assert unused or " ".join(map(short, pair.values())) == case["pair"]


def test_the_shared_beginning_is_the_one_that_trl_takes():
    extract = pytest.importorskip("trl.data_utils").maybe_extract_prompt
    rows = [{"chosen": [Q, A, Q, A], "rejected": [Q, A, Q, B]}]
    rows += [{"prompt": "q", "chosen": [Q, A], "rejected": [Q, B]}]
    assert load_preferences(rows).to_list() == [extract(row) for row in rows]


def test_tool_calls_are_kept_as_they_are():
    def call(given):
        named = dict(type="function", function=dict(name="f", arguments=given))
        return dict(role="assistant", content="", tool_calls=[named])

    said = [Q, call(dict(x=1)), dict(role="tool", content="4", name="f"), Q]
    row = dict(prompt=said, chosen=[call(dict(city="Oslo"))], rejected=[call(dict(y=[1]))])
    written = [call('{"city": "Oslo"}') | dict(content=None)]  # OpenAI's own form
    assert load_preferences([row, row | dict(chosen=written)]).to_list() == [row, row]
    assert "identical" in refused([row | dict(rejected=row["chosen"])])
    calls = {"from": "function_call", "value": '{"name": "f", "arguments": {}}'}
    assert load_demonstrations([{"conversations": [{"from": "human", "value": "q"}, calls]}])[0][
        "completion"
    ] == [call({})]


def test_labels_written_as_text_are_labels():
    votes = {"False": False, "true": True, "0": False, 1: True, "👎": False, "thumbs_up": True}
    rows = [dict(messages=[Q, A], kto_tag=vote) for vote in votes]
    assert load_demonstrations(rows, keep=("label",))["label"][:] == list(votes.values())
    for value in ("maybe", None, 2):
        told = refused(rows + [dict(rows[0], kto_tag=value)], load_demonstrations, keep=("label",))
        assert "row 7, column 'kto_tag': not a label, found" in told


def test_every_source_gives_the_same_rows(tmp_path, monkeypatch, capsys):
    data, folder, saved = Dataset.from_list(GOOD), tmp_path / "own/shards", tmp_path / "saved"
    folder.mkdir(parents=True)
    files = [write(folder / f"{n}.jsonl", [row]) for n, row in enumerate(GOOD)]
    data.save_to_disk(saved)
    DatasetDict(train=data, test=data.select([0])).save_to_disk(tmp_path / "both")
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress("\n".join(map(json.dumps, GOOD)).encode()))
    pd.DataFrame(GOOD).to_csv(tmp_path / "b.csv.gz", index=False)
    pd.DataFrame(GOOD).to_csv(tmp_path / "c.tsv", sep="\t", index=False)
    pd.DataFrame(GOOD).to_csv(tmp_path / "d.csv", sep=";", index=False, encoding="utf-16")
    (tmp_path / "e.jsonl").write_text(json.dumps(GOOD, indent=1))
    (folder / "0.jsonl.quarantine.jsonl").write_text("{}")
    monkeypatch.chdir(tmp_path)
    memory = [data, DatasetDict(train=data), pd.DataFrame(GOOD), iter(GOOD)]
    named = [
        folder,
        "own/shards",
        "own/shards/*.jsonl",
        f"{folder}/?.jsonl",
        saved,
        "saved",
        "both",
    ]
    named += [files, list(map(str, files)), f"{folder}/"]
    for source in memory + named + sorted(tmp_path.glob("?.*")):
        assert load_preferences(source).to_list() == GOOD, source
    assert len(load_preferences("both", split="test")) == 1
    hole = pd.DataFrame(GOOD).convert_dtypes().mask(pd.Series([False, True, False]), axis=0)
    assert "row 2, column 'prompt': missing value, found None" in refused(hole)
    assert "no split 'x', only train, test. Pass split=" in refused("both", split="x")
    files[1].write_text("{")
    assert "own/shards, row 2 (1.jsonl line 1): broken row" in refused("own/shards")
    write(folder / "other.csv", GOOD)
    refused(folder)
    assert "not read, of another kind or configuration: other.csv" in capsys.readouterr().out
    (tmp_path / "f.jsonl.gz").write_bytes(b"\x1f\x8b")
    assert "f.jsonl.gz: cannot be read, " in refused("f.jsonl.gz")


def test_a_configuration_is_named_behind_a_colon(tmp_path, monkeypatch):
    configs = "".join(f"- config_name: {n}\n  data_files: {n}.jsonl\n" for n in "ab")
    (tmp_path / "own/set").mkdir(parents=True)
    (tmp_path / "own/set/README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    for n in (0, 1):
        write(tmp_path / f"own/set/{'ab'[n]}.jsonl", GOOD[n : n + 1])
    monkeypatch.chdir(tmp_path)
    for source, name in ((f"{tmp_path}/own/set:b", None), ("own/set:b", None), ("own/set", "b")):
        assert load_preferences(source, name=name).to_list() == GOOD[1:2]
    for source in ("own/set", "own/set:c"):
        assert "['a', 'b']" in (told := refused(source)) and "owner/name:configuration" in told
    monkeypatch.setattr(rows, "load_dataset", hub := Mock(return_value=Dataset.from_list(GOOD)))
    assert len(load_preferences("owner/name:b")) == 3
    hub.assert_called_with("owner/name", "b", split="train", revision=None)


def test_the_data_of_every_profile_loads_as_it_is_shipped(tmp_path, monkeypatch):
    def talk(question, answer):
        return f"\n\nHuman: {question}\n\nAssistant: {answer}"

    towns = [(talk(f"Town {n}?", "North."), talk(f"Town {n}?", "?")) for n in range(9)]
    hh = [{"chosen": chosen, "rejected": rejected} for chosen, rejected in towns]
    hh[2]["chosen"], hh[3]["chosen"] = talk("Town 2?", ""), talk("Town 3?", "A") + talk("And?", "B")
    truthy = dict(id="0f", source="x", system="", prompt="Is it?", chosen="No.", rejected="Yes.")
    dolly = dict(instruction="Why?", context="", response="So.", category="open_qa")
    shipped = hh, [truthy, truthy | {"prompt": "Why?", "system": "S"}], [dolly]
    files = [write(tmp_path / f"{n}.jsonl", records) for n, records in enumerate(shipped)]
    monkeypatch.setenv("DPO_ON_ERROR", "skip")
    monkeypatch.setenv("DPO_QUARANTINE", str(tmp_path / "aside.jsonl"))
    profile = load_profile("phi2", dataset=str(files[0]), sft_dataset=str(files[2]))
    assert list(map(len, training_data("dpo", profile))) == [6, 1]
    assert json.loads((tmp_path / "aside.jsonl").read_text())["row"] == 3
    assert training_data("sft", profile)[0].to_list() == [dict(prompt="Why?", completion="So.")]
    assert [len(load_preferences(file)) for file in files[:2]] == [7, 2]
    with pytest.raises(PreferenceDataError, match="row 3 .*blank.*DPO_ON_ERROR=skip"):
        training_data("dpo", profile, on_error="raise")


def test_misspelt_names_are_suggested(tmp_path):
    typo = {"promt": "Why?", "Chosen": "So.", "rejected": "No."}
    path, near = write(tmp_path / "typo.csv", [typo]), {"prompt": "promt", "chosen": "Chosen"}
    assert f"no column 'prompt', 'chosen'; the columns are {sorted(typo)}" in refused(path)
    assert f"pass columns={near}" in refused(path)
    assert load_preferences(path, columns=near)["chosen"] == ["So."]
    assert f"columns={near}" in refused(path, columns=near | {"prompt": "prompts"})
    assert "columns={'prompt': 'promt'}" in refused([{"promt": "?", "chosen": "", "rejected": ""}])


def test_own_names_of_columns_come_from_the_environment(monkeypatch, tmp_path):
    own = [{"Question": f"Why {i}?", "Best Answer": "So.", "Worst": "No."} for i in range(5)]
    path = write(tmp_path / "mine.csv", own)
    mine = load_profile("tiny", dataset=str(path))
    with pytest.raises(PreferenceDataError, match="DPO_COLUMNS='prompt=[^,]+,chosen=[^,]+,r"):
        training_data("dpo", mine)
    monkeypatch.setenv("DPO_COLUMNS", "prompt=Question,chosen=Best Answer,rejected=Worst")
    train, held_out = training_data("dpo", mine)
    assert (len(train), len(held_out), train[0]["chosen"]) == (4, 1, "So.")
    monkeypatch.setenv("DPO_COLUMNS", "prompt=a, b, chosen = c,rejected=d=e")  # commas in a name
    assert columns_asked_for() == {"prompt": "a, b", "chosen": "c", "rejected": "d=e"}
    with pytest.raises(PreferenceDataError, match="no column"):  # what is said in code wins
        training_data("dpo", mine, columns={"prompt": "Question"})
    monkeypatch.setenv("DPO_COLUMNS", "Question")
    with pytest.raises(ValueError, match="DPO_COLUMNS: 'Question' is not OURS=THEIRS"):
        training_data("dpo", mine)


def test_invalid_utf8_is_named_by_row_and_column(tmp_path):
    lines = [json.dumps(row).encode() for row in GOOD]
    array = b"[" + b",".join(lines) + b"]"
    table = write(tmp_path / "c.csv", GOOD).read_bytes()
    for name, text in (("a.jsonl", b"\n".join(lines)), ("b.json", array), ("c.csv", table)):
        (tmp_path / name).write_bytes(text.replace(b"True answer 2", b"Tr\xe9e"))
        told = "column 'chosen': invalid UTF-8, found 'Tr\\udce9e'"
        assert "row 2" in (message := refused(tmp_path / name)) and told in message


@pytest.mark.parametrize(
    "name, text, told",
    [
        ("a.jsonl", '\n{"prompt": "Why?", \n', "row 1 (line 2): broken row, found 'Expecting"),
        ("a.jsonl", '"text"\n', "row 1 (line 1): not an object, found 'text' (str)"),
        ("a.jsonl", "[" * 100_000, "broken row"),
        ("a.json", '[\n{"prompt": "a",\n "chosen" "b"}]', "delimiter: line 3 column 11"),
        ("a.json", '{"a": 1}\n{"a": 1}', "one object a line is .jsonl"),
        ("a.json", '{"rows": []}', "it holds no array of rows"),
        ("a.csv", "a,b,c\nd,e\n", "row 2 (line 3): not as many cells as columns, found ['d', 'e']"),
        ("a.csv", 'a,"\nb",c\nd,e,,\n', "row 2 (line 4): not as many cells as columns, found ['d'"),
        ("a.csv", 'q,"c"d,e\nr,a,b\n', "(str). Correct or remove it; 1 bad of 2 rows"),
        ("a.csv", "", "empty, it holds no rows"),
        ("b.csv", "", "empty, it holds no rows"),
        ("b.jsonl", "", "empty, it holds no rows"),
        ("b.json", "", "Expecting value"),
        ("b.parquet", "", "0 bytes"),
        ("a.csv", 'a,b,c\nd,"e,f\ng,h,i\n', "after row 1: cannot be read, unexpected end of data"),
        ("b.csv", "prompt,chosen,chosen\na,b,c\n", "two columns have one name"),
    ],
)
def test_a_broken_file_is_named_by_row_and_line(tmp_path, name, text, told):
    head = "prompt,chosen,rejected\n" if name == "a.csv" else ""
    (tmp_path / name).write_text(head + text)
    assert told in refused(tmp_path / name)


def test_skip_sets_bad_rows_aside_with_reasons(tmp_path, capsys):
    dirty = [GOOD[0], *(GOOD[1] | change for change, _ in BAD), GOOD[2]]
    path = write(tmp_path / "pairs.jsonl", dirty)
    with path.open("a", encoding="utf-8") as file:
        file.write('{"prompt"\n')
    assert load_preferences(path, on_error="skip").to_list() == [GOOD[0], GOOD[2]]
    quarantine = tmp_path / "pairs.jsonl.quarantine.jsonl"
    aside = [json.loads(line) for line in quarantine.read_text(encoding="utf-8").splitlines()]
    assert [record["row"] for record in aside] == [*range(2, len(BAD) + 2), len(BAD) + 3]
    assert [r["reason"] for r in aside] == [*(told.split(",")[0] for _, told in BAD), "broken row"]
    assert [record["column"] for record in aside] == [*(next(iter(bad)) for bad, _ in BAD), None]
    assert aside[2]["data"] == GOOD[1] | {"chosen": 42} and aside[-1]["data"] == '{"prompt"\n'
    told = f"{len(BAD) + 3} rows read, 2 kept, {len(BAD) + 1} dropped"
    assert told in (out := capsys.readouterr().out) and str(quarantine) in out


def test_skip_writes_where_it_is_told(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [GOOD[0], GOOD[1] | {"chosen": None}]
    load_preferences(rows, on_error="skip", quarantine=tmp_path / "here.jsonl")
    load_preferences(rows, on_error="skip")
    assert Path("here.jsonl").read_text() == Path("rows_in_memory.quarantine.jsonl").read_text()
    nowhere = tmp_path / "no" / "folder.jsonl"
    assert "Pass quarantine=" in refused(rows, on_error="skip", quarantine=nowhere)


def test_fold_by_hand():
    assert fold("  Ｗhat\u00a0is\n\tITS Straße? ") == "what is its strasse?"
    assert fold("ﬁve \u1e9b\u0323") == "five \u1e69"
    for text in ("ẞ", "İx", "ſt", "ǰ", "Å", "½", "\u0345\u0301", "ϓ"):
        assert fold(fold(text)) == fold(text)
    system = {"role": "system", "content": "Be brief."}
    assert prompt_key([system, user("Why  NOT?")]) == prompt_key("why not?")


def many() -> list[dict]:
    """60 prompts, each in three spellings."""
    asked = [(f"{i} {j}", f"Question number {i}?") for i in range(60) for j in range(3)]
    spellings = {"0": str, "1": str.upper, "2": lambda text: f" {text}\u00a0"}
    return [{"prompt": spellings[row[-1]](text), "row": row} for row, text in asked]


def test_split_by_prompt_keeps_spellings_together():
    train, test = split_by_prompt(Dataset.from_list(many()), held_out=0.2)
    assert (len(train), len(test)) == (144, 36)  # 48 and 12 prompts, three rows each
    assert not {fold(p) for p in train["prompt"]} & {fold(p) for p in test["prompt"]}


def test_split_by_prompt_depends_on_prompts_and_seed_alone():
    def held_out(rows, **options):
        return set(split_by_prompt(Dataset.from_list(rows), **options)[1]["row"])

    prompts = (6, 7, 11, 14, 22, 25, 26, 28, 30, 38, 40, 44)
    expected = {f"{i} {j}" for i in prompts for j in range(3)}
    assert held_out(many()) == held_out(random.Random(0).sample(many(), 180)) == expected
    assert held_out(many(), seed=1) != expected


def test_split_by_prompt_always_leaves_both_sides():
    two = Dataset.from_list(GOOD[:2])
    assert [len(d) for share in (0.01, 0.99) for d in split_by_prompt(two, share)] == [1] * 4
    with pytest.raises(PreferenceDataError, match="one distinct prompt"):
        split_by_prompt(Dataset.from_list(GOOD[:1]))
    with pytest.raises(ValueError, match="between 0 and 1"):
        split_by_prompt(two, held_out=1)
