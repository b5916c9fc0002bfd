# What people run. `make` alone lists it.

.DEFAULT_GOAL := help
SHELL := /bin/sh
CARGO ?= cargo
PYTHON ?= python3

tools := target/tools
cargo_deny := $(or $(shell command -v cargo-deny),$(tools)/bin/cargo-deny)
cargo_deny_version := 0.20.2

# Debian keeps venv in a package of its own.
install_venv = { apt-get install -y python3-venv && $(PYTHON) -m venv --clear $(tools)/python; } || \
	{ echo 'Python has no venv here. As root, run: apt-get install -y python3-venv' >&2; exit 1; }

.PHONY: help demo dev test check fmt clippy doc deny scripts rust-tests officers hsm-modules foreign-client pages browser bench clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-15s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: ## the whole way of a device, once, on a SoftHSM of its own; what it made stays in target/demo/
	@deploy/demo/demo.sh

dev: ## the same, with the daemon left running and the commands to try printed; Ctrl-C ends it
	@deploy/demo/demo.sh --keep-running

test: ## every check and every test (installs SoftHSM and test tools where they are missing)
	@$(MAKE) --no-print-directory check
	@$(MAKE) --no-print-directory rust-tests
	@$(MAKE) --no-print-directory officers
	@$(MAKE) --no-print-directory foreign-client
	@$(MAKE) --no-print-directory pages
	@echo 'make test: everything passed'

check: fmt clippy doc deny scripts ## what needs no HSM: format, lints, documentation, licences, scripts

fmt:
	$(CARGO) fmt --check

clippy:
	$(CARGO) clippy --locked --all-targets -- -D warnings

doc:
	RUSTDOCFLAGS='-D warnings' $(CARGO) doc --locked --no-deps

deny: $(cargo_deny)
	$(cargo_deny) --locked check bans licenses sources

scripts: $(tools)/python/done
	$(tools)/python/bin/shellcheck softhsm-setup/*.sh deploy/demo/*.sh tests/*/*.sh .ci/run
	$(tools)/python/bin/hadolint deploy/Dockerfile

rust-tests: hsm-modules ## the tests in Rust; `cargo test NAME` runs one
	softhsm-setup/setup.sh --install-only
	$(CARGO) test --locked

officers: ## the commands of docs/officers.md, in order
	softhsm-setup/setup.sh --install-only
	$(CARGO) build --locked --bins
	tests/docs/officers.sh

hsm-modules: ## PKCS#11 modules beside SoftHSM, for the conformance suite: Kryoptic is built once, opencryptoki installed
	tests/modules/setup.sh

foreign-client: $(tools)/python/done ## devices of a client that shares no code with us, and the certificates under a foreign lint
	softhsm-setup/setup.sh --install-only
	PATH="$(CURDIR)/$(tools)/python/bin:$$PATH" deploy/demo/demo.sh --directory target/foreign-client --profile dev -- \
	    tests/clients/run.sh

pages: $(tools)/python/done browser ## a person with a browser on the public pages; pictures go to target/pages/pages/screenshots
	softhsm-setup/setup.sh --install-only
	PATH="$(CURDIR)/$(tools)/python/bin:$$PATH" deploy/demo/demo.sh --directory target/pages --profile dev -- \
	    tests/pages/run.sh

browser:
	@command -v chromium >/dev/null && command -v chromedriver >/dev/null || \
	    apt-get install -y --no-install-recommends chromium chromium-driver || \
	    { echo 'The pages are tested in Chromium. As root, run: apt-get install -y chromium chromium-driver' >&2; exit 1; }

bench: ## the benchmarks
	$(CARGO) bench --locked

# A debug build of cargo-deny takes a minute, a release build of it (fat LTO) many.
$(tools)/bin/cargo-deny:
	$(CARGO) install cargo-deny --version $(cargo_deny_version) --locked --debug --root $(tools) --config 'profile.dev.debug=false'

$(tools)/python/done: tests/clients/requirements.txt
	$(PYTHON) -m venv --clear $(tools)/python || $(install_venv)
	$(tools)/python/bin/pip --quiet --disable-pip-version-check install --requirement tests/clients/requirements.txt
	touch $@

clean: ## removes target/ with everything the demo made
	$(CARGO) clean
