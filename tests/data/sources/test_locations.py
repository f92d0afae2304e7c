"""Slices share nothing and lose nothing; an error about a missing file names the nearest."""

import random

import pytest

from jaxlm.data.sources.locations import Slice, find_files, may_share, split_location


@pytest.mark.parametrize(
    ("location", "path", "part"),
    [
        ("a.txt", "a.txt", Slice()),
        ("a.txt[:90%]", "a.txt", Slice(None, "90%")),
        ("d/[ab]*.txt[10:-5]", "d/[ab]*.txt", Slice("10", "-5")),
        ("glue/sst2:train[25%:75%]", "glue/sst2:train", Slice("25%", "75%")),
        ("d/[ab].txt", "d/[ab].txt", Slice()),
        ("a[:]", "a", Slice()),
    ],
)
def test_split_location(location, path, part):
    assert split_location(location) == (path, part)


def test_counts_are_python_slices():
    numbers = random.Random(0)
    for _ in range(300):
        n, start, stop = numbers.randrange(20), numbers.randint(-25, 25), numbers.randint(-25, 25)
        first, last = Slice(str(start), str(stop)).bounds(n)
        assert list(range(n))[first:last] == list(range(n))[start:stop]


def test_percentages_part_the_rows():
    for n in (0, 1, 7, 100, 1115394):
        for percent in (0, 1, 33, 90, 100):
            head, tail = Slice(None, f"{percent}%").bounds(n), Slice(f"{percent}%", None).bounds(n)
            assert head == (0, n * percent // 100) and tail == (head[1], n)
            assert Slice(f"-{100 - percent}%", None).bounds(n) == tail
    assert Slice("-0%", None).bounds(10) == (10, 10)
    with pytest.raises(ValueError, match="100%"):
        Slice("101%", None).bounds(10)


def test_find_files(tmp_path, monkeypatch):
    for name in ("b.txt", "a.txt", "x.csv"):
        (tmp_path / name).write_text("")
    assert find_files(f"{tmp_path}/*.txt") == [f"{tmp_path}/a.txt", f"{tmp_path}/b.txt"]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_files("~/x.csv") == [f"{tmp_path}/x.csv"]
    with pytest.raises(FileNotFoundError, match=r"did you mean 'x\.csv'"):
        find_files(f"{tmp_path}/x.cvs")
    with pytest.raises(FileNotFoundError, match="no file matches"):
        find_files(f"{tmp_path}/*.jsonl")
    with pytest.raises(FileNotFoundError, match=tmp_path.name):
        find_files(f"{tmp_path}x/deep/er.txt")
    with pytest.raises(IsADirectoryError, match="name its files"):
        find_files(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="empty"):
        find_files("")


def test_an_existing_file_is_no_glob(tmp_path):
    (tmp_path / "a[1].txt").write_text("")
    assert find_files(f"{tmp_path}/a[1].txt") == [f"{tmp_path}/a[1].txt"]


@pytest.mark.parametrize(
    ("a", "b", "shared"),
    [
        ("x", "y", False),
        ("x", "x", True),
        ("x[:40%]", "x[40%:]", False),
        ("x[:41%]", "x[40%:]", True),
        ("x[:-10%]", "x[90%:]", False),
        ("x[:100]", "x[100:200]", False),
        ("x[:101]", "x[100:200]", True),
        ("x[:-100]", "x[-100:]", False),
        ("x[:-99]", "x[-100:]", True),
        ("x[:100]", "x[90%:]", True),  # whether they share one depends on how many there are
        ("x[10%:20%]", "x[30%:40%]", False),
        ("glue/sst2:train", "glue/sst2:validation", False),
        ("glue/sst2:1.0.0:validation", "glue/sst2:validation[:5]", True),
    ],
)
def test_locations_that_may_share_rows(a, b, shared):
    assert may_share(a, b) is may_share(b, a) is shared


def test_files_are_the_same_by_whatever_name(tmp_path, monkeypatch):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("x")
    (tmp_path / "link.txt").symlink_to(tmp_path / "b.txt")
    monkeypatch.chdir(tmp_path)
    assert may_share("./a.txt", str(tmp_path / "a.txt")) and may_share("link.txt", "b.txt")
    assert may_share("*.txt[:10%]", "b.txt[90%:]"), "slices of other sets of files cannot be compared"
    assert not may_share("a.txt", "b.txt")
