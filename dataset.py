"""
Turns text into shards of tokens.

    python dataset.py                                          # FineWeb-Edu sample-10BT -> data/fineweb-edu/
    python dataset.py --source=book.txt --tokenizer=bpe:4096   # your own text and tokenizer -> data/book/
    python dataset.py --source=a.jsonl,b.txt --out=data/both   # several sources, one after the other
    python dataset.py --source=pairs.jsonl                     # check prompts and responses for fine-tuning
    python dataset.py --source=synth --prompts=prompts.txt --endpoint=http://localhost:8000/v1 --model=NAME

A shard is a file in llm.c's format: a header of 256 little-endian int32 (magic number, version, token count, zeros),
then the tokens as uint16. Every document begins with the end-of-text token. A shard file exists only when it is
complete, so this script can be killed at any time: the same command continues with the shard that was in progress, and
the finished folder is identical to that of an uninterrupted run.
"""
import argparse
import contextlib
import difflib
import functools
import gc
import glob
import hashlib
import heapq
import inspect
import io
import itertools
import json
import logging
import math
import os
import random
import re
import signal
import struct
import sys
import threading
import time
import types
import zipfile
import zlib
from collections import Counter, defaultdict, deque
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from typing import Callable, NamedTuple

import numpy as np
import tiktoken

EOT = "<|endoftext|>"
GPT2_SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
MAGIC, VERSION, HEADER_BYTES = 20240520, 1, 1024
SPLITS = ("train", "val", "test")
SHARD_TOKENS = 100_000_000  # the default size of a shard
BPE_BYTES = 200_000_000  # text that bpe:N is trained on
BATCH_CHARS = 1 << 20  # characters of text that a thread encodes at a time
TRIES, MAX_BACKOFF = 8, 60  # attempts for a request; the longest wait between two, in seconds
RETRY_STATUS = (408, 409, 425, 429, 500, 502, 503, 504)
MANIFEST, PROGRESS = "meta.json", "progress.npz"
MANIFEST_VERSION = 2
TOKENIZER_NAME = r"gpt2|byte|bpe:\d(_?\d){1,6}"
MAX_MERGES = 1 << 24  # characters of a tokenizer's merges; that of bpe:50000 has about 500,000
TOKENIZER_SPEC = "tokenizer_spec.json"  # in an exported model: the tokenizer's spec and the chat template

# Named sources: a Hugging Face dataset (`hub`, `config`, `revision`), a text file (`url`), or `parts`, other sources in
# a row. `tokens` is roughly how many it holds, `special` are the special tokens of a trained tokenizer, and the rest
# are defaults for the options of the same name.
SOURCES = {
    "fineweb-edu": dict(hub="HuggingFaceFW/fineweb-edu", config="sample-10BT", tokens=10e9),
    "fineweb": dict(hub="HuggingFaceFW/fineweb", config="sample-10BT", tokens=10e9),
    "custom-gpt": dict(
        hub="HuggingFaceFW/fineweb", config="sample-10BT", tokens=550e6, max_bytes=2_500_000_000, splits="99/1",
        tokenizer="bpe:50000", special=(EOT, "<|pad|>", "<|user|>", "<|assistant|>")),
    "tinystories": dict(hub="roneneldan/TinyStories", tokens=470e6, splits="90/10"),
    "wikisource": dict(hub="wikimedia/wikisource", config="20231201.en", tokens=500e6),
    # This dataset is a script, which datasets 4 and later no longer runs; the hub keeps a parquet copy on a branch.
    "redpajama-sample": dict(
        hub="togethercomputer/RedPajama-Data-1T-Sample", revision="refs/convert/parquet", tokens=1e9),
    "toygpt": dict(parts=("wikisource", "redpajama-sample"), tokens=1.5e9, splits="98/1/1"),
    "shakespeare": dict(
        url="https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
        tokenizer="byte"),
}


# -- what all scripts share: errors, options, files, progress

class UserError(Exception):
    """An error the user can fix. Scripts print it as one line, without a traceback."""


def report_error(kind, error, trace):
    """For sys.excepthook: a user's mistake is one line on stderr; only a bug shows a traceback."""
    script = os.path.basename(sys.argv[0])
    if issubclass(kind, UserError):
        print(f"{script}: {error}".replace("\n", " "), file=sys.stderr)
    elif issubclass(kind, KeyboardInterrupt):
        print(f"\n{script}: interrupted", file=sys.stderr)
    elif is_out_of_memory(error):
        print(f"{script}: out of memory; use a smaller model, batch or file", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


def is_out_of_memory(error):
    """Python's error, or torch's for CPUs, CUDA and cuBLAS"""
    text = f"{type(error).__name__}: {error}"
    return re.search("MemoryError|allocate memory|out of memory|STATUS_ALLOC_FAILED", text) is not None


class LossyFile(io.FileIO):
    """Ignores errors when writing: a closed pipe or a full disk must not cost a run its checkpoint."""

    def write(self, data):
        try:
            return super().write(data)
        except OSError:
            return len(data)


class Terminal(io.TextIOWrapper):
    """Strips control characters, colours and marks of text direction: a hostile file could take over the terminal."""

    def write(self, text):
        controls = "[\0-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]"
        super().write(re.sub(rf"\x1b\[[0-?]*[ -/]*[@-~]|{controls}", "", text))
        return len(text)


def start_script():
    """Every script calls this first: for errors on one line, and safe output"""
    sys.excepthook = report_error
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # Where stdin, stdout or stderr is closed, the next file to be opened would take its place: open /dev/null instead.
    while os.open(os.devnull, os.O_RDWR) <= 2:
        pass
    for fd, name in ((1, "stdout"), (2, "stderr")):
        stream = io.BufferedWriter(LossyFile(fd, "w", closefd=False))
        encoding = getattr(getattr(sys, name), "encoding", "utf-8")
        setattr(sys, name, Terminal(stream, encoding, "replace", line_buffering=fd == 2 or os.isatty(fd)))
    sys.stdin = sys.stdin or open(os.devnull)


# Our options: what other trainers call them
ALIASES = {
    "max_lr": "lr learning_rate", "weight_decay": "wd", "dtype": "precision", "dropout": "drop_rate",
    "warmup_steps": "warmup warmup_iters", "max_steps": "max_iters iters num_steps", "epochs": "num_epochs",
    "total_batch_size": "batch batch_size per_device_train_batch_size gradient_accumulation_steps",
    "block_size": "context_length n_positions n_ctx seq_len sequence_length", "n_embd": "emb_dim d_model hidden_size",
    "n_layer": "n_layers num_layers depth", "n_head": "n_heads num_heads", "grad_clip": "max_grad_norm clip_grad",
    "grad_checkpoint": "gradient_checkpointing", "val_interval": "eval_interval", "ckpt_interval": "save_interval",
    "data": "dataset data_dir", "init_from": "model pretrained", "ckpt": "model checkpoint", "prompt": "start",
    "temperature": "greedy temp", "max_new_tokens": "num_tokens length", "source": "dataset data input",
    "out": "output output_dir out_dir",
}
UNITS = {"total_batch_size": ", in tokens: sequences x block_size", "temperature": "; 0 is greedy"}
DTYPES = {"float32": "32 fp32 32-true", "float16": "16 fp16 16-mixed", "bfloat16": "bf16 bf16-mixed"}


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors, ~ for the home folder, a suggestion for a misspelt option, the docstring as is."""

    def __init__(self, **options):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **options)

    def parse_args(self, arguments=None):
        # A shell leaves --out=~/x as it is.
        arguments = sys.argv[1:] if arguments is None else arguments
        home = os.path.expanduser("~")
        return super().parse_args([re.sub(r"^(--\w+=)~(?=/)", lambda m: m[1] + home, a) for a in arguments])

    def error(self, message):
        if unknown := re.match(r"unrecognized arguments: ([^\s=]+)", message):
            name, options = unknown[1], self._option_string_actions
            ours = [k for k in ALIASES if f"--{k}" in options and name.lstrip("-") in ALIASES[k].split()]
            hint = f"; here it is --{ours[0]}{UNITS.get(ours[0], '')}" if ours else suggest(name, options)
            message = f"there is no option {name}{hint}"
        raise UserError(message)


def suggest(name, names):
    """tinny -> "; did you mean tiny?" """
    close = difflib.get_close_matches(name, names, 1)
    return f"; did you mean {close[0]}?" if close else "; see --help"


def integer(text):
    """For argparse: 100_000, 1e8 or 512*1024 -> int"""
    if re.fullmatch(r"\d{1,9}(\*\d{1,9}){1,3}", text):
        return math.prod(map(int, text.split("*")))
    with contextlib.suppress(ValueError):
        number = float(text)
        if number.is_integer():  # false for inf and nan
            return int(number) if "e" in text.lower() or "." in text else int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")


def positive(text):
    if (number := integer(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 1")
    return number


def dtype_name(text):
    """For argparse: bf16-mixed -> bfloat16"""
    return next((name for name, aliases in DTYPES.items() if text in aliases.split()), text)


def write_atomically(path, write):
    """`write(file)` fills a temporary file, which is flushed to disk and renamed: a visible file is complete."""
    def open_no_link(name, flags):  # in a stranger's folder it could lead anywhere
        return os.open(name, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)

    temporary = path + ".tmp"
    try:
        with open(temporary, "wb", opener=open_no_link) as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as e:
        with contextlib.suppress(OSError):
            os.remove(temporary)  # on a full disk it would hold the last free space
        if isinstance(e, RuntimeError) and isinstance(e.__context__, OSError):
            raise e.__context__ from None  # torch's own error does not say that the disk is full
        raise


def write_json(path, value):
    text = json.dumps(value, indent=1) + "\n"
    write_atomically(path, lambda f: f.write(text.encode()))


@contextlib.contextmanager
def reading(path, kind, hint=""):
    """Wraps every use of a file that may be damaged or hostile: any error becomes one line that names the file."""
    try:
        yield
    except UserError:
        raise
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror or e}") from e
    except Exception as e:
        if is_out_of_memory(e):
            raise
        raise UserError(f"{path} is not {kind}, or is damaged ({type(e).__name__}){hint}") from e


def read_lines(path):
    """Yields (number, line as bytes) for every line of a file that is not blank."""
    with reading(path, "a file of lines"), open(path, "rb") as f:
        for number, line in enumerate(f, 1):
            if line.strip():
                yield number, line


def check_types(value, like):
    """
    Raises an error unless a value from a file has the structure of the example `like`: a dict has its keys, and each
    element of a list is like its first. An int passes for a float.
    """
    if isinstance(like, dict) and isinstance(value, dict):
        for key in like:
            check_types(value[key], like[key])
    elif isinstance(like, list) and isinstance(value, (list, tuple)):
        for element in value:
            check_types(element, like[0])
    elif type(value) is not type(like) and (type(value), type(like)) != (int, float):
        raise TypeError(f"{type(value).__name__}, not {type(like).__name__}")


def progress_bar(total, unit, done=0):
    """A tqdm bar on a terminal. In a file, plain lines: one every 30 seconds."""
    import tqdm
    tqdm.tqdm.monitor_interval = 0  # no helper thread
    options = dict(total=total, initial=done, unit=" " + unit, unit_scale=True, leave=False)
    if sys.stderr.isatty():
        return tqdm.tqdm(**options, dynamic_ncols=True, delay=0.5)

    def print_line(text):
        if text.strip():
            print(text.strip(), file=sys.stderr, flush=True)

    lines = types.SimpleNamespace(write=print_line, flush=lambda: None)
    return tqdm.tqdm(**options, file=lines, ncols=100, delay=10, mininterval=30, maxinterval=30)


# -- tokenizers. A tokenizer is stored as a spec, a plain dict that fits into JSON and checkpoints: {"name": "gpt2"},
#    {"name": "byte"}, or {"name": "bpe:4096", "merges": [["t", "h"], ...], "special": ["<|endoftext|>"]}, the bytes
#    written as latin-1. A bpe spec without merges is still to be trained. get_tokenizer turns a spec into a
#    tiktoken.Encoding, called enc.

def parse_tokenizer(text):
    """What --tokenizer says -> a spec. A path means the tokenizer of prepared data, or of an exported model."""
    if re.fullmatch(TOKENIZER_NAME, text):
        if text.startswith("bpe:") and not 257 < bpe_size(text) <= 65536:
            raise UserError(f"tokenizer {text}: N must be from 258 to 65536, since tokens are stored as uint16")
        return {"name": text}
    paths = [os.path.join(text, MANIFEST), os.path.join(text, TOKENIZER_SPEC), text]
    path = next((p for p in paths if os.path.isfile(p)), None)
    if path is None:
        raise UserError(f"there is no tokenizer {text!r}; use gpt2, byte, bpe:N (such as bpe:4096), or the folder of "
                        "prepared data")
    return read_spec(path)["tokenizer"]


def read_spec(path):
    """A JSON file with a tokenizer's spec in it (a manifest, or an export's) -> the whole file as a dict"""
    with reading(path, "a file with a tokenizer"):
        content = read_json(path)
        check_spec(content["tokenizer"], content.get("template"))
        return content


def check_spec(spec, template=None):
    """Raises an error unless these, from a file, are a tokenizer's spec and, if there is one, a chat template."""
    if template:
        check_types(template, dict(user="", assistant=""))
        check_keys(template, ("user", "assistant"))
    check_keys(spec, ("name", "merges", "special"))
    if not re.fullmatch(TOKENIZER_NAME, spec["name"]) or not is_trained(spec):
        raise ValueError("not a tokenizer")
    merges, special = spec.get("merges", []), spec.get("special", [])
    check_types(merges, [[""]])
    check_types(special, [""])
    if len(set(special)) < len(special) or sum(len(text) for pair in merges for text in pair) > MAX_MERGES:
        raise ValueError("not a tokenizer of ours")
    if spec["name"] != "gpt2":
        enc = get_tokenizer(spec)
        if EOT not in enc.special_tokens_set or enc.n_vocab > 2**16:
            raise ValueError("not a tokenizer of ours")


def check_keys(value, keys):
    if not value.keys() <= set(keys):
        raise ValueError("unknown keys")


def is_trained(spec):
    return spec["name"] in ("gpt2", "byte") or "merges" in spec


def bpe_size(name):
    """bpe:4096 -> 4096: bytes, merges and special tokens together"""
    return int(name.removeprefix("bpe:"))


def get_tokenizer(spec):
    """A spec, or what --tokenizer takes -> tiktoken.Encoding"""
    if isinstance(spec, str):
        spec = parse_tokenizer(spec)
    name = spec["name"]
    if name == "gpt2":
        try:
            return tiktoken.get_encoding("gpt2")
        except (OSError, ValueError) as e:  # a ValueError if what came has another checksum
            raise UserError(f"cannot download the gpt2 vocabulary ({type(e).__name__}); check the network, set "
                            "TIKTOKEN_CACHE_DIR to a folder that has it, or use --tokenizer=byte or bpe:N") from None
    if not is_trained(spec):
        raise UserError(f"tokenizer {name} has to be trained: python dataset.py --source=FILE.txt --tokenizer={name}")
    ranks = {bytes([b]): b for b in range(256)}
    for left, right in spec.get("merges", ()):
        ranks.setdefault((left + right).encode("latin-1"), len(ranks))
    special = {token: len(ranks) + i for i, token in enumerate(spec.get("special", [EOT]))}
    return tiktoken.Encoding(name, pat_str=GPT2_SPLIT, mergeable_ranks=ranks, special_tokens=special)


def tokenizer_fingerprint(enc):
    """A hash of every token's bytes and id"""
    digest = hashlib.sha256()
    tokens = {**enc._mergeable_ranks, **{text.encode(): i for text, i in enc._special_tokens.items()}}
    for token, i in sorted(tokens.items(), key=lambda item: item[1]):
        digest.update(struct.pack("<II", i, len(token)) + token)
    return digest.hexdigest()[:16]


def token_lengths(enc):
    """How many bytes of text each token stands for, 0 for special tokens.  -> (n_vocab,) int64"""
    lengths = np.zeros(enc.n_vocab, dtype=np.int64)
    for token, i in enc._mergeable_ranks.items():
        lengths[i] = len(token)
    return lengths


def chat_template(enc):
    """What precedes a user's and an assistant's text: special tokens if the tokenizer has them, else plain text."""
    special = {"user": "<|user|>", "assistant": "<|assistant|>"}
    if set(special.values()) <= enc.special_tokens_set:
        return special
    return {"user": "User:\n", "assistant": "\n\nAssistant:\n"}


def encode_text(enc, text):
    """enc.encode_ordinary, except that tiktoken panics at a million spaces in a row: such a text is cut."""
    try:
        return enc.encode_ordinary(text)
    except BaseException as e:
        if type(e).__name__ != "PanicException":
            raise
        return [token for i in range(0, len(text), 10_000) for token in enc.encode_ordinary(text[i:i + 10_000])]


def encode_marker(enc, marker):
    if marker in enc.special_tokens_set:
        return [enc.encode_single_token(marker)]
    return encode_text(enc, marker)


def encode_chat(enc, template, turns):
    """
    Turns of (prompt, response) -> tokens, and whether each is a target, two lists of equal length. A turn is the
    end-of-text token, the user's marker, the prompt, the assistant's marker and the response (None if still to come).
    Targets are the responses and the end-of-text after each. It is the first token of the next turn; the one after the
    last turn is not part of the result.
    """
    user, assistant = encode_marker(enc, template["user"]), encode_marker(enc, template["assistant"])
    tokens, targets = [], []
    for i, (prompt, response) in enumerate(turns):
        asked = [enc.eot_token, *user, *encode_text(enc, prompt), *assistant]
        answer = [] if response is None else encode_text(enc, response)
        tokens += asked + answer
        targets += [i > 0] + [False] * (len(asked) - 1) + [True] * len(answer)
    return tokens, targets


def prompt_tokens(enc, template, turns):
    """The prompt as tokens: the whole chat if there is a template, else only the last prompt, as plain text."""
    if template:
        return encode_chat(enc, template, [(prompt.strip(), response) for prompt, response in turns])[0]
    return [enc.eot_token, *encode_text(enc, turns[-1][0])]


# -- training a tokenizer

def count_words(texts):
    """How often each piece of GPT-2's split occurs.  -> {bytes: count}"""
    import regex  # comes with tiktoken; re lacks \p{L}
    split = regex.compile(GPT2_SPLIT)
    words = Counter(itertools.chain.from_iterable(map(split.findall, texts)))
    return {word.encode("utf-8", "replace"): n for word, n in words.items()}


def train_bpe(texts, vocab_size, special_tokens=(EOT,)):
    """
    Byte-level BPE: merges the most frequent pair of neighbouring tokens, again and again. Of equally frequent pairs it
    takes the one whose two byte strings compare greater. Special tokens get the ids after the merges.

    >>> train_bpe(["low low low lower"], 260, ["<|endoftext|>"])
    [(b'o', b'w'), (b'l', b'ow'), (b' ', b'low')]
    """
    words = count_words(texts)
    # A word is a string with one character per token, chr(id), so that str.replace merges a pair.
    spelled, counts = [word.decode("latin-1") for word in words], list(words.values())
    tokens = {chr(b): bytes([b]) for b in range(256)}
    characters = {token: character for character, token in tokens.items()}
    # heapq takes the smallest entry, but of equally frequent pairs we want the greatest: so compare 255 - byte. A
    # prefix must then come after the longer string: so each string ends in a character greater than any byte.
    mirrored = {chr(b): chr(255 - b) + "\u0100" for b in range(256)}
    pairs, where = Counter(), defaultdict(set)  # how often a pair occurs; the words it occurs in, or once did
    for w, word in enumerate(spelled):
        for pair in itertools.pairwise(word):
            pairs[pair] += counts[w]
            where[pair].add(w)

    def entry(pair):
        return -pairs[pair], mirrored[pair[0]], mirrored[pair[1]], pair

    heap = [entry(pair) for pair in pairs]
    heapq.heapify(heap)
    merges = []
    while heap and len(tokens) + len(special_tokens) < vocab_size:
        count, _, _, pair = heapq.heappop(heap)
        if -count != pairs[pair]:  # out of date: the pair has become rarer since
            if pairs[pair] > 0:
                heapq.heappush(heap, entry(pair))
            continue
        left, right = pair
        merges.append((tokens[left], tokens[right]))
        joined = tokens[left] + tokens[right]
        new = characters.setdefault(joined, chr(len(tokens)))
        tokens[new] = joined
        mirrored[new] = mirrored[left][:-1] + mirrored[right]
        created = set()
        for w in where.pop(pair):
            word, n = spelled[w], counts[w]
            merged = spelled[w] = word.replace(left + right, new)
            if merged == word:
                continue
            for p in itertools.pairwise(word):
                pairs[p] -= n
            for p in itertools.pairwise(merged):
                pairs[p] += n
                if new in p:
                    where[p].add(w)
                    created.add(p)
        for p in created:
            heapq.heappush(heap, entry(p))
    return merges


# -- shards and manifests

def write_shard(path, tokens):
    tokens = np.asarray(tokens)
    if tokens.size and not 0 <= tokens.min() <= tokens.max() < 2**16:
        raise UserError(f"{path}: token {tokens.max()} does not fit uint16; a vocabulary has at most 65,536 tokens")
    header = np.zeros(256, dtype="<i4")
    header[:3] = MAGIC, VERSION, len(tokens)
    write_atomically(path, lambda f: f.writelines([header, tokens.astype("<u2", copy=False)]))


def read_shard(path):
    """The tokens of a .bin or .npy shard, memory-mapped.  -> (n,) uint16"""
    with reading(path, "a token shard"):
        if path.endswith(".npy"):
            tokens = np.load(path, mmap_mode="r")
            if tokens.dtype != np.uint16 or tokens.ndim != 1:
                raise UserError(f"{path} holds {tokens.ndim}-dimensional {tokens.dtype}; a shard is one row of uint16")
            return tokens
        size = os.path.getsize(path)
        header = np.fromfile(path, dtype="<i4", count=256)
        if len(header) < 256 or header[0] != MAGIC:
            raise UserError(f"{path} is not a token shard: it does not begin with the magic number {MAGIC}")
        if header[1] != VERSION:
            raise UserError(f"{path} is a shard of version {header[1]}; this program reads version {VERSION}")
        n, present = int(header[2]), (size - HEADER_BYTES) // 2
        if size != HEADER_BYTES + 2 * n:
            raise UserError(f"{path} is damaged: its header says {n:,} tokens, its length {present:,}")
        return np.memmap(path, dtype="<u2", mode="r", offset=HEADER_BYTES) if n else np.empty(0, dtype="<u2")


def read_json(path):
    with reading(path, "JSON"), open(path, "rb") as f:
        return json.loads(f.read())


def read_manifest(folder):
    """The manifest of a prepared folder, or None if it is unfinished or somebody else's."""
    path = os.path.join(folder, MANIFEST)
    if not os.path.exists(path):
        return None
    with reading(path, "a manifest of dataset.py"):
        manifest = read_json(path)
        if manifest.get("version") != MANIFEST_VERSION:
            raise UserError(f"{path} was not written by this version of dataset.py; prepare the data again")
        check_types(manifest, dict(settings={}, tokenizer_fingerprint="", vocab_size=0, eot=0))
        check_spec(manifest["tokenizer"])
        check_entries(manifest["shards"])
        return manifest


def check_entries(shards):
    """Raises an error unless these are the entries of a manifest; none may name a file outside the folder."""
    check_types(shards, [dict(file="", split="", tokens=0, bytes=0, documents=0, crc32=0)])
    for shard in shards:
        if shard["split"] not in SPLITS or not re.fullmatch(shard["split"] + r"_\d{6,}\.bin", shard["file"]):
            raise ValueError("not the name of a shard")


class ShardWriter:
    """Collects tokens by split, and writes a shard as soon as there are enough for one."""

    def __init__(self, folder, shard_tokens, enc, shards, pending):
        self.folder, self.shard_tokens = folder, shard_tokens
        self.lengths, self.eot = token_lengths(enc), enc.eot_token
        self.shards = shards  # the manifest's entry for each
        self.pending = {split: [pending.get(split, np.empty(0, dtype=np.uint16))] for split in SPLITS}

    def add(self, split, tokens):
        self.pending[split].append(tokens.astype(np.uint16))
        if sum(map(len, self.pending[split])) >= self.shard_tokens:
            waiting = np.concatenate(self.pending[split])
            while len(waiting) >= self.shard_tokens:
                self.write(split, waiting[:self.shard_tokens])
                waiting = waiting[self.shard_tokens:]
            self.pending[split] = [waiting]

    def write(self, split, tokens):
        number = sum(shard["split"] == split for shard in self.shards)
        name = f"{split}_{number:06d}.bin"
        write_shard(os.path.join(self.folder, name), tokens)
        n_bytes = sum(int(self.lengths[tokens[i:i + (1 << 20)]].sum()) for i in range(0, len(tokens), 1 << 20))
        self.shards.append(dict(
            file=name, split=split, tokens=len(tokens), bytes=n_bytes,
            documents=int(np.count_nonzero(tokens == self.eot)), crc32=zlib.crc32(tokens)))

    def finish(self):
        """Writes what is left: the last shard of a split is shorter."""
        for split in SPLITS:
            rest = np.concatenate(self.pending[split])
            if len(rest):
                self.write(split, rest)


# -- sources. source.read(state) yields (pieces, next state); read(next state) continues after these pieces. A piece is
#    (text, whether it begins a document): a document, or a part of a long one.

class Source(NamedTuple):
    name: str  # of the folder below data/
    label: str  # what the manifest calls it
    read: Callable
    tokens: float = 0  # roughly what it holds, 0 if unknown
    fingerprint: str = ""  # of local files, to notice a changed text
    n_pieces: int = 0  # of a text that is one document, so that its end can be held out; else 0
    is_text: bool = False  # text files, which --doc_sep divides; tables have a --column


class Worker(NamedTuple):
    """One of several machines that prepare a source together"""
    number: int  # from 0
    count: int

    @property
    def folder(self):
        return f"worker_{self.number:03d}_of_{self.count:03d}"

    def settings(self, settings):
        """A worker writes all documents to train. They are divided when the parts are combined."""
        return {**settings, "splits": "100/0", "worker": f"{self.number}/{self.count}"}


def parse_worker(text):
    """For argparse: 3/16 -> Worker(3, 16)"""
    match = re.fullmatch(r"(\d{1,3})/(\d{1,3})", text)
    if not match or not int(match[1]) < int(match[2]):
        raise argparse.ArgumentTypeError(f"{text} must be one of 0/16, 1/16, ..., 15/16, for 16 workers")
    return Worker(int(match[1]), int(match[2]))


def open_sources(names, column="text", doc_sep=EOT, worker=None):
    """fineweb -> [Source]; toygpt, or a.txt,b.jsonl -> several. A worker gets its part of one"""
    if names in SOURCES or os.path.exists(names):
        names = SOURCES.get(names, {}).get("parts", [names])
    else:
        names = names.split(",")
    if len(names) > 1:
        for name in names:
            if SOURCES.get(name, {}).keys() & {"parts", "max_bytes"}:
                raise UserError(f"source {name} has settings of its own and cannot be combined with others")
        if worker:
            raise UserError(f"--worker divides one source, not {len(names)}; prepare {', '.join(names)} one by one")
    return [open_source(name, column, doc_sep, worker) for name in names]


def open_source(name, column, doc_sep, worker):
    row = SOURCES.get(name, {})
    if name.startswith("hf:") or "hub" in row:
        return open_hub_source(name, column, worker)
    if "url" in row:
        paths = [download(row["url"], os.path.join("data", f"{name}.txt"))]
    elif os.path.isdir(name):
        raise UserError(f"{name} is a folder; name its files, such as '{os.path.join(name, '*.txt')}'")
    elif os.path.exists(name):
        paths = [name]
    elif glob.has_magic(name):
        paths = [path for path in sorted(glob.glob(name, recursive=True)) if os.path.isfile(path)]
    else:
        raise UserError(f"there is no source {name!r}" + suggest(name, SOURCES))
    if not paths:
        raise UserError(f"no file matches {name}")
    return open_files(name, paths, column, doc_sep, worker)


def open_hub_source(name, column, worker):
    """A row of SOURCES, or hf:owner/name[:config]"""
    row = SOURCES.get(name)
    if row is None:
        match = re.fullmatch(r"hf:([\w.-]+(?:/[\w.-]+)?)(?::(.*))?", name)
        if not match:
            raise UserError(f"source {name}: a Hugging Face dataset is written hf:owner/name or hf:owner/name:config")
        row = dict(hub=match[1], config=match[2] or None)
    folder = name if name in SOURCES else re.sub(r"\W+", "-", row["hub"].split("/")[-1].lower())
    options = dict(path=row["hub"], name=row.get("config"), revision=row.get("revision"))
    read = functools.partial(read_dataset, name, column, options, worker)
    return Source(folder, name, read, row.get("tokens", 0))


def open_files(name, paths, column, doc_sep, worker):
    size = sum(map(os.path.getsize, paths))
    if size == 0:
        raise UserError(f"{name} is empty")
    kinds = {os.path.splitext(path)[1].lower() for path in paths}
    n_pieces = 0
    if ".json" in kinds:
        raise UserError(f"{name}: .json files are not read; write one JSON object per line, in a file named .jsonl")
    if len(kinds) > 1 and kinds & {".jsonl", ".parquet"}:
        raise UserError(f"{name} matches files of several kinds; name one kind")
    if kinds == {".parquet"}:
        read = functools.partial(read_dataset, name, column, dict(path="parquet", data_files=paths), worker)
    elif kinds == {".jsonl"}:
        if worker:
            check_divisible(name, len(paths), worker)
            paths = np.array_split(paths, worker.count)[worker.number].tolist()
        read = functools.partial(read_text, paths, functools.partial(read_rows, column))
    elif worker:
        raise UserError(f"--worker divides .jsonl, .parquet and Hugging Face data, not {name}")
    else:
        read, n_pieces = open_text(paths, size, doc_sep)
    folder = re.sub(r"[^\w.-]+", "", os.path.splitext(os.path.basename(name))[0])
    # about 4 bytes per token
    is_text = not kinds & {".jsonl", ".parquet"}
    return Source(folder, os.path.basename(name), read, size / 4, fingerprint(paths), n_pieces, is_text)


def check_divisible(name, n, worker):
    if n < worker.count:
        raise UserError(f"{name} has too few files or row groups, {n}, for {worker.count} workers")


def open_text(paths, size, doc_sep):
    """
    -> a function that reads the text, and the number of pieces if it is one document, found by reading it once. Long
    documents are read in pieces, so that a text of few documents can be divided into train and val too: one document in
    pieces of 0.3%, several in pieces of at most 5%.
    """
    def pieces_of(share):
        return functools.partial(read_pieces, doc_sep, min(1 << 20, max(64, int(size * share))))

    read_file, n_documents, n_pieces = pieces_of(0.003), 0, 0
    for _, begins in itertools.chain.from_iterable(map(read_file, paths)):
        n_documents += begins
        n_pieces += 1
        if n_documents == 2:
            return functools.partial(read_text, paths, pieces_of(0.05)), 0
    return functools.partial(read_text, paths, read_file), n_pieces


def download(url, path):
    if not os.path.exists(path):
        import requests
        try:
            response = requests.get(url, timeout=30)
            response.raise_for_status()
        except requests.RequestException as e:
            raise UserError(f"cannot download {url} ({type(e).__name__}); check the network, or put a copy at {path}")
        try:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            write_atomically(path, lambda f: f.write(response.content))
        except OSError as e:
            raise UserError(f"cannot write {path}: {e.strerror or e}") from None
    return path


@functools.cache
def file_digest(path, size, changed):  # the last two tell versions apart
    with reading(path, "a file"), open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").digest()


def fingerprint(paths):
    digest = hashlib.sha256()
    for path in paths:
        status = os.stat(path)
        digest.update(file_digest(path, status.st_size, status.st_mtime_ns))
    return digest.hexdigest()[:16]


def read_text(paths, read_file, n_done):
    """Yields (pieces, how many so far) from files, skipping the first n_done pieces."""
    pieces = itertools.chain.from_iterable(read_file(path) for path in paths)
    n_done = n_done or 0
    batch, size = [], 0
    for n, piece in enumerate(itertools.islice(pieces, n_done, None), n_done + 1):
        batch.append(piece)
        size += len(piece[0])
        if size >= BATCH_CHARS:
            yield batch, n
            batch, size = [], 0
    if batch:
        yield batch, n


def read_rows(column, path):
    """Yields (text, True) from a .jsonl file, one document a line."""
    for number, line in read_lines(path):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            raise UserError(f"{path}, line {number}: not JSON") from None
        if not isinstance(row, dict):
            raise UserError(f"{path}, line {number}: not a JSON object")
        if column not in row:
            raise UserError(f"{path}, line {number}: no column {column!r}; choose one with dataset.py --column: "
                            f"{', '.join(row)}")
        if not isinstance(row[column], (str, type(None))):
            raise UserError(f"{path}, line {number}: {column!r} is {type(row[column]).__name__}, not text")
        if row[column]:
            yield row[column], True


def read_pieces(doc_sep, piece_chars, path):
    """
    Yields (text, whether it begins a document) from a text file. Documents are separated by lines equal to doc_sep, or
    by blank lines if that is empty; those over piece_chars come in pieces.
    """
    line = rf"[ \t]*{re.escape(doc_sep)}[ \t]*(?=\n|\Z)" if doc_sep else r"(?:[ \t]*\n)+"
    separator = re.compile(r"\n" + line)
    text = "\n"  # what is not yielded yet; a newline before it, since a file or a block may begin with a separator
    begins = True
    with reading(path, "UTF-8 text"), open(path, encoding="utf-8-sig") as f:
        while True:
            block = f.read(1 << 20) + f.readline(1 << 20)  # whole lines, unless one is very long
            *documents, text = separator.split(text + block) if block else (text, "")
            documents = [cut_document(document.rstrip("\n"), piece_chars) for document in documents]
            # The last document may continue in the next block; if it is long already, yield the pieces it has so far.
            *unfinished, text = cut_document(text or "\n", piece_chars)
            for i, pieces in enumerate([*documents, unfinished]):
                begins = begins or i > 0  # the first may continue a document of the previous block
                for piece in pieces:
                    if begins:
                        piece = piece.lstrip("\n") if piece.strip() else ""
                    if piece:
                        yield piece, begins
                        begins = False
            if not block:
                return


def cut_document(text, piece_chars):
    """-> pieces of a text, cut before a space or newline, where GPT-2's split cuts as well"""
    pieces = []
    while len(text) > piece_chars:
        found = re.match(r".*\S(?=[ \n])", text[:piece_chars], re.DOTALL)
        n = found.end() if found else piece_chars
        pieces.append(text[:n])
        text = text[n:]
    return [*pieces, text]


def read_dataset(name, column, options, worker, state):
    """Rows of a Hugging Face dataset, from the hub or from local files, as a stream"""
    hint = ", or use a local file: --source=FILE.txt, .jsonl or .parquet"
    failures, reached = 0, False
    if "data_files" not in options:
        config = f", config {options['name']}," if options["name"] else ""
        print(f"reading {options['path']}{config} from the Hugging Face hub", file=sys.stderr, flush=True)
    while True:
        try:
            for texts, state in read_stream(name, column, options, worker, state):
                failures, reached = 0, True
                if pieces := [(text, True) for text in texts if text]:
                    yield pieces, state
            return
        except Exception as e:
            failures += 1
            wait_or_raise(e, name, failures, hint, reached)


def read_stream(name, column, options, worker, state):
    """Yields (the texts of some rows, the state after them)."""
    datasets = import_datasets()
    datasets.config.STREAMING_READ_MAX_RETRIES = 5
    report_retries()
    if "data_files" in options:
        import pyarrow.parquet  # comes with datasets, which cannot read files without rows
        files = [path for path in options["data_files"] if pyarrow.parquet.read_metadata(path).num_rows]
        if not files:
            return
        options = {**options, "data_files": files}
    try:
        stream = datasets.load_dataset(split="train", streaming=True, **options)
    except datasets.exceptions.DatasetNotFoundError:
        raise UserError(f"{name} is not on the Hugging Face hub, or needs a login (hf auth login)") from None
    if worker:
        stream = stream.reshard()  # by the row groups of .parquet files
        check_divisible(name, stream.num_shards, worker)
        stream = stream.shard(worker.count, worker.number)  # contiguous
    if state:
        stream.load_state_dict(state)
    for rows in stream.iter(batch_size=256):
        if column not in rows:
            raise UserError(f"{name} has no column {column!r}; choose one with dataset.py --column: "
                            f"{', '.join(rows)}")
        for value in rows[column]:
            if not isinstance(value, (str, type(None))):
                raise UserError(f"column {column!r} of {name} holds {type(value).__name__}, not text")
        yield rows[column], stream.state_dict()


def import_datasets():
    try:
        import datasets
    except ImportError:
        raise UserError("reading .parquet files or the Hugging Face hub needs: pip install datasets") from None
    datasets.disable_progress_bars()
    return datasets


def report_retries():
    """Silences the logs of the hub's libraries, except for messages about retries."""
    handler = logging.StreamHandler()
    handler.addFilter(lambda record: "retry" in record.getMessage().lower())
    for library in ("datasets", "huggingface_hub"):
        logger = logging.getLogger(library)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(logging.WARNING)


def ask_hub(name, request, hint):
    """-> request(), a call of a library that talks to the Hugging Face hub"""
    report_retries()
    for failures in itertools.count(1):
        try:
            return request()
        except Exception as e:
            wait_or_raise(e, name, failures, hint)


def wait_or_raise(error, name, failures, hint, reached=False):
    """Called when a request to the hub fails: waits if a retry may help, else raises a UserError that says why."""
    if isinstance(error, UserError):
        raise error
    problem = ": ".join([type(error).__name__, *str(error).splitlines()[:1]]).rstrip(".")
    kind = outage(error)
    if not kind:
        raise UserError(f"cannot read {name}: {problem}") from None
    never_connected = kind == "no connection" and not reached
    if failures == TRIES or never_connected:
        raise UserError(f"cannot read {name} from the Hugging Face hub ({problem}); check the network and run the "
                        f"command again{hint}") from None
    seconds = min(MAX_BACKOFF, 2**failures)
    print(f"{name}: {problem}; trying again in {seconds} s", file=sys.stderr, flush=True)
    time.sleep(seconds)


def outage(error):
    """
    -> "no connection", "no answer", or "" if the same request would fail again. The hub's libraries wrap the errors of
    others, so the causes are followed.
    """
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status:
        return "no answer" if status in RETRY_STATUS else ""
    cause = error.__cause__ or error.__context__
    if cause and (kind := outage(cause)):
        return kind
    if re.search("Connect(ion)?Error|Offline", type(error).__name__):
        return "no connection"
    is_of_http = re.match("httpx|httpcore|requests|urllib3|aiohttp", type(error).__module__)
    return "no answer" if is_of_http or isinstance(error, (ConnectionError, TimeoutError)) else ""


def read_parts(paths, eot, n_done):
    """Yields (documents, tokens so far) from shards of tokens, skipping the first n_done tokens."""
    n_done, start, rest = n_done or 0, 0, np.empty(0, dtype=np.uint16)
    for path in paths:
        tokens = read_shard(path)
        for i in range(max(0, n_done - start), len(tokens), BATCH_CHARS):
            rest = np.concatenate((rest, tokens[i:i + BATCH_CHARS]))
            *documents, rest = np.split(rest, np.flatnonzero(rest == eot)[1:])  # the last may continue
            n_done += sum(map(len, documents))
            yield [(document, True) for document in documents], n_done
        start += len(tokens)
    if len(rest):
        yield [(rest, True)], n_done + len(rest)


# -- from sources to shards

def split_shares(splits):
    """98/1/1 -> (98, 1, 1), the percentages of train, val and test"""
    shares = [int(n) for n in splits.split("/")] if re.fullmatch(r"\d+(/\d+){1,2}", splits) else []
    if sum(shares) != 100 or not shares[0]:
        raise UserError(f"--splits={splits} must be percentages of train, val and optionally test that add up to 100, "
                        "such as 90/10 or 98/1/1")
    return (*shares, 0)[:3]


def default_splits(tokens, shard_tokens=SHARD_TOKENS):
    return "99/1" if tokens > 20 * shard_tokens else "90/10"


def split_of(i, shares, n_pieces=0):
    """
    The split of document i of a source, or of piece i if long documents are read in pieces. Swapping the last two
    digits of i spreads each share evenly: 10% are documents 0, 10, 20, ..., not the first ten of every hundred. A
    single document in n_pieces is divided by position instead: its last tenth is 10%.

    >>> [i for i in range(200) if split_of(i, (98, 1, 1)) == "test"]
    [10, 110]
    """
    n = i % 10 * 10 + i // 10 % 10
    if n_pieces:
        n = 100 * (n_pieces - 1 - i) // n_pieces
    _, val, test = shares
    if n < val:
        return "val"
    return "test" if n < val + test else "train"


def read_batches(sources, position, shares, max_bytes):
    """
    Yields ({split: pieces}, position after them) from all sources in turn. A position is (source, its state, its pieces
    so far, bytes so far), and says all that is needed to continue from there.
    """
    first_source, state, count, n_bytes = position
    for index in range(first_source, len(sources)):
        # If the text may be cut, its pieces are not known. Text files take their size; other sizes are guesses.
        size = 4 * sum(source.tokens for source in sources[:index + 1])
        is_exact = all(source.n_pieces for source in sources[:index])
        n_pieces = sources[index].n_pieces if not max_bytes or is_exact and size <= max_bytes else 0
        for pieces, state in sources[index].read(state):
            by_split = defaultdict(list)
            for text, begins in pieces:
                if max_bytes and n_bytes >= max_bytes:
                    break
                split = split_of(count, shares, n_pieces)
                # If the previous piece of a long document went to another split, this piece begins a document.
                by_split[split].append((text, begins or split != split_of(count - 1, shares, n_pieces)))
                count += 1
                if max_bytes:
                    n_bytes += len(text.encode("utf-8", "replace"))
            yield by_split, (index, state, count, n_bytes)
            if max_bytes and n_bytes >= max_bytes:
                return
        state, count = None, 0


def encode_pieces(enc, pieces):
    """
    One call of tiktoken for many documents, joined by the end-of-text string. If that fails, or a document contains
    the string itself, every piece is encoded separately.  -> (n,) uint32
    """
    if not isinstance(pieces[0][0], str):  # tokens from read_parts
        return np.concatenate([tokens for tokens, _ in pieces])
    joined = "".join(EOT + text if begins else text for text, begins in pieces)
    if joined.count(EOT) == sum(begins for _, begins in pieces):
        try:
            return enc.encode_to_numpy(joined, allowed_special={EOT}, disallowed_special=())
        except BaseException as e:
            if not isinstance(e, ValueError) and type(e).__name__ != "PanicException":
                raise
    tokens = []
    for text, begins in pieces:
        if begins:
            tokens.append(enc.eot_token)
        tokens += encode_text(enc, text)
    return np.array(tokens, dtype=np.uint32)


def encode_batches(batches, enc):
    """
    Encodes batches on all cores, and yields ({split: tokens}, position) in order. tiktoken releases Python's lock while
    it encodes, so threads suffice and nothing is copied between processes. Each thread has an encoder of its own:
    threads that share one run about 20% slower.
    """
    local = threading.local()

    def start_thread():
        local.enc = tiktoken.Encoding(
            enc.name, pat_str=enc._pat_str, mergeable_ranks=enc._mergeable_ranks, special_tokens=enc._special_tokens)

    def encode(by_split):
        return {split: encode_pieces(local.enc, pieces) for split, pieces in by_split.items()}

    threads = os.cpu_count() or 1
    with ThreadPoolExecutor(threads, initializer=start_thread) as pool:
        waiting = deque()  # bounded, so that memory does not grow with the text
        for by_split, position in batches:
            waiting.append((pool.submit(encode, by_split), position))
            if len(waiting) > 8 * threads:  # enough to keep them busy while a shard is written
                future, position = waiting.popleft()
                yield future.result(), position
        yield from ((future.result(), position) for future, position in waiting)


def check_kinds(source, sources, column, doc_sep):
    if column != "text" and all(s.is_text for s in sources):
        raise UserError(f"--column is for tables; {source} is text")
    if doc_sep != EOT and not any(s.is_text for s in sources):
        raise UserError(f"--doc_sep is for text files; {source} is not one")


def prepare(source="fineweb-edu", tokenizer=None, out=None, column="text", doc_sep=EOT, max_bytes=None, splits=None,
            shard_tokens=SHARD_TOKENS, worker=None):
    """
    Tokenizes a source into a folder of shards, and returns the folder. Continues what an earlier call began. The
    tokenizer is a spec, or what --tokenizer takes. A worker prepares its part, in a folder inside; a call without one
    puts the parts together.
    """
    row = SOURCES.get(source, {})
    spec = tokenizer or row.get("tokenizer", "gpt2")
    spec = parse_tokenizer(spec) if isinstance(spec, str) else spec
    max_bytes = max_bytes or row.get("max_bytes")
    sources = open_sources(source, column, doc_sep, worker)
    tokens = sum(s.tokens for s in sources)
    if max_bytes:
        tokens = min(tokens or math.inf, max_bytes / 4)  # about 4 bytes per token
    splits = splits or row.get("splits") or default_splits(tokens, shard_tokens)
    split_shares(splits)  # an error now rather than later
    if shard_tokens >= 2**31:
        raise UserError(f"--shard_tokens={shard_tokens} is too large: a shard's header counts tokens as int32")
    check_kinds(source, sources, column, doc_sep)
    # doc_sep is recorded for text files only, so that a new default does not invalidate other prepared data.
    has_text = any(s.fingerprint and not s.label.lower().endswith((".jsonl", ".parquet")) for s in sources)
    settings = dict(
        source=",".join(s.label for s in sources), source_fingerprint=",".join(s.fingerprint for s in sources),
        tokenizer=spec["name"], column=column, doc_sep=doc_sep if has_text else None, max_bytes=max_bytes,
        splits=splits, shard_tokens=shard_tokens)
    if is_trained(spec):
        settings["tokenizer_fingerprint"] = tokenizer_fingerprint(get_tokenizer(spec))
    else:
        settings["special"] = list(row.get("special", [EOT]))
    name = source if row else "-".join(s.name for s in sources)
    if not out and not name:
        raise UserError(f"choose a folder for {source}, with --out")
    out = out or os.path.join("data", name)
    if worker:
        if max_bytes:
            raise UserError("a worker cannot know where max_bytes is reached; prepare this source without --worker")
        if not is_trained(spec):
            raise UserError(f"--worker needs a tokenizer that exists: train {spec['name']} once, with --max_bytes="
                            f"{BPE_BYTES} and another --out, and name that folder as --tokenizer everywhere")
        out, settings, tokens = os.path.join(out, worker.folder), worker.settings(settings), tokens / worker.count
    is_new = not os.path.exists(out)
    try:
        os.makedirs(out, exist_ok=True)
        with lock_folder(out), remove_if_empty(out, is_new):
            if manifest := read_manifest(out):
                check_same_settings(out, manifest["settings"], settings)
                check_shards(out, manifest["shards"])
                with contextlib.suppress(FileNotFoundError):
                    os.remove(os.path.join(out, PROGRESS))  # left by a kill after the manifest was written
                print(f"{out} is complete: {count_line(manifest['shards'])}", flush=True)
            else:
                if parts := open_parts(out, source, column, doc_sep, spec, settings):
                    sources = [sources[0]._replace(read=parts)]
                shards = write_shards(out, sources, spec, settings, tokens, from_workers=bool(parts))
                print(f"{out}: {count_line(shards)}", flush=True)
    except OSError as e:
        raise UserError(f"cannot write {out}: {e.strerror or e}") from None
    return out


@contextlib.contextmanager
def remove_if_empty(folder, is_new):
    """Removes a folder that was made for a source of which nothing could be read."""
    try:
        yield
    except UserError:
        with contextlib.suppress(OSError):
            if is_new and os.listdir(folder) == [".lock"]:
                os.remove(os.path.join(folder, ".lock"))
                os.rmdir(folder)
        raise


def open_parts(out, source, column, doc_sep, spec, settings):
    """-> a function that reads, as a source does, what all workers have prepared; None if there were no workers"""
    folders = glob.glob("worker_[0-9][0-9][0-9]_of_[0-9][0-9][0-9]", root_dir=out)
    if not folders:
        return None
    count, paths = int(min(folders)[-3:]), []
    for worker in (Worker(number, count) for number in range(count)):
        folder = os.path.join(out, worker.folder)
        manifest = read_manifest(folder)
        if manifest is None:
            raise UserError(f"{folder} is missing or unfinished: run --worker={worker.number}/{count}; to do without "
                            "workers, remove their folders")
        [part] = open_sources(source, column, doc_sep, worker)
        expected = {**worker.settings(settings), "source_fingerprint": part.fingerprint}
        check_same_settings(folder, manifest["settings"], expected)
        check_shards(folder, manifest["shards"])
        paths += [os.path.join(folder, shard["file"]) for shard in manifest["shards"]]
    print(f"{out}: combining the parts of {count} workers; their folders can be deleted afterwards", flush=True)
    return functools.partial(read_parts, paths, get_tokenizer(spec).eot_token)


def check_same_settings(out, old, new):
    for key in new:
        if old.get(key) != new[key]:
            how = f"with {key}={old.get(key)}, not {new[key]}"
            if key == "tokenizer_fingerprint":
                how = "with a tokenizer of its own"
            if key == "source_fingerprint":
                how = f"from another version of {new['source']}"
            raise UserError(f"{out} was made {how}; remove it, or choose another folder")


def lock_folder(folder):
    """-> an acquired lock, for a `with` statement. Other processes wait for it; a killed one loses it."""
    import filelock  # comes with torch
    lock = filelock.FileLock(os.path.join(folder, ".lock"))
    try:
        return lock.acquire(timeout=0)
    except filelock.Timeout:
        print(f"{folder}: waiting for another process that is preparing it", flush=True)
        return lock.acquire()


def check_shards(folder, shards):
    """Compares finished shards with the checksums in their manifest: the disk may have changed since."""
    with progress_bar(sum(shard["tokens"] for shard in shards), "tokens checked") as bar:
        for shard in shards:
            path = os.path.join(folder, shard["file"])
            if zlib.crc32(read_shard(path)) != shard["crc32"]:
                raise UserError(f"{path} has changed since it was written; remove {folder} and prepare it again")
            bar.update(shard["tokens"])


def verify(folder):
    manifest = read_manifest(folder)
    if manifest is None:
        raise UserError(f"{folder} has no {MANIFEST}, so there is nothing to compare it with")
    check_shards(folder, manifest["shards"])
    print(f"{folder} is intact: {count_line(manifest['shards'])}")


def write_shards(out, sources, spec, settings, expected_tokens, from_workers):
    """Writes the shards and then the manifest, from the beginning or from where progress.npz says.  -> the shards"""
    # A position in a source means nothing in the workers' shards, and the other way round.
    progress_settings = {**settings, "from_workers": from_workers or None}
    state, pending = load_progress(out, progress_settings)
    is_new = state is None
    if not is_new:
        check_shards(out, state["shards"])
    else:
        spec = spec if is_trained(spec) else train_tokenizer(sources, spec["name"], settings)
        state = dict(settings=progress_settings, tokenizer=spec, position=(0, None, 0, 0), shards=[])
    enc = get_tokenizer(state["tokenizer"])
    writer = ShardWriter(out, settings["shard_tokens"], enc, state["shards"], pending)
    batches = read_batches(sources, state["position"], split_shares(settings["splits"]), settings["max_bytes"])
    written = sum(shard["tokens"] for shard in writer.shards) + sum(map(len, pending.values()))
    # Read one batch before writing anything: an unreadable source leaves no files, and the rate excludes connecting.
    first_batch = list(itertools.islice(batches, 1))
    if is_new and first_batch:
        save_progress(out, state, {})
    batches = itertools.chain(first_batch, batches)
    with contextlib.closing(encode_batches(batches, enc)) as encoded, \
            progress_bar(expected_tokens or None, "tokens", written) as bar:
        for tokens_by_split, position in encoded:
            n_shards = len(writer.shards)
            for split, tokens in tokens_by_split.items():
                writer.add(split, tokens)
            if len(writer.shards) > n_shards:
                state.update(position=position, shards=writer.shards)
                save_progress(out, state, {split: np.concatenate(writer.pending[split]) for split in SPLITS})
            bar.update(sum(map(len, tokens_by_split.values())))
    gc.collect()  # a parquet reader abandoned half-way can abort Python's exit (huggingface/datasets 7467)
    writer.finish()
    if "worker" not in settings and not any(shard["split"] == "train" for shard in writer.shards):
        problem = "too little text to divide into train and val" if writer.shards else "no text"
        raise UserError(f"{settings['source']} holds {problem}")
    writer.shards.sort(key=lambda shard: SPLITS.index(shard["split"]))
    write_json(os.path.join(out, MANIFEST), dict(
        version=MANIFEST_VERSION, source=settings["source"], settings=settings, tokenizer=state["tokenizer"],
        tokenizer_fingerprint=tokenizer_fingerprint(enc), vocab_size=enc.n_vocab, eot=enc.eot_token,
        shards=writer.shards))
    with contextlib.suppress(FileNotFoundError):  # not written for a source without text
        os.remove(os.path.join(out, PROGRESS))
    return writer.shards


def save_progress(folder, state, pending):
    """Which shards are complete, the tokens beyond them, and where to continue: one file, so that these always agree"""
    arrays = dict(pending, state=np.frombuffer(json.dumps(state).encode(), dtype=np.uint8))
    write_atomically(os.path.join(folder, PROGRESS), lambda f: np.savez(f, **arrays))


def load_progress(folder, settings):
    """-> the state and the pending tokens of an unfinished folder; (None, {}) for a new one"""
    path = os.path.join(folder, PROGRESS)
    if not os.path.exists(path):
        if foreign_files := [name for name in os.listdir(folder) if name.endswith((".bin", ".npy"))]:
            raise UserError(f"{folder} already holds {foreign_files[0]}, which this command did not write; "
                            "choose another --out")
        return None, {}
    with reading(path, "a progress file", f"; remove {folder} and prepare it again"):
        with zipfile.ZipFile(path) as archive:
            if any(record.compress_type for record in archive.infolist()):
                raise ValueError("compressed")
        with np.load(path) as arrays:
            pending = {split: arrays[split] for split in SPLITS if split in arrays}
            state = json.loads(arrays["state"].tobytes())
        check_spec(state["tokenizer"])
        check_entries(state["shards"])
        source, in_source, count, n_bytes = state["position"]
        numbers = [source, count, n_bytes]
        if not isinstance(in_source, (dict, type(None))):  # else a state of datasets, or the beginning
            numbers.append(in_source)
        check_types(numbers, [0])
        if not all(0 <= n < 2**53 for n in numbers):
            raise ValueError("out of range")
        if any(tokens.dtype != np.uint16 or tokens.ndim != 1 for tokens in pending.values()):
            raise TypeError("not tokens")
        n_vocab = get_tokenizer(state["tokenizer"]).n_vocab
        if any(tokens.max(initial=0) >= n_vocab for tokens in pending.values()):
            raise ValueError("not tokens of this tokenizer")
        if not state["shards"] and state["settings"] != settings:  # nothing is lost by starting again
            return None, {}
        check_same_settings(folder, state["settings"], settings)
        return state, pending


def train_tokenizer(sources, name, settings):
    """-> the spec of a BPE trained on the beginning of every source"""
    size, special = bpe_size(name), settings["special"]
    n_merges = size - 256 - len(special)
    if n_merges < 0:
        raise UserError(f"tokenizer {name} has no room for 256 bytes and {len(special)} special tokens")
    print(f"training tokenizer {name}", flush=True)
    n_bytes = min(BPE_BYTES, settings["max_bytes"] or BPE_BYTES) / len(sources)
    starts = (read_batches([source], (0, None, 0, 0), (100, 0, 0), n_bytes) for source in sources)
    texts = (text for start in starts for by_split, _ in start for text, _ in by_split["train"])
    merges = train_bpe(texts, size, special)
    if len(merges) < n_merges:
        print(f"the text has only {len(merges)} pairs to merge: the tokenizer is smaller than {name}", flush=True)
    return dict(name=name, merges=[[a.decode("latin-1"), b.decode("latin-1")] for a, b in merges], special=special)


def count_line(shards):
    """-> 328,883 train tokens, 36,767 val tokens, 2,697 documents"""
    counts = {split: sum(shard["tokens"] for shard in shards if shard["split"] == split) for split in SPLITS}
    tokens = [f"{n:,} {split} tokens" for split, n in counts.items() if n]
    return ", ".join([*tokens, f"{sum(shard['documents'] for shard in shards):,} documents"])


# -- pairs: prompts and responses for fine-tuning, one JSON object a line. data_loader.py reads them directly.

def parse_pair(line):
    """
    A line of a file of pairs -> its format and its turns. A ValueError says what is wrong with it.

    >>> parse_pair(b'{"instruction": "Add.", "input": "1 and 2", "output": "3"}')
    ('instruction, input, output', [('Add.\\n\\n1 and 2', '3')])
    """
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise ValueError("not UTF-8") from None
    except (ValueError, RecursionError):
        raise ValueError("not JSON") from None
    if not isinstance(row, dict):
        raise ValueError("not a JSON object")
    if "messages" in row:
        return "messages", parse_messages(row["messages"])
    if "instruction" in row:
        return "instruction, input, output", [(parse_prompt(row), get_text(row, "output"))]
    return "prompt, response", [(parse_prompt(row), get_text(row, "response"))]


def split_system(messages):
    """-> the text of the system message, "" if there is none, and the other messages"""
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise ValueError("messages is not a list of messages")
    if messages and messages[0].get("role") == "system":
        return get_text(messages[0], "content", required=False), messages[1:]
    return "", messages


def parse_messages(messages, answers_required=True):
    """A system message goes before the first prompt; a last question without an answer is dropped."""
    system, messages = split_system(messages)
    n = len(messages)
    if n < 2 or [m.get("role") for m in messages] != (["user", "assistant"] * n)[:n]:
        raise ValueError("messages do not alternate between user and assistant")
    texts = [get_text(m, "content", answers_required or m["role"] == "user") for m in messages[:n // 2 * 2]]
    texts[0] = f"{system}\n\n{texts[0]}".strip()
    return list(zip(texts[::2], texts[1::2]))


def parse_prompt(row):
    if "instruction" not in row:
        return get_text(row, "prompt")
    return f"{get_text(row, 'instruction')}\n\n{get_text(row, 'input', required=False)}".strip()


def get_text(row, key, required=True):
    """The text under a key, stripped"""
    if row.get(key) is None and not required:
        return ""
    if key not in row:
        raise ValueError(f"no {key}")
    if not isinstance(row[key], str):
        raise ValueError(f"{key} is not text")
    if required and not row[key].strip():
        raise ValueError(f"empty {key}")
    return row[key].strip()


def holds_pairs(path):
    """Whether a file is .jsonl, and its first readable line has a key that only pairs have"""
    if not path.lower().endswith(".jsonl") or not os.path.isfile(path):
        return False
    for _, line in itertools.islice(read_lines(path), 100):
        with contextlib.suppress(ValueError, RecursionError):
            row = json.loads(line)
            if not isinstance(row, dict) or row.keys() >= {"prompt", "text"} and "response" not in row:
                return False  # a table of texts may say how each was asked for
            return not row.keys().isdisjoint(("messages", "instruction", "prompt"))
    return False


def read_pairs(path, strict=False):
    """
    Yields the turns of every pair of a .jsonl file, then prints what was found. Malformed lines are skipped and
    reported by number; if strict, the first one is an error.
    """
    formats, skipped = Counter(), defaultdict(list)
    for number, line in read_lines(path):
        try:
            name, turns = parse_pair(line)
        except ValueError as e:
            if strict:
                raise UserError(f"{path}, line {number}: {e}; without --strict such lines are skipped") from None
            skipped[str(e)].append(number)
            continue
        formats[name] += 1
        yield turns
    for why, numbers in skipped.items():
        lines = ", ".join(map(str, numbers[:20])) + (f" and {len(numbers) - 20:,} more" if len(numbers) > 20 else "")
        print(f"{path}: skipped {len(numbers):,} line{'s' if len(numbers) > 1 else ''}, {why}: {lines}", flush=True)
    if not formats:
        raise UserError(f"{path} holds no pairs" + (f"; its first line: {next(iter(skipped))}" if skipped else ""))
    print(f"{path}: " + ", ".join(f"{n:,} pairs ({name})" for name, n in formats.items()), flush=True)


def pair_split(i):
    return split_of(i, (90, 10, 0))


def check_pairs(source, tokenizer="gpt2", strict=False):
    """Prints what training would make of a file of pairs."""
    enc = get_tokenizer(tokenizer)
    template = chat_template(enc)
    lengths, n_targets = [], 0
    for turns in read_pairs(source, strict):
        tokens, targets = encode_chat(enc, template, turns)
        lengths.append(len(tokens))
        n_targets += sum(targets) + 1  # and the end-of-text after the last response
    held_out = sum(pair_split(i) == "val" for i in range(len(lengths)))
    print(f"{len(lengths) - held_out:,} pairs to train on, {held_out:,} held out for validation")
    print(f"{sum(lengths):,} {enc.name} tokens, of which {n_targets:,} are targets; per pair {int(np.median(lengths))} "
          f"at the median and {max(lengths):,} at most: pairs longer than the model's context are cut")


# -- pairs from a server with OpenAI's chat completions API

KEY_VARIABLE = "OPENAI_API_KEY"  # of the environment; the key goes into requests and nowhere else
TIMEOUT = 300  # seconds for a response
MAX_ANSWER = 1 << 24  # bytes of an answer; the rest is not read
MAX_FAILURES = 10  # prompts in a row that the server fails to answer, before giving up


def synthesize(prompts=None, endpoint=None, model=None, request="{}", concurrency=8, out="data/synth.jsonl"):
    """Asks a server to respond to every prompt that has no response yet, and appends each to a file of pairs."""
    for name, value in (("prompts", prompts), ("endpoint", endpoint), ("model", model)):
        if not value:
            raise UserError(f"--source=synth needs --{name}")
    if not out.lower().endswith(".jsonl"):
        raise UserError(f"--out={out} must be a file of pairs, .jsonl")
    url = completions_url(endpoint)
    try:
        extra = json.loads(request)
        split_system(extra.get("messages", []))
        body = {**extra, "model": model, "messages": extra.get("messages", [])}
    except (ValueError, AttributeError, TypeError, RecursionError):
        raise UserError(f"--request={request} must be a JSON object, such as {{\"temperature\": 0.7}}") from None
    wanted = read_prompts(prompts)
    with open_responses(out, model) as (file, answered):
        todo = deque(prompt for prompt in wanted if prompt not in answered)
        print(f"{out}: {len(wanted) - len(todo):,} of {len(wanted):,} prompts have a response", flush=True)
        missing, failures_in_a_row, n_cut = len(todo), 0, 0
        with progress_bar(len(wanted), "prompts", len(wanted) - len(todo)) as bar:
            for prompt, response, detail, server_failed in ask_all(url, body, todo, concurrency):
                if response is None:
                    problem = detail
                    print(f"no response to {prompt[:60]!r}: {problem}", flush=True)
                    failures_in_a_row += server_failed
                    if failures_in_a_row == MAX_FAILURES:
                        todo.clear()  # answers under way are still saved
                    continue
                row = dict(prompt=prompt, response=response, model=model, endpoint=url, finish_reason=detail,
                           time=int(time.time()), request=extra)
                file.write((json.dumps(row, ensure_ascii=False) + "\n").encode("utf-8", "replace"))
                file.flush()
                os.fsync(file.fileno())
                missing -= 1
                n_cut += detail == "length"
                failures_in_a_row = 0
                bar.update()
    if n_cut:
        print(f"responses cut off by the server's limit: {n_cut:,}; raise it with --request='{{\"max_tokens\": N}}'")
    if missing:
        raise UserError(f"{missing:,} of {len(wanted):,} prompts have no response, the last one because of "
                        f"{problem}; the same command asks for them again")
    print(f"{out}: {len(wanted):,} pairs; to train on them: "
          f"python train.py --recipe=sft --init_from=MODEL --data={out}")


def completions_url(endpoint):
    """http://localhost:8000/v1 -> http://localhost:8000/v1/chat/completions"""
    if not re.fullmatch(r"https?://[\w.-]+(:\d+)?(/[\w./-]*)?", endpoint):
        raise UserError(f"--endpoint must look like http://localhost:8000/v1; a key goes into {KEY_VARIABLE}")
    return endpoint.rstrip("/").removesuffix("/chat/completions") + "/chat/completions"


def ask_all(url, body, prompts, concurrency):
    """
    Takes prompts from a deque, and yields what `ask` returns for each, as it arrives; `concurrency` requests are under
    way at a time.
    """
    session = open_session(concurrency)
    running, error = set(), None
    with ThreadPoolExecutor(concurrency) as pool:
        while True:
            while prompts and len(running) < concurrency:
                running.add(pool.submit(ask, session, url, body, prompts.popleft()))
            if not running:
                break
            try:
                done, running = wait(running, return_when=FIRST_COMPLETED)
            except KeyboardInterrupt:
                print("\ndataset.py: interrupted; the same command continues", file=sys.stderr, flush=True)
                os._exit(130)  # without waiting for the requests under way, which can take minutes
            for future in done:
                try:
                    yield future.result()
                except UserError as e:  # no prompt will be answered, except for those under way
                    error = e
                    prompts.clear()
    if error:
        raise error


def open_session(concurrency):
    """A session that retries with back-off, waits as long as a Retry-After header says, and follows no redirect."""
    import requests
    import urllib3
    key = os.environ.get(KEY_VARIABLE, "").strip()
    if not re.fullmatch("[!-~]*", key):
        raise UserError(f"{KEY_VARIABLE} holds a character that no key has")
    retry = urllib3.Retry(
        TRIES - 1, allowed_methods=None, status_forcelist=RETRY_STATUS, backoff_factor=1, backoff_max=MAX_BACKOFF,
        raise_on_status=False)
    session = requests.Session()
    for scheme in ("http://", "https://"):
        session.mount(scheme, requests.adapters.HTTPAdapter(pool_maxsize=concurrency, max_retries=retry))
    session.auth = lambda request: request  # otherwise requests would replace our key with one from ~/.netrc
    if key:
        session.headers["Authorization"] = f"Bearer {key}"
    return session


def ask(session, url, body, prompt):
    """-> (prompt, response, finish reason, False), or (prompt, None, what went wrong, whether the server failed)"""
    from requests.exceptions import InvalidHeader, InvalidURL, RequestException
    from urllib3.exceptions import DecodeError, HTTPError, LocationValueError, ProtocolError
    body = {**body, "messages": [*body["messages"], {"role": "user", "content": prompt}]}
    for attempt in range(TRIES):  # for malformed answers; urllib3 retries connection errors and bad statuses
        if attempt > 0:
            time.sleep(min(MAX_BACKOFF, 2**attempt) * random.uniform(0.5, 1))
        try:
            answer = session.post(url, json=body, timeout=(30, TIMEOUT), allow_redirects=False, stream=True)
            content = answer.raw.read(MAX_ANSWER, decode_content=True)
            key = session.headers.get("Authorization", "").removeprefix("Bearer ")
            if len(key) >= 16:  # a server may repeat it; a shorter one is a dummy, and may be a word
                content = content.replace(key.encode(), b"***")
            status = answer.status_code
            if status in (401, 403):  # no prompt will ever be answered
                has_key = "Authorization" in session.headers
                what = f"rejects the key in {KEY_VARIABLE}" if has_key else f"needs a key; set {KEY_VARIABLE}"
                raise UserError(f"{url} {what}")
            if status == 404 or 300 <= status < 400:
                raise UserError(f"{url} has no model {body['model']}, or is not the server's address "
                                f"(HTTP status {status})")
            if status >= 400:
                reason = re.search(rb'"message": *"([^"]{1,200})', content)
                text = f" ({reason[1].decode(errors='replace')})" if reason else ""
                return prompt, None, f"HTTP status {status}{text}", status in RETRY_STATUS
            choice = json.loads(content)["choices"][0]
            if response := choice["message"]["content"].strip():
                return prompt, response, choice.get("finish_reason"), False
            problem = "an empty response"
        except InvalidHeader:
            return prompt, None, "a Retry-After header without seconds or a date", True
        except (InvalidURL, LocationValueError):
            raise UserError(f"--endpoint: {url} is not an address") from None
        except (ProtocolError, DecodeError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
            problem = "an answer that is not a chat completion"
        except (RequestException, HTTPError) as e:
            return prompt, None, type(e).__name__, True
    return prompt, None, problem, True


def read_prompts(path):
    """A prompt a line, or the prompts of a .jsonl file, each once"""
    prompts = []
    for number, line in read_lines(path):
        try:
            text = line.decode("utf-8-sig").strip()
            if path.lower().endswith(".jsonl"):
                text = parse_prompt(json.loads(text))
        except (ValueError, TypeError, AttributeError, RecursionError) as e:
            raise UserError(f"{path}, line {number}: not a prompt ({str(e)[:60]})") from None
        if text:
            # half a surrogate pair can be neither sent nor stored
            prompts.append(text.encode("utf-8", "replace").decode())
    if not prompts:
        raise UserError(f"{path} holds no prompts")
    return list(dict.fromkeys(prompts))


@contextlib.contextmanager
def open_responses(path, model):
    """-> the file, open for appending by this process alone, and the prompts it answers"""
    import filelock
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        with filelock.FileLock(path + ".lock", timeout=0), open(path, "ab+") as file:
            yield file, read_responses(file, path, model)
    except filelock.Timeout:
        raise UserError(f"{path} is being written by another process") from None
    except OSError as e:
        raise UserError(f"cannot write {path}: {e.strerror or e}; the same command continues from there") from None


def read_responses(file, path, model):
    """The prompts that are answered. A last line cut off by a kill is removed."""
    file.seek(0)
    answered, end = set(), 0
    for number, line in enumerate(file, 1):
        try:
            row = json.loads(line)
            _, author = row["response"], row["model"]
            answered.add(row["prompt"])
        except (ValueError, KeyError, TypeError, RecursionError) as e:
            start = b'{"prompt": '  # a line that we began but did not finish; any other is somebody else's
            if isinstance(e, ValueError) and not line.endswith(b"\n") and line[:len(start)] == start[:len(line)]:
                file.truncate(end)
                return answered
            raise UserError(f"{path}, line {number}, was not written by --source=synth; choose another --out") from None
        if author != model:
            raise UserError(f"{path} has responses from {author}; choose another --out for {model}")
        end += len(line)
        if not line.endswith(b"\n"):
            file.write(b"\n")
    return answered


# -- the command line

def parse_options():
    p = Parser(prog="dataset.py", description=__doc__, argument_default=argparse.SUPPRESS)
    p.add_argument("--source", help=f"{', '.join(SOURCES)}, hf:owner/name[:config], .txt, .jsonl or .parquet files, "
                   "'dir/*.txt'; several, separated by commas, are read one after the other; or synth")
    p.add_argument("--out", help="folder for the shards (default: data/NAME); with synth, the file of pairs (default: "
                   "data/synth.jsonl)")
    text = p.add_argument_group("text to shards")
    text.add_argument("--tokenizer", help="gpt2, byte, bpe:N (trained on the source), or the folder of prepared data "
                      "whose tokenizer to reuse (default: gpt2)")
    text.add_argument("--column", help="the column of tables that holds the text (default: text)")
    text.add_argument("--doc_sep", help="the line that separates documents of a text file; '' is a blank line "
                      f"(default: {EOT})")
    text.add_argument("--max_bytes", type=positive, help="stop after the document, or the piece of a long one, that "
                      "reaches this much text")
    text.add_argument("--splits", help="percentages of the documents for train, val and test, such as 98/1/1 (default: "
                      "90/10, or 99/1 for sources known to be large)")
    text.add_argument("--worker", type=parse_worker, metavar="I/N", help="prepare part I, from 0, of N, each on a "
                      "machine of its own; with all worker_* folders in --out, the same command without --worker puts "
                      "them together")
    text.add_argument("--shard_tokens", type=positive, help=f"tokens per shard (default: {SHARD_TOKENS:,})")
    p.add_argument("--verify", dest="folder", help="compare a prepared folder with its checksums, and stop")
    pairs = p.add_argument_group("a .jsonl file of prompts and responses")
    pairs.add_argument("--strict", action="store_true", help="make the first malformed line an error")
    synth = p.add_argument_group("--source=synth")
    synth.add_argument("--prompts", metavar="FILE", help="one prompt a line, or .jsonl with prompt or instruction")
    synth.add_argument("--endpoint", metavar="URL",
                       help=f"a chat completions server, such as http://localhost:8000/v1; its key in {KEY_VARIABLE}")
    synth.add_argument("--model", metavar="NAME", help="as the server calls it")
    synth.add_argument("--request", metavar="JSON", help='added to each request: {"temperature": 0.7}')
    synth.add_argument("--concurrency", type=positive, help="requests at a time (default: 8)")
    return vars(p.parse_args())


def main():
    options = parse_options()
    source = options.get("source", "")
    if "folder" in options:
        job, kind = verify, "--verify"
    elif source == "synth":
        job, kind = synthesize, "--source=synth"
        options.pop("source")
    elif holds_pairs(source) and "column" not in options:
        job, kind = check_pairs, f"--source={source}, which holds pairs that train.py reads as they are"
    else:
        job, kind = prepare, f"--source={source or 'fineweb-edu'}, which holds text"
    for name in options:
        if name not in inspect.signature(job).parameters:
            raise UserError(f"--{name} does not apply to {kind}")
    job(**options)


if __name__ == "__main__":
    start_script()
    main()
