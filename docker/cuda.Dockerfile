# softprompt on an NVIDIA GPU, run by a user without rights. The host brings the driver (nvidia-container-toolkit), torch the rest of CUDA.
#   docker build -f docker/cuda.Dockerfile -t softprompt-cuda .
#   docker run --rm --gpus all softprompt-cuda demo
#   docker run --rm --gpus all -v "$PWD:/work" -w /work softprompt-cuda train my.toml
#   docker build -f docker/cuda.Dockerfile --target test -t softprompt-cuda-test . && docker run --rm --gpus all softprompt-cuda-test
FROM python:3.12-slim-bookworm AS base
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends make \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 softprompt \
    && mkdir -p /src/runs /cache \
    && chown -R softprompt:softprompt /src /cache
USER 1000:1000
WORKDIR /src
ENV PIP_NO_CACHE_DIR=1 PYTHON=python3 PATH=/src/.venv/bin:$PATH SOFTPROMPT_CACHE=/cache HF_HOME=/cache/huggingface \
    TORCH=torch==2.13.0 NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
# What is installed depends on these files alone: other changes keep the large layer.
COPY --chown=1000:1000 Makefile pyproject.toml README.md LICENSE ./
COPY --chown=1000:1000 softprompt/__init__.py softprompt/__init__.py
RUN make .venv/.installed

# The tests; `test-gpu` in the place of `test` runs those that need a GPU.
FROM base AS test
RUN make install
COPY --chown=1000:1000 . .
ENTRYPOINT ["make"]
CMD ["test"]

FROM base AS run
COPY --chown=1000:1000 . .
VOLUME ["/cache", "/src/runs"]
ENTRYPOINT ["softprompt"]
CMD ["--help"]
