"""Bad requests: each is refused in one sentence that names setting, value and mend (exit 2)."""

import contextlib
import json
import os
import shlex
import shutil

import pytest
import torch
from prose import paragraphs
from safetensors.torch import load_file, save_file

from dynslice.cli import commands
from dynslice.core import assets, paths
from dynslice.core.errors import RequestError
from dynslice.core.tensors import pick_device, pick_dtype
from dynslice.evaluate import harness, perplexity, task_table
from dynslice.experiment.profile import load as load_profile
from dynslice.experiment.study import Study
from dynslice.inputs import corpora, models, texts
from dynslice.inputs.checkpoints import save
from dynslice.method import redundancy, slicing
from dynslice.method.architectures import dims_of
from dynslice.method.controls import single
from dynslice.method.plan import SlicePlan, constant, dynamic
from dynslice.method.scores import scores_of

MODEL = ["--model", "embedded:tiny-random"]
WEIGHT = "model.layers.1.mlp.down_proj.weight"

# What is typed, and what the one sentence on stderr must hold

PPL = "ppl --model embedded:tiny-random --text text.txt --windows 1 --window 32"
LR = "lr --model embedded:tiny-random --text text.txt --max-tokens 64"
PLAN = "plan --model embedded:tiny-random"
ENTROPIC = f"{PLAN} --slice-percentage 0.2 --schedule entropic --lr lr.json"
SLICE = "slice --model embedded:tiny-random --calibration text.txt --windows 1 --window 32"
TASKS = "tasks --model embedded:tiny-random --limit 1"
_EVIDENCE = "--model embedded:tiny-random --calibration text.txt --text page.txt --windows 1"
DROP = "drop-layers --model embedded:tiny-random --calibration text.txt --windows 1 --window 32"
DROP = f"{DROP} --out new"
QUANTIZE = "quantize --model embedded:tiny-random --windows 1 --window 32 --out new"
SMOKE = "reproduce --profile smoke --dry-run"

EMPTY = "the value is empty; give one, or leave the option out"

BAD_REQUESTS = {
    # models
    "ppl --model embedded:gpt --text text.txt": "embedded model 'gpt' is unknown",
    "ppl --model no/such/directory --text text.txt": "'no/such/directory' is a path where nothing",
    "ppl --model empty --text text.txt": "'empty' is a directory without config.json",
    "ppl --model unsupported --text text.txt": "'gpt2' can't be sliced exactly: it keeps its maps",
    "ppl --model no-type --text text.txt": "model 'no-type'",
    "ppl --model broken --text text.txt": "model 'broken'",
    "ppl --model config-only --text text.txt": "model 'config-only'",
    "plan --model zero-layers --slice-percentage 0.2": "it has no layers",
    "plan --model wide --slice-percentage 0.2": "for field 'hidden_size': TypeError: Field",
    "plan --model negative --slice-percentage 0.2": "describes no network",
    "plan --model no-activation --slice-percentage 0.2": "describes no network",
    "plan --model width-60 --slice-percentage 0.2": "round_to 8 does not divide the hidden size 60",
    f"{PPL} --model no-activation": "the weights of model 'no-activation' cannot be loaded",
    f"{PPL} --model no-tokenizer": "has no tokenizer that transformers can load; save one with",
    f"{PPL} --model list-tokenizer": "has no tokenizer that transformers can load; save one with",
    f"{PPL} --model far-tokenizer": "the vocabulary of the model has 257; save the tokenizer",
    f"{PPL} --model pickle": "other files of weights are not read (pytorch_model.bin); save it",
    f"{PPL} --model no-weights": "has no safetensors; save it anew with transformers",
    f"{PPL} --model own-code": "comes with code of its own (auto_map in its config.json), which is",
    f"{PPL} --model own-tokenizer": "has no tokenizer that transformers can load",
    f"{PPL} --model lacking": f"lacks 1 weights (first {WEIGHT}); save the model anew",
    f"{PPL} --model misshapen": f"{WEIGHT} of model 'misshapen' is of shape [64, 120], its config",
    f"{PPL} --model fewer-layers": "has 9 weights that its config.json does not describe (first",
    f"{PPL} --model value-head": "has 1 weights that its config.json does not describe (first v_h",
    f"{PPL} --model head-bias": "does not describe (first lm_head.bias); merge or remove them",
    f"{PPL} --model norm-bias": "does not describe (first model.norm.bias)",
    f"{PPL} --model adapter": "(first model.embed_tokens.lora_A.weight)",
    f"{PPL} --model classifier": "names LlamaForSequenceClassification, which is no causal languag",
    f"{PPL} --model pointer": "git-LFS pointer in place of model.safetensors; run `git lfs pull`",
    f"{PPL} --model pointer.gguf": "'pointer.gguf' is a git-LFS pointer and not the file; run",
    f"{PPL} --text pointer.txt": "'pointer.txt' is a git-LFS pointer and not the file; run `git",
    f"{PPL} --text pointer.parquet": "'pointer.parquet' is a git-LFS pointer and not the file",
    f"{SLICE} --slice-percentage 0.2 --out new --calibration pointers": "'pointers/train.txt' is a",
    f"{LR} --model cut": "the weights of model 'cut' cannot be read from model-00001-of-00004.safe",
    f"{DROP} --layers 1 --model cut": "cannot be read from model-00001-of-00004.safetensors",
    f"{QUANTIZE} --bits 8 --model cut": "cannot be read from model-00001-of-00004.safetensors",
    f"{PPL} --model truncated": "the weights of model 'truncated' cannot be read from model.safe",
    f"{PPL} --model elsewhere": "it names files in other folders",
    f"{PPL} --model lost-shard": "model-00001-of-00004.safetensors is missing",
    f"{PPL} --model list-index": "cannot be read from model.safetensors.index.json",
    f"{PPL} --model nan": f"weight {WEIGHT} of model 'nan' is not finite in float32; take a sound",
    f"{PPL} --model inf": f"weight {WEIGHT} of model 'inf' is not finite in float32; take a sound",
    f"{PPL} --model large --dtype float16": "is not finite in float16; take a sound checkpoint",
    f"{PPL} --model hot --dtype float16": "log-likelihood is not finite in float16; check the",
    f"{LR} --model hot --dtype float16": "layer 0 is not finite in float16; check the weights",
    f"{TASKS} --model hot --tasks piqa --dtype float16": "task 'piqa' is not finite",
    f"{SLICE} --model hot --slice-percentage 0.2 --out new --dtype float16": "stream is not finite",
    f"{SLICE} --model nan --slice-percentage 0.2 --out new --stream": f"{WEIGHT} of model 'nan' is",
    f"{SLICE} --model lacking --slice-percentage 0.2 --out new --stream": f"no weight '{WEIGHT}'",
    f"{SLICE} --model misshapen --slice-percentage 0.2 --out new --stream": "is of shape [64, 120]",
    f"{SLICE} --model fewer-layers --slice-percentage 0.2 --out new --stream": "has 9 weights that",
    f"{SLICE} --model value-head --slice-percentage 0.2 --out new --stream": "(first v_head.weight",
    f"{SLICE} --model head-bias --slice-percentage 0.2 --out new --stream": "(first lm_head.bias)",
    f"{SLICE} --model classifier --slice-percentage 0.2 --out new --stream": "no causal language",
    f"{SLICE} --model cut --slice-percentage 0.2 --out new --stream": "cannot be read from model-0",
    f"{SLICE} --model pickle --slice-percentage 0.2 --out new --stream": "has no safetensors",
    f"{SLICE} --model elsewhere --slice-percentage 0.2 --out new --stream": "in other folders",
    f"{PPL} --model ''": EMPTY,
    f"{PPL} --model ' '": EMPTY,
    f"{PPL} --revision ''": EMPTY,
    f"{PPL} --text ''": EMPTY,
    f"{SLICE} --calibration ''": EMPTY,
    f"{PLAN} --lr ''": EMPTY,
    f"{SMOKE} --set 'model=\"\"'": "model '' has an empty name: give one, or leave it out",
    f"{PPL} --model 'two\nlines'": "is not available from the hub",
    f"{PPL} --model größe": "model 'größe' is not available from the hub",
    f"{PPL} --model embedded:../../x": "embedded model '../../x' is unknown; there are",
    f"{PPL} --model https://me:secret@hub/x": "model 'https://***@hub/x' is not available",
    f"{PPL} --revision v1": "has no revisions, only models of the hub do; leave revision 'v1' out",
    f"{PPL} --window 2049": "window 2049 is longer than the 2048 positions of the model",
    f"{LR} --max-tokens 4096 --window 2049": "window 2049 is longer than the 2048 positions",
    # texts
    f"{LR} --text nowhere.txt": "text 'nowhere.txt' is neither a corpus",
    f"{LR} --text empty": "text 'empty' is a directory without split 'validation' (it has none)",
    f"{PPL} --text wikipedia --split trial": "split 'trial' is unknown; use train, validation",
    f"{PPL} --split test": "is a file and has no splits",
    f"{PPL} --text short.txt --window 64": "holds 26 tokens, fewer than 1 windows of 64",
    f"{SLICE} --slice-percentage 0.2 --out new --window 99999": "fewer than 1 windows of 99999",
    f"{LR} --max-tokens 1": "LR needs at least 2",
    f"{PPL} --window 1": "1 is no whole number of at least 2",
    f"{LR} --text void.txt": "text 'void.txt' is empty; give a file with words in it",
    f"{LR} --text blank.txt": "text 'blank.txt' is empty; give a file with words in it",
    f"{LR} --text binary.txt": "text 'binary.txt' is binary (it holds NUL bytes); give a text file",
    f"{LR} --text latin.txt": "text 'latin.txt' is not UTF-8 (byte 2); convert it to UTF-8",
    f"{LR} --text utf16.txt": "text 'utf16.txt' is not UTF-8 (byte 0); convert it to UTF-8",
    f"{LR} --text numbers": "'numbers' in split validation has no column 'text' of strings",
    f"{LR} --text not-rows": "validation.jsonl in 'not-rows' cannot be read as json; replace",
    f"{LR} --text blank-rows": "text 'blank-rows' holds no tokens; give a text with words in it",
    f"{LR} --text 'two\nlines'": "is neither a corpus",
    f"{LR} --text text.txt --split ''": EMPTY,
    f"{LR} --stride 0": "0 is no whole number of at least 1",
    f"{LR} --stride 99999999999999999999": "99999999999999999999 is too large; give less than",
    f"{LR} --window 1": "1 is no whole number of at least 2",
    f"{LR} --last-layer final": "invalid choice: 'final'",
    f"{PPL} --windows 0": "0 is no whole number of at least 1",
    f"{PPL} --windows 123456789": "tokens, fewer than 123456789 windows of 32; use",
    f"{PPL} --windows ''": "is no whole number of at least 1",
    f"{PPL} --windows 'two\nlines'": "two lines is no whole number of at least 1",
    # amounts
    PLAN: "--slice-percentage is missing",
    f"{PLAN} --slice-percentage 1.5": "slice percentage 1.5 is outside 0 to",
    f"{PLAN} --slice-percentage 30": "slice percentage 30.0 is outside 0 to",
    f"{PLAN} --slice-percentage -0.1": "slice percentage -0.1 is outside 0 to",
    f"{PLAN} --slice-percentage nan": "slice percentage nan is outside 0 to",
    f"{PLAN} --slice-percentage half": "invalid float value: 'half'",
    f"{PLAN} --slice-percentage 0.2 --slice-base 0.3 --lr lr.json": "slice base 0.3 is outside 0",
    f"{PLAN} --slice-percentage 0.2 --round-to 7": "round_to 7 does not divide the hidden size 64",
    f"{PLAN} --slice-percentage 0.2 --round-to 0": "0 is no whole number of at least 1",
    f"{PLAN} --slice-percentage 0.2 --schedule dynamic": "schedule dynamic needs LR scores",
    f"{PLAN} --slice-percentage 0.2 --slice-base 0.1": "schedule dynamic needs LR scores",
    f"{PLAN} --slice-percentage 0.2 --schedule linear": "invalid choice: 'linear'",
    f"{PLAN} --slice-percentage 0.2 --match-parameters plan.json": "leave --slice-percentage out",
    "plan --slice-percentage 0.2": "a plan needs --model to know the widths",
    "plan --slice-percentage 0.2 --schedule lr": "a plan needs --model or --lr to know",
    "plan --slice-percentage 0.2 --schedule sensitivity": "were removed (docs/method.md), use lr",
    "search --model embedded:tiny-random": "schedules sensitivity and search were removed",
    f"{SMOKE} --set search_evaluations=3": "'search_evaluations' is unknown; the schedules",
    f"{SMOKE} --set beyond_candidates=[search]": "search were removed (docs/method.md), use lr",
    f"{PLAN} --slice-percentage inf": "slice percentage inf is outside 0 to",
    f"{PLAN} --slice-percentage ''": "invalid float value: ''",
    f"{PLAN} --slice-percentage 0.99": "0.99 is outside 0 to 0.875 (one multiple of 8 must remain)",
    f"{PLAN} --slice-percentage 0.2 --slice-base nan --lr lr.json": "slice base nan is outside",
    f"{PLAN} --slice-percentage 0.2 --slice-base -0.1 --lr lr.json": "slice base -0.1 is outside 0",
    f"{PLAN} --slice-percentage 0.2 --slice-base 0.1 --schedule constant": "no meaning",
    f"{PLAN} --slice-percentage 0.2 --lr lr.json --schedule constant": "of schedule constant",
    f"{PLAN} --slice-percentage 0.2 --round-to ²": "² is no whole number of at least 1",
    f"{PLAN} --slice-percentage 0.2 --round-to 8.0": "8.0 is no whole number of at least 1",
    f"{PLAN} --slice-percentage 0.2 --round-to 128": "round_to 128 does not divide the hidden size",
    "plan --slice-percentage 0.2 --lr lr.json --revision v1": "--revision v1 is that of a model",
    "plan --match-parameters plan.json --revision v1": "leave --revision out",
    # schedules of equal size, compensation, recovery
    f"{PLAN} --slice-percentage 0.2 --schedule lr": "schedule lr needs LR scores: run",
    f"{PLAN} --slice-percentage 0.2 --schedule first --lr lr.json": "no meaning in a plan of",
    f"{PLAN} --slice-percentage 0.2 --schedule first --slice-base 0.1": "--slice-base 0.1 has no",
    f"{PLAN} --slice-percentage 0.8 --schedule embedding --untie": "is below the",
    f"{PLAN} --slice-percentage 2 --schedule first": "slice percentage 2.0 is outside 0 to",
    f"{SLICE} --slice-percentage 0.2 --out new --ridge 0.1": "that of --compensate; add it",
    f"{SLICE} --slice-percentage 0.2 --out new --compensate --ridge 0": "ridge 0.0 is no positive",
    f"{SLICE} --slice-percentage 0.2 --out new --compensate --ridge nan": "nan is no positive",
    f"{SLICE} --slice-percentage 0.2 --out new --recovery-steps 0": "0 is no whole number of at",
    f"{SLICE} --slice-percentage 0.2 --out new --recovery-steps 2 --stream": "leave --stream out",
    f"{SLICE} --slice-percentage 0.2 --out new --schedule lr --stream": "no whole model to",
    f"{SLICE} --slice-percentage 0.2 --out new --slice-base 0 --stream": "no whole model to",
    f"{SLICE} --slice-percentage 0.2 --out new --slice-base 0.3": "slice base 0.3 is outside 0",
    f"{SLICE} --schedule lr --out new": "--slice-percentage is missing",
    f"{SLICE} --schedule lr --slice-percentage 0.2 --slice-base 0.1 --out new": "--slice-base 0.1 ",
    f"{SLICE} --plan plan.json --out new --schedule first": "leave --schedule out",
    # what is picked instead of slicing
    DROP: "give either --layers, how many go, or --size",
    f"{DROP} --layers 1 --size 0.9": "give either --layers, how many go, or --size",
    f"{DROP} --layers 4": "4 of 4 layers cannot be dropped; leave at least one",
    f"{DROP} --layers -1": "-1 is no whole number of at least 0",
    f"{DROP} --size 1K": "1000 parameters are fewer than the",
    f"{DROP} --layers 1 --out empty": "output 'empty' exists already; name a new directory",
    f"{SLICE} --out new --mlp-neurons 1": "share 1.0 of the neurons is outside 0 to 1",
    f"{SLICE} --out new --mlp-neurons nan": "share nan of the neurons is outside 0 to 1",
    f"{SLICE} --out new --mlp-neurons 0.2 --plan plan.json": "leave --plan out",
    f"{SLICE} --out new --mlp-neurons 0.2 --stream": "leave --stream out",
    f"{SLICE} --out new --mlp-neurons 0.2 --lr lr.json": "leave --lr out",
    f"{SLICE} --out new --mlp-neurons 0.2 --recipe best": "--slice-percentage is missing",
    f"{QUANTIZE} --bits 8 --share 0.3": "--share 0.3 is read by --by; leave it out",
    QUANTIZE: "give either --bits, for all layers, or --by",
    f"{QUANTIZE} --bits 8 --by lr": "give either --bits, for all layers, or --by",
    f"{QUANTIZE} --bits 3": "invalid choice: 3",
    f"{QUANTIZE} --bits 8 --calibration text.txt": "is read by --by; leave it out",
    f"{QUANTIZE} --by lr": "--by lr is measured on a text; give --calibration",
    f"{QUANTIZE} --by lr --calibration text.txt --share 2": "--share 2.0 is outside 0 to 1",
    # sizes, recipes, layouts
    f"{PLAN} --size 0.9 --slice-percentage 0.2": "--size 0.9 decides the slice percentage; leave",
    f"{PLAN} --size '1\n2'": "1 2 is no size; give a share (0.84), parameters (113M) or bytes",
    f"{ENTROPIC} --slice-base nan": "slice base nan is outside 0 to the slice percentage 0.2",
    f"{ENTROPIC} --slice-base -0.5": "slice base -0.5 is outside 0 to the slice percentage 0.2",
    f"{ENTROPIC} --slice-base 0.9": "slice base 0.9 is outside 0 to the slice percentage 0.2",
    f"{PLAN} --size 0.9 --schedule entropic --lr lr.json --slice-base nan": "slice base nan is",
    f"{PLAN} --size 0": "--size 0 allows 0 parameters, and slices of this model in",
    f"{PLAN} --slice-percentage 0.02 --basis-layers all --schedule first": "0.02 allows",
    f"{PLAN} --size 0.95 --slice-base 0.5 --lr lr.json": "--slice-base 0.5 alone stores",
    f"{PLAN} --size 0.1": "--size 0.1 allows 16,448 parameters, and slices of this model in",
    f"{PLAN} --size 113M": "layout store at least 43,584 and less than 196,736; give a",
    f"{PLAN} --size 113M --untie": "layout store at least 45,064 and less than 213,120; give a",
    f"{PLAN} --size 113M --basis-layers all": "layout store at least 43,200 and less than",
    f"{PLAN} --size 113M --plain": "layout store at least 11,308 and less than 180,928; give a",
    f"{PLAN} --size 1GB": "--size 1GB allows 250,000,000 parameters, and slices",
    f"{PLAN} --size 1GB --save-dtype bfloat16": "--size 1GB allows 500,000,000 parameters",
    f"{PLAN} --size 1GB --dtype float8": "dtype 'float8' is unknown; use auto, float32",
    f"{PLAN} --size 45K --schedule embedding": "give a smaller slice percentage, or a larger size",
    f"{PLAN} --size 1.5": "1.5 is no share of the dense model; give one up to 1, or a unit such as",
    f"{PLAN} --size 113Q": "113Q is no size; give a share (0.84), parameters (113M) or",
    f"{PLAN} --size small": "small is no size; give a share",
    f"{PLAN} --size ''": "is no size; give a share",
    f"{PLAN} --size=-1M": "-1M is no size; give a share",
    f"{PLAN} --size 1e9": "1e9 is no size; give a share",
    f"{PLAN} --size .5": ".5 is no size; give a share",
    f"{PLAN} --size nan": "nan is no size; give a share",
    f"{PLAN} --size ²M": "²M is no size; give a share",
    f"{PLAN} --size 'two\nlines'": "two lines is no size; give a share",
    f"{PLAN} --size 0.9 --schedule lr": "schedule lr needs LR scores: run",
    f"{PLAN} --size 0.9 --round-to 7": "round_to 7 does not divide the hidden size 64",
    "plan --size 0.9": "a plan needs --model to know the widths",
    "plan --match-parameters plan.json --size 0.9": "leave --size out",
    "plan --match-parameters plan.json --untie": "leave --untie out",
    "plan --match-parameters plan.json --basis-layers 2": "leave --basis-layers out",
    "plan --match-parameters plan.json --plain": "leave --plain out",
    f"{SLICE} --plan plan.json --out new --size 0.9": "leave --size out",
    f"{SLICE} --plan plan.json --out new --untie": "leave --untie out",
    f"{SLICE} --plan plan.json --out new --basis-layers 2": "leave --basis-layers out",
    f"{SLICE} --plan plan.json --out new --plain": "leave --plain out",
    f"{SLICE} --plan plan.json --out new --recipe best": "leave --recipe best out, or give --size",
    f"{SLICE} --out new --recipe best": "--slice-percentage is missing; give a share such as 0.25",
    f"{SLICE} --out new --recipe good": "invalid choice: 'good'",
    f"{SLICE} --out new --recipe best --size 9": "9 is no share of the dense model",
    f"{SLICE} --out new --recipe best --size 0.1": "--size 0.1 allows 16,448 parameters, and",
    f"{SLICE} --out new --recipe best --size 0.9 --stream": "no whole model to measure LR on; run",
    f"{SLICE} --out new --recipe best --size 0.9 --ridge 0": "ridge 0.0 is no positive number",
    f"{PLAN} --slice-percentage 0.2 --untie --model embedded:tiny-llama-3": "--untie means nothing",
    f"{PLAN} --slice-percentage 0.2 --basis-layers 0": "0 is no whole number of at least 1",
    f"{PLAN} --slice-percentage 0.2 --basis-layers x": "x is no whole number of at least 1",
    f"{PLAN} --slice-percentage 0.2 --basis-layers ''": "is no whole number of at least 1",
    f"{PLAN} --slice-percentage 0.2 --plain --untie": "has one basis, and is untied; leave --untie",
    f"{PLAN} --slice-percentage 0.2 --plain --basis-layers 2": "untied; leave --basis-layers out",
    f"{PLAN} --slice-percentage 0.2 --plain --schedule first": "--plain has one width, and",
    f"{PLAN} --slice-percentage 0.2 --plain --lr lr.json": "one width, and schedule dynamic has",
    f"{PLAN} --slice-percentage 0.2 --plain --round-to 7": "round_to 28 does not divide the hidden",
    f"{PLAN} --slice-percentage 0.97 --plain": "slice percentage 0.97 is outside 0 to",
    f"{PLAN} --slice-percentage 0.2 --plain --model opt-shape": "'opt' has no plain slice: its",
    f"{PLAN} --slice-percentage 0.2 --plain --model gemma-shape": "is scaled by the hidden size;",
    f"{SLICE} --plan groups-plan.json --out new": "count 4 places, the model has 8; make the plan",
    f"{SLICE} --plan group-plan.json --out new": "has layout.basis_groups 'all', which fits no",
    f"{SLICE} --plan plain-plan.json --out new": "a plain checkpoint has one basis",
    f"{SLICE} --plan untied-plan.json --out new": "its layers give 160624: it was altered",
    # files
    f"{PLAN} --slice-percentage 0.2 --lr nowhere.json": "LR file 'nowhere.json' cannot be read",
    f"{PLAN} --slice-percentage 0.2 --lr not.json": "LR file 'not.json' is not JSON",
    f"{PLAN} --slice-percentage 0.2 --lr list.json": "LR file 'list.json' holds no JSON object",
    f"{PLAN} --slice-percentage 0.2 --lr other.json": "is incomplete (no layers); make it",
    f"{PLAN} --slice-percentage 0.2 --lr no-scores.json": "has layers.0 1, which fits no LR file",
    "plan --slice-percentage 0.2 --lr other.json": "shape of the model is incomplete",
    f"{SLICE} --plan plan.json --round-to 16 --out new": "leave --round-to out",
    "plan --match-parameters plan.json --slice-base 0.1": "leave --slice-base out",
    f"{SLICE} --plan nowhere.json --out new": "plan file 'nowhere.json' cannot be read",
    f"{SLICE} --plan not.json --out new": "plan file 'not.json' is not JSON",
    f"{SLICE} --plan other.json --out new": "incomplete",
    f"{SLICE} --plan float.json --out new": "40.5",
    f"{SLICE} --plan plan.json --slice-percentage 0.2 --out new": "leave --slice-percentage out",
    f"{SLICE} --slice-percentage 0.2 --out empty": "output 'empty' exists already",
    f"{SLICE} --slice-percentage 0.2 --out text.txt/new": "output 'text.txt/new' cannot be written",
    f"{SLICE} --slice-percentage 0.2": "required: --out",
    f"{PLAN} --slice-percentage 0.2 --out no/such/plan.json": "output 'no/such/plan.json' cannot",
    f"{LR} --out no/such/lr.json": "output 'no/such/lr.json' cannot be written",
    f"{PLAN} --slice-percentage 0.2 --lr nan-lr.json": "has layers.1.lr nan, which fits no LR file",
    f"{PLAN} --slice-percentage 0.2 --lr text-lr.json": "layers.1.lr 'high', which fits no LR file",
    f"{PLAN} --slice-percentage 0.2 --lr altered-lr.json": "it was altered; make it anew with",
    f"{PLAN} --slice-percentage 0.2 --lr three-lr.json": "LR has 3 layers, the model 4; measure LR",
    f"{PLAN} --slice-percentage 0.2 --lr turned-lr.json": "lists its layers out of order; make it",
    f"{PLAN} --slice-percentage 0.2 --lr double-lr.json": "which fits no LR file; make it anew",
    f"{PLAN} --slice-percentage 0.2 --lr foreign-lr.json": "are of another model; measure them",
    "plan --slice-percentage 0.2 --lr broken-shape-lr.json": "hidden_size 'wide', which fits no",
    f"{PLAN} --slice-percentage 0.2 --lr list-shape-lr.json": "are of another model; measure them",
    f"{PLAN} --slice-percentage 0.2 --lr binary.txt": "LR file 'binary.txt' is not JSON",
    f"{PLAN} --slice-percentage 0.2 --lr deep.json": "LR file 'deep.json' is not JSON",
    f"{PLAN} --slice-percentage 0.2 --lr empty": "LR file 'empty' cannot be read; check the path",
    f"{PLAN} --slice-percentage 0.2 --out empty": "output 'empty' is a folder or device",
    f"{PLAN} --slice-percentage 0.2 --out /dev/null": "output '/dev/null' is a device; name a file",
    f"{PLAN} --slice-percentage 0.2 --out text.txt/plan.json": "cannot be written; make the folder",
    f"{LR} --out ''": EMPTY,
    f"{SLICE} --plan three-plan.json --out new": "plan has 3 widths, the model 4 layers; make the",
    f"{SLICE} --plan above-plan.json --out new": "plan has widths from 48 to 72, the hidden",
    f"{SLICE} --plan below-plan.json --out new": "plan has widths from 0 to 48, the hidden size is",
    f"{SLICE} --plan altered-plan.json --out new": "its layers give 150592: it was altered",
    f"{SLICE} --plan sp-plan.json --out new": "the plan says slice_percentage 0.3, its layers give",
    f"{SLICE} --plan base-plan.json --out new": "has slice_base 7, which fits no plan; make",
    f"{SLICE} --plan odd-plan.json --out new": "the plan has schedule 'mine', which fits no plan",
    f"{SLICE} --plan round-plan.json --out new": "round_to 7 does not divide the hidden size 64",
    f"{SLICE} --plan null-plan.json --out new": "the plan has widths None, which fits no plan",
    f"{SLICE} --plan shape-plan.json --out new": "has shape.layers 4.0, which fits no plan",
    f"{SLICE} --slice-percentage 0.2 --out ''": EMPTY,
    f"{SLICE} --slice-percentage 0.2 --out new --host-memory 1": "streamed slicing; add --stream",
    f"{SLICE} --slice-percentage 0.2 --out new --stream --host-memory nan": "nan is no memory",
    f"{SLICE} --slice-percentage 0.2 --out new --stream --host-memory 1e300": "is no memory; give",
    f"{SLICE} --slice-percentage 0.2 --out new --stream --host-memory 1e-6": "give at least that",
    # tasks
    f"{TASKS} --tasks piqua": "task 'piqua' is unknown; the tasks are hellaswag",
    f"{TASKS} --tasks ,": "--tasks names none",
    f"{TASKS} --tasks piqa --limit 0": "0 is no whole number of at least 1",
    f"{TASKS} --tasks ''": EMPTY,
    f"{TASKS} --tasks piqa,PIQA": "task 'PIQA' is unknown; the tasks are",
    f"{TASKS} --tasks piqa --batch-size 0": "0 is no whole number of at least 1",
    f"{TASKS} --tasks piqa --subset last": "invalid choice: 'last'",
    f"{TASKS} --tasks piqa --model nan": "is not finite in float32; take a sound checkpoint",
    # benchmarks
    "bench --shape llama-9": "shape 'llama-9' is unknown; there are llama-3-8b",
    "bench --shape llama-3-8b --slice-percentage 2": "slice percentage 2.0 is outside 0 to",
    "bench --model embedded:tiny-random --slice-percentage nan": "slice percentage nan is outside",
    "bench --model embedded:tiny-random --calibration nope": "text 'nope' is neither a corpus",
    # assets
    "assets": "the following arguments are required: action",
    "assets delete": "invalid choice: 'delete'",
    # machine
    f"{PPL} --device tpu": "device 'tpu' is unknown; use auto, cpu, cuda or cuda:N",
    f"{PPL} --device cuda:99": "device 'cuda:99' is not available",
    f"{PPL} --dtype float8": "dtype 'float8' is unknown; use auto, float32",
    f"{PPL} --seed -1": "-1 is no whole number",
    f"{PPL} --seed one": "one is no whole number",
    f"{PPL} --device ''": EMPTY,
    f"{PPL} --device meta": "device 'meta' is unknown; use auto, cpu, cuda or cuda:N",
    f"{PPL} --dtype ''": EMPTY,
    f"{PPL} --seed 4294967296": "4294967296 is too large; give less than 4294967296",
    f"{PPL} --seed 18446744073709551616": "is too large; give less than 4294967296",
    f"{PPL} --seed {10**400}": "is no whole number of at least 0",
    # spelling
    f"{PPL} --windows few": "few",
    f"{PPL} --windws 4": "unrecognized arguments: --windws 4",
    "prune --model embedded:tiny-random": "invalid choice: 'prune'",
    # profiles
    "reproduce --profile nope --dry-run": "profile 'nope' is unknown; there are",
    "record --profile nope": "profile 'nope' is unknown; there are",
    "reproduce --profile mine.yaml --dry-run": "profile 'mine.yaml' is not YAML",
    "reproduce --profile quick.yaml --dry-run": "has the name of a built-in profile",
    f"{SMOKE} --set eval_window_size=64": "'eval_window_size' is unknown; the nearest valid name",
    f"{SMOKE} --set round-to=4": "'round-to' is unknown; the nearest valid name is 'round_to'",
    f"{SMOKE} --set eval_windows=many": "eval_windows = 'many'",
    f"{SMOKE} --set slice_percentages=0.25": "slice_percentages = 0.25",
    f"{SMOKE} --set round_to=[8": "value '[8' of round_to is not YAML",
    f"{SMOKE} --set round_to": "--set 'round_to' is not of the form key=value",
    f"{SMOKE} --only 99": "notebook '99' is unknown",
    f"{SMOKE} --set sed=1": "profile key 'sed' is unknown; the nearest valid name is 'seed'",
    f"{SMOKE} --set =1": "profile key '' is unknown",
    f"{SMOKE} --set name=../x": "name '../x' becomes a folder: use letters, digits",
    f"{SMOKE} --set name=": "name = None: Input should be a valid string",
    f"{SMOKE} --set seed=one": "seed = 'one': Input should be a valid integer",
    f"{SMOKE} --set seed=-1": "seed = -1: Input should be greater than or equal to 0",
    f"{SMOKE} --set seed=18446744073709551616": "Input should be less than 4294967296",
    f"{SMOKE} --set seed=null": "seed = None: Input should be a valid integer",
    f"{SMOKE} --set model=null": "model = None: Input should be a valid string",
    f"{SMOKE} --set round_to=0": "round_to = 0: Input should be greater than or equal to 1",
    f"{SMOKE} --set round_to=8.0": "round_to = 8.0: Input should be a valid integer",
    f"{SMOKE} --set slice_percentages=[]": "slice_percentages = []: List should have at least 1",
    f"{SMOKE} --set slice_percentages=[0.2,0.2]": "[0.2, 0.2] names something twice: leave one of",
    f"{SMOKE} --set slice_percentages=[.nan]": "slice share nan is outside 0 to 1",
    f"{SMOKE} --set slice_percentages=[-0.1]": "slice share -0.1 is outside 0 to 1",
    f"{SMOKE} --set slice_percentages=[null]": "slice_percentages.0 = None: Input should be",
    f"{SMOKE} --set slice_bases=[.inf]": "slice share inf is outside 0 to 1",
    f"{SMOKE} --set 'tasks={{piqa: -1}}'": "tasks.piqa = -1: Input should be greater than or equal",
    f"{SMOKE} --set 'tasks={{piqa: 0}}'": "tasks.piqa = 0: Input should be greater than or equal",
    f"{SMOKE} --set 'tasks={{piqua: 1}}'": "task 'piqua' is unknown; the tasks are",
    f"{SMOKE} --set 'tasks=[piqa]'": "tasks = ['piqa']: Input should be a valid dictionary",
    f"{SMOKE} --set eval_texts=[]": "eval_texts = []: List should have at least 1 item",
    f"{SMOKE} --set eval_texts=wikipedia": "eval_texts = 'wikipedia': Input should be a valid list",
    f"{SMOKE} --set eval_split=dev": "eval_split = 'dev': Input should be 'train', 'validation'",
    f"{SMOKE} --set eval_window=1": "eval_window = 1: Input should be greater than or equal to 2",
    f"{SMOKE} --set eval_windows=0": "eval_windows = 0: Input should be greater than or equal to 1",
    f"{SMOKE} --set lr_stride=0": "lr_stride = 0: Input should be greater than or equal to 1",
    f"{SMOKE} --set lr_max_tokens=1": "lr_max_tokens = 1: Input should be greater than or equal",
    f"{SMOKE} --set ablation_lr_tokens=[-5]": "ablation_lr_tokens.0 = -5: Input should be greater",
    f"{SMOKE} --set ablation_round_to=[0]": "ablation_round_to.0 = 0: Input should be greater",
    f"{SMOKE} --set ablation_calibration_seeds=[-1]": "ablation_calibration_seeds.0 = -1: Input",
    f"{SMOKE} --set ablation_calibration_windows=[0]": "ablation_calibration_windows.0 = 0: Input",
    f"{SMOKE} --set ablation_shuffles=100000000": "Input should be less than or equal to 1000",
    f"{SMOKE} --set dtype=float8": "dtype = 'float8': Input should be 'float32'",
    f"{SMOKE} --set placement=cloud": "placement = 'cloud': Input should be 'resident'",
    f"{SMOKE} --set 'stand_ins={{nope: sotu}}'": "stand_ins of 'nope', which is not read",
    f"{SMOKE} --set 'models=[a/x, b/x]'": "would share a folder: rename one of them",
    f"{SMOKE} --set 'seed=!!python/object/apply:os.getcwd []'": "of seed is not YAML; quote it",
    "reproduce --profile '' --dry-run": EMPTY,
    "reproduce --profile ../x --dry-run": "profile '../x' is unknown; there are",
    "reproduce --profile leading-out.yaml": "name '../../x' becomes a folder: use letters, digits",
    "reproduce --profile list.yaml": "profile 'list.yaml' holds no keys; start from a copy",
    "reproduce --profile number.yaml": "profile key 5 is unknown; the nearest valid name is",
    "reproduce --profile latin.yaml": "profile 'latin.yaml' is not YAML",
    "reproduce --profile object.yaml": "profile 'object.yaml' is not YAML",
    "reproduce --profile incomplete.yaml": "profile 'incomplete.yaml' has no model; add it",
    f"{SMOKE} --only nonsense": "notebook 'nonsense' is unknown; there are 01_layer_redundancy",
    f"{SMOKE} --only ''": EMPTY,
    f"{SMOKE} --executor slurm": "invalid choice: 'slurm'",
    f"{SMOKE} --executor local --address auto": "address",
    "reproduce --profile smoke --device tpu": "device 'tpu' is unknown; use auto, cpu, cuda",
    "reproduce --profile smoke --dtype float8": "dtype = 'float8': Input should be 'float32'",
    "reproduce --profile smoke --set figure_slice_percentage=0.99": "0.99 is outside 0 to 0.875",
    "reproduce --profile smoke --set lr_text=void.txt": "text 'void.txt' is empty; give a file",
    "reproduce --profile smoke --set eval_window=4096": "4096 is longer than the 2048 positions",
    "reproduce --profile smoke --set model=pickle": "has no safetensors, and other files",
}

SHAPE = {"hidden_size": 64, "word_embed_proj_dim": 64, "num_hidden_layers": 4}
SHAPE |= {"num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 257}


@pytest.fixture(autouse=True, scope="module")
def places(tmp_path_factory):
    """A folder with a text and every kind of thing that a request may not name; tests run there."""
    assets.fetch()
    folder = tmp_path_factory.mktemp("bad")
    text = paragraphs(70)
    (folder / "empty").mkdir()
    smoke = (paths.PROFILES / "smoke.yaml").read_text(encoding="utf-8")
    files = {
        "text.txt": text,
        "page.txt": text[:2000],
        "short.txt": "Too short to slice with.",
        "void.txt": "",
        "blank.txt": " \n\t ",
        "binary.txt": "a\0b",
        "latin.txt": "größe".encode("latin-1"),
        "utf16.txt": text.encode("utf-16"),
        "numbers/validation.jsonl": '{"text": 5}',
        "not-rows/validation.jsonl": "5",
        "blank-rows/validation.jsonl": '{"text": ""}',
        "not.json": "layers: 4",
        "list.json": "[1, 2]",
        "other.json": json.dumps({"answer": 42}),
        "deep.json": "[" * 100_000,
        "no-scores.json": json.dumps({"layers": [1, 2, 3, 4]}),
        "config-only/config.json": json.dumps({"model_type": "llama"}),
        "opt-shape/config.json": json.dumps({**SHAPE, "model_type": "opt", "ffn_dim": 128}),
        "gemma-shape/config.json": json.dumps({**SHAPE, "model_type": "gemma"}),
        "unsupported/config.json": json.dumps({"model_type": "gpt2"}),
        "no-type/config.json": "{}",
        "broken/config.json": "{",
        "mine.yaml": "description: [",
        "quick.yaml": "description: mine",
        "incomplete.yaml": "description: mine",
        "leading-out.yaml": f"{smoke}\nname: ../../x",
        "list.yaml": "- a",
        "number.yaml": "5: 6",
        "latin.yaml": b"name: \xff",
        "object.yaml": '!!python/object/apply:os.mkdir ["ran"]',
    }
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        content = content if isinstance(content, bytes) else content.encode()
        (folder / name).write_bytes(content)
    with contextlib.chdir(folder):
        _make_models(folder)
        _make_plans(folder)
        yield folder


class _Pickled:
    def __reduce__(self):
        return os.mkdir, ("ran",)


def _make_models(folder):
    """Copies of the tiny model, each with one thing wrong."""
    tiny, tokenizer = models.load("embedded:tiny-random", torch.device("cpu"), torch.float32)
    save(tiny, tokenizer, folder / "sound")
    save(tiny, tokenizer, folder / "shards", shard="200KB")
    for saved in ("sound", "shards"):
        (folder / saved / "checksums.json").unlink()

    def copy(name, source="sound", lacking="nothing"):
        return shutil.copytree(folder / source, folder / name, ignore=lambda *_: [lacking])

    def with_json(name, file, source="sound", **settings):
        path = copy(name, source) / file
        path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
        return path.parent

    def with_weights(name, change):
        path = copy(name) / "model.safetensors"
        weights = load_file(path)
        change(weights)
        save_file(weights, path, metadata={"format": "pt"})

    def one(value):
        return lambda weights: weights[WEIGHT].view(-1)[5:6].fill_(value)

    with_weights("nan", one(float("nan")))
    with_weights("inf", one(float("inf")))
    with_weights("large", one(1e6))  # float16 ends at 65504
    with_weights("hot", lambda w: [x.mul_(1000) for name, x in w.items() if "_proj" in name])
    with_weights("lacking", lambda weights: weights.pop(WEIGHT))
    with_weights("misshapen", lambda w: w.update({WEIGHT: w[WEIGHT][:, :-8].contiguous()}))
    added = {"value-head": "v_head.weight", "head-bias": "lm_head.bias"}
    added |= {"norm-bias": "model.norm.bias"}
    added |= {"adapter": "model.embed_tokens.lora_A.weight"}
    for name, key in added.items():
        with_weights(name, lambda weights, key=key: weights.update({key: torch.ones(64)}))
    with_json("classifier", "config.json", architectures=["LlamaForSequenceClassification"])
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    (copy("pointer") / "model.safetensors").write_text(pointer)
    for name in ("pointer.gguf", "pointer.txt", "pointer.parquet", "pointers/train.txt"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(pointer)
    first = copy("cut", "shards") / "model-00001-of-00004.safetensors"
    first.write_bytes(first.read_bytes()[:-100])
    whole = (copy("truncated") / "model.safetensors").read_bytes()
    (folder / "truncated" / "model.safetensors").write_bytes(whole[:-100])
    copy("no-weights", lacking="model.safetensors")
    torch.save({"x": _Pickled()}, copy("pickle", lacking="model.safetensors") / "pytorch_model.bin")

    index = "model.safetensors.index.json"
    parts = json.loads((folder / "shards" / index).read_text())["weight_map"]
    with_json(
        "elsewhere", index, "shards", weight_map={n: f"../shards/{f}" for n, f in parts.items()}
    )
    with_json("list-index", index, "shards", weight_map=[1])
    copy("lost-shard", "shards", lacking="model-00001-of-00004.safetensors")

    code = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    own = with_json("own-code", "config.json", model_type="own", auto_map=code)
    llama = with_json("llama-with-code", "config.json", auto_map=code)
    tokenizer = with_json(
        "own-tokenizer",
        "tokenizer_config.json",
        tokenizer_class="OwnTokenizer",
        auto_map={"AutoTokenizer": ["own.Tokenizer", "own.Tokenizer"]},
    )
    for made in (own, llama, tokenizer):
        (made / "own.py").write_text('import os\n\nos.mkdir("ran")\n')
    with_json("zero-layers", "config.json", num_hidden_layers=0)
    with_json("fewer-layers", "config.json", num_hidden_layers=3)
    with_json("wide", "config.json", hidden_size="wide")
    with_json("negative", "config.json", hidden_size=-64)
    with_json("no-activation", "config.json", hidden_act="none")
    with_json("width-60", "config.json", hidden_size=60)
    copy("no-tokenizer", lacking="tokenizer.json")
    (copy("list-tokenizer") / "tokenizer_config.json").write_text("[]")
    words = json.loads((folder / "sound" / "tokenizer.json").read_text())["model"]
    far = {**words, "vocab": {word: i + 1000 for word, i in words["vocab"].items()}}
    with_json("far-tokenizer", "tokenizer.json", model=far)


def _make_plans(folder):
    """A sound LR file and a sound plan, and copies with one thing wrong."""
    text = ["--text", "text.txt", "--max-tokens", "64"]
    assert commands.main(["lr", *MODEL, *text, "--out", "lr.json"]) == 0
    assert commands.main(["plan", *MODEL, "--slice-percentage", "0.25", "--out", "plan.json"]) == 0
    lr, sound = (json.loads((folder / name).read_text()) for name in ("lr.json", "plan.json"))
    layers = lr["layers"]

    def scored(*scores):
        return [{"index": i, "lr": score} for i, score in enumerate(scores)]

    changes = {
        "nan-lr": {"layers": scored(0.1, float("nan"), 0.3, 0.4)},
        "text-lr": {"layers": scored(0.1, "high", 0.3, 0.4)},
        "double-lr": {"layers": scored(0.1, 2.0, 0.3, 0.4)},
        "altered-lr": {"layers": [layers[0], {**layers[1], "lr": 0.5}, *layers[2:]]},
        "three-lr": {"layers": scored(0.1, 0.2, 0.3)},
        "turned-lr": {"layers": layers[::-1]},
        "foreign-lr": {"shape": {**lr["shape"], "hidden_size": 128}},
        "broken-shape-lr": {"shape": {**lr["shape"], "hidden_size": "wide"}},
        "list-shape-lr": {"shape": [64]},
        "float": {"widths": [40.5, 48, 48, 48]},
        "three-plan": {"widths": [48] * 3},
        "above-plan": {"widths": [72, 48, 48, 48]},
        "below-plan": {"widths": [0, 48, 48, 48]},
        "altered-plan": {"widths": [56, 40, 48, 48]},
        "sp-plan": {"slice_percentage": 0.3},
        "base-plan": {"slice_base": 7},
        "round-plan": {"round_to": 7},
        "odd-plan": {"schedule": "mine"},
        "null-plan": {"widths": None},
        "groups-plan": {"layout": {**sound["layout"], "basis_groups": [2, 2]}},
        "group-plan": {"layout": {**sound["layout"], "basis_groups": "all"}},
        "plain-plan": {"layout": {**sound["layout"], "plain": True}},
        "untied-plan": {"layout": {**sound["layout"], "tied": False}},
        "shape-plan": {"shape": {**sound["shape"], "layers": 4.0}},
    }
    for name, change in changes.items():
        values = {**(lr if name.endswith("-lr") else sound), **change}
        (folder / f"{name}.json").write_text(json.dumps(values))


def check_refusal(status, stdout, stderr, message):
    assert status == 2, stderr
    assert stdout == ""
    assert "Traceback" not in stderr
    assert message in stderr
    # A progress bar wipes itself off; what it wrote before is no sentence.
    [sentence] = filter(str.strip, stderr.rpartition("\r")[2].splitlines())
    assert sentence.startswith("dynslice")


@pytest.mark.parametrize("request_", BAD_REQUESTS)
def test_bad_request_is_refused_in_one_sentence(request_, ask, places, record_property):
    before = sorted(path.name for path in places.rglob("*"))
    check_refusal(*ask(*shlex.split(request_)), BAD_REQUESTS[request_])
    assert sorted(path.name for path in places.rglob("*")) == before
    record_property("bad requests answered", 1)


@pytest.mark.parametrize("request_", [PLAN, f"{PPL} --model pickle", f"{PPL} --windws 4"])
def test_json_of_a_bad_request_is_nothing(request_, ask):
    status, stdout, _ = ask(*shlex.split(request_), "--json")
    assert (status, stdout) == (2, "")


def test_code_beside_a_known_model_is_not_run(ask, places):
    """Nobody is asked: the library's own class serves."""
    before = sorted(path.name for path in places.rglob("*"))
    status, _, _ = ask(*PPL.split(), "--model", "llama-with-code")
    assert status == 0
    assert sorted(path.name for path in places.rglob("*")) == before


def test_reproduce_refuses_before_it_measures(ask, monkeypatch):
    def measured(*_, **__):
        raise AssertionError("measuring began")

    monkeypatch.setattr("dynslice.experiment.study.run_all", measured)
    monkeypatch.setattr("dynslice.evaluate.speed.matrix_rate", lambda *_: 1e11)  # takes a while
    monkeypatch.setattr("dynslice.evaluate.speed.copy_rate", lambda *_: 1e10)
    request = "reproduce --profile smoke --set eval_windows=99999999"
    check_refusal(*ask(*request.split()), "fewer than 99999999 windows of 128")


def test_sliced_model_is_not_sliced_again(ask, tmp_path):
    calibration = ["--calibration", "text.txt", "--windows", 1, "--window", 32]
    first = [*MODEL, "--slice-percentage", 0.25, *calibration, "--out", tmp_path / "one"]
    assert ask("slice", *first)[0] == 0
    again = ["--model", tmp_path / "one", "--slice-percentage", 0.25, *calibration]
    refused = ask("slice", *again, "--out", tmp_path / "two")
    check_refusal(*refused, "needs a dense model, and this one is sliced already")
    for asked in (
        ["lr", "--text", "text.txt"],
        ["drop-layers", "--layers", 1, *calibration, "--out", tmp_path / "two"],
        ["slice", "--mlp-neurons", 0.2, *calibration, "--out", tmp_path / "two"],
        ["quantize", "--by", "lr", *calibration, "--out", tmp_path / "two"],
    ):
        refused = ask(*asked, "--model", tmp_path / "one")
        check_refusal(*refused, "needs a dense model, and this one is sliced already")


def test_plan_of_another_model_is_refused(ask, tmp_path):
    path = tmp_path / "plan.json"
    other = ["--model", "embedded:tiny-llama-3", "--slice-percentage", 0.25]
    assert ask("plan", *other, "--out", path)[0] == 0
    refused = ask(*SLICE.split(), "--plan", path, "--out", tmp_path / "new")
    check_refusal(*refused, "the plan was made for another model (reads")


def test_long_text_in_place_of_a_name_is_refused(ask):
    refused = ask("ppl", *MODEL, "--text", paragraphs(2))
    check_refusal(
        *refused, f"neither a corpus ({', '.join([*corpora.CORPORA, *texts.HUB])}) nor a file"
    )


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ("ppl --model nobody/no-such-model --text text.txt", "is not available from the hub"),
        (f"{SLICE} --slice-percentage 2 --out new", "slice percentage 2.0 is outside"),
    ],
)
def test_bad_request_in_a_process_of_its_own(request_, message, dynslice, places):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    check_refusal(*dynslice(*request_.split(), cwd=places, env=environment), message)


# The Python interface


def _tiny():
    return models.load("embedded:tiny-random", torch.device("cpu"), torch.float32)[0]


def _shape():
    return dims_of(models.load_config("embedded:tiny-random"))


def _ids(*size):
    return torch.randint(1, 257, size, generator=torch.Generator().manual_seed(0))


BAD_CALLS = {
    "model": (lambda: models.load_config("embedded:gpt"), "'gpt' is unknown; there are"),
    "corpus": (lambda: texts.documents("nope", None), "'nope' is neither a corpus"),
    "split": (lambda: texts.documents("sotu", "trial"), "'trial' is unknown; use train"),
    "task": (lambda: harness.tasks(None, None, ["piqua"]), "'piqua' is unknown; the tasks"),
    "limit": (lambda: harness.tasks(None, None, ["piqa"], 0), "limit 0 takes no item; use"),
    "subset": (lambda: task_table.check_subset("last", 1), "'last' is unknown; use first or"),
    "profile key": (
        lambda: load_profile("smoke", {"sed": 1}),
        "'sed'.*nearest valid name is 'seed'",
    ),
    "profile value": (lambda: load_profile("smoke", {"seed": "1"}), "seed = '1': Input should be"),
    "profile name": (lambda: load_profile("smoke", {"name": "../x"}), "becomes a folder: use"),
    "parameter": (lambda: Study.from_notebook({"sede": 1}), "'sede'.*nearest valid name is 'seed'"),
    "parameter's value": (
        lambda: Study.from_notebook({"profile": "smoke", "round_to": "[8"}),
        "of round_to is not YAML; quote it",
    ),
    "device": (lambda: pick_device("tpu"), "'tpu' is unknown; use auto, cpu"),
    "dtype": (lambda: pick_dtype("int8", torch.device("cpu")), "'int8' is unknown; use"),
    "slice percentage": (lambda: constant(_shape(), float("nan")), "nan is outside 0 to"),
    "slice base": (lambda: dynamic(_shape(), [0.1] * 4, 0.2, 0.3), "0.3 is outside 0 to"),
    "scores": (
        lambda: dynamic(_shape(), [0.1, float("inf")] * 2, 0.2),
        "LR of layer 1 is inf",
    ),
    "number of scores": (lambda: dynamic(_shape(), [0.1] * 3, 0.2), "LR has 3 layers, the"),
    "rounding": (lambda: constant(_shape(), 0.2, 7), "round_to 7 does not divide"),
    "layer": (lambda: single(_shape(), 4, 0.2), "layer 4 is outside 0 to 3; count from 0"),
    "score": (lambda: scores_of([], "euclid"), "score 'euclid' is unknown; use cosine"),
    "plan": (lambda: SlicePlan.from_dict({}), "is incomplete .no schedule.; make"),
    "short windows": (lambda: perplexity.perplexity(_tiny(), _ids(2, 1)), "predicts no token; use"),
    "long windows": (lambda: perplexity.perplexity(_tiny(), _ids(1, 2049)), "use at most 2048"),
    "tokens": (
        lambda: redundancy.layer_redundancy(_tiny(), _ids(1, 8) + 300, 8),
        "the vocabulary of the model has 257; save the tokenizer",
    ),
    "last layer": (
        lambda: redundancy.layer_redundancy(_tiny(), _ids(1, 8), 8, "final"),
        "last_layer 'final' is unknown; use raw or normed",
    ),
    "calibration": (
        lambda: slicing.slice_model(_tiny(), _ids(1, 8) + 300, constant(_shape(), 0.25)),
        "the vocabulary of the model has 257; save the tokenizer",
    ),
}


@pytest.mark.parametrize("what", BAD_CALLS)
def test_bad_call_raises_a_typed_error(what, record_property):
    call, message = BAD_CALLS[what]
    with pytest.raises(RequestError, match=message) as refusal:
        call()
    assert "\n" not in str(refusal.value)
    record_property("bad requests answered", 1)
