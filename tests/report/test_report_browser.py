"""The pages in a real headless browser: no console message, nothing wider than the screen, hover tells the number."""

import html
import re
import shutil
import subprocess

import pytest
from report_samples import plan, write_run, write_three

from llm_streamline.report.compare import write_comparison
from llm_streamline.report.html import write_report
from llm_streamline.report.run import load_run

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no chromium found")
OTHERS = [("report", True), ("short", False), ("compare", False), ("compare", True)]
# widest element that sticks out of the page and is not inside a part that scrolls by itself
MEASURE = """
<script>
const frame = document.querySelector("iframe");
frame.addEventListener("load", () => {
  const page = frame.contentDocument, width = page.documentElement.clientWidth;
  const out = [...page.querySelectorAll("main *")].filter((e) => !e.closest(".scroll, svg") &&
    e.getBoundingClientRect().right > width + 0.5);
  const small = [...page.querySelectorAll("svg.chart text")].map((t) => {
    const place = t.getScreenCTM();
    return parseFloat(getComputedStyle(t).fontSize) * Math.hypot(place.a, place.b);
  });
  const cut = [...page.querySelectorAll(".scroll")].map((e) => e.scrollWidth - e.clientWidth);
  document.body.setAttribute("data-cut", Math.max(0, ...cut));
  document.body.setAttribute("data-found", JSON.stringify({
    width, overflow: page.documentElement.scrollWidth - width, out: out.map((e) => e.outerHTML.slice(0, 90)),
    smallest: Math.min(...small)}));
});
</script>
"""
POINT = """
<script>
const map = document.querySelector("svg.heatmap"), [left, top_, side] = map.dataset.box.split(",").map(Number);
map.scrollIntoView({behavior: "instant"});
const cell = side / 30, at = new DOMPoint(left + 12.5 * cell, top_ + 20.5 * cell).matrixTransform(map.getScreenCTM());
const over = new PointerEvent("pointermove", {clientX: at.x, clientY: at.y, bubbles: true});
map.querySelector(".cells").dispatchEvent(over);
document.body.setAttribute("data-cell", document.querySelector(".tip").textContent);
const mark = document.querySelector(".flow .TF");
mark.dispatchEvent(new PointerEvent("pointerdown", {clientX: 50, clientY: 50, bubbles: true}));
document.body.setAttribute("data-mark", document.querySelector(".tip").textContent);
document.body.dispatchEvent(new PointerEvent("pointermove", {clientX: 1, clientY: 1, bubbles: true}));
document.body.setAttribute("data-hidden", document.querySelector(".tip").hidden);
</script>
"""
QUIET = """headless no-sandbox disable-gpu no-first-run disable-background-networking disable-component-update
disable-sync hide-scrollbars enable-logging=stderr virtual-time-budget=3000"""


def browse(path, tmp_path, *options, width=1280):
    """Open a page; returns its DOM after its scripts ran and what the console said."""
    command = [BROWSER, *(f"--{name}" for name in QUIET.split()), f"--user-data-dir={tmp_path / 'profile'}"]
    command += [f"--window-size={width},900", *options, "--dump-dom", path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    paths = write_three(folder)
    small = write_run(folder / "small", leave_out=("results.json", "training.json", "plan.json"))
    return {
        "report": write_report(paths[0]),
        "short": write_report(small),
        "compare": write_comparison(paths, folder / "compare.html"),
    }


@pytest.mark.parametrize(
    ("name", "dark"), [("report", False), *(pytest.param(n, d, marks=pytest.mark.slow) for n, d in OTHERS)]
)
def test_the_console_stays_silent(pages, tmp_path, name, dark):
    options = ["--blink-settings=preferredColorScheme=0"] if dark else []
    dom, console = browse(pages[name], tmp_path, *options)
    assert console == []
    assert 'class="tip"' in dom  # our script ran to its first lines


@pytest.mark.parametrize("name", ["report", pytest.param("short", marks=pytest.mark.slow), "compare"])
@pytest.mark.parametrize("width", [360, *(pytest.param(w, marks=pytest.mark.slow) for w in (768, 1280))])
def test_nothing_is_wider_than_the_screen(pages, tmp_path, name, width):
    inner = html.escape(pages[name].read_text(encoding="utf-8"), quote=True)
    shell = tmp_path / "shell.html"
    shell.write_text(f'<body><iframe style="width:{width}px;height:900px;border:0" srcdoc="{inner}"></iframe>{MEASURE}')
    dom, _ = browse(shell, tmp_path, width=1400)
    found = re.search(r'data-found="([^"]*)"', dom)
    assert found, dom[:300]
    measured = html.unescape(found[1])
    assert f'"width":{width},"overflow":0,"out":[]' in measured
    assert float(re.search(r'"smallest":([\d.]+)', measured)[1]) >= 9.5  # pixels; text in drawings stays legible


@pytest.mark.parametrize("name", ["report", "compare"])
def test_no_column_is_cut_off_on_paper(pages, tmp_path, name):
    page = pages[name].read_text(encoding="utf-8")
    assert "@media print {" in page
    inner = html.escape(page.replace("@media print {", "@media all {"), quote=True)
    shell = tmp_path / "shell.html"
    a4 = 672  # CSS pixels between margins of 16 mm
    shell.write_text(f'<body><iframe style="width:{a4}px;height:900px;border:0" srcdoc="{inner}"></iframe>{MEASURE}')
    dom, _ = browse(shell, tmp_path, width=1400)
    assert re.search(r'data-cut="([^"]*)"', dom)[1] == "0"  # what scrolls on a screen is lost on paper


def test_hover_and_tap_tell_the_number(pages, tmp_path):
    probe = tmp_path / "probe.html"
    probe.write_text(pages["report"].read_text(encoding="utf-8") + POINT, encoding="utf-8")
    dom, console = browse(probe, tmp_path)
    assert console == []
    value = load_run(pages["report"].parent).similarity["all"][12, 22]
    assert plan().edits[0].start == 12
    assert f'data-cell="layers 12–21 (10): cosine {value:.4f}"' in dom
    assert 'data-mark="right → wrong (TF): 719 of 4,000' in dom
    assert 'data-hidden="true"' in dom


@pytest.mark.slow
def test_the_page_prints(pages, tmp_path):
    target = tmp_path / "page.pdf"
    browse(pages["report"], tmp_path, f"--print-to-pdf={target}")
    assert target.read_bytes().startswith(b"%PDF")
