"""Methods that are a choice of layers and a repair without training: what they put in the plan, and why."""

import copy

import pytest
import torch
from plans import facts_of, tiny_windows
from tiny import tiny_model
from torch import nn

from llm_streamline.arch import find_arch, get_layers, silence
from llm_streamline.config import ReplacementConfig
from llm_streamline.data.windows import Windows
from llm_streamline.errors import ConfigError, PlanError
from llm_streamline.measure.files import Statistics, StatsInfo
from llm_streamline.measure.probe import Probe
from llm_streamline.measure.stats import CosineStats
from llm_streamline.measure.stream import observe
from llm_streamline.methods.registry import find_method
from llm_streamline.plan import Network
from llm_streamline.replacements.build import install_plan
from llm_streamline.schema import parse
from llm_streamline.training.begin import StartSettings, begin

TRAIN, HELD_OUT, CALIBRATION = tiny_windows(8), tiny_windows(3, seed=1), tiny_windows(6, seed=2)
NETWORKS = {
    "ghosted": Network(kind="patch", init="closed_form"),
    "linear_patch": Network(kind="patch", init="hadamard"),
    "mean_update": Network(kind="bias", init="mean"),
    "replaceme": Network(kind="linear", init="closed_form"),
    "prune_comp": Network(kind="scale", init="magnitude"),
}


@torch.no_grad()
def own_text(model, count=6, length=16):
    """Windows that the model itself wrote: no other model predicts them better."""
    generator, ids = torch.Generator().manual_seed(0), tiny_windows(count).input_ids[:, :1].long()
    for _ in range(length - 1):
        chances = model(ids, use_cache=False).logits[:, -1].softmax(-1)
        ids = torch.cat([ids, torch.multinomial(chances, 1, generator=generator)], dim=1)
    return Windows(input_ids=ids.to(torch.int32))


def probe_of(model):
    settings = StartSettings.of(ReplacementConfig(ridge=1e-6), 64, 0)

    def measure():
        sums = CosineStats(len(get_layers(model)))
        observe(model, CALIBRATION, sums, 64, "test")
        return Statistics(sums, StatsInfo.model_construct(model=facts_of(model)))

    def start(plan):
        return begin(model, plan, TRAIN, HELD_OUT, settings)[0]

    return Probe(model, facts_of(model), measure, own_text(model), start, 64, 0, calibration=CALIBRATION)


def run(name, model, **options):
    found = find_method(name)
    return found.run(probe_of(model), found.config(network=NETWORKS[name], **options))


def chosen(plan):
    return [(edit.start, edit.stop) for edit in plan.edits]


@pytest.mark.parametrize("name", NETWORKS)
def test_each_brings_its_own_network_and_refuses_another(name):
    found = find_method(name)
    assert ReplacementConfig(**found.replacement).network() == NETWORKS[name]
    for network in (None, Network(kind="layer")):
        with pytest.raises(ConfigError, match=f"set replacement.kind: {NETWORKS[name].kind}"):
            parse(found.config, {"num_removed": 2, "network": network}, "options")


@pytest.mark.parametrize("name", NETWORKS)
def test_a_silent_span_is_found_and_the_repair_leaves_it_alone(name):
    model = tiny_model()
    for layer in (4, 5):
        silence(get_layers(model)[layer], find_arch(model))
    plan = run(name, model, num_removed=2)
    assert chosen(plan) == [(4, 6)]
    assert plan.edits[0].network == NETWORKS[name]
    assert plan.selection.method == name
    edited = copy.deepcopy(model)
    install_plan(edited, plan, probe_of(model).start(plan))
    ids = HELD_OUT.input_ids.long()
    torch.testing.assert_close(
        edited(ids, use_cache=False).logits, model(ids, use_cache=False).logits, rtol=1e-2, atol=2e-2
    )


def test_candidates_are_compared_with_their_repair():
    """Removing layers 3 and 4 turns everything around; the patch knows, and so it is the best span of all."""
    model = tiny_model()
    silence(get_layers(model)[4], find_arch(model))
    get_layers(model)[3].forward = lambda hidden_states, *_args, **_kwargs: -hidden_states
    repaired = run("ghosted", model, num_removed=2, verify=7, candidates="mean")
    assert chosen(repaired) == [(3, 5)]
    losses = {(c.start, c.stop): c.heldout_loss for c in repaired.selection.candidates}
    assert losses[3, 5] == pytest.approx(repaired.selection.original_loss, abs=0.02)
    assert sorted(losses.values())[1] > losses[3, 5] + 0.5
    assert repaired.selection.candidates[-1].start == 3  # by cosine alone it is the last of all


def test_replaceme_takes_several_spans_with_a_layer_between_them():
    model = tiny_model()
    for layer in (2, 5):
        silence(get_layers(model)[layer], find_arch(model))
    plan = run("replaceme", model, num_removed=2, spans=2)
    assert chosen(plan) == [(2, 3), (5, 6)]
    assert all(edit.network.kind == "linear" for edit in plan.edits)


@pytest.mark.parametrize("name", sorted(NETWORKS.keys() - {"prune_comp"}))
def test_no_span_starts_at_the_first_layer(name):
    model = tiny_model()
    for layer in (0, 1):
        silence(get_layers(model)[layer], find_arch(model))
    plan = run(name, model, num_removed=2, verify=0)
    assert plan.edits[0].start > 0


def naive_prune_comp(model, count, windows):
    """Score, remove, multiply: with explicit modules in a copied model, no plan and no view."""
    layers = list(get_layers(model))
    ids = CALIBRATION.input_ids.long()
    alive, factors, scores = list(range(len(layers))), {}, {}

    @torch.no_grad()
    def states(alive, factors, ids):
        found = []
        edited = copy.deepcopy(model)
        edited.model.layers = nn.ModuleList(get_layers(edited)[i] for i in alive)
        edited.config.num_hidden_layers = len(alive)
        for place, layer in enumerate(edited.model.layers):
            layer.register_forward_pre_hook(
                lambda _m, args, kw: found.append((args or (kw["hidden_states"],))[0]), with_kwargs=True
            )
            factor = factors.get(alive[place], 1.0)
            layer.register_forward_hook(
                lambda _m, _a, out, f=factor: (out[0] * f, *out[1:]) if isinstance(out, tuple) else out * f
            )
        edited.model.norm.register_forward_pre_hook(lambda _m, args: found.append(args[0]))
        edited(ids, use_cache=False)
        return found

    original = states(alive, {}, TRAIN.input_ids.long())
    for _ in range(count):
        found = states(alive, factors, ids)
        influence = {
            layer: 1 - float(nn.functional.cosine_similarity(found[i].double(), found[i + 1].double(), dim=-1).mean())
            for i, layer in enumerate(alive)
        }
        gone = min((layer for layer in alive if layer > 0), key=influence.__getitem__)
        alive.remove(gone)
        scores[gone] = influence[gone]
        ids = ids[:windows]  # the original is scored on all
        factors = {}
        for place, layer in enumerate(alive):
            following = alive[place + 1] if place + 1 < len(alive) else len(layers)
            if following > layer + 1:  # a cut behind this layer: its factor makes up for all that left there
                own = states(alive, factors, TRAIN.input_ids.long())[place + 1]
                factors[layer] = float((original[following].norm(dim=-1) / own.norm(dim=-1)).mean())
    return sorted(set(range(len(layers))) - set(alive)), factors, scores


@pytest.mark.parametrize(("count", "windows"), [(1, 6), (4, 6), (4, 1)])
def test_prune_and_comp_does_what_the_naive_loop_does(count, windows):
    model = tiny_model()
    expected, factors, scores = naive_prune_comp(model, count, windows)
    plan = run("prune_comp", model, num_removed=count, score_tokens=windows * 16)
    assert [i for start, stop in chosen(plan) for i in range(start, stop)] == expected
    found = probe_of(model).start(plan)
    for edit, replacement in zip(plan.edits, found, strict=True):
        assert replacement.map.log_scale.exp().item() == pytest.approx(factors[edit.start - 1], rel=1e-3)
    notes = [note.replace(":", "").split() for note in plan.selection.notes]
    assert [int(words[1]) for words in notes] == list(scores)
    assert [float(words[4]) for words in notes] == pytest.approx(list(scores.values()), abs=1e-4)


def test_one_shot_scores_the_original_only():
    model = tiny_model()
    plan = run("prune_comp", model, num_removed=3, iterative=False)
    table = probe_of(model).statistics().similarity
    influence = (1 - table.diagonal(offset=1)).tolist()
    expected = sorted(sorted(range(1, 8), key=influence.__getitem__)[:3])
    assert [i for start, stop in chosen(plan) for i in range(start, stop)] == expected


def test_prune_and_comp_keeps_the_first_layer():
    with pytest.raises(PlanError, match="leaves none"):
        run("prune_comp", tiny_model(), num_removed=7)
