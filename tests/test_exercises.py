"""Every check accepts the right function and rejects each bug by name; sliders need a reader."""

import time
from concurrent.futures import ThreadPoolExecutor

import matplotlib.pyplot as plt
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import PhiConfig, PhiForCausalLM

from dpo_utils import losses
from dpo_utils.exercises import checks, widgets
from dpo_utils.exercises.bugs import EXHIBITS
from dpo_utils.logps import sequence_logps
from dpo_utils.tokens import collate


def kl_on_own_samples(policy, ref, dataset, generator):
    own = policy.multinomial(20_000, replacement=True, generator=generator)
    return (policy / ref).log()[own].mean()


RIGHT = {
    "check_sequence_logps": sequence_logps,
    "check_collate": collate,
    "check_dpo_loss": losses.dpo_loss,
    "check_ipo_loss": lambda *inputs: losses.preference_loss("ipo", *inputs)[0],
    "check_kl_estimate": kl_on_own_samples,
}
IDS = torch.randint(1, 32, (3, 8), generator=torch.Generator().manual_seed(0))
MASK = torch.arange(8).expand(3, 8) >= 3
FUNCTIONS = [(check, bug) for check in RIGHT for bug in EXHIBITS[check]]


@pytest.mark.parametrize("check", RIGHT)
def test_the_right_function_is_accepted(check):
    getattr(checks, check)(RIGHT[check])


@pytest.mark.parametrize("check,bug", FUNCTIONS, ids=lambda x: getattr(x, "__name__", x))
def test_each_bug_is_rejected_by_its_name_with_its_remedy(check, bug):
    with pytest.raises(AssertionError) as rejected:
        getattr(checks, check)(bug)
    assert f"Likely bug: {bug.__name__}: {bug.__doc__}" in str(rejected.value)
    assert "\n" not in str(rejected.value)


def dpo(change):
    return lambda *inputs: change(*losses.dpo_loss(*inputs))


@pytest.mark.parametrize(
    "check,wrong,named",
    [
        ("sequence_logps", lambda *x: sequence_logps(*x).mean(), "logps: found -"),
        ("sequence_logps", lambda *x: sequence_logps(*x).detach(), "expected .* grad_fn"),
        ("collate", lambda *x: collate(*x) | {"completion_mask": MASK}, "completion_mask"),
        ("collate", lambda *_: {}, r"input_ids: found tensor\(\[\]\)"),
        ("dpo_loss", dpo(lambda loss, w, l: (-loss, w, l)), "none of the museum's"),
        ("dpo_loss", dpo(lambda loss, w, l: (loss.detach(), w, l)), "losses"),
        ("dpo_loss", dpo(lambda loss, w, l: (2 * loss - loss.detach(), w, l)), "gradient"),
        ("dpo_loss", dpo(lambda loss, w, l: (loss, w, 2 * l)), "rewards"),
    ],
)
def test_other_wrong_functions_are_rejected_too(check, wrong, named):
    with pytest.raises(AssertionError, match=named):
        getattr(checks, f"check_{check}")(wrong)


def score(model):
    return sequence_logps(model(input_ids=IDS, use_cache=False).logits, IDS, MASK)


def tiny_phi():
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    config = PhiConfig(**sizes, num_attention_heads=2, resid_pdrop=0.1, pad_token_id=0)
    return PhiForCausalLM(config).eval()


def adapted(**options):
    config = LoraConfig(r=2, target_modules=["q_proj", "fc1"], **options)
    model = get_peft_model(tiny_phi(), config).eval()

    def adapter_off():
        with torch.no_grad(), model.disable_adapter():
            return score(model)

    return model, lambda: score(model), adapter_off


def test_a_copy_is_a_reference_and_the_weights_are_put_back():
    policy, reference = tiny_phi(), tiny_phi()
    before = score(policy)
    checks.check_reference(policy, lambda: score(policy), lambda: score(reference).detach())
    assert torch.equal(score(policy), before)


@pytest.mark.parametrize("bug", EXHIBITS["check_reference"], ids=lambda x: x.__name__)
def test_each_wrong_reference_is_rejected_by_its_name(bug):
    policy, reference = tiny_phi(), tiny_phi()
    with pytest.raises(AssertionError, match=f"Likely bug: {bug.__name__}"):
        checks.check_reference(policy, *bug(policy, reference, score))


def test_the_adapter_switched_off_is_a_reference_unless_something_else_is_wrong():
    model, policy, reference = adapted()
    checks.check_reference(model, policy, reference)
    nan = policy() * float("nan")
    for arguments, named in (
        (adapted(bias="all"), "reference_is_the_policy"),
        ((model, lambda: nan, nan.detach), "overflow in half precision"),
        ((model.train(), policy, reference), "dropout is on in the policy"),
    ):
        with pytest.raises(AssertionError, match=named):
            checks.check_reference(*arguments)


def test_a_batch_run_makes_no_widget_and_a_slider_draws_when_it_is_let_go(monkeypatch, capsys):
    seen, cell = [], plt.figure()  # the figure of a cell that still runs
    say = lambda ax: time.sleep(0.05) or seen.append(ax)  # noqa: E731
    draw = lambda ax, beta: (say(ax), ax.set_title(beta), say(ax))  # noqa: E731
    monkeypatch.setenv("JPY_SESSION_NAME", "03.ipynb")
    monkeypatch.setenv("DPO_STATIC", "1")
    assert widgets.show(draw, beta=(0.5, 0.0, 3.0, 0.1)) is None
    assert "sliders appear here" in capsys.readouterr().out and seen == []
    monkeypatch.delenv("DPO_STATIC")
    slider, picture = widgets.show(draw, beta=(0.5, 0.0, 3.0, 0.1)).children
    before = picture.value
    with ThreadPoolExecutor(2) as pool:  # Jupyter answers the browser in more than one thread
        [*pool.map(slider.set_trait, ("value",) * 2, (1.0, 2.0))]
    assert picture.value != before and plt.get_fignums() == [cell.number]
    assert len(seen) == 6 and seen[::2] == seen[1::2] and seen[-1].get_title() == str(slider.value)
    assert not slider.continuous_update
