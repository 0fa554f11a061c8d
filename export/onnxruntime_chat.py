"""Asks an exported MiniMind-V with ONNX Runtime, without torch and transformers.

    pip install onnxruntime tokenizers pillow jinja2
    python chat.py "What is this?" apple.png

Every export brings this file along. It reads from the top as what a vision-language model does: image tokens of the
prompt are replaced by what the vision encoder makes of the images, and the decoder adds one token after the other.
"""

import argparse
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

FOLDER = Path(__file__).parent


class OnnxModel:
    """The graphs of an exported folder, and what its JSON files say.

    Args:
        folder: An export; beside each other in `onnx` stand the graphs of one precision.
        threads: Of each operator; 0: as many as cores.
    """

    def __init__(self, folder: str | Path, threads: int = 0) -> None:
        self.folder = Path(folder)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        sessions: dict[str, Any] = {
            re.sub("_(quantized|q4)$", "", path.stem): onnxruntime.InferenceSession(
                path, options, providers=["CPUExecutionProvider"]
            )
            for path in sorted(self.folder.glob("onnx/*.onnx"))
        }
        self.embed_tokens = sessions.get("embed_tokens")
        self.vision_encoder: Any = sessions.get("vision_encoder")  # a text-only export has none
        self.decoder = sessions.get("decoder_model_merged") or sessions["model"]
        inputs = self.decoder.get_inputs()
        self.cache = {i.name: i.shape for i in inputs if i.name.startswith("past_key_values")}
        self.image_token_id = self.read_json("config.json").get("image_token_id")
        generation = self.read_json("generation_config.json")
        self.eos_token_ids = np.atleast_1d(generation.get("eos_token_id", -1))
        self.suppress_tokens = generation.get("suppress_tokens", [])

    def read_json(self, name: str) -> dict[str, Any]:
        return json.loads((self.folder / name).read_text(encoding="utf-8"))

    def encode_images(self, pixel_values: np.ndarray) -> np.ndarray:
        """Embeddings `[N, S, H]` of images `[N, 3, height, width]`, float32: S tokens each."""
        return self.vision_encoder.run(None, {"pixel_values": pixel_values})[0]

    def step(self, ids: np.ndarray, past: Mapping[str, np.ndarray], features: np.ndarray | None = None) -> tuple:
        """Logits `[B, T, vocabulary]` of new tokens `[B, T]`, and the cache that contains them too."""
        inputs = ids
        if self.embed_tokens is not None:
            embeds = self.embed_tokens.run(None, {"input_ids": ids})[0]
            if features is not None:
                embeds[ids == self.image_token_id] = features.reshape(-1, embeds.shape[-1])
            inputs = embeds
        rows, length = len(ids), ids.shape[1] + next(iter(past.values())).shape[2]
        name = self.decoder.get_inputs()[0].name
        logits, *cache = self.decoder.run(None, {name: inputs, "attention_mask": np.ones((rows, length), int), **past})
        return logits, dict(zip(past, cache, strict=True))

    def generate(self, ids: list[int], features: np.ndarray | None = None, max_new_tokens: int = 256) -> Iterator[int]:
        """The greedy answer to one prompt, token by token, without the end token.

        Args:
            ids: The prompt, S image tokens for each image.
            features: What `encode_images` made of its images.
            max_new_tokens: The longest answer.
        """
        past = {name: np.zeros((1, shape[1], 0, shape[3]), np.float32) for name, shape in self.cache.items()}
        for _ in range(max_new_tokens):
            logits, past = self.step(np.array([ids]), past, features)
            logits[0, -1, self.suppress_tokens] = -np.inf
            token, features = int(logits[0, -1].argmax()), None
            if token in self.eos_token_ids:
                return
            yield token
            ids = [token]


class Chat:
    """A model with its tokenizer, chat template and image processor: text and images in, text out."""

    def __init__(self, folder: str | Path, threads: int = 0) -> None:
        from jinja2.sandbox import ImmutableSandboxedEnvironment
        from tokenizers import Tokenizer

        self.model = OnnxModel(folder, threads)
        self.tokenizer = Tokenizer.from_file(str(Path(folder, "tokenizer.json")))
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = refuse
        template = self.model.read_json("tokenizer_config.json")["chat_template"]
        # {% generation %} marks answers for training; here it does nothing
        template = re.sub(r"generation(?= *-?%})", lambda found: "if true", template.replace("endgeneration", "endif"))
        self.template = environment.from_string(template)

    def ask(self, text: str, images: Iterable[str | Path] = (), max_new_tokens: int = 256) -> Iterator[str]:
        """Pieces of the answer as they come."""
        images = list(images)
        content = [{"type": "image"} for _ in images] + [{"type": "text", "text": text}]
        messages = [{"role": "user", "content": content if images else text}]
        prompt = self.template.render(messages=messages, add_generation_prompt=True)
        features = None
        if images:
            processor = self.model.read_json("preprocessor_config.json")
            features = self.model.encode_images(np.stack([load_pixels(image, processor) for image in images]))
            prompt = prompt.replace("<|image_pad|>", "<|image_pad|>" * features.shape[1])
        prompt_ids = self.tokenizer.encode(prompt, add_special_tokens=False).ids
        ids: list[int] = []
        answer = shown = ""
        for token in self.model.generate(prompt_ids, features, max_new_tokens):
            ids.append(token)
            answer = self.tokenizer.decode(ids, skip_special_tokens=True)
            whole = answer.rstrip("\ufffd")  # a character may be several tokens
            yield whole[len(shown) :]
            shown = whole
        if answer != shown:
            yield answer[len(shown) :]


def refuse(message: str) -> None:
    """What a chat template calls where a text contains a control token."""
    raise ValueError(message)


def load_pixels(path: str | Path, processor: Mapping[str, Any]) -> np.ndarray:
    """An image file as `[3, height, width]`, float32: upright, on white, resized (for CLIP cropped), normalized."""
    from PIL import Image, ImageOps

    image = ImageOps.exif_transpose(Image.open(path))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image, size = image.convert("RGB"), processor["size"]
    if "shortest_edge" in size:
        short = min(image.size)
        size = {"width": size["shortest_edge"] * image.width // short}
        size["height"] = processor["size"]["shortest_edge"] * image.height // short
    image = image.resize((size["width"], size["height"]), processor["resample"])
    if processor.get("do_center_crop"):
        width, height = processor["crop_size"]["width"], processor["crop_size"]["height"]
        left, top = (image.width - width) // 2, (image.height - height) // 2
        image = image.crop((left, top, left + width, top + height))
    pixels = np.asarray(image, np.float32) * np.float32(processor["rescale_factor"])
    mean, std = (np.array(processor[name], np.float32) for name in ("image_mean", "image_std"))
    return ((pixels - mean) / std).transpose(2, 0, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description="Ask an exported MiniMind-V about images.")
    parser.add_argument("text")
    parser.add_argument("images", nargs="*", help="picture files")
    parser.add_argument("--model", default=FOLDER, help="folder of an export (default: where this file is)")
    arguments = parser.parse_args()
    for piece in Chat(arguments.model).ask(arguments.text, arguments.images):
        print(piece, end="", flush=True)
    print()


if __name__ == "__main__":
    main()
