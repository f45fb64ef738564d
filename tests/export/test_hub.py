"""Pushing, with a Hub that is not there: what would leave the machine, and what people are told when it cannot."""

from types import SimpleNamespace

import huggingface_hub
import pytest
from folders import tiny_folder
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

from llm_streamline.errors import OutputError, SourceError
from llm_streamline.export.hub import files_to_push, push
from llm_streamline.output import open_output, publish, temporary_folder, write_manifest


class FakeHub:
    """Stands in for HfApi; remembers what it was asked."""

    def __init__(self):
        self.calls, self.error = [], None

    def __call__(self):
        return self

    def create_repo(self, repo, **options):
        self.calls.append(("create", repo, options))
        if self.error:
            raise self.error
        return type("Url", (), {"repo_id": f"me/{repo}"})()

    def upload_folder(self, **options):
        self.calls.append(("upload", options))
        return "https://huggingface.co/me/small/commit/1"


@pytest.fixture
def hub(monkeypatch):
    fake = FakeHub()
    monkeypatch.setattr(huggingface_hub, "HfApi", fake)
    return fake


@pytest.fixture
def run(tmp_path):
    """A finished run of ours, with files that are nobody else's business."""
    out = open_output(tmp_path / "run")
    with temporary_folder(out) as staging:
        tiny_folder(staging)
        (staging / "README.md").write_text("# card")
        publish(staging, out, last="config.json")
    (out / "streamline" / "plan.json").write_text("{}")
    (out / "streamline" / "stats.safetensors").write_text("private")
    (out / "streamline" / "checkpoints").mkdir()
    (out / "notes.txt").write_text("mine")
    write_manifest(out, {})
    return out


def test_model_card_and_records_go_up_and_nothing_else(hub, run):
    assert push(run, "small", private=True).endswith("/commit/1")
    (_, repo, options), (_, upload) = hub.calls
    assert (repo, options["private"], options["exist_ok"]) == ("small", True, True)
    assert upload["repo_id"] == "me/small"
    names = set(upload["allow_patterns"])
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md", "streamline/plan.json"} <= names
    assert not any("stats" in name or "checkpoints" in name or "notes" in name for name in names)


def test_a_run_that_is_not_finished_stays(hub, run):
    (run / "config.json").write_text((run / "config.json").read_text() + " ")
    with pytest.raises(OutputError, match="not finished"):
        push(run, "small")
    assert hub.calls == []


def test_a_model_needs_a_card(hub, tmp_path):
    tiny_folder(tmp_path / "model")
    with pytest.raises(SourceError, match=r"README.md"):
        push(tmp_path / "model", "small")
    (tmp_path / "model" / "README.md").write_text("# card")
    (tmp_path / "model" / "optimizer.pt").write_text("pickle")
    assert "optimizer.pt" not in files_to_push(tmp_path / "model")
    with pytest.raises(SourceError, match="holds no model"):
        push(tmp_path, "small")
    assert hub.calls == []


def http_error(status: int) -> HfHubHTTPError:
    error = HfHubHTTPError.__new__(HfHubHTTPError)  # its constructor wants a real response
    error.args = (f"{status} no",)
    error.response = SimpleNamespace(status_code=status)
    return error


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (LocalTokenNotFoundError("no token"), "hf auth login"),
        (http_error(403), "does not let you write to small"),
        (http_error(500), "the Hub refused small"),
        (ConnectionError("down"), "cannot be reached"),
    ],
)
def test_what_goes_wrong_there_is_told_in_a_sentence(hub, run, error, message):
    hub.error = error
    with pytest.raises(OutputError, match=message):
        push(run, "small")
