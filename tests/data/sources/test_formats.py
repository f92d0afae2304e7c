"""Every format reads what it says, and says where and why it cannot."""

import gzip
import json

import pytest

from jaxlm.data import BadRowError, read
from jaxlm.data.sources import Unusable
from jaxlm.data.sources.conll import to_iob2


@pytest.fixture
def write(tmp_path):
    def write(name: str, content: str | bytes) -> str:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return write


# -- jsonl


def test_jsonl_keeps_types_and_skips_blank_lines(write):
    path = write("a.jsonl", '{"text": "a\\u2028b", "label": 1}\n\n{"text": "c", "label": 0.5}\n')
    assert list(read("jsonl", path)) == [{"text": "a\u2028b", "label": 1}, {"text": "c", "label": 0.5}]


def test_jsonl_bad_rows(write):
    path = write("a.jsonl", '{"a": 1}\n{"a": \n[1]\n{"a": 2}\n')
    source = read("jsonl", path, bad_rows="skip")
    assert [r["a"] for r in source] == [1, 2]
    assert source.rows == 2 and [(b.file, b.line) for b in source.bad] == [(path, 2), (path, 3)]
    assert "not JSON" in source.bad[0].reason and "list" in source.bad[1].reason
    with pytest.raises(BadRowError, match=rf"{path}:2: not JSON.*bad_rows='skip'"):
        list(read("jsonl", path))


def test_jsonl_that_is_one_array(write):
    with pytest.raises(BadRowError, match="one object a line"):
        read("jsonl", write("a.jsonl", json.dumps([{"a": 1}], indent=1)))


def test_jsonl_half_a_character(write):
    path = write("a.jsonl", r'{"a": "\ud83d\ude00 \u00e9"}' + "\n" + r'{"b": 1, "a": ["\ud83d"]}' + "\n")
    source = read("jsonl", path, bad_rows="skip")
    assert list(source) == [{"a": "\U0001f600 é"}] and "surrogate" in source.bad[0].reason


def test_jsonl_that_python_does_not_read(write):
    deep, long = "[" * 100_000, "9" * 5000
    rows = [f'{{"a": {deep}}}', f'{{"a": {long}}}', '{"a": 1, "b": 2, "a": 3}', '{"a": {"b": 1, "b": 2}, "c": NaN}']
    source = read("jsonl", write("a.jsonl", "\n".join(rows)), bad_rows="skip")
    (record,) = source
    assert record["a"] == {"b": 2} and record["c"] != record["c"]
    assert [(bad.line, bad.reason) for bad in source.bad] == [
        (1, "JSON that is nested too deeply to be read"),
        (2, "an integer of more than 4300 digits"),
        (3, "the object has the key 'a' twice"),
    ]


def test_jsonl_gzip_and_glob(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.jsonl.gz").write_bytes(gzip.compress(f'{{"i": {i}}}\n'.encode()))
    assert [r["i"] for r in read("jsonl", f"{tmp_path}/*.gz")] == [0, 1, 2]


# -- csv, tsv


def test_csv_quoting_and_byte_order_mark(write):
    path = write("a.csv", b'\xef\xbb\xbftext,label\r\n"a, ""b""\nc",x\r\n\r\nd,y\r\n')
    assert list(read("csv", path)) == [{"text": 'a, "b"\nc', "label": "x"}, {"text": "d", "label": "y"}]


def test_csv_keeps_the_line_ends_inside_of_quotation_marks(write):
    path = write("a.csv", b'text,label\r\n"a\r\nb\nc\rd","x"\r\n"e\n\n",y\n')
    assert [r["text"] for r in read("csv", path)] == ["a\r\nb\nc\rd", "e\n\n"]


def test_csv_bad_rows_name_the_line_they_begin_on(write):
    path = write("a.csv", 'text,label\n"a\nb",x\nonly\na,b,c\n"x"y,z\nd,y\n')
    source = read("csv", path, bad_rows="skip")
    assert [r["label"] for r in source] == ["x", "y"]
    assert [b.line for b in source.bad] == [4, 5, 6]
    assert "1 fields, expected 2 (text, label)" in source.bad[0].reason
    assert "not CSV" in source.bad[2].reason


def test_csv_quotation_mark_that_never_closes(write):
    source = read("csv", write("a.csv", 'text\na\n"b\nc\n'), bad_rows="skip")
    assert [r["text"] for r in source] == ["a"] and source.bad[0].line == 3


def test_csv_with_a_document_beyond_the_default_limit(write):
    assert len(next(iter(read("csv", write("a.csv", "text\n" + "x" * 200_000 + "\n"))))["text"]) == 200_000


def test_tsv_takes_quotation_marks_as_text(write):
    path = write("a.tsv", 'text\tlabel\n"a\t1\nb" c\t0\n')
    assert [r["text"] for r in read("tsv", path)] == ['"a', 'b" c']


def test_names_for_a_file_without_header(write):
    path = write("a.tsv", "a\t1\nb\t0\tmore\n")
    assert list(read("tsv", path, columns=("text", "label", "..."))) == [
        {"text": "a", "label": "1"},
        {"text": "b", "label": "0"},
    ]
    source = read("tsv", path, columns=["text", "label"], bad_rows="skip")
    assert source.rows == 1 and source.bad[0].line == 2
    with pytest.raises(ValueError, match="repeats a name"):
        read("tsv", write("b.tsv", "1\t1\n2\t2\n"))


def test_every_file_of_a_glob_has_its_header(tmp_path, write):
    write("1.csv", "a,b\n1,2\n")
    write("2.csv", "b,a\n3,4\n")
    assert list(read("csv", f"{tmp_path}/*.csv")) == [{"a": "1", "b": "2"}, {"b": "3", "a": "4"}]


# -- columns


def test_columns_select_and_rename(write):
    path = write("a.csv", "sentence,y,z\na,1,2\n")
    assert list(read("csv", path, columns={"text": "sentence", "label": "y"})) == [{"text": "a", "label": "1"}]


def test_a_column_missing_everywhere_is_an_error_and_missing_once_a_bad_row(write):
    path = write("a.jsonl", '{"text": "a"}\n{"txt": "b"}\n')
    for bad_rows in ("stop", "skip"):
        with pytest.raises(ValueError, match="no column 'texts'; did you mean 'text'"):
            read("jsonl", path, columns={"text": "texts"}, bad_rows=bad_rows)
    source = read("jsonl", path, columns={"body": "text"}, bad_rows="skip")
    assert list(source) == [{"body": "a"}] and source.bad[0].line == 2
    source = read("jsonl", path, columns={"body": "txt"}, bad_rows="skip")
    assert list(source) == [{"body": "b"}] and source.bad[0].line == 1


# -- conll


def test_conll(write):
    path = write(
        "a.conll",
        "-DOCSTART- -X- O O\n\nEU NNP I-ORG\nrejects VBZ O\n\t\nPeter\tB-PER\nBlack\u00a0burn\tI-PER\n-DOCSTART-\nx O",
    )
    assert list(read("conll", path)) == [
        {"tokens": ["EU", "rejects"], "tags": ["B-ORG", "O"]},
        {"tokens": ["Peter", "Black\u00a0burn"], "tags": ["B-PER", "I-PER"]},
        {"tokens": ["x"], "tags": ["O"]},
    ]


def test_conll_bad_line_spoils_its_sentence_only(write):
    source = read("conll", write("a.conll", "a O\n\nb O\nc\nd O\n\ne O\n"), bad_rows="skip")
    assert [r["tokens"] for r in source] == [["a"], ["e"]]
    assert [(b.line, b.reason) for b in source.bad] == [(4, "no tag after the token 'c'")]


def test_conll_columns_of_a_sentence_are_equally_many(write):
    source = read("conll", write("a.conll", "a X O\nb B-P\n\nc O\nd e O\n\nf O\n"), bad_rows="skip")
    assert [r["tokens"] for r in source] == [["f"]]
    assert [(b.line, b.reason) for b in source.bad] == [
        (2, "2 columns, the sentence's first line has 3"),
        (5, "3 columns, the sentence's first line has 2"),
    ]


def test_conll_tabs_separate_columns_that_hold_spaces(write):
    path = write("a.conll", "New York\tB-LOC\n in \t O\n\nmi amor O\n")
    source = read("conll", path, bad_rows="skip")
    assert next(iter(source)) == {"tokens": ["New York", "in"], "tags": ["B-LOC", "O"]}


@pytest.mark.parametrize(
    "comment", ["# id 7f\tdomain=de", "# newpar", "# text = O", "#\thttp://a.example [2011]", "#doc 12"]
)
@pytest.mark.parametrize("others", ["", "x y "])
def test_conll_comments_are_no_tokens(write, comment, others):
    text = "".join(f"{comment}\nRome {others}B-LOC\n# {others}O\n\n{comment}\n# {others}O\n#tag {others}B-LOC\n\n" * 2)
    assert (
        list(read("conll", write("a.conll", text)))
        == [
            {"tokens": ["Rome", "#"], "tags": ["B-LOC", "O"]},
            {"tokens": ["#", "#tag"], "tags": ["O", "B-LOC"]},
        ]
        * 2
    )


NUMBERED = """# sent_id = 4
1-2\tZum\t_\t_\t_
1\tZu\tzu\tADP\t_
2\tdem\tder\tDET\t_
2.1\tNichts\t_\t_\t_
3\tArzt\tArzt\tNOUN\tSpaceAfter=No

# text = Geh
1\tGeh\tgehen\tVERB\t_
"""


def test_conll_columns_that_number_the_tokens(write):
    path = write("a.conllu", NUMBERED)
    with pytest.raises(ValueError, match=r"a.conllu:2: the first column numbers the tokens.* config.data.columns = \("):
        read("conll", path)
    assert list(read("conll", path, columns=("number", "tokens", "lemma", "tags", "..."))) == [
        {
            "number": ["1", "2", "3"],
            "tokens": ["Zu", "dem", "Arzt"],
            "lemma": ["zu", "der", "Arzt"],
            "tags": ["ADP", "DET", "NOUN"],
        },
        {"number": ["1"], "tokens": ["Geh"], "lemma": ["gehen"], "tags": ["VERB"]},
    ]
    with pytest.raises(BadRowError, match=r":2: 5 columns, expected 4 \(number, tokens, lemma, tags\)"):
        read("conll", write("b.conllu", NUMBERED.replace("1-2", "0")), columns=("number", "tokens", "lemma", "tags"))
    with pytest.raises(ValueError, match="must name 'tokens' and 'tags'"):
        read("conll", path, columns=("number", "tokens"))


def test_conll_documents_of_numbered_tokens(write):
    path = write("a.txt", "#doc 5\n0 Rome B-Loc ['N']\n1 fell O ['N']\n#doc 8\n0 Bonn I-Loc ['N']\n")
    records = list(read("conll", path, columns=("number", "tokens", "tags", "...")))
    assert [(r["tokens"], r["tags"]) for r in records] == [(["Rome", "fell"], ["B-Loc", "O"]), (["Bonn"], ["B-Loc"])]


def test_conll_leaves_other_schemes_than_iob_alone(write):
    path = write("a.conll", "a I-PER\nb L-PER\nc O\nd I-PER\n")
    assert next(iter(read("conll", path)))["tags"] == ["I-PER", "L-PER", "O", "I-PER"]


def test_iob2_is_a_fixed_point():
    tags = ["B-A", "I-A", "O", "B-A", "B-A", "I-A", "B-B", "I-B"]
    assert to_iob2(tags) == tags
    assert to_iob2(["I-A", "I-A", "O", "I-A", "B-A", "I-A", "I-B", "I-B"]) == tags
    assert to_iob2(["NN", "VB"]) == ["NN", "VB"]


# -- text


def test_text_slices_cut_characters_over_all_files(tmp_path, write):
    write("1.txt", "añb\n")
    write("2.txt", "")
    write("3.txt", "cde\r\nfg")
    whole = "".join(r["text"] for r in read("text", f"{tmp_path}/*.txt"))
    assert whole == "añb\ncde\r\nfg"
    for cut in range(1, len(whole)):
        head = [r["text"] for r in read("text", f"{tmp_path}/*.txt[:{cut}]")]
        tail = [r["text"] for r in read("text", f"{tmp_path}/*.txt[{cut}:]")]
        assert "".join(head) == whole[:cut] and "".join(tail) == whole[cut:]
        assert all(head) and all(tail)


def test_text_lines_and_paragraphs(write):
    path = write("a.txt", "\n a\nb\r\n \t\n\n  c\x0cd\n\n")
    lines = read("text", path, documents="line")
    assert [r["text"] for r in lines] == [" a", "b", "  c\x0cd"]
    assert [row.line for row in lines.located()] == [2, 3, 6]
    paragraphs = read("text", path, documents="paragraph")
    assert [r["text"] for r in paragraphs] == ["a\nb", "c\x0cd"]
    assert [row.line for row in paragraphs.located()] == [2, 6]
    assert [r["text"] for r in read("text", path + "[1:]", documents="line")] == ["b", "  c\x0cd"]


def test_latin1_is_refused_with_its_line(write):
    path = write("a.txt", "one\ntwo\ncaf\xe9\n".encode("latin1"))
    for format, options in (("text", {}), ("text", {"documents": "line"}), ("csv", {}), ("conll", {})):
        if format == "conll":
            path = write("a.conll", "caf\xe9 O\n".encode("latin1"))
        with pytest.raises(ValueError, match=r":\d: byte 0xe9 is not UTF-8.*iconv") as error:
            list(read(format, path, **options))
        assert (":1:" if format == "conll" else ":3:") in str(error.value)


# -- python


def test_python_library_is_split_by_module():
    train, held_out = read("python", "stdlib[:90%]"), read("python", "stdlib[90%:]")
    names = [r["name"] for r in train], [r["name"] for r in held_out]
    assert not set(names[0]) & set(names[1])
    together = names[0] + names[1]
    assert together == [r["name"] for r in read("python", "stdlib")] and together != sorted(together)
    assert {"json", "json.decoder", "argparse"} <= set(together)
    assert not [n for n in together if {"test", "tests", "idlelib", "site-packages", "lib2to3"} & set(n.split("."))]
    assert sum(len(r["text"]) for r in train) > 3_000_000
    with pytest.raises(ValueError, match="stdlib"):
        read("python", "stdlb")


# -- all


def test_slices_of_rows(write):
    path = write("a.jsonl", "".join(f'{{"i": {i}}}\n' for i in range(7)))
    assert [r["i"] for r in read("jsonl", path + "[:50%]")] == [0, 1, 2]
    assert [r["i"] for r in read("jsonl", path + "[50%:]")] == [3, 4, 5, 6]
    assert [r["i"] for r in read("jsonl", path + "[-2:]")] == [5, 6]
    with pytest.raises(ValueError, match="no usable row"):
        read("jsonl", path + "[7:]")


def test_bad_rows_belong_to_one_slice(write):
    path = write("a.jsonl", '{"i": 0}\nx\n{"i": 1}\ny\n{"i": 2}\n')
    parts = [read("jsonl", path + part, bad_rows="skip") for part in ("[:3]", "[3:]")]
    assert [len(p.bad) for p in parts] == [1, 1] and [p.rows for p in parts] == [2, 1]


def test_all_rows_bad(write):
    with pytest.raises(ValueError, match=r"no usable row: all 2 are bad, the first at .*:1: not JSON"):
        read("jsonl", write("a.jsonl", "x\ny\n"), bad_rows="skip")


def test_a_task_may_reject_rows(write):
    path = write("a.jsonl", '{"y": "1"}\n{"y": "one"}\n')
    source = read("jsonl", path, bad_rows="skip")
    for row in source.located():
        if not row.record["y"].isdigit():
            source.reject(row, "not a number")
    assert source.rows == 1 and source.bad[0].line == 2
    with pytest.raises(BadRowError, match=":1: no good"):
        source = read("jsonl", path)
        source.reject(next(source.located()), "no good")


def test_rows_that_a_reader_cannot_use_are_bad(write):
    path = write("a.jsonl", '{"y": "1"}\n{"y": "one"}\n{"y": "2", "z": 0}\n{"y": "3"}\n')

    def number(record):
        if not record["y"].isdigit():
            raise Unusable("not a number")
        return int(record["y"])

    source = read("jsonl", path, bad_rows="skip")
    for _ in range(2):  # of every pass anew
        assert list(source.usable(number)) == [1, 2, 3] and [b.line for b in source.bad] == [2] and source.rows == 3
    assert list(source.usable(number, optional=("z",))) == [1, 3]
    assert str(source.bad[1]) == f"{path}:3: a column 'z', which the rows before do not have"
    with pytest.raises(BadRowError, match=r":2: not a number\. Correct the row"):
        list(read("jsonl", path).usable(number))
    lone = read("jsonl", write("b.jsonl", '{"y": "x"}\n{"y": "y"}\n'), bad_rows="skip")
    with pytest.raises(ValueError, match=r"no usable row: all 2 are bad, the first at .*b\.jsonl:1: not a number"):
        list(lone.usable(number))


def test_sources_are_read_anew(write):
    source = read("jsonl", write("a.jsonl", '{"a": 1}\nx\n'), bad_rows="skip")
    assert list(source) == list(source) and source.rows == 1 and len(source.bad) == 1


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (("jsnl", "x"), {}, "unknown data format 'jsnl'; did you mean 'jsonl'"),
        (("jsonl", "x"), {"bad_rows": "skp"}, "did you mean 'skip'"),
        (("jsonl", "x"), {"documents": "line"}, "option of the text format"),
        (("jsonl", "x"), {"columns": ("a",)}, "csv or tsv"),
        (("jsonl", "x"), {"columns": "text"}, "mapping"),
        (("text", "x"), {"documents": "lines"}, "did you mean 'line'"),
    ],
)
def test_wrong_options(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        read(*arguments, **options)
