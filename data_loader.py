"""
Rows of tokens in, batches out, in an order that is a pure function of (data, seed, position).

There are two kinds of rows: windows of T + 1 tokens from the stream of all shards, and rows of prompt-response pairs
packed together. Every epoch visits each row once, in an order of its own, whatever the number of processes or the
micro-batch. The loader's whole state is one integer: how many rows all processes have taken together.
"""
import array
import bisect
import hashlib
import json
import os
import re
import zlib
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from dataset import (MANIFEST, PROGRESS, SPLITS, UserError, chat_template, encode_chat, pair_split, read_manifest,
                     read_pairs, read_shard, reading)


class NoSplit(UserError):
    """The data lacks this split, or it is too short for a row: a run can do without val and test."""


class DataLoader:
    def __init__(self, data, split, B, T, rank=0, world_size=1, seed=0, stride=None, doc_mask=False, vocab_size=None,
                 device="cpu"):
        """`data` is a folder of shards, or Pairs."""
        self.B, self.rank, self.world_size, self.seed = B, rank, world_size, seed
        self.doc_mask, self.device = doc_mask, torch.device(device)
        if isinstance(data, Pairs):
            if stride not in (None, 0, T):
                raise UserError(f"stride={stride} is for running text; pairs are packed")
            self.rows = PackedPairs(data, split, T)
        else:
            self.rows = Windows(data, split, T, stride or T, vocab_size)
        self.n_rows = len(self.rows)
        self.position = 0
        self.pool = ThreadPoolExecutor(1)  # reads the next batch while the device works on this one
        self.prefetched = None  # (position, B, future)

    def next_batch(self):
        """
        -> x (B, T), y (B, T): this process's share of the next B * world_size rows. y is x one token later, or -1 where
        there is nothing to learn. With doc_mask also the document each position of x belongs to, (B, T).
        """
        if self.prefetched is None or self.prefetched[:2] != (self.position, self.B):
            self.prefetch()
        batch = self.prefetched[2].result()
        self.position += self.B * self.world_size
        self.prefetch()
        return self.to_device(batch)

    def prefetch(self):
        indices = self.order(self.position + self.rank * self.B, self.B)
        self.prefetched = self.position, self.B, self.pool.submit(self.read, indices)

    def order(self, position, n):
        """The indices of the n rows from a position on, which may reach into the next epoch"""
        epoch, index = np.divmod(position + np.arange(n), self.n_rows)
        parts = [permute(index[epoch == e], self.n_rows, self.seed, e) for e in np.unique(epoch)]
        return np.concatenate(parts)

    def validation_batches(self, n, B):
        """Yields this process's share of n rows spread evenly over the split."""
        n = min(n, self.n_rows)
        indices = np.arange(n) * self.n_rows // n
        for i in range(self.rank * B, n, B * self.world_size):
            yield self.to_device(self.read(indices[i:i + B]))

    def next_target_count(self, n):
        """How many targets the next n rows of all processes have"""
        return int(self.rows.target_counts(self.order(self.position, n)).sum())

    def describe_last_rows(self, n_batches, shown=4):
        """Where this process's last rows come from: data/x/train_000000.bin at token 4,096, ... and 508 more"""
        n = n_batches * self.world_size * self.B
        indices = self.order(self.position - n, n).reshape(n_batches, self.world_size, self.B)[:, self.rank].flatten()
        more = f" and {len(indices) - shown} more" if len(indices) > shown else ""
        return ", ".join(self.rows.place(int(i)) for i in indices[:shown]) + more

    def read(self, indices):
        """-> (2 or 3, n, T) int64"""
        rows = [self.rows.read(int(i))[:2 + self.doc_mask] for i in indices]
        batch = torch.from_numpy(np.stack(rows, axis=1))
        return batch.pin_memory() if self.device.type == "cuda" else batch

    def to_device(self, batch):
        return tuple(batch.to(self.device, non_blocking=True))

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.position = state["position"]


# Both kinds of rows have: len(), read(i), target_counts(indices), place(i) for messages, summary() for the user, and
# fingerprint(), by which a resumed run notices that the data has changed.

class Windows:
    """Windows of T + 1 tokens, `stride` apart, from the stream of a split's shards. They may cross shard ends."""

    def __init__(self, folder, split, T, stride, vocab_size=None):
        self.T, self.stride = T, stride
        self.paths, counts, self.manifest = find_shards(folder, split)
        self.vocab_size = vocab_size or (self.manifest or {}).get("vocab_size")
        self.eot = self.manifest["eot"] if self.manifest else 50256  # other people's shards are in GPT-2's tokens
        self.lengths, self.offsets, self.states = [], [], []  # of each shard: its tokens, their first byte, file_state
        for path, n in zip(self.paths, counts):
            tokens = read_shard(path)
            if n is not None and len(tokens) != n:
                raise UserError(f"{path} has {len(tokens):,} tokens, {MANIFEST} says {n:,}; prepare the data again")
            self.lengths.append(len(tokens))
            self.offsets.append(getattr(tokens, "offset", 0))
            self.states.append(file_state(path))
        self.ends = np.cumsum(self.lengths).tolist()  # where each shard ends in the stream
        if self.ends[-1] < T + 1:
            raise NoSplit(f"the {split} split of {folder} has {self.ends[-1]:,} tokens; a window takes "
                          f"block_size + 1 = {T + 1}")

    def __len__(self):
        return (self.ends[-1] - self.T - 1) // self.stride + 1

    def fingerprint(self):
        if self.manifest:
            content = [self.manifest["shards"], self.manifest["tokenizer_fingerprint"]]
        else:
            content = [(os.path.basename(path), n) for path, n in zip(self.paths, self.lengths)]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]

    def summary(self):
        return f"{len(self):,} windows"

    def target_counts(self, indices):
        return np.full(len(indices), self.T)

    def place(self, i):
        start = i * self.stride
        shard = bisect.bisect_right(self.ends, start)
        return f"{self.paths[shard]} at token {start - self.ends[shard] + self.lengths[shard]:,}"

    def read(self, i):
        """-> inputs, targets and documents, (T,) each"""
        tokens = self.read_stream(i * self.stride, self.T + 1)
        return tokens[:-1], tokens[1:], np.cumsum(tokens[:-1] == self.eot)

    def read_stream(self, start, n):
        """n tokens of the stream from `start` on.  -> (n,) int64"""
        parts, shard = [], bisect.bisect_right(self.ends, start)
        begin = start - (self.ends[shard] - self.lengths[shard])
        while n:
            parts.append(self.read_part(shard, begin, min(n, self.lengths[shard] - begin)))
            shard, begin, n = shard + 1, 0, n - len(parts[-1])
        return np.concatenate(parts, dtype=np.int64)

    def read_part(self, shard, begin, n):
        """
        n tokens of a shard. The file is opened each time: mapped files that stay open take a handle each, and memory
        that grows to the size of the data (nanoGPT issue 287).
        """
        path = self.paths[shard]
        with reading(path, "a token shard"):
            tokens = np.fromfile(path, np.uint16, n, offset=self.offsets[shard] + 2 * begin)
            if file_state(path) != self.states[shard]:
                raise UserError(f"{path} has changed since this run began")
        if self.vocab_size and n and tokens.max() >= self.vocab_size:
            at = int(np.argmax(tokens >= self.vocab_size))
            raise UserError(f"{path}: token {tokens[at]} at {begin + at:,} is outside the vocabulary of "
                            f"{self.vocab_size:,}")
        return tokens


def file_state(path):
    """Size, modification time and inode: if one differs, the file has changed."""
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns, status.st_ino


class Pairs:
    """All prompts and responses of a .jsonl file, tokenized, in memory"""

    def __init__(self, path, enc):
        self.path, self.eot, self.template = path, enc.eot_token, chat_template(enc)
        tokens, is_target, offsets = array.array("H"), bytearray(), [0]
        for turns in read_pairs(path):
            pair = encode_chat(enc, self.template, turns)
            tokens.extend(pair[0])
            is_target.extend(pair[1])
            offsets.append(len(tokens))
        self.tokens, self.is_target = np.frombuffer(tokens, dtype=np.uint16), np.frombuffer(is_target, dtype=bool)
        self.offsets = np.array(offsets)  # where each pair starts, and the end
        splits = np.array([pair_split(i) for i in range(len(offsets) - 1)])
        self.indices = {split: np.flatnonzero(splits == split) for split in SPLITS}
        self.indices["all"] = np.arange(len(splits))


class PackedPairs:
    """Rows of T tokens that hold as many whole pairs as fit. A pair too long for a row is shortened."""

    def __init__(self, pairs, split, T):
        if T < 3:
            raise UserError(f"block_size={T} is too small for pairs, which need at least three tokens")
        self.pairs, self.T, self.indices = pairs, T, pairs.indices[split]
        if len(self.indices) == 0:
            raise NoSplit(f"{pairs.path} has no {split} split: that takes at least two pairs")
        self.lengths = np.diff(pairs.offsets)[self.indices]
        rows = pack(np.minimum(self.lengths, T), T)
        self.rows = [self.indices[row] for row in rows]
        counts = np.add.reduceat(pairs.is_target, pairs.offsets[:-1], dtype=np.int64) + 1  # the last end-of-text
        for i in self.indices[self.lengths > T]:
            counts[i] = np.count_nonzero(self.inputs_and_targets(i)[1] >= 0)
        self.counts = np.array([counts[row].sum() for row in self.rows])

    def __len__(self):
        return len(self.rows)

    def fingerprint(self):
        return "".join(f"{zlib.crc32(numbers.tobytes()):08x}" for numbers in (self.pairs.tokens, self.pairs.offsets))

    def summary(self):
        used = np.minimum(self.lengths, self.T).sum() / (len(self) * self.T)
        return f"{len(self.lengths):,} pairs in {len(self):,} rows, {used:.1%} filled{self.what_is_cut()}"

    def what_is_cut(self):
        too_long = np.count_nonzero(self.lengths > self.T)
        if not too_long:
            return ""
        return f"; {too_long:,} pairs are longer than the context and lose the beginning of the prompt, and if that " \
            "is not enough, the end of the response"

    def target_counts(self, indices):
        return self.counts[indices]

    def place(self, i):
        return f"a row that begins with pair {self.rows[i][0] + 1:,} of {self.pairs.path}, not counting skipped lines"

    def read(self, i):
        """-> inputs, targets (-1: none) and documents (-1: padding), (T,) each"""
        x, y, document = np.full(self.T, self.pairs.eot), np.full(self.T, -1), np.full(self.T, -1)
        at = 0
        for number, pair in enumerate(self.rows[i]):
            inputs, targets = self.inputs_and_targets(pair)
            part = slice(at, at + len(inputs))
            x[part], y[part], document[part] = inputs, targets, number
            at = part.stop
        return x, y, document

    def inputs_and_targets(self, i):
        """Pair i, shortened to at most T tokens if it is longer"""
        span = slice(self.pairs.offsets[i], self.pairs.offsets[i + 1])
        tokens, is_target = self.pairs.tokens[span], self.pairs.is_target[span]
        kept, reaches_end = tokens_to_keep(is_target, self.T)
        targets = np.append(tokens[kept][1:], self.pairs.eot).astype(np.int64)
        is_target = np.append(is_target[kept][1:], reaches_end)
        if len(kept) < len(tokens):
            is_target[0] = False  # the tokens before this target were cut away
        targets[~is_target] = -1
        return tokens[kept], targets


def tokens_to_keep(is_target, T):
    """
    Which tokens of a pair to keep, at most T, and whether they reach its end. A pair that is too long keeps its first
    token and loses the beginning of the prompt; if that is not enough, also the end of the response.
    """
    n = len(is_target)
    if n <= T:
        return np.arange(n), True
    end_of_prompt = np.flatnonzero(~is_target)[-1]  # the last response follows it
    first = min(n - T + 1, end_of_prompt)
    return np.append(0, np.arange(first, first + T - 1)), first + T - 1 == n


def pack(lengths, T):
    """
    Best fit, longest first: lengths of at most T -> lists of indices whose lengths add up to at most T.

    >>> pack(np.array([5, 3, 2, 6, 2]), 8)
    [[3, 2], [0, 1], [4]]
    """
    rows = []
    free_sizes = []  # how much room rows have left, sorted, each size once
    with_room = defaultdict(list)  # the rows that have this much
    for i in np.argsort(-lengths, kind="stable").tolist():
        n = int(lengths[i])
        at = bisect.bisect_left(free_sizes, n)
        if at == len(free_sizes):
            row, room = len(rows), T
            rows.append([])
        else:
            room = free_sizes[at]
            row = with_room[room].pop()
            if not with_room[room]:
                del free_sizes[at]
        rows[row].append(i)
        room -= n
        if room:
            if not with_room[room]:
                bisect.insort(free_sizes, room)
            with_room[room].append(row)
    return rows


def permute(index, n, seed, epoch):
    """
    A seeded permutation of 0..n-1, computed rather than stored: a Feistel network over the next power of four, applied
    again to results that are not below n.

    >>> sorted(permute(np.arange(10), 10, seed=1, epoch=0).tolist())
    [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    """
    half = max(1, (int(n - 1).bit_length() + 1) // 2)  # x has 2 * half bits
    mask = np.uint64((1 << half) - 1)
    keys = np.random.SeedSequence([seed, epoch]).generate_state(6, np.uint64)
    x = np.asarray(index).astype(np.uint64)
    outside = np.ones(len(x), dtype=bool)
    while outside.any():
        left, right = x[outside] >> np.uint64(half), x[outside] & mask
        for key in keys:
            mixed = (right ^ key) * np.uint64(0x9E3779B97F4A7C15)
            mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
            left, right = right, left ^ ((mixed >> np.uint64(32)) & mask)
        x[outside] = (left << np.uint64(half)) | right
        outside[outside] = x[outside] >= n
    return x.astype(np.int64)


def find_shards(folder, split):
    """-> the paths of a split's shards, the tokens each should have (or None), and the manifest (or None)"""
    if not os.path.isdir(folder):
        raise UserError(f"there is no folder {folder}; make it with: python dataset.py --source=... --out={folder}")
    manifest = read_manifest(folder)
    if manifest is None:
        if os.path.exists(os.path.join(folder, PROGRESS)):
            raise UserError(f"{folder} is unfinished; run its python dataset.py command again to complete it")
        name_of_split = rf"(.*[^a-z])?{split}([^a-z].*)?\.(bin|npy)"  # not val in retrieval_000.bin
        names = sorted(name for name in os.listdir(folder) if re.fullmatch(name_of_split, name))
        if not names:
            raise NoSplit(f"{folder} has no .bin or .npy shards with {split} as a word of their name; text becomes "
                          "shards by python dataset.py --source=...")
        return [os.path.join(folder, n) for n in names], [None] * len(names), None
    shards = [shard for shard in manifest["shards"] if shard["split"] == split]
    if not shards:
        raise NoSplit(f"{folder} has no {split} split")
    return [os.path.join(folder, s["file"]) for s in shards], [s["tokens"] for s in shards], manifest
