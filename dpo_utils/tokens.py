"""From text to token ids and masks: the chat template, the completion's end, what is cut.

An *item* is one prompt with its completions, `(prompt_ids, [completion_ids, ...])`.
"""

import torch

PLAIN_TURN = {"system": "{}\n", "user": "Instruct: {}\n", "assistant": "Output: {}\n"}  # Phi-2's


class UnusablePair(ValueError):
    """Nothing can be learnt from this row; `reason` says why in a few words."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


def _messages(prompt) -> list[dict]:
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)


def prompt_text(prompt, tokenizer) -> str:
    """What the model reads before it answers: the chat template, else `Instruct: ...\\nOutput:`."""
    messages = _messages(prompt)
    if tokenizer.chat_template:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return "".join(PLAIN_TURN[m["role"]].format(m["content"]) for m in messages) + "Output:"


def encode_prompt(prompt, tokenizer) -> list[int]:
    """Ids of the prompt; the template writes its special tokens, else the tokenizer does (BOS)."""
    _refuse_markers([m["content"] for m in _messages(prompt)], tokenizer, "prompt")
    text = prompt_text(prompt, tokenizer)
    ids = tokenizer(text, add_special_tokens=not tokenizer.chat_template)["input_ids"]
    if ids and ids[-1] == tokenizer.eos_token_id and not text.endswith(tokenizer.eos_token):
        ids = ids[:-1]  # some tokenizers end every text with EOS; here the completion does that
    if not ids:
        raise UnusablePair("prompt has no tokens")
    return ids


def encode_completion(completion, tokenizer) -> list[int]:
    """Ids of the completion and one EOS, encoded apart from the prompt: no token spans both."""
    if not isinstance(completion, str):
        if [m["role"] for m in completion] != ["assistant"]:
            raise UnusablePair("completion is not one assistant message")
        completion = completion[0]["content"]
    _refuse_markers([completion], tokenizer, "completion")
    text = completion if tokenizer.chat_template else " " + completion.lstrip()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise UnusablePair("completion has no tokens")
    return [*ids, tokenizer.eos_token_id]


def _refuse_markers(texts, tokenizer, where: str) -> None:
    for token in {tokenizer.eos_token, tokenizer.bos_token} - {None}:
        if any(token in text for text in texts):
            raise UnusablePair(f"{token} inside the {where}")


def _cut(prompt_ids, completion_ids, max_length: int) -> list[int]:
    if len(prompt_ids) >= max_length:
        raise UnusablePair("prompt fills max_length")
    return completion_ids[: max_length - len(prompt_ids)]


def tokenize_pair(pair, tokenizer, max_length: int) -> dict:
    """`prompt_ids`, `chosen_ids` and `rejected_ids`; completions end in EOS unless they are cut.

    pair: prompt, chosen, rejected, as text or message lists (TRL's formats). max_length: tokens of
    prompt + completion; the end of a longer completion is cut off. Raises UnusablePair where
    nothing could be learnt: no room after the prompt, an end-of-text marker inside a text, or two
    completions that are the same, as tokens or after the cut.
    """
    prompt_ids = encode_prompt(pair["prompt"], tokenizer)
    chosen, rejected = (encode_completion(pair[side], tokenizer) for side in ("chosen", "rejected"))
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
    prompt_ids = encode_prompt(row["prompt"], tokenizer)
    completion_ids = encode_completion(row["completion"], tokenizer)
    return {
        "prompt_ids": prompt_ids,
        "completion_ids": _cut(prompt_ids, completion_ids, max_length),
    }


def tokenize_all(rows, tokenizer, max_length: int, tokenize=tokenize_pair):
    """(usable rows tokenised, each with its 1-based `row`; the others as (row, reason)).

    Raises ValueError if no row is usable.
    """
    kept, dropped = [], []
    for number, row in enumerate(rows, start=1):
        try:
            kept.append({**tokenize(row, tokenizer, max_length), "row": number})
        except UnusablePair as problem:
            dropped.append((number, problem.reason))
    if not kept:
        reasons = ", ".join(sorted({reason for _, reason in dropped})) or "there are none"
        raise ValueError(
            f"no row of {len(dropped)} is usable at max_length={max_length}: {reasons}"
        )
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
