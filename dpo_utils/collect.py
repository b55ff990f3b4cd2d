"""A person as the judge: two answers side by side, blind, in random order; every click is saved as a preference."""

import json
import os
import random
from pathlib import Path

from dpo_utils.data import fold
from dpo_utils.exercises.widgets import live


class BlindChoice:
    """Ask someone which answer is better, prompt by prompt; `show()` draws buttons, `choose` is what they call.

    prompts, first, second: lists of texts. path: JSONL that gains a row a choice (prompt, chosen, rejected), which
    `load_preferences` reads; ties go to `<name>_ties.jsonl` beside it. Begun again with the same path, prompts that are
    labelled already are not asked again; a line that a crash cut short is dropped, and said. What needs no eyes is not
    asked and not saved: answers that look the same are a tie, as in `judges.compare`, and a blank one loses. `rows`
    holds the scores, as `judges.compare` gives them, for `win_rate`.
    """

    def __init__(self, prompts, first, second, path, seed: int = 0):
        self.path, self.ties = Path(path), Path(path).with_name(f"{Path(path).stem}_ties.jsonl")
        self.rng, self.rows = random.Random(seed), []
        done = self._done()
        self.open = []
        for trio in dict.fromkeys(zip(prompts, first, second, strict=True)):  # each once
            verdict = done.get(trio, _plain_verdict(*trio[1:]))
            if verdict is None:
                self.open.append(trio)
            else:
                self._count(trio, verdict)
        self._turn()

    def _done(self) -> dict:
        """{(prompt, first, second): verdict} in both orders of the answers, from the files."""
        done = {}
        for path, verdicts in ((self.path, (1.0, 0.0)), (self.ties, (0.5, 0.5))):
            for row in _read(path):
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


def _plain_verdict(one: str, two: str) -> float | None:
    """The first answer's score where nobody need look, and `load_preferences` would refuse the pair; else None."""
    one, two = fold(one), fold(two)
    if one == two:
        return 0.5
    return None if one and two else float(bool(one))


def _read(path: Path) -> list[dict]:
    """The rows of a file. A last line that a crash cut short is dropped; one that lacks nothing but its end gets it."""
    if not path.exists():
        return []
    *lines, last = path.read_bytes().split(b"\n")
    if last and _is_json(last):
        lines.append(last)
        with open(path, "ab") as file:
            file.write(b"\n")
    elif last:
        print(f"{path}: the last line is cut short ({len(last)} bytes) and dropped: its pair is asked again")
        os.truncate(path, path.stat().st_size - len(last))
    for number, line in enumerate(lines, start=1):
        if line.strip() and not _is_json(line):
            raise ValueError(f"{path}, line {number}: not JSON: {line[:60]!r}; mend or delete the line")
    return [json.loads(line) for line in lines if line.strip()]


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def _html(question, judged: int) -> str:
    from html import escape

    if question is None:
        return f"<p>All judged: {judged} pairs. Thank you.</p>"
    prompt, a, b = map(escape, question)
    return f"<p><b>{prompt}</b></p><p><b>A</b> {a}</p><p><b>B</b> {b}</p><p>{judged} judged</p>"
