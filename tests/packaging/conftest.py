"""The package as strangers get it: built, and installed into an environment that has never seen this checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 80.0


@dataclass(frozen=True)
class Installed:
    """An environment with the wheel in it, and the two files it came from."""

    folder: Path
    sdist: Path
    wheel: Path

    @property
    def python(self) -> Path:
        """Its interpreter."""
        return self.folder / "bin" / "python"

    def run(self, *words: str | Path, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
        """A command of this environment, with nothing of the checkout in reach."""
        hidden = ("PYTHONPATH", "MYPYPATH", "VIRTUAL_ENV")
        environment = {name: value for name, value in os.environ.items() if name not in hidden}
        return subprocess.run(
            [str(word) for word in words],
            cwd=cwd,
            env=environment | variables,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            timeout=LIMIT_S,
            check=False,
        )


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """Built as a release is, sdist first and the wheel from that, and the wheel installed.

    What the package depends on, torch above all, is borrowed from the environment that runs the tests: its folder is on
    the path, but not its ``.pth`` files, by which an editable install of the checkout would come along.
    """
    folder = tmp_path_factory.mktemp("distribution")
    must(sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder / "dist"), str(ROOT))
    (sdist,) = (folder / "dist").glob("*.tar.gz")
    (wheel,) = (folder / "dist").glob("*.whl")
    made = Installed(folder / "env", sdist, wheel)
    venv.create(made.folder, symlinks=True)
    here = sysconfig.get_path("purelib")
    there = must(str(made.python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    Path(there, "borrowed.pth").write_text(f"{here}\n")
    pip = (sys.executable, "-m", "pip", "--python", str(made.python), "--disable-pip-version-check")
    must(*pip, "install", "--quiet", "--no-index", "--no-deps", "--ignore-installed", str(wheel))
    return made


def must(*command: str) -> str:
    """Run what has to succeed; its output."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout
