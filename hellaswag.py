"""
HellaSwag (Zellers et al., 2019): which of four endings continues the context? Chance is 0.25.

    python hellaswag.py                     # the newest checkpoint
    python hellaswag.py --ckpt gpt2 --data hellaswag_val.jsonl --limit 1000

Three measures of an ending are in use, and give three scores: the sum of its tokens' log-probabilities (acc), their average
(build-nanogpt's acc_norm: GPT-2 124M scores 0.2955), and the sum over its length in bytes (lm-evaluation-harness's acc_bytes, and
its acc_norm where a character is a byte). The text is taken as it stands; lm-evaluation-harness's own task cleans it first.
"""
import json
import sys

import dataset

if __name__ == "__main__":
    dataset.large_pages()

import torch
from torch import nn

import model as gpt
from dataset import UserError

URL = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl"
SHA256 = "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588"  # as Hugging Face's datasets have it; 10,042 examples
PATH = "data/hellaswag/hellaswag_val.jsonl"


def download():
    """-> PATH, where the validation examples are fetched to on first use"""
    return dataset.fetch(URL, PATH, SHA256)


def read_examples(path, limit=None):
    """-> a list of dicts with ctx, endings and label"""
    examples, number = [], 0
    try:
        with open(path, encoding="utf-8") as f:
            for number, line in enumerate(f, 1):
                if limit and len(examples) == limit:
                    break
                if not line.strip():
                    continue
                example = json.loads(line)
                texts = [example["ctx"], *example["endings"]]
                if len(texts) != 5 or isinstance(example["endings"], str) or not 0 <= int(example["label"]) < 4 or \
                        not all(isinstance(t, str) and t for t in texts):
                    raise KeyError
                examples.append(example)
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror}") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path}, line {number}: not a HellaSwag example with ctx, four endings and a label") from None
    if not examples:
        raise UserError(f"{path} holds no examples")
    return examples


def split_example(example, enc, block_size=1024):
    """
    -> the context's tokens, and each ending's. An ending follows its context after a space. What is too long for block_size
    loses the beginning of its context, and an ending longer than that its own end.
    """
    context, *endings = enc.encode_ordinary_batch([example["ctx"], *(" " + e for e in example["endings"])], num_threads=1)
    endings = [e[:block_size - 1] for e in endings]
    return context[-(block_size - max(map(len, endings))):] or [enc.eot_token], endings


def render_example(example, enc, block_size=1024):
    """
    One example -> tokens (4, N), mask (4, N) that is 1 where a row's ending stands, and the right row. Rows share the context
    and are padded with zeros.
    """
    context, endings = split_example(example, enc, block_size)
    N = len(context) + max(map(len, endings))
    tokens, mask = torch.zeros(4, N, dtype=torch.long), torch.zeros(4, N, dtype=torch.long)
    for row, ending in enumerate(endings):
        tokens[row, :len(context) + len(ending)] = torch.tensor(context + ending)
        mask[row, len(context):len(context) + len(ending)] = 1
    return tokens, mask, int(example["label"])


class Batch:
    """
    Examples as rows of one tensor. A row is its context and then its four endings one after the other, each without its last
    token, which is only ever a target. The mask hides the endings from one another, and each goes on at the position after the
    context: so the context is computed once for the four.
    """

    def __init__(self, examples, device):
        rows, at, segments, reads, targets = [], [], [], [], []
        for r, (context, endings, _, _) in enumerate(examples):
            row, positions, segment = list(context), list(range(len(context))), [0] * len(context)
            for i, ending in enumerate(endings):
                # the first token is read off the context's last place, every other one off its predecessor
                reads += [(r, len(context) - 1, i)] + [(r, len(row) + j, i) for j in range(len(ending) - 1)]
                targets += ending
                row += ending[:-1]
                positions += range(len(context), len(context) + len(ending) - 1)
                segment += [i + 1] * (len(ending) - 1)
            rows.append(row), at.append(positions), segments.append(segment)
        pad = lambda lists: nn.utils.rnn.pad_sequence([torch.tensor(x) for x in lists], batch_first=True).to(device)
        self.idx, self.positions, segment = map(pad, (rows, at, segments))
        L = self.idx.size(1)
        same = (segment[:, None, :] == segment[:, :, None]) | (segment[:, None, :] == 0)  # (B, asking, asked)
        self.mask = (same & torch.ones(L, L, dtype=torch.bool, device=device).tril())[:, None]  # (B, 1, L, L)
        row, place, ending = torch.tensor(reads).T
        # (places,), and for each read which of these it is, (reads,): four of an example's share one, the context's last
        self.places, self.reads = (t.to(device) for t in torch.unique(row * L + place, return_inverse=True))
        self.ending, self.targets = (row * 4 + ending).to(device), torch.tensor(targets, device=device)
        self.bytes = torch.tensor([n for _, _, n, _ in examples], device=device)  # (B, 4)
        self.labels = torch.tensor([label for *_, label in examples], device=device)


def token_losses(model, x, targets, rows=None):
    """
    x (N, C), what the head reads, and targets (R,) -> their losses (R,), read off the rows of x in turn, or off those given, (R,).
    The vocabulary is taken part by part: logits that stay in a CPU's cache come 1.4 times as fast, and a GPU need not hold all.
    """
    rows = torch.arange(len(x), device=x.device) if rows is None else rows
    size, sums, logit = PART[x.device.type == "cuda"], [], torch.zeros(len(targets), device=x.device)
    for begin in range(0, model.cfg.vocab_size, size):
        logits = model.logits(x, slice(begin, begin + size)).float()
        sums.append(logits.logsumexp(1))
        column = (targets - begin).clamp(0, logits.size(1) - 1)
        logit = torch.where(targets - begin == column, logits[rows, column], logit)  # of the part that has the target
    return torch.stack(sums).logsumexp(0)[rows] - logit


def ending_losses(model, batch):
    """-> the sum of each ending's token losses, and how many tokens it has, (B, 4) and (B, 4)"""
    x = model.hidden(batch.idx, batch.positions, batch.mask).flatten(0, 1)[batch.places]  # only where an ending is read: (places, C)
    losses = token_losses(model, x, batch.targets, batch.reads)
    sums, counts = (torch.zeros(batch.bytes.numel(), device=x.device) for _ in range(2))
    sums.index_add_(0, batch.ending, losses)
    counts.index_add_(0, batch.ending, torch.ones_like(losses))
    return sums.view(-1, 4), counts.view(-1, 4)


# By whether the device is CUDA: tokens of a batch, and ids whose logits are computed at once
BUDGET, PART = {False: 1024, True: 16384}, {False: 1024, True: 8192}


def encode(examples, enc, block_size):
    """Each example as (context, endings, bytes of the endings, label), which batches are made of; once for many evaluations."""
    if block_size < 2:
        raise UserError("HellaSwag takes a model with a context of two tokens at least")
    return [(*split_example(e, enc, block_size), [len(ending.encode()) for ending in e["endings"]], int(e["label"])) for e in examples]


@torch.no_grad()
def score(model, encoded, rank=0, world_size=1, stop=lambda: False):
    """
    -> how many of this process's share are right by the sum, by the average token and by the average byte, and how many there
    are. `stop` is asked between batches.
    """
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    size = lambda e: len(e[0]) + sum(len(ending) - 1 for ending in e[1])
    batches, width = [], 0
    for e in sorted(encoded, key=size, reverse=True):  # the longest first: what fits is known at once
        if not batches or (len(batches[-1]) + 1) * width > BUDGET[device.type == "cuda"]:
            batches.append([])
            width = size(e)
        batches[-1].append(e)
    batches = batches[rank::world_size]
    right, n, show = torch.zeros(3, device=device), 0, dataset.meter("HellaSwag examples", sum(map(len, batches)))
    for examples in batches:
        if stop():
            break
        batch = Batch(examples, device)
        sums, counts = ending_losses(model, batch)
        for i, losses in enumerate((sums, sums / counts, sums / batch.bytes)):
            right[i] += (losses.argmin(dim=1) == batch.labels).sum()
        n += len(examples)
        if rank == 0:
            show(n, lambda: summary(right.tolist(), n))
    model.train(was_training)
    return *(int(r) for r in right), n


def evaluate(model, enc, examples, rank=0, world_size=1):
    """-> how many of this process's share of the examples are right by each of the three measures, and how many there are"""
    return score(model, encode(examples, enc, model.cfg.block_size), rank, world_size)


def summary(right, n):
    """[3, 4, 4], 10 -> "acc 0.3000 +- 0.1449, ...": each share with its standard error"""
    return ", ".join(f"{name} {r / n:.4f} +- {(r / n * (1 - r / n) / n) ** 0.5:.4f}" for name, r in zip(MEASURES, right))


# Known scores by average token: GPT-2's by build-nanogpt's script, GPT-3's by its paper.
REFERENCES = {"GPT-2 124M": 0.2955, "GPT-3 124M": 0.337}
MEASURES = ("acc", "acc_norm by token", "acc_norm by byte")


def main():
    p = dataset.Parser(prog="hellaswag.py", description=__doc__)
    p.add_argument("--ckpt", help="a checkpoint, a run's or a Hugging Face folder, or a name such as gpt2 (the newest of --out_dir)")
    p.add_argument("--out_dir", default=".", help="of the run whose newest checkpoint is judged (%(default)s)")
    p.add_argument("--data", help="the examples, .jsonl (downloaded)")
    p.add_argument("--limit", type=int, help="only the first examples")
    p.add_argument("--device", default="auto")
    p.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
    a = p.parse_args()
    if a.limit is not None and a.limit < 1:
        raise UserError(f"--limit={a.limit} must be at least 1")
    examples = read_examples(a.data or download(), a.limit)
    model, spec, rest = gpt.open_model(a.ckpt, a.out_dir, a.device, a.dtype)
    *right, n = evaluate(model, dataset.get_tokenizer(spec), examples)
    dataset.say(f"HellaSwag of {rest['about']}, {n:,} examples: {summary(right, n)}")


if __name__ == "__main__":
    try:
        main()
    except (UserError, gpt.UserError) as e:
        sys.exit(f"hellaswag.py: {e}")
    except KeyboardInterrupt:
        sys.exit("\nhellaswag.py: stopped")
