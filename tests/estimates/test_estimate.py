import pytest
import torch
from plans import removing, replacing
from tiny import tiny_model

from llm_streamline.config import TrainingConfig
from llm_streamline.estimates.preview import preview_plan
from llm_streamline.evaluation.size import model_size
from llm_streamline.plan import Plan
from llm_streamline.replacements.build import build_replacements, install_plan

FAMILIES = ["llama", "qwen2_tied", "gpt2", "gemma2"]


def preview(model, plan, **training):
    return preview_plan(model, model_size(model), plan, TrainingConfig(**training), 16, 1e-6)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("kind", [None, "layer", "linear"])
def test_sizes_after_are_those_of_the_edited_model(name, kind):
    if (name, kind) == ("gemma2", "linear"):
        pytest.skip("a norm behind the MLP: nothing to fold into")
    model = tiny_model(name)
    plan = replacing(model, 2, 6, kind, init="identity") if kind else removing(model, 2, 6)
    said = preview(model, plan)
    install_plan(model, plan, build_replacements(model, plan))
    real = model_size(model)
    assert said.parameters[1] == real.parameters
    assert said.weight_bytes[1] == real.weight_bytes
    assert said.kv_bytes_per_token[1] == real.kv_bytes_per_token


def test_nothing_removed_costs_and_gives_nothing():
    model = tiny_model()
    said = preview(model, Plan(model=removing(model, 1, 2).model, edits=()))
    assert said.parameters[0] == said.parameters[1]
    assert said.prefill_speedup == said.decode_speedup == 1.0
    assert said.train_flops is None


def test_speed_up_counts_layers_and_head():
    model = tiny_model()
    layer = sum(p.numel() for p in model.model.layers[0].parameters())
    head = model.lm_head.weight.numel()
    said = preview(model, removing(model, 2, 6))
    assert said.prefill_speedup == pytest.approx((8 * layer + head) / (4 * layer + head))


def test_training_is_estimated_only_when_something_is_trained():
    model = tiny_model()
    assert preview(model, removing(model, 2, 6)).train_tokens is None
    assert preview(model, replacing(model, 2, 6), tokens=0).train_tokens is None
    assert preview(model, replacing(model, 2, 6), tokens="4k").train_tokens == 4000


def test_the_mse_step_is_the_teacher_to_the_span_and_the_replacement():
    # one forward and a backward of two for one layer, the teacher's 6 layers, and nothing above; validations aside
    model = tiny_model()
    small, large = (preview(model, replacing(model, 2, 6), tokens=n, objective="mse") for n in (1000, 3000))
    assert large.train_seconds - small.train_seconds == pytest.approx(2000 * (6 + 3) * 1e-6)


def test_the_teachers_logits_are_what_kl_costs_more_than_lm():
    model = tiny_model()
    both = [preview(model, replacing(model, 2, 6), tokens=1000, objective=o) for o in ("lm", "kl")]
    layer = sum(p.numel() for p in model.model.layers[0].parameters())
    head = model.lm_head.weight.numel() / layer
    validations = TrainingConfig().validation_tokens * (TrainingConfig().num_evals + 1)
    extra = (1000 + validations) * (8 - 2 + head) * 1e-6  # the teacher's layers above the span's start, and its head
    assert both[1].train_seconds - both[0].train_seconds == pytest.approx(extra)


def test_memory_does_not_grow_with_tokens():
    model = tiny_model()
    small, large = (preview(model, replacing(model, 2, 6), tokens=n) for n in (1000, 10**9))
    assert small.peak_memory_bytes == large.peak_memory_bytes
    assert torch.isfinite(torch.tensor(float(large.train_flops)))


def test_the_ladder_costs_more_the_more_it_trains():
    model, plan = tiny_model(), removing(tiny_model(), 5, 7)
    said = {rung: preview(model, plan, trainable=rung) for rung in ("head", "above", "norms", "lora", "full")}
    flops = {rung: one.train_flops for rung, one in said.items()}
    assert flops["above"] < flops["full"]
    assert flops["head"] < flops["norms"] == flops["lora"] < flops["full"]
    assert said["full"].peak_memory_bytes > said["head"].peak_memory_bytes
    checkpointed = preview(model, plan, trainable="full", gradient_checkpointing=True)
    assert checkpointed.peak_memory_bytes < said["full"].peak_memory_bytes


def test_an_untied_head_is_counted():
    model = tiny_model("qwen2_tied")
    plan = removing(model, 2, 6)
    tied = preview(model, plan, trainable="full").parameters[1]
    untied = preview(model, plan, trainable="full", heal={"untie_head": True}).parameters[1]
    assert untied - tied == model.get_output_embeddings().weight.numel()
