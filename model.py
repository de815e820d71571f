"""
GPT-2 (Radford et al., 2019), with the few switches by which its descendants differ from it.

The defaults of GPTConfig are GPT-2 124M. Parameter names are those of Hugging Face and nanoGPT
(transformer.wte.weight, transformer.h.0.attn.c_attn.weight, ...), so weights travel both ways.
"""
import functools
import importlib.util
import json
import math
import os
import re
from dataclasses import dataclass, fields

import torch
import torch.nn as nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


class UserError(Exception):
    """A mistake its user can mend: a script prints it as one line, without a traceback."""


CHECKPOINT_VERSION = 1
TOKENIZER_SPEC = "tokenizer_spec.json"  # beside the tokenizer.json of an export: the same in our own form
GPT2_TOKENS, GPT2_PADDED = 50257, 50304  # the vocabulary, and its next multiple of 128: faster


@dataclass
class GPTConfig:
    block_size: int = 1024  # T: how many tokens the model sees at once
    vocab_size: int = GPT2_PADDED  # rows of the embedding; for train.py 0 is the tokenizer's size, rounded up to a multiple of 128
    n_tokens: int = 0  # ids in use; the rows above them are padding and never sampled (0: all rows, or GPT-2's)
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
    act: str = "gelu"  # gelu (tanh form, as GPT-2) | gelu_erf (exact, as nanoGPT) | relu2
    qk_norm: bool = False  # normalise queries and keys per head
    softcap: float = 0.0  # logits -> c * tanh(logits / c); 0: off
    zero_init: bool = False  # residual projections start at zero instead of at GPT-2's scaled normal
    attention: str = "fused"  # fused | reference (the same sums, written out)

    def __post_init__(self):
        if not self.n_tokens:
            self.n_tokens = GPT2_TOKENS if self.vocab_size == GPT2_PADDED else self.vocab_size
        for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be at least 1")
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise UserError(f"{name}={getattr(self, name)!r} must be one of {', '.join(allowed)}")
        if self.n_embd % self.n_head:
            raise UserError(f"n_embd={self.n_embd} must be a multiple of n_head={self.n_head}")
        if self.pos == "rotary" and self.n_embd // self.n_head % 2:
            raise UserError(f"pos=rotary needs an even head size, not n_embd/n_head={self.n_embd // self.n_head}")
        if self.pos == "sinusoidal" and self.n_embd % 2:
            raise UserError(f"pos=sinusoidal needs an even n_embd, not {self.n_embd}")
        if self.n_tokens > self.vocab_size:
            raise UserError(f"vocab_size={self.vocab_size} is too small for {self.n_tokens} tokens")
        if not 0 <= self.dropout < 1:
            raise UserError(f"dropout={self.dropout} must be at least 0 and below 1")


HF_ACTIVATIONS = {"gelu_new": "gelu", "gelu": "gelu_erf", "relu2": "relu2"}
CHOICES = {
    "pos": ("learned", "sinusoidal", "rotary"),
    "norm": ("layer", "rms"),
    "act": ("gelu", "gelu_erf", "relu2"),
    "attention": ("fused", "reference"),
}

# What differs from GPTConfig's defaults.
CONFIGS = {
    "gpt2": {},
    "gpt2-medium": dict(n_layer=24, n_head=16, n_embd=1024),
    "gpt2-large": dict(n_layer=36, n_head=20, n_embd=1280),
    "gpt2-xl": dict(n_layer=48, n_head=25, n_embd=1600),
    "tiny": dict(n_layer=4, n_head=4, n_embd=128, block_size=256, bias=False, pos="rotary", norm="rms", act="relu2", qk_norm=True),
    "gpt-xs": dict(block_size=512),
    "speedrun": dict(n_head=6, bias=False, pos="rotary", tie_head=False, norm="rms", act="relu2", qk_norm=True, softcap=15.0, zero_init=True),
    "custom-gpt": dict(n_head=10, n_embd=640, block_size=512, vocab_size=50000),
    "toygpt-small": dict(n_head=8, block_size=512, vocab_size=50257, pos="sinusoidal", head_bias=True),
    "toygpt-medium": dict(n_layer=16, n_head=8, n_embd=1024, block_size=512, vocab_size=50257,
                          pos="sinusoidal", head_bias=True),
    "toygpt-large": dict(n_layer=24, n_head=16, n_embd=2048, block_size=512, vocab_size=50257,
                         pos="sinusoidal", head_bias=True),
    "tinystories": dict(block_size=256, vocab_size=50257, tie_head=False, qkv_bias=False, dropout=0.1),
    "tinystories-small": dict(n_layer=6, n_head=6, n_embd=384, block_size=128, vocab_size=50257,
                              tie_head=False, qkv_bias=False, dropout=0.1),
    "tinystories-large": dict(n_layer=24, n_head=16, n_embd=1024, block_size=512, vocab_size=50257,
                              tie_head=False, qkv_bias=False, dropout=0.1),
}


def make_norm(cfg):
    if cfg.norm == "rms":
        return nn.RMSNorm(cfg.n_embd, eps=1e-5)
    return nn.LayerNorm(cfg.n_embd, bias=cfg.bias)


def sinusoids(T, C):
    """Positions of "Attention Is All You Need", 3.5: sin at even channels, cos at odd.  -> (T, C)"""
    angle = torch.arange(T)[:, None] / 10000 ** (torch.arange(0, C, 2) / C)  # (T, C/2)
    return torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(1)


def isolate(document):
    """Numbers of documents, (B, T), each a run -> positions within them, (B, T), and the mask of what may attend to what, (B, 1, T, T)"""
    at = torch.arange(document.size(1), device=document.device)
    begins = torch.cat((torch.ones_like(document[:, :1]), document.diff()), dim=1) != 0
    mask = (document[:, :, None] == document[:, None, :]) & (at[:, None] >= at)
    return at - torch.where(begins, at, 0).cummax(dim=1).values, mask[:, None]


def rotate(x, cos, sin):
    """Rotary position embedding (Su et al., 2021), halves paired.  x (B, nh, T, hs), cos and sin (T, hs/2)"""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def reference_attention(q, k, v, mask=None, dropout=0.0):
    """softmax(q k^T / sqrt(hs)) v over the past: what the fused kernel computes, one step a line."""
    T, S = q.size(-2), k.size(-2)  # the last T of S positions ask
    if mask is None:
        mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.size(-1))  # (B, nh, T, hs) x (B, nh, hs, S) -> (B, nh, T, S)
    weights = scores.masked_fill(~mask, -math.inf).softmax(dim=-1)
    return F.dropout(weights, dropout, training=dropout > 0).to(v.dtype) @ v  # -> (B, nh, T, hs)


class Linear(nn.Linear):
    def forward(self, x, part=None):
        weight, bias = (self.weight, self.bias) if part is None else (self.weight[part], None if self.bias is None else self.bias[part])
        # One row at a time, a CPU reads half-precision weights twice as fast. Where it cannot multiply in them, many rows are
        # eight times slower than in float32, so that it pays to widen first.
        if x.device.type == "cpu" and weight.dtype in (torch.bfloat16, torch.float16) and x.numel() >= 8 * x.size(-1) and not cpu_has_bfloat16():
            return F.linear(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)
        return F.linear(x, weight, bias)


class CausalSelfAttention(nn.Module):
    def __init__(self, cfg, layer):
        super().__init__()
        self.cfg, self.layer = cfg, layer
        self.c_attn = Linear(cfg.n_embd, 3 * cfg.n_embd, bias=cfg.bias and cfg.qkv_bias)
        self.c_proj = Linear(cfg.n_embd, cfg.n_embd, bias=cfg.bias)

    def forward(self, x, rotary, mask, cache):
        B, T, C = x.shape
        q, k, v = self.c_attn(x).split(C, dim=2)
        q, k, v = (t.view(B, T, self.cfg.n_head, -1).transpose(1, 2) for t in (q, k, v))  # (B, T, C) -> (B, nh, T, hs)
        if self.cfg.qk_norm:
            q, k = (F.rms_norm(t, (t.size(-1),)) for t in (q, k))
        if rotary is not None:
            cos, sin = (t.to(q.dtype) for t in rotary)
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if cache is not None:
            k, v = cache.add(self.layer, k, v)
            q = q.to(k.dtype)
        dropout = self.cfg.dropout if self.training else 0.0
        if self.cfg.attention == "fused":
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=mask is None and T > 1)
        else:
            y = reference_attention(q, k, v, mask, dropout)
        y = y if cache is None else y.to(x.dtype)
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
        return self.c_proj(x)


class Block(nn.Module):
    def __init__(self, cfg, layer):
        super().__init__()
        self.cfg = cfg
        self.ln_1 = make_norm(cfg)
        self.attn = CausalSelfAttention(cfg, layer)
        self.ln_2 = make_norm(cfg)
        self.mlp = MLP(cfg)

    def forward(self, x, rotary, mask=None, cache=None):
        x = x + F.dropout(self.attn(self.ln_1(x), rotary, mask, cache), self.cfg.dropout, self.training)
        return x + F.dropout(self.mlp(self.ln_2(x)), self.cfg.dropout, self.training)


class GPT(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.grad_checkpoint = False  # recompute each block in the backward pass: less memory, a third more time
        C = cfg.n_embd
        self.transformer = nn.ModuleDict({"wte": nn.Embedding(cfg.vocab_size, C)})
        if cfg.pos == "learned":
            self.transformer["wpe"] = nn.Embedding(cfg.block_size, C)
        self.transformer.update({
            "h": nn.ModuleList(Block(cfg, layer) for layer in range(cfg.n_layer)),
            "ln_f": make_norm(cfg),
        })
        self.lm_head = Linear(C, cfg.vocab_size, bias=cfg.head_bias)
        if cfg.tie_head:
            self.lm_head.weight = self.transformer.wte.weight
        if cfg.pos == "sinusoidal":
            self.register_buffer("sinusoids", sinusoids(cfg.block_size, C), persistent=False)
        if cfg.pos == "rotary":
            hs = C // cfg.n_head
            angle = torch.arange(cfg.block_size)[:, None] * 10000 ** (-torch.arange(0, hs, 2) / hs)  # (T, hs/2)
            self.register_buffer("rotary", torch.stack((angle.cos(), angle.sin())), persistent=False)
        self.init_weights()

    def init_weights(self):
        """GPT-2's: normal(0, 0.02); what is added to the residual stream 2 * n_layer times, 1/sqrt(2 * n_layer) of it."""
        for name, module in self.named_modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                residual = name.endswith("c_proj")
                if residual and self.cfg.zero_init:
                    nn.init.zeros_(module.weight)
                else:
                    nn.init.normal_(module.weight, std=0.02 / math.sqrt(2 * self.cfg.n_layer) if residual else 0.02)
                if getattr(module, "bias", None) is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, idx, targets=None, document=None):
        """
        idx (B, T) -> logits (B, T, vocab) and the mean loss over targets >= 0; without targets the last position's logits only.
        `document`, (B, T), numbers the documents that share a row: attention then stops at their edges, and positions restart.
        """
        x = self.hidden(idx) if document is None else self.hidden(idx, *isolate(document))
        if targets is None:
            return self.logits(x[:, -1:]), None
        logits = self.logits(x)
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)

    def hidden(self, idx, positions=None, mask=None, cache=None):
        """
        idx (B, T) -> what the head reads, (B, T, C). Positions, (T,) or (B, T), are 0 to T-1 unless given; the mask, True where a
        position may attend to another, is causal unless given. A cache adds what it holds to what is attended to.
        """
        T = idx.size(1)
        assert T <= self.cfg.block_size or positions is not None, f"{T} tokens are more than block_size={self.cfg.block_size}"
        at = slice(T) if positions is None else positions
        x = self.transformer.wte(idx)  # (B, T) -> (B, T, C)
        if self.cfg.pos == "learned":
            x = x + self.transformer.wpe.weight[at]
        elif self.cfg.pos == "sinusoidal":
            x = x + self.sinusoids[at]
        x = F.dropout(x, self.cfg.dropout, self.training)
        rotary = None
        if self.cfg.pos == "rotary":
            rotary = self.rotary[:, at]  # (2, T, hs/2) or, with a row's own positions, (2, B, T, hs/2) -> (2, B, 1, T, hs/2)
            rotary = rotary.unsqueeze(2) if rotary.dim() == 4 else rotary
        for block in self.transformer.h:
            if self.grad_checkpoint and self.training:
                x = checkpoint(block, x, rotary, mask, use_reentrant=False)
            else:
                x = block(x, rotary, mask, cache)
        return self.transformer.ln_f(x)

    def logits(self, x, part=None):
        """What the head reads, (..., C) -> logits of the vocabulary, or of the part of it that a slice gives"""
        logits = self.lm_head(x, part)
        if self.cfg.softcap:
            logits = self.cfg.softcap * torch.tanh(logits.float() / self.cfg.softcap)
        return logits

    # -- what it costs

    def param_counts(self):
        """Parameters by component; a tied head adds only its bias."""
        t = self.transformer
        count = lambda *modules: sum(p.numel() for m in modules for p in m.parameters())
        counts = {
            "embeddings": count(t.wte),
            "positions": count(t.wpe) if self.cfg.pos == "learned" else 0,
            "attention": count(*(b.attn for b in t.h)),
            "feed-forward": count(*(b.mlp for b in t.h)),
            "norms": count(t.ln_f, *(n for b in t.h for n in (b.ln_1, b.ln_2))),
            "head": count(self.lm_head) - (t.wte.weight.numel() if self.cfg.tie_head else 0),
        }
        counts["total"] = sum(p.numel() for p in self.parameters())
        assert sum(counts.values()) == 2 * counts["total"], counts
        return counts

    def flops_per_token(self):
        """Training FLOPs: 6 a weight that multiplies (forward 2, backward 4), and attention as PaLM's appendix B counts it."""
        n = self.param_counts()
        lookups = n["positions"] + (0 if self.cfg.tie_head else n["embeddings"])
        return 6 * (n["total"] - lookups) + 12 * self.cfg.n_layer * self.cfg.n_embd * self.cfg.block_size

    def optimizer_groups(self, weight_decay):
        """Matrices and embeddings decay; biases and norms do not."""
        params = list(self.parameters())
        decay, rest = [p for p in params if p.dim() >= 2], [p for p in params if p.dim() < 2]
        return [{"params": decay, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]

    # -- what it says

    @torch.inference_mode()
    def stream(self, prompts, temperature=1.0, top_k=None, top_p=None, generator=None):
        """
        prompts (B, T), or a list of B rows of any length, of one token at least. Yields the next token of every row, (B, 1),
        without end. A row at the end of its context goes on from the last half of it. Nothing waits for the device.
        """
        was_training, device = self.training, self.transformer.wte.weight.device
        prompts = [torch.as_tensor(p, device=device)[-self.cfg.block_size:] for p in prompts]
        cache, new = Cache(self, len(prompts)), []
        self.eval()
        try:
            x = self.read(prompts, cache)
            while True:
                logits = self.logits(x)[:, :self.cfg.n_tokens]
                new.append(sample(logits, temperature, top_k, top_p, generator))
                yield new[-1]
                if max(cache.lengths) < self.cfg.block_size:
                    x = self.step(new[-1], cache)
                else:
                    keep = [n + 1 if n < self.cfg.block_size else max(1, n // 2) for n in cache.lengths]
                    rows = [torch.cat((p, t))[-n:] for p, t, n in zip(prompts, torch.cat(new, dim=1), keep)]
                    x = self.read(rows, cache)
        finally:
            self.train(was_training)

    def read(self, rows, cache):
        """Fills the cache with these rows of tokens, all in one pass.  -> what the head reads at the end of each, (B, C)"""
        lengths = [len(row) for row in rows]
        idx = nn.utils.rnn.pad_sequence(rows, batch_first=True)  # what is padded at the end, nothing before it can see
        cache.lengths, cache.at = [0] * len(rows), slice(idx.size(1))
        x = self.hidden(idx, cache=cache)  # (B, T, C)
        cache.lengths = lengths
        return x[torch.arange(len(rows), device=x.device), torch.tensor(lengths, device=x.device) - 1]

    def step(self, token, cache):
        """One more token a row, (B, 1).  -> what the head reads there, (B, C)"""
        shortest, longest = min(cache.lengths), max(cache.lengths)
        if shortest == longest:
            cache.at, positions, mask = slice(longest, longest + 1), torch.tensor([longest], device=token.device), None
        else:
            cache.at = torch.tensor(cache.lengths, device=token.device)
            positions = cache.at[:, None]  # (B, 1)
            mask = (torch.arange(longest + 1, device=token.device) <= positions)[:, None, None]  # (B, 1, 1, S)
        x = self.hidden(token, positions, mask, cache)
        cache.lengths = [n + 1 for n in cache.lengths]
        return x[:, -1]

    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, generator=None):
        """idx (B, T) -> (B, T + max_new_tokens): the prompt and its continuation."""
        stream = self.stream(idx, temperature, top_k, top_p, generator)
        new = [next(stream) for _ in range(max_new_tokens)]
        stream.close()
        return torch.cat([idx, *new], dim=1)

    # -- where it comes from

    def save_pretrained(self, folder, eot=None):
        """Writes config.json and the weights as a Hugging Face GPT-2, with its logits for every token in use. `eot` ends a text (the last token)."""
        cfg, t = self.cfg, self.transformer
        eot = cfg.n_tokens - 1 if eot is None else eot
        for field, good in (("pos", cfg.pos != "rotary"), ("norm", cfg.norm == "layer"), ("qk_norm", not cfg.qk_norm), ("softcap", not cfg.softcap),
                            ("head_bias", not cfg.head_bias)):
            if not good:
                raise UserError(f"Hugging Face's GPT-2 has no {field}={getattr(cfg, field)}; a model with it cannot be exported")
        weights = {k: v.detach().clone() for k, v in self.state_dict().items() if not (cfg.tie_head and k == "lm_head.weight")}
        for k in ("transformer.wte.weight", "lm_head.weight"):
            if k in weights:
                weights[k] = weights[k][:cfg.n_tokens]  # padded rows stand for nothing
        if cfg.pos == "sinusoidal":
            weights["transformer.wpe.weight"] = self.sinusoids.clone()
        for name, module in t.named_modules(prefix="transformer"):
            if isinstance(module, (nn.Linear, nn.LayerNorm)):
                if isinstance(module, nn.Linear):
                    weights[f"{name}.weight"] = weights[f"{name}.weight"].t().contiguous()  # their Conv1D stores (in, out)
                if module.bias is None:  # theirs always has one
                    size = module.out_features if isinstance(module, nn.Linear) else cfg.n_embd
                    weights[f"{name}.bias"] = torch.zeros(size, dtype=t.wte.weight.dtype)
        config = dict(
            architectures=["GPT2LMHeadModel"], model_type="gpt2", vocab_size=cfg.n_tokens, n_positions=cfg.block_size, n_ctx=cfg.block_size,
            n_embd=cfg.n_embd, n_layer=cfg.n_layer, n_head=cfg.n_head, activation_function={v: k for k, v in HF_ACTIVATIONS.items()}[cfg.act],
            tie_word_embeddings=cfg.tie_head, layer_norm_epsilon=1e-5, bos_token_id=eot, eos_token_id=eot,
            resid_pdrop=cfg.dropout, embd_pdrop=cfg.dropout, attn_pdrop=cfg.dropout, torch_dtype=str(t.wte.weight.dtype).removeprefix("torch."))
        weights = {k: v.cpu() for k, v in weights.items()}
        try:
            os.makedirs(folder, exist_ok=True)
            with open(os.path.join(folder, "config.json"), "w", encoding="utf-8") as f:
                json.dump(config, f, indent=1)
            if importlib.util.find_spec("safetensors"):
                from safetensors.torch import save_file
                save_file(weights, os.path.join(folder, "model.safetensors"), metadata={"format": "pt"})
            else:
                torch.save(weights, os.path.join(folder, "pytorch_model.bin"))
        except OSError as e:
            raise UserError(f"cannot write {folder}: {e.strerror or e}") from None

    @classmethod
    def from_pretrained(cls, name):
        """GPT-2 weights of Hugging Face: a directory, or a name such as gpt2, gpt2-xl, owner/name."""
        folder = name if os.path.isdir(name) else download(name)
        config, weights = read_hugging_face(folder)
        if lacking := {"n_positions", "vocab_size", "n_layer", "n_head", "n_embd"} - config.keys():
            raise UserError(f"{name}: its config.json has no {', '.join(sorted(lacking))}")
        for key, value in {"model_type": "gpt2", "layer_norm_epsilon": 1e-5, "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False,
                           "n_inner": None, "add_cross_attention": False}.items():
            if config.get(key, value) != value and (key, config[key]) != ("n_inner", 4 * config["n_embd"]):
                raise UserError(f"{name} has {key}={config[key]}, which is not GPT-2's {value}")
        act = config.get("activation_function", "gelu_new")
        if act not in HF_ACTIVATIONS:
            raise UserError(f"{name} has activation_function={act}; known are {', '.join(HF_ACTIVATIONS)}")
        cfg = GPTConfig(
            block_size=config["n_positions"], vocab_size=config["vocab_size"], n_layer=config["n_layer"], n_head=config["n_head"],
            n_embd=config["n_embd"], tie_head=config.get("tie_word_embeddings", True), act=HF_ACTIVATIONS[act])
        model = cls(cfg)
        weights = {k if k.startswith(("transformer.", "lm_head.")) else "transformer." + k: v for k, v in weights.items()
                   if not k.endswith((".attn.bias", ".attn.masked_bias"))}  # causal masks, stored by old versions
        for k in weights:
            if k.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
                weights[k] = weights[k].t()  # their Conv1D stores (in, out)
        if cfg.tie_head:
            weights["lm_head.weight"] = weights["transformer.wte.weight"]
        load_weights(model, weights, name)
        return model


class Cache:
    """The keys and values of B rows, room for block_size tokens each. `lengths` says how many tokens of each row are in it."""

    def __init__(self, model, B):
        cfg, weight = model.cfg, model.transformer.wte.weight
        kind = weight.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
        if kind == "cpu" and not cpu_has_bfloat16():
            dtype = torch.float32  # one query at a time, five times as fast as half precision
        shape = (cfg.n_layer, B, cfg.n_head, cfg.block_size, cfg.n_embd // cfg.n_head)
        self.k, self.v = (torch.zeros(shape, dtype=dtype, device=weight.device) for _ in range(2))
        self.lengths = [0] * B
        self.at = None  # where the next keys and values go: a slice, or a place for each row

    def add(self, layer, k, v):
        """k and v (B, nh, T, hs) go to where `at` says.  -> all that a layer holds up to there, (B, nh, S, hs)"""
        if isinstance(self.at, slice):
            end = self.at.stop
            self.k[layer, :, :, self.at], self.v[layer, :, :, self.at] = k, v
        else:
            end, rows = max(self.lengths) + 1, torch.arange(len(self.lengths), device=k.device)
            k, v = (t[:, :, 0].to(self.k.dtype) for t in (k, v))
            self.k[layer, rows, :, self.at], self.v[layer, rows, :, self.at] = k, v
        return self.k[layer, :, :, :end], self.v[layer, :, :, :end]


def sample(logits, temperature=1.0, top_k=None, top_p=None, generator=None):
    """logits (B, vocab) -> one token a row, (B, 1). Temperature 0 takes the likeliest."""
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    logits, ids = logits.float() / temperature, None
    if top_k:
        logits, ids = logits.topk(min(top_k, logits.size(-1)))
    elif top_p is not None and top_p < 1:
        logits, ids = logits.sort(dim=-1, descending=True)
    probs = logits.softmax(dim=-1)
    if top_p is not None and top_p < 1:
        # keep the smallest set of tokens whose probability reaches top_p: drop those that come after it is reached
        probs = probs.masked_fill(probs.cumsum(dim=-1) - probs >= top_p, 0)
    choice = torch.multinomial(probs, 1, generator=generator)
    return choice if ids is None else ids.gather(-1, choice)


# -- the machine

def pick_device(name="auto", local_rank=0):
    """auto | cuda | cuda:1 | mps | cpu -> torch.device"""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(f"cuda:{local_rank}" if name == "cuda" else name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as e:  # torch raises either for a device that is not there
        raise UserError(f"device={name} cannot be used here: {str(e).splitlines()[0]}") from None
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def pick_dtype(name, device):
    """auto is bfloat16 where the hardware computes in it, else float16 on CUDA, else float32."""
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return torch.bfloat16 if device.type == "cpu" and cpu_has_bfloat16() else torch.float32


@functools.cache
def cpu_has_bfloat16():
    cpu = getattr(torch.cpu, "get_capabilities", dict)()  # not in torch 2.11
    return bool(cpu.get("avx512_bf16") or cpu.get("amx_bf16"))


# -- files

def load_weights(model, weights, source):
    """Copies a state dict into the model; any name or shape that does not fit is named."""
    own = model.state_dict()
    weights = {k.removeprefix("module.").removeprefix("_orig_mod."): v for k, v in weights.items()}  # DDP's, torch.compile's
    wrong = [f"{k} is missing" for k in own.keys() - weights.keys()]
    wrong += [f"{k} is left over" for k in weights.keys() - own.keys()]
    wrong += [f"{k} is {tuple(weights[k].shape)}, not {tuple(own[k].shape)}"
              for k in own.keys() & weights.keys() if own[k].shape != weights[k].shape]
    if wrong:
        raise UserError(f"{source} does not fit the model: {sorted(wrong)[0]}" + f" (and {len(wrong) - 1} more)" * (len(wrong) > 1))
    model.load_state_dict(weights)


def download(name):
    """The local folder of a Hugging Face model, fetched if need be."""
    from huggingface_hub import snapshot_download  # comes with datasets
    from huggingface_hub.errors import HFValidationError
    name = name if "/" in name else "openai-community/" + name
    weights = "model.safetensors" if importlib.util.find_spec("safetensors") else "pytorch_model.bin"
    try:
        return snapshot_download(name, allow_patterns=["config.json", weights])
    except HFValidationError:
        raise UserError(f"there is no {name}; name a checkpoint, a run's or a Hugging Face folder, or a model of the hub, owner/name") from None
    except Exception as e:  # a dozen types, from two libraries: no network, no such model, no permission
        raise UserError(f"cannot get {name} from the Hugging Face hub ({type(e).__name__}); "
                        "name a local directory with config.json and weights, or check the network") from None


def read_hugging_face(folder):
    """-> config dict, {name: tensor}"""
    config, safe, pickled = (os.path.join(folder, name) for name in ("config.json", "model.safetensors", "pytorch_model.bin"))
    if not os.path.exists(config):
        raise UserError(f"{folder} has no config.json; it is not a Hugging Face model")
    use_safe = os.path.exists(safe) and (importlib.util.find_spec("safetensors") or not os.path.exists(pickled))
    if not use_safe and not os.path.exists(pickled):
        raise UserError(f"{folder} has neither model.safetensors nor pytorch_model.bin")
    if use_safe and not importlib.util.find_spec("safetensors"):
        raise UserError(f"{folder} is in safetensors format: pip install safetensors")
    try:
        with open(config, encoding="utf-8") as f:
            config = json.load(f)
        if use_safe:
            from safetensors.torch import load_file
            return config, load_file(safe)
        return config, torch.load(pickled, map_location="cpu", weights_only=True)
    except Exception as e:  # json's, safetensors' and torch's own errors for a file cut short
        raise UserError(f"{folder} is damaged ({type(e).__name__}: {str(e).splitlines()[0][:100] if str(e) else ''})") from None


def find_checkpoints(out_dir):
    """Checkpoints of a run, oldest first."""
    folder = os.path.join(out_dir, "checkpoints")
    names = os.listdir(folder) if os.path.isdir(folder) else []
    return sorted((os.path.join(folder, n) for n in names if re.fullmatch(r"model_\d+\.pt", n)), key=checkpoint_step)


def newest_checkpoint(out_dir):
    if paths := find_checkpoints(out_dir):
        return paths[-1]
    raise UserError(f"{out_dir}/checkpoints has no checkpoint; train one (python train.py --recipe=tiny), or name one with --ckpt")


def checkpoint_step(path):
    return int(re.search(r"model_(\d+)\.pt$", path)[1])


def read_checkpoint(path):
    """The dict that train.py saved, on the CPU."""
    return check_checkpoint(read_weights(path), path)


def check_checkpoint(ckpt, path):
    if not {"version", "model", "model_config", "tokenizer", "step"} <= ckpt.keys():
        raise UserError(f"{path} is not a checkpoint of train.py")
    if ckpt["version"] != CHECKPOINT_VERSION:
        raise UserError(f"{path} is a checkpoint of version {ckpt['version']}; this program knows version {CHECKPOINT_VERSION}")
    return ckpt


class StandIn:
    """What becomes of the object of a class GPTConfig that build-nanogpt's checkpoints hold: its fields, and no code."""


def read_weights(path):
    """A file of torch.save, as a dict. weights_only: a hostile file cannot run code."""
    if not os.path.isfile(path):
        raise UserError(f"there is no checkpoint {path}")
    try:
        configs = [name for name in torch.serialization.get_unsafe_globals_in_checkpoint(path) if name.endswith(".GPTConfig")]
        with torch.serialization.safe_globals([(StandIn, name) for name in configs]):
            ckpt = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # what torch raises on a foreign file depends on its first bytes
        raise UserError(f"{path} is not a checkpoint, or is damaged ({type(e).__name__})") from None
    if not isinstance(ckpt, dict):
        raise UserError(f"{path} is not a checkpoint of train.py")
    return ckpt


def convert_foreign(ckpt, path):
    """A checkpoint of nanoGPT or build-nanogpt, or bare weights with their names -> one of ours, as far as it goes"""
    weights = ckpt.get("model", ckpt)
    weights = {k.removeprefix("module.").removeprefix("_orig_mod."): v for k, v in weights.items()
               if isinstance(k, str) and torch.is_tensor(v)} if isinstance(weights, dict) else {}
    weights = {k: v for k, v in weights.items() if not k.endswith(".attn.bias")}  # causal masks, where there was no fused attention
    if not {"transformer.wte.weight", "transformer.wpe.weight", "transformer.h.0.ln_1.weight", "lm_head.weight"} <= weights.keys():
        raise UserError(f"{path} is not a checkpoint of train.py, nanoGPT or build-nanogpt")
    config = ckpt.get("config")
    said = vars(config) if isinstance(config, StandIn) else ckpt.get("model_args", {})
    vocab_size, n_embd = weights["transformer.wte.weight"].shape
    shape = dict(
        vocab_size=vocab_size, n_embd=n_embd, block_size=len(weights["transformer.wpe.weight"]),
        n_layer=1 + max(int(m[1]) for k in weights if (m := re.match(r"transformer\.h\.(\d+)\.", k))),
        n_head=said.get("n_head", max(1, n_embd // 64)),  # which the weights do not tell: GPT-2's heads are 64 wide
        bias="transformer.ln_f.bias" in weights, tie_head=torch.equal(weights["transformer.wte.weight"], weights["lm_head.weight"]),
        act="gelu_erf" if "model_args" in ckpt else "gelu")  # nanoGPT's GELU is the exact one
    return {"model": weights, "model_config": shape, "tokenizer": {"name": "gpt2"}, "step": int(ckpt.get("iter_num", ckpt.get("step", 0)))}


def load_checkpoint(path, device="cpu"):
    """-> the model, ready for use, and the rest of the checkpoint (step, tokenizer, training config, ...)."""
    ckpt = read_weights(path)
    ckpt = check_checkpoint(ckpt, path) if "version" in ckpt else convert_foreign(ckpt, path)
    if unknown := set(ckpt["model_config"]) - {f.name for f in fields(GPTConfig)}:
        raise UserError(f"{path} was written by a newer program: it has {', '.join(sorted(unknown))}")
    model = GPT(GPTConfig(**ckpt["model_config"]))
    load_weights(model, ckpt.pop("model"), path)
    return model.to(device).eval(), ckpt


def open_model(name=None, out_dir=".", device="auto", dtype="auto"):
    """
    A checkpoint, the folder of a run, a Hugging Face folder or name, or None for the newest checkpoint of out_dir
    -> the model, the spec of its tokenizer, and the rest of the checkpoint, with a line `about` that says what it is
    """
    name = name or newest_checkpoint(out_dir)
    device = pick_device(device)
    model, ckpt = find_model(name)
    about = f"{name}, step {ckpt['step']:,}" if "step" in ckpt else name
    spec, total = ckpt["tokenizer"], model.param_counts()["total"]
    if spec == {"name": "gpt2"}:
        if model.cfg.n_tokens < GPT2_TOKENS:
            raise UserError(f"{name} has a vocabulary of {model.cfg.n_tokens:,}, and does not say which tokenizer it goes with")
        model.cfg.n_tokens = GPT2_TOKENS  # other people's padding is not marked
    model.to(device, pick_dtype(dtype, device)).eval()
    return model, spec, {**ckpt, "about": f"{about}, {total / 1e6:.1f}M parameters, {device.type}"}


def find_model(name):
    """A checkpoint, the folder of a run, a Hugging Face folder or name -> the model, and what else is known: its tokenizer at least"""
    if os.path.isdir(os.path.join(name, "checkpoints")):
        name = newest_checkpoint(name)
    if os.path.isfile(name) or name.endswith(".pt"):
        return load_checkpoint(name)
    return GPT.from_pretrained(name), read_spec(name)


def read_spec(folder):
    """What an export of ours says of its tokenizer, and of the template of its chats if it has one; GPT-2's tokenizer for other people's models."""
    path = os.path.join(folder, TOKENIZER_SPEC)
    if not os.path.isfile(path):
        return {"tokenizer": {"name": "gpt2"}}
    try:
        with open(path, encoding="utf-8") as f:
            spec = json.load(f)
        if spec["name"] not in ("gpt2", "byte"):
            [a + b for a, b in spec["merges"]]
        return {"template": spec.pop("template", None), "tokenizer": spec}
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} is not a tokenizer that eval.py --export wrote") from None
