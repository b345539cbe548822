# syntax=docker/dockerfile:1
# erollout on CPUs. From the repository root:
#   docker build -f launch/containers/cpu.Dockerfile -t erollout:cpu .
#   docker run --rm -v "$PWD/runs:/work/runs" erollout:cpu erollout demo
FROM python:3.11-slim-bookworm AS build
# hadolint ignore=DL3008
RUN apt-get update && apt-get install --no-install-recommends -y g++ && rm -rf /var/lib/apt/lists/*
RUN python -m venv /opt/erollout
ENV PATH=/opt/erollout/bin:$PATH
# The largest layer, and one that changes of the code leave alone.
RUN pip install --no-cache-dir --index-url https://download.pytorch.org/whl/cpu torch==2.13.0
WORKDIR /source
COPY . .
# hadolint ignore=DL3013
RUN pip install --no-cache-dir ".[mlflow,modelopt,ray]" && python -c "import erollout.kernels._native_avx2"

FROM python:3.11-slim-bookworm
COPY --from=build /opt/erollout /opt/erollout
ENV PATH=/opt/erollout/bin:$PATH OMP_NUM_THREADS=1
RUN useradd --create-home --uid 10001 erollout && mkdir -p /work/runs && chown -R erollout /work
USER 10001
WORKDIR /work
CMD ["erollout", "--help"]
