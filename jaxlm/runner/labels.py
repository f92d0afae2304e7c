"""Whose classes a run learns or predicts: the config's, the model's own, its teachers', or the training data's."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from jaxlm.data.settings import DataSettings
from jaxlm.io.model_directory import open_model
from jaxlm.io.pretrained import find
from jaxlm.runner.config import plain
from jaxlm.runner.distillation import teachers_in
from jaxlm.tasks import Task
from jaxlm.tasks.classification import unnamed

Names = tuple[str, ...]


@dataclass(frozen=True)
class Classes:
    """The names of the classes that could count, of each side that has some.

    Attributes:
      model: of the model that the run starts from; config: of `config.data.labels`; teachers: of the teachers.
      read_data: reads those of the training data, which is a pass over it.
      trains: whether the run trains, so that a fresh head would become one.
      init: the model, for messages.
    """

    model: Names
    config: Names
    teachers: Names
    read_data: Callable[[], Names]
    trains: bool
    init: str

    def resolve(self, info: Callable[[str], None]) -> Names:
        """The classes in the order of the head's outputs; where they are not the model's, a fresh head is announced.

        A model's own classes win: their order is that of its outputs. Only training may give it others, and then only
        where the config asks for them, or the data have a class that it does not know; a distillation learns its
        teacher's. Without a head, the config's order counts, then the teacher's, then the data's, sorted.

        Raises:
          ValueError: for classes that nothing can be said of with this model.
        """
        if not self.model:
            return self.config or self.teachers or self.read_data()
        if unnamed(self.model):
            return self._of_numbers(info)
        wanted = self._wanted()
        if not wanted or wanted == self.model:
            return self.model
        if set(wanted) == set(self.model):
            raise ValueError(
                f"config.data.labels gives the classes of {self.init} in another order: its outputs are "
                f"{', '.join(self.model)}; leave config.data.labels out"
            )
        return self._fresh(wanted, info)

    def _wanted(self) -> Names:
        """The classes that someone wants instead of the model's own; none where the data have no further ones."""
        if self.config or self.teachers:
            return self.config or (self.teachers if set(self.teachers) != set(self.model) else ())
        names = self.read_data() if self.trains else ()
        return names if set(names) - set(self.model) else ()

    def _of_numbers(self, info: Callable[[str], None]) -> Names:
        """The classes of a head whose outputs have numbers for names, `LABEL_0`, `LABEL_1`, …"""
        names = self.config or self.teachers
        numbers = {*self.model, *map(str, range(len(self.model)))}
        if not names and self.trains:
            data = self.read_data()
            names = () if set(data) <= numbers else data
        if not names or names == self.model:
            return self.model
        if len(names) != len(self.model):
            return self._fresh(names, info)
        if not self.config:
            if not self.trains or self.teachers:
                raise ValueError(
                    f"the classes of {self.init} have no names ({', '.join(self.model[:3])}, …): say with "
                    f"config.data.labels which of {', '.join(names)} each of them is"
                )
            info(
                f"{self.init}: its classes have no names; they are taken for {', '.join(names)}, in this order. If "
                "that is not what it learned, set config.data.labels"
            )
        return names

    def _fresh(self, names: Names, info: Callable[[str], None]) -> Names:
        if not self.trains or (self.teachers and not names == self.config == self.teachers):
            whose = "the teacher" if self.teachers and not self.config else "config.data.labels"
            raise ValueError(
                f"{self.init} has the classes {', '.join(self.model)}, {whose} has {', '.join(names)}: a model is "
                "evaluated, compressed and distilled with its own classes; choose the model that has these, or begin "
                "from one without a head"
            )
        info(
            f"{self.init}: its classes are {', '.join(self.model)}, those to learn {', '.join(names)}: its head is "
            "left out, and a fresh one begins"
        )
        return names


def class_names(
    config: Any, task: Task, data: DataSettings, info: Callable[[str], None], read: Callable[[], Names] | None = None
) -> Names:
    """The classes of a run of a task that has some.

    Args:
      read: gives the classes of the training data; by default they are read.

    Raises:
      ValueError: for classes that do not go together, naming whose they are.
    """
    init = config.model.init
    by_teacher = {stored_classes(place, task) for place in teachers_in(plain(config.losses))} - {()}
    if len(by_teacher) > 1:
        raise ValueError(
            "config.losses: the teachers have different classes, or the same in another order: "
            + "; ".join(", ".join(names) for names in sorted(by_teacher))
        )
    return Classes(
        model=stored_classes(init, task) if init else (),
        config=configured_classes(data.labels),
        teachers=next(iter(by_teacher), ()),
        read_data=read or (lambda: data_classes(config, task, data)),
        trains=bool(config.train.steps or config.train.epochs),
        init=init,
    ).resolve(info)


def stored_classes(place: str, task: Task) -> Names:
    """The classes of a model directory whose head is the task's, else none."""
    stored = open_model(find(place), task.structure["head"]).config
    return stored.labels if stored.head == task.structure["head"] and not stored.regression else ()


def data_classes(config: Any, task: Task, data: DataSettings) -> Names:
    """The classes of the training data, sorted."""
    if not data.train:
        raise ValueError(
            f"{config.model.init or 'a fresh model'} has no head of the task {config.task!r} and so no classes; set "
            "config.data.train, whose classes it learns, or config.data.labels"
        )
    return task.labels(data.source("train"))


def configured_classes(labels: Sequence[Any] | None) -> Names:
    """`config.data.labels` as names.

    >>> configured_classes(("neg", "pos")), configured_classes(None)
    (('neg', 'pos'), ())

    Raises:
      ValueError: for one text instead of several, or a name that occurs twice.
    """
    if labels is None:
        return ()
    if isinstance(labels, str):
        raise ValueError(f"config.data.labels = {labels!r}: give the names one by one, ('neg', 'pos')")
    names = tuple(map(str, labels))
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice or not all(name.strip() for name in names):
        raise ValueError(f"config.data.labels: {', '.join(twice) or 'a blank name'} names no class of its own")
    return names
