"""From text to token ids and masks: the chat template, the completion's end, what is cut.

An *item* is one prompt with its completions, `(prompt_ids, [completion_ids, ...])`.
"""

import datetime
import functools
import warnings
from os.path import commonprefix
from typing import NamedTuple

import torch
from jinja2 import TemplateError

PLAIN_TURN = {"system": "{}\n", "user": "Instruct: {}\n", "assistant": "Output: {}\n"}  # Phi-2's
MARK = "\ue000"  # stands for an answer, to see what the template writes around it
# Templates that write today's date always write this one, so that a run can be taken up tomorrow.
DATE = "".join(f"|replace('%{c}', '{datetime.date(2026, 1, 1):%{c}}')" for c in "aAbBdHImMpSyY")
DATE = "{% macro strftime_now(form) %}{{ form|replace('%-', '%')" + DATE + " }}{% endmacro %}"


class UnusablePair(ValueError):
    """Nothing can be learnt from this row; `reason` says why in a few words."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


def _render(messages, tokenizer, **options) -> str:
    template = tokenizer.get_chat_template()
    options["chat_template"] = DATE * ("strftime_now" in template) + template
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, **options)
    except (TemplateError, TypeError) as problem:
        raise UnusablePair(f"the chat template refuses it: {problem}") from problem


def _ids(text: str, tokenizer, special: bool = False) -> list[int]:
    return tokenizer(text, add_special_tokens=special)["input_ids"]


class _Frame(NamedTuple):
    """What the chat template writes around an answer; without one, Phi-2's form and an EOS."""

    messages: list[dict]  # the turns of the prompt
    prompt: str  # what a request for an answer and the answered turn begin with alike
    ids: list[int]  # of that text
    before: str  # the answered turn up to there: a few templates then move the system turn
    opening: str  # what else comes before an answer, such as an empty think block
    after: str  # all that follows it
    end: str  # how much of that ends the turn
    stop: str  # the token at its end, "" if it is none: then EOS follows


def _frame(prompt, tokenizer) -> _Frame:
    if isinstance(prompt, str):
        return _text_frame(prompt, tokenizer, str(tokenizer.chat_template), len(tokenizer))
    if isinstance(prompt, _Frame):
        return prompt
    messages = list(prompt)
    if not tokenizer.chat_template:
        if unknown := {m["role"] for m in messages} - set(PLAIN_TURN):
            raise UnusablePair(f"no chat template, and no plain form of a {min(unknown)} turn")
        text = "".join(PLAIN_TURN[m["role"]].format(m["content"]) for m in messages) + "Output:"
        return _Frame(messages, text, _ids(text, tokenizer), text, " ", "", "", "")
    asked = _render(messages, tokenizer, add_generation_prompt=True)
    answered = _render([*messages, {"role": "assistant", "content": MARK}], tokenizer)
    head, found, after = answered.rpartition(MARK)
    if not found:
        raise UnusablePair("the chat template leaves the answer out")
    last = "".join(str(m["content"]) for m in messages[-1:]).strip()
    start = MARK if last in commonprefix([asked, head]) else last  # MARK: from the beginning
    opened, opening = (text.rpartition(start)[2] for text in (asked, head))
    both = len(commonprefix([opened, opening]))
    tokens = [t for t in tokenizer.get_added_vocab() if t.strip() and t in after]
    stop = min(tokens, key=after.index, default="")
    end = after[: after.index(stop) + len(stop)] if stop else after.rstrip()
    prompt, before = asked.removesuffix(opened[both:]), head.removesuffix(opening[both:])
    ids = _ids(prompt, tokenizer)
    return _Frame(messages, prompt, ids, before, opening[both:], after, end, stop)


@functools.lru_cache(maxsize=256)
def _text_frame(text: str, tokenizer, *_changes) -> _Frame:
    return _frame([{"role": "user", "content": text}], tokenizer)


def prompt_text(prompt, tokenizer) -> str:
    """What the model reads before it answers: the chat template, else `Instruct: ...\\nOutput:`.

    A `<think>` that the template opens for an answer, but not around a given one, is not in it.
    """
    return _frame(prompt, tokenizer).prompt


def encode_prompt(prompt, tokenizer) -> list[int]:
    """Ids of the prompt; the template writes its special tokens, else the tokenizer does (BOS)."""
    frame = _frame(prompt, tokenizer)
    _refuse_markers(frame.messages, tokenizer, frame, "prompt")
    ids = frame.ids if tokenizer.chat_template else _ids(frame.prompt, tokenizer, special=True)
    if ids and ids[-1] == tokenizer.eos_token_id and not frame.prompt.endswith(tokenizer.eos_token):
        ids = ids[:-1]  # some tokenizers end every text with EOS; here the completion does that
    if not ids:
        raise UnusablePair("prompt has no tokens")
    return ids


def encode_completion(completion, tokenizer, prompt="") -> list[int]:
    """Ids of the completion as the template writes it after the prompt, up to its end of turn.

    No token spans the boundary. A turn that ends with no special token gets an EOS.
    """
    if isinstance(completion, str):
        completion = [{"role": "assistant", "content": completion}]
    if [m["role"] for m in completion] != ["assistant"]:
        raise UnusablePair("completion is not one assistant message")
    frame, content = _frame(prompt, tokenizer), completion[0]["content"] or ""
    _refuse_markers(completion, tokenizer, frame, "completion")
    if not content.strip() and not completion[0].get("tool_calls"):
        raise UnusablePair("completion has no tokens")
    thought, own, _ = content.rpartition("</think>")
    opening = frame.opening if not own else "" if "<think>" in content else "<think>\n"
    text = opening + content.lstrip()  # unless the template has it all
    if tokenizer.chat_template:
        whole = _render([*frame.messages, *completion], tokenizer)
        body = whole.removeprefix(frame.before).removesuffix(frame.after)
        framed = frame.before + body + frame.after == whole
        if framed and own in body and thought.rpartition("<think>")[2].strip() in body:
            text = body
    for context in (frame.prompt, "\n", ""):  # some tokenizers begin every text with a space
        head = frame.ids if context == frame.prompt else _ids(context, tokenizer)
        ids = _ids(context + text + frame.end, tokenizer)
        if ids[: len(head)] == head:
            break
    return ids[len(head) :] + [tokenizer.eos_token_id] * (not frame.stop)


def _refuse_markers(messages, tokenizer, frame, where: str) -> None:
    for token in {tokenizer.eos_token, tokenizer.bos_token, frame.stop} - {None, ""}:
        if any(token in str(m["content"]) for m in messages):
            raise UnusablePair(f"{token} inside the {where}")


def _cut(prompt_ids, completion_ids, max_length: int) -> list[int]:
    if len(prompt_ids) >= max_length:
        raise UnusablePair("prompt fills max_length")
    return completion_ids[: max_length - len(prompt_ids)]


def tokenize_pair(pair, tokenizer, max_length: int) -> dict:
    """`prompt_ids`, `chosen_ids`, `rejected_ids`; completions end as turns do unless they are cut.

    pair: prompt, chosen, rejected, as text or message lists (TRL's formats). max_length: tokens of
    prompt + completion; the end of a longer completion is cut off. Raises UnusablePair where
    nothing could be learnt: no room after the prompt, an end-of-text marker inside a text, or two
    completions that are the same, as tokens or after the cut.
    """
    frame = _frame(pair["prompt"], tokenizer)
    prompt_ids, sides = encode_prompt(frame, tokenizer), (pair["chosen"], pair["rejected"])
    chosen, rejected = (encode_completion(side, tokenizer, frame) for side in sides)
    if chosen == rejected:
        raise UnusablePair("chosen and rejected are the same tokens")
    chosen, rejected = (_cut(prompt_ids, ids, max_length) for ids in (chosen, rejected))
    if chosen == rejected:
        raise UnusablePair("chosen and rejected are the same after the cut")
    return {"prompt_ids": prompt_ids, "chosen_ids": chosen, "rejected_ids": rejected}


def tokenize_demonstration(row, tokenizer, max_length: int) -> dict:
    """`prompt_ids` and `completion_ids` of a row with prompt and completion. Raises
    UnusablePair.
    """
    frame = _frame(row["prompt"], tokenizer)
    prompt_ids = encode_prompt(frame, tokenizer)
    completion_ids = _cut(
        prompt_ids, encode_completion(row["completion"], tokenizer, frame), max_length
    )
    return {"prompt_ids": prompt_ids, "completion_ids": completion_ids}


def tokenize_all(rows, tokenizer, max_length: int, tokenize=tokenize_pair):
    """(usable rows tokenised, each with its 1-based `row`; the others as (row, reason)).

    Warns of special tokens inside a text. Raises ValueError if no row is usable.
    """
    kept, dropped, odd = [], [], []
    special = [t.content for t in tokenizer.added_tokens_decoder.values() if t.special]
    for number, row in enumerate(rows, start=1):
        try:
            kept.append({**tokenize(row, tokenizer, max_length), "row": number})
            odd += [(number, token) for token in special if token in str(row)]
        except UnusablePair as problem:
            dropped.append((number, problem.reason))
    if not kept:
        reasons = ", ".join(sorted({reason for _, reason in dropped})) or "there are none"
        raise ValueError(
            f"no row of {len(dropped)} is usable at max_length={max_length}: {reasons}"
        )
    if odd:
        what = f"special tokens inside the text of {len(dict(odd))} rows are read as such"
        warnings.warn(f"{what}, first {odd[0][1]} in row {odd[0][0]}", stacklevel=2)
    return kept, dropped


def as_item(row: dict) -> tuple[list[int], list[list[int]]]:
    """A tokenised pair or demonstration as (prompt_ids, completions)."""
    sides = ("completion_ids",) if "completion_ids" in row else ("chosen_ids", "rejected_ids")
    return row["prompt_ids"], [row[side] for side in sides]


def collate(pairs: list[dict], pad_id: int) -> dict[str, torch.Tensor]:
    """Rows of prompt + chosen, then of prompt + rejected, padded: see `collate_rows`, N = 2B."""
    rows = [(p["prompt_ids"], p[side]) for side in ("chosen_ids", "rejected_ids") for p in pairs]
    return collate_rows(rows, pad_id)


def collate_rows(rows, pad_id: int) -> dict[str, torch.Tensor]:
    """input_ids, attention_mask, completion_mask, (N, T) each, of (prompt_ids, completion_ids).

    Masks come from lengths, never from ids: where pad is EOS, the EOS of a completion still counts.
    """
    longest = max(len(prompt) + len(completion) for prompt, completion in rows)
    ids = torch.full((len(rows), longest), pad_id)
    attention, completion_mask = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
    for n, (prompt, completion) in enumerate(rows):
        end = len(prompt) + len(completion)
        ids[n, :end] = torch.tensor([*prompt, *completion])
        attention[n, :end] = 1
        completion_mask[n, len(prompt) : end] = True
    return {"input_ids": ids, "attention_mask": attention, "completion_mask": completion_mask}


def micro_batches(lengths, tokens: int) -> list[list[int]]:
    """Indices, shortest first, in groups whose padded size is at most `tokens` (or one row)."""
    groups = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if groups and (len(groups[-1]) + 1) * lengths[i] <= tokens:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups
