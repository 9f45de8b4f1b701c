# SPDX-License-Identifier: Apache-2.0
#
# `make` lists the targets. Everything that is built goes to _build; what is
# downloaded or built once for a version goes to KATA_CACHE.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
MAKEFLAGS += --no-print-directory

# The guest's kernel: Debian's, which is only unpacked, or the small one of `make kernel`,
# whose build has a directory of its own.
KERNEL ?= debian
ifeq ($(filter $(KERNEL),debian small),)
$(error KERNEL is "$(KERNEL)": want debian or small)
endif

export KATA_CACHE ?= $(HOME)/.cache/kata-go
export KATA_BUILD := $(CURDIR)/_build$(if $(filter small,$(KERNEL)),/small)
export KATA_LAB := $(KATA_CACHE)/lab
KERNEL_DIR := $(KATA_CACHE)/kernel/$(if $(filter small,$(KERNEL)),small,current)
export KATA_TEST_KERNEL := $(KATA_BUILD)/images/vmlinux
export KATA_TEST_MODULES := $(KERNEL_DIR)/modules

# A release is a tag v<number>; before the first one, a revision names the build.
VERSION := $(shell git describe --tags --match 'v*' --dirty 2>/dev/null || echo "0.1.0-dev+$$(git describe --always --dirty 2>/dev/null || echo unknown)")
# internal/version is where the programs read their version from.
LDFLAGS := -s -w -X github.com/kata-v2/kata/internal/version.Version=$(VERSION)
GOBUILD := CGO_ENABLED=0 go build -trimpath -buildvcs=false -ldflags '$(LDFLAGS)'
PROGRAMS := containerd-shim-kata-v2 kata-agent kata-ctl
GENERATED := protocols/agentpb protocols/typespb protocols/taskpb protocols/cripb protocols/sandboxpb

step = @printf '\n== %s\n' '$(1)'

.PHONY: help
help: ## list the targets
	@awk -F ':.*## ' '/^[a-z][a-z-]*:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: setup
setup: ## install and fetch what building and testing need (once; root)
	$(call step,setup)
	@scripts/setup.sh

.PHONY: build
build: ## build the programs into _build/bin
	$(call step,build $(VERSION))
	@for p in $(PROGRAMS); do \
		echo "build $$p"; \
		$(GOBUILD) -o $(KATA_BUILD)/bin/$$p ./cmd/$$p; \
	done

.PHONY: kernel
kernel: ## build the small guest kernel from Debian's source (once; some 13 minutes of one core)
	$(call step,kernel)
	@scripts/kernel-build.sh

.PHONY: image
image: setup build $(if $(filter small,$(KERNEL)),kernel) ## build guest kernel, guest root and manifest into _build/images (KERNEL=small: _build/small)
	$(call step,image)
	@go run ./images/cmd/kata-image -agent $(KATA_BUILD)/bin/kata-agent \
		-engine $(KATA_CACHE)/crun/crun -engine-version "$$(cat $(KATA_CACHE)/crun/version)" \
		-iptables $(KATA_CACHE)/iptables/iptables -iptables-version "$$(cat $(KATA_CACHE)/iptables/version)" \
		-kernel $(KERNEL_DIR) -kernel-package "$$(readlink $(KERNEL_DIR))" \
		-version $(VERSION) -out $(KATA_BUILD)/images

.PHONY: protos
protos: ## generate the Go code of protocols/*.proto
	@mkdir -p $(KATA_BUILD)/tools
	@go build -o $(KATA_BUILD)/tools/ google.golang.org/protobuf/cmd/protoc-gen-go github.com/containerd/ttrpc/cmd/protoc-gen-go-ttrpc
	@PATH="$(KATA_BUILD)/tools:$$PATH" protoc -I . -I /usr/include \
		--go_out=. --go_opt=module=github.com/kata-v2/kata \
		--go-ttrpc_out=. --go-ttrpc_opt=module=github.com/kata-v2/kata protocols/*.proto
	@gofmt -w $(GENERATED)

.PHONY: lint
lint: ## gofmt, go vet, staticcheck
	$(call step,lint)
	@unformatted=$$(gofmt -l $$(git ls-files '*.go')); \
		[ -z "$$unformatted" ] || { echo "gofmt would change:"; echo "$$unformatted"; exit 1; }
	@go vet ./...
	@go tool staticcheck ./...

# Packages that boot virtual machines run one at a time: they share the cores.
.PHONY: test
test: image lint ## set up, build, lint, and run every test
	$(call step,test)
	@go test -count=1 -p 1 -timeout 20m ./...

.PHONY: test-all
test-all: image lint ## the tests again with the race detector and on the small kernel, in all modes, and what takes longer
	$(call step,test with the race detector)
	@scripts/containerd.sh all
	@KATA_TEST_ALL=1 go test -count=1 -race -p 1 -timeout 40m ./...
	@$(MAKE) test KERNEL=small

# VHOST_FLAGS: see `go run ./integration/vhost -help`.
.PHONY: test-vhost
test-vhost: image ## the kernel's vhost path, on a host that is itself emulated (slow)
	$(call step,test the kernel vhost path)
	@go run ./integration/vhost -bin $(KATA_BUILD)/bin -images $(KATA_BUILD)/images -dir $(KATA_BUILD)/vhost $(VHOST_FLAGS)

# Every target of the tree for FUZZTIME; what one finds is kept below its testdata.
FUZZTIME ?= 30s

.PHONY: fuzz
fuzz: ## every fuzz target for 30 s (FUZZTIME=…)
	$(call step,fuzz)
	@for p in $$(git grep -l '^func Fuzz' -- '*_test.go' | xargs -n 1 dirname | sort -u | sed 's,^,./,'); do \
		list=$$(go test -list '^Fuzz' "$$p"); \
		for f in $$(awk '/^Fuzz/' <<<"$$list"); do \
			echo "$$p $$f"; \
			go test -run '^$$' -fuzz "^$$f$$" -fuzztime $(FUZZTIME) -fuzzminimizetime 20x "$$p"; \
		done; \
	done

# RUN picks checks (go test -run TestKubernetes/RUN), HANDLER another runtime handler.
.PHONY: test-k8s
test-k8s: image ## run the checks on a Kubernetes node of our own
	$(call step,test-k8s)
	@scripts/kubernetes.sh
	@KATA_KUBERNETES=$(KATA_CACHE)/kubernetes HANDLER=$(HANDLER) \
		go test -count=1 -v -timeout 45m -run 'TestKubernetes/$(RUN)' ./integration/kubernetes

.PHONY: run
run: image ## run one container in a virtual machine under containerd
	$(call step,run)
	@go run ./integration/cmd/run -bin $(KATA_BUILD)/bin -images $(KATA_BUILD)/images

# On the small kernel unless another is named: what the figures to reach are about.
BENCH_KERNEL := $(if $(filter command line environment,$(origin KERNEL)),$(KERNEL),small)
BENCH_BUILD := $(CURDIR)/_build$(if $(filter small,$(BENCH_KERNEL)),/small)

# BENCH_FLAGS: see `go run ./integration/cmd/bench -help`; BENCH_FLAGS=-resume goes on with a run that was cut off.
.PHONY: bench
bench: ## measure on the small kernel (KERNEL=debian); the result goes to _build/bench.json and bench.svg
	@$(MAKE) image KERNEL=$(BENCH_KERNEL)
	$(call step,bench)
	@go run ./integration/cmd/bench -bin $(BENCH_BUILD)/bin -images $(BENCH_BUILD)/images \
		-modules $(KATA_CACHE)/kernel/$(if $(filter small,$(BENCH_KERNEL)),small,current)/modules \
		-json $(CURDIR)/_build/bench.json -svg $(CURDIR)/_build/bench.svg $(BENCH_FLAGS)

.PHONY: bench-compare
bench-compare: ## compare _build/bench.json with an earlier one, BASE=file; fails when something is worse
	@[ -n "$(BASE)" ] || { echo "name the earlier file: make bench-compare BASE=file"; exit 1; }
	@go run ./integration/cmd/bench -json $(CURDIR)/_build/bench.json -compare "$(BASE)"

.PHONY: install
install: ## install a finished build below DESTDIR (default /); containerd's configuration only with CONTAINERD=1
	@for f in bin/kata-ctl images/manifest.json; do \
		[ -e $(KATA_BUILD)/$$f ] || { echo "_build/$$f is missing: run make image first"; exit 1; }; done
	@$(KATA_BUILD)/bin/kata-ctl install --from $(KATA_BUILD) --root "$(DESTDIR)/" $(if $(CONTAINERD),,--no-containerd)

# What `kata-ctl install --from` takes, with the kernel's configuration and where its source is; one file and its digest.
RELEASE := kata-v2-$(VERSION)-x86_64

.PHONY: release
release: ## programs, small kernel and guest root as _build/release/*.tar.zst, with digests
	@$(MAKE) image KERNEL=small
	$(call step,release $(VERSION))
	@scripts/release.sh $(CURDIR)/_build/small $(KATA_CACHE)/kernel/small $(CURDIR)/_build/release $(RELEASE)

.PHONY: clean
clean: ## remove _build; the cache stays
	rm -rf $(CURDIR)/_build
