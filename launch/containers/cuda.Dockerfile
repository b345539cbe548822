# syntax=docker/dockerfile:1
# erollout on NVIDIA GPUs. From the repository root:
#   docker build -f launch/containers/cuda.Dockerfile -t erollout:cuda .
#   docker run --rm --gpus all --ipc=host -v "$PWD/runs:/work/runs" erollout:cuda erollout doctor
# For Slurm, once per image (slurm/sites/gres-pyxis.yaml, slurm/sites/apptainer.yaml name the file):
#   enroot import -o /shared/images/erollout.sqsh dockerd://erollout:cuda
#   apptainer build /shared/images/erollout.sif docker-daemon://erollout:cuda
# A devel image, also to run: Triton needs a C compiler, ModelOpt's clip search nvcc.
FROM nvidia/cuda:13.0.2-cudnn-devel-ubuntu24.04
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --no-install-recommends -y g++ git ninja-build python3.12-dev python3.12-venv \
    && rm -rf /var/lib/apt/lists/*
RUN python3.12 -m venv /opt/erollout
ENV PATH=/opt/erollout/bin:$PATH
RUN pip install --no-cache-dir torch==2.13.0 setuptools==80.9.0 wheel==0.45.1 packaging==25.0
WORKDIR /source
# Transformer Engine's torch extension is compiled against the torch of this image: a quarter of an hour, so before the code.
COPY setup.py pyproject.toml ./
# hadolint ignore=DL3013
RUN MAX_JOBS=8 pip install --no-cache-dir --no-build-isolation \
    "$(sed -n 's/.*"\(transformer-engine[^"]*\)".*/\1/p' setup.py)"
COPY . .
# hadolint ignore=DL3013
RUN pip install --no-cache-dir ".[gpu,mlflow,modelopt,ray]"
ENV OMP_NUM_THREADS=1
RUN useradd --create-home --uid 10001 erollout && mkdir -p /work/runs && chown -R erollout /work
USER 10001
WORKDIR /work
CMD ["erollout", "--help"]
