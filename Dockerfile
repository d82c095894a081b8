# The package for CPUs, with what `make install` installs. docs/start.md says how to build and use it.
FROM python:3.11-slim
RUN apt-get update \
    && apt-get install -y --no-install-recommends make \
    && rm -rf /var/lib/apt/lists/*
RUN useradd --create-home pkm
USER pkm
WORKDIR /home/pkm/pkm_fairseq
# an index with torch's CPU build: docker build --build-arg PIP_EXTRA_INDEX_URL=...
ARG PIP_EXTRA_INDEX_URL
COPY --chown=pkm . .
RUN make install PYTHON=python3.11 && rm -rf ~/.cache/pip
ENV PATH=/home/pkm/pkm_fairseq/.venv/bin:$PATH
CMD ["python", "-m", "pkm_fairseq"]
