"""
HellaSwag (Zellers et al., 2019): which of four endings continues the context? Chance is 0.25; GPT-2 124M scores 0.2955 by
the measure used here, the average loss of an ending's tokens.

    python hellaswag.py                     # the newest checkpoint
    python hellaswag.py --ckpt gpt2 --data hellaswag_val.jsonl --limit 1000
"""
import json
import sys

import torch
from torch.nn import functional as F

import dataset
import model as gpt
from dataset import UserError

URL = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl"  # 10,042 examples
PATH = "data/hellaswag/hellaswag_val.jsonl"


def download():
    """-> PATH, where the validation examples are fetched to on first use"""
    return dataset.fetch(URL, PATH)


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
                if not (isinstance(example["ctx"], str) and len(example["endings"]) == 4 and 0 <= int(example["label"]) < 4):
                    raise KeyError
                examples.append(example)
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror}") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path}, line {number}: not a HellaSwag example with ctx, four endings and a label") from None
    if not examples:
        raise UserError(f"{path} holds no examples")
    return examples


def render_example(example, enc, block_size=1024):
    """
    One example -> tokens (4, N), mask (4, N) that is 1 where a row's ending stands, and the right row. Rows share the context
    and are padded with zeros. An ending follows its context after a space. What is too long for block_size loses the
    beginning of its context, and an ending longer than that its own end.
    """
    endings = [enc.encode_ordinary(" " + e)[:block_size - 1] for e in example["endings"]]
    context = enc.encode_ordinary(example["ctx"])[-(block_size - max(map(len, endings))):]
    N = len(context) + max(map(len, endings))
    tokens, mask = torch.zeros(4, N, dtype=torch.long), torch.zeros(4, N, dtype=torch.long)
    for row, ending in enumerate(endings):
        tokens[row, :len(context) + len(ending)] = torch.tensor(context + ending)
        mask[row, len(context):len(context) + len(ending)] = 1
    return tokens, mask, int(example["label"])


@torch.no_grad()
def evaluate(model, enc, examples, rank=0, world_size=1, stop=lambda: False):
    """-> how many of this process's share are right, and how many there are. `stop` is asked between examples."""
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    right = n = 0
    for example in examples[rank::world_size]:
        if stop():
            break
        tokens, mask, label = render_example(example, enc, model.cfg.block_size)
        tokens, mask = tokens.to(device), mask.to(device)
        logits = model(tokens, tokens)[0]  # (4, N) -> (4, N, vocab)
        losses = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten(), reduction="none").view(4, -1)
        scored = mask[:, 1:]
        right += int(((losses * scored).sum(1) / scored.sum(1)).argmin() == label)
        n += 1
    model.train(was_training)
    return right, n


def main():
    p = dataset.Parser(prog="hellaswag.py", description=__doc__)
    p.add_argument("--ckpt", help="a checkpoint, a Hugging Face folder, or a name such as gpt2 (the newest of --out_dir)")
    p.add_argument("--out_dir", default=".", help="of the run whose newest checkpoint is judged (%(default)s)")
    p.add_argument("--data", help="the examples, .jsonl (downloaded)")
    p.add_argument("--limit", type=int, help="only the first examples")
    p.add_argument("--device", default="auto")
    p.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
    a = p.parse_args()
    if a.limit is not None and a.limit < 1:
        raise UserError(f"--limit={a.limit} must be at least 1")
    examples = read_examples(a.data or download(), a.limit)
    model, spec, about = gpt.open_model(a.ckpt, a.out_dir, a.device, a.dtype)
    enc = dataset.get_tokenizer(spec)
    right = n = 0
    for start in range(0, len(examples), 50):
        r, m = evaluate(model, enc, examples[start:start + 50])
        right, n = right + r, n + m
        dataset.say(f"{n}/{len(examples)}: {right / n:.4f}", again=True)
    error = (right / n * (1 - right / n) / n) ** 0.5
    dataset.say(f"HellaSwag of {about}: {right}/{n} = {right / n:.4f} +- {error:.4f} by average token loss")


if __name__ == "__main__":
    try:
        main()
    except (UserError, gpt.UserError) as e:
        sys.exit(f"hellaswag.py: {e}")
    except KeyboardInterrupt:
        sys.exit("\nhellaswag.py: stopped")
