# Platter. `make help` lists the targets.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-builtin-rules

GO          ?= go
STATICCHECK := honnef.co/go/tools/cmd/staticcheck@v0.8.2
STORE       := build/store
KEY         := build/keys/image.key
BOOTS       ?= 50
VOLUME_SIZE ?= dvd
export CGO_ENABLED = 0

# Debian packages: what the disc host, the image build and the lab use, what the
# tests use as peers and judges, and what the bench's floor is made of.
PACKAGES := curl e2fsprogs dosfstools mtools fdisk zstd xz-utils iproute2 openssh-client netbase \
	ipxe mmdebstrap debian-archive-keyring gpg arch-test \
	xorriso \
	qemu-system-x86 qemu-utils ipxe-qemu seabios ovmf libvirt-daemon libvirt-daemon-driver-qemu
TEST_PACKAGES := systemd dbus-daemon gdisk xfsprogs btrfs-progs rpm dnsmasq-base kea-admin atftp tcpdump chromium libnss3-tools nftables gcc libc6-dev openvswitch-switch go-sendxmpp openssl
BENCH_PACKAGES := kexec-tools cpio busybox-static

# Everything that goes into the programs, embedded files too.
SOURCES := $(shell find cmd provision pxe images hostprep vmtest -type f ! -name '*_test.go' ! -path '*/testdata/*' ! -path 'vmtest/demo/*')

.PHONY: help
help: ## list the targets
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

.PHONY: deps
deps: build/.deps ## install the Debian packages that building and the demo use (root)

build/.deps: Makefile
	@mkdir -p build
	@$(call install,$(PACKAGES))
	@command -v npm >/dev/null || { $(call install,npm); } # from wherever the site has it
	@touch $@

build/.test-deps: Makefile build/.deps
	@$(call install,$(TEST_PACKAGES))
	@touch $@

# install installs those of the packages $(1) that are missing. Their services
# are not started: the tests run daemons of their own.
install = missing=; for p in $(1); do dpkg-query -W -f '$${db:Status-Status}' $$p 2>/dev/null | grep -qx installed || missing="$$missing $$p"; done; \
	if [ -n "$$missing" ]; then \
		echo "installing:$$missing"; \
		export DEBIAN_FRONTEND=noninteractive; \
		if [ ! -e /usr/sbin/policy-rc.d ]; then trap 'rm -f /usr/sbin/policy-rc.d' EXIT; printf '\#!/bin/sh\nexit 101\n' > /usr/sbin/policy-rc.d; chmod 755 /usr/sbin/policy-rc.d; fi; \
		apt-get update -q && apt-get install -y -q --no-install-recommends $$missing; \
	fi

.PHONY: build
build: bin/platter bin/platter-node ## build bin/platter and bin/platter-node

bin/platter: $(SOURCES) go.mod go.sum
	$(GO) build -trimpath -o $@ ./cmd/platter

bin/platter-node: $(SOURCES) go.mod go.sum
	$(GO) build -trimpath -ldflags='-s -w' -o $@ ./cmd/platter-node

$(KEY): bin/platter
	@mkdir -p $(STORE) build/keys
	[ -e $@ ] || bin/platter image keygen --store $(STORE) $@
	@touch $@

.PHONY: image
image: deps build $(KEY) ## build the OS image and the installer's initramfs into build/store; reuses what has not changed
	bin/platter image build debian-13 --store $(STORE) --key $(KEY) --lock images/debian-13.lock --work build/image
	bin/platter image initramfs --store $(STORE) --key $(KEY) --node bin/platter-node --work build/image

.PHONY: release
release: image ## build the release of the built-in stack into build/store, for nodes that are to change to it
	bin/platter stack build --store $(STORE) --key $(KEY) --lock images/stack.lock --work build/image

# The programs that come with a set know its public key.
build/programs/platter: $(SOURCES) go.mod go.sum $(KEY)
	@mkdir -p $(@D)
	$(GO) build -trimpath -ldflags="-s -w -X platter/images.VendorKey=$$(tail -1 $(KEY).pub)" -o $@ ./cmd/platter

build/programs/platter-node: bin/platter-node
	@mkdir -p $(@D)
	cp $< $@

.PHONY: disc
disc: release build/programs/platter build/programs/platter-node ## build the default set of discs into build/disc; VOLUME_SIZE=cd|dvd|bd|N
	bin/platter disc build -f images/disc/default.yaml -o build/disc --volume-size $(VOLUME_SIZE) --store $(STORE) --key $(KEY) --platter build/programs/platter --node build/programs/platter-node

.PHONY: disc-demo
disc-demo: disc build/.test-deps ## a VM that boots from the disc installs blank VMs, ending with a delivered message
	PLATTER_DISC=$(CURDIR)/build/disc $(GO) test -tags e2e -timeout 60m -v -run 'TestDisc' ./vmtest

.PHONY: demo
demo: image ## two blank VMs become an IM cluster, ending with a delivered message
	vmtest/demo/run.sh up

.PHONY: demo-down
demo-down: ## take the demo away
	vmtest/demo/run.sh down

.PHONY: test
test: lint unit image e2e ## everything that CI runs

.PHONY: lint
lint: build ## gofmt, vet, staticcheck
	@bad=$$(gofmt -l cmd provision pxe hostprep images vmtest); [ -z "$$bad" ] || { echo "gofmt: $$bad"; exit 1; }
	$(GO) vet ./... && $(GO) vet -tags e2e,slow,bench,soak ./...
	$(GO) run $(STATICCHECK) -tags e2e,slow,bench,soak ./...

.PHONY: unit
unit: build/.test-deps ## unit tests and fuzz seeds, with the race detector
	CGO_ENABLED=1 $(GO) test -race -timeout 15m ./...

.PHONY: e2e
e2e: image build/.test-deps ## racks of VMs and of boxes, boxes first, which wait more than they work; then VMs, which want a core each
	$(MAKE) -j2 refusals boxes
	$(MAKE) -j2 host-vms rack-vms

.PHONY: refusals
refusals: image build/.test-deps ## VMs that are refused an install, and rack files that are
	$(GO) test -tags e2e -timeout 50m -v -run 'TestRefus|TestServe' ./vmtest

.PHONY: host-vms
host-vms: image build/.test-deps ## a VM that is a prepared host, with VMs of its own
	$(GO) test -tags e2e -timeout 50m -v -run 'TestHost' ./vmtest

.PHONY: rack-vms
rack-vms: image build/.test-deps build/programs/platter build/programs/platter-node ## VMs: a disc that boots, a rack from power-on to a chat message
	$(GO) test -tags e2e -timeout 50m -v -parallel 1 -run 'TestRack|TestDisc' ./vmtest

.PHONY: boxes
boxes: image build/.test-deps ## the service on the image's own systemd in namespaces, and clusters of real ejabberd
	bin/platter image export debian-13 root build/image/root.ext4 --store $(STORE)
	$(GO) test -tags e2e -timeout 50m -parallel 3 -v -run 'TestStack' ./vmtest
	PLATTER_TEST_ROOT=$(CURDIR)/build/image/root.ext4 $(GO) test -tags slow -timeout 20m -v ./provision/stack/...

.PHONY: bench
bench: image ## install beside an unverified floor, the service beside one started by hand, 1,000 users, the import of a set
	@$(call install,$(BENCH_PACKAGES))
	$(GO) test -tags bench -timeout 60m -v -run TestBench ./vmtest

.PHONY: soak
soak: image build/.test-deps ## many reboots and power cuts of a prepared host with VMs, beside the stock image; BOOTS=50. Ended by Ctrl-C it goes on next time
	PLATTER_SOAK=$(BOOTS) PLATTER_SOAK_DIR=$(CURDIR)/build/soak $(GO) test -tags soak -timeout 12h -v -run TestSoak ./vmtest
	rm -rf build/soak

.PHONY: soak-down
soak-down: ## take away the host of a soak that was not finished
	[ ! -e build/soak/lab ] || bin/platter lab down --state build/soak/lab --purge
	rm -rf build/soak

.PHONY: clean
clean: demo-down soak-down ## remove everything built
	rm -rf bin build
