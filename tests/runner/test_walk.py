"""How far it is from `stage.run` to the first step: through how many files, and how often into another one."""

import sys
from pathlib import Path
from types import FrameType
from typing import Any

import jaxlm
from jaxlm.runner import stage
from jaxlm.train import loop

PACKAGE = str(Path(jaxlm.__file__).parent)
# Before the assembly line was one, a function of another file than the caller's was called 2,558 times. The files are
# data, specification, placement and step: few could be spared, and none is to be added unseen.
FILES, ENTRIES = 55, 2558 * 2 // 3


class FirstStep(BaseException):
    """The step would be compiled now."""


class Walk:
    """The files of jaxlm that are entered, and how often a function of another file than the caller's is called."""

    def __init__(self) -> None:
        self.files: dict[str, int] = {}

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        file = frame.f_code.co_filename
        if event != "call" or not file.startswith(PACKAGE) or frame.f_code.co_name == "<module>":
            return
        caller = frame.f_back
        while caller is not None and not caller.f_code.co_filename.startswith(PACKAGE):
            caller = caller.f_back
        entered = caller is None or caller.f_code.co_filename != file
        self.files[file] = self.files.get(file, 0) + entered


def test_the_walk_to_the_first_step_is_short(recipe, tmp_path, monkeypatch):
    def stop(*arguments: Any) -> Any:
        raise FirstStep

    monkeypatch.setattr(loop, "compiled", stop)
    walk, before = Walk(), sys.getprofile()
    sys.setprofile(walk)  # this thread's: how many batches are made ahead depends on time
    try:
        stage.run(recipe(), tmp_path / "run")
    except FirstStep:
        pass
    finally:
        sys.setprofile(before)
    names = sorted(str(Path(file).relative_to(PACKAGE)) for file in walk.files)
    assert len(names) <= FILES, names
    assert sum(walk.files.values()) <= ENTRIES
