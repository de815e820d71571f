"""
Trains a GPT. One process on a CPU, a GPU or an Apple GPU, or one a GPU under torchrun, same code, same losses:

    python train.py --recipe=tiny                        # two minutes on a laptop, no network
    python train.py                                      # GPT-2 124M on one device
    torchrun --nproc_per_node=8 train.py                 # on eight
    python train.py --resume --out_dir=runs/a            # go on from the newest checkpoint, exactly
    python train.py --recipe=sft --init_from=gpt2 --data=pairs.jsonl    # fine-tune on prompts and responses

Every hyperparameter below is an option, --name=value. A recipe sets several, --config=FILE.json too; the command line wins.
"""
import contextlib
import dataclasses
import difflib
import gc
import hashlib
import inspect
import io
import itertools
import json
import math
import os
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
import types
from collections import deque
from datetime import timedelta

import dataset

if __name__ == "__main__":
    dataset.large_pages()

import torch
import torch.distributed as dist
from torch.nn import functional as F

import hellaswag
import model as gpt
from data_loader import DataLoader
from dataset import UserError
from model import CONFIGS, GPT, GPTConfig

# -- hyperparameters -------------------------------------------------------------------------------------------------

recipe = "gpt2"  # a row of RECIPES
config = ""  # a JSON file of hyperparameters
data = "data/fineweb-edu"  # a folder that dataset.py wrote, or a text, .jsonl or .parquet file, tokenized on first use
tokenizer = "gpt2"  # of such a file: gpt2, byte, bpe:N, the path of a tokenizer.json, or model (that of init_from, its default)
out_dir = "."  # log.txt and checkpoints/ go here
init_from = ""  # start from these weights: a checkpoint, a run's folder (its newest), a Hugging Face folder, or a name such as gpt2
resume = ""  # go on: newest (or nothing), a checkpoint, or auto (newest if there is one)
new_data = False  # resume although the data is not what the checkpoint was trained on
seed = 1337  # of the weights, of dropout, and of the order of the data
total_batch_size = 524_288  # tokens a step, over all processes
micro_batch = 0  # sequences a forward pass; 0: as many as fit
max_steps = 19_073  # 0: as many as make `epochs`
epochs = 0.0  # passes over the training data
stride = 0  # tokens from one window to the next; 0: block_size
doc_mask = False  # documents, or pairs, that share a window do not see one another, and each begins at position 0
teacher = ""  # learn from the predictions of this model, too: named as init_from
distill_alpha = 0.5  # their share of the loss; the rest is the labels'
distill_temperature = 1.0  # both distributions are flattened by it before they are compared
optimizer = "adamw"  # adamw | muon (the blocks' matrices by Muon, the rest by AdamW)
max_lr = 6e-4  # after the warm-up
min_lr = 6e-5  # at the end
warmup_steps = 715
schedule = "cosine"  # cosine | wsd (warm up, stay, then decay linearly)
cooldown = 0.4  # the share of all steps in which wsd decays
weight_decay = 0.1
beta1 = 0.9
beta2 = 0.95
eps = 1e-8
grad_clip = 1.0  # the gradient's norm is cut to this; 0: not
spike_guard = 0.0  # leave out a step whose loss or norm is this many standard deviations above the last 128; 0: never
device = "auto"  # auto | cuda | cuda:1 | mps | cpu
dtype = "auto"  # auto (bfloat16 where the hardware has it) | float32 | bfloat16 | float16
tf32 = True  # on CUDA, float32 matrices are multiplied in TensorFloat-32
compile = "auto"  # auto (on CUDA) | true | false
parallel = "ddp"  # ddp | zero2 (every process keeps a share of the gradients and of AdamW's moments)
grad_checkpoint = False  # recompute activations in the backward pass: less memory, about a third more time
deterministic = False  # bit-for-bit repeatable on CUDA too, at some cost in speed
val_interval = 250  # steps; 0: never
val_tokens = 10_485_760  # the first tokens of the val split
patience = 0  # stop after this many validations in a row without a new best one, each of which is saved; 0: never
ckpt_interval = 1000  # steps; 0: never
keep = 3  # newest checkpoints that stay, beside the best one
sample_interval = 250  # steps; 0: never
sample_prompt = ""  # what the samples begin with
sample_temperature = 0.7  # 0: the likeliest token each time
hella_interval = 250  # steps between HellaSwag scores; 0: never
log_interval = 1  # steps
usd_per_gpu_hour = 0.0  # to count dollars
wandb_project = ""  # log to Weights & Biases too
dry_run = False  # say what the run would be and cost, and stop
bench = ""  # measure this many steps on random tokens, print one line of JSON, and stop; or ladder: technique by technique

# --------------------------------------------------------------------------------------------------------------------

HERE = os.path.dirname(os.path.abspath(__file__))
SETTINGS = {k: v for k, v in globals().items() if k.islower() and k[0] != "_" and isinstance(v, (bool, int, float, str))}
SHAPE = {f.name: f.default for f in dataclasses.fields(GPTConfig) if f.name != "n_tokens"}
SHAPE["vocab_size"] = 0
SETTINGS.update(SHAPE)

ALLOWED = {"optimizer": ("adamw", "muon"), "schedule": ("cosine", "wsd"), "dtype": ("auto", "float32", "bfloat16", "float16"),
           "compile": ("auto", "true", "false"), "parallel": ("ddp", "zero2"), **gpt.CHOICES}
OF_ONE_START = ("config", "init_from", "resume", "new_data", "dry_run", "bench")  # not of a run, and so not in checkpoints
AT_LEAST_ONE = ("total_batch_size", "keep", "val_tokens", "block_size", "n_layer", "n_head", "n_embd")
LATE = 60  # seconds until processes that have not met get a hint
RECENT = 128  # steps that a spike is measured against

RECIPES = {
    "gpt2": {},
    "gpt-xs": dict(**CONFIGS["gpt-xs"]),
    "gpt2-custom": dict(data="data/fineweb", warmup_steps=768),
    "custom-gpt": dict(
        **CONFIGS["custom-gpt"], data="data/custom-gpt", tokenizer="bpe:50000", total_batch_size=64 * 512, epochs=3, max_lr=1e-4, min_lr=0.0,
        warmup_steps=1000, dtype="float16", parallel="zero2", val_interval=1000, val_tokens=1_000_000, sample_interval=5000,
        hella_interval=5000, log_interval=10),
    # What toygpt leaves to its command line is GPT-3's for these sizes (Brown et al., 2020, table 2.1), at half the batch.
    **{f"toygpt-{size}": dict(
        **CONFIGS[f"toygpt-{size}"], data="data/toygpt", total_batch_size=512 * 512, epochs=1, max_lr=lr, min_lr=lr / 10, warmup_steps=300,
        sample_prompt="This is the end", sample_temperature=0.0) for size, lr in (("small", 6e-4), ("medium", 3e-4), ("large", 2e-4))},
    **{name: dict(
        **CONFIGS[name], data="data/tinystories", total_batch_size=8 * CONFIGS[name]["block_size"], max_lr=5e-4, epochs=20,
        val_interval=5000, val_tokens=500_000, ckpt_interval=5000, sample_interval=5000, sample_prompt="Once upon a time",
        hella_interval=0, log_interval=100) for name in ("tinystories", "tinystories-small", "tinystories-large")},
    # A modern shape learns in two minutes what GPT-2's takes far longer for (on input.txt, at equal time: 1.52 against 1.74 bits a byte).
    "tiny": dict(
        **CONFIGS["tiny"], data=os.path.join(HERE, "input.txt"), tokenizer="bpe:4096", total_batch_size=4 * 256, max_steps=1100,
        max_lr=4e-3, min_lr=0.0, warmup_steps=50, val_interval=110, ckpt_interval=220, sample_interval=550, sample_prompt="Once",
        hella_interval=0, log_interval=10),
    # Of a model that is given (--init_from), on pairs that are (--data).
    "sft": dict(
        data="pairs.jsonl", total_batch_size=16 * 1024, epochs=3, max_lr=1e-4, min_lr=0.0, warmup_steps=20, doc_mask=True, patience=3,
        val_interval=50, val_tokens=500_000, ckpt_interval=500, sample_interval=0, hella_interval=0),
    "speedrun": dict(
        **CONFIGS["speedrun"], optimizer="muon", schedule="wsd", cooldown=0.7, max_lr=2e-3, min_lr=0.0, warmup_steps=100, max_steps=6000),
}

# What --bench=ladder measures, each on top of those before it. GPT2-Custom's README lists them.
LADDER = {
    "float32": dict(dtype="float32", tf32="false", attention="reference", vocab_size=50257, compile="false", parallel="ddp"),
    "TF32": dict(tf32="true"),
    "half precision": dict(dtype="auto"),
    "fused attention": dict(attention="fused"),
    "vocabulary 50304": dict(vocab_size=50304),
    "torch.compile": dict(compile="true"),
}

# Dense bf16 (fp16 before Ampere) TFLOP/s with fp32 sums, from the makers' data sheets.
PEAK_TFLOPS = {"GB200": 2500, "B200": 2250, "H200": 989, "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "A100": 312,
               "L40S": 362, "L40": 181, "L4": 121, "A10G": 70, "A10": 125, "V100": 125, "T4": 65,
               "RTX 5090": 210, "RTX 4090": 165, "RTX 3090": 71}


# -- settings: globals < recipe < config file < command line

def configure(argv):
    """Sets the globals above. -> what the user chose, recipe aside, and the checkpoint to resume from, if any"""
    command = parse_command(argv)
    file = read_config(command.get("config"))
    asked = {**file, **command}
    row = asked.get("recipe", SETTINGS["recipe"])
    if row not in RECIPES:
        raise UserError(f"there is no recipe {row!r}" + nearest(row, RECIPES))
    layers = [RECIPES[row], asked]
    ckpt = None if asked.get("bench") else find_resume({**SETTINGS, **asked})
    if ckpt:
        # What a run was begun with stays, but for what is asked for now. The shape cannot change.
        begun = ckpt["train_config"]["recipe"]
        if asked.get("recipe", begun) != begun:
            raise UserError(f"{ckpt['path']} is of recipe {begun}, not {row}; start a new run with another --out_dir")
        check_shape(ckpt["path"], {**ckpt["model_config"], "optimizer": ckpt["train_config"]["optimizer"]}, asked)
        layers = [ckpt["train_config"], asked]
    settings = dict(SETTINGS)
    for layer in layers:
        if "epochs" in layer and "max_steps" not in layer:
            settings["max_steps"] = 0
        settings.update(layer)
    for k, v in settings.items():
        check(k, v)
    if re.fullmatch(r"[1-9]\d*", settings["bench"]):  # the bare steps
        settings.update(max_steps=int(settings["bench"]), **{k: 0 for k in settings if k.endswith("_interval")})
    elif settings["bench"] not in ("", "ladder"):
        raise UserError(f"bench={settings['bench']!r} must be a number of steps, or ladder")
    globals().update(settings)
    return asked, ckpt


def check_shape(path, has, wanted):
    for k, v in wanted.items():
        if k in has and k not in ("dropout", "attention") and v != has[k] and (k != "vocab_size" or v):
            raise UserError(f"{path} has {k}={has[k]}, not {v}; it goes on in its own shape")


def parse_command(argv):
    """["--max_lr=1e-3", "--resume", "--seed", "7"] -> {"max_lr": 0.001, "resume": "newest", "seed": 7}"""
    out, args = {}, list(argv)
    while args:
        arg = args.pop(0)
        if arg in ("-h", "--help"):
            print_help()
            sys.exit()
        name, eq, value = arg[2:].partition("=")
        if not arg.startswith("--") or name not in SETTINGS:
            raise UserError(f"there is no option {arg.partition('=')[0]}" + nearest(name, SETTINGS, "--"))
        if not eq:
            bare = {"resume": "newest", "compile": "true"}.get(name, "true" if isinstance(SETTINGS[name], bool) else None)
            follows = args and not args[0].startswith("--")
            if not follows and bare is None:
                raise UserError(f"--{name} needs a value")
            value = args.pop(0) if follows else bare
        out[name] = convert(name, value)
    return out


def convert(name, value):
    """The value in the type of the default: "1e9" and "524_288" are whole numbers."""
    kind = type(SETTINGS[name])
    try:
        if kind is bool:
            return {"true": True, "1": True, "false": False, "0": False}[str(value).lower()]
        if kind is str and isinstance(value, (str, bool, int)):  # JSON's true and 20
            return value if isinstance(value, str) else str(value).lower()
        if kind in (int, float) and not isinstance(value, bool) and math.isfinite(number := float(value)) and number == kind(number):
            return kind(number)
    except (ValueError, KeyError, TypeError):
        pass
    raise UserError(f"{name}={value!r} is not " + {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}[kind])


def check(name, value):
    if name in ALLOWED and value not in ALLOWED[name]:
        raise UserError(f"{name}={value!r} must be one of {', '.join(ALLOWED[name])}")
    if isinstance(value, (int, float)) and value < (name in AT_LEAST_ONE):
        raise UserError(f"{name}={value} must be at least {int(name in AT_LEAST_ONE)}")
    if name == "distill_temperature" and value <= 0:
        raise UserError(f"{name}={value} must be above 0")
    if name in ("beta1", "beta2", "dropout", "cooldown") and value >= 1 or name == "distill_alpha" and value > 1 or isinstance(value, int) and value >= 2**63:
        raise UserError(f"{name}={value} is too large")


def read_config(path):
    if not path:
        return {}
    try:
        with open(path, encoding="utf-8") as f:
            settings = json.load(f)
    except OSError as e:
        raise UserError(f"cannot read config {path}: {e.strerror}") from None
    except ValueError as e:
        raise UserError(f"config {path} is not JSON: {e}") from None
    if not isinstance(settings, dict):
        raise UserError(f"config {path} must hold one JSON object, {{\"max_lr\": 1e-3, ...}}")
    for name in settings:
        if name not in SETTINGS:
            raise UserError(f"config {path}: there is no hyperparameter {name}" + nearest(name, SETTINGS))
    return {name: convert(name, value) for name, value in settings.items()}


def find_resume(settings):
    """The checkpoint that --resume means, read, or None."""
    resume, out_dir = settings["resume"], settings["out_dir"]
    if not resume:
        return None
    if resume not in ("newest", "auto"):
        return {**gpt.read_checkpoint(resume), "path": resume}
    paths = gpt.find_checkpoints(out_dir)
    for path in reversed(paths):
        try:
            return {**gpt.read_checkpoint(path), "path": path}
        except gpt.UserError as e:
            print(f"{e}; trying the one before", file=sys.stderr)
    if resume == "auto" and not paths:
        return None
    raise UserError(f"{out_dir}/checkpoints has no checkpoint to resume from; start without --resume, or name another --out_dir")


def nearest(name, names, prefix=""):
    near = difflib.get_close_matches(name, names, 1)
    return f"; did you mean {prefix}{near[0]}?" if near else "; see --help" if prefix else f"; there are {', '.join(names)}"


def print_help():
    """The hyperparameters as they stand in the sources, with their comments."""
    print(__doc__)
    print("recipes:", ", ".join(RECIPES), "\n")
    sources = inspect.getsource(sys.modules[__name__]).split("# ----", 2)[0] + "\n" + inspect.getsource(GPTConfig)
    for name, comment in re.findall(r"^ {0,4}(\w+)(?:: \w+)? = [^#\n]+?(?:  # (.*))?$", sources, re.M):
        if name in SETTINGS:
            print(f"  {f'--{name}={SETTINGS[name]}':<36} {comment}".rstrip())


# -- the schedule and the batch

def get_lr(step):
    """The learning rate of step 0, 1, ...: linear warm-up, then a cosine, or a plateau and a linear decay, to min_lr."""
    if step < warmup_steps:
        return max_lr * (step + 1) / warmup_steps
    if schedule == "cosine":
        progress = min(1.0, (step - warmup_steps) / max(1, max_steps - warmup_steps))
        return min_lr + 0.5 * (1 + math.cos(math.pi * progress)) * (max_lr - min_lr)
    left = min(1.0, (max_steps - step) / max(1, round(cooldown * max_steps)))
    return min_lr + left * (max_lr - min_lr)


def why_left_out(loss, norm, recent):
    """
    Why a step must not change the weights, or "": it is not finite, or its loss or gradient norm stands out from those of the
    last RECENT steps (as in llm.c, pull request 637). Puts it among these: a change that stays is soon no exception.
    """
    if not math.isfinite(loss + norm):
        return "its loss or gradient is not finite"
    recent.append((loss, norm))
    if spike_guard and len(recent) > RECENT:
        for name, (*past, value) in zip(("loss", "gradient norm"), zip(*recent)):
            deviations = (value - statistics.fmean(past)) / (statistics.stdev(past) or math.inf)
            if deviations > spike_guard:
                return f"its {name} of {value:.4g} is {deviations:.1f} standard deviations above the last {RECENT}"
    return ""


def improved(step, last_val, best):
    """Whether this step was validated, with a lower loss than any before"""
    return last_val["step"] == step and last_val["val"] < best["val"]


def worn_out(step, last_val, best):
    """Whether this step was validated, and `patience` validations in a row have brought no new best one"""
    return patience > 0 and last_val["step"] == step and not improved(step, last_val, best) and step - best["step"] >= patience * val_interval


def divide_batch(world_size):
    """total_batch_size tokens -> sequences a process and step. The user states tokens; the rest follows."""
    unit = block_size * world_size
    if total_batch_size % unit:
        low = total_batch_size // unit * unit
        near = f"{low:,} or {low + unit:,}" if low else f"{unit:,}"
        raise UserError(f"total_batch_size={total_batch_size:,} is not a multiple of block_size x processes = "
                        f"{block_size} x {world_size}; use {near}")
    sequences = total_batch_size // unit
    if micro_batch and sequences % micro_batch:
        raise UserError(f"micro_batch={micro_batch} does not divide the {sequences} sequences a process takes in a step; "
                        f"use one of {', '.join(map(str, divisors(sequences)))}")
    return sequences


def divisors(n):
    return [d for d in range(1, n + 1) if n % d == 0]


# -- the machine

def peak_tflops(device):
    """What the device could do in bf16, or None where the table does not know it."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((v for k, v in PEAK_TFLOPS.items() if re.search(rf"\b{k}\b", name)), None)


def peak_memory_gb(device):
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    try:
        import resource
    except ImportError:  # Windows
        return math.nan
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes there, in KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


# -- the data and the model

def open_data(is_first, wait, choice):
    """-> the folder of shards; a file is tokenized into one first, by the tokenizer of this name, or spec"""
    if os.path.isdir(data):
        return data
    if not os.path.isfile(data):
        source = os.path.basename(data)
        raise UserError(f"there is no data {data}; " + (
            f"make it with: python dataset.py --source={source}; or try --recipe=tiny, which needs none" if source in dataset.SOURCES
            else "name a folder that dataset.py wrote, or a file of text or pairs"))
    if is_first:
        dataset.prepare(data, choice, out=text_folder(choice))
    wait()
    return text_folder(choice)


def text_folder(choice):
    """Where the shards of a file go: one text may be wanted in several tokenizers."""
    stem, kind = (os.path.splitext(os.path.basename(p))[0] for p in (data, choice if isinstance(choice, str) else choice["name"]))
    kind = re.sub(r"[^a-z0-9]+", "", kind.lower())
    if isinstance(choice, dict) and "merges" in choice:  # two models can have two tokenizers of one name
        kind += "-" + dataset.tokenizer_fingerprint(dataset.get_tokenizer(choice))[:6]
    return os.path.join("data", f"{stem}-{kind}")


def data_tokenizer(folder, loader):
    """-> the tokenizer's spec, its tiktoken.Encoding (None where it cannot be had), and a fingerprint of the data"""
    manifest, spec, enc = loader.manifest, {"name": "gpt2"}, None
    if manifest:
        spec = dataset.tokenizer_spec(folder)
        enc = dataset.get_tokenizer(spec)
        if dataset.tokenizer_fingerprint(enc) != manifest["tokenizer"]["fingerprint"]:
            raise UserError(f"{folder}: {dataset.TOKENIZER} is not the one the shards were made with; prepare the data again")
        content = [manifest["shards"], manifest["tokenizer"]]
    else:
        # Published shards of this format are made with gpt2. Without its vocabulary training works, samples do not.
        with contextlib.suppress(UserError):
            enc = dataset.get_tokenizer(spec)
        content = [(os.path.basename(p), len(tokens)) for p, tokens in zip(loader.paths, loader.shards)]
    return spec, enc, hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def initial_model(asked):
    """The model that init_from names, and its tokenizer's spec. The shape it has becomes this run's."""
    model, known = gpt.find_model(init_from)
    wanted = {**RECIPES[recipe], **asked}
    check_shape(init_from, dataclasses.asdict(model.cfg), wanted)
    for k in ("dropout", "attention"):
        setattr(model.cfg, k, wanted.get(k, getattr(model.cfg, k)))
    globals().update({k: getattr(model.cfg, k) for k in SHAPE}, tokenizer=asked.get("tokenizer", "model"))
    return model, known["tokenizer"]


def open_teacher(device):
    """The model that --teacher names, ready to be asked, and its tokenizer's spec"""
    if not teacher:
        return None, None
    model, spec, _ = gpt.open_model(teacher, device=device)
    if model.cfg.block_size < block_size:
        raise UserError(f"the teacher {teacher} has a context of {model.cfg.block_size}, which is less than block_size={block_size}")
    return model, spec


def distill(loss, logits, wanted, targets):
    """The loss mixed with the divergence from the teacher's distribution, its size restored by T^2 (Hinton et al., 2015)"""
    learned = targets >= 0
    student, wanted = (F.log_softmax(x[learned].float() / distill_temperature, dim=-1) for x in (logits, wanted))  # (n, tokens)
    apart = F.kl_div(student, wanted, reduction="batchmean", log_target=True)
    return (1 - distill_alpha) * loss + distill_alpha * distill_temperature**2 * apart


def new_model(n_tokens):
    shape = {k: globals()[k] for k in SHAPE}
    shape["vocab_size"] = vocab_size or -(-n_tokens // 128) * 128
    return GPT(GPTConfig(**shape, n_tokens=n_tokens))


def expected_tokens(folder, choice):
    """The size of the vocabulary, without the data."""
    if manifest := dataset.read_manifest(folder):
        return manifest["vocab_size"]
    return gpt.GPT2_TOKENS if choice in ("gpt2", {"name": "gpt2"}) else dataset.bpe_size(choice) or dataset.get_tokenizer(choice).n_vocab


def make_optimizers(model, device):
    fused = device.type in ("cuda", "cpu")
    groups = model.optimizer_groups(weight_decay)
    optimizers = []
    if optimizer == "muon":
        matrices = [p for block in model.transformer.h for p in block.parameters() if p.dim() == 2]
        of_muon = {id(p) for p in matrices}
        for group in groups:
            group["params"] = [p for p in group["params"] if id(p) not in of_muon]
        # Scaled so that AdamW's learning rate serves both (Liu et al., 2025, "Muon is scalable").
        optimizers.append(torch.optim.Muon(matrices, lr=max_lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"))
    optimizers.append(torch.optim.AdamW(groups, lr=max_lr, betas=(beta1, beta2), eps=eps, fused=fused))
    return optimizers


# -- ZeRO-2 (Rajbhandari et al., 2019), by torch's fully_shard. Its modules are imported here alone: they take a second.

def shard(model, device, world_size):
    """
    Cuts every parameter up, in place: a process keeps one part of it, of its gradient and of its moments. The weights are put
    together for a step, and gradients are summed up into the parts as soon as a block's are known.
    """
    from torch.distributed.fsdp import fully_shard
    mesh = dist.device_mesh.init_device_mesh(device.type, (world_size,))
    for block in model.transformer.h:
        fully_shard(block, mesh=mesh, reshard_after_forward=False)
    return fully_shard(model, mesh=mesh, reshard_after_forward=False)  # the rest, a tied embedding and head as one


@contextlib.contextmanager
def whole(model):
    """
    The model with all its weights, so that every process may use it at its own pace. For zero2 a copy of it, put together for the
    occasion: in the model itself every forward pass counts, on all processes, in the order in which weights are fetched.
    """
    if not hasattr(model, "unshard"):
        yield model
        return
    with torch.device("meta"):
        copy = GPT(model.cfg)
    copy.load_state_dict({k: p.full_tensor() for k, p in model.named_parameters()}, strict=False, assign=True)
    if model.cfg.tie_head:
        copy.lm_head.weight = copy.transformer.wte.weight
    for name, buffer in model.named_buffers():
        setattr(copy, name, buffer)
    yield copy


def gather(tree, keep=True):
    """Full tensors in place of shards, in a state dict or alone, on the CPU. Every process must call it; one may keep the result."""
    if isinstance(tree, dict):
        return {k: gather(v, keep) for k, v in tree.items()}
    if isinstance(tree, list):
        return [gather(v, keep) for v in tree]
    if hasattr(tree, "full_tensor"):
        tree = tree.full_tensor()
        return tree.cpu() if keep else None
    return tree


def scatter(state, optimizer):
    """A full optimizer state -> this process's part of it, where the optimizer's parameters are cut up"""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    if not hasattr(params[0], "full_tensor"):
        return state
    from torch.distributed.tensor import distribute_tensor
    part = lambda p, v: distribute_tensor(v.to(p.device), p.device_mesh, p.placements) if v.shape == p.shape else v
    return {**state, "state": {i: {k: part(params[i], v) for k, v in moments.items()} for i, moments in state["state"].items()}}


def fit(model, loss_of, device, autocast, sequences, used, shares, first):
    """
    -> the micro-batch, and the model to train, compiled where that works. Tried out before the run: it is too late to learn
    in its middle that memory is short or a compiler is missing. `used` is what the run had before it was resumed; of AdamW's
    moments a process keeps one of `shares`.
    """
    largest = used or max(1, (65536 if device.type == "cuda" else 4096) // block_size)  # more tokens at once gain nothing
    sizes = [micro_batch] if micro_batch else [d for d in reversed(divisors(sequences)) if d <= largest]
    compiled = compile == "true" or compile == "auto" and device.type == "cuda" and shares == 1
    fast = torch.compile(model, dynamic=False) if compiled else model
    while compiled or device.type == "cuda":
        try:
            tokens = torch.zeros(sizes[0], block_size, dtype=torch.long, device=device)
            later = [torch.empty(2, p.numel() // shares, device=device) for p in model.parameters()]  # room for AdamW's two moments
            batch = [tokens] * (3 if doc_mask else 2)
            with autocast():
                loss_of(fast, *batch).backward()
                with torch.no_grad():
                    model(*batch)  # as validation does
            break
        except torch.OutOfMemoryError:
            if len(sizes) == 1:
                ways = [f"lower micro_batch={sizes[0]}"] * (sizes[0] > 1) + ["--grad_checkpoint"] * (not grad_checkpoint) + \
                    ["--parallel=zero2 on several GPUs"] * (shares == 1) + [f"lower block_size={block_size}", "a smaller model"]
                raise UserError(f"out of memory; what helps, the least costly first: {', '.join(ways)}") from None
            sizes.pop(0)
            torch._dynamo.reset()
        except Exception as e:  # a compiler can fail in any way
            if fast is model:
                raise
            if first:
                why = (str(e).strip().splitlines() or [""])[0][:100]
                print(f"compile: not here ({type(e).__name__}: {why}); training goes on without", flush=True)
            fast, compiled = model, False
            torch._dynamo.reset()
        finally:
            tokens = batch = later = None
            model.zero_grad(set_to_none=True)
            if device.type == "cuda":
                torch.cuda.empty_cache()
    return sizes[0], fast


# -- checkpoints and the log

def checkpoint_path(step):
    return os.path.join(out_dir, "checkpoints", f"model_{step:06d}.pt")


def save_checkpoint(state, best, sound):
    """Complete under its name, or not there at all. The newest few stay, and the best; all do while the run is not sound."""
    path = checkpoint_path(state["step"])
    try:
        with open(path + ".tmp", "wb") as f:
            torch.save(state, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(path + ".tmp", path)
    except (OSError, RuntimeError) as e:  # torch raises the latter when a disk is full
        raise UserError(f"cannot write {path}: {str(e).splitlines()[0]}; the checkpoints before it are good") from None
    for old in gpt.find_checkpoints(out_dir)[:-keep] if sound else ():
        if gpt.checkpoint_step(old) != best["step"]:
            os.remove(old)
    return path


def open_log(resuming, step0):
    """log.txt, for appending. What the run would write over is set aside: an older run's files, or checkpoints later than step0."""
    log, checkpoints = os.path.join(out_dir, "log.txt"), os.path.join(out_dir, "checkpoints")
    try:
        os.makedirs(checkpoints, exist_ok=True)
        for name in os.listdir(checkpoints):
            if name.endswith(".tmp"):  # cut off in the middle of a save
                os.remove(os.path.join(checkpoints, name))
        if resuming:
            old = [p for p in gpt.find_checkpoints(out_dir) if gpt.checkpoint_step(p) > step0]
        else:
            old = [p for p, full in ((log, os.path.exists(log)), (checkpoints, os.listdir(checkpoints))) if full]
        for path in old:
            stem, ending = os.path.splitext(path)
            aside = next(p for n in itertools.count(1) if not os.path.exists(p := f"{stem}.{n}{ending}"))
            os.rename(path, aside)
            print(f"{os.path.normpath(path)} is of another run: it is now {os.path.normpath(aside)}")
        os.makedirs(checkpoints, exist_ok=True)
        f = open(log, "ab+")
        if f.tell() and f.seek(-1, os.SEEK_END) >= 0 and f.read() != b"\n":  # a line torn by a kill
            f.write(b"\n")
        return io.TextIOWrapper(f, encoding="utf-8", line_buffering=True)
    except OSError as e:
        raise UserError(f"cannot write in out_dir={out_dir}: {e.strerror}") from None


def open_board(resumed_id):
    """The run at Weights & Biases, or None. A resumed run goes on under its id."""
    if not wandb_project:
        return None
    try:
        import wandb
        wandb.init  # not in a mere folder of that name, such as it leaves behind
    except (ImportError, AttributeError):
        raise UserError("--wandb_project needs a package: pip install wandb") from None
    try:
        os.makedirs(out_dir, exist_ok=True)
        board = wandb.init(project=wandb_project, name=os.path.basename(os.path.abspath(out_dir)), dir=out_dir, id=resumed_id, resume="allow",
                           config={k: globals()[k] for k in SETTINGS})
    except (wandb.errors.Error, OSError, ValueError) as e:
        raise UserError(f"Weights & Biases: {str(e).splitlines()[0].rstrip('.')}; WANDB_MODE=offline keeps the log in {out_dir}") from None
    board.define_metric("*", step_metric="step")  # its own counter does not go back to a checkpoint's step
    return board


def describe(model, world_size, sequences, n_windows, where, about=""):
    """What is about to happen."""
    cfg, tokens = model.cfg, max_steps * total_batch_size
    print(f"model: {cfg.n_layer} layers, {cfg.n_head} heads, {cfg.n_embd} wide, context {cfg.block_size}, vocabulary {cfg.vocab_size:,}")
    print("parameters: " + ", ".join(f"{k} {v:,}" for k, v in model.param_counts().items()))
    print(f"batch: {total_batch_size:,} tokens = {world_size} process{'es' * (world_size > 1)} x {sequences} sequences x {block_size} tokens")
    passes = f" = {max_steps * sequences * world_size / n_windows:.2f} epochs" if n_windows else ""
    print(f"run: {about}{max_steps:,} steps = {tokens:,} tokens{passes}, {model.flops_per_token() * tokens:.2e} FLOPs" if max_steps else
          f"run: {epochs:g} epochs; the data is not here yet, so the steps are not known")
    print(f"device: {where}", flush=True)


def plan(world_size, sequences, model, choice):
    """--dry_run: the same, and what it costs, without weights, data or device."""
    folder = data if os.path.isdir(data) else text_folder(choice)
    source = dataset.SOURCES.get(os.path.basename(data), {})
    about, n_windows = "", 0
    if dataset.read_manifest(folder):
        n_windows = DataLoader(folder, "train", 1, block_size, stride=stride).n_windows
    elif "tokens" in source:
        n_windows = int(source["tokens"] * dataset.split_shares(source.get("splits", "100/0"))[0] / 100) // (stride or block_size)
        about = "" if max_steps else "about "
    set_steps(n_windows, sequences * world_size)
    with torch.device("meta"):
        model = model or new_model(expected_tokens(folder, choice))
    describe(model, world_size, sequences, n_windows, "none: a dry run", about)
    # All in float32. AdamW has two moments, Muon one; zero2 holds its share of the weights beside all of them.
    n = model.param_counts()["total"]
    of_muon = sum(p.numel() for p in model.transformer.h.parameters() if p.dim() == 2) if optimizer == "muon" else 0
    kept = 4 * n - of_muon if parallel == "ddp" or world_size == 1 else n + 4 * n / world_size
    print(f"memory: {4 * kept / 2**30:.2f} GiB a process, and the activations")
    for gpu in ("RTX 4090", "A100", "H100") if max_steps else ():
        seconds = model.flops_per_token() * max_steps * total_batch_size / (0.4 * PEAK_TFLOPS[gpu] * 1e12 * world_size)
        price = f", ${dollars(seconds, world_size):,.2f} at ${usd_per_gpu_hour:g} a GPU-hour" if usd_per_gpu_hour else ""
        print(f"cost: {about}{dataset.clock(seconds)} of {world_size} x {gpu} at 40% of its peak{price}")


def dollars(seconds, world_size):
    """8 GPUs at $20.50 an hour together are usd_per_gpu_hour=2.5625; 2.5 hours of them are $51.25."""
    return seconds / 3600 * world_size * usd_per_gpu_hour


def climb():
    """--bench=ladder: every technique of LADDER on top of those before it, each run a process of its own."""
    where = gpt.pick_device(device)
    on_cuda = where.type == "cuda"
    gpus = torch.cuda.device_count() if on_cuda else 1
    absent = {"TF32": not on_cuda and "only CUDA has it", "more GPUs": gpus == 1 and f"there is one {where.type}",
              "half precision": gpt.pick_dtype("auto", where) == torch.float32 and f"this {where.type} computes in float32"}
    asked = {k: v for k, v in parse_command(sys.argv[1:]).items() if k != "bench"}
    settings = {"total_batch_size": block_size * (64 if on_cuda else 1), **asked, "bench": 12 if on_cuda else 3}
    rates = []
    print(f"{'technique':<18}{'tokens/s':>12}{'step, ms':>12}{'MFU':>8}{'GiB':>8}{'gain':>8}{'in all':>8}")
    for name, change in [*LADDER.items(), ("more GPUs", {"total_batch_size": settings["total_batch_size"] * gpus})]:
        if absent.get(name):
            print(f"{name:<18}{'-':>12}  {absent[name]}", flush=True)
            continue
        settings.update(change)
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={gpus}"] if name == "more GPUs" else []
        done = subprocess.run([sys.executable, *torchrun, __file__, *(f"--{k}={v}" for k, v in settings.items())], capture_output=True, text=True)
        if done.returncode:
            print(f"{name:<18}{'-':>12}  {(done.stderr.strip().splitlines() or ['it failed'])[-1]}", flush=True)
            continue
        row = json.loads(done.stdout.splitlines()[-1])
        if settings["compile"] == "true" and not row["compiled"]:
            print(f"{name:<18}{'-':>12}  there is no compiler for it here", flush=True)
            settings["compile"] = "false"
            continue
        rates.append(row["tok_s"])
        gains = f"{rates[-1] / rates[-2:][0]:>7.2f}x{rates[-1] / rates[0]:>7.2f}x"
        print(f"{name:<18}{rates[-1]:>12,}{row['ms']:>12,.0f}{row['mfu'] or 'n/a':>8}{row['mem_gb']:>8}{gains}", flush=True)


def set_steps(n_windows, sequences):
    """max_steps from epochs, where those were chosen"""
    global max_steps
    if not max_steps and not epochs:
        raise UserError("max_steps and epochs are both 0; set one")
    max_steps = max_steps or math.ceil(epochs * n_windows / sequences)


def get_rng(device):
    gpu = {"cuda": torch.cuda, "mps": torch.mps}.get(device.type)
    return {"cpu": torch.get_rng_state(), **({device.type: gpu.get_rng_state()} if gpu else {})}


def set_rng(device, states):
    torch.set_rng_state(states["cpu"])
    if device.type != "cpu" and device.type in states:
        {"cuda": torch.cuda, "mps": torch.mps}[device.type].set_rng_state(states[device.type])


stop_signal = 0


def request_stop(signum, frame):
    global stop_signal
    stop_signal = signum
    signal.signal(signum, signal.SIG_DFL)  # a second one ends the program at once
    if int(os.environ.get("RANK", 0)) == 0:
        print("\nstopping: the step is finished and saved first", file=sys.stderr, flush=True)


def meet(where):
    """Processes that cannot reach one another hang in their first collective, and say nothing: so one comes before all work."""
    hint = threading.Timer(LATE, lambda: print(
        f"train.py: some processes are not here after {LATE} s. If all have started: on several machines, NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME "
        "name the network they share; on one, NCCL_P2P_DISABLE=1 may help; NCCL_DEBUG=INFO tells more", file=sys.stderr, flush=True))
    hint.daemon = True
    hint.start()
    dist.init_process_group("nccl" if where.type == "cuda" else "gloo", timeout=timedelta(hours=2))
    met = torch.zeros(1, device=where)
    dist.all_reduce(met)
    met.item()  # on CUDA, it has only been asked for before
    hint.cancel()


# -- the run, from top to bottom

def main():
    asked, ckpt = configure(sys.argv[1:])
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a sample must not end a run where the terminal lacks a letter

    # processes: torchrun starts one a device and says so in the environment
    rank, local_rank, world_size = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))
    first, zero2 = rank == 0, parallel == "zero2" and world_size > 1
    if bench == "ladder":
        if world_size > 1:
            raise UserError("--bench=ladder starts its own processes; run it without torchrun")
        return climb()
    if zero2 and (optimizer != "adamw" or compile == "true"):
        raise UserError("parallel=zero2 goes with optimizer=adamw, and without compile")
    raw, own = initial_model(asked) if init_from and not ckpt else (None, ckpt and ckpt["tokenizer"])  # own: the model's tokenizer
    choice = own if own and tokenizer == "model" else tokenizer  # what a file is tokenized by
    sequences = divide_batch(world_size)  # a process and step
    if dry_run:
        return plan(world_size, sequences, raw, choice) if first else None
    where = gpt.pick_device(device, local_rank)
    if world_size > 1:
        meet(where)
    wait = dist.barrier if world_size > 1 else lambda: None

    def total(*numbers):
        """Sums over all processes."""
        if world_size == 1:
            return numbers
        t = torch.tensor(numbers, dtype=torch.float64, device=where)
        dist.all_reduce(t)
        return t.tolist()

    # randomness and precision
    master, its = open_teacher(where)  # before the seed: to make a model takes random numbers
    torch.manual_seed(seed)
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    amp_dtype = gpt.pick_dtype(dtype, where)
    amp_name = str(amp_dtype).removeprefix("torch.")
    autocast = lambda: torch.autocast(where.type, amp_dtype) if amp_dtype != torch.float32 else contextlib.nullcontext()
    scaler = torch.amp.GradScaler(where.type, enabled=amp_dtype == torch.float16 and where.type != "mps")

    # data
    n_windows, held_out = 0, {}  # split -> its loader, and how many of its windows are judged
    if bench:
        spec, enc, fingerprint, template = None, None, None, None
        n_tokens = expected_tokens(data if os.path.isdir(data) else text_folder(choice), choice)
        batch = torch.randint(n_tokens, (2, sequences, block_size), device=where)
        batch = torch.cat((batch, torch.zeros_like(batch[:1]))) if doc_mask else batch
    else:
        folder = open_data(first, wait, choice)
        loader = DataLoader(folder, "train", sequences, block_size, rank, world_size, seed, stride, device=where, doc_mask=doc_mask)
        spec, enc, fingerprint = data_tokenizer(folder, loader)
        template = (loader.manifest or {}).get("template")  # of a chat, where the data are pairs
        n_tokens, n_windows = enc.n_vocab if enc else gpt.GPT2_TOKENS, loader.n_windows
        if loader.manifest is None and first:
            print(f"{folder} has no manifest: its tokens are taken for GPT-2's, and checked only for being in the vocabulary")
        if loader.manifest and asked.get("tokenizer", "model") not in ("model", spec["name"], loader.manifest["settings"]["tokenizer"]):
            raise UserError(f"{folder} is in tokenizer {spec['name']}, not {asked['tokenizer']}")
        if own and spec != own:
            raise UserError(f"{ckpt['path'] if ckpt else init_from} was trained with tokenizer {own['name']}; {folder} is in another, {spec['name']}")
        if ckpt and ckpt["data_fingerprint"] != fingerprint and not new_data:
            raise UserError(f"{folder} is not the data that {ckpt['path']} was trained on; --new_data goes on all the same")
        if its and spec != its:
            raise UserError(f"the teacher {teacher} is in tokenizer {its['name']}, the data in {spec['name']}; they must be the same")
        for split, most in (("val", max(1, val_tokens // block_size)), ("test", math.inf)):
            try:
                held = DataLoader(folder, split, 1, block_size, vocab_size=n_tokens, device=where, doc_mask=doc_mask)
                held_out[split] = held, min(held.n_windows, most)
            except UserError as e:
                if first and (val_interval if split == "val" else f'"{split}"' in json.dumps(loader.manifest)):
                    print(f"no {split} loss: {e}")
    set_steps(n_windows, sequences * world_size)

    # model: `raw` for everything but the training steps, which may run it compiled and in DDP's wrapper, as `model`
    if ckpt:
        raw = GPT(GPTConfig(**{**ckpt["model_config"], "dropout": dropout, "attention": attention}))
        gpt.load_weights(raw, ckpt.pop("model"), ckpt["path"])
    raw = (raw or new_model(n_tokens)).to(where).train()
    if n_tokens > raw.cfg.vocab_size:
        raise UserError(f"vocab_size={raw.cfg.vocab_size:,} is too small for the tokenizer's {n_tokens:,} tokens")
    raw.grad_checkpoint = grad_checkpoint

    def loss_of(model, x, y, *document):
        """The mean over what a batch has to teach"""
        logits, loss = model(x, y, *document)
        if master is None:
            return loss
        with torch.inference_mode(), torch.autocast(where.type, enabled=False):
            wanted = master(x, y, *document)[0]
        return distill(loss, logits[..., :n_tokens], wanted[..., :n_tokens], y)

    flops_per_token, n_parameters = raw.flops_per_token(), raw.param_counts()["total"]
    if first:
        name = torch.cuda.get_device_name(where) if where.type == "cuda" else f"{where.type}, {torch.get_num_threads()} threads"
        describe(raw, world_size, sequences, n_windows, f"{name}, {amp_name}")
    B, model = fit(raw, loss_of, where, autocast, sequences, ckpt and ckpt["micro_batch"], world_size if zero2 else 1, first)
    compiled = model is not raw
    if world_size > 1:
        smallest = torch.tensor(B, device=where)
        dist.all_reduce(smallest, dist.ReduceOp.MIN)
        B = int(smallest)
        model = shard(raw, where, world_size) if zero2 else torch.nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    accumulate = sequences // B
    optimizers = make_optimizers(raw, where)
    if bench:
        loader = types.SimpleNamespace(position=0, next_batch=lambda: batch[:, :B], learned=lambda n: n * block_size)
    else:
        loader.B, loader.vocab_size = B, n_tokens

    # where to begin
    step0, evaluated, totals, board, board_id = 0, False, {"seconds": 0.0, "usd": 0.0}, None, None
    last_val, best = {"step": -1, "val": math.inf}, {"step": -1, "val": math.inf}  # best: of the saved ones
    recent = deque(maxlen=RECENT + 1)  # (loss, norm) of the last steps
    torch.manual_seed(seed + rank)  # dropout differs between processes
    resuming = ckpt is not None
    if resuming:
        step0, best, totals, evaluated = ckpt["step"], ckpt["best"], ckpt["totals"], ckpt["evaluated"]
        last_val = ckpt.get("last_val", last_val)
        recent.extend(ckpt.get("recent", ()))
        if step0 > max_steps:
            raise UserError(f"{ckpt['path']} is at step {step0}, past max_steps={max_steps}; raise max_steps")
        loader.load_state_dict(ckpt["loader"])
        for o, state in zip(optimizers, ckpt.pop("optimizers"), strict=True):
            o.load_state_dict({**scatter(state, o), "param_groups": o.state_dict()["param_groups"]})  # the settings are those of now
        if ckpt["scaler"] and scaler.is_enabled():
            scaler.load_state_dict(ckpt["scaler"])
        if rank < len(ckpt["rng"]):
            set_rng(where, ckpt["rng"][rank])
        board_id = ckpt.get("wandb")
        ckpt = state = None
    if total(step0)[0] != step0 * world_size:
        raise UserError("the processes found different checkpoints; out_dir must be the same folder for all of them")
    if first and not bench:
        board = open_board(board_id)
        log = open_log(resuming, step0)
        log.write("# " + json.dumps({
            "recipe": recipe, "step": step0, "world_size": world_size, "micro_batch": B, "device": where.type, "dtype": amp_name,
            "parameters": n_parameters, "config": {k: globals()[k] for k in SETTINGS}}) + "\n")
        print("; ".join([f"micro-batch {B} x {accumulate} a step", *loader.filling(B)]) + f"; log and checkpoints in {os.path.abspath(out_dir)}"
              + (f"; from step {step0}" if step0 else ""), flush=True)

    # what is done now and then
    def record(step, stream, value, line, **fields):
        log.write(f"{step} {stream} {value:.6f} " + " ".join(f"{k}={v}" for k, v in fields.items()) + "\n")
        dataset.say(line, again=stream == "train")
        if board:
            board.log({"step": step, stream: value, **{f"{stream}/{k}": float(v) for k, v in fields.items() if v != "n/a"}})

    def validate(step, split):
        """The loss over the same tokens at any number of processes. False if a stop was asked for meanwhile."""
        nats = tokens = n_bytes = 0
        held, windows = held_out[split]
        with whole(raw) as judged, torch.no_grad(), autocast():
            judged.eval()
            for i in range(rank * B, windows, B * world_size):
                if stop_signal:
                    break
                x, y, *document = held.windows(range(i, min(i + B, windows)))
                learned = y[y >= 0]
                nats += judged(x, y, *document)[1].item() * len(learned)
                tokens += len(learned)
                n_bytes += byte_count[learned].sum().item() if enc else 0
        raw.train()
        nats, tokens, n_bytes, stopped = total(nats, tokens, n_bytes, stop_signal)
        if stopped:
            return False
        loss, bpb = nats / tokens, nats / math.log(2) / n_bytes if n_bytes else math.nan
        if split == "val":
            last_val.update(step=step, val=loss, bpb=bpb)
        if first:
            name = "validation" if split == "val" else split
            record(step, split, loss, f"step {step}/{max_steps} | {name} loss {loss:.4f} nats a token, {bpb:.4f} bits a byte",
                   bpb=f"{bpb:.6f}", tokens=int(tokens))
        return True

    def judge(step):
        """HellaSwag. False if a stop was asked for meanwhile."""
        with whole(raw) as judged, autocast():
            right = hellaswag.score(judged, examples, rank, world_size, stop=lambda: stop_signal)
        acc, by_token, by_byte, n, stopped = total(*right, stop_signal)
        if first and not stopped:
            record(step, "hella", by_token / n, f"step {step}/{max_steps} | HellaSwag {by_token / n:.4f}", acc=f"{acc / n:.4f}",
                   by_byte=f"{by_byte / n:.4f}", examples=int(n))
        return not stopped

    def print_sample(step):
        tokens = dataset.prompt_tokens(enc, template, [(sample_prompt, None)])
        n = len(tokens)
        with whole(raw) as speaker, autocast():
            stream = speaker.stream([tokens], sample_temperature, top_k=50, generator=torch.Generator(where).manual_seed(seed))
            while first and len(tokens) < n + 200 and not stop_signal and (token := next(stream).item()) != enc.eot_token:
                tokens.append(token)
            stream.close()
        if first:
            between = "\n" if template else ""
            dataset.say(f"sample at step {step}: {sample_prompt}{between}{enc.decode(tokens[n:])}\n")

    def save(step):
        if improved(step, last_val, best):
            best.update(last_val)
        states = [get_rng(where)]
        if world_size > 1:
            mine, states = states[0], [None] * world_size
            dist.all_gather_object(states, mine)
        weights, moments = gather(raw.state_dict(), first), gather([o.state_dict() for o in optimizers], first)
        if raw.cfg.tie_head:
            weights["lm_head.weight"] = weights["transformer.wte.weight"]  # gathered, they are two
        if first:
            path = save_checkpoint({
                "version": gpt.CHECKPOINT_VERSION, "step": step, "evaluated": evaluated, "model": weights, "optimizers": moments,
                "scaler": scaler.state_dict(), "rng": states, "loader": loader.state_dict(), "micro_batch": B,
                "model_config": dataclasses.asdict(raw.cfg),
                "train_config": {k: globals()[k] for k in SETTINGS if k not in OF_ONE_START},
                "tokenizer": spec, "template": template, "data_fingerprint": fingerprint, "best": best, "last_val": last_val,
                "recent": list(recent), "wandb": board and board.id,
                "totals": {**totals, "tokens": step * total_batch_size, "flops": step * total_batch_size * flops_per_token}}, best, sound=not bad_steps)
            dataset.say(f"step {step}/{max_steps} | saved {path}")

    examples = None
    if hella_interval and enc:
        try:
            here = hellaswag.download() if first else None
        except UserError as e:
            print(f"no HellaSwag: {e}")
            here = None
        if total(here is not None)[0]:
            examples = hellaswag.encode(hellaswag.read_examples(hellaswag.PATH), enc, block_size)

    # the loop
    at_end = lambda step: step == max_steps or worn_out(step, last_val, best)
    due = lambda step, interval: interval and (step % interval == 0 or at_end(step))
    byte_count = torch.tensor(dataset.token_bytes(enc), device=where) if enc else None
    peak, bad_steps, times = peak_tflops(where), 0, []
    if where.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    signal.signal(signal.SIGTERM, request_stop)
    signal.signal(signal.SIGINT, request_stop)
    gc.collect()
    gc.freeze()
    gc.disable()  # a collection in the middle of a step can cost half a second
    stop = total(stop_signal)[0]
    for step in range(step0, max_steps + 1):
        # what is due at this step, unless the checkpoint we began with already saw to it
        if not evaluated and not stop:
            evaluated = not ("val" in held_out and due(step, val_interval)) or validate(step, "val")
            evaluated = evaluated and (not ("test" in held_out and at_end(step)) or validate(step, "test"))
            evaluated = evaluated and (not (examples and due(step, hella_interval)) or judge(step))
            if evaluated and step and due(step, sample_interval) and enc:
                print_sample(step)
            stop = not evaluated
        if not bench and (step > step0 and due(step, ckpt_interval) or stop or patience and improved(step, last_val, best)):
            save(step)
        if stop or at_end(step):
            break

        # one step: forward and backward for every micro-batch, then one update
        began = time.perf_counter()
        loss = torch.zeros((), device=where)
        learned = loader.learned(sequences * world_size)
        for micro in range(accumulate):
            x, y, *document = loader.next_batch()
            last = micro == accumulate - 1
            if zero2:
                model.set_reshard_after_backward(last)
            elif world_size > 1:
                # Gradients travel with the last micro-batch only; DDP wants to know before the forward pass.
                model.require_backward_grad_sync = last
            # The loss is a mean over what the whole step teaches; of the processes' gradients, too, the mean is taken.
            weight = (y >= 0).sum() * (world_size / learned)
            with autocast():
                part = loss_of(model, x, y, *document) * weight
            loss += part.detach()
            scaler.scale(part).backward()
        lr = get_lr(step)
        for o in optimizers:
            scaler.unscale_(o)
            for group in o.param_groups:
                group["lr"] = lr
        norm = gather(torch.nn.utils.clip_grad_norm_(raw.parameters(), grad_clip or math.inf)).item()
        loss, norm, stop = (n / world_size for n in total(loss.item(), norm, stop_signal))
        left_out = why_left_out(loss, norm, recent)
        for o in optimizers:
            if not left_out:
                scaler.step(o)
            o.zero_grad(set_to_none=True)
        scaler.update()
        bad_steps = bad_steps + 1 if left_out else 0
        # With a scaler an overflow is nothing to tell of: it tries a smaller scale.
        if left_out and first and not bench and (math.isfinite(norm) or not scaler.is_enabled()):
            dataset.say(f"step {step} is left out: {left_out}; its data: {loader.places(sequences * world_size)}")
        if bad_steps == 20:
            raise UserError(f"every step from {step - 19} to {step} was left out; resume from an earlier checkpoint with a lower max_lr, or in --dtype=float32")
        evaluated = False

        times.append(time.perf_counter() - began)
        totals["seconds"] += times[-1]
        totals["usd"] += dollars(times[-1], world_size)
        if first and due(step, log_interval):
            seconds = statistics.mean(times[-log_interval:])
            rate = total_batch_size / seconds
            mfu = f"{rate * flops_per_token / world_size / peak / 1e12:.4f}" if peak else "n/a"
            usd = {"usd": f"{totals['usd']:.4f}"} if usd_per_gpu_hour else {}
            record(step, "train", loss, f"step {step}/{max_steps} | loss {loss:.4f} | lr {lr:.2e} | norm {norm:.2f} | "
                   f"{seconds * 1000:.0f} ms | {1 / seconds:.2f} steps/s | {rate:,.0f} tokens/s | mfu {mfu} | "
                   f"{dataset.clock((max_steps - step) * seconds)} left",
                   lr=f"{lr:.4e}", norm=f"{norm:.4f}", ms=f"{seconds * 1000:.1f}", steps_s=f"{1 / seconds:.4g}", tok_s=f"{rate:.0f}", mfu=mfu, **usd)

    if first and bench and times:
        ms = statistics.median(times[len(times) // 3:]) * 1000
        rate = total_batch_size / ms * 1000
        mfu = rate * flops_per_token / world_size / peak / 1e12 if peak else None
        print(json.dumps({
            "tok_s": round(rate), "ms": round(ms, 2), "mfu": mfu and round(mfu, 4), "peak_tflops": peak,
            "mem_gb": round(peak_memory_gb(where), 2), "world_size": world_size, "micro_batch": B, "dtype": amp_name,
            "compiled": compiled, "parameters": n_parameters}))
    elif first and not bench:
        log.close()
        if board:
            board.finish()
        cost = f", ${totals['usd']:.2f}" if usd_per_gpu_hour else ""
        why = f", no better validation loss in {patience}" if worn_out(step, last_val, best) else ""
        dataset.say(f"{'stopped' if stop else 'done'} at step {step}{why}: {totals['seconds'] / 60:.1f} minutes of training{cost}")
        if patience and best["step"] >= 0:
            dataset.say(f"best: step {best['step']}, validation loss {best['val']:.4f}: {checkpoint_path(best['step'])}")
    code = 128 + stop_signal if stop_signal else 0
    if world_size > 1:
        wait()  # for the process that saves
        dist.destroy_process_group()
        # A thread of the process group that outlives Python's lock aborts the process (one exit in thirty, on gloo).
        sys.stdout.flush()
        os._exit(code)
    return code


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (UserError, gpt.UserError) as e:
        sys.exit(f"train.py: {e}")
    except KeyboardInterrupt:
        sys.exit("\ntrain.py: stopped before training began")
