import pytest
import torch
from probes import probe_of
from tiny import tiny_model

from llm_streamline.arch import find_arch, silence
from llm_streamline.errors import PlanError
from llm_streamline.measure.angular import AngularStats
from llm_streamline.measure.stream import observe
from llm_streamline.methods.uidl import UidlConfig, uidl
from llm_streamline.plan import Network, Remove, Replace


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def test_a_span_of_silent_layers_turns_nothing_and_is_taken():
    model = tiny_model()
    for layer in (4, 5):
        silence(model.model.layers[layer], find_arch(model))
    plan = uidl(probe_of(model), UidlConfig(num_removed=2, verify=0))
    assert plan.edits == (Remove(start=4, stop=6),)
    assert plan.selection.candidates[0].score == pytest.approx(0, abs=1e-7)
    assert plan.selection.score_name == "angular distance"


@pytest.mark.parametrize("length", [1, 3, 7])
def test_unverified_the_span_is_the_argmin_of_the_angle(model, length):
    probe = probe_of(model)
    plan = uidl(probe, UidlConfig(num_removed=length, verify=0))
    sums = AngularStats(8)
    observe(model, probe.calibration, sums, 64, "test")
    distances = [float(sums.distance[s, s + length]) for s in range(9 - length)]
    assert plan.selection.chosen == (plan.edits[0].start, plan.edits[0].stop)
    assert plan.edits[0].start == min(range(9 - length), key=distances.__getitem__)
    first, second = sorted(distances)[:2]
    assert plan.selection.margin.difference == pytest.approx(second - first, rel=1e-6)


def test_verified_the_lowest_heldout_loss_of_the_best_angles_wins(model):
    probe = probe_of(model)
    asked = []

    def losses(plans):
        asked.extend(plans)
        return torch.ones(5), [torch.full((5,), 9.0 - i).double() for i in range(len(plans))]

    probe.losses = losses
    plan = uidl(probe, UidlConfig(num_removed=2, verify=3))
    assert len(asked) == 3
    assert plan.edits == asked[-1].edits
    scores = [c.score for c in plan.selection.candidates]
    assert scores == sorted(scores)
    assert plan.selection.margin.quantity == "heldout_loss"


def test_one_pass_is_the_cost(model):
    probe = probe_of(model)
    uidl(probe, UidlConfig(num_removed=2, verify=0))
    assert probe.forward_passes == pytest.approx(8 / (8 + probe.head_layers))  # the pass needs no head


@pytest.mark.parametrize(("length", "span"), [(1, (6, 7)), (3, (4, 7)), (7, (0, 7))])
def test_simple_takes_the_deepest_but_the_last_and_measures_nothing(model, length, span):
    probe = probe_of(model)
    plan = uidl(probe, UidlConfig(num_removed=length, simple=True))
    assert plan.edits == (Remove(start=span[0], stop=span[1]),)
    assert probe.forward_passes == 0


def test_simple_cannot_take_every_layer(model):
    with pytest.raises(PlanError, match="keeps the last of 8"):
        uidl(probe_of(model), UidlConfig(num_removed=8, simple=True, network=Network(kind="layer")))
    with pytest.raises(PlanError, match="keeps the last of 8"):
        uidl(probe_of(model), UidlConfig(num_removed=7, simple=True, network=Network(kind="linear")))


@pytest.mark.parametrize("simple", [False, True])
def test_a_network_is_put_in_place(model, simple):
    network = Network(kind="layer", init="last")
    edit = uidl(probe_of(model), UidlConfig(num_removed=4, network=network, verify=2, simple=simple)).edits[0]
    assert isinstance(edit, Replace)
    assert edit.templates == (edit.stop - 1,)


def test_a_linear_map_never_starts_at_the_first_layer():
    model = tiny_model()
    for layer in (0, 1):
        silence(model.model.layers[layer], find_arch(model))
    assert uidl(probe_of(model), UidlConfig(num_removed=2, verify=0)).edits[0].start == 0
    plan = uidl(probe_of(model), UidlConfig(num_removed=2, verify=0, network=Network(kind="linear")))
    assert plan.edits[0].start > 0
