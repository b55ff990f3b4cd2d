"""A person as the judge: two answers side by side, blind, in random order; every click is saved as a preference."""

import json
import os
import random
from pathlib import Path

from dpo_utils.data import fold
from dpo_utils.widgets import live


class BlindChoice:
    """Ask someone which answer is better, prompt by prompt; `show()` draws buttons, `choose` is what they call.

    prompts, first, second: lists of texts. path: JSONL that gains a row a choice (prompt, chosen, rejected), which
    `load_preferences` reads; ties go to `<name>_ties.jsonl` beside it. Begun again with the same path, prompts that are
    labelled already are not asked again. `rows` holds the scores, as `judges.compare` gives them, for `win_rate`.
    """

    def __init__(self, prompts, first, second, path, seed: int = 0):
        self.path, self.ties = Path(path), Path(path).with_name(f"{Path(path).stem}_ties.jsonl")
        self.rng, self.rows = random.Random(seed), []
        done = self._done()
        trios = dict.fromkeys(zip(prompts, first, second, strict=True))  # each once
        self.open = [t for t in trios if fold(t[1]) != fold(t[2])]  # `load_preferences` refuses answers that look the same
        for trio in self.open:
            if trio in done:
                self._count(trio, done[trio])
        self.open = [trio for trio in self.open if trio not in done]
        self._turn()

    def _done(self) -> dict:
        """{(prompt, first, second): verdict} in both orders of the answers, from the files."""
        done = {}
        for path, verdicts in ((self.path, (1.0, 0.0)), (self.ties, (0.5, 0.5))):
            for text in path.read_text(encoding="utf-8").split("\n") if path.exists() else ():
                if not text.strip():
                    continue
                row = json.loads(text)
                done[row["prompt"], row["chosen"], row["rejected"]] = verdicts[0]
                done[row["prompt"], row["rejected"], row["chosen"]] = verdicts[1]
        return done

    def _turn(self) -> None:
        self.swapped = self.rng.random() < 0.5

    @property
    def question(self) -> tuple[str, str, str] | None:
        """(prompt, answer A, answer B) as they are shown now; None when all are judged."""
        if not self.open:
            return None
        prompt, one, two = self.open[0]
        return (prompt, two, one) if self.swapped else (prompt, one, two)

    def choose(self, verdict: str) -> None:
        """Take "A", "B" or "tie" for the pair that is shown; saved before the next one comes."""
        if verdict not in ("A", "B", "tie"):
            raise ValueError(f"a choice is A, B or tie, not {verdict!r}")
        if not self.open:
            raise ValueError("every pair is judged already: give more prompts")
        prompt, a, b = self.question
        chosen, rejected = (b, a) if verdict == "B" else (a, b)
        self._append(self.ties if verdict == "tie" else self.path, {"prompt": prompt, "chosen": chosen, "rejected": rejected})
        trio = self.open.pop(0)
        self._count(trio, 0.5 if verdict == "tie" else float(chosen == trio[1]))
        self._turn()

    def _append(self, path: Path, row: dict) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def _count(self, trio, score: float) -> None:
        prompt, one, two = trio
        self.rows.append({"prompt": prompt, "score": score, "agreed": True, "length": len(one) - len(two)})

    def show(self):
        """The buttons, in Jupyter, VS Code and Colab; elsewhere a line that says so."""
        if not live():
            print(f"{len(self.open)} pairs to judge: buttons appear here in Jupyter, VS Code and Colab")
            return None
        import ipywidgets
        from IPython.display import display

        text = ipywidgets.HTML()
        buttons = [ipywidgets.Button(description=name) for name in ("A", "B", "tie")]

        def refresh():
            text.value = _html(self.question, len(self.rows))
            for button in buttons:
                button.disabled = self.question is None

        def click(button):
            self.choose(button.description)
            refresh()

        for button in buttons:
            button.on_click(click)
        refresh()
        box = ipywidgets.VBox([text, ipywidgets.HBox(buttons)])
        display(box)
        return box


def _html(question, judged: int) -> str:
    from html import escape

    if question is None:
        return f"<p>All judged: {judged} pairs. Thank you.</p>"
    prompt, a, b = map(escape, question)
    return f"<p><b>{prompt}</b></p><p><b>A</b> {a}</p><p><b>B</b> {b}</p><p>{judged} judged</p>"
