"""From text to token ids: templates, masks, and rows in which sequences share what they begin with.

An *item* is one prompt with its completions: `(prompt_ids, [completion_ids, ...])`. A preference pair is an item with
two completions, a demonstration one with one.
"""

from dataclasses import dataclass
from heapq import heappush, heapreplace

import numpy as np
import torch

PLAIN_TURN = {"system": "{}\n", "user": "Instruct: {}\n", "assistant": "Output: {}\n"}  # Phi-2's own question form


class UnusablePair(ValueError):
    """This row cannot be trained on; `reason` says why in a few words."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


def _messages(prompt) -> list[dict]:
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)


def _text(completion) -> str:
    """The text of a completion: itself, or the content of its one assistant message."""
    if isinstance(completion, str):
        return completion
    if len(completion) != 1 or completion[0]["role"] != "assistant":
        raise UnusablePair("completion is not one assistant message")
    return completion[0]["content"]


def prompt_text(prompt, tokenizer) -> str:
    """The text the model reads before it answers: the chat template's, else `Instruct: ...\\nOutput:`."""
    messages = _messages(prompt)
    if tokenizer.chat_template:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return "".join(PLAIN_TURN[m["role"]].format(m["content"]) for m in messages) + "Output:"


def encode_prompt(prompt, tokenizer) -> list[int]:
    """Ids of the prompt; special tokens come from the template if there is one, else from the tokenizer (BOS)."""
    _refuse_markers([m["content"] for m in _messages(prompt)], tokenizer, "prompt")
    text = prompt_text(prompt, tokenizer)
    ids = tokenizer(text, add_special_tokens=not tokenizer.chat_template)["input_ids"]
    if ids and ids[-1] == tokenizer.eos_token_id and not text.endswith(tokenizer.eos_token):
        ids = ids[:-1]  # some tokenizers close every text with EOS; here the completion does that
    return ids


def encode_completion(completion, tokenizer) -> list[int]:
    """Ids of the completion, closed by exactly one EOS. Tokenised apart from the prompt, so no token spans both."""
    text = _text(completion)
    _refuse_markers([text], tokenizer, "completion")
    if not tokenizer.chat_template:
        text = " " + text.lstrip()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise UnusablePair("completion has no tokens")
    return [*ids, tokenizer.eos_token_id]


def _refuse_markers(texts, tokenizer, where: str) -> None:
    for token in {tokenizer.eos_token, tokenizer.bos_token} - {None}:
        if any(token in text for text in texts):
            raise UnusablePair(f"{token} inside the {where}")


def _cut(prompt_ids, completion_ids, max_length: int) -> list[int]:
    room = max_length - len(prompt_ids)
    if room < 1:
        raise UnusablePair("prompt fills max_length")
    return completion_ids[:room]


def tokenize_pair(pair, tokenizer, max_length: int) -> dict:
    """`prompt_ids`, `chosen_ids`, `rejected_ids`: lists of ids, the completions ending in EOS unless cut.

    pair: prompt, chosen, rejected; text or message lists (TRL's standard and conversational formats).
    max_length: tokens of prompt + completion; the end of a longer completion is cut off.
    Raises UnusablePair where nothing could be learnt: no room after the prompt, an end-of-text marker inside a text,
    or two completions that are the same (as tokens, or after the cut).
    """
    prompt_ids = encode_prompt(pair["prompt"], tokenizer)
    if not prompt_ids:
        raise UnusablePair("prompt has no tokens")
    chosen, rejected = (encode_completion(pair[side], tokenizer) for side in ("chosen", "rejected"))
    if chosen == rejected:
        raise UnusablePair("chosen and rejected are the same tokens")
    chosen, rejected = (_cut(prompt_ids, ids, max_length) for ids in (chosen, rejected))
    if chosen == rejected:
        raise UnusablePair("chosen and rejected are the same after the cut")
    return {"prompt_ids": prompt_ids, "chosen_ids": chosen, "rejected_ids": rejected}


def tokenize_demonstration(row, tokenizer, max_length: int) -> dict:
    """`prompt_ids` and `completion_ids` of a demonstration (columns prompt, completion). Raises UnusablePair."""
    prompt_ids = encode_prompt(row["prompt"], tokenizer)
    return {
        "prompt_ids": prompt_ids,
        "completion_ids": _cut(prompt_ids, encode_completion(row["completion"], tokenizer), max_length),
    }


def tokenize_all(rows, tokenizer, max_length: int, tokenize=tokenize_pair):
    """Every usable row tokenised, each with its 1-based `row`; and the others as (row, reason).

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
        raise ValueError(f"none of the {len(dropped)} rows can be used at max_length={max_length}: {reasons}")
    return kept, dropped


def collate(pairs: list[dict], pad_id: int) -> dict[str, torch.Tensor]:
    """The plain form, two padded rows a pair: input_ids, attention_mask, completion_mask, each (2B, T).

    Rows 0..B-1 are prompt + chosen, rows B..2B-1 prompt + rejected. Masks come from lengths, never from ids, so a
    pad token that is also the EOS stays a trained EOS where it closes a completion.
    """
    rows = [(p["prompt_ids"], p[side]) for side in ("chosen_ids", "rejected_ids") for p in pairs]
    return collate_rows(rows, pad_id)


def collate_rows(rows, pad_id: int) -> dict[str, torch.Tensor]:
    """As `collate`, from (prompt_ids, completion_ids) rows: each value (N, T)."""
    longest = max(len(prompt) + len(completion) for prompt, completion in rows)
    ids = torch.full((len(rows), longest), pad_id)
    attention, completion_mask = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
    for n, (prompt, completion) in enumerate(rows):
        end = len(prompt) + len(completion)
        ids[n, :end] = torch.tensor([*prompt, *completion])
        attention[n, :end] = 1
        completion_mask[n, len(prompt) : end] = True
    return {"input_ids": ids, "attention_mask": attention, "completion_mask": completion_mask}


# --- rows that share what is the same ---------------------------------------------------------------------------------


def as_item(row: dict) -> tuple[list[int], list[list[int]]]:
    """A tokenised pair or demonstration as (prompt_ids, completions)."""
    if "completion_ids" in row:
        return row["prompt_ids"], [row["completion_ids"]]
    return row["prompt_ids"], [row["chosen_ids"], row["rejected_ids"]]


def item_length(item) -> int:
    """Tokens an item takes in a shared row: what all its completions begin with stands there once."""
    prompt, completions = item
    return len(prompt) + sum(map(len, completions)) - (len(completions) - 1) * common_prefix(completions)


def common_prefix(lists) -> int:
    """How many leading ids all lists share."""
    shortest, longest = min(lists), max(lists)  # in dictionary order: all others lie between these two
    return next((i for i, (a, b) in enumerate(zip(shortest, longest, strict=False)) if a != b), len(shortest))


@dataclass(frozen=True)
class SharedRows:
    """N rows of L tokens, each a tree in which sequences stand apart from where they part. C completions, S scored tokens."""

    input_ids: torch.Tensor  # (N, L)
    position_ids: torch.Tensor  # (N, L): how far a token is from the root
    mask: torch.Tensor  # (N, 1, L, L) bool: a token sees itself and the way up to the root
    predictors: torch.Tensor  # (S,) index into the N*L positions: the token before each scored one
    labels: torch.Tensor  # (S,) the scored tokens
    label_index: torch.Tensor  # which of the scored tokens each completion is made of, one completion after the other
    counts: list[int]  # (C,) how many that are, in the order of the items

    def to(self, device):
        """The same rows on a device."""
        tensors = {k: v.to(device) if torch.is_tensor(v) else v for k, v in vars(self).items()}
        return SharedRows(**tensors)


def _prefix_tree(items) -> tuple[list, list]:
    """The tokens of a row, and the path of every completion through them.

    A token is (index of the token before it, or None; id), a path the indices from the root to a completion's end,
    with how many of them are the completion's own.
    """
    tree, paths = {}, []
    for prompt, completions in items:
        for completion in completions:
            path = []
            for token in (*prompt, *completion):
                step = (path[-1] if path else None, token)
                path.append(tree.setdefault(step, len(tree)))  # gone before, or new at the end of the row
            paths.append((path, len(completion)))
    return list(tree), paths


def pack_rows(rows, pad_id: int) -> SharedRows:
    """Shared rows from lists of items, one list a row. Padding sees itself alone, so that no softmax is empty.

    Completions come out row by row, item by item, in the order given.
    """
    trees = [_prefix_tree(items) for items in rows]
    length = max(len(tree) for tree, _ in trees)
    ids = np.full((len(rows), length), pad_id)
    positions = np.zeros_like(ids)
    mask = np.tile(np.eye(length, dtype=bool), (len(rows), 1, 1))
    scored, label_index, counts = {}, [], []  # scored: (predictor, label) -> its number
    for n, (tree, paths) in enumerate(trees):
        distance, sight = positions[n], mask[n]
        for i, (before, token) in enumerate(tree):
            ids[n, i] = token
            if before is not None:
                distance[i] = distance[before] + 1
                sight[i] |= sight[before]
        for path, count in paths:
            steps = [(n * length + before, token) for before, token in (tree[i] for i in path[-count:])]
            label_index += [scored.setdefault(step, len(scored)) for step in steps]
            counts.append(count)
    predictors, labels = torch.tensor(list(scored)).T
    ids, positions, mask = (torch.from_numpy(array) for array in (ids, positions, mask[:, None]))
    return SharedRows(ids, positions, mask, predictors, labels, torch.tensor(label_index), counts)


def plan_rows(items, row_tokens: int, micro_tokens: int) -> list[list[list[int]]]:
    """Micro-batches of rows of item numbers: rows of much the same length, rows and batches within their token budgets.

    An item longer than a budget still gets a row, or a micro-batch, of its own.
    """
    shared = common_prefix([prompt for prompt, _ in items])
    room = max(1, row_tokens - shared)
    sizes = [item_length(item) - shared for item in items]  # what an item adds to a row
    least = -(-sum(min(size, room) for size in sizes) // room)
    enough = len(_spread(sizes, room, least))
    return _fill([(row, shared + length) for length, _, row in _spread(sizes, room, enough)], micro_tokens)


def plan_plain_rows(items, micro_tokens: int) -> list[list[list[int]]]:
    """The same for plain rows, one padded row a completion: every item alone, micro-batches within their budget."""
    lengths = [len(completions) * (len(prompt) + max(map(len, completions))) for prompt, completions in items]
    return _fill([([i], length) for i, length in enumerate(lengths)], micro_tokens)


def _spread(sizes, room: int, count: int) -> list[tuple[int, int, list[int]]]:
    """Item numbers in `count` rows (more if they do not fit), longest first, each to the shortest row so far."""
    rows = [(0, n, []) for n in range(count)]  # a heap of (length, row number, items): the shortest row on top
    for i in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        length, number, row = rows[0]
        if row and length + sizes[i] > room:
            heappush(rows, (sizes[i], len(rows), [i]))
        else:
            heapreplace(rows, (length + sizes[i], number, [*row, i]))
    return [row for row in rows if row[2]]


def _fill(rows, micro_tokens: int):
    batches, longest = [], 0
    for row, length in sorted(rows, key=lambda r: r[1]):
        longest = max(longest, length)
        if batches and (len(batches[-1]) + 1) * longest <= micro_tokens:
            batches[-1].append(row)
        else:
            batches.append([row])
            longest = length
    return batches
