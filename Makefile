# GNU make.  Everything runs from the checkout; "install" puts copies elsewhere.

# nbdkit embeds the distribution's Python, and libnbd's module is installed for that one only.
PYTHON ?= /usr/bin/python3
FILE   ?= image.qed
SIZE   ?= 1G
JOBS   ?= 2
ARGS   ?=
export PYTHON FILE SIZE

# For "install" and "uninstall".  PREFIX is ours, but nbdkit finds plugins by name in its own directory only.
PREFIX    ?= /usr/local
BINDIR    ?= $(PREFIX)/bin
DATADIR   ?= $(PREFIX)/share
MANDIR    ?= $(DATADIR)/man
NBDKIT    ?= nbdkit
PLUGINDIR ?= $(shell $(NBDKIT) --dump-config | sed -n 's/^plugindir=//p')
home       = $(DATADIR)/qed
version    = $(shell sed -n 's/^__version__ = "\(.*\)"/\1/p' qedcore/__init__.py)

# mke2fs and friends, for those who are not root.
export PATH := $(PATH):/usr/sbin:/sbin

MAKEFLAGS += --no-print-directory
venv_python := .venv/bin/python
need := sh tests/install.sh
serving := python3 nbdkit nbdkit-plugin-python
# After "--": what can be done without.  nbdinfo runs file(1), and prints garbage without it.
clients := libnbd-bin file python3-libnbd qemu-utils
testing := $(serving) python3-venv -- $(clients) e2fsprogs gnutls-bin strace python3-numpy perl fio fuse3 systemd

.DEFAULT_GOAL := help
.PHONY: help run demo check check-on crash fuzz soak lint format bench install uninstall deb clean

help:
	@echo 'make run      serve FILE (default image.qed, created with SIZE, default 1G) until Ctrl-C'
	@echo 'make demo     a round trip with a real file system: in, out, checked, compared'
	@echo "make check    run all tests; ARGS='...' goes to pytest, JOBS=N tests at a time (default 2)"
	@echo 'make check-on SUITE=trixie   all of the above and lint in a bare Debian: bookworm, trixie or sid (as root)'
	@echo "make crash    power loss at every step, simulated and of recorded servers; ARGS='--states N' (try --help)"
	@echo "make fuzz     hostile images, chosen by what they reach in the engine; ARGS='--minutes 60'"
	@echo "make soak     mixed work, ends and kills of the server, all verified; ARGS='--minutes 60' or '--kills 200'"
	@echo 'make lint     ruff and mypy --strict; "make format" applies the layout'
	@echo "make bench    compare with qemu-nbd, half an hour; ARGS='--rows open,check', '--scale' (try --help)"
	@echo 'make install  so that "nbdkit qed file=IMAGE" and "qed" work, with manual pages; "make uninstall" undoes it;'
	@echo '              PREFIX=/usr/local, DESTDIR=, and PLUGINDIR=, which nbdkit tells'
	@echo "make deb      Debian packages in build/deb/: nbdkit-plugin-qed and qed-utils"
	@echo 'make clean    remove .venv and caches'
	@echo
	@echo 'Missing tools are installed with apt-get, dnf or zypper (as root, or through sudo).'

run:
	@$(need) $(serving) -- $(clients)
	@$(PYTHON) tests/serve.py

demo:
	@$(need) $(serving) libnbd-bin file e2fsprogs -- qemu-utils
	@sh tests/demo.sh

check:
	@$(need) $(testing)
	@$(MAKE) -s .venv/.stamp
	@$(venv_python) -m pytest -n $(JOBS) $(ARGS)

# KEEP=DIR keeps the system there, for the next time.
check-on:
	@$(need) mmdebstrap git
	@JOBS=$(JOBS) tests/on_suite.sh $(if $(KEEP),-k "$(KEEP)") $(SUITE) $(if $(COMMAND),'$(COMMAND)')

crash:
	@$(need) $(testing)
	@$(MAKE) -s .venv/.stamp
	@$(venv_python) tests/crash/run.py $(ARGS)

fuzz:
	@$(need) $(testing)
	@$(MAKE) -s .venv/.stamp
	@$(venv_python) -m pip install -q --disable-pip-version-check 'atheris>=3,<4'
	@$(venv_python) tests/fuzz/guided.py $(ARGS)

soak:
	@$(need) $(testing)
	@$(MAKE) -s .venv/.stamp
	@$(venv_python) tests/soak/soak.py $(ARGS)

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
	@$(need) $(serving) $(clients) python3-venv python3-numpy fio
	@$(MAKE) -s .venv/.bench
	@$(venv_python) tests/bench/bench.py $(ARGS)

# The venv sees the distribution's packages, for libnbd only: -I takes none of its test tools.  The
# project itself is not installed in it, so that tests always run against the checkout they are in.
.venv/.stamp: pyproject.toml
	@echo 'Setting up .venv'
	@rm -rf .venv
	@$(PYTHON) -m venv --system-site-packages .venv
	@$(venv_python) -c "$$EXTRAS" test lint >.venv/requirements.txt
	@$(venv_python) -m pip install -q --disable-pip-version-check -I -r .venv/requirements.txt
	@touch $@

.venv/.bench: .venv/.stamp
	@$(venv_python) -c "$$EXTRAS" bench >.venv/requirements.txt
	@$(venv_python) -m pip install -q --disable-pip-version-check -r .venv/requirements.txt
	@touch $@

define EXTRAS
import sys
try:
    import tomllib
except ImportError:  # before Python 3.11
    from pip._vendor import tomli as tomllib
with open("pyproject.toml", "rb") as f:
    extras = tomllib.load(f)["project"]["optional-dependencies"]
print(*(package for extra in sys.argv[1:] for package in extras[extra]), sep="\n")
endef
export EXTRAS

# nbdkit runs a program called nbdkit-NAME-plugin in its plugin directory for NAME.  The link leads to the
# script, whose real path tells it where qedcore is.  -s: what is compiled does not name DESTDIR.
install:
	@$(need) python3 nbdkit nbdkit-plugin-python perl
	@test -n "$(PLUGINDIR)" || { echo 'PLUGINDIR= is needed: $(NBDKIT) --dump-config tells none' >&2; exit 1; }
	install -d "$(DESTDIR)$(BINDIR)" "$(DESTDIR)$(home)/plugin" "$(DESTDIR)$(MANDIR)/man1" \
	    "$(DESTDIR)$(DATADIR)/bash-completion/completions" "$(DESTDIR)$(PLUGINDIR)"
	for file in $$(find qedcore -name '*.py'); do \
	    install -D -m 644 $$file "$(DESTDIR)$(home)/$$file" || exit 1; \
	done
	sed "1s|.*|#!$$(command -v $(NBDKIT)) python|" plugin/qed.py >"$(DESTDIR)$(home)/plugin/qed.py"
	chmod 755 "$(DESTDIR)$(home)/plugin/qed.py"
	ln -sfn "$(home)/plugin/qed.py" "$(DESTDIR)$(PLUGINDIR)/nbdkit-qed-plugin"
	printf '%s\n' '#!$(PYTHON)' 'import sys' '' 'sys.path.insert(0, "$(home)")' \
	    'from qedcore.__main__ import main' '' 'main()' >"$(DESTDIR)$(BINDIR)/qed"
	chmod 755 "$(DESTDIR)$(BINDIR)/qed"
	$(PYTHON) -m compileall -q -f $(if $(DESTDIR),-s "$(DESTDIR)") "$(DESTDIR)$(home)/qedcore"
	for page in qed nbdkit-qed-plugin; do \
	    pod2man --utf8 --section=1 --center=QED --release="$(version)" plugin/$$page.pod \
	        "$(DESTDIR)$(MANDIR)/man1/$$page.1" || exit 1; \
	done
	install -m 644 qedcore/cli/completion.bash "$(DESTDIR)$(DATADIR)/bash-completion/completions/qed"

uninstall:
	@test -n "$(PLUGINDIR)" || { echo 'PLUGINDIR= is needed: $(NBDKIT) --dump-config tells none' >&2; exit 1; }
	rm -rf "$(DESTDIR)$(home)/qedcore" "$(DESTDIR)$(home)/plugin"
	if [ -d "$(DESTDIR)$(home)" ]; then rmdir "$(DESTDIR)$(home)"; fi
	rm -f "$(DESTDIR)$(PLUGINDIR)/nbdkit-qed-plugin" "$(DESTDIR)$(BINDIR)/qed" \
	    "$(DESTDIR)$(MANDIR)/man1/qed.1" "$(DESTDIR)$(MANDIR)/man1/nbdkit-qed-plugin.1" \
	    "$(DESTDIR)$(DATADIR)/bash-completion/completions/qed"

# The build has a copy, as it wants debian/ at the top and leaves its own files there.  Its time is the last commit's.
deb_sources = qedcore plugin packaging tests/install.sh Makefile README.md CHANGELOG.md LICENSE
deb:
	@$(need) $(serving) perl build-essential debhelper dh-python lintian
	rm -rf build/deb
	mkdir -p build/deb/qed
	tar -c --exclude=__pycache__ $(deb_sources) | tar -x -C build/deb/qed
	cp -R packaging/debian build/deb/qed/debian
	printf '%s\n' 'qed ($(version)) unstable; urgency=medium' '' '  * See CHANGELOG.md.' '' \
	    " -- $$(sed -n 's/^Maintainer: //p' packaging/debian/control)  $$(git log -1 --format=%cD 2>/dev/null || date -R)" \
	    >build/deb/qed/debian/changelog
	cd build/deb/qed && dpkg-buildpackage -us -uc
	rm -rf build/deb/qed
	lintian --allow-root --fail-on error,warning build/deb/*.changes

clean:
	rm -rf .venv build .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
