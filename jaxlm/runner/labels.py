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
from jaxlm.tasks.task import no_labels

Names = tuple[str, ...]


@dataclass(frozen=True)
class Classes:
    """The names of the classes that could count, of each side that has some.

    Attributes:
      own: of the model that the run starts from; asked: of `config.data.labels`; taught: of the teachers.
      seen: reads those of the training data, which is a pass over it.
      trains: whether the run trains, so that a fresh head would become one.
      init: the model, for messages.
    """

    own: Names
    asked: Names
    taught: Names
    seen: Callable[[], Names]
    trains: bool
    init: str

    def resolve(self, info: Callable[[str], None]) -> Names:
        """The classes in the order of the head's outputs; where they are not `own`, the head is fresh, which is said.

        A model's own classes win: their order is that of its outputs. Only training may give it others, and then only
        where the config asks for them, or the data have a class that it does not know; a distillation learns its
        teacher's. Without a head, the config's order counts, then the teacher's, then the data's, sorted.

        Raises:
          ValueError: for classes that nothing can be said of with this model.
        """
        if not self.own:
            return self.asked or self.taught or self.seen()
        if unnamed(self.own):
            return self._of_numbers(info)
        other = self._other()
        if not other or other == self.own:
            return self.own
        if set(other) == set(self.own):
            raise ValueError(
                f"config.data.labels gives the classes of {self.init} in another order: its outputs are "
                f"{', '.join(self.own)}; leave config.data.labels out"
            )
        return self._fresh(other, info)

    def _other(self) -> Names:
        """The classes that someone wants instead of the model's own; none where the data have no further ones."""
        if self.asked or self.taught:
            return self.asked or (self.taught if set(self.taught) != set(self.own) else ())
        seen = self.seen() if self.trains else ()
        return seen if set(seen) - set(self.own) else ()

    def _of_numbers(self, info: Callable[[str], None]) -> Names:
        """The classes of a head whose outputs have numbers for names, `LABEL_0`, `LABEL_1`, …"""
        names = self.asked or self.taught
        numbers = {*self.own, *map(str, range(len(self.own)))}
        if not names and self.trains:
            seen = self.seen()
            names = () if set(seen) <= numbers else seen
        if not names or names == self.own:
            return self.own
        if len(names) != len(self.own):
            return self._fresh(names, info)
        if not self.asked:
            if not self.trains or self.taught:
                raise ValueError(
                    f"the classes of {self.init} have no names ({', '.join(self.own[:3])}, …): say with "
                    f"config.data.labels which of {', '.join(names)} each of them is"
                )
            info(
                f"{self.init}: its classes have no names; they are taken for {', '.join(names)}, in this order. If "
                "that is not what it learned, set config.data.labels"
            )
        return names

    def _fresh(self, names: Names, info: Callable[[str], None]) -> Names:
        if not self.trains or (self.taught and not names == self.asked == self.taught):
            whose = "the teacher" if self.taught and not self.asked else "config.data.labels"
            raise ValueError(
                f"{self.init} has the classes {', '.join(self.own)}, {whose} has {', '.join(names)}: a model is "
                "evaluated, compressed and distilled with its own classes; choose the model that has these, or begin "
                "from one without a head"
            )
        info(
            f"{self.init}: its classes are {', '.join(self.own)}, those to learn {', '.join(names)}: its head is left "
            "out, and a fresh one begins"
        )
        return names


def classes(config: Any, task: Task, data: DataSettings, info: Callable[[str], None]) -> Names:
    """The classes of a run, `()` for a task without any.

    Raises:
      ValueError: for classes that do not go together, naming whose they are.
    """
    if task.labels is no_labels:
        return ()
    own: Names = ()
    if config.model.init:
        own = stored_classes(config.model.init, task)
    taught = {stored_classes(place, task) for place in teachers_in(plain(config.losses))} - {()}
    if len(taught) > 1:
        raise ValueError(
            "config.losses: the teachers have different classes, or the same in another order: "
            + "; ".join(", ".join(names) for names in sorted(taught))
        )
    return Classes(
        own=own,
        asked=asked_classes(data.labels),
        taught=next(iter(taught), ()),
        seen=lambda: seen_classes(config, task, data),
        trains=bool(config.train.steps or config.train.epochs),
        init=config.model.init,
    ).resolve(info)


def stored_classes(place: str, task: Task) -> Names:
    """The classes of a model directory whose head is the task's, else none."""
    stored = open_model(find(place), task.structure["head"]).config
    return stored.labels if stored.head == task.structure["head"] and not stored.regression else ()


def seen_classes(config: Any, task: Task, data: DataSettings) -> Names:
    """The classes of the training data, sorted."""
    if not data.train:
        raise ValueError(
            f"{config.model.init or 'a fresh model'} has no head of the task {config.task!r} and so no classes; set "
            "config.data.train, whose classes it learns, or config.data.labels"
        )
    return task.labels(data.source("train"))


def asked_classes(labels: Sequence[Any] | None) -> Names:
    """`config.data.labels` as names.

    >>> asked_classes(("neg", "pos")), asked_classes(None)
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
