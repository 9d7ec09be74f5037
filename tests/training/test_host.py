"""The allocator is changed where the CPU computes, and only there."""

import pytest

from jaxeff.training import host


@pytest.mark.parametrize("libc, changed", [("glibc", True), ("musl", False), ("", False)])
def test_freed_memory_is_kept_only_with_glibc(monkeypatch, libc, changed):
    calls = []

    class Library:
        def mallopt(self, parameter, value):
            calls.append((parameter, value))
            return 1

    monkeypatch.setattr(host.ctypes, "CDLL", lambda name: Library())
    monkeypatch.setattr(host.platform, "libc_ver", lambda: (libc, "2.36"))
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert host.keep_freed_memory() is changed
    assert len(calls) == (3 if changed else 0)


def test_the_allocator_is_left_alone_where_an_accelerator_computes(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    assert not host.keep_freed_memory()
    monkeypatch.delenv("JAX_PLATFORMS")
    monkeypatch.setattr(host.glob, "glob", lambda pattern: ["/dev/nvidia0"])
    assert not host.keep_freed_memory()
