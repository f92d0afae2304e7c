"""`config.losses`: teachers from directories or caches, what is learned from each, and the student's own texts."""

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.experimental import multihost_utils

from jaxlm.core import Method, Tree, call
from jaxlm.core.strict_json import digest
from jaxlm.data.loader import Batches
from jaxlm.generate.decoding import check_sampling, generate
from jaxlm.io.pretrained import LM, end_ids, load
from jaxlm.losses.soft_targets import top_answers
from jaxlm.methods.distill.on_policy import on_policy
from jaxlm.methods.distill.teacher import CachedTeacher, Lesson, Teacher
from jaxlm.methods.distill.teacher_cache import Cache, CacheSettings, Layout, write_cache
from jaxlm.models.network import Network
from jaxlm.parallel.batches import gather_to_host, to_devices
from jaxlm.runner import registry
from jaxlm.runner.artifacts import params_sha256
from jaxlm.runner.distillation import distillation, has_teachers
from jaxlm.runner.run_setup import Setting, on_mesh, operate, set_up
from jaxlm.runner.sharded_step import tap_breaks
from jaxlm.tasks.encode import batches_of


class DistillationLosses(NamedTuple):
    """`config.losses` as methods, the batches with cached teachers' answers, and what `result.json` says of these."""

    methods: list[tuple[str, Method]]
    batches: Batches
    facts: dict[str, Any]


def training_batches(setting: Setting) -> tuple[Batches, int]:
    """The batches of a run, without what teachers add, and how many steps it takes."""
    training = setting.training
    batches = batches_of(
        setting.model.config,
        setting.task,
        setting.splits["train"],
        setting.tokenizer,
        setting.data,
        training.batch_size,
        setting.config["seed"],
    )
    return batches, training.steps or max(1, math.ceil(training.epochs * batches.steps_per_epoch))


def cache_teachers(config: Any) -> list[dict[str, Any]]:
    """Writes the caches of a config that are not there yet, and says what is on disk of each."""
    setting = operate(set_up(config, splits=("train",)))
    found = losses_of(setting, *training_batches(setting)).facts
    if not found:
        raise ValueError('no teacher in config.losses has a cache; give one {"cache": {"directory": …}}')
    return found["teacher_caches"]


def losses_of(
    setting: Setting, batches: Batches, steps: int, info: Callable[[str], None] = print
) -> DistillationLosses:
    """The losses of a run of `steps` over `batches`.

    A teacher with a `cache` is asked once, by the first run that finds none, about all that the run will see; then, and
    in every later run, its answers come with the batches and it is in no memory.
    """
    school = TeacherPool(setting, batches, steps, info)
    methods = []
    entries = setting.config["losses"]
    if setting.data.unlabelled and not any(map(has_teachers, entries)):
        raise ValueError(
            "config.data.unlabelled: nobody says anything of texts without labels; give config.losses a teacher, or "
            "leave them out (in a pipeline: name them in the stage that has a teacher)"
        )
    for entry in entries:
        if has_teachers(entry):
            methods.append((entry["name"], distillation(entry, school.teacher, school.place, school.writing)))
        else:
            methods.append((entry["name"], registry.make(registry.LOSSES, entry, "losses")))
    return DistillationLosses(methods, school.batches, {"teacher_caches": school.caches} if school.caches else {})


class TeacherPool:
    """Where a run's teachers come from.

    Attributes:
      batches: with the columns of the cached teachers so far.
      caches: what is on disk of each of them.
    """

    def __init__(self, setting: Setting, batches: Batches, steps: int, info: Callable[[str], None]):
        self.setting, self.batches, self.steps, self.info = setting, batches, steps, info
        self.caches: list[dict[str, Any]] = []
        self._asked = batches
        self._models: dict[str, LM] = {}

    def teacher(
        self, directory: str | None, cache: Mapping[str, Any] | None, temperature: float
    ) -> Teacher | CachedTeacher:
        """A teacher that is here, its parameters in the canonical view; or one whose answers are."""
        if cache is not None:
            settings = call(CacheSettings, cache, "config.losses: cache")
            return self.cached(directory, settings, temperature)
        assert directory, "an entry without a cache names a teacher"
        lm = self.model(directory)
        return Teacher(
            forward_of(lm, self.setting),
            lm.params,
            lm.config.num_layers,
            lm.config.hidden_size,
            shared_classes(lm, self.setting),
        )

    def model(self, directory: str) -> LM:
        """A model directory that can teach the run's student."""
        if directory not in self._models:
            self._models[directory] = load(directory)
            check_teacher(self._models[directory], directory, self.setting)
        return self._models[directory]

    def place(self, lesson: Lesson) -> Lesson:
        """The lesson with its teacher on the mesh: layers stacked, but where one of them is looked into."""
        if isinstance(lesson.teacher, CachedTeacher):
            return lesson
        lm = next(lm for lm in self._models.values() if lm.params is lesson.teacher.params)
        model = Network(lm.config)
        taps = lesson.plan(self.setting.model.config.num_layers).taps(side=1)
        params = on_mesh(self.setting, model, model.run_view(lm.params, breaks=tap_breaks(taps, model)), lm.axes)
        return dataclasses.replace(lesson, teacher=lesson.teacher._replace(params=params))

    def cached(self, directory: str | None, settings: CacheSettings, temperature: float) -> CachedTeacher:
        """The cache of a teacher's answers, written if there is none; its columns join the batches."""
        place, setting = Path(settings.directory), self.setting
        lm = self.model(directory) if directory else None
        made_of = fingerprint(setting, lm)
        if lm is not None and not (place / "cache.json").exists():
            classes = lm.config.num_labels or shared_classes(lm, setting) or lm.config.vocab_size
            temperatures = tuple(dict.fromkeys((1.0, float(temperature), *map(float, settings.temperatures))))
            layout = Layout(min(settings.top_k, classes), temperatures, settings.dtype, classes)
            self.write(place, made_of, layout, lm)
        cache = Cache(place)
        cache.refuse_other(made_of)
        layout = cache.layout
        if (layout.top_k, layout.dtype) != (min(settings.top_k, layout.classes), settings.dtype):
            raise ValueError(
                f"the cache {place} holds {layout.top_k} answers a position in {layout.dtype}, the config asks for "
                f"{settings.top_k} in {settings.dtype}; set top_k and dtype to what it holds, or name another directory"
            )
        outputs = setting.model.config.num_labels or setting.model.config.vocab_size
        if layout.classes > outputs:
            raise ValueError(
                f"the cache {place} holds answers among {layout.classes}, the student has {outputs} outputs"
            )
        cache.check(self._asked, self.steps)
        name = f"teacher_{len(self.caches)}"
        self.batches = cache.attach(self.batches, name)
        self.caches.append({"directory": str(place), **cache.facts})
        return CachedTeacher(name, layout.temperatures, layout.classes)

    def write(self, place: Path, made_of: Mapping[str, Any], layout: Layout, lm: LM) -> None:
        """Asks a teacher about every row of the run."""
        setting = self.setting
        forward, model, to_device = forward_of(lm, setting), Network(lm.config), to_devices(setting.mesh, setting.rules)
        params = on_mesh(setting, model, model.run_view(lm.params), lm.axes)

        @jax.jit
        def ask(params: Tree, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
            logits = forward(params, batch, frozenset())["logits"]
            return top_answers(logits[..., : layout.classes], layout.top_k, layout.temperatures)

        def answer(batch: dict[str, Any]) -> dict[str, Any]:
            return gather_to_host(ask(params, to_device(batch)[1]))

        self.info(f"{place}: asking the teacher for its {layout.top_k} best answers, in {self.steps} steps")
        made_for = {
            "steps": self.steps,
            "seed": setting.config["seed"],
            "batch_size": setting.training.batch_size,
        }
        write_cache(place, made_of, layout, self._asked, made_for, answer, writes=jax.process_index() == 0)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(f"cache {place}")
        facts = Cache(place).facts
        self.info(f"{place}: {facts['tokens']} answers, {facts['bytes_per_token']:.1f} bytes each")

    def writing(
        self,
        *,
        prompt: int = 16,
        share: float = 1.0,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
    ) -> Callable[..., Any]:
        """The student's sampling: see `losses.on_policy.on_policy` and `models.generate.sample`."""
        setting, config = self.setting, self.setting.model.config
        if config.head not in ("causal", "seq2seq"):
            raise ValueError(f"on_policy: a model with the head {config.head!r} writes no text; leave on_policy out")
        check_sampling(temperature, top_k, top_p)
        ends = end_ids(setting.carried, setting.tokenizer, config.vocab_size)

        def sample(params: Tree, prompts: dict[str, jax.Array], key: jax.Array, new_tokens: int) -> jax.Array:
            return generate(
                config,
                params,
                prompts,
                key,
                new_tokens=new_tokens,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                stop=ends,
                dtype=setting.dtype,
            )

        return on_policy(sample, ends=ends, encoder_decoder=config.encoder_decoder, prompt=prompt, share=share)


def forward_of(lm: LM, setting: Setting) -> Callable[..., dict[str, Any]]:
    """`(params, batch, taps) -> outputs`, deterministic, on the run's mesh and in its dtype."""
    model, ctx, dtype = Network(lm.config), setting.ctx, setting.dtype

    def forward(params: Tree, batch: Mapping[str, jax.Array], taps) -> dict[str, Any]:
        return model.forward(params, batch, ctx=ctx, taps=taps, dtype=dtype)

    return forward


def shared_classes(lm: LM, setting: Setting) -> int | None:
    """How many outputs are compared where the tables of tokens differ in length, else `None`."""
    own, other = setting.model.config.vocab_size, lm.config.vocab_size
    return min(own, other) if own != other and not lm.config.num_labels else None


def check_teacher(lm: LM, directory: str, setting: Setting) -> None:
    """Raises ValueError for a teacher whose outputs cannot be compared with the student's one by one."""
    for name in ("head", "labels", "regression"):
        own, other = getattr(setting.model.config, name), getattr(lm.config, name)
        if own != other:
            raise ValueError(
                f"teacher {directory} has {name} {other!r}, the student {own!r}; distillation compares their outputs "
                f"one by one, so choose a teacher of the same task, tokenizer and labels"
            )
    if lm.tokenizer is not None and lm.tokenizer.get_vocab() != setting.tokenizer.get_vocab():
        raise ValueError(
            f"teacher {directory} has another tokenizer; distillation compares token by token, so choose a teacher of "
            f"the same tokenizer, or set config.data.tokenizer to the teacher's"
        )
    if lm.config.vocab_size < len(setting.tokenizer):
        raise ValueError(
            f"teacher {directory} knows {lm.config.vocab_size} tokens, the tokenizer has {len(setting.tokenizer)}; "
            "choose a teacher of the same tokenizer"
        )
    if lm.config.max_positions and setting.data.max_length > lm.config.max_positions:
        raise ValueError(
            f"teacher {directory} reads {lm.config.max_positions} tokens at most, but config.data.max_length = "
            f"{setting.data.max_length}; shorten the rows"
        )


def fingerprint(setting: Setting, lm: LM | None) -> dict[str, Any]:
    """What the answers of a teacher depend on; without the teacher, what the data and their form say."""
    found = {
        "data": setting.splits["train"].examples.fingerprint(),
        "packing": {
            "task": setting.config["task"],
            "max_length": setting.data.max_length,
            "pack": setting.data.pack,
        },
        "tokenizer": digest(json.loads(setting.tokenizer.backend_tokenizer.to_str())),
        "labels": list(setting.model.config.labels),
    }
    return found if lm is None else found | {"teacher": params_sha256(lm.params)}
