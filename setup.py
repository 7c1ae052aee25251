"""The wheel: `deft_kernels` from here, `deft_diffusers` from `python/`, and csrc as native libraries where it can be built.

    DEFT_KERNELS_BUILD   none: pure Python. cpu: the CPU kernels. cuda: those and the CUDA kernels. Unset: whatever the
                         tools at hand allow; what is missing is said in a line. No GPU is needed, and none is asked for.
    CXX, NVCC            compilers, c++ and nvcc by default; "ccache c++" is fine. CXXFLAGS, NVCCFLAGS and LDFLAGS are
                         added.

csrc uses torch's stable ABI and nothing of Python's: one wheel serves every Python from 3.11 and every torch from 2.11 on.
The headers are those of the torch that is installed, so build with `pip install --no-build-isolation`. Everything else is
in pyproject.toml.
"""

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

CSRC = {
    "cpu": sorted(map(str, [*Path("csrc").glob("*.cpp"), *Path("csrc/cpu").glob("*.cpp")])),
    "cuda": sorted(map(str, Path("csrc/cuda").glob("*.cu"))),
}
HEADERS = sorted(map(str, Path("csrc").rglob("*.h")))
CXX, NVCC = os.environ.get("CXX") or "c++", os.environ.get("NVCC") or "nvcc"
STABLE_ABI = "-std=c++20 -O3 -DTORCH_TARGET_VERSION=0x020b000000000000"
FLAGS = {
    "cpu": f"{CXX} {STABLE_ABI} -ffp-contract=fast -fPIC -fvisibility=hidden -Wall",
    "cuda": f"{NVCC} {STABLE_ABI} -Xcompiler -fPIC,-fvisibility=hidden --expt-relaxed-constexpr "
    + " ".join(f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ("80", "90a", "100a"))
    + " -gencode=arch=compute_90,code=compute_90",  # PTX for every later one
}
LINK = {"cpu": f"{CXX} -shared", "cuda": f"{NVCC} -shared -cudart static"}


def compiler(command: str) -> str:
    """The compiler in a command that may begin with a cache's name and end in flags."""
    words = [word for word in shlex.split(command) if not word.startswith("-")]
    return words[1] if len(words) > 1 and Path(words[0]).name in ("ccache", "sccache", "distcc") else words[0]


def missing(kind: str) -> str | None:
    """Why csrc/<kind> cannot be built here, or None."""
    if not CSRC[kind]:
        return f"csrc/{kind} is not here"
    if importlib.util.find_spec("torch") is None:
        return "torch is not installed where the build runs (pip install --no-build-isolation)"
    for tool in ("ninja", compiler(CXX), *([compiler(NVCC)] if kind == "cuda" else [])):
        if shutil.which(tool) is None:
            return f"{tool} is not installed"
    return None


def kinds() -> list[str]:
    asked = os.environ.get("DEFT_KERNELS_BUILD", "")
    if asked not in ("", "none", "cpu", "cuda"):
        raise SystemExit(f"DEFT_KERNELS_BUILD={asked!r}: expected none, cpu or cuda")
    built = []
    for kind in {"": list(CSRC), "none": [], "cpu": ["cpu"], "cuda": ["cpu", "cuda"]}[asked]:
        if (reason := missing(kind)) is None:
            built.append(kind)
        elif asked:
            raise SystemExit(f"DEFT_KERNELS_BUILD={asked}, but {reason}")
        else:
            print(f"deft_kernels: no {kind} kernels are built: {reason}; everything works without them")
    return built


def escaped(path) -> str:
    """A path as ninja reads it."""
    return re.sub(r"([$ :])", r"$\1", str(path))


class Ninja(build_ext):
    """A library for each kind, by ninja."""

    def build_extension(self, extension: Extension) -> None:
        kind = extension.name.rpartition("_")[2]
        torch = Path(importlib.util.find_spec("torch").origin).parent
        added = {"cpu": os.environ.get("CXXFLAGS", ""), "cuda": os.environ.get("NVCCFLAGS", "")}[kind]
        flags = f"{FLAGS[kind]} {added} -isystem {shlex.quote(str(torch / 'include'))}"
        libraries = f"-L{shlex.quote(str(torch / 'lib'))} -ltorch_cpu {os.environ.get('LDFLAGS', '')}"
        target = Path(self.get_ext_fullpath(extension.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(self.build_temp).resolve() / kind
        folder.mkdir(parents=True, exist_ok=True)
        objects = {folder / f"{source.replace('/', '_')}.o": source for source in extension.sources}
        lines = [
            f"builddir = {escaped(folder)}",
            f"rule compile\n  command = {flags} -MMD -MF $out.d -c $in -o $out\n  depfile = $out.d\n  deps = gcc",
            f"rule link\n  command = {LINK[kind]} $in -o $out {libraries}",
            *(f"build {escaped(o)}: compile {escaped(source)}" for o, source in objects.items()),
            f"build {escaped(target)}: link {' '.join(map(escaped, objects))}",
        ]
        (folder / "build.ninja").write_text("\n".join(lines) + "\n")
        if subprocess.run(["ninja", "--quiet", "-f", str(folder / "build.ninja")], check=False).returncode:
            raise CompileError(f"csrc/{kind} does not compile with {FLAGS[kind].partition(' ')[0]}")


version = re.search(r'__version__ = "(.+)"', Path("deft_kernels/__init__.py").read_text())[1]
extensions = [
    # optional: where nobody asked for it, and a compiler turns out to be too old, everything works without
    Extension(
        f"deft_kernels._{kind}",
        CSRC[kind],
        depends=HEADERS,
        py_limited_api=True,
        optional=not os.environ.get("DEFT_KERNELS_BUILD"),
    )
    for kind in kinds()
]

setup(
    version=version,
    packages=find_packages(include=["deft_kernels*"]) + find_packages("python"),
    package_dir={"deft_diffusers": "python/deft_diffusers"},
    package_data={
        "deft_kernels.triton": ["configs/*.json"],
        "deft_diffusers.evaluation": ["*.json", "*.html"],
        "deft_diffusers.toyworld": ["model/**/*", "model/*", "judge/*", "encoders/*/*"],
    },
    include_package_data=False,  # what is named above, and nothing because MANIFEST.in has it in the source package
    ext_modules=extensions,
    cmdclass={"build_ext": Ninja},
    options={"bdist_wheel": {"py_limited_api": "cp311"}} if extensions else {},
)
