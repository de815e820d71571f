"""
Uses a model: prompts it, chats with it, serves it, measures it, compares it, exports it.

    python eval.py --prompt "Once"                                   # the newest checkpoint of this folder
    python eval.py                                                   # interactive: continues what you type, or answers
    python eval.py --ckpt gpt2 --prompt "Hello, I'm a language model," --num_samples 5
    python eval.py --serve                                           # a page to talk to it, and OpenAI's API
    python eval.py --perplexity text.txt                             # or pairs.jsonl, or a folder of shards
    python eval.py --compare runs/a runs/b gpt2 --perplexity text.txt
    python eval.py --export hf/                                      # for transformers

    from eval import generate_text
    print(generate_text(prompt="Once", max_new_tokens=50, temperature=0.7, top_k=50, top_p=0.95))
"""
import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while torch is imported: no traceback

import codecs
import contextlib
import functools
import http.server
import inspect
import itertools
import json
import math
import os
import re
import secrets
import select
import socket
import sys
import threading
import time
from urllib.parse import urlsplit

import numpy as np
import torch

import dataset
import hellaswag
from data_loader import DataLoader, Pairs, find_shards
from dataset import UserError
from model import find_model, open_model, pick_dtype

SAMPLES_AT_ONCE = 16


def load(ckpt=None, out_dir=".", device="auto", dtype="auto"):
    """-> the model, its tokenizer, and what else its checkpoint says"""
    model, known = open_model(ckpt, out_dir, device, dtype)
    return model, dataset.get_tokenizer(known["tokenizer"]), known


load_cached = functools.lru_cache(maxsize=1)(load)


# -- generating text

class Detokenizer:
    """Turns the tokens of one text into printable pieces, up to end-of-text or a stop string."""

    def __init__(self, enc, stop):
        self.enc, self.stop, self.ended = enc, stop, False
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a character may span several tokens
        self.held = ""  # text that may turn out to begin a stop string

    def add(self, token):
        """-> the text that can be shown after this token"""
        if self.ended:
            return ""
        if token == self.enc.eot_token:
            self.ended = True
            return self.held + self.decoder.decode(b"", final=True)
        text = self.held + self.decoder.decode(self.enc.decode_single_token_bytes(token))
        found = [text.index(s) for s in self.stop if s in text]
        if found:
            self.ended = True
            return text[:min(found)]
        n_held = max((n for s in self.stop for n in range(len(s)) if text.endswith(s[:n])), default=0)
        self.held = text[len(text) - n_held:]
        return text[:len(text) - n_held]


def stream_text(model, enc, prompts, max_new_tokens, temperature, top_k, top_p, generator, stop=()):
    """Continues prompts, lists of tokens. Yields lists of text pieces, one piece per prompt."""
    tokens = model.stream(prompts, temperature, top_k, top_p, generator)
    stop = [stop] if isinstance(stop, str) else stop
    rows = [Detokenizer(enc, stop) for _ in prompts]
    for _ in range(max_new_tokens):
        yield [row.add(token) for row, token in zip(rows, next(tokens).flatten().tolist())]
        if all(row.ended for row in rows):
            return
    yield [row.add(enc.eot_token) for row in rows]  # what is still held back


def make_generator(model, seed):
    seed = secrets.randbits(63) if seed is None else seed
    return torch.Generator(model.lm_head.weight.device).manual_seed(seed)


def check_sampling(temperature, top_k, top_p, seed, stop):
    checks = [("temperature", temperature, 0 <= temperature < math.inf),
              ("top_k", top_k, top_k >= 0), ("top_p", top_p, 0 < top_p <= 1),
              ("seed", seed, seed is None or 0 <= seed < 2**63)]
    for name, value, is_in_range in checks:
        if not is_in_range:
            raise UserError(f"{name}={value} is out of range")
    if "" in ([stop] if isinstance(stop, str) else stop):
        raise UserError("stop must not be empty")


def generate_text(prompt="", max_new_tokens=50, temperature=0.7, top_k=50, top_p=0.95, seed=None, stop=(), ckpt=None,
                  out_dir=".", device="auto", dtype="auto"):
    """-> the prompt and its continuation; from a model fine-tuned on pairs, only the response"""
    check_sampling(temperature, top_k or 0, 1 if top_p is None else top_p, seed, stop or ())
    path = find_model(ckpt, out_dir)  # of a folder the newest, which may not be that of the last call
    model, enc, known = load_cached(path, out_dir, device, dataset.dtype_name(dtype))
    template = known.get("template")
    tokens = dataset.prompt_tokens(enc, template, [(prompt, None)])
    generator = make_generator(model, seed)
    pieces = stream_text(model, enc, [tokens], max_new_tokens, temperature, top_k, top_p, generator, stop or ())
    text = "".join(piece for [piece] in pieces)
    return text if template else prompt + text


def chat_tokens(model, enc, template, turns, system=""):
    """
    The tokens of a conversation. While it fills more than half the context, removes its oldest turn from `turns`. A
    system message goes before the first prompt that is left.
    """
    parts = [dataset.prompt_tokens(enc, template, [turn]) for turn in turns]
    n = sum(map(len, parts)) + len(dataset.encode_text(enc, system))
    while n > model.cfg.block_size // 2 and len(turns) > 1:
        n -= len(parts.pop(0))
        del turns[0]
    if system:
        prompt, answer = turns[0]
        parts[0] = dataset.prompt_tokens(enc, template, [(f"{system}\n\n{prompt}", answer)])
    return list(itertools.chain(*parts))


def print_samples(prompts, respond, gap):
    """A single text is printed as it is generated. Several are generated together, and printed one after the other."""
    if len(prompts) == 1:
        print(prompts[0] + gap, end="", flush=True)
        for [piece] in respond([[(prompts[0], None)]]):
            print(piece, end="", flush=True)
        print()
        return
    for i in range(0, len(prompts), SAMPLES_AT_ONCE):
        group = prompts[i:i + SAMPLES_AT_ONCE]
        continuations = map("".join, zip(*respond([[(prompt, None)] for prompt in group])))
        texts = [prompt + gap + continuation for prompt, continuation in zip(group, continuations)]
        print(("---\n" if i else "") + "\n---\n".join(texts), flush=True)


def interact(respond, is_chat):
    """Continues the text that is typed or, in a chat, answers. Ctrl-C interrupts the model, Ctrl-D ends the session."""
    with contextlib.suppress(ImportError):  # missing on Windows
        import readline  # noqa: F401  gives input() a history
    what = "ask something" if is_chat else "type the beginning of a text, or nothing to continue it"
    print(f"{what}; Ctrl-C interrupts, Ctrl-D quits", file=sys.stderr)
    turns, text = [], ""
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        except KeyboardInterrupt:
            print()
            continue
        if is_chat and not line.strip():
            continue
        if is_chat:
            turns.append((line, None))
        else:
            text += "\n" + line if text and line else line
            turns = [(text, None)]
        answer = ""
        with contextlib.suppress(KeyboardInterrupt):
            for [piece] in respond([turns]):
                print(piece, end="", flush=True)
                answer += piece
        print()
        text += answer
        if is_chat:
            turns[-1] = (turns[-1][0], answer.strip())


# -- measuring

def read_tokens(path, enc, split, limit=None):
    """The first tokens of a folder of shards, or of a file of text.  -> (n,)"""
    if os.path.isdir(path):
        paths, _, manifest = find_shards(path, split)
        if manifest and manifest["tokenizer_fingerprint"] != dataset.tokenizer_fingerprint(enc):
            raise UserError(f"{path} is in tokenizer {manifest['tokenizer']['name']}, which is not the model's; "
                            "pass the original text file instead")
        parts = map(dataset.read_shard, paths)
    else:
        sources = dataset.open_sources(path)
        parts = (dataset.encode_pieces(enc, pieces) for source in sources for pieces, _ in source.read(None))
    taken = [np.empty(0, dtype=np.uint16)]
    for part in parts:
        taken.append(part)
        if limit and sum(map(len, taken)) >= limit:
            break
    tokens = np.concatenate(taken)[:limit]
    if len(tokens) and tokens.max() >= enc.n_vocab:
        raise UserError(f"{path} has token {tokens.max()}, outside the model's vocabulary of {enc.n_vocab:,}")
    return tokens


def strided_batches(tokens, T, stride, device, eot=None, batch_tokens=4096):
    """
    Yields batches x, y (B, T) in which every token except the first is a target exactly once. The first window has T
    targets. Each later one ends `stride` tokens further on, and only its new tokens are targets, each with at least
    T - stride tokens of context. If eot is given, a batch also has the number of the document of each token of x.
    """
    n = len(tokens) - 1
    length = min(T, n)
    ends = [*range(length, n, stride), n]
    firsts = [0, *ends[:-1]]  # the first target of each window
    B = max(1, batch_tokens // length)
    with dataset.progress_bar(n, "tokens") as bar:
        for i in range(0, len(ends), B):
            rows = np.stack([tokens[end - length:end + 1] for end in ends[i:i + B]]).astype(np.int64)
            x, y = torch.from_numpy(rows[:, :-1]), torch.from_numpy(rows[:, 1:].copy())  # masking y must not change x
            for row, (first, end) in enumerate(zip(firsts[i:i + B], ends[i:i + B])):
                y[row, :length - (end - first)] = -1  # scored before
            documents = [] if eot is None else [(x == eot).cumsum(dim=1)]
            yield [t.to(device) for t in (x, y, *documents)]
            bar.update(ends[min(i + B, len(ends)) - 1] - firsts[i])


def measure(model, enc, path, split="val", stride=None, limit=None, doc_mask=False):
    """
    -> loss, bits per byte and number of targets on a text or on pairs, and how they were measured. A model that was
    trained with doc_mask never attended across documents, so with doc_mask it does not here either.
    """
    T, device = model.cfg.block_size, model.lm_head.weight.device
    if dataset.holds_pairs(path):
        if limit or stride:
            raise UserError(f"--{'limit' if limit else 'stride'} does not apply to pairs")
        loader = DataLoader(Pairs(path, enc), "all", 1, T, doc_mask=True, device=device)
        batches = loader.validation_batches(loader.n_rows, max(1, 4096 // T))
        how = "responses, each pair on its own" + loader.rows.what_is_cut()
    else:
        stride = check_stride(stride, T)
        tokens = read_tokens(path, enc, split, limit)
        if len(tokens) < 2:
            raise UserError(f"{path} has {len(tokens)} tokens; there is nothing to predict")
        batches = strided_batches(tokens, T, stride, device, enc.eot_token if doc_mask else None)
        how = f"windows of {T} overlap by {T - stride}" + ("; each document on its own" if doc_mask else "")
    byte_lengths = torch.tensor(dataset.token_lengths(enc), device=device)
    nats, n, n_bytes = hellaswag.sum_losses(model, batches, byte_lengths)
    return dict(loss=nats / n, bpb=hellaswag.bits_per_byte(nats, n_bytes), tokens=n, how=how)


def check_stride(stride, T):
    if stride and stride > T:
        raise UserError(f"--stride={stride} is more than the context of {T}")
    return stride or max(1, T // 2)


def has_doc_mask(known):
    return known.get("train_config", {}).get("doc_mask") is True


def tokens_per_second(model):
    n, stream = 64, model.stream([[0] * 16], temperature=0)
    for n_tokens in (8, n):  # the first is a warm-up
        began = time.perf_counter()
        for _ in range(n_tokens):
            token = next(stream)
        token.item()  # wait
    return n / (time.perf_counter() - began)


def cell(value, spec):
    """A number as text; a dash if there is none, as in a checkpoint that a stranger wrote"""
    with contextlib.suppress(TypeError, ValueError, OverflowError):
        if math.isfinite(value):
            return format(value, spec)
    return "-"


def read_available_tasks(tasks, data, limit):
    """-> {task: examples}, without those that cannot be downloaded"""
    if data:
        return hellaswag.read_tasks(tasks, data, limit)
    found = {}
    for task in tasks:
        try:
            found.update(hellaswag.read_tasks([task], limit=limit))
        except UserError as e:
            print(f"no {hellaswag.TASKS[task][0]}: {e}", file=sys.stderr)
    return found


def compare(names, text, split, stride, tasks, data, limit, device, dtype):
    """Prints a table of models, and of published scores."""
    # Errors now rather than after hours of measuring the first ones
    if text and not os.path.isdir(text) and not dataset.holds_pairs(text):
        dataset.open_sources(text)
    for name in names:
        model, enc, _ = load(name, ".", device, dtype)
        check_stride(stride, model.cfg.block_size)
        if text and os.path.isdir(text):
            read_tokens(text, enc, split, limit=1)
    tasks = read_available_tasks(tasks, data, limit)
    rows = []  # {column: cell}
    for name in names:
        model, enc, known = load(name, ".", device, hellaswag.weights_dtype(dtype))
        run = known.get("run", {})
        row = {"model": name, "parameters": f"{known['n_parameters']:,}", "tokens": cell(run.get("tokens"), ",")}
        with hellaswag.precision(model, dtype):
            result = run.get("last_val", {})
            if text:
                result = measure(model, enc, text, split, stride, doc_mask=has_doc_mask(known))
                print(f"{name}: {result['how']}", file=sys.stderr)
            row |= {"loss": cell(result.get("loss"), ".4f"), "bits/byte": cell(result.get("bpb"), ".4f")}
            if row["loss"] != "-":
                row["perplexity"] = cell(hellaswag.perplexity(result["loss"]), ".2f")
            for task, examples in tasks.items():
                row |= score_cells(hellaswag.task_scores(model, enc, task, examples))
        model.to(pick_dtype(dtype, model.lm_head.weight.device))  # as for generating text
        rows.append(row | {"tokens/s": f"{tokens_per_second(model):,.1f}", "$": cell(run.get("usd") or None, ".2f")})
    for name, scores in hellaswag.PUBLISHED.items():
        if tasks.keys() & {task for task, _ in scores}:
            rows.append({"model": f"{name}, published", **score_cells(scores)})
    columns = ["model", "parameters", "tokens", "loss", "perplexity", "bits/byte"]
    columns += [column for column in rows[0] if isinstance(column, tuple)]
    print_table([*columns, "tokens/s", "$"], rows)
    where = f"on {text}" if text else "from each model's last validation, on its own text"
    counts = [f"{hellaswag.TASKS[task][0]} on {len(examples):,} examples" for task, examples in tasks.items()]
    print("; ".join([f"loss (nats per token), perplexity and bits per byte {where}", *counts]), file=sys.stderr)


def score_cells(scores):
    """{(task, measure): score} with the scores as text"""
    return {column: cell(score, ".2f" if column[1] == "perplexity" else ".4f") for column, score in scores.items()}


def print_table(columns, rows):
    """A column is named by a text, or by a task and a measure, one above the other."""
    pairs = [column if isinstance(column, tuple) else ("", column) for column in columns]
    above = [hellaswag.TASKS[task][0] if task else "" for task, _ in pairs]
    table = [above, [measure for _, measure in pairs], *([row.get(c, "-") for c in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*table)]
    for first, *rest in table:
        print("  ".join([first.ljust(widths[0]), *(c.rjust(w) for c, w in zip(rest, widths[1:]))]).rstrip())


# -- serving: OpenAI's completions and chat completions, and a page that uses them

RANGES = dict(max_tokens=(1, 10**6), temperature=(0.0, 2.0), top_p=(1e-6, 1.0), top_k=(0, 10**6), seed=(0, 2**63 - 1))
# OpenAI's other options, each with the values that change nothing
UNSUPPORTED = {
    "best_of": [1], "echo": [False], "frequency_penalty": [0, 0.0], "functions": [[]], "logit_bias": [{}],
    "logprobs": [False], "n": [1], "presence_penalty": [0, 0.0], "response_format": [{"type": "text"}], "suffix": [""],
    "tool_choice": ["none", "auto"], "tools": [[]], "top_logprobs": [0]}


class BadRequest(Exception):
    def __init__(self, message, status=400, code=None):
        super().__init__(message)
        self.status, self.code = status, code  # HTTP's, and OpenAI's


def sampling_options(request, defaults):
    for name, harmless in UNSUPPORTED.items():
        value = request.get(name)
        if (type(value), value) not in [(type(other), other) for other in (None, *harmless)]:  # 0 is not False
            raise BadRequest(f"{name} is not supported; leave it out, or send {json.dumps(harmless[0])}")
    if request.get("stream") not in (None, True, False):
        raise BadRequest("stream must be true or false")
    if request.get("max_completion_tokens") is not None:
        request["max_tokens"] = request["max_completion_tokens"]
    options = {**defaults, **{name: request[name] for name in defaults if request.get(name) is not None}}
    for name, (low, high) in RANGES.items():  # a default, from the command line, may be outside
        value = options[name]
        is_number = type(value) in (int, type(high))
        is_allowed = is_number and (value == defaults[name] or low <= value <= high)
        if value is not defaults[name] and not is_allowed:
            raise BadRequest(f"{name} must be a{' whole' if type(high) is int else ''} number from {low} to {high}")
    stop = options["stop"]
    stops = [stop] if isinstance(stop, str) else stop
    is_valid = isinstance(stops, list) and all(isinstance(s, str) and 0 < len(s) <= 100 for s in stops)
    if stop is not defaults["stop"] and not (is_valid and len(stops) <= 16):
        raise BadRequest("stop must be a string of 1 to 100 characters, or a list of up to 16 of them")
    return options


def join_text_parts(content):
    """[{"type": "text", "text": "Hello"}], as OpenAI's clients may write a text -> Hello"""
    if isinstance(content, list):
        return "".join(part["text"] for part in content)
    return content


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers from server.model, one text at a time: server.generating is a lock."""
    timeout = 60  # seconds to wait for a client to send or receive

    def handle(self):
        with contextlib.suppress(OSError):  # the client has gone
            super().handle()

    def respond(self):
        route, server = f"{self.command} {self.path.split('?')[0]}", self.server
        try:
            length = self.headers.get("Content-Length", "0" if self.command == "GET" else "missing")
            if not re.fullmatch(r"\d{1,6}", length):
                raise BadRequest("a request needs a Content-Length of at most 999,999", 413)
            body = self.rfile.read(int(length))
            self.check_sender()
            if route == "GET /":
                values = json.dumps([server.name, bool(server.template), server.defaults["temperature"]])
                self.send("text/html; charset=utf-8", [PAGE.replace("VALUES", values.replace("<", "\\u003c"))])
            elif route == "GET /v1/models":
                models = [dict(id=server.name, object="model", created=0, owned_by="eval.py")]
                self.send("application/json", [json.dumps(dict(object="list", data=models))])
            elif route in ("POST /v1/completions", "POST /v1/chat/completions"):
                self.complete(body, "chat" in route)
            else:
                raise BadRequest(f"there is no {route}", 404)
        except BadRequest as e:
            error = dict(message=str(e), type="invalid_request_error", param=None, code=e.code)
            self.send("application/json", [json.dumps(dict(error=error))], e.status)

    do_GET = do_POST = respond

    def check_sender(self):
        """Refuses pages of other sites, also those whose own name leads to this machine (DNS rebinding)."""
        host, origin, hosts = self.headers.get("Host", ""), self.headers.get("Origin"), self.server.hosts
        with contextlib.suppress(ValueError):
            name = urlsplit(f"//{host}").hostname or ""
            is_address = re.fullmatch(r"[\d.]+", name)  # unlike a name, it cannot belong to another site
            if (name in hosts or is_address and "0.0.0.0" in hosts) and origin in (None, f"http://{host}"):
                return
        raise BadRequest("this host or origin is not served; --serve=HOST:PORT names a host", 403)

    def send(self, content_type, parts, status=200):
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.end_headers()
        for part in parts:
            self.wfile.write(part.encode())

    def complete(self, body, is_chat):
        try:
            request = json.loads(body)
            options, tokens = sampling_options(request, self.server.defaults), self.read_prompt(request, is_chat)
        except (ValueError, AttributeError, RecursionError):
            raise BadRequest("the request is not a JSON object") from None
        parts = self.generate(request, options, tokens, is_chat)
        try:
            first = next(parts)  # before the status is sent, so that an error can change it
        except UserError as e:
            raise BadRequest(str(e), 500) from None
        chunks = map(json.dumps, itertools.chain([first], parts))
        if request.get("stream"):
            self.send("text/event-stream", (f"data: {chunk}\n\n" for chunk in itertools.chain(chunks, ["[DONE]"])))
        else:
            self.send("application/json", chunks)

    def read_prompt(self, request, is_chat):
        server, prompt = self.server, request.get("prompt")
        if request.get("model") != server.name:
            raise BadRequest(f"there is no model {request.get('model')}, only {server.name}", 404, "model_not_found")
        if is_chat and not server.template:
            raise BadRequest(f"{server.name} is not fine-tuned on chats; use /v1/completions")
        if is_chat:
            try:
                placeholder = dict(role="assistant", content="-")  # parse_messages drops a question without an answer
                messages = [{**m, "content": join_text_parts(m.get("content"))} for m in request["messages"]]
                if messages[-1]["role"] != "user":
                    raise ValueError("the last message is not the user's")
                system, messages = dataset.split_system([*messages, placeholder])
                *turns, (prompt, _) = dataset.parse_messages(messages, answers_required=False)
            except ValueError as e:
                raise BadRequest(str(e)) from None
            except (AttributeError, LookupError, TypeError):
                raise BadRequest("messages must be a list of {role, content}, each content a text, or parts of type "
                                 "text") from None
            return chat_tokens(server.model, server.enc, server.template, [*turns, (prompt, None)], system)
        if isinstance(prompt, list) and len(prompt) == 1:
            [prompt] = prompt
        if not isinstance(prompt, str):
            raise BadRequest("prompt must be a string")
        return dataset.prompt_tokens(server.enc, None, [(prompt, None)])

    def generate(self, request, options, tokens, is_chat):
        """Yields the response, in parts if it is to be streamed."""
        server, stream, texts = self.server, bool(request.get("stream")), []
        kind = "chat.completion" if is_chat else "text_completion"
        about = dict(id=f"cmpl-{secrets.token_hex(8)}", object=f"{kind}.chunk" if is_chat and stream else kind,
                     created=int(time.time()), model=server.name)

        def response(text, reason, **usage):
            content = dict(text=text)
            if is_chat:
                content = {"delta" if stream else "message": dict(role="assistant", content=text)}
            return dict(**about, choices=[dict(index=0, **content, logprobs=None, finish_reason=reason)], **usage)

        max_tokens, stream_options = options["max_tokens"], request.get("stream_options")
        with server.generating:
            for [text] in stream_text(
                    server.model, server.enc, [tokens], max_tokens, options["temperature"], options["top_k"],
                    options["top_p"], make_generator(server.model, options["seed"]), options["stop"]):
                texts.append(text)
                if select.select([self.connection], [], [], 0)[0] and not self.connection.recv(1, socket.MSG_PEEK):
                    raise ConnectionError("the client has gone")
                if stream and text:
                    yield response(text, None)
        # If max_tokens ended the text, stream_text gave one more piece: what it held back for a stop string.
        n, reason = min(len(texts), max_tokens), "length" if len(texts) > max_tokens else "stop"
        usage = dict(prompt_tokens=len(tokens), completion_tokens=n, total_tokens=len(tokens) + n)
        yield response("", reason) if stream else response("".join(texts), reason, usage=usage)
        if stream and isinstance(stream_options, dict) and stream_options.get("include_usage"):
            yield dict(**about, choices=[], usage=usage)


class Server(http.server.ThreadingHTTPServer):
    request_queue_size = 128  # connections that wait to be accepted


def serve(address, model, enc, template, name, defaults):
    match = re.fullmatch(r"(?:([\w.-]+):)?(\d{1,5})", address)
    if not match:
        raise UserError(f"--serve={address} must be a port, such as 8000, or HOST:PORT")
    host, port = match[1] or "127.0.0.1", int(match[2])
    try:
        server = Server((host, port), Handler)
    except (OSError, OverflowError) as e:
        raise UserError(f"cannot serve at {host}:{port} ({e}); choose another port, --serve=PORT") from None
    server.model, server.enc, server.template, server.name, server.defaults = model, enc, template, name, defaults
    server.hosts = {"127.0.0.1", "localhost", host.lower(), socket.gethostname().lower()}
    server.generating = threading.Lock()
    print(f"{name}: a page at http://{host}:{server.server_port}/, OpenAI's API below /v1; Ctrl-C ends", flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        server.serve_forever()
    sys.stdout.flush()
    os._exit(0)  # Python's own end aborts while a thread generates a text


PAGE = r"""<!doctype html>
<html lang="en"><meta name="viewport" content="width=device-width"><link rel="icon" href="data:,"><title>eval.py</title>
<style>
  :root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif }
  body { max-width: 44rem; margin: auto; padding: 0 1rem }
  h1 { font-size: 1rem }
  main { min-height: 75vh; white-space: pre-wrap; overflow-wrap: anywhere }
  b { color: GrayText; font-weight: normal }
  .chat * { display: block; margin-bottom: 1rem }
  form { position: sticky; bottom: 0; padding: 1rem 0; background: Canvas }
  textarea { width: 100%; box-sizing: border-box }
  textarea, input, button { font: inherit; padding: .3rem .6rem }
</style>
<h1></h1><main></main>
<form novalidate><textarea rows="3"></textarea><label>temperature <input type="number" min="0" step="0.1"></label>
<button></button></form>
<script>
const [model, chat, temperature] = VALUES, $ = name => document.querySelector(name), box = $("textarea")
let turns = [], text = "", running = null

async function send() {
  const said = box.value, answer = document.createElement("span")
  if (running) return running.abort()
  if (chat && !said.trim()) return
  $("main").append(Object.assign(document.createElement("b"), {textContent: said}), answer)
  box.value = ""
  text += said
  turns.push({role: "user", content: said})
  let problem = ""
  running = new AbortController()
  $("button").textContent = "Stop"
  try {
    const prompt = chat ? {messages: turns} : {prompt: text}
    const body = JSON.stringify({model, stream: true, temperature: +$("input").value, ...prompt})
    const address = chat ? "/v1/chat/completions" : "/v1/completions"
    const response = await fetch(address, {method: "POST", body, signal: running.signal})
    if (!response.ok) throw Error((await response.json()).error.message)
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader()
    for (let rest = "", part; !(part = await reader.read()).done;) {
      const lines = (rest + part.value).split("\n")
      rest = lines.pop()
      for (const line of lines.filter(line => line.startsWith("data: {"))) {
        const [choice] = JSON.parse(line.slice(6)).choices
        answer.textContent += chat ? choice.delta.content : choice.text
        scrollTo(0, document.body.scrollHeight)
      }
    }
  } catch (e) {
    if (e.name != "AbortError") problem = `[${e.message}]`
  }
  const reply = answer.textContent.trim()
  text += answer.textContent
  if (reply) turns.push({role: "assistant", content: reply})
  else turns.pop()  // a question without an answer is no part of the chat
  answer.textContent += problem  // shown, but no part of the text
  running = null
  $("button").textContent = "Send"
}
$("form").onsubmit = event => { event.preventDefault(); send() }
box.onkeydown = event => {
  if (event.key == "Enter" && !event.shiftKey && !event.isComposing && !running) $("form").onsubmit(event)
}
Object.assign(box, {placeholder: chat ? "Ask something" : "The beginning of a text, or nothing to continue it"}).focus()
$("h1").textContent = model
$("main").className = chat ? "chat" : ""
$("input").value = temperature
$("button").textContent = "Send"
</script>
"""


# -- exporting

# dataset.encode_chat as a Jinja template, for transformers' apply_chat_template
CHAT_TEMPLATE = """\
{% if messages[0].role == 'system' %}{% set system, messages = messages[0].content.strip() + '\n\n', messages[1:] %}\
{% else %}{% set system = '' %}{% endif %}\
{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + USER }}\
{{ ((system if loop.first else '') + m.content.strip()).strip() }}\
{% else %}{{ ASSISTANT + m.content.strip() }}{% endif %}{% endfor %}\
{{ ASSISTANT if add_generation_prompt else eos_token }}"""


CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
license: other  # choose one
---
A language model.

{facts}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer, model = (auto.from_pretrained("FOLDER") for auto in (AutoTokenizer, AutoModelForCausalLM))
inputs = {inputs}
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50, do_sample=True)[0]))
```
"""


def model_card(n_parameters, known):
    """The README.md of an export: what the checkpoint says about how the model was trained"""
    settings, run = known.get("train_config", {}), known.get("run", {})
    last_val = run.get("last_val", {})
    loss = f"validation loss at step {cell(last_val.get('step'), '')}, "
    facts = {
        "parameters": n_parameters, "recipe": settings.get("recipe"),
        "data": os.path.basename(str(settings.get("data", ""))) or None,
        "steps": known.get("step"), "tokens": run.get("tokens"), "seconds of training": run.get("seconds"),
        "cost in dollars": run.get("usd") or None, f"{loss}nats per token": last_val.get("loss"),
        f"{loss}bits per byte": last_val.get("bpb"),
        f"HellaSwag at step {cell(run.get('hella_step'), '')}, acc_norm by token": run.get("hella")}
    lines = []
    for name, value in facts.items():
        if isinstance(value, (int, float)):
            value = cell(value, ",.5g" if isinstance(value, float) else ",")
        if isinstance(value, str) and value != "-":
            lines.append(f"- {name}: {value[:200]}")
    inputs = 'tokenizer(tokenizer.bos_token + "Once", return_tensors="pt")  # every text begins with bos_token'
    if known.get("template"):
        inputs = 'tokenizer.apply_chat_template([dict(role="user", content="Hello")], add_generation_prompt=True, ' \
            'return_tensors="pt", return_dict=True)'
    return CARD.format(facts="\n".join(lines), inputs=inputs)


def hugging_face_tokenizer(enc):
    """The content of the tokenizer.json that Hugging Face's `tokenizers` reads, for the same tokenizer"""
    # GPT-2's spelling: the bytes that cannot be printed become characters from U+0100 on, the others are latin-1.
    letters = {b: 256 + i for i, b in enumerate([*range(33), *range(127, 161), 173])}
    ranks = enc._mergeable_ranks
    spelled = {token: token.decode("latin-1").translate(letters) for token in ranks}
    merges = []
    for token in sorted(ranks, key=ranks.get):
        # tiktoken joins any two neighbours that make a token, so every way to make it is listed.
        halves = [(token[:i], token[i:]) for i in range(1, len(token)) if token[:i] in ranks and token[i:] in ranks]
        halves.sort(key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
        merges += [[spelled[a], spelled[b]] for a, b in halves]
    special = [dict(id=i, content=text, single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
               for text, i in enc._special_tokens.items()]
    vocab = {**{spelled[token]: i for token, i in ranks.items()}, **enc._special_tokens}
    # use_regex: its regular expression is GPT2_SPLIT
    byte_level = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=True)
    model = dict(
        type="BPE", dropout=None, unk_token=None, continuing_subword_prefix="", end_of_word_suffix="", fuse_unk=False,
        byte_fallback=False, vocab=vocab, merges=merges)
    return dict(
        version="1.0", truncation=None, padding=None, added_tokens=special, normalizer=None, pre_tokenizer=byte_level,
        post_processor=None, decoder=byte_level, model=model)


def export(model, enc, known, folder):
    """Writes a model and its tokenizer for transformers: AutoModelForCausalLM and AutoTokenizer."""
    template = known.get("template")
    if os.path.isdir(folder) and os.listdir(folder):
        raise UserError(f"{folder} is not empty; choose another folder for --export")
    settings = dict(
        tokenizer_class="PreTrainedTokenizerFast", model_max_length=model.cfg.block_size, eos_token=dataset.EOT,
        bos_token=dataset.EOT, unk_token=dataset.EOT, clean_up_tokenization_spaces=False,
        pad_token="<|pad|>" if "<|pad|>" in enc.special_tokens_set else dataset.EOT)
    if template:
        chat = CHAT_TEMPLATE.replace("USER", json.dumps(template["user"]))
        settings["chat_template"] = chat.replace("ASSISTANT", json.dumps(template["assistant"]))
    try:
        n_parameters = model.save_pretrained(folder, enc.eot_token)
        card = model_card(n_parameters, known).encode()
        dataset.write_json(os.path.join(folder, "tokenizer.json"), hugging_face_tokenizer(enc))
        dataset.write_json(os.path.join(folder, "tokenizer_config.json"), settings)
        dataset.write_json(os.path.join(folder, dataset.TOKENIZER_SPEC), dict(
            tokenizer=known["tokenizer"], template=template))
        dataset.write_atomically(os.path.join(folder, "README.md"), lambda f: f.write(card))
    except OSError as e:
        raise UserError(f"cannot write {folder}: {e.strerror or e}") from None


# -- the command line

def parse_options():
    p = dataset.Parser(prog="eval.py", description=__doc__)
    hellaswag.add_model_options(p)
    p.add_argument("--prompt", action="append", help="how a text begins; may be repeated; without it: interactive")
    p.add_argument("--num_samples", type=dataset.positive, default=1, help="of each prompt (default: %(default)s)")
    p.add_argument("--max_new_tokens", type=dataset.positive, help="(default: %(default)s)")
    p.add_argument("--temperature", type=float, help="0: always the most likely token (default: %(default)s)")
    p.add_argument("--top_k", type=dataset.integer,
                   help="sample from the k most likely tokens; 0: all (default: %(default)s)")
    p.add_argument("--top_p", type=float,
                   help="sample from the most likely tokens that make up this probability (default: %(default)s)")
    p.add_argument("--stop", action="append", help="end a text before this string; may be repeated")
    p.add_argument("--seed", type=dataset.integer, help="to get the same text again")
    p.add_argument("--serve", nargs="?", const="8000", metavar="[HOST:]PORT", help="serve a page and OpenAI's API; the "
                   "sampling options are their defaults (without a value: 127.0.0.1:8000)")
    p.add_argument("--perplexity", metavar="DATA", help="measure on a file of text or pairs, or a folder of shards")
    p.add_argument("--split", default="val", help="which split of a folder of shards (default: %(default)s)")
    p.add_argument("--stride", type=dataset.positive,
                   help="tokens from one window to the next (default: half the context)")
    p.add_argument("--compare", nargs="+", metavar="MODEL", help="print one table of several, each named as in --ckpt")
    hellaswag.add_task_options(p)
    p.add_argument("--limit", type=dataset.positive,
                   help="with --perplexity, use only the first tokens; with --compare, each task's first examples only")
    p.add_argument("--export", metavar="DIR", help="write the model for transformers")
    defaults = {k: v.default for k, v in inspect.signature(generate_text).parameters.items()}
    p.set_defaults(**{**defaults, "prompt": None, "stop": [], "max_new_tokens": 200})
    a = p.parse_args()
    check_sampling(a.temperature, a.top_k, a.top_p, a.seed, a.stop)
    jobs = [name for name in ("compare", "export", "perplexity", "serve", "prompt") if getattr(a, name) is not None]
    if empty := [name for name in jobs if not getattr(a, name)]:
        raise UserError(f"--{empty[0]} has an empty value")
    if len(jobs) > 1 and jobs != ["compare", "perplexity"]:
        raise UserError(f"--{jobs[0]} and --{jobs[1]} cannot be combined")
    if a.compare and a.ckpt:
        raise UserError("--compare names its models itself; leave --ckpt out")
    if a.num_samples > 1 and not a.prompt:
        raise UserError("--num_samples needs a --prompt")
    owners = dict(split=a.perplexity, stride=a.perplexity, limit=a.perplexity or a.compare, task=a.compare,
                  data=a.compare)
    for name, owner in owners.items():
        if not owner and getattr(a, name) != p.get_default(name):
            raise UserError(f"--{name} belongs to --{'compare' if name in ('task', 'data') else 'perplexity'}")
    if a.perplexity and a.split != "val" and not os.path.isdir(a.perplexity):
        raise UserError(f"--split is for a folder of shards; {a.perplexity} is measured as a whole")
    if a.compare or a.perplexity or a.export:
        for name in ("max_new_tokens", "temperature", "top_k", "top_p", "stop", "seed"):
            if getattr(a, name) != p.get_default(name):
                raise UserError(f"--{name} is for generating text, not for --{jobs[0]}")
    return a


def main():
    a = parse_options()
    sys.stdin.reconfigure(errors="replace")  # where the terminal lacks a character
    if a.compare:
        compare(a.compare, a.perplexity, a.split, a.stride, a.task, a.data, a.limit, a.device, a.dtype)
        return
    if a.export and a.dtype == "int8":
        raise UserError("--export writes float32, bfloat16 or float16")
    if a.export:  # always on the CPU, and in float32 unless --dtype says otherwise
        a.device, a.dtype = "cpu", "float32" if a.dtype == "auto" else a.dtype
    model, enc, known = load(
        a.ckpt, a.out_dir, a.device, hellaswag.weights_dtype(a.dtype) if a.perplexity else a.dtype)
    template = known.get("template")
    if a.export:
        export(model, enc, known, a.export)
        print(a.export)
        return
    if a.perplexity:
        with hellaswag.precision(model, a.dtype):
            m = measure(model, enc, a.perplexity, a.split, a.stride, a.limit, has_doc_mask(known))
        print(f"{known['about']} on {a.perplexity}: {m['tokens']:,} tokens, {m['loss']:.4f} nats per token, perplexity "
              f"{hellaswag.perplexity(m['loss']):.3f}, {m['bpb']:.4f} bits per byte; {m['how']}")
        return
    print(known["about"], file=sys.stderr)
    generator = make_generator(model, a.seed)

    def respond(chats):
        prompts = [chat_tokens(model, enc, template, turns) for turns in chats]
        return stream_text(model, enc, prompts, a.max_new_tokens, a.temperature, a.top_k, a.top_p, generator, a.stop)

    if a.serve:
        name = os.path.basename(os.path.abspath(a.ckpt or a.out_dir))
        defaults = {k: getattr(a, k) for k in ("temperature", "top_k", "top_p", "seed", "stop")}
        serve(a.serve, model, enc, template, name, {**defaults, "max_tokens": a.max_new_tokens})
    elif a.prompt is None:
        interact(respond, is_chat=bool(template))
    else:
        prompts = [prompt for prompt in a.prompt for _ in range(a.num_samples)]
        print_samples(prompts, respond, gap="\n" if template else "")


if __name__ == "__main__":
    dataset.start_script()
    main()
