"""The closed form, held to planted solutions."""

import copy

import pytest
import torch
from plans import removing, replacing, tiny_windows
from tiny import tiny_model, tiny_tokens
from torch import nn

from llm_streamline.arch import find_arch, get_layers, mlp_facts, silence
from llm_streamline.errors import ArchitectureError
from llm_streamline.measure.partial import run_tapped
from llm_streamline.replacements.build import build_replacements, install_plan
from llm_streamline.replacements.closed_form import Moments, row_weights, solve_output_projection
from llm_streamline.replacements.starts import set_start
from llm_streamline.surgery import apply_plan

WINDOWS = tiny_windows(24)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def moments_of(a, r, weight, parts=1):
    moments = Moments(a.shape[1], r.shape[1], torch.device("cpu"))
    for rows in torch.arange(len(a)).chunk(parts):
        moments.update(a[rows], r[rows], weight[rows])
    return moments


def test_a_planted_map_is_found():
    planted, a = random(6, 9), random(200, 9, seed=1)
    found = moments_of(a, a @ planted.T, torch.rand(200) + 0.1).solve(1e-12)
    torch.testing.assert_close(found.float(), planted, rtol=1e-4, atol=1e-5)


def test_batches_add_up():
    a, r, weight = random(100, 9), random(100, 6, seed=1), torch.rand(100)
    one, many = moments_of(a, r, weight).solve(0.1), moments_of(a, r, weight, parts=7).solve(0.1)
    torch.testing.assert_close(one, many, rtol=1e-5, atol=1e-6)


def test_the_solution_has_no_descent_direction():
    a, r, weight = random(50, 5).double(), random(50, 3, seed=1).double(), random(50, seed=2).abs().double()
    prior = random(3, 5, seed=3).double()
    found = moments_of(a, r, weight).solve(0.3, prior).requires_grad_(True)
    scale = 0.3 * (a.square() * weight[:, None]).sum(0).mean()
    loss = (weight * (r - a @ found.T).square().sum(1)).sum() + scale * (found - prior).square().sum()
    (gradient,) = torch.autograd.grad(loss, found)
    assert gradient.abs().max() < 1e-4 * loss.detach()


def test_an_endless_ridge_gives_the_prior():
    a, r = random(50, 5), random(50, 3, seed=1)
    prior = random(3, 5, seed=3)
    torch.testing.assert_close(moments_of(a, r, torch.ones(50)).solve(1e12, prior).float(), prior)
    assert moments_of(a, r, torch.ones(50)).solve(1e12).abs().max() < 1e-9


def test_tokens_count_as_the_weighting_says():
    target = torch.tensor([[[3.0, 4.0], [1.0, 1.0], [0.0, 0.5]]])
    assert row_weights(target, "uniform").tolist() == [[1, 1, 1]]
    assert row_weights(target, "skip_first").tolist() == [[0, 1, 1]]
    torch.testing.assert_close(row_weights(target, "relative"), torch.tensor([[1 / 12.5, 1.0, 8.0]]))


def solved(model, plan, ridge=1e-10, start=None):
    replacements = build_replacements(model, plan)
    if start:
        set_start(replacements[0], model, start, 0)
    solve_output_projection(model, plan, replacements, 0, WINDOWS, 64, ridge)
    return replacements


@torch.no_grad()
def states_at(model, boundary, ids):
    return run_tapped(model, {"input_ids": ids}, stop=boundary)[0][boundary]


class _Linear(nn.Module):
    """Stands for a span that is exactly h + (T - 1) m, where m is what the MLP before it added."""

    def __init__(self, taken, t):
        super().__init__()
        self.taken, self.t = taken, t

    def forward(self, hidden_states, *_args, **_kwargs):
        return hidden_states + self.taken["m"] @ (self.t - torch.eye(len(self.t))).T


@torch.no_grad()
def test_a_span_that_is_linear_is_recovered_exactly_by_the_linear_replacement():
    model = tiny_model()
    arch, taken = find_arch(model), {}
    planted = torch.eye(32) + 0.3 * random(32, 32)
    plan = replacing(model, 3, 5, "linear")
    silence(get_layers(model)[4], arch)
    before = get_layers(model)[2].mlp
    before.register_forward_hook(lambda _m, _a, out: taken.update(m=out.clone()))
    linear = _Linear(taken, planted)
    original = get_layers(model)[3].forward
    get_layers(model)[3].forward = linear.forward
    replacements = solved(model, plan)
    torch.testing.assert_close(replacements[0].mapped.map.weight, planted, rtol=1e-3, atol=1e-3)
    ids = tiny_tokens(seed=7)
    truth = model(ids, use_cache=False).logits
    get_layers(model)[3].forward = original
    install_plan(model, plan, replacements)
    torch.testing.assert_close(model(ids, use_cache=False).logits, truth, rtol=1e-3, atol=2e-2)


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("llama", "layer"),
        ("llama", "swiglu"),
        ("gpt2", "layer"),
        ("opt", "ffn"),
        ("opt", "layer"),
        ("granite", "layer"),
        ("gpt_neox", "layer"),
        ("bloom", "layer"),
    ],
)
def test_a_planted_output_projection_is_found(name, kind):
    """The span is one layer that the network could be, but for its last projection, which has been forgotten."""
    model = tiny_model(name)
    plan = replacing(model, 3, 4, kind)
    if kind != "layer":
        from llm_streamline.arch import silence_attention

        silence_attention(get_layers(model)[3], find_arch(model))
    replacements = build_replacements(model, plan)
    projection = replacements[0].output_projection()
    planted = {k: v.clone() for k, v in projection.state_dict().items()}
    for parameter in projection.parameters():
        parameter.normal_()
    solve_output_projection(model, plan, replacements, 0, WINDOWS, 64, 1e-10)
    ids = tiny_tokens(seed=7)
    truth = states_at(model, 4, ids)
    for key, value in planted.items():
        torch.testing.assert_close(projection.state_dict()[key], value, rtol=2e-2, atol=2e-2)
    install_plan(model, plan, replacements)
    torch.testing.assert_close(states_at(model, 4, ids), truth, rtol=1e-2, atol=2e-2)


@torch.no_grad()
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("name", ["llama", "granite"])  # granite scales what its own layers add, not what an FFN does
def test_the_last_map_of_an_ffn_is_the_least_squares_one(name, residual):
    model, ids = tiny_model(name), WINDOWS.input_ids.long()
    plan = replacing(model, 3, 6, "ffn", init="random", residual=residual, width=24)
    replacements = build_replacements(model, plan)
    set_start(replacements[0], model, "random", 0)
    layer = replacements[0].layer
    layer.mlp.down_proj.weight.normal_()  # what it starts from does not matter
    solve_output_projection(model, plan, replacements, 0, WINDOWS, 64, 1e-10, "uniform")
    x, target = (states_at(model, boundary, ids).flatten(0, 1) for boundary in (3, 6))
    a = layer.mlp.act_fn(layer.mlp.up_proj(layer.norm(x) if residual else x))
    a = torch.cat([a, torch.ones(len(a), 1)], 1).double()
    truth = torch.linalg.lstsq(a, (target - x if residual else target).double(), driver="gelsd").solution
    mine = torch.cat([layer.mlp.down_proj.weight.T, layer.mlp.down_proj.bias[None]]).double()
    torch.testing.assert_close(a @ mine, a @ truth, rtol=1e-3, atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("name", ["gemma2", "gemma3", "olmo2", "glm4", "exaone4"])
def test_behind_a_norm_the_map_is_the_least_squares_one_and_the_norm_takes_the_sizes(name):
    """Each divisor is held at the template's: what is left is linear, and shared out by the size of the channels."""
    model, ids = tiny_model(name), WINDOWS.input_ids.long()
    plan = replacing(model, 3, 6)
    replacements = build_replacements(model, plan)
    arch, layer, seen = find_arch(model), get_layers(model)[3], {}
    paths = {"map": mlp_facts(layer, arch).down, "norm": arch.mlp_norm_out}
    for key, path in paths.items():
        layer.get_submodule(path).register_forward_hook(
            lambda _m, args, out, key=key: seen.update({key: (args[0], out)})
        )
    behind, target = (states_at(model, boundary, ids).flatten(0, 1).double() for boundary in (4, 6))
    (a, o), (_, added) = (tuple(part.flatten(0, 1).double() for part in seen[key]) for key in ("map", "norm"))
    a, weight = a / o.square().mean(-1, keepdim=True).sqrt(), 1 / target.square().mean(-1)
    root = weight.sqrt().unsqueeze(1)
    truth = torch.linalg.lstsq(root * a, root * (target - behind + added), driver="gelsd").solution.T
    sizes = ((a @ truth.T).square() * weight.unsqueeze(1)).sum(0).div(weight.sum()).sqrt()
    solve_output_projection(model, plan, replacements, 0, WINDOWS, 64, 1e-12)
    mine, norm = replacements[0].output_projection().weight, replacements[0].layers[0].get_submodule(paths["norm"])
    torch.testing.assert_close(norm.weight.double() - arch.silent_norm_weight, sizes, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(a @ mine.double().T * sizes, a @ truth.T, rtol=1e-3, atol=1e-3)
    assert (a @ mine.double().T).square().mean(-1).sqrt().sub(1).abs().mean() < 0.3  # near the divisor it was held at


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "kind", "start"),
    [
        ("gemma2", "swiglu", "first"),
        ("llama", "linear", None),
        ("llama", "swiglu", "first"),
        ("llama", "ffn", "random"),
        ("gpt2", "ffn", "first"),
        ("gpt2", "linear", None),
    ],
)
def test_an_endless_ridge_gives_plain_removal(name, kind, start):
    model, ids = tiny_model(name), tiny_tokens()
    plan = replacing(model, 3, 6, kind)
    replacements = solved(model, plan, ridge=1e12, start=start)
    removed = copy.deepcopy(model)
    apply_plan(removed, removing(model, 3, 6))
    install_plan(model, plan, replacements)
    torch.testing.assert_close(model(ids, use_cache=False).logits, removed(ids, use_cache=False).logits)


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("llama", "linear"),
        ("llama", "swiglu"),
        ("llama", "ffn"),
        ("gemma3", "swiglu"),
        ("gemma3", "ffn"),
        ("olmo2", "layer"),
    ],
)
def test_the_solution_beats_removal_on_the_states(name, kind):
    model = tiny_model(name)
    plan = replacing(model, 3, 6, kind)
    replacements = solved(model, plan, ridge=1e-2, start="random" if kind == "ffn" else None)
    ids = WINDOWS.input_ids.long()
    target, plain = states_at(model, 6, ids), states_at(model, 3, ids)
    install_plan(model, plan, replacements)
    ours = states_at(model, replacements[0].out, ids)
    weight = target.square().mean(-1)
    error = lambda state: ((state - target).square().mean(-1) / weight).mean()  # noqa: E731
    assert error(ours) < 0.9 * error(plain)


def test_the_model_is_left_as_it_was():
    model = tiny_model()
    before = copy.deepcopy(model.state_dict())
    solved(model, replacing(model, 3, 6))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_where_the_output_is_not_linear_in_the_projection_it_is_refused():
    model = tiny_model("mixtral")
    with pytest.raises(ArchitectureError, match="mixture of experts"):
        solved(model, replacing(model, 3, 6))
