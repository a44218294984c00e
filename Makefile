# sidestep. Every target sets itself up on a fresh Debian 12: `make check` as anybody, the others as root.
SHELL := /bin/bash
.SHELLFLAGS := -o pipefail -ec
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON := .venv/bin/python
SHIM := build/sidestep-cni

# Debian's packages, by who needs them: the C halves and their tests, the demo's mesh, and all that tests start.
CHECK_PACKAGES := python3-venv libbpf1 gcc libc6-dev libjansson-dev
CHART_PACKAGES = $(CHECK_PACKAGES) $(KUBECTL)
DEMO_PACKAGES := $(CHECK_PACKAGES) python3-bpfcc containernetworking-plugins iproute2 util-linux curl iptables
# Not Debian's kubectl if there is another: that has a kustomize of 2019.
KUBECTL := $(shell command -v kubectl > /dev/null || echo kubernetes-client)
# Compilers of the matrix: Debian's, unless there are others. Debian's usual cargo is too old for tokio.
GO := $(shell command -v go > /dev/null || [ -x /usr/local/go/bin/go ] || echo golang-go)
CARGO := $(shell command -v cargo > /dev/null || echo cargo-web)
LOAD := wrk nghttp2-client iperf3 nginx-light
TEST_PACKAGES := $(DEMO_PACKAGES) $(KUBECTL) nftables conntrack containerd runc busybox-static buildah debootstrap \
          zsh fish chromium fonts-dejavu-core \
          haproxy mptcpize openjdk-17-jdk-headless nodejs redis-server python3-redis python3-aiohttp $(LOAD)
KERNELS_PACKAGES := $(DEMO_PACKAGES) qemu-system-x86 kmod xz-utils
PLUGIN_PACKAGES := iptables nftables
# runc is built with the containerd that is asked for; Cilium's agent compiles its programs when it starts.
CLUSTER_PACKAGES := $(if $(CONTAINERD),libseccomp-dev) $(if $(filter cilium,$(NETWORK)),clang-19)
MATRIX_PACKAGES := $(GO) $(CARGO) postgresql python3-asyncpg mariadb-server python3-aiomysql nats-server \
          rabbitmq-server python3-aio-pika
BENCH_PACKAGES := $(DEMO_PACKAGES) $(LOAD)
# Where all that runs here keeps compiled programs, so that they are compiled once.
export SIDESTEP_BYTECODE ?= $(CURDIR)/build/bytecode
# For two cores: tests wait more than they work, and each makes a lab of its own, so they run side by side.
WORKERS ?= 4

help:
	@echo 'make demo [KEEP=1]  a small mesh on this machine, and who got each connection'
	@echo 'make check          lint, types, and the tests that need neither root nor time; as anybody'
	@echo 'make test           every test, with lint and types'
	@echo 'make one T=FILE     one test or one file of tests: T=tests/unit/test_chain.py::test_any_string_survives'
	@echo 'make verifier-log P=connect4 [STEPS=1]  what the verifier of this kernel says of one program'
	@echo 'make faults         sixteen faults put into a running node, and whether the commands name each in words'
	@echo 'make e2e            a node'"'"'s life with a real containerd, hybrid and pure cgroup2'
	@echo 'make cluster [KEEP=1] [ONLY=PATTERN] [KUBERNETES=1.37] [CONTAINERD=2.4] [CGROUPS=pure] [DRIVER=systemd] [NETWORK=flannel|cilium]  a real Kubernetes of two nodes with Istio and sidestep; its programs are built first'
	@echo 'make cluster-down   take down clusters that were kept, or whose owner is dead'
	@echo 'make istio [ONLY=PATTERN] [TESTS=PATTERN] [KEPT=1]  Istio'"'"'s own integration tests with Istio'"'"'s CNI plugin and with sidestep, case by case; two hours'
	@echo 'make renew-sent     ask a real istiod for the configuration of the Envoys in the tests (tests/lab/istiod)'
	@echo 'make conformance    every kind of connection, with Istio'"'"'s rules and with sidestep, compared'
	@echo 'make conformance PLUGIN=nft|legacy|nftables  the same; the rules are written by Istio'"'"'s own CNI plugin, built first'
	@echo 'make conformance-ambient  the same for pods in ambient mode, with Istio'"'"'s ambient rules'
	@echo 'make conformance-oracles  the rules that the suite writes beside those of Istio'"'"'s own plugin'
	@echo 'make chaos          links, pins, listeners, cgroups and agents taken away for ten minutes; CHAOS="--seconds 60 --seed 3"'
	@echo 'make ends           how connections end after 1,000 kills of each kind, at each level; hours: ENDS="--kills 100"'
	@echo 'make halves         how many bulk transfers are never told their end, at each level; HALVES="--only proxy --calls 400"'
	@echo 'make kernels        probe, self-test of acceleration and memory limits on Debian'"'"'s other kernels, under emulation'
	@echo 'make soak           10 GB through both proxies while the level changes; SOAK="--bytes 1e9 --seconds 60 --seed 2"'
	@echo 'make matrix         databases, brokers and runtimes through Envoys at each level, every byte compared; MATRIX="--only redis/*/full --seed 3"'
	@echo 'make nightly        the property tests with 10,000 cases each, a thousand cycles, an outage of a minute'
	@echo 'make ambient-flips  100,000 label flips of 1,000 ambient pods: no descriptors, no memory; PODS=100 FLIPS=10000'
	@echo 'make lint           ruff, clang-format, mypy --strict, import-linter'
	@echo 'make bench          requests/s, latency and CPU of two mesh pods, against Istio'"'"'s rules; takes an hour'
	@echo 'make bench-cni      a whole ADD through the shim beside iptables-restore, interleaved'
	@echo 'make bench-plugins  a whole ADD of Istio'"'"'s own plugin and of sidestep'"'"'s in a real Kubernetes, interleaved'
	@echo 'make bench-mesh     pods of a real mesh under Istio'"'"'s own plugin and under sidestep, interleaved; takes 25 minutes'
	@echo 'make bench-connect  whether connect() costs more with more rules or more pods'
	@echo 'make bench-faults   what public reports say of Istio'"'"'s NAT, counted with its rules and with sidestep; takes a minute and a half'
	@echo 'make bench-agent    how long a cold start, a warm start and a swap of the programs take'
	@echo 'make bench-trace    what a trace costs those whom it watches'
	@echo 'make bench-flows    what it costs a connection that it is counted'
	@echo 'make bench-node     memory, start and idle load of an agent with 250 pods and an API server'
	@echo 'make image          build/image/sidestep.tar and its SBOM, with buildah and debootstrap'
	@echo 'make chart          build/chart/sidestep-VERSION.tgz, tested with a Helm that is built first; brings manifests/base up to date'
	@echo 'make lock           write locks/ from the groups in pyproject.toml; UPGRADE=1 takes newer versions'
	@echo 'make docs           build/site, after bringing docs/cli.md and docs/helm.md up to date'
	@echo 'make shim           build/sidestep-cni, static'
	@echo 'make clean          remove what make made; labs of dead owners with it'

# What is missing of a list of packages is installed, or said to who is not root.
check-packages: mine
	@.ci/packages check $(CHECK_PACKAGES)
chart-packages:
	@.ci/packages chart $(CHART_PACKAGES)
demo-packages:
	@.ci/packages demo $(DEMO_PACKAGES)
test-packages:
	@.ci/packages test $(TEST_PACKAGES)
kernels-packages:
	@.ci/packages kernels $(KERNELS_PACKAGES)
bench-packages:
	@.ci/packages bench $(BENCH_PACKAGES)

# Python's own packages, from the locked files, again when those have changed; pip's words go to build/setup.log.
.venv/.demo: LOCK_FILE := locks/demo.txt
.venv/.test: LOCK_FILE := locks/dev.txt
.venv/.demo: locks/demo.txt | check-packages
.venv/.test: locks/dev.txt | check-packages
.venv/.demo .venv/.test:
	@[ ! -e .venv -o -w .venv ] || { echo 'setup: .venv is out of date and not yours; have its owner remove it'; exit 1; }
	@mkdir -p build
	@echo 'setup: making .venv from the distribution'"'"'s python3, with $(LOCK_FILE)'
	@{ /usr/bin/python3 -m venv --system-site-packages .venv && \
	   $(PYTHON) -m pip install -q --require-hashes --only-binary :all: -r $(LOCK_FILE); } \
	    > build/setup.log 2>&1 || { tail -20 build/setup.log; exit 1; }
	@touch $@

setup: test-packages .venv/.test
demo-setup: demo-packages .venv/.demo shim
check-setup: check-packages .venv/.test shim
test-setup: test-packages .venv/.test shim

# Every group for this folder but the matrix's own (dev), what the image needs (run), what the demo needs, what the matrix
# has for its pods: versions, and the hashes of their files.
# Pins that still fit stay.
LOCK := .venv/bin/uv pip compile --quiet --system-certs --python-platform x86_64-manylinux_2_36 --python-version 3.11 \
        --generate-hashes --no-annotate --no-emit-index-url --no-emit-find-links --custom-compile-command 'make lock'
LOCKED := $(shell sed -n '/^\[dependency-groups\]/,/^\[tool/s/^\([a-z]*\) = \[$$/--group \1/p' pyproject.toml | grep -v matrix)
lock: .venv/.test
	@$(LOCK) $(if $(UPGRADE),--upgrade) $(LOCKED) -o locks/dev.txt > /dev/null
	@$(LOCK) --group run --constraint locks/dev.txt -o locks/run.txt > /dev/null
	@$(LOCK) --group run --group lab --constraint locks/dev.txt -o locks/demo.txt > /dev/null
	@$(LOCK) --group matrix -o locks/matrix.txt > /dev/null

shim:
	@$(MAKE) --no-print-directory -C cni/shim

demo: demo-setup
	@$(PYTHON) -m tests.lab.demo $(if $(KEEP),--keep)

# What has to be written must be ours to write: root may have run make here, or the folder is somebody else's.
mine:
	@for each in . build build/.lock $(SHIM) .mypy_cache .ruff_cache; do \
	    [ ! -e $$each -o -w $$each ] || { echo "check: you ($$(id -un)) may not write to $$each, which is" \
	        "$$(stat -c %U $$each)'s: have it removed, or use a checkout of your own"; exit 1; }; \
	done

# Under forty seconds: lint and types beside the tests that need neither root, nor BPF, nor time.
check: check-setup
	@$(MAKE) --no-print-directory -j2 --output-sync=target lint units

units:
	@$(PYTHON) -m pytest -q -n 2 tests/unit

# The image is built, which waits for downloads, beside what waits for time.
test: test-setup
	@$(MAKE) --no-print-directory -j3 --output-sync=target image lint without-kernel
	@$(PYTHON) -m pytest -q -n $(WORKERS) --dist loadfile --no-loadscope-reorder tests/datapath tests/node tests/e2e

without-kernel:
	@$(PYTHON) -m pytest -q -n $(WORKERS) --dist loadfile tests/unit tests/agent

# One test, or a file of them.
one: $(if $(filter tests/unit/%,$(T)),check-setup,test-setup) $(if $(findstring tests/e2e,$(T)),image)
	@[ -n '$(T)' ] || { echo 'make one T=tests/unit/test_chain.py::test_any_string_survives'; exit 2; }
	@$(PYTHON) -m pytest -v '$(T)'

# The programs are compiled as the agent does it. With STEPS=1 every instruction of every path, tens of megabytes.
verifier-log: demo-packages .venv/.demo
	@$(PYTHON) -m tests.verifier_log $(if $(STEPS),--steps) $(P)

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

$(IMAGE): Dockerfile .dockerignore image/build.sh locks/run.txt $(IMAGE_LIST) $(IMAGE_SOURCES) | test-packages .venv/.test
	@image/build.sh

faults: test-setup
	@$(PYTHON) -m tests.node.faults

e2e: test-setup image
	@$(PYTHON) -m pytest -v tests/e2e

# Kubernetes and Istio themselves, built from their modules with Go: a quarter of an hour the first time.
cluster: test-setup image
	@.ci/packages cluster $(CLUSTER_PACKAGES)
	@$(PYTHON) -m tests.cluster $(if $(KEEP),--keep) $(if $(ONLY),--only "$(ONLY)") $(if $(CLUSTERS),--clusters $(CLUSTERS))

# Each suite twice, each time in a cluster of its own: what Istio's plugin fails too is not our fault.
istio: test-setup image
	@.ci/packages cluster $(PLUGIN_PACKAGES)
	@$(PYTHON) -m tests.cluster.istio_tests $(if $(ONLY),--only "$(ONLY)") $(if $(TESTS),--tests "$(TESTS)") $(if $(KEPT),--kept)

renew-sent: test-setup image
	@$(PYTHON) -m tests.cluster.sent

cluster-down:
	@$(PYTHON) -m tests.cluster.down

# Helm is built from its module with Go: two minutes the first time. What is written is committed: nobody else needs Helm.
chart: chart-packages .venv/.test
	@$(PYTHON) -m tests.cluster.builder helm
	@$(PYTHON) -m docs.chart
	@$(PYTHON) -m tests.chart.base
	@$(PYTHON) -m pytest -q -n 2 tests/chart
	@rm -rf build/chart
	@build/cluster/bin/helm package manifests/charts/sidestep --destination build/chart > build/chart.log || { cat build/chart.log; exit 1; }
	@echo build/chart/*.tgz

# What Debian has of other kernels, each booted with this machine's files below it; a quarter of an hour.
kernels: kernels-packages .venv/.demo shim
	@$(PYTHON) -m tests.kernels

# Ten gigabytes, random sizes and pauses, levels changing: every byte in its place. Flags: make soak SOAK=--help
soak: demo-setup
	@$(PYTHON) -m tests.lab.traffic.soak $(SOAK)

# Connections whose ends are told by level, after kills of everybody who carries them. Flags: make ends ENDS=--help
ends: demo-setup
	@$(PYTHON) -m tests.ends $(ENDS)

# Transfers that end with half a close. Flags: make halves HALVES=--help
halves: demo-setup
	@$(PYTHON) -m tests.ends.halves $(HALVES)

chaos: demo-setup
	@$(PYTHON) -m tests.chaos $(CHAOS)

# Real servers and clients; what is compiled for them is kept in build/matrix. Flags: make matrix MATRIX=--help
MATRIX_PYTHON := build/matrix/venv
matrix: test-setup $(MATRIX_PYTHON)/.made
	@.ci/packages matrix $(MATRIX_PACKAGES)
	@$(PYTHON) -m tests.matrix $(MATRIX)

$(MATRIX_PYTHON)/.made: locks/matrix.txt | check-packages
	@echo 'matrix: making $(MATRIX_PYTHON) with $<'
	@{ /usr/bin/python3 -m venv --clear $(MATRIX_PYTHON) && \
	   $(MATRIX_PYTHON)/bin/python -m pip install -q --require-hashes --only-binary :all: -r $<; } \
	    > build/setup.log 2>&1 || { tail -20 build/setup.log; exit 1; }
	@touch $@

# Of C what is ours: bpf/uapi has the kernel's.
C_FILES := $(shell find bpf cni tests -name '*.[ch]' -not -path 'bpf/uapi/*')
lint: .venv/.test
	@$(PYTHON) -m ruff check .
	@$(PYTHON) -m ruff format --check .
	@.venv/bin/clang-format --fallback-style=none --dry-run -Werror $(C_FILES)
	@.venv/bin/lint-imports --no-cache > build/imports.log || { cat build/imports.log; exit 1; }
	@$(PYTHON) -m mypy

# Some minutes, most of them the API double's.
ambient-flips: export PODS ?= 1000
ambient-flips: export FLIPS ?= 100000
ambient-flips: test-setup
	@$(PYTHON) -m pytest -q tests/agent/test_ambient_flips.py

# Ten thousand cases of each property, of which `make test` tries some hundred.
nightly: test-setup
	@OUTAGE_SECONDS=60 $(PYTHON) -m pytest -q tests/agent/test_cluster_faults.py tests/node/test_outage.py
	@CYCLES=1000 $(PYTHON) -m pytest -q tests/node/test_lifecycle.py
	@HYPOTHESIS_EXAMPLES=10000 $(PYTHON) -m pytest -n $(WORKERS) --dist loadfile tests/unit tests/datapath/test_generated.py

conformance: demo-setup $(if $(PLUGIN),istio-plugin)
	@$(PYTHON) -m tests.conformance $(if $(PLUGIN),--plugin $(PLUGIN))

conformance-ambient: demo-setup
	@$(PYTHON) -m tests.conformance.ambient

conformance-oracles: demo-setup istio-plugin
	@$(PYTHON) -m tests.conformance.oracles

istio-plugin: demo-setup
	@.ci/packages conformance $(PLUGIN_PACKAGES)
	@$(PYTHON) -m tests.cluster.builder istio-cni

docs: .venv/.test
	@$(PYTHON) -m docs.commands
	@$(PYTHON) -m docs.chart
	@$(PYTHON) -m mkdocs build --strict --quiet
	@echo 'build/site/index.html'

# A quiet machine, please. Results go to bench/results/; ARGS=--quick for a trial.
bench-setup: bench-packages .venv/.test shim

# The baseline in nftables is written by Istio's own plugin.
bench: bench-setup istio-plugin
	@$(PYTHON) -m tests.bench.mesh $(ARGS)

bench-cni: bench-setup
	@$(PYTHON) -m tests.bench.cni

bench-plugins: test-setup image
	@.ci/packages bench $(PLUGIN_PACKAGES)
	@$(PYTHON) -m tests.bench.plugins

bench-mesh: test-setup image
	@.ci/packages bench $(PLUGIN_PACKAGES)
	@$(PYTHON) -m tests.bench.real_mesh $(ARGS)

bench-connect: bench-setup
	@$(PYTHON) -m tests.bench.connect

bench-faults: bench-setup
	@$(PYTHON) -m tests.bench.faults

bench-agent: bench-setup
	@$(PYTHON) -m tests.bench.agent

bench-trace: bench-setup
	@$(PYTHON) -m tests.bench.trace

bench-flows: bench-setup
	@$(PYTHON) -m tests.bench.flows

bench-node: bench-setup
	@$(PYTHON) -m tests.bench.node

always:

# Labs and clusters are root's, so another user has none.
clean:
	@if [ -x $(PYTHON) ] && [ $$(id -u) = 0 ]; then $(PYTHON) -m tests.lab.clean; $(PYTHON) -m tests.cluster.down; fi
	rm -rf build .venv .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +

.PHONY: always help setup lock mine check units test without-kernel one verifier-log shim demo e2e soak ends halves matrix faults nightly ambient-flips conformance conformance-ambient conformance-oracles istio-plugin \
        cluster cluster-down istio renew-sent chart kernels lint docs bench bench-cni bench-plugins bench-mesh bench-connect bench-faults bench-agent bench-node bench-trace bench-flows image clean \
        check-packages chart-packages demo-packages test-packages kernels-packages bench-packages \
        check-setup demo-setup test-setup bench-setup
