"""An entry of `config.losses` that names teachers: its options, those of each teacher, and the method they make."""

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from jaxlm.core import Method, call, lookup, nearest
from jaxlm.methods.distill.method import distill
from jaxlm.methods.distill.teacher import CachedTeacher, DistillConfig, Teacher
from jaxlm.runner.registry import LOSSES

OF_A_TEACHER = {field.name for field in dataclasses.fields(DistillConfig)} | {"cache"}
"""Options of one teacher; beside `teachers` they are the defaults of all."""
OF_ONE_ALONE = {"teacher", "cache", "weight"}
"""Those of them that no two teachers share."""
TEMPERATURE: float = inspect.signature(DistillConfig).parameters["temperature"].default


class Teachers(Protocol):
    """Where the teachers of a run come from."""

    def teacher(
        self, directory: str | None, cache: Mapping[str, Any] | None, temperature: float
    ) -> Teacher | CachedTeacher:
        """The teacher in a directory, or the one whose answers are in a cache."""

    def placed(self, config: DistillConfig) -> DistillConfig:
        """The same with its teacher where the run needs it."""

    @property
    def sampler(self) -> Callable[..., Any]:
        """Gives the student's sampling, of the options of `on_policy`."""


def distillation(entry: Mapping[str, Any], teachers: Teachers) -> Method:
    """An entry of `config.losses` that names teachers, as a method."""
    what = f"config.losses: {entry['name']}"
    shared, by_teacher = split_options(entry, what)
    check_options(shared, by_teacher, what)
    configs = []
    for options in by_teacher:
        rest = {key: value for key, value in options.items() if key not in ("teacher", "cache")}
        teacher = teachers.teacher(options.get("teacher"), options.get("cache"), rest.get("temperature", TEMPERATURE))
        configs.append(teachers.placed(call(DistillConfig, rest, what, teacher=teacher)))
    if shared.get("on_policy") is not None:
        shared["on_policy"] = call(teachers.sampler, shared["on_policy"], f"{what}: on_policy")
    return call(distill, shared, what, configs)


def check_options(shared: Mapping[str, Any], by_teacher: Sequence[Mapping[str, Any]], what: str) -> None:
    """Says what is wrong with the options before a teacher is loaded, or asked for a cache."""
    configs = []
    for options in by_teacher:
        rest = {key: value for key, value in options.items() if key not in ("teacher", "cache")}
        nobody: Teacher | CachedTeacher = Teacher(lambda *_: {}, {}, 1, 1)
        if options.get("cache") is not None:
            nobody = CachedTeacher("", (1.0, rest.get("temperature", TEMPERATURE)), 1)
        configs.append(call(DistillConfig, rest, what, teacher=nobody))
    call(distill, shared, what, configs)


def split_options(entry: Mapping[str, Any], what: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The options of the method, and those of each of its teachers.

    >>> split_options(
    ...     {"name": "distill", "alpha": 0.7, "hidden": 1.0, "teachers": ({"teacher": "a"}, {"teacher": "b"})}, ""
    ... )
    ({'alpha': 0.7}, [{'hidden': 1.0, 'teacher': 'a'}, {'hidden': 1.0, 'teacher': 'b'}])
    """
    of_method = inspect.signature(distill).parameters.keys() - {"configs"}
    for options in (entry, *entry.get("teachers", ())):
        known = OF_A_TEACHER | (of_method | {"name", "teachers"} if options is entry else set())
        for key in options:
            if key not in known:
                raise ValueError(f"{what} has no option {key!r}; {nearest(key, known - {'name'})}")
    defaults = {key: value for key, value in entry.items() if key in OF_A_TEACHER}
    if "teachers" not in entry:
        by_teacher = [defaults]
    else:
        if both := sorted(OF_ONE_ALONE & defaults.keys()):
            raise ValueError(
                f"{what}: {', '.join(both)} beside teachers; write it in the entry of the teacher it is of"
            )
        by_teacher = [{**defaults, **options} for options in entry["teachers"]]
    for options in by_teacher:
        if not (options.get("teacher") or options.get("cache")):
            raise ValueError(f"{what} needs a teacher: a model directory, a stage, or a cache of its answers")
    return {key: value for key, value in entry.items() if key in of_method}, by_teacher


def has_teachers(entry: Mapping[str, Any]) -> bool:
    """Whether an entry of `config.losses` is one that learns from teachers."""
    return lookup(LOSSES, entry.get("name", ""), "entry of config.losses") is distill


def teachers_in(entries: Sequence[Mapping[str, Any]]) -> list[str]:
    """The place of every teacher in entries of `config.losses`."""
    places: list[str] = []
    for entry in entries:
        places += [entry["teacher"]] if entry.get("teacher") else teachers_in(entry.get("teachers", ()))
    return places


def map_teachers(entries: Sequence[Mapping[str, Any]], change: Callable[[str], str]) -> tuple[dict[str, Any], ...]:
    """Entries of `config.losses` with the place of every teacher changed: the name of a stage to its directory, say.

    >>> map_teachers([{"name": "distill", "teachers": [{"teacher": "a"}, {"teacher": "b"}]}], str.upper)
    ({'name': 'distill', 'teachers': ({'teacher': 'A'}, {'teacher': 'B'})},)
    """
    changed = []
    for entry in entries:
        new = dict(entry)
        if new.get("teacher"):
            new["teacher"] = change(new["teacher"])
        if "teachers" in new:
            new["teachers"] = map_teachers(new["teachers"], change)
        changed.append(new)
    return tuple(changed)
