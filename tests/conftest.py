"""Every test runs on eight virtual CPU devices; the flags must be set before jax is imported.

With JAXEFF_REQUIRE_ALL=1 (continuous integration, where every optional dependency is installed) a
skipped test is a failure: what is meant to be checked cannot go unchecked in silence.
"""

import os

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
flags = os.environ.get("XLA_FLAGS", "")
if "xla_force_host_platform_device_count" not in flags:
    os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count=8".strip()

# What follows imports jax.
import jax  # noqa: E402
from aot_fixtures import cuda, prepare_compilers, tpu  # noqa: E402

__all__ = ["cuda", "tpu"]

prepare_compilers()

REQUIRE_ALL = os.environ.get("JAXEFF_REQUIRE_ALL") == "1"


@pytest.fixture(scope="module", autouse=True)
def _forget_compiled_programs():
    """Drops a module's compiled programs after it: kept, they would fill gigabytes."""
    yield
    jax.clear_caches()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Turns a skip into a failure where nothing may be skipped."""
    report = yield
    if REQUIRE_ALL and report.skipped and not hasattr(report, "wasxfail"):
        reason = call.excinfo.value if call.excinfo else ""
        report.outcome = "failed"
        report.longrepr = f"skipped although JAXEFF_REQUIRE_ALL=1: {reason}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    """The same for modules skipped as a whole."""
    report = yield
    if REQUIRE_ALL and report.outcome == "skipped":
        report.outcome = "failed"
        report.longrepr = f"skipped although JAXEFF_REQUIRE_ALL=1: {report.longrepr}"
    return report
