from setuptools import find_packages, setup

setup(
    name="erollout",
    version="0.1.0",
    description="RL post-training on Megatron-core with fast rollouts that don't change what is sampled",
    license="Apache-2.0",
    python_requires=">=3.11,<3.13",
    # launch/ and megatron_patches/ stand at the top of the tree and install inside the package, under no common name.
    packages=[
        *find_packages(include=["erollout", "erollout.*"]),
        "erollout.launch",
        "erollout.megatron_patches",
    ],
    package_dir={"erollout.launch": "launch", "erollout.megatron_patches": "megatron_patches"},
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
        "jinja2>=3.1",  # chat templates
    ],
    extras_require={
        # importing megatron.core with the bare transformer-engine package raises: only with its CUDA parts
        "gpu": ["transformer-engine[core_cu13,pytorch]==2.11.0", "nvidia-ml-py>=13"],
        "mlflow": ["mlflow==3.17.2", "matplotlib>=3.9"],  # server, pages and figures
        "modelopt": ["nvidia-modelopt==0.47.0", "requests"],
        "deepspeed": ["deepspeed==0.19.8"],
        "ray": ["ray==2.60.0"],
        "dev": [
            "pytest>=8.3",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.6",
            "hypothesis>=6.115",
            "ruff>=0.8",
            "mypy>=1.13",
            "types-PyYAML",
        ],
        "benchmark": ["gguf>=0.17"],
        "openvino": ["openvino-genai==2026.4.1"],  # the strongest CPU peer, for benchmarks/decode.py
    },
    entry_points={"console_scripts": ["erollout=erollout.cli:main"]},
)
