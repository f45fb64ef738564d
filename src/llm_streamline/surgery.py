"""The only code that changes which layers a model has.

The ModuleList, the layer count, every per-layer setting of the config and the index each layer stores change together,
or not at all: everything that can be refused is refused before the first change. Letters: L layers before, N after.
"""

import copy
from collections.abc import Sequence
from functools import partial

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from llm_streamline.arch import ArchSpec, find_arch, silence_attention, silence_mlp
from llm_streamline.blueprint import build_blueprint, compare_layers, plain_settings
from llm_streamline.errors import ArchitectureError, PlanError
from llm_streamline.layer_config import LIST_KEYS, check_sources, edited_config, text_config
from llm_streamline.merging import merged_layers
from llm_streamline.silencing import silences
from llm_streamline.spread import follow_weights, is_spread


def apply_plan(model: PreTrainedModel, plan) -> list[int]:
    """Give `model`, in place, the layers that `plan` asks for; their weights stay the original's, or are merged ones.

    Where a replacement stands, the layer its start is copied from stands in for it: a deep copy, ready to be trained or
    overwritten.

    Args:
        model: the model the plan was made for.
        plan: a `plan.Plan`.

    Returns:
        N original layer indices: layer i of the edited model came from layer `result[i]`.

    Raises:
        PlanError: if the plan was made for another number of layers.
        ArchitectureError: if the edit is not sound for this architecture.
    """
    arch = find_arch(model)
    if plan.model.num_layers != arch.num_layers:
        raise PlanError(
            f"the plan is for a model of {plan.model.num_layers} layers, this one has {arch.num_layers}; "
            "make a plan for this model"
        )
    sources = list(plan.layer_sources())
    merged = merged_layers(model, plan)  # before the cut, while all their layers are there
    silenced = [
        (place, edit.part)
        for edit in silences(model, plan)
        for place in range(plan.position_of(edit), plan.position_of(edit) + len(edit.templates))
    ]
    keep_layers(model, sources)
    layers = model.get_submodule(arch.layers)
    for place, part in silenced:
        (silence_attention if part == "attention" else silence_mlp)(layers[place], arch)
    for place, layer in merged.items():
        layers[place].load_state_dict(layer.state_dict())
    return sources


def keep_layers(model: PreTrainedModel, sources: Sequence[int]) -> None:
    """Rebuild `model` in place so that its layer i is the original layer `sources[i]`.

    Weights are not changed. The first use of an index keeps the layer itself, every further use a deep copy of it.

    Args:
        model: a transformers causal language model.
        sources: N indices in [0, L), in any order.

    Raises:
        ArchitectureError: if the result would not be sound; the model is then as it was.
    """
    arch = find_arch(model)
    check_sources(sources, arch.num_layers)
    if any(type(parameter).__name__ == "DTensor" for parameter in model.parameters()):
        raise ArchitectureError("the model is sharded over processes; edit it before it is sharded")
    layers = model.get_submodule(arch.layers)
    configs = _edited_configs(model, sources)
    chosen = [_own_or_copy(layers, sources, place) for place in range(len(sources))]
    renumbered = _Renumbering(arch, chosen, text_config(model.config), text_config(configs[id(model.config)]))
    try:
        renumbered.apply()
        fresh = build_blueprint(model, configs[id(model.config)])
        if getattr(model, "hf_quantizer", None) is None:  # packed weights have other classes and shapes than fresh ones
            compare_layers(nn.ModuleList(chosen), fresh.get_submodule(arch.layers), arch.model_type)
    except BaseException:
        renumbered.undo()
        raise
    for module in model.modules():
        _swap_configs(module, configs)
    for layer in chosen:
        for module in layer.modules():
            _swap_configs(module, configs)
    _set_layers(model, arch.layers, chosen)
    _follow_blueprint(model, fresh, arch.layers)
    _follow_device_map(model, arch.layers, sources)


def shared_view(
    model: PreTrainedModel,
    sources: Sequence[int],
    replacements: dict[int, nn.Module] | None = None,
    outside: dict[str, nn.Module] | None = None,
) -> PreTrainedModel:
    """A second model whose layer i is the original layer `sources[i]`, sharing every weight with `model`.

    Only the modules on the way to the layer list are (shallow) copies, so a view costs no memory and leaves `model`
    as it is. It is for forwards with `use_cache=False` and hooks of your own: layers keep the index of their place in
    `model`, which a cache would stumble over, and `output_hidden_states` installs lasting hooks.

    Args:
        model: a transformers causal language model.
        sources: N indices in [0, L), in any order, repeated or not.
        replacements: modules to use at places in [0, N) instead of the shared layer.
        outside: modules to use instead of the shared ones elsewhere (embedding, final norm, head), by their path.

    Raises:
        ArchitectureError: if the edit is not sound for this architecture.
    """
    arch = find_arch(model)
    check_sources(sources, arch.num_layers)
    layers = model.get_submodule(arch.layers)
    replacements = replacements or {}
    wrong = [place for place in replacements if not 0 <= place < len(sources)]
    if wrong:
        raise ArchitectureError(f"no layer {wrong[0]} to replace: the view has {len(sources)} layers")
    configs = _edited_configs(model, sources)
    view = shallow_copy(model, configs)
    copied = {""}
    for path in (arch.layers, *(outside or ())):
        _copy_way(view, path, copied, configs)
    if is_spread(model):
        for module in (*replacements.values(), *(outside or {}).values()):
            follow_weights(module)
    for path, module in (outside or {}).items():
        owner, _, name = path.rpartition(".")
        view.get_submodule(owner)._modules[name] = module
    chosen = [replacements.get(place, layers[source]) for place, source in enumerate(sources)]
    _set_layers(view, arch.layers, chosen)
    return view


def _copy_way(view, path, copied, configs) -> None:
    """Give `view` shallow copies of its own of the modules on the way to `path`; `copied` has those it has already."""
    node, way = view, ""
    for name in path.split(".")[:-1]:
        way = f"{way}.{name}" if way else name
        if way not in copied:
            node._modules[name] = shallow_copy(node._modules[name], configs)
            copied.add(way)
        node = node._modules[name]


def _edited_configs(model, sources) -> dict[int, PreTrainedConfig]:
    """Edited configs by the id of the object they stand in for: the model's own and its nested text config."""
    new = edited_config(model.config, sources)
    old_text, new_text = text_config(model.config), text_config(new)
    configs = {id(model.config): new, id(old_text): new_text}
    for module in model.modules():  # some families hand copies of the config to their parts
        for value in vars(module).values():
            if type(value) is type(old_text) and id(value) not in configs:
                same_depth = value.num_hidden_layers == old_text.num_hidden_layers
                configs[id(value)] = edited_config(value, sources) if same_depth else value
    return configs


def _swap_configs(module, configs) -> None:
    for name, value in vars(module).items():
        if isinstance(value, PreTrainedConfig) and id(value) in configs:
            setattr(module, name, configs[id(value)])


def _own_or_copy(layers, sources, place):
    source = sources[place]
    if source not in sources[:place]:
        return layers[source]
    hooked = any(hasattr(module, "_hf_hook") for module in layers[source].modules())
    if hooked and any(parameter.is_meta for parameter in layers[source].parameters()):
        raise ArchitectureError(
            f"layer {source} is offloaded, so that it cannot be copied; load the model without offloading it"
        )
    shared = [v for m in layers[source].modules() for v in vars(m).values() if isinstance(v, PreTrainedConfig)]
    return copy.deepcopy(layers[source], {id(config): config for config in shared})


class _Renumbering:
    """Writes each layer's place into its index fields, and can take that back.

    A layer that keeps a copy of a per-layer list (GPT-Neo's attention_layers) gets the edited one.
    """

    def __init__(self, arch: ArchSpec, chosen: Sequence[nn.Module], old: PreTrainedConfig, new: PreTrainedConfig):
        self._changes = []  # (module, attribute, old value, new value)
        lists = {key: value for key, value in vars(old).items() if isinstance(value, list) and key in LIST_KEYS}
        for place, layer in enumerate(chosen):
            modules = dict(layer.named_modules())
            for field in arch.index_fields:
                module = modules.get(field.module)
                if module is not None and field.name in vars(module):
                    self._changes.append((module, field.name, getattr(module, field.name), place + field.offset))
            for module in modules.values():
                for name in lists.keys() & vars(module).keys():
                    if getattr(module, name) == lists[name]:
                        self._changes.append((module, name, lists[name], getattr(new, name)))

    def apply(self) -> None:
        """Write the new values."""
        for module, name, _, new in self._changes:
            setattr(module, name, new)

    def undo(self) -> None:
        """Write the old values back."""
        for module, name, old, _ in self._changes:
            setattr(module, name, old)


def _follow_blueprint(model, fresh, path) -> None:
    """Plain settings that the modules around the layers derive from the config (counts, has_sliding_layers)."""
    node, built = model, fresh
    for name in ["", *path.split(".")[:-1]]:
        node, built = node.get_submodule(name), built.get_submodule(name)
        ours = plain_settings(node)
        for key, value in plain_settings(built).items():
            if key in ours and ours[key] != value and key != "name_or_path":
                setattr(node, key, value)


def _follow_device_map(model, path, sources) -> None:
    """Renumber what accelerate remembers about where each layer is; saving reads it."""
    device_map = getattr(model, "hf_device_map", None)
    if not device_map:
        return
    edited = {}
    for name, device in device_map.items():
        index, _, rest = name.removeprefix(f"{path}.").partition(".")
        if not name.startswith(f"{path}.") or not index.isdigit():
            edited[name] = device
            continue
        for place in (place for place, source in enumerate(sources) if source == int(index)):
            edited[".".join(filter(None, (path, str(place), rest)))] = device
    model.hf_device_map = edited


def _set_layers(model, path, layers) -> None:
    owner, _, name = path.rpartition(".")
    model.get_submodule(owner)._modules[name] = nn.ModuleList(layers)


def shallow_copy(module: nn.Module, configs: dict[int, PreTrainedConfig] | None = None) -> nn.Module:
    """A copy of `module` with its own dictionaries, and the same children and tensors.

    Args:
        module: any module.
        configs: id of a config it holds -> the config that the copy holds instead.
    """
    clone = copy.copy(module)
    for name, value in vars(module).items():
        if isinstance(value, dict):
            clone.__dict__[name] = copy.copy(value)
    _swap_configs(clone, configs or {})
    _rebind_offload_hook(clone)
    return clone


def _rebind_offload_hook(clone: nn.Module) -> None:
    # accelerate stores a bound `forward` on the module; on a copy it would still run the original
    clone.__dict__.pop("forward", None)
    clone.__dict__.pop("_old_forward", None)
    hook = clone.__dict__.get("_hf_hook")
    if hook is not None:
        clone.forward = partial(_hooked_forward, clone, hook)


def _hooked_forward(module, hook, *args, **kwargs):
    args, kwargs = hook.pre_forward(module, *args, **kwargs)
    return hook.post_forward(module, type(module).forward(module, *args, **kwargs))
