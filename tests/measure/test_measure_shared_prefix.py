"""Models run together are the same models run alone, and layers they share run once."""

import copy
import gc
import itertools
import weakref

import pytest
import torch
from tiny import TINY_ROWS, tiny_model, tiny_tokens

from llm_streamline.arch import get_layers
from llm_streamline.errors import ArchitectureError
from llm_streamline.measure.partial import ResumedModel
from llm_streamline.measure.shared_prefix import SharedPrefix, Variant
from llm_streamline.surgery import keep_layers

WHOLE = tuple(range(8))


def without(*layers):
    return Variant(tuple(i for i in WHOLE if i not in layers))


@torch.no_grad()
@pytest.mark.parametrize("name", TINY_ROWS)
def test_logits_are_those_of_the_pruned_models(name):
    model, inputs = tiny_model(name), {"input_ids": tiny_tokens()}
    variants = [Variant(WHOLE), without(7), without(3), without(3, 4), without(0), without(5, 6, 7), without(3, 5)]
    try:
        found = dict(SharedPrefix(model, variants).run(inputs))
    except ArchitectureError:
        pytest.skip("this family refuses one of the cuts")
    assert set(found) == set(range(len(variants)))
    for index, variant in enumerate(variants):
        whole = copy.deepcopy(model)
        try:
            keep_layers(whole, variant.sources)
        except ArchitectureError:
            continue  # it runs, but cannot be saved
        truth = whole(**inputs, use_cache=False).logits
        assert torch.equal(found[index], truth), variant.sources


def count_calls(model):
    calls = []
    for index, layer in enumerate(get_layers(model)):
        layer.register_forward_pre_hook(lambda _m, _a, index=index: calls.append(index))
    return calls


@torch.no_grad()
def test_the_layers_it_says_it_runs_are_those_that_run_and_no_prefix_runs_twice():
    model = tiny_model()
    together = SharedPrefix(model, [without(i) for i in WHOLE])
    calls = count_calls(model)
    list(together.run({"input_ids": tiny_tokens()}))
    assert len(calls) == together.num_layers_run == 7 + sum(7 - i for i in range(7))
    assert calls.count(0) == 1  # below every candidate but the one that removes it
    assert calls.count(7) == 7


@torch.no_grad()
def test_every_way_through_is_found_whatever_the_order_they_are_given_in():
    model, inputs = tiny_model(), {"input_ids": tiny_tokens()}
    variants = [without(*pair) for pair in itertools.combinations(range(8), 2)]
    forward = dict(SharedPrefix(model, variants).run(inputs))
    backward = dict(SharedPrefix(model, variants[::-1]).run(inputs))
    for index in range(len(variants)):
        assert torch.equal(forward[index], backward[len(variants) - 1 - index])
    # a model that begins with i0 < i1 < ... is a path in a tree: each node of the tree runs once
    nodes = {variant.sources[:depth] for variant in variants for depth in range(1, 7)}
    assert SharedPrefix(model, variants).num_layers_run == len(nodes)


@torch.no_grad()
def test_equal_models_run_once_and_a_tail_cut_is_a_prefix_of_the_whole():
    model, inputs = tiny_model(), {"input_ids": tiny_tokens()}
    together = SharedPrefix(model, [Variant(WHOLE), without(6, 7), without(6, 7)])
    assert together.num_layers_run == 8
    found = dict(together.run(inputs))
    assert torch.equal(found[1], found[2])
    assert torch.equal(found[0], model(**inputs, use_cache=False).logits)


@torch.no_grad()
def test_a_patched_layer_is_shared_with_nobody():
    model, inputs = tiny_model(), {"input_ids": tiny_tokens()}
    patch = copy.deepcopy(model.model.layers[3])
    patch.mlp.down_proj.weight.zero_()
    variants = [Variant(WHOLE), Variant(WHOLE, {3: patch}), Variant(WHOLE, {3: copy.deepcopy(patch)})]
    together = SharedPrefix(model, variants)
    assert together.num_layers_run == 8 + 5 + 5
    found = dict(together.run(inputs))
    assert torch.equal(found[1], found[2])
    model.model.layers[3] = patch
    assert torch.equal(found[1], model(**inputs, use_cache=False).logits)


@torch.no_grad()
def test_models_that_share_a_patched_layer_go_on_from_behind_it():
    """Two silenced layers in a row: the shared state is that behind the first of them, and it is not run again."""
    model, inputs = tiny_model(), {"input_ids": tiny_tokens()}
    patches = {i: copy.deepcopy(model.model.layers[i]) for i in (3, 4, 5)}
    for patch in patches.values():
        patch.self_attn.o_proj.weight.zero_()
    pairs = [(3, 4), (3, 5), (4, 5)]
    together = SharedPrefix(model, [Variant(WHOLE, {i: patches[i] for i in pair}) for pair in pairs])
    assert together.num_layers_run == 8 + 5 + 4
    found = dict(together.run(inputs))
    for index, pair in enumerate(pairs):
        whole = copy.deepcopy(model)
        for i in pair:
            whole.model.layers[i] = patches[i]
        assert torch.equal(found[index], whole(**inputs, use_cache=False).logits), pair


@torch.no_grad()
def test_states_of_one_batch_are_gone_before_the_next(monkeypatch):
    model = tiny_model()
    seen = []
    plain = ResumedModel.run

    def remember(self, *args, **kwargs):
        states, logits = plain(self, *args, **kwargs)
        seen.extend(weakref.ref(state) for state in states.values())
        return states, logits

    monkeypatch.setattr(ResumedModel, "run", remember)
    together = SharedPrefix(model, [without(i) for i in WHOLE])
    alive = []
    for _index, _logits in together.run({"input_ids": tiny_tokens()}):
        gc.collect()
        alive.append(sum(ref() is not None for ref in seen))
    assert max(alive) <= 8  # at most one for each layer
    assert alive[-1] == 0


def test_nothing_to_run_is_no_error():
    assert list(SharedPrefix(tiny_model(), []).run({"input_ids": tiny_tokens()})) == []
