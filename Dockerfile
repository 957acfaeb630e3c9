# The environment of requirements-cpu.lock and the embedded data, ready to run:
#   docker build -t dynslice . && docker run --rm -v "$PWD/out:/out" dynslice --profile smoke
# Results, notebooks, figures and the report appear in ./out.
FROM python:3.11-slim
RUN apt-get update \
    && apt-get install -y --no-install-recommends git chromium \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /dynslice
COPY . .
ENV VIRTUAL_ENV=/venv PATH=/venv/bin:$PATH DYNSLICE_OUTPUT=/out
RUN python -m venv /venv \
    && pip install --no-cache-dir --no-deps --require-hashes \
        --extra-index-url https://download.pytorch.org/whl/cpu -r requirements-cpu.lock \
    && pip install --no-cache-dir --no-deps --no-build-isolation -e .
# Fetches model, texts and benchmarks, and measures nothing.
RUN ./run_all.sh --dry-run
ENTRYPOINT ["./run_all.sh"]
