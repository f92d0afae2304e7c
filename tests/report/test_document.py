import base64
import io
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from jaxlm.report.document import PROTOCOL, read, table, to_html, to_json, to_markdown, write

pytestmark = pytest.mark.slow

PICTURE = '<img alt="" src="data:">'


class Page(HTMLParser):
    """Elements, attributes and visible text of a page; fails on a tag that is closed out of order."""

    VOID = ("meta", "img", "source", "br")

    def __init__(self, html):
        super().__init__()
        self.open, self.tags, self.text = [], [], ""
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data


def test_all_files_are_written_and_the_page_stands_alone(awkward, protocol, tmp_path):
    path = write(tmp_path / "new" / "place", awkward, protocol)
    assert path.name == "report.html"
    assert {f.name for f in path.parent.iterdir()} == {
        "report.json",
        "report.md",
        "report.html",
        "pareto.png",
        "layers.png",
    }
    assert "![Quality, size and speed](pareto.png)" in (path.parent / "report.md").read_text()
    page = Page(path.read_text())
    addresses = [value for _, a in page.tags for key, value in a.items() if key in ("src", "srcset", "href")]
    assert len(addresses) == 8
    for address in addresses:
        picture = Image.open(io.BytesIO(base64.b64decode(address.removeprefix("data:image/png;base64,"))))
        assert picture.width > 700
    assert not {"script", "link", "iframe"} & {tag for tag, _ in page.tags}
    assert any("default-src 'none'" in a.get("content", "") for _, a in page.tags)


def test_rows_are_read_back_as_they_were(rows, protocol, tmp_path):
    write(tmp_path, rows, protocol)
    assert read(tmp_path / "report.json") == list(rows)


@pytest.mark.full
def test_what_was_not_a_number_is_read_back_as_such(awkward, protocol, tmp_path):
    write(tmp_path, awkward, protocol)
    measured = [(a.held_out, b.held_out) for a, b in zip(read(tmp_path / "report.json"), awkward, strict=True)]
    assert all((a is None) == (b is None) for a, b in measured)
    for again, before in ((a, b) for a, b in measured if a is not None):
        np.testing.assert_array_equal(again.columns["nats"], before.columns["nats"])


def test_a_report_needs_its_protocol(rows, protocol, tmp_path):
    del protocol["intervals"], protocol["corpus"]
    with pytest.raises(ValueError, match="missing: corpus, intervals"):
        write(tmp_path, rows, protocol)
    assert not list(tmp_path.iterdir()) and "intervals" in PROTOCOL


def test_the_page_says_everything(rows, protocol):
    text = Page(to_html(rows, protocol, "Title", 0.05, PICTURE, "")).text
    for said in (
        "for size ship int8",
        "5.91× smaller",
        "bits per byte",
        "made up",
        "79.0",
        "byte-level BPE, 4,096 entries",
        "processor none; cores 2",
        "Stored as 4.10 MB int8.",
        "return x",
        "36,000",
        "13.9 M",
        "61.0 MB",
        "Teacher's cache: 12.5 bytes per token.",
        "No gain in quality.",
    ):
        assert said in text, said


def test_nothing_from_outside_becomes_markup(awkward, protocol):
    protocol["tokenizer"] = "<img src=x onerror=alert(1)>"
    html = to_html(awkward, protocol, "<b>$title</b> & more", 0.05, PICTURE, "")
    page = Page(html)
    assert "script" not in {tag for tag, _ in page.tags} and "b" not in {tag for tag, _ in page.tags}
    assert "<script>alert('x')</script>" in page.text and "<b>$title</b> & more" in page.text
    assert not re.search("[\x00-\x08\x0b-\x1f\u202e\ud800-\udfff]", html)
    assert "日本 🙂 $t" in page.text


def test_markdown_keeps_its_shape(awkward, protocol):
    text = to_markdown(awkward, protocol, "# *Title*", 0.05)
    assert text.startswith("# \\# \\*Title\\*\n")
    lines = text.splitlines()
    columns = [len(re.findall(r"(?<!\\)\|", line)) for line in lines if line.startswith("|")]
    assert len(columns) == 2 + len(awkward) and set(columns) == {11}
    start = next(i for i, line in enumerate(lines) if line.startswith("`````text"))
    assert "`````" in lines[start + 1 :], "a fence longer than any run of backticks inside, and closed"
    outside = re.sub(r"(?ms)^(`{3,})text\n.*?^\1$", "", text)
    assert "<script" not in re.sub(r"\\<", "", outside) and "javascript:x" in outside
    assert re.search(r"(?<!\\)\[l", outside) is None


def test_json_is_strict_and_complete(awkward, protocol):
    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    text = to_json(awkward, protocol, "T", 0.05)
    text.encode("utf-8", "replace")
    report = json.loads(text, parse_constant=refuse)
    models = {model["name"]: model for model in report["models"]}
    assert models["broken"]["quality"]["bits_per_byte"]["value"] is None and models["counted"]["quality"] == {}
    int8 = models["int8"]
    assert int8["against_reference"]["outcomes"] == {"size": 1, "speed": 1, "latency": 1, "quality": -1}
    assert len(int8["measurements"]["timing"]["batch"]["seconds"]) == 15
    assert int8["tokens_per_second"]["low"] < int8["tokens_per_second"]["median"] < int8["tokens_per_second"]["high"]
    assert models["teacher"]["against_reference"] is None and report["protocol"]["tokens"] == 36_000


def test_a_single_model_makes_a_report_without_recommendations(rows, protocol):
    html = to_html(rows[:1], protocol, "T", 0.05, PICTURE, "")
    assert 'class="recommendation"' not in html and "nothing to compare it with" in html


@pytest.mark.parametrize("width", [80, 120])
def test_the_console_table_fits_and_is_not_markup(awkward, width):
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(table(awkward))
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= width and "…" not in text
    assert "▲ 5.91×" in text and "▼ 0.67×" in text and "NaN" in text and "\x1b" not in text
    assert "79.0%" in text


def test_a_report_of_classifiers_is_in_percent_and_points(classifiers, protocol):
    text = Page(to_html(classifiers, protocol, "T", 0.05, PICTURE, "")).text
    assert "Accuracy" in text and "Macro F1" in text and "Matthews correlation" in text
    assert re.search(r"−\d\.\d ± \d\.\d points", text) and "bits" not in text
    assert "Keeping at least 95% of the accuracy of teacher: " in text


def test_without_layers_there_is_no_picture_of_them(make, protocol, tmp_path):
    write(tmp_path, [make.row("a", 5, 0.3, 1.6)], protocol)
    assert not (tmp_path / "layers.png").exists() and "layers.png" not in (tmp_path / "report.md").read_text()
