# GNU make.  Everything runs from the checkout; the only thing built is .venv, with the test tools.

# nbdkit embeds the distribution's Python, and libnbd's module is installed for that one only.
PYTHON ?= /usr/bin/python3
FILE   ?= image.qed
SIZE   ?= 1G
JOBS   ?= 2
ARGS   ?=
export PYTHON FILE SIZE
# mke2fs and friends, for those who are not root.
export PATH := $(PATH):/usr/sbin:/sbin

MAKEFLAGS += --no-print-directory
venv_python := .venv/bin/python
need := sh tests/install.sh
# nbdinfo runs file(1), and prints garbage without it.
serving := python3 nbdkit nbdkit-plugin-python libnbd-bin file python3-libnbd qemu-utils
testing := $(serving) python3-venv e2fsprogs gnutls-bin strace python3-numpy

.DEFAULT_GOAL := help
.PHONY: help run demo check lint format bench clean

help:
	@echo 'make run      serve FILE (default image.qed, created with SIZE, default 1G) until Ctrl-C'
	@echo 'make demo     a round trip with a real file system: in, out, checked, compared'
	@echo "make check    run all tests; ARGS='...' goes to pytest, JOBS=N tests at a time (default 2)"
	@echo 'make lint     ruff and mypy --strict; "make format" applies the layout'
	@echo "make bench    compare with qemu-nbd; ARGS='...' goes to tests/bench/bench.py (try --help)"
	@echo 'make clean    remove .venv and caches'
	@echo
	@echo 'Missing tools are installed with apt-get (as root, or through sudo).'

run:
	@$(need) $(serving)
	@$(PYTHON) tests/serve.py

demo:
	@$(need) $(serving) e2fsprogs
	@sh tests/demo.sh

check:
	@$(need) $(testing)
	@$(MAKE) -s .venv/.stamp
	@$(venv_python) -m pytest -n $(JOBS) $(ARGS)

lint format:
	@$(need) python3 python3-venv
	@$(MAKE) -s .venv/.stamp
	@$(MAKE) .$@

.PHONY: .lint .format
.lint:
	$(venv_python) -m ruff check .
	$(venv_python) -m ruff format --check .
	$(venv_python) -m mypy

.format:
	$(venv_python) -m ruff check --fix .
	$(venv_python) -m ruff format .

bench:
	@$(need) $(serving) fio
	@$(PYTHON) tests/bench/bench.py $(ARGS)

# The venv sees the distribution's packages, for libnbd only: -I takes none of its test tools.  The
# project itself is not installed in it, so that tests always run against the checkout they are in.
.venv/.stamp: pyproject.toml
	@echo 'Setting up .venv'
	@rm -rf .venv
	@$(PYTHON) -m venv --system-site-packages .venv
	@$(venv_python) -c "$$EXTRAS" >.venv/requirements.txt
	@$(venv_python) -m pip install -q --disable-pip-version-check -I -r .venv/requirements.txt
	@touch $@

define EXTRAS
try:
    import tomllib
except ImportError:  # before Python 3.11
    from pip._vendor import tomli as tomllib
with open("pyproject.toml", "rb") as f:
    extras = tomllib.load(f)["project"]["optional-dependencies"]
print(*extras["test"], *extras["lint"], sep="\n")
endef
export EXTRAS

clean:
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
