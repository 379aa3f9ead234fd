"""What pyproject.toml cannot say: packages in three source roots, recipes/ as quantkit._recipes, the CPU kernels.

The kernels are one plain C library bound with ctypes, so the wheel is good for every Python 3. Without a C++
compiler the installation goes on without them. QUANTKIT_WERROR=1 makes their warnings and a failed build errors (CI).
`python setup.py build_ext --inplace` builds the library beside its sources.
"""

import hashlib
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from glob import glob

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

LIBRARY = "quantkit_kernels.cpu._quantkit_cpu"
# No contraction: every instruction set gives the same bits. No errno and traps: loops with rounding vectorize.
FLAGS = ["-std=c++17", "-O3", "-fopenmp", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-g0"]

STRICT = bool(os.environ.get("QUANTKIT_WERROR"))

package_dir = {"quantkit._recipes": "recipes"}
packages = ["quantkit._recipes"]
for root, include in ((".", "quantkit"), ("kernels", "quantkit_kernels"), ("eval", "quantkit_eval")):
    found = find_packages(root, include=[include, f"{include}.*"])
    packages += found
    package_dir[include] = f"{root}/{include}".removeprefix("./")


class BuildLibrary(build_ext):
    """A shared library named without the Python's version, sources compiled side by side, failure allowed."""

    def get_ext_filename(self, fullname):
        return os.path.join(*fullname.split(".")) + ".so"

    def get_export_symbols(self, ext):
        return ext.export_symbols

    def build_extension(self, ext):
        compile_one = self.compiler.compile

        def compile_all(sources, *args, **kwargs):
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                objects = list(pool.map(lambda source: compile_one([source], *args, **kwargs), sources))
            return [name for one in objects for name in one]

        self.compiler.compile = compile_all
        try:
            super().build_extension(ext)
        except Exception as error:
            if STRICT:
                raise
            print(
                f"quantkit: the native CPU kernels were not built ({error}); the CPU runs PyTorch's own ops or "
                "the reference. Install a C++17 compiler with OpenMP and install again to get them.",
                file=sys.stderr,
            )


class PlainWheel(bdist_wheel):
    """py3-none: the library knows nothing of Python."""

    def finalize_options(self):
        super().finalize_options()
        self.root_is_pure = False

    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


sources = sorted(glob("kernels/quantkit_kernels/cpu/*.cpp"))
headers = sorted(glob("kernels/quantkit_kernels/cpu/*.h"))
# As `sources_digest` in quantkit_kernels/cpu/library.py, which refuses a library of other sources.
digest = hashlib.sha256()
for name in sorted([*sources, *headers], key=os.path.basename):
    with open(name, "rb") as file:
        digest.update(file.read())

warnings = ["-Wall", "-Wextra", "-Werror"] if STRICT else ["-w"]
library = Extension(
    LIBRARY,
    sources=sources,
    depends=headers,
    language="c++",
    define_macros=[("QK_SOURCES", f'"{digest.hexdigest()[:16]}"')],
    extra_compile_args=[*FLAGS, *warnings],
    extra_link_args=["-fopenmp"],
)

setup(
    packages=packages,
    package_dir=package_dir,
    ext_modules=[library],
    cmdclass={"build_ext": BuildLibrary, "bdist_wheel": PlainWheel},
)
