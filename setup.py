"""What pyproject.toml cannot say: packages in three source roots, and recipes/ as quantkit._recipes."""

from setuptools import find_packages, setup

package_dir = {"quantkit._recipes": "recipes"}
packages = ["quantkit._recipes"]
for root, include in ((".", "quantkit"), ("kernels", "quantkit_kernels"), ("eval", "quantkit_eval")):
    found = find_packages(root, include=[include, f"{include}.*"])
    packages += found
    package_dir[include] = f"{root}/{include}".removeprefix("./")

setup(packages=packages, package_dir=package_dir)
