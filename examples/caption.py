"""Captions pictures with the embedded model: python examples/caption.py examples/images"""

import argparse
from pathlib import Path

from PIL import Image
from transformers import pipeline

CHECKPOINT = Path(__file__).resolve().parents[1] / "checkpoints" / "minimind-v-emoji"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pictures", nargs="+", type=Path, help="picture files, or folders of them")
    parser.add_argument("--model", default=str(CHECKPOINT), help="checkpoint folder or Hub repository")
    parser.add_argument("--prompt", default="Describe this image.", help="for example 这是什么？")
    arguments = parser.parse_args()

    endings = tuple(Image.registered_extensions())
    files = []
    for path in arguments.pictures:
        files += sorted(p for p in path.iterdir() if p.suffix.lower() in endings) if path.is_dir() else [path]
    captioner = pipeline("image-to-text", model=arguments.model, trust_remote_code=True)
    for file in files:
        print(f"{file}: {captioner(str(file), prompt=arguments.prompt)[0]['generated_text']}")


if __name__ == "__main__":
    main()
