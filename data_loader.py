"""
Token shards in, batches out, in an order that is a pure function of (data, seed, position).

The stream of all shards is cut into windows of T+1 tokens, which may cross shard ends; pairs are packed into windows whole.
Every epoch visits each window once, in an order of its own, whatever the number of processes or the micro-batch: the loader's
whole state is one integer, how many windows all processes have taken together.
"""
import bisect
import mmap
import os
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from dataset import BEGINS, LEARNED, MANIFEST, PROGRESS, UserError, read_manifest, read_mask, read_shard


class DataLoader:
    def __init__(self, data, split, B, T, rank=0, world_size=1, seed=0, stride=None, vocab_size=None, device="cpu", doc_mask=False):
        self.B, self.T, self.rank, self.world_size, self.seed = B, T, rank, world_size, seed
        self.stride, self.device, self.doc_mask = stride or T, torch.device(device), doc_mask
        self.paths, lengths, self.manifest = find_shards(data, split)
        self.vocab_size = vocab_size or (self.manifest or {}).get("vocab_size")
        self.eot = self.manifest["eot"] if self.manifest else 50256  # other people's shards are GPT-2's
        self.shards = [read_shard(p) for p in self.paths]
        for path, tokens, n in zip(self.paths, self.shards, lengths):
            if len(tokens) != n:
                raise UserError(f"{path} has {len(tokens):,} tokens, {MANIFEST} says {n:,}; prepare the data again")
        self.ends = np.cumsum([len(s) for s in self.shards]).tolist()  # where each shard ends in the stream
        self.n_tokens = self.ends[-1]
        self.has_pairs = self.manifest is not None and "template" in self.manifest
        self.n_windows = self.pack_pairs() if self.has_pairs else max(0, (self.n_tokens - T - 1) // self.stride + 1)
        if self.n_windows == 0:
            raise UserError(f"the {split} split of {data} has {self.n_tokens:,} tokens; a window takes block_size + 1 = {T + 1}")
        if self.has_pairs and self.stride != T:
            raise UserError(f"stride={stride} is for running text; {data} holds pairs")
        self.position = 0
        self.pool = ThreadPoolExecutor(1)  # reads the next batch while the device works on this one
        self.ahead = None  # (position, what is read there)

    def pack_pairs(self):
        """Where the pairs are, which of them share a window, and how many tokens each window has to teach.  -> how many windows"""
        if self.T < 3:
            raise UserError(f"block_size={self.T} is too small for pairs, which take three tokens at least")
        self.masks = [read_mask(p) for p in self.paths]
        for path, tokens, mask in zip(self.paths, self.shards, self.masks):
            if len(mask) != len(tokens):
                raise UserError(f"{path} has {len(tokens):,} tokens, its mask {len(mask):,}; prepare the data again")
        flags = np.concatenate(self.masks)
        self.begins = np.flatnonzero(flags == BEGINS)
        self.lengths = np.diff(self.begins, append=len(flags))
        learned = np.add.reduceat(flags == LEARNED, self.begins, dtype=np.int64) + 1  # and the end of the text
        self.shortened, self.unended = np.flatnonzero(self.lengths > self.T), 0
        for i in self.shortened:
            own = cut(flags[self.begins[i]:self.begins[i] + self.lengths[i]], self.T)[1]
            learned[i] = np.count_nonzero(own[1:] == LEARNED)
            self.unended += own[-1] != LEARNED
        rows = pack(np.minimum(self.lengths, self.T), self.T)
        # The longest came first. In another order the first windows are as good as any, for a validation that takes no more.
        self.rows = [rows[i] for i in permute(np.arange(len(rows)), len(rows), seed=0, epoch=0)]
        self.row_learned = np.array([learned[row].sum() for row in self.rows])
        return len(self.rows)

    def next_batch(self):
        """
        -> x (B, T), y (B, T): this process's share of the next B * world_size windows; y is x one token later, or -1 where nothing
        is to be learned. With doc_mask also the number of the document, or pair, that each position of x is in, (B, T).
        """
        if self.ahead is None or self.ahead[0] != self.position:
            self.ahead = (self.position, self.pool.submit(self.read, self.share()))
        batch = self.ahead[1].result()
        self.position += self.B * self.world_size
        self.ahead = (self.position, self.pool.submit(self.read, self.share()))
        return self.to_device(batch)

    def windows(self, indices):
        """The windows of these indices, in the order of the stream: what validation reads.  -> as next_batch"""
        return self.to_device(self.read(indices))

    def share(self):
        """The indices of this process's next windows"""
        return self.order(self.position + self.rank * self.B, self.B)

    def order(self, position, n):
        """The indices of n windows from a position on. They may reach into the next epoch."""
        epoch, index = np.divmod(position + np.arange(n), self.n_windows)
        return np.concatenate([permute(index[epoch == e], self.n_windows, self.seed, e) for e in np.unique(epoch)])

    def learned(self, n):
        """How many tokens the next n windows, of all processes, have to teach"""
        return int(self.row_learned[self.order(self.position, n)].sum()) if self.has_pairs else n * self.T

    def places(self, n, shown=4):
        """Where the last n windows, of all processes, begin: "d/train_000000.bin at token 4,096, ... and 508 more" """
        begins = []
        for i in self.order(self.position - n, n)[:shown]:
            at = int(self.begins[self.rows[i][0]] if self.has_pairs else i * self.stride)
            shard = bisect.bisect_right(self.ends, at)
            begins.append(f"{self.paths[shard]} at token {at - self.ends[shard] + len(self.shards[shard]):,}")
        return ", ".join(begins) + f" and {n - shown} more" * (n > shown)

    def read(self, indices):
        """-> (2 or 3, n, T) int64"""
        batch = np.stack([self.read_pairs(i) if self.has_pairs else self.read_window(i) for i in indices], axis=1)
        for tokens in self.shards:
            # Pages once read would stay in this process's resident memory until it has the whole data set (nanoGPT issue 287).
            if hasattr(mmap, "MADV_DONTNEED") and isinstance(tokens.base, mmap.mmap):
                tokens.base.madvise(mmap.MADV_DONTNEED)
        batch = torch.from_numpy(batch)
        return batch.pin_memory() if self.device.type == "cuda" else batch

    def read_window(self, i):
        row = self.span(self.shards, int(i) * self.stride, self.T + 1)
        return row[:-1], row[1:], *[np.cumsum(row[:-1] == self.eot)] * self.doc_mask

    def read_pairs(self, i):
        """A window of whole pairs. What is left of it is filled with end-of-text tokens, of which nothing is learned."""
        x, y, number, at = np.full(self.T, self.eot), np.full(self.T, -1), np.full(self.T, -1), 0
        for k, pair in enumerate(self.rows[i]):
            tokens, flags = (self.span(arrays, self.begins[pair], self.lengths[pair]) for arrays in (self.shards, self.masks))
            kept, flags = cut(flags, self.T)
            here = slice(at, at + len(kept))
            x[here], y[here], number[here] = tokens[kept], np.append(tokens[kept][1:], self.eot), k
            y[here][flags[1:] != LEARNED] = -1
            at += len(kept)
        return x, y, *[number] * self.doc_mask

    def span(self, arrays, at, n):
        """n tokens of the stream, or n flags, from one place on; they may cross shard ends."""
        row = np.empty(n, dtype=np.int64)
        shard, filled = bisect.bisect_right(self.ends, at), 0
        while filled < n:
            whole = arrays[shard]
            begin = at + filled - (self.ends[shard] - len(whole))
            part = whole[begin:begin + n - filled]
            if self.vocab_size and len(part) and part.max() >= self.vocab_size:
                where = begin + int(np.argmax(part >= self.vocab_size))
                raise UserError(f"{self.paths[shard]}: token {whole[where]} at {where:,} is outside the vocabulary of {self.vocab_size:,}")
            row[filled:filled + len(part)] = part
            filled, shard = filled + len(part), shard + 1
        return row

    def to_device(self, batch):
        return tuple(batch.to(self.device, non_blocking=True))

    def filling(self, B):
        """What the positions of a batch of B windows are used for, in up to three remarks"""
        if not self.has_pairs:
            padded = self.padded_share(B) if B > 1 and self.manifest else None
            return [f"every position a token (padded to the longest document, {padded:.0%})"] if padded else []
        used = np.minimum(self.lengths, self.T).sum() / (self.n_windows * self.T)
        remarks = [f"{len(self.lengths):,} pairs in {self.n_windows:,} windows, {used:.1%} of the positions used"]
        if len(self.shortened):
            remarks.append(f"{len(self.shortened):,} pairs are longer than the context and lose the beginning of the prompt"
                           + f", {self.unended:,} of them the end of the response, too" * bool(self.unended))
        return remarks

    def padded_share(self, B):
        """
        What share of positions would hold a token, were a row not a window but a document, or T tokens of a longer one, and B
        of them padded to the longest. Counted over the first million tokens; None where they make no B rows.
        """
        tokens = self.shards[0][:1_000_000]
        lengths = np.diff(np.flatnonzero(tokens == self.eot), append=len(tokens)).tolist()
        rows = np.array([min(self.T, n - i) for n in lengths for i in range(0, n, self.T)])
        rows = rows[:len(rows) // B * B].reshape(-1, B)
        return rows.sum() / (B * rows.max(axis=1).sum()) if len(rows) else None

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.position = state["position"]


def cut(flags, T):
    """
    The flags of a pair -> which of its tokens a window of T takes, and their flags and that of the end of the text. What is too
    long keeps its first token, which begins it, and loses the beginning of the prompt, and only then the end of the response.
    """
    n = len(flags)
    if n <= T:
        return np.arange(n), np.append(flags, LEARNED)
    asked = np.flatnonzero(flags != LEARNED)[-1]  # the last response follows it
    first = min(n - T + 1, asked)
    kept = np.append(0, np.arange(first, first + T - 1))
    flags = np.append(flags[kept], LEARNED * (first + T - 1 == n))
    flags[1] = 0  # what led to it is gone
    return kept, flags


def pack(lengths, T):
    """
    Best fit, the longest first: lengths of at most T -> rows of indices whose lengths add up to at most T.

    >>> pack(np.array([5, 3, 2, 6, 2]), 8)
    [[3, 2], [0, 1], [4]]
    """
    rows, rooms, having = [], [], defaultdict(list)  # the sizes of room there are, in order, and the rows that have each
    for i in np.argsort(-lengths, kind="stable").tolist():
        n = int(lengths[i])
        at = bisect.bisect_left(rooms, n)
        if at == len(rooms):
            row, room = len(rows), T
            rows.append([])
        else:
            room = rooms[at]
            row = having[room].pop()
            if not having[room]:
                del rooms[at]
        rows[row].append(i)
        room -= n
        if room:
            if not having[room]:
                bisect.insort(rooms, room)
            having[room].append(row)
    return rows


def permute(index, n, seed, epoch):
    """
    A seeded bijection of 0..n-1, computed and not stored: a Feistel network over the next power of four, walked on until
    it lands below n.

    >>> sorted(permute(np.arange(10), 10, seed=1, epoch=0).tolist())
    [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    """
    half = max(1, -(-int(n - 1).bit_length() // 2))
    mask = np.uint64((1 << half) - 1)
    keys = np.random.SeedSequence([seed, epoch]).generate_state(6, np.uint64)
    x = np.asarray(index).astype(np.uint64)
    walking = np.ones(len(x), dtype=bool)
    while walking.any():
        left, right = x[walking] >> np.uint64(half), x[walking] & mask
        for key in keys:
            mixed = (right ^ key) * np.uint64(0x9E3779B97F4A7C15)
            mixed = (mixed ^ mixed >> np.uint64(29)) * np.uint64(0xBF58476D1CE4E5B9)
            left, right = right, left ^ (mixed >> np.uint64(32) & mask)
        x[walking] = left << np.uint64(half) | right
        walking[walking] = x[walking] >= n
    return x.astype(np.int64)


def find_shards(data, split):
    """-> the paths of a split's shards, the tokens each should hold, and the manifest; not the last two for other people's shards"""
    if not os.path.isdir(data):
        raise UserError(f"there is no data folder {data}; make it with: python dataset.py --source=... --out={data}")
    manifest = read_manifest(data)
    if manifest is None:
        if os.path.exists(os.path.join(data, PROGRESS)):
            raise UserError(f"{data} is unfinished; run its python dataset.py command again to complete it")
        names = sorted(n for n in os.listdir(data) if split in n and n.endswith((".bin", ".npy")))
        if not names:
            raise UserError(f"{data} has no *{split}*.bin or *{split}*.npy shards")
        return [os.path.join(data, n) for n in names], [], None
    shards = [s for s in manifest["shards"] if s["split"] == split]
    if not shards:
        raise UserError(f"{data} has no {split} split")
    return [os.path.join(data, s["file"]) for s in shards], [s["tokens"] for s in shards], manifest
