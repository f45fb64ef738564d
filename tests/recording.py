"""Which families the oracle tests passed for, recorded where `llm-streamline architectures` reads it.

    pytest tests/test_oracles.py tests/test_architectures.py --record-architectures

A family is recorded as sound when every oracle passed for every one of its cases in that run, and as refused when the
test of refusals saw it refused.
"""

import json
from importlib.metadata import version
from pathlib import Path

import llm_streamline

RECORD = Path(llm_streamline.__file__).parent / "architectures.json"
_ORACLES, _REFUSALS = "test_oracles.py::", "test_architectures.py::test_a_refused_family_is_refused"
_passed: dict[tuple[str, str], bool] = {}  # (test, case) -> whether all of its runs passed


def pytest_addoption(parser):
    parser.addoption("--record-architectures", action="store_true", help=f"write {RECORD.name} from what passes")


def pytest_runtest_logreport(report):
    if (_ORACLES not in report.nodeid and _REFUSALS not in report.nodeid) or "[" not in report.nodeid:
        return
    if report.when == "call" or report.failed:
        test, _, parameters = report.nodeid.rpartition("::")[2].partition("[")
        case = parameters.rstrip("]").removeprefix("middle-").removeprefix("ends-")
        key = (test, case.removesuffix("-middle").removesuffix("-ends"))
        _passed[key] = _passed.get(key, True) and report.passed


def pytest_sessionfinish(session):
    is_worker = hasattr(session.config, "workerinput")  # of pytest-xdist: the process that started it sees all reports
    if not is_worker and session.config.getoption("--record-architectures"):
        RECORD.write_text(json.dumps(_evidence(), indent=1, sort_keys=True) + "\n", encoding="utf-8")


def _evidence() -> dict:
    from tiny import TINY_ROWS

    from llm_streamline.families import REFUSED

    oracles = sorted({test for test, _ in _passed if not test.endswith("is_refused")})
    cases: dict[str, list[str]] = {}
    for name, row in TINY_ROWS.items():
        for family in {row.model_type, row.wrapper or row.model_type}:
            cases.setdefault(family, []).append(name)
    return {
        "transformers": version("transformers"),
        "torch": version("torch").partition("+")[0],
        "oracles": oracles,
        "sound": {
            family: names
            for family, names in cases.items()
            if oracles and all(_passed.get((test, name)) for test in oracles for name in names)
        },
        "refused": {
            name: reason for name, reason in REFUSED.items() if _passed.get(("test_a_refused_family_is_refused", name))
        },
    }
