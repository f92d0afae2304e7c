"""One language: words that were retired (the glossary of CONTRIBUTING.md) do not come back, in code or in prose."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CODE = sorted(
    path for part in ("jaxlm", "experiments", "configs", "bench", "docs") for path in (ROOT / part).rglob("*.py")
)
PROSE = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "jaxlm").rglob("*.html"))]

RETIRED = {
    r"texts without labels|teachers? (is|are) heard|\bheard\b": "unlabelled data for distillation",
    r"[`\"]scored[`\"]": "distill_mask",
    r"must not fall below": "regression threshold",
    r"\bwins? back\b|\bwon back\b": "recovers",
    r"\brounds its inputs\b|\brounding its inputs\b": "quantizes activations",
    r"far louder than": "activation outliers",
    r"\bgiven again\b": "re-run",
    r"\d times smaller": "3.85× smaller",
    r"Say what counts|How strong$|What wins nothing": "choosing the compression ratio, negative results",
    r"\b(told\(|remember\(|refuse_other|refuse_changed)": "training_summary, write_provenance",
    r"\b(School|Taught|Lesson)\b": "TeacherPool, DistillationLosses, DistillConfig",
    r"class (Stored|Operated|Trained|Loaded|Adapted)\b|\b(Operated|Adapted)\b": "LM, MethodInit",
    r"\b(Blueprint|Outline|Setting|set_up)\b": "ShardedStep, DryRun, RunSetup, prepare_run",
    r"\b(Journal|journal)\b(?!StorageBackend)": "MetricWriter",
    r"\b(assess|assessed|assesses|exhausted\()": "evaluate_and_track, last_eval_step, should_stop",
    r"\b(everywhere\(|on_host\(|anatomy|Growing\b)": "gather_to_host, layer_statistics, DiskArray",
    r"\b(chips\(|gist\(|won_nothing|Claim\b|[Ee]vidence\b)": "badges, summarize, no_gain, Criterion, reproduction",
    r"\b(HeldOut|Measure|Quality)\(|import .*\b(HeldOut|Measure|Quality)\b": "PerExampleResults, Metric, EvalSpec",
    r"\b(Surroundings|around\.|opened\()": "BlockInputs, inputs, with_stream_gate",
}
"""What is not said any more, and what is said instead."""
ALLOWED = {
    "jaxlm/runner/search.py": ("journal", "Journal"),  # optuna's
}
NAMELESS = {"own", "found", "told", "late", "each"}
"""Names that do not say what they hold."""


def lines_with(pattern: str, path: Path) -> list[str]:
    name = str(path.relative_to(ROOT))
    allowed = ALLOWED.get(name, ())
    return [
        f"{name}:{number}: {line.strip()}"
        for number, line in enumerate(path.read_text("utf-8").splitlines(), 1)
        if re.search(pattern, line) and not any(word in line for word in allowed)
    ]


@pytest.mark.parametrize(("pattern", "instead"), RETIRED.items(), ids=list(RETIRED.values()))
def test_retired_words_stay_out(pattern, instead):
    lines = [line for path in (*CODE, *PROSE) for line in lines_with(pattern, path)]
    assert not lines, f"say {instead}"


@pytest.mark.parametrize("path", CODE, ids=lambda path: str(path.relative_to(ROOT)))
def test_variables_say_what_they_hold(path):
    names = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and node.id in NAMELESS:
            names.add(f"{node.id} in line {node.lineno}")
        elif isinstance(node, ast.arg) and node.arg in NAMELESS:
            names.add(f"{node.arg} in line {node.lineno}")
    assert not names


def test_the_glossary_is_documented():
    glossary = (ROOT / "CONTRIBUTING.md").read_text("utf-8").split("## Glossary")[1]
    for words in RETIRED.values():
        for word in words.split(", "):
            assert word.split("(")[0] in glossary or word == "DiskArray", word
