import pytest

from llm_streamline.config import Target
from llm_streamline.errors import ConfigError, PlanError
from llm_streamline.plan import Network
from llm_streamline.sizing import Cost, decide_size

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


GIB = 2**30


def limited(target, cost, network=None):
    return decide_size(target, network, [1] * len(cost.layers), 100, {target.limited: cost})


def test_memory_is_a_ceiling_in_bytes():
    cost = Cost(2 * LLAMA[1], tuple(2 * size for size in LLAMA[0]))  # bfloat16
    for wish in ("9GiB", "6.5GiB", 10_000_000_000):
        target = Target(memory=wish)
        net = limited(target, cost, LAYER).num_removed - 1
        assert cost.total - net * cost.layers[0] <= target.memory < cost.total - (net - 1) * cost.layers[0]
    assert limited(Target(memory="9GiB"), cost).target == "at most 9.0GiB of weights"


def test_kv_cache_is_a_ceiling_a_token_or_at_a_context():
    cost = Cost(32 * 16384, (16384.0,) * 32)  # Llama-2-7B: 2 * 32 heads * 128 * 2 bytes a layer
    assert limited(Target(kv_cache="393216"), cost).num_removed == 8
    assert limited(Target(kv_cache="384KiB"), cost, LAYER).num_removed == 9
    whole = Target(kv_cache="1.5GiB@4k")
    assert (whole.kv_bytes, whole.kv_context) == (round(1.5 * GIB), 4000)
    at_context = Cost(cost.total * 4000, tuple(layer * 4000 for layer in cost.layers))
    decided = limited(whole, at_context)
    assert (32 - decided.num_removed) * 16384 * 4000 <= 1.5 * GIB < (33 - decided.num_removed) * 16384 * 4000
    assert decided.target == "at most 1.5GiB of KV cache at 4,000 tokens"


def test_a_target_survives_its_recipe():
    for target in (Target(memory="9GiB"), Target(kv_cache="2GiB@32k"), Target(kv_cache=20480), Target(latency="0.75x")):
        assert Target(**target.model_dump(mode="json")) == target
    assert Target(latency="0.75x").latency == 0.75


def test_what_is_possible_is_said_in_the_targets_own_unit():
    cost = Cost(100.0, (10.0,) * 8)
    with pytest.raises(PlanError, match="at most 7 layers can go, which leaves 30 bytes"):
        limited(Target(memory=20), cost)
    assert limited(Target(memory=30), cost).num_removed == 7
    with pytest.raises(PlanError, match="is no smaller than the model's 100 bytes"):
        limited(Target(memory=100), cost)
    with pytest.raises(PlanError, match="take nothing of what the target limits"):
        limited(Target(kv_cache=5), Cost(0.0, (0.0,) * 8))


def test_a_target_that_needs_the_model_says_so():
    with pytest.raises(ConfigError, match="decided on the model itself"):
        decide(Target(memory="9GiB"))


def test_layers_smaller_than_the_mean_take_one_more():
    from plans import facts, replace

    from llm_streamline.plan import Plan, Remove

    cost = Cost(100.0, (5.0, 5.0, 5.0, 25.0, 25.0, 25.0))
    decided = limited(Target(memory=80), cost)
    assert decided.num_removed == 2  # of the mean layer of 15
    small = Plan(model=facts(6), edits=(Remove(start=0, stop=2),))
    large = Plan(model=facts(6), edits=(Remove(start=3, stop=5),))
    assert not decided.is_met_by(small)
    assert decided.is_met_by(large)
    assert decided.is_met_by(Plan(model=facts(6), edits=())), "no layer leaves, so no larger ones could"
    assert cost.after(Plan(model=facts(6), edits=(replace(1, 4),))) == 100 - 5 - 25
    more = decided.one_more(0)
    assert more.num_removed == 3
    assert "smaller than the mean" in more.convention
    with pytest.raises(PlanError, match="no 5 layers"):
        more.one_more(0).one_more(0).one_more(0)
