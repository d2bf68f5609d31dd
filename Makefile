# How efficient are RAT, attention and the linear recurrences? `make help` lists the targets.
#
# Everything is built into $(BUILD) by wildcard: a new file in a folder below needs no line here.

BUILD ?= build
CC := gcc
MARCH ?= native
NVCC ?= $(firstword $(shell command -v nvcc 2>/dev/null) $(wildcard /usr/local/cuda/bin/nvcc))
# Of WSL2 a GPU is /dev/dxg.
GPU := $(wildcard /dev/nvidia0 /dev/nvidiactl /dev/dxg)
CUDA ?= $(if $(and $(NVCC),$(GPU)),1,0)
ifeq ($(origin CUDA)$(MAKELEVEL),file0)
$(if $(and $(GPU),$(if $(NVCC),,1)),$(warning a GPU but no nvcc: the build is without CUDA))
endif
SAN ?=
FUZZ_SECONDS ?= 30
ARGS ?=
PYTHON ?= python3
# make V=1 shows the commands.
Q := $(if $(V),,@)

ifeq ($(SAN),)
OPTIMIZE := -O3 -march=$(MARCH) -g
else
OPTIMIZE := -O1 -march=$(MARCH) -g -fno-omit-frame-pointer -fsanitize=$(SAN) \
	-fno-sanitize-recover=all
endif
CPPFLAGS := -I. -I$(BUILD) $(if $(filter 1,$(CUDA)),-DWITH_CUDA)
# Clang warns of loops that it cannot vectorize.
CLANG := $(findstring clang,$(shell $(CC) --version 2>/dev/null))
CFLAGS := -std=c11 $(OPTIMIZE) -Wall -Wextra -Wno-unused-parameter -Werror -Wshadow -fopenmp \
	$(if $(CLANG),-Wno-pass-failed) -fno-math-errno -fno-trapping-math -ffp-contract=fast \
	-fPIC -fvisibility=hidden
LDFLAGS := $(if $(SAN),-fsanitize=$(SAN)) -fopenmp
LDLIBS := -lopenblas -lm

# bench/foo.c is a program unless there is a bench/foo.h: then it is shared by programs.
SHARED := $(filter $(patsubst %.h,%.c,$(wildcard bench/*.h)),$(wildcard bench/*.c))
SOURCES := $(wildcard kernels/*.c kernels/cpu/*.c kernels/operations/*.c kernels/reference/*.c \
	baselines/*.c layers/*.c bench/harness/*.c) bench/block.c \
	bench/generate.c bench/kernel_bench.c \
	bench/stack_case.c
PROGRAMS := $(patsubst bench/%.c,$(BUILD)/%,$(filter-out $(SHARED),$(wildcard bench/*.c)))
FAMILY := linear_attention retnet mamba2 gla hgrn hgrn2 delta_net gated_delta_net kda rwkv6
# Programs of one layer: build/hybrid by another name.
LAYER_PROGRAMS := $(addprefix $(BUILD)/,attention recurrence rat ratplus mamba hawk griffin_attention $(FAMILY))
DRIVERS := $(LAYER_PROGRAMS) $(filter $(addprefix $(BUILD)/,hybrid throughput \
	kernel_latency chunkwise report compare plotdata publish),$(PROGRAMS))
TESTS := $(patsubst %.c,$(BUILD)/%,$(wildcard tests/test_*.c))
TEST_SUPPORT := $(patsubst %.c,$(BUILD)/%.o,$(filter-out tests/test_% tests/fake_%,$(wildcard tests/*.c)))
TEST_LIBRARY := $(BUILD)/libtests.a

SM90A := -gencode arch=compute_90a,code=sm_90a

ifeq ($(CUDA),1)
ifeq ($(NVCC),)
$(error CUDA=1 needs nvcc, which was found neither in PATH nor in /usr/local/cuda/bin)
endif
CUDA_HOME ?= $(patsubst %/bin/nvcc,%,$(realpath $(NVCC)))
CPPFLAGS += -isystem $(CUDA_HOME)/include
LDFLAGS += -L$(CUDA_HOME)/lib64 -Wl,-rpath,$(CUDA_HOME)/lib64
LDLIBS += -lcudart_static -lstdc++ -ldl -lrt -lpthread
SOURCES += $(foreach d,kernels/cuda kernels/portable kernels/hopper baselines/*, \
	$(wildcard $(d)/*.c $(d)/*.cu))
GPU_TESTS := $(patsubst %.c,$(BUILD)/%,$(wildcard tests/gpu/test_*.c))
GPU_TEST_SUPPORT := $(patsubst %,$(BUILD)/%.o,$(wildcard tests/gpu/*.cu))
HOST_FLAGS := $(shell scripts/nvcc_host.sh '$(NVCC)' $(if $(filter-out 0,$(MAKELEVEL)),2>/dev/null))
NVCCFLAGS := $(HOST_FLAGS) -std=c++17 -O3 -lineinfo -I. -DWITH_CUDA -Xcompiler -Wall,-Wextra,-Wno-unused-parameter,-Werror,-fPIC
PTX80 := -gencode arch=compute_80,code=compute_80
# What uses instructions of sm_90a itself is for no other device.
ARCHITECTURES := $(SM90A) $(PTX80)
$(BUILD)/kernels/hopper/%.cu.o $(BUILD)/tests/gpu/%.cu.o: ARCHITECTURES := $(SM90A)
endif

LIBRARY := $(BUILD)/libblocks.a
# For other programs: operations and layers behind layers/blocks.h. SONAME changes when that does.
SONAME := libblocks.so.0
SHARED_LIBRARY := $(BUILD)/$(SONAME)
# The same with other people's kernels, for baselines/torch/peers.py.
PEERS_LIBRARY := $(BUILD)/libblocks-peers.so
PREFIX ?= /usr/local
# What reads golden files is apart, because it needs cJSON and measuring does not.
GOLDEN_OBJECTS := $(patsubst %.c,$(BUILD)/%.o,$(filter-out $(SOURCES),$(SHARED)))
OBJECTS := $(patsubst %,$(BUILD)/%.o,$(basename $(filter %.c,$(SOURCES)))) \
	$(patsubst %,$(BUILD)/%.o,$(filter %.cu,$(SOURCES)))
SHARED_OBJECTS := $(filter $(BUILD)/kernels/% $(BUILD)/layers/%,$(OBJECTS))
PEERS_OBJECTS := $(SHARED_OBJECTS) $(filter $(BUILD)/baselines/%,$(OBJECTS))

.PHONY: all programs drivers tests peers help flash3 bench-latency bench-generation bench-family bench-kernels \
	bench-chunkwise bench-peers peers-tables table2 compare plots report publish test test-gpu check asan fuzz golden judge clean run-latency \
	library install FORCE
.DEFAULT_GOAL := all
.SECONDARY:
.DELETE_ON_ERROR:

# Nothing else may run beside a measurement; the builds below it are parallel all the same.
ifneq ($(filter bench-% table2 compare run-latency,$(MAKECMDGOALS)),)
.NOTPARALLEL:
endif

all: programs tests library
library: $(SHARED_LIBRARY)
peers: $(PEERS_LIBRARY)
programs: $(PROGRAMS) $(LAYER_PROGRAMS)
drivers: $(DRIVERS)
tests: $(TESTS) $(GPU_TESTS)

$(BUILD)/%.o: %.c $(BUILD)/flags
	@mkdir -p $(@D)
	@echo "compile $<"
	$(Q)$(CC) $(CPPFLAGS) $(CFLAGS) -MMD -MP -MF $(@:.o=.d) -c -o $@ $<

$(BUILD)/%.cu.o: %.cu $(BUILD)/flags
	@mkdir -p $(@D)
	@echo "compile $<"
	$(Q)$(NVCC) $(NVCCFLAGS) $(ARCHITECTURES) -MMD -MP -MF $(@:.o=.d) -c -o $@ $<

$(LIBRARY): $(OBJECTS)
$(TEST_LIBRARY): $(TEST_SUPPORT) $(GOLDEN_OBJECTS)
$(LIBRARY) $(TEST_LIBRARY):
	@rm -f $@
	@ar rcs $@ $^

$(SHARED_LIBRARY): $(SHARED_OBJECTS)
$(PEERS_LIBRARY): $(PEERS_OBJECTS)
$(SHARED_LIBRARY) $(PEERS_LIBRARY): layers/blocks.map
	@echo "link    $@"
	$(Q)$(CC) -shared $(LDFLAGS) -Wl,-soname,$(SONAME),--version-script=layers/blocks.map -o $@ \
		$(filter %.o,$^) $(LDLIBS)
	$(Q)[ $@ != $(SHARED_LIBRARY) ] || ln -sf $(SONAME) $(BUILD)/libblocks.so

$(PROGRAMS): $(BUILD)/%: $(BUILD)/bench/%.o $(LIBRARY)
	@echo "link    $@"
	$(Q)$(CC) $(LDFLAGS) -o $@ $(filter %.o,$^) $(LIBRARY) $(LDLIBS)

$(LAYER_PROGRAMS): $(BUILD)/hybrid
	@ln -f $< $@

$(BUILD)/golden: $(GOLDEN_OBJECTS)
$(BUILD)/golden: LDLIBS += -lcjson

$(GPU_TESTS): $(GPU_TEST_SUPPORT)
# Asks a management library of its own, in a build without CUDA too.
$(BUILD)/tests/test_conditions: $(BUILD)/kernels/cuda/nvml.o | $(BUILD)/tests/libfake_nvml.so
$(BUILD)/tests/test_conditions: LDLIBS += -ldl
$(BUILD)/tests/libfake_%.so: tests/fake_%.c
	@mkdir -p $(@D)
	$(Q)$(CC) $(CFLAGS) -fvisibility=default -shared -o $@ $<
# It lies about operations to see that it matters.
$(BUILD)/tests/test_links: LDFLAGS += -Wl,--wrap=operation_describe
$(TESTS) $(GPU_TESTS): $(BUILD)/%: $(BUILD)/%.o $(TEST_LIBRARY) $(LIBRARY)
	@echo "link    $@"
	$(Q)$(CC) $(LDFLAGS) -o $@ $(filter %.o,$^) $(filter %.a,$^) -lcmocka -lcjson $(LDLIBS)

# build/hybrid with a slowdown that is known: tests/experiments/compare_rates.sh
$(BUILD)/experiments/hybrid: $(BUILD)/bench/hybrid.o $(BUILD)/tests/experiments/slowed.o $(LIBRARY)
	@mkdir -p $(@D)
	@echo "link    $@"
	$(Q)$(CC) $(LDFLAGS) -Wl,--wrap=stack_run -o $@ $(filter %.o,$^) $(LIBRARY) $(LDLIBS)

# FlashAttention-3, a baseline: its kernels, from a checkout of it, and a C function around them. The
# flags are those of its setup.py; its own switches leave out what is not measured here.
ifdef FLASH_ATTENTION
CUTLASS ?= $(FLASH_ATTENTION)/csrc/cutlass
FLASH3_VERSION := $(if $(wildcard $(FLASH_ATTENTION)/.git),$(shell \
	git -C $(FLASH_ATTENTION) rev-parse --short HEAD))
FLASH3_KERNELS := $(foreach d,64 128,$(foreach k,bf16 bf16_packgqa bf16_split, \
	$(BUILD)/flash3/flash_fwd_hdim$(d)_$(k)_sm90.o) $(BUILD)/flash3/flash_bwd_hdim$(d)_bf16_sm90.o)
FLASH3_FLAGS := $(HOST_FLAGS) -std=c++17 -O3 --use_fast_math --expt-relaxed-constexpr $(SM90A) \
	-Xcompiler -fPIC -DNDEBUG -DCUTE_SM90_EXTENDED_MMA_SHAPES_ENABLED \
	-DCUTLASS_ENABLE_GDC_FOR_SM90 -DCUTLASS_DEBUG_TRACE_LEVEL=0 \
	$(addprefix -DFLASHATTENTION_DISABLE_,PAGEDKV APPENDKV SOFTCAP VARLEN FP16 \
	FP8 HDIM96 HDIM192 HDIM256 HDIMDIFF64 HDIMDIFF192 SM8x) \
	$(FLASH3_VERSION:%=-DFLASH3_VERSION=\"%\") \
	-I. -I$(FLASH_ATTENTION)/hopper -I$(CUTLASS)/include

flash3: $(BUILD)/libflash3.so

$(FLASH3_KERNELS): $(BUILD)/flash3/%.o: $(FLASH_ATTENTION)/hopper/instantiations/%.cu
$(BUILD)/flash3/shim.o: baselines/flash3/shim/shim.cu baselines/flash3/shim/shim.h
$(FLASH3_KERNELS) $(BUILD)/flash3/shim.o:
	@mkdir -p $(@D)
	@echo "compile $<"
	$(Q)$(NVCC) $(FLASH3_FLAGS) -c -o $@ $<

$(BUILD)/libflash3.so: $(FLASH3_KERNELS) $(BUILD)/flash3/shim.o
	@echo "link    $@"
	$(Q)$(NVCC) -shared -o $@ $^ -Xlinker --strip-all,-z,defs
else
flash3:
	@echo 'make flash3 FLASH_ATTENTION=/path/to/flash-attention, with its csrc/cutlass; one' \
		'that lies elsewhere: CUTLASS=/path/to/cutlass' >&2
	@exit 2
endif

# The two files below are rewritten only when what they say changes.
define replace_if_changed
	@cmp -s $@.new $@ && rm $@.new || mv $@.new $@
endef

$(BUILD)/flags: FORCE
	@mkdir -p $(@D)
	@echo '$(CC) $(CPPFLAGS) $(CFLAGS) $(NVCC) $(NVCCFLAGS)' > $@.new
	$(replace_if_changed)

# The commit; whether the tree differs from it anywhere but in rows and pictures; and what the build
# depends on besides the commit. A tree inside somebody else's repository is of no known commit.
OWN_FLAGS = $(if $(filter-out file,$(origin OPTIMIZE) $(origin CFLAGS) $(origin CPPFLAGS)), \
	flags:$(firstword $(shell echo '$(CPPFLAGS) $(CFLAGS)' | cksum)))
TRACKED := . ':!results' ':!plots/out' ':!runs'
$(BUILD)/version.h: FORCE
	@mkdir -p $(@D)
	@if test -z "$$(git rev-parse --show-prefix 2>/dev/null || echo none)"; then \
		sha=$$(git rev-parse --verify -q HEAD || echo unknown); \
		changes=$$(git status --porcelain -- $(TRACKED)); \
		if test -n "$$changes"; then \
			digest=$$({ echo "$$changes"; git diff HEAD --binary -- $(TRACKED); \
				git ls-files -z --others --exclude-standard -- $(TRACKED) \
					| xargs -0r cat; } | sha256sum); fi; \
	else \
		sha=unknown; \
		digest=$$(find kernels baselines layers bench -type f | LC_ALL=C sort | xargs cat \
			| sha256sum); fi; \
	build='$(MARCH)$(SAN:%= %)$(OWN_FLAGS)'; \
	{ echo "#define VERSION \"$$(cat VERSION)\""; \
	  echo "#define GIT_SHA \"$$sha\""; \
	  echo "#define GIT_DIRTY $$(test -n "$$digest" && echo 1 || echo 0)"; \
	  echo "#define BUILD_ID \"$$build$${digest:+ dirty:$$(echo $$digest | cut -c 1-8)}\""; } > $@.new
	$(replace_if_changed)

$(BUILD)/bench/harness/environment.o $(BUILD)/bench/harness/about.o $(BUILD)/layers/blocks.o: $(BUILD)/version.h

-include $(OBJECTS:.o=.d) $(GOLDEN_OBJECTS:.o=.d) $(PROGRAMS:$(BUILD)/%=$(BUILD)/bench/%.d) $(TESTS:=.d) \
	$(GPU_TESTS:=.d) $(GPU_TEST_SUPPORT:.o=.d) $(TEST_SUPPORT:.o=.d)

# It looks for what the compiler that make calls will find.
BOOTSTRAP = CC='$(CC)' scripts/bootstrap.sh

# Targets a newcomer types. They fetch what is missing first, then build in parallel.
PARALLEL := $(shell nproc 2>/dev/null || echo 1)
SUBMAKE = $(MAKE) --no-print-directory $(if $(filter -j%,$(MAKEFLAGS)),,-j$(PARALLEL))

bench-latency:
	@$(BOOTSTRAP) run
	@$(SUBMAKE) drivers
	@bench/latency.sh $(BUILD) latency.csv $(ARGS)

bench-generation:
	@$(BOOTSTRAP) run
	@$(SUBMAKE) drivers
	@bench/latency.sh $(BUILD) generation.csv --pass generation $(ARGS)

bench-family:
	@$(BOOTSTRAP) run
	@$(SUBMAKE) drivers
	@PATTERNS="$(subst $() ,/,attention $(FAMILY))" STACKS= CHUNKS='16|32|128|256' \
		bench/latency.sh $(BUILD) family.csv $(ARGS)

bench-kernels:
	@$(BOOTSTRAP) run
	@$(SUBMAKE) drivers
	@$(BUILD)/kernel_latency $(if $(filter --resume,$(ARGS)),,--truncate) $(ARGS)

# Its packages: baselines/torch/requirements.txt. They are compiled in processes beforehand.
bench-peers:
	@$(BOOTSTRAP) run
	@$(SUBMAKE) peers
	@OMP_WAIT_POLICY=passive $(PYTHON) baselines/torch/peers.py --build $(BUILD) \
		--jobs $(if $(filter 1,$(CUDA)),$(PARALLEL),0) $(ARGS)

# The tables of rivals in documents, from the run that is published.
peers-tables:
	@$(PYTHON) scripts/peers_tables.py results/h200/peers.csv docs/h200.md README.md

bench-chunkwise:
	@$(BOOTSTRAP) run
	@$(SUBMAKE) drivers
	@bench/chunkwise.sh $(BUILD) $(ARGS)

table2:
	@$(BOOTSTRAP) run
	@$(SUBMAKE) drivers
	@$(BUILD)/throughput $(if $(filter --resume,$(ARGS)),,--truncate) $(ARGS)

# The options of bench/compare.sh; it takes them from the environment.
compare: export BASE := $(value BASE)
compare: export NEW := $(value NEW)
compare: export PATTERNS := $(value PATTERNS)
compare: export PROGRAM := $(value PROGRAM)
compare: export PAIRS := $(value PAIRS)
compare: export MINUTES := $(value MINUTES)
compare: export VERDICT := $(value VERDICT)
compare:
	@$(BOOTSTRAP) run
	@$(SUBMAKE) drivers
	@bench/compare.sh $(BUILD) $(ARGS)

# In the shell, run: what variable $(1) names, or the folder in runs/ with the newest file.
find_run = newest=$$(ls -t runs/*/*.csv runs/*/*/*.csv 2>/dev/null | \
		grep -vE '[.](samples|old-[0-9]+)[.]' | head -n 1); \
	run=$${$(1):-$${newest%/*}}; \
	test -n "$$run" || { echo 'runs/ has no rows yet: make bench-latency' >&2; exit 1; }

# RESULTS: a file, or the folder of a run; otherwise that in runs/ with the newest file.
plots:
	@$(BOOTSTRAP) plots
	@$(SUBMAKE) -s $(BUILD)/plotdata
	@$(call find_run,RESULTS); BUILD='$(BUILD)' plots/draw.sh "$$run"

# RUN: a folder of results files; otherwise that in runs/ with the newest file. One page, RUN/report.html.
report:
	@$(BOOTSTRAP) plots
	@$(SUBMAKE) -s $(BUILD)/plotdata $(BUILD)/report
	@$(call find_run,RUN); BUILD='$(BUILD)' scripts/report.sh "$$run"

# RUN: runs/DEVICE[/NAME]
publish:
	@$(BOOTSTRAP) plots
	@$(SUBMAKE) -s $(BUILD)/publish $(BUILD)/plotdata
	@BUILD='$(BUILD)' scripts/publish.sh "$$RUN"

install:
	@$(SUBMAKE) library
	@scripts/install.sh $(BUILD) '$(DESTDIR)' '$(PREFIX)'

test:
	@$(BOOTSTRAP) test
	@$(SUBMAKE) tests programs library
	@tests/run.sh $(TESTS)
	$(if $(SAN),,@tests/python.sh $(BUILD))

test-gpu:
	@$(SUBMAKE) CUDA=1 tests programs
	@$(MAKE) --no-print-directory CUDA=1 run-gpu-tests

.PHONY: run-gpu-tests
run-gpu-tests:
	@BACKEND=cuda tests/run.sh $(GPU_TESTS) $(BUILD)/tests/test_operations $(BUILD)/tests/test_unknown
	@$(BUILD)/tests/test_judgement 4 cuda test_blocks
	@$(BUILD)/golden --backend cuda --allow-unsupported tests/golden/*.safetensors

asan:
	@$(BOOTSTRAP) test
	@$(MAKE) --no-print-directory BUILD=$(BUILD)/asan SAN=address,undefined test

# The verdict on correctness, on that many seeds of every block; JUDGE_BACKEND=cuda on a GPU.
SEEDS ?= 1000
judge:
	@$(SUBMAKE) $(BUILD)/tests/test_judgement
	@$(BUILD)/tests/test_judgement $(SEEDS) "$(JUDGE_BACKEND)"

golden:
	@$(SUBMAKE) programs
	@$(BUILD)/golden tests/golden/*.safetensors

C_FILES = $(shell git ls-files '*.c' '*.h' '*.cu' '*.cuh')
CPU_FILES = $(filter-out kernels/cuda/% kernels/portable/% kernels/hopper/% baselines/% \
	tests/gpu/% tests/fuzz/%,$(filter %.c,$(C_FILES)))

check:
	@$(BOOTSTRAP) check
	clang-format --dry-run -Werror $(C_FILES)
	@$(MAKE) --no-print-directory $(BUILD)/version.h
	clang-tidy --quiet $(CPU_FILES) -- -std=c11 -I. -I$(BUILD) -fopenmp
	cppcheck --quiet --error-exitcode=1 --std=c11 --inline-suppr -I. -I$(BUILD) \
		--enable=warning,performance,portability \
		--suppress=missingIncludeSystem --suppress=invalidPointerCast $(CPU_FILES)

fuzz:
	@$(BOOTSTRAP) check
	@tests/fuzz/run.sh $(BUILD)/fuzz $(FUZZ_SECONDS)

help:
	@echo 'make bench-latency      latency of every block: prefill, training, generation; then plots'
	@echo 'make bench-generation   generation alone'
	@echo 'make bench-family       the linear-attention family beside attention: $(FAMILY);'
	@echo '                        chunks of 16 ... 256 for gla'
	@echo 'make bench-kernels      single operations, every provider of each'
	@echo 'make bench-chunkwise    linear attention in chunks, fused and not, against attention; a plot'
	@echo 'make bench-peers        PyTorch, FlashAttention, fla and others beside ours, in one Python process'
	@echo 'make peers-tables       the tables of them in docs/h200.md and README.md, from what is published'
	@echo 'make table2             maximum throughput of whole models'
	@echo 'make compare BASE=REF   is the working tree (or NEW=REF) slower than that commit? docs/comparing.md'
	@echo 'make plots              pictures of the newest run (RESULTS=file.csv or a folder picks others)'
	@echo 'make report             one page about the newest run (or RUN=folder), tables and pictures in it'
	@echo 'make publish            copy one run of a clean commit into results/ (RUN=runs/DEVICE)'
	@echo 'make test               every test that needs no GPU'
	@echo 'make test-gpu           the tests of the CUDA backend'
	@echo 'make golden             other projects'"'"' reference tensors, compared'
	@echo 'make judge              random blocks of SEEDS=1000 seeds, none of which may be a mismatch'
	@echo 'make flash3             FlashAttention-3 as a baseline (FLASH_ATTENTION=checkout, CUTLASS=checkout)'
	@echo 'make check              format, clang-tidy, cppcheck'
	@echo 'make asan               the tests under AddressSanitizer and UBSan'
	@echo 'make fuzz               the fuzz targets, FUZZ_SECONDS=$(FUZZ_SECONDS) each'
	@echo 'make library            libblocks, for other programs and for Python (docs/library.md)'
	@echo 'make install            libblocks, its header and its pkg-config file (PREFIX=$(PREFIX))'
	@echo 'make all                build everything into $(BUILD)/'
	@echo 'make clean              remove $(BUILD)/'
	@echo
	@echo 'ARGS="--preset tiny"    options handed to the programs; build/attention --help lists them'
	@echo 'CUDA=1 | CUDA=0         with or without the CUDA backend (now $(CUDA))'
	@echo 'MARCH=x86-64-v3         processor to compile for (now $(MARCH))'

clean:
	rm -rf $(BUILD)
