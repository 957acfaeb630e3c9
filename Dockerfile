# The environment of requirements.lock and the embedded data, ready to run:
#   docker build -t dynslice . && docker run --rm -v "$PWD/out:/out" dynslice --profile smoke
# Results, notebooks, figures and the report appear in ./out.
FROM python:3.11-slim
RUN apt-get update \
    && apt-get install -y --no-install-recommends git chromium \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /dynslice
COPY . .
# Sets up as it does anywhere, and measures nothing.
RUN ./run_all.sh --dry-run
ENV DYNSLICE_OUTPUT=/out
ENTRYPOINT ["./run_all.sh"]
