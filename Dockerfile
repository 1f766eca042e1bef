# One image for every platform.  docs/guides/containers.md explains the arguments and each platform's contract.
#
#   docker build -t trimaran .                                                      NVIDIA GPU, torch from PyPI (CUDA 13)
#   docker build -t trimaran:cpu --build-arg TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu .
#   docker build -t trimaran:thin --build-arg EXTRAS= .                             no torch: gateway and echo engine
#   docker build -t trimaran:runpod --target runpod .                               RunPod's queue worker
#   docker build --build-arg MODEL_ID=Qwen/Qwen3-0.6B --secret id=HF_TOKEN,src=token.txt .      weights baked in
#
# Kept to what older builders accept: no heredocs, no COPY --link, no secret in an environment variable.

ARG BASE_IMAGE=python:3.12-slim-bookworm

# The engine's kernels for CPUs (serve/kernels.py), where torch is built for CPUs or KERNELS=1 asks for them: no other
# image waits for a compiler, and none carries it.
FROM ${BASE_IMAGE} AS kernels
WORKDIR /src
ARG EXTRAS=engine
ARG TORCH_INDEX_URL=
ARG KERNELS=
# hadolint ignore=DL3008
RUN case "${EXTRAS:+${KERNELS}${TORCH_INDEX_URL}}" in 1*|*/cpu|*/cpu/) touch wanted ;; *) exit 0 ;; esac; \
    apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
COPY serve/kernels.py serve/__init__.py serve/
COPY serve/engine/kernels serve/engine/kernels
RUN [ ! -e wanted ] || python3 -m serve.kernels

FROM ${BASE_IMAGE} AS app

ENV VIRTUAL_ENV=/venv \
    PATH=/venv/bin:$PATH
# Caches are written under /data by whatever user the platform chooses.  Official Python images come without bytecode,
# and a user without write access would compile the standard library at every start.
RUN python3 -m venv "${VIRTUAL_ENV}" \
 && python3 -c "import compileall, sysconfig; compileall.compile_dir(sysconfig.get_path('stdlib'), maxlevels=2, quiet=2, workers=0)" \
 && groupadd --gid 10001 app \
 && useradd --uid 10001 --gid app --no-log-init --create-home app \
 && install --directory --mode 1777 /data \
 && install --directory /app /models

# The largest layer by far changes only with torch or the lock.  An index of its own decides between CUDA and CPU builds;
# --no-deps from there alone, so that the build never falls back to PyPI's.
WORKDIR /src
COPY requirements.lock ./
ARG EXTRAS=engine
ARG TORCH_INDEX_URL=
RUN --mount=type=cache,target=/root/.cache/pip \
    case ",${EXTRAS}," in *,engine,*|*,lora,*) ;; *) exit 0 ;; esac; \
    grep '^torch==' requirements.lock > torch.txt || exit 1; \
    if [ -n "${TORCH_INDEX_URL}" ]; then pip install --no-deps --index-url "${TORCH_INDEX_URL}" -r torch.txt || exit 1; fi; \
    pip install -c requirements.lock ${TORCH_INDEX_URL:+--extra-index-url "${TORCH_INDEX_URL}"} -r torch.txt

COPY pyproject.toml requirements-dev.lock ./
COPY deploy/image/requirements.py deploy/image/
RUN --mount=type=cache,target=/root/.cache/pip \
    grep --no-filename '==' requirements.lock requirements-dev.lock > constraints.txt \
 && python deploy/image/requirements.py "${EXTRAS}" > requirements.txt \
 && pip install -c constraints.txt -r requirements.txt

# Weights, if any are baked in.  Such an image never asks the Hub; without a secret only public models can be brought.
ARG MODEL_ID=
ARG MODEL_REVISION=
ARG HF_ENDPOINT=https://huggingface.co
COPY serve/__init__.py serve/bake.py serve/errors.py serve/hub.py serve/weight_files.py serve/weights.py serve/
RUN --mount=type=secret,id=HF_TOKEN,required=false \
    if [ -n "${MODEL_ID}" ]; then \
      HF_HOME=/models/hf HF_TOKEN_PATH=/run/secrets/HF_TOKEN python -m serve.bake "${MODEL_ID}" "${MODEL_REVISION}" \
      && chmod -R a+rX /models; \
    fi

COPY README.md LICENSE ./
COPY trimaran trimaran
COPY serve serve
RUN --mount=type=cache,target=/root/.cache/pip pip install --no-deps .
COPY --from=kernels /src/serve/engine/kernels /kernels
RUN find /kernels -name '*.so' -exec cp -t "$(python -I -c 'import serve.kernels; print(serve.kernels.FOLDER)')" {} + \
 && rm -r /kernels

# What a first start would find out about the model, once for all starts.  /models keeps it beside the weights.
RUN if [ -n "${MODEL_ID}" ]; then \
      HF_HOME=/models/hf HF_HUB_OFFLINE=1 XDG_CACHE_HOME=/tmp/cache SERVE_MODEL="${MODEL_ID}" SERVE_MODEL_REVISION="${MODEL_REVISION}" \
      python -m serve.compare && rm -rf /tmp/cache; \
    fi

ARG BAKED_HF_HOME=${MODEL_ID:+/models/hf}
ENV PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    HF_HOME=${BAKED_HF_HOME:-/data/hf} \
    HF_HUB_OFFLINE=${MODEL_ID:+1} \
    HF_HUB_DISABLE_TELEMETRY=1 \
    HF_MODULES_CACHE=/data/hf/modules \
    XDG_CACHE_HOME=/data/cache \
    SERVE_HOST=0.0.0.0 \
    PORT=8000 \
    SERVE_MODEL=${MODEL_ID} \
    SERVE_MODEL_REVISION=${MODEL_REVISION} \
    SERVE_MODEL_FOLDERS=/repository,/opt/ml/model
WORKDIR /app
STOPSIGNAL SIGTERM
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="Trimaran" \
      org.opencontainers.image.description="An OpenAI-compatible server for one Hugging Face model" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"

# RunPod's queue: no port, so nothing to check.
FROM app AS runpod
RUN --mount=type=cache,target=/root/.cache/pip \
    python /src/deploy/image/requirements.py runpod > /src/requirements.txt \
 && pip install -c /src/constraints.txt -r /src/requirements.txt
COPY deploy/runpod deploy/runpod
USER 10001
HEALTHCHECK NONE
ENTRYPOINT ["python", "-u", "deploy/runpod/handler.py"]

# Last, and so the default.  The entry point takes options, or the argument `serve` as SageMaker passes it.
FROM app AS serve
USER 10001
EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=5s --start-period=30s --retries=3 CMD ["python", "-m", "serve.healthcheck"]
ENTRYPOINT ["python", "-m", "serve"]
CMD ["serve"]
