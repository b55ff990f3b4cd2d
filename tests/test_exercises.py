"""Every check accepts the right function and rejects each bug by name; sliders need a reader."""

import pytest
import torch
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
FUNCTIONS = [(check, bug) for check in RIGHT for bug in EXHIBITS[check]]


@pytest.mark.parametrize("check", RIGHT)
def test_the_right_function_is_accepted(check):
    getattr(checks, check)(RIGHT[check])


@pytest.mark.parametrize("check,bug", FUNCTIONS, ids=lambda x: getattr(x, "__name__", x))
def test_each_bug_is_rejected_by_its_name_with_its_remedy(check, bug):
    with pytest.raises(AssertionError) as rejected:
        getattr(checks, check)(bug)
    assert f"Likely bug: {bug.__name__}: {bug.__doc__}" in str(rejected.value)


def test_the_museum_has_23_bugs_and_every_check_some_of_them():
    assert sum(map(len, EXHIBITS.values())) == 23 and all(EXHIBITS.values())
    assert set(EXHIBITS) == {name for name in vars(checks) if name.startswith("check_")}


def changed(key, change):
    def wrong(pairs, pad_id):
        batch = collate(pairs, pad_id)
        return {**batch, key: change(batch[key])}

    return wrong


def dpo(change):
    def wrong(a, b, c, d, beta):
        return change(*losses.dpo_loss(a, b, c, d, beta), a, b, c, d, beta)

    return wrong


@pytest.mark.parametrize(
    "check,wrong,named",
    [
        ("sequence_logps", lambda x, ids, m: -sequence_logps(x, ids, m), "compare term by term"),
        ("sequence_logps", lambda x, ids, m: sequence_logps(x, ids, m).mean(), r"shape \(\)"),
        ("sequence_logps", lambda x, ids, m: sequence_logps(x, ids, m).detach(), "with gradient"),
        (
            "sequence_logps",
            lambda x, ids, m: sequence_logps(x.bfloat16().log_softmax(-1), ids, m).double(),
            "half_precision",
        ),
        ("collate", changed("attention_mask", torch.ones_like), "attention_mask"),
        ("collate", changed("completion_mask", lambda m: m.roll(1, 1)), "completion_mask"),
        ("collate", changed("input_ids", lambda x: x[[0, 2, 1, 3]]), "input_ids"),
        (
            "collate",
            lambda *a: {"input_ids": collate(*a)["input_ids"]},
            "attention_mask: found None",
        ),
        ("dpo_loss", dpo(lambda loss, w, l, *_: (-loss, w, l)), "term by term"),
        (
            "dpo_loss",
            dpo(lambda loss, w, l, *_: (2 * loss - loss.detach(), w, l)),
            "gradient along",
        ),
        ("dpo_loss", dpo(lambda loss, w, l, *_: (loss, w, 2 * l)), "rejected_rewards"),
        ("dpo_loss", lambda a, b, c, d, beta: losses.dpo_loss(c, d, a, b, beta), "wrong_sign"),
    ],
)
def test_other_wrong_functions_are_rejected_too(check, wrong, named):
    with pytest.raises(AssertionError, match=named):
        getattr(checks, f"check_{check}")(wrong)


IDS = torch.randint(1, 32, (3, 8), generator=torch.Generator().manual_seed(0))
MASK = torch.arange(8).expand(3, 8) >= 3


def score(model):
    return sequence_logps(model(input_ids=IDS, use_cache=False).logits, IDS, MASK)


def tiny_phi():
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    config = PhiConfig(**sizes, num_attention_heads=2, resid_pdrop=0.1, pad_token_id=0)
    return PhiForCausalLM(config).eval()


def adapted(**options):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "fc1"], **options)
    model = peft.get_peft_model(tiny_phi(), config).eval()

    @torch.no_grad()
    def adapter_off():
        with model.disable_adapter():
            return score(model)

    return model, lambda: score(model), adapter_off


def test_a_copy_is_a_reference_and_the_step_is_undone():
    policy, reference = tiny_phi(), tiny_phi()
    before = score(policy)
    checks.check_reference(policy, lambda: score(policy), lambda: score(reference).detach())
    assert torch.equal(score(policy), before)


@pytest.mark.parametrize("bug", EXHIBITS["check_reference"], ids=lambda x: x.__name__)
def test_each_wrong_reference_is_rejected_by_its_name(bug):
    policy, reference = tiny_phi(), tiny_phi()
    with pytest.raises(AssertionError, match=f"Likely bug: {bug.__name__}"):
        checks.check_reference(policy, *bug(policy, reference, score))


def test_the_adapter_switched_off_is_a_reference_unless_biases_are_trained():
    checks.check_reference(*adapted())
    with pytest.raises(AssertionError, match="reference_is_the_policy"):
        checks.check_reference(*adapted(bias="all"))


def test_dropout_in_the_policy_is_named():
    model, policy, reference = adapted()
    model.train()
    with pytest.raises(AssertionError, match="dropout is on in the policy"):
        checks.check_reference(model, policy, reference)


def test_a_step_that_misses_the_policy_is_named():
    policy, pretend = tiny_phi(), torch.nn.Parameter(torch.zeros(()))
    model, reference = torch.nn.ParameterList([pretend]), score(tiny_phi()).detach()
    with pytest.raises(AssertionError, match="does not reach the weights"):
        checks.check_reference(model, lambda: score(policy) + 0 * pretend, lambda: reference)


def test_non_finite_log_probs_are_named_before_dropout_is_blamed():
    policy = tiny_phi()
    nan = score(policy) * float("nan")
    with pytest.raises(AssertionError, match="overflow in half precision"):
        checks.check_reference(policy, lambda: nan, nan.detach)


@pytest.fixture
def jupyter(monkeypatch):
    monkeypatch.delenv("DPO_STATIC", raising=False)
    monkeypatch.setenv("JPY_SESSION_NAME", "03.ipynb")
    return monkeypatch


def test_a_batch_run_makes_no_widget(jupyter, capsys):
    assert widgets.live()
    jupyter.setenv("DPO_STATIC", "1")
    assert not widgets.live()
    widgets.show(pytest.fail, beta=(0.05, 3.0, 0.5))
    assert "sliders appear here" in capsys.readouterr().out


def test_sliders_draw_once_for_each_change(jupyter):
    seen, made = [], []
    real = widgets.ipywidgets.FloatSlider
    jupyter.setattr(
        widgets.ipywidgets, "FloatSlider", lambda *a, **k: made.append(real(*a, **k)) or made[-1]
    )
    widgets.show(lambda **values: seen.append(values), beta=(0.05, 3.0, 0.5), ref=(0.0, 1.0, 0.1))
    made[0].value = 2.0
    assert seen == [{"beta": 0.5, "ref": 0.1}, {"beta": 2.0, "ref": 0.1}]
