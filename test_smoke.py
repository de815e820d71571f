"""
python -m pytest -q

Hermetic: every test makes what it reads, in folders of its own. Tests that need the GPT-2 vocabulary, an optional
package, real text (TEST_DATA=folder) or a peer's sources (NANOGPT=folder, LLMC=folder) are skipped, with the reason,
where these are missing.
"""
import argparse
import atexit
import contextlib
import faulthandler
import functools
import hashlib
import http.server
import importlib.util
import io
import json
import math
import os
import random
import re
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
import warnings
import zipfile
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor

import filelock
import numpy as np
import pytest
import requests
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, HERE)
import data_loader
import dataset
import eval as eval_script
import hellaswag
import model as model_file
import plot
import train
from data_loader import DataLoader, PackedPairs, Pairs, pack, permute
from dataset import EOT, UserError, get_tokenizer
from model import (GPT, GPTConfig, attention_bias, checkpoint_step, find_checkpoints, isolate_documents,
                   load_checkpoint, matmul_attention, read_checkpoint, reference_attention)

TEST_DATA = os.environ.get("TEST_DATA", "")
WIKITEXT = os.path.join(TEST_DATA, "text/wikitext2-valid.txt")
HELLASWAG = os.path.join(TEST_DATA, "hellaswag/hellaswag_val_1000.jsonl")


def gpt2_tokenizer():
    try:
        return get_tokenizer("gpt2")
    except UserError:
        return None


def is_installed(package):
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None  # a mere folder has none


def needs_package(name):
    return pytest.mark.skipif(not is_installed(name), reason=f"needs the package {name}")


def needs_variable(name, what):
    return pytest.mark.skipif(name not in os.environ, reason=f"needs {what}: {name}=folder")


needs_gpt2 = pytest.mark.skipif(gpt2_tokenizer() is None,
                                reason="needs the GPT-2 vocabulary: a network, or TIKTOKEN_CACHE_DIR")
with warnings.catch_warnings():  # a mark is declared in a file of its own; a flat project has none
    warnings.simplefilter("ignore")
    torture = pytest.mark.torture
needs_test_data = needs_variable("TEST_DATA", "real text and HellaSwag examples")


def is_torture(config):
    return "torture" in config.option.markexpr


@pytest.fixture(autouse=True)
def skip_torture(request):
    if request.node.get_closest_marker("torture") and not is_torture(request.config):
        pytest.skip("takes long: python -m pytest -m torture")


def script(*args, cwd, n=1, before="", **env):
    """
    Runs `python ...` as a user would, except that torch is already imported: that takes two seconds. Of n processes,
    started as torchrun would, the exit code is the first that is not 0. Before the script, each runs the code `before`.
    """
    args, env = [str(a) for a in args], {**os.environ, "OMP_NUM_THREADS": "1", **env}
    if args[0] == "-m" or sys.platform != "linux":
        if before:
            pytest.skip("needs fork")
        launch = torchrun(n) if n > 1 else []
        command = [sys.executable, *launch, *args]
        return subprocess.run(command, cwd=cwd, text=True, capture_output=True, timeout=300, env=env)
    envs = [env]
    if n > 1:
        launch = dict(WORLD_SIZE=str(n), MASTER_ADDR="localhost", MASTER_PORT=str(some_port()))
        envs = [{**env, **launch, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(n)]
    with tempfile.TemporaryDirectory() as folder:
        paths = [os.path.join(folder, name) for name in ("out", "err")]
        server = fork_server(env["OMP_NUM_THREADS"], threading.get_ident())
        server.stdin.write(json.dumps([args, str(cwd), envs, paths, before]) + "\n")
        server.stdin.flush()
        code = int(server.stdout.readline())
        output = [open(path, encoding="utf-8", errors="replace").read() for path in paths]
        return subprocess.CompletedProcess(args, code, *output)


BOTH_CORES = ThreadPoolExecutor(2)  # for fixtures that call script() many times


def torchrun(n):
    return ["-m", "torch.distributed.run", f"--nproc_per_node={n}", "--standalone"]


def run_ok(*args, cwd, **env):
    r = script(*args, cwd=cwd, **env)
    assert r.returncode == 0, r.stderr
    return r


@functools.cache
def fork_server(threads, client):
    """Each thread of the tests that calls script() has servers of its own."""
    env = {**os.environ, "OMP_NUM_THREADS": threads, "PYTHONPATH": HERE}
    pipe = subprocess.PIPE
    server = subprocess.Popen([sys.executable, "-c", FORK_SERVER], stdin=pipe, stdout=pipe, text=True, env=env)
    atexit.register(server.kill)
    return server


# For each line, forks a process for each environment in it, and prints how they ended. Python's own exit would touch,
# so copy, all memory.
FORK_SERVER = """
import atexit, gc, json, os, runpy, signal, sys, threading
import torch._dynamo, torch.distributed.fsdp, eval, train
gc.freeze()
for line in sys.stdin:
    sys.argv, cwd, envs, paths, before = json.loads(line)
    pids = []
    for env in envs:
        if not (pid := os.fork()):
            break
        pids.append(pid)
    else:
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        print(next(filter(None, codes), 0), flush=True)
        continue
    break
else:
    sys.exit()
os.chdir(cwd)
os.environ.clear()
os.environ.update(env)
for fd, path in enumerate([os.devnull, *paths]):
    os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND), fd)
sys.stdin, sys.path[0], code = open(0), os.path.dirname(sys.argv[0]), 0
signal.alarm(300)
try:
    exec(before, {})
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as e:
    if isinstance(e.code, str):
        print(e.code, file=sys.stderr)
    code = 1 if isinstance(e.code, str) else e.code or 0
except BaseException:
    sys.excepthook(*sys.exc_info())
    code = 1
threading._shutdown()
atexit._run_exitfuncs()
sys.stdout.flush()
sys.stderr.flush()
os._exit(code)
"""


def here(name):
    return os.path.join(HERE, name)


def stories(n):
    with open(here("input.txt"), encoding="utf-8") as f:
        return f.read().split(f"\n{EOT}\n")[:n]


def small(**switches):
    return GPTConfig(**{**dict(block_size=16, vocab_size=64, n_layer=2, n_head=2, n_embd=32), **switches})


SWITCHES = {
    "gpt-2": {}, "sinusoidal": dict(pos="sinusoidal", head_bias=True),
    "rotary": dict(pos="rotary", qk_norm=True, norm="rms", act="relu2"),
    "untied": dict(tie_head=False, qkv_bias=False, softcap=15.0), "no bias": dict(bias=False, act="gelu_erf")}
each_kind = pytest.mark.parametrize("switches", SWITCHES.values(), ids=SWITCHES.keys())
each_attention = pytest.mark.parametrize("attention", ["fused", "reference"])


def lively(**switches):
    """A model that says something new at every step: with GPT-2's small weights the likeliest token rarely changes."""
    torch.manual_seed(0)
    model = GPT(small(**switches)).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model


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


@pytest.mark.parametrize("masked, dropout", [(False, 0.0), (True, 0.0), (True, 0.5)])
def test_attention_as_matrix_products_equals_the_reference_forward_and_backward(masked, dropout):
    results, mask = [], torch.ones(16, 16, dtype=torch.bool).tril()
    if masked:
        mask = isolate_documents(torch.tensor([[0] * 5 + [1] * 11, [0] * 16]))[1]
    for attend, allowed in ((reference_attention, mask), (matmul_attention, attention_bias(mask, torch.float64))):
        torch.manual_seed(0)
        q, k, v, wanted = torch.randn(4, 2, 3, 16, 8, dtype=torch.float64, requires_grad=True)
        y = attend(q, k, v, allowed, dropout)
        results.append([y, *torch.autograd.grad((y * wanted).sum(), (q, k, v))])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("change, expected", [
    ({}, 4), (dict(documents=True), 4), (dict(grad_checkpoint=True), 4), (dict(T=513), 0), (dict(evaluate=True), 0),
    (dict(attention="flash"), 0), (dict(dtype=torch.float32), 0), (dict(has_instructions=False), 0)], ids=str)
def test_training_on_a_cpu_with_bfloat16_does_not_use_the_fused_kernel(monkeypatch, change, expected):
    case = dict(T=512, documents=False, evaluate=False, grad_checkpoint=False, attention="fused", dtype=torch.bfloat16,
                has_instructions=True) | change
    calls = []
    monkeypatch.setattr(model_file, "cpu_computes_in", lambda dtype: case["has_instructions"])
    monkeypatch.setattr(model_file, "matmul_attention", lambda *args: calls.append(1) or matmul_attention(*args))
    model = lively(n_layer=4, block_size=case["T"], attention=case["attention"])
    model.train(not case["evaluate"]).grad_checkpoint = case["grad_checkpoint"]
    index = torch.arange(case["T"])[None]
    batch = (index % 64, index % 64, index // 40 if case["documents"] else None)
    with train.autocast(index.device, case["dtype"]):
        loss = model(*batch)[1]
        model.cfg.attention = "reference"
        expected_loss = model(*batch)[1]
    assert len(calls) == expected and loss.item() == pytest.approx(expected_loss.item(), abs=1e-3)


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
    model = lively(**switches)
    logits = [model(torch.tensor([order]))[0] for order in ([1, 2, 3], [2, 1, 3])]
    assert not torch.allclose(*logits, atol=1e-3)


def test_sinusoidal_positions_follow_the_papers_formula():
    table = model_file.sinusoids(20, 8)
    for pos in range(20):
        for i in range(4):
            assert table[pos, 2 * i] == pytest.approx(math.sin(pos / 10000 ** (2 * i / 8)), abs=1e-5)
            assert table[pos, 2 * i + 1] == pytest.approx(math.cos(pos / 10000 ** (2 * i / 8)), abs=1e-5)


def test_rotary_positions_depend_on_distance_alone():
    cos, sin = GPT(small(pos="rotary")).rotary
    q, k = torch.randn(2, 1, 1, 1, 16)

    def score(i, j):
        turned = [model_file.rotate(t, cos[n:n + 1], sin[n:n + 1]) for t, n in ((q, i), (k, j))]
        return (turned[0] * turned[1]).sum().item()

    assert score(9, 5) == pytest.approx(score(4, 0), abs=1e-5)
    assert score(9, 5) != pytest.approx(score(9, 2), abs=1e-3)


def test_padded_vocabulary_rows_are_never_sampled():
    model = GPT(small(vocab_size=64, n_tokens=40, head_bias=True))
    with torch.no_grad():
        model.lm_head.bias[40:] = 9.0  # by far the likeliest, were they allowed
    for temperature in (0, 1.0, 5.0):
        assert model.generate(torch.zeros(8, 1, dtype=torch.long), 20, temperature=temperature).max() < 40


def test_the_default_vocabulary_has_47_padded_rows():
    assert (GPTConfig().vocab_size, GPTConfig().n_tokens) == (50304, 50257)
    assert GPTConfig(vocab_size=1000).n_tokens == 1000


def test_targets_of_minus_one_do_not_count():
    model, idx, targets = GPT(small()), *torch.randint(64, (2, 2, 16))
    targets[:, 5:] = -1
    logits, loss = model(idx, targets)
    expected = F.cross_entropy(logits[:, :5].reshape(-1, 64), targets[:, :5].reshape(-1))
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)


def test_without_targets_only_the_last_position_is_computed():
    model, idx = GPT(small()).eval(), torch.randint(64, (2, 16))
    last, loss = model(idx)
    assert last.shape == (2, 1, 64) and loss is None
    torch.testing.assert_close(last, model(idx, idx)[0][:, -1:])


@each_kind
@each_attention
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


def test_weights_begin_as_gpt2s():
    model = GPT(GPTConfig(vocab_size=2048, n_layer=8, n_embd=256, n_head=4, block_size=256))
    for name, p in model.named_parameters():
        if p.dim() == 2:
            expected = 0.02 / 4 if name.endswith("c_proj.weight") else 0.02
            assert p.std().item() == pytest.approx(expected, rel=0.02), name
        elif name.endswith("bias"):
            assert (p == 0).all()


def test_activation_checkpointing_changes_no_gradient():
    grads = []
    for is_on in (False, True):
        torch.manual_seed(0)
        model, idx = GPT(small(dropout=0.2)).train(), torch.arange(16).view(1, 16)
        model.grad_checkpoint = is_on
        torch.manual_seed(1)
        model(idx, idx)[1].backward()
        grads.append([p.grad for p in model.parameters()])
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b)


def test_dropout_acts_in_training_alone():
    model, idx = GPT(small(dropout=0.5)), torch.arange(16).view(1, 16)
    assert not torch.equal(model.train()(idx)[0], model(idx)[0])
    assert torch.equal(model.eval()(idx)[0], model(idx)[0])


@pytest.mark.parametrize("options, expected", [
    ({}, {0, 1, 2, 3}), (dict(top_k=2), {0, 1}), (dict(top_p=0.7), {0, 1}), (dict(top_p=0.76), {0, 1, 2}),
    (dict(top_p=0.01), {0}), (dict(temperature=0), {0})], ids=str)
def test_top_k_and_top_p_keep_the_likeliest_tokens(options, expected):
    logits = torch.tensor([[0.5, 0.25, 0.15, 0.1]]).log().repeat(2000, 1)
    assert set(model_file.sample(logits, **options).flatten().tolist()) == expected


def test_sampling_follows_the_probabilities():
    probs = torch.tensor([0.5, 0.25, 0.15, 0.1])
    drawn = model_file.sample(probs.log().repeat(20000, 1), generator=torch.Generator().manual_seed(0))
    assert drawn.flatten().bincount() / 20000 == pytest.approx(probs, abs=0.015)


def test_a_low_temperature_makes_the_likely_likelier():
    logits = torch.tensor([0.0, math.log(3)]).repeat(20000, 1)
    drawn = model_file.sample(logits, temperature=0.5, generator=torch.Generator().manual_seed(0))
    assert drawn.float().mean().item() == pytest.approx(0.9, abs=0.01)


def test_top_p_counts_among_the_top_k():
    logits = torch.tensor([0.6, 0.3, 0.1]).log().repeat(100, 1)
    assert model_file.sample(logits, top_k=2, top_p=0.5).unique().tolist() == [0]


def test_a_sample_in_the_middle_of_training_leaves_the_model_in_training():
    model = GPT(small()).train()
    model.generate(torch.zeros(1, 1, dtype=torch.long), 2)
    assert model.training


def test_zero_init_is_for_the_projections_into_the_residual_stream():
    model = GPT(small(zero_init=True, tie_head=False))
    zero = {name for name, p in model.named_parameters() if p.dim() == 2 and not p.any()}
    assert zero == {f"transformer.h.{i}.{part}.c_proj.weight" for i in range(2) for part in ("attn", "mlp")}


def test_a_checkpoint_of_nanogpt_without_biases_is_read(tmp_path):
    model = lively(bias=False, act="gelu_erf")
    torch.save(dict(model=model.state_dict(), model_args=dict(n_head=2), iter_num=7), tmp_path / "ckpt.pt")
    theirs, rest = load_checkpoint(str(tmp_path / "ckpt.pt"))
    idx = torch.randint(64, (1, 9))
    assert rest["step"] == 7 and torch.equal(theirs(idx, idx)[0], model(idx, idx)[0])


@pytest.mark.parametrize("key, value", [
    ("model_type", "llama"), ("layer_norm_epsilon", 1e-6), ("scale_attn_weights", False), ("n_inner", 100),
    ("scale_attn_by_inverse_layer_idx", True), ("add_cross_attention", True), ("activation_function", "silu")])
def test_a_hugging_face_model_that_is_not_quite_a_gpt2_is_refused(key, value):
    config = dict(n_positions=16, vocab_size=64, n_layer=2, n_head=2, n_embd=32)
    model_file.import_config(config, "x")
    with pytest.raises(UserError, match=f"x has {key}={value}; "):
        model_file.import_config({**config, key: value}, "x")


@torch.no_grad()
def generate_without_cache(model, prompt, n):
    """The whole window anew for every token; when the context is full, the last half of it"""
    window, new, size = list(prompt), [], model.cfg.block_size
    for _ in range(n):
        idx = torch.tensor([window[-size:]], device=model.lm_head.weight.device)
        new.append(model(idx, idx)[0][0, -1].argmax().item())
        window = window[-size:] + [new[-1]]
        window = window[-(size // 2):] if len(window) > size else window
    return new


@each_kind
@each_attention
def test_greedy_generation_equals_that_without_a_cache_far_past_the_context(switches, attention):
    model = lively(**switches, attention=attention)
    idx = torch.randint(64, (3, 5))
    out = model.generate(idx, 60, temperature=0)
    assert out.tolist() == [row + generate_without_cache(model, row, 60) for row in idx.tolist()]
    assert len(set(out[0].tolist())) > 4


@each_kind
def test_rows_of_different_lengths_say_what_each_says_alone(switches):
    model = lively(**switches)
    prompts = [torch.randint(64, (n,)).tolist() for n in (1, 9, 16, 40, 4)]
    stream = model.stream(prompts, temperature=0)
    together = torch.cat([next(stream) for _ in range(50)], dim=1).tolist()
    assert together == [generate_without_cache(model, p, 50) for p in prompts]


@each_kind
@torch.no_grad()
@pytest.mark.parametrize("lengths", [(1,), (1, 9, 4)], ids=str)
def test_a_step_recorded_once_as_for_cuda_says_what_each_row_says_alone(switches, lengths):
    model, B = lively(**switches).eval(), len(lengths)
    T, prompts = model.cfg.block_size, [torch.randint(64, (n,)) for n in lengths]
    cache = model_file.KVCache(model, B)
    cache.use_graph, step = True, functools.partial(model.decode_rows, cache=cache, end=T)
    cache.graph = make_fx(step)(torch.zeros(B, 1, dtype=torch.long), torch.zeros(B, dtype=torch.long))
    x, new = model.prefill(prompts, cache), []
    while max(cache.lengths) < T:
        new.append(model.logits(x).argmax(-1, keepdim=True))
        x = model.decode_step(new[-1], cache)
    expected = [generate_without_cache(model, p.tolist(), T - max(lengths)) for p in prompts]
    assert torch.cat(new, dim=1).tolist() == expected


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_on_a_cpu_is_close_to_float32(dtype):
    model, idx = lively(), torch.randint(64, (2, 12))
    expected = model(idx)[0]
    torch.testing.assert_close(model.to(dtype)(idx)[0].float(), expected, atol=0.05, rtol=0.05)
    cache = model_file.KVCache(model, 2)
    model.prefill(list(idx[:, :11]), cache)
    step = model.decode_step(idx[:, 11:], cache)
    torch.testing.assert_close(step.float(), model.hidden(idx)[:, -1].float(), atol=0.05, rtol=0.05)


@torch.no_grad()
@pytest.mark.parametrize("bias", [True, False])
def test_int8_layers_multiply_by_integers_times_a_scale_for_each_row(bias):
    layer, x = model_file.Linear(96, 70, bias=bias), torch.randn(2, 3, 96).bfloat16().float()
    quantized = model_file.Int8Linear(layer)
    rounded = quantized.weight.float() * quantized.scales.float()[:, None]
    largest = layer.weight.abs().amax(dim=1, keepdim=True)
    assert quantized.weight.dtype == torch.int8 and ((rounded - layer.weight).abs() <= 1.01 * largest / 127 / 2).all()
    expected = torch.nn.functional.linear(x, rounded, layer.bias)
    torch.testing.assert_close(quantized(x), expected, atol=0.01, rtol=0.01)
    torch.testing.assert_close(quantized(x, slice(5, 20)), quantized(x)[..., 5:20])


@torch.no_grad()
def test_int8_leaves_layers_alone_that_its_kernel_reads_beyond():
    model = GPT(small(n_embd=20, n_head=2)).eval()
    expected = model(torch.tensor([[1, 2, 3]]))[0]
    model.quantize()
    kinds = Counter(type(m).__name__ for m in model.modules() if hasattr(m, "weight"))
    assert kinds["Int8Linear"] == model.cfg.n_layer  # of the MLP, 80 wide
    torch.testing.assert_close(model(torch.tensor([[1, 2, 3]]))[0], expected, atol=0.05, rtol=0.05)


def test_int8_changes_perplexity_by_less_than_half_a_percent(workspace):
    values = []
    for dtype in ("float32", "int8"):
        r = run_ok(here("eval.py"), "--ckpt=runs/fp32", "--perplexity=data/t", f"--dtype={dtype}", cwd=workspace)
        values.append(float(re.search(r"perplexity ([\d.]+)", r.stdout)[1]))
    assert values[1] == pytest.approx(values[0], rel=0.005) and values[1] != values[0]


@needs_package("transformers")
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
        expected = theirs(idx).logits
        torch.testing.assert_close(ours(idx, idx)[0], expected, atol=1e-4, rtol=1e-4)
        assert back(idx).logits.size(-1) == 50257  # without padding
        torch.testing.assert_close(back(idx).logits, expected[..., :50257], atol=1e-4, rtol=1e-4)


SHRUNK_SHAPE = dict(block_size=48, vocab_size=128, n_layer=2, n_embd=48, n_head=3, head_bias=False)
# Every recipe's, each once, and others that GPT-2's format can hold
EXPORTED = [*model_file.CONFIGS.values(), dict(bias=False), dict(act="relu2"), dict(act="gelu_erf", tie_head=False)]
EXPORTED = {str(shape): shape for shape in ({**switches, **SHRUNK_SHAPE} for switches in EXPORTED)}.values()


@needs_package("transformers")
@pytest.mark.parametrize("shape", EXPORTED, ids=str)
def test_every_recipes_shape_exports_with_equal_logits_and_greedy_text(tmp_path, shape):
    import transformers
    model, idx = lively(**shape, n_tokens=101).eval(), torch.randint(101, (2, 20))
    model.save_pretrained(str(tmp_path))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        logits, _ = model(idx, idx)
        torch.testing.assert_close(theirs(idx).logits, logits[..., :101], atol=1e-4, rtol=1e-4)
        back = GPT.from_pretrained(str(tmp_path)).eval()
        torch.testing.assert_close(back(idx, idx)[0], logits[..., :101], atol=1e-4, rtol=1e-4)
    assert len({p.data_ptr() for p in back.parameters()}) == len(list(back.parameters()))  # none shares memory
    text = theirs.generate(idx, max_new_tokens=20, min_new_tokens=20, do_sample=False, eos_token_id=None)
    assert theirs.config.eos_token_id == theirs.config.bos_token_id == 100
    assert text.tolist() == model.generate(idx, 20, temperature=0).tolist()


def test_a_file_cannot_make_an_import_take_more_memory_than_it_has_itself(tmp_path):
    model = GPT(small(**model_file.MODERN, vocab_size=64, tie_head=False))
    model.save_pretrained(str(tmp_path))
    (tmp_path / "model.safetensors").unlink(missing_ok=True)
    weights = model_file.nanochat_weights(model)
    weights["model.layers.0.self_attn.q_proj.weight"] = torch.zeros(1).expand(30_000, 30_000)
    torch.save(weights, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="repeats its values"):
        GPT.from_pretrained(str(tmp_path))


def test_an_export_of_as_many_tokens_as_padded_gpt2_has_keeps_them_all(tmp_path):
    model = GPT(GPTConfig(block_size=8, vocab_size=50304, n_tokens=50304, n_layer=1, n_head=1, n_embd=8))
    model.save_pretrained(str(tmp_path))
    special = [f"<{i}>" for i in range(50304 - 257)] + [EOT]
    dataset.write_json(str(tmp_path / dataset.TOKENIZER_SPEC), {"tokenizer": {"name": "byte", "special": special}})
    assert load_checkpoint(str(tmp_path))[0].cfg.n_tokens == 50304


@pytest.mark.parametrize("file", ["vocab.json", "tokenizer.json"])
def test_a_hugging_face_model_with_a_vocabulary_of_its_own_is_refused(file, tmp_path):
    GPT(small()).save_pretrained(str(tmp_path))
    for vocabulary in (model_file.GPT2_SAMPLES, {**model_file.GPT2_SAMPLES, "\u0120the": 263}):
        content = vocabulary if file == "vocab.json" else {"model": {"vocab": vocabulary}}
        (tmp_path / file).write_text(json.dumps(content))
        if vocabulary is model_file.GPT2_SAMPLES:
            GPT.from_pretrained(str(tmp_path))
    with pytest.raises(UserError, match=f"a vocabulary of its own, {file}"):
        GPT.from_pretrained(str(tmp_path))


@needs_gpt2
def test_what_tells_gpt2s_vocabulary_from_others_is_true_of_it():
    tokens = {text.replace("\u0120", " "): token for text, token in model_file.GPT2_SAMPLES.items()}
    assert {text: get_tokenizer("gpt2").encode(text) for text in tokens} == {k: [v] for k, v in tokens.items()}


def test_a_lack_of_memory_is_not_taken_for_a_damaged_file():
    assert not dataset.is_out_of_memory(RuntimeError("CUDA error: an illegal memory access was encountered"))
    for error in (MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory"), torch.OutOfMemoryError(),
                  RuntimeError("CUDA error: out of memory"), RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED")):
        with pytest.raises(type(error)), dataset.reading("model.pt", "a checkpoint"):
            raise error


def test_weights_in_torchs_old_format_are_read(tmp_path):
    torch.save({"x": torch.ones(2)}, tmp_path / "w.bin", _use_new_zipfile_serialization=False)
    assert model_file.load_file(str(tmp_path / "w.bin"))["x"].tolist() == [1, 1]


def test_an_export_that_neither_format_can_hold_names_what_each_lacks():
    with pytest.raises(UserError, match="pos=rotary: .* GPT-2 lacks it, .* NanoChat lacks head_bias=True"):
        model_file.export_config(small(**model_file.MODERN, head_bias=True), 0, torch.float32)


@pytest.mark.parametrize("switch, value", [
    ("pos", "rotary"), ("norm", "rms"), ("qk_norm", True), ("softcap", 15.0), ("head_bias", True)])
def test_an_export_refuses_by_name_what_hugging_faces_gpt2_lacks(tmp_path, switch, value):
    with pytest.raises(UserError, match=f"{switch}={value}"):
        GPT(small(**{switch: value})).save_pretrained(str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


TEXTS = ["Once upon a time, there was  a \n\n ☃ don't 1234 'll", "".join(map(chr, range(1, 400))), "   \t\r\n x"]


@needs_package("transformers")
@pytest.mark.parametrize("kind", ["byte", "bpe", pytest.param("gpt2", marks=needs_gpt2)])
def test_an_exported_tokenizer_gives_the_tokens_of_the_model(tmp_path, kind):
    import transformers
    spec = {"name": kind}
    if kind == "bpe":
        spec = {**make_bpe(stories(200), 900), "special": [EOT, "<|pad|>"]}
    enc = get_tokenizer(spec)
    eval_script.export(GPT(small(vocab_size=enc.n_vocab)), enc, {"tokenizer": spec}, str(tmp_path / "out"))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    rng = random.Random(0)
    texts = TEXTS + stories(300) + ["".join(rng.choices("etaoin shrdlu\n'.", k=300)) for _ in range(100)]
    assert [theirs(t)["input_ids"] for t in texts] == [enc.encode_ordinary(t) for t in texts]
    config = json.load(open(tmp_path / "out/config.json"))
    assert theirs.eos_token_id == config["eos_token_id"] == enc.eot_token
    assert theirs.decode(enc.encode_ordinary(TEXTS[1])) == TEXTS[1]


@needs_package("transformers")
def test_eval_exports_what_eval_and_transformers_read(workspace, tmp_path):
    import transformers

    def greedy(ckpt):
        options = ["--prompt=Once", "--max_new_tokens=20", "--temperature=0"]
        return run_ok(here("eval.py"), f"--ckpt={ckpt}", *options, cwd=workspace).stdout

    ckpt = "runs/fp32/checkpoints/model_000030.pt"
    run_ok(here("eval.py"), f"--ckpt={ckpt}", f"--export={tmp_path}/hf", cwd=workspace)
    text = greedy(ckpt)
    assert greedy(f"{tmp_path}/hf") == text != ""
    card, run = (tmp_path / "hf/README.md").read_text(), read_checkpoint(str(workspace / ckpt))["run"]
    assert f"- data: t\n- steps: 30\n- tokens: {run['tokens']:,}\n" in card and "nan" not in card
    assert f"- validation loss at step 30, nats per token: {run['last_val']['loss']:.5g}\n" in card
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    idx = torch.tensor([[tokenizer.bos_token_id] + tokenizer("Once")["input_ids"]])
    out = model.generate(idx, max_new_tokens=20, do_sample=False, pad_token_id=0)[0]
    assert tokenizer.decode(out, skip_special_tokens=True).rstrip() == text.rstrip()


@pytest.mark.parametrize("kind", ["nanogpt", "build-nanogpt", "bare weights"])
def test_checkpoints_of_nanogpt_and_build_nanogpt_load(tmp_path, monkeypatch, kind):
    foreign_config = type("GPTConfig", (), {"__module__": "train_gpt2"})  # as objects of it are in its checkpoints
    monkeypatch.setitem(sys.modules, "train_gpt2", type(sys)("train_gpt2"))
    sys.modules["train_gpt2"].GPTConfig = foreign_config
    torch.manual_seed(0)
    model = GPT(small(n_head=4, n_embd=256, act="gelu_erf" if kind == "nanogpt" else "gelu")).eval()
    prefix = "module._orig_mod." if kind == "build-nanogpt" else "_orig_mod."
    weights = {prefix + k: v for k, v in model.state_dict().items()}
    weights["_orig_mod.transformer.h.0.attn.bias"] = torch.ones(16, 16).tril()  # the mask of old versions
    shape, config = dict(n_layer=2, n_head=4, n_embd=256, block_size=16, vocab_size=64), foreign_config()
    vars(config).update(shape)
    content = {
        "nanogpt": {"model": weights, "model_args": {**shape, "bias": True, "dropout": 0.0}, "iter_num": 7},
        "build-nanogpt": {"model": weights, "config": config, "step": 7, "val_loss": 3.0},
        "bare weights": weights}[kind]
    torch.save(content, tmp_path / "ckpt.pt")
    monkeypatch.delitem(sys.modules, "train_gpt2")
    loaded, rest = load_checkpoint(str(tmp_path / "ckpt.pt"))
    idx = torch.randint(64, (2, 16))
    assert torch.equal(loaded(idx, idx)[0], model(idx, idx)[0])
    assert rest["step"] == (0 if kind == "bare weights" else 7)


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path):
    class Hostile:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)
    torch.save({"model": {}, "config": Hostile()}, tmp_path / "ckpt.pt")
    with pytest.raises(UserError, match="is not a checkpoint"):
        load_checkpoint(str(tmp_path / "ckpt.pt"))
    assert not (tmp_path / "ran").exists()


@needs_variable("NANOGPT", "nanoGPT's sources")
def test_twenty_adamw_steps_give_the_losses_of_nanogpt(monkeypatch):
    spec = importlib.util.spec_from_file_location("nanogpt_model", os.path.join(os.environ["NANOGPT"], "model.py"))
    nanogpt = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(nanogpt)
    torch.manual_seed(0)
    shape = dict(block_size=64, vocab_size=512, n_layer=4, n_head=4, n_embd=128)
    ours = GPT(GPTConfig(**shape, act="gelu_erf"))
    theirs = nanogpt.GPT(nanogpt.GPTConfig(**shape, dropout=0.0, bias=True))
    theirs.load_state_dict(ours.state_dict())
    monkeypatch.setattr(train, "max_lr", 1e-3)
    ours.optimizer, = train.make_optimizers(ours, torch.device("cpu"), torch.float32)
    theirs.optimizer = theirs.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu")
    largest = 0
    for _ in range(20):
        x, y = torch.randint(512, (2, 8, 64))
        losses = []
        for m in (ours, theirs):
            loss = m(x, y)[1]
            loss.backward()
            torch.nn.utils.clip_grad_norm_(m.parameters(), 1.0)
            m.optimizer.step()
            m.optimizer.zero_grad()
            losses.append(loss.item())
        largest = max(largest, abs(losses[0] - losses[1]))
    print(f"largest difference in 20 steps: {largest:.2e}")
    assert largest < 1e-5


# -- dataset.py: tokenizers

def naive_bpe(text, n_merges):
    """Counts every pair anew for every merge"""
    import regex
    words = Counter(tuple(bytes([b]) for b in w.encode()) for w in regex.findall(dataset.GPT2_SPLIT, text))
    merges = []
    for _ in range(n_merges):
        pairs = count_pairs(words)
        best = max(pairs, key=lambda p: (pairs[p], p))
        merges.append(best)
        words = merge_everywhere(words, best)
    return merges


def count_pairs(words):
    pairs = Counter()
    for word, n in words.items():
        for pair in zip(word, word[1:]):
            pairs[pair] += n
    return pairs


def merge_everywhere(words, pair):
    merged = Counter()
    for word, n in words.items():
        out, i = [], 0
        while i < len(word):
            is_pair = word[i:i + 2] == pair
            out.append(word[i] + word[i + 1] if is_pair else word[i])
            i += 2 if is_pair else 1
        merged[tuple(out)] += n
    return merged


@pytest.mark.parametrize("text", [
    "aaaaaaa aaaa aaa abab ababab bcbc abcabc " * 3, "\n".join(stories(40)),
    "zq zq qz qz äö äö öä ☃☃☃ \0\0\0 1234 1234"], ids=["repeats", "stories", "ties and other alphabets"])
def test_bpe_merges_equal_those_of_a_slow_obvious_loop(text):
    merges = dataset.train_bpe([text], 400)
    assert len(merges) > 10 and merges == naive_bpe(text, len(merges))


@needs_package("tokenizers")
def test_bpe_merges_are_those_of_hugging_face_but_for_ties():
    """Of equally frequent pairs theirs may take another: so each of theirs is checked to be a most frequent one."""
    import regex
    import tokenizers
    text = "\n".join(stories(60))
    trainer = tokenizers.ByteLevelBPETokenizer()
    trainer.train_from_iterator([text], vocab_size=256 + 500, min_frequency=1, show_progress=False)
    merges = json.loads(trainer._tokenizer.to_str())["model"]["merges"]
    theirs = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in merges]
    spelled = text.replace("\n", "\0").replace(" ", "Ġ").replace("\0", "Ċ")
    words = Counter(tuple(w.replace(" ", "Ġ").replace("\n", "Ċ")) for w in regex.findall(dataset.GPT2_SPLIT, text))
    assert text.isascii() and len(theirs) == 500 and "Ġ" in spelled
    for pair in theirs:
        pairs = count_pairs(words)
        assert pairs[pair] == max(pairs.values())
        words = merge_everywhere(words, pair)
    ours = {tuple(t.decode().replace(" ", "Ġ").replace("\n", "Ċ") for t in pair)
            for pair in dataset.train_bpe([text], 256 + 501)}
    assert len(ours & set(theirs)) > 450


def make_bpe(texts, size):
    merges = dataset.train_bpe(texts, size)
    merges = [[a.decode("latin-1"), b.decode("latin-1")] for a, b in merges]
    return {"name": f"bpe:{size}", "merges": merges, "special": [EOT]}


def test_a_trained_tokenizer_has_the_size_asked_for_and_its_special_tokens_last():
    enc = get_tokenizer(make_bpe(stories(50), 600))
    assert enc.n_vocab == 600 and enc.eot_token == 599


@pytest.mark.parametrize("kind", ["byte", "bpe"])
def test_a_tokenizer_round_trips_any_text_and_any_bytes(kind):
    enc = get_tokenizer("byte" if kind == "byte" else make_bpe(stories(50), 500))
    rng = random.Random(0)
    code_points = [c for c in range(0x110000) if not 0xD800 <= c < 0xE000]
    text = "".join(map(chr, rng.sample(code_points, 5000))) + EOT
    assert enc.decode(enc.encode_ordinary(text)) == text
    raw = bytes(rng.randrange(256) for _ in range(5000))
    assert enc.decode_bytes([enc.encode_single_token(raw[i:i + 1]) for i in range(len(raw))]) == raw


def test_a_tokenizers_fingerprint_survives_json_and_tells_ids_apart():
    def fingerprint(spec):
        return dataset.tokenizer_fingerprint(get_tokenizer(spec))

    a, b = ({"name": "bpe:259", "merges": [list(m) for m in merges], "special": [EOT]}
            for merges in (("ab", "cd"), ("cd", "ab")))
    assert fingerprint(a) == fingerprint(json.loads(json.dumps(a)))
    assert len({fingerprint(spec) for spec in (a, b, "byte")}) == 3


# -- dataset.py: from text to shards

def prepare(folder, *args, **options):
    """dataset.prepare into folder/d without a validation split, unless one is asked for.  -> the folder"""
    return dataset.prepare(*args, out=str(folder / "d"), **{"splits": "100/0", **options})


def slow_tokens(enc, documents):
    return [t for d in documents for t in [enc.eot_token, *enc.encode_ordinary(d)]]


def byte_tokens(documents):
    return slow_tokens(get_tokenizer("byte"), documents)


def read_split(folder, split):
    names = sorted(n for n in os.listdir(folder) if n.startswith(split))
    return [t for n in names for t in dataset.read_shard(os.path.join(folder, n)).tolist()]


def as_documents(tokens):
    """Tokens of the byte tokenizer -> documents"""
    return bytes(t if t < 256 else 0 for t in tokens).decode().split("\0")[1:]


def write_text(path, documents):
    path.write_text(f"\n{EOT}\n".join(documents), encoding="utf-8")
    return str(path)


@needs_gpt2
@needs_test_data
def test_gpt2_tokens_of_real_text_equal_tiktokens_own(tmp_path):
    folder = prepare(tmp_path, WIKITEXT, doc_sep="")
    with open(WIKITEXT, encoding="utf-8") as f:
        documents = [d.strip("\n") for d in re.split(r"(?:^|\n)(?:[ \t\r]*\n)+", f.read())]
    assert read_split(folder, "train") == slow_tokens(gpt2_tokenizer(), [d for d in documents if d.strip()])


@needs_gpt2
def test_a_text_in_one_piece_has_tiktokens_own_tokens_although_it_is_cut(tmp_path, monkeypatch):
    monkeypatch.setattr(dataset, "BATCH_CHARS", 1)  # every piece is encoded on its own
    text = "\n".join(stories(300)) + "".join(random.Random(0).choices(" \nab1'.é", k=5000))
    text = text.strip("\n")
    (tmp_path / "t.txt").write_text(text, encoding="utf-8")
    assert read_split(prepare(tmp_path, str(tmp_path / "t.txt")), "train") == slow_tokens(gpt2_tokenizer(), [text])


@pytest.mark.parametrize("raw, options, documents", [
    (b"a b\n\nc\n\n\n\nd\n", dict(doc_sep=""), ["a b", "c", "d"]),
    (b"\xef\xbb\xbfa b\r\n\r\nc\r\n\r\n\r\nd", dict(doc_sep=""), ["a b", "c", "d"]),
    (b"\n\na b\n \t \nc\n\nd\n\n\n", dict(doc_sep=""), ["a b", "c", "d"]),
    (b"\none\n\ntwo\n\n", {}, ["one\n\ntwo"]),
    (b"one\n\ntwo\n<|endoftext|>\nthree", {}, ["one\n\ntwo", "three"]),
    (b"one\r\n--\r\ntwo", dict(doc_sep="--"), ["one", "two"]),
    (b"a <|endoftext|> b\n\nc", {}, ["a <|endoftext|> b\n\nc"]),
], ids=["blank lines", "windows", "spaces on blank lines", "one", "end-of-text", "dashes", "end-of-text in a line"])
def test_documents_are_found_in_a_text(tmp_path, raw, options, documents):
    (tmp_path / "t.txt").write_bytes(raw)
    folder = prepare(tmp_path, str(tmp_path / "t.txt"), "byte", **options)
    assert read_split(folder, "train") == byte_tokens(documents)


def test_a_shard_is_256_integers_and_uint16_tokens(tmp_path):
    dataset.write_shard(str(tmp_path / "s.bin"), [1, 2, 65535])
    raw = (tmp_path / "s.bin").read_bytes()
    assert struct.unpack("<256i", raw[:1024]) == (20240520, 1, 3) + (0,) * 253
    assert struct.unpack("<3H", raw[1024:]) == (1, 2, 65535)
    assert dataset.read_shard(str(tmp_path / "s.bin")).tolist() == [1, 2, 65535]


@needs_variable("LLMC", "llm.c's sources")
def test_llmc_reads_a_shard_token_for_token(tmp_path):
    with open(os.path.join(os.environ["LLMC"], "train_gpt2.py")) as f:
        source = f.read()
    reader = {"np": np, "print0": print}
    exec(source[source.index("def _peek_data_shard"):source.index("class DistributedDataLoader")], reader)
    tokens = np.random.default_rng(0).integers(0, 50257, 100_000)
    dataset.write_shard(str(tmp_path / "s.bin"), tokens)
    assert reader["_peek_data_shard"](str(tmp_path / "s.bin")) == 100_000
    assert reader["_load_data_shard"](str(tmp_path / "s.bin")).tolist() == tokens.tolist()


def test_a_tenth_of_a_small_texts_documents_is_kept_for_validation(tmp_path):
    folder = prepare(tmp_path, write_text(tmp_path / "t.txt", stories(200)), "byte", splits=None)
    assert read_split(folder, "val") == byte_tokens(stories(200)[::10])
    assert read_split(folder, "train") == byte_tokens([s for i, s in enumerate(stories(200)) if i % 10])


def test_small_shares_of_a_single_document_are_kept_whatever_its_alphabet(tmp_path):
    path = write_text(tmp_path / "t.txt", ["日本語の 文 " * 3000])
    folder = prepare(tmp_path, path, "byte", splits="98/1/1")
    n = {split: len(read_split(folder, split)) for split in ("train", "val", "test")}
    assert 0.005 < n["val"] / n["train"] < 0.02 and 0.005 < n["test"] / n["train"] < 0.02


def test_a_folder_that_was_there_stays_although_its_source_cannot_be_read(tmp_path):
    (tmp_path / "t.txt").write_bytes(b"\xff\xfe")
    for name, is_there in (("old", True), ("new", False)):
        if is_there:
            (tmp_path / name).mkdir()
        with pytest.raises(UserError, match="not UTF-8"):
            dataset.prepare(str(tmp_path / "t.txt"), "byte", out=str(tmp_path / name))
        assert (tmp_path / name).exists() == is_there


@pytest.mark.parametrize("letters", ["", "äöü", "日本語" * 9])
def test_of_a_single_document_the_end_is_held_out(tmp_path, letters):
    text = "\n\n".join(story + letters for story in stories(100))
    folder = prepare(tmp_path, write_text(tmp_path / "t.txt", [text]), "byte", splits="85/10/5")
    [train], [test], [val] = (as_documents(read_split(folder, split)) for split in ("train", "test", "val"))
    assert train + test + val == text
    assert abs(len(val) / len(text) - 0.1) < 0.015 and abs(len(test) / len(text) - 0.05) < 0.015


def test_of_a_single_document_the_end_is_held_out_although_a_larger_size_is_allowed(tmp_path):
    text = "\n\n".join(stories(100))
    path = write_text(tmp_path / "t.txt", [text])
    folder = prepare(tmp_path, path, "byte", splits="90/10", max_bytes=len(text.encode()))
    [train], [val] = (as_documents(read_split(folder, split)) for split in ("train", "val"))
    assert train + val == text


def test_of_the_beginning_of_a_single_document_pieces_are_held_out(tmp_path):
    text = "\n".join(stories(100))
    path = write_text(tmp_path / "t.txt", [text])
    folder = prepare(tmp_path, path, "byte", splits="90/10", max_bytes=len(text.encode()) // 2)
    n_val, n_train = (len(read_split(folder, split)) for split in ("val", "train"))
    assert 0.05 < n_val / (n_val + n_train) < 0.15 and n_val + n_train < 0.55 * len(text)


def test_long_documents_are_divided_between_train_and_val(tmp_path):
    texts = ["\n".join(stories(100)), "\n".join(stories(200)[100:])]
    folder = prepare(tmp_path, write_text(tmp_path / "t.txt", texts), "byte", splits=None)
    pieces = {split: as_documents(read_split(folder, split)) for split in ("train", "val")}
    n_val, n_train = (sum(map(len, pieces[split])) for split in ("val", "train"))
    assert n_val + n_train == sum(map(len, texts)) and 0.05 < n_val / (n_val + n_train) < 0.15
    # pieces that are not neighbours are not joined
    assert all(p in texts[0] or p in texts[1] for p in pieces["train"] + pieces["val"])


def test_the_manifest_counts_tokens_bytes_and_documents(tmp_path):
    texts = [story + " äö" for story in stories(60)]
    folder = prepare(tmp_path, write_text(tmp_path / "t.txt", texts), "bpe:300", shard_tokens=3000, splits="90/10")
    manifest = json.load(open(tmp_path / "d/meta.json"))
    shards = manifest["shards"]
    assert sum(s["documents"] for s in shards) == 60 and len(shards) > 4
    assert sum(s["bytes"] for s in shards) == sum(len(text.encode()) for text in texts)
    assert all(len(dataset.read_shard(f"{folder}/{s['file']}")) == s["tokens"] <= 3000 for s in shards)
    enc = get_tokenizer(folder)
    assert manifest["tokenizer_fingerprint"] == dataset.tokenizer_fingerprint(enc) and enc.n_vocab == 300


def write_tables(tmp_path, texts):
    import pyarrow
    import pyarrow.parquet
    lines = [json.dumps({"n": i, "text": text}) + "\n" for i, text in enumerate(texts)]
    (tmp_path / "t.jsonl").write_text("".join(lines), encoding="utf-8")
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "t.parquet", row_group_size=100)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_rows_of_tables_are_documents(tmp_path, kind):
    texts = stories(700) + ["", "one <|endoftext|> two", "half a pair: \ud83d"[:-1]]
    write_tables(tmp_path, texts)
    folder = prepare(tmp_path, str(tmp_path / f"t.{kind}"), "byte")
    assert read_split(folder, "train") == byte_tokens([t for t in texts if t])


@pytest.mark.parametrize("kind", ["txt", "long", "jsonl", "parquet"])
def test_a_source_continues_from_any_state(tmp_path, kind, monkeypatch):
    monkeypatch.setattr(dataset, "BATCH_CHARS", 10_000)
    write_tables(tmp_path, stories(900))
    write_text(tmp_path / "t.txt", stories(900))
    write_text(tmp_path / "t.long", ["\n".join(stories(500)), " é".join(stories(400))])
    source, = dataset.open_sources(str(tmp_path / f"t.{kind}"))
    batches = [(pieces, json.loads(json.dumps(state))) for pieces, state in source.read(None)]
    assert len(batches) > 3
    for i, (_, state) in enumerate(batches):
        rest = [piece for pieces, _ in source.read(state) for piece in pieces]
        assert rest == [piece for pieces, _ in batches[i + 1:] for piece in pieces]


def test_workers_parts_are_read_from_any_state(tmp_path, monkeypatch):
    monkeypatch.setattr(dataset, "BATCH_CHARS", 100)
    rng = np.random.default_rng(0)
    tokens = np.where(rng.random(1000) < 0.01, 999, rng.integers(0, 256, 1000))
    tokens[[0, 250, 251, 600]] = 999  # documents end with a shard, are empty, go over several blocks and shards
    paths = [str(tmp_path / f"{i}.bin") for i in range(3)]
    for path, part in zip(paths, np.split(tokens, [250, 620])):
        dataset.write_shard(path, part)
    batches = list(dataset.read_parts(paths, 999, None))
    documents = [piece for pieces, _ in batches for piece, _ in pieces]
    assert np.concatenate(documents).tolist() == tokens.tolist() and len(batches) > 5
    assert all(d[0] == 999 and 999 not in d[1:] for d in documents)
    n = 0
    for pieces, state in batches:
        n += len(pieces)
        rest = [piece.tolist() for pieces, _ in dataset.read_parts(paths, 999, state) for piece, _ in pieces]
        assert rest == [d.tolist() for d in documents[n:]]


def digest(folder):
    names = sorted(n for n in os.listdir(folder) if n != ".lock" and not n.startswith("worker_"))
    return {n: hashlib.sha256(open(os.path.join(folder, n), "rb").read()).hexdigest() for n in names}


@pytest.mark.parametrize("source, splits", [
    ("t.txt", "95/3/2"), ("a.txt,b.txt", "90/10"), ("t.jsonl", "99/1"), ("workers*.jsonl", "98/2")])
def test_a_preparation_killed_again_and_again_ends_in_the_same_bytes(tmp_path, source, splits):
    write_tables(tmp_path, stories(2000) * 3)
    for name, n in (("t", 3), ("a", 2), ("b", 1)):
        write_text(tmp_path / f"{name}.txt", stories(2000) * n)
    tokenizer = "bpe:400"
    if source.startswith("workers"):
        lines, tokenizer = (tmp_path / "t.jsonl").read_text().splitlines(keepends=True), "byte"
        for i in range(3):
            (tmp_path / f"workers{i}.jsonl").write_text("".join(lines[2000 * i:][:2000]))
    code = f"""
import dataset, sys
dataset.BATCH_CHARS = 20_000
workers = map(dataset.Worker, (0, 1), (2, 2)) if sys.argv[1] == 'cut' and {tokenizer == "byte"} else ()
for worker in [*workers, None]:
    dataset.prepare('{source}', '{tokenizer}', out=sys.argv[1], shard_tokens=70_000, splits='{splits}', worker=worker)
"""

    def start(out):
        env = {**os.environ, "PYTHONPATH": HERE}
        return subprocess.Popen([sys.executable, "-c", code, out], cwd=tmp_path, env=env, stdout=subprocess.DEVNULL)

    assert start("whole").wait() == 0
    rng, killed, expected = random.Random(0), 0, digest(tmp_path / "whole")
    for n_shards in (0, 2, 4, 7, 10):
        p = start("cut")
        while p.poll() is None and len(list((tmp_path / "cut").rglob("*.bin"))) < n_shards:
            time.sleep(0.002)
        time.sleep(rng.random() * 0.05)
        killed += p.poll() is None
        p.kill()
        p.wait()
        for path in (tmp_path / "cut").glob("*.bin"):  # what can be seen is complete
            assert hashlib.sha256(path.read_bytes()).hexdigest() == expected[path.name]
    assert killed >= 4, "the preparation was too fast to be killed"
    assert start("cut").wait() == 0
    assert digest(tmp_path / "cut") == expected


@pytest.mark.parametrize("kind, count", [("jsonl", 3), ("parquet", 16)])
def test_workers_together_write_the_bytes_of_one(tmp_path, monkeypatch, capsys, kind, count):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(dataset, "BATCH_CHARS", 10_000)
    for i, texts in enumerate([stories(700), ["", *stories(50), " word" * 5000], stories(900), stories(3)]):
        write_tables(tmp_path, texts)
        os.rename(f"t.{kind}", f"part{i}.{kind}")
    options = dict(source=f"part*.{kind}", tokenizer="byte", shard_tokens=20_000, splits="95/3/2")
    dataset.prepare(out="one", **options)
    for number in range(count)[::-1]:  # in any order
        if number == 0:
            with pytest.raises(UserError, match="worker_000_of_0.. is missing or unfinished"):
                dataset.prepare(out="many", **options)
        dataset.prepare(out="many", worker=dataset.Worker(number, count), **options)
    with pytest.raises(UserError, match="worker_000_of_0.. was made with shard_tokens=20000, not 30000"):
        dataset.prepare(out="many", **{**options, "shard_tokens": 30_000})
    dataset.prepare(out="many", **options)
    assert digest("many") == digest("one")


def test_files_and_parts_without_text_are_no_hindrance(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for i, texts in enumerate((stories(30), [], stories(60)[30:])):
        write_tables(tmp_path, texts)
        for kind in ("jsonl", "parquet"):
            os.rename(f"t.{kind}", f"f{i}.{kind}")
    options = dict(source="f*.jsonl", tokenizer="byte")
    for number in range(3):
        dataset.prepare(out="many", worker=dataset.Worker(number, 3), **options)
    dataset.prepare(out="many", **options)
    dataset.prepare(out="one", **options)
    dataset.prepare("f*.parquet", "byte", out="tables")
    assert digest("many") == digest("one")
    assert all(np.array_equal(read_split("one", split), read_split("tables", split)) for split in ("train", "val"))
    with pytest.raises(UserError, match="f1.parquet holds no text"):
        dataset.prepare("f1.parquet", "byte", out="none")


def test_links_in_a_folder_lead_nothing_to_be_written_or_removed_elsewhere(tmp_path, workspace):
    (tmp_path / "victim").mkdir()
    victim = tmp_path / "victim/work.tmp"
    victim.write_text("untouched")
    (tmp_path / "d").mkdir()
    for name in ("meta.json", "progress.npz", "train_000000.bin"):
        os.symlink(victim, tmp_path / f"d/{name}.tmp")
    for _ in range(3):  # each is found, and removed
        with pytest.raises(UserError, match="cannot write .*: Too many levels of symbolic links"):
            dataset.prepare(str(workspace / "t.txt"), "byte", out=str(tmp_path / "d"))
    dataset.prepare(str(workspace / "t.txt"), "byte", out=str(tmp_path / "d"))
    for name, target in (("log.txt", victim), ("checkpoints", victim.parent)):
        (tmp_path / f"of {name}").mkdir()
        os.symlink(target, tmp_path / f"of {name}" / name)
        r = script(here("train.py"), *FAST, f"--out_dir={tmp_path}/of {name}", cwd=workspace)
        assert r.returncode == 1 and re.search(f"{name} is a link.* choose another --out_dir$", r.stderr)
    assert victim.read_text() == "untouched" and os.listdir(tmp_path / "victim") == ["work.tmp"]
    os.rename(victim, tmp_path / "victim/.DS_Store")  # no reason to refuse a link to another disk
    run_ok(here("train.py"), *FAST, f"--out_dir={tmp_path}/of checkpoints", "--max_steps=2", cwd=workspace)


@pytest.mark.parametrize("spec", [
    {"name": "bpe:300", "merges": [["a", "b" * 2**24]]}, {"name": "bpe:300", "merges": [["a"], ["b", 1]]},
    {"name": "byte", "special": [EOT, EOT]}, {"name": "byte", "more": 1}, {"name": "bpe:" + "9" * 5000, "merges": []}],
    ids=lambda spec: str(spec)[:40])
def test_a_strangers_tokenizer_is_checked(spec):
    with pytest.raises((ValueError, TypeError)):
        dataset.check_spec(spec)


@pytest.mark.parametrize("position, token", [
    ((0, -1, 0, 0), 1), ((0, "x", 0, 0), 1), ((0, 2**70, 0, 0), 1), ((-5, None, 0, 0), 1), ((0, 3, 0, 0), 400)])
def test_a_strangers_progress_is_checked(tmp_path, position, token):
    state = dict(settings={}, tokenizer={"name": "byte"}, shards=[], position=position)
    dataset.save_progress(str(tmp_path), state, {"train": np.full(3, token, dtype=np.uint16)})
    with pytest.raises(UserError, match="is not a progress file, or is damaged"):
        dataset.load_progress(str(tmp_path), {})


def test_a_key_that_a_server_repeats_is_neither_printed_nor_stored(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OPENAI_API_KEY", key := "sk-secret-0123456789")

    def answer(prompt, n):
        if prompt == "bad":
            return 400, {}, f'{{"error": {{"message": "Bearer {key} is not enough"}}}}'.encode()
        status, headers, body = completion(prompt)
        return status, headers, body.replace(b"ECHO", key.encode())

    with serving(answer=answer) as (url, _), pytest.raises(UserError) as e:
        synthesize(tmp_path, url, ["echo", "bad"])
    printed = capsys.readouterr()
    written = (tmp_path / "out.jsonl").read_text()
    monkeypatch.setenv("OPENAI_API_KEY", "EMPTY")  # as for a local server
    with serving(answer=lambda prompt, n: completion("An empty set")) as (url, _):
        synthesize(tmp_path, url, ["echo", "what"])
    assert "AN EMPTY SET" in (tmp_path / "out.jsonl").read_text()
    assert "***" in written and "secret" not in written + str(e.value) + printed.out + printed.err


def test_progress_that_is_compressed_is_refused(tmp_path):
    np.savez_compressed(tmp_path / "progress.npz", state=np.zeros(9, dtype=np.uint8))
    with pytest.raises(UserError, match="is not a progress file, or is damaged .ValueError."):
        dataset.load_progress(str(tmp_path), {})


@pytest.mark.parametrize("change", ["a new file", "another text"])
def test_workers_parts_of_files_that_have_changed_since_are_refused(tmp_path, monkeypatch, change):
    monkeypatch.chdir(tmp_path)
    for i in range(4):
        write_lines(tmp_path / f"f{i}.jsonl", [dict(text=f"file {i}, line {n}") for n in range(20)])
    options = dict(source="f*.jsonl", tokenizer="byte", out="d")
    dataset.prepare(worker=dataset.Worker(0, 2), **options)
    write_lines(tmp_path / ("f4.jsonl" if change == "a new file" else "f0.jsonl"), [dict(text="new")] * 20)
    dataset.prepare(worker=dataset.Worker(1, 2), **options)
    with pytest.raises(UserError, match="worker_00._of_002 was made from another version of f"):
        dataset.prepare(**options)


@pytest.mark.parametrize("first", ["plain", "workers"])
def test_an_unfinished_folder_does_not_mix_a_source_with_its_workers_parts(tmp_path, monkeypatch, first):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(dataset, "BATCH_CHARS", 2000)
    for i in range(2):
        write_tables(tmp_path, stories(400)[200 * i:][:200])
        os.rename("t.jsonl", f"part{i}.jsonl")
    options = dict(source="part*.jsonl", tokenizer="byte", shard_tokens=10_000, splits="90/10", out="d")
    saved, save = [], dataset.save_progress

    def killed(*args):
        save(*args)
        saved.append(args)
        if len(saved) == 3:
            raise KeyboardInterrupt

    def prepare_parts():
        for number in range(2):
            dataset.prepare(worker=dataset.Worker(number, 2), **options)

    if first == "workers":
        prepare_parts()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(dataset, "save_progress", killed)
        dataset.prepare(**options)
    if first == "plain":
        prepare_parts()
    else:
        [shutil.rmtree(path) for path in (tmp_path / "d").glob("worker_*")]
    with pytest.raises(UserError, match="d was made with from_workers=.*; remove it"):
        dataset.prepare(**options)


def test_rows_without_text_at_the_end_of_a_table_are_nothing(tmp_path):
    write_tables(tmp_path, ["a b c"] * 256 + [""] * 10)
    enc = get_tokenizer("byte")
    assert len(eval_script.read_tokens(str(tmp_path / "t.parquet"), enc, "train")) == 6 * 256
    write_tables(tmp_path, [""] * 10)
    with pytest.raises(UserError, match="t.parquet holds no text"):
        dataset.prepare(str(tmp_path / "t.parquet"), "byte", out=str(tmp_path / "none"))
    assert not (tmp_path / "none").exists()


def test_sources_are_read_one_after_the_other_and_each_is_divided(tmp_path):
    paths = [write_text(tmp_path / f"{name}.txt", [f"{name}{i}" for i in range(120)]) for name in "ab"]
    folder = prepare(tmp_path, ",".join(paths), "byte", splits="98/1/1")
    splits = {name: as_documents(read_split(folder, name)) for name in ("train", "val", "test")}
    assert splits["val"] == ["a0", "a100", "b0", "b100"] and splits["test"] == ["a10", "a110", "b10", "b110"]
    held_out = splits["val"] + splits["test"]
    assert splits["train"] == [d for name in "ab" for i in range(120) if (d := f"{name}{i}") not in held_out]


def test_a_text_budget_ends_with_the_document_that_reaches_it(tmp_path):
    total, n = 0, 0
    while total < 20_000:
        total, n = total + len(stories(200)[n].encode()), n + 1
    folder = prepare(tmp_path, write_text(tmp_path / "t.txt", stories(200)), "byte", max_bytes=20_000)
    assert read_split(folder, "train") == byte_tokens(stories(n))


def test_a_budget_that_ends_in_the_middle_of_a_table_ends_well(tmp_path):
    write_tables(tmp_path, stories(2000) * 3)
    for i in range(3):
        # In a Python that exits as usual: that could abort.
        options = ["--source=t.parquet", "--tokenizer=byte", "--max_bytes=3e5", f"--out=d{i}"]
        subprocess.run([sys.executable, here("dataset.py"), *options], cwd=tmp_path, check=True)


@pytest.mark.parametrize("shares", [(90, 10, 0), (98, 1, 1), (50, 25, 25), (100, 0, 0)], ids=str)
def test_a_hundred_documents_in_a_row_have_the_shares_asked_for(shares):
    for start in (0, 100, 4200):
        found = Counter(dataset.split_of(i, shares) for i in range(start, start + 100))
        assert tuple(found[split] for split in ("train", "val", "test")) == shares


EXAMPLE = {"ctx": "A cat", "label": "1", "endings": ["sat", "is", "ran", "x"]}


def hub_card(*configs):
    entries = [f"- config_name: {config}\n  data_files:\n  - split: {split}\n    path: {path}\n"
               for config, split, path in configs]
    return "---\nconfigs:\n" + "".join(entries) + "---\n"


# Where the files of a dataset lie on the hub, and what its card says of them
SAMPLE_10BT = ("sample/10BT/000_00000.parquet", hub_card(("sample-10BT", "train", "sample/10BT/*")))
HUB = {
    "HuggingFaceFW/fineweb-edu": SAMPLE_10BT, "HuggingFaceFW/fineweb": SAMPLE_10BT,
    "roneneldan/TinyStories": ("data/train-00000-of-00001.parquet", None),
    "wikimedia/wikisource": (
        "20231201.en/train-00000-of-00001.parquet", hub_card(("20231201.en", "train", "20231201.en/train-*"))),
    "togethercomputer/RedPajama-Data-1T-Sample": ("RedPajama-Data-1T-Sample.py", None),
    "togethercomputer/RedPajama-Data-1T-Sample@parquet": ("default/train/0000.parquet", None)}
# What the tasks' datasets have: configuration, split, a record, and the context, endings and label that it stands for
ARC = {"id": "1", "question": "Who sat?", "choices": {"text": ["a dog", "cat", "a hen"], "label": ["A", "B", "C"]}}
ARC_TEXT = "Question: Who sat?\nAnswer:", ["a dog", "cat", "a hen"]
TASK_DATA = {
    "arc_easy": ("allenai/ai2_arc", "ARC-Easy", "test", {**ARC, "answerKey": "B"}, (*ARC_TEXT, 1)),
    "arc_challenge": ("allenai/ai2_arc", "ARC-Challenge", "test", {**ARC, "answerKey": "C"}, (*ARC_TEXT, 2)),
    "piqa": ("baber/piqa", "default", "validation", {"goal": "To sit,", "sol1": "stand.", "sol2": "sit.", "label": 1},
             ("Question: To sit,\nAnswer:", ["stand.", "sit."], 1)),
    "lambada": ("EleutherAI/lambada_openai", "default", "test", {"text": "the cat sat on the  mat."},
                ("the cat sat on the ", ["mat."], 0))}
MAIN, PARQUET = "0" * 40, "1" * 40  # commits of the branches main and refs/convert/parquet


class Hub(http.server.BaseHTTPRequestHandler):
    """
    Answers as the Hugging Face hub does, with the files below server.root, except where server.fault says: what goes
    wrong, for which requests, how many times. OWNER/NAME-copyN is OWNER/NAME under another name.
    """
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
        address = urllib.parse.urlsplit(self.path)
        path, server = urllib.parse.unquote(address.path), self.server
        if path.startswith("/fault/"):
            what, where, times = path.split("/")[2:]
            server.fault = dict(what=what, where=where, left=int(times))
            return self.reply({})
        if path == "/api/agent-harnesses":  # statistics of the library's makers
            return self.reply({})
        where = "api" if path.startswith("/api/") else "card" if path.endswith("README.md") else "data"
        fault = server.fault
        if fault["where"] == where and fault["left"] and (self.command, fault["what"]) != ("HEAD", "half"):
            fault["left"] -= 1
            return self.fail(fault["what"])
        match = re.fullmatch(
            "(?:/api)?/(?:(datasets|models)/)?([^/]+/[^/]+?)(?:-copy[0-9]+)?(?:/(revision|tree|paths-info|resolve)/"
            "(main|refs/convert/parquet|[01]{40})(?:/(.*))?)?", path)
        kind, name, action, revision, file = match.groups()
        is_parquet = revision in ("refs/convert/parquet", PARQUET)
        folder = server.root / (kind or "models") / (name + "@parquet" * is_parquet)
        file, commit = folder / (file or ""), PARQUET if is_parquet else MAIN
        if not folder.is_dir():
            return self.missing("RepoNotFound")
        if action == "resolve":
            return self.send_file(file, commit) if file.is_file() else self.missing("EntryNotFound")
        if action == "paths-info":
            paths = json.loads(body)["paths"] if body[0] == "{" else urllib.parse.parse_qs(body)["paths"]
            return self.reply([self.entry(folder, folder / path) for path in paths if (folder / path).exists()])
        if action == "tree":
            found = file.glob("**/*" if "recursive=true" in address.query.lower() else "*")
            return self.reply([self.entry(folder, path) for path in sorted(found)])
        files = [dict(rfilename=str(path.relative_to(folder))) for path in folder.rglob("*") if path.is_file()]
        self.reply(dict(id=name, sha=commit, siblings=files, private=False, gated=False, tags=[]))

    do_HEAD = do_POST = do_GET

    def entry(self, folder, path):
        kind = "directory" if path.is_dir() else "file"
        return dict(type=kind, path=str(path.relative_to(folder)), oid=MAIN, size=path.stat().st_size)

    def send_file(self, path, commit):
        data, n = path.read_bytes(), path.stat().st_size
        headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        part = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not part:
            return self.reply(data, 200, headers)
        begin, end = int(part[1]), min(n, int(part[2] or n) + 1)
        self.reply(data[begin:end], 206, {**headers, "Content-Range": f"bytes {begin}-{end - 1}/{n}"})

    def missing(self, code):
        self.reply({"error": code}, 404, {"X-Error-Code": code})

    def reply(self, body, status=200, headers={}, sent=None):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:sent])

    def fail(self, what):
        if what.isdigit():
            return self.reply({"error": "?"}, int(what), {"Retry-After": "1"} if what == "429" else {})
        if what == "html":
            return self.reply(b"<html>log in</html>", 200, {"Content-Type": "text/html"})
        if what == "hang":
            time.sleep(5)
        if what == "half":
            headers = {"X-Repo-Commit": MAIN, "ETag": '"0"', "Content-Range": "bytes 0-999/2000"}
            self.reply(b"x" * 1000, 206 if "Range" in self.headers else 200, headers, sent=500)
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, *args):
        pass


@pytest.fixture(scope="session")
def hub(tmp_path_factory):
    """The hub's named datasets, a few stories each, and a GPT-2.  -> the environment in which libraries use it"""
    import pyarrow
    import pyarrow.parquet
    root = tmp_path_factory.mktemp("hub")
    for name, (path, card) in HUB.items():
        file = root / "datasets" / name / path
        file.parent.mkdir(parents=True)
        pyarrow.parquet.write_table(pyarrow.table({"id": list(range(120)), "text": stories(120)}), file,
                                    row_group_size=50)
        if card:
            (root / "datasets" / name / "README.md").write_text(card)
    for name in ("openai-community/gpt2", "some/gpt2", "some/german"):
        GPT(small(vocab_size=50257)).save_pretrained(str(root / "models" / name))
    (root / "models/some/german/vocab.json").write_text(json.dumps({"\u0120der": 262}))
    (root / "datasets/Rowan/hellaswag").mkdir(parents=True)
    (root / "datasets/Rowan/hellaswag/validation.jsonl").write_text(json.dumps(EXAMPLE) + "\n")
    cards = defaultdict(list)
    for name, config, split, record, _ in TASK_DATA.values():
        path = f"{config}/{split}-00000-of-00001.parquet"
        (root / "datasets" / name / config).mkdir(parents=True)
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([record] * 3), root / "datasets" / name / path)
        cards[name].append((config, split, path))
    for name, configs in cards.items():
        (root / "datasets" / name / "README.md").write_text(hub_card(*configs))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.root, server.fault = root, dict(what="", where="", left=0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    home = str(tmp_path_factory.mktemp("home"))
    return dict(HF_ENDPOINT=f"http://127.0.0.1:{server.server_port}", HOME=home, HF_HOME=home, HF_HUB_OFFLINE="0",
                HF_HUB_DOWNLOAD_TIMEOUT="1", HF_HUB_ETAG_TIMEOUT="1")


def fail_hub(hub, what, where, times):
    requests.get(f"{hub['HF_ENDPOINT']}/fault/{what}/{where}/{times}")


NAMED_SOURCES = ("fineweb-edu", "fineweb", "custom-gpt", "tinystories", "wikisource", "redpajama-sample", "toygpt")
STORIES = "hf:HuggingFaceFW/fineweb-edu-copy{}:sample-10BT"
PASSING = [(what, where, 2) for what in ("drop", "429", "500") for where in ("api", "card", "data")] + [
    ("half", "data", 2), ("hang", "data", 2), ("hang", "api", 1)]
LASTING = {("drop", "api"): "cannot read .* check the network", ("500", "data"): "check the network",
           ("429", "api"): "429", ("401", "api"): "401",
           ("html", "data"): "not a parquet file", ("html", "api"): "JSON",
           ("half", "data"): "check the network", ("drop", "card"): "check the network",
           ("500", "card"): "check the network"}
HUB_DRIVER = """
import json, os, sys, time, requests, dataset
time.sleep = lambda seconds: None
for source, tokenizer, out, fault in json.loads(sys.argv[1]):
    requests.get(f"{os.environ['HF_ENDPOINT']}/fault/{fault}")
    print("source", source)
    try:
        dataset.prepare(source, tokenizer, out=out, shard_tokens=10_000)
    except dataset.UserError as e:
        print("error", e)
"""


@pytest.fixture(scope="session")
def from_hub(hub, tmp_path_factory):
    """Every named source, and one dataset with every fault.  -> the folder, {source or fault: what was printed}"""
    folder, jobs, none = tmp_path_factory.mktemp("from_hub"), {}, "none/none/0"
    for name in NAMED_SOURCES:
        jobs[name] = (name, None if name == "custom-gpt" else "byte", name, none)
    for what, where, times in [*PASSING, *((*fault, 10**6) for fault in LASTING)]:
        out = f"{what}-{where}-{times}"
        jobs[what, where, times] = (STORIES.format(len(jobs)), "byte", out, f"{what}/{where}/{times}")
    jobs["no config"] = ("hf:HuggingFaceFW/fineweb:nope", "byte", "no config", none)
    jobs["no such"] = ("hf:no/such", "byte", "no such", none)
    command = [sys.executable, "-c", HUB_DRIVER, json.dumps(list(jobs.values()))]
    env = {**os.environ, "PYTHONPATH": HERE, "TQDM_DISABLE": "1", **hub}
    r = subprocess.run(command, cwd=folder, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert r.returncode == 0, r.stdout[-3000:]
    fail_hub(hub, "none", "none", 0)
    return folder, dict(zip(jobs, re.split(r"^source .*\n", r.stdout, flags=re.MULTILINE)[1:]))


def hub_documents(folder):
    tokens = [t for split in ("train", "val", "test") for t in read_split(folder, split)]
    return sorted(get_tokenizer(str(folder)).decode(tokens).split(EOT)[1:])


@pytest.mark.parametrize("name", NAMED_SOURCES)
def test_a_named_source_is_read_from_the_hub(from_hub, name):
    folder, printed = from_hub
    assert hub_documents(folder / name) == sorted(stories(120) * (2 if name == "toygpt" else 1))
    assert "reading " in printed[name] and " from the Hugging Face hub" in printed[name]


def test_toygpts_two_sources_are_divided_98_1_1(from_hub):
    manifest = json.load(open(from_hub[0] / "toygpt/meta.json"))
    counts = Counter()
    for shard in manifest["shards"]:
        counts[shard["split"]] += shard["documents"]
    assert counts == {"train": 232, "val": 4, "test": 4}


def test_custom_gpts_tokenizer_has_its_special_tokens(from_hub):
    enc = get_tokenizer(str(from_hub[0] / "custom-gpt"))
    assert enc.special_tokens_set == {"<|endoftext|>", "<|pad|>", "<|user|>", "<|assistant|>"}


@pytest.mark.parametrize("what, where, times", PASSING)
def test_a_fault_of_the_hub_that_passes_costs_no_document(from_hub, what, where, times):
    folder, printed = from_hub
    text = printed[what, where, times]
    assert hub_documents(folder / f"{what}-{where}-{times}") == sorted(stories(120)), text
    assert "trying again in" in text or re.search("retry", text, re.IGNORECASE), text


@pytest.mark.parametrize("what, where", LASTING)
def test_a_fault_of_the_hub_that_stays_is_one_line_and_leaves_nothing(from_hub, what, where):
    folder, printed = from_hub
    [error] = [line for line in printed[what, where, 10**6].splitlines() if line.startswith("error")]
    assert re.search(LASTING[what, where], error) and printed[what, where, 10**6].endswith(f"{error}\n")
    assert not (folder / f"{what}-{where}-{10**6}").exists()


def test_what_the_hub_does_not_have_is_said_and_leaves_nothing(from_hub):
    folder, printed = from_hub
    assert "'nope' not found. Available: ['sample-10BT']" in printed["no config"]
    assert "is not on the Hugging Face hub, or needs a login" in printed["no such"]
    assert not (folder / "no config").exists() and not (folder / "no such").exists()


def test_a_preparation_from_the_hub_that_is_killed_continues(hub, tmp_path):
    options = ["--source=toygpt", "--tokenizer=byte", "--shard_tokens=5000"]
    code = "import dataset, sys; dataset.start_script(); dataset.main()"
    env = {**os.environ, "PYTHONPATH": HERE, **hub}

    def prepare(out):
        return subprocess.Popen([sys.executable, "-c", code, *options, f"--out={out}"], cwd=tmp_path, env=env,
                                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    assert prepare("whole").wait(60) == 0
    expected = digest(tmp_path / "whole")
    p = prepare("cut")
    while p.poll() is None and not list((tmp_path / "cut").glob("*.bin")):
        time.sleep(0.001)
    p.kill()
    p.wait()
    assert not (tmp_path / "cut/meta.json").exists(), "it was too fast to be killed"
    assert prepare("cut").wait(60) == 0 and digest(tmp_path / "cut") == expected


def test_workers_divide_a_source_of_the_hub_by_row_groups(hub, tmp_path):
    for out, option in [("one", ()), *(("many", [f"--worker={i}/3"]) for i in range(3)), ("many", ())]:
        run_ok(here("dataset.py"), "--source=fineweb", "--tokenizer=byte", f"--out={out}", *option, cwd=tmp_path, **hub)
    assert digest(tmp_path / "many") == digest(tmp_path / "one")


@needs_gpt2
@pytest.mark.parametrize("name", ["gpt2", "some/gpt2"])
def test_models_and_hellaswag_are_downloaded_although_the_hub_fails_at_first(hub, tmp_path, name):
    fail_hub(hub, "drop", "api", 1)
    r = run_ok(here("hellaswag.py"), f"--ckpt={name}", cwd=tmp_path, **hub)
    assert f"HellaSwag of {name}, " in r.stdout and ", 1 examples: acc " in r.stdout
    full = name if "/" in name else f"openai-community/{name}"
    assert f"reading {full} from the Hugging Face hub\n{full}: " in r.stderr and "trying again in 2 s" in r.stderr


def test_a_model_of_the_hub_with_a_vocabulary_of_its_own_is_refused(hub, tmp_path):
    r = script(here("hellaswag.py"), "--ckpt=some/german", cwd=tmp_path, **hub)
    assert r.returncode and "some/german has a vocabulary of its own" in r.stderr


def test_tasks_are_downloaded_and_worded_as_lm_evaluation_harness_does(hub, workspace):
    code = f"""
import json, hellaswag
print(json.dumps([hellaswag.download(task) for task in {list(TASK_DATA)}]))"""
    env = {**os.environ, "PYTHONPATH": HERE, **hub}
    r = subprocess.run([sys.executable, "-c", code], cwd=workspace, env=env, text=True, capture_output=True)
    for examples, (*_, record, (ctx, endings, label)) in zip(json.loads(r.stdout), TASK_DATA.values(), strict=True):
        assert examples == [dict(ctx=ctx, endings=endings, label=label)] * 3
    r = run_ok(here("hellaswag.py"), f"--task={','.join(TASK_DATA)}", "--out_dir=runs/fp32", cwd=workspace, **hub)
    share = r"(0|1)\.0000 \+- 0\.0000"
    titles = [rf"{title} of .*, 3 examples: acc {share}, acc_norm by token {share}, acc_norm by byte {share}\n"
              for title in ("ARC-easy", "ARC-challenge", "PIQA")]
    assert re.fullmatch("".join(titles) + rf"LAMBADA of .*, 3 examples: acc {share}, perplexity \d+\.\d+\n", r.stdout)


@needs_gpt2
def test_a_model_that_the_hub_lacks_is_one_line(hub, tmp_path):
    r = script(here("hellaswag.py"), "--ckpt=no/such", cwd=tmp_path, **hub)
    assert r.returncode == 1 and re.search(r"\nhellaswag.py: cannot read no/such: Repo\w*: .*\n\Z", r.stderr)


@pytest.mark.parametrize("tokens, shares", [(0, "90/10"), (1e4, "90/10"), (1e5, "99/1")], ids=str)
def test_of_a_large_source_one_percent_is_for_validation_and_of_others_ten(tmp_path, monkeypatch, tokens, shares):
    monkeypatch.setitem(dataset.SOURCES, "fake", dict(hub="a/b", tokens=tokens))
    monkeypatch.setattr(dataset, "read_dataset", lambda *args: iter([([("x" * 20, True)] * 6000, None)]))
    folder = prepare(tmp_path, "fake", "byte", splits=None, shard_tokens=1000)
    assert len(read_split(folder, "val")) == 21 * 60 * int(shares.split("/")[1])


def test_a_second_preparation_of_a_folder_waits_for_the_first(tmp_path, capsys):
    path, folder = write_text(tmp_path / "t.txt", stories(30)), tmp_path / "d"
    folder.mkdir()
    second = threading.Thread(target=prepare, args=(tmp_path, path, "byte"), daemon=True)
    with dataset.lock_folder(str(folder)):
        second.start()
        second.join(1)
        assert second.is_alive() and os.listdir(folder) == [".lock"]
        assert "waiting for another process" in capsys.readouterr().out
    second.join(60)
    assert (folder / "meta.json").exists()


def test_a_changed_shard_is_noticed_when_its_data_is_asked_for_again(tmp_path):
    path = write_text(tmp_path / "t.txt", stories(30))
    prepare(tmp_path, path, "byte")
    before = {e.name: e.stat().st_mtime_ns for e in os.scandir(tmp_path / "d") if e.name != ".lock"}
    prepare(tmp_path, path, "byte")
    assert before == {e.name: e.stat().st_mtime_ns for e in os.scandir(tmp_path / "d") if e.name != ".lock"}
    shard = tmp_path / "d/train_000000.bin"
    raw = bytearray(shard.read_bytes())
    raw[-100] ^= 1
    shard.write_bytes(raw)
    with pytest.raises(UserError, match="train_000000.bin has changed"):
        prepare(tmp_path, path, "byte")


def test_a_shard_that_is_gone_when_a_preparation_continues_is_an_error(tmp_path, monkeypatch):
    def stop(self):
        raise KeyboardInterrupt

    path = write_text(tmp_path / "t.txt", stories(30))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(dataset.ShardWriter, "finish", stop)
        prepare(tmp_path, path, "byte", shard_tokens=5000)
    os.remove(tmp_path / "d/train_000000.bin")
    with pytest.raises(UserError, match="cannot read .*train_000000.bin"):
        prepare(tmp_path, path, "byte", shard_tokens=5000)


@pytest.mark.parametrize("argument, expected", [
    ("--out=~/x", "--out=/home/me/x"), ("--prompt=see PATH=~/bin", "--prompt=see PATH=~/bin"), ("~/x", "~/x")])
def test_a_tilde_at_the_beginning_of_a_value_is_the_home_folder(monkeypatch, argument, expected):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", lambda self, arguments: arguments)
    assert dataset.Parser().parse_args([argument]) == [expected]


def test_a_budget_counts_bytes_and_is_kept_when_a_preparation_continues():
    def read(n_done):
        return (([("я" * 10, True)], n) for n in range((n_done or 0) + 1, 20))

    def texts_after(position):
        batches = list(dataset.read_batches([source], position, (100, 0, 0), 100))
        return [text for by_split, _ in batches for text, _ in by_split["train"]], [p for _, p in batches]

    source = dataset.Source("x", "x", read)
    texts, positions = texts_after((0, None, 0, 0))
    assert texts == ["я" * 10] * 5  # 20 bytes each
    assert [len(texts_after(position)[0]) for position in positions] == [4, 3, 2, 1, 0]


def test_the_budget_of_a_named_source_is_its_own(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(dataset, "write_shards", lambda *args, **options: seen.append(args[3]) or [])
    dataset.prepare("custom-gpt", out=str(tmp_path / "a"))
    dataset.prepare("custom-gpt", out=str(tmp_path / "b"), max_bytes=1000)
    assert [settings["max_bytes"] for settings in seen] == [2_500_000_000, 1000]


def test_a_text_divided_in_another_way_is_not_taken_for_the_same(tmp_path):
    path = write_text(tmp_path / "t.txt", stories(30))
    prepare(tmp_path, path, "byte")
    with pytest.raises(UserError, match="was made with doc_sep="):
        prepare(tmp_path, path, "byte", doc_sep="")


def test_a_tokenizer_is_trained_on_all_sources(tmp_path):
    paths = [write_text(tmp_path / f"{text}.txt", [f"{text} " * 100]) for text in ("ab", "zq")]
    dataset.prepare(",".join(paths), "bpe:262", out=str(tmp_path / "d"), splits="100/0")
    merges = dataset.read_manifest(str(tmp_path / "d"))["tokenizer"]["merges"]
    assert ["a", "b"] in merges and ["z", "q"] in merges


def test_only_failures_in_a_row_end_a_download(monkeypatch):
    def read_stream(name, column, options, worker, state):
        yield [str(state)], (state or 0) + 1
        if state != 20:
            raise ConnectionError("gone")

    monkeypatch.setattr(dataset, "read_stream", read_stream)
    monkeypatch.setattr(dataset.time, "sleep", lambda seconds: None)
    batches = list(dataset.read_dataset("x", "text", dict(path="x", name=None), None, None))
    assert len(batches) == 21


def test_a_changed_text_is_not_taken_for_the_old_one(tmp_path):
    prepare(tmp_path, write_text(tmp_path / "t.txt", stories(30)), "byte")
    with pytest.raises(UserError, match="another version"):
        prepare(tmp_path, write_text(tmp_path / "t.txt", stories(31)), "byte")


def test_a_source_with_an_address_is_downloaded_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = "First Citizen:\nSpeak.\n\nAll:\nSpeak, speak.\n" * 50
    with serving({"/plays.txt": text.encode()}) as url:
        row = {**dataset.SOURCES["shakespeare"], "url": f"{url}/plays.txt"}
        monkeypatch.setitem(dataset.SOURCES, "shakespeare", row)
        dataset.prepare("shakespeare", splits="100/0")
    assert read_split("data/shakespeare", "train") == byte_tokens([text.strip()])
    dataset.prepare("shakespeare", splits="100/0")


def test_a_download_that_cannot_be_stored_says_so(tmp_path):
    (tmp_path / "data").touch()
    with serving({"/plays.txt": b"x"}) as url, pytest.raises(UserError, match="cannot write .*plays.txt: "):
        dataset.download(f"{url}/plays.txt", str(tmp_path / "data/plays.txt"))


def test_a_vocabulary_with_a_wrong_checksum_is_a_failed_download(monkeypatch):
    def get_encoding(name):
        raise ValueError("Hash mismatch for data downloaded")

    monkeypatch.setattr(dataset.tiktoken, "get_encoding", get_encoding)
    with pytest.raises(UserError, match="cannot download the gpt2 vocabulary"):
        get_tokenizer("gpt2")


def test_no_more_than_a_few_batches_wait_in_memory(monkeypatch):
    counts, ahead = dict(read=0, encoded=0), []

    def endless():
        for i in range(2000):
            counts["read"] += 1
            ahead.append(counts["read"] - counts["encoded"])
            yield {"train": [("x", True)]}, i

    def slow_encode(enc, pieces):
        time.sleep(0.0002)
        counts["encoded"] += 1
        return np.array([256, 120], dtype=np.uint32)

    monkeypatch.setattr(dataset, "encode_pieces", slow_encode)
    positions = [position for _, position in dataset.encode_batches(endless(), get_tokenizer("byte"))]
    assert positions == list(range(2000)) and max(ahead) < 16 * os.cpu_count()


@pytest.mark.parametrize("is_terminal", [True, False])
def test_progress_is_a_bar_on_a_terminal_and_plain_lines_in_a_file(monkeypatch, capsys, is_terminal):
    now = [0.0]
    monkeypatch.setattr(time, "time", lambda: now[0])
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    monkeypatch.setattr(sys.stderr, "isatty", lambda: is_terminal)
    with dataset.progress_bar(1000, "things", done=400) as bar:
        for i in range(1, 21):
            now[0] = i * 11
            bar.update(11)
    shown = capsys.readouterr().err
    if is_terminal:
        assert shown.count("\r") > 15
    else:
        assert "\r" not in shown and 5 < len(shown.splitlines()) < 10
        assert re.search(r"5\d\d/1.00k \[0\d:\d\d<0\d:\d\d, +1\.0\d* things/s\]", shown)


# -- dataset.py: pairs

def chat(*contents, roles=("user", "assistant") * 3):
    return [dict(role=role, content=content) for role, content in zip(roles, contents)]


PAIR_LINES = {
    "prompt and response": (dict(prompt=" Hi\n", response="Hello."), [("Hi", "Hello.")]),
    "alpaca": (dict(instruction="Add.", input="1 and 2", output="3", text="..."), [("Add.\n\n1 and 2", "3")]),
    "alpaca without an input": (dict(instruction="Sing.", input=None, output="La."), [("Sing.", "La.")]),
    "chat": (dict(messages=chat("Hi", "Hello.")), [("Hi", "Hello.")]),
    "chat with an empty system": (
        dict(messages=chat(" ", "Hi", "Hello.", roles=("system", "user", "assistant"))), [("Hi", "Hello.")]),
    "chat with a system, two turns and an open question": (
        dict(messages=chat("Be kind.", "Hi", "Hello.", "Bye", "See you.", "?",
                           roles=("system", *("user", "assistant") * 3))),
        [("Be kind.\n\nHi", "Hello."), ("Bye", "See you.")]),
}
BAD_LINES = {
    "not JSON": b'{"prompt": "Hi", "resp', "not UTF-8": b'{"prompt": "\xff", "response": "x"}',
    "not a JSON object": b"[1]", "no response": b'{"prompt": "Hi"}', "no prompt": b'{"text": "Hi"}',
    "empty response": b'{"prompt": "Hi", "response": " \\n"}',
    "prompt is not text": b'{"prompt": 3, "response": "x"}', "no output": b'{"instruction": "Hi"}',
    "no content": b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant"}]}',
    "messages do not alternate between user and assistant":
        b'{"messages": [{"role": "user", "content": "a"}, {"role": "tool", "content": "b"}]}',
    "input is not text": b'{"instruction": "a", "input": [1], "output": "b"}',
    "content is not text": b'{"messages": [{"role": "system", "content": ["s"]}]}',
    "messages is not a list of messages": b'{"messages": "a"}',
}
CHAT_TOKENS = {"name": "bpe:260", "merges": [["l", "l"]], "special": [EOT, "<|user|>", "<|assistant|>"]}


def write_lines(path, rows):
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return str(path)


def some_pairs(n, seed=0, mean=60):
    """Pairs of about that many bytes"""
    rng, words = random.Random(seed), " ".join(stories(50)).split()

    def some_text():
        return " ".join(rng.choices(words, k=1 + int(rng.lognormvariate(0, 0.8) * mean / 12)))

    return [dict(prompt=f"{i}: {some_text()}", response=some_text()) for i in range(n)]


def encode_pair(row, enc=get_tokenizer("byte")):
    """-> inputs and targets of one pair on its own"""
    tokens, targets = dataset.encode_chat(enc, dataset.chat_template(enc), [(row["prompt"], row["response"])])
    return tokens, [t if is_target else -1 for t, is_target in zip(tokens[1:], targets[1:])] + [enc.eot_token]


@pytest.mark.parametrize("kind", PAIR_LINES)
def test_a_pair_is_read_whatever_its_format(kind):
    line, turns = PAIR_LINES[kind]
    assert dataset.parse_pair(json.dumps(line).encode())[1] == turns


@pytest.mark.parametrize("kind", PAIR_LINES)
def test_a_file_of_pairs_is_recognised_whatever_its_format(tmp_path, kind):
    assert dataset.holds_pairs(write_lines(tmp_path / "p.jsonl", [PAIR_LINES[kind][0]]))


def test_a_prompt_is_stripped_as_in_training():
    enc, template = get_tokenizer("byte"), dataset.chat_template(get_tokenizer("byte"))
    expected = dataset.encode_chat(enc, template, [("Hi", None)])[0]
    assert dataset.prompt_tokens(enc, template, [(" Hi\n", None)]) == expected


def test_the_key_is_not_replaced_by_a_login_in_netrc(tmp_path, monkeypatch):
    (tmp_path / "netrc").write_text("machine localhost login me password secret\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("OPENAI_API_KEY", "sk-mine")
    request = dataset.open_session(1).prepare_request(requests.Request("POST", "http://localhost/v1"))
    assert request.headers["Authorization"] == "Bearer sk-mine"


@pytest.mark.parametrize("spec, user, assistant", [
    ({"name": "byte"}, b"User:\n", b"\n\nAssistant:\n"), (CHAT_TOKENS, [258], [259])], ids=["plain", "special tokens"])
def test_only_responses_and_their_ends_are_targets_and_special_strings_in_a_text_stay_text(spec, user, assistant):
    enc = get_tokenizer(spec)
    said = ["Hi <|user|>", "<|endoftext|> yes", "Bye <|assistant|>", "no"]
    tokens, targets = dataset.encode_chat(enc, dataset.chat_template(enc), [said[:2], said[2:]])
    a, b, c, d = (enc.encode_ordinary(text) for text in said)
    first, second = [*user, *a, *assistant], [*user, *c, *assistant]
    assert tokens == [enc.eot_token, *first, *b, enc.eot_token, *second, *d]
    assert targets == [False] * (1 + len(first)) + [True] * (len(b) + 1) + [False] * len(second) + [True] * len(d)
    assert max(a + b + c + d) < 257


def test_malformed_lines_are_skipped_and_reported_by_number_and_the_others_kept(tmp_path, capsys):
    rows = some_pairs(30)
    lines = [*rows[:20], *BAD_LINES.values(), b"", *BAD_LINES.values(), *rows[20:]]
    turns = list(dataset.read_pairs(write_lines(tmp_path / "p.jsonl", lines)))
    assert turns == [[(row["prompt"], row["response"])] for row in rows]
    printed = capsys.readouterr().out
    for i, why in enumerate(BAD_LINES, 21):
        assert f"p.jsonl: skipped 2 lines, {why}: {i}, {i + len(BAD_LINES) + 1}\n" in printed
    assert "p.jsonl: 30 pairs (prompt, response)\n" in printed


def test_dataset_py_checks_a_file_of_pairs_and_says_what_training_makes_of_it(tmp_path):
    rows = some_pairs(200)
    write_lines(tmp_path / "p.jsonl", [*rows, b"{"])
    r = run_ok(here("dataset.py"), "--source=p.jsonl", "--tokenizer=byte", cwd=tmp_path)
    pairs = [encode_pair(row) for row in rows]
    total, targets = sum(len(x) for x, _ in pairs), sum(t >= 0 for _, y in pairs for t in y)
    assert "skipped 1 line, not JSON: 201\n" in r.stdout and "180 pairs to train on, 20 held out" in r.stdout
    assert f"{total:,} byte tokens, of which {targets:,} are targets" in r.stdout
    assert f"and {max(len(x) for x, _ in pairs)} at most" in r.stdout and os.listdir(tmp_path) == ["p.jsonl"]


def test_a_named_column_makes_text_of_a_file_of_pairs(tmp_path):
    rows = [dict(prompt="a", response="b", text=f"c{i}") for i in range(20)]
    write_lines(tmp_path / "p.jsonl", rows)
    options = ["--source=p.jsonl", "--tokenizer=byte", "--column=text", "--splits=100/0"]
    run_ok(here("dataset.py"), *options, cwd=tmp_path)
    assert as_documents(read_split(tmp_path / "data/p", "train")) == [row["text"] for row in rows]


# -- dataset.py: responses from a server

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        content = self.server.files.get(self.path)
        self.reply(*((404, {}, b"") if content is None else (200, {}, content)))

    do_HEAD = do_GET

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt = body["messages"][-1]["content"]
        self.server.asked.append((prompt, self.headers["Authorization"], time.monotonic(), body))
        answer = self.server.answer(prompt, len(self.server.asked))
        if answer:  # else hang up
            self.reply(*answer if self.path == "/v1/chat/completions" else (404, {}, b""))

    def reply(self, status, headers, content):
        self.send_response(status)
        for k, v in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(k, v)
        self.end_headers()
        if self.command != "HEAD":
            with contextlib.suppress(OSError):
                self.wfile.write(content)

    def log_message(self, *args):
        pass


@contextlib.contextmanager
def serving(files=None, answer=None):
    """Serves files, or chat completions: answer(prompt, n) to request n is (status, headers, body); None hangs up."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.files, server.answer, server.asked = files or {}, answer, []
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        yield (f"{url}/v1", server.asked) if answer else url
        server.shutdown()


def completion(prompt):
    choice = {"message": {"role": "assistant", "content": f"{prompt.upper()}, \u2603\n"}, "finish_reason": "stop"}
    return 200, {}, json.dumps({"choices": [choice]}).encode()


FAILURES = [
    (500, {}, b"{}"), (429, {"Retry-After": "0"}, b""), (503, {}, b"busy"), None, (200, {}, b"<html>"),
    (200, {}, b'{"choices": []}'), (200, {"Content-Length": "999"}, b'{"choi'),
    (200, {}, b'{"choices": [{"message": {"content": " "}}]}')]


def synthesize(folder, url, prompts, **options):
    (folder / "prompts.txt").write_text("\n".join(map(str, prompts)))
    options = {**dict(model="m", out=str(folder / "out.jsonl")), **options}
    dataset.synthesize(str(folder / "prompts.txt"), url, **options)


def test_a_synthesis_reports_cut_responses_and_the_servers_reasons(tmp_path, capsys):
    def answer(prompt, n):
        if prompt == "long":
            return 400, {}, b'{"error": {"message": "too long for me"}}'
        status, headers, body = completion(prompt)
        return status, headers, body.replace(b'"stop"', b'"length"') if prompt == "a" else body

    with serving(answer=answer) as (url, _), pytest.raises(UserError, match=r"HTTP status 400 \(too long for me\)"):
        synthesize(tmp_path, url, ["a", "b", "long"])
    assert "responses cut off by the server's limit: 1; raise it with --request=" in capsys.readouterr().out


def test_a_synthesis_killed_five_times_ends_with_every_prompt_answered_once(tmp_path):
    rng, prompts, answered = random.Random(0), [f"What is {i}?" for i in range(80)], []
    (tmp_path / "prompts.txt").write_text("\n".join(prompts + ["", prompts[3], f"  {prompts[5]} "]))

    def answer(prompt, n):
        time.sleep(0.02)
        if rng.random() < 0.4:
            return rng.choice(FAILURES)
        answered.append(prompt)
        return completion(prompt)

    out = tmp_path / "s/out.jsonl"
    with serving(answer=answer) as (url, asked):
        code = "import dataset; dataset.MAX_BACKOFF, dataset.TRIES = 0.05, 50; dataset.main()"
        command = [sys.executable, "-c", code, "--source=synth", "--prompts=prompts.txt", f"--endpoint={url}",
                   "--model=m", "--concurrency=4", f"--out={out}"]
        env = {**os.environ, "PYTHONPATH": HERE, "OPENAI_API_KEY": "sk-secret"}
        for goal in (1, 13, 26, 40, 55):
            null = subprocess.DEVNULL
            p = subprocess.Popen(command, cwd=tmp_path, env=env, stdout=null, stderr=null)
            while p.poll() is None and not (out.exists() and out.read_bytes().count(b"\n") >= goal):
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
        assert row["response"] == row["prompt"].upper() + ", \u2603" and row["finish_reason"] == "stop"
        assert (row["model"], row["endpoint"]) == ("m", f"{url}/chat/completions")
    assert len(answered) <= 80 + 5 * 4  # only what was under way at a kill is asked for again
    assert {key for _, key, *_ in asked} == {"Bearer sk-secret"}
    assert "secret" not in r.stdout + r.stderr + out.read_text()
    assert [turns for turns in dataset.read_pairs(str(out))] == [[(r["prompt"], r["response"])] for r in rows]


def test_ctrl_c_ends_a_synthesis_although_the_server_does_not_answer(tmp_path):
    (tmp_path / "prompts.txt").write_text("a\nb")
    with serving(answer=lambda prompt, n: time.sleep(60)) as (url, asked):
        p = start(here("dataset.py"), "--source=synth", "--prompts=prompts.txt", f"--endpoint={url}", "--model=m",
                  cwd=tmp_path, stderr=subprocess.PIPE)
        while len(asked) < 2:
            assert p.poll() is None
            time.sleep(0.02)
        p.send_signal(signal.SIGINT)
        printed = p.communicate(timeout=20)[1]
    assert p.returncode == 130 and printed.endswith("interrupted; the same command continues\n")


def test_a_line_of_a_file_of_prompts_that_holds_only_spaces_is_no_prompt(tmp_path):
    (tmp_path / "p.txt").write_bytes(b"\xef\xbb\xbf\r\nHello\r\n\xc2\xa0\n")
    assert dataset.read_prompts(str(tmp_path / "p.txt")) == ["Hello"]


def test_rows_with_a_prompt_and_a_text_are_text(tmp_path):
    path = write_lines(tmp_path / "t.jsonl", [dict(prompt="Write a story.", text="Once")])
    assert not dataset.holds_pairs(path) and dataset.holds_pairs(write_lines(tmp_path / "p.jsonl", some_pairs(1)))


def test_a_failing_server_is_asked_until_it_answers_and_nothing_twice(tmp_path, monkeypatch):
    monkeypatch.setattr(dataset, "MAX_BACKOFF", 0.01)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    rows = [dict(prompt="a"), dict(instruction="b", input="c"), dict(prompt="a", response="old")]
    prompts = write_lines(tmp_path / "prompts.jsonl", rows + [dict(prompt=f"{i}") for i in range(30)])
    request = '{"temperature": 0.5, "messages": [{"role": "system", "content": "s"}]}'
    tries = Counter()

    def answer(prompt, n):
        tries[prompt] += 1
        if tries[prompt] == 5:
            return completion(prompt)
        return FAILURES[(tries[prompt] + len(prompt) + ord(prompt[0])) % len(FAILURES)]

    with serving(answer=answer) as (url, asked):
        for _ in range(2):
            dataset.synthesize(prompts, url, "m", request, concurrency=5, out=str(tmp_path / "out.jsonl"))
        _, key, _, body = asked[0]
        assert key is None and body["messages"][0] == {"role": "system", "content": "s"}
        assert (body["temperature"], body["model"]) == (0.5, "m")
    assert set(tries.values()) == {5} and len(tries) == 32
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 32


def test_a_retry_after_header_is_obeyed(tmp_path):
    def answer(prompt, n):
        return (429, {"Retry-After": "2"}, b"") if n == 1 else completion(prompt)

    with serving(answer=answer) as (url, asked):
        synthesize(tmp_path, url, range(3), concurrency=1)
    times = [at - asked[0][2] for _, _, at, _ in asked]
    assert len(times) == 4 and asked[1][0] == asked[0][0] and 1.9 < times[1] < 5


@pytest.mark.parametrize("status, key, error", [
    (401, "sk-secret", "rejects the key in OPENAI_API_KEY"), (401, "", "needs a key; set OPENAI_API_KEY"),
    (404, "sk-secret", "has no model m"), (302, "sk-secret", "is not the server's address")])
def test_an_error_that_no_retry_can_help_ends_a_synthesis(tmp_path, monkeypatch, status, key, error):
    monkeypatch.setenv("OPENAI_API_KEY", key)

    def answer(prompt, n):
        return (status, {"Location": "http://127.0.0.1:9/"}, b"sk-secret") if n == 10 else completion(prompt)

    with serving(answer=answer) as (url, asked):
        with pytest.raises(UserError, match=error) as e:
            synthesize(tmp_path, url, range(100), concurrency=3)
    n_written = len((tmp_path / "out.jsonl").read_text().splitlines())
    assert 10 <= len(asked) < 20 and len(asked) - 4 <= n_written < 20 and "secret" not in str(e.value)


@pytest.mark.parametrize("status, error", [(404, "has no model m"), (500, "4 of 7 prompts have no response")])
def test_answers_under_way_are_saved_when_a_synthesis_gives_up(tmp_path, monkeypatch, status, error):
    monkeypatch.setattr(dataset, "TRIES", 1)
    monkeypatch.setattr(dataset, "MAX_FAILURES", 1)

    def answer(prompt, n):
        if prompt == "0":
            return status, {}, b""
        time.sleep(0.5)
        return completion(prompt)

    with serving(answer=answer) as (url, asked), pytest.raises(UserError, match=error):
        synthesize(tmp_path, url, range(7), concurrency=4)
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert {row["prompt"] for row in rows} == {"1", "2", "3"} and len(asked) == 4


def test_a_retry_after_header_that_is_no_whole_number_is_reported(tmp_path):
    with serving(answer=lambda prompt, n: (429, {"Retry-After": "0.5"}, b"")) as (url, _):
        with pytest.raises(UserError, match="because of a Retry-After header without seconds or a date"):
            synthesize(tmp_path, url, range(2))


def test_a_dead_server_is_given_up_and_refused_prompts_hold_up_no_other(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(dataset, "MAX_BACKOFF", 0)
    with serving(answer=lambda prompt, n: (500, {}, b"")) as (url, asked):
        with pytest.raises(UserError, match="^100 of 100 prompts have no response, .* HTTP status 500"):
            synthesize(tmp_path, url, range(100), concurrency=3)
        assert 80 <= len(asked) <= 8 * 13

    def answer(prompt, n):
        if int(prompt) < 20:
            return 400, {}, b""
        return completion(prompt) if int(prompt) % 2 else (500, {}, b"")

    with serving(answer=answer) as (url, asked):
        with pytest.raises(UserError, match="^60 of 100 prompts have no response"):
            synthesize(tmp_path, url, range(100), concurrency=3)
        assert len(asked) == 20 + 40 + 40 * 8
    assert "no response to '7': HTTP status 400\n" in capsys.readouterr().out


def test_half_a_surrogate_pair_in_a_prompt_is_asked_once(tmp_path):
    prompts = write_lines(tmp_path / "p.jsonl", [b'{"prompt": "smile \\ud83d"}'])
    with serving(answer=lambda prompt, n: completion(prompt)) as (url, asked):
        for _ in range(2):
            dataset.synthesize(prompts, url, "m", out=str(tmp_path / "out.jsonl"))
    assert len(asked) == 1


def test_a_synthesis_leaves_other_files_and_other_processes_alone(tmp_path):
    ours, path = '{"prompt": "a", "response": "b", "model": "m"}', tmp_path / "notes.jsonl"
    for text, why in (("mine\nall mine", "line 1, was not written by"), ("mine", "line 1, was not written by"),
                      ('{"prompt": "mine", "response": "by hand"}', "line 1, was not written by"),
                      (ours + "\n" + ours.replace('"m"', '"other"'), "has responses from other")):
        path.write_text(text)
        with pytest.raises(UserError, match=why), dataset.open_responses(str(path), "m"):
            pass
        assert path.read_text() == text
    path.write_text(ours)  # killed before the newline
    with dataset.open_responses(str(path), "m") as (_, answered):
        with pytest.raises(UserError, match="is being written by another process"):
            with dataset.open_responses(str(path), "m"):
                pass
    assert answered == {"a"} and path.read_text() == ours + "\n"


# -- data_loader.py

@pytest.fixture(scope="session")
def shards(tmp_path_factory):
    """Three shards, 2,000 tokens in all, each its own position in the stream; val is the first 300 again."""
    folder = tmp_path_factory.mktemp("shards")
    for i, (a, b) in enumerate(((0, 700), (700, 717), (717, 2000))):
        dataset.write_shard(str(folder / f"train_{i:06d}.bin"), np.arange(a, b))
    dataset.write_shard(str(folder / "val_000000.bin"), np.arange(300))
    return str(folder)


def first_tokens(batch):
    return batch[0][:, 0].tolist()


@pytest.mark.parametrize("B", [1, 3, 5])
@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_every_window_is_visited_exactly_once_an_epoch(shards, world_size, B):
    loaders = [DataLoader(shards, "train", B, 16, rank, world_size, seed=7) for rank in range(world_size)]
    n, seen = loaders[0].n_rows, []
    assert n == (2000 - 17) // 16 + 1
    while len(seen) < 3 * n:
        seen += [row for loader in loaders for row in first_tokens(loader.next_batch())]
    orders = [seen[e * n:(e + 1) * n] for e in range(3)]
    assert all(sorted(order) == list(range(0, 16 * n, 16)) for order in orders)
    assert orders[0] != orders[1] != orders[2] and orders[0] != sorted(orders[0])


def test_the_order_depends_neither_on_processes_nor_on_the_micro_batch(shards):
    def order(B, world_size):
        loaders = [DataLoader(shards, "train", B, 16, rank, world_size) for rank in range(world_size)]
        steps = range(240 // (B * world_size))
        return [row for _ in steps for loader in loaders for row in first_tokens(loader.next_batch())]

    other_seed = first_tokens(DataLoader(shards, "train", 240, 16, seed=1).next_batch())
    assert order(1, 1) == order(12, 1) == order(5, 2) == order(10, 8) != other_seed


def test_the_places_of_a_steps_data_are_where_its_windows_begin(shards):
    loaders = [DataLoader(shards, "train", 15, 16, rank, 2, stride=7) for rank in range(2)]
    for loader in loaders:
        windows = [row for _ in range(2) for row in first_tokens(loader.next_batch())]
        places = re.findall(r"(\S+) at token ([\d,]+)", loader.describe_last_rows(2, shown=30))
        assert [dataset.read_shard(path)[int(at.replace(",", ""))] for path, at in places] == windows
        assert len({path for path, _ in places}) > 1
    assert loaders[0].describe_last_rows(2).endswith(" and 26 more")
    assert "more" not in loaders[0].describe_last_rows(1, shown=15)


@pytest.mark.parametrize("stride", [1, 7, 16, 40])
def test_windows_are_slices_of_the_stream_whatever_the_shards_and_the_stride(shards, stride):
    loader = DataLoader(shards, "train", 1, 16, stride=stride)
    assert loader.n_rows == len([i for i in range(0, 2000, stride) if i + 17 <= 2000])
    (x, y), = loader.validation_batches(10**9, B=10**4)
    for i in range(loader.n_rows):
        assert x[i].tolist() == list(range(i * stride, i * stride + 16))
        assert y[i].tolist() == list(range(i * stride + 1, i * stride + 17))


def test_validation_reads_windows_spread_evenly_over_the_split_by_any_number_of_processes(shards):
    def windows(world_size):
        loaders = [DataLoader(shards, "train", 1, 16, rank, world_size) for rank in range(world_size)]
        batches = [batch for loader in loaders for batch in loader.validation_batches(25, 4)]
        return sorted(row // 16 for batch in batches for row in first_tokens(batch))

    n_rows = DataLoader(shards, "train", 1, 16).n_rows
    assert windows(1) == windows(3) == [i * n_rows // 25 for i in range(25)]


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
    for a, b in ((p, np.arange(50_000)), (p[1:], p[:-1])):
        assert abs(np.corrcoef(a, b)[0, 1]) < 0.02


@pytest.fixture(scope="session")
def pairs(tmp_path_factory):
    """500 pairs of up to 512 tokens, and their rows by split"""
    rows = [row for row in some_pairs(520) if len(row["prompt"] + row["response"]) < 490][:500]
    path = write_lines(tmp_path_factory.mktemp("pairs") / "p.jsonl", rows)
    return Pairs(path, get_tokenizer("byte")), dict(val=rows[::10], train=[r for i, r in enumerate(rows) if i % 10])


def unpack(x, y, document):
    """The pairs in a batch, as (inputs, targets)"""
    out = []
    for tokens, targets, numbers in zip(x.tolist(), y.tolist(), document.tolist()):
        for number in sorted(set(numbers) - {-1}):
            places = [i for i, n in enumerate(numbers) if n == number]
            assert places == list(range(places[0], places[-1] + 1))
            out.append(([tokens[i] for i in places], [targets[i] for i in places]))
    return out


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("world_size, B", [(1, 1), (1, 5), (3, 2)])
def test_every_pair_is_whole_in_one_row_and_comes_once_an_epoch(pairs, split, world_size, B):
    source, rows = pairs
    loaders = [DataLoader(source, split, B, 512, rank, world_size, doc_mask=True) for rank in range(world_size)]
    n, packed = loaders[0].n_rows, []
    while len(packed) < n:
        batches = [loader.next_batch() for loader in loaders]
        packed += [tuple(t[i:i + 1] for t in batch) for batch in batches for i in range(B)]
    found = [pair for row in packed[:n] for pair in unpack(*row)]
    assert sorted(found) == sorted(encode_pair(row) for row in rows[split])


def test_rows_of_pairs_are_filled_to_95_percent_at_realistic_lengths():
    lengths = np.random.default_rng(0).lognormal(4.6, 0.8, 20_000).astype(int).clip(10, 1024)  # a mean of 136 tokens
    rows = pack(lengths, 1024)
    assert sorted(i for row in rows for i in row) == list(range(20_000))
    assert max(lengths[row].sum() for row in rows) <= 1024 and lengths.sum() / (1024 * len(rows)) > 0.95


@pytest.mark.parametrize("T, kept, reaches_end", [
    (16, [*range(16)], True), (15, [0, *range(2, 16)], True), (7, [0, *range(10, 16)], True),
    (6, [0, *range(10, 15)], False), (3, [0, 10, 11], False)])
def test_a_pair_that_is_too_long_loses_its_prompts_beginning_and_then_its_responses_end(T, kept, reaches_end):
    is_target = np.array([False] * 11 + [True] * 5)
    places, end = data_loader.tokens_to_keep(is_target, T)
    assert (places.tolist(), end) == (kept, reaches_end)


def test_nothing_is_learned_right_after_the_gap_in_a_pair_that_is_too_long(tmp_path):
    turns = dict(messages=chat("a", "b" * 30, "c", "d"))
    rows = PackedPairs(Pairs(write_lines(tmp_path / "p.jsonl", [turns]), get_tokenizer("byte")), "all", 40)
    x, y, _ = rows.read(0)
    gap = 1 + x[1:].tolist().index(ord("b"))
    assert x[0] == 256 and gap == 1 and y[0] == -1 and y[1] == ord("b") and rows.counts[0] == (y >= 0).sum()


def test_pairs_longer_than_the_context_are_counted(pairs):
    source, rows = pairs
    too_long = sum(len(encode_pair(row)[0]) > 64 for row in rows["train"])
    assert 50 < too_long < 450 and f"; {too_long:,} pairs are longer" in PackedPairs(source, "train", 64).summary()


@pytest.mark.parametrize("T", [40, 512])
def test_the_number_of_targets_of_a_step_is_known_before_it(pairs, T):
    loaders = [DataLoader(pairs[0], "train", 2, T, rank, 2) for rank in range(2)]
    for _ in range(loaders[0].n_rows // 8 + 3):
        expected = loaders[0].next_target_count(12)
        assert expected == sum((loader.next_batch()[1] >= 0).sum().item() for _ in range(3) for loader in loaders)


def test_documents_of_a_window_are_numbered_so_that_attention_can_stop_at_their_ends(tmp_path):
    folder = prepare(tmp_path, write_text(tmp_path / "t.txt", stories(50)), "byte")
    x, y, document = DataLoader(folder, "train", 8, 1000, doc_mask=True).next_batch()
    assert torch.equal(document, (x == 256).cumsum(dim=1)) and document.max() > 1


def test_numpy_shards_load(shards, tmp_path):
    np.save(tmp_path / "edufineweb_train_000001.npy", np.arange(2000, dtype=np.uint16))
    a, b = (DataLoader(str(folder), "train", 8, 16).next_batch()[0] for folder in (tmp_path, shards))
    assert torch.equal(a, b)


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="reads /proc")
def test_resident_memory_stays_flat_while_shards_are_read(tmp_path):
    dataset.write_shard(str(tmp_path / "train_000000.bin"), np.zeros(50_000_000, dtype=np.uint16))
    loader = DataLoader(str(tmp_path), "train", 64, 1024)

    def resident():  # pages of files
        return int(open("/proc/self/statm").read().split()[2]) * os.sysconf("SC_PAGE_SIZE")

    before = resident()
    for _ in range(loader.n_rows // 64):
        loader.next_batch()
    loader.prefetched[2].result()  # a batch that is being read is in memory
    assert resident() - before < 20e6, "of 100 MB read"


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="reads /proc")
def test_many_shards_take_few_file_handles_and_an_empty_one_is_passed_over(tmp_path):
    for i in range(200):
        part = np.arange(10 * i, 10 * i + 10, dtype=np.uint16) if i != 100 else np.empty(0, dtype=np.uint16)
        dataset.write_shard(str(tmp_path / f"train_{i:06d}.bin"), part)
    before = len(os.listdir("/proc/self/fd"))
    windows = data_loader.Windows(str(tmp_path), "train", 25, 1)
    read = [windows.read(i)[0].tolist() for i in range(len(windows))]
    assert len(os.listdir("/proc/self/fd")) - before < 5
    stream = [t for t in range(2000) if t // 10 != 100]
    assert read == [stream[i:i + 25] for i in range(len(stream) - 25)]


def test_a_token_outside_the_vocabulary_is_named(tmp_path):
    dataset.write_shard(str(tmp_path / "train_000000.bin"), [1] * 50 + [999] + [1] * 50)
    with pytest.raises(UserError, match="train_000000.bin: token 999 at 50 is outside the vocabulary of 500"):
        DataLoader(str(tmp_path), "train", 6, 16, vocab_size=500).next_batch()


# -- train.py

FAST = ["--data=data/t", "--n_layer=2", "--n_head=2", "--n_embd=32", "--block_size=32", "--total_batch_size=256",
        "--max_steps=30", "--max_lr=1e-2", "--warmup_steps=4", "--val_interval=5", "--val_tokens=2000",
        "--ckpt_interval=2", "--sample_interval=0", "--hella_interval=0", "--device=cpu", "--dropout=0.1",
        "--dtype=float32"]
RUNS = {
    "fp32": FAST,
    "pairs": [*FAST, "--dtype=bfloat16", "--data=pairs.jsonl", "--tokenizer=byte", "--doc_mask", "--patience=50",
              "--teacher=runs/fp32/checkpoints/model_000030.pt"]}
CKPT = "runs/fp32/checkpoints/model_000030.pt"


@pytest.fixture(scope="session")
def workspace(tmp_path_factory):
    """A folder with data/t, stories in bytes, pairs.jsonl, and the runs of RUNS"""
    folder = tmp_path_factory.mktemp("work")
    path = write_text(folder / "t.txt", stories(150))
    dataset.prepare(path, "byte", out=str(folder / "data/t"))
    write_lines(folder / "pairs.jsonl", some_pairs(150))
    for name, options in RUNS.items():
        run_ok(here("train.py"), *options, f"--out_dir=runs/{name}", cwd=folder)
    return folder


def records(folder):
    """log.txt -> {(stream, step): line}, the last line of a step, without what depends on the clock"""
    out = {}
    with open(os.path.join(folder, "log.txt")) as f:
        for line in f:
            if line[0] != "#" and line.endswith("\n"):
                step, stream, *rest = line.split()
                rest = [r for r in rest if r.split("=")[0] not in ("ms", "steps_s", "tok_s", "mfu", "seconds", "usd")]
                out[stream, int(step)] = " ".join([step, stream, *rest])
    return out


def losses(folder, stream="train"):
    by_step = {step: float(line.split()[2]) for (s, step), line in records(folder).items() if s == stream}
    return [by_step[step] for step in sorted(by_step)]


def test_training_lowers_the_loss(workspace):
    values = losses(workspace / "runs/fp32", "val")
    assert values[0] == pytest.approx(math.log(384), abs=0.1) and values[-1] < 3.5


@pytest.mark.parametrize("name", RUNS)
def test_a_run_killed_five_times_logs_the_losses_of_one_that_was_not(workspace, name, tmp_path):
    rng, out, killed_in_save = random.Random(name), tmp_path / "run", False
    command = [sys.executable, here("train.py"), *RUNS[name], f"--out_dir={out}", "--resume=auto"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}

    def last_step():
        return max([step for _, step in records(out)], default=-1) if (out / "log.txt").exists() else -1

    def is_saving():
        return any(e.name.endswith(".tmp") for e in os.scandir(out / "checkpoints"))

    for kill_at in (1, 7, 13, 19, 24):
        null = subprocess.DEVNULL
        p = subprocess.Popen(command, cwd=workspace, env=env, stdout=null, stderr=null)
        while last_step() < kill_at and p.poll() is None:
            time.sleep(0.005)
        if kill_at == 7:
            while p.poll() is None:
                if is_saving():
                    p.send_signal(signal.SIGSTOP)
                    time.sleep(0.01)
                    if is_saving():  # still, and nothing moves any more
                        break
                    p.send_signal(signal.SIGCONT)
        else:
            time.sleep(rng.random() * 0.03)
        assert p.poll() is None, f"the run ended before it could be killed after step {kill_at}"
        p.send_signal(signal.SIGKILL)
        p.wait()
        killed_in_save |= is_saving()
    assert killed_in_save, "no kill came in the middle of a save"
    run_ok(*command[1:-1], "--resume", cwd=workspace)
    assert records(out) == records(workspace / "runs" / name)


NO_DROPOUT = [*FAST, "--dropout=0", "--max_steps=16"]


@pytest.fixture(scope="session")
def one_process(workspace):
    run_ok(here("train.py"), *NO_DROPOUT, "--ckpt_interval=6", "--out_dir=runs/one", cwd=workspace)
    return workspace / "runs/one"


def assert_same_losses(a, b):
    assert len(losses(a)) == 16
    for stream in ("train", "val"):
        assert losses(a, stream) == pytest.approx(losses(b, stream), abs=1e-5)


def test_a_checkpoint_is_written_while_steps_go_on_and_holds_the_moment_it_was_begun(workspace, tmp_path):
    slow = "import time, torch; save = torch.save; torch.save = lambda *args: (time.sleep(0.3), save(*args))"
    options = ["--max_steps=30", "--ckpt_interval=10", "--val_interval=0", f"--out_dir={tmp_path}/slow"]
    r = run_ok(here("train.py"), *FAST, *options, cwd=workspace, before=slow)
    saved, step, done = (r.stdout.index(text) for text in ("saved", "\nstep 11/30 | loss", "\ndone"))
    assert step < saved < r.stdout.rindex("saved") < done
    run_ok(here("train.py"), *FAST, *options[:3], f"--out_dir={tmp_path}/fast", cwd=workspace)
    for n in (10, 20, 30):
        a, b = (read_checkpoint(f"{tmp_path}/{run}/checkpoints/model_{n:06d}.pt") for run in ("slow", "fast"))
        assert all(torch.equal(a["model"][k], b["model"][k]) for k in a["model"])
        for x, y in zip(a["optimizers"][0]["state"].values(), b["optimizers"][0]["state"].values(), strict=True):
            assert torch.equal(x["exp_avg"], y["exp_avg"]) and x["step"] == y["step"]
        assert a["loader"] == b["loader"] and a["run"]["tokens"] == b["run"]["tokens"]


def test_a_save_may_take_longer_than_processes_wait_for_one_another(workspace, tmp_path):
    slow = """
import dataset, time, torch
from datetime import timedelta
c10d = torch.distributed.distributed_c10d
write, set_timeout = dataset.write_atomically, c10d._set_pg_timeout
dataset.write_atomically = lambda *args: (time.sleep(3), write(*args))
c10d._set_pg_timeout = lambda timeout: set_timeout(timedelta(seconds=1))
"""
    options = [*FAST, "--max_steps=4", "--ckpt_interval=3", f"--out_dir={tmp_path}"]
    r = run_ok(here("train.py"), *options, cwd=workspace, n=2, before=slow)
    assert r.stdout.count("| saved") == 2


def test_two_processes_give_the_losses_of_one(workspace, one_process):
    run_ok(*torchrun(2), here("train.py"), *NO_DROPOUT, "--out_dir=runs/two", cwd=workspace)
    assert_same_losses(workspace / "runs/two", one_process)


def test_dropout_differs_from_process_to_process_and_from_step_to_step(workspace, tmp_path):
    draw = """
import torch
from data_loader import DataLoader
next_batch = DataLoader.next_batch
DataLoader.next_batch = lambda loader: print(f"drew {torch.rand(()).item()}\\n", end="") or next_batch(loader)
"""
    r = run_ok(here("train.py"), *FAST, "--max_steps=3", f"--out_dir={tmp_path}", cwd=workspace, n=2, before=draw)
    drawn = re.findall("drew (.*)", r.stdout)
    assert len(drawn) == len(set(drawn)) >= 6


RESUME = ["--resume=runs/one/checkpoints/model_000006.pt", "--data=data/t"]


def test_a_run_started_on_one_process_resumes_on_two(workspace, one_process, tmp_path):
    run_ok(here("train.py"), *RESUME, f"--out_dir={tmp_path}", n=2, cwd=workspace)
    assert losses(tmp_path) == pytest.approx(losses(one_process)[6:], abs=1e-5)


@pytest.fixture(scope="session", params=["zero2", "zero3", "zero3 --ckpt_shards"])
def sharded(request, workspace):
    """A run of two processes that share what they keep"""
    parallel, *parts = request.param.split()
    options = [f"--parallel={parallel}", *parts, "--micro_batch=2", "--ckpt_interval=6", "--sample_interval=6"]
    out = f"runs/{parallel}{''.join(parts)}"
    run_ok(here("train.py"), *NO_DROPOUT, *options, f"--out_dir={out}", n=2, cwd=workspace)
    return workspace / out


def test_sharding_gives_the_losses_of_one_process(sharded, one_process):
    assert_same_losses(sharded, one_process)


def test_a_checkpoint_of_a_sharded_run_has_the_form_of_any_other(sharded, one_process):
    a, b = (read_checkpoint(f"{run}/checkpoints/model_000006.pt") for run in (sharded, one_process))
    assert a.keys() == b.keys() and a["model"].keys() == b["model"].keys()
    for part in (lambda c: c["model"], lambda c: c["optimizers"][0]["state"][3]):
        for x, y in zip(part(a).values(), part(b).values(), strict=True):
            x = torch.cat(x) if isinstance(x, list) else x  # of a checkpoint in parts
            torch.testing.assert_close(x, y, atol=1e-4, rtol=1e-3)


def test_one_process_resumes_from_a_sharded_checkpoint(sharded, one_process, workspace, tmp_path):
    options = [f"--resume={sharded}/checkpoints/model_000006.pt", "--data=data/t", "--parallel=ddp"]
    run_ok(here("train.py"), *options, f"--out_dir={tmp_path}", cwd=workspace)
    assert losses(tmp_path) == pytest.approx(losses(one_process)[6:], abs=1e-5)


def test_a_checkpoint_in_parts_counts_once_all_of_them_are_there(workspace, one_process, tmp_path):
    shards = ["--parallel=zero3", "--ckpt_shards"]
    run_ok(here("train.py"), *NO_DROPOUT, *shards, "--ckpt_interval=3", f"--out_dir={tmp_path}", n=2, cwd=workspace)
    assert [checkpoint_step(path) for path in find_checkpoints(tmp_path)][-2:] == [15, 16]
    for step, part in ((15, 1), (16, 0)):  # as if killed while these were written
        os.remove(tmp_path / f"checkpoints/model_{step:06d}.pt/part_000{part}_of_0002.pt")
    (tmp_path / "checkpoints/model_000016.pt/part_0000_of_0002.pt.tmp").write_bytes(b"PK")
    r = script(here("eval.py"), f"--ckpt={tmp_path}/checkpoints/model_000016.pt/", "--prompt=x", cwd=workspace)
    assert r.returncode == 1 and "parts of it are missing" in r.stderr
    assert "step 12," in run_ok(here("eval.py"), f"--ckpt={tmp_path}", "--prompt=x", "--max_new_tokens=2",
                                cwd=workspace).stderr
    path = tmp_path / "checkpoints/model_000012.pt"
    r = run_ok(here("train.py"), f"--resume={path}/", "--data=data/t", f"--out_dir={tmp_path}", n=4, cwd=workspace)
    assert f"{tmp_path}/checkpoints/model_000016.pt: some of its parts are missing\n" in r.stdout
    assert losses(tmp_path) == pytest.approx(losses(one_process), abs=1e-5)
    assert all(len(os.listdir(path)) == 4 for path in find_checkpoints(tmp_path) if checkpoint_step(path) > 12)


def test_a_checkpoint_may_hold_the_parts_of_two_launches(tmp_path, monkeypatch):
    def write(*names):
        for name in names:
            (tmp_path / f"part_{name}.pt").touch()
        return [os.path.basename(path)[5:-3] for path in model_file.checkpoint_files(str(tmp_path))]

    assert write("0000_of_0002", "0000_of_0004") == []  # as many files as the first launch has processes
    assert write("0001_of_0002") == ["0000_of_0002", "0001_of_0002"]
    os.remove(tmp_path / "part_0000_of_0002.pt")
    assert write("0001_of_0004", "0002_of_0004", "0003_of_0004") == [f"000{i}_of_0004" for i in range(4)]
    os.utime(tmp_path / "part_0000_of_0004.pt", (1, 1))
    assert write("0000_of_0001") == ["0000_of_0001"]  # the newer set
    monkeypatch.setattr(os.path, "getmtime", lambda path: os.stat("/no/such/file").st_mtime)
    assert len(write()) in (1, 4)  # although another process is removing one


STOPPED = """
import os, signal, hellaswag
def stop(*args, sum_losses=hellaswag.sum_losses, calls=[]):
    calls.append(1)
    if len(calls) == int(os.environ["VALIDATION"]):
        os.kill(os.getpid(), signal.SIGTERM)
    return sum_losses(*args)
hellaswag.sum_losses = stop
"""


@pytest.mark.parametrize("options", [["--parallel=ddp"], ["--parallel=zero3", "--ckpt_shards"]], ids=str)
def test_a_step_may_be_saved_again_in_another_form(workspace, one_process, tmp_path, options):
    shards = ["--parallel=zero3", "--ckpt_shards"]
    first, n = (shards, 2) if "ddp" in options[0] else (["--parallel=ddp"], 1)
    base = [*NO_DROPOUT, "--val_interval=16", f"--out_dir={tmp_path}"]
    r = script(here("train.py"), *base, *first, cwd=workspace, n=n, before=STOPPED, VALIDATION="2")
    assert "stopped at step 16" in r.stdout, r.stderr
    assert not read_checkpoint(str(tmp_path / "checkpoints/model_000016.pt"))["run"]["evaluated"]
    run_ok(here("train.py"), *base, *options, "--resume", cwd=workspace, n=3 - n)
    ckpt = read_checkpoint(str(tmp_path / "checkpoints/model_000016.pt"))
    assert ckpt["run"]["evaluated"] and ckpt["run"]["last_val"]["step"] == 16
    assert losses(tmp_path) == pytest.approx(losses(one_process), abs=1e-5)


def test_an_old_checkpoint_stays_until_the_new_one_has_all_its_parts(tmp_path, monkeypatch, capsys):
    set_globals(monkeypatch, out_dir=str(tmp_path), keep=1)
    for step in (1, 2):
        for rank in (1, 0):
            path = model_file.part_path(train.checkpoint_path(step), rank, 2)
            ckpt = dict(step=step, run=dict(step=step, best=dict(step=-1), skipped=0))
            assert train.write_checkpoint(path, ckpt)
            assert [checkpoint_step(p) for p in find_checkpoints(tmp_path)] == ([step] if rank == 0 else
                                                                                [step - 1][:step - 1])
    assert capsys.readouterr().out.count("saved") == 2


def test_parts_of_a_moment_that_do_not_fit_take_no_memory(workspace, tmp_path):
    path = tmp_path / "model_000030.pt"
    ckpt = torch.load(workspace / "runs/fp32/checkpoints/model_000030.pt")
    ckpt["optimizers"][0]["state"][0]["exp_avg"] = [torch.zeros(1).expand(2**38)]  # a terabyte
    torch.save(ckpt, path)
    r = script(here("train.py"), f"--resume={path}", "--data=data/t", "--max_steps=40", f"--out_dir={tmp_path}/run",
               cwd=workspace)
    assert r.returncode == 1 and "is not a checkpoint of train.py, or is damaged (ValueError)" in r.stderr, r.stderr


def test_parts_of_two_checkpoints_are_not_one(workspace, tmp_path):
    ckpt = read_checkpoint(str(workspace / "runs/fp32/checkpoints/model_000030.pt"))
    folder = tmp_path / "model_000030.pt"
    folder.mkdir()
    for i, change in enumerate([{}, {"step": 29}]):
        torch.save({**ckpt, **change}, folder / f"part_{i:04d}_of_0002.pt")
    with pytest.raises(UserError, match=r"model_000030.pt is not a checkpoint, or is damaged \(ValueError\)"):
        read_checkpoint(str(folder))


@pytest.mark.parametrize("parallel", ["zero2", "zero3"])
def test_a_run_of_one_process_resumes_sharded(workspace, one_process, tmp_path, parallel):
    run_ok(here("train.py"), *RESUME, f"--parallel={parallel}", f"--out_dir={tmp_path}", n=2, cwd=workspace)
    assert losses(tmp_path) == pytest.approx(losses(one_process)[6:], abs=1e-5)


@pytest.mark.parametrize("parallel", ["ddp", "zero3"])
def test_gradients_averaged_in_bfloat16_change_losses_a_little(workspace, one_process, tmp_path, parallel):
    options = [f"--parallel={parallel}", "--reduce_dtype=bfloat16", f"--out_dir={tmp_path}"]
    run_ok(here("train.py"), *NO_DROPOUT, *options, n=2, cwd=workspace)
    assert losses(tmp_path) == pytest.approx(losses(one_process), abs=0.02)
    assert losses(tmp_path) != pytest.approx(losses(one_process), abs=1e-5)


@pytest.mark.parametrize("n, parallel", [(2, "zero2"), (3, "zero3")])
def test_each_process_keeps_its_share_of_weights_gradients_and_moments(tmp_path, n, parallel):
    (tmp_path / "shares.py").write_text(f"""
import math, torch, train
from model import GPT, GPTConfig
torch.distributed.init_process_group("gloo")
cpu, train.parallel, train.optimizer = torch.device("cpu"), {parallel!r}, "muon"
full = GPT(GPTConfig(block_size=16, vocab_size=64, n_layer=2, n_head=2, n_embd=32))
def rows_kept(p):  # as torch.chunk divides them
    rows = math.ceil(len(p) / {n})
    return max(0, min(rows, len(p) - torch.distributed.get_rank() * rows))
share = [rows_kept(p) * p[0].numel() for p in full.parameters()]
model = train.shard_model(full, cpu, torch.float32, {n})
idx = torch.zeros(1, 16, dtype=torch.long)
model(idx, idx)[1].backward()
optimizers = train.make_optimizers(model, cpu, torch.float32)
kept = {{}}
for o in optimizers:
    o.step()
    for p, state in o.state.items():
        kept[p] = [v.to_local().numel() for v in state.values() if v.dim()]
assert [kept[p] for p in model.parameters()] == [
    [n] * (1 if any(p is q for q in optimizers[0].state) else 2) for n, p in zip(share, model.parameters())]
assert [p.to_local().numel() for p in model.parameters()] == share
assert [p.grad.to_local().numel() for p in model.parameters()] == share
torch.distributed.destroy_process_group()
""")
    run_ok(tmp_path / "shares.py", n=n, cwd=tmp_path, PYTHONPATH=HERE)


@pytest.mark.parametrize("micro_batch", [1, 4])
def test_the_micro_batch_does_not_change_the_losses(workspace, one_process, tmp_path, micro_batch):
    run_ok(here("train.py"), *NO_DROPOUT, f"--micro_batch={micro_batch}", f"--out_dir={tmp_path}", cwd=workspace)
    assert_same_losses(tmp_path, one_process)


OUT_OF_MEMORY = """
import os, torch, model
loss_and_logits, calls = model.GPT.forward, []
def forward(self, idx, targets=None, *rest, **options):
    calls.append(len(idx))
    if self.training and len(idx) > 2 and len(calls) > 14 and os.environ.get("RANK") != "1":
        raise torch.OutOfMemoryError("CUDA out of memory.")
    return loss_and_logits(self, idx, targets, *rest, **options)
model.GPT.forward = forward
"""


def test_memory_that_runs_out_in_the_middle_of_a_run_halves_the_micro_batch_and_changes_no_loss(
        workspace, one_process, tmp_path):
    options = [*NO_DROPOUT, "--micro_batch=4", "--ckpt_interval=6", f"--out_dir={tmp_path}/run"]
    r = run_ok(here("train.py"), *options, cwd=workspace, before=OUT_OF_MEMORY)
    assert r.stdout.count("\nout of memory with a micro-batch of 4; retrying with 2\n") == 1
    assert_same_losses(tmp_path / "run", one_process)
    sizes = [read_checkpoint(f"{tmp_path}/run/checkpoints/model_{n:06d}.pt")["micro_batch"] for n in (6, 12)]
    assert sizes == [4, 2]


def test_memory_that_runs_out_on_one_of_several_processes_ends_the_run_with_advice(workspace, tmp_path):
    options = [*NO_DROPOUT, "--micro_batch=4", f"--out_dir={tmp_path}/run"]
    r = script(here("train.py"), *options, cwd=workspace, n=2, before=OUT_OF_MEMORY)
    advice = "train.py: out of memory; what helps, cheapest first: a micro_batch below 4"
    assert r.returncode == 1 and r.stderr.count("\n") == 2, r.stderr
    assert r.stderr.count(advice) == 1 and r.stderr.count("train.py: rank 1 lost the others") == 1, r.stderr


def test_the_validation_loss_equals_a_slow_loop_over_windows_spread_over_the_split(workspace):
    model, ckpt = load_checkpoint(str(workspace / CKPT))
    tokens, nats, n_bytes = torch.tensor(read_split(workspace / "data/t", "val")), 0.0, 0
    n_windows, n = (len(tokens) - 33) // 32 + 1, 2000 // 32
    assert n_windows > 2 * n
    with torch.no_grad():
        for i in range(n):
            start = 32 * (i * n_windows // n)
            window = tokens[start:start + 33]
            log_p = model(window[None, :-1], window[None, 1:])[0][0].log_softmax(-1)
            for row, target in zip(log_p, window[1:].tolist()):
                nats -= row[target].item()
                n_bytes += target != 256
    line = records(workspace / "runs/fp32")["val", 30].split()
    assert float(line[2]) == pytest.approx(nats / 1984, abs=1e-5)
    assert float(line[3].removeprefix("bpb=")) == pytest.approx(nats / math.log(2) / n_bytes, abs=1e-5)


TUNED = ["--recipe=sft", "--data=pairs.jsonl", "--tokenizer=byte", "--n_layer=2", "--n_head=2", "--n_embd=32",
         "--block_size=256", "--total_batch_size=1024", "--max_steps=6", "--max_lr=1e-2", "--warmup_steps=2",
         "--val_interval=3", "--device=cpu", "--dtype=float32", "--patience=9"]


@pytest.fixture(scope="session")
def tuned(tmp_path_factory):
    """The same fine-tuning on one process and on two, with several micro-batches.  -> the folder, and the pairs"""
    folder = tmp_path_factory.mktemp("tuned")
    rows = [row for row in some_pairs(300) if len(row["prompt"] + row["response"]) < 230]
    write_lines(folder / "pairs.jsonl", rows)
    for B in (1, 2, 4):
        run_ok(here("train.py"), *TUNED, f"--micro_batch={B}", f"--out_dir=one{B}", cwd=folder)
    for B, parallel in ((1, "ddp"), (2, "zero2")):
        options = [*TUNED, f"--micro_batch={B}", f"--parallel={parallel}", f"--out_dir=two{B}"]
        run_ok(here("train.py"), *options, n=2, cwd=folder)
    return folder, rows


@torch.no_grad()
def slow_pair_loss(model, rows):
    """The mean loss of the responses and their ends, each pair on its own"""
    nats = n = 0
    for row in rows:
        x, y = encode_pair(row)
        log_p = model(torch.tensor([x]), torch.tensor([y]))[0][0].log_softmax(-1)
        nats -= sum(log_p[i, t].item() for i, t in enumerate(y) if t >= 0)
        n += sum(t >= 0 for t in y)
    return nats / n


@pytest.mark.parametrize("run", ["one1", "one2", "one4", "two1", "two2"])
def test_the_loss_on_packed_pairs_equals_a_slow_loop_over_single_ones(tuned, run):
    folder, rows = tuned
    model, _ = load_checkpoint(str(folder / run / "checkpoints/model_000000.pt"))
    loader = DataLoader(Pairs(str(folder / "pairs.jsonl"), get_tokenizer("byte")), "train", 4, 256, seed=1337)
    first_step = [rows[i] for row in loader.order(0, 4) for i in loader.rows.rows[row]]
    assert 8 < len(first_step) < len(rows) / 2
    assert losses(folder / run)[0] == pytest.approx(slow_pair_loss(model, first_step), abs=1e-5)
    assert losses(folder / run, "val")[0] == pytest.approx(slow_pair_loss(model, rows[::10]), abs=1e-5)
    assert losses(folder / run) == pytest.approx(losses(folder / "one4"), abs=1e-5)
    assert len(losses(folder / run)) == 6


def test_bits_per_byte_of_pairs_are_those_of_the_responses(tuned):
    folder, rows = tuned
    line = records(folder / "one4")["val", 0].split()
    n_bytes = sum(len(row["response"].encode()) for row in rows[::10])
    n_targets = n_bytes + len(rows[::10])
    bpb = float(line[2]) * n_targets / n_bytes / math.log(2)
    assert f"tokens={n_targets}" in line and float(line[3].removeprefix("bpb=")) == pytest.approx(bpb, rel=1e-5)


def test_training_stops_when_validation_gets_no_better_and_keeps_the_best_checkpoint(workspace, tmp_path):
    prepare(tmp_path, str(workspace / "t.txt"), "byte", splits="80/10/10")
    options = [*FAST, f"--data={tmp_path}/d", "--max_lr=3", "--val_interval=1", "--ckpt_interval=0", "--patience=3"]
    r = run_ok(here("train.py"), *options, "--keep=1", f"--out_dir={tmp_path}", cwd=workspace)
    values = losses(tmp_path, "val")
    best = values.index(min(values))
    assert len(values) == best + 4 < 30
    assert [step for stream, step in records(tmp_path) if stream == "test"] == [best + 3]  # as at any end
    path = f"{tmp_path}/checkpoints/model_{best:06d}.pt"
    assert find_checkpoints(tmp_path)[0] == path
    assert f"done at step {best + 3}, no better validation loss in 3" in r.stdout
    assert f"best: step {best}, validation loss {min(values):.4f}: {path}" in r.stdout
    again = run_ok(here("train.py"), "--resume", f"--data={tmp_path}/d", f"--out_dir={tmp_path}", cwd=workspace)
    assert f"done at step {best + 3}, no better" in again.stdout and losses(tmp_path, "val") == values


def set_globals(monkeypatch, **values):
    for name, value in values.items():
        monkeypatch.setattr(train, name, value, raising=False)


def test_adamw_gets_its_rate_betas_eps_and_decay(monkeypatch):
    set_globals(monkeypatch, optimizer="adamw", max_lr=0.1, beta1=0.2, beta2=0.3, eps=0.4, weight_decay=0.5)
    [o] = train.make_optimizers(GPT(small()), torch.device("cpu"), torch.float32)
    assert all((g["lr"], g["betas"], g["eps"]) == (0.1, (0.2, 0.3), 0.4) for g in o.param_groups)
    decay = {p.dim(): g["weight_decay"] for g in o.param_groups for p in g["params"]}
    assert decay == {2: 0.5, 1: 0.0}


def test_without_a_limit_gradients_are_not_clipped(workspace, tmp_path):
    for limit in (0, 1e6):
        options = [f"--grad_clip={limit}", "--max_steps=3", f"--out_dir={tmp_path}/{limit}"]
        run_ok(here("train.py"), *FAST, *options, cwd=workspace)
    assert losses(tmp_path / "0") == losses(tmp_path / "1000000.0") != losses(workspace / "runs/fp32")[:3]


def test_a_resumed_run_uses_the_present_weight_decay(workspace, tmp_path):
    options = ["--resume=runs/fp32", "--data=data/t", "--max_steps=31", "--weight_decay=0.9", f"--out_dir={tmp_path}"]
    run_ok(here("train.py"), *options, cwd=workspace)
    [optimizer] = read_checkpoint(find_checkpoints(tmp_path)[-1])["optimizers"]
    assert [group["weight_decay"] for group in optimizer["param_groups"]] == [0.9, 0.0]


def test_empty_lines_in_a_sample_become_one(monkeypatch, capsys):
    enc, model = get_tokenizer("byte"), GPT(small())
    tokens = [*enc.encode_ordinary("b\n\n\n\nc"), enc.eot_token]
    monkeypatch.setattr(model, "stream", lambda *args, **options: (torch.tensor([[t]]) for t in tokens))
    set_globals(monkeypatch, sample_prompt="a", sample_temperature=0.0, seed=1)
    train.print_sample(3, model, enc, None)
    assert capsys.readouterr().out == "sample at step 3: ab\n\nc\n\n"


def test_a_resumed_run_keeps_its_micro_batch(monkeypatch):
    set_globals(monkeypatch, compile="false", block_size=16, micro_batch=0)
    found = [train.find_micro_batch(GPT(small()), None, torch.device("cpu"), torch.float32, 12, previous, 1)[0]
             for previous in (0, 4)]
    assert found == [12, 4]


def test_muon_gets_its_decay_and_without_a_rate_of_its_own_adamws(monkeypatch):
    model = GPT(small())
    for muon_lr, expected in ((0.0, 0.1), (0.02, 0.02)):
        set_globals(monkeypatch, optimizer="muon", muon_lr=muon_lr, max_lr=0.1, min_lr=0.0, warmup_steps=0,
                    max_steps=10, weight_decay=0.5)
        muon, adamw = optimizers = train.make_optimizers(model, torch.device("cpu"), torch.float32)
        train.set_rates(optimizers, 0)
        assert all(g["lr"] == pytest.approx(expected) and g["weight_decay"] == 0.5 for g in muon.param_groups)


def test_the_command_line_overrides_a_config_file_and_1_is_true(tmp_path):
    (tmp_path / "c.json").write_text('{"recipe": "tiny", "max_lr": 1e-3, "seed": 5}')
    command = [f"--config={tmp_path}/c.json", "--recipe=shakespeare", "--max_lr=2e-3", "--doc_mask=1"]
    settings = train.configure(command)[0]
    assert (settings["max_lr"], settings["seed"], settings["doc_mask"]) == (2e-3, 5, True)
    assert settings["block_size"] == train.RECIPES["shakespeare"]["block_size"] != train.RECIPES["tiny"]["block_size"]


def test_a_window_longer_than_a_cpus_micro_batch_is_one(monkeypatch):
    set_globals(monkeypatch, compile="false", block_size=8192, micro_batch=0)
    found = train.find_micro_batch(GPT(small()), None, torch.device("cpu"), torch.float32, 12, 0, 1)
    assert found == (1, "")


def test_every_older_run_in_a_folder_keeps_a_name_of_its_own(tmp_path, monkeypatch):
    set_globals(monkeypatch, out_dir=str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    for i in range(3):
        (tmp_path / "log.txt").write_text(str(i))
        train.prepare_out_dir(train.new_run(), None)
    assert [(tmp_path / f"log.{i + 1}.txt").read_text() for i in range(3)] == ["0", "1", "2"]


def test_only_a_step_that_was_validated_can_be_the_best():
    run = {**train.new_run(), "step": 12, "last_val": dict(step=10, loss=1.0)}
    assert not train.is_new_best(run) and train.is_new_best({**run, "step": 10})


def test_a_checkpoint_that_could_not_be_written_is_not_the_best(tmp_path, monkeypatch):
    set_globals(monkeypatch, out_dir=str(tmp_path))
    monkeypatch.setattr(train, "write_checkpoint", lambda path, ckpt: ckpt["step"] == 1)
    run, saver, other = train.new_run(), train.Saver(torch.device("cpu")), argparse.Namespace(state_dict=dict, B=1)
    for step in (1, 2):
        run.update(step=step, last_val=dict(step=step, loss=3.0 - step, bpb=1.0))
        saver.save(run, {}, GPT(small()), [], other, other)
        assert saver.finish(run) == (step == 1) and run["best"]["step"] == 1


def test_patience_counts_validations_since_the_best_one(monkeypatch):
    set_globals(monkeypatch, patience=3, val_tokens=16, block_size=16, max_steps=99, sample_interval=0,
                hella_interval=0)
    run, val = train.new_run(), argparse.Namespace(validation_batches=lambda n, B: [])

    def validate(step, loss, val_interval):
        set_globals(monkeypatch, val_interval=val_interval)
        monkeypatch.setattr(hellaswag, "sum_losses", lambda *args: (loss, 1, 1))
        run["step"] = step
        assert train.evaluate(run, None, GPT(small()), {"val": val}, None, None, None, None, 1, 0, 1)
        if train.is_new_best(run):
            run["best"] = run["last_val"]
        return train.out_of_patience(run)

    assert not any([validate(10, 2.5, 10), validate(20, 2.0, 10), validate(30, 2.0, 10)])
    assert not any([validate(40, 2.5, 10), validate(40, 2.5, 10)])  # a second time after a resume
    assert not any([validate(41, 1.9, 1), validate(42, 2.1, 1), validate(50, 2.1, 10)])
    assert validate(51, 2.1, 1)
    run["step"] = 52
    assert not train.out_of_patience(run)


def test_a_step_is_skipped_when_its_loss_or_its_norm_stands_out_or_is_not_finite(monkeypatch):
    set_globals(monkeypatch, spike_guard=5.0)
    recent = []

    def calm(i):
        return 3 + 0.1 * (-1) ** i, 1 - 0.1 * (-1) ** i

    reasons = [train.skip_reason(*calm(i), recent) for i in range(train.RECENT)]
    assert not any(reasons) and not train.skip_reason(*calm(0), recent)
    assert "loss of 3.7 is 7.0 standard" in train.skip_reason(3.7, 1.0, recent)
    assert not train.skip_reason(2.0, 1.0, recent)
    assert "gradient norm of 2 is" in train.skip_reason(3.0, 2.0, recent)
    for loss, norm in ((math.nan, 1.0), (3.0, math.inf)):
        before = list(recent)
        assert train.skip_reason(loss, norm, recent) == "its loss or gradient is not finite" and recent == before
    later = [bool(train.skip_reason(9.0, 1.0, recent)) for _ in range(20)]
    assert later[0] and not later[-1] and len(recent) == train.RECENT + 1  # what lasts is soon normal
    set_globals(monkeypatch, spike_guard=0.0)
    assert not train.skip_reason(1e9, 1e9, recent)


def test_a_spike_changes_nothing_even_after_a_resume(tmp_path):
    (tmp_path / "a.txt").write_text("the cat sat on the mat.\n\n" * 2000)
    options = [*FAST, "--tokenizer=byte", "--spike_guard=6", "--seed=1"]
    first = run_ok(here("train.py"), *options, "--data=a.txt", "--max_steps=140", cwd=tmp_path)
    assert "skipped" not in first.stdout
    noise = """
import torch
from data_loader import DataLoader
next_batch = DataLoader.next_batch
DataLoader.next_batch = lambda loader: [torch.randint(97, 123, t.shape) for t in next_batch(loader)]
"""
    changed = ["--data=a.txt", "--resume", "--max_steps=150", "--val_interval=1"]
    r = run_ok(here("train.py"), *options, *changed, cwd=tmp_path, before=noise)
    pattern = r"^step (\d+) is skipped: its (?:loss|gradient norm) of .* standard deviations above the last 128; " \
        r"the data of rank 0: data/a-byte/train_000000.bin at token \d.* and 4 more$"
    skipped = [int(step) for step in re.findall(pattern, r.stdout, re.M)]
    val = {step: line.split()[2] for (stream, step), line in records(tmp_path).items() if stream == "val"}
    assert {140, 141} <= set(skipped) and len(skipped) < 9
    assert all((val[step] == val[step + 1]) == (step in skipped) for step in range(141, 149))


def test_new_data_is_judged_by_itself_and_read_from_its_beginning(workspace, tmp_path):
    write_text(tmp_path / "easy.txt", ["a cat sat on a mat. " * 2000])
    options = [*FAST, "--tokenizer=byte", f"--out_dir={tmp_path}"]
    run_ok(here("train.py"), *options, f"--data={tmp_path}/easy.txt", "--max_steps=20", cwd=tmp_path)
    before = (tmp_path / "checkpoints/model_000020.pt").read_bytes()
    resume = ["--data=data/t", "--new_data", "--resume", "--patience=2", "--max_steps=30", "--keep=9"]
    r = run_ok(here("train.py"), *options, *resume, cwd=workspace)
    assert "done at step 30: " in r.stdout  # not out of patience, though the old text's loss was lower
    assert (tmp_path / "checkpoints/model_000020.pt").read_bytes() == before
    ckpt = read_checkpoint(f"{tmp_path}/checkpoints/model_000030.pt")
    assert ckpt["run"]["best"]["step"] > 20 and ckpt["loader"]["position"] == 10 * 8
    resume = [f"--resume={tmp_path}/checkpoints/model_000020.pt", *resume[:2], "--patience=2", "--keep=1"]
    r = run_ok(here("train.py"), *options, *resume, "--max_steps=60", "--max_lr=9", cwd=workspace)  # it only gets worse
    assert "done at step 30, no better" in r.stdout and "best: step 20, validation loss" in r.stdout
    assert (tmp_path / "checkpoints/model_000020.pt").read_bytes() == before


def test_a_stop_before_the_first_step_with_new_data_leaves_the_checkpoint_as_it_is(workspace, tmp_path):
    shutil.copytree(workspace / "runs/fp32", tmp_path / "run")
    path = tmp_path / "run/checkpoints/model_000030.pt"
    before = path.read_bytes()
    write_text(tmp_path / "new.txt", stories(90))
    options = [f"--data={tmp_path}/new.txt", "--tokenizer=byte", "--new_data", "--max_steps=40"]
    r = script(here("train.py"), "--resume", *options, "--out_dir=run", cwd=tmp_path, before=STOPPED,
               VALIDATION="1")
    assert r.returncode == 128 + signal.SIGTERM and path.read_bytes() == before
    assert find_checkpoints(tmp_path / "run")[-1] == str(path)


def test_new_text_is_prepared_with_the_tokenizer_of_the_model_that_goes_on_with_it(tmp_path):
    write_text(tmp_path / "a.txt", stories(90))
    write_text(tmp_path / "b.txt", stories(180)[90:])
    command = [here("train.py"), *FAST, "--out_dir=run"]
    run_ok(*command, "--data=a.txt", "--tokenizer=bpe:300", "--max_steps=2", cwd=tmp_path)
    r = run_ok(*command, "--data=b.txt", "--new_data", "--resume", "--max_steps=4", cwd=tmp_path)
    assert "done at step 4" in r.stdout
    a, b = (find_checkpoints(tmp_path / "run")[i] for i in (0, -1))
    assert read_checkpoint(a)["tokenizer"] == read_checkpoint(b)["tokenizer"]


@pytest.mark.skipif(sys.platform != "linux", reason="needs names of files that are not UTF-8")
def test_a_run_in_a_folder_whose_name_is_not_utf_8_resumes(workspace, tmp_path):
    options = [*FAST, b"--out_dir=" + os.fsencode(tmp_path) + b"/caf\xe9"]
    command = [sys.executable, here("train.py"), *options]
    for steps in ("2", "4"):
        r = subprocess.run([*command, f"--max_steps={steps}", "--resume=auto"], cwd=workspace, capture_output=True)
        assert r.returncode == 0 and f"done at step {steps}".encode() in r.stdout, r.stderr


def test_a_run_says_if_its_warm_up_is_longer_than_itself(workspace, tmp_path):
    options = [*FAST, f"--out_dir={tmp_path}", "--max_steps=3"]
    r = run_ok(here("train.py"), *options, "--warmup_steps=30", cwd=workspace)
    assert "warm-up: takes the whole run, so the learning rate only reaches 1.0e-03; lower" in r.stdout
    assert "warm-up" not in run_ok(here("train.py"), *options, "--warmup_steps=2", cwd=workspace).stdout


def test_a_run_that_saves_nothing_says_so(workspace, tmp_path):
    r = run_ok(here("train.py"), *FAST, f"--out_dir={tmp_path}", "--max_steps=3", "--ckpt_interval=0", cwd=workspace)
    assert "step 3 was not saved: ckpt_interval is 0" in r.stdout and not find_checkpoints(tmp_path)
    run_ok(here("train.py"), *FAST, f"--out_dir={tmp_path}", "--max_steps=3", cwd=workspace)
    options = ["--max_steps=4", "--ckpt_interval=0", "--resume"]
    r = run_ok(here("train.py"), *FAST, f"--out_dir={tmp_path}", *options, cwd=workspace)
    assert "model_000003.pt; to try it: " in r.stdout and "step 4 was not saved: ckpt_interval is 0" in r.stdout


def test_checkpoints_may_be_a_link_to_another_disk(workspace, tmp_path):
    (tmp_path / "big/a").mkdir(parents=True)
    os.symlink(tmp_path / "big/a", tmp_path / "checkpoints")
    for _ in range(2):
        run_ok(here("train.py"), *FAST, f"--out_dir={tmp_path}", "--max_steps=3", cwd=workspace)
    assert os.path.islink(tmp_path / "checkpoints")
    assert all(os.path.exists(tmp_path / f"big/{name}/model_000003.pt") for name in ("a", "a.1"))


def test_a_run_that_diverges_ends_and_leaves_a_good_checkpoint(workspace, tmp_path):
    options = [*FAST, "--val_interval=0", "--ckpt_interval=1", "--keep=2", f"--out_dir={tmp_path}"]
    run_ok(here("train.py"), *options, "--max_steps=2", cwd=workspace)
    r = script(here("train.py"), *options, "--resume", "--max_lr=1e30", "--max_steps=60", cwd=workspace)
    assert r.returncode == 1
    good = find_checkpoints(tmp_path)[0]
    assert f"20 steps in a row were skipped, up to 22; resume from {good} with" in r.stderr.splitlines()[-1]
    assert good.endswith("000002.pt") and all(w.abs().max() < 100 for w in read_checkpoint(good)["model"].values())


def test_a_hint_is_printed_if_processes_take_long_to_exchange_data(monkeypatch, capsys):
    monkeypatch.setattr(train, "NOTICE_SECONDS", 0.2)
    monkeypatch.setattr(train, "wait_for_processes", lambda *args: (train.dist.HashStore(), ["here"]))
    monkeypatch.setattr(train.dist, "init_process_group", lambda *args, **options: None)
    for seconds, hints in ((0, 0), (1, 1)):
        monkeypatch.setattr(train.dist, "all_reduce", lambda tensor: time.sleep(seconds))
        assert train.start_processes(torch.device("cpu"), 0, 1) == ["here"]
        time.sleep(0.5)
        assert capsys.readouterr().out.count("cannot exchange data yet. On several machines, NCCL") == hints


def test_a_hint_is_printed_while_the_first_process_cannot_be_reached(monkeypatch, capsys):
    port = some_port()
    for name, value in dict(MASTER_ADDR="localhost", MASTER_PORT=str(port)).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(train, "NOTICE_SECONDS", 0.3)
    monkeypatch.setattr(train, "START_SECONDS", 1)
    with pytest.raises(UserError, match="the processes cannot reach each other"):
        train.start_processes(torch.device("cpu"), 1, 2)
    assert f"localhost:{port}, where torchrun or the first process should listen" in capsys.readouterr().out


def test_a_process_that_does_not_start_is_named_first_in_a_notice_then_in_an_error(tmp_path):
    code = f"""
import os, sys
sys.path.insert(0, {HERE!r})
import dataset, torch, train
dataset.start_script()
train.NOTICE_SECONDS, train.START_SECONDS = 1, 3
train.start_processes(torch.device("cpu"), int(os.environ["RANK"]), 4)
"""
    port = some_port()
    processes = [subprocess.Popen(
        [sys.executable, "-c", code], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, "RANK": rank, "LOCAL_RANK": rank, "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)})
        for rank in "02"]
    missing = f"seconds: rank 1, 3 of 4; ready: 2 processes on {socket.gethostname()}\n"
    for p, notices in zip(processes, (1, 0)):
        out, err = p.communicate(timeout=60)
        assert p.returncode == 1 and re.sub("after [35]", "after 3", err) == f"-c: not ready after 3 {missing}"
        assert out == f"train.py: not ready after 1 {missing}" * notices


def test_the_distilled_loss_equals_a_sum_over_single_positions(monkeypatch):
    set_globals(monkeypatch, distill_alpha=0.3, distill_temperature=2.0)
    student, teacher = torch.randn(2, 2, 5, 7)
    targets = torch.tensor([[1, -1, 3, 6, -1], [-1, -1, 0, 2, 2]])
    ce, kl = [], []
    for b, t in (targets >= 0).nonzero().tolist():
        p, q = (torch.softmax(z[b, t] / 2, dim=0).tolist() for z in (teacher, student))
        kl.append(sum(a * math.log(a / c) for a, c in zip(p, q)))
        ce.append(-math.log(torch.softmax(student[b, t], dim=0)[targets[b, t]]))
    loss = F.cross_entropy(student.flatten(0, 1), targets.flatten(), ignore_index=-1)
    expected = 0.7 * sum(ce) / 6 + 0.3 * 4 * sum(kl) / 6
    assert train.distill(loss, student, teacher, targets).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("padding", [384, 512])
def test_a_teacher_of_the_same_weights_has_nothing_to_teach_whatever_its_padding(workspace, tmp_path, padding):
    ckpt = read_checkpoint(str(workspace / CKPT))
    for name in ("transformer.wte.weight", "lm_head.weight"):
        ckpt["model"][name] = F.pad(ckpt["model"][name], (0, 0, 0, padding - 384))
    ckpt["model_config"]["vocab_size"] = padding
    torch.save(ckpt, tmp_path / "teacher.pt")
    options = [f"--init_from={CKPT}", f"--teacher={tmp_path}/teacher.pt", "--distill_alpha=1", "--dropout=0"]
    run_ok(here("train.py"), *FAST, *options, "--max_steps=2", f"--out_dir={tmp_path}", cwd=workspace)
    assert losses(tmp_path)[0] == pytest.approx(0, abs=1e-6) and losses(tmp_path, "val")[0] > 1


def test_a_teacher_without_a_share_changes_nothing(workspace, tmp_path):
    options = [f"--teacher={CKPT}", "--distill_alpha=0", "--max_steps=1"]
    run_ok(here("train.py"), *FAST, *options, f"--out_dir={tmp_path}", cwd=workspace)
    for stream in ("train", "val"):
        assert losses(tmp_path, stream)[0] == losses(workspace / "runs/fp32", stream)[0]


@pytest.fixture(scope="session")
def chat_runs(workspace):
    """A model with a tokenizer of its own, fine-tuned, and its last step resumed.  -> the processes"""
    shape = ["--tokenizer=bpe:300", "--n_layer=2", "--n_head=2", "--n_embd=32", "--block_size=128"]
    common = ["--total_batch_size=256", "--max_steps=4", "--device=cpu"]
    base = ["--data=t.txt", *shape, *common, "--hella_interval=0", "--out_dir=chat/base"]
    tune = ["--recipe=sft", "--init_from=chat/base", "--data=pairs.jsonl", *common, "--max_lr=1e-2"]
    sample = ["--ckpt_interval=3", "--sample_interval=4", "--sample_prompt=Who is it?", "--out_dir=chat/tuned"]
    again = ["--resume=chat/tuned/checkpoints/model_000003.pt", "--out_dir=chat/again"]
    return [run_ok(here("train.py"), *options, cwd=workspace) for options in (base, [*tune, *sample], again)]


def test_fine_tuning_uses_the_models_own_tokenizer_and_so_does_a_resumed_run(chat_runs, workspace):
    base, tuned, again = (read_checkpoint(str(workspace / f"chat/{name}/checkpoints/model_000004.pt"))
                          for name in ("base", "tuned", "again"))
    assert base["tokenizer"] == tuned["tokenizer"] == again["tokenizer"] and base["tokenizer"]["name"] == "bpe:300"
    assert (workspace / "data/t-bpe300/meta.json").exists()  # of t.txt, on its first use
    template = dataset.chat_template(get_tokenizer("byte"))
    assert (base["template"], tuned["template"], again["template"]) == (None, template, template)
    assert losses(workspace / "chat/again") == losses(workspace / "chat/tuned")[3:]
    assert "sample at step 4: Who is it?\n" in chat_runs[1].stdout


def test_a_checkpoint_is_plain_data_and_the_whole_run(workspace):
    ckpt = torch.load(workspace / CKPT, weights_only=True)
    assert ckpt.keys() == {
        "version", "step", "run", "model", "optimizers", "scaler", "loader", "micro_batch", "model_config",
        "train_config", "tokenizer", "template", "data_fingerprint"}
    assert ckpt["step"] == ckpt["run"]["step"] == 30 and ckpt["run"]["tokens"] == 30 * 256
    assert ckpt["loader"] == {"position": 30 * 8}
    assert {"transformer.wte.weight", "transformer.h.0.attn.c_attn.weight", "lm_head.weight"} <= set(ckpt["model"])


def moments_of(ckpt):
    return ckpt["optimizers"][0]["state"][0]


@pytest.mark.parametrize("change", [
    lambda c: moments_of(c).update(exp_avg=torch.tensor(0.0)), lambda c: moments_of(c).pop("exp_avg_sq"),
    lambda c: moments_of(c).update(step=torch.zeros(2)), lambda c: c["run"].update(recent=[[]]),
    lambda c: c["run"].update(recent=[(math.inf, 1.0)]), lambda c: c["run"].update(seconds=math.nan),
    lambda c: c["loader"].update(position=2**62), lambda c: c.update(scaler=dict(scale="x")),
    lambda c: c["run"].update(wandb_id=functools.reduce(lambda nested, _: [nested, nested], range(40), [])),
    lambda c: c["train_config"].update(tokenizer="bpe:" + "9" * 5000, epochs=1e308, max_steps=0)])
def test_a_strangers_state_of_a_run_is_checked(workspace, tmp_path, change):
    ckpt = torch.load(workspace / "runs/fp32/checkpoints/model_000030.pt")
    change(ckpt)
    torch.save(ckpt, tmp_path / "model_000030.pt")
    options = [f"--resume={tmp_path}/model_000030.pt", "--data=data/t", "--max_steps=31", f"--out_dir={tmp_path}/run"]
    if ckpt["scaler"]:
        options.append("--dtype=float16")
    if ckpt["train_config"]["epochs"]:
        options.remove("--max_steps=31")
    r = script(here("train.py"), *options, cwd=workspace)
    assert r.returncode == 1 and r.stderr.count("\n") == 1 and "model_000030.pt" in r.stderr, r.stderr


@pytest.mark.parametrize("change, error", [
    (lambda c: c["model"].update({k: v.long() for k, v in c["model"].items()}), "is of type torch.int64"),
    (lambda c: c["model"].update({k: torch.zeros(384 * 32)[:v.numel()].view(v.shape) if i == 0 else
                                  c["model"]["transformer.wte.weight"].flatten()[:v.numel()].view(v.shape)
                                  for i, (k, v) in enumerate(c["model"].items())}), "is damaged .ValueError."),
    (lambda c: c.update(version=[[1] * 99] * 99), "is damaged .TypeError."),
    (lambda c: c.update(tokenizer={"name": "byte", "special": [f"<{i}>" for i in range(900)] + [EOT]}),
     "tokens, but its tokenizer has 1,157")], ids=str)
def test_a_strangers_weights_are_checked(workspace, tmp_path, change, error):
    ckpt = torch.load(workspace / "runs/fp32/checkpoints/model_000030.pt")
    change(ckpt)
    torch.save(ckpt, tmp_path / "model.pt")
    with pytest.raises(UserError, match=error):
        load_checkpoint(str(tmp_path / "model.pt"))


def test_a_file_in_which_torch_and_python_find_different_records_is_refused(tmp_path):
    def pack(tensor, compression, first):
        """-> the records, and their list as it is if the first is at this offset of a file"""
        buffer, packed = io.BytesIO(), io.BytesIO()
        torch.save({"w": tensor}, buffer)
        with zipfile.ZipFile(buffer) as archive, zipfile.ZipFile(packed, "w") as out:
            packed.write(b" " * first)
            for record in archive.infolist():
                out.writestr(record.filename, archive.read(record), compression)
            start = packed.tell()
        return packed.getvalue()[first:start], packed.getvalue()[start:-22]

    records, listed = pack(torch.zeros(4), zipfile.ZIP_STORED, 0)
    n, size = listed.count(b"PK\1\2"), len(listed)
    bomb, hidden = pack(torch.ones(10**6), zipfile.ZIP_DEFLATED, len(records))
    start = len(records) + len(bomb)

    def end(offset, n_after):
        return struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, n, n, size, offset, n_after)

    alone = b"".join(pack(torch.ones(10**6), zipfile.ZIP_DEFLATED, 0))
    files = {"after": records + bomb + listed + end(start + size + 22, len(hidden)) + hidden,
             "no zip for Python": alone + end(len(alone) - size, 0) + b"PK\5\6xxxxx"}
    for name, content in files.items():
        (tmp_path / f"{name}.pt").write_bytes(content)
        with pytest.raises(UserError, match="is not a checkpoint, or is damaged"):
            read_checkpoint(str(tmp_path / f"{name}.pt"))


def test_a_checkpoint_cannot_ask_for_a_large_piece_of_memory(workspace, tmp_path):
    class Large:
        def __reduce__(self):
            return bytearray, (10**6,)

    ckpt = torch.load(workspace / CKPT)
    torch.save({**ckpt, "more": Large()}, tmp_path / "model.pt")
    assert torch.load(tmp_path / "model.pt", weights_only=True)["more"] == bytes(10**6)
    with pytest.raises(UserError, match="is not a checkpoint, or is damaged .ValueError."):
        read_checkpoint(str(tmp_path / "model.pt"))


def test_finite_weights_whose_logits_are_not_are_reported():
    model = lively()
    model.lm_head.weight.data *= 1e38
    with pytest.raises(UserError, match="the model's output is not finite"):
        model.generate(torch.tensor([[1, 2]]), 3)


def test_the_divisors_of_a_large_number_are_found_at_once():
    assert train.divisors(12) == [1, 2, 3, 4, 6, 12] and len(train.divisors(2**40)) == 41


def test_a_resumed_run_takes_nothing_but_known_and_checked_hyperparameters_from_a_checkpoint(workspace, tmp_path):
    ckpt = read_checkpoint(str(workspace / CKPT))
    hostile = dict(bench="ladder", __file__="evil.py", out_dir=str(tmp_path / "elsewhere"), log="x", run={}, print=1,
                   data="data/other", init_from="x.pt", config="c.json", dry_run=True, teacher="",
                   new_data=True)
    ckpt["train_config"] |= hostile
    torch.save(ckpt, tmp_path / "hostile.pt")
    options = [f"--resume={tmp_path}/hostile.pt", "--data=data/t", "--max_steps=31", f"--out_dir={tmp_path}/run"]
    assert not train.configure(options)[0]["new_data"]
    run_ok(here("train.py"), *options, cwd=workspace)
    assert len(losses(tmp_path / "run")) == 1 and not (tmp_path / "elsewhere").exists()
    for change, error in (
            (dict(max_lr="a lot"), "'a lot' is not a number"), (dict(seed=-1), "seed=-1 is below 0"),
            (dict(recipe="../x"), "with an unknown recipe"), (dict(dtype="int8"), "invalid choice: 'int8'"),
            (None, "is not a checkpoint")):
        train_config = {**ckpt["train_config"], **change} if change else ["no dict"]
        torch.save({**ckpt, "train_config": train_config}, tmp_path / "hostile.pt")
        r = script(here("train.py"), *options, cwd=workspace)
        assert r.returncode == 1 and error in r.stderr and len(r.stderr.splitlines()) == 1, r.stderr


def test_a_checkpoint_of_an_older_version_is_refused_in_one_line(workspace, tmp_path):
    torch.save({**read_checkpoint(str(workspace / CKPT)), "version": 1}, tmp_path / "old.pt")
    for name, option in (("eval.py", "--ckpt"), ("train.py", "--resume")):
        r = script(here(name), f"{option}={tmp_path}/old.pt", cwd=workspace)
        assert r.returncode == 1 and r.stderr.endswith("has checkpoint version 1; this program reads version 2\n")


def test_the_newest_checkpoints_and_the_best_one_stay(workspace, tmp_path):
    options = ["--max_lr=3", "--grad_clip=0", "--warmup_steps=20", "--val_interval=2", "--keep=2"]
    run_ok(here("train.py"), *FAST, *options, f"--out_dir={tmp_path}", cwd=workspace)
    values = losses(tmp_path, "val")[1:]
    best = 2 + 2 * values.index(min(values))
    assert best < 28, "the run was meant to get worse at the end"
    assert sorted(os.listdir(tmp_path / "checkpoints")) == [f"model_{s:06d}.pt" for s in (best, 28, 30)]


@pytest.mark.parametrize("sig", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_step_saves_and_exits(workspace, tmp_path, sig):
    command = [sys.executable, here("train.py"), *FAST, "--max_steps=100000", "--ckpt_interval=0"]
    p = subprocess.Popen([*command, f"--out_dir={tmp_path}"], cwd=workspace, stdout=subprocess.DEVNULL,
                         stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "log.txt").exists() or ("train", 3) not in records(tmp_path):
        assert p.poll() is None
        time.sleep(0.02)
    p.send_signal(sig)
    assert p.wait(60) == 128 + sig and "Traceback" not in p.stderr.read()
    ckpt = read_checkpoint(find_checkpoints(str(tmp_path))[-1])
    assert ckpt["step"] == max(step for _, step in records(tmp_path)) + 1


@pytest.mark.parametrize("sig, before, steps", [
    ("SIGUSR1", "SIG_DFL", 4), ("SIGHUP", "SIG_DFL", 4), ("SIGHUP", "SIG_IGN", 6)])
def test_slurms_warning_and_a_closed_terminal_end_a_run_unless_it_is_under_nohup(
        workspace, tmp_path, sig, before, steps):
    send = f"""
import signal
from data_loader import DataLoader
signal.signal(signal.{sig}, signal.{before})
next_batch, calls = DataLoader.next_batch, []
def send(loader):
    calls.append(1)
    if len(calls) == 4:
        signal.raise_signal(signal.{sig})
    return next_batch(loader)
DataLoader.next_batch = send
"""
    options = [*FAST, "--max_steps=6", "--ckpt_interval=5", f"--out_dir={tmp_path}"]
    r = script(here("train.py"), *options, cwd=workspace, before=send)
    assert r.returncode == (128 + getattr(signal, sig) if steps < 6 else 0) and len(losses(tmp_path)) == steps
    assert checkpoint_step(find_checkpoints(tmp_path)[-1]) == steps


def test_init_from_starts_with_the_weights_and_the_shape_of_a_checkpoint(workspace, tmp_path):
    options = [a for a in FAST if not a.startswith(("--n_", "--block_size", "--dropout"))]
    options += [f"--init_from={CKPT}", "--dropout=0.5", "--max_steps=1", f"--out_dir={tmp_path}"]
    run_ok(here("train.py"), *options, cwd=workspace)
    assert losses(tmp_path, "val")[0] == losses(workspace / "runs/fp32", "val")[-1]
    ckpt = read_checkpoint(str(tmp_path / "checkpoints/model_000001.pt"))
    assert (ckpt["model_config"]["block_size"], ckpt["model_config"]["dropout"]) == (32, 0.5)
    assert ckpt["train_config"]["n_embd"] == 32


def test_resuming_takes_new_settings_of_the_optimizer_and_another_dropout(workspace, tmp_path):
    options = [f"--resume={CKPT}", "--data=data/t", "--max_steps=31", "--weight_decay=0.7", "--val_interval=0"]
    run_ok(here("train.py"), *options, "--dropout=0.6", f"--out_dir={tmp_path}", cwd=workspace)
    assert os.listdir(tmp_path / "checkpoints") == ["model_000031.pt"]  # what was resumed from is not saved again
    ckpt = read_checkpoint(str(tmp_path / "checkpoints/model_000031.pt"))
    decayed, others = ckpt["optimizers"][0]["param_groups"]
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.7, 0.0)
    assert ckpt["model_config"]["dropout"] == 0.6
    assert {len(ckpt["model"][k].shape) for k in ckpt["model"]} == {1, 2}
    last_val = losses(workspace / "runs/fp32", "val")[-1]  # none came after it
    assert ckpt["run"]["last_val"]["loss"] == pytest.approx(last_val, abs=1e-6)


@pytest.mark.parametrize("amp, auto, expected", [
    (torch.float32, torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.bfloat16, torch.bfloat16), (torch.float16, torch.float16, torch.float32)], ids=str)
def test_muon_computes_in_bfloat16_unless_training_is_in_float32_or_the_device_has_none(
        monkeypatch, amp, auto, expected):
    set_globals(monkeypatch, optimizer="muon")
    monkeypatch.setattr(train, "pick_dtype", lambda name, device: auto)
    assert train.make_optimizers(GPT(small()), torch.device("cpu"), amp)[0].dtype == expected


@pytest.mark.parametrize("amp, expected", [(torch.float32, "float32"), (torch.float16, "auto")], ids=str)
def test_a_teacher_computes_in_float32_if_training_does(monkeypatch, amp, expected):
    asked = []
    set_globals(monkeypatch, teacher="base", block_size=16)
    monkeypatch.setattr(train, "open_model", lambda name, device, dtype: asked.append(dtype) or (
        GPT(small()), dict(tokenizer=None)))
    train.open_teacher(torch.device("cpu"), amp)
    assert asked == [expected]


def test_weight_decay_takes_matrices_and_leaves_biases_and_norms():
    optimizer, = train.make_optimizers(GPT(small()), torch.device("cpu"), torch.float32)
    dims = [{p.dim() for p in group["params"]} for group in optimizer.param_groups]
    assert dims == [{2}, {1}] and [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]


@pytest.mark.parametrize("parallel, offline", [("ddp", False), ("zero2", False), ("ddp", True)], ids=str)
def test_hellaswag_is_scored_while_training_unless_it_cannot_be_had(workspace, tmp_path, parallel, offline):
    if not offline:  # a local folder of that name takes the place of the hub's
        (tmp_path / "Rowan/hellaswag").mkdir(parents=True)
        (tmp_path / "Rowan/hellaswag/validation.jsonl").write_text(json.dumps(EXAMPLE) + "\n")
    options = [f"--data={workspace}/data/t", "--hella_interval=2", "--max_steps=3", f"--parallel={parallel}"]
    env = dict(HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "cache"))
    r = run_ok(here("train.py"), *FAST, *options, "--out_dir=o", n=2, cwd=tmp_path, **env)
    steps = sorted(step for stream, step in records(tmp_path / "o") if stream == "hella")
    assert steps == ([] if offline else [0, 2, 3]) and ("no HellaSwag" in r.stdout) == offline
    assert len(losses(tmp_path / "o")) == 3


def test_the_hellaswag_score_of_a_run_is_that_by_token(monkeypatch):
    set_globals(monkeypatch, val_interval=0, sample_interval=0, hella_interval=1, max_steps=9)
    monkeypatch.setattr(hellaswag, "score", lambda *args: (1, 2, 3, 0, 0, 4))  # right: plain, by token, by byte
    run, logged = train.new_run(), {}
    log = argparse.Namespace(record=lambda stream, value, text, **fields: logged.update(fields, value=value))
    run["step"] = 7
    assert train.evaluate(run, log, GPT(small()), {}, None, [EXAMPLE], None, None, 1, 0, 1)
    assert (run["hella"], run["hella_step"]) == (0.5, 7)
    assert logged == dict(value=0.5, acc="0.2500", by_byte="0.7500", examples=4)


@pytest.mark.parametrize("use", [
    hellaswag.download, lambda: dataset.prepare("hf:a/b", "byte"), lambda: dataset.prepare("t.parquet", "byte")],
    ids=["HellaSwag", "the hub", "parquet"])
def test_what_needs_the_package_datasets_says_so(monkeypatch, tmp_path, use):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "datasets", None)  # importing it fails
    with pytest.raises(UserError, match="needs: pip install datasets"):
        use()


def muon_steps(make_optimizer, grads):
    """grads (steps, n, rows, columns) -> what these steps make of n matrices of ones"""
    params = [torch.nn.Parameter(torch.ones(grads.shape[2:])) for _ in grads[0]]
    o = make_optimizer(params)
    for step in grads:
        for p, grad in zip(params, step):
            p.grad = grad.clone()
        o.step()
    return torch.stack([p.detach() for p in params])


def our_muon(parts, dtype):
    return lambda params: train.Muon([dict(params=params, parts=parts)], lr=0.02, weight_decay=0.1, dtype=dtype)


@pytest.mark.parametrize("shape", [(24, 24), (24, 96), (96, 24)])
def test_muon_takes_the_steps_of_torchs_muon(shape):
    def torchs(params):
        return torch.optim.Muon(params, lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")

    grads = torch.randn(3, 2, *shape, generator=torch.Generator().manual_seed(0))
    ours, theirs = (muon_steps(o, grads) - 1 for o in (our_muon(1, torch.bfloat16), torchs))
    assert (ours - theirs).norm() < 0.02 * theirs.norm()  # both round to bfloat16, in another order


def test_muon_treats_q_k_and_v_as_three_matrices():
    grads = torch.randn(3, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    apart = muon_steps(our_muon(1, torch.float32), grads)
    joined = muon_steps(our_muon(3, torch.float32), grads.flatten(1, 2)[:, None])
    assert torch.allclose(joined[0], apart.flatten(0, 1), atol=1e-6)


def test_muon_has_the_blocks_matrices_and_a_rate_and_momentum_on_schedule(monkeypatch):
    set_globals(monkeypatch, optimizer="muon", max_lr=4e-3, muon_lr=2e-2, min_lr=0.0, warmup_steps=10, max_steps=1000,
                schedule="wsd", cooldown=0.5)
    muon, adamw = optimizers = train.make_optimizers(GPT(small()), torch.device("cpu"), torch.float32)
    assert [group["parts"] for group in muon.param_groups] == [3, 1, 1, 1]  # q, k and v; the others
    rates = {step: train.set_rates(optimizers, step) for step in (4, 150, 300, 750)}
    assert rates == pytest.approx({4: 2e-3, 150: 4e-3, 300: 4e-3, 750: 2e-3})
    assert {group["lr"] for group in adamw.param_groups} == {rates[750]}
    assert [group["lr"] for group in muon.param_groups] == pytest.approx([1e-2] * 4)
    assert {group["momentum"] for group in muon.param_groups} == {0.95}
    train.set_rates(optimizers, 150)
    assert [group["momentum"] for group in muon.param_groups] == pytest.approx([0.9] * 4)


@pytest.mark.parametrize("shape", [(2, 24, 96), (2, 96, 24)])
def test_orthogonalize_maps_each_singular_value_by_five_quintics(shape):
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64)
    u, s, v = torch.linalg.svd(x, full_matrices=False)
    s = s / s.norm(dim=-1, keepdim=True)
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    assert torch.allclose(train.orthogonalize(x), u @ s.diag_embed() @ v)
    assert 0.6 < s.min() and s.max() < 1.3


# 9 matrices q, k, v: of two processes, one has 5, the other 4. Of a step's 6 sequences each has as many.
MUON = [*NO_DROPOUT, "--optimizer=muon", "--n_layer=3", "--total_batch_size=192"]


@pytest.fixture(scope="session")
def one_process_with_muon(workspace):
    run_ok(here("train.py"), *MUON, "--out_dir=runs/muon", cwd=workspace)
    return workspace / "runs/muon"


def test_muon_lowers_the_loss(one_process_with_muon):
    values = losses(one_process_with_muon)
    assert values[-1] < values[0] - 0.3


@pytest.mark.parametrize("n, parallel", [(2, "ddp"), (2, "zero2"), (3, "zero3")])
def test_processes_with_muon_give_the_losses_of_one(workspace, one_process_with_muon, tmp_path, n, parallel):
    run_ok(here("train.py"), *MUON, f"--parallel={parallel}", f"--out_dir={tmp_path}", n=n, cwd=workspace)
    assert_same_losses(tmp_path, one_process_with_muon)


def test_with_max_minutes_the_schedule_follows_the_clock(monkeypatch):
    set_globals(monkeypatch, max_minutes=2, max_steps=0)
    run = dict(train.new_run(), step=10, seconds=60.0)
    assert train.steps_in_time(run, [9.0, 0.5, 0.5], "cpu") == 10 + 60 / 0.5
    for times in ([], [9.0], [9.0, 9.0]):
        assert train.steps_in_time(run, times, "cpu") == 20  # resumed: as fast as until now
    assert train.steps_in_time(dict(run, seconds=120.1), [0.5], "cpu") == 10
    for step, times in ((1, [9.0]), (2, [9.0, 0.5])):  # a slow first step says nothing about the others
        assert train.steps_in_time(dict(run, step=step, seconds=sum(times)), times, "cpu") == train.UNKNOWN_STEPS
        assert train.steps_in_time(dict(run, step=step, seconds=120.1), times, "cpu") == step
    assert train.steps_in_time(dict(run, step=0, seconds=0.0), [], "cpu") == train.UNKNOWN_STEPS


def test_a_yaml_config_that_contains_itself_is_refused(tmp_path):
    pytest.importorskip("yaml")
    (tmp_path / "c.yaml").write_text("max_lr: 1e-3\nloop: &loop\n  loop: *loop\n")
    with pytest.raises(UserError, match="c.yaml: loop is of type dict"):
        train.configure([f"--config={tmp_path / 'c.yaml'}"])


def test_what_is_said_last_about_the_length_of_a_run_counts(tmp_path):
    def length(*options):
        settings = train.configure(list(options))[0]
        return settings["max_steps"], settings["epochs"], settings["max_minutes"]

    (tmp_path / "c.json").write_text('{"max_minutes": 2}')
    file = f"--config={tmp_path}/c.json"
    assert length("--recipe=tiny", file) == (0, 0, 2) and length(file, "--max_steps=5") == (5, 0, 0)
    assert length(file, "--epochs=1") == (0, 1, 0) and length("--recipe=tiny", "--epochs=1") == (0, 1, 0)


def test_a_run_of_max_minutes_ends_with_its_schedule_and_a_line_of_json(workspace, tmp_path):
    options = [o for o in FAST if "max_steps" not in o]
    options += ["--max_lr=1e-3", "--min_lr=0", "--warmup_steps=2", "--max_minutes=0.02", f"--out_dir={tmp_path}"]
    r = run_ok(here("train.py"), *options, cwd=workspace)
    last = json.loads(r.stdout.splitlines()[-1])
    rates = [float(re.search(r"lr=(\S+)", line)[1]) for line in (tmp_path / "log.txt").read_text().splitlines()
             if " train " in line]
    assert last["step"] == len(rates) > 5 and rates[-1] < 0.2e-3 and max(rates) == 1e-3
    assert last["val_loss"] == pytest.approx(losses(tmp_path, "val")[-1], abs=1e-4) and last["tokens"] > 0
    again = run_ok(here("train.py"), *options, "--resume", "--max_minutes=0.03", cwd=workspace)
    assert json.loads(again.stdout.splitlines()[-1])["step"] > last["step"]


def test_resuming_from_an_older_checkpoint_sets_the_later_ones_aside(workspace, tmp_path):
    shutil.copytree(workspace / "runs/fp32/checkpoints", tmp_path / "checkpoints")
    options = [f"--resume={tmp_path}/checkpoints/model_000028.pt", "--data=data/t", "--max_steps=29"]
    run_ok(here("train.py"), *options, f"--out_dir={tmp_path}", cwd=workspace)
    assert {"model_000029.pt", "model_000030.1.pt"} <= set(os.listdir(tmp_path / "checkpoints"))
    assert find_checkpoints(str(tmp_path))[-1].endswith("29.pt")


def test_checkpoints_are_ordered_by_step_not_by_letters(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    for name in ("model_999000.pt", "model_1000000.pt", "model_1001000.pt.tmp", "notes.pt"):
        (tmp_path / "checkpoints" / name).touch()
    names = [os.path.basename(path) for path in find_checkpoints(str(tmp_path))]
    assert names == ["model_999000.pt", "model_1000000.pt"]


def test_the_first_id_outside_of_the_vocabulary_is_refused(tmp_path):
    dataset.write_shard(str(tmp_path / "train_000000.bin"), [64] * 40)
    DataLoader(str(tmp_path), "train", 1, 8, vocab_size=65).next_batch()
    with pytest.raises(UserError, match="token 64 at .* is outside the vocabulary of 64"):
        DataLoader(str(tmp_path), "train", 1, 8, vocab_size=64).next_batch()


def test_shards_from_elsewhere_of_another_length_are_other_data(tmp_path):
    found = set()
    for n in (40, 41):
        dataset.write_shard(str(tmp_path / "train_000000.bin"), [1] * n)
        found.add(DataLoader(str(tmp_path), "train", 1, 8).rows.fingerprint())
    assert len(found) == 2


def test_a_document_of_shards_from_elsewhere_begins_with_gpt2s_end_of_text(tmp_path):
    dataset.write_shard(str(tmp_path / "train_000000.bin"), [50256, 1, 2, 50256, 3, 50256, 4, 5, 6])
    *_, document = DataLoader(str(tmp_path), "train", 1, 8, doc_mask=True).next_batch()
    assert document.tolist() == [[1, 1, 1, 2, 2, 3, 3, 3]]


def test_a_window_may_fill_its_split_but_not_exceed_it(tmp_path):
    dataset.write_shard(str(tmp_path / "train_000000.bin"), range(9))
    assert len(DataLoader(str(tmp_path), "train", 1, 8).rows) == 1
    with pytest.raises(UserError, match="has 9 tokens; a window takes block_size [+] 1 = 10"):
        DataLoader(str(tmp_path), "train", 1, 9)


def test_a_shard_that_is_longer_than_its_manifest_says_is_refused(tmp_path):
    folder = prepare(tmp_path, write_text(tmp_path / "t.txt", stories(9)), "byte")
    path = os.path.join(folder, "train_000000.bin")
    dataset.write_shard(path, [*dataset.read_shard(path), 5])
    with pytest.raises(UserError, match="meta.json says"):
        DataLoader(folder, "train", 1, 8)


def test_a_shard_that_is_written_again_with_other_tokens_has_changed(shards, tmp_path):
    shutil.copytree(shards, tmp_path / "a")
    loader, path = DataLoader(str(tmp_path / "a"), "val", 1, 16), tmp_path / "a/val_000000.bin"
    os.utime(path, ns=(0, 0))
    with pytest.raises(UserError, match="has changed since"):
        loader.next_batch()


def test_pairs_that_are_cut_fill_no_more_than_their_rows(tmp_path):
    path = write_lines(tmp_path / "p.jsonl", [dict(prompt="a" * 500, response="b" * 500) for _ in range(20)])
    rows = PackedPairs(Pairs(path, get_tokenizer("byte")), "train", 64)
    assert " 18 rows, 100.0% filled; 18 pairs are longer" in rows.summary()


def test_the_split_of_a_shard_from_elsewhere_is_a_word_in_its_name(tmp_path):
    for name in ("retrieval_train_0.bin", "train001.npy", "xval.bin", "fineweb_val_0.bin", "val.bin", "val.txt"):
        (tmp_path / name).touch()
    found = {split: [os.path.basename(path) for path in data_loader.find_shards(str(tmp_path), split)[0]]
             for split in ("train", "val")}
    assert found == dict(train=["retrieval_train_0.bin", "train001.npy"], val=["fineweb_val_0.bin", "val.bin"])


def test_llmc_shards_from_elsewhere_train(shards, tmp_path):
    options = [f"--data={shards}", "--max_steps=3", "--vocab_size=50304", "--out_dir=o"]
    r = run_ok(here("train.py"), *FAST, *options, cwd=tmp_path)
    assert "no manifest" in r.stdout and len(losses(tmp_path / "o")) == 3


SHRUNK = ["--n_layer=2", "--n_head=2", "--n_embd=64", "--block_size=64", "--vocab_size=0", "--total_batch_size=256",
          "--max_steps=5", "--warmup_steps=2", "--data=data/t", "--val_interval=5", "--val_tokens=500",
          "--ckpt_interval=3", "--sample_interval=5", "--hella_interval=0", "--log_interval=1"]


@pytest.fixture(scope="session")
def recipes(tmp_path_factory):
    """
    Every recipe, shrunk: 5 steps with a sample, the last two again from a checkpoint, and a prompt to eval.py; at full
    size, a dry run.  -> the folder, and {recipe: the four processes}
    """
    folder = tmp_path_factory.mktemp("recipes")
    path = write_text(folder / "t.txt", stories(100))
    dataset.prepare(path, "byte", out=str(folder / "data/t"), splits="80/10/10")

    def make(name):
        commands = (
            ["train.py", f"--recipe={name}", *SHRUNK, f"--out_dir={name}"],
            ["train.py", f"--resume={name}/checkpoints/model_000003.pt", "--data=data/t", f"--out_dir={name}/again"],
            ["eval.py", f"--ckpt={name}/checkpoints/model_000005.pt", "--prompt=Once", "--max_new_tokens=5"],
            ["train.py", f"--recipe={name}", "--dry_run"])
        return [run_ok(here(command[0]), *command[1:], cwd=folder) for command in commands]

    return folder, dict(zip(train.RECIPES, BOTH_CORES.map(make, train.RECIPES)))


PUBLISHED = {
    "gpt2": 124_475_904, "gpt-xs": 124_082_688, "gpt2-custom": 124_475_904, "custom-gpt": 91_411_200,
    "toygpt-small": 123_703_633, "toygpt-medium": 253_055_057, "toygpt-large": 1_311_579_217,
    "tinystories": 162_419_712, "tinystories-small": 49_287_168, "tinystories-large": 405_688_320, "tiny": 1_311_872,
    "sft": 124_475_904, "speedrun": 162_220_800, "shakespeare": 836_736}
each_recipe = pytest.mark.parametrize("name", train.RECIPES)


@each_recipe
def test_a_recipe_trains_and_prints_a_sample(recipes, name):
    folder, done = recipes
    assert len(losses(folder / name)) == 5 and "sample at step 5: " in done[name][0].stdout
    assert done[name][2].stdout.startswith("Once")


@each_recipe
def test_a_recipe_resumes_with_identical_losses(recipes, name):
    assert losses(recipes[0] / name / "again") == losses(recipes[0] / name)[3:]


@each_recipe
def test_a_recipes_dry_run_prints_its_parameters_and_cost(recipes, name):
    plan = recipes[1][name][3].stdout
    line = re.search(r"parameters: (.*)\n", plan)[1]
    counts = {k: int(v.replace(",", "")) for k, v in (part.split(" ") for part in line.split(", "))}
    assert list(counts) == ["embeddings", "positions", "attention", "feed-forward", "norms", "head", "total"]
    assert 2 * counts["total"] == sum(counts.values()) and counts["total"] == PUBLISHED[name]
    assert re.search("once the data is prepared" if name == "sft" else r"cost: .* A100", plan)


def test_the_test_split_is_measured_in_full_and_only_at_the_end(recipes):
    folder = recipes[0]
    n_windows = (len(read_split(folder / "data/t", "test")) - 1) // 64
    found = {step: line for (stream, step), line in records(folder / "toygpt-small").items() if stream == "test"}
    assert list(found) == [5] and found[5].endswith(f"tokens={n_windows * 64}")


def test_float16_trains_with_a_scaler_that_checkpoints_keep(workspace, tmp_path):
    options = [*FAST, "--dtype=float16", "--max_steps=5", f"--out_dir={tmp_path}"]
    run_ok(here("train.py"), *options, cwd=workspace)
    ckpt = read_checkpoint(find_checkpoints(str(tmp_path))[-1])
    assert ckpt["train_config"]["dtype"] == "float16" and ckpt["scaler"]["_growth_tracker"] == 5
    norms = [float(re.search(r"norm=(\S+)", records(folder)["train", 0])[1])  # 65,536 times as large while scaled
             for folder in (tmp_path, workspace / "runs/fp32")]
    assert norms[0] == pytest.approx(norms[1], rel=0.2)
    run_ok(here("train.py"), "--resume", "--data=data/t", "--max_steps=7", f"--out_dir={tmp_path}", cwd=workspace)
    assert read_checkpoint(find_checkpoints(str(tmp_path))[-1])["scaler"]["_growth_tracker"] == 7


def test_a_recipes_float16_becomes_float32_on_a_cpu_that_is_slow_in_it(recipes):
    is_slow = not model_file.cpu_computes_in(torch.float16)
    for r in recipes[1]["custom-gpt"][:2]:
        assert ("training in float32: this CPU" in r.stdout) == is_slow
    ckpt = read_checkpoint(str(recipes[0] / "custom-gpt/checkpoints/model_000005.pt"))
    assert bool(ckpt["scaler"]) != is_slow and ckpt["train_config"]["dtype"] == "float16"


def test_the_last_words_of_a_run_say_how_to_go_on(recipes):
    *_, try_it, result = recipes[1]["tinystories"][0].stdout.splitlines()
    assert try_it == "tinystories/checkpoints/model_000005.pt; to try it: python eval.py --out_dir=tinystories"
    result = json.loads(result)
    assert result["step"] == 5 and result["tokens"] == 5 * 256 and result["usd"] == 0 and result["hellaswag"] is None


def test_a_decay_as_long_as_the_run_begins_at_the_end_of_the_warm_up(monkeypatch):
    set_globals(monkeypatch, schedule="wsd", max_lr=1.0, min_lr=0.0, warmup_steps=10, max_steps=100, cooldown=1.0)
    assert [train.get_lr(step) for step in (9, 10, 55, 100)] == [1.0, 1.0, 0.5, 0.0]


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_with_max_minutes_the_warm_up_takes_at_most_a_tenth(monkeypatch, schedule):
    set_globals(monkeypatch, schedule=schedule, max_lr=1.0, min_lr=0.0, warmup_steps=715, max_steps=100, max_minutes=1)
    assert [train.get_lr(step) for step in (0, 9, 100)] == [0.1, 1.0, 0.0]
    set_globals(monkeypatch, max_minutes=0)
    assert train.get_lr(9) == 10 / 715


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_the_learning_rate_rises_from_above_zero_and_ends_at_its_minimum(monkeypatch, schedule):
    set_globals(monkeypatch, schedule=schedule, max_lr=1.0, min_lr=0.1, warmup_steps=10, max_steps=100, cooldown=0.4)
    rates = [train.get_lr(step) for step in range(101)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == 1.0 and rates[100] == pytest.approx(0.1)
    assert all(a >= b for a, b in zip(rates[9:], rates[10:]))
    assert rates[55] == (1.0 if schedule == "wsd" else pytest.approx(0.55))
    assert schedule == "cosine" or rates[80] == pytest.approx(0.55)


def test_the_command_line_wins_over_the_config_file_over_the_recipe(tmp_path):
    (tmp_path / "c.json").write_text('{"warmup_steps": 5, "max_lr": 1e-3, "total_batch_size": 1e6, "tf32": false}')
    options = [f"--config={tmp_path}/c.json", "--max_lr=2e-3", "--seed", "1_000", "--deterministic"]
    settings, asked, _ = train.configure(["--recipe", "tiny", *options])
    chosen = dict(recipe="tiny", config=f"{tmp_path}/c.json", warmup_steps=5, total_batch_size=1_000_000, tf32=False,
                  max_lr=2e-3, seed=1000, deterministic=True)
    assert settings == {**train.SETTINGS, **train.RECIPES["tiny"], **chosen}
    assert "tokenizer" not in asked and asked["warmup_steps"] == 5
    assert all(type(settings[name]) is type(default) for name, default in train.SETTINGS.items())


def test_epochs_from_a_later_layer_replace_the_steps(tmp_path):
    (tmp_path / "c.json").write_text('{"max_steps": 100}')
    for options, expected in (
            (["--epochs=2"], (2, 0)), (["--recipe=tinystories", "--max_steps=7"], (20, 7)),
            ([f"--config={tmp_path}/c.json"], (0, 100)), ([f"--config={tmp_path}/c.json", "--epochs=3"], (3, 0))):
        settings, _, _ = train.configure(options)
        assert (settings["epochs"], settings["max_steps"]) == expected


def test_help_lists_every_hyperparameter_with_its_comment_and_default(tmp_path):
    text = " ".join(run_ok(here("train.py"), "--help", cwd=tmp_path, COLUMNS="500").stdout.split())
    missing = [name for name, default in train.SETTINGS.items()
               if not re.search(rf"--{name} \S+ .{{3,}}? \(default: {re.escape(repr(default))}\)", text)]
    assert missing == [] and "--warmup_steps INT of linear warm-up (default: 715)" in text


def test_a_dry_run_counts_parameters_and_touches_nothing(tmp_path):
    r = run_ok(here("train.py"), "--dry_run", cwd=tmp_path)
    assert "124,475,904" in r.stdout and os.listdir(tmp_path) == []
    assert "checkpoints of 1.39 GiB" in r.stdout  # 12 bytes per parameter
    assert "ln(50,304) = 10.83 nats" in r.stdout
    r = run_ok(here("train.py"), "--dry_run", cwd=tmp_path, RANK="3", LOCAL_RANK="3", WORLD_SIZE="8")
    assert "64 sequences" in r.stdout
    r = run_ok(here("train.py"), "--dry_run", "--parallel=zero3", cwd=tmp_path, WORLD_SIZE="8")
    expected = (16 / 8 + 4) * 124_475_904 / 2**30  # shares, and all weights for evaluation
    assert f"memory: {expected:.2f} GiB per process" in r.stdout


def test_a_dry_run_knows_shards_without_a_manifest_and_what_a_resumed_run_has_read(workspace, tmp_path):
    (tmp_path / "data").mkdir()
    dataset.write_shard(str(tmp_path / "data/train_000000.bin"), np.arange(32 * 100 + 1) % 250)
    shape = [*FAST[1:6], "--dry_run"]
    r = run_ok(here("train.py"), *shape, "--data=data", "--epochs=2", cwd=tmp_path)
    assert "25 steps = 6,400 tokens = 2.00 epochs" in r.stdout
    r = run_ok(here("train.py"), "--resume=runs/fp32", "--data=data/t", "--total_batch_size=512", "--max_steps=40",
               "--dry_run", cwd=workspace)
    assert f"40 steps = {30 * 256 + 10 * 512:,} tokens = " in r.stdout
    options = ["--resume=runs/pairs", "--data=pairs.jsonl", "--teacher=runs/fp32", "--epochs=9", "--dry_run"]
    r = run_ok(here("train.py"), *options, cwd=workspace)
    n_rows = DataLoader(Pairs(str(workspace / "pairs.jsonl"), get_tokenizer("byte")), "train", 1, 32).n_rows
    assert f"run: {30 + math.ceil((9 * n_rows - 30 * 8) / 8)} steps" in r.stdout
    r = run_ok(here("train.py"), "--max_minutes=30", "--usd_per_gpu_hour=3", "--dry_run", cwd=workspace, WORLD_SIZE="8")
    assert "cost: $12.00 at $3 per GPU-hour\n" in r.stdout


def test_a_dry_run_counts_all_splits_of_the_data_and_says_that_a_teacher_is_not_counted(workspace, tmp_path):
    tokens = sum(shard["tokens"] for shard in dataset.read_manifest(str(workspace / "data/t"))["shards"])
    for name, size in (("t", 2 * tokens), ("tinystories", 2 * 470e6)):
        options = [f"--data={workspace}/data/{name}", "--teacher=gpt2-xl", "--dry_run"]
        r = run_ok(here("train.py"), *FAST[1:6], *options, cwd=tmp_path)
        assert float(re.search(r"the data, (\S+) GiB", r.stdout)[1]) == pytest.approx(size / 2**30, abs=0.006)
        assert "the time and memory that gpt2-xl takes are not included" in r.stdout


def test_one_and_a_tenth_epochs_of_a_hundred_rows_are_eleven_steps_of_ten(monkeypatch):
    set_globals(monkeypatch, max_steps=0, max_minutes=0.0, epochs=1.1)
    assert train.count_steps(100, 10) == 11 and train.count_steps(101, 10) == 12


def test_a_dry_run_under_torchrun_names_the_machines_and_times_their_network(tmp_path):
    r = run_ok(here("train.py"), "--recipe=tiny", "--dry_run", "--device=cpu", n=2, cwd=tmp_path)
    assert r.stdout.count("parameters: ") == 1 and os.listdir(tmp_path) == []
    line = re.search(r"network: 2 processes on (\S+); exchanging 0.00 GiB of gradients takes (\S+) s\n", r.stdout)
    assert line[1] == socket.gethostname() and 0 < float(line[2]) < 10


GPT2_MEMORY = dict(n_layer=4, n_head=4, n_embd=256, block_size=256, vocab_size=8192)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape, grad_checkpoint", [
    (GPT2_MEMORY, False), (GPT2_MEMORY, True), ({**GPT2_MEMORY, "n_layer": 8, "vocab_size": 1024}, False),
    ({**GPT2_MEMORY, **model_file.MODERN, "softcap": 15.0}, False)], ids=["gpt2", "checkpointed", "deep", "modern"])
def test_the_memory_that_a_dry_run_predicts_is_what_a_step_takes_within_15_percent(
        monkeypatch, dtype, shape, grad_checkpoint):
    set_globals(monkeypatch, block_size=256, grad_checkpoint=grad_checkpoint)
    model, x = GPT(GPTConfig(**shape, attention="flash")), torch.zeros(8, 256, dtype=torch.long)
    model.grad_checkpoint = grad_checkpoint

    def step():
        with train.autocast(x.device, dtype):
            loss = train.loss_fn(model, None, x, x)
        loss.backward()

    step()  # gradients stay; what a second step takes is freed after it
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as p:
        step()
    sizes = [e.nbytes() for e in p.profiler.kineto_results.events() if e.name() == "[memory]"]
    predicted = 8 * train.activation_bytes(model.cfg, dtype) + train.autocast_bytes(model, dtype)
    assert predicted == pytest.approx(np.cumsum(sizes).max(), rel=0.15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [
    GPT2_MEMORY, {**GPT2_MEMORY, "n_layer": 8, "vocab_size": 1024},
    {**GPT2_MEMORY, **model_file.MODERN, "vocab_size": 1024, "softcap": 15.0}], ids=["gpt2", "deep", "modern"])
def test_compiled_code_keeps_for_the_backward_pass_what_a_dry_run_predicts(monkeypatch, dtype, shape):
    # The partitioner of torch.compile's backend for GPUs, without the compiler, which would take half a minute
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager_decomp_partition"))
    set_globals(monkeypatch, block_size=256, grad_checkpoint=False)
    model, x = GPT(GPTConfig(**shape, attention="flash")), torch.zeros(8, 256, dtype=torch.long)
    model.set_compiled(True)
    weights = [set(p.shape) for p in model.parameters()]  # kept too, but not for each sequence
    kept = {}

    def keep(tensor):
        if set(tensor.shape) not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with train.autocast(x.device, dtype), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        train.loss_fn(model, None, x, x)
    predicted = 8 * train.activation_bytes(model.cfg, dtype, compiled=True)
    assert predicted == pytest.approx(sum(storage.nbytes() for storage in kept.values()), rel=0.1)


def test_a_dry_run_is_for_the_gpus_that_are_named(tmp_path):
    r = run_ok(here("train.py"), "--dry_run", "--gpu=L40S,T4", "--usd_per_gpu_hour=2", cwd=tmp_path)
    flops = float(re.search(r", (\S+) FLOPs", r.stdout)[1])
    costs = re.findall(r"cost: .* on 1 x (\w+) at 40% of its peak, \$([\d,.]+) at \$2 per GPU-hour", r.stdout)
    for (name, cost), (expected, tflops) in zip(costs, [("L40S", 362), ("T4", 65)], strict=True):
        hours = flops / (0.4 * tflops * 1e12) / 3600
        assert name == expected and float(cost.replace(",", "")) == pytest.approx(2 * hours, rel=0.01)


def test_bench_times_training_alone():
    settings = train.configure(["--bench=3"])[0]
    assert not any(value for name, value in settings.items() if name.endswith("_interval"))


def test_bench_prints_one_line_of_json_and_writes_nothing(workspace):
    before = tree(workspace)
    r = run_ok(here("train.py"), *FAST, "--bench=3", cwd=workspace)
    row = json.loads(r.stdout.splitlines()[-1])
    assert {"tok_s", "ms", "mfu", "peak_tflops", "mem_gb"} <= set(row) and row["tok_s"] > 0
    assert tree(workspace) == before


@pytest.mark.parametrize("name, expected", [
    ("aten::_softmax", "attention"), ("aten::_log_softmax", "loss"), ("aten::mm", "matmul"),
    ("void pytorch_flash::flash_fwd_kernel", "attention"), ("triton_red_fused__log_softmax_nll_loss_0", "loss")])
def test_a_profile_knows_what_an_operation_is_for(name, expected):
    assert next(k for k, names in train.WORK.items() if re.search(names, name, re.IGNORECASE)) == expected


@pytest.mark.parametrize("options", [["--patience=2", "--bench=5"], ["--max_steps=5"]], ids=str)
def test_a_profile_is_a_trace_and_says_what_the_steps_spent_their_time_on(workspace, tmp_path, options):
    path = tmp_path / "trace.json"
    r = run_ok(here("train.py"), *FAST, *options, f"--profile={path}", f"--out_dir={tmp_path}", cwd=workspace)
    shares = {k: float(v) for k, v in re.findall(r"(\w+) ([\d.]+)%", r.stdout.split("trace.json: ")[1])}
    assert list(shares) == [*train.WORK, "other", "idle"] and sum(shares.values()) == pytest.approx(100, abs=1)
    assert all(shares[kind] > 0 for kind in ("matmul", "attention", "loss", "optimizer", "other"))
    names = {event.get("name") for event in json.loads(path.read_text())["traceEvents"]}
    assert "aten::_fused_adamw_" in names


def test_a_run_without_steps_left_has_no_profile_and_no_error(workspace, tmp_path):
    options = ["--resume=runs/fp32", "--data=data/t", f"--profile={tmp_path}/trace.json", f"--out_dir={tmp_path}"]
    r = run_ok(here("train.py"), *options, cwd=workspace)
    assert "done at step 30" in r.stdout and not (tmp_path / "trace.json").exists()
    assert "no profile was written: the run ended before its last steps\n" in r.stdout


def test_the_summary_does_not_name_a_best_checkpoint_that_is_in_another_folder(tmp_path, monkeypatch, capsys):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/model_000060.pt").touch()
    set_globals(monkeypatch, patience=3, val_interval=10, max_steps=60, out_dir=str(tmp_path))
    run = {**train.new_run(), "step": 60, "best": dict(step=50, loss=2.0, bpb=1.0)}
    train.print_summary(run, False, "")
    assert "model_000060.pt; to try it: python eval.py --out_dir=" in (printed := capsys.readouterr().out)
    assert "model_000050" not in printed


def test_the_ladder_measures_every_technique_that_is_at_hand_on_top_of_the_others(monkeypatch, capsys, workspace):
    monkeypatch.chdir(workspace)
    monkeypatch.delitem(train.LADDER, "torch.compile")  # takes a minute
    commands = []
    run = argparse.Namespace(run=lambda command, **_: commands.append(command) or script(*command[1:], cwd=workspace))
    set_globals(monkeypatch, block_size=32, subprocess=run)
    train.run_ladder(dict(option.removeprefix("--").split("=") for option in FAST if "dtype" not in option))
    rows = {line[:18].strip(): line[18:].split() for line in capsys.readouterr().out.splitlines()[1:]}
    assert list(rows) == [*train.LADDER, "more GPUs"] and rows["TF32"][0] == rows["more GPUs"][0] == "-"
    for name in ("float32", "fused attention", "vocabulary 50304"):
        assert int(rows[name][0].replace(",", "")) > 0
    assert {"--compile=false", "--attention=fused", "--vocab_size=50304"} <= set(commands[-1])


def test_eight_gpus_for_two_and_a_half_hours_at_20_dollars_50_cost_51_dollars_25(monkeypatch):
    set_globals(monkeypatch, usd_per_gpu_hour=20.50 / 8)
    assert train.dollars(2.5 * 3600, 8) == pytest.approx(51.25)


def test_dollars_of_all_processes_stand_in_the_log_the_summary_and_the_checkpoint(workspace, tmp_path):
    options = ["--max_steps=3", "--usd_per_gpu_hour=1e6", f"--out_dir={tmp_path}"]
    r = run_ok(here("train.py"), *FAST, *options, cwd=workspace, n=2)
    run = read_checkpoint(f"{tmp_path}/checkpoints/model_000003.pt")["run"]
    usd = run["usd"]
    assert usd == pytest.approx(2 * run["seconds"] / 3600 * 1e6) and usd > 0.1
    assert f"usd={usd:.4f}" in (tmp_path / "log.txt").read_text()
    assert re.search(rf"^done at step 3: .*, \${usd:.2f}$", r.stdout, re.MULTILINE)


def test_the_log_has_the_mean_time_of_the_steps_since_its_last_line(workspace, tmp_path):
    clock = """
import time
from data_loader import DataLoader
next_batch, now, calls = DataLoader.next_batch, [0.0], []
def take(loader):  # 1 second in the first step, 2 in the next, ...
    calls.append(1)
    now[0] += len(calls)
    return next_batch(loader)
DataLoader.next_batch = take
time.perf_counter = lambda: now[0]
"""
    options = [*FAST, "--max_steps=7", "--log_interval=3", f"--out_dir={tmp_path}"]
    run_ok(here("train.py"), *options, cwd=workspace, before=clock)
    assert re.findall(r" ms=(\S+)", (tmp_path / "log.txt").read_text()) == ["1000.0", "3000.0", "6000.0"]


def read_wandb(raw):
    """Records of a .wandb file: LevelDB's log format (blocks of 32 KiB; checksum, length, type, data) after 7 bytes"""
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


@needs_package("wandb")
def test_wandb_gets_what_the_log_gets_and_a_resumed_run_continues_there(workspace, tmp_path):
    command = [here("train.py"), *FAST, f"--out_dir={tmp_path}/run", "--wandb_project=demo"]
    for options in (["--max_steps=5"], ["--max_steps=7", "--resume"]):
        run_ok(*command, *options, cwd=workspace, WANDB_MODE="offline")
    found, ids = {}, set()
    for path in (tmp_path / "run/wandb").glob("offline-run-*/run-*.wandb"):
        for record in read_wandb(path.read_bytes()):
            ids |= {record.run.run_id} - {""}
            items = record.history.item
            row = {(item.nested_key or [item.key])[0]: json.loads(item.value_json) for item in items}
            found |= {(name, row["step"]): row[name] for name in ("train", "val") if name in row}
    assert len(ids) == 1 and found.keys() == records(tmp_path / "run").keys()
    for key, line in records(tmp_path / "run").items():
        assert found[key] == pytest.approx(float(line.split()[2]), abs=1e-6)


def test_out_of_memory_tries_smaller_micro_batches_and_then_says_what_helps(monkeypatch):
    set_globals(monkeypatch, compile="true", block_size=16, micro_batch=0)
    model, room, tried = GPT(small()), 3, []

    def try_step(model, teacher_model, device, amp_dtype, B, shares):
        tried.append(B)
        if B > room:
            raise torch.OutOfMemoryError if B > 4 else RuntimeError("CUDA error: out of memory")  # libraries' own

    def search():
        return train.find_micro_batch(model, None, torch.device("cpu"), torch.float32, 12, previous=None, shares=1)

    monkeypatch.setattr(train, "try_step", try_step)
    assert search()[0] == 3 and tried == [12, 6, 4, 3]
    room = 0
    with pytest.raises(UserError, match="--grad_checkpoint, --parallel=zero3 on several GPUs, a block_size below 16"):
        search()


@pytest.mark.skipif("SLOW" not in os.environ, reason="takes six minutes: SLOW=1")
def test_the_readmes_walk_through_teaches_opposites_and_a_teacher_helps(tmp_path):
    with open(here("README.md"), encoding="utf-8") as f:
        section = f.read().split("\n**A walk-through**")[1].split("\n## ")[0]
    variables = {}
    for kind, block in re.findall(r"```(sh|python)\n(.*?)```", section, re.S):
        if kind == "python":
            subprocess.run([sys.executable, "-c", block], cwd=tmp_path, check=True)
            exec(block.split("pairs =")[0], variables)
            continue
        for line in block.splitlines():
            command = shlex.split(line, comments=True)[1:]
            if "--source=synth" not in command:
                r = subprocess.run([sys.executable, here(command[0]), *command[1:]], cwd=tmp_path, capture_output=True)
                assert r.returncode == 0, r.stderr
    words, correct = variables["words"], dict(base=0, tuned=0)
    for run in correct:
        for i, word in enumerate(words):
            prompt = variables["asks"][i % 6].format(word)
            assert not any(prompt in line for line in open(tmp_path / "opposites.jsonl"))
            text = eval_script.generate_text(prompt, 20, 0, out_dir=str(tmp_path / run), device="cpu")
            correct[run] += text.strip() == f"The opposite of {word} is {words[i ^ 1]}."
    alone, taught = (losses(tmp_path / run, "val")[-1] for run in ("alone", "taught"))
    print(correct, "of", len(words), "correct; validation loss", alone, "alone,", taught, "with a teacher")
    assert correct["base"] < 0.05 * len(words) and correct["tuned"] > 0.9 * len(words) and taught < alone - 0.05


# -- eval.py

def speak(model, enc, rows, n, stop=()):
    pieces = list(eval_script.stream_text(model, enc, rows, n, 0, None, None, None, stop))
    return ["".join(row) for row in zip(*pieces)], pieces


def test_generate_text_is_importable_and_repeats_with_a_seed(workspace):
    def say(seed):
        options = dict(max_new_tokens=30, temperature=0.7, top_k=50, top_p=0.95, device="cpu", seed=seed)
        return eval_script.generate_text(prompt="Once", out_dir=str(workspace / "runs/fp32"), **options)

    assert say(1).startswith("Once") and say(1) == say(1) != say(2)


def test_eval_prints_the_samples_and_says_which_checkpoint_speaks(workspace):
    options = ["--prompt", "Once", "--num_samples", "2", "--max_new_tokens", "20", "--temperature", "0"]
    r = run_ok(here("eval.py"), *options, "--stop", "\0", cwd=workspace / "runs/fp32")
    a, b = r.stdout.split("---\n")
    assert a == b and a.startswith("Once") and "model_000030.pt, step 30" in r.stderr


class Reciting(GPT):
    """Says the same bytes whatever it is asked, another text in every row"""
    texts = []

    def stream(self, prompts, *args):
        for i in range(10_000):
            yield torch.tensor([[text[i] if i < len(text) else 256] for text in self.texts])


def recite(*texts, stop=()):
    Reciting.texts = texts
    return speak(Reciting(small(vocab_size=257)), get_tokenizer("byte"), [[256]] * len(texts), 100, stop)


def test_a_character_spread_over_tokens_is_printed_whole():
    assert recite("é☃".encode() + b"\xff")[0] == ["é☃\ufffd"]


def test_every_row_ends_at_its_own_end_of_text():
    assert recite([*b"one", 256, *b"more"], [*b"three and more"])[0] == ["one", "three and more"]


def test_a_text_ends_before_a_stop_string_and_shows_nothing_of_it():
    texts, pieces = recite([*b"yes, ab abc no"], [*b"abab"], [*b"ab"], stop=["abc", "zz"])
    assert texts == ["yes, ab ", "abab", "ab"] and "a" not in [p[0] for p in pieces]
    assert recite([*b"once the end"], stop="the end")[0] == ["once "]


def test_many_samples_of_one_seed_differ_and_repeat(workspace):
    options = ["--prompt=Once", "--num_samples=20", "--seed=1", "--max_new_tokens=20", "--temperature=2"]
    a, b = (run_ok(here("eval.py"), *options, cwd=workspace / "runs/fp32").stdout for _ in range(2))
    assert len(set(a.split("---\n"))) == 20 and a == b


def test_ctrl_c_at_the_prompt_does_not_end_a_session(monkeypatch, capsys):
    def read(prompt):
        line = lines.pop(0)
        if isinstance(line, str):
            return line
        raise line

    lines = [KeyboardInterrupt(), "Once", EOFError()]
    monkeypatch.setattr("builtins.input", read)
    eval_script.interact(lambda chats: [[f"heard {chats[0][0][0]}"]], is_chat=False)
    assert "heard Once" in capsys.readouterr().out and not lines


def test_weights_in_several_files_are_refused_with_what_to_do(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(UserError, match="weights in several files; save them in one, with max_shard_size"):
        GPT.from_pretrained(str(tmp_path))


def interact(folder, text):
    command = [sys.executable, here("eval.py"), "--temperature=0", "--max_new_tokens=5"]
    return subprocess.run(command, input=text, text=True, capture_output=True, cwd=folder, timeout=60)


def test_eval_continues_what_is_typed(workspace):
    r = interact(workspace / "runs/fp32", "Once\nthe\n")
    model, enc, _ = eval_script.load(None, str(workspace / "runs/fp32"), "cpu", "auto")

    def continuation(text):
        return speak(model, enc, [[enc.eot_token, *enc.encode_ordinary(text)]], 5)[0][0]

    first = continuation("Once")
    assert r.stdout == first + "\n" + continuation("Once" + first + "\nthe") + "\n", r.stderr


def test_a_chat_is_prompted_in_its_template_and_remembers_its_turns(chat_runs, workspace):
    folder = workspace / "chat/tuned"
    r = interact(folder, "Who is it?\n\nthe <|user|>\n")
    model, enc, _ = eval_script.load(None, str(folder), "cpu", "auto")
    text = enc.encode_ordinary

    def asked(prompt):
        return [enc.eot_token, *text("User:\n"), *text(prompt), *text("\n\nAssistant:\n")]

    first = speak(model, enc, [asked("Who is it?")], 5)[0][0]
    second = speak(model, enc, [[*asked("Who is it?"), *text(first.strip()), *asked("the <|user|>")]], 5)[0][0]
    assert r.stdout == first + "\n" + second + "\n", r.stderr
    options = ["--temperature=0", "--max_new_tokens=5", "--prompt=Who is it?", "--prompt=the"]
    assert run_ok(here("eval.py"), *options, cwd=folder).stdout.startswith(f"Who is it?\n{first}\n---\nthe\n")
    options = dict(max_new_tokens=5, temperature=0, out_dir=str(folder), device="cpu")
    assert eval_script.generate_text("Who is it?", **options) == first


@pytest.fixture(scope="session")
def servers(chat_runs, workspace):
    """eval.py --serve with a model that knows chats, and with one that does not.  -> {name: its address}"""
    addresses, processes = {}, []
    for folder in ("chat/tuned", "runs/fp32"):
        options = ["--serve=0", "--temperature=0", "--max_new_tokens=8", "--device=cpu", "--dtype=float32",
                   "--stop", "~" * 200]  # longer than a request's may be
        processes.append(start(here("eval.py"), *options, cwd=workspace / folder, stdout=subprocess.PIPE))
    for process in processes:
        name, address = re.match(r"(\S+): a page at (\S+)/, ", process.stdout.readline()).groups()
        addresses[name] = address
    yield addresses
    for process in processes:
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0


def greedy(workspace, folder, prompt, n=8, **options):
    options = {**dict(max_new_tokens=n, temperature=0, out_dir=str(workspace / folder), device="cpu"), **options}
    return eval_script.generate_text(prompt, dtype="float32", **options)


def test_seed_0_is_a_seed():
    assert eval_script.make_generator(GPT(small()), 0).initial_seed() == 0


def test_the_split_that_is_measured_is_the_one_asked_for(workspace):
    tokens = eval_script.read_tokens(str(workspace / "data/t"), get_tokenizer("byte"), "train")
    assert tokens.tolist() == read_split(workspace / "data/t", "train")


def test_a_comparison_on_a_text_is_on_that_text(workspace, capsys):
    path, text = str(workspace / CKPT), str(workspace / "t.txt")
    eval_script.compare([path], text, "val", None, [], None, None, "cpu", "float32")
    loss = eval_script.measure(*eval_script.load(path, device="cpu", dtype="float32")[:2], text)["loss"]
    assert capsys.readouterr().out.splitlines()[2].split()[3] == f"{loss:.4f}"


@pytest.mark.parametrize("served, host, is_allowed", [
    ("0.0.0.0", "10.0.0.5:8000", True), ("0.0.0.0", "evil.com", False), ("127.0.0.1", "10.0.0.5:8000", False),
    ("127.0.0.1", "127.0.0.1:8000", True)])
def test_a_server_answers_at_the_address_it_was_started_for(served, host, is_allowed):
    handler = argparse.Namespace(headers={"Host": host}, server=argparse.Namespace(hosts={served}))
    with contextlib.nullcontext() if is_allowed else pytest.raises(eval_script.BadRequest):
        eval_script.Handler.check_sender(handler)


def test_the_tokens_of_a_text_that_ends_early_are_counted(servers, workspace):
    text = greedy(workspace, "runs/fp32", "Once").removeprefix("Once")
    request = dict(model="fp32", prompt="Once", max_tokens=8, temperature=0, stop=text[2])
    r = requests.post(f"{servers['fp32']}/v1/completions", json=request).json()
    assert r["choices"][0]["finish_reason"] == "stop"
    assert r["usage"]["completion_tokens"] == text.index(text[2]) + 1 < 8


def test_a_served_model_says_what_generate_text_does(servers, workspace):
    text = greedy(workspace, "runs/fp32", "Once").removeprefix("Once")
    r = requests.post(f"{servers['fp32']}/v1/completions", json=dict(model="fp32", prompt="Once")).json()
    assert r["choices"] == [dict(index=0, text=text, logprobs=None, finish_reason="length")]
    assert r["usage"] == dict(prompt_tokens=5, completion_tokens=8, total_tokens=13)
    stop, tiny = text[3:5], dict(temperature=1e-12, top_k=None)
    r = requests.post(f"{servers['fp32']}/v1/completions", json=dict(model="fp32", prompt="Once", **tiny)).json()
    assert r["choices"][0]["text"] == text
    r = requests.post(f"{servers['fp32']}/v1/completions", json=dict(model="fp32", prompt=["Once"], stop=stop)).json()
    assert r["choices"] == [dict(index=0, text=text[:text.index(stop)], logprobs=None, finish_reason="stop")]


def test_a_served_chat_uses_the_models_template_and_all_turns(servers, workspace):
    model, enc, known = eval_script.load(None, str(workspace / "chat/tuned"), "cpu", "float32")
    turns = [("Be kind.\n\nHi", "Hello."), ("Who is it?", None)]
    expected = speak(model, enc, [dataset.prompt_tokens(enc, known["template"], turns)], 6)[0][0]
    messages = [dict(role=role, content=text) for role, text in (
        ("system", "Be kind."), ("user", "Hi"), ("assistant", "Hello."), ("user", "Who is it?"))]
    body = dict(model="tuned", messages=messages, max_completion_tokens=6)
    r = requests.post(f"{servers['tuned']}/v1/chat/completions", json=body).json()
    assert r["choices"][0]["message"] == dict(role="assistant", content=expected) and r["object"] == "chat.completion"


def test_a_served_chat_takes_answers_that_were_empty_and_texts_in_parts(servers, workspace):
    model, enc, known = eval_script.load(None, str(workspace / "chat/tuned"), "cpu", "float32")
    turns = [("Hi", ""), ("Who is it?", None)]
    expected = speak(model, enc, [dataset.prompt_tokens(enc, known["template"], turns)], 8)[0][0]
    parts = [dict(type="text", text="Who is "), dict(type="text", text="it?")]
    messages = [USER, dict(role="assistant", content=""), dict(role="user", content=parts)]
    r = requests.post(f"{servers['tuned']}/v1/chat/completions", json=dict(model="tuned", messages=messages))
    assert r.json()["choices"][0]["message"]["content"] == expected


def test_a_server_is_ended_by_ctrl_c_while_it_generates(workspace):
    options = ["--serve=0", "--device=cpu", "--temperature=2", "--top_k=0"]
    process = start(here("eval.py"), *options, cwd=workspace / "runs/fp32", stdout=subprocess.PIPE)
    address = re.search(r"a page at (\S+)/, ", process.stdout.readline())[1]
    ask = dict(model="fp32", prompt="Once", max_tokens=10**6, stream=True, top_p=1.0)
    with requests.post(f"{address}/v1/completions", json=ask, stream=True) as r:
        next(r.iter_lines())
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0


@needs_package("openai")
def test_openais_client_is_served(servers, workspace):
    import openai
    clients = {name: openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0) for name, url in servers.items()}
    assert [model.id for model in clients["fp32"].models.list()] == ["fp32"]
    parts = [*clients["fp32"].completions.create(
        model="fp32", prompt="Once", stream=True, stream_options=dict(include_usage=True))]
    text = greedy(workspace, "runs/fp32", "Once").removeprefix("Once")
    assert "".join(part.choices[0].text for part in parts[:-1]) == text and len(parts) > 4
    assert parts[-2].choices[0].finish_reason == "length" and parts[-1].usage.completion_tokens == 8
    ask = dict(model="tuned", messages=[dict(role="user", content="Who is it?")])
    whole = clients["tuned"].chat.completions.create(**ask).choices[0].message.content
    parts = clients["tuned"].chat.completions.create(**ask, stream=True)
    assert whole == greedy(workspace, "chat/tuned", "Who is it?") == "".join(p.choices[0].delta.content for p in parts)
    seeded = [clients["fp32"].completions.create(model="fp32", prompt="a", temperature=2, seed=i).choices[0].text
              for i in (1, 1, 2)]
    assert seeded[0] == seeded[1] != seeded[2]
    for client, error in (("fp32", openai.BadRequestError), ("tuned", openai.NotFoundError)):
        with pytest.raises(error):
            clients[client].chat.completions.create(model="fp32", messages=ask["messages"])


ASK = dict(model="tuned", prompt="Once")
USER = dict(role="user", content="Hi")
BAD_REQUESTS = [
    *[("completions", {**ASK, **wrong}) for wrong in (
        dict(model="gpt-4o"), dict(model=None), dict(model=[]), dict(prompt=None), dict(prompt=3), dict(prompt=[]),
        dict(prompt=["a", "b"]), dict(prompt=[[1, 2]]), dict(prompt={}), dict(max_tokens=0), dict(max_tokens=-1),
        dict(max_tokens=1.5), dict(max_tokens="9"), dict(max_tokens=10**9), dict(max_tokens=True), dict(temperature=-1),
        dict(temperature=2.1), dict(temperature="hot"), dict(temperature=math.nan), dict(temperature=math.inf),
        dict(top_p=-0.1), dict(top_p=0), dict(top_p=1.1), dict(top_p=[]), dict(top_k=-1), dict(top_k=0.5),
        dict(seed=-1), dict(seed=2**64), dict(seed="a"), dict(n=2), dict(n="x"), dict(stop=""), dict(stop=["a", ""]),
        dict(stream=2), dict(stop=[1]), dict(stop=7), dict(stop={"a": 1}), dict(stop="x" * 101), dict(stop=["x"] * 17),
        dict(stream="yes"), dict(presence_penalty=1), dict(logprobs=5), dict(echo=True), dict(suffix="!"),
        dict(best_of=3), dict(tools=[{}]), dict(logprobs=0), dict(top_k=50.0),
        dict(max_tokens=200.0))],
    *[("chat/completions", {**ASK, "messages": messages}) for messages in (
        None, [], {}, "Hi", ["Hi"], [{}], [dict(role="user")], [dict(role="user", content=1)],
        [dict(role="user", content=" ")], [USER, USER], [USER, dict(role="assistant", content="Hello.")],
        [dict(role="king", content="Hi")], [dict(role="system", content="Hi")])],
    *[("completions", raw) for raw in (b"", b"{", b"[]", b"3", b"null", b"\xff", b"[" * 100_000, b"x" * 1_100_000)],
    ("complete", ASK), ("chat", ASK), ("../../etc/passwd", ASK)]


def test_bad_requests_are_answered_as_openai_does_and_cost_the_server_nothing(servers, workspace):
    url = f"{servers['tuned']}/v1/"
    for path, body in BAD_REQUESTS:
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        try:
            r = requests.post(url + path, data=raw)
        except requests.ConnectionError:
            assert len(raw) > 1_000_000  # the server does not wait for the rest
            continue
        error = r.json()["error"]
        assert r.status_code in (400, 404, 413) and error["type"] == "invalid_request_error", (body, r.text)
        assert error.keys() == {"message", "type", "param", "code"} and error["message"], body
    assert len(BAD_REQUESTS) > 60
    harmless = dict(n=1, best_of=1, echo=False, logprobs=None, presence_penalty=0.0, response_format=dict(type="text"))
    assert requests.post(f"{url}completions", json={**ASK, **harmless}).json()["choices"][0]["text"]


@pytest.mark.parametrize("headers", [
    {"Host": "evil.example"}, {"Host": "evil.example:80"}, {"Host": "[::"}, {"Host": ""},
    {"Origin": "http://evil.example"}, {"Origin": "null"}, {"Origin": "http://127.0.0.1:1"}], ids=str)
def test_pages_of_other_sites_cannot_use_the_server(servers, headers):
    for path in ("/", "/v1/models"):
        assert requests.get(servers["fp32"] + path, headers=headers).status_code == 403
    answer = requests.post(f"{servers['fp32']}/v1/completions", json=dict(model="fp32", prompt="a"), headers=headers)
    assert answer.status_code == 403
    assert requests.get(f"{servers['fp32']}/", headers={"Origin": servers["fp32"]}).status_code == 200


def test_the_page_names_the_model_and_nothing_outside(servers):
    page = requests.get(f"{servers['tuned']}/").text
    assert '["tuned", true, 0' in page and "VALUES" not in page and not re.search("https?:", page)
    assert '["fp32", false, 0' in requests.get(f"{servers['fp32']}/").text


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_does_not_keep_others_waiting(servers, stream):
    body = dict(model="fp32", prompt="Once", max_tokens=1_000_000, stream=stream, temperature=1)
    with contextlib.suppress(requests.Timeout):
        with requests.post(f"{servers['fp32']}/v1/completions", json=body, stream=True, timeout=2) as r:
            next(r.iter_content(10))
    answer = requests.post(f"{servers['fp32']}/v1/completions", json=dict(model="fp32", prompt="a"), timeout=30)
    assert answer.status_code == 200


def test_a_model_writes_the_pairs_for_another(servers, tmp_path):
    prompts = [f"What is {i}?" for i in range(6)]
    synthesize(tmp_path, f"{servers['tuned']}/v1", prompts, model="tuned")
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert sorted(row["prompt"] for row in rows) == prompts and all(row["response"] for row in rows)


def test_a_long_chat_loses_its_oldest_turns_first(chat_runs, workspace):
    model, enc, known = eval_script.load(None, str(workspace / "chat/tuned"), "cpu", "auto")
    turns = [(f"{i} " * 9, "yes") for i in range(9)] + [("and?", None)]
    tokens = eval_script.chat_tokens(model, enc, known["template"], turns)
    kept = enc.decode(tokens).split(EOT)[1:]
    assert 40 < len(tokens) <= 64 and len(turns) == len(kept) and kept[-1].startswith("User:\nand?")
    assert [text[6] for text in kept[:-1]] == [str(i) for i in range(10 - len(kept), 9)]
    long_turn = [("long " * 99, None)]
    whole = dataset.prompt_tokens(enc, known["template"], long_turn)
    assert eval_script.chat_tokens(model, enc, known["template"], long_turn) == whole
    turns = [(f"{i} " * 9, "yes") for i in range(9)] + [("and?", None)]
    tokens = eval_script.chat_tokens(model, enc, known["template"], turns, system="Be kind.")
    (prompt, _), *_ = turns
    assert enc.decode(tokens).startswith(f"{EOT}User:\nBe kind.\n\n{prompt}"[:-1]) and len(tokens) <= 64


@pytest.mark.parametrize("options", [
    dict(temperature=-1), dict(temperature=math.nan), dict(top_p=0), dict(seed=-1), dict(stop=["a", ""]),
    dict(dtype="int4"), dict(dtype=torch.float32)], ids=str)
def test_generate_text_refuses_what_the_command_line_refuses(workspace, options):
    with pytest.raises(UserError, match="out of range|must not be empty|must be one of auto, float32, float16, bfl"):
        eval_script.generate_text("Once", out_dir=str(workspace / "runs/fp32"), device="cpu", **options)


def test_an_int8_model_cannot_be_saved_without_its_scales(workspace, tmp_path):
    with pytest.raises(UserError, match="int8 cannot be exported"):
        eval_script.load(str(workspace / CKPT), device="cpu", dtype="int8")[0].save_pretrained(str(tmp_path))
    assert not os.listdir(tmp_path)


def test_pairs_that_are_cut_are_reported_with_their_loss(workspace, tmp_path):
    write_text(tmp_path / "p.jsonl", [json.dumps(dict(prompt="a", response="b " * n)) for n in (1, 99)])
    model, enc, _ = eval_script.load(str(workspace / CKPT), device="cpu")
    how = eval_script.measure(model, enc, str(tmp_path / "p.jsonl"))["how"]
    assert "; 1 pairs are longer than the context and lose" in how


def test_a_comparison_refuses_a_bad_model_before_it_measures_the_first(workspace, monkeypatch):
    monkeypatch.chdir(workspace)
    monkeypatch.setattr(eval_script, "measure", lambda *_, **__: pytest.fail("measured"))
    for other, stride, problem in (("none.pt", None, "no checkpoint none.pt"), (CKPT, 999, "--stride=999 is more")):
        with pytest.raises(UserError, match=problem):
            eval_script.compare([CKPT, other], "t.txt", "val", stride, [], None, None, "cpu", "float32")


def test_a_model_that_was_trained_beyond_its_best_validation_says_so(workspace, tmp_path):
    ckpt = read_checkpoint(find_checkpoints(workspace / "runs/pairs")[-1])
    for best, text in ((ckpt["step"], "cpu"), (7, "; the lowest validation loss so far was at step 7")):
        ckpt["run"]["best"]["step"] = best
        torch.save(ckpt, tmp_path / "model.pt")
        assert model_file.open_model(str(tmp_path / "model.pt"), device="cpu")[1]["about"].endswith(text)


def test_generate_text_takes_a_newer_checkpoint_of_a_folder(workspace, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    options = dict(max_new_tokens=60, temperature=2, top_k=None, seed=0, device="cpu")
    sources = find_checkpoints(workspace / "runs/fp32")[::2]
    texts = [eval_script.generate_text(ckpt=str(path), **options) for path in sources]
    assert len(texts) == len(set(texts)) == 2
    for step, (source, text) in enumerate(zip(sources, texts)):
        shutil.copy(source, tmp_path / f"checkpoints/model_00000{step}.pt")
        assert eval_script.generate_text(ckpt=str(tmp_path), **options) == text


@needs_package("transformers")
@pytest.mark.parametrize("spec", [{"name": "byte"}, CHAT_TOKENS], ids=["plain markers", "special tokens"])
def test_an_exported_chat_template_gives_the_tokens_of_ours(tmp_path, spec):
    import transformers
    enc = get_tokenizer(spec)
    template = dataset.chat_template(enc)
    known = dict(tokenizer=spec, template=template)
    eval_script.export(GPT(small(vocab_size=enc.n_vocab)), enc, known, str(tmp_path / "out"))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    for line, turns in PAIR_LINES.values():
        messages = line.get("messages", [])
        is_question = messages and messages[-1]["role"] == "user"
        if is_question:
            ours = dataset.prompt_tokens(enc, template, [*turns, (messages[-1]["content"], None)])
        else:
            ours = dataset.encode_chat(enc, template, turns)[0] + [enc.eot_token]
        if messages:
            assert ours == theirs.apply_chat_template(
                messages, add_generation_prompt=bool(is_question), tokenize=True, return_dict=False)


def test_an_export_of_a_chat_is_prompted_in_its_template(chat_runs, workspace, tmp_path):
    run_ok(here("eval.py"), f"--export={tmp_path}/hf", cwd=workspace / "chat/tuned")
    _, enc, known = eval_script.load(None, str(workspace / "chat/tuned"), "cpu", "auto")
    _, exported = load_checkpoint(str(tmp_path / "hf"))
    assert exported == {"tokenizer": known["tokenizer"], "template": known["template"]}
    assert dataset.tokenizer_fingerprint(get_tokenizer(str(tmp_path / "hf"))) == dataset.tokenizer_fingerprint(enc)


@torch.no_grad()
def strided_losses(model, tokens, stride, eot=None):
    """The losses of measure(), target by target"""
    out = []
    for x, y, *document in eval_script.strided_batches(tokens, model.cfg.block_size, stride, "cpu", eot, 40):
        hidden = model.hidden(x, *(isolate_documents(document[0]) if document else []))
        out += hellaswag.token_losses(model, hidden[y >= 0], y[y >= 0])[0].tolist()
    return out


@torch.no_grad()
def test_perplexity_with_a_stride_of_one_equals_a_slow_loop():
    model, tokens = lively(), np.random.default_rng(0).integers(0, 64, 100)
    slow = []
    for i in range(1, 100):
        idx = torch.tensor(tokens[max(0, i - 16):i])[None]
        slow.append(F.cross_entropy(model(idx)[0][:, -1], torch.tensor([tokens[i]])).item())
    assert strided_losses(model, tokens, stride=1) == pytest.approx(slow, abs=1e-4)


@torch.no_grad()
def test_perplexity_of_a_model_trained_with_doc_mask_sees_one_document_at_a_time():
    model, tokens, eot = lively(), np.random.default_rng(0).integers(0, 63, 100), 63
    begins = [0, 5, 6, 30, 77]
    tokens[begins] = eot
    slow = []
    for i in range(1, 100):
        begin = max(i - 16, max(b for b in begins if b < i))
        slow.append(F.cross_entropy(model(torch.tensor(tokens[begin:i])[None])[0][:, -1],
                                    torch.tensor([tokens[i]])).item())
    assert strided_losses(model, tokens, 1, eot) == pytest.approx(slow, abs=1e-4)


def test_eval_measures_a_model_trained_with_doc_mask_as_its_validation_did(workspace, tmp_path):
    options = [*FAST, "--doc_mask", "--max_steps=5", "--val_tokens=1e6", f"--out_dir={tmp_path}"]
    run_ok(here("train.py"), *options, cwd=workspace)
    r = run_ok(here("eval.py"), "--perplexity=data/t", "--stride=32", f"--out_dir={tmp_path}", cwd=workspace)
    assert "each document on its own" in r.stdout
    loss = float(re.search(r"([\d.]+) nats per token", r.stdout)[1])
    assert loss == pytest.approx(losses(tmp_path, "val")[-1], abs=2e-3)  # of the same windows, but for the last


@torch.no_grad()
@pytest.mark.parametrize("stride", [3, 7, 16])
@pytest.mark.parametrize("n", [5, 17, 50, 97])
def test_every_token_is_scored_once_with_the_context_a_stride_leaves(stride, n):
    model, tokens = lively(), np.random.default_rng(0).integers(0, 64, n)
    expected, end = [], 0
    while end < n - 1:
        begin, end = end, min(n - 1, max(16, end + stride))
        window = torch.tensor(tokens[max(0, end - 16):end + 1])[None]
        logits = model(window[:, :-1], window[:, 1:])[0][0]
        expected += F.cross_entropy(logits, window[0, 1:], reduction="none")[begin - end:].tolist()
    assert strided_losses(model, tokens, stride) == pytest.approx(expected, abs=1e-4)


def test_perplexity_of_pairs_is_that_of_their_responses(tuned):
    folder, rows = tuned
    path = write_lines(folder / "held.jsonl", rows[::10])
    model, enc, _ = eval_script.load(str(folder / "one4/checkpoints/model_000006.pt"), ".", "cpu", "float32")
    loss = eval_script.measure(model, enc, path)["loss"]
    assert loss == pytest.approx(slow_pair_loss(model, rows[::10]), abs=1e-5)
    assert loss == pytest.approx(losses(folder / "one4", "val")[-1], abs=1e-5)


def test_perplexity_of_a_text_file_is_that_of_its_tokens(workspace):
    options = ["--perplexity=../../t.txt", "--stride=20", "--limit=500", "--dtype=float32"]
    r = run_ok(here("eval.py"), *options, cwd=workspace / "runs/fp32")
    model, enc, _ = eval_script.load(None, str(workspace / "runs/fp32"), "cpu", "float32")
    tokens = np.array(byte_tokens(stories(150))[:500])
    nats = np.mean(strided_losses(model, tokens, 20))
    bits = nats * 499 / math.log(2) / sum(t != 256 for t in tokens[1:])
    assert f"499 tokens, {nats:.4f} nats per token, perplexity {math.exp(nats):.3f}, {bits:.4f} bits per byte; " \
        "windows of 32 overlap by 12" in r.stdout


def test_models_are_compared_in_one_table(workspace):
    write_lines(workspace / "h.jsonl", [EXAMPLE])
    names = ["runs/fp32", "runs/pairs/checkpoints/model_000030.pt"]
    r = run_ok(here("eval.py"), "--compare", *names, "--data=h.jsonl", cwd=workspace)
    above, *rows = [re.split(r"  +", line) for line in r.stdout.splitlines()]
    assert [row[0] for row in rows[1:]] == [*names, "GPT-2 124M, published", "GPT-3 124M, published"]
    assert rows[1][2] == "7,680"
    loss = losses(workspace / "runs/fp32", "val")[-1]
    assert rows[1][3:5] == [f"{loss:.4f}", f"{math.exp(loss):.2f}"]
    assert above[1:] == ["HellaSwag"] * 3 and rows[0][6:9] == list(hellaswag.MEASURES)
    assert rows[3][6:9] == ["-", "0.2955", "-"]


def test_a_text_that_cannot_be_measured_is_found_before_any_model_is_compared(workspace, monkeypatch):
    monkeypatch.chdir(workspace)
    monkeypatch.setattr(hellaswag, "read_tasks", lambda *args, **options: pytest.fail("too late"))
    dataset.prepare("t.txt", "bpe:300", out="data/bpe-too")
    for text, error in (("data/bpe-too", "is in tokenizer bpe:300"), ("none.txt", "there is no source")):
        with pytest.raises(UserError, match=error):
            eval_script.compare(["runs/fp32"], text, "val", None, ["lambada"], None, None, "cpu", "float32")


def test_models_are_compared_on_several_tasks(hub, workspace):
    options = ["--compare", "runs/fp32", "--task=lambada,arc_easy"]
    r = run_ok(here("eval.py"), *options, cwd=workspace, **hub)
    above, *rows = [re.split(r"  +", line) for line in r.stdout.splitlines()]
    assert above[1:] == ["LAMBADA"] * 2 + ["ARC-easy"] * 3
    assert rows[0][6:11] == ["acc", "perplexity", *hellaswag.MEASURES]
    assert rows[2][6:11] == ["0.3256", "40.06", "0.4381", "-", "-"] and len(rows) == 3
    assert "; LAMBADA on 3 examples; ARC-easy on 3 examples\n" in r.stderr


@pytest.mark.parametrize("broken, columns", [
    (dict(last_val=dict(loss=None, bpb=1.0)), {"loss", "perplexity"}), (dict(tokens="a"), {"tokens"}),
    (dict(last_val=dict(loss=1.0, bpb=[1])), {"bits/byte"}), (dict(usd=[1]), {"$"}),
    (dict(last_val=dict(loss=10**400, bpb="x")), {"loss", "perplexity", "bits/byte"}), ({}, set())], ids=str)
def test_a_comparison_shows_a_dash_for_what_a_checkpoint_says_wrongly(workspace, tmp_path, capsys, broken, columns):
    ckpt = read_checkpoint(str(workspace / CKPT))
    ckpt["run"].update({"usd": 1.0, **broken})
    torch.save(ckpt, tmp_path / "model.pt")
    eval_script.compare([str(tmp_path / "model.pt")], None, "val", None, [], None, None, "cpu", "float32")
    names, cells = map(str.split, capsys.readouterr().out.splitlines()[1:])
    assert {name for name, cell in zip(names, cells, strict=True) if cell == "-"} == columns


def test_of_equally_likely_tokens_one_is_the_likeliest():
    model, x = lively(), torch.randn(50, 32)
    model.lm_head.weight.data[1::2] = model.lm_head.weight.data[::2]  # every logit twice
    targets = model.logits(x, slice(None)).argmax(1)
    for ids, expected in ((targets, True), (targets + 1, False)):
        assert (hellaswag.token_losses(model, x, ids)[1] == expected).all()


# -- hellaswag.py

@torch.no_grad()
def slow_scores(model, enc, examples):
    """
    Each ending alone after its context, token by token.  -> how many are right by sum, by token, by byte; how many of
    the right endings are what the model says, and their loss
    """
    right, n_greedy, nats = [0, 0, 0], 0, 0.0
    for e in examples:
        scores = [[], [], []]
        for i, ending in enumerate(e["endings"]):
            context, rest = enc.encode_ordinary(e["ctx"]), enc.encode_ordinary(" " + ending)
            idx = torch.tensor([context + rest])
            log_p = model(idx, idx)[0][0].log_softmax(-1)[len(context) - 1:-1]
            loss = -sum(log_p[i, t].item() for i, t in enumerate(rest))
            for column, length in zip(scores, (1, len(rest), len(ending.encode()))):
                column.append(loss / length)
            if i == int(e["label"]):
                n_greedy += log_p.argmax(-1).tolist() == rest
                nats += loss
        for i, column in enumerate(scores):
            right[i] += column.index(min(column)) == int(e["label"])
    return *right, n_greedy, nats, len(examples)


def random_examples(n, n_endings):
    rng, words = random.Random(0), stories(1)[0].split() + ["é", "☃☃☃"]
    examples = []
    for _ in range(n):
        endings = [" ".join(rng.choices(words, k=rng.randint(1, 9))) for _ in range(rng.choice(n_endings))]
        ctx, label = " ".join(rng.choices(words, k=8)), rng.randrange(len(endings))
        examples.append(dict(ctx=ctx, endings=endings, label=str(label)))
    return examples


@each_kind
@pytest.mark.parametrize("budget", [100, 2048])
@pytest.mark.parametrize("n_endings", [[4], [1, 2, 5]], ids=str)
def test_scores_equal_a_slow_loop_over_single_endings(monkeypatch, switches, budget, n_endings):
    monkeypatch.setattr(hellaswag, "batch_tokens", lambda device: budget)
    monkeypatch.setattr(hellaswag, "ids_at_once", lambda device: 150)  # of 400
    enc, examples = get_tokenizer(make_bpe(stories(50), 400)), random_examples(60, n_endings)
    model = lively(**{**switches, "block_size": 96, "vocab_size": 400})
    is_word = [bool(re.fullmatch(r" \w+", enc.decode([token]))) for token in range(400)]
    model.lm_head.weight.data[~torch.tensor(is_word)] *= 0.1  # so that it says words
    for e in examples[:30]:  # endings that the model would say itself
        context = torch.tensor([enc.encode_ordinary(e["ctx"])])
        said = enc.decode(model.generate(context, 1, temperature=0)[0, -1:].tolist())
        e["endings"][int(e["label"])] = said[1:] or "x"
    slow = slow_scores(model, enc, examples)
    fast = hellaswag.score(model, hellaswag.encode(examples, enc, 96))
    assert fast == pytest.approx(slow, rel=1e-5) and len(set(slow)) > 4 and 5 < slow[3] < 60
    shares = [hellaswag.evaluate(model, enc, examples, rank, 3) for rank in range(3)]
    assert tuple(map(sum, zip(*shares))) == (*slow[:3], 60)
    assert hellaswag.task_scores(model, enc, "lambada", examples)["lambada", "acc"] == slow[3] / 60


def test_the_standard_error_of_half_of_a_hundred_is_5_percent():
    assert hellaswag.with_error("acc", 0.5, 100) == "acc 0.5000 +- 0.0500"


def test_a_long_hellaswag_example_loses_the_beginning_of_its_context():
    example = {"ctx": "x" * 50 + "yz", "label": "0", "endings": ["a", "bc", "d" * 9, "e" * 40]}
    context, endings = hellaswag.split_example(example, get_tokenizer("byte"), block_size=16)
    assert bytes(context) == b"z" and [len(e) for e in endings] == [2, 3, 10, 16] and bytes(endings[1]) == b" bc"
    [(*_, n_bytes, _)] = hellaswag.encode([example], get_tokenizer("byte"), block_size=16)
    assert n_bytes == [1, 2, 9, 15]  # of the last ending, those that are judged


@needs_gpt2
@needs_test_data
def test_hellaswag_scores_real_examples_from_the_command_line(workspace):
    options = ["--data", os.path.abspath(HELLASWAG), "--limit", "12", "--out_dir", "runs/fp32"]
    r = run_ok(here("hellaswag.py"), *options, cwd=workspace)
    assert re.search(r"12 examples: acc 0\.\d{4} \+- .* by token 0\.\d{4} \+- .* by byte 0\.\d{4} \+- ", r.stdout)


# -- plot.py

def test_a_log_is_read_with_the_last_line_of_a_step_winning(tmp_path):
    (tmp_path / "log.txt").write_text(
        '# {"config": {"total_batch_size": 8}}\n0 train 5.0 lr=1e-3 mfu=n/a\n0 val 5.5\n1 train 4.0 lr=2e-3\n'
        "1 train 4.5 lr=3e-3\n1 hella 0.25\nnoise\n2 train 3.")
    streams, [header] = plot.read_log(str(tmp_path / "log.txt"))
    assert streams == {"train": {0: (5.0, {"lr": 1e-3}), 1: (4.5, {"lr": 3e-3})}, "val": {0: (5.5, {})},
                       "hella": {1: (0.25, {})}, "test": {}}
    assert header == {"tokens": 8, "FLOPs": 0, "references": {}, "source": ("", "", 0), "start": 2**53}


@pytest.mark.parametrize("kind, expected", [
    ("step", [0, 1, 2, 3]), ("tokens", [0, 8, 16, 24]), ("FLOPs", [0, 800, 1600, 2400]), ("hours", [0, 2, 4, 5]),
    ("minutes", [0, 120, 240, 300]), ("dollars", [0, 12, 24, 30])])
def test_a_step_is_drawn_at_its_tokens_hours_or_dollars(tmp_path, kind, expected):
    header = dict(config=dict(total_batch_size=8), flops_per_token=100)
    records = "1 train 5.0 seconds=14400 usd=24\n3 val 4.0 seconds=18000 usd=30\n"  # after two steps, and after three
    (tmp_path / "log.txt").write_text(f"# {json.dumps(header)}\n{records}")
    to_x = plot.step_converter(kind, *plot.read_log(str(tmp_path / "log.txt")))
    assert [to_x(step) for step in range(4)] == pytest.approx(expected)


@pytest.mark.parametrize("kind, expected", [
    ("tokens", [0, 8, 16, 32, 48]), ("FLOPs", [0, 800, 1600, 3200, 4800]), ("dollars", [0, 0, 0, 8, 16])])
def test_a_resumed_run_is_drawn_with_the_settings_of_each_part(tmp_path, kind, expected):
    text = ""
    for start, batch in ((0, 8), (2, 16)):
        header = dict(step=start, config=dict(total_batch_size=batch), flops_per_token=100)
        usd = [f" usd={8 * n}" if start else "" for n in (1, 2)]  # a price only for the second part
        text += f"# {json.dumps(header)}\n{start} train 5.0{usd[0]}\n{start + 1} train 5.0{usd[1]}\n"
    (tmp_path / "log.txt").write_text(text)
    to_x = plot.step_converter(kind, *plot.read_log(str(tmp_path / "log.txt")))
    assert [to_x(step) for step in range(5)] == pytest.approx(expected)


def test_the_last_validation_is_drawn_at_the_seconds_of_the_summary_though_steps_are_seldom_logged(workspace, tmp_path):
    options = [*FAST, "--val_interval=4", "--log_interval=20", f"--out_dir={tmp_path}"]
    run_ok(here("train.py"), *options, "--max_steps=10", cwd=workspace)
    r = run_ok(here("train.py"), *options, "--max_steps=18", "--resume", cwd=workspace)
    to_x = plot.step_converter("minutes", *plot.read_log(str(tmp_path / "log.txt")))
    x = to_x([0, 4, 8, 12, 16, 18])
    assert x[-1] == pytest.approx(json.loads(r.stdout.splitlines()[-1])["seconds"] / 60, abs=0.06 / 60)
    assert x[0] == 0 and (np.diff(x) > 0).all()


def test_a_name_is_drawn_as_it_is(tmp_path):
    paths = []
    for name in ("run$\\frac$", "b"):
        (tmp_path / name).mkdir()
        paths.append(write_log(tmp_path / name / "log.txt", [5.0, 4.0]))
    plot.plot(paths, str(tmp_path / "logs.png"))
    assert is_picture(tmp_path / "logs.png")


def is_picture(path):
    return path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n") and os.path.getsize(path) > 10_000


def test_plot_draws_a_run_and_several(workspace, tmp_path):
    run_ok(here("plot.py"), "log.txt", cwd=workspace / "runs/fp32")
    assert is_picture(workspace / "runs/fp32/log.png")
    for x in ("tokens", "hours", "FLOPs"):
        options = ["fp32/log.txt", "pairs/log.txt", f"--x={x}", f"--out={tmp_path}/{x}.pdf"]
        run_ok(here("plot.py"), *options, cwd=workspace / "runs")
        assert (tmp_path / f"{x}.pdf").read_bytes().startswith(b"%PDF")
    run_ok(here("plot.py"), "log.txt", "--dark", f"--out={tmp_path}/dark.png", cwd=workspace / "runs/fp32")
    assert is_picture(tmp_path / "dark.png")
    assert (tmp_path / "dark.png").read_bytes() != (workspace / "runs/fp32/log.png").read_bytes()


def test_a_picture_shows_in_each_panel_what_its_title_says(tmp_path, monkeypatch):
    from matplotlib.figure import Figure
    (tmp_path / "log.txt").write_text("".join(
        f"{i} train {9 if i == 0 else 5 - i / 100} lr={i}e-3 tok_s={i}00\n{i} hella 0.{i + 10}\n" for i in range(40)))
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **options: figures.append(self))
    plot.plot([str(tmp_path / "log.txt")], "x.png")
    axes = {ax.get_title() or ax.get_ylabel(): ax for ax in figures[0].axes}
    last = {title: ax.lines[0].get_ydata()[-1] for title, ax in axes.items()}
    assert last == {"learning rate": 0.039, "tokens per second": 3900, "HellaSwag accuracy": 0.49,
                    "loss, nats per token": pytest.approx(4.61)}
    low, high = axes["loss, nats per token"].get_ylim()
    assert low < 4.61 and 4.99 < high < 9  # all but the first


def test_plot_names_the_file_it_writes(tmp_path, monkeypatch, capsys):
    log = write_log(tmp_path / "v1.2.txt", [5.0])
    for options, name in (([], "v1.2.png"), (["--out", "a"], "a.png"), (["--out", "a.svg"], "a.svg")):
        monkeypatch.setattr(sys, "argv", ["plot.py", log, *options])
        monkeypatch.setattr(plot, "plot", lambda paths, out, *rest: None)
        plot.main()
        assert os.path.basename(capsys.readouterr().out.strip()) == name


def test_a_resumed_runs_log_is_read_without_the_steps_that_were_abandoned(tmp_path):
    path = write_log(tmp_path / "log.txt", [5.0, 4.0, 3.0, 2.0])
    with open(path, "a") as f:
        header = dict(step=1, config=dict(total_batch_size=8))
        f.write(f"# {json.dumps(header)}\n1 train 4.5\n2 train 3.5\n# a note\n3 val 3.0\n")
    streams, _ = plot.read_log(path)
    assert [value for value, _ in streams["train"].values()] == [5.0, 4.5, 3.5] and list(streams["val"]) == [3]


def write_log(path, losses, recipe="x", data="x", tokens=1024, parameters=0):
    header = dict(recipe=recipe, config=dict(total_batch_size=tokens, data=data), parameters=parameters)
    records = "".join(f"{step} train {loss}\n" for step, loss in enumerate(losses))
    path.write_text(f"# {json.dumps(header)}\n# a note\n{records}")
    return str(path)


def test_plot_prints_a_chart_of_several_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "61")
    a = write_log(tmp_path / "a.txt", [5.0] * 51)
    b = write_log(tmp_path / "b.txt", [4.0] * 26)
    plot.print_chart([a, b], "tokens")
    *rows, axis, first, second = capsys.readouterr().out.splitlines()
    assert rows[0] == "   5.000 " + "a" * 51 and rows[-1] == "   4.000 " + "b" * 26
    assert all(re.fullmatch(r" +4\.\d{3} ", row) for row in rows[1:-1]) and axis.split() == ["0", "51,200", "tokens"]
    assert first.endswith("a, 5.000 at the end") and second.endswith("b, 4.000 at the end")


def test_infinite_losses_do_not_hide_the_rest_of_a_run(tmp_path, capsys):
    losses = [5 - i / 100 for i in range(100)]
    losses[10], losses[20] = math.inf, -math.inf
    log = write_log(tmp_path / "a.txt", losses)
    plot.print_chart([log])
    end = float(re.search(r"([\d.]+) at the end", capsys.readouterr().out)[1])
    assert end == pytest.approx(4.01, abs=0.05)
    plot.plot([log], str(tmp_path / "a.png"))
    assert is_picture(tmp_path / "a.png")


TINY = dict(recipe="tiny", data="input.txt", parameters=1_311_872)


@pytest.mark.parametrize("runs, x, last", [
    ([TINY], "step", 1000), ([TINY, TINY], "tokens", 1_024_000), ([TINY], "hours", None),
    ([{**TINY, "data": "book.txt"}], "step", None), ([{**TINY, "recipe": "gpt2"}], "step", None),
    ([{**TINY, "parameters": 10**6}], "step", None), ([TINY, {**TINY, "tokens": 512}], "step", None),
    ([TINY, dict(recipe="shakespeare", data="data/shakespeare", parameters=836_736)], "step", None)],
    ids=["step", "tokens", "hours", "other data", "other recipe", "other size", "two batch sizes", "two recipes"])
def test_a_typical_run_of_the_same_recipe_is_drawn_behind(tmp_path, runs, x, last):
    from matplotlib.figure import Figure
    logs = [plot.read_log(write_log(tmp_path / f"{i}.txt", [5.0], **run)) for i, run in enumerate(runs)]
    ax = Figure().subplots()
    plot.draw_typical(ax, logs, x)
    assert [line.get_xdata()[-1] for line in ax.lines] == ([last] if last else [])


def test_a_strangers_log_is_drawn_without_its_extremes_and_control_characters(tmp_path, capsys):
    (tmp_path / "a\x1b]0;x\7").mkdir()
    header = dict(config=dict(total_batch_size=8), references={f"{i}" * 999: 1e308 for i in range(99)})
    records = "1 train 5.0 tok_s=-1e308\n2 train -1e308\n3 train 5.0\n1 hella 0.3\n"
    path = tmp_path / "a\x1b]0;x\7/log.txt"
    path.write_text(f"# {json.dumps(header)}\n{records}")
    plot.print_chart([str(path)])
    assert "\x1b" not in capsys.readouterr().out
    streams, [header] = plot.read_log(str(path))
    assert list(streams["train"]) == [3] and len(header["references"]) == 9 and max(header["references"].values()) == 1
    plot.plot([str(path)], str(tmp_path / "log.png"))


def test_a_diverged_end_is_not_hidden(tmp_path, capsys):
    plot.print_chart([write_log(tmp_path / "log.txt", [5.0] * 9 + [math.nan])])
    assert "nan at the end" in capsys.readouterr().out
    assert math.isnan(plot.smooth([5.0, math.nan], 10)[-1]) and plot.smooth([math.nan, 5.0], 10)[-1] == 5.0


def test_a_chart_into_a_closed_pipe_and_a_picture_in_the_home_folder(tmp_path):
    path = write_log(tmp_path / "log.txt", [5.0] * 9)
    command = f"'{sys.executable}' '{here('plot.py')}' '{path}'"
    r = subprocess.run(f"(sleep 1; {command} --term) | true; {command} --out=~/a.png", shell=True, text=True,
                       capture_output=True, env={**os.environ, "HOME": str(tmp_path)})
    assert r.stderr == "" and r.stdout == f"{tmp_path}/a.png\n" and is_picture(tmp_path / "a.png")


@pytest.mark.parametrize("tokens, record", [
    (1e308, "1 train 5.0"), (-5, "1 train 5.0"), (0, "1 train 5.0"), (1024, "1 train 5.0 seconds=nan"),
    (1024, "1 train 5.0 seconds=-1e9"), (1024, "1 train 1e308\n2 train -1e308")], ids=str)
@pytest.mark.parametrize("kind", ["step", "tokens", "hours"])
def test_a_chart_of_strange_numbers_is_drawn_or_refused(tmp_path, capsys, tokens, record, kind):
    (tmp_path / "log.txt").write_text(f'# {{"recipe": "tiny", "config": {{"total_batch_size": {tokens}}}}}\n{record}\n')
    with contextlib.suppress(SystemExit):
        plot.print_chart([str(tmp_path / "log.txt")], kind)
        assert len(capsys.readouterr().out.splitlines()) == 22


# -- README.md

def readme_commands():
    """Every command of the README that starts one of our scripts, as words from the script's name on"""
    with open(here("README.md"), encoding="utf-8") as f:
        fences = re.split(r"^```.*$", f.read(), flags=re.MULTILINE)
    lines = [line for block in fences[1::2] for line in block.splitlines()]
    lines += [" ".join(code.split()) for block in fences[::2] for code in re.findall("`([^`]+)`", block)]
    commands = [re.match(r"(?:\w+=\S+ )*(?:python|torchrun .*?) (\w+\.py.*)", line) for line in lines]
    return [shlex.split(command[1], comments=True) for command in commands if command and "--help" not in command[1]]


@pytest.mark.parametrize("command", readme_commands(), ids=" ".join)
def test_a_command_of_the_readme_has_only_options_that_exist(command, monkeypatch):
    class Parsed(Exception):
        pass

    def parse_args(parser, arguments=None):
        _, unknown = parser.parse_known_args(arguments)
        raise Parsed(*unknown)

    script, *arguments = command
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    monkeypatch.setattr(sys, "argv", command)
    module = dict(dataset=dataset, train=train, eval=eval_script, hellaswag=hellaswag, plot=plot)[script[:-3]]
    with pytest.raises(Parsed) as parsed:
        train.configure(arguments) if module is train else module.main()
    assert parsed.value.args == ()


# -- what a GPU needs, observed on a CPU as far as torch shows it there

# With a stand-in for the compiler, prints what happens.
OBSERVER = """
import atexit, functools, gc, os, torch
from torch._dynamo.backends.debugging import aot_eager
def backend(graph, inputs):
    print("compiling", flush=True)
    if os.environ.get("BROKEN"):
        raise RuntimeError("no compiler")
    return aot_eager(graph, inputs)  # traces like the real one, which would take half a minute
def attend(*args, kernel=torch.nn.functional.scaled_dot_product_attention, **options):
    seen.add(("training" if torch.is_grad_enabled() else "evaluation", torch.backends.cuda.cudnn_sdp_enabled()))
    return kernel(*args, **options)
seen = set()
torch.compile = functools.partial(torch.compile, backend=backend)
if os.environ.get("ATTENTION"):
    torch.nn.functional.scaled_dot_product_attention = attend
gc.callbacks.append(
    lambda phase, info: info["generation"] == 2 and phase == "stop" and print("garbage collected\\n", end=""))
atexit.register(lambda: print("cuDNN", sorted(seen)))
"""


@pytest.mark.parametrize("options", [[], ["--grad_checkpoint"], ["--doc_mask"]], ids=str)
def test_what_is_compiled_before_the_run_is_what_its_steps_and_validations_use(workspace, tmp_path, options):
    r = run_ok(here("train.py"), *FAST, *options, "--compile=true", f"--out_dir={tmp_path}/a", cwd=workspace,
               before=OBSERVER)
    before, after = r.stdout.split("\nmicro-batch ")
    assert before.count("compiling") == 3 and "compiling" not in after  # a block, the loss; a block in validation
    run_ok(here("train.py"), *FAST, *options, f"--out_dir={tmp_path}/b", cwd=workspace)
    assert losses(tmp_path / "a") == pytest.approx(losses(tmp_path / "b"), abs=1e-5)
    assert losses(tmp_path / "a", "val") == pytest.approx(losses(tmp_path / "b", "val"), abs=1e-5)


@pytest.mark.parametrize("options", [[], ["--grad_checkpoint"], ["--parallel=zero2"]], ids=str)
def test_two_processes_with_compiled_code_give_the_losses_of_one_without(workspace, one_process, tmp_path, options):
    options = [*NO_DROPOUT, *options, "--compile=true", "--micro_batch=2", f"--out_dir={tmp_path}"]
    r = run_ok(here("train.py"), *options, cwd=workspace, n=2, before=OBSERVER)
    assert "compiling" in r.stdout
    assert_same_losses(tmp_path, one_process)


def test_no_compiler_is_an_error_where_one_was_asked_for(workspace, tmp_path):
    r = script(here("train.py"), *FAST, "--compile=true", f"--out_dir={tmp_path}", cwd=workspace, before=OBSERVER,
               BROKEN="1")
    assert r.returncode == 1 and re.search("^[^\n]*: cannot compile here .*no compiler.*--compile=false$", r.stderr)


def test_without_a_compiler_a_run_says_so_when_it_begins_and_when_it_ends(monkeypatch, capsys):
    def try_step(model, *args):
        model.eval()  # as if it failed in a validation
        if "loss" in vars(model):
            raise RuntimeError("no triton")

    monkeypatch.setattr(train, "try_step", try_step)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**40, 2**40))
    set_globals(monkeypatch, compile="auto", block_size=16, micro_batch=0, grad_checkpoint=False)
    model = GPT(small())
    B, problem = train.find_micro_batch(model, None, torch.device("cuda"), torch.bfloat16, 12, 0, shares=1)
    assert model.training
    assert B == 12 and "loss" not in vars(model) and "no triton" in problem and problem in capsys.readouterr().out
    train.print_summary(train.new_run(), False, problem)
    assert problem in capsys.readouterr().out


def test_micro_batches_that_cannot_fit_are_not_tried(monkeypatch):
    tried = []
    monkeypatch.setattr(train, "try_step", lambda model, teacher, device, dtype, B, shares: tried.append(B))
    set_globals(monkeypatch, compile="auto", block_size=16, micro_batch=0, grad_checkpoint=False)
    model = GPT(small())
    free = 0.8 * 5 * train.activation_bytes(model.cfg, torch.bfloat16, compiled=True)
    free += 2**30 + 4 * 4 * model.param_counts()["total"] + train.autocast_bytes(model, torch.bfloat16)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 2**40))
    assert train.find_micro_batch(model, None, torch.device("cuda"), torch.bfloat16, 12, 0, shares=1)[0] == 4
    assert tried == [4]


@pytest.mark.parametrize("others, tried", [(8, []), (2, [2])])
def test_a_process_that_could_take_more_compiles_for_what_all_can_take(monkeypatch, others, tried):
    done, model = [], GPT(small())
    monkeypatch.setattr(train.dist, "all_reduce", lambda tensor, op: tensor.fill_(min(others, int(tensor))))
    monkeypatch.setattr(train, "try_step", lambda model, teacher, device, dtype, B, shares: done.append(B))
    model.set_compiled(True)
    B = train.smallest_micro_batch(4, model, None, torch.device("cpu"), torch.float32, shares=1)
    assert B == min(4, others) and done == tried


def test_sizes_that_do_not_fit_leave_the_compiler_as_it_was(monkeypatch):
    graphs = []

    def backend(graph, inputs):
        graphs.append(len(inputs[-1]))
        return graph.forward

    def try_step(model, teacher, device, dtype, B, shares):
        model(*torch.zeros(2, B, 16, dtype=torch.long))
        if B > 1:
            raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(train, "try_step", try_step)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**50, 2**50))
    set_globals(monkeypatch, compile="auto", block_size=16, micro_batch=0, grad_checkpoint=False)
    B, problem = train.find_micro_batch(GPT(small()), None, torch.device("cuda"), torch.float32, 120, 0, shares=1)
    assert (B, problem) == (1, "") and len(graphs) == 16 > torch._dynamo.config.recompile_limit


def test_the_trial_leaves_room_for_moments_gradients_and_buffers(monkeypatch):
    empty, taken = torch.empty, []
    set_globals(monkeypatch, block_size=16, doc_mask=False, val_interval=0)
    model = GPT(small())

    def noted(n, **options):
        taken.append(n)
        return empty(n, **options)

    monkeypatch.setattr(torch, "empty", noted)
    train.try_step(model, None, torch.device("cpu"), torch.float32, 2, shares=1)
    assert sum(taken) >= 3 * model.param_counts()["total"]


@pytest.mark.parametrize("options, in_training", [([], True), (["--attention=flash"], False), (["--doc_mask"], False)],
                         ids=str)
def test_cudnns_attention_is_kept_to_training_without_masks(workspace, tmp_path, options, in_training):
    r = run_ok(here("train.py"), *FAST, *options, "--max_steps=5", "--sample_interval=5", f"--out_dir={tmp_path}",
               cwd=workspace, before=OBSERVER, ATTENTION="1")
    assert f"cuDNN [('evaluation', False), ('training', {in_training})]" in r.stdout
    for command in (["eval.py", "--prompt=Once"], ["eval.py", "--perplexity=t.txt", "--limit=100"]):
        r = run_ok(here(command[0]), *command[1:], f"--out_dir={tmp_path}", cwd=workspace, before=OBSERVER,
                   ATTENTION="1")
        assert "cuDNN [('evaluation', False)]" in r.stdout


def start_nodes(tmp_path, *options):
    """Two machines of one process each, each in its own folder"""
    port, processes = some_port(), []
    for node in range(2):
        os.makedirs(tmp_path / f"node{node}", exist_ok=True)
        env = {**os.environ, "RANK": str(node), "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost",
               "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
        processes.append(subprocess.Popen(
            [sys.executable, here("train.py"), *FAST, "--max_steps=2", *options], cwd=tmp_path / f"node{node}", env=env,
            text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE))
    return processes


def test_nodes_without_a_common_folder_each_prepare_their_data(workspace, tmp_path):
    options = [f"--data={workspace}/t.txt", "--tokenizer=byte", f"--out_dir={tmp_path}/run"]
    processes = start_nodes(tmp_path, *options)
    assert [(p.communicate(timeout=120)[1], p.returncode) for p in processes] == [("", 0)] * 2
    assert len(losses(tmp_path / "run")) == 2


@pytest.mark.parametrize("name", ["val_000000.bin", "meta.json"])
def test_nodes_whose_data_differs_are_told_so(workspace, tmp_path, name):
    for node in range(2):
        shutil.copytree(workspace / "data/t", tmp_path / f"node{node}/t")
    if name == "meta.json":  # other data
        shutil.rmtree(tmp_path / "node1/t")
        dataset.prepare(str(workspace / "t.txt"), "byte", out=str(tmp_path / "node1/t"), splits="70/30")
    else:
        os.remove(tmp_path / "node1/t" / name)
        for node in range(2):
            os.remove(tmp_path / f"node{node}/t/meta.json")  # other people's shards
    errors = [p.communicate(timeout=120)[1] for p in start_nodes(tmp_path, "--data=t", "--val_interval=1")]
    assert any("train.py: the processes have different data, or only some" in error for error in errors), errors
    assert not any("Traceback" in error for error in errors), errors


def test_nodes_without_a_common_folder_cannot_write_parts_of_one_checkpoint(workspace, tmp_path, monkeypatch):
    # A thread of gloo sometimes aborts a process as Python shuts down; here that always happens.
    (tmp_path / "sitecustomize.py").write_text("import atexit, os; atexit.register(os.abort)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    options = [f"--data={workspace}/data/t", "--parallel=zero3", "--ckpt_shards", "--out_dir=run"]
    for node in range(2):
        (tmp_path / f"node{node}/run").mkdir(parents=True)
        (tmp_path / f"node{node}/run/.lock").touch()  # left by an earlier run
    for p in start_nodes(tmp_path, *options):
        error = p.communicate(timeout=120)[1]
        assert p.returncode == 1 and re.search("out_dir that all machines share|lost the others", error), error
    assert not list(tmp_path.glob("*/run/checkpoints/*"))


def test_an_error_in_one_of_several_processes_waits_for_a_checkpoint_that_is_being_written(tmp_path):
    code = """
import sys, time, torch, train
sys.excepthook = train.report_error
train.start_processes(torch.device("cpu"), 0, 1)
train.writer.submit(lambda: (time.sleep(1), open("written", "w").close()))
raise train.UserError("wrong")
"""
    env = dict(MASTER_ADDR="localhost", MASTER_PORT=str(some_port()), PYTHONPATH=HERE)
    r = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, text=True, capture_output=True,
                       env={**os.environ, **env})
    assert r.returncode == 1 and r.stderr.endswith(": wrong\n") and os.listdir(tmp_path) == ["written"]


def test_a_run_in_bfloat16_logs_the_loss_that_eval_measures(workspace, tmp_path):
    options = ["--dtype=bfloat16", "--max_steps=5", "--val_tokens=1000000", f"--out_dir={tmp_path}"]
    run_ok(here("train.py"), *FAST, *options, cwd=workspace)
    n = len(DataLoader(str(workspace / "data/t"), "val", 1, 32).rows) * 32 + 1
    r = run_ok(here("eval.py"), "--perplexity=data/t", "--stride=32", f"--limit={n}", "--dtype=bfloat16",
               "--device=cpu", f"--out_dir={tmp_path}", cwd=workspace)
    assert float(re.search(r"([\d.]+) nats", r.stdout)[1]) == pytest.approx(losses(tmp_path, "val")[-1], abs=1e-4)


def test_float16_is_refused_where_torch_has_no_scaler(monkeypatch):
    set_globals(monkeypatch, dtype="float16")
    assert train.training_dtype(torch.device("cpu"), True) == torch.float16
    with pytest.raises(UserError, match="dtype=float16 needs a loss scaler"):
        train.training_dtype(torch.device("mps"), True)


def test_bfloat16_is_refused_on_a_gpu_without_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)
    set_globals(monkeypatch, dtype="bfloat16")
    with pytest.raises(UserError, match="this GPU does not compute in bfloat16"):
        train.training_dtype(torch.device("cuda"), True)


def test_nccls_errors_are_reported_with_their_cause(capsys):
    for cause, words in (("no space left", "lost the others.* no space left"), ("out of memory", "out of memory; use")):
        error = RuntimeError(f"NCCL error in: x.cpp:9\nncclSystemError: it failed.\nLast error:\n {cause}\n")
        train.report_error(RuntimeError, error, None)
        assert re.search(words, capsys.readouterr().err)


def test_garbage_is_collected_when_a_run_is_evaluated_and_never_in_between(workspace, tmp_path):
    options = [*FAST, "--max_steps=10", "--log_interval=1", f"--out_dir={tmp_path}"]
    r = run_ok(here("train.py"), *options, cwd=workspace, before=OBSERVER)
    # a checkpoint's thread may say that it is saved between any two lines
    lines = [line for line in r.stdout.split("\nmicro-batch ")[1].splitlines() if " | saved " not in line]
    after = [lines[i + 1].split(" | ")[:2] for i, line in enumerate(lines) if line == "garbage collected"]
    assert len(after) == 4  # at the end of set-up, and before the validations at steps 0, 5 and 10
    assert all("validation" in text for _, text in after[1:])


# -- CUDA: about a minute on one GPU

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
CUDA = "cuda"
ON_CUDA = [*FAST, f"--device={CUDA}", "--deterministic", "--max_steps=12", "--ckpt_interval=6", "--val_interval=6"]


def loss_and_gradients(model, idx, *document, dtype=torch.float32):
    """-> the loss of a training step, and all gradients, on the CPU"""
    device = model.lm_head.weight.device
    x, y = idx.to(device), idx.roll(-1, 1).to(device)
    model.train().zero_grad()
    with model_file.autocast(device, dtype):
        loss = model(x, y, *(d.to(device) for d in document), with_logits=False)[1]
    loss.backward()
    return [t.to("cpu", copy=True) for t in (loss.detach(), *(p.grad for p in model.parameters()))]


def assert_close(a, b, tolerance):
    """Relative to each tensor's largest value: half precision has no more to offer."""
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=tolerance * max(1e-6, y.abs().max().item()))


@needs_cuda
@each_kind
def test_cuda_gives_the_loss_and_gradients_of_the_cpu_in_float32(switches):
    torch.set_float32_matmul_precision("highest")
    model, idx = lively(**switches), torch.randint(64, (2, 16))
    on_cpu = loss_and_gradients(model, idx)
    assert_close(loss_and_gradients(model.to(CUDA), idx), on_cpu, 1e-4)


@needs_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("T", [64, 192, 256])
def test_fused_attention_on_cuda_gives_the_gradients_of_the_reference(T, documents, dtype):
    torch.manual_seed(0)
    idx, document = torch.randint(64, (2, T)), torch.randint(2, (2, T)).cumsum(1)
    results = {}
    for attention in ("fused", "flash", "reference"):
        torch.manual_seed(1)
        model = GPT(small(block_size=T, n_embd=128, attention=attention)).to(CUDA)
        torch.backends.cuda.enable_cudnn_sdp(attention == "fused" and not documents)  # as train.py does
        results[attention] = loss_and_gradients(model, idx, *[document] * documents, dtype=dtype)
    for attention in ("fused", "flash"):
        assert_close(results[attention], results["reference"], 0.03 if dtype == torch.bfloat16 else 1e-3)


@needs_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiled_code_on_cuda_gives_the_loss_and_gradients_of_eager(dtype):
    torch.manual_seed(0)
    model, idx = GPT(small(block_size=64, n_embd=128)).to(CUDA), torch.randint(64, (4, 64))
    eager = loss_and_gradients(model, idx, dtype=dtype)
    model.set_compiled(True)
    assert_close(loss_and_gradients(model, idx, dtype=dtype), eager, 0.03 if dtype == torch.bfloat16 else 1e-3)


@needs_cuda
@each_kind
def test_documents_that_share_a_row_on_cuda_say_what_each_says_alone(switches):
    model, lengths = lively(**switches).to(CUDA), (5, 1, 7, 3)
    documents = [torch.randint(64, (n,), device=CUDA) for n in lengths]
    number = torch.tensor([7] * 5 + [-1] + [0] * 7 + [1] * 3, device=CUDA)[None]
    row = torch.cat(documents)[None]
    for document, logits in zip(documents, model(row, row, number)[0][0].split(lengths)):
        torch.testing.assert_close(logits, model(document[None], document[None])[0][0], atol=1e-3, rtol=1e-3)


@needs_cuda
@each_kind
@pytest.mark.parametrize("training", [False, True], ids=["as a graph", "in training"])
def test_greedy_generation_on_cuda_equals_that_without_a_cache(switches, training):
    torch.set_float32_matmul_precision("highest")
    model, prompts = lively(**switches).to(CUDA), [torch.randint(64, (n,)).tolist() for n in (1, 9, 16)]
    model.train(training)
    stream = model.stream(prompts, temperature=0)
    together = torch.cat([next(stream) for _ in range(40)], dim=1).tolist()
    assert together == [generate_without_cache(model, prompt, 40) for prompt in prompts]


@needs_cuda
def test_hellaswag_on_cuda_equals_a_slow_loop_over_single_endings():
    torch.set_float32_matmul_precision("highest")
    enc, rng = get_tokenizer("byte"), random.Random(0)
    model = lively(block_size=96, vocab_size=384)
    examples = [{"ctx": "".join(rng.choices("abc ", k=20)), "label": rng.randrange(4),
                 "endings": ["".join(rng.choices("abc", k=rng.randint(1, 9))) for _ in range(4)]} for _ in range(60)]
    slow = slow_scores(model, enc, examples)
    assert hellaswag.evaluate(model.to(CUDA), enc, examples) == (*slow[:3], slow[-1])


@needs_cuda
def test_an_overflow_in_float16_on_cuda_costs_a_step_and_no_run(workspace, tmp_path):
    large = "import functools, torch as t; t.amp.GradScaler = functools.partial(t.amp.GradScaler, init_scale=2.0**28)"
    options = [*FAST, f"--device={CUDA}", "--dtype=float16", "--max_steps=40", f"--out_dir={tmp_path}/run"]
    r = run_ok(here("train.py"), *options, cwd=workspace, before=large)
    lines = [line for (stream, _), line in records(tmp_path / "run").items() if stream == "train"]
    norms = [float(re.search(r"norm=(\S+)", line)[1]) for line in lines]
    assert not math.isfinite(norms[0]) and math.isfinite(norms[-1]) and "skipped" not in r.stdout
    assert losses(tmp_path / "run", "val")[-1] < losses(tmp_path / "run", "val")[0]


@needs_cuda
def test_sharding_and_ddp_over_compiled_code_work_with_cudas_own_collectives(tmp_path):
    (tmp_path / "one.py").write_text(f"""
import torch, train
from model import GPT, GPTConfig, autocast
from torch.nn.parallel import DistributedDataParallel
device = torch.device("{CUDA}", 0) if "{CUDA}" == "cuda" else torch.device("{CUDA}")
train.start_processes(device, 0, 1)
batches = torch.randint(64, (2, 2, 4, 64), device=device)

def gradients(prepare, checkpointed=False, dtype=torch.float32):
    torch.manual_seed(0)
    raw = GPT(GPTConfig(block_size=64, vocab_size=64, n_layer=2, n_head=2, n_embd=64)).to(device).train()
    raw.grad_checkpoint = checkpointed
    model, scaler = prepare(raw), torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    for i, (x, y) in enumerate(batches):
        model.require_backward_grad_sync = i == 1
        with autocast(device, dtype):
            loss = model(x, y, with_logits=False)[1]
        scaler.scale(loss).backward()
    [optimizer] = train.make_optimizers(raw, device, torch.bfloat16)
    scaler.unscale_(optimizer)
    grads = train.copy_to_host({{name: p.grad for name, p in raw.named_parameters()}}, train.gathered)
    scaler.step(optimizer)
    for p, state in optimizer.state.items():  # what a checkpoint holds, and back
        whole = train.copy_to_host(state, train.gathered)["exp_avg"]
        part = train.shard_like(p, whole)
        assert (part.full_tensor() if hasattr(part, "full_tensor") else part).cpu().equal(whole)
    return grads

def compiled(model):
    model.set_compiled(True)
    return DistributedDataParallel(model, gradient_as_bucket_view=True)

plain = gradients(lambda model: model)
for name, result, tolerance in [
        ("ddp", gradients(compiled), 1e-3), ("ddp, checkpointed", gradients(compiled, True), 1e-3),
        ("sharded", gradients(lambda model: train.shard_model(model, device, torch.float32, 1)), 1e-3),
        ("sharded, float16", gradients(lambda model: train.shard_model(model, device, torch.float16, 1),
                                       dtype=torch.float16), 0.03)]:
    for k in plain:
        assert (result[k] - plain[k]).abs().max() <= tolerance * plain[k].abs().max(), (name, k)
torch.distributed.destroy_process_group()
""")
    run_ok(*torchrun(1), tmp_path / "one.py", cwd=tmp_path, PYTHONPATH=HERE)


@needs_cuda
def test_a_deterministic_run_on_cuda_resumes_bit_for_bit(workspace, tmp_path):
    run_ok(here("train.py"), *ON_CUDA, f"--out_dir={tmp_path}/a", cwd=workspace)
    resume = [f"--resume={tmp_path}/a/checkpoints/model_000006.pt", "--data=data/t", "--deterministic"]
    run_ok(here("train.py"), *resume, f"--out_dir={tmp_path}/b", cwd=workspace)
    a, b = (read_checkpoint(f"{tmp_path}/{run}/checkpoints/model_000012.pt")["model"] for run in "ab")
    assert all(torch.equal(a[name], b[name]) for name in a) and losses(tmp_path / "b") == losses(tmp_path / "a")[6:]


# -- faults: signals, closed pipes, full disks, other runs, bad numbers

def start(*args, cwd, **options):
    """A process of its own, with torch's default threads"""
    env = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    return subprocess.Popen([sys.executable, *map(str, args)], cwd=cwd, env=env, text=True, start_new_session=True,
                            **{**dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL), **options})


def wait_for_step(folder, step, process):
    while not (folder / "log.txt").exists() or ("train", step) not in records(folder):
        assert process.poll() is None, "the run has ended"
        time.sleep(0.02)


ENDLESS = [*FAST, "--max_steps=100000", "--ckpt_interval=0"]


def test_the_first_cosine_of_every_process_is_the_same():
    code = """
import hashlib, os, torch
from model import GPT, GPTConfig
cfg = GPTConfig(n_layer=1, n_head=4, n_embd=128, block_size=256, vocab_size=64, pos="rotary")
for _ in range(150):
    if not os.fork():
        print(hashlib.sha256(GPT(cfg).rotary.numpy().tobytes()).hexdigest(), flush=True)
        os._exit(0)
    os.wait()
"""
    env = {**os.environ, "PYTHONPATH": HERE, "OMP_NUM_THREADS": "2"}
    r = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert len(r.stdout.split()) == 150 and len(set(r.stdout.split())) == 1, r.stderr


@pytest.mark.parametrize("output", ["a closed pipe", "a full device", "nothing"])
def test_output_that_cannot_be_written_costs_nothing(workspace, tmp_path, output):
    command = [*ENDLESS, f"--out_dir={tmp_path}/run"]
    pipe = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if output == "a closed pipe":
        p = start(here("train.py"), *command, cwd=workspace, **pipe)
        p.stdout.close()
    elif output == "a full device":
        with open("/dev/full", "w") as full:
            p = start(here("train.py"), *command, cwd=workspace, stdout=full, stderr=full)
    else:
        code = "import os, sys; os.close(1); os.close(2); os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
        p = start("-c", code, here("train.py"), *command, cwd=workspace)
    wait_for_step(tmp_path / "run", 3, p)
    p.send_signal(signal.SIGINT)
    assert p.wait(60) == 128 + signal.SIGINT
    assert read_checkpoint(find_checkpoints(tmp_path / "run")[-1])["step"] > 3
    assert all(re.match(r"\d+ \w+ [\d.]+ |# \{", line) for line in open(tmp_path / "run/log.txt"))


def test_one_signal_to_all_processes_and_its_echo_save_once(workspace, tmp_path):
    p = start(*torchrun(2), here("train.py"), *ENDLESS, f"--out_dir={tmp_path}", cwd=workspace)
    wait_for_step(tmp_path, 3, p)
    os.killpg(p.pid, signal.SIGTERM)  # as scancel and systemd do; torchrun then sends its own
    p.wait(60)
    assert read_checkpoint(find_checkpoints(tmp_path)[-1])["step"] == max(step for _, step in records(tmp_path)) + 1


def test_a_second_ctrl_c_leaves_at_once_if_it_comes_later(monkeypatch):
    ended, now = [], [100.0]
    monkeypatch.setattr(train, "stop_signal", 0)
    monkeypatch.setattr(train.os, "_exit", ended.append)
    monkeypatch.setattr(train.time, "monotonic", lambda: now[0])
    for now[0], expected in ((100.0, []), (100.5, []), (104.0, [130])):
        train.request_stop(signal.SIGINT, None)
        assert train.stop_signal == signal.SIGINT and ended == expected


def test_workers_whose_torchrun_was_killed_save_and_end_and_their_folder_is_theirs_until_then(workspace, tmp_path):
    command = [*ENDLESS, f"--out_dir={tmp_path}"]
    p = start(*torchrun(2), here("train.py"), *command, cwd=workspace)
    wait_for_step(tmp_path, 3, p)
    r = script(here("train.py"), *command, cwd=workspace)
    assert r.returncode == 1 and "is in use by another run" in r.stderr
    p.kill()
    with filelock.FileLock(tmp_path / ".lock", timeout=60):
        pass
    assert read_checkpoint(find_checkpoints(tmp_path)[-1])["step"] == max(step for _, step in records(tmp_path)) + 1


def test_a_run_resumed_from_another_folder_sets_its_own_old_run_aside_and_leaves_the_other_alone(workspace, tmp_path):
    options = [*FAST, "--ckpt_interval=3", "--keep=1"]
    run_ok(here("train.py"), *options, "--max_steps=12", f"--out_dir={tmp_path}/here", cwd=workspace)
    run_ok(here("train.py"), *options, "--max_steps=6", f"--out_dir={tmp_path}/there", cwd=workspace)
    before = {p.name: p.read_bytes() for p in (tmp_path / "here/checkpoints").iterdir()}
    log, resume = (tmp_path / "here/log.txt").read_text(), f"--resume={tmp_path}/there"
    run_ok(here("train.py"), *options, resume, "--max_steps=18", f"--out_dir={tmp_path}/here", cwd=workspace)
    assert {p.name: p.read_bytes() for p in (tmp_path / "here/checkpoints.1").iterdir()} == before
    assert (tmp_path / "here/log.1.txt").read_text() == log
    assert len(find_checkpoints(tmp_path / "there")) == 1


@pytest.mark.parametrize("at", [0.1, 0.3, 0.5, 0.7, 0.9])
def test_a_flipped_bit_in_a_checkpoint_is_noticed_and_the_one_before_is_resumed(workspace, tmp_path, capsys, at):
    older, path = find_checkpoints(workspace / "runs/fp32")[-2:]
    (tmp_path / "checkpoints").mkdir()
    shutil.copy(older, tmp_path / "checkpoints")
    content = bytearray(open(path, "rb").read())
    content[int(at * len(content))] ^= 4
    (tmp_path / "checkpoints" / os.path.basename(path)).write_bytes(content)
    assert train.find_resume(dict(resume="newest", out_dir=str(tmp_path)))["step"] == checkpoint_step(older)
    printed = capsys.readouterr().err
    assert f"{os.path.basename(path)} is" in printed and "trying the one before" in printed


def test_a_full_disk_costs_a_checkpoint_but_not_the_run(workspace, tmp_path):
    size = os.path.getsize(workspace / CKPT) // 2
    limit = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size}))"
    options = [*FAST, "--max_steps=7", "--ckpt_interval=3", f"--out_dir={tmp_path}/run"]
    r = script(here("train.py"), *options, cwd=workspace, before=limit)
    assert r.returncode == 1 and r.stderr.count("\n") == r.stderr.count("cannot write") == 3, r.stderr
    assert "File too large" in r.stderr
    assert os.listdir(tmp_path / "run/checkpoints") == [] and len(losses(tmp_path / "run")) == 7


def test_a_nan_on_one_of_two_processes_is_named_and_skipped_on_both(workspace, tmp_path):
    broken = """
import os
from torch.nn import functional as F
cross_entropy, calls = F.cross_entropy, []
def broken(*args, **options):
    calls.append(1)
    loss = cross_entropy(*args, **options)
    return loss * float("nan") if len(calls) == 6 and os.environ["RANK"] == "1" else loss
F.cross_entropy = broken
"""
    options = [*FAST, "--max_steps=9", "--micro_batch=4", f"--out_dir={tmp_path}/run"]
    r = run_ok(here("train.py"), *options, cwd=workspace, n=2, before=broken)
    assert re.search(r"step 5 is skipped: its loss or gradient is not finite; the data of rank 1: "
                     r"data/t/train_000000.bin at token [\d,]+,", r.stdout)
    values = losses(tmp_path / "run")
    assert math.isnan(values[5]) and all(map(math.isfinite, values[:5] + values[6:])) and len(values) == 9
    ckpt = read_checkpoint(find_checkpoints(tmp_path / "run")[-1])
    assert ckpt["run"]["skipped"] == 0 and all(w.isfinite().all() for w in ckpt["model"].values())


def test_a_run_with_an_absurd_rate_never_saves_or_ends_well(workspace, tmp_path):
    options = [*FAST, "--max_lr=1e38", "--warmup_steps=0", "--ckpt_interval=1", "--max_steps=8", "--sample_interval=1"]
    for _ in range(3):
        r = script(here("train.py"), *options, f"--out_dir={tmp_path}", "--resume=auto", cwd=workspace)
        assert r.returncode == 1 and r.stderr.count("\n") == 1 and "with a lower max_lr" in r.stderr, r.stderr
    for path in find_checkpoints(tmp_path):
        assert all(w.isfinite().all() for w in read_checkpoint(path)["model"].values())


@pytest.mark.parametrize("args", [["eval.py", "--prompt=x"], ["hellaswag.py", "--data=h.jsonl"],
                                  ["train.py", *FAST, "--resume"], ["train.py", *FAST, "--init_from"]], ids=str)
def test_weights_that_are_not_finite_are_refused(workspace, tmp_path, args):
    ckpt = read_checkpoint(str(workspace / CKPT))
    ckpt["model"]["transformer.h.1.mlp.c_fc.weight"][3, 3] = math.nan
    torch.save(ckpt, tmp_path / "nan.pt")
    name, *options = args if args[0] == "train.py" else [*args, "--ckpt"]
    r = script(here(name), *options[:-1], f"{options[-1]}={tmp_path}/nan.pt", cwd=workspace)
    assert r.returncode == 1 and "c_fc.weight has values that are not finite" in r.stderr and r.stderr.count("\n") == 1


@pytest.mark.parametrize("change", [dict(n_embd=40000), dict(n_layer=100_000), dict(block_size=10**9)], ids=str)
def test_an_absurd_shape_is_refused_before_anything_is_allocated(workspace, tmp_path, change):
    ckpt = read_checkpoint(str(workspace / CKPT))
    ckpt["model_config"].update(change)
    torch.save(ckpt, tmp_path / "large.pt")
    before, began = train.peak_memory_gb(torch.device("cpu")), time.monotonic()
    with pytest.raises(UserError):
        load_checkpoint(str(tmp_path / "large.pt"))
    assert train.peak_memory_gb(torch.device("cpu")) - before < 0.2 and time.monotonic() - began < 20


def test_a_manifest_names_no_file_outside_its_folder(workspace, tmp_path):
    shutil.copytree(workspace / "data/t", tmp_path / "t")
    manifest = json.loads((tmp_path / "t/meta.json").read_text())
    manifest["shards"][0]["file"] = "../victim.bin"
    (tmp_path / "t/meta.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="not a manifest"):
        DataLoader(str(tmp_path / "t"), "train", 1, 8)


def test_a_shard_that_changes_or_goes_while_it_is_read_is_named(shards, tmp_path):
    shutil.copytree(shards, tmp_path / "a")
    changes = (lambda path: os.truncate(path, 1100), "has changed since"), (os.remove, "cannot read .*: No such file")
    for harm, error in changes:
        loader = DataLoader(str(tmp_path / "a"), "val", 1, 16)
        harm(tmp_path / "a/val_000000.bin")
        with pytest.raises(UserError, match=error):
            loader.next_batch()
        shutil.copy(os.path.join(shards, "val_000000.bin"), tmp_path / "a")


def test_verify_finds_a_changed_token(workspace, tmp_path):
    shutil.copytree(workspace / "data/t", tmp_path / "t")
    verify = [here("dataset.py"), f"--verify={tmp_path}/t"]
    assert "is intact: " in run_ok(*verify, cwd=tmp_path).stdout
    with open(tmp_path / "t/train_000000.bin", "r+b") as f:
        f.seek(3000)
        f.write(b"\7")
    r = script(*verify, cwd=tmp_path)
    assert r.returncode == 1 and "train_000000.bin has changed" in r.stderr


def test_what_a_strangers_file_says_cannot_control_the_terminal(tmp_path):
    (tmp_path / "bad\x1b[2J\x9b31m.txt").write_text("")
    r = script(here("dataset.py"), "--source=bad\x1b[2J\x9b31m.txt", cwd=tmp_path)
    assert r.returncode == 1 and r.stderr == "dataset.py: bad31m.txt is empty\n"


def test_a_million_spaces_are_text(tmp_path):
    enc = get_tokenizer("byte")
    for text in (" " * 1_000_000 + "x", "\n \t" * 400_000 + "x"):
        assert enc.decode(dataset.encode_text(enc, text)) == text
        assert enc.decode(dataset.encode_pieces(enc, [(text, True)]).tolist()) == EOT + text


@pytest.mark.parametrize("environment, error", [
    ({"RANK": "3"}, "RANK=3, which is not what torchrun sets"), ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2, which is not"),
    ({"RANK": "abc", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}, "RANK=abc"),
    ({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "0"}, "RANK=0 must be below WORLD_SIZE=0")], ids=str)
def test_a_launch_that_torchrun_would_not_make_is_refused(environment, error):
    with pytest.raises(UserError, match=error):
        train.read_launch(environment)


def test_the_ladder_under_torchrun_is_refused(workspace):
    r = script(here("train.py"), *FAST, "--bench=ladder", cwd=workspace, n=2)
    assert r.returncode == 1 and r.stderr.count("run it without torchrun\n") == 2, r.stderr


def test_a_command_with_init_from_can_be_repeated_to_resume(workspace, tmp_path):
    options = [*FAST, f"--init_from={CKPT}", f"--out_dir={tmp_path}", "--resume=auto"]
    r = run_ok(here("train.py"), *options, "--max_steps=4", cwd=workspace)
    assert "is not used" not in r.stdout and f"weights: those of {CKPT}\n" in r.stdout
    r = run_ok(here("train.py"), *options, "--max_steps=6", cwd=workspace)
    assert f"--init_from={CKPT} is not used" in r.stdout and "from step 4" in r.stdout


def test_gradients_of_positions_that_many_rows_share_are_added_in_one_order():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=256, block_size=32, vocab_size=64))
    idx = torch.randint(64, (32, 32))
    document = torch.arange(32).expand(32, 32) // 4  # eight documents a row, each from position 0 on
    gradients = []
    for _ in range(20):
        model.zero_grad()
        model(idx, idx, document)[1].backward()
        gradients.append(model.transformer.wpe.weight.grad.clone())
    torch.set_num_threads(threads)
    assert all(torch.equal(gradients[0], g) for g in gradients)


def test_epochs_are_those_of_the_data_though_batch_and_processes_change_on_resume(workspace, tmp_path):
    options = [*FAST, f"--out_dir={tmp_path}", "--val_interval=0"]
    options.remove("--max_steps=30")
    run_ok(here("train.py"), *options, "--max_steps=20", cwd=workspace)
    n_rows = DataLoader(str(workspace / "data/t"), "train", 1, 32).n_rows
    run_ok(here("train.py"), *options, "--resume", "--epochs=1", "--total_batch_size=512", cwd=workspace, n=2)
    ckpt = read_checkpoint(find_checkpoints(tmp_path)[-1])
    assert 0 <= ckpt["loader"]["position"] - n_rows < 16 and ckpt["step"] == 20 + math.ceil((n_rows - 160) / 16)


# -- hostile and damaged files. A fuzzer changes good ones at random; whatever reads them may only raise a UserError.

class Planted:
    """Runs a program if a pickle that holds it is loaded without care."""

    def __reduce__(self):
        return os.mkdir, ("planted",)


HOSTILE = [None, True, -1, 0, 1, 2**31, 2**63, 10**400, 0.5, -0.0, 1e308, math.inf, math.nan, "", "x" * 70_000,
           "../victim.txt", "/etc/passwd", "ladder", "\x1b[2J", "\ud800", "\0", [], {}, [[]], {"a": 1}, "1" * 5000]
DEEP = b"[" * 30_000 + b"]" * 30_000


def change_bytes(rng, content):
    content = bytearray(content)
    for _ in range(rng.choice([1, 1, 1, 4, 30])):
        at = rng.randrange(len(content) + 1)
        what = rng.randrange(5)
        if what == 0 and content:
            content[min(at, len(content) - 1)] ^= 1 << rng.randrange(8)
        elif what == 1:
            del content[at:at + rng.choice([1, 4, 100])]
        elif what == 2:
            content[at:at] = rng.choice([b"\0", b"\xff" * 8, b"\n", b'"', b"}", b"9" * 40, DEEP, b" " * 5000])
        elif what == 3:
            content[at:at + 4] = struct.pack("<i", rng.choice([-1, 0, 1, 2**31 - 1, -2**31, 20240520]))
        else:
            content = content[:at] if rng.random() < 0.3 else content + content[at:at + 200]
    return bytes(content)


def change_tree(rng, value, hostile=HOSTILE):
    """Replaces, removes or adds something at a random place of nested dicts and lists."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        value, key = dict(value), rng.choice(list(value))
        if rng.random() < 0.08:
            del value[key]
        elif rng.random() < 0.05:
            value[rng.choice(["__file__", "bench", "out_dir", "x", "\x1b[31m"])] = rng.choice(hostile)
        else:
            value[key] = change_tree(rng, value[key], hostile)
        return value
    if isinstance(value, list) and value and rng.random() < 0.8:
        value, at = list(value), rng.randrange(len(value))
        value[at:at + 1] = [change_tree(rng, value[at], hostile)] * rng.choice([0, 1, 1, 1, 2])
        return value
    return rng.choice(hostile)


def change_json(rng, content):
    if rng.random() < 0.4:
        return change_bytes(rng, content)
    text = json.dumps(change_tree(rng, json.loads(content)))
    return text.replace('"1111', '1111', 1).replace('1111"', "1111", 1).encode()


def change_lines(rng, content):
    if rng.random() < 0.5:
        return change_bytes(rng, content)
    lines = content.splitlines()
    at = rng.randrange(len(lines))
    lines[at] = change_json(rng, lines[at]) if lines[at].startswith(b"{") else change_bytes(rng, lines[at])
    return b"\n".join(lines) + b"\n"


def change_checkpoint(rng, content):
    if rng.random() < 0.4:
        return change_bytes(rng, content)
    t = torch.zeros(1)
    laughs = functools.reduce(lambda inner, _: [inner] * 10, range(30), [])
    hostile = [*HOSTILE, Planted(), t, t.expand(2**30), torch.full((32,), math.nan), torch.ones(2, dtype=torch.long),
               laughs, torch.sparse_coo_tensor(size=(64, 32), check_invariants=True), torch.empty(3, device="meta")]
    buffer = io.BytesIO()
    ckpt = change_tree(rng, torch.load(io.BytesIO(content), weights_only=True), hostile)
    torch.save(ckpt, buffer, _use_new_zipfile_serialization=rng.random() < 0.9)
    return buffer.getvalue()


make_parser = functools.cache(train.make_parser)


def resume_in_memory(path):
    """As much of a resume as needs no data"""
    ckpt = train.find_resume(dict(resume=path, out_dir="."))
    train.resumed_settings(make_parser(), ckpt, {})
    model = model_file.build_model(model_file.make_config(ckpt["model_config"], path), ckpt.pop("model"), path)
    optimizers = [torch.optim.AdamW(model.parameters())]
    loader = argparse.Namespace(load_state_dict=lambda state: state)
    train.restore(ckpt, optimizers, torch.amp.GradScaler("cpu", enabled=False), loader, torch.device("cpu"))


def read_checkpoint_both_ways(path):
    for read in (load_checkpoint, resume_in_memory):
        with contextlib.suppress(UserError):
            read(path)
    load_checkpoint(path)


def read_folder(path):
    """A folder of shards, from its manifest"""
    folder = os.path.dirname(path)
    dataset.check_shards(folder, (dataset.read_manifest(folder) or {"shards": []})["shards"])
    DataLoader(folder, "train", 2, 8).next_batch()


def read_picture(path):
    plot.read_log(path)
    if os.path.getsize(path) % 50 == 0:
        plot.plot([path], path + ".png")


def make_originals(folder):
    """{kind: (a good file, how to change it, what reads it)}"""
    text, enc = folder / "text.txt", get_tokenizer("byte")
    write_text(text, stories(30))
    dataset.prepare(str(text), "bpe:300", out=str(folder / "data"), shard_tokens=5000)
    manifest = dataset.read_manifest(str(folder / "data"))
    settings = manifest["settings"]
    dataset.save_progress(str(folder), dict(
        settings=settings, tokenizer=manifest["tokenizer"], position=(0, 3, 3, 0), shards=manifest["shards"][:1]),
        {"train": np.arange(9, dtype=np.uint16)})
    cfg = vars(small(vocab_size=257))
    model = GPT(GPTConfig(**cfg))
    optimizer = torch.optim.AdamW(model.parameters())
    model(*torch.zeros(2, 1, 16, dtype=torch.long))[1].backward()
    optimizer.step()
    torch.save(dict(
        version=model_file.CHECKPOINT_VERSION, model_config=cfg, tokenizer={"name": "byte"}, template=None, step=3,
        train_config=train.SETTINGS, data_fingerprint="x", micro_batch=1, model=model.state_dict(),
        run={**train.new_run(), "step": 3},
        optimizers=[optimizer.state_dict()], scaler={},
        loader={"position": 3}), folder / "model.pt")
    GPT(small(vocab_size=257)).save_pretrained(str(folder / "hf"))
    spec = dict(tokenizer=manifest["tokenizer"], template={"user": "U", "assistant": "A"})
    dataset.write_json(str(folder / "spec.json"), spec)
    np.save(folder / "shard.npy", np.arange(500, dtype=np.uint16))
    (folder / "config.json").write_text(json.dumps(dict(recipe="tiny", max_lr=1e-3, n_layer=2, epochs=1.5, seed=3)))
    example = dict(ctx="A man", endings=["is", "was", "has", "had"], label=1)
    (folder / "hella.jsonl").write_text((json.dumps(example) + "\n") * 3)
    turns = [dict(role="user", content="Who?"), dict(role="assistant", content="Me.")]
    pairs = [dict(prompt="a", response="b"), dict(instruction="c", input="", output="d"), dict(messages=turns)]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs * 3)) + "\n")
    header = json.dumps(dict(config=dict(total_batch_size=64), references={"GPT-2": 0.3}))
    log = "".join(f"{i} train {5 - i / 9} lr=1e-3 tok_s=500 mfu=n/a\n{i} val 4.0 bpb=1.2\n" for i in range(9))
    (folder / "log.txt").write_text(f"# {header}\n{log}9 hella 0.3 acc=0.2\n")
    return {
        "shard": (folder / "data/train_000000.bin", change_bytes, lambda path: dataset.read_shard(path).sum()),
        "numpy shard": (folder / "shard.npy", change_bytes, lambda path: dataset.read_shard(path).sum()),
        "manifest": (folder / "data/meta.json", change_json, read_folder),
        "progress": (folder / "progress.npz", change_bytes,
                     lambda path: dataset.load_progress(os.path.dirname(path), settings)),
        "checkpoint": (folder / "model.pt", change_checkpoint, read_checkpoint_both_ways),
        "tokenizer": (folder / "spec.json", change_json, lambda path: get_tokenizer(path).encode("a b")),
        "config": (folder / "config.json", change_json, lambda path: train.configure([f"--config={path}"])),
        "log": (folder / "log.txt", change_lines, read_picture),
        "pairs": (folder / "pairs.jsonl", change_lines, lambda path: Pairs(path, enc)),
        "HellaSwag": (folder / "hella.jsonl", change_lines,
                      lambda path: hellaswag.encode(hellaswag.read_examples(path), enc, 32)),
        "Hugging Face config": (folder / "hf/config.json", change_json,
                                lambda path: GPT.from_pretrained(os.path.dirname(path))),
        "safetensors": (folder / "hf/model.safetensors", change_bytes,
                        lambda path: GPT.from_pretrained(os.path.dirname(path))),
    }


FUZZED = ("shard", "numpy shard", "manifest", "progress", "checkpoint", "tokenizer", "config", "log", "pairs",
          "HellaSwag", "Hugging Face config", "safetensors")


def fuzz(kind, n, folder):
    """Runs in a process of its own, and prints what it found."""
    path, change, read = make_originals(folder)[kind]
    content, rng, refused = path.read_bytes(), random.Random(kind), 0
    victim = folder / "victim.txt"
    victim.write_text("untouched")
    before = train.peak_memory_gb(torch.device("cpu"))
    signal.alarm(0)  # the fork server's
    read(str(path))  # the original
    if kind == "checkpoint":
        resume_in_memory(str(path))
    for i in range(n):
        changed = change(rng, content)
        path.write_bytes(changed)
        faulthandler.dump_traceback_later(30, exit=True)  # if it hangs
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                read(str(path))
        except (UserError, SystemExit):
            refused += 1
        except BaseException:
            print(f"change {i} of {path}", file=sys.stderr)
            raise
    faulthandler.cancel_dump_traceback_later()
    grown = train.peak_memory_gb(torch.device("cpu")) - before
    assert victim.read_text() == "untouched" and not os.path.exists("planted")
    assert grown < 1, f"{grown} GB"
    print(f"{n} changed files of kind {kind}: {refused} refused, {n - refused} read; {grown:.2f} GB")


@pytest.mark.parametrize("n", [100, pytest.param(10_000, marks=torture)])
@pytest.mark.parametrize("kind", FUZZED)
def test_a_damaged_or_hostile_file_is_read_or_refused_in_one_line(tmp_path, kind, n):
    code = f"import test_smoke, pathlib\ntest_smoke.fuzz({kind!r}, {n}, pathlib.Path({str(tmp_path)!r}))\n"
    (tmp_path / "fuzz.py").write_text(code)
    r = run_ok(tmp_path / "fuzz.py", cwd=tmp_path)
    print(r.stdout)


# -- mistakes: one line, a non-zero exit, nothing overwritten

T, D, E = ["train.py", *FAST], ["dataset.py"], ["eval.py", "--out_dir=runs/fp32"]
TXT, NEW = ["dataset.py", "--source=t.txt"], ["--tokenizer=byte", "--out=data/new"]
SYNTH = ["dataset.py", "--source=synth", "--prompts=t.txt", "--model=m", "--endpoint=http://localhost:1/v1"]
RESUMED = ["train.py", "--resume", "--out_dir=runs/fp32"]
HABITS = {  # what users of other trainers type, and what the answer names
    "train.py": {
        "lr=1e-3": "max_lr", "learning_rate=1e-3": "max_lr", "wd=0.1": "weight_decay", "precision=16": "dtype",
        "batch_size=8": "total_batch_size, in tokens: sequences x block_size", "context_length=512": "block_size",
        "n_positions=512": "block_size", "emb_dim=768": "n_embd", "d_model=768": "n_embd", "n_layers=2": "n_layer",
        "num_heads=4": "n_head", "drop_rate=0": "dropout", "num_epochs=3": "epochs", "max_iters=10": "max_steps",
        "warmup_iters=10": "warmup_steps", "eval_interval=5": "val_interval", "model=gpt2": "init_from",
        "dataset=text.txt": "data", "max_grad_norm=1": "grad_clip", "gradient_checkpointing": "grad_checkpoint"},
    "eval.py": {"greedy": "temperature; 0 is greedy", "model=gpt2": "ckpt", "start=Once": "prompt",
                "num_tokens=3": "max_new_tokens"},
    "dataset.py": {"dataset=text.txt": "source", "output_dir=o": "out"},
}


@pytest.mark.parametrize("name, habit, answer", [(n, k, v) for n, table in HABITS.items() for k, v in table.items()])
def test_another_trainers_name_of_an_option_is_answered_with_ours(monkeypatch, name, habit, answer):
    monkeypatch.setattr(sys, "argv", [name, f"--{habit}"])
    parse = {"train.py": lambda: train.configure(sys.argv[1:]), "eval.py": eval_script.main, "dataset.py": dataset.main}
    with pytest.raises(UserError, match=f"^there is no option --{habit.split('=')[0]}; here it is --{answer}$"):
        parse[name]()


def test_batches_may_be_products_and_precisions_those_of_lightning():
    settings = train.parse(train.make_parser(), [
        "--total_batch_size=512*512", "--dtype=bf16-mixed", "--recipe=GPT2", "--max_steps=1e3"])
    assert settings == dict(total_batch_size=2**18, dtype="bfloat16", recipe="gpt2", max_steps=1000)
    for text in ("512*", "2*-3", "2*1.5"):
        with pytest.raises(UserError, match="not a whole number"):
            train.parse(train.make_parser(), [f"--max_steps={text}"])


def test_a_config_may_say_to_resume(tmp_path):
    for value, choice in (("true", "newest"), ("false", ""), ('"auto"', "auto")):
        (tmp_path / "c.json").write_text('{"resume": %s}' % value)
        parser = train.make_parser()
        assert train.parse_values(parser, train.read_config(f"{tmp_path}/c.json"), "c.json") == {"resume": choice}


@pytest.mark.parametrize("name, text", [
    ("c.json", '{"max_lr": 6e-4, "model": {"n_layer": 2, "deep": {"bias": false}}}'),
    ("c.yaml", "max_lr: 6e-4\nmodel:\n  n_layer: 2\n  deep:\n    bias: false\n")])
def test_a_config_is_json_or_yaml_with_or_without_sections(tmp_path, name, text):
    if name.endswith("yaml"):
        pytest.importorskip("yaml")
    (tmp_path / name).write_text(text)
    settings = train.configure([f"--config={tmp_path / name}"])[0]
    assert (settings["max_lr"], settings["n_layer"], settings["bias"]) == (6e-4, 2, False)


MISTAKES = {
    "an unknown option": ([*T, "--max_step=3"], "there is no option --max_step; did you mean --max_steps?"),
    "a misspelt recipe": (["train.py", "--recipe=tinny"], "did you mean tiny?"),
    "an option without its value": ([*T, "--seed"], "--seed: expected one argument"),
    "a word that is no option": ([*T, "fast"], "no option fast"),
    "a word for a number": ([*T, "--max_steps=many"], "--max_steps: 'many' is not a whole number"),
    "a fraction for a whole number": ([*T, "--max_steps=1.5"], "--max_steps: '1.5' is not a whole number"),
    "a number out of range": ([*T, "--keep=0"], "keep=0 is below 1"),
    "two lengths": ([*T, "--max_minutes=1"], "max_steps and epochs cannot be combined"),
    "steps and epochs": ([*T, "--epochs=1"], "max_steps and epochs cannot be combined"),
    "a profile in no folder": ([*T, "--profile=none/trace.json"], "--profile=none/trace.json must name a file, in a"),
    "a folder for a profile": ([*T, "--profile=data"], "--profile=data must name a file"),
    "a temperature of no teacher": ([*T, "--distill_temperature=2"], "--distill_temperature does nothing without"),
    "a rate of no Muon": ([*T, "--muon_lr=0.1"], "--muon_lr does nothing without --optimizer=muon"),
    "a rate that is 0 with Muon's": (
        [*T, "--optimizer=muon", "--muon_lr=0.1", "--max_lr=0", "--min_lr=0"], "muon_lr follows the schedule of"),
    "a cooldown of a cosine": ([*T, "--cooldown=0.1"], "--cooldown does nothing without --schedule=wsd"),
    "new data for a new run": ([*T, "--new_data"], "--new_data does nothing without --resume"),
    "GPUs of a run": ([*T, "--gpu=T4"], "--gpu does nothing without --dry_run"),
    "a bench of a resumed run": ([*T, "--bench=2", "--resume=runs/fp32"], "--bench and --resume cannot be combined"),
    "a bench of a plan": ([*T, "--bench=ladder", "--dry_run"], "--bench and --dry_run cannot be combined"),
    "a ladder on one rung": (["train.py", "--bench=ladder", "--tf32=false"], "--bench=ladder and --tf32 cannot be"),
    "a config that names another": ([*T, "--config=other.json"], "other.json names another, c.json; only one is read"),
    "a split of a text": ([*E, "--perplexity=t.txt", "--split=train"], "--split is for a folder of shards; t.txt is"),
    "a temperature to measure at": ([*E, "--perplexity=t.txt", "--temperature=0"], "--temperature is for generating"),
    "a request with a text for messages": (
        [*SYNTH, "--request={\"messages\": \"ab\"}"], "must be a JSON object, such as"),
    "a folder with a tokenizer of its own": (
        [*TXT, "--tokenizer=data/bpe2", "--out=data/bpe"], "data/bpe was made with a tokenizer of its own; remove it"),
    "a column of a text": ([*TXT, *NEW, "--column=body"], "--column is for tables; t.txt is text"),
    "separators in a table": ([*D, "--source=t.jsonl", *NEW, "--doc_sep=x"], "--doc_sep is for text files; t.jsonl is"),
    "patience without a val split": ([*T, "--data=data/noval", "--patience=2"], "needs validation, but data/noval has"),
    "a damaged test split": ([*T, "--data=data/badtest"], "test_000000.bin is damaged"),
    "a bench of no data": ([*T, "--data=data/none", "--bench=2"], "there is no data data/none"),
    "a folder of texts": ([*T, "--data=texts"], "text becomes shards by python dataset.py"),
    "another text of the same name": (
        [*T, "--data=texts/other.txt", "--tokenizer=byte"], "to prepare it yourself: python dataset.py --source=texts"),
    "a config that says no teacher": ([*T, "--config=teacher.json"], "config teacher.json: teacher is of type bool"),
    "a profile with patience": ([*T, "--profile=trace.json", "--patience=2"], "needs max_steps or epochs, and no"),
    "a rate below its minimum": ([*T, "--max_lr=1e-5"], "min_lr=6e-05 is above max_lr=1e-05; lower it too"),
    "a tokenizer with the name of the data's": (
        [*T, "--data=data/bpe", "--tokenizer=data/bpe2"], "data/bpe uses tokenizer bpe:300, not data/bpe2"),
    "a negative rate": ([*T, "--max_lr=-1"], "max_lr=-1.0 is below 0"),
    "an unknown choice": ([*T, "--norm=batch"], "--norm: invalid choice: 'batch' (choose from"),
    "a missing config": ([*T, "--config=no.json"], "cannot read no.json"),
    "a broken config": ([*T, "--config=broken.json"], "broken.json is not JSON, or is damaged"),
    "a config with an unknown name": ([*T, "--config=unknown.json"], "unknown.json: there is no option --max_l; did"),
    "missing data": ([*T, "--data=data/none"], "there is no data data/none"),
    "data not made yet": (["train.py"], "python dataset.py --source=fineweb-edu"),
    "unfinished data": ([*T, "--data=data/unfinished"], "data/unfinished is unfinished"),
    "an empty folder": ([*T, "--data=data/empty"], "has no .bin or .npy shards with train as a word"),
    "a truncated shard": ([*T, "--data=data/truncated"], "its header says 2,000 tokens, its length 1,990"),
    "a shard with a wrong magic number": ([*T, "--data=data/magic"], "magic"),
    "too little data for a window": ([*T, "--data=data/short"], "a window takes block_size + 1 = 33"),
    "a vocabulary too small for the data": ([*T, "--vocab_size=100"], "vocab_size=100 is too small for"),
    "another tokenizer than the data's": ([*T, "--tokenizer=gpt2"], "data/t uses tokenizer byte, not gpt2"),
    "heads that do not divide the width": ([*T, "--n_head=3"], "n_embd=32 must be a multiple of n_head=3"),
    "a batch that does not divide": ([*T, "--total_batch_size=250"], "use 224 or 256"),
    "a micro-batch that does not divide": ([*T, "--micro_batch=3"], "use one of 1, 2, 4, 8"),
    "an unwritable out_dir": ([*T, "--out_dir=t.txt/run"], "cannot write in out_dir=t.txt/run"),
    "a device that is not there": ([*T, "--device=cuda:99"], "device=cuda:99 cannot be used here"),
    "no checkpoint to resume": ([*T, "--resume", "--out_dir=runs/none"], "no checkpoint to resume from"),
    "a missing checkpoint": ([*T, "--resume=no.pt"], "there is no checkpoint no.pt"),
    "not a checkpoint": ([*T, "--resume=t.txt"], "t.txt is not a checkpoint"),
    "a checkpoint of another shape": ([*T, "--n_embd=64", "--resume", "--out_dir=runs/fp32"], "has n_embd=32, not 64"),
    "fewer steps than are done": ([*RESUMED, "--data=data/t", "--max_steps=3"], "is at step 30, past max_steps=3"),
    "another recipe on resume": ([*RESUMED, "--recipe=tiny"], "was trained with recipe gpt2, not tiny"),
    "no data on resume": (RESUMED, "was trained with --data=data/t; to resume, repeat that option"),
    "no teacher on resume": (
        ["train.py", "--resume", "--out_dir=runs/pairs", "--data=pairs.jsonl"],
        f"was trained with --teacher={CKPT}; to resume, repeat that option"),
    "a checkpoint of other data": ([*RESUMED, "--data=data/other"], "--new_data resumes all the same"),
    "a validation shard with a foreign token": (
        [*T, "--data=data/foreign", "--vocab_size=50304"], "val_000000.bin: token 60000 at 3"),
    "a manifest that is not ours": ([*T, "--data=data/manifest"], "not written by this version of dataset.py"),
    "a teacher of another tokenizer": (
        [*T, "--data=data/bpe", f"--teacher={CKPT}"], "uses tokenizer byte, but the data uses another, bpe:300"),
    "a teacher with a shorter context": (
        [*T, "--block_size=64", f"--teacher={CKPT}"], "a context of 32, less than block_size=64"),
    "a teacher that is not there": ([*T, "--teacher=no.pt"], "there is no checkpoint no.pt"),
    "a share beyond the whole": ([*T, "--distill_alpha=1.5"], "distill_alpha=1.5 is above 1"),
    "a temperature of zero": ([*T, "--distill_temperature=0"], "distill_temperature=0.0 is below 0.001"),
    "a stride through pairs": (
        [*T, "--data=pairs.jsonl", "--tokenizer=byte", "--stride=8"], "stride=8 is for running text"),
    "weights that are not there": ([*T, "--init_from=no.pt"], "there is no checkpoint no.pt"),
    "a model that does not exist": ([*T, "--init_from=nowhere/"], "nowhere/"),
    "a bench of no steps": ([*T, "--bench=0"], "bench='0' must be a number of steps, or ladder"),
    "an unknown kind of bench": ([*T, "--bench=fast"], "bench='fast' must be a number of steps, or ladder"),
    "an unknown source": ([*D, "--source=finweb"], "did you mean fineweb?"),
    "a source that is not there": ([*D, "--source=no.txt"], "there is no source 'no.txt'"),
    "a pattern without files": ([*D, "--source=*.nothing"], "no file matches"),
    "a folder as a source": ([*D, "--source=data"], "data is a folder"),
    "splits that are not a whole": ([*TXT, "--splits=90/20"], "--splits=90/20 must be percentages"),
    "a worker too many": (["dataset.py", "--worker=16/16"], "16/16 must be one of 0/16, 1/16, ..., 15/16"),
    "a worker for a text file": ([*TXT, "--worker=0/2"], "--worker divides .jsonl, .parquet and Hugging Face data"),
    "too many workers": (["dataset.py", "--source=pairs.jsonl", "--column=response", "--worker=0/2"],
                         "pairs.jsonl has too few files or row groups, 1, for 2 workers"),
    "a worker with a tokenizer to train": ([*TXT[:1], "--worker=0/2", "--tokenizer=bpe:300"],
                                           "--worker needs a tokenizer that exists"),
    "a worker with a limit": (["dataset.py", "--worker=0/2", "--max_bytes=100"], "cannot know where max_bytes"),
    "a shard of no tokens": ([*TXT, "--shard_tokens=0"], "0 must be at least 1"),
    "parts of parts": ([*D, "--source=toygpt,t.txt"], "source toygpt has settings of its own"),
    "a strict look at a bad line": ([*D, "--source=bad.jsonl", "--tokenizer=byte", "--strict"],
                                    "bad.jsonl, line 2: no response; without --strict"),
    "no good pair": ([*D, "--source=none.jsonl", "--tokenizer=byte"],
                     "none.jsonl holds no pairs; its first line: empty response"),
    "pairs in one piece": (["train.py", "--recipe=sft", "--data=pairs.json"], "pairs.json: .json files are not read"),
    "an option of text for pairs": ([*D, "--source=pairs.jsonl", "--splits=90/10"], "--splits does not apply to"),
    "strictness with a text": ([*TXT, "--strict"], "--strict does not apply to --source=t.txt"),
    "a server with a text": ([*TXT, "--endpoint=http://localhost/v1"], "--endpoint does not apply"),
    "a tokenizer for a server": ([*SYNTH, "--tokenizer=byte"], "--tokenizer does not apply to --source=synth"),
    "prompts without a server": (SYNTH[:-1], "--source=synth needs --endpoint"),
    "an address that is none": ([*SYNTH, "--endpoint=localhost:1"], "--endpoint must look like http://localhost"),
    "an address with too large a port": ([*SYNTH[:-1], "--endpoint=http://localhost:99999/v1", "--out=x.jsonl"],
                                         "--endpoint: http://localhost:99999/v1/chat/completions is not an address"),
    "a key in the address": ([*SYNTH, "--endpoint=http://me:secret@localhost/v1"], "a key goes into OPENAI_API_KEY"),
    "prompts that are not there": ([*SYNTH, "--prompts=no.txt"], "cannot read no.txt"),
    "answers into a folder": ([*SYNTH, "--out=data/answers"], "--out=data/answers must be a file of pairs, .jsonl"),
    "a request that is no JSON": ([*SYNTH, "--request=hot"], "--request=hot must be a JSON object"),
    "answers onto something else": ([*SYNTH, "--out=pairs.jsonl"], "pairs.jsonl, line 1, was not written by"),
    "answers to a prompt that is a list": ([*SYNTH, "--out=odd.jsonl"], "odd.jsonl, line 1, was not written by"),
    "an empty file": ([*D, "--source=empty.txt"], "empty.txt is empty"),
    "a binary file as text": ([*D, "--source=binary.txt", *NEW], "binary.txt is not UTF-8 text"),
    "a blank text": ([*D, "--source=blank.txt", "--tokenizer=byte"], "holds no text"),
    "a tokenizer that does not exist": ([*TXT, "--tokenizer=gpt3"], "there is no tokenizer 'gpt3'"),
    "a tokenizer too large for uint16": ([*TXT, "--tokenizer=bpe:70000"], "from 258 to 65536"),
    "a tokenizer too small": ([*TXT, "--tokenizer=bpe:100"], "from 258 to 65536"),
    "a missing column": ([*D, "--source=t.jsonl", *NEW], "choose one with dataset.py --column: story"),
    "broken json": ([*D, "--source=broken.jsonl", *NEW], "broken.jsonl, line 2: not JSON"),
    "other settings for a finished folder": ([*TXT, "--tokenizer=bpe:300", "--out=data/t"],
                                             "data/t was made with tokenizer=byte, not bpe:300"),
    "an unknown option of dataset.py": ([*D, "--sources=t.txt"], "did you mean --source?"),
    "a model that is nowhere": (["eval.py", "--prompt=x", "--ckpt=/no/such/run"], "there is no /no/such/run"),
    "no checkpoint to speak": (["eval.py", "--prompt=x", "--out_dir=runs/none"], "has no checkpoint"),
    "a seed that is too large": ([*E, "--seed=99999999999999999999", "--prompt=x"], "is out of range"),
    "a temperature below zero": ([*E, "--temperature=-1"], "temperature=-1.0 is out of range"),
    "a text of blank lines": ([*E, "--perplexity=blank.txt"], "has 0 tokens"),
    "shards of another vocabulary": (
        [*E, "--perplexity=data/foreign"], "token 60000, outside the model's vocabulary of 257"),
    "a folder in another tokenizer": ([*E, "--perplexity=data/bpe"], "data/bpe is in tokenizer bpe:300, which is not"),
    "a text that is not there": ([*E, "--perplexity=no.txt"], "there is no source 'no.txt'"),
    "a stride on pairs": ([*E, "--perplexity=bad.jsonl", "--stride=5"], "--stride does not apply to pairs"),
    "two jobs": ([*E, "--prompt=x", "--perplexity=t.txt"], "--perplexity and --prompt cannot be combined"),
    "a model beside those compared": (
        ["eval.py", f"--ckpt={CKPT}", "--compare", CKPT], "--compare names its models itself"),
    "a split of pairs": ([*E, "--perplexity=bad.jsonl", "--split=train"], "--split is for a folder of shards; bad"),
    "nothing to measure": ([*E, "--perplexity="], "--perplexity has an empty value"),
    "a folder without a name": ([*E, "--export", ""], "--export has an empty value"),
    "a run that is its own teacher": (
        [*T, "--teacher=runs/fp32", "--out_dir=runs/fp32"], "the teacher runs/fp32 is in this run's own folder"),
    "a single pair": (
        ["train.py", "--recipe=sft", f"--init_from={CKPT}", "--data=single.jsonl"], "has no train split: that takes"),
    "samples of no prompt": ([*E, "--num_samples=2"], "--num_samples needs a --prompt"),
    "a picture in the terminal": (["plot.py", "log.txt", "--term", "--dark"], "--term prints a chart, without"),
    "a folder for a picture": (["plot.py", "log.txt", "--out=data"], "--out=data is a folder"),
    "a stride beyond the context": ([*E, "--perplexity=t.txt", "--stride=33"], "is more than the context of 32"),
    "parts of a whole model": ([*T, "--ckpt_shards"], "ckpt_shards needs --parallel=zero2 or zero3"),
    "a task without a comparison": ([*E, "--task=piqa"], "--task belongs to --compare"),
    "a split of nothing": ([*E, "--prompt=x", "--split=test"], "--split belongs to --perplexity"),
    "an export of integers": ([*E, "--export=x", "--dtype=int8"], "--export writes float32, bfloat16 or float16"),
    "an export onto something": ([*E, "--export=data/t"], "data/t is not empty"),
    "an object that is no model": (
        ["eval.py", "--ckpt=object.pt", "--prompt=x"], "object.pt is not a checkpoint of train.py, nanoGPT or"),
    "a Hugging Face folder without a shape": (["eval.py", "--ckpt=hf", "--prompt=x"], "config.json lacks n_embd,"),
    "examples that are not HellaSwag": (
        ["hellaswag.py", "--data=t.jsonl", "--out_dir=runs/fp32"], "line 1: not an example of HellaSwag"),
    "patience without validation": ([*T, "--patience=2", "--val_interval=0"], "--patience does nothing without"),
    "a GPU that is not known": ([*T, "--dry_run", "--gpu=L40S,H1"], "gpu=H1 is none of GB200, B200, "),
    "a share of no teacher": ([*T, "--distill_alpha=0.3"], "--distill_alpha does nothing without --teacher"),
    "another seed on resume": ([*RESUMED, "--seed=5"], "has seed=1337, not 5; that cannot change"),
    "another stride on resume": ([*RESUMED, "--stride=16"], "has stride=0, not 16; that cannot change"),
    "a run's folder that is none": ([*T, "--resume=data"], "data/checkpoints has no checkpoint to resume from"),
    "a device without memory": ([*T, "--device=meta"], "device=meta cannot be used here"),
    "a shape beyond reason": ([*T, "--n_embd=1_000_000"], "n_embd=1000000 is above 131072"),
    "a config that never ends": ([*T, "--config=deep.json"], "deep.json is not JSON, or is damaged (RecursionError)"),
    "a config with a long number": ([*T, "--config=long.json"], "is not a whole number"),
    "a config with a list": ([*T, "--config=list.json"], "config list.json: seed is of type list"),
    "text that never ends": ([*D, "--source=deep.jsonl", *NEW], "deep.jsonl, line 1: not JSON"),
    "a row that is no object": ([*D, "--source=list.jsonl", *NEW], "line 1: not a JSON object"),
    "a number for text": ([*D, "--source=number.jsonl", *NEW], "line 1: 'text' is int, not text"),
    "nothing to verify": ([*D, "--verify=data/empty"], "data/empty has no meta.json"),
    "a source to verify": ([*TXT, "--verify=data/t"], "--source does not apply to --verify"),
    "a damaged numpy shard": ([*T, "--data=data/numpy"], "train.npy is not a token shard, or is damaged"),
    "half a surrogate pair in HellaSwag": (
        ["hellaswag.py", "--data=surrogate.jsonl", "--out_dir=runs/fp32"], "line 1: not an example of HellaSwag"),
    "an example with many endings": (
        ["hellaswag.py", "--data=endings.jsonl", "--out_dir=runs/fp32"], "line 1: not an example of HellaSwag"),
    "several tasks of one file": (
        ["hellaswag.py", "--task=piqa,lambada", "--data=t.jsonl", "--out_dir=runs/fp32"], "name one --task"),
    "a task that is not known": (["hellaswag.py", "--task=piqa,arc"], "arc is none of hellaswag, "),
    "no examples at all": (["hellaswag.py", "--limit=0"], "0 must be at least 1"),
    "a share of the probability above 1": ([*E, "--top_p=2", "--prompt=x"], "top_p=2.0 is out of range"),
    "no samples at all": ([*E, "--num_samples=0", "--prompt=x"], "0 must be at least 1"),
    "a folder as a log": (["plot.py", "data"], "cannot read data"),
    "a missing log": (["plot.py", "no.txt"], "cannot read no.txt"),
    "an unknown picture format": (["plot.py", "runs/fp32/log.txt", "--out=log.xyz"], "cannot write log.xyz"),
}


@pytest.fixture(scope="session")
def mistakes(workspace):
    """Makes every mistake.  -> {name: completed process}, and the files before and after"""
    for name in ("empty", "unfinished", "truncated", "magic", "short", "foreign", "manifest", "numpy"):
        (workspace / "data" / name).mkdir()
    (workspace / "data/unfinished/progress.npz").touch()
    dataset.write_shard(str(workspace / "data/truncated/train_000000.bin"), np.arange(2000) % 250)
    os.truncate(workspace / "data/truncated/train_000000.bin", 1024 + 2 * 1990)
    (workspace / "data/magic/train_000000.bin").write_bytes(b"\1" * 4000)
    dataset.write_shard(str(workspace / "data/short/train_000000.bin"), [1] * 20)
    dataset.write_shard(str(workspace / "data/foreign/train_000000.bin"), [1] * 500)
    dataset.write_shard(str(workspace / "data/foreign/val_000000.bin"), [1, 1, 1, 60000] + [1] * 100)
    (workspace / "data/manifest/meta.json").write_text("{}")
    (workspace / "data/numpy/train.npy").write_bytes(b"\x93NUMPY\1\0\x10\0{'descr': 'u2(((")
    files = {
        "deep.json": DEEP, "long.json": b'{"seed": 1%s}' % (b"0" * 400), "list.json": b'{"seed": [1]}',
        "deep.jsonl": b'{"text": %s}\n' % DEEP, "list.jsonl": b"[1]\n", "number.jsonl": b'{"text": 5}\n',
        "endings.jsonl": json.dumps({"ctx": "a", "endings": ["b"] * 200_000, "label": 0}).encode() + b"\n",
        "surrogate.jsonl": b'{"ctx": "\\ud800", "endings": ["a", "b", "c", "d"], "label": 0}\n',
        "broken.json": b"{", "teacher.json": b'{"teacher": false}', "unknown.json": b'{"max_l": 1}',
        "other.json": b'{"config": "c.json"}',
        "empty.txt": b"", "blank.txt": b"\n\n \n\n",
        "binary.txt": bytes(range(256)) * 9, "t.jsonl": b'{"story": "x"}\n',
        "broken.jsonl": b'{"text": "x"}\n{"text": \n',
        "bad.jsonl": b'{"prompt": "a", "response": "b"}\n{"prompt": "a"}\n',
        "odd.jsonl": b'{"prompt": ["a"], "response": "b", "model": "m"}\n',
        "single.jsonl": b'{"prompt": "a", "response": "b"}\n',
        "none.jsonl": b'{"prompt": "a", "response": ""}\n', "pairs.json": b'[{"prompt": "a", "response": "b"}]'}
    for name, raw in files.items():
        (workspace / name).write_bytes(raw)
    path = write_text(workspace / "other.txt", stories(90))
    dataset.prepare(path, "byte", out=str(workspace / "data/other"))
    dataset.prepare(path, "byte", out=str(workspace / "data/other-byte"))
    dataset.prepare(path, "byte", out=str(workspace / "data/noval"), splits="100/0")
    dataset.prepare(path, "byte", out=str(workspace / "data/badtest"), splits="80/10/10")
    os.truncate(workspace / "data/badtest/test_000000.bin", 1024)
    (workspace / "texts").mkdir()
    write_text(workspace / "texts/other.txt", stories(80))
    dataset.prepare(str(workspace / "t.txt"), "bpe:300", out=str(workspace / "data/bpe"))
    dataset.prepare(path, "bpe:300", out=str(workspace / "data/bpe2"))
    torch.save({"model": [1]}, workspace / "object.pt")
    (workspace / "hf").mkdir()
    torch.save({}, workspace / "hf/pytorch_model.bin")
    (workspace / "hf/config.json").write_text("{}")
    before = tree(workspace)

    def make(name):  # two at a time, so each has a folder of its own
        program, *args = (arg.replace("data/new", f"data/new {name}") for arg in MISTAKES[name][0])
        return script(here(program), *args, cwd=workspace, HF_HUB_OFFLINE="1")

    done = BOTH_CORES.map(make, MISTAKES)
    return dict(zip(MISTAKES, done)), before, tree(workspace)


def tree(folder):
    paths = [os.path.join(d, f) for d, _, files in os.walk(folder) for f in files if "__pycache__" not in d]
    return {path: os.stat(path).st_mtime_ns for path in paths if not path.endswith(".lock")}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_ends_in_one_line_that_says_what_is_wrong(mistakes, name):
    r, (args, expected) = mistakes[0][name], MISTAKES[name]
    assert r.returncode != 0 and "Traceback" not in r.stderr, r.stderr
    assert r.stderr.startswith(f"{args[0]}: ") and expected in r.stderr and r.stderr.count("\n") == 1, r.stderr


def test_mistakes_overwrite_nothing(mistakes):
    _, before, after = mistakes
    assert {p: t for p, t in after.items() if p in before} == before


# -- torture: python -m pytest -m torture, about an hour

KILLED = {  # processes, kills, options
    "one process": (1, 70, []), "pairs and a teacher": (1, 70, RUNS["pairs"]), "two processes": (2, 30, []),
    "zero2": (2, 30, ["--parallel=zero2"]), "zero3, in parts": (2, 30, ["--parallel=zero3", "--ckpt_shards"])}


def wait_for_start(p, log, before):
    """Until the run has written its header"""
    while p.poll() is None and find_headers(log) == before:
        time.sleep(0.002)


@torture
@pytest.mark.parametrize("name", KILLED)
def test_kills_at_random_instants_change_no_loss(workspace, tmp_path, name):
    n, wanted, options = KILLED[name]
    launch = torchrun(n) if n > 1 else []
    command = [*launch, here("train.py"), *FAST, *options, "--max_steps=60", "--keep=2", "--resume=auto",
               "--n_embd=256"]  # wide, so that a good part of the time is spent in saving
    p = start(*command, f"--out_dir={tmp_path}/whole", cwd=workspace)
    wait_for_start(p, tmp_path / "whole/log.txt", None)
    began = time.monotonic()
    assert p.wait() == 0
    seconds, rng, kills, finished, saving = time.monotonic() - began, random.Random(name), 0, 0, 0
    while kills < wanted:
        out = tmp_path / f"run{finished}"
        log, before = out / "log.txt", find_headers(out / "log.txt")
        p = start(*command, f"--out_dir={out}", cwd=workspace, stderr=subprocess.PIPE)
        if rng.random() < 0.9:  # after the start, which takes most of the time
            wait_for_start(p, log, before)
            time.sleep(rng.random() * seconds / 2)
        else:
            time.sleep(rng.random() * 3)
        if p.poll() is None:
            kills += 1
            if n > 1 and rng.random() < 0.3:
                p.kill()  # torchrun alone: its workers notice, save and end
            else:
                os.killpg(p.pid, signal.SIGKILL)
            p.wait()
            saving += any(path.suffix == ".tmp" for path in out.glob("checkpoints/**/*"))
            with contextlib.suppress(FileNotFoundError), filelock.FileLock(out / ".lock", timeout=60):
                pass
            for path in find_checkpoints(out):
                read_checkpoint(path)
        elif p.returncode == 0:
            assert records(out) == records(tmp_path / "whole")
            finished += 1
        else:
            raise AssertionError(p.stderr.read())
    p = start(*command, f"--out_dir={out}", cwd=workspace)
    assert p.wait() == 0 and records(out) == records(tmp_path / "whole")
    print(f"{name}: {kills} kills, {saving} of them in a save; {finished + 1} runs, all with equal losses")


def some_port():
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def start_node(folder, port, *options, **popen):
    """One of two machines, each with its own folder and one process"""
    folder.mkdir(exist_ok=True)
    launch = ["-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d",
              f"--rdzv_endpoint=localhost:{port}"]
    return start(*launch, here("train.py"), *options, cwd=folder, **popen)


def find_workers(agent):
    r = subprocess.run(["pgrep", "-P", str(agent.pid)], capture_output=True, text=True)
    return [int(pid) for pid in r.stdout.split()]


@torture
@pytest.mark.parametrize("parallel", ["ddp", "zero3"])
def test_torchrun_restarts_a_run_whose_workers_die_and_no_loss_changes(workspace, tmp_path, monkeypatch,
                                                                               parallel):
    options = [*NO_DROPOUT, "--max_steps=100", "--ckpt_interval=10", "--resume=auto", f"--parallel={parallel}"]
    launch = [*torchrun(2), "--max-restarts=3"]
    run_ok(here("train.py"), *options, f"--out_dir={tmp_path}/one", cwd=workspace)
    # else new workers may find the addresses of old ones, and wait for them (pytorch issue 135712)
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    p = start(*launch, here("train.py"), *options, f"--out_dir={tmp_path}/cut", cwd=workspace)
    for step, rank in ((25, 1), (60, 0)):
        wait_for_step(tmp_path / "cut", step, p)
        os.kill(find_workers(p)[rank], signal.SIGKILL)
    assert p.wait() == 0
    assert losses(tmp_path / "cut") == pytest.approx(losses(tmp_path / "one"), abs=1e-5)


@torture
def test_two_machines_without_a_common_folder_train_and_one_ends_when_the_other_is_gone(workspace, tmp_path):
    options = [*NO_DROPOUT, f"--data={workspace}/t.txt", "--tokenizer=byte", "--out_dir=run"]
    run_ok(here("train.py"), *options, "--max_steps=60", n=2, cwd=tmp_path)
    port = some_port()
    nodes = [start_node(tmp_path / f"whole{i}", port, *options, "--max_steps=60") for i in range(2)]
    assert [p.wait() for p in nodes] == [0, 0]
    [log] = tmp_path.glob("whole*/run/log.txt")
    assert losses(log.parent) == pytest.approx(losses(tmp_path / "run"), abs=1e-3)  # of other numbers of threads

    port = some_port()
    nodes = [start_node(tmp_path / f"cut{i}", port, *options, "--max_steps=100000", stderr=subprocess.PIPE)
             for i in range(2)]
    while not (logs := list(tmp_path.glob("cut*/run/log.txt"))) or b"\n30 train" not in logs[0].read_bytes():
        assert nodes[0].poll() is None is nodes[1].poll()
        time.sleep(0.02)
    main = int(logs[0].parent.parent.name.removeprefix("cut"))
    for pid in (*find_workers(nodes[1 - main]), nodes[1 - main].pid):
        os.kill(pid, signal.SIGKILL)
    _, printed = nodes[main].communicate(timeout=60)
    assert nodes[main].returncode == 1 and "train.py: rank 0 lost the others" in printed


def find_headers(log):
    """Which file it is, since a run without a checkpoint is set aside, and how many headers it has"""
    with contextlib.suppress(FileNotFoundError):
        return log.stat().st_ino, log.read_bytes().count(b"# {")


@torture
def test_fifty_kills_at_random_instants_change_no_shard(tmp_path):
    write_text(tmp_path / "t.txt", stories(2000) * 3)
    code = "import dataset, sys; dataset.BATCH_CHARS = 20_000; " \
        "dataset.prepare('t.txt', 'bpe:400', out=sys.argv[1], shard_tokens=70_000)"
    command = ["-c", f"import sys; sys.path.insert(0, {HERE!r}); {code}"]
    began = time.monotonic()
    assert start(*command, "whole", cwd=tmp_path).wait() == 0
    seconds, expected = time.monotonic() - began, digest(tmp_path / "whole")
    rng, kills, finished = random.Random(0), 0, 0
    while kills < 50:
        p = start(*command, f"cut{finished}", cwd=tmp_path)
        with contextlib.suppress(subprocess.TimeoutExpired):
            p.wait(rng.random() * seconds)
        kills += p.poll() is None
        p.kill()
        if p.wait() == 0:
            assert digest(tmp_path / f"cut{finished}") == expected
            finished += 1
    assert start(*command, f"cut{finished}", cwd=tmp_path).wait() == 0
    assert digest(tmp_path / f"cut{finished}") == expected
    print(f"{kills} kills; {finished + 1} folders, all with equal bytes")


@torture
def test_two_hundred_runs_with_all_threads_are_identical(tmp_path):
    options = ["--recipe=tiny", "--device=cpu", "--max_steps=6", "--log_interval=1", "--val_interval=0",
               "--sample_interval=0", "--ckpt_interval=0"]
    threads = str(os.cpu_count())
    run_ok(here("train.py"), *options, "--out_dir=0", cwd=tmp_path, OMP_NUM_THREADS=threads)
    for i in range(1, 200):
        run_ok(here("train.py"), *options, f"--out_dir={i}", cwd=tmp_path, OMP_NUM_THREADS=threads)
        assert records(tmp_path / str(i)) == records(tmp_path / "0"), i


@torture
def test_a_full_disk_ends_nothing_in_a_traceback_and_overwrites_nothing(workspace, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("needs the right to mount a file system")
    with serving(answer=lambda prompt, n: completion(prompt)) as (url, _):
        commands = {
            "training": ["train.py", *FAST, f"--out_dir={disk}/run"],
            "preparation": ["dataset.py", "--source=t.txt", "--tokenizer=byte", f"--out={disk}/data"],
            "export": ["eval.py", "--ckpt=runs/fp32", f"--export={disk}/hf"],
            "picture": ["plot.py", "runs/fp32/log.txt", f"--out={disk}/log.png"],
            "synthesis": ["dataset.py", "--source=synth", "--prompts=t.txt", "--model=m", f"--endpoint={url}",
                          f"--out={disk}/synth.jsonl"]}
        for name, (file, *options) in commands.items():
            for path in disk.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            (disk / "filler").write_bytes(b"x" * {"training": 480_000, "preparation": 500_000}.get(name, 599_000))
            r = script(here(file), *options, cwd=workspace)
            assert r.returncode == 1 and "Traceback" not in r.stderr, (name, r.stderr)
            assert "No space left on device" in r.stderr, (name, r.stderr)
            assert not [path for path in disk.rglob("*.tmp")], name
            if name == "training":
                assert len(losses(disk / "run")) == 30
    subprocess.run(["umount", disk])
