# Two images from one file:
#   docker build --target gateway -t driftgate .           slim, without torch
#   docker build --target teacher -t driftgate-teacher .   with torch and transformers
FROM python:3.11-slim AS base
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1
WORKDIR /src
COPY pyproject.toml constraints.txt requirements.txt README.md LICENSE ./
COPY driftgate driftgate
COPY gateway gateway
COPY adapters adapters
COPY storage storage
COPY teacher teacher
RUN useradd --create-home driftgate && mkdir /data && chown driftgate /data

FROM base AS gateway
# Every file by its hash (make requirements), setuptools for the build among them.
RUN pip install --require-hashes --only-binary :all: -r requirements.txt \
    && pip install --no-deps --no-build-isolation .
USER driftgate
WORKDIR /data
VOLUME /data
EXPOSE 8787
ENTRYPOINT ["driftgate"]
# Inside a container the gateway has to listen on --host 0.0.0.0, so it needs keys: `driftgate key`.
CMD ["serve", "--help"]

# Its versions are pinned, its files are not: torch's builds differ by index.
# PIP_EXTRA_INDEX_URL chooses the build of torch (CUDA, ROCm or CPU) as it does outside of Docker.
FROM base AS teacher
ARG PIP_EXTRA_INDEX_URL
RUN pip install -c constraints.txt ".[teacher]"
USER driftgate
WORKDIR /data
VOLUME /data
ENTRYPOINT ["driftgate"]
CMD ["teach", "--help"]
