"""Network namespaces: hosts of their own on this machine, for tests of several nodes. They need root and iproute2."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import pytest


def needs_namespaces(*commands: str) -> pytest.MarkDecorator:
    """Skips where these commands are missing, or the right to use them."""
    missing = os.geteuid() != 0 or any(shutil.which(each) is None for each in commands)
    return pytest.mark.skipif(missing, reason=f"network namespaces need root and {' and '.join(commands)} of iproute2")


def run(*command: str) -> None:
    """A command that must succeed."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"


@contextmanager
def namespaces(names: Sequence[str]) -> Iterator[None]:
    """Namespaces with a loopback of their own; gone afterwards, with all interfaces in them."""
    try:
        for name in names:
            run("ip", "netns", "add", name)
            run("ip", "-n", name, "link", "set", "lo", "up")
        yield
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)


@contextmanager
def cabled(hosts: Mapping[str, str], cable: str) -> Iterator[None]:
    """Two namespaces, name -> address, and a cable between them, called the same at both ends."""
    one, other = hosts
    with namespaces(list(hosts)):
        run("ip", "link", "add", cable, "netns", one, "type", "veth", "peer", "name", cable, "netns", other)
        for name, address in hosts.items():
            run("ip", "-n", name, "address", "add", f"{address}/24", "dev", cable)
            run("ip", "-n", name, "link", "set", cable, "up")
        yield
