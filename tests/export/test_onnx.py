"""ONNX: written by transformers' exporter, judged by ONNX Runtime; and what is said where the packages are missing."""

import importlib.util
import json

import pytest
from folders import tiny_folder

from llm_streamline.errors import MissingExtraError, OutputError, ProofError
from llm_streamline.export import onnx as export
from llm_streamline.export.onnx import export_onnx

installed = all(importlib.util.find_spec(name) for name in export._PACKAGES)
needs_onnx = pytest.mark.skipif(not installed, reason="the extra onnx is not installed")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("onnx") / "model", num_hidden_layers=2)


def test_a_missing_package_names_the_extra(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "_PACKAGES", ("onnx", "no_such_package_here"))
    with pytest.raises(MissingExtraError, match=r'no_such_package_here: pip install "llm-streamline\[onnx\]"'):
        export_onnx(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_transformers_without_exporter_is_told(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "_PACKAGES", ())
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if "exporters" in name else real(name))
    with pytest.raises(MissingExtraError, match="pip install -U transformers"):
        export_onnx(folder, tmp_path / "out")


@needs_onnx
def test_a_folder_that_exists_is_left_alone(folder, tmp_path):
    with pytest.raises(OutputError, match="exists already"):
        export_onnx(folder, tmp_path)


@needs_onnx
@pytest.mark.slow
def test_the_exported_model_goes_on_from_a_cache_as_the_model_does(folder, tmp_path, monkeypatch):
    done = export_onnx(folder, tmp_path / "out")  # its own proof has passed
    names = {path.name for path in done.path.iterdir()}
    assert {"model.onnx", "model.onnx.data", "config.json", "tokenizer.json", "export.json"} <= names
    assert json.loads((done.path / "config.json").read_text())["num_hidden_layers"] == 2
    from transformers import AutoModelForCausalLM

    other = AutoModelForCausalLM.from_pretrained(folder)
    other.model.layers[0].mlp.down_proj.weight.data.mul_(2)
    with pytest.raises(ProofError, match="other logits"):
        export._prove(done.path, other.eval())
