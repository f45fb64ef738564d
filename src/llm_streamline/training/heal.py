"""Healing: training the original's own weights beside the replacement, on copies that the original never sees.

What a rung trains (`rungs.py`) becomes float32 parameters of its own; everything else is shared with the original, so
that original and student are both in memory for little more than one. After training the result is written into the
edited model as stock weights: copies are copied back, adapters are multiplied out and added.
"""

import importlib.util
from collections import OrderedDict

import torch
from torch import Tensor, nn

from llm_streamline.arch import ArchSpec, find_arch, get_layers, silencing
from llm_streamline.config import TrainingConfig
from llm_streamline.errors import ArchitectureError, ConfigError, MissingExtraError
from llm_streamline.layer_config import text_config
from llm_streamline.measure.edited import plan_patches
from llm_streamline.plan import Plan
from llm_streamline.replacements.base import Replacement
from llm_streamline.silencing import silences
from llm_streamline.surgery import shallow_copy
from llm_streamline.training.rungs import adapted_names, check_targets, layer_names, outside_names

_ADAPTER = "default"  # peft's name for the one adapter of a layer


def check_healing(model: nn.Module, config: TrainingConfig, has_network: bool) -> None:
    """Refuse, before the slow work, what cannot be trained.

    Args:
        model: the original.
        config: objective and rung.
        has_network: whether the plan puts a network back.

    Raises:
        ConfigError: if the head is tied and may not be untied, a projection does not exist, or `mse` has no network.
        ArchitectureError: if the weights are packed or not in memory.
        MissingExtraError: if adapters are wanted and peft is not installed.
    """
    if not config.tokens or not config.heals:
        return
    if "mse" in config.objective and not has_network:
        raise ConfigError(
            "the objective mse compares what a network puts out, and nothing is put back here; "
            "use hidden, which compares the layers that stay, or lm or kl"
        )
    if getattr(model, "hf_quantizer", None) is not None:
        raise ArchitectureError(f"training.trainable: {config.trainable} needs unpacked weights; these are quantised")
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ArchitectureError(
            f"training.trainable: {config.trainable} needs all weights in memory; some of them are offloaded"
        )
    if config.trainable == "lora":
        if importlib.util.find_spec("peft") is None:
            raise MissingExtraError('training.trainable: lora needs peft: pip install "llm-streamline[lora]"')
        check_targets(get_layers(model), config)
    if config.trainable == "head" and is_tied(model) and not config.heal.untie_head:
        size = model.get_output_embeddings().weight.numel()
        raise ConfigError(
            "the head shares its weights with the input embedding: training it would train both. Set "
            f"training.heal.untie_head: true (the result has {size:,} parameters more), or use another rung"
        )


def is_tied(model: nn.Module) -> bool:
    """Whether head and input embedding are one tensor."""
    return model.get_output_embeddings().weight is model.get_input_embeddings().weight


class Healed(nn.Module):
    """The parameters of one rung, and the modules of the edited model in which they stand.

    Attributes:
        patches: position in the edited model -> layer with trained parameters.
        outside: path -> module with trained parameters, elsewhere.
        resume_at: boundary below which edited and original model are the same, in training too.
    """

    def __init__(
        self, model: nn.Module, plan: Plan, replacements: list[Replacement], config: TrainingConfig, seed: int
    ):
        super().__init__()
        self._arch = find_arch(model)
        self._untie = config.heal.untie_head and is_tied(model) and config.trainable in ("head", "full")
        self.patches: dict[int, nn.Module] = {}
        self.outside: dict[str, nn.Module] = {}
        self._adapters: dict[tuple[int, str], nn.Module] = {}
        self.trained = nn.ParameterDict()  # full name with "/" for ".", which parameters may not have in theirs
        self._masters: dict[int, nn.Parameter] = {}  # id of a parameter outside the layers -> its copy: tied stays tied
        layers = _edited_layers(model, plan, replacements)
        own = {id(p) for replacement in replacements for p in replacement.parameters()}
        silent = _silent_names(model, plan, layers, self._arch)
        first_edit = min((plan.position_of(edit) for edit in plan.edits), default=len(layers))
        if config.trainable == "lora":
            self._add_adapters(layers, own, silent, config, seed)
        for position, layer in enumerate(layers):
            last_layers = config.heal.last_layers
            names = layer_names(config.trainable, layer, position, len(layers), last_layers, first_edit)
            names -= {name for name, p in layer.named_parameters() if id(p) in own} | silent.get(position, set())
            if names:
                self.patches[position] = self._copied(layer, names, f"{self._arch.layers}.{position}.", apart=True)
        for path, names in outside_names(config.trainable, model, self._arch).items():
            apart = self._untie and path == self._arch.head
            self.outside[path] = self._copied(model.get_submodule(path), names, f"{path}.", apart)
        above = {self._arch.head, self._arch.final_norm}
        self.resume_at = 0 if self.outside.keys() - above else min(self.patches, default=len(layers))

    @property
    def names(self) -> set[str]:
        """Names in the edited model of the parameters that are trained; an adapter goes by its own names."""
        return {key.replace("/", ".") for key in self.trained}

    def _copied(self, module: nn.Module, names: set[str], prefix: str, apart: bool = False) -> nn.Module:
        """A copy of `module` that shares every tensor but the named ones, which become parameters of ours."""
        clone = _own_dictionaries(module)
        for name, parameter in module._parameters.items():
            if parameter is not None and name in names:
                known = None if apart else self._masters.get(id(parameter))
                if known is None:
                    known = nn.Parameter(_to_float(parameter, prefix + name))
                    self.trained[(prefix + name).replace(".", "/")] = known
                    if not apart:
                        self._masters[id(parameter)] = known
                clone._parameters[name] = known
        for name, child in module._modules.items():
            inner = {rest for whole in names for first, _, rest in [whole.partition(".")] if first == name and rest}
            if inner:
                clone._modules[name] = self._copied(child, inner, f"{prefix}{name}.", apart)
        return clone

    def _add_adapters(
        self,
        layers: list[nn.Module],
        own: set[int],
        silent: dict[int, set[str]],
        config: TrainingConfig,
        seed: int,
    ) -> None:
        """Put peft's adapters beside the projections; each starts as zero, so that step 0 is the edited model."""
        from peft import LoraConfig, inject_adapter_in_model

        wanted = {}
        for position, layer in enumerate(layers):
            names = {n for n in adapted_names(layer, config) if not _holds(layer.get_submodule(n), own)}
            names = {n for n in names if f"{n}.weight" not in silent.get(position, ())}
            if names:
                wanted[position] = names
                self.patches[position] = _whole_copy(layer)
        places = nn.ModuleDict({str(position): layer for position, layer in self.patches.items()})
        targets = [f"{position}.{name}" for position, names in wanted.items() for name in sorted(names)]
        first = places.get_submodule(targets[0])
        settings = LoraConfig(
            r=config.heal.rank,
            lora_alpha=config.heal.alpha,
            lora_dropout=0.0,  # the student runs in evaluation mode: its target is deterministic
            target_modules=targets,
            fan_in_fan_out=type(first).__name__ == "Conv1D",
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            inject_adapter_in_model(settings, places)
        for position, names in wanted.items():
            for name in sorted(names):
                module = self.patches[position].get_submodule(name)
                self._adapters[position, name] = module
                for part in (module.lora_A[_ADAPTER], module.lora_B[_ADAPTER]):
                    part.float()
                prefix = f"{self._arch.layers}.{position}.{name}"
                for kind in ("lora_A", "lora_B"):
                    weight = getattr(module, kind)[_ADAPTER].weight
                    self.trained[f"{prefix}.{kind}".replace(".", "/")] = weight

    @torch.no_grad()
    def install(self, model: nn.Module) -> None:
        """Write what was trained into `model`, edited by the plan already; everything else keeps its bits."""
        if self._untie:
            untie_head(model)
        targets = dict(model.named_parameters(remove_duplicate=False))
        layers = get_layers(model)
        for (position, name), adapter in self._adapters.items():
            weight = layers[position].get_submodule(name).weight
            change = adapter.get_delta_weight(_ADAPTER)
            if change.any():  # a sum with zero keeps the value, but not the sign of a zero
                weight.copy_(weight.float() + change.to(weight.device))
        for key, value in self.trained.items():
            name = key.replace("/", ".")
            if not name.endswith((".lora_A", ".lora_B")):
                targets[name].copy_(value)


def untie_head(model: nn.Module) -> None:
    """Give the head weights of its own, equal to the embedding's, and say so in the config."""
    head = model.get_output_embeddings()
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    for config in (model.config, text_config(model.config)):
        config.tie_word_embeddings = False
    if hasattr(model, "all_tied_weights_keys"):  # what saving would leave out
        model.all_tied_weights_keys = {}


def _edited_layers(model: nn.Module, plan: Plan, replacements: list[Replacement]) -> list[nn.Module]:
    """The layers of the edited model, as they stand while the replacements are trained."""
    patched = plan_patches(model, plan, replacements)
    layers = get_layers(model)
    return [patched.get(position, layers[source]) for position, source in enumerate(plan.layer_sources())]


def _silent_names(model: nn.Module, plan: Plan, layers: list[nn.Module], arch: ArchSpec) -> dict[int, set[str]]:
    """By place, the parameters that make a sublayer silent, which stay as they are: else it would speak again."""
    return {
        position: set(silencing(layers[position], arch, edit.part))
        for edit in silences(model, plan)
        for position in range(plan.position_of(edit), plan.position_of(edit) + len(edit.templates))
    }


def _to_float(parameter: Tensor, name: str) -> Tensor:
    if not parameter.is_floating_point():
        raise ArchitectureError(f"{name} holds {parameter.dtype} values, which cannot be trained")
    return parameter.detach().clone().float()


def _own_dictionaries(module: nn.Module) -> nn.Module:
    """A copy that shares children and tensors, without the original's hooks."""
    clone = shallow_copy(module)
    clone._forward_hooks, clone._forward_pre_hooks = OrderedDict(), OrderedDict()
    return clone


def _whole_copy(module: nn.Module) -> nn.Module:
    """A copy whose modules are all its own, and whose tensors are all shared."""
    clone = _own_dictionaries(module)
    for name, child in module._modules.items():
        clone._modules[name] = child if child is None else _whole_copy(child)
    return clone


def _holds(module: nn.Module, own: set[int]) -> bool:
    return any(id(parameter) in own for parameter in module.parameters())
