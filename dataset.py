"""
Text in, token shards out.

    python dataset.py                                          # FineWeb-Edu sample-10BT -> data/fineweb-edu/
    python dataset.py --source=book.txt --tokenizer=bpe:4096   # your own text, your own tokenizer -> data/book/
    python dataset.py --source=a.jsonl,b.txt --weights=3,1     # a mix of documents, three tokens of a to one of b
    python dataset.py --source=pairs.jsonl                     # prompts and responses to fine-tune on, with a loss mask
    python dataset.py --source=synth --prompts=prompts.txt --endpoint=http://localhost:8000/v1 --model=NAME   # asks a server for responses

A shard is a file in the format of llm.c: 256 little-endian int32 (magic, version, token count, zeros), then the
tokens as uint16. Every document begins with the end-of-text token; text is encoded with special tokens off.
Killed at any instant and started again, the command goes on, to the same bytes.
"""
import argparse
import contextlib
import ctypes
import difflib
import email.utils
import gc
import glob
import hashlib
import heapq
import http.client
import inspect
import itertools
import json
import logging
import math
import os
import random
import re
import shutil
import struct
import sys
import threading
import time
import urllib.parse
import urllib.request
import zlib
from collections import Counter, defaultdict, deque
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Callable

import numpy as np
import tiktoken

EOT = "<|endoftext|>"
GPT2_SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
MAGIC, VERSION, HEADER_BYTES = 20240520, 1, 1024
MANIFEST, PROGRESS, TOKENIZER = "meta.json", "progress.json", "tokenizer.json"
MANIFEST_VERSION = 1
TOKEN, LEARNED, BEGINS = 0xFFFF, 1, 2  # a token of a pair carries flags above its 16 bits; the flags are what a .mask file holds

# Named sources: a Hugging Face dataset (`hub`, `config`, `revision`), a text file (`url`), or a `mix` of others by their
# weights in tokens. `tokens` is about what it holds, for the time left. The rest are defaults for prepare's options.
SOURCES = {
    "fineweb-edu": dict(hub="HuggingFaceFW/fineweb-edu", config="sample-10BT", tokens=10e9),
    "fineweb": dict(hub="HuggingFaceFW/fineweb", config="sample-10BT", tokens=10e9),
    "custom-gpt": dict(hub="HuggingFaceFW/fineweb", config="sample-10BT", tokens=550e6, max_bytes=2_500_000_000, splits="99/1",
                       tokenizer="bpe:50000", special=(EOT, "<|pad|>", "<|user|>", "<|assistant|>")),
    "tinystories": dict(hub="roneneldan/TinyStories", tokens=470e6, splits="90/10"),
    "wikisource": dict(hub="wikimedia/wikisource", config="20231201.en", tokens=500e6),
    # This one is a script, which datasets 4 and later do not run: the tables the hub made of it are read.
    "redpajama-sample": dict(hub="togethercomputer/RedPajama-Data-1T-Sample", revision="refs/convert/parquet", tokens=1e9),
    "toygpt": dict(mix={"wikisource": 1, "redpajama-sample": 2}, tokens=1.53e9, splits="98/1/1"),
    "shakespeare": dict(url="https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
                        doc_sep=EOT),  # one document: its blank lines divide speeches
}


class UserError(Exception):
    """A mistake its user can mend: a script prints it as one line, without a traceback."""


# -- tokenizers. What travels is a spec, a plain dict that JSON and checkpoints can hold: {"name": "gpt2"},
#    {"name": "byte"}, or {"name": "bpe:4096", "merges": [["t", "h"], ...], "special": ["<|endoftext|>"]}, its bytes as latin-1.

def get_tokenizer(spec="gpt2"):
    """A name, a path to tokenizer.json (or its folder), or a spec -> tiktoken.Encoding"""
    spec = tokenizer_spec(spec)
    if spec["name"] == "gpt2":
        try:
            return tiktoken.get_encoding("gpt2")
        except OSError as e:
            raise UserError(f"cannot fetch the gpt2 vocabulary ({type(e).__name__}); check the network, set TIKTOKEN_CACHE_DIR "
                            "to a folder that has it, or use --tokenizer=byte or bpe:N") from None
    merges = [(a.encode("latin-1"), b.encode("latin-1")) for a, b in spec.get("merges", ())]
    ranks = {}
    for token in [bytes([b]) for b in range(256)] + [a + b for a, b in merges]:
        ranks.setdefault(token, len(ranks))
    special = {s: len(ranks) + i for i, s in enumerate(spec.get("special", [EOT]))}
    return tiktoken.Encoding(spec["name"], pat_str=GPT2_SPLIT, mergeable_ranks=ranks, special_tokens=special)


def tokenizer_spec(name):
    if isinstance(name, dict):
        return name
    if name in ("gpt2", "byte"):
        return {"name": name}
    if bpe_size(name):
        raise UserError(f"tokenizer {name} is trained on a text: python dataset.py --source=FILE.txt --tokenizer={name}")
    path = os.path.join(name, TOKENIZER) if os.path.isdir(name) else name
    if not os.path.isfile(path):
        raise UserError(f"there is no tokenizer {name!r}; use gpt2, byte, bpe:N (bpe:4096, say) or the path of a {TOKENIZER}")
    try:
        with open(path, encoding="utf-8") as f:
            spec = json.load(f)
        if spec["name"] not in ("gpt2", "byte"):
            [a + b for a, b in spec["merges"]], spec["special"].index(EOT)
        return spec
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path} is not a tokenizer that dataset.py wrote") from None


def bpe_size(name):
    """"bpe:4096" -> 4096, None for other names and for specs. The size counts bytes, merges and special tokens."""
    m = isinstance(name, str) and re.fullmatch(r"bpe:(\d[\d_]*)", name)
    if not m:
        return None
    n = int(m[1].replace("_", ""))
    if not 257 < n <= 65536:
        raise UserError(f"tokenizer {name}: N must be from 258 to 65536, since tokens are stored as uint16")
    return n


def tokenizer_fingerprint(enc):
    """Of every token's bytes and id."""
    h = hashlib.sha256()
    for token, i in sorted({**enc._mergeable_ranks, **{s.encode(): i for s, i in enc._special_tokens.items()}}.items(), key=lambda kv: kv[1]):
        h.update(struct.pack("<II", i, len(token)) + token)
    return h.hexdigest()[:16]


def token_bytes(enc):
    """How many bytes of text each token stands for; special tokens stand for none.  -> (n_vocab,) int64"""
    lengths = np.zeros(enc.n_vocab, dtype=np.int64)
    special = {enc.encode_single_token(s) for s in enc.special_tokens_set}
    for i in range(enc.n_vocab):
        try:
            lengths[i] = 0 if i in special else len(enc.decode_single_token_bytes(i))
        except KeyError:  # a gap in the numbering
            pass
    return lengths


def chat_template(enc):
    """What stands before a user's and an assistant's words: special tokens where the tokenizer has them, else plain text."""
    special = {"user": "<|user|>", "assistant": "<|assistant|>"}
    return special if set(special.values()) <= enc.special_tokens_set else {"user": "User:\n", "assistant": "\n\nAssistant:\n"}


def encode_chat(enc, template, turns):
    """
    Turns of (prompt, response) -> (n,) uint32, tokens and their flags. A turn is the end-of-text token, the user's marker, the
    prompt, the assistant's marker and the response; a response of None is yet to be given. Learned are the responses, and the
    end-of-text after each: the last one's is that of the pair that follows, or padding. Special tokens in a text stay text.
    """
    marker = {role: [enc.encode_single_token(m)] if m in enc.special_tokens_set else enc.encode_ordinary(m) for role, m in template.items()}
    tokens, flags = [], []
    for prompt, response in turns:
        asked = [enc.eot_token, *marker["user"], *enc.encode_ordinary(prompt), *marker["assistant"]]
        answer = enc.encode_ordinary(response) if response is not None else []
        flags += [LEARNED if tokens else BEGINS] + [0] * (len(asked) - 1) + [LEARNED] * len(answer)
        tokens += asked + answer
    return np.array(tokens, dtype=np.uint32) | np.array(flags, dtype=np.uint32) << 16


def prompt_tokens(enc, template, turns):
    """The tokens after which a model is to go on: of a chat, or without a template of a bare text, the last turn's prompt."""
    if template:
        turns = [(prompt.strip(), response) for prompt, response in turns]  # as the pairs were
        return (encode_chat(enc, template, turns) & TOKEN).tolist()
    return [enc.eot_token, *enc.encode_ordinary(turns[-1][0])]


def hugging_face_tokenizer(enc):
    """The same tokenizer as the tokenizer.json of Hugging Face's `tokenizers`."""
    # GPT-2's letters for the 256 bytes: those that print stand for themselves, the others follow from U+0100 on.
    prints = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in prints]
    letter = {**{b: chr(b) for b in prints}, **{b: chr(256 + i) for i, b in enumerate(others)}}
    spell = lambda token: "".join(letter[b] for b in token)
    ranks, merges = enc._mergeable_ranks, []
    for token, _ in sorted(ranks.items(), key=lambda kv: kv[1]):
        # tiktoken joins any two neighbours that make a token, so that every way to make it is listed
        halves = [(token[:i], token[i:]) for i in range(1, len(token)) if token[:i] in ranks and token[i:] in ranks]
        merges += [[spell(a), spell(b)] for a, b in sorted(halves, key=lambda h: (ranks[h[0]], ranks[h[1]]))]
    special = [dict(id=i, content=s, single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
               for s, i in sorted(enc._special_tokens.items(), key=lambda kv: kv[1])]
    byte_level = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=True)  # its expression is GPT2_SPLIT
    return dict(version="1.0", truncation=None, padding=None, added_tokens=special, normalizer=None, pre_tokenizer=byte_level,
                post_processor=None, decoder=byte_level, model=dict(
                    type="BPE", dropout=None, unk_token=None, continuing_subword_prefix="", end_of_word_suffix="", fuse_unk=False,
                    byte_fallback=False, vocab={**{spell(t): i for t, i in ranks.items()}, **enc._special_tokens}, merges=merges))


def count_words(texts):
    """The distinct pieces of the GPT-2 split, as bytes, and how often each occurs."""
    import regex  # comes with tiktoken; re has no \p{L}
    split, words = regex.compile(GPT2_SPLIT), Counter()
    for text in texts:
        words.update(split.findall(text))
    return {w.encode("utf-8", "replace"): n for w, n in words.items()}


def train_bpe(texts, vocab_size, special_tokens=(EOT,)):
    """
    Byte-level BPE: merges the most frequent pair of neighbours, again and again. A tie goes to the pair whose two byte
    strings compare greater. Special tokens take their ids after the merges, so they only use up room here.

    >>> train_bpe(["low low low lower"], 260, ["<|endoftext|>"])
    [(b'o', b'w'), (b'l', b'ow'), (b' ', b'low')]
    """
    words = count_words([texts] if isinstance(texts, str) else texts)
    symbols, counts = [list(w) for w in words], list(words.values())  # each word as the ids it is made of now
    token = [bytes([b]) for b in range(256)]
    ids = {t: i for i, t in enumerate(token)}
    # Orders tokens backwards for the min-heap: each byte mirrored, and an end mark above all of them.
    mirror = [chr(255 - b) + "\u0100" for b in range(256)]
    pairs, where = Counter(), defaultdict(set)  # how often a pair occurs, and in which words (or did once)
    for w, s in enumerate(symbols):
        for pair in zip(s, s[1:]):
            pairs[pair] += counts[w]
            where[pair].add(w)
    entry = lambda pair: (-pairs[pair], mirror[pair[0]], mirror[pair[1]], pair)
    heap = [entry(p) for p in pairs]
    heapq.heapify(heap)

    merges = []
    while heap and len(token) + len(special_tokens) < vocab_size:
        n, _, _, (a, b) = heapq.heappop(heap)
        pair, n = (a, b), -n
        if n != pairs[pair]:  # the entry is old: the pair lost occurrences since
            if pairs[pair] > 0:
                heapq.heappush(heap, entry(pair))
            continue
        merges.append((token[a], token[b]))
        new = ids.setdefault(token[a] + token[b], len(token))
        if new == len(token):
            token.append(token[a] + token[b])
            mirror.append(mirror[a][:-1] + mirror[b])
        grown = set()
        for w in where.pop(pair):
            old, out, count, i = symbols[w], [], counts[w], 0
            while i < len(old):
                if old[i] == a and i + 1 < len(old) and old[i + 1] == b:
                    if out:  # the left neighbour loses (left, a) and gains (left, new)
                        pairs[out[-1], a] -= count
                        pairs[out[-1], new] += count
                        where[out[-1], new].add(w)
                        grown.add((out[-1], new))
                    if i + 2 < len(old):
                        pairs[b, old[i + 2]] -= count
                        pairs[new, old[i + 2]] += count
                        where[new, old[i + 2]].add(w)
                        grown.add((new, old[i + 2]))
                    out.append(new)
                    i += 2
                else:
                    out.append(old[i])
                    i += 1
            symbols[w] = out
        del pairs[pair]
        for p in grown:
            if pairs[p] > 0:
                heapq.heappush(heap, entry(p))
    return merges


# -- shards

def shard_header(n):
    header = np.zeros(256, dtype="<i4")
    header[:3] = MAGIC, VERSION, n
    return header.tobytes()


def write_shard(path, tokens):
    tokens = np.asarray(tokens)
    if tokens.size and not 0 <= tokens.min() <= tokens.max() < 2**16:
        raise UserError(f"{path}: token {tokens.max()} does not fit uint16; a vocabulary may have 65,536 tokens at most")
    write_atomically(path, shard_header(len(tokens)) + tokens.astype("<u2").tobytes())


def read_shard(path):
    """The tokens of a .bin or .npy shard, memory-mapped.  -> (n,) uint16"""
    try:
        size = os.path.getsize(path)
        if path.endswith(".npy"):
            tokens = np.load(path, mmap_mode="r")
            if tokens.dtype != np.uint16 or tokens.ndim != 1:
                raise UserError(f"{path} holds {tokens.ndim}-dimensional {tokens.dtype}; a shard is one row of uint16")
            return tokens
        header = np.fromfile(path, dtype="<i4", count=256)
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror or e}") from None
    except (ValueError, EOFError):
        raise UserError(f"{path} is not a .npy file, or is cut short") from None
    if len(header) < 256 or header[0] != MAGIC:
        raise UserError(f"{path} is not a token shard: it does not begin with the magic number {MAGIC}")
    if header[1] != VERSION:
        raise UserError(f"{path} is a shard of version {header[1]}; only version {VERSION} is known")
    n = int(header[2])
    if size != HEADER_BYTES + 2 * n:
        raise UserError(f"{path}: its header says {n:,} tokens, its length {(size - HEADER_BYTES) // 2:,}; it is damaged or still being written")
    if n == 0:
        return np.empty(0, dtype="<u2")
    return np.memmap(path, dtype="<u2", mode="r", offset=HEADER_BYTES)


def mask_path(path):
    return os.path.splitext(path)[0] + ".mask"


def read_mask(path):
    """The flags of a shard of pairs, a byte a token, memory-mapped.  -> (n,) uint8"""
    try:
        return np.memmap(mask_path(path), dtype=np.uint8, mode="r")
    except (OSError, ValueError) as e:
        raise UserError(f"cannot read {mask_path(path)}: {getattr(e, 'strerror', None) or e}") from None


def write_atomically(path, data):
    """A file of this name is complete, whatever happens meanwhile."""
    with open(path + ".tmp", "wb") as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())
    os.replace(path + ".tmp", path)


def write_json(path, obj):
    write_atomically(path, (json.dumps(obj, indent=1) + "\n").encode())


class ShardWriter:
    """
    Appends tokens to train_000000.bin, val_000000.bin, ... and, where they are masked, their flags to train_000000.mask, ...
    `shards` says what they hold so far, a dict each; it is the whole state: a writer made from a saved one cuts off what was
    written after it. `begin` is the token, with its flags, that a document begins with.
    """

    def __init__(self, folder, shard_tokens, lengths, begin, shards, masked=False):
        self.folder, self.shard_tokens, self.lengths, self.begin = folder, shard_tokens, lengths, begin
        self.shards, self.masked, self.files = shards, masked, {}  # split -> the files of its last shard
        known = {s["file"] for s in shards}
        for name in os.listdir(folder):
            if re.fullmatch(r"(train|val|test)_\d{6}\.(bin|mask)", name) and os.path.splitext(name)[0] + ".bin" not in known:
                os.remove(os.path.join(folder, name))
        for s in shards:
            sizes = dict(zip(self.paths(s), (HEADER_BYTES + 2 * s["tokens"], s["tokens"])))
            for path, size in sizes.items():
                if not os.path.isfile(path) or os.path.getsize(path) < size:
                    raise UserError(f"{path} is not as it was left; remove {folder} and start again")
                if s["tokens"] < shard_tokens:
                    os.truncate(path, size)
            if s["tokens"] < shard_tokens:
                self.files[s["split"]] = [open(path, "ab") for path in sizes]

    def paths(self, shard):
        path = os.path.join(self.folder, shard["file"])
        return [path, mask_path(path)][:1 + self.masked]

    def append(self, split, tokens):
        while len(tokens):
            own = [s for s in self.shards if s["split"] == split]
            if not own or own[-1]["tokens"] == self.shard_tokens:
                shard = dict(file=f"{split}_{len(own):06d}.bin", split=split, tokens=0, bytes=0, documents=0, crc32=0)
                self.shards.append(shard)
                self.files[split] = [open(path, "wb") for path in self.paths(shard)]
                self.files[split][0].write(shard_header(0))
            else:
                shard = own[-1]
            part = tokens[:self.shard_tokens - shard["tokens"]]
            tokens = tokens[len(part):]
            ids = part & TOKEN
            for f, key, raw in zip(self.files[split], ("crc32", "mask_crc32"), (ids.astype("<u2"), (part >> 16).astype(np.uint8))):
                f.write(raw.tobytes())
                shard[key] = zlib.crc32(raw.tobytes(), shard.get(key, 0))
            shard["tokens"] += len(part)
            shard["bytes"] += int(self.lengths[ids].sum())
            shard["documents"] += int(np.count_nonzero(part == self.begin))
            if shard["tokens"] == self.shard_tokens:
                self.close(shard)

    def close(self, shard):
        """Writes the token count into the header, which a file opened for appending cannot."""
        files = self.files.pop(shard["split"])
        self.sync(files)
        for f in files:
            f.close()
        with open(os.path.join(self.folder, shard["file"]), "r+b") as f:
            f.write(shard_header(shard["tokens"]))
            self.sync([f])

    def sync(self, files=None):
        """What was appended is on the disk, and may be spoken of in a progress file."""
        for f in files or itertools.chain(*self.files.values()):
            f.flush()
            os.fsync(f.fileno())

    def finish(self):
        for split in list(self.files):
            self.close([s for s in self.shards if s["split"] == split][-1])


# -- sources. Each is read as batches of pieces and the state from which the next batch can be read. A piece is
#    (text, whether it begins a document), or (turns, True) of a file of pairs.

@dataclass
class Source:
    name: str  # of the folder below data/
    label: str  # what the manifest calls it
    read: Callable  # state or None -> iterator of (pieces, next state)
    size: int | None = None  # bytes, for local files
    tokens: float | None = None  # about how many it holds, for the time left
    fingerprint: str | None = None  # of local files: another text is noticed
    weight: float = 1.0  # in a mix
    pairs: list | None = None  # the paths, if they hold prompts and responses


BATCH_BYTES = 1 << 20  # of text that a thread encodes at a time
PIECE_BYTES = 1 << 20  # of a document that is read at a time
SAVE_SECONDS = 2  # between progress files


def open_sources(spec, weights=None, column=None, doc_sep=None):
    """"wikisource" -> [Source]; "toygpt" or "a.txt,b.jsonl" -> several, to be mixed by their weights"""
    mix = SOURCES.get(spec, {}).get("mix", {})
    names = list(mix) or ([spec] if os.path.exists(spec) else spec.split(","))
    for name in names if len(names) > 1 else ():
        if SOURCES.get(name, {}).keys() & {"mix", "max_bytes"}:
            raise UserError(f"source {name} has settings of its own, and cannot be part of a mix")
    weights = weights or list(mix.values()) or [1.0] * len(names)
    if len(weights) != len(names) or not all(0 < w < math.inf for w in weights):
        raise UserError(f"--weights must be {len(names)} numbers above zero, one for each of {', '.join(names)}")
    sources = [open_source(name, column, doc_sep) for name in names]
    if len({bool(s.pairs) for s in sources}) > 1:
        raise UserError(f"{next(s.label for s in sources if s.pairs)} holds pairs; they cannot be mixed with texts")
    for source, weight in zip(sources, weights):
        source.weight = weight
    return sources


def open_source(spec, column=None, doc_sep=None):
    row, text = SOURCES.get(spec, {}), column or "text"
    if "hub" in row or spec.startswith("hf:"):
        if not row:
            hub, _, config = spec[3:].partition(":")
            if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", hub):
                raise UserError(f"source {spec}: a Hugging Face dataset is written hf:owner/name or hf:owner/name:config")
            row = dict(hub=hub, config=config or None)
        where = dict(path=row["hub"], name=row.get("config"), revision=row.get("revision"))
        name = spec if spec in SOURCES else re.sub(r"\W+", "-", row["hub"].split("/")[-1].lower())
        return Source(name, spec, lambda state: read_dataset(spec, text, state, **where), tokens=row.get("tokens"))
    if "url" in row:
        spec = fetch(row["url"], os.path.join("data", spec + ".txt"))

    paths = sorted(glob.glob(spec, recursive=True)) if glob.has_magic(spec) and not os.path.exists(spec) else [spec]
    paths = [p for p in paths if not os.path.isdir(p)] if len(paths) > 1 else paths
    if not paths:
        raise UserError(f"no file matches {spec}")
    if not os.path.exists(spec) and not glob.has_magic(spec):
        near = difflib.get_close_matches(spec, SOURCES, 1)
        raise UserError(f"there is no source {spec!r}" + (f"; did you mean {near[0]}?" if near else
                        f"; use {', '.join(SOURCES)}, hf:owner/name, or a .txt, .jsonl or .parquet file"))
    for p in paths:
        if os.path.isdir(p):
            raise UserError(f"{p} is a folder; name its files, '{os.path.join(p, '*.txt')}' say")
        if not os.access(p, os.R_OK):
            raise UserError(f"cannot read {p}: permission denied")
    size = sum(map(os.path.getsize, paths))
    if size == 0:
        raise UserError(f"{spec} is empty")
    stem = os.path.splitext(os.path.basename(spec))[0]
    name = re.sub(r"[^\w.-]+", "", stem) or os.path.basename(os.path.dirname(os.path.abspath(spec)))
    kinds = {os.path.splitext(p)[1].lower() for p in paths}
    if ".json" in kinds:
        raise UserError(f"{spec} is JSON in one piece; write one object a line, as .jsonl")
    pairs = paths if kinds == {".jsonl"} and not column and holds_pairs(paths[0]) else None
    if kinds & {".jsonl", ".parquet"}:
        if len(kinds) > 1:
            raise UserError(f"{spec} matches files of several kinds; name one kind")
        if doc_sep is not None:
            raise UserError(f"--doc_sep is for text files; in {spec} every row is a document")
        loader = "json" if kinds == {".jsonl"} else "parquet"
        read = lambda state: read_pairs(paths, state) if pairs else read_dataset(spec, text, state, path=loader, data_files=paths)
    else:
        # A text with few, long documents is cut into pieces, so that it too can be divided into train and val.
        piece = min(PIECE_BYTES, max(64, size // 20))
        read = lambda state: read_text(paths, doc_sep, piece, state)
    return Source(name, os.path.basename(spec), read, size=size, fingerprint=file_fingerprint(paths), pairs=pairs)


def fetch(url, path, sha256=None):
    """-> path, downloaded from url on first use, and checked; what an interrupted download left is not fetched again"""
    if os.path.exists(path):
        return path
    part = path + ".part"
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        have = os.path.getsize(part) if os.path.exists(part) else 0
        request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
        with urllib.request.urlopen(request, timeout=30) as response:
            have = have if response.status == 206 else 0  # a server may not know how to go on
            length = response.headers["Content-Length"]
            with open(part, "ab" if have else "wb") as f:
                shutil.copyfileobj(response, f)
        if length and os.path.getsize(part) != have + int(length):
            raise OSError("the connection was cut; run again to go on")
        with open(part, "rb") as f:
            digest = sha256 and hashlib.file_digest(f, "sha256").hexdigest()
        if digest != sha256:
            os.remove(part)
            raise OSError("what came is not the file that is known by that address")
        os.replace(part, path)
    except (OSError, http.client.HTTPException) as e:
        if getattr(e, "code", None) == 416:  # there is nothing after what is here: it is whole, or of an older file
            os.remove(part)
            return fetch(url, path, sha256)
        raise UserError(f"cannot download {url} ({getattr(e, 'reason', None) or e}); check the network, or put a copy at {path}") from None
    return path


def file_fingerprint(paths):
    """Of length, beginning and end: quick at any size, and an edit of a text rarely leaves all three."""
    h = hashlib.sha256()
    for p in paths:
        with open(p, "rb") as f:
            size = os.path.getsize(p)
            h.update(size.to_bytes(8, "little") + f.read(1 << 24))
            f.seek(max(0, size - (1 << 24)))
            h.update(f.read())
    return h.hexdigest()[:16]


def read_text(paths, doc_sep, piece_bytes, state):
    """
    Documents of text files, separated by blank lines or by doc_sep. A document longer than piece_bytes comes in pieces,
    cut before white space, where no token of the GPT-2 split ends up different.
    """
    sep = re.compile(re.escape(doc_sep.encode()) if doc_sep else rb"\n(?:[ \t]*\r?\n)+")
    file_index, offset, inside = state or (0, 0, False)
    look = piece_bytes + 4096  # what is searched for the end of a document: the same wherever reading began
    batch, batch_bytes = [], 0
    for file_index in range(file_index, len(paths)):
        path = paths[file_index]
        with open_source_file(path) as f:
            f.seek(offset)
            buffer, pos, more = b"", 0, True
            while True:
                if more and len(buffer) - pos < look:
                    chunk = f.read(4 * look)
                    more = bool(chunk)
                    buffer, pos = buffer[pos:] + chunk, 0
                    continue
                if pos == len(buffer):
                    break
                m = sep.search(buffer, pos, pos + look)
                if m and m.start() - pos <= piece_bytes:
                    end, after, ends = m.start(), m.end(), True
                elif len(buffer) - pos <= piece_bytes:
                    end, after, ends = len(buffer), len(buffer), True
                else:
                    end = after = cut_point(buffer, pos, pos + piece_bytes)
                    ends = False
                text = decode(buffer[pos:end], path, offset)
                text = text if inside else text.lstrip("\r\n")
                text = text.rstrip("\r\n") if ends else text
                if text:
                    batch.append((text, not inside))
                    batch_bytes += end - pos
                offset += after - pos
                pos, inside = after, not ends and (inside or bool(text))
                if batch_bytes >= BATCH_BYTES:
                    yield batch, (file_index, offset, inside)
                    batch, batch_bytes = [], 0
        offset, inside = 0, False
    if batch:
        yield batch, (len(paths), 0, False)


def open_source_file(path):
    try:
        return open(path, "rb")
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror}") from None


def cut_point(buffer, start, end):
    """A place in (start, end] where white space follows something else, near the end, else one between two characters."""
    for near in (max(start, end - 4096), start):
        if found := [m.end() - 1 for m in re.finditer(rb"\S[ \n]", buffer[near:end])]:
            return near + found[-1]
    at = end
    while buffer[at] & 0xC0 == 0x80 and at > start + 1:  # a continuation byte of UTF-8
        at -= 1
    return at


def decode(raw, path, offset):
    try:
        if b"\0" in raw:
            raise UnicodeDecodeError("utf-8", raw, raw.index(b"\0"), raw.index(b"\0") + 1, "zero byte")
        if b"\r" in raw:
            raw = raw.replace(b"\r\n", b"\n")
        return raw.decode("utf-8-sig" if offset == 0 else "utf-8")
    except UnicodeDecodeError as e:
        raise UserError(f"{path} is not UTF-8 text (byte {offset + e.start:,}: {e.reason}); "
                        "is it a binary file, or in another encoding?") from None


def parse_pair(line):
    """
    A line of a file of pairs -> its kind and its turns. A ValueError says what is wrong with it.

    >>> parse_pair(b'{"instruction": "Add.", "input": "1 and 2", "output": "3"}')
    ('instruction, input, output', [('Add.\n\n1 and 2', '3')])
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
        messages = row["messages"]
        if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
            raise ValueError("messages is not a list of messages")
        has_system = messages and messages[0].get("role") == "system"
        system = text_of(messages[0], "content", needed=False) if has_system else ""
        messages = messages[1:] if has_system else messages
        roles = [m.get("role") for m in messages]
        if len(roles) < 2 or roles != (["user", "assistant"] * len(roles))[:len(roles)]:
            raise ValueError("messages are not a user's and an assistant's in turn")
        texts = [text_of(m, "content") for m in messages[:len(roles) // 2 * 2]]  # a last question without an answer teaches nothing
        texts[0] = f"{system}\n\n{texts[0]}".strip()
        return "messages", list(zip(texts[::2], texts[1::2]))
    if "instruction" in row:
        return "instruction, input, output", [(prompt_of(row), text_of(row, "output"))]
    return "prompt, response", [(prompt_of(row), text_of(row, "response"))]


def prompt_of(row):
    return f"{text_of(row, 'instruction')}\n\n{text_of(row, 'input', needed=False)}".strip() if "instruction" in row else text_of(row, "prompt")


def text_of(row, key, needed=True):
    """The text under a key, without white space around it"""
    if row.get(key) is None and not needed:
        return ""
    if key not in row:
        raise ValueError(f"no {key}")
    if not isinstance(row[key], str):
        raise ValueError(f"{key} is not text")
    if needed and not row[key].strip():
        raise ValueError(f"empty {key}")
    return row[key].strip()


def holds_pairs(path):
    """Whether one of the first lines is a pair, or is meant to be one"""
    with open_source_file(path) as f:
        for line in itertools.islice(f, 100):
            try:
                return bool(parse_pair(line))
            except ValueError:
                with contextlib.suppress(ValueError, RecursionError):
                    row = json.loads(line)
                    if isinstance(row, dict) and "text" not in row and row.keys() & {"messages", "instruction", "prompt"}:
                        return True
    return False


def check_pairs(paths, strict=False):
    """Says what the files hold, and which lines are no pairs: they are left out, or the first of them is the end."""
    for path in paths:
        kinds, wrong = Counter(), defaultdict(list)
        with open_source_file(path) as f:
            for number, line in enumerate(f, 1):
                try:
                    if line.strip():
                        kinds[parse_pair(line)[0]] += 1
                except ValueError as e:
                    if strict:
                        raise UserError(f"{path}, line {number}: {e}; without --strict such lines are left out") from None
                    wrong[str(e)].append(number)
        for why, numbers in wrong.items():
            more = f" and {len(numbers) - 20:,} more" if len(numbers) > 20 else ""
            say(f"{path}: {why}: left out, {len(numbers):,} line{'s' * (len(numbers) > 1)}: {', '.join(map(str, numbers[:20]))}{more}")
        if not kinds:
            raise UserError(f"{path} holds no pair; its first line: {next(iter(wrong))}" if wrong else f"{path} is blank")
        say(f"{path}: " + ", ".join(f"{n:,} pairs ({kind})" for kind, n in kinds.items()))


def read_pairs(paths, state):
    """The conversations of .jsonl files; lines that are none are passed over."""
    file_index, offset = state or (0, 0)
    batch, batch_bytes = [], 0
    for file_index in range(file_index, len(paths)):
        with open_source_file(paths[file_index]) as f:
            f.seek(offset)
            for line in f:
                offset += len(line)
                with contextlib.suppress(ValueError):
                    batch.append((parse_pair(line)[1], True))
                    batch_bytes += len(line)
                if batch_bytes >= BATCH_BYTES:
                    yield batch, (file_index, offset)
                    batch, batch_bytes = [], 0
        offset = 0
    if batch:
        yield batch, (len(paths), 0)


def read_dataset(spec, column, state, path, **where):
    """Rows of a Hugging Face dataset, from the hub or from local files, as a stream."""
    import datasets
    datasets.disable_progress_bars()
    for library in ("datasets", "huggingface_hub"):
        logging.getLogger(library).setLevel(logging.CRITICAL)  # what goes wrong is said below
    try:
        ds = datasets.load_dataset(path, split="train", streaming=True, **where)
        if state:
            ds.load_state_dict(state)
        for rows in ds.iter(batch_size=256):
            if column not in rows:
                raise UserError(f"{spec} has no column {column!r}; its columns are {', '.join(rows)}: choose with --column")
            texts = rows[column]
            if wrong := [t for t in texts if not isinstance(t, (str, type(None)))]:
                raise UserError(f"column {column!r} of {spec} holds {type(wrong[0]).__name__}, not text")
            yield [(t, True) for t in texts if t], ds.state_dict()
    except datasets.exceptions.DatasetNotFoundError:
        raise UserError(f"{spec} is not on the Hugging Face hub, or needs a login (huggingface-cli login)") from None
    except ConnectionError:
        raise UserError(f"cannot reach the Hugging Face hub for {spec}; check the network and run again, or work offline "
                        "from a local file: --source=FILE.txt, .jsonl or .parquet") from None
    except (ValueError, OSError, RuntimeError, datasets.exceptions.DatasetsError) as e:  # pyarrow's are ValueErrors; a script is a RuntimeError
        raise UserError(f"cannot read {spec}: {str(e).splitlines()[0] if str(e) else type(e).__name__}") from None


# -- the work

def prepare(source="fineweb-edu", tokenizer=None, out=None, column=None, doc_sep=None, weights=None, max_bytes=None, splits=None,
            val_tokens=None, shard_tokens=100_000_000, special=None, bpe_bytes=200_000_000, workers=None, strict=False):
    """
    Tokenizes a source into a folder of shards, and returns the folder. Goes on where an earlier call was stopped. The tokenizer
    is a name, a path, or a spec.
    """
    row = SOURCES.get(source, {})
    tokenizer = tokenizer or row.get("tokenizer", "gpt2")
    special = special or row.get("special", (EOT,))
    max_bytes = row.get("max_bytes") if max_bytes is None else max_bytes
    splits = splits or (row.get("splits") if val_tokens is None else None)
    doc_sep = row.get("doc_sep") if doc_sep is None else doc_sep
    if doc_sep is not None:
        doc_sep = doc_sep.replace("\\n", "\n")
        if not doc_sep or not doc_sep.replace("\n", "").isprintable():
            raise UserError("--doc_sep must be printable characters and newlines")
    sources = open_sources(source, weights, column, doc_sep)
    out = out or os.path.join("data", source if row else "-".join(s.name for s in sources))
    workers = os.cpu_count() or 1 if workers is None else workers
    for name, value, low, high in (("shard_tokens", shard_tokens, 1, 2**31 - 1), ("val_tokens", val_tokens or 0, 0, 2**63),
                                   ("max_bytes", 1 if max_bytes is None else max_bytes, 1, 2**63),
                                   ("bpe_bytes", bpe_bytes, 1, 2**63), ("workers", workers, 1, 1024)):
        if not low <= value <= high:
            raise UserError(f"--{name}={value} is not from {low} to {high:,}")
    if EOT not in special or "" in special:
        raise UserError(f"--special must name {EOT}, which begins every document, and no empty token")
    if splits:
        split_shares(splits)
        if val_tokens is not None:
            raise UserError("--splits and --val_tokens exclude each other")
    pairs = [path for s in sources for path in s.pairs or ()]
    if pairs and val_tokens is not None:
        raise UserError("--val_tokens would cut a pair in two; use --splits")
    if strict and not pairs:
        raise UserError(f"--strict is for pairs; {source} holds none")
    known = lambda sizes: None if None in sizes else sum(sizes)
    size, expected = known([s.size for s in sources]), row.get("tokens") or known([s.tokens for s in sources])
    if max_bytes:
        size = min(size or max_bytes, max_bytes)
    # val_tokens: the first tokens of the stream. By default a shard of a large source, else a tenth of the documents.
    about = min((n for n in (expected, size and size / 4) if n), default=0)  # about 4 bytes a token
    if val_tokens is None and not splits and not pairs and about > 20 * shard_tokens:
        val_tokens = shard_tokens
    fingerprint = ",".join(s.fingerprint or "" for s in sources).strip(",") or None
    settings = dict(
        source=",".join(s.label for s in sources), source_fingerprint=fingerprint, tokenizer=tokenizer if isinstance(tokenizer, str) else tokenizer["name"],
        column=None if pairs else column or "text", doc_sep=doc_sep, shard_tokens=shard_tokens, val_tokens=val_tokens,
        weights=[s.weight for s in sources] if len(sources) > 1 else None, max_bytes=max_bytes, splits=splits)
    if bpe_size(tokenizer):
        settings.update(special=list(special), bpe_bytes=bpe_bytes)
    else:
        settings.update(tokenizer_fingerprint=tokenizer_fingerprint(get_tokenizer(tokenizer)))

    try:
        os.makedirs(out, exist_ok=True)
        with alone(out):
            path = lambda name: os.path.join(out, name)
            manifest = read_manifest(out)
            if pairs and (strict or manifest is None):
                check_pairs(pairs, strict)
            if manifest is not None:
                check_settings(out, manifest["settings"], settings)
                if os.path.exists(path(PROGRESS)):
                    os.remove(path(PROGRESS))
                verify(out, manifest["shards"])
                say(f"{out} is complete: {count_line(manifest['shards'])}")
                return out
            progress = read_json(path(PROGRESS))
            if progress and "sources" not in progress:
                raise UserError(f"{out} was begun by another version of dataset.py; remove it and start again")
            if progress and (progress["shards"] or progress["settings"] == settings):
                check_settings(out, progress["settings"], settings)
            elif progress is None and (strangers := [f for f in os.listdir(out) if f.endswith((".bin", ".npy"))]):
                raise UserError(f"{out} already holds {strangers[0]}, which this command did not write; choose another --out")
            else:
                if os.path.exists(path(TOKENIZER)):
                    os.remove(path(TOKENIZER))
                progress = dict(settings=settings, sources=[dict(state=None, pieces=0, taken=0, tokens=0) for _ in sources], shards=[])
                write_json(path(PROGRESS), progress)
            enc, spec = prepare_tokenizer(sources, tokenizer, special, bpe_bytes, path(TOKENIZER))
            template = chat_template(enc) if pairs else None
            tokenize(sources, enc, out, progress, workers, size, expected, template)
            if not any(s["split"] == "train" for s in progress["shards"]):
                raise UserError(f"{source} holds too little text to divide into train and val" if progress["shards"] else f"{source} holds no text")
            write_json(path(MANIFEST), dict(
                version=MANIFEST_VERSION, source=settings["source"], settings=settings,
                tokenizer=dict(name=spec["name"], fingerprint=tokenizer_fingerprint(enc)), vocab_size=enc.n_vocab, eot=enc.eot_token,
                **{"template": template} if pairs else {}, shards=progress["shards"]))
            os.remove(path(PROGRESS))
    except OSError as e:
        raise UserError(f"cannot write {out}: {e.strerror or e}") from None
    say(f"{out}: {count_line(progress['shards'])}")
    return out


@contextlib.contextmanager
def alone(folder):
    """Has a second process of this machine wait until a folder is prepared. The lock goes when its process does."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    lock = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"{folder}: waiting for another process that prepares it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(lock)


def verify(folder, shards):
    """Reads what a manifest vouches for once more: a disk, or a hand, may have changed it since."""
    done, show = 0, meter("tokens checked", sum(s["tokens"] for s in shards))
    for shard in shards:
        path = os.path.join(folder, shard["file"])
        for key, read, name in (("crc32", read_shard, path), ("mask_crc32", read_mask, mask_path(path))):
            if key in shard and zlib.crc32(read(path)) != shard[key]:
                raise UserError(f"{name} is not what was written, by its checksum; remove {folder} and prepare it again")
        done += shard["tokens"]
        show(done)


def prepare_tokenizer(sources, name, special, bpe_bytes, path):
    """The tokenizer and its spec; a BPE is trained unless an interrupted run already did."""
    size = bpe_size(name)
    if size and not os.path.exists(path):
        if size < 256 + len(special):
            raise UserError(f"tokenizer {name} has no room for 256 bytes and {len(special)} special tokens")
        say(f"training tokenizer {name}")
        shares = [bpe_bytes * s.weight / sum(s.weight for s in sources) for s in sources]
        merges = train_bpe(itertools.chain(*map(first_bytes, sources, shares)), size, special)
        if len(merges) < size - 256 - len(special):
            say(f"the text has only {len(merges)} pairs to merge: the tokenizer is smaller than {name}")
        spec = dict(name=name, merges=[[a.decode("latin-1"), b.decode("latin-1")] for a, b in merges], special=list(special))
    else:
        spec = tokenizer_spec(path if size else name)
    enc = get_tokenizer(spec)
    if enc.n_vocab > 2**16:
        raise UserError(f"tokenizer {spec['name']} has {enc.n_vocab:,} tokens; uint16 shards hold 65,536 at most")
    write_json(path, spec)
    return enc, spec


def first_bytes(src, limit):
    for pieces, _ in src.read(None):
        for text, _ in pieces:
            if limit <= 0:
                return
            text = text if isinstance(text, str) else "\n\n".join(itertools.chain(*text))
            yield text
            limit -= len(text.encode("utf-8", "replace"))


def split_shares(splits):
    """"98/1/1" -> (98, 1, 1): the percentages of train, val and test"""
    shares = [int(n) for n in splits.split("/")] if re.fullmatch(r"\d+(/\d+){1,2}", splits) else []
    if sum(shares) != 100 or not shares[0]:
        raise UserError(f"--splits={splits} must be percentages of train, val and perhaps test that make 100: 90/10, 98/1/1")
    return *shares, *[0] * (3 - len(shares))


def split_of(i, shares):
    """
    Where document i goes. Its last two digits, read backwards, spread the shares evenly.

    >>> [i for i in range(200) if split_of(i, (98, 1, 1)) == "test"]
    [10, 110]
    """
    n = i % 10 * 10 + i // 10 % 10
    _, val, test = shares
    return "val" if n < val else "test" if n < val + test else "train"


def tokenize(sources, enc, out, progress, workers, size=None, expected=None, template=None):
    """
    Encodes batches on all cores and writes them in order. tiktoken leaves Python's lock while it encodes, so threads do:
    nothing is copied between processes, and nothing depends on how a platform starts them. Each has an encoder of its own,
    since the regular expressions of a shared one are a fifth slower for every thread but the first.
    """
    own = threading.local()

    def start():
        own.enc = tiktoken.Encoding(enc.name, pat_str=enc._pat_str, mergeable_ranks=enc._mergeable_ranks, special_tokens=enc._special_tokens)

    settings, shards = progress["settings"], progress["shards"]
    lengths, val_tokens, max_bytes = token_bytes(enc), settings["val_tokens"], settings["max_bytes"]
    begin = enc.eot_token | BEGINS << 16 if template else enc.eot_token  # pairs have ends of text within them, too
    encode = lambda enc, pieces: encode_pairs(enc, template, pieces) if template else encode_pieces(enc, pieces)
    writer = ShardWriter(out, settings["shard_tokens"], lengths, begin, shards, masked=bool(template))
    count = lambda key, *splits: sum(s[key] for s in shards if s["split"] in (splits or ("train", "val", "test")))
    val_left = val_tokens and val_tokens - count("tokens", "val")
    shares = split_shares(settings["splits"] or "90/10") if val_tokens is None else (100, 0, 0)
    started, saved, done = time.time(), time.time(), count("tokens")
    with ThreadPoolExecutor(workers, initializer=start) as pool:
        submit = lambda pieces: pool.submit(lambda: encode(own.enc, pieces))
        by_document = begin if len(sources) > 1 else None
        streams = [encoded(s, at, shares, submit, 2 * workers + 2, by_document) for s, at in zip(sources, progress["sources"])]
        for i, split, tokens, at in mixed(streams, [s.weight for s in sources], progress["sources"], begin):
            if max_bytes:
                tokens = tokens[:text_end(tokens, lengths, max_bytes - count("bytes"), begin)]
                if not len(tokens):
                    break
            progress["sources"][i].update(at, tokens=progress["sources"][i]["tokens"] + len(tokens) * (split == "train"))
            if val_left:
                writer.append("val", tokens[:val_left])
                tokens, val_left = tokens[val_left:], max(0, val_left - len(tokens))
            writer.append(split, tokens)
            if (now := time.time()) - saved > SAVE_SECONDS:
                saved = now
                writer.sync()
                write_json(os.path.join(out, PROGRESS), progress)
                report(count("tokens"), count("bytes"), done, now - started, size, expected)
    writer.finish()
    for stream in streams:
        stream.close()
    gc.collect()  # a parquet reader that is left half-way, in a cycle, can abort Python's exit (huggingface/datasets 7467)


def encoded(source, at, shares, submit, depth, by_document):
    """
    Yields (split, tokens, where to begin after them) from a source: all that a batch has for a split, or, where by_document
    is the token that a document begins with, document by document. A bounded queue of batches waits, so that memory does not grow with the text.
    """
    waiting, batches, taken = deque(), source.read(at["state"]), at["taken"]
    state, n = at["state"], at["pieces"]
    while True:
        while batches and len(waiting) < depth:
            if (batch := next(batches, None)) is None:
                batches = None
                break
            parts = {}
            for i, (text, begins) in enumerate(batch[0], n):
                split = split_of(i, shares)
                # A piece of a long document that does not follow its predecessor begins a document there.
                parts.setdefault(split, []).append((text, begins or split != split_of(i - 1, shares)))
            waiting.append(([(split, submit(part)) for split, part in parts.items()], dict(state=state, pieces=n)))
            state, n = batch[1], n + len(batch[0])
        if not waiting:
            return
        work, begin = waiting.popleft()
        position = 0  # in the batch's tokens; those up to `taken` were written before
        for split, future in work:
            tokens = future.result()
            cuts = [] if by_document is None else np.flatnonzero(tokens[1:] == by_document) + 1
            for run in np.split(tokens, cuts):
                position += len(run)
                if position > taken:
                    yield split, run, dict(begin, taken=position)
        taken = 0


def mixed(streams, weights, written, begin):
    """
    Yields (i, *run) from streams i. The next run is of the stream whose train tokens, over its weight, are furthest behind;
    what goes to val and test is not counted, and a document that was begun is ended first.
    """
    heads = {i: run for i, stream in enumerate(streams) if (run := next(stream, None))}
    while heads:
        i = min(heads, key=lambda i: (heads[i][1][0] == begin, written[i]["tokens"] / weights[i]))
        yield i, *heads[i]
        heads[i] = next(streams[i], None)
        if not heads[i]:
            del heads[i]


def text_end(tokens, lengths, n_bytes, begin):
    """Where the document ends that holds byte n_bytes of the text, or where the tokens do."""
    if n_bytes <= 0:
        return 0
    at = int(np.searchsorted(lengths[tokens & TOKEN].cumsum(), n_bytes)) + 1
    after = np.flatnonzero(tokens[at:] == begin)
    return at + int(after[0]) if len(after) else len(tokens)


def encode_pieces(enc, pieces):
    """
    One call of tiktoken for many documents: joined by the end-of-text string, which is special there alone. Where a
    document holds that string itself, or half a surrogate pair, each is encoded on its own.  -> (n,) uint32
    """
    joined = "".join(EOT + text if begins else text for text, begins in pieces)
    if joined.count(EOT) == sum(begins for _, begins in pieces):
        try:
            return enc.encode_to_numpy(joined, allowed_special={EOT}, disallowed_special=())
        except UnicodeEncodeError:
            pass
    return np.array([t for text, begins in pieces for t in [enc.eot_token] * begins + enc.encode_ordinary(text)], dtype=np.uint32)


def encode_pairs(enc, template, pieces):
    return np.concatenate([encode_chat(enc, template, turns) for turns, _ in pieces])


# -- pairs from a server that speaks OpenAI's chat completions: most do, in the cloud or at home

KEY = "OPENAI_API_KEY"  # the environment's; it goes into requests and nowhere else
TRIES, LONGEST_WAIT, TIMEOUT, GIVEN_UP = 8, 60, 300, 10  # of a prompt; seconds, twice; prompts in a row without a response


def synthesize(prompts, endpoint, model, request=None, concurrency=None, out=None):
    """
    Asks for a response to every prompt, and appends each, with where it is from, to a file of pairs. What is there already is not
    asked for again.
    """
    for name, value in (("prompts", prompts), ("endpoint", endpoint), ("model", model)):
        if not value:
            raise UserError(f"--source=synth needs --{name}")
    out, concurrency = out or os.path.join("data", "synth.jsonl"), 8 if concurrency is None else concurrency
    if not out.lower().endswith(".jsonl"):
        raise UserError(f"--out={out} must be a file of pairs, .jsonl")
    if not 1 <= concurrency <= 1000:
        raise UserError(f"--concurrency={concurrency} is not from 1 to 1,000")
    try:
        extra = json.loads(request or "{}")
        body = {**extra, "model": model, "messages": list(extra.get("messages", []))}
    except (ValueError, AttributeError, TypeError, RecursionError):
        raise UserError(f"--request={request} must be a JSON object, {{\"temperature\": 0.7}} say") from None
    try:
        url = urllib.parse.urlsplit(endpoint.rstrip("/").removesuffix("/chat/completions") + "/chat/completions")
        good = url.scheme in ("http", "https") and url.hostname and (url.port or True)
    except ValueError:
        good = False
    if not good or url.username or url.query:
        raise UserError(f"--endpoint must be like http://localhost:8000/v1; a key goes into {KEY}")
    key = os.environ.get(KEY, "").strip()
    if not re.fullmatch("[!-~]*", key):
        raise UserError(f"{KEY} holds a character that no key has")

    wanted = read_prompts(prompts)
    file, answered = open_answers(out, model)
    todo, running = deque(p for p in wanted if p not in answered), {}
    say(f"{out}: {len(wanted) - len(todo):,} of {len(wanted):,} prompts have their response")
    failed_in_a_row, last, show = 0, "", meter("prompts", len(wanted), len(wanted) - len(todo))
    stop, server = threading.Event(), dict(calm=0.0, said="")  # when it may be asked again, by its own word; how the last try failed

    def collect(futures):
        """Puts the responses that have come into the file."""
        nonlocal failed_in_a_row, last
        for future in futures:
            prompt, (text, why, failed) = running.pop(future), future.result()
            if text is None:
                last = why
                failed_in_a_row += failed
                say(f"no response to {prompt[:60]!r}: {why}")
                continue
            row = dict(prompt=prompt, response=text, model=model, endpoint=url.geturl(), finish_reason=why, time=int(time.time()), request=extra)
            file.write((json.dumps(row, ensure_ascii=False) + "\n").encode("utf-8", "replace"))
            file.flush()
            os.fsync(file.fileno())
            answered.add(prompt)
            failed_in_a_row = 0

    try:
        with file, ThreadPoolExecutor(concurrency) as pool:
            try:
                while (todo or running) and failed_in_a_row < GIVEN_UP:
                    while todo and len(running) < concurrency:
                        prompt = todo.popleft()
                        messages = [*body["messages"], {"role": "user", "content": prompt}]
                        running[pool.submit(ask, url.geturl(), key, {**body, "messages": messages}, stop, server)] = prompt
                    collect(wait(running, timeout=1, return_when=FIRST_COMPLETED)[0])
                    pause = server["calm"] - time.monotonic()
                    said = f"the server asks for {clock(pause)} of patience" if pause > 1 else server["said"]
                    show(len(wanted) - len(todo) - len(running), lambda: said)
            except KeyboardInterrupt:
                say(f"stopping: {len(running)} responses are on their way; Ctrl-C again drops them")
                raise
            finally:
                stop.set()
                while running:
                    try:
                        collect(wait(running, return_when=FIRST_COMPLETED)[0])
                    except UserError:  # the one that is being raised, once more
                        pass
                    except KeyboardInterrupt:
                        os._exit(130)
    except OSError as e:
        raise UserError(f"cannot write {out}: {e.strerror or e}; the same command goes on from what is there") from None
    if lacking := sum(p not in answered for p in wanted):
        raise UserError(f"{lacking:,} of {len(wanted):,} prompts have no response, the last for {last}; the same command asks for them again")
    say(f"{out}: {len(wanted):,} pairs; python train.py --recipe=sft --init_from=MODEL --data={out} learns them")


def ask(url, key, body, stop, server):
    """
    -> the response, why it ended, and False; or None, why there is none, and whether that is for the server to mend. Waits and
    tries again where that may help.
    """
    headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
    tries, until, why = 0, 0.0, "a stop"
    while tries < TRIES and not stop.is_set():
        if (left := max(until, server["calm"]) - time.monotonic()) > 0:
            stop.wait(left)
            continue
        tries, seconds = tries + 1, min(LONGEST_WAIT, 2**tries) * random.uniform(0.5, 1)
        try:
            with OPENER.open(urllib.request.Request(url, json.dumps(body).encode(), headers), timeout=TIMEOUT) as response:
                choice = json.load(response)["choices"][0]
            if (choice["message"]["content"] or "").strip():
                server["said"] = ""
                return choice["message"]["content"].strip(), choice.get("finish_reason"), False
            why = "an empty response"
        except urllib.error.HTTPError as e:
            why = f"HTTP status {e.code}"
            if e.code in (401, 403):
                raise UserError(f"{url} " + (f"does not take the key in {KEY}" if key else f"wants a key; set {KEY}")) from None
            if e.code < 400 or e.code == 404:
                raise UserError(f"{url} has no model {body['model']}, or is not the server's address ({why})") from None
            if e.code < 500 and e.code not in (408, 409, 425, 429):
                return None, why, False
            if (said := retry_after(e.headers)) is not None:  # to wait as told is no failure
                tries, seconds = tries - 1, said * random.uniform(1, 1.5)
                server["calm"] = max(server["calm"], time.monotonic() + said)
        except (OSError, http.client.HTTPException) as e:
            why = str(getattr(e, "reason", e)) or type(e).__name__
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
            why = "an answer that is no chat completion"
        until, server["said"] = time.monotonic() + seconds, why
    return None, why, not stop.is_set()


def retry_after(headers):
    """How many seconds a server asks to wait, an hour at most; it may also name a time. None where it does not say."""
    said = headers.get("Retry-After", "").strip()
    try:
        seconds = float(said) if re.fullmatch(r"[\d.]+", said) else email.utils.parsedate_to_datetime(said).timestamp() - time.time()
    except (ValueError, TypeError, OverflowError):
        return None
    return min(max(seconds, 0.0), 3600.0)


class NoRedirect(urllib.request.HTTPRedirectHandler):
    """A key is for the address that was named."""

    def redirect_request(self, *args):
        return None


OPENER = urllib.request.build_opener(NoRedirect)


def read_prompts(path):
    """A prompt a line, or the prompts of a .jsonl file, each once"""
    prompts = []
    with open_source_file(path) as f:
        for number, line in enumerate(f, 1):
            try:
                if line.strip():
                    text = line.decode("utf-8-sig")
                    text = prompt_of(json.loads(text)) if path.lower().endswith(".jsonl") else text.strip()
                    prompts.append(text.encode("utf-8", "replace").decode())  # half a surrogate pair can be neither sent nor stored
            except (ValueError, TypeError, AttributeError, RecursionError) as e:
                raise UserError(f"{path}, line {number}: no prompt ({str(e)[:60]})") from None
    if not prompts:
        raise UserError(f"{path} holds no prompts")
    return list(dict.fromkeys(prompts))


def open_answers(path, model):
    """-> the file, for appending and for no other process, and the prompts that it answers. A line cut off by a kill is removed."""
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        file = open(path, "ab+")
        with contextlib.suppress(ImportError):  # not on Windows
            import fcntl
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{path} is being written by another process") from None
    except OSError as e:
        raise UserError(f"cannot write {path}: {e.strerror}") from None
    file.seek(0)
    answered, end, line = set(), 0, b"\n"
    for number, line in enumerate(file, 1):
        try:
            row = json.loads(line)
            if row["model"] != model:
                raise UserError(f"{path} has responses of {row['model']}; choose another --out for {model}")
            answered.add((row["prompt"], row["response"])[0])
        except (ValueError, KeyError, TypeError, RecursionError) as e:
            begun = b'{"prompt": '
            if not isinstance(e, ValueError) or line.endswith(b"\n") or line[:len(begun)] != begun[:len(line)]:
                raise UserError(f"{path}, line {number}, is not of --source=synth; choose another --out") from None
            file.truncate(end)
            break
        end += len(line)
    else:
        file.write(b"\n" * (not line.endswith(b"\n")))
    return file, answered


def large_pages():
    """
    On a CPU, page faults cost more than anything else: lets torch use large pages, and glibc keep what is freed. It must be
    said before torch is imported.
    """
    if sys.platform != "linux":
        return
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    try:
        M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # <malloc.h>
        ctypes.CDLL(None).mallopt(M_TRIM_THRESHOLD, -1)
        ctypes.CDLL(None).mallopt(M_MMAP_MAX, 0)
    except (OSError, AttributeError):  # a C library without mallopt
        pass


def report(tokens, n_bytes, done, seconds, size, expected):
    rate = (tokens - done) / seconds
    share = n_bytes / size if size else tokens / expected if expected else None
    left = tokens / share - tokens if share else None
    ahead = f", {min(share, 1):.0%}, {clock(max(left, 0) / rate)} left" if share and rate else ""
    say(f"{tokens:,} tokens, {rate:,.0f} tokens/s{ahead}", again=True)


def check_settings(out, old, new):
    for key in new:
        if old.get(key) != new[key]:
            if key == "source_fingerprint":
                raise UserError(f"{out} was made from another version of {new['source']}; remove {out} or choose another --out")
            raise UserError(f"{out} was made with {key}={old.get(key)}, not {new[key]}; remove {out} or choose another --out")


def read_json(path):
    """None where there is no such file."""
    try:
        with open(path, encoding="utf-8") as f:
            return json.load(f)
    except FileNotFoundError:
        return None
    except ValueError:
        raise UserError(f"{path} is damaged; remove its folder and prepare the data again") from None


def read_manifest(folder):
    """None where the folder has none: it is unfinished, or other people's."""
    manifest = read_json(os.path.join(folder, MANIFEST))
    if manifest is not None and (not isinstance(manifest, dict) or manifest.get("version") != MANIFEST_VERSION):
        raise UserError(f"{os.path.join(folder, MANIFEST)} is not one that this version of dataset.py wrote; prepare the data again")
    return manifest


def count_line(shards):
    count = lambda split: sum(s["tokens"] for s in shards if s["split"] == split)
    return ", ".join(f"{count(split):,} {split} tokens" for split in ("train", "val", "test") if count(split)) + \
        f", {sum(s['documents'] for s in shards):,} documents"


def clock(seconds):
    m, s = divmod(int(seconds), 60)
    return f"{m // 60}:{m % 60:02d}:{s:02d}" if m >= 60 else f"{m}:{s:02d}"


def say(line, again=False):
    """A line of news; `again` marks one that, on a terminal, the next line replaces."""
    if sys.stdout.isatty():
        line = line[:shutil.get_terminal_size().columns - 1] if again else line  # a wrapped line could not be replaced
        print(f"\r\x1b[K{line}", end="" if again else "\n", flush=True)
    else:
        print(line, flush=True)


def meter(unit, total, begun=0):
    """
    -> a function that is told how many are done, of which `begun` were before, and says so with the rate and the time left:
    five times a second on a terminal, every ten seconds on stderr where stdout is a file. Its news, a function of nothing, is
    asked only then.
    """
    started = shown = time.monotonic()

    def show(done, news=lambda: ""):
        nonlocal shown
        if (now := time.monotonic()) - shown > (0.2 if sys.stdout.isatty() else 10):
            shown, rate, more = now, (done - begun) / (now - started), news()
            ahead = f", {clock((total - done) / rate)} left" if rate else ""
            line = f"{done:,}/{total:,} {unit}, {rate:,.1f}/s{ahead}{'; ' * bool(more)}{more}"
            say(line, again=True) if sys.stdout.isatty() else print(line, file=sys.stderr, flush=True)

    return show


class Parser(argparse.ArgumentParser):
    """Complains in one line, and prints a script's docstring as it stands."""

    def __init__(self, **options):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **options)

    def error(self, message):
        if m := re.match(r"unrecognized arguments: (--[\w-]+)", message):
            near = difflib.get_close_matches(m[1], self._option_string_actions, 1)
            message = f"there is no option {m[1]}" + (f"; did you mean {near[0]}?" if near else "; see --help")
        self.exit(2, f"{self.prog}: {message}\n")


def main():
    p = Parser(prog="dataset.py", description=__doc__)
    p.add_argument("--source", help=f"{', '.join(SOURCES)}, hf:owner/name[:config], synth, or .txt, .jsonl, .parquet files, 'dir/*.txt'; "
                   "several, separated by commas, are mixed (%(default)s)")
    p.add_argument("--weights", type=numbers, help="tokens of each source of a mix, relative to the others: 3,1 (equal)")
    p.add_argument("--tokenizer", help="gpt2, byte, bpe:N (trained on the source), or the path of a tokenizer.json (gpt2)")
    p.add_argument("--out", help="folder for the shards (data/NAME); of synth, the file of pairs (data/synth.jsonl)")
    p.add_argument("--column", help="the column with the text, in tables (text); named, no .jsonl is taken for pairs")
    p.add_argument("--doc_sep", help=r"what separates the documents of a text file, \n for a newline (blank lines)")
    p.add_argument("--max_bytes", type=integer, help="stop with the document, or the part of a long one, that reaches this much text (all of it)")
    p.add_argument("--splits", help="percentages of the documents for train, val and test: 98/1/1 (90/10, but see --val_tokens)")
    p.add_argument("--val_tokens", type=integer, help="instead of --splits: the first tokens are for validation (the first shard of a large source)")
    p.add_argument("--shard_tokens", type=integer, help="tokens a shard (%(default)s)")
    p.add_argument("--special", type=lambda text: text.split(","), help=f"special tokens of bpe:N, separated by commas ({EOT})")
    p.add_argument("--bpe_bytes", type=integer, help="bpe:N is trained on this much of the source (%(default)s)")
    p.add_argument("--workers", type=integer, help="threads that tokenize (all cores)")
    p.add_argument("--strict", action="store_true", help="the first line of a file of pairs that is none is the end")
    synth = p.add_argument_group("--source=synth asks a server for responses")
    synth.add_argument("--prompts", metavar="FILE", help="a prompt a line, or a .jsonl file with prompt or instruction")
    synth.add_argument("--endpoint", metavar="URL", help=f"of a server with OpenAI's chat completions, http://localhost:8000/v1 say; its key in {KEY}")
    synth.add_argument("--model", metavar="NAME", help="as the server calls it")
    synth.add_argument("--request", metavar="JSON", help='what else a request says: {"temperature": 0.7, "messages": [{"role": "system", "content": "..."}]}')
    synth.add_argument("--concurrency", type=integer, help="requests at a time (8)")
    p.set_defaults(**{k: v.default for k, v in inspect.signature(prepare).parameters.items()})
    a = vars(p.parse_args())
    asked = {k: a.pop(k) for k in ("prompts", "endpoint", "model", "request", "concurrency")}
    if a["source"] == "synth":
        if other := [k for k, v in a.items() if k not in ("source", "out") and v != p.get_default(k)]:
            raise UserError(f"--{other[0]} is not for --source=synth, which only asks; name its file as the --source of another command")
        return synthesize(out=a["out"], **asked)
    if given := [k for k, v in asked.items() if v is not None]:
        raise UserError(f"--{given[0]} goes with --source=synth")
    prepare(**a)


def numbers(text):
    """"3,1" -> [3.0, 1.0]"""
    return [float(w) for w in text.split(",")]


def integer(text):
    """"100_000", "1e8" -> int"""
    n = float(text)
    if not n.is_integer():  # nor are inf and nan
        raise ValueError
    return int(n)


if __name__ == "__main__":
    try:
        main()
    except UserError as e:
        sys.exit(f"dataset.py: {e}")
    except KeyboardInterrupt:
        sys.exit("\ndataset.py: stopped; the same command goes on from here")
