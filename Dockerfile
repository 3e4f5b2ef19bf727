# Two images from one file:
#   docker build --target gateway -t driftgate .           slim, without torch
#   docker build --target teacher -t driftgate-teacher .   with torch and transformers
# `make image-check` runs the gateway's steps without Docker; compose.yaml starts both with an engine.
FROM python:3.11-slim AS base
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1
WORKDIR /src
COPY pyproject.toml constraints.txt requirements.txt README.md LICENSE ./
COPY driftgate driftgate
COPY gateway gateway
COPY adapters adapters
COPY storage storage
COPY teacher teacher
RUN useradd --create-home --uid 10001 driftgate && mkdir /data && chown driftgate /data

FROM base AS gateway
# Every file by its hash (make requirements), setuptools for the build among them.
RUN pip install --require-hashes --only-binary :all: -r requirements.txt \
    && pip install --no-deps --no-build-isolation .
USER 10001
WORKDIR /data
VOLUME /data
EXPOSE 8787
# The process runs. With TLS, or on another port, give a check of your own.
HEALTHCHECK --interval=10s --timeout=3s --start-period=5s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8787/healthz', timeout=2)"]
ENTRYPOINT ["driftgate"]
# Inside a container the gateway has to listen on --host 0.0.0.0, so it needs keys: `driftgate key`.
CMD ["serve", "--help"]

# Its versions are pinned, its files are not: torch's builds differ by index.
# PIP_EXTRA_INDEX_URL chooses the build of torch (CUDA, ROCm or CPU) as it does outside of Docker.
FROM base AS teacher
ARG PIP_EXTRA_INDEX_URL
RUN pip install -c constraints.txt ".[teacher]"
USER 10001
WORKDIR /data
VOLUME /data
ENTRYPOINT ["driftgate"]
CMD ["teach", "--help"]
