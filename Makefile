# Each target is one line of intent; the scripts say what they do, and --help or their first
# lines say how. ARGS goes to the program behind a target: make bench ARGS=--quick

.DEFAULT_GOAL := help

help: ## show this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1\t\2/p' $(MAKEFILE_LIST) | expand -t 10

run: prepare ## build everything, start the daemon, run a command in a sandbox, keep serving
	scripts/serve --demo $(ARGS)

demo: prepare ## the same, but end after the command
	scripts/serve --demo --once $(ARGS)

test: ## all tests: native ones, then scenarios with real guests
	scripts/test $(ARGS)

soak: prepare ## the scenarios that can go on for long, for long
	MVS_SOAK_SEEDS=$${MVS_SOAK_SEEDS:-50} MVS_SOAK_OPERATIONS=$${MVS_SOAK_OPERATIONS:-1000} \
		MVS_SOAK_CYCLES=$${MVS_SOAK_CYCLES:-50} MVS_SOAK_SANDBOXES=$${MVS_SOAK_SANDBOXES:-20} \
		MVS_SOAK_KILLS=$${MVS_SOAK_KILLS:-4} tests/run hostile vmm_api snapshots kills $(ARGS)
	STREAM_MIB=$${STREAM_MIB:-1024} cargo test -p api --test streams long

fuzz: ## fuzz every target for ten minutes; ARGS='--seconds 60 qcow2' for one and less
	fuzz/run $(ARGS)

bench: prepare ## measure, beside peers, and print the table
	benches/run $(ARGS)

doctor: ## tell whether this machine's KVM runs Linux guests
	cargo run --quiet --release -p vmm -- doctor $(ARGS)

prepare: ## build binaries, guest kernel and root file system, side by side
	scripts/prepare

images: prepare ## the same: target/images holds what guests boot; TEMPLATES=linux-default for more

fmt: ## format the code
	cargo fmt --all
	cargo fmt --manifest-path tests/hostile-guest/Cargo.toml
	cargo fmt --manifest-path fuzz/Cargo.toml

lint: ## what CI checks before the tests
	cargo fmt --all --check
	cargo clippy --workspace --all-targets --locked -- -D warnings
	cargo fmt --manifest-path tests/hostile-guest/Cargo.toml --check
	cargo clippy --manifest-path tests/hostile-guest/Cargo.toml --release --locked --target-dir target/hostile-guest -- -D warnings
	cargo fmt --manifest-path fuzz/Cargo.toml --check
	RUSTFLAGS='--cfg fuzzing' cargo clippy --manifest-path fuzz/Cargo.toml --locked --target-dir target/fuzz-lint -- -D warnings

.PHONY: help run demo test soak fuzz bench doctor prepare images fmt lint
