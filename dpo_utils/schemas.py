"""Adapters: one row of a known schema -> its pairs, as pure functions.

Only what a schema itself needs is checked here. Beside the pipeline, after `rows`; `data` chooses the adapter.
"""

import difflib
import math
import re

from dpo_utils.rows import BadRow, show


def is_missing(value: object) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


class Fields(dict):
    """A row whose missing keys are reported, not raised as KeyError."""

    def __missing__(self, key):
        near = difflib.get_close_matches(key, self, 1)
        raise BadRow("missing value", key, f"found no such key{f' but {near[0]!r}' if near else ''} in {list(self)}")


def standard(row: Fields) -> list[dict]:
    """prompt, chosen, rejected as they stand; with scores (ultrafeedback_binarized) the chosen one must be higher."""
    if "score_chosen" in row and "score_rejected" in row:
        high, low = (number_in(row[column], column) for column in ("score_chosen", "score_rejected"))
        if high <= low:
            reason = "tied scores" if high == low else "scores contradict"
            raise BadRow(reason, "score_chosen", f"found {high} and {low}")
    if isinstance(row["prompt"], str) and is_messages(row["chosen"]):
        return transcripts(row)
    return [{field: row[field] for field in ("prompt", "chosen", "rejected")}]


def with_system(row: Fields) -> list[dict]:
    """truthy-dpo: a system turn where there is one, then the user's question."""
    system = row.get("system")
    said = not is_missing(system) and system != ""
    prompt = messages(("system", system), ("user", row["prompt"])) if said else messages(("user", row["prompt"]))
    return [{"prompt": prompt} | {side: messages(("assistant", row[side])) for side in ("chosen", "rejected")}]


def instructed(row: Fields) -> list[dict]:
    """instruction, input, chosen, rejected."""
    return [{"prompt": joined(row, "input"), "chosen": row["chosen"], "rejected": row["rejected"]}]


def transcripts(row: Fields) -> list[dict]:
    """hh-rlhf: two transcripts, or two message lists, whose shared beginning is the prompt."""
    return from_turns(as_turns(row["chosen"], "chosen"), as_turns(row["rejected"], "rejected"))


def webgpt(row: Fields) -> list[dict]:
    """webgpt_comparisons: a question and two scored answers."""
    question = row["question"]
    return ranked(
        Fields(
            prompt=question.get("full_text") if isinstance(question, dict) else question,
            responses=[row["answer_0"], row["answer_1"]],
            scores=[row["score_0"], row["score_1"]],
        )
    )


def arena(row: Fields) -> list[dict]:
    """chatbot_arena_conversations: two conversations and a vote."""
    sides = {"model_a": "ab", "model_b": "ba", "tie": "", "tie (bothbad)": ""}.get(row["winner"])
    if not sides:
        raise BadRow("unknown label" if sides is None else "tied scores", "winner", show(row["winner"]))
    return from_turns(*(as_turns(row[f"conversation_{side}"], f"conversation_{side}") for side in sides))


def ranked(row: Fields) -> list[dict]:
    """prompt, n responses, n scores: a pair for every strict gap, none for a tie."""
    responses, scores = row["responses"], row["scores"]
    for column in ("responses", "scores"):
        if not isinstance(row[column], list):
            raise BadRow("missing value" if is_missing(row[column]) else "wrong type", column, show(row[column]))
    if len(responses) != len(scores):
        raise BadRow("missing score", "scores", f"found {len(responses)} responses and {len(scores)} scores")
    scored = [(number_in(value, "scores"), response) for value, response in zip(scores, responses, strict=True)]
    pairs = [
        {"prompt": row["prompt"], "chosen": better, "rejected": worse}
        for high, better in scored
        for low, worse in scored
        if high > low
    ]
    if not pairs:
        raise BadRow("tied scores", "scores", show(scores))
    return pairs


def completed(row: Fields) -> list[dict]:
    """prompt, completion as they stand."""
    return [{"prompt": row["prompt"], "completion": row["completion"]}]


def answered(row: Fields) -> list[dict]:
    """instruction, (input or context), (output or response), as in Alpaca and Dolly."""
    context, answer = ("context" if "context" in row else "input"), ("output" if "output" in row else "response")
    return [{"prompt": joined(row, context), "completion": row[answer]}]


def conversation(row: Fields) -> list[dict]:
    """messages: the last turn is the completion, what stands before it the prompt."""
    turns = as_turns(row["messages"], "messages")
    return [{"prompt": turns[:-1], "completion": turns[-1:]}]


def joined(row: Fields, column: str) -> str:
    """Instruction and input with a blank line between; the instruction alone where there is no input."""
    extra = row.get(column)
    if not isinstance(row["instruction"], str) or is_missing(extra):
        return row["instruction"]
    if not isinstance(extra, str):
        raise BadRow("wrong type", column, show(extra))
    return f"{row['instruction']}\n\n{extra}" if extra.strip() else row["instruction"]


def number_in(value: object, column: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
        raise BadRow("missing score", column, show(value))
    return value


def messages(*turns: tuple[str, object]) -> list[dict]:
    return [{"role": role, "content": content} for role, content in turns]


def is_messages(value: object) -> bool:
    """A list that holds only {"role", "content"}; the roles and contents themselves are not looked at."""
    turns = isinstance(value, list) and value
    return bool(turns) and all(isinstance(turn, dict) and {"role", "content"} <= turn.keys() for turn in turns)


def as_turns(value: object, column: str) -> list[dict]:
    """Messages as they are, or a transcript cut at "\\n\\nHuman:" and "\\n\\nAssistant:"."""
    if is_messages(value):
        return messages(*((turn["role"], turn["content"]) for turn in value))
    if not isinstance(value, str):
        raise BadRow("missing value" if is_missing(value) else "wrong type", column, show(value))
    start, *pieces = re.split(r"\n\n(Human|Assistant):", value)
    if start.strip() or not pieces:
        raise BadRow("bad turns", column, f"with no prompt column a text opens with \\n\\nHuman: but {show(value)}")
    roles = {"Human": "user", "Assistant": "assistant"}
    return messages(*((roles[role], text.strip()) for role, text in zip(pieces[::2], pieces[1::2], strict=True)))


def from_turns(chosen: list[dict], rejected: list[dict]) -> list[dict]:
    """The shared beginning is the prompt, the last turns are the answers."""
    shared = 0
    while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
        shared += 1
    if max(len(chosen), len(rejected)) > shared + 1:
        raise BadRow("parted early", None, f"found {len(chosen)} and {len(rejected)} turns, the first {shared} alike")
    return [{"prompt": chosen[:shared], "chosen": chosen[shared:], "rejected": rejected[shared:]}]
