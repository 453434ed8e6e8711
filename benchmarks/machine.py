"""What a benchmark says of the machine that ran it."""

import importlib.metadata
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from noetherflow import _versions


def environment(packages: Iterable[str]) -> dict[str, Any]:
    """Name and number of processors, and versions; a package that is not installed has no version."""
    processor = "unknown"
    if (info := Path("/proc/cpuinfo")).exists():
        lines = info.read_text().splitlines()
        processor = next((line.split(":")[1].strip() for line in lines if "model name" in line), processor)
    versions = _versions.versions()
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            print(f"{package} is not installed: its methods are left out (make bench installs it)", flush=True)
    return {"versions": versions, "processor": processor, "processors": processors()}


def processors() -> int:
    """The number of processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
