"""The same question to a model before and after training: in a notebook or in a terminal."""

import html
import shutil
import sys
from itertools import takewhile, zip_longest
from textwrap import wrap

import ipywidgets
from transformers.utils.logging import disable_progress_bar

from dpo_utils.evaluate import sample
from dpo_utils.models import REFERENCE, as_reference, load_policy
from dpo_utils.plots import live
from dpo_utils.profiles import Profile, run_directory


def answers(model, tokenizer, profile: Profile, question: str) -> list[str]:
    """One of the reference and one of the policy, at temperature 1 and with the same seed."""
    options = {"max_new_tokens": profile.max_new_tokens, "seed": profile.seed}
    try:
        with as_reference(model):
            before = sample(model, tokenizer, [question], **options)
        return before[0] + sample(model, tokenizer, [question], **options)[0]
    except ValueError as problem:  # a marker inside the question
        return [f"not asked: {problem}", ""]


def side_by_side(texts, width: int = 100) -> str:
    """Two texts as two columns."""
    half = width // 2 - 2
    sides = ([row for part in text.splitlines() for row in wrap(part, half)] for text in texts)
    return "\n".join(f"{a:{half}} | {b}".rstrip() for a, b in zip_longest(*sides, fillvalue=""))


def show(model, tokenizer, profile: Profile, questions):
    """A line to type into over two columns; where nobody sits there `questions` are asked."""
    ours = model, tokenizer, profile
    if not live():
        return print(*(f"{q}\n{side_by_side(answers(*ours, q))}\n" for q in questions), sep="\n")
    line = ipywidgets.Text(placeholder="Type a question, press Enter", continuous_update=False)
    columns = [ipywidgets.HTML(layout={"width": "50%"}) for _ in range(2)]

    def ask(change):
        for column, text in zip(columns, answers(*ours, change["new"]), strict=True):
            column.value = f"<pre style='white-space: pre-wrap'>{html.escape(text)}</pre>"

    line.observe(ask, "value")
    return ipywidgets.VBox([line, ipywidgets.HBox(columns)])


def command(profile: Profile, adapter=None, reference=None) -> None:
    """Answer the lines of stdin up to an empty one: `adapter` next to `reference` or the base.

    Without an adapter it is the profile's DPO run next to its SFT run. Errors: `load_policy`.
    """
    if adapter is None:
        adapter, reference = (run_directory(profile) / of / "adapter" for of in ("dpo", "sft"))
    disable_progress_bar()  # of loading weights
    ours = *load_policy(profile, adapter, reference), profile
    if reference is None:
        ours[0].delete_adapter(REFERENCE)  # without one the reference is the base model
    width = shutil.get_terminal_size((100, 24)).columns
    print("One question a line; what was said before is not remembered. An empty line ends.")
    print(side_by_side([f"before: {reference or profile.model}", f"after: {adapter}"], width))
    for question in takewhile(bool, map(str.strip, sys.stdin)):
        print(f"\n{question}\n{side_by_side(answers(*ours, question), width)}", flush=True)
