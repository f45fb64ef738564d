"""The student: the edited model as the trainer sees it, sharing with the original all that the two have in common.

One batch: the original runs once; its states at the first edited layer (and at the span's end, for MSE) are kept; the
student goes on from there through its replacement and the shared layers above. The layers below the span never run
twice, and only the replacement has gradients. With MSE alone neither model runs above the span.

Shapes: B windows, T tokens, d width, V vocabulary.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from llm_streamline.config import TrainingConfig
from llm_streamline.measure.losses import token_losses
from llm_streamline.measure.partial import ResumedModel, run_tapped
from llm_streamline.plan import Plan
from llm_streamline.replacements.base import Replacement
from llm_streamline.training import objectives


class Student(nn.Module):
    """The replacement networks of a plan, with a forward that returns the training loss.

    The original model is held outside the module tree: it is not saved, moved, counted or wrapped with the student.
    """

    def __init__(self, model: nn.Module, plan: Plan, replacements: list[Replacement], config: TrainingConfig):
        super().__init__()
        self.replacements = nn.ModuleList(replacements)
        self._model = (model,)
        self._config = config
        sources = plan.layer_sources()
        patches = {position: module for r in replacements for position, module in r.patches().items()}
        self.resume_at = min(r.resume_at for r in replacements)
        self._resumed = ResumedModel(model, sources, self.resume_at, patches)
        # float32 master weights and bfloat16 products beside a half-precision model; a float32 one stays float32
        self._autocast = config.autocast == "auto" and model.dtype != torch.float32

    @property
    def needs_logits(self) -> bool:
        """Whether the objective looks at predictions; otherwise the forward ends with the last span."""
        return bool({"lm", "kl"} & self._config.objective.keys())

    def forward(self, input_ids: Tensor, with_token_losses: bool = False) -> dict[str, Tensor]:
        """Compute the training loss of a batch.

        Args:
            input_ids: (B, T).
            with_token_losses: also return `token_losses` (B, T - 1), the next-token losses in nats, for a validation.

        Returns:
            `loss`, the weighted sum, and each part by name, detached.
        """
        inputs = {"input_ids": input_ids.long()}
        weights, outs = self._config.objective, [r.out for r in self.replacements]
        spans = [r.edit for r in self.replacements] if "mse" in weights else []
        wanted = {self.resume_at, *(edit.stop for edit in spans)}
        with torch.no_grad():
            stop = None if "kl" in weights else max(wanted)
            states, teacher_logits = run_tapped(self._model[0], inputs, wanted, stop)
        with self._arithmetic(input_ids.device):
            stop = None if self.needs_logits or with_token_losses else max(outs)
            own, logits = self._resumed.run(inputs, states[self.resume_at], stop, outs)
        parts: dict[str, Tensor] = {}
        if "mse" in weights:
            weighting = self._config.mse_weighting
            errors = [
                objectives.hidden_state_error(own[out], states[edit.stop], weighting)
                for out, edit in zip(outs, spans, strict=True)
            ]
            parts["mse"] = torch.stack(errors).mean()
        if "lm" in weights:
            parts["lm"] = objectives.next_token_loss(logits, inputs["input_ids"])
        if "kl" in weights:
            parts["kl"] = objectives.divergence(
                logits, teacher_logits, self._config.kl_top_k, self._config.kl_temperature
            )
        results = {"loss": sum(weights[name] * part for name, part in parts.items())}
        results |= {name: part.detach() for name, part in parts.items()}
        if with_token_losses:
            results["token_losses"] = token_losses(logits, inputs["input_ids"])
        return results

    def train(self, mode: bool = True) -> "Student":
        """Stay in evaluation mode: the target is deterministic, so dropout would only be noise."""
        return super().train(False)

    @torch.no_grad()
    def token_losses(self, input_ids: Tensor) -> Tensor:
        """Next-token losses of the edited model in nats: (B, T) ids -> (B, T - 1)."""
        inputs = {"input_ids": input_ids.long()}
        states, _ = run_tapped(self._model[0], inputs, stop=self.resume_at)
        with self._arithmetic(input_ids.device):
            _, logits = self._resumed.run(inputs, states[self.resume_at])
        return token_losses(logits, inputs["input_ids"])

    def _arithmetic(self, device: torch.device) -> AbstractContextManager:
        if not self._autocast:
            return nullcontext()
        return torch.autocast(device.type, dtype=torch.bfloat16)
