"""The text encoder and the video autoencoder of Wan 2.1, run by their own libraries.

For users who have those weights in a local folder in the pipeline layout of diffusers
(``tokenizer/``, ``text_encoder/``, ``vae/``). Nothing is downloaded. Texts and videos
are encoded once, ahead of training, so speed matters little here: torch runs on the
device named, and arrays come back on the host.

    encode_text = wan_codecs.load_text_encoder(folder, device="cuda", dtype="bfloat16")
    encode_video, decode_video = wan_codecs.load_autoencoder(folder, device="cuda")
    cond, x = encode_text(["a red fox"]), encode_video(videos)
"""

import html
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tmdjax.core.checks import check_count
from tmdjax.core.optional import import_optional

Folder = str | os.PathLike[str]

_PACKAGES = ("torch", "transformers", "diffusers", "ftfy")


def load_text_encoder(
    folder: Folder,
    *,
    device: str = "cpu",
    dtype: str = "float32",
    length: int = 512,
    batch_size: int = 8,
) -> Callable[[Sequence[str]], np.ndarray]:
    """The text encoder of a pipeline.

    Args:
        folder: of the pipeline, with ``tokenizer/`` and ``text_encoder/``.
        device: where torch runs it.
        dtype: in which torch runs it.
        length: tokens of a text; a longer one is cut off.
        batch_size: texts at a time.

    Returns:
        ``encode_text(prompts) -> float32 [prompt, length, text width]``, rows past the
        true length zero: the condition of :class:`tmdjax.models.VideoDiT`. The empty
        prompt is the null condition.

    Raises:
        ImportError: a package of the extra ``wan`` is absent.
        FileNotFoundError: a part of the pipeline is absent.
    """
    torch, transformers, _, ftfy = _packages()
    check_count("length", length)
    check_count("batch_size", batch_size)
    tokenizer = transformers.AutoTokenizer.from_pretrained(
        _part(folder, "tokenizer"), local_files_only=True
    )
    encoder = transformers.UMT5EncoderModel.from_pretrained(
        _part(folder, "text_encoder"),
        local_files_only=True,
        dtype=getattr(torch, dtype),
    )
    encoder = encoder.eval().to(device)

    def clean(prompt: str) -> str:
        text = html.unescape(html.unescape(ftfy.fix_text(prompt)))
        return re.sub(r"\s+", " ", text).strip()

    def encode_text(prompts: Sequence[str]) -> np.ndarray:
        if isinstance(prompts, str):
            raise TypeError(f"prompts is the string {prompts!r}; give a list of them.")
        states = [np.zeros((0, length, encoder.config.d_model), np.float32)]
        for first in range(0, len(prompts), batch_size):
            tokens = tokenizer(
                [clean(prompt) for prompt in prompts[first : first + batch_size]],
                padding="max_length",
                max_length=length,
                truncation=True,
                return_attention_mask=True,
                return_tensors="pt",
            ).to(device)
            mask = tokens.attention_mask
            with torch.no_grad():
                state = encoder(tokens.input_ids, mask).last_hidden_state
            states.append((state * mask[..., None]).float().cpu().numpy())
        return np.concatenate(states)

    return encode_text


def load_autoencoder(
    folder: Folder, *, device: str = "cpu", dtype: str = "float32"
) -> tuple[Callable[[np.ndarray], np.ndarray], Callable[[Any], np.ndarray]]:
    """The video autoencoder of a pipeline.

    Args:
        folder: of the pipeline, with ``vae/``.
        device: where torch runs it, one video at a time.
        dtype: in which torch runs it; float32 is what it was trained in.

    Returns:
        ``encode_video(uint8 [batch, frame, height, width, 3])``, the mode of the
        latents, standardised by channel: float32 [batch, 1 + (frame - 1) / 4, height /
        8, width / 8, 16] for the published sizes; and its way back,
        ``decode_video(latents) -> uint8 [batch, frame, height, width, 3]``.

    Raises:
        ImportError: a package of the extra ``wan`` is absent.
        FileNotFoundError: a part of the pipeline is absent.
    """
    torch, _, diffusers, _ = _packages()
    kind = getattr(torch, dtype)
    network = diffusers.AutoencoderKLWan.from_pretrained(
        _part(folder, "vae"), local_files_only=True, torch_dtype=kind
    )
    network = network.eval().to(device)
    config = network.config
    mean, std = (
        np.asarray(config[name], np.float32) for name in ("latents_mean", "latents_std")
    )
    every = 2 ** sum(config["temperal_downsample"])
    side = 2 ** len(config["temperal_downsample"]) * (config.get("patch_size") or 1)

    def run(function: Callable[[Any], Any], arrays: Any) -> np.ndarray:
        """Applies a torch function [1, channel, ...] to [batch, ..., channel]."""
        outputs = []
        for array in arrays:
            tensor = torch.from_numpy(np.array(array, np.float32)).to(device, kind)
            with torch.no_grad():
                output = function(tensor.movedim(-1, 0)[None])[0]
            outputs.append(output.movedim(0, -1).float().cpu().numpy())
        return np.stack(outputs)

    def encode_video(video: np.ndarray) -> np.ndarray:
        shape, kind = np.shape(video), getattr(video, "dtype", None)
        if len(shape) != 5 or not shape[0] or shape[4] != 3 or kind != np.uint8:
            raise ValueError(
                f"video is {kind}{list(shape)}; give uint8 [batch, frame, height, "
                f"width, 3]."
            )
        frames, height, width = shape[1:4]
        if frames % every != 1 % every or height % side or width % side:
            raise ValueError(
                f"a video of {frames} x {height} x {width} (frames x height x width) "
                f"does not fit the autoencoder: give 1 + a multiple of {every} frames, "
                f"and sides that are multiples of {side}."
            )
        scaled = (one.astype(np.float32) / 127.5 - 1 for one in np.asarray(video))
        latents = run(lambda x: network.encode(x).latent_dist.mode(), scaled)
        return (latents - mean) / std

    def decode_video(latents: Any) -> np.ndarray:
        shape = np.shape(latents)
        if len(shape) != 5 or not shape[0] or shape[4] != len(mean):
            raise ValueError(
                f"latents have shape {shape}; give [batch, frame, height, width, "
                f"{len(mean)}]."
            )
        raw = (np.asarray(one, np.float32) * std + mean for one in latents)
        video = run(lambda x: network.decode(x).sample, raw)
        return np.round(np.clip((video + 1) * 127.5, 0, 255)).astype(np.uint8)

    return encode_video, decode_video


def _packages() -> list[Any]:
    purpose = "the text encoder and the autoencoder of Wan"
    return [import_optional(name, purpose, "wan") for name in _PACKAGES]


def _part(folder: Folder, name: str) -> str:
    part = Path(folder) / name
    if not part.is_dir():
        raise FileNotFoundError(
            f"{part} is absent; give the folder of a pipeline in the layout of "
            f"diffusers, which has tokenizer, text_encoder and vae in it."
        )
    return str(part)
