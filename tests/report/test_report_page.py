"""The page of a run: whole, in parts, with hostile text, from damaged files."""

import html
import json
import re
import subprocess
import sys

import pytest
from report_samples import HASH, plan, results, training, write_run

from llm_streamline.errors import StreamlineError
from llm_streamline.plan import Plan, Remove
from llm_streamline.report.html import render, write_report
from llm_streamline.report.run import load_run, what_was_done

NASTY = '</script><script>alert("x")</script><img src=x onerror=alert(1)>'
SECTIONS = ("similarity", "choice", "training", "figures", "answers", "text", "protocol")


def page_of(out, **leave):
    return write_report(out).read_text(encoding="utf-8")


def ids(page):
    return set(re.findall(r'<h2 id="([a-z]+)"', page))


def test_a_whole_run_has_every_section(tmp_path):
    page = page_of(write_run(tmp_path / "run"))
    assert ids(page) == set(SECTIONS)
    assert "Layers 12–21 of SmolLM2-135M-Instruct (10 of 30) were replaced by one decoder layer" in page
    assert "Much quality was lost" in page
    assert "kept: step 112" in page
    assert "stayed right: 1,721" in page
    assert page.count("<svg") >= 8
    assert len(page.encode()) < 200_000


def test_the_page_loads_nothing(tmp_path):
    page = page_of(write_run(tmp_path / "run"))
    assert not re.findall(r'(?:src|href)\s*=\s*"(?!#|data:,")', page)
    assert "url(" not in page
    assert "@import" not in page
    assert not re.search(r"https?://", page)
    assert "default-src 'none'" in page


def test_the_same_run_gives_the_same_page(tmp_path):
    out = write_run(tmp_path / "run")
    assert page_of(out) == page_of(out)


@pytest.mark.parametrize(
    ("gone", "missing"),
    [
        (("training.json",), {"training"}),
        (("stats.safetensors", "stats.json"), {"similarity"}),
        (("results.json",), {"figures", "answers", "text"}),
        (("plan.json",), {"choice"}),
        (("recipe.yaml", "proof.json", "manifest.json", "run.json"), set()),
        (
            ("results.json", "training.json", "plan.json", "recipe.yaml"),
            {"training", "choice", "figures", "answers", "text"},
        ),
    ],
)
def test_an_absent_file_gives_a_shorter_page(tmp_path, gone, missing):
    page = page_of(write_run(tmp_path / "run", leave_out=gone))
    assert set(SECTIONS) - ids(page) == missing
    for anchor in re.findall(r'href="#([a-z]+)"', page):
        assert anchor in ids(page)  # no link leads nowhere


def test_text_from_data_is_escaped_everywhere(tmp_path):
    found = json.loads(results().model_dump_json().replace("wikitext2-valid.txt", "BAD").replace("arc_easy", "BAD2"))
    found = json.loads(
        json.dumps(found).replace("BAD2", NASTY.replace('"', '\\"')).replace("BAD", NASTY.replace('"', '\\"'))
    )
    for model in found["models"]:
        for text in model["generation"]["continuations"]:
            text["text"] = text["prompt"] = NASTY
    out = write_run(tmp_path / "run", leave_out=("results.json", "plan.json", "manifest.json", "recipe.yaml"))
    folder = out / "streamline"
    (folder / "results.json").write_text(json.dumps(found), encoding="utf-8")
    (folder / "recipe.yaml").write_text(NASTY, encoding="utf-8")
    (folder / "manifest.json").write_text(json.dumps({NASTY: NASTY}), encoding="utf-8")
    hostile = plan(spec=NASTY)
    hostile = hostile.model_copy(
        update={"selection": hostile.selection.model_copy(update={"target": NASTY, "notes": (NASTY,)})}
    )
    (folder / "plan.json").write_text(hostile.to_json(), encoding="utf-8")
    page = page_of(out)
    assert page.count("<script>") == 1  # ours
    assert "<img" not in page
    assert "onerror=alert(1)&gt;" in page
    assert '"x")</script>' not in page


def test_training_without_validation_or_that_did_not_help_is_told(tmp_path):
    out = write_run(tmp_path / "run", leave_out=("training.json",))
    log = training() | {"validation": [], "best_step": 0, "starts": {"first": 6.7047, "identity": 6.6536, "last": None}}
    (out / "streamline" / "training.json").write_text(json.dumps(log))
    assert "before training: identity 6.654 and first 6.705." in page_of(out)
    assert "did not improve on the start, so the start was kept" in page_of(out)
    assert "by one decoder layer, which training did not improve, so its start was kept:" in page_of(out)


@pytest.mark.parametrize(
    ("trainable", "words"),
    [
        ("replacement", "by one decoder layer, trained on 262.1 k tokens"),
        ("above", "by one decoder layer, trained together with every layer above and the final norm on 262.1 k tokens"),
    ],
)
def test_the_sentence_says_what_was_trained(tmp_path, trainable, words):
    out = write_run(tmp_path / "run", leave_out=("training.json",))
    (out / "streamline" / "training.json").write_text(json.dumps(training() | {"trainable": trainable}))
    assert words in what_was_done(load_run(out)).replace("\u00a0", " ")


def test_text_that_passes_is_not_called_better_than_it_is(tmp_path):
    out = write_run(tmp_path / "run", leave_out=("results.json",))
    data = json.loads(results().model_dump_json())
    data["comparisons"][0]["generation"] = {"ok": True, "reasons": []}
    (out / "streamline" / "results.json").write_text(json.dumps(data))
    page = html.unescape(page_of(out)).replace("\u00a0", " ")
    assert "not degenerate where the original's is not: repeated 4-grams 3.0 % → 16.0 %, different 2-grams" in page


def test_averages_stand_below_the_tasks_and_several_texts_are_told_apart(tmp_path):
    out = write_run(tmp_path / "run", leave_out=("results.json",))
    data = json.loads(results().model_dump_json())
    for model in data["models"]:
        model["perplexity"].append(model["perplexity"][0] | {"name": "held-out text"})
    (out / "streamline" / "results.json").write_text(json.dumps(data))
    page = page_of(out)
    assert re.search(r'<tr class="mean"><th>mean of all</th>.*75\.8', page)
    assert "perplexity, wikitext2-valid.txt</div>" in page


def test_a_diverged_training_is_still_drawn(tmp_path):
    out = write_run(tmp_path / "run", leave_out=("training.json",))
    log = training(20)
    log["steps"][7]["loss"] = float("nan")
    log["validation"][0]["loss"] = float("inf")
    (out / "streamline" / "training.json").write_text(json.dumps(log))
    assert "training" in ids(page_of(out))


def test_a_failed_proof_stands_above_everything(tmp_path):
    out = write_run(tmp_path / "run", leave_out=("proof.json",))
    proof = {"checks": [{"name": "logits", "ok": False, "detail": "differ by 0.3"}], "seconds": 1.0}
    (out / "streamline" / "proof.json").write_text(json.dumps(proof))
    page = page_of(out)
    assert "did not pass its proof" in page
    assert "logits (differ by 0.3)" in page


def test_several_spans_and_plain_removal_can_be_shown(tmp_path):
    out = write_run(tmp_path / "run", leave_out=("plan.json", "training.json"))
    whole = plan()
    scattered = Plan(model=whole.model, edits=tuple(Remove(start=i, stop=i + 1) for i in (3, 12, 13, 25)))
    (out / "streamline" / "plan.json").write_text(scattered.to_json())
    page = page_of(out)
    assert "4 of the 30 layers of SmolLM2-135M-Instruct were removed in 4 places: 30 → 26 layers" in page
    assert page.count('class="box removed"') == 4
    assert page.count('class="chosen"') == 4


def test_an_empty_plan_says_so(tmp_path):
    out = write_run(tmp_path / "run", leave_out=("plan.json", "results.json"))
    (out / "streamline" / "plan.json").write_text(Plan(model=plan().model, edits=()).to_json())
    assert "left unchanged" in page_of(out)


def test_a_lone_result_file_can_be_loaded(tmp_path):
    (tmp_path / "results.json").write_text(results().model_dump_json())
    run = load_run(tmp_path / "results.json")
    assert "Before and after" in render(run)
    assert what_was_done(run) == "demo-small was measured against SmolLM2-135M-Instruct."


@pytest.mark.parametrize("name", ["results.json", "plan.json", "training.json", "manifest.json", "proof.json"])
@pytest.mark.parametrize("content", ["", "{", "[1, 2]", '{"steps": 3, "version": 9}'])
def test_damaged_files_are_one_sentence_that_names_them(tmp_path, name, content):
    out = write_run(tmp_path / "run")
    (out / "streamline" / name).write_text(content)
    if name in ("manifest.json", "proof.json") and content.startswith('{"'):
        return  # any object will do
    with pytest.raises(StreamlineError, match=re.escape(name)):
        write_report(out)
    assert not (out / "streamline" / "report.html").exists()


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(StreamlineError, match="no run at"):
        write_report(tmp_path / "nowhere")
    with pytest.raises(StreamlineError, match="holds no run"):
        write_report(tmp_path)


def test_reports_need_neither_torch_nor_matplotlib(tmp_path):
    out = write_run(tmp_path / "run")
    code = (
        "import sys; from llm_streamline.report import card, compare, html, tables; "
        f"html.write_report({str(out)!r}); card.write_card({str(out)!r}); "
        "sys.exit(bool({'torch', 'transformers', 'matplotlib'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_sentence_leaves_out_what_is_not_known(tmp_path):
    run = load_run(write_run(tmp_path / "run", leave_out=("results.json", "training.json")))
    assert what_was_done(run) == (
        "Layers 12–21 of SmolLM2-135M-Instruct (10 of 30) were replaced by one decoder layer: 30 → 21 layers."
    )
    assert HASH[:16] in render(run)


def test_a_manifest_that_is_still_to_be_written_is_shown(tmp_path):
    out = write_run(tmp_path / "run", leave_out=("manifest.json",))
    assert "<summary>Manifest" not in page_of(out)
    assert "2025-11-22T09:00" in write_report(out, {"finished": "2025-11-22T09:00"}).read_text(encoding="utf-8")
