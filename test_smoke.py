"""
python -m pytest -q

Hermetic: every test makes what it reads, in folders of its own. Those that need the GPT-2 vocabulary, an optional package, or
a peer's sources (NANOGPT=folder, LLMC=folder) skip, with the reason, where these are not at hand.
"""
import atexit
import collections
import contextlib
import email.utils
import functools
import hashlib
import http.server
import importlib.util
import json
import math
import os
import random
import re
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter

import numpy as np
import pytest
import torch
from torch.nn import functional as F

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, HERE)
import dataset
import eval as speak
import hellaswag
import model as gpt
import plot
import train
from data_loader import DataLoader, cut, pack, permute
from model import GPT, GPTConfig

SHARED = os.path.join(HERE, "..", "shared")
WIKITEXT, HELLASWAG = os.path.join(SHARED, "text/wikitext2-valid.txt"), os.path.join(SHARED, "hellaswag/hellaswag_val_1000.jsonl")
STORIES = os.path.join(HERE, "input.txt")


def gpt2_vocabulary():
    try:
        return dataset.get_tokenizer("gpt2")
    except dataset.UserError:
        return None


def installed(package):
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None  # a mere folder has none


needs_gpt2 = pytest.mark.skipif(gpt2_vocabulary() is None, reason="needs the GPT-2 vocabulary: a network, or TIKTOKEN_CACHE_DIR")
needs_wikitext = pytest.mark.skipif(not os.path.exists(WIKITEXT), reason=f"needs {os.path.relpath(WIKITEXT, HERE)}")
needs_transformers = pytest.mark.skipif(not installed("transformers"), reason="needs the package transformers")


def script(*args, cwd, **env):
    """Runs `python ...` as a user would, but that torch is there already: to import it takes two seconds."""
    args, env = [str(a) for a in args], {**os.environ, "OMP_NUM_THREADS": "1", **env}
    if args[0] == "-m" or sys.platform != "linux":
        return subprocess.run([sys.executable, *args], cwd=cwd, text=True, capture_output=True, timeout=300, env=env)
    with tempfile.TemporaryDirectory() as folder:
        paths = [os.path.join(folder, name) for name in ("out", "err")]
        server = warm_python()
        server.stdin.write(json.dumps([args, str(cwd), env, paths]) + "\n")
        server.stdin.flush()
        code = int(server.stdout.readline())
        return subprocess.CompletedProcess(args, code, *(open(path, encoding="utf-8", errors="replace").read() for path in paths))


@functools.cache
def warm_python():
    server = subprocess.Popen([sys.executable, "-c", FORK], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": HERE})
    atexit.register(server.kill)
    return server


# Starts a process for each line that it reads, and says how it ended. Python's own end would touch, and so copy, all of torch.
FORK = """
import atexit, gc, json, os, runpy, signal, sys, threading, traceback
import torch._dynamo, eval, train
gc.freeze()
for line in sys.stdin:
    if not (pid := os.fork()):
        break
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
else:
    sys.exit()
sys.argv, cwd, env, paths = json.loads(line)
os.chdir(cwd)
os.environ.clear()
os.environ.update(env)
for fd, path in enumerate([os.devnull, *paths]):
    os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), fd)
sys.stdin, sys.path[0], code = open(0), os.path.dirname(sys.argv[0]), 0
signal.alarm(300)
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as e:
    if isinstance(e.code, str):
        print(e.code, file=sys.stderr)
    code = 1 if isinstance(e.code, str) else e.code or 0
except BaseException:
    code = traceback.print_exc() or 1
threading._shutdown()
atexit._run_exitfuncs()
sys.stdout.flush()
os._exit(code)
"""


def here(name):
    return os.path.join(HERE, name)


def stories(n):
    with open(STORIES, encoding="utf-8") as f:
        return f.read().split("\n\n")[:n]


def small(**switches):
    return GPTConfig(**{**dict(block_size=16, vocab_size=64, n_layer=2, n_head=2, n_embd=32), **switches})


SWITCHES = {"gpt-2": {}, "sinusoidal": dict(pos="sinusoidal", head_bias=True), "rotary": dict(pos="rotary", qk_norm=True, norm="rms", act="relu2"),
            "untied": dict(tie_head=False, qkv_bias=False, softcap=15.0), "no bias": dict(bias=False, act="gelu_erf")}
each_kind = pytest.mark.parametrize("switches", SWITCHES.values(), ids=SWITCHES.keys())


# -- model.py

def test_flops_per_token_of_gpt2_are_855_million():
    with torch.device("meta"):
        assert GPT(GPTConfig()).flops_per_token() == pytest.approx(855e6, rel=1e-3)


def test_fused_attention_equals_the_reference_forward_and_backward():
    results = []
    for kind in ("fused", "reference"):
        torch.manual_seed(0)
        model, idx = GPT(small(attention=kind)), torch.arange(32).view(2, 16)
        logits, loss = model(idx, idx.flip(0))
        loss.backward()
        results.append([logits, *(p.grad for p in model.parameters())])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@each_kind
def test_the_future_does_not_reach_the_past(switches):
    model = GPT(small(**switches)).eval()
    a = torch.randint(64, (1, 16), generator=torch.Generator().manual_seed(1))
    b = a.clone()
    b[:, 10:] = (b[:, 10:] + 1) % 64
    before, after = model(a, a)[0], model(b, b)[0]
    torch.testing.assert_close(before[:, :10], after[:, :10])
    assert not torch.allclose(before[:, 10:], after[:, 10:])


@each_kind
def test_the_order_of_tokens_matters(switches):
    torch.manual_seed(0)
    model = GPT(small(**switches)).eval()
    for p in model.parameters():
        if p.dim() == 2:
            torch.nn.init.normal_(p, std=0.3)
    a = model(torch.tensor([[1, 2, 3]]))[0]
    b = model(torch.tensor([[2, 1, 3]]))[0]
    assert not torch.allclose(a, b, atol=1e-3)


def test_sinusoidal_positions_follow_the_papers_formula():
    table = gpt.sinusoids(20, 8)
    for pos in range(20):
        for i in range(4):
            assert table[pos, 2 * i] == pytest.approx(math.sin(pos / 10000 ** (2 * i / 8)), abs=1e-5)
            assert table[pos, 2 * i + 1] == pytest.approx(math.cos(pos / 10000 ** (2 * i / 8)), abs=1e-5)


def test_rotary_positions_depend_on_distance_alone():
    rotary = GPT(small(pos="rotary")).rotary
    q, k = torch.randn(2, 1, 1, 1, 16)
    score = lambda i, j: (gpt.rotate(q, rotary[0, i:i + 1], rotary[1, i:i + 1]) * gpt.rotate(k, rotary[0, j:j + 1], rotary[1, j:j + 1])).sum()
    assert score(9, 5) == pytest.approx(score(4, 0).item(), abs=1e-5)
    assert score(9, 5) != pytest.approx(score(9, 2).item(), abs=1e-3)


def test_padded_vocabulary_rows_are_never_sampled():
    model = GPT(small(vocab_size=64, n_tokens=40, head_bias=True))
    with torch.no_grad():
        model.lm_head.bias[40:] = 9.0  # by far the likeliest, were they allowed
    for temperature in (0, 1.0, 5.0):
        assert model.generate(torch.zeros(8, 1, dtype=torch.long), 20, temperature=temperature).max() < 40


def test_the_default_vocabulary_has_47_padded_rows():
    assert (GPTConfig().vocab_size, GPTConfig().n_tokens, GPTConfig(vocab_size=1000).n_tokens) == (50304, 50257, 1000)


def test_targets_of_minus_one_do_not_count():
    model, idx = GPT(small()), torch.randint(64, (2, 16))
    targets = torch.randint(64, (2, 16))
    targets[:, 5:] = -1
    logits, loss = model(idx, targets)
    assert loss.item() == pytest.approx(F.cross_entropy(logits[:, :5].reshape(-1, 64), targets[:, :5].reshape(-1)).item(), abs=1e-6)


def test_without_targets_only_the_last_position_is_computed():
    model, idx = GPT(small()).eval(), torch.randint(64, (2, 16))
    last, loss = model(idx)
    assert last.shape == (2, 1, 64) and loss is None
    torch.testing.assert_close(last, model(idx, idx)[0][:, -1:])


@each_kind
@pytest.mark.parametrize("attention", ["fused", "reference"])
def test_a_document_cannot_see_another_that_shares_its_row(switches, attention):
    model, lengths = lively(**switches, attention=attention), (5, 1, 7, 3)
    documents = [torch.randint(64, (n,)) for n in lengths]
    number = torch.tensor([7] * 5 + [-1] + [0] * 7 + [1] * 3)[None]
    row = torch.cat(documents)[None]
    packed = model(row, row, number)[0][0].split(lengths)
    for document, logits in zip(documents, packed):
        torch.testing.assert_close(logits, model(document[None], document[None])[0][0], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(torch.cat(packed), model(row, row)[0][0], atol=1e-2)
    model.train().grad_checkpoint = True
    assert torch.equal(model(row, row, number)[0][0], torch.cat(packed))


def test_weight_decay_takes_matrices_and_leaves_biases_and_norms():
    model = GPT(small())
    decay, rest = model.optimizer_groups(0.1)
    assert (decay["weight_decay"], rest["weight_decay"]) == (0.1, 0.0)
    assert len(decay["params"]) + len(rest["params"]) == len(list(model.parameters()))
    assert {p.dim() for p in decay["params"]} == {2} and {p.dim() for p in rest["params"]} == {1}


def test_weights_begin_as_gpt2s():
    model = GPT(GPTConfig(vocab_size=2048, n_layer=8, n_embd=256, n_head=4, block_size=256))
    std = {name: p.std().item() for name, p in model.named_parameters() if p.dim() == 2}
    for name, value in std.items():
        assert value == pytest.approx(0.02 / 4 if name.endswith("c_proj.weight") else 0.02, rel=0.02), name
    assert all((p == 0).all() for name, p in model.named_parameters() if name.endswith("bias"))


def test_activation_checkpointing_changes_no_gradient():
    grads = []
    for on in (False, True):
        torch.manual_seed(0)
        model, idx = GPT(small(dropout=0.2)).train(), torch.arange(16).view(1, 16)
        model.grad_checkpoint = on
        torch.manual_seed(1)
        model(idx, idx)[1].backward()
        grads.append([p.grad for p in model.parameters()])
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b)


def test_dropout_acts_in_training_alone():
    model, idx = GPT(small(dropout=0.5)), torch.arange(16).view(1, 16)
    assert not torch.equal(model.train()(idx)[0], model(idx)[0])
    assert torch.equal(model.eval()(idx)[0], model(idx)[0])


def test_top_k_and_top_p_keep_the_likeliest_tokens():
    logits = torch.tensor([[0.5, 0.25, 0.15, 0.1]]).log().repeat(2000, 1)
    drawn = lambda **k: set(gpt.sample(logits, **k).flatten().tolist())
    assert drawn() == {0, 1, 2, 3}
    assert drawn(top_k=2) == {0, 1}
    assert drawn(top_p=0.7) == {0, 1} and drawn(top_p=0.76) == {0, 1, 2} and drawn(top_p=0.01) == {0}
    assert drawn(temperature=0) == {0}


def test_sampling_follows_the_probabilities():
    probs = torch.tensor([0.5, 0.25, 0.15, 0.1])
    counts = Counter(gpt.sample(probs.log().repeat(20000, 1), generator=torch.Generator().manual_seed(0)).flatten().tolist())
    for i, p in enumerate(probs.tolist()):
        assert counts[i] / 20000 == pytest.approx(p, abs=0.015)


def lively(**switches):
    """A model that says something else at every step: with GPT-2's small weights the likeliest token rarely changes."""
    torch.manual_seed(0)
    model = GPT(small(**switches)).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model


@torch.no_grad()
def without_a_cache(model, prompt, n):
    """The whole window anew for every token; at the end of the context, the last half of it."""
    window, new, size = list(prompt), [], model.cfg.block_size
    for _ in range(n):
        idx = torch.tensor([window[-size:]])
        new.append(model(idx, idx)[0][0, -1].argmax().item())
        window = window[-size:] + [new[-1]]
        window = window[-(size // 2):] if len(window) > size else window
    return new


@each_kind
@pytest.mark.parametrize("attention", ["fused", "reference"])
def test_greedy_generation_equals_that_without_a_cache_far_past_the_context(switches, attention):
    model = lively(**switches, attention=attention)
    idx = torch.randint(64, (3, 5))
    out = model.generate(idx, 60, temperature=0)
    assert out.tolist() == [row + without_a_cache(model, row, 60) for row in idx.tolist()]
    assert len(set(out[0].tolist())) > 4


@each_kind
def test_rows_of_different_lengths_say_what_each_says_alone(switches):
    model = lively(**switches)
    prompts = [torch.randint(64, (n,)).tolist() for n in (1, 9, 16, 40, 4)]
    stream = model.stream(prompts, temperature=0)
    together = torch.cat([next(stream) for _ in range(50)], dim=1).tolist()
    assert together == [without_a_cache(model, p, 50) for p in prompts]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_speaks_on_a_cpu_about_as_float32_does(dtype):
    model, idx = lively(), torch.randint(64, (2, 12))
    wide = model(idx)[0]
    torch.testing.assert_close(model.to(dtype)(idx)[0].float(), wide, atol=0.05, rtol=0.05)
    with torch.no_grad():
        cache = gpt.Cache(model, 2)
        model.read(list(idx[:, :11]), cache)
        torch.testing.assert_close(model.step(idx[:, 11:], cache).float(), model.hidden(idx)[:, -1].float(), atol=0.05, rtol=0.05)


@needs_transformers
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("vocab", [50257, 50304])
def test_weights_go_from_transformers_to_here_and_back_with_equal_logits(tmp_path, tied, vocab):
    import transformers
    torch.manual_seed(0)
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=vocab, n_positions=32, n_embd=48, n_layer=3, n_head=4, tie_word_embeddings=tied)).eval()
    for p in theirs.parameters():
        torch.nn.init.normal_(p, std=0.1)
    theirs.save_pretrained(tmp_path / "a")
    ours = GPT.from_pretrained(str(tmp_path / "a")).eval()
    ours.save_pretrained(str(tmp_path / "b"))
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "b").eval()
    idx = torch.randint(50257, (2, 32))
    with torch.no_grad():
        torch.testing.assert_close(ours(idx, idx)[0], theirs(idx).logits, atol=1e-4, rtol=1e-4)
        assert back(idx).logits.size(-1) == 50257  # without padding
        torch.testing.assert_close(back(idx).logits, theirs(idx).logits[..., :50257], atol=1e-4, rtol=1e-4)


@needs_transformers
@pytest.mark.parametrize("switches", [dict(bias=False), dict(act="relu2"), dict(act="gelu_erf", tie_head=False), dict(pos="sinusoidal"), dict(qkv_bias=False)],
                         ids=lambda s: " ".join(map(str, s.values())))
def test_an_export_has_the_logits_of_the_model_whatever_its_switches(tmp_path, switches):
    import transformers
    model, idx = lively(**switches, vocab_size=64, n_tokens=60), torch.randint(60, (2, 16))
    model.save_pretrained(str(tmp_path))
    with torch.no_grad():
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()(idx).logits
        torch.testing.assert_close(model(idx, idx)[0][..., :60], theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("switch, value", [("pos", "rotary"), ("norm", "rms"), ("qk_norm", True), ("softcap", 15.0), ("head_bias", True)])
def test_an_export_refuses_by_name_what_hugging_faces_gpt2_has_not(tmp_path, switch, value):
    with pytest.raises(gpt.UserError, match=f"no {switch}={value}"):
        GPT(small(**{switch: value})).save_pretrained(str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


TEXTS = ["Once upon a time, there was  a \n\n ☃ don't 1234 'll", "".join(map(chr, range(1, 400))), "   \t\r\n x"]


@needs_transformers
@pytest.mark.parametrize("kind", ["byte", "bpe", pytest.param("gpt2", marks=needs_gpt2)])
def test_an_exported_tokenizer_gives_the_tokens_of_the_model(workspace, tmp_path, kind):
    import transformers
    spec = {**make_bpe(stories(200), 900), "special": [dataset.EOT, "<|pad|>"]} if kind == "bpe" else {"name": kind}
    enc = dataset.get_tokenizer(spec)
    speak.export(GPT(small(vocab_size=enc.n_vocab)), enc, str(tmp_path / "out"))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    rng = random.Random(0)
    texts = TEXTS + stories(300) + ["".join(rng.choices("etaoin shrdlu\n'.", k=300)) for _ in range(100)]
    assert [theirs(t)["input_ids"] for t in texts] == [enc.encode_ordinary(t) for t in texts]
    assert theirs.eos_token_id == json.load(open(tmp_path / "out/config.json"))["eos_token_id"] == enc.eot_token and theirs.decode(enc.encode_ordinary(TEXTS[1])) == TEXTS[1]


@needs_transformers
def test_eval_exports_what_eval_and_transformers_read(workspace, tmp_path):
    import transformers
    ckpt = "runs/fp32/checkpoints/model_000030.pt"
    say = lambda ckpt: script(here("eval.py"), f"--ckpt={ckpt}", "--prompt=Once", "--max_new_tokens=20", "--temperature=0", cwd=workspace)
    r = script(here("eval.py"), f"--ckpt={ckpt}", f"--export={tmp_path}/hf", cwd=workspace)
    assert r.returncode == 0 and say(f"{tmp_path}/hf").stdout == (before := say(ckpt).stdout) != "", r.stderr
    model, tokenizer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf"), transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    idx = torch.tensor([[tokenizer.bos_token_id] + tokenizer("Once")["input_ids"]])
    out = model.generate(idx, max_new_tokens=20, do_sample=False, pad_token_id=0)[0]
    assert tokenizer.decode(out, skip_special_tokens=True).rstrip() == before.rstrip()


class GPTConfig_:
    """Stands for build-nanogpt's class, whose objects its checkpoints hold."""
    def __init__(self, **fields):
        self.__dict__.update(fields)


GPTConfig_.__qualname__ = GPTConfig_.__name__ = "GPTConfig"
GPTConfig_.__module__ = "train_gpt2"


@pytest.mark.parametrize("kind", ["nanogpt", "build-nanogpt", "bare weights"])
def test_checkpoints_of_nanogpt_and_build_nanogpt_load(tmp_path, monkeypatch, kind):
    act = "gelu_erf" if kind == "nanogpt" else "gelu"
    torch.manual_seed(0)
    model = GPT(small(n_head=4, n_embd=256, act=act)).eval()
    weights = {("module._orig_mod." if kind == "build-nanogpt" else "_orig_mod.") + k: v for k, v in model.state_dict().items()}
    weights["_orig_mod.transformer.h.0.attn.bias"] = torch.ones(16, 16).tril()  # the mask of old versions
    monkeypatch.setitem(sys.modules, "train_gpt2", type(sys)("train_gpt2"))
    monkeypatch.setattr(sys.modules["train_gpt2"], "GPTConfig", GPTConfig_, raising=False)
    said = dict(n_layer=2, n_head=4, n_embd=256, block_size=16, vocab_size=64)
    torch.save({"nanogpt": {"model": weights, "model_args": {**said, "bias": True, "dropout": 0.0}, "iter_num": 7, "best_val_loss": torch.tensor(3.0), "config": {"a": 1}},
                "build-nanogpt": {"model": weights, "config": GPTConfig_(**said), "step": 7, "val_loss": 3.0}, "bare weights": weights}[kind], tmp_path / "ckpt.pt")
    monkeypatch.delitem(sys.modules, "train_gpt2")
    loaded, rest = gpt.load_checkpoint(str(tmp_path / "ckpt.pt"))
    idx = torch.randint(64, (2, 16))
    assert torch.equal(loaded(idx, idx)[0], model(idx, idx)[0]) and rest["step"] == (0 if kind == "bare weights" else 7)


def test_a_checkpoint_that_would_run_code_does_not(tmp_path):
    class Hostile:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)
    torch.save({"model": {}, "config": Hostile()}, tmp_path / "ckpt.pt")
    with pytest.raises(gpt.UserError, match="is not a checkpoint"):
        gpt.load_checkpoint(str(tmp_path / "ckpt.pt"))
    assert not (tmp_path / "ran").exists()


@pytest.mark.skipif("NANOGPT" not in os.environ, reason="needs nanoGPT's sources: NANOGPT=folder")
def test_twenty_adamw_steps_give_the_losses_of_nanogpt():
    spec = importlib.util.spec_from_file_location("nanogpt_model", os.path.join(os.environ["NANOGPT"], "model.py"))
    nano = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(nano)
    torch.manual_seed(0)
    ours = GPT(GPTConfig(block_size=64, vocab_size=512, n_layer=4, n_head=4, n_embd=128, act="gelu_erf"))
    theirs = nano.GPT(nano.GPTConfig(block_size=64, vocab_size=512, n_layer=4, n_head=4, n_embd=128, dropout=0.0, bias=True))
    theirs.load_state_dict(ours.state_dict())
    a = torch.optim.AdamW(ours.optimizer_groups(0.1), lr=1e-3, betas=(0.9, 0.95), fused=True)
    b = theirs.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu")
    worst = 0
    for _ in range(20):
        x, y = torch.randint(512, (2, 8, 64))
        losses = []
        for m, optimizer in ((ours, a), (theirs, b)):
            loss = m(x, y)[1]
            loss.backward()
            torch.nn.utils.clip_grad_norm_(m.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        worst = max(worst, abs(losses[0] - losses[1]))
    print(f"largest difference in 20 steps: {worst:.2e}")
    assert worst < 1e-5


# -- dataset.py

def naive_bpe(text, n_merges):
    """Counts every pair anew for every merge."""
    import regex
    words = Counter(tuple(bytes([b]) for b in w.encode()) for w in regex.findall(dataset.GPT2_SPLIT, text))
    merges = []
    for _ in range(n_merges):
        pairs = Counter()
        for word, n in words.items():
            for pair in zip(word, word[1:]):
                pairs[pair] += n
        best = max(pairs, key=lambda p: (pairs[p], p))
        merges.append(best)
        merged = Counter()
        for word, n in words.items():
            out, i = [], 0
            while i < len(word):
                if word[i:i + 2] == best:
                    out.append(word[i] + word[i + 1])
                    i += 2
                else:
                    out.append(word[i])
                    i += 1
            merged[tuple(out)] += n
        words = merged
    return merges


@pytest.mark.parametrize("text", ["aaaaaaa aaaa aaa abab ababab bcbc abcabc " * 3, "\n".join(stories(40)), "zq zq qz qz äö äö öä ☃☃☃ \0\0\0 1234 1234"],
                         ids=["repeats", "stories", "ties and other alphabets"])
def test_bpe_merges_equal_those_of_a_slow_obvious_loop(text):
    n = len(dataset.train_bpe([text], 400))
    assert n > 10 and dataset.train_bpe([text], 400) == naive_bpe(text, n)


@pytest.mark.skipif(not installed("tokenizers"), reason="needs the package tokenizers")
def test_bpe_merges_are_those_of_hugging_face_but_for_ties():
    """
    Ours take the greater of two pairs that are equally frequent, theirs another: so their merges are made again one by one,
    each time over all the pairs that are as frequent as any.
    """
    import regex
    import tokenizers
    text = "\n".join(stories(60))
    theirs = tokenizers.ByteLevelBPETokenizer()
    theirs.train_from_iterator([text], vocab_size=256 + 500, min_frequency=1, show_progress=False)
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in json.loads(theirs._tokenizer.to_str())["model"]["merges"]]
    words = Counter(tuple(w.replace(" ", "Ġ").replace("\n", "Ċ")) for w in regex.findall(dataset.GPT2_SPLIT, text))
    ours = dataset.train_bpe([text], 256 + 501)
    assert text.isascii() and len(merges) == len(ours) == 500
    for theirs, (a, b) in zip(merges, ours):
        pairs = Counter()
        for word, n in words.items():
            for pair in zip(word, word[1:]):
                pairs[pair] += n
        assert pairs[theirs] == max(pairs.values())
        words = Counter({tuple(re.sub(r"(?<!\S)" + re.escape(" ".join(theirs)) + r"(?!\S)", "".join(theirs), " ".join(w)).split(" ")): n for w, n in words.items()})
    named = lambda pair: tuple(t.decode().replace(" ", "Ġ").replace("\n", "Ċ") for t in pair)
    assert len(set(map(named, ours)) & set(merges)) > 450


def make_bpe(texts, size):
    merges = dataset.train_bpe(texts, size)
    return {"name": f"bpe:{size}", "merges": [[a.decode("latin-1"), b.decode("latin-1")] for a, b in merges], "special": [dataset.EOT]}


def test_a_trained_tokenizer_has_the_size_asked_for_and_its_special_tokens_last():
    enc = dataset.get_tokenizer(make_bpe(stories(50), 600))
    assert enc.n_vocab == 600 and enc.eot_token == 599


@pytest.mark.parametrize("kind", ["byte", "bpe"])
def test_a_tokenizer_round_trips_any_text_and_any_bytes(kind):
    enc = dataset.get_tokenizer("byte" if kind == "byte" else make_bpe(stories(50), 500))
    rng = random.Random(0)
    code_points = [c for c in range(0x110000) if not 0xD800 <= c < 0xE000]
    text = "".join(map(chr, rng.sample(code_points, 5000))) + dataset.EOT
    assert enc.decode(enc.encode_ordinary(text)) == text
    raw = bytes(rng.randrange(256) for _ in range(5000))
    assert enc.decode_bytes([enc.encode_single_token(raw[i:i + 1]) for i in range(len(raw))]) == raw


def test_a_tokenizer_spec_survives_json():
    spec = make_bpe(stories(50), 400)
    a, b = dataset.get_tokenizer(spec), dataset.get_tokenizer(json.loads(json.dumps(spec)))
    assert dataset.tokenizer_fingerprint(a) == dataset.tokenizer_fingerprint(b) != dataset.tokenizer_fingerprint(dataset.get_tokenizer("byte"))


def slow_tokens(enc, documents):
    return [t for d in documents for t in [enc.eot_token, *enc.encode_ordinary(d)]]


def read_split(folder, split):
    paths = sorted(os.path.join(folder, n) for n in os.listdir(folder) if n.startswith(split))
    return np.concatenate([dataset.read_shard(p) for p in paths]).tolist() if paths else []


@needs_gpt2
@needs_wikitext
def test_gpt2_tokens_of_real_text_equal_tiktokens_own(tmp_path):
    dataset.prepare(WIKITEXT, out=str(tmp_path / "d"), val_tokens=0)
    with open(WIKITEXT, encoding="utf-8") as f:
        documents = [d.strip("\n") for d in re.split(r"\n(?:[ \t\r]*\n)+", f.read())]
    assert read_split(tmp_path / "d", "train") == slow_tokens(gpt2_vocabulary(), [d for d in documents if d])


@needs_gpt2
def test_a_text_in_one_piece_has_tiktokens_own_tokens_though_it_is_cut(tmp_path, monkeypatch):
    monkeypatch.setattr(dataset, "BATCH_BYTES", 1)  # every piece is encoded on its own
    text = "\n".join(stories(300)) + "".join(random.Random(0).choices(" \nab1'.é", k=5000))
    text = re.sub(r"\n\s+", "\n", text).strip("\n")
    (tmp_path / "t.txt").write_text(text, encoding="utf-8")
    dataset.prepare(str(tmp_path / "t.txt"), out=str(tmp_path / "d"), val_tokens=0)
    assert read_split(tmp_path / "d", "train") == slow_tokens(gpt2_vocabulary(), [text])


@pytest.mark.parametrize("raw", [b"a b\n\nc\n\n\n\nd\n", b"\xef\xbb\xbfa b\r\n\r\nc\r\n\r\n\r\nd", b"\n\na b\n \t \nc\n\nd\n\n\n"],
                         ids=["plain", "windows", "spaces on blank lines"])
def test_blank_lines_divide_documents(tmp_path, raw):
    (tmp_path / "t.txt").write_bytes(raw)
    dataset.prepare(str(tmp_path / "t.txt"), "byte", out=str(tmp_path / "d"), val_tokens=0)
    assert read_split(tmp_path / "d", "train") == slow_tokens(dataset.get_tokenizer("byte"), ["a b", "c", "d"])


def test_doc_sep_divides_documents(tmp_path):
    (tmp_path / "t.txt").write_text("one\n\ntwo\n<|endoftext|>\nthree")
    dataset.prepare(str(tmp_path / "t.txt"), "byte", out=str(tmp_path / "d"), val_tokens=0, doc_sep=dataset.EOT)
    assert read_split(tmp_path / "d", "train") == slow_tokens(dataset.get_tokenizer("byte"), ["one\n\ntwo", "three"])


def test_end_of_text_inside_a_document_is_ordinary_text(tmp_path):
    (tmp_path / "t.txt").write_text("a <|endoftext|> b\n\nc")
    dataset.prepare(str(tmp_path / "t.txt"), "byte", out=str(tmp_path / "d"), val_tokens=0)
    assert read_split(tmp_path / "d", "train") == slow_tokens(dataset.get_tokenizer("byte"), ["a <|endoftext|> b", "c"])


def test_a_shard_is_256_integers_and_uint16_tokens(tmp_path):
    dataset.write_shard(str(tmp_path / "s.bin"), [1, 2, 65535])
    raw = (tmp_path / "s.bin").read_bytes()
    assert struct.unpack("<256i", raw[:1024]) == (20240520, 1, 3) + (0,) * 253
    assert struct.unpack("<3H", raw[1024:]) == (1, 2, 65535)
    assert dataset.read_shard(str(tmp_path / "s.bin")).tolist() == [1, 2, 65535]


@pytest.mark.skipif("LLMC" not in os.environ, reason="needs llm.c's sources: LLMC=folder")
def test_llmc_reads_a_shard_token_for_token(tmp_path):
    with open(os.path.join(os.environ["LLMC"], "train_gpt2.py")) as f:
        source = f.read()
    reader = {"np": np, "print0": print}
    exec(source[source.index("def _peek_data_shard"):source.index("class DistributedDataLoader")], reader)
    tokens = np.random.default_rng(0).integers(0, 50257, 100_000)
    dataset.write_shard(str(tmp_path / "s.bin"), tokens)
    assert reader["_peek_data_shard"](str(tmp_path / "s.bin")) == 100_000
    assert reader["_load_data_shard"](str(tmp_path / "s.bin")).tolist() == tokens.tolist()


def as_bytes(tokens):
    """Tokens of the byte tokenizer -> documents"""
    return bytes(t if t < 256 else 0 for t in tokens).decode().split("\0")[1:]


def test_a_tenth_of_a_small_texts_documents_is_kept_for_validation(tmp_path):
    (tmp_path / "t.txt").write_text("\n\n".join(stories(200)))
    dataset.prepare(str(tmp_path / "t.txt"), "byte", out=str(tmp_path / "d"))
    enc = dataset.get_tokenizer("byte")
    assert read_split(tmp_path / "d", "val") == slow_tokens(enc, stories(200)[::10])
    assert read_split(tmp_path / "d", "train") == slow_tokens(enc, [s for i, s in enumerate(stories(200)) if i % 10])


def test_val_tokens_takes_the_beginning_of_the_stream_exactly(tmp_path):
    (tmp_path / "t.txt").write_text("\n\n".join(stories(100)))
    dataset.prepare(str(tmp_path / "t.txt"), "byte", out=str(tmp_path / "d"), val_tokens=5001, shard_tokens=2000)
    whole = slow_tokens(dataset.get_tokenizer("byte"), stories(100))
    assert read_split(tmp_path / "d", "val") == whole[:5001] and read_split(tmp_path / "d", "train") == whole[5001:]


def test_one_long_document_is_divided_into_train_and_val(tmp_path):
    text = "\n".join(stories(100))
    (tmp_path / "t.txt").write_text(text)
    dataset.prepare(str(tmp_path / "t.txt"), "byte", out=str(tmp_path / "d"))
    pieces = [p for split in ("val", "train") for p in as_bytes(read_split(tmp_path / "d", split))]
    val, both = len(read_split(tmp_path / "d", "val")), len(text) + len(pieces)
    assert val + len(read_split(tmp_path / "d", "train")) == both and 0.05 < val / both < 0.15
    assert all(p in text for p in pieces)  # what is not neighbours is not joined


def test_the_manifest_counts_tokens_bytes_and_documents(tmp_path):
    (tmp_path / "t.txt").write_text("\n\n".join(s + " äö" for s in stories(60)), encoding="utf-8")
    dataset.prepare(str(tmp_path / "t.txt"), "bpe:300", out=str(tmp_path / "d"), shard_tokens=3000)
    shards = json.load(open(tmp_path / "d/meta.json"))["shards"]
    assert sum(s["documents"] for s in shards) == 60
    assert sum(s["bytes"] for s in shards) == sum(len((s + " äö").encode()) for s in stories(60))
    for s in shards:
        assert len(dataset.read_shard(str(tmp_path / "d" / s["file"]))) == s["tokens"] <= 3000


def tables(tmp_path, texts):
    import pyarrow
    import pyarrow.parquet
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"n": i, "text": t}) + "\n" for i, t in enumerate(texts)), encoding="utf-8")
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "t.parquet", row_group_size=100)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_tables_are_read_as_documents(tmp_path, kind):
    texts = stories(700) + ["", "one <|endoftext|> two", "half a pair: \ud83d"[:-1]]
    tables(tmp_path, texts)
    dataset.prepare(str(tmp_path / f"t.{kind}"), "byte", out=str(tmp_path / "d"), val_tokens=0)
    assert read_split(tmp_path / "d", "train") == slow_tokens(dataset.get_tokenizer("byte"), [t for t in texts if t])


@pytest.mark.parametrize("kind", ["txt", "long", "jsonl", "parquet"])
def test_a_source_goes_on_from_any_state(tmp_path, kind, monkeypatch):
    monkeypatch.setattr(dataset, "BATCH_BYTES", 10_000)
    tables(tmp_path, stories(900))
    (tmp_path / "t.txt").write_text("\n\n".join(stories(900)))
    (tmp_path / "t.long").write_text("\n".join(stories(500)) + "\n\n" + " é".join(stories(400)), encoding="utf-8")
    source = dataset.open_source(str(tmp_path / f"t.{kind}"))
    batches = [(pieces, json.loads(json.dumps(state))) for pieces, state in source.read(None)]
    assert len(batches) > 3
    for i, (_, state) in enumerate(batches):
        assert [p for pieces, _ in source.read(state) for p in pieces] == [p for pieces, _ in batches[i + 1:] for p in pieces]


def digest(folder):
    return {n: hashlib.sha256(open(os.path.join(folder, n), "rb").read()).hexdigest() for n in sorted(os.listdir(folder))}


@pytest.mark.parametrize("source", ["t.txt", "a.txt,b.txt", "p.jsonl"], ids=["one source", "a mix", "pairs"])
def test_a_preparation_killed_again_and_again_ends_in_the_same_bytes(tmp_path, source):
    write_lines(tmp_path / "p.jsonl", some_pairs(9000, mean=120))
    for name, n in (("t", 3), ("a", 2), ("b", 1)):
        (tmp_path / f"{name}.txt").write_text("\n\n".join(stories(2000) * n))
    go = f"import dataset, sys; dataset.SAVE_SECONDS = 0.02; dataset.BATCH_BYTES = 20_000; " \
         f"dataset.prepare('{source}', 'bpe:400', out=sys.argv[1], shard_tokens=70_000, splits='95/3/2')"
    env = {**os.environ, "PYTHONPATH": HERE}
    subprocess.run([sys.executable, "-c", go, "whole"], cwd=tmp_path, env=env, check=True, capture_output=True)
    size = lambda: sum(os.path.getsize(e) for e in os.scandir(tmp_path / "cut") if e.name.endswith(".bin")) if (tmp_path / "cut").exists() else 0
    rng, total, killed = random.Random(0), sum(os.path.getsize(e) for e in os.scandir(tmp_path / "whole")), 0
    for share in (0.0, 0.15, 0.35, 0.6, 0.8):
        p = subprocess.Popen([sys.executable, "-c", go, "cut"], cwd=tmp_path, env=env, stdout=subprocess.DEVNULL)
        while size() <= share * total and p.poll() is None:
            time.sleep(0.002)
        time.sleep(rng.random() * 0.05)
        killed += p.poll() is None
        p.kill()
        p.wait()
    assert killed >= 4, "the preparation was too fast to be killed"
    subprocess.run([sys.executable, "-c", go, "cut"], cwd=tmp_path, env=env, check=True, capture_output=True)
    assert digest(tmp_path / "cut") == digest(tmp_path / "whole")


@pytest.fixture(scope="session")
def mix(tmp_path_factory):
    """Documents of a's and of b's, each ending in its own number, mixed 3:1.  -> the folder, and the documents in order by split"""
    folder, rng = tmp_path_factory.mktemp("mix"), random.Random(0)
    texts = {name: [name * rng.randint(1, 4000) + str(i) for i in range(n)] for name, n in (("a", 1800), ("b", 900))}
    for name, documents in texts.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in documents))
    dataset.prepare(f"{folder}/a.jsonl,{folder}/b.jsonl", "byte", out=str(folder / "d"), weights=[3, 1], splits="98/1/1", shard_tokens=1_000_000)
    return texts, {name: as_bytes(read_split(folder / "d", name)) for name in ("train", "val", "test")}


def test_a_mix_loses_no_document_and_has_none_twice(mix):
    texts, splits = mix
    assert sorted(sum(splits.values(), [])) == sorted(texts["a"] + texts["b"])
    for name in "ab":
        assert [d for d in splits["train"] if d[0] == name] == [t for i, t in enumerate(texts[name]) if i % 100 not in (0, 10)]
    assert sorted(splits["test"]) == sorted(texts["a"][10::100] + texts["b"][10::100])


def test_a_mix_of_three_to_one_holds_in_every_stretch_of_a_million_tokens(mix):
    tokens = np.concatenate([np.full(len(d) + 1, d[0] == "a") for d in mix[1]["train"]])
    both = min(len(tokens) - np.argmax(tokens[::-1]), len(tokens) - np.argmin(tokens[::-1]))  # until one runs out
    assert both > 3_000_000
    of_a = np.concatenate(([0], tokens[:both].cumsum()))
    shares = (of_a[1_000_000:] - of_a[:-1_000_000]) / 1_000_000
    assert 0.74 < shares.min() and shares.max() < 0.76


def test_long_documents_of_a_mix_are_neither_broken_nor_joined(tmp_path, monkeypatch):
    monkeypatch.setattr(dataset, "BATCH_BYTES", 20_000)
    texts = {f"{name}{i}": " ".join([f"{name}{i}"] * 10_000) for name in "ab" for i in range(12)}
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text("\n\n".join(texts[f"{name}{i}"] for i in range(12)))
    dataset.prepare(f"{tmp_path}/a.txt,{tmp_path}/b.txt", "byte", out=str(tmp_path / "d"), splits="90/10")
    train, val = (as_bytes(read_split(tmp_path / "d", split)) for split in ("train", "val"))
    assert all(len(set(d.split())) == 1 for d in train + val) and len(val) > 4
    words = Counter(w for d in train + val for w in d.split())
    assert set(words) == set(texts) and set(words.values()) == {10_000}
    assert max(Counter(d.split()[0] for d in train).values()) <= 4  # a document loses a piece or two to val, and is whole between


def test_a_budget_that_ends_in_the_middle_of_a_table_ends_well(tmp_path):
    import pyarrow
    import pyarrow.parquet
    pyarrow.parquet.write_table(pyarrow.table({"text": stories(2000) * 3}), tmp_path / "t.parquet", row_group_size=200)
    for i in range(3):
        r = script(here("dataset.py"), "--source=t.parquet", "--tokenizer=byte", "--max_bytes=3e5", f"--out=d{i}", cwd=tmp_path)
        assert r.returncode == 0, r.stderr


def test_a_text_budget_ends_with_the_document_that_reaches_it(tmp_path):
    (tmp_path / "t.txt").write_text("\n\n".join(stories(200)))
    total, n = 0, 0
    while total < 20_000:
        total, n = total + len(stories(200)[n].encode()), n + 1
    dataset.prepare(str(tmp_path / "t.txt"), "byte", out=str(tmp_path / "d"), val_tokens=0, max_bytes=20_000)
    assert read_split(tmp_path / "d", "train") == slow_tokens(dataset.get_tokenizer("byte"), stories(n))


@pytest.mark.parametrize("shares", [(90, 10, 0), (98, 1, 1), (50, 25, 25), (100, 0, 0)])
def test_a_hundred_documents_in_a_row_have_the_shares_asked_for(shares):
    for start in (0, 100, 4200):
        found = Counter(dataset.split_of(i, shares) for i in range(start, start + 100))
        assert tuple(found[split] for split in ("train", "val", "test")) == shares


# Where the files of a hub dataset lie, and what its card says of them.
HUB = {
    "fineweb-edu": ("sample/10BT/000_00000.parquet", "- config_name: sample-10BT\n  data_files:\n  - split: train\n    path: sample/10BT/*"),
    "fineweb": ("sample/10BT/000_00000.parquet", "- config_name: sample-10BT\n  data_files:\n  - split: train\n    path: sample/10BT/*"),
    "custom-gpt": ("sample/10BT/000_00000.parquet", "- config_name: sample-10BT\n  data_files:\n  - split: train\n    path: sample/10BT/*"),
    "tinystories": ("data/train-00000-of-00001.parquet", None),
    "wikisource": ("20231201.en/train-00000-of-00001.parquet", "- config_name: 20231201.en\n  data_files:\n  - split: train\n    path: 20231201.en/train-*"),
    "redpajama-sample": ("default/train/0000.parquet", None),
}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The hub's named datasets, a few stories each, in folders laid out as theirs; the real `datasets` reads them, streaming."""
    import pyarrow
    import pyarrow.parquet
    for name, (path, card) in HUB.items():
        file = tmp_path / "hub" / name / path
        file.parent.mkdir(parents=True)
        pyarrow.parquet.write_table(pyarrow.table({"id": list(range(120)), "text": stories(120)}), file)
        if card:
            (tmp_path / "hub" / name / "README.md").write_text(f"---\nconfigs:\n{card}\n---\n")
        monkeypatch.setitem(dataset.SOURCES, name, {**dataset.SOURCES[name], "hub": str(tmp_path / "hub" / name)})
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", HUB)
def test_a_named_source_is_prepared_from_files_laid_out_as_the_hubs(hub, name):
    folder = dataset.prepare(name, None if name == "custom-gpt" else "byte", shard_tokens=10_000)
    tokens = sum((read_split(folder, split) for split in ("val", "train")), [])
    documents = dataset.get_tokenizer(folder).decode(tokens).split(dataset.EOT)[1:]
    assert folder == f"data/{name}" and sorted(documents) == sorted(stories(120))


def test_toygpts_mix_is_divided_98_1_1(hub):
    manifest = json.load(open(dataset.prepare("toygpt", "byte") + "/meta.json"))
    assert {s["split"]: s["documents"] for s in manifest["shards"]} == {"train": 232, "val": 4, "test": 4}


def test_custom_gpts_tokenizer_has_its_special_tokens(hub):
    enc = dataset.get_tokenizer(dataset.prepare("custom-gpt"))
    assert enc.special_tokens_set == {"<|endoftext|>", "<|pad|>", "<|user|>", "<|assistant|>"}


@pytest.mark.skipif(importlib.util.find_spec("fcntl") is None, reason="needs fcntl, which Windows has not")
def test_a_second_preparation_of_a_folder_waits_for_the_first(workspace, tmp_path, capsys):
    os.makedirs(tmp_path / "d")
    second = threading.Thread(target=dataset.prepare, args=(str(workspace / "t.txt"), "byte"), kwargs=dict(out=str(tmp_path / "d")), daemon=True)
    with dataset.alone(tmp_path / "d"):
        second.start()
        second.join(1)
        assert second.is_alive() and not os.listdir(tmp_path / "d") and "waiting for another process" in capsys.readouterr().out
    second.join(60)
    assert (tmp_path / "d/meta.json").exists()


@pytest.mark.parametrize("changed", ["train_000000.bin", "train_000000.mask"])
def test_a_shard_that_is_not_what_was_written_is_found_when_its_data_is_asked_for_again(workspace, tmp_path, changed):
    prepare = lambda: dataset.prepare(str(workspace / "pairs.jsonl"), "byte", out=str(tmp_path / "d"))
    prepare()
    prepare()
    raw = bytearray((tmp_path / "d" / changed).read_bytes())
    raw[-100] ^= 1
    (tmp_path / "d" / changed).write_bytes(raw)
    with pytest.raises(dataset.UserError, match=changed + " is not what was written"):
        prepare()


def test_a_source_with_an_address_is_downloaded_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plays.txt").write_text("First Citizen:\nSpeak.\n\nAll:\nSpeak, speak.\n" * 50)
    monkeypatch.setitem(dataset.SOURCES, "shakespeare", {**dataset.SOURCES["shakespeare"], "url": (tmp_path / "plays.txt").as_uri()})
    dataset.prepare("shakespeare", "byte", val_tokens=0)
    assert read_split(tmp_path / "data/shakespeare", "train") == slow_tokens(dataset.get_tokenizer("byte"), [(tmp_path / "plays.txt").read_text().strip()])
    (tmp_path / "plays.txt").unlink()
    dataset.prepare("shakespeare", "byte", val_tokens=0)


def test_a_preparation_killed_before_its_first_save_goes_on(tmp_path):
    (tmp_path / "t.txt").write_text("\n\n".join(stories(30)))
    dataset.prepare(str(tmp_path / "t.txt"), "bpe:300", out=str(tmp_path / "d"))
    whole = digest(tmp_path / "d")
    settings = json.load(open(tmp_path / "d/meta.json"))["settings"]
    os.remove(tmp_path / "d/meta.json")
    (tmp_path / "d/progress.json").write_text(json.dumps(dict(settings=settings, sources=[dict(state=None, pieces=0, taken=0, tokens=0)], shards=[])))
    dataset.prepare(str(tmp_path / "t.txt"), "bpe:300", out=str(tmp_path / "d"))
    assert digest(tmp_path / "d") == whole


def test_a_shard_that_lost_bytes_is_not_filled_with_zeros(tmp_path):
    dataset.write_shard(str(tmp_path / "train_000000.bin"), [7] * 50)
    shard = dict(file="train_000000.bin", split="train", tokens=90, bytes=90, documents=1, crc32=0)
    with pytest.raises(dataset.UserError, match="not as it was left"):
        dataset.ShardWriter(str(tmp_path), 100, np.ones(256), 256, [shard])


@pytest.mark.parametrize("tokens, val", [(None, 21), (1e9, 21), (10e9, 1000)], ids=["unknown size", "small", "large"])
def test_a_hub_dataset_keeps_its_first_shard_or_a_tenth_for_validation(tmp_path, monkeypatch, tokens, val):
    monkeypatch.setitem(dataset.SOURCES, "fake", dict(hub="a/b", tokens=tokens and tokens / 1e5))
    monkeypatch.setattr(dataset, "read_dataset", lambda *a, **k: iter([([("x" * 20, True)] * 6000, None)]))
    dataset.prepare("fake", "byte", out=str(tmp_path / "d"), shard_tokens=1000)
    got = len(read_split(tmp_path / "d", "val"))
    assert got == (1000 if val == 1000 else 21 * 600) and got + len(read_split(tmp_path / "d", "train")) == 21 * 6000


def test_the_fingerprint_of_a_tokenizer_tells_ids_apart():
    spec = lambda *merges: {"name": "bpe:259", "merges": [list(m) for m in merges], "special": [dataset.EOT]}
    a, b = (dataset.get_tokenizer(spec(*m)) for m in (("ab", "cd"), ("cd", "ab")))
    assert dataset.tokenizer_fingerprint(a) != dataset.tokenizer_fingerprint(b)


def test_a_finished_folder_is_left_alone(tmp_path, capsys):
    (tmp_path / "t.txt").write_text("\n\n".join(stories(30)))
    dataset.prepare(str(tmp_path / "t.txt"), "byte", out=str(tmp_path / "d"))
    before = {e.name: e.stat().st_mtime_ns for e in os.scandir(tmp_path / "d")}
    dataset.prepare(str(tmp_path / "t.txt"), "byte", out=str(tmp_path / "d"))
    assert "complete" in capsys.readouterr().out and before == {e.name: e.stat().st_mtime_ns for e in os.scandir(tmp_path / "d")}


def test_a_changed_text_is_not_taken_for_the_old_one(tmp_path):
    (tmp_path / "t.txt").write_text("\n\n".join(stories(30)))
    dataset.prepare(str(tmp_path / "t.txt"), "byte", out=str(tmp_path / "d"))
    (tmp_path / "t.txt").write_text("\n\n".join(stories(31)))
    with pytest.raises(dataset.UserError, match="another version"):
        dataset.prepare(str(tmp_path / "t.txt"), "byte", out=str(tmp_path / "d"))


def test_no_more_than_a_few_batches_wait_in_memory(tmp_path, monkeypatch):
    read, encoded, ahead = [0], [0], []

    def endless(state):
        for i in range(200):
            read[0] += 1
            ahead.append(read[0] - encoded[0])
            yield [("x" * 100, True)], i

    def slow(enc, pieces):
        time.sleep(0.001)
        encoded[0] += 1
        return np.array([256] + [120] * 100, dtype=np.uint32)

    monkeypatch.setattr(dataset, "encode_pieces", slow)
    progress = dict(settings=dict(shard_tokens=10**6, val_tokens=0, max_bytes=None, splits=None), sources=[dict(state=None, pieces=0, taken=0, tokens=0)], shards=[])
    dataset.tokenize([dataset.Source("x", "x", endless)], dataset.get_tokenizer("byte"), str(tmp_path), progress, workers=2)
    assert progress["shards"][0]["tokens"] == 200 * 101 and max(ahead) < 12


# -- dataset.py: pairs

PAIR_LINES = {
    "prompt and response": (dict(prompt=" Hi\n", response="Hello."), [("Hi", "Hello.")]),
    "alpaca": (dict(instruction="Add.", input="1 and 2", output="3", text="Add 1 and 2: 3"), [("Add.\n\n1 and 2", "3")]),
    "alpaca without an input": (dict(instruction="Sing.", input=None, output="La."), [("Sing.", "La.")]),
    "chat with an empty system": (dict(messages=[dict(role="system", content=" "), dict(role="user", content="Hi"), dict(role="assistant", content="Hello.")]), [("Hi", "Hello.")]),
    "chat": (dict(messages=[dict(role="user", content="Hi"), dict(role="assistant", content="Hello.")]), [("Hi", "Hello.")]),
    "chat with a system, two turns and a question left open": (
        dict(prompt="Hi", messages=[dict(role=r, content=c) for r, c in zip(("system", "user", "assistant", "user", "assistant", "user"), ("Be kind.", "Hi", "Hello.", "Bye", "See you.", "?"))]),
        [("Be kind.\n\nHi", "Hello."), ("Bye", "See you.")]),
}
BAD_LINES = {
    "not JSON": b'{"prompt": "Hi", "resp', "not UTF-8": b'{"prompt": "\xff", "response": "x"}', "not a JSON object": b"[1]", "no response": b'{"prompt": "Hi"}',
    "empty response": b'{"prompt": "Hi", "response": " \\n"}', "prompt is not text": b'{"prompt": 3, "response": "x"}', "no output": b'{"instruction": "Hi"}',
    "no prompt": b'{"text": "Hi"}', "no content": b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant"}]}',
    "messages are not a user's and an assistant's in turn": b'{"messages": [{"role": "user", "content": "a"}, {"role": "tool", "content": "b"}]}',
    "input is not text": b'{"instruction": "a", "input": [1], "output": "b"}', "content is not text": b'{"messages": [{"role": "system", "content": ["s"]}]}',
    "messages is not a list of messages": b'{"messages": "a"}',
}
CHATTY = {"name": "bpe:260", "merges": [["l", "l"]], "special": [dataset.EOT, "<|user|>", "<|assistant|>"]}


@pytest.mark.parametrize("kind", PAIR_LINES)
def test_a_pair_is_read_whatever_its_form(kind):
    line, turns = PAIR_LINES[kind]
    assert dataset.parse_pair(json.dumps(line).encode())[1] == turns


@pytest.mark.parametrize("spec, user, assistant", [({"name": "byte"}, b"User:\n", b"\n\nAssistant:\n"), (CHATTY, [258], [259])], ids=["plain markers", "special tokens"])
def test_responses_and_their_ends_alone_are_learned_and_special_strings_in_a_text_stay_text(spec, user, assistant):
    enc = dataset.get_tokenizer(spec)
    said = ["Hi <|user|>", "<|endoftext|> yes", "Bye <|assistant|>", "no"]
    flagged = dataset.encode_chat(enc, dataset.chat_template(enc), [said[:2], said[2:]])
    a, b, c, d = (enc.encode_ordinary(text) for text in said)
    assert (flagged & 0xFFFF).tolist() == [enc.eot_token, *user, *a, *assistant, *b, enc.eot_token, *user, *c, *assistant, *d]
    assert (flagged >> 16).tolist() == [2] + [0] * len([*user, *a, *assistant]) + [1] * (len(b) + 1) + [0] * len([*user, *c, *assistant]) + [1] * len(d)
    assert max(a + b + c + d) < 257


def write_lines(path, rows):
    path.write_bytes(b"\n".join(row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows) + b"\n")
    return str(path)


def some_pairs(n, seed=0, mean=60):
    """Pairs of about as many bytes as that"""
    rng, words = random.Random(seed), " ".join(stories(50)).split()
    some = lambda: " ".join(rng.choices(words, k=1 + int(rng.lognormvariate(0, 0.8) * mean / 12)))
    return [dict(prompt=f"{i}: {some()}", response=some()) for i in range(n)]


def read_back(folder, split):
    """The pairs in the shards of a folder, as lists of (token, flag)"""
    names = sorted(n for n in os.listdir(folder) if n.startswith(split) and n.endswith(".bin"))
    tokens = np.concatenate([dataset.read_shard(f"{folder}/{n}") for n in names]).tolist()
    flags = np.concatenate([dataset.read_mask(f"{folder}/{n}") for n in names]).tolist()
    assert len(tokens) == len(flags)
    starts = [i for i, f in enumerate(flags) if f == 2] + [len(tokens)]
    return [list(zip(tokens[a:b], flags[a:b])) for a, b in zip(starts, starts[1:])]


def encoded_pairs(rows):
    enc = dataset.get_tokenizer("byte")
    flagged = (dataset.encode_chat(enc, dataset.chat_template(enc), [(r["prompt"], r["response"])]) for r in rows)
    return [list(zip((f & 0xFFFF).tolist(), (f >> 16).tolist())) for f in flagged]


def test_a_tenth_of_the_pairs_is_held_out_and_every_pair_is_whole_across_shards(tmp_path, capsys):
    rows = some_pairs(200)
    dataset.prepare(write_lines(tmp_path / "p.jsonl", rows), "byte", out=str(tmp_path / "d"), shard_tokens=3000)
    whole = encoded_pairs(rows)
    assert read_back(tmp_path / "d", "val") == whole[::10] and read_back(tmp_path / "d", "train") == [p for i, p in enumerate(whole) if i % 10]
    assert "p.jsonl: 200 pairs (prompt, response)" in capsys.readouterr().out and len(os.listdir(tmp_path / "d")) > 14


def test_bad_lines_are_counted_and_named_and_the_good_ones_kept(tmp_path, capsys):
    rows = some_pairs(30)
    lines = [*rows[:20], *BAD_LINES.values(), b"", *BAD_LINES.values(), *rows[20:]]
    dataset.prepare(write_lines(tmp_path / "p.jsonl", lines), "byte", out=str(tmp_path / "d"), splits="100/0")
    said = capsys.readouterr().out
    for i, why in enumerate(BAD_LINES, 21):
        assert f"p.jsonl: {why}: left out, 2 lines: {i}, {i + len(BAD_LINES) + 1}\n" in said
    assert read_back(tmp_path / "d", "train") == encoded_pairs(rows)


@pytest.mark.parametrize("why", BAD_LINES)
def test_strict_ends_with_the_first_bad_line_and_writes_nothing(tmp_path, why):
    path = write_lines(tmp_path / "p.jsonl", [*some_pairs(5), BAD_LINES[why], b"{"])
    with pytest.raises(dataset.UserError, match=f"p.jsonl, line 6: {why}; without --strict"):
        dataset.prepare(path, "byte", out=str(tmp_path / "d"), strict=True)
    assert os.listdir(tmp_path / "d") == []


def test_a_named_column_makes_a_text_of_a_file_of_pairs(tmp_path):
    path = write_lines(tmp_path / "p.jsonl", [dict(prompt="a", response="b", text=f"c{i}") for i in range(20)])
    dataset.prepare(path, "byte", out=str(tmp_path / "d"), column="text")
    assert sorted(as_bytes(read_split(tmp_path / "d", "train") + read_split(tmp_path / "d", "val"))) == sorted(f"c{i}" for i in range(20))


@contextlib.contextmanager
def serving(handler):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@contextlib.contextmanager
def stub_server(answer):
    """A server of chat completions. answer(prompt, n) of the n-th request: (status, headers, body), or None to hang up.  -> its address, and the requests' prompts, keys, and times"""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append((body["messages"][-1]["content"], self.headers["Authorization"], time.monotonic(), body))
            reply = answer(asked[-1][0], len(asked)) if self.path == "/v1/chat/completions" else (404, {}, b"")
            if reply:
                status, headers, content = reply
                self.send_response(status)
                for k, v in {"Content-Length": str(len(content)), **headers}.items():
                    self.send_header(k, v)
                self.end_headers()
                with contextlib.suppress(OSError):
                    self.wfile.write(content)

        def log_message(self, *args):
            pass

    with serving(Handler) as url:
        yield f"{url}/v1", asked


def completion(prompt):
    content = f"{prompt.upper()}, \u2603\n"
    return 200, {}, json.dumps({"choices": [{"message": {"role": "assistant", "content": content}, "finish_reason": "stop"}]}).encode()


FAILURES = [(500, {}, b"{}"), (429, {"Retry-After": "0.05"}, b""), (503, {}, b"busy"), None, (200, {}, b"<html>"), (200, {}, b'{"choices": []}'), (200, {"Content-Length": "999"}, b'{"choi'),
            (200, {}, b'{"choices": [{"message": {"content": " "}}]}')]
IMPATIENT = "import dataset; dataset.LONGEST_WAIT, dataset.TRIES = 0.05, 50; "  # eight failures in a row do happen


def test_a_synthesis_killed_five_times_ends_with_every_prompt_answered_once(tmp_path):
    rng, prompts = random.Random(0), [f"What is {i}?" for i in range(80)]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts + ["", prompts[3], f"  {prompts[5]} "]))
    answered = []

    def answer(prompt, n):
        time.sleep(0.02)
        if rng.random() < 0.4:
            return rng.choice(FAILURES)
        answered.append(prompt)
        return completion(prompt)

    out = tmp_path / "s/out.jsonl"
    lines = lambda: out.read_bytes().count(b"\n") if out.exists() else 0
    with stub_server(answer) as (url, asked):
        command = [sys.executable, "-c", IMPATIENT + "dataset.main()", "--source=synth", "--prompts=prompts.txt", f"--endpoint={url}", "--model=m", "--concurrency=4", f"--out={out}"]
        env = {**os.environ, "PYTHONPATH": HERE, "OPENAI_API_KEY": "sk-secret"}
        for goal in (1, 13, 26, 40, 55):
            p = subprocess.Popen(command, cwd=tmp_path, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            while lines() < goal and p.poll() is None:
                time.sleep(0.002)
            assert p.poll() is None, "the synthesis was too fast to be killed"
            p.kill()
            p.wait()
        with open(out, "ab") as f:
            f.write(b'{"prompt": "cut off')
        r = subprocess.run(command, cwd=tmp_path, env=env, text=True, capture_output=True)
    assert r.returncode == 0, r.stderr
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert sorted(row["prompt"] for row in rows) == sorted(prompts)
    for row in rows:
        assert row["response"] == row["prompt"].upper() + ", \u2603" and (row["model"], row["endpoint"], row["finish_reason"]) == ("m", f"{url}/chat/completions", "stop")
    assert len(answered) <= 80 + 5 * 4  # again is asked only what was on its way at a kill
    assert {key for _, key, *_ in asked} == {"Bearer sk-secret"} and "secret" not in r.stdout + r.stderr + out.read_text()
    assert r.stdout.splitlines()[0].endswith("of 80 prompts have their response") and [dataset.parse_pair(line)[0] for line in out.read_bytes().splitlines()] == ["prompt, response"] * 80


def test_a_failing_server_is_asked_until_it_answers_and_nothing_twice(tmp_path, monkeypatch):
    monkeypatch.setattr(dataset, "LONGEST_WAIT", 0.01)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    write_lines(tmp_path / "prompts.jsonl", [dict(prompt="a"), dict(instruction="b", input="c"), dict(prompt="a", response="old")] + [dict(prompt=f"{i}") for i in range(30)])
    tries, go = Counter(), lambda: dataset.synthesize(str(tmp_path / "prompts.jsonl"), url, "m", '{"temperature": 0.5, "messages": [{"role": "system", "content": "s"}]}', 5, str(tmp_path / "out.jsonl"))

    def answer(prompt, n):
        tries[prompt] += 1
        return completion(prompt) if tries[prompt] == 5 else FAILURES[(tries[prompt] + len(prompt) + ord(prompt[0])) % len(FAILURES)]

    with stub_server(answer) as (url, asked):
        go()
        assert set(tries.values()) == {5} and len(tries) == 32 and asked[0][1] is None
        assert (asked[0][3]["temperature"], asked[0][3]["model"], asked[0][3]["messages"][0]) == (0.5, "m", {"role": "system", "content": "s"})
        go()
    assert set(tries.values()) == {5} and len((tmp_path / "out.jsonl").read_text().splitlines()) == 32


@pytest.mark.parametrize("said", ["1", "in a second"])
def test_a_server_that_says_how_long_to_wait_is_left_alone_that_long(tmp_path, said):
    (tmp_path / "p.txt").write_text("\n".join(map(str, range(12))))

    def answer(prompt, n):
        when = said if said == "1" else email.utils.formatdate(time.time() + 2, usegmt=True)  # which has no fractions
        time.sleep(0.05)
        return (429, {"Retry-After": when}, b"") if n == 1 else completion(prompt)

    with stub_server(answer) as (url, asked):
        dataset.synthesize(str(tmp_path / "p.txt"), url, "m", concurrency=4, out=str(tmp_path / "out.jsonl"))
    times = [at - asked[0][2] for _, _, at, _ in asked]
    assert len(times) == 13 and not [t for t in times if 0.5 < t < 0.95] and times[-1] > 0.95 and sum(t < 0.5 for t in times) <= 7


def test_a_server_that_asks_for_patience_again_and_again_is_not_given_up(tmp_path):
    (tmp_path / "p.txt").write_text("\n".join(map(str, range(3))))
    with stub_server(lambda prompt, n: (503, {"Retry-After": "0.01"}, b"") if n < 60 else completion(prompt)) as (url, asked):
        dataset.synthesize(str(tmp_path / "p.txt"), url, "m", concurrency=2, out=str(tmp_path / "out.jsonl"))
    assert len(asked) == 62


@pytest.mark.parametrize("status, said", [(401, "does not take the key in OPENAI_API_KEY"), (404, "has no model m"), (302, "is not the server's address")])
def test_what_cannot_get_better_ends_a_synthesis_but_what_was_on_its_way_is_kept(tmp_path, monkeypatch, status, said):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    (tmp_path / "p.txt").write_text("\n".join(map(str, range(100))))

    def answer(prompt, n):
        if n == 10:
            return status, {"Location": "http://127.0.0.1:9/"}, b"sk-secret"
        time.sleep(0.3 * (n in (9, 11)))
        return completion(prompt)

    with stub_server(answer) as (url, asked):
        with pytest.raises(dataset.UserError, match=said) as e:
            dataset.synthesize(str(tmp_path / "p.txt"), url, "m", concurrency=3, out=str(tmp_path / "out.jsonl"))
    assert 10 <= len(asked) < 20 and "secret" not in str(e.value) and len((tmp_path / "out.jsonl").read_text().splitlines()) == len(asked) - 1


def test_prompts_that_are_refused_hold_up_no_other_and_a_dead_server_is_given_up(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(dataset, "LONGEST_WAIT", 0)
    (tmp_path / "p.txt").write_text("\n".join(map(str, range(100))))
    go = lambda: dataset.synthesize(str(tmp_path / "p.txt"), url, "m", concurrency=3, out=str(tmp_path / "out.jsonl"))
    with stub_server(lambda prompt, n: (500, {}, b"")) as (url, asked):
        with pytest.raises(dataset.UserError, match="^100 of 100 prompts have no response, the last for HTTP status 500"):
            go()
        assert 80 <= len(asked) <= 8 * 13
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True)  # where it tells more
        with pytest.raises(dataset.UserError):
            go()
        monkeypatch.undo()
    monkeypatch.setattr(dataset, "LONGEST_WAIT", 0)
    with stub_server(lambda prompt, n: (400, {}, b"") if int(prompt) < 20 else (500, {}, b"") if int(prompt) % 2 else completion(prompt)) as (url, asked):
        with pytest.raises(dataset.UserError, match="^60 of 100 prompts have no response, .*; the same command"):
            go()
        assert len(asked) == 20 + 40 + 40 * 8 and len((tmp_path / "out.jsonl").read_text().splitlines()) == 40
    said = capsys.readouterr().out
    assert "no response to '7': HTTP status 400\n" in said and "no response to '21': HTTP status 500\n" in said


def test_half_a_surrogate_pair_in_a_prompt_is_asked_once(tmp_path):
    write_lines(tmp_path / "p.jsonl", [b'{"prompt": "smile \\ud83d"}'])
    with stub_server(lambda prompt, n: completion(prompt)) as (url, asked):
        for _ in range(2):
            dataset.synthesize(str(tmp_path / "p.jsonl"), url, "m", out=str(tmp_path / "out.jsonl"))
    assert len(asked) == 1


def test_a_synthesis_leaves_other_files_and_other_processes_alone(tmp_path):
    answer = '{"prompt": "a", "response": "b", "model": "m"}'
    for text, why in (("mine\nall mine", "line 1, is not of"), ("mine", "line 1, is not of"), ('{"prompt": "mine", "response": "by hand"}', "line 1, is not of"),
                      (answer + "\n" + answer.replace('"m"', '"other"'), "has responses of other")):
        (tmp_path / "notes.jsonl").write_text(text)
        with pytest.raises(dataset.UserError, match=why):
            dataset.open_answers(str(tmp_path / "notes.jsonl"), "m")
        assert (tmp_path / "notes.jsonl").read_text() == text
    (tmp_path / "out.jsonl").write_text(answer)  # its newline was not written any more
    file, answered = dataset.open_answers(str(tmp_path / "out.jsonl"), "m")
    with pytest.raises(dataset.UserError, match="is being written by another process"):
        dataset.open_answers(str(tmp_path / "out.jsonl"), "m")
    file.close()
    assert answered == {"a"} and (tmp_path / "out.jsonl").read_text() == answer + "\n"


def test_a_folder_of_pairs_is_not_taken_for_one_of_texts(tmp_path):
    path = write_lines(tmp_path / "p.jsonl", [dict(prompt="a", response="b", text=f"c{i}") for i in range(20)])
    dataset.prepare(path, "byte", out=str(tmp_path / "d"))
    with pytest.raises(dataset.UserError, match="was made with column=None, not text"):
        dataset.prepare(path, "byte", out=str(tmp_path / "d"), column="text")


def test_files_of_pairs_are_mixed_whole(tmp_path):
    rows = [some_pairs(300, seed) for seed in (1, 2)]
    paths = [write_lines(tmp_path / f"{i}.jsonl", r) for i, r in enumerate(rows)]
    dataset.prepare(",".join(paths), "byte", out=str(tmp_path / "d"), weights=[2, 1], splits="100/0")
    a, b = map(encoded_pairs, rows)
    got = read_back(tmp_path / "d", "train")
    assert sorted(got) == sorted(a + b) and [p for p in got if p in a] == a
    assert sum(len(p) for p in got[:200] if p in a) / sum(len(p) for p in got[:200]) == pytest.approx(2 / 3, abs=0.02)


# -- data_loader.py

@pytest.fixture(scope="session")
def shards(tmp_path_factory):
    """Three shards, 2,000 tokens in all, each its own position in the stream; val is the first 300 again."""
    folder = tmp_path_factory.mktemp("shards")
    for i, (a, b) in enumerate(((0, 700), (700, 717), (717, 2000))):
        dataset.write_shard(str(folder / f"train_{i:06d}.bin"), np.arange(a, b))
    dataset.write_shard(str(folder / "val_000000.bin"), np.arange(300))
    return str(folder)


@pytest.mark.parametrize("B", [1, 3, 5])
@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_every_window_is_visited_exactly_once_an_epoch(shards, world_size, B):
    loaders = [DataLoader(shards, "train", B, 16, rank, world_size, seed=7) for rank in range(world_size)]
    n = loaders[0].n_windows
    assert n == (2000 - 17) // 16 + 1
    seen = []
    while len(seen) < 3 * n:
        seen += [row for loader in loaders for row in loader.next_batch()[0][:, 0].tolist()]
    orders = [seen[e * n:(e + 1) * n] for e in range(3)]
    assert all(sorted(order) == list(range(0, 16 * n, 16)) for order in orders)
    assert orders[0] != orders[1] != orders[2] and orders[0] != sorted(orders[0])


def test_the_order_depends_neither_on_processes_nor_on_the_micro_batch(shards):
    def order(B, world_size):
        loaders = [DataLoader(shards, "train", B, 16, rank, world_size) for rank in range(world_size)]
        return [row for _ in range(240 // (B * world_size)) for loader in loaders for row in loader.next_batch()[0][:, 0].tolist()]
    assert order(1, 1) == order(12, 1) == order(5, 2) == order(10, 8) != DataLoader(shards, "train", 240, 16, seed=1).next_batch()[0][:, 0].tolist()


def test_the_places_of_a_steps_data_are_where_its_windows_begin(shards):
    loaders = [DataLoader(shards, "train", 15, 16, rank, 2, stride=7) for rank in range(2)]
    windows = [row for loader in loaders for row in loader.next_batch()[0][:, 0].tolist()]
    places = re.findall(r"(\S+) at token ([\d,]+)", loaders[0].places(30, shown=30))
    assert [dataset.read_shard(path)[int(at.replace(",", ""))] for path, at in places] == windows and len({path for path, _ in places}) > 1
    assert loaders[0].places(30).endswith(" and 26 more") and "more" not in loaders[0].places(4)


@pytest.mark.parametrize("stride", [1, 7, 16, 40])
def test_windows_are_slices_of_the_stream_whatever_the_shards_and_the_stride(shards, stride):
    loader = DataLoader(shards, "train", 1, 16, stride=stride)
    assert loader.n_windows == len([i for i in range(0, 2000, stride) if i + 17 <= 2000])
    x, y = loader.windows(range(loader.n_windows))
    for i in range(loader.n_windows):
        assert x[i].tolist() == list(range(i * stride, i * stride + 16)) and y[i].tolist() == list(range(i * stride + 1, i * stride + 17))


def test_the_loaders_state_is_one_integer_that_seeks_at_once(shards):
    a, b = DataLoader(shards, "train", 4, 16), DataLoader(shards, "train", 4, 16)
    for _ in range(50):
        a.next_batch()
    assert a.state_dict() == {"position": 200}
    b.next_batch()
    b.load_state_dict(a.state_dict())
    assert torch.equal(a.next_batch()[0], b.next_batch()[0])
    b.load_state_dict({"position": 10**15})
    b.next_batch()


@pytest.mark.parametrize("n", [1, 2, 3, 17, 1000, 4096, 4097])
def test_the_permutation_is_one(n):
    assert sorted(permute(np.arange(n), n, seed=3, epoch=5).tolist()) == list(range(n))


def test_the_permutation_leaves_no_trace_of_the_old_order():
    p = permute(np.arange(50_000), 50_000, seed=0, epoch=0)
    assert abs(np.corrcoef(p, np.arange(50_000))[0, 1]) < 0.02 and abs(np.corrcoef(p[1:], p[:-1])[0, 1]) < 0.02


def test_the_share_that_padding_would_leave_equals_a_slow_count(tmp_path):
    (tmp_path / "t.txt").write_text("\n\n".join(stories(60)))
    dataset.prepare(str(tmp_path / "t.txt"), "byte", out=str(tmp_path / "d"), val_tokens=0)
    T, B, rows = 300, 4, []
    for story in stories(60):
        tokens = [256, *story.encode()]
        while tokens:
            rows.append(len(tokens[:T]))
            tokens = tokens[T:]
    batches = [rows[i:i + B] for i in range(0, len(rows) - B + 1, B)]
    assert DataLoader(str(tmp_path / "d"), "train", 1, T).padded_share(B) == pytest.approx(sum(map(sum, batches)) / sum(B * max(b) for b in batches))


@pytest.fixture(scope="session")
def pairs(tmp_path_factory):
    """500 pairs, the longest of them too long for a window of 256.  -> the folder, and its train and val pairs"""
    folder, rows = tmp_path_factory.mktemp("pairs"), some_pairs(500)
    dataset.prepare(write_lines(folder / "p.jsonl", rows), "byte", out=str(folder / "d"), shard_tokens=20_000)
    return str(folder / "d"), read_back(folder / "d", "train"), read_back(folder / "d", "val")


def unpacked(x, y, number):
    """The pairs in a batch, as (inputs, targets), from the order of the batch"""
    out = []
    for row, targets, n in zip(x.tolist(), y.tolist(), number.tolist()):
        for k in sorted(set(n) - {-1}):
            places = [i for i, m in enumerate(n) if m == k]
            assert places == list(range(places[0], places[-1] + 1))
            out.append(([row[i] for i in places], [targets[i] for i in places]))
    return out


@pytest.mark.parametrize("world_size, B", [(1, 1), (1, 5), (3, 2)])
def test_every_pair_is_whole_in_one_window_and_comes_once_an_epoch(pairs, world_size, B):
    folder, train_pairs, _ = pairs
    loaders = [DataLoader(folder, "train", B, 512, rank, world_size, doc_mask=True) for rank in range(world_size)]
    n, got = loaders[0].n_windows, []
    assert max(map(len, train_pairs)) <= 512
    while len(got) < n:
        batches = [loader.next_batch() for loader in loaders]
        got += [tuple(t[i:i + 1] for t in batch) for batch in batches for i in range(B)]
    got = [pair for window in got[:n] for pair in unpacked(*window)]
    expected = [([t for t, _ in p], [t if f == 1 else -1 for t, f in p[1:]] + [256]) for p in train_pairs]
    assert sorted(got) == sorted(expected)


def test_windows_of_pairs_are_filled_to_95_percent_at_realistic_lengths():
    lengths = np.random.default_rng(0).lognormal(4.6, 0.8, 20_000).astype(int).clip(10, 1024)  # a mean of 136 tokens
    rows = pack(lengths, 1024)
    assert sorted(i for row in rows for i in row) == list(range(20_000)) and max(lengths[row].sum() for row in rows) <= 1024
    assert lengths.sum() / (1024 * len(rows)) > 0.95


def test_a_pair_that_is_too_long_loses_its_prompts_beginning_and_then_its_responses_end():
    flags = np.array([2] + [0] * 10 + [1] * 5)  # places 0 to 15; the response begins at 11
    for T, kept, ended in ((16, [*range(16)], 1), (15, [0, *range(2, 16)], 1), (7, [0, *range(10, 16)], 1), (6, [0, *range(10, 15)], 0), (3, [0, 10, 11], 0)):
        places, flagged = cut(flags, T)
        assert (places.tolist(), flagged.tolist()) == (kept, [flags[i] for i in kept] + [ended]), T
    two_turns = np.array([2, 0, 0, 1, 1, 1, 1, 0, 0, 1, 1])
    places, flagged = cut(two_turns, 7)
    assert (places.tolist(), flagged.tolist()) == ([0, 5, 6, 7, 8, 9, 10], [2, 0, 1, 0, 0, 1, 1, 1])  # nothing is learned right after a gap


def test_the_first_windows_hold_pairs_of_every_length(pairs):
    loader = DataLoader(pairs[0], "train", 1, 512)
    first = [i for row in loader.rows[:len(loader.rows) // 4] for i in row]
    assert loader.lengths[first].mean() == pytest.approx(loader.lengths.mean(), rel=0.2)


def test_pairs_longer_than_the_context_are_counted(pairs):
    folder, train_pairs, _ = pairs
    loader = DataLoader(folder, "train", 1, 64)
    long = [p for p in train_pairs if len(p) > 64]
    cut_short = [p for p in long if sum(f == 1 for _, f in p) > 62]
    assert len(long) > 50 < len(cut_short) != len(long)
    assert loader.filling(1)[1] == f"{len(long):,} pairs are longer than the context and lose the beginning of the prompt, {len(cut_short):,} of them the end of the response, too"


@pytest.mark.parametrize("T", [40, 512])
def test_what_a_step_has_to_teach_is_known_before_it(pairs, T):
    loaders = [DataLoader(pairs[0], "train", 2, T, rank, 2) for rank in range(2)]
    for _ in range(loaders[0].n_windows // 8 + 3):
        told = loaders[0].learned(12)
        assert told == sum((loader.next_batch()[1] >= 0).sum().item() for _ in range(3) for loader in loaders)


def test_documents_of_a_window_are_numbered_where_attention_shall_stop(tmp_path):
    (tmp_path / "t.txt").write_text("\n\n".join(stories(50)))
    dataset.prepare(str(tmp_path / "t.txt"), "byte", out=str(tmp_path / "d"))
    x, y, number = DataLoader(str(tmp_path / "d"), "train", 8, 1000, doc_mask=True).next_batch()
    for row, numbers in zip(x.tolist(), number.tolist()):
        assert numbers == [sum(t == 256 for t in row[:i + 1]) for i in range(1000)]
    assert number.max() > 1


def test_numpy_shards_load(shards, tmp_path):
    np.save(tmp_path / "edufineweb_train_000001.npy", np.arange(2000, dtype=np.uint16))
    assert torch.equal(DataLoader(str(tmp_path), "train", 8, 16).next_batch()[0], DataLoader(shards, "train", 8, 16).next_batch()[0])


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="reads /proc")
def test_resident_memory_stays_flat_while_shards_are_read(tmp_path):
    dataset.write_shard(str(tmp_path / "train_000000.bin"), np.zeros(50_000_000, dtype=np.uint16))
    loader = DataLoader(str(tmp_path), "train", 64, 1024)
    resident = lambda: int(open("/proc/self/statm").read().split()[2]) * os.sysconf("SC_PAGE_SIZE")  # pages of files
    before = resident()
    for _ in range(loader.n_windows // 64):
        loader.next_batch()
    loader.ahead[1].result()  # a batch that is being read is in memory
    assert resident() - before < 20e6, "of 100 MB read"


def test_a_token_outside_the_vocabulary_is_named(tmp_path):
    dataset.write_shard(str(tmp_path / "train_000000.bin"), [1] * 50 + [999] + [1] * 50)
    with pytest.raises(dataset.UserError, match=r"train_000000.bin: token 999 at 50 is outside the vocabulary of 500"):
        DataLoader(str(tmp_path), "train", 6, 16, vocab_size=500).next_batch()


# -- train.py

FAST = ["--data=data/t", "--n_layer=2", "--n_head=2", "--n_embd=32", "--block_size=32", "--total_batch_size=256", "--max_steps=30", "--max_lr=1e-2", "--warmup_steps=4",
        "--val_interval=5", "--val_tokens=2000", "--ckpt_interval=2", "--sample_interval=0", "--hella_interval=0", "--device=cpu", "--dropout=0.1", "--dtype=float32"]


RUNS = {"fp32": FAST, "pairs": [  # in bfloat16, with a teacher
    *FAST, "--dtype=bfloat16", "--data=pairs.jsonl", "--tokenizer=byte", "--doc_mask", "--teacher=runs/fp32/checkpoints/model_000030.pt", "--patience=50"]}


@pytest.fixture(scope="session")
def workspace(tmp_path_factory):
    """A folder with data/t, stories in bytes, pairs.jsonl, and the runs of RUNS."""
    folder = tmp_path_factory.mktemp("work")
    (folder / "t.txt").write_text("\n\n".join(stories(150)))
    dataset.prepare(str(folder / "t.txt"), "byte", out=str(folder / "data/t"))
    write_lines(folder / "pairs.jsonl", some_pairs(150))
    for name, options in RUNS.items():
        r = script(here("train.py"), *options, f"--out_dir=runs/{name}", cwd=folder)
        assert r.returncode == 0, r.stderr
    return folder


def records(folder):
    """log.txt -> {(stream, step): line}, the last line of a step winning; what depends on the clock is left out"""
    out = {}
    with open(os.path.join(folder, "log.txt")) as f:
        for line in f:
            if line[0] != "#" and line.endswith("\n"):
                step, stream, *rest = line.split()
                out[stream, int(step)] = " ".join([step, stream] + [r for r in rest if r.split("=")[0] not in ("ms", "steps_s", "tok_s", "mfu", "usd")])
    return out


def losses(folder, stream="train"):
    return [float(line.split()[2]) for (s, _), line in sorted(records(folder).items(), key=lambda kv: kv[0][1]) if s == stream]


def test_training_lowers_the_loss(workspace):
    values = losses(workspace / "runs/fp32", "val")
    assert values[0] == pytest.approx(math.log(384), abs=0.1) and values[-1] < 3.5


@pytest.mark.parametrize("name", RUNS)
def test_a_run_killed_five_times_logs_the_losses_of_one_that_was_not(workspace, name, tmp_path):
    rng = random.Random(name)
    out, killed_in_save = tmp_path / "run", False
    command = [sys.executable, here("train.py"), *RUNS[name], f"--out_dir={out}", "--resume=auto"]
    reached = lambda: max([step for _, step in records(out)], default=-1) if (out / "log.txt").exists() else -1
    for kill_at in (1, 7, 13, 19, 24):
        p = subprocess.Popen(command, cwd=workspace, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while reached() < kill_at and p.poll() is None:
            time.sleep(0.005)
        half_written = lambda: any(e.name.endswith(".tmp") for e in os.scandir(out / "checkpoints"))
        if kill_at == 7:
            while p.poll() is None:
                if half_written():
                    p.send_signal(signal.SIGSTOP)
                    time.sleep(0.01)
                    if half_written():  # still, and nothing moves any more
                        break
                    p.send_signal(signal.SIGCONT)
        else:
            time.sleep(rng.random() * 0.03)
        assert p.poll() is None, f"the run ended before it could be killed after step {kill_at}"
        p.send_signal(signal.SIGKILL)
        p.wait()
        killed_in_save |= half_written()
    assert killed_in_save, "no kill came in the middle of a save"
    r = script(*command[1:-1], "--resume", cwd=workspace)
    assert r.returncode == 0, r.stderr
    assert records(out) == records(workspace / "runs" / name)


def torchrun(n, *args, cwd, **env):
    return script("-m", "torch.distributed.run", f"--nproc_per_node={n}", "--standalone", here("train.py"), *args, cwd=cwd, **env)


NO_DROPOUT = [*FAST, "--dropout=0", "--max_steps=16"]


@pytest.fixture(scope="session")
def one_process(workspace):
    r = script(here("train.py"), *NO_DROPOUT, "--ckpt_interval=6", "--out_dir=runs/one", cwd=workspace)
    assert r.returncode == 0, r.stderr
    return workspace / "runs/one"


def same(a, b):
    return len(losses(a)) == 16 and losses(a) == pytest.approx(losses(b), abs=1e-5) and losses(a, "val") == pytest.approx(losses(b, "val"), abs=1e-5)


def test_two_processes_give_the_losses_of_one(workspace, one_process):
    r = torchrun(2, *NO_DROPOUT, "--out_dir=runs/two", cwd=workspace)
    assert r.returncode == 0, r.stderr
    assert same(workspace / "runs/two", one_process)


def test_a_run_begun_on_one_process_goes_on_on_two(workspace, one_process, tmp_path):
    r = torchrun(2, "--resume=runs/one/checkpoints/model_000006.pt", f"--out_dir={tmp_path}", "--device=cpu", cwd=workspace)
    assert r.returncode == 0, r.stderr
    assert losses(tmp_path) == pytest.approx(losses(one_process)[6:], abs=1e-5)


@pytest.fixture(scope="session")
def zero2(workspace):
    r = torchrun(2, *NO_DROPOUT, "--parallel=zero2", "--micro_batch=2", "--ckpt_interval=6", "--sample_interval=6", "--out_dir=runs/zero2", cwd=workspace)
    assert r.returncode == 0, r.stderr
    return workspace / "runs/zero2"


def test_zero2_gives_the_losses_of_one_process(zero2, one_process):
    assert same(zero2, one_process)


def test_a_checkpoint_of_zero2_has_the_form_of_any_other(zero2, one_process):
    a, b = (gpt.read_checkpoint(f"{run}/checkpoints/model_000006.pt") for run in (zero2, one_process))
    for x, y in zip([*a["model"].values(), *a["optimizers"][0]["state"][3].values()], [*b["model"].values(), *b["optimizers"][0]["state"][3].values()], strict=True):
        torch.testing.assert_close(x, y, atol=1e-4, rtol=1e-3)
    assert a.keys() == b.keys() and a["model"].keys() == b["model"].keys()


def test_one_process_and_zero2_go_on_from_each_others_checkpoints(zero2, one_process, workspace, tmp_path):
    r = script(here("train.py"), f"--resume={zero2}/checkpoints/model_000006.pt", f"--out_dir={tmp_path}/one", "--parallel=ddp", cwd=workspace)
    assert r.returncode == 0 and losses(tmp_path / "one") == pytest.approx(losses(one_process)[6:], abs=1e-5), r.stderr
    r = torchrun(2, f"--resume={one_process}/checkpoints/model_000006.pt", f"--out_dir={tmp_path}/two", "--parallel=zero2", cwd=workspace)
    assert r.returncode == 0 and losses(tmp_path / "two") == pytest.approx(losses(one_process)[6:], abs=1e-5), r.stderr


@pytest.mark.parametrize("option", ["--optimizer=muon", "--compile=true"])
def test_zero2_says_what_it_does_not_go_with(workspace, option):
    r = script(here("train.py"), *FAST, "--parallel=zero2", option, cwd=workspace, WORLD_SIZE="2")
    assert r.returncode == 1 and r.stderr == "train.py: parallel=zero2 goes with optimizer=adamw, and without compile\n"


def test_zero2_keeps_half_of_weights_gradients_and_moments_on_each_of_two_processes(tmp_path):
    (tmp_path / "halves.py").write_text("""
import torch, train
from model import GPT, GPTConfig
torch.distributed.init_process_group("gloo")
model = train.shard(GPT(GPTConfig(block_size=16, vocab_size=64, n_layer=2, n_head=2, n_embd=32)), torch.device("cpu"), 2)
idx = torch.zeros(1, 16, dtype=torch.long)
model(idx, idx)[1].backward()
optimizer, = train.make_optimizers(model, torch.device("cpu"))
optimizer.step()
n = model.param_counts()["total"]
moments = [v for state in optimizer.state.values() for k, v in state.items() if k.startswith("exp_avg")]
for kept in (list(model.parameters()), [p.grad for p in model.parameters()], moments[::2], moments[1::2]):
    assert sum(t.to_local().numel() for t in kept) == n / 2
torch.distributed.destroy_process_group()
""")
    r = script("-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", tmp_path / "halves.py", cwd=tmp_path, PYTHONPATH=HERE)
    assert r.returncode == 0, r.stderr


@pytest.mark.parametrize("micro_batch", [1, 4])
def test_the_micro_batch_does_not_change_the_losses(workspace, one_process, tmp_path, micro_batch):
    r = script(here("train.py"), *NO_DROPOUT, f"--micro_batch={micro_batch}", f"--out_dir={tmp_path}", cwd=workspace)
    assert r.returncode == 0, r.stderr
    assert same(tmp_path, one_process)


def test_the_validation_loss_equals_a_slow_loop_over_the_split(workspace):
    folder, enc = workspace / "runs/fp32", dataset.get_tokenizer("byte")
    model, ckpt = gpt.load_checkpoint(str(folder / "checkpoints/model_000030.pt"))
    tokens, nats, n_bytes = torch.tensor(read_split(workspace / "data/t", "val")), 0.0, 0
    with torch.no_grad():
        for i in range(2000 // 32):
            window = tokens[32 * i:32 * i + 33]
            for target, log_p in zip(window[1:].tolist(), model(window[None, :-1], window[None, 1:])[0][0].log_softmax(-1)):
                nats -= log_p[target].item()
                n_bytes += target != enc.eot_token
    line = records(folder)["val", 30].split()
    assert float(line[2]) == pytest.approx(nats / 1984, abs=1e-5)
    assert float(line[3].removeprefix("bpb=")) == pytest.approx(nats / math.log(2) / n_bytes, abs=1e-5)


TUNED = ["--recipe=sft", "--data=pairs.jsonl", "--tokenizer=byte", "--n_layer=2", "--n_head=2", "--n_embd=32", "--block_size=256", "--total_batch_size=1024", "--max_steps=6",
         "--max_lr=1e-2", "--warmup_steps=2", "--val_interval=3", "--device=cpu", "--dtype=float32", "--patience=9"]


@pytest.fixture(scope="session")
def tuned(tmp_path_factory):
    """The same fine-tuning on one process and on two, in micro-batches of several sizes.  -> the folder, and the pairs"""
    folder, rows = tmp_path_factory.mktemp("tuned"), [r for r in some_pairs(300) if len(r["prompt"] + r["response"]) < 230]
    write_lines(folder / "pairs.jsonl", rows)
    done = [script(here("train.py"), *TUNED, f"--micro_batch={B}", f"--out_dir=one{B}", cwd=folder) for B in (1, 2, 4)]
    done += [torchrun(2, *TUNED, f"--micro_batch={B}", f"--parallel={parallel}", f"--out_dir=two{B}", cwd=folder) for B, parallel in ((1, "ddp"), (2, "zero2"))]
    for r in done:
        assert r.returncode == 0, r.stderr
    return folder, rows


@torch.no_grad()
def slow_pair_losses(model, rows):
    """Each pair alone: the losses of its response and of the end of it, summed, and how many they are"""
    nats = n = 0
    for pair in encoded_pairs(rows):
        tokens, flags = zip(*pair, (256, 1))
        log_p = model(torch.tensor([tokens[:-1]]), torch.tensor([tokens[1:]]))[0][0].log_softmax(-1)
        learned = [i for i, f in enumerate(flags[1:]) if f == 1]
        nats -= sum(log_p[i, tokens[i + 1]].item() for i in learned)
        n += len(learned)
    return nats / n


@pytest.mark.parametrize("run", ["one1", "one2", "one4", "two1", "two2"])
def test_the_loss_on_packed_pairs_equals_a_slow_loop_over_single_ones(tuned, run):
    folder, rows = tuned
    held_out, rows = rows[::10], [r for i, r in enumerate(rows) if i % 10]
    model, _ = gpt.load_checkpoint(str(folder / run / "checkpoints/model_000000.pt"))
    loader = DataLoader(str(folder / "data/pairs-byte"), "train", 4, 256, seed=1337)
    first = [rows[i] for window in loader.order(0, 4) for i in loader.rows[window]]
    assert 8 < len(first) < len(rows) / 2
    assert losses(folder / run)[0] == pytest.approx(slow_pair_losses(model, first), abs=1e-5)
    assert losses(folder / run, "val")[0] == pytest.approx(slow_pair_losses(model, held_out), abs=1e-5)
    assert losses(folder / run) == pytest.approx(losses(folder / "one4"), abs=1e-5) and len(losses(folder / run)) == 6


def test_bits_per_byte_of_pairs_are_those_of_the_responses(tuned):
    folder, rows = tuned
    line = records(folder / "one4")["val", 0].split()
    learned, n_bytes = (sum(len(r["response"].encode()) + end for r in rows[::10]) for end in (1, 0))
    assert f"tokens={learned}" in line and float(line[3].removeprefix("bpb=")) == pytest.approx(float(line[2]) * learned / n_bytes / math.log(2), rel=1e-5)


def test_training_stops_when_validation_gets_no_better_and_keeps_the_best_checkpoint(workspace, tmp_path):
    dataset.prepare(str(workspace / "t.txt"), "byte", out=str(tmp_path / "d"), splits="80/10/10")
    r = script(here("train.py"), *RUNS["fp32"], f"--data={tmp_path}/d", "--max_lr=3", "--val_interval=1", "--ckpt_interval=0", "--patience=3", "--keep=1", f"--out_dir={tmp_path}", cwd=workspace)
    assert r.returncode == 0, r.stderr
    values = losses(tmp_path, "val")
    best = values.index(min(values))
    assert len(values) == best + 4 < 30 and gpt.checkpoint_step(gpt.find_checkpoints(tmp_path)[0]) == best
    assert [step for stream, step in records(tmp_path) if stream == "test"] == [best + 3]  # as at any end
    assert f"done at step {best + 3}, no better validation loss in 3" in r.stdout and f"best: step {best}, validation loss {min(values):.4f}: {tmp_path}/checkpoints/model_{best:06d}.pt" in r.stdout
    again = script(here("train.py"), "--resume", f"--out_dir={tmp_path}", cwd=workspace)
    assert f"done at step {best + 3}, no better" in again.stdout and losses(tmp_path, "val") == values


def test_patience_ends_after_that_many_validations_and_not_at_a_new_best_one(monkeypatch):
    for name, value in (("patience", 3), ("val_interval", 10)):
        monkeypatch.setattr(train, name, value)
    best = {"step": 20, "val": 2.0}
    worn_out = lambda step, val, at=None: train.worn_out(step, {"step": step if at is None else at, "val": val}, best)
    assert [worn_out(step, 2.5) for step in (20, 30, 40, 50, 60)] == [False, False, False, True, True]
    assert not worn_out(50, 1.9) and not worn_out(50, 2.5, at=40) and worn_out(50, 2.0)
    monkeypatch.setattr(train, "patience", 0)
    assert not worn_out(500, 2.5)


def test_a_step_is_left_out_when_its_loss_or_its_norm_stands_out_or_is_not_finite(monkeypatch):
    monkeypatch.setattr(train, "spike_guard", 5.0)
    recent = collections.deque(maxlen=train.RECENT + 1)
    calm = lambda i: (3 + 0.1 * (-1) ** i, 1 - 0.1 * (-1) ** i)
    reasons = [train.why_left_out(*calm(i), recent) for i in range(train.RECENT)]
    assert not any(reasons) and not train.why_left_out(*calm(0), recent)
    assert "loss of 3.7 is 7.0 standard" in train.why_left_out(3.7, 1.0, recent) and not train.why_left_out(2.0, 1.0, recent)
    assert "gradient norm of 2 is" in train.why_left_out(3.0, 2.0, recent)
    for loss, norm in ((math.nan, 1.0), (3.0, math.inf)):
        before = list(recent)
        assert train.why_left_out(loss, norm, recent) == "its loss or gradient is not finite" and list(recent) == before
    later = [bool(train.why_left_out(9.0, 1.0, recent)) for _ in range(20)]
    assert later[0] and not later[-1]  # what stays so is soon no exception
    monkeypatch.setattr(train, "spike_guard", 0.0)
    assert not train.why_left_out(1e9, 1e9, recent)


def test_a_spike_changes_nothing_also_after_a_resume(tmp_path):
    (tmp_path / "a.txt").write_text("the cat sat on the mat.\n\n" * 2000)
    (tmp_path / "b.txt").write_text("".join(random.Random(0).choices("abcdefgh\n", k=40_000)))
    run = lambda *more: script(here("train.py"), *FAST, "--tokenizer=byte", "--spike_guard=6", "--seed=1", *more, cwd=tmp_path)
    first = run("--data=a.txt", "--max_steps=140")
    assert first.returncode == 0 and "left out" not in first.stdout, first.stderr
    r = run("--data=b.txt", "--new_data", "--resume", "--max_steps=150", "--val_interval=1")
    assert r.returncode == 0, r.stderr
    left_out = [int(s) for s in re.findall(r"^step (\d+) is left out: its (?:loss|gradient norm) of .* standard deviations above the last 128; its data: data/b-byte/train_000000.bin at token \d.* and 4 more$", r.stdout, re.M)]
    val = {int(line.split()[0]): line.split()[2] for line in open(tmp_path / "log.txt") if " val " in line}
    assert {140, 141} <= set(left_out) and len(left_out) < 9
    assert all((val[step] == val[step + 1]) == (step in left_out) for step in range(141, 149))


def test_a_run_that_diverges_ends_and_leaves_a_good_checkpoint(workspace, tmp_path):
    options = [*RUNS["fp32"], "--val_interval=0", "--ckpt_interval=1", "--keep=2", f"--out_dir={tmp_path}"]
    assert script(here("train.py"), *options, "--max_steps=2", cwd=workspace).returncode == 0
    r = script(here("train.py"), *options, "--resume", "--max_lr=1e30", "--max_steps=60", cwd=workspace)
    assert r.returncode and "every step from 3 to 22 was left out; resume from an earlier checkpoint" in r.stderr.splitlines()[-1]
    good = gpt.find_checkpoints(tmp_path)[0]
    assert gpt.checkpoint_step(good) == 2 and all(w.abs().max() < 100 for w in gpt.read_checkpoint(good)["model"].values())


def test_a_hint_is_given_unless_the_processes_have_met(monkeypatch, capsys):
    events = []

    class Timer:
        def __init__(self, seconds, hint):
            self.hint = hint
        start = lambda self: events.append("start")
        cancel = lambda self: events.append("cancel")

    class Met:
        item = lambda self: (events.append("met"), timers[0].hint())

    timers = []
    monkeypatch.setattr(train.threading, "Timer", lambda *args: timers.append(Timer(*args)) or timers[0])
    monkeypatch.setattr(train.dist, "init_process_group", lambda *args, **options: events.append("init"))
    monkeypatch.setattr(train.dist, "all_reduce", lambda t: None)
    monkeypatch.setattr(train.torch, "zeros", lambda *args, **options: Met())
    train.meet(torch.device("cpu"))
    assert events == ["start", "init", "met", "cancel"] and "NCCL_SOCKET_IFNAME" in capsys.readouterr().err


def test_the_distilled_loss_equals_a_sum_over_single_positions(monkeypatch):
    for name, value in (("distill_alpha", 0.3), ("distill_temperature", 2.0)):
        monkeypatch.setattr(train, name, value)
    student, wanted = torch.randn(2, 2, 5, 7)
    targets = torch.tensor([[1, -1, 3, 6, -1], [-1, -1, 0, 2, 2]])
    ce, kl = [], []
    for b in range(2):
        for t in range(5):
            if targets[b, t] >= 0:
                p, q = (torch.softmax(x[b, t] / 2, dim=0).tolist() for x in (wanted, student))
                kl.append(sum(a * math.log(a / c) for a, c in zip(p, q)))
                ce.append(-math.log(torch.softmax(student[b, t], dim=0)[targets[b, t]]))
    got = train.distill(F.cross_entropy(student.flatten(0, 1), targets.flatten(), ignore_index=-1), student, wanted, targets)
    assert got.item() == pytest.approx(0.7 * sum(ce) / 6 + 0.3 * 4 * sum(kl) / 6, rel=1e-5)


@pytest.mark.parametrize("padding", [384, 512])
def test_a_teacher_of_the_same_weights_has_nothing_to_teach_whatever_its_padding(workspace, tmp_path, padding):
    path, ckpt = "runs/fp32/checkpoints/model_000030.pt", gpt.read_checkpoint(str(workspace / "runs/fp32/checkpoints/model_000030.pt"))
    for name in ("transformer.wte.weight", "lm_head.weight"):
        ckpt["model"][name] = F.pad(ckpt["model"][name], (0, 0, 0, padding - 384))
    ckpt["model_config"]["vocab_size"] = padding
    torch.save(ckpt, tmp_path / "teacher.pt")
    r = script(here("train.py"), *FAST, f"--init_from={path}", f"--teacher={tmp_path}/teacher.pt", "--distill_alpha=1", "--dropout=0", "--max_steps=2", f"--out_dir={tmp_path}", cwd=workspace)
    assert r.returncode == 0, r.stderr
    assert losses(tmp_path)[0] == pytest.approx(0, abs=1e-6) and losses(tmp_path, "val")[0] > 1


def test_a_teacher_without_a_share_changes_nothing(workspace, tmp_path):
    r = script(here("train.py"), *FAST, "--teacher=runs/fp32/checkpoints/model_000030.pt", "--distill_alpha=0", "--max_steps=1", f"--out_dir={tmp_path}", cwd=workspace)
    assert r.returncode == 0, r.stderr
    assert losses(tmp_path) == losses(workspace / "runs/fp32")[:1] and losses(tmp_path, "val")[0] == losses(workspace / "runs/fp32", "val")[0]


@pytest.fixture(scope="session")
def chat(workspace):
    """A model with a tokenizer of its own, fine-tuned, the last step of it resumed.  -> the processes"""
    base = ["--tokenizer=bpe:300", "--n_layer=2", "--n_head=2", "--n_embd=32", "--block_size=128", "--total_batch_size=256", "--max_steps=4", "--device=cpu"]
    tune = ["--recipe=sft", "--init_from=chat/base", "--data=pairs.jsonl", "--total_batch_size=256", "--max_steps=4", "--max_lr=1e-2"]
    done = [script(*command, cwd=workspace) for command in (
        [here("train.py"), "--data=t.txt", *base, "--hella_interval=0", "--out_dir=chat/base"],
        [here("train.py"), *tune, "--ckpt_interval=3", "--sample_interval=4", "--sample_prompt=Who is it?", "--out_dir=chat/tuned"],
        [here("train.py"), "--resume=chat/tuned/checkpoints/model_000003.pt", "--out_dir=chat/again"])]
    for r in done:
        assert r.returncode == 0, r.stderr
    return done


def test_fine_tuning_takes_the_models_own_tokenizer_and_goes_on_with_it(chat, workspace):
    saved = [torch.load(workspace / f"chat/{name}/checkpoints/model_000004.pt", weights_only=True) for name in ("base", "tuned", "again")]
    assert saved[0]["tokenizer"] == saved[1]["tokenizer"] == saved[2]["tokenizer"] and saved[0]["tokenizer"]["name"] == "bpe:300"
    assert [c["template"] for c in saved] == [None, *[dataset.chat_template(dataset.get_tokenizer("byte"))] * 2]
    assert losses(workspace / "chat/again") == losses(workspace / "chat/tuned")[3:]
    assert "sample at step 4: Who is it?\n" in chat[1].stdout


def test_a_checkpoint_is_plain_data_and_the_whole_run(workspace):
    ckpt = torch.load(workspace / "runs/fp32/checkpoints/model_000030.pt", weights_only=True)
    assert {"version", "step", "model", "optimizers", "scaler", "rng", "loader", "model_config", "train_config", "tokenizer", "data_fingerprint", "best", "totals"} <= set(ckpt)
    assert ckpt["step"] == 30 and ckpt["loader"] == {"position": 30 * 8} and ckpt["totals"]["tokens"] == 30 * 256
    assert {"transformer.wte.weight", "transformer.h.0.attn.c_attn.weight", "transformer.h.1.mlp.c_proj.bias", "lm_head.weight"} <= set(ckpt["model"])


def test_the_newest_checkpoints_and_the_best_one_stay(workspace, tmp_path):
    r = script(here("train.py"), *FAST, "--max_lr=3", "--grad_clip=0", "--warmup_steps=20", "--val_interval=2", "--keep=2", f"--out_dir={tmp_path}", cwd=workspace)
    assert r.returncode == 0, r.stderr
    values = {step: float(line.split()[2]) for (stream, step), line in records(tmp_path).items() if stream == "val" and step}
    best = min(values, key=values.get)
    assert best < 28, "the run was meant to get worse at the end"
    assert sorted(os.listdir(tmp_path / "checkpoints")) == [f"model_{s:06d}.pt" for s in (best, 28, 30)]


@pytest.mark.parametrize("sig", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_step_saves_and_exits(workspace, tmp_path, sig):
    p = subprocess.Popen([sys.executable, here("train.py"), *FAST, "--max_steps=100000", "--ckpt_interval=0", f"--out_dir={tmp_path}"],
                         cwd=workspace, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "log.txt").exists() or ("train", 3) not in records(tmp_path):
        assert p.poll() is None
        time.sleep(0.02)
    p.send_signal(sig)
    assert p.wait(60) == 128 + sig and "Traceback" not in p.stderr.read()
    ckpt = gpt.read_checkpoint(gpt.find_checkpoints(str(tmp_path))[-1])
    assert ckpt["step"] == max(step for _, step in records(tmp_path)) + 1


def test_a_new_run_sets_an_older_one_aside(workspace, tmp_path):
    go = [here("train.py"), *FAST, "--max_steps=2", f"--out_dir={tmp_path}"]
    script(*go, cwd=workspace)
    before = (tmp_path / "log.txt").read_text()
    assert script(*go, cwd=workspace).returncode == 0
    assert (tmp_path / "log.1.txt").read_text() == before and sorted(os.listdir(tmp_path / "checkpoints.1")) == sorted(os.listdir(tmp_path / "checkpoints"))


def test_init_from_begins_with_the_weights_of_a_checkpoint(workspace, tmp_path):
    r = script(here("train.py"), *FAST, "--init_from=runs/fp32/checkpoints/model_000030.pt", f"--out_dir={tmp_path}", "--max_steps=1", cwd=workspace)
    assert r.returncode == 0, r.stderr
    assert losses(tmp_path, "val")[0] == losses(workspace / "runs/fp32", "val")[-1]


def test_init_from_takes_over_the_shape_and_new_dropout(workspace, tmp_path):
    args = [a for a in FAST if not a.startswith(("--n_", "--block_size", "--dropout", "--total"))]
    r = script(here("train.py"), *args, "--init_from=runs/fp32/checkpoints/model_000030.pt", "--total_batch_size=256", "--dropout=0.5", f"--out_dir={tmp_path}", "--max_steps=1", cwd=workspace)
    assert r.returncode == 0, r.stderr
    ckpt = gpt.read_checkpoint(str(tmp_path / "checkpoints/model_000001.pt"))
    assert (ckpt["model_config"]["block_size"], ckpt["train_config"]["n_embd"], ckpt["model_config"]["dropout"]) == (32, 32, 0.5)


def test_resuming_takes_new_settings_of_the_optimizer(workspace, tmp_path):
    r = script(here("train.py"), "--resume=runs/fp32/checkpoints/model_000030.pt", "--max_steps=31", "--weight_decay=0.7", "--val_interval=0", f"--out_dir={tmp_path}", cwd=workspace)
    assert r.returncode == 0, r.stderr
    ckpt = gpt.read_checkpoint(str(tmp_path / "checkpoints/model_000031.pt"))
    assert [g["weight_decay"] for g in ckpt["optimizers"][0]["param_groups"]] == [0.7, 0.0]
    assert ckpt["last_val"]["val"] == pytest.approx(losses(workspace / "runs/fp32", "val")[-1], abs=1e-6)  # of the checkpoint: none came after it


def test_two_processes_train_without_hellaswag_where_it_cannot_be_had(workspace, tmp_path):
    r = torchrun(2, *FAST, f"--data={workspace}/data/t", "--hella_interval=2", "--max_steps=3", "--out_dir=o", cwd=tmp_path, https_proxy="http://127.0.0.1:9")
    assert r.returncode == 0 and "no HellaSwag" in r.stdout and len(losses(tmp_path / "o")) == 3, r.stderr


@pytest.mark.parametrize("parallel", ["ddp", "zero2"])
def test_hellaswag_is_scored_while_training(workspace, tmp_path, parallel):
    (tmp_path / "data/hellaswag").mkdir(parents=True)
    (tmp_path / hellaswag.PATH).write_text(json.dumps({"ctx": "A cat", "label": 1, "endings": ["sat", "is", "ran", "x"]}) + "\n")
    r = torchrun(2, *FAST, f"--data={workspace}/data/t", "--hella_interval=2", "--max_steps=3", "--out_dir=o", f"--parallel={parallel}", cwd=tmp_path)
    assert r.returncode == 0 and sorted(step for s, step in records(tmp_path / "o") if s == "hella") == [0, 2, 3], r.stderr


def test_muon_trains_and_resumes_exactly(workspace, tmp_path):
    go = [here("train.py"), *FAST, "--optimizer=muon", "--max_steps=6"]
    assert script(*go, f"--out_dir={tmp_path}/whole", cwd=workspace).returncode == 0
    r = script(*go, f"--resume={tmp_path}/whole/checkpoints/model_000004.pt", f"--out_dir={tmp_path}/rest", cwd=workspace)
    assert r.returncode == 0, r.stderr
    whole, rest = losses(tmp_path / "whole"), losses(tmp_path / "rest")
    assert whole[-1] < whole[0] - 0.3 and rest == whole[4:]


def test_resuming_from_an_older_checkpoint_sets_the_later_ones_aside(workspace, tmp_path):
    shutil.copytree(workspace / "runs/fp32/checkpoints", tmp_path / "checkpoints")
    r = script(here("train.py"), f"--resume={tmp_path}/checkpoints/model_000028.pt", "--max_steps=29", f"--out_dir={tmp_path}", cwd=workspace)
    assert r.returncode == 0, r.stderr
    assert {"model_000029.pt", "model_000030.1.pt"} <= set(os.listdir(tmp_path / "checkpoints")) and gpt.find_checkpoints(str(tmp_path))[-1].endswith("29.pt")


def test_checkpoints_are_ordered_by_step_not_by_letters(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    for name in ("model_999000.pt", "model_1000000.pt", "model_1001000.pt.tmp", "notes.pt"):
        (tmp_path / "checkpoints" / name).touch()
    assert [os.path.basename(p) for p in gpt.find_checkpoints(str(tmp_path))] == ["model_999000.pt", "model_1000000.pt"]


def test_llmc_shards_from_elsewhere_train(shards, tmp_path):
    r = script(here("train.py"), *FAST, f"--data={shards}", "--max_steps=3", "--vocab_size=50304", "--out_dir=o", cwd=tmp_path)
    assert r.returncode == 0 and "no manifest" in r.stdout and len(losses(tmp_path / "o")) == 3


def test_a_text_file_is_tokenized_on_first_use(tmp_path):
    (tmp_path / "book.txt").write_text("\n\n".join(stories(60)))
    r = script(here("train.py"), *FAST, "--data=book.txt", "--tokenizer=bpe:300", "--max_steps=2", cwd=tmp_path)
    assert r.returncode == 0 and (tmp_path / "data/book-bpe300/meta.json").exists() and (tmp_path / "log.txt").exists()


@pytest.fixture(scope="session")
def recipes(tmp_path_factory):
    """
    Every recipe, its sizes made small: 5 steps with a sample, the last two of them again from a checkpoint, and what eval.py makes
    of it; in full size, a dry run.  -> the folder, and {recipe: the four processes}
    """
    folder = tmp_path_factory.mktemp("recipes")
    (folder / "t.txt").write_text("\n\n".join(stories(100)))
    dataset.prepare(str(folder / "t.txt"), "byte", out=str(folder / "data/t"), splits="80/10/10")
    shrunk = ["--n_layer=2", "--n_head=2", "--n_embd=64", "--block_size=64", "--vocab_size=0", "--total_batch_size=256", "--max_steps=5", "--warmup_steps=2",
              "--data=data/t", "--val_interval=5", "--val_tokens=500", "--ckpt_interval=3", "--sample_interval=5", "--hella_interval=0", "--log_interval=1"]
    commands = [command for name in train.RECIPES for command in (
        [here("train.py"), f"--recipe={name}", *shrunk, f"--out_dir={name}"],
        [here("train.py"), f"--resume={name}/checkpoints/model_000003.pt", f"--out_dir={name}/again"],
        [here("eval.py"), f"--ckpt={name}/checkpoints/model_000005.pt", "--prompt=Once", "--max_new_tokens=5"],
        [here("train.py"), f"--recipe={name}", "--dry_run"])]
    done = [script(*command, cwd=folder) for command in commands]
    for r in done:
        assert r.returncode == 0, (r.args, r.stderr)
    return folder, {name: done[4 * i:4 * i + 4] for i, name in enumerate(train.RECIPES)}


PUBLISHED = {"gpt2": 124_475_904, "gpt-xs": 124_082_688, "gpt2-custom": 124_475_904, "custom-gpt": 91_411_200, "toygpt-small": 123_703_633,
             "toygpt-medium": 253_055_057, "toygpt-large": 1_311_579_217, "tinystories": 162_419_712, "tinystories-small": 49_287_168,
             "tinystories-large": 405_688_320, "tiny": 1_311_872, "sft": 124_475_904, "speedrun": 162_220_800}
each_recipe = pytest.mark.parametrize("name", train.RECIPES)


@each_recipe
def test_a_recipe_trains_and_prints_a_sample(recipes, name):
    folder, results = recipes
    assert len(losses(folder / name)) == 5 and "sample at step 5: " in results[name][0].stdout and results[name][2].stdout.startswith("Once")


@each_recipe
def test_a_recipe_goes_on_exactly_where_it_was(recipes, name):
    assert losses(recipes[0] / name / "again") == losses(recipes[0] / name)[3:]


@each_recipe
def test_a_recipes_dry_run_prints_its_parameters_and_cost(recipes, name):
    planned = recipes[1][name][3].stdout
    parts = {k: int(v.replace(",", "")) for k, v in re.findall(r"([a-z-]+) ([\d,]+)(?:, |\n)", planned.split("parameters: ")[1].split("batch:")[0])}
    assert list(parts) == ["embeddings", "positions", "attention", "feed-forward", "norms", "head", "total"]
    assert parts["total"] == PUBLISHED[name] == sum(parts.values()) - parts["total"] and re.search("steps are not known" if name == "sft" else r"cost: .* A100", planned)


def test_the_test_split_is_judged_in_full_at_the_end_alone(recipes):
    folder = recipes[0]
    windows = (len(read_split(folder / "data/t", "test")) - 1) // 64
    found = {step: line for (stream, step), line in records(folder / "toygpt-small").items() if stream == "test"}
    assert list(found) == [5] and found[5].endswith(f"tokens={windows * 64}")


def test_float16_trains_with_a_scaler_that_checkpoints_keep(recipes):
    ckpt = gpt.read_checkpoint(str(recipes[0] / "custom-gpt/checkpoints/model_000005.pt"))
    assert ckpt["train_config"]["dtype"] == "float16" and ckpt["scaler"]["_growth_tracker"] == 5


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_the_learning_rate_rises_from_above_zero_and_ends_at_its_minimum(monkeypatch, schedule):
    for k, v in dict(schedule=schedule, max_lr=1.0, min_lr=0.1, warmup_steps=10, max_steps=100, cooldown=0.4).items():
        monkeypatch.setattr(train, k, v)
    rates = [train.get_lr(step) for step in range(101)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == 1.0 and rates[100] == pytest.approx(0.1)
    assert all(a >= b for a, b in zip(rates[9:], rates[10:]))
    assert rates[55] == (1.0 if schedule == "wsd" else pytest.approx(0.55))
    assert schedule == "cosine" or rates[80] == pytest.approx(0.55)


def test_the_command_line_wins_over_the_config_file_over_the_recipe(monkeypatch, tmp_path):
    for k, v in train.SETTINGS.items():
        monkeypatch.setattr(train, k, v, raising=False)
    (tmp_path / "c.json").write_text('{"warmup_steps": 5, "max_lr": 1e-3, "total_batch_size": 1e6}')
    train.configure(["--recipe", "tiny", f"--config={tmp_path}/c.json", "--max_lr=2e-3", "--seed", "1_000", "--deterministic"])
    assert (train.tokenizer, train.warmup_steps, train.max_lr, train.seed, train.deterministic, train.total_batch_size) == \
        (train.RECIPES["tiny"]["tokenizer"], 5, 2e-3, 1000, True, 1_000_000)


def test_epochs_from_a_later_layer_replace_the_steps(monkeypatch):
    for k, v in train.SETTINGS.items():
        monkeypatch.setattr(train, k, v, raising=False)
    train.configure(["--epochs=2"])
    assert (train.epochs, train.max_steps) == (2, 0)
    train.configure(["--recipe=tinystories", "--max_steps=7"])
    assert (train.epochs, train.max_steps) == (20, 7)


def test_help_lists_every_hyperparameter(tmp_path):
    out = script(here("train.py"), "--help", cwd=tmp_path).stdout
    assert [name for name in train.SETTINGS if f"  --{name}=" not in out] == []


def test_a_dry_run_counts_parameters_and_touches_nothing(tmp_path):
    r = script(here("train.py"), "--dry_run", cwd=tmp_path)
    assert r.returncode == 0 and "124,475,904" in r.stdout and os.listdir(tmp_path) == []


def test_bench_prints_one_line_of_json(tmp_path):
    r = script(here("train.py"), *FAST, "--bench=3", cwd=tmp_path)
    line = json.loads(r.stdout.splitlines()[-1])
    assert r.returncode == 0 and {"tok_s", "ms", "mfu", "peak_tflops", "mem_gb"} <= set(line) and line["tok_s"] > 0
    assert os.listdir(tmp_path) == []


def test_the_ladder_measures_every_technique_that_is_at_hand(monkeypatch, capsys):
    for k, v in train.SETTINGS.items():
        monkeypatch.setattr(train, k, v, raising=False)
    monkeypatch.delitem(train.LADDER, "torch.compile")  # takes a minute
    monkeypatch.setattr(sys, "argv", ["train.py", *FAST, "--bench=ladder"])
    train.main()
    rows = {line[:18].strip(): line[18:].split() for line in capsys.readouterr().out.splitlines()[1:]}
    assert list(rows) == [*train.LADDER, "more GPUs"] and rows["TF32"][0] == rows["more GPUs"][0] == "-"
    for name in ("float32", "fused attention", "vocabulary 50304"):
        assert int(rows[name][0].replace(",", "")) > 0


def test_eight_gpus_for_two_and_a_half_hours_at_20_dollars_50_cost_51_dollars_25(monkeypatch):
    monkeypatch.setattr(train, "usd_per_gpu_hour", 20.50 / 8)
    assert train.dollars(2.5 * 3600, 8) == pytest.approx(51.25)


def test_dollars_stand_in_the_log_the_summary_and_the_checkpoint(workspace, tmp_path):
    r = script(here("train.py"), *FAST, "--max_steps=3", "--usd_per_gpu_hour=1e6", f"--out_dir={tmp_path}", cwd=workspace)
    usd = gpt.read_checkpoint(f"{tmp_path}/checkpoints/model_000003.pt")["totals"]["usd"]
    assert usd > 0.1 and f"usd={usd:.4f}" in (tmp_path / "log.txt").read_text() and f"${usd:.2f}" in r.stdout.splitlines()[-1]


def read_wandb(raw):
    """Records of a .wandb file: LevelDB's log format (blocks of 32 KiB; checksum, length, type, data) after 7 bytes of its own."""
    from wandb.proto import wandb_internal_pb2
    at, data = 7, b""
    while at + 7 <= len(raw):
        if 32768 - at % 32768 < 7:  # no header fits into the rest of the block
            at += 32768 - at % 32768
        length, kind = struct.unpack("<HB", raw[at + 4:at + 7])
        data, at = data + raw[at + 7:at + 7 + length], at + 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield wandb_internal_pb2.Record.FromString(data)
            data = b""


@pytest.mark.skipif(not installed("wandb"), reason="needs the package wandb")
def test_wandb_gets_what_the_log_gets_and_a_resumed_run_goes_on_there(workspace, tmp_path):
    go = [here("train.py"), *FAST, f"--out_dir={tmp_path}/run", "--wandb_project=demo"]
    for args in (["--max_steps=5"], ["--max_steps=7", "--resume"]):
        r = script(*go, *args, cwd=workspace, WANDB_MODE="offline")
        assert r.returncode == 0, r.stderr
    found, ids = {}, set()
    for path in (tmp_path / "run/wandb").glob("offline-run-*/run-*.wandb"):
        for record in read_wandb(path.read_bytes()):
            ids |= {record.run.run_id} - {""}
            row = {(item.nested_key or [item.key])[0]: json.loads(item.value_json) for item in record.history.item}
            found |= {(name, row["step"]): row[name] for name in ("train", "val") if name in row}
    assert len(ids) == 1 and found.keys() == records(tmp_path / "run").keys()
    for (stream, step), line in records(tmp_path / "run").items():
        assert found[stream, step] == pytest.approx(float(line.split()[2]), abs=1e-6)


def test_out_of_memory_tries_smaller_micro_batches_and_then_says_what_helps(monkeypatch):
    for k, v in {**train.SETTINGS, "compile": "true", "block_size": 16, "micro_batch": 0}.items():
        monkeypatch.setattr(train, k, v, raising=False)
    model, room, tried = GPT(small()), 3, []

    def compiled(idx, targets):
        tried.append(len(idx))
        if len(idx) > room:
            raise torch.OutOfMemoryError
        return model(idx, targets)

    monkeypatch.setattr(torch, "compile", lambda model, **options: compiled)
    fit = lambda: train.fit(model, lambda model, *batch: model(*batch)[1], torch.device("cpu"), contextlib.nullcontext, 12, None, 1, True)
    assert fit()[0] == 3 and tried == [12, 6, 4, 3]
    room = 0
    with pytest.raises(train.UserError, match="--grad_checkpoint, --parallel=zero2 on several GPUs, lower block_size=16"):
        fit()


@pytest.mark.skipif("SLOW" not in os.environ, reason="takes six minutes: SLOW=1")
def test_the_readmes_walk_through_teaches_opposites_and_a_teacher_helps(tmp_path):
    with open(here("README.md"), encoding="utf-8") as f:
        section = f.read().split("\n**A walk through it**")[1].split("\n## ")[0]
    blocks = re.findall(r"```(sh|python)\n(.*?)```", section, re.S)
    made = {}
    for kind, block in blocks:
        if kind == "python":
            subprocess.run([sys.executable, "-c", block], cwd=tmp_path, check=True)
            exec(block.split("pairs =")[0], made)
        for line in block.splitlines() if kind == "sh" else ():
            command = shlex.split(line, comments=True)[1:]
            if "--source=synth" not in command:
                r = subprocess.run([sys.executable, here(command[0]), *command[1:]], cwd=tmp_path, text=True, capture_output=True)
                assert r.returncode == 0, r.stderr
    right = dict(base=0, tuned=0)
    for run in right:
        model, enc, rest = speak.open_speaker(None, str(tmp_path / run), "cpu", "auto")
        for i, word in enumerate(made["words"]):
            prompt = made["asks"][i % 6].format(word)
            assert not any(prompt in line for line in open(tmp_path / "opposites.jsonl"))
            rows = [dataset.prompt_tokens(enc, rest["template"], [(prompt, None)])]
            said = "".join(p for p, in speak.stream_texts(model, enc, rows, 20, 0, None, None, None))
            right[run] += said.strip() == f"The opposite of {word} is {made['words'][i ^ 1]}."
    alone, taught = (losses(tmp_path / run, "val")[-1] for run in ("alone", "taught"))
    print(right, "of", len(made["words"]), "right; validation loss", alone, "alone,", taught, "with a teacher")
    assert right["base"] < 0.05 * len(made["words"]) and right["tuned"] > 0.9 * len(made["words"]) and taught < alone - 0.05


# -- eval.py, hellaswag.py, plot.py

def test_generate_text_is_importable_and_repeats_with_a_seed(workspace):
    say = lambda **k: speak.generate_text(prompt="Once", max_new_tokens=30, temperature=0.7, top_k=50, top_p=0.95, out_dir=str(workspace / "runs/fp32"), device="cpu", **k)
    assert say(seed=1).startswith("Once") and say(seed=1) == say(seed=1) != say(seed=2)


def test_eval_prints_the_samples_and_says_which_checkpoint_speaks(workspace):
    r = script(here("eval.py"), "--prompt", "Once", "--num_samples", "2", "--max_new_tokens", "20", "--temperature", "0", cwd=workspace / "runs/fp32")
    assert r.returncode == 0, r.stderr
    a, b = r.stdout.split("---\n")
    assert a == b and a.startswith("Once") and "model_000030.pt, step 30" in r.stderr


class Reciting(GPT):
    """Says the same bytes whatever it is asked, another text in every row."""
    texts = []

    def stream(self, prompts, *args):
        for i in range(10_000):
            yield torch.tensor([[text[i] if i < len(text) else 256] for text in self.texts])


def recite(*texts, stop=()):
    Reciting.texts = texts
    pieces = list(speak.stream_texts(Reciting(small(vocab_size=257)), dataset.get_tokenizer("byte"), [[256]] * len(texts), 100, 1, None, None, None, stop))
    return ["".join(row) for row in zip(*pieces)], pieces


def test_a_character_spread_over_tokens_is_printed_whole():
    assert recite("é☃".encode() + b"\xff")[0] == ["é☃\ufffd"]


def test_every_row_ends_at_its_own_end_of_text():
    assert recite([*b"one", 256, *b"more"], [*b"three and more"])[0] == ["one", "three and more"]


def test_a_text_ends_before_a_stop_string_and_shows_nothing_of_it():
    texts, pieces = recite([*b"yes, ab abc no"], [*b"abab"], [*b"ab"], stop=["abc", "zz"])
    assert texts == ["yes, ab ", "abab", "ab"] and "a" not in [p[0] for p in pieces]


def test_many_samples_of_one_seed_differ_and_repeat(workspace):
    say = lambda: script(here("eval.py"), "--prompt=Once", "--num_samples=20", "--seed=1", "--max_new_tokens=20", "--temperature=2", cwd=workspace / "runs/fp32").stdout
    assert len(set(say().split("---\n"))) == 20 and say() == say()


def test_eval_goes_on_with_what_is_typed(workspace):
    r = subprocess.run([sys.executable, here("eval.py"), "--temperature=0", "--max_new_tokens=5"], input="Once\nthe\n", text=True, capture_output=True,
                       cwd=workspace / "runs/fp32", timeout=60)
    model, enc, _ = speak.open_speaker(None, str(workspace / "runs/fp32"), "cpu", "auto")
    go_on = lambda text: "".join(p for p, in speak.stream_texts(model, enc, [[enc.eot_token, *enc.encode_ordinary(text)]], 5, 0, None, None, None))
    first = go_on("Once")
    assert r.stdout == first + "\n" + go_on("Once" + first + "\nthe") + "\n", r.stderr


def test_a_chat_is_asked_in_its_template_and_remembers_its_turns(chat, workspace):
    r = subprocess.run([sys.executable, here("eval.py"), "--temperature=0", "--max_new_tokens=5"], input="Who is it?\n\nthe <|user|>\n", text=True, capture_output=True,
                       cwd=workspace / "chat/tuned", timeout=60)
    model, enc, rest = speak.open_speaker(None, str(workspace / "chat/tuned"), "cpu", "auto")

    def say(text):
        return "".join(p for p, in speak.stream_texts(model, enc, [[enc.eot_token, *text]], 5, 0, None, None, None))

    text = enc.encode_ordinary
    asked = [*text("User:\n"), *text("Who is it?"), *text("\n\nAssistant:\n")]
    first = say(asked)
    then = say([*asked, *text(first.strip()), enc.eot_token, *text("User:\n"), *text("the <|user|>"), *text("\n\nAssistant:\n")])
    assert r.stdout == first + "\n" + then + "\n", r.stderr
    one = script(here("eval.py"), "--temperature=0", "--max_new_tokens=5", "--prompt=Who is it?", "--prompt=the", cwd=workspace / "chat/tuned")
    assert one.stdout.startswith(f"Who is it?\n{first}\n---\nthe\n")
    assert speak.generate_text("Who is it?", max_new_tokens=5, temperature=0, out_dir=str(workspace / "chat/tuned"), device="cpu") == first


def test_a_long_chat_loses_its_oldest_turns_first(chat, workspace):
    model, enc, rest = speak.open_speaker(None, str(workspace / "chat/tuned"), "cpu", "auto")
    turns = [(f"{i} " * 9, "yes") for i in range(9)] + [("and?", None)]
    tokens = speak.recent(model, enc, rest["template"], turns)
    kept = enc.decode(tokens).split(dataset.EOT)[1:]
    assert 40 < len(tokens) <= 64 and kept[-1].startswith("User:\nand?") and [k[6] for k in kept[:-1]] == [str(i) for i in range(10 - len(kept), 9)]
    assert len(turns) == len(kept)
    assert speak.recent(model, enc, rest["template"], [("long " * 99, None)]) == dataset.prompt_tokens(enc, rest["template"], [("long " * 99, None)])


@needs_transformers
@pytest.mark.parametrize("spec", [{"name": "byte"}, CHATTY], ids=["plain markers", "special tokens"])
def test_an_exported_chat_template_gives_the_tokens_of_ours(tmp_path, spec):
    import transformers
    enc = dataset.get_tokenizer(spec)
    template = dataset.chat_template(enc)
    speak.export(GPT(small(vocab_size=enc.n_vocab)), enc, str(tmp_path / "out"), template)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    for line, turns in PAIR_LINES.values():
        if "messages" in line:
            messages = line["messages"][:2 * len(turns) + (line["messages"][0]["role"] == "system") + 1]
            ours = (dataset.encode_chat(enc, template, turns) & 0xFFFF).tolist() + [enc.eot_token]
            if messages[-1]["role"] == "user":
                ours = dataset.prompt_tokens(enc, template, [*turns, (messages[-1]["content"], None)])
            assert theirs.apply_chat_template(messages, add_generation_prompt=messages[-1]["role"] == "user", tokenize=True, return_dict=False) == ours


def test_an_export_of_a_chat_is_asked_in_its_template(chat, workspace, tmp_path):
    model, enc, rest = speak.open_speaker(None, str(workspace / "chat/tuned"), "cpu", "auto")
    r = script(here("eval.py"), f"--export={tmp_path}/hf", cwd=workspace / "chat/tuned")
    assert r.returncode == 0, r.stderr
    assert gpt.read_spec(tmp_path / "hf") == {"tokenizer": rest["tokenizer"], "template": rest["template"]}


def slow_perplexity(model, tokens):
    """Each token alone, after the block_size before it."""
    losses = []
    for i in range(1, len(tokens)):
        idx = torch.tensor(tokens[max(0, i - model.cfg.block_size):i])[None]
        losses.append(F.cross_entropy(model(idx)[0][:, -1], torch.tensor([tokens[i]])).item())
    return losses


@torch.no_grad()
def test_perplexity_with_a_stride_of_one_equals_a_slow_loop():
    model, tokens = lively(), np.random.default_rng(0).integers(0, 64, 100)
    assert speak.perplexity(model, tokens, stride=1).tolist() == pytest.approx(slow_perplexity(model, tokens), abs=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("stride", [3, 7, 16])
@pytest.mark.parametrize("n", [5, 17, 50, 97])
def test_every_token_is_scored_once_with_the_context_a_stride_leaves(stride, n):
    model, tokens = lively(), np.random.default_rng(0).integers(0, 64, n)
    expected, end = [], 0
    while end < n - 1:
        begin, end = end, min(n - 1, max(16, end + stride))
        window = torch.tensor(tokens[max(0, end - 16):end + 1])[None]
        expected += F.cross_entropy(model(window[:, :-1], window[:, 1:])[0][0], window[0, 1:], reduction="none")[begin - end:].tolist()
    assert speak.perplexity(model, tokens, stride, batch=40).tolist() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("path", ["held.jsonl", "data/pairs-byte"])
def test_perplexity_of_pairs_is_that_of_their_responses(tuned, path):
    folder, rows = tuned
    write_lines(folder / "held.jsonl", rows[::10])
    model, enc, _ = speak.open_speaker(str(folder / "one4/checkpoints/model_000006.pt"), ".", "cpu", "float32")
    m = speak.measure(model, enc, str(folder / path), "val", 8, None)
    assert m["loss"] == pytest.approx(slow_pair_losses(model, rows[::10]), abs=1e-5) and m["loss"] == pytest.approx(losses(folder / "one4", "val")[-1], abs=1e-5)
    few = speak.measure(model, enc, str(folder / path), "val", 8, 500)
    whole = sum(n <= 500 for n in np.cumsum([len(p) for p in encoded_pairs(rows[::10])]))
    assert 1 < whole < 10 and few["loss"] == pytest.approx(slow_pair_losses(model, rows[::10][:whole]), abs=1e-5)


def test_perplexity_of_a_text_file_is_that_of_its_tokens(workspace):
    r = script(here("eval.py"), "--perplexity=../../t.txt", "--stride=20", "--limit=500", cwd=workspace / "runs/fp32")
    model, enc, _ = speak.open_speaker(None, str(workspace / "runs/fp32"), "cpu", "auto")
    tokens = np.array(slow_tokens(enc, stories(150))[:500])
    nats = speak.perplexity(model, tokens, 20).mean().item()
    bits = nats * 499 / math.log(2) / sum(t != enc.eot_token for t in tokens[1:])
    assert f"499 tokens, {nats:.4f} nats a token, perplexity {math.exp(nats):.3f}, {bits:.4f} bits a byte; windows of 32 overlap by 12" in r.stdout, r.stderr


def test_models_are_compared_in_one_table(workspace):
    (workspace / "h.jsonl").write_text(json.dumps({"ctx": "A cat", "label": 1, "endings": ["sat", "is", "ran", "x"]}) + "\n")
    r = script(here("eval.py"), "--compare", "runs/fp32", "runs/pairs/checkpoints/model_000030.pt", "--data=h.jsonl", cwd=workspace)
    rows = [re.split(r"  +", line) for line in r.stdout.splitlines()]
    assert r.returncode == 0 and [row[0] for row in rows[1:]] == ["runs/fp32", "runs/pairs/checkpoints/model_000030.pt", "GPT-2 124M, published", "GPT-3 124M, published"]
    assert rows[1][2] == "7,680" and float(rows[1][3]) == pytest.approx(losses(workspace / "runs/fp32", "val")[-1], abs=1e-4), r.stderr
    assert rows[0][5:8] == list(hellaswag.MEASURES) and rows[3][6] == "0.2955"


def test_published_scores_are_the_same_wherever_they_are_shown():
    assert hellaswag.REFERENCES == plot.REFERENCES


def test_an_interrupted_download_goes_on(tmp_path):
    content, asked = random.Random(0).randbytes(200_000), []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.headers["Range"])
            begin = int(re.search(r"\d+", asked[-1])[0]) if asked[-1] else 0
            self.send_response(206 if begin else 200)
            self.send_header("Content-Length", str(len(content) - begin))
            self.end_headers()
            self.wfile.write(content[begin:begin + 120_000])  # and hangs up

        def log_message(self, *args):
            pass

    with serving(Handler) as url:
        fetch = lambda: dataset.fetch(f"{url}/f", str(tmp_path / "d/f"), hashlib.sha256(content).hexdigest())
        with pytest.raises(dataset.UserError, match="cut; run again"):
            fetch()
        assert not (tmp_path / "d/f").exists()
        fetch()
    assert asked == [None, "bytes=120000-"] and (tmp_path / "d/f").read_bytes() == content


def test_a_download_begun_with_more_than_there_is_begins_anew_and_is_checked(tmp_path):
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(416 if self.headers["Range"] else 200)
            self.send_header("Content-Length", "0" if self.headers["Range"] else "5")
            self.end_headers()
            self.wfile.write(b"" if self.headers["Range"] else b"right")

        log_message = lambda *args: None

    with serving(Handler) as url:
        for content, good in ((b"right", True), (b"wrong", False)):
            path = tmp_path / content.decode()
            path.with_suffix(".part").write_bytes(b"of an older, longer file")
            with contextlib.nullcontext() if good else pytest.raises(dataset.UserError, match="not the file that is known"):
                dataset.fetch(f"{url}/f", str(path), hashlib.sha256(content).hexdigest())
            assert path.exists() == good


def test_a_download_that_is_not_the_known_file_is_refused_and_not_kept(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other.jsonl").write_text(json.dumps({"ctx": "A cat", "label": 1, "endings": ["sat", "is", "ran", "x"]}) + "\n")
    monkeypatch.setattr(hellaswag, "URL", (tmp_path / "other.jsonl").as_uri())
    with pytest.raises(dataset.UserError, match="not the file that is known"):
        hellaswag.download()
    assert not any((tmp_path / "data").rglob("*.jsonl*"))


@pytest.mark.parametrize("terminal, lines", [(True, 20), (False, 2)])
def test_long_work_tells_its_rate_and_the_time_left_more_often_on_a_terminal(monkeypatch, capsys, terminal, lines):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    show = dataset.meter("things", 1000, begun=400)
    for i in range(1, 21):
        now[0] = i * 1.1
        show(400 + 11 * i, lambda: "all is well")
    out, err = capsys.readouterr()
    said = out.split("\r\x1b[K")[1:] if terminal else err.splitlines()
    assert len(said) == lines and said[-1] == "620/1,000 things, 10.0/s, 0:38 left; all is well"


@torch.no_grad()
def slow_hellaswag(model, enc, examples):
    """Each ending alone after its context, token by token.  -> how many are right by sum, by token, by byte"""
    right = [0, 0, 0]
    for e in examples:
        scores = [[], [], []]
        for ending in e["endings"]:
            context, rest = enc.encode_ordinary(e["ctx"]), enc.encode_ordinary(" " + ending)
            idx = torch.tensor([context + rest])
            log_p = model(idx, idx)[0][0].log_softmax(-1)
            loss = -sum(log_p[len(context) + i - 1, t].item() for i, t in enumerate(rest))
            for each, length in zip(scores, (1, len(rest), len(ending.encode()))):
                each.append(loss / length)
        for i, each in enumerate(scores):
            right[i] += each.index(min(each)) == int(e["label"])
    return *right, len(examples)


@each_kind
@pytest.mark.parametrize("budget", [100, 2048])
def test_hellaswag_equals_a_slow_loop_over_single_endings(monkeypatch, switches, budget):
    monkeypatch.setattr(hellaswag, "BUDGET", {False: budget})
    monkeypatch.setattr(hellaswag, "PART", {False: 150})  # of 400
    enc, rng = dataset.get_tokenizer(make_bpe(stories(50), 400)), random.Random(0)
    torch.manual_seed(0)
    model = GPT(small(**{**switches, "block_size": 96, "vocab_size": 400}))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    words = stories(1)[0].split() + ["é", "☃☃☃"]
    examples = [{"ctx": " ".join(rng.choices(words, k=8)), "label": rng.randrange(4),
                 "endings": [" ".join(rng.choices(words, k=rng.randint(1, 9))) for _ in range(4)]} for _ in range(60)]
    slow = slow_hellaswag(model.eval(), enc, examples)
    assert hellaswag.evaluate(model, enc, examples) == slow and len(set(slow)) > 2
    shares = [hellaswag.evaluate(model, enc, examples, rank, 3) for rank in range(3)]
    assert tuple(map(sum, zip(*shares))) == slow


def test_a_long_hellaswag_example_loses_the_beginning_of_its_context():
    enc = dataset.get_tokenizer("byte")
    tokens, mask, _ = hellaswag.render_example({"ctx": "x" * 50 + "yz", "label": "0", "endings": ["a", "bc", "d" * 9, "e" * 40]}, enc, block_size=16)
    assert tokens.shape == (4, 16) and (mask.sum(1) > 0).all() and enc.decode(tokens[0, :2].tolist()) == "z "


def test_hellaswag_masks_exactly_the_endings():
    enc = dataset.get_tokenizer("byte")
    tokens, mask, label = hellaswag.render_example({"ctx": "A cat", "label": "2", "endings": ["sat.", "is", "ran off", "x"]}, enc)
    assert label == 2 and [enc.decode(t[m == 1].tolist()) for t, m in zip(tokens, mask)] == [" sat.", " is", " ran off", " x"]


@needs_gpt2
@pytest.mark.skipif(not os.path.exists(HELLASWAG), reason=f"needs {os.path.relpath(HELLASWAG, HERE)}")
def test_hellaswag_judges_real_examples_from_the_command_line(workspace):
    r = script(here("hellaswag.py"), "--data", os.path.abspath(HELLASWAG), "--limit", "12", "--out_dir", "runs/fp32", cwd=workspace)
    assert r.returncode == 0 and re.search(r"12 examples: acc 0\.\d{4} \+- .* by token 0\.\d{4} \+- .* by byte 0\.\d{4} \+- ", r.stdout), r.stderr


def test_a_log_is_read_with_the_last_line_of_a_step_winning(tmp_path):
    (tmp_path / "log.txt").write_text('# {"config": {"total_batch_size": 8}}\n0 train 5.0 lr=1e-3 mfu=n/a\n0 val 5.5\n1 train 4.0 lr=2e-3\n1 train 4.5 lr=3e-3\n1 hella 0.25\nnoise\n2 train 3.')
    streams, config = plot.read_log(str(tmp_path / "log.txt"))
    assert streams["train"] == {0: (5.0, {"lr": 1e-3}), 1: (4.5, {"lr": 3e-3})}
    assert streams["val"] == {0: (5.5, {})} and streams["hella"] == {1: (0.25, {})} and config == {"total_batch_size": 8}


def picture(path):
    return open(path, "rb").read(8) == b"\x89PNG\r\n\x1a\n" and os.path.getsize(path) > 10_000


def test_plot_draws_a_run_and_several(workspace, tmp_path):
    r = script(here("plot.py"), "log.txt", cwd=workspace / "runs/fp32")
    assert r.returncode == 0 and picture(workspace / "runs/fp32/log.png"), r.stderr
    r = script(here("plot.py"), "fp32/log.txt", "pairs/log.txt", "--x=tokens", f"--out={tmp_path}/both.pdf", cwd=workspace / "runs")
    assert r.returncode == 0 and (tmp_path / "both.pdf").read_bytes().startswith(b"%PDF"), r.stderr


@pytest.mark.parametrize("log", ['# {"config": {}}\n', "", "0 val 10.9\n0 hella 0.25\n0 train 10.9\n1 train 9"], ids=["header only", "empty", "another project's"])
def test_plot_draws_whatever_a_log_holds(tmp_path, log):
    (tmp_path / "log.txt").write_text(log)
    plot.plot([str(tmp_path / "log.txt")], str(tmp_path / "log.png"))
    assert picture(tmp_path / "log.png")


# -- mistakes: one line, a non-zero exit, nothing overwritten

T = ["train.py", *FAST]
SYNTH = ["dataset.py", "--source=synth", "--prompts=t.txt", "--model=m", "--endpoint=http://localhost:1/v1"]
MISTAKES = {
    "an unknown option": ([*T, "--max_step=3"], "there is no option --max_step; did you mean --max_steps?"),
    "a misspelt recipe": (["train.py", "--recipe=tinny"], "did you mean tiny?"),
    "an option without its value": ([*T, "--seed"], "--seed needs a value"),
    "a word that is no option": ([*T, "fast"], "no option fast"),
    "a word for a number": ([*T, "--max_steps=many"], "max_steps='many' is not a whole number"),
    "a fraction for a whole number": ([*T, "--max_steps=1.5"], "max_steps='1.5' is not a whole number"),
    "a number out of range": ([*T, "--keep=0"], "keep=0 must be at least 1"),
    "a negative rate": ([*T, "--max_lr=-1"], "max_lr=-1.0 must be at least 0"),
    "an unknown choice": ([*T, "--norm=batch"], "norm='batch' must be one of layer, rms"),
    "a missing config": ([*T, "--config=no.json"], "cannot read config no.json"),
    "a broken config": ([*T, "--config=broken.json"], "broken.json is not JSON"),
    "a config with an unknown name": ([*T, "--config=unknown.json"], "no hyperparameter max_l; did you mean max_lr?"),
    "missing data": ([*T, "--data=data/none"], "there is no data data/none"),
    "data not made yet": (["train.py"], "python dataset.py --source=fineweb-edu"),
    "unfinished data": ([*T, "--data=data/unfinished"], "data/unfinished is unfinished"),
    "an empty folder": ([*T, "--data=data/empty"], "has no *train*.bin"),
    "a truncated shard": ([*T, "--data=data/truncated"], "its header says 2,000 tokens, its length 1,990"),
    "a shard with a wrong magic number": ([*T, "--data=data/magic"], "magic"),
    "too little data for a window": ([*T, "--data=data/short"], "a window takes block_size + 1 = 33"),
    "a vocabulary too small for the data": ([*T, "--vocab_size=100"], "vocab_size=100 is too small for"),
    "another tokenizer than the data's": ([*T, "--tokenizer=gpt2"], "data/t is in tokenizer byte, not gpt2"),
    "heads that do not divide the width": ([*T, "--n_head=3"], "n_embd=32 must be a multiple of n_head=3"),
    "a batch that does not divide": ([*T, "--total_batch_size=250"], "use 224 or 256"),
    "a micro-batch that does not divide": ([*T, "--micro_batch=3"], "use one of 1, 2, 4, 8"),
    "an unwritable out_dir": ([*T, "--out_dir=t.txt/run"], "cannot write in out_dir=t.txt/run"),
    "a device that is not there": ([*T, "--device=cuda:99"], "device=cuda:99 cannot be used here"),
    "no checkpoint to resume": ([*T, "--resume", "--out_dir=runs/none"], "no checkpoint to resume from"),
    "a missing checkpoint": ([*T, "--resume=no.pt"], "there is no checkpoint no.pt"),
    "not a checkpoint": ([*T, "--resume=t.txt"], "t.txt is not a checkpoint"),
    "a checkpoint of another shape": ([*T, "--n_embd=64", "--resume", "--out_dir=runs/fp32"], "has n_embd=32, not 64"),
    "fewer steps than are done": (["train.py", "--resume", "--out_dir=runs/fp32", "--max_steps=3"], "is at step 30, past max_steps=3"),
    "another recipe on resume": (["train.py", "--resume", "--out_dir=runs/fp32", "--recipe=tiny"], "is of recipe gpt2, not tiny"),
    "a validation shard with a foreign token": ([*T, "--data=data/foreign", "--vocab_size=50304"], "val_000000.bin: token 60000 at 3"),
    "a manifest that is not ours": ([*T, "--data=data/manifest"], "is not one that this version of dataset.py wrote"),
    "a checkpoint of other data": (["train.py", "--resume", "--out_dir=runs/fp32", "--data=data/other"], "--new_data goes on all the same"),
    "a teacher of another tokenizer": ([*T, "--data=data/bpe", "--teacher=runs/fp32/checkpoints/model_000030.pt"], "is in tokenizer byte, the data in bpe:300"),
    "a teacher with a shorter context": ([*T, "--block_size=64", "--teacher=runs/fp32/checkpoints/model_000030.pt"], "a context of 32, which is less than block_size=64"),
    "a teacher that is not there": ([*T, "--teacher=no.pt"], "there is no checkpoint no.pt"),
    "a share beyond the whole": ([*T, "--distill_alpha=1.5"], "distill_alpha=1.5 is too large"),
    "a temperature of nothing": ([*T, "--distill_temperature=0"], "distill_temperature=0.0 must be above 0"),
    "a stride through pairs": ([*T, "--data=data/pairs-byte", "--stride=8"], "stride=8 is for running text"),
    "a checkpoint to begin with that is not there": ([*T, "--init_from=no.pt"], "there is no checkpoint no.pt"),
    "weights that do not exist": ([*T, "--init_from=nowhere/"], "nowhere/"),
    "an unknown source": (["dataset.py", "--source=finweb"], "did you mean fineweb?"),
    "a source that is not there": (["dataset.py", "--source=no.txt"], "there is no source 'no.txt'"),
    "a pattern without files": (["dataset.py", "--source=*.nothing"], "no file matches"),
    "a folder as a source": (["dataset.py", "--source=data"], "data is a folder"),
    "weights for other sources": (["dataset.py", "--source=t.txt,t.jsonl", "--weights=1,2,3"], "--weights must be 2 numbers above zero"),
    "splits that are not a whole": (["dataset.py", "--source=t.txt", "--splits=90/20"], "--splits=90/20 must be percentages"),
    "two ways to divide": (["dataset.py", "--source=t.txt", "--splits=90/10", "--val_tokens=9"], "exclude each other"),
    "a mix in a mix": (["dataset.py", "--source=toygpt,t.txt"], "source toygpt has settings of its own"),
    "weights that are no numbers": (["dataset.py", "--source=t.txt", "--weights=a"], "argument --weights: invalid numbers value: 'a'"),
    "a bench of no steps": ([*T, "--bench=0"], "bench='0' must be a number of steps, or ladder"),
    "an unknown kind of bench": ([*T, "--bench=fast"], "bench='fast' must be a number of steps, or ladder"),
    "a strictness that finds a bad line": (["dataset.py", "--source=bad.jsonl", "--tokenizer=byte", "--out=data/new", "--strict"], "bad.jsonl, line 2: no response; without --strict"),
    "no good pair": (["dataset.py", "--source=none.jsonl", "--tokenizer=byte", "--out=data/new"], "none.jsonl holds no pair; its first line: empty response"),
    "pairs in one piece": (["train.py", "--recipe=sft", "--data=pairs.json"], "pairs.json is JSON in one piece; write one object a line"),
    "pairs mixed with texts": (["dataset.py", "--source=pairs.jsonl,t.txt"], "pairs.jsonl holds pairs; they cannot be mixed with texts"),
    "a cut through pairs": (["dataset.py", "--source=pairs.jsonl", "--val_tokens=100"], "--val_tokens would cut a pair in two"),
    "strictness with a text": (["dataset.py", "--source=t.txt", "--strict"], "--strict is for pairs"),
    "a server with a text": (["dataset.py", "--source=t.txt", "--endpoint=http://localhost/v1"], "--endpoint goes with --source=synth"),
    "prompts without a server": (["dataset.py", "--source=synth", "--prompts=t.txt", "--model=m"], "--source=synth needs --endpoint"),
    "an address that is none": ([*SYNTH, "--endpoint=localhost:1"], "--endpoint must be like http://localhost:8000/v1"),
    "a key in the address": ([*SYNTH, "--endpoint=http://me:secret@localhost/v1"], "a key goes into OPENAI_API_KEY"),
    "prompts that are not there": (["dataset.py", "--source=synth", "--prompts=no.txt", "--model=m", "--endpoint=http://localhost:1/v1"], "cannot read no.txt"),
    "answers into a folder": ([*SYNTH, "--out=data/answers"], "--out=data/answers must be a file of pairs, .jsonl"),
    "a tokenizer for a server": ([*SYNTH, "--tokenizer=byte"], "--tokenizer is not for --source=synth"),
    "a request that is no JSON": ([*SYNTH, "--request=hot"], "--request=hot must be a JSON object"),
    "answers onto something else": ([*SYNTH, "--out=pairs.jsonl"], "pairs.jsonl, line 1, is not of --source=synth"),
    "an empty file": (["dataset.py", "--source=empty.txt"], "empty.txt is empty"),
    "a binary file as text": (["dataset.py", "--source=binary.txt", "--tokenizer=byte", "--out=data/new"], "binary.txt is not UTF-8 text"),
    "a blank text": (["dataset.py", "--source=blank.txt", "--tokenizer=byte"], "holds no text"),
    "a tokenizer that does not exist": (["dataset.py", "--source=t.txt", "--tokenizer=gpt3", "--out=data/new"], "there is no tokenizer 'gpt3'"),
    "a tokenizer too large for uint16": (["dataset.py", "--source=t.txt", "--tokenizer=bpe:70000", "--out=data/new"], "from 258 to 65536"),
    "a tokenizer too small": (["dataset.py", "--source=t.txt", "--tokenizer=bpe:100", "--out=data/new"], "from 258 to 65536"),
    "a missing column": (["dataset.py", "--source=t.jsonl", "--tokenizer=byte", "--out=data/new"], "no column 'text'; its columns are story"),
    "broken json": (["dataset.py", "--source=broken.jsonl", "--tokenizer=byte", "--out=data/new"], "cannot read broken.jsonl"),
    "other settings for a finished folder": (["dataset.py", "--source=t.txt", "--tokenizer=bpe:300", "--out=data/t"], "data/t was made with tokenizer=byte, not bpe:300"),
    "an unknown option of dataset.py": (["dataset.py", "--sources=t.txt"], "did you mean --source?"),
    "a model that is nowhere": (["eval.py", "--prompt=x", "--ckpt=/no/such/run"], "there is no /no/such/run"),
    "no checkpoint to speak": (["eval.py", "--prompt=x", "--out_dir=runs/none"], "has no checkpoint"),
    "a seed that is too large": (["eval.py", "--seed=99999999999999999999", "--prompt=x", "--out_dir=runs/fp32"], "is out of range"),
    "a text of blank lines": (["eval.py", "--perplexity=blank.txt", "--out_dir=runs/fp32"], "has 0 tokens"),
    "shards of another vocabulary": (["eval.py", "--perplexity=data/foreign", "--out_dir=runs/fp32"], "token 60000, which is outside the model's vocabulary of 257"),
    "an object that is no model": (["eval.py", "--ckpt=object.pt", "--prompt=x"], "object.pt is not a checkpoint of train.py, nanoGPT or build-nanogpt"),
    "a Hugging Face folder without a shape": (["eval.py", "--ckpt=hf", "--prompt=x"], "its config.json has no n_embd, n_head"),
    "a folder in another tokenizer": (["eval.py", "--perplexity=data/bpe", "--out_dir=runs/fp32"], "data/bpe is in tokenizer bpe:300, which is not the model's"),
    "a text that is not there": (["eval.py", "--perplexity=no.txt", "--out_dir=runs/fp32"], "there is no source 'no.txt'"),
    "a stride beyond the context": (["eval.py", "--perplexity=t.txt", "--stride=33", "--out_dir=runs/fp32"], "--stride=33 is more than the context of 32"),
    "an export onto something": (["eval.py", "--export=data/t", "--out_dir=runs/fp32"], "data/t is not empty"),
    "a temperature below zero": (["eval.py", "--temperature=-1", "--out_dir=runs/fp32"], "--temperature=-1.0 is out of range"),
    "examples that are not HellaSwag": (["hellaswag.py", "--data=t.jsonl", "--out_dir=runs/fp32"], "line 1: not a HellaSwag example"),
    "a missing log": (["plot.py", "no.txt"], "cannot read no.txt"),
    "an unknown picture format": (["plot.py", "runs/fp32/log.txt", "--out=log.xyz"], "cannot write log.xyz"),
}


@pytest.fixture(scope="session")
def mistakes(workspace):
    """Makes every mistake.  -> {name: completed process}, and whether anything in the folder changed"""
    for name in ("empty", "unfinished", "truncated", "magic", "short", "foreign", "manifest"):
        (workspace / "data" / name).mkdir()
    (workspace / "data/unfinished/progress.json").write_text("{}")
    dataset.write_shard(str(workspace / "data/truncated/train_000000.bin"), np.arange(2000) % 250)
    os.truncate(workspace / "data/truncated/train_000000.bin", 1024 + 2 * 1990)
    (workspace / "data/magic/train_000000.bin").write_bytes(b"\1" * 4000)
    dataset.write_shard(str(workspace / "data/short/train_000000.bin"), [1] * 20)
    dataset.write_shard(str(workspace / "data/foreign/train_000000.bin"), [1] * 500)
    dataset.write_shard(str(workspace / "data/foreign/val_000000.bin"), [1, 1, 1, 60000] + [1] * 100)
    (workspace / "data/manifest/meta.json").write_text("{}")
    for name, raw in {"broken.json": b"{", "unknown.json": b'{"max_l": 1}', "empty.txt": b"", "blank.txt": b"\n\n \n\n", "binary.txt": bytes(range(256)) * 9,
                      "t.jsonl": b'{"story": "x"}\n', "broken.jsonl": b'{"text": "x"}\n{"text": \n', "bad.jsonl": b'{"prompt": "a", "response": "b"}\n{"prompt": "a"}\n',
                      "none.jsonl": b'{"prompt": "a", "response": ""}\n', "pairs.json": b'[{"prompt": "a", "response": "b"}]'}.items():
        (workspace / name).write_bytes(raw)
    (workspace / "other.txt").write_text("\n\n".join(stories(90)))
    dataset.prepare(str(workspace / "other.txt"), "byte", out=str(workspace / "data/other"))
    dataset.prepare(str(workspace / "t.txt"), "bpe:300", out=str(workspace / "data/bpe"))
    torch.save({"model": [1]}, workspace / "object.pt")
    (workspace / "hf").mkdir()
    torch.save({}, workspace / "hf/pytorch_model.bin")
    (workspace / "hf/config.json").write_text("{}")
    before = tree(workspace)
    done = [script(here(args[0]), *args[1:], cwd=workspace, HF_HUB_OFFLINE="1") for args, _ in MISTAKES.values()]
    return dict(zip(MISTAKES, done)), before, tree(workspace)


def tree(folder):
    return {os.path.join(d, f): os.stat(os.path.join(d, f)).st_mtime_ns for d, _, files in os.walk(folder) for f in files if "__pycache__" not in d}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_ends_in_one_line_that_says_what_is_wrong(mistakes, name):
    r, (args, expected) = mistakes[0][name], MISTAKES[name]
    assert r.returncode != 0 and "Traceback" not in r.stderr, r.stderr
    lines = r.stderr.strip().splitlines()
    assert lines[-1].startswith(f"{args[0]}: ") and expected in lines[-1] and len(lines) == 1, r.stderr


def test_mistakes_overwrite_nothing(mistakes):
    _, before, after = mistakes
    assert {p: t for p, t in after.items() if p in before} == before
