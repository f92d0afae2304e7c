"""`config.losses`: teachers from directories or caches, what is learned from each, and the student's own texts."""

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.experimental import multihost_utils

from jaxlm.core import Batch, Method, Tree, call
from jaxlm.core.strict_json import digest
from jaxlm.data.loader import Batches
from jaxlm.generate.decoding import check_sampling, generate
from jaxlm.io.fingerprint import params_sha256
from jaxlm.io.lm import LM
from jaxlm.io.pretrained import load
from jaxlm.losses.soft_targets import top_answers
from jaxlm.methods.distill.on_policy import on_policy
from jaxlm.methods.distill.teacher import CachedTeacher, DistillConfig, Teacher
from jaxlm.methods.distill.teacher_cache import Cache, CacheSettings, Layout, write_cache
from jaxlm.models.heads import HEADS
from jaxlm.parallel.batches import gather_to_host, to_devices
from jaxlm.runner import registry
from jaxlm.runner.distillation import Teachers, distillation, has_teachers
from jaxlm.runner.run_setup import RunSetup, apply_surgery, on_mesh, prepare_run
from jaxlm.tasks.encode import batches_of


class DistillationLosses(NamedTuple):
    """`config.losses` as methods, the batches with cached teachers' answers, and what `result.json` says of these."""

    methods: list[tuple[str, Method]]
    batches: Batches
    facts: dict[str, Any]


def training_batches(setup: RunSetup) -> tuple[Batches, int]:
    """The batches of a run, without what teachers add, and how many steps it takes."""
    training = setup.training
    batches = batches_of(
        setup.lm.config,
        setup.task,
        setup.splits["train"],
        setup.lm.tokenizer,
        setup.data,
        training.batch_size,
        setup.config["seed"],
    )
    return batches, training.steps or max(1, math.ceil(training.epochs * batches.steps_per_epoch))


def cache_teachers(config: Any) -> list[dict[str, Any]]:
    """Writes the caches of a config that are not there yet, and says what is on disk of each."""
    setup = apply_surgery(prepare_run(config, splits=("train",)))
    facts = distillation_losses(setup, *training_batches(setup)).facts
    if not facts:
        raise ValueError('no teacher in config.losses has a cache; give one {"cache": {"directory": …}}')
    return facts["teacher_caches"]


def distillation_losses(
    setup: RunSetup, batches: Batches, steps: int, info: Callable[[str], None] = print
) -> DistillationLosses:
    """The losses of a run of `steps` over `batches`.

    A teacher with a `cache` is asked once, by the first run that finds none, about all that the run will see; then, and
    in every later run, its answers come with the batches and it is in no memory.
    """
    entries = setup.config["losses"]
    if setup.data.unlabelled and not any(map(has_teachers, entries)):
        raise ValueError(
            "config.data.unlabelled: unlabelled data are for distillation, and no entry of config.losses has a "
            "teacher; give it one, or leave them out (in a pipeline: name them in the stage that has a teacher)"
        )
    teachers = CachingTeacherPool(setup, batches, steps, info)
    methods = loss_methods(entries, teachers)
    return DistillationLosses(methods, teachers.batches, {"teacher_caches": teachers.caches} if teachers.caches else {})


def loss_methods(entries: Any, teachers: Teachers) -> list[tuple[str, Method]]:
    """The entries of `config.losses` as named methods."""
    return [
        (entry["name"], distillation(entry, teachers))
        if has_teachers(entry)
        else (entry["name"], registry.make(registry.LOSSES, entry, "losses"))
        for entry in entries
    ]


class TeacherPool:
    """The teachers of a run, from model directories; those of one directory are one. Shapes do as well as arrays.

    Args:
      load: `directory -> LM`.
    """

    def __init__(self, setup: RunSetup, load: Callable[[str], LM]):
        self.setup, self.load = setup, load
        self._models: dict[str, LM] = {}

    def teacher(
        self, directory: str | None, cache: Mapping[str, Any] | None, temperature: float
    ) -> Teacher | CachedTeacher:
        """A teacher that is here, its parameters in the canonical view.

        Raises:
          ValueError: for one whose answers are in a cache.
        """
        if cache is not None or directory is None:
            raise ValueError("config.losses: a teacher's cache is read with the data; leave the cache out here")
        lm = self.model(directory)
        return Teacher(
            forward_of(lm, self.setup),
            lm.params,
            lm.config.num_layers,
            lm.config.hidden_size,
            shared_classes(lm, self.setup),
        )

    def model(self, directory: str) -> LM:
        """A model directory that can teach the run's student."""
        if directory not in self._models:
            self._models[directory] = self.load(directory)
            check_teacher(self._models[directory], directory, self.setup)
        return self._models[directory]

    def placed(self, config: DistillConfig) -> DistillConfig:
        """The config with its teacher on the mesh: layers stacked, but where one of them is looked into."""
        if isinstance(config.teacher, CachedTeacher):
            return config
        lm = next(lm for lm in self._models.values() if lm.params is config.teacher.params)
        taps = config.pairing(self.setup.lm.config.num_layers).taps(side=1)
        params = on_mesh(self.setup, lm, breaks=lm.network.tap_breaks(taps))
        return dataclasses.replace(config, teacher=config.teacher._replace(params=params))

    @property
    def sampler(self) -> Callable[..., Any]:
        """Raises ValueError: what a student writes needs its parameters."""
        raise ValueError("config.losses: what a student writes is not known from shapes; leave on_policy out here")


class CachingTeacherPool(TeacherPool):
    """The teachers of a run that has data: also from caches of their answers, which are written where there are none.

    Attributes:
      batches: with the columns of the cached teachers so far.
      caches: what is on disk of each of them.
    """

    def __init__(self, setup: RunSetup, batches: Batches, steps: int, info: Callable[[str], None]):
        super().__init__(setup, load)
        self.batches, self.steps, self.info = batches, steps, info
        self.caches: list[dict[str, Any]] = []
        self._data_batches = batches

    def teacher(
        self, directory: str | None, cache: Mapping[str, Any] | None, temperature: float
    ) -> Teacher | CachedTeacher:
        """A teacher that is here, or one whose answers are."""
        if cache is None:
            return super().teacher(directory, cache, temperature)
        return self.cached(directory, call(CacheSettings, cache, "config.losses: cache"), temperature)

    def cached(self, directory: str | None, settings: CacheSettings, temperature: float) -> CachedTeacher:
        """The cache of a teacher's answers, written if there is none; its columns join the batches."""
        path, setup = Path(settings.directory), self.setup
        if setup.task.group > 1:
            raise ValueError(
                f"config.losses: cache: answers are kept by text, and a row of the task {setup.config['task']!r} has "
                f"{setup.task.group} of them; leave cache out"
            )
        lm = self.model(directory) if directory else None
        made_of = fingerprint(setup, lm)
        if lm is not None and not (path / "cache.json").exists():
            classes = lm.config.num_labels or shared_classes(lm, setup) or lm.config.vocab_size
            temperatures = tuple(dict.fromkeys((1.0, float(temperature), *map(float, settings.temperatures))))
            self.write(path, made_of, Layout(min(settings.top_k, classes), temperatures, settings.dtype, classes), lm)
        cache = Cache(path)
        cache.check_same(made_of)
        check_layout(cache.layout, settings, setup)
        cache.check(self._data_batches, self.steps)
        name = f"teacher_{len(self.caches)}"
        self.batches = cache.attach(self.batches, name)
        self.caches.append({"directory": str(path), **cache.facts})
        return CachedTeacher(name, cache.layout.temperatures, cache.layout.classes)

    def write(self, path: Path, made_of: Mapping[str, Any], layout: Layout, lm: LM) -> None:
        """Asks a teacher about every row of the run."""
        setup = self.setup
        forward, to_device = forward_of(lm, setup), to_devices(setup.mesh, setup.rules)
        params = on_mesh(setup, lm)

        @jax.jit
        def ask(params: Tree, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
            logits = forward(params, batch, frozenset())["logits"]
            return top_answers(logits[..., : layout.classes], layout.top_k, layout.temperatures)

        def answer(batch: dict[str, Any]) -> dict[str, Any]:
            return jax.device_get(gather_to_host(ask(params, to_device(batch)[1])))

        self.info(f"{path}: asking the teacher for its {layout.top_k} best answers, in {self.steps} steps")
        made_for = {"steps": self.steps, "seed": setup.config["seed"], "batch_size": setup.training.batch_size}
        write_cache(path, made_of, layout, self._data_batches, made_for, answer, writes=jax.process_index() == 0)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(f"cache {path}")
        facts = Cache(path).facts
        self.info(f"{path}: {facts['tokens']} answers, {facts['bytes_per_token']:.1f} bytes each")

    @property
    def sampler(self) -> Callable[..., Any]:
        """Gives the student's sampling, see `student_sampling`."""
        return partial(student_sampling, self.setup)


def student_sampling(
    setup: RunSetup,
    *,
    prompt: int = 16,
    share: float = 1.0,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Callable[..., Any]:
    """`(params, batch, key) -> batch` of the student's own texts.

    Args:
      prompt, share: see `methods.distill.on_policy.on_policy`; temperature, top_k, top_p: `generate.decoding.sample`.
    """
    config, ends, dtype = setup.lm.config, setup.lm.end_ids, setup.dtype
    if not HEADS[config.head].generates:
        raise ValueError(f"on_policy: a model with the head {config.head!r} writes no text; leave on_policy out")
    check_sampling(temperature, top_k, top_p)
    options: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "stop": ends, "dtype": dtype}

    def sample(params: Tree, prompts: Batch, key: jax.Array, new_tokens: int) -> jax.Array:
        return generate(config, params, prompts, key, new_tokens=new_tokens, **options)

    return on_policy(sample, ends=ends, encoder_decoder=config.encoder_decoder, prompt=prompt, share=share)


def forward_of(lm: LM, setup: RunSetup) -> Callable[..., dict[str, Any]]:
    """`(params, batch, taps) -> outputs`, deterministic, on the run's mesh and in its dtype."""
    network, ctx, dtype = lm.network, setup.ctx, setup.dtype

    def forward(params: Tree, batch: Mapping[str, jax.Array], taps) -> dict[str, Any]:
        return network.forward(params, batch, ctx=ctx, taps=taps, dtype=dtype)

    return forward


def shared_classes(lm: LM, setup: RunSetup) -> int | None:
    """How many outputs are compared where the tables of tokens differ in length, else `None`."""
    student, teacher = setup.lm.config.vocab_size, lm.config.vocab_size
    return min(student, teacher) if student != teacher and not lm.config.num_labels else None


def check_teacher(lm: LM, directory: str, setup: RunSetup) -> None:
    """Raises ValueError for a teacher whose outputs cannot be compared with the student's one by one."""
    for name in ("head", "labels", "regression"):
        student, teacher = getattr(setup.lm.config, name), getattr(lm.config, name)
        if student != teacher:
            raise ValueError(
                f"teacher {directory} has {name} {teacher!r}, the student {student!r}; distillation compares their "
                f"outputs one by one, so choose a teacher of the same task, tokenizer and labels"
            )
    tokenizer = setup.lm.tokenizer
    if tokenizer is not None and lm.tokenizer is not None and lm.tokenizer.get_vocab() != tokenizer.get_vocab():
        raise ValueError(
            f"teacher {directory} has another tokenizer; distillation compares token by token, so choose a teacher of "
            f"the same tokenizer, or set config.data.tokenizer to the teacher's"
        )
    if tokenizer is not None and lm.config.vocab_size < len(tokenizer):
        raise ValueError(
            f"teacher {directory} knows {lm.config.vocab_size} tokens, the tokenizer has {len(tokenizer)}; "
            "choose a teacher of the same tokenizer"
        )
    if lm.config.max_positions and setup.data.max_length > lm.config.max_positions:
        raise ValueError(
            f"teacher {directory} reads {lm.config.max_positions} tokens at most, but config.data.max_length = "
            f"{setup.data.max_length}; shorten the rows"
        )


def check_layout(layout: Layout, settings: CacheSettings, setup: RunSetup) -> None:
    """Raises ValueError for a cache that holds something else than is asked for, or more than the student has."""
    path = settings.directory
    if (layout.top_k, layout.dtype) != (min(settings.top_k, layout.classes), settings.dtype):
        raise ValueError(
            f"the cache {path} holds {layout.top_k} answers a position in {layout.dtype}, the config asks for "
            f"{settings.top_k} in {settings.dtype}; set top_k and dtype to what it holds, or name another directory"
        )
    outputs = setup.lm.config.num_labels or setup.lm.config.vocab_size
    if layout.classes > outputs:
        raise ValueError(f"the cache {path} holds answers among {layout.classes}, the student has {outputs} outputs")


def fingerprint(setup: RunSetup, lm: LM | None) -> dict[str, Any]:
    """What the answers of a teacher depend on; without the teacher, what the data and their form say."""
    inputs = {
        "data": setup.splits["train"].examples.fingerprint(),
        "packing": {
            "task": setup.config["task"],
            "max_length": setup.data.max_length,
            "pack": setup.data.pack,
        },
        "tokenizer": digest(json.loads(setup.lm.tokenizer.backend_tokenizer.to_str())),
        "labels": list(setup.lm.config.labels),
    }
    return inputs if lm is None else inputs | {"teacher": params_sha256(lm.params)}
