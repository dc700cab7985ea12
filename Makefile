# Every target and variable that a person may use carries a `##` line; `make help` shows exactly those.
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

## RUN=name          the run's folder below runs/ (default: the preset's name)
## PRESET=quick|full size of test-only, no-training, no-benchmark, arena, sweep (default: quick)
## SET="a.b=1 c.d=2" any setting, such as "train.learning_rate=3e-4 model.n_layers=4" (lists: [1024,2048])
## SEED=0            of data, weights and order
## DATA=path         a .txt, .md, .py or .jsonl file or a folder of them (default: Python's own sources)
## NPROC=1           processes that train together
## FORCE=1           run the chosen phases again, from their beginning
## YES=1             start a full run although there is no GPU
## TORCH_INDEX=url   where pip may find another build of torch, for a Linux machine without a GPU:
##                   https://download.pytorch.org/whl/cpu (hundreds of megabytes instead of gigabytes)
RUN_VARIABLES := RUN PRESET SET SEED DATA NPROC FORCE YES
# A value reaches Python as one quoted word and is never expanded, neither by make nor by the shell.
unexport $(RUN_VARIABLES)
quoted = '$(1)=$(subst ','\'',$(value $(1)))'
ARGUMENTS = $(foreach name,$(RUN_VARIABLES),$(if $(value $(name)),$(call quoted,$(name))))
export TORCH_INDEX
export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))

given := $(foreach name,$(.VARIABLES),$(if $(filter command,$(firstword $(origin $(name)))),$(name)))
unknown := $(filter-out $(RUN_VARIABLES) TORCH_INDEX,$(given))
ifneq ($(unknown),)
$(error unknown variable $(unknown); allowed: $(RUN_VARIABLES) TORCH_INDEX)
endif

# The interpreter that serves: any from 3.11 on prepares the environment, the environment's own does the work.
find_python = for python in python3 python3.11 python3.12 python3.13 none; do \
	  if [ $$python = none ]; then echo "Python 3.11 or newer is needed, and none was found" >&2; exit 2; fi; \
	  if $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2> /dev/null; then break; fi; \
	done; \
	py=$$($$python -m lshv2.environment $(1))

.PHONY: help quick full test-only no-training no-benchmark arena sweep package dashboard lab test lint clean-run lock

help: ## this text
	@echo 'make TARGET [VARIABLE=value ...]'; echo; echo 'targets'
	@sed -n -E 's/^([a-z][a-z-]*):.*## (.*)/  \1|\2/p' $(firstword $(MAKEFILE_LIST)) | while IFS='|' read -r t d; do printf '  %-14s %s\n' $$t "$$d"; done
	@echo; echo 'variables'; sed -n -E 's/^## (.*)/  \1/p' $(firstword $(MAKEFILE_LIST))

quick: ## every phase at laptop size: five minutes on two cores
full: ## every phase at the documented size (asks for a GPU)
test-only: ## phases 01_model and 02_data
no-training: ## all but 03_train: benchmark what is trained already
no-benchmark: ## all but 04_benchmark and 04_arena
arena: ## 04_arena alone: accuracy by length (PRESET=full for all tasks, models and lengths)
sweep: ## the arena's quality curve: a notebook's parameters swept over rounds, bucket size and cells
package: ## 05_report alone: manifest, pictures and the zip of a run
quick full test-only no-training no-benchmark arena sweep package:
	@$(call find_python); exec "$$py" -m lshv2 $@ $(ARGUMENTS)

dashboard: ## the runs in a browser, at http://127.0.0.1:8501
	@$(call find_python); exec "$$py" -m streamlit run dashboard/app.py

lab: ## JupyterLab on the notebooks, at http://127.0.0.1:8888
	@$(call find_python); root=; if [ "$$(id -u)" = 0 ]; then root=--allow-root; fi; \
	exec "$$py" -m jupyterlab $$root --ServerApp.ip=127.0.0.1 --ServerApp.root_dir="$$PWD"

test: ## lint, the test suite and every notebook at its smallest size
	@$(call find_python,test); $(lint); \
	runs=$$(mktemp -d); trap 'rm -rf "$$runs"' EXIT; export LSHV2_RUNS="$$runs"; \
	"$$py" -m pytest -n 2 tests; \
	export OMP_NUM_THREADS=1; notebooks="--nbmake --nbmake-timeout=120 notebooks"; \
	"$$py" -m pytest -n 2 $$notebooks || { \
	  echo 'once more, those alone: a kernel now and then loses its reply (seen with ipykernel 7.4)'; \
	  "$$py" -m pytest --last-failed $$notebooks; }

lint: ## style, types, and notebooks without outputs
	@$(call find_python,test); $(lint)

lint = "$$py" -m ruff check .; "$$py" -m mypy; \
	"$$py" -m nbstripout --verify --keep-id notebooks/*.ipynb

clean-run: ## delete a run: make clean-run RUN=name
	@$(call find_python); exec "$$py" -m lshv2 $@ $(ARGUMENTS)

lock: ## resolve pyproject.toml again into .requirements.lock and environment.yml
	@$(call find_python); exec "$$py" -m lshv2.environment lock
