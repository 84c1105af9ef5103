"""Programs that are not Python packages, where a test needs the real one."""

import os
import shutil

import pytest


def program(name: str, package: str) -> str:
    """The path of a program; without it the test is skipped, with CI=true it fails.

    Args:
        name: What is run.
        package: The Debian package that has it.
    """
    path = shutil.which(name)
    if path is None:
        missing = f"no {name} on this machine; Debian has it in the package {package}"
        if os.environ.get("CI") == "true":
            pytest.fail(missing)
        pytest.skip(missing)
    return path
