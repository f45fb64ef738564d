import pytest
from probes import count_layer_calls, loss_without, probe_of
from tiny import tiny_model

from llm_streamline.errors import PlanError
from llm_streamline.methods.exhaustive import ExhaustiveConfig, exhaustive
from llm_streamline.plan import Network, Remove, Replace


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.mark.parametrize("length", [1, 3, 7])
def test_the_span_is_that_of_brute_force(model, length):
    probe = probe_of(model)
    plan = exhaustive(probe, ExhaustiveConfig(num_removed=length))
    losses = [loss_without(model, range(s, s + length), probe.validation) for s in range(9 - length)]
    best = min(range(9 - length), key=losses.__getitem__)
    assert plan.edits == (Remove(start=best, stop=best + length),)
    assert [c.heldout_loss for c in plan.selection.candidates] == pytest.approx(losses, rel=1e-6)
    assert plan.selection.margin.difference == pytest.approx(sorted(losses)[1] - sorted(losses)[0], rel=1e-4)


def test_layers_below_a_span_run_once_for_all(model):
    probe = probe_of(model)
    calls = count_layer_calls(probe.model)
    exhaustive(probe, ExhaustiveConfig(num_removed=3))
    layers = 8 + sum(
        8 - 3 - s for s in range(6)
    )  # the original, then each from its span on; the last is a prefix of it
    assert probe.cost.layer_tokens == layers * probe.validation.num_tokens
    assert sum(n for n in calls if n > 2) == probe.cost.layer_tokens


def test_protected_layers_stay(model):
    plan = exhaustive(probe_of(model), ExhaustiveConfig(num_removed=3, protect_first=2, protect_last=2))
    assert [(c.start, c.stop) for c in plan.selection.candidates] == [(2, 5), (3, 6)]
    with pytest.raises(PlanError, match="no span of 5 layers fits"):
        exhaustive(probe_of(model), ExhaustiveConfig(num_removed=5, protect_first=2, protect_last=2))


def test_with_a_network_the_best_few_are_tried_again(model):
    network = Network(kind="layer", init="first")
    probe = probe_of(model)
    plan = exhaustive(probe, ExhaustiveConfig(num_removed=3, network=network, verify=2))
    candidates = plan.selection.candidates
    few = sorted(candidates, key=lambda c: c.score)[:2]
    assert all((c.heldout_loss is not None) == (c in few) for c in candidates)
    chosen = min(few, key=lambda c: c.heldout_loss)
    assert isinstance(plan.edits[0], Replace)
    assert plan.selection.chosen == (chosen.start, chosen.stop)
    original, losses = probe.losses([plan])
    assert plan.selection.original_loss == pytest.approx(float(original.mean()), rel=1e-6)
    assert chosen.heldout_loss == pytest.approx(float(losses[0].mean()), rel=1e-6)


def test_unverified_the_loss_of_plain_removal_decides(model):
    network = Network(kind="layer", init="first")
    with_network = exhaustive(probe_of(model), ExhaustiveConfig(num_removed=3, network=network, verify=0))
    without = exhaustive(probe_of(model), ExhaustiveConfig(num_removed=3))
    assert with_network.selection.chosen == without.selection.chosen
    assert [c.heldout_loss for c in with_network.selection.candidates] == [None] * 6


def test_a_linear_map_never_starts_at_the_first_layer(model):
    plan = exhaustive(probe_of(model), ExhaustiveConfig(num_removed=3, network=Network(kind="linear"), verify=2))
    assert min(c.start for c in plan.selection.candidates) == 1


def test_every_layer_is_too_many(model):
    with pytest.raises(PlanError, match="cannot be tried by taking it out"):
        exhaustive(probe_of(model), ExhaustiveConfig(num_removed=8, network=Network(kind="layer")))


def test_spans_that_a_hybrid_cannot_lose_are_no_candidates():
    model = tiny_model("lfm2", num_hidden_layers=4, layer_types=["conv", "full_attention", "conv", "conv"])
    plan = exhaustive(probe_of(model), ExhaustiveConfig(num_removed=2))
    assert [(c.start, c.stop) for c in plan.selection.candidates] == [(2, 4)]
