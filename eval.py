"""
Says what a model has to say.

    python eval.py --prompt "Once"                                   # the newest checkpoint of this folder
    python eval.py --ckpt gpt2 --prompt "Hello, I'm a language model," --num_samples 5 --temperature 0

    from eval import generate_text
    print(generate_text(prompt="Once", max_new_tokens=50, temperature=0.7, top_k=50, top_p=0.95))
"""
import codecs
import functools
import inspect
import math
import sys

import torch

import dataset
import model as gpt
from dataset import UserError


@functools.lru_cache(maxsize=1)
def open_speaker(ckpt, out_dir, device, dtype):
    """-> the model, its tokenizer, and a line that says what it is"""
    model, spec, about = gpt.open_model(ckpt, out_dir, device, dtype)
    return model, dataset.get_tokenizer(spec), about


def stream_text(model, enc, prompt, max_new_tokens, temperature, top_k, top_p, seed=None):
    """Yields the continuation of the prompt piece by piece, up to the end of the text."""
    device = next(model.parameters()).device
    idx = torch.tensor([[enc.eot_token] + enc.encode_ordinary(prompt)], device=device)  # every document begins with end-of-text
    generator = torch.Generator(device)
    generator.manual_seed(seed) if seed is not None else generator.seed()
    text = codecs.getincrementaldecoder("utf-8")("replace")  # a character may be spread over several tokens
    tokens = model.stream(idx, temperature, top_k, top_p, generator)
    for _ in range(max_new_tokens):
        token = next(tokens).item()
        if token == enc.eot_token:
            break
        yield text.decode(enc.decode_single_token_bytes(token))
    yield text.decode(b"", final=True)


def generate_text(prompt="", max_new_tokens=50, temperature=0.7, top_k=50, top_p=0.95, seed=None, ckpt=None, out_dir=".", device="auto", dtype="auto"):
    """-> the prompt and its continuation"""
    model, enc, _ = open_speaker(ckpt, out_dir, device, dtype)
    return prompt + "".join(stream_text(model, enc, prompt, max_new_tokens, temperature, top_k, top_p, seed))


def main():
    p = dataset.Parser(prog="eval.py", description=__doc__)
    p.add_argument("--ckpt", help="a checkpoint, a Hugging Face folder, or a name such as gpt2 (the newest of --out_dir)")
    p.add_argument("--out_dir", help="of the run whose newest checkpoint speaks (%(default)s)")
    p.add_argument("--prompt", help="what the text begins with")
    p.add_argument("--num_samples", type=int, default=1)
    p.add_argument("--max_new_tokens", type=int, help="(%(default)s)")
    p.add_argument("--temperature", type=float, help="0 takes the likeliest token each time (%(default)s)")
    p.add_argument("--top_k", type=int, help="choose among the k likeliest; 0: among all (%(default)s)")
    p.add_argument("--top_p", type=float, help="choose among the likeliest that make up this probability (%(default)s)")
    p.add_argument("--seed", type=int, help="for the same text again")
    p.add_argument("--device", help="auto, cuda, mps or cpu (%(default)s)")
    p.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), help="(%(default)s)")
    p.set_defaults(**{k: v.default for k, v in inspect.signature(generate_text).parameters.items()})
    p.set_defaults(max_new_tokens=200)
    a = p.parse_args()
    sys.stdout.reconfigure(errors="replace")  # where the terminal lacks a letter
    for name, good in (("num_samples", a.num_samples >= 1), ("max_new_tokens", a.max_new_tokens >= 1), ("temperature", 0 <= a.temperature < math.inf),
                       ("top_k", a.top_k >= 0), ("top_p", 0 < a.top_p <= 1)):
        if not good:
            raise UserError(f"--{name}={getattr(a, name)} is out of range")
    model, enc, about = open_speaker(a.ckpt, a.out_dir, a.device, a.dtype)
    print(about, file=sys.stderr)
    for i in range(a.num_samples):
        print("---\n" * (i > 0) + a.prompt, end="", flush=True)
        for piece in stream_text(model, enc, a.prompt, a.max_new_tokens, a.temperature, a.top_k, a.top_p, a.seed if a.seed is None else a.seed + i):
            print(piece, end="", flush=True)
        print()


if __name__ == "__main__":
    try:
        main()
    except (UserError, gpt.UserError) as e:
        sys.exit(f"eval.py: {e}")
    except KeyboardInterrupt:
        sys.exit("")
