"""
Evaluation: turns a model and texts into losses, bits per byte, and scores on HellaSwag.

    python hellaswag.py                     # the newest checkpoint
    python hellaswag.py --ckpt gpt2 --data hellaswag_val.jsonl --limit 1000

HellaSwag (Zellers et al., 2019) asks which of four endings continues a context; chance is 0.25. Three ways to score an
ending are in use, and all are reported: the sum of its tokens' log-probabilities (acc), their average per token
(build-nanogpt's acc_norm: GPT-2 124M scores 0.2955), and their average per byte (lm-evaluation-harness's acc_bytes
and, for ASCII text, its acc_norm). Texts are used as they are; lm-evaluation-harness's task cleans them first.
"""
import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while torch is imported: no traceback

import json
import math

import torch
from torch import nn

from dataset import (Parser, UserError, ask_hub, dtype_name, encode_text, get_tokenizer, positive, progress_bar,
                     read_lines, start_script)
from model import autocast, isolate_documents, open_model, pick_dtype

MEASURES = ("acc", "acc_norm by token", "acc_norm by byte")
# acc_norm by token: GPT-2 by build-nanogpt, GPT-3 by its paper. Shown by eval.py --compare and plot.py.
REFERENCES = {"GPT-2 124M": 0.2955, "GPT-3 124M": 0.337}


# -- losses

def precision(model, dtype):
    """For `with`: scores as training does, by the float32 weights, with matrices multiplied in this dtype"""
    device = model.lm_head.weight.device
    return autocast(device, pick_dtype(dtype, device))


def ids_at_once(device):
    """How many of the vocabulary's logits to compute at once"""
    return 8192 if device.type == "cuda" else 1024


def token_losses(model, x, targets):
    """
    The cross-entropy of targets (N,) given final hidden states x (N, C). The vocabulary is taken part by part: logits
    that fit into a CPU's cache are computed 1.4 times as fast, and a GPU need not hold all of them.
    """
    size, sums, target_logits = ids_at_once(x.device), [], torch.zeros(len(targets), device=x.device)
    for begin in range(0, model.cfg.vocab_size, size):
        logits = model.logits(x, slice(begin, begin + size)).float()  # (N, size)
        sums.append(logits.logsumexp(1))
        column = (targets - begin).clamp(0, logits.size(1) - 1)
        is_in_part = column == targets - begin
        target_logits = torch.where(is_in_part, logits.gather(1, column[:, None])[:, 0], target_logits)
    return torch.stack(sums).logsumexp(0) - target_logits


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
        nats += token_losses(model, hidden[y >= 0], targets).cpu().double().sum().item()
        tokens += len(targets)
        if byte_lengths is not None:
            n_bytes += byte_lengths[targets].sum().item()
    model.train(was_training)
    return nats, tokens, n_bytes


def bits_per_byte(nats, n_bytes):
    return nats / math.log(2) / n_bytes if n_bytes else math.nan


# -- HellaSwag

def download():
    """The validation examples, from the Hugging Face hub or its cache"""
    import datasets
    datasets.disable_progress_bars()
    hint = ", or name a file of examples with hellaswag.py --data"
    return list(ask_hub("Rowan/hellaswag", lambda: datasets.load_dataset("Rowan/hellaswag", split="validation"), hint))


def read_examples(path, limit=None):
    """A .jsonl file -> a list of dicts with ctx, endings and label"""
    examples = []
    for number, line in read_lines(path):
        try:
            examples.append(json.loads(line))
            check_example(examples[-1])
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            raise UserError(f"{path}, line {number}: not a HellaSwag example (ctx, four endings, label)") from None
        if limit and len(examples) == limit:
            break
    if not examples:
        raise UserError(f"{path} holds no examples")
    return examples


def check_example(example):
    endings = example["endings"]
    if not isinstance(endings, list) or len(endings) != 4 or int(example["label"]) not in range(4):
        raise ValueError
    if not all(isinstance(text, str) and text.encode() for text in (example["ctx"], *endings)):
        raise ValueError  # as does half a surrogate pair


def split_example(example, enc, block_size=1024):
    """
    -> the context's tokens, and each ending's. An ending follows its context after a space. If they do not fit into
    block_size, the context is cut from the left; endings are cut to block_size - 1, so that one token of it remains.
    """
    texts = [example["ctx"], *(" " + ending for ending in example["endings"])]
    context, *endings = [encode_text(enc, text) for text in texts]
    endings = [ending[:block_size - 1] for ending in endings]
    room = block_size - max(map(len, endings))
    return context[-room:], endings


class Batch:
    """
    Examples as rows of one tensor. A row is a context and then its four endings, each without its last token, which is
    only ever a target. A mask hides the endings from one another, and the positions of each continue from the context:
    so the context is computed once instead of four times.
    """

    def __init__(self, examples, device):
        # A segment is 0 for the context and 1 to 4 for the endings. Padding is 0 too, but nothing before it sees it.
        rows, positions, segments, sources, targets = [], [], [], [], []
        for r, (context, endings, _, _) in enumerate(examples):
            row, position, segment = list(context), list(range(len(context))), [0] * len(context)
            for i, ending in enumerate(endings):
                # A token is predicted at the token before it; for an ending's first that is the end of the context.
                places = [len(context) - 1, *range(len(row), len(row) + len(ending) - 1)]
                sources += [(r, place, 4 * r + i) for place in places]
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
        # How many tokens and how many bytes every ending has, (B, 4)
        self.n_tokens = torch.tensor([[len(e) for e in endings] for _, endings, _, _ in examples], device=device)
        self.n_bytes = torch.tensor([n_bytes for _, _, n_bytes, _ in examples], device=device)
        self.labels = torch.tensor([label for *_, label in examples], device=device)  # (B,)


def encode(examples, enc, block_size):
    """Each example as (context, endings, bytes of each ending without its leading space, label)"""
    if block_size < 2:
        raise UserError("HellaSwag needs a model with a context of at least two tokens")
    return [(*split_example(e, enc, block_size), [len(text.encode()) for text in e["endings"]], int(e["label"]))
            for e in examples]


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
    -> how many of this process's share are right by the sum, per token and per byte, and how many it has. Asks
    `should_stop` between batches.
    """
    was_training, device = model.training, model.lm_head.weight.device
    model.eval()
    batches = make_batches(encoded, batch_tokens(device))[rank::world_size]
    right, n = torch.zeros(3, device=device), 0
    with progress_bar(sum(map(len, batches)) if rank == 0 else 0, "HellaSwag examples") as bar:
        for examples in batches:
            if should_stop():
                break
            batch = Batch(examples, device)
            x = model.hidden(batch.idx, batch.positions, batch.mask)[batch.row, batch.place]  # (B, L, C) -> (N, C)
            losses = token_losses(model, x, batch.targets)
            sums = torch.zeros(4 * len(examples), device=device).index_add_(0, batch.ending, losses).view(-1, 4)
            for i, scores in enumerate((sums, sums / batch.n_tokens, sums / batch.n_bytes)):
                is_right = scores.argmin(dim=1) == batch.labels
                right[i] += (is_right & scores.isfinite().all(dim=1)).sum()  # no credit for NaN
            n += len(examples)
            if rank == 0:
                bar.update(len(examples))
    model.train(was_training)
    return *map(int, right.tolist()), n


def evaluate(model, enc, examples, rank=0, world_size=1):
    """-> how many of this process's share of the examples are right by each of MEASURES, and how many it has"""
    return score(model, encode(examples, enc, model.cfg.block_size), rank, world_size)


def add_model_options(p):
    """The options that say which model to open; eval.py has them too."""
    p.add_argument("--ckpt", help="a checkpoint, a run's or a Hugging Face folder, or a name such as gpt2 (default: "
                   "the newest checkpoint of --out_dir)")
    p.add_argument("--out_dir", default=".", help="a run's folder (default: %(default)s)")
    p.add_argument("--device", default="auto", help="auto, cuda, mps or cpu (default: %(default)s)")
    p.add_argument("--dtype", default="auto", type=dtype_name, choices=("auto", "float32", "bfloat16", "float16"),
                   help="(default: %(default)s)")


def main():
    p = Parser(prog="hellaswag.py", description=__doc__)
    add_model_options(p)
    p.add_argument("--data", help="a .jsonl file of examples (default: downloaded)")
    p.add_argument("--limit", type=positive, help="use only the first examples")
    a = p.parse_args()
    model, known = open_model(a.ckpt, a.out_dir, a.device, "float32")
    examples = read_examples(a.data, a.limit) if a.data else download()[:a.limit]
    with precision(model, a.dtype):
        *right, n = evaluate(model, get_tokenizer(known["tokenizer"]), examples)
    # each share with its standard error
    scores = [f"{name} {r / n:.4f} +- {math.sqrt(r / n * (1 - r / n) / n):.4f}" for name, r in zip(MEASURES, right)]
    print(f"HellaSwag of {known['about']}, {n:,} examples: {', '.join(scores)}")


if __name__ == "__main__":
    start_script()
    main()
