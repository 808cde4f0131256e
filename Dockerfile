# One image for every role: SuperLink, ServerApp, SuperNode with its ClientApp, proxy, command line.
#
#   docker build -t mh-pfedhn .                                   runs on CPU and CUDA (PyPI's torch)
#   docker build -t mh-pfedhn \
#     --build-arg TORCH_INDEX=URL .    an index of CPU builds: gigabytes smaller
#
# Wheels that lie in the folder wheels/ win over the index: for builds without internet, or to pin
# a torch build (--build-arg TORCH="torch==2.13.0+cpu").

# Pin the base by its digest where builds have to be repeated to the byte:
#   docker build --build-arg BASE=python:3.11-slim-bookworm@sha256:... .
ARG BASE=python:3.11-slim-bookworm

# What pyproject.toml asks for, alone: its other tables change often, and must not install anew.
FROM ${BASE} AS wanted
COPY docker/requirements.py pyproject.toml /tmp/
RUN python3 /tmp/requirements.py /tmp/pyproject.toml > /requirements.txt

FROM ${BASE} AS build
RUN python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
# torch first: the largest layer, and the one that changes least. wheel[s]: the folder may be missing.
COPY docker/requirements.py wheel[s]/*.whl /tmp/wheels/
ARG TORCH_INDEX=""
ARG TORCH="torch>=2.6"
RUN pip install ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} --find-links /tmp/wheels "$TORCH"
COPY --from=wanted /requirements.txt /tmp/
RUN pip install -r /tmp/requirements.txt hatchling editables

FROM ${BASE}
RUN apt-get update \
 && apt-get install -y --no-install-recommends nginx-light libnginx-mod-stream tini \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --create-home --uid 10001 app \
 && install -d -o app -g app /state /runs /flwr /certs \
      /certs/ca /certs/server /certs/host /certs/gateway /certs/operator \
      /certs/site-a /certs/site-b /certs/site-c
COPY --from=build /opt/venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1
# The checkout itself: `flwr run /app` ships it to the federation, `mh-pfedhn` runs from it.
WORKDIR /app
COPY pyproject.toml README.md ./
COPY common common
COPY client_app client_app
COPY server_app server_app
COPY experiments experiments
RUN pip install --no-cache-dir --no-deps --no-build-isolation --editable .
COPY docker/ /opt/docker/
COPY --chown=app:app docker/flwr.toml /flwr/config.toml

USER app
ENV FLWR_HOME=/flwr FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1 \
    FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION=1 FLWR_SUPEREXEC_TASK_POLL_INTERVAL=0.2 \
    HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1
ENTRYPOINT ["tini", "--"]
CMD ["mh-pfedhn", "--help"]
