"""
Trains a GPT, with the same code on a CPU, a GPU, an Apple GPU, or many GPUs under torchrun:

    python train.py --recipe=tiny                        # one to two minutes on a laptop, no network
    python train.py                                      # GPT-2 124M on one device
    torchrun --nproc_per_node=8 train.py                 # on eight
    python train.py --recipe=tiny --resume               # continue from the newest checkpoint, exactly
    python train.py --recipe=sft --init_from=gpt2 --data=pairs.jsonl    # fine-tune on prompts and responses

Every hyperparameter below is an option, --name=value. A recipe sets several of them, --config=FILE overrides the
recipe, and the command line wins.
"""
import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while torch is imported: no traceback

import argparse
import contextlib
import copy
import dataclasses
import functools
import gc
import glob
import inspect
import itertools
import json
import math
import os
import re
import shlex
import shutil
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import filelock
import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import dataset
import hellaswag
from data_loader import DataLoader, NoSplit, Pairs
from dataset import UserError
from model import (CHECKPOINT_VERSION, CHOICES, CONFIGS, GPT, GPT2_TOKENS, MAX_SIZE, GPTConfig, autocast, build_model,
                   checkpoint_files, checkpoint_step, cpu_computes_in, find_checkpoints, find_model, load_checkpoint,
                   make_config, open_model, part_path, pick_device, pick_dtype, read_checkpoint, use_large_pages)

# -- hyperparameters: each is an option of the command line

recipe = "gpt2"  # a row of RECIPES
config = ""  # a JSON or YAML file of hyperparameters
data = "data/fineweb-edu"  # a folder that dataset.py wrote, or a file: text, .jsonl or .parquet, tokenized on first use
tokenizer = "gpt2"  # for a file in data: gpt2, byte, bpe:N, a folder of prepared data, or model (that of init_from)
out_dir = "."  # log.txt and checkpoints/ go here
init_from = ""  # start from these weights: a checkpoint, a run's folder, a Hugging Face folder, or a name such as gpt2
resume = ""  # continue from: newest (also without a value), a checkpoint, a run's folder, or auto (newest, if any)
new_data = False  # with resume: accept data other than what the checkpoint was trained on
seed = 1337  # of weights, dropout and data order
total_batch_size = 524_288  # tokens per step, over all processes
micro_batch = 0  # sequences per forward pass; 0: as many as fit
max_steps = 19_073  # 0: as many as `epochs` need
epochs = 0.0  # passes over the training data
max_minutes = 0.0  # train for this long instead, with a schedule that follows the clock; evaluation is not counted
stride = 0  # tokens from one window to the next; 0: block_size
doc_mask = False  # documents, or pairs, that share a row cannot attend to each other, and each starts at position 0
teacher = ""  # also learn from the predictions of this model, named as in init_from
distill_alpha = 0.5  # the teacher's share of the loss
distill_temperature = 1.0  # flattens both distributions before they are compared
optimizer = "adamw"  # adamw | muon (Muon for the matrices of the blocks, AdamW for the rest)
max_lr = 6e-4  # after the warm-up
muon_lr = 0.0  # of Muon's matrices, on the same schedule; 0: max_lr
min_lr = 6e-5  # at the end
warmup_steps = 715  # of linear warm-up
schedule = "cosine"  # cosine | wsd (warm-up, constant, linear decay)
cooldown = 0.4  # wsd decays over this last share of the steps
weight_decay = 0.1  # of matrices and embeddings
beta1 = 0.9
beta2 = 0.95
eps = 1e-8
grad_clip = 1.0  # largest gradient norm; 0: no limit
spike_guard = 0.0  # skip a step whose loss or norm is so many standard deviations above the last 128; 0: never
device = "auto"  # auto | cuda | cuda:1 | mps | cpu
dtype = "auto"  # auto (bfloat16 where the hardware has it) | float32 | bfloat16 | float16
tf32 = True  # multiply float32 matrices in TensorFloat-32 on CUDA
compile = "auto"  # auto (on CUDA) | true | false
parallel = "ddp"  # ddp | zero2 (shards gradients and optimizer state) | zero3 (shards weights too)
reduce_dtype = "float32"  # in which processes exchange gradients: float32 | bfloat16 (half as much to send)
grad_checkpoint = False  # recompute activations in the backward pass: less memory, about a third more time
deterministic = False  # bit-for-bit repeatable on CUDA too, at some cost in speed
val_interval = 250  # steps between validations; 0: never
val_tokens = 10_485_760  # tokens per validation, spread evenly over the val split
patience = 0  # stop after this many validations in a row without improvement, and save each new best; 0: never
ckpt_interval = 1000  # steps between checkpoints; the last step is saved too; 0: only when stopped, or by patience
ckpt_shards = False  # with zero2 or zero3: each process writes its part, and a checkpoint becomes a folder of files
keep = 3  # newest checkpoints to keep, in addition to the best one
sample_interval = 250  # steps between samples; 0: never
sample_prompt = ""  # what the samples begin with
sample_temperature = 0.7  # 0: always the most likely token
hella_interval = 250  # steps between HellaSwag scores; 0: never
log_interval = 1  # steps between lines of the training loss
usd_per_gpu_hour = 0.0  # price of a GPU-hour, to add up the cost of the training steps
wandb_project = ""  # log to Weights & Biases too
dry_run = False  # print what the run would be and cost, and stop
gpu = "RTX 4090,A100,H100"  # the GPUs for which dry_run says what the run would take
bench = ""  # only time this many steps, and print one line of JSON; or ladder: measure each speed-up in turn
profile = ""  # write a trace of the last steps to this file, for ui.perfetto.dev, and print what took their time

# -- tables

SETTINGS = {k: v for k, v in globals().items() if k[0] != "_" and k.islower() and isinstance(v, (int, float, str))}
# The fields of GPTConfig are options too. vocab_size=0 is the tokenizer's size, rounded up to a multiple of 128.
SHAPE = {f.name: f.default for f in dataclasses.fields(GPTConfig) if f.name != "n_tokens"} | {"vocab_size": 0}
SETTINGS |= SHAPE
# globals().update(settings) sets them all; this file uses these four by name.
block_size, vocab_size, dropout, attention = (SHAPE[k] for k in ("block_size", "vocab_size", "dropout", "attention"))

ALLOWED = {
    "optimizer": ("adamw", "muon"), "schedule": ("cosine", "wsd"), "dtype": ("auto", "float32", "bfloat16", "float16"),
    "compile": ("auto", "true", "false"), "parallel": ("ddp", "zero2", "zero3"),
    "reduce_dtype": ("float32", "bfloat16"), **CHOICES}
WITHOUT_VALUE = {"resume": "newest", "compile": "true"}  # these options of text may stand alone
# Options that do nothing without another option, or without this value of it
NEEDS = {"distill_alpha": "teacher", "distill_temperature": "teacher", "muon_lr": "optimizer=muon",
         "cooldown": "schedule=wsd", "new_data": "resume", "patience": "val_interval", "gpu": "dry_run"}
BELOW_ONE = (0, 1 - 1e-9)
# Allowed ranges. Of options that are not listed: 0 to 2**63 - 1 for integers, 0 to infinity for floats
LIMITS = {
    "beta1": BELOW_ONE, "beta2": BELOW_ONE, "dropout": BELOW_ONE, "cooldown": (0, 1), "distill_alpha": (0, 1),
    "distill_temperature": (1e-3, 1e3), "total_batch_size": (1, 2**40), "keep": (1, 2**40), "val_tokens": (1, 2**40),
    "log_interval": (1, 2**40), "epochs": (0, 1e9),
    **dict.fromkeys(("block_size", "n_layer", "n_head", "n_embd"), (1, MAX_SIZE))}
# Not restored from a checkpoint: options of a single launch, and paths, since the file may come from a stranger.
NOT_RESUMED = ("config", "init_from", "resume", "new_data", "dry_run", "gpu", "bench", "profile", "out_dir", "data",
               "teacher")
MAY_CHANGE = ("dropout", "attention")  # the fields of GPTConfig that may differ from those of a checkpoint
RESERVE = 2**30  # bytes on CUDA for the buffers of DDP and NCCL
RECENT = 128  # steps that a spike is measured against
MOMENTUM_WARMUP = 300  # steps
UNKNOWN_STEPS = 2**40  # max_steps with max_minutes, until a step has been timed
MAX_SKIPPED = 20  # steps in a row that may be skipped
NOTICE_SECONDS = 60  # until processes that have not started are named
START_SECONDS = 1800  # until a run without them ends; they may be downloading a model
SIGNALS = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2")  # save and exit; USR1 is Slurm's early warning
REPEAT_SECONDS = 3  # torchrun and Slurm both forward a signal: a repeat within this time is the same one

RECIPES = {
    "gpt2": {},
    "gpt-xs": dict(**CONFIGS["gpt-xs"]),
    "gpt2-custom": dict(data="data/fineweb", warmup_steps=768),
    "custom-gpt": dict(
        **CONFIGS["custom-gpt"], data="data/custom-gpt", tokenizer="bpe:50000", total_batch_size=64 * 512, epochs=3,
        max_lr=1e-4, min_lr=0.0, warmup_steps=1000, dtype="float16", parallel="zero2", val_interval=1000,
        val_tokens=1_000_000, sample_interval=5000, hella_interval=5000, log_interval=10),
    # At this size a modern architecture learns far faster than GPT-2's. AdamW's second moment should average over about
    # as many tokens as with large batches (Marek et al., 2025), so beta2 is close to 1.
    "tiny": dict(
        **CONFIGS["tiny"], data="input.txt", tokenizer="bpe:4096", total_batch_size=4 * 256, max_steps=1000,
        optimizer="muon", muon_lr=0.012, max_lr=4e-3, min_lr=0.0, beta2=0.999, weight_decay=0.2, warmup_steps=50,
        schedule="wsd", cooldown=0.8, doc_mask=True, val_interval=100, ckpt_interval=200, sample_interval=500,
        sample_prompt="Once", hella_interval=0, log_interval=10),
    # Fine-tunes --init_from on the pairs in --data.
    "sft": dict(
        data="pairs.jsonl", total_batch_size=16 * 1024, epochs=3, max_lr=1e-4, min_lr=0.0, warmup_steps=20,
        doc_mask=True, patience=3, val_interval=50, val_tokens=500_000, ckpt_interval=500, sample_interval=0,
        hella_interval=0),
    "speedrun": dict(
        **CONFIGS["speedrun"], optimizer="muon", schedule="wsd", cooldown=0.7, max_lr=2e-3, min_lr=0.0,
        warmup_steps=100, max_steps=6000),
}
RECIPES["shakespeare"] = {
    **RECIPES["tiny"], "block_size": 128, "data": "data/shakespeare", "tokenizer": "byte", "doc_mask": False,
    "muon_lr": 0.02, "weight_decay": 0.1, "val_interval": 250, "sample_prompt": "ROMEO:"}
# toyGPT has no default batch or learning rate. The learning rates are those of GPT-3 models of these sizes (Brown et
# al., 2020, table 2.1).
for _name, _lr in (("toygpt-small", 6e-4), ("toygpt-medium", 3e-4), ("toygpt-large", 2e-4)):
    RECIPES[_name] = dict(
        **CONFIGS[_name], data="data/toygpt", total_batch_size=512 * 512, epochs=1, max_lr=_lr, min_lr=_lr / 10,
        warmup_steps=300, sample_prompt="This is the end", sample_temperature=0.0)
for _name in ("tinystories", "tinystories-small", "tinystories-large"):
    RECIPES[_name] = dict(
        **CONFIGS[_name], data="data/tinystories", total_batch_size=8 * CONFIGS[_name]["block_size"], max_lr=5e-4,
        epochs=20, val_interval=5000, val_tokens=500_000, ckpt_interval=5000, sample_interval=5000,
        sample_prompt="Once upon a time", hella_interval=0, log_interval=100)

# What --bench=ladder measures, each added to those before it, as listed in the README of GPT2-Custom.
LADDER = {
    "float32": dict(dtype="float32", tf32=False, attention="reference", vocab_size=GPT2_TOKENS, compile="false",
                    parallel="ddp"),
    "TF32": dict(tf32=True),
    "half precision": dict(dtype="auto"),
    "fused attention": dict(attention="fused"),
    "vocabulary 50304": dict(vocab_size=50304),
    "torch.compile": dict(compile="true"),
}

PROFILED_STEPS = 3
# What --profile calls the work, by a part of the name of a kernel or an operation; the first that fits
WORK = {
    "communication": "nccl|gloo|all_?reduce|all_?gather|reduce_?scatter",
    "attention": "flash|attention|fmha|sdpa|aten::_softmax", "optimizer": "adam|muon|multi_tensor|foreach|vector_norm",
    "loss": "softmax|nll|cross_entropy|logsumexp", "matmul": "mm|gemm|nvjet|cutlass|xmma", "data": "memcpy|pin_memory"}

# Dense bf16 (fp16 before Ampere) TFLOP/s with float32 accumulation, from the vendors' data sheets
PEAK_TFLOPS = {"GB200": 2500, "B200": 2250, "H200": 989, "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "A100": 312,
               "L40S": 362, "L40": 181, "L4": 121, "A10G": 70, "A10": 125, "V100": 125, "T4": 65,
               "RTX 5090": 210, "RTX 4090": 165, "RTX 3090": 71}


# -- settings: globals < recipe < config file < command line

def boolean(text):
    if text.lower() not in ("true", "1", "false", "0"):
        raise argparse.ArgumentTypeError(f"{text!r} is not true or false")
    return text.lower() in ("true", "1")


def number(text):
    with contextlib.suppress(ValueError):
        if math.isfinite(value := float(text)):
            return value
    raise argparse.ArgumentTypeError(f"{text!r} is not a number")


def make_parser():
    """An option for each hyperparameter. Its help is its comment."""
    source = inspect.getsource(sys.modules[__name__]).split("# -- tables")[0] + inspect.getsource(GPTConfig)
    comments = dict(re.findall(r"^ *(\w+)(?:: \w+)? = .*?  # (.*)$", source, re.MULTILINE))
    parser = dataset.Parser(
        prog="train.py", description=f"{__doc__}\nrecipes: {', '.join(RECIPES)}", argument_default=argparse.SUPPRESS)
    convert = {bool: boolean, int: dataset.integer, float: number, str: str}
    convert_by_name = {"recipe": str.lower, "dtype": dataset.dtype_name,
                       "resume": lambda text: {"true": "newest", "false": ""}.get(text, text)}
    for name, default in SETTINGS.items():
        options = dict(type=convert_by_name.get(name, convert[type(default)]), choices=ALLOWED.get(name),
                       metavar=type(default).__name__.upper())
        if isinstance(default, bool) or name in WITHOUT_VALUE:
            options.update(nargs="?", const=WITHOUT_VALUE.get(name, True))
        comment = comments.get(name, "").replace("%", "%%")
        parser.add_argument(f"--{name}", help=f"{comment} (default: {default!r})", **options)
    return parser


def parse(parser, arguments):
    """["--max_lr=1e-3", "--resume"] -> {"max_lr": 0.001, "resume": "newest"}, checked"""
    settings = vars(parser.parse_args(arguments))
    for name, value in settings.items():
        low, high = LIMITS.get(name, (0, 2**63 - 1 if isinstance(value, int) else math.inf))
        if isinstance(value, (int, float)) and not low <= value <= high:
            problem = f"below {low}" if value < low else f"above {high}"
            raise UserError(f"{name}={value} is {problem}")
    return settings


def parse_values(parser, values, source):
    """A dict from a file, through the same conversion and checks as the command line"""
    try:
        for name, value in values.items():
            is_text = isinstance(SETTINGS.get(name), str) and name not in WITHOUT_VALUE
            if not isinstance(value, (bool, int, float, str)) or isinstance(value, bool) and is_text:
                raise UserError(f"{name} is of type {type(value).__name__}")
        texts = {k: str(v).lower() if isinstance(v, bool) else v for k, v in values.items()}
        return parse(parser, [f"--{name}={text}" for name, text in texts.items()])
    except (UserError, ValueError) as e:  # Python refuses to print integers of over 4,300 digits
        raise UserError(f"{source}: {e}") from None


def read_config(path):
    """A JSON or YAML file -> the hyperparameters in it, also those in sections"""
    with dataset.reading(path, 'one JSON object, {"max_lr": 1e-3, ...}, or the same in YAML'):
        if not path.endswith((".yaml", ".yml")):
            values = dataset.read_json(path)
        else:
            try:
                import yaml
            except ImportError:
                raise UserError(f"{path} needs a package: pip install pyyaml") from None
            with open(path, encoding="utf-8") as f:
                values = yaml.safe_load(f)
        for _ in range(10):  # levels at most: in YAML a section can contain itself
            sections = [v for v in values.values() if isinstance(v, dict)]
            values = {k: v for k, v in values.items() if not isinstance(v, dict)}
            for section in sections:
                values.update(section)
    return values


def configure(argv):
    """-> all settings, those the user chose, and the checkpoint to resume from, if any"""
    parser = make_parser()
    command, file = parse(parser, argv), {}
    if path := command.get("config"):
        file = parse_values(parser, read_config(path), f"config {path}")
        if file.get("config"):
            raise UserError(f"config {path} names another, {file['config']}; only one is read")
    asked = {**file, **command}
    name = asked.get("recipe", recipe)
    if name not in RECIPES:
        raise UserError(f"there is no recipe {name!r}" + dataset.suggest(name, RECIPES))
    ckpt = None if asked.get("bench") else find_resume({**SETTINGS, **asked})
    settings = dict(SETTINGS)
    for layer in (resumed_settings(parser, ckpt, asked) if ckpt else RECIPES[name], file, command):
        # What a layer says about the length of the run replaces what earlier layers say.
        if layer.get("max_minutes") or "epochs" in layer and "max_steps" not in layer:
            settings["max_steps"] = 0
        if "max_steps" in layer or "epochs" in layer:
            settings["max_minutes"] = 0.0
        settings.update(layer)
    for layer in (file, command):
        if sum(layer.get(name, 0) > 0 for name in ("max_minutes", "max_steps", "epochs")) > 1:
            raise UserError("max_minutes, max_steps and epochs cannot be combined: each says how long to train")
    if asked.get("ckpt_shards") and settings["parallel"] == "ddp":
        raise UserError("ckpt_shards needs --parallel=zero2 or zero3")
    if settings["min_lr"] > settings["max_lr"]:
        raise UserError(f"min_lr={settings['min_lr']:g} is above max_lr={settings['max_lr']:g}; lower it too")
    if unknown := [name for name in map(str.strip, settings["gpu"].split(",")) if name not in PEAK_TFLOPS]:
        raise UserError(f"gpu={unknown[0]} is none of {', '.join(PEAK_TFLOPS)}")
    for name, needed in NEEDS.items():
        other, _, value = needed.partition("=")
        is_met = settings[other] == value if value else settings[other]
        chosen = asked if name == "patience" else command  # a config file may list all options
        if chosen.get(name) and not is_met:
            raise UserError(f"--{name} does nothing without --{needed}")
    if settings["muon_lr"] and not settings["max_lr"]:
        raise UserError("muon_lr follows the schedule of max_lr, which is 0")
    for name in ("resume", "dry_run"):
        if settings["bench"] and command.get(name):
            raise UserError(f"--bench and --{name} cannot be combined")
    if not os.path.isdir(os.path.dirname(settings["profile"]) or ".") or os.path.isdir(settings["profile"]):
        raise UserError(f"--profile={settings['profile']} must name a file, in a folder that exists")
    if re.fullmatch(r"[1-9]\d{0,8}", settings["bench"]):
        settings.update({k: 0 for k in settings if k.endswith("_interval")})
        settings.update(max_steps=int(settings["bench"]), max_minutes=0.0, patience=0)
        if "data" not in asked and not os.path.exists(settings["data"]):
            settings["data"] = "input.txt"  # real batches, whatever is at hand
    elif settings["bench"] not in ("", "ladder"):
        raise UserError(f"bench={settings['bench']!r} must be a number of steps, or ladder")
    if settings["profile"] and (settings["max_minutes"] or settings["patience"]):
        raise UserError("profile times the last steps, so it needs max_steps or epochs, and no max_minutes or patience")
    return settings, asked, ckpt


def find_resume(settings):
    """The checkpoint that --resume means, or None"""
    choice, folder = settings["resume"].rstrip("/"), settings["out_dir"]
    if not choice:
        return None
    if os.path.isdir(choice) and not choice.endswith(".pt"):
        choice, folder = "newest", choice
    paths = [choice] if choice not in ("newest", "auto") else find_checkpoints(folder)[::-1]
    for path in paths:
        try:
            return read_run(path)
        except UserError as e:
            if path == paths[-1]:
                raise
            print(f"{e}; trying the one before", file=sys.stderr)
    if choice == "auto":
        return None
    raise UserError(f"{folder}/checkpoints has no checkpoint to resume from; start without --resume, or name another "
                    "--out_dir")


def resumed_settings(parser, ckpt, asked):
    """
    -> the settings of the run that a checkpoint belongs to. A stranger may have made the file, so only known
    hyperparameters are taken, each as if it stood on the command line, but no path: the user must repeat those.
    """
    saved = {k: ckpt["train_config"].get(k, default) for k, default in SETTINGS.items() if k not in NOT_RESUMED}
    name = saved["tokenizer"]
    if asked.get("new_data") or not isinstance(name, str) or not re.fullmatch(dataset.TOKENIZER_NAME, name):
        saved["tokenizer"] = "model"  # not a path, and not one to be trained on the new data
    saved = parse_values(parser, saved, ckpt["path"])
    if saved["recipe"] not in RECIPES:
        raise UserError(f"{ckpt['path']} was trained with an unknown recipe")
    if asked.get("recipe", saved["recipe"]) != saved["recipe"]:
        raise UserError(f"{ckpt['path']} was trained with recipe {saved['recipe']}, not {asked['recipe']}; start a new "
                        "run with another --out_dir")
    shape = dataclasses.asdict(make_config(ckpt["model_config"], ckpt["path"]))
    fixed = {k: saved[k] for k in ("optimizer", "seed", "stride")}
    check_fixed({**shape, **fixed}, asked, ckpt["path"])
    settings = {**RECIPES[saved["recipe"]], **saved}
    for name in ("data", "teacher"):
        path = ckpt["train_config"].get(name, "")
        if name not in asked and path != settings.get(name, SETTINGS[name]):
            raise UserError(f"{ckpt['path']} was trained with --{name}={path if isinstance(path, str) else '?'}; to "
                            "resume, repeat that option or choose another")
    return settings | {k: v for k, v in shape.items() if k in SHAPE and k not in MAY_CHANGE}


def check_fixed(has, asked, path):
    """Refuses options that contradict what a checkpoint has."""
    for name, value in asked.items():
        if name in MAY_CHANGE or name == "vocab_size" and value == 0:
            continue
        if name in has and value != has[name]:
            raise UserError(f"{path} has {name}={has[name]}, not {value}; that cannot change")


# -- small decisions: the learning rate, the batch, when to skip a step, when to stop

def get_lr(step):
    """The learning rate of step 0, 1, ...: linear warm-up, then a cosine, or a plateau and a linear decay, to min_lr"""
    warmup = min(warmup_steps, max_steps // 10) if max_minutes else warmup_steps  # few steps may fit into the time
    if step < warmup:
        return max_lr * (step + 1) / warmup
    if schedule == "cosine":
        progress = min(1.0, (step - warmup) / max(1, max_steps - warmup))
        return min_lr + 0.5 * (1 + math.cos(math.pi * progress)) * (max_lr - min_lr)
    decay_steps = min(round(cooldown * max_steps), max_steps - warmup)
    left = min(1.0, (max_steps - step) / max(1, decay_steps))
    return min_lr + left * (max_lr - min_lr)


def divide_batch(world_size):
    """-> how many sequences each process takes per step. The user states tokens; the rest follows."""
    unit = block_size * world_size
    if total_batch_size % unit:
        low = total_batch_size // unit * unit
        near = f"{low:,} or {low + unit:,}" if low else f"{unit:,}"
        raise UserError(f"total_batch_size={total_batch_size:,} is not a multiple of block_size x processes = "
                        f"{block_size} x {world_size}; use {near}")
    sequences = total_batch_size // unit
    if micro_batch and sequences % micro_batch:
        raise UserError(f"micro_batch={micro_batch} does not divide the {sequences} sequences each process takes per "
                        f"step; use one of {', '.join(map(str, divisors(sequences)))}")
    return sequences


def divisors(n):
    low = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return sorted({*low, *(n // d for d in low)})


def count_steps(n_rows, sequences, step=0, position=0):
    """
    max_steps, or as many as `epochs` need: after this step, which has taken `position` rows, if resumed. 0 if that is
    not known: with max_minutes, where the loop asks steps_in_time, and in a dry run before the data is prepared.
    """
    if max_minutes:
        return 0
    if not max_steps and not epochs:
        raise UserError("max_steps and epochs are both 0; set one")
    if not max_steps and not n_rows:
        return 0
    steps_left = round((epochs * n_rows - position) / sequences, 6)  # 1.1 epochs of 100 rows are 110.00000000000001
    return max_steps or step + max(0, math.ceil(steps_left))


def steps_in_time(run, times, device):
    """With max_minutes, how many steps the run will have, as far as can be said now; the same on all processes"""
    if not run["step"]:
        return UNKNOWN_STEPS
    seconds = statistics.median(times[-20:]) if len(times) > 2 else max(run["seconds"] / run["step"], 1e-9)
    sum_left, n = all_sum(device, (60 * max_minutes - run["seconds"]) / seconds, 1)
    steps_left = max(0, int(sum_left / n))  # the mean over n processes
    # The first step is slow: it says nothing about the others.
    return UNKNOWN_STEPS if steps_left and run["step"] < 3 else run["step"] + steps_left


def step_label(step):
    return f"step {step}/{'?' if max_steps == UNKNOWN_STEPS else max_steps}"


def skip_reason(loss, norm, recent):
    """
    Why a step must not change the weights, or "": it is not finite, or its loss or gradient norm stands out from the
    last RECENT steps (as in llm.c, pull request 637). The step is recorded even if skipped, so that a lasting change
    soon counts as normal.
    """
    if not math.isfinite(loss + norm):
        return "its loss or gradient is not finite"
    recent.append((loss, norm))
    del recent[:-RECENT - 1]
    if spike_guard and len(recent) > RECENT:
        losses, norms = zip(*recent)
        for name, (*past, value) in (("loss", losses), ("gradient norm", norms)):
            deviations = (value - statistics.fmean(past)) / (statistics.stdev(past) or math.inf)
            if deviations > spike_guard:
                return f"its {name} of {value:.4g} is {deviations:.1f} standard deviations above the last {RECENT}"
    return ""


def is_new_best(run):
    """Whether this step was validated, with a lower loss than any saved before"""
    return run["last_val"]["step"] == run["step"] and run["last_val"]["loss"] < run["best"]["loss"]


def out_of_patience(run):
    """Whether this step was validated, and the last `patience` validations brought no new best"""
    return 0 < patience <= run["stale"] and run["last_val"]["step"] == run["step"]


def is_last(run):
    return run["step"] == max_steps or out_of_patience(run)


def is_due(interval, run):
    return interval > 0 and (run["step"] % interval == 0 or is_last(run))


def dollars(seconds, world_size):
    """The cost of this time on all GPUs: 2.5 hours of 8 at usd_per_gpu_hour=2.5625 are $51.25."""
    return seconds / 3600 * world_size * usd_per_gpu_hour


# -- processes and devices

def read_launch(environment):
    """-> rank, local rank and number of processes, as torchrun tells them, or those of a single process"""
    values = {name: environment[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE") if name in environment}
    if not values:
        return 0, 0, 1
    if len(values) < 3 or not all(re.fullmatch(r"\d{1,6}", value) for value in values.values()):
        raise UserError(f"the environment has {', '.join(f'{k}={v}' for k, v in values.items())}, which is not what "
                        "torchrun sets; start several processes with torchrun, or unset these")
    rank, local_rank, world_size = map(int, values.values())
    if rank >= world_size:
        raise UserError(f"RANK={rank} must be below WORLD_SIZE={world_size}; start several processes with torchrun")
    return rank, local_rank, world_size


stop_signal, stop_time = 0, 0.0
launcher = os.getppid()


def request_stop(signum, frame):
    global stop_signal, stop_time
    if not stop_signal:
        stop_signal, stop_time = signum, time.monotonic()
        if os.environ.get("RANK", "0") == "0":
            with contextlib.suppress(OSError):  # not print, which a signal may have interrupted
                os.write(2, b"\nfinishing the step and saving; to leave at once, repeat in a few seconds\n")
    elif time.monotonic() - stop_time > REPEAT_SECONDS:
        os._exit(128 + signum)


def should_stop():
    """The signal to stop for, or 0. A process whose torchrun was killed stops too."""
    if "TORCHELASTIC_RUN_ID" in os.environ and os.getppid() != launcher:
        return stop_signal or signal.SIGHUP
    return stop_signal


@contextlib.contextmanager
def notice_if_slow(text):
    """Prints a text if the block takes more than a minute: waiting for a network is silent otherwise."""
    timer = threading.Timer(NOTICE_SECONDS, print, args=[f"train.py: {text}"], kwargs=dict(flush=True))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def start_processes(device, rank, world_size):
    """Connects the processes.  -> the name of each one's machine"""
    try:
        store, machines = wait_for_processes(rank, world_size)
        with notice_if_slow(
                "the processes cannot exchange data yet. On several machines, NCCL_SOCKET_IFNAME and "
                "GLOO_SOCKET_IFNAME name the network they share; on one, NCCL_P2P_DISABLE=1 may help."):
            # Two hours, since a process may have to wait for data that another one prepares.
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=store, rank=rank,
                                    world_size=world_size, timeout=timedelta(hours=2))
            # PyTorch has just wrapped report_error, to put the rank before each line
            sys.excepthook = functools.partial(report_and_exit, sys.excepthook)
            dist.all_reduce(present := torch.zeros(1, device=device))
            present.item()  # CUDA works asynchronously: wait
        store.delete_key(f"machine/{rank}")  # torchrun may keep the store for another start
    except (RuntimeError, ValueError) as e:
        raise UserError(f"the processes cannot reach each other ({summarize(e)}); start them with torchrun")
    return machines


def wait_for_processes(rank, world_size):
    """
    Every process reports to a common store; after a minute, those that have not are named.
    -> the store, and the name of each one's machine
    """
    address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT", "")
    if not address or not port.isdecimal() or int(port) >= 2**16:
        raise ValueError("MASTER_ADDR and MASTER_PORT are not set, or not valid")
    # torchrun usually keeps the store; otherwise the first process does.
    is_host = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    with notice_if_slow(f"{address}:{port}, where torchrun or the first process should listen, cannot be reached yet"):
        store = dist.TCPStore(
            address, int(port), is_master=is_host, timeout=timedelta(seconds=START_SECONDS), wait_for_workers=False,
            multi_tenant=True)
    keys = [f"machine/{r}" for r in range(world_size)]
    store.set(keys[rank], socket.gethostname())
    notice_at = NOTICE_SECONDS
    give_up_at = START_SECONDS + (2 if is_host else 0)  # the host last: the others read its store
    began = time.monotonic()
    while not store.check(keys):
        waited = time.monotonic() - began
        if waited > min(notice_at, give_up_at):
            ready = [r for r, key in enumerate(keys) if store.check([key])]
            missing = ", ".join(str(r) for r in range(world_size) if r not in ready)
            machines = count_machines(store.get(keys[r]).decode() for r in ready)
            text = f"not ready after {waited:.0f} seconds: rank {missing} of {world_size}; ready: {machines}"
            if waited > give_up_at:
                raise UserError(text)
            if rank == ready[0]:
                print(f"train.py: {text}", flush=True)
            notice_at = math.inf
        time.sleep(0.1)
    return store, [name.decode() for name in store.multi_get(keys)]


def count_machines(names):
    """["node1", "node1", "node2"] -> 2 processes on node1, 1 process on node2"""
    counts = Counter(names).items()
    return ", ".join(f"{n} process{'es' if n > 1 else ''} on {name}" for name, n in counts)


def end_process(exit_code):
    if dist.is_initialized():
        dist.barrier()  # wait for the process that saves
        dist.destroy_process_group()
        exit_at_once(exit_code)
    sys.exit(exit_code)


def report_and_exit(report, kind, error, trace):
    """For sys.excepthook, in one of several processes"""
    report(kind, error, trace)
    exit_at_once(1)


def exit_at_once(exit_code):
    """
    Ends one of several processes without Python's shutdown, during which a thread of gloo that still runs can abort the
    process (1 in 30). A checkpoint that is being written is finished first.
    """
    writer.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)


def measure_network(device, rank, world_size):
    """--dry_run under torchrun.  -> the machines, as text, and the seconds that an all_reduce takes per byte"""
    machines = start_processes(device, rank, world_size)
    numbers, times = torch.zeros(2**24, device=device), []
    for _ in range(4):
        began = time.perf_counter()
        dist.all_reduce(numbers)
        numbers[0].item()  # wait
        times.append(time.perf_counter() - began)
    return count_machines(machines), statistics.median(times[1:]) / numbers.nbytes  # the first opens connections


def summarize(error):
    """The first line of an error of torch; NCCL gives the cause on the lines after "Last error:"."""
    text = str(error)
    return " ".join([*text.splitlines()[:1], *text.partition("Last error:")[2].split()])


def report_error(kind, error, trace):
    """For sys.excepthook: when a process ends with an error, gloo and NCCL raise others in the processes that wait."""
    is_network = re.search("gloo|nccl|connection closed", str(error), re.IGNORECASE)
    if issubclass(kind, RuntimeError) and is_network and not dataset.is_out_of_memory(error):
        rank = os.environ.get("RANK")
        kind, error = UserError, f"rank {rank} lost the others; see their errors first ({summarize(error)})"
    dataset.report_error(kind, error, trace)


def all_sum(device, *numbers):
    """Numbers summed over all processes"""
    if not dist.is_initialized():
        return numbers
    total = torch.tensor(numbers, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.tolist()


def all_equal(device, *numbers):
    """Whether these numbers are the same on all processes"""
    if not dist.is_initialized():
        return True
    extremes = torch.tensor([numbers, [-n for n in numbers]], dtype=torch.float64, device=device)
    dist.all_reduce(extremes, dist.ReduceOp.MAX)
    return extremes[0].tolist() == (-extremes[1]).tolist()


def training_dtype(device, is_chosen, is_main=True):
    """
    What matrices are multiplied in; the weights and the optimizer's moments are in float32. On a CPU that is slow in
    float16, a recipe's float16 becomes float32; the user's own choice is obeyed.
    """
    picked = pick_dtype(dtype, device)
    if picked == torch.float16 and device.type == "cpu" and not is_chosen and not cpu_computes_in(picked):
        if is_main:
            print("training in float32: this CPU is very slow in the recipe's float16 (--dtype=float16 insists)")
        return torch.float32
    if picked == torch.bfloat16 and device.type == "cuda" and pick_dtype("auto", device) != picked:
        raise UserError("this GPU does not compute in bfloat16; use --dtype=float16 or float32")
    if picked == torch.float16 and device.type == "mps":
        raise UserError("dtype=float16 needs a loss scaler, which torch does not have for mps; use bfloat16 or float32")
    return picked


def peak_tflops(device):
    """What the device can do in bf16, or None if it is not in the table"""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((tflops for gpu, tflops in PEAK_TFLOPS.items() if re.search(rf"\b{gpu}\b", name)), None)


def peak_memory_gb(device):
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    try:
        import resource
    except ImportError:  # Windows
        return math.nan
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


# -- data

def open_data(spec, is_local_main):
    """
    -> a folder of shards, or Pairs; the tokenizer's spec, and the tokenizer, None if it cannot be had. A text file is
    first tokenized into a folder, by the tokenizer of this spec.
    """
    path = find_data()
    if os.path.isdir(path):
        if manifest := dataset.read_manifest(path):
            return path, manifest["tokenizer"], dataset.get_tokenizer(manifest["tokenizer"])
        # Published shards of this format are in GPT-2's tokens. Training needs no vocabulary file; sampling does.
        if is_local_main:
            print(f"{path} has no manifest: assuming GPT-2 tokens (only their range is checked)")
        try:
            return path, {"name": "gpt2"}, dataset.get_tokenizer("gpt2")
        except UserError:
            return path, {"name": "gpt2"}, None
    if not os.path.isfile(path):
        name = os.path.basename(data)
        hint = f"make it with: python dataset.py --source={name}; or try --recipe=tiny, which needs none"
        if name not in dataset.SOURCES:
            hint = "name a folder that dataset.py wrote, or a file of text or pairs"
        raise UserError(f"there is no data {data}; {hint}")
    if dataset.holds_pairs(path):
        enc = dataset.get_tokenizer(spec)
        with contextlib.redirect_stdout(sys.stdout if is_local_main else None):  # print() does nothing then
            return Pairs(path, enc), spec, enc
    folder = text_folder(spec)
    if is_local_main:
        try:
            dataset.prepare(path, spec, out=folder)
        except UserError as e:
            raise UserError(f"{e}; to prepare it yourself: python dataset.py --source={shlex.quote(data)} "
                            "--out=FOLDER, then train.py --data=FOLDER") from None
    if dist.is_initialized():
        dist.barrier()
    spec = dataset.read_manifest(folder)["tokenizer"]
    return folder, spec, dataset.get_tokenizer(spec)


def find_data():
    """The path of --data, which may also be beside this file, as input.txt is"""
    return data if os.path.exists(data) else os.path.join(os.path.dirname(__file__), data)


def text_folder(spec):
    """Where the shards of a text file go, by its name and tokenizer. prepare() refuses another text of that name."""
    stem = os.path.splitext(os.path.basename(data))[0]
    kind = re.sub(r"[^a-z0-9]+", "", spec["name"].lower())
    if "merges" in spec:  # two models may have two tokenizers of one name
        kind += "-" + dataset.tokenizer_fingerprint(dataset.get_tokenizer(spec))[:6]
    return os.path.join("data", f"{stem}-{kind}")


def check_tokenizers(spec, required, asked):
    """The data's tokenizer must be that of the model, of the teacher, and what the user asked for."""
    for name, theirs in required.items():
        if theirs and theirs != spec:
            raise UserError(f"{name} uses tokenizer {theirs['name']}, but the data uses another, {spec['name']}")
    if asked.get("tokenizer", "model") != "model":
        wanted = dataset.parse_tokenizer(tokenizer)
        if wanted != (spec if dataset.is_trained(wanted) else {"name": spec["name"]}):
            raise UserError(f"{data} uses tokenizer {spec['name']}, not {tokenizer}")


def open_held_out(source, options):
    """-> {"val": loader, "test": loader}, as far as the data has these splits"""
    loaders = {}
    for split in ("val", "test"):
        try:
            loaders[split] = DataLoader(source, split, 1, block_size, **options)
        except NoSplit as e:
            if split == "val" and patience:
                raise UserError(f"patience needs validation, but {e}; --patience=0 trains without it") from None
            if split == "val" and val_interval and options["rank"] == 0:
                print(f"no validation loss: {e}")
    return loaders


# -- models

def new_model(n_tokens):
    shape = {k: globals()[k] for k in SHAPE}
    shape["vocab_size"] = vocab_size or -(-n_tokens // 128) * 128  # rounded up
    return GPT(GPTConfig(**shape, n_tokens=n_tokens))


def initial_model(settings, asked):
    """The model that init_from names, and its tokenizer's spec. Its shape goes into the settings."""
    model, known = load_checkpoint(settings["init_from"])
    chosen = {**RECIPES[settings["recipe"]], **asked}
    check_fixed(dataclasses.asdict(model.cfg), chosen, settings["init_from"])
    for name in MAY_CHANGE:
        setattr(model.cfg, name, chosen.get(name, getattr(model.cfg, name)))
    settings.update({k: getattr(model.cfg, k) for k in SHAPE}, tokenizer=asked.get("tokenizer", "model"))
    return model, known["tokenizer"]


def open_teacher(device, amp_dtype):
    """The model that --teacher names, and its tokenizer's spec"""
    folder = os.path.dirname(os.path.realpath(find_model(teacher)))
    if folder == os.path.realpath(os.path.join(out_dir, "checkpoints")):
        raise UserError(f"the teacher {teacher} is in this run's own folder; choose another --out_dir")
    model, known = open_model(teacher, device=device, dtype="float32" if amp_dtype == torch.float32 else "auto")
    if model.cfg.block_size < block_size:
        raise UserError(f"the teacher {teacher} has a context of {model.cfg.block_size}, less than "
                        f"block_size={block_size}")
    return model, known["tokenizer"]


def loss_fn(model, teacher_model, x, y, *document):
    """The mean loss over the targets of a batch; with a teacher, mixed with the divergence from its predictions"""
    logits, loss = model(x, y, *document, with_logits=teacher_model is not None)
    if teacher_model is None:
        return loss
    with torch.inference_mode(), torch.autocast(x.device.type, enabled=False):
        teacher_logits = teacher_model(x, y, *document)[0]  # without y, of the last position only
    n = teacher_model.cfg.n_tokens  # the two may be padded differently
    return distill(loss, logits[..., :n], teacher_logits[..., :n], y)


def distill(loss, logits, teacher_logits, targets):
    """Knowledge distillation (Hinton et al., 2015). T^2 restores the size of gradients that a temperature T shrinks."""
    is_target = targets >= 0
    student, wanted = (
        F.log_softmax(z[is_target].float() / distill_temperature, dim=-1) for z in (logits, teacher_logits))  # (n, V)
    divergence = F.kl_div(student, wanted, reduction="batchmean", log_target=True)
    return (1 - distill_alpha) * loss + distill_alpha * distill_temperature**2 * divergence


def muon_groups(model):
    """With optimizer=muon, the matrices of the blocks, grouped by shape. c_attn is three in one: for q, k and v."""
    parts = {"attn.c_attn": 3, "attn.c_proj": 1, "mlp.c_fc": 1, "mlp.c_proj": 1} if optimizer == "muon" else {}
    return [dict(params=[block.get_submodule(name).weight for block in model.transformer.h], parts=n)
            for name, n in parts.items()]


def make_optimizers(model, device, amp_dtype):
    """Matrices and embeddings are decayed; biases and norms are not."""
    groups = muon_groups(model)
    taken = {id(p) for group in groups for p in group["params"]}
    in_bfloat16 = amp_dtype != torch.float32 and pick_dtype("auto", device) == torch.bfloat16
    muon_dtype = torch.bfloat16 if in_bfloat16 else torch.float32
    muon = [Muon(groups, muon_lr or max_lr, weight_decay, muon_dtype)] if groups else []
    decayed = [p for p in model.parameters() if p.dim() >= 2 and id(p) not in taken]
    others = [p for p in model.parameters() if p.dim() < 2]
    groups = [dict(params=decayed, weight_decay=weight_decay), dict(params=others, weight_decay=0.0)]
    fused = device.type in ("cuda", "cpu")
    return [*muon, torch.optim.AdamW(groups, lr=max_lr, betas=(beta1, beta2), eps=eps, fused=fused)]


def set_rates(optimizers, step):
    """Sets the learning rates of this step, and Muon's momentum, shorter at first.  -> the rate of AdamW"""
    lr = get_lr(step)
    for o in optimizers:
        for group in o.param_groups:
            group["lr"] = lr
            if isinstance(o, Muon):
                group["momentum"] = 0.85 + 0.10 * min(1.0, step / MOMENTUM_WARMUP)
                if muon_lr:
                    group["lr"] = lr * muon_lr / (max_lr or 1)
    return lr


class Muon(torch.optim.Optimizer):
    """
    Momentum whose steps are made orthogonal, so that a matrix learns equally fast in all directions (Jordan et al.,
    2024), and scaled so that AdamW's learning rate suits both (Liu et al., 2025). Takes the steps of torch.optim.Muon,
    but treats q, k and v as three matrices, multiplies all matrices of one shape together, uses float32 on devices
    without bfloat16 and in training in float32, and divides the work among the processes.
    """

    def __init__(self, groups, lr, weight_decay, dtype):
        super().__init__(groups, dict(lr=lr, weight_decay=weight_decay, momentum=0.95))
        self.dtype = dtype

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            params, momentum = group["params"], group["momentum"]
            for p in params:
                if "momentum_buffer" not in self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            grads, buffers = [p.grad for p in params], [self.state[p]["momentum_buffer"] for p in params]
            torch._foreach_lerp_(buffers, grads, 1 - momentum)
            updates = [gathered(torch.lerp(g, b, momentum)) for g, b in zip(grads, buffers)]  # Nesterov's
            updates = torch.stack(updates)  # (n, rows, columns)
            matrices = updates.unflatten(1, (group["parts"], -1)).flatten(0, 1)  # (n * parts, rows / parts, columns)
            scale = 0.2 * math.sqrt(max(matrices.shape[1:]))  # AdamW's steps have a root mean square of about 0.2
            steps = orthogonalize_together(matrices.to(self.dtype)).reshape(updates.shape).to(updates.dtype)
            steps = [shard_like(p, step) for p, step in zip(params, steps)]
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(params, steps, alpha=-group["lr"] * scale)


def orthogonalize(x):
    """Matrices (n, rows, columns), rescaled so that all singular values are near 1, by five Newton-Schulz steps"""
    if x.size(1) > x.size(2):
        return orthogonalize(x.mT).mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x


def orthogonalize_together(x):
    """orthogonalize(x), of which every process computes a part"""
    if not dist.is_initialized():
        return orthogonalize(x)
    n = math.ceil(len(x) / dist.get_world_size())
    padded = x.new_zeros(dist.get_world_size() * n, *x.shape[1:])
    padded[:len(x)] = x
    parts = list(padded.split(n))
    dist.all_gather(parts, orthogonalize(parts[dist.get_rank()]).contiguous())  # zeros stay zeros
    return padded[:len(x)]


# -- sharding: ZeRO-2 and ZeRO-3 (Rajbhandari et al., 2019) by torch's fully_shard

def shard_model(model, device, amp_dtype, world_size):
    """
    Shards every parameter in place: a process keeps one part of it, of its gradient and of its moments. A block's
    gradients are averaged into the parts after each micro-batch. With ZeRO-2 full weights stay gathered during a step;
    with ZeRO-3 a block's are gathered when it is computed, forward and backward. They are gathered in the dtype that
    computes, and gradients are averaged in reduce_dtype.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard  # takes a second to import
    mesh = dist.device_mesh.init_device_mesh(device.type, (world_size,))
    policy = MixedPrecisionPolicy(
        param_dtype=amp_dtype, reduce_dtype=getattr(torch, reduce_dtype), cast_forward_inputs=False)
    for block in model.transformer.h:
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=parallel == "zero3")
    # The rest: a tied embedding and head as one. It is used last and first, so it stays until the backward pass.
    policy = MixedPrecisionPolicy(reduce_dtype=getattr(torch, reduce_dtype), cast_forward_inputs=False)
    return fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)


def average_in_bfloat16(group, bucket):
    """bf16_compress_hook by another name: by its own, DDP refuses it where gradients are not sent by NCCL."""
    return bf16_compress_hook(group, bucket)


def gathered(tensor):
    """The full tensor of one that may be sharded; then every process must call this."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def own_part(tensor):
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def full_model(model):
    """
    The model with all its weights, which each process may use at its own pace. For a sharded model this is a copy: the
    model itself gathers weights in every forward pass, so that all processes would have to make the same ones.
    """
    if not hasattr(model, "unshard"):
        return model
    weights = {name: gathered(p) for name, p in model.state_dict().items()}
    return build_model(model.cfg, weights, "the model in training").to(model.lm_head.weight.device)


def shard_like(p, tensor):
    """The part of a full tensor that belongs to this process, if the parameter p, of the same shape, is sharded"""
    if not hasattr(p, "full_tensor") or tensor.shape != p.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor
    return distribute_tensor(tensor.to(p.device), p.device_mesh, p.placements, src_data_rank=None)  # all have it


# -- the micro-batch

def find_micro_batch(model, teacher_model, device, amp_dtype, sequences, previous, shares):
    """
    -> the largest micro-batch that fits, and why the model could not be compiled, or "". Tried before the run, so that
    a lack of memory or of a compiler shows at once. `previous` is what a resumed run had; a process keeps one of
    `shares` parts of AdamW's moments.
    """
    largest = previous or max(1, (65536 if device.type == "cuda" else 4096) // block_size)  # more would not be faster
    sizes = [micro_batch] if micro_batch else [d for d in reversed(divisors(sequences)) if d <= largest]
    if device.type == "cuda":  # no time is spent on compiling for sizes that cannot fit
        n = sum(p.numel() for p in model.parameters())
        fixed = 4 * n * (1 + spare_floats(shares)) + RESERVE + autocast_bytes(model, amp_dtype)  # 1: the gradients
        free = torch.cuda.mem_get_info(device)[0] - fixed
        one = 0.8 * activation_bytes(model.cfg, amp_dtype, compiled=True)
        sizes = [B for B in sizes if B * one < free] or sizes[-1:]
    wants_compile = compile == "true" or compile == "auto" and device.type == "cuda"
    model.set_compiled(wants_compile)
    problem = ""
    while wants_compile or device.type == "cuda":
        try:
            try_step(model, teacher_model, device, amp_dtype, sizes[0], shares)
            break
        except Exception as e:  # a compiler can fail in any way
            reason = " ".join(str(e).split())[:150]
            if dataset.is_out_of_memory(e):
                if len(sizes) == 1:
                    raise UserError(out_of_memory_advice(sizes[0])) from None
                sizes.pop(0)
                torch.compiler.reset()  # torch compiles a function for a few shapes only
                continue
            if not wants_compile:
                raise
            if compile == "true":
                raise UserError(f"cannot compile here ({type(e).__name__}: {reason}); use --compile=false") from None
            problem = f"not compiled ({type(e).__name__}: {reason}): training is slower than it could be"
            print(problem, flush=True)
            model.set_compiled(wants_compile := False)
        finally:
            model.train()
            model.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
    return sizes[0], problem


def smallest_micro_batch(B, model, teacher_model, device, amp_dtype, shares):
    """The micro-batch of the process that can take the least; the others compile their code for it now."""
    dist.all_reduce(smallest := torch.tensor(B, device=device), dist.ReduceOp.MIN)
    if smallest < B and "loss" in vars(model):
        try_step(model, teacher_model, device, amp_dtype, int(smallest), shares)
        model.zero_grad(set_to_none=True)
    return int(smallest)


def activation_bytes(cfg, amp_dtype, compiled=False):
    """
    About what a forward pass of one sequence keeps for the backward pass, with a fused kernel for attention. Without
    one, as on CPUs in bfloat16, there are n_head * block_size attention weights more per token and block.
    """
    # Per token and block, in units of n_embd
    if compiled:
        # Two inputs and outputs of norms, q, k, v, what attention returns, the MLP's 4 + 4. If q and k are changed,
        # both once more, and the output of attention in another layout. The logits are kept once.
        block, logit = 16 + 3 * (cfg.qk_norm or cfg.pos == "rotary"), amp_dtype.itemsize
    else:
        # The same, and one for small things; q and k once more for their norms, and for rotations; two copies of the
        # logits in float32, more for a soft-cap.
        block, logit = 17 + 2 * cfg.qk_norm + 2 * (cfg.pos == "rotary"), 20 if cfg.softcap else 12
    if grad_checkpoint:
        block = 1  # its input
    return block_size * (cfg.n_layer * block * cfg.n_embd * amp_dtype.itemsize + cfg.vocab_size * logit)


def autocast_bytes(model, amp_dtype):
    """The copies of the matrices in this dtype, which stay for a step"""
    n = sum(p.numel() for p in model.parameters() if p.dim() == 2)
    return 0 if amp_dtype == torch.float32 else amp_dtype.itemsize * n


def spare_floats(shares):
    """
    How many floats per parameter a step needs besides the weight and the gradient that are in memory before the run. In
    all it needs 5: weight, two moments, two gradients; if sharded, a share of four of them, and one gathered weight.
    """
    return 3 if shares == 1 else max(0, 4 / shares - 1)


def try_step(model, teacher_model, device, amp_dtype, B, shares):
    """
    The forward and backward pass of a step, with room for AdamW's two moments, for an earlier micro-batch's gradients,
    and for what DDP and NCCL take. A validation needs less; its code is compiled here, too. A model that
    will be sharded is still whole here: its weights and gradients stand for the blocks that are gathered in training.
    """
    room = [torch.empty(int(spare_floats(shares) * p.numel()), device=device) for p in model.parameters()]
    if device.type == "cuda":
        room.append(torch.empty(RESERVE, dtype=torch.uint8, device=device))
    batch = [torch.zeros(B, block_size, dtype=torch.long, device=device)] * (3 if doc_mask else 2)
    with autocast(device, amp_dtype):
        loss_fn(model, teacher_model, *batch).backward()
        if val_interval and shares == 1:
            hellaswag.sum_losses(model, [batch])


def out_of_memory_advice(B):
    advice = {
        f"a micro_batch below {B}": B > 1, "--grad_checkpoint": not grad_checkpoint,
        "--parallel=zero3 on several GPUs": parallel != "zero3", f"a block_size below {block_size}": True,
        "a smaller model": True}
    return "out of memory; what helps, cheapest first: " + ", ".join(k for k, helps in advice.items() if helps)


def add_micro_batches(model, teacher_model, loader, scaler, amp_dtype, sequences, world_size):
    """
    Forward and backward for every micro-batch of this process's share of a step.  -> its part of the step's loss, times
    world_size
    """
    accumulate, loss = sequences // loader.B, 0.0
    target_count = loader.next_target_count(sequences * world_size)
    for micro_step in range(accumulate):
        x, y, *document = loader.next_batch()
        # DDP exchanges gradients, and ZeRO-2 frees full weights, only after the last micro-batch.
        if world_size > 1 and parallel == "ddp":
            model.require_backward_grad_sync = micro_step == accumulate - 1
        elif world_size > 1 and parallel == "zero2":
            model.set_reshard_after_backward(micro_step == accumulate - 1)
        # The step's loss is the mean over all its targets, however they are divided: a micro-batch counts by its share
        # of them. Times world_size, since DDP and fully_shard average the gradients of the processes.
        weight = (y >= 0).sum() * (world_size / target_count)
        with autocast(x.device, amp_dtype):
            part = loss_fn(model, teacher_model, x, y, *document) * weight
        loss += part.detach()
        scaler.scale(part).backward()
    return loss


def add_gradients(model, teacher_model, loader, scaler, amp_dtype, sequences, world_size):
    """add_micro_batches, begun again with smaller ones when a single process runs out of memory"""
    before = loader.state_dict()
    while True:
        try:
            return add_micro_batches(model, teacher_model, loader, scaler, amp_dtype, sequences, world_size)
        except RuntimeError as e:  # torch.OutOfMemoryError is one
            if not dataset.is_out_of_memory(e):
                raise
            if world_size > 1 or loader.B == 1:  # other processes would wait for this one
                raise UserError(out_of_memory_advice(loader.B) + "; then --resume") from None
        smaller = max(d for d in divisors(sequences) if d < loader.B)
        print(f"out of memory with a micro-batch of {loader.B}; retrying with {smaller}", flush=True)
        loader.load_state_dict(before)
        loader.B = smaller
        model.zero_grad(set_to_none=True)
        gc.collect()  # switched off during the steps
        torch.cuda.empty_cache()


# -- checkpoints and the log

def new_run():
    """What changes in a run and must survive a restart, besides weights, optimizers and position"""
    return dict(
        step=0, evaluated=False,  # whether this step has been evaluated
        last_val=dict(step=-1, loss=math.inf, bpb=math.nan), best=dict(step=-1, loss=math.inf, bpb=math.nan),
        stale=0,  # validations since the best
        hella=math.nan, hella_step=-1,  # last HellaSwag score
        recent=[],  # (loss, norm) of the last steps
        skipped=0,  # steps in a row until now
        seconds=0.0, usd=0.0, tokens=0, wandb_id=None)


def read_run(path):
    """-> a checkpoint to resume from, with its path. A stranger may have made it: its run must be like new_run's."""
    ckpt = {**read_checkpoint(path, mapped=True), "path": path}
    hint = f"; if it was not written by train.py, start from its weights with --init_from={path}"
    with dataset.reading(path, "a checkpoint of train.py", hint):
        run = ckpt["run"] = {**new_run(), **ckpt["run"]}
        like = {**new_run(), "recent": [[0.0]], "wandb_id": None if run["wandb_id"] is None else ""}
        dataset.check_types(ckpt, dict(
            run=like, step=0, micro_batch=0, loader=dict(position=0), data_fingerprint="", train_config={},
            optimizers=[dict(state={})], scaler={}))
        counts = [ckpt["micro_batch"], ckpt["loader"]["position"], *(
            run[name] for name in ("step", "skipped", "stale", "tokens", "seconds", "usd"))]
        if not all(0 <= n < 2**53 for n in counts):
            raise ValueError("out of range")
        if not all(len(pair) == 2 and max(map(abs, pair)) < 1e150 for pair in run["recent"]):
            raise ValueError("not pairs of finite numbers")
        if run["step"] != ckpt["step"] or not re.fullmatch(r"[\w-]*", run["wandb_id"] or ""):
            raise ValueError("not a run")
    return ckpt


def check_finite(run, model, device):
    """Weights that are not finite can never recover: ends the run before they are evaluated or saved."""
    is_bad = not all(own_part(p.detach()).isfinite().all() for p in model.parameters())
    if all_sum(device, is_bad)[0]:
        raise UserError(f"training has diverged: at step {run['step']} the weights are not finite; {advise(run)}")


def advise(run):
    """What to do when training diverges"""
    good = [path for path in find_checkpoints(out_dir) if checkpoint_step(path) <= run["step"] - run["skipped"]]
    where = f"resume from {good[-1]}" if good else "start again"
    return f"{where} with a lower max_lr, or with --dtype=float32"


def checkpoint_path(step):
    return os.path.join(out_dir, "checkpoints", f"model_{step:06d}.pt")


writer = ThreadPoolExecutor(1)  # of checkpoints, one after the other


class Saver:
    """
    Writes checkpoints in a thread, from a copy, while training goes on. Every process has one; the first writes, or
    with ckpt_shards each its part.
    """

    def __init__(self, device):
        self.device = device
        self.rank, self.count = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.writing = None  # whether the newest checkpoint could be written, as a Future
        self.previous_best = None

    def save(self, run, constants, model, optimizers, scaler, loader):
        """Copies the state of the whole run to the CPU, and starts writing it: one file, or this process's part"""
        check_finite(run, model, self.device)
        self.finish(run)
        self.previous_best = run["best"]
        if is_new_best(run):
            run["best"] = dict(run["last_val"])
        path, collect, is_writing = checkpoint_path(run["step"]), gathered, self.rank == 0
        # A run that was stopped before this step was evaluated, and resumed, saves the step again. What is there stays
        # until then, so a file is replaced by a file, and a folder gets one more set of parts.
        is_file = all_sum(self.device, os.path.isfile(path))[0] > 0
        if ckpt_shards and parallel != "ddp" and self.count > 1 and not is_file:
            path, collect, is_writing = part_path(path, self.rank, self.count), own_part, True
        elif os.path.isdir(path) and not os.path.islink(path):
            path = part_path(path, 0, 1)
        weights = {name: p.detach() for name, p in model.named_parameters()}  # lists a tied head once, as wte
        weights = copy_to_host(weights, collect, is_writing)
        moments = [copy_to_host(o.state_dict(), collect, is_writing) for o in optimizers]
        if is_writing:
            if model.cfg.tie_head:
                weights["lm_head.weight"] = weights["transformer.wte.weight"]
            self.writing = writer.submit(write_checkpoint, path, dict(
                constants, step=run["step"], run=copy.deepcopy(run), model=weights, optimizers=moments,
                scaler=scaler.state_dict(), loader=loader.state_dict(), micro_batch=loader.B))

    def finish(self, run):
        """Waits until the last checkpoint is written.  -> whether that worked, the same on all processes"""
        # Not in all_sum, where a process gives up after ten minutes.
        while all_sum(self.device, self.writing is not None and not self.writing.done())[0]:
            time.sleep(0.02)
        failed = all_sum(self.device, self.writing is not None and not self.writing.result())[0] > 0
        if failed:
            run["best"] = self.previous_best
            if self.rank == 0:
                remove_unfinished()
        return not failed


def copy_to_host(tree, collect, keep_result=True):
    """
    A state dict, copied to the CPU. collect(tensor) is `gathered`, which all processes must call, or `own_part`.
    Without keep_result a process only takes part in gathering.
    """
    if isinstance(tree, dict):
        return {k: copy_to_host(v, collect, keep_result) for k, v in tree.items()}
    if not torch.is_tensor(tree):
        return tree
    tree = collect(tree)
    return tree.to("cpu", copy=True) if keep_result else None


def write_checkpoint(path, ckpt):
    """-> whether that worked. Then removes old checkpoints: the newest `keep` stay, and the best."""
    run, whole = ckpt["run"], checkpoint_path(ckpt["step"])
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        dataset.write_atomically(path, lambda f: torch.save(ckpt, f))
    except (OSError, RuntimeError) as e:
        problem = getattr(e, "strerror", None) or str(e).splitlines()[0]
        print(f"cannot write {path}: {problem}; checkpoints so far: {', '.join(find_checkpoints(out_dir)) or 'none'}",
              file=sys.stderr, flush=True)
        return False
    if not checkpoint_files(whole):
        return True  # until other processes have written their parts, what is old may still be needed
    for old in find_checkpoints(out_dir)[:-keep]:
        # While steps are being skipped the weights may be bad: keep the older checkpoints.
        if checkpoint_step(old) != run["best"]["step"] and not run["skipped"]:
            remove_path(old)
    print(f"{step_label(run['step'])} | saved {whole}\n", end="", flush=True)  # one write: this is a thread
    return True


def remove_unfinished():
    """Removes what a kill, or a full disk, in the middle of a save has left."""
    folder = os.path.join(out_dir, "checkpoints")
    for name in os.listdir(folder) if os.path.isdir(folder) else ():  # the folder may have vanished
        path = os.path.join(folder, name)
        is_incomplete = re.fullmatch(r"model_\d+\.pt", name) and not checkpoint_files(path)
        if is_incomplete:
            print(f"removed {path}: some of its parts are missing", flush=True)
        if is_incomplete or re.fullmatch(r"model_\d+\.pt\.tmp", name):
            remove_path(path)


def remove_path(path):
    """Removes a checkpoint, a file or a folder, if that is possible."""
    if os.path.isdir(path):
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            os.remove(path)


def begin_of(ckpt):
    """-> the step that a run begins with, and how many rows it has taken by then"""
    return (ckpt["step"], ckpt["loader"]["position"]) if ckpt else (0, 0)


def forget_data(ckpt):
    """With --new_data: the losses measured on the old data, and the position in it, no longer apply."""
    fresh = new_run()
    ckpt["run"].update({name: fresh[name] for name in ("evaluated", "last_val", "best", "stale", "recent")})
    ckpt["loader"]["position"] = 0


def restore(ckpt, optimizers, scaler, loader, device):
    """Puts a run back where its checkpoint was saved.  -> run"""
    run = ckpt["run"]
    if run["step"] > max_steps and not max_minutes:
        raise UserError(f"{ckpt['path']} is at step {run['step']}, past max_steps={max_steps}; raise max_steps")
    with dataset.reading(ckpt["path"], "a checkpoint of train.py"):
        loader.load_state_dict(ckpt["loader"])
        for o, state in zip(optimizers, ckpt["optimizers"], strict=True):
            params = [p for group in o.param_groups for p in group["params"]]
            names = {"momentum_buffer"} if isinstance(o, Muon) else {"step", "exp_avg", "exp_avg_sq"}
            for i, moments in state["state"].items():
                if moments.keys() != names:
                    raise ValueError(f"the state of parameter {i}")
                for name, value in moments.items():
                    if isinstance(value, list):  # of its parts, each in a file
                        if (sum(map(len, value)), *value[0].shape[1:]) != params[i].shape:  # before memory is taken
                            raise ValueError(f"{name} of parameter {i}")
                        value = torch.cat(value)
                    # torch's kernels do not check shapes: a wrong one would let them write anywhere
                    if value.shape != (() if name == "step" else params[i].shape) or not value.isfinite().all():
                        raise ValueError(f"{name} of parameter {i}")
                    moments[name] = shard_like(params[i], value.to(device, copy=True))  # the file is mapped
            # The moments are the checkpoint's; weight decay, betas and so on are those of the present settings.
            o.load_state_dict({**state, "param_groups": o.state_dict()["param_groups"]})
        if ckpt["scaler"] and scaler.is_enabled():
            dataset.check_types(ckpt["scaler"], scaler.state_dict())
            if not all(0 <= number < 2**128 for number in ckpt["scaler"].values()):
                raise ValueError("a scale")
            scaler.load_state_dict(ckpt["scaler"])
    return run


class Log:
    """Sends each record to the terminal, to log.txt and, if asked, to Weights & Biases."""

    def __init__(self, run, ckpt, header):
        self.run, self.path = run, os.path.join(out_dir, "log.txt")
        try:
            os.makedirs(os.path.join(out_dir, "checkpoints"), exist_ok=True)
            self.lock = filelock.FileLock(os.path.join(out_dir, ".lock"))  # a killed process loses it
            self.lock.acquire(timeout=0)
            self.wandb = start_wandb(run, header["config"]) if wandb_project else None
            prepare_out_dir(run, ckpt)
            self.write("# " + json.dumps(header))
        except filelock.Timeout:
            raise UserError(f"out_dir={out_dir} is in use by another run; choose another --out_dir") from None
        except OSError as e:
            raise UserError(f"cannot write in out_dir={out_dir}: {e.strerror}") from None

    def write(self, line):
        with open(self.path, "ab+") as f:
            if f.tell() > 0:
                f.seek(-1, os.SEEK_END)
                if f.read() != b"\n":  # the last line was cut off by a kill or a full disk
                    line = "\n" + line
            f.write(f"{line}\n".encode())

    def record(self, stream, value, line, **fields):
        step = self.run["step"]
        fields["seconds"] = f"{self.run['seconds']:.3f}"
        if self.run["usd"]:
            fields["usd"] = f"{self.run['usd']:.4f}"
        try:
            self.write(f"{step} {stream} {value:.6f} " + " ".join(f"{k}={v}" for k, v in fields.items()))
        except OSError as e:
            print(f"cannot write {self.path}: {e.strerror}", file=sys.stderr, flush=True)
        print(f"{step_label(step)} | {line}", flush=True)
        if self.wandb:
            fields = {f"{stream}/{k}": float(v) for k, v in fields.items() if v != "n/a"}
            self.wandb.log({"step": step, stream: value, **fields})


def prepare_out_dir(run, ckpt):
    """Renames an older run's files, or checkpoints later than the one resumed from: nothing is overwritten."""
    log, checkpoints = os.path.join(out_dir, "log.txt"), os.path.join(out_dir, "checkpoints")
    resumes_here = ckpt and os.path.samefile(os.path.dirname(ckpt["path"]) or ".", checkpoints)
    # Links in a stranger's folder could lead anywhere.
    if os.path.islink(log):
        raise UserError(f"{log} is a link; remove it, or choose another --out_dir")
    foreign = [name for name in os.listdir(checkpoints) if not re.match(r"model_\d|\.|lost\+found$", name)]
    if os.path.islink(checkpoints) and foreign:
        raise UserError(f"{checkpoints} is a link to a folder with other files, such as {foreign[0]}; choose another "
                        "--out_dir")
    remove_unfinished()
    if resumes_here:
        old = [path for path in find_checkpoints(out_dir) if checkpoint_step(path) > run["step"]]
    else:
        old = [log] if os.path.exists(log) else []
        old += [checkpoints] if os.listdir(checkpoints) else []
    for path in old:
        if os.path.islink(path) and not resumes_here:
            path = os.path.realpath(path)  # a link to a larger disk stays
        (stem, ending), number = os.path.splitext(path), 1
        while os.path.exists(f"{stem}.{number}{ending}"):
            number += 1
        os.rename(path, f"{stem}.{number}{ending}")
        why = "is later than the checkpoint resumed from" if resumes_here else "was here before this run"
        print(f"{os.path.normpath(path)} {why}: renamed to {os.path.normpath(f'{stem}.{number}{ending}')}")
    os.makedirs(os.path.realpath(checkpoints), exist_ok=True)


def is_shared(folder, device):
    """Whether all processes see a file that the first one writes"""
    path = [os.path.join(folder, f".{time.time_ns()}")]
    dist.broadcast_object_list(path)
    if dist.get_rank() == 0:
        open(path[0], "w").close()
    dist.barrier()
    n_blind = all_sum(device, not os.path.exists(path[0]))[0]
    if dist.get_rank() == 0:
        os.remove(path[0])
    return n_blind == 0


def start_wandb(run, config):
    """A resumed run continues under its id."""
    try:
        from wandb import Error, init  # an error too if there is only wandb's folder of logs
    except ImportError:
        raise UserError("--wandb_project needs a package: pip install wandb") from None
    try:
        board = init(
            project=wandb_project, name=os.path.basename(os.path.abspath(out_dir)), dir=out_dir, id=run["wandb_id"],
            resume="allow", config=config)
    except (Error, OSError, ValueError) as e:
        raise UserError(f"Weights & Biases: {str(e).splitlines()[0].rstrip('.')}; WANDB_MODE=offline keeps its log in "
                        f"{out_dir}") from None
    board.define_metric("*", step_metric="step")  # its own counter cannot go back to a checkpoint's step
    run["wandb_id"] = board.id
    return board


# -- what a run is and costs

def describe(model, world_size, sequences, n_rows, begin, device_name):
    cfg, (step, position) = model.cfg, begin
    rows = position + (max_steps - step) * sequences * world_size  # at the end, also if a resumed run changes the batch
    tokens, since = rows * block_size, f" (from step {step:,})" if step and not position else ""
    print(f"model: {cfg.n_layer} layers, {cfg.n_head} heads, {cfg.n_embd} wide, context {cfg.block_size}, "
          f"vocabulary {cfg.vocab_size:,}")
    print("parameters: " + ", ".join(f"{k} {v:,}" for k, v in model.param_counts().items()))
    print(f"batch: {total_batch_size:,} tokens = {world_size} process{'es' if world_size > 1 else ''} x {sequences} "
          f"sequences x {block_size} tokens")
    passes = f" = {rows / n_rows:.2f} epochs" if n_rows else ""
    length = f"{max_steps:,} steps = {tokens:,} tokens{since}{passes}, {model.flops_per_token() * tokens:.2e} FLOPs"
    if not max_steps:
        length = f"{epochs:g} epochs; the steps are known once the data is prepared"
    if max_minutes:
        length = f"{max_minutes:g} minutes of training"
    print(f"run: {length}")
    if 0 < max_steps < warmup_steps:
        print(f"warm-up: takes the whole run, so the learning rate only reaches {get_lr(max_steps - 1):.1e}; lower "
              "--warmup_steps")
    print(f"device: {device_name}", flush=True)


def print_plan(world_size, sequences, model, spec, begin, network=None):
    """--dry_run: describes the run and its cost, without creating a model or preparing data."""
    global max_steps
    path = find_data()
    folder = path if os.path.isdir(path) else text_folder(spec)
    source = dataset.SOURCES.get(os.path.basename(data), {})
    manifest, n_rows = dataset.read_manifest(folder), 0
    data_bytes = sum(map(os.path.getsize, glob.glob(f"{glob.escape(folder)}/*.*")))
    try:
        rows = Pairs(path, dataset.get_tokenizer(spec)) if dataset.holds_pairs(path) else folder
        n_rows = DataLoader(rows, "train", 1, block_size, stride=stride).n_rows
    except UserError:
        if manifest:
            raise
        if "tokens" in source:
            data_bytes = 2 * source["tokens"]
            splits = source.get("splits") or dataset.default_splits(source["tokens"])
            train_share = dataset.split_shares(splits)[0] / 100
            n_rows = int(source["tokens"] * train_share) // (stride or block_size)
    max_steps = count_steps(n_rows, sequences * world_size, *begin)
    with torch.device("meta"):
        model = model or new_model(manifest["vocab_size"] if manifest else vocabulary_of(spec))
    describe(model, world_size, sequences, n_rows, begin, "none (dry run)")
    n = model.cfg.vocab_size
    if teacher:
        print(f"teacher: the time and memory that {teacher} takes are not included below")
    elif not (init_from or resume):
        print(f"loss before training: about ln({n:,}) = {math.log(n):.2f} nats per token, as of a uniform guess")
    if network:
        machines, seconds_per_byte = network
        gradients = model.param_counts()["total"] * getattr(torch, reduce_dtype).itemsize  # bytes
        print(f"network: {machines}; exchanging {gradients / 2**30:.2f} GiB of gradients takes "
              f"{gradients * seconds_per_byte:.2g} s")
    print_sizes(model, world_size, data_bytes)
    price = f"at ${usd_per_gpu_hour:g} per GPU-hour"
    if max_minutes and usd_per_gpu_hour:
        print(f"cost: ${dollars(60 * max_minutes, world_size):,.2f} {price}")
    for name in map(str.strip, gpu.split(",")) if max_steps else ():
        flops = model.flops_per_token() * (max_steps - begin[0]) * total_batch_size
        seconds = flops / (0.4 * PEAK_TFLOPS[name] * 1e12 * world_size)
        line = f"cost: {tqdm.format_interval(seconds)} on {world_size} x {name} at 40% of its peak"
        if usd_per_gpu_hour:
            line += f", ${dollars(seconds, world_size):,.2f} {price}"
        print(line)


def print_sizes(model, world_size, data_bytes):
    """What the run takes of memory, and of the disk"""
    # In float32: weights, gradients, AdamW's two moments or Muon's one.
    n, n_blocks = model.param_counts()["total"], sum(p.numel() for p in model.transformer.h.parameters())
    state_bytes = 4 * (4 * n - sum(p.numel() for group in muon_groups(model) for p in group["params"]))
    checkpoint = state_bytes - 4 * n  # all but the gradients
    amp_name = "bfloat16" if dtype == "auto" else dtype
    amp_dtype = getattr(torch, amp_name)
    copies = autocast_bytes(model, amp_dtype)
    if parallel != "ddp" and world_size > 1:
        # Each process gathers the blocks in this dtype: all with ZeRO-2; with ZeRO-3 two, one that is computed and one
        # on its way. What is outside the blocks is gathered in float32, and copied as if nothing were sharded. For
        # evaluation and before the run, it holds all weights in float32.
        blocks = n_blocks if parallel == "zero2" else 2 * n_blocks / model.cfg.n_layer
        gathered_bytes = amp_dtype.itemsize * blocks + 4 * (n - n_blocks) + copies * (n - n_blocks) / n
        state_bytes, copies = state_bytes / world_size + max(gathered_bytes, 4 * n), 0
    compiled, eager = (activation_bytes(model.cfg, amp_dtype, compiled) / 2**30 for compiled in (True, False))
    print(f"memory: {(state_bytes + copies) / 2**30:.2f} GiB per process, and for each sequence of a micro-batch, in "
          f"{amp_name}, {compiled:.2f} GiB if compiled, else {eager:.2f}")
    existing = os.path.abspath(out_dir)
    while not os.path.exists(existing) and os.path.dirname(existing) != existing:
        existing = os.path.dirname(existing)
    free = f"; {shutil.disk_usage(existing).free / 2**30:,.0f} GiB are free" if os.path.exists(existing) else ""
    text = f"; the data, {data_bytes / 2**30:.2f} GiB" if data_bytes else ""
    print(f"disk: up to {keep + 2} checkpoints of {checkpoint / 2**30:.2f} GiB, one of them being written{text}"
          f"{free}")


def vocabulary_of(spec):
    if spec["name"] == "gpt2":
        return GPT2_TOKENS
    return dataset.get_tokenizer(spec).n_vocab if dataset.is_trained(spec) else dataset.bpe_size(spec["name"])


def run_ladder(asked):
    """--bench=ladder: each technique of LADDER on top of those before it, in a process of its own"""
    if used := [name for name in asked if name == "profile" or any(name in change for change in LADDER.values())]:
        raise UserError(f"--bench=ladder and --{used[0]} cannot be combined")
    device = pick_device(asked.get("device", SETTINGS["device"]))
    on_cuda = device.type == "cuda"
    gpus = torch.cuda.device_count() if on_cuda else 1
    absent = {"TF32": not on_cuda and "only CUDA has it", "more GPUs": gpus == 1 and f"there is one {device.type}",
              "half precision": pick_dtype("auto", device) == torch.float32 and f"this {device.type} has none"}
    settings = {"total_batch_size": block_size * (64 if on_cuda else 1), **asked, "bench": 12 if on_cuda else 3}
    more_gpus = {"total_batch_size": settings["total_batch_size"] * gpus}
    rates = []
    print(f"{'technique':<18}{'tokens/s':>12}{'step, ms':>12}{'MFU':>8}{'GiB':>8}{'gain':>8}{'in all':>8}")
    for name, change in [*LADDER.items(), ("more GPUs", more_gpus)]:
        problem = absent.get(name)
        if not problem:
            launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={gpus}"]
            options = [f"--{k}={v}" for k, v in {**settings, **change}.items()]
            command = [sys.executable, *(launch if name == "more GPUs" else []), __file__, *options]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                problem = (done.stderr.strip().splitlines() or ["it failed"])[-1]
        if problem:
            print(f"{name:<18}{'-':>12}  {problem}", flush=True)
            continue
        settings.update(change)
        row = json.loads(done.stdout.splitlines()[-1])
        previous = rates[-1] if rates else row["tok_s"]
        rates.append(row["tok_s"])
        gain, total = rates[-1] / previous, rates[-1] / rates[0]
        print(f"{name:<18}{row['tok_s']:>12,}{row['ms']:>12,.0f}{row['mfu'] or 'n/a':>8}{row['mem_gb']:>8}"
              f"{gain:>7.2f}x{total:>7.2f}x", flush=True)


# -- evaluation

def evaluate(run, log, model, held_out, byte_lengths, examples, enc, template, B, rank, world_size):
    """
    Validation, HellaSwag and a sample, as far as they are due at this step; the test split at the end. All processes
    share the work, and the result does not depend on how many there are.  -> False if a signal to stop came meanwhile
    """
    step, device = run["step"], model.lm_head.weight.device
    if any(is_due(interval, run) for interval in (val_interval, hella_interval, sample_interval)):
        check_finite(run, model, device)
        model = full_model(model)
        gc.collect()  # switched off during the steps
    for split, loader in held_out.items():
        is_val = split == "val"
        if not (is_due(val_interval, run) if is_val else val_interval and is_last(run)):
            continue
        n_rows = max(1, val_tokens // block_size) if is_val else loader.n_rows
        sums = hellaswag.sum_losses(model, loader.validation_batches(n_rows, B), byte_lengths, should_stop)
        nats, tokens, n_bytes, stopped = all_sum(device, *sums, should_stop())
        if stopped:
            return False
        loss, bpb = nats / tokens, hellaswag.bits_per_byte(nats, n_bytes)
        if is_val:
            is_repeated = run["last_val"]["step"] == step  # a signal stopped what came after it
            run["last_val"] = dict(step=step, loss=loss, bpb=bpb)
            if not is_repeated:
                run["stale"] = 0 if is_new_best(run) else run["stale"] + 1
        if log:
            name = "validation" if is_val else split
            log.record(split, loss, f"{name} loss {loss:.4f} nats per token, {bpb:.4f} bits per byte",
                       bpb=f"{bpb:.6f}", tokens=int(tokens))
    if examples and is_due(hella_interval, run):
        counts = hellaswag.score(model, examples, rank, world_size, should_stop)
        acc, by_token, by_byte, _, _, n, stopped = all_sum(device, *counts, should_stop())
        if stopped:
            return False
        run.update(hella=by_token / n, hella_step=step)
        if log:
            text = hellaswag.with_error("HellaSwag", by_token / n, n)
            log.record("hella", by_token / n, text, acc=f"{acc / n:.4f}", by_byte=f"{by_byte / n:.4f}", examples=int(n))
    if enc and rank == 0 and step > 0 and is_due(sample_interval, run):
        try:
            print_sample(step, model, enc, template)
        except UserError as e:
            print(f"no sample at step {step}: {e}", flush=True)
    return True


def print_sample(step, model, enc, template):
    tokens = dataset.prompt_tokens(enc, template, [(sample_prompt, None)])
    n, generator = len(tokens), torch.Generator(model.lm_head.weight.device).manual_seed(seed)
    for token in model.stream([tokens], sample_temperature, top_k=50, generator=generator):
        if token.item() == enc.eot_token or len(tokens) == n + 200 or should_stop():
            break
        tokens.append(token.item())
    gap = "\n" if template else ""
    text = re.sub("\n{3,}", "\n\n", enc.decode(tokens[n:]))  # some models say many empty lines
    print(f"sample at step {step}: {sample_prompt}{gap}{text}\n", flush=True)


def load_hellaswag(enc, is_local_main, device):
    """The encoded examples, or None if some process cannot have them. The cache is locked: one process downloads."""
    examples = None
    try:
        examples = hellaswag.encode(hellaswag.download(), enc, block_size)
    except UserError as e:
        if is_local_main:
            print(f"no HellaSwag: {e}", flush=True)
    return None if all_sum(device, examples is None)[0] else examples


# -- what is printed about steps and at the end

def log_step(log, run, loss, norm, lr, seconds, flops_per_token, peak, world_size):
    rate = total_batch_size / seconds
    mfu = f"{rate * flops_per_token / world_size / peak / 1e12:.4f}" if peak else "n/a"
    fields = dict(lr=f"{lr:.4e}", norm=f"{norm:.4f}", ms=f"{seconds * 1000:.1f}", steps_s=f"{1 / seconds:.4g}",
                  tok_s=f"{rate:.0f}", mfu=mfu)
    left = 60 * max_minutes - run["seconds"] if max_minutes else (max_steps - run["step"] - 1) * seconds
    left = tqdm.format_interval(max(0, left))
    what = "distillation loss" if teacher else "loss"
    log.record("train", loss, f"{what} {loss:.4f} | lr {lr:.2e} | norm {norm:.2f} | {seconds * 1000:.0f} ms | "
               f"{1 / seconds:.2f} steps/s | {rate:,.0f} tokens/s | mfu {mfu} | {left} left", **fields)


def print_bench(times, flops_per_token, peak, world_size, device, facts):
    """One line of JSON; the first third of the steps is warm-up."""
    ms = statistics.median(times[len(times) // 3:]) * 1000
    rate = total_batch_size / ms * 1000
    mfu = round(rate * flops_per_token / world_size / peak / 1e12, 4) if peak else None
    print(json.dumps(dict(tok_s=round(rate), ms=round(ms, 2), mfu=mfu, peak_tflops=peak,
                          mem_gb=round(peak_memory_gb(device), 2), world_size=world_size, **facts)))


def write_profile(profiler, seconds):
    """Writes the trace, and prints each kind of work as a share of the seconds that the steps took"""
    from torch.autograd import DeviceType
    profiler.export_chrome_trace(profile)
    if not os.path.exists(profile):  # torch does not say
        print(f"cannot write {profile}", file=sys.stderr, flush=True)
    kernels = [e for e in profiler.events() if e.device_type == DeviceType.CUDA and not e.is_user_annotation]
    shares = dict.fromkeys([*WORK, "other"], 0.0)
    for e in kernels or profiler.events():
        kind = next((k for k, names in WORK.items() if re.search(names, e.name, re.IGNORECASE)), "other")
        shares[kind] += (e.time_range.elapsed_us() if kernels else e.self_cpu_time_total) / 1e6 / seconds
    shares["idle"] = max(0.0, 1 - sum(shares.values()))
    print(f"{profile}: " + ", ".join(f"{k} {share:.1%}" for k, share in shares.items()), flush=True)


def print_summary(run, stopped, problem):
    why = f", no better validation loss in {patience} validations" if out_of_patience(run) else ""
    cost = f", ${run['usd']:.2f}" if usd_per_gpu_hour else ""
    minutes = f"{run['seconds'] / 60:.1f} minutes of training"
    print(f"{'stopped' if stopped else 'done'} at step {run['step']}{why}: {minutes}{cost}")
    if problem:
        print(problem)
    paths, best = find_checkpoints(out_dir), checkpoint_path(run["best"]["step"])
    if patience and best in paths:
        print(f"best: step {run['best']['step']}, validation loss {run['best']['loss']:.4f}: {best}")
    if stopped:
        print("to continue: the same command with --resume")
    elif paths:
        path, where = paths[-1], "" if out_dir == "." else f" --out_dir={shlex.quote(out_dir)}"
        if patience and best in paths and best != path:
            path, where = best, f" --ckpt={shlex.quote(best)}"
        print(f"{path}; to try it: python eval.py{where}")
    if not (stopped or ckpt_interval or checkpoint_path(run["step"]) in paths):
        print(f"step {run['step']} was not saved: ckpt_interval is 0")
    values = dict(val_loss=run["last_val"]["loss"], bpb=run["last_val"]["bpb"], hellaswag=run["hella"], usd=run["usd"])
    values = {name: value if math.isfinite(value) else None for name, value in values.items()}
    print(json.dumps(dict(recipe=recipe, step=run["step"], tokens=run["tokens"], seconds=round(run["seconds"], 1),
                          val_step=run["last_val"]["step"], **values)))


# -- the run, from top to bottom

if __name__ == "__main__":
    dataset.start_script()
    sys.excepthook = report_error

    # 1. Settings, processes, device. torchrun starts one process per device, and says so in the environment.
    use_large_pages()
    settings, asked, ckpt = configure(sys.argv[1:])
    raw_model = None
    model_spec = ckpt["tokenizer"] if ckpt else None  # the spec of the model's own tokenizer
    if settings["init_from"] and not ckpt:
        raw_model, model_spec = initial_model(settings, asked)
    globals().update(settings)
    spec = model_spec if tokenizer == "model" and model_spec else dataset.parse_tokenizer(tokenizer)
    # WORLD_SIZE=8 python train.py --dry_run plans for eight processes.
    launch = dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1") if dry_run else {}
    rank, local_rank, world_size = read_launch({**launch, **os.environ})
    is_main, is_local_main = rank == 0, local_rank == 0
    sharded = parallel != "ddp" and world_size > 1
    if bench == "ladder":
        if world_size > 1:
            raise UserError("bench=ladder starts its own processes; run it without torchrun")
        run_ladder(asked)
        sys.exit()
    sequences = divide_batch(world_size)  # of each process, per step
    if dry_run:
        under_torchrun = "MASTER_ADDR" in os.environ and world_size > 1
        network = measure_network(pick_device(device, local_rank), rank, world_size) if under_torchrun else None
        if is_main or not under_torchrun:
            step, position = begin_of(ckpt)
            print_plan(world_size, sequences, raw_model, spec, (step, 0 if new_data else position), network)
        end_process(0)
    device = pick_device(device, local_rank)  # a torch.device from here on
    if world_size > 1:
        start_processes(device, rank, world_size)
    # A checkpoint with a scaler's state was trained in float16.
    amp_dtype = training_dtype(device, "dtype" in asked or ckpt and ckpt["scaler"], is_main)
    amp_name = str(amp_dtype).removeprefix("torch.")
    teacher_model, teacher_spec = open_teacher(device, amp_dtype) if teacher else (None, None)
    torch.manual_seed(seed)  # here, since loading models above consumed random numbers
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    # With masks cuDNN's attention can return NaN in the backward pass (pytorch issue 196678).
    torch.backends.cuda.enable_cudnn_sdp(attention == "fused" and not doc_mask)

    # 2. Data and model. raw_model is the bare network; `model`, below, may be wrapped in DDP.
    source, spec, enc = open_data(spec, is_local_main)
    model_name = ckpt["path"] if ckpt else init_from
    check_tokenizers(spec, {model_name: model_spec, f"the teacher {teacher}": teacher_spec}, asked)
    template = source.template if isinstance(source, Pairs) else None
    n_tokens = enc.n_vocab if enc else GPT2_TOKENS
    options = dict(rank=rank, world_size=world_size, doc_mask=doc_mask, vocab_size=n_tokens, device=device)
    loader = DataLoader(source, "train", 1, block_size, seed=seed, stride=stride, **options)  # B, here 1, is set below
    fingerprint = loader.rows.fingerprint()
    if ckpt and ckpt["data_fingerprint"] != fingerprint:
        if not new_data:
            raise UserError(f"{data} is not the data that {ckpt['path']} was trained on; --new_data resumes all the "
                            "same")
        forget_data(ckpt)
    else:
        new_data = False
    held_out = open_held_out(source, options)
    begin = begin_of(ckpt)
    max_steps = count_steps(loader.n_rows, sequences * world_size, *begin)
    if ckpt:
        shape = {**ckpt["model_config"], "dropout": dropout, "attention": attention}
        raw_model = build_model(make_config(shape, ckpt["path"]), ckpt.pop("model"), ckpt["path"])
        if device.type == "cpu":  # elsewhere the weights are copied below; the file is mapped
            raw_model = copy.deepcopy(raw_model)
    raw_model = (raw_model or new_model(n_tokens)).to(device).train()
    if n_tokens > raw_model.cfg.vocab_size:
        raise UserError(f"vocab_size={raw_model.cfg.vocab_size:,} is too small for {n_tokens:,} tokens")
    raw_model.grad_checkpoint = grad_checkpoint
    flops_per_token, n_parameters = raw_model.flops_per_token(), raw_model.param_counts()["total"]
    if is_main:
        where = torch.cuda.get_device_name(device) if device.type == "cuda" else \
            f"{device.type}, {torch.get_num_threads()} threads"
        describe(raw_model, world_size, sequences, loader.n_rows, begin, f"{where}, {amp_name}")
        if ckpt and init_from:  # as when the first command is repeated with --resume
            print(f"--init_from={init_from} is not used: the weights are those of {ckpt['path']}", flush=True)
        elif init_from:
            print(f"weights: those of {find_model(init_from)}", flush=True)
        elif recipe == "sft" and not ckpt:
            print("no --init_from: the weights are random, and all they learn is from these pairs", flush=True)

    # 3. Micro-batch, processes, optimizers
    previous_B = ckpt["micro_batch"] if ckpt else 0
    shares = world_size if sharded else 1
    B, problem = find_micro_batch(raw_model, teacher_model, device, amp_dtype, sequences, previous_B, shares)
    model = raw_model
    if world_size > 1:
        B = smallest_micro_batch(B, raw_model, teacher_model, device, amp_dtype, shares)
        if sharded:
            model = shard_model(raw_model, device, amp_dtype, world_size)
        else:
            model = DistributedDataParallel(raw_model, gradient_as_bucket_view=True)
            if reduce_dtype == "bfloat16":
                model.register_comm_hook(None, average_in_bfloat16)
    loader.B = B
    optimizers = make_optimizers(raw_model, device, amp_dtype)
    scaler = torch.amp.GradScaler(device.type, enabled=amp_dtype == torch.float16)

    # 4. Where to begin
    run = restore(ckpt, optimizers, scaler, loader, device) if ckpt else new_run()
    first_step = run["step"]
    if not all_equal(device, first_step):
        raise UserError(f"the processes found different checkpoints; out_dir={out_dir} must be one folder for all of "
                        "them, or have the same checkpoints on every machine")
    if not all_equal(device, int(fingerprint[:8], 16), len(held_out), enc is None):
        raise UserError("the processes have different data, or only some have the val split or the vocabulary")
    if not all_equal(device, amp_dtype.itemsize, amp_dtype == torch.float16):
        raise UserError("the devices differ in what dtype=auto means for them; choose one with --dtype")
    constants = dict(
        version=CHECKPOINT_VERSION, model_config=dataclasses.asdict(raw_model.cfg), tokenizer=spec, template=template,
        train_config=settings, data_fingerprint=fingerprint)
    log = None
    if is_main and not bench:
        log = Log(run, ckpt, dict(
            recipe=recipe, step=first_step, world_size=world_size, micro_batch=B, device=device.type, dtype=amp_name,
            parameters=n_parameters, flops_per_token=flops_per_token, config=settings, references={
                name: scores["hellaswag", "acc_norm by token"] for name, scores in hellaswag.PUBLISHED.items()}))
        print(f"micro-batch {B} x {sequences // B} per step; {loader.rows.summary()}; log and checkpoints in "
              f"{os.path.abspath(out_dir)}" + (f"; from step {first_step}" if first_step else ""), flush=True)
    if ckpt_shards and sharded and not bench and not is_shared(out_dir, device):
        raise UserError("ckpt_shards needs an out_dir that all machines share: each writes parts of one checkpoint")
    examples = load_hellaswag(enc, is_local_main, device) if hella_interval and enc else None
    byte_lengths = torch.tensor(dataset.token_lengths(enc), device=device) if enc else None
    evaluation = dict(
        log=log, model=raw_model, held_out=held_out, byte_lengths=byte_lengths, examples=examples, enc=enc,
        template=template, rank=rank, world_size=world_size)
    for name in SIGNALS:
        signum = getattr(signal, name, None)  # Windows lacks some
        if signum and not (name == "SIGHUP" and signal.getsignal(signum) == signal.SIG_IGN):  # as under nohup
            signal.signal(signum, request_stop)
    ckpt = None
    gc.collect()
    gc.freeze()
    gc.disable()  # a collection in the middle of a step can take half a second

    if world_size > 1:  # until here one could wait two hours for data; from here ten minutes mean a lost process
        dist.distributed_c10d._set_pg_timeout(timedelta(minutes=10))

    # 5. The loop
    peak, times = peak_tflops(device), []
    saver, profiler, stop = Saver(device), None, False
    for step in itertools.count(first_step):
        run["step"] = step
        if max_minutes:
            max_steps = steps_in_time(run, times, device)
        # At the step resumed from there is nothing new to save, unless it was not evaluated yet, on the same data.
        has_changed = step > first_step or not (run["evaluated"] or new_data)
        if not run["evaluated"] and not stop:
            with autocast(device, amp_dtype), torch.compiler.set_stance("eager_on_recompile"):
                run["evaluated"] = evaluate(run, B=loader.B, **evaluation)
            stop = not run["evaluated"]
        if not has_changed and is_new_best(run):
            run["best"] = dict(run["last_val"])  # on new data, by the checkpoint resumed from
        checkpoint_due = step > 0 and is_due(ckpt_interval, run) or patience and is_new_best(run)
        if not bench and has_changed and (stop or checkpoint_due):
            saver.save(run, constants, raw_model, optimizers, scaler, loader)
        if stop or is_last(run):
            break

        # forward and backward for every micro-batch
        if step % 1000 == 999:
            gc.collect()  # sharded models and recomputed activations leave cycles
        if profile and is_main and step == max(first_step, max_steps - PROFILED_STEPS):
            profiler = torch.profiler.profile(acc_events=True)
            profiler.start()
        began = time.perf_counter()
        torch.manual_seed(hash((seed, step, rank)))  # for dropout: a resumed run needs no stored random states
        own_loss = add_gradients(model, teacher_model, loader, scaler, amp_dtype, sequences, world_size)

        # one update, unless the step is to be skipped
        lr = set_rates(optimizers, step)
        for o in optimizers:
            scaler.unscale_(o)
        norm = torch.nn.utils.clip_grad_norm_(raw_model.parameters(), grad_clip or math.inf)
        norm = gathered(norm).item()  # the same on all processes
        own_loss = own_loss.item() / world_size
        loss, stop = all_sum(device, own_loss, should_stop())
        reason = skip_reason(loss, norm, run["recent"])
        for o in optimizers:
            if not reason:
                scaler.step(o)
            o.zero_grad(set_to_none=True)
        scaler.update()
        run["skipped"] = run["skipped"] + 1 if reason else 0
        is_routine = scaler.is_enabled() and not math.isfinite(norm)  # the scaler tries a smaller scale
        if reason and not (bench or is_routine) and (is_main or not math.isfinite(own_loss)):
            places = loader.describe_last_rows(sequences // loader.B)
            print(f"step {step} is skipped: {reason}; the data of rank {rank}: {places}", flush=True)
        if run["skipped"] >= MAX_SKIPPED:
            raise UserError(f"{run['skipped']} steps in a row were skipped, up to {step}; {advise(run)}")

        times.append(time.perf_counter() - began)
        if profiler and step == max_steps - 1:
            profiler.stop()
        run["evaluated"] = False
        run["seconds"] += times[-1]
        run["usd"] += dollars(times[-1], world_size)
        run["tokens"] += total_batch_size
        if log and step % log_interval == 0:
            seconds = statistics.mean(times[-log_interval:])
            log_step(log, run, loss, norm, lr, seconds, flops_per_token, peak, world_size)

    # 6. The summary
    saved = saver.finish(run)
    if profiler and is_last(run):
        write_profile(profiler, sum(times[-PROFILED_STEPS:]))
    elif profile and is_main:
        print("no profile was written: the run ended before its last steps")
    if is_main and bench:
        print_bench(times, flops_per_token, peak, world_size, device, dict(
            micro_batch=loader.B, dtype=amp_name, compiled="loss" in vars(raw_model), parameters=n_parameters))
    if log:
        if log.wandb:
            log.wandb.finish()
        print_summary(run, stop, problem)
    signum = should_stop()
    stopped_code = 128 + signum if signum else 0
    end_process(stopped_code if saved else 1)
