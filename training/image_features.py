"""The frozen tower's output on disk: it runs once per distinct image, and later epochs and runs read the file.

A cache folder holds one folder per tower, image processing and dtype (named by a hash of all three, so that a changed
one never reads the other's features), and in it safetensors shards with one tensor `[positions, tower width]` per
image, named by the SHA-256 of the image. A shard is named by its own SHA-256, so that a damaged one is noticed.
"""

import functools
import hashlib
import json
import os
import shutil
import socket
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors import safe_open
from safetensors.torch import save
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from transformers.modeling_outputs import BaseModelOutputWithPooling

from ..image_loading_minimind_v import load_image
from ..modeling_minimind_v import MiniMindVForConditionalGeneration
from ..processing_minimind_v import MiniMindVProcessor
from ..vision_tower_minimind_v import count_positions
from .data import images_of

SHARD_SIZE = 256  # images; what an interruption can lose at most


def content_key(image: Any) -> str:
    """SHA-256 of an image: of a file's bytes where there are some, else of its pixels."""
    if isinstance(image, (str, os.PathLike)) and os.path.isfile(image):
        image = Path(image).read_bytes()
    if not isinstance(image, bytes):
        image = load_image(image, "the picture")
        image = f"{image.size}".encode() + image.tobytes()
    return hashlib.sha256(image).hexdigest()


def shard_name(content: bytes) -> str:
    """Name of the file with this content."""
    return hashlib.sha256(content).hexdigest()[:16] + ".safetensors"


def fingerprint(model: MiniMindVForConditionalGeneration, processor: MiniMindVProcessor, dtype: torch.dtype) -> str:
    """Hash of all that the features depend on besides the image."""
    config = model.model.vision_tower.config.to_dict()
    for name in ("transformers_version", "dtype", "_name_or_path"):
        config.pop(name, None)
    description = [config, processor.image_processor.to_dict(), str(dtype)]
    digest = hashlib.sha256(json.dumps(description, sort_keys=True, default=str).encode())
    update_digest(digest, model.model.vision_tower.state_dict())
    return digest.hexdigest()[:16]


def update_digest(digest: Any, tensors: dict[str, torch.Tensor]) -> None:
    """Adds names and values of `tensors` to a hash of hashlib."""
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode() + tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)


def pass_features_through(model: MiniMindVForConditionalGeneration) -> None:
    """Lets the model take the tower's output `[N, positions, width]` too, as `pixel_values`."""
    encoder: Any = model.model
    encode = encoder.get_image_features

    @functools.wraps(encode)  # generate() reads the names of the parameters
    def encode_or_pass(
        pixel_values: torch.Tensor,
        pixel_attention_mask: torch.Tensor | None = None,
        spatial_shapes: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        if pixel_values.ndim == 3 and spatial_shapes is None:  # with shapes, they are patches of a NaFlex tower
            return encoder.project(BaseModelOutputWithPooling(last_hidden_state=pixel_values))
        return encode(pixel_values, pixel_attention_mask, spatial_shapes, **kwargs)

    encoder.get_image_features = encode_or_pass


class ImageFeatureCache:
    """Features of images, by their content.

    Args:
        directory: Cache folder; may be shared by runs and models.
        model: Whose tower makes the features.
        processor: Whose image processor prepares the images.
        dtype: Of the features; not float32: the tower runs under autocast, as in training with that dtype.

    Example:
        >>> cache = ImageFeatureCache("features", model, processor)
        >>> cache.fill(MiniMindVDataset("images/"))
        >>> cache.get("images/cat.png").shape
        torch.Size([64, 768])
    """

    def __init__(
        self,
        directory: str | Path,
        model: MiniMindVForConditionalGeneration,
        processor: MiniMindVProcessor,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.folder = Path(directory) / fingerprint(model, processor, dtype)
        self.model, self.processor, self.dtype = model, processor, dtype
        self.folder.mkdir(parents=True, exist_ok=True)
        self._delete_orphans()
        self.shards: dict[str, str] = {}  # image -> shard
        self.files: dict[str, Any] = {}  # shard -> open file
        self.refresh()

    def refresh(self) -> None:
        """Reads which images the folder has. Shards that are new to this object are checked, and damaged ones deleted.

        Their images are encoded again. Another process may come upon a damaged shard at the same time.
        """
        known = set(self.shards.values())
        for path in sorted(self.folder.glob("*.safetensors")):
            if path.name in known:
                continue
            try:
                if path.name == shard_name(path.read_bytes()):
                    with safe_open(path, framework="pt") as file:
                        self.shards.update(dict.fromkeys(file.keys(), path.name))
                else:
                    path.unlink()
            except FileNotFoundError:
                continue

    def _delete_orphans(self) -> None:
        """Deletes what processes of this machine that are no more had begun to write."""
        for path in self.folder.glob(f"*.{socket.gethostname()}.*.part"):
            if not psutil.pid_exists(int(path.suffixes[-2][1:])):
                path.unlink(missing_ok=True)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"model": None, "files": {}}  # a data loader's worker only reads

    def get(self, image: Any) -> torch.Tensor | None:
        """Features `[positions, width]`, or None if the cache has none or the image cannot be read."""
        try:
            key = content_key(image)
        except (OSError, ValueError, TypeError):
            return None
        name = self.shards.get(key)
        if name is None:
            return None
        if name not in self.files:
            self.files[name] = safe_open(self.folder / name, framework="pt")
        return self.files[name].get_tensor(key)

    @torch.no_grad()
    def fill(self, rows: Any, batch_size: int = 32, workers: int = 0) -> None:
        """Encodes all images that the cache has not. What an interruption leaves is used by the next call.

        Args:
            rows: [`MiniMindVDataset`] or another sequence of `{"messages": ...}`. Broken rows and images are passed
                over: the check and the collator report them.
            batch_size: Images per call of the tower.
            workers: Processes that read images.

        Raises:
            OSError: The disk has not enough space; nothing was written.
        """
        missing = self._find_missing(rows)
        if not missing:
            return
        size = self._check_space(len(missing))
        images = _Images(rows, missing, self.processor)
        loader = DataLoader(images, batch_size, collate_fn=_collate_readable, num_workers=workers)
        tower = self.model.model.vision_tower
        device = tower.device
        autocast = nullcontext() if self.dtype == torch.float32 else torch.autocast(device.type, self.dtype)
        shard: dict[str, torch.Tensor] = {}
        with tqdm(total=len(missing), desc=f"encoding pictures ({size / 1e9:.2f} GB)", unit="picture") as progress:
            try:
                for count, keys, inputs in loader:
                    progress.update(count)
                    if keys:
                        with autocast:
                            inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
                            features = tower(inputs.pop("pixel_values"), **inputs).last_hidden_state
                        features = features.to("cpu", self.dtype)
                        shard |= {key: feature.clone() for key, feature in zip(keys, features, strict=True)}
                    if len(shard) >= SHARD_SIZE:
                        self._write(shard)
                        shard = {}
            finally:
                if shard:
                    self._write(shard)

    def _find_missing(self, rows: Any) -> dict[str, tuple[int, int]]:
        """Key of each image that the cache has not -> the row and the place in it where the image stands."""
        missing: dict[str, tuple[int, int]] = {}
        for number in tqdm(range(len(rows)), desc="looking for new pictures", unit="row"):
            try:
                for place, image in enumerate(images_of(rows[number].get("messages", []))):
                    if (key := content_key(image)) not in self.shards:
                        missing.setdefault(key, (number, place))
            except (OSError, ValueError, TypeError):
                continue
        return missing

    def _check_space(self, count: int) -> int:
        """Bytes that the features of `count` images take; an OSError if the disk has fewer."""
        config: Any = self.model.config
        positions = count_positions(config) + (config.vision_feature_select_strategy == "default")
        needed = count * positions * config.vision_config.hidden_size * self.dtype.itemsize
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            raise OSError(
                f"Features of {count} pictures need {needed / 1e9:.1f} GB in {self.folder.parent}, which has "
                f"{free / 1e9:.1f} GB free. Choose another folder, train in bfloat16, or do without the cache."
            )
        return needed

    def _write(self, shard: dict[str, torch.Tensor]) -> None:
        content = save(shard)
        name = shard_name(content)
        part = self.folder / f"{name}.{socket.gethostname()}.{os.getpid()}.part"
        try:
            part.write_bytes(content)
            part.replace(self.folder / name)  # whole or not at all
        finally:
            part.unlink(missing_ok=True)
        self.shards.update(dict.fromkeys(shard, name))


class _Images(Dataset):
    """Item: (key, inputs of the tower for one image, or None if it is broken)."""

    def __init__(self, rows: Any, wanted: dict[str, tuple[int, int]], processor: MiniMindVProcessor) -> None:
        self.rows, self.wanted, self.processor = rows, list(wanted.items()), processor

    def __len__(self) -> int:
        return len(self.wanted)

    def __getitem__(self, index: int) -> tuple[str, dict[str, torch.Tensor] | None]:
        key, (row, place) = self.wanted[index]
        try:
            image = images_of(self.rows[row]["messages"])[place]
            return key, dict(self.processor(images=[image], return_tensors="pt"))
        except (OSError, ValueError, TypeError):
            return key, None


def _collate_readable(
    items: list[tuple[str, dict[str, torch.Tensor] | None]],
) -> tuple[int, list[str], dict[str, torch.Tensor]]:
    good = [(key, inputs) for key, inputs in items if inputs is not None]
    names = good[0][1] if good else ()
    batch = {name: torch.cat([inputs[name] for _, inputs in good]) for name in names}
    return len(items), [key for key, _ in good], batch
