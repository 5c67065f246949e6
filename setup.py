"""Maps the four code folders at the top of the repository into the one package `seqbench`."""

from setuptools import find_namespace_packages, setup

FOLDERS = ("suite", "tasks", "models", "kernels")

setup(
    package_dir={f"seqbench.{name}": name for name in FOLDERS},
    packages=[
        f"seqbench.{package}"
        for name in FOLDERS
        for package in find_namespace_packages(".", include=[name, f"{name}.*"])
    ],
    package_data={
        "": [
            "py.typed",
            "*.cpp",
            "*.h",
            "*.md",
            "*.gz",
            "*.flac",
            "*.ogg",
            "*.json",
            "*.html",
            "*.csv",
        ]
    },
)
