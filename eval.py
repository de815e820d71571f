"""
Uses a model: lets it speak, measures it, compares it, exports it.

    python eval.py --prompt "Once"                                   # the newest checkpoint of this folder
    python eval.py                                                   # a session: it goes on with what you type, or answers it
    python eval.py --ckpt gpt2 --prompt "Hello, I'm a language model," --num_samples 5 --temperature 0
    python eval.py --perplexity text.txt                             # or a folder of shards
    python eval.py --compare runs/a runs/b gpt2 --perplexity text.txt
    python eval.py --export hf/                                      # for transformers

    from eval import generate_text
    print(generate_text(prompt="Once", max_new_tokens=50, temperature=0.7, top_k=50, top_p=0.95))
"""
import codecs
import functools
import inspect
import json
import math
import os
import sys
import time

import dataset

if __name__ == "__main__":
    dataset.large_pages()

import numpy as np
import torch

import data_loader
import hellaswag
import model as gpt
from dataset import UserError

ROWS = 16  # texts that are written at once


@functools.lru_cache(maxsize=1)
def open_speaker(ckpt, out_dir, device, dtype):
    """-> the model, its tokenizer, and the rest of its checkpoint"""
    model, spec, rest = gpt.open_model(ckpt, out_dir, device, dtype)
    return model, dataset.get_tokenizer(spec), rest


# -- what it says

class Row:
    """A text in the making, token by token: what can be shown of it, up to the end of the text or a stop string."""

    def __init__(self, enc, stop):
        self.enc, self.stop, self.ended = enc, stop, False
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a character may be spread over several tokens
        self.held = ""  # may be the beginning of a stop string

    def add(self, token):
        """-> the text that this token settles"""
        if self.ended:
            return ""
        if token == self.enc.eot_token:
            return self.end()
        text = self.held + self.decoder.decode(self.enc.decode_single_token_bytes(token))
        if found := [text.index(s) for s in self.stop if s in text]:
            self.ended = True
            return text[:min(found)]
        hold = max((n for s in self.stop for n in range(1, len(s)) if text.endswith(s[:n])), default=0)
        self.held = text[len(text) - hold:]
        return text[:len(text) - hold]

    def end(self):
        if self.ended:
            return ""
        self.ended = True
        return self.held + self.decoder.decode(b"", final=True)


def dice(model, seed=None):
    generator = torch.Generator(next(model.parameters()).device)
    generator.manual_seed(seed) if seed is not None else generator.seed()
    return generator


def stream_texts(model, enc, prompts, max_new_tokens, temperature, top_k, top_p, generator, stop=()):
    """Yields pieces of the continuations of prompts, rows of tokens, as they come: a list of one for each prompt."""
    tokens = model.stream(prompts, temperature, top_k, top_p, generator)
    rows = [Row(enc, stop) for _ in prompts]
    for _ in range(max_new_tokens):
        yield [row.add(token) for row, token in zip(rows, next(tokens).flatten().tolist())]
        if all(row.ended for row in rows):
            return
    yield [row.end() for row in rows]


def generate_text(prompt="", max_new_tokens=50, temperature=0.7, top_k=50, top_p=0.95, seed=None, stop=(),
                  ckpt=None, out_dir=".", device="auto", dtype="auto"):
    """-> the prompt and its continuation; of a model that was fine-tuned on pairs, the response alone"""
    model, enc, rest = open_speaker(ckpt, out_dir, device, dtype)
    template = rest.get("template")
    tokens = dataset.prompt_tokens(enc, template, [(prompt, None)])
    pieces = stream_texts(model, enc, [tokens], max_new_tokens, temperature, top_k, top_p, dice(model, seed), stop)
    return prompt * (not template) + "".join(piece for piece, in pieces)


def recent(model, enc, template, turns):
    """The tokens of a prompt. A chat first loses its oldest turns, for good, as long as they fill more than half of the context."""
    while len(tokens := dataset.prompt_tokens(enc, template, turns)) > model.cfg.block_size // 2 and len(turns) > 1:
        del turns[0]
    return tokens


def print_samples(prompts, say, between):
    """One text appears as it is written; several are written together, and printed one after the other."""
    for i in range(0, len(prompts), ROWS):
        texts = [prompt + between for prompt in prompts[i:i + ROWS]]
        if len(prompts) == 1:
            print(texts[0], end="", flush=True)
        for pieces in say([[(prompt, None)] for prompt in prompts[i:i + ROWS]]):
            if len(prompts) == 1:
                print(pieces[0], end="", flush=True)
            texts = [text + piece for text, piece in zip(texts, pieces)]
        print() if len(prompts) == 1 else print("---\n" * (i > 0) + "\n---\n".join(texts), flush=True)


def session(say, chat):
    """
    What is typed is added to the text, and the model goes on with it; in a chat, it answers. Ctrl-C interrupts it, Ctrl-D ends it all.
    """
    try:
        import readline  # gives input() a history; not on Windows
    except ImportError:
        pass
    print("ask something; Ctrl-C interrupts the answer, Ctrl-D ends" if chat else
          "type the beginning of a text; an empty line lets it go on, Ctrl-C interrupts it, Ctrl-D ends", file=sys.stderr)
    turns = [] if chat else [("", None)]
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        if chat:
            if not line.strip():
                continue
            turns.append((line.strip(), None))
        else:
            text = turns[0][0]
            turns = [(text + "\n" * bool(text and line) + line, None)]
        said = ""
        try:
            for piece, in say([turns]):
                print(piece, end="", flush=True)
                said += piece
        except KeyboardInterrupt:
            pass
        print()
        prompt = turns[-1][0]
        turns[-1] = (prompt, said.strip()) if chat else (prompt + said, None)


# -- how good it is

def read_tokens(path, enc, split, limit=None):
    """The first tokens of a folder of shards, or of a file of text or pairs, (n,). Those of pairs carry their flags."""
    if os.path.isdir(path):
        paths, _, manifest = data_loader.find_shards(path, split)
        if manifest and manifest["tokenizer"]["fingerprint"] != dataset.tokenizer_fingerprint(enc):
            raise UserError(f"{path} is in tokenizer {manifest['tokenizer']['name']}, which is not the model's; name the text itself")
        parts = map(dataset.read_shard, paths)
        if manifest and "template" in manifest:
            parts = (tokens | dataset.read_mask(p).astype(np.uint32) << 16 for tokens, p in zip(parts, paths))
    else:
        source = dataset.open_source(path)
        if source.pairs:
            dataset.check_pairs(source.pairs)
        template = dataset.chat_template(enc)
        encode = lambda pieces: dataset.encode_pairs(enc, template, pieces) if source.pairs else dataset.encode_pieces(enc, pieces)
        parts = (encode(pieces) for pieces, _ in source.read(None))
    taken, n = [], 0
    while (limit is None or n < limit) and (part := next(parts, None)) is not None:
        taken.append(part)
        n += len(part)
    tokens = np.concatenate([*taken, np.empty(0, dtype=np.uint16)])
    if limit is not None and len(tokens) > limit:
        begins = np.flatnonzero(tokens[:limit + 1] >> 16 == dataset.BEGINS)
        if len(begins) == 1:
            raise UserError(f"--limit={limit} is less than the first pair of {path}")
        tokens = tokens[:begins[-1] if len(begins) else limit]  # no pair is cut
    ids = tokens & dataset.TOKEN
    if len(ids) and ids.max() >= enc.n_vocab:
        raise UserError(f"{path} has token {ids.max()}, which is outside the model's vocabulary of {enc.n_vocab:,}")
    return tokens


@torch.inference_mode()
def perplexity(model, tokens, stride, batch=4096):
    """
    tokens (n,) -> the losses of all of them but the first, (n - 1,). The first block_size are scored in one window; then it moves
    by `stride` tokens and scores those that are new to it, so that each has at least block_size - stride before it.
    """
    device, T, n = next(model.parameters()).device, model.cfg.block_size, len(tokens) - 1
    ends = [min(T, n), *range(min(T, n) + stride, n, stride)]
    ends += [n] if ends[-1] < n else []
    losses, scored, i, show = [], 0, 0, dataset.meter("tokens", n)
    while i < len(ends):
        # windows that score the same number of tokens go together
        new, length = ends[i] - scored, min(T, ends[i])
        group = [end for k, end in enumerate(ends[i:i + max(1, batch // T)], 1) if end - scored == new * k and min(T, end) == length]
        windows = torch.from_numpy(np.stack([tokens[end - length:end + 1] for end in group]).astype(np.int64)).to(device)
        x = model.hidden(windows[:, :-1])[:, -new:]
        losses.append(hellaswag.token_losses(model, x.flatten(0, 1), windows[:, -new:].flatten()))
        scored, i = group[-1], i + len(group)
        show(scored)
    return torch.cat(losses)


@torch.inference_mode()
def pair_losses(model, flagged, eot, budget=4096):
    """Tokens of pairs with their flags -> the losses of the responses and of their ends, each pair alone, and their tokens, both (n,)"""
    device, T, rows = next(model.parameters()).device, model.cfg.block_size, []
    for pair in np.split(flagged, np.flatnonzero(flagged >> 16 == dataset.BEGINS)[1:]):
        kept, flags = data_loader.cut(pair >> 16, T)
        tokens = np.append(pair[kept] & dataset.TOKEN, eot).astype(np.int64)
        rows.append((torch.from_numpy(tokens[:-1]), torch.from_numpy(np.where(flags[1:] == dataset.LEARNED, tokens[1:], -1))))
    rows.sort(key=lambda row: -len(row[0]))
    losses, learned, show, pairs = [], [], dataset.meter("pairs", len(rows)), len(rows)
    while rows:
        n = max(1, budget // len(rows[0][0]))
        group, rows = rows[:n], rows[n:]
        x, y = (torch.nn.utils.rnn.pad_sequence(column, batch_first=True, padding_value=fill).to(device) for column, fill in zip(zip(*group), (0, -1)))
        losses.append(hellaswag.token_losses(model, model.hidden(x)[y >= 0], y[y >= 0]))
        learned.append(y[y >= 0])
        show(pairs - len(rows))
    return torch.cat(losses), torch.cat(learned).cpu()


def measure(model, enc, path, split, stride, limit):
    """-> a dict of what the model makes of a text"""
    if stride > model.cfg.block_size:
        raise UserError(f"--stride={stride} is more than the context of {model.cfg.block_size}")
    tokens = read_tokens(path, enc, split, limit)
    if len(tokens) < 2:
        raise UserError(f"{path} has {len(tokens)} tokens; there is nothing to predict")
    if (tokens >> 16).any():
        losses, scored = pair_losses(model, tokens, enc.eot_token)
        how = "responses, each pair alone"
    else:
        losses, scored = perplexity(model, tokens, stride), tokens[1:]
        how = f"windows of {model.cfg.block_size} overlap by {model.cfg.block_size - stride}"
    nats, n_bytes = losses.cpu().double().sum().item(), int(dataset.token_bytes(enc)[scored].sum())
    return dict(loss=nats / len(losses), bpb=nats / math.log(2) / n_bytes if n_bytes else math.nan, tokens=len(losses), how=how)


def speed(model, n=64):
    """Tokens a second of one text"""
    device = next(model.parameters()).device
    prompt = torch.zeros(1, 16, dtype=torch.long, device=device)
    for tokens in (8, n):
        began = time.perf_counter()
        model.generate(prompt, tokens, temperature=0)[0, -1].item()
    return n / (time.perf_counter() - began)


def compare(names, text, split, stride, data, limit, device, dtype):
    """Prints one table of models, and the scores that are known from publications."""
    examples = []
    try:
        examples = hellaswag.read_examples(data or hellaswag.download(), limit)
    except UserError as e:
        if data:
            raise
        print(f"no HellaSwag: {e}", file=sys.stderr)
    table = [("model", "parameters", "tokens", "loss", "bits/byte", *hellaswag.MEASURES, "tokens/s", "$")]
    for name in names:
        model, enc, rest = open_speaker(name, ".", device, dtype)
        val, totals = rest.get("last_val", {}), rest.get("totals", {})
        loss, bpb = val.get("val"), val.get("bpb")
        if text:
            m = measure(model, enc, text, split, stride or half(model), None)
            loss, bpb = m["loss"], m["bpb"]
        *right, n = hellaswag.evaluate(model, enc, examples)
        table.append((
            name, f"{model.param_counts()['total']:,}", totals.get("tokens") and f"{totals['tokens']:,}", loss and f"{loss:.4f}",
            bpb and f"{bpb:.4f}", *(n and f"{r / n:.4f}" for r in right), f"{speed(model):,.1f}", totals.get("usd") and f"{totals['usd']:.2f}"))
    table += [(f"{name}, published", *[None] * 5, f"{score:.4f}", *[None] * 3) for name, score in hellaswag.REFERENCES.items()]
    table = [[x or "-" for x in row] for row in table]
    widths = [max(map(len, column)) for column in zip(*table)]
    for first, *row in table:
        dataset.say("  ".join([first.ljust(widths[0]), *(x.rjust(w) for x, w in zip(row, widths[1:]))]))
    where = f"on {text}" if text else "at the last validation, each on its own text"
    print(f"loss (nats a token) and bits a byte {where}; HellaSwag on {len(examples):,} examples", file=sys.stderr)


def half(model):
    """The usual stride: every token sees at least half of the context before it."""
    return max(1, model.cfg.block_size // 2)


# -- for others

# What encode_chat does, in the language of transformers' templates.
JINJA = """{% if messages[0].role == 'system' %}{% set system, messages = messages[0].content.strip(), messages[1:] %}\
{% else %}{% set system = '' %}{% endif %}{% for m in messages %}{% if m.role == 'user' %}\
{{ bos_token + USER + (system + '\n\n' if system and loop.first else '') + m.content.strip() }}{% else %}{{ ASSISTANT + m.content.strip() }}{% endif %}{% endfor %}\
{{ ASSISTANT if add_generation_prompt else eos_token }}"""


def export(model, enc, folder, template=None):
    """Writes the model and its tokenizer for transformers: AutoModelForCausalLM, AutoTokenizer."""
    if os.path.isdir(folder) and os.listdir(folder):
        raise UserError(f"{folder} is not empty; choose another folder for --export")
    model.save_pretrained(folder, enc.eot_token)
    spec = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": model.cfg.block_size, "eos_token": dataset.EOT, "bos_token": dataset.EOT,
            "unk_token": dataset.EOT, "clean_up_tokenization_spaces": False}
    if template:
        spec["chat_template"] = JINJA.replace("USER", json.dumps(template["user"])).replace("ASSISTANT", json.dumps(template["assistant"]))
    for name, content in (("tokenizer.json", dataset.hugging_face_tokenizer(enc)), ("tokenizer_config.json", spec)):
        dataset.write_json(os.path.join(folder, name), content)


def main():
    p = dataset.Parser(prog="eval.py", description=__doc__)
    p.add_argument("--ckpt", help="a checkpoint, a run's or a Hugging Face folder, or a name such as gpt2 (the newest of --out_dir)")
    p.add_argument("--out_dir", help="of the run whose newest checkpoint is used (%(default)s)")
    p.add_argument("--prompt", action="append", help="what the text begins with; several are continued together; none: a session")
    p.add_argument("--num_samples", type=int, default=1, help="of each prompt")
    p.add_argument("--max_new_tokens", type=int, help="(%(default)s)")
    p.add_argument("--temperature", type=float, help="0 takes the likeliest token each time (%(default)s)")
    p.add_argument("--top_k", type=int, help="choose among the k likeliest; 0: among all (%(default)s)")
    p.add_argument("--top_p", type=float, help="choose among the likeliest that make up this probability (%(default)s)")
    p.add_argument("--stop", action="append", help="a text ends before this string; may be given several times")
    p.add_argument("--seed", type=int, help="for the same text again")
    p.add_argument("--perplexity", metavar="DATA", help="measure the model on a file of text or pairs, or a folder of shards")
    p.add_argument("--split", default="val", help="of such a folder (%(default)s)")
    p.add_argument("--stride", type=int, help="tokens from one window to the next (half of the context)")
    p.add_argument("--compare", nargs="+", metavar="MODEL", help="print one table of several: checkpoints, folders of runs, Hugging Face models")
    p.add_argument("--data", help="HellaSwag examples for --compare, .jsonl (downloaded)")
    p.add_argument("--limit", type=int, help="only the first tokens of --perplexity, or examples of --compare")
    p.add_argument("--export", metavar="DIR", help="write the model for transformers")
    p.add_argument("--device", help="auto, cuda, mps or cpu (%(default)s)")
    p.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), help="(%(default)s)")
    p.set_defaults(**{k: v.default for k, v in inspect.signature(generate_text).parameters.items() if k not in ("prompt", "stop")})
    p.set_defaults(max_new_tokens=200)
    a = p.parse_args()
    for stream in (sys.stdin, sys.stdout):
        stream.reconfigure(errors="replace")  # where the terminal lacks a letter
    for name, good in (("num_samples", a.num_samples >= 1), ("max_new_tokens", a.max_new_tokens >= 1),
                       ("temperature", a.temperature == 0 or 1e-4 <= a.temperature < math.inf), ("seed", a.seed is None or 0 <= a.seed < 2**63),
                       ("top_k", a.top_k >= 0), ("top_p", 0 < a.top_p <= 1), ("stride", a.stride is None or a.stride >= 1),
                       ("limit", a.limit is None or a.limit >= 1), ("stop", "" not in (a.stop or ()))):
        if not good:
            raise UserError(f"--{name}={getattr(a, name)} is out of range")
    if a.compare:
        return compare(a.compare, a.perplexity, a.split, a.stride, a.data, a.limit, a.device, a.dtype)
    if a.export:  # as trained, whatever the machine computes in
        a.device, a.dtype = "cpu", "float32" if a.dtype == "auto" else a.dtype
    model, enc, rest = open_speaker(a.ckpt, a.out_dir, a.device, a.dtype)
    template = rest.get("template")
    if a.export:
        export(model, enc, a.export, template)
        with open(os.path.join(a.export, gpt.TOKENIZER_SPEC), "w", encoding="utf-8") as f:
            json.dump({**rest["tokenizer"], "template": template}, f)
        return print(a.export)
    if a.perplexity:
        stride = a.stride or half(model)
        m = measure(model, enc, a.perplexity, a.split, stride, a.limit)
        return dataset.say(
            f"{rest['about']} on {a.perplexity}: {m['tokens']:,} tokens, {m['loss']:.4f} nats a token, perplexity {math.exp(m['loss']):.3f}, "
            f"{m['bpb']:.4f} bits a byte; {m['how']}")
    print(rest["about"], file=sys.stderr)
    generator = dice(model, a.seed)
    say = lambda chats: stream_texts(model, enc, [recent(model, enc, template, turns) for turns in chats],
                                     a.max_new_tokens, a.temperature, a.top_k, a.top_p, generator, a.stop or ())
    if a.prompt is None:
        return session(say, chat=bool(template))
    print_samples([prompt for prompt in a.prompt for _ in range(a.num_samples)], say, between="\n" if template else "")


if __name__ == "__main__":
    try:
        main()
    except (UserError, gpt.UserError) as e:
        sys.exit(f"eval.py: {e}")
    except KeyboardInterrupt:
        sys.exit("")
