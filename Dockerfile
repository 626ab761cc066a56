# megamor for machines with NVIDIA GPUs.
#
#   docker build -t megamor .
#   docker run --gpus all --ipc=host -v "$PWD:/work" megamor pretrain --config configs/mor_135m.yaml
#
# --ipc=host: ranks on one machine exchange data through shared memory, and Docker's default of 64 MB is too little.
# torch's wheel brings CUDA, cuDNN and NCCL; the host brings the driver, through the NVIDIA container toolkit.
FROM ubuntu:24.04

# The compiler and Python's headers are for torch.compile and Triton, which build a launcher on first use.
# hadolint ignore=DL3008
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
        build-essential git python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 10001 megamor

ENV PATH=/opt/venv/bin:$PATH \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    DS_BUILD_OPS=0
WORKDIR /opt/megamor

# torch first: it is the largest layer and changes the least.
RUN python3 -m venv /opt/venv \
    && pip install --no-cache-dir torch==2.13.0
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY megamor ./megamor
COPY configs ./configs
RUN pip install --no-cache-dir -c constraints.txt ".[fast,hf,serve]"

USER 10001
WORKDIR /work
ENTRYPOINT ["megamor"]
CMD ["--help"]
