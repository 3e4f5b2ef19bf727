# Two images from one file:
#   docker build --target gateway -t driftgate .           slim, without torch
#   docker build --target teacher -t driftgate-teacher .   with torch and transformers
FROM python:3.11-slim AS base
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY driftgate driftgate
COPY gateway gateway
COPY adapters adapters
COPY storage storage
COPY teacher teacher
RUN useradd --create-home driftgate && mkdir /data && chown driftgate /data

FROM base AS gateway
RUN pip install -c constraints.txt .
USER driftgate
WORKDIR /data
VOLUME /data
EXPOSE 8787
ENTRYPOINT ["driftgate"]
CMD ["serve", "--help"]

# PIP_EXTRA_INDEX_URL chooses the build of torch (CUDA, ROCm or CPU) as it does outside of Docker.
FROM base AS teacher
ARG PIP_EXTRA_INDEX_URL
RUN pip install -c constraints.txt ".[teacher]"
USER driftgate
WORKDIR /data
VOLUME /data
ENTRYPOINT ["driftgate"]
CMD ["teach", "--help"]
