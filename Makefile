# make demo    create, save, restore and migrate a guest on two hosts, with the proof at the end
# make test    the whole test suite            make test-fast   without the slow ones
# make test-realxen        images to and from a real Xen 4.17, which runs in QEMU (5 minutes);
# make test-realxen XEN="4.14 4.17 4.20"    all that Debian has. Needs qemu-system-x86 and cpio.
# make fuzz-guest MINUTES=60   hostile guests, one after the other, for so long (SEED=N: from that one)
# make test-boots BOOTS=50      distributions' kernels, booted so many times each, idle and busy;
# make test-cycles CYCLES=100   at work, saved, restored, checkpointed, cancelled so many times each.
#                               Both need XSAVE_DISTRO_KERNELS (tests/distro/fetch), and hours.
# make test-migrations N=500    migrations in a row of a busy guest, with random faults (half an hour
#                               for each hundred)
# make check   lint, formatting, types
#
# Each does all of its own set-up: the first run makes .venv and installs xsave into it (editable).
# Needs python3 (3.11 or newer) and make; python3-venv is fetched with apt-get when run by root.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check -q install

XEN ?= 4.17
# The tests of a file stay together, on one of as many workers as there are CPUs, 4 at most.
WORKERS ?= $(shell nproc | awk '{ print $$1 < 4 ? $$1 : 4 }')
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

MINUTES ?= 60
BOOTS ?= 50
CYCLES ?= 100
N ?= 50

.PHONY: demo test test-fast test-realxen test-boots test-cycles test-migrations fuzz-guest check clean

demo: $(VENV)/run.stamp
	@$(BIN)/xsave demo

test: $(VENV)/test.stamp
	@$(PYTEST) $(PYTEST_ARGS)

test-fast: $(VENV)/test.stamp
	@$(PYTEST) -m "not slow" $(PYTEST_ARGS)

test-realxen: $(VENV)/test.stamp
	@XSAVE_REALXEN="$(XEN)" $(BIN)/python -m pytest tests/realxen $(PYTEST_ARGS)

fuzz-guest: $(VENV)/test.stamp
	@PYTHONPATH=. $(BIN)/python -m tests.fuzz.guest --minutes $(MINUTES) $(if $(SEED),--seed $(SEED))

# One after the other: how busy the machine is, they see to themselves.
test-boots: $(VENV)/test.stamp
	@XSAVE_BOOTS=$(BOOTS) $(BIN)/python -m pytest tests/distro/test_boots.py $(PYTEST_ARGS)

test-cycles: $(VENV)/test.stamp
	@XSAVE_CYCLES=$(CYCLES) $(BIN)/python -m pytest -s tests/distro/test_cycles.py $(PYTEST_ARGS)

test-migrations: $(VENV)/test.stamp
	@XSAVE_MIGRATIONS=$(N) $(BIN)/python -m pytest -s tests/flows/test_handover.py \
		-k migrations_in_a_row $(PYTEST_ARGS)

check: $(VENV)/dev.stamp
	@$(BIN)/ruff check xsave tests
	@$(BIN)/ruff format --check xsave tests
	@$(BIN)/mypy

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(VENV)/python.stamp:
	@PYTHON="$(PYTHON)" VENV="$(VENV)" sh .ci/make-venv
	@touch $@

$(VENV)/run.stamp: $(VENV)/python.stamp pyproject.toml
	@echo "installing xsave into $(VENV)"
	@$(PIP) -e .
	@touch $@

$(VENV)/test.stamp: $(VENV)/run.stamp
	@$(PIP) -e ".[test]"
	@touch $@

$(VENV)/dev.stamp: $(VENV)/test.stamp
	@$(PIP) -e ".[test,dev]"
	@touch $@
