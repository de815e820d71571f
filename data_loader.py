"""
Token shards in, batches out, in an order that is a pure function of (data, seed, position).

The stream of all shards is cut into windows of T+1 tokens, which may cross shard ends. Every epoch visits each window once,
in an order of its own, whatever the number of processes or the micro-batch: the loader's whole state is one integer, how
many windows all processes have taken together.
"""
import bisect
import mmap
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from dataset import MANIFEST, PROGRESS, UserError, read_manifest, read_shard


class DataLoader:
    def __init__(self, data, split, B, T, rank=0, world_size=1, seed=0, stride=None, vocab_size=None, device="cpu"):
        self.B, self.T, self.rank, self.world_size, self.seed = B, T, rank, world_size, seed
        self.stride, self.device = stride or T, torch.device(device)
        self.paths, lengths, self.manifest = find_shards(data, split)
        self.vocab_size = vocab_size or (self.manifest or {}).get("vocab_size")
        self.shards = [read_shard(p) for p in self.paths]
        for path, tokens, n in zip(self.paths, self.shards, lengths):
            if len(tokens) != n:
                raise UserError(f"{path} has {len(tokens):,} tokens, {MANIFEST} says {n:,}; prepare the data again")
        self.ends = np.cumsum([len(s) for s in self.shards]).tolist()  # where each shard ends in the stream
        self.n_tokens = self.ends[-1]
        self.n_windows = max(0, (self.n_tokens - T - 1) // self.stride + 1)
        if self.n_windows == 0:
            raise UserError(f"the {split} split of {data} has {self.n_tokens:,} tokens; a window takes block_size + 1 = {T + 1}")
        self.position = 0
        self.pool = ThreadPoolExecutor(1)  # reads the next batch while the device works on this one
        self.ahead = None  # (position, what is read there)

    def next_batch(self):
        """-> x (B, T), y (B, T): this process's share of the next B * world_size windows; y is x one token later."""
        if self.ahead is None or self.ahead[0] != self.position:
            self.ahead = (self.position, self.pool.submit(self.read, self.order(self.position)))
        batch = self.ahead[1].result()
        self.position += self.B * self.world_size
        self.ahead = (self.position, self.pool.submit(self.read, self.order(self.position)))
        return self.to_device(batch)

    def windows(self, indices):
        """The windows of these indices, in the order of the stream: what validation reads.  -> x, y (len(indices), T)"""
        return self.to_device(self.read(indices))

    def order(self, position):
        """The indices of this process's windows at a position. A batch may reach into the next epoch."""
        taken = position + self.rank * self.B + np.arange(self.B)
        epoch, index = np.divmod(taken, self.n_windows)
        return np.concatenate([permute(index[epoch == e], self.n_windows, self.seed, e) for e in np.unique(epoch)])

    def read(self, indices):
        out = np.empty((len(indices), self.T + 1), dtype=np.int64)
        for row, i in zip(out, indices):
            at = int(i) * self.stride
            shard, filled = bisect.bisect_right(self.ends, at), 0
            while filled < len(row):
                tokens = self.shards[shard]
                begin = at + filled - (self.ends[shard] - len(tokens))
                part = tokens[begin:begin + len(row) - filled]
                if self.vocab_size and len(part) and part.max() >= self.vocab_size:
                    where = begin + int(np.argmax(part >= self.vocab_size))
                    raise UserError(f"{self.paths[shard]}: token {tokens[where]} at {where:,} is outside the vocabulary of {self.vocab_size:,}")
                row[filled:filled + len(part)] = part
                filled, shard = filled + len(part), shard + 1
        for tokens in self.shards:
            # Pages once read would stay in this process's resident memory until it has the whole data set (nanoGPT issue 287).
            if hasattr(mmap, "MADV_DONTNEED") and isinstance(tokens.base, mmap.mmap):
                tokens.base.madvise(mmap.MADV_DONTNEED)
        batch = torch.from_numpy(out)
        return batch.pin_memory() if self.device.type == "cuda" else batch

    def to_device(self, batch):
        batch = batch.to(self.device, non_blocking=True)
        return batch[:, :-1].contiguous(), batch[:, 1:].contiguous()

    def padded_share(self, B):
        """
        What share of positions would hold a token, were a row not a window but a document, or T tokens of a longer one, and B
        of them padded to the longest. Counted over the first million tokens; None where they make no B rows.
        """
        tokens = self.shards[0][:1_000_000]
        lengths = np.diff(np.flatnonzero(tokens == self.manifest["eot"]), append=len(tokens)).tolist()
        rows = np.array([min(self.T, n - i) for n in lengths for i in range(0, n, self.T)])
        rows = rows[:len(rows) // B * B].reshape(-1, B)
        return rows.sum() / (B * rows.max(axis=1).sum()) if len(rows) else None

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.position = state["position"]


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
