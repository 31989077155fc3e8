"""Tests of `aropd report`: its data, and the page in a real browser."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from aropd_mcore import cli
from aropd_mcore.evaluation.diagnose.summary import FLOORS, GAPS, SCHEMA
from aropd_mcore.evaluation.report import write_report
from tests.support.browser import chromium
from tests.support.tiny_runs import tiny_config

HOSTILE = "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 2'><!--"
"""Text of a token, a question and an answer that tries to inject HTML."""
BUCKETS = ("0-255", "256-511", "512-767", "768-1023", "1024-")
PHASES = ("rollout", "teacher", "student", "optimizer", "sync")


def write_folder(folder: Path, *, scale: float = 0.8, steps: int = 40) -> Path:
    """Write a run's output_dir with the files of training, `aropd eval` and `aropd diagnose`."""
    folder.mkdir(parents=True)
    objective = {"residual_scale": scale, "residual_clip": None if scale == 1 else 5.0}
    config = tiny_config(folder / "model", folder / "rows", folder, objective=objective)
    (folder / "config.yaml").write_text(json.dumps(config))  # JSON is YAML
    lines = [build_metrics(step) for step in range(steps)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "validation.jsonl").write_text(
        "".join(json.dumps(build_validation(number)) + "\n" for number in (0, 20, 40))
    )
    lines = [line for number in (0, 20, 40) for line in build_samples(number)]
    (folder / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_json(folder / "eval" / "gsm8k" / "summary.json", {"tasks": {"gsm8k": build_task()}})
    write_json(folder / "diagnose" / "test-step40.json", build_diagnosis())
    return folder


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def build_metrics(step: int) -> dict[str, Any]:
    return {
        "step": step,
        "loss": None if step == 3 else 1 / (step + 1),  # a skipped step
        "kl_full_student": 0.5 / (step + 1),
        "hindsight_token_rate": 0.01,
        "an_unknown_metric": step,
        **{f"kl_full_student/{bucket}": 0.1 * i for i, bucket in enumerate(BUCKETS)},
        **{f"seconds/{phase}": 0.5 for phase in PHASES},
    }


def build_validation(num_updates: int) -> dict[str, Any]:
    task = {"accuracy": 0.5 + num_updates / 400, "accuracy_low": 0.4, "accuracy_high": 0.7}
    task |= {"length_mean": 33.5, "truncation_rate": 0.02, "num_problems": 100}
    return {"num_updates": num_updates, "tasks": {"sums": task}}


def build_samples(step: int) -> list[dict[str, Any]]:
    """Build two training samples, one of a question that is met only once, and a validation's."""

    def line(task: str, id: str, response: str, **other: Any) -> dict[str, Any]:
        values = {"step": step, "task": task, "view": "student", "id": id, "verdict": "wrong"}
        values |= {"question": f"{id} {HOSTILE}", "answer": "42", "response": response}
        values |= {"num_tokens": 30, "finished": True, "mean_residual": None, "mean_loss": None}
        return values | other

    return [
        line("sums", "v", f"{HOSTILE} {step >= 20}", verdict="right" if step >= 20 else "wrong"),
        line("train", "t", f"long {'x' * 4000} {step}", mean_residual=-0.25, verdict=None),
        line("train", f"once {step}", "7", finished=False),
    ]


def build_task() -> dict[str, Any]:
    bucket = {"samples": 10, "accuracy": 0.5, "interval_95": [0.24, 0.76]}
    by_length = dict.fromkeys(BUCKETS[:3], bucket)
    return {"accuracy": 0.61, "interval_95": [0.55, 0.67], "by_length": by_length}


def build_diagnosis() -> dict[str, Any]:
    """Build a diagnosis of three responses.

    Every seventh token has a large residual. The fifth token of the vocabulary is hostile.
    """
    texts = ["the", " sum", "\n", " is", HOSTILE, " 42", ".", "  "]
    ids = [i % len(texts) for i in range(60)]
    residual = [(6.0, -6.0)[i % 2] if i % 7 == 0 else 0.2 for i in range(60)]
    rollout = {
        "row": "1", "sample": 0, "question": HOSTILE, "answer": HOSTILE, "prompt": HOSTILE,
        "text": "", "finished": False, "premature": True, "ends_with_answer": True,
        "loss_tokens": [3, len(ids)], "num_thinking_tokens": 0, "ids": ids, "residual": residual,
        "hindsight": [value > 5 for value in residual],
        "student": [-1.0] * 60, "partial": [-2.0] * 60, "full": [-1.5] * 60,
        "target": [-2.0 + value / 3 for value in residual],
        "top": [[[id, 0.5, 0.25, 0.125, 0.0625], [(id + 1) % 8, 0.3, 0.3, 0.3, 0.9]] for id in ids],
    }  # fmt: skip
    names = ("kl_full_partial", "kl_full_student", "kl_partial_student", "kl_target_student")
    tenths = {
        name: [0.1 * i for i in range(9)] + [None] for name in (*names, "hindsight_token_rate")
    }
    gaps = ("full_partial", "full_student", "target_partial", "target_student")
    part = {"tokens_from": 10, "tokens_to": 90, "responses": 3, "ends_with_answer": 1.0}
    part |= {"prefers_right": None, "kl_full_partial": 0.1}
    return {
        "schema": SCHEMA,
        "model": {"path": "x", "weights": "student", "step": 40, "teacher": "own"},
        "data": {"path": "x", "rows": 3, "samples": 1},
        "settings": {"hindsight_gap": 2.0, "hindsight_floor": 0.05},
        "metrics": {f"support_gap_{name}": 0.01 for name in gaps},
        "residual": {"mean": 0.1, "edges": [-5, -1, 1, 5], "counts": [3, 90, 7]},
        "hindsight": {"gaps": GAPS, "floors": FLOORS, "rates": [[0.1] * len(FLOORS)] * len(GAPS)},
        "tenths": tenths | {"num_tokens": [6] * 10},
        "reliability": [part],
        "response_ends": {
            "finished": 2, "cut": 1,
            "eos_prob": {"student": 0.66, "partial": 0.55, "full": 0.46, "target": None},
        },
        "predictors": {
            "graded": 3, "accuracy": 0.34, "accuracy_95": [0.3, 0.4], "right": 2, "wrong": 1,
            "signals": {
                "total": {"auc": 0.779, "interval_95": [0.7, 0.85]},
                "partial": {"auc": 0.766, "interval_95": None},
                "marginal": {"auc": None, "interval_95": None},
            },
            "reason": HOSTILE,
        },
        "vocabulary": dict(enumerate(texts)),
        "rollouts": [rollout, rollout, rollout],
    }  # fmt: skip


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    runs = [write_folder(folder / "anchored"), write_folder(folder / "<i>full", scale=1)]
    assert cli.main(["report", *map(str, runs), "--out", str(folder / "report.html")]) == 0
    return folder / "report.html"


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    with chromium(tmp_path_factory.mktemp("profile")) as page:
        yield page
        assert page.console == []


SELECTED = "document.querySelector('.token[aria-selected=true]')"
SELECTED_INDEX = f"[...document.querySelectorAll('.token')].indexOf({SELECTED})"


def test_report_requests_no_other_file_and_shows_every_section(page, report):
    page.requests.clear()
    page.open(report)
    assert page.requests == [report.as_uri()]
    headings = page.run("[...document.querySelectorAll('h2')].map(e => e.textContent)")
    assert headings == [
        "Methods", "Reader", "Validation", "Answers over the run", "Curves", "Drift by position",
        "Accuracy by response length", "Diagnosis", "Step time",
    ]  # fmt: skip
    rows = page.run("[...document.querySelectorAll('#methods tbody tr')].map(e => e.innerText)")
    assert re.match(r"\s*anchored\s+AR-OPD\s+0\.8\s+5\s+ema\s+40\s+61\.0 % 55\.0–67\.0 %", rows[0])
    assert re.match(r"\s*<i>full\s+Full OPD\s+1\s+none", rows[1])
    drawn = page.run("[...document.querySelectorAll('.chart svg')].every(e => e.clientHeight > 99)")
    assert drawn and page.console == []


def test_report_shows_response_ends_and_predictors(page, report):
    page.open(report)

    def card(heading: str) -> str:
        return page.run(
            "[...document.querySelectorAll('#diagnosis .card')]"
            f".find(e => e.querySelector('h3').textContent === {heading!r}).innerText"
        )

    ends, predictors = card("Response ends"), card("Predictors of a right answer")
    assert re.search(r"student\s+66\.0\s+partial\s+55\.0\s+full\s+46\.0\s+target\s+–", ends)
    assert "Finished: 2. Cut at the limit: 1." in ends
    assert re.search(r"total: full over student\s+0\.779\s+0\.700–0\.850", predictors)
    assert re.search(r"partial over student\s+0\.766\s+–", predictors)
    assert re.search(r"marginal: full over partial\s+–\s+–", predictors)
    assert "Accuracy 34.0 %" in predictors and HOSTILE in predictors


def test_report_shows_hostile_text_of_a_model_as_text(page, report):
    page.open(report)
    assert page.run("typeof window.hacked") == "undefined"
    assert page.run("document.querySelectorAll('img, main script').length") == 0
    shown = page.run("[...document.querySelectorAll('.token')].map(e => e.textContent)")
    assert shown[4] == HOSTILE and shown[2] == "↵\n"
    for place in (".facts", "details pre"):
        assert HOSTILE in page.run(f"document.querySelector('{place}').textContent")
    # No text in the file ends the script element early.
    assert report.read_text().count("</script") == 2


def test_report_shows_how_the_answers_to_a_question_changed(page, report):
    page.open(report)
    options = page.run("[...document.querySelectorAll('#answers option')].map(e => e.textContent)")
    names = [f"anchored: sums: v {HOSTILE}", f"anchored: train: t {HOSTILE}"]
    names += [f"<i>full: sums: v {HOSTILE}", f"<i>full: train: t {HOSTILE}"]
    assert [text[:20] for text in options] == [name[:20] for name in names]

    answers = "[...document.querySelectorAll('#answers li')].map(e => e.innerText)"
    first, second, third = page.run(answers)
    assert first.startswith("after 0 updates") and "wrong" in first and f"{HOSTILE} False" in first
    assert "after 20 updates" in second and "right" in second and f"{HOSTILE} True" in second
    assert "same response as above" in third and HOSTILE not in third
    page.run("document.querySelector('#answers [aria-label=\"Next question\"]').click()")
    first, *_ = page.run(answers)
    assert "step 0" in first and "not graded" in first and "mean residual −0.2500 nats" in first
    assert "[… 1007 characters left out …]" in first and first.strip().endswith("0")
    assert page.run("typeof window.hacked") == "undefined"


def test_report_limits_the_answers_of_long_runs(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    lines = [
        {**build_samples(step)[0], "id": f"{n}", "question": f"{n}?"}
        for step in range(101)
        for n in range(20)
    ]
    (run / "metrics.jsonl").write_text('{"step": 0, "loss": 1.5}\n')
    (run / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (data,) = read_data(write_report([run], tmp_path / "report.html"))["runs"]
    assert [history["question"] for history in data["histories"]] == [f"{n}?" for n in range(16)]
    steps = [answer["step"] for answer in data["histories"][0]["answers"]]
    assert len(steps) == 25 and (steps[0], steps[-1]) == (0, 100) and len(set(steps)) == 25


def test_reader_follows_the_mouse(page, report):
    page.open(report)
    first = page.run("document.querySelector('.side').innerText")
    page.hover(".token:nth-child(6)")
    side = page.run("document.querySelector('.side').innerText")
    assert side != first and "token 6 of 60" in side and "␣42" in side
    for text in ("student", "partial", "full", "target", "50.0 %", "25.0 %", "12.5 %", "6.3 %"):
        assert text in side
    assert "token 8 of 60" not in side
    page.hover(".token:nth-child(8)")  # i = 7: the residual is -6
    assert "−6.00" in page.run("document.querySelector('.side').innerText")
    colours = page.run(
        "[1, 8, 2].map(i => getComputedStyle(document.querySelector(`.token:nth-child(${i})`))"
        ".backgroundColor)"
    )
    assert len(set(colours)) == 3  # warm, cool, faint
    page.run("document.querySelectorAll('[aria-label=\"Colour by\"] button')[1].click()")
    again = page.run(
        "getComputedStyle(document.querySelector('.token:nth-child(1)')).backgroundColor"
    )
    assert again != colours[0] and "Through the anchor" in page.run(
        "document.querySelector('.scale').innerText"
    )


def test_reader_follows_the_keyboard(page, report):
    page.open(report)
    page.run(f"{SELECTED}.focus()")
    at = page.run(SELECTED_INDEX)
    page.press("ArrowRight")
    page.press("ArrowRight")
    assert page.run(SELECTED_INDEX) == at + 2
    page.press("ArrowLeft")
    assert page.run(SELECTED_INDEX) == at + 1
    assert f"token {at + 2} of 60" in page.run("document.querySelector('.side').innerText")
    page.press("n")
    assert page.run(SELECTED_INDEX) % 7 == 0
    top = f"scrollY + {SELECTED}.getClientRects()[0].top"  # the page scrolls to it
    before = page.run(top)
    page.press("ArrowDown")
    assert page.run(top) > before
    page.press("End")
    assert page.run(SELECTED_INDEX) == 59
    assert page.run(f"document.activeElement === {SELECTED}")
    assert page.run("document.querySelectorAll('.token[tabindex=\"0\"]').length") == 1


def test_report_outlines_every_element_that_the_tab_key_reaches(page, report):
    page.open(report)
    seen = []
    for _ in range(40):
        page.press("Tab")
        name, outline, width = page.run(
            "(() => { const e = document.activeElement, s = getComputedStyle(e);"
            "return [e.outerHTML.slice(0, 60), s.outlineStyle, parseFloat(s.outlineWidth)]; })()"
        )
        if name.startswith("<body"):
            break  # the focus has left the last element
        assert outline != "none" and width >= 1, name
        seen.append(name)
    assert len(seen) > 25 and any("token" in name for name in seen)


def test_chart_follows_metric_runs_and_keyboard(page, report):
    page.open(report)
    lines = "document.querySelectorAll('#curves .chart path').length"
    assert page.run(lines) == 4  # values and mean of each run
    chosen = "document.querySelector('#curves select')"
    page.run(f"{chosen}.value = 'an_unknown_metric', {chosen}.dispatchEvent(new Event('change'))")
    axis = "document.querySelector('#curves .chart text').textContent"
    assert page.run(axis) == "an unknown metric"
    page.run("document.querySelector('#runs input').click()")
    assert page.run(lines) == 2
    page.run("document.querySelector('#curves .chart svg').focus()")
    page.press("End")
    assert page.run("document.querySelector('#curves .tip').innerText").startswith("step 39")


@pytest.mark.parametrize("dark", [False, True])
def test_report_text_has_enough_contrast_in_light_and_dark(page, report, dark):
    page.open(report, dark=dark)

    def colour(selector: str, what: str) -> list[float]:
        text = page.run(f"getComputedStyle(document.querySelector({selector!r})).{what}")
        numbers = [float(number) for number in re.findall(r"[\d.]+", text)]
        return numbers if "srgb" in text else [n / 255 for n in numbers[:3]] + numbers[3:]

    paper, ink = colour("body", "backgroundColor"), colour("body", "color")
    card = colour(".card", "backgroundColor")
    assert (luminance(paper) < 0.1) == dark
    assert contrast(ink, paper) > 10 and contrast(colour(".lead", "color"), paper) > 4.5
    for child in (1, 8):  # the strongest colours of both signs
        *tint, alpha = colour(f".token:nth-child({child})", "backgroundColor")
        behind = [alpha * t + (1 - alpha) * c for t, c in zip(tint, card, strict=False)]
        assert alpha > 0.8 and contrast(ink, behind) > 4.5


def luminance(rgb: list[float]) -> float:
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in rgb[:3]]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(first: list[float], second: list[float]) -> float:
    """Return the contrast ratio of WCAG 2."""
    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)


def test_report_on_a_phone_does_not_scroll_sideways(page, report):
    page.open(report, width=360, height=740)
    assert page.run("document.documentElement.scrollWidth") == 360
    too_wide = page.run(
        "[...document.querySelectorAll('main *')]"
        ".filter(e => !e.closest('.scroll, .tokens, svg, pre')"
        " && e.getBoundingClientRect().right > 360.5).map(e => e.outerHTML.slice(0, 80))"
    )
    assert too_wide == []


def test_report_of_a_run_with_only_curves_has_only_their_sections(page, tmp_path):
    run = tmp_path / "only curves"
    run.mkdir()
    (run / "metrics.jsonl").write_text('{"step": 0, "loss": 1.5}\n')
    out = write_report([run], tmp_path / "report.html")
    page.open(out)
    assert page.run("[...document.querySelectorAll('h2')].map(e => e.textContent)") == [
        "Methods",
        "Curves",
    ]
    assert page.run("document.querySelector('h1').textContent") == "only curves"


def read_data(page_path: Path) -> dict[str, Any]:
    match = re.search(
        r'<script type="application/json" id="data">(.*?)</script>', page_path.read_text()
    )
    assert match
    return json.loads(match[1])


def test_report_averages_long_curves_and_shows_paths_for_equal_names(tmp_path):
    runs = [write_folder(tmp_path / name / "run", steps=2500) for name in ("a", "b")]
    data = read_data(write_report(runs, tmp_path / "report.html"))
    assert [run["name"] for run in data["runs"]] == ["a/run", "b/run"]
    run = data["runs"][0]
    assert run["num_steps"] == 2500 and len(run["steps"]) == 834 and run["steps"][-1] == 2499
    assert run["metrics"]["an_unknown_metric"][:2] == [1.0, 4.0]
    assert run["metrics"]["loss"][1] == pytest.approx((1 / 5 + 1 / 6) / 2, abs=1e-6)


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (
            lambda run: None,
            "nothing to show: expected a run's output_dir with metrics.jsonl, diagnose",
        ),
        (
            lambda run: write_json(run / "diagnose" / "x.json", {"schema": "aropd-diagnosis/0"}),
            "x.json: schema 'aropd-diagnosis/0', expected 'aropd-diagnosis/3'",
        ),
        (
            lambda run: write_json(run / "eval" / "summary.json", {}),
            "summary.json: no `tasks`: expected",
        ),
    ],
)
def test_report_of_an_invalid_folder_names_the_file(tmp_path, capsys, prepare, message):
    run = tmp_path / "run"
    run.mkdir()
    prepare(run)
    assert cli.main(["report", str(run), "--out", str(tmp_path / "report.html")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "report.html").exists()


def test_report_of_a_run_given_twice_is_refused(tmp_path):
    run = write_folder(tmp_path / "run")
    with pytest.raises(ValueError, match="expected each run only once"):
        write_report([run, run], tmp_path / "report.html")
