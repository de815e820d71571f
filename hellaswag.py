"""
Evaluation: turns a model and texts into losses, bits per byte, and scores on HellaSwag and other tasks.

    python hellaswag.py                     # the newest checkpoint
    python hellaswag.py --ckpt gpt2 --data hellaswag_val.jsonl --limit 1000
    python hellaswag.py --task arc_easy,arc_challenge,piqa,lambada

HellaSwag (Zellers et al., 2019) asks which of four endings continues a context; chance is 0.25. Three ways to score an
ending are in use, and all are reported: the sum of its tokens' log-probabilities (acc), their average per token
(build-nanogpt's acc_norm: GPT-2 124M scores 0.2955), and their average per byte (lm-evaluation-harness's acc_bytes
and, for ASCII text, its acc_norm). Texts are used as they are; lm-evaluation-harness's task cleans them first.

The other tasks are worded as in lm-evaluation-harness, without examples in the prompt. ARC and PIQA are multiple
choice too, with two to five endings. LAMBADA asks for the last word of a passage: acc is how often its tokens are the
most likely ones, and its perplexity is the word's.
"""
import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while torch is imported: no traceback

import argparse
import itertools
import json
import math

import torch
from torch import nn

from dataset import (DTYPES, Parser, UserError, ask_hub, dtype_name, encode_text, get_tokenizer, import_datasets,
                     positive, progress_bar, read_lines, start_script)
from model import autocast, isolate_documents, open_model, pick_dtype

MEASURES = ("acc", "acc_norm by token", "acc_norm by byte")
# Published scores. GPT-2's are by build-nanogpt, and by lm-evaluation-harness where its texts are ours; GPT-3's is its
# paper's.
PUBLISHED = {
    "GPT-2 124M": {("hellaswag", "acc_norm by token"): 0.2955, ("arc_easy", "acc"): 0.4381, ("lambada", "acc"): 0.3256,
                   ("lambada", "perplexity"): 40.06},
    "GPT-3 124M": {("hellaswag", "acc_norm by token"): 0.337},
}


# -- tasks: every record becomes an example, a dict of a context, its endings, and which of these is right

def render_arc(record):
    return dict(ctx=f"Question: {record['question']}\nAnswer:", endings=record["choices"]["text"],
                label=record["choices"]["label"].index(record["answerKey"]))


def render_piqa(record):
    return dict(ctx=f"Question: {record['goal']}\nAnswer:", endings=[record["sol1"], record["sol2"]],
                label=record["label"])


def render_lambada(record):
    passage, _, word = record["text"].rpartition(" ")
    return dict(ctx=passage, endings=[word], label=0)


# Title; dataset on the hub, configuration, split; the columns of a record, and what makes an example of it (HellaSwag's
# are examples already)
TASKS = {
    "hellaswag": ("HellaSwag", "Rowan/hellaswag", None, "validation", "ctx, endings, label", dict),
    "arc_easy": ("ARC-easy", "allenai/ai2_arc", "ARC-Easy", "test", "question, choices, answerKey", render_arc),
    "arc_challenge": ("ARC-challenge", "allenai/ai2_arc", "ARC-Challenge", "test", "question, choices, answerKey",
                      render_arc),
    "piqa": ("PIQA", "baber/piqa", None, "validation", "goal, sol1, sol2, label", render_piqa),
    "lambada": ("LAMBADA", "EleutherAI/lambada_openai", "default", "test", "text", render_lambada),
}


def task_names(text):
    names = text.replace(" ", "").split(",")
    if unknown := [name for name in names if name not in TASKS]:
        raise argparse.ArgumentTypeError(f"{unknown[0]} is none of {', '.join(TASKS)}")
    return names


def download(task="hellaswag", limit=None):
    """A task's examples, from the Hugging Face hub or its cache"""
    datasets = import_datasets()
    _, repository, config, split, *_ = TASKS[task]
    hint = ", or name a file of examples with hellaswag.py --data"
    records = ask_hub(repository, lambda: datasets.load_dataset(repository, config, split=split), hint)
    return [make_example(task, record, f"{repository}, record {i}")
            for i, record in enumerate(itertools.islice(records, limit), start=1)]


def read_examples(path, limit=None, task="hellaswag"):
    """A .jsonl file of a task's records -> examples"""
    lines = itertools.islice(read_lines(path), limit)
    examples = [make_example(task, line, f"{path}, line {number}") for number, line in lines]
    if not examples:
        raise UserError(f"{path} holds no examples")
    return examples


def read_tasks(tasks, path=None, limit=None):
    """-> {task: its examples}, of a file or downloaded"""
    if path and len(tasks) > 1:
        raise UserError("--data is a file of one task's examples; name one --task")
    return {task: read_examples(path, limit, task) if path else download(task, limit) for task in tasks}


def make_example(task, record, where):
    """A record, as a dict or as JSON, perhaps a hostile one -> an example"""
    title, *_, columns, render = TASKS[task]
    try:
        example = render(record if isinstance(record, dict) else json.loads(record))
        endings = example["endings"]
        if not isinstance(endings, list) or len(endings) > 10 or int(example["label"]) not in range(len(endings)):
            raise ValueError
        if not all(isinstance(text, str) and text.encode() for text in (example["ctx"], *endings)):
            raise ValueError  # encode() raises one itself for half a surrogate pair
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        raise UserError(f"{where}: not an example of {title} ({columns})") from None
    return example


# -- losses

def weights_dtype(dtype):
    """The dtype in which to open a model that will be scored in `dtype`"""
    return dtype if dtype == "int8" else "float32"


def precision(model, dtype):
    """A context manager: scores as training does, with float32 weights and matrices multiplied in `dtype`"""
    device = model.lm_head.weight.device
    return autocast(device, pick_dtype(dtype, device))


def ids_at_once(device):
    """How many of the vocabulary's logits to compute at once"""
    return 8192 if device.type == "cuda" else 1024


def token_losses(model, x, targets):
    """
    The cross-entropy of targets (N,) given final hidden states x (N, C), and whether each is the most likely token. The
    vocabulary is taken part by part: logits that fit into a CPU's cache are computed 1.4 times as fast, and a GPU need
    not hold all of them.
    """
    size, sums, target_logits = ids_at_once(x.device), [], torch.zeros(len(targets), device=x.device)
    largest, likeliest = torch.full_like(target_logits, -math.inf), torch.full_like(targets, -1)
    for begin in range(0, model.cfg.vocab_size, size):
        logits = model.logits(x, slice(begin, begin + size)).float()  # (N, size)
        sums.append(logits.logsumexp(1))
        values, ids = logits.max(1)  # one of several equal ones, which are common in bfloat16
        likeliest = torch.where(values > largest, begin + ids, likeliest)
        largest = torch.maximum(largest, values)
        column = (targets - begin).clamp(0, logits.size(1) - 1)
        is_in_part = column == targets - begin
        target_logits = torch.where(is_in_part, logits.gather(1, column[:, None])[:, 0], target_logits)
    return torch.stack(sums).logsumexp(0) - target_logits, likeliest == targets


@torch.no_grad()
def sum_losses(model, batches, byte_lengths=None, should_stop=lambda: False):
    """
    Over batches of (x, y) or (x, y, document) -> the summed loss of all targets y >= 0 in nats, the number of these
    targets, and their length in bytes, looked up in byte_lengths. Asks `should_stop` between batches.
    """
    was_training, nats, tokens, n_bytes = model.training, 0.0, 0, 0
    model.eval()
    for x, y, *document in batches:
        if should_stop():
            break
        hidden = model.hidden(x, *isolate_documents(*document)) if document else model.hidden(x)
        targets = y[y >= 0]
        losses, _ = token_losses(model, hidden[y >= 0], targets)
        nats += losses.cpu().double().sum().item()
        tokens += len(targets)
        if byte_lengths is not None:
            n_bytes += byte_lengths[targets].sum().item()
    model.train(was_training)
    return nats, tokens, n_bytes


def bits_per_byte(nats, n_bytes):
    return nats / math.log(2) / n_bytes if n_bytes else math.nan


def perplexity(loss):
    return torch.tensor(loss, dtype=torch.float64).exp().item()  # math.exp raises for large losses; this is inf


# -- scores

def split_example(example, enc, block_size=1024):
    """
    -> the context's tokens, and each ending's. An ending follows its context after a space. Without an ending's last
    token, which is only predicted, they must fit into block_size: the context is cut from the left, to at least one
    token, and endings to block_size.
    """
    texts = [example["ctx"], *(" " + ending for ending in example["endings"])]
    context, *endings = [encode_text(enc, text) for text in texts]
    endings = [ending[:block_size] for ending in endings]
    room = block_size + 1 - max(map(len, endings))
    return context[-room:], endings


class Batch:
    """
    Examples as rows of one tensor. A row is a context and then its endings, each without its last token, which is only
    ever a target. A mask hides the endings from one another, and the positions of each continue from the context: so
    the context is computed once instead of once per ending.
    """

    def __init__(self, examples, device):
        # A segment is 0 for the context, 1 for the first ending, ... Padding is 0 too, but nothing before it sees it.
        n_endings = max(len(endings) for _, endings, _, _ in examples)
        rows, positions, segments, sources, targets = [], [], [], [], []
        for r, (context, endings, _, _) in enumerate(examples):
            row, position, segment = list(context), list(range(len(context))), [0] * len(context)
            for i, ending in enumerate(endings):
                # A token is predicted at the token before it; for an ending's first that is the end of the context.
                places = [len(context) - 1, *range(len(row), len(row) + len(ending) - 1)]
                sources += [(r, place, n_endings * r + i) for place in places]
                targets += ending
                row += ending[:-1]
                position += range(len(context), len(context) + len(ending) - 1)
                segment += [i + 1] * (len(ending) - 1)
            rows.append(torch.tensor(row))
            positions.append(torch.tensor(position))
            segments.append(torch.tensor(segment))
        self.idx, self.positions, segment = (
            nn.utils.rnn.pad_sequence(column, batch_first=True).to(device) for column in (rows, positions, segments))
        L = self.idx.size(1)
        visible = (segment[:, None, :] == segment[:, :, None]) | (segment[:, None, :] == 0)  # (B, L, L)
        self.mask = (visible & torch.ones(L, L, dtype=torch.bool, device=device).tril())[:, None]  # (B, 1, L, L)
        # For every target (N,): the row and the place where it is predicted, and the ending it belongs to.
        self.row, self.place, self.ending = torch.tensor(sources, device=device).T
        self.targets = torch.tensor(targets, device=device)
        # How many tokens and how many bytes every ending has, (B, n_endings); 0 where an example has fewer endings
        self.n_tokens, self.n_bytes = (
            nn.utils.rnn.pad_sequence(list(map(torch.tensor, column)), batch_first=True).to(device)
            for column in ([[len(e) for e in endings] for _, endings, _, _ in examples],
                           [n_bytes for _, _, n_bytes, _ in examples]))
        self.labels = torch.tensor([label for *_, label in examples], device=device)  # (B,)


def encode(examples, enc, block_size):
    """Each example as (context, endings, bytes of each ending without its leading space, label)"""
    if block_size < 2:
        raise UserError("to judge endings, a model needs a context of at least two tokens")
    encoded = []
    for example in examples:
        context, endings = split_example(example, enc, block_size)
        n_bytes = [len(enc.decode_bytes(ending)) - 1 for ending in endings]  # as far as they fit into the context
        encoded.append((context, endings, n_bytes, int(example["label"])))
    return encoded


def batch_tokens(device):
    return 16384 if device.type == "cuda" else 1024


def make_batches(encoded, budget):
    """Groups examples of similar length, at most `budget` tokens with padding"""
    def size(example):
        return len(example[0]) + sum(len(ending) - 1 for ending in example[1])

    batches, width = [], 0
    for example in sorted(encoded, key=size, reverse=True):  # longest first: memory runs out at once or never
        if not batches or (len(batches[-1]) + 1) * width > budget:
            batches.append([])
            width = size(example)
        batches[-1].append(example)
    return batches


@torch.no_grad()
def score(model, encoded, rank=0, world_size=1, should_stop=lambda: False):
    """
    Over this process's share of the examples -> how many are right by each of MEASURES, for how many the right ending's
    tokens are the most likely ones, the right endings' summed loss in nats, and how many examples there are. Asks
    `should_stop` between batches.
    """
    was_training, device = model.training, model.lm_head.weight.device
    model.eval()
    batches = make_batches(encoded, batch_tokens(device))[rank::world_size]
    totals, n = torch.zeros(5, device=device), 0
    with progress_bar(sum(map(len, batches)) if rank == 0 else 0, "examples") as bar:
        for examples in batches:
            if should_stop():
                break
            batch = Batch(examples, device)
            x = model.hidden(batch.idx, batch.positions, batch.mask)[batch.row, batch.place]  # (B, L, C) -> (N, C)
            totals += torch.stack(judge(batch, *token_losses(model, x, batch.targets)))
            n += len(examples)
            if rank == 0:
                bar.update(len(examples))
    model.train(was_training)
    return *totals.tolist(), n


def judge(batch, losses, is_likeliest):
    """A batch's totals, from the loss of each target (N,) and whether it is the most likely token"""
    def per_ending(values):
        sums = torch.zeros(batch.n_tokens.numel(), device=values.device).index_add_(0, batch.ending, values)
        return sums.view_as(batch.n_tokens)  # (N,) -> (B, n_endings)

    sums, labels = per_ending(losses), batch.labels[:, None]
    is_missing, is_finite = batch.n_tokens == 0, sums.isfinite().all(dim=1)
    totals = []
    for scores in (sums, sums / batch.n_tokens, sums / batch.n_bytes):
        best = scores.masked_fill(is_missing, math.inf).argmin(dim=1)
        totals.append(((best == batch.labels) & is_finite).sum())  # no credit for NaN
    is_greedy = per_ending(is_likeliest.float()) == batch.n_tokens
    return [*totals, is_greedy.gather(1, labels).sum(), sums.gather(1, labels).sum()]


def evaluate(model, enc, examples, rank=0, world_size=1):
    """-> how many of this process's share of the examples are right by each of MEASURES, and how many it has"""
    *right, _, _, n = score(model, encode(examples, enc, model.cfg.block_size), rank, world_size)
    return *map(int, right), n


def task_scores(model, enc, task, examples):
    """-> {(task, measure): score}"""
    *right, n_greedy, nats, n = score(model, encode(examples, enc, model.cfg.block_size))
    if task == "lambada":
        return {(task, "acc"): n_greedy / n, (task, "perplexity"): perplexity(nats / n)}
    return {(task, measure): count / n for measure, count in zip(MEASURES, right)}


def with_error(measure, score, n):
    """A score and, of a share of n examples, its standard error"""
    text = f"{measure} {score:.4f}"
    return text if measure == "perplexity" else text + f" +- {math.sqrt(score * (1 - score) / n):.4f}"


def add_model_options(p):
    """The options that say which model to open; eval.py has them too."""
    p.add_argument("--ckpt", help="a checkpoint, a run's or a Hugging Face folder, or a name such as gpt2 (default: "
                   "the newest checkpoint of --out_dir)")
    p.add_argument("--out_dir", default=".", help="a run's folder (default: %(default)s)")
    p.add_argument("--device", default="auto", help="auto, cuda, mps or cpu (default: %(default)s)")
    p.add_argument("--dtype", default="auto", type=dtype_name, choices=("auto", *DTYPES, "int8"),
                   help="float32, bfloat16, float16, or int8, to generate text faster on a CPU (default: %(default)s)")


def add_task_options(p):
    p.add_argument("--task", type=task_names, default=["hellaswag"],
                   help=f"one or more of {','.join(TASKS)} (default: hellaswag)")
    p.add_argument("--data", help="a .jsonl file of the task's examples (default: downloaded)")


def main():
    p = Parser(prog="hellaswag.py", description=__doc__)
    add_model_options(p)
    add_task_options(p)
    p.add_argument("--limit", type=positive, help="use only the first examples")
    a = p.parse_args()
    model, known = open_model(a.ckpt, a.out_dir, a.device, weights_dtype(a.dtype))
    enc = get_tokenizer(known["tokenizer"])
    for task, examples in read_tasks(a.task, a.data, a.limit).items():
        with precision(model, a.dtype):
            scores = task_scores(model, enc, task, examples)
        text = ", ".join(with_error(measure, score, len(examples)) for (_, measure), score in scores.items())
        print(f"{TASKS[task][0]} of {known['about']}, {len(examples):,} examples: {text}")


if __name__ == "__main__":
    start_script()
    main()
