# docker build -t ktmoe . && docker run --rm --gpus all -v "$PWD:/data" ktmoe train config.yaml
# Without --gpus everything runs on the CPU. glibc 2.36: kt-kernel's wheel asks for 2.35.
FROM python:3.11-slim-bookworm

COPY . /ktmoe
RUN pip install --no-cache-dir -c /ktmoe/requirements/constraints.txt "/ktmoe[train]" \
    && pip install --no-cache-dir --no-deps llamafactory==0.9.5 kt-kernel==0.7.2

# Models of the hub, certificates and measurements outlive the container where this is a volume.
ENV HF_HOME=/cache/huggingface KTMOE_CACHE_DIR=/cache/ktmoe
VOLUME ["/cache", "/data"]
WORKDIR /data
ENTRYPOINT ["ktmoe"]
CMD ["doctor"]
