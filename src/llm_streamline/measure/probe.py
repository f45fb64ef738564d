"""All that a method may ask of a model: statistics, the held-out loss of a plan, facts. It never edits the model.

Shapes: W windows, T tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llm_streamline.data.windows import Windows
from llm_streamline.logs import progress_bar
from llm_streamline.measure.files import Statistics
from llm_streamline.measure.losses import token_losses
from llm_streamline.measure.partial import ResumedModel, run_tapped
from llm_streamline.measure.stream import batches
from llm_streamline.plan import ModelFacts, Plan
from llm_streamline.replacements.base import Replacement

Starter = Callable[[Plan], list[Replacement]]


@dataclass
class Probe:
    """A model that can be asked, on calibration text and on held-out text that calibration never saw."""

    model: torch.nn.Module
    facts: ModelFacts
    statistics: Callable[[], Statistics]  # one pass over the calibration windows, made once, on demand
    validation: Windows
    start: Starter  # untrained networks of a plan, as training would start them
    batch_tokens: int
    seed: int

    @torch.inference_mode()
    def losses(self, plans: Sequence[Plan]) -> tuple[Tensor, list[Tensor]]:
        """LM loss of the original and of each plan on the held-out windows.

        The layers that a plan leaves alone below its first edit run once for all plans together.

        Returns:
            (W,) float64 nats a token of the original, and the same for each plan.
        """
        views = [self._resumed(plan) for plan in plans]
        original: list[Tensor] = []
        edited: list[list[Tensor]] = [[] for _ in plans]
        wanted = {view.at for view in views}
        device = self.model.get_input_embeddings().weight.device
        with progress_bar(f"held-out loss of {len(plans)} candidates", len(self.validation)) as bar:
            for _, ids in batches(self.validation, self.batch_tokens, device):
                inputs = {"input_ids": ids}
                states, logits = run_tapped(self.model, inputs, wanted)
                original.append(_window_means(logits, ids))
                for view, found in zip(views, edited, strict=True):
                    _, logits = view.run(inputs, states[view.at])
                    found.append(_window_means(logits, ids))
                bar.advance(len(ids))
        return torch.cat(original), [torch.cat(found) for found in edited]

    def _resumed(self, plan: Plan) -> ResumedModel:
        replacements = self.start(plan)
        dtype = self.model.dtype
        patches = {position: m.to(dtype) for r in replacements for position, m in r.patches().items()}
        first_edit = min(edit.start for edit in plan.edits)
        at = min([first_edit, *(r.resume_at for r in replacements)])
        return ResumedModel(self.model, plan.layer_sources(), at, patches)


def _window_means(logits: Tensor, ids: Tensor) -> Tensor:
    return token_losses(logits, ids).double().mean(dim=1).cpu()
