# sidestep. `make demo` and `make test` do their own set-up on a fresh Debian 12, as root.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON := .venv/bin/python
SHIM := build/sidestep-cni
DEBIAN := python3-venv python3-bpfcc libbpf1 gcc libc6-dev libjansson-dev \
          containernetworking-plugins iproute2 util-linux curl iptables \
          containerd runc busybox-static \
          zsh fish chromium fonts-dejavu-core
# Not the one of Debian 12 if there is another: that has a kustomize of 2019.
KUBECTL := $(shell command -v kubectl > /dev/null || echo kubernetes-client)
# For two cores: tests wait more than they work, and each makes a lab of its own, so they run side by side.
WORKERS ?= 3

help:
	@echo 'make demo [KEEP=1]  a small mesh on this machine, and who got each connection'
	@echo 'make test           every test, with lint and types'
	@echo 'make e2e            a node'"'"'s life with a real containerd, hybrid and pure cgroup2'
	@echo 'make conformance    every kind of connection, with Istio'"'"'s rules and with sidestep, compared'
	@echo 'make kernels        the probe and the self-test of acceleration on Debian'"'"'s other kernels, under emulation'
	@echo 'make soak           10 GB through both proxies while the level changes; SOAK="--bytes 1e9 --seconds 60 --seed 2"'
	@echo 'make nightly        the property tests with 10,000 cases each, an outage of a minute'
	@echo 'make lint           ruff, clang-format, mypy --strict, import-linter'
	@echo 'make bench          requests/s, latency and CPU of two mesh pods, against Istio'"'"'s rules; takes 40 minutes'
	@echo 'make bench-cni      a whole ADD through the shim beside iptables-restore, interleaved'
	@echo 'make bench-connect  whether connect() costs more with more rules or more pods'
	@echo 'make bench-agent    how long a cold start, a warm start and a swap of the programs take'
	@echo 'make bench-trace    what a trace costs those whom it watches'
	@echo 'make bench-node     memory, start and idle load of an agent with 250 pods and an API server'
	@echo 'make image          build/image/sidestep.tar and its SBOM, with buildah and debootstrap'
	@echo 'make lock           write locks/ from the groups in pyproject.toml; UPGRADE=1 takes newer versions'
	@echo 'make docs           build/site, after bringing docs/cli.md up to date'
	@echo 'make shim           build/sidestep-cni, static'
	@echo 'make clean          remove what make made; labs of dead owners with it'

setup: .venv/.installed

# One line a step; the packages' own chatter goes to build/setup.log, which is shown when a step fails.
.venv/.installed: locks/dev.txt Makefile
	@mkdir -p build
	@missing=$$(dpkg-query -W -f='$${Package} $${Status}\n' $(DEBIAN) $(KUBECTL) 2>/dev/null \
	    | awk '/ok installed/ {print $$1}' | sort | comm -13 - <(printf '%s\n' $(DEBIAN) $(KUBECTL) | sort)); \
	if [ -n "$$missing" ]; then \
	    echo "setup: installing Debian packages:" $$missing; \
	    { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends $$missing; } \
	        > build/setup.log 2>&1 < /dev/null || { tail -20 build/setup.log; exit 1; }; \
	fi
	@echo 'setup: making .venv from the distribution'"'"'s python3'
	@/usr/bin/python3 -m venv --system-site-packages .venv > build/setup.log 2>&1 || { tail -20 build/setup.log; exit 1; }
	@echo 'setup: installing Python packages'
	@$(PYTHON) -m pip install -q --require-hashes --only-binary :all: -r locks/dev.txt \
	    > build/setup.log 2>&1 || { tail -20 build/setup.log; exit 1; }
	@touch $@

# Every group for this folder (dev), what the image needs (run), what the demo needs: versions, and the hashes of their files.
# Pins that still fit stay.
LOCK := .venv/bin/uv pip compile --quiet --system-certs --python-platform x86_64-manylinux_2_36 --python-version 3.11 \
        --generate-hashes --no-annotate --no-emit-index-url --no-emit-find-links --custom-compile-command 'make lock'
LOCKED := $(shell sed -n '/^\[dependency-groups\]/,/^\[tool/s/^\([a-z]*\) = \[$$/--group \1/p' pyproject.toml)
lock: setup
	@$(LOCK) $(if $(UPGRADE),--upgrade) $(LOCKED) -o locks/dev.txt > /dev/null
	@$(LOCK) --group run --constraint locks/dev.txt -o locks/run.txt > /dev/null
	@$(LOCK) --group run --group lab --constraint locks/dev.txt -o locks/demo.txt > /dev/null

shim: setup
	@$(MAKE) --no-print-directory -C cni/shim

demo: setup shim
	@$(PYTHON) -m tests.lab.demo $(if $(KEEP),--keep)

test: setup shim load applications
	@$(MAKE) --no-print-directory -j2 --output-sync=target image lint
	@$(PYTHON) -m pytest -n $(WORKERS) --dist loadfile tests/unit tests/datapath tests/node tests/e2e

# Docker's way, without docker or a registry; made again only when something of it has changed.
IMAGE := build/image/sidestep.tar
IMAGE_SOURCES := $(sort $(shell find bpf cni installer -name __pycache__ -prune -o -type f -print))
IMAGE_LIST := build/image/sources
image: $(IMAGE)

# The list itself, written when it changes: of a file that has been removed nothing would be newer than the image.
$(IMAGE_LIST): always
	@mkdir -p $(@D)
	@printf '%s\n' $(IMAGE_SOURCES) > $@.new
	@if cmp -s $@.new $@; then rm $@.new; else mv $@.new $@; fi

$(IMAGE): Dockerfile .dockerignore image/build.sh locks/run.txt $(IMAGE_LIST) $(IMAGE_SOURCES) | setup
	@missing=$$(for each in buildah debootstrap; do command -v $$each > /dev/null || echo $$each; done); \
	if [ -n "$$missing" ]; then \
	    echo "image: installing Debian packages:" $$missing; \
	    DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends $$missing > build/image.log 2>&1 \
	        || { tail -20 build/image.log; exit 1; }; \
	fi
	@image/build.sh

e2e: setup shim image
	@$(PYTHON) -m pytest -v tests/e2e

# What Debian has of other kernels, each booted with this machine's files below it; some minutes.
KERNELS := qemu-system-x86 kmod xz-utils
kernels: setup shim
	@missing=$$(for each in $(KERNELS); do dpkg -s $$each > /dev/null 2>&1 || echo $$each; done); \
	if [ -n "$$missing" ]; then \
	    echo "kernels: installing Debian packages:" $$missing; \
	    { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends $$missing; } \
	        > build/kernels.log 2>&1 < /dev/null || { tail -20 build/kernels.log; exit 1; }; \
	fi
	@$(PYTHON) -m tests.kernels

# Ten gigabytes, random sizes and pauses, levels changing: every byte in its place. Flags: make soak SOAK=--help
soak: setup shim
	@$(PYTHON) -m tests.lab.traffic.soak $(SOAK)

lint: setup
	@$(PYTHON) -m ruff check .
	@$(PYTHON) -m ruff format --check .
	@.venv/bin/clang-format --dry-run --Werror $$(find bpf cni tests -path bpf/uapi -prune -o -name '*.[ch]' -print)
	@$(PYTHON) -m mypy
	@.venv/bin/lint-imports --no-cache | tail -3

# Ten thousand cases of each property, of which `make test` tries some hundred.
nightly: setup shim
	@OUTAGE_SECONDS=60 $(PYTHON) -m pytest -q tests/unit/test_cluster_faults.py
	@HYPOTHESIS_EXAMPLES=10000 $(PYTHON) -m pytest -n $(WORKERS) --dist loadfile tests/unit tests/datapath/test_generated.py

conformance: setup shim
	@$(PYTHON) -m tests.conformance

docs: setup
	@$(PYTHON) -m docs.commands
	@$(PYTHON) -m mkdocs build --strict --quiet
	@echo 'build/site/index.html'

# As for the image: only who measures needs the load generators and the server.
LOAD := wrk nghttp2-client iperf3 nginx-light
load: setup
	@missing=$$(for each in $(LOAD); do dpkg -s $$each > /dev/null 2>&1 || echo $$each; done); \
	if [ -n "$$missing" ]; then \
	    echo "load: installing Debian packages:" $$missing; \
	    { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends $$missing; } \
	        > build/load.log 2>&1 < /dev/null || { tail -20 build/load.log; exit 1; }; \
	fi

# What tests/node/test_applications.py puts into pods.
APPLICATIONS := haproxy nginx-light mptcpize openjdk-17-jdk-headless
applications: setup
	@missing=$$(for each in $(APPLICATIONS); do dpkg -s $$each > /dev/null 2>&1 || echo $$each; done); \
	if [ -n "$$missing" ]; then \
	    echo "applications: installing Debian packages:" $$missing; \
	    { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends $$missing; } \
	        > build/applications.log 2>&1 < /dev/null || { tail -20 build/applications.log; exit 1; }; \
	fi

# A quiet machine, please. Results go to bench/results/; ARGS=--quick for a trial.
bench: setup shim load
	@$(PYTHON) -m tests.bench.mesh $(ARGS)

bench-cni: setup shim
	@$(PYTHON) -m tests.bench.cni

bench-connect: setup
	@$(PYTHON) -m tests.bench.connect

bench-agent: setup
	@$(PYTHON) -m tests.bench.agent

bench-trace: setup shim load
	@$(PYTHON) -m tests.bench.trace

bench-node: setup shim
	@$(PYTHON) -m tests.bench.node

always:

clean:
	@if [ -x $(PYTHON) ]; then $(PYTHON) -m tests.lab.clean; fi
	rm -rf build .venv .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +

.PHONY: always help setup lock shim demo test e2e soak nightly conformance kernels lint docs load applications bench bench-cni bench-connect bench-agent bench-node bench-trace image clean
