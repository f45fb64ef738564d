import pytest

from llm_streamline.config import Target
from llm_streamline.errors import PlanError
from llm_streamline.plan import Network
from llm_streamline.sizing import decide_size

LAYER, TWO, LINEAR, FFN = (
    Network(kind="layer"),
    Network(kind="layer", count=2),
    Network(kind="linear"),
    Network(kind="ffn"),
)
# Llama-2-7B, specifications 2.4: 32 layers of 202.38 M in 6738.4 M
LLAMA = ([202_383_360] * 32, 6_738_415_616)


def decide(target, network=None, sizes=LLAMA):
    return decide_size(target, network, list(sizes[0]), sizes[1])


@pytest.mark.parametrize(
    ("network", "count", "removed", "words"),
    [
        (None, "net", 8, "net: 8 layers leave, 0 come back, 24 remain"),
        (LAYER, "net", 9, "net: 9 layers leave, 1 come back, 24 remain"),
        (TWO, "net", 10, "net: 10 layers leave, 2 come back, 24 remain"),
        (FFN, "net", 9, "net: 9 layers leave, 1 come back, 24 remain"),
        (LINEAR, "net", 8, "net: 8 layers leave, 0 come back, 24 remain"),
        (None, "removed", 8, "removed: 8 layers leave, 0 come on top, 24 remain"),
        (LAYER, "removed", 8, "removed: 8 layers leave, 1 come on top, 25 remain"),
        (TWO, "removed", 8, "removed: 8 layers leave, 2 come on top, 26 remain"),
    ],
)
def test_layers_are_counted_as_the_convention_says(network, count, removed, words):
    decided = decide(Target(layers=8, count=count), network)
    assert decided.num_removed == removed
    assert decided.convention == words


def test_no_target_means_a_quarter_of_the_layers():
    assert decide(Target(), LAYER).num_removed == 9
    assert decide(Target(), None).num_removed == 8
    assert decide(Target(), None, ([10, 10, 10], 40)).num_removed == 1


def test_the_papers_sparsities():
    # specifications 2.4: 8 of 32 layers of Llama-2-7B are 24.0 % of its parameters, 9 are 27.0 %
    assert decide(Target(sparsity=0.24)).num_removed == 8
    assert decide(Target(sparsity=0.24), LAYER).num_removed == 9
    assert decide(Target(sparsity=0.25)).num_removed == 9
    assert decide(Target(sparsity=1e-9)).num_removed == 1


def test_sparsity_is_reached_and_one_layer_fewer_would_miss_it():
    for share in (0.05, 0.1, 0.3, 0.5, 0.9):
        for network, added in ((None, 0), (LAYER, 1), (TWO, 2)):
            removed = decide(Target(sparsity=share), network).num_removed
            net = removed - added
            assert net * LLAMA[0][0] >= share * LLAMA[1] > (net - 1) * LLAMA[0][0]


def test_a_sparsity_that_is_met_exactly_is_not_overshot():
    assert decide(Target(sparsity=0.3), None, ([10] * 10, 100)).num_removed == 3
    assert decide(Target(sparsity=0.7), None, ([10] * 10, 100)).num_removed == 7
    assert decide(Target(sparsity=0.07), None, ([1] * 50, 100)).num_removed == 7  # 0.07 * 100 is 7.000000000000001


def test_parameters_are_a_ceiling():
    # specifications 3.5: Llama-2-4.7B is 10 layers fewer
    assert decide(Target(params="4.72B"), LAYER).num_removed == 11
    for wish in (5_000_000_000, 4_000_000_000):
        net = decide(Target(params=wish), LAYER).num_removed - 1
        assert LLAMA[1] - net * LLAMA[0][0] <= wish < LLAMA[1] - (net - 1) * LLAMA[0][0]


@pytest.mark.parametrize(
    ("target", "network", "reason"),
    [
        (Target(layers=32), None, "has only 32; at most 31 layers"),
        (Target(layers=40), None, "has only 32; at most 31 layers"),
        (Target(layers=32), LAYER, "has only 32; at most 31 layers"),
        (Target(layers=31, count="net"), TWO, "has only 32; at most 30 layers"),
        (Target(layers=33, count="removed"), LAYER, "has only 32"),
        (Target(sparsity=0.99), None, "has only 32; at most 31 layers"),
        (Target(params="7B"), None, "is no smaller than the model's 6,738,415,616; nothing would be removed"),
        (Target(params=1000), None, "has only 32"),
        (Target(layers=1, count="removed"), LAYER, "nothing would become smaller; remove at least 2"),
        (Target(layers=2, count="removed"), TWO, "nothing would become smaller; remove at least 3"),
        (Target(layers=32, count="removed"), None, "has only 32"),
    ],
)
def test_a_target_that_leaves_all_or_nothing_is_refused(target, network, reason):
    with pytest.raises(PlanError) as caught:
        decide(target, network)
    assert reason in str(caught.value)


def test_what_the_refusal_calls_possible_is_possible():
    for network, most in ((None, 31), (LAYER, 31), (TWO, 30), (LINEAR, 31)):
        decided = decide(Target(layers=most), network)
        assert decided.num_removed <= 32
        with pytest.raises(PlanError, match=f"at most {most} layers"):
            decide(Target(layers=most + 1), network)


def test_every_layer_may_leave_when_one_comes_back():
    assert decide(Target(layers=31), LAYER).num_removed == 32
