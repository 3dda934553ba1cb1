# Two commands for a start: `make demo`, `make test`. Each installs what it needs first, and is quick the second time.

SHELL := /bin/bash
# The repository root must not be on sys.path (-P, PYTHONSAFEPATH): its supervisor/ would hide PyPI's.
export PYTHONSAFEPATH := 1
RUN := PATH="$(CURDIR)/.venv/bin:$$PATH:/usr/local/sbin:/usr/sbin:/sbin" .venv/bin/python -P

.DEFAULT_GOAL := help
.PHONY: help demo lab-up lab-down test vm-shell bench lint clean setup-demo setup-test types-tree

help:
	@echo "make demo      three nodes in network namespaces: pings, policies, workers killed, one table"
	@echo "make lab-up    the same three nodes, left standing for you to try; make lab-down removes them"
	@echo "make test      every test; make test ARGS='-k ipset tests/unit' for some"
	@echo "make vm-shell  a shell in the virtual machine in which tests/vm runs"
	@echo "make bench     measure into build/bench.json; make bench ONLY=id for one"
	@echo "make lint      ruff, import-linter, mypy"
	@echo "make clean     remove what was built here (.venv too)"

# Network namespaces and other users' processes: root, said before anything is installed.
define need_root
	@[ "$$(id -u)" = 0 ] || { echo "make $@: needs root, for network namespaces: sudo make $@" >&2; exit 1; }
endef

demo:
	$(need_root)
	@$(MAKE) --no-print-directory setup-demo
	@$(RUN) deploy/lab/lab.py demo

lab-up:
	$(need_root)
	@$(MAKE) --no-print-directory setup-demo
	@$(RUN) deploy/lab/lab.py up

lab-down:
	$(need_root)
	@[ ! -x .venv/bin/python ] || $(RUN) deploy/lab/lab.py down

test:
	$(need_root)
	@$(MAKE) --no-print-directory setup-test
	@$(RUN) -m pytest $(ARGS)

vm-shell:
	$(need_root)
	@$(MAKE) --no-print-directory setup-test
	@PYTHONPATH=tests $(RUN) -m support.vm

bench:
	$(need_root)
	@$(MAKE) --no-print-directory setup-test
	@$(RUN) tests/bench/run.py --out build/bench.json $(if $(ONLY),--only $(ONLY))

# All of them run, also after one has failed.
lint: types-tree
	@failed=; \
	check() { echo "lint: $$*"; "$$@" || failed="$$failed $${1##*/}"; }; \
	check .venv/bin/ruff check --output-format=concise .; \
	check .venv/bin/ruff format --check .; \
	PYTHONPATH=build/types check .venv/bin/lint-imports --no-cache --no-logo; \
	check .venv/bin/mypy -p kube_router; \
	check .venv/bin/mypy setup.py deploy tests; \
	[ -z "$$failed" ] || { echo "lint: failed:$$failed" >&2; exit 1; }

setup-demo:
	@deploy/setup/apt.sh demo
	@deploy/setup/python.sh run

setup-test:
	@deploy/setup/apt.sh test
	@deploy/setup/python.sh dev
	@deploy/setup/go-tools.sh

# Linters read the sources as kube_router.<folder>: through symbolic links, as the namespace has no folder of its own.
# The __init__.py makes it a regular package, so that it comes before the installed kube_router.
types-tree:
	@deploy/setup/python.sh dev
	@mkdir -p build/types/kube_router
	@for folder in _fast ipc supervisor workers; do ln -sfn ../../../$$folder build/types/kube_router/$$folder; done
	@touch build/types/kube_router/__init__.py
	@$(RUN) setup.py -q protos

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	rm -f _fast/*.c _fast/*.so workers/router/gobgp/*_pb2.py workers/router/gobgp/*_pb2.pyi
	find _fast ipc supervisor workers deploy tests -name __pycache__ -prune -exec rm -rf {} +
