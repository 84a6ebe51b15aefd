# make demo | make test | make lab1|lab2|assignment SCALE=quick|laptop|full | make report | make data | make pages | make badges | make student|grade|course-check LAB=Lab2 | make doctor | make bench | make clean
SCALE ?= quick
LAB ?= Lab2
VENV ?= .venv
RUNS_DIR ?= runs
PYTHON ?= python3
BIN := $(VENV)/bin
LAB1 := baseline advanced speedrun under_5m cifar100
LAB2 := sparsity_train modelprune train_prune_model
export RUNS_DIR
export PYDEVD_DISABLE_FILE_VALIDATION := 1

.PHONY: demo test test-long lab1 lab2 assignment report data pages badges student grade course-check doctor bench clean

$(VENV)/installed: requirements.txt requirements-dev.txt pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 10))" \
		|| { echo "Python 3.10 or newer is needed: make PYTHON=python3.12"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -r requirements-dev.txt
	touch $@

# A fresh chain at scale quick, in a folder of its own.
demo: $(VENV)/installed
	rm -rf runs/demo
	@$(MAKE) --no-print-directory lab2 SCALE=quick RUNS_DIR=runs/demo
	@echo; sed -n '/^## Results/,/^!/{/^|/p;}' runs/demo/reports/lab2_train_prune_model.md
	@echo; ls runs/demo/notebooks/*.ipynb runs/demo/reports/*.md

# A stopped chain goes on where it was.
lab1: $(VENV)/installed
	@$(call run,Lab1,$(LAB1))

lab2: $(VENV)/installed
	@$(call run,Lab2,$(LAB2))

assignment: $(VENV)/installed
	@$(call run,Assignment_MobileNet,hyperparameter_study)

# Only so do notebooks write to reports/: all as committed, with the settings of a real scale.
report: SCALE = laptop
report: $(VENV)/installed
	git diff --quiet HEAD -- Lab1 Lab2 Assignment_MobileNet common || { echo "commit or undo your changes first"; exit 1; }
	WORKBOOK_REPORT=1 $(MAKE) --no-print-directory lab1 lab2 assignment SCALE=$(SCALE)

define run
	mkdir -p "$(RUNS_DIR)/notebooks"; \
	for name in $(2); do \
		echo "$(1)/$$name.ipynb, scale $(SCALE)"; \
		$(BIN)/papermill $(1)/$$name.ipynb "$(RUNS_DIR)/notebooks/$$name-$(SCALE).ipynb" -p scale $(SCALE) \
			--log-output --log-level WARNING --no-progress-bar || exit 1; \
	done
endef

test: $(VENV)/installed
	$(BIN)/ruff check .
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -rs --nbval-lax -n 2 --dist loadscope

test-long: $(VENV)/installed
	OMP_NUM_THREADS=2 $(BIN)/python -m pytest -q -rs tests/long_scales.py  # in order: they build on each other

# Both data sets, before a lesson needs them.
data: $(VENV)/installed
	$(BIN)/python -m common.sources

# Lessons and reports as web pages, in $(RUNS_DIR)/pages; what did not change is not run again.
pages: $(VENV)/installed
	$(BIN)/python -m common.course pages

# The repository's address, written into every lesson; make badges TAG=v1.0 before that release.
badges: $(VENV)/installed
	$(BIN)/python -m common.course badges $(if $(TAG),--tag $(TAG))

# The student's edition of a lab, without solutions, in $(RUNS_DIR)/course/student; see TEACHING.md.
student: $(VENV)/installed
	@$(BIN)/python -m common.course student $(LAB)

# Grades and feedback for what lies in $(RUNS_DIR)/course/submitted; runs code that others wrote.
grade: $(VENV)/installed
	@$(BIN)/python -m common.course grade $(LAB)

# Five made-up hand-ins of a lab, graded in a temporary folder: does each get the points it should?
course-check: $(VENV)/installed
	@OMP_NUM_THREADS=1 $(BIN)/python -m tests.course_check $(LAB)

doctor: $(VENV)/installed
	@$(BIN)/python -m common.doctor || true

bench: $(VENV)/installed
	$(BIN)/python -m tests.bench.loader

clean:
	rm -rf runs/demo
