"""The package takes the library of the checkout along, if it is built there (`make library`)."""

import pathlib
import shutil

import setuptools
from setuptools.command.build_py import build_py

CHECKOUT = pathlib.Path(__file__).resolve().parent.parent
LIBRARY = CHECKOUT / "build" / "libblocks.so.0"


class BuildWithLibrary(build_py):
    def run(self):
        super().run()
        if LIBRARY.exists():
            shutil.copy(LIBRARY, pathlib.Path(self.build_lib) / "blocks" / LIBRARY.name)


setuptools.setup(
    version=(CHECKOUT / "VERSION").read_text().strip(),
    packages=["blocks"],
    cmdclass={"build_py": BuildWithLibrary},
)
