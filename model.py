"""
GPT-2 (Radford et al., 2019), with options for the variants that later models use.

The defaults of GPTConfig are GPT-2 124M. Parameters have the names of Hugging Face's and nanoGPT's GPT-2
(transformer.wte.weight, transformer.h.0.attn.c_attn.weight, ...), so weights can be exchanged with both.
"""
import contextlib
import ctypes
import functools
import glob
import importlib.util
import math
import os
import pickletools
import re
import sys
import zipfile
from dataclasses import dataclass

import torch
import torch.nn as nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from dataset import (DTYPES, TOKENIZER_SPEC, UserError, ask_hub, check_spec, check_types, get_tokenizer, read_json,
                     read_spec, reading, write_atomically, write_json)

GPT2_TOKENS = 50257
GPT2_PADDED = 50304  # the next multiple of 128: matrix products are faster
MAX_SIZE = 2**17  # of any number in a shape: a larger one is a mistake or a damaged file
# cuDNN's attention is the fastest in the long run, but spends 25 ms or more on each new shape.
NOT_CUDNN = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]

CHOICES = {
    "pos": ("learned", "sinusoidal", "rotary"),
    "norm": ("layer", "rms"),
    "act": ("gelu", "gelu_erf", "relu2"),
    "attention": ("fused", "flash", "reference"),
}


@dataclass
class GPTConfig:
    block_size: int = 1024  # T, the context: how many tokens the model sees at once
    vocab_size: int = GPT2_PADDED  # rows of the embedding; in train.py 0 means the tokenizer's size, padded to 128
    n_tokens: int = 0  # ids in use, the rest is padding and never sampled; 0: all, or 50,257 if vocab_size is 50,304
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True  # in linear layers and LayerNorms
    qkv_bias: bool = True  # in the query-key-value projection, if bias
    pos: str = "learned"  # learned | sinusoidal | rotary
    tie_head: bool = True  # the output head shares the token embedding
    head_bias: bool = False
    norm: str = "layer"  # layer | rms
    act: str = "gelu"  # gelu (tanh approximation, as in GPT-2) | gelu_erf (exact, as in nanoGPT) | relu2
    qk_norm: bool = False  # normalise queries and keys per head
    embed_norm: bool = False  # normalise the embedding of each token
    softcap: float = 0.0  # logits -> c * tanh(logits / c); 0: off
    zero_init: bool = False  # residual projections start at zero instead of GPT-2's scaled normal
    attention: str = "fused"  # fused (the fastest) | flash (torch's kernel, not cuDNN's) | reference (written out)

    def __post_init__(self):
        if not self.n_tokens:
            self.n_tokens = GPT2_TOKENS if self.vocab_size == GPT2_PADDED else self.vocab_size
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise UserError(f"{name}={getattr(self, name)!r} must be one of {', '.join(allowed)}")
        for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd"):
            if not 1 <= getattr(self, name) <= MAX_SIZE:
                raise UserError(f"{name}={getattr(self, name)} must be from 1 to {MAX_SIZE:,}")
        if self.n_embd % self.n_head:
            raise UserError(f"n_embd={self.n_embd} must be a multiple of n_head={self.n_head}")
        if self.pos == "rotary" and self.n_embd // self.n_head % 2:
            raise UserError(f"pos=rotary needs an even head size, not n_embd/n_head={self.n_embd // self.n_head}")
        if self.pos == "sinusoidal" and self.n_embd % 2:
            raise UserError(f"pos=sinusoidal needs an even n_embd, not {self.n_embd}")
        if not 1 <= self.n_tokens <= self.vocab_size:
            raise UserError(f"vocab_size={self.vocab_size} is too small for {self.n_tokens} tokens")
        if not 0 <= self.dropout < 1:
            raise UserError(f"dropout={self.dropout} must be at least 0 and below 1")
        if not 0 <= self.softcap < math.inf:
            raise UserError(f"softcap={self.softcap} must be a number of at least 0")


# Shapes of GPT-2, of the five trainers in the README, and our own: what differs from GPTConfig's defaults.
TOYGPT = dict(block_size=512, vocab_size=GPT2_TOKENS, pos="sinusoidal", head_bias=True)
TINYSTORIES = dict(vocab_size=GPT2_TOKENS, tie_head=False, qkv_bias=False, dropout=0.1)
MODERN = dict(bias=False, pos="rotary", norm="rms", act="relu2", qk_norm=True, embed_norm=True)  # NanoChat's
CONFIGS = {
    "gpt2": {},
    "gpt2-medium": dict(n_layer=24, n_head=16, n_embd=1024),
    "gpt2-large": dict(n_layer=36, n_head=20, n_embd=1280),
    "gpt2-xl": dict(n_layer=48, n_head=25, n_embd=1600),
    "gpt-xs": dict(block_size=512),
    "custom-gpt": dict(n_head=10, n_embd=640, block_size=512, vocab_size=50000),
    "toygpt-small": dict(n_head=8, **TOYGPT),
    "toygpt-medium": dict(n_layer=16, n_head=8, n_embd=1024, **TOYGPT),
    "toygpt-large": dict(n_layer=24, n_head=16, n_embd=2048, **TOYGPT),
    "tinystories": dict(block_size=256, **TINYSTORIES),
    "tinystories-small": dict(n_layer=6, n_head=6, n_embd=384, block_size=128, **TINYSTORIES),
    "tinystories-large": dict(n_layer=24, n_head=16, n_embd=1024, block_size=512, **TINYSTORIES),
    "tiny": dict(n_layer=4, n_head=4, n_embd=128, block_size=256, **MODERN),
    "speedrun": dict(n_head=6, tie_head=False, softcap=15.0, zero_init=True, **MODERN),
}


# -- the network

def rms_norm(x, weight=None):
    return F.rms_norm(x, x.shape[-1:], weight, eps=1e-5)


class RMSNorm(nn.RMSNorm):
    def forward(self, x):
        return rms_norm(x, self.weight.to(x.dtype))  # one kernel needs one dtype


def make_norm(cfg):
    if cfg.norm == "rms":
        return RMSNorm(cfg.n_embd)
    return nn.LayerNorm(cfg.n_embd, bias=cfg.bias)


def sinusoids(T, C):
    """The positions of "Attention Is All You Need", 3.5: sine in even channels, cosine in odd ones.  -> (T, C)"""
    angle = torch.arange(T)[:, None] / 10000 ** (torch.arange(0, C, 2) / C)  # (T, C/2)
    return torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(1)  # (T, C/2, 2) -> (T, C)


def rotary_tables(T, hs):
    """The cosines, and the sines with the signs that rotate() needs.  -> (2, T, hs)"""
    angle = torch.arange(T)[:, None] * 10000 ** (-torch.arange(0, hs, 2) / hs)  # (T, hs/2)
    cos, sin = angle.cos(), angle.sin()
    return torch.stack((torch.cat((cos, cos), dim=1), torch.cat((-sin, sin), dim=1)))


def rotate(x, cos, sin):
    """
    Rotary position embedding (Su et al., 2021). Channel i is paired with i + hs/2.
    x is (B, nh, T, hs), cos and sin are (T, hs).
    """
    return x * cos + x.roll(x.size(-1) // 2, dims=-1) * sin


def isolate_documents(document):
    """
    The document each token belongs to, (B, T) -> positions that restart at 0 in each document, (B, T), and a causal
    mask that blocks attention across documents, (B, 1, T, T).
    """
    index = torch.arange(document.size(1), device=document.device)
    begins = document.diff(dim=1, prepend=document[:, :1] - 1) != 0
    start = torch.where(begins, index, 0).cummax(dim=1).values
    mask = (document[:, :, None] == document[:, None, :]) & (index[:, None] >= index)
    return index - start, mask[:, None]


def reference_attention(q, k, v, mask=None, dropout=0.0):
    """softmax(q k^T / sqrt(hs)) v over the past: what the fused kernel computes, one step per line"""
    T, S = q.size(-2), k.size(-2)  # T queries, at the last T of S positions
    if mask is None:
        mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.size(-1))  # (B, nh, T, hs) x (B, nh, hs, S) -> (B, nh, T, S)
    weights = scores.masked_fill(~mask, -math.inf).softmax(dim=-1)
    return F.dropout(weights, dropout, training=dropout > 0).to(v.dtype) @ v  # -> (B, nh, T, hs)


def matmul_attention(q, k, v, bias, dropout=0.0):
    """
    Attention as two batches of matrix products. q (B, nh, T, hs), k and v (B, nh, S, hs); the bias, (T, S) or
    (B, 1, T, S), is -inf where a query must not look. The fused kernels are slower in two cases:

    - On CUDA, one query with a mask: they do not divide the keys of a head among multiprocessors. With S = 1024 matrix
      products take a quarter of their time on an H200.
    - On a CPU, training in bfloat16: their backward pass hardly uses the CPU's bfloat16 instructions. With T = 256
      matrix products take a third of their time on an EPYC. The gain shrinks with T, and the scores take memory.
    """
    B, nh, S, hs = k.shape
    bias, q, k, v = (t.expand(B, nh, -1, -1).flatten(0, 1) for t in (bias, q, k, v))
    weights = torch.baddbmm(bias, q, k.mT, alpha=1 / math.sqrt(hs)).softmax(dim=-1)  # (B * nh, T, S)
    weights = F.dropout(weights, dropout, training=dropout > 0)
    return torch.bmm(weights, v).unflatten(0, (B, nh))


def attention_bias(mask, dtype):
    """A mask, True where a query may look -> what matmul_attention adds to the scores"""
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, -math.inf)


def matmul_attention_is_faster(x):
    """Whether training on x (B, T, C) is faster with matmul_attention than with a fused kernel"""
    return x.device.type == "cpu" and x.dtype == torch.bfloat16 and x.size(1) <= 512 and cpu_computes_in(x.dtype)


class Linear(nn.Linear):
    def forward(self, x, rows=None):
        """All outputs, or those of `rows`, a slice of the weight's rows"""
        weight, bias = self.weight, self.bias
        if rows is not None:
            weight, bias = weight[rows], None if bias is None else bias[rows]
        # For one input a CPU is limited by reading the weights, and half precision is twice as fast. From about eight
        # inputs on, a CPU without bfloat16 instructions is faster in float32, even with the weights' conversion.
        is_half = weight.dtype in (torch.bfloat16, torch.float16)
        n_inputs = x.numel() // x.size(-1)
        if is_half and x.device.type == "cpu" and n_inputs >= 8 and not cpu_computes_in(torch.bfloat16):
            bias = None if bias is None else bias.float()
            return F.linear(x.float(), weight.float(), bias).to(x.dtype)
        return F.linear(x, weight, bias)


class Int8Linear(nn.Module):
    """
    A Linear for generating text on a CPU, where reading the weights takes most of the time: a weight is an 8-bit
    integer times the scale of its row.
    """

    def __init__(self, layer):
        super().__init__()
        weight = layer.weight.detach()
        scales = (weight.abs().amax(dim=1).clamp(min=1e-30) / 127).bfloat16()
        integers = (weight / scales.float()[:, None]).round().clamp(-127, 127)
        self.weight, self.bias = nn.Parameter(integers.to(torch.int8), requires_grad=False), layer.bias
        self.register_buffer("scales", scales)

    def forward(self, x, rows=None):
        rows = slice(None) if rows is None else rows
        inputs, scales = x.flatten(0, -2).bfloat16(), self.scales[rows].bfloat16()  # (N, C), (rows,)
        y = torch.ops.aten._weight_int8pack_mm(inputs, self.weight[rows], scales)  # (N, rows)
        y = y.unflatten(0, x.shape[:-1]).to(x.dtype)
        return y if self.bias is None else y + self.bias[rows]


class CausalSelfAttention(nn.Module):
    def __init__(self, cfg, layer):
        super().__init__()
        self.cfg, self.layer = cfg, layer
        self.c_attn = Linear(cfg.n_embd, 3 * cfg.n_embd, bias=cfg.bias and cfg.qkv_bias)
        self.c_proj = Linear(cfg.n_embd, cfg.n_embd, bias=cfg.bias)

    def forward(self, x, rotary=None, mask=None, cache=None):
        B, T, C = x.shape
        q, k, v = self.c_attn(x).split(C, dim=2)
        q, k, v = (t.view(B, T, self.cfg.n_head, -1).transpose(1, 2) for t in (q, k, v))  # (B, T, C) -> (B, nh, T, hs)
        if self.cfg.qk_norm:
            q, k = rms_norm(q), rms_norm(k)
        if rotary is not None:
            cos, sin = (t.to(q.dtype) for t in rotary)
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if cache is not None:
            k, v = cache.add(self.layer, k, v)
            q = q.to(k.dtype)  # a cache may be in float32 where the weights are not
        dropout = self.cfg.dropout if self.training else 0.0
        if self.cfg.attention == "reference":
            y = reference_attention(q, k, v, mask, dropout)
        elif mask is not None and mask.is_floating_point():
            y = matmul_attention(q, k, v, mask, dropout)
        else:
            is_causal = mask is None and T > 1  # a single query may attend to everything in the cache
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=is_causal)
        if cache is not None:
            y = y.to(x.dtype)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))  # (B, nh, T, hs) -> (B, T, C)


class MLP(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.act = cfg.act
        self.c_fc = Linear(cfg.n_embd, 4 * cfg.n_embd, bias=cfg.bias)
        self.c_proj = Linear(4 * cfg.n_embd, cfg.n_embd, bias=cfg.bias)

    def forward(self, x):
        x = self.c_fc(x)  # (B, T, C) -> (B, T, 4C)
        if self.act == "relu2":
            x = F.relu(x).square()
        else:
            x = F.gelu(x, approximate="tanh" if self.act == "gelu" else "none")
        return self.c_proj(x)  # (B, T, 4C) -> (B, T, C)


class Block(nn.Module):
    def __init__(self, cfg, layer):
        super().__init__()
        self.cfg = cfg
        self.ln_1 = make_norm(cfg)
        self.attn = CausalSelfAttention(cfg, layer)
        self.ln_2 = make_norm(cfg)
        self.mlp = MLP(cfg)

    def forward(self, x, rotary=None, mask=None, cache=None):
        x = x + F.dropout(self.attn(self.ln_1(x), rotary, mask, cache), self.cfg.dropout, self.training)
        return x + F.dropout(self.mlp(self.ln_2(x)), self.cfg.dropout, self.training)


def mean_loss(logits, targets):
    """The mean cross-entropy of logits (B, T, vocab) over targets (B, T), those of -1 left out"""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)


class GPT(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.grad_checkpoint = False  # recompute each block in the backward pass: less memory, a third more time
        T, C = cfg.block_size, cfg.n_embd
        self.transformer = nn.ModuleDict({"wte": nn.Embedding(cfg.vocab_size, C)})
        if cfg.pos == "learned":
            self.transformer["wpe"] = nn.Embedding(T, C)
        self.transformer["h"] = nn.ModuleList(Block(cfg, layer) for layer in range(cfg.n_layer))
        self.transformer["ln_f"] = make_norm(cfg)
        self.lm_head = Linear(C, cfg.vocab_size, bias=cfg.head_bias)
        if cfg.tie_head:
            self.lm_head.weight = self.transformer.wte.weight
        self.make_tables()
        self.init_weights()

    def make_tables(self):
        """Positions that are computed, not learned"""
        T, C = self.cfg.block_size, self.cfg.n_embd
        # MKL picks a version of its vector functions at the first call. If two threads make it together, the tables
        # below differ in their last bits in one process of 15. So this is the first call, and a single element is
        # computed by one thread.
        torch.zeros(1).cos()
        if self.cfg.pos == "sinusoidal":
            self.register_buffer("sinusoids", sinusoids(T, C), persistent=False)
        if self.cfg.pos == "rotary":
            self.register_buffer("rotary", rotary_tables(T, C // self.cfg.n_head), persistent=False)

    def init_weights(self):
        """GPT-2's: normal(0, 0.02), scaled by 1/sqrt(2 * n_layer) where a layer adds to the residual stream"""
        for name, module in self.named_modules():
            if not isinstance(module, (nn.Linear, nn.Embedding)):
                continue
            is_residual = name.endswith("c_proj")
            if is_residual and self.cfg.zero_init:
                nn.init.zeros_(module.weight)
            else:
                scale = 1 / math.sqrt(2 * self.cfg.n_layer) if is_residual else 1
                nn.init.normal_(module.weight, std=0.02 * scale)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)

    def forward(self, idx, targets=None, document=None, with_logits=True):
        """
        idx (B, T) -> logits (B, T, vocab) and the mean loss over targets other than -1; without targets, the last
        position's logits only. If `document` (B, T) says which document each position belongs to, attention stays
        inside it. Without logits, as in training, the memory for them and for their gradient is saved.
        """
        x = self.hidden(idx) if document is None else self.hidden(idx, *isolate_documents(document))
        if targets is None:
            return self.logits(x[:, -1:]), None
        if not with_logits:
            return None, self.loss(x, targets)
        logits = self.logits(x)
        return logits, mean_loss(logits, targets)

    def loss(self, x, targets):
        """Final hidden states, (B, T, C) -> the mean loss, without returning logits"""
        return mean_loss(self.logits(x), targets)

    def set_compiled(self, on):
        """
        Compiles the blocks and the loss, or undoes that. All blocks share one compiled function, which takes far less
        time than compiling the whole model, and DDP can send a block's gradients while the next one's are computed.
        """
        for module, name in [(self, "loss"), *((block, "forward") for block in self.transformer.h)]:
            vars(module).pop(name, None)  # back to the method of the class
            if on:
                setattr(module, name, torch.compile(getattr(module, name), dynamic=False))

    def hidden(self, idx, positions=None, mask=None, cache=None):
        """
        idx (B, T) -> the final hidden states, (B, T, C). Positions, a slice or (B, T), are 0 to T-1 unless given. The
        mask, True where a position may attend to another, or its attention_bias, is causal unless given. With a cache,
        keys and values are stored in it, and attention covers everything stored.
        """
        if positions is None:  # with positions a row may be longer than block_size, as in HellaSwag
            T = idx.size(1)
            assert T <= self.cfg.block_size, f"{T} tokens exceed block_size={self.cfg.block_size}"
            positions = slice(T)
        x = self.transformer.wte(idx)  # (B, T) -> (B, T, C)
        if self.cfg.pos == "learned":
            # Not indexed by a tensor: that has a gradient which threads add up in any order.
            wpe = self.transformer.wpe
            x = x + (wpe.weight[positions] if isinstance(positions, slice) else wpe(positions))
        elif self.cfg.pos == "sinusoidal":
            x = x + self.sinusoids[positions]
        if self.cfg.embed_norm:
            x = rms_norm(x)
        x = F.dropout(x, self.cfg.dropout, self.training).to(compute_dtype(x))
        rotary = None
        if self.cfg.pos == "rotary":
            # (2, 1, T, hs), or (2, B, 1, T, hs) if each row has its own positions
            rotary = self.rotary[:, positions].unsqueeze(-3)
        if self.training and self.cfg.attention == "fused" and matmul_attention_is_faster(x):
            if mask is None:
                mask = torch.ones(x.size(1), x.size(1), dtype=torch.bool).tril()
            mask = attention_bias(mask, x.dtype)
        with contextlib.nullcontext() if self.training else sdpa_kernel(NOT_CUDNN):
            for block in self.transformer.h:
                if self.grad_checkpoint and self.training:
                    x = checkpoint(block, x, rotary, mask, use_reentrant=False)
                else:
                    x = block(x, rotary, mask, cache)
        return self.transformer.ln_f(x)

    def logits(self, x, rows=None):
        """Final hidden states, (..., C) -> logits, (..., vocab), or those of `rows`, a slice of the vocabulary"""
        logits = self.lm_head(x, rows)
        if self.cfg.softcap:
            logits = self.cfg.softcap * torch.tanh(logits.float() / self.cfg.softcap)
        return logits

    def param_counts(self):
        """Parameters by component; a tied head adds only its bias."""
        components = {"wte": "embeddings", "wpe": "positions", "attn": "attention", "mlp": "feed-forward",
                      "ln_": "norms", "lm_head": "head"}
        counts = dict.fromkeys(components.values(), 0)
        for name, p in self.named_parameters():  # lists a shared weight once, as wte
            [component] = [c for part, c in components.items() if part in name]
            counts[component] += p.numel()
        return {**counts, "total": sum(counts.values())}

    def flops_per_token(self):
        """Training FLOPs: 6 per weight in a matrix product (forward 2, backward 4); attention as in PaLM, appendix B"""
        n = self.param_counts()
        lookups = n["positions"] + (0 if self.cfg.tie_head else n["embeddings"])
        return 6 * (n["total"] - lookups) + 12 * self.cfg.n_layer * self.cfg.n_embd * self.cfg.block_size

    def quantize(self):
        """Replaces the matrices, but not the embedding, by 8-bit integers."""
        for module in list(self.modules()):
            for name, layer in module.named_children():
                # torch's kernel takes 16 weights of a row at a time, and reads beyond the end of others
                if isinstance(layer, Linear) and layer.in_features % 16 == 0:
                    setattr(module, name, Int8Linear(layer))

    # -- sampling

    @torch.inference_mode()
    def stream(self, prompts, temperature=1.0, top_k=None, top_p=None, generator=None):
        """
        prompts (B, T), or a list of B rows of any length above 0. Yields the next token of every row, (B, 1), without
        end. When a row fills its context, the older half of it is dropped.
        """
        was_training, device, T = self.training, self.transformer.wte.weight.device, self.cfg.block_size
        prompts = [torch.as_tensor(prompt, device=device)[-T:] for prompt in prompts]
        assert all(len(prompt) for prompt in prompts), "a prompt needs at least one token"
        cache, new = KVCache(self, len(prompts)), []
        self.eval()
        try:
            # A step is recorded as a CUDA graph, but not during training, where memory is short, nor under autocast,
            # which converts the weights in every step.
            may_record = not (was_training or torch.is_autocast_enabled("cuda"))
            cache.use_graph = device.type == "cuda" and may_record and self.cfg.attention != "reference"
            x = self.prefill(prompts, cache)
            while True:
                logits = self.logits(x)[:, :self.cfg.n_tokens]
                new.append(sample(logits, temperature, top_k, top_p, generator))
                yield new[-1]
                if max(cache.lengths) < T:
                    x = self.decode_step(new[-1], cache)
                else:
                    # A row has n + 1 tokens: n in the cache, and the newest. A full row keeps its newer half.
                    keep = [n + 1 if n < T else max(1, n // 2) for n in cache.lengths]
                    rows = zip(prompts, torch.cat(new, dim=1), keep)
                    prompts = [torch.cat((prompt, tokens))[-k:] for prompt, tokens, k in rows]
                    new = []
                    x = self.prefill(prompts, cache)
        finally:
            self.train(was_training)

    def prefill(self, rows, cache):
        """Fills the cache with rows of tokens in one pass.  -> the hidden state at the end of each, (B, C)"""
        cache.lengths = [len(row) for row in rows]
        idx = nn.utils.rnn.pad_sequence(rows, batch_first=True)  # nothing attends to padding that comes after it
        cache.write_at, cache.end = slice(idx.size(1)), idx.size(1)
        x = self.hidden(idx, cache=cache)  # (B, T, C)
        if not x.isfinite().all():
            raise UserError(NOT_FINITE)
        return x[torch.arange(len(rows), device=x.device), torch.tensor(cache.lengths, device=x.device) - 1]

    def decode_step(self, token, cache):
        """One more token per row, (B, 1).  -> the hidden state there, (B, C)"""
        longest, device = max(cache.lengths), token.device
        if cache.use_graph:
            lengths = torch.tensor(cache.lengths, device=device)
            cache.graph = cache.graph or StepGraph(self, token, lengths, cache)
            x = cache.graph(token, lengths)
        elif min(cache.lengths) < longest:
            x = self.decode_rows(token, torch.tensor(cache.lengths, device=device), cache, longest + 1)
        else:
            cache.write_at, cache.end = slice(longest, longest + 1), longest + 1
            x = self.hidden(token, cache.write_at, None, cache)[:, -1]
        cache.lengths = [n + 1 for n in cache.lengths]
        return x

    def decode_rows(self, token, lengths, cache, end):
        """
        decode_step for rows of different lengths, (B,): attention reads the cache up to `end`, masked. All shapes
        follow from `end`, so with a fixed one a step can be recorded.
        """
        cache.write_at, cache.end, positions = lengths, end, lengths[:, None]  # (B, 1)
        mask = (torch.arange(end, device=token.device) <= positions)[:, None, None]  # (B, 1, 1, end)
        if cache.use_graph:
            mask = attention_bias(mask, cache.k.dtype)
        return self.hidden(token, positions, mask, cache)[:, -1]

    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, generator=None):
        """idx (B, T) -> (B, T + max_new_tokens): the prompt and its continuation"""
        idx = idx.to(self.transformer.wte.weight.device)
        stream = self.stream(idx, temperature, top_k, top_p, generator)
        new = [next(stream) for _ in range(max_new_tokens)]
        stream.close()
        return torch.cat([idx, *new], dim=1)

    # -- Hugging Face

    def save_pretrained(self, folder, eot=None):
        """
        Writes config.json and the weights of a Hugging Face GPT-2 or NanoChat with the same logits for every token in
        use. `eot` is the id of end-of-text; by default the last token in use.  -> how many parameters that model has
        """
        if any(isinstance(module, Int8Linear) for module in self.modules()):
            raise UserError("a model of dtype int8 cannot be exported; load it in float32, bfloat16 or float16")
        config = export_config(self.cfg, self.cfg.n_tokens - 1 if eot is None else eot, self.lm_head.weight.dtype)
        weights = nanochat_weights(self) if config["model_type"] == "nanochat" else gpt2_weights(self)
        os.makedirs(folder, exist_ok=True)
        write_json(os.path.join(folder, "config.json"), config)
        if importlib.util.find_spec("safetensors"):
            from safetensors.torch import save
            content = save(weights, metadata={"format": "pt"})
            write_atomically(os.path.join(folder, "model.safetensors"), lambda f: f.write(content))
        else:
            write_atomically(os.path.join(folder, "pytorch_model.bin"), lambda f: torch.save(weights, f))
        return sum(weight.numel() for weight in weights.values())

    @classmethod
    def from_pretrained(cls, name):
        """load_checkpoint's model, without the rest"""
        return load_checkpoint(name)[0]


class KVCache:
    """Keys and values of B rows, with room for block_size tokens each. `lengths` counts the tokens of each row."""

    def __init__(self, model, B):
        cfg, weight = model.cfg, model.transformer.wte.weight
        dtype = compute_dtype(weight)
        if weight.device.type == "cpu" and not cpu_computes_in(torch.bfloat16):
            dtype = torch.float32  # with one query at a time, five times as fast as half precision
        shape = (cfg.n_layer, B, cfg.n_head, cfg.block_size, cfg.n_embd // cfg.n_head)
        self.k = torch.zeros(shape, dtype=dtype, device=weight.device)
        self.v = torch.zeros_like(self.k)
        self.lengths = [0] * B
        self.rows = torch.arange(B, device=weight.device)
        # Set before each pass: where the next keys and values go, a slice of positions or one position per row, and the
        # end of what attention reads.
        self.write_at, self.end = None, 0
        self.use_graph, self.graph = False, None  # whether a step is recorded as a CUDA graph, and that graph

    def add(self, layer, k, v):
        """Stores k and v, (B, nh, T, hs).  -> the keys and values of the layer that attention reads, (B, nh, S, hs)"""
        k, v = k.to(self.k.dtype), v.to(self.v.dtype)
        if isinstance(self.write_at, slice):
            self.k[layer, :, :, self.write_at], self.v[layer, :, :, self.write_at] = k, v
        else:
            self.k[layer, self.rows, :, self.write_at] = k[:, :, 0]
            self.v[layer, self.rows, :, self.write_at] = v[:, :, 0]
        return self.k[layer, :, :, :self.end], self.v[layer, :, :, :self.end]


class StepGraph:
    """decode_rows as a CUDA graph: launching its hundreds of small kernels one by one would take most of the time."""

    def __init__(self, model, token, lengths, cache):
        self.token, self.lengths, self.graph = token.clone(), lengths.clone(), torch.cuda.CUDAGraph()
        arguments = self.token, self.lengths, cache, cache.k.size(3)
        stream = graph_stream(token.device)
        stream.wait_stream(torch.cuda.current_stream(token.device))
        with torch.cuda.stream(stream):  # once before recording, so that cuBLAS has its memory
            model.decode_rows(*arguments)
        with torch.cuda.graph(self.graph, stream=stream, capture_error_mode="thread_local"):
            self.x = model.decode_rows(*arguments)

    def __call__(self, token, lengths):
        self.token.copy_(token)
        self.lengths.copy_(lengths)
        self.graph.replay()
        return self.x


@functools.cache
def graph_stream(device):
    return torch.cuda.Stream(device)  # one for all graphs: cuBLAS keeps memory for each stream


NOT_FINITE = "the model's output is not finite: its training has diverged, or its weights are damaged"


def sample(logits, temperature=1.0, top_k=None, top_p=None, generator=None):
    """logits (B, vocab) -> one token per row, (B, 1). Temperature 0 takes the most likely one."""
    if temperature < 1e-4:  # logits divided by it could overflow
        return logits.argmax(dim=-1, keepdim=True)
    logits, ids = logits.float() / temperature, None
    use_top_p = top_p is not None and top_p < 1
    if top_k:
        logits, ids = logits.topk(min(top_k, logits.size(-1)))  # in descending order
    elif use_top_p:
        logits, ids = logits.sort(dim=-1, descending=True)
    probs = logits.softmax(dim=-1)
    if use_top_p:
        # Keep the smallest set of tokens that reaches top_p: drop a token if those before it already do.
        drop = probs.cumsum(dim=-1) - probs >= top_p
        drop[:, 0] = False  # the most likely one stays
        probs = probs.masked_fill(drop, 0)
    try:
        choice = torch.multinomial(probs, 1, generator=generator)
    except RuntimeError:  # on a CPU; CUDA does not check
        if probs.isfinite().all():
            raise
        raise UserError(NOT_FINITE) from None
    return choice if ids is None else ids.gather(-1, choice)


# -- devices

def pick_device(name="auto", local_rank=0):
    """auto | cuda | cuda:1 | mps | cpu -> torch.device"""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device("cuda", local_rank) if name == "cuda" else torch.device(name)
        if device.type not in ("cuda", "mps", "cpu"):
            raise RuntimeError("it must be auto, cuda, cuda:1, mps or cpu")
        if device.type == "cpu":
            use_large_pages()
        torch.ones(1, device=device).item()  # runs a kernel: torch may be built for newer GPUs
    except (RuntimeError, AssertionError) as e:  # torch raises either for a device that is not there
        raise UserError(f"device={name} cannot be used here: {str(e).splitlines()[0]}") from None
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def use_large_pages():
    """Makes torch use large pages, and glibc keep freed memory: with fewer page faults a CPU step is 1.4x as fast."""
    if sys.platform != "linux":
        return
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # read at each allocation
    with contextlib.suppress(OSError, AttributeError):  # a C library without mallopt
        M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # <malloc.h>
        ctypes.CDLL(None).mallopt(M_TRIM_THRESHOLD, -1)
        ctypes.CDLL(None).mallopt(M_MMAP_MAX, 0)


def autocast(device, dtype):
    """Matrices are multiplied in this dtype; the weights stay in float32."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def compute_dtype(tensor):
    """Autocast's dtype if autocast is on, else the tensor's"""
    device_type = tensor.device.type
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else tensor.dtype


def pick_dtype(name, device):
    """
    auto is bfloat16 where the hardware computes in it, else float16 on CUDA, else float32. int8 says how matrices are
    stored; all else is float32 then.
    """
    if name == "int8":
        return torch.float32
    if name in DTYPES:
        return getattr(torch, name)
    if name != "auto":
        raise UserError(f"dtype={name} must be one of auto, {', '.join(DTYPES)}, int8")
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return torch.bfloat16 if device.type == "cpu" and cpu_computes_in(torch.bfloat16) else torch.float32


@functools.cache
def cpu_computes_in(dtype):
    cpu = getattr(torch.cpu, "get_capabilities", dict)()  # torch 2.11 lacks it: then there are none
    names = {torch.bfloat16: ("avx512_bf16", "amx_bf16"), torch.float16: ("avx512_fp16", "amx_fp16")}[dtype]
    return any(cpu.get(name) for name in names)


# -- checkpoints

CHECKPOINT_VERSION = 2


def find_checkpoints(out_dir):
    """The complete checkpoints of a run, oldest first"""
    folder = os.path.join(out_dir, "checkpoints")
    names = os.listdir(folder) if os.path.isdir(folder) else []
    paths = [os.path.join(folder, name) for name in names if re.fullmatch(r"model_\d+\.pt", name)]
    return sorted(filter(checkpoint_files, paths), key=checkpoint_step)


def part_path(path, rank, count):
    return os.path.join(path, f"part_{rank:04d}_of_{count:04d}.pt")


def checkpoint_files(path):
    """
    The files of a checkpoint: itself, or if it is a folder, the parts that the processes of a run wrote. [] unless it
    is complete. A folder may hold two sets, if a run was resumed there by another number of processes: then the newer.
    """
    if not os.path.isdir(path):
        return [path] if os.path.exists(path) else []
    def age(file):
        with contextlib.suppress(OSError):  # another process may be removing it
            return -os.path.getmtime(file)
        return 0.0

    for first in sorted(glob.glob(os.path.join(glob.escape(path), "part_0000_of_[0-9][0-9][0-9][0-9].pt")), key=age):
        count = int(first[-7:-3])
        files = [part_path(path, rank, count) for rank in range(count)]
        if all(map(os.path.exists, files)):
            return files
    return []


def checkpoint_step(path):
    return int(re.search(r"model_(\d+)\.pt$", path)[1])


def newest_checkpoint(out_dir):
    if paths := find_checkpoints(out_dir):
        return paths[-1]
    raise UserError(f"{out_dir}/checkpoints has no checkpoint; train a model (python train.py --recipe=tiny), or name "
                    "one with --ckpt")


def find_model(name, out_dir="."):
    """What a model is loaded from: of a run's folder, or of out_dir if there is no name, the newest checkpoint"""
    if not name:
        return newest_checkpoint(out_dir)
    return newest_checkpoint(name) if os.path.isdir(os.path.join(name, "checkpoints")) else name


class ForeignConfig:
    """Stands in for the class GPTConfig in build-nanogpt's checkpoints: its fields, without its code"""


def makes_bytearray(pickled):
    """Whether a pickle makes a bytearray: torch allows that, of any size, though no checkpoint needs it."""
    return any(operation.name == "GLOBAL" and argument.endswith(" bytearray")
               for operation, argument, _ in pickletools.genops(pickled))


def load_file(path, mapped=False):
    """
    What torch.save wrote, on the CPU; mapped, several processes share its memory. With weights_only a hostile file
    cannot run code; torch itself neither compares the checksums in the file nor limits what compressed parts of it
    expand to.
    """
    with open(path, "rb") as f:
        is_zip = f.read(4) == b"PK\3\4"  # as torch decides
    if is_zip:
        with open(path, "rb") as f, zipfile.ZipFile(f) as archive:
            # Python takes the list of records that precedes the file's end, torch the one at the offset given there.
            if zipfile._EndRecData(f)[zipfile._ECD_OFFSET] != archive.start_dir:
                raise ValueError("two lists of records")
            if any(record.compress_type for record in archive.infolist()):
                raise ValueError("compressed")
            pickles = [archive.read(name) for name in archive.namelist() if name.endswith("data.pkl")]
            if any(map(makes_bytearray, pickles)):
                raise ValueError("a bytearray")
            if part := archive.testzip():
                raise UserError(f"{path} is damaged: the checksum of {part} is wrong")
    classes = torch.serialization.get_unsafe_globals_in_checkpoint(path) if is_zip else []
    configs = [(ForeignConfig, name) for name in classes if name.endswith(".GPTConfig")]
    mapped = mapped and is_zip and not re.search("[\ud800-\udfff]", path)  # torch maps files with names in UTF-8
    with torch.serialization.safe_globals(configs):
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)


def join_parts(parts, join):
    """
    The same dict from every process -> one. Each tensor becomes join([its parts]); anything else, also a scalar tensor,
    is taken from the first.
    """
    first = parts[0]
    if isinstance(first, dict):
        return {key: join_parts([part[key] for part in parts], join) for key in first}
    if not torch.is_tensor(first) or not first.dim():
        return first
    if any(map(repeats_values, parts)):
        raise ValueError("repeats its values")
    return join(parts)


def read_checkpoint(path, mapped=False):
    """
    -> a checkpoint as a dict, its entries checked as far as a model and its tokenizer need them. If it is in parts, its
    weights are joined here; an optimizer's tensors become lists, of one part per process.
    """
    files = checkpoint_files(path)
    if not files:
        problem = f"{path} is not complete: parts of it are missing" if os.path.isdir(path) else \
            f"there is no checkpoint {path}"
        raise UserError(problem)
    with reading(path, "a checkpoint"):
        parts = [load_file(file, mapped or len(files) > 1) for file in files]
        ckpt = parts[0]
        check_types(ckpt, {})
        if len(files) > 1:
            if any((part["step"], part["data_fingerprint"]) != (ckpt["step"], ckpt["data_fingerprint"])
                   for part in parts):
                raise ValueError("parts of different runs")
            for part in parts:
                check_sharing(part["model"].values())
            ckpt["model"] = join_parts([part["model"] for part in parts], torch.cat)
            ckpt["optimizers"] = [join_parts(o, list) for o in zip(*(part["optimizers"] for part in parts))]
        if "version" not in ckpt:
            return ckpt
        check_types(ckpt, dict(version=0))
        if ckpt["version"] != CHECKPOINT_VERSION:
            raise UserError(f"{path} has checkpoint version {ckpt['version']}; this program reads version "
                            f"{CHECKPOINT_VERSION}")
        check_spec(ckpt["tokenizer"], ckpt.get("template"))
        like = dict(step=0, model={}, model_config={}, run={}, train_config={})
        check_types({"run": {}, "train_config": {}, **ckpt}, like)  # these two may be missing
        for name in ("last_val", "best"):
            check_types(ckpt.get("run", {}).get(name, {}), {})
        return ckpt


def convert_foreign(ckpt):
    """A checkpoint of nanoGPT or build-nanogpt, or a state dict like theirs -> the required parts of one of ours"""
    weights = ckpt.get("model", ckpt)
    # DDP and torch.compile put something before the names.
    weights = {re.sub(r"^(module\.|_orig_mod\.)+", "", k): v for k, v in weights.items() if torch.is_tensor(v)}
    config = ckpt.get("config")
    args = vars(config) if isinstance(config, ForeignConfig) else ckpt.get("model_args", {})
    vocab_size, n_embd = weights["transformer.wte.weight"].shape
    model_config = dict(
        vocab_size=vocab_size, n_embd=n_embd, block_size=len(weights["transformer.wpe.weight"]),
        n_layer=count_layers(weights),
        n_head=args.get("n_head", max(1, n_embd // 64)),  # the weights do not say; GPT-2's heads are 64 wide
        bias="transformer.ln_f.bias" in weights,
        tie_head=torch.equal(weights["transformer.wte.weight"], weights["lm_head.weight"]),
        act="gelu_erf" if "model_args" in ckpt else "gelu")  # nanoGPT's GELU is the exact one
    step = int(ckpt.get("iter_num", ckpt.get("step", 0)))
    return {"model": weights, "model_config": model_config, "tokenizer": {"name": "gpt2"}, "step": step}


def count_layers(weights):
    return len({m[1] for name in weights if (m := re.match(r"transformer\.h\.(\d+)\.", name))})


def repeats_values(tensor):
    """Whether a copy would take more memory than the tensor's storage: a file can repeat a value by a stride of 0"""
    return tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes()


def check_sharing(tensors):
    """Raises an error if tensors would take far more memory than what they share: a tied head may be stored twice."""
    tensors = list(filter(torch.is_tensor, tensors))
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    if sum(t.numel() * t.element_size() for t in tensors) > 2 * sum(storages.values()):
        raise ValueError("repeats its values")


def build_model(cfg, weights, source):
    """A model with the weights of a state dict. Nothing is allocated before their names and shapes are known to fit."""
    with reading(source, "a model's weights"):
        masks = (".attn.bias", ".attn.masked_bias")  # causal masks, stored by old versions of other projects
        weights = {name: tensor for name, tensor in weights.items() if not name.endswith(masks)}
        check_sharing(weights.values())
        if (n_layer := count_layers(weights)) != cfg.n_layer:
            raise UserError(f"{source} does not fit the model: it has {n_layer} layers, not {cfg.n_layer}")
        with torch.device("meta"):
            model = GPT(cfg)
        expected = model.state_dict()
        problems = [f"{k} is missing" for k in expected.keys() - weights.keys()]
        problems += [f"{k} is unexpected" for k in weights.keys() - expected.keys()]
        for k in expected.keys() & weights.keys():
            if expected[k].shape != weights[k].shape:
                problems.append(f"{k} is {tuple(weights[k].shape)}, not {tuple(expected[k].shape)}")
            elif repeats_values(weights[k]):
                problems.append(f"{k} repeats its values")
            elif not weights[k].is_floating_point():
                problems.append(f"{k} is of type {weights[k].dtype}")
            elif not weights[k].isfinite().all():
                problems.append(f"{k} has values that are not finite: training diverged, or the file is damaged")
        if problems:
            more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
            raise UserError(f"{source} does not fit the model: {sorted(problems)[0]}{more}")
        model.load_state_dict({k: v.float().contiguous() for k, v in weights.items()}, assign=True)
        if cfg.tie_head:
            model.lm_head.weight = model.transformer.wte.weight
        model.make_tables()
        return model


def make_config(values, path):
    """A GPTConfig from a file's dict. Unknown fields, and values of a wrong type, are errors."""
    known = vars(GPTConfig())
    if not values.keys() <= known.keys():
        raise UserError(f"{path} has unknown fields in its model_config; is it from a newer version?")
    with reading(path, "a checkpoint"):
        check_types({**known, **values}, known)
    return GPTConfig(**values)


def load_checkpoint(name, device="cpu"):
    """
    A checkpoint, a run's folder, a Hugging Face folder or name -> the model, ready for use, and the rest as a dict:
    tokenizer, and of a checkpoint step, settings, ...
    """
    if os.path.isdir(name):
        name = os.path.normpath(name)  # without the slash that a shell adds when it completes a name
    name = find_model(name)
    if os.path.isfile(name) or name.endswith(".pt"):
        rest = read_checkpoint(name)
        if "version" not in rest:
            with reading(name, "a checkpoint of train.py, nanoGPT or build-nanogpt"):
                rest = convert_foreign(rest)
        model = build_model(make_config(rest["model_config"], name), rest.pop("model"), name)
    else:
        spec = os.path.join(name, TOKENIZER_SPEC)  # in an export of ours
        content = read_spec(spec) if os.path.exists(spec) else {"tokenizer": {"name": "gpt2"}}
        rest = dict(tokenizer=content["tokenizer"], template=content.get("template"))
        model = load_hugging_face(name)
        if os.path.exists(spec):
            model.cfg.n_tokens = model.cfg.vocab_size  # without padding
    if rest["tokenizer"]["name"] != "gpt2":  # which one would have to download
        n_vocab = get_tokenizer(rest["tokenizer"]).n_vocab
        if n_vocab != model.cfg.n_tokens:
            raise UserError(f"{name} has {model.cfg.n_tokens:,} tokens, but its tokenizer has {n_vocab:,}")
    return model.to(device).eval(), rest


def open_model(name=None, out_dir=".", device="auto", dtype="auto"):
    """
    What load_checkpoint takes, or None for the newest checkpoint of out_dir -> the model on its device, and the rest,
    with n_parameters and a one-line description, `about`.
    """
    device = pick_device(device)
    name = name or newest_checkpoint(out_dir)
    model, known = load_checkpoint(name)
    if known["tokenizer"] == {"name": "gpt2"}:
        if model.cfg.n_tokens < GPT2_TOKENS:
            raise UserError(f"{name} has a vocabulary of {model.cfg.n_tokens:,}; which tokenizer it needs is unknown")
        model.cfg.n_tokens = GPT2_TOKENS  # other projects do not mark their padding
    model.to(device, pick_dtype(dtype, device)).eval()
    step = f", step {known['step']:,}" if "step" in known else ""
    n_parameters = model.param_counts()["total"]
    if dtype == "int8":
        if device.type != "cpu":
            raise UserError(f"dtype=int8 is for CPUs, not {device.type}; add --device=cpu")
        model.quantize()
    about = f"{name}{step}, {n_parameters / 1e6:.1f}M parameters, {device.type}"
    best = known.get("run", {}).get("best", {}).get("step")
    if known.get("train_config", {}).get("patience") and isinstance(best, int) and 0 <= best < known["step"]:
        about += f"; the lowest validation loss so far was at step {best}"
    return model, {**known, "n_parameters": n_parameters, "about": about}


# -- Hugging Face's files

HF_ACTIVATIONS = {"gelu_new": "gelu", "gelu": "gelu_erf", "relu2": "relu2"}
# Where a model has its vocabulary, and some of GPT-2's tokens as they are spelled there
VOCABULARIES = {"vocab.json": lambda content: content, "tokenizer.json": lambda content: content["model"]["vocab"]}
GPT2_SAMPLES = {"!": 0, "\u0120the": 262, "\u0120gazed": 50255}


def download_model(name):
    """The local folder of a model on the hub"""
    repository = name if "/" in name else f"openai-community/{name}"
    names = ["model.safetensors", "pytorch_model.bin"]
    if not importlib.util.find_spec("safetensors"):
        names.reverse()
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.utils import HFValidationError, disable_progress_bars, validate_repo_id
        validate_repo_id(repository)
    except ImportError:
        raise UserError("downloading a model needs a package: pip install huggingface_hub") from None
    except HFValidationError:
        raise UserError(f"there is no {name}; name a checkpoint, a folder, or a model of the hub, owner/name") from None
    print(f"reading {repository} from the Hugging Face hub", file=sys.stderr)
    if not sys.stderr.isatty():
        disable_progress_bars()
    for weights in names:
        files = ["config.json", weights, *VOCABULARIES]
        download = functools.partial(snapshot_download, repository, allow_patterns=files)
        folder = ask_hub(repository, download, ", or name a local folder")
        if os.path.exists(os.path.join(folder, weights)):
            break
    return folder


def read_hugging_face(folder):
    """-> config dict, {name: tensor}"""
    config, safe, pickled = (os.path.join(folder, n) for n in ("config.json", "model.safetensors", "pytorch_model.bin"))
    if not os.path.exists(config):
        raise UserError(f"{folder} has no config.json; it is not a Hugging Face model")
    if os.path.exists(safe) and importlib.util.find_spec("safetensors"):
        from safetensors.torch import load_file as load_safetensors
        return read_json(config), load_safetensors(safe)
    if os.path.exists(pickled):
        return read_json(config), load_file(pickled)
    if os.path.exists(safe):
        raise UserError(f"{folder} is in safetensors format: pip install safetensors")
    if glob.glob(os.path.join(glob.escape(folder), "*.index.json")):
        raise UserError(f"{folder} has its weights in several files; save them in one, with max_shard_size='100GB'")
    raise UserError(f"{folder} has neither model.safetensors nor pytorch_model.bin")


def check_vocabulary(folder, name):
    """A model of the hub may have a vocabulary of its own, which we cannot read: an error instead of gibberish"""
    if os.path.exists(os.path.join(folder, TOKENIZER_SPEC)):
        return  # an export of ours
    for file, find in VOCABULARIES.items():
        path = os.path.join(folder, file)
        if not os.path.exists(path):
            continue
        with reading(path, "a vocabulary of GPT-2's kind"):
            vocabulary = find(read_json(path))
            if any(vocabulary.get(text) != token for text, token in GPT2_SAMPLES.items()):
                raise UserError(f"{name} has a vocabulary of its own, {file}, which cannot be read; only GPT-2's can, "
                                f"and those of this project's exports, which have a {TOKENIZER_SPEC}")


def load_hugging_face(name):
    """A GPT-2, or a NanoChat that we exported: a folder, or a name such as gpt2, gpt2-xl, owner/name -> the model"""
    folder = name if os.path.isdir(name) else download_model(name)
    check_vocabulary(folder, name)
    with reading(folder, "a Hugging Face GPT-2 or NanoChat"):
        config, weights = read_hugging_face(folder)
        if any(map(repeats_values, weights.values())):
            raise UserError(f"{name} has a tensor that repeats its values")
        convert = import_nanochat if config.get("model_type") == "nanochat" else import_gpt2
        return build_model(*convert(config, weights, name), name)


def import_gpt2(config, weights, name):
    """-> GPTConfig and state dict"""
    cfg, imported = import_config(config, name), {}
    for key, tensor in weights.items():
        if key.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
            tensor = tensor.t()  # their Conv1D stores (in, out)
        imported[key if key.startswith(("transformer.", "lm_head.")) else f"transformer.{key}"] = tensor
    if cfg.tie_head and "transformer.wte.weight" in imported:
        imported["lm_head.weight"] = imported["transformer.wte.weight"]
    return cfg, imported


def import_config(config, name):
    """The config.json of a Hugging Face GPT-2 -> GPTConfig; an error if it uses what we do not support"""
    if missing := {"n_positions", "vocab_size", "n_layer", "n_head", "n_embd"} - config.keys():
        raise UserError(f"{name}: its config.json lacks {', '.join(sorted(missing))}")
    fixed = dict(model_type="gpt2", layer_norm_epsilon=1e-5, scale_attn_weights=True,
                 scale_attn_by_inverse_layer_idx=False, n_inner=4 * config["n_embd"], add_cross_attention=False)
    for key, value in fixed.items():
        if config.get(key) not in (None, value):
            raise UserError(f"{name} has {key}={config[key]}; GPT-2 has {value}, and nothing else is supported")
    act = config.get("activation_function", "gelu_new")
    if act not in HF_ACTIVATIONS:
        raise UserError(f"{name} has activation_function={act}; supported are {', '.join(HF_ACTIVATIONS)}")
    return make_config(dict(
        block_size=config["n_positions"], vocab_size=config["vocab_size"], n_layer=config["n_layer"],
        n_head=config["n_head"], n_embd=config["n_embd"], tie_head=config.get("tie_word_embeddings", True),
        act=HF_ACTIVATIONS[act]), name)


def export_config(cfg, eot, dtype):
    """GPTConfig -> the config.json of a Hugging Face NanoChat or GPT-2; an error if neither supports the model"""
    common = dict(vocab_size=cfg.n_tokens, bos_token_id=eot, eos_token_id=eot,
                  torch_dtype=str(dtype).removeprefix("torch."))
    lacking = [k for k, value in {**MODERN, "head_bias": False}.items() if getattr(cfg, k) != value]
    if not lacking:
        return dict(
            **common, **NANOCHAT, **{theirs: getattr(cfg, ours) for theirs, ours in NANOCHAT_SHAPE.items()},
            architectures=["NanoChatForCausalLM"], intermediate_size=4 * cfg.n_embd, pad_token_id=eot,
            num_key_value_heads=cfg.n_head, final_logit_softcapping=cfg.softcap or None)
    unsupported = {"pos": cfg.pos == "rotary", "norm": cfg.norm == "rms", "qk_norm": cfg.qk_norm,
                   "embed_norm": cfg.embed_norm, "softcap": cfg.softcap > 0, "head_bias": cfg.head_bias}
    if used := [name for name, is_used in unsupported.items() if is_used]:
        raise UserError(f"cannot export a model with {used[0]}={getattr(cfg, used[0])}: Hugging Face's GPT-2 lacks it, "
                        f"and its NanoChat lacks {lacking[0]}={getattr(cfg, lacking[0])}")
    act = {ours: theirs for theirs, ours in HF_ACTIVATIONS.items()}[cfg.act]
    return dict(
        **common, architectures=["GPT2LMHeadModel"], model_type="gpt2", n_positions=cfg.block_size,
        n_ctx=cfg.block_size, n_embd=cfg.n_embd, n_layer=cfg.n_layer, n_head=cfg.n_head, activation_function=act,
        tie_word_embeddings=cfg.tie_head, layer_norm_epsilon=1e-5, resid_pdrop=cfg.dropout, embd_pdrop=cfg.dropout,
        attn_pdrop=cfg.dropout)


def gpt2_weights(model):
    cfg, weights = model.cfg, {k: v.cpu() for k, v in model.state_dict().items()}
    for k in ("transformer.wte.weight", "lm_head.weight"):
        weights[k] = weights[k][:cfg.n_tokens].clone()  # without the padding
    if cfg.tie_head:
        del weights["lm_head.weight"]
    if cfg.pos == "sinusoidal":
        weights["transformer.wpe.weight"] = model.sinusoids.cpu()
    for name, module in model.transformer.named_modules(prefix="transformer"):
        if isinstance(module, nn.Linear):
            weights[f"{name}.weight"] = weights[f"{name}.weight"].t().contiguous()  # their Conv1D stores (in, out)
        if isinstance(module, (nn.Linear, nn.LayerNorm)) and module.bias is None:  # theirs always has one
            weights[f"{name}.bias"] = torch.zeros(len(module.weight), dtype=module.weight.dtype)
    return weights


# What a NanoChat of ours has in its config.json, and what it calls our fields and matrices
NANOCHAT = dict(model_type="nanochat", hidden_act="relu2", rms_norm_eps=1e-5, attention_bias=False,
                tie_word_embeddings=False, rope_parameters=dict(rope_type="default", rope_theta=10000.0))
NANOCHAT_SHAPE = dict(max_position_embeddings="block_size", num_hidden_layers="n_layer", num_attention_heads="n_head",
                      hidden_size="n_embd")
NANOCHAT_MATRICES = {"self_attn.o_proj": "attn.c_proj", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}


def swap_halves(weight, n_head):
    """The two halves of each head exchanged, since NanoChat turns queries and keys the other way.  (C, C) -> (C, C)"""
    return weight.view(n_head, 2, -1, weight.size(1)).flip(1).reshape(weight.shape)  # (nh, 2, hs/2, C)


@torch.no_grad()
def nanochat_weights(model):
    """NanoChat's norms have no gains, so each is multiplied into the matrix that follows."""
    n, n_head = model.cfg.n_tokens, model.cfg.n_head
    weights = {"model.embed_tokens.weight": model.transformer.wte.weight[:n],
               "lm_head.weight": model.lm_head.weight[:n] * model.transformer.ln_f.weight}
    for i, block in enumerate(model.transformer.h):
        q, k, v = (block.attn.c_attn.weight * block.ln_1.weight).chunk(3)
        matrices = {theirs: block.get_submodule(ours).weight for theirs, ours in NANOCHAT_MATRICES.items()}
        matrices["mlp.fc1"] = matrices["mlp.fc1"] * block.ln_2.weight
        qkv = {"q": swap_halves(q, n_head), "k": swap_halves(k, n_head), "v": v}
        matrices.update({f"self_attn.{x}_proj": matrix for x, matrix in qkv.items()})
        weights.update({f"model.layers.{i}.{name}.weight": matrix for name, matrix in matrices.items()})
    return {name: weight.cpu().clone() for name, weight in weights.items()}


def import_nanochat(config, weights, name):
    """-> GPTConfig and state dict, of what nanochat_weights wrote"""
    if differing := [key for key, value in NANOCHAT.items() if config.get(key) != value]:
        raise UserError(f"{name} has {differing[0]}={config.get(differing[0])}; supported is {NANOCHAT[differing[0]]}")
    cfg = make_config(dict(
        **MODERN, **{ours: config[theirs] for theirs, ours in NANOCHAT_SHAPE.items()}, vocab_size=config["vocab_size"],
        softcap=config["final_logit_softcapping"] or 0.0, tie_head=False), name)
    imported = {"transformer.wte.weight": weights["model.embed_tokens.weight"],
                "transformer.ln_f.weight": torch.ones(cfg.n_embd), "lm_head.weight": weights["lm_head.weight"]}
    for i in range(cfg.n_layer):
        theirs, ours = f"model.layers.{i}.", f"transformer.h.{i}."
        q, k, v = (weights[f"{theirs}self_attn.{x}_proj.weight"] for x in "qkv")
        imported[f"{ours}attn.c_attn.weight"] = torch.cat((swap_halves(q, cfg.n_head), swap_halves(k, cfg.n_head), v))
        imported |= {f"{ours}{b}.weight": weights[f"{theirs}{a}.weight"] for a, b in NANOCHAT_MATRICES.items()}
        imported |= {f"{ours}{norm}.weight": torch.ones(cfg.n_embd) for norm in ("ln_1", "ln_2")}
    return cfg, imported
