"""An FFN or a SwiGLU that no stock layer of this model can hold while it is trained, and how it is handed over.

After training an FFN becomes a stock layer where that is exact: in a gated model whose config knows MLP biases, the up
projection becomes the constant one, so that act(W1 x + b1) * 1 is left. Otherwise the module itself is put in place and
the checkpoint ships its code (`code.py`).
"""

import torch
from torch import nn

from llm_streamline.arch import ArchSpec, get_layers, mlp_facts, silence_attention
from llm_streamline.errors import ArchitectureError
from llm_streamline.layer_config import CODE_KEY, mlp_width, text_config
from llm_streamline.measure.partial import layers_return_tuples
from llm_streamline.offload import weights_in_memory
from llm_streamline.plan import Plan, Replace
from llm_streamline.replacements.base import Replacement, layers_at
from llm_streamline.replacements.mlp_layer import build_mlp_layer


class MlpReplacement(Replacement):
    """h + mlp(norm(h)), or mlp(h) as in the reference implementation when `residual` is off."""

    def __init__(self, model: nn.Module, plan: Plan, edit: Replace, arch: ArchSpec):
        super().__init__(plan, edit, arch)
        template = get_layers(model)[edit.templates[0]]
        facts = mlp_facts(template, arch)
        network, config = edit.network, text_config(model.config)
        if network.residual and arch.mlp_norm_in is None:
            raise ArchitectureError(
                f"a {arch.model_type} layer has no norm before its MLP that an {network.kind} with residual could use; "
                "use `--replacement layer`"
            )
        if network.kind == "swiglu" and facts.kind != "gated":
            raise ArchitectureError(
                f"{arch.model_type} has no gated MLP to make a SwiGLU of (its MLP is {facts.kind}); "
                "use `--replacement ffn`"
            )
        self.settings = {
            "kind": network.kind,
            "residual": network.residual,
            "returns_tuple": layers_return_tuples(model),
            "norm": arch.mlp_norm_in,
            "mlp": arch.family.mlp,
        }
        if network.kind == "ffn":
            self.settings["width"] = network.width or facts.width or mlp_width(model.config)
            self.settings["activation"] = network.activation or facts.activation
            for key in ("width", "activation"):
                if self.settings[key] is None:
                    raise ArchitectureError(
                        f"the config of this {arch.model_type} names no {key} for an ffn; set replacement.{key}"
                    )
        with weights_in_memory(template):
            self.layer = build_mlp_layer(self.settings, template, config.hidden_size).float().requires_grad_(True)
            self.layer.to(next(template.parameters()).device)
        self._down = None if network.kind == "ffn" else facts.down.removeprefix(f"{arch.family.mlp}.")

    def patches(self) -> dict[int, nn.Module]:
        """The module, at the span's place."""
        return {self.position: self.layer}

    def output_projection(self) -> nn.Module:
        """The network's last linear map."""
        return self.layer.mlp.get_submodule(self._down or "down_proj")

    def install(self, model: nn.Module) -> None:
        """Put the network into `model`: as a stock layer where that is exact, otherwise as the module itself."""
        if self._fits_stock_layer(model):
            add_mlp_biases(model, self.arch)
            self._fill(layers_at(model, self)[0])
            return
        dtype, device = model.dtype, next(layers_at(model, self)[0].parameters()).device
        get_layers(model)[self.position] = self.layer.to(device=device, dtype=dtype)
        config = text_config(model.config)
        setattr(config, CODE_KEY, {**(getattr(config, CODE_KEY, None) or {}), str(self.position): self.settings})

    def _fits_stock_layer(self, model: nn.Module) -> bool:
        template = layers_at(model, self)[0]
        facts, config = mlp_facts(template, self.arch), text_config(model.config)
        return (
            self.settings["kind"] == "ffn"
            and self.settings["residual"]
            and facts.kind == "gated"
            and None not in (facts.gate, facts.up)
            and hasattr(config, "mlp_bias")
            and getattr(config, "residual_multiplier", 1.0) == 1.0
            and self.settings["width"] <= facts.width
            and self.settings["activation"] == facts.activation
        )

    @torch.no_grad()
    def _fill(self, target: nn.Module) -> None:
        """Write the FFN into a gated decoder layer with MLP biases; unused channels are zero."""
        silence_attention(target, self.arch)
        facts, ffn = mlp_facts(target, self.arch), self.layer.mlp
        gate, up, down = (target.get_submodule(name) for name in (facts.gate, facts.up, facts.down))
        width = self.settings["width"]
        for parameter in (*gate.parameters(), *up.parameters(), *down.parameters()):
            parameter.zero_()
        gate.weight[:width] = ffn.up_proj.weight
        gate.bias[:width] = ffn.up_proj.bias
        up.bias[:width] = 1.0
        down.weight[:, :width] = ffn.down_proj.weight
        down.bias[:] = ffn.down_proj.bias
        target.get_submodule(self.arch.mlp_norm_in).load_state_dict(self.layer.norm.state_dict())


@torch.no_grad()
def add_mlp_biases(model: nn.Module, arch: ArchSpec) -> None:
    """Turn on `mlp_bias`: a zero bias in every MLP projection changes nothing, and one layer needs its own."""
    text_config(model.config).mlp_bias = True
    for layer in get_layers(model):
        facts = mlp_facts(layer, arch)
        for name in (facts.gate, facts.up, facts.down):
            linear = layer.get_submodule(name)
            if linear.bias is None:
                # a layer on disk has its weights on the meta device; what is added to it stays in memory
                device = model.get_input_embeddings().weight.device if linear.weight.is_meta else linear.weight.device
                zeros = torch.zeros(linear.out_features, dtype=linear.weight.dtype, device=device)
                linear.bias = nn.Parameter(zeros, requires_grad=False)
