# softprompt without a GPU, run by a user without rights.
#   docker build -f docker/cpu.Dockerfile -t softprompt .
#   docker run --rm softprompt demo
#   docker run --rm -v "$PWD:/work" -w /work softprompt train my.toml
#   docker build -f docker/cpu.Dockerfile --target test -t softprompt-test . && docker run --rm softprompt-test
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
    TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"
# What is installed depends on these files alone: other changes keep the large layer.
COPY --chown=1000:1000 Makefile pyproject.toml README.md LICENSE ./
COPY --chown=1000:1000 softprompt/__init__.py softprompt/__init__.py
RUN make .venv/.installed

# The tests; those of the report's page in a browser are left out without one.
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
