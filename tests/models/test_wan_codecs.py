"""Text encoder and autoencoder of a tiny pipeline, against its own library."""

import importlib.util
import sys

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from tmdjax.models.checkpoints import wan_codecs

PROMPTS = ["a red   fox", "", "the blue &amp; old fox runs and runs and runs"]
WORDS = "a the red blue old fox runs and &".split()
LENGTH = 8
MEAN, STD = [0.5, -0.2, 0.1], [2.0, 1.5, 0.7]

missing = [n for n in wan_codecs._PACKAGES if importlib.util.find_spec(n) is None]
needs_packages = pytest.mark.skipif(
    bool(missing), reason=f"needs tmdjax[wan]: {missing} absent"
)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """A folder in the pipeline layout, of random weights, and its autoencoder."""
    import diffusers
    import tokenizers
    import torch
    import transformers

    folder = tmp_path_factory.mktemp("pipeline")
    torch.manual_seed(0)
    ids = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token="<unk>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    words.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder / "tokenizer")
    sizes = dict(vocab_size=len(ids), d_model=6, d_kv=4, d_ff=8, num_layers=2)
    config = transformers.UMT5Config(**sizes, num_heads=2, dropout_rate=0.0)
    transformers.UMT5EncoderModel(config).save_pretrained(folder / "text_encoder")
    sizes = dict(base_dim=4, z_dim=3, dim_mult=[1, 1, 1], num_res_blocks=1)
    autoencoder = diffusers.AutoencoderKLWan(
        **sizes, temperal_downsample=[False, True], latents_mean=MEAN, latents_std=STD
    ).eval()
    autoencoder.save_pretrained(folder / "vae")
    return folder, autoencoder


@needs_packages
def test_text_states_equal_the_pipeline(pipeline, refused):
    import diffusers
    import transformers

    folder, autoencoder = pipeline
    encoder = transformers.UMT5EncoderModel.from_pretrained(folder / "text_encoder")
    peer = diffusers.WanPipeline(
        tokenizer=transformers.AutoTokenizer.from_pretrained(folder / "tokenizer"),
        text_encoder=encoder.eval(),
        vae=autoencoder,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
    )
    want, _ = peer.encode_prompt(
        PROMPTS, do_classifier_free_guidance=False, max_sequence_length=LENGTH
    )
    encode_text = wan_codecs.load_text_encoder(folder, length=LENGTH, batch_size=2)
    got = encode_text(PROMPTS)
    assert got.shape == (3, LENGTH, 6) and got.dtype == np.float32
    assert_allclose(got, want.detach().numpy(), atol=1e-6)
    # Three words and the end; the end alone; more words than fit.
    filled = np.any(got != 0, -1).sum(1)
    assert_array_equal(filled, [4, 1, LENGTH])
    assert encode_text([]).shape == (0, LENGTH, 6)
    refused("prompts is the string 'a fox'", encode_text, "a fox", error=TypeError)


@needs_packages
def test_latents_are_standardised_and_decoded(pipeline):
    import torch

    folder, autoencoder = pipeline
    encode_video, decode_video = wan_codecs.load_autoencoder(folder)
    video = np.random.default_rng(0).integers(0, 256, (2, 5, 8, 12, 3), np.uint8)
    latents = encode_video(video)
    assert latents.shape == (2, 3, 2, 3, 3) and latents.dtype == np.float32
    x = torch.tensor(video).permute(0, 4, 1, 2, 3) / 127.5 - 1
    mean, std = (torch.tensor(v).view(1, 3, 1, 1, 1) for v in (MEAN, STD))
    with torch.no_grad():
        raw = autoencoder.encode(x).latent_dist.mode()
        decoded = autoencoder.decode(raw).sample
    want = ((raw - mean) / std).permute(0, 2, 3, 4, 1)
    assert_allclose(latents, want, atol=1e-5)
    back = decode_video(latents)
    assert back.shape == video.shape and back.dtype == np.uint8
    want = 255 * (decoded / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 4, 1).numpy()
    assert np.abs(back.astype(np.float32) - want).max() < 0.51


@needs_packages
def test_videos_that_do_not_fit(pipeline, refused):
    encode_video, decode_video = wan_codecs.load_autoencoder(pipeline[0])
    for shape, dtype, message in (
        ((1, 5, 8, 8, 3), "float32", r"video is float32\[1, 5, 8, 8, 3\]; give uint8"),
        ((5, 8, 8, 3), "uint8", "give uint8"),
        ((1, 5, 8, 8, 4), "uint8", "give uint8"),
        ((1, 4, 8, 8, 3), "uint8", r"4 x 8 x 8 .* 1 \+ a multiple of 2 frames"),
        ((1, 5, 8, 6, 3), "uint8", "sides that are multiples of 4"),
    ):
        refused(message, encode_video, np.zeros(shape, dtype))
    latents = np.zeros((1, 1, 2, 2, 16))
    refused(r"latents have shape .*width, 3\]", decode_video, latents)


@needs_packages
def test_parts_that_are_absent(tmp_path, refused):
    absent = dict(error=FileNotFoundError)
    message = "tokenizer is absent; give the folder"
    refused(message, wan_codecs.load_text_encoder, tmp_path, **absent)
    refused("vae is absent", wan_codecs.load_autoencoder, tmp_path, **absent)


@pytest.mark.parametrize("name", wan_codecs._PACKAGES)
def test_an_absent_package_names_its_extra(monkeypatch, tmp_path, name, refused):
    before = wan_codecs._PACKAGES[: wan_codecs._PACKAGES.index(name)]
    if set(before) & set(missing):
        pytest.skip(f"needs {before}, which are imported first")
    monkeypatch.setitem(sys.modules, name, None)
    message = rf"{name}.*pip install 'tmdjax\[wan\]'"
    refused(message, wan_codecs.load_autoencoder, tmp_path, error=ImportError)
