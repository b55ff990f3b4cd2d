"""What one cell holds, whatever form it is in: a text, or a list of messages."""

import ast
import json
import re
import unicodedata

from dpo_utils.rows import TABLES, BadRow

SPEAKERS = {"Human": "user", "Assistant": "assistant"}  # of a transcript
MESSAGES = re.compile(r"""\s*\[?\s*\{\s*['"](role|from|content|value)['"]\s*:""")  # as text
CONTENT = re.compile(  # columns and keys without which a row may mean something else
    r"(system|history|tools?|functions?|images?|videos?|audios?|documents?|context|input|thinking"
    r"|reasoning|refusal)(_prompt|_message|_calls?|_content)?"
)
SURROGATE, VISIBLE = re.compile("[\ud800-\udfff]"), re.compile(r"[^\s\u200b-\u200d\u2060\ufeff]")


def fold(text: str) -> str:
    """Text without what a reader does not see: Unicode form (NFKC), case, runs of space."""
    if text.isascii():
        return " ".join(text.lower().split())
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return " ".join(folded.split())


def plain_text(value: str | list[dict]) -> str:
    """One string for a text or a list of messages, with the tools that they call."""
    if isinstance(value, str):
        return value
    calls = [json.dumps(turn["tool_calls"]) if turn.get("tool_calls") else "" for turn in value]
    return "\n".join(turn["content"] + call for turn, call in zip(value, calls, strict=True))


def prompt_key(prompt: str | list[dict]) -> str:
    """What makes two prompts the same question: folded text, system turns left out."""
    asked = prompt if isinstance(prompt, str) else [t for t in prompt if t["role"] != "system"]
    return fold(plain_text(asked))


def check_text(text: object, column: str) -> None:
    """Raises BadRow where a value cannot be used as text."""
    is_text = isinstance(text, str)
    fault = "blank" if is_text or text == [] else "wrong type"
    if text is None or text != text:
        fault = "missing value"
    elif is_text and "\0" in text:
        fault = "NUL character"
    elif is_text and not text.isascii() and (found := SURROGATE.search(text)):
        fault = "invalid UTF-8" if "\udc80" <= found[0] <= "\udcff" else "lone surrogate"
    elif is_text and VISIBLE.search(text):
        return
    raise BadRow(fault, column, text)


def is_plain(texts: list) -> bool:
    """Whether these are different texts that need no second look: most rows of most files."""
    try:
        together = "\n".join(texts)
        together.encode()
    except (TypeError, UnicodeEncodeError):
        return False
    letters = [text[:1].isalnum() and not text.startswith("Human:") for text in texts]
    return all(letters) and "\0" not in together and texts[-1] != texts[-2]


def filled(value: object) -> bool:
    """Whether a cell holds more than None, NaN, blank text, or an empty list, also as text."""
    text = value.strip(" \n[]{}") if isinstance(value, str) else value
    return text == text and text not in (None, "", [], {})


def note_unused(row: dict, notes: set) -> None:
    """Names the keys that say something and are not used."""
    keys = (key for key in row if key != "tool_calls" and CONTENT.fullmatch(key))
    notes.update(f"not used: {key}" for key in keys if filled(row[key]))


def parsed(text: str) -> object:
    """What JSON, Python or numpy wrote as text; None where none of them did."""
    for read, written in (json.loads, text), (ast.literal_eval, re.sub(r"\}\s+\{", "}, {", text)):
        try:
            return read(written.strip())
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue


def listed(value: object) -> object:
    """The list that a cell holds, also as an array or as text; another value as it is."""
    value = value.tolist() if hasattr(value, "tolist") else value
    opens = isinstance(value, str) and value.lstrip()[:1] == "["
    return found if opens and isinstance(found := parsed(value), list) else value


def is_talk(value: object) -> bool:
    """Whether a value is a list of messages."""
    return type(value) is list and value != [] and type(value[0]) is dict and "role" in value[0]


def message(turn: dict, column: str, notes: set) -> dict:
    """Role, content as one text, and the calls of tools; `notes` gets what else says something."""
    role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
    if len(turn) == 2 and "role" in turn and type(content) is str and role in ("user", "assistant"):
        return {"role": role, "content": content}
    calls = listed(turn.get("tool_calls")) or []
    if role == "function_call":  # ShareGPT's
        calls, content = [parsed(content) or {"name": content}], ""
    if not isinstance(content, str) and isinstance(content := listed(content), list):
        parts = [part if isinstance(part, dict) else {"text": part} for part in content]
        if not all(isinstance(part.get("text"), str) for part in parts):
            raise BadRow("not text", column, content)
        content = "".join(part["text"] for part in parts)
    new = {"role": TABLES["roles"].get(str(role), role), "content": content}
    if not all(isinstance(c, dict) and isinstance(c.get("function", c), dict) for c in calls):
        raise BadRow("wrong type", column, calls)
    for n, call in enumerate(calls := list(calls)):
        function = dict(call.get("function", call))
        if isinstance(given := function.get("arguments"), str):  # templates want an object
            function["arguments"] = parsed(given) or given
        kept = {"id": call["id"]} if call.get("id") else {}
        calls[n] = {"type": "function", "function": function, **kept}
    new |= {"content": content or "", "tool_calls": calls} if calls else {}
    note_unused(turn, notes)
    tool = ("name", "tool_call_id") if new["role"] == "tool" else ()
    return new | {key: turn[key] for key in tool if filled(turn.get(key))}


def normal(value: object, column: str, notes: set) -> object:
    """A cell as text or as messages; what is neither comes back as it is, to be refused."""
    if isinstance(value, str):
        if MESSAGES.match(value):
            if not is_talk(talk := normal(parsed(value), column, notes)):
                raise BadRow("unreadable messages", column, value)
            return talk
        if value.startswith(("\n\nHuman:", "Human:")):
            _, *cut = re.split(r"\n\n(Human|Assistant):", f"\n\n{value.lstrip()}")
            said = zip(cut[::2], cut[1::2], strict=True)
            return [{"role": SPEAKERS[who], "content": text.strip()} for who, text in said]
        return value
    if isinstance(value := listed(value), dict):
        inner = [value[key] for key in ("messages", "full_text") if key in value]  # OpenAI, webgpt
        note_unused(value, notes)
        spoken = "role" in value or "from" in value
        return normal(inner[0] if inner else [value], column, notes) if inner or spoken else value
    turns = value if isinstance(value, list) else []
    spoken = {isinstance(turn, dict) and ("role" in turn or "from" in turn) for turn in turns}
    if spoken == {True, False}:
        raise BadRow("wrong type", column, value)
    return [message(turn, column, notes) for turn in turns] if True in spoken else value


def body(talk: list[dict]) -> list[dict]:
    """A talk without the system turn that opens it."""
    return talk[1:] if talk and talk[0]["role"] == "system" else talk


def follow(first: list[dict], second: list[dict], column: str) -> list[dict]:
    """One talk after the other, under one system turn; raises BadRow where each has its own."""
    systems = [talk[0] for talk in (first, second) if body(talk) is not talk]
    if len(systems) == 2 and systems[0] != systems[1]:
        raise BadRow("two system turns", column, systems[1]["content"])
    return systems[:1] + body(first) + body(second)


def flat(row: dict) -> dict:
    """A row of an Argilla or Label Studio export: what was asked and the votes, side by side."""
    if not isinstance(inner := row.get("fields", row.get("data")), dict):
        return row
    done = (a["result"] for a in row.get("annotations") or () if not a.get("was_cancelled"))
    voted = {"winner": [result.get("value") for results in done for result in results]}
    return inner | (row["responses"] if isinstance(row.get("responses"), dict) else voted)
